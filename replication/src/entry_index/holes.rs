//! What damage has taken from a log, and how it is put back: the pure part.
//!
//! # Place
//! part of [`EntryIndex`]; the table of what a hole may have taken stands there

use mainstay_wal::RecordPos;

use super::{Anchor, EntryIndex, NOWHERE};
use crate::types::{Entry, EntryPayload, LogId, StoredMembership, term_of};

/// Entries that damage has taken, `from ..= to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// The first entry from `to` on whose log id is known: a log that has it has the very entries that are missing.
    pub(crate) anchor: Option<LogId>,
}

/// What damage has taken from a log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Damage {
    pub(crate) missing: Vec<Missing>,
    /// Entries from here on may have been acknowledged and are gone, as many as there were.
    pub(crate) open_from: Option<u64>,
    /// A vote may have been given and is gone.
    pub(crate) vote: bool,
    /// It is not known what the log begins behind: another log tells ([`EntryIndex::base_for`]), or the state of another replica
    /// takes the place of this one's.
    pub(crate) base: bool,
}

/// More missing entries than this are not named one by one: the state of another replica takes their place.
pub(super) const MISSING_MAX: u64 = 1 << 20;

impl EntryIndex {
    /// What the first entry behind a hole says of what lay in it.
    pub(super) fn behind_hole(&mut self, id: LogId) {
        if self.slots.is_empty() {
            // Judged as any gap is.
            return;
        }
        let last = self.next() - 1;
        if self.log_id(last).map(|l| term_of(&l)) != Some(term_of(&id)) {
            self.doubt(id.index);
        }
        self.leave_out(id.index);
    }

    /// The same of an entry that is said to be the last one at this point.
    pub(super) fn behind_hole_at(&mut self, id: LogId) {
        if self.slots.is_empty() || self.log_id(id.index) == Some(id) {
            return;
        }
        self.doubt(id.index.saturating_add(1));
        self.leave_out(id.index.saturating_add(1));
        if self.missing.contains(&id.index) {
            self.missing_ids.insert(id.index, id);
        }
    }

    /// Entries before `end` may be others by now. Those in tables are not needed here, and nobody shall get them from here.
    fn doubt(&mut self, end: u64) {
        let end = end.min(self.next());
        self.drop_tables_to(end);
        let from = self.first.max(self.decided.saturating_add(1));
        for index in from..end {
            self.slots[(index - self.first) as usize] = NOWHERE;
            self.missing.insert(index);
            self.memberships.remove(&index);
            self.repaired.remove(&index);
        }
        if from < end {
            self.set_terms(from, end, 0);
            self.empty_cache();
        }
    }

    /// Drops entries before `end` that are in tables. Of the last of them it stays known what it was thought to be: who is asked depends on
    /// it, and one that has nobody to ask goes on from it.
    pub(super) fn drop_tables_to(&mut self, end: u64) {
        let end = self.decided.saturating_add(1).min(end);
        if self.decided == 0 || end <= self.first {
            return;
        }
        let last = end - 1;
        let thought =
            self.log_id(last).map(|log_id| Anchor { log_id, membership: self.membership_at(last), pos: None });
        self.drop_before(end);
        if let Some(anchor) = thought {
            self.anchors.entry(last).or_insert(anchor);
        }
        self.beheaded = true;
    }

    /// Everything from the end of the log to before `index` is missing.
    pub(super) fn leave_out(&mut self, index: u64) {
        let from = self.next();
        if index <= from {
            return;
        }
        if index - from > MISSING_MAX {
            self.base_lost = true;
        }
        self.empty_cache();
        self.terms.insert(from, 0);
        for missing in from..index.min(from + MISSING_MAX) {
            self.slots.push_back(NOWHERE);
            self.missing.insert(missing);
        }
    }

    /// The log begins at `from` and what lies before its entries is missing.
    pub(super) fn lead_back(&mut self, from: u64) {
        while self.first > from {
            self.first -= 1;
            self.slots.push_front(NOWHERE);
            self.missing.insert(self.first);
        }
        self.terms.insert(from, 0);
    }

    /// The entry at `index`, before all others, was written again behind them: the hole that it lay in was cut off.
    pub(super) fn begin_before(&mut self, index: u64) {
        let purged = self.purged.is_some_and(|purged| purged.index >= index);
        if !self.slots.is_empty() && index < self.first && !purged && self.first - index <= MISSING_MAX {
            self.lead_back(index);
        }
    }

    /// Recovery has places for all that the cache holds.
    fn empty_cache(&mut self) {
        self.cache.clear();
        self.cached_bytes = 0;
    }

    /// The entries `from..end` are of one term; 0 for a term that is not known.
    fn set_terms(&mut self, from: u64, end: u64, term: u64) {
        let behind = self.terms.range(..=end).next_back().map(|(_, term)| *term);
        let inside: Vec<u64> = self.terms.range(from..end).map(|(i, _)| *i).collect();
        for index in inside {
            self.terms.remove(&index);
        }
        self.terms.insert(from, term);
        if end < self.next()
            && let Some(behind) = behind
        {
            self.terms.insert(end, behind);
        }
    }

    /// The entry stands in its place again, written at `pos`. It is missing, or the same as the one that is there.
    pub(crate) fn repair(&mut self, entry: &Entry, pos: RecordPos) {
        let id = entry.log_id;
        if !(self.first..self.next()).contains(&id.index) {
            return;
        }
        if self.missing.remove(&id.index) {
            self.missing_ids.remove(&id.index);
            self.set_terms(id.index, id.index + 1, term_of(&id));
            if let EntryPayload::Membership(membership) = &entry.payload {
                self.memberships.insert(id.index, StoredMembership::new(Some(id), membership.clone()));
            }
        } else if self.log_id(id.index) != Some(id) {
            return;
        }
        self.slots[(id.index - self.first) as usize] = pos;
        self.repaired.insert(id.index);
    }

    /// Where the oldest record of an entry lies that is needed. Entries lie in order but for those that were repaired; those
    /// that are missing lie nowhere.
    pub(crate) fn oldest_pos(&self) -> Option<RecordPos> {
        let end = self.repaired.last().max(self.missing.last()).map_or(self.first, |last| last + 1);
        (self.first..=end).filter_map(|index| self.pos(index)).min()
    }

    /// What damage has taken; none when the log is whole.
    pub(crate) fn damage(&self) -> Option<Damage> {
        let mut damage = Damage {
            open_from: self.open.then(|| self.next().min(self.decided.saturating_add(1)).max(self.first)),
            vote: self.vote_lost,
            base: self.base_lost,
            ..Damage::default()
        };
        for &index in &self.missing {
            match damage.missing.last_mut() {
                Some(range) if range.to + 1 == index => range.to = index,
                _ => damage.missing.push(Missing { from: index, to: index, anchor: None }),
            }
        }
        for range in &mut damage.missing {
            range.anchor = self.missing_ids.get(&range.to).copied().or_else(|| self.log_id(range.to + 1));
        }
        (damage != Damage::default()).then_some(damage)
    }

    pub(crate) fn is_missing(&self, index: u64) -> bool {
        self.missing.contains(&index)
    }

    /// The first missing entry from `index` on.
    pub(crate) fn missing_from(&self, index: u64) -> Option<u64> {
        self.missing.range(index..).next().copied()
    }

    /// As if the end of the log lay in a hole.
    pub(crate) fn lose_end(&mut self) {
        self.holes = true;
        self.open = true;
        self.vote_lost = true;
    }

    /// What is asked of other logs when it is lost what this one begins behind: the log id and the membership at an index, which is
    /// the one of the tables, and the first entry from there on that is known. None where no entry is known to be right.
    pub(crate) fn base_wanted(&self) -> Option<(u64, LogId)> {
        if !self.base_lost || self.slots.is_empty() || self.open {
            return None;
        }
        let index = if self.tableless { self.decided.max(self.first.checked_sub(1)?) } else { self.decided };
        let known = (self.first.max(index)..self.next()).find(|index| !self.missing.contains(index))?;
        self.log_id(known).map(|known| (index, known))
    }

    /// What the log begins behind as far as it is known here, for one that is the only voter.
    pub(crate) fn own_base(&self) -> Option<(LogId, StoredMembership)> {
        let (id, membership) = self.state_at(self.decided).ok()?;
        Some((id?, membership))
    }

    /// The answer: none when this log cannot tell. Both logs have the entry `known`, so up to there they are the same.
    pub(crate) fn base_for(&self, index: u64, known: LogId) -> Option<(LogId, StoredMembership)> {
        let same = (self.first..self.next()).contains(&known.index) && self.log_id(known.index) == Some(known)
            || self.purged == Some(known);
        let whole = !self.base_lost && self.missing.range(..=index).next().is_none();
        let kept = index <= known.index && self.purged.is_none_or(|purged| purged.index <= index);
        if !(same && whole && kept) {
            return None;
        }
        self.log_id(index).map(|id| (id, self.membership_at(index)))
    }

    /// The end of the log was judged, with the help of others.
    pub(crate) fn close_end(&mut self) {
        self.open = false;
        self.vote_lost = false;
    }

    /// The state of another replica, at `at`, takes the place of all up to there. What was acknowledged behind it stays.
    /// True when all entries were dropped: what is committed there is another one, so what follows ours never was.
    pub(crate) fn rebase(&mut self, at: LogId, membership: StoredMembership) -> bool {
        let other = at.index >= self.first && self.log_id(at.index).is_some_and(|id| id != at);
        if other {
            self.truncate_after(None);
        }
        let from = at.index.saturating_add(1);
        if !self.slots.is_empty() && self.first > from && self.first - from <= MISSING_MAX {
            self.lead_back(from);
            // It was cut as far as tables went that are lost.
            self.purged = None;
        }
        self.purge(at, membership);
        self.decided = self.decided.max(at.index);
        self.base_lost = !self.slots.is_empty() && self.first != from;
        other
    }

    /// Where a term is less than the one before it: what was filled in is committed, and what follows never was.
    pub(crate) fn first_decrease(&self) -> Option<u64> {
        let mut highest = 0;
        for (&index, &term) in &self.terms {
            if term < highest {
                return Some(index);
            }
            highest = term;
        }
        None
    }

    /// A vote is at least of this term: entries of it were acknowledged.
    pub(crate) fn least_vote(&self) -> Option<u64> {
        let last = self.last().map(|id| term_of(&id))?;
        (self.holes && self.vote.is_none_or(|vote| vote.leader_id.term < last)).then_some(last)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Recovered as R;
    use super::super::Recovered;
    use super::super::tests::{entry, pos, replay, span};
    use super::*;
    use crate::types::{Membership, Vote, log_id};

    fn missing(index: &EntryIndex) -> Vec<(u64, u64, Option<LogId>)> {
        let damage = index.damage().unwrap_or_default();
        damage.missing.iter().map(|m| (m.from, m.to, m.anchor)).collect()
    }

    /// Of a member whose tables are at `flushed`: the beginning of its log is lost.
    fn beheaded(flushed: u64, behind: Vec<Recovered>) -> EntryIndex {
        let mut index = EntryIndex::new(1 << 20, flushed);
        (0..).zip([vec![R::Hole], behind].concat()).for_each(|(n, record)| index.recover(record, pos(n)));
        index.settle();
        index.check().expect("with a hole it is no error");
        index
    }

    fn vote(term: u64) -> Recovered {
        R::Vote(Vote::new(term, 1))
    }

    #[test]
    fn every_row_of_the_table_of_holes() {
        let log = |terms: &[u64]| -> Vec<Recovered> {
            (0..).zip(terms).map(|(index, term)| R::Entry(entry(*term, index))).collect()
        };
        let with = |terms: &[u64], behind: Vec<Recovered>| {
            let mut records = log(terms);
            records.insert(0, vote(1));
            records.push(R::Hole);
            records.extend(behind);
            replay(records)
        };
        // Of one term: what lies between is missing, and nothing else.
        let mut plain = with(&[1, 1, 1], vec![R::Entry(entry(1, 5)), R::Entry(entry(1, 6))]);
        assert_eq!(missing(&plain), [(3, 4, Some(log_id(1, 5)))]);
        assert_eq!((plain.log_id(2), plain.log_id(3), plain.log_id(5)), (Some(log_id(1, 2)), None, Some(log_id(1, 5))));
        let damage = plain.damage().expect("damaged");
        assert_eq!((damage.open_from, damage.vote, damage.base), (None, false, false));
        assert!(plain.check().is_ok());
        // The hole took nothing that is missed: a vote perhaps, which the entry behind it outbids.
        assert_eq!(with(&[1, 1, 1], vec![R::Entry(entry(1, 3))]).damage(), None);
        assert_eq!(with(&[1, 1, 1], vec![R::Entry(entry(1, 2)), R::Entry(entry(1, 3))]).damage(), None);
        // Of another term: an entry before the hole may have been truncated in it.
        let doubted = with(&[1, 1, 1], vec![R::Entry(entry(2, 3))]);
        assert_eq!(missing(&doubted), [(1, 2, Some(log_id(2, 3)))], "entry 0 is in a table");
        assert_eq!(doubted.least_vote(), Some(2));
        let doubted = with(&[1, 1, 1], vec![R::Entry(entry(2, 2))]);
        assert_eq!(missing(&doubted), [(1, 1, Some(log_id(2, 2)))]);
        // A truncation says which entry was the last one then.
        assert_eq!(missing(&with(&[1, 1, 1], vec![R::Truncate(Some(log_id(1, 1)))])), []);
        let cut = with(&[1, 1, 1], vec![R::Truncate(Some(log_id(1, 4))), R::Entry(entry(2, 5))]);
        assert_eq!(missing(&cut), [(1, 4, Some(log_id(1, 4)))]);
        assert_eq!(span(&cut), (0, 6));
        // Nothing behind it: how much there was is not known, nor whom a vote was given to.
        let open = with(&[1, 1, 1], vec![]);
        let damage = open.damage().expect("damaged");
        assert_eq!((damage.open_from, damage.vote, missing(&open).len()), (Some(1), true, 0));
        let voted = with(&[1, 1, 1], vec![vote(4)]).damage().expect("damaged");
        assert_eq!((voted.open_from, voted.vote), (Some(1), false));
        // The purge record itself is gone, or the entries behind it.
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let headless = beheaded(5, vec![R::Entry(entry(1, 900))]);
        assert!(headless.damage().expect("damaged").base);
        let mut behind = replay(vec![R::Purge(log_id(1, 6), m), R::Hole, R::Entry(entry(1, 9))]);
        assert!(behind.check().is_ok());
        assert_eq!(missing(&behind), [(7, 8, Some(log_id(1, 9)))]);
    }

    /// The entries of a term that lost were in the log, the hole took their truncation and those of the next term, and all of that was
    /// flushed later.
    #[test]
    fn entries_in_tables_that_a_hole_may_have_replaced_are_given_to_nobody() {
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let recover = |decided: u64, behind: Vec<Recovered>| {
            let mut index = EntryIndex::new(1 << 20, decided);
            let before = [R::Purge(log_id(1, 3), m.clone())].into_iter().chain((4..9).map(|i| R::Entry(entry(1, i))));
            (0..).zip(before.chain([R::Hole]).chain(behind)).for_each(|(n, record)| index.recover(record, pos(n)));
            index.settle();
            index.check().expect("with a hole it is no error");
            index
        };
        // The tables end behind the hole.
        let overwritten = || (9..13).map(|i| R::Entry(entry(3, i)));
        let mut ill = recover(11, overwritten().collect());
        assert_eq!((span(&ill), missing(&ill)), ((9, 13), vec![]));
        assert_eq!((4..9).filter_map(|i| ill.pos(i)).collect::<Vec<_>>(), []);
        assert_eq!(ill.own_base(), Some((log_id(3, 11), m.clone())));
        assert_eq!(ill.base_wanted(), Some((11, log_id(3, 11))));
        ill.rebase(log_id(3, 11), m.clone());
        assert_eq!((span(&ill), ill.damage()), ((12, 13), None));
        // An entry behind the hole takes the place of one before it.
        let ill = recover(11, (7..13).map(|i| R::Entry(entry(3, i))).collect());
        assert_eq!((span(&ill), ill.base_wanted()), ((7, 13), Some((11, log_id(3, 11)))));
        // They end before it: what is in no table is asked for, as ever.
        let ill = recover(6, overwritten().collect());
        assert_eq!((span(&ill), missing(&ill)), ((7, 13), vec![(7, 8, Some(log_id(3, 9)))]));
        assert_eq!(ill.base_wanted(), Some((6, log_id(3, 9))));
        // A truncation says the same of what lies before it.
        let ill = recover(11, [R::Truncate(Some(log_id(2, 8)))].into_iter().chain(overwritten()).collect());
        assert_eq!((span(&ill), ill.base_wanted()), ((9, 13), Some((11, log_id(3, 11)))));
        // With nothing behind the truncation, the state of another replica is all that is left to ask for.
        let ill = recover(11, vec![R::Truncate(Some(log_id(2, 8)))]);
        assert_eq!((ill.is_empty(), ill.damage().map(|d| d.base), ill.base_wanted()), (true, Some(true), None));
        // Nothing behind the hole: the same of all that was found, and how the log ended is asked for as ever.
        let mut ill = recover(6, vec![]);
        assert_eq!((span(&ill), missing(&ill), ill.base_wanted()), ((7, 9), vec![], None));
        assert_eq!(ill.damage().map(|d| (d.base, d.open_from)), Some((true, Some(7))));
        ill.rebase(log_id(2, 6), m.clone());
        assert_eq!(ill.damage().map(|d| (d.base, d.open_from)), Some((false, Some(7))));
        let alone = recover(6, vec![]);
        assert_eq!(alone.own_base(), Some((log_id(1, 6), m.clone())), "what it was thought to be");
        let ill = recover(11, vec![]);
        assert_eq!((ill.is_empty(), ill.damage().map(|d| (d.base, d.open_from))), (true, Some((true, Some(9)))));
        // Later in the log it was cut behind all that.
        let ill = recover(11, overwritten().chain([R::Purge(log_id(3, 10), m.clone())]).collect());
        assert_eq!((span(&ill), ill.damage()), ((11, 13), None));
    }

    /// The hole is cut off, and with it what was written again behind it.
    #[test]
    fn entries_that_were_put_back_behind_a_purge_are_found_there() {
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let repairs = |range: std::ops::Range<u64>| range.map(|i| R::Repair(entry(1, i))).collect::<Vec<_>>();
        let recover = |repaired: Vec<Recovered>| {
            let before = vec![R::Entry(entry(2, 9)), R::Entry(entry(2, 10)), R::Purge(log_id(1, 5), m.clone())];
            replay([before, repaired].concat())
        };
        let mut whole = recover(repairs(6..9));
        whole.check().expect("whole");
        assert_eq!((span(&whole), whole.purged(), whole.damage()), ((6, 11), Some(log_id(1, 5)), None));
        assert_eq!(whole.anchors().map(|a| a.pos).collect::<Vec<_>>(), [Some(pos(2))]);
        // The first of them is missing: as before, that is no whole log.
        assert_eq!(recover(repairs(7..9)).check().expect_err("a hole").kind(), crate::ErrorKind::Corrupt);
    }

    #[test]
    fn a_log_that_was_cut_further_than_its_tables_go_begins_behind_them_again() {
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let mut index = EntryIndex::new(1 << 20, 5);
        let records = vec![R::Purge(log_id(1, 9), m.clone()), R::Hole, R::Entry(entry(1, 10)), R::Entry(entry(1, 11))];
        (0..).zip(records).for_each(|(n, record)| index.recover(record, pos(n)));
        index.settle();
        index.check().expect("with a hole it is no error");
        assert_eq!(index.base_wanted(), Some((5, log_id(1, 10))));
        index.rebase(log_id(1, 5), m);
        assert_eq!((span(&index), missing(&index)), ((6, 12), vec![(6, 9, Some(log_id(1, 10)))]));
        assert_eq!(index.state_at(5).expect("named").0, Some(log_id(1, 5)));
        assert!(!index.damage().expect("entries are missing").base);
    }

    #[test]
    fn tables_that_go_beyond_the_log_are_named_by_others() {
        let recover = |records: Vec<Recovered>, flushed| {
            let mut index = EntryIndex::new(1 << 20, flushed);
            (0..).zip(records).for_each(|(n, record)| index.recover(record, pos(n)));
            index.settle();
            index.check().map(|()| index.damage())
        };
        let entries = |count: u64| (0..count).map(|i| R::Entry(entry(1, i))).collect::<Vec<_>>();
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let check = |records, flushed, expect: Option<u64>| {
            let damage = recover(records, flushed).expect("no error");
            let missing = |from| vec![Missing { from, to: flushed, anchor: None }];
            assert_eq!(damage, expect.map(|from| Damage { missing: missing(from), ..Damage::default() }), "{flushed}");
        };
        check(entries(3), 2, None);
        check(entries(3), 3, Some(3));
        check(entries(3), 9, Some(3));
        check(vec![R::Purge(log_id(1, 6), m.clone())], 6, None);
        check(vec![R::Purge(log_id(1, 6), m)], 8, Some(7));
        // A log of nothing is another volume's.
        assert_eq!(recover(vec![], 3).expect("told by whoever asks for the state"), None);
    }

    #[test]
    fn the_state_of_another_replica_replaces_what_it_covers_and_nothing_else() {
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let damaged = || {
            let mut records: Vec<Recovered> = (0..3).map(|i| R::Entry(entry(1, i))).collect();
            records.extend([R::Hole, R::Entry(entry(1, 6)), R::Entry(entry(1, 7))]);
            replay(records)
        };
        let mut inside = damaged();
        inside.rebase(log_id(1, 4), m.clone());
        assert_eq!((span(&inside), missing(&inside)), ((5, 8), vec![(5, 5, Some(log_id(1, 6)))]));
        let mut behind = damaged();
        behind.rebase(log_id(1, 6), m.clone());
        assert_eq!((span(&behind), behind.damage()), ((7, 8), None), "entry 7 was acknowledged");
        let mut beyond = damaged();
        beyond.rebase(log_id(2, 90), m.clone());
        assert_eq!((span(&beyond), beyond.damage()), ((91, 91), None));
        let mut other = damaged();
        other.rebase(log_id(2, 6), m.clone());
        assert_eq!(
            (span(&other), other.damage()),
            ((7, 7), None),
            "entry 7 followed an entry that was never committed"
        );
        // Where the log begins is lost: what lies between the state and it is still to be had.
        let mut headless = beheaded(5, vec![R::Entry(entry(1, 900))]);
        headless.rebase(log_id(1, 890), m);
        assert_eq!((span(&headless), missing(&headless)), ((891, 901), vec![(891, 899, Some(log_id(1, 900)))]));
    }

    #[test]
    fn what_a_log_begins_behind_is_told_by_one_that_has_an_entry_of_it() {
        let members = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let entries = |range: std::ops::RangeInclusive<u64>| range.map(|i| R::Entry(entry(2, i))).collect::<Vec<_>>();
        let other = |purged: u64| {
            replay([vec![R::Purge(log_id(1, purged), members.clone())], entries(purged + 1..=12)].concat())
        };
        // The tables end before the entries, at the first of them, and among them.
        for (first, known) in [(10, 10), (9, 9), (8, 8), (6, 8)] {
            let mut ill = beheaded(8, entries(first..=11));
            let wanted = ill.base_wanted().expect("lost");
            assert_eq!(wanted, (8, log_id(2, known)), "first={first}");
            let (id, membership) = other(4).base_for(wanted.0, wanted.1).expect("it has both entries");
            assert_eq!((id, &membership), (log_id(2, 8), &members));
            ill.rebase(id, membership);
            let between = (first == 10).then_some((9, 9, Some(log_id(2, 10))));
            assert_eq!((span(&ill), missing(&ill)), ((9, 12), between.into_iter().collect()), "first={first}");
            assert_eq!(ill.state_at(8).expect("known"), (Some(log_id(2, 8)), members.clone()));
        }
        let exact = other(8).base_for(8, log_id(2, 9)).expect("the state that its log begins behind");
        assert_eq!(exact.0, log_id(1, 8));
        // It has forgotten that state, has another entry there, or has lost some itself.
        assert_eq!(other(9).base_for(8, log_id(2, 10)), None);
        assert_eq!(other(4).base_for(8, log_id(3, 10)), None);
        assert_eq!(other(4).base_for(8, log_id(2, 13)), None);
        assert_eq!(beheaded(3, entries(6..=12)).base_for(8, log_id(2, 9)), None);
        let holed = [entries(0..=5), vec![R::Hole], entries(7..=12)].concat();
        assert_eq!(replay(holed).base_for(8, log_id(2, 9)), None);
        assert_eq!(beheaded(8, vec![]).base_wanted(), None, "no entry that another could have");
    }

    #[test]
    fn nothing_was_purged_of_a_log_whose_node_has_no_tables() {
        let young = beheaded(0, vec![R::Entry(entry(1, 3)), R::Entry(entry(1, 4))]);
        assert_eq!((span(&young), missing(&young)), ((0, 5), vec![(0, 2, Some(log_id(1, 3)))]));
        assert!(!young.damage().expect("damaged").base);
        // Of a witness the first entry is missing, or what its log begins behind is not known.
        for (first, base) in [(1, false), (2, true)] {
            let mut witness = EntryIndex::tableless(1 << 20);
            let records = [R::Hole, R::Entry(entry(1, first)), R::Entry(entry(1, first + 1))];
            (0..).zip(records).for_each(|(n, record)| witness.recover(record, pos(n)));
            witness.settle();
            witness.check().expect("with a hole it is no error");
            let damage = witness.damage().expect("damaged");
            assert_eq!((damage.base, damage.missing.is_empty()), (base, base), "first={first}");
            assert_eq!(witness.base_wanted(), base.then(|| (1, log_id(1, 2))), "first={first}");
        }
    }

    #[test]
    fn a_filled_log_ends_before_what_was_never_committed() {
        let mut records: Vec<Recovered> = (0..3).map(|i| R::Entry(entry(1, i))).collect();
        records.extend([R::Hole, R::Entry(entry(1, 4))]);
        let mut index = replay(records);
        assert_eq!(index.first_decrease(), Some(3), "not known is less");
        index.repair(&entry(2, 3), pos(9));
        assert_eq!(index.first_decrease(), Some(4));
        index.truncate_after(Some(3));
        assert_eq!(index.first_decrease(), None);
    }

    /// The log is cut behind a hole, and before what was put back: an entry of the hole is the first one, and lies last.
    #[test]
    fn what_was_repaired_is_there_when_the_hole_is_cut_off() {
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let behind = || vec![R::Entry(entry(1, 12)), R::Entry(entry(1, 13))];
        let with = |records: Vec<Recovered>| {
            let mut index = replay([behind(), records].concat());
            index.check().expect("begins where it was purged");
            index
        };
        let one = with(vec![R::Repair(entry(1, 11)), R::Purge(log_id(1, 10), m.clone())]);
        assert_eq!((span(&one), one.damage(), one.pos(11)), ((11, 14), None, Some(pos(2))));
        assert_eq!(one.oldest_pos(), Some(pos(0)));
        let two = with(vec![R::Repair(entry(1, 10)), R::Repair(entry(1, 11)), R::Purge(log_id(1, 9), m.clone())]);
        assert_eq!((span(&two), two.damage(), two.log_id(10)), ((10, 14), None, Some(log_id(1, 10))));
        // It was purged later, or before.
        let later = with(vec![R::Repair(entry(1, 10)), R::Purge(log_id(1, 12), m.clone())]);
        assert_eq!((span(&later), later.damage()), ((13, 14), None));
        let before = [vec![R::Purge(log_id(1, 11), m.clone())], behind(), vec![R::Repair(entry(1, 10))]].concat();
        assert_eq!(span(&replay(before)), (12, 14));
        // One of two is lost as well: it is asked for.
        let half = with(vec![R::Repair(entry(1, 10)), R::Purge(log_id(1, 9), m)]);
        assert_eq!(missing(&half), [(11, 11, Some(log_id(1, 12)))]);
    }

    /// Which tables there are was in the hole, and the log has been cut up to them.
    #[test]
    fn a_log_that_begins_behind_the_tables_is_damaged_at_its_base() {
        let m = StoredMembership::new(Some(log_id(1, 0)), Membership::default());
        let records = || vec![R::Hole, R::Purge(log_id(1, 6), m.clone()), R::Entry(entry(1, 7))];
        for (flushed, lost) in [(0, true), (5, true), (6, false)] {
            let mut index = EntryIndex::new(1 << 20, flushed);
            (0..).zip(records()).for_each(|(n, record)| index.recover(record, pos(n)));
            index.settle();
            index.check().expect("with a hole it is no error");
            assert_eq!(index.damage().is_some_and(|damage| damage.base), lost, "flushed={flushed}");
        }
    }

    #[test]
    fn repaired_entries_stand_in_their_places() {
        let mut records: Vec<Recovered> = (0..3).map(|i| R::Entry(entry(1, i))).collect();
        records.extend([R::Hole, R::Entry(entry(3, 6)), R::Entry(entry(3, 7))]);
        let mut index = replay(records);
        assert_eq!(missing(&index), [(1, 5, Some(log_id(3, 6)))]);
        index.purge(log_id(1, 0), StoredMembership::default());
        assert_eq!(index.oldest_pos(), Some(pos(4)), "entry 6: nothing before it is here");
        for (n, i) in (1..=5).enumerate() {
            assert!(index.damage().is_some());
            index.repair(&entry(if i < 4 { 1 } else { 2 }, i), pos(100 + n as u64));
        }
        assert_eq!(index.damage(), None);
        let terms: Vec<u64> = (1..8).map(|i| term_of(&index.log_id(i).expect("known"))).collect();
        assert_eq!(terms, [1, 1, 1, 2, 2, 3, 3]);
        assert_eq!(index.pos(4), Some(pos(103)));
        // The oldest record that is needed is not that of the first entry.
        assert_eq!(index.pos(index.first()), Some(pos(100)));
        assert_eq!(index.oldest_pos(), Some(pos(4)), "entry 6, behind the hole");
        // Another entry than the one that is there is not taken for it.
        index.repair(&entry(9, 7), pos(200));
        assert_eq!((index.log_id(7), index.pos(7)), (Some(log_id(3, 7)), Some(pos(5))));
        index.purge(log_id(3, 6), StoredMembership::default());
        assert_eq!(index.oldest_pos(), Some(pos(5)));
    }
}
