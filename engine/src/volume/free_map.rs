//! The free units of the extents zone, as runs. Pure.

use std::collections::BTreeMap;

use super::extent::{EXTENT_UNIT_BYTES, Extent};

/// Free runs, by first unit; neighbours are always joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FreeMap {
    runs: BTreeMap<u32, u32>,
    free_units: u64,
}

impl FreeMap {
    /// All `units` free.
    pub(crate) fn new(units: u32) -> Self {
        let mut map = Self::default();
        if units > 0 {
            map.runs.insert(0, units);
            map.free_units = u64::from(units);
        }
        map
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        self.free_units * EXTENT_UNIT_BYTES
    }

    /// Takes the very units of `extent`; false, and nothing is taken, unless all of them are free.
    pub(crate) fn take_exact(&mut self, extent: Extent) -> bool {
        let Some(end) = extent.first_unit.checked_add(extent.units) else { return false };
        let Some((&first, &units)) = self.runs.range(..=extent.first_unit).next_back() else { return false };
        let run_end = first + units;
        if extent.units == 0 || end > run_end {
            return false;
        }
        self.runs.remove(&first);
        if first < extent.first_unit {
            self.runs.insert(first, extent.first_unit - first);
        }
        if end < run_end {
            self.runs.insert(end, run_end - end);
        }
        self.free_units -= u64::from(extent.units);
        true
    }

    /// Takes `units`: the first run that holds them all, else the lowest runs. None, and nothing is taken, when there are
    /// not as many, or when they lie in more than `extents_max` runs.
    pub(crate) fn take(&mut self, units: u32, extents_max: usize) -> Option<Vec<Extent>> {
        if units == 0 {
            return Some(Vec::new());
        }
        let whole = self.runs.iter().find(|&(_, &run)| run >= units);
        let chosen: Vec<Extent> = match whole {
            Some((&first_unit, _)) => vec![Extent { first_unit, units }],
            None => {
                // The longest runs first, so that few extents are made; then in the order of the zone.
                let mut runs: Vec<Extent> =
                    self.runs.iter().map(|(&first_unit, &units)| Extent { first_unit, units }).collect();
                runs.sort_by_key(|run| (std::cmp::Reverse(run.units), run.first_unit));
                let mut rest = units;
                let mut chosen = Vec::new();
                for run in runs.into_iter().take(extents_max) {
                    let units = run.units.min(rest);
                    chosen.push(Extent { first_unit: run.first_unit, units });
                    rest -= units;
                    if rest == 0 {
                        break;
                    }
                }
                if rest > 0 {
                    return None;
                }
                chosen.sort();
                chosen
            }
        };
        for &extent in &chosen {
            assert!(self.take_exact(extent), "a run of the free map was not free {extent:?}");
        }
        Some(chosen)
    }

    /// Gives units back. They were taken: giving back what is free is a mistake of ours.
    pub(crate) fn put(&mut self, extent: Extent) {
        let (mut first, mut units) = (extent.first_unit, extent.units);
        if units == 0 {
            return;
        }
        let end = first + units;
        if let Some((&next, &next_units)) = self.runs.range(first..).next() {
            assert!(next >= end, "units freed twice {extent:?}");
            if next == end {
                self.runs.remove(&next);
                units += next_units;
            }
        }
        if let Some((&before, &before_units)) = self.runs.range(..first).next_back() {
            assert!(before + before_units <= first, "units freed twice {extent:?}");
            if before + before_units == first {
                first = before;
                units += before_units;
            }
        }
        self.runs.insert(first, units);
        self.free_units += u64::from(extent.units);
    }

    /// The runs, in the order of the zone.
    #[cfg(test)]
    pub(crate) fn runs(&self) -> Vec<Extent> {
        self.runs.iter().map(|(&first_unit, &units)| Extent { first_unit, units }).collect()
    }
}
