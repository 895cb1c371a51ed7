//! Changes from the log: what was applied and nothing else, in its order, on every replica and after every restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use mainstay_io::sim::{SimMedia, SimOptions};
use mainstay_io::{BoxFuture, block_on};

use super::harness::*;
use super::replicas::{Replica, check_equal, lead};
use crate::{
    BranchId, Change, ChangeKind, Changes, ClientToken, Command, CommandBody, Condition, ConditionalBatch, Entries,
    EntryPlace, EntrySource, ErrorKind, KeyspaceId, LogIndex, MAIN, OUTCOMES_KEYSPACE, OperatorId, Result, WriteBatch,
    WriteOp,
};

fn record() -> CommandBody {
    CommandBody::CreateKeyspace { name: OUTCOMES_KEYSPACE.into() }
}

fn changes(store: &Store, branch: BranchId, from: LogIndex) -> Result<Changes> {
    block_on(Changes::open(store.group().clone(), branch, store.log.entries(), from))
}

/// All that is applied.
fn rest(changes: &mut Changes) -> Vec<Change> {
    let next = || block_on(changes.try_next()).expect("the log is there");
    std::iter::from_fn(next).collect()
}

fn op(key: &str, value: Option<&str>) -> WriteOp {
    let (keyspace, key) = (DEFAULT, Bytes::copy_from_slice(key.as_bytes()));
    match value {
        Some(value) => WriteOp::Put { keyspace, key, value: Bytes::copy_from_slice(value.as_bytes()) },
        None => WriteOp::Delete { keyspace, key },
    }
}

fn merge(key: &str, operand: &[u8]) -> WriteOp {
    let (key, operand) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(operand));
    WriteOp::Merge { keyspace: DEFAULT, key, operand }
}

fn set_operator(name: &str, operator: OperatorId) -> CommandBody {
    CommandBody::SetOperator { name: name.into(), operator }
}

fn batch(branch: BranchId, ops: Vec<WriteOp>) -> WriteBatch {
    WriteBatch { branch, ops }
}

fn when_absent(key: &'static str, ops: Vec<WriteOp>) -> ConditionalBatch {
    let condition = Condition::Absent { keyspace: DEFAULT, key: Bytes::from_static(key.as_bytes()) };
    ConditionalBatch { conditions: vec![condition], batch: batch(MAIN, ops) }
}

fn elsewhere() -> WriteBatch {
    let (key, value) = (Bytes::from_static(b"k"), Bytes::new());
    batch(MAIN, vec![WriteOp::Put { keyspace: KeyspaceId(99), key, value }])
}

fn once(sequence: u64, body: CommandBody) -> CommandBody {
    CommandBody::Once { token: ClientToken { client: [1; 16], sequence }, body: Box::new(body) }
}

/// What is proposed, and what of it is changed in the main branch.
fn story() -> Vec<(CommandBody, Option<ChangeKind>)> {
    let writes = |ops: Vec<WriteOp>| Some(ChangeKind::Writes(ops));
    // The clients have one too, made by the first of their requests.
    let (id, sums, name) = (KeyspaceId(3), KeyspaceId(4), "more".to_owned());
    let two = 2u64.to_le_bytes();
    let one = |operand: &[u8]| batch(MAIN, vec![merge("n", operand)]);
    let add = |operand: &[u8]| CommandBody::Batch(one(operand));
    let removed = WriteOp::DeleteRange { keyspace: DEFAULT, range: range("a", Some("b")) };
    let set = |value| CommandBody::Batch(batch(MAIN, vec![op("a1", Some(value))]));
    vec![
        (set("1"), writes(vec![op("a1", Some("1"))])),
        (CommandBody::Batch(elsewhere()), None),
        (CommandBody::BatchIf(when_absent("a1", vec![op("x", Some("never"))])), None),
        (CommandBody::BatchIf(when_absent("b", vec![op("b", None)])), writes(vec![op("b", None)])),
        (
            CommandBody::Batches(vec![
                batch(MAIN, vec![op("a2", None)]),
                elsewhere(),
                batch(MAIN, vec![op("c", None)]),
            ]),
            writes(vec![op("a2", None), op("c", None)]),
        ),
        (CommandBody::Batches(vec![elsewhere(), elsewhere()]), None),
        (
            CommandBody::BatchesIf(vec![
                when_absent("d", vec![op("d", Some("first"))]),
                when_absent("d", vec![op("d", Some("second"))]),
                when_absent("e", vec![op("e", Some("third"))]),
            ]),
            writes(vec![op("d", Some("first")), op("e", Some("third"))]),
        ),
        (once(1, set("2")), writes(vec![op("a1", Some("2"))])),
        (once(1, set("2")), None),
        (once(2, CommandBody::BatchIf(when_absent("a1", vec![op("x", None)]))), None),
        (once(3, CommandBody::BatchIf(when_absent("y", vec![op("y", None)]))), writes(vec![op("y", None)])),
        (
            CommandBody::Batch(batch(MAIN, vec![removed.clone(), op("a9", Some("9"))])),
            writes(vec![removed, op("a9", Some("9"))]),
        ),
        (CommandBody::Custom { branch: MAIN, command: Bytes::from_static(b"nobody decides it") }, None),
        (CommandBody::CreateKeyspace { name: name.clone() }, Some(ChangeKind::KeyspaceMade { id, name: name.clone() })),
        (CommandBody::CreateKeyspace { name: name.clone() }, None),
        (
            CommandBody::DropKeyspace { name: name.clone() },
            Some(ChangeKind::KeyspaceDropped { id, name: name.clone() }),
        ),
        (CommandBody::DropKeyspace { name: name.clone() }, None),
        (
            set_operator(&name, OperatorId::U64_ADD),
            Some(ChangeKind::OperatorGiven { id: sums, name: name.clone(), operator: OperatorId::U64_ADD }),
        ),
        (set_operator(&name, OperatorId::U64_ADD), None),
        (set_operator(&name, OperatorId::APPEND), None),
        (
            CommandBody::DropKeyspace { name: name.clone() },
            Some(ChangeKind::KeyspaceDropped { id: sums, name: name.clone() }),
        ),
        (
            set_operator("default", OperatorId::U64_ADD),
            Some(ChangeKind::OperatorGiven { id: DEFAULT, name: "default".into(), operator: OperatorId::U64_ADD }),
        ),
        (add(b"no number"), None),
        (CommandBody::Batches(vec![one(b"no number"), one(&two)]), writes(one(&two).ops)),
        (add(&two), writes(one(&two).ops)),
        (once(4, add(&two)), writes(one(&two).ops)),
        (CommandBody::Batch(batch(MAIN, vec![op("n", Some("word"))])), writes(vec![op("n", Some("word"))])),
        // Decided on what is there: refused.
        (once(5, add(&two)), None),
        (CommandBody::BatchIf(when_absent("z", one(&two).ops)), None),
        // Written blindly: it is in the state, so it is a change.
        (add(&two), writes(one(&two).ops)),
        (CommandBody::Batch(batch(MAIN, vec![op("n", None)])), writes(vec![op("n", None)])),
        (CommandBody::Rotate, None),
        (CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN }, None),
        (CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() }, None),
        (CommandBody::Batch(batch(BranchId(99), vec![op("a1", None)])), None),
        (set("3"), writes(vec![op("a1", Some("3"))])),
    ]
}

/// A reader of the log alone would give what a failed condition had held back, and the second of two equal requests.
#[test]
fn what_was_refused_is_no_change_also_after_a_crash_and_a_flush() {
    let media = media();
    let store = Store::open(&media);
    let made = store.must(record()).index;
    let mut expected = Vec::new();
    for (body, kind) in story() {
        let applied = store.propose(body).expect("the log takes it");
        expected.extend(kind.map(|kind| Change { index: applied.index, time_ms: 1000, kind }));
    }
    let check = |store: &Store| {
        let mut all = changes(store, MAIN, LogIndex(made.0 + 1)).expect("recorded");
        assert_eq!(rest(&mut all), expected);
        assert_eq!(all.position(), LogIndex(store.group().applied().0 + 1));
        // From anywhere in between.
        for from in made.0 + 1..=expected.last().expect("some").index.0 + 1 {
            let found = rest(&mut changes(store, MAIN, LogIndex(from)).expect("recorded"));
            assert!(found.iter().eq(expected.iter().filter(|change| change.index.0 >= from)), "{from}");
        }
    };
    check(&store);
    let clone = store.group().branch("x").expect("made");
    let written = store.must(put(clone, "of the clone", b"1")).index;
    let found = rest(&mut changes(&store, clone, LogIndex(made.0 + 1)).expect("recorded"));
    assert_eq!(found.iter().map(|change| change.index).filter(|index| *index > LogIndex(written.0 - 1)).count(), 1);
    drop(store);
    media.crash(3);
    let store = Store::open(&media);
    assert!(store.replayed > 0);
    check(&store);
    store.settle();
    check(&store);
    drop(store);
    media.crash(4);
    check(&Store::open(&media));
}

/// Puts the changes into a map, as a reader would.
fn build(map: &mut BTreeMap<Vec<u8>, Vec<u8>>, changes: &[Change]) {
    for change in changes {
        let ChangeKind::Writes(ops) = &change.kind else { continue };
        for op in ops {
            match op {
                WriteOp::Put { key, value, .. } | WriteOp::PutFor { key, value, .. } => {
                    drop(map.insert(key.to_vec(), value.to_vec()))
                }
                WriteOp::Delete { key, .. } => drop(map.remove(&key[..])),
                WriteOp::DeleteRange { range, .. } => map.retain(|key, _| !range.contains(key)),
                WriteOp::Merge { key, operand, .. } => map.entry(key.to_vec()).or_default().extend_from_slice(operand),
            }
        }
    }
}

fn work() -> impl Iterator<Item = CommandBody> {
    (0..900_usize).map(|n| match n {
        0 => record(),
        1 => set_operator("default", OperatorId::APPEND),
        _ if n % 5 == 2 => {
            CommandBody::Batch(batch(MAIN, vec![merge(&format!("k{}", n * 31 % 500), format!("+{n}").as_bytes())]))
        }
        _ if n % 7 == 1 => CommandBody::BatchesIf(vec![
            when_absent("k100", vec![op(&format!("k{}", 100 + n % 90), Some("if"))]),
            ConditionalBatch { conditions: Vec::new(), batch: elsewhere() },
            ConditionalBatch { conditions: Vec::new(), batch: batch(MAIN, vec![op(&format!("k{}", n % 300), None)]) },
        ]),
        _ if n % 97 == 50 => delete_range(MAIN, range(&format!("k{}", n % 400), Some(&format!("k{}", n % 400 + 30)))),
        _ => put(MAIN, &format!("k{}", n * 29 % 500), format!("{n:<60}").as_bytes()),
    })
}

/// The log of a group that has none of its own.
struct Listed(Arc<Vec<Command>>);

impl EntrySource for Listed {
    fn read(&self, from: LogIndex, applied: LogIndex, _: EntryPlace) -> BoxFuture<Result<Entries>> {
        let end = applied.0.min(from.0 + 99);
        let commands = (from.0..=end).map(|index| (LogIndex(index), self.0[index as usize - 1].clone())).collect();
        let entries = Entries { commands, next: LogIndex(end + 1), ..Entries::default() };
        Box::pin(std::future::ready(Ok(entries)))
    }
}

#[test]
fn replicas_give_the_same_changes_and_those_make_the_state() {
    let leader = Replica::new(32 << 20, 2);
    let log = Arc::new(lead(&leader, work()));
    let read = |replica: &Replica| {
        let source = Arc::new(Listed(log.clone()));
        let mut changes = block_on(Changes::open(replica.group.clone(), MAIN, source, LogIndex(2))).expect("recorded");
        rest(&mut changes)
    };
    let found = read(&leader);
    let mut map = BTreeMap::new();
    build(&mut map, &found);
    assert_eq!(map, leader.all(MAIN));
    assert!(found.iter().any(|change| matches!(&change.kind, ChangeKind::Writes(ops) if ops.len() == 2)));
    // One that was restarted here and there, with what it had flushed by then.
    let mut other = Replica::new(32 << 20, 1);
    for (seed, upto) in [300, 600, 601, log.len()].into_iter().enumerate() {
        other.feed(&log[..upto]);
        if upto < log.len() {
            other = other.crash(seed as u64);
        }
    }
    check_equal(&leader, &other);
    assert_eq!(read(&other), found);
}

/// A reader that comes back goes on where it was; one that comes too late is told how far back the log reaches, and begins anew.
#[test]
fn a_reader_that_is_too_late_begins_anew_from_a_snapshot() {
    let media = media();
    let store = Store::open(&media);
    let early = store.put("early", b"1");
    assert_eq!(changes(&store, MAIN, early).expect_err("nobody asked for it").kind(), ErrorKind::Unsupported);
    let made = store.must(record()).index;
    let oldest = LogIndex(made.0 + 1);
    assert_eq!(changes(&store, MAIN, early).expect_err("not recorded then").kind(), ErrorKind::Purged { oldest });
    let mut map = BTreeMap::new();
    map.insert(b"early".to_vec(), b"1".to_vec());
    let mut slow = changes(&store, MAIN, oldest).expect("recorded");
    let mut from = oldest;
    // Much more than the ring holds: it is cut again and again, whoever reads.
    for round in 0..60 {
        for n in 0..10 {
            store.put(&format!("k{}", n * round % 77), &[round as u8; 40 << 10]);
        }
        let mut changes = changes(&store, MAIN, from).expect("it keeps up");
        build(&mut map, &rest(&mut changes));
        from = changes.position();
    }
    assert_eq!(map, all(&store.group().snapshot(MAIN).expect("main"), DEFAULT));
    let told = |error: crate::Error| match error.kind() {
        ErrorKind::Purged { oldest } => oldest,
        kind => panic!("{kind:?}: {error}"),
    };
    let oldest = told(block_on(async {
        loop {
            if let Err(error) = slow.try_next().await {
                break error;
            }
        }
    }));
    assert!(oldest > LogIndex(made.0 + 1) && oldest <= store.group().applied(), "{oldest:?}");
    assert!(block_on(slow.next()).is_err(), "and again");
    changes(&store, MAIN, oldest).expect("what was told is there");

    let snapshot = store.group().snapshot(MAIN).expect("main");
    let mut map = all(&snapshot, DEFAULT);
    let mut anew = changes(&store, MAIN, LogIndex(snapshot.index().0 + 1)).expect("recorded");
    store.put("after", b"1");
    build(&mut map, &rest(&mut anew));
    assert_eq!(map, all(&store.group().snapshot(MAIN).expect("main"), DEFAULT));

    // A reader comes back after a close with what it has, also when there was more behind that.
    let position = anew.position();
    let missed = store.put("missed", b"1");
    drop((anew, slow, snapshot));
    store.close();
    let store = Store::open(&media);
    let mut changes = changes(&store, MAIN, position).expect("a part of the log stays");
    let later = store.put("later", b"1");
    assert_eq!(rest(&mut changes).iter().map(|change| change.index).collect::<Vec<_>>(), [missed, later]);
    store.close();
    check_no_leak(&media);
}

#[test]
fn a_reader_waits_and_is_told_of_the_end() {
    let media = media();
    let store = Store::open(&media);
    store.must(record());
    let mut changes = changes(&store, MAIN, LogIndex(store.group().applied().0 + 1)).expect("recorded");
    let mut context = Context::from_waker(Waker::noop());
    for n in 0..3 {
        // Dropped while it waits, which loses nothing.
        assert!(std::pin::pin!(changes.next()).poll(&mut context).is_pending());
        let index = store.put("k", &[n]);
        assert_eq!(block_on(changes.next()).expect("written").index, index);
        let position = changes.position();
        assert_eq!(position, LogIndex(index.0 + 1));
    }
    let waiting = std::thread::spawn(move || block_on(changes.next()));
    store.put("k", b"last");
    assert!(waiting.join().expect("no panic").is_ok());
    let mut changes = self::changes(&store, MAIN, LogIndex(store.group().applied().0 + 1)).expect("recorded");
    let mut waiting = Box::pin(async move {
        loop {
            if let Err(error) = changes.next().await {
                break error;
            }
        }
    });
    assert!(waiting.as_mut().poll(&mut context).is_pending());
    store.close();
    match waiting.as_mut().poll(&mut context) {
        Poll::Ready(error) => assert_eq!(error.kind(), ErrorKind::Closed),
        Poll::Pending => panic!("nobody told it"),
    }
}

/// What one read takes into memory is bounded, however far behind a reader is.
#[test]
fn a_reader_takes_a_bounded_part_at_a_time() {
    let blank = SimMedia::new(SimOptions { capacity: 1 << 30, ..SimOptions::default() });
    let media = format(&blank, 64 << 20);
    let store = Store::open(&media);
    let made = store.must(record()).index;
    for n in 0..1500 {
        store.put(&format!("k{n}"), b"1");
    }
    let read = |from| {
        let read = store.log.entries().read(from, store.group().applied(), EntryPlace::default());
        block_on(read).expect("the log is there")
    };
    let first = read(LogIndex(made.0 + 1));
    assert_eq!(first.commands.len(), crate::changes::READ_ENTRIES_MAX);
    assert_eq!(first.next, LogIndex(made.0 + 1 + first.commands.len() as u64));
    let large: Vec<LogIndex> = (0..5).map(|_| store.put("large", &vec![7; 400 << 10])).collect();
    let found = read(large[0]).commands;
    let found = found.iter().filter(|(index, _)| large.contains(index));
    assert_eq!(found.count(), 3, "and a byte bound, that the last entry may pass");
    let mut all = changes(&store, MAIN, LogIndex(made.0 + 1)).expect("recorded");
    assert_eq!(rest(&mut all).len(), 1505);
    store.close();
}
