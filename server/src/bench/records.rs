//! Keys and values that say what they are, and the book that tells whether a value found is one that may be there.
//!
//! # Format
//! A value from [`VALUE_BYTES_MIN`] bytes on begins with the number of its record (8 bytes, little endian), its version (4), the run that wrote
//! it (4) and a checksum of the three and of its length (8). The rest is one text, round and round from a place that the checksum chooses.
//! # Invariants
//! 1. A version counts as superseded only once a later one was acknowledged that began when nothing else of the record was under way. So what
//!    the book calls wrong cannot be explained by the order in which concurrent writes were applied.
//! 2. A write without an answer may be applied at any time: its record never again has a moment in which nothing is under way.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};

use super::draws::{Numbers, scatter};
use crate::cli::Failure;

/// The shortest value that says what it is.
pub(super) const VALUE_BYTES_MIN: usize = 24;
/// What a value is longest.
const VALUE_BYTES_MAX: u64 = 16 << 20;
/// Bytes of the text: more than a compressor of small blocks looks back.
const TEXT_BYTES: usize = 256 << 10;
/// Parts of the book, so that clients rarely wait for each other.
const SHARDS: usize = 64;

/// Stands before every key; what is behind has no order, so that inserts scatter.
const PREFIX: &str = "bench/";
/// Behind the last key.
pub(super) const KEYS_END: &str = "bench0";

pub(super) fn key_of(record: u64) -> Bytes {
    format!("{PREFIX}{:016x}", scatter(record)).into()
}

/// Makes values and looks at them.
pub(super) struct Values {
    run: u32,
    bytes: usize,
    /// Printable, so that it compresses as little as text without words does.
    text: Vec<u8>,
}

impl Values {
    /// Values of `bytes` for a run that no other has the number of.
    pub(super) fn new(bytes: u64, run: u32) -> Result<Self, Failure> {
        if bytes > VALUE_BYTES_MAX {
            return Err(Failure::usage(format!("a value has at most 16 MiB value={bytes}")));
        }
        let bytes = bytes as usize;
        let mut numbers = Numbers::new(0x9e37_79b9_7f4a_7c15);
        let text = (0..TEXT_BYTES).map(|_| b' ' + (numbers.next() % 95) as u8).collect();
        Ok(Self { run, bytes, text })
    }

    /// True when values are long enough to say what they are.
    pub(super) fn verifiable(&self) -> bool {
        self.bytes >= VALUE_BYTES_MIN
    }

    /// The value of a version of a record.
    pub(super) fn value(&self, record: u64, version: u32) -> Bytes {
        let mark = mark(record, version, self.run, self.bytes);
        let rest = self.bytes - if self.verifiable() { VALUE_BYTES_MIN } else { 0 };
        let mut value = BytesMut::with_capacity(self.bytes);
        if self.verifiable() {
            value.put_u64_le(record);
            value.put_u32_le(version);
            value.put_u32_le(self.run);
            value.put_u64_le(mark);
        }
        self.parts(mark, rest).for_each(|part| value.put_slice(part));
        value.freeze()
    }

    /// `bytes` of the text from where `mark` says.
    fn parts(&self, mark: u64, bytes: usize) -> impl Iterator<Item = &[u8]> {
        let mut from = (mark % TEXT_BYTES as u64) as usize;
        let mut left = bytes;
        std::iter::from_fn(move || {
            let part = self.text.get(from..)?;
            let part = part.get(..left.min(part.len())).filter(|part| !part.is_empty())?;
            left -= part.len();
            from = 0;
            Some(part)
        })
    }

    /// What a value found says of itself, if it is whole.
    pub(super) fn read(&self, value: &[u8]) -> Option<Stamp> {
        let (record, rest) = value.split_first_chunk()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (run, rest) = rest.split_first_chunk()?;
        let (found, rest) = rest.split_first_chunk()?;
        let (record, version) = (u64::from_le_bytes(*record), u32::from_le_bytes(*version));
        let (run, found) = (u32::from_le_bytes(*run), u64::from_le_bytes(*found));
        let mark = mark(record, version, run, value.len());
        // Of any length: values of an earlier run may have had another.
        let mut left = rest;
        let filled = self.parts(mark, rest.len()).all(|part| {
            let found = left.split_off(..part.len());
            found == Some(part)
        });
        (found == mark && filled).then_some(Stamp { record, version, ours: run == self.run })
    }
}

fn mark(record: u64, version: u32, run: u32, bytes: usize) -> u64 {
    scatter(scatter(record) ^ (u64::from(version) << 32 | u64::from(run))) ^ scatter(bytes as u64)
}

/// What a value says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) record: u64,
    pub(super) version: u32,
    /// Written in this run.
    pub(super) ours: bool,
}

/// What is known of the writes of each record in this run.
pub(super) struct Book {
    shards: Vec<Mutex<HashMap<u64, Entry>>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Versions given to writes, from 1 on.
    issued: u32,
    /// Writes without an answer.
    under_way: u32,
    /// No older version may be found.
    floor: u32,
    /// Some write was acknowledged: there is a value.
    acknowledged: bool,
}

/// A write under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Write {
    record: u64,
    pub(super) version: u32,
    alone: bool,
}

/// What must hold for the value of a record from one moment on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Expect {
    floor: u32,
    acknowledged: bool,
}

/// What a read found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    Right,
    Missing,
    Wrong(String),
}

impl Book {
    pub(super) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    fn shard(&self, record: u64) -> MutexGuard<'_, HashMap<u64, Entry>> {
        let shard = &self.shards[(record % SHARDS as u64) as usize];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a write is sent.
    pub(super) fn begin(&self, record: u64) -> Write {
        let mut shard = self.shard(record);
        let entry = shard.entry(record).or_default();
        let alone = entry.under_way == 0;
        entry.issued = entry.issued.saturating_add(1);
        entry.under_way = entry.under_way.saturating_add(1);
        Write { record, version: entry.issued, alone }
    }

    /// After it was acknowledged. One that was not stays under way.
    pub(super) fn acknowledge(&self, write: Write) {
        let mut shard = self.shard(write.record);
        let entry = shard.entry(write.record).or_default();
        entry.under_way = entry.under_way.saturating_sub(1);
        entry.acknowledged = true;
        if write.alone {
            entry.floor = entry.floor.max(write.version);
        }
    }

    /// Before a read is sent: what it must find at least.
    pub(super) fn expect(&self, record: u64) -> Expect {
        let entry = self.shard(record).get(&record).copied().unwrap_or_default();
        Expect { floor: entry.floor, acknowledged: entry.acknowledged }
    }

    /// After it was answered.
    pub(super) fn judge(&self, values: &Values, record: u64, expect: Expect, value: Option<&[u8]>) -> Finding {
        let Some(value) = value else {
            return if expect.acknowledged { Finding::Missing } else { Finding::Right };
        };
        let Some(stamp) = values.read(value) else {
            return Finding::Wrong(format!("the value of record {record} is not one that was written"));
        };
        if stamp.record != record {
            return Finding::Wrong(format!("record {record} has the value of record {}", stamp.record));
        }
        let issued = self.shard(record).get(&record).map_or(0, |entry| entry.issued);
        let (version, floor) = (stamp.version, expect.floor);
        match stamp.ours {
            // From before this run; gone once anything of this run is known to be there.
            false if !expect.acknowledged => Finding::Right,
            false => Finding::Wrong(format!("record {record} has a value of another run")),
            true if version < floor => {
                Finding::Wrong(format!("record {record} has version {version}, {floor} was acknowledged"))
            }
            true if version > issued => Finding::Wrong(format!("record {record} has version {version} of {issued}")),
            true => Finding::Right,
        }
    }

    /// The records that were written, in order.
    pub(super) fn records(&self) -> Vec<u64> {
        let guards = self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner));
        let mut records: Vec<u64> = guards.flat_map(|shard| shard.keys().copied().collect::<Vec<_>>()).collect();
        records.sort_unstable();
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(bytes: u64) -> Values {
        Values::new(bytes, 9).expect("short")
    }

    #[test]
    fn a_value_is_known_by_itself_and_every_changed_byte_shows() {
        for bytes in [24, 25, 256, 5000] {
            let values = values(bytes);
            let value = values.value(7, 3);
            assert_eq!(value.len() as u64, bytes);
            assert_eq!(values.read(&value), Some(Stamp { record: 7, version: 3, ours: true }));
            let other = Values::new(bytes, 8).expect("short");
            assert_eq!(other.read(&value), Some(Stamp { record: 7, version: 3, ours: false }));
            for at in 0..value.len() {
                let mut changed = value.to_vec();
                changed[at] ^= 1;
                assert_eq!(values.read(&changed), None, "bytes={bytes} at={at}");
            }
            assert_eq!(values.read(&value[..value.len() - 1]), None);
        }
        let (long, short) = (Values::new(600 << 10, 9).expect("short"), values(64));
        let value = long.value(7, 3);
        assert_eq!(short.read(&value), Some(Stamp { record: 7, version: 3, ours: true }), "of another length");
        let mut changed = value.to_vec();
        changed[(600 << 10) - 1] ^= 1;
        assert_eq!(short.read(&changed), None);
        for bytes in [0, 1, 23] {
            assert_eq!((values(bytes).value(7, 3).len() as u64, values(bytes).verifiable()), (bytes, false));
        }
        assert!(Values::new(VALUE_BYTES_MAX + 1, 1).is_err());
        assert_ne!(values(256).value(7, 3), values(256).value(7, 4));
    }

    #[test]
    fn keys_lie_before_the_end_and_none_is_given_twice() {
        let mut keys: Vec<Bytes> = (0..10_000).map(key_of).collect();
        assert!(keys.iter().all(|key| key.starts_with(PREFIX.as_bytes()) && key < KEYS_END.as_bytes()));
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 10_000);
    }

    #[test]
    fn an_older_version_than_one_acknowledged_alone_is_wrong() {
        let (values, book) = (values(64), Book::new());
        let judged = |version: Option<u32>| {
            let value = version.map(|version| values.value(5, version));
            book.judge(&values, 5, book.expect(5), value.as_deref())
        };
        let wrong = |finding: Finding| matches!(finding, Finding::Wrong(_));
        assert_eq!(judged(None), Finding::Right, "nothing was written");
        let first = book.begin(5);
        assert_eq!((judged(None), judged(Some(1))), (Finding::Right, Finding::Right), "it is under way");
        book.acknowledge(first);
        assert_eq!((judged(None), judged(Some(1))), (Finding::Missing, Finding::Right));
        assert!(wrong(judged(Some(2))), "never written");

        // Two at once: either may be the last.
        let (second, third) = (book.begin(5), book.begin(5));
        book.acknowledge(third);
        assert_eq!((judged(Some(2)), judged(Some(3))), (Finding::Right, Finding::Right));
        book.acknowledge(second);
        assert_eq!((judged(Some(2)), judged(Some(3))), (Finding::Right, Finding::Right));
        let fourth = book.begin(5);
        book.acknowledge(fourth);
        assert!(wrong(judged(Some(3))) && judged(Some(4)) == Finding::Right, "one after both");

        // What is expected is settled before the read is sent.
        let before = book.expect(5);
        let fifth = book.begin(5);
        book.acknowledge(fifth);
        assert_eq!(book.judge(&values, 5, before, Some(&values.value(5, 4))), Finding::Right);
        assert!(wrong(judged(Some(4))));

        // A write without an answer may come at any time.
        let _lost = book.begin(5);
        let seventh = book.begin(5);
        book.acknowledge(seventh);
        assert_eq!((judged(Some(6)), judged(Some(7))), (Finding::Right, Finding::Right));
        assert_eq!(book.records(), [5]);
    }

    #[test]
    fn values_of_others_are_told_apart() {
        let (values, book) = (values(64), Book::new());
        let before = Values::new(64, 8).expect("short").value(5, 1);
        assert_eq!(book.judge(&values, 5, book.expect(5), Some(&before)), Finding::Right, "from before this run");
        book.acknowledge(book.begin(5));
        let wrong = |value: &[u8]| matches!(book.judge(&values, 5, book.expect(5), Some(value)), Finding::Wrong(_));
        assert!(wrong(&before) && wrong(&values.value(6, 1)) && wrong(b"something else") && wrong(b""));
    }
}
