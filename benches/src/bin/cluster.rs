//! The same puts on three replicas of Mainstay and on three members of etcd, on one disk, in turns.
//!
//! `cargo run --release --bin cluster -- --dir DIR` starts both clusters as processes of this machine on loopback, drives each by
//! the one gRPC client of `mainstay bench` at its leader, then drives three more replicas that embed the library, from tasks in
//! the leader's own process, and prints the ratios. etcd comes from the machine's packages (`apt-get install etcd-server`).
//! Without it only Mainstay's side is printed. CPU time is read from `/proc`, over all three processes of a side.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use mainstay::{Keyspace, Node, NodeOptions};
use mainstay_benches::served::{NAMES, Outcome, START_MAX, Served, end, exit_of, free_ports, log_file, runtime};
use mainstay_benches::work::{histogram, key, value};
use mainstay_server::bench::Report;

/// As the server has it; who embeds the library brings their own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KEYS: u64 = 100_000;

#[derive(Parser)]
struct Options {
    /// Where the volumes lie: a directory on the device to measure
    #[arg(long)]
    dir: PathBuf,
    /// Clients of each run
    #[arg(long, value_delimiter = ',', default_value = "64,256")]
    clients: Vec<u32>,
    /// Length of each run
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Rounds, in each of which every side takes its turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Connections that the clients share [default: one for each 16 clients]
    #[arg(long)]
    connections: Option<u32>,
    /// Threads on which each replica of every side serves (`worker-threads` of the server, the worker threads of tokio, GOMAXPROCS of
    /// etcd) [default: as many as each takes by itself]
    #[arg(long)]
    threads: Option<usize>,
    /// GOMAXPROCS of each etcd, where it is to have another number than `--threads`
    #[arg(long)]
    etcd_threads: Option<usize>,
    /// Bytes of a value
    #[arg(long, default_value_t = 256)]
    value_bytes: usize,
    /// Another build of the server to drive instead of this one
    #[arg(long)]
    mainstay: Option<PathBuf>,
    /// Only these sides: server, etcd, library
    #[arg(long, value_delimiter = ',', default_value = "server,etcd,library")]
    only: Vec<String>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { mainstay_server::allocator::configure() };
    // The same program is also the replicas that it starts.
    let result = match std::env::args().nth(1).as_deref() {
        Some("serve") => return mainstay_server::cli::main(),
        Some("library") => library_replica(),
        _ => run(Options::parse()),
    };
    exit_of(result)
}

/// As `mainstay bench` runs: on one thread.
fn client_runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn run(options: Options) -> Outcome<()> {
    let threads = [
        ("MAINSTAY_WORKER_THREADS", options.threads),
        ("TOKIO_WORKER_THREADS", options.threads),
        ("GOMAXPROCS", options.etcd_threads.or(options.threads)),
    ];
    for (name, threads) in threads {
        if let Some(threads) = threads {
            // SAFETY: no other thread runs yet. The replicas inherit it; the client of the server and of etcd has one thread.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
    let folder = tempfile::tempdir_in(&options.dir)?;
    let mut sides: Vec<Box<dyn Side>> = Vec::new();
    for side in &options.only {
        match side.as_str() {
            "server" => {
                sides.push(Box::new(Served::mainstay(&folder.path().join("server"), options.mainstay.as_deref())?))
            }
            "etcd" if !Served::has_etcd() => {
                eprintln!("etcd is not on this machine: its side is left out");
            }
            "etcd" => sides.push(Box::new(Served::etcd(&folder.path().join("etcd"))?)),
            "library" => sides.push(Box::new(Library::start(&folder.path().join("library"))?)),
            other => return Err(format!("no such side: {other}").into()),
        }
    }
    for &clients in &options.clients {
        let mut rows: Vec<Vec<Row>> = sides.iter().map(|_| Vec::new()).collect();
        for round in 0..options.rounds.max(1) {
            for (side, rows) in sides.iter_mut().zip(&mut rows) {
                let before = cpu_seconds(side.processes());
                let (report, client_seconds) = side.drive(clients, &options)?;
                let cpu = cpu_seconds(side.processes()) - before;
                let row = Row { report, cpu, client_seconds };
                eprintln!("round {} {}: {}", round + 1, side.name(), row.text());
                if options.json {
                    println!(
                        "{}",
                        serde_json::json!({ "side": side.name(), "cpu_seconds": cpu, "report": row.report })
                    );
                }
                rows.push(row);
            }
        }
        println!("{clients} clients, {} byte values, median of {} rounds", options.value_bytes, options.rounds.max(1));
        let medians: Vec<Row> = rows.into_iter().map(median).collect();
        let yardstick = sides.iter().position(|side| side.name() == "etcd");
        for (side, row) in sides.iter().zip(&medians) {
            let ratio = yardstick.map(|at| row.report.ops_per_second / medians[at].report.ops_per_second);
            let ratio = ratio.map(|ratio| format!("  {ratio:.2} x etcd")).unwrap_or_default();
            println!("  {:8} {}{ratio}", side.name(), row.text());
        }
    }
    Ok(())
}

/// One run of one side.
struct Row {
    report: Report,
    /// Of the three processes of the side.
    cpu: f64,
    /// Of the process that held the clients, where it is another.
    client_seconds: f64,
}

impl Row {
    fn text(&self) -> String {
        let micros = |seconds: f64| seconds * 1e6 / (self.report.ops.max(1)) as f64;
        format!(
            "{:8.0} puts/s  p50 {:6.2} ms  p99 {:6.2} ms  max {:7.2} ms  CPU of the replicas {:5.1} us a put, of the client {:4.1}  errors {}",
            self.report.ops_per_second,
            self.report.p50_ms,
            self.report.p99_ms,
            self.report.max_ms,
            micros(self.cpu),
            micros(self.client_seconds),
            self.report.errors
        )
    }
}

fn median(mut rows: Vec<Row>) -> Row {
    rows.sort_by(|a, b| a.report.ops_per_second.total_cmp(&b.report.ops_per_second));
    let middle = rows.len() / 2;
    rows.swap_remove(middle)
}

/// User and system time of the processes so far.
fn cpu_seconds<'a>(processes: impl Iterator<Item = &'a Child>) -> f64 {
    processes.map(|process| process_seconds(&process.id().to_string())).sum()
}

fn process_seconds(process: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // Fields 14 and 15, counted behind the name, which may hold spaces; in hundredths of a second (`USER_HZ`).
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}

trait Side {
    fn name(&self) -> &'static str;
    fn processes(&self) -> std::slice::Iter<'_, Child>;
    /// Runs the load; gives the report and the CPU time of the client.
    fn drive(&mut self, clients: u32, options: &Options) -> Outcome<(Report, f64)>;
}

impl Side for Served {
    fn name(&self) -> &'static str {
        Served::name(self)
    }

    fn processes(&self) -> std::slice::Iter<'_, Child> {
        Served::processes(self)
    }

    fn drive(&mut self, clients: u32, options: &Options) -> Outcome<(Report, f64)> {
        let before = process_seconds("self");
        let report: Outcome<Report> = client_runtime()?.block_on(async {
            let connections = options.connections.unwrap_or(clients.div_ceil(16));
            let (seconds, value) = (options.seconds, options.value_bytes);
            self.load(&format!(
                "--workload put --clients {clients} --connections {connections} --duration {seconds}s --value {value} --keys {KEYS}"
            ))
            .await
        });
        Ok((report?, process_seconds("self") - before))
    }
}

/// Three processes that embed the library.
struct Library {
    processes: Vec<Child>,
    lines: Vec<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Library {
    fn start(dir: &Path) -> Outcome<Self> {
        std::fs::create_dir_all(dir)?;
        let peers = free_ports(3)?;
        let list: Vec<String> = NAMES.iter().zip(&peers).map(|(n, p)| format!("{n}=127.0.0.1:{p}")).collect();
        let mut library = Self { processes: Vec::new(), lines: Vec::new() };
        for name in NAMES {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["library", name]).arg(dir.join(name)).args(&list);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log_file(dir, name)?);
            let mut process = command.spawn()?;
            let (stdin, stdout) = (process.stdin.take(), process.stdout.take());
            library.processes.push(process);
            let (Some(stdin), Some(stdout)) = (stdin, stdout) else { return Err("no pipes".into()) };
            library.lines.push((stdin, BufReader::new(stdout)));
        }
        for at in 0..NAMES.len() {
            library.ask(at, "started")?;
        }
        library.ask(0, "init")?;
        Ok(library)
    }

    fn ask(&mut self, at: usize, line: &str) -> Outcome<serde_json::Value> {
        let (stdin, stdout) = &mut self.lines[at];
        writeln!(stdin, "{line}")?;
        stdin.flush()?;
        let mut answer = String::new();
        stdout.read_line(&mut answer)?;
        let answer: serde_json::Value = serde_json::from_str(&answer)
            .map_err(|e| format!("replica {} of the library answered {answer:?}: {e}", NAMES[at]))?;
        match answer.get("error") {
            Some(error) => Err(error.to_string().into()),
            None => Ok(answer),
        }
    }
}

impl Side for Library {
    fn name(&self) -> &'static str {
        "library"
    }

    fn processes(&self) -> std::slice::Iter<'_, Child> {
        self.processes.iter()
    }

    fn drive(&mut self, clients: u32, options: &Options) -> Outcome<(Report, f64)> {
        let deadline = Instant::now() + START_MAX;
        loop {
            for at in 0..NAMES.len() {
                if self.ask(at, "leads")?["leads"] == true {
                    let line = format!("drive {clients} {} {}", options.seconds, options.value_bytes);
                    let answer = self.ask(at, &line)?;
                    return Ok((serde_json::from_value(answer)?, 0.0));
                }
            }
            if Instant::now() > deadline {
                return Err("the library's replicas have no leader".into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        end(&mut self.processes);
    }
}

/// `library NAME DIR NAME=ADDRESS...`: a replica in this process that obeys the lines of its standard input.
fn library_replica() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(2).collect();
    let [name, dir, peers @ ..] = &args[..] else { return Err("usage: library NAME DIR NAME=ADDRESS...".into()) };
    let runtime = runtime()?;
    let mut options = NodeOptions::new(name, dir);
    for peer in peers {
        let (peer, address) = peer.split_once('=').ok_or("a peer is NAME=ADDRESS")?;
        options = if peer == name { options.listen(address) } else { options.peer(peer, address) };
    }
    let node = runtime.block_on(Node::start(options))?;
    for line in std::io::stdin().lines() {
        let line = line?;
        let answer = runtime.block_on(obey(&node, &line));
        println!("{}", answer.unwrap_or_else(|e| serde_json::json!({ "error": e.to_string() })));
    }
    Ok(())
}

async fn obey(node: &Node, line: &str) -> Outcome<serde_json::Value> {
    match line.split(' ').collect::<Vec<_>>()[..] {
        ["started"] => Ok(serde_json::json!({})),
        ["init"] => {
            node.init(NAMES).await?;
            Ok(serde_json::json!({}))
        }
        ["leads"] => Ok(serde_json::json!({ "leads": node.is_leader() })),
        ["drive", clients, seconds, value_bytes] => {
            drive(node, clients.parse()?, Duration::from_secs(seconds.parse()?), value_bytes.parse()?).await
        }
        _ => Err(format!("unknown line: {line}").into()),
    }
}

async fn drive(node: &Node, clients: u32, time: Duration, value_bytes: usize) -> Outcome<serde_json::Value> {
    let keyspace: Keyspace = node.store().keyspace_async("bench").await?;
    let value: Arc<[u8]> = value(7, value_bytes).into();
    let start = Instant::now();
    let tasks: Vec<_> = (0..u64::from(clients))
        .map(|client| {
            let (keyspace, value) = (keyspace.clone(), value.clone());
            tokio::spawn(async move {
                let mut latencies = histogram();
                let mut number = client << 32;
                while start.elapsed() < time {
                    let at = Instant::now();
                    number += 1;
                    keyspace.insert_async(key(number % KEYS), &value).await?;
                    latencies.saturating_record(at.elapsed().as_nanos() as u64);
                }
                Outcome::Ok(latencies)
            })
        })
        .collect();
    let mut all = histogram();
    for task in tasks {
        all.add(task.await??)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let report = Report::new("put".into(), clients, value_bytes as u64, seconds, &all, 1e6);
    Ok(serde_json::to_value(report)?)
}
