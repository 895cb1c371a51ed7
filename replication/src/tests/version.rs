//! A cluster of two builds: nothing is written that the earlier one does not read before its version is raised, and it is raised only
//! over members that all read it. An earlier build is one whose answer to the question for its version is taken from it on the way.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use mainstay_engine::{CommandBody, KeyspaceOptions, OperatorId};
use mainstay_io::BoxFuture;

use super::cluster::*;
use super::disturb::{Disturb, Outbound, disturbed};
use crate::network::method;
use crate::{CLUSTER_VERSION_MAX, Durability, Envelope, Error, ErrorKind, PeerAddress, Result, TcpTransport, Write};

/// Those who are of a build from before there were versions.
#[derive(Clone, Default)]
struct Earlier(Arc<Mutex<BTreeSet<PeerAddress>>>);

impl Earlier {
    fn set(&self, cluster: &Cluster, i: usize, earlier: bool) {
        let mut builds = self.0.lock().expect("not poisoned");
        let address = cluster.cells[i].address.clone();
        if earlier {
            builds.insert(address)
        } else {
            builds.remove(&address)
        };
    }
}

impl Disturb for Earlier {
    fn call(&self, tcp: &TcpTransport, outbound: Outbound) -> BoxFuture<Result<Envelope>> {
        let earlier = self.0.lock().expect("not poisoned").contains(&outbound.address);
        if earlier && outbound.request.method == method::VERSION {
            return Box::pin(async { Err(Error::new(ErrorKind::Unsupported, "no such request method=33")) });
        }
        outbound.send(tcp)
    }
}

/// Processes that wait for a birth, and who of them are of an earlier build.
async fn waiting(count: usize, of_earlier: &[usize]) -> (Cluster, Earlier) {
    let mut cluster = Cluster::blank(count).await;
    let earlier = Earlier::default();
    of_earlier.iter().for_each(|i| earlier.set(&cluster, *i, true));
    cluster.wrap = disturbed(earlier.clone());
    cluster.start_all().await;
    (cluster, earlier)
}

async fn set_operator(cluster: &Cluster, i: usize) -> Result<()> {
    let body = CommandBody::SetOperator { name: "default".into(), operator: OperatorId::U64_ADD };
    cluster.node(i).write(Write { body, durability: Durability::Quorum }).await?.response?;
    Ok(())
}

fn versions(cluster: &Cluster) -> Vec<u16> {
    cluster.running().map(|i| cluster.node(i).status().cluster_version).collect()
}

#[test]
fn a_new_cluster_has_the_newest_version() {
    run(async {
        let (mut cluster, _) = waiting(3, &[]).await;
        cluster.node(1).init(&cluster.names()).await.expect("born");
        for i in 0..3 {
            cluster.until(i, |s| s.cluster_version == CLUSTER_VERSION_MAX).await;
            set_operator(&cluster, i).await.expect("any member may be asked");
        }
        assert_eq!(cluster.node(2).finalize().await.expect("nothing to do"), CLUSTER_VERSION_MAX);
        cluster.kill(0).await;
        cluster.start(0).await;
        cluster.until(0, |s| s.cluster_version == CLUSTER_VERSION_MAX).await;
        cluster.finish().await;
    });
}

#[test]
fn a_version_is_raised_once_every_member_reads_it_and_not_before() {
    run(async {
        let (mut cluster, earlier) = waiting(3, &[1]).await;
        cluster.node(0).init(&cluster.names()).await.expect("born, as the earliest of them reads it");
        cluster.lead(0).await;
        assert_eq!(versions(&cluster), [1, 1, 1]);
        for i in 0..3 {
            let error = set_operator(&cluster, i).await.expect_err("one of them would not read it");
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("version=1 needed=2"), "{error}");
            let error = cluster.node(i).finalize().await.expect_err("one of them would not read it");
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("name=n1 reads=1"), "{error}");
            cluster.put(i, "k", "v").await.expect("all goes on");
        }
        let body = CommandBody::SetOperator { name: "default".into(), operator: OperatorId::U64_ADD };
        let error = cluster.node(0).write_local(body).await.expect_err("one of them would not read it");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");

        // Each of what came later has its own.
        let expiring = CommandBody::CreateExpiring { name: "sessions".into() };
        let options =
            CommandBody::SetOptions { name: "default".into(), options: KeyspaceOptions::new().block_bytes(4096) };
        for (body, needed) in [(expiring, "needed=3"), (options, "needed=4")] {
            let write = Write { body, durability: Durability::Quorum };
            let error = cluster.node(1).write(write).await.expect_err("one of them would not read it");
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains(needed), "{error}");
        }

        // Who is away cannot be asked.
        earlier.set(&cluster, 1, false);
        cluster.kill(1).await;
        let error = cluster.node(2).finalize().await.expect_err("who knows what it reads");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("name=n1"), "{error}");
        cluster.start(1).await;
        cluster.until(1, |s| s.leader.is_some()).await;
        assert_eq!(versions(&cluster), [1, 1, 1]);

        assert_eq!(cluster.node(2).finalize().await.expect("all read it"), CLUSTER_VERSION_MAX);
        for i in 0..3 {
            set_operator(&cluster, i).await.expect("whether it has heard of it or asks");
            cluster.until(i, |s| s.cluster_version == CLUSTER_VERSION_MAX).await;
        }
        cluster.stop(1).await;
        cluster.start(1).await;
        cluster.until(1, |s| s.cluster_version == CLUSTER_VERSION_MAX).await;
        // Other changes of the membership keep it.
        let id = cluster.node(1).status().id;
        cluster.node(0).set_member_priority(id, 7).await.expect("changed");
        cluster
            .until(1, |s| s.members.iter().any(|m| m.priority == 7) && s.cluster_version == CLUSTER_VERSION_MAX)
            .await;
        cluster.finish().await;
    });
}

#[test]
fn who_reads_less_is_not_let_in_and_who_is_let_in_lowers_nothing() {
    run(async {
        let (cluster, earlier) = waiting(3, &[2]).await;
        cluster.node(0).init(&["n0".into()]).await.expect("born alone");
        cluster.until(0, |s| s.cluster_version == CLUSTER_VERSION_MAX).await;
        let add = |i: usize| {
            let address = cluster.cells[i].address.clone();
            let node = cluster.node(0);
            async move { node.add_member(&format!("n{i}"), address, true).await }
        };
        add(1).await.expect("it reads all");
        assert_eq!(cluster.until(0, |s| s.members.len() == 2).await.cluster_version, CLUSTER_VERSION_MAX);
        let error = add(2).await.expect_err("it would meet entries that it does not read");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        let expect = format!("name=n2 version={CLUSTER_VERSION_MAX} reads=1");
        assert!(error.to_string().contains(&expect), "{error}");
        assert_eq!(cluster.node(0).status().members.len(), 2);
        earlier.set(&cluster, 2, false);
        add(2).await.expect("it was started with a newer build");
        assert_eq!(cluster.until(2, |s| s.members.len() == 3).await.cluster_version, CLUSTER_VERSION_MAX);
        cluster.finish().await;
    });
}

/// As long as one of them may go back, the bytes are those of the earlier build.
#[test]
fn a_member_is_written_as_before_until_the_version_is_raised() {
    run(async {
        let (cluster, earlier) = waiting(3, &[2]).await;
        cluster.node(0).init(&["n0".into(), "n2".into()]).await.expect("born");
        // By name, of a build that reads more: it is given what the others have.
        let address = cluster.cells[1].address.clone();
        cluster.node(0).add_member("n1", address, true).await.expect("added");
        let status = cluster.until(1, |s| s.members.len() == 3).await;
        assert_eq!(status.members.iter().map(|m| m.version).collect::<Vec<_>>(), [0, 0, 0]);
        assert_eq!(status.cluster_version, 1);
        earlier.set(&cluster, 2, false);
        assert_eq!(cluster.node(1).finalize().await.expect("all read it"), CLUSTER_VERSION_MAX);
        let status = cluster.until(1, |s| s.cluster_version == CLUSTER_VERSION_MAX).await;
        assert_eq!(status.members.iter().map(|m| m.version).collect::<Vec<_>>(), [CLUSTER_VERSION_MAX; 3]);
        cluster.finish().await;
    });
}
