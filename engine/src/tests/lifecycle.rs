//! Put, get, flush, compact, close, open: one step at a time.

use mainstay_io::block_on;

use super::harness::*;
use crate::{BranchId, CommandBody, ErrorKind, GroupSettings, KeyspaceId, LogIndex, MAIN, TableCompression};

fn value(n: usize) -> Vec<u8> {
    format!("value-{n}-").repeat(8).into_bytes()
}

fn key(n: usize) -> String {
    format!("key-{n:05}")
}

fn checkpoint(name: &str) -> CommandBody {
    CommandBody::CreateCheckpoint { name: name.into(), branch: MAIN }
}

fn clone_of(name: &str, checkpoint: &str) -> CommandBody {
    CommandBody::CreateClone { name: name.into(), checkpoint: checkpoint.into() }
}

#[test]
fn what_was_written_is_read_before_and_after_flush_and_reopen() {
    let media = media();
    let store = Store::open(&media);
    for n in 0..10 {
        store.put(&key(n), &value(n));
    }
    assert_eq!(store.get(&key(3)).as_deref(), Some(&value(3)[..]));
    assert_eq!(store.get("absent"), None);
    store.flush();
    assert_eq!(store.group().status().frozen_generations, 0);
    assert!(store.group().status().tables > 0);
    assert_eq!(store.get(&key(3)).as_deref(), Some(&value(3)[..]));
    store.must(delete(MAIN, &key(3)));
    assert_eq!(store.get(&key(3)), None);
    store.close();

    let store = Store::open(&media);
    assert_eq!(store.get(&key(3)), None);
    assert_eq!(store.get(&key(9)).as_deref(), Some(&value(9)[..]));
    store.close();
    check_no_leak(&media);
}

#[test]
fn a_clean_close_leaves_nothing_to_replay_into_memory() {
    let media = media();
    let store = Store::open(&media);
    let last = (0..50).map(|n| store.put(&key(n), &value(n))).max().expect("fifty");
    store.close();
    let store = Store::open(&media);
    assert!(store.group().flushed() >= last);
    assert!(store.replayed <= 2, "only the last install may be left, found {}", store.replayed);
    assert_eq!(store.engine.status().memory_used_bytes, 0);
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT).len(), 50);
    store.close();
}

#[test]
fn many_writes_are_compacted_and_stay_readable() {
    let media = media();
    let store = Store::open(&media);
    for round in 0..4 {
        for n in 0..400 {
            store.put(&key(n * 7 % 400), &value(n + round));
        }
        for n in 0..400 {
            if n % 5 == round {
                store.must(delete(MAIN, &key(n)));
            }
        }
    }
    store.settle();
    let snapshot = store.group().snapshot(MAIN).expect("main");
    let pairs = all(&snapshot, DEFAULT);
    assert_eq!(pairs.len(), 320);
    assert_eq!(pairs, all_back(&snapshot, DEFAULT));
    let status = store.group().status();
    // 400 keys of 90 bytes: without compaction there would be 50 runs of them.
    assert!(status.table_bytes < 400 << 10, "{status:?}");
    assert_eq!((status.absent_jobs, status.divergences), (0, 0));
    drop(snapshot);
    store.close();
    check_no_leak(&media);
}

#[test]
fn a_snapshot_stands_still_while_the_store_goes_on() {
    let media = media();
    let store = Store::open(&media);
    for n in 0..200 {
        store.put(&key(n), &value(n));
    }
    let snapshot = store.group().snapshot(MAIN).expect("main");
    let before = all(&snapshot, DEFAULT);
    for n in 0..200 {
        store.put(&key(n), b"new");
        if n % 3 == 0 {
            store.must(delete(MAIN, &key(n)));
        }
    }
    store.settle();
    assert_eq!(all(&snapshot, DEFAULT), before);
    assert_eq!(get(&snapshot, &key(0)).as_deref(), Some(&value(0)[..]));
    drop(snapshot);
    store.close();
    check_no_leak(&media);
}

#[test]
fn a_checkpoint_copies_nothing_and_a_clone_goes_its_own_way() {
    let media = media();
    let store = Store::open(&media);
    for n in 0..300 {
        store.put(&key(n), &value(n));
    }
    store.settle();
    let before = store.engine.status().extent_bytes;
    store.must(checkpoint("before"));
    let made = store.must(clone_of("copy", "before"));
    let copy = BranchId(made.index.0);
    assert_eq!(store.group().branch("copy"), Some(copy));
    store.flush();
    assert_eq!(store.engine.status().extent_bytes, before, "no byte is copied");

    for n in 0..300 {
        store.must(put(copy, &key(n), b"of the clone"));
        store.put(&key(n + 1000), b"of main");
    }
    store.must(put(copy, "only here", b"x"));
    let main = all(&store.group().snapshot(MAIN).expect("main"), DEFAULT);
    let clone = all(&store.group().snapshot(copy).expect("the clone"), DEFAULT);
    let frozen = all(&store.group().checkpoint("before").expect("the checkpoint"), DEFAULT);
    assert_eq!((main.len(), clone.len(), frozen.len()), (600, 301, 300));
    assert!(clone.values().all(|v| v == b"of the clone" || v == b"x"));
    assert!(frozen.iter().all(|(k, v)| main.get(k) == Some(v)));
    store.close();

    let store = Store::open(&media);
    assert_eq!(all(&store.group().snapshot(copy).expect("the clone"), DEFAULT), clone);
    assert_eq!(all(&store.group().checkpoint("before").expect("the checkpoint"), DEFAULT), frozen);
    assert_eq!(store.group().branches().len(), 2);
    assert_eq!(store.group().checkpoints()[0].name, "before");
    store.must(CommandBody::DropClone { name: "copy".into() });
    store.must(CommandBody::DropCheckpoint { name: "before".into() });
    assert_eq!(store.group().snapshot(copy).err().map(|e| e.kind()), Some(ErrorKind::NotFound));
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT), main);
    store.close();
    check_no_leak(&media);
}

/// The checkpoint is taken while its data lies in memtables; the memtables go, the checkpoint and its clone stay.
#[test]
fn a_checkpoint_of_memtables_is_readable_at_once() {
    let media = media();
    let store = Store::open(&media);
    store.put("a", b"1");
    store.must(checkpoint("c"));
    let copy = BranchId(store.must(clone_of("x", "c")).index.0);
    store.put("a", b"2");
    store.must(put(copy, "b", b"3"));
    let read = |store: &Store| {
        let of = |snapshot: crate::Snapshot| (get(&snapshot, "a"), get(&snapshot, "b"));
        let main = of(store.group().snapshot(MAIN).expect("main"));
        let clone = of(store.group().snapshot(copy).expect("the clone"));
        (main, clone, of(store.group().checkpoint("c").expect("the checkpoint")))
    };
    let bytes = |s: &'static [u8]| Some(bytes::Bytes::from_static(s));
    let expect = ((bytes(b"2"), None), (bytes(b"1"), bytes(b"3")), (bytes(b"1"), None));
    assert_eq!(read(&store), expect);
    store.flush();
    assert_eq!(read(&store), expect);
    drop(store);
    media.kill(1);
    let store = Store::open(&media);
    assert_eq!(read(&store), expect);
    store.close();
}

#[test]
fn keyspaces_are_made_dropped_and_refused() {
    let media = media();
    let store = Store::open(&media);
    let made = store.must(CommandBody::CreateKeyspace { name: "users".into() });
    let id = KeyspaceId(u32::from_le_bytes(made.response.expect("made")[..].try_into().expect("an id has four bytes")));
    assert_eq!(store.group().keyspace("users"), Some(id));
    let again = store.must(CommandBody::CreateKeyspace { name: "users".into() });
    assert_eq!(again.response.expect("found").to_vec(), id.0.to_le_bytes());
    let write = |key: &str| {
        let op = crate::WriteOp::Put { keyspace: id, key: key.to_owned().into(), value: "v".into() };
        CommandBody::Batch(crate::WriteBatch { branch: MAIN, ops: vec![op] })
    };
    store.must(write("k"));
    store.must(checkpoint("c"));
    store.must(CommandBody::DropKeyspace { name: "users".into() });
    assert_eq!(store.group().keyspace("users"), None);
    let refused = store.propose(write("k")).expect("the log takes it").response.expect_err("it is gone");
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    let frozen = store.group().checkpoint("c").expect("the checkpoint");
    assert_eq!(frozen.keyspace("users"), Some(id));
    assert_eq!(all(&frozen, id).len(), 1);
    drop(frozen);
    store.close();
    let store = Store::open(&media);
    assert_eq!(all(&store.group().checkpoint("c").expect("the checkpoint"), id).len(), 1);
    assert_eq!(store.group().keyspaces().len(), 1);
    store.close();
    check_no_leak(&media);
}

#[test]
fn bad_keys_and_branches_are_refused_by_kind() {
    let media = media();
    let store = Store::open(&media);
    let kind = |body| match store.propose(body) {
        Err(error) => error.kind(),
        Ok(applied) => applied.response.expect_err("refused").kind(),
    };
    assert_eq!(kind(put(MAIN, "", b"v")), ErrorKind::Invalid);
    assert_eq!(kind(put(MAIN, &"k".repeat(crate::KEY_BYTES_MAX + 1), b"v")), ErrorKind::Invalid);
    assert_eq!(kind(put(MAIN, "k", &vec![0; crate::VALUE_BYTES_MAX + 1])), ErrorKind::Invalid);
    assert_eq!(kind(put(BranchId(99), "k", b"v")), ErrorKind::NotFound);
    assert_eq!(kind(CommandBody::DropCheckpoint { name: "none".into() }), ErrorKind::NotFound);
    store.close();
    // What is applied without having been encoded here is held to the same limits.
    let (engine, _) = engine(&media, engine_settings()).expect("opens");
    let group = block_on(engine.group(GROUP, settings())).expect("opens");
    let command = crate::Command { time_ms: 0, body: put(MAIN, "", b"v") };
    let next = LogIndex(group.applied().0 + 1);
    let applied = block_on(group.apply(next, &command)).expect("the group is open");
    assert_eq!(applied.response.expect_err("refused").kind(), ErrorKind::Invalid);
}

/// The log is far smaller than what is written through it.
#[test]
fn the_log_is_cut_while_it_is_written() {
    let media = media();
    let settings = crate::GroupSettings { memtable_bytes: 256 << 10, table_bytes: 1 << 20, ..settings() };
    let store = Store::open_with(&media, settings.clone(), engine_settings()).expect("opens");
    for n in 0..600 {
        store.put(&key(n % 50), &vec![n as u8; 64 << 10]);
    }
    assert!(store.engine.status().wal_used_bytes <= WAL_BYTES);
    let expect = all(&store.group().snapshot(MAIN).expect("main"), DEFAULT);
    drop(store);
    media.crash(3);
    let store = Store::open_with(&media, settings, engine_settings()).expect("opens");
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), DEFAULT), expect);
    store.close();
}

/// Entries that write nothing fill the log too: a rotation without memtables lets it be cut.
#[test]
fn entries_without_effect_do_not_fill_the_log() {
    let media = media();
    let store = Store::open(&media);
    for _ in 0..400 {
        let refused = store.propose(put(BranchId(99), "k", &[1; 64 << 10])).expect("the log takes it");
        assert!(refused.response.is_err());
    }
    assert!(store.group().flushed() > LogIndex(0));
    store.close();
}

#[test]
fn an_identity_is_set_once() {
    let media = media();
    let store = Store::open(&media);
    let identity = crate::Identity { cluster: [3; 16], node: 9 };
    block_on(store.engine.set_identity(identity)).expect("none was set");
    block_on(store.engine.set_identity(identity)).expect("the same again");
    let other = crate::Identity { node: 8, ..identity };
    let refused = block_on(store.engine.set_identity(other)).expect_err("another one");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    let incarnation = store.engine.incarnation();
    store.close();
    let store = Store::open(&media);
    assert_eq!((store.engine.identity(), store.engine.incarnation()), (identity, incarnation));
    store.close();
}

/// How many tables are smaller than what is in them, and how many have a block that is compressed by zstd: bytes 24 to 31 of a
/// root, and bit 0 of byte 4.
fn shapes(store: &Store) -> (usize, usize) {
    let tables = store.group().shared().stored_tables();
    let raw = |root: &[u8]| u64::from_le_bytes(root[24..32].try_into().expect("eight bytes"));
    let smaller = tables.iter().filter(|t| t.meta.bytes < raw(&t.meta.root)).count();
    (smaller, tables.iter().filter(|t| t.meta.root[4] & 1 == 1).count())
}

/// Writes every key in several flushes, so that the data come to the last level and some stay above it.
fn fill(store: &Store) {
    for round in 0..4 {
        for n in 0..400 {
            store.put(&key(n), &value(n + round));
        }
        store.flush();
    }
    store.settle();
}

/// How tables are compressed is decided when the group is made. A build that asked the settings of today would, after a change
/// of them on one replica, make other tables there than on the others.
#[test]
fn tables_are_compressed_as_the_group_was_made_to() {
    let open = |media: &_, compression| {
        let group = GroupSettings { compression, ..settings() };
        Store::open_with(media, group, engine_settings()).expect("the volume opens")
    };
    for compression in [TableCompression::None, TableCompression::Lz4, TableCompression::ByLevel] {
        let media = media();
        let store = open(&media, compression);
        store.put(&key(1), &value(1));
        store.flush();
        assert_eq!(shapes(&store).1, 0, "{compression:?}: nothing but L0 yet");
        fill(&store);
        let (smaller, zstd) = shapes(&store);
        assert_eq!(zstd > 0, compression == TableCompression::ByLevel, "{compression:?}");
        assert_eq!(smaller > 0, compression != TableCompression::None, "{compression:?}");
        store.close();
        let other = match compression {
            TableCompression::ByLevel => TableCompression::None,
            _ => TableCompression::ByLevel,
        };
        let store = open(&media, other);
        fill(&store);
        let (_, again) = shapes(&store);
        assert_eq!(again > 0, compression == TableCompression::ByLevel, "{compression:?}: opened with {other:?}");
        assert_eq!(store.get(&key(7)).as_deref(), Some(&value(7 + 3)[..]));
        store.close();
    }
}
