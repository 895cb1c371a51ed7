//! `mainstay bench`: the same requests over the etcd API against this server or against etcd.
//!
//! At a fixed rate a latency counts from the moment the operation was due, so that a stalled server does not hide the
//! operations that had to wait for it (coordinated omission).

mod unary;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tonic::codegen::http::HeaderValue;

use self::unary::Connection;
use crate::cli::{BenchArgs, Failure, Workload, print};
use crate::etcd::DURABILITY_KEY;
use crate::proto::etcdserverpb::{PutRequest, PutResponse, RangeRequest, RangeResponse};

/// Longest latency that the histogram tells apart, in microseconds.
const LATENCY_US_MAX: u64 = 600_000_000;

/// What a run gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What was done.
    pub workload: String,
    /// Requests in flight.
    pub clients: u32,
    /// Bytes of a value.
    pub value_bytes: u64,
    /// Operations answered.
    pub ops: u64,
    /// Operations refused or unanswered.
    pub errors: u64,
    /// The first refusal.
    pub first_error: Option<String>,
    /// Time of the run.
    pub seconds: f64,
    /// Answered operations a second.
    pub ops_per_second: f64,
    /// Latencies in milliseconds.
    pub mean_ms: f64,
    /// See `mean_ms`.
    pub p50_ms: f64,
    /// See `mean_ms`.
    pub p90_ms: f64,
    /// See `mean_ms`.
    pub p99_ms: f64,
    /// See `mean_ms`.
    pub p999_ms: f64,
    /// See `mean_ms`.
    pub max_ms: f64,
}

impl Report {
    /// The figures of a run from the latencies of what was answered, of which `per_ms` units are a millisecond.
    pub fn new(
        workload: String,
        clients: u32,
        value_bytes: u64,
        seconds: f64,
        latencies: &Histogram<u64>,
        per_ms: f64,
    ) -> Self {
        let at = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / per_ms;
        Self {
            workload,
            clients,
            value_bytes,
            ops: latencies.len(),
            errors: 0,
            first_error: None,
            seconds,
            ops_per_second: latencies.len() as f64 / seconds,
            mean_ms: latencies.mean() / per_ms,
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms: latencies.max() as f64 / per_ms,
        }
    }

    fn text(&self) -> String {
        let first_error = self.first_error.as_deref().map(|e| format!("\nfirst error: {e}")).unwrap_or_default();
        format!(
            "{} with {} clients and {} byte values: {} ops in {:.1} s = {:.0} ops/s, {} errors\n\
             latency ms: mean {:.2}  p50 {:.2}  p90 {:.2}  p99 {:.2}  p99.9 {:.2}  max {:.2}{first_error}",
            self.workload,
            self.clients,
            self.value_bytes,
            self.ops,
            self.seconds,
            self.ops_per_second,
            self.errors,
            self.mean_ms,
            self.p50_ms,
            self.p90_ms,
            self.p99_ms,
            self.p999_ms,
            self.max_ms
        )
    }
}

struct Plan {
    workload: Workload,
    keys: u64,
    value: Bytes,
    serializable: bool,
    durability: Option<HeaderValue>,
    start: Instant,
    end: Option<Instant>,
    /// Between two operations of one client.
    interval: Option<Duration>,
    ops: u64,
    begun: AtomicU64,
}

struct Outcome {
    latencies: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
}

pub(crate) fn run(args: BenchArgs) -> Result<(), Failure> {
    let json = args.endpoints.json;
    let runtime = match args.threads {
        1 => tokio::runtime::Builder::new_current_thread().enable_all().build()?,
        threads => tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?,
    };
    let report = runtime.block_on(measure(args))?;
    print(json, &report, || report.text())?;
    match (report.ops, report.errors) {
        (0, _) => Err(Failure::other("no operation was answered")),
        _ => Ok(()),
    }
}

/// Runs the load and returns its figures.
///
/// # Errors
/// When no endpoint answers or an argument is out of range.
pub async fn measure(args: BenchArgs) -> Result<Report, Failure> {
    let clients = args.clients;
    let connections = args.connections.unwrap_or(clients.div_ceil(16)).clamp(1, clients);
    let addresses: Vec<&str> = args.endpoints.endpoints.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
    if addresses.is_empty() {
        return Err(Failure::usage("no endpoint given"));
    }
    let mut channels = Vec::new();
    for at in 0..connections as usize {
        let address = addresses[at % addresses.len()];
        channels.push(Connection::open(address, args.endpoints.timeout.0).await?);
    }
    let durability = args.durability.as_deref().map(str::parse).transpose();
    let durability = durability.map_err(|_| Failure::usage("durability is one of local, quorum, all"))?;
    let duration = args.duration.map(|span| span.0).or(args.ops.is_none().then_some(Duration::from_secs(10)));
    let interval = args.rate.map(|rate| Duration::from_secs_f64(f64::from(clients) / rate.max(1) as f64));
    let start = Instant::now();
    let plan = Arc::new(Plan {
        workload: args.workload,
        keys: args.keys,
        value: value(args.value.0)?,
        serializable: args.serializable,
        durability,
        start,
        end: duration.map(|duration| start + duration),
        interval,
        ops: args.ops.unwrap_or(u64::MAX),
        begun: AtomicU64::new(0),
    });
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let channel = channels[client as usize % channels.len()].clone();
            tokio::spawn(drive(plan.clone(), channel, client, clients))
        })
        .collect();
    let mut all = outcome()?;
    for task in tasks {
        let one = task.await.map_err(|e| Failure::other(format!("a client failed: {e}")))??;
        all.latencies.add(&one.latencies).map_err(|e| Failure::other(e.to_string()))?;
        all.errors += one.errors;
        all.first_error = all.first_error.or(one.first_error);
    }
    let seconds = start.elapsed().as_secs_f64();
    let workload = format!("{:?}", plan.workload).to_lowercase();
    let report = Report::new(workload, clients, args.value.0, seconds, &all.latencies, 1e3);
    Ok(Report { errors: all.errors, first_error: all.first_error, ..report })
}

fn outcome() -> Result<Outcome, Failure> {
    let latencies = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).map_err(|e| Failure::other(e.to_string()))?;
    Ok(Outcome { latencies, errors: 0, first_error: None })
}

/// A value that does not compress to nothing.
fn value(bytes: u64) -> Result<Bytes, Failure> {
    if bytes > 16 << 20 {
        return Err(Failure::usage(format!("a value has at most 16 MiB value={bytes}")));
    }
    let mut random = Numbers(0x9e37_79b9_7f4a_7c15);
    Ok((0..bytes).map(|_| b' ' + (random.next() % 95) as u8).collect())
}

/// Splitmix64: the same numbers in every run.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

async fn drive(plan: Arc<Plan>, mut connection: Connection, client: u32, clients: u32) -> Result<Outcome, Failure> {
    let metadata: Vec<_> = plan.durability.iter().map(|level| (DURABILITY_KEY, level.clone())).collect();
    let put = connection.method("/etcdserverpb.KV/Put", &metadata)?;
    let range = connection.method("/etcdserverpb.KV/Range", &[])?;
    let mut numbers = Numbers(u64::from(client));
    let mut outcome = outcome()?;
    // Clients begin spread over one interval.
    let mut due = plan.start + plan.interval.unwrap_or_default() * client / clients;
    loop {
        let mut begin = Instant::now();
        if let Some(interval) = plan.interval {
            if begin < due {
                tokio::time::sleep_until(due.into()).await;
            }
            begin = due;
            due += interval;
        }
        if plan.end.is_some_and(|end| Instant::now() >= end) || plan.begun.fetch_add(1, Ordering::Relaxed) >= plan.ops {
            return Ok(outcome);
        }
        let number = numbers.next();
        let key = Bytes::from(format!("bench/{:016}", number % plan.keys));
        let is_put = match plan.workload {
            Workload::Put => true,
            Workload::Get => false,
            Workload::Mixed => (number >> 60) < 4,
        };
        let answered = if is_put {
            let request = PutRequest { key, value: plan.value.clone(), ..PutRequest::default() };
            connection.call::<PutResponse>(&put, &request).await.map(drop)
        } else {
            let request = RangeRequest { key, serializable: plan.serializable, ..RangeRequest::default() };
            connection.call::<RangeResponse>(&range, &request).await.map(drop)
        };
        match answered {
            Ok(()) => {
                let micros = u64::try_from(begin.elapsed().as_micros()).unwrap_or(LATENCY_US_MAX);
                outcome.latencies.saturating_record(micros.max(1));
            }
            Err(error) => {
                outcome.errors += 1;
                outcome.first_error.get_or_insert(error);
                // A server that is gone refuses at once: do not spin.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}
