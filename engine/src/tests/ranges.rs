//! Ranges removed at once: what they hide wherever they and the keys lie, and what they cost.

use std::ops::Bound;

use bytes::Bytes;
use mainstay_io::block_on;

use super::harness::*;
use super::replicas::{Replica, check_equal, lead};
use crate::{
    Command, CommandBody, Condition, ConditionalBatch, ErrorKind, GroupSettings, KeyRange, KeyspaceId, LogIndex, MAIN,
    WriteBatch, WriteOp, decode_refusals,
};

fn key(n: usize) -> String {
    format!("key-{n:05}")
}

fn put_op(key: &str, value: &str) -> WriteOp {
    WriteOp::Put {
        keyspace: DEFAULT,
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
    }
}

fn remove_op(start: &str, end: Option<&str>) -> WriteOp {
    WriteOp::DeleteRange { keyspace: DEFAULT, range: range(start, end) }
}

fn batch(ops: Vec<WriteOp>) -> WriteBatch {
    WriteBatch { branch: MAIN, ops }
}

fn live(store: &Store) -> Vec<String> {
    let pairs = all(&store.group().snapshot(MAIN).expect("main"), DEFAULT);
    pairs.into_keys().map(|key| String::from_utf8_lossy(&key).into_owned()).collect()
}

/// The last key of a table may be that of a range tombstone alone: it hides what older tables have there, too.
#[test]
fn a_range_hides_its_last_key_from_one_table_to_the_other() {
    let store = Store::open(&media());
    for n in 0..30 {
        store.put(&key(n), b"old");
    }
    store.flush();
    let (first, last) = (key(5), key(9));
    let bounds = (Bound::Included(Bytes::from(first)), Bound::Included(Bytes::from(last)));
    store.must(delete_range(MAIN, KeyRange::new(bounds.0, bounds.1)));
    store.flush();
    let expect: Vec<String> = (0..5).chain(10..30).map(key).collect();
    assert_eq!(live(&store), expect);
    let back = all_back(&store.group().snapshot(MAIN).expect("main"), DEFAULT);
    assert!(back.into_keys().eq(expect.iter().map(|key| key.clone().into_bytes())), "from behind");
    assert_eq!((store.get(&key(9)), store.get(&key(10)).is_some()), (None, true));
    store.close();
}

/// Within an entry order decides, over the borders of its batches, with conditions and without; a restart decides the same.
#[test]
fn what_comes_before_a_range_in_its_entry_is_gone_and_what_comes_after_is_not() {
    let media = media();
    let mut store = Store::open(&media);
    store.put("b0", b"old");
    store.must(CommandBody::Batch(batch(vec![
        put_op("b1", "before"),
        put_op("a", "outside"),
        remove_op("b", Some("c")),
        put_op("b2", "after"),
        WriteOp::Delete { keyspace: DEFAULT, key: "b3".into() },
    ])));
    assert_eq!(live(&store), ["a", "b2"]);
    let refused = WriteBatch { branch: crate::BranchId(99), ops: vec![remove_op("a", None)] };
    let batches = vec![
        batch(vec![put_op("b4", "before")]),
        refused,
        batch(vec![remove_op("b", Some("b9"))]),
        batch(vec![put_op("b5", "after")]),
    ];
    let applied = store.must(CommandBody::Batches(batches));
    let refusals = decode_refusals(&applied.response.expect("an answer")).expect("own bytes");
    assert_eq!(
        refusals.iter().map(|(place, error)| (*place, error.kind())).collect::<Vec<_>>(),
        [(1, ErrorKind::NotFound)]
    );
    assert_eq!(live(&store), ["a", "b5"]);
    let absent = |key: &'static str| Condition::Absent { keyspace: DEFAULT, key: key.into() };
    let when = |conditions, ops| ConditionalBatch { conditions, batch: batch(ops) };
    store.must(CommandBody::BatchesIf(vec![
        when(vec![], vec![put_op("b6", "before")]),
        when(vec![], vec![remove_op("b", None), put_op("b7", "after")]),
        when(vec![absent("b5"), absent("b6")], vec![put_op("c", "the two are gone")]),
        when(vec![absent("b7")], vec![put_op("d", "never")]),
    ]));
    assert_eq!(live(&store), ["a", "b7", "c"]);
    for _ in 0..2 {
        drop(store);
        media.crash(1);
        store = Store::open(&media);
        assert_eq!(live(&store), ["a", "b7", "c"]);
        store.settle();
        assert_eq!(live(&store), ["a", "b7", "c"]);
    }
    store.close();
    check_no_leak(&media);
}

#[test]
fn ranges_without_a_key_and_keyspaces_that_are_not_there_are_refused() {
    let media = media();
    let store = Store::open(&media);
    store.put("a", b"1");
    let kind = |op: WriteOp, index: u64| {
        // As an entry of a log that another build wrote: it was not checked before.
        let command = Command { time_ms: 1, body: CommandBody::Batch(batch(vec![op])) };
        let applied = block_on(store.group().apply(LogIndex(store.group().applied().0 + index), &command));
        applied.expect("the group is open").response.expect_err("refused").kind()
    };
    assert_eq!(kind(remove_op("b", Some("b")), 1), ErrorKind::Invalid);
    assert_eq!(kind(remove_op("b", Some("a")), 1), ErrorKind::Invalid);
    let long = Bytes::from(vec![b'x'; crate::KEY_BYTES_MAX + 2]);
    let long = KeyRange::new(std::ops::Bound::Included(long), std::ops::Bound::Unbounded);
    assert_eq!(kind(WriteOp::DeleteRange { keyspace: DEFAULT, range: long }, 1), ErrorKind::Invalid);
    let nowhere = WriteOp::DeleteRange { keyspace: KeyspaceId(9), range: range("a", None) };
    assert_eq!(kind(nowhere, 1), ErrorKind::NotFound);
    assert_eq!(live(&store), ["a"]);
}

/// What a condition of an earlier read says about keys that a range has removed since, in memory, in tables and compacted.
#[test]
fn a_range_conflicts_with_what_was_read_of_it() {
    let media = media();
    let mut store = Store::open(&media);
    let a = store.put("a", b"1");
    let b = store.put("b", b"1");
    let z = store.put("z", b"1");
    let since = store.group().applied();
    store.must(delete_range(MAIN, range("b", Some("c"))));
    for round in ["in memory", "in tables", "compacted", "opened again"] {
        let check = |condition: Condition, holds: bool| {
            let body =
                CommandBody::BatchIf(ConditionalBatch { conditions: vec![condition.clone()], batch: batch(vec![]) });
            let answer = store.propose(body).expect("the log takes it").response;
            assert_eq!(answer.is_ok(), holds, "{round} {condition:?}");
        };
        let version = |key: &'static str, version| Condition::Version { keyspace: DEFAULT, key: key.into(), version };
        check(version("a", a), true);
        check(version("b", b), false);
        check(version("z", z), true);
        check(Condition::Absent { keyspace: DEFAULT, key: "b".into() }, true);
        check(Condition::Present { keyspace: DEFAULT, key: "b".into() }, false);
        let range = |count| {
            let (lower, upper) = (std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);
            Condition::Range { keyspace: DEFAULT, lower, upper, since, count }
        };
        check(range(3), false);
        check(range(2), true);
        match round {
            "in memory" => store.flush(),
            "in tables" => store.settle(),
            _ => {
                store.close();
                store = Store::open(&media);
            }
        }
    }
    store.close();
}

/// A keyspace that is cleared gives its tables back unread, and so does the tombstone that said so; a checkpoint and a clone of before keep
/// theirs.
#[test]
fn a_cleared_keyspace_gives_its_space_back_and_a_checkpoint_keeps_its_own() {
    let media = media();
    let store = Store::open(&media);
    for n in 0..600 {
        store.put(&key(n), &[7; 100]);
    }
    store.settle();
    let held = store.group().status().table_bytes;
    let log = store.group().applied();
    store.must(delete_range(MAIN, range("", None)));
    assert_eq!(store.group().applied(), LogIndex(log.0 + 1), "one entry");
    assert!(live(&store).is_empty());
    store.settle();
    let status = store.group().status();
    assert_eq!((status.tables, status.table_bytes, status.divergences), (0, 0, 0), "held {held} before");
    for n in 0..600 {
        store.put(&key(n), &[8; 100]);
    }
    store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    let clone = store.must(CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() });
    store.must(delete_range(MAIN, range(&key(0), Some(&key(600)))));
    store.settle();
    assert!(live(&store).is_empty());
    let clone = crate::BranchId(clone.index.0);
    for _ in 0..2 {
        assert_eq!(all(&store.group().checkpoint("c").expect("made"), DEFAULT).len(), 600);
        assert_eq!(all(&store.group().snapshot(clone).expect("made"), DEFAULT).len(), 600);
        store.must(delete_range(clone, range(&key(100), Some(&key(500)))));
        assert_eq!(all_back(&store.group().snapshot(clone).expect("made"), DEFAULT).len(), 200);
        store.must(delete_range(clone, range(&key(600), None)));
        for n in 100..500 {
            store.must(put(clone, &key(n), b"again"));
        }
        store.settle();
    }
    store.must(CommandBody::DropCheckpoint { name: "c".into() });
    store.must(CommandBody::DropClone { name: "x".into() });
    store.settle();
    store.close();
    check_no_leak(&media);
}

/// One range over tables of several levels, cut where the tables of its level are cut: each key on its own side of it.
#[test]
fn a_range_is_cut_where_tables_are_cut() {
    let media = media();
    let settings = GroupSettings { table_bytes: 2 << 10, base_level_bytes: 4 << 10, ..settings() };
    let store = Store::open_with(&media, settings.clone(), engine_settings()).expect("opens");
    for n in 0..400 {
        store.put(&key(n), &[n as u8; 60]);
    }
    store.settle();
    for n in (0..400).step_by(2) {
        store.put(&key(n), b"even");
    }
    store.must(delete_range(MAIN, range(&key(50), Some(&key(350)))));
    for n in (0..400).step_by(5) {
        store.put(&key(n), b"five");
    }
    let expect: Vec<_> = (0..400).filter(|n| !(50..350).contains(n) || n % 5 == 0).map(key).collect();
    assert_eq!(live(&store), expect);
    store.flush();
    assert_eq!(live(&store), expect);
    store.settle();
    assert_eq!(live(&store), expect);
    store.close();
    let offline = block_on(crate::Offline::open(media.open().expect("closed"), &mainstay_io::Environment::system()));
    let report = block_on(offline.expect("opens").verify(&mut |_| {})).expect("reads");
    assert!(report.damage.is_empty(), "{:?}", report.damage);
    media.kill(0);
    let store = Store::open_with(&media, settings, engine_settings()).expect("opens");
    assert_eq!(live(&store), expect);
    store.close();
    check_no_leak(&media);
}

/// Replicas that crash and catch up at different places drop the same tables and make the same ones.
#[test]
fn replicas_make_the_same_of_ranges() {
    let leader = Replica::new(32 << 20, 2);
    let work = (0..900_usize).map(|n| match n % 45 {
        11 => delete_range(MAIN, range(&key(n * 7 % 300), Some(&key(n * 7 % 300 + n % 200 + 1)))),
        29 if n % 2 == 0 => delete_range(MAIN, range(&key(n % 250), None)),
        44 if n > 600 => delete_range(MAIN, range("", None)),
        _ if n == 400 => CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN },
        _ => put(MAIN, &key(n * 37 % 300), format!("{n:<80}").as_bytes()),
    });
    let log = lead(&leader, work);
    let ranged = log.iter().filter(|command| match &command.body {
        CommandBody::Install { tables, .. } => tables.iter().any(|table| table.ranges.tombstones > 0),
        _ => false,
    });
    assert!(ranged.count() > 3, "range tombstones are in tables");
    for seed in 0..3_usize {
        let mut follower = Replica::new(24 << 20, 1 + seed % 2);
        let cut = log.len() * (seed + 1) / 4;
        follower.feed(&log[..cut]);
        follower = follower.crash(seed as u64);
        follower.feed(&log);
        check_equal(&leader, &follower);
    }
}
