//! Tiered compaction of one version: runs are merged whole, the newest first, and only when there would be too many.
//!
//! Each run of L0 is a sorted run, and so is each level that holds anything, which here is a place for a run and no more: no level has a size
//! that it should have. A merge takes all of L0 and from the first level that is not empty on as many as it must, so that fewer than the
//! allowed are left, and beyond those every next one that is no larger than all that is taken already: merging the like with the like, a
//! byte is written about once each time that what it is merged with doubles. Where it takes no level the output gets the place above the first.
//!
//! When what stands above the last run has grown to twice its size, two thirds of the device may be superseded: then all of it is merged.
//!
//! # Invariants
//! 1. A merge takes whole runs that follow each other in age, so its output is newer than all below it and older than all above.
//! 2. Levels are merged only while nothing else is outstanding in the version: what another job gives to a level may stand between keys that
//!    this one takes. All of L0 may go to the free place above the first level at any time, since every other job gives to that level or
//!    below: nothing is above it to be taken from.
//!
//! # Why not
//! levels of several runs each: a version, its encoding and every reader of it would have a second shape.
//! Parts of runs: what a part of a run was merged into is neither one run nor two, and soon all of it is leveled.

use std::collections::BTreeSet;

use super::picker::{Dead, Inputs, LAST, is_cleaned, is_dense};
use super::version::{TableRef, Version, bytes_of, overlap, sorted};
use crate::TableId;

/// What is above the last run may have so many times its bytes.
const ABOVE_LAST_MAX: u64 = 2;

/// Sorted runs of a version.
pub(super) fn runs_of(version: &Version) -> usize {
    version.l0.len() + levels(version).count()
}

/// The levels that hold a run.
fn levels(version: &Version) -> impl Iterator<Item = u8> {
    (1..=LAST).filter(|&level| !version.level(level).is_empty())
}

/// The level to take from and what a merge reads, if one is due. `busy` are the inputs of the `outstanding` jobs.
pub(super) fn pick(
    version: &Version,
    runs: u8,
    busy: &BTreeSet<TableId>,
    outstanding: usize,
    dead: Dead,
) -> Option<(u8, Inputs)> {
    let runs = usize::from(runs);
    let l0_is_free = !version.l0.iter().flat_map(|run| run.iter()).any(|t| busy.contains(&t.id));
    if outstanding > 0 {
        // Flushes go on beside a long merge.
        let above = levels(version).next().unwrap_or(LAST + 1) - 1;
        let is_due = l0_is_free && above > 0 && version.l0.len() >= runs.div_ceil(2).max(2);
        return is_due.then(|| taken(version, &[], above, dead));
    }
    if runs_of(version) >= runs {
        return Some(merged(version, runs, dead));
    }
    dense(version, dead)
}

/// The newest runs, as many as must be merged and as are alike.
fn merged(version: &Version, runs: usize, dead: Dead) -> (u8, Inputs) {
    let held: Vec<u8> = levels(version).collect();
    let size = |level: &u8| bytes_of(version.level(*level).iter());
    let mut bytes = bytes_of(version.l0.iter().flat_map(|run| run.iter()));
    let all = held.iter().fold(bytes, |sum, level| sum.saturating_add(size(level)));
    let last = held.last().map_or(0, size);
    let too_much_above = held.len() > 1 && all.saturating_sub(last) >= last.saturating_mul(ABOVE_LAST_MAX);
    // One of the output is left with those that are not taken.
    let needed = (runs_of(version) + 2).saturating_sub(runs);
    let mut levels = Vec::new();
    for (count, &level) in (version.l0.len()..).zip(&held) {
        let is_next_to_none = levels.is_empty() && level == 1;
        if !(too_much_above || count < needed || is_next_to_none || size(&level) <= bytes) {
            break;
        }
        bytes = bytes.saturating_add(size(&level));
        levels.push(level);
    }
    let first = held.first().copied().unwrap_or(LAST + 1);
    let to = levels.last().copied().unwrap_or(first - 1);
    taken(version, &levels, to, dead)
}

/// All of L0 and of these levels, on their way to `to`.
fn taken(version: &Version, levels: &[u8], to: u8, dead: Dead) -> (u8, Inputs) {
    let mut upper: Vec<TableRef> = version.l0.iter().flat_map(|run| run.iter()).cloned().collect();
    let from = if upper.is_empty() { levels.first().copied().unwrap_or(to) } else { 0 };
    for &level in levels.iter().filter(|&&level| level < to) {
        upper.extend(version.level(level).iter().cloned());
    }
    upper.sort_by(|a, b| (&a.first, a.id).cmp(&(&b.first, b.id)));
    let lower = version.level(to);
    // Where no two overlap nothing is to be merged: the tables change their places.
    let is_apart = sorted(&upper) && upper.iter().all(|t| overlap(lower, &t.first, &t.last).is_empty());
    let lower = if is_apart && !is_cleaned(version, to, &upper, dead) { Vec::new() } else { lower.to_vec() };
    (from, (to, upper, lower))
}

/// The newest run in which much is dead, with the one below it. Tables of the last level are written again one by one.
fn dense(version: &Version, dead: Dead) -> Option<(u8, Inputs)> {
    let held: Vec<u8> = levels(version).collect();
    let l0: Vec<TableRef> = version.l0.iter().flat_map(|run| run.iter()).cloned().collect();
    if !l0.is_empty() {
        let below = held.first().copied().unwrap_or(LAST);
        if is_dense(&l0, version.level(below), dead) {
            return Some(taken(version, &[below], below, dead));
        }
    }
    for (at, &level) in held.iter().enumerate() {
        let upper = version.level(level);
        if level == LAST {
            let table = upper.iter().find(|t| is_dense(std::slice::from_ref(*t), &[], dead))?;
            return Some((LAST, (LAST, vec![table.clone()], Vec::new())));
        }
        let to = held.get(at + 1).copied().unwrap_or(LAST);
        let lower = version.level(to);
        if is_dense(upper, lower, dead) {
            return Some((level, (to, upper.to_vec(), lower.to_vec())));
        }
    }
    None
}
