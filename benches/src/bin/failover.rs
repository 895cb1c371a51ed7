//! How long three replicas acknowledge nothing when their leader goes: by SIGKILL, and by SIGTERM.
//!
//! `cargo run --release --bin failover -- --dir DIR` starts three replicas of Mainstay, then three members of etcd where the
//! machine has it, as processes on loopback. Writers put one key after another, each at whatever member answers it. In each
//! round the leader is sent the signal; the longest time between two acknowledgements around it is what the round took. Then
//! the member is started again, and the next round begins when it has caught up.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use mainstay_benches::served::{NAMES, Outcome, Served, Signal, exit_of, runtime};
use mainstay_server::proto::etcdserverpb::PutRequest;
use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use tonic::transport::{Channel, Endpoint};

/// As the server has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a writer waits for an answer before it asks another member.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// What a writer waits after a refusal.
const RETRY: Duration = Duration::from_millis(5);
/// Undisturbed load before each signal.
const CALM: Duration = Duration::from_secs(1);
/// How long after the signal a gap may end.
const WATCH: Duration = Duration::from_secs(4);

#[derive(Parser)]
struct Options {
    /// Where the volumes lie: a directory on the device to measure
    #[arg(long)]
    dir: PathBuf,
    /// Rounds with each signal
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Writers, each with one put under way
    #[arg(long, default_value_t = 64)]
    clients: usize,
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
        runtime()?.block_on(rounds(served, options))?;
    }
    Ok(())
}

async fn rounds(mut served: Served, options: &Options) -> Outcome<()> {
    served.leader().await?;
    let acknowledged = Arc::new(Acknowledged::default());
    let stop = Arc::new(AtomicBool::new(false));
    let channels: Arc<[Channel]> = (0..NAMES.len())
        .map(|at| {
            let uri = format!("http://127.0.0.1:{}", served.client_port(at));
            let endpoint = Endpoint::from_shared(uri)?.connect_timeout(ANSWER_MAX).timeout(ANSWER_MAX);
            Outcome::Ok(endpoint.tcp_nodelay(true).connect_lazy())
        })
        .collect::<Outcome<_>>()?;
    let next = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..options.clients)
        .map(|writer| {
            let (acknowledged, stop, channels, next) =
                (acknowledged.clone(), stop.clone(), channels.clone(), next.clone());
            let value = vec![b'v'; options.value_bytes];
            tokio::spawn(async move {
                let mut at = writer;
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("{:016}", next.fetch_add(1, Ordering::Relaxed)).into_bytes();
                    let request = PutRequest { key: key.into(), value: value.clone().into(), ..PutRequest::default() };
                    match KvClient::new(channels[at % NAMES.len()].clone()).put(request).await {
                        Ok(_) => acknowledged.one(),
                        Err(_) => {
                            acknowledged.refusals.fetch_add(1, Ordering::Relaxed);
                            at += 1;
                            tokio::time::sleep(RETRY).await;
                        }
                    }
                }
            })
        })
        .collect();
    for signal in [Signal::Kill, Signal::Terminate] {
        let mut gaps = Vec::new();
        for round in 0..options.rounds.max(1) {
            tokio::time::sleep(CALM).await;
            let leader = served.leader().await?;
            let refused = acknowledged.refusals.load(Ordering::Relaxed);
            acknowledged.arm();
            // Waits for the end of the process: nothing else may wait with it.
            let served_ref = &mut served;
            tokio::task::block_in_place(|| served_ref.stop(leader, signal))?;
            tokio::time::sleep(WATCH).await;
            let gap = acknowledged.longest_gap();
            let refused = acknowledged.refusals.load(Ordering::Relaxed) - refused;
            eprintln!(
                "{} {signal:?} round {}: {:.0} ms without an acknowledged write, {refused} refusals",
                served.name(),
                round + 1,
                gap.as_secs_f64() * 1e3
            );
            gaps.push(gap.as_secs_f64() * 1e3);
            served.restart(leader).await?;
        }
        gaps.sort_by(f64::total_cmp);
        let at = |quantile: f64| gaps[((gaps.len() - 1) as f64 * quantile).round() as usize];
        println!(
            "{:8} {:9} {} rounds  p50 {:5.0} ms  p90 {:5.0} ms  p99 {:5.0} ms  max {:5.0} ms",
            served.name(),
            if signal == Signal::Kill { "SIGKILL" } else { "SIGTERM" },
            gaps.len(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0)
        );
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await?;
    }
    Ok(())
}

/// When writes were acknowledged.
#[derive(Default)]
struct Acknowledged {
    times: Mutex<Times>,
    refusals: AtomicUsize,
}

#[derive(Default)]
struct Times {
    last: Option<Instant>,
    gap_max: Duration,
}

impl Acknowledged {
    fn one(&self) {
        let now = Instant::now();
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = times.last {
            times.gap_max = times.gap_max.max(now.saturating_duration_since(last));
        }
        times.last = Some(now);
    }

    fn arm(&self) {
        self.times.lock().unwrap_or_else(PoisonError::into_inner).gap_max = Duration::ZERO;
    }

    /// Since it was armed, with the time since the last.
    fn longest_gap(&self) -> Duration {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.gap_max.max(times.last.map(|last| last.elapsed()).unwrap_or_default())
    }
}
