//! What must hold of the store for a batch to be applied.
//!
//! # Place
//! proposed with a batch as [`crate::CommandBody::BatchIf`], decided by `group::judge` and `once` when the batch is applied, on the
//! view that the embedder's commands have too
//! # Format
//! docs/format.md, "Commands"
//! # Invariants
//! 1. Every replica decides the same. A condition looks at live pairs alone: at their values, and at the indexes of the entries that
//!    wrote them. Both are kept by flush, compaction, clones, restart and the install of a snapshot. A tombstone counts as
//!    nothing: when it goes depends on what a replica has compacted.
//! 2. Within an entry a batch finds the writes of those before it, with the index of the entry as their version. No snapshot was
//!    ever taken at that index yet, so they are new to whoever read before.
//! 3. [`Condition::Range`] holds exactly when the pairs within the bounds are those that were live at `since`. A pair that is live
//!    now and not newer than `since` was live then, in this very version; so none that is newer and as many as there were are
//!    the same ones.
//! # Why not
//! The last write of a key, removals included, as other stores compare: the index of a removal is gone once its tombstone is, and
//! that is not at the same entry on every replica.
//! # Why not
//! A digest of the pairs of a range: it reads the same pairs and is equal by chance alone, where a count and a bound are exact.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::ops::Bound;

use bytes::Bytes;
use futures_util::future::join_all;

use crate::codec::{Decoder, put_bytes, put_varint};
use crate::command::{KEY_BYTES_MAX, VALUE_BYTES_MAX, check_key, check_value};
use crate::{Apply, Error, ErrorKind, KeyspaceId, LogIndex, Result, WriteBatch};

/// Bytes of the shortest condition: its kind, a keyspace, and two of a key or of bounds.
pub(crate) const CONDITION_BYTES_MIN: usize = 4;
/// Conditions whose blocks are read together.
const READS_AT_ONCE: usize = 16;
/// Bytes of a key that a refusal names.
const KEY_SHOWN_BYTES: usize = 64;

const ABSENT: u8 = 1;
const PRESENT: u8 = 2;
const VALUE: u8 = 3;
const VERSION: u8 = 4;
const RANGE: u8 = 5;

/// The kinds as docs/format.md has them.
#[cfg(test)]
pub(crate) const CONDITION_KINDS: [(u8, &str); 5] =
    [(ABSENT, "absent"), (PRESENT, "present"), (VALUE, "value"), (VERSION, "version"), (RANGE, "range")];

const UNBOUNDED: u8 = 0;
const INCLUDED: u8 = 1;
const EXCLUDED: u8 = 2;

/// What must hold of the branch of a batch when the batch is applied.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Condition {
    /// The key was never written, or removed.
    Absent {
        /// Where.
        keyspace: KeyspaceId,
        /// Which.
        key: Bytes,
    },
    /// The key has a value, whichever.
    Present {
        /// Where.
        keyspace: KeyspaceId,
        /// Which.
        key: Bytes,
    },
    /// The key has exactly this value.
    Value {
        /// Where.
        keyspace: KeyspaceId,
        /// Which.
        key: Bytes,
        /// Its value.
        value: Bytes,
    },
    /// The key has the value that this entry wrote: it was neither written nor removed since.
    Version {
        /// Where.
        keyspace: KeyspaceId,
        /// Which.
        key: Bytes,
        /// As [`crate::Snapshot::get_version`] gave it.
        version: LogIndex,
    },
    /// The pairs within the bounds are those of the snapshot at `since`.
    Range {
        /// Where.
        keyspace: KeyspaceId,
        /// From where.
        lower: Bound<Bytes>,
        /// To where.
        upper: Bound<Bytes>,
        /// The index of the snapshot.
        since: LogIndex,
        /// How many it had.
        count: u64,
    },
}

/// A batch that is applied if all of its conditions hold, and else changes nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConditionalBatch {
    /// What must hold before the mutations. None: as a plain batch.
    pub conditions: Vec<Condition>,
    /// The mutations.
    pub batch: WriteBatch,
}

impl Condition {
    /// Where it looks.
    pub fn keyspace(&self) -> KeyspaceId {
        match self {
            Self::Absent { keyspace, .. }
            | Self::Present { keyspace, .. }
            | Self::Value { keyspace, .. }
            | Self::Version { keyspace, .. }
            | Self::Range { keyspace, .. } => *keyspace,
        }
    }

    /// About the bytes of its encoding.
    pub fn bytes(&self) -> usize {
        let bound = |bound: &Bound<Bytes>| match bound {
            Bound::Included(key) | Bound::Excluded(key) => key.len(),
            Bound::Unbounded => 0,
        };
        let keys = match self {
            Self::Absent { key, .. } | Self::Present { key, .. } | Self::Version { key, .. } => key.len(),
            Self::Value { key, value, .. } => key.len().saturating_add(value.len()),
            Self::Range { lower, upper, .. } => bound(lower).saturating_add(bound(upper)),
        };
        keys.saturating_add(24)
    }

    /// Refuses what no key can be.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Absent { key, .. } | Self::Present { key, .. } | Self::Version { key, .. } => check_key(key),
            Self::Value { key, value, .. } => check_key(key).and_then(|()| check_value(value)),
            Self::Range { lower, upper, .. } => check_bound(lower).and_then(|()| check_bound(upper)),
        }
    }

    /// Decides it on what was applied before, with what `apply` has written on top.
    async fn holds(&self, apply: &Apply) -> Result<bool> {
        Ok(match self {
            Self::Absent { keyspace, key } => apply.get_version(*keyspace, key).await?.is_none(),
            Self::Present { keyspace, key } => apply.get_version(*keyspace, key).await?.is_some(),
            Self::Value { keyspace, key, value } => {
                apply.get_version(*keyspace, key).await?.is_some_and(|(_, found)| found == value)
            }
            Self::Version { keyspace, key, version } => {
                apply.get_version(*keyspace, key).await?.is_some_and(|(found, _)| found == *version)
            }
            Self::Range { keyspace, lower, upper, since, count } => {
                apply.is_unchanged(*keyspace, lower, upper, *since, *count).await?
            }
        })
    }

    /// The error of a batch that it refused; `name` is that of its keyspace.
    pub(crate) fn conflict(&self, name: &str) -> Error {
        let (what, key) = match self {
            Self::Absent { key, .. } => ("the key is there", key.as_ref()),
            Self::Present { key, .. } => ("the key is absent", key.as_ref()),
            Self::Value { key, .. } => ("the key has another value", key.as_ref()),
            Self::Version { key, .. } => ("the key was written since it was read", key.as_ref()),
            Self::Range { lower: Bound::Included(key) | Bound::Excluded(key), .. } => {
                ("the range from this key on was written since it was read", key.as_ref())
            }
            Self::Range { .. } => ("the range was written since it was read", &b""[..]),
        };
        let shown = key.get(..KEY_SHOWN_BYTES).unwrap_or(key).escape_ascii();
        let message = format!("{what}: nothing was applied, read again and retry keyspace={name} key={shown}");
        Error::new(ErrorKind::Conflict, message)
    }
}

fn check_bound(bound: &Bound<Bytes>) -> Result<()> {
    match bound {
        Bound::Included(key) | Bound::Excluded(key) if key.len() > KEY_BYTES_MAX => check_key(key),
        _ => Ok(()),
    }
}

/// The place of the first condition that does not hold.
///
/// # Errors
/// What the store could not read, which `apply` has noted.
pub(crate) async fn first_broken(conditions: &[Condition], apply: &Apply) -> Result<Option<usize>> {
    let mut place = 0_usize;
    for some in conditions.chunks(READS_AT_ONCE) {
        for held in join_all(some.iter().map(|condition| condition.holds(apply))).await {
            if !held? {
                return Ok(Some(place));
            }
            place = place.saturating_add(1);
        }
    }
    Ok(None)
}

/// Appends the count and the conditions.
pub(crate) fn put_conditions(out: &mut Vec<u8>, conditions: &[Condition]) -> Result<()> {
    put_varint(out, conditions.len() as u64);
    conditions.iter().try_for_each(|condition| put_condition(out, condition))
}

fn put_condition(out: &mut Vec<u8>, condition: &Condition) -> Result<()> {
    condition.check()?;
    out.push(match condition {
        Condition::Absent { .. } => ABSENT,
        Condition::Present { .. } => PRESENT,
        Condition::Value { .. } => VALUE,
        Condition::Version { .. } => VERSION,
        Condition::Range { .. } => RANGE,
    });
    put_varint(out, condition.keyspace().0.into());
    match condition {
        Condition::Absent { key, .. } | Condition::Present { key, .. } => put_bytes(out, key),
        Condition::Value { key, value, .. } => {
            put_bytes(out, key);
            put_bytes(out, value);
        }
        Condition::Version { key, version, .. } => {
            put_bytes(out, key);
            put_varint(out, version.0);
        }
        Condition::Range { lower, upper, since, count, .. } => {
            put_bound(out, lower);
            put_bound(out, upper);
            put_varint(out, since.0);
            put_varint(out, *count);
        }
    }
    Ok(())
}

fn put_bound(out: &mut Vec<u8>, bound: &Bound<Bytes>) {
    let (kind, key) = match bound {
        Bound::Unbounded => return out.push(UNBOUNDED),
        Bound::Included(key) => (INCLUDED, key),
        Bound::Excluded(key) => (EXCLUDED, key),
    };
    out.push(kind);
    put_bytes(out, key);
}

/// Reads what [`put_conditions`] wrote.
pub(crate) fn take_conditions(from: &mut Decoder) -> Result<Vec<Condition>> {
    let count = from.count(CONDITION_BYTES_MIN)?;
    (0..count).map(|_| take_condition(from)).collect()
}

fn take_condition(from: &mut Decoder) -> Result<Condition> {
    let kind = from.u8()?;
    let keyspace = KeyspaceId(from.varint_u32()?);
    let key = |from: &mut Decoder| from.bytes(1, KEY_BYTES_MAX);
    Ok(match kind {
        ABSENT => Condition::Absent { keyspace, key: key(from)? },
        PRESENT => Condition::Present { keyspace, key: key(from)? },
        VALUE => Condition::Value { keyspace, key: key(from)?, value: from.bytes(0, VALUE_BYTES_MAX)? },
        VERSION => Condition::Version { keyspace, key: key(from)?, version: LogIndex(from.varint()?) },
        RANGE => {
            let (lower, upper) = (take_bound(from)?, take_bound(from)?);
            Condition::Range { keyspace, lower, upper, since: LogIndex(from.varint()?), count: from.varint()? }
        }
        kind => return Err(Error::new(ErrorKind::Foreign, format!("a condition of an unknown kind kind={kind}"))),
    })
}

fn take_bound(from: &mut Decoder) -> Result<Bound<Bytes>> {
    Ok(match from.u8()? {
        UNBOUNDED => Bound::Unbounded,
        INCLUDED => Bound::Included(from.bytes(0, KEY_BYTES_MAX)?),
        EXCLUDED => Bound::Excluded(from.bytes(0, KEY_BYTES_MAX)?),
        _ => return Err(from.corrupt("an unknown kind of bound")),
    })
}

/// Version of an outcome that is remembered for a client.
const OUTCOME_VERSION: u8 = 1;

/// What is remembered of a conditional batch that was refused: which condition did not hold. Never empty, as the answer to one that
/// was applied is. No message: its words may differ between builds, and what is stored may not.
pub(crate) fn encode_broken(place: usize) -> Bytes {
    let mut out = vec![OUTCOME_VERSION];
    put_varint(&mut out, place as u64);
    out.into()
}

/// The place that [`encode_broken`] wrote; none for the answer to a batch that was applied.
///
/// # Errors
/// `Invalid` for any other answer: it is that to another request.
pub(crate) fn decode_broken(response: &Bytes) -> Result<Option<usize>> {
    if response.is_empty() {
        return Ok(None);
    }
    let mut from = Decoder::new(response.clone(), "the outcome of a batch");
    let place = match from.u8()? {
        OUTCOME_VERSION => from.varint().ok().and_then(|place| usize::try_from(place).ok()),
        _ => None,
    };
    let other = || Error::new(ErrorKind::Invalid, "the token of this batch was used for another request");
    place.filter(|_| from.is_empty()).map(Some).ok_or_else(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_comes_back_and_that_of_another_request_does_not() {
        assert_eq!(decode_broken(&Bytes::new()).expect("applied"), None);
        for place in [0, 1, 300] {
            assert_eq!(decode_broken(&encode_broken(place)).expect("ours"), Some(place));
        }
        assert_eq!(encode_broken(300), &b"\x01\xac\x02"[..]);
        for other in [&b"2"[..], b"\x01", b"\x01\x00\x00", b"\x02\x00"] {
            let error = decode_broken(&Bytes::from_static(other)).expect_err("not ours");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{other:?}");
        }
    }

    #[test]
    fn a_conflict_names_keyspace_and_key_and_says_what_to_do() {
        let key = Bytes::from(vec![b'k'; 1000]);
        let error = Condition::Absent { keyspace: KeyspaceId(3), key }.conflict("users");
        assert_eq!(error.kind(), ErrorKind::Conflict);
        let expect = "the key is there: nothing was applied, read again and retry keyspace=users key=kkkk";
        assert!(error.to_string().starts_with(expect), "{error}");
        assert!(error.to_string().len() < 200, "{error}");
    }
}
