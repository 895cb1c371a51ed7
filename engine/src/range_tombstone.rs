//! Ranges of keys that were removed at once: what one is, and how many that overlap become few that do not.
//!
//! # Place
//! below `memtable`, `table`, `read` and `manifest`, which keep and look up what this module makes
//! # Invariants
//! 1. A [`KeyRange`] ends behind where it begins, once it was checked. One without an end has [`no_end`] as its end, which is above every
//!    key: bounds are compared as bytes, and no place has to know of ranges without an end.
//! 2. A tombstone of an entry hides every version of the keys in it that an earlier entry wrote, and none of its own entry: what comes
//!    before it in the same entry is left out when the entry is applied ([`fold`]).
//! 3. [`fragment`] gives tombstones in order, without overlap, each with the newest index there is at its keys. They hide what the given
//!    ones hide together, whatever the order they are given in.
//! # Why not
//! A tombstone for each key: the entry, the memtable and every table would grow with the keys that it removes.
//! # Sources
//! The fragmented range tombstones of RocksDB and Pebble; here a table keeps one version of a key, so a fragment has one index.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::borrow::Cow;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Bound;

use bytes::Bytes;

use crate::command::{KEY_BYTES_MAX, WriteOp};
use crate::{Error, ErrorKind, KeyspaceId, LogIndex, Result};

/// Longest bound of a range: the place right behind the longest key.
pub(crate) const BOUND_BYTES_MAX: usize = KEY_BYTES_MAX + 1;

static NO_END: [u8; BOUND_BYTES_MAX] = [0xff; BOUND_BYTES_MAX];

/// The end of a range without one.
pub(crate) fn no_end() -> Bytes {
    Bytes::from_static(&NO_END)
}

/// The largest key there can be.
pub(crate) fn last_key() -> Bytes {
    no_end().slice(..KEY_BYTES_MAX)
}

/// The first place behind a key.
pub(crate) fn behind(key: &[u8]) -> Bytes {
    let mut place = Vec::with_capacity(key.len().saturating_add(1));
    place.extend_from_slice(key);
    place.push(0);
    place.into()
}

/// The same place in the form that all of the longest length have: what is between a key of that length and its successor holds no key.
fn place(bound: Bytes) -> Bytes {
    match bound.split_last() {
        Some((&last, key)) if bound.len() == BOUND_BYTES_MAX && last != 0 && bound != NO_END[..] => behind(key),
        _ => bound,
    }
}

/// The last key before an end, or the end itself where no key of bearable length is right before it: then one more key counts as inside.
/// A key in any case, however long the end is.
pub(crate) fn last_before(end: &Bytes) -> Bytes {
    if *end == NO_END[..] {
        return last_key();
    }
    match end.split_last() {
        Some((0, key)) if !key.is_empty() => end.slice(..key.len()),
        _ => end.clone(),
    }
}

/// The keys from one up to another, which is not among them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyRange {
    start: Bytes,
    end: Bytes,
}

impl KeyRange {
    /// The keys within the bounds. They may hold none: who writes such a range is refused.
    pub fn new(lower: Bound<Bytes>, upper: Bound<Bytes>) -> Self {
        let start = match lower {
            Bound::Included(key) if !key.is_empty() => key,
            Bound::Excluded(key) if !key.is_empty() => behind(&key),
            // No key is empty.
            _ => Bytes::from_static(&[0]),
        };
        let end = match upper {
            Bound::Included(key) => Some(behind(&key)),
            Bound::Excluded(key) => Some(key),
            Bound::Unbounded => None,
        };
        Self::from_parts(start, end)
    }

    /// From `start` up to `end`; none for no end.
    pub(crate) fn from_parts(start: Bytes, end: Option<Bytes>) -> Self {
        Self { start: place(start), end: end.map_or_else(no_end, place) }
    }

    /// The first place in it.
    pub fn start(&self) -> &Bytes {
        &self.start
    }

    /// The first place behind it; none when it reaches over all keys from its start on.
    pub fn end(&self) -> Option<&Bytes> {
        (self.end != NO_END[..]).then_some(&self.end)
    }

    /// The end, [`no_end`] for none.
    pub(crate) fn end_place(&self) -> &Bytes {
        &self.end
    }

    /// True for the keys in it.
    pub fn contains(&self, key: &[u8]) -> bool {
        self.start.as_ref() <= key && key < self.end.as_ref()
    }

    /// What it holds as bounds.
    pub fn bounds(&self) -> (Bound<Bytes>, Bound<Bytes>) {
        let upper = self.end().map_or(Bound::Unbounded, |end| Bound::Excluded(end.clone()));
        (Bound::Included(self.start.clone()), upper)
    }

    /// Bytes of its bounds.
    pub fn bytes(&self) -> usize {
        self.start.len().saturating_add(self.end().map_or(0, Bytes::len))
    }

    /// Refuses bounds that hold no key, and those that are longer than any key makes them.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check(&self) -> Result<()> {
        let longest = self.start.len().max(self.end.len());
        if longest > BOUND_BYTES_MAX {
            let message = format!("a bound of a range is too long length={longest} length_max={BOUND_BYTES_MAX}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if self.start.is_empty() || self.start >= self.end {
            return Err(Error::new(ErrorKind::Invalid, "a range to be removed ends before it begins, or holds no key"));
        }
        Ok(())
    }

    /// The same in memory of its own.
    pub(crate) fn detached(&self) -> Self {
        let end = if self.end().is_some() { Bytes::copy_from_slice(&self.end) } else { no_end() };
        Self { start: Bytes::copy_from_slice(&self.start), end }
    }
}

impl std::fmt::Debug for KeyRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = self.end().map_or_else(String::new, |end| end.escape_ascii().to_string());
        write!(f, "[{}, {end})", self.start.escape_ascii())
    }
}

/// A range that an entry removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RangeTombstone {
    pub(crate) range: KeyRange,
    /// The entry.
    pub(crate) index: LogIndex,
}

/// What is known of the keys from `from` up to `to`: versions below `index` are hidden.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cover {
    pub(crate) from: Bytes,
    pub(crate) to: Bytes,
    /// 0: nothing is hidden.
    pub(crate) index: LogIndex,
}

impl Cover {
    pub(crate) fn contains(&self, key: &[u8]) -> bool {
        self.from.as_ref() <= key && key < self.to.as_ref()
    }
}

/// Tombstones in order, without overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fragments(Vec<RangeTombstone>);

impl Fragments {
    /// `list` is in order and without overlap, or this answers what it is not.
    pub(crate) fn new(list: Vec<RangeTombstone>) -> Option<Self> {
        let inside = list.iter().all(|one| one.range.check().is_ok());
        let apart = list.iter().zip(list.iter().skip(1)).all(|(a, b)| a.range.end <= b.range.start);
        (inside && apart).then_some(Self(list))
    }

    /// No tombstone.
    pub(crate) const fn none() -> Self {
        Self(Vec::new())
    }

    /// Bytes that it holds.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let each = |one: &RangeTombstone| (one.range.bytes() as u64).saturating_add(size_of::<RangeTombstone>() as u64);
        self.0.iter().map(each).fold(0, u64::saturating_add)
    }

    /// True when every key of the range is hidden.
    pub(crate) fn hide(&self, range: &KeyRange) -> bool {
        let mut place = &range.start;
        let from = self.0.partition_point(|one| one.range.end <= range.start);
        for one in self.0.iter().skip(from) {
            if *place >= range.end || one.range.start > *place {
                break;
            }
            place = &one.range.end;
        }
        *place >= range.end
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, RangeTombstone> {
        self.0.iter()
    }

    pub(crate) fn into_list(self) -> Vec<RangeTombstone> {
        self.0
    }

    /// The tombstone at a key.
    pub(crate) fn at(&self, key: &[u8]) -> Option<&RangeTombstone> {
        let before = self.0.partition_point(|one| one.range.start.as_ref() <= key);
        self.0.get(before.checked_sub(1)?).filter(|one| one.range.contains(key))
    }

    /// What a reader at `at` finds hidden at a key, and how far that reaches.
    pub(crate) fn cover(&self, key: &[u8], at: LogIndex) -> Cover {
        let before = self.0.partition_point(|one| one.range.start.as_ref() <= key);
        let left = before.checked_sub(1).and_then(|left| self.0.get(left));
        match left {
            Some(one) if one.range.contains(key) => {
                let index = if one.index <= at { one.index } else { LogIndex(0) };
                Cover { from: one.range.start.clone(), to: one.range.end.clone(), index }
            }
            _ => Cover {
                from: left.map_or_else(Bytes::new, |one| one.range.end.clone()),
                to: self.0.get(before).map_or_else(no_end, |one| one.range.start.clone()),
                index: LogIndex(0),
            },
        }
    }
}

/// Makes tombstones that overlap into ones that do not (invariant 3). Neighbours of one index are joined.
pub(crate) fn fragment(mut list: Vec<RangeTombstone>) -> Fragments {
    list.sort_by(|a, b| a.range.cmp(&b.range));
    let mut out: Vec<RangeTombstone> = Vec::with_capacity(list.len());
    let mut give = |start: &Bytes, end: &Bytes, index: LogIndex| {
        if start >= end {
            return;
        }
        match out.last_mut() {
            Some(last) if last.range.end == start && last.index == index => last.range.end = end.clone(),
            _ => out.push(RangeTombstone { range: KeyRange { start: start.clone(), end: end.clone() }, index }),
        }
    };
    // Those that began, the newest first. One that has ended stays until it is met at the top.
    let mut begun: BinaryHeap<(LogIndex, Bytes)> = BinaryHeap::new();
    let mut place = Bytes::new();
    for one in list {
        while let Some((index, end)) = begun.peek() {
            let to = end.min(&one.range.start);
            if place < *to {
                give(&place, to, *index);
                place = to.clone();
            }
            if *end > one.range.start {
                break;
            }
            begun.pop();
        }
        place = one.range.start.clone();
        begun.push((one.index, one.range.end));
    }
    while let Some((index, end)) = begun.pop() {
        if place < end {
            give(&place, &end, index);
            place = end;
        }
    }
    Fragments(out)
}

/// Ranges as a set of keys: they are joined where they touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Where each ends, by where it begins.
    ends: BTreeMap<Bytes, Bytes>,
}

impl RangeSet {
    /// Adds the keys of a range.
    pub fn add(&mut self, range: &KeyRange) {
        let (mut start, mut end) = (range.start.clone(), range.end.clone());
        // Those that begin inside or where it ends, and the one that reaches its start.
        while let Some((from, to)) = self.ends.range::<Bytes, _>(..=&end).next_back() {
            if *to < start {
                break;
            }
            start = start.min(from.clone());
            end = end.max(to.clone());
            let from = from.clone();
            self.ends.remove(&from);
        }
        self.ends.insert(start, end);
    }

    /// The range that holds a key.
    pub fn at(&self, key: &[u8]) -> Option<KeyRange> {
        let (start, end) = self.ends.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))).next_back()?;
        (key < end.as_ref()).then(|| KeyRange { start: start.clone(), end: end.clone() })
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = KeyRange> + '_ {
        self.ends.iter().map(|(start, end)| KeyRange { start: start.clone(), end: end.clone() })
    }
}

/// The mutations that are left of those of one entry on one branch when each range has taken what was written to its keys before it
/// (invariant 2): first the ranges, then the others in their order. Without a range they are as they were.
pub(crate) fn fold(ops: &[WriteOp]) -> Cow<'_, [WriteOp]> {
    if !ops.iter().any(|op| matches!(op, WriteOp::DeleteRange { .. })) {
        return Cow::Borrowed(ops);
    }
    let mut removed: BTreeMap<KeyspaceId, RangeSet> = BTreeMap::new();
    let mut kept = Vec::new();
    for op in ops.iter().rev() {
        match op {
            WriteOp::DeleteRange { keyspace, range } => removed.entry(*keyspace).or_default().add(range),
            WriteOp::Put { keyspace, key, .. }
            | WriteOp::PutFor { keyspace, key, .. }
            | WriteOp::Delete { keyspace, key }
            | WriteOp::Merge { keyspace, key, .. } => {
                if removed.get(keyspace).is_none_or(|ranges| ranges.at(key).is_none()) {
                    kept.push(op.clone());
                }
            }
        }
    }
    let ranges = removed
        .iter()
        .flat_map(|(&keyspace, ranges)| ranges.iter().map(move |range| WriteOp::DeleteRange { keyspace, range }));
    Cow::Owned(ranges.chain(kept.into_iter().rev()).collect())
}

#[cfg(test)]
#[allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::disallowed_methods,
    reason = "tests; proptest spawns its own"
)]
mod tests;
