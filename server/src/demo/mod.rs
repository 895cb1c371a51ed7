//! `cargo demo`: what a newcomer runs first, and what proves the claim of the project on any machine.
//!
//! Three replicas as three processes, a real data set, a leader killed under load, a checkpoint, a changed clone, and then every
//! acknowledged write read back through every replica. Exit status 0 only if all of it held.

mod cluster;
mod data;
mod load;
mod verify;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{CommandFactory, Parser};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{self, Failure};
use crate::proto::mainstay::v1 as pb;
use cluster::Cluster;
use load::Load;

/// Fewest keys of the data set; synthetic ones are added where a machine has less.
const KEYS_MIN: usize = 100_000;
/// Most keys of the data set, so that the demo stays short.
const KEYS_MAX: usize = 150_000;
/// Writers at the same time.
const WRITERS: usize = 256;
/// Writing goes on this long before and after the leader is killed.
const AROUND_THE_KILL: Duration = Duration::from_secs(2);
/// Longest wait for a leader, and for a restarted replica to catch up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Changes made in the clone.
const CLONE_CHANGES: usize = 1_000;

/// Starts three replicas on this machine, kills the leader under load, and checks that nothing acknowledged was lost.
#[derive(Parser, Debug)]
#[command(name = "cargo demo", max_term_width = 100)]
struct DemoArgs {
    /// Leave the cluster running and print how to talk to it
    #[arg(long)]
    keep: bool,
}

/// Runs the demo, or the command line of the server under this name: the replicas are this very program.
pub fn main() -> ExitCode {
    let command = std::env::args().nth(1).unwrap_or_default();
    let is_server = cli::Cli::command().get_subcommands().any(|known| known.get_name() == command);
    if is_server {
        return cli::main();
    }
    let args = DemoArgs::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("demo: no runtime: {e}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        tokio::select! {
            result = run(args.keep) => result,
            _ = tokio::signal::ctrl_c() => Err(Failure::other("interrupted")),
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("demo: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn say(text: impl AsRef<str>) {
    println!("{}", text.as_ref());
}

async fn run(keep: bool) -> Result<(), Failure> {
    let begin = Instant::now();
    let data = data::collect(KEYS_MIN, KEYS_MAX);
    // Dropped on every way out, errors and panics too: it ends its processes by their ids.
    let mut cluster = Cluster::start()?;
    say(format!("three replicas at {} with data in {}", cluster.client_addresses(), cluster.path().display()));
    cluster.init(PATIENCE).await?;
    let leader = cluster.leader(PATIENCE).await?;
    say(format!("a cluster is born, {} leads", cluster.name(leader)));

    let load = Load::new(&cluster)?;
    let bar = progress(data.len() as u64, "paths and sizes");
    load.write_all(&data, WRITERS, &bar).await?;
    bar.finish_and_clear();
    let loaded = load.figures();
    say(format!(
        "loaded {} keys: {:.0} writes/s, p50 {:.1} ms, p99 {:.1} ms",
        data.len(),
        loaded.writes_per_second,
        loaded.p50_ms,
        loaded.p99_ms
    ));

    let failover = kill_the_leader(&mut cluster, &load, leader).await?;
    let (checkpoint, clone_changes) = branch_off(&cluster, &load).await?;
    say(format!("checkpoint at index {checkpoint}, a clone of it with {} changes", clone_changes.len()));

    let expected = load.acknowledged();
    let bar = progress(3 * (expected.len() + clone_changes.len()) as u64, "read back through every replica");
    let checked = verify::all(&cluster, &expected, &clone_changes, &bar).await?;
    bar.finish_and_clear();

    let figures = load.figures();
    let disk = crate::units::ByteSize(cluster.disk_bytes());
    say(format!(
        "{} acknowledged writes lost: {} writes, {:.0} writes/s, p50 {:.1} ms, p99 {:.1} ms, failover {} ms, {} on disk, \
         {:.0} s in all",
        checked.lost,
        figures.writes,
        figures.writes_per_second,
        figures.p50_ms,
        figures.p99_ms,
        failover.as_millis(),
        disk,
        begin.elapsed().as_secs_f64()
    ));
    if !checked.complaints.is_empty() {
        let kept = cluster.keep();
        let complaints = checked.complaints.join("\n  ");
        return Err(Failure::other(format!("not all of it held; data and logs are left in {kept}\n  {complaints}")));
    }
    if keep {
        say(cluster.how_to_talk());
        cluster.keep();
        return Ok(());
    }
    cluster.stop().await
}

fn progress(length: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:40}] {pos}/{len} {per_sec}");
    let bar = ProgressBar::new(length).with_message(what);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Kills the leader while writers run, restarts it, and waits until it has caught up. Returns the time without an
/// acknowledged write.
async fn kill_the_leader(cluster: &mut Cluster, load: &Load, leader: usize) -> Result<Duration, Failure> {
    let writing = load.start_writing(WRITERS);
    tokio::time::sleep(AROUND_THE_KILL).await;
    load.arm_gap();
    cluster.kill(leader)?;
    let killed = Instant::now();
    say(format!("killed {} with SIGKILL while {WRITERS} writers run", cluster.name(leader)));
    load.wait_for_acknowledgement(killed, PATIENCE).await?;
    let next = cluster.leader(PATIENCE).await?;
    tokio::time::sleep(AROUND_THE_KILL).await;
    let gap = load.longest_gap();
    say(format!("{} leads; {} ms without an acknowledged write", cluster.name(next), gap.as_millis()));

    cluster.restart(leader)?;
    let caught_up = cluster.wait_until_caught_up(leader, next, PATIENCE).await?;
    say(format!("{} is back and caught up after {:.1} s", cluster.name(leader), caught_up.as_secs_f64()));
    load.stop_writing();
    for writer in writing {
        writer.await.map_err(|e| Failure::other(format!("a writer failed: {e}")))??;
    }
    Ok(gap)
}

type Changes = Vec<(String, Vec<u8>)>;

/// Takes a checkpoint, makes a clone, changes the clone: half of the changes are to keys of the data set.
async fn branch_off(cluster: &Cluster, load: &Load) -> Result<(u64, Changes), Failure> {
    let mut store = cluster.store_client(0).await?;
    let request = pb::CreateCheckpointRequest { name: "demo".into(), clone: String::new() };
    let made = store.create_checkpoint(request).await.map_err(crate::client::refused)?.into_inner();
    let index = made.checkpoint.map(|checkpoint| checkpoint.index).unwrap_or_default();
    let request = pb::CreateCloneRequest { name: verify::CLONE.into(), checkpoint: "demo".into() };
    store.create_clone(request).await.map_err(crate::client::refused)?;

    let existing: BTreeSet<String> = load.acknowledged().into_keys().take(CLONE_CHANGES / 2).collect();
    let new = (0..CLONE_CHANGES / 2).map(|at| format!("only-in-the-clone/{at:06}"));
    let changes: Changes = existing.into_iter().chain(new).map(|key| (key, b"changed in the clone".to_vec())).collect();
    load.write_clone(&changes, WRITERS).await?;
    Ok((index, changes))
}

#[cfg(test)]
mod tests {
    /// `cargo demo -- --keep`, as the README has it: an alias that ends in `--` itself hands the second one on.
    #[test]
    fn what_follows_the_alias_reaches_the_demo() {
        let config = include_str!("../../../.cargo/config.toml");
        let config: toml::Table = config.parse().expect("TOML");
        let alias = config["alias"]["demo"].as_str().expect("a line");
        assert!(alias.starts_with("run ") && alias.ends_with(" mainstay-demo"), "{alias}");
    }
}
