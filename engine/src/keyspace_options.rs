//! What a keyspace may have otherwise than its group: how its tables are built, and how they are merged.
//!
//! # Place
//! chosen by an entry ([`crate::CommandBody::SetOptions`]) and kept in the manifest, so that all replicas build the same tables
//! # Format
//! docs/format.md, "Options of a keyspace"
//! # Invariants
//! 1. What a job builds follows from the options that the keyspace had when the job was started, not from those of the moment at which a
//!    replica runs it: a change meets jobs that are started behind it, on every replica the same ones.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::codec::{Decoder, put_varint};
use crate::{Error, ErrorKind, Result, TableCompression};

/// The smallest and the largest block of data that a keyspace may ask for, in bytes.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 1 << 10..=256 << 10;
/// Sorted runs of a tiered keyspace.
const TIERED_RUNS: std::ops::RangeInclusive<u8> = 2..=64;

/// How the tables of a keyspace are merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CompactionStyle {
    /// Each level holds ten times what the one above it does, and a table that goes down is merged with those that it overlaps there: a read
    /// looks into few tables, little of the data is superseded, and what is merged is written again and again. The default.
    #[default]
    Leveled,
    /// All of the data is in at most so many sorted runs, and runs are merged whole when one more would be too many: those that are alike in
    /// size first. A byte is written as often as its run is merged, which is less often; a read looks into every run, up to two thirds of the
    /// data may be superseded, and while the largest runs are merged their data lies on the device twice.
    Tiered {
        /// Sorted runs, 2 to 64. More: fewer writes, slower reads. A flush is one, so below 4 nearly each of them is merged with something.
        runs: u8,
    },
}

/// What a keyspace may have otherwise than its store. Each setter takes and gives the value back; what none is called for is as in the store.
///
/// ```
/// use mainstay_engine::{CompactionStyle, KeyspaceOptions, TableCompression};
///
/// let events = KeyspaceOptions::new()
///     .compression(TableCompression::None)
///     .block_bytes(64 << 10)
///     .compaction(CompactionStyle::Tiered { runs: 8 });
/// assert!(events.check().is_ok());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyspaceOptions {
    pub(crate) compression: Option<TableCompression>,
    pub(crate) block_bytes: Option<u32>,
    pub(crate) compaction: CompactionStyle,
}

impl KeyspaceOptions {
    /// Everything as in the store, leveled.
    pub fn new() -> Self {
        Self::default()
    }

    /// How blocks are compressed. By default as the store does it.
    #[must_use]
    pub fn compression(mut self, compression: TableCompression) -> Self {
        self.compression = Some(compression);
        self
    }

    /// Bytes of a block of data before it is compressed, 1 KiB to 256 KiB; by default 16 KiB. A point read reads, verifies and caches a block.
    /// Smaller: less of that for each point read, and a larger index. Larger: scans and compression gain. One entry is never divided.
    #[must_use]
    pub fn block_bytes(mut self, bytes: u32) -> Self {
        self.block_bytes = Some(bytes);
        self
    }

    /// How tables are merged. Default [`CompactionStyle::Leveled`].
    #[must_use]
    pub fn compaction(mut self, style: CompactionStyle) -> Self {
        self.compaction = style;
        self
    }

    /// Refuses what is out of its range.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check(&self) -> Result<()> {
        if let Some(bytes) = self.block_bytes.filter(|bytes| !BLOCK_BYTES.contains(bytes)) {
            let (min, max) = (BLOCK_BYTES.start(), BLOCK_BYTES.end());
            let message = format!("blocks of a keyspace are out of range block_bytes={bytes} min={min} max={max}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        match self.compaction {
            CompactionStyle::Tiered { runs } if !TIERED_RUNS.contains(&runs) => {
                let (min, max) = (TIERED_RUNS.start(), TIERED_RUNS.end());
                let message = format!("runs of a tiered keyspace are out of range runs={runs} min={min} max={max}");
                Err(Error::new(ErrorKind::Invalid, message))
            }
            _ => Ok(()),
        }
    }
}

/// Appends checked options.
pub(crate) fn put_options(out: &mut Vec<u8>, options: &KeyspaceOptions) {
    out.push(options.compression.map_or(0, |compression| compression as u8));
    put_varint(out, options.block_bytes.unwrap_or(0).into());
    out.push(match options.compaction {
        CompactionStyle::Leveled => 0,
        CompactionStyle::Tiered { runs } => runs,
    });
}

/// Reads what [`put_options`] wrote.
///
/// # Errors
/// `Foreign`: a later build knows more. `Corrupt`.
pub(crate) fn take_options(from: &mut Decoder) -> Result<KeyspaceOptions> {
    let compression = match from.u8()? {
        0 => None,
        number => {
            let all = [TableCompression::None, TableCompression::Lz4, TableCompression::ByLevel];
            let known = all.into_iter().find(|compression| *compression as u8 == number);
            let message = || format!("tables of a keyspace are compressed as this build cannot compression={number}");
            Some(known.ok_or_else(|| Error::new(ErrorKind::Foreign, message()))?)
        }
    };
    let block_bytes = Some(from.varint_u32()?).filter(|bytes| *bytes > 0);
    let compaction = match from.u8()? {
        0 => CompactionStyle::Leveled,
        runs => CompactionStyle::Tiered { runs },
    };
    let options = KeyspaceOptions { compression, block_bytes, compaction };
    options.check().map_err(|error| from.corrupt(&error.to_string()))?;
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_back_as_they_were_written() {
        let tiered = |runs| CompactionStyle::Tiered { runs };
        for (options, bytes) in [
            (KeyspaceOptions::new(), &[0, 0, 0][..]),
            (KeyspaceOptions::new().compression(TableCompression::None), &[1, 0, 0]),
            (KeyspaceOptions::new().compression(TableCompression::Lz4).compaction(tiered(2)), &[2, 0, 2]),
            (KeyspaceOptions::new().compression(TableCompression::ByLevel), &[3, 0, 0]),
            (KeyspaceOptions::new().block_bytes(1024).compaction(tiered(64)), &[0, 0x80, 0x08, 64]),
        ] {
            let mut out = Vec::new();
            put_options(&mut out, &options);
            assert_eq!(out, bytes, "{options:?}");
            let mut from = Decoder::new(out.into(), "options");
            assert_eq!(take_options(&mut from).expect("read"), options);
            from.end().expect("all of it");
        }
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name_and_never_read() {
        for (options, what) in [
            (KeyspaceOptions::new().block_bytes(1023), "block_bytes=1023"),
            (KeyspaceOptions::new().block_bytes((256 << 10) + 1), "block_bytes=262145"),
            (KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs: 1 }), "runs=1"),
            (KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs: 65 }), "runs=65"),
        ] {
            let error = options.check().expect_err("out of range");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(what), "{error}");
            let mut out = Vec::new();
            put_options(&mut out, &options);
            let read = take_options(&mut Decoder::new(out.into(), "options"));
            assert_eq!(read.expect_err("out of range").kind(), ErrorKind::Corrupt);
        }
        let newer = take_options(&mut Decoder::new(vec![4, 0, 0].into(), "options"));
        assert_eq!(newer.expect_err("unknown").kind(), ErrorKind::Foreign);
    }
}
