//! Processes of two builds: a cluster is upgraded one member at a time under load, goes back, and is upgraded for good.

use std::path::{Path, PathBuf};

use mainstay::CLUSTER_VERSION_MAX;
use mainstay_tests::load::{Load, assert_nothing_lost, runtime};
use mainstay_tests::{Cluster, Server, until};

/// The server of an earlier commit, which `cargo xtask upgrade` builds.
fn earlier() -> PathBuf {
    std::env::var_os("EARLIER_BUILD").expect("EARLIER_BUILD names the server of an earlier commit").into()
}

/// Ends a server in order and starts it as the other build, on the same volume, and waits until it has caught up.
fn restart(server: &mut Server, program: Option<&Path>) {
    assert!(server.stop(), "{} ends in order", server.name);
    server.program = program.map(Path::to_owned);
    server.start();
    takes_part(server);
}

fn takes_part(server: &Server) {
    until(&format!("{} takes part", server.name), || is_ready(server));
}

fn is_ready(server: &Server) -> bool {
    server.status().is_some_and(|status| status[0]["ready"] == true)
}

fn cluster_version(server: &Server) -> Option<u64> {
    server.status()?[0]["raft"]["cluster_version"].as_u64()
}

/// `mainstay finalize`, said to this server: its exit status and what it printed.
fn finalize(server: &Server) -> (bool, String) {
    let output = server.run(&["finalize", "--admin", &server.admin]);
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
#[ignore = "needs the server of an earlier commit: cargo xtask upgrade"]
fn two_builds_make_one_cluster_until_it_is_finalized() {
    let earlier = earlier();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let mut cluster = Cluster::describe(folder, &["a", "b", "c"], &[]);
    for server in &mut cluster.servers {
        server.program = Some(earlier.clone());
        server.start();
    }
    cluster.init();
    cluster.leader();
    let runtime = runtime();
    let load = Load::start(&runtime, &cluster, 8);
    load.await_progress(500);

    // Up, and all the way back.
    for i in 0..3 {
        restart(&mut cluster.servers[i], None);
        load.await_progress(500);
        if i < 2 {
            let (raised, said) = finalize(&cluster.servers[0]);
            assert!(!raised && !said.is_empty(), "a member is of the earlier build: {said}");
        }
    }
    for server in &cluster.servers {
        assert_eq!(cluster_version(server), Some(1), "nobody said that there is no way back");
    }
    for i in 0..3 {
        restart(&mut cluster.servers[i], Some(&earlier));
        load.await_progress(500);
    }
    // Up for good.
    for i in 0..3 {
        restart(&mut cluster.servers[i], None);
        load.await_progress(500);
    }
    let (raised, said) = finalize(&cluster.servers[1]);
    assert!(raised && said.contains(&format!("version={CLUSTER_VERSION_MAX}")), "{said}");
    for server in &cluster.servers {
        until("every member knows it", || cluster_version(server) == Some(CLUSTER_VERSION_MAX.into()));
    }
    load.await_progress(500);

    // The earlier build does not take part any more, and does no harm to the volume.
    assert!(cluster.servers[2].stop(), "it ends in order");
    cluster.servers[2].program = Some(earlier);
    cluster.servers[2].start();
    load.await_progress(2000);
    assert!(!is_ready(&cluster.servers[2]), "it reads no such cluster");
    cluster.servers[2].kill();
    cluster.servers[2].program = None;
    cluster.servers[2].start();
    takes_part(&cluster.servers[2]);
    load.await_progress(500);

    let ledger = load.finish(&runtime);
    assert!(ledger.acknowledged() > 5_000, "{} writes were acknowledged", ledger.acknowledged());
    assert_nothing_lost(&runtime, &cluster.servers, &ledger);
}
