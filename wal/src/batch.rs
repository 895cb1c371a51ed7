//! The bytes of a batch: encoding, and decoding that trusts nothing.
//!
//! # Place
//! the only module of this crate that knows offsets inside a batch
//! # Format
//! docs/format.md, section "Write-ahead log"; a test ties the two
//! # Invariants
//! 1. The header checksum covers the checksum of the body, so the header checksum alone names the whole batch. It is
//!    what the next batch repeats as its chain.
//! 2. A header lies in the first 512 bytes of its block, so a device that writes sectors whole never tears it.
//! 3. A record's checksum is bound to the batch's position, so a record of an earlier lap at the same place does not
//!    pass for the one that was asked for.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crc_fast::crc64_nvme;
use mainstay_io::BLOCK_BYTES;

use crate::{GroupId, Lsn, Record, RecordKind, RecordPos};

/// First bytes of every batch.
pub(crate) const MAGIC: [u8; 8] = *b"MNSTWALB";
/// The version that this code writes, and the newest that it reads.
pub const WAL_FORMAT_VERSION: u16 = 1;
/// Bytes of a batch header.
pub(crate) const HEADER_BYTES: usize = 96;
/// Bytes of a record header.
pub(crate) const RECORD_HEADER_BYTES: usize = 24;
/// The longest payload of one record.
pub const RECORD_BYTES_MAX: usize = 17 << 20;
/// The longest batch: one record of the longest payload with both headers, padded.
pub(crate) const BATCH_BYTES_LIMIT: u64 = padded((HEADER_BYTES + RECORD_HEADER_BYTES + RECORD_BYTES_MAX) as u64);

const OFFSET_VERSION: usize = 8;
const OFFSET_HEADER_BYTES: usize = 10;
const OFFSET_RECORDS: usize = 12;
const OFFSET_VOLUME: usize = 16;
const OFFSET_EPOCH: usize = 32;
const OFFSET_LSN: usize = 40;
const OFFSET_FOLLOWS: usize = 48;
const OFFSET_DURABLE: usize = 56;
const OFFSET_CHAIN: usize = 64;
const OFFSET_BATCH_BYTES: usize = 72;
const OFFSET_PAYLOAD_BYTES: usize = 76;
const OFFSET_BODY_CHECKSUM: usize = 80;
const OFFSET_HEADER_CHECKSUM: usize = 88;

const _: () = assert!(OFFSET_HEADER_CHECKSUM + 8 == HEADER_BYTES);
const _: () = assert!(HEADER_BYTES <= 512);
const _: () = assert!(BATCH_BYTES_LIMIT < u32::MAX as u64);

/// Rounds up to whole blocks.
#[allow(
    clippy::arithmetic_side_effects,
    reason = "callers stay far below the end of the type; checked at compile time"
)]
pub(crate) const fn padded(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES as u64) * BLOCK_BYTES as u64
}

/// What a batch says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u16,
    pub(crate) records: u32,
    pub(crate) volume: [u8; 16],
    pub(crate) epoch: u64,
    pub(crate) lsn: Lsn,
    /// Where the batch before it ended: `lsn`, or less when the end of the ring was skipped.
    pub(crate) follows: Lsn,
    /// Everything before this was durable when the batch was given to the device.
    pub(crate) durable: Lsn,
    /// Checksum of the batch before it; 0 for the first of a volume.
    pub(crate) chain: u64,
    /// Whole length, header and padding included.
    pub(crate) batch_bytes: u32,
    /// Bytes of records, without header and padding.
    pub(crate) payload_bytes: u32,
    pub(crate) body_checksum: u64,
    /// Set by [`Header::seal`] and [`Header::decode`].
    pub(crate) checksum: u64,
}

impl Header {
    /// The position after the batch.
    pub(crate) fn end(&self) -> Lsn {
        Lsn(self.lsn.0.saturating_add(u64::from(self.batch_bytes)))
    }

    /// Completes `batch`, whose body is in place: computes both checksums, writes the header, and returns the
    /// checksum that the next batch repeats.
    #[allow(clippy::indexing_slicing, reason = "the writer allocated the batch with room for its header")]
    pub(crate) fn seal(&mut self, batch: &mut [u8]) -> u64 {
        assert!(batch.len() == self.batch_bytes as usize, "batch of {} sealed as {}", batch.len(), self.batch_bytes);
        self.body_checksum = crc64_nvme(&batch[HEADER_BYTES..]);
        let mut put = |at: usize, bytes: &[u8]| batch[at..at.saturating_add(bytes.len())].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(OFFSET_VERSION, &self.version.to_le_bytes());
        put(OFFSET_HEADER_BYTES, &(HEADER_BYTES as u16).to_le_bytes());
        put(OFFSET_RECORDS, &self.records.to_le_bytes());
        put(OFFSET_VOLUME, &self.volume);
        put(OFFSET_EPOCH, &self.epoch.to_le_bytes());
        put(OFFSET_LSN, &self.lsn.0.to_le_bytes());
        put(OFFSET_FOLLOWS, &self.follows.0.to_le_bytes());
        put(OFFSET_DURABLE, &self.durable.0.to_le_bytes());
        put(OFFSET_CHAIN, &self.chain.to_le_bytes());
        put(OFFSET_BATCH_BYTES, &self.batch_bytes.to_le_bytes());
        put(OFFSET_PAYLOAD_BYTES, &self.payload_bytes.to_le_bytes());
        put(OFFSET_BODY_CHECKSUM, &self.body_checksum.to_le_bytes());
        self.checksum = crc64_nvme(&batch[..OFFSET_HEADER_CHECKSUM]);
        batch[OFFSET_HEADER_CHECKSUM..HEADER_BYTES].copy_from_slice(&self.checksum.to_le_bytes());
        self.checksum
    }

    /// Reads a header from the start of `block`. None when there is none: another magic, a checksum that does not
    /// match, or lengths that no writer of this version makes. A newer version is returned as it is, for its header
    /// has the same fields by promise.
    pub(crate) fn decode(block: &[u8]) -> Option<Self> {
        let header = block.get(..HEADER_BYTES)?;
        if header.get(..MAGIC.len())? != MAGIC {
            return None;
        }
        let checksum = u64_at(header, OFFSET_HEADER_CHECKSUM)?;
        if checksum != crc64_nvme(header.get(..OFFSET_HEADER_CHECKSUM)?) {
            return None;
        }
        let decoded = Self {
            version: u16_at(header, OFFSET_VERSION)?,
            records: u32_at(header, OFFSET_RECORDS)?,
            volume: array_at(header, OFFSET_VOLUME)?,
            epoch: u64_at(header, OFFSET_EPOCH)?,
            lsn: Lsn(u64_at(header, OFFSET_LSN)?),
            follows: Lsn(u64_at(header, OFFSET_FOLLOWS)?),
            durable: Lsn(u64_at(header, OFFSET_DURABLE)?),
            chain: u64_at(header, OFFSET_CHAIN)?,
            batch_bytes: u32_at(header, OFFSET_BATCH_BYTES)?,
            payload_bytes: u32_at(header, OFFSET_PAYLOAD_BYTES)?,
            body_checksum: u64_at(header, OFFSET_BODY_CHECKSUM)?,
            checksum,
        };
        if decoded.version > WAL_FORMAT_VERSION {
            return Some(decoded);
        }
        let batch = u64::from(decoded.batch_bytes);
        let filled = u64::from(decoded.payload_bytes).checked_add(HEADER_BYTES as u64)?;
        let sound = decoded.version == WAL_FORMAT_VERSION
            && u16_at(header, OFFSET_HEADER_BYTES)? as usize == HEADER_BYTES
            && batch > 0
            && batch <= BATCH_BYTES_LIMIT
            && batch == padded(filled)
            && decoded.lsn.0.checked_add(batch).is_some()
            && decoded.follows <= decoded.lsn
            && decoded.durable <= decoded.follows;
        sound.then_some(decoded)
    }

    /// Whether `batch`, whole, carries the body that this header promises.
    pub(crate) fn body_matches(&self, batch: &[u8]) -> bool {
        batch.len() == self.batch_bytes as usize
            && batch
                .get(HEADER_BYTES..)
                .is_some_and(|body| mainstay_io::mutant!(SkipBatchChecksum) || crc64_nvme(body) == self.body_checksum)
    }
}

/// Writes a record into `batch` at `offset` and returns the offset after it.
#[allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "the writer allocated the batch from these very lengths"
)]
pub(crate) fn put_record(batch: &mut [u8], offset: usize, lsn: Lsn, record: &Record, payload_bytes: usize) -> usize {
    let mut at = offset + RECORD_HEADER_BYTES;
    for part in &record.payload {
        batch[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    assert!(at == offset + RECORD_HEADER_BYTES + payload_bytes, "a record changed its length while it was queued");
    let whole = &mut batch[offset..at];
    whole[8..12].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
    whole[12] = record.kind.0;
    whole[13..16].fill(0);
    whole[16..24].copy_from_slice(&record.group.0.to_le_bytes());
    let checksum = crc64_nvme(&whole[8..]) ^ lsn.0;
    whole[..8].copy_from_slice(&checksum.to_le_bytes());
    at
}

/// A record inside a batch that has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawRecord {
    pub(crate) group: GroupId,
    pub(crate) kind: RecordKind,
    pub(crate) pos: RecordPos,
}

/// Reads the record whose header begins at `bytes`, the rest of the batch from `offset` on. `None` when lengths or
/// checksum do not match.
pub(crate) fn take_record(bytes: &[u8], lsn: Lsn, offset: u32) -> Option<RawRecord> {
    let length = u32_at(bytes, 8)?;
    let end = (length as usize).checked_add(RECORD_HEADER_BYTES)?;
    let covered = bytes.get(8..end)?;
    if u64_at(bytes, 0)? != crc64_nvme(covered) ^ lsn.0 || array_at::<3>(bytes, 13)? != [0; 3] {
        return None;
    }
    Some(RawRecord {
        group: GroupId(u64_at(bytes, 16)?),
        kind: RecordKind(*bytes.get(12)?),
        pos: RecordPos { batch: lsn, offset, length },
    })
}

/// All records of a whole batch that has passed [`Header::body_matches`]. `None` when they do not add up.
pub(crate) fn take_records(header: &Header, batch: &[u8]) -> Option<Vec<RawRecord>> {
    let end = HEADER_BYTES.checked_add(header.payload_bytes as usize)?;
    let filled = batch.get(..end)?;
    // A record takes at least its header, so the count cannot make this allocate more than the batch is long.
    let mut records = Vec::with_capacity((header.records as usize).min(filled.len() / RECORD_HEADER_BYTES));
    let mut offset = HEADER_BYTES;
    for _ in 0..header.records {
        let record = take_record(filled.get(offset..)?, header.lsn, u32::try_from(offset).ok()?)?;
        offset = offset.checked_add(RECORD_HEADER_BYTES)?.checked_add(record.pos.length as usize)?;
        records.push(record);
    }
    (offset == end).then_some(records)
}

/// What is left of a batch whose header is whole and whose body is not: its records in order, and `None` for one or more
/// that are lost. A record is known to be lost alone when another one follows where its length says. Without any `None` only
/// padding was damaged.
pub(crate) fn salvage(header: &Header, batch: &[u8]) -> Vec<Option<RawRecord>> {
    let mut found = Vec::new();
    let end = HEADER_BYTES.saturating_add(header.payload_bytes as usize);
    let Some(filled) = batch.get(..end) else { return vec![None] };
    let at = |offset: usize| take_record(filled.get(offset..)?, header.lsn, u32::try_from(offset).ok()?);
    let mut offset = HEADER_BYTES;
    for _ in 0..header.records {
        let length = filled.get(offset..).and_then(|bytes| u32_at(bytes, 8)).unwrap_or(u32::MAX);
        let next = offset.saturating_add(RECORD_HEADER_BYTES).saturating_add(length as usize);
        let record = at(offset);
        if record.is_none() && next != end && at(next).is_none() {
            found.push(None);
            return found;
        }
        found.push(record);
        offset = next;
    }
    if offset != end {
        found.push(None);
    }
    found
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(array_at(bytes, at)?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(array_at(bytes, at)?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(array_at(bytes, at)?))
}

/// Offset, bytes and name of every field of a batch header and of a record header, for the test that holds the document
/// against them.
#[cfg(test)]
pub(crate) fn layout() -> [Vec<(usize, usize, &'static str)>; 2] {
    let header = vec![
        (0, 8, "magic"),
        (OFFSET_VERSION, 2, "version"),
        (OFFSET_HEADER_BYTES, 2, "header_bytes"),
        (OFFSET_RECORDS, 4, "records"),
        (OFFSET_VOLUME, 16, "volume"),
        (OFFSET_EPOCH, 8, "epoch"),
        (OFFSET_LSN, 8, "lsn"),
        (OFFSET_FOLLOWS, 8, "follows"),
        (OFFSET_DURABLE, 8, "durable"),
        (OFFSET_CHAIN, 8, "chain"),
        (OFFSET_BATCH_BYTES, 4, "batch_bytes"),
        (OFFSET_PAYLOAD_BYTES, 4, "payload_bytes"),
        (OFFSET_BODY_CHECKSUM, 8, "body_checksum"),
        (OFFSET_HEADER_CHECKSUM, 8, "header_checksum"),
    ];
    let record = vec![
        (0, 8, "checksum"),
        (8, 4, "length"),
        (12, 1, "kind"),
        (13, 3, "reserved"),
        (16, 8, "group"),
        (RECORD_HEADER_BYTES, 0, "payload"),
    ];
    [header, record]
}
