//! The entries of a group's log.
//!
//! # Place
//! proposed by [`crate::LocalLog`] and by `replication`, applied by [`crate::Group::apply`]
//! # Format
//! docs/format.md, "Commands"
//! # Invariants
//! 1. Decoding what was encoded gives the same command; keys and values share the memory of the entry.
//! 2. Bytes of any content give a command or a typed error.

#![deny(clippy::indexing_slicing)]

use bytes::Bytes;

use crate::codec::{
    Decoder, SPAN_BYTES_MAX, TABLE_BYTES_MIN, TableForm, check_name, put_bytes, put_operator, put_range, put_span,
    put_table, put_varint, take_operator, take_range, take_span, take_table,
};
use crate::condition::{Condition, put_conditions, take_conditions};
use crate::keyspace_options::{put_options, take_options};
use crate::once::not_once;
use crate::range_tombstone::{BOUND_BYTES_MAX, KeyRange};
use crate::{
    BranchId, ClientToken, ConditionalBatch, Error, ErrorKind, JobId, KeyspaceId, KeyspaceOptions, OperatorId, Result,
    TableId,
};

/// Longest message of a refusal in bytes.
const REFUSAL_BYTES_MAX: usize = 4096;
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
    /// A batch or a command of the state machine that applies once, however often it is proposed: the request of that token.
    /// The answer is that of the first time.
    Once {
        /// Which request of which client.
        token: ClientToken,
        /// `Batch`, `BatchIf` or `Custom`.
        body: Box<CommandBody>,
    },
    /// A command of the embedder's state machine, on one branch.
    Custom {
        /// The branch it reads and writes.
        branch: BranchId,
        /// The command.
        command: Bytes,
    },
    /// Applies batches that were proposed together, each as if it came alone: all or nothing by itself, in order. The
    /// response tells which were refused: see [`decode_refusals`].
    Batches(Vec<WriteBatch>),
    /// Applies a batch if its conditions hold.
    BatchIf(ConditionalBatch),
    /// As `Batches`, where some have conditions. Each is decided behind those before it.
    BatchesIf(Vec<ConditionalBatch>),
    /// Has what a keyspace of a branch holds written down to the last level, so that the space of what was removed and
    /// superseded comes back: see [`crate::Group::compacted`]. What is written behind it is not waited for.
    Compact {
        /// The branch.
        branch: BranchId,
        /// The keyspace.
        keyspace: KeyspaceId,
        /// Keys from here; empty for all up to `end`.
        first: Bytes,
        /// And before here; none for all behind `first`.
        end: Option<Bytes>,
    },
    /// Gives a keyspace its merge operator, in every branch; makes the keyspace if it is not there. Refused where it has another
    /// one. The response is the id of the keyspace.
    SetOperator {
        /// The name of the keyspace.
        name: String,
        /// The operator.
        operator: OperatorId,
    },
    /// Makes a keyspace whose pairs can expire, in every branch; nothing if it is there. Refused where there is one of that name that
    /// is not expiring. The response is the id of the keyspace.
    CreateExpiring {
        /// Its name.
        name: String,
    },
    /// Gives a keyspace options, in every branch; makes the keyspace if it is not there. They hold for the jobs that are started behind it: tables
    /// that are there stay as they are until they are merged. The response is the id of the keyspace.
    SetOptions {
        /// The name of the keyspace.
        name: String,
        /// The options, in place of all that it had.
        options: KeyspaceOptions,
    },
}

/// Mutations applied all or none to one branch. The later of two mutations of one key wins: a range removes what stands before it, and
/// nothing that comes after.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WriteBatch {
    /// The branch it writes.
    pub branch: BranchId,
    /// The mutations in order.
    pub ops: Vec<WriteOp>,
}

impl WriteBatch {
    /// Checks and encodes the batch for [`Command::encode_batches`].
    ///
    /// # Errors
    /// `Invalid` for an empty key, a key or value over its limit, or a range without a key.
    pub fn encode(&self) -> Result<EncodedBatch> {
        let mut batch = Vec::with_capacity(self.encoded_bytes());
        encode_batch(&mut batch, self)?;
        Ok(EncodedBatch { conditions: Vec::new(), batch })
    }

    /// About the bytes of the encoding.
    fn encoded_bytes(&self) -> usize {
        let ops = self.ops.iter().map(|op| op.bytes() + 16);
        ops.sum::<usize>() + 12
    }
}

impl ConditionalBatch {
    /// As [`WriteBatch::encode`].
    ///
    /// # Errors
    /// `Invalid` for an empty key, or a key or value over its limit.
    pub fn encode(&self) -> Result<EncodedBatch> {
        let mut encoded = self.batch.encode()?;
        put_conditions(&mut encoded.conditions, &self.conditions)?;
        Ok(encoded)
    }

    /// About the bytes of the encoding.
    fn encoded_bytes(&self) -> usize {
        let conditions: usize = self.conditions.iter().map(Condition::bytes).sum();
        conditions.saturating_add(self.batch.encoded_bytes())
    }
}

/// A batch as an entry carries it.
#[derive(Clone, Debug)]
pub struct EncodedBatch {
    /// With their count before them; empty for a plain batch.
    conditions: Vec<u8>,
    batch: Vec<u8>,
}

impl EncodedBatch {
    /// Bytes that a plain batch takes more in an entry with others that have conditions: the count of none.
    pub const BESIDE_CONDITIONS_BYTES: usize = 1;

    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.conditions.len().saturating_add(self.batch.len())
    }
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
    /// Removes all keys of a range, however many there are, at the cost of one mutation.
    DeleteRange {
        /// Where.
        keyspace: KeyspaceId,
        /// Which keys.
        range: KeyRange,
    },
    /// Merges an operand into the value of a key, absent or not, by the merge operator of the keyspace.
    Merge {
        /// Where.
        keyspace: KeyspaceId,
        /// 1 to [`KEY_BYTES_MAX`] bytes.
        key: Bytes,
        /// At most [`VALUE_BYTES_MAX`] bytes.
        operand: Bytes,
    },
    /// Sets a key of an expiring keyspace for a time, which begins with the time of the entry.
    PutFor {
        /// Where.
        keyspace: KeyspaceId,
        /// 1 to [`KEY_BYTES_MAX`] bytes.
        key: Bytes,
        /// 0 to [`VALUE_BYTES_MAX`] bytes, less 10.
        value: Bytes,
        /// How long it lives in milliseconds, at least 1.
        ttl_ms: u64,
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
    /// First and last user key, or where range tombstones begin and end outside of those.
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
    /// Its range tombstones.
    pub ranges: TableRanges,
    /// When its pairs end.
    pub ends: TableEnds,
}

/// What the manifest keeps of the range tombstones of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableRanges {
    /// How many there are.
    pub tombstones: u64,
    /// Keys that they hide, in order and without overlap: the first of them, and not those with long bounds. What lies below and
    /// within one of these need not be read to be dropped.
    pub spans: Vec<KeyRange>,
}

/// When the pairs of a table of an expiring keyspace end: times of the log, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableEnds {
    /// About half of them have by then; 0 where more than half never do.
    pub half_ms: u64,
    /// All of them have by then; 0 where one never does, and where there is none.
    pub last_ms: u64,
}

/// The encoding written today; see docs/format.md.
pub(crate) const COMMAND_VERSION: u8 = 1;

const KIND_BATCH: u8 = 1;
const KIND_CREATE_KEYSPACE: u8 = 2;
const KIND_DROP_KEYSPACE: u8 = 3;
const KIND_ROTATE: u8 = 4;
const KIND_INSTALL: u8 = 5;
const KIND_CREATE_CHECKPOINT: u8 = 6;
const KIND_DROP_CHECKPOINT: u8 = 7;
const KIND_CREATE_CLONE: u8 = 8;
const KIND_DROP_CLONE: u8 = 9;
const KIND_CUSTOM: u8 = 10;
const KIND_BATCHES: u8 = 11;
const KIND_ONCE: u8 = 12;
const KIND_BATCH_IF: u8 = 13;
const KIND_BATCHES_IF: u8 = 14;
const KIND_COMPACT: u8 = 15;
const KIND_INSTALL_RANGED: u8 = 16;
const KIND_SET_OPERATOR: u8 = 17;
const KIND_CREATE_EXPIRING: u8 = 18;
const KIND_INSTALL_ENDING: u8 = 19;
const KIND_SET_OPTIONS: u8 = 20;

/// The kinds as docs/format.md has them.
#[cfg(test)]
pub(crate) const KINDS: [(u8, &str); 20] = [
    (KIND_BATCH, "Batch"),
    (KIND_CREATE_KEYSPACE, "CreateKeyspace"),
    (KIND_DROP_KEYSPACE, "DropKeyspace"),
    (KIND_ROTATE, "Rotate"),
    (KIND_INSTALL, "Install"),
    (KIND_CREATE_CHECKPOINT, "CreateCheckpoint"),
    (KIND_DROP_CHECKPOINT, "DropCheckpoint"),
    (KIND_CREATE_CLONE, "CreateClone"),
    (KIND_DROP_CLONE, "DropClone"),
    (KIND_CUSTOM, "Custom"),
    (KIND_BATCHES, "Batches"),
    (KIND_ONCE, "Once"),
    (KIND_BATCH_IF, "BatchIf"),
    (KIND_BATCHES_IF, "BatchesIf"),
    (KIND_COMPACT, "Compact"),
    (KIND_INSTALL_RANGED, "Install"),
    (KIND_SET_OPERATOR, "SetOperator"),
    (KIND_CREATE_EXPIRING, "CreateExpiring"),
    (KIND_INSTALL_ENDING, "Install"),
    (KIND_SET_OPTIONS, "SetOptions"),
];

const OP_PUT: u8 = 1;
const OP_DELETE: u8 = 2;
const OP_DELETE_RANGE: u8 = 3;
const OP_MERGE: u8 = 4;
const OP_PUT_FOR: u8 = 5;

/// The kinds of mutations as docs/format.md has them.
#[cfg(test)]
pub(crate) const OP_KINDS: [(u8, &str); 5] = [
    (OP_PUT, "put"),
    (OP_DELETE, "delete"),
    (OP_DELETE_RANGE, "delete range"),
    (OP_MERGE, "merge"),
    (OP_PUT_FOR, "put for a time"),
];

/// Bytes of the shortest batch: a branch and a count.
const BATCH_BYTES_MIN: usize = 2;
/// The same with the count of its conditions.
const BATCH_IF_BYTES_MIN: usize = BATCH_BYTES_MIN + 1;

impl WriteOp {
    /// Where it writes.
    pub fn keyspace(&self) -> KeyspaceId {
        match self {
            Self::Put { keyspace, .. }
            | Self::Delete { keyspace, .. }
            | Self::DeleteRange { keyspace, .. }
            | Self::Merge { keyspace, .. }
            | Self::PutFor { keyspace, .. } => *keyspace,
        }
    }

    /// What it writes; of a range its first place.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } | Self::Merge { key, .. } | Self::PutFor { key, .. } => {
                key
            }
            Self::DeleteRange { range, .. } => range.start(),
        }
    }

    /// The value it sets; nothing for a deletion, and for a merge.
    pub fn value(&self) -> Option<&Bytes> {
        match self {
            Self::Put { value, .. } | Self::PutFor { value, .. } => Some(value),
            Self::Delete { .. } | Self::DeleteRange { .. } | Self::Merge { .. } => None,
        }
    }

    /// For how many milliseconds it sets its value; 0 for ever.
    pub fn ttl_ms(&self) -> u64 {
        match self {
            Self::PutFor { ttl_ms, .. } => *ttl_ms,
            _ => 0,
        }
    }

    /// Bytes of its keys and of its value or operand.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Put { key, value, .. } | Self::PutFor { key, value, .. } => key.len().saturating_add(value.len()),
            Self::Merge { key, operand, .. } => key.len().saturating_add(operand.len()),
            Self::Delete { key, .. } => key.len(),
            Self::DeleteRange { range, .. } => range.bytes(),
        }
    }

    /// Refuses what no table can hold.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Put { key, value, .. } | Self::Merge { key, operand: value, .. } => {
                check_key(key).and_then(|()| check_value(value))
            }
            Self::PutFor { key, value, ttl_ms, .. } => {
                check_key(key).and_then(|()| check_value(value))?;
                if *ttl_ms == 0 {
                    return Err(Error::new(ErrorKind::Invalid, "a time to live is at least a millisecond"));
                }
                Ok(())
            }
            Self::Delete { key, .. } => check_key(key),
            Self::DeleteRange { range, .. } => range.check(),
        }
    }
}

/// Refuses a value over the limit.
pub(crate) fn check_value(value: &[u8]) -> Result<()> {
    match value.len() {
        0..=VALUE_BYTES_MAX => Ok(()),
        length => Err(Error::new(
            ErrorKind::Invalid,
            format!("a value is too long length={length} length_max={VALUE_BYTES_MAX}"),
        )),
    }
}

/// Refuses an empty key and one over the limit.
pub(crate) fn check_key(key: &[u8]) -> Result<()> {
    match key.len() {
        1..=KEY_BYTES_MAX => Ok(()),
        0 => Err(Error::new(ErrorKind::Invalid, "a key is empty")),
        length => {
            Err(Error::new(ErrorKind::Invalid, format!("a key is too long length={length} length_max={KEY_BYTES_MAX}")))
        }
    }
}

/// Refuses bounds that no key reaches.
pub(crate) fn check_span(first: &[u8], end: Option<&Bytes>) -> Result<()> {
    match first.len().max(end.map_or(0, Bytes::len)) {
        0..=SPAN_BYTES_MAX => Ok(()),
        length => {
            let message = format!("a bound is too long length={length} length_max={SPAN_BYTES_MAX}");
            Err(Error::new(ErrorKind::Invalid, message))
        }
    }
}

impl InstallTable {
    pub(crate) fn has_ranges(&self) -> bool {
        self.ranges.tombstones > 0
    }

    pub(crate) fn has_ends(&self) -> bool {
        self.ends != TableEnds::default()
    }

    /// All pairs have ended by then.
    pub(crate) fn has_ended(&self, time_ms: u64) -> bool {
        let last_ms = if mainstay_io::mutant!(HalfIsAll) { self.ends.half_ms } else { self.ends.last_ms };
        last_ms != 0 && last_ms <= time_ms
    }

    /// Tombstones, and about as many as the pairs that have ended by then.
    pub(crate) fn dead_entries(&self, time_ms: u64) -> u64 {
        let pairs = self.entries.saturating_sub(self.tombstones);
        let half_ended = self.ends.half_ms != 0 && self.ends.half_ms <= time_ms;
        let ended = match self.has_ended(time_ms) {
            true => pairs,
            false if half_ended => pairs / 2,
            false => 0,
        };
        self.tombstones.saturating_add(ended)
    }
}

impl Command {
    /// Encodes the command; see docs/format.md.
    ///
    /// # Errors
    /// `Invalid` for an empty key, a key or value over its limit, a range without a key, or a name of 0 or more than 255 bytes.
    pub fn encode(&self) -> Result<Bytes> {
        let mut out = Vec::with_capacity(self.encoded_bytes());
        out.push(COMMAND_VERSION);
        let kind = match &self.body {
            CommandBody::Batch(_) => KIND_BATCH,
            CommandBody::CreateKeyspace { .. } => KIND_CREATE_KEYSPACE,
            CommandBody::DropKeyspace { .. } => KIND_DROP_KEYSPACE,
            CommandBody::Rotate => KIND_ROTATE,
            CommandBody::Install { tables, .. } => match TableForm::of(tables.iter()) {
                TableForm::Plain => KIND_INSTALL,
                TableForm::Ranged => KIND_INSTALL_RANGED,
                TableForm::Ending => KIND_INSTALL_ENDING,
            },
            CommandBody::CreateCheckpoint { .. } => KIND_CREATE_CHECKPOINT,
            CommandBody::DropCheckpoint { .. } => KIND_DROP_CHECKPOINT,
            CommandBody::CreateClone { .. } => KIND_CREATE_CLONE,
            CommandBody::DropClone { .. } => KIND_DROP_CLONE,
            CommandBody::Custom { .. } => KIND_CUSTOM,
            CommandBody::Batches(_) => KIND_BATCHES,
            CommandBody::Once { .. } => KIND_ONCE,
            CommandBody::BatchIf(_) => KIND_BATCH_IF,
            CommandBody::BatchesIf(_) => KIND_BATCHES_IF,
            CommandBody::Compact { .. } => KIND_COMPACT,
            CommandBody::SetOperator { .. } => KIND_SET_OPERATOR,
            CommandBody::CreateExpiring { .. } => KIND_CREATE_EXPIRING,
            CommandBody::SetOptions { .. } => KIND_SET_OPTIONS,
        };
        out.push(kind);
        out.extend_from_slice(&self.time_ms.to_le_bytes());
        match &self.body {
            CommandBody::Batch(batch) => encode_batch(&mut out, batch)?,
            CommandBody::Rotate => {}
            CommandBody::CreateKeyspace { name }
            | CommandBody::CreateExpiring { name }
            | CommandBody::DropKeyspace { name }
            | CommandBody::DropCheckpoint { name }
            | CommandBody::DropClone { name } => put_name(&mut out, name)?,
            CommandBody::Install { job, tables } => {
                put_varint(&mut out, job.0);
                put_varint(&mut out, tables.len() as u64);
                let form = TableForm::of(tables.iter());
                for table in tables {
                    check_first(&table.first, form)?;
                    check_key(&table.last)?;
                    put_table(&mut out, table, form);
                }
            }
            CommandBody::CreateCheckpoint { name, branch } => {
                put_name(&mut out, name)?;
                put_varint(&mut out, branch.0);
            }
            CommandBody::CreateClone { name, checkpoint } => {
                put_name(&mut out, name)?;
                put_name(&mut out, checkpoint)?;
            }
            CommandBody::Custom { branch, command } => encode_custom(&mut out, *branch, command),
            CommandBody::Once { token, body } => {
                out.extend_from_slice(&token.client);
                put_varint(&mut out, token.sequence);
                match &**body {
                    CommandBody::Batch(batch) => {
                        out.push(KIND_BATCH);
                        encode_batch(&mut out, batch)?;
                    }
                    CommandBody::BatchIf(batch) => {
                        out.push(KIND_BATCH_IF);
                        encode_batch_if(&mut out, batch)?;
                    }
                    CommandBody::Custom { branch, command } => {
                        out.push(KIND_CUSTOM);
                        encode_custom(&mut out, *branch, command);
                    }
                    _ => return Err(not_once()),
                }
            }
            CommandBody::Batches(batches) => {
                put_varint(&mut out, batches.len() as u64);
                for batch in batches {
                    encode_batch(&mut out, batch)?;
                }
            }
            CommandBody::BatchIf(batch) => encode_batch_if(&mut out, batch)?,
            CommandBody::BatchesIf(batches) => {
                put_varint(&mut out, batches.len() as u64);
                for batch in batches {
                    encode_batch_if(&mut out, batch)?;
                }
            }
            CommandBody::Compact { branch, keyspace, first, end } => {
                check_span(first, end.as_ref())?;
                put_varint(&mut out, branch.0);
                put_varint(&mut out, keyspace.0.into());
                put_span(&mut out, first, end.as_ref());
            }
            CommandBody::SetOptions { name, options } => {
                put_name(&mut out, name)?;
                options.check()?;
                put_options(&mut out, options);
            }
            CommandBody::SetOperator { name, operator } => {
                put_name(&mut out, name)?;
                check_name(operator.name())?;
                put_operator(&mut out, operator);
            }
        }
        Ok(out.into())
    }

    /// Encodes a command of batches that are encoded already: [`CommandBody::Batch`] for one, else
    /// [`CommandBody::Batches`]; where any has conditions [`CommandBody::BatchIf`] and [`CommandBody::BatchesIf`].
    pub fn encode_batches(time_ms: u64, batches: &[EncodedBatch]) -> Bytes {
        let bytes = |batch: &EncodedBatch| batch.bytes().saturating_add(EncodedBatch::BESIDE_CONDITIONS_BYTES);
        let bytes: usize = batches.iter().map(bytes).sum();
        let conditional = batches.iter().any(|batch| !batch.conditions.is_empty());
        let mut out = Vec::with_capacity(bytes.saturating_add(32));
        out.push(COMMAND_VERSION);
        out.push(match (batches.len(), conditional) {
            (1, false) => KIND_BATCH,
            (_, false) => KIND_BATCHES,
            (1, true) => KIND_BATCH_IF,
            (_, true) => KIND_BATCHES_IF,
        });
        out.extend_from_slice(&time_ms.to_le_bytes());
        if batches.len() != 1 {
            put_varint(&mut out, batches.len() as u64);
        }
        for batch in batches {
            if conditional && batch.conditions.is_empty() {
                put_varint(&mut out, 0);
            }
            out.extend_from_slice(&batch.conditions);
            out.extend_from_slice(&batch.batch);
        }
        out.into()
    }

    /// Whether these bytes are a command without which what is in the log stays needed there: a rotation or an install.
    pub fn lets_the_log_be_cut(bytes: &[u8]) -> bool {
        const LET: [u8; 4] = [KIND_ROTATE, KIND_INSTALL, KIND_INSTALL_RANGED, KIND_INSTALL_ENDING];
        matches!(bytes, [COMMAND_VERSION, kind, ..] if LET.contains(kind))
    }

    /// Decodes a command. Never panics; an unknown kind or version is `Foreign`, damage is `Corrupt`. Keys and values
    /// are slices of `bytes`.
    pub fn decode(bytes: &Bytes) -> Result<Self> {
        let mut from = Decoder::new(bytes.clone(), "a command");
        let version = from.u8()?;
        if version != COMMAND_VERSION {
            return Err(Error::new(
                ErrorKind::Foreign,
                format!("a command of another version version={version} known={COMMAND_VERSION}"),
            ));
        }
        let kind = from.u8()?;
        let time_ms = from.u64()?;
        let body = match kind {
            KIND_BATCH => CommandBody::Batch(decode_batch(&mut from)?),
            KIND_CREATE_KEYSPACE => CommandBody::CreateKeyspace { name: from.name()? },
            KIND_DROP_KEYSPACE => CommandBody::DropKeyspace { name: from.name()? },
            KIND_ROTATE => CommandBody::Rotate,
            KIND_INSTALL => take_install(&mut from, TableForm::Plain)?,
            KIND_INSTALL_RANGED => take_install(&mut from, TableForm::Ranged)?,
            KIND_INSTALL_ENDING => take_install(&mut from, TableForm::Ending)?,
            KIND_CREATE_CHECKPOINT => {
                CommandBody::CreateCheckpoint { name: from.name()?, branch: BranchId(from.varint()?) }
            }
            KIND_DROP_CHECKPOINT => CommandBody::DropCheckpoint { name: from.name()? },
            KIND_CREATE_CLONE => CommandBody::CreateClone { name: from.name()?, checkpoint: from.name()? },
            KIND_DROP_CLONE => CommandBody::DropClone { name: from.name()? },
            KIND_BATCHES => {
                let count = from.count(BATCH_BYTES_MIN)?;
                CommandBody::Batches((0..count).map(|_| decode_batch(&mut from)).collect::<Result<_>>()?)
            }
            KIND_CUSTOM => CommandBody::Custom { branch: BranchId(from.varint()?), command: from.rest() },
            KIND_ONCE => {
                let token = ClientToken { client: from.array()?, sequence: from.varint()? };
                let body = match from.u8()? {
                    KIND_BATCH => CommandBody::Batch(decode_batch(&mut from)?),
                    KIND_CUSTOM => CommandBody::Custom { branch: BranchId(from.varint()?), command: from.rest() },
                    KIND_BATCH_IF => CommandBody::BatchIf(decode_batch_if(&mut from)?),
                    kind => {
                        let message = format!("a command of this kind is not applied once kind={kind}");
                        return Err(Error::new(ErrorKind::Foreign, message));
                    }
                };
                CommandBody::Once { token, body: Box::new(body) }
            }
            KIND_BATCH_IF => CommandBody::BatchIf(decode_batch_if(&mut from)?),
            KIND_BATCHES_IF => {
                let count = from.count(BATCH_IF_BYTES_MIN)?;
                CommandBody::BatchesIf((0..count).map(|_| decode_batch_if(&mut from)).collect::<Result<_>>()?)
            }
            KIND_COMPACT => {
                let (branch, keyspace) = (BranchId(from.varint()?), KeyspaceId(from.varint_u32()?));
                let (first, end) = take_span(&mut from)?;
                CommandBody::Compact { branch, keyspace, first, end }
            }
            KIND_SET_OPERATOR => CommandBody::SetOperator { name: from.name()?, operator: take_operator(&mut from)? },
            KIND_CREATE_EXPIRING => CommandBody::CreateExpiring { name: from.name()? },
            KIND_SET_OPTIONS => CommandBody::SetOptions { name: from.name()?, options: take_options(&mut from)? },
            kind => return Err(Error::new(ErrorKind::Foreign, format!("a command of an unknown kind kind={kind}"))),
        };
        from.end()?;
        Ok(Self { time_ms, body })
    }

    /// About the bytes of the encoding; saves growing the buffer.
    fn encoded_bytes(&self) -> usize {
        let body = match &self.body {
            CommandBody::Once { body, .. } => return Self::bytes_of(body) + 64,
            body => Self::bytes_of(body),
        };
        body + 32
    }

    fn bytes_of(body: &CommandBody) -> usize {
        match body {
            CommandBody::Batch(batch) => batch.encoded_bytes(),
            CommandBody::Batches(batches) => batches.iter().map(WriteBatch::encoded_bytes).sum(),
            CommandBody::BatchIf(batch) => batch.encoded_bytes(),
            CommandBody::BatchesIf(batches) => batches.iter().map(ConditionalBatch::encoded_bytes).sum(),
            CommandBody::Custom { command, .. } => command.len(),
            CommandBody::Compact { first, end, .. } => first.len() + end.as_ref().map_or(0, Bytes::len) + 32,
            _ => 64,
        }
    }
}

fn take_install(from: &mut Decoder, form: TableForm) -> Result<CommandBody> {
    let job = JobId(from.varint()?);
    let count = from.count(TABLE_BYTES_MIN)?;
    let tables = (0..count).map(|_| take_table(from, form)).collect::<Result<_>>()?;
    Ok(CommandBody::Install { job, tables })
}

/// As [`check_key`], for where a table begins: a range tombstone may begin behind the longest key.
fn check_first(key: &[u8], form: TableForm) -> Result<()> {
    if form != TableForm::Plain && key.len() == BOUND_BYTES_MAX { Ok(()) } else { check_key(key) }
}

fn put_name(out: &mut Vec<u8>, name: &str) -> Result<()> {
    check_name(name)?;
    put_bytes(out, name.as_bytes());
    Ok(())
}

fn encode_batch(out: &mut Vec<u8>, batch: &WriteBatch) -> Result<()> {
    put_varint(out, batch.branch.0);
    put_varint(out, batch.ops.len() as u64);
    for op in &batch.ops {
        op.check()?;
        out.push(match op {
            WriteOp::Put { .. } => OP_PUT,
            WriteOp::Delete { .. } => OP_DELETE,
            WriteOp::DeleteRange { .. } => OP_DELETE_RANGE,
            WriteOp::Merge { .. } => OP_MERGE,
            WriteOp::PutFor { .. } => OP_PUT_FOR,
        });
        put_varint(out, op.keyspace().0.into());
        match op {
            WriteOp::Put { key, value, .. } | WriteOp::Merge { key, operand: value, .. } => {
                put_bytes(out, key);
                put_bytes(out, value);
            }
            WriteOp::PutFor { key, value, ttl_ms, .. } => {
                put_bytes(out, key);
                put_bytes(out, value);
                put_varint(out, *ttl_ms);
            }
            WriteOp::Delete { key, .. } => put_bytes(out, key),
            WriteOp::DeleteRange { range, .. } => put_range(out, range),
        }
    }
    Ok(())
}

fn encode_batch_if(out: &mut Vec<u8>, batch: &ConditionalBatch) -> Result<()> {
    put_conditions(out, &batch.conditions)?;
    encode_batch(out, &batch.batch)
}

fn decode_batch_if(from: &mut Decoder) -> Result<ConditionalBatch> {
    Ok(ConditionalBatch { conditions: take_conditions(from)?, batch: decode_batch(from)? })
}

fn encode_custom(out: &mut Vec<u8>, branch: BranchId, command: &[u8]) {
    put_varint(out, branch.0);
    out.extend_from_slice(command);
}

fn decode_batch(from: &mut Decoder) -> Result<WriteBatch> {
    let branch = BranchId(from.varint()?);
    let count = from.count(4)?;
    let mut ops = Vec::with_capacity(count);
    for _ in 0..count {
        let tag = from.u8()?;
        let keyspace = KeyspaceId(from.varint_u32()?);
        ops.push(match tag {
            OP_PUT => {
                let key = from.bytes(1, KEY_BYTES_MAX)?;
                WriteOp::Put { keyspace, key, value: from.bytes(0, VALUE_BYTES_MAX)? }
            }
            OP_DELETE => WriteOp::Delete { keyspace, key: from.bytes(1, KEY_BYTES_MAX)? },
            OP_DELETE_RANGE => WriteOp::DeleteRange { keyspace, range: take_range(from)? },
            OP_MERGE => {
                let key = from.bytes(1, KEY_BYTES_MAX)?;
                WriteOp::Merge { keyspace, key, operand: from.bytes(0, VALUE_BYTES_MAX)? }
            }
            OP_PUT_FOR => {
                let key = from.bytes(1, KEY_BYTES_MAX)?;
                let value = from.bytes(0, VALUE_BYTES_MAX)?;
                let ttl_ms = from.varint()?;
                if ttl_ms == 0 {
                    return Err(from.corrupt("a time to live is none"));
                }
                WriteOp::PutFor { keyspace, key, value, ttl_ms }
            }
            tag => return Err(Error::new(ErrorKind::Foreign, format!("a mutation of an unknown kind kind={tag}"))),
        });
    }
    Ok(WriteBatch { branch, ops })
}

/// Kinds of a refusal as they cross from the applier to who proposed the batches.
const REFUSED_INVALID: u8 = 0;
const REFUSED_NOT_FOUND: u8 = 1;
const REFUSED_CONFLICT: u8 = 2;

/// The response to [`CommandBody::Batches`] and [`CommandBody::BatchesIf`]: nothing if all were applied.
pub(crate) fn encode_refusals(refusals: &[(usize, Error)]) -> Bytes {
    let mut out = Vec::new();
    for (place, error) in refusals {
        put_varint(&mut out, *place as u64);
        out.push(match error.kind() {
            ErrorKind::NotFound => REFUSED_NOT_FOUND,
            ErrorKind::Conflict => REFUSED_CONFLICT,
            _ => REFUSED_INVALID,
        });
        put_bytes(&mut out, error.to_string().as_bytes());
    }
    out.into()
}

/// Which of the batches of a [`CommandBody::Batches`] or [`CommandBody::BatchesIf`] were refused and why, from its response: places from 0, in order.
///
/// # Errors
/// `Corrupt` for bytes that are no such response.
pub fn decode_refusals(response: &Bytes) -> Result<Vec<(usize, Error)>> {
    let mut from = Decoder::new(response.clone(), "a list of refusals");
    let mut refusals = Vec::new();
    while !from.is_empty() {
        let place = usize::try_from(from.varint()?).map_err(|_| from.corrupt("a place is too large"))?;
        let kind = match from.u8()? {
            REFUSED_INVALID => ErrorKind::Invalid,
            REFUSED_NOT_FOUND => ErrorKind::NotFound,
            REFUSED_CONFLICT => ErrorKind::Conflict,
            _ => return Err(from.corrupt("an unknown kind of refusal")),
        };
        let message = from.bytes(0, REFUSAL_BYTES_MAX)?;
        refusals.push((place, Error::new(kind, String::from_utf8_lossy(&message))));
    }
    Ok(refusals)
}

#[cfg(test)]
mod tests;
