//! What a command has written so far: found by key, and in order of keys for who scans.
//!
//! # Place
//! Inside [`crate::Apply`]; the applier takes all of it when the command has succeeded.
//!
//! # Invariants
//! W1. Of several writes to one key the last one counts, at the place of the first: order of keys and order of writes never
//!     depend on the hash.
//! W2. `sorted` is unset, or holds every key that was written.
//! W3. A range that is removed takes with it what was written to its keys before; what is written to them later stands beside it. So it
//!     does not matter in which order ranges and writes are applied.
//!
//! # Why not
//! a `BTreeMap` from the start: of the commands of a server few scan, and each write of each replica would find its place by
//! comparing keys.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hash, Hasher};
use std::ops::Bound;
use std::sync::OnceLock;

use bytes::Bytes;
use indexmap::{Equivalent, IndexMap};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::KeyspaceId;
use crate::command::WriteOp;
use crate::range_tombstone::{KeyRange, RangeSet};

/// A key of a keyspace.
pub(crate) type Place = (KeyspaceId, Bytes);

/// See the module.
pub(crate) struct OwnWrites {
    /// `None` removes.
    writes: IndexMap<Key, Option<Bytes>, Seed>,
    sorted: OnceLock<BTreeSet<Place>>,
    removed: BTreeMap<KeyspaceId, RangeSet>,
    /// For how long, in milliseconds, what was written for a time.
    lives: BTreeMap<Place, u64>,
}

#[derive(PartialEq, Eq)]
struct Key(KeyspaceId, Bytes);

struct KeyRef<'a>(KeyspaceId, &'a [u8]);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        KeyRef(self.0, &self.1).hash(state);
    }
}

impl Hash for KeyRef<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u32(self.0.0);
        state.write(self.1);
    }
}

impl Equivalent<Key> for KeyRef<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.0 == key.0 && self.1 == key.1
    }
}

/// Differs from entry to entry, so that nobody can choose keys beforehand that meet in one place of the table.
struct Seed(u64);

struct KeyHasher(u64);

impl BuildHasher for Seed {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher(self.0)
    }
}

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    fn write_u32(&mut self, number: u32) {
        self.0 ^= u64::from(number);
    }
}

impl OwnWrites {
    /// None yet. `seed` differs between commands.
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            writes: IndexMap::with_hasher(Seed(seed)),
            sorted: OnceLock::new(),
            removed: BTreeMap::new(),
            lives: BTreeMap::new(),
        }
    }

    /// Sets a key for a time, 0 for ever.
    pub(crate) fn write_for(&mut self, keyspace: KeyspaceId, key: Bytes, value: Bytes, ttl_ms: u64) {
        self.write(keyspace, key.clone(), Some(value));
        if ttl_ms > 0 {
            self.lives.insert((keyspace, key), ttl_ms);
        }
    }

    /// Sets (`Some`) or removes (`None`) a key.
    pub(crate) fn write(&mut self, keyspace: KeyspaceId, key: Bytes, value: Option<Bytes>) {
        if !self.lives.is_empty() {
            self.lives.remove(&(keyspace, key.clone()));
        }
        if let Some(sorted) = self.sorted.get_mut() {
            sorted.insert((keyspace, key.clone()));
        }
        self.writes.insert(Key(keyspace, key), value);
    }

    /// Removes all keys of a range.
    pub(crate) fn remove_range(&mut self, keyspace: KeyspaceId, range: &KeyRange) {
        if !self.writes.is_empty() {
            let writes = &self.writes;
            self.sorted.get_or_init(|| in_order(writes));
        }
        if let Some(sorted) = self.sorted.get_mut() {
            let (from, to) = ((keyspace, range.start().clone()), (keyspace, range.end_place().clone()));
            let gone: Vec<Place> = sorted.range(from..to).cloned().collect();
            for place in gone {
                sorted.remove(&place);
                // The last one takes its place: it is the same one on every replica.
                self.writes.swap_remove(&KeyRef(place.0, &place.1));
            }
        }
        self.removed.entry(keyspace).or_default().add(range);
    }

    /// What was written to a key, if anything was: `Some(None)` when it was removed.
    pub(crate) fn get(&self, keyspace: KeyspaceId, key: &[u8]) -> Option<&Option<Bytes>> {
        let written = self.writes.get(&KeyRef(keyspace, key));
        written.or_else(|| self.removed_range(keyspace, key).map(|_| &None))
    }

    /// Nothing was written or removed.
    pub(crate) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.removed.is_empty()
    }

    /// The range that holds a key and was removed.
    pub(crate) fn removed_range(&self, keyspace: KeyspaceId, key: &[u8]) -> Option<KeyRange> {
        self.removed.get(&keyspace)?.at(key)
    }

    /// What was written between two places, in order of keys. The first call puts all keys in order.
    pub(crate) fn range(
        &self,
        from: Bound<Place>,
        to: Bound<Place>,
    ) -> impl DoubleEndedIterator<Item = (&Bytes, &Option<Bytes>)> + Send {
        // Without any there is nothing to put in order, and most that scan first have written nothing.
        let sorted = (!self.writes.is_empty()).then(|| self.sorted.get_or_init(|| in_order(&self.writes)));
        let places = sorted.into_iter().flat_map(move |sorted| sorted.range((from.clone(), to.clone())));
        places.map(|(keyspace, key)| (key, self.get(*keyspace, key).expect("W2: what is in order was written")))
    }

    /// All mutations: the ranges, then one a key.
    pub(crate) fn into_ops(self) -> Vec<WriteOp> {
        let lives = self.lives;
        let life = |keyspace, key: &Bytes| match lives.is_empty() {
            true => None,
            false => lives.get(&(keyspace, key.clone())).copied(),
        };
        let op = |(Key(keyspace, key), value)| match value {
            Some(value) => match life(keyspace, &key) {
                Some(ttl_ms) => WriteOp::PutFor { keyspace, key, value, ttl_ms },
                None => WriteOp::Put { keyspace, key, value },
            },
            None => WriteOp::Delete { keyspace, key },
        };
        let ranges = self
            .removed
            .iter()
            .flat_map(|(&keyspace, ranges)| ranges.iter().map(move |range| WriteOp::DeleteRange { keyspace, range }));
        ranges.chain(self.writes.into_iter().map(op)).collect()
    }
}

fn in_order(writes: &IndexMap<Key, Option<Bytes>, Seed>) -> BTreeSet<Place> {
    writes.keys().map(|key| (key.0, key.1.clone())).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Scans in between, so that keys are put in order at every stage.
        #[test]
        fn behaves_as_a_map_in_order(
            steps in prop::collection::vec((0u32..3, prop::collection::vec(0u8..3, 0..3), any::<Option<u8>>(), 0u8..4), 0..60),
            seed in any::<u64>(),
        ) {
            let mut own = OwnWrites::new(seed);
            let mut model: BTreeMap<(KeyspaceId, Bytes), Option<Bytes>> = BTreeMap::new();
            let mut removed: Vec<(KeyspaceId, KeyRange)> = Vec::new();
            for (keyspace, key, value, step) in steps {
                let scan = step < 2;
                if step == 3 {
                    let range = KeyRange::new(Bound::Included(key.into()), value.map_or(Bound::Unbounded, |v| Bound::Excluded(vec![v % 4].into())));
                    if range.check().is_ok() {
                        own.remove_range(KeyspaceId(keyspace), &range);
                        model.retain(|(at, key), _| *at != KeyspaceId(keyspace) || !range.contains(key));
                        removed.push((KeyspaceId(keyspace), range));
                    }
                    continue;
                }
                let (keyspace, key) = (KeyspaceId(keyspace), Bytes::from(key));
                let value = value.map(|v| Bytes::from(vec![v]));
                own.write(keyspace, key.clone(), value.clone());
                model.insert((keyspace, key.clone()), value);
                prop_assert_eq!(own.get(keyspace, &key), model.get(&(keyspace, key.clone())));
                prop_assert_eq!(own.get(KeyspaceId(9), &key), None);
                if scan {
                    let end = Bound::Excluded((KeyspaceId(2), Bytes::new()));
                    let in_order = (keyspace, &key) < (KeyspaceId(2), &Bytes::new());
                    let bounds = if in_order { (Bound::Excluded((keyspace, key)), end) } else { (Bound::Unbounded, end) };
                    let found: Vec<_> = own.range(bounds.0.clone(), bounds.1.clone()).collect();
                    let expect: Vec<_> = model.range(bounds.clone()).map(|((_, key), value)| (key, value)).collect();
                    prop_assert_eq!(&found, &expect);
                    let back: Vec<_> = own.range(bounds.0, bounds.1).rev().collect();
                    prop_assert!(back.iter().eq(expect.iter().rev()));
                }
            }
            for (keyspace, range) in &removed {
                let start = range.start();
                let written = model.get(&(*keyspace, start.clone()));
                prop_assert_eq!(own.get(*keyspace, start), Some(written.unwrap_or(&None)), "removed, unless it was written later");
            }
            let (ranges, points): (Vec<_>, Vec<_>) = own.into_ops().into_iter().partition(|op| matches!(op, WriteOp::DeleteRange { .. }));
            for (keyspace, range) in &removed {
                let whole = |op: &WriteOp| match op {
                    WriteOp::DeleteRange { keyspace: at, range: all } => at == keyspace && all.contains(range.start()) && all.end_place() >= range.end_place(),
                    _ => false,
                };
                prop_assert!(ranges.iter().any(whole));
            }
            let ops: BTreeMap<_, _> = points.into_iter().map(|op| ((op.keyspace(), Bytes::copy_from_slice(op.key())), op.value().cloned())).collect();
            prop_assert_eq!(ops, model);
        }
    }

    #[test]
    fn a_key_written_twice_keeps_its_place() {
        let mut own = OwnWrites::new(1);
        for (key, value) in [("b", "1"), ("a", "2"), ("b", "3")] {
            own.write(KeyspaceId(0), key.into(), Some(value.into()));
        }
        let ops: Vec<_> = own.into_ops().iter().map(|op| (op.key().to_vec(), op.value().cloned())).collect();
        assert_eq!(ops, [(b"b".to_vec(), Some("3".into())), (b"a".to_vec(), Some("2".into()))]);
    }
}
