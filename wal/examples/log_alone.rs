//! Measures the log by itself: writers that each wait for one record to be durable before they append the next.
//!
//! `cargo run --release -p mainstay-wal --example log_alone -- DIR [writers] [bytes] [seconds] [threads|tasks] [in flight]`
//!
//! `threads`: a thread for each writer. `tasks`: all writers are driven by the callbacks, as tasks of a runtime on the
//! log's own thread would be; nothing is woken, so this is what the log itself can do.

#![allow(clippy::disallowed_methods, reason = "a program that measures: it reads the clock and starts threads")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mainstay_io::{Environment, MediaOptions, Target, block_on, create_media};
use mainstay_wal::{GroupId, Lsn, Record, RecordKind, RecordPos, Reserve, Wal, WalOptions};

type Failure = Box<dyn std::error::Error>;

struct Shared {
    wal: Wal,
    payload: Bytes,
    stop: AtomicBool,
    running: AtomicUsize,
    latencies: Vec<Mutex<Vec<u32>>>,
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("give a directory on the disk to measure")?);
    let mut number = |default: usize| args.next().map_or(Ok(default), |a| a.parse());
    let (writers, bytes, seconds) = (number(64)?, number(256)?, number(5)?);
    let mode = args.next().unwrap_or_else(|| "threads".into());
    let in_flight_max = args.next().map_or(Ok(3), |a| a.parse())?;

    let wal_bytes = 256 << 20;
    let media = create_media(&Target::Directory(dir), &MediaOptions::default())?;
    media.create_zones(wal_bytes).wait()?;
    let (zone, _) = media.zones(wal_bytes)?;
    let options = WalOptions { in_flight_max, ..WalOptions::new([1; 16], 1, Lsn(0), None) };
    let (wal, _) = block_on(Wal::open(zone, Environment::system(), options, &mut |_, _, _, _| Ok(())))?;
    let shared = Arc::new(Shared {
        wal: wal.clone(),
        payload: Bytes::from(vec![0xA5; bytes]),
        stop: AtomicBool::new(false),
        running: AtomicUsize::new(writers),
        latencies: (0..writers).map(|_| Mutex::new(Vec::with_capacity(1 << 20))).collect(),
    });

    let began = Instant::now();
    let mut threads = Vec::new();
    for writer in 0..writers {
        let shared = shared.clone();
        if mode == "tasks" {
            next(shared, writer);
        } else {
            threads.push(std::thread::spawn(move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let pos =
                        block_on(shared.wal.append_wait(record(&shared), Reserve::Normal)).expect("the disk works");
                    done(&shared, writer, pos, began);
                }
            }));
        }
    }
    std::thread::sleep(Duration::from_secs(seconds as u64));
    shared.stop.store(true, Ordering::Relaxed);
    let took = began.elapsed();
    for thread in threads {
        thread.join().map_err(|_| "a writer panicked")?;
    }
    block_on(wal.close())?;

    let mut all: Vec<u32> = Vec::new();
    for latencies in &shared.latencies {
        all.extend_from_slice(&latencies.lock().expect("no writer panicked"));
    }
    all.sort_unstable();
    let at = |per_mille: usize| all.get(all.len() * per_mille / 1000).copied().unwrap_or(0);
    let stats = wal.stats();
    println!(
        "backend={:?} mode={mode} writers={writers} bytes={bytes} in_flight={in_flight_max} commits/s={:.0} p50_us={} p99_us={} \
         p999_us={} batches/s={:.0} records/batch={:.1} written_MB/s={:.0}",
        media.backend().0,
        all.len() as f64 / took.as_secs_f64(),
        at(500),
        at(990),
        at(999),
        stats.batches as f64 / took.as_secs_f64(),
        stats.records as f64 / stats.batches.max(1) as f64,
        stats.written_bytes as f64 / took.as_secs_f64() / 1e6,
    );
    Ok(())
}

fn record(shared: &Shared) -> Record {
    Record { group: GroupId(1), kind: RecordKind(32), payload: vec![shared.payload.clone()] }
}

fn done(shared: &Shared, writer: usize, pos: RecordPos, began: Instant) {
    if let Some(latencies) = shared.latencies.get(writer) {
        latencies.lock().expect("no writer panicked").push(began.elapsed().as_micros() as u32);
    }
    // As an owner does that needs nothing any more.
    shared.wal.release(pos.batch);
}

fn next(shared: Arc<Shared>, writer: usize) {
    if shared.stop.load(Ordering::Relaxed) {
        shared.running.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let began = Instant::now();
    let wal = shared.wal.clone();
    wal.append(
        record(&shared),
        Reserve::Normal,
        Box::new(move |result| {
            done(&shared, writer, result.expect("the disk works"), began);
            next(shared, writer);
        }),
    );
}
