//! Three real processes with groups beside the first, and a keyspace that is placed on them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mainstay_server::proto::mainstay::v1 as pb;
use mainstay_tests::load::runtime;
use mainstay_tests::{Cluster, Ledger, Server, until};
use pb::mutation::Mutation;
use pb::placed_client::PlacedClient;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Keys of one writer; each is written again and again.
const KEYS: u64 = 16;
/// Bytes of a value: what is moved takes more than one entry.
const VALUE_BYTES: usize = 4 << 10;

/// Runs a command against one server, again for as long as it is refused.
fn done(server: &Server, arguments: &[&str]) -> serde_json::Value {
    let arguments = [arguments, &["--json", "--endpoints", &server.client]].concat();
    let mut found = None;
    until(&format!("`mainstay {}` succeeds", arguments.join(" ")), || {
        let output = server.run(&arguments);
        if !output.status.success() {
            eprintln!("{}: {}", server.name, String::from_utf8_lossy(&output.stderr).trim_end());
        }
        found = serde_json::from_slice(&output.stdout).ok();
        output.status.success()
    });
    found.expect("a command that succeeds prints a document")
}

/// `(first, group)` of each range.
fn ranges(server: &Server) -> Vec<(String, String)> {
    let ranges = done(server, &["range", "list", "users"]);
    let text = |range: &serde_json::Value, key: &str| range[key].as_str().expect("text").to_owned();
    ranges.as_array().expect("a list").iter().map(|range| (text(range, "first"), text(range, "group"))).collect()
}

/// The leader of a group, as one server knows it.
fn leader_of(server: &Server, group: &str) -> Option<String> {
    let groups = done(server, &["group", "list"]);
    let found = groups.as_array()?.iter().find(|row| row["name"] == group)?;
    found["leader_name"].as_str().map(str::to_owned)
}

struct Writers {
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    /// One for each server, which goes on with another where it is refused. Their keys are in ranges of their own.
    fn start(runtime: &Runtime, servers: &[Server]) -> Self {
        let (ledger, stop) = (Arc::new(Ledger::default()), Arc::new(AtomicBool::new(false)));
        let _guard = runtime.enter();
        let channels: Vec<_> = servers.iter().map(Server::channel).collect();
        let write = |at| runtime.spawn(write_until(at, channels.clone(), ledger.clone(), stop.clone()));
        let tasks = (0..servers.len()).map(write).collect();
        Self { ledger, stop, tasks }
    }

    /// How often the keys of each writer were acknowledged, all of them together.
    fn progress(&self) -> BTreeMap<Vec<u8>, u64> {
        let mut progress = BTreeMap::new();
        for (key, value) in self.ledger.acknowledged_values() {
            *progress.entry(key[..range_of(0).len()].to_vec()).or_default() += value;
        }
        progress
    }

    /// Waits until each of them, and so each range, has more acknowledged.
    fn await_progress(&self, count: u64) {
        let before = self.progress();
        until("writes of every range are acknowledged again", || {
            let now = self.progress();
            let more = |writer: usize| {
                let of = |progress: &BTreeMap<Vec<u8>, u64>| progress.get(range_of(writer).as_bytes()).copied();
                of(&now).unwrap_or(0) >= of(&before).unwrap_or(0) + count
            };
            (0..self.tasks.len()).all(more)
        });
    }

    fn finish(self, runtime: &Runtime) -> Arc<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            runtime.block_on(task).expect("a writer does not panic");
        }
        self.ledger
    }
}

/// What the keys of a writer begin with.
fn range_of(writer: usize) -> String {
    format!("user/{writer}/")
}

fn value(number: u64) -> Vec<u8> {
    let mut value = number.to_string().into_bytes();
    value.resize(VALUE_BYTES, b' ');
    value
}

async fn write_until(writer: usize, channels: Vec<Channel>, ledger: Arc<Ledger>, stop: Arc<AtomicBool>) {
    let mut at = writer;
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let key = format!("{}{:03}", range_of(writer), n % KEYS).into_bytes();
        let number = ledger.attempt(&key);
        let request = pb::PutRequest { keyspace: "users".into(), key: key.clone().into(), value: value(number).into() };
        match PlacedClient::new(channels[at % channels.len()].clone()).put(request).await {
            Ok(_) => ledger.acknowledge(&key, number),
            // The outcome is unknown, or it was refused: the ledger allows both. Another server is asked next.
            Err(_) => {
                at += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

/// A client of one server.
fn client(runtime: &Runtime, server: &Server) -> PlacedClient<Channel> {
    let _guard = runtime.enter();
    PlacedClient::new(server.channel())
}

/// All pairs as one server reads them, page by page. The reads are linearizable.
fn read_all(runtime: &Runtime, server: &Server) -> BTreeMap<Vec<u8>, u64> {
    let mut client = client(runtime, server);
    let mut found = BTreeMap::new();
    let mut start = bytes::Bytes::new();
    loop {
        let range = Some(pb::KeyRange { start: start.clone(), end: bytes::Bytes::new() });
        let request = pb::ScanRequest { keyspace: "users".into(), range, limit: 10, reverse: false };
        let mut page = None;
        until("a server reads", || {
            page = runtime.block_on(client.scan(request.clone())).ok();
            page.is_some()
        });
        let page = page.expect("the wait ended with a page").into_inner();
        assert!(page.pairs.len() <= 10);
        for pair in page.pairs {
            let text = std::str::from_utf8(&pair.value).expect("writers write text").trim_end().to_owned();
            found.insert(pair.key.to_vec(), text.parse().expect("writers write numbers"));
        }
        if page.next.is_empty() {
            return found;
        }
        start = page.next;
    }
}

/// Two keys of two groups in one batch, through one server.
fn batch_across(runtime: &Runtime, server: &Server) -> Status {
    let put = |writer: usize| pb::Mutation {
        mutation: Some(Mutation::Put(pb::Pair { key: range_of(writer).into(), value: value(1).into() })),
    };
    let request = pb::BatchRequest { keyspace: "users".into(), mutations: vec![put(1), put(2)] };
    let mut refused = None;
    until("a server knows who holds the keys", || {
        let status = runtime.block_on(client(runtime, server).batch(request.clone())).expect_err("nothing orders them");
        let is_known = status.code() == Code::InvalidArgument;
        assert!(is_known || matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded), "{status}");
        refused = Some(status);
        is_known
    });
    refused.expect("the wait ended with a refusal")
}

/// Two groups and a keyspace on all three, written through every member meanwhile: its ranges are split and moved, once by a client that
/// goes away, the process that leads a group is killed, and whatever was acknowledged is read through every member.
#[test]
fn placed_writes_outlive_moves_and_the_leader_of_their_group() {
    let runtime = runtime();
    let mut cluster = Cluster::start(&["--wal", "16MiB", "--memory", "64MiB"]);
    let servers = &cluster.servers;
    done(&servers[0], &["group", "create", "east"]);
    done(&servers[1], &["group", "create", "west"]);
    done(&servers[2], &["placed", "create", "users"]);
    let writers = Writers::start(&runtime, servers);
    writers.await_progress(2 * KEYS);
    assert_eq!(ranges(&servers[1]), [(String::new(), String::new())]);

    done(&servers[1], &["range", "split", "users", &range_of(1)]);
    done(&servers[2], &["range", "split", "users", &range_of(2)]);
    done(&servers[0], &["range", "move", "users", &range_of(1), "--to", "east"]);
    // Nobody waits for this one: its client is gone when it has hardly begun, if it has.
    let request = pb::MoveRequest { keyspace: "users".into(), key: range_of(2).into(), to: "west".into() };
    let held = [(String::new(), String::new()), (range_of(1), "east".into()), (range_of(2), "west".into())];
    until("a move whose client is gone has arrived", || {
        let mut request = tonic::Request::new(request.clone());
        request.set_timeout(Duration::from_millis(20));
        let _ = runtime.block_on(client(&runtime, &servers[2]).r#move(request));
        ranges(&servers[2]) == held
    });
    writers.await_progress(KEYS);
    for server in servers {
        until("every member knows who holds the ranges", || ranges(server) == held);
        let status = batch_across(&runtime, server);
        for part in ["key=user/1/ is held by group=east", "key=user/2/ by group=west"] {
            assert!(status.message().contains(part), "{}: {status}", server.name);
        }
    }

    let mut leader = None;
    until("a group has a leader", || {
        leader = leader_of(&servers[0], "east");
        leader.is_some()
    });
    let killed = servers.iter().position(|server| Some(&server.name) == leader.as_ref()).expect("a member leads");
    cluster.servers[killed].kill();
    writers.await_progress(KEYS);
    let living = &cluster.servers[(killed + 1) % 3];
    until("another leads the group", || leader_of(living, "east").is_some_and(|name| Some(name) != leader));
    cluster.servers[killed].start();
    writers.await_progress(KEYS);
    let ledger = writers.finish(&runtime);

    let mut states = BTreeSet::new();
    for server in &cluster.servers {
        let found = read_all(&runtime, server);
        let wrong = ledger.differences(&found);
        assert!(wrong.is_empty(), "{} of {} writes: {wrong:#?}", server.name, ledger.acknowledged());
        states.insert(found.into_iter().collect::<Vec<_>>());
    }
    assert_eq!(states.len(), 1, "all members read the same");
    // One verdict on each process, with both groups in it.
    for server in &cluster.servers {
        let mut health = None;
        until("every member is well", || {
            let status = server.status().unwrap_or_default();
            health = status[0]["verdicts"]["raft"]["health"].as_str().map(str::to_owned);
            health.as_deref() == Some("ok") && status[0]["raft"]["groups"].as_array().map(Vec::len) == Some(2)
        });
    }
    eprintln!("{} writes acknowledged, 0 lost", ledger.acknowledged());
}
