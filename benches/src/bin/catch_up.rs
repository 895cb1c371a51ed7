//! What a replica that was away moves to come back.
//!
//! `cargo run --release --bin catch_up -- --dir DIR` runs three replicas in one process, fills them, closes one, writes through the
//! others, and opens it again. It prints the bytes of tables that the one fetched beside those that were written while it was away
//! and those of the store, once for writes to a range of keys of their own and once for writes all over the store.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use mainstay::{Batch, Keyspace, Node, NodeOptions};
use mainstay_benches::served::{NAMES, Outcome, exit_of, free_ports, runtime};

/// As the server has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Bytes of a value.
const VALUE_BYTES: usize = 4096;
/// Values of one batch.
const BATCH: u64 = 64;
/// The one that goes away.
const AWAY: usize = 2;
/// Longer than it takes to come back.
const BACK_MAX: Duration = Duration::from_secs(600);

#[derive(Parser)]
struct Options {
    /// Where the volumes lie: a directory with room for five times the store
    #[arg(long)]
    dir: PathBuf,
    /// MiB of the store
    #[arg(long, default_value_t = 10 << 10)]
    store: u64,
    /// MiB that are written while one is away
    #[arg(long, default_value_t = 1 << 10)]
    away: u64,
}

fn main() -> std::process::ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { mainstay_server::allocator::configure() };
    let options = Options::parse();
    exit_of(runtime().and_then(|runtime| runtime.block_on(run(&options))))
}

/// Where the writes of an absence go.
#[derive(Clone, Copy, Debug)]
enum Spread {
    /// One behind the other, in a range that was written before.
    Range,
    /// Over all keys.
    Everywhere,
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
    let keys = (options.store << 20) / VALUE_BYTES as u64;
    let began = Instant::now();
    write(&nodes[0], 0, &mut (0..keys)).await?;
    println!("filled: {} MiB in {:.0} s", options.store, began.elapsed().as_secs_f64());
    let changes = (options.away << 20) / VALUE_BYTES as u64;
    for (round, spread) in [(1, Spread::Range), (2, Spread::Everywhere)] {
        settle(&nodes).await;
        nodes[AWAY].close().await?;
        nodes.truncate(AWAY);
        let written = changes.min(keys);
        match spread {
            Spread::Range => write(&nodes[0], round, &mut (0..written)).await?,
            // A step that has no factor in common with the count of keys meets each once.
            Spread::Everywhere => write(&nodes[0], round, &mut (0..written).map(|n| n * 7919 % keys)).await?,
        }
        settle(&nodes).await;
        let began = Instant::now();
        nodes.push(open(folder.path(), AWAY, &addresses).await?);
        let last = nodes[0].status().committed;
        while nodes[AWAY].status().group.applied < last {
            if began.elapsed() > BACK_MAX {
                return Err(format!("it is not back after {BACK_MAX:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let back = began.elapsed().as_secs_f64();
        let status = nodes[AWAY].status();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (fetched, store) = (mib(status.fetched_bytes), mib(status.group.table_bytes));
        let away = mib(written * VALUE_BYTES as u64);
        println!(
            "{:10} away for {away:.0} MiB of a store of {store:.0} MiB: fetched {fetched:.0} MiB, {:.2} of what was written, {:.0} % of the store, back in {back:.1} s",
            format!("{spread:?}"),
            fetched / away,
            100.0 * fetched / store,
        );
    }
    for node in &nodes {
        node.close().await?;
    }
    Ok(())
}

async fn open(folder: &Path, at: usize, addresses: &[String]) -> Outcome<Node> {
    let mut options = NodeOptions::new(NAMES[at], folder.join(NAMES[at])).listen(&addresses[at]);
    for (name, address) in NAMES.iter().zip(addresses) {
        options = options.peer(*name, address);
    }
    Ok(Node::start(options).await?)
}

/// Writes the keys of these numbers in batches, some at a time.
async fn write(node: &Node, round: u64, numbers: &mut dyn Iterator<Item = u64>) -> Outcome<()> {
    let store = node.store();
    let keyspace: Keyspace = store.keyspace_async("data").await?;
    let mut under_way = tokio::task::JoinSet::new();
    let mut numbers = numbers.peekable();
    while numbers.peek().is_some() {
        let mut batch = Batch::new();
        for number in numbers.by_ref().take(BATCH as usize) {
            batch.insert(&keyspace, number.to_be_bytes(), noise(number ^ (round << 48)));
        }
        if under_way.len() >= 16
            && let Some(done) = under_way.join_next().await
        {
            done??;
        }
        let store = store.clone();
        under_way.spawn(async move { store.commit_async(batch).await.map(|_| ()) });
    }
    while let Some(done) = under_way.join_next().await {
        done??;
    }
    Ok(())
}

/// Bytes that do not compress.
fn noise(seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(VALUE_BYTES);
    while bytes.len() < VALUE_BYTES {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes
}

/// Waits until all have applied the same and no compaction is outstanding.
async fn settle(nodes: &[Node]) {
    let mut before = Vec::new();
    loop {
        let now: Vec<_> = nodes
            .iter()
            .map(|node| node.status())
            .map(|s| (s.group.applied, s.group.flushed, s.group.table_bytes, s.group.absent_jobs))
            .collect();
        if now == before && now.iter().all(|state| state.0 == now[0].0) {
            return;
        }
        before = now;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}
