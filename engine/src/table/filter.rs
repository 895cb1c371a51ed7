//! Filters: which keys are certainly not in a table.
//!
//! # Place
//! built by `builder`, one partition for each [`PARTITION_KEYS`] keys; read through the block cache
//! # Format
//! docs/format.md, "Tables"; a binary fuse filter over xxh3-64 of the keys, in an encoding of our own
//! # Invariants
//! F1. No false negative: a key that was added is always found.
//! F2. Equal keys give equal bytes: the construction takes its seeds from a fixed sequence.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::Bytes;
use xorf::{BinaryFuse8, BinaryFuse16, Descriptor};

use super::block::Malformed;
use super::index::Fields;

/// Keys of one partition. Bounds the memory of building and the read of a lookup: 8 bits a key are 80 KiB.
pub(crate) const PARTITION_KEYS: usize = 1 << 16;
/// Bytes before the fingerprints.
pub(crate) const HEADER_BYTES: usize = 24;

/// The hash by which a filter knows a key.
pub(crate) fn hash(key: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key)
}

/// Bits of a fingerprint that a partition may have.
pub(crate) const WIDTHS: [u8; 3] = [8, 12, 16];

/// Builds a partition from hashes, with `bits` of [`WIDTHS`] a fingerprint.
///
/// A set for which no filter can be built (it has never been seen) gives one that answers "perhaps" to everything.
pub(crate) fn build(mut hashes: Vec<u64>, bits: u8) -> Vec<u8> {
    debug_assert!(WIDTHS.contains(&bits), "a width that a reader takes bits={bits}");
    // Two keys with one hash are one member.
    hashes.sort_unstable();
    hashes.dedup();
    let mut out = Vec::new();
    if bits == 8 {
        match BinaryFuse8::try_from(&hashes[..]) {
            Ok(filter) => {
                header(&mut out, 8, &filter.descriptor, filter.fingerprints.len());
                out.extend_from_slice(&filter.fingerprints);
            }
            Err(_) => header(&mut out, 0, &EMPTY, 0),
        }
        return out;
    }
    let Ok(filter) = BinaryFuse16::try_from(&hashes[..]) else {
        header(&mut out, 0, &EMPTY, 0);
        return out;
    };
    header(&mut out, bits.into(), &filter.descriptor, filter.fingerprints.len());
    if bits == 16 {
        out.extend(filter.fingerprints.iter().flat_map(|print| print.to_le_bytes()));
    } else {
        // The exclusive or goes bit by bit: what is left of wide fingerprints is a filter with narrow ones.
        for pair in filter.fingerprints.chunks(2) {
            let first = u32::from(pair.first().copied().unwrap_or_default() & NARROW);
            let second = u32::from(pair.get(1).copied().unwrap_or_default() & NARROW);
            let [a, b, c, _] = (first | second << 12).to_le_bytes();
            out.extend_from_slice(&[a, b]);
            if pair.len() == 2 {
                out.push(c);
            }
        }
    }
    out
}

/// The 12 bits that are kept of a fingerprint of 16.
const NARROW: u16 = 0xfff;

const EMPTY: Descriptor = Descriptor { seed: 0, segment_length: 0, segment_length_mask: 0, segment_count_length: 0 };

fn header(out: &mut Vec<u8>, bits: u32, descriptor: &Descriptor, fingerprints: usize) {
    out.extend_from_slice(&bits.to_le_bytes());
    out.extend_from_slice(&(fingerprints as u32).to_le_bytes());
    out.extend_from_slice(&descriptor.seed.to_le_bytes());
    out.extend_from_slice(&descriptor.segment_length.to_le_bytes());
    out.extend_from_slice(&descriptor.segment_count_length.to_le_bytes());
}

/// A partition in memory.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    bits: u32,
    seed: u64,
    segment: u32,
    segments: u32,
    bytes: Bytes,
}

impl Filter {
    /// Checks the frame of a partition.
    pub(crate) fn parse(bytes: Bytes) -> Result<Self, Malformed> {
        const CUT: Malformed = Malformed("a filter that is cut short");
        let mut input = Fields(&bytes);
        let bits = input.u32().ok_or(CUT)?;
        let fingerprints = input.u32().ok_or(CUT)?;
        let seed = input.u64().ok_or(CUT)?;
        let segment = input.u32().ok_or(CUT)?;
        let segments = input.u32().ok_or(CUT)?;
        if bits == 0 {
            return Ok(Self { bits, seed, segment, segments, bytes });
        }
        if !WIDTHS.iter().any(|width| u32::from(*width) == bits) {
            return Err(Malformed("a filter of unknown width"));
        }
        let expected = u64::from(segment).saturating_mul(2).saturating_add(u64::from(segments));
        if !segment.is_power_of_two() || segments == 0 || !segments.is_multiple_of(segment) {
            return Err(Malformed("a filter with impossible segments"));
        }
        if u64::from(fingerprints) != expected
            || input.0.len() as u64 != expected.saturating_mul(bits.into()).div_ceil(8)
        {
            return Err(CUT);
        }
        Ok(Self { bits, seed, segment, segments, bytes })
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// False: no key with this hash was added.
    pub(crate) fn may_contain(&self, hash: u64) -> bool {
        if self.bits == 0 {
            return true;
        }
        if mainstay_io::mutant!(FilterDenies) && hash.is_multiple_of(64) {
            return false;
        }
        let mixed = mix(hash.wrapping_add(self.seed));
        let mask = self.segment.wrapping_sub(1);
        let first = ((u128::from(mixed).wrapping_mul(u128::from(self.segments))) >> 64) as u32;
        let second = first.wrapping_add(self.segment) ^ ((mixed >> 18) as u32 & mask);
        let third = first.wrapping_add(self.segment.wrapping_mul(2)) ^ (mixed as u32 & mask);
        let print = (mixed ^ (mixed >> 32)) as u16;
        let Some(prints) = self.bytes.get(HEADER_BYTES..) else { return true };
        let narrow = |place: u32| prints.get(place as usize).map(|print| u16::from(*print));
        let wide = |at: usize| prints.get(at..)?.first_chunk::<2>().map(|print| u16::from_le_bytes(*print));
        let (mask, prints) = match self.bits {
            8 => (0xff, [narrow(first), narrow(second), narrow(third)]),
            12 => {
                // Two fingerprints lie in three bytes.
                let at = |place: u32| Some(wide((place as usize).wrapping_mul(3) >> 1)? >> ((place & 1) << 2));
                (NARROW, [at(first), at(second), at(third)])
            }
            _ => {
                let at = |place: u32| wide((place as usize).wrapping_mul(2));
                (u16::MAX, [at(first), at(second), at(third)])
            }
        };
        match prints {
            [Some(a), Some(b), Some(c)] => (print ^ a ^ b ^ c) & mask == 0,
            _ => true,
        }
    }
}

/// The finaliser of MurmurHash3.
fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn no_key_that_was_added_is_denied() {
        for bits in WIDTHS {
            for count in [1u64, 2, 3, 7, 100, 5_000, PARTITION_KEYS as u64] {
                let hashes: Vec<u64> = (0..count).map(|key| hash(&key.to_be_bytes())).collect();
                let filter = Filter::parse(build(hashes.clone(), bits).into()).expect("own bytes");
                assert!(hashes.iter().all(|hash| filter.may_contain(*hash)), "bits={bits} count={count}");
                let absent =
                    (0..20_000u64).filter(|key| filter.may_contain(hash(&(key + count).to_le_bytes()))).count();
                if count >= 100 {
                    // 78, 5 and 0.3 of them are to be expected.
                    let most = match bits {
                        8 => 200,
                        12 => 30,
                        _ => 10,
                    };
                    assert!(absent < most, "bits={bits} count={count} false positives={absent} of 20000");
                }
            }
        }
    }

    #[test]
    fn equal_hashes_are_one_member() {
        let filter = Filter::parse(build(vec![5, 5, 9, 5], 8).into()).expect("own bytes");
        assert!(filter.may_contain(5) && filter.may_contain(9));
    }

    #[test]
    fn the_bytes_are_the_same_every_time() {
        let hashes: Vec<u64> = (0..1000u64).map(|key| hash(&key.to_be_bytes())).collect();
        let bytes = build(hashes.clone(), 8);
        assert_eq!(bytes, build(hashes.into_iter().rev().collect(), 8));
        // What an earlier release wrote: a change of the construction would part replicas of different releases.
        assert_eq!(hash(&bytes), GOLDEN_HASH);
    }

    const GOLDEN_HASH: u64 = 10_727_999_491_700_673_329;

    #[test]
    fn a_partition_is_as_long_as_its_width_says() {
        for count in [1u64, 3, 7, 1000] {
            let hashes: Vec<u64> = (0..count).map(|key| hash(&key.to_be_bytes())).collect();
            let prints = build(hashes.clone(), 16).len() - HEADER_BYTES;
            for bits in WIDTHS {
                let bytes = build(hashes.clone(), bits);
                assert_eq!(bytes.len() - HEADER_BYTES, (prints * usize::from(bits)).div_ceil(16), "bits={bits}");
                for cut in 0..bytes.len() {
                    assert!(Filter::parse(Bytes::copy_from_slice(&bytes[..cut])).is_err(), "bits={bits} cut={cut}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        let good = build((0..100u64).map(|key| hash(&key.to_be_bytes())).collect(), 8);
        for cut in 0..good.len() {
            assert!(Filter::parse(Bytes::copy_from_slice(&good[..cut])).is_err());
        }
        for (at, value) in [(0, 3), (4, 1), (16, 3), (20, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Filter::parse(bad.into()).is_err(), "offset={at}");
        }
    }
}
