//! What one follower that is dead or slow costs the writes of the others.
//!
//! `cargo run --release --bin degraded -- --dir DIR` starts three replicas of Mainstay, then three members of etcd where the
//! machine has it, as processes on loopback. In each round the same puts go to the leader at a fixed rate three times: with all
//! members well; with one follower stopped by SIGSTOP, as a machine that has died without a word; and with that follower running a
//! part of the time, a few milliseconds in each fifty. Latencies count from when a put was due.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use mainstay_benches::served::{NAMES, Outcome, Served, exit_of, runtime};
use mainstay_server::bench::Report;

/// As the server has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A slow follower is stopped for so long at a time, and runs for as long as [`RUNS`] in between.
const STOPPED: Duration = Duration::from_millis(45);
const RUNS: Duration = Duration::from_millis(5);
/// Load after each change that is not measured.
const SETTLE_SECONDS: u64 = 1;

#[derive(Parser)]
struct Options {
    /// Where the volumes lie: a directory on the device to measure
    #[arg(long)]
    dir: PathBuf,
    /// Rounds, in each of which every state takes its turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Length of each measurement
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Puts a second
    #[arg(long, default_value_t = 2000)]
    rate: u64,
    /// Clients, each with at most one put under way
    #[arg(long, default_value_t = 64)]
    clients: u32,
    /// Bytes of a value
    #[arg(long, default_value_t = 256)]
    value_bytes: usize,
    /// Another build of the server to drive instead of this one
    #[arg(long)]
    mainstay: Option<PathBuf>,
    /// Only these sides: server, etcd
    #[arg(long, value_delimiter = ',', default_value = "server,etcd")]
    only: Vec<String>,
}

/// How the one follower does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Well,
    Dead,
    Slow,
}

const STATES: [State; 3] = [State::Well, State::Dead, State::Slow];

fn main() -> std::process::ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { mainstay_server::allocator::configure() };
    // The same program is also the replicas that it starts.
    if std::env::args().nth(1).as_deref() == Some("serve") {
        return mainstay_server::cli::main();
    }
    exit_of(run(&Options::parse()))
}

fn run(options: &Options) -> Outcome<()> {
    let folder = tempfile::tempdir_in(&options.dir)?;
    for side in &options.only {
        let served = match side.as_str() {
            "server" => Served::mainstay(&folder.path().join("server"), options.mainstay.as_deref())?,
            "etcd" if !Served::has_etcd() => {
                eprintln!("etcd is not on this machine: its side is left out");
                continue;
            }
            "etcd" => Served::etcd(&folder.path().join("etcd"))?,
            other => return Err(format!("no such side: {other}").into()),
        };
        let mut reports: [Vec<Report>; 3] = Default::default();
        for round in 1..=options.rounds.max(1) {
            for (state, reports) in STATES.into_iter().zip(&mut reports) {
                let report = runtime()?.block_on(measure(&served, state, options))?;
                eprintln!("{} round {round} {state:?}: {}", served.name(), line(&report));
                reports.push(report);
            }
        }
        let mut well = 0.0;
        for (state, reports) in STATES.into_iter().zip(&mut reports) {
            reports.sort_by(|a, b| a.p99_ms.total_cmp(&b.p99_ms));
            let median = &reports[reports.len() / 2];
            if state == State::Well {
                well = median.p99_ms;
            }
            let times = median.p99_ms / well;
            println!("{:8} {:5} {}  {times:.2} times the p99", served.name(), format!("{state:?}"), line(median));
        }
    }
    Ok(())
}

fn line(report: &Report) -> String {
    let Report { ops_per_second, p50_ms, p99_ms, max_ms, errors, .. } = report;
    format!(
        "{ops_per_second:6.0} puts/s  p50 {p50_ms:7.2} ms  p99 {p99_ms:7.2} ms  max {max_ms:7.2} ms  errors {errors}"
    )
}

/// Puts at the rate while a follower is in `state`; it is well again afterwards.
async fn measure(served: &Served, state: State, options: &Options) -> Outcome<Report> {
    let leader = served.leader().await?;
    let follower = Follower(served.processes().nth((leader + 1) % NAMES.len()).ok_or("three members run")?.id());
    let well = Arc::new(AtomicBool::new(false));
    let slow = match state {
        State::Well => None,
        State::Dead => {
            follower.signal("STOP")?;
            None
        }
        State::Slow => {
            let (follower, well) = (Follower(follower.0), well.clone());
            Some(std::thread::spawn(move || -> Outcome<()> {
                while !well.load(Ordering::Relaxed) {
                    follower.signal("STOP")?;
                    std::thread::sleep(STOPPED);
                    follower.signal("CONT")?;
                    std::thread::sleep(RUNS);
                }
                Ok(())
            }))
        }
    };
    let load = |seconds: u64| {
        let Options { clients, rate, value_bytes, .. } = options;
        format!("--workload put --clients {clients} --rate {rate} --duration {seconds}s --value {value_bytes}")
    };
    let report = async {
        served.load(&load(SETTLE_SECONDS)).await?;
        served.load(&load(options.seconds)).await
    }
    .await;
    well.store(true, Ordering::Relaxed);
    if let Some(slow) = slow {
        slow.join().map_err(|_| "the thread that slows a follower panicked")??;
    }
    follower.signal("CONT")?;
    report
}

/// The process of a member. It runs when this is dropped.
struct Follower(u32);

impl Follower {
    fn signal(&self, signal: &str) -> Outcome<()> {
        let sent = Command::new("kill").args([format!("-{signal}"), self.0.to_string()]).status()?;
        if sent.success() { Ok(()) } else { Err("the process could not be sent a signal".into()) }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.signal("CONT");
    }
}
