//! Builds a table from entries in key order.
//!
//! # Place
//! used by flush and compaction, which write the chunks as they come
//! # Invariants
//! T1. Equal options and equal entries give equal bytes: nothing of time, addresses or chance goes into them.
//! T2. Memory is bounded by one data block, one index block, the hashes of one filter partition, the top index, the block of
//!     range tombstones, and the chunks that were not yet taken; with zstd also its context, some 300 KiB for blocks of the usual size.

use bytes::Bytes;
use mainstay_io::{AlignedBuf, AlignedBytes, BLOCK_BYTES};
use xxhash_rust::xxh3::Xxh3;

use super::block::{BlockBuilder, EntryKind, INDEX_RESTART_INTERVAL};
use super::codec::Compressor;
use super::index::{
    Codec, FEATURE_FILTERS_12, FEATURE_MERGES, FEATURE_RANGES, FEATURE_ZSTD, FOOTER_BYTES, Handle, MAGIC, Parts,
    ROOT_BYTES, Root, checksum, separator,
};
use super::ranges::RangesBuilder;
use super::{Compression, TableMeta, TableOptions, filter};
use crate::LogIndex;
use crate::range_tombstone::RangeTombstone;

/// Bytes of a chunk; the last one may be shorter.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;
/// An index block is cut at this size.
pub(crate) const INDEX_BLOCK_BYTES: usize = 16 << 10;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(ROOT_BYTES + 8 + MAGIC.len() == FOOTER_BYTES);

/// Builds a table. Take the chunks while adding, so that they do not pile up.
pub(crate) struct TableBuilder {
    options: TableOptions,
    out: Output,
    data: BlockBuilder,
    /// The last data block, whose index entry waits for the first key of the next.
    unreferred: Option<Handle>,
    index: BlockBuilder,
    top: BlockBuilder,
    levels: u16,
    hashes: Vec<u64>,
    filters: BlockBuilder,
    first: Vec<u8>,
    last: Vec<u8>,
    entries: u64,
    tombstones: u64,
    raw_bytes: u64,
    index_min: u64,
    index_max: u64,
    ranges: RangesBuilder,
}

impl TableBuilder {
    /// A builder without entries.
    pub(crate) fn new(options: TableOptions) -> Self {
        Self {
            data: BlockBuilder::data(options.restart_bytes),
            options,
            out: Output::new(),
            unreferred: None,
            index: BlockBuilder::new(INDEX_RESTART_INTERVAL),
            top: BlockBuilder::new(INDEX_RESTART_INTERVAL),
            levels: 1,
            hashes: Vec::new(),
            filters: BlockBuilder::new(INDEX_RESTART_INTERVAL),
            first: Vec::new(),
            last: Vec::new(),
            entries: 0,
            tombstones: 0,
            raw_bytes: 0,
            index_min: u64::MAX,
            index_max: 0,
            ranges: RangesBuilder::new(),
        }
    }

    /// Adds the newest version of a key; keys ascend strictly. `None` is a tombstone.
    pub(crate) fn add(&mut self, key: &[u8], index: LogIndex, value: Option<&[u8]>) {
        let kind = if value.is_some() { EntryKind::Value } else { EntryKind::Tombstone };
        self.add_entry(key, index, kind, value.unwrap_or_default());
    }

    /// As [`TableBuilder::add`], of any kind that stands among entries.
    pub(crate) fn add_entry(&mut self, key: &[u8], index: LogIndex, kind: EntryKind, value: &[u8]) {
        assert!(self.entries == 0 || self.last.as_slice() < key, "keys of a table ascend strictly");
        if self.entries == 0 {
            self.first.extend_from_slice(key);
        }
        if !self.data.is_empty() && self.data.len() + key.len() + value.len() > self.options.block_bytes {
            self.cut_data();
        }
        if let Some(handle) = self.unreferred.take() {
            let separator = separator(&self.last, key);
            self.refer(&separator, handle);
        }
        self.data.add(key, kind, index, value);
        if matches!(kind, EntryKind::Operand | EntryKind::Failed) {
            self.out.features |= FEATURE_MERGES;
        }
        self.last.clear();
        self.last.extend_from_slice(key);
        self.entries += 1;
        self.tombstones += u64::from(kind == EntryKind::Tombstone);
        self.index_min = self.index_min.min(index.0);
        self.index_max = self.index_max.max(index.0);
        if self.options.filter_bits > 0 {
            self.hashes.push(filter::hash(key));
            if self.hashes.len() == filter::PARTITION_KEYS {
                self.cut_filter();
            }
        }
    }

    /// Adds a range tombstone: in order and without overlap, each before the entries behind its start. What it hides is not added.
    pub(crate) fn add_range(&mut self, tombstone: RangeTombstone) {
        self.ranges.add(tombstone);
    }

    /// True when the table is to be cut before `next`, an entry or the start of a range tombstone.
    pub(crate) fn is_full(&self, table_bytes: u64, next: &[u8]) -> bool {
        // What the last range has left over from the table before is not enough to make one.
        let has_own = self.entries > 0 || self.ranges.has_more_than_one();
        self.may_be_cut(next) && (has_own && self.estimated_bytes() >= table_bytes || self.ranges.is_full())
    }

    /// False where a range tombstone has just begun.
    pub(crate) fn may_be_cut(&self, next: &[u8]) -> bool {
        self.ranges.may_be_cut(next, &self.last)
    }

    /// Ends the table before `next`, where it may be cut. The part of the last range tombstone that is left for the
    /// next table begins behind every key of this one, so that the two do not overlap.
    pub(crate) fn cut(&mut self, next: &[u8]) -> Option<RangeTombstone> {
        self.ranges.cut(next, (self.entries > 0).then_some(self.last.as_slice()))
    }

    /// About the length that `finish` would give now; the open block counts uncompressed.
    pub(crate) fn estimated_bytes(&self) -> u64 {
        let open = self.data.len()
            + self.index.len()
            + self.top.len()
            + self.filters.len()
            + self.ranges.bytes()
            + FOOTER_BYTES;
        let filter = self.hashes.len() * usize::from(self.options.filter_bits) * 5 / 32;
        self.out.length + (open + filter) as u64
    }

    /// Finished bytes in order, each a whole number of [`BLOCK_BYTES`], to be written one after the other.
    pub(crate) fn take_chunks(&mut self) -> Vec<AlignedBytes> {
        std::mem::take(&mut self.out.chunks)
    }

    /// The remaining chunks, and what names the table.
    ///
    /// At least one entry or range tombstone was added.
    pub(crate) fn finish(mut self) -> (Vec<AlignedBytes>, TableMeta) {
        let ranges = std::mem::replace(&mut self.ranges, RangesBuilder::new()).finish();
        if let (0, Some(ranges)) = (self.entries, &ranges) {
            // Says again what the first one says, since a table has an entry.
            let (key, index) = ranges.first();
            self.add(&key, index, None);
        }
        if let Some(ranges) = &ranges {
            self.index_min = self.index_min.min(ranges.indexes.0);
            self.index_max = self.index_max.max(ranges.indexes.1);
        }
        assert!(self.entries > 0, "a table has an entry");
        self.cut_data();
        if let Some(handle) = self.unreferred.take() {
            let last = std::mem::take(&mut self.last);
            self.refer(&last, handle);
            self.last = last;
        }
        if !self.hashes.is_empty() {
            self.cut_filter();
        }
        let top = if self.levels == 1 {
            let block = self.index.finish();
            self.out.block(&block, self.options.compression)
        } else {
            if !self.index.is_empty() {
                self.cut_index();
            }
            let block = self.top.finish();
            self.out.block(&block, self.options.compression)
        };
        let filters = if self.filters.is_empty() {
            None
        } else {
            let block = self.filters.finish();
            Some(self.out.block(&block, self.options.compression))
        };
        let parts = ranges.as_ref().map(|ranges| {
            let block = self.out.block(&ranges.block, self.options.compression);
            let mut parts = BlockBuilder::new(INDEX_RESTART_INTERVAL);
            let all = Parts { filters, ranges: Some(block) };
            all.entries().for_each(|(name, handle)| add_handle(&mut parts, name, handle));
            self.out.features |= FEATURE_RANGES;
            self.out.block(&parts.finish(), self.options.compression)
        });
        let bytes = (self.out.length + FOOTER_BYTES as u64).next_multiple_of(BLOCK_BYTES as u64);
        let root = Root {
            levels: self.levels,
            features: self.out.features,
            entries: self.entries,
            tombstones: self.tombstones,
            raw_bytes: self.raw_bytes,
            index_min: self.index_min,
            index_max: self.index_max,
            top,
            filters: parts.or(filters),
            bytes,
        }
        .encode();
        let (chunks, digest) = self.out.finish(bytes, &root);
        let (first, last) = (Bytes::from(self.first), Bytes::from(self.last));
        let meta = TableMeta {
            first: ranges.as_ref().map_or(first.clone(), |ranges| ranges.first().0.min(first)),
            last: ranges.as_ref().map_or(last.clone(), |ranges| ranges.last().max(last)),
            entries: self.entries,
            tombstones: self.tombstones,
            bytes,
            digest,
            root,
            ranges: ranges.map(|ranges| ranges.meta).unwrap_or_default(),
        };
        (chunks, meta)
    }

    fn cut_data(&mut self) {
        debug_assert!(self.unreferred.is_none(), "a block is referred to before the next is cut");
        let block = self.data.finish();
        self.raw_bytes += block.len() as u64;
        self.unreferred = Some(self.out.block(&block, self.options.compression));
        self.data.recycle(block);
    }

    /// Adds an index entry, and cuts the index block when it is full.
    fn refer(&mut self, separator: &[u8], handle: Handle) {
        if self.index.len() >= INDEX_BLOCK_BYTES {
            self.cut_index();
        }
        add_handle(&mut self.index, separator, handle);
    }

    fn cut_index(&mut self) {
        self.levels = 2;
        let last = self.index.last().to_vec();
        let block = self.index.finish();
        let handle = self.out.block(&block, self.options.compression);
        self.index.recycle(block);
        add_handle(&mut self.top, &last, handle);
    }

    fn cut_filter(&mut self) {
        let filter = filter::build(std::mem::take(&mut self.hashes), self.options.filter_bits);
        if self.options.filter_bits == 12 {
            self.out.features |= FEATURE_FILTERS_12;
        }
        // Fingerprints are noise: no compressor makes them smaller.
        let handle = self.out.block(&filter, Compression::None);
        add_handle(&mut self.filters, &self.last, handle);
    }
}

fn add_handle(block: &mut BlockBuilder, key: &[u8], handle: Handle) {
    let mut value = Vec::with_capacity(32);
    handle.put(&mut value);
    block.add(key, EntryKind::Value, LogIndex(0), &value);
}

/// Cuts the bytes of the table into chunks and digests them.
struct Output {
    chunks: Vec<AlignedBytes>,
    open: Option<(AlignedBuf, usize)>,
    length: u64,
    digest: Xxh3,
    compressor: Compressor,
    /// What a reader must know to read what was written.
    features: u32,
}

impl Output {
    fn new() -> Self {
        Self {
            chunks: Vec::new(),
            open: None,
            length: 0,
            digest: Xxh3::new(),
            compressor: Compressor::default(),
            features: 0,
        }
    }

    /// Appends a block and returns its handle.
    fn block(&mut self, raw: &[u8], compression: Compression) -> Handle {
        let mut compressor = std::mem::take(&mut self.compressor);
        let (stored, raw) = match compressor.compress(raw, compression) {
            Some((codec, packed)) => {
                if codec == Codec::Zstd {
                    self.features |= FEATURE_ZSTD;
                }
                (packed, Handle::raw_of(codec, raw.len()))
            }
            None => (raw, 0),
        };
        let handle = Handle { offset: self.length, stored: stored.len() as u32, raw, checksum: checksum(stored) };
        self.write(stored);
        self.compressor = compressor;
        handle
    }

    fn write(&mut self, mut bytes: &[u8]) {
        self.digest.update(bytes);
        self.length += bytes.len() as u64;
        while !bytes.is_empty() {
            let (mut buf, filled) = self.open.take().unwrap_or_else(|| (AlignedBuf::zeroed(CHUNK_BYTES), 0));
            let take = bytes.len().min(CHUNK_BYTES - filled);
            buf[filled..filled + take].copy_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if filled + take == CHUNK_BYTES {
                self.chunks.push(buf.freeze());
            } else {
                self.open = Some((buf, filled + take));
            }
        }
    }

    /// Appends zeros and the footer so that the table has `bytes` bytes.
    fn finish(mut self, bytes: u64, root: &Bytes) -> (Vec<AlignedBytes>, u128) {
        let zeros = bytes - FOOTER_BYTES as u64 - self.length;
        self.write(&[0; BLOCK_BYTES][..zeros as usize]);
        let mut footer = [0; FOOTER_BYTES];
        footer[..ROOT_BYTES].copy_from_slice(root);
        footer[FOOTER_BYTES - MAGIC.len()..].copy_from_slice(&MAGIC);
        self.write(&footer);
        if let Some((buf, filled)) = self.open.take() {
            self.chunks.push(buf.freeze().slice(0..filled));
        }
        (self.chunks, self.digest.digest128())
    }
}
