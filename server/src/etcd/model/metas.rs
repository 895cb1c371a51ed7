//! The state of the keys that were put last, so that the next put of one need not look it up.
//!
//! # Invariants
//! C1. What is found here is what the store would answer to the entry that asks: the one applier takes the cache for an entry
//!     and gives it back only when the entry has succeeded; whatever else may change the state drops it.

use std::hash::{BuildHasherDefault, Hasher};

use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};
use xxhash_rust::xxh3::xxh3_64;

use super::record::KeyMeta;

/// Bytes of keys and states that a branch keeps.
const METAS_BYTES_MAX: u64 = 32 << 20;
/// What a key costs beside its bytes.
const OVERHEAD_BYTES: u64 = 104;
/// Longer keys are looked up.
const KEY_BYTES_MAX: usize = 512;

#[derive(Clone, Copy)]
struct Weight;

impl Weighter<Box<[u8]>, KeyMeta> for Weight {
    fn weight(&self, key: &Box<[u8]>, _: &KeyMeta) -> u64 {
        key.len() as u64 + OVERHEAD_BYTES
    }
}

/// The same in every run, and good enough for keys: the cache is bounded, so who finds collisions gains nothing but misses.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = self.0.rotate_left(17) ^ xxh3_64(bytes);
    }

    fn write_usize(&mut self, length: usize) {
        self.0 ^= length as u64;
    }
}

type Keys = Cache<Box<[u8]>, KeyMeta, Weight, BuildHasherDefault<KeyHasher>>;

/// See the module. Empty it holds no memory.
#[derive(Default)]
pub(super) struct Metas(Option<Keys>);

impl Metas {
    /// The state of a live key, if it is here.
    pub(super) fn get(&self, key: &[u8]) -> Option<KeyMeta> {
        self.0.as_ref()?.get(key).copied()
    }

    /// The key has this state now.
    pub(super) fn set(&mut self, key: &[u8], meta: KeyMeta) {
        if key.len() > KEY_BYTES_MAX {
            return;
        }
        self.0.get_or_insert_with(keys).insert(key.into(), meta);
    }

    /// The key is gone.
    pub(super) fn remove(&mut self, key: &[u8]) {
        if let Some(keys) = &mut self.0 {
            keys.remove(key);
        }
    }
}

fn keys() -> Keys {
    let options = OptionsBuilder::new()
        .weight_capacity(METAS_BYTES_MAX)
        .estimated_items_capacity((METAS_BYTES_MAX / (OVERHEAD_BYTES + 24)) as usize)
        .build()
        .expect("capacity and items are given");
    Keys::with_options(options, Weight, BuildHasherDefault::default(), DefaultLifecycle::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::model::record::Rev;

    fn meta(main: i64) -> KeyMeta {
        KeyMeta { create: 1, modified: Rev::first(main), version: 1, lease: 0 }
    }

    #[test]
    fn the_last_state_is_found_and_a_removed_key_is_not() {
        let mut metas = Metas::default();
        assert_eq!(metas.get(b"a"), None);
        metas.set(b"a", meta(2));
        metas.set(b"a", meta(3));
        metas.set(b"b", meta(4));
        assert_eq!(metas.get(b"a"), Some(meta(3)));
        metas.remove(b"a");
        assert_eq!((metas.get(b"a"), metas.get(b"b")), (None, Some(meta(4))));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut metas = Metas::default();
        let long = vec![b'k'; KEY_BYTES_MAX + 1];
        metas.set(&long, meta(2));
        assert_eq!(metas.get(&long), None);
        for n in 0..600_000_u64 {
            metas.set(&n.to_be_bytes(), meta(5));
        }
        let weight = metas.0.as_ref().map_or(0, Cache::weight);
        assert!(weight <= METAS_BYTES_MAX, "weight={weight}");
    }
}
