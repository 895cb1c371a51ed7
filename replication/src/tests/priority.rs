//! Leadership goes to the voter of the highest priority, and only to one that can lead.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_io::BoxFuture;

use super::cluster::*;
use super::disturb::{Disturb, Outbound, disturbed};
use super::members::write_on;
use crate::{Envelope, Error, ErrorKind, Node, NodeId, PeerAddress, ReadLevel, Result, TcpTransport};

/// Where no entries arrive, while everything else does.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<Option<PeerAddress>>>);

impl Disturb for Held {
    fn call(&self, tcp: &TcpTransport, outbound: Outbound) -> BoxFuture<Result<Envelope>> {
        let held = self.0.lock().expect("not poisoned").as_ref() == Some(&outbound.address);
        if held && outbound.has_entries() {
            return Box::pin(async { Err(Error::new(ErrorKind::Unavailable, "held")) });
        }
        outbound.send(tcp)
    }
}

/// Three voters of which the first is preferred and the second would be next.
async fn ranked() -> Cluster {
    let mut cluster = Cluster::blank(3).await;
    cluster.priorities = vec![9, 3, 0];
    cluster.memtable_bytes = 256 << 10;
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()).await.expect("born");
    cluster
}

fn hand_overs(cluster: &Cluster) -> u64 {
    cluster.running().map(|i| cluster.node(i).status().priority_hand_overs).sum()
}

fn id_of(cluster: &Cluster, i: usize) -> NodeId {
    cluster.node(i).status().id
}

/// Longer than a leader that nobody asked to lead waits, with several looks behind it.
async fn several_looks() {
    tokio::time::sleep(crate::disk::LED_MIN + Duration::from_secs(4)).await;
}

/// Waits until the writer has had another fifty entries applied.
async fn goes_on(cluster: &Cluster) {
    let applied = cluster.node(1).status().group.applied.0;
    cluster.until(1, |s| s.group.applied.0 >= applied + 50).await;
}

/// Gives node `i` the priority, by a change of the membership that the leader is asked for.
async fn prefer(cluster: &Cluster, leader: usize, i: usize, priority: u8) {
    let id = id_of(cluster, i);
    cluster.node(leader).set_member_priority(id, priority).await.expect("changed");
    cluster.until(leader, |s| s.members.iter().any(|m| m.id == id && m.priority == priority)).await;
}

#[test]
fn leadership_returns_to_the_preferred_one_after_its_crash_and_nothing_is_lost() {
    run(async {
        let mut cluster = ranked().await;
        let preferred = id_of(&cluster, 0);
        cluster.until(1, |s| s.leader == Some(preferred)).await;
        let status = cluster.until(2, |s| s.members.len() == 3 && s.leader == Some(preferred)).await;
        assert_eq!(status.members.iter().map(|m| m.priority).collect::<Vec<_>>(), [9, 3, 0]);
        let stop = Arc::new(AtomicBool::new(false));
        let members: Vec<Node> = (1..3).map(|i| cluster.node(i)).collect();
        let writer = tokio::spawn(write_on(members, stop.clone()));
        cluster.kill(0).await;
        cluster.until(1, |s| s.leader.is_some_and(|leader| leader != preferred)).await;
        goes_on(&cluster).await;
        cluster.start(0).await;
        cluster.until(1, |s| s.leader == Some(preferred)).await;
        assert_eq!(cluster.until(0, |s| s.role == "leader").await.leader, Some(preferred));
        while hand_overs(&cluster) == 0 {
            pause().await;
        }
        goes_on(&cluster).await;
        stop.store(true, Ordering::Relaxed);
        let acknowledged = writer.await.expect("the writer ends");
        assert!(acknowledged.len() > 100, "{} writes were acknowledged", acknowledged.len());
        for i in 0..3 {
            for key in &acknowledged {
                let value = cluster.get(i, key, ReadLevel::Linearizable).await.expect("read");
                assert_eq!(value.as_deref(), Some(b"v".as_ref()), "{key} at n{i}");
            }
        }
        cluster.finish().await;
    });
}

/// Nobody asked the leader to lead, so it waits for nothing but a better one.
#[test]
fn a_preferred_one_on_a_full_disk_leads_once_there_is_space() {
    run(async {
        let cluster = Cluster::born_with(3, 256 << 10).await;
        let leader = cluster.leader().await;
        let preferred = (leader + 1) % 3;
        let disk = cluster.cells[preferred].media.extents_disk().clone();
        disk.set_space(Some(disk.allocated()));
        for n in 0.. {
            if cluster.node(preferred).status().disk.full {
                break;
            }
            cluster.put(leader, &format!("k{n}"), vec![7; 16 << 10]).await.expect("the leader has space");
        }
        prefer(&cluster, leader, preferred, 1).await;
        several_looks().await;
        assert_ne!(cluster.node(preferred).status().role, "leader", "a full one is not given leadership");
        assert_eq!(hand_overs(&cluster), 0);
        disk.set_space(None);
        let id = id_of(&cluster, preferred);
        // What is applied has it look whether there is space.
        for n in 0.. {
            if cluster.node(leader).status().leader == Some(id) {
                break;
            }
            cluster.put(leader, &format!("l{n}"), "v").await.expect("written while it moves");
            pause().await;
        }
        while hand_overs(&cluster) == 0 {
            pause().await;
        }
        cluster.finish().await;
    });
}

#[test]
fn a_preferred_one_that_lags_leads_once_it_has_caught_up() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        for (seed, cell) in cluster.cells.iter_mut().enumerate() {
            // What it lacks stays in the log: half full, that would be cut, and the one that lags be sent tables.
            cell.media = media(seed as u64);
            format_volume(&cell.media, 4 * WAL_BYTES).await;
        }
        let held = Held::default();
        cluster.wrap = disturbed(held.clone());
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let leader = cluster.leader().await;
        let preferred = (leader + 1) % 3;
        let id = id_of(&cluster, preferred);
        *held.0.lock().expect("not poisoned") = Some(cluster.cells[preferred].address.clone());
        for n in 0..crate::disk::LAG_MAX + 100 {
            cluster.put(leader, &format!("k{n}"), "v").await.expect("a majority has it");
        }
        prefer(&cluster, leader, preferred, 1).await;
        several_looks().await;
        // Whoever leads by now: a machine that is busy elsewhere may have had an election.
        let (has, lacks) = (cluster.node(leader).status().last_log.0, cluster.node(preferred).status().last_log.0);
        assert!(has > lacks + crate::disk::LAG_MAX, "{has} {lacks}");
        assert_ne!(cluster.node(preferred).status().role, "leader", "one that lags is not given leadership");
        assert_eq!(hand_overs(&cluster), 0);
        *held.0.lock().expect("not poisoned") = None;
        cluster.until(leader, |s| s.leader == Some(id)).await;
        while hand_overs(&cluster) == 0 {
            pause().await;
        }
        cluster.finish().await;
    });
}

#[test]
fn a_wish_of_an_operator_stands_against_a_higher_priority() {
    run(async {
        let cluster = ranked().await;
        let preferred = id_of(&cluster, 0);
        cluster.until(2, |s| s.leader == Some(preferred)).await;
        let wished = id_of(&cluster, 2);
        assert_eq!(cluster.node(1).transfer_leader(Some(wished)).await.expect("handed over"), wished);
        let term = cluster.until(2, |s| s.role == "leader").await.term;
        several_looks().await;
        let status = cluster.node(1).status();
        assert_eq!((status.leader, status.term), (Some(wished), term));
        // With the node that was asked the wish is over.
        let mut cluster = cluster;
        cluster.kill(2).await;
        cluster.until(1, |s| s.leader == Some(preferred)).await;
        cluster.finish().await;
    });
}

/// It was the one that lacked least, and of equals the first, whatever the priorities: with an orderly restart leadership went to any
/// of the others, and came back a minute later.
#[test]
fn a_leader_that_goes_hands_over_to_the_preferred_one() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.priorities = vec![0, 3, 9];
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let [_, second, preferred] = [0, 1, 2].map(|i| id_of(&cluster, i));
        cluster.node(0).transfer_leader(Some(preferred)).await.expect("handed over");
        cluster.put(2, "k", "v").await.expect("written");
        // Once a leader has heard from both, neither lacks anything and only the priority tells them apart.
        let all_near =
            |s: &crate::NodeStatus| s.role == "leader" && s.lag.len() >= 2 && s.lag.values().all(|lag| *lag == 0);
        cluster.until(2, all_near).await;
        // Asked to go without a target.
        assert_eq!(cluster.node(2).transfer_leader(None).await.expect("handed over"), second);
        let term = cluster.until(1, all_near).await.term;
        // Closed.
        cluster.stop(1).await;
        let next = cluster.until(0, |s| s.leader.is_some_and(|leader| leader != second)).await;
        assert_eq!((next.leader, next.term), (Some(preferred), term + 1), "one election, by request");
        cluster.finish().await;
    });
}
