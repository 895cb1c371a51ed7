//! The workloads: keys of 16 bytes, spread by a fixed mixing function, so that every run and every peer sees the same.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};

use crate::peers::Peer;

/// What a workload gave.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Operations a second.
    pub rate: f64,
    /// Median and 99th percentile of an operation in microseconds.
    pub p50_us: f64,
    /// See `p50_us`.
    pub p99_us: f64,
    /// The same of one in a thousand.
    pub p999_us: f64,
    /// Reads of the device for each operation, where that is counted.
    pub device_reads: Option<f64>,
}

/// Key `n`: sixteen hexadecimal digits of a bijection of `n`, so that neighbours in time are strangers in order.
pub fn key(n: u64) -> [u8; 16] {
    let mut x = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    let mut out = [0; 16];
    for (i, digit) in out.iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(x >> (60 - 4 * i)) as usize & 15];
    }
    out
}

/// A value that compresses about as much as rows do: half of it is noise of `n`, half is filler.
pub fn value(n: u64, bytes: usize) -> Vec<u8> {
    let noise = key(n ^ 0x5555_5555);
    (0..bytes).map(|i| if i % 2 == 0 { noise[i / 2 % 16] } else { b'.' }).collect()
}

/// Runs `operation` on `threads` threads for `time` and merges their latencies. `operation` is given a number that is
/// never given twice.
pub fn drive(threads: usize, time: Duration, operation: impl Fn(u64) + Sync) -> Outcome {
    let next = AtomicU64::new(0);
    drive_each(threads, time, |_| || operation(next.fetch_add(1, Ordering::Relaxed)))
}

/// Runs on each of `threads` threads for `time` the operation that `writer` makes for its number.
pub fn drive_each<F: FnMut()>(threads: usize, time: Duration, writer: impl Fn(usize) -> F + Sync) -> Outcome {
    let stop = AtomicBool::new(false);
    let began = Instant::now();
    let merged = std::thread::scope(|scope| {
        let (writer, stop) = (&writer, &stop);
        let workers: Vec<_> = (0..threads)
            .map(|at| {
                scope.spawn(move || {
                    let mut operation = writer(at);
                    timed!(stop, operation())
                })
            })
            .collect();
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        merge(workers.into_iter().map(|worker| worker.join().expect("a worker does not panic")))
    });
    outcome(&merged, merged.len() as f64 / began.elapsed().as_secs_f64())
}

/// Runs `tasks` tasks for `time`, each what `task` makes for its number: a loop of [`timed!`] until it is told to stop.
pub fn drive_tasks<F>(
    runtime: &tokio::runtime::Runtime,
    tasks: usize,
    time: Duration,
    task: impl Fn(usize, Arc<AtomicBool>) -> F,
) -> Outcome
where
    F: Future<Output = Histogram<u64>> + Send + 'static,
{
    let stop = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    let workers: Vec<_> = (0..tasks).map(|at| runtime.spawn(task(at, stop.clone()))).collect();
    std::thread::sleep(time);
    stop.store(true, Ordering::Relaxed);
    let merged = merge(workers.into_iter().map(|worker| runtime.block_on(worker).expect("a task does not panic")));
    outcome(&merged, merged.len() as f64 / began.elapsed().as_secs_f64())
}

/// Repeats an operation until `$stop` is set and gives the histogram of its latencies.
macro_rules! timed {
    ($stop:expr, $operation:expr) => {{
        let mut latencies = $crate::work::histogram();
        while !$stop.load(::std::sync::atomic::Ordering::Relaxed) {
            let at = ::std::time::Instant::now();
            $operation;
            latencies.saturating_record(at.elapsed().as_nanos() as u64);
        }
        latencies
    }};
}
pub(crate) use timed;

fn merge(workers: impl Iterator<Item = Histogram<u64>>) -> Histogram<u64> {
    let mut merged = histogram();
    for latencies in workers {
        merged.add(latencies).expect("equal bounds");
    }
    merged
}

/// An empty histogram of nanoseconds, from 100 ns to a minute.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 60_000_000_000, 3).expect("the bounds are in order")
}

fn outcome(latencies: &Histogram<u64>, rate: f64) -> Outcome {
    let us = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
    Outcome { rate, p50_us: us(0.5), p99_us: us(0.99), p999_us: us(0.999), device_reads: None }
}

/// What one operation that took so long gave.
pub fn once(elapsed: Duration) -> Outcome {
    let us = elapsed.as_secs_f64() * 1e6;
    Outcome { rate: 1.0 / elapsed.as_secs_f64(), p50_us: us, p99_us: us, p999_us: us, device_reads: None }
}

/// Reads that the device below `path` has completed, for whoever.
fn device_reads(path: &Path) -> Option<u64> {
    let device = std::fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let counts = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    counts.split_whitespace().next()?.parse().ok()
}

/// Runs `measured` and counts the reads of the device below `path` meanwhile.
pub fn with_device_reads(path: &Path, measured: impl FnOnce() -> Outcome) -> Outcome {
    let before = device_reads(path);
    let began = Instant::now();
    let outcome = measured();
    let operations = outcome.rate * began.elapsed().as_secs_f64();
    let reads = before.zip(device_reads(path)).map(|(before, after)| (after - before) as f64 / operations);
    Outcome { device_reads: reads, ..outcome }
}

/// Has the system forget what it holds of the files below a folder. They are durable before; none may be mapped.
pub fn forget(folder: &Path) {
    for entry in std::fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("it is listed").path();
        if path.is_dir() {
            forget(&path);
            continue;
        }
        let file = std::fs::File::open(&path).expect("a file can be opened");
        file.sync_all().expect("a file can be synced");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice is taken");
    }
}

/// Draws one of `keys` keys again and again, a few of them often, and whether it is put: ranks out of ten billion by a Zipf law of exponent
/// 0.99, scattered over the keys (Cooper et al., "Benchmarking Cloud Serving Systems with YCSB", SoCC 2010, section 5.1).
pub fn hot_keys(seed: u64, keys: u64, puts: f64) -> impl FnMut() -> (u64, bool) {
    let mut random = SmallRng::seed_from_u64(seed);
    let ranks = Zipf::new(1e10, 0.99).expect("there are ranks, and the exponent is positive");
    move || {
        let rank: f64 = ranks.sample(&mut random);
        let scattered = (rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        (scattered % keys, random.random_bool(puts))
    }
}

/// Runs `measured` while another thread calls `other` with 0, 1, 2, ..., `pause` after `pause`, or as fast as it can if that is slower.
pub fn beside(pause: Duration, other: impl Fn(u64) + Sync, measured: impl FnOnce() -> Outcome) -> Outcome {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let began = Instant::now();
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                other(n);
                let due = pause.saturating_mul(u32::try_from(n + 1).expect("a run has an end"));
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
        });
        let outcome = measured();
        stop.store(true, Ordering::Relaxed);
        outcome
    })
}

/// Loads keys `0..count` in batches of 1,000 and settles them.
pub fn load(peer: &dyn Peer, count: u64, value_bytes: usize) -> Outcome {
    let began = Instant::now();
    let mut latencies = histogram();
    for from in (0..count).step_by(1_000) {
        let pairs: Vec<_> =
            (from..(from + 1_000).min(count)).map(|n| (key(n).to_vec(), value(n, value_bytes))).collect();
        let at = Instant::now();
        peer.load(&pairs);
        latencies.saturating_record(at.elapsed().as_nanos() as u64);
    }
    peer.settle();
    outcome(&latencies, count as f64 / began.elapsed().as_secs_f64())
}

/// One pass over everything; the rate is in pairs a second.
pub fn full_scan(peer: &dyn Peer, count: u64) -> Outcome {
    let began = Instant::now();
    let (found, _) = peer.scan(b"", usize::MAX);
    assert!(found as u64 >= count, "{} of {count} pairs found", found);
    let elapsed = began.elapsed();
    let us = elapsed.as_secs_f64() * 1e6;
    let rate = found as f64 / elapsed.as_secs_f64();
    Outcome { rate, p50_us: us, p99_us: us, p999_us: us, device_reads: None }
}

/// The outcome of the round in the middle, by rate.
pub fn median(outcomes: &[Outcome]) -> Outcome {
    let mut sorted = outcomes.to_vec();
    sorted.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    sorted.swap_remove(sorted.len() / 2)
}
