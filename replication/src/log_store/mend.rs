//! Giving others what they lost, and putting back what they gave.
//!
//! # Place
//! part of [`LogStore`]; `log_heal` asks and decides. docs/replication.md, "What damage has taken from a log"
//! # Invariants
//! - M1. What is put back is durable before it counts; each step is a record of its own, so that a crash between two leaves
//!   less damage and never other entries.
//! - M2. What is given is proven: see [`LogStore::give`].

use mainstay_engine::LogIndex;
use mainstay_wal::{Lsn, Reserve};
use tokio::sync::{mpsc, oneshot};

use super::{ENTRY_REQUESTS_MAX, EntryRequest, LogHealStatus, LogStore, READ_BYTES_MAX};
use crate::entry_index::Damage;
use crate::record;
use crate::types::{Entry, EntryPayload, LogId, StoredMembership, Vote, io_error};

/// Of an entry that cannot be read, and that no other member has given so far.
pub(super) const NOT_GIVEN: std::io::ErrorKind = std::io::ErrorKind::TimedOut;

impl LogStore {
    /// What damage has taken; none when the log is whole.
    pub(crate) fn damage(&self) -> Option<Damage> {
        self.state().index.damage()
    }

    pub(crate) fn heal_status(&self) -> LogHealStatus {
        self.state().counts
    }

    /// Counts a volume that was found to have gone back.
    pub(crate) fn note_went_back(&self) {
        self.state().counts.went_back += 1;
    }

    /// The end of the log, and the vote, are not what they were: the volume went back. Nothing uses the log before others have told
    /// how it ends.
    pub(crate) fn lose_end(&self) {
        let mut state = self.state();
        state.counts.went_back += 1;
        state.index.lose_end();
    }

    pub(crate) fn note_lost(&self, entries: u64) {
        self.state().counts.entries_lost += entries;
    }

    /// The members as far as this log knows.
    pub(crate) fn membership(&self) -> StoredMembership {
        let state = self.state();
        state.index.membership_at(state.index.last().map_or(0, |id| id.index))
    }

    /// The members before the entry `index`.
    pub(crate) fn membership_before(&self, index: u64) -> StoredMembership {
        index.checked_sub(1).map(|index| self.state().index.membership_at(index)).unwrap_or_default()
    }

    /// Whom to ask for entries that cannot be read: who receives here.
    pub(crate) fn entry_requests(&self) -> mpsc::Receiver<EntryRequest> {
        let (tx, rx) = mpsc::channel(ENTRY_REQUESTS_MAX);
        self.state().entry_requests = Some(tx);
        rx
    }

    /// An entry whose record cannot be read, from another member; it is written again here.
    pub(super) async fn read_elsewhere(&self, index: u64, error: &mainstay_wal::Error) -> std::io::Result<Entry> {
        let damaged = matches!(error.kind(), mainstay_wal::ErrorKind::Corrupt | mainstay_wal::ErrorKind::Io);
        let (id, requests) = {
            let state = self.state();
            (state.index.log_id(index), state.entry_requests.clone())
        };
        let (Some(id), Some(requests), true) = (id, requests, damaged) else { return Err(io_error(error)) };
        tracing::error!(index, %error, "an entry cannot be read: other members are asked for it");
        if self.state().asked_for.replace(id) != Some(id) {
            self.note_lost(1);
        }
        let (done, answer) = oneshot::channel();
        if requests.send(EntryRequest { id, done }).await.is_err() {
            return Err(io_error(error));
        }
        match answer.await {
            Ok(entry) => {
                self.fill(vec![entry.clone()]).await?;
                Ok(entry)
            }
            // It was never committed, and another leader has put its own in this place.
            Err(_) if self.log_id(index).is_some_and(|now| now != id) => {
                let mut entries = Box::pin(self.read_entries(index..index + 1, READ_BYTES_MAX)).await?;
                entries.pop().ok_or_else(|| io_error(error))
            }
            Err(_) => {
                Err(std::io::Error::new(NOT_GIVEN, format!("{error}; no other member gave the entry index={index}")))
            }
        }
    }

    /// What the applier is given in place of the first entry of `range`, which no other member gave: see [`LogStore::take_unread`]. None
    /// where `error` says anything else.
    pub(super) fn pass_over(&self, range: &std::ops::Range<u64>, error: &std::io::Error) -> Option<Entry> {
        let mut state = self.state();
        let id = state.index.log_id(range.start.max(state.index.first()))?;
        (error.kind() == NOT_GIVEN).then(|| {
            state.unread.insert(id.index);
            Entry { log_id: id, payload: EntryPayload::Blank }
        })
    }

    /// Whether the applier was given nothing in place of the entry `index`, which is not known then. It may be in the tables of another
    /// member, where nobody reads an entry but whoever applies it: so the state there may take its place.
    pub(crate) fn take_unread(&self, index: u64) -> bool {
        self.state().unread.remove(&index)
    }

    /// The applier waits for this entry, or for none any more.
    pub(crate) fn note_awaited(&self, index: Option<u64>) {
        self.state().counts.awaited_entry = index.map(LogIndex);
    }

    /// The entry `index`, asked of the other members where it cannot be read here. None when none of them gave it so far.
    pub(crate) async fn read_again(&self, index: u64) -> std::io::Result<Option<Entry>> {
        match self.read_entries(index..index + 1, READ_BYTES_MAX).await {
            Ok(mut entries) => match entries.pop() {
                Some(entry) => Ok(Some(entry)),
                None => Err(io_error(format!("an entry is not in the log index={index}"))),
            },
            Err(error) if error.kind() == NOT_GIVEN => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes entries again that damage has taken, durably, and puts each in its place.
    pub(crate) async fn fill(&self, entries: Vec<Entry>) -> std::io::Result<()> {
        self.check()?;
        let mut waits = Vec::with_capacity(entries.len());
        {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            for entry in entries {
                waits.push(self.queue_critical(record::REPAIR, record::encode_entry(&entry), move |s, pos| {
                    s.index.repair(&entry, pos);
                    s.counts.entries_healed += 1;
                }));
            }
        }
        for wait in waits {
            Self::wait(wait).await?;
        }
        Ok(())
    }

    /// The end of the log is known from here on, and that no vote of a lower term than `term` is given, durably.
    pub(crate) async fn close_end(&self, term: u64) -> std::io::Result<()> {
        self.raise_vote(term).await?;
        let mut state = self.state();
        state.index.close_end();
        state.end_judged = true;
        Ok(())
    }

    /// Whether [`LogStore::close_end`] was carried out in this life.
    pub(crate) fn end_is_judged(&self) -> bool {
        self.state().end_judged
    }

    /// What follows `after` is dropped, `entries` are appended, durably.
    pub(crate) async fn replace_end(&self, after: Option<LogId>, entries: Vec<Entry>) -> std::io::Result<()> {
        self.check()?;
        let mut waits = Vec::new();
        {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            self.state().index.truncate_after(after.map(|id| id.index));
            waits.push(self.queue_critical(record::TRUNCATE, record::encode_truncate(after.as_ref()), |_, _| ()));
            for entry in entries {
                self.state().index.push(entry.clone());
                let id = entry.log_id;
                waits.push(self.queue_critical(record::ENTRY, record::encode_entry(&entry), move |s, pos| {
                    s.index.durable(id, pos);
                    s.counts.entries_healed += 1;
                }));
            }
        }
        for wait in waits {
            Self::wait(wait).await?;
        }
        Ok(())
    }

    /// Gives no vote in a term up to `term` from here on, durably; to nobody, since whom it was given to is not known.
    pub(crate) async fn raise_vote(&self, term: u64) -> std::io::Result<()> {
        let (vote, told) = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            let vote = match self.state().index.vote() {
                Some(vote) if vote.leader_id.term >= term => vote,
                _ => Vote::new(term, NOBODY),
            };
            self.state().index.set_vote(vote);
            (vote, self.queue_vote(vote))
        };
        self.settle_vote(vote, told).await
    }

    /// Votes for this node in a new term and appends an entry of that term, durably, in this order. Nothing else runs on the log.
    pub(crate) async fn vote_and_append(&self, vote: Vote, entry: Entry) -> std::io::Result<()> {
        self.check()?;
        let told = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            self.state().index.set_vote(vote);
            self.queue_vote(vote)
        };
        self.settle_vote(vote, told).await?;
        let appended = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            self.state().index.push(entry.clone());
            let id = entry.log_id;
            let body = record::encode_entry(&entry);
            self.queue_critical(record::ENTRY, body, move |s, pos| s.index.durable(id, pos))
        };
        Self::wait(appended).await
    }

    /// The least term that this node may have voted in, when the vote itself is gone.
    pub(crate) fn least_vote(&self) -> Option<u64> {
        self.state().index.least_vote()
    }

    /// The tables are at `at`, or the engine has taken over the state there: the entries up to it are needed no more, missing or
    /// not.
    pub(crate) async fn rebase(&self, at: LogId, membership: StoredMembership) -> std::io::Result<()> {
        let rx = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            if self.state().index.rebase(at, membership.clone()) {
                // Durable with the purge behind it.
                drop(self.queue_critical(record::TRUNCATE, record::encode_truncate(None), |_, _| ()));
            }
            self.queue_critical(record::PURGE, record::encode_anchor(&at, &membership), move |s, pos| {
                s.index.anchor_durable(at, pos);
            })
        };
        Self::wait(rx).await
    }

    /// Drops what follows entries that were filled in and shows by its term that it was never committed.
    pub(crate) async fn straighten(&self) -> std::io::Result<()> {
        let rx = {
            let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
            let mut state = self.state();
            let Some(last) = state.index.first_decrease().and_then(|i| i.checked_sub(1)) else { return Ok(()) };
            let after = state.index.log_id(last);
            tracing::warn!(after = last, "dropped entries that were never committed, behind those that were lost");
            state.index.truncate_after(Some(last));
            drop(state);
            self.queue_critical(record::TRUNCATE, record::encode_truncate(after.as_ref()), |_, _| ())
        };
        Self::wait(rx).await
    }

    /// The last index that is purged.
    pub(crate) fn purged_index(&self) -> u64 {
        self.state().index.purged().map_or(0, |id| id.index)
    }

    /// The index behind the last entry.
    pub(crate) fn next(&self) -> u64 {
        self.state().index.next()
    }

    /// Writes a record that says nothing, behind everything else. The last batch of a log that lost its power cannot be told
    /// from a torn one when it is damaged; one that has this behind it can.
    pub(crate) fn seal(&self) {
        let _order = self.inner.order.lock().expect("nothing panics while it holds this lock");
        let wal = &self.inner.wal;
        let before = wal.stats().records;
        let this = self.clone();
        self.queue(
            record::SEAL,
            record::encode_seal(),
            Reserve::Normal,
            Box::new(move |result| {
                // Without space, or on a log that failed, there is nothing to prove.
                if result.is_ok() {
                    this.state().sealing = Some(before);
                }
            }),
        );
    }

    /// The end of the log up to which a seal proves everything, if one was written since the last call and nothing with it.
    pub(crate) fn take_seal(&self) -> Option<Lsn> {
        let before = self.state().sealing.take()?;
        let wal = &self.inner.wal;
        (wal.stats().records == before + 1).then(|| wal.durable())
    }

    /// The log id at an index, if it is known.
    pub(crate) fn log_id(&self, index: u64) -> Option<LogId> {
        self.state().index.log_id(index)
    }

    /// Vote, and how far this member is.
    pub(crate) fn ends(&self) -> (Option<Vote>, Option<LogId>) {
        let state = self.state();
        (state.index.vote(), state.index.end())
    }

    /// What is asked of other logs, and answered, about what a log begins behind: see [`crate::entry_index`].
    pub(crate) fn base_wanted(&self) -> Option<(u64, LogId)> {
        self.state().index.base_wanted()
    }

    pub(crate) fn own_base(&self) -> Option<(LogId, StoredMembership)> {
        self.state().index.own_base()
    }

    pub(crate) fn base_for(&self, index: u64, known: LogId) -> Option<(LogId, StoredMembership)> {
        self.state().index.base_for(index, known)
    }

    /// What this log says to a member that has lost its entries `from ..= to`. They are proven when this log has the entry
    /// `anchor` from behind them, or has them committed: `committed`.
    pub(crate) async fn give(
        &self,
        from: u64,
        to: u64,
        anchor: Option<LogId>,
        committed: u64,
    ) -> std::io::Result<Given> {
        let range = {
            let state = self.state();
            let index = &state.index;
            let damage = index.damage();
            let lost = damage.as_ref().is_some_and(|d| d.base || d.open_from.is_some_and(|open| from >= open));
            if index.is_missing(from) || (lost && index.log_id(from).is_none()) {
                return Ok(Given::Damaged);
            }
            if from < index.first() {
                return Ok(if index.purged().is_some() { Given::Purged } else { Given::Nothing });
            }
            if from >= index.next() {
                return Ok(Given::Nothing);
            }
            let anchored = anchor.is_some_and(|id| id.index >= from && index.log_id(id.index) == Some(id));
            let end = if anchored { to } else { to.min(committed.max(state.committed.map_or(0, |id| id.index))) };
            if end < from {
                return Ok(Given::Nothing);
            }
            from..end.saturating_add(1).min(index.missing_from(from).unwrap_or(u64::MAX))
        };
        let entries = self.read_entries(range, READ_BYTES_MAX).await?;
        Ok(if entries.is_empty() { Given::Nothing } else { Given::Entries(entries) })
    }
}

/// A vote for nobody: no member has this id.
const NOBODY: u64 = 0;

/// What a log gives to a member that has lost entries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Given {
    /// The first of them; these very entries were lost.
    Entries(Vec<Entry>),
    /// They are in tables.
    Purged,
    /// They are lost here too.
    Damaged,
    /// It never had them, or cannot say that they are the same.
    Nothing,
}
