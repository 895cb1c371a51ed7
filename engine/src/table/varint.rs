//! Unsigned LEB128: seven bits a byte, lowest first, the high bit says that more follow.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

/// Bytes of the longest encoding.
pub(crate) const VARINT_BYTES_MAX: usize = 10;

/// Appends `value` to `out`.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number from the front of `input`. `None` when it is cut short or does not fit 64 bits.
#[inline]
pub(crate) fn take(input: &mut &[u8]) -> Option<u64> {
    let (&first, rest) = input.split_first()?;
    if first < 0x80 {
        *input = rest;
        return Some(u64::from(first));
    }
    take_long(input)
}

fn take_long(input: &mut &[u8]) -> Option<u64> {
    let word = input.first_chunk::<8>().map_or(u64::MAX, |chunk| u64::from_le_bytes(*chunk));
    // The lowest of these bits ends the number.
    let ends = !word & 0x8080_8080_8080_8080;
    if ends == 0 {
        return take_longest(input);
    }
    let bits = word & (ends ^ ends.wrapping_sub(1)) & 0x7f7f_7f7f_7f7f_7f7f;
    // Groups of seven bits move together: by pairs of bytes, then of two, then of four.
    let bits = (bits & 0x007f_007f_007f_007f) | ((bits & 0x7f00_7f00_7f00_7f00) >> 1);
    let bits = (bits & 0x0000_3fff_0000_3fff) | ((bits & 0x3fff_0000_3fff_0000) >> 2);
    let bits = (bits & 0x0000_0000_0fff_ffff) | ((bits & 0x0fff_ffff_0000_0000) >> 4);
    *input = input.get((ends.trailing_zeros() as usize >> 3).wrapping_add(1)..)?;
    Some(bits)
}

/// Of more than eight bytes, or at the end of the input.
fn take_longest(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    let mut shift = 0u32;
    for (at, &byte) in input.iter().enumerate().take(VARINT_BYTES_MAX) {
        let bits = u64::from(byte & 0x7f);
        // The tenth byte holds the last bit of 64.
        if shift == 63 && bits > 1 {
            return None;
        }
        value |= bits.checked_shl(shift)?;
        if byte < 0x80 {
            *input = input.get(at.checked_add(1)?..)?;
            return Some(value);
        }
        shift = shift.checked_add(7)?;
    }
    None
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn every_length_comes_back() {
        for value in (0..64).flat_map(|shift| [(1u64 << shift) - 1, 1 << shift, u64::MAX >> shift]) {
            let mut out = Vec::new();
            put(&mut out, value);
            assert!(out.len() <= VARINT_BYTES_MAX);
            let mut input = &out[..];
            assert_eq!((take(&mut input), input.len()), (Some(value), 0));
            // What follows is another number's.
            for behind in [0x00, 0x7f, 0x80, 0xff] {
                let bytes = [&out[..], &[behind; 9]].concat();
                let mut input = &bytes[..];
                assert_eq!((take(&mut input), input), (Some(value), &[behind; 9][..]));
            }
        }
    }

    #[test]
    fn what_is_cut_or_too_long_is_refused() {
        assert_eq!(take(&mut &[][..]), None);
        assert_eq!(take(&mut &[0x80][..]), None);
        assert_eq!(take(&mut &[0xff; 10][..]), None);
        assert_eq!(take(&mut &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2][..]), None);
        assert_eq!(take(&mut &[0xff; 11][..]), None);
    }
}
