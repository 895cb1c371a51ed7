//! A full disk refuses writes, serves reads, and heals without a restart.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::harness::*;
use crate::{CommandBody, ErrorKind, KeyspaceId, MAIN, WriteBatch, WriteOp};

fn key(n: usize) -> String {
    format!("key-{n:06}")
}

#[test]
fn a_full_disk_refuses_writes_and_heals_when_space_comes_back() {
    let media = media();
    let store = Store::open(&media);
    media.extents_disk().set_space(Some(2 << 20));
    let value = [7; 2048];
    let mut written = 0;
    let refused = loop {
        match store.propose(put(MAIN, &key(written), &value)) {
            Ok(applied) => drop(applied.response.expect("a put is not refused")),
            Err(error) => break error,
        }
        written += 1;
        assert!(written < 10_000, "the disk never filled");
    };
    assert_eq!(refused.kind(), ErrorKind::OutOfSpace);
    // A smaller job that still finds room says for a moment that there is space; the flush that waits says otherwise at once.
    assert!((0..1_000_000).any(|_| store.engine.status().read_only.is_some()), "the status says why");
    for n in (0..written).step_by(17) {
        assert_eq!(store.get(&key(n)).as_deref(), Some(&value[..]), "reads go on");
    }
    media.extents_disk().set_space(None);
    // Each refused write tries again whether there is space.
    let mut refusals = 0;
    while let Err(error) = store.propose(put(MAIN, "after", b"x")) {
        assert_eq!(error.kind(), ErrorKind::OutOfSpace);
        refusals += 1;
        assert!(refusals < 1_000_000, "it never healed");
    }
    store.settle();
    assert!(store.engine.status().read_only.is_none());
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT).len(), written + 1);
    store.close();
    check_no_leak(&media);
}

/// What the checkpoint alone still names is a keyspace that was dropped: no compaction has to come first, whose time is its own.
#[test]
fn dropping_a_checkpoint_frees_the_space_that_writes_wait_for() {
    let media = media();
    let store = Store::open(&media);
    let value = [3; 2048];
    let made = store.must(CommandBody::CreateKeyspace { name: "old".into() }).response.expect("a new name");
    let keyspace = KeyspaceId(u32::from_le_bytes(made[..].try_into().expect("four bytes")));
    for n in 0..500 {
        let (key, value) = (key(n).into(), Bytes::copy_from_slice(&value));
        let ops = vec![WriteOp::Put { keyspace, key, value }];
        store.must(CommandBody::Batch(WriteBatch { branch: MAIN, ops }));
    }
    store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    store.must(CommandBody::DropKeyspace { name: "old".into() });
    store.settle();
    let used = media.extents_disk().allocated();
    media.extents_disk().set_space(Some(used));
    let mut n = 0;
    while store.propose(put(MAIN, &key(n), &value)).is_ok() {
        n += 1;
        assert!(n < 10_000, "the disk never filled");
    }
    store.must(CommandBody::DropCheckpoint { name: "c".into() });
    let mut refusals = 0;
    while let Err(error) = store.propose(put(MAIN, "after", b"x")) {
        assert_eq!(error.kind(), ErrorKind::OutOfSpace);
        refusals += 1;
        assert!(refusals < 1_000_000, "it never healed");
    }
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT).len(), n + 1);
    media.extents_disk().set_space(None);
    store.close();
    check_no_leak(&media);
}

/// An attempt was asked for while there was space, so no worker took it, and then upkeep found the volume full. Every refused write
/// asked again, saw that an attempt was asked for already, and woke nobody: the store took no write any more.
#[test]
fn a_volume_found_full_by_upkeep_is_tried_again() {
    let media = media();
    let store = Store::open(&media);
    store.settle();
    // Nothing that was freed waits for a superblock: that would be a reason of its own to try again.
    mainstay_io::block_on(store.engine.shared_ref().purge()).expect("the pages are written");
    store.engine.shared_ref().find_full();
    let mut refusals = 0;
    while let Err(error) = store.propose(put(MAIN, "after", b"x")) {
        assert_eq!(error.kind(), ErrorKind::OutOfSpace);
        refusals += 1;
        assert!(refusals < 1_000_000, "it never healed");
    }
    store.close();
    check_no_leak(&media);
}

/// The device of the tables failed for good while that of the log went on: entries were taken until memory and log were full, and
/// then the store waited for ever.
#[test]
fn a_volume_whose_tables_cannot_be_synced_leaves_service() {
    let media = media();
    let store = Store::open(&media);
    store.put("a", b"1");
    media.extents_disk().fail_next(mainstay_io::sim::IoKind::Flush);
    let applied = store.must(CommandBody::Rotate);
    mainstay_io::block_on(store.group().shared().settled(applied.index));
    // Those that come after the failed flush find a device that takes nothing.
    let refused = (0..10_000).find_map(|n| store.propose(put(MAIN, &key(n), &[1; 512])).err());
    assert_eq!(refused.expect("the store says so").kind(), ErrorKind::Closed);
    assert!(store.group().failure().is_some());
    drop(store);
    media.kill(1);
    let store = Store::open(&media);
    assert_eq!(store.get("a").as_deref(), Some(&b"1"[..]));
    store.close();
}

/// Upkeep tried again at once, and each time for the first time: a line of the log for each, without a pause, until the owner had
/// closed the volume. The groups heard of it at the second attempt.
#[test]
fn upkeep_ends_with_the_superblock() {
    let media = media();
    let store = Store::open(&media);
    store.put("a", b"1");
    media.superblock_disk().fail_next(mainstay_io::sim::IoKind::DurableWrite);
    let shared = store.engine.shared_ref();
    shared.want_pages();
    while store.group().failure().is_none() {
        std::thread::yield_now();
    }
    // Another look finds the same, and nobody looks for ever.
    shared.want_pages();
    mainstay_io::block_on(shared.clone().keep_up());
    drop(store);
    media.kill(1);
    let store = Store::open(&media);
    assert_eq!(store.get("a").as_deref(), Some(&b"1"[..]));
    store.close();
}

/// Writers wait while the log is nearly full and cannot be cut yet. Once it is cut nothing else happens that would wake them.
#[test]
fn who_waits_for_the_log_to_be_cut_goes_on_when_it_is() {
    let media = media();
    let group = crate::GroupSettings { memtable_bytes: 1 << 20, ..settings() };
    let store = Store::open_with(&media, group, engine_settings()).expect("the volume opens");
    let shared = store.engine.shared_ref();
    let turn = mainstay_io::block_on(shared.pages_turn());
    let last = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // More than the ring takes.
            for n in 0..3000 {
                last.store(store.put(&key(n % 50), &[1; 4096]).0, Ordering::Release);
            }
        });
        // The flush that the writer asks for when it has to wait is over too.
        while !shared.log_is_nearly_full() || store.group().flushed().0 < last.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        mainstay_io::block_on(store.group().shared().idle());
        drop(turn);
    });
    store.close();
    check_no_leak(&media);
}

/// A replica restarted with a ring that was nearly full and held nothing that was needed. It could append nothing, so the log
/// did not grow, so no cut of it was due: it stayed behind for ever.
#[test]
fn a_ring_that_is_found_full_is_cut_on_demand() {
    let media = media();
    let group = crate::GroupSettings { memtable_bytes: 3 << 20, ..settings() };
    let store = Store::open_with(&media, group.clone(), engine_settings()).expect("the volume opens");
    let half = WAL_BYTES / 2;
    let mut n = 0;
    // One generation is flushed, and the log is more than half full of it and the next.
    while store.engine.status().wal_used_bytes < half + (half / 4) {
        store.put(&key(n), &[1; 4096]);
        n += 1;
        assert!(n < 10_000, "the log is cut too early for this test");
    }
    // On a busy machine the flush may be under way still, and then the next process would have to do it before a cut helps.
    mainstay_io::block_on(store.group().shared().idle());
    drop(store);
    media.kill(1);
    let store = Store::open_with(&media, group, engine_settings()).expect("the volume opens");
    let used = store.engine.status().wal_used_bytes;
    assert!(used > half, "used={used}");
    // As the owner of a replicated log does while its ring is full: it asks until it is.
    while store.engine.status().wal_used_bytes > half {
        store.engine.relieve_log();
        std::thread::yield_now();
    }
    assert_eq!(store.get(&key(0)).as_deref(), Some(&[1; 4096][..]));
    store.close();
}
