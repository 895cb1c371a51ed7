//! Extents: runs of whole units of the extents zone.

/// The unit of allocation in the extents zone, in bytes: an extent is a number of these (docs/format.md).
pub const EXTENT_UNIT_BYTES: u64 = 64 << 10;

/// A run of units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Extent {
    /// The first unit; times [`EXTENT_UNIT_BYTES`] it is the offset in the extents zone.
    pub(crate) first_unit: u32,
    /// At least one.
    pub(crate) units: u32,
}

impl Extent {
    /// Where it begins in the extents zone.
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.first_unit) * EXTENT_UNIT_BYTES
    }

    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.units) * EXTENT_UNIT_BYTES
    }
}

/// Bytes that all of them hold.
pub(crate) fn extents_bytes(extents: &[Extent]) -> u64 {
    extents.iter().map(Extent::bytes).sum()
}

/// A part of one extent: where in the zone, and how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) zone_offset: u64,
    pub(crate) bytes: u64,
}

/// The pieces that hold bytes `offset..offset + bytes` of the concatenation of `extents`. None when they do not reach
/// that far.
pub(crate) fn pieces(extents: &[Extent], offset: u64, bytes: u64) -> Option<Vec<Piece>> {
    let mut found = Vec::new();
    let (mut skip, mut rest) = (offset, bytes);
    for extent in extents {
        if rest == 0 {
            break;
        }
        if skip >= extent.bytes() {
            skip -= extent.bytes();
            continue;
        }
        let take = rest.min(extent.bytes() - skip);
        found.push(Piece { zone_offset: extent.offset() + skip, bytes: take });
        skip = 0;
        rest -= take;
    }
    (rest == 0).then_some(found)
}
