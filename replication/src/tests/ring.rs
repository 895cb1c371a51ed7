//! What becomes of the log's ring while nothing is committed.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mainstay_engine::ClientToken;
use mainstay_io::BoxFuture;

use super::cluster::*;
use super::disturb::{Disturb, Outbound, Refuse, disturbed};
use super::groups::{group_of, put_in, until};
use crate::network::method;
use crate::{Durability, Envelope, ErrorKind, PeerAddress, ReadLevel, Result, TcpTransport, Write};

const VALUE_BYTES: usize = 4 << 10;

/// Three voters that do not get the entries of their leader, what switches that off, and the leader.
async fn held_up() -> (Cluster, Refuse, usize) {
    let held = Refuse::new(Outbound::has_entries);
    let mut cluster = Cluster::blank(3).await;
    cluster.wrap = disturbed(held.clone());
    // Whoever leads goes on leading, however busy the machine is: another leader would cut off what is durable on this one alone.
    cluster.election_timeout = Duration::from_secs(10);
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()).await.expect("born");
    let leader = cluster.leader().await;
    cluster.put(leader, "before", "v").await.expect("written");
    held.set(true);
    (cluster, held, leader)
}

fn used(cluster: &Cluster, i: usize) -> u64 {
    cluster.node(i).inner.engine.status().wal_used_bytes
}

/// Entries arrive again: what waited is committed, and the log is cut.
async fn goes_on(cluster: &Cluster, held: &Refuse) {
    held.set(false);
    let leader = cluster.leader().await;
    // Behind what is stuck, if anything is.
    cluster.put(leader, "after", "v").await.expect("written");
    for i in cluster.running() {
        while used(cluster, i) >= WAL_BYTES / 2 {
            pause().await;
        }
    }
}

/// Twice what the ring holds, all at once, each an entry of its own: once some can be committed, the log has to have room for the
/// rotation that lets it be cut.
#[test]
fn many_writes_at_once_leave_room_in_the_log_for_what_makes_room() {
    run(async {
        let (cluster, held, leader) = held_up().await;
        let writers: Vec<_> = (0..2 * WAL_BYTES / VALUE_BYTES as u64)
            .map(|n| {
                let node = cluster.node(leader);
                let write = Write { body: put(&format!("k{n}"), vec![7; VALUE_BYTES]), durability: Durability::Quorum };
                let token = ClientToken { client: (u128::from(n) + 1).to_be_bytes(), sequence: 1 };
                tokio::spawn(async move { node.write_once(token, write).await })
            })
            .collect();
        while !cluster.node(leader).inner.room.is_taken() {
            pause().await;
        }
        let full = used(&cluster, leader);
        assert!(full < WAL_BYTES / 8, "what is on the way is a part of the ring: {full}");
        goes_on(&cluster, &held).await;
        for writer in writers {
            let applied = writer.await.expect("no panic").expect("written in the end");
            applied.response.expect("not refused");
        }
        cluster.finish().await;
    });
}

/// Writes that nobody else has fill the log of a leader without a quorum up to a point; from there on they are refused.
#[test]
fn a_leader_without_a_quorum_keeps_room_in_its_log() {
    run(async {
        let (cluster, held, leader) = held_up().await;
        let mut written = 0;
        let refused = loop {
            match cluster.node(leader).write_local(put(&format!("k{written}"), vec![7; VALUE_BYTES])).await {
                Ok(_) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
        assert!(refused.to_string().contains("no quorum"), "{refused}");
        let full = used(&cluster, leader);
        assert!(full > WAL_BYTES / 8 * 5 && full <= WAL_BYTES / 8 * 7, "{full}");
        goes_on(&cluster, &held).await;
        let last = format!("k{}", written - 1);
        assert_eq!(
            cluster.get(leader, &last, ReadLevel::Linearizable).await.expect("read").map(|v| v.len()),
            Some(VALUE_BYTES)
        );
        cluster.finish().await;
    });
}

/// Followers with a quarter of the leader's ring, and installs that take their time: the entries that would fill the rings of the
/// followers wait before the leader's log, and not in it, where the installs would come behind them.
#[test]
fn rings_of_followers_that_are_smaller_keep_room_too() {
    run(async {
        // Nobody says which tables it made: each install waits for that.
        let undecided = Refuse::new(|outbound| outbound.request.method == method::DIGESTS);
        let mut cluster = Cluster::blank(3).await;
        cluster.wrap = disturbed(undecided.clone());
        cluster.memtable_bytes = 1 << 20;
        for i in 1..3 {
            cluster.cells[i].media = media(10 + i as u64);
            format_volume(&cluster.cells[i].media, WAL_BYTES / 4).await;
        }
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        cluster.lead(0).await;
        undecided.set(true);
        let writers: Vec<_> = (0..64_u64)
            .map(|w| {
                let node = cluster.node(0);
                tokio::spawn(async move {
                    for n in 0..WAL_BYTES / 2 / VALUE_BYTES as u64 / 64 {
                        let body = put(&format!("k{w}-{n}"), vec![7; VALUE_BYTES]);
                        let sequence = n + 1;
                        let token = ClientToken { client: (u128::from(w) + 1).to_be_bytes(), sequence };
                        // Held up for longer than a write waits: nothing was appended, so it is tried again.
                        while let Err(error) =
                            node.write_once(token, Write { body: body.clone(), durability: Durability::Quorum }).await
                        {
                            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.expect("no panic");
        }
        cluster.finish().await;
    });
}

/// Appends with entries to one node are never answered.
#[derive(Clone, Default)]
struct Unanswered(Arc<OnceLock<PeerAddress>>);

impl Disturb for Unanswered {
    fn call(&self, tcp: &TcpTransport, outbound: Outbound) -> BoxFuture<Result<Envelope>> {
        if self.0.get() == Some(&outbound.address) && outbound.has_entries() {
            return Box::pin(std::future::pending());
        }
        outbound.send(tcp)
    }
}

/// What a leader may not purge, since it is on its way to a follower, it purges when it is a follower itself.
#[test]
fn a_leader_that_could_not_cut_its_log_cuts_it_as_a_follower() {
    run(async {
        let unanswered = Unanswered::default();
        let mut cluster = Cluster::blank(3).await;
        cluster.memtable_bytes = 128 << 10;
        cluster.entry_cache_bytes = 64 << 10;
        cluster.wrap = disturbed(unanswered.clone());
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let leader = cluster.leader().await;
        let next = (leader + 1) % 3;
        unanswered.0.set(cluster.cells[(leader + 2) % 3].address.clone()).expect("once");
        let begin = cluster.put(leader, "before", "v").await.expect("written").0;
        for n in 0..400 {
            cluster.put(leader, &format!("k{n}"), vec![7; 1000]).await.expect("written");
        }
        // Not even when it is asked.
        let (inner, flushed) = (cluster.node(leader).inner.clone(), cluster.node(leader).inner.group.flushed());
        assert!(flushed.0 > begin + 200, "{flushed:?} of {begin}");
        inner.purge(flushed).await;
        assert!(inner.log.purged().is_none_or(|id| id.index < begin), "it is on its way to a follower");
        let id = cluster.node(next).status().id;
        cluster.node(leader).transfer_leader(Some(id)).await.expect("handed over");
        inner.purge(inner.group.flushed()).await;
        assert!(inner.log.purged().is_some_and(|id| id.index > begin), "nothing is on its way from here");
        cluster.finish().await;
    });
}

/// A member was away while more was written than entries may have of its ring, and what would let that be cut comes last. Nobody writes any
/// more, and the leader keeps all of it for the one that was away.
#[test]
fn a_follower_that_lacks_more_than_its_ring_takes_catches_up() {
    run(async {
        let ring = WAL_BYTES / 8;
        let mut cluster = Cluster::blank(3).await;
        // A quarter of the leader's ring is kept for members that lag: more than is written here.
        cluster.entry_cache_bytes = WAL_BYTES;
        cluster.memtable_bytes = WAL_BYTES;
        cluster.cells[2].media = media(12);
        format_volume(&cluster.cells[2].media, ring).await;
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        cluster.lead(0).await;
        cluster.kill(2).await;
        for n in 0..ring / 16 * 15 / VALUE_BYTES as u64 {
            cluster.put(0, &format!("k{n}"), vec![7; VALUE_BYTES]).await.expect("written");
        }
        let kept = cluster.node(0).inner.log.bytes_lacking(cluster.node(0).status().group.flushed.0);
        assert!(kept.is_some_and(|bytes| bytes > ring), "nothing behind that lets the log be cut: {kept:?}");
        cluster.start(2).await;
        let (id, leads) = (cluster.node(2).status().id.0, cluster.node(0).inner.clone());
        let lacks = || {
            let running = leads.running().expect("it leads");
            crate::node::Inner::metrics_of(&running, |m| crate::membership::lag_of(m, id))
        };
        while lacks() != Some(0) {
            pause().await;
        }
        // Without it there is no majority, so its ring has to take more.
        cluster.kill(1).await;
        for n in 0..ring / VALUE_BYTES as u64 {
            put_in(&cluster.node(0), &format!("l{n}"), vec![8; VALUE_BYTES]).await;
        }
        let value = cluster.get(2, "k0", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.map(|v| v.len()), Some(VALUE_BYTES));
        cluster.finish().await;
    });
}

/// A member with a small ring leads a group without a quorum until its ring is three quarters full, and follows in the first group until
/// nothing more fits. Each group lacks the entries that would let its part of the ring be cut; both go on all the same.
#[test]
fn a_ring_that_two_groups_have_filled_is_emptied() {
    run(async {
        // No entries of any group but the first arrive anywhere.
        let aside = Refuse::new(|outbound| outbound.request.method == method::GROUPED_IN_TURN);
        let ring = WAL_BYTES / 4;
        let mut cluster = Cluster::blank(3).await;
        cluster.wrap = disturbed(aside.clone());
        cluster.cells[2].media = media(12);
        format_volume(&cluster.cells[2].media, ring).await;
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        cluster.lead(0).await;
        drop(cluster.node(0).create_group("a").await.expect("made"));
        let (at_first, group) = (group_of(&cluster, 0, "a").await, group_of(&cluster, 2, "a").await);
        let id = cluster.node(2).status().id;
        until(&group, |s| s.leader.is_some()).await;
        if group.status().leader != Some(id) {
            at_first.transfer_leader(Some(id)).await.expect("handed over");
        }
        until(&group, |s| s.role == "leader").await;
        aside.set(true);
        let mut written = 0;
        while group.write_local(put(&format!("k{written}"), vec![7; VALUE_BYTES])).await.is_ok() {
            written += 1;
        }
        let lacks = || cluster.node(0).status().last_log.0.saturating_sub(cluster.node(2).status().last_log.0);
        for n in 0_u64.. {
            if let Err(error) = cluster.put(0, &format!("k{n}"), vec![8; VALUE_BYTES]).await {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            }
            // An eighth is kept from entries.
            if used(&cluster, 2) > ring / 8 * 7 - 4 * VALUE_BYTES as u64 && lacks() >= 60 {
                break;
            }
        }
        aside.set(false);
        let last = cluster.node(0).status().last_log;
        while cluster.node(2).status().group.applied < last || used(&cluster, 2) > ring / 2 {
            pause().await;
        }
        until(&at_first, |s| s.group.applied >= group.status().last_log).await;
        drop((at_first, group));
        cluster.finish().await;
    });
}

/// What a group keeps for followers that lag lies at the end of the ring: one that has come to rest does not hold up another that goes on.
#[test]
fn a_group_at_rest_keeps_nothing_of_the_ring() {
    run(async {
        let cluster = Cluster::born(3).await;
        let leader = cluster.leader().await;
        let group = cluster.node(leader).create_group("a").await.expect("made");
        for n in 0..8 {
            put_in(&group, &format!("k{n}"), vec![7; VALUE_BYTES]).await;
        }
        drop(group);
        for n in 0..3 * WAL_BYTES / (64 << 10) {
            cluster.put(leader, &format!("k{n}"), vec![8; 64 << 10]).await.expect("the log is cut behind both groups");
        }
        cluster.finish().await;
    });
}
