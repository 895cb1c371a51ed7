//! Batches with conditions: what each condition decides, and that nothing but the log decides it.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use mainstay_io::block_on;
use proptest::prelude::*;

use super::harness::*;
use super::replicas::{Replica, check_equal, lead};
use crate::{
    BranchId, ClientToken, Command, CommandBody, Condition, ConditionalBatch, ErrorKind, KeyspaceId, LogIndex, MAIN,
    WriteBatch, WriteOp, decode_refusals,
};

fn key(key: &str) -> Bytes {
    Bytes::copy_from_slice(key.as_bytes())
}

fn absent(of: &str) -> Condition {
    Condition::Absent { keyspace: DEFAULT, key: key(of) }
}

fn present(of: &str) -> Condition {
    Condition::Present { keyspace: DEFAULT, key: key(of) }
}

fn value(of: &str, value: &str) -> Condition {
    Condition::Value { keyspace: DEFAULT, key: key(of), value: key(value) }
}

fn version(of: &str, version: LogIndex) -> Condition {
    Condition::Version { keyspace: DEFAULT, key: key(of), version }
}

fn range(from: &str, to: &str, since: LogIndex, count: u64) -> Condition {
    let (lower, upper) = (Bound::Included(key(from)), Bound::Excluded(key(to)));
    Condition::Range { keyspace: DEFAULT, lower, upper, since, count }
}

fn ops(writes: &[(&str, Option<&str>)]) -> Vec<WriteOp> {
    let op = |&(of, value): &(&str, Option<&str>)| match value {
        Some(value) => WriteOp::Put { keyspace: DEFAULT, key: key(of), value: key(value) },
        None => WriteOp::Delete { keyspace: DEFAULT, key: key(of) },
    };
    writes.iter().map(op).collect()
}

fn when(conditions: &[Condition], writes: &[(&str, Option<&str>)]) -> ConditionalBatch {
    ConditionalBatch { conditions: conditions.to_vec(), batch: WriteBatch { branch: MAIN, ops: ops(writes) } }
}

/// What a batch of conditions alone is answered.
fn ask(store: &Store, condition: Condition) -> Option<ErrorKind> {
    let body = CommandBody::BatchIf(when(&[condition], &[]));
    store.propose(body).expect("the log takes it").response.err().map(|error| error.kind())
}

/// A table of cases, on what is in memory, in a table, compacted, and opened again: the answers are the same.
#[test]
fn each_condition_holds_exactly_when_it_says_so() {
    let media = media();
    let mut store = Store::open(&media);
    let a = store.put("a", b"1");
    let removed_before = store.put("b", b"1");
    store.must(delete(MAIN, "b"));
    let c_old = store.put("c", b"1");
    let c = store.put("c", b"2");
    let d = store.put("d", b"");
    let since = store.group().applied();
    for round in ["in memory", "in tables", "compacted", "opened again"] {
        let check = |condition: Condition, holds: bool| {
            let expect = (!holds).then_some(ErrorKind::Conflict);
            assert_eq!(ask(&store, condition.clone()), expect, "{round} {condition:?}");
        };
        for (of, there) in [("a", true), ("b", false), ("c", true), ("d", true), ("never", false)] {
            check(absent(of), !there);
            check(present(of), there);
        }
        check(value("a", "1"), true);
        check(value("a", "2"), false);
        check(value("b", "1"), false);
        check(value("d", ""), true);
        check(value("never", ""), false);
        check(version("a", a), true);
        check(version("a", LogIndex(a.0 + 1)), false);
        check(version("b", removed_before), false);
        check(version("c", c_old), false);
        check(version("c", c), true);
        check(version("d", d), true);
        check(range("a", "e", since, 3), true);
        check(range("a", "e", since, 2), false);
        check(range("a", "e", since, 4), false);
        check(range("a", "e", LogIndex(d.0 - 1), 3), false);
        check(range("a", "d", c, 2), true);
        check(range("b", "c", LogIndex(0), 0), true);
        check(range("x", "z", LogIndex(0), 0), true);
        check(range("z", "a", since, 0), true);
        check(range("z", "a", since, 1), false);
        let all =
            Condition::Range { keyspace: DEFAULT, lower: Bound::Unbounded, upper: Bound::Unbounded, since, count: 3 };
        check(all, true);
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

#[test]
fn a_refused_batch_leaves_nothing_and_says_why() {
    let media = media();
    let store = Store::open(&media);
    store.put("a", b"1");
    let body = CommandBody::BatchIf(when(&[present("a"), absent("a")], &[("a", Some("2")), ("b", Some("2"))]));
    let error = store.propose(body).expect("logged").response.expect_err("a is there");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let expect = "the key is there: nothing was applied, read again and retry keyspace=default key=a";
    assert_eq!(error.to_string(), expect);
    assert_eq!((store.get("a").as_deref(), store.get("b")), (Some(&b"1"[..]), None));
    store.must(CommandBody::BatchIf(when(&[value("a", "1"), absent("b")], &[("a", Some("2")), ("b", Some("2"))])));
    assert_eq!((store.get("a").as_deref(), store.get("b").as_deref()), (Some(&b"2"[..]), Some(&b"2"[..])));
    // What no key and no keyspace is, is refused before it is decided.
    let refused = |condition: Condition| {
        let conditional = when(&[condition], &[("a", Some("3"))]);
        match store.propose(CommandBody::BatchIf(conditional)) {
            Ok(applied) => applied.response.expect_err("refused").kind(),
            Err(error) => error.kind(),
        }
    };
    assert_eq!(refused(absent("")), ErrorKind::Invalid);
    let nowhere = Condition::Absent { keyspace: KeyspaceId(99), key: key("a") };
    assert_eq!(refused(nowhere), ErrorKind::NotFound);
    let mut nowhere = when(&[absent("x")], &[("a", Some("3"))]);
    nowhere.batch.branch = BranchId(77);
    let error = store.propose(CommandBody::BatchIf(nowhere)).expect("logged").response.expect_err("no branch");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(store.get("a").as_deref(), Some(&b"2"[..]));
    store.close();
    check_no_leak(&media);
}

/// Each batch of an entry is decided behind those before it, whatever they were: what they wrote is there, and new to all that read
/// before; what a refused one would have written is not.
#[test]
fn batches_of_one_entry_see_those_before_them() {
    let media = media();
    let store = Store::open(&media);
    store.put("k", b"0");
    store.put("r", b"0");
    let since = store.group().applied();
    let batches = vec![
        when(&[absent("a")], &[("a", Some("first"))]),
        when(&[absent("a")], &[("a", Some("second")), ("x", Some("never"))]),
        when(&[], &[("b", Some("plain"))]),
        when(&[present("b"), value("a", "first")], &[("c", Some("third")), ("k", None)]),
        when(&[present("x")], &[("y", Some("never"))]),
        when(&[absent("k"), version("a", LogIndex(since.0 + 1))], &[("k", Some("again"))]),
        // Nobody has seen the key of this entry, though it is there as often as before.
        when(&[range("k", "l", since, 1)], &[("z", Some("never"))]),
        when(&[range("r", "s", since, 1)], &[("r", None)]),
        when(&[range("r", "s", since, 1)], &[("z", Some("never"))]),
        when(&[range("r", "s", since, 0)], &[("end", Some("1"))]),
    ];
    let applied = store.must(CommandBody::BatchesIf(batches));
    assert_eq!(applied.index, LogIndex(since.0 + 1));
    let refusals = decode_refusals(&applied.response.expect("applied")).expect("a list");
    let places: Vec<_> = refusals.iter().map(|(place, error)| (*place, error.kind())).collect();
    assert_eq!(places, [1, 4, 6, 8].map(|place| (place, ErrorKind::Conflict)));
    let found = all(&store.group().snapshot(MAIN).expect("main"), DEFAULT);
    let expect = [("a", "first"), ("b", "plain"), ("c", "third"), ("end", "1"), ("k", "again")];
    let expect: BTreeMap<_, _> = expect.map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec())).into();
    assert_eq!(found, expect);
    store.close();
}

/// Branches of one entry know nothing of each other, and a clone begins with the versions of its origin.
#[test]
fn a_clone_is_decided_by_itself_and_begins_with_the_versions_of_its_origin() {
    let media = media();
    let store = Store::open(&media);
    let before = store.put("k", b"1");
    store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    let clone = store.must(CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() }).index;
    let clone = BranchId(clone.0);
    let on = |branch, conditions: &[Condition], writes: &[(&str, Option<&str>)]| {
        let mut batch = when(conditions, writes);
        batch.batch.branch = branch;
        batch
    };
    let unchanged = [version("k", before)];
    let body = CommandBody::BatchesIf(vec![
        on(MAIN, &unchanged, &[("k", Some("main"))]),
        on(clone, &unchanged, &[("k", Some("clone"))]),
        on(MAIN, &unchanged, &[("k", Some("never"))]),
        on(clone, &unchanged, &[("k", Some("never"))]),
    ]);
    let refusals = decode_refusals(&store.must(body).response.expect("applied")).expect("a list");
    assert_eq!(refusals.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(store.get("k").as_deref(), Some(&b"main"[..]));
    let snapshot = store.group().snapshot(clone).expect("the clone");
    assert_eq!(get(&snapshot, "k").as_deref(), Some(&b"clone"[..]));
    store.close();
    check_no_leak(&media);
}

/// The caller of a token may be told of a conflict while another proposal of the request is on its way: that one must not find that the
/// condition holds again and be applied after all.
#[test]
fn a_conflict_is_the_outcome_of_its_token() {
    let media = media();
    let token = |sequence| ClientToken { client: [9; 16], sequence };
    let once =
        |sequence, batch| CommandBody::Once { token: token(sequence), body: Box::new(CommandBody::BatchIf(batch)) };
    let store = Store::open(&media);
    store.put("k", b"1");
    let refused = |store: &Store| {
        let body = once(1, when(&[absent("k")], &[("k", Some("2"))]));
        store.propose(body).expect("logged").response.expect_err("k was there").to_string()
    };
    let first = refused(&store);
    store.must(delete(MAIN, "k"));
    assert_eq!(refused(&store), first, "the outcome is kept");
    assert_eq!(store.get("k"), None);
    store.must(once(2, when(&[absent("k")], &[("k", Some("2"))])));
    store.must(delete(MAIN, "k"));
    drop(store);
    media.crash(1);
    let store = Store::open(&media);
    assert!(store.replayed > 0);
    store.must(once(2, when(&[absent("k")], &[("k", Some("2"))])));
    assert_eq!(store.get("k"), None, "applied once");
    // An answer to another kind of request is not taken for one to this.
    store.must(once(3, when(&[absent("k")], &[])));
    store.close();
}

/// A batch that reads what is damaged here has no answer on this replica.
#[test]
fn a_condition_that_cannot_be_read_is_not_decided() {
    let media = media();
    let store = Store::open(&media);
    store.put("k", b"1");
    store.settle();
    store.close();
    let store = Store::open(&media);
    media.extents_disk().set_faults(mainstay_io::sim::Faults { read_error: 1_000_000, ..Default::default() });
    let body = CommandBody::BatchesIf(vec![when(&[], &[("a", Some("1"))]), when(&[value("k", "1")], &[])]);
    let error = store.propose(body).expect_err("the replica leaves service instead of answering");
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert!(store.group().failure().is_some());
    drop(store);
    media.extents_disk().heal();
    media.kill(3);
    // The entry is in the log, and is applied once it can be.
    let store = Store::open(&media);
    assert_eq!(store.get("a").as_deref(), Some(&b"1"[..]));
    store.close();
}

/// Writes, removals and conditional batches over few keys, so that conditions meet versions in memory, in tables, and removed ones whose
/// tombstones are gone on some replicas.
fn mixed() -> impl Iterator<Item = CommandBody> {
    (0..1500_usize).map(|n| {
        let of = format!("k{:02}", n * 29 % 40);
        let (from, to) = (format!("k{:02}", n * 7 % 40), format!("k{:02}", n * 7 % 40 + 5));
        let long = format!("{n:<60}");
        let since = LogIndex((n as u64).saturating_sub(40));
        let write: (&str, Option<&str>) = (of.as_str(), (n % 5 != 0).then_some(long.as_str()));
        let conditions = match n % 7 {
            0 => vec![absent(&of)],
            1 => vec![present(&of), absent(&from)],
            2 => vec![range(&from, &to, since, (n % 6) as u64)],
            3 => vec![version(&of, LogIndex(n as u64 * 31 % (n as u64 + 1)))],
            4 => vec![range(&from, &to, LogIndex(u64::MAX), (n % 6) as u64)],
            _ => vec![],
        };
        let batch = when(&conditions, &[write]);
        match n % 11 {
            0 => CommandBody::Batch(WriteBatch { branch: MAIN, ops: batch.batch.ops }),
            1 => CommandBody::BatchesIf(vec![batch, when(&[present(&of)], &[(from.as_str(), Some(long.as_str()))])]),
            2 => {
                let token = ClientToken { client: [(n % 3) as u8; 16], sequence: n as u64 };
                CommandBody::Once { token, body: Box::new(CommandBody::BatchIf(batch)) }
            }
            _ => CommandBody::BatchIf(batch),
        }
    })
}

/// What a log answers on a replica that is fed it, restarted on the way after each of `crashes`.
fn answers(log: &[Command], memory: u64, tasks: usize, crashes: &[usize]) -> (Vec<Option<ErrorKind>>, Replica) {
    let mut replica = Replica::new(memory, tasks);
    let mut answers = BTreeMap::new();
    for end in crashes.iter().copied().chain([log.len()]) {
        for (at, command) in log.iter().enumerate().take(end) {
            let index = LogIndex(at as u64 + 1);
            if index <= replica.group.applied() {
                continue;
            }
            let applied = block_on(replica.group.apply(index, command)).expect("the group is open");
            let refusals = match (&command.body, applied.response) {
                (CommandBody::BatchesIf(_), Ok(list)) => {
                    decode_refusals(&list).expect("a list").into_iter().map(|(_, error)| error.kind()).next()
                }
                (CommandBody::BatchIf(_) | CommandBody::Once { .. }, response) => {
                    response.err().map(|error| error.kind())
                }
                _ => continue,
            };
            // Entries behind the tables are decided a second time after a crash, and alike.
            assert_eq!(*answers.entry(at).or_insert(refusals), refusals, "at={at}");
        }
        if end < log.len() {
            replica = replica.crash(end as u64);
        }
    }
    (answers.into_values().collect(), replica)
}

#[test]
fn replicas_decide_the_same_whatever_they_have_compacted_and_wherever_they_were_restarted() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, mixed());
    let (expect, first) = answers(&log, 64 << 20, 1, &[]);
    check_equal(&leader, &first);
    let refused = expect.iter().flatten().count();
    assert!(refused > 100 && expect.len() - refused > 100, "both outcomes are common: {refused} of {}", expect.len());
    assert!(expect.iter().flatten().all(|kind| *kind == ErrorKind::Conflict));
    for (memory, tasks, crashes) in [(1 << 20, 1, &[][..]), (256 << 20, 4, &[100, 101, 500, 900, 1300])] {
        let (found, replica) = answers(&log, memory, tasks, crashes);
        assert_eq!(found, expect);
        check_equal(&leader, &replica);
    }
    // One that never compacts: its installs are never made here, so it reads tombstones that the others have dropped.
    let bare: Vec<Command> = log
        .iter()
        .map(|command| match &command.body {
            CommandBody::Install { .. } | CommandBody::Rotate => {
                Command { time_ms: command.time_ms, body: CommandBody::Batches(Vec::new()) }
            }
            _ => command.clone(),
        })
        .collect();
    let (found, replica) = answers(&bare, 256 << 20, 1, &[]);
    assert_eq!(found, expect);
    assert_eq!(replica.all(MAIN), leader.all(MAIN));
}

#[derive(Clone, Debug)]
enum Step {
    Write(u8, Option<u8>),
    /// Reads a range of keys now and, some steps later, writes on the condition that it is as it was.
    ReadRange(u8, u8),
    ReadKey(u8),
    Judge,
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..8_u8, any::<Option<u8>>()).prop_map(|(key, value)| Step::Write(key, value)),
        3 => (0..8_u8, 0..9_u8).prop_map(|(from, to)| Step::ReadRange(from, to)),
        3 => (0..8_u8).prop_map(Step::ReadKey),
        5 => Just(Step::Judge),
        1 => Just(Step::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    /// A condition that was read at a snapshot holds exactly when a map with the same history has the same pairs, written by the same
    /// entries.
    #[test]
    fn what_was_read_is_unchanged_exactly_when_a_map_says_so(steps in prop::collection::vec(step(), 1..80)) {
        let store = Store::open(&media());
        type Model = BTreeMap<u8, (LogIndex, u8)>;
        let name = |key: u8| format!("k{key}");
        let mut model = Model::new();
        let mut read: Vec<(Condition, std::ops::Range<u8>, Model)> = Vec::new();
        for step in steps {
            match step {
                Step::Write(key, Some(value)) => {
                    let index = store.put(&name(key), &[value]);
                    model.insert(key, (index, value));
                }
                Step::Write(key, None) => {
                    store.must(delete(MAIN, &name(key)));
                    model.remove(&key);
                }
                Step::ReadRange(from, to) => {
                    let to = to.max(from);
                    let seen: Model = model.range(from..to).map(|(k, v)| (*k, *v)).collect();
                    let since = store.group().applied();
                    read.push((range(&name(from), &name(to), since, seen.len() as u64), from..to, seen));
                }
                Step::ReadKey(of) => {
                    let seen: Model = model.range(of..=of).map(|(k, v)| (*k, *v)).collect();
                    let snapshot = store.group().snapshot(MAIN).expect("main");
                    let found = block_on(snapshot.get_version(DEFAULT, name(of).as_bytes())).expect("readable");
                    prop_assert_eq!(found.as_ref().map(|found| found.0), seen.get(&of).map(|seen| seen.0));
                    let condition = found.map_or_else(|| absent(&name(of)), |(index, _)| version(&name(of), index));
                    read.push((condition, of..of + 1, seen));
                }
                Step::Judge => {
                    for (condition, keys, seen) in read.drain(..) {
                        let now: Model = model.range(keys).map(|(k, v)| (*k, *v)).collect();
                        prop_assert_eq!(ask(&store, condition.clone()).is_none(), now == seen, "{:?}", condition);
                    }
                }
                Step::Flush => store.flush(),
            }
        }
        store.close();
    }
}
