//! Tables: sorted, immutable, built once, the same bytes on every replica.
//!
//! # Place
//! above the volume's extents ([`TableBytes`]), below `read`; built by flush and compaction
//! # Format
//! docs/format.md, "Tables"
//! # Invariants
//! T1. Equal options and equal entries give equal bytes ([`builder`]).
//! T2. Every checksum stands in the referrer: manifest, root, top index, index, block. So a block of the right form in the
//!     wrong place is found as well as a flipped bit.
//! T3. At most one version of a key; keys ascend strictly.
//! T4. Range tombstones do not overlap, and hide nothing of the table that has them. First and last key reach over both.
//! T5. Where its range tombstones stand it has no operand: nothing is below, so it was merged.

pub(crate) mod block;
mod builder;
mod codec;
mod cursor;
pub(crate) mod filter;
pub(crate) mod fuzzing;
mod index;
mod ranges;
mod reader;
#[cfg(test)]
#[allow(clippy::disallowed_methods, clippy::type_complexity, reason = "a test has no runtime; its bytes lie in memory")]
pub(crate) mod tests;
pub(crate) mod varint;

use bytes::Bytes;
use mainstay_io::BoxFuture;

pub(crate) use builder::TableBuilder;
pub(crate) use cursor::{Step, TableCursor};
pub(crate) use index::Root;
pub(crate) use reader::{CachedBlock, Table};

use crate::gather::Gather;
use crate::{Result, TableRanges};

/// Where the bytes of a table lie.
pub(crate) trait TableBytes: Send + Sync + 'static {
    /// Bytes `offset..offset + length`, at any alignment; exactly `length` of them on success.
    fn read(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>>;

    /// As [`TableBytes::read`], complete once `reads` was submitted. Bytes that lie on no device are read at once.
    fn read_in(&self, offset: u64, length: usize, reads: &Gather) -> BoxFuture<Result<Bytes>> {
        let _ = reads;
        self.read(offset, length)
    }

    /// What is there does not match its checksum, or cannot be read, twice: a reason to mend the table. Returns how many
    /// other copies can be asked.
    fn found_damaged(&self) -> usize {
        0
    }

    /// The same bytes of another copy, unverified. `copy` is less than what [`TableBytes::found_damaged`] gave.
    fn read_elsewhere(&self, copy: usize, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
        let message = format!("no other copy of the table copy={copy} offset={offset} length={length}");
        Box::pin(std::future::ready(Err(crate::Error::new(crate::ErrorKind::NotFound, message))))
    }

    /// A read was answered by another copy.
    fn served_elsewhere(&self) {}
}

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Stored as they are.
    None,
    /// lz4, where it saves an eighth or more.
    Lz4,
    /// zstd at level 1, where it saves an eighth or more.
    Zstd,
}

/// How a table is built. Equal options and equal entries give equal bytes, so these come from what all replicas share.
#[derive(Clone, Debug)]
pub(crate) struct TableOptions {
    /// A data block is cut before the entry that would take it over this size. Default 16 KiB.
    pub(crate) block_bytes: usize,
    /// See [`Compression`]. Default lz4.
    pub(crate) compression: Compression,
    /// Bits of a fingerprint of the filters: 0 (no filters), 8 (one false positive in 256), 12 (in 4,096) or 16 (in 65,536).
    /// Default 8. A key takes an eighth more than that.
    pub(crate) filter_bits: u8,
    /// Bytes between the restarts of a data block. Default 256.
    pub(crate) restart_bytes: usize,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            block_bytes: 16 << 10,
            compression: Compression::Lz4,
            filter_bits: 8,
            restart_bytes: block::DATA_RESTART_BYTES,
        }
    }
}

/// What names and verifies a finished table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TableMeta {
    /// First key, or where the first range tombstone begins.
    pub(crate) first: Bytes,
    /// Last key, or where the last range tombstone ends ([`last_before`](crate::range_tombstone::last_before)).
    pub(crate) last: Bytes,
    /// Entries, tombstones included.
    pub(crate) entries: u64,
    /// Tombstones.
    pub(crate) tombstones: u64,
    /// Length in bytes, a multiple of `BLOCK_BYTES`.
    pub(crate) bytes: u64,
    /// xxh3-128 of all bytes.
    pub(crate) digest: u128,
    /// The encoded root: where the top index and the filter index lie, and their checksums.
    pub(crate) root: Bytes,
    /// Its range tombstones, as the manifest keeps them.
    pub(crate) ranges: TableRanges,
}
