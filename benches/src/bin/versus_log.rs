//! Runs commits of many writers on Mainstay's log and on raft-engine in turns and prints ratios.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use mainstay_benches::log::{Driver, Load, drivers};
use mainstay_benches::work::{Outcome, median};

/// Commits to a log by itself: Mainstay's against raft-engine's, every commit synced, in turns in one process. Each log is
/// driven in each way that suits it; what is compared is the best way of one with the best way of the other.
#[derive(Parser)]
struct Options {
    /// Where the logs lie: a directory on the device to measure.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Seconds of each turn.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Seconds of each turn before it is measured.
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Rounds, in each of which every driver takes its turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Writers, each with one commit under way.
    #[arg(long, default_value_t = 64)]
    writers: usize,
    /// Bytes of a commit.
    #[arg(long, default_value_t = 256)]
    bytes: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() {
    let options = Options::parse();
    let load = Load {
        writers: options.writers,
        bytes: options.bytes,
        time: Duration::from_secs_f64(options.seconds),
        warm_up: Duration::from_secs_f64(options.warm_up),
    };
    let drivers = drivers();
    let rounds = options.rounds.max(1);
    let mut outcomes: Vec<Vec<Outcome>> = vec![Vec::new(); drivers.len()];
    for round in 0..rounds {
        // Who begins differs from round to round, so that nobody always runs on what another left in the disk's caches.
        for turn in 0..drivers.len() {
            let at = (round + turn) % drivers.len();
            let Driver { log, way, run } = &drivers[at];
            eprintln!("round {} of {rounds}: {log}, {way}", round + 1);
            let dir = match &options.dir {
                Some(dir) => tempfile::tempdir_in(dir),
                None => tempfile::tempdir(),
            };
            let dir = dir.expect("a directory for the log can be made");
            outcomes[at].push(run(&dir.path().join("log"), load));
        }
    }
    let medians: Vec<Outcome> = outcomes.iter().map(|outcomes| median(outcomes)).collect();
    report(&drivers, &medians, options.json);
}

/// Each driver's median, and the ratio of Mainstay's best way to it.
fn report(drivers: &[Driver], medians: &[Outcome], json: bool) {
    let ours = drivers
        .iter()
        .zip(medians)
        .filter(|(driver, _)| driver.log == "mainstay")
        .map(|(_, outcome)| outcome)
        .max_by(|a, b| a.rate.total_cmp(&b.rate))
        .expect("Mainstay is always measured");
    let mut rows = Vec::new();
    for (Driver { log, way, .. }, outcome) in drivers.iter().zip(medians) {
        let Outcome { rate, p50_us, p99_us, .. } = outcome;
        let (rate_ratio, p99_ratio) = (ours.rate / rate, ours.p99_us / p99_us);
        if json {
            rows.push(serde_json::json!({
                "log": log, "way": way, "rate": rate, "p50_us": p50_us, "p99_us": p99_us,
                "mainstay_rate_over_this": rate_ratio, "mainstay_p99_over_this": p99_ratio,
            }));
        } else {
            println!(
                "{log:<12} {way:<18} {rate:>9.0} commits/s  p50 {p50_us:>8.1} us  p99 {p99_us:>8.1} us  \
                 mainstay's best: {rate_ratio:>5.2} times the rate, {p99_ratio:>5.2} of the p99"
            );
        }
    }
    if json {
        println!("{}", serde_json::Value::Array(rows));
    }
}
