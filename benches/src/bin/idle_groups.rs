//! What groups cost that have nothing to do.
//!
//! `cargo run --release --bin idle_groups -- --dir DIR` runs three replicas in one process, makes groups beside the first, waits until
//! nothing is written any more, and prints for each number of groups the time of the processors and the voluntary switches of threads
//! that one of the three uses in a second. What the first group takes is in each line: the first line is that alone.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use mainstay::{Batch, Node, NodeOptions};
use mainstay_benches::served::{NAMES, Outcome, exit_of, free_ports, runtime};

/// As the server has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Longer than what the last write leaves to do: seals of the log, the tail of a flush, groups that go to rest.
const REST: Duration = Duration::from_secs(8);
/// The kernel counts processor time in these.
const TICKS_A_SECOND: f64 = 100.0;

#[derive(Parser)]
struct Options {
    /// Where the volumes lie
    #[arg(long)]
    dir: PathBuf,
    /// Groups beside the first, one measurement each, in rising order
    #[arg(long, value_delimiter = ',', default_values_t = [0, 10, 100])]
    groups: Vec<usize>,
    /// Seconds of one measurement
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

fn main() -> std::process::ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { mainstay_server::allocator::configure() };
    let options = Options::parse();
    exit_of(runtime().and_then(|runtime| runtime.block_on(run(&options))))
}

async fn run(options: &Options) -> Outcome<()> {
    let folder = tempfile::tempdir_in(&options.dir)?;
    let ports = free_ports(NAMES.len())?;
    let addresses: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let mut nodes = Vec::new();
    for at in 0..NAMES.len() {
        nodes.push(open(folder.path(), at, &addresses).await?);
    }
    nodes[0].init(NAMES).await?;
    let mut made = 0;
    for &groups in &options.groups {
        for number in made..groups {
            // Each through another, so that leaders are not all in one place.
            let store = nodes[number % NAMES.len()].create_group(&format!("group-{number}")).await?;
            let keyspace = store.keyspace_async("data").await?;
            let mut batch = Batch::new();
            batch.insert(&keyspace, b"key", b"value");
            store.commit_async(batch).await?;
        }
        made = made.max(groups);
        tokio::time::sleep(REST).await;
        measure(made, Duration::from_secs(options.seconds)).await?;
    }
    for node in &nodes {
        node.close().await?;
    }
    Ok(())
}

async fn measure(groups: usize, time: Duration) -> Outcome<()> {
    let (began, before) = (Instant::now(), used()?);
    tokio::time::sleep(time).await;
    let (seconds, after) = (began.elapsed().as_secs_f64(), used()?);
    let each = NAMES.len() as f64 * seconds;
    let millis = (after.0 - before.0) as f64 * 1000.0 / TICKS_A_SECOND / each;
    let wakes = (after.1 - before.1) as f64 / each;
    println!(
        "{groups:4} groups beside the first: {millis:7.2} ms of processor and {wakes:7.0} wakes a second a replica"
    );
    Ok(())
}

/// Processor time of this process in ticks of the kernel, and voluntary switches of its threads.
fn used() -> Outcome<(u64, u64)> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name of the program stands in parentheses and may hold blanks.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).ok_or("no such field of stat");
    let ticks = field(11)? + field(12)?;
    let mut switches = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        // A thread may end meanwhile.
        let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else { continue };
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        switches += line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or_default();
    }
    Ok((ticks, switches))
}

async fn open(folder: &Path, at: usize, addresses: &[String]) -> Outcome<Node> {
    let mut options = NodeOptions::new(NAMES[at], folder.join(NAMES[at])).listen(&addresses[at]);
    for (name, address) in NAMES.iter().zip(addresses) {
        options = options.peer(*name, address);
    }
    Ok(Node::start(options).await?)
}
