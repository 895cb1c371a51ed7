//! The storage engine: volume, memtables, tables, cache, manifest, flush, compaction, snapshots, checkpoints and clones,
//! and the store of one node.
//!
//! docs/architecture.md describes a group, its logical and present manifest, and restart.

mod cache;
mod changes;
mod codec;
mod command;
mod condition;
mod engine;
mod error;
mod events;
mod expiry;
mod gather;
mod group;
mod heal;
mod keyspace_options;
mod local_log;
mod manifest;
mod memory;
mod memtable;
mod merge_operator;
mod once;
mod outcome;
mod own_writes;
mod range_tombstone;
mod read;
mod snapshot;
mod state_machine;
mod stats;
mod stored;
mod table;
mod types;
mod volume;

#[cfg(test)]
mod tests;

/// Entry points for the fuzz targets and benches of this workspace; no part of the interface.
#[doc(hidden)]
pub mod hooks;

pub use changes::{Change, ChangeKind, Changes, Entries, EntryPlace, EntrySource};
pub use command::{
    Command, CommandBody, EncodedBatch, InstallTable, KEY_BYTES_MAX, TableEnds, TableRanges, VALUE_BYTES_MAX,
    WriteBatch, WriteOp, decode_refusals,
};
pub use condition::{Condition, ConditionalBatch};
pub use engine::{Engine, EngineSettings, EngineStatus, Identity, OwnerNotes, OwnerPin, OwnerRecord};
pub use engine::{GroupInfo, Offline, SuperblockInfo, TableInfo, VerifyReport, VersionSetInfo};
pub use engine::{SCRUB_BYTES_PER_SECOND, SCRUB_PAUSE};
pub use error::{Error, ErrorKind, Result};
pub use events::{EVENTS_MAX, Event, EventKind, Events};
pub use group::{Applied, Export, Group, GroupSettings, GroupStatus, TableSource};
pub use heal::{HealStatus, TablePeers};
pub use keyspace_options::{CompactionStyle, KeyspaceOptions};
pub use local_log::LocalLog;
pub use merge_operator::{MergeOperator, MergeOperators, MergeRefused, OperandCombiner, OperatorId};
pub use once::{CLIENTS_KEYSPACE, ClientToken};
pub use outcome::OUTCOMES_KEYSPACE;
pub use range_tombstone::{KeyRange, RangeSet};
pub use snapshot::{Direction, Scan, Snapshot, Value, Visitor};
pub use state_machine::{Apply, StateMachine};
pub use stats::{EngineStats, StallCause, StallStats};
pub use types::{
    BranchId, BranchInfo, CheckpointInfo, Generation, JobId, KeyspaceId, LogIndex, MAIN, TableCompression, TableId,
};
pub use volume::{EXTENT_UNIT_BYTES, holds_volume};
