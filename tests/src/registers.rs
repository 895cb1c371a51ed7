//! Clients that write and read registers through every server, and the judgement of what they saw.
//!
//! # Invariants
//! 1. Each value is written once, so the checker of the simulation ([`mainstay_sim::check`]) decides exactly whether the history is
//!    linearizable.
//! 2. An operation is stamped before its request is made and after its answer is there. A write without a good answer may
//!    have any outcome; a read without one says nothing.
//! 3. Beside the registers each client writes keys of its own once; those that were acknowledged are there at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::{PutRequest, RangeRequest, RangeResponse};
use mainstay_sim::check::{self, Action, Operation, Outcome};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::Channel;

use crate::server::{Server, until};

/// Registers that all clients share.
pub const REGISTERS: u64 = 8;
/// How long a client waits for an answer before it asks another server.
const PATIENCE: Duration = Duration::from_millis(800);
/// How long a server may take for its last answers, all faults mended.
const LAST_READS_MAX: Duration = Duration::from_secs(30);

/// How a register is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Confirmed by a quorum.
    Linearizable,
    /// Confirmed by the leader's lease: the same promise, on a bound of clocks.
    Lease,
}

/// What clients saw.
#[derive(Default)]
struct Shared {
    stamp: AtomicU64,
    value: AtomicU64,
    history: Mutex<Vec<Operation>>,
    /// Which server was asked for what, by the stamp of the invocation: for the report of a violation.
    asked: Mutex<BTreeMap<u64, String>>,
    channels: Vec<Channel>,
    inserted: Mutex<BTreeSet<String>>,
    writes: AtomicU64,
    reads: AtomicU64,
    unanswered: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn stamp(&self) -> u64 {
        self.stamp.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn record(&self, operation: Operation, asked: String) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(operation.invoked, asked);
        self.history.lock().unwrap_or_else(PoisonError::into_inner).push(operation);
    }

    async fn write(&self, server: usize, client: u64, register: u64) -> Option<u64> {
        let value = self.value.fetch_add(1, Ordering::Relaxed) + 1;
        let invoked = self.stamp();
        let request = PutRequest {
            key: key(register).into(),
            value: value.to_string().into_bytes().into(),
            ..Default::default()
        };
        let answer = tokio::time::timeout(PATIENCE, KvClient::new(self.channels[server].clone()).put(request)).await;
        let done = matches!(answer, Ok(Ok(_)));
        let outcome = if done { Outcome::Done(self.stamp()) } else { Outcome::Unknown };
        let operation = Operation { key: register, action: Action::Write(value), invoked, outcome, client };
        self.record(operation, format!("server {server}"));
        self.count(done, &self.writes);
        done.then_some(value)
    }

    /// The value read, if there was an answer.
    async fn read(&self, server: usize, client: u64, register: u64, level: Level) -> Option<Option<u64>> {
        let invoked = self.stamp();
        let answer =
            tokio::time::timeout(PATIENCE, range(&self.channels[server], key(register), Vec::new(), level)).await;
        let value = match answer {
            Ok(Ok(answer)) => Some(answer.kvs.first().map(|pair| number(&pair.value))),
            Ok(Err(_)) | Err(_) => None,
        };
        if let Some(value) = value {
            let outcome = Outcome::Done(self.stamp());
            let operation = Operation { key: register, action: Action::Read(value), invoked, outcome, client };
            self.record(operation, format!("server {server}, {level:?}"));
        }
        self.count(value.is_some(), &self.reads);
        value
    }

    async fn insert(&self, server: usize, name: String) -> bool {
        let request =
            PutRequest { key: name.clone().into_bytes().into(), value: vec![b'1'].into(), ..Default::default() };
        let answer = tokio::time::timeout(PATIENCE, KvClient::new(self.channels[server].clone()).put(request)).await;
        let done = matches!(answer, Ok(Ok(_)));
        if done {
            self.inserted.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
        }
        self.count(done, &self.writes);
        done
    }

    fn count(&self, done: bool, what: &AtomicU64) {
        if done { what } else { &self.unanswered }.fetch_add(1, Ordering::Relaxed);
    }

    /// One client, until it is told to stop. Its choices follow from its number.
    async fn work(self: Arc<Self>, client: u64) {
        let mut state = (client + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut below = move |bound: u64| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) % bound
        };
        for n in 0_u64.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let server = below(self.channels.len() as u64) as usize;
            let register = below(REGISTERS);
            let answered = match below(10) {
                0..4 => self.write(server, client, register).await.is_some(),
                4..7 => self.read(server, client, register, Level::Linearizable).await.is_some(),
                7..9 => self.read(server, client, register, Level::Lease).await.is_some(),
                _ => self.insert(server, format!("once/{client:03}/{n:06}")).await,
            };
            if !answered {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

fn key(register: u64) -> Vec<u8> {
    format!("register/{register}").into_bytes()
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("clients write numbers and nothing else")
}

async fn range(channel: &Channel, key: Vec<u8>, end: Vec<u8>, level: Level) -> Result<RangeResponse, Status> {
    let message = RangeRequest { key: key.into(), range_end: end.into(), ..Default::default() };
    let mut request = tonic::Request::new(message);
    if level == Level::Lease {
        request.metadata_mut().insert("mainstay-read-level", "lease".parse().expect("letters are metadata"));
    }
    Ok(KvClient::new(channel.clone()).range(request).await?.into_inner())
}

/// Clients at work.
pub struct Registers {
    shared: Arc<Shared>,
    runtime: Arc<Runtime>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    /// Number of the next client that a test is itself.
    next: AtomicU64,
}

impl Registers {
    /// Starts `clients` of them, one operation in flight each, every operation through a server chosen anew.
    pub fn start(servers: &[Server], clients: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = Arc::new(runtime.expect("tokio starts"));
        let _guard = runtime.enter();
        let channels = servers.iter().map(Server::channel).collect();
        let shared = Arc::new(Shared { channels, ..Shared::default() });
        let tasks = (0..clients).map(|client| runtime.spawn(shared.clone().work(client))).collect();
        Self { shared, runtime: runtime.clone(), tasks, next: AtomicU64::new(clients) }
    }

    /// Writes that were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// Waits until so many further writes are acknowledged; returns how long that took.
    pub fn await_progress(&self, count: u64) -> Duration {
        let (began, before) = (Instant::now(), self.acknowledged());
        until("writes are acknowledged", || self.acknowledged() >= before + count);
        began.elapsed()
    }

    /// Writes a register through one server, in the history. The value, if it was acknowledged.
    pub fn write(&self, server: usize, register: u64) -> Option<u64> {
        let client = self.next.fetch_add(1, Ordering::Relaxed);
        self.runtime.block_on(self.shared.write(server, client, register))
    }

    /// Begins reads of all registers at one server, in the history; [`Reads::answers`] waits for them.
    pub fn begin_reads(&self, server: usize, level: Level) -> Reads {
        let tasks = (0..REGISTERS).map(|register| {
            let shared = self.shared.clone();
            let client = self.next.fetch_add(1, Ordering::Relaxed);
            self.runtime.spawn(async move { shared.read(server, client, register, level).await })
        });
        Reads { runtime: self.runtime.clone(), tasks: tasks.collect() }
    }

    /// Ends the clients, reads everything through each server and judges. Returns a line for the test to print.
    ///
    /// # Panics
    /// When the history is not linearizable, an acknowledged write is not there, or a server does not answer.
    pub fn finish(self, servers: &[Server]) -> String {
        self.shared.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            self.runtime.block_on(task).expect("a client does not panic");
        }
        let shared = &self.shared;
        let inserted = shared.inserted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (i, (server, channel)) in servers.iter().zip(&shared.channels).enumerate() {
            let began = Instant::now();
            let client = self.next.fetch_add(1, Ordering::Relaxed);
            let read = |register| self.runtime.block_on(shared.read(i, client, register, Level::Linearizable));
            for register in 0..REGISTERS {
                while read(register).is_none() {
                    let waited = began.elapsed();
                    assert!(waited < LAST_READS_MAX, "{} does not answer after {waited:?}", server.name);
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            let all = loop {
                let scan = range(channel, b"once/".to_vec(), b"once0".to_vec(), Level::Linearizable);
                match self.runtime.block_on(scan) {
                    Ok(answer) => break answer,
                    Err(status) => assert!(began.elapsed() < LAST_READS_MAX, "{}: {status}", server.name),
                }
                std::thread::sleep(Duration::from_millis(50));
            };
            let found: BTreeMap<_, _> =
                all.kvs.iter().map(|pair| (String::from_utf8_lossy(&pair.key).into_owned(), ())).collect();
            let lost: Vec<_> = inserted.iter().filter(|name| !found.contains_key(*name)).collect();
            assert!(lost.is_empty(), "{} has lost acknowledged writes: {lost:?}", server.name);
        }
        let history = shared.history.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(violation) = check::check(&history) {
            let asked = shared.asked.lock().unwrap_or_else(PoisonError::into_inner);
            for operation in history.iter().filter(|operation| operation.key == violation.key) {
                eprintln!("{operation:?} {}", asked.get(&operation.invoked).map_or("", String::as_str));
            }
            panic!("not linearizable: {violation}");
        }
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        format!(
            "{} operations on registers are linearizable; {} writes acknowledged, {} of them to keys of their own, all there; \
             {} reads, {} operations without an answer",
            history.len(),
            count(&shared.writes),
            inserted.len(),
            count(&shared.reads),
            count(&shared.unanswered)
        )
    }
}

/// Reads under way.
pub struct Reads {
    runtime: Arc<Runtime>,
    tasks: Vec<tokio::task::JoinHandle<Option<Option<u64>>>>,
}

impl Reads {
    /// For each register the value read; `None` where there was no answer.
    pub fn answers(self) -> Vec<Option<Option<u64>>> {
        let Self { runtime, tasks } = self;
        tasks.into_iter().map(|task| runtime.block_on(task).expect("a read does not panic")).collect()
    }
}
