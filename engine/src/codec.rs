//! Varints, byte strings and a reader that never panics: what the encodings of commands and manifests share.
//!
//! # Format
//! docs/format.md, "Commands" and "Manifest"
//! # Invariants
//! 1. A [`Decoder`] hands out slices of the bytes it was given and copies none.
//! 2. Whatever the bytes, it answers a value or `Corrupt`; it allocates nothing that the input does not pay for.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::Bytes;

use crate::command::{KEY_BYTES_MAX, TableEnds, TableRanges};
use crate::range_tombstone::{BOUND_BYTES_MAX, KeyRange, last_before, last_key};
use crate::{BranchId, Error, ErrorKind, InstallTable, JobId, KeyspaceId, OperatorId, Result, TableId};

/// Bytes of the longest varint of 64 bits.
const VARINT_BYTES_MAX: u32 = 10;

/// Appends a little-endian base-128 varint.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a length as a varint and the bytes.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Bytes of a bound of a span: what follows the longest key at once is one longer.
pub(crate) const SPAN_BYTES_MAX: usize = crate::command::KEY_BYTES_MAX + 1;

/// Appends the keys from `first` and before `end`.
pub(crate) fn put_span(out: &mut Vec<u8>, first: &[u8], end: Option<&Bytes>) {
    put_bytes(out, first);
    out.push(end.is_some().into());
    if let Some(end) = end {
        put_bytes(out, end);
    }
}

/// Reads what [`put_span`] wrote.
pub(crate) fn take_span(from: &mut Decoder) -> Result<(Bytes, Option<Bytes>)> {
    let first = from.bytes(0, SPAN_BYTES_MAX)?;
    let end = match from.u8()? {
        0 => None,
        1 => Some(from.bytes(0, SPAN_BYTES_MAX)?),
        _ => return Err(from.corrupt("an end is neither there nor absent")),
    };
    Ok((first, end))
}

/// Reads what the functions above wrote.
pub(crate) struct Decoder {
    rest: Bytes,
    what: &'static str,
}

impl Decoder {
    /// Reads `bytes`; `what` names them in errors.
    pub(crate) fn new(bytes: Bytes, what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    /// The error for damage found here.
    pub(crate) fn corrupt(&self, why: &str) -> Error {
        Error::new(ErrorKind::Corrupt, format!("{} is damaged: {why} left={}", self.what, self.rest.len()))
    }

    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `count` bytes.
    pub(crate) fn take(&mut self, count: usize) -> Result<Bytes> {
        if count > self.rest.len() {
            return Err(self.corrupt("it ends early"));
        }
        Ok(self.rest.split_to(count))
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        let byte = *self.rest.first().ok_or_else(|| self.corrupt("it ends early"))?;
        self.take(1)?;
        Ok(byte)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let array = self.rest.first_chunk::<N>().copied().ok_or_else(|| self.corrupt("it ends early"))?;
        self.take(N)?;
        Ok(array)
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn u128(&mut self) -> Result<u128> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    pub(crate) fn varint(&mut self) -> Result<u64> {
        let mut value = 0_u64;
        for at in 0..VARINT_BYTES_MAX {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            let shift = at.saturating_mul(7);
            // The tenth byte has room for one bit.
            if shift == 63 && bits > 1 {
                return Err(self.corrupt("a varint is above 64 bits"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.corrupt("a varint is too long"))
    }

    pub(crate) fn varint_u32(&mut self) -> Result<u32> {
        u32::try_from(self.varint()?).map_err(|_| self.corrupt("a number is above 32 bits"))
    }

    /// A count of items of at least `item_bytes` each: never more than the input can hold.
    pub(crate) fn count(&mut self, item_bytes: usize) -> Result<usize> {
        let count = usize::try_from(self.varint()?).map_err(|_| self.corrupt("a count is too large"))?;
        if count.saturating_mul(item_bytes.max(1)) > self.rest.len() {
            return Err(self.corrupt("a count is larger than what follows"));
        }
        Ok(count)
    }

    /// A byte string of `min..=max` bytes.
    pub(crate) fn bytes(&mut self, min: usize, max: usize) -> Result<Bytes> {
        let length = usize::try_from(self.varint()?).map_err(|_| self.corrupt("a length is too large"))?;
        if length < min || max < length {
            return Err(self.corrupt("a length is outside of its bounds"));
        }
        self.take(length)
    }

    /// A name of UTF-8.
    pub(crate) fn name(&mut self) -> Result<String> {
        let bytes = self.bytes(1, NAME_BYTES_MAX)?;
        match std::str::from_utf8(&bytes) {
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err(self.corrupt("a name is not UTF-8")),
        }
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.rest)
    }

    /// Refuses bytes after the end.
    pub(crate) fn end(&self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.corrupt("bytes follow its end")) }
    }
}

/// Longest name of a keyspace, checkpoint or branch, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// Longest table root in bytes.
pub(crate) const ROOT_BYTES_MAX: usize = 1 << 10;
/// Fewest bytes of an encoded range.
const RANGE_BYTES_MIN: usize = 3;
/// Fewest bytes of an encoded table.
pub(crate) const TABLE_BYTES_MIN: usize = 26;

/// Refuses a name that cannot be stored.
pub(crate) fn check_name(name: &str) -> Result<()> {
    match name.len() {
        1..=NAME_BYTES_MAX => Ok(()),
        0 => Err(Error::new(ErrorKind::Invalid, "a name is empty")),
        length => Err(Error::new(
            ErrorKind::Invalid,
            format!("a name is too long length={length} length_max={NAME_BYTES_MAX}"),
        )),
    }
}

/// Appends a range; see [`take_range`].
pub(crate) fn put_range(out: &mut Vec<u8>, range: &KeyRange) {
    put_bytes(out, range.start());
    put_bytes(out, range.end().map_or(&[], |end| end));
}

/// Reads a range that holds a key. An empty end is none.
pub(crate) fn take_range(from: &mut Decoder) -> Result<KeyRange> {
    let (start, end) = (from.bytes(1, BOUND_BYTES_MAX)?, from.bytes(0, BOUND_BYTES_MAX)?);
    let range = KeyRange::from_parts(start, (!end.is_empty()).then_some(end));
    range.check().map_err(|_| from.corrupt("a range ends before it begins"))?;
    Ok(range)
}

/// How tables are written one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableForm {
    /// None of them has range tombstones: as before there were any.
    Plain,
    /// Each with what [`TableRanges`] has of it.
    Ranged,
    /// The same, and what [`TableEnds`] has.
    Ending,
}

impl TableForm {
    /// The form in which these can be written.
    pub(crate) fn of<'a>(tables: impl Iterator<Item = &'a InstallTable>) -> Self {
        let mut form = Self::Plain;
        for table in tables {
            if table.has_ends() {
                return Self::Ending;
            }
            if table.has_ranges() {
                form = Self::Ranged;
            }
        }
        form
    }
}

pub(crate) fn put_table(out: &mut Vec<u8>, table: &InstallTable, form: TableForm) {
    put_varint(out, table.id.job.0);
    put_varint(out, table.id.ordinal.into());
    put_varint(out, table.branch.0);
    put_varint(out, table.keyspace.0.into());
    put_bytes(out, &table.first);
    // The largest key is long, and where a range has no end it is the last of the table.
    let last = if form != TableForm::Plain && table.last == last_key() { &[] } else { &table.last[..] };
    put_bytes(out, last);
    put_varint(out, table.entries);
    put_varint(out, table.tombstones);
    put_varint(out, table.bytes);
    out.extend_from_slice(&table.digest.to_le_bytes());
    put_bytes(out, &table.root);
    if form != TableForm::Plain {
        put_varint(out, table.ranges.tombstones);
        put_varint(out, table.ranges.spans.len() as u64);
        table.ranges.spans.iter().for_each(|span| put_range(out, span));
    }
    if form == TableForm::Ending {
        put_varint(out, table.ends.half_ms);
        put_varint(out, table.ends.last_ms);
    }
}

/// Appends which operator.
pub(crate) fn put_operator(out: &mut Vec<u8>, operator: &OperatorId) {
    put_bytes(out, operator.name().as_bytes());
    put_varint(out, operator.version().into());
}

pub(crate) fn take_operator(from: &mut Decoder) -> Result<OperatorId> {
    Ok(OperatorId::new(from.name()?, from.varint_u32()?))
}

pub(crate) fn take_table(from: &mut Decoder, form: TableForm) -> Result<InstallTable> {
    let (last_min, first_max) = match form {
        TableForm::Plain => (1, KEY_BYTES_MAX),
        TableForm::Ranged | TableForm::Ending => (0, BOUND_BYTES_MAX),
    };
    let mut table = InstallTable {
        id: TableId { job: JobId(from.varint()?), ordinal: from.varint_u32()? },
        branch: BranchId(from.varint()?),
        keyspace: KeyspaceId(from.varint_u32()?),
        first: from.bytes(1, first_max)?,
        last: from.bytes(last_min, KEY_BYTES_MAX)?,
        entries: from.varint()?,
        tombstones: from.varint()?,
        bytes: from.varint()?,
        digest: from.u128()?,
        root: from.bytes(0, ROOT_BYTES_MAX)?,
        ranges: TableRanges::default(),
        ends: TableEnds::default(),
    };
    if table.last.is_empty() {
        table.last = last_key();
    }
    if form != TableForm::Plain {
        table.ranges.tombstones = from.varint()?;
        let spans = (0..from.count(RANGE_BYTES_MIN)?).map(|_| take_range(from)).collect::<Result<Vec<_>>>()?;
        let apart = spans.iter().zip(spans.iter().skip(1)).all(|(a, b)| a.end_place() < b.start());
        let inside =
            spans.iter().all(|span| table.first <= span.start() && last_before(span.end_place()) <= table.last);
        let without = table.ranges.tombstones == 0 && (!spans.is_empty() || table.first.len() > KEY_BYTES_MAX);
        if !apart || !inside || without {
            return Err(from.corrupt("what range tombstones of a table hide is not in it, or out of order"));
        }
        table.ranges.spans = spans;
    }
    if form == TableForm::Ending {
        table.ends = TableEnds { half_ms: from.varint()?, last_ms: from.varint()? };
        let TableEnds { half_ms, last_ms } = table.ends;
        if last_ms != 0 && !(1..=last_ms).contains(&half_ms) {
            return Err(from.corrupt("all pairs of a table end before half of them do"));
        }
    }
    if table.first > table.last {
        return Err(from.corrupt("a table ends before it begins"));
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_of_every_length_come_back() {
        for shift in 0..64 {
            for value in [(1_u64 << shift).wrapping_sub(1), 1 << shift, u64::MAX >> shift] {
                let mut out = Vec::new();
                put_varint(&mut out, value);
                let mut from = Decoder::new(out.into(), "test");
                assert_eq!(from.varint().expect("written above"), value);
                from.end().expect("nothing follows");
            }
        }
    }

    #[test]
    fn a_varint_above_64_bits_is_corrupt() {
        for bytes in [&[0xff_u8; 11][..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2], &[0x80]] {
            let error = Decoder::new(Bytes::copy_from_slice(bytes), "test").varint().expect_err("too long");
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn a_count_that_the_input_cannot_hold_is_corrupt() {
        let mut out = Vec::new();
        put_varint(&mut out, u64::MAX >> 1);
        out.extend_from_slice(&[0; 64]);
        assert!(Decoder::new(out.into(), "test").count(1).is_err());
    }
}
