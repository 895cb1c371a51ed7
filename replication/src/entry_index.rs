//! What the log of a group holds and where: the pure part of the log store.
//!
//! # Place
//! below `log_store`, which queues the records; no I/O here, so that recovery is a function of records
//! # Invariants
//! - X1. The entries are `purged + 1 ..= last`, without a hole.
//! - X2. The cache holds the newest entries, `cache_first ..= last`; an entry leaves it only once its place is known.
//! - X3. For every index from `purged` to `last` the term is known, and for `purged` also the membership: an anchor. So
//!   whatever index the engine has flushed, its log id and membership can be told after a restart (`state_at`).
//!
//! # Crash
//! Recovery reads the records in order; a later one wins:
//!
//! | Record | Finds | Does |
//! |---|---|---|
//! | entry `i` | nothing before | begins the log at `i` |
//! | entry `i` | last = `i - 1` | appends |
//! | entry `i` | last >= `i` | drops `i..`, appends: the same entry queued again after the ring was full |
//! | entry `i` | last < `i - 1` | ignored: the one before it had been refused for space, so this was never acknowledged |
//! | entry `i` | no entry, purged < `i - 1` | begins the log at `i` for now: what lies between was purged later, and cut. If no such purge follows, it stood behind a refused one: dropped at the end |
//! | truncate after `i` | | drops `i + 1 ..` |
//! | purge up to `i` | entries from after `i + 1` | ignored: a later purge, still to come, let the ring be cut there; or repairs, still to come, put back what lies between |
//! | purge up to `i` | else | drops `..= i`, remembers log id and membership of `i` |
//! | snapshot about to be installed at `i` | | remembers log id and membership of `i` |
//! | vote | | replaces the vote |
//! | hole: records that damage has taken | | see below |
//! | repair of entry `i` | `i` missing | puts it in its place |
//! | repair of entry `i` | entries from after `i`, `i` not purged | begins the log at `i`: its place was cut off with the hole that it lay in. What lies between is missing |
//! | seal | | nothing |
//!
//! At the end the entries must begin right behind what is purged, or at 0; else the log is `Corrupt`, or damaged if there was a
//! hole.
//!
//! What a hole has taken is judged by what comes behind it. Let `l` be the last entry before it:
//!
//! | First record behind a hole | Then missing are |
//! |---|---|
//! | entry `i` of the term of `l` | `l + 1 ..= i - 1`: in one term a log only grows |
//! | entry `i` of another term | the same, and every entry before it that is in no table: one of them may have been truncated in the hole. Those that are in tables may be others by now too: they are dropped, so that nobody gets them from here, and what the log begins behind is asked of others |
//! | truncate after `i`, which is `i` here too | nothing |
//! | truncate after another `i` | as for an entry behind `i`, and `i` itself |
//! | neither | every entry that is in no table, and all behind `l`: how many, nobody here knows. The log is *open*. Those that are in tables are dropped as above |
//!
//! A vote in the hole is known again from a vote behind it, or outbid by the term of an entry behind it; else it is lost. One that is noted
//! beside the ring may be older than what the hole has taken, and changes nothing of that.

mod holes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mainstay_wal::{Lsn, RecordPos};

use self::holes::MISSING_MAX;
pub(crate) use self::holes::{Damage, Missing};
use crate::types::{Entry, EntryPayload, LogId, StoredMembership, Vote, log_id, term_of};
use crate::{Error, ErrorKind, Result};

/// Anchors of installs that came to nothing, before a further install is refused.
pub(crate) const ANCHORS_MAX: usize = 16;

/// The place of a record that is not durable yet.
const NOWHERE: RecordPos = RecordPos { batch: Lsn(u64::MAX), offset: u32::MAX, length: 0 };

/// A record of this log, decoded.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Recovered {
    Entry(Entry),
    Vote(Vote),
    Truncate(Option<LogId>),
    Purge(LogId, StoredMembership),
    Install(LogId, StoredMembership),
    Repair(Entry),
    Hole,
    Seal,
}

/// The state of the machine at an index: what a snapshot of it is called.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Anchor {
    pub(crate) log_id: LogId,
    pub(crate) membership: StoredMembership,
    pub(crate) pos: Option<RecordPos>,
}

#[derive(Debug, Default)]
pub(crate) struct EntryIndex {
    /// Index of `slots[0]`.
    first: u64,
    slots: VecDeque<RecordPos>,
    /// First index of each run of one term.
    terms: BTreeMap<u64, u64>,
    /// Membership entries in the log.
    memberships: BTreeMap<u64, StoredMembership>,
    anchors: BTreeMap<u64, Anchor>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    vote_pos: Option<RecordPos>,
    /// The vote is durable beside the ring.
    vote_noted: bool,
    cache: VecDeque<Entry>,
    cached_bytes: u64,
    cache_bytes_max: u64,
    begun: bool,
    /// Recovery began the log behind a gap, and no purge has filled it yet.
    behind_gap: bool,
    /// A purge that recovery met while the log began further behind.
    purge_before_gap: Option<(LogId, StoredMembership, RecordPos)>,
    /// Recovery found that the tables go beyond the log.
    pub(crate) behind_tables: bool,
    /// Entries that damage has taken; their slots are empty.
    missing: BTreeSet<u64>,
    /// Log ids that are known of missing entries.
    missing_ids: BTreeMap<u64, LogId>,
    /// Entries whose record was written again, later than those of their neighbours.
    repaired: BTreeSet<u64>,
    /// Entries up to here are in tables.
    decided: u64,
    /// There are no tables: what the log has forgotten, or begins behind, is what was applied.
    tableless: bool,
    /// Recovery met a hole.
    holes: bool,
    /// ... and nothing since that tells where the log ended.
    open: bool,
    vote_lost: bool,
    base_lost: bool,
    /// Entries in tables were dropped that may have been replaced in a hole.
    beheaded: bool,
}

fn entry_bytes(entry: &Entry) -> u64 {
    // What an entry costs beside its payload: the entry itself and its share of the queues.
    const FIXED: u64 = 128;
    match &entry.payload {
        EntryPayload::Normal(payload) => FIXED + payload.bytes.len() as u64,
        _ => FIXED,
    }
}

impl EntryIndex {
    /// An empty log; entries up to `decided` are in tables.
    pub(crate) fn new(cache_bytes_max: u64, decided: u64) -> Self {
        Self { cache_bytes_max, decided, ..Self::default() }
    }

    /// An empty log of a witness.
    pub(crate) fn tableless(cache_bytes_max: u64) -> Self {
        Self { cache_bytes_max, tableless: true, ..Self::default() }
    }

    /// What is decided up to there is not needed from the log any more.
    pub(crate) fn decided(&self) -> u64 {
        self.decided
    }

    pub(crate) fn vote(&self) -> Option<Vote> {
        self.vote
    }

    pub(crate) fn set_vote(&mut self, vote: Vote) {
        (self.vote, self.vote_pos, self.vote_noted) = (Some(vote), None, false);
    }

    /// The vote is durable in the ring.
    pub(crate) fn vote_durable(&mut self, pos: RecordPos) {
        (self.vote_pos, self.vote_noted) = (Some(pos), false);
    }

    /// The vote is durable beside the ring, which need not keep a record of it.
    pub(crate) fn vote_noted(&mut self) {
        (self.vote_pos, self.vote_noted) = (None, true);
    }

    pub(crate) fn is_vote_durable(&self) -> bool {
        self.vote_pos.is_some() || self.vote_noted
    }

    /// Where the record of the vote lies that is needed.
    pub(crate) fn vote_pos(&self) -> Option<RecordPos> {
        self.vote_pos
    }

    /// Takes in a vote that was found beside the ring, behind all records: votes only grow, so the larger one is the later.
    pub(crate) fn recover_note(&mut self, vote: Vote) {
        if self.vote.is_none_or(|own| vote > own) {
            self.set_vote(vote);
            self.vote_noted();
        }
    }

    pub(crate) fn purged(&self) -> Option<LogId> {
        self.purged
    }

    /// The index after the last entry.
    pub(crate) fn next(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// True when there is no trace of a log: nothing was ever written.
    pub(crate) fn is_pristine(&self) -> bool {
        self.slots.is_empty() && self.purged.is_none() && self.anchors.is_empty() && self.vote.is_none() && !self.holes
    }

    pub(crate) fn last(&self) -> Option<LogId> {
        if self.slots.is_empty() { self.purged } else { self.log_id(self.next() - 1) }
    }

    /// How far this member is: where the log ends, or the state in tables where that goes further. An install was acknowledged then, and
    /// the log not cut up to it before the process ended.
    pub(crate) fn end(&self) -> Option<LogId> {
        let in_tables = self.state_at(self.decided).ok().and_then(|(id, _)| id);
        self.last().max(in_tables)
    }

    /// The log id at an index, if it is known.
    pub(crate) fn log_id(&self, index: u64) -> Option<LogId> {
        if self.missing.contains(&index) {
            return self.missing_ids.get(&index).copied();
        }
        if (self.first..self.next()).contains(&index) {
            let (_, term) = self.terms.range(..=index).next_back().expect("every entry lies in a run of a term");
            return Some(log_id(*term, index));
        }
        self.anchors.get(&index).map(|a| a.log_id)
    }

    /// The first entry up to the index of `at` that is of a later term than `at`.
    pub(crate) fn first_of_later_term(&self, at: LogId) -> Option<u64> {
        let later = self.terms.range(..=at.index).find(|(_, term)| **term > term_of(&at))?;
        Some((*later.0).max(self.first))
    }

    /// Appends an entry behind the last.
    pub(crate) fn push(&mut self, entry: Entry) {
        let index = entry.log_id.index;
        if self.slots.is_empty() && self.purged.is_none() && !self.begun {
            self.first = index;
        }
        assert_eq!(index, self.next(), "a log has no holes");
        self.begun = true;
        let term = term_of(&entry.log_id);
        if self.slots.is_empty() {
            self.terms.clear();
        }
        if self.terms.last_key_value().is_none_or(|(_, last)| *last != term) {
            self.terms.insert(index, term);
        }
        if let EntryPayload::Membership(membership) = &entry.payload {
            self.memberships.insert(index, StoredMembership::new(Some(entry.log_id), membership.clone()));
        }
        self.slots.push_back(NOWHERE);
        self.cached_bytes += entry_bytes(&entry);
        self.cache.push_back(entry);
        self.evict();
    }

    /// The entry at `index` is durable at `pos`. Without effect if another has taken its place.
    pub(crate) fn durable(&mut self, id: LogId, pos: RecordPos) {
        if self.log_id(id.index) == Some(id) && id.index >= self.first {
            self.slots[(id.index - self.first) as usize] = pos;
            self.evict();
        }
    }

    /// Whether nothing from the entry `index` on was purged.
    pub(crate) fn reaches_back_to(&self, index: u64) -> bool {
        index >= self.first
    }

    /// The slot of the last entry that is durable.
    fn durable_end(&self) -> Option<(usize, &RecordPos)> {
        self.slots.iter().enumerate().rev().find(|(_, pos)| **pos != NOWHERE)
    }

    /// The last entry that is durable; what is purged is.
    pub(crate) fn last_durable(&self) -> Option<LogId> {
        self.durable_end().map_or(self.purged, |(slot, _)| self.log_id(self.first + slot as u64))
    }

    /// Where the entry lies, once it is durable.
    pub(crate) fn pos(&self, index: u64) -> Option<RecordPos> {
        let slot = *self.slots.get(usize::try_from(index.checked_sub(self.first)?).ok()?)?;
        (slot != NOWHERE).then_some(slot)
    }

    pub(crate) fn cached(&self, index: u64) -> Option<&Entry> {
        let offset = index.checked_sub(self.cache_first())?;
        self.cache.get(usize::try_from(offset).ok()?)
    }

    fn cache_first(&self) -> u64 {
        self.next() - self.cache.len() as u64
    }

    #[cfg(test)]
    pub(crate) fn cached_bytes(&self) -> u64 {
        self.cached_bytes
    }

    /// X2: the oldest go first, and only those that can be read back.
    fn evict(&mut self) {
        while self.cached_bytes > self.cache_bytes_max && self.cache.len() > 1 {
            if self.pos(self.cache_first()).is_none() {
                return;
            }
            let entry = self.cache.pop_front().expect("it is not empty");
            self.cached_bytes -= entry_bytes(&entry);
        }
    }

    /// Drops the entries after `after` (all of them for `None`).
    pub(crate) fn truncate_after(&mut self, after: Option<u64>) {
        let keep_to = after.map_or(0, |i| i + 1).max(self.first);
        while self.next() > keep_to {
            self.slots.pop_back();
            if mainstay_io::mutant!(CacheKeepsTruncated) {
                continue;
            }
            if let Some(entry) = self.cache.pop_back() {
                self.cached_bytes -= entry_bytes(&entry);
            }
        }
        self.terms.split_off(&keep_to);
        self.memberships.split_off(&keep_to);
        self.missing.split_off(&keep_to);
        self.missing_ids.split_off(&keep_to);
        self.repaired.split_off(&keep_to);
    }

    /// Drops the entries up to `upto` and remembers what the state there is called.
    pub(crate) fn purge(&mut self, upto: LogId, membership: StoredMembership) {
        if self.purged.is_some_and(|p| p.index > upto.index) {
            return;
        }
        self.drop_before(upto.index + 1);
        self.anchors = self.anchors.split_off(&upto.index);
        self.anchors.insert(upto.index, Anchor { log_id: upto, membership, pos: None });
        self.purged = Some(upto);
        self.forget_to(upto.index);
        self.begun = true;
    }

    /// The log begins at `from`.
    fn drop_before(&mut self, from: u64) {
        while self.first < from && !self.slots.is_empty() {
            if self.cache.len() == self.slots.len() {
                let entry = self.cache.pop_front().expect("as many as slots");
                self.cached_bytes -= entry_bytes(&entry);
            }
            self.slots.pop_front();
            self.first += 1;
        }
        self.first = from;
        // The run that the first entry left belongs to begins there now.
        let later = self.terms.split_off(&self.first);
        let current = self.terms.pop_last();
        self.terms = later;
        if !self.slots.is_empty() && !self.terms.contains_key(&self.first) {
            let (_, term) = current.expect("every entry lies in a run of a term");
            self.terms.insert(self.first, term);
        }
        self.memberships = self.memberships.split_off(&self.first);
        self.missing = self.missing.split_off(&self.first);
        self.missing_ids = self.missing_ids.split_off(&self.first);
        self.repaired = self.repaired.split_off(&self.first);
    }

    /// Remembers what the state at `at` is called, before the engine takes it over.
    pub(crate) fn anchor(&mut self, at: LogId, membership: StoredMembership) {
        self.anchors.insert(at.index, Anchor { log_id: at, membership, pos: None });
        self.forget_to(at.index);
    }

    fn forget_to(&mut self, index: u64) {
        if self.tableless {
            self.decided = self.decided.max(index);
        }
    }

    /// Forgets installs that were begun and came to nothing.
    pub(crate) fn forget_anchors_behind(&mut self, index: u64) {
        let keep = self.purged.map_or(index, |purged| purged.index.max(index));
        drop(self.anchors.split_off(&keep.saturating_add(1)));
    }

    pub(crate) fn anchors(&self) -> impl Iterator<Item = &Anchor> {
        self.anchors.values()
    }

    pub(crate) fn anchor_durable(&mut self, at: LogId, pos: RecordPos) {
        if let Some(anchor) = self.anchors.get_mut(&at.index)
            && anchor.log_id == at
        {
            anchor.pos = Some(pos);
        }
    }

    /// The membership in force at `index`: of the last membership entry up to there, or of the anchor below it.
    pub(crate) fn membership_at(&self, index: u64) -> StoredMembership {
        let anchor = self.anchors.range(..=index).next_back();
        let entry = self.memberships.range(..=index).next_back();
        match (anchor, entry) {
            (Some((at, anchor)), Some((i, _))) if at >= i => anchor.membership.clone(),
            (_, Some((_, membership))) => membership.clone(),
            (Some((_, anchor)), None) => anchor.membership.clone(),
            (None, None) => StoredMembership::default(),
        }
    }

    /// Log id and membership of the state that the engine flushed at `index` (X3).
    ///
    /// # Errors
    /// `Corrupt` when the log does not know that index: the tables and the log are not of one history.
    pub(crate) fn state_at(&self, index: u64) -> Result<(Option<LogId>, StoredMembership)> {
        if index == 0 {
            return Ok((None, StoredMembership::default()));
        }
        let id = self.log_id(index).ok_or_else(|| {
            let message = format!(
                "the log does not know the flushed entry flushed={index} first={} next={}",
                self.first,
                self.next()
            );
            Error::new(ErrorKind::Corrupt, message)
        })?;
        Ok((Some(id), self.membership_at(index)))
    }

    /// Terms and memberships from `purged` to `index`, for the state machine to go on from.
    pub(crate) fn log_ids_to(&self, index: u64) -> Vec<LogId> {
        let mut ids: Vec<LogId> = self.anchors.values().map(|a| a.log_id).filter(|i| i.index <= index).collect();
        ids.extend(self.terms.range(..=index).map(|(i, t)| log_id(*t, *i)));
        ids
    }

    /// The highest index up to `upto` up to which all may be purged so that nothing before `floor` stays.
    pub(crate) fn purge_before(&self, upto: u64, floor: Lsn) -> Option<u64> {
        let count = usize::try_from((upto + 1).checked_sub(self.first)?).ok()?.min(self.slots.len());
        // Places grow with the index, so the first that stays is found by halving.
        let (mut lo, mut hi) = (0, count);
        while lo < hi {
            let mid = lo + (hi - lo) / 2;
            if self.slots[mid].batch < floor { lo = mid + 1 } else { hi = mid }
        }
        (lo > 0).then(|| self.first + lo as u64 - 1)
    }

    /// Bytes of the ring from the entry behind `index` on that are durable.
    pub(crate) fn bytes_behind(&self, index: u64) -> u64 {
        let at = index.saturating_add(1).saturating_sub(self.first);
        let begin = usize::try_from(at).ok().and_then(|at| self.slots.get(at)).filter(|pos| **pos != NOWHERE);
        begin.zip(self.durable_end()).map_or(0, |(begin, (_, end))| {
            (end.batch.0 + u64::from(end.offset) + u64::from(end.length)).saturating_sub(begin.batch.0)
        })
    }

    /// Takes one record at recovery; see the table above.
    pub(crate) fn recover(&mut self, record: Recovered, pos: RecordPos) {
        match record {
            Recovered::Entry(entry) => {
                let id = entry.log_id;
                if std::mem::take(&mut self.open) {
                    self.vote_lost = false;
                    self.behind_hole(id);
                }
                let known = self.begun || self.purged.is_some();
                if self.slots.is_empty() && self.purged.is_some() && id.index > self.next() {
                    self.first = id.index;
                    self.behind_gap = true;
                } else if known && id.index > self.next() {
                    tracing::warn!(index = id.index, next = self.next(), "ignored an entry behind a refused one");
                    return;
                }
                if known && id.index < self.first {
                    if self.purged.is_some_and(|p| p.index >= id.index) {
                        return;
                    }
                    // The one that was refused is queued again: it begins the log, and what began it was behind it.
                    self.truncate_after(None);
                    self.first = id.index;
                    self.behind_gap = self.purged.is_some_and(|p| p.index.saturating_add(1) != id.index);
                } else if known {
                    self.truncate_after(id.index.checked_sub(1));
                }
                self.push(entry);
                self.durable(id, pos);
            }
            Recovered::Vote(vote) => {
                self.vote = Some(vote);
                self.vote_pos = Some(pos);
                self.vote_lost = false;
            }
            Recovered::Truncate(after) => {
                if std::mem::take(&mut self.open)
                    && let Some(id) = after
                {
                    self.behind_hole_at(id);
                }
                self.truncate_after(after.map(|id| id.index));
            }
            Recovered::Repair(entry) => {
                self.begin_before(entry.log_id.index);
                if self.missing.contains(&entry.log_id.index) {
                    self.repair(&entry, pos);
                }
            }
            Recovered::Seal => {}
            Recovered::Hole => {
                self.holes = true;
                self.open = true;
                self.vote_lost = true;
            }
            Recovered::Purge(upto, membership) => {
                if !self.slots.is_empty() && upto.index + 1 < self.first {
                    // The entries between were purged later, and cut: that purge is still to come. Or they are put back.
                    self.purge_before_gap = Some((upto, membership, pos));
                    return;
                }
                self.behind_gap = false;
                self.purge(upto, membership);
                self.anchor_durable(upto, pos);
            }
            Recovered::Install(at, membership) => {
                self.anchor(at, membership);
                self.anchor_durable(at, pos);
            }
        }
    }

    /// Ends recovery: entries behind a gap that no purge filled were never acknowledged.
    pub(crate) fn settle(&mut self) {
        if let Some((upto, membership, pos)) = self.purge_before_gap.take()
            && upto.index + 1 == self.first
        {
            self.behind_gap = false;
            self.purge(upto, membership);
            self.anchor_durable(upto, pos);
        }
        if self.behind_gap && self.holes {
            self.behind_gap = false;
            let from = self.purged.map_or(0, |p| p.index.saturating_add(1));
            if self.first.saturating_sub(from) > MISSING_MAX {
                self.base_lost = true;
                return;
            }
            // The purge or the entries that belong here lie in a hole.
            self.lead_back(from);
        }
        if std::mem::take(&mut self.behind_gap) {
            tracing::warn!(first = self.first, purged = ?self.purged, "dropped entries behind a refused one");
            self.truncate_after(None);
            self.first = self.purged.map_or(0, |p| p.index.saturating_add(1));
        }
    }

    /// Checks what recovery found.
    pub(crate) fn check(&mut self) -> Result<()> {
        let expect = self.purged.map_or(0, |p| p.index + 1);
        let begins = self.purged.is_some() || !self.slots.is_empty();
        let short = begins
            && !self.holes
            && !self.tableless
            && self.decided >= self.next()
            && self.log_id(self.decided).is_none();
        if short {
            // While the ring was full it took no entry, and others committed some that came into tables here. Nothing was promised of
            // them; what they are called, any other has to say that has them committed.
            self.holes = true;
            self.behind_tables = true;
            self.leave_out(self.decided + 1);
        }
        if self.holes {
            if self.open {
                self.drop_tables_to(self.next());
            }
            let from_birth = self.purged.is_none() && self.decided == 0 && (!self.tableless || self.first == 1);
            if from_birth && !self.slots.is_empty() && self.first <= MISSING_MAX {
                // Nothing is in tables, so nothing was purged. A witness has none ever: of it that is said of the first entry alone,
                // which is no state that a log could begin behind.
                self.lead_back(0);
            }
            // The log was cut up to what is in tables, and which tables those are was lost with a part of the node's log.
            let behind = expect > self.decided.saturating_add(1);
            let unnamed = !self.missing.contains(&self.decided) && self.state_at(self.decided).is_err();
            let begins = self.beheaded || !self.slots.is_empty();
            self.base_lost |= behind || unnamed || (begins && self.first != expect);
            return Ok(());
        }
        if !self.slots.is_empty() && self.first != expect {
            let message = format!("the log has a hole first={} expected={expect}", self.first);
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::types::{Membership, Payload};

    pub(super) fn entry(term: u64, index: u64) -> Entry {
        Entry { log_id: log_id(term, index), payload: EntryPayload::Normal(Payload::new(Bytes::from(vec![7; 100]))) }
    }

    pub(super) fn pos(n: u64) -> RecordPos {
        RecordPos { batch: Lsn(n * 4096), offset: 64, length: 100 }
    }

    pub(super) fn replay(records: Vec<Recovered>) -> EntryIndex {
        let mut index = EntryIndex::new(1 << 20, 0);
        for (n, record) in records.into_iter().enumerate() {
            index.recover(record, pos(n as u64));
        }
        index.settle();
        index
    }

    pub(super) fn span(index: &EntryIndex) -> (u64, u64) {
        (index.first(), index.next())
    }

    use Recovered as R;

    #[test]
    fn every_row_of_the_recovery_table() {
        let plain = replay(vec![R::Entry(entry(1, 0)), R::Entry(entry(1, 1)), R::Entry(entry(2, 2))]);
        assert_eq!(span(&plain), (0, 3));
        assert_eq!(plain.last(), Some(log_id(2, 2)));
        assert_eq!(plain.log_id(1), Some(log_id(1, 1)));

        // The one before it had been refused.
        let gap =
            replay(vec![R::Entry(entry(1, 0)), R::Entry(entry(1, 2)), R::Entry(entry(1, 1)), R::Entry(entry(1, 2))]);
        assert_eq!(span(&gap), (0, 3));
        assert_eq!(gap.pos(2), Some(pos(3)));

        let mut growing = replay(vec![R::Entry(entry(1, 0))]);
        (1..4).for_each(|index| growing.push(entry(2, index)));
        assert_eq!(growing.last_durable(), Some(log_id(1, 0)));
        growing.durable(log_id(2, 1), pos(7));
        assert_eq!((growing.last_durable(), growing.last()), (Some(log_id(2, 1)), Some(log_id(2, 3))));
        growing.purge(log_id(2, 1), StoredMembership::default());
        assert_eq!(growing.last_durable(), Some(log_id(2, 1)));

        let again = replay(vec![R::Entry(entry(1, 0)), R::Entry(entry(1, 1)), R::Entry(entry(2, 1))]);
        assert_eq!(again.last(), Some(log_id(2, 1)));

        let cut = replay(vec![R::Entry(entry(1, 0)), R::Entry(entry(1, 1)), R::Truncate(Some(log_id(1, 0)))]);
        assert_eq!(span(&cut), (0, 1));
        let cut = replay(vec![R::Entry(entry(1, 0)), R::Truncate(None), R::Entry(entry(3, 0))]);
        assert_eq!(cut.last(), Some(log_id(3, 0)));

        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let mut purged = replay(vec![
            R::Entry(entry(1, 5)),
            R::Entry(entry(1, 6)),
            R::Entry(entry(2, 7)),
            R::Purge(log_id(1, 6), m.clone()),
        ]);
        assert_eq!(span(&purged), (7, 8));
        assert_eq!(purged.log_id(6), Some(log_id(1, 6)));
        assert_eq!(purged.membership_at(7), m);
        assert!(purged.check().is_ok());

        let mut cut = replay(vec![
            R::Entry(entry(2, 9)),
            R::Purge(log_id(1, 6), m.clone()),
            R::Entry(entry(2, 10)),
            R::Purge(log_id(2, 8), m.clone()),
        ]);
        assert_eq!(span(&cut), (9, 11));
        assert!(cut.check().is_ok());

        // As `cut`, but the old purge stands before the entries.
        let mut led = replay(vec![
            R::Purge(log_id(1, 6), m.clone()),
            R::Entry(entry(2, 9)),
            R::Entry(entry(2, 10)),
            R::Purge(log_id(1, 7), m.clone()),
            R::Entry(entry(2, 11)),
            R::Purge(log_id(2, 9), m.clone()),
        ]);
        assert_eq!(span(&led), (10, 12));
        assert_eq!(led.last(), Some(log_id(2, 11)));
        assert!(led.check().is_ok());

        // The first entry after a purge was refused, the next was not; then both are queued again, or nothing is.
        let orphan = || vec![R::Purge(log_id(1, 6), m.clone()), R::Entry(entry(2, 8))];
        let mut dropped = replay(orphan());
        assert_eq!(span(&dropped), (7, 7));
        assert_eq!(dropped.last(), Some(log_id(1, 6)));
        assert!(dropped.check().is_ok());
        let mut again = orphan();
        again.extend([R::Entry(entry(2, 7)), R::Entry(entry(2, 8))]);
        let mut again = replay(again);
        assert_eq!(span(&again), (7, 9));
        assert_eq!(again.pos(8), Some(pos(3)));
        assert!(again.check().is_ok());

        let mut headless = replay(vec![R::Entry(entry(1, 5))]);
        assert_eq!(headless.check().expect_err("no base").kind(), ErrorKind::Corrupt);

        let installed = replay(vec![R::Entry(entry(1, 0)), R::Install(log_id(4, 90), m.clone())]);
        assert_eq!(installed.state_at(90).expect("anchored"), (Some(log_id(4, 90)), m));
        assert_eq!(installed.state_at(91).expect_err("unknown").kind(), ErrorKind::Corrupt);
        assert_eq!(span(&installed), (0, 1));
    }

    /// A member acknowledged a snapshot that it had installed, and was started again before its log was cut up to there: it denied what it had
    /// promised, asked for a state that it had, and waited until somebody had a newer one.
    #[test]
    fn a_member_is_as_far_as_the_state_that_it_installed() {
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        for (flushed, expect) in [(0, log_id(1, 0)), (90, log_id(4, 90)), (200, log_id(1, 0))] {
            let mut index = EntryIndex::new(1 << 20, flushed);
            index.recover(R::Entry(entry(1, 0)), pos(0));
            index.recover(R::Install(log_id(4, 90), m.clone()), pos(1));
            index.settle();
            assert_eq!((index.last(), index.end()), (Some(log_id(1, 0)), Some(expect)), "flushed={flushed}");
        }
    }

    #[test]
    fn cache_keeps_what_cannot_be_read_back() {
        let mut index = EntryIndex::new(500, 0);
        for i in 0..10 {
            index.push(entry(1, i));
        }
        assert!(index.cached(0).is_some(), "nothing is durable yet");
        for i in 0..5 {
            index.durable(log_id(1, i), pos(i));
        }
        assert!(index.cached(4).is_none());
        assert!(index.cached(5).is_some(), "not durable");
        for i in 5..10 {
            index.durable(log_id(1, i), pos(i));
        }
        assert!(index.cached_bytes() <= 500);
        assert!(index.cached(9).is_some());
        index.truncate_after(Some(3));
        assert_eq!(index.cached_bytes(), 0);
        index.push(entry(2, 4));
        assert_eq!(index.cached(4).map(|e| e.log_id), Some(log_id(2, 4)));
    }

    #[test]
    fn a_late_completion_does_not_place_the_entry_that_followed() {
        let mut index = EntryIndex::new(1 << 20, 0);
        index.push(entry(1, 0));
        index.truncate_after(None);
        index.push(entry(2, 0));
        index.durable(log_id(1, 0), pos(1));
        assert_eq!(index.pos(0), None);
        index.durable(log_id(2, 0), pos(2));
        assert_eq!(index.pos(0), Some(pos(2)));
    }

    #[test]
    fn what_lies_before_a_place_is_purged() {
        let mut index = EntryIndex::new(1 << 20, 0);
        for i in 0..10 {
            index.push(entry(1, i));
            index.durable(log_id(1, i), pos(i));
        }
        let before = |upto, block: u64| index.purge_before(upto, Lsn(block * 4096));
        assert_eq!(before(8, 9), Some(8));
        assert_eq!(before(8, 6), Some(5));
        assert_eq!(before(3, 6), Some(3));
        assert_eq!(before(8, 0), None);
        assert_eq!(before(9, 1000), Some(9), "others wrote on, and this group did not");
    }
}
