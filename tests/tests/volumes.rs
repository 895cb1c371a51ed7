//! What is done to the volumes of real processes: copied at an instant and put back, lost, exchanged, damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mainstay_tests::load::{Load, assert_nothing_lost, read_all, runtime};
use mainstay_tests::{Cluster, Server, until};
use serde_json::Value;

/// Small, so that a short load rotates, flushes and compacts.
const SMALL: [&str; 6] = ["--wal", "16MiB", "--memtable", "64KiB", "--memory", "64MiB"];
const ZONES: [&str; 3] = ["superblock", "wal", "extents"];

fn zones(volume: &Path) -> [Vec<u8>; 3] {
    ZONES.map(|zone| std::fs::read(volume.join(zone)).expect("a zone can be read"))
}

/// Writes a volume; blocks of zeroes stay holes.
fn restore(zones: &[Vec<u8>; 3], volume: &Path) {
    use std::os::unix::fs::FileExt;
    const BLOCK: usize = 4096;
    let _ = std::fs::remove_dir_all(volume);
    std::fs::create_dir(volume).expect("a folder can be made");
    for (name, bytes) in ZONES.iter().zip(zones) {
        let file = std::fs::File::create(volume.join(name)).expect("a file can be made");
        file.set_len(bytes.len() as u64).expect("a file can be grown");
        for (n, block) in bytes.chunks(BLOCK).enumerate().filter(|(_, block)| block.iter().any(|byte| *byte != 0)) {
            file.write_all_at(block, (n * BLOCK) as u64).expect("a block can be written");
        }
    }
}

/// The volumes of these servers as of one instant, while they run: they are stopped, so nothing follows what the kernel has, and
/// what it has lands within a moment, after which two reads are the same.
fn snapshot(servers: &[Server]) -> Vec<[Vec<u8>; 3]> {
    servers.iter().for_each(Server::pause);
    let read = || servers.iter().map(|server| zones(&server.data)).collect::<Vec<_>>();
    let mut copies = read();
    until("the writes in flight have landed", || {
        let again = read();
        let same = again == copies;
        copies = again;
        same
    });
    servers.iter().for_each(Server::resume);
    copies
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of this test is UTF-8")
}

/// Every checksum of a volume is right, the chain of its log included.
fn assert_sound(server: &Server, volume: &Path) {
    let output = server.run(&["verify", "--data", text(volume)]);
    assert!(output.status.success(), "{}{}", text(volume), String::from_utf8_lossy(&output.stderr));
}

/// The JSON document that a command prints.
fn document(server: &Server, arguments: &[&str]) -> Value {
    let output = server.run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

/// Some flushes have gone by.
fn await_tables(cluster: &Cluster) {
    let flushed = |server: &Server| {
        server.status().is_some_and(|status| status[0]["engine"]["tables"].as_u64().is_some_and(|tables| tables > 0))
    };
    until("every volume has tables", || cluster.servers.iter().all(flushed));
}

/// Three servers with tables, and clients that write to them.
fn three_under_load(runtime: &tokio::runtime::Runtime) -> (Cluster, Load) {
    let cluster = Cluster::start(&SMALL);
    let load = Load::start(runtime, &cluster, 8);
    await_tables(&cluster);
    (cluster, load)
}

/// Puts a copy under a server that is dead, and starts it.
fn put_back(server: &mut Server, copy: &[Vec<u8>; 3]) {
    restore(copy, &server.data);
    assert_sound(server, &server.data);
    server.start();
}

/// Everything that was acknowledged when `then` was taken is there, or was written over since.
fn assert_holds(found: &BTreeMap<Vec<u8>, u64>, then: &BTreeMap<Vec<u8>, u64>) {
    for (key, value) in then {
        let found = found.get(key);
        assert!(found >= Some(value), "{}: {value} acknowledged, {found:?} found", String::from_utf8_lossy(key));
    }
}

/// A snapshot of the volume of a cluster of one, which nobody else can help: at five instants under load, the copy verifies, and
/// a process on it alone has everything that was acknowledged before the instant.
#[test]
fn a_snapshot_under_load_holds_all_that_was_acknowledged() {
    let runtime = runtime();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let mut cluster = Cluster::describe(folder, &["a"], &SMALL);
    cluster.servers[0].start();
    cluster.init();
    let load = Load::start(&runtime, &cluster, 8);
    let mut copies = Vec::new();
    for round in 0..5 {
        load.await_progress(300);
        if round == 0 {
            await_tables(&cluster);
        }
        let then = load.ledger.acknowledged_values();
        copies.push((snapshot(&cluster.servers).remove(0), then));
    }
    load.finish(&runtime);
    for (zones, then) in copies {
        let server = &mut cluster.servers[0];
        server.kill();
        put_back(server, &zones);
        assert_holds(&read_all(&runtime, server), &then);
    }
}

/// The snapshot of one volume is put under its member while the others go on, and the load with them: it fetches what it had
/// promised since, and all hold the same in the end. Of the leader too.
#[test]
fn a_member_comes_back_on_a_snapshot_of_its_volume() {
    let runtime = runtime();
    let (mut cluster, load) = three_under_load(&runtime);
    for restored in [cluster.leader(), (cluster.leader() + 1) % 3] {
        load.await_progress(100);
        let zones = snapshot(&cluster.servers[restored..=restored]).remove(0);
        load.await_progress(300);
        let server = &mut cluster.servers[restored];
        server.kill();
        put_back(server, &zones);
        read_all(&runtime, server);
        let status = server.status().expect("it answers");
        assert_eq!(status[0]["engine"]["heal"]["went_back"], 1, "its peers remember more: {status:#}");
    }
    let ledger = load.finish(&runtime);
    assert_nothing_lost(&runtime, &cluster.servers, &ledger);
}

/// Snapshots of all volumes as of one instant are the cluster at that instant: put back, it goes on with everything that was
/// acknowledged.
#[test]
fn snapshots_of_all_volumes_at_one_instant_are_the_cluster() {
    let runtime = runtime();
    let (mut cluster, load) = three_under_load(&runtime);
    load.await_progress(200);
    let then = load.ledger.acknowledged_values();
    let copies = snapshot(&cluster.servers);
    load.await_progress(100);
    load.finish(&runtime);
    cluster.servers.iter_mut().for_each(Server::kill);
    for (server, zones) in cluster.servers.iter_mut().zip(&copies) {
        put_back(server, zones);
    }
    let found: Vec<_> = cluster.servers.iter().map(|server| read_all(&runtime, server)).collect();
    assert_holds(&found[0], &then);
    assert!(found.iter().all(|other| *other == found[0]), "all hold the same");
}

/// Snapshots of the volumes at different instants are no cluster: what one of them has promised another does not know. The one
/// that goes furthest is, alone, and it has all that was acknowledged before the first of them.
#[test]
fn snapshots_at_different_instants_give_a_cluster_from_the_one_that_goes_furthest() {
    let runtime = runtime();
    let (mut cluster, load) = three_under_load(&runtime);
    load.await_progress(200);
    let then = load.ledger.acknowledged_values();
    let mut copies = Vec::new();
    for server in 0..3 {
        copies.push(snapshot(&cluster.servers[server..=server]).remove(0));
        load.await_progress(50);
    }
    load.finish(&runtime);
    cluster.servers.iter_mut().for_each(Server::kill);
    for (server, zones) in cluster.servers.iter().zip(&copies) {
        restore(zones, &server.data);
    }
    // Any of them may be asked first: the plan names the one that goes furthest. Node ids of `init` go by the order of names.
    let volumes = [0, 1, 2].map(|i| text(&cluster.servers[i].data).to_owned());
    let plan = |survivor: usize, further: &[&str]| {
        let mut arguments = vec!["recover", "--json", "--data", &volumes[survivor]];
        let others = (0..3).filter(|i| *i != survivor).flat_map(|i| ["--other", &volumes[i]]);
        arguments.extend(others.chain(further.iter().copied()));
        document(&cluster.servers[0], &arguments)
    };
    let survivor = plan(0, &["--plan"])["further_ahead"].as_u64().map_or(0, |node| node as usize - 1);
    let found = plan(survivor, &["--plan"]);
    assert_eq!((&found["further_ahead"], &found["lossless"]), (&Value::Null, &true.into()), "{found:#}");
    plan(survivor, &["--apply", "--confirm", found["digest"].as_str().expect("a text")]);

    for (i, server) in cluster.servers.iter_mut().enumerate() {
        if i != survivor {
            std::fs::remove_dir_all(&server.data).expect("the volume can be wiped");
        }
        server.start();
    }
    let admin = &cluster.servers[cluster.leader_among(&[survivor])];
    for server in cluster.servers.iter().filter(|server| server.name != admin.name) {
        let add = ["member", "add", &server.name, &server.peer, "--timeout", "60s", "--json", "--admin", &admin.admin];
        document(admin, &add);
    }
    for server in &cluster.servers {
        assert_holds(&read_all(&runtime, server), &then);
    }
}

/// Of the members as a server knows them: whether there are three that vote, and the id of one of the name.
fn voters_and_id(server: &Server, name: &str) -> Option<(bool, u64)> {
    let status = server.status()?;
    let members = status[0]["raft"]["members"].as_array()?;
    let three = members.len() == 3 && members.iter().all(|member| member["voter"] == true);
    let id = members.iter().find(|member| member["name"] == name)?["id"].as_u64()?;
    Some((three, id))
}

/// The last of three servers has taken its place again, under a new id and with everything.
fn assert_replaced(cluster: &Cluster, load: Load, runtime: &tokio::runtime::Runtime) {
    const ID_BEFORE: u64 = 3;
    let replaced = |server: &Server| {
        voters_and_id(server, &cluster.servers[2].name).is_some_and(|(three, id)| three && id > ID_BEFORE)
    };
    until("the new volume has taken the place of the old one", || cluster.servers.iter().all(replaced));
    load.await_progress(20);
    let ledger = load.finish(runtime);
    assert_nothing_lost(runtime, &cluster.servers, &ledger);
}

/// Three servers under load, of which the last is dead.
fn two_of_three(runtime: &tokio::runtime::Runtime) -> (Cluster, Load) {
    two_of_three_with(runtime, &SMALL)
}

fn two_of_three_with(runtime: &tokio::runtime::Runtime, arguments: &[&str]) -> (Cluster, Load) {
    let mut cluster = Cluster::start(arguments);
    let load = Load::start(runtime, &cluster, 4);
    load.await_progress(50);
    cluster.servers[2].kill();
    load.await_progress(20);
    (cluster, load)
}

/// Lays the volume out anew, which the operator decides, and starts its server.
fn start_anew(server: &mut Server) {
    document(server, &["format", "--data", text(&server.data), "--wal", "16MiB", "--force", "--json"]);
    server.start();
}

/// The volume of a cluster of one, of the name of the last of three servers.
fn volume_of_another_cluster() -> [Vec<u8>; 3] {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let mut other = Cluster::describe(folder, &["c"], &SMALL);
    other.servers[0].start();
    other.init();
    other.leader();
    other.servers[0].kill();
    zones(&other.servers[0].data)
}

/// A volume is gone, and its process starts on an empty folder: the cluster is whole again without anybody.
#[test]
fn a_lost_volume_is_replaced_by_itself() {
    let runtime = runtime();
    let (mut cluster, load) = two_of_three(&runtime);
    std::fs::remove_dir_all(&cluster.servers[2].data).expect("the volume can be removed");
    cluster.servers[2].start();
    assert_replaced(&cluster, load, &runtime);
}

/// The volume of another cluster, which would lead alone: it takes no part and says why. Nothing of it is lost before the operator
/// lays it out anew, and then it joins.
#[test]
fn a_volume_of_another_cluster_takes_no_part() {
    let runtime = runtime();
    let foreign = volume_of_another_cluster();
    let (mut cluster, load) = two_of_three(&runtime);
    let server = &mut cluster.servers[2];
    restore(&foreign, &server.data);
    server.start();
    until("it says that the volume is foreign", || {
        server.status().is_some_and(|status| status[0]["raft"]["role"] == "foreign")
    });
    let status = server.status().expect("it answers");
    let failure = status[0]["raft"]["failure"].as_str().expect("it says why");
    assert!(failure.contains("a node of another cluster"), "{failure}");
    assert_eq!(status[0]["ready"], false, "no client is sent there");
    load.await_progress(50);
    let server = &mut cluster.servers[2];
    server.kill();
    assert_sound(server, &server.data);
    start_anew(server);
    assert_replaced(&cluster, load, &runtime);
}

/// No copy of the superblock can be read: the process ends, says why, and has changed nothing. Laid out anew by the operator, the
/// volume joins.
#[test]
fn a_volume_that_is_damaged_beyond_reading_is_left_as_it_is() {
    let runtime = runtime();
    let (mut cluster, load) = two_of_three(&runtime);
    let server = &mut cluster.servers[2];
    let mut damaged = zones(&server.data);
    damaged[0].iter_mut().filter(|byte| **byte != 0).for_each(|byte| *byte ^= 0x55);
    restore(&damaged, &server.data);
    server.start();
    until("the process ends", || !server.runs());
    assert!(server.log().contains("mainstay format"), "it names the remedy: {}", server.log());
    assert!(zones(&server.data) == damaged, "the volume is as it was");
    server.kill();
    start_anew(server);
    assert_replaced(&cluster, load, &runtime);
}

/// What the operator asked for: the process ends, and the volume is in another folder.
fn await_set_aside(server: &mut Server) -> PathBuf {
    until("the process ends", || !server.runs());
    assert!(server.log().contains("the volume was set aside"), "{}", server.log());
    assert!(!server.data.join("superblock").exists());
    server.kill();
    server.data.join("aside")
}

/// Started again, the last of three servers finds an empty folder.
fn assert_joins_anew(mut cluster: Cluster, load: Load, runtime: &tokio::runtime::Runtime) {
    cluster.servers[2].start();
    assert_replaced(&cluster, load, runtime);
}

#[test]
fn a_damaged_volume_is_set_aside_where_the_operator_asked_for_it() {
    let runtime = runtime();
    let (mut cluster, load) = two_of_three_with(&runtime, &[&SMALL[..], &["--bad-volume", "set-aside"]].concat());
    let server = &mut cluster.servers[2];
    let mut damaged = zones(&server.data);
    // The magic stays: it is a volume, and no copy of its superblock is whole.
    for copy in damaged[0].chunks_mut(256 << 10) {
        copy[8..4096].iter_mut().for_each(|byte| *byte ^= 0x55);
    }
    restore(&damaged, &server.data);
    server.start();
    let aside = await_set_aside(server);
    assert!(zones(&aside) == damaged, "nothing of it is changed");
    assert_joins_anew(cluster, load, &runtime);
}

#[test]
fn a_foreign_volume_is_set_aside_where_the_operator_asked_for_it() {
    let runtime = runtime();
    let foreign = volume_of_another_cluster();
    let (mut cluster, load) = two_of_three_with(&runtime, &[&SMALL[..], &["--bad-volume", "set-aside"]].concat());
    let server = &mut cluster.servers[2];
    restore(&foreign, &server.data);
    server.start();
    let aside = await_set_aside(server);
    assert_sound(server, &aside);
    assert_joins_anew(cluster, load, &runtime);
}
