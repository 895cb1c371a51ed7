//! Blocks on their way to and from a device: compressed where that pays, verified before anything else looks at them.
//!
//! # Invariants
//! C1. What a block is compressed to depends on the blocks of the same table alone: a [`Compressor`] serves one table. zstd
//!     promises equal output of equal input for one release of it, on every platform; docs/format.md says what follows
//!     when releases differ.
//! # Why not
//! zstd in Rust alone: what there was compressed less, decompressed at half the speed or had no release with a promise
//! (docs/dependencies.md). A dictionary: it gained nothing at 16 KiB.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::cell::RefCell;

use bytes::Bytes;
use zstd_safe::{CCtx, DCtx};

use super::Compression;
use super::block::{BLOCK_BYTES_MAX, Malformed};
use super::index::{Codec, Handle, checksum};

/// lz4 turns one byte into at most this many, so that a longer claim is a lie and is not allocated for. zstd has no such
/// bound: there [`BLOCK_BYTES_MAX`] alone holds.
const LZ4_EXPANSION_MAX: usize = 256;
/// The level of zstd. Of levels -3 to 3 it makes the fewest bytes of rows with short fields in 16 KiB (2.05 to 8.8 times
/// less, lz4 1.9 to 4.1), and no level decompresses much faster.
const ZSTD_LEVEL: i32 = 1;

thread_local! {
    /// A context has some 100 KiB, which is more work to make than a block is to decompress.
    static DECOMPRESSOR: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Compresses the blocks of one table.
#[derive(Default)]
pub(crate) struct Compressor {
    zstd: Option<CCtx<'static>>,
    packed: Vec<u8>,
}

impl Compressor {
    /// Compresses `raw` if it saves enough. `None`: store it as it is.
    pub(crate) fn compress(&mut self, raw: &[u8], compression: Compression) -> Option<(Codec, &[u8])> {
        self.packed.clear();
        let codec = match compression {
            Compression::None => return None,
            Compression::Lz4 => {
                self.packed.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
                let length = lz4_flex::block::compress_into(raw, &mut self.packed).ok()?;
                self.packed.truncate(length);
                Codec::Lz4
            }
            Compression::Zstd => {
                self.packed.reserve(zstd_safe::compress_bound(raw.len()));
                // Only memory can fail it, and that ends the process elsewhere.
                self.zstd.get_or_insert_with(CCtx::create).compress(&mut self.packed, raw, ZSTD_LEVEL).ok()?;
                Codec::Zstd
            }
        };
        // It has to save an eighth: 12.5 %.
        (self.packed.len() <= raw.len().saturating_sub(raw.len() >> 3)).then_some((codec, &self.packed))
    }
}

/// Verifies stored bytes against their handle and decompresses them.
pub(crate) fn open(stored: &Bytes, handle: &Handle) -> Result<Bytes, Malformed> {
    if stored.len() != handle.stored as usize {
        return Err(Malformed("a block of another length than its referrer says"));
    }
    // A fuzzer cannot make checksums match: there every one does, so that what lies behind is reached.
    if !cfg!(fuzzing) && !mainstay_io::mutant!(SkipBlockChecksum) && checksum(stored) != handle.checksum {
        return Err(Malformed("a block that does not match the checksum in its referrer"));
    }
    let Some((codec, raw)) = handle.packed()? else { return Ok(stored.clone()) };
    if raw > BLOCK_BYTES_MAX || (codec == Codec::Lz4 && raw > stored.len().saturating_mul(LZ4_EXPANSION_MAX)) {
        return Err(Malformed("a block that claims more bytes than it can hold"));
    }
    let out = match codec {
        Codec::Lz4 => lz4_flex::block::decompress(stored, raw).map_err(|_| Malformed("a block that is not lz4"))?,
        Codec::Zstd => {
            let mut out = Vec::with_capacity(raw);
            DECOMPRESSOR
                .with_borrow_mut(|zstd| zstd.decompress(&mut out, stored))
                .map_err(|_| Malformed("a block that is not zstd"))?;
            out
        }
    };
    if out.len() != raw {
        return Err(Malformed("a block that decompresses to another length"));
    }
    Ok(out.into())
}
