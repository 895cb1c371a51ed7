//! Opens what a volume lies on and gives its zones.

use std::path::PathBuf;
use std::sync::Arc;

use crate::file::Missing;
use crate::{Backend, BlockDevice, Result, Zone, file_media};

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

/// Opens what is there: a formatted volume, or a device that may still be blank.
///
/// Blocks for the lock of the target, up to 250 ms, and starts the threads of the backend.
///
/// # Errors
/// `Unusable` with the path and what to do about it; `Locked` with what is known of the holder; `Os`.
pub fn open_media(target: &Target, options: &MediaOptions) -> Result<Arc<dyn Media>> {
    file_media::open(target, options, Missing::Refuse)
}

/// Opens `target` as [`open_media`] does, and first makes a directory with a blank superblock file where there is none.
/// Leaves a volume that is there as it is.
///
/// # Errors
/// As [`open_media`].
pub fn create_media(target: &Target, options: &MediaOptions) -> Result<Arc<dyn Media>> {
    file_media::open(target, options, Missing::Create)
}

/// The opened target, locked against other processes until it is dropped.
pub trait Media: Send + Sync + 'static {
    /// The superblock zone, of [`SUPERBLOCK_ZONE_BYTES`].
    fn superblock(&self) -> Zone;

    /// Makes the WAL zone at format: `wal_bytes` (a multiple of the block size) written with zeroes and durable, the
    /// extents zone empty, directory entries durable. Answers `Unusable` unless the target [is blank](Media::is_blank)
    /// and large enough. Cut short, it leaves the target blank.
    fn create_zones(&self, wal_bytes: u64) -> crate::Op<()>;

    /// The WAL and extents zones of a volume whose superblock says that its log has `wal_bytes`. The WAL zone has a
    /// device of its own, so that the log waits for nobody's reads.
    ///
    /// # Errors
    /// `Unusable` when a zone is missing or too short; `Locked`.
    fn zones(&self, wal_bytes: u64) -> Result<(Zone, Zone)>;

    /// True when the target holds nothing yet: the superblock zone is zeroes.
    fn is_blank(&self) -> Result<bool>;

    /// Which backend serves it, and why not the one that was asked for.
    fn backend(&self) -> (Backend, Option<String>);

    /// The devices, for shutdown.
    fn devices(&self) -> Vec<Arc<dyn BlockDevice>>;

    /// Lets another opener in, for what is closed while handles to it still live. The devices were shut down before. A raw
    /// device is let go with its last handle instead: its lock is the exclusive opening itself.
    fn unlock(&self);

    /// What to call it in messages: the path.
    fn name(&self) -> String;
}
