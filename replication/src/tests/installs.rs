//! Snapshots whose giver goes, or is one that the receiver has never heard of.

use mainstay_engine::CommandBody;

use super::cluster::*;
use super::disturb::{Outbound, Refuse, disturbed};
use crate::network::method;
use crate::types::term_of;
use crate::{Durability, ReadLevel, Write};

const KEYS: u64 = 3000;

/// A cluster of the first three of `count` nodes, with logs that keep little, and what withholds tables.
async fn cluster_of(count: usize) -> (Cluster, Refuse) {
    let withheld = Refuse::new(|outbound| outbound.request.method == method::TABLE_READ);
    let mut cluster = Cluster::blank(count).await;
    cluster.memtable_bytes = 128 << 10;
    cluster.entry_cache_bytes = 64 << 10;
    cluster.wrap = disturbed(withheld.clone());
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()[..3]).await.expect("born");
    (cluster, withheld)
}

/// Writes until the leader keeps none of the entries that `cluster.cells[away]`, which is dead, had last.
async fn leave_behind(cluster: &Cluster, leader: usize, last: u64) {
    for k in 0..KEYS {
        cluster.put(leader, &format!("k{k:06}"), vec![(k % 251) as u8; 1000]).await.expect("written");
    }
    while cluster.node(leader).inner.log.purged().is_none_or(|id| id.index <= last) {
        pause().await;
    }
}

async fn until_it_installs(cluster: &Cluster, i: usize) {
    while cluster.node(i).inner.install.lock().expect("not poisoned").is_none() {
        pause().await;
    }
}

async fn reads_all(cluster: &Cluster, i: usize) {
    for k in 0..KEYS {
        let value = cluster.get(i, &format!("k{k:06}"), ReadLevel::Local).await.expect("read");
        assert_eq!(value.as_deref(), Some([(k % 251) as u8; 1000].as_slice()), "k{k:06}");
    }
}

/// The vote of the receiver is needed for there to be a leader again, and openraft gives none while it installs.
#[test]
fn an_install_whose_leader_is_gone_for_good_ends_with_the_tables_of_another() {
    run(async {
        let (mut cluster, withheld) = cluster_of(3).await;
        let leader = cluster.leader().await;
        let (away, other) = ((leader + 1) % 3, (leader + 2) % 3);
        let last = cluster.node(away).status().last_log.0;
        cluster.kill(away).await;
        leave_behind(&cluster, leader, last).await;
        let of_leader = cluster.until(leader, |s| s.group.frozen_generations == 0).await.group.flushed;
        cluster.until(other, |s| s.group.flushed >= of_leader).await;

        withheld.set(true);
        cluster.start(away).await;
        until_it_installs(&cluster, away).await;
        cluster.kill(leader).await;
        withheld.set(false);

        let next = cluster.leader().await;
        assert_ne!(next, leader);
        cluster.put(other, "after", "v").await.expect("written by the two that are left");
        let value = cluster.get(away, "after", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v".as_ref()));
        reads_all(&cluster, away).await;
        cluster.finish().await;
    });
}

/// openraft counts what a snapshot covers as purged from the moment that its install begins. The log is not cut by that before the
/// tables are there: a crash in between would find tables and a log that do not meet.
#[test]
fn a_log_that_is_cut_during_an_install_reaches_back_to_the_tables() {
    run(async {
        let (mut cluster, withheld) = cluster_of(3).await;
        for k in 0..40 {
            cluster.put(0, &format!("k{k:06}"), vec![1; 1000]).await.expect("written");
        }
        let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
        cluster.node(0).write(rotate).await.expect("rotates");
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        let flushed = cluster.until(away, |s| s.group.flushed.0 > 0).await.group.flushed;
        for k in 0..20 {
            cluster.put(0, &format!("k{k:06}"), vec![1; 1000]).await.expect("written");
        }
        let last = cluster.node(away).status().last_log.0;
        cluster.kill(away).await;
        leave_behind(&cluster, leader, last).await;
        withheld.set(true);
        cluster.start(away).await;
        until_it_installs(&cluster, away).await;
        let node = cluster.node(away);
        let covered = || async {
            let running = node.inner.running().expect("it takes part");
            running.raft.with_raft_state(|state| state.log_ids.purged().map(|id| id.index)).await.expect("runs")
        };
        while covered().await.is_none_or(|index| index <= last) {
            pause().await;
        }
        node.inner.purge(flushed).await;
        let purged = node.inner.log.purged().map_or(0, |id| id.index);
        assert!(purged <= flushed.0, "purged {purged} of what is in tables up to {flushed}");
        drop(node);
        cluster.kill(away).await;
        withheld.set(false);
        cluster.start(away).await;
        cluster.put(away, "after", "v").await.expect("written");
        cluster.get(away, "after", ReadLevel::Linearizable).await.expect("read");
        reads_all(&cluster, away).await;
        cluster.finish().await;
    });
}

/// Its membership is behind the end of the receiver's log, and in front of the snapshot's.
#[test]
fn an_install_ends_when_the_leader_became_a_member_meanwhile() {
    run(async {
        let (mut cluster, withheld) = cluster_of(4).await;
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        let last = cluster.node(away).status().last_log.0;
        cluster.kill(away).await;
        leave_behind(&cluster, leader, last).await;
        let added = cluster.node(leader).add_member("n3", cluster.cells[3].address.clone(), true).await.expect("added");
        cluster.node(leader).transfer_leader(Some(added.id)).await.expect("handed over");
        let known = |c: &Cluster| c.node(away).inner.member(added.id).is_some();

        withheld.set(true);
        cluster.start(away).await;
        until_it_installs(&cluster, away).await;
        assert!(!known(&cluster), "the story is of a giver that is not known");
        withheld.set(false);

        cluster.put(3, "after", "v").await.expect("written");
        let value = cluster.get(away, "after", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v".as_ref()));
        cluster.until(away, |s| s.members.iter().any(|m| m.id == added.id)).await;
        reads_all(&cluster, away).await;
        cluster.finish().await;
    });
}

/// A leader without followers wrote much, another one a little, which nobody else has; then the first leads again, and what it
/// offers ends in its first term, before that of the other but far beyond it.
#[test]
fn entries_of_a_later_term_make_way_for_a_snapshot_that_goes_beyond_them() {
    run(async {
        let held = Refuse::new(Outbound::has_entries);
        let mut cluster = Cluster::blank(3).await;
        cluster.entry_cache_bytes = 64 << 10;
        cluster.wrap = disturbed(held.clone());
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let leader = cluster.leader().await;
        let first = cluster.put(leader, "before", "v").await.expect("written").0;
        for i in cluster.running() {
            cluster.until(i, |s| s.group.applied.0 >= first).await;
        }
        held.set(true);
        for k in 0..400 {
            cluster.node(leader).write_local(put(&format!("k{k:06}"), vec![7; 1000])).await.expect("here");
        }
        cluster.node(leader).write_local(CommandBody::Rotate).await.expect("here");
        // Not in tables, so the snapshot ends before it.
        cluster.node(leader).write_local(put("behind", "v")).await.expect("here");
        let term = cluster.node(leader).status().term;
        cluster.kill(leader).await;
        let other = cluster.leader().await;
        let deposed = cluster.until(other, |s| s.last_log.0 > first && s.term > term).await;
        while cluster.node(other).inner.log.pos(deposed.last_log.0).is_none() {
            pause().await;
        }
        for i in cluster.running().collect::<Vec<_>>() {
            cluster.kill(i).await;
        }
        held.set(false);
        cluster.start(leader).await;
        cluster.start((0..3).find(|i| ![leader, other].contains(i)).expect("three")).await;
        assert_eq!(cluster.leader().await, leader, "nobody else has its entries");
        let purged = |c: &Cluster| c.node(leader).inner.log.purged();
        while purged(&cluster).is_none_or(|id| id.index <= deposed.last_log.0) {
            pause().await;
        }
        assert_eq!(purged(&cluster).map(|id| term_of(&id)), Some(term));
        cluster.start(other).await;
        let value = cluster.get(other, "k000399", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.map(|v| v.len()), Some(1000));
        assert_ne!(cluster.node(other).status().fetched_bytes, 0);
        cluster.finish().await;
    });
}
