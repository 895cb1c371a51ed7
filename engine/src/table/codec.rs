//! Blocks on their way to and from a device: compressed where that pays, verified before anything else looks at them.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::Bytes;

use super::Compression;
use super::block::{BLOCK_BYTES_MAX, Malformed};
use super::index::{Handle, checksum};

/// lz4 turns one byte into at most this many, so that a longer claim is a lie and is not allocated for.
const LZ4_EXPANSION_MAX: usize = 256;

/// Compresses `raw` if it saves enough. `None`: store it as it is.
pub(crate) fn compress(raw: &[u8], compression: Compression) -> Option<Vec<u8>> {
    match compression {
        Compression::None => None,
        Compression::Lz4 => {
            let packed = lz4_flex::block::compress(raw);
            // It has to save an eighth: 12.5 %.
            (packed.len() <= raw.len().saturating_sub(raw.len() >> 3)).then_some(packed)
        }
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
    if handle.raw == 0 {
        return Ok(stored.clone());
    }
    let raw = handle.raw as usize;
    if raw > BLOCK_BYTES_MAX || raw > stored.len().saturating_mul(LZ4_EXPANSION_MAX) {
        return Err(Malformed("a block that claims more bytes than it can hold"));
    }
    let out = lz4_flex::block::decompress(stored, raw).map_err(|_| Malformed("a block that is not lz4"))?;
    if out.len() != raw {
        return Err(Malformed("a block that decompresses to another length"));
    }
    Ok(out.into())
}
