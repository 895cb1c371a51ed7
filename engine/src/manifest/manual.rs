//! Compactions that were asked for: how each goes down through the levels, a pure function of the manifest like the picker.
//!
//! Level by level from above, and within a level in the order of keys: one step takes one table, or all of L0, and merges it into the level
//! below. What stands in the last level has no versions above each other; a table there is written again only where it holds
//! tombstones, or pairs that may have ended.
//!
//! # Invariants
//! 1. Above its level, and in its level before its cursor, nothing in its range is older than the entry that asked for it: what a
//!    compaction of the picker brings down to there is newer.
//! 2. Cursor and level only grow, whatever is written meanwhile, so it ends.
//! 3. It has one job at a time, and the picker goes before it where L0 is due: writers do not wait for it.

#![deny(clippy::indexing_slicing)]

use std::collections::BTreeSet;

use bytes::Bytes;

use super::picker::{Dead, Inputs, LAST, pick_l0};
use super::version::{TableRef, Version, overlap};
use crate::{BranchId, JobId, KeyspaceId, TableId};

/// Compactions of a group that were asked for and have not ended.
pub(crate) const MANUALS_MAX: usize = 64;

/// Whoever asks wants all that is dead to go, however little it is: see [`DEAD_SHARE`](super::picker::DEAD_SHARE).
pub(super) const SHARE: u64 = u64::MAX;

/// What remains of a compaction that was asked for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Manual {
    pub(crate) branch: BranchId,
    pub(crate) keyspace: KeyspaceId,
    /// Keys from here.
    pub(crate) first: Bytes,
    /// And before here; none for all behind `first`.
    pub(crate) end: Option<Bytes>,
    /// Tables of L0 that earlier jobs made are older than the entry.
    pub(crate) before: JobId,
    /// Where it has come to; 0 is L0.
    pub(crate) level: u8,
    /// See invariant 1. In L0 it means nothing.
    pub(crate) cursor: Bytes,
    /// Its job, while that is outstanding.
    pub(crate) job: Option<JobId>,
}

/// The next step of a compaction that was asked for.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// Jobs that are outstanding have to end first.
    Wait,
    /// These tables go down a level; in the last one they are written again.
    Take { from: u8, inputs: Inputs },
    /// Nothing is left.
    Done,
}

impl Manual {
    /// True for a table that has keys of the range.
    fn covers(&self, table: &TableRef) -> bool {
        table.last >= self.first && self.is_before_end(table)
    }

    fn is_before_end(&self, table: &TableRef) -> bool {
        self.end.as_ref().is_none_or(|end| table.first < *end)
    }

    /// Goes down over what holds nothing to take, and says what is next. `base` is the base level, `unflushed` whether
    /// generations older than the entry are still in memory, `expiring` whether a table of the last level may hold pairs that have ended.
    pub(crate) fn next(
        &mut self,
        version: &Version,
        base: u8,
        busy: &BTreeSet<TableId>,
        unflushed: bool,
        expiring: bool,
        dead: Dead,
    ) -> Next {
        if unflushed || self.job.is_some() {
            return Next::Wait;
        }
        if self.level == 0 {
            let mut tables = version.l0.iter().flat_map(|run| run.iter());
            if tables.any(|t| t.id.job < self.before && self.covers(t)) {
                let inputs = pick_l0(version, base, busy, dead);
                return inputs.map_or(Next::Wait, |inputs| Next::Take { from: 0, inputs });
            }
            self.descend();
        }
        loop {
            let level = self.level;
            let tables = version.level(level);
            let rest = tables.get(tables.partition_point(|t| t.last < self.cursor)..).unwrap_or_default();
            let due = |t: &&TableRef| level < LAST || t.tombstones > 0 || (expiring && t.id.job < self.before);
            match rest.iter().take_while(|t| self.is_before_end(t)).find(due) {
                Some(table) => {
                    let lower = match level {
                        LAST => &[],
                        _ => overlap(version.level(level + 1), &table.first, &table.last),
                    };
                    if busy.contains(&table.id) || lower.iter().any(|t| busy.contains(&t.id)) {
                        return Next::Wait;
                    }
                    let inputs = ((level + 1).min(LAST), vec![table.clone()], lower.to_vec());
                    return Next::Take { from: level, inputs };
                }
                None if level == LAST => return Next::Done,
                None => self.descend(),
            }
        }
    }

    /// The step that [`Manual::next`] named is taken, by a job unless the tables only moved.
    pub(crate) fn took(&mut self, upper: &[TableRef], job: Option<JobId>) {
        self.job = job;
        // What is left of L0 shows itself.
        if let ([table], 1..) = (upper, self.level) {
            self.cursor = [&table.last[..], &[0]].concat().into();
        }
    }

    fn descend(&mut self) {
        self.level += 1;
        self.cursor = self.first.clone();
    }
}
