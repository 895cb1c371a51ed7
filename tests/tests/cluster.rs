//! Three real processes under load: killed, stopped, refused, restarted. What was acknowledged is there.

use std::sync::atomic::{AtomicU64, Ordering};

use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::{PutRequest, RangeRequest};
use mainstay_tests::load::{Load, assert_nothing_lost, read_all, runtime};
use mainstay_tests::{Cluster, Server};

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
    assert_nothing_lost(&runtime, &cluster.servers, &ledger);
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
    assert_nothing_lost(&runtime, &cluster.servers[..WITNESS], &ledger);
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
    assert_nothing_lost(&runtime, &cluster.servers, &ledger);
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
    assert_nothing_lost(&runtime, &cluster.servers, &ledger);
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

/// Every process comes back under another address, and was told that of one alone: they find each other and elect, the membership
/// names the new addresses, and any two go on without that one.
#[test]
fn processes_that_all_come_back_elsewhere_find_each_other() {
    let runtime = runtime();
    let mut cluster = Cluster::start(&["--wal", "16MiB", "--memory", "64MiB"]);
    let load = Load::start(&runtime, &cluster, 4);
    load.await_progress(50);
    cluster.servers.iter_mut().for_each(Server::kill);
    const SEED: usize = 0;
    cluster.move_all(SEED);
    cluster.servers.iter_mut().for_each(Server::start);
    load.await_progress(50);
    let named = |server: &Server| -> Option<bool> {
        let status = server.status()?;
        let members = status[0]["raft"]["members"].as_array()?;
        let at = |other: &Server| members.iter().any(|m| m["name"] == *other.name && m["peer_address"] == *other.peer);
        Some(cluster.servers.iter().all(at))
    };
    mainstay_tests::until("all servers name the new addresses", || {
        cluster.servers.iter().all(|server| named(server) == Some(true))
    });
    cluster.servers[SEED].kill();
    load.await_progress(50);
    cluster.servers[SEED].start();
    let ledger = load.finish(&runtime);
    assert_nothing_lost(&runtime, &cluster.servers, &ledger);
}
