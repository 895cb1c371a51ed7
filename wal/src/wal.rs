//! The log itself. (The seam; the owner of this crate gives it its body.)

use bytes::Bytes;
use mainstay_io::{Environment, Zone};

use crate::{GroupId, Lsn, RecordKind, RecordPos, Result};

/// One record as the caller gives it. The payload is the concatenation of `payload`.
#[derive(Debug)]
pub struct Record {
    /// The owner.
    pub group: GroupId,
    /// What it is, for the owner.
    pub kind: RecordKind,
    /// The bytes, in parts so that a header needs no copy of what follows.
    pub payload: Vec<Bytes>,
}

/// Runs on the log's task once the record and all before it are durable, or when they never will be. Short: it sets a
/// value or sends on a channel.
pub type OnDurable = Box<dyn FnOnce(Result<RecordPos>) + Send>;

/// Which part of the ring a record may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// All but the last part of the ring.
    Normal,
    /// All of it: what must be written so that space can be freed (manifest edits, votes, copies forward).
    Critical,
}

/// How to open a log.
#[derive(Clone, Debug)]
pub struct WalOptions {
    /// Written into every batch and checked.
    pub volume: [u8; 16],
    /// Larger than every epoch used before; the caller made it durable in the superblock.
    pub epoch: u64,
    /// Where the oldest batch that is still needed begins.
    pub start: Lsn,
    /// Where the log ended when it was closed cleanly. A shorter log is then `Corrupt`.
    pub clean_end: Option<Lsn>,
    /// Batches in flight, 1 to 8. Default 3.
    pub in_flight_max: usize,
    /// Bytes of a batch above which no further record is added. Default 1 MiB.
    pub batch_bytes_max: usize,
}

/// What opening found.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// Where the log goes on.
    pub end: Lsn,
    /// Batches and records read.
    pub batches: u64,
    /// Records delivered.
    pub records: u64,
    /// Bytes behind the end that were torn or never acknowledged, and are cut.
    pub torn_bytes: u64,
}

/// Counts since open.
#[derive(Clone, Copy, Debug, Default)]
pub struct WalStats {
    /// Device writes, each with one flush.
    pub batches: u64,
    /// Records made durable.
    pub records: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
    /// Bytes written to the device.
    pub written_bytes: u64,
    /// Bytes between the start and the end of the log.
    pub used_bytes: u64,
    /// Bytes of the ring.
    pub ring_bytes: u64,
}

/// The log. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Wal {}

impl Wal {
    /// Reads the log from `options.start`, hands every record to `deliver` in order, cuts a torn tail and starts the
    /// writer task where completions of the zone's device arrive ([`mainstay_io::BlockDevice::run_resident`]).
    ///
    /// # Errors
    /// `Corrupt` when acknowledged bytes are damaged (the error names the position), `Foreign`, `Io`.
    pub async fn open(
        zone: Zone,
        environment: Environment,
        options: WalOptions,
        deliver: &mut (dyn FnMut(GroupId, RecordKind, RecordPos, Bytes) -> Result<()> + Send),
    ) -> Result<(Wal, Recovery)> {
        let _ = (zone, environment, options, deliver);
        todo!()
    }

    /// Queues a record; order of calls is order in the log. Returns at once; `on_durable` tells the outcome.
    ///
    /// # Errors
    /// Given to `on_durable`: `Invalid` (too long), `OutOfSpace` (the ring is full for this reserve), `Closed`.
    pub fn append(&self, record: Record, reserve: Reserve, on_durable: OnDurable) {
        let _ = (record, reserve, on_durable);
        todo!()
    }

    /// As [`Wal::append`], and waits for the outcome.
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the record in the log.
    pub async fn append_wait(&self, record: Record, reserve: Reserve) -> Result<RecordPos> {
        let _ = (record, reserve);
        todo!()
    }

    /// Reads a durable record's payload back and checks it.
    pub async fn read(&self, pos: RecordPos) -> Result<Bytes> {
        let _ = pos;
        todo!()
    }

    /// Gives back everything before `start`. The caller has made `start` durable in the superblock.
    pub fn release(&self, start: Lsn) {
        let _ = start;
        todo!()
    }

    /// The position up to which everything is durable.
    pub fn durable(&self) -> Lsn {
        todo!()
    }

    /// Counts since open.
    pub fn stats(&self) -> WalStats {
        todo!()
    }

    /// Waits for what is queued, ends the writer task and returns where the log ends.
    pub async fn close(&self) -> Result<Lsn> {
        todo!()
    }
}
