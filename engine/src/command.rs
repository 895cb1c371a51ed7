//! The entries of a group's log. docs/format.md owns the encoding.

use bytes::Bytes;

use crate::{BranchId, JobId, KeyspaceId, Result, TableId};

/// Longest key in bytes.
pub const KEY_BYTES_MAX: usize = 64 << 10;
/// Longest value in bytes.
pub const VALUE_BYTES_MAX: usize = 16 << 20;

/// An entry: who decided when, and what.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    /// The proposer's wall clock, milliseconds since the Unix epoch. The only clock that applying may read.
    pub time_ms: u64,
    /// What to do.
    pub body: CommandBody,
}

/// What an entry does. New kinds are added at the end; an unknown kind is refused before it is proposed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum CommandBody {
    /// Applies a batch.
    Batch(WriteBatch),
    /// Makes a keyspace in every branch; nothing if it exists. The response is its id.
    CreateKeyspace {
        /// Its name.
        name: String,
    },
    /// Drops a keyspace and its data in every branch; checkpoints keep it.
    DropKeyspace {
        /// Its name.
        name: String,
    },
    /// Rotates the memtables.
    Rotate,
    /// Switches the manifest to what a job produced. Without effect if the job is not outstanding.
    Install {
        /// The job.
        job: JobId,
        /// Its outputs in order.
        tables: Vec<InstallTable>,
    },
    /// Freezes a branch under a name.
    CreateCheckpoint {
        /// Its name.
        name: String,
        /// The branch to freeze.
        branch: BranchId,
    },
    /// Drops a checkpoint.
    DropCheckpoint {
        /// Its name.
        name: String,
    },
    /// Makes a branch from a checkpoint.
    CreateClone {
        /// The name of the branch.
        name: String,
        /// The checkpoint it begins as.
        checkpoint: String,
    },
    /// Drops a branch.
    DropClone {
        /// Its name.
        name: String,
    },
    /// A command of the embedder's state machine, on one branch.
    Custom {
        /// The branch it reads and writes.
        branch: BranchId,
        /// The command.
        command: Bytes,
    },
}

/// Mutations applied all or none to one branch. The later of two mutations of one key wins.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WriteBatch {
    /// The branch it writes.
    pub branch: BranchId,
    /// The mutations in order.
    pub ops: Vec<WriteOp>,
}

/// One mutation.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum WriteOp {
    /// Sets a key.
    Put {
        /// Where.
        keyspace: KeyspaceId,
        /// 1 to [`KEY_BYTES_MAX`] bytes.
        key: Bytes,
        /// 0 to [`VALUE_BYTES_MAX`] bytes.
        value: Bytes,
    },
    /// Removes a key; nothing if it is absent.
    Delete {
        /// Where.
        keyspace: KeyspaceId,
        /// 1 to [`KEY_BYTES_MAX`] bytes.
        key: Bytes,
    },
}

/// An output of a job as an `Install` names it.
#[derive(Clone, Debug, PartialEq)]
pub struct InstallTable {
    /// Its id.
    pub id: TableId,
    /// Branch and keyspace whose version it joins.
    pub branch: BranchId,
    /// See `branch`.
    pub keyspace: KeyspaceId,
    /// First and last user key.
    pub first: Bytes,
    /// See `first`.
    pub last: Bytes,
    /// Entries, tombstones included.
    pub entries: u64,
    /// Tombstones.
    pub tombstones: u64,
    /// Bytes of the table.
    pub bytes: u64,
    /// xxh3-128 of the bytes.
    pub digest: u128,
    /// Where the root of the table lies and its checksum, so that the table is verified from here down.
    pub root: Bytes,
}

impl Command {
    /// Encodes the command; see docs/format.md.
    ///
    /// # Errors
    /// `Invalid` for an empty key, a key or value over its limit, or a name of 0 or more than 255 bytes.
    pub fn encode(&self) -> Result<Bytes> {
        todo!()
    }

    /// Decodes a command. Never panics; an unknown kind or version is `Foreign`, damage is `Corrupt`. Keys and values
    /// are slices of `bytes`.
    pub fn decode(bytes: &Bytes) -> Result<Self> {
        let _ = bytes;
        todo!()
    }
}
