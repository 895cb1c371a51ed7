//! The records of the model: what each keyspace holds under which key.
//!
//! # Format
//! docs/format.md, "etcd model". Numbers within values are unsigned LEB128; within keys they are big-endian, so that the
//! order of bytes is the order of numbers. Every value begins with the version [`RECORD_VERSION`].
//!
//! # Invariants
//! R1. `history_key` keeps the order of keys, and no encoded key is a prefix of another.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::{Buf, BufMut, Bytes, BytesMut};
use mainstay_engine::{Error, ErrorKind, Result};
use prost::encoding::{decode_varint, encode_varint};

use crate::proto::mvccpb::KeyValue;

/// The first byte of every value.
pub const RECORD_VERSION: u8 = 1;
/// Longest key in bytes: twice this and the revision fit a key of the engine.
pub const KEY_BYTES_MAX: usize = 32_000;

const KIND_PUT: u8 = 0;
const KIND_DELETE: u8 = 1;

/// A revision: the number of a change of the store, and the place of one key's change within it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rev {
    /// The change.
    pub main: i64,
    /// The place within it, from 0.
    pub sub: i64,
}

impl Rev {
    /// The first place of a change.
    pub fn first(main: i64) -> Self {
        Self { main, sub: 0 }
    }

    /// Its key in [`super::store::Space::Revs`].
    pub(crate) fn encode(self) -> [u8; 12] {
        let mut out = [0; 12];
        let (main, sub) = out.split_at_mut(8);
        main.copy_from_slice(&(self.main.max(0) as u64).to_be_bytes());
        sub.copy_from_slice(&(self.sub.max(0) as u32).to_be_bytes());
        out
    }

    /// The revision of a key.
    pub(crate) fn decode(mut key: &[u8]) -> Result<Self> {
        if key.len() != 12 {
            return Err(corrupt("revision key"));
        }
        let main = i64::try_from(key.get_u64()).map_err(|_| corrupt("revision key"))?;
        Ok(Self { main, sub: i64::from(key.get_u32()) })
    }
}

/// Of the states of one life of a key, `etcd.history` holds one in so many, and the last one. A put of a key that is there
/// then writes two records and not three, for up to so many records more that a read at an old revision looks at.
pub const HISTORY_SPACING: i64 = if cfg!(test) { 3 } else { 16 };

/// What `etcd.keys` holds of a live key, and `etcd.history` of a superseded state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyMeta {
    /// Revision at which this life of the key began.
    pub create: i64,
    /// Revision of the state; its record is in `etcd.revs`.
    pub modified: Rev,
    /// Changes in this life.
    pub version: i64,
    /// The lease, 0 for none.
    pub lease: i64,
}

impl KeyMeta {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(40);
        out.put_u8(RECORD_VERSION);
        for number in [self.create, self.modified.main, self.modified.sub, self.version, self.lease] {
            encode_varint(number as u64, &mut out);
        }
        out.freeze()
    }

    pub(crate) fn decode(value: &[u8]) -> Result<Self> {
        let mut value = versioned(value, "key metadata")?;
        let mut next = || number(&mut value, "key metadata");
        Ok(Self { create: next()?, modified: Rev { main: next()?, sub: next()? }, version: next()?, lease: next()? })
    }
}

/// One key's change at one revision: the record in `etcd.revs`.
#[derive(Clone, Debug, PartialEq)]
pub struct RevRecord {
    /// Whether the key was deleted.
    pub deleted: bool,
    /// Where the state before this one is, if there was one.
    pub previous: Option<Rev>,
    /// The key.
    pub key: Bytes,
    /// Revision at which this life of the key began; 0 for a delete.
    pub create: i64,
    /// Changes in this life; 0 for a delete.
    pub version: i64,
    /// The lease, 0 for none.
    pub lease: i64,
    /// The value; empty for a delete.
    pub value: Bytes,
}

impl RevRecord {
    pub(crate) fn encode(&self) -> Bytes {
        let capacity = self.key.len().saturating_add(self.value.len()).saturating_add(64);
        let mut out = BytesMut::with_capacity(capacity);
        out.put_u8(RECORD_VERSION);
        out.put_u8(if self.deleted { KIND_DELETE } else { KIND_PUT });
        let previous = self.previous.unwrap_or_default();
        for number in [previous.main, previous.sub, self.create, self.version, self.lease] {
            encode_varint(number as u64, &mut out);
        }
        encode_varint(self.key.len() as u64, &mut out);
        out.put_slice(&self.key);
        out.put_slice(&self.value);
        out.freeze()
    }

    /// Whether the change at `rev` put the state that it ended into `etcd.history`, unless that began there as well: then an earlier change of
    /// the revision may have.
    pub(crate) fn left_history(&self, rev: Rev) -> bool {
        match self.previous {
            None => false,
            // Also if the same revision made it: it may have superseded another, which is reached from it.
            Some(_) if self.deleted => true,
            // A state that begins and ends within one revision is visible to nobody.
            Some(previous) => previous.main != rev.main && self.version.saturating_sub(1) % HISTORY_SPACING == 0,
        }
    }

    /// Key and value are slices of `bytes`.
    pub(crate) fn decode(bytes: &Bytes) -> Result<Self> {
        const WHAT: &str = "revision record";
        let mut rest = bytes.clone();
        if rest.len() < 2 || rest.get_u8() != RECORD_VERSION {
            return Err(corrupt(WHAT));
        }
        let deleted = match rest.get_u8() {
            KIND_PUT => false,
            KIND_DELETE => true,
            _ => return Err(corrupt(WHAT)),
        };
        let previous = Rev { main: number(&mut rest, WHAT)?, sub: number(&mut rest, WHAT)? };
        let create = number(&mut rest, WHAT)?;
        let version = number(&mut rest, WHAT)?;
        let lease = number(&mut rest, WHAT)?;
        let key_bytes = usize::try_from(number(&mut rest, WHAT)?).map_err(|_| corrupt(WHAT))?;
        if key_bytes > rest.len() {
            return Err(corrupt(WHAT));
        }
        let key = rest.split_to(key_bytes);
        let previous = (previous.main != 0).then_some(previous);
        Ok(Self { deleted, previous, key, create, version, lease, value: rest })
    }

    /// The record as the protocol shows it. `revision` is where it was found.
    pub(crate) fn into_key_value(self, revision: i64) -> KeyValue {
        KeyValue {
            key: self.key,
            create_revision: self.create,
            mod_revision: revision,
            version: self.version,
            value: self.value,
            lease: self.lease,
        }
    }
}

/// How far compaction is: the value of `COMPACTION_KEY` in `etcd.meta`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Reads before this revision are refused; -1 before the first compaction.
    pub revision: i64,
    /// The compaction whose garbage is gone, -1 before the first.
    pub collected: i64,
    /// Where collecting goes on.
    pub next: Rev,
}

/// See [`Compaction`].
pub(crate) const COMPACTION_KEY: &[u8] = b"compaction";

impl Default for Compaction {
    fn default() -> Self {
        Self { revision: -1, collected: -1, next: Rev::default() }
    }
}

impl Compaction {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(32);
        out.put_u8(RECORD_VERSION);
        // One more than the revision, since it may be -1.
        for number in [self.revision.saturating_add(1), self.collected.saturating_add(1), self.next.main, self.next.sub]
        {
            encode_varint(number as u64, &mut out);
        }
        out.freeze()
    }

    pub(crate) fn decode(value: &[u8]) -> Result<Self> {
        let mut value = versioned(value, "compaction")?;
        let mut next = || number(&mut value, "compaction");
        Ok(Self {
            revision: next()?.saturating_sub(1),
            collected: next()?.saturating_sub(1),
            next: Rev { main: next()?, sub: next()? },
        })
    }
}

/// The key of a lease in `etcd.leases`.
pub(crate) fn lease_key(id: i64) -> [u8; 8] {
    (id as u64).to_be_bytes()
}

/// The lease of a key in `etcd.leases` or `etcd.lease_keys`, and what follows it.
pub(crate) fn split_lease_key(key: &Bytes) -> Result<(i64, Bytes)> {
    let mut rest = key.clone();
    let id = rest.try_get_u64().map_err(|_| corrupt("lease key"))?;
    Ok((id as i64, rest))
}

/// The record of a lease: the seconds granted.
pub(crate) fn encode_lease(ttl: i64) -> Bytes {
    let mut out = BytesMut::with_capacity(12);
    out.put_u8(RECORD_VERSION);
    encode_varint(ttl as u64, &mut out);
    out.freeze()
}

/// The seconds granted to a lease.
pub(crate) fn decode_lease(value: &[u8]) -> Result<i64> {
    number(&mut versioned(value, "lease")?, "lease")
}

/// The key in `etcd.lease_keys` that says that `key` dies with lease `id`.
pub(crate) fn lease_member_key(id: i64, key: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(key.len().saturating_add(8));
    out.put_u64(id as u64);
    out.put_slice(key);
    out.freeze()
}

/// The beginning of every key of `etcd.history` for `key`: the key with each zero byte as 00 FF, then 00 01.
pub(crate) fn history_prefix(key: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(key.len().saturating_add(16));
    for part in key.split_inclusive(|&byte| byte == 0) {
        out.put_slice(part);
        if part.last() == Some(&0) {
            out.put_u8(0xff);
        }
    }
    out.put_slice(&[0, 1]);
    out
}

/// The key in `etcd.history` of the state of `key` that was superseded at revision `until`.
pub(crate) fn history_key(key: &[u8], until: i64) -> Bytes {
    let mut out = history_prefix(key);
    out.put_u64(until.max(0) as u64);
    out.freeze()
}

/// The bound in `etcd.history` below which all keys less than `key` lie, and no other.
pub(crate) fn history_bound(key: &[u8]) -> Bytes {
    history_prefix(key).freeze()
}

/// What `history_key` was made of.
pub(crate) fn split_history_key(encoded: &[u8]) -> Result<(Bytes, i64)> {
    const WHAT: &str = "history key";
    let mut key = BytesMut::with_capacity(encoded.len());
    let mut rest = encoded;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != 0 {
            key.put_u8(byte);
            continue;
        }
        match rest.split_first() {
            Some((0xff, after)) => {
                key.put_u8(0);
                rest = after;
            }
            Some((1, after)) if after.len() == 8 => {
                let mut until = after;
                let until = i64::try_from(until.get_u64()).map_err(|_| corrupt(WHAT))?;
                return Ok((key.freeze(), until));
            }
            _ => break,
        }
    }
    Err(corrupt(WHAT))
}

/// What a value of the wrong shape gives.
pub(crate) fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("record of the etcd model does not decode what={what}"))
}

fn versioned<'a>(value: &'a [u8], what: &str) -> Result<&'a [u8]> {
    match value.split_first() {
        Some((&RECORD_VERSION, rest)) => Ok(rest),
        _ => Err(corrupt(what)),
    }
}

fn number(from: &mut impl Buf, what: &str) -> Result<i64> {
    decode_varint(from).map(|number| number as i64).map_err(|_| corrupt(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// docs/format.md shows these bytes: a change here is a change there.
    #[test]
    fn records_are_as_the_page_of_formats_shows_them() {
        assert_eq!(Rev { main: 258, sub: 3 }.encode(), [0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 3]);
        assert_eq!(history_key(b"a\0", 2)[..], [b'a', 0, 0xff, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2]);
        let record = RevRecord {
            deleted: false,
            previous: Some(Rev { main: 300, sub: 1 }),
            key: "k".into(),
            create: 2,
            version: 3,
            lease: 4,
            value: "v".into(),
        };
        assert_eq!(record.encode()[..], [1, 0, 0xac, 2, 1, 2, 3, 4, 1, b'k', b'v']);
        let meta = KeyMeta { create: 2, modified: Rev { main: 300, sub: 1 }, version: 3, lease: 4 };
        assert_eq!(meta.encode()[..], [1, 2, 0xac, 2, 1, 3, 4]);
        let compaction = Compaction { revision: 5, collected: -1, next: Rev { main: 3, sub: 0 } };
        assert_eq!(compaction.encode()[..], [1, 6, 0, 3, 0]);
    }

    proptest! {
        #[test]
        fn history_keys_keep_the_order_of_keys_then_of_revisions(
            a in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xff), any::<u8>()], 1..6),
            b in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xff), any::<u8>()], 1..6),
            i in 0i64..4, j in 0i64..4,
        ) {
            let (x, y) = (history_key(&a, i), history_key(&b, j));
            prop_assert_eq!((a.clone(), i).cmp(&(b.clone(), j)), x.cmp(&y));
            prop_assert_eq!(split_history_key(&x).expect("just encoded"), (Bytes::from(a), i));
        }

        #[test]
        fn records_come_back_as_they_were(
            deleted: bool, key in proptest::collection::vec(any::<u8>(), 1..40), value in proptest::collection::vec(any::<u8>(), 0..40),
            previous in proptest::option::of((1i64..i64::MAX, 0i64..1000)), numbers: [i64; 3],
        ) {
            let record = RevRecord {
                deleted, previous: previous.map(|(main, sub)| Rev { main, sub }), key: key.into(),
                create: numbers[0], version: numbers[1], lease: numbers[2], value: value.into(),
            };
            prop_assert_eq!(RevRecord::decode(&record.encode()).expect("just encoded"), record);
            let meta = KeyMeta { create: numbers[0], modified: Rev { main: 5, sub: 7 }, version: numbers[1], lease: numbers[2] };
            prop_assert_eq!(KeyMeta::decode(&meta.encode()).expect("just encoded"), meta);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let bytes = Bytes::from(bytes);
            let _ = RevRecord::decode(&bytes);
            let _ = KeyMeta::decode(&bytes);
            let _ = Compaction::decode(&bytes);
            let _ = Rev::decode(&bytes);
            let _ = split_history_key(&bytes);
            let _ = split_lease_key(&bytes);
            let _ = decode_lease(&bytes);
        }
    }
}
