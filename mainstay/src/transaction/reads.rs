//! What a transaction has to find unchanged when it commits.
//!
//! # Invariants
//! 1. What was given to the caller is recorded before it is given, and as what the snapshot had: own writes on top of it change
//!    nothing that others could have written.
//! 2. Of a range that part is recorded which the caller has seen: up to the last key it was given, all of it once it was told the end.
//! 3. What is recorded is bounded by [`TRANSACTION_BYTES_MAX`]. A transaction that met the bound never commits.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use mainstay_engine::Condition;

use crate::batch::unchanged;
use crate::{Error, ErrorKind, KeyspaceId, LogIndex, Result};

/// What a transaction may record, in bytes of the keys and values that it writes and of the keys and bounds that it reads.
pub const TRANSACTION_BYTES_MAX: usize = 16 << 20;
/// What each of them counts besides.
const OVERHEAD_BYTES: usize = 64;

/// What was read, by what has to be the same at commit.
#[derive(Default)]
pub(super) struct Reads {
    /// The versions that were found; none of a key that was absent.
    keys: BTreeMap<(KeyspaceId, Bytes), Option<LogIndex>>,
    ranges: Vec<RangeRead>,
    /// Of all that is recorded here, and of the writes that the transaction holds.
    bytes: usize,
}

/// One scan, as far as it went.
pub(super) struct RangeRead {
    pub(super) keyspace: KeyspaceId,
    pub(super) lower: Bound<Bytes>,
    pub(super) upper: Bound<Bytes>,
    pub(super) low: Seen,
    pub(super) high: Seen,
    /// Both ends have met, or one has met the other bound.
    pub(super) finished: bool,
}

/// What one end of a scan has given.
#[derive(Default)]
pub(super) struct Seen {
    /// The last key.
    pub(super) to: Option<Bytes>,
    /// Pairs of the snapshot up to there, those included that own writes hide.
    pub(super) pairs: u64,
}

impl Reads {
    /// Makes room for `bytes` of something.
    pub(super) fn charge(&mut self, bytes: usize) -> Result<()> {
        self.bytes = self.bytes.saturating_add(bytes).saturating_add(OVERHEAD_BYTES);
        self.check()
    }

    /// Refuses what is over the bound.
    pub(super) fn check(&self) -> Result<()> {
        if self.bytes <= TRANSACTION_BYTES_MAX {
            return Ok(());
        }
        let message = format!(
            "the transaction reads and writes too much: make several of it, or read by ranges bytes={} bytes_max={TRANSACTION_BYTES_MAX}",
            self.bytes
        );
        Err(Error::new(ErrorKind::Invalid, message))
    }

    pub(super) fn add_key(&mut self, keyspace: KeyspaceId, key: Bytes, version: Option<LogIndex>) -> Result<()> {
        let bytes = key.len();
        match self.keys.insert((keyspace, key), version) {
            None => self.charge(bytes),
            Some(_) => self.check(),
        }
    }

    pub(super) fn knows(&self, place: &(KeyspaceId, Bytes)) -> bool {
        self.keys.contains_key(place)
    }

    /// Records a scan that has given nothing yet, and returns its place.
    pub(super) fn add_range(&mut self, read: RangeRead) -> Result<usize> {
        let bound = |bound: &Bound<Bytes>| match bound {
            Bound::Included(key) | Bound::Excluded(key) => key.len(),
            Bound::Unbounded => 0,
        };
        self.charge(bound(&read.lower).saturating_add(bound(&read.upper)))?;
        self.ranges.push(read);
        Ok(self.ranges.len() - 1)
    }

    /// Notes how far the scan at `place` went.
    pub(super) fn advance(&mut self, place: usize, step: impl FnOnce(&mut RangeRead)) -> Result<()> {
        let Some(read) = self.ranges.get_mut(place) else { return Ok(()) };
        let keys = |read: &RangeRead| {
            let length = |seen: &Seen| seen.to.as_ref().map_or(0, Bytes::len);
            length(&read.low).saturating_add(length(&read.high))
        };
        let before = keys(read);
        step(read);
        self.bytes = self.bytes.saturating_add(keys(read)).saturating_sub(before);
        self.check()
    }

    /// All of it as conditions on the state at commit. `since` is the index of the snapshot.
    pub(super) fn into_conditions(self, since: LogIndex) -> Vec<Condition> {
        let keys = self.keys.into_iter().map(|((keyspace, key), version)| unchanged(keyspace, key, version));
        keys.chain(self.ranges.into_iter().flat_map(|read| read.into_conditions(since))).collect()
    }
}

impl RangeRead {
    fn into_conditions(self, since: LogIndex) -> Vec<Condition> {
        let Self { keyspace, lower, upper, low, high, finished } = self;
        if finished {
            let count = low.pairs.saturating_add(high.pairs);
            return vec![Condition::Range { keyspace, lower, upper, since, count }];
        }
        let from_below = low.to.map(|to| (lower, Bound::Included(to), low.pairs));
        let from_above = high.to.map(|to| (Bound::Included(to), upper, high.pairs));
        let parts = from_below.into_iter().chain(from_above);
        parts.map(|(lower, upper, count)| Condition::Range { keyspace, lower, upper, since, count }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(low: Option<(&str, u64)>, high: Option<(&str, u64)>, finished: bool) -> Vec<Condition> {
        let seen = |seen: Option<(&str, u64)>| match seen {
            Some((to, pairs)) => Seen { to: Some(Bytes::copy_from_slice(to.as_bytes())), pairs },
            None => Seen::default(),
        };
        let (lower, upper) = (Bound::Included("a".into()), Bound::Excluded("z".into()));
        let read = RangeRead { keyspace: KeyspaceId(1), lower, upper, low: seen(low), high: seen(high), finished };
        read.into_conditions(LogIndex(9))
    }

    #[test]
    fn of_a_range_that_part_is_compared_which_was_seen() {
        let expect = |lower, upper, count| {
            let (lower, upper): (Bound<Bytes>, Bound<Bytes>) = (lower, upper);
            Condition::Range { keyspace: KeyspaceId(1), lower, upper, since: LogIndex(9), count }
        };
        let (a, z) = (Bound::Included("a".into()), Bound::Excluded("z".into()));
        let to = |key: &'static str| Bound::Included(Bytes::from(key));
        assert_eq!(range(None, None, false), [], "nothing was asked for");
        assert_eq!(range(None, None, true), [expect(a.clone(), z.clone(), 0)], "it was empty");
        assert_eq!(range(Some(("c", 2)), None, false), [expect(a.clone(), to("c"), 2)]);
        assert_eq!(range(None, Some(("x", 1)), false), [expect(to("x"), z.clone(), 1)]);
        let both = [expect(a.clone(), to("c"), 2), expect(to("x"), z.clone(), 1)];
        assert_eq!(range(Some(("c", 2)), Some(("x", 1)), false), both);
        assert_eq!(range(Some(("c", 2)), Some(("x", 1)), true), [expect(a, z, 3)]);
    }

    #[test]
    fn what_is_recorded_is_bounded() {
        let mut reads = Reads::default();
        let refused = (0..TRANSACTION_BYTES_MAX / OVERHEAD_BYTES)
            .find_map(|n| reads.add_key(KeyspaceId(0), Bytes::copy_from_slice(&n.to_be_bytes()), None).err());
        assert_eq!(refused.map(|error| error.kind()), Some(ErrorKind::Invalid));
        assert!(reads.check().is_err(), "and stays refused");
    }
}
