//! An open table: point lookups, and the blocks for its cursors.
//!
//! # Place
//! below `read`; fills the block cache
//! # Invariants
//! R1. No byte is looked at before it matched the checksum in its referrer; the first referrer is the root in the manifest.
//! R2. A lookup is ready at its first poll when its blocks are cached and the top index has been read once.
//! R3. Bytes that do not match, or cannot be read, are asked of the other copies of the table, if there are any, before a
//!     read fails. What they give is checked in the same way (R1).
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::block::{Block, BlockCursor, EntryKind, Malformed};
use super::filter::Filter;
use super::index::{FOOTER_BYTES, Handle, MAGIC, Parts, ROOT_BYTES, Root};
use super::{TableBytes, TableMeta, codec, filter, ranges};
use crate::cache::BlockCache;
use crate::gather::Gather;
use crate::memory::{MemoryBudget, MemoryKind, Reservation};
use crate::range_tombstone::{Fragments, last_before};
use crate::read::Lookup;
use crate::{Error, ErrorKind, LogIndex, Result};

/// A value of at most this length is copied out of its block, so that it does not keep the block in memory.
const COPY_BYTES_MAX: usize = 128;
/// Other copies that one read asks at most.
const COPIES_ASKED_MAX: usize = 16;
/// Bytes of one read of `verify`.
const VERIFY_READ_BYTES: usize = 1 << 20;

/// A verified block in memory, as the cache holds it.
#[derive(Clone, Debug)]
pub(crate) enum CachedBlock {
    /// Data or index.
    Block(Block),
    /// A filter partition.
    Filter(Filter),
}

impl CachedBlock {
    /// Bytes that it holds.
    pub(crate) fn memory_bytes(&self) -> u64 {
        match self {
            Self::Block(block) => block.memory_bytes(),
            Self::Filter(filter) => filter.len() as u64,
        }
    }
}

/// A top index or filter index, kept as long as the table is open.
struct Pinned {
    block: Block,
    _memory: Reservation,
}

/// The range tombstones, kept as long as the table is open.
struct PinnedRanges {
    fragments: Fragments,
    _memory: Reservation,
}

/// An open table.
pub(crate) struct Table {
    meta: TableMeta,
    root: Root,
    bytes: Arc<dyn TableBytes>,
    cache: Arc<BlockCache>,
    budget: Arc<MemoryBudget>,
    /// The table's number in the cache.
    owner: u64,
    top: OnceLock<Pinned>,
    filters: OnceLock<Pinned>,
    /// Only of a table with range tombstones.
    parts: OnceLock<Parts>,
    ranges: OnceLock<PinnedRanges>,
}

impl Table {
    /// Opens a table. Nothing is read: top index and filter index are read when they are first needed, and kept.
    ///
    /// # Errors
    /// `Corrupt` when the root is damaged or contradicts `meta`, `Foreign` when it is of a newer format.
    pub(crate) fn open(
        meta: TableMeta,
        bytes: Arc<dyn TableBytes>,
        cache: &Arc<BlockCache>,
        budget: &Arc<MemoryBudget>,
    ) -> Result<Self> {
        let root = Root::decode(&meta.root).map_err(|error| match error {
            None => Error::new(ErrorKind::Foreign, "the table is of a newer format; use a newer release"),
            Some(Malformed(what)) => Error::new(ErrorKind::Corrupt, format!("the table has {what}")),
        })?;
        if root.bytes != meta.bytes
            || root.entries != meta.entries
            || root.tombstones != meta.tombstones
            || root.has_ranges() != (meta.ranges.tombstones > 0)
        {
            return Err(Error::new(ErrorKind::Corrupt, "the root of a table contradicts the manifest"));
        }
        Ok(Self {
            meta,
            root,
            bytes,
            cache: cache.clone(),
            budget: budget.clone(),
            owner: cache.owner(),
            top: OnceLock::new(),
            filters: OnceLock::new(),
            parts: OnceLock::new(),
            ranges: OnceLock::new(),
        })
    }

    /// What names the table.
    pub(crate) fn meta(&self) -> &TableMeta {
        &self.meta
    }

    /// It has range tombstones.
    pub(crate) fn has_ranges(&self) -> bool {
        self.root.has_ranges()
    }

    /// Its range tombstones, read when they are first asked for.
    ///
    /// # Errors
    /// As [`Table::get_version`].
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn ranges(&self) -> Result<&Fragments> {
        self.ranges_by(None).await
    }

    async fn ranges_by(&self, reads: Option<&Gather>) -> Result<&Fragments> {
        static NONE: Fragments = Fragments::none();
        if !self.root.has_ranges() {
            return Ok(&NONE);
        }
        if let Some(pinned) = self.ranges.get() {
            return Ok(&pinned.fragments);
        }
        let Some(handle) = self.parts(reads).await?.ranges else { return Ok(&NONE) };
        let parse = |stored: &Bytes| {
            let decoded = codec::open(stored, &handle).and_then(ranges::decode);
            decoded.map_err(|error| self.corrupt(error, &handle))
        };
        let fragments = self.sound(&handle, parse, reads).await?;
        let memory = self.budget.reserve(MemoryKind::Table, fragments.memory_bytes());
        Ok(&self.ranges.get_or_init(|| PinnedRanges { fragments, _memory: memory }).fragments)
    }

    /// The newest removal with an index of at most `at` of a range that holds `key`; 0 for none. As [`Table::get_version_by`] with `reads`.
    ///
    /// # Errors
    /// As [`Table::get_version`].
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn hidden_below(&self, key: &[u8], at: LogIndex, reads: Option<&Gather>) -> Result<LogIndex> {
        if !self.root.has_ranges() || !self.covers(key) {
            return Ok(LogIndex(0));
        }
        Ok(self.ranges_by(reads).await?.at(key).filter(|one| one.index <= at).map_or(LogIndex(0), |one| one.index))
    }

    /// Lowest and highest index of an entry or range tombstone.
    pub(crate) fn indexes(&self) -> (LogIndex, LogIndex) {
        (LogIndex(self.root.index_min), LogIndex(self.root.index_max))
    }

    /// The key may be in the table: it is not outside of its first and last key.
    pub(crate) fn covers(&self, key: &[u8]) -> bool {
        self.meta.first.as_ref() <= key && key <= self.meta.last.as_ref()
    }

    /// The version of a key in this table, if its index is at most `at`, without that index.
    ///
    /// # Errors
    /// As [`Table::get_version`].
    pub(crate) async fn get(&self, key: &[u8], at: LogIndex) -> Result<Option<Lookup>> {
        Ok(self.get_version(key, at).await?.map(|(_, lookup)| lookup))
    }

    /// The version of a key in this table, if its index is at most `at`.
    ///
    /// # Errors
    /// `Corrupt` when a block does not match its checksum, and the errors of reading.
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn get_version(&self, key: &[u8], at: LogIndex) -> Result<Option<(LogIndex, Lookup)>> {
        self.get_version_by(key, at, None).await
    }

    /// As [`Table::get_version`], with what is not cached added to `reads`, if given, instead of read at once.
    pub(crate) async fn get_version_by(
        &self,
        key: &[u8],
        at: LogIndex,
        reads: Option<&Gather>,
    ) -> Result<Option<(LogIndex, Lookup)>> {
        if !self.covers(key) || self.root.index_min > at.0 {
            return Ok(None);
        }
        let filters = if self.root.has_ranges() { self.parts(reads).await?.filters } else { self.root.filters };
        if let Some(handle) = filters {
            let filters = match self.filters.get() {
                Some(pinned) => &pinned.block,
                None => self.filter_index(&handle, reads).await?,
            };
            let Some(found) = filters.search(key).map_err(|error| self.corrupt(error, &handle))? else {
                if self.root.has_ranges() {
                    // Behind the last entry, and at most before the end of a range tombstone.
                    return Ok(None);
                }
                // Partitions reach to the last key, which `covers` has compared.
                return Err(self.corrupt(Malformed("a filter index that ends before the last key"), &handle));
            };
            let handle = self.handle(filters.part(&found.value), &handle)?;
            if !self.filter(&handle, reads).await?.may_contain(filter::hash(key)) {
                return Ok(None);
            }
        }
        let top = match self.top.get() {
            Some(pinned) => &pinned.block,
            None => self.pinned(&self.top, &self.root.top, reads).await?,
        };
        let Some(mut handle) = self.child(top, key, &self.root.top)? else { return Ok(None) };
        if self.root.levels == 2 {
            let index = self.block_by(&handle, reads).await?;
            match self.child(&index, key, &handle)? {
                Some(child) => handle = child,
                None => return Ok(None),
            }
        }
        let block = self.block_by(&handle, reads).await?;
        let found = block.search(key).map_err(|error| self.corrupt(error, &handle))?;
        let Some(found) = found.filter(|found| found.exact && found.index <= at) else { return Ok(None) };
        let lookup = match found.kind {
            EntryKind::Tombstone => Lookup::Deleted,
            EntryKind::Value => Lookup::Value(taken(&block, found.value)),
            EntryKind::Operand => Lookup::Operand(taken(&block, found.value)),
            EntryKind::Failed => Lookup::Failed,
            EntryKind::RangeTombstone => return Err(self.corrupt(Malformed("a range among its entries"), &handle)),
        };
        Ok(Some((found.index, lookup)))
    }

    /// Reads every byte and checks it: the digest, every checksum, order, counts, first and last key, the filters, and
    /// the footer.
    ///
    /// # Errors
    /// `Corrupt` names what does not match.
    pub(crate) async fn verify(&self) -> Result<()> {
        let mut digest = Xxh3::new();
        let mut footer = Vec::new();
        let mut offset = 0u64;
        while offset < self.meta.bytes {
            let length = self.meta.bytes.saturating_sub(offset).min(VERIFY_READ_BYTES as u64) as usize;
            let bytes = self.read(offset, length).await?;
            digest.update(&bytes);
            offset = offset.saturating_add(length as u64);
            // The footer may stand across two reads when the length says so; keep the tail of both.
            footer.extend_from_slice(bytes.get(bytes.len().saturating_sub(FOOTER_BYTES)..).unwrap_or_default());
            footer.drain(..footer.len().saturating_sub(FOOTER_BYTES));
        }
        let whole = Handle { offset: 0, stored: 0, raw: 0, checksum: 0 };
        if digest.digest128() != self.meta.digest {
            return Err(self.corrupt(Malformed("bytes that do not match its digest"), &whole));
        }
        let root_again = footer.get(..ROOT_BYTES) == Some(&self.meta.root);
        if !root_again || !footer.ends_with(&MAGIC) {
            return Err(self.corrupt(Malformed("a footer that is not its root"), &whole));
        }
        let (mut entries, mut tombstones) = (0u64, 0u64);
        let (mut first, mut last): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
        let ranges = self.ranges().await?;
        let filters = self.parts(None).await?.filters;
        let mut cursor = super::TableCursor::new_bypass(self);
        cursor.seek_start(self).await?;
        while cursor.valid() {
            let key = cursor.key();
            if entries == 0 {
                first.extend_from_slice(key);
            }
            if entries > 0 && key <= last.as_slice() {
                return Err(self.corrupt(Malformed("keys that do not ascend"), &whole));
            }
            if !(self.root.index_min..=self.root.index_max).contains(&cursor.index().0) {
                return Err(self.corrupt(Malformed("an entry outside of the indexes of the root"), &whole));
            }
            if ranges.at(key).is_some_and(|one| cursor.index() < one.index) {
                return Err(self.corrupt(Malformed("an entry that a range tombstone of its own hides"), &whole));
            }
            let merge = matches!(cursor.kind(), EntryKind::Operand | EntryKind::Failed);
            if merge && !self.root.has_merges() {
                return Err(self.corrupt(Malformed("a merge that its root does not tell of"), &whole));
            }
            if cursor.kind() == EntryKind::Operand && ranges.at(key).is_some() {
                return Err(self.corrupt(Malformed("an operand over a range tombstone of its own"), &whole));
            }
            if let Some(handle) = filters {
                let filters = self.filter_index(&handle, None).await?;
                let found = filters.search(key).map_err(|error| self.corrupt(error, &handle))?;
                let child = found.map(|found| self.handle(filters.part(&found.value), &handle)).transpose()?;
                let known = match child {
                    Some(handle) => self.filter(&handle, None).await?.may_contain(filter::hash(key)),
                    None => false,
                };
                if !known {
                    return Err(self.corrupt(Malformed("a filter that denies a key"), &handle));
                }
            }
            last.clear();
            last.extend_from_slice(key);
            entries = entries.saturating_add(1);
            tombstones = tombstones.saturating_add(u64::from(cursor.is_tombstone()));
            cursor.advance(self).await?;
        }
        if let (Some(low), Some(high)) = (ranges.iter().next(), ranges.iter().next_back()) {
            first = first.min(low.range.start().to_vec());
            last = last.max(last_before(high.range.end_place()).to_vec());
            let indexes = self.root.index_min..=self.root.index_max;
            if !ranges.iter().all(|one| indexes.contains(&one.index.0)) {
                return Err(self.corrupt(Malformed("a range tombstone outside of the indexes of the root"), &whole));
            }
        }
        let spans = &self.meta.ranges.spans;
        if ranges.iter().len() as u64 != self.meta.ranges.tombstones || !spans.iter().all(|span| ranges.hide(span)) {
            return Err(self.corrupt(Malformed("other range tombstones than the manifest says"), &whole));
        }
        if first != self.meta.first.as_ref() {
            return Err(self.corrupt(Malformed("another first key than the manifest says"), &whole));
        }
        if last != self.meta.last.as_ref() || entries != self.meta.entries || tombstones != self.meta.tombstones {
            return Err(self.corrupt(Malformed("another last key or other counts than the manifest says"), &whole));
        }
        Ok(())
    }

    pub(super) fn levels(&self) -> u16 {
        self.root.levels
    }

    pub(super) fn budget(&self) -> &Arc<MemoryBudget> {
        &self.budget
    }

    /// The top index.
    pub(super) async fn top(&self) -> Result<&Block> {
        self.pinned(&self.top, &self.root.top, None).await
    }

    /// What it has besides entries: of most tables the filter index, whose handle stands in the root.
    async fn parts(&self, reads: Option<&Gather>) -> Result<Parts> {
        if !self.root.has_ranges() {
            return Ok(Parts { filters: self.root.filters, ranges: None });
        }
        if let Some(parts) = self.parts.get() {
            return Ok(*parts);
        }
        let Some(handle) = self.root.filters else { return Ok(Parts::default()) };
        let block = self.load(&handle, reads).await?;
        let parts = Parts::find(&block, self.meta.bytes).map_err(|error| self.corrupt(error, &handle))?;
        if parts.ranges.is_none() {
            return Err(self.corrupt(Malformed("no range tombstones where its root says that there are some"), &handle));
        }
        Ok(*self.parts.get_or_init(|| parts))
    }

    async fn filter_index(&self, handle: &Handle, reads: Option<&Gather>) -> Result<&Block> {
        self.pinned(&self.filters, handle, reads).await
    }

    async fn pinned<'a>(
        &self,
        slot: &'a OnceLock<Pinned>,
        handle: &Handle,
        reads: Option<&Gather>,
    ) -> Result<&'a Block> {
        if let Some(pinned) = slot.get() {
            return Ok(&pinned.block);
        }
        let block = self.load(handle, reads).await?;
        let memory = self.budget.reserve(MemoryKind::Table, block.memory_bytes());
        Ok(&slot.get_or_init(|| Pinned { block, _memory: memory }).block)
    }

    /// A block, from the cache or read into it.
    pub(super) async fn block(&self, handle: &Handle) -> Result<Block> {
        self.block_by(handle, None).await
    }

    async fn block_by(&self, handle: &Handle, reads: Option<&Gather>) -> Result<Block> {
        let cached = match self.cache.get(self.owner, handle.offset) {
            Some(cached) => cached,
            None => {
                let load = async { Ok(CachedBlock::Block(self.load(handle, reads).await?)) };
                self.cache.get_or_load(self.owner, handle.offset, load).await?
            }
        };
        match cached {
            CachedBlock::Block(block) => Ok(block),
            CachedBlock::Filter(_) => Err(self.corrupt(Malformed("a filter where a block should be"), handle)),
        }
    }

    /// A block, if it is cached.
    pub(super) fn cached(&self, handle: &Handle) -> Option<Block> {
        match self.cache.get(self.owner, handle.offset) {
            Some(CachedBlock::Block(block)) => Some(block),
            _ => None,
        }
    }

    /// Puts in what was read ahead.
    pub(super) fn cache(&self, handle: &Handle, block: &Block) {
        self.cache.insert(self.owner, handle.offset, CachedBlock::Block(block.clone()));
    }

    async fn filter(&self, handle: &Handle, reads: Option<&Gather>) -> Result<Filter> {
        let cached = match self.cache.get(self.owner, handle.offset) {
            Some(cached) => cached,
            None => {
                let parse = |stored: &Bytes| {
                    let bytes = codec::open(stored, handle).map(own).map_err(|error| self.corrupt(error, handle))?;
                    Ok(CachedBlock::Filter(Filter::parse(bytes).map_err(|error| self.corrupt(error, handle))?))
                };
                self.cache.get_or_load(self.owner, handle.offset, self.sound(handle, parse, reads)).await?
            }
        };
        match cached {
            CachedBlock::Filter(filter) => Ok(filter),
            CachedBlock::Block(_) => Err(self.corrupt(Malformed("a block where a filter should be"), handle)),
        }
    }

    async fn load(&self, handle: &Handle, reads: Option<&Gather>) -> Result<Block> {
        self.sound(handle, |stored| self.decode(stored, handle, true), reads).await
    }

    /// What `parse` makes of the bytes of `handle` (R3): from here, from here once more, since a misread goes away by
    /// itself, or from another copy.
    async fn sound<T>(
        &self,
        handle: &Handle,
        parse: impl Fn(&Bytes) -> Result<T>,
        reads: Option<&Gather>,
    ) -> Result<T> {
        let length = handle.stored as usize;
        let mut outcome = self.read_by(handle.offset, length, reads).await.and_then(|bytes| parse(&bytes));
        if outcome.as_ref().is_err_and(is_damage) {
            outcome = self.read_by(handle.offset, length, reads).await.and_then(|bytes| parse(&bytes));
        }
        let error = match outcome {
            Err(error) if is_damage(&error) => error,
            outcome => return outcome,
        };
        let copies = self.bytes.found_damaged().min(COPIES_ASKED_MAX);
        let mut damaged: usize = 0;
        for copy in 0..copies {
            let read = self.bytes.read_elsewhere(copy, handle.offset, length).await;
            let read = read.and_then(|bytes| parse(&bytes));
            match read {
                Ok(found) => {
                    self.bytes.served_elsewhere();
                    return Ok(found);
                }
                Err(other) => {
                    damaged = damaged.saturating_add(usize::from(is_damage(&other)));
                    tracing::debug!(copy, %other, "another copy of a block cannot be had");
                }
            }
        }
        if copies == 0 {
            return Err(error);
        }
        let (digest, offset) = (self.meta.digest, handle.offset);
        // Who does not answer may later, and who holds the table no more has what took its place: so will this replica.
        let kind = if damaged == copies { error.kind() } else { ErrorKind::Unavailable };
        Err(Error::new(
            kind,
            format!(
                "{error}; of {copies} other copies {damaged} are damaged, the rest cannot be had now digest={digest:032x} \
                 offset={offset}"
            ),
        ))
    }

    /// As [`Table::sound`], for a block of which bytes were read that do not match: to be cached or not.
    pub(super) async fn load_again(&self, handle: &Handle, to_be_cached: bool) -> Result<Block> {
        self.sound(handle, |stored| self.decode(stored, handle, to_be_cached), None).await
    }

    /// Verifies and parses stored bytes. To be cached, a block that is stored raw leaves the buffer it was read into.
    pub(super) fn decode(&self, stored: &Bytes, handle: &Handle, to_be_cached: bool) -> Result<Block> {
        let bytes = codec::open(stored, handle).map_err(|error| self.corrupt(error, handle))?;
        let bytes = if handle.raw == 0 && to_be_cached { own(bytes) } else { bytes };
        Block::parse(bytes).map_err(|error| self.corrupt(error, handle))
    }

    pub(super) async fn read(&self, offset: u64, length: usize) -> Result<Bytes> {
        self.read_by(offset, length, None).await
    }

    async fn read_by(&self, offset: u64, length: usize, reads: Option<&Gather>) -> Result<Bytes> {
        let read = match reads {
            Some(reads) => self.bytes.read_in(offset, length, reads),
            None => self.bytes.read(offset, length),
        };
        let bytes = read.await?;
        if bytes.len() == length {
            return Ok(bytes);
        }
        Err(Error::new(
            ErrorKind::Internal,
            format!("a table read gave another length offset={offset} length={length} given={}", bytes.len()),
        ))
    }

    /// The handle of the child in which `key` would be; none when it is above all.
    fn child(&self, index: &Block, key: &[u8], of: &Handle) -> Result<Option<Handle>> {
        let found = index.search(key).map_err(|error| self.corrupt(error, of))?;
        found.map(|found| self.handle(index.part(&found.value), of)).transpose()
    }

    /// Decodes a handle that stands in the block `of`.
    pub(super) fn handle(&self, bytes: &[u8], of: &Handle) -> Result<Handle> {
        Handle::take(bytes, self.meta.bytes).map_err(|error| self.corrupt(error, of))
    }

    /// The handle at which a cursor over an index stands.
    pub(super) fn handle_at(&self, index: &BlockCursor) -> Result<Handle> {
        Handle::take(index.value_part(), self.meta.bytes).map_err(|error| self.corrupt(error, &self.root.top))
    }

    pub(super) fn corrupt(&self, Malformed(what): Malformed, handle: &Handle) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "the table has {what}; run verify and restore this replica digest={:032x} offset={} length={}",
                self.meta.digest, handle.offset, handle.stored
            ),
        )
    }
}

/// A failure of this copy of the bytes, for which another copy may stand in.
pub(super) fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io)
}

/// A value of a block; a short one in memory of its own.
fn taken(block: &Block, value: std::ops::Range<usize>) -> Bytes {
    match value.len() {
        0..=COPY_BYTES_MAX => Bytes::copy_from_slice(block.part(&value)),
        _ => block.slice(value),
    }
}

/// The same bytes in memory of their own, so that they do not keep a larger buffer.
fn own(bytes: Bytes) -> Bytes {
    Bytes::copy_from_slice(&bytes)
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("meta", &self.meta).field("root", &self.root).finish_non_exhaustive()
    }
}
