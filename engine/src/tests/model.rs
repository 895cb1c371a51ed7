//! Random steps under random settings against ordered maps: one for each branch and checkpoint.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use mainstay_io::sim::SimMedia;
use proptest::prelude::*;

use super::harness::*;
use crate::{
    BranchId, CommandBody, CompactionStyle, Condition, ConditionalBatch, EngineSettings, ErrorKind, GroupSettings,
    KeyspaceOptions, LogIndex, MAIN, OperatorId, Snapshot, TableCompression, WriteBatch, WriteOp,
};

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Clone, Debug)]
enum Step {
    /// Branch, key, value length; 0 deletes.
    Write(u8, u8, u16),
    Many(u8, u8),
    /// Branch, first key, how many; 0 for all behind it.
    RemoveRange(u8, u8, u8),
    /// Branch, key, length of the operand that is appended.
    Append(u8, u8, u8),
    /// The same for many keys.
    AppendMany(u8, u8),
    /// A batch of branch and key: a put, a range that holds it, an operand for it, another put in the range with one too.
    Refill(u8, u8),
    /// Branch and key of a batch with a condition of this kind on what is there, that puts or merges; the last tells whether somebody writes the key in
    /// between, as for a transaction that comes too late.
    When(u8, u8, u8, bool),
    /// Branch and key: a lookup, one of many keys, and a scan from there that visits so many pairs, takes from both ends, and seeks.
    Read(u8, u8, u8),
    /// What is read now is read again and again until the store is opened anew.
    Pin(u8),
    Rotate,
    Settle,
    Checkpoint(u8, u8),
    DropCheckpoint(u8),
    Clone(u8, u8),
    DropClone(u8),
    /// Branch, first key, and whether its end is waited for.
    Compact(u8, u8, bool),
    /// The keyspace gets other options.
    Options(u8),
    Reopen,
    Kill(u64),
    Crash(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (any::<u8>(), any::<u8>(), 0..900_u16).prop_map(|(b, k, v)| Step::Write(b, k, v)),
        3 => (any::<u8>(), any::<u8>()).prop_map(|(b, n)| Step::Many(b, n)),
        3 => (any::<u8>(), any::<u8>(), 0..90_u8).prop_map(|(b, k, n)| Step::RemoveRange(b, k, n)),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(b, k)| Step::Refill(b, k)),
        4 => (any::<u8>(), any::<u8>(), any::<u8>(), any::<bool>()).prop_map(|(b, k, n, d)| Step::When(b, k, n, d)),
        3 => (any::<u8>(), any::<u8>(), 0..20_u8).prop_map(|(b, k, n)| Step::Read(b, k, n)),
        6 => (any::<u8>(), any::<u8>(), any::<u8>()).prop_map(|(b, k, n)| Step::Append(b, k, n)),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(b, n)| Step::AppendMany(b, n)),
        1 => any::<u8>().prop_map(Step::Pin),
        2 => Just(Step::Rotate),
        1 => Just(Step::Settle),
        2 => (0..3_u8, any::<u8>()).prop_map(|(n, b)| Step::Checkpoint(n, b)),
        1 => (0..3_u8).prop_map(Step::DropCheckpoint),
        2 => (0..3_u8, 0..3_u8).prop_map(|(n, c)| Step::Clone(n, c)),
        1 => (0..3_u8).prop_map(Step::DropClone),
        1 => (any::<u8>(), any::<u8>(), any::<bool>()).prop_map(|(b, k, w)| Step::Compact(b, k, w)),
        1 => any::<u8>().prop_map(Step::Options),
        1 => Just(Step::Reopen),
        1 => any::<u64>().prop_map(Step::Kill),
        1 => any::<u64>().prop_map(Step::Crash),
    ]
}

/// Settings of a run; none of them is seen in an answer.
#[derive(Clone, Debug)]
struct Tuning {
    memtable_kib: u64,
    table_kib: u64,
    base_level_kib: u64,
    l0_compaction_runs: usize,
    compression: TableCompression,
    engine: EngineSettings,
}

fn tuning() -> impl Strategy<Value = Tuning> {
    let compressions = vec![TableCompression::None, TableCompression::Lz4, TableCompression::ByLevel];
    let group = (1..16_u64, 2..32_u64, 8..64_u64, 1..5_usize, prop::sample::select(compressions));
    let engine = (1..64_u64, 1..4_usize, 1..6_usize).prop_map(|(memory, background_tasks, wal_in_flight_max)| {
        EngineSettings { memory_bytes: memory << 20, background_tasks, wal_in_flight_max, ..engine_settings() }
    });
    (group, engine).prop_map(|((memtable_kib, table_kib, base_level_kib, l0_compaction_runs, compression), engine)| {
        Tuning { memtable_kib, table_kib, base_level_kib, l0_compaction_runs, compression, engine }
    })
}

/// The volume and how it is opened.
struct Place {
    media: SimMedia,
    tuning: Tuning,
}

impl Place {
    fn open(&self) -> Store {
        let tuning = &self.tuning;
        let group = GroupSettings {
            memtable_bytes: tuning.memtable_kib << 10,
            table_bytes: tuning.table_kib << 10,
            base_level_bytes: tuning.base_level_kib << 10,
            l0_compaction_runs: tuning.l0_compaction_runs,
            compression: tuning.compression,
            ..settings()
        };
        Store::open_with(&self.media, group, tuning.engine.clone()).expect("the volume opens")
    }
}

#[derive(Default)]
struct Model {
    branches: BTreeMap<BranchId, (String, Pairs)>,
    checkpoints: BTreeMap<String, Pairs>,
    pinned: Vec<(Snapshot, Pairs)>,
}

impl Model {
    fn branch(&self, pick: u8) -> BranchId {
        *self.branches.keys().nth(usize::from(pick) % self.branches.len()).expect("main is always there")
    }

    fn pairs(&mut self, branch: BranchId) -> &mut Pairs {
        &mut self.branches.get_mut(&branch).expect("it was picked from the model").1
    }

    fn check(&self, store: &Store) {
        let group = store.group();
        assert_eq!(group.status().refused_installs, 0);
        let mut names: Vec<_> = group.branches().into_iter().map(|b| (b.id, b.name)).collect();
        names.sort();
        assert_eq!(names, self.branches.iter().map(|(id, (n, _))| (*id, n.clone())).collect::<Vec<_>>());
        for (id, (name, pairs)) in &self.branches {
            let snapshot = group.snapshot(*id).expect("the branch is there");
            assert_eq!(&all(&snapshot, DEFAULT), pairs, "{name}");
            assert_eq!(&all_back(&snapshot, DEFAULT), pairs, "{name} from behind");
        }
        let names: Vec<_> = group.checkpoints().into_iter().map(|c| c.name).collect();
        assert_eq!(names, self.checkpoints.keys().cloned().collect::<Vec<_>>());
        for (snapshot, pairs) in &self.pinned {
            assert_eq!(&all(snapshot, DEFAULT), pairs, "at {}", snapshot.index());
            assert_eq!(&all_back(snapshot, DEFAULT), pairs, "at {} from behind", snapshot.index());
        }
        for (name, pairs) in &self.checkpoints {
            assert_eq!(&all(&group.checkpoint(name).expect("it is there"), DEFAULT), pairs, "{name}");
        }
    }
}

/// Reads a key, and the pairs from there on in several ways at once.
fn read(snapshot: &Snapshot, pairs: &Pairs, key: &str, visited: usize) {
    assert_eq!(get(snapshot, key).map(|value| value.to_vec()).as_ref(), pairs.get(key.as_bytes()), "{key}");
    let keys: Vec<String> = (0..256).step_by(3).map(|n| format!("key-{n:03}")).collect();
    let found = mainstay_io::block_on(snapshot.get_many(DEFAULT, &keys)).expect("the keyspace is there");
    for (key, found) in keys.iter().zip(found) {
        assert_eq!(found.map(|value| value.to_vec()).as_ref(), pairs.get(key.as_bytes()), "{key} among many");
    }
    let from = Bytes::copy_from_slice(key.as_bytes());
    let mut expect: VecDeque<_> = pairs.range(key.as_bytes().to_vec()..).map(|(k, v)| (k.clone(), v.clone())).collect();
    let owned = |(key, value): (Bytes, crate::Value)| (key.to_vec(), value.to_vec());
    mainstay_io::block_on(async {
        let mut scan = snapshot.range(DEFAULT, Bound::Included(from), Bound::Unbounded);
        let mut left = visited;
        let mut found = Vec::new();
        let mut visit = |key: &[u8], value: &[u8]| {
            found.push((key.to_vec(), value.to_vec()));
            left = left.saturating_sub(1);
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        scan.visit(&mut visit).await.expect("the scan goes on");
        let first: Vec<_> = expect.drain(..visited.max(1).min(expect.len())).collect();
        assert_eq!(found, first, "visited from {key}");
        for _ in 0..2 {
            assert_eq!(scan.next_back().await.expect("the scan goes on").map(owned), expect.pop_back());
            assert_eq!(scan.next().await.expect("the scan goes on").map(owned), expect.pop_front());
        }
        let to = expect.get(expect.len() / 2).map(|(key, _)| key.clone());
        if let Some(to) = to {
            scan.seek(&to).await.expect("the scan goes on");
            expect.retain(|(key, _)| *key >= to);
        }
        while let Some(pair) = scan.next().await.expect("the scan goes on") {
            assert_eq!(Some(owned(pair)), expect.pop_front(), "behind the seek");
        }
        assert_eq!(expect, [], "left over");
    });
}

fn run(steps: &[Step], tuning: Tuning) {
    let place = Place { media: media(), tuning };
    let mut store = place.open();
    store.must(CommandBody::SetOperator { name: "default".into(), operator: OperatorId::APPEND });
    let mut model = Model::default();
    model.branches.insert(MAIN, ("main".into(), Pairs::new()));
    for step in steps {
        store = apply(&place, store, &mut model, step);
    }
    model.check(&store);
    model.pinned.clear();
    store.close();
    let store = place.open();
    model.check(&store);
    store.close();
    check_no_leak(&place.media);
}

fn append(store: &Store, model: &mut Model, branch: BranchId, key: u8, operand: &[u8]) {
    let key = Bytes::from(format!("key-{key:03}"));
    model.pairs(branch).entry(key.to_vec()).or_default().extend_from_slice(operand);
    let op = WriteOp::Merge { keyspace: DEFAULT, key, operand: Bytes::copy_from_slice(operand) };
    store.must(CommandBody::Batch(WriteBatch { branch, ops: vec![op] }));
}

fn apply(place: &Place, store: Store, model: &mut Model, step: &Step) -> Store {
    let refused = |store: &Store, body, expect: bool| {
        let applied = store.propose(body).expect("the log takes it");
        assert_eq!(applied.response.is_err(), expect, "{step:?}");
        applied.index
    };
    match *step {
        Step::Write(pick, key, length) => {
            let branch = model.branch(pick);
            let key = format!("key-{key:03}");
            if length == 0 {
                store.must(delete(branch, &key));
                model.pairs(branch).remove(key.as_bytes());
            } else {
                let value = vec![length as u8; usize::from(length)];
                store.must(put(branch, &key, &value));
                model.pairs(branch).insert(key.into_bytes(), value);
            }
        }
        Step::Many(pick, first) => {
            let branch = model.branch(pick);
            for n in 0..40_u8 {
                let key = format!("key-{:03}", first.wrapping_add(n.wrapping_mul(7)));
                store.must(put(branch, &key, &[n; 150]));
                model.pairs(branch).insert(key.into_bytes(), vec![n; 150]);
            }
        }
        Step::Append(pick, key, length) => {
            let branch = model.branch(pick);
            let operand = vec![length; usize::from(length)];
            append(&store, model, branch, key, &operand);
        }
        Step::AppendMany(pick, first) => {
            let branch = model.branch(pick);
            (0..30_u8).for_each(|n| append(&store, model, branch, first.wrapping_add(n.wrapping_mul(7)), &[n; 9]));
        }
        Step::RemoveRange(pick, first, count) => {
            let branch = model.branch(pick);
            let end = (count > 0).then(|| format!("key-{:03}", u16::from(first) + u16::from(count)));
            let range = range(&format!("key-{first:03}"), end.as_deref());
            model.pairs(branch).retain(|key, _| !range.contains(key));
            store.must(delete_range(branch, range));
        }
        Step::Refill(pick, key) => {
            let branch = model.branch(pick);
            let keys = [key, key.wrapping_add(1)].map(|key| Bytes::from(format!("key-{key:03}")));
            let put = |key: &Bytes, value| WriteOp::Put { keyspace: DEFAULT, key: key.clone(), value };
            let range = range("key-", Some(&format!("key-{:03}", u16::from(key) + 9)));
            model.pairs(branch).retain(|key, _| !range.contains(key));
            model.pairs(branch).insert(keys[0].to_vec(), b"-merged".to_vec());
            model.pairs(branch).insert(keys[1].to_vec(), b"after-merged".to_vec());
            let between = WriteOp::DeleteRange { keyspace: DEFAULT, range };
            let merge = |key: &Bytes| WriteOp::Merge { keyspace: DEFAULT, key: key.clone(), operand: "-merged".into() };
            let before = put(&keys[0], "before".into());
            let after = put(&keys[1], "after".into());
            let ops = vec![before, between, merge(&keys[0]), after, merge(&keys[1])];
            store.must(CommandBody::Batch(WriteBatch { branch, ops }));
        }
        Step::When(pick, key, kind, disturbed) => {
            let branch = model.branch(pick);
            let text = format!("key-{key:03}");
            let key = Bytes::copy_from_slice(text.as_bytes());
            let snapshot = store.group().snapshot(branch).expect("the branch is there");
            let found = mainstay_io::block_on(snapshot.get_version(DEFAULT, &key)).expect("the keyspace is there");
            let (lower, upper) = (key.clone(), Bytes::from(format!("{text}~")));
            let count = model.pairs(branch).range(lower.to_vec()..upper.to_vec()).count() as u64;
            let (there, keyspace) = (found.is_some(), DEFAULT);
            let (version, value) =
                found.map_or((LogIndex(u64::MAX), Bytes::new()), |(v, value)| (v, value.to_vec().into()));
            // Whether it holds on what is there, and once the key was written since.
            let (condition, (holds, still)) = match kind % 5 {
                0 => (Condition::Absent { keyspace, key: key.clone() }, (!there, false)),
                1 => (Condition::Present { keyspace, key: key.clone() }, (there, true)),
                2 => (Condition::Value { keyspace, key: key.clone(), value: value.clone() }, (there, value == "since")),
                3 => (Condition::Version { keyspace, key: key.clone(), version }, (there, false)),
                _ => {
                    let (lower, upper) = (Bound::Included(lower), Bound::Excluded(upper));
                    let since = snapshot.index();
                    (Condition::Range { keyspace, lower, upper, since, count }, (true, false))
                }
            };
            if disturbed {
                store.must(put(branch, &text, b"since"));
                model.pairs(branch).insert(key.to_vec(), b"since".to_vec());
            }
            let merges = kind / 5 % 2 == 1;
            let op = match merges {
                true => WriteOp::Merge { keyspace, key: key.clone(), operand: "when".into() },
                false => WriteOp::Put { keyspace, key: key.clone(), value: "when".into() },
            };
            let batch = WriteBatch { branch, ops: vec![op] };
            let body = CommandBody::BatchIf(ConditionalBatch { conditions: vec![condition], batch });
            let answer = store.propose(body).expect("the log takes it").response.map_err(|error| error.kind());
            let holds = if disturbed { still } else { holds };
            if holds {
                assert!(answer.is_ok(), "{step:?}: {answer:?}");
                let value = model.pairs(branch).entry(key.to_vec()).or_default();
                value.truncate(if merges { value.len() } else { 0 });
                value.extend_from_slice(b"when");
            } else {
                assert_eq!(answer, Err(ErrorKind::Conflict), "{step:?}");
            }
        }
        Step::Read(pick, key, visited) => {
            let branch = model.branch(pick);
            let snapshot = store.group().snapshot(branch).expect("the branch is there");
            read(&snapshot, model.pairs(branch), &format!("key-{key:03}"), visited.into());
        }
        Step::Pin(pick) => {
            let branch = model.branch(pick);
            let snapshot = store.group().snapshot(branch).expect("the branch is there");
            let pairs = model.pairs(branch).clone();
            model.pinned.push((snapshot, pairs));
        }
        Step::Rotate => drop(store.must(CommandBody::Rotate)),
        Step::Settle => {
            store.settle();
            model.check(&store);
        }
        Step::Checkpoint(n, pick) => {
            let (name, branch) = (format!("c{n}"), model.branch(pick));
            let taken = model.checkpoints.contains_key(&name);
            refused(&store, CommandBody::CreateCheckpoint { name: name.clone(), branch }, taken);
            if !taken {
                let pairs = model.pairs(branch).clone();
                model.checkpoints.insert(name, pairs);
            }
        }
        Step::DropCheckpoint(n) => {
            let name = format!("c{n}");
            let there = model.checkpoints.remove(&name).is_some();
            refused(&store, CommandBody::DropCheckpoint { name }, !there);
        }
        Step::Clone(n, c) => {
            let (name, checkpoint) = (format!("b{n}"), format!("c{c}"));
            let taken = model.branches.values().any(|(other, _)| *other == name);
            let from = model.checkpoints.get(&checkpoint).filter(|_| !taken).cloned();
            let body = CommandBody::CreateClone { name: name.clone(), checkpoint };
            let index = refused(&store, body, from.is_none());
            if let Some(pairs) = from {
                model.branches.insert(BranchId(index.0), (name, pairs));
            }
        }
        Step::DropClone(n) => {
            let name = format!("b{n}");
            let found = model.branches.iter().find(|(_, (other, _))| *other == name).map(|(id, _)| *id);
            refused(&store, CommandBody::DropClone { name }, found.is_none());
            found.map(|id| model.branches.remove(&id));
        }
        Step::Compact(pick, first, wait) => {
            let branch = model.branch(pick);
            let asked = store.must(compact(branch, &format!("key-{first:03}"), None));
            if wait {
                mainstay_io::block_on(store.group().compacted(asked.index)).expect("it ends");
                model.check(&store);
            }
        }
        Step::Options(n) => {
            let compressions = [TableCompression::None, TableCompression::Lz4, TableCompression::ByLevel];
            let options = KeyspaceOptions::new().compression(compressions[usize::from(n % 3)]);
            let options = match n / 3 % 4 {
                0 => options,
                1 => options.block_bytes(1 << 10),
                2 => options.compaction(CompactionStyle::Tiered { runs: 2 + n / 12 % 6 }),
                _ => options.block_bytes(64 << 10).compaction(CompactionStyle::Tiered { runs: 2 + n / 12 % 3 }),
            };
            store.must(CommandBody::SetOptions { name: "default".into(), options });
        }
        Step::Reopen => {
            model.pinned.clear();
            store.close();
            let store = place.open();
            model.check(&store);
            return store;
        }
        Step::Kill(seed) | Step::Crash(seed) => {
            model.pinned.clear();
            drop(store);
            if matches!(step, Step::Kill(_)) {
                place.media.kill(seed)
            } else {
                place.media.crash(seed)
            }
            let store = place.open();
            model.check(&store);
            return store;
        }
    }
    store
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_steps_leave_what_ordered_maps_hold(steps in prop::collection::vec(step(), 1..70), tuning in tuning()) {
        run(&steps, tuning);
    }
}
