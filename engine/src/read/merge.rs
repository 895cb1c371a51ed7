//! Merges sorted sources into the newest version of each key.
//!
//! # Invariants
//! G1. Sources on an entry stand in `order` by key in the merge's direction, and for one key from the newest to the oldest.
//! G2. A source is stepped when the next entry is asked for, not when its entry is given: no block is read for entries
//!     that nobody asks for.
//! G3. Dropping the future of [`Merge::next`] loses nothing: what was stepped is stepped, the rest is `stale` still.
//! G4. In a merge for readers sources come from the newest to the oldest: what a range tombstone of one hides, it hides of all behind it.
//!     So these are moved past the range as a whole, and only those before it, and itself, are walked through it.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

use super::Lookup;
use crate::expiry::{has_ended, live, live_part};
use crate::memtable::{Memtable, MemtableCursor};
use crate::merge_operator::{Operator, failed, stray_operand};
use crate::range_tombstone::{Cover, RangeTombstone, behind, fragment, no_end};
use crate::table::block::EntryKind;
use crate::table::{Step, Table, TableCursor};
use crate::{LogIndex, Result};

/// Keys that a range tombstone hides are met one by one so many times, before the sources are moved to where it ends.
const HIDDEN_KEYS_BEFORE_SEEK: usize = 8;

/// Tables in order of keys, without overlap, as one source.
struct RunCursor {
    tables: Arc<[Arc<Table>]>,
    /// The table that the cursor walks.
    table: usize,
    cursor: TableCursor,
    /// The next table in the direction was entered but its first entry not yet found.
    entering: bool,
    at: LogIndex,
    reverse: bool,
    bypass: bool,
}

impl RunCursor {
    fn new(tables: Arc<[Arc<Table>]>, at: LogIndex, reverse: bool, bypass: bool) -> Self {
        Self { tables, table: 0, cursor: TableCursor::new(reverse), entering: false, at, reverse, bypass }
    }

    async fn seek(&mut self, from: Bound<&[u8]>) -> Result<()> {
        let (key, exclusive) = match from {
            Bound::Unbounded => (None, false),
            Bound::Included(key) => (Some(key), false),
            Bound::Excluded(key) => (Some(key), true),
        };
        // The first table in the direction that reaches `key`.
        let table = match key {
            None if self.reverse => self.tables.len().checked_sub(1),
            None => Some(0),
            Some(key) if self.reverse => {
                self.tables.partition_point(|table| table.meta().first.as_ref() <= key).checked_sub(1)
            }
            Some(key) => Some(self.tables.partition_point(|table| table.meta().last.as_ref() < key)),
        };
        self.entering = false;
        let Some(table) = table.filter(|table| *table < self.tables.len()) else {
            self.cursor = TableCursor::new(self.reverse);
            return Ok(());
        };
        self.table = table;
        self.cursor = self.open();
        match key {
            Some(key) => self.cursor.seek(&self.tables[table], key, exclusive).await?,
            None => self.cursor.seek_start(&self.tables[table]).await?,
        }
        self.settle().await
    }

    fn open(&self) -> TableCursor {
        if self.bypass { TableCursor::new_bypass(&self.tables[self.table]) } else { TableCursor::new(self.reverse) }
    }

    fn visible(&self) -> bool {
        self.cursor.index() <= self.at
    }

    /// Goes one entry on if that needs no other block.
    fn step(&mut self) -> Result<Step> {
        loop {
            if self.entering {
                return Ok(Step::Load);
            }
            if self.cursor.step(&self.tables[self.table])? == Step::Load {
                return Ok(Step::Load);
            }
            if !self.cursor.valid() {
                return Ok(if self.next_table() { Step::Load } else { Step::Done });
            }
            if self.visible() {
                return Ok(Step::Done);
            }
        }
    }

    /// Finishes a step that needed a block.
    async fn load(&mut self) -> Result<()> {
        if self.entering {
            self.cursor.seek_start(&self.tables[self.table]).await?;
            self.entering = false;
        } else {
            self.cursor.load(&self.tables[self.table]).await?;
        }
        self.settle().await
    }

    /// Goes on until the entry is visible, into the next tables if need be.
    async fn settle(&mut self) -> Result<()> {
        loop {
            if self.cursor.valid() {
                if self.visible() {
                    return Ok(());
                }
                self.cursor.advance(&self.tables[self.table]).await?;
            } else if self.next_table() {
                self.cursor.seek_start(&self.tables[self.table]).await?;
                self.entering = false;
            } else {
                return Ok(());
            }
        }
    }

    fn next_table(&mut self) -> bool {
        let next = if self.reverse { self.table.checked_sub(1) } else { Some(self.table + 1) };
        match next.filter(|next| *next < self.tables.len()) {
            Some(next) => {
                self.table = next;
                self.cursor = self.open();
                self.entering = true;
                true
            }
            None => false,
        }
    }
}

#[allow(clippy::large_enum_variant, reason = "a merge has few sources, and a step is not to follow a pointer")]
enum Source {
    Memtable(MemtableCursor),
    Run(RunCursor),
}

impl Source {
    fn valid(&self) -> bool {
        match self {
            Self::Memtable(cursor) => cursor.valid(),
            Self::Run(run) => run.cursor.valid(),
        }
    }

    #[inline]
    fn key(&self) -> &[u8] {
        match self {
            Self::Memtable(cursor) => cursor.key(),
            Self::Run(run) => run.cursor.key(),
        }
    }

    #[inline]
    fn index(&self) -> LogIndex {
        match self {
            Self::Memtable(cursor) => cursor.index(),
            Self::Run(run) => run.cursor.index(),
        }
    }

    #[inline]
    fn kind(&self) -> EntryKind {
        match self {
            Self::Memtable(cursor) => cursor.kind(),
            Self::Run(run) => run.cursor.kind(),
        }
    }

    fn value(&self) -> Option<Bytes> {
        match self {
            Self::Memtable(cursor) => cursor.value(),
            Self::Run(run) => run.cursor.value(),
        }
    }

    fn value_part(&self) -> Option<&[u8]> {
        match self {
            Self::Memtable(cursor) => cursor.value_part(),
            Self::Run(run) => run.cursor.value_part(),
        }
    }

    #[inline]
    fn step(&mut self) -> Result<Step> {
        match self {
            Self::Memtable(cursor) => {
                cursor.advance();
                Ok(Step::Done)
            }
            Self::Run(run) => run.step(),
        }
    }

    async fn load(&mut self) -> Result<()> {
        match self {
            Self::Memtable(_) => Ok(()),
            Self::Run(run) => run.load().await,
        }
    }

    async fn seek(&mut self, from: Bound<&[u8]>) -> Result<()> {
        match (self, from) {
            (Self::Memtable(cursor), Bound::Unbounded) => cursor.seek_start(),
            (Self::Memtable(cursor), Bound::Included(key)) => cursor.seek(key, false),
            (Self::Memtable(cursor), Bound::Excluded(key)) => cursor.seek(key, true),
            (Self::Run(run), from) => run.seek(from).await?,
        }
        Ok(())
    }
}

/// Where a source of range tombstones has them.
enum RangeSource {
    Memtable(Arc<Memtable>),
    Run(Arc<[Arc<Table>]>),
}

impl RangeSource {
    async fn cover(&self, key: &[u8], at: LogIndex) -> Result<Cover> {
        let tables = match self {
            Self::Memtable(memtable) => return Ok(memtable.cover(key, at)),
            Self::Run(tables) => tables,
        };
        let place = tables.partition_point(|table| table.meta().last.as_ref() < key);
        let before = place.checked_sub(1).and_then(|before| tables.get(before));
        let from = before.map_or_else(Bytes::new, |before| behind(&before.meta().last));
        let Some(table) = tables.get(place) else {
            return Ok(Cover { from, to: no_end(), index: LogIndex(0) });
        };
        let (first, last) = (&table.meta().first, &table.meta().last);
        if key < first.as_ref() {
            return Ok(Cover { from, to: first.clone(), index: LogIndex(0) });
        }
        let mut cover = table.ranges().await?.cover(key, at);
        if cover.index == LogIndex(0) {
            // What it says of keys outside of itself is for others to say.
            cover.from = cover.from.max(first.clone());
            cover.to = cover.to.min(behind(last));
        }
        Ok(cover)
    }
}

/// Range tombstones of one source, with what they say around the key that they were last asked for.
struct Ranges {
    /// Which source has them (G4).
    source: usize,
    of: RangeSource,
    at: LogIndex,
    cover: Option<Cover>,
}

/// The newest version of each key, tombstones included, in one direction.
pub(super) struct Merge {
    sources: Vec<Source>,
    /// Of those that have some.
    ranges: Vec<Ranges>,
    /// Versions of `key` below it are hidden by a range tombstone; the newest one is where `hidden` says so.
    hidden_below: LogIndex,
    hidden: bool,
    /// Of the keyspace, if it has one.
    operator: Option<Operator>,
    /// So many keys one after the other were.
    hidden_keys: usize,
    /// The range tombstones at `key`, which the stale sources behind theirs are to be moved past: its place among `ranges`.
    passing: Option<usize>,
    /// The sources that stand on an entry (G1).
    order: Vec<usize>,
    /// So many at the front of `order` stand on the key that was given, and have yet to be stepped.
    stale: usize,
    reverse: bool,
    key: Vec<u8>,
    /// Of an expiring keyspace, for readers: the time that they read at.
    time_ms: Option<u64>,
}

impl Merge {
    pub(super) fn new(reverse: bool, operator: Option<Operator>) -> Self {
        Self {
            time_ms: None,
            sources: Vec::new(),
            ranges: Vec::new(),
            hidden_below: LogIndex(0),
            operator,
            hidden: false,
            hidden_keys: 0,
            passing: None,
            order: Vec::new(),
            stale: 0,
            reverse,
            key: Vec::new(),
        }
    }

    /// Values have an end, and are given to who reads at that time.
    pub(super) fn expiring(&mut self, time_ms: u64) {
        self.time_ms = Some(time_ms);
    }

    /// What its removed ranges hide is passed over as well.
    pub(super) fn memtable_with_ranges(&mut self, memtable: &Arc<Memtable>, at: LogIndex) {
        if memtable.has_ranges() {
            self.ranges(RangeSource::Memtable(memtable.clone()), at);
        }
        self.memtable(memtable, at);
    }

    /// As [`Merge::run`]; what range tombstones of its tables hide is passed over as well.
    pub(super) fn run_with_ranges(&mut self, tables: Arc<[Arc<Table>]>, at: LogIndex) {
        self.ranges(RangeSource::Run(tables.clone()), at);
        self.run(tables, at, false);
    }

    /// Of the source that is added next.
    fn ranges(&mut self, of: RangeSource, at: LogIndex) {
        self.ranges.push(Ranges { source: self.sources.len(), of, at, cover: None });
    }

    pub(super) fn memtable(&mut self, memtable: &Arc<Memtable>, at: LogIndex) {
        if !memtable.is_empty() {
            self.sources.push(Source::Memtable(memtable.cursor(at, self.reverse)));
        }
    }

    /// Tables in order of keys, without overlap.
    pub(super) fn run(&mut self, tables: Arc<[Arc<Table>]>, at: LogIndex, bypass: bool) {
        if !tables.is_empty() {
            self.sources.push(Source::Run(RunCursor::new(tables, at, self.reverse, bypass)));
        }
    }

    /// Puts all sources on their first entry from `from` on. Not to be used after it was dropped half way.
    pub(super) async fn seek(&mut self, from: Bound<&[u8]>) -> Result<()> {
        self.order.clear();
        self.stale = 0;
        (self.hidden_below, self.hidden) = (LogIndex(0), false);
        (self.hidden_keys, self.passing) = (0, None);
        for at in 0..self.sources.len() {
            self.sources[at].seek(from).await?;
            if self.sources[at].valid() {
                let place = self.order.partition_point(|other| self.before(*other, at));
                self.order.insert(place, at);
            }
        }
        Ok(())
    }

    /// Goes to the next key. Then [`Merge::key`], [`Merge::index`] and [`Merge::value`] are those of its newest version.
    ///
    /// # Cancel safety
    /// Cancel safe (G3).
    #[inline]
    pub(super) async fn next(&mut self) -> Result<bool> {
        while self.stale > 0 {
            let at = self.order[0];
            match self.passing.map(|passing| &self.ranges[passing]) {
                Some(Ranges { source, cover: Some(cover), .. }) if *source < at => {
                    let place =
                        if self.reverse { Bound::Excluded(&cover.from[..]) } else { Bound::Included(&cover.to[..]) };
                    self.sources[at].seek(place).await?;
                }
                _ => {
                    let source = &mut self.sources[at];
                    if source.step()? == Step::Load {
                        source.load().await?;
                    }
                }
            }
            self.reorder();
        }
        let Some(&first) = self.order.first() else { return Ok(false) };
        self.key.clear();
        self.key.extend_from_slice(self.sources[first].key());
        if !self.ranges.is_empty() {
            self.compare_with_ranges(first).await?;
        }
        self.stale = 1;
        while self.order.get(self.stale).is_some_and(|other| self.sources[*other].key() == self.key) {
            self.stale += 1;
        }
        Ok(true)
    }

    /// Finds out whether the version that `first` stands on is hidden. What is kept of it does not depend on how often it is asked.
    async fn compare_with_ranges(&mut self, first: usize) -> Result<()> {
        let mut newest = (LogIndex(0), 0);
        for place in 0..self.ranges.len() {
            let ranges = &mut self.ranges[place];
            let cover = match ranges.cover.take().filter(|cover| cover.contains(&self.key)) {
                Some(cover) => cover,
                None => ranges.of.cover(&self.key, ranges.at).await?,
            };
            newest = newest.max((cover.index, place));
            ranges.cover = Some(cover);
        }
        self.hidden_below = newest.0;
        self.hidden = self.sources[first].index() < newest.0;
        self.hidden_keys = if self.hidden { self.hidden_keys + 1 } else { 0 };
        // A short range is walked through: that costs less than finding a place in every source.
        self.passing = (self.hidden_keys > HIDDEN_KEYS_BEFORE_SEEK).then_some(newest.1);
        Ok(())
    }

    /// Puts the first source, just stepped, where it belongs now.
    #[inline]
    fn reorder(&mut self) {
        self.stale -= 1;
        let source = self.order[0];
        if !self.sources[source].valid() {
            self.order.remove(0);
            return;
        }
        // Those that are stale stand on a key that this one has passed.
        let mut place = 1;
        while place < self.order.len() && (place <= self.stale || self.before(self.order[place], source)) {
            self.order[place - 1] = self.order[place];
            place += 1;
        }
        self.order[place - 1] = source;
    }

    fn before(&self, a: usize, b: usize) -> bool {
        let (x, y) = (&self.sources[a], &self.sources[b]);
        let keys = if self.reverse { y.key().cmp(x.key()) } else { x.key().cmp(y.key()) };
        let newest =
            if mainstay_io::mutant!(OldestWins) { x.index().cmp(&y.index()) } else { y.index().cmp(&x.index()) };
        match keys.then(newest) {
            Ordering::Less => true,
            Ordering::Equal => a < b,
            Ordering::Greater => false,
        }
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.key
    }

    pub(super) fn index(&self) -> LogIndex {
        self.order.first().map_or(LogIndex(0), |first| self.sources[*first].index())
    }

    /// The kind of the newest version.
    #[inline]
    fn kind(&self) -> EntryKind {
        self.order.first().map_or(EntryKind::Tombstone, |first| self.sources[*first].kind())
    }

    /// None when the key was removed.
    ///
    /// # Errors
    /// `Invalid` when a merge was refused.
    pub(super) fn value(&self) -> Result<Option<Bytes>> {
        match self.kind() {
            _ if self.hidden => Ok(None),
            EntryKind::Operand | EntryKind::Failed => self.merged_value(),
            _ => match (self.newest_value(), self.time_ms) {
                (Some(stored), Some(time_ms)) => live(stored, time_ms),
                (value, _) => Ok(value),
            },
        }
    }

    /// As [`Merge::value`], borrowed where it can be.
    ///
    /// # Errors
    /// As [`Merge::value`].
    pub(super) fn value_part(&self) -> Result<Option<Cow<'_, [u8]>>> {
        match self.kind() {
            _ if self.hidden => Ok(None),
            EntryKind::Operand | EntryKind::Failed => Ok(self.merged_value()?.map(|value| Cow::Owned(value.into()))),
            _ => {
                let value = self.order.first().and_then(|first| self.sources[*first].value_part());
                let value = match (value, self.time_ms) {
                    (Some(stored), Some(time_ms)) => live_part(stored, time_ms)?,
                    (value, _) => value,
                };
                Ok(value.map(Cow::Borrowed))
            }
        }
    }

    fn newest_value(&self) -> Option<Bytes> {
        self.order.first().and_then(|first| self.sources[*first].value())
    }

    fn merged_value(&self) -> Result<Option<Bytes>> {
        match self.merged(self.hidden_below, true)? {
            Lookup::Value(value) => Ok(Some(value)),
            Lookup::Deleted | Lookup::Operand(_) => Ok(None),
            Lookup::Failed => Err(failed(&self.key)),
        }
    }

    /// What the versions of the key are together, where the newest one is an operand. All sources that have one stand on it. Of those
    /// below `hidden_below` none counts; `whole`: there is nothing below the sources.
    fn merged(&self, hidden_below: LogIndex, whole: bool) -> Result<Lookup> {
        let mut operands = Vec::new();
        let mut below = None;
        for &at in &self.order[..self.stale] {
            let source = &self.sources[at];
            if source.index() < hidden_below {
                break;
            }
            match (source.kind(), source.value()) {
                (EntryKind::Operand, Some(operand)) => operands.push(operand),
                (EntryKind::Failed, _) => below = Some(Lookup::Failed),
                (_, value) => below = Some(value.map_or(Lookup::Deleted, Lookup::Value)),
            }
            if below.is_some() {
                break;
            }
        }
        if below.is_none() && (whole || hidden_below > LogIndex(0)) {
            below = Some(Lookup::Deleted);
        }
        match below {
            Some(below) if operands.is_empty() => Ok(below),
            below => self.operator.as_ref().ok_or_else(stray_operand)?.resolve(&self.key, below, &operands),
        }
    }
}

/// An entry on its way into a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryRef<'a> {
    /// The key.
    pub(crate) key: &'a [u8],
    /// The index of its newest version.
    pub(crate) index: LogIndex,
    /// What it is.
    pub(crate) kind: EntryKind,
    /// `None` is a tombstone, or a key of which a merge was refused; of a merge the operand.
    pub(crate) value: Option<&'a [u8]>,
}

/// Merges memtables and tables for a flush or compaction: the newest version of each key that no range tombstone hides, ascending. Reads
/// go in large pieces and leave the block cache as it is.
pub(crate) struct MergeInput {
    merge: Merge,
    memtables: Vec<Arc<Memtable>>,
    tables: Vec<Arc<Table>>,
    started: bool,
    drop_tombstones: bool,
    /// Values of an expiring keyspace that ended by then are removals; 0 for none.
    expired_by_ms: u64,
    ranges: Vec<RangeTombstone>,
    /// The first of `ranges` that ends behind the last key.
    range: usize,
    value: Option<Bytes>,
}

impl MergeInput {
    /// The sources in any order: the version with the highest index wins. `drop_tombstones`: nothing older lies below the
    /// output.
    pub(crate) fn new(memtables: Vec<Arc<Memtable>>, tables: Vec<Arc<Table>>, drop_tombstones: bool) -> Self {
        Self::with_operator(memtables, tables, drop_tombstones, None)
    }

    /// Of a keyspace with a merge operator: operands of one key are merged into its value where that is among the sources, and else
    /// combined.
    pub(crate) fn with_operator(
        memtables: Vec<Arc<Memtable>>,
        tables: Vec<Arc<Table>>,
        drop_tombstones: bool,
        operator: Option<Operator>,
    ) -> Self {
        let mut merge = Merge::new(false, operator);
        let all = LogIndex(u64::MAX);
        for memtable in &memtables {
            merge.memtable(memtable, all);
        }
        for run in runs(tables.clone()) {
            merge.run(run, all, true);
        }
        let (ranges, range, value) = (Vec::new(), 0, None);
        Self { merge, memtables, tables, started: false, drop_tombstones, expired_by_ms: 0, ranges, range, value }
    }

    /// Of an expiring keyspace: what ended by then is a removal.
    pub(crate) fn without_expired(self, expired_by_ms: u64) -> Self {
        Self { expired_by_ms, ..self }
    }

    /// The range tombstones for the output, in order. Before the first entry.
    pub(crate) async fn ranges(&mut self) -> Result<Vec<RangeTombstone>> {
        self.start().await?;
        let dropped = self.drop_tombstones || mainstay_io::mutant!(DropTombstones);
        Ok(if dropped { Vec::new() } else { self.ranges.clone() })
    }

    async fn start(&mut self) -> Result<()> {
        if self.started {
            return Ok(());
        }
        let mut ranges = Vec::new();
        for memtable in &self.memtables {
            ranges.extend(memtable.ranges().into_list());
        }
        for table in &self.tables {
            ranges.extend(table.ranges().await?.iter().cloned());
        }
        self.ranges = fragment(ranges).into_list();
        self.merge.seek(Bound::Unbounded).await?;
        self.started = true;
        Ok(())
    }

    /// The next entry.
    pub(crate) async fn next(&mut self) -> Result<Option<EntryRef<'_>>> {
        self.start().await?;
        while self.merge.next().await? {
            let (index, hidden_below) = (self.merge.index(), self.hidden_below());
            if index < hidden_below {
                continue;
            }
            let mut kind = self.merge.kind();
            self.value = self.merge.newest_value();
            if kind == EntryKind::Operand {
                (kind, self.value) = match self.merge.merged(hidden_below, self.drop_tombstones)? {
                    Lookup::Value(value) => (EntryKind::Value, Some(value)),
                    Lookup::Operand(operand) => (EntryKind::Operand, Some(operand)),
                    Lookup::Deleted => (EntryKind::Tombstone, None),
                    Lookup::Failed => (EntryKind::Failed, None),
                };
            }
            if let (true, EntryKind::Value, Some(stored)) = (self.expired_by_ms > 0, kind, &self.value)
                && has_ended(stored, self.expired_by_ms)?
            {
                (kind, self.value) = (EntryKind::Tombstone, None);
            }
            // A tombstone that says nothing but what the range tombstone says, or that has nothing to hide.
            let dropped = self.drop_tombstones || mainstay_io::mutant!(DropTombstones);
            if kind == EntryKind::Tombstone && (dropped || index == hidden_below) {
                continue;
            }
            let (key, value) = (self.merge.key(), self.value.as_deref());
            return Ok(Some(EntryRef { key, index, kind, value }));
        }
        Ok(None)
    }

    /// Versions below it of the key that `merge` stands on are hidden by a range tombstone.
    fn hidden_below(&mut self) -> LogIndex {
        let key = self.merge.key();
        while self.ranges.get(self.range).is_some_and(|one| one.range.end_place().as_ref() <= key) {
            self.range += 1;
        }
        let one = self.ranges.get(self.range).filter(|one| one.range.contains(key));
        one.map_or(LogIndex(0), |one| one.index)
    }
}

/// Sorts tables into as few runs without overlap as a greedy pass finds, so that the merge has few sources.
fn runs(mut tables: Vec<Arc<Table>>) -> Vec<Arc<[Arc<Table>]>> {
    tables.sort_by(|a, b| a.meta().first.cmp(&b.meta().first));
    let mut runs: Vec<Vec<Arc<Table>>> = Vec::new();
    for table in tables {
        let fits = |run: &&mut Vec<Arc<Table>>| run.last().is_none_or(|last| last.meta().last < table.meta().first);
        match runs.iter_mut().find(fits) {
            Some(run) => run.push(table),
            None => runs.push(vec![table]),
        }
    }
    runs.into_iter().map(Arc::from).collect()
}
