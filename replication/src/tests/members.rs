//! The members change while a client writes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_io::BoxFuture;
use openraft::ChangeMembers;

use super::cluster::*;
use super::disturb::{Disturb, Outbound, disturbed};
use crate::network::{method, read_append};
use crate::types::EntryPayload;
use crate::{
    Durability, Envelope, Error, ErrorKind, MemberRole, Node, NodeId, ReadLevel, Result, TcpTransport, TokioRuntime,
    Write,
};

/// Writes one key after another at whatever member answers, until `stop`; gives the keys that were acknowledged.
pub(super) async fn write_on(members: Vec<Node>, stop: Arc<AtomicBool>) -> Vec<String> {
    let mut acknowledged = Vec::new();
    let mut at = 0;
    for n in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("k{n:06}");
        let write = Write { body: put(&key, "v"), durability: Durability::Quorum };
        match members[at % members.len()].write(write).await {
            Ok(applied) if applied.response.is_ok() => acknowledged.push(key),
            _ => at += 1,
        }
    }
    acknowledged
}

async fn voters(cluster: &Cluster, seen_from: usize, count: usize) {
    let counted = |s: &crate::NodeStatus| s.members.iter().filter(|m| m.role == MemberRole::Voter).count();
    let status = cluster.until(seen_from, |s| s.members.len() == count && counted(s) == count).await;
    assert_eq!(status.members.len(), count);
}

#[test]
fn one_grows_to_three_and_five_and_shrinks_to_three_under_load() {
    run(async {
        let mut cluster = Cluster::blank(5).await;
        cluster.start_all().await;
        cluster.node(0).init(&["n0".into()]).await.expect("born alone");
        let stop = Arc::new(AtomicBool::new(false));
        let members = (0..5).map(|i| cluster.node(i)).collect();
        let writer = tokio::spawn(write_on(members, stop.clone()));
        for i in 1..5 {
            let address = cluster.cells[i].address.clone();
            let member = cluster.node(0).add_member(&format!("n{i}"), address, true).await.expect("added");
            assert_eq!(member.role, MemberRole::Voter, "it was promoted when it had caught up");
            voters(&cluster, 0, i + 1).await;
        }
        // The leader is one of those that go.
        let leader = cluster.leader().await;
        let other = (leader + 1) % 5;
        let stays: Vec<usize> = (0..5).filter(|i| *i != leader && *i != other).collect();
        let ids: Vec<NodeId> = [other, leader].iter().map(|i| cluster.node(*i).status().id).collect();
        for id in ids {
            cluster.node(stays[0]).remove_member(id).await.expect("removed");
        }
        voters(&cluster, stays[0], 3).await;
        for gone in [leader, other] {
            cluster.until(gone, |s| s.role == "removed").await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        stop.store(true, Ordering::Relaxed);
        let acknowledged = writer.await.expect("the writer ends");
        assert!(acknowledged.len() > 100, "{} writes were acknowledged", acknowledged.len());
        for i in stays {
            for key in &acknowledged {
                let value = cluster.get(i, key, ReadLevel::Linearizable).await.expect("read");
                assert_eq!(value.as_deref(), Some(b"v".as_ref()), "{key} at n{i}");
            }
        }
        cluster.finish().await;
    });
}

/// A volume that asked to be let in, and was gone before that was decided: its id would be newer than the one of the volume that is
/// there, which would never get its place back.
#[test]
fn a_late_request_of_a_volume_that_is_gone_lets_nobody_in() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let leader = cluster.leader().await;
        cluster.put(leader, "k", "v").await.expect("written");
        let wiped = (leader + 1) % 3;
        let gone = crate::types::Member { incarnation: [0xee; 16], ..cluster.node(wiped).inner.me() };
        cluster.wipe(wiped).await;
        let join = || async { cluster.node(leader).inner.serve_join(gone.clone(), false).await };
        let error = join().await.expect_err("nobody is there");
        assert_eq!(error.kind(), crate::ErrorKind::Unavailable, "{error}");
        assert_eq!(cluster.node(leader).status().members.len(), 3);

        cluster.start(wiped).await;
        let status = cluster.until(wiped, |s| s.role == "follower").await;
        voters(&cluster, leader, 3).await;
        assert!(cluster.node(leader).status().members.iter().any(|m| m.id == status.id));
        cluster.finish().await;
    });
}

/// Whoever watches the leader sees that a voter is away before the next one is.
#[test]
fn a_leader_names_the_voters_that_it_does_not_hear() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let leader = cluster.leader().await;
        cluster.until(leader, |s| s.silent.is_empty()).await;
        let away = (leader + 1) % 3;
        let id = cluster.node(away).status().id.0;
        cluster.kill(away).await;
        cluster.put(leader, "k", "v").await.expect("a majority is there");
        let status = cluster.until(leader, |s| !s.silent.is_empty()).await;
        assert_eq!(status.silent.into_iter().collect::<Vec<_>>(), [id]);
        cluster.start(away).await;
        cluster.until(leader, |s| s.silent.is_empty()).await;
        assert!(cluster.node(away).status().silent.is_empty(), "who does not lead says nothing of the others");
        cluster.finish().await;
    });
}

/// While an id stands here, no membership arrives anywhere that has no such voter.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<u64>>>);

impl Disturb for Kept {
    fn call(&self, tcp: &TcpTransport, outbound: Outbound) -> BoxFuture<Result<Envelope>> {
        let kept = *self.0.lock().expect("not poisoned");
        let removes = |payload: &EntryPayload| match payload {
            EntryPayload::Membership(members) => members.voter_ids().all(|id| Some(id) != kept),
            _ => false,
        };
        if kept.is_some()
            && matches!(outbound.request.method, method::APPEND | method::APPEND_IN_TURN)
            && read_append::<TokioRuntime>(&outbound.request.body)
                .is_ok_and(|(append, _)| append.entries.iter().any(|entry| removes(&entry.payload)))
        {
            return Box::pin(async { Err(Error::new(ErrorKind::Unavailable, "kept")) });
        }
        outbound.send(tcp)
    }
}

/// The last that a removed leader does is to have its removal committed.
#[test]
fn a_leader_that_is_no_voter_any_more_changes_no_members() {
    run(async {
        let kept = Kept::default();
        let mut cluster = Cluster::blank(3).await;
        cluster.wrap = disturbed(kept.clone());
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let leader = cluster.leader().await;
        let id = cluster.node(leader).status().id;
        *kept.0.lock().expect("not poisoned") = Some(id.0);
        let node = cluster.node(leader);
        let removal = tokio::spawn(async move { node.remove_member(id).await });
        let role = |s: &crate::NodeStatus| s.members.iter().find(|m| m.id == id).map(|m| m.role);
        cluster.until(leader, |s| role(s) != Some(MemberRole::Voter)).await;
        let inner = cluster.node(leader).inner.clone();
        let running = inner.running().expect("it runs");
        let change = ChangeMembers::RemoveNodes([id.0].into());
        let error = inner.change_members_locked(&running, change, false).await.expect_err("it is none");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        *kept.0.lock().expect("not poisoned") = None;
        removal.await.expect("no panic").expect("removed");
        cluster.until(leader, |s| s.role == "removed").await;
        cluster.put((leader + 1) % 3, "after", "v").await.expect("written");
        cluster.finish().await;
    });
}

/// All come back under other addresses, and know that of one process, which cannot lead: it lacks the last writes. Those who can
/// know nobody else but by that one.
#[test]
fn members_that_all_come_back_elsewhere_find_each_other_by_one_that_they_know() {
    run(async {
        let mut cluster = Cluster::born(5).await;
        let first = cluster.leader().await;
        let seed = (first + 1) % 5;
        cluster.put(first, "k0", "v").await.expect("written");
        cluster.kill(seed).await;
        for k in 1..20 {
            cluster.put(first, &format!("k{k}"), "v").await.expect("written");
        }
        for i in (0..5).filter(|i| *i != seed) {
            cluster.kill(i).await;
        }
        cluster.move_all(seed).await;
        cluster.start_all().await;
        let leader = cluster.leader().await;
        cluster.put(leader, "k20", "v").await.expect("written");
        // It is written down, for those that start later and know nobody.
        let now = |status: &crate::NodeStatus| {
            let at = |cell: &Cell| status.members.iter().any(|m| m.name == cell.name && m.peer_address == cell.address);
            status.members.len() == 5 && cluster.cells.iter().all(at)
        };
        for i in 0..5 {
            cluster.until(i, now).await;
        }
        cluster.kill(seed).await;
        cluster.kill(leader).await;
        let next = cluster.leader().await;
        cluster.put(next, "k21", "v").await.expect("three of five");
        for k in 0..22 {
            let value = cluster.get(next, &format!("k{k}"), ReadLevel::Linearizable).await.expect("read");
            assert_eq!(value.as_deref(), Some(b"v".as_ref()), "k{k}");
        }
        cluster.finish().await;
    });
}
