//! Real processes that are stopped, cut off, slowed and lied to by their network, while clients read and write registers: what
//! they saw is linearizable, and what was acknowledged is there at the end.

use std::time::Instant;

use mainstay_tests::registers::REGISTERS;
use mainstay_tests::{Cluster, Damage, Level, Network, Registers, Server, until};

const SMALL: &[&str] = &["--wal", "16MiB", "--memtable", "256KiB", "--memory", "64MiB"];

/// Bytes that lie in the sockets of this server's client port, unread.
fn unread(server: &Server) -> u64 {
    let port: u16 = server.client.rsplit(':').next().and_then(|port| port.parse().ok()).expect("an address has a port");
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel lists its connections");
    let suffix = format!(":{port:04X}");
    let ours = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = ours.filter(|fields| fields.get(1).is_some_and(|local| local.ends_with(&suffix)));
    let queue = |fields: Vec<&str>| u64::from_str_radix(fields.get(4)?.split(':').nth(1)?, 16).ok();
    ours.filter_map(queue).sum()
}

/// Writes every register through this server, each until it is acknowledged.
fn write_all(clients: &Registers, server: usize) {
    for register in 0..REGISTERS {
        until("a register is written", || clients.write(server, register).is_some());
    }
}

fn others(of: usize) -> [usize; 2] {
    [(of + 1) % 3, (of + 2) % 3]
}

/// A leader is stopped, another is elected and acknowledges writes. Reads then wait in the sockets of the stopped one, which
/// believes that it leads when it wakes up and handles them before it hears of anything: none of them may be answered with
/// what was true when it fell asleep.
#[test]
fn a_leader_that_was_stopped_reads_nothing_stale() {
    let cluster = Cluster::start(SMALL);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(50);
    let mut answered = 0;
    for round in 0..4 {
        let old = cluster.leader();
        let asleep = &cluster.servers[old];
        asleep.pause();
        let new = cluster.leader_among(&others(old));
        write_all(&clients, new);
        let before = unread(asleep);
        let level = if round % 2 == 0 { Level::Linearizable } else { Level::Lease };
        let reads = clients.begin_reads(old, level);
        until("reads lie in the sockets of the stopped server", || unread(asleep) > before);
        asleep.resume();
        let answers = reads.answers().into_iter().flatten().count();
        eprintln!(
            "round {round}: server {old} was stopped, {new} led; {answers} of {REGISTERS} {level:?} reads were answered"
        );
        answered += answers;
        clients.await_progress(30);
    }
    assert!(answered > 0, "a server that woke up answers reads again");
    eprintln!("{}", clients.finish(&cluster.servers));
}

/// A follower is stopped: the others go on without it, and it comes back with everything.
#[test]
fn a_follower_that_was_stopped_holds_up_nobody() {
    let cluster = Cluster::start(SMALL);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(50);
    for round in 0..3 {
        let asleep = others(cluster.leader())[round % 2];
        cluster.servers[asleep].pause();
        let took = clients.await_progress(40);
        cluster.servers[asleep].resume();
        let awake = clients.await_progress(40);
        eprintln!("round {round}: server {asleep} was stopped; 40 writes in {took:?} without it, in {awake:?} with it");
    }
    eprintln!("{}", clients.finish(&cluster.servers));
}

/// The leader loses its peers: all of them, those that hear it, those that it hears. Clients reach it the whole time.
#[test]
fn a_leader_that_is_cut_off_reads_nothing_stale() {
    let Some(network) = Network::create(3) else { return };
    let cluster = Cluster::start_in(&network, SMALL);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(50);
    type Cut = fn(&Network, usize);
    let cuts: [(&str, Cut); 3] = [
        ("neither hears nor is heard", |network, i| {
            network.mute(i);
            network.deafen(i);
        }),
        ("is not heard", Network::mute),
        ("hears nobody", Network::deafen),
    ];
    for (what, cut) in cuts {
        let old = cluster.leader();
        let began = Instant::now();
        cut(&network, old);
        let new = cluster.leader_among(&others(old));
        write_all(&clients, new);
        let out = began.elapsed();
        for level in [Level::Linearizable, Level::Lease] {
            let answers = clients.begin_reads(old, level).answers();
            // Its questions or their answers do not arrive: it knows nothing that is certain.
            assert!(answers.iter().all(Option::is_none), "server {old}, which {what}, answered {level:?}: {answers:?}");
        }
        network.mend(old);
        let took = clients.await_progress(30);
        until("the server that was cut off serves again", || clients.write(old, 0).is_some());
        eprintln!(
            "the leader {old} {what}: {new} led and took writes after {out:?}, all together {took:?} after the mend"
        );
    }
    eprintln!("{}", clients.finish(&cluster.servers));
}

/// Every link between servers is slow, one after the other and then all: writes go on.
#[test]
fn slow_links_stop_nobody() {
    let Some(network) = Network::create(3) else { return };
    let cluster = Cluster::start_in(&network, SMALL);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(50);
    for slow in [&[0][..], &[1], &[2], &[0, 1, 2]] {
        let how: Vec<_> = slow.iter().map(|i| network.slow(*i)).collect();
        let took = clients.await_progress(40);
        slow.iter().for_each(|i| network.mend(*i));
        eprintln!("servers {slow:?} slowed by {}: 40 writes in {took:?}", how[0]);
    }
    eprintln!("{}", clients.finish(&cluster.servers));
}

/// What passes between the servers is damaged above TCP: each kind alone, then all together.
#[test]
fn damaged_streams_between_servers_do_no_harm() {
    let (cluster, proxies) = Cluster::start_behind_proxies(SMALL);
    let clients = Registers::start(&cluster.servers, 8);
    clients.await_progress(50);
    let count = |damage| proxies.iter().map(|proxy| proxy.count(damage)).sum::<u64>();
    let set = |damage, rate| proxies.iter().for_each(|proxy| proxy.set(damage, rate));
    for damage in Damage::ALL {
        set(damage, 100);
        until("chunks are damaged", || count(damage) >= 10);
        let took = clients.await_progress(40);
        set(damage, 0);
        eprintln!("{damage:?} of 1 % of the chunks: 40 writes in {took:?}, {} chunks so far", count(damage));
    }
    Damage::ALL.into_iter().for_each(|damage| set(damage, 50));
    let before: u64 = Damage::ALL.into_iter().map(count).sum();
    until("chunks are damaged", || Damage::ALL.into_iter().map(count).sum::<u64>() >= before + 40);
    clients.await_progress(40);
    Damage::ALL.into_iter().for_each(|damage| set(damage, 0));
    let passed = proxies.iter().map(mainstay_tests::Proxy::passed);
    let (chunks, connections) = passed.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    let counts = Damage::ALL.map(|damage| format!("{damage:?} {}", count(damage))).join(", ");
    eprintln!("{chunks} chunks on {connections} connections; {counts}");
    eprintln!("{}", clients.finish(&cluster.servers));
}
