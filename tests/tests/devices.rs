//! Real processes, one of which has its volume on a raw device that answers with errors or slowly, while clients read and write
//! registers: what they saw is linearizable, and what was acknowledged is there at the end.

use std::time::{Duration, Instant};

use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::{PutRequest, RangeRequest};
use mainstay_tests::{Cluster, FaultyDevice, Registers, Request, Server, until};
use tokio::runtime::Runtime;

const SMALL: &[&str] = &["--wal", "16MiB", "--memtable", "256KiB", "--memory", "64MiB"];
/// The nodes that keep their volume in a folder, and the one on the device.
const OTHERS: [usize; 2] = [0, 2];
const SICK: usize = 1;
const DEVICE_BYTES: u64 = 256 << 20;
/// An election takes 600 ms with the default settings; the machine may be busy with other tests.
const NEW_LEADER_MAX: Duration = Duration::from_secs(10);

/// What a server says of its consensus: the command answers with a list of servers.
fn raft(server: &Server) -> Option<serde_json::Value> {
    server.status()?.get(0)?.get("raft").cloned()
}

/// The role that a server says it has, and why it left service.
fn state(server: &Server) -> Option<(String, Option<String>)> {
    let raft = raft(server)?;
    let text = |name: &str| raft.get(name).and_then(|value| value.as_str()).map(str::to_owned);
    Some((text("role")?, text("failure")))
}

/// Waits until the server on the device has left service; returns the reason.
fn await_failure(cluster: &Cluster) -> String {
    let mut failure = None;
    until("the server says that it failed, and why", || {
        failure = state(&cluster.servers[SICK]).filter(|(role, _)| role == "failed").and_then(|(_, reason)| reason);
        failure.is_some()
    });
    failure.expect("the wait ended with a reason")
}

/// Starts the server on the device again, in the place of its process that left service.
fn restart(cluster: &mut Cluster) {
    let sick = &mut cluster.servers[SICK];
    assert!(sick.runs(), "a process whose device fails stays up");
    sick.stop();
    sick.start();
    until("the server is a member again", || {
        state(sick).is_some_and(|(role, failure)| failure.is_none() && (role == "follower" || role == "leader"))
    });
}

/// Writes to the volume of a follower fail: it leaves service and says so, the others go on, and it catches up when it is
/// started again on the device that was mended.
#[test]
fn a_follower_whose_device_fails_writes_leaves_service_and_comes_back() {
    let Some(device) = FaultyDevice::create(DEVICE_BYTES, Duration::ZERO) else { return };
    let mut cluster = Cluster::start_with_device(SICK, device.path(), SMALL);
    cluster.transfer_to(0);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(50);
    device.fail(Request::Write);
    let reason = await_failure(&cluster);
    assert!(device.errors() > 0, "the device has answered with errors");
    let took = clients.await_progress(100);
    assert!(cluster.servers[SICK].runs(), "a process whose device fails stays up");
    assert_eq!(await_failure(&cluster), reason, "it stays out of service");
    device.mend(Request::Write);
    restart(&mut cluster);
    clients.await_progress(50);
    eprintln!("{} errors; failed: {reason}; 100 writes in {took:?} without it", device.errors());
    eprintln!("{}", clients.finish(&cluster.servers));
}

/// Writes to the volume of the leader fail under load: another leads soon, with everything that was acknowledged.
#[test]
fn a_leader_whose_device_fails_writes_is_replaced() {
    let Some(device) = FaultyDevice::create(DEVICE_BYTES, Duration::ZERO) else { return };
    let mut cluster = Cluster::start_with_device(SICK, device.path(), SMALL);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(50);
    cluster.transfer_to(SICK);
    clients.await_progress(50);
    let began = Instant::now();
    device.fail(Request::Write);
    let new = cluster.leader_among(&OTHERS);
    clients.await_progress(10);
    let out = began.elapsed();
    assert!(out < NEW_LEADER_MAX, "server {new} led and writes were acknowledged after {out:?}");
    let reason = await_failure(&cluster);
    assert!(device.errors() > 0, "the device has answered with errors");
    device.mend(Request::Write);
    restart(&mut cluster);
    clients.await_progress(50);
    eprintln!("failed: {reason}; server {new} led and 10 writes were acknowledged after {out:?}");
    eprintln!("{}", clients.finish(&cluster.servers));
}

/// Keys that lie in tables, with values that no cache of a process that was started again holds.
struct Cold {
    runtime: Runtime,
}

impl Cold {
    /// More than two memtables hold.
    const KEYS: u32 = 300;
    /// Every third key is read: each read of a failing device costs a round to another member.
    const STEP: usize = 3;
    const READS: u32 = Self::KEYS.div_ceil(Self::STEP as u32);

    fn key(n: u32) -> Vec<u8> {
        format!("cold/{n:05}").into_bytes()
    }

    fn value(n: u32) -> Vec<u8> {
        format!("{n:05} ").into_bytes().repeat(300)
    }

    fn write(server: &Server) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("tokio starts");
        let channel = {
            let _guard = runtime.enter();
            server.channel()
        };
        let puts = (0..Self::KEYS).map(|n| {
            let put = PutRequest { key: Self::key(n).into(), value: Self::value(n).into(), ..Default::default() };
            let mut client = KvClient::new(channel.clone());
            runtime.spawn(async move { client.put(put).await.map(drop) })
        });
        for put in puts.collect::<Vec<_>>() {
            runtime.block_on(put).expect("a put does not panic").expect("a put succeeds");
        }
        Self { runtime }
    }

    /// Reads keys through one server, each once; returns how many were answered.
    ///
    /// # Panics
    /// When an answer is wrong. No answer is none.
    fn read(&self, server: &Server) -> u32 {
        let _guard = self.runtime.enter();
        let mut client = KvClient::new(server.channel());
        let mut answered = 0;
        for n in (0..Self::KEYS).step_by(Self::STEP) {
            let get = RangeRequest { key: Self::key(n).into(), ..Default::default() };
            let Ok(answer) = self.runtime.block_on(client.range(get)) else { continue };
            let values: Vec<_> = answer.into_inner().kvs.into_iter().map(|pair| pair.value.to_vec()).collect();
            assert!(values == [Self::value(n)], "key {n} is read wrong: {} values", values.len());
            answered += 1;
        }
        answered
    }
}

/// Reads of the volume of a follower fail for a while: blocks that it cannot read come from another member, nothing is answered
/// wrong, and afterwards it serves as before.
#[test]
fn a_follower_whose_device_fails_reads_answers_nothing_wrong() {
    let Some(device) = FaultyDevice::create(DEVICE_BYTES, Duration::ZERO) else { return };
    let mut cluster = Cluster::start_with_device(SICK, device.path(), SMALL);
    cluster.transfer_to(0);
    let cold = Cold::write(&cluster.servers[0]);
    // Whoever stops has everything flushed first, and its caches are empty when it comes back.
    restart(&mut cluster);
    let clients = Registers::start(&cluster.servers, 4);
    clients.await_progress(50);
    device.fail(Request::Read);
    let during = cold.read(&cluster.servers[SICK]);
    let errors = device.errors();
    assert!(errors > 0, "reads reach the device");
    clients.await_progress(50);
    assert!(cluster.servers[SICK].runs(), "a process whose device fails stays up");
    let (role, failure) = state(&cluster.servers[SICK]).expect("a process that is up says how it does");
    device.mend(Request::Read);
    assert_eq!(failure, None, "a block that cannot be read takes nobody out of service, role={role}");
    assert!(during > 0, "what it cannot read it fetches from another");
    until("every key is read again", || cold.read(&cluster.servers[SICK]) == Cold::READS);
    eprintln!("{during} of {} keys were read while reads failed, {errors} errors, role={role}", Cold::READS);
    eprintln!("{}", clients.finish(&cluster.servers));
}

/// A leader whose device is slow against the others' hands leadership to one of them, and counts it.
#[test]
fn a_leader_whose_device_is_slow_hands_over() {
    let Some(device) = FaultyDevice::create(DEVICE_BYTES, Duration::from_millis(100)) else { return };
    let cluster = Cluster::start_with_device(SICK, device.path(), SMALL);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(20);
    cluster.transfer_to(SICK);
    let began = Instant::now();
    let hand_overs = || raft(&cluster.servers[SICK])?.get("disk_hand_overs")?.as_u64();
    until("the leader hands over for its disk", || {
        let done = hand_overs().is_some_and(|count| count > 0);
        if !done {
            // On a busy machine an election may take leadership away before the disk does.
            cluster.transfer_to(SICK);
        }
        done
    });
    let new = cluster.leader_among(&OTHERS);
    let took = began.elapsed();
    clients.await_progress(100);
    eprintln!("server {new} leads {took:?} after leadership went to the slow one");
    eprintln!("{}", clients.finish(&cluster.servers));
}
