//! Pairs that expire: what the time of the log says, on every replica, wherever the pair lies, and after every way of coming back.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use mainstay_io::{BoxFuture, block_on};
use proptest::prelude::*;

use super::harness::*;
use super::replicas::{Replica, check_equal};
use crate::{
    BranchId, Command, CommandBody, Condition, ConditionalBatch, ErrorKind, Group, KeyspaceId, LogIndex, MAIN,
    OperatorId, Result, Snapshot, TableId, TableSource, WriteBatch, WriteOp,
};

/// Later than any clock of a test, so that nobody else moves the time of these logs.
const T: u64 = 4_000_000_000_000;

/// A replica that leads, and its log.
struct Log {
    leader: Replica,
    commands: Vec<Command>,
    keyspace: KeyspaceId,
}

impl Log {
    fn new() -> Self {
        let leader = Replica::new(64 << 20, 1);
        let mut log = Self { leader, commands: Vec::new(), keyspace: DEFAULT };
        let id = log.must(T, CommandBody::CreateExpiring { name: "sessions".into() });
        log.keyspace = KeyspaceId(u32::from_le_bytes(id[..].try_into().expect("an id")));
        log
    }

    /// Applies an entry of that time, and the installs that are due.
    fn apply(&mut self, time_ms: u64, body: CommandBody) -> Result<Bytes> {
        let answer = self.push(Command { time_ms, body });
        while let Some(offer) = self.leader.group.shared().take_offer() {
            self.push(Command { time_ms, ..offer }).expect("an install is never refused");
        }
        answer
    }

    fn push(&mut self, command: Command) -> Result<Bytes> {
        self.commands.push(command);
        let index = LogIndex(self.commands.len() as u64);
        let command = self.commands.last().expect("just pushed");
        block_on(self.leader.group.apply(index, command)).expect("the group is open").response
    }

    fn must(&mut self, time_ms: u64, body: CommandBody) -> Bytes {
        self.apply(time_ms, body).expect("not refused")
    }

    fn op_for(&self, key: &str, value: &str, ttl_ms: u64) -> WriteOp {
        let (key, value) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value.as_bytes()));
        WriteOp::PutFor { keyspace: self.keyspace, key, value, ttl_ms }
    }

    fn put_for(&mut self, time_ms: u64, key: &str, value: &str, ttl_ms: u64) {
        let op = self.op_for(key, value, ttl_ms);
        self.must(time_ms, batch(vec![op]));
    }

    fn put(&mut self, time_ms: u64, key: &str, value: &str) {
        let (key, value) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value.as_bytes()));
        self.must(time_ms, batch(vec![WriteOp::Put { keyspace: self.keyspace, key, value }]));
    }

    /// Moves the time of the log.
    fn pass(&mut self, time_ms: u64) {
        self.must(time_ms, batch(vec![]));
    }

    fn flush(&mut self, time_ms: u64) {
        self.must(time_ms, CommandBody::Rotate);
        self.finish_jobs(time_ms);
    }

    fn compact(&mut self, time_ms: u64) {
        let (keyspace, branch) = (self.keyspace, MAIN);
        self.must(time_ms, CommandBody::Compact { branch, keyspace, first: Bytes::new(), end: None });
        self.finish_jobs(time_ms);
    }

    fn finish_jobs(&mut self, time_ms: u64) {
        while self.leader.group.shared().has_jobs() {
            let next = block_on(self.leader.group.next_install());
            self.push(Command { time_ms, ..next }).expect("an install is never refused");
        }
    }

    fn snapshot(&self) -> Snapshot {
        self.leader.group.snapshot(MAIN).expect("main")
    }

    fn found(&self) -> BTreeMap<String, String> {
        found(&self.snapshot(), self.keyspace)
    }

    /// Another replica that is fed the whole log ends as this one did.
    fn check_followers(&self) {
        for (memory, tasks, crashes) in [(1 << 20, 1, 0), (256 << 20, 4, 3)] {
            let mut replica = Replica::new(memory, tasks);
            for crash in 1..=crashes {
                replica.feed(&self.commands[..self.commands.len() * crash / 4]);
                replica = replica.crash(crash as u64);
            }
            replica.feed(&self.commands);
            check_equal(&self.leader, &replica);
            for branch in replica.group.branches() {
                let of = |group: &Group| found(&group.snapshot(branch.id).expect("there"), self.keyspace);
                assert_eq!(of(&replica.group), of(&self.leader.group), "branch={}", branch.name);
            }
        }
    }
}

fn batch(ops: Vec<WriteOp>) -> CommandBody {
    CommandBody::Batch(WriteBatch { branch: MAIN, ops })
}

/// All pairs, which every way of reading finds alike.
fn found(snapshot: &Snapshot, keyspace: KeyspaceId) -> BTreeMap<String, String> {
    let pairs = all(snapshot, keyspace);
    assert_eq!(pairs, all_back(snapshot, keyspace), "from behind");
    let mut visited = BTreeMap::new();
    block_on(snapshot.range(keyspace, Bound::Unbounded, Bound::Unbounded).visit(&mut |key, value| {
        visited.insert(key.to_vec(), value.to_vec());
        ControlFlow::Continue(())
    }))
    .expect("the scan goes on");
    assert_eq!(pairs, visited, "borrowed");
    let keys: Vec<String> = (0..60).map(|n| format!("k{n:03}")).collect();
    let many = block_on(snapshot.get_many(keyspace, &keys)).expect("read");
    for (key, many) in keys.iter().zip(many) {
        let one = block_on(snapshot.get(keyspace, key.as_bytes())).expect("read");
        assert_eq!(
            (one.as_deref(), many.as_deref()),
            (pairs.get(key.as_bytes()).map(Vec::as_slice), one.as_deref()),
            "{key}"
        );
    }
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    pairs.into_iter().map(|(key, value)| (text(key), text(value))).collect()
}

fn pairs(expect: &[(&str, &str)]) -> BTreeMap<String, String> {
    expect.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// In the memtable, in L0, in the last level: the pair is there until the time is its end, for who reads at that index.
#[test]
fn a_pair_is_there_until_the_time_of_the_log_is_its_end() {
    for place in 0..3 {
        let mut log = Log::new();
        log.put(T, "k001", "stays");
        log.put_for(T, "k002", "ends", 10);
        log.put(T, "k003", "below");
        log.put_for(T + 1, "k003", "above", 5);
        log.put_for(T, "k004", "renewed", 3);
        log.put_for(T + 2, "k004", "renewed", 20);
        log.put_for(T + 2, "k005", "kept", 1);
        log.put(T + 2, "k005", "for ever");
        match place {
            0 => {}
            1 => log.flush(T + 2),
            _ => log.compact(T + 2),
        }
        let all = [("k001", "stays"), ("k002", "ends"), ("k003", "above"), ("k004", "renewed"), ("k005", "for ever")];
        log.pass(T + 5);
        assert_eq!(log.found(), pairs(&all), "place={place}");
        let before = log.snapshot();
        // What it hid does not come back.
        log.pass(T + 6);
        assert_eq!(log.found(), pairs(&[all[0], all[1], all[3], all[4]]), "place={place}");
        log.pass(T + 10);
        assert_eq!(log.found(), pairs(&[all[0], all[3], all[4]]), "place={place}");
        // A clock that goes back brings nothing back.
        log.pass(T);
        assert_eq!(log.found(), pairs(&[all[0], all[3], all[4]]), "place={place}");
        log.compact(T + 21);
        assert_eq!(log.found(), pairs(&[all[0], all[3], all[4]]), "T + 22 is its end");
        log.compact(T + 22);
        assert_eq!(log.found(), pairs(&[all[0], all[4]]));
        assert_eq!(found(&before, log.keyspace), pairs(&all), "a reader keeps its time");
        log.check_followers();
    }
}

/// Of a hundred pairs of which most have ended a compaction leaves the others, and the same on each replica.
#[test]
fn a_compaction_drops_what_has_ended() {
    let mut log = Log::new();
    for n in 0..60 {
        log.put_for(T + n, &format!("k{n:03}"), "value", 40 + n % 2 * 1000);
    }
    log.compact(T + 60);
    let tables = log.leader.group.status().table_bytes;
    log.pass(T + 500);
    log.flush(T + 500);
    log.compact(T + 501);
    let expect: BTreeMap<_, _> = (0..30).map(|n| (format!("k{:03}", n * 2 + 1), "value".to_owned())).collect();
    assert_eq!(log.found(), expect);
    log.check_followers();
    // All of them: nothing is left to hold.
    log.pass(T + 5000);
    log.flush(T + 5000);
    log.compact(T + 5001);
    assert_eq!((log.found(), log.leader.group.status().tables), (BTreeMap::new(), 0), "of {tables} bytes");
    log.check_followers();
}

/// Nothing is written any more: a rotation finds which tables have ended, by what their installs said.
#[test]
fn tables_that_have_ended_go_when_the_memtables_rotate() {
    let mut log = Log::new();
    let rotate = |log: &mut Log, time_ms| drop(log.must(time_ms, CommandBody::Rotate));
    let tables = |log: &Log| log.leader.group.status().tables;
    let entries = |log: &Log| -> u64 {
        let tables = log.leader.group.shared().pages().1.tables();
        tables.values().map(|table| table.entries).sum()
    };
    for n in 0..30 {
        log.put_for(T, &format!("k{n:03}"), "value", 40);
        log.put_for(T, &format!("k{:03}", n + 30), "value", 100);
    }
    log.flush(T);
    assert!(tables(&log) > 0);
    let all = log.found();
    let before = log.snapshot();
    rotate(&mut log, T + 39);
    assert!(!log.leader.group.shared().has_jobs() && entries(&log) == 60);
    // Half of them: what is left is written again.
    rotate(&mut log, T + 40);
    log.finish_jobs(T + 40);
    assert_eq!((entries(&log), log.found().len()), (30, 30));
    rotate(&mut log, T + 99);
    assert!(!log.leader.group.shared().has_jobs() && tables(&log) > 0);
    // All: nothing is read or written.
    rotate(&mut log, T + 100);
    assert_eq!((tables(&log), log.leader.group.shared().has_jobs()), (0, false));
    assert_eq!((log.found(), found(&before, log.keyspace)), (BTreeMap::new(), all));
    log.check_followers();
}

/// One pair lives for ever, or is put again later: a table is kept for it.
#[test]
fn a_table_stays_for_what_has_not_ended() {
    let mut log = Log::new();
    for n in 0..60 {
        log.put_for(T, &format!("k{n:03}"), "value", 40);
    }
    log.flush(T);
    log.put(T, "k000", "for ever");
    log.put_for(T, "k059", "value", 4000);
    log.flush(T);
    log.must(T + 40, CommandBody::Rotate);
    log.finish_jobs(T + 40);
    let expect = pairs(&[("k000", "for ever"), ("k059", "value")]);
    assert_eq!(log.found(), expect);
    log.must(T + 50, CommandBody::Rotate);
    log.finish_jobs(T + 50);
    assert_eq!(log.found(), expect);
    log.check_followers();
}

#[test]
fn checkpoints_keep_their_time_and_clones_go_on_with_that_of_the_group() {
    let mut log = Log::new();
    log.put_for(T, "k001", "a", 10);
    log.put_for(T, "k002", "b", 100);
    log.must(T + 5, CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    log.pass(T + 50);
    let checkpoint = |log: &Log| found(&log.leader.group.checkpoint("c").expect("made"), log.keyspace);
    assert_eq!(checkpoint(&log), pairs(&[("k001", "a"), ("k002", "b")]));
    let id = log.must(T + 50, CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() });
    let branch = BranchId(u64::from_le_bytes(id[..].try_into().expect("an id")));
    let clone = |log: &Log| found(&log.leader.group.snapshot(branch).expect("made"), log.keyspace);
    assert_eq!(clone(&log), pairs(&[("k002", "b")]));
    let op = log.op_for("k003", "c", 25);
    log.must(T + 50, CommandBody::Batch(WriteBatch { branch, ops: vec![op] }));
    log.compact(T + 60);
    assert_eq!(clone(&log), pairs(&[("k002", "b"), ("k003", "c")]));
    log.pass(T + 100);
    assert_eq!((clone(&log), log.found()), (BTreeMap::new(), BTreeMap::new()));
    assert_eq!(checkpoint(&log), pairs(&[("k001", "a"), ("k002", "b")]));
    log.check_followers();
}

/// A condition finds what is there at the time of its own entry.
#[test]
fn conditions_judge_by_the_time_of_their_own_entry() {
    let mut log = Log::new();
    log.put_for(T, "k001", "a", 10);
    let index = LogIndex(log.commands.len() as u64);
    let key = || Bytes::from_static(b"k001");
    let keyspace = log.keyspace;
    let if_so = |condition| {
        let batch = WriteBatch { branch: MAIN, ops: vec![] };
        CommandBody::BatchIf(ConditionalBatch { conditions: vec![condition], batch })
    };
    let range =
        |since, count| Condition::Range { keyspace, lower: Bound::Unbounded, upper: Bound::Unbounded, since, count };
    let before = LogIndex(index.0);
    for (time, there) in [(T + 9, true), (T + 10, false)] {
        let conditions = [
            (Condition::Present { keyspace, key: key() }, there),
            (Condition::Value { keyspace, key: key(), value: "a".into() }, there),
            (Condition::Version { keyspace, key: key(), version: index }, there),
            (range(before, 1), there),
            (Condition::Absent { keyspace, key: key() }, !there),
            (range(before, 0), !there),
        ];
        for (condition, holds) in conditions {
            let shown = format!("{condition:?} at {}", time - T);
            match log.apply(time, if_so(condition)) {
                Ok(_) => assert!(holds, "{shown}"),
                Err(error) => assert!(!holds && error.kind() == ErrorKind::Conflict, "{shown}: {error}"),
            }
        }
    }
    log.check_followers();
}

#[test]
fn what_does_not_expire_and_what_is_not_there_is_refused() {
    let mut log = Log::new();
    let refused = |log: &mut Log, body: CommandBody| {
        let error = log.apply(T, body).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        error.to_string()
    };
    let (key, value) = (Bytes::from_static(b"key"), Bytes::from_static(b"value"));
    let op = WriteOp::PutFor { keyspace: DEFAULT, key: key.clone(), value: value.clone(), ttl_ms: 5 };
    let why = refused(&mut log, batch(vec![op.clone()]));
    assert!(why.contains("do not expire"), "{why}");
    let conditional = ConditionalBatch {
        conditions: vec![Condition::Absent { keyspace: DEFAULT, key: key.clone() }],
        batch: WriteBatch { branch: MAIN, ops: vec![op] },
    };
    refused(&mut log, CommandBody::BatchIf(conditional));
    let none = log.op_for("key", "value", 0);
    refused(&mut log, batch(vec![none]));
    let long = vec![7; crate::VALUE_BYTES_MAX - 9];
    let keyspace = log.keyspace;
    let why = refused(&mut log, batch(vec![WriteOp::Put { keyspace, key, value: long.into() }]));
    assert!(why.contains("too long"), "{why}");
    let operator = OperatorId::APPEND;
    let why = refused(&mut log, CommandBody::SetOperator { name: "sessions".into(), operator: operator.clone() });
    assert!(why.contains("takes no merge operator"), "{why}");
    log.must(T, CommandBody::CreateKeyspace { name: "plain".into() });
    let why = refused(&mut log, CommandBody::CreateExpiring { name: "plain".into() });
    assert!(why.contains("do not expire"), "{why}");
    let id = log.must(T, CommandBody::CreateExpiring { name: "sessions".into() });
    assert_eq!(id[..], log.keyspace.0.to_le_bytes(), "it is there");
    assert!(log.leader.group.expires(log.keyspace) && !log.leader.group.expires(DEFAULT));
    let zero = Command { time_ms: T, body: batch(vec![log.op_for("key", "value", 0)]) };
    assert_eq!(zero.encode().expect_err("no time").kind(), ErrorKind::Invalid);
    log.check_followers();
}

/// Nothing is known of time before the first expiring keyspace, and nothing behind the last one: a replica that was opened in between finds
/// the same.
#[test]
fn the_time_of_the_log_begins_and_ends_with_the_keyspaces() {
    let mut log = Log::new();
    log.put_for(T + 100, "k001", "a", 10);
    log.must(T + 200, CommandBody::DropKeyspace { name: "sessions".into() });
    log.flush(T + 200);
    log.must(T + 200, put(MAIN, "other", b"value"));
    log.flush(T + 200);
    // By a clock that was far behind: its pairs live by that.
    let id = log.must(T + 50, CommandBody::CreateExpiring { name: "sessions".into() });
    log.keyspace = KeyspaceId(u32::from_le_bytes(id[..].try_into().expect("an id")));
    log.put_for(T + 60, "k002", "b", 10);
    log.pass(T + 69);
    assert_eq!(log.found(), pairs(&[("k002", "b")]));
    log.check_followers();
    log.compact(T + 70);
    assert_eq!(log.found(), BTreeMap::new());
    log.check_followers();
}

struct From<'a>(&'a Group);

impl TableSource for From<'_> {
    fn read_table(&self, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        let group = self.0.clone();
        Box::pin(async move { group.read_table(id, offset, length).await })
    }
}

/// Who is sent the tables goes on with the time that they have.
#[test]
fn an_import_brings_the_time_with_it() {
    let mut log = Log::new();
    for n in 0..60 {
        log.put_for(T + 10 * n, &format!("k{n:03}"), "value", 300);
    }
    log.flush(T + 600);
    // The clock of the next leader is behind.
    let export = log.leader.group.export().expect("open");
    let receiver = Replica::new(64 << 20, 1);
    block_on(receiver.group.import(export.manifest, &From(&log.leader.group))).expect("all can be had");
    log.put_for(T, "k000", "late", 5);
    log.pass(T + 1);
    assert_eq!(log.found().get("k000").map(String::as_str), Some("late"), "it lives by the time of the log");
    receiver.feed(&log.commands);
    check_equal(&log.leader, &receiver);
    assert_eq!(found(&receiver.group.snapshot(MAIN).expect("main"), log.keyspace), log.found());
    log.compact(T + 605);
    assert!(!log.found().contains_key("k000"));
    receiver.feed(&log.commands);
    check_equal(&log.leader, &receiver);
}

/// The time is offered to the log while some pair is to end, and not before or after.
#[test]
fn a_quiet_log_is_moved_on_until_all_has_ended() {
    let replica = Replica::new(64 << 20, 1);
    let now =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_millis() as u64;
    let index = std::cell::Cell::new(0);
    let apply = |command: &Command| {
        index.set(index.get() + 1);
        block_on(replica.group.apply(LogIndex(index.get()), command)).expect("open").response.expect("not refused")
    };
    let offer = || replica.group.shared().take_offer();
    let id = apply(&Command { time_ms: now() - 5000, body: CommandBody::CreateExpiring { name: "s".into() } });
    let keyspace = KeyspaceId(u32::from_le_bytes(id[..].try_into().expect("an id")));
    assert!(offer().is_none() && replica.group.shared().tick_pause().is_none(), "nothing is to end");
    let op = |ttl_ms| WriteOp::PutFor { keyspace, key: "key".into(), value: "value".into(), ttl_ms };
    apply(&Command { time_ms: now() - 5000, body: batch(vec![op(4000)]) });
    assert!(replica.group.shared().tick_pause().is_some());
    let tick = offer().expect("it ended a second ago");
    assert_eq!(tick.body, CommandBody::Rotate, "it was the last one: what is in tables can go");
    assert!(offer().is_none(), "once a second");
    apply(&tick);
    assert!(all(&replica.group.snapshot(MAIN).expect("main"), keyspace).is_empty());
    apply(&block_on(replica.group.next_install()));
    assert_eq!(replica.group.status().tables, 0, "the flush came after its end");
    assert!(replica.group.shared().tick_pause().is_none(), "nothing is to end any more");
    apply(&Command { time_ms: now(), body: batch(vec![op(3_600_000)]) });
    assert!(offer().is_none(), "the time is moving by itself");
    let next = block_on(replica.group.next_install());
    assert_eq!(next.body, batch(vec![]), "a second later");
}

#[derive(Clone, Debug)]
enum Step {
    /// Key, and for how long; 0 for ever.
    Put(u8, u64),
    Delete(u8),
    /// From a key, so many.
    Remove(u8, u8),
    /// The clock of the next entries is so much later, or earlier.
    Clock(i64),
    Pass,
    Flush,
    Compact,
    /// A checkpoint is made anew.
    Checkpoint,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..60_u8, 0..80_u64).prop_map(|(k, t)| Step::Put(k, t)),
        2 => (0..60_u8).prop_map(Step::Delete),
        1 => (0..60_u8, 1..20_u8).prop_map(|(k, n)| Step::Remove(k, n)),
        6 => (-10..30_i64).prop_map(Step::Clock),
        3 => Just(Step::Pass),
        2 => Just(Step::Flush),
        1 => Just(Step::Compact),
        1 => Just(Step::Checkpoint),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 500, ..ProptestConfig::default() })]

    /// Against a map of values and ends, with a clock that goes where it likes; and every replica that is fed the same log ends the same.
    #[test]
    fn any_steps_leave_what_a_map_of_ends_holds(steps in prop::collection::vec(step(), 1..80)) {
        let mut log = Log::new();
        let (mut clock, mut time) = (T, T);
        let mut model: BTreeMap<String, (String, u64)> = BTreeMap::new();
        let live = |model: &BTreeMap<String, (String, u64)>, time: u64| -> BTreeMap<String, String> {
            let there = model.iter().filter(|(_, (_, end))| *end > time);
            there.map(|(key, (value, _))| (key.clone(), value.clone())).collect()
        };
        let mut checkpoint = None;
        for (n, step) in steps.iter().enumerate() {
            let name = |key: u8| format!("k{key:03}");
            let keyspace = log.keyspace;
            if !matches!(step, Step::Clock(_)) {
                time = time.max(clock);
            }
            match *step {
                Step::Put(key, ttl) => {
                    let value = format!("{n:<90}");
                    let end = if ttl == 0 { u64::MAX } else { time + ttl };
                    model.insert(name(key), (value.clone(), end));
                    if ttl == 0 { log.put(clock, &name(key), &value) } else { log.put_for(clock, &name(key), &value, ttl) }
                }
                Step::Delete(key) => {
                    model.remove(&name(key));
                    log.must(clock, batch(vec![WriteOp::Delete { keyspace, key: name(key).into() }]));
                }
                Step::Remove(key, count) => {
                    let range = range(&name(key), Some(&name(key + count)));
                    model.retain(|key, _| !range.contains(key.as_bytes()));
                    log.must(clock, batch(vec![WriteOp::DeleteRange { keyspace, range }]));
                }
                Step::Clock(by) => clock = clock.saturating_add_signed(by),
                Step::Pass => log.pass(clock),
                Step::Flush => log.flush(clock),
                Step::Compact => log.compact(clock),
                Step::Checkpoint => {
                    if checkpoint.take().is_some() {
                        log.must(clock, CommandBody::DropCheckpoint { name: "c".into() });
                    }
                    log.must(clock, CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
                    checkpoint = Some(live(&model, time));
                }
            }
            if n % 8 == 0 {
                prop_assert_eq!(log.found(), live(&model, time), "behind step {}", n);
            }
        }
        prop_assert_eq!(log.found(), live(&model, time));
        if let Some(pairs) = checkpoint {
            let made = log.leader.group.checkpoint("c").expect("made");
            prop_assert_eq!(found(&made, log.keyspace), pairs);
        }
        log.compact(clock);
        prop_assert_eq!(log.found(), live(&model, time.max(clock)));
        log.check_followers();
    }
}
