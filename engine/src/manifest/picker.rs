//! Decides which compaction of one version starts next: a pure function, the same on every replica.
//!
//! Leveled, with a base level that moves: while the data is small L0 goes straight to the last level, and each time the
//! level below the base holds [`LEVEL_RATIO`] times `base_level_bytes` a level is put above it. So nine tenths of the data
//! stand in the last level at any size, and dead versions are few.
//!
//! A keyspace may be tiered in place of that: see `tiered`.
//!
//! Where no level is over its target, tables go down whose tombstones, and pairs that have ended, are a quarter of what would be read: then
//! space comes back although nothing more is written, and a tombstone never costs more than four entries a level.
//!
//! # Invariants
//! 1. Levels above the base level are empty: what L0 gives to the base level is newer than all below it.
//! 2. Inputs of outstanding compactions are disjoint, and so are the key ranges of their outputs in one level.
//! 3. One compaction at a time takes from L0, and it takes all runs, so no older run stays behind above its output.
//! 4. A tombstone is dropped only where no deeper level overlaps the inputs. Jobs that run at the same time cannot put older
//!    data below: what they give to a deeper level lies within keys that overlapped there already.
//! 5. Who has range tombstones over all keys of a table is newer than the table: it lies above, and no job puts its tombstones anywhere but
//!    above or into what it overlaps. So such a table holds nothing that anybody reads, and is dropped unread.

#![deny(clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::version::{LEVELS, TableRef, Tables, Version, bytes_of, overlap, sorted};
use super::{ManifestSettings, tiered};
use crate::range_tombstone::{RangeSet, last_before};
use crate::{BranchId, CompactionStyle, KeyspaceId, TableId};

/// Bytes of a level over bytes of the level above it.
pub(crate) const LEVEL_RATIO: u64 = 10;
/// Tombstones are due to go where they are at least one of so many entries of the inputs, and pairs that have ended count as such.
pub(crate) const DEAD_SHARE: u64 = 4;

/// Which tables have so many dead entries that they are due to go down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dead {
    /// Where one of so many entries of the inputs is dead.
    pub(crate) share: u64,
    /// Pairs that ended by then are; 0 where none ends.
    pub(crate) time_ms: u64,
}
/// What decides beside the tables of a version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules<'a> {
    pub(crate) settings: &'a ManifestSettings,
    pub(crate) style: CompactionStyle,
    /// Pairs that ended by then are dead; 0 where none ends.
    pub(crate) time_ms: u64,
}

/// Compactions outstanding in one version.
pub(crate) const COMPACTIONS_PER_VERSION_MAX: usize = 2;
/// The deepest level.
pub(super) const LAST: u8 = LEVELS as u8;
/// Scores are per mille of the target.
const SCORE_FULL: u64 = 1000;

/// A compaction: what it reads and where its outputs go.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Compaction {
    pub(crate) branch: BranchId,
    pub(crate) keyspace: KeyspaceId,
    /// The level it takes from; 0 for L0. Of those between it and `to` a tiered one takes all too.
    pub(crate) from: u8,
    /// The level its outputs join, from 1. The level it takes from only where tables of the last level are written again.
    pub(crate) to: u8,
    /// Inputs above `to`.
    pub(crate) upper: Vec<TableRef>,
    /// Inputs of `to`.
    pub(crate) lower: Vec<TableRef>,
    /// Nothing below overlaps: a tombstone has nothing left to hide.
    pub(crate) drop_tombstones: bool,
    /// Pairs that ended by then are dropped; 0 where none expires.
    pub(crate) expired_by_ms: u64,
}

impl Compaction {
    pub(crate) fn inputs(&self) -> impl Iterator<Item = &TableRef> {
        self.upper.iter().chain(&self.lower)
    }
}

/// What to do next in a version.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Pick {
    /// The tables change their level, from any of `from` and below it, and nothing is written.
    Move { from: u8, to: u8, tables: Vec<TableRef> },
    /// The tables hold nothing that counts: they leave the version unread.
    Drop { tables: Vec<TableRef> },
    /// A job.
    Start(Compaction),
}

/// The base level and the bytes that each level may hold.
#[derive(Debug, PartialEq)]
pub(crate) struct Targets {
    /// The level that takes from L0.
    pub(crate) base: u8,
    /// For L1 and below.
    pub(crate) bytes: [u64; LEVELS],
}

pub(crate) fn targets(version: &Version, base_level_bytes: u64) -> Targets {
    let base_bytes = base_level_bytes.max(1);
    let sizes = version.levels.each_ref().map(|level| bytes_of(level.iter()));
    let largest = sizes.iter().copied().max().unwrap_or(0);
    let first = sizes.iter().position(|&size| size > 0).map_or(LAST, |at| at as u8 + 1);
    // What the first level in use would hold if the largest stood in the last one.
    let mut at_base = largest;
    for _ in first..LAST {
        at_base /= LEVEL_RATIO;
    }
    let mut base = first;
    while base > 1 && at_base > base_bytes {
        base -= 1;
        at_base /= LEVEL_RATIO;
    }
    let mut bytes = [u64::MAX; LEVELS];
    let mut target = at_base.max(base_bytes);
    for slot in bytes.iter_mut().skip(usize::from(base) - 1) {
        *slot = target;
        target = target.saturating_mul(LEVEL_RATIO);
    }
    Targets { base, bytes }
}

/// The next step for a version, if one is due. `busy` are the inputs of its outstanding compactions.
pub(crate) fn pick(
    rules: &Rules<'_>,
    branch: BranchId,
    keyspace: KeyspaceId,
    version: &Version,
    busy: &BTreeSet<TableId>,
    outstanding: usize,
) -> Option<Pick> {
    let &Rules { settings, style, time_ms } = rules;
    let dead = Dead { share: DEAD_SHARE, time_ms };
    let dropped = hidden_tables(version, busy, time_ms);
    if !dropped.is_empty() {
        return Some(Pick::Drop { tables: dropped });
    }
    if let CompactionStyle::Tiered { runs } = style {
        let (level, inputs) = tiered::pick(version, runs, busy, outstanding, dead)?;
        return decide(branch, keyspace, version, outstanding, level, inputs, dead);
    }
    let targets = targets(version, settings.base_level_bytes);
    let mut due = vec![(l0_score(settings, version), 0)];
    for (level, target) in (1..LAST).zip(targets.bytes) {
        let size = bytes_of(version.level(level).iter().filter(|t| !busy.contains(&t.id)));
        due.push(((u128::from(size) * u128::from(SCORE_FULL) / u128::from(target)) as u64, level));
    }
    // The fullest first, of equals the upper one.
    due.sort_by_key(|&(score, level)| (std::cmp::Reverse(score), level));
    due.into_iter()
        .filter(|&(score, _)| score >= SCORE_FULL)
        .find_map(|(_, level)| {
            let inputs = match level {
                0 => pick_l0(version, targets.base, busy, dead)?,
                _ => pick_level(version, level, busy)?,
            };
            decide(branch, keyspace, version, outstanding, level, inputs, dead)
        })
        .or_else(|| {
            let (level, inputs) = pick_dense(version, targets.base, busy, dead)?;
            decide(branch, keyspace, version, outstanding, level, inputs, dead)
        })
}

/// Whether L0 is to be compacted and no job does so: then what else takes tables waits.
pub(crate) fn l0_is_due(rules: &Rules<'_>, version: &Version, busy: &BTreeSet<TableId>) -> bool {
    let is_full = match rules.style {
        CompactionStyle::Leveled => l0_score(rules.settings, version) >= SCORE_FULL,
        CompactionStyle::Tiered { runs } => !version.l0.is_empty() && tiered::runs_of(version) >= usize::from(runs),
    };
    is_full && !version.l0.iter().flat_map(|run| run.iter()).any(|t| busy.contains(&t.id))
}

/// Tables that range tombstones above them hide wholly, and those that have nothing but tombstones, range tombstones among them, or pairs that have
/// ended, over keys of which nothing older is left. Without range tombstones and ends there are none, so that builds which know none pick as they did.
pub(crate) fn hidden_tables(version: &Version, busy: &BTreeSet<TableId>, time_ms: u64) -> Vec<TableRef> {
    let mut gone: BTreeMap<TableId, TableRef> = BTreeMap::new();
    let may_be_dead = |t: &TableRef| t.has_ranges() || t.has_ended(time_ms);
    if !version.tables().any(may_be_dead) {
        return Vec::new();
    }
    let lists: Vec<&Tables> = version.lists().collect();
    let mut hidden = RangeSet::default();
    for (place, list) in lists.iter().enumerate() {
        for range in hidden.iter() {
            let inside = overlap(list, range.start(), &last_before(range.end_place()));
            let inside = inside.iter().filter(|t| range.contains(&t.first) && range.contains(&t.last));
            gone.extend(inside.map(|t| (t.id, t.clone())));
        }
        let older = lists.iter().skip(place.saturating_add(1));
        for t in list.iter().filter(|t| may_be_dead(t)) {
            if t.entries == t.dead_entries(time_ms)
                && older.clone().all(|list| overlap(list, &t.first, &t.last).is_empty())
            {
                gone.insert(t.id, t.clone());
            }
            t.ranges.spans.iter().for_each(|span| hidden.add(span));
        }
    }
    gone.into_values().filter(|t| !busy.contains(&t.id)).collect()
}

fn l0_score(settings: &ManifestSettings, version: &Version) -> u64 {
    (version.l0.len() as u64).saturating_mul(SCORE_FULL) / u64::from(settings.l0_compaction_runs.max(1))
}

/// What becomes of chosen inputs: a move where nothing is to be merged, else a job, while there may be one more. Tables do not move where their
/// tombstones and ended pairs could go and are as many as `dead` says, or any of them hides a range: so the last level has no range tombstones.
pub(crate) fn decide(
    branch: BranchId,
    keyspace: KeyspaceId,
    version: &Version,
    outstanding: usize,
    from: u8,
    (to, upper, lower): Inputs,
    dead: Dead,
) -> Option<Pick> {
    if from < to && lower.is_empty() && sorted(&upper) && !is_cleaned(version, to, &upper, dead) {
        return Some(Pick::Move { from, to, tables: upper });
    }
    let (first, last) = range(upper.iter().chain(&lower))?;
    let drop_tombstones = is_lowest(version, to, &first, &last);
    (outstanding < COMPACTIONS_PER_VERSION_MAX).then(|| {
        Pick::Start(Compaction { branch, keyspace, from, to, upper, lower, drop_tombstones, expired_by_ms: 0 })
    })
}

/// The level below, inputs of the level, and inputs of the level below.
pub(crate) type Inputs = (u8, Vec<TableRef>, Vec<TableRef>);

/// True where nothing of these keys is in a level below `level`.
fn is_lowest(version: &Version, level: u8, first: &Bytes, last: &Bytes) -> bool {
    (level + 1..=LAST).all(|deeper| overlap(version.level(deeper), first, last).is_empty())
}

/// True when `upper` is written again on its way to `to` although it overlaps nothing there, since its tombstones end: see [`decide`].
pub(super) fn is_cleaned(version: &Version, to: u8, upper: &[TableRef], dead: Dead) -> bool {
    range(upper).is_some_and(|(first, last)| is_lowest(version, to, &first, &last))
        && (is_dense(upper, &[], dead) || upper.iter().any(|t| t.has_ranges()))
}

/// All of L0, unless a job has tables of it or of those that it overlaps below.
pub(super) fn pick_l0(version: &Version, base: u8, busy: &BTreeSet<TableId>, dead: Dead) -> Option<Inputs> {
    let mut upper: Vec<TableRef> = version.l0.iter().flat_map(|run| run.iter()).cloned().collect();
    if upper.iter().any(|t| busy.contains(&t.id)) {
        return None;
    }
    upper.sort_by(|a, b| (&a.first, a.id).cmp(&(&b.first, b.id)));
    let (first, last) = range(&upper)?;
    // Disjoint runs that overlap no table of the base level change places as they are. A job may write one table for several of them: it
    // takes what stands between them with it.
    let apart = sorted(&upper) && upper.iter().all(|t| overlap(version.level(base), &t.first, &t.last).is_empty());
    if apart && !is_cleaned(version, base, &upper, dead) {
        return Some((base, upper, Vec::new()));
    }
    let lower = overlap(version.level(base), &first, &last);
    (!lower.iter().any(|t| busy.contains(&t.id))).then(|| (base, upper, lower.to_vec()))
}

/// True when what is dead in `upper` is as large a share of both as `dead` says.
pub(super) fn is_dense(upper: &[TableRef], lower: &[TableRef], dead: Dead) -> bool {
    let gone = upper.iter().fold(0, |sum: u64, t| sum.saturating_add(t.dead_entries(dead.time_ms)));
    let entries = upper.iter().chain(lower).fold(0, |sum: u64, t| sum.saturating_add(t.entries));
    gone > 0 && gone.saturating_mul(dead.share) >= entries
}

/// Tables in which much is dead: all of L0, else the first by level and key.
fn pick_dense(version: &Version, base: u8, busy: &BTreeSet<TableId>, dead: Dead) -> Option<(u8, Inputs)> {
    let l0 = pick_l0(version, base, busy, dead).filter(|(_, upper, lower)| is_dense(upper, lower, dead));
    if let Some(inputs) = l0 {
        return Some((0, inputs));
    }
    (1..=LAST).find_map(|level| {
        let inputs = |table: &TableRef| {
            let upper = std::slice::from_ref(table);
            if busy.contains(&table.id) || !is_dense(upper, &[], dead) {
                return None;
            }
            let lower = match level {
                LAST => &[],
                _ => overlap(version.level(level + 1), &table.first, &table.last),
            };
            let free = !lower.iter().any(|t| busy.contains(&t.id)) && is_dense(upper, lower, dead);
            free.then(|| (level, ((level + 1).min(LAST), upper.to_vec(), lower.to_vec())))
        };
        version.level(level).iter().find_map(inputs)
    })
}

/// The table whose move costs the fewest bytes below for each byte of its own; of equals the first by key.
fn pick_level(version: &Version, level: u8, busy: &BTreeSet<TableId>) -> Option<Inputs> {
    let below = version.level(level + 1);
    let cost = |t: &TableRef| -> Option<u128> {
        let lower = overlap(below, &t.first, &t.last);
        let free = !busy.contains(&t.id) && !lower.iter().any(|t| busy.contains(&t.id));
        free.then(|| u128::from(bytes_of(lower)) * 1_000_000 / u128::from(t.bytes.max(1)))
    };
    let (_, table) = version
        .level(level)
        .iter()
        .filter_map(|t| Some((cost(t)?, t)))
        .min_by(|a, b| (a.0, &a.1.first).cmp(&(b.0, &b.1.first)))?;
    Some((level + 1, vec![table.clone()], overlap(below, &table.first, &table.last).to_vec()))
}

/// The smallest and the largest key.
fn range<'a>(tables: impl IntoIterator<Item = &'a TableRef>) -> Option<(Bytes, Bytes)> {
    tables.into_iter().fold(None, |range, t| match range {
        None => Some((t.first.clone(), t.last.clone())),
        Some((first, last)) => Some((first.min(t.first.clone()), last.max(t.last.clone()))),
    })
}
