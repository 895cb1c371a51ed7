//! A set of block numbers kept as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// Half-open ranges that neither touch nor overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    by_start: BTreeMap<u64, u64>,
    total: u64,
}

impl Ranges {
    /// Numbers in the set.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Numbers of `range` that are in the set.
    pub(crate) fn covered(&self, range: Range<u64>) -> u64 {
        self.overlaps(&range).map(|(start, end)| end.min(range.end) - start.max(range.start)).sum()
    }

    /// Adds all of `range`.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        let touching: Vec<_> = self.overlaps(&(start.saturating_sub(1)..end.saturating_add(1))).collect();
        for (s, e) in touching {
            self.take(s, e);
            start = start.min(s);
            end = end.max(e);
        }
        self.put(start, end);
    }

    /// Takes all of `range` out.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        let overlaps: Vec<_> = self.overlaps(&range).collect();
        for (s, e) in overlaps {
            self.take(s, e);
            self.put(s, range.start.max(s));
            self.put(range.end.min(e), e);
        }
    }

    fn overlaps(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (start, end) = (range.start, range.end);
        let first = self.by_start.range(..=start).next_back().map_or(start, |(s, _)| *s);
        let found: Vec<_> = if start < end {
            self.by_start.range(first..end).filter(|(_, e)| **e > start).map(|(s, e)| (*s, *e)).collect()
        } else {
            Vec::new()
        };
        found.into_iter()
    }

    fn put(&mut self, start: u64, end: u64) {
        if start < end {
            self.by_start.insert(start, end);
            self.total += end - start;
        }
    }

    fn take(&mut self, start: u64, end: u64) {
        self.by_start.remove(&start);
        self.total -= end - start;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::sim::SimRandom;

    #[test]
    fn behaves_as_a_set_of_numbers() {
        let random = SimRandom::new(3);
        let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
        for step in 0..2000 {
            let start = random.below(40);
            let range = start..start + random.below(10);
            if random.below(2) == 0 {
                ranges.insert(range.clone());
                model.extend(range.clone());
            } else {
                ranges.remove(range.clone());
                model.retain(|n| !range.contains(n));
            }
            let (from, to) = (random.below(40), random.below(50));
            let covered = model.iter().filter(|n| (from..to).contains(n)).count() as u64;
            assert_eq!(ranges.covered(from..to.max(from)), covered, "step={step}");
            assert_eq!(ranges.total(), model.len() as u64, "step={step}");
            let ends: Vec<_> = ranges.by_start.iter().collect();
            assert!(ends.windows(2).all(|w| w[0].1 < w[1].0), "ranges must not touch: {ends:?}");
        }
    }
}
