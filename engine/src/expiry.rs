//! Pairs that expire: the time of the log, and how a value carries its end.
//!
//! # Place
//! the applier stamps values of expiring keyspaces; readers and compactions look at the end; docs/rfcs/0004-time-to-live.md has the reasons
//! # Format
//! docs/format.md, "Values that end": a varint, the end in milliseconds since the Unix epoch or 0 for none, then the value
//! # Invariants
//! 1. The time of the log never goes back, and depends on the entries alone.
//! 2. A pair is there for a reader exactly while the time of the reader's index is before the end of the pair.
//! 3. Who drops what has ended has a time that no reader of its outputs is before.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};

use crate::codec::put_varint;
use crate::command::{TableEnds, VALUE_BYTES_MAX};
use crate::{Error, ErrorKind, KeyspaceId, LogIndex, Result};

/// Most bytes of an end.
const END_BYTES_MAX: usize = 10;
/// No end is later: what comes after a decoded number can be counted without an overflow.
const END_MAX: u64 = u64::MAX >> 1;
/// Places of [`Times`].
const TIMES: usize = 64;
/// The low bits of an index, which say its place.
const TIMES_MASK: u64 = 63;
const _: () = assert!(TIMES_MASK + 1 == TIMES as u64 && TIMES.is_power_of_two());
/// By how many entries a reader of [`Times`] may be late: fewer than there are places.
const LATE_MAX: u64 = 32;

/// What a group with expiring keyspaces knows of time at an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogClock {
    /// The time of the log, in milliseconds since the Unix epoch.
    pub(crate) time_ms: u64,
    /// The latest end of a pair that was put so far.
    pub(crate) latest_end_ms: u64,
}

impl LogClock {
    /// As an entry of that time leaves it.
    pub(crate) fn at(self, time_ms: u64) -> Self {
        let before_ms = if mainstay_io::mutant!(TimeGoesBack) { 0 } else { self.time_ms };
        Self { time_ms: before_ms.max(time_ms.min(END_MAX)), ..self }
    }

    /// The end of a pair that is put now for so long; 0 for ever.
    pub(crate) fn end_of(&mut self, ttl_ms: u64) -> u64 {
        if ttl_ms == 0 {
            return 0;
        }
        let end = self.time_ms.saturating_add(ttl_ms).min(END_MAX);
        self.latest_end_ms = self.latest_end_ms.max(end);
        end
    }

    /// Some pair has yet to end.
    pub(crate) fn waits_for_an_end(&self) -> bool {
        self.latest_end_ms > self.time_ms
    }
}

/// An index, and the time of the log there: what a reader reads at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadAt {
    pub(crate) index: LogIndex,
    pub(crate) time_ms: u64,
}

/// Of what does not expire.
impl From<LogIndex> for ReadAt {
    fn from(index: LogIndex) -> Self {
        Self { index, time_ms: 0 }
    }
}

/// The times of the latest entries: readers find that of the very index that they read at.
pub(crate) struct Times([AtomicU64; TIMES]);

impl Times {
    pub(crate) fn new() -> Self {
        Self([const { AtomicU64::new(0) }; TIMES])
    }

    fn place(&self, index: LogIndex) -> Option<&AtomicU64> {
        self.0.get((index.0 & TIMES_MASK) as usize)
    }

    /// Before the index is shown.
    pub(crate) fn set(&self, index: LogIndex, time_ms: u64) {
        if let Some(place) = self.place(index) {
            place.store(time_ms, Ordering::Release);
        }
    }

    /// The index that `shown` gives, and its time.
    pub(crate) fn read(&self, shown: impl Fn() -> LogIndex) -> ReadAt {
        loop {
            let index = shown();
            let time_ms = self.place(index).map_or(0, |place| place.load(Ordering::Acquire));
            // Its place is not that of another entry yet.
            if shown().0.saturating_sub(index.0) < LATE_MAX {
                return ReadAt { index, time_ms };
            }
        }
    }
}

/// A value as an expiring keyspace holds it.
pub(crate) fn stamp(end_ms: u64, value: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(value.len().saturating_add(END_BYTES_MAX));
    put_varint(&mut out, end_ms);
    out.extend_from_slice(value);
    out.into()
}

/// Refuses a value that is too long with its end.
pub(crate) fn check_stamped(keyspace: KeyspaceId, value: &[u8]) -> Result<()> {
    let max = VALUE_BYTES_MAX.saturating_sub(END_BYTES_MAX);
    match value.len() <= max {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "a value of an expiring keyspace is too long keyspace={keyspace} length={} length_max={max}",
                value.len()
            ),
        )),
    }
}

/// The answer to a put for a time in a keyspace that was not made for it.
pub(crate) fn not_expiring(keyspace: KeyspaceId) -> Error {
    let message = format!("pairs of this keyspace do not expire: make an expiring one keyspace={keyspace}");
    Error::new(ErrorKind::Invalid, message)
}

/// The end of a stored value, and how many bytes it takes.
fn end_of(stored: &[u8]) -> Result<(u64, usize)> {
    let mut end = 0_u64;
    for (at, byte) in stored.iter().take(END_BYTES_MAX).enumerate() {
        let shift = u32::try_from(at).unwrap_or(u32::MAX).saturating_mul(7);
        let part = u64::from(byte & 0x7f);
        end |= part.checked_shl(shift).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Ok((end, at.saturating_add(1)));
        }
    }
    Err(Error::new(ErrorKind::Corrupt, "a value of an expiring keyspace has no end"))
}

/// No pair ends at 0, which is never.
fn is_past(end_ms: u64, time_ms: u64) -> bool {
    end_ms != 0 && end_ms <= time_ms
}

/// Ends that [`EndsOfTable`] keeps.
const SAMPLES_MAX: usize = 1024;

/// Finds [`TableEnds`] of what is added: half of the pairs by that of some of them, which lie evenly apart.
#[derive(Default)]
pub(crate) struct EndsOfTable {
    samples: Vec<u64>,
    /// One in so many is a sample: two to this power.
    spacing_log2: u32,
    pairs: u64,
    last_ms: u64,
}

impl EndsOfTable {
    /// A pair as it is stored.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(crate) fn add(&mut self, stored: &[u8]) -> Result<()> {
        let end_ms = match end_of(stored)? {
            (0, _) => u64::MAX,
            (end_ms, _) => end_ms,
        };
        self.last_ms = self.last_ms.max(end_ms);
        if self.pairs.trailing_zeros() >= self.spacing_log2 {
            if self.samples.len() == SAMPLES_MAX {
                let mut place = 0_u32;
                self.samples.retain(|_| {
                    place ^= 1;
                    place == 1
                });
                self.spacing_log2 = self.spacing_log2.saturating_add(1);
            }
            if self.pairs.trailing_zeros() >= self.spacing_log2 {
                self.samples.push(end_ms);
            }
        }
        self.pairs = self.pairs.saturating_add(1);
        Ok(())
    }

    pub(crate) fn finish(mut self) -> TableEnds {
        let Some(middle) = self.samples.len().checked_sub(1).map(|last| last / 2) else { return TableEnds::default() };
        let (_, half_ms, _) = self.samples.select_nth_unstable(middle);
        let known = |end_ms| if end_ms == u64::MAX { 0 } else { end_ms };
        TableEnds { half_ms: known(*half_ms), last_ms: known(self.last_ms) }
    }
}

/// True when the pair is gone for who reads at that time.
///
/// # Errors
/// `Corrupt`.
pub(crate) fn has_ended(stored: &[u8], time_ms: u64) -> Result<bool> {
    let (end, _) = end_of(stored)?;
    Ok(is_past(end, time_ms))
}

/// The value for who reads at that time; none once it has ended.
///
/// # Errors
/// `Corrupt`.
pub(crate) fn live(mut stored: Bytes, time_ms: u64) -> Result<Option<Bytes>> {
    let (end, length) = end_of(&stored)?;
    if is_past(end, time_ms) {
        return Ok(None);
    }
    stored.advance(length);
    Ok(Some(stored))
}

/// As [`live`], borrowed.
///
/// # Errors
/// `Corrupt`.
pub(crate) fn live_part(stored: &[u8], time_ms: u64) -> Result<Option<&[u8]>> {
    let (end, length) = end_of(stored)?;
    Ok(if is_past(end, time_ms) { None } else { stored.get(length..) })
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_there_until_the_time_is_its_end() {
        for end in [1, 127, 128, 300, 1 << 40, END_MAX] {
            let stored = stamp(end, b"value");
            for (time, there) in [(0, true), (end - 1, true), (end, false), (end.saturating_add(1), false)] {
                let expect = there.then(|| Bytes::from_static(b"value"));
                assert_eq!(live(stored.clone(), time).expect("ours"), expect, "end={end} time={time}");
                assert_eq!(live_part(&stored, time).expect("ours"), expect.as_deref());
                assert_eq!(has_ended(&stored, time).expect("ours"), !there);
            }
        }
        let stored = stamp(0, b"");
        assert_eq!(live(stored.clone(), u64::MAX).expect("ours"), Some(Bytes::new()), "0 is never");
        assert!(!has_ended(&stored, u64::MAX).expect("ours"));
    }

    #[test]
    fn bytes_without_an_end_are_corrupt() {
        for bytes in [&[][..], &[0x80], &[0xff; 10], &[0xff; 20]] {
            assert_eq!(live(Bytes::copy_from_slice(bytes), 0).expect_err("no end").kind(), ErrorKind::Corrupt);
            assert!(has_ended(bytes, 0).is_err() && live_part(bytes, 0).is_err());
        }
    }

    fn ends(of: impl IntoIterator<Item = u64>) -> TableEnds {
        let mut ends = EndsOfTable::default();
        of.into_iter().for_each(|end_ms| ends.add(&stamp(end_ms, b"value")).expect("ours"));
        ends.finish()
    }

    #[test]
    fn the_ends_of_a_table_are_when_half_of_its_pairs_have_ended_and_all() {
        let of = |half_ms, last_ms| TableEnds { half_ms, last_ms };
        assert_eq!(ends([]), of(0, 0));
        assert_eq!(ends([7]), of(7, 7));
        assert_eq!(ends([9, 7]), of(7, 9));
        assert_eq!(ends([0]), of(0, 0), "never");
        assert_eq!(ends([5, 0]), of(5, 0));
        assert_eq!(ends([0, 5, 0]), of(0, 0));
        assert_eq!(ends([3, 0, 8]), of(8, 0));
        // However many: the samples stay evenly apart, so they know of all parts of the table.
        for count in [1000, 1025, 5000, 300_000_u64] {
            let TableEnds { half_ms, last_ms } = ends((1..=count).rev());
            assert!(half_ms.abs_diff(count / 2) <= count / 256, "{half_ms} of {count}");
            assert_eq!(last_ms, count);
        }
        assert!(EndsOfTable::default().add(&[0x80]).is_err());
    }

    #[test]
    fn the_time_of_the_log_never_goes_back() {
        let mut clock = LogClock::default();
        for (time, expect) in [(5, 5), (3, 5), (0, 5), (9, 9), (u64::MAX, END_MAX), (7, END_MAX)] {
            clock = clock.at(time);
            assert_eq!(clock.time_ms, expect);
        }
        assert_eq!(clock.end_of(7), END_MAX);
        assert!(!clock.waits_for_an_end());
        let mut clock = LogClock { time_ms: 10, latest_end_ms: 0 };
        assert_eq!((clock.end_of(0), clock.latest_end_ms), (0, 0));
        assert_eq!((clock.end_of(5), clock.end_of(2)), (15, 12));
        assert!(clock.waits_for_an_end() && !clock.at(15).waits_for_an_end());
    }

    #[test]
    fn a_reader_finds_the_time_of_its_index() {
        let times = Times::new();
        for index in 0..200 {
            times.set(LogIndex(index), index * 10);
            assert_eq!(times.read(|| LogIndex(index)), ReadAt { index: LogIndex(index), time_ms: index * 10 });
        }
        // It is looked at again when it has moved on too far.
        let calls = std::cell::Cell::new(0);
        let shown = || {
            calls.set(calls.get() + 1);
            LogIndex(if calls.get() == 1 { 100 } else { 199 })
        };
        assert_eq!(times.read(shown), ReadAt { index: LogIndex(199), time_ms: 1990 });
    }
}
