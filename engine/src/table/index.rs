//! Handles and the root: how a referrer finds and verifies what it refers to.
//!
//! # Format
//! docs/format.md, "Tables"
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::Bytes;

use super::block::{BLOCK_BYTES_MAX, Block, Malformed};
use super::varint;

/// The version of the table format that we write, and the highest that we read.
pub(crate) const FORMAT_VERSION: u16 = 1;
/// A feature that a reader must know: a block is compressed by zstd.
pub(crate) const FEATURE_ZSTD: u32 = 1;
/// A feature that a reader must know: there is a block of range tombstones, and its handle in a block of [`Parts`].
pub(crate) const FEATURE_RANGES: u32 = 1 << 2;
/// A feature that a reader must know: entries are operands to be merged, or keys of which a merge was refused.
pub(crate) const FEATURE_MERGES: u32 = 1 << 3;
/// A feature that a reader must know: fingerprints of filters have 12 bits.
pub(crate) const FEATURE_FILTERS_12: u32 = 1 << 4;
/// Features of a table that this reader knows. Bit 1 is kept for blob references.
pub(crate) const FEATURES_KNOWN: u32 = FEATURE_ZSTD | FEATURE_RANGES | FEATURE_MERGES | FEATURE_FILTERS_12;
/// The bit of [`Handle::raw`] at which the number of the [`Codec`] begins.
const CODEC_SHIFT: u32 = 25;
/// Bytes of an encoded [`Root`].
pub(crate) const ROOT_BYTES: usize = 112;
/// The footer: the root, eight zero bytes, [`MAGIC`]. The last bytes of a table.
pub(crate) const FOOTER_BYTES: usize = 128;
/// The last eight bytes of a table.
pub(crate) const MAGIC: [u8; 8] = *b"mstTable";

/// A checksum as it stands in every referrer.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::crc64_nvme(bytes)
}

/// What a block is compressed by. The numbers are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Codec {
    /// lz4, block format.
    Lz4 = 0,
    /// zstd, one frame or more; behind [`FEATURE_ZSTD`].
    Zstd = 1,
}

const _: () = assert!(BLOCK_BYTES_MAX < 1 << CODEC_SHIFT, "a length and a codec share a field");

/// Where a block lies and what its bytes must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Handle {
    /// From the beginning of the table.
    pub(crate) offset: u64,
    /// Bytes as stored.
    pub(crate) stored: u32,
    /// Bytes when decompressed, and from bit 25 on the [`Codec`]; 0: stored as it is. See [`Handle::packed`].
    pub(crate) raw: u32,
    /// CRC-64/NVME of the stored bytes.
    pub(crate) checksum: u64,
}

impl Handle {
    /// The field [`Handle::raw`] of a block of so many bytes that `codec` made smaller.
    #[allow(clippy::arithmetic_side_effects, reason = "a length of memory that we hold, below the shift")]
    pub(crate) fn raw_of(codec: Codec, bytes: usize) -> u32 {
        debug_assert!(0 < bytes && bytes <= BLOCK_BYTES_MAX, "a block within the limit bytes={bytes}");
        bytes as u32 | (codec as u32) << CODEC_SHIFT
    }

    /// What the block is compressed by, and its length when decompressed. `None`: it is stored as it is.
    #[inline]
    pub(crate) fn packed(&self) -> Result<Option<(Codec, usize)>, Malformed> {
        let bytes = (self.raw & ((1 << CODEC_SHIFT) - 1)) as usize;
        match self.raw >> CODEC_SHIFT {
            0 if bytes == 0 => Ok(None),
            0 => Ok(Some((Codec::Lz4, bytes))),
            1 => Ok(Some((Codec::Zstd, bytes))),
            _ => Err(Malformed("a handle to a block of unknown compression")),
        }
    }

    /// Where the block ends.
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.stored))
    }

    /// Appends the form that stands in index blocks.
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        varint::put(out, self.offset);
        varint::put(out, u64::from(self.stored));
        varint::put(out, u64::from(self.raw));
        out.extend_from_slice(&self.checksum.to_le_bytes());
    }

    /// Decodes the form of index blocks; nothing may follow it. `table_bytes` bounds where it may point.
    pub(crate) fn take(mut input: &[u8], table_bytes: u64) -> Result<Self, Malformed> {
        const CUT: Malformed = Malformed("a handle that is cut short");
        let offset = varint::take(&mut input).ok_or(CUT)?;
        let stored = varint::take(&mut input).ok_or(CUT)?;
        let raw = varint::take(&mut input).ok_or(CUT)?;
        let checksum = u64::from_le_bytes(input.try_into().map_err(|_| CUT)?);
        let stored = u32::try_from(stored).map_err(|_| CUT)?;
        let raw = u32::try_from(raw).map_err(|_| CUT)?;
        Self { offset, stored, raw, checksum }.checked(table_bytes)
    }

    fn checked(self, table_bytes: u64) -> Result<Self, Malformed> {
        let inside = self.offset.checked_add(u64::from(self.stored)).is_some_and(|end| end <= table_bytes);
        if !inside || self.stored == 0 {
            return Err(Malformed("a handle outside of its table"));
        }
        let raw = self.packed()?.map_or(0, |(_, bytes)| bytes);
        if self.stored as usize > BLOCK_BYTES_MAX || raw > BLOCK_BYTES_MAX {
            return Err(Malformed("a handle to a block over the limit"));
        }
        Ok(self)
    }
}

/// What a table is verified from. Kept by the manifest, and repeated in the footer for tools that have only the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    /// 1: the top index refers to data blocks. 2: to index blocks, which refer to data blocks.
    pub(crate) levels: u16,
    /// Features that a reader must know.
    pub(crate) features: u32,
    /// Entries, tombstones included.
    pub(crate) entries: u64,
    /// Tombstones.
    pub(crate) tombstones: u64,
    /// Bytes of all data blocks when decompressed.
    pub(crate) raw_bytes: u64,
    /// Lowest index of an entry.
    pub(crate) index_min: u64,
    /// Highest index of an entry.
    pub(crate) index_max: u64,
    /// The top index.
    pub(crate) top: Handle,
    /// The filter index, if there are filters. With [`FEATURE_RANGES`] the block of [`Parts`].
    pub(crate) filters: Option<Handle>,
    /// Length of the table.
    pub(crate) bytes: u64,
}

impl Root {
    /// There are range tombstones.
    pub(crate) fn has_ranges(&self) -> bool {
        self.features & FEATURE_RANGES != 0
    }

    /// There are operands, or keys of which a merge was refused.
    pub(crate) fn has_merges(&self) -> bool {
        self.features & FEATURE_MERGES != 0
    }

    /// Encodes the root.
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(ROOT_BYTES);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&self.levels.to_le_bytes());
        out.extend_from_slice(&self.features.to_le_bytes());
        for field in [self.entries, self.tombstones, self.raw_bytes, self.index_min, self.index_max] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        for handle in [self.top, self.filters.unwrap_or_default()] {
            out.extend_from_slice(&handle.offset.to_le_bytes());
            out.extend_from_slice(&handle.stored.to_le_bytes());
            out.extend_from_slice(&handle.raw.to_le_bytes());
            out.extend_from_slice(&handle.checksum.to_le_bytes());
        }
        out.extend_from_slice(&self.bytes.to_le_bytes());
        let sum = checksum(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        debug_assert_eq!(out.len(), ROOT_BYTES, "the layout of docs/format.md");
        out.into()
    }

    /// Decodes a root.
    ///
    /// # Errors
    /// `Err(None)`: of a newer format. `Err(Some(..))`: damaged.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Option<Malformed>> {
        const CUT: Option<Malformed> = Some(Malformed("a root of the wrong length"));
        let (body, sum) = bytes.split_last_chunk::<8>().ok_or(CUT)?;
        let mut input = Fields(body);
        let version = input.u16().ok_or(CUT)?;
        // A later version may have another length, and says so under its own checksum.
        if !cfg!(fuzzing) && checksum(body) != u64::from_le_bytes(*sum) {
            return Err(Some(Malformed("a root that does not match its checksum")));
        }
        if version == 0 || version > FORMAT_VERSION {
            return Err(None);
        }
        if bytes.len() != ROOT_BYTES {
            return Err(CUT);
        }
        let levels = input.u16().ok_or(CUT)?;
        let features = input.u32().ok_or(CUT)?;
        if features & !FEATURES_KNOWN != 0 {
            return Err(None);
        }
        if levels != 1 && levels != 2 {
            return Err(Some(Malformed("an index of neither one nor two levels")));
        }
        let entries = input.u64().ok_or(CUT)?;
        let tombstones = input.u64().ok_or(CUT)?;
        let raw_bytes = input.u64().ok_or(CUT)?;
        let index_min = input.u64().ok_or(CUT)?;
        let index_max = input.u64().ok_or(CUT)?;
        let top = input.handle().ok_or(CUT)?;
        let filters = input.handle().ok_or(CUT)?;
        let bytes = input.u64().ok_or(CUT)?;
        let top = top.checked(bytes).map_err(Some)?;
        let filters = if filters == Handle::default() { None } else { Some(filters.checked(bytes).map_err(Some)?) };
        if entries == 0 || tombstones > entries || index_min > index_max {
            return Err(Some(Malformed("a root whose counts contradict each other")));
        }
        if features & FEATURE_RANGES != 0 && filters.is_none() {
            return Err(Some(Malformed("a root without a handle of what it says there is")));
        }
        Ok(Self { levels, features, entries, tombstones, raw_bytes, index_min, index_max, top, filters, bytes })
    }
}

/// What a table has besides its entries, by name: a block in the place of the filter index of those that have more than filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    /// The filter index.
    pub(crate) filters: Option<Handle>,
    /// The block of range tombstones.
    pub(crate) ranges: Option<Handle>,
}

const PART_FILTERS: &[u8] = b"filters";
const PART_RANGES: &[u8] = b"ranges";

impl Parts {
    /// The handles as entries in order of their names.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'static [u8], Handle)> {
        let named = [(PART_FILTERS, self.filters), (PART_RANGES, self.ranges)];
        named.into_iter().filter_map(|(name, handle)| Some((name, handle?)))
    }

    /// Takes them from their block. A name that is not known is of no matter to who reads: what matters has a feature bit.
    pub(crate) fn find(block: &Block, table_bytes: u64) -> Result<Self, Malformed> {
        let handle = |name| match block.search(name)? {
            Some(found) if found.exact => Handle::take(block.part(&found.value), table_bytes).map(Some),
            _ => Ok(None),
        };
        Ok(Self { filters: handle(PART_FILTERS)?, ranges: handle(PART_RANGES)? })
    }
}

/// Fixed fields, one after the other.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn handle(&mut self) -> Option<Handle> {
        Some(Handle { offset: self.u64()?, stored: self.u32()?, raw: self.u32()?, checksum: self.u64()? })
    }
}

/// The shortest key that is at or after `last` and before `next`: it separates two blocks and is all that an index keeps.
pub(crate) fn separator(last: &[u8], next: &[u8]) -> Vec<u8> {
    debug_assert!(last < next, "blocks ascend");
    let shared = mainstay_memtree::key::common_prefix(last, next);
    // `next` cut one byte after the common prefix is above `last`, and below `next` unless it is `next`.
    let cut = shared.saturating_add(1);
    match next.get(..cut) {
        Some(short) if cut < next.len() && cut < last.len() => short.to_vec(),
        _ => last.to_vec(),
    }
}
