//! The block of range tombstones of a table.
//!
//! # Format
//! docs/format.md, "Range tombstones"
//! # Invariants
//! 1. One block holds all of them: a table is cut when it is full.
//! 2. Two tables, one cut off the other, do not overlap, though the end of a range is not in it and the last key of a table is: what is
//!    left of a range goes on right behind a key of the first table.

use bytes::Bytes;

use super::block::{Block, BlockBuilder, BlockCursor, EntryKind, INDEX_RESTART_INTERVAL, Malformed};
use crate::LogIndex;
use crate::command::{KEY_BYTES_MAX, TableRanges};
use crate::range_tombstone::{Fragments, KeyRange, RangeTombstone, behind, last_before};

/// A table is cut when its range tombstones take so many bytes.
const RANGES_BYTES_MAX: usize = 1 << 20;
/// Of what range tombstones hide the manifest keeps so many ranges for each table.
pub(crate) const SPANS_MAX: usize = 8;
/// The manifest keeps none whose bounds are longer than this together.
pub(crate) const SPAN_BYTES_MAX: usize = 512;

/// What a table with range tombstones has of them.
pub(super) struct BuiltRanges {
    pub(super) block: Vec<u8>,
    pub(super) meta: TableRanges,
    first: (Bytes, LogIndex),
    last: Bytes,
    /// The lowest and the highest.
    pub(super) indexes: (u64, u64),
}

impl BuiltRanges {
    /// Where the first begins, and the entry that wrote it.
    pub(super) fn first(&self) -> (Bytes, LogIndex) {
        self.first.clone()
    }

    /// The last key that the last of them hides.
    pub(super) fn last(&self) -> Bytes {
        self.last.clone()
    }
}

/// Builds the block.
pub(super) struct RangesBuilder {
    block: BlockBuilder,
    meta: TableRanges,
    /// What the latest hide together as far as they touch; none that was closed touches it.
    span: Option<KeyRange>,
    first: Option<(Bytes, LogIndex)>,
    /// Where the last one that was closed ends.
    end: Bytes,
    indexes: (u64, u64),
    /// The last one, which may be cut yet.
    open: Option<RangeTombstone>,
}

impl RangesBuilder {
    pub(super) fn new() -> Self {
        let block = BlockBuilder::new(INDEX_RESTART_INTERVAL);
        Self {
            block,
            meta: TableRanges::default(),
            span: None,
            first: None,
            end: Bytes::new(),
            indexes: (u64::MAX, 0),
            open: None,
        }
    }

    pub(super) fn add(&mut self, tombstone: RangeTombstone) {
        self.close();
        self.open = Some(tombstone);
    }

    /// The length of the block.
    pub(super) fn bytes(&self) -> usize {
        let open = self.open.as_ref().map_or(0, |open| open.range.bytes());
        if self.block.is_empty() { open } else { self.block.len() + open }
    }

    pub(super) fn has_more_than_one(&self) -> bool {
        !self.block.is_empty()
    }

    /// False where the last one begins at `next`, for else the one before it, which may end there, would have to be cut again; and where it
    /// goes on there and has no place behind its start, since that is behind the longest key already. `last` is the last key of the table.
    pub(super) fn may_be_cut(&self, next: &[u8], last: &[u8]) -> bool {
        let Some(open) = &self.open else { return true };
        let start = open.range.start().as_ref();
        start != next && (is_before(&open.range, next) || last.max(start).len() <= KEY_BYTES_MAX)
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes() >= RANGES_BYTES_MAX
    }

    /// See [`super::TableBuilder::cut`]. `last` is the last key of the table.
    pub(super) fn cut(&mut self, next: &[u8], last: Option<&[u8]>) -> Option<RangeTombstone> {
        let open = self.open.as_mut()?;
        debug_assert!(open.range.start().as_ref() < next, "a table is not cut where its last range begins");
        if is_before(&open.range, next) {
            return None;
        }
        let last = last.unwrap_or_default().max(open.range.start());
        let place = behind(last);
        let rest = KeyRange::from_parts(place.clone(), Some(open.range.end_place().clone()));
        rest.check().ok()?;
        open.range = KeyRange::from_parts(open.range.start().clone(), Some(place));
        Some(RangeTombstone { range: rest, index: open.index })
    }

    /// None when nothing was added.
    pub(super) fn finish(mut self) -> Option<BuiltRanges> {
        self.close();
        self.close_span();
        let (first, last) = (self.first?, last_before(&self.end));
        Some(BuiltRanges { block: self.block.finish(), meta: self.meta, first, last, indexes: self.indexes })
    }

    fn close(&mut self) {
        let Some(RangeTombstone { range, index }) = self.open.take() else { return };
        self.first.get_or_insert_with(|| (range.start().clone(), index));
        self.end = range.end_place().clone();
        self.indexes = (self.indexes.0.min(index.0), self.indexes.1.max(index.0));
        let end = range.end().map_or(&[][..], |end| end);
        self.block.add(range.start(), EntryKind::RangeTombstone, index, end);
        self.meta.tombstones += 1;
        match &mut self.span {
            Some(span) if span.end_place() == range.start() => {
                *span = KeyRange::from_parts(span.start().clone(), Some(range.end_place().clone()));
            }
            _ => {
                self.close_span();
                self.span = Some(range);
            }
        }
    }

    fn close_span(&mut self) {
        let span = self.span.take().filter(|span| span.bytes() <= SPAN_BYTES_MAX);
        if self.meta.spans.len() < SPANS_MAX {
            self.meta.spans.extend(span);
        }
    }
}

/// A table that ends with the range does not overlap one that begins at `next`.
fn is_before(range: &KeyRange, next: &[u8]) -> bool {
    last_before(range.end_place()).as_ref() < next
}

/// Reads the whole block.
pub(super) fn decode(bytes: Bytes) -> Result<Fragments, Malformed> {
    let mut cursor = BlockCursor::new(Block::parse_ranges(bytes)?, false);
    let mut list = Vec::new();
    cursor.seek_start()?;
    while cursor.valid() {
        let end = cursor.value_part();
        let end = (!end.is_empty()).then(|| Bytes::copy_from_slice(end));
        let range = KeyRange::from_parts(Bytes::copy_from_slice(cursor.key()), end);
        list.push(RangeTombstone { range, index: cursor.index() });
        cursor.advance()?;
    }
    Fragments::new(list).ok_or(Malformed("range tombstones that overlap or are out of order"))
}
