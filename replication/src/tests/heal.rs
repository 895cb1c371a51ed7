//! Rot of the log and of tables on running and stopped members of a cluster.

use mainstay_engine::CommandBody;

use openraft::storage::RaftLogReader;

use super::cluster::{Cluster, DEFAULT, WAL_BYTES, pause, put, run};
use super::disturb::{Outbound, Refuse, disturbed};
use crate::types::TypeConfig;
use crate::{Durability, ErrorKind, ReadLevel, TokioRuntime, Write};

/// Bytes of the header of a batch in the log.
const BATCH_HEADER_BYTES: u64 = 96;
/// Bytes of a record's header in the log.
pub(super) const RECORD_HEADER_BYTES: u64 = 24;

/// Where the payload of an entry's record lies on the disk of the log.
pub(super) fn place(cluster: &Cluster, i: usize, index: u64) -> u64 {
    let pos = cluster.node(i).inner.log.pos(index).expect("a durable entry");
    pos.batch.0 % WAL_BYTES + u64::from(pos.offset) + RECORD_HEADER_BYTES
}

/// Flips a bit of each entry on a node that is down; again to flip it back.
pub(super) fn rot(cluster: &Cluster, i: usize, places: &[u64]) {
    places.iter().for_each(|place| cluster.cells[i].media.wal_disk().flip_bit(*place, 2));
}

/// Writes, one entry after the other, and waits until all have them durable.
pub(super) async fn written(cluster: &Cluster, count: usize) -> u64 {
    let mut last = 0;
    for n in 0..count {
        last = cluster.put(0, &format!("k{n:03}"), format!("v{n}")).await.expect("written").0;
    }
    for i in cluster.running() {
        cluster.until(i, |s| s.last_log.0 >= last && s.group.applied.0 >= last).await;
    }
    last
}

pub(super) async fn all_there(cluster: &Cluster, count: usize) {
    for i in cluster.running() {
        cluster.node(i).read_barrier(ReadLevel::Linearizable).await.expect("a quorum");
        for n in 0..count {
            let value = cluster.get(i, &format!("k{n:03}"), ReadLevel::Local).await.expect("read");
            assert_eq!(value.as_deref(), Some(format!("v{n}").as_bytes()), "k{n:03} on n{i}");
        }
    }
}

pub(super) async fn takes_part(cluster: &Cluster, i: usize) {
    cluster.until(i, |s| s.leader.is_some() && s.role != "recovering").await;
}

#[test]
fn entries_that_rotted_on_one_member_are_fetched_before_it_takes_part() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let last = written(&cluster, 60).await;
        let ill = (cluster.leader().await + 1) % 3;
        let lost: Vec<u64> = vec![last - 40, last - 39, last - 20];
        let places: Vec<u64> = lost.iter().map(|index| place(&cluster, ill, *index)).collect();
        cluster.kill(ill).await;
        rot(&cluster, ill, &places);
        cluster.start(ill).await;
        takes_part(&cluster, ill).await;
        let status = cluster.node(ill).status();
        assert_eq!((status.log_heal.entries_lost, status.log_heal.entries_healed), (3, 3));
        all_there(&cluster, 60).await;
        for index in lost {
            let [mine, other] = [ill, (ill + 1) % 3].map(|i| cluster.node(i).inner.log.log_id(index));
            assert_eq!(mine, other, "entry {index}");
        }
        // The rot is still there, and what was fetched stands behind it.
        cluster.kill(ill).await;
        cluster.start(ill).await;
        takes_part(&cluster, ill).await;
        assert_eq!(cluster.node(ill).status().log_heal.entries_lost, 0);
        all_there(&cluster, 60).await;
        cluster.finish().await;
    });
}

#[test]
fn rot_of_all_members_at_different_places_loses_nothing() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let last = written(&cluster, 60).await;
        let places: Vec<Vec<u64>> =
            (0..3).map(|i| (0..4).map(|n| place(&cluster, i, last - 50 + 3 * n + i as u64)).collect()).collect();
        for (i, places) in places.iter().enumerate() {
            cluster.kill(i).await;
            rot(&cluster, i, places);
        }
        cluster.start_all().await;
        for i in 0..3 {
            takes_part(&cluster, i).await;
            assert_eq!(cluster.node(i).status().log_heal.entries_healed, 4, "n{i}");
        }
        all_there(&cluster, 60).await;
        cluster.put(0, "after", "x").await.expect("written");
        cluster.finish().await;
    });
}

#[test]
fn an_entry_that_rotted_everywhere_halts_the_cluster_and_is_named() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let last = written(&cluster, 30).await;
        let lost = last - 10;
        let places: Vec<u64> = (0..3).map(|i| place(&cluster, i, lost)).collect();
        for i in 0..3 {
            cluster.kill(i).await;
            rot(&cluster, i, &places[i..=i]);
        }
        cluster.start_all().await;
        for i in 0..3 {
            let named = |failure: &String| failure.contains(&format!("entry index={lost} damaged here and at every"));
            let status = cluster.until(i, |s| s.failure.as_ref().is_some_and(named)).await;
            assert_eq!((status.role.as_str(), status.leader), ("recovering", None));
        }
        // Nothing was made up: with one good copy brought back, everything is there.
        cluster.kill(1).await;
        rot(&cluster, 1, &places[1..=1]);
        cluster.start(1).await;
        for i in 0..3 {
            takes_part(&cluster, i).await;
        }
        all_there(&cluster, 30).await;
        cluster.finish().await;
    });
}

/// Two of three write, and then the third is there again, with the thirty writes of before.
async fn goes_on(mut cluster: Cluster, through: usize) {
    cluster.put(through, "after", "x").await.expect("written");
    cluster.start(2).await;
    takes_part(&cluster, 2).await;
    all_there(&cluster, 30).await;
    cluster.finish().await;
}

#[test]
fn a_member_with_a_hole_neither_votes_nor_leads_until_it_is_filled() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let last = written(&cluster, 30).await;
        let at = place(&cluster, 0, last - 10);
        for i in 0..3 {
            cluster.kill(i).await;
        }
        rot(&cluster, 0, &[at]);
        cluster.start(0).await;
        let term = {
            // Nobody is there to ask: it waits, by name of whom.
            let status =
                cluster.until(0, |s| s.failure.as_ref().is_some_and(|f| f.contains("waits for members"))).await;
            assert_eq!(status.role, "recovering");
            cluster.node(0).inner.log.ends().0.map(|vote| vote.leader_id.term)
        };
        assert!(cluster.node(0).inner.running().is_err(), "consensus does not run");
        assert!(cluster.node(0).read_barrier(ReadLevel::Linearizable).await.is_err());
        assert_eq!(cluster.node(0).inner.log.ends().0.map(|vote| vote.leader_id.term), term, "no vote was given");
        // One more is a majority, once the hole is filled from it.
        cluster.start(1).await;
        takes_part(&cluster, 0).await;
        goes_on(cluster, 0).await;
    });
}

/// What the log begins behind is lost on one member of two that are left, so that nobody can lead: the other one tells it, with an
/// entry that both have, whether the state there is in tables or nothing is.
#[test]
fn a_lost_beginning_of_a_log_is_told_by_a_member_that_cannot_lead_alone() {
    for flushed in [false, true] {
        run(async move {
            let mut cluster = Cluster::born(3).await;
            let last = written(&cluster, 30).await;
            if flushed {
                let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
                cluster.node(0).write(rotate).await.expect("rotates");
                for i in 0..3 {
                    cluster.until(i, |s| s.group.flushed.0 >= last && s.group.absent_jobs == 0).await;
                }
            }
            cluster.put(0, "k-behind", "x").await.expect("written");
            let at = place(&cluster, 0, 0);
            for i in 0..3 {
                cluster.kill(i).await;
            }
            rot(&cluster, 0, &[at]);
            cluster.start(0).await;
            cluster.until(0, |s| s.role == "recovering").await;
            cluster.start(1).await;
            takes_part(&cluster, 0).await;
            all_there(&cluster, 30).await;
            goes_on(cluster, 1).await;
        });
    }
}

/// Nothing is left of a log but the headers of its batches: what it held, and who the members are, only the others know.
#[test]
fn a_log_of_which_nothing_is_left_is_fetched_from_the_others() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        written(&cluster, 60).await;
        let ill = (cluster.leader().await + 1) % 3;
        let image = cluster.cells[ill].media.wal_disk().image();
        cluster.kill(ill).await;
        for block in image.written() {
            for at in (BATCH_HEADER_BYTES..4096).step_by(32) {
                cluster.cells[ill].media.wal_disk().flip_bit(block + at, 2);
            }
        }
        cluster.start(ill).await;
        takes_part(&cluster, ill).await;
        // Nothing is in tables anywhere: it is the log of the others that it gets.
        let healed = cluster.node(ill).status().log_heal.entries_healed;
        assert!(healed >= 60, "{healed} entries");
        all_there(&cluster, 60).await;
        cluster.put(ill, "after", "x").await.expect("written");
        cluster.finish().await;
    });
}

/// The end of a log that was closed in order is damaged: how much there was, and whether a vote, only the others know.
#[test]
fn a_lost_end_is_taken_from_the_most_complete_of_the_others() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let last = written(&cluster, 30).await;
        let ill = (cluster.leader().await + 1) % 3;
        let at = place(&cluster, ill, last);
        // Closed by itself: the engine marks the end of its log.
        cluster.cells[ill].stop_quietly().await;
        rot(&cluster, ill, &[at]);
        cluster.start(ill).await;
        takes_part(&cluster, ill).await;
        let others = (ill + 1) % 3;
        let id = |i: usize| cluster.node(i).inner.log.log_id(last);
        assert_eq!(id(ill), id(others));
        all_there(&cluster, 30).await;
        cluster.finish().await;
    });
}

/// An old entry is read for a follower that lacks it; here by hand, since when openraft reads is its own affair.
#[test]
fn an_entry_that_rots_while_the_node_runs_is_read_from_another_member() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.entry_cache_bytes = 1;
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let last = written(&cluster, 40).await;
        let leader = cluster.leader().await;
        let index = last - 20;
        let at = place(&cluster, leader, index);
        rot(&cluster, leader, &[at]);
        let mut log = cluster.node(leader).inner.log.clone();
        for _ in 0..2 {
            let read = RaftLogReader::<TypeConfig<TokioRuntime>>::limited_get_log_entries(&mut log, index, index + 2);
            let entries = read.await.expect("another member has it");
            let ids: Vec<u64> = entries.iter().map(|entry| entry.log_id.index).collect();
            assert_eq!(ids, [index, index + 1]);
            // The second time it is read from where it was written again.
            let healed = cluster.node(leader).status().log_heal;
            assert_eq!((healed.entries_lost, healed.entries_healed), (1, 1));
        }
        cluster.kill(leader).await;
        cluster.start(leader).await;
        takes_part(&cluster, leader).await;
        assert_eq!(cluster.node(leader).status().log_heal.entries_lost, 0);
        all_there(&cluster, 40).await;
        cluster.finish().await;
    });
}

/// What is before it waited ten seconds for it, and was then not read either.
#[test]
fn entries_before_a_damaged_one_are_read_without_it() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.entry_cache_bytes = 1;
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let last = written(&cluster, 40).await;
        let i = cluster.leader().await;
        let index = last - 20;
        rot(&cluster, i, &[place(&cluster, i, index)]);
        let mut log = cluster.node(i).inner.log.clone();
        for (from, expect) in [(index - 2, vec![index - 2, index - 1]), (index, vec![index, index + 1])] {
            let read = RaftLogReader::<TypeConfig<TokioRuntime>>::limited_get_log_entries(&mut log, from, index + 2);
            let ids: Vec<u64> = read.await.expect("read").iter().map(|entry| entry.log_id.index).collect();
            assert_eq!(ids, expect);
            assert_eq!(cluster.node(i).status().log_heal.entries_lost, u64::from(from == index));
        }
        cluster.finish().await;
    });
}

/// It left service for good: nobody could give the entry, since nobody else had ever had it. Of a hundred thousand single faults two were of this kind.
#[test]
fn a_leader_that_lost_an_entry_which_nobody_else_has_lets_another_lead() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.entry_cache_bytes = 1;
        let held = Refuse::new(Outbound::has_entries);
        cluster.wrap = disturbed(held.clone());
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        written(&cluster, 40).await;
        let leader = cluster.leader().await;
        held.set(true);
        let mut tokens = Vec::new();
        for n in 0..20 {
            tokens.push(cluster.node(leader).write_local(put(&format!("own{n}"), "x")).await.expect("durable here"));
        }
        let lost = tokens[0].index.0;
        let at = place(&cluster, leader, lost);
        rot(&cluster, leader, &[at]);
        held.set(false);
        let id = cluster.node(leader).status().id;
        let other = (leader + 1) % 3;
        // It may have been read before it rotted, and be on its way to one of them, from which the leader then has it again.
        cluster.until(other, |s| s.leader.is_some_and(|leads| leads != id) || s.group.applied.0 >= lost).await;
        // Without anybody's help it follows, with the entries of the others.
        let last = loop {
            match cluster.put(leader, "after", "x").await {
                Ok(at) => break at.0,
                // Leadership may move once more meanwhile.
                Err(error) => assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}"),
            }
        };
        cluster.until(leader, |s| s.group.applied.0 >= last).await;
        let ids = [leader, other].map(|i| cluster.node(i).inner.log.log_id(lost));
        assert!(ids[0].is_some() && ids[0] == ids[1], "{ids:?}");
        // It may have been on its way: then it is everywhere, and else nowhere.
        let mut found = Vec::new();
        for i in 0..3 {
            found.push(cluster.get(i, "own0", ReadLevel::Linearizable).await.expect("read"));
        }
        assert!(found.iter().all(|value| *value == found[0]), "{found:?}");
        all_there(&cluster, 40).await;
        cluster.finish().await;
    });
}

#[test]
fn a_damaged_table_is_served_by_another_member_and_made_anew() {
    run(async {
        let cluster = Cluster::born_with(3, 8 << 10).await;
        let last = written(&cluster, 60).await;
        let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
        cluster.node(0).write(rotate).await.expect("rotates");
        for i in 0..3 {
            cluster.until(i, |s| s.group.flushed.0 >= last && s.group.absent_jobs == 0).await;
        }
        let ill = (cluster.leader().await + 1) % 3;
        let disk = cluster.cells[ill].media.extents_disk().clone();
        // Everything below 64 MiB that was ever written, manifest pages too: they are in memory, and are written again.
        disk.damage(0, disk.allocated());
        all_there(&cluster, 60).await;
        let healed = loop {
            let heal = cluster.node(ill).inner.engine.status().heal;
            if heal.tables_healed > 0 && heal.tables_damaged == 0 {
                break heal;
            }
            pause().await;
        };
        assert!(healed.reads_served > 0 && healed.tables_found > 0, "{healed:?}");
        let snapshot = cluster.node(ill).snapshot("main", ReadLevel::Local).await.expect("a view");
        let value = snapshot.get(DEFAULT, b"k007").await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v7".as_ref()));
        cluster.finish().await;
    });
}

/// Memory of a leader that is not what the log says: its tables are the ones that differ, and the log never names them.
#[test]
fn a_leader_whose_tables_differ_gives_up_leading_and_takes_those_of_the_majority() {
    run(async {
        let cluster = Cluster::born(3).await;
        let last = written(&cluster, 30).await;
        let odd = cluster.leader().await;
        assert!(mainstay_engine::hooks::fault::disturb(cluster.node(odd).group(), b"k-nobody-wrote", b"wrong"));
        let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
        cluster.node(0).write(rotate).await.expect("rotates");
        cluster.until(odd, |s| s.group.divergences == 1).await;
        for i in 0..3 {
            cluster.until(i, |s| s.group.flushed.0 >= last && !s.group.diverged && s.group.absent_jobs == 0).await;
        }
        let digests: Vec<_> = (0..3).map(|i| cluster.node(i).status().group.digest).collect();
        assert!(digests.iter().all(|digest| *digest == digests[0]));
        for i in 0..3 {
            assert_eq!(cluster.node(i).status().group.divergences, u64::from(i == odd), "n{i}");
            let value = cluster.get(i, "k-nobody-wrote", ReadLevel::Local).await.expect("read");
            assert_eq!(value, None, "n{i}");
        }
        all_there(&cluster, 30).await;
        cluster.finish().await;
    });
}

/// Of two replicas neither is a majority: the leader's tables count, and nobody waits for a third opinion.
#[test]
fn of_two_replicas_whose_tables_differ_the_follower_takes_those_of_the_leader() {
    run(async {
        let cluster = Cluster::born(2).await;
        let last = written(&cluster, 30).await;
        let odd = 1 - cluster.leader().await;
        assert!(mainstay_engine::hooks::fault::disturb(cluster.node(odd).group(), b"k-nobody-wrote", b"wrong"));
        let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
        cluster.node(0).write(rotate).await.expect("rotates");
        cluster.until(odd, |s| s.group.divergences == 1 && !s.group.diverged && s.group.flushed.0 >= last).await;
        let digests = [0, 1].map(|i| cluster.node(i).status().group.digest);
        assert_eq!(digests[0], digests[1]);
        let value = cluster.get(odd, "k-nobody-wrote", ReadLevel::Local).await.expect("read");
        assert_eq!(value, None);
        cluster.finish().await;
    });
}

/// The same of a follower: it leaves service and comes back with the leader's tables.
#[test]
fn a_follower_whose_tables_differ_leaves_service_and_returns() {
    run(async {
        let cluster = Cluster::born(3).await;
        let last = written(&cluster, 30).await;
        let odd = (cluster.leader().await + 1) % 3;
        assert!(mainstay_engine::hooks::fault::disturb(cluster.node(odd).group(), b"k-nobody-wrote", b"wrong"));
        let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
        cluster.node(0).write(rotate).await.expect("rotates");
        cluster.until(odd, |s| s.group.divergences == 1 && !s.group.diverged && s.group.flushed.0 >= last).await;
        let value = cluster.get(odd, "k-nobody-wrote", ReadLevel::Local).await.expect("read");
        assert_eq!(value, None);
        assert!(cluster.node(odd).inner.engine.status().heal.tables_fetched > 0);
        all_there(&cluster, 30).await;
        cluster.finish().await;
    });
}
