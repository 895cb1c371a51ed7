//! Values that tell whether they are whole.

use bytes::Bytes;

use crate::rt::SimRng;

/// Values from here on are long ones.
pub(crate) const LONG: u64 = 1 << 40;

/// The bytes that stand for a value: its number and a tail whose length and content follow from it, so that a mix of two
/// values is seen.
pub(crate) fn encode(value: u64) -> Bytes {
    let mut rng = SimRng::new(value);
    let length = match rng.below(100) {
        _ if value >= LONG => rng.range(4_000, 12_000),
        0..50 => rng.range(0, 64),
        50..90 => rng.range(64, 1024),
        90..99 => rng.range(1024, 6000),
        _ => rng.range(6000, 40_000),
    };
    let mut bytes = vec![0; 8 + length as usize];
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    // Half of it compresses.
    let half = 8 + length as usize / 2;
    rng.fill(&mut bytes[half..]);
    Bytes::from(bytes)
}

/// The value that bytes stand for.
pub(crate) fn decode(bytes: &[u8]) -> Result<u64, String> {
    let Some(number) = bytes.first_chunk::<8>() else { return Err(format!("a value of {} bytes", bytes.len())) };
    let value = u64::from_le_bytes(*number);
    if encode(value) == bytes { Ok(value) } else { Err(format!("the bytes of value {value} are not what was written")) }
}
