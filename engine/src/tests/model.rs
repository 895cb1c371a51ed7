//! Random steps against ordered maps: one for each branch and checkpoint.

use std::collections::BTreeMap;

use bytes::Bytes;
use mainstay_io::sim::SimMedia;
use proptest::prelude::*;

use super::harness::*;
use crate::{BranchId, CommandBody, MAIN, Snapshot, WriteBatch, WriteOp};

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Clone, Debug)]
enum Step {
    /// Branch, key, value length; 0 deletes.
    Write(u8, u8, u16),
    Many(u8, u8),
    /// Branch, first key, how many; 0 for all behind it.
    RemoveRange(u8, u8, u8),
    /// A batch of branch and key: a put, a range that holds it, another put in the range.
    Refill(u8, u8),
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
        1 => any::<u8>().prop_map(Step::Pin),
        2 => Just(Step::Rotate),
        1 => Just(Step::Settle),
        2 => (0..3_u8, any::<u8>()).prop_map(|(n, b)| Step::Checkpoint(n, b)),
        1 => (0..3_u8).prop_map(Step::DropCheckpoint),
        2 => (0..3_u8, 0..3_u8).prop_map(|(n, c)| Step::Clone(n, c)),
        1 => (0..3_u8).prop_map(Step::DropClone),
        1 => (any::<u8>(), any::<u8>(), any::<bool>()).prop_map(|(b, k, w)| Step::Compact(b, k, w)),
        1 => Just(Step::Reopen),
        1 => any::<u64>().prop_map(Step::Kill),
        1 => any::<u64>().prop_map(Step::Crash),
    ]
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

fn run(steps: &[Step]) {
    let media = media();
    let mut store = Store::open(&media);
    let mut model = Model::default();
    model.branches.insert(MAIN, ("main".into(), Pairs::new()));
    for step in steps {
        store = apply(&media, store, &mut model, step);
    }
    model.check(&store);
    model.pinned.clear();
    store.close();
    let store = Store::open(&media);
    model.check(&store);
    store.close();
    check_no_leak(&media);
}

fn apply(media: &SimMedia, store: Store, model: &mut Model, step: &Step) -> Store {
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
            model.pairs(branch).insert(keys[1].to_vec(), b"after".to_vec());
            let between = WriteOp::DeleteRange { keyspace: DEFAULT, range };
            let ops = vec![put(&keys[0], "before".into()), between, put(&keys[1], "after".into())];
            store.must(CommandBody::Batch(WriteBatch { branch, ops }));
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
        Step::Reopen => {
            model.pinned.clear();
            store.close();
            let store = Store::open(media);
            model.check(&store);
            return store;
        }
        Step::Kill(seed) | Step::Crash(seed) => {
            model.pinned.clear();
            drop(store);
            if matches!(step, Step::Kill(_)) {
                media.kill(seed)
            } else {
                media.crash(seed)
            }
            let store = Store::open(media);
            model.check(&store);
            return store;
        }
    }
    store
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_steps_leave_what_ordered_maps_hold(steps in prop::collection::vec(step(), 1..70)) {
        run(&steps);
    }
}
