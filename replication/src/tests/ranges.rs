//! A keyspace placed on groups by key range: split, moved and joined while it is written, by movers that die.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::KeyRange;

use super::cluster::*;
use super::groups::group_of;
use crate::ranges::{Placed, PlacedOp};
use crate::{Durability, ErrorKind, ReadLevel, Result};

type Model = BTreeMap<Bytes, Bytes>;

fn key(n: usize) -> Bytes {
    format!("k{n:04}").into()
}

fn op(n: usize, value: impl Into<Bytes>) -> PlacedOp {
    PlacedOp::Put { key: key(n), value: value.into() }
}

/// Until it is written. What is not known to be written is written again: it is the same value.
async fn write(placed: &Placed, ops: Vec<PlacedOp>) {
    while let Err(error) = placed.write(ops.clone(), Durability::Quorum).await {
        assert!(
            matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::NotLeader | ErrorKind::Indeterminate),
            "{error}"
        );
    }
}

async fn forward(placed: &Placed) -> Vec<(Bytes, Bytes)> {
    let mut scan = placed.range(Bound::Unbounded, Bound::Unbounded, ReadLevel::Linearizable);
    let mut pairs = Vec::new();
    while let Some(pair) = scan.next().await.expect("the scan goes on") {
        pairs.push(pair);
    }
    assert!(scan.next().await.expect("it has ended").is_none());
    pairs
}

async fn backward(placed: &Placed) -> Vec<(Bytes, Bytes)> {
    let mut scan = placed.range(Bound::Unbounded, Bound::Unbounded, ReadLevel::Linearizable);
    let mut pairs = Vec::new();
    while let Some(pair) = scan.next_back().await.expect("the scan goes on") {
        pairs.push(pair);
    }
    pairs.reverse();
    pairs
}

/// Everything is there, from both sides and by key, and each key has one holder.
async fn check(placed: &Placed, model: &Model) {
    let expect: Vec<_> = model.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    assert_eq!(forward(placed).await, expect);
    assert_eq!(backward(placed).await, expect);
    for (key, value) in model {
        assert_eq!(placed.get(key, ReadLevel::Linearizable).await.expect("read").as_ref(), Some(value));
    }
    let mut at = Some(Bytes::new());
    for range in placed.ranges().await.expect("read") {
        assert_eq!(Some(&range.first), at.as_ref(), "ranges follow each other");
        at = range.end;
    }
    assert_eq!(at, None, "up to the last key");
}

/// `(first key, group)` of each range.
async fn layout(placed: &Placed) -> Vec<(String, Option<String>)> {
    let ranges = placed.ranges().await.expect("read");
    ranges.into_iter().map(|r| (String::from_utf8(r.first.to_vec()).expect("text"), r.group)).collect()
}

/// Pairs of the keyspace in a group, whoever holds them.
async fn pairs_in(cluster: &Cluster, i: usize, group: Option<&str>, name: &str) -> usize {
    let node = match group {
        Some(group) => group_of(cluster, i, group).await,
        None => cluster.node(i),
    };
    let snapshot = node.snapshot("main", ReadLevel::Linearizable).await.expect("a view");
    let Some(data) = snapshot.keyspace(&format!("mainstay.placed.{name}")) else { return 0 };
    let mut scan = snapshot.range(data, Bound::Unbounded, Bound::Unbounded);
    let mut pairs = 0;
    while scan.next().await.expect("the scan goes on").is_some() {
        pairs += 1;
    }
    pairs
}

async fn with_groups(count: usize, groups: &[&str]) -> Cluster {
    let cluster = Cluster::born(count).await;
    for name in groups {
        drop(cluster.node(0).create_group(name).await.expect("made"));
    }
    cluster
}

async fn placed_at(cluster: &Cluster, i: usize) -> Placed {
    loop {
        match cluster.node(i).placed("users").await {
            Ok(placed) => break placed,
            Err(error) => assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Indeterminate), "{error}"),
        }
    }
}

#[test]
fn ranges_are_split_moved_and_joined_while_they_are_written() {
    run(async {
        let cluster = with_groups(3, &["a", "b"]).await;
        let placed = placed_at(&cluster, 0).await;
        let model: Arc<Mutex<Model>> = Arc::default();
        for n in 0..300 {
            write(&placed, vec![op(n, vec![b'.'; 100])]).await;
            model.lock().expect("one at a time").insert(key(n), vec![b'.'; 100].into());
        }
        let over = Arc::new(AtomicBool::new(false));
        // Two writers, each with keys of its own, through the other members.
        let writers: Vec<_> = (1..3)
            .map(|i| {
                let (cluster_node, model, over) = (cluster.node(i), model.clone(), over.clone());
                tokio::spawn(async move {
                    let placed = cluster_node.placed("users").await.expect("born");
                    let mut round = 0_usize;
                    while !over.load(Ordering::Relaxed) {
                        let n = (round * 7 % 300) / 2 * 2 + (i - 1);
                        let value = Bytes::from(format!("{i}-{round}"));
                        write(&placed, vec![op(n, value.clone())]).await;
                        model.lock().expect("one at a time").insert(key(n), value.clone());
                        let read = placed.get(&key(n), ReadLevel::Linearizable).await.expect("read");
                        assert_eq!(read, Some(value), "nobody else writes it");
                        round += 1;
                    }
                    round
                })
            })
            .collect();
        let step = async |what: Result<()>| what.expect("no member is away");
        step(placed.split(&key(100)).await).await;
        step(placed.split(&key(200)).await).await;
        step(placed.split(&key(200)).await).await;
        let three = [(String::new(), None), ("k0100".into(), None), ("k0200".into(), None)];
        assert_eq!(layout(&placed).await, three);
        step(placed.move_range(&key(150), Some("a")).await).await;
        step(placed.move_range(&key(200), Some("b")).await).await;
        let a = |name: &str| Some(name.to_owned());
        let moved = [(String::new(), None), ("k0100".into(), a("a")), ("k0200".into(), a("b"))];
        assert_eq!(layout(&placed).await, moved);
        assert_eq!(pairs_in(&cluster, 0, None, "users").await, 100, "the others are gone from the first group");
        let apart = placed.join(&key(200)).await.expect_err("they are in two groups");
        assert_eq!(apart.kind(), ErrorKind::Invalid);
        // Behind its neighbour in one group it is one with it, and joined is joined again.
        step(placed.move_range(&key(299), Some("a")).await).await;
        step(placed.join(&key(200)).await).await;
        assert_eq!(layout(&placed).await, moved[..2]);
        step(placed.move_range(&key(100), None).await).await;
        step(placed.join(&key(100)).await).await;
        assert_eq!(layout(&placed).await, [(String::new(), None)]);
        over.store(true, Ordering::Relaxed);
        for writer in writers {
            assert!(writer.await.expect("it did not panic") > 0);
        }
        let model = model.lock().expect("one at a time").clone();
        for i in 0..3 {
            check(&placed_at(&cluster, i).await, &model).await;
        }
        for group in ["a", "b"] {
            assert_eq!(pairs_in(&cluster, 1, Some(group), "users").await, 0, "{group}");
        }
        cluster.finish().await;
    });
}

#[test]
fn a_batch_is_of_one_group() {
    run(async {
        let cluster = with_groups(3, &["a"]).await;
        let placed = placed_at(&cluster, 0).await;
        placed.split(&key(5)).await.expect("split");
        // Of two ranges in one group it may be.
        write(&placed, vec![op(1, "x"), op(7, "x")]).await;
        placed.move_range(&key(5), Some("a")).await.expect("moved");
        for i in 0..3 {
            let placed = placed_at(&cluster, i).await;
            let refused = placed.write(vec![op(1, "y"), op(7, "y")], Durability::Quorum).await.expect_err("two groups");
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            let message = refused.to_string();
            for part in ["key=k0001 is held by group=the first", "key=k0007 by group=a"] {
                assert!(message.contains(part), "{message}");
            }
        }
        let model: Model = [(key(1), "x".into()), (key(7), "x".into())].into();
        check(&placed, &model).await;
        let empty = placed.write(vec![], Durability::Quorum).await.expect_err("nothing to write");
        let local = placed.write(vec![op(1, "y")], Durability::Local).await.expect_err("no answer to a condition");
        let index =
            placed.get(&key(1), ReadLevel::AtLeast(mainstay_engine::LogIndex(1))).await.expect_err("of which group");
        let group = placed.move_range(&key(1), Some("c")).await.expect_err("nobody made it");
        let name = cluster.node(0).placed("").await.err().expect("no name");
        let kinds = [empty, local, index, group, name].map(|error| error.kind());
        let [invalid, unsupported] = [ErrorKind::Invalid, ErrorKind::Unsupported];
        assert_eq!(kinds, [invalid, unsupported, unsupported, ErrorKind::NotFound, invalid]);
        cluster.finish().await;
    });
}

#[test]
fn a_removed_range_is_of_one_group_and_may_be_of_several_ranges_there() {
    run(async {
        let cluster = with_groups(3, &["a"]).await;
        let placed = placed_at(&cluster, 0).await;
        let mut model = Model::new();
        for n in 0..20 {
            write(&placed, vec![op(n, "x")]).await;
            model.insert(key(n), "x".into());
        }
        for n in [5, 10, 15] {
            placed.split(&key(n)).await.expect("split");
        }
        placed.move_range(&key(15), Some("a")).await.expect("moved");
        let remove = |lower, upper| PlacedOp::DeleteRange { range: KeyRange::new(lower, upper) };
        for i in 0..3 {
            let placed = placed_at(&cluster, i).await;
            for upper in [Bound::Unbounded, Bound::Included(key(15))] {
                let across = vec![remove(Bound::Included(key(12)), upper)];
                let refused = placed.write(across, Durability::Quorum).await.expect_err("two groups");
                assert_eq!(refused.kind(), ErrorKind::Invalid);
                let message = refused.to_string();
                for part in ["key=k0012 is held by group=the first", "key=k0015 by group=a"] {
                    assert!(message.contains(part), "{message}");
                }
            }
            let nothing = vec![remove(Bound::Included(key(9)), Bound::Excluded(key(3)))];
            let refused = placed.write(nothing, Durability::Quorum).await.expect_err("no key");
            assert_eq!(refused.kind(), ErrorKind::Invalid);
        }
        check(&placed, &model).await;
        // Up to the border of what the other group holds, and all that that one has; in order within a batch.
        write(&placed, vec![op(4, "gone"), remove(Bound::Included(key(3)), Bound::Excluded(key(15))), op(7, "kept")])
            .await;
        model.retain(|at, _| *at < key(3) || *at >= key(15));
        model.insert(key(7), "kept".into());
        check(&placed, &model).await;
        write(&placed_at(&cluster, 1).await, vec![remove(Bound::Included(key(16)), Bound::Unbounded)]).await;
        model.retain(|at, _| *at < key(16));
        for i in 0..3 {
            check(&placed_at(&cluster, i).await, &model).await;
        }
        cluster.finish().await;
    });
}

#[test]
fn a_scan_goes_over_ranges_from_both_ends_and_keeps_to_its_bounds() {
    run(async {
        let cluster = with_groups(3, &["a"]).await;
        let placed = placed_at(&cluster, 0).await;
        for n in 0..20 {
            write(&placed, vec![op(n, "x")]).await;
        }
        for n in [5, 10, 15] {
            placed.split(&key(n)).await.expect("split");
        }
        placed.move_range(&key(5), Some("a")).await.expect("moved");
        placed.move_range(&key(15), Some("a")).await.expect("moved");
        let level = ReadLevel::Linearizable;
        for (lower, upper, expect) in [
            (Bound::Unbounded, Bound::Unbounded, 0..20),
            (Bound::Included(key(5)), Bound::Excluded(key(15)), 5..15),
            (Bound::Excluded(key(4)), Bound::Included(key(15)), 5..16),
            (Bound::Excluded(key(9)), Bound::Included(key(10)), 10..11),
            (Bound::Included(key(7)), Bound::Included(key(7)), 7..8),
            (Bound::Excluded(key(7)), Bound::Excluded(key(8)), 0..0),
            (Bound::Included(key(9)), Bound::Excluded(key(3)), 0..0),
            (Bound::Included(key(30)), Bound::Unbounded, 0..0),
        ] {
            let expect: Vec<Bytes> = expect.map(key).collect();
            let (mut front, mut back) = (Vec::new(), Vec::new());
            let mut scan = placed.range(lower.clone(), upper.clone(), level.clone());
            while let Some((key, _)) = scan.next().await.expect("it goes on") {
                front.push(key);
            }
            let mut scan = placed.range(lower.clone(), upper.clone(), level.clone());
            while let Some((key, _)) = scan.next_back().await.expect("it goes on") {
                back.insert(0, key);
            }
            assert_eq!((&front, &back), (&expect, &expect), "{lower:?} {upper:?}");
            // In turns the ends meet, and nothing comes twice.
            let mut scan = placed.range(lower.clone(), upper.clone(), level.clone());
            let (mut low, mut high) = (Vec::new(), Vec::new());
            loop {
                let Some((key, _)) = scan.next().await.expect("it goes on") else { break };
                low.push(key);
                let Some((key, _)) = scan.next_back().await.expect("it goes on") else { break };
                high.insert(0, key);
            }
            low.extend(high);
            assert_eq!(low, expect, "{lower:?} {upper:?}");
            assert!(scan.next().await.expect("over").is_none() && scan.next_back().await.expect("over").is_none());
        }
        cluster.finish().await;
    });
}

/// Movers are dropped wherever they are; writers and other movers go on.
#[test]
fn a_move_that_was_left_half_done_is_finished_by_others() {
    run(async {
        let mut cluster = with_groups(3, &["a", "b"]).await;
        let mut placed = placed_at(&cluster, 0).await;
        let mut model = Model::new();
        for n in 0..120 {
            let value = Bytes::from(vec![b'v'; 100]);
            write(&placed, vec![op(n, value.clone())]).await;
            model.insert(key(n), value);
        }
        let targets = [Some("a"), Some("b"), None];
        for round in 0..9_usize {
            let to = targets[round % 3];
            // It dies before, in or after any of its steps.
            let cut = Duration::from_millis(3 + 9 * round as u64);
            let _ = tokio::time::timeout(cut, placed.move_range(&key(round * 13), to)).await;
            if round % 4 == 1 {
                // The power fails everywhere.
                drop(placed);
                for i in 0..3 {
                    cluster.kill(i).await;
                }
                cluster.start_all().await;
            } else {
                drop(placed);
            }
            placed = placed_at(&cluster, (round + 1) % 3).await;
            // A writer that waits goes on with it by itself; else the next mover does.
            let n = round * 13;
            let value = Bytes::from(format!("after {round}"));
            write(&placed, vec![op(n, value.clone())]).await;
            model.insert(key(n), value);
            if round % 2 == 0 {
                loop {
                    match placed.move_range(&key(n), targets[(round + 1) % 3]).await {
                        Ok(()) => break,
                        Err(e) => assert!(matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::Indeterminate), "{e}"),
                    }
                }
            }
            check(&placed, &model).await;
        }
        for n in (0..120).step_by(10) {
            placed.move_range(&key(n), None).await.expect("nobody is away");
        }
        check(&placed, &model).await;
        assert_eq!(pairs_in(&cluster, 0, None, "users").await, model.len());
        drop(placed);
        cluster.finish().await;
    });
}

#[test]
fn movers_that_want_different_things_leave_one_holder_for_each_key() {
    run(async {
        let cluster = with_groups(3, &["a", "b"]).await;
        let placed = placed_at(&cluster, 0).await;
        let mut model = Model::new();
        for n in 0..100 {
            write(&placed, vec![op(n, vec![b'v'; 100])]).await;
            model.insert(key(n), vec![b'v'; 100].into());
        }
        let movers: Vec<_> = [(0, Some("a")), (1, Some("b")), (2, None)]
            .into_iter()
            .map(|(i, to)| {
                let node = cluster.node(i);
                tokio::spawn(async move {
                    let placed = node.placed("users").await.expect("born");
                    for n in 0..10 {
                        // Others may take it over or be faster: that is no other mistake than this one.
                        if let Err(error) = placed.move_range(&key(n * 10), to).await {
                            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                        }
                        if let Err(error) = placed.split(&key(n * 10 + 5)).await {
                            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                        }
                    }
                })
            })
            .collect();
        for mover in movers {
            mover.await.expect("it did not panic");
        }
        check(&placed, &model).await;
        for n in 0..100 {
            placed.move_range(&key(n), Some("b")).await.expect("alone now");
        }
        check(&placed, &model).await;
        assert_eq!(pairs_in(&cluster, 2, Some("b"), "users").await, model.len());
        for group in [None, Some("a")] {
            assert_eq!(pairs_in(&cluster, 2, group, "users").await, 0, "{group:?}");
        }
        cluster.finish().await;
    });
}

/// Each attempt takes the move over from the one before it, wherever that is.
#[test]
fn movers_that_take_over_from_each_other_lose_nothing() {
    run(async {
        let cluster = with_groups(3, &["a"]).await;
        let placed = placed_at(&cluster, 0).await;
        let mut model = Model::new();
        for n in 0..40 {
            write(&placed, vec![op(n, vec![b'v'; 60])]).await;
            model.insert(key(n), vec![b'v'; 60].into());
        }
        for round in 0..6 {
            let to = if round % 2 == 0 { Some("a") } else { None };
            let over = Arc::new(AtomicBool::new(false));
            let others: Vec<_> = (0..3)
                .map(|i| {
                    let (node, over) = (cluster.node(i), over.clone());
                    tokio::spawn(async move {
                        let placed = node.placed("users").await.expect("born");
                        for _ in 0..12 {
                            if let Err(error) = placed.finish_move(&key(5)).await {
                                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                            }
                            if over.load(Ordering::Relaxed) {
                                break;
                            }
                        }
                    })
                })
                .collect();
            loop {
                match placed.move_range(&key(5), to).await {
                    Ok(()) => break,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
                }
            }
            over.store(true, Ordering::Relaxed);
            for other in others {
                other.await.expect("it did not panic");
            }
            check(&placed, &model).await;
        }
        cluster.finish().await;
    });
}
