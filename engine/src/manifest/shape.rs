//! How the tables of a level are built: a pure function of the group's settings, the same on every replica.
//!
//! Nine tenths of the data stand in the last level and are written there once in the life of most of them, so there bytes
//! count; above, tables are written to be written again soon, and there time counts. A filter is asked by who looks for a key
//! that the table does not hold. At the last level these are the keys that do not exist, which cost a read of a block in 1 of
//! 259; each level above holds a tenth of the next, so a fingerprint that is 3.3 bits longer takes a tenth of what it adds
//! there, and the reads that all levels cost are hardly more than those of the last. With 8 bits everywhere each run of L0 and
//! each level would cost as much as the last one.
//!
//! # Why not
//! 4 bits at the last level, as others do: half the memory of its filters, and a key that does not exist costs a read of a
//! block in 1 of 16. 12 bits there: half as much again for all data, and what misses the cache then are filters.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::version::LEVELS;
use crate::table::block::{DATA_RESTART_BYTES, RESTART_BYTES};
use crate::table::{Compression, TableOptions};
use crate::{KeyspaceOptions, TableCompression};

/// How the tables of a group are built, fixed when it is made. The numbers are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum TableShape {
    /// lz4 and filters of 8 bits at every level, and restarts of data blocks far apart: of groups that were made before there was a choice. No manifest says it.
    Uniform = 0,
    /// Filters by level, as for the next two; no compression.
    Raw = 1,
    /// lz4 at every level.
    Lz4 = 2,
    /// lz4 above the last level, zstd on it.
    ByLevel = 3,
}

impl TableShape {
    pub(crate) fn decode(number: u8) -> Option<Self> {
        [Self::Raw, Self::Lz4, Self::ByLevel].into_iter().find(|shape| *shape as u8 == number)
    }

    /// How a table is built that joins `level`, 0 for L0, in a keyspace that chose `chosen`.
    pub(crate) fn options(self, level: u8, chosen: &KeyspaceOptions) -> TableOptions {
        let plain = chosen.compression.map_or(self, Self::from).plain_options(level);
        let block_bytes = chosen.block_bytes.map_or(plain.block_bytes, |bytes| bytes as usize);
        TableOptions { block_bytes, ..plain }
    }

    fn plain_options(self, level: u8) -> TableOptions {
        let above = (LEVELS as u8).saturating_sub(level);
        let compression = match (self, above) {
            (Self::Raw, _) => Compression::None,
            (Self::ByLevel, 0) => Compression::Zstd,
            (Self::Uniform | Self::Lz4 | Self::ByLevel, _) => Compression::Lz4,
        };
        let filter_bits = match (self, above) {
            (Self::Uniform, _) | (_, 0) => 8,
            (_, 1) => 12,
            _ => 16,
        };
        let restart_bytes = match self {
            Self::Uniform => RESTART_BYTES,
            _ => DATA_RESTART_BYTES,
        };
        TableOptions { compression, filter_bits, restart_bytes, ..TableOptions::default() }
    }
}

impl From<TableCompression> for TableShape {
    fn from(compression: TableCompression) -> Self {
        match compression {
            TableCompression::None => Self::Raw,
            TableCompression::Lz4 => Self::Lz4,
            TableCompression::ByLevel => Self::ByLevel,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_of_a_table_and_the_settings_alone_say_how_it_is_built() {
        for (shape, level, compression, filter_bits) in [
            (TableShape::Uniform, 0, Compression::Lz4, 8),
            (TableShape::Uniform, 6, Compression::Lz4, 8),
            (TableShape::Raw, 0, Compression::None, 16),
            (TableShape::Raw, 6, Compression::None, 8),
            (TableShape::Lz4, 5, Compression::Lz4, 12),
            (TableShape::Lz4, 6, Compression::Lz4, 8),
            (TableShape::ByLevel, 0, Compression::Lz4, 16),
            (TableShape::ByLevel, 1, Compression::Lz4, 16),
            (TableShape::ByLevel, 4, Compression::Lz4, 16),
            (TableShape::ByLevel, 5, Compression::Lz4, 12),
            (TableShape::ByLevel, 6, Compression::Zstd, 8),
        ] {
            let options = shape.options(level, &KeyspaceOptions::new());
            assert_eq!((options.compression, options.filter_bits), (compression, filter_bits), "{shape:?} L{level}");
            assert_eq!(options.block_bytes, TableOptions::default().block_bytes);
            assert_eq!(options.restart_bytes, if shape == TableShape::Uniform { 1024 } else { 256 });
        }
    }

    #[test]
    fn a_shape_comes_back_by_its_number() {
        for shape in [TableShape::Raw, TableShape::Lz4, TableShape::ByLevel] {
            assert_eq!(TableShape::decode(shape as u8), Some(shape));
        }
        for number in [0, 4, 255] {
            assert_eq!(TableShape::decode(number), None);
        }
    }
}
