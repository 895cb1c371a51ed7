//! Three real processes under load: killed, stopped, refused, restarted. What was acknowledged is there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::{PutRequest, RangeRequest};
use mainstay_tests::{Cluster, Ledger, Server};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// Keys of one client; each is written again and again.
const KEYS: u64 = 16;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("tokio starts")
}

/// Clients that write through all servers until they are stopped, one write in flight each.
struct Load {
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    last: Arc<Mutex<Gaps>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

use std::sync::Mutex;

/// When something was acknowledged last, and the longest time without.
struct Gaps {
    last: Instant,
    longest: Duration,
}

impl Gaps {
    fn new() -> Self {
        Self { last: Instant::now(), longest: Duration::ZERO }
    }

    fn acknowledged(&mut self) {
        self.longest = self.longest.max(self.last.elapsed());
        self.last = Instant::now();
    }
}

impl Load {
    fn start(runtime: &Runtime, cluster: &Cluster, clients: u64) -> Self {
        let (ledger, stop) = (Arc::new(Ledger::default()), Arc::new(AtomicBool::new(false)));
        let last = Arc::new(Mutex::new(Gaps::new()));
        let _guard = runtime.enter();
        let channels: Vec<_> = cluster.servers.iter().map(Server::channel).collect();
        let tasks = (0..clients)
            .map(|client| {
                let (ledger, stop, last, channels) = (ledger.clone(), stop.clone(), last.clone(), channels.clone());
                runtime.spawn(write_until(client, channels, ledger, stop, last))
            })
            .collect();
        Self { ledger, stop, last, tasks }
    }

    fn reset_gap(&self) {
        *self.last.lock().expect("no client panics") = Gaps::new();
    }

    fn longest_gap(&self) -> Duration {
        self.last.lock().expect("no client panics").longest
    }

    /// Waits until something that began after now is acknowledged.
    fn await_progress(&self, count: u64) {
        let before = self.ledger.acknowledged();
        mainstay_tests::until("writes are acknowledged again", || self.ledger.acknowledged() >= before + count);
    }

    fn finish(self, runtime: &Runtime) -> Arc<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            runtime.block_on(task).expect("a client does not panic");
        }
        self.ledger
    }
}

async fn write_until(
    client: u64,
    channels: Vec<Channel>,
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    last: Arc<Mutex<Gaps>>,
) {
    let mut at = client as usize;
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let key = format!("load/{client:03}/{:03}", n % KEYS).into_bytes();
        let value = ledger.attempt(&key);
        let request = PutRequest { key: key.clone().into(), value: value.to_string().into(), ..Default::default() };
        match KvClient::new(channels[at % channels.len()].clone()).put(request).await {
            Ok(_) => {
                ledger.acknowledge(&key, value);
                last.lock().expect("no client panics").acknowledged();
            }
            // The outcome is unknown, or it was refused: the ledger allows both. Another server is asked next.
            Err(_) => {
                at += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

/// Everything below `load/` as one server has it, after it has caught up with all that was acknowledged before.
fn read_all(runtime: &Runtime, server: &Server) -> BTreeMap<Vec<u8>, u64> {
    let began = Instant::now();
    loop {
        let mut client = {
            let _guard = runtime.enter();
            KvClient::new(server.channel())
        };
        // A linearizable read on this very server: it waits for the leader's commit index to be applied here.
        let request =
            RangeRequest { key: b"load/".to_vec().into(), range_end: b"load0".to_vec().into(), ..Default::default() };
        match runtime.block_on(client.range(request)) {
            Ok(response) => {
                let pairs = response.into_inner().kvs;
                let number = |value: &[u8]| std::str::from_utf8(value).ok()?.parse().ok();
                return pairs
                    .iter()
                    .map(|pair| (pair.key.to_vec(), number(&pair.value).expect("clients write numbers")))
                    .collect();
            }
            Err(status) => assert!(began.elapsed() < Duration::from_secs(60), "{}: {status}", server.name),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn assert_nothing_lost(runtime: &Runtime, cluster: &Cluster, ledger: &Ledger) {
    assert_nothing_lost_on(runtime, &cluster.servers, ledger);
}

fn assert_nothing_lost_on(runtime: &Runtime, servers: &[Server], ledger: &Ledger) {
    let mut states = Vec::new();
    for server in servers {
        let found = read_all(runtime, server);
        let wrong = ledger.differences(&found);
        assert!(wrong.is_empty(), "{} of {} writes: {wrong:#?}", server.name, ledger.acknowledged());
        states.push(found);
    }
    assert!(states.windows(2).all(|pair| pair[0] == pair[1]), "all servers hold the same");
}

/// Rounds of `kill_rounds`; `MAINSTAY_KILL_ROUNDS` sets another count.
fn rounds(default: u64) -> u64 {
    std::env::var("MAINSTAY_KILL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(default)
}

/// SIGKILL of the leader, of a follower, of two, of all at once, round after round, under load. A process crash keeps what
/// the kernel has; the simulator covers the loss of power.
#[test]
fn kill_rounds_lose_no_acknowledged_write() {
    let runtime = runtime();
    let mut cluster = Cluster::start(&["--wal", "16MiB", "--memtable", "256KiB", "--memory", "64MiB"]);
    let load = Load::start(&runtime, &cluster, 8);
    load.await_progress(20);
    for round in 0..rounds(100) {
        let victims: Vec<usize> = match round % 5 {
            0 => vec![cluster.leader()],
            1 => vec![(round as usize) % 3],
            2 => vec![(cluster.leader() + 1) % 3],
            3 => vec![0, 1, 2],
            _ => vec![(round as usize + 1) % 3, (round as usize + 2) % 3],
        };
        victims.iter().for_each(|victim| cluster.servers[*victim].kill());
        victims.iter().for_each(|victim| cluster.servers[*victim].start());
        load.await_progress(10);
    }
    let ledger = load.finish(&runtime);
    assert_nothing_lost(&runtime, &cluster, &ledger);
    eprintln!("{} writes acknowledged, 0 lost", ledger.acknowledged());
}

/// Two with data and a witness, each of them killed in turn, and all at once: any two go on, and any acknowledged write is on both
/// that hold data in the end. Clients write through all three and read from two.
#[test]
fn two_replicas_and_a_witness_lose_nothing() {
    let runtime = runtime();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let small = ["--wal", "16MiB", "--memtable", "256KiB", "--memory", "64MiB"];
    let mut cluster = Cluster::describe(folder, &["a", "b", "w"], &small);
    const WITNESS: usize = 2;
    cluster.servers[WITNESS].arguments(["--witness"]);
    cluster.servers.iter_mut().for_each(Server::start);
    cluster.init();
    let load = Load::start(&runtime, &cluster, 6);
    load.await_progress(20);
    for round in 0..rounds(20) {
        let victims: Vec<usize> = match round % 4 {
            0 => vec![cluster.leader_among(&[0, 1])],
            1 => vec![WITNESS],
            2 => vec![(round as usize / 4) % 2],
            _ => vec![0, 1, WITNESS],
        };
        victims.iter().for_each(|victim| cluster.servers[*victim].kill());
        if victims.len() == 1 {
            load.await_progress(10);
        }
        victims.iter().for_each(|victim| cluster.servers[*victim].start());
        load.await_progress(10);
    }
    let ledger = load.finish(&runtime);
    assert_nothing_lost_on(&runtime, &cluster.servers[..WITNESS], &ledger);
    let witness = &cluster.servers[WITNESS];
    let mut client = {
        let _guard = runtime.enter();
        KvClient::new(witness.channel())
    };
    let request = RangeRequest { key: b"load/".to_vec().into(), ..Default::default() };
    let refused = runtime.block_on(client.range(request)).expect_err("it holds no data");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    let output = witness.run(&["status", "--admin", &witness.admin]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = told.lines().find(|line| line.contains(" w id=")).unwrap_or_default();
    assert!(line.contains("witness"), "{told}");
}

/// A minority is dead for good: reads and writes go on.
#[test]
fn a_dead_minority_stops_nobody() {
    let runtime = runtime();
    let mut cluster = Cluster::start(&["--wal", "16MiB", "--memory", "64MiB"]);
    let load = Load::start(&runtime, &cluster, 4);
    for dead in 0..3 {
        cluster.servers[dead].kill();
        load.await_progress(50);
        let living = &cluster.servers[(dead + 1) % 3];
        assert!(!read_all(&runtime, living).is_empty(), "a living server reads");
        cluster.servers[dead].start();
        load.await_progress(10);
        let back = cluster.servers.iter().all(|server| !read_all(&runtime, server).is_empty());
        assert!(back, "all read again");
    }
    let ledger = load.finish(&runtime);
    assert_nothing_lost(&runtime, &cluster, &ledger);
}

/// SIGTERM of the leader: leadership is handed over first, the process ends with status 0, nothing is lost.
#[test]
fn a_stopped_leader_hands_over_and_ends_cleanly() {
    let runtime = runtime();
    let mut cluster = Cluster::start(&["--wal", "16MiB", "--memory", "64MiB"]);
    let load = Load::start(&runtime, &cluster, 4);
    load.await_progress(50);
    for _ in 0..3 {
        let leader = cluster.leader();
        load.reset_gap();
        assert!(cluster.servers[leader].stop(), "the leader ends with status 0");
        load.await_progress(20);
        eprintln!("without an acknowledged write for {:?}", load.longest_gap());
        assert_ne!(cluster.leader(), leader, "another leads");
        cluster.servers[leader].start();
        load.await_progress(10);
    }
    let ledger = load.finish(&runtime);
    assert_nothing_lost(&runtime, &cluster, &ledger);
}

/// Without a quorum nothing is acknowledged, and nothing ends: when the others are back, it goes on.
#[test]
fn a_minority_acknowledges_nothing() {
    let runtime = runtime();
    let mut cluster = Cluster::start(&["--wal", "16MiB", "--memory", "64MiB"]);
    let acknowledged = AtomicU64::new(0);
    let put = |server: &Server| {
        let mut client = {
            let _guard = runtime.enter();
            KvClient::new(server.channel())
        };
        let request = PutRequest { key: b"k".to_vec().into(), value: b"v".to_vec().into(), ..Default::default() };
        let answer = runtime.block_on(client.put(request));
        acknowledged.fetch_add(u64::from(answer.is_ok()), Ordering::Relaxed);
        answer
    };
    mainstay_tests::until("the cluster takes writes", || put(&cluster.servers[0]).is_ok());
    cluster.servers[1].kill();
    cluster.servers[2].kill();
    let before = acknowledged.load(Ordering::Relaxed);
    for _ in 0..3 {
        assert!(put(&cluster.servers[0]).is_err(), "one of three takes no write");
    }
    assert_eq!(acknowledged.load(Ordering::Relaxed), before);
    assert!(cluster.servers[0].runs(), "the process stays up");
    cluster.servers[1].start();
    mainstay_tests::until("two of three take writes", || put(&cluster.servers[0]).is_ok());
}
