//! A volume opened: its log, its extents, its groups.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::{Environment, Media};
use mainstay_wal::{GroupId, RecordKind, RecordPos, Wal};

use crate::{Group, GroupSettings, Result};

/// Settings of one replica; may differ between replicas.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Bytes for memtables, block cache, filters and buffers together.
    pub memory_bytes: u64,
    /// Background tasks for flush and compaction. Default 1.
    pub background_tasks: usize,
    /// Batches of the log in flight.
    pub wal_in_flight_max: usize,
}

/// Whom this volume answers as; all zero until `init` or `join`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Minted once by `init`.
    pub cluster: [u8; 16],
    /// The Raft node id under which this volume was admitted; never used for another volume.
    pub node: u64,
}

/// A record of the owner of a group's log, found at open.
#[derive(Clone, Debug)]
pub struct OwnerRecord {
    /// The group.
    pub group: GroupId,
    /// Its kind, at least [`RecordKind::OWNER_FIRST`].
    pub kind: RecordKind,
    /// Where it lies.
    pub pos: RecordPos,
    /// Its payload.
    pub payload: Bytes,
}

/// What `status` shows of a volume.
#[derive(Clone, Debug, Default)]
pub struct EngineStatus {
    /// `uring`, `threads` or `sim`.
    pub backend: String,
    /// Why it is not the one asked for.
    pub fallback_reason: Option<String>,
    /// Bytes of extents in use.
    pub extent_bytes: u64,
    /// Bytes of the log in use, and of the ring.
    pub wal_used_bytes: u64,
    /// See `wal_used_bytes`.
    pub wal_ring_bytes: u64,
    /// Bytes of the memory budget in use, and the budget.
    pub memory_used_bytes: u64,
    /// See `memory_used_bytes`.
    pub memory_bytes: u64,
    /// Why the volume takes no writes, if so.
    pub read_only: Option<String>,
}

/// An open volume. Cloning gives another handle.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Lays out a new volume on a blank target and makes it durable.
    ///
    /// # Errors
    /// `Invalid` when the target holds data (unless `force`) or is too small, `Locked`, `Io`.
    pub async fn format(media: Arc<dyn Media>, environment: &Environment, wal_bytes: u64, force: bool) -> Result<()> {
        let _ = (media, environment, wal_bytes, force);
        todo!()
    }

    /// Opens a volume: superblock, manifest pages, log. `deliver` gets the owner's records in log order.
    ///
    /// # Errors
    /// `Foreign`, `Corrupt`, `Locked`, `Io`.
    pub async fn open(
        media: Arc<dyn Media>,
        environment: Environment,
        settings: EngineSettings,
        deliver: &mut (dyn FnMut(OwnerRecord) -> Result<()> + Send),
    ) -> Result<Self> {
        let _ = (media, environment, settings, deliver);
        todo!()
    }

    /// The log, for the owner of the groups' entries.
    pub fn wal(&self) -> &Wal {
        todo!()
    }

    /// Opens or makes a group. One handle a group: a second call gives a clone of the first.
    pub async fn group(&self, id: GroupId, settings: GroupSettings) -> Result<Group> {
        let _ = (id, settings);
        todo!()
    }

    /// The id made with this volume.
    pub fn incarnation(&self) -> [u8; 16] {
        todo!()
    }

    /// Whom the volume answers as.
    pub fn identity(&self) -> Identity {
        todo!()
    }

    /// Makes a new identity durable. Refused once one is set, unless it is the same.
    pub async fn set_identity(&self, identity: Identity) -> Result<()> {
        let _ = identity;
        todo!()
    }

    /// Tells which records of the log the owner still needs: nothing before the returned position of the smallest group
    /// is kept. The engine calls `pin` when it purges; the owner appends again what it wants to keep from before it
    /// (votes) before it answers with the oldest position that it needs.
    pub fn set_owner_pin(&self, pin: Arc<dyn OwnerPin>) {
        let _ = pin;
        todo!()
    }

    /// Counts and states.
    pub fn status(&self) -> EngineStatus {
        todo!()
    }

    /// Flushes what is in memory where that shortens the next open, ends the background tasks, marks the volume clean.
    pub async fn close(&self) -> Result<()> {
        todo!()
    }
}

/// How the owner of the log takes part in purging it.
pub trait OwnerPin: Send + Sync + 'static {
    /// The log of `group` is about to be cut: entries up to `flushed` are in tables. Returns the oldest record that the
    /// owner still needs, after it has copied forward what is small and old.
    fn pin(&self, group: GroupId, flushed: crate::LogIndex) -> mainstay_io::BoxFuture<Result<Option<RecordPos>>>;
}
