//! Tables (signatures).
#![allow(dead_code, unused_variables)]
use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::{AlignedBytes, BoxFuture};

use crate::cache::BlockCache;
use crate::memory::MemoryBudget;
use crate::read::Lookup;
use crate::{LogIndex, Result};

/// Where the bytes of a table lie.
pub(crate) trait TableBytes: Send + Sync + 'static {
    /// Bytes `offset..offset + length`; any alignment. Exactly `length` bytes on success.
    fn read(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>>;
}

#[derive(Clone, Debug)]
pub(crate) struct CachedBlock {}
impl CachedBlock {
    pub(crate) fn memory_bytes(&self) -> u64 {
        todo!()
    }
}

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Stored as they are.
    None,
    /// lz4, where it saves at least 12 %.
    Lz4,
}

/// How a table is built. Equal options and equal input give equal bytes.
#[derive(Clone, Debug)]
pub(crate) struct TableOptions {
    /// A data block is cut when it has reached this size. Default 16 KiB.
    pub(crate) block_bytes: usize,
    /// See [`Compression`]. Default lz4.
    pub(crate) compression: Compression,
    /// Filter bits a key: 0 (none), 8 or 16. Default 8.
    pub(crate) filter_bits: u8,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self { block_bytes: 16 << 10, compression: Compression::Lz4, filter_bits: 8 }
    }
}

/// What names and verifies a finished table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TableMeta {
    /// First key.
    pub(crate) first: Bytes,
    /// Last key.
    pub(crate) last: Bytes,
    /// Entries, tombstones included.
    pub(crate) entries: u64,
    /// Tombstones.
    pub(crate) tombstones: u64,
    /// Length in bytes, a multiple of `BLOCK_BYTES`.
    pub(crate) bytes: u64,
    /// xxh3-128 of all bytes.
    pub(crate) digest: u128,
    /// The root: where the top index and the filter index lie, and their checksums.
    pub(crate) root: Bytes,
}

/// Builds a table from entries in key order.
pub(crate) struct TableBuilder {}

impl TableBuilder {
    pub(crate) fn new(options: TableOptions) -> Self {
        todo!()
    }
    /// Adds the newest version of a key; keys strictly ascend. `None` is a tombstone.
    pub(crate) fn add(&mut self, key: &[u8], index: LogIndex, value: Option<&[u8]>) {
        todo!()
    }
    /// Entries added.
    pub(crate) fn entries(&self) -> u64 {
        todo!()
    }
    /// About the length that `finish` would give now.
    pub(crate) fn estimated_bytes(&self) -> u64 {
        todo!()
    }
    /// Finished bytes in order, each a whole number of `BLOCK_BYTES`; to be written one after the other.
    pub(crate) fn take_chunks(&mut self) -> Vec<AlignedBytes> {
        todo!()
    }
    /// The remaining chunks and what names the table. At least one entry was added.
    pub(crate) fn finish(self) -> (Vec<AlignedBytes>, TableMeta) {
        todo!()
    }
}

/// An open table.
pub(crate) struct Table {}

impl Table {
    /// Opens a table without reading; what is needed is read at first use.
    ///
    /// # Errors
    /// `Corrupt` or `Foreign` when the root is not one that we understand.
    pub(crate) fn open(
        meta: TableMeta,
        bytes: Arc<dyn TableBytes>,
        cache: &Arc<BlockCache>,
        budget: &Arc<MemoryBudget>,
    ) -> Result<Self> {
        todo!()
    }
    pub(crate) fn meta(&self) -> &TableMeta {
        todo!()
    }
    /// The version of a key in this table, if its index is at most `at`.
    pub(crate) async fn get(&self, key: &[u8], at: LogIndex) -> Result<Option<Lookup>> {
        todo!()
    }
    /// Reads and checks everything.
    pub(crate) async fn verify(&self) -> Result<()> {
        todo!()
    }
}
