//! Operands merged by operators: the same value wherever they and what they merge into lie, and what is refused.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::block_on;

use super::harness::*;
use super::replicas::{Replica, check_equal, lead};
use crate::{
    Command, CommandBody, Condition, ConditionalBatch, ErrorKind, GroupSettings, KeyspaceId, LogIndex, MAIN,
    MergeOperator, MergeOperators, MergeRefused, Offline, OperatorId, Result, WriteBatch, WriteOp, decode_refusals,
};

/// Keeps the longest operand that begins with a letter behind that of the value; combines nothing.
struct Climb;

impl Climb {
    const ID: OperatorId = OperatorId::new_static("climb", 3);
}

impl MergeOperator for Climb {
    fn id(&self) -> OperatorId {
        Self::ID
    }

    fn merge(&self, _: &[u8], value: &mut Option<Vec<u8>>, operand: &[u8]) -> Result<(), MergeRefused> {
        match operand {
            b"" => *value = None,
            _ if value.as_deref() >= Some(operand) => return Err(MergeRefused::new("not higher")),
            _ => *value = Some(operand.to_vec()),
        }
        Ok(())
    }
}

fn with_climb() -> GroupSettings {
    let mut merge_operators = MergeOperators::default();
    merge_operators.add(Arc::new(Climb)).expect("a good name");
    GroupSettings { merge_operators, ..settings() }
}

fn set(name: &str, operator: OperatorId) -> CommandBody {
    CommandBody::SetOperator { name: name.into(), operator }
}

fn merge_op(keyspace: KeyspaceId, key: &str, operand: &[u8]) -> WriteOp {
    let (key, operand) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(operand));
    WriteOp::Merge { keyspace, key, operand }
}

fn batch(ops: Vec<WriteOp>) -> WriteBatch {
    WriteBatch { branch: MAIN, ops }
}

fn merge(key: &str, operand: &[u8]) -> CommandBody {
    CommandBody::Batch(batch(vec![merge_op(DEFAULT, key, operand)]))
}

fn put_op(key: &str, value: &str) -> WriteOp {
    let (key, value) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value.as_bytes()));
    WriteOp::Put { keyspace: DEFAULT, key, value }
}

fn remove_op(start: &str, end: &str) -> WriteOp {
    WriteOp::DeleteRange { keyspace: DEFAULT, range: range(start, Some(end)) }
}

fn number(value: Option<Bytes>) -> Option<u64> {
    value.map(|value| u64::from_le_bytes(value[..].try_into().expect("a number")))
}

fn refused(store: &Store, body: CommandBody) -> (ErrorKind, String) {
    let error = store.propose(body).expect("the log takes it").response.expect_err("refused");
    (error.kind(), error.to_string())
}

fn found(store: &Store, key: &str) -> Result<Option<Bytes>> {
    block_on(store.group().snapshot(MAIN).expect("main").get(DEFAULT, key.as_bytes()))
}

/// Each step in memory, then below one or more flushes, then compacted: the value is always that of the steps in order.
#[test]
fn operands_merge_into_what_lies_below_wherever_that_is() {
    let media = media();
    let store = Store::open(&media);
    store.must(set("default", OperatorId::APPEND));
    store.put("put", b"0");
    store.put("gone", b"0");
    store.put("range", b"0");
    store.flush();
    store.must(delete(MAIN, "gone"));
    store.must(delete_range(MAIN, range("range", Some("s"))));
    let before = store.group().snapshot(MAIN).expect("main");
    store.flush();
    for step in ["1", "2", "3"] {
        let keys = ["gone", "put", "range", "plain"];
        store.must(CommandBody::Batch(batch(keys.map(|key| merge_op(DEFAULT, key, step.as_bytes())).to_vec())));
        store.flush();
    }
    store.must(merge("put", b"4"));
    let check = |store: &Store, also: &str| {
        let snapshot = store.group().snapshot(MAIN).expect("main");
        for (key, value) in [("gone", "123"), ("put", &format!("0123{also}")), ("range", "123"), ("plain", "123")] {
            assert_eq!(get(&snapshot, key).as_deref(), Some(value.as_bytes()), "{key}");
            assert_eq!(all(&snapshot, DEFAULT).get(key.as_bytes()).map(Vec::as_slice), Some(value.as_bytes()), "{key}");
            let back = all_back(&snapshot, DEFAULT);
            assert_eq!(back.get(key.as_bytes()).map(Vec::as_slice), Some(value.as_bytes()), "{key} from behind");
        }
        assert_eq!(all(&snapshot, DEFAULT).len(), 4);
    };
    check(&store, "4");
    store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    store.must(merge("put", b"5"));
    check(&store, "45");
    let asked = store.must(compact(MAIN, "", None));
    block_on(store.group().compacted(asked.index)).expect("it ends");
    check(&store, "45");
    let checkpoint = store.group().checkpoint("c").expect("made");
    assert_eq!(get(&checkpoint, "put").as_deref(), Some(&b"01234"[..]));
    assert_eq!((get(&before, "put").as_deref(), get(&before, "gone")), (Some(&b"0"[..]), None));
    drop((before, checkpoint));
    store.close();
    let store = Store::open(&media);
    check(&store, "45");
    let version = block_on(store.group().snapshot(MAIN).expect("main").get_version(DEFAULT, b"put")).expect("read");
    let condition = |version| Condition::Version { keyspace: DEFAULT, key: "put".into(), version };
    let when = |condition| ConditionalBatch {
        conditions: vec![condition],
        batch: batch(vec![merge_op(DEFAULT, "put", b"6")]),
    };
    let version = version.expect("it is there").0;
    assert_eq!(refused(&store, CommandBody::BatchIf(when(condition(LogIndex(version.0 - 1))))).0, ErrorKind::Conflict);
    store.must(CommandBody::BatchIf(when(condition(version))));
    check(&store, "456");
    let value = Condition::Value { keyspace: DEFAULT, key: "put".into(), value: "0123456".into() };
    store.must(CommandBody::BatchIf(when(value)));
    check(&store, "4566");
    store.close();
}

/// Within an entry order decides: over the borders of its batches, with conditions and without, for operators of both kinds.
#[test]
fn an_operand_merges_into_what_stands_before_it_in_its_entry() {
    let media = media();
    let store = Store::open(&media);
    store.must(set("default", OperatorId::APPEND));
    store.put("k", b"old");
    let ops = || {
        vec![
            merge_op(DEFAULT, "k", b"-1"),
            merge_op(DEFAULT, "b", b"lost"),
            remove_op("b", "c"),
            merge_op(DEFAULT, "b", b"kept"),
            put_op("p", "put"),
            merge_op(DEFAULT, "p", b"-1"),
            merge_op(DEFAULT, "p", b"-2"),
            WriteOp::Delete { keyspace: DEFAULT, key: "d".into() },
            merge_op(DEFAULT, "d", b"new"),
        ]
    };
    let check = |store: &Store, k: &str, p: &str| {
        for (key, value) in [("k", k), ("b", "kept"), ("p", p), ("d", "new")] {
            assert_eq!(store.get(key).as_deref(), Some(value.as_bytes()), "{key}");
        }
    };
    store.must(CommandBody::Batch(batch(ops())));
    check(&store, "old-1", "put-1-2");
    let then = vec![batch(ops()), batch(vec![merge_op(DEFAULT, "p", b"-3"), merge_op(DEFAULT, "k", b"-2")])];
    store.must(CommandBody::Batches(then.clone()));
    check(&store, "old-1-1-2", "put-1-2-3");
    let conditional = then.into_iter().map(|batch| ConditionalBatch { conditions: Vec::new(), batch });
    let absent = Condition::Absent { keyspace: DEFAULT, key: "p".into() };
    let never = ConditionalBatch { conditions: vec![absent], batch: batch(vec![merge_op(DEFAULT, "k", b"never")]) };
    store.must(CommandBody::BatchesIf(conditional.chain([never]).collect()));
    check(&store, "old-1-1-2-1-2", "put-1-2-3");
    drop(store);
    media.kill(1);
    check(&Store::open(&media), "old-1-1-2-1-2", "put-1-2-3");
}

#[test]
fn a_sum_stays_at_its_bound_however_it_is_grouped() {
    let store = Store::open(&media());
    store.must(set("default", OperatorId::U64_ADD));
    let add = |store: &Store, by: u64| drop(store.must(merge("n", &by.to_le_bytes())));
    add(&store, 5);
    assert_eq!(number(store.get("n")), Some(5));
    store.flush();
    add(&store, 7);
    store.flush();
    add(&store, u64::MAX - 10);
    assert_eq!(number(store.get("n")), Some(u64::MAX));
    store.settle();
    add(&store, 1);
    assert_eq!(number(store.get("n")), Some(u64::MAX));
}

/// A blind merge into what the operator cannot merge into is acknowledged before anybody can know. The key answers so until it is
/// written, wherever it lies; the others are as ever.
#[test]
fn a_key_whose_merge_is_refused_answers_so_until_it_is_put_or_removed() {
    let media = media();
    let mut store = Store::open(&media);
    store.must(set("default", OperatorId::U64_ADD));
    let one = 1u64.to_le_bytes();
    let keys = ["b1", "b2", "b3"];
    for round in 0..4 {
        for key in ["a", "b1", "b2", "b3", "c"] {
            store.put(key, b"no number");
        }
        if round > 1 {
            store.flush();
        }
        keys.iter().for_each(|key| drop(store.must(merge(key, &one))));
        match round {
            1 | 2 => store.flush(),
            3 => {
                store.settle();
                let asked = store.must(compact(MAIN, "", None));
                block_on(store.group().compacted(asked.index)).expect("it ends");
                store.close();
                store = Store::open(&media);
            }
            _ => {}
        }
        // It does not come back by what is merged into it later.
        store.must(merge("b1", &one));
        let error = found(&store, "b1").expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid, "round={round}");
        assert!(error.to_string().contains("put or remove it key=b1"), "{error}");
        let snapshot = store.group().snapshot(MAIN).expect("main");
        let mut scan = snapshot.range(DEFAULT, std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);
        let mut seen = Vec::new();
        for _ in 0..5 {
            match block_on(scan.next()) {
                Ok(Some((key, _))) => seen.push(String::from_utf8_lossy(&key).into_owned()),
                Ok(None) => seen.push("end".into()),
                Err(error) => seen.push(format!("{:?}", error.kind())),
            }
        }
        assert_eq!(seen, ["a", "Invalid", "Invalid", "Invalid", "c"], "round={round}");
        let present = Condition::Present { keyspace: DEFAULT, key: "b2".into() };
        let when = ConditionalBatch { conditions: vec![present], batch: batch(vec![put_op("x", "never")]) };
        assert_eq!(refused(&store, CommandBody::BatchIf(when)).0, ErrorKind::Invalid);
        assert_eq!(store.get("x"), None);
        store.put("b1", &one);
        store.must(delete(MAIN, "b2"));
        store.must(delete_range(MAIN, range("b3", Some("b4"))));
        keys.iter().for_each(|key| drop(store.must(merge(key, &one))));
        assert_eq!(keys.map(|key| number(store.get(key))), [Some(2), Some(1), Some(1)], "round={round}");
    }
    store.close();
}

/// The value is read as the entry is applied: a refusal is that of the batch, which changes nothing.
#[test]
fn what_an_operator_that_does_not_combine_refuses_refuses_its_batch() {
    let media = media();
    let open = || Store::open_with(&media, with_climb(), engine_settings()).expect("opens");
    let mut store = open();
    store.must(set("default", Climb::ID));
    let ops = |operands: &[&[u8]]| operands.iter().map(|operand| merge_op(DEFAULT, "k", operand)).collect::<Vec<_>>();
    let all_of = |operands: &[&[u8]]| CommandBody::Batch(batch([vec![put_op("with", "it")], ops(operands)].concat()));
    store.must(CommandBody::Batch(batch(ops(&[b"a", b"b"]))));
    for flushed in [false, true] {
        if flushed {
            store.settle();
        }
        let (kind, message) = refused(&store, all_of(&[b"c", b"a"]));
        assert_eq!(kind, ErrorKind::Invalid);
        assert!(message.contains("not higher: nothing was applied operator=climb version=3 key=k"), "{message}");
        assert_eq!((store.get("k").as_deref(), store.get("with")), (Some(&b"b"[..]), None));
    }
    let applied = store.must(CommandBody::Batches(vec![batch(ops(&[b"c"])), batch(ops(&[b"b"])), batch(ops(&[b"d"]))]));
    let refusals = decode_refusals(&applied.response.expect("an answer")).expect("own bytes");
    assert_eq!(refusals.iter().map(|(at, error)| (*at, error.kind())).collect::<Vec<_>>(), [(1, ErrorKind::Invalid)]);
    assert_eq!(store.get("k").as_deref(), Some(&b"d"[..]));
    drop(store);
    media.kill(3);
    store = open();
    assert_eq!(store.get("k").as_deref(), Some(&b"d"[..]));
    // An operator may take the key away.
    store.must(CommandBody::Batch(batch(ops(&[b""]))));
    assert_eq!(store.get("k"), None);
    store.must(CommandBody::Batch(batch(ops(&[b"a"]))));
    assert_eq!(store.get("k").as_deref(), Some(&b"a"[..]));
}

#[test]
fn an_operator_that_is_missing_is_named_and_what_to_do() {
    let media = media();
    let store = Store::open_with(&media, with_climb(), engine_settings()).expect("opens");
    let (kind, message) = refused(&store, merge("k", b"1"));
    assert_eq!((kind, message.contains("give it one before merging keyspace=0")), (ErrorKind::Invalid, true));
    let made = store.must(set("climbs", Climb::ID)).response.expect("an id");
    assert_eq!(store.group().keyspace("climbs").expect("made").0.to_le_bytes(), made[..]);
    assert_eq!(store.group().merge_operator(KeyspaceId(1)), Some(Climb::ID));
    store.must(set("climbs", Climb::ID));
    let (kind, message) = refused(&store, set("climbs", OperatorId::APPEND));
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(message.contains("another merge operator keyspace=climbs operator=climb version=3"), "{message}");
    store.must(set("default", OperatorId::U64_ADD));
    let (kind, message) = refused(&store, merge("k", b"1"));
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(message.contains("refuses an operand: not a number of 8 bytes operator=mainstay.u64_add"), "{message}");
    let other = OperatorId::new("climb", 4);
    assert_eq!(store.group().check_operator(&other, "x").expect_err("not registered").kind(), ErrorKind::Invalid);
    store.must(CommandBody::Batch(batch(vec![merge_op(KeyspaceId(1), "k", b"1")])));
    store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    store.must(CommandBody::DropKeyspace { name: "climbs".into() });
    store.settle();
    // The checkpoint has it still.
    let checkpoint = store.group().checkpoint("c").expect("made");
    assert_eq!(block_on(checkpoint.get(KeyspaceId(1), b"k")).expect("read").as_deref(), Some(&b"1"[..]));
    drop(checkpoint);
    store.close();
    let error = Store::open_with(&media, settings(), engine_settings()).err().expect("climb is missing");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let message = error.to_string();
    assert!(message.contains("open the store with it beside the others"), "{message}");
    assert!(message.contains("operator=climb version=3 versions_registered=none"), "{message}");
    media.kill(4);
    // Closed behind the refusal, the volume is as it was.
    let (engine, found) = engine(&media, engine_settings()).expect("opens");
    assert!(block_on(crate::LocalLog::open(&engine, GROUP, settings(), found)).is_err());
    block_on(engine.close()).expect("closes");
    drop(engine);
    let store = Store::open_with(&media, with_climb(), engine_settings()).expect("opens");
    store.must(CommandBody::DropCheckpoint { name: "c".into() });
    store.settle();
    store.close();
    Store::open(&media).close();
}

/// Whoever applies the entry without the operator stops there: it could not read what the others write from then on.
#[test]
fn a_replica_without_the_operator_goes_no_further() {
    let media = media();
    let store = Store::open(&media);
    let index = store.put("k", b"1");
    let group = store.group().clone();
    let set = Command { time_ms: 1, body: set("climbs", Climb::ID) };
    let error = block_on(group.apply(LogIndex(index.0 + 1), &set)).expect_err("not registered");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(group.failure().is_some_and(|failure| failure.to_string().contains("operator=climb version=3")));
    assert_eq!(group.keyspace("climbs"), None);
}

/// What does nothing needs no operator: that of a keyspace which has another one.
#[test]
fn a_replica_goes_on_behind_an_entry_that_gives_nothing() {
    let store = Store::open(&media());
    store.must(set("default", OperatorId::APPEND));
    let (kind, message) = refused(&store, set("default", Climb::ID));
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(message.contains("another merge operator keyspace=default operator=mainstay.append"), "{message}");
    store.must(merge("k", b"1"));
    assert_eq!(store.get("k").as_deref(), Some(&b"1"[..]));
    store.close();
}

#[test]
fn a_volume_that_nobody_has_open_shows_operators_and_tables_with_merges() {
    let media = media();
    let store = Store::open(&media);
    store.put("plain", b"1");
    store.flush();
    store.must(set("default", OperatorId::APPEND));
    store.must(merge("k", b"1"));
    store.close();
    let opened = media.open().expect("nobody else holds it");
    let offline = block_on(Offline::open(opened, &mainstay_io::Environment::system())).expect("opens");
    let groups = block_on(offline.manifest()).expect("reads");
    assert_eq!(groups[0].operators, [(DEFAULT, OperatorId::APPEND)]);
    let merges: Vec<bool> = groups[0].tables.iter().map(|table| table.merges).collect();
    assert_eq!(merges, [false, true]);
    assert_eq!(block_on(offline.verify(&mut |_| ())).expect("all can be read").damage, []);
}

#[test]
fn names_of_this_crate_are_not_for_others() {
    struct Named(&'static str);
    impl MergeOperator for Named {
        fn id(&self) -> OperatorId {
            OperatorId::new(self.0, 1)
        }
        fn merge(&self, _: &[u8], _: &mut Option<Vec<u8>>, _: &[u8]) -> Result<(), MergeRefused> {
            Ok(())
        }
    }
    for name in ["", "mainstay.append", "mainstay.x"] {
        let error = MergeOperators::default().add(Arc::new(Named(name))).expect_err("no good name");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{name}");
    }
}

/// What an entry was refused before its keyspace had an operator it is refused again in replay, where the manifest has it already.
#[test]
fn replay_refuses_what_was_refused() {
    let media = media();
    let store = Store::open(&media);
    assert_eq!(refused(&store, merge("k", b"early")).0, ErrorKind::Invalid);
    store.must(set("default", OperatorId::APPEND));
    store.must(merge("k", b"late"));
    for _ in 0..20 {
        store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
        store.must(CommandBody::DropCheckpoint { name: "c".into() });
    }
    drop(store);
    media.kill(5);
    let store = Store::open(&media);
    assert!(store.replayed > 0);
    assert_eq!(store.get("k").as_deref(), Some(&b"late"[..]));
}

/// Whether an entry reads the values that it merges into is decided by the operators that there were: its outcome is another where a blind
/// merge fails.
#[test]
fn replay_merges_blindly_what_was_merged_blindly() {
    let media = media();
    let open = || Store::open_with(&media, with_climb(), engine_settings()).expect("opens");
    let store = open();
    store.must(set("default", OperatorId::U64_ADD));
    store.must(CommandBody::CreateKeyspace { name: "climbs".into() });
    let climbs = store.group().keyspace("climbs").expect("made");
    store.put("k", b"no number");
    let early = batch(vec![merge_op(climbs, "k", b"early")]);
    let blind = batch(vec![merge_op(DEFAULT, "k", &1u64.to_le_bytes())]);
    let applied = store.must(CommandBody::Batches(vec![early, blind]));
    assert_eq!(decode_refusals(&applied.response.expect("an answer")).expect("own bytes").len(), 1);
    store.must(set("climbs", Climb::ID));
    assert_eq!(found(&store, "k").expect_err("it is no number").kind(), ErrorKind::Invalid);
    drop(store);
    media.kill(6);
    let store = open();
    assert!(store.replayed > 0 && store.group().merge_operator(climbs) == Some(Climb::ID));
    assert_eq!(found(&store, "k").expect_err("it is no number").kind(), ErrorKind::Invalid);
}

/// Else so many operands of one entry would be held so many times, each with all those before it.
#[test]
fn what_an_entry_merges_into_a_key_is_held_once() {
    let media = media();
    let mut group = settings();
    group.memtable_bytes = 64 << 20;
    let store = Store::open_with(&media, group, engine_settings()).expect("opens");
    store.must(set("default", OperatorId::APPEND));
    let operands: Vec<String> = (0..2000).map(|n| format!("operand {n:>32}")).collect();
    let ops = |key| operands.iter().map(|operand| merge_op(DEFAULT, key, operand.as_bytes())).collect::<Vec<_>>();
    let used = || store.engine.shared_ref().budget.used();
    let value = operands.concat();
    let held_by = |body| {
        let before = used();
        store.must(body);
        used() - before
    };
    let each = held_by(CommandBody::Batches(ops("a").into_iter().map(|op| batch(vec![op])).collect()));
    let one = held_by(CommandBody::Batch(batch(ops("b"))));
    let mut again = ops("c");
    again.insert(0, put_op("c", "lost"));
    again.insert(1000, put_op("c", "from here "));
    let put_between = held_by(CommandBody::Batch(batch(again)));
    let decided = held_by(CommandBody::BatchIf(ConditionalBatch { conditions: Vec::new(), batch: batch(ops("d")) }));
    for held in [each, one, put_between, decided] {
        assert!(held < 4 * value.len() as u64, "{held}");
    }
    for key in ["a", "b", "d"] {
        assert!(store.get(key).as_deref() == Some(value.as_bytes()), "{key}");
    }
    let from_here = format!("from here {}", operands[999..].concat());
    assert!(store.get("c").as_deref() == Some(from_here.as_bytes()));
    store.close();
}

/// Other memory, other tasks, other restarts: other flushes at other times, and the same tables.
#[test]
fn replicas_make_the_same_tables_of_operands() {
    let work = (0..900_usize).map(|n| match n {
        0 => set("default", OperatorId::APPEND),
        250 => CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN },
        251 => CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() },
        400 => compact(MAIN, "", None),
        _ if n % 97 == 50 => {
            delete_range(MAIN, range(&format!("k{:03}", n % 50), Some(&format!("k{:03}", n % 50 + 9))))
        }
        _ if n % 13 == 3 => delete(MAIN, &format!("k{:03}", n * 7 % 60)),
        _ if n % 11 == 3 => put(MAIN, &format!("k{:03}", n * 7 % 60), format!("put {n:<60}").as_bytes()),
        _ => merge(&format!("k{:03}", n * 29 % 60), format!("+ {n:<40}").as_bytes()),
    });
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work);
    let mut other = Replica::new(24 << 20, 3);
    for cut in [log.len() / 3, log.len() / 2, log.len()] {
        other.feed(&log[..cut]);
        if cut < log.len() {
            other = other.crash(cut as u64);
        }
    }
    check_equal(&leader, &other);
}
