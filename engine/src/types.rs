//! Ids and positions.

use std::fmt;

/// Dense position of an entry in a group's log, from 1; the version of what the entry writes. 0 is before all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogIndex(pub u64);

/// A live line of data: the main one or a clone. Numbered by the index of the entry that made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BranchId(pub u64);

/// The branch that every group is born with.
pub const MAIN: BranchId = BranchId(0);

/// A keyspace of a group; the same id in every clone. Numbered by the group from 1; 0 is the keyspace `default`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyspaceId(pub u32);

/// All memtables of a group between two rotations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// A flush or compaction; numbered by the logical manifest, equal on all replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// A table: the job that made it and its place among the job's outputs; equal on all replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId {
    /// The job that made it.
    pub job: JobId,
    /// Its place among the outputs.
    pub ordinal: u32,
}

/// A named, durable, frozen copy at one index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Its name, unique in the group.
    pub name: String,
    /// The index whose state it holds.
    pub index: LogIndex,
    /// Leader's wall clock at its making, milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// A writable branch made from a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchInfo {
    /// Its id.
    pub id: BranchId,
    /// Its name, unique in the group; `main` for [`MAIN`].
    pub name: String,
    /// The checkpoint it began as.
    pub origin: Option<String>,
    /// Leader's wall clock at its making, milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// How the tables of a group are compressed; where that saves less than an eighth of a block, it is stored as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u8)]
pub enum TableCompression {
    /// Not at all: the least work, the most bytes.
    None = 1,
    /// lz4 at every level: a block is back in some microseconds.
    Lz4 = 2,
    /// zstd at the last level, where nine tenths of the data stand, and lz4 above it. Two thirds to half the bytes of lz4
    /// alone; a read that finds its block in no cache takes some microseconds more.
    #[default]
    ByLevel = 3,
}

macro_rules! display {
    ($($t:ty),*) => {$(
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display!(LogIndex, BranchId, KeyspaceId, Generation, JobId);

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.job, self.ordinal)
    }
}
