//! Clients that write until they are stopped, and what a server holds of that in the end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::{PutRequest, RangeRequest};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use crate::{Cluster, Ledger, Server, until};

/// Keys of one client; each is written again and again.
const KEYS: u64 = 16;

/// What the clients of a test run on.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("tokio starts")
}

/// Clients that write through all servers until they are stopped, one write in flight each.
pub struct Load {
    /// What was tried and acknowledged.
    pub ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    last: Arc<Mutex<Gaps>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

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
    /// Starts `clients` against all servers of `cluster`.
    pub fn start(runtime: &Runtime, cluster: &Cluster, clients: u64) -> Self {
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

    /// Forgets the longest time without an acknowledgement.
    pub fn reset_gap(&self) {
        *self.last.lock().expect("no client panics") = Gaps::new();
    }

    /// The longest time without an acknowledgement since then.
    pub fn longest_gap(&self) -> Duration {
        self.last.lock().expect("no client panics").longest
    }

    /// Waits until `count` more writes are acknowledged.
    pub fn await_progress(&self, count: u64) {
        let before = self.ledger.acknowledged();
        until("writes are acknowledged again", || self.ledger.acknowledged() >= before + count);
    }

    /// Stops the clients, and gives what they were told.
    pub fn finish(self, runtime: &Runtime) -> Arc<Ledger> {
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
pub fn read_all(runtime: &Runtime, server: &Server) -> BTreeMap<Vec<u8>, u64> {
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

/// Compares what each of these servers holds with what was acknowledged, and with what the others hold.
pub fn assert_nothing_lost(runtime: &Runtime, servers: &[Server], ledger: &Ledger) {
    let mut states = Vec::new();
    for server in servers {
        let found = read_all(runtime, server);
        let wrong = ledger.differences(&found);
        assert!(wrong.is_empty(), "{} of {} writes: {wrong:#?}", server.name, ledger.acknowledged());
        states.push(found);
    }
    assert!(states.windows(2).all(|pair| pair[0] == pair[1]), "all servers hold the same");
}
