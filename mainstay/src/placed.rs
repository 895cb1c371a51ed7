//! A keyspace whose ranges of keys lie in different groups.
//!
//! # Place
//! `replication::Placed` in the manner of the other handles of this crate: blocking and async, with levels of its own.

use std::ops::{Bound, RangeBounds};

use bytes::Bytes;
use mainstay_engine::KeyRange;
use mainstay_io::BoxFuture;
use mainstay_replication::{self as replication, PlacedOp, RangeInfo};

use crate::log::Log;
use crate::snapshot::{owned_bounds, prefix_bounds};
use crate::{Durability, Entry, ReadLevel, Result, Value};

/// An ordered map of bytes to bytes whose ranges of keys lie in different groups of a cluster ([`crate::Node::create_group`]), so that
/// more than one leader orders its writes. docs/replication.md, "Ranges", has what it promises.
///
/// Cloning shares it; a handle carries the durability of its writes and the level of its reads. It is one range of the first group until
/// [`Placed::split`] and [`Placed::move_range`] are called, which work while it is read and written.
#[derive(Clone)]
pub struct Placed {
    log: Log,
    inner: replication::Placed,
    durability: Durability,
    read_level: ReadLevel,
}

/// Mutations of a placed keyspace, applied all or none: their keys are in one group. The later of two mutations of one key wins; a range that
/// is removed takes what stands before it.
#[derive(Clone, Debug, Default)]
pub struct PlacedBatch {
    ops: Vec<PlacedOp>,
}

impl PlacedBatch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key. The key has 1 byte to 64 KiB, the value at most 16 MiB.
    pub fn insert(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> &mut Self {
        let (key, value) = (Bytes::copy_from_slice(key.as_ref()), Bytes::copy_from_slice(value.as_ref()));
        self.push(PlacedOp::Put { key, value })
    }

    /// Removes a key; nothing if it is absent.
    pub fn remove(&mut self, key: impl AsRef<[u8]>) -> &mut Self {
        self.push(PlacedOp::Delete { key: Bytes::copy_from_slice(key.as_ref()) })
    }

    /// Removes all keys within the bounds, however many there are: one mutation, as [`crate::Batch::remove_range`]. All of them are in one
    /// group.
    pub fn remove_range<K: AsRef<[u8]>>(&mut self, bounds: impl RangeBounds<K>) -> &mut Self {
        let (lower, upper) = owned_bounds(&bounds);
        self.push(PlacedOp::DeleteRange { range: KeyRange::new(lower, upper) })
    }

    fn push(&mut self, op: PlacedOp) -> &mut Self {
        self.ops.push(op);
        self
    }

    /// Count of mutations.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// True without mutations.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

impl Placed {
    pub(crate) fn new(log: Log, inner: replication::Placed) -> Self {
        Self { log, inner, durability: Durability::default(), read_level: ReadLevel::default() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.inner.name()
    }

    /// This keyspace with another durability for the writes of the handle. [`Durability::Local`] is refused by them.
    pub fn with_durability(&self, durability: Durability) -> Self {
        Self { durability, ..self.clone() }
    }

    /// This keyspace with another level for the reads of the handle. [`ReadLevel::AtLeast`] is refused by them.
    pub fn with_read_level(&self, read_level: ReadLevel) -> Self {
        Self { read_level, ..self.clone() }
    }

    fn bind<T, F>(&self, call: impl FnOnce(Self) -> F) -> BoxFuture<Result<T>>
    where
        T: Send + 'static,
        F: Future<Output = replication::Result<T>> + Send + 'static,
    {
        let future = call(self.clone());
        self.log.bind(async move { Ok(future.await?) })
    }

    /// The value of a key.
    ///
    /// # Errors
    /// `Unavailable` (no leader, or its range changes hands for too long), `Unsupported` (a level of an index), `Corrupt`, `Io`, `Closed`.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Value>> {
        self.log.wait(self.get_async(key))
    }

    /// As [`Placed::get`], without blocking the thread. Cancel safe.
    pub fn get_async(&self, key: impl AsRef<[u8]>) -> BoxFuture<Result<Option<Value>>> {
        let key = Bytes::copy_from_slice(key.as_ref());
        self.bind(|this| async move { this.inner.get(&key, this.read_level.clone()).await })
    }

    /// Sets a key.
    ///
    /// # Errors
    /// As [`Placed::commit`].
    pub fn insert(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<()> {
        let mut batch = PlacedBatch::new();
        batch.insert(key, value);
        self.commit(batch)
    }

    /// Removes a key; nothing if it is absent.
    ///
    /// # Errors
    /// As [`Placed::commit`].
    pub fn remove(&self, key: impl AsRef<[u8]>) -> Result<()> {
        let mut batch = PlacedBatch::new();
        batch.remove(key);
        self.commit(batch)
    }

    /// Removes all keys within the bounds, however many there are, if one group holds them all.
    ///
    /// # Errors
    /// As [`Placed::commit`].
    pub fn remove_range<K: AsRef<[u8]>>(&self, bounds: impl RangeBounds<K>) -> Result<()> {
        let mut batch = PlacedBatch::new();
        batch.remove_range(bounds);
        self.commit(batch)
    }

    /// Applies a batch in one group, all or none. It waits while its range is being moved.
    ///
    /// # Errors
    /// Not applied: `Invalid` (no mutation, keys or a range of two groups, which the message names, an empty key, a key or value over its limit),
    /// `Unsupported` (at [`Durability::Local`]), `NotLeader`, `Unavailable`, `OutOfSpace`, `Closed`. `Indeterminate`: read before trying
    /// again.
    pub fn commit(&self, batch: PlacedBatch) -> Result<()> {
        self.log.wait(self.commit_async(batch))
    }

    /// As [`Placed::commit`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn commit_async(&self, batch: PlacedBatch) -> BoxFuture<Result<()>> {
        self.bind(|this| async move { this.inner.write(batch.ops, this.durability.clone()).await.map(drop) })
    }

    /// The pairs within `bounds` in order of keys; `.rev()` for the other way. Each range is read from a snapshot of its own, taken when
    /// the scan comes to it.
    pub fn range<K: AsRef<[u8]>>(&self, bounds: impl RangeBounds<K>) -> PlacedScan {
        let (lower, upper) = owned_bounds(&bounds);
        self.scan(lower, upper)
    }

    /// The pairs whose key begins with `prefix`, as [`Placed::range`].
    pub fn prefix(&self, prefix: impl AsRef<[u8]>) -> PlacedScan {
        let (lower, upper) = prefix_bounds(prefix.as_ref());
        self.scan(lower, upper)
    }

    /// All pairs, as [`Placed::range`].
    pub fn iter(&self) -> PlacedScan {
        self.scan(Bound::Unbounded, Bound::Unbounded)
    }

    fn scan(&self, lower: Bound<Bytes>, upper: Bound<Bytes>) -> PlacedScan {
        let inner = self.inner.range(lower, upper, self.read_level.clone());
        PlacedScan { log: self.log.clone(), inner, failed: false }
    }

    /// The ranges and who holds them, as this replica has applied it. Cancel safe.
    pub fn ranges(&self) -> BoxFuture<Result<Vec<RangeInfo>>> {
        self.bind(|this| async move { this.inner.ranges().await })
    }

    /// Makes the keys from `key` on a range of their own, in the group that they are in. Costs no copy. Nothing if one begins there.
    ///
    /// # Errors
    /// `Invalid` (a key of more than 4096 bytes), `Unavailable` (not done: the range is being moved), `Indeterminate`, `Closed`.
    pub fn split(&self, key: impl AsRef<[u8]>) -> BoxFuture<Result<()>> {
        let key = Bytes::copy_from_slice(key.as_ref());
        self.bind(|this| async move { this.inner.split(&key).await })
    }

    /// Makes the range that begins at `key` one with the range before it. Nothing if none begins there.
    ///
    /// # Errors
    /// `Invalid` (the two are in different groups), `Unavailable` (not done: one is being moved), `Indeterminate`, `Closed`.
    pub fn join(&self, key: impl AsRef<[u8]>) -> BoxFuture<Result<()>> {
        let key = Bytes::copy_from_slice(key.as_ref());
        self.bind(|this| async move { this.inner.join(&key).await })
    }

    /// Moves the range that a key is in to another group; none is the first. Reads and writes go on: those of one piece of about 4 MiB
    /// at a time wait until it is copied. Nothing if the group holds it.
    ///
    /// # Errors
    /// `NotFound` (no such group). `Unavailable`, `Indeterminate`: part of the range may have moved; the same call again goes on.
    pub fn move_range(&self, key: impl AsRef<[u8]>, to: Option<&str>) -> BoxFuture<Result<()>> {
        let (key, to) = (Bytes::copy_from_slice(key.as_ref()), to.map(str::to_owned));
        self.bind(|this| async move { this.inner.move_range(&key, to.as_deref()).await })
    }
}

/// An ordered scan of a placed keyspace. Both ends can be taken from at any time; they meet in the middle and no pair is given twice. As
/// an iterator it ends after an error.
pub struct PlacedScan {
    log: Log,
    inner: replication::PlacedScan,
    failed: bool,
}

impl PlacedScan {
    /// The next pair from the low end; after an error the same call goes on. Cancel safe.
    ///
    /// # Errors
    /// As [`Placed::get`].
    pub async fn next_async(&mut self) -> Result<Option<Entry>> {
        let found = self.log.enter(self.inner.next()).await?;
        Ok(found.map(|(key, value)| Entry { key, value }))
    }

    /// The next pair from the high end; after an error the same call goes on. Cancel safe.
    ///
    /// # Errors
    /// As [`Placed::get`].
    pub async fn next_back_async(&mut self) -> Result<Option<Entry>> {
        let found = self.log.enter(self.inner.next_back()).await?;
        Ok(found.map(|(key, value)| Entry { key, value }))
    }

    fn item(&mut self, found: Result<Option<Entry>>) -> Option<Result<Entry>> {
        self.failed = found.is_err();
        found.transpose()
    }
}

impl Iterator for PlacedScan {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let found = mainstay_io::block_on(self.next_async());
        self.item(found)
    }
}

impl DoubleEndedIterator for PlacedScan {
    fn next_back(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let found = mainstay_io::block_on(self.next_back_async());
        self.item(found)
    }
}
