//! The log itself: the handle that callers hold.
//!
//! # Place
//! above `io::Zone`, below `engine` and `replication`; one writer owns the order, run by its task or by who has the turn; handles share [`Wal`]
//! # Format
//! docs/format.md, section "Write-ahead log"
//! # Invariants the prefix rule of `writer`, the cut of `recovery`
//! # Crash
//! the table in `cases`

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::{AlignedBuf, BLOCK_BYTES, Clock, Environment, IoClass, LatencyCounts, Op, Zone};

use crate::batch::{
    HEADER_BYTES, Header, RECORD_HEADER_BYTES, RawRecord, WAL_FORMAT_VERSION, salvage, take_record, take_records,
};
use crate::inspect::RecordInfo;
use crate::recovery::{Expect, Step, cut, walk};
use crate::ring::{IN_FLIGHT_MAX_LIMIT, Ring};
use crate::shared::{Pending, Shared};
use crate::writer::{Writer, WriterSettings, WriterTask};
use crate::{Error, ErrorKind, GroupId, Lsn, RecordKind, RecordPos, Result};

/// Payloads below this are copied out of what recovery has read, so that keeping one does not keep a whole chunk.
const COPY_BYTES_MAX: usize = 256 << 10;

/// What is read at first of a batch that is read back: most are no longer.
const BATCH_READ_BYTES: u64 = 64 << 10;

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

impl WalOptions {
    /// Options with the default bounds.
    pub fn new(volume: [u8; 16], epoch: u64, start: Lsn, clean_end: Option<Lsn>) -> Self {
        Self {
            volume,
            epoch,
            start,
            clean_end,
            closed: false,
            in_flight_max: 3,
            batch_bytes_max: 1 << 20,
            holes: false,
        }
    }
}

/// Runs where the log is written once the record and all before it are durable, or when they never will be. Short: it sets a
/// value or sends on a channel.
pub type OnDurable = Box<dyn FnOnce(Result<RecordPos>) + Send>;

/// Which part of the ring a record may use, from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reserve {
    /// All but the last part of the ring.
    Normal,
    /// A quarter of that part too: short records without which what is in the ring stays needed (the first entry of a leader, a rotation).
    Relief,
    /// Half of it: what its owner can keep elsewhere when there is no room (votes).
    Vote,
    /// Three quarters of it: what can be written later, or with something else (manifest edits, names of states about to be taken over).
    Install,
    /// All of it: what must be written so that space can be freed (purges, copies forward).
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
    /// Nobody has opened it since: it ends there, whatever the device does not give. Default no.
    pub closed: bool,
    /// Batches in flight, 1 to 8. Default 3.
    pub in_flight_max: usize,
    /// Bytes of a batch above which no further record is added. Default 1 MiB.
    pub batch_bytes_max: usize,
    /// Acknowledged records that are damaged are no `Corrupt`: what is whole is delivered, with a [`RecordKind::HOLE`] in
    /// place of what is not. For an owner that can get it from elsewhere, and promises nothing before it has. Default no.
    pub holes: bool,
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
    /// Places with acknowledged bytes that are damaged.
    pub holes: u64,
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
    /// Time of each device write, from its submission until it is durable.
    pub write_latency: LatencyCounts,
    /// How long the device has had the oldest write that it has not answered: a device that answers nothing adds nothing to
    /// `write_latency`.
    pub oldest_write: Option<Duration>,
}

/// A batch of the log, read back.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Where it begins.
    pub lsn: Lsn,
    /// The position after it.
    pub end: Lsn,
    /// Its records, of all groups, in order.
    pub records: Vec<RecordInfo>,
}

/// The log. Cloning gives another handle. When the last is dropped without [`Wal::close`], what is queued is still written,
/// then the writer task ends and lets go of the zone.
#[derive(Clone)]
pub struct Wal {
    pub(crate) shared: Arc<Shared>,
    pub(crate) writer: Arc<Mutex<Writer>>,
    pub(crate) zone: Zone,
    pub(crate) volume: [u8; 16],
    clock: Arc<dyn Clock>,
    _closer: Arc<Closer>,
}

/// Ends the writer when the last handle is gone.
struct Closer(Arc<Shared>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.begin_close();
    }
}

impl Wal {
    /// Reads the log from `options.start`, hands every record to `deliver` in order, cuts a torn tail and starts the
    /// writer task where completions of the zone's device arrive ([`mainstay_io::BlockDevice::run_resident`]).
    ///
    /// What is delivered is durable: the device is flushed before it is read.
    ///
    /// # Errors
    /// `Corrupt` when acknowledged bytes are damaged (the error names the position), `Foreign`, `Io`, `Invalid` (a zone
    /// that is too small, options out of range), or what `deliver` answered.
    pub async fn open(
        zone: Zone,
        environment: Environment,
        options: WalOptions,
        deliver: &mut (dyn FnMut(GroupId, RecordKind, RecordPos, Bytes) -> Result<()> + Send),
    ) -> Result<(Wal, Recovery)> {
        if !(1..=IN_FLIGHT_MAX_LIMIT).contains(&options.in_flight_max) {
            let message =
                format!("batches in flight out of range value={} max={IN_FLIGHT_MAX_LIMIT}", options.in_flight_max);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let ring = Ring::new(zone.length())?;
        zone.flush().await?;
        let expect = Expect {
            volume: options.volume,
            start: options.start,
            epoch_limit: options.epoch,
            clean_end: options.clean_end,
            closed: options.closed,
            holes: options.holes,
        };
        let (mut records, mut holes) = (0, 0);
        let mut deliver_step = |step: Step| {
            let (from, batch, found) = match step {
                Step::Batch(header, batch) => {
                    let found = read_records(&header, &batch)?.into_iter().map(Some).collect();
                    (header.lsn, batch.into_bytes(), found)
                }
                Step::Hole { batch: Some((header, batch)), .. } => {
                    let found = salvage(&header, &batch);
                    (header.lsn, batch.into_bytes(), found)
                }
                Step::Hole { from, batch: None } => (from, Bytes::new(), vec![None]),
            };
            for record in found {
                let Some(record) = record else {
                    holes += 1;
                    let pos = RecordPos { batch: from, offset: 0, length: 0 };
                    deliver(GroupId(0), RecordKind::HOLE, pos, Bytes::new())?;
                    continue;
                };
                let payload = payload_of(&batch, &record.pos);
                deliver(record.group, record.kind, record.pos, payload)?;
                records += 1;
            }
            Ok(())
        };
        let ending = walk(&zone, &expect, &mut deliver_step).await?;
        cut(&zone, &ending).await?;
        let (end, batches, torn_bytes) = (ending.end, ending.batches, ending.torn_bytes);
        let recovery = Recovery { end, batches, records, torn_bytes, holes };
        tracing::info!(
            start = options.start.0,
            end = ending.end.0,
            batches = ending.batches,
            records,
            torn_bytes = ending.torn_bytes,
            holes,
            "log opened"
        );
        let shared = Arc::new(Shared::new(ring, options.start, ending.end));
        let settings = WriterSettings {
            volume: options.volume,
            epoch: options.epoch,
            chain: ending.chain.unwrap_or(0),
            tail: ending.end,
            in_flight_max: options.in_flight_max,
            batch_bytes_max: options.batch_bytes_max.min(ring.batch_bytes_limit() as usize),
        };
        let writer = Writer::new(shared.clone(), environment.clock.clone(), zone.clone(), settings);
        let writer = Arc::new(Mutex::new(writer));
        zone.device().run_resident("mainstay-wal", Box::pin(WriterTask(writer.clone())));
        let (volume, clock) = (options.volume, environment.clock);
        Ok((Wal { _closer: Arc::new(Closer(shared.clone())), shared, writer, zone, volume, clock }, recovery))
    }

    /// Queues a record; order of calls is order in the log. Never blocks; `on_durable` tells the outcome.
    ///
    /// The queue has no bound of its own, since a record of a replicated log cannot be refused for being too early:
    /// callers that take work from outside wait for [`Wal::admit`] first.
    ///
    /// `on_durable` runs on the log's task, or on that of a caller who has [`Wal::turn`]; on a closed log it runs inside this call.
    ///
    /// # Errors
    /// Given to `on_durable`: `Invalid` (longer than [`Wal::record_bytes_max`]), `OutOfSpace` (the ring is full for
    /// this reserve; all that waits under the same reserve or a lesser one is refused with it, so that none of them overtakes it),
    /// `Closed`, `Io` (the write that carried it failed: it may or may not be found at the next open).
    pub fn append(&self, record: Record, reserve: Reserve, on_durable: OnDurable) {
        self.shared.push(Pending::new(record, reserve, on_durable));
    }

    /// As [`Wal::append`], and waits for the outcome.
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the record in the log.
    pub async fn append_wait(&self, record: Record, reserve: Reserve) -> Result<RecordPos> {
        let (outcome, completer) = Op::pending();
        self.append(record, reserve, Box::new(move |result| completer.complete(Ok(result))));
        outcome.await?
    }

    /// Waits until less than [`crate::QUEUED_BYTES_MAX`] bytes are queued.
    ///
    /// # Errors
    /// `Closed`.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn admit(&self) -> Result<()> {
        std::future::poll_fn(|cx| self.shared.poll_admit(cx)).await
    }

    /// Bytes of records that are in no batch yet, with what each costs in memory.
    pub fn queued_bytes(&self) -> usize {
        self.shared.lock().queued_bytes
    }

    /// The longest payload that one record of this ring may have.
    pub fn record_bytes_max(&self) -> usize {
        self.shared.ring.record_bytes_max()
    }

    /// Reads a durable record's payload back and checks it. Only the blocks that hold it are read.
    ///
    /// # Errors
    /// `Invalid` when the position is not durable, or released; `Corrupt` when the bytes there are not the record.
    pub async fn read(&self, pos: RecordPos) -> Result<Bytes> {
        let begin = u64::from(pos.offset);
        let end = begin + RECORD_HEADER_BYTES as u64 + u64::from(pos.length);
        let inside = pos.batch >= self.shared.start()
            && pos.batch.0.is_multiple_of(BLOCK_BYTES as u64)
            && pos.offset as usize >= HEADER_BYTES
            && pos.batch.0.checked_add(end).is_some_and(|end| end <= self.shared.durable().0)
            && end <= self.shared.ring.lap_rest(pos.batch);
        if !inside {
            return Err(Self::outside(pos));
        }
        let first = begin - begin % BLOCK_BYTES as u64;
        let buf = AlignedBuf::zeroed((end - first) as usize);
        let place = self.shared.ring.place(pos.batch) + first;
        let bytes = self.zone.read(place, buf, IoClass::Foreground).await?.freeze().into_bytes();
        let skip = (begin - first) as usize;
        match bytes.get(skip..).and_then(|bytes| take_record(bytes, pos.batch, pos.offset)) {
            Some(record) if record.pos == pos => {
                let from = skip + RECORD_HEADER_BYTES;
                Ok(bytes.slice(from..from + pos.length as usize))
            }
            // Released while it was read: the ring may have been written over it.
            _ if pos.batch < self.shared.start() => Err(Self::outside(pos)),
            _ => {
                let message = format!("a record does not match its checksum lsn={} offset={}", pos.batch, pos.offset);
                Err(Error::new(ErrorKind::Corrupt, message))
            }
        }
    }

    /// Reads the batch that begins at `lsn`, or behind the skipped end of a lap there; nothing where the durable log ends.
    ///
    /// # Errors
    /// `Invalid` when the position is not durable, or released; `Corrupt` when no whole batch begins there.
    pub async fn read_batch(&self, lsn: Lsn) -> Result<Option<Batch>> {
        let (durable, ring) = (self.shared.durable(), &self.shared.ring);
        if lsn == durable {
            return Ok(None);
        }
        for lsn in std::iter::once(lsn).chain(ring.lap_next(lsn)) {
            if lsn < self.shared.start() || lsn >= durable || !lsn.0.is_multiple_of(BLOCK_BYTES as u64) {
                return Err(Self::outside(RecordPos { batch: lsn, offset: 0, length: 0 }));
            }
            let rest = ring.lap_rest(lsn).min(durable.0 - lsn.0);
            let bytes = self.read_blocks(lsn, rest.min(BATCH_READ_BYTES)).await?;
            let Some(header) = Header::decode(&bytes).filter(|h| h.volume == self.volume && h.lsn == lsn) else {
                continue;
            };
            let length = u64::from(header.batch_bytes);
            if header.version > WAL_FORMAT_VERSION || length > rest {
                continue;
            }
            let bytes = if length > bytes.len() as u64 { self.read_blocks(lsn, length).await? } else { bytes };
            let batch = bytes.slice(..length as usize);
            if !header.body_matches(&batch) {
                continue;
            }
            let records = read_records(&header, &batch)?.into_iter();
            let records = records.map(|r| RecordInfo {
                group: r.group,
                kind: r.kind,
                pos: r.pos,
                payload: payload_of(&batch, &r.pos),
            });
            return Ok(Some(Batch { lsn, end: header.end(), records: records.collect() }));
        }
        if lsn < self.shared.start() {
            // Released while it was read: the ring may have been written over it.
            return Err(Self::outside(RecordPos { batch: lsn, offset: 0, length: 0 }));
        }
        Err(Error::new(ErrorKind::Corrupt, format!("no whole batch begins at this position lsn={lsn}")))
    }

    async fn read_blocks(&self, lsn: Lsn, bytes: u64) -> Result<Bytes> {
        let buf = AlignedBuf::zeroed(bytes as usize);
        let place = self.shared.ring.place(lsn);
        Ok(self.zone.read(place, buf, IoClass::Foreground).await?.freeze().into_bytes())
    }

    fn outside(pos: RecordPos) -> Error {
        let message = format!("no durable record at this position lsn={} offset={}", pos.batch, pos.offset);
        Error::new(ErrorKind::Invalid, message)
    }

    /// Gives back everything before `start`. The caller has made `start` durable in the superblock. A start behind the
    /// durable position or before the present start is moved to it.
    pub fn release(&self, start: Lsn) {
        let start = start.min(self.shared.durable());
        self.shared.start.fetch_max(start.0, Ordering::AcqRel);
    }

    /// Where the oldest batch begins that is kept.
    pub fn start(&self) -> Lsn {
        self.shared.start()
    }

    /// The position up to which everything is durable.
    pub fn durable(&self) -> Lsn {
        self.shared.durable()
    }

    /// Why the log takes nothing any more, if its device failed. Also what nobody waited for ends it.
    pub fn failure(&self) -> Option<Error> {
        match &self.shared.lock().ended {
            Some(Err(cause)) => Some(cause.as_closed()),
            _ => None,
        }
    }

    /// Counts since open.
    pub fn stats(&self) -> WalStats {
        let counts = &self.shared.counts;
        WalStats {
            batches: counts.batches.load(Ordering::Relaxed),
            records: counts.records.load(Ordering::Relaxed),
            payload_bytes: counts.payload_bytes.load(Ordering::Relaxed),
            written_bytes: counts.written_bytes.load(Ordering::Relaxed),
            used_bytes: self.shared.tail.load(Ordering::Acquire).saturating_sub(self.shared.start().0),
            ring_bytes: self.shared.ring.bytes(),
            write_latency: counts.write_latency.counts(),
            oldest_write: counts.oldest_write().map(|begun| self.clock.now().saturating_sub(begun)),
        }
    }

    /// Waits for what is queued, ends the writer task and returns where the log ends. A second call answers the same.
    ///
    /// # Errors
    /// What closed the log before.
    ///
    /// # Cancel safety
    /// The log accepts nothing from the first poll on; a later call waits for the same end.
    pub async fn close(&self) -> Result<Lsn> {
        std::future::poll_fn(|cx| self.shared.poll_close(cx)).await
    }
}

impl std::fmt::Debug for Wal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wal").field("start", &self.start()).field("durable", &self.durable()).finish_non_exhaustive()
    }
}

/// The records of a batch whose checksum has matched; they add up unless the writer had a mistake.
pub(crate) fn read_records(header: &Header, batch: &[u8]) -> Result<Vec<RawRecord>> {
    take_records(header, batch).ok_or_else(|| {
        let message = format!("the records of a whole batch do not add up lsn={}", header.lsn);
        Error::new(ErrorKind::Corrupt, message)
    })
}

/// The payload at `pos`: a copy when it is a small part of what would be kept in memory for it.
pub(crate) fn payload_of(batch: &Bytes, pos: &RecordPos) -> Bytes {
    let begin = pos.offset as usize + RECORD_HEADER_BYTES;
    let payload = batch.slice(begin..begin + pos.length as usize);
    if payload.len() < COPY_BYTES_MAX { Bytes::copy_from_slice(&payload) } else { payload }
}
