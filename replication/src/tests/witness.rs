//! A voter that keeps the log and no tables.

use mainstay_engine::CommandBody;

use super::cluster::*;
use super::groups::{get_in, group_of, put_in, until};
use crate::{Durability, ErrorKind, MemberRole, Node, ReadLevel, Write};

const WITNESS: usize = 2;

/// Two members with data and a witness, with small memtables.
async fn two_and_a_witness() -> Cluster {
    let mut cluster = Cluster::blank(3).await;
    cluster.memtable_bytes = 64 << 10;
    cluster.entry_cache_bytes = 64 << 10;
    cluster.witnesses = vec![WITNESS];
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()).await.expect("born");
    // With the identity the connections of before go.
    for i in 0..3 {
        cluster.until(i, |s| s.leader.is_some()).await;
    }
    cluster
}

async fn write_many(cluster: &Cluster, through: usize, names: std::ops::Range<usize>, bytes: usize) -> u64 {
    let mut last = 0;
    for n in names {
        last = cluster.put(through, &format!("k{n:04}"), vec![n as u8; bytes]).await.expect("written").0;
    }
    last
}

async fn check_all(cluster: &Cluster, i: usize, names: std::ops::Range<usize>, bytes: usize) {
    for n in names {
        let value = cluster.get(i, &format!("k{n:04}"), ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(vec![n as u8; bytes].as_slice()), "k{n:04} on n{i}");
    }
}

#[test]
fn a_witness_votes_and_holds_no_data() {
    run(async {
        let mut cluster = two_and_a_witness().await;
        let last = write_many(&cluster, WITNESS, 0..60, 2000).await;
        let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
        cluster.node(0).write(rotate).await.expect("rotates");
        let status = cluster.until(WITNESS, |s| s.group.applied.0 >= last).await;
        assert_eq!((status.group.tables, status.role.as_str()), (0, "follower"));
        assert_eq!(status.members.iter().filter(|m| m.witness).count(), 1);
        for i in 0..2 {
            cluster.until(i, |s| s.group.flushed.0 >= last && s.group.tables > 0).await;
            check_all(&cluster, i, 50..60, 2000).await;
        }
        for level in [ReadLevel::Linearizable, ReadLevel::Local, ReadLevel::Lease] {
            let error = cluster.node(WITNESS).read_barrier(level).await.expect_err("it has nothing");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        }
        // With the leader gone its vote makes the other one leader, and what both acknowledge is committed.
        let leader = cluster.leader().await;
        assert_ne!(leader, WITNESS);
        cluster.kill(leader).await;
        let other = 1 - leader;
        write_many(&cluster, other, 60..70, 100).await;
        assert_eq!(cluster.leader().await, other);
        check_all(&cluster, other, 60..70, 100).await;
        cluster.start(leader).await;
        check_all(&cluster, leader, 60..70, 100).await;
        assert!(cluster.node(leader).transfer_leader(Some(status.id)).await.is_err(), "it is no heir");
        cluster.finish().await;
    });
}

/// What only the leader and the witness have is not lost with the leader: the witness leads until the other has it, and no longer.
#[test]
fn a_witness_brings_the_other_up_to_what_it_has_acknowledged() {
    run(async {
        let mut cluster = two_and_a_witness().await;
        write_many(&cluster, 0, 0..5, 100).await;
        let leader = cluster.leader().await;
        let other = 1 - leader;
        cluster.kill(other).await;
        write_many(&cluster, leader, 5..40, 2000).await;
        cluster.kill(leader).await;
        cluster.start(other).await;
        // Only with what the witness has can it lead, and acknowledge.
        write_many(&cluster, other, 40..41, 2000).await;
        assert_eq!(cluster.leader().await, other);
        check_all(&cluster, other, 5..41, 2000).await;
        cluster.start(leader).await;
        check_all(&cluster, leader, 5..41, 2000).await;
        cluster.finish().await;
    });
}

#[test]
fn a_witness_that_was_away_goes_on_behind_what_is_in_tables_elsewhere() {
    run(async {
        let mut cluster = two_and_a_witness().await;
        write_many(&cluster, 0, 0..5, 100).await;
        let before = cluster.node(WITNESS).status().last_log;
        cluster.kill(WITNESS).await;
        // More than the tail that is kept for it.
        write_many(&cluster, 0, 5..200, 4000).await;
        let leader = cluster.leader().await;
        while cluster.node(leader).inner.log.purged().is_none_or(|purged| purged.index <= before.0) {
            write_many(&cluster, 0, 200..210, 4000).await;
        }
        for round in 0..2 {
            cluster.start(WITNESS).await;
            let last = write_many(&cluster, WITNESS, 210..215, 100).await;
            cluster.until(WITNESS, |s| s.group.applied.0 >= last && s.group.tables == 0).await;
            assert_eq!(cluster.node(WITNESS).status().fetched_bytes, 0, "round {round}");
            // Its vote counts: one of the others is enough beside it.
            let other = 1 - cluster.leader().await;
            cluster.kill(other).await;
            write_many(&cluster, cluster.leader().await, 215..220, 100).await;
            cluster.start(other).await;
            check_all(&cluster, other, 215..220, 100).await;
            cluster.kill(WITNESS).await;
        }
        cluster.finish().await;
    });
}

/// Its ring is cut behind what it has applied, though nothing of it is ever flushed.
#[test]
fn the_log_of_a_witness_is_cut() {
    run(async {
        let cluster = two_and_a_witness().await;
        let mut written = 0;
        while cluster.node(WITNESS).inner.engine.wal().start().0 == 0 {
            write_many(&cluster, 0, written..written + 20, 16 << 10).await;
            written += 20;
            assert!(written < 2000, "four times the ring");
        }
        let used = cluster.node(WITNESS).inner.engine.status().wal_used_bytes;
        assert!((WAL_BYTES / 4..=WAL_BYTES / 4 * 3).contains(&used), "it keeps what its ring takes: {used}");
        cluster.finish().await;
    });
}

#[test]
fn witnesses_are_a_minority_and_stay_what_they_are() {
    run(async {
        let mut cluster = Cluster::blank(4).await;
        cluster.witnesses = vec![1, WITNESS];
        cluster.start_all().await;
        let names = cluster.names();
        let error = cluster.node(0).init(&names[..3]).await.expect_err("two of three");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let born = [names[0].clone(), names[3].clone(), names[2].clone()];
        cluster.node(0).init(&born).await.expect("one of three");
        cluster.put(0, "k", "v").await.expect("written");
        let address = cluster.cells[1].address.clone();
        let error = cluster.node(0).add_member("n1", address, true).await.expect_err("two of four");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let full = cluster.node(3).status().id;
        let error = cluster.node(0).remove_member(full).await.expect_err("one of two");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        // Another setting does not make it hold data.
        cluster.kill(WITNESS).await;
        cluster.witnesses.clear();
        let error = cluster.try_start(WITNESS).await.expect_err("it is a witness");
        assert_eq!(error.kind(), ErrorKind::Foreign, "{error}");
        cluster.cells[WITNESS].media.crash(99);
        cluster.kill(0).await;
        cluster.witnesses = vec![0, WITNESS];
        let error = cluster.try_start(0).await.expect_err("it holds data");
        assert_eq!(error.kind(), ErrorKind::Foreign, "{error}");
    });
}

/// The replica of a group on the witness, once it has heard of it.
async fn aside(cluster: &Cluster, i: usize, name: &str) -> Node {
    loop {
        if let Some(replica) = cluster.node(i).groups().remove(name) {
            return replica;
        }
        pause().await;
    }
}

#[test]
fn a_witness_votes_in_every_group_and_holds_no_tables() {
    run(async {
        let mut cluster = two_and_a_witness().await;
        let error = cluster.node(WITNESS).create_group("a").await.expect_err("it reads nothing");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        for name in ["a", "b"] {
            let group = cluster.node(0).create_group(name).await.expect("made");
            for n in 0..40 {
                put_in(&group, &format!("k{n}"), vec![7; 2000]).await;
            }
            let rotate = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
            group.write(rotate).await.expect("rotates");
            until(&group, |s| s.group.tables > 0).await;
            let last = group.status().group.applied;
            drop(group);
            let witness = aside(&cluster, WITNESS, name).await;
            until(&witness, |s| s.group.applied >= last && s.role == "follower").await;
            assert_eq!(witness.status().group.tables, 0);
            let error = witness.read_barrier(ReadLevel::Local).await.expect_err("it has nothing");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        }
        // Either of the others is enough beside it, also after it has lost its power, and what it knew of groups with that.
        for dies in 0..2 {
            cluster.kill(WITNESS).await;
            cluster.start(WITNESS).await;
            cluster.kill(dies).await;
            for name in ["a", "b"] {
                let other = group_of(&cluster, 1 - dies, name).await;
                put_in(&other, "after", format!("{dies}")).await;
                until(&other, |s| s.role == "leader").await;
            }
            cluster.start(dies).await;
            for name in ["a", "b"] {
                let back = group_of(&cluster, dies, name).await;
                assert_eq!(get_in(&back, "after").await, Some(format!("{dies}")));
            }
        }
        cluster.finish().await;
    });
}

/// In a group as in the first: what only its leader and the witness have is not lost with the leader.
#[test]
fn a_witness_brings_the_other_up_to_what_it_has_acknowledged_in_a_group() {
    run(async {
        let mut cluster = two_and_a_witness().await;
        drop(cluster.node(0).create_group("a").await.expect("made"));
        let groups = [group_of(&cluster, 0, "a").await, group_of(&cluster, 1, "a").await];
        put_in(&groups[0], "k", "first").await;
        drop(aside(&cluster, WITNESS, "a").await);
        let leader = loop {
            match groups.iter().position(|group| group.status().role == "leader") {
                Some(leader) => break leader,
                None => pause().await,
            }
        };
        let group = groups[leader].clone();
        drop(groups);
        cluster.kill(1 - leader).await;
        put_in(&group, "k", "second").await;
        drop(group);
        cluster.kill(leader).await;
        cluster.start(1 - leader).await;
        let other = group_of(&cluster, 1 - leader, "a").await;
        assert_eq!(get_in(&other, "k").await.as_deref(), Some("second"));
        until(&other, |s| s.role == "leader").await;
        drop(other);
        cluster.start(leader).await;
        cluster.finish().await;
    });
}

/// It comes to a cluster that has groups, and leaves it again.
#[test]
fn a_witness_that_is_added_votes_in_the_groups_that_are_there() {
    run(async {
        let mut cluster = Cluster::blank(4).await;
        cluster.witnesses = vec![3];
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()[..3]).await.expect("born");
        let group = cluster.node(0).create_group("a").await.expect("made");
        put_in(&group, "k", "v").await;
        let address = cluster.cells[3].address.clone();
        let added = cluster.node(0).add_member("n3", address, true).await.expect("added");
        assert!(added.witness);
        let witness = aside(&cluster, 3, "a").await;
        let votes = |s: &crate::NodeStatus| {
            s.members.iter().any(|m| m.id == added.id && m.role == MemberRole::Voter && m.witness)
        };
        until(&witness, votes).await;
        until(&witness, |s| s.group.applied >= group.status().group.applied).await;
        assert_eq!(witness.status().group.tables, 0);
        // Two of the four: with it a majority.
        cluster.kill(2).await;
        put_in(&group, "k", "again").await;
        cluster.start(2).await;
        drop((witness, group));
        loop {
            match cluster.node(0).remove_member(added.id).await {
                Ok(()) => break,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
            }
        }
        cluster.finish().await;
    });
}
