//! Runs the same work on Mainstay and on its peers in turns and prints ratios.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use mainstay_benches::peers::{self, Open, Peer, Setup};
use mainstay_benches::work::{
    Outcome, beside, drive, drive_each, forget, full_scan, hot_keys, key, load, median, once, value, with_device_reads,
};

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
    /// Bytes of a value of the cold workloads.
    #[arg(long, default_value_t = 1024)]
    cold_value_bytes: usize,
    /// MiB that are in the log when `reopen` kills the writer.
    #[arg(long, default_value_t = 1024)]
    log_mib: u64,
    /// Fill this store below `--dir` and end as by SIGKILL: what `reopen` starts.
    #[arg(long, hide = true)]
    fill: Option<String>,
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

const WORKLOADS: [&str; 14] = [
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
    "get-cold-1",
    "get-cold-16",
    "reopen",
];
/// Those that open stores of their own.
const APART: [&str; 3] = ["get-cold-1", "get-cold-16", "reopen"];
/// Threads of the mixed workloads.
const MIXED_THREADS: usize = 4;
/// What is put beside the gets of `get-busy`, whatever the store could do: pairs of a batch, and the time from one batch to the next.
const BUSY_BATCH: u64 = 500;
/// See [`BUSY_BATCH`].
const BUSY_PAUSE: Duration = Duration::from_millis(25);

fn main() {
    let options = Options::parse();
    if let Some(name) = &options.fill {
        fill(name, &options);
    }
    let mut results: BTreeMap<(usize, &str), Vec<Outcome>> = BTreeMap::new();
    for round in 0..options.rounds.max(1) {
        let wanted = |name: &str| {
            name == "mainstay" || options.peers.as_ref().is_none_or(|peers| peers.iter().any(|peer| peer == name))
        };
        for (name, open) in peers::all().into_iter().filter(|(name, _)| wanted(name)) {
            eprintln!("round {} of {}: {name}", round + 1, options.rounds.max(1));
            let asked = |workload: &str| options.only.is_empty() || options.only.iter().any(|only| only == workload);
            let mut note = |workload: &str, outcome| {
                let at = WORKLOADS.iter().position(|listed| *listed == workload).expect("it is in the list");
                results.entry((at, name)).or_default().push(outcome);
            };
            let (apart, together): (Vec<&str>, Vec<&str>) = WORKLOADS.iter().partition(|w| APART.contains(w));
            // The reads need what `load` loads.
            let needed = |workload: &str| {
                asked(workload) || workload == "load" && together.iter().any(|w| asked(w) && is_read(w))
            };
            if together.iter().any(|workload| needed(workload)) {
                let dir = folder(&options);
                let peer = open(&dir.path().join("store"), Setup::Ordinary);
                for workload in together.iter().filter(|workload| needed(workload)) {
                    note(workload, run(workload, &*peer, &options));
                }
            }
            if apart.iter().any(|workload| workload.starts_with("get-cold") && asked(workload)) {
                let dir = folder(&options);
                for (workload, outcome) in cold(open, &dir.path().join("store"), &options, &asked) {
                    note(workload, outcome);
                }
            }
            if asked("reopen") {
                let dir = folder(&options);
                note("reopen", reopen(name, open, dir.path(), &options));
            }
        }
    }
    report(&results, options.json);
}

fn folder(options: &Options) -> tempfile::TempDir {
    let dir = match &options.dir {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    dir.expect("a directory for the store can be made")
}

/// Gets of keys that no memory has: the store is loaded, settled and closed, what the system holds of its files is dropped, and it is
/// opened again for each number of threads.
fn cold(open: Open, path: &Path, options: &Options, asked: &dyn Fn(&str) -> bool) -> Vec<(&'static str, Outcome)> {
    let peer = open(path, Setup::Ordinary);
    load(&*peer, options.keys, options.cold_value_bytes);
    peer.close();
    let time = Duration::from_secs_f64(options.seconds);
    let mut outcomes = Vec::new();
    for (workload, threads) in [("get-cold-1", 1), ("get-cold-16", 16)] {
        if !asked(workload) {
            continue;
        }
        forget(path);
        let peer = open(path, Setup::Cold);
        let get = |n: u64| {
            let found = peer.get(&key(mix(n) % options.keys));
            assert_eq!(found, Some(options.cold_value_bytes), "a loaded key is there");
        };
        outcomes.push((workload, with_device_reads(path, || drive(threads, time, get))));
        peer.close();
    }
    outcomes
}

/// From the start of an open to the first get, of a store whose writer was killed with all that it wrote in its log.
fn reopen(name: &str, open: Open, dir: &Path, options: &Options) -> Outcome {
    let program = std::env::current_exe().expect("this program has a path");
    let log_mib = options.log_mib.to_string();
    let status = Command::new(program).args(["--fill", name, "--log-mib", &log_mib, "--dir"]).arg(dir).status();
    assert_eq!(status.expect("it starts").code(), None, "the writer ends by a signal");
    let path = dir.join("store");
    forget(&path);
    let began = Instant::now();
    let peer = open(&path, Setup::LongLog);
    assert_eq!(peer.get(&key(0)), Some(FILL_VALUE_BYTES), "what was durable is there");
    let outcome = once(began.elapsed());
    let last = options.log_mib * FILL_BATCH - 1;
    assert_eq!(peer.get(&key(last)), Some(FILL_VALUE_BYTES), "what was durable last is there");
    peer.close();
    outcome
}

/// Bytes of a value that `reopen` finds, and how many of them are a batch of 1 MiB.
const FILL_VALUE_BYTES: usize = 1024;
/// See [`FILL_VALUE_BYTES`].
const FILL_BATCH: u64 = 1024;

/// Writes durable batches and ends this process with SIGKILL.
fn fill(name: &str, options: &Options) -> ! {
    let (_, open) = peers::all().into_iter().find(|(known, _)| *known == name).expect("a store of this build");
    let dir = options.dir.as_ref().expect("a folder is given");
    let peer = open(&dir.join("store"), Setup::LongLog);
    for batch in 0..options.log_mib {
        let numbers = batch * FILL_BATCH..(batch + 1) * FILL_BATCH;
        let pairs: Vec<_> = numbers.map(|n| (key(n).to_vec(), value(n, FILL_VALUE_BYTES))).collect();
        peer.load(&pairs);
    }
    let me = rustix::process::getpid();
    rustix::process::kill_process(me, rustix::process::Signal::KILL).expect("a process may end itself");
    unreachable!("it was killed")
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
                    "p99_us": outcome.p99_us, "p999_us": outcome.p999_us, "device_reads": outcome.device_reads,
                    "mainstay_over_peer": ratio,
                }));
            } else {
                let reads = outcome.device_reads.map(|reads| format!("  {reads:.2} reads of the device each"));
                let reads = reads.unwrap_or_default();
                println!(
                    "{workload:<11} {name:<9} {:>12.0}/s  p50 {:>9.1} us  p99 {:>9.1} us  p99.9 {:>9.1} us  \
                     mainstay is {ratio:>6.2} times{reads}",
                    outcome.rate, outcome.p50_us, outcome.p99_us, outcome.p999_us
                );
            }
        }
    }
    if json {
        println!("{}", serde_json::Value::Array(rows));
    }
}
