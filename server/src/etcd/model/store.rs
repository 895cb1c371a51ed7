//! What the model needs of a store, and the stores that it runs over.
//!
//! # Place
//! Between the model and the engine: [`Apply`] inside an entry, [`Snapshot`] for reads. Tests put a map of their own here.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_engine::{Apply, KeyspaceId, LogIndex, Result, Snapshot};

/// The keyspaces of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Space {
    /// Live key to [`super::record::KeyMeta`].
    Keys,
    /// Revision to [`super::record::RevRecord`].
    Revs,
    /// Key and the revision that superseded a state, to the [`super::record::KeyMeta`] of the state.
    History,
    /// Lease id to seconds granted.
    Leases,
    /// Lease id and key to nothing: what dies with the lease.
    LeaseKeys,
    /// Compaction.
    Meta,
}

impl Space {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] = [Self::Keys, Self::Revs, Self::History, Self::Leases, Self::LeaseKeys, Self::Meta];

    /// The name of the keyspace.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keys => "etcd.keys",
            Self::Revs => "etcd.revs",
            Self::History => "etcd.history",
            Self::Leases => "etcd.leases",
            Self::LeaseKeys => "etcd.lease_keys",
            Self::Meta => "etcd.meta",
        }
    }
}

/// One page of a scan.
pub type Page = Vec<(Bytes, Bytes)>;

/// Reads one state of a branch.
pub trait Reader: Send + Sync {
    /// The value of a key.
    fn get(&self, space: Space, key: &[u8]) -> impl Future<Output = Result<Option<Bytes>>> + Send;

    /// Up to `limit` pairs within the bounds in order of keys, the last ones first if `reverse`.
    fn page(
        &self,
        space: Space,
        lower: Bound<&[u8]>,
        upper: Bound<&[u8]>,
        reverse: bool,
        limit: usize,
    ) -> impl Future<Output = Result<Page>> + Send;
}

/// Changes the state of a branch, all or nothing with the entry.
pub trait Store: Reader {
    /// Sets a key.
    fn put(&mut self, space: Space, key: Bytes, value: Bytes) -> Result<()>;

    /// Removes a key.
    fn delete(&mut self, space: Space, key: Bytes) -> Result<()>;
}

/// The ids of the keyspaces once they are known; they never change while a group lives.
#[derive(Debug, Default)]
pub struct SpaceIds {
    known: Mutex<Option<Ids>>,
    /// What an entry used that is not readable yet: it may have made them, and may still fail.
    proposed: Mutex<Option<Ids>>,
}

type Ids = [KeyspaceId; Space::ALL.len()];

fn lock(ids: &Mutex<Option<Ids>>) -> MutexGuard<'_, Option<Ids>> {
    ids.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SpaceIds {
    /// The ids, made by the entry that asks first.
    fn of_apply(&self, apply: &mut Apply) -> Result<Ids> {
        if let Some(ids) = *lock(&self.known) {
            return Ok(ids);
        }
        let mut ids = [KeyspaceId::default(); Space::ALL.len()];
        for space in Space::ALL {
            ids[space as usize] = apply.keyspace(space.name())?;
        }
        Ok(ids)
    }

    /// The ids, if the snapshot has them.
    fn of_snapshot(&self, snapshot: &Snapshot) -> Option<Ids> {
        if let Some(ids) = *lock(&self.known) {
            return Some(ids);
        }
        let mut ids = [KeyspaceId::default(); Space::ALL.len()];
        for space in Space::ALL {
            ids[space as usize] = snapshot.keyspace(space.name())?;
        }
        // Visible in a snapshot, hence made by an entry that was applied: they stay.
        *lock(&self.known) = Some(ids);
        Some(ids)
    }

    /// Forgets the ids: the state was replaced.
    pub(super) fn forget(&self) {
        *lock(&self.known) = None;
        *lock(&self.proposed) = None;
    }

    /// An entry used these and succeeded so far.
    pub(super) fn propose(&self, store: &ApplyStore<'_>) {
        if lock(&self.known).is_none() {
            *lock(&self.proposed) = Some(store.ids);
        }
    }

    /// The entry is readable.
    pub(super) fn settle(&self) {
        if let Some(ids) = lock(&self.proposed).take() {
            *lock(&self.known) = Some(ids);
        }
    }
}

/// The view of an entry.
pub(super) struct ApplyStore<'a> {
    apply: &'a mut Apply,
    ids: Ids,
}

impl<'a> ApplyStore<'a> {
    pub(super) fn new(apply: &'a mut Apply, ids: &SpaceIds) -> Result<Self> {
        let ids = ids.of_apply(apply)?;
        Ok(Self { apply, ids })
    }
}

impl Reader for ApplyStore<'_> {
    async fn get(&self, space: Space, key: &[u8]) -> Result<Option<Bytes>> {
        self.apply.get(self.ids[space as usize], key).await
    }

    async fn page(
        &self,
        space: Space,
        lower: Bound<&[u8]>,
        upper: Bound<&[u8]>,
        reverse: bool,
        limit: usize,
    ) -> Result<Page> {
        self.apply.range(self.ids[space as usize], lower, upper, reverse, limit).await
    }
}

impl Store for ApplyStore<'_> {
    fn put(&mut self, space: Space, key: Bytes, value: Bytes) -> Result<()> {
        self.apply.put(self.ids[space as usize], key, value)
    }

    fn delete(&mut self, space: Space, key: Bytes) -> Result<()> {
        self.apply.delete(self.ids[space as usize], key)
    }
}

/// A pinned read view.
#[derive(Clone)]
pub struct SnapshotReader {
    snapshot: Snapshot,
    /// `None` before the first command: everything is empty.
    ids: Option<Ids>,
}

impl SnapshotReader {
    /// Reads `snapshot`; `ids` are those of the model of the same group.
    pub fn new(snapshot: Snapshot, ids: &SpaceIds) -> Self {
        let ids = ids.of_snapshot(&snapshot);
        Self { snapshot, ids }
    }

    /// The index whose state it shows.
    pub fn index(&self) -> LogIndex {
        self.snapshot.index()
    }
}

impl Reader for SnapshotReader {
    async fn get(&self, space: Space, key: &[u8]) -> Result<Option<Bytes>> {
        match self.ids {
            Some(ids) => self.snapshot.get(ids[space as usize], key).await,
            None => Ok(None),
        }
    }

    async fn page(
        &self,
        space: Space,
        lower: Bound<&[u8]>,
        upper: Bound<&[u8]>,
        reverse: bool,
        limit: usize,
    ) -> Result<Page> {
        let Some(ids) = self.ids else { return Ok(Page::new()) };
        let owned = |bound: Bound<&[u8]>| bound.map(Bytes::copy_from_slice);
        let mut scan = self.snapshot.range(ids[space as usize], owned(lower), owned(upper));
        let mut page = Page::new();
        while page.len() < limit {
            let pair = if reverse { scan.next_back().await? } else { scan.next().await? };
            match pair {
                Some(pair) => page.push(pair),
                None => break,
            }
        }
        Ok(page)
    }
}

/// A state in memory, for tests of everything above the store.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    maps: BTreeMap<Space, BTreeMap<Bytes, Bytes>>,
}

impl MemoryStore {
    /// The pairs of a keyspace.
    pub fn pairs(&self, space: Space) -> Vec<(Bytes, Bytes)> {
        self.maps.get(&space).map(|map| map.iter().map(|(k, v)| (k.clone(), v.clone())).collect()).unwrap_or_default()
    }
}

impl Reader for MemoryStore {
    async fn get(&self, space: Space, key: &[u8]) -> Result<Option<Bytes>> {
        Ok(self.maps.get(&space).and_then(|map| map.get(key)).cloned())
    }

    async fn page(
        &self,
        space: Space,
        lower: Bound<&[u8]>,
        upper: Bound<&[u8]>,
        reverse: bool,
        limit: usize,
    ) -> Result<Page> {
        let Some(map) = self.maps.get(&space) else { return Ok(Page::new()) };
        if is_empty_range(lower, upper) {
            return Ok(Page::new());
        }
        let range = map.range::<[u8], _>((lower, upper)).map(|(k, v)| (k.clone(), v.clone()));
        Ok(if reverse { range.rev().take(limit).collect() } else { range.take(limit).collect() })
    }
}

impl Store for MemoryStore {
    fn put(&mut self, space: Space, key: Bytes, value: Bytes) -> Result<()> {
        self.maps.entry(space).or_default().insert(key, value);
        Ok(())
    }

    fn delete(&mut self, space: Space, key: Bytes) -> Result<()> {
        self.maps.entry(space).or_default().remove(&key);
        Ok(())
    }
}

/// Whether no key lies within the bounds.
fn is_empty_range(lower: Bound<&[u8]>, upper: Bound<&[u8]>) -> bool {
    match (lower, upper) {
        (Bound::Unbounded, _) | (_, Bound::Unbounded) => false,
        (Bound::Included(lower), Bound::Included(upper)) => lower > upper,
        (Bound::Included(lower) | Bound::Excluded(lower), Bound::Included(upper) | Bound::Excluded(upper)) => {
            lower >= upper
        }
    }
}
