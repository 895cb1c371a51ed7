//! Several groups in each of three processes.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use mainstay_engine::ClientToken;
use openraft::ChangeMembers;

use super::cluster::*;
use crate::{Durability, ErrorKind, MemberRole, Node, NodeId, ReadLevel, Write};

/// Once, whatever becomes of a connection.
pub(super) async fn put_in(node: &Node, key: &str, value: impl Into<Bytes> + Clone) {
    static CLIENTS: AtomicU64 = AtomicU64::new(1);
    let client = u128::from(CLIENTS.fetch_add(1, Ordering::Relaxed)).to_be_bytes();
    loop {
        let write = Write { body: put(key, value.clone()), durability: Durability::Quorum };
        match node.write_once(ClientToken { client, sequence: 1 }, write).await {
            Ok(applied) => break drop(applied.response.expect("a put is not refused")),
            Err(error) => assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::NotLeader), "{error}"),
        }
    }
}

pub(super) async fn get_in(node: &Node, key: &str) -> Option<String> {
    let snapshot = node.snapshot("main", ReadLevel::Linearizable).await.expect("a view");
    let value = snapshot.get(DEFAULT, key.as_bytes()).await.expect("read");
    value.map(|value| String::from_utf8(value.to_vec()).expect("text"))
}

pub(super) async fn group_of(cluster: &Cluster, i: usize, name: &str) -> Node {
    loop {
        match cluster.node(i).open_group(name).await {
            Ok(group) => break group,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
        }
        pause().await;
    }
}

pub(super) async fn until(node: &Node, what: impl Fn(&crate::NodeStatus) -> bool) {
    while !what(&node.status()) {
        pause().await;
    }
}

async fn leading(cluster: &Cluster, name: &str) -> Node {
    loop {
        for i in cluster.running().collect::<Vec<_>>() {
            let group = group_of(cluster, i, name).await;
            if group.status().role == "leader" {
                return group;
            }
        }
        pause().await;
    }
}

/// As a voter and nothing else, everywhere where one of `running` looks.
async fn votes(cluster: &Cluster, name: &str, ids: &[NodeId]) {
    for i in cluster.running().collect::<Vec<_>>() {
        if !ids.contains(&cluster.node(i).status().id) {
            continue;
        }
        let group = group_of(cluster, i, name).await;
        until(&group, |s| {
            let voters = s.members.iter().filter(|m| m.role == MemberRole::Voter).map(|m| m.id);
            s.members.len() == ids.len() && voters.eq(ids.iter().copied())
        })
        .await;
    }
}

#[test]
fn groups_have_nothing_in_common_but_the_process() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let leader = cluster.leader().await;
        for (through, name) in [(leader, "a"), ((leader + 1) % 3, "b")] {
            let group = cluster.node(through).create_group(name).await.expect("made");
            put_in(&group, "k", name).await;
        }
        put_in(&cluster.node(leader), "k", "first").await;
        // Again is nothing, and what nobody made is not there.
        let number = |node: &Node| node.inner.number;
        let a = group_of(&cluster, leader, "a").await;
        let again = cluster.node((leader + 2) % 3).create_group("a").await.expect("found");
        assert_eq!(number(&a), number(&again));
        let missing = cluster.node(leader).open_group("c").await.expect_err("nobody made it");
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert_eq!(cluster.node(leader).group_names(), ["a", "b"]);
        for refused in [a.create_group("d").await.err(), a.remove_member(NodeId(1)).await.err()] {
            assert_eq!(refused.map(|e| e.kind()), Some(ErrorKind::Unsupported), "through the first group alone");
        }
        drop((a, again));
        // The power fails everywhere at once.
        for round in 0..2 {
            for i in 0..3 {
                assert_eq!(get_in(&cluster.node(i), "k").await.as_deref(), Some("first"), "round {round} n{i}");
                for name in ["a", "b"] {
                    let group = group_of(&cluster, i, name).await;
                    assert_eq!(get_in(&group, "k").await.as_deref(), Some(name), "round {round} n{i}");
                }
            }
            if round == 0 {
                for i in 0..3 {
                    cluster.kill(i).await;
                }
                cluster.start_all().await;
            }
        }
        cluster.finish().await;
    });
}

#[test]
fn a_group_goes_on_with_any_two_of_three_and_a_wiped_member_gets_it_back() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let made = cluster.node(0).create_group("a").await.expect("made");
        let ids = [1, 2, 3].map(NodeId);
        votes(&cluster, "a", &ids).await;
        for n in 0..30 {
            put_in(&made, &format!("k{n}"), "before").await;
        }
        drop(made);
        let leader = group_of(&cluster, 0, "a").await.status().leader.expect("one led");
        let away = ids.iter().position(|id| *id == leader).expect("a member");
        cluster.wipe(away).await;
        let other = (away + 1) % 3;
        let group = group_of(&cluster, other, "a").await;
        until(&group, |s| s.leader.is_some_and(|now| now != leader)).await;
        put_in(&group, "k0", "after").await;
        drop(group);
        cluster.start(away).await;
        cluster.until(away, |s| s.role != "waiting" && s.id.0 > 64).await;
        let now = cluster.node(away).status().id;
        let mut stay: Vec<NodeId> = ids.into_iter().filter(|id| *id != leader).collect();
        stay.push(now);
        votes(&cluster, "a", &stay).await;
        // The one that was wiped holds it: with the third away it takes part in the majority.
        cluster.kill((away + 2) % 3).await;
        let group = group_of(&cluster, away, "a").await;
        until(&group, |s| s.leader.is_some_and(|leader| stay[..2].contains(&leader) || leader == now)).await;
        put_in(&group, "k1", "with the new one").await;
        assert_eq!(get_in(&group, "k0").await.as_deref(), Some("after"));
        assert_eq!(get_in(&group, "k29").await.as_deref(), Some("before"));
        drop(group);
        cluster.finish().await;
    });
}

/// Who was removed may be wiped at once.
#[test]
fn a_member_that_was_removed_has_no_vote_in_any_group() {
    run(async {
        let cluster = Cluster::born(4).await;
        let leader = cluster.leader().await;
        for name in ["a", "b"] {
            drop(cluster.node(leader).create_group(name).await.expect("made"));
        }
        // The one that leads the first group, and one more.
        for gone in [leader, (leader + 1) % 4] {
            let id = cluster.node(gone).status().id;
            let through = (leader + 2) % 4;
            while let Err(error) = cluster.node(through).remove_member(id).await {
                assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Indeterminate), "{error}");
                if cluster.node(through).status().members.iter().all(|member| member.id != id) {
                    break;
                }
            }
            for name in ["a", "b"] {
                let group = group_of(&cluster, through, name).await;
                let voters = group.status().members.into_iter().filter(|m| m.role == MemberRole::Voter);
                assert!(voters.map(|member| member.id).all(|voter| voter != id), "{name} without {id}");
            }
        }
        cluster.finish().await;
    });
}

/// The leader of a group was started again and did not know yet that the first group has a new member: it let go of that member, and took it in
/// again half a second later. The member took that for its removal, and stayed idle in the group for good.
#[test]
fn a_replica_that_its_group_has_let_go_takes_part_again_while_the_first_group_names_it() {
    run(async {
        let cluster = Cluster::born(3).await;
        drop(cluster.node(0).create_group("a").await.expect("made"));
        let ids = [1, 2, 3].map(NodeId);
        votes(&cluster, "a", &ids).await;
        // The one that leads it hears of its own removal.
        let gone = leading(&cluster, "a").await;
        let id = gone.status().id;
        let running = gone.inner.running().expect("it takes part");
        let stay = ids.into_iter().filter(|other| *other != id).map(|other| other.0).collect();
        gone.inner.change_members(&running, ChangeMembers::ReplaceAllVoters(stay), false).await.expect("let go");
        votes(&cluster, "a", &ids).await;
        put_in(&gone, "k", "again").await;
        assert_eq!(get_in(&gone, "k").await.as_deref(), Some("again"));
        drop((gone, running));
        cluster.finish().await;
    });
}

/// Whoever looks after a process sees the first group.
#[test]
fn a_process_serves_all_its_groups_or_none() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let leader = cluster.leader().await;
        let gone = (leader + 1) % 3;
        drop(cluster.node(leader).create_group("a").await.expect("made"));
        let group = group_of(&cluster, gone, "a").await;
        group.inner.leave_service("its tables cannot be written".into()).await;
        drop(group);
        cluster.until(gone, |s| s.role == "failed").await;
        let failure = cluster.node(gone).status().failure.expect("it says why");
        assert!(failure.contains("name=a: its tables cannot be written"), "{failure}");
        cluster.kill(gone).await;
        cluster.start(gone).await;
        let group = group_of(&cluster, gone, "a").await;
        put_in(&group, "k", "again").await;
        drop(group);
        cluster.finish().await;
    });
}
