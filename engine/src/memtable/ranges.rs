//! The ranges removed in one generation, with their history: each reader finds those up to its index.
//!
//! # Place
//! inside [`super::Memtable`], whose writer is the only one here; any number of readers, each under a short lock
//! # Invariants
//! R1. Fragments do not overlap. The indexes of one ascend, and nothing is taken away: as of any index they are the ranges removed up to
//!     it.
//! R2. What an insert costs, in time and in the bytes that it returns, are the fragments that its range touches. Those bytes are counted
//!     towards the rotation, so that ranges which cover one another again and again end a generation sooner and never fill the memory.
//! R3. Without a range no reader takes the lock.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use bytes::Bytes;

use crate::LogIndex;
use crate::range_tombstone::{Cover, Fragments, KeyRange, RangeTombstone, fragment, no_end};

/// What a fragment takes besides its keys and indexes.
const FRAGMENT_BYTES: u64 = 96;
/// What an index in the history of a fragment takes.
const INDEX_BYTES: u64 = 8;

/// See the module.
#[derive(Default)]
pub(super) struct Ranges {
    any: AtomicBool,
    /// By where they begin.
    fragments: RwLock<BTreeMap<Bytes, Fragment>>,
}

#[derive(Clone)]
struct Fragment {
    end: Bytes,
    /// Who removed it, the newest last.
    indexes: Vec<u64>,
}

impl Fragment {
    fn newest(&self, at: LogIndex) -> LogIndex {
        let visible = self.indexes.partition_point(|index| *index <= at.0);
        LogIndex(visible.checked_sub(1).map_or(0, |newest| self.indexes[newest]))
    }
}

impl Ranges {
    pub(super) fn any(&self) -> bool {
        // Whoever reads at an index has synchronised with the applier after the inserts up to it.
        self.any.load(Ordering::Relaxed)
    }

    /// The index is not below any that was inserted before. Returns the bytes that it took.
    pub(super) fn insert(&self, range: &KeyRange, index: LogIndex) -> u64 {
        let range = range.detached();
        let (start, end) = (range.start(), range.end_place());
        // A panic under the lock leaves fragments that do not overlap: at worst a history is short, and the entry was not applied.
        let mut fragments = self.fragments.write().unwrap_or_else(PoisonError::into_inner);
        let mut grown = split(&mut fragments, start) + split(&mut fragments, end);
        let mut gaps = Vec::new();
        let mut place = start.clone();
        for (from, fragment) in fragments.range_mut::<Bytes, _>(start..end) {
            if place < *from {
                gaps.push((place, from.clone()));
            }
            if fragment.indexes.last() != Some(&index.0) {
                fragment.indexes.push(index.0);
                grown += INDEX_BYTES;
            }
            place = fragment.end.clone();
        }
        if place < *end {
            gaps.push((place, end.clone()));
        }
        for (from, end) in gaps {
            grown += from.len() as u64 + FRAGMENT_BYTES + INDEX_BYTES;
            fragments.insert(from, Fragment { end, indexes: vec![index.0] });
        }
        self.any.store(true, Ordering::Relaxed);
        grown + range.bytes() as u64
    }

    /// What a reader at `at` finds hidden at `key`.
    pub(super) fn cover(&self, key: &[u8], at: LogIndex) -> Cover {
        let fragments = self.fragments.read().unwrap_or_else(PoisonError::into_inner);
        narrow_cover(&fragments, key, at)
    }

    /// As [`Ranges::cover`], with all neighbours for which it is the same.
    pub(super) fn wide_cover(&self, key: &[u8], at: LogIndex) -> Cover {
        let fragments = self.fragments.read().unwrap_or_else(PoisonError::into_inner);
        let mut cover = narrow_cover(&fragments, key, at);
        if cover.index == LogIndex(0) {
            return cover;
        }
        for (from, fragment) in fragments.range::<Bytes, _>(&cover.to..) {
            if *from != cover.to || fragment.newest(at) != cover.index {
                break;
            }
            cover.to = fragment.end.clone();
        }
        for (from, fragment) in fragments.range::<Bytes, _>(..&cover.from).rev() {
            if fragment.end != cover.from || fragment.newest(at) != cover.index {
                break;
            }
            cover.from = from.clone();
        }
        cover
    }

    /// All, by the newest index of each.
    pub(super) fn newest(&self) -> Fragments {
        let fragments = self.fragments.read().unwrap_or_else(PoisonError::into_inner);
        let all = fragments.iter().map(|(start, fragment)| RangeTombstone {
            range: KeyRange::from_parts(start.clone(), Some(fragment.end.clone())),
            index: fragment.newest(LogIndex(u64::MAX)),
        });
        fragment(all.collect())
    }
}

/// Makes `place` a border between fragments. Returns the bytes that it took.
fn split(fragments: &mut BTreeMap<Bytes, Fragment>, place: &Bytes) -> u64 {
    let Some((_, left)) = fragments.range_mut::<Bytes, _>(..place).next_back() else { return 0 };
    if left.end <= *place {
        return 0;
    }
    let right = left.clone();
    left.end = place.clone();
    let grown = FRAGMENT_BYTES + right.indexes.len() as u64 * INDEX_BYTES;
    fragments.insert(place.clone(), right);
    grown
}

fn narrow_cover(fragments: &BTreeMap<Bytes, Fragment>, key: &[u8], at: LogIndex) -> Cover {
    let left = fragments.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))).next_back();
    match left {
        Some((from, fragment)) if key < fragment.end.as_ref() => {
            Cover { from: from.clone(), to: fragment.end.clone(), index: fragment.newest(at) }
        }
        _ => {
            let right = fragments.range::<[u8], _>((Bound::Excluded(key), Bound::Unbounded)).next();
            Cover {
                from: left.map_or_else(Bytes::new, |(_, fragment)| fragment.end.clone()),
                to: right.map_or_else(no_end, |(from, _)| from.clone()),
                index: LogIndex(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(from: u8, to: u8) -> KeyRange {
        KeyRange::from_parts(Bytes::from(vec![from]), (to < 250).then(|| Bytes::from(vec![to])))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Against a list that is searched from its end.
        #[test]
        fn every_reader_finds_what_was_removed_up_to_its_index(
            removed in prop::collection::vec((0u8..30, 1u8..30, 0u64..3), 1..40),
        ) {
            let ranges = Ranges::default();
            let mut list: Vec<(KeyRange, u64)> = Vec::new();
            let mut index = 1;
            for (from, length, later) in removed {
                let range = range(from, if length == 29 { 255 } else { from + length });
                index += later;
                prop_assert!(ranges.insert(&range, LogIndex(index)) > 0);
                list.push((range, index));
            }
            let found = |key: &[u8], at: u64| {
                let hits = list.iter().filter(|(range, index)| range.contains(key) && *index <= at);
                LogIndex(hits.map(|(_, index)| *index).max().unwrap_or(0))
            };
            let newest = ranges.newest();
            for at in (0..=index).rev().step_by(3) {
                for key in 0u8..64 {
                    let expect = found(&[key], at);
                    let (narrow, wide) = (ranges.cover(&[key], LogIndex(at)), ranges.wide_cover(&[key], LogIndex(at)));
                    prop_assert_eq!(narrow.index, expect, "key={} at={}", key, at);
                    prop_assert_eq!(wide.index, expect);
                    prop_assert!(narrow.contains(&[key]) && wide.contains(&[key]));
                    for other in (0u8..64).filter(|other| wide.contains(&[*other])) {
                        prop_assert_eq!(found(&[other], at), expect, "as far as {:?} says", &wide);
                    }
                }
            }
            for key in 0u8..64 {
                let index = newest.at(&[key]).map_or(LogIndex(0), |one| one.index);
                prop_assert_eq!(index, found(&[key], u64::MAX));
            }
        }
    }

    #[test]
    fn one_range_over_many_is_paid_for_by_what_it_touches() {
        let ranges = Ranges::default();
        let few = ranges.insert(&range(200, 201), LogIndex(1));
        for at in 0..100 {
            ranges.insert(&range(2 * at, 2 * at + 1), LogIndex(2));
        }
        let many = ranges.insert(&range(0, 200), LogIndex(3));
        assert!(many > few * 90, "{many} against {few}");
        assert_eq!(ranges.newest().iter().count(), 2);
    }
}
