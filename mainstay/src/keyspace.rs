//! An ordered map of a store.

use std::ops::{Bound, RangeBounds};
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::BoxFuture;

use crate::snapshot::{owned_bounds, prefix_bounds};
use crate::{Batch, Commit, Error, ErrorKind, KeyspaceId, KeyspaceOptions, Result, Scan, Store, Value};

/// An ordered map of bytes to bytes inside a store: an LSM tree of its own, atomic with the others through the log.
///
/// Cloning shares it. Reads are at the read level of the [`Store`] that made it, writes at its durability. A keyspace of a
/// clone of the store writes the clone.
#[derive(Clone)]
pub struct Keyspace {
    store: Store,
    id: KeyspaceId,
    name: std::sync::Arc<str>,
}

impl Keyspace {
    pub(crate) fn new(store: Store, id: KeyspaceId, name: &str) -> Self {
        Self { store, id, name: name.into() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its id, the same on every replica and in every clone.
    pub fn id(&self) -> KeyspaceId {
        self.id
    }

    /// Its options, as this replica has applied them.
    ///
    /// # Errors
    /// `Invalid`: it was dropped.
    pub fn options(&self) -> Result<KeyspaceOptions> {
        let options = self.store.log.group().keyspace_options(self.id);
        options.ok_or_else(|| Error::new(ErrorKind::Invalid, format!("the keyspace was dropped name={}", self.name)))
    }

    /// The store it belongs to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The value of a key.
    ///
    /// # Errors
    /// `Unavailable` (a replicated store without a leader), `Corrupt`, `Io`, `Closed`.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Value>> {
        self.store.log.wait(async { Ok(self.store.view().await?.get(self.id, key.as_ref()).await?) })
    }

    /// As [`Keyspace::get`], without blocking the thread. Cancel safe.
    pub fn get_async(&self, key: impl AsRef<[u8]>) -> BoxFuture<Result<Option<Value>>> {
        let (this, key) = (self.clone(), Bytes::copy_from_slice(key.as_ref()));
        self.store.log.bind(async move { Ok(this.store.view().await?.get(this.id, &key).await?) })
    }

    /// The values of many keys, of one snapshot, in the order of the keys. All are looked up in memory first; the blocks that are not
    /// cached are then read from the device together, 64 keys at a time.
    ///
    /// # Errors
    /// As [`Keyspace::get`].
    pub fn multi_get<K: AsRef<[u8]>>(&self, keys: &[K]) -> Result<Vec<Option<Value>>> {
        self.store.log.wait(async {
            let view = self.store.view().await?;
            Ok(view.get_many(self.id, keys).await?)
        })
    }

    /// As [`Keyspace::multi_get`], without blocking the thread. Cancel safe.
    pub fn multi_get_async<K: AsRef<[u8]>>(&self, keys: &[K]) -> BoxFuture<Result<Vec<Option<Value>>>> {
        let keys: Vec<Bytes> = keys.iter().map(|key| Bytes::copy_from_slice(key.as_ref())).collect();
        let this = self.clone();
        self.store.log.bind(async move {
            let view = this.store.view().await?;
            Ok(view.get_many(this.id, &keys).await?)
        })
    }

    /// True when the key is there.
    ///
    /// # Errors
    /// As [`Keyspace::get`].
    pub fn contains_key(&self, key: impl AsRef<[u8]>) -> Result<bool> {
        Ok(self.get(key)?.is_some())
    }

    /// Sets a key: a batch of one.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub fn insert(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<Commit> {
        let mut batch = Batch::new();
        batch.insert(self, key, value);
        self.store.commit(batch)
    }

    /// As [`Keyspace::insert`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn insert_async(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> BoxFuture<Result<Commit>> {
        let mut batch = Batch::new();
        batch.insert(self, key, value);
        self.store.commit_async(batch)
    }

    /// Sets a key for a time: a batch of one. See [`Batch::insert_for`].
    ///
    /// # Errors
    /// `Invalid` (the keyspace is not expiring), and as [`Store::commit`].
    pub fn insert_for(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>, ttl: Duration) -> Result<Commit> {
        let mut batch = Batch::new();
        batch.insert_for(self, key, value, ttl);
        self.store.commit(batch)
    }

    /// As [`Keyspace::insert_for`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn insert_for_async(
        &self,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        ttl: Duration,
    ) -> BoxFuture<Result<Commit>> {
        let mut batch = Batch::new();
        batch.insert_for(self, key, value, ttl);
        self.store.commit_async(batch)
    }

    /// Merges an operand into a key: a batch of one. See [`Batch::merge`].
    ///
    /// # Errors
    /// `Invalid` (the keyspace has no merge operator, or that refuses the operand), and as [`Store::commit`].
    pub fn merge(&self, key: impl AsRef<[u8]>, operand: impl AsRef<[u8]>) -> Result<Commit> {
        let mut batch = Batch::new();
        batch.merge(self, key, operand);
        self.store.commit(batch)
    }

    /// As [`Keyspace::merge`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn merge_async(&self, key: impl AsRef<[u8]>, operand: impl AsRef<[u8]>) -> BoxFuture<Result<Commit>> {
        let mut batch = Batch::new();
        batch.merge(self, key, operand);
        self.store.commit_async(batch)
    }

    /// Removes a key, nothing if it is absent: a batch of one.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub fn remove(&self, key: impl AsRef<[u8]>) -> Result<Commit> {
        let mut batch = Batch::new();
        batch.remove(self, key);
        self.store.commit(batch)
    }

    /// As [`Keyspace::remove`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn remove_async(&self, key: impl AsRef<[u8]>) -> BoxFuture<Result<Commit>> {
        let mut batch = Batch::new();
        batch.remove(self, key);
        self.store.commit_async(batch)
    }

    /// Removes all keys within the bounds, however many there are: a batch of one mutation. See [`Batch::remove_range`].
    ///
    /// # Errors
    /// `Invalid` for bounds that hold no key, and as [`Store::commit`].
    pub fn remove_range<K: AsRef<[u8]>>(&self, bounds: impl RangeBounds<K>) -> Result<Commit> {
        let mut batch = Batch::new();
        batch.remove_range(self, bounds);
        self.store.commit(batch)
    }

    /// As [`Keyspace::remove_range`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn remove_range_async<K: AsRef<[u8]>>(&self, bounds: impl RangeBounds<K>) -> BoxFuture<Result<Commit>> {
        let mut batch = Batch::new();
        batch.remove_range(self, bounds);
        self.store.commit_async(batch)
    }

    /// Removes all keys that begin with `prefix`, all there are for an empty one: a batch of one mutation. See
    /// [`Batch::remove_prefix`].
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub fn remove_prefix(&self, prefix: impl AsRef<[u8]>) -> Result<Commit> {
        let mut batch = Batch::new();
        batch.remove_prefix(self, prefix);
        self.store.commit(batch)
    }

    /// As [`Keyspace::remove_prefix`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn remove_prefix_async(&self, prefix: impl AsRef<[u8]>) -> BoxFuture<Result<Commit>> {
        let mut batch = Batch::new();
        batch.remove_prefix(self, prefix);
        self.store.commit_async(batch)
    }

    /// The pairs within `bounds` in order of keys; `.rev()` for the other way. One snapshot, taken when the first pair is
    /// asked for; a failure to take it is the first item.
    pub fn range<K: AsRef<[u8]>>(&self, bounds: impl RangeBounds<K>) -> Scan {
        let (lower, upper) = owned_bounds(&bounds);
        self.scan(lower, upper)
    }

    /// The pairs whose key begins with `prefix`, as [`Keyspace::range`].
    pub fn prefix(&self, prefix: impl AsRef<[u8]>) -> Scan {
        let (lower, upper) = prefix_bounds(prefix.as_ref());
        self.scan(lower, upper)
    }

    /// All pairs, as [`Keyspace::range`].
    pub fn iter(&self) -> Scan {
        self.scan(Bound::Unbounded, Bound::Unbounded)
    }

    /// The pair with the smallest key.
    ///
    /// # Errors
    /// As [`Keyspace::get`].
    pub fn first(&self) -> Result<Option<crate::Entry>> {
        self.iter().next().transpose()
    }

    /// The pair with the largest key.
    ///
    /// # Errors
    /// As [`Keyspace::get`].
    pub fn last(&self) -> Result<Option<crate::Entry>> {
        self.iter().next_back().transpose()
    }

    fn scan(&self, lower: Bound<Bytes>, upper: Bound<Bytes>) -> Scan {
        let (store, id) = (self.store.clone(), self.id);
        Scan::opening(&self.store.log, async move { Ok(store.view().await?.range(id, lower, upper)) })
    }
}
