//! Runs the same work on Mainstay and on its peers in turns and prints ratios.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use mainstay_benches::peers::{self, Peer};
use mainstay_benches::work::{Outcome, beside, drive, drive_each, full_scan, hot_keys, key, load, median, value};

/// Runs the same work on Mainstay and on its peers, in turns, and prints the median of the rounds and its ratio to each
/// peer's.
#[derive(Parser)]
struct Options {
    /// Where the stores lie: a directory on the device to measure.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Seconds of each workload in each round.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Seconds of each read before it is measured, so that what fits in memory is there.
    #[arg(long, default_value_t = 2.0)]
    warm_up: f64,
    /// Rounds, in each of which every peer takes its turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Keys loaded before the reads.
    #[arg(long, default_value_t = 1_000_000)]
    keys: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 100)]
    value_bytes: usize,
    /// Only these workloads.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these stores, and Mainstay.
    #[arg(long, value_delimiter = ',')]
    peers: Option<Vec<String>>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const WORKLOADS: [&str; 11] = [
    "put-1",
    "put-64",
    "load",
    "get-1",
    "get-2",
    "get-absent",
    "scan-100",
    "scan-full",
    "get-busy",
    "ycsb-a",
    "ycsb-b",
];
/// Threads of the mixed workloads.
const MIXED_THREADS: usize = 4;
/// What is put beside the gets of `get-busy`, whatever the store could do: pairs of a batch, and the time from one batch to the next.
const BUSY_BATCH: u64 = 500;
/// See [`BUSY_BATCH`].
const BUSY_PAUSE: Duration = Duration::from_millis(25);

fn main() {
    let options = Options::parse();
    let mut results: BTreeMap<(usize, &str), Vec<Outcome>> = BTreeMap::new();
    for round in 0..options.rounds.max(1) {
        let wanted = |name: &str| {
            name == "mainstay" || options.peers.as_ref().is_none_or(|peers| peers.iter().any(|peer| peer == name))
        };
        for (name, open) in peers::all().into_iter().filter(|(name, _)| wanted(name)) {
            let dir = match &options.dir {
                Some(dir) => tempfile::tempdir_in(dir),
                None => tempfile::tempdir(),
            };
            let dir = dir.expect("a directory for the store can be made");
            eprintln!("round {} of {}: {name}", round + 1, options.rounds.max(1));
            let peer = open(&dir.path().join("store"));
            for (at, workload) in WORKLOADS.iter().enumerate() {
                let needed = options.only.is_empty() || options.only.iter().any(|only| only == workload);
                // The reads need what `load` loads.
                let needed = needed || *workload == "load" && options.only.iter().any(|only| is_read(only));
                if needed {
                    results.entry((at, name)).or_default().push(run(workload, &*peer, &options));
                }
            }
        }
    }
    report(&results, options.json);
}

fn is_read(workload: &str) -> bool {
    ["get", "scan", "ycsb"].iter().any(|kind| workload.starts_with(kind))
}

fn run(workload: &str, peer: &dyn Peer, options: &Options) -> Outcome {
    let time = Duration::from_secs_f64(options.seconds);
    // Keys of the durable puts lie beside those that are loaded.
    let put = |n: u64| peer.put_durable(&key(n | 1 << 63), &value(n, options.value_bytes));
    let get = |n: u64| {
        let found = peer.get(&key(mix(n) % options.keys));
        assert_eq!(found, Some(options.value_bytes), "a loaded key is there");
    };
    let hot = |threads, read: &(dyn Fn(u64) + Sync)| {
        drive(threads, Duration::from_secs_f64(options.warm_up), read);
        drive(threads, time, read)
    };
    match workload {
        "put-1" => drive(1, time, put),
        "put-64" => drive(64, time, |n| put(n | 1 << 40)),
        "load" => load(peer, options.keys, options.value_bytes),
        "get-1" => hot(1, &get),
        "get-2" => hot(2, &get),
        "get-absent" => hot(1, &|n| assert_eq!(peer.get(&key(n | 1 << 62)), None, "a key that was never put")),
        "scan-100" => hot(1, &|n| {
            peer.scan(&key(mix(n)), 100);
        }),
        "scan-full" => full_scan(peer, options.keys),
        "get-busy" => {
            let batch = |n: u64| {
                let keys = (n * BUSY_BATCH..(n + 1) * BUSY_BATCH).map(|n| n | 1 << 61);
                let pairs: Vec<_> = keys.map(|n| (key(n).to_vec(), value(n, options.value_bytes))).collect();
                peer.load(&pairs);
            };
            beside(BUSY_PAUSE, batch, || hot(1, &get))
        }
        "ycsb-a" => mixed(0.5, options, time, peer),
        "ycsb-b" => mixed(0.05, options, time, peer),
        other => unreachable!("{other} is not in the list"),
    }
}

/// Gets and durable puts of loaded keys, by the law of YCSB's core workloads.
fn mixed(puts: f64, options: &Options, time: Duration, peer: &dyn Peer) -> Outcome {
    let writer = |thread: usize| {
        let mut keys = hot_keys(thread as u64, options.keys, puts);
        move || {
            let (n, is_put) = keys();
            match is_put {
                true => peer.put_durable(&key(n), &value(n.wrapping_add(1), options.value_bytes)),
                false => assert_eq!(peer.get(&key(n)), Some(options.value_bytes), "a loaded key is there"),
            }
        }
    };
    drive_each(MIXED_THREADS, time, writer)
}

fn mix(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
}

fn report(results: &BTreeMap<(usize, &str), Vec<Outcome>>, json: bool) {
    let mut rows = Vec::new();
    for (at, workload) in WORKLOADS.iter().enumerate() {
        let of = |name: &str| results.get(&(at, name)).map(|outcomes| median(outcomes));
        let Some(ours) = of("mainstay") else { continue };
        for (name, _) in peers::all() {
            let Some(outcome) = of(name) else { continue };
            let ratio = ours.rate / outcome.rate;
            if json {
                rows.push(serde_json::json!({
                    "workload": workload, "peer": name, "rate": outcome.rate, "p50_us": outcome.p50_us,
                    "p99_us": outcome.p99_us, "p999_us": outcome.p999_us, "mainstay_over_peer": ratio,
                }));
            } else {
                println!(
                    "{workload:<11} {name:<9} {:>12.0}/s  p50 {:>9.1} us  p99 {:>9.1} us  p99.9 {:>9.1} us  \
                     mainstay is {ratio:>6.2} times",
                    outcome.rate, outcome.p50_us, outcome.p99_us, outcome.p999_us
                );
            }
        }
    }
    if json {
        println!("{}", serde_json::Value::Array(rows));
    }
}
