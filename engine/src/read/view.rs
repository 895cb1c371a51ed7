//! One keyspace of one branch, pinned: memtables, L0 and levels.

use std::cmp::Ordering;
use std::ops::Bound;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use mainstay_memtree::key::{common_prefix, head};

use super::Lookup;
use super::merge::Merge;
use crate::expiry::{ReadAt, live};
use crate::gather::Gather;
use crate::memtable::Memtable;
use crate::merge_operator::{Operator, failed, stray_operand};
use crate::table::Table;
use crate::table::block::alike;
use crate::{LogIndex, Result, Visitor};

/// Keys that a scan gives are cut from pieces of memory of this size; one key may keep one piece.
const KEY_PIECE_BYTES: usize = 4 << 10;
/// Lookups of one call that may wait for the device at a time: half of the places of a ring, so that others get theirs, and a bound of
/// the memory that the call takes.
const LOOKUPS_TOGETHER_MAX: usize = 64;

/// Memtables and tables of one keyspace of one branch, pinned by reference count.
#[derive(Clone, Default)]
pub(crate) struct ReadView {
    /// Newest first.
    pub(crate) memtables: Vec<Arc<Memtable>>,
    /// Newest first.
    pub(crate) l0: Vec<Arc<Table>>,
    /// From L1 down; each sorted by key, without overlap.
    pub(crate) levels: Vec<LevelView>,
    /// Of the keyspace, if it has one.
    pub(crate) operator: Option<Operator>,
    /// Values have an end.
    pub(crate) expires: bool,
}

/// The tables of a level.
#[derive(Clone)]
pub(crate) struct LevelView {
    pub(crate) tables: Arc<[Arc<Table>]>,
    /// Some of them have range tombstones.
    ranged: bool,
    /// Bytes that the last keys of all tables have in common.
    shared: usize,
    /// Of the last key of each table, eight bytes after those: a lookup finds its table in few lines of memory.
    heads: Arc<[u64]>,
}

impl FromIterator<Arc<Table>> for LevelView {
    fn from_iter<I: IntoIterator<Item = Arc<Table>>>(tables: I) -> Self {
        let tables: Arc<[Arc<Table>]> = tables.into_iter().collect();
        let ranged = tables.iter().any(|table| table.has_ranges());
        let shared = match &*tables {
            [first, .., last] => common_prefix(&first.meta().last, &last.meta().last),
            _ => 0,
        };
        let heads = tables.iter().map(|table| head(&table.meta().last, shared)).collect();
        Self { tables, ranged, shared, heads }
    }
}

impl LevelView {
    /// The table in which `key` would be.
    pub(super) fn table_of(&self, key: &[u8]) -> Option<&Arc<Table>> {
        let prefix = self.tables.first()?.meta().last.get(..self.shared).unwrap_or_default();
        let place = match key.get(..self.shared).unwrap_or(key).cmp(prefix) {
            Ordering::Less => 0,
            Ordering::Greater => return None,
            Ordering::Equal => {
                let alike = alike(&self.heads, head(key, self.shared));
                let tables = self.tables.get(alike.clone()).unwrap_or_default();
                alike.start + tables.partition_point(|table| table.meta().last.as_ref() < key)
            }
        };
        self.tables.get(place)
    }
}

impl ReadView {
    /// The value of a key at `at`.
    ///
    /// Ready at the first poll when no block has to be read.
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn get(&self, key: &[u8], at: impl Into<ReadAt>) -> Result<Option<Bytes>> {
        Ok(self.get_version(key, at).await?.map(|(_, value)| value))
    }

    /// The value of a key at `at`, and the entry that wrote it. A tombstone is nothing here: whether there still is one
    /// depends on what this replica has compacted.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn get_version(&self, key: &[u8], at: impl Into<ReadAt>) -> Result<Option<(LogIndex, Bytes)>> {
        let at = at.into();
        self.value_of(key, self.lookup(key, at.index).await?, at.time_ms)
    }

    /// The value of a key for who reads at that time, where this is known of it.
    ///
    /// # Errors
    /// `Invalid` when a merge was refused.
    fn value_of(
        &self,
        key: &[u8],
        lookup: Option<(LogIndex, Lookup)>,
        time_ms: u64,
    ) -> Result<Option<(LogIndex, Bytes)>> {
        match lookup {
            Some((index, Lookup::Value(stored))) if self.expires => {
                Ok(live(stored, time_ms)?.map(|value| (index, value)))
            }
            Some((index, Lookup::Value(value))) => Ok(Some((index, value))),
            Some((_, Lookup::Failed)) => Err(failed(key)),
            Some((_, Lookup::Deleted | Lookup::Operand(_))) | None => Ok(None),
        }
    }

    /// As [`ReadView::get_version`] for many keys, in their order. All are looked up in memory before the first is in a table, and the
    /// blocks that are not cached are read from the device together, [`LOOKUPS_TOGETHER_MAX`] at a time.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn get_many<K: AsRef<[u8]>>(
        &self,
        keys: &[K],
        at: impl Into<ReadAt>,
    ) -> Result<Vec<Option<(LogIndex, Bytes)>>> {
        let ReadAt { index: at, time_ms } = at.into();
        let mut answers = vec![None; keys.len()];
        let mut missing = Vec::new();
        for ((place, key), answer) in keys.iter().enumerate().zip(&mut answers) {
            let key = key.as_ref();
            match self.lookup_memory(key, at)? {
                Met::All(known) => *answer = self.value_of(key, Some(known), time_ms)?,
                Met::Operands(operands) => missing.push((place, key, operands)),
            }
        }
        let gather = Gather::default();
        let lookups = missing.into_iter().map(|(place, key, operands)| {
            let gather = &gather;
            async move {
                let found = self.lookup_tables(key, at, operands, Some(gather)).await?;
                Ok((place, self.value_of(key, found, time_ms)?))
            }
        });
        for (place, found) in gather.run(lookups, LOOKUPS_TOGETHER_MAX).await? {
            if let Some(answer) = answers.get_mut(place) {
                *answer = found;
            }
        }
        Ok(answers)
    }

    async fn lookup(&self, key: &[u8], at: LogIndex) -> Result<Option<(LogIndex, Lookup)>> {
        match self.lookup_memory(key, at)? {
            Met::All(known) => Ok(Some(known)),
            Met::Operands(operands) => self.lookup_tables(key, at, operands, None).await,
        }
    }

    fn lookup_memory(&self, key: &[u8], at: LogIndex) -> Result<Met> {
        let mut operands = Operands::default();
        for memtable in &self.memtables {
            if let Some(known) = judge(memtable.get_version(key, at), memtable.hidden_below(key, at))
                && let Some(below) = operands.meet(known)
            {
                return Ok(Met::All(self.merged(key, operands, below)?));
            }
        }
        Ok(Met::Operands(operands))
    }

    /// Looks below the memtables, in which `operands` were met.
    async fn lookup_tables(
        &self,
        key: &[u8],
        at: LogIndex,
        mut operands: Operands,
        reads: Option<&Gather>,
    ) -> Result<Option<(LogIndex, Lookup)>> {
        for table in &self.l0 {
            if let Some(known) = lookup_table(table, key, at, reads).await?
                && let Some(below) = operands.meet(known)
            {
                return Ok(Some(self.merged(key, operands, below)?));
            }
        }
        for level in &self.levels {
            if let Some(table) = level.table_of(key)
                && let Some(known) = lookup_table(table, key, at, reads).await?
                && let Some(below) = operands.meet(known)
            {
                return Ok(Some(self.merged(key, operands, below)?));
            }
        }
        if operands.list.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.merged(key, operands, (LogIndex(0), Lookup::Deleted))?))
    }

    /// What operands make of what was found below them.
    fn merged(&self, key: &[u8], operands: Operands, below: (LogIndex, Lookup)) -> Result<(LogIndex, Lookup)> {
        if operands.list.is_empty() {
            return Ok(below);
        }
        let operator = self.operator.as_ref().ok_or_else(stray_operand)?;
        Ok((operands.index, operator.resolve(key, Some(below.1), &operands.list)?))
    }

    /// A scan over the bounds at `at`. It reads nothing before it is asked for a pair.
    pub(crate) fn scan(
        self: &Arc<Self>,
        lower: Bound<Bytes>,
        upper: Bound<Bytes>,
        at: impl Into<ReadAt>,
    ) -> ScanCursor {
        ScanCursor {
            view: self.clone(),
            at: at.into(),
            lower,
            upper,
            front: None,
            back: None,
            finished: false,
            visited: None,
            keys: BytesMut::new(),
        }
    }

    fn merge(&self, at: ReadAt, reverse: bool, lower: Bound<&[u8]>, upper: Bound<&[u8]>) -> Merge {
        let mut merge = Merge::new(reverse, self.operator.clone());
        if self.expires {
            merge.expiring(at.time_ms);
        }
        let at = at.index;
        for memtable in &self.memtables {
            merge.memtable_with_ranges(memtable, at);
        }
        let outside = |table: &Table| {
            let (first, last) = (table.meta().first.as_ref(), table.meta().last.as_ref());
            above(last, lower) || below(first, upper) || table.indexes().0 > at
        };
        for table in self.l0.iter().filter(|table| !outside(table)) {
            let run: Arc<[Arc<Table>]> = Arc::from([table.clone()]);
            if table.has_ranges() { merge.run_with_ranges(run, at) } else { merge.run(run, at, false) }
        }
        for level in &self.levels {
            let from = level.tables.partition_point(|table| above(&table.meta().last, lower));
            if level.tables.get(from).is_some_and(|table| !below(&table.meta().first, upper)) {
                let run = level.tables.clone();
                if level.ranged { merge.run_with_ranges(run, at) } else { merge.run(run, at, false) }
            }
        }
        merge
    }
}

/// What a lookup knows behind the memtables.
enum Met {
    /// All: nothing older counts.
    All((LogIndex, Lookup)),
    /// What is below counts, and these are merged into it.
    Operands(Operands),
}

/// Operands of a key that a lookup has met, the newest first.
#[derive(Default)]
struct Operands {
    list: Vec<Bytes>,
    /// Of the newest.
    index: LogIndex,
}

impl Operands {
    /// What is known where nothing older counts.
    #[inline]
    fn meet(&mut self, known: (LogIndex, Lookup)) -> Option<(LogIndex, Lookup)> {
        let (index, Lookup::Operand(operand)) = known else { return Some(known) };
        if self.list.is_empty() {
            self.index = index;
        }
        self.list.push(operand);
        None
    }
}

/// What is known of a key where this was found of it, and versions below `hidden` are hidden: nothing older counts then.
fn judge(found: Option<(LogIndex, Lookup)>, hidden: LogIndex) -> Option<(LogIndex, Lookup)> {
    match found {
        Some((index, _)) if index < hidden => Some((hidden, Lookup::Deleted)),
        None if hidden > LogIndex(0) => Some((hidden, Lookup::Deleted)),
        found => found,
    }
}

async fn lookup_table(
    table: &Table,
    key: &[u8],
    at: LogIndex,
    reads: Option<&Gather>,
) -> Result<Option<(LogIndex, Lookup)>> {
    let found = table.get_version_by(key, at, reads).await?;
    if !table.has_ranges() {
        return Ok(found);
    }
    Ok(judge(found, table.hidden_below(key, at, reads).await?))
}

/// All keys up to `last` are before the lower bound.
fn above(last: &[u8], lower: Bound<&[u8]>) -> bool {
    match lower {
        Bound::Included(key) => last < key,
        Bound::Excluded(key) => last <= key,
        Bound::Unbounded => false,
    }
}

/// All keys from `first` on are after the upper bound.
fn below(first: &[u8], upper: Bound<&[u8]>) -> bool {
    match upper {
        Bound::Included(key) => key < first,
        Bound::Excluded(key) => key <= first,
        Bound::Unbounded => false,
    }
}

fn bytes(bound: &Bound<Bytes>) -> Bound<&[u8]> {
    bound.as_ref().map(AsRef::as_ref)
}

/// A scan over a view that it owns. Both ends may be taken from at any time; they meet in the middle, and no pair is given
/// twice.
pub(crate) struct ScanCursor {
    view: Arc<ReadView>,
    at: ReadAt,
    /// What is left: each pair given moves its bound.
    lower: Bound<Bytes>,
    upper: Bound<Bytes>,
    /// Made when first asked; stands on what it gave last.
    front: Option<Merge>,
    back: Option<Merge>,
    /// One end met the other, or the end of the data: nothing is left for either.
    finished: bool,
    /// The last key that [`ScanCursor::visit`] gave, if `lower` has not moved there yet.
    visited: Option<Vec<u8>>,
    keys: BytesMut,
}

impl ScanCursor {
    /// The next pair from the low end.
    ///
    /// # Cancel safety
    /// Cancel safe: a pair that was not given is given by the next call.
    pub(crate) async fn next(&mut self) -> Result<Option<(Bytes, Bytes)>> {
        if self.finished {
            return Ok(None);
        }
        self.leave_visited();
        self.open_front().await?;
        let Some(merge) = &mut self.front else { return Ok(None) };
        while merge.next().await? {
            if below(merge.key(), bytes(&self.upper)) {
                break;
            }
            if let Some(value) = merge.value()? {
                let key = cut_key(&mut self.keys, merge.key());
                self.lower = Bound::Excluded(key.clone());
                return Ok(Some((key, value)));
            }
        }
        self.finished = true;
        Ok(None)
    }

    /// Gives the pairs from the low end on, borrowed, until `each` wants no more.
    ///
    /// # Cancel safety
    /// Cancel safe: what was given is not given again.
    pub(crate) async fn visit(&mut self, each: &mut Visitor<'_>) -> Result<()> {
        if self.finished {
            return Ok(());
        }
        self.open_front().await?;
        let Some(merge) = &mut self.front else { return Ok(()) };
        while merge.next().await? {
            if below(merge.key(), bytes(&self.upper)) {
                break;
            }
            if let Some(value) = merge.value_part()? {
                let visited = self.visited.get_or_insert_default();
                visited.clear();
                visited.extend_from_slice(merge.key());
                if each(merge.key(), &value).is_break() {
                    return Ok(());
                }
            }
        }
        self.finished = true;
        Ok(())
    }

    /// The merge from the low end, on its first pair.
    async fn open_front(&mut self) -> Result<()> {
        if self.front.is_none() {
            let (lower, upper) = (bytes(&self.lower), bytes(&self.upper));
            let mut merge = self.view.merge(self.at, false, lower, upper);
            merge.seek(lower).await?;
            self.front = Some(merge);
        }
        Ok(())
    }

    /// Moves the low end behind what was visited.
    fn leave_visited(&mut self) {
        if let Some(visited) = self.visited.take() {
            self.lower = Bound::Excluded(visited.into());
        }
    }

    /// The entry that wrote the pair that [`ScanCursor::next`] has just given.
    pub(crate) fn version(&self) -> LogIndex {
        self.front.as_ref().map_or(LogIndex(0), Merge::index)
    }

    /// The next pair from the high end.
    ///
    /// # Cancel safety
    /// Cancel safe: a pair that was not given is given by the next call.
    pub(crate) async fn next_back(&mut self) -> Result<Option<(Bytes, Bytes)>> {
        if self.finished {
            return Ok(None);
        }
        self.leave_visited();
        if self.back.is_none() {
            let (lower, upper) = (bytes(&self.lower), bytes(&self.upper));
            let mut merge = self.view.merge(self.at, true, lower, upper);
            merge.seek(upper).await?;
            self.back = Some(merge);
        }
        let Some(merge) = &mut self.back else { return Ok(None) };
        while merge.next().await? {
            if above(merge.key(), bytes(&self.lower)) {
                break;
            }
            if let Some(value) = merge.value()? {
                let key = cut_key(&mut self.keys, merge.key());
                self.upper = Bound::Excluded(key.clone());
                return Ok(Some((key, value)));
            }
        }
        self.finished = true;
        Ok(None)
    }

    /// Moves the low end up to the first key at or after `key`. A key below the low end moves nothing: what was given is
    /// not given again.
    ///
    /// # Cancel safety
    /// Cancel safe: the low end has moved.
    pub(crate) async fn seek(&mut self, key: &[u8]) -> Result<()> {
        self.leave_visited();
        if !above(key, bytes(&self.lower)) {
            self.lower = Bound::Included(Bytes::copy_from_slice(key));
            if let Some(mut merge) = self.front.take() {
                merge.seek(bytes(&self.lower)).await?;
                self.front = Some(merge);
            }
        }
        Ok(())
    }
}

/// A copy of a key in memory that keys share, so that a scan does not allocate for each.
fn cut_key(piece: &mut BytesMut, key: &[u8]) -> Bytes {
    if piece.capacity() - piece.len() < key.len() {
        *piece = BytesMut::with_capacity(KEY_PIECE_BYTES.max(key.len()));
    }
    piece.extend_from_slice(key);
    piece.split().freeze()
}
