//! Runs seeds of the simulation: `mainstay-sim --seeds N [--start S] [--twice] [--verbose]`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mainstay_sim::world::{self, Fault, Summary};
use mainstay_sim::{crash_points, log_world, store_world};

/// A seed allocates and frees all the time: an eighth less processor time than with the system's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "\
usage: cargo xtask sim [--seeds N] [--start S] [--twice] [--jobs J] [--verbose] [--keep-going]
  --seeds N      how many seeds to run (1)
  --start S      the first of them (1)
  --twice        run each seed twice and compare the hashes of all polls and events
  --jobs J       seeds at a time (one for each processor)
  --verbose      print faults, starts and refusals with their virtual time; RUST_LOG adds what the code logs
  --keep-going   do not stop at the first seed that fails
  --log          run the log of one node alone instead of a cluster
  --store        run a store alone on one node instead of a cluster
  --crash-points  run a store alone, and open what a loss of power at each operation of its disks may leave
  --witness      the last of those that found the cluster holds no data; without this, in one seed of four
  --group        a group beside the first, born while things go wrong: not in seeds without this yet, docs/rfcs/0001-many-groups.md
  --sessions     a client puts pairs that expire; without this, in one seed of four
  --with FAULT   draw this fault in every seed
  --mutants      plant one bug after the other and run seeds until it is caught (`cargo xtask sim` builds what this needs)
  --mutant NAME  only this one
  --single-faults N  in place of the faults of a seed: N faults on disks, each alone and healed before the next, in worlds of 40
  --lying-disks  disks acknowledge what they do not keep: passes if at least one seed in four is found out
";

/// Faults of `--single-faults` that one world sees.
const SINGLE_FAULTS_PER_WORLD: u64 = 40;

/// Wall time after which a seed is taken for hanging.
const SEED_TIME_MAX: Duration = Duration::from_secs(300);

struct Args {
    seeds: u64,
    start: u64,
    twice: bool,
    jobs: u64,
    verbose: bool,
    keep_going: bool,
    lying: bool,
    log: bool,
    store: bool,
    crash_points: bool,
    /// In each world.
    single_faults: u64,
    witness: bool,
    group: bool,
    sessions: bool,
    with: Vec<Fault>,
    mutants: bool,
    mutant: Option<String>,
}

fn main() -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(e) => {
            eprintln!("{e}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if args.verbose {
        // The order of lines is the order of events only with one seed at a time.
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .without_time()
            .init();
    }
    let began = Instant::now();
    if args.mutants {
        return mutants(&args);
    }
    println!("seeds {}..{}", args.start, args.start + args.seeds);
    if args.log || args.store || args.crash_points {
        return alone(&args);
    }
    let (passed, failed, totals) = run(&args);
    let wall = began.elapsed().as_secs_f64();
    println!("{totals}");
    if args.lying {
        // Not every run loses power at a moment when the lie matters.
        let found_out = failed * 4 >= args.seeds && failed > 0;
        println!("{failed} of {} seeds found the lie", args.seeds);
        println!("{} seeds passed, {} failed, {wall:.1} s", u64::from(found_out), u64::from(!found_out));
        return if found_out { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    println!("{passed} seeds passed, {failed} failed, {wall:.1} s");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(not(mainstay_mutants))]
fn mutants(_: &Args) -> ExitCode {
    eprintln!("this build has no planted bugs: use `cargo xtask sim --mutants`");
    ExitCode::from(2)
}

/// Plants one bug after the other.
#[cfg(mainstay_mutants)]
fn mutants(args: &Args) -> ExitCode {
    let (jobs, mutant) = (args.jobs, args.mutant.clone());
    let seeds = (args.seeds > 1).then_some(args.start..args.start + args.seeds);
    if mainstay_sim::mutants::hunt(seeds, jobs, mutant.as_deref(), SEED_TIME_MAX) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Lives of a log or a store in one seed.
const LIVES: u64 = 30;

/// Runs the log or the store of one node, or its crash points.
fn alone(args: &Args) -> ExitCode {
    let what = match (args.log, args.store) {
        (true, _) => "--log",
        (_, true) => "--store",
        _ => "--crash-points",
    };
    let (mut failed, mut done) = (0, 0);
    for seed in args.start..args.start + args.seeds {
        let run = || {
            if args.log {
                return log_world::run(seed, LIVES, args.lying).map(|records| (format!("records={records}"), records));
            }
            if args.crash_points {
                let effort = crash_points::Effort { jobs: args.jobs as usize, ..crash_points::Effort::LONG };
                return crash_points::run(seed, effort).map(|counts| (format!("{counts:?}"), counts.compared));
            }
            store_world::run(seed, LIVES, args.lying).map(|counts| (format!("{counts:?}"), counts.trace))
        };
        let result = run().and_then(|(text, trace)| {
            if args.twice && run()?.1 != trace {
                return Err("two runs differ".to_owned());
            }
            Ok(text)
        });
        done += 1;
        match result {
            Ok(text) => println!("seed {seed} {text}"),
            Err(e) => {
                failed += 1;
                println!("seed {seed} FAILED\n  {e}\n  replay: cargo xtask sim {what} --seeds 1 --start {seed}");
                if !args.keep_going {
                    break;
                }
            }
        }
    }
    println!("{} seeds passed, {failed} failed", done - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse() -> Result<Args, String> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let mut args = Args {
        seeds: 1,
        start: 1,
        twice: false,
        jobs: processors,
        verbose: false,
        keep_going: false,
        lying: false,
        log: false,
        store: false,
        crash_points: false,
        single_faults: 0,
        witness: false,
        group: false,
        sessions: false,
        with: Vec::new(),
        mutants: false,
        mutant: None,
    };
    let mut given = std::env::args().skip(1);
    while let Some(arg) = given.next() {
        let mut number = || -> Result<u64, String> {
            let text = given.next().ok_or(format!("{arg} takes a number"))?;
            text.parse().map_err(|_| format!("{arg} takes a number and not `{text}`"))
        };
        match arg.as_str() {
            "--seeds" => args.seeds = number()?,
            "--start" => args.start = number()?,
            "--jobs" => args.jobs = number()?.max(1),
            "--twice" => args.twice = true,
            "--verbose" => args.verbose = true,
            "--keep-going" => args.keep_going = true,
            "--store" => args.store = true,
            "--crash-points" => args.crash_points = true,
            "--witness" => args.witness = true,
            "--group" => args.group = true,
            "--sessions" => args.sessions = true,
            "--with" => {
                let name = given.next().unwrap_or_default();
                let fault = Fault::ALL.into_iter().find(|fault| fault.name() == name);
                let names = || Fault::ALL.map(Fault::name).join(", ");
                args.with.push(fault.ok_or_else(|| format!("--with takes one of {}", names()))?);
            }
            "--mutants" => args.mutants = true,
            "--mutant" => (args.mutants, args.mutant) = (true, given.next()),
            "--log" => args.log = true,
            "--single-faults" => {
                let faults = number()?.max(1);
                args.single_faults = faults.min(SINGLE_FAULTS_PER_WORLD);
                args.seeds = faults.div_ceil(SINGLE_FAULTS_PER_WORLD);
            }
            "--lying-disks" => (args.lying, args.keep_going) = (true, true),
            "--help" | "-h" => return Err("runs whole clusters, each from one seed".to_owned()),
            other => return Err(format!("unknown argument `{other}`")),
        }
    }
    if args.verbose {
        args.jobs = 1;
    }
    Ok(args)
}

/// Sums over all seeds.
#[derive(Default)]
struct Totals {
    virtual_time: Duration,
    polls: u64,
    faults: BTreeMap<&'static str, u64>,
    crashes: u64,
    elections: u64,
    history: u64,
    counts: BTreeMap<&'static str, u64>,
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { virtual_time, polls, faults, crashes, elections, history, counts } = self;
        write!(
            f,
            "total: {:.2} h of virtual time, {polls} polls, {} faults, {crashes} crashes, {elections} elections, \
             {history} operations judged\n  faults: {}\n  operations: {}",
            virtual_time.as_secs_f64() / 3600.0,
            faults.values().sum::<u64>(),
            listed(faults),
            listed(counts)
        )
    }
}

fn listed(counts: &BTreeMap<&'static str, u64>) -> String {
    counts.iter().map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", ")
}

impl Totals {
    fn add(&mut self, summary: &Summary) {
        self.virtual_time += summary.time;
        self.polls += summary.polls;
        for (fault, count) in &summary.faults {
            *self.faults.entry(fault).or_default() += count;
        }
        self.crashes += summary.crashes();
        self.elections += summary.elections;
        self.history += summary.history as u64;
        for (what, count) in &summary.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }
}

/// What came of one seed: one summary, or two if each runs twice.
type Verdict = (u64, Result<Vec<Summary>, String>, Duration);

fn run(args: &Args) -> (u64, u64, Totals) {
    let (done, verdicts) = mpsc::channel::<Verdict>();
    let mut running: BTreeMap<u64, Instant> = BTreeMap::new();
    let mut next = args.start;
    let end = args.start + args.seeds;
    let (mut passed, mut failed, mut totals) = (0, 0, Totals::default());
    loop {
        while next < end && (running.len() as u64) < args.jobs && (failed == 0 || args.keep_going) {
            if args.seeds == 1 || args.verbose {
                println!("seed {next}");
            }
            start(next, args, done.clone());
            running.insert(next, Instant::now());
            next += 1;
        }
        if running.is_empty() {
            return (passed, failed, totals);
        }
        let verdict = match verdicts.recv_timeout(Duration::from_secs(5)) {
            Ok(verdict) => verdict,
            Err(_) => {
                let Some((&seed, began)) = running.iter().find(|(_, began)| began.elapsed() > SEED_TIME_MAX) else {
                    continue;
                };
                (seed, Err(format!("no end after {SEED_TIME_MAX:?} of wall time")), began.elapsed())
            }
        };
        let (seed, result, wall) = verdict;
        running.remove(&seed);
        let problems = match &result {
            Err(e) => vec![e.clone()],
            Ok(runs) => {
                totals.add(&runs[0]);
                println!("seed {seed} {} wall={:.2}s", runs[0], wall.as_secs_f64());
                let mut problems = runs[0].problems.clone();
                if let Some(second) = runs.get(1).filter(|second| second.trace != runs[0].trace) {
                    let (a, b) = (runs[0].trace, second.trace);
                    problems.push(format!("two runs differ: trace {a:016x} and {b:016x}"));
                }
                problems
            }
        };
        if problems.is_empty() {
            passed += 1;
            continue;
        }
        failed += 1;
        if args.lying {
            println!("seed {seed} found the lie: {}", problems.first().map_or("", String::as_str));
            continue;
        }
        println!("seed {seed} FAILED");
        for problem in problems.iter().take(20) {
            println!("  {problem}");
        }
        let what = match args.single_faults {
            0 => "--seeds 1".to_owned(),
            faults => format!("--single-faults {faults}"),
        };
        let witness = if args.witness { " --witness" } else { "" };
        let group = if args.group { " --group" } else { "" };
        let sessions = if args.sessions { " --sessions" } else { "" };
        let twice = if args.twice { " --twice" } else { "" };
        println!("  replay: cargo xtask sim {what} --start {seed}{witness}{group}{sessions}{twice} --verbose");
    }
}

/// Runs a seed on a thread of its own, so that nothing of another seed is left in thread-locals.
fn start(seed: u64, args: &Args, done: mpsc::Sender<Verdict>) {
    let (runs, verbose, lying) = (1 + usize::from(args.twice), args.verbose, args.lying);
    let (with, single_faults, witness) = (args.with.clone(), args.single_faults, args.witness.then_some(true));
    let (group, sessions) = (args.group, args.sessions);
    let began = Instant::now();
    let one = move || {
        (0..runs)
            .map(|_| {
                let with = with.clone();
                let life = move || {
                    world::run(seed, |settings| {
                        settings.with = with;
                        settings.witness = witness;
                        settings.group = group;
                        settings.sessions |= sessions;
                        settings.verbose = verbose;
                        settings.lying_disks = lying;
                        if single_faults > 0 {
                            settings.with_single_faults(single_faults);
                        }
                    })
                };
                let thread = std::thread::Builder::new().name(format!("seed-{seed}")).stack_size(16 << 20).spawn(life);
                let thread = thread.map_err(|e| format!("no thread: {e}"))?;
                thread.join().map_err(|panic| {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text.or(panic.downcast_ref::<&str>().copied());
                    format!("panic: {}", text.unwrap_or("without a message"))
                })
            })
            .collect()
    };
    std::thread::spawn(move || {
        // The receiver is gone only when the process ends.
        let _ = done.send((seed, one(), began.elapsed()));
    });
}
