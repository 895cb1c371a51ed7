//! Opens what a volume lies on and gives its zones.

use std::path::PathBuf;
use std::sync::Arc;

use crate::{Backend, BlockDevice, Result, Zone};

/// Bytes of the superblock zone.
pub const SUPERBLOCK_ZONE_BYTES: u64 = 1 << 20;

/// Where a volume lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A directory with a file for each zone.
    Directory(PathBuf),
    /// A raw block device, or a file that stands for one, with the zones one after the other.
    Device(PathBuf),
}

/// Which backend serves the devices of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// io_uring where it works, else threads with the reason logged.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Threads.
    Threads,
}

/// How to open the devices.
#[derive(Clone, Debug, Default)]
pub struct MediaOptions {
    /// Which backend to use.
    pub backend: BackendChoice,
}

/// The opened target, locked against other processes until it is dropped.
pub trait Media: Send + Sync + 'static {
    /// The superblock zone, of [`SUPERBLOCK_ZONE_BYTES`].
    fn superblock(&self) -> Zone;

    /// Makes the WAL zone at format: `wal_bytes` written with zeroes and durable, the extents zone empty, directory
    /// entries durable.
    fn create_zones(&self, wal_bytes: u64) -> crate::Op<()>;

    /// The WAL and extents zones of a volume whose superblock says that its log has `wal_bytes`.
    fn zones(&self, wal_bytes: u64) -> Result<(Zone, Zone)>;

    /// True when the target holds nothing yet: no zone file, or a first MiB of zeroes.
    fn is_blank(&self) -> Result<bool>;

    /// Which backend serves it, and why not the one that was asked for.
    fn backend(&self) -> (Backend, Option<String>);

    /// The devices, for shutdown.
    fn devices(&self) -> Vec<Arc<dyn BlockDevice>>;

    /// What to call it in messages: the path.
    fn name(&self) -> String;
}
