//! The Raft log over the node's log: entries, vote, purge.
//!
//! # Place
//! openraft's `RaftLogStorage` above [`mainstay_wal::Wal`]; `entry_index` knows what is where
//! # Invariants
//! - L1. `append` returns when the entries can be read and never waits for the device (pitfall 1). Each entry is a record
//!   of its own; the log merges what many appends queued into one write.
//! - L2. Votes, entries, truncations and purges go through one queue in call order, under `order` (pitfall 2). So no
//!   copy of an old vote can be queued behind a newer one.
//! - L3. An entry is reported durable only when all before it are. The log completes in order; when it refuses a record
//!   for space, everything behind is held back until it has been queued again (pitfall 5).
//! - L4. `save_committed` does no I/O (pitfall 3): after a restart the applied state is what the engine had flushed,
//!   and the entries behind are applied again once the cluster says that they are committed.
//! - L5. Any other failed write ends the log for good: no vote and no acknowledgement follows (pitfall 12).
//! - L6. A vote, a purge or an anchor that is older than the oldest entry is written again before the ring is cut, so an
//!   idle group pins nothing (pitfall 11).
//! - L7. A full ring ends nothing, however often leaders change. A vote for which it has no room is a note of the volume; the larger of
//!   note and record counts, since votes only grow. What is truncated without ever having been in the ring costs no record, unless the ring
//!   took some of it behind what it refused, and an install costs one when all its tables are here. Whatever else finds no room is written when there is some: until then entries stay
//!   behind it, or nothing is cut.
//!
//! # Crash
//! see `entry_index`
//!
//! Lock order: `order`, then `state`. Neither is held across an await; completions take `state` alone.

mod mend;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::{Stream, StreamExt, stream};
use mainstay_engine::{Command, Engine, LogIndex, OwnerNotes, OwnerPin, OwnerRecord};
use mainstay_io::BoxFuture;
use mainstay_wal::{GroupId, Lsn, Record, RecordKind, RecordPos, Reserve, Wal};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, RaftTypeConfig};
use tokio::sync::{mpsc, oneshot};

pub(crate) use self::mend::Given;
use crate::entry_index::{ANCHORS_MAX, Anchor, EntryIndex};
use crate::progress::ApplyLag;
use crate::types::{Entry, EntryPayload, LogId, SnapshotMeta, StoredMembership, TypeConfig, Vote, io_error};
use crate::{Error, ErrorKind, Result, Runtime, record};

/// Bytes of entries that one read for a peer or for the applier returns at most, beyond its first entry.
pub(crate) const READ_BYTES_MAX: usize = 1 << 20;
/// Requests to purge that wait at once.
const PURGE_REQUESTS_MAX: usize = 4;

type Callback = Box<dyn FnOnce(std::io::Result<()>) + Send>;

/// A request of the engine to purge before it cuts the ring: entries up to `flushed` are in tables.
pub(crate) struct PurgeRequest {
    pub(crate) flushed: LogIndex,
    pub(crate) done: oneshot::Sender<()>,
}

#[derive(Default)]
struct State {
    index: EntryIndex,
    committed: Option<LogId>,
    /// The first entry that the log refused for space; nothing from here on counts as durable (L3).
    stalled_from: Option<u64>,
    /// Completions of entries that are held back, by the index of the last entry of their append.
    held: BTreeMap<u64, Callback>,
    /// The ring had no room to say that the entries behind this one are gone; nothing is written behind it before it is said.
    untold: Option<Option<LogId>>,
    /// The last entry that the ring took behind one that it refused. Until it is queued again a restart passes over it, unless what was
    /// refused is purged: so that it is gone has to be said.
    orphan: Option<u64>,
    /// Entries queued in the log and not completed.
    in_flight: u64,
    failed: Option<String>,
    purge_requests: Option<mpsc::Sender<PurgeRequest>>,
    entry_requests: Option<mpsc::Sender<EntryRequest>>,
    /// The last entry that others were asked for: it is counted once.
    asked_for: Option<LogId>,
    /// Entries that the applier was given nothing in the place of, and has not come to: see [`LogStore::take_unread`].
    unread: BTreeSet<u64>,
    counts: LogHealStatus,
    /// How the log ends was judged in this life, with every other voter heard.
    end_judged: bool,
    /// Records of the node's log when the last seal was queued.
    sealing: Option<u64>,
    apply_lag: Option<Arc<ApplyLag>>,
}

/// An entry whose record here is damaged: another member is asked for it.
pub(crate) struct EntryRequest {
    pub(crate) id: LogId,
    pub(crate) done: oneshot::Sender<Entry>,
}

/// What was found damaged in the log of a node, and what was mended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogHealStatus {
    /// Entries found missing at start, or damaged when they were read.
    pub entries_lost: u64,
    /// Entries that were fetched from other members and written again.
    pub entries_healed: u64,
    /// Times that the volume was found to have gone back behind what this member had promised.
    pub went_back: u64,
    /// Times that the log was found to end before what is in tables: the ring had been full.
    pub behind_tables: u64,
    /// The entry that is to be applied next, while it is lost here and no other member gives it or its state.
    pub awaited_entry: Option<LogIndex>,
}

/// Entries that are asked of others at once.
const ENTRY_REQUESTS_MAX: usize = 64;

/// A record lies at the start of the ring that lies in the first part of so many.
const START_SHARE: u64 = 16;

/// Rounds of copies in one answer to the engine before it is told that nothing can be cut.
const COPY_ROUNDS_MAX: usize = 8;

struct Inner {
    wal: Wal,
    /// Of the volume; a log without one has nowhere but its ring to write to.
    notes: Option<OwnerNotes>,
    group: GroupId,
    order: Mutex<()>,
    state: Mutex<State>,
}

/// The log of one group. Cloning gives another handle; openraft's readers are such.
#[derive(Clone)]
pub(crate) struct LogStore {
    inner: Arc<Inner>,
}

impl LogStore {
    /// Rebuilds the log from the records found at open.
    ///
    /// Entries up to `flushed` are in tables; without it there are no tables and never will be. What damage has taken is told
    /// by [`LogStore::damage`]; nothing but reads is asked of the store before it is mended.
    ///
    /// # Errors
    /// `Corrupt`, `Foreign`: see `entry_index`.
    pub(crate) fn open(
        wal: Wal,
        notes: Option<OwnerNotes>,
        group: GroupId,
        found: Vec<OwnerRecord>,
        cache_bytes: u64,
        flushed: Option<LogIndex>,
    ) -> Result<Self> {
        let mut index = match flushed {
            Some(flushed) => EntryIndex::new(cache_bytes, flushed.0),
            None => EntryIndex::tableless(cache_bytes),
        };
        for record in found.into_iter().filter(|r| r.group == group || r.kind == RecordKind::HOLE) {
            index.recover(record::decode(record.kind, &record.payload)?, record.pos);
        }
        index.settle();
        if let Some(note) = notes.as_ref().and_then(|notes| notes.get(group)) {
            index.recover_note(record::decode_vote_note(&note)?);
        }
        index.check()?;
        let counts = LogHealStatus { behind_tables: index.behind_tables.into(), ..LogHealStatus::default() };
        let state = State { index, counts, ..State::default() };
        Ok(Self { inner: Arc::new(Inner { wal, notes, group, order: Mutex::new(()), state: Mutex::new(state) }) })
    }

    /// Takes part in purging `engine`'s log; the receiver gets the engine's requests.
    pub(crate) fn attach(&self, engine: &Engine) -> mpsc::Receiver<PurgeRequest> {
        let (tx, rx) = mpsc::channel(PURGE_REQUESTS_MAX);
        self.state().purge_requests = Some(tx);
        engine.set_owner_pin(self.inner.group, Arc::new(self.clone()));
        rx
    }

    /// Tells `lag` of each commit.
    pub(crate) fn set_apply_lag(&self, lag: Arc<ApplyLag>) {
        self.state().apply_lag = Some(lag);
    }

    /// Stops asking for purges: nobody answers any more.
    pub(crate) fn detach(&self) {
        self.state().purge_requests = None;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().expect("nothing panics while it holds this lock")
    }

    /// Why the log takes nothing any more.
    pub(crate) fn failure(&self) -> Option<String> {
        self.state().failed.clone()
    }

    /// True while the ring is too full for entries.
    pub(crate) fn is_stalled(&self) -> bool {
        self.state().stalled_from.is_some()
    }

    pub(crate) fn is_pristine(&self) -> bool {
        self.state().index.is_pristine()
    }

    /// The oldest entry that is here.
    pub(crate) fn first_index(&self) -> u64 {
        self.state().index.first()
    }

    pub(crate) fn has_vote(&self) -> bool {
        self.state().index.vote().is_some()
    }

    pub(crate) fn last(&self) -> Option<LogId> {
        self.state().index.last()
    }

    /// The last entry that is durable here.
    pub(crate) fn last_durable(&self) -> Option<LogId> {
        self.state().index.last_durable()
    }

    /// Log id and membership of the state that the engine has flushed.
    pub(crate) fn state_at(&self, index: LogIndex) -> Result<(Option<LogId>, StoredMembership)> {
        self.state().index.state_at(index.0)
    }

    /// What the state machine needs to name any state from here to `index`.
    pub(crate) fn history_to(&self, index: LogIndex) -> (Vec<LogId>, Vec<(u64, StoredMembership)>) {
        let state = self.state();
        let ids = state.index.log_ids_to(index.0);
        let memberships =
            ids.iter().map(|id| id.index).chain([index.0]).map(|i| (i, state.index.membership_at(i))).collect();
        (ids, memberships)
    }

    /// Whether the entry `index` is in the log and not durable yet.
    pub(crate) fn is_on_its_way(&self, index: u64) -> bool {
        let state = self.state();
        (state.index.first()..state.index.next()).contains(&index) && state.index.pos(index).is_none()
    }

    /// Whether this log has an entry durable and the vote as it is now.
    pub(crate) fn holds(&self, vote: &Vote, at: LogId) -> bool {
        let state = self.state();
        let voted = state.index.vote() == Some(*vote) && state.index.is_vote_durable();
        voted && state.index.log_id(at.index) == Some(at) && state.index.pos(at.index).is_some()
    }

    /// The first entry up to the index of `at` that is of a later term than `at`. No log that holds `at` has it.
    pub(crate) fn denied_by(&self, at: LogId) -> Option<u64> {
        self.state().index.first_of_later_term(at)
    }

    /// What was applied before the log begins, where there are no tables.
    pub(crate) fn decided(&self) -> LogIndex {
        LogIndex(self.state().index.decided())
    }

    /// As [`LogStore::bytes_behind`]; `None` where the log begins later.
    pub(crate) fn bytes_lacking(&self, index: u64) -> Option<u64> {
        let state = self.state();
        state.index.reaches_back_to(index.saturating_add(1)).then(|| state.index.bytes_behind(index))
    }

    /// Bytes of the ring from the entry behind `index` on.
    pub(crate) fn bytes_behind(&self, index: u64) -> u64 {
        self.state().index.bytes_behind(index)
    }

    /// Up to where to purge so that entries stay for followers that lag that lie in the last `tail_bytes` of the ring, whoever wrote those:
    /// a group that has come to rest holds up nobody.
    pub(crate) fn purge_target(&self, flushed: LogIndex, tail_bytes: u64) -> Option<u64> {
        let floor = Lsn(self.inner.wal.durable().0.saturating_sub(tail_bytes));
        self.state().index.purge_before(flushed.0, floor)
    }

    #[cfg(test)]
    pub(crate) fn is_settled(&self) -> bool {
        self.state().in_flight == 0
    }

    #[cfg(test)]
    pub(crate) fn pos(&self, index: u64) -> Option<RecordPos> {
        self.state().index.pos(index)
    }

    #[cfg(test)]
    pub(crate) fn purged(&self) -> Option<LogId> {
        self.state().index.purged()
    }

    fn fail(&self, error: &mainstay_wal::Error) -> std::io::Error {
        self.leave_service(format!("the log cannot be written: {error}"))
    }

    /// Queues a record; the caller holds `order`.
    fn queue(&self, kind: RecordKind, payload: Vec<bytes::Bytes>, reserve: Reserve, done: mainstay_wal::OnDurable) {
        self.inner.wal.append(Record { group: self.inner.group, kind, payload }, reserve, done);
    }

    /// Queues a small record, and returns what `settle` makes of its end. The caller holds `order`.
    fn queue_told<T: Send + 'static>(
        &self,
        kind: RecordKind,
        payload: Vec<bytes::Bytes>,
        reserve: Reserve,
        settle: impl FnOnce(&Self, mainstay_wal::Result<RecordPos>) -> std::io::Result<T> + Send + 'static,
    ) -> oneshot::Receiver<std::io::Result<T>> {
        let (tx, rx) = oneshot::channel();
        let this = self.clone();
        // A dropped receiver waits for nothing.
        let done = move |result| drop(tx.send(settle(&this, result)));
        self.queue(kind, payload, reserve, Box::new(done));
        rx
    }

    /// Queues a small record, and returns what tells its end: where it lies, or that the ring had no room for it. The caller holds `order`.
    fn queue_small(
        &self,
        kind: RecordKind,
        payload: Vec<bytes::Bytes>,
        reserve: Reserve,
        placed: impl FnOnce(&mut State, RecordPos) + Send + 'static,
    ) -> Told {
        self.queue_told(kind, payload, reserve, |this, result| match result {
            Ok(pos) => {
                placed(&mut this.state(), pos);
                Ok(Some(pos))
            }
            Err(error) if error.kind() == mainstay_wal::ErrorKind::OutOfSpace => Ok(None),
            Err(error) => Err(this.fail(&error)),
        })
    }

    /// Queues a small record without which this node does not go on, and returns what tells its end. The caller holds `order`.
    fn queue_critical(
        &self,
        kind: RecordKind,
        payload: Vec<bytes::Bytes>,
        placed: impl FnOnce(&mut State, RecordPos) + Send + 'static,
    ) -> oneshot::Receiver<std::io::Result<()>> {
        self.queue_told(kind, payload, Reserve::Critical, |this, result| {
            let pos = result.map_err(|error| this.fail(&error))?;
            placed(&mut this.state(), pos);
            Ok(())
        })
    }

    /// Where the record lies; none when the ring had no room for it.
    async fn placed(told: Told) -> std::io::Result<Option<RecordPos>> {
        told.await.unwrap_or_else(|_| Err(io_error("the log was closed before the record was durable")))
    }

    async fn wait(rx: oneshot::Receiver<std::io::Result<()>>) -> std::io::Result<()> {
        rx.await.unwrap_or_else(|_| Err(io_error("the log was closed before the record was durable")))
    }

    /// Whether the ring is less than three quarters full.
    fn has_room(&self) -> bool {
        let stats = self.inner.wal.stats();
        stats.used_bytes <= stats.ring_bytes / 4 * 3
    }

    /// Whether a purge is worth its record: where room is short, only of a group that the ring cannot be cut for.
    pub(crate) fn may_purge(&self) -> bool {
        let wal = &self.inner.wal;
        let near = wal.start().0.saturating_add(wal.stats().ring_bytes / START_SHARE);
        self.has_room() || self.state().index.oldest_pos().is_none_or(|pos| pos.batch.0 <= near)
    }

    /// Queues the vote; the caller holds `order`.
    fn queue_vote(&self, vote: Vote) -> Told {
        let notes = self.inner.notes.clone();
        let group = self.inner.group;
        // Without a volume there is nothing beside the ring.
        let reserve = if notes.is_some() { Reserve::Vote } else { Reserve::Critical };
        self.queue_small(record::VOTE, record::encode_vote(&vote), reserve, move |s, pos| {
            if s.index.vote() == Some(vote) {
                s.index.vote_durable(pos);
                // Under the lock: what is noted later is of a later vote.
                if let Some(notes) = notes {
                    notes.forget(group);
                }
            }
        })
    }

    /// Waits until a vote that was queued is durable: as a record, or, where the ring has no room for one, as a note (L7).
    async fn settle_vote(&self, vote: Vote, told: Told) -> std::io::Result<()> {
        if Self::placed(told).await?.is_some() {
            return Ok(());
        }
        let refused = match &self.inner.notes {
            Some(notes) => match notes.put(self.inner.group, record::encode_vote_note(&vote)).await {
                Ok(()) => {
                    let mut state = self.state();
                    if state.index.vote() == Some(vote) {
                        state.index.vote_noted();
                    }
                    return Ok(());
                }
                Err(error) if error.kind() == mainstay_engine::ErrorKind::OutOfSpace => error.to_string(),
                Err(error) => return Err(self.leave_service(format!("the vote cannot be written: {error}"))),
            },
            None => "no volume".to_owned(),
        };
        tracing::warn!(group = self.inner.group.0, %refused, "a vote takes what is kept of the ring for other records");
        let told = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            self.queue_critical(record::VOTE, record::encode_vote(&vote), move |s, pos| {
                if s.index.vote() == Some(vote) {
                    s.index.vote_durable(pos);
                }
            })
        };
        Self::wait(told).await
    }

    /// The log ends for good with this reason.
    fn leave_service(&self, message: String) -> std::io::Error {
        let mut state = self.state();
        if state.failed.is_none() {
            tracing::error!(reason = %message, "the node leaves service");
            state.failed = Some(message.clone());
        }
        io_error(message)
    }

    fn check(&self) -> std::io::Result<()> {
        match &self.state().failed {
            Some(reason) => Err(io_error(reason)),
            None => Ok(()),
        }
    }

    /// Queues one entry; the caller holds `order` and has it in the index.
    fn queue_entry(&self, entry: &Entry, callback: Option<Callback>) {
        let id = entry.log_id;
        let waiter = match &entry.payload {
            EntryPayload::Normal(payload) => payload.waiter.clone(),
            _ => None,
        };
        if mainstay_io::mutant!(LocalBeforeSync)
            && let Some(waiter) = &waiter
        {
            waiter.durable(crate::types::term_of(&id), id.index);
        }
        let this = self.clone();
        let done = move |result: mainstay_wal::Result<RecordPos>| {
            let outcome = match result {
                Ok(pos) => this.entry_written(id, pos, callback),
                Err(error) if error.kind() == mainstay_wal::ErrorKind::OutOfSpace => {
                    this.entry_refused(id, callback);
                    None
                }
                Err(error) => {
                    let failure = this.fail(&error);
                    this.state().in_flight -= 1;
                    if let Some(waiter) = &waiter {
                        waiter.abandon();
                    }
                    callback.map(|c| (c, Err(failure)))
                }
            };
            if let Some((callback, result)) = outcome {
                if let (Ok(()), Some(waiter)) = (&result, &waiter) {
                    waiter.durable(crate::types::term_of(&id), id.index);
                }
                callback(result);
            } else if let Some(waiter) = &waiter
                && this.state().index.pos(id.index).is_some()
            {
                waiter.durable(crate::types::term_of(&id), id.index);
            }
        };
        self.queue(record::ENTRY, record::encode_entry(entry), reserve_of(entry), Box::new(done));
    }

    fn entry_written(
        &self,
        id: LogId,
        pos: RecordPos,
        callback: Option<Callback>,
    ) -> Option<(Callback, std::io::Result<()>)> {
        let mut state = self.state();
        state.in_flight -= 1;
        if state.stalled_from.is_some_and(|from| from <= id.index) {
            // One before it was refused: this one is in the ring and will be queued again (L3).
            if state.index.log_id(id.index) == Some(id) {
                state.orphan = state.orphan.max(Some(id.index));
            }
            hold(&mut state, id, callback);
            return None;
        }
        if id.index >= state.index.first() && state.index.log_id(id.index) != Some(id) {
            // Truncated while it was in flight. Its acknowledgement must not go out: an entry before it may have been
            // refused, and the leader that waits for it has been replaced.
            return None;
        }
        state.index.durable(id, pos);
        callback.map(|c| (c, Ok(())))
    }

    fn entry_refused(&self, id: LogId, callback: Option<Callback>) {
        let mut state = self.state();
        state.in_flight -= 1;
        if state.index.log_id(id.index) != Some(id) {
            return;
        }
        if state.stalled_from.is_none_or(|from| id.index < from) {
            if state.stalled_from.is_none() {
                tracing::warn!(index = id.index, "the ring is full: entries wait for space");
            }
            state.stalled_from = Some(id.index);
        }
        hold(&mut state, id, callback);
    }

    /// Queues again what was refused for space. Called at each append and by the node's housekeeping.
    pub(crate) fn resume(&self) {
        let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
        let (untold, entries): (_, Vec<(Entry, Option<Callback>)>) = {
            let mut state = self.state();
            let Some(from) = state.stalled_from else { return };
            if state.in_flight > 0 || state.failed.is_some() {
                return;
            }
            // For a fair part of what waits; else it would only be refused again.
            if !self.has_room() {
                return;
            }
            state.stalled_from = None;
            let mut entries = Vec::new();
            for i in from..state.index.next() {
                let entry = state.index.cached(i).cloned().expect("X2: an entry that is not durable is cached");
                entries.push((entry, state.held.remove(&i)));
            }
            state.in_flight += entries.len() as u64;
            state.orphan = None;
            (state.untold.take(), entries)
        };
        if let Some(after) = untold {
            // Below three quarters it has room.
            drop(self.queue_critical(record::TRUNCATE, record::encode_truncate(after.as_ref()), |_, _| ()));
        }
        for (entry, callback) in entries {
            self.queue_entry(&entry, callback);
        }
    }

    /// Makes it durable that the state at `meta` is about to be taken over from a peer. Whatever happens then, the log
    /// can name the state that the engine is found to have. False when the ring has no room for it now.
    pub(crate) async fn begin_install(&self, meta: &SnapshotMeta, flushed: LogIndex) -> std::io::Result<bool> {
        let Some(at) = meta.last_log_id else { return Err(io_error("a snapshot of nothing")) };
        let told = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            let mut state = self.state();
            let same = |anchor: &&Anchor| anchor.log_id == at && anchor.membership == meta.last_membership;
            let known = state.index.anchors().find(same).and_then(|anchor| anchor.pos);
            // Whichever were begun before have come to nothing: the tables are at `flushed`, or will be at this one.
            state.index.forget_anchors_behind(flushed.0);
            if state.index.anchors().count() >= ANCHORS_MAX {
                return Err(io_error("too many snapshots were begun and not finished"));
            }
            state.index.anchor(at, meta.last_membership.clone());
            if let Some(pos) = known {
                state.index.anchor_durable(at, pos);
                return Ok(true);
            }
            drop(state);
            let body = record::encode_anchor(&at, &meta.last_membership);
            self.queue_small(record::INSTALL, body, Reserve::Install, move |s, pos| {
                s.index.anchor_durable(at, pos);
            })
        };
        let begun = Self::placed(told).await?.is_some();
        if !begun {
            // It was named for nothing, and a name that is not durable would keep the log from being cut.
            self.state().index.forget_anchors_behind(flushed.0);
        }
        Ok(begun)
    }

    /// Writes again what lies before `floor`, up to which the ring is about to be cut, then tells the oldest record that is needed (L6).
    ///
    /// A purge or a vote that was queued meanwhile takes the place of the one that was copied and may not be durable
    /// yet, while what it replaces is no longer counted: then all of it is done again.
    ///
    /// While the log is damaged nothing is copied and nothing may be cut: an old vote behind a hole would look like the one
    /// that the hole has taken.
    async fn copy_forward(&self, floor: Lsn) -> std::io::Result<Option<RecordPos>> {
        if self.damage().is_some() {
            return Ok(Some(RecordPos::default()));
        }
        for _ in 0..COPY_ROUNDS_MAX {
            if !self.copy_once(floor).await? {
                break;
            }
            let state = self.state();
            let settled = state.index.vote().is_none() || state.index.is_vote_durable();
            if settled && state.index.anchors().all(|a| a.pos.is_some()) {
                // An entry whose place is not known lies behind the end of what is durable.
                let entry = state.index.oldest_pos();
                let anchors = state.index.anchors().filter_map(|a| a.pos);
                return Ok(anchors.chain(state.index.vote_pos()).chain(entry).min());
            }
        }
        // Nothing may be cut this time.
        Ok(Some(RecordPos::default()))
    }

    /// False when the ring had no room for all of it.
    async fn copy_once(&self, floor: Lsn) -> std::io::Result<bool> {
        let mut waits = Vec::new();
        let voted = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            let state = self.state();
            let stale = |pos: Option<RecordPos>| pos.is_none_or(|pos| pos.batch < floor);
            // A note does until there is room again.
            let noted = state.index.vote_pos().is_none() && state.index.is_vote_durable() && !self.has_room();
            let vote = state.index.vote().filter(|_| stale(state.index.vote_pos()) && !noted);
            let purged = state.index.purged();
            let anchors: Vec<_> = state.index.anchors().filter(|a| stale(a.pos)).cloned().collect();
            drop(state);
            for anchor in anchors {
                let at = anchor.log_id;
                let kind = if purged == Some(at) { record::PURGE } else { record::INSTALL };
                let body = record::encode_anchor(&at, &anchor.membership);
                let placed = move |s: &mut State, pos| s.index.anchor_durable(at, pos);
                waits.push(self.queue_small(kind, body, Reserve::Critical, placed));
            }
            vote.map(|vote| (vote, self.queue_vote(vote)))
        };
        let mut all = true;
        for wait in waits {
            all &= Self::placed(wait).await?.is_some();
        }
        if let Some((vote, told)) = voted {
            self.settle_vote(vote, told).await?;
        }
        Ok(all)
    }

    pub(crate) async fn read_entries(
        &self,
        indexes: std::ops::Range<u64>,
        bytes_max: usize,
    ) -> std::io::Result<Vec<Entry>> {
        enum Found {
            Cached(Entry),
            At(u64, RecordPos),
        }
        let mut found = Vec::new();
        let mut bytes = 0;
        {
            let state = self.state();
            let range = indexes.start.max(state.index.first())..indexes.end.min(state.index.next());
            for i in range {
                if bytes > bytes_max {
                    break;
                }
                if let Some(entry) = state.index.cached(i) {
                    if let EntryPayload::Normal(payload) = &entry.payload {
                        bytes += payload.bytes.len();
                    }
                    found.push(Found::Cached(entry.clone()));
                } else {
                    let pos = state.index.pos(i).expect("X2: an entry that is not cached has a place");
                    bytes += pos.length as usize;
                    found.push(Found::At(i, pos));
                }
            }
        }
        let mut entries = Vec::with_capacity(found.len());
        for item in found {
            entries.push(match item {
                Found::Cached(entry) => entry,
                Found::At(index, pos) => {
                    let entry = match self.inner.wal.read(pos).await {
                        Ok(bytes) => record::decode_entry(&bytes).map_err(io_error)?,
                        // Others are asked for it when it comes first: what is before it waits for nobody.
                        Err(_) if bytes_max < usize::MAX && !entries.is_empty() => break,
                        Err(error) => self.read_elsewhere(index, &error).await?,
                    };
                    if entry.log_id.index != index {
                        let got = entry.log_id.index;
                        return Err(io_error(format!("another entry lies there expected={index} found={got}")));
                    }
                    entry
                }
            });
        }
        Ok(entries)
    }
}

/// Longest entry of [`Reserve::Relief`]: some tens of them fit into that part of the ring.
const RELIEF_BYTES_MAX: usize = 2048;

/// The first entry of a leader, without which none before it is committed, and what lets the log be cut find room in a ring that is
/// full of other entries.
fn reserve_of(entry: &Entry) -> Reserve {
    match &entry.payload {
        EntryPayload::Blank => Reserve::Relief,
        EntryPayload::Normal(payload)
            if payload.bytes.len() <= RELIEF_BYTES_MAX && Command::lets_the_log_be_cut(&payload.bytes) =>
        {
            Reserve::Relief
        }
        EntryPayload::Normal(_) | EntryPayload::Membership(_) => Reserve::Normal,
    }
}

/// Keeps a completion until its entry is queued again. A later one of the same index takes the place of an earlier,
/// which belonged to an entry that was truncated.
fn hold(state: &mut State, id: LogId, callback: Option<Callback>) {
    if let Some(callback) = callback
        && state.index.log_id(id.index) == Some(id)
    {
        state.held.insert(id.index, callback);
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> std::ops::Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(i) => *i,
        Bound::Excluded(i) => i.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(i) => i.saturating_add(1),
        Bound::Excluded(i) => *i,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

impl<R: Runtime> RaftLogReader<TypeConfig<R>> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> std::io::Result<Vec<Entry>> {
        self.read_entries(bounds(&range), usize::MAX).await
    }

    async fn read_vote(&mut self) -> std::io::Result<Option<Vote>> {
        Ok(self.state().index.vote())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> std::io::Result<Vec<Entry>> {
        match self.read_entries(start..end, READ_BYTES_MAX).await {
            // It is to be sent. Nothing is sent in its place, and it is asked for again for as long as this node leads: see `log_heal`.
            Err(error) if error.kind() == mend::NOT_GIVEN => {
                tracing::warn!(%error, "an entry is not sent yet");
                Ok(Vec::new())
            }
            entries => entries,
        }
    }

    /// In parts of [`READ_BYTES_MAX`]: after a restart the range may be the whole log. It is to be applied: an entry that no other log gives
    /// has nothing in its place, see [`LogStore::take_unread`].
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = std::io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let range = bounds(&range);
        let parts = stream::unfold(Some((self.clone(), range)), |next| async move {
            let (store, range) = next?;
            if range.is_empty() {
                return None;
            }
            match store.read_entries(range.clone(), READ_BYTES_MAX).await {
                Ok(entries) => {
                    let rest = entries.last().map(|e| (store, e.log_id.index + 1..range.end));
                    Some((entries.into_iter().map(Ok).collect::<Vec<_>>(), rest))
                }
                Err(error) => match store.pass_over(&range, &error) {
                    Some(entry) => {
                        let rest = entry.log_id.index + 1..range.end;
                        Some((vec![Ok(entry)], Some((store, rest))))
                    }
                    None => Some((vec![Err(error)], None)),
                },
            }
        });
        parts.flat_map(stream::iter).boxed()
    }
}

impl<R: Runtime> RaftLogStorage<TypeConfig<R>> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> std::io::Result<LogState<TypeConfig<R>>> {
        let state = self.state();
        Ok(LogState { last_purged_log_id: state.index.purged(), last_log_id: state.index.last() })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> std::io::Result<()> {
        self.check()?;
        let vote = *vote;
        if mainstay_io::mutant!(ForgetVote) {
            self.state().index.set_vote(vote);
            return Ok(());
        }
        let told = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            self.state().index.set_vote(vote);
            self.queue_vote(vote)
        };
        self.settle_vote(vote, told).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> std::io::Result<()> {
        let mut state = self.state();
        state.committed = committed;
        if let (Some(id), Some(lag)) = (committed, &state.apply_lag) {
            lag.committed(id.index);
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> std::io::Result<Option<LogId>> {
        let state = self.state();
        // Clamped (pitfall 3): an entry behind the last one cannot be applied again from here.
        Ok(state.committed.min(state.index.last()))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig<R>>) -> std::io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.check()?;
        self.resume();
        let entries: Vec<Entry> = entries.into_iter().collect();
        let Some(last) = entries.last().map(|e| e.log_id.index) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        let mut callback: Option<Callback> = Some(Box::new(move |result| callback.io_completed(result)));
        let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
        {
            let mut state = self.state();
            for entry in &entries {
                state.index.push(entry.clone());
            }
            if state.stalled_from.is_some() {
                if let Some(callback) = callback.take() {
                    state.held.insert(last, callback);
                }
                return Ok(());
            }
            state.in_flight += entries.len() as u64;
        }
        if mainstay_io::mutant!(AppendUnflushed)
            && let Some(callback) = callback.take()
        {
            callback(Ok(()));
        }
        for entry in &entries {
            let done = if entry.log_id.index == last { callback.take() } else { None };
            self.queue_entry(entry, done);
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> std::io::Result<()> {
        self.check()?;
        let told = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            let mut state = self.state();
            state.index.truncate_after(last.map(|id| id.index));
            let next = state.index.next();
            // Completions of what is gone: openraft has moved on and waits for none of them.
            state.held.split_off(&next);
            if let Some(untold) = &mut state.untold {
                // It is still to be said, of this one now if it is the earlier one.
                *untold = last.min(*untold);
                state.stalled_from = Some(state.stalled_from.map_or(next, |from| from.min(next)));
                return Ok(());
            }
            let refused = state.stalled_from.is_some_and(|from| from <= next);
            let never_there = refused && state.in_flight == 0 && state.orphan.is_none_or(|orphan| orphan < next);
            state.orphan = state.orphan.filter(|orphan| *orphan < next);
            if state.stalled_from.is_some_and(|from| from >= next) {
                state.stalled_from = None;
            }
            if never_there {
                return Ok(());
            }
            drop(state);
            let body = record::encode_truncate(last.as_ref());
            if self.has_room() {
                // Nobody has to wait: what is appended next is behind it in the same queue.
                drop(self.queue_critical(record::TRUNCATE, body, |_, _| ()));
                return Ok(());
            }
            self.queue_small(record::TRUNCATE, body, Reserve::Install, |_, _| ())
        };
        if Self::placed(told).await?.is_none() {
            let mut state = self.state();
            let next = state.index.next();
            state.untold = Some(last);
            state.stalled_from = Some(state.stalled_from.map_or(next, |from| from.min(next)));
        }
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> std::io::Result<()> {
        self.purge_to(upto)
    }
}

impl LogStore {
    /// Forgets the entries up to `upto`, unless they are forgotten already.
    pub(crate) fn purge_to(&self, upto: LogId) -> std::io::Result<()> {
        self.check()?;
        let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
        let (untold, membership) = {
            let mut state = self.state();
            if state.index.purged() >= Some(upto) {
                return Ok(());
            }
            let membership = state.index.membership_at(upto.index);
            state.index.purge(upto, membership.clone());
            let first = state.index.first();
            state.held = state.held.split_off(&first);
            if state.stalled_from.is_some_and(|from| from < first) {
                state.stalled_from = (!state.index.is_empty()).then_some(first);
            }
            (state.untold.take(), membership)
        };
        if let Some(after) = untold {
            // Else a restart would find what is behind `upto` of the entries that are gone.
            drop(self.queue_critical(record::TRUNCATE, record::encode_truncate(after.as_ref()), |_, _| ()));
        }
        drop(self.queue_critical(record::PURGE, record::encode_anchor(&upto, &membership), move |s, pos| {
            s.index.anchor_durable(upto, pos);
        }));
        Ok(())
    }
}

/// Tells where a record lies, or that the ring had no room for it.
type Told = oneshot::Receiver<std::io::Result<Option<RecordPos>>>;

impl OwnerPin for LogStore {
    fn pin(&self, flushed: LogIndex) -> BoxFuture<Option<RecordPos>> {
        let this = self.clone();
        Box::pin(async move {
            let requests = this.state().purge_requests.clone();
            if let Some(requests) = requests.filter(|_| this.may_purge()) {
                let (done, wait) = oneshot::channel();
                if requests.try_send(PurgeRequest { flushed, done }).is_ok() {
                    // The node bounds this in time; when it is gone, what is needed is told without a purge.
                    let _ = wait.await;
                }
            }
            // While damage is mended nothing may be cut.
            let damaged = this.damage().map(|_| RecordPos::default());
            damaged.or_else(|| this.state().index.oldest_pos())
        })
    }

    fn carry(&self, floor: Lsn) -> BoxFuture<mainstay_engine::Result<Option<RecordPos>>> {
        let this = self.clone();
        Box::pin(async move {
            this.copy_forward(floor).await.map_err(|e| {
                mainstay_engine::Error::new(mainstay_engine::ErrorKind::Closed, format!("the raft log is closed: {e}"))
            })
        })
    }
}

/// Keeps the bound on `C` that the traits above need in one place.
const _: () = {
    const fn is_config<C: RaftTypeConfig>() {}
    is_config::<TypeConfig<crate::TokioRuntime>>();
};

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Corrupt => std::io::ErrorKind::InvalidData,
            _ => std::io::ErrorKind::Other,
        };
        Self::new(kind, error.to_string())
    }
}
