//! Compaction on demand: what it frees, what it leaves, and that it goes on behind a crash.

use mainstay_io::block_on;
use mainstay_io::sim::SimMedia;

use super::harness::*;
use super::replicas::{Replica, check_equal, lead};
use crate::{BranchId, Command, CommandBody, ErrorKind, KeyspaceId, LogIndex, MAIN};

fn key(n: usize) -> String {
    format!("key-{n:05}")
}

/// Values that do not shrink.
fn value(n: usize) -> Vec<u8> {
    let mut state = n as u64 + 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    })
    .take(200)
    .collect()
}

fn fill(store: &Store, count: usize) {
    for n in 0..count {
        store.put(&key(n), &value(n));
    }
    store.settle();
}

fn ask(store: &Store) -> LogIndex {
    store.must(compact(MAIN, "", None)).index
}

fn wait(store: &Store, index: LogIndex) {
    block_on(store.group().compacted(index)).expect("it ends");
}

/// Entries and tombstones of all tables.
fn entries(store: &Store) -> (u64, u64) {
    let manifest = store.group().shared().pages().1;
    let tables = manifest.tables();
    tables.values().fold((0, 0), |(entries, tombstones), t| (entries + t.entries, tombstones + t.tombstones))
}

#[test]
fn what_was_deleted_and_superseded_is_gone_and_its_space_is_given_back() {
    let media = media();
    let store = Store::open(&media);
    fill(&store, 600);
    for n in 0..600 {
        if n % 3 == 0 {
            store.put(&key(n), b"new");
        } else {
            store.must(delete(MAIN, &key(n)));
        }
    }
    let index = ask(&store);
    wait(&store, index);
    assert_eq!(entries(&store), (200, 0), "one version of each key that is there");
    assert_eq!(store.engine.shared_ref().volume.space().parked_bytes, 0, "all that was freed is on its way");
    let pairs = all(&store.group().snapshot(MAIN).expect("main"), DEFAULT);
    assert_eq!(pairs.len(), 200);
    assert!(pairs.values().all(|v| v == b"new"));

    // Everything goes.
    (0..600).step_by(3).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
    let index = ask(&store);
    wait(&store, index);
    assert_eq!(store.group().status().tables, 0);
    assert_eq!(store.engine.status().extent_bytes, store.engine.shared_ref().root_bytes());
    store.close();
    check_no_leak(&media);
}

/// Nobody asks, and nothing is written behind the deletions: their runs are fewer than those at which L0 is compacted.
#[test]
fn what_was_deleted_goes_without_further_writes() {
    let media = media();
    let group = crate::GroupSettings { l0_compaction_runs: 1000, ..settings() };
    let store = Store::open_with(&media, group, engine_settings()).expect("the volume opens");
    fill(&store, 300);
    wait(&store, ask(&store));
    assert_eq!(entries(&store), (300, 0));
    (0..200).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
    store.settle();
    assert_eq!(entries(&store), (100, 0));
    (200..300).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
    store.settle();
    assert_eq!(store.group().status().tables, 0);
    store.close();
    check_no_leak(&media);
}

#[test]
fn only_the_range_is_written_again() {
    let media = media();
    let store = Store::open(&media);
    fill(&store, 1000);
    wait(&store, ask(&store));
    let tables = |store: &Store| store.group().shared().pages().1.tables();
    let before = tables(&store);
    assert!(before.len() > 4, "several tables in the last level: {}", before.len());
    (400..600).step_by(2).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
    store.settle();
    let (first, end) = (key(400), key(600));
    let asked = store.must(compact(MAIN, &first, Some(&end)));
    wait(&store, asked.index);
    let after = tables(&store);
    let kept: Vec<_> =
        before.values().filter(|t| t.last[..] < b"key-00300"[..] || t.first[..] > b"key-00700"[..]).collect();
    assert!(!kept.is_empty() && kept.iter().all(|t| after.contains_key(&t.id)), "the ends are as they were");
    let within = after.values().filter(|t| t.first[..] < *end.as_bytes() && t.last[..] >= *first.as_bytes());
    assert_eq!(within.map(|t| t.tombstones).sum::<u64>(), 0);
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT).len(), 900);
    store.close();
    check_no_leak(&media);
}

/// It is part of the manifest: after the power failed at any time it goes on, and ends as it would have.
#[test]
fn it_goes_on_behind_a_crash() {
    let ended = |crash: &dyn Fn(&SimMedia), tries: usize| {
        let media = media();
        let mut store = Store::open(&media);
        fill(&store, 400);
        (0..400).filter(|n| n % 4 > 0).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
        let index = ask(&store);
        for _ in 0..tries {
            drop(store);
            crash(&media);
            store = Store::open(&media);
        }
        wait(&store, index);
        assert_eq!(entries(&store), (100, 0));
        assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT).len(), 100);
        store.close();
        check_no_leak(&media);
    };
    ended(&|_| {}, 0);
    for seed in 0..4 {
        ended(&|media| media.kill(seed), 2);
        ended(&|media| media.crash(seed), 2);
    }
}

#[test]
fn a_closed_store_goes_on_when_it_is_opened() {
    let media = media();
    let store = Store::open(&media);
    fill(&store, 400);
    (0..400).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
    let index = ask(&store);
    store.close();
    let store = Store::open(&media);
    wait(&store, index);
    assert_eq!(entries(&store), (0, 0));
    store.close();
}

#[test]
fn what_a_checkpoint_names_stays_until_it_is_dropped() {
    let media = media();
    let store = Store::open(&media);
    fill(&store, 300);
    store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    let copy = BranchId(store.must(CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() }).index.0);
    (0..300).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
    wait(&store, ask(&store));
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT).len(), 0);
    assert_eq!(all(&store.group().snapshot(copy).expect("the clone"), DEFAULT).len(), 300);
    assert_eq!(all(&store.group().checkpoint("c").expect("the checkpoint"), DEFAULT).len(), 300);
    // The clone is compacted by itself.
    (0..300).for_each(|n| drop(store.must(delete(copy, &key(n)))));
    let asked = store.must(compact(copy, "", None));
    wait(&store, asked.index);
    store.must(CommandBody::DropCheckpoint { name: "c".into() });
    store.settle();
    assert_eq!(store.group().status().tables, 0);
    store.close();
    check_no_leak(&media);
}

/// Runs of L0 that overlap nothing below became one table over all that stands between them, which could not be installed: the compaction
/// never ended, and no other took from L0.
#[test]
fn runs_around_a_table_of_the_last_level_are_compacted() {
    let media = media();
    let store = Store::open_with(&media, settings(), engine_settings()).expect("the volume opens");
    store.put("k5", b"between");
    wait(&store, ask(&store));
    store.put("k1", b"around");
    store.must(CommandBody::Rotate);
    store.settle();
    store.must(delete(MAIN, "k8"));
    store.put("k9", b"around");
    let asked = ask(&store);
    store.settle();
    assert_eq!(store.group().status().refused_installs, 0);
    wait(&store, asked);
    assert_eq!(entries(&store), (3, 0));
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT).len(), 3);
    store.close();
    check_no_leak(&media);
}

#[test]
fn what_cannot_be_compacted_is_refused_or_done_at_once() {
    let media = media();
    let store = Store::open(&media);
    let refused = |body: CommandBody| store.propose(body).expect("the log takes it").response.map_err(|e| e.kind());
    assert_eq!(refused(compact(BranchId(99), "", None)), Err(ErrorKind::NotFound));
    let unknown = CommandBody::Compact { branch: MAIN, keyspace: KeyspaceId(9), first: "".into(), end: None };
    assert_eq!(refused(unknown), Err(ErrorKind::NotFound));
    let long = "k".repeat(crate::KEY_BYTES_MAX + 2);
    assert_eq!(store.propose(compact(MAIN, &long, None)).map_err(|e| e.kind()).err(), Some(ErrorKind::Invalid));
    wait(&store, ask(&store));
    wait(&store, store.must(compact(MAIN, "b", Some("a"))).index);
    store.close();
}

/// Whoever waits hears that there is no space; the compaction is not lost.
#[test]
fn a_full_volume_is_told_to_who_waits() {
    let media = media();
    let store = Store::open(&media);
    fill(&store, 300);
    // Too few to go by themselves.
    (0..300).step_by(10).for_each(|n| drop(store.must(delete(MAIN, &key(n)))));
    store.settle();
    media.extents_disk().set_space(Some(media.extents_disk().allocated()));
    let index = ask(&store);
    let told = block_on(store.group().compacted(index)).expect_err("there is no space");
    assert_eq!(told.kind(), ErrorKind::OutOfSpace);
    media.extents_disk().set_space(None);
    loop {
        match block_on(store.group().compacted(index)) {
            Ok(()) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::OutOfSpace),
        }
    }
    assert_eq!(entries(&store), (270, 0));
    store.close();
}

/// Each of them ends at once, so the log takes any number. A replica that lacks the tables of an install keeps all that come behind it for
/// its readers; it counted them as waiting, and failed at more than may wait.
#[test]
fn a_replica_that_lacks_tables_takes_any_number_that_have_ended() {
    let leader = Replica::new(32 << 20, 1);
    let mut log = lead(&leader, [put(MAIN, "key", b"value")].into_iter());
    for _ in 0..100 {
        log.push(Command { time_ms: 5, body: compact(MAIN, "", None) });
    }
    leader.feed(&log);

    let follower = Replica::new(32 << 20, 1);
    let disk = follower.media.extents_disk();
    disk.set_space(Some(disk.allocated()));
    follower.feed(&log);
    assert_eq!(all(&follower.group.snapshot(MAIN).expect("main"), DEFAULT).len(), 1);
    disk.set_space(None);
    let last = LogIndex(log.len() as u64);
    while let Err(error) = block_on(follower.group.compacted(last)) {
        assert_eq!(error.kind(), ErrorKind::OutOfSpace);
    }
    check_equal(&leader, &follower);
}
