//! The writes and reads that are measured, and their figures.
//!
//! # Place
//! [`Log`] is the log of a volume that nobody reads; [`Written`] writes as a flush or compaction does and reads as a lookup does
//! # Invariants
//! 1. The next write of the log begins when the one before it is durable, on the log's own thread, so that no hand-over between threads is
//!    in the figures: what is measured is the write.
//! 2. The log has one writer here, so a batch has one record. More writes at a time go to its zone without it: the log would make one of
//!    what waits.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use mainstay_io::{AlignedBuf, AlignedBytes, BLOCK_BYTES, Completer, Environment, IoClass, Op, WriteMode, Zone};
use mainstay_wal::{GroupId, Lsn, Record, RecordKind, RecordPos, Reserve, Wal, WalOptions};
use serde::Serialize;

use super::patience::Patience;
use crate::bench::{Numbers, latencies, nanos};
use crate::units::ByteSize;

/// What a batch has besides its one record, and a little more.
const BATCH_OVERHEAD_BYTES: usize = 256;
/// Bytes of a sequential write: the largest that goes to a device in one piece.
const SEQUENTIAL_BYTES: usize = 1 << 20;
/// Sequential writes in flight.
const SEQUENTIAL_IN_FLIGHT: usize = 4;
/// Different contents that they have, so that a device does not keep one block for all.
const CONTENTS: usize = 8;

/// The figures of one test, named as fio names them.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Series {
    pub(super) name: &'static str,
    block_bytes: u64,
    in_flight: usize,
    seconds: f64,
    pub(super) ops: u64,
    iops: f64,
    bytes_per_second: f64,
    mean_us: f64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    p999_us: f64,
    p9999_us: f64,
    max_us: f64,
    #[serde(skip)]
    pub(super) p99: Duration,
    #[serde(skip)]
    pub(super) max: Duration,
}

impl Series {
    fn new(
        name: &'static str,
        block_bytes: usize,
        in_flight: usize,
        took: Duration,
        latencies: &Histogram<u64>,
    ) -> Self {
        let (ops, seconds) = (latencies.len(), took.as_secs_f64().max(1e-9));
        let at = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            name,
            block_bytes: block_bytes as u64,
            in_flight,
            seconds,
            ops,
            iops: ops as f64 / seconds,
            bytes_per_second: ops as f64 * block_bytes as f64 / seconds,
            mean_us: latencies.mean() / 1e3,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            p9999_us: at(0.9999),
            max_us: latencies.max() as f64 / 1e3,
            p99: Duration::from_nanos(latencies.value_at_quantile(0.99)),
            max: Duration::from_nanos(latencies.max()),
        }
    }

    pub(super) fn line(&self) -> String {
        format!(
            "{:<18} {:>8} {:>9} {:>9.0} {:>10}/s {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>9.0}\n",
            self.name,
            format!("{}", ByteSize(self.block_bytes)).replace(".0", ""),
            self.in_flight,
            self.iops,
            format!("{}", ByteSize(self.bytes_per_second as u64)),
            self.mean_us,
            self.p50_us,
            self.p99_us,
            self.p999_us,
            self.max_us
        )
    }
}

fn count(latencies: &mut Histogram<u64>, begun: Instant) {
    latencies.saturating_record(nanos(begun.elapsed()));
}

/// A log that is written to be measured.
pub(super) struct Log {
    wal: Wal,
}

impl Log {
    /// Opens the log on a zone of zeroes. Nobody else writes there before it is closed.
    pub(super) fn open(zone: Zone, patience: &mut Patience) -> Result<Self, String> {
        let environment = Environment::system();
        let volume = environment.random.id();
        let options = WalOptions::new(volume, 1, Lsn(0), None);
        let mut skip = |_: GroupId, _: RecordKind, _: RecordPos, _: Bytes| Ok(());
        let opened = patience.wait("opening the log", Wal::open(zone, environment, options, &mut skip))?;
        let (wal, _) = opened.map_err(|e| format!("the log does not open: {e}"))?;
        Ok(Self { wal })
    }

    /// Writes batches of `batch_bytes` for `time`, one after the other.
    pub(super) fn write(&self, batch_bytes: usize, time: Duration, patience: &mut Patience) -> Result<Series, String> {
        let before = self.wal.stats();
        let (round, ended) = Op::pending();
        let begun = Instant::now();
        let payload = bytes_of(batch_bytes - BATCH_OVERHEAD_BYTES);
        Round { wal: self.wal.clone(), payload, latencies: latencies(), end: begun + time, ended }.append();
        let round = patience.wait_beyond(time, &durable_write(batch_bytes, 1), round)?;
        let (latencies, failure) = round.map_err(|_| "the log ended without an answer".to_owned())?;
        if let Some(failure) = failure {
            return Err(format!("a durable write failed: {failure}"));
        }
        let took = begun.elapsed();
        let after = self.wal.stats();
        let (batches, written) = (after.batches - before.batches, after.written_bytes - before.written_bytes);
        assert!(
            batches == latencies.len() && written == batches * batch_bytes as u64,
            "a batch a write, of its size: batches={batches} written={written} writes={}",
            latencies.len()
        );
        Ok(Series::new("durable-write", batch_bytes, 1, took, &latencies))
    }

    pub(super) fn close(self, patience: &mut Patience) {
        // What it says was said by the writes already.
        let _ = patience.wait("closing the log", self.wal.close());
    }
}

/// The name of a test of durable writes, where there are several.
fn durable_write(bytes: usize, in_flight: usize) -> String {
    format!("durable-write bytes={bytes} in_flight={in_flight}")
}

/// Writes as the log does into its zone, round and round, with `in_flight` writes at the device for `time`.
pub(super) fn write_durably(
    zone: &Zone,
    bytes: usize,
    in_flight: usize,
    time: Duration,
    patience: &mut Patience,
) -> Result<Series, String> {
    let test = durable_write(bytes, in_flight);
    let content = AlignedBuf::copy_from(&bytes_of(bytes)).freeze();
    let places = zone.length() / bytes as u64;
    let mut all = latencies();
    let begun = Instant::now();
    let mut write = {
        let mut next = 0;
        move || {
            let at = next % places * bytes as u64;
            next += 1;
            let begun = Instant::now();
            let write = zone.write(at, vec![content.clone()], WriteMode::Durable, IoClass::Wal);
            async move { write.await.map(|()| begun) }
        }
    };
    let mut running: FuturesUnordered<_> = (0..in_flight).map(|_| write()).collect();
    while let Some(done) = patience.wait(&test, running.next())? {
        count(&mut all, done.map_err(|e| format!("a durable write failed: {e}"))?);
        if begun.elapsed() < time {
            running.push(write());
        }
    }
    Ok(Series::new("durable-write", bytes, in_flight, begun.elapsed(), &all))
}

/// Bytes that do not compress.
fn bytes_of(count: usize) -> Bytes {
    let mut random = Numbers::new(1);
    (0..count).map(|_| random.next() as u8).collect()
}

/// The writer of the log, which goes round until its time is over.
struct Round {
    wal: Wal,
    payload: Bytes,
    latencies: Histogram<u64>,
    end: Instant,
    ended: Completer<(Histogram<u64>, Option<String>)>,
}

impl Round {
    fn append(self) {
        let wal = self.wal.clone();
        let payload = vec![self.payload.clone()];
        let record = Record { group: GroupId(0), kind: RecordKind(RecordKind::OWNER_FIRST), payload };
        let begun = Instant::now();
        wal.append(record, Reserve::Normal, Box::new(move |answer| self.answered(begun, answer.err())));
    }

    /// Runs on the log's thread.
    fn answered(mut self, begun: Instant, failure: Option<mainstay_wal::Error>) {
        if failure.is_none() {
            count(&mut self.latencies, begun);
            // Nobody reads it again: the ring never fills.
            self.wal.release(self.wal.durable());
            if Instant::now() < self.end {
                return self.append();
            }
        }
        self.ended.complete(Ok((self.latencies, failure.map(|e| e.to_string()))));
    }
}

/// What was written of the area of extents: the content of each MiB.
#[derive(Default)]
pub(super) struct Written {
    contents: Vec<AlignedBytes>,
    /// By place: which of the contents.
    places: Vec<usize>,
}

impl Written {
    /// Writes MiB after MiB of the first `bytes`, which have their space, round and round until `time` is over, and flushes. The time of the flush counts.
    pub(super) fn write(
        &mut self,
        zone: &Zone,
        bytes: u64,
        time: Duration,
        patience: &mut Patience,
    ) -> Result<Series, String> {
        const TEST: &str = "sequential-write";
        let mut random = Numbers::new(2);
        self.contents = (0..CONTENTS).map(|_| content(&mut random)).collect();
        let places = bytes / SEQUENTIAL_BYTES as u64;
        let mut all = latencies();
        let mut in_flight: VecDeque<(Instant, Op<()>)> = VecDeque::new();
        let begun = Instant::now();
        let failed = |e: mainstay_io::Error| format!("a sequential write failed: {e}");
        for n in 0.. {
            if n > 0 && begun.elapsed() >= time {
                break;
            }
            if in_flight.len() == SEQUENTIAL_IN_FLIGHT
                && let Some((begun, write)) = in_flight.pop_front()
            {
                patience.wait(TEST, write)?.map_err(failed)?;
                count(&mut all, begun);
            }
            let (place, content) = (n % places, (n % (places + 1)) as usize % CONTENTS);
            match self.places.get_mut(place as usize) {
                Some(kept) => *kept = content,
                None => self.places.push(content),
            }
            let bufs = self.contents.get(content).cloned().into_iter().collect();
            let at = place * SEQUENTIAL_BYTES as u64;
            in_flight.push_back((Instant::now(), zone.write(at, bufs, WriteMode::Cached, IoClass::Background)));
        }
        for (begun, write) in in_flight {
            patience.wait(TEST, write)?.map_err(failed)?;
            count(&mut all, begun);
        }
        patience.wait(TEST, zone.flush())?.map_err(|e| format!("a flush failed: {e}"))?;
        Ok(Series::new(TEST, SEQUENTIAL_BYTES, SEQUENTIAL_IN_FLIGHT, begun.elapsed(), &all))
    }

    /// Reads blocks of what was written, here and there, one at a time, and compares them.
    pub(super) fn read(&self, zone: &Zone, time: Duration, patience: &mut Patience) -> Result<Series, String> {
        const TEST: &str = "random-read";
        if self.places.is_empty() {
            return Err("nothing was written that could be read".to_owned());
        }
        let mut random = Numbers::new(3);
        let mut all = latencies();
        let blocks = self.places.len() * SEQUENTIAL_BYTES / BLOCK_BYTES;
        let begun = Instant::now();
        while begun.elapsed() < time || all.is_empty() {
            let at = (random.next() % blocks as u64) as usize * BLOCK_BYTES;
            let start = Instant::now();
            let read = zone.read(at as u64, AlignedBuf::zeroed(BLOCK_BYTES), IoClass::Foreground);
            let read = patience.wait(TEST, read)?.map_err(|e| format!("a read failed: {e}"))?;
            count(&mut all, start);
            let content = self.places.get(at / SEQUENTIAL_BYTES).and_then(|content| self.contents.get(*content));
            let within = at % SEQUENTIAL_BYTES;
            if content.and_then(|bytes| bytes.get(within..within + BLOCK_BYTES)) != Some(&read[..]) {
                return Err(format!("a read gave other bytes than were written offset={at}"));
            }
        }
        Ok(Series::new(TEST, BLOCK_BYTES, 1, begun.elapsed(), &all))
    }
}

/// Bytes that neither compress nor repeat.
fn content(random: &mut Numbers) -> AlignedBytes {
    let mut buf = AlignedBuf::zeroed(SEQUENTIAL_BYTES);
    buf.chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&random.next().to_le_bytes()));
    buf.freeze()
}

/// Writes zeroes over the whole of a zone and makes them durable.
pub(super) fn fill_with_zeroes(zone: &Zone, patience: &mut Patience) -> Result<(), String> {
    const TEST: &str = "zeroes over the log";
    let zeroes = AlignedBuf::zeroed(SEQUENTIAL_BYTES).freeze();
    let mut at = 0;
    while at < zone.length() {
        let bytes = (zone.length() - at).min(SEQUENTIAL_BYTES as u64);
        let bufs = vec![zeroes.slice(0..bytes as usize)];
        let write = zone.write(at, bufs, WriteMode::Cached, IoClass::Background);
        patience.wait(TEST, write)?.map_err(|e| format!("a write of zeroes failed: {e}"))?;
        at += bytes;
    }
    patience.wait(TEST, zone.flush())?.map_err(|e| format!("a flush failed: {e}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use mainstay_io::sim::{IoKind, Mishap, SimLayout, SimMedia, SimOptions, SimScheduler};
    use mainstay_io::{BoxFuture, Clock, Media};

    use super::super::patience::ANSWER_MAX;
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    fn patience() -> Patience {
        Patience::new(Environment::system().clock)
    }

    fn volume() -> (SimMedia, Arc<dyn Media>, Zone, Zone) {
        opened(SimMedia::new(SimOptions { capacity: 1 << 30, ..SimOptions::default() }))
    }

    fn opened(disks: SimMedia) -> (SimMedia, Arc<dyn Media>, Zone, Zone) {
        let media = disks.open().expect("nobody else holds it");
        media.create_zones(1 << 20).wait().expect("made");
        let (wal, extents) = media.zones(1 << 20).expect("made");
        (disks, media, wal, extents)
    }

    /// The figures are of what the log does: one durable write of whole blocks a batch, round the ring.
    #[test]
    fn durable_writes_are_those_of_the_log() {
        let (mut patience, (disks, _media, wal, _)) = (patience(), volume());
        let log = Log::open(wal.clone(), &mut patience).expect("zeroes");
        let before = disks.wal_disk().trace().len();
        let mut writes = 0;
        let mut check = |series: Result<Series, String>, bytes: u64, in_flight: usize| {
            let series = series.expect("written");
            assert_eq!((series.name, series.block_bytes, series.in_flight), ("durable-write", bytes, in_flight));
            writes += series.ops;
        };
        check(log.write(4 << 10, SOON, &mut patience), 4 << 10, 1);
        check(log.write(64 << 10, SOON, &mut patience), 64 << 10, 1);
        log.close(&mut patience);
        check(write_durably(&wal, 4 << 10, 3, SOON, &mut patience), 4 << 10, 3);
        let trace = disks.wal_disk().trace().split_off(before);
        let durable: Vec<_> = trace.iter().filter(|event| event.kind == IoKind::DurableWrite).collect();
        assert_eq!((durable.len() as u64, trace.len()), (writes, durable.len()), "nothing else is done");
        assert!(durable.iter().all(|event| event.length == 4 << 10 || event.length == 64 << 10));
        assert!(durable.len() < 512 || durable.iter().filter(|event| event.offset == 0).count() > 1, "round and round");
    }

    #[test]
    fn a_failed_write_ends_the_log() {
        let (mut patience, (disks, _media, wal, _)) = (patience(), volume());
        let log = Log::open(wal.clone(), &mut patience).expect("zeroes");
        log.write(4 << 10, SOON, &mut patience).expect("written");
        disks.wal_disk().fail_next(IoKind::DurableWrite);
        let failures = [
            log.write(4 << 10, SOON, &mut patience),
            log.write(4 << 10, SOON, &mut patience),
            write_durably(&wal, 4 << 10, 3, SOON, &mut patience),
        ];
        for failure in failures.map(|series| series.expect_err("it failed for good")) {
            assert!(failure.contains("a durable write failed"), "{failure}");
        }
    }

    #[test]
    fn a_write_that_never_came_to_the_medium_is_found_by_reading() {
        for lost in [false, true] {
            let (mut patience, (disks, _media, _, extents)) = (patience(), volume());
            if lost {
                disks.extents_disk().plan(Mishap::Lost, 0..1 << 20);
            }
            let mut written = Written::default();
            assert!(written.read(&extents, SOON, &mut patience).is_err(), "nothing to read");
            extents.allocate(0, 4 << 20).wait().expect("space");
            let series = written.write(&extents, 4 << 20, Duration::ZERO, &mut patience).expect("acknowledged");
            assert_eq!((series.ops, series.block_bytes), (1, 1 << 20));
            let read = written.read(&extents, SOON, &mut patience);
            match read {
                Ok(series) => assert!(!lost && series.ops > 0 && series.block_bytes == 4096, "{series:?}"),
                Err(failure) => assert!(lost && failure.contains("other bytes"), "{failure}"),
            }
        }
    }

    #[test]
    fn what_is_written_round_and_round_is_known_by_place() {
        let (mut patience, (_disks, _media, _, extents)) = (patience(), volume());
        extents.allocate(0, 4 << 20).wait().expect("space");
        let mut written = Written::default();
        let series = written.write(&extents, 4 << 20, SOON, &mut patience).expect("written");
        assert_eq!(written.places.len() as u64, series.ops.min(4));
        written.read(&extents, SOON, &mut patience).expect("as written last");
    }

    /// A device that answers so many operations and then none any more, and a clock that stands still until then.
    struct Stuck {
        left: AtomicU64,
        stuck: AtomicBool,
        nanos: AtomicU64,
        sleeps: Mutex<Vec<(Duration, Completer<()>)>>,
    }

    impl Stuck {
        fn after(operations: u64) -> Arc<Self> {
            let (left, stuck) = (AtomicU64::new(operations), AtomicBool::new(false));
            Arc::new(Self { left, stuck, nanos: AtomicU64::new(0), sleeps: Mutex::default() })
        }

        /// Once nothing else can happen any more, time passes.
        fn pass(&self) {
            if self.stuck.load(Ordering::SeqCst) {
                for (time, done) in std::mem::take(&mut *self.sleeps.lock().expect("not poisoned")) {
                    self.nanos.fetch_add(time.as_nanos() as u64, Ordering::SeqCst);
                    done.complete(Ok(()));
                }
            }
        }
    }

    impl SimScheduler for Stuck {
        fn after(&self, _delay: Duration, land: Box<dyn FnOnce() + Send>) {
            let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            if left.is_ok() {
                // Never inside this call.
                drop(Environment::system().spawner.spawn("completion", Box::pin(async move { land() })));
            } else {
                self.stuck.store(true, Ordering::SeqCst);
                self.pass();
            }
        }
    }

    impl Clock for Stuck {
        fn now(&self) -> Duration {
            Duration::from_nanos(self.nanos.load(Ordering::SeqCst))
        }

        fn unix(&self) -> Duration {
            self.now()
        }

        fn sleep(&self, duration: Duration) -> BoxFuture<()> {
            let (sleep, done) = Op::pending();
            self.sleeps.lock().expect("not poisoned").push((duration, done));
            self.pass();
            Box::pin(async move {
                let _ = sleep.await;
            })
        }
    }

    /// A stuck device held the command for ever.
    #[test]
    fn a_device_that_stops_answering_ends_its_test_by_name() {
        type Test = fn(&Zone, &Zone, &mut Patience) -> Result<(), String>;
        let log: Test = |wal, _, patience| {
            let log = Log::open(wal.clone(), patience)?;
            log.write(4 << 10, Duration::ZERO, patience).map(drop)
        };
        let durable: Test = |wal, _, patience| write_durably(wal, 4 << 10, 3, Duration::ZERO, patience).map(drop);
        let sequential: Test = |_, extents, patience| {
            let mut written = Written::default();
            written.write(extents, 1 << 20, Duration::ZERO, patience).map(drop)
        };
        let random: Test = |_, extents, patience| {
            let written = Written { contents: vec![AlignedBuf::zeroed(1 << 20).freeze()], places: vec![0] };
            written.read(extents, Duration::ZERO, patience).map(drop)
        };
        let zeroes: Test = |wal, _, patience| fill_with_zeroes(wal, patience);
        let check = |test: Test, operations: u64, stuck: Option<&str>| {
            let device = Stuck::after(operations);
            let options = SimOptions { capacity: 1 << 30, ..SimOptions::default() };
            let spawner = Environment::system().spawner;
            let disks = SimMedia::scheduled(SimLayout::Directory, options, device.clone(), spawner);
            let (_disks, _media, wal, extents) = opened(disks);
            let found = test(&wal, &extents, &mut Patience::new(device.clone()));
            assert_eq!(found.err().as_deref(), stuck, "operations={operations}");
            // What is left of an earlier sleep passes when the device stops, which may be before the wait begins.
            let waited = if stuck.is_some() { ANSWER_MAX..=2 * ANSWER_MAX } else { Duration::ZERO..=Duration::ZERO };
            assert!(waited.contains(&device.now()), "operations={operations} waited={:?}", device.now());
        };
        check(log, 0, Some("no answer within 60s: opening the log"));
        let three = "no answer within 60s: durable-write bytes=4096 in_flight=3";
        check(durable, 0, Some(three));
        check(durable, 2, Some(three));
        check(durable, 3, None);
        for operations in [0, 1] {
            check(sequential, operations, Some("no answer within 60s: sequential-write"));
            check(zeroes, operations, Some("no answer within 60s: zeroes over the log"));
        }
        check(sequential, 2, None);
        check(zeroes, 2, None);
        check(random, 0, Some("no answer within 60s: random-read"));
        check(random, 1, None);
    }
}
