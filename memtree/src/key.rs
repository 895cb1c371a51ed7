//! Keys as a search compares them: eight bytes at once, after what all keys of a node share. For the searches in tables too.
#![forbid(unsafe_code)]

use std::cmp::Ordering;

/// Eight bytes of `key` after the first `shared`, as a number that is ordered as they are; zeros stand for what is not there.
#[inline]
pub fn head(key: &[u8], shared: usize) -> u64 {
    if let Some(chunk) = key.get(shared..).and_then(|rest| rest.first_chunk::<8>()) {
        return u64::from_be_bytes(*chunk);
    }
    let rest = key.len().saturating_sub(shared);
    if rest == 0 {
        return 0;
    }
    match key.last_chunk::<8>() {
        Some(chunk) => u64::from_be_bytes(*chunk) << (8 * (8 - rest)),
        None => key[shared..].iter().enumerate().fold(0, |head, (at, byte)| head | u64::from(*byte) << (56 - 8 * at)),
    }
}

/// How many bytes two keys share at their beginning.
pub fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    let chunks = a.chunks_exact(8).zip(b.chunks_exact(8)).take_while(|(a, b)| a == b).count() * 8;
    chunks + a[chunks..].iter().zip(&b[chunks..]).take_while(|(a, b)| a == b).count()
}

/// Compares the first `shared` bytes; equal only if `key` has them all.
#[inline]
pub fn compare_shared(key: &[u8], of: &[u8], shared: usize) -> Ordering {
    key[..shared.min(key.len())].cmp(&of[..shared])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_ordered_as_the_bytes_that_they_stand_for() {
        let keys: [&[u8]; 9] = [b"", b"\0", b"a", b"ab", b"abc\0", b"abcdefg", b"abcdefgh", b"abcdefghi", b"b"];
        for shared in 0..4 {
            for a in keys {
                let mut padded = [0; 8];
                for (to, from) in padded.iter_mut().zip(a.iter().skip(shared)) {
                    *to = *from;
                }
                assert_eq!(head(a, shared), u64::from_be_bytes(padded), "key={a:?} shared={shared}");
            }
        }
    }

    #[test]
    fn what_keys_share_is_counted_to_the_byte() {
        let long = [7; 40];
        for at in 0..40 {
            let mut other = long;
            other[at] = 8;
            assert_eq!(common_prefix(&long, &other), at);
            assert_eq!(common_prefix(&long, &long[..at]), at);
            assert_eq!(compare_shared(&other, &long, 40), Ordering::Greater);
            assert_eq!(compare_shared(&other, &long, at), Ordering::Equal);
            assert_eq!(compare_shared(&long[..at], &long, 40), Ordering::Less);
        }
    }
}
