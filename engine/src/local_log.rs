//! The log of a store alone on one node: the same entries, the same records, one voter.
//!
//! # Place
//! above [`Engine`] and its log; what `replication::Node` is for a replicated group
//! # Format
//! docs/format.md, "Entries of a local log"
//! # Invariants
//! 1. An entry is applied when it and all before it are durable, in the order of the log: by who has the turn, the applier or a
//!    caller that blocks and has written its entry itself ([`mainstay_wal::Turn`]).
//! 2. Indexes grow; one whose record could not be written stays unused.
//! 3. At most [`PROPOSALS_MAX`] proposals are on their way.
//! # Crash
//! Entries behind the flushed index are applied again at open. One that was never acknowledged may be found too:
//! it is then applied, as for any caller who did not hear the answer

#![deny(clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use bytes::Bytes;
use futures_util::future::{Either, select};
use mainstay_io::{BoxFuture, TaskHandle};
use mainstay_wal::{GroupId, Lsn, OwnWrite, Record, RecordKind, RecordPos, Reserve, Wal};
use tokio::sync::{Notify, Semaphore, oneshot};

use crate::changes::{READ_BYTES_MAX, READ_ENTRIES_MAX, purged};
use crate::group::GroupShared;
use crate::outcome::OUTCOMES_KEYSPACE;
use crate::{
    Applied, Command, CommandBody, Engine, Entries, EntryPlace, EntrySource, Error, ErrorKind, Group, LogIndex, MAIN,
    OwnerPin, OwnerRecord, Result,
};

/// The kind of an entry of a local log.
pub(crate) const LOCAL_ENTRY: RecordKind = RecordKind(RecordKind::OWNER_FIRST);
/// Term and index before the command.
pub(crate) const ENTRY_HEADER_BYTES: usize = 16;
/// The term of every entry: there is nobody to elect.
pub(crate) const LOCAL_TERM: u64 = 0;
/// The part of the ring that stays for readers of [`crate::Changes`] once outcomes are recorded: a quarter.
const KEPT_PARTS: u64 = 4;
/// Proposals between their append and their answer.
const PROPOSALS_MAX: usize = 8192;
/// One position is kept for each so many bytes of the log, to tell what may be cut.
const MARK_BYTES: u64 = 256 << 10;

/// Proposes to a group that has no other replica. Cloning gives another handle.
#[derive(Clone)]
pub struct LocalLog(Arc<Shared>);

struct Shared {
    engine: Engine,
    group: Group,
    id: GroupId,
    state: Mutex<State>,
    proposals: Semaphore,
    /// Entries applied again at open.
    replayed: u64,
    marks: Arc<Marks>,
    applier: Arc<Applier>,
    ending: Arc<Ending>,
    tasks: Mutex<Vec<TaskHandle>>,
}

struct State {
    next: LogIndex,
    closed: bool,
}

/// An entry about which the log has answered.
struct Logged {
    index: LogIndex,
    command: Command,
    outcome: mainstay_wal::Result<RecordPos>,
    answer: oneshot::Sender<Result<Applied>>,
}

/// Who writes an entry.
enum Own {
    /// Its caller, or nobody if it was refused: the applier is not woken for it.
    Begun(LogIndex, Option<OwnWrite>),
    /// The log.
    Queued,
}

/// Applies entries in the order of the log, whoever has the turn.
struct Applier {
    group: Group,
    marks: Arc<Marks>,
    queue: Mutex<LoggedQueue>,
    /// Wakes the task that applies what nobody else does.
    ready: Notify,
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct LoggedQueue {
    logged: VecDeque<Logged>,
    /// Appended and not applied yet, those in `logged` included.
    entries: usize,
    /// No further entry is appended.
    closed: bool,
}

impl Applier {
    fn lock(&self) -> MutexGuard<'_, LoggedQueue> {
        // Every change is one assignment, push or pop.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An entry is about to be appended: [`Applier::put`] will be called for it.
    fn expect(&self) {
        self.lock().entries += 1;
    }

    fn put(&self, logged: Logged) {
        self.lock().logged.push_back(logged);
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_one();
    }

    /// Applies what is there up to `last`, if nobody else does: a caller does not work for those behind it.
    async fn help(&self, last: LogIndex) {
        // Who has the turn may have looked for the last time.
        let mut left = true;
        if let Ok(_turn) = self.turn.try_lock() {
            self.apply_all(last).await;
            left = !self.lock().logged.is_empty();
        }
        if left {
            self.ready.notify_one();
        }
    }

    /// Runs until the log is closed and every entry is applied.
    async fn run(self: Arc<Self>) {
        loop {
            self.ready.notified().await;
            let _turn = self.turn.lock().await;
            self.apply_all(LogIndex(u64::MAX)).await;
            let queue = self.lock();
            if queue.closed && queue.entries == 0 {
                return;
            }
        }
    }

    /// Applies what is there up to `last`. Only with the turn.
    async fn apply_all(&self, last: LogIndex) {
        loop {
            let next = {
                let mut queue = self.lock();
                let is_due = queue.logged.front().is_some_and(|logged| logged.index <= last);
                if is_due { queue.logged.pop_front() } else { None }
            };
            let Some(Logged { index, command, outcome, answer }) = next else { return };
            let outcome = match outcome {
                Ok(pos) => {
                    self.marks.add(index, pos);
                    self.group.apply(index, &command).await
                }
                Err(error) => Err(error.into()),
            };
            // The caller may have gone.
            let _ = answer.send(outcome);
            let mut queue = self.lock();
            queue.entries = queue.entries.saturating_sub(1);
            if queue.closed && queue.entries == 0 {
                self.ready.notify_one();
            }
        }
    }
}

/// Tells the task that proposes installs to end.
#[derive(Default)]
struct Ending {
    notify: Notify,
    ended: AtomicBool,
}

/// Where entries begin in the log: the first of each stretch of [`MARK_BYTES`].
#[derive(Default)]
struct Marks {
    marks: Mutex<VecDeque<(LogIndex, RecordPos)>>,
    /// The last index that was given to an entry: it may be durable before its position is known here.
    issued: AtomicU64,
    /// Whose entries they are, and where they lie.
    log: OnceLock<(Weak<GroupShared>, Wal)>,
}

impl Marks {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(LogIndex, RecordPos)>> {
        // Every change is a push or a pop.
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, index: LogIndex, pos: RecordPos) {
        let mut marks = self.lock();
        let far = |last: &(LogIndex, RecordPos)| pos.batch >= Lsn(last.1.batch.0.saturating_add(MARK_BYTES));
        if marks.back().is_none_or(far) {
            marks.push_back((index, pos));
        }
    }

    /// Where to look for entry `index`, if a mark is left that is not behind it and in the log.
    fn before(&self, index: LogIndex, start: Lsn) -> Option<Lsn> {
        let marks = self.lock();
        let found = marks.iter().rev().find(|(at, _)| *at <= index);
        found.map(|(_, pos)| pos.batch).filter(|batch| *batch >= start)
    }

    /// From where on entries stay for readers of [`crate::Changes`], if there may be some.
    fn kept(&self) -> Option<Lsn> {
        let (group, wal) = self.log.get()?;
        let recorded = group.upgrade()?.snapshot_of(MAIN).ok()?.keyspace(OUTCOMES_KEYSPACE);
        // A mark may name so much more than is meant.
        let kept_bytes = (wal.stats().ring_bytes / KEPT_PARTS).checked_sub(MARK_BYTES)?;
        recorded.map(|_| Lsn(wal.durable().0.saturating_sub(kept_bytes)))
    }
}

impl OwnerPin for Marks {
    fn pin(&self, flushed: LogIndex) -> BoxFuture<Option<RecordPos>> {
        let kept = self.kept();
        let mut marks = self.lock();
        let needed = flushed.0 < self.issued.load(Ordering::Acquire) || (kept.is_some() && !marks.is_empty());
        // The last mark at or before the first entry that is needed; it may name a little more than is.
        let flushed = |index: LogIndex| index <= LogIndex(flushed.0.saturating_add(1));
        let passed = |pos: &RecordPos| kept.is_none_or(|kept| pos.batch <= kept);
        while marks.get(1).is_some_and(|(index, pos)| flushed(*index) && passed(pos)) {
            marks.pop_front();
        }
        let oldest = marks.front().map_or(RecordPos::default(), |(_, pos)| *pos);
        Box::pin(std::future::ready(needed.then_some(oldest)))
    }

    fn carry(&self, _: Lsn) -> BoxFuture<Result<Option<RecordPos>>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

/// Reads the entries of a local log again.
struct LocalEntries {
    wal: Wal,
    id: GroupId,
    marks: Arc<Marks>,
}

impl EntrySource for LocalEntries {
    fn read(&self, from: LogIndex, applied: LogIndex, place: EntryPlace) -> BoxFuture<Result<Entries>> {
        let this = Self { wal: self.wal.clone(), id: self.id, marks: self.marks.clone() };
        Box::pin(async move {
            match this.read_from(from, applied, place).await {
                // The log was cut meanwhile.
                Err(error) if error.kind() == ErrorKind::Invalid => {
                    this.read_from(from, applied, EntryPlace::default()).await
                }
                read => read,
            }
        })
    }
}

impl LocalEntries {
    async fn read_from(&self, from: LogIndex, applied: LogIndex, place: EntryPlace) -> Result<Entries> {
        let start = self.wal.start();
        let known = place.0.filter(|(index, lsn)| *index <= from && *lsn >= start).map(|(_, lsn)| lsn);
        let known = known.or_else(|| self.marks.before(from, start));
        // Without a place to begin at, the first entry that is met tells how far back the log reaches.
        let mut reached = known.is_some();
        let mut lsn = known.unwrap_or(start);
        let (mut commands, mut bytes) = (Vec::new(), 0);
        while let Some(batch) = self.wal.read_batch(lsn).await? {
            let mine = batch.records.iter().filter(|record| record.group == self.id && record.kind == LOCAL_ENTRY);
            for record in mine {
                let index = entry_index(&record.payload)?;
                if !reached && index > from {
                    return Err(purged(from, index));
                }
                reached = true;
                if index < from {
                    continue;
                }
                if index > applied || bytes >= READ_BYTES_MAX || commands.len() >= READ_ENTRIES_MAX {
                    let next = if index > applied { LogIndex(applied.0.saturating_add(1)) } else { index };
                    return Ok(Entries { commands, next, place: EntryPlace(Some((next, batch.lsn))) });
                }
                bytes = bytes.saturating_add(record.payload.len());
                commands.push(decode_entry(&record.payload)?);
            }
            lsn = batch.end;
        }
        let next = LogIndex(applied.0.saturating_add(1));
        if !reached {
            return Err(purged(from, next));
        }
        Ok(Entries { commands, next, place: EntryPlace(Some((next, lsn))) })
    }
}

impl LocalLog {
    /// Replays the entries found at open, then takes proposals: each is durable in the log before it is applied.
    ///
    /// # Errors
    /// `Corrupt` and `Foreign` for records that are no entries of a local log; those of [`Engine::group`].
    pub async fn open(
        engine: &Engine,
        group: GroupId,
        settings: crate::GroupSettings,
        found: Vec<OwnerRecord>,
    ) -> Result<Self> {
        let id = group;
        let group = engine.group(id, settings).await?;
        let marks = Arc::new(Marks::default());
        let mut replayed = 0;
        for record in found.into_iter().filter(|record| record.group == id) {
            if record.kind != LOCAL_ENTRY {
                return Err(Error::new(
                    ErrorKind::Foreign,
                    format!("the log holds records of a replicated group kind={}", record.kind.0),
                ));
            }
            let (index, command) = decode_entry(&record.payload)?;
            marks.add(index, record.pos);
            if index > group.applied() {
                group.apply(index, &command).await?;
                replayed += 1;
            }
        }
        tracing::info!(group = id.0, flushed = group.flushed().0, entries = replayed, "opened: entries applied again");
        marks.issued.store(group.applied().0, Ordering::Release);
        let _ = marks.log.set((Arc::downgrade(group.shared()), engine.wal().clone()));
        engine.set_owner_pin(id, marks.clone());
        let applier = Arc::new(Applier {
            group: group.clone(),
            marks: marks.clone(),
            queue: Mutex::default(),
            ready: Notify::new(),
            turn: tokio::sync::Mutex::default(),
        });
        let state = State { next: LogIndex(group.applied().0 + 1), closed: false };
        let ending = Arc::new(Ending::default());
        let shared = Arc::new(Shared {
            engine: engine.clone(),
            id,
            state: Mutex::new(state),
            proposals: Semaphore::new(PROPOSALS_MAX),
            replayed,
            marks,
            applier: applier.clone(),
            ending: ending.clone(),
            tasks: Mutex::default(),
            group: group.clone(),
        });
        let spawner = engine.spawner();
        let applier = spawner.spawn("mainstay-apply", Box::pin(applier.run()));
        // Only weakly: a log whose handles are all dropped ends as if the process had been killed.
        let installer = propose_installs(Arc::downgrade(&shared), group, ending);
        let installer = spawner.spawn("mainstay-install", Box::pin(installer));
        shared.tasks().extend([applier, installer]);
        Ok(Self(shared))
    }

    /// Entries that were behind the tables and applied again at open.
    pub fn replayed(&self) -> u64 {
        self.0.replayed
    }

    /// The group it drives.
    pub fn group(&self) -> &Group {
        &self.0.group
    }

    /// Who has its entries, for [`crate::Changes::open`].
    pub fn entries(&self) -> Arc<dyn EntrySource> {
        let (wal, marks) = (self.0.engine.wal().clone(), self.0.marks.clone());
        Arc::new(LocalEntries { wal, id: self.0.id, marks })
    }

    /// Appends the command, waits until it is durable and applied, and returns the answer.
    ///
    /// # Errors
    /// `Invalid` for what cannot be encoded; `OutOfSpace` while the volume or the log is full; `Closed`. A refusal of the
    /// entry itself stands in [`Applied::response`].
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the command in the log.
    pub async fn propose(&self, command: Command) -> Result<Applied> {
        self.0.propose(command, false).await
    }

    /// As [`LocalLog::propose`], for a caller that does nothing else until it is answered: while the log is idle it writes and applies
    /// the entry itself, and blocks its thread for as long as the device takes.
    ///
    /// # Errors
    /// As [`LocalLog::propose`].
    ///
    /// # Cancel safety
    /// Not cancel safe: poll it to its end. Dropped in the middle it ends the log as a failed write does, or leaves entries of
    /// others that it was applying without an answer.
    pub async fn propose_here(&self, command: Command) -> Result<Applied> {
        self.0.propose(command, true).await
    }

    /// Waits for what was proposed, flushes what is in memory, and ends the applier.
    ///
    /// # Errors
    /// `Closed` when the log had failed before.
    pub async fn close(&self) -> Result<()> {
        let tasks = std::mem::take(&mut *self.0.tasks());
        if tasks.is_empty() {
            return Ok(());
        }
        let rotated = self.0.propose(Command { time_ms: self.0.now_ms(), body: CommandBody::Rotate }, false).await;
        if let Ok(applied) = &rotated {
            self.0.group.shared().settled(applied.index).await;
        }
        self.0.ending.end();
        self.0.state().closed = true;
        self.0.applier.close();
        for task in tasks {
            task.await;
        }
        rotated.map(drop)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tasks(&self) -> MutexGuard<'_, Vec<TaskHandle>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.engine.shared_ref().environment.clock.unix().as_millis() as u64
    }

    async fn propose(&self, command: Command, here: bool) -> Result<Applied> {
        // What frees space or memory goes on when writes have to wait.
        let reserve = match &command.body {
            CommandBody::Batch(_)
            | CommandBody::Batches(_)
            | CommandBody::BatchIf(_)
            | CommandBody::BatchesIf(_)
            | CommandBody::Custom { .. }
            | CommandBody::Once { .. } => {
                self.group.admit().await?;
                self.group.admit_to_log().await?;
                Reserve::Normal
            }
            // Not held up by a full volume, and not out of what rotations and edits need.
            CommandBody::Compact { .. }
            | CommandBody::CreateKeyspace { .. }
            | CommandBody::CreateCheckpoint { .. }
            | CommandBody::CreateClone { .. } => Reserve::Normal,
            _ => Reserve::Critical,
        };
        let payload = command.encode()?;
        let closed = |_| Error::new(ErrorKind::Closed, "the log is closed");
        let _permit = self.proposals.acquire().await.map_err(|_| Error::new(ErrorKind::Closed, "the log is closed"))?;
        let (answer, answered) = oneshot::channel();
        let own = {
            // Held over both, so that the order of indexes is the order of records.
            let mut state = self.state();
            if state.closed {
                return Err(Error::new(ErrorKind::Closed, "the log is closed"));
            }
            let index = state.next;
            state.next.0 += 1;
            self.marks.issued.store(index.0, Ordering::Release);
            let record = Record { group: self.id, kind: LOCAL_ENTRY, payload: vec![encode_header(index), payload] };
            self.applier.expect();
            let applier = self.applier.clone();
            let put = move |outcome| applier.put(Logged { index, command, outcome, answer });
            let wal = self.engine.wal();
            match here.then(|| wal.turn()).flatten() {
                Some(turn) => Own::Begun(index, turn.append(record, reserve, Box::new(put))),
                None => {
                    let applier = self.applier.clone();
                    let put_and_wake = move |outcome| {
                        put(outcome);
                        applier.ready.notify_one();
                    };
                    wal.append(record, reserve, Box::new(put_and_wake));
                    Own::Queued
                }
            }
        };
        if let Own::Begun(index, write) = own {
            if let Some(write) = write {
                write.finish().await;
            }
            self.applier.help(index).await;
        }
        answered.await.map_err(closed)?
    }
}

impl Ending {
    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.notify.notify_one();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.ending.end();
        self.applier.close();
    }
}

async fn propose_installs(log: Weak<Shared>, group: Group, ending: Arc<Ending>) {
    loop {
        let command = {
            let next = pin!(group.next_install());
            let ended = pin!(ending.notify.notified());
            match select(ended, next).await {
                Either::Left(_) => return,
                Either::Right((command, _)) => command,
            }
        };
        let Some(log) = log.upgrade() else { return };
        if ending.ended.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = log.propose(command, false).await {
            if error.kind() == ErrorKind::Closed {
                return;
            }
            // It is offered again when the log has been cut.
            tracing::warn!(%error, "what a job made could not be logged");
            log.engine.shared_ref().offer_after_purge(group.shared());
        }
    }
}

fn encode_header(index: LogIndex) -> Bytes {
    let mut header = [0; ENTRY_HEADER_BYTES];
    let (term, rest) = header.split_at_mut(8);
    term.copy_from_slice(&LOCAL_TERM.to_le_bytes());
    rest.copy_from_slice(&index.0.to_le_bytes());
    Bytes::copy_from_slice(&header)
}

/// Reads an entry as the log has it.
///
/// # Errors
/// `Corrupt`, `Foreign`.
pub(crate) fn decode_entry(payload: &Bytes) -> Result<(LogIndex, Command)> {
    let index = entry_index(payload)?;
    Ok((index, Command::decode(&payload.slice(ENTRY_HEADER_BYTES..))?))
}

fn entry_index(payload: &[u8]) -> Result<LogIndex> {
    let short = || Error::new(ErrorKind::Corrupt, format!("an entry is too short bytes={}", payload.len()));
    let (term, rest) = payload.split_first_chunk::<8>().ok_or_else(short)?;
    let (index, _) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (term, index) = (u64::from_le_bytes(*term), u64::from_le_bytes(*index));
    if term != LOCAL_TERM {
        return Err(Error::new(ErrorKind::Foreign, format!("an entry of a replicated group term={term}")));
    }
    Ok(LogIndex(index))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test has no executor")]
mod tests {
    use super::*;

    fn pos(batch: u64) -> RecordPos {
        RecordPos { batch: Lsn(batch), offset: 0, length: 1 }
    }

    #[test]
    fn marks_never_name_less_than_is_needed() {
        let marks = Marks::default();
        marks.issued.store(21, Ordering::Release);
        for n in 1..=10 {
            marks.add(LogIndex(n * 2 - 1), pos(n * MARK_BYTES));
            marks.add(LogIndex(n * 2), pos(n * MARK_BYTES + 4096));
        }
        let pinned = |flushed| {
            let pin = marks.pin(LogIndex(flushed));
            mainstay_io::block_on(pin).map(|pos| pos.batch.0 / MARK_BYTES)
        };
        assert_eq!(pinned(0), Some(1));
        // Entry 2 is needed, which lies behind the mark of entry 1.
        assert_eq!(pinned(1), Some(1));
        assert_eq!(pinned(2), Some(2));
        assert_eq!(pinned(9), Some(5));
        // Entry 21 is on its way to the log.
        assert_eq!(pinned(20), Some(10));
        assert_eq!(pinned(21), None);
    }
}
