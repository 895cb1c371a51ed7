//! Many keys of one call: what is not in memory is read from the device together. Counted at the device.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::sim::{IoKind, SimMedia};
use mainstay_io::{
    AlignedBuf, AlignedBytes, Backend, BlockDevice, BoxFuture, Environment, Geometry, IoClass, Media, Op, WriteMode,
    Zone, block_on,
};

use super::harness::*;
use crate::{
    CommandBody, Engine, ErrorKind, GroupSettings, KeyspaceId, LocalLog, MAIN, OperatorId, WriteBatch, WriteOp,
};

/// Counts the reads that are started alone, and those of each submission.
struct Counting {
    inner: Arc<dyn BlockDevice>,
    alone: AtomicUsize,
    together: Mutex<Vec<usize>>,
}

impl Counting {
    /// What was counted since the last call.
    fn take(&self) -> (usize, Vec<usize>) {
        let together = std::mem::take(&mut *self.together.lock().expect("no test panics while it holds the counts"));
        (self.alone.swap(0, Ordering::SeqCst), together)
    }
}

impl BlockDevice for Counting {
    fn geometry(&self) -> &Geometry {
        self.inner.geometry()
    }

    fn read(&self, offset: u64, buf: AlignedBuf, class: IoClass) -> Op<AlignedBuf> {
        self.alone.fetch_add(1, Ordering::SeqCst);
        self.inner.read(offset, buf, class)
    }

    fn read_many(&self, reads: Vec<(u64, AlignedBuf)>, class: IoClass) -> Vec<Op<AlignedBuf>> {
        self.together.lock().expect("no test panics while it holds the counts").push(reads.len());
        self.inner.read_many(reads, class)
    }

    fn write(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, class: IoClass) -> Op<()> {
        self.inner.write(offset, bufs, mode, class)
    }

    fn flush(&self) -> Op<()> {
        self.inner.flush()
    }

    fn allocate(&self, offset: u64, length: u64) -> Op<()> {
        self.inner.allocate(offset, length)
    }

    fn discard(&self, offset: u64, length: u64) -> Op<()> {
        self.inner.discard(offset, length)
    }

    fn run_resident(&self, name: &str, task: BoxFuture<()>) {
        self.inner.run_resident(name, task);
    }

    fn poisoned(&self) -> Option<mainstay_io::Error> {
        self.inner.poisoned()
    }

    fn shutdown(&self, grace: Duration) -> Op<()> {
        self.inner.shutdown(grace)
    }
}

/// A volume whose extents are counted.
struct Counted {
    inner: Arc<dyn Media>,
    extents: Arc<Counting>,
}

impl Media for Counted {
    fn superblock(&self) -> Zone {
        self.inner.superblock()
    }

    fn create_zones(&self, wal_bytes: u64) -> Op<()> {
        self.inner.create_zones(wal_bytes)
    }

    fn zones(&self, wal_bytes: u64) -> mainstay_io::Result<(Zone, Zone)> {
        let (wal, extents) = self.inner.zones(wal_bytes)?;
        // In a directory the extents have a device of their own, from its beginning.
        Ok((wal, Zone::new(self.extents.clone(), 0, extents.length())))
    }

    fn is_blank(&self) -> mainstay_io::Result<bool> {
        self.inner.is_blank()
    }

    fn backend(&self) -> (Backend, Option<String>) {
        self.inner.backend()
    }

    fn devices(&self) -> Vec<Arc<dyn BlockDevice>> {
        self.inner.devices()
    }

    fn unlock(&self) {
        self.inner.unlock();
    }

    fn name(&self) -> String {
        self.inner.name()
    }
}

fn group_settings() -> GroupSettings {
    GroupSettings { memtable_bytes: 256 << 10, table_bytes: 256 << 10, ..settings() }
}

fn open(media: &SimMedia) -> (Store, Arc<Counting>) {
    let inner = media.open().expect("nobody else holds it");
    let data = inner.devices().into_iter().nth(1).expect("the log, and the extents");
    let extents = Arc::new(Counting { inner: data, alone: AtomicUsize::new(0), together: Mutex::default() });
    let media = Arc::new(Counted { inner, extents: extents.clone() });
    let store: crate::Result<Store> = block_on(async {
        let mut found = Vec::new();
        let mut deliver = |record| {
            found.push(record);
            Ok(())
        };
        let engine = Engine::open(media, Environment::system(), engine_settings(), &mut deliver).await?;
        let log = LocalLog::open(&engine, GROUP, group_settings(), found).await?;
        Ok(Store { engine, log, replayed: 0 })
    });
    (store.expect("the volume opens"), extents)
}

/// A value that no compression makes short: a block holds few.
fn value(n: u64) -> Vec<u8> {
    let mut word = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = (0..4000).map(|_| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word as u8
    });
    bytes.collect()
}

fn name(n: u64) -> String {
    format!("key{n:04}")
}

const KEYS: u64 = 300;

/// A store of one level, in tables.
fn stored() -> SimMedia {
    let media = media();
    let store = Store::open_with(&media, group_settings(), engine_settings()).expect("the volume opens");
    for n in 0..KEYS {
        store.put(&name(n), &value(n));
    }
    store.settle();
    store.must(compact(MAIN, "", None));
    store.settle();
    store.close();
    media
}

fn check(store: &Store, numbers: &[u64]) {
    let snapshot = store.group().snapshot(MAIN).expect("main");
    let keys: Vec<String> = numbers.iter().map(|n| name(*n)).collect();
    let found = block_on(snapshot.get_many(DEFAULT, &keys)).expect("read");
    let expected = numbers.iter().map(|n| (*n < KEYS).then(|| Bytes::from(value(*n))));
    assert!(found.into_iter().eq(expected), "{numbers:?}");
}

/// Each key began a read of its own, and those of the indexes that many keys share were begun once for each key.
#[test]
fn blocks_that_are_not_cached_are_read_in_one_submission() {
    let media = stored();
    let (store, device) = open(&media);
    let tables = store.group().status().tables as usize;
    assert!(tables > 2, "{tables}");
    device.take();
    // Filter indexes, filters, top indexes and blocks: each is one submission for all keys, which lie in one level.
    check(&store, &(0..15).map(|n| n * 20).collect::<Vec<_>>());
    assert_eq!(device.take(), (0, vec![tables, tables, tables, 15]));
    // In the order of the keys, whatever that is, and with keys that are not there.
    check(&store, &[290, 10, 5000, 170, 30, 10, 5001, 250]);
    assert_eq!(device.take(), (0, vec![5]));
    check(&store, &[290, 10, 170, 30, 0, 20]);
    assert_eq!(device.take(), (0, Vec::new()), "all of it is cached");
    store.close();
}

#[test]
fn memory_is_looked_up_first_and_a_submission_is_bounded() {
    let media = stored();
    let (store, device) = open(&media);
    store.must(put(MAIN, &name(7), b"new"));
    store.must(delete(MAIN, &name(8)));
    let removed = range(&name(20), Some(&name(30)));
    store.must(delete_range(MAIN, removed));
    device.take();
    let snapshot = store.group().snapshot(MAIN).expect("main");
    let memory = [name(8), name(7), name(29), name(20)];
    let found = block_on(snapshot.get_many(DEFAULT, &memory)).expect("read");
    assert_eq!(found, [None, Some(Bytes::from_static(b"new")), None, None]);
    assert_eq!(device.take(), (0, Vec::new()), "nothing of it is asked of a table");
    let none: [&str; 0] = [];
    assert!(block_on(snapshot.get_many(DEFAULT, &none)).expect("nothing to read").is_empty());
    assert!(block_on(snapshot.get_many(crate::KeyspaceId(99), &memory)).is_err());

    // Of each block one key, more than may wait at a time.
    let numbers: Vec<u64> = (30..KEYS).collect();
    check(&store, &numbers);
    let (alone, together) = device.take();
    assert!(alone == 0 && together.iter().all(|reads| *reads <= 64), "{alone} {together:?}");
    assert!(together.len() < 20, "{together:?}");
    store.close();
}

/// A misread goes away by itself: it is read once more, also among others.
#[test]
fn a_misread_among_many_is_read_again() {
    let media = stored();
    let (store, device) = open(&media);
    check(&store, &(0..15).map(|n| n * 20).collect::<Vec<_>>());
    device.take();
    media.extents_disk().fail_next(IoKind::Read);
    check(&store, &[50, 150, 250]);
    assert_eq!(device.take(), (0, vec![3, 1]));
    store.close();
}

#[test]
fn calls_that_wait_for_each_others_blocks_are_answered() {
    let media = stored();
    let (store, _) = open(&media);
    let snapshot = store.group().snapshot(MAIN).expect("main");
    let keys: Vec<String> = (0..KEYS).step_by(9).map(name).collect();
    let backwards: Vec<String> = keys.iter().rev().cloned().collect();
    let both = futures_util::future::join(snapshot.get_many(DEFAULT, &keys), snapshot.get_many(DEFAULT, &backwards));
    let (one, other) = block_on(both);
    let (one, mut other) = (one.expect("read"), other.expect("read"));
    other.reverse();
    assert!(one == other && one.iter().all(Option::is_some));
    store.close();
}

fn merge(store: &Store, keyspace: KeyspaceId, key: &str, operand: &[u8]) {
    let (key, operand) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(operand));
    let ops = vec![WriteOp::Merge { keyspace, key, operand }];
    store.must(CommandBody::Batch(WriteBatch { branch: MAIN, ops }));
}

/// What memory knows of a key may be no more than operands: it is read on below them, together with the others.
#[test]
fn operands_are_merged_into_what_is_read_for_them() {
    let media = stored();
    let (store, device) = open(&media);
    store.must(CommandBody::SetOperator { name: "default".into(), operator: OperatorId::APPEND });
    [10, 50, KEYS].into_iter().for_each(|n| merge(&store, DEFAULT, &name(n), b"-1"));
    store.flush();
    [10, 90, KEYS + 1].into_iter().for_each(|n| merge(&store, DEFAULT, &name(n), b"-2"));
    store.must(delete(MAIN, &name(130)));
    merge(&store, DEFAULT, &name(130), b"-3");
    let keys = [10, 50, 90, 130, KEYS, KEYS + 1, KEYS + 2, 170].map(name);
    let snapshot = store.group().snapshot(MAIN).expect("main");
    device.take();
    let found = block_on(snapshot.get_many_versions(DEFAULT, &keys)).expect("read");
    let (alone, together) = device.take();
    assert!(alone == 0 && !together.is_empty(), "{alone} {together:?}");
    let with = |n, more: &str| Some(Bytes::from([value(n), more.into()].concat()));
    let alone = |operand| Some(Bytes::from_static(operand));
    let values: Vec<_> = found.iter().map(|found| found.as_ref().map(|(_, value)| value.clone())).collect();
    let expected = [
        with(10, "-1-2"),
        with(50, "-1"),
        with(90, "-2"),
        alone(b"-3"),
        alone(b"-1"),
        alone(b"-2"),
        None,
        with(170, ""),
    ];
    assert!(values == expected);
    for (key, found) in keys.iter().zip(found) {
        assert_eq!(block_on(snapshot.get_version(DEFAULT, key.as_bytes())).expect("read"), found, "{key}");
    }

    store.must(CommandBody::SetOperator { name: "sums".into(), operator: OperatorId::U64_ADD });
    let keyspace = store.group().keyspace("sums").expect("made");
    let word = WriteOp::Put { keyspace, key: "n".into(), value: "no number".into() };
    store.must(CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![word] }));
    for flushed in [false, true] {
        merge(&store, keyspace, "n", &[0; 8]);
        if flushed {
            store.flush();
        }
        let snapshot = store.group().snapshot(MAIN).expect("main");
        let error = block_on(snapshot.get_many(keyspace, &["m", "n"])).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid, "flushed={flushed}");
        assert!(error.to_string().contains("put or remove it key=n"), "{error}");
    }
    store.close();
}
