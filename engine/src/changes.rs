//! What was changed, in the order of the log, from an index on.
//!
//! # Place
//! above [`Group`], which knows what is applied here and what came of it, and an [`EntrySource`], which has the entries: the
//! log of one node, or that of a replica
//! # Invariants
//! 1. Only what is applied here is given; each entry that changed the branch once, whole, in the order of the log.
//! 2. Nothing is kept for a reader but what one read of the log gave: at most [`READ_ENTRIES_MAX`] entries, and the bytes of one more entry
//!    than [`READ_BYTES_MAX`]. Nobody waits for a reader, and the log is cut as if there were none.
//! 3. A reader that was left behind is told so ([`ErrorKind::Purged`]); it never passes over an entry.
//! # Why not
//! A queue that the applier fills: it would have to drop or to wait for a slow reader, and would know nothing from before the reader came.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::BoxFuture;
use mainstay_wal::Lsn;

use crate::outcome::{OUTCOMES_KEPT, OUTCOMES_KEYSPACE, Outcome, outcome_key};
use crate::{
    BranchId, Command, CommandBody, Error, ErrorKind, Group, KeyspaceId, LogIndex, MAIN, OperatorId, Result,
    WriteBatch, WriteOp,
};

/// Entries of one read of the log, at most.
pub(crate) const READ_ENTRIES_MAX: usize = 1024;
/// Bytes of entries of one read of the log, but for the last one.
pub(crate) const READ_BYTES_MAX: usize = 1 << 20;

/// What an entry changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The entry: the version of what it wrote. A reader that has it goes on from the next index.
    pub index: LogIndex,
    /// The proposer's wall clock, milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// What it did.
    pub kind: ChangeKind,
}

/// What an entry did.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ChangeKind {
    /// Mutations, in order: of two of one key the later wins, and a removed range takes what stands before it. They are those of all
    /// batches of the entry that were applied: what was committed at once has one index. A batch whose condition did not hold is not among them.
    ///
    /// A merge is given as it was written, by its operand. A reader that keeps values merges it into what it has, as the operator does
    /// that [`ChangeKind::OperatorGiven`] or [`Group::merge_operator`] names: merged one after the other the operands make what the store
    /// has. That goes for refusals too: a merge that was written blindly and that the operator refuses is given like any other, and leaves
    /// the key without a value until it is put, or removed. What a transaction has merged is given as the put or the removal that came of it.
    Writes(Vec<WriteOp>),
    /// A command of the embedder's state machine was applied. What it wrote is for the state machine to tell.
    Command(Bytes),
    /// A keyspace was made, in every branch.
    KeyspaceMade {
        /// Its id, never that of another.
        id: KeyspaceId,
        /// Its name.
        name: String,
    },
    /// A keyspace was given its merge operator, in every branch. It was made by that if it was not there before.
    OperatorGiven {
        /// Its id, never that of another.
        id: KeyspaceId,
        /// Its name.
        name: String,
        /// The operator, for as long as there is the keyspace.
        operator: OperatorId,
    },
    /// A keyspace whose pairs can expire was made, in every branch. A pair ends when the largest time of the changes so far, this one's included, is its
    /// own time and what it was put for: nobody is told.
    ExpiringMade {
        /// Its id, never that of another.
        id: KeyspaceId,
        /// Its name.
        name: String,
    },
    /// A keyspace was dropped with all that it held, in every branch.
    KeyspaceDropped {
        /// Its id.
        id: KeyspaceId,
        /// Its name.
        name: String,
    },
}

/// Where a source found what it last read: it need not look for what follows.
#[derive(Clone, Copy, Debug, Default)]
pub struct EntryPlace(pub(crate) Option<(LogIndex, Lsn)>);

/// What was read of a log.
#[derive(Clone, Debug, Default)]
pub struct Entries {
    /// The commands, in order.
    pub commands: Vec<(LogIndex, Command)>,
    /// The first index that was not looked at.
    pub next: LogIndex,
    /// For the read from there on.
    pub place: EntryPlace,
}

/// Who has the entries of a group.
pub trait EntrySource: Send + Sync + 'static {
    /// Entries from `from` on, and none behind `applied`, which is not less: all up to [`Entries::next`], which is more than `from`.
    ///
    /// # Errors
    /// [`ErrorKind::Purged`] when `from` is gone, `Corrupt`, `Io`, `Closed`.
    fn read(&self, from: LogIndex, applied: LogIndex, place: EntryPlace) -> BoxFuture<Result<Entries>>;
}

/// What was changed in one branch from an index on, in the order of the log, as this replica applies it.
///
/// It reads from the log and holds up nobody. When the log was cut before it has read what was cut, it answers
/// [`ErrorKind::Purged`] with the oldest index that is there, and again each time it is asked.
pub struct Changes {
    group: Group,
    branch: BranchId,
    source: Arc<dyn EntrySource>,
    /// The first entry that was not read.
    next: LogIndex,
    place: EntryPlace,
    ready: VecDeque<Change>,
}

impl Changes {
    /// The changes of `branch` from entry `from` on, which may be yet to come: then what is wrong with it is told when it has been applied.
    ///
    /// # Errors
    /// `Unsupported` when outcomes are not recorded ([`crate::OUTCOMES_KEYSPACE`] was not made), `NotFound` when there is no such branch,
    /// [`ErrorKind::Purged`] when `from` is gone, or was before outcomes were recorded; `Corrupt`, `Io`, `Closed`.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn open(group: Group, branch: BranchId, source: Arc<dyn EntrySource>, from: LogIndex) -> Result<Self> {
        let next = from.max(LogIndex(1));
        let mut changes = Self { group, branch, source, next, place: EntryPlace::default(), ready: VecDeque::new() };
        changes.check()?;
        changes.fill().await?;
        Ok(changes)
    }

    /// The next change; waits until there is one.
    ///
    /// # Errors
    /// [`ErrorKind::Purged`] when the log was cut before it was read, `NotFound` when the branch was dropped; `Corrupt`, `Io`, `Closed`.
    ///
    /// # Cancel safety
    /// Cancel safe: a change that was not given is given by the next call.
    pub async fn next(&mut self) -> Result<Change> {
        loop {
            if let Some(change) = self.try_next().await? {
                return Ok(change);
            }
            self.group.applied_beyond(LogIndex(self.next.0.saturating_sub(1))).await?;
        }
    }

    /// The next change; none when all that is applied was given.
    ///
    /// # Errors
    /// As [`Changes::next`].
    /// # Cancel safety
    /// As [`Changes::next`].
    pub async fn try_next(&mut self) -> Result<Option<Change>> {
        while self.ready.is_empty() && self.next <= self.group.applied() {
            self.fill().await?;
        }
        Ok(self.ready.pop_front())
    }

    /// Where to go on from: every change before this index was given. Behind the last change given it also passes over the entries that
    /// changed nothing here.
    pub fn position(&self) -> LogIndex {
        self.ready.front().map_or(self.next, |change| change.index)
    }

    /// Refuses what cannot be read: of a branch that is not there, and from before outcomes were recorded.
    fn check(&self) -> Result<()> {
        self.group.check_open()?;
        self.group.snapshot(self.branch)?;
        if self.group.applied() < self.next {
            // A replica that is behind may not know yet that they are recorded.
            return Ok(());
        }
        let Some(made) = self.group.keyspace_made(OUTCOMES_KEYSPACE) else {
            let message = "changes are not recorded: have them recorded first, and begin from there";
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        if self.next <= made {
            return Err(purged(self.next, LogIndex(made.0.saturating_add(1))));
        }
        Ok(())
    }

    /// Reads on, up to what is applied.
    async fn fill(&mut self) -> Result<()> {
        self.check()?;
        let applied = self.group.applied();
        if applied < self.next {
            return Ok(());
        }
        let read = self.source.read(self.next, applied, self.place).await;
        // The device may have gone away under the read.
        let entries = read.map_err(|error| self.group.check_open().err().unwrap_or(error))?;
        assert!(entries.next > self.next, "a read goes on: from={} next={}", self.next, entries.next);
        let snapshot = self.group.snapshot(MAIN)?;
        let kept = LogIndex(snapshot.index().0.saturating_sub(OUTCOMES_KEPT).saturating_add(1));
        if self.next < kept {
            return Err(purged(self.next, kept));
        }
        let keyspace = snapshot.keyspace(OUTCOMES_KEYSPACE);
        let keyspace = keyspace.ok_or_else(|| Error::new(ErrorKind::Internal, "the outcomes are gone"))?;
        let keys: Vec<Bytes> = entries.commands.iter().map(|(index, _)| outcome_key(*index)).collect();
        let found = snapshot.get_many_versions(keyspace, &keys).await?;
        let mut ready = VecDeque::new();
        for ((index, command), found) in entries.commands.into_iter().zip(found) {
            let outcome = found.filter(|(version, _)| *version == index).map(|(_, value)| Outcome::decode(value));
            let time_ms = command.time_ms;
            let kind = self.kind(command.body, outcome.transpose()?);
            ready.extend(kind.map(|kind| Change { index, time_ms, kind }));
        }
        (self.next, self.place) = (entries.next, entries.place);
        self.ready.append(&mut ready);
        Ok(())
    }

    /// What the command has changed in the branch.
    fn kind(&self, body: CommandBody, outcome: Option<Outcome>) -> Option<ChangeKind> {
        let body = match body {
            CommandBody::Once { body, .. } => *body,
            body => body,
        };
        match (body, outcome) {
            (_, Some(Outcome::Refused)) => None,
            (CommandBody::Batch(batch), _) => self.writes([batch], None),
            (CommandBody::BatchIf(one), _) => self.writes([one.batch], None),
            (CommandBody::Batches(batches), outcome) => self.writes(batches, outcome),
            (CommandBody::BatchesIf(batches), outcome) => {
                self.writes(batches.into_iter().map(|conditional| conditional.batch), outcome)
            }
            (CommandBody::Custom { branch, command }, _) => {
                (branch == self.branch).then_some(ChangeKind::Command(command))
            }
            (
                CommandBody::CreateKeyspace { name } | CommandBody::SetOptions { name, .. },
                Some(Outcome::Keyspace(id)),
            ) => Some(ChangeKind::KeyspaceMade { id, name }),
            (CommandBody::CreateExpiring { name }, Some(Outcome::Keyspace(id))) => {
                Some(ChangeKind::ExpiringMade { id, name })
            }
            (CommandBody::SetOperator { name, operator }, Some(Outcome::Keyspace(id))) => {
                Some(ChangeKind::OperatorGiven { id, name, operator })
            }
            (CommandBody::DropKeyspace { name }, Some(Outcome::Keyspace(id))) => {
                Some(ChangeKind::KeyspaceDropped { id, name })
            }
            _ => None,
        }
    }

    fn writes(&self, batches: impl IntoIterator<Item = WriteBatch>, outcome: Option<Outcome>) -> Option<ChangeKind> {
        let refused = match outcome {
            Some(Outcome::RefusedBatches(places)) => places,
            _ => Vec::new(),
        };
        let applied = batches.into_iter().enumerate().filter(|(place, _)| !refused.contains(place));
        let here = applied.filter(|(_, batch)| batch.branch == self.branch);
        let ops: Vec<WriteOp> = here.flat_map(|(_, batch)| batch.ops).collect();
        (!ops.is_empty()).then_some(ChangeKind::Writes(ops))
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes").field("branch", &self.branch).field("next", &self.next).finish_non_exhaustive()
    }
}

/// The answer to who asks for an entry that is gone.
pub(crate) fn purged(from: LogIndex, oldest: LogIndex) -> Error {
    Error::new(
        ErrorKind::Purged { oldest },
        format!("the log does not reach back so far: begin anew from a snapshot from={from} oldest={oldest}"),
    )
}
