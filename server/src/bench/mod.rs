//! `mainstay bench`: loads over the etcd API against this server or against etcd, and against the library in this process.
//!
//! At a fixed rate a latency counts from the moment the operation was due, so that a stalled server does not hide the
//! operations that had to wait for it (coordinated omission).

mod draws;
mod drive;
mod html;
mod pace;
mod records;
mod report;
mod target;
mod unary;
mod ycsb;

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use clap::ValueEnum;
use mainstay::Store;

pub(crate) use self::draws::Numbers;
use self::drive::{Run, drive, read_back};
use self::records::{Book, VALUE_BYTES_MIN, Values};
use self::report::Recorder;
pub use self::report::{Interval, Load, Report, Row, Verified};
pub(crate) use self::report::{latencies, nanos};
use self::target::{Embedded, Served, Started, Target};
use self::unary::Connection;
use self::ycsb::{Mix, Population, Source, mix};
use crate::cli::{BenchArgs, Failure, Workload, print};
use crate::etcd::parse_durability;

/// How long a run is that nothing else bounds.
const DURATION_DEFAULT: Duration = Duration::from_secs(10);

/// Written once after writes that were acknowledged before a majority had them: what it waits for is behind them in the log.
const BARRIER_KEY: &str = "bench-barrier";

pub(crate) fn run(args: BenchArgs) -> Result<(), Failure> {
    let (json, html) = (args.endpoints.json, args.html.clone());
    let runtime = match args.threads {
        1 => tokio::runtime::Builder::new_current_thread().enable_all().build()?,
        threads => tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?,
    };
    let report = runtime.block_on(measure(args))?;
    // First the figures: a page that cannot be written takes none of them.
    print(json, &report, || report.text())?;
    if let Some(path) = html {
        write_page(&path, &report)?;
    }
    match &report.verified {
        Some(verified) if !verified.is_sound() => {
            let Verified { missing, wrong, unread, .. } = verified;
            Err(Failure::other(format!(
                "what was written is not what was found missing={missing} wrong={wrong} unread={unread}"
            )))
        }
        _ if report.ops == 0 => Err(Failure::other("no operation was answered")),
        _ => Ok(()),
    }
}

fn write_page(path: &Path, report: &Report) -> Result<(), Failure> {
    let written = std::fs::write(path, html::page(report));
    written.map_err(|e| Failure::other(format!("the page cannot be written: {e} path={}", path.display())))
}

/// Runs the load and returns its figures.
///
/// # Errors
/// When no endpoint answers or an argument is out of range.
pub async fn measure(args: BenchArgs) -> Result<Report, Failure> {
    let plan = Plan::new(&args)?;
    match &args.embedded {
        Some(path) => embedded(&args, plan, path).await,
        None => served(&args, plan).await,
    }
}

async fn embedded(args: &BenchArgs, plan: Plan, path: &Path) -> Result<Report, Failure> {
    if args.connections.is_some() {
        return Err(Failure::usage("--connections is for a server: --embedded has none"));
    }
    // The library would lay out a volume on it, if it looks blank.
    if std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()) {
        let message = format!("--embedded takes a directory: a device would be written over path={}", path.display());
        return Err(Failure::usage(message));
    }
    let levels: Vec<_> = plan.levels.iter().filter_map(|level| parse_durability(level)).collect();
    let (store, target) = Embedded::open(path, args.memory.0, args.wal.0, &levels).await?;
    let done = plan.carry_out(&|_, _| Ok(target.clone()), None).await;
    let closed = close(&store).await;
    let report = done?;
    closed?;
    Ok(Report { through: "embedded".to_owned(), ..report })
}

async fn close(store: &Store) -> Result<(), Failure> {
    Ok(store.close_async().await?)
}

async fn served(args: &BenchArgs, plan: Plan) -> Result<Report, Failure> {
    let connections = args.connections.unwrap_or(args.clients.div_ceil(16)).clamp(1, args.clients);
    let addresses: Vec<&str> = args.endpoints.endpoints.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
    if addresses.is_empty() {
        return Err(Failure::usage("no endpoint given"));
    }
    let mut channels = Vec::new();
    for at in 0..connections as usize {
        let address = addresses[at % addresses.len()];
        channels.push(Connection::open(address, args.endpoints.timeout.0).await?);
    }
    let connect = |client: u32, current: bool| {
        let channel = channels[client as usize % channels.len()].clone();
        Served::new(channel, &plan.levels, args.serializable && !current)
    };
    let barrier = match plan.needs_barrier() {
        true => Some(Served::new(channels[0].clone(), &["quorum".to_owned()], false)?),
        false => None,
    };
    Ok(Report { through: "served".to_owned(), ..plan.carry_out(&connect, barrier).await? })
}

/// What was asked for, checked.
struct Plan {
    workload: Workload,
    mix: Mix,
    /// Durabilities of writes, by name.
    levels: Vec<String>,
    clients: u32,
    recorders: usize,
    records: u64,
    load: bool,
    ops: Option<u64>,
    duration: Option<Duration>,
    rate: Option<u64>,
    value_bytes: u64,
    values: Arc<Values>,
    seed: u64,
    verify: bool,
    reads_are_current: bool,
}

impl Plan {
    fn new(args: &BenchArgs) -> Result<Self, Failure> {
        let unknown = args.durability.iter().find(|level| parse_durability(level).is_none());
        if let Some(level) = unknown {
            return Err(Failure::usage(format!("durability is one of local, quorum, all, site:NAME found='{level}'")));
        }
        if args.verify && args.value.0 < VALUE_BYTES_MIN as u64 {
            let message = format!("--verify needs values of at least {VALUE_BYTES_MIN} bytes value={}", args.value.0);
            return Err(Failure::usage(message));
        }
        let mut mix = mix(args.workload);
        mix.distribution = args.distribution.unwrap_or(mix.distribution);
        let fills = args.workload == Workload::Fill;
        // A fill ends with its records, all else after some time.
        let ops = if fills { Some(args.ops.unwrap_or(args.keys).min(args.keys)) } else { args.ops };
        let duration = args.duration.map(|span| span.0).or(ops.is_none().then_some(DURATION_DEFAULT));
        // A write at `local` is answered before others may read it.
        let awaited = !args.durability.iter().any(|level| level == "local");
        Ok(Self {
            workload: args.workload,
            mix,
            levels: args.durability.clone(),
            clients: args.clients,
            recorders: (2 * args.threads).min(args.clients as usize).max(1),
            records: args.keys,
            load: mix.loaded && !args.no_load,
            ops,
            duration,
            rate: args.rate,
            value_bytes: args.value.0,
            values: Arc::new(Values::new(args.value.0, run_number())?),
            seed: args.seed,
            verify: args.verify,
            reads_are_current: awaited && !args.serializable,
        })
    }

    /// What was acknowledged may not be committed yet when it is read back.
    fn needs_barrier(&self) -> bool {
        self.verify && self.levels.iter().any(|level| level == "local")
    }

    /// Loads, runs, and reads back, the last after a write through `barrier`. `connect` gives a client its way, which for reading back finds
    /// all that was acknowledged before.
    async fn carry_out<T: Target + 'static>(
        &self,
        connect: &impl Fn(u32, bool) -> Result<T, Failure>,
        barrier: Option<T>,
    ) -> Result<Report, Failure> {
        let fills = self.workload == Workload::Fill;
        let population = Arc::new(Population::new(if fills || self.load { 0 } else { self.records }));
        let book = self.verify.then(|| Arc::new(Book::new()));
        let prepare = |duration: Option<Duration>, rate: Option<u64>| {
            Arc::new(Run {
                values: self.values.clone(),
                population: population.clone(),
                book: book.clone(),
                reads_are_current: self.reads_are_current,
                end: duration,
                rate,
                clients: self.clients,
                recorders: (0..self.recorders).map(|_| Mutex::new(Recorder::new(duration))).collect(),
            })
        };
        let load = match self.load {
            true => {
                let run = prepare(None, None);
                let (recorder, seconds) = self.phase(&run, mix(Workload::Fill), Some(self.records), connect).await?;
                if recorder.errors > 0 {
                    let why = recorder.first_error.unwrap_or_default();
                    return Err(Failure::other(format!(
                        "the records cannot be loaded: {why} errors={}",
                        recorder.errors
                    )));
                }
                let records = recorder.all()?.len();
                Some(Load { records, seconds, ops_per_second: records as f64 / seconds.max(1e-9) })
            }
            false => None,
        };
        let run = prepare(self.duration, self.rate);
        let (mut recorder, seconds) = self.phase(&run, self.mix, self.ops, connect).await?;
        if let Some(mut barrier) = barrier {
            let write = barrier.write(BARRIER_KEY.into(), run.values.value(0, 0), 0).await;
            write.map_err(|e| Failure::other(format!("the writes cannot be read back: {e}")))?;
        }
        let verified = self.read_back(&run, connect).await?;
        let mut found = std::mem::take(&mut recorder.verified);
        let name = named(&self.workload);
        let report = recorder.report(name, self.clients, self.value_bytes, seconds, &self.levels)?;
        Ok(Report {
            records: self.records,
            distribution: named(&self.mix.distribution),
            seed: self.seed,
            rate: self.rate,
            load,
            verified: verified.map(|after| {
                found.add(after);
                found
            }),
            ..report
        })
    }

    fn targets<T>(&self, connect: &impl Fn(u32, bool) -> Result<T, Failure>, current: bool) -> Result<Vec<T>, Failure> {
        (0..self.clients).map(|client| connect(client, current)).collect()
    }

    /// Lets all clients do one thing to its end.
    async fn phase<T: Target + 'static>(
        &self,
        run: &Arc<Run>,
        mix: Mix,
        ops: Option<u64>,
        connect: &impl Fn(u32, bool) -> Result<T, Failure>,
    ) -> Result<(Recorder, f64), Failure> {
        let targets = self.targets(connect, false)?;
        let clock = Arc::new(Started::now());
        let tasks: Vec<_> = (0..self.clients)
            .zip(targets)
            .map(|(client, target)| {
                let source = Source::new(mix, self.levels.len(), self.seed, client);
                let ops = ops.map_or(u64::MAX, |ops| run.share(ops, client));
                tokio::spawn(drive(run.clone(), clock.clone(), target, source, client, ops))
            })
            .collect();
        for task in tasks {
            task.await.map_err(|e| Failure::other(format!("a client failed: {e}")))?;
        }
        let seconds = target::Clock::now(&*clock).as_secs_f64();
        let mut all = Recorder::new(run.end);
        for recorder in &run.recorders {
            let mut recorder = recorder.lock().unwrap_or_else(PoisonError::into_inner);
            all.add(std::mem::replace(&mut *recorder, Recorder::new(run.end)))?;
        }
        Ok((all, seconds))
    }

    async fn read_back<T: Target + 'static>(
        &self,
        run: &Arc<Run>,
        connect: &impl Fn(u32, bool) -> Result<T, Failure>,
    ) -> Result<Option<Verified>, Failure> {
        let Some(book) = &run.book else { return Ok(None) };
        let records = Arc::new(book.records());
        let targets = self.targets(connect, true)?;
        let clock = Arc::new(Started::now());
        let tasks: Vec<_> = (0..self.clients)
            .zip(targets)
            .map(|(client, target)| {
                tokio::spawn(read_back(run.clone(), clock.clone(), target, records.clone(), client))
            })
            .collect();
        let mut all = Verified::default();
        for task in tasks {
            all.add(task.await.map_err(|e| Failure::other(format!("a client failed: {e}")))?);
        }
        Ok(Some(all))
    }
}

/// The name that the command line has for it.
fn named(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// What tells the values of this run from those of others with the same seed.
fn run_number() -> u32 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    draws::scatter(since.as_nanos() as u64 ^ u64::from(std::process::id())) as u32
}
