//! One replicated state: applies entries, serves snapshots, flushes and compacts.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::BoxFuture;

use crate::{
    BranchId, BranchInfo, CheckpointInfo, Command, KeyspaceId, LogIndex, Result, Snapshot, StateMachine, TableId,
};

/// Settings that must be equal on all replicas of a group.
#[derive(Clone)]
pub struct GroupSettings {
    /// Bytes applied between two rotations.
    pub memtable_bytes: u64,
    /// Size at which a compaction output is cut.
    pub table_bytes: u64,
    /// Bytes of the first level below L0.
    pub base_level_bytes: u64,
    /// L0 runs at which compaction starts.
    pub l0_compaction_runs: usize,
    /// The embedder's own; answers `Custom` commands.
    pub state_machine: Option<Arc<dyn StateMachine>>,
}

/// What applying an entry gave.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The entry.
    pub index: LogIndex,
    /// The answer: of the state machine for `Custom`, an id for `CreateKeyspace`, empty for the others. A refusal (an
    /// unknown keyspace, a name that is taken) is an `Err` here and the same on every replica.
    pub response: Result<Bytes>,
}

/// Counts and states of a group.
#[derive(Clone, Debug, Default)]
pub struct GroupStatus {
    /// Entries up to here are applied.
    pub applied: LogIndex,
    /// Entries up to here are in tables.
    pub flushed: LogIndex,
    /// Generations frozen and not yet in tables.
    pub frozen_generations: u64,
    /// Jobs whose outputs the logical manifest has and this volume has not.
    pub absent_jobs: u64,
    /// Tables named by the present manifest, and their bytes.
    pub tables: u64,
    /// See `tables`.
    pub table_bytes: u64,
    /// Digest over all tables of the logical manifest, for comparison between replicas at one index.
    pub digest: u128,
    /// The index of the last entry that changed the logical manifest.
    pub digest_index: LogIndex,
    /// Tables whose digest differed from the leader's.
    pub divergences: u64,
}

/// The flushed state, pinned for a receiver: tables are not freed while it lives.
#[derive(Clone, Debug)]
pub struct Export {
    /// Entries up to here are in the tables.
    pub flushed: LogIndex,
    /// Opaque to the owner: what [`Group::import`] takes.
    pub manifest: Bytes,
}

/// Where a receiver gets tables that it does not hold.
pub trait TableSource: Send + Sync {
    /// Bytes `offset..offset + length` of a table.
    fn read_table(&self, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>>;
}

/// A group. Cloning gives another handle.
#[derive(Clone)]
pub struct Group {}

impl Group {
    /// Applies an entry; one caller, in order, each index once after [`Group::flushed`]. Readable when it returns.
    pub async fn apply(&self, index: LogIndex, command: &Command) -> Result<Applied> {
        let _ = (index, command);
        todo!()
    }

    /// Advances the applied index over an entry that is none of ours (a blank or membership entry).
    pub fn skip(&self, index: LogIndex) {
        let _ = index;
        todo!()
    }

    /// Pins what is applied now.
    ///
    /// # Errors
    /// `NotFound` when the branch does not exist.
    pub fn snapshot(&self, branch: BranchId) -> Result<Snapshot> {
        let _ = branch;
        todo!()
    }

    /// Opens a checkpoint for reading.
    pub fn checkpoint(&self, name: &str) -> Result<Snapshot> {
        let _ = name;
        todo!()
    }

    /// Entries up to here are in tables; the log may be purged up to here.
    pub fn flushed(&self) -> LogIndex {
        todo!()
    }

    /// Entries up to here are applied.
    pub fn applied(&self) -> LogIndex {
        todo!()
    }

    /// The next `Install` that this replica's jobs made. A leader proposes it; others may drop it. Cancel safe.
    pub async fn next_install(&self) -> Command {
        todo!()
    }

    /// Makes all finished, uninstalled jobs appear in [`Group::next_install`] again: a new leader calls it.
    pub fn offer_installs(&self) {
        todo!()
    }

    /// Resolves when [`Group::flushed`] has grown beyond `index`. Cancel safe.
    pub async fn flushed_beyond(&self, index: LogIndex) {
        let _ = index;
        todo!()
    }

    /// Waits until the writer may go on: memory and L0 are within their bounds. Called by the leader before it
    /// proposes. `OutOfSpace` while the volume is full.
    pub async fn admit(&self) -> Result<()> {
        todo!()
    }

    /// Pins the flushed state for a receiver.
    pub fn export(&self) -> Result<Export> {
        todo!()
    }

    /// Serves a receiver: bytes of a table of this volume.
    pub async fn read_table(&self, id: TableId, offset: u64, length: u64) -> Result<Bytes> {
        let _ = (id, offset, length);
        todo!()
    }

    /// Replaces the state by an export: fetches the tables that this volume does not hold, verifies their digests,
    /// makes it durable, then switches. Returns the new flushed index.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped import leaves the old state.
    pub async fn import(&self, manifest: Bytes, source: &dyn TableSource) -> Result<LogIndex> {
        let _ = (manifest, source);
        todo!()
    }

    /// The id of a keyspace of the applied state.
    pub fn keyspace(&self, name: &str) -> Option<KeyspaceId> {
        let _ = name;
        todo!()
    }

    /// Names and ids of the keyspaces.
    pub fn keyspaces(&self) -> Vec<(String, KeyspaceId)> {
        todo!()
    }

    /// The branch of a name; `main` is [`crate::MAIN`].
    pub fn branch(&self, name: &str) -> Option<BranchId> {
        let _ = name;
        todo!()
    }

    /// All branches.
    pub fn branches(&self) -> Vec<BranchInfo> {
        todo!()
    }

    /// All checkpoints.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        todo!()
    }

    /// Counts and states.
    pub fn status(&self) -> GroupStatus {
        todo!()
    }
}
