//! Reads a log without opening it: nothing is cut, nothing is written. For `mainstay inspect wal` and `mainstay verify`.

use bytes::Bytes;
use mainstay_io::Zone;

use crate::recovery::{Expect, Step, walk};
use crate::wal::{payload_of, read_records};
use crate::{GroupId, Lsn, RecordKind, RecordPos, Recovery, Result};

/// A batch as it lies on the zone.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BatchInfo {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where the batch before it ended; less than `lsn` when the end of a lap was skipped.
    pub follows: Lsn,
    /// What was durable when it was given to the device.
    pub durable: Lsn,
    /// Who wrote it.
    pub epoch: u64,
    /// Whole length with header and padding.
    pub bytes: u64,
    /// Checksum of the batch before it.
    pub chain: u64,
    /// Its own checksum.
    pub checksum: u64,
    /// Its records, in order.
    pub records: Vec<RecordInfo>,
}

/// A record as it lies in a batch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RecordInfo {
    /// The owner.
    pub group: GroupId,
    /// What it is, for the owner.
    pub kind: RecordKind,
    /// Where it lies.
    pub pos: RecordPos,
    /// Its bytes.
    pub payload: Bytes,
}

/// Walks the log of `volume` from `start` and hands every batch to `visit`. Every checksum is verified.
///
/// # Errors
/// As [`crate::Wal::open`].
pub async fn inspect(
    zone: &Zone,
    volume: [u8; 16],
    start: Lsn,
    clean_end: Option<Lsn>,
    closed: bool,
    visit: &mut (dyn FnMut(BatchInfo) -> Result<()> + Send),
) -> Result<Recovery> {
    let mut records_count = 0;
    let mut visit_batch = |step: Step| {
        // Without `holes` there is no other.
        let Step::Batch(header, batch) = step else { return Ok(()) };
        let batch = batch.into_bytes();
        let records: Vec<RecordInfo> = read_records(&header, &batch)?
            .into_iter()
            .map(|r| RecordInfo { group: r.group, kind: r.kind, pos: r.pos, payload: payload_of(&batch, &r.pos) })
            .collect();
        records_count += records.len() as u64;
        visit(BatchInfo {
            lsn: header.lsn,
            follows: header.follows,
            durable: header.durable,
            epoch: header.epoch,
            bytes: u64::from(header.batch_bytes),
            chain: header.chain,
            checksum: header.checksum,
            records,
        })
    };
    let expect = Expect { volume, start, epoch_limit: u64::MAX, clean_end, closed, holes: false };
    let ending = walk(zone, &expect, &mut visit_batch).await?;
    let (batches, torn_bytes) = (ending.batches, ending.torn_bytes);
    Ok(Recovery { end: ending.end, batches, records: records_count, torn_bytes, holes: 0 })
}
