//! What an entry did, where its command alone does not tell: it was refused, or a condition of it did not hold.
//!
//! # Place
//! written by `group::apply` with what else the entry writes; read by [`crate::Changes`]
//! # Format
//! docs/format.md, "Outcomes": one pair for an entry, in a keyspace of their own, in the main branch
//! # Invariants
//! 1. From the entry on that makes the keyspace, an entry without an outcome was applied as its command stands.
//! 2. The version of the pair is the index of the entry: the place of an entry is taken by the one [`OUTCOMES_KEPT`] behind it.
//! 3. Only the entries before it decide what is written for one, in replay as at first.
//! # Why not
//! To decide conditions again when the log is read: they were decided on a state that is gone. To keep what was decided in memory:
//! it would end with the process, and other replicas would not have it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::Bytes;

use crate::codec::{Decoder, put_varint};
use crate::{Error, ErrorKind, KeyspaceId, LogIndex, Result};

/// The keyspace that holds what entries did. While it is not there nothing is recorded, and there are no [`crate::Changes`].
pub const OUTCOMES_KEYSPACE: &str = "mainstay.outcomes";
/// Entries whose outcomes are kept. Only those that were refused take space.
pub(crate) const OUTCOMES_KEPT: u64 = 1 << 22;

pub(crate) const VERSION: u8 = 1;
const REFUSED: u8 = 1;
const REFUSED_BATCHES: u8 = 2;
const KEYSPACE: u8 = 3;

/// The kinds as docs/format.md has them.
#[cfg(test)]
pub(crate) const KINDS: [(u8, &str); 3] =
    [(REFUSED, "refused"), (REFUSED_BATCHES, "refused batches"), (KEYSPACE, "keyspace")];

/// What an entry did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing.
    Refused,
    /// What its batches say, but for those at these places.
    RefusedBatches(Vec<usize>),
    /// It made or dropped this keyspace, or gave it its merge operator.
    Keyspace(KeyspaceId),
}

impl Outcome {
    /// Of batches that were proposed together; none when all were applied.
    pub(crate) fn of_refusals(refusals: &[(usize, Error)]) -> Option<Self> {
        let places: Vec<usize> = refusals.iter().map(|(place, _)| *place).collect();
        (!places.is_empty()).then_some(Self::RefusedBatches(places))
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut out = vec![VERSION];
        match self {
            Self::Refused => out.push(REFUSED),
            Self::RefusedBatches(places) => {
                out.push(REFUSED_BATCHES);
                places.iter().for_each(|place| put_varint(&mut out, *place as u64));
            }
            Self::Keyspace(id) => {
                out.push(KEYSPACE);
                put_varint(&mut out, u64::from(id.0));
            }
        }
        out.into()
    }

    pub(crate) fn decode(bytes: Bytes) -> Result<Self> {
        let mut from = Decoder::new(bytes, "the outcome of an entry");
        let version = from.u8()?;
        if version != VERSION {
            let message = format!("the outcome of an entry is of another version version={version} known={VERSION}");
            return Err(Error::new(ErrorKind::Foreign, message));
        }
        let outcome = match from.u8()? {
            REFUSED => Self::Refused,
            REFUSED_BATCHES => {
                let mut places = Vec::new();
                while !from.is_empty() {
                    let place = usize::try_from(from.varint()?);
                    places.push(place.map_err(|_| from.corrupt("a place is too large"))?);
                }
                Self::RefusedBatches(places)
            }
            KEYSPACE => Self::Keyspace(KeyspaceId(from.varint_u32()?)),
            _ => return Err(from.corrupt("an unknown kind of outcome")),
        };
        from.end()?;
        Ok(outcome)
    }
}

/// The key under which the outcome of an entry is kept.
pub(crate) fn outcome_key(index: LogIndex) -> Bytes {
    let place = index.0.checked_rem(OUTCOMES_KEPT).unwrap_or_default();
    Bytes::copy_from_slice(&(place as u32).to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_comes_back_and_other_bytes_do_not() {
        let cases: [(Outcome, &[u8]); 3] = [
            (Outcome::Refused, b"\x01\x01"),
            (Outcome::RefusedBatches(vec![0, 300]), b"\x01\x02\x00\xac\x02"),
            (Outcome::Keyspace(KeyspaceId(7)), b"\x01\x03\x07"),
        ];
        for (outcome, bytes) in cases {
            assert_eq!(&outcome.encode()[..], bytes);
            assert_eq!(Outcome::decode(outcome.encode()).expect("ours"), outcome);
        }
        let kind = |bytes: &'static [u8]| Outcome::decode(Bytes::from_static(bytes)).expect_err("not ours").kind();
        assert_eq!(kind(b"\x02\x01"), ErrorKind::Foreign);
        for bytes in
            [&b""[..], b"\x01", b"\x01\x09", b"\x01\x01\x00", b"\x01\x02\x80", b"\x01\x03", b"\x01\x03\x07\x00"]
        {
            assert_eq!(kind(bytes), ErrorKind::Corrupt, "{bytes:?}");
        }
    }

    #[test]
    fn places_come_round() {
        assert_eq!(&outcome_key(LogIndex(5))[..], [0, 0, 0, 5]);
        assert_eq!(outcome_key(LogIndex(5)), outcome_key(LogIndex(5 + OUTCOMES_KEPT)));
        assert_ne!(outcome_key(LogIndex(5)), outcome_key(LogIndex(4 + OUTCOMES_KEPT)));
    }
}
