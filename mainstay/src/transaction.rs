//! Optimistic transactions: reads of one snapshot, own writes on top, and one batch at the end whose conditions say that nothing it
//! depends on has changed.
//!
//! # Place
//! above [`crate::Store`] and [`crate::Batch`]; the conditions are decided by the engine, when the batch is applied, on every replica
//! # Invariants
//! 1. A transaction that commits has read what the state was at its place in the log, as far as its isolation validates: so the order
//!    of commits is a serial order of all that were [`Isolation::Serializable`].
//! 2. Nothing is written before the commit, and a transaction that is dropped leaves no trace.
//! # Sources
//! H. T. Kung and J. T. Robinson, On Optimistic Methods for Concurrency Control, 1981: read, validate, write; here the order of the
//! log is the critical section.

mod reads;
mod scan;

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{ClientToken, KeyRange, RangeSet};
use mainstay_io::BoxFuture;

use self::reads::Reads;
pub use self::reads::TRANSACTION_BYTES_MAX;
pub use self::scan::TransactionScan;
use crate::batch::{millis, unchanged};
use crate::snapshot::{owned_bounds, prefix_bounds};
use crate::{Batch, Commit, ErrorKind, Keyspace, KeyspaceId, LogIndex, Result, Store, Value};

/// How often [`Store::transact`] begins anew, the first time included.
pub const TRANSACT_ATTEMPTS_MAX: usize = 16;

/// What a commit validates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isolation {
    /// The keys that were written, and those that were read for an update: nobody else has written them since the transaction began.
    /// Two transactions that read what the other writes may both commit (write skew).
    Snapshot,
    /// All that was read as well, ranges included: no key of them was written, removed or added. Those that commit are equal to
    /// the same transactions one after the other, in the order of their commits. Every replica reads again what was read, when it
    /// applies the commit: a long range holds up what comes behind it.
    Serializable,
}

/// Reads and writes that take effect together or not at all: [`Store::transaction`].
///
/// Reads see one snapshot and what the transaction itself has written. Nothing is locked and nobody waits: whether others came in
/// between is found out by [`Transaction::commit`], which then answers [`ErrorKind::Conflict`] and has changed nothing. Dropped
/// without a commit it leaves no trace.
///
/// Two states of a key are told apart by the entry that wrote the value. A key that was absent and is absent again counts as
/// unchanged, and what a transaction writes unconditionally conflicts with writes since its beginning all the same.
///
/// A range that it removes ([`Transaction::remove_range`]) is no read: it is gone at the commit, whatever others have put into it meanwhile.
/// Whoever is to know reads the range first.
///
/// It pins what its snapshot reads, in memory and in tables, as [`crate::Snapshot`] does: keep it short.
pub struct Transaction {
    store: Store,
    isolation: Isolation,
    snapshot: mainstay_engine::Snapshot,
    /// None removes.
    writes: BTreeMap<(KeyspaceId, Bytes), Option<Bytes>>,
    /// Of those that were written for a time, how many milliseconds.
    lives: BTreeMap<(KeyspaceId, Bytes), u64>,
    /// What `writes` has of their keys was written after them.
    removed: BTreeMap<KeyspaceId, RangeSet>,
    reads: Arc<Mutex<Reads>>,
}

fn lock(reads: &Mutex<Reads>) -> MutexGuard<'_, Reads> {
    // Every change is an insert or an addition.
    reads.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A read that was not answered by an own write.
struct Read {
    snapshot: mainstay_engine::Snapshot,
    /// Where it is recorded, if it is validated.
    reads: Option<Arc<Mutex<Reads>>>,
}

impl Read {
    async fn get(&self, keyspace: KeyspaceId, key: Bytes) -> Result<Option<Value>> {
        let found = self.snapshot.get_version(keyspace, &key).await?;
        self.recorded(keyspace, key, found)
    }

    async fn get_many(&self, keyspace: KeyspaceId, keys: Vec<Bytes>) -> Result<Vec<Option<Value>>> {
        let found = self.snapshot.get_many_versions(keyspace, &keys).await?;
        keys.into_iter().zip(found).map(|(key, found)| self.recorded(keyspace, key, found)).collect()
    }

    fn recorded(&self, keyspace: KeyspaceId, key: Bytes, found: Option<(LogIndex, Value)>) -> Result<Option<Value>> {
        let (version, value) = found.unzip();
        if let Some(reads) = &self.reads {
            lock(reads).add_key(keyspace, key, version)?;
        }
        Ok(value)
    }
}

impl Transaction {
    pub(crate) fn new(store: Store, isolation: Isolation, snapshot: mainstay_engine::Snapshot) -> Self {
        let (writes, lives, removed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { store, isolation, snapshot, writes, lives, removed, reads: Arc::default() }
    }

    /// The index whose state it reads.
    pub fn index(&self) -> LogIndex {
        self.snapshot.index()
    }

    /// What its commit validates.
    pub fn isolation(&self) -> Isolation {
        self.isolation
    }

    /// The value of a key: the transaction's own, or that of its snapshot.
    ///
    /// # Errors
    /// `NotFound` (the keyspace was dropped), `Invalid` (the transaction records more than [`TRANSACTION_BYTES_MAX`]), `Corrupt`,
    /// `Io`, `Closed`.
    pub fn get(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> Result<Option<Value>> {
        mainstay_io::block_on(self.get_async(keyspace, key))
    }

    /// As [`Transaction::get`], without blocking the thread. Cancel safe.
    pub fn get_async(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> BoxFuture<Result<Option<Value>>> {
        self.read(keyspace, key.as_ref(), self.isolation == Isolation::Serializable)
    }

    /// As [`Transaction::get`], and validated at every isolation: the key is as if it were written as it is.
    ///
    /// # Errors
    /// As [`Transaction::get`].
    pub fn get_for_update(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> Result<Option<Value>> {
        mainstay_io::block_on(self.get_for_update_async(keyspace, key))
    }

    /// As [`Transaction::get_for_update`], without blocking the thread. Cancel safe.
    pub fn get_for_update_async(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> BoxFuture<Result<Option<Value>>> {
        self.read(keyspace, key.as_ref(), true)
    }

    fn read(&self, keyspace: &Keyspace, key: &[u8], validated: bool) -> BoxFuture<Result<Option<Value>>> {
        let place = (keyspace.id(), Bytes::copy_from_slice(key));
        if let Some(own) = self.own(&place) {
            return Box::pin(std::future::ready(Ok(own)));
        }
        let read = Read { snapshot: self.snapshot.clone(), reads: validated.then(|| self.reads.clone()) };
        Box::pin(async move { read.get(place.0, place.1).await })
    }

    /// What the transaction itself has made of a key, if anything.
    fn own(&self, place: &(KeyspaceId, Bytes)) -> Option<Option<Value>> {
        if let Some(own) = self.writes.get(place) {
            // Others that write it are met at commit: it is written.
            return Some(own.clone());
        }
        // Whatever is there when it commits, it is gone then.
        let removed = self.removed.get(&place.0)?.at(&place.1);
        removed.map(|_| None)
    }

    /// The values of many keys, in their order, as [`Keyspace::multi_get`].
    ///
    /// # Errors
    /// As [`Transaction::get`].
    pub fn multi_get<K: AsRef<[u8]>>(&self, keyspace: &Keyspace, keys: &[K]) -> Result<Vec<Option<Value>>> {
        mainstay_io::block_on(self.multi_get_async(keyspace, keys))
    }

    /// As [`Transaction::multi_get`], without blocking the thread. Cancel safe.
    pub fn multi_get_async<K: AsRef<[u8]>>(
        &self,
        keyspace: &Keyspace,
        keys: &[K],
    ) -> BoxFuture<Result<Vec<Option<Value>>>> {
        let id = keyspace.id();
        let places = keys.iter().map(|key| (id, Bytes::copy_from_slice(key.as_ref())));
        let mut wanted = Vec::new();
        let own: Vec<_> = places
            .map(|place| {
                let own = self.own(&place);
                if own.is_none() {
                    wanted.push(place.1);
                }
                own
            })
            .collect();
        let validated = self.isolation == Isolation::Serializable;
        let read = Read { snapshot: self.snapshot.clone(), reads: validated.then(|| self.reads.clone()) };
        Box::pin(async move {
            // Keys that are its own are answered also where their keyspace is gone.
            let found = if wanted.is_empty() { Vec::new() } else { read.get_many(id, wanted).await? };
            let mut found = found.into_iter();
            Ok(own.into_iter().map(|own| own.unwrap_or_else(|| found.next().flatten())).collect())
        })
    }

    /// True when the key is there.
    ///
    /// # Errors
    /// As [`Transaction::get`].
    pub fn contains_key(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> Result<bool> {
        Ok(self.get(keyspace, key)?.is_some())
    }

    /// The pairs within `bounds` in order of keys; `.rev()` for the other way.
    pub fn range<K: AsRef<[u8]>>(&self, keyspace: &Keyspace, bounds: impl RangeBounds<K>) -> TransactionScan {
        let (lower, upper) = owned_bounds(&bounds);
        self.scan(keyspace, lower, upper)
    }

    /// The pairs whose key begins with `prefix`, in order of keys.
    pub fn prefix(&self, keyspace: &Keyspace, prefix: impl AsRef<[u8]>) -> TransactionScan {
        let (lower, upper) = prefix_bounds(prefix.as_ref());
        self.scan(keyspace, lower, upper)
    }

    /// All pairs in order of keys.
    pub fn iter(&self, keyspace: &Keyspace) -> TransactionScan {
        self.scan(keyspace, Bound::Unbounded, Bound::Unbounded)
    }

    fn scan(&self, keyspace: &Keyspace, lower: Bound<Bytes>, upper: Bound<Bytes>) -> TransactionScan {
        let id = keyspace.id();
        let from = match &lower {
            Bound::Included(key) => Bound::Included((id, key.clone())),
            Bound::Excluded(key) => Bound::Excluded((id, key.clone())),
            Bound::Unbounded => Bound::Included((id, Bytes::new())),
        };
        // Without an end, so that bounds that hold no key are no matter.
        let own = self.writes.range((from, Bound::Unbounded));
        let ended = |key: &Bytes| match &upper {
            Bound::Included(end) => key > end,
            Bound::Excluded(end) => key >= end,
            Bound::Unbounded => false,
        };
        let own = own.take_while(|((keyspace, key), _)| *keyspace == id && !ended(key));
        let own = own.map(|((_, key), value)| (key.clone(), value.clone())).collect();
        let scan = self.snapshot.range(id, lower.clone(), upper.clone());
        let reads = (self.isolation == Isolation::Serializable).then_some(&self.reads);
        let removed = self.removed.get(&id).cloned().unwrap_or_default();
        TransactionScan::new(scan, own, removed, reads, (id, lower, upper))
    }

    /// Sets a key.
    ///
    /// # Errors
    /// `Invalid` when the transaction records more than [`TRANSACTION_BYTES_MAX`]: it does not commit any more. Keys and values
    /// outside of their bounds are refused by the commit.
    pub fn insert(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<()> {
        self.write(keyspace, Bytes::copy_from_slice(key.as_ref()), Some(Bytes::copy_from_slice(value.as_ref())))
    }

    /// As [`Transaction::insert`], sharing the memory of key and value.
    ///
    /// # Errors
    /// As [`Transaction::insert`].
    pub fn insert_bytes(&mut self, keyspace: &Keyspace, key: Bytes, value: Bytes) -> Result<()> {
        self.write(keyspace, key, Some(value))
    }

    /// Sets a key of an expiring keyspace for a time, which begins with the commit; see [`Batch::insert_for`].
    ///
    /// # Errors
    /// As [`Transaction::insert`].
    pub fn insert_for(
        &mut self,
        keyspace: &Keyspace,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        ttl: Duration,
    ) -> Result<()> {
        let key = Bytes::copy_from_slice(key.as_ref());
        self.write(keyspace, key.clone(), Some(Bytes::copy_from_slice(value.as_ref())))?;
        self.lives.insert((keyspace.id(), key), millis(ttl));
        Ok(())
    }

    /// Merges an operand into a key by the merge operator of its keyspace. In a transaction that is a read of the key and a write of
    /// what comes of it: whoever else writes the key conflicts. [`Batch::merge`] merges without that.
    ///
    /// # Errors
    /// `Invalid` when the keyspace has no merge operator, or that refuses; as [`Transaction::get`] and [`Transaction::insert`].
    pub fn merge(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>, operand: impl AsRef<[u8]>) -> Result<()> {
        mainstay_io::block_on(self.merge_async(keyspace, key, operand))
    }

    /// As [`Transaction::merge`], without blocking the thread. Cancel safe: a dropped future has written nothing.
    pub fn merge_async(
        &mut self,
        keyspace: &Keyspace,
        key: impl AsRef<[u8]>,
        operand: impl AsRef<[u8]>,
    ) -> TransactFuture<'_, ()> {
        let (key, operand) = (Bytes::copy_from_slice(key.as_ref()), Bytes::copy_from_slice(operand.as_ref()));
        let (keyspace, read) = (keyspace.clone(), self.get_async(keyspace, &key));
        Box::pin(async move {
            let value = read.await?;
            let merged = self.snapshot.merge(keyspace.id(), &key, value.as_deref(), &operand)?;
            self.write(&keyspace, key, merged)
        })
    }

    /// Removes a key; nothing if it is absent.
    ///
    /// # Errors
    /// As [`Transaction::insert`].
    pub fn remove(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> Result<()> {
        self.write(keyspace, Bytes::copy_from_slice(key.as_ref()), None)
    }

    /// Removes all keys within the bounds, however many there are; see [`Batch::remove_range`]. What the transaction writes to them later stays.
    /// They are gone at the commit whoever has written them, and nobody conflicts with that: it is no read of the range.
    ///
    /// # Errors
    /// As [`Transaction::insert`], and `Invalid` for bounds that hold no key.
    pub fn remove_range<K: AsRef<[u8]>>(&mut self, keyspace: &Keyspace, bounds: impl RangeBounds<K>) -> Result<()> {
        let (lower, upper) = owned_bounds(&bounds);
        self.write_range(keyspace, KeyRange::new(lower, upper))
    }

    /// Removes all keys that begin with `prefix`, as [`Transaction::remove_range`]; an empty one is that of all keys.
    ///
    /// # Errors
    /// As [`Transaction::insert`].
    pub fn remove_prefix(&mut self, keyspace: &Keyspace, prefix: impl AsRef<[u8]>) -> Result<()> {
        let (lower, upper) = prefix_bounds(prefix.as_ref());
        self.write_range(keyspace, KeyRange::new(lower, upper))
    }

    fn write_range(&mut self, keyspace: &Keyspace, range: KeyRange) -> Result<()> {
        range.check()?;
        lock(&self.reads).charge(range.bytes())?;
        let id = keyspace.id();
        let from = self.writes.range((id, range.start().clone())..);
        let within = from.take_while(|((at, key), _)| *at == id && range.contains(key));
        let gone: Vec<_> = within.map(|(place, _)| place.clone()).collect();
        gone.iter().for_each(|place| drop(self.writes.remove(place)));
        self.removed.entry(id).or_default().add(&range);
        Ok(())
    }

    fn write(&mut self, keyspace: &Keyspace, key: Bytes, value: Option<Bytes>) -> Result<()> {
        // The key counts twice: it is compared too. A value that is replaced counts on, which bounds the work as well.
        let bytes = key.len().saturating_mul(2).saturating_add(value.as_ref().map_or(0, Bytes::len));
        lock(&self.reads).charge(bytes)?;
        let place = (keyspace.id(), key);
        self.lives.remove(&place);
        self.writes.insert(place, value);
        Ok(())
    }

    /// Validates what the isolation says, and applies what was written, all or none, at the durability of the store that the
    /// transaction was made from. One that has written nothing has nothing to validate: what it has read is the state at its
    /// [`Transaction::index`], which is answered.
    ///
    /// # Errors
    /// `Conflict`: others have written what this transaction depends on. Nothing was applied: begin another one; see
    /// [`Store::transact`]. `Invalid` when it recorded more than [`TRANSACTION_BYTES_MAX`], or more than the log holds in one record.
    /// `Unsupported` at [`crate::Durability::Local`] where there are other replicas: it would be answered before it is known
    /// whether it is valid. Else as [`Store::commit`].
    pub fn commit(self) -> Result<Commit> {
        let log = self.store.log.clone();
        log.wait(self.commit_inner(None))
    }

    /// As [`Transaction::commit`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn commit_async(self) -> BoxFuture<Result<Commit>> {
        let log = self.store.log.clone();
        log.bind(self.commit_inner(None))
    }

    /// As [`Transaction::commit`], once, however often: see [`Store::commit_once`]. A conflict is an outcome too and is answered
    /// again: the next attempt takes the next sequence.
    ///
    /// # Errors
    /// As [`Transaction::commit`] and [`Store::commit_once`].
    pub fn commit_once(self, token: ClientToken) -> Result<Commit> {
        let log = self.store.log.clone();
        log.wait(self.commit_inner(Some(token)))
    }

    /// As [`Transaction::commit_once`], without blocking the thread.
    pub fn commit_once_async(self, token: ClientToken) -> BoxFuture<Result<Commit>> {
        let log = self.store.log.clone();
        log.bind(self.commit_inner(Some(token)))
    }

    async fn commit_inner(self, token: Option<ClientToken>) -> Result<Commit> {
        lock(&self.reads).check()?;
        if self.writes.is_empty() && self.removed.is_empty() {
            return Ok(Commit::at(self.snapshot.index()));
        }
        let store = self.store.clone();
        let batch = self.into_batch().await?;
        match token {
            Some(token) => store.commit_once_inner(token, batch).await,
            None => store.commit_inner(batch, store.durability()).await,
        }
    }

    /// What was written, on the condition that what was recorded has not changed.
    async fn into_batch(self) -> Result<Batch> {
        let reads = std::mem::take(&mut *lock(&self.reads));
        let blind: Vec<_> = self.writes.keys().filter(|place| !reads.knows(place)).cloned().collect();
        let mut conditions = reads.into_conditions(self.snapshot.index());
        for some in blind.chunk_by(|one, other| one.0 == other.0) {
            let Some((keyspace, _)) = some.first() else { continue };
            let keys: Vec<&Bytes> = some.iter().map(|(_, key)| key).collect();
            let found = self.snapshot.get_many_versions(*keyspace, &keys).await?;
            let as_they_were = keys.into_iter().zip(found);
            conditions.extend(
                as_they_were.map(|(key, found)| unchanged(*keyspace, key.clone(), found.map(|(version, _)| version))),
            );
        }
        let mut batch = Batch::new();
        batch.require(conditions);
        for (keyspace, removed) in &self.removed {
            for range in removed.iter() {
                batch.remove_range_in(*keyspace, range);
            }
        }
        let mut lives = self.lives;
        for (place, value) in self.writes {
            let ttl_ms = lives.remove(&place);
            let (keyspace, key) = place;
            match (value, ttl_ms) {
                (Some(value), Some(ttl_ms)) => batch.insert_for_in(keyspace, key, value, ttl_ms),
                (Some(value), None) => batch.insert_in(keyspace, key, value),
                (None, _) => batch.remove_in(keyspace, key),
            };
        }
        Ok(batch)
    }
}

/// What the closure of [`Store::transact_async`] returns.
pub type TransactFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

impl Store {
    /// Begins a transaction on the state at the read level of this handle. Whatever that level, what commits was valid when it
    /// was applied.
    ///
    /// # Errors
    /// As [`Store::snapshot`].
    pub fn transaction(&self, isolation: Isolation) -> Result<Transaction> {
        Ok(Transaction::new(self.clone(), isolation, self.log.wait(self.view())?))
    }

    /// As [`Store::transaction`], without blocking the thread. Cancel safe.
    pub fn transaction_async(&self, isolation: Isolation) -> BoxFuture<Result<Transaction>> {
        let this = self.clone();
        self.log.bind(async move {
            let snapshot = this.view().await?;
            Ok(Transaction::new(this, isolation, snapshot))
        })
    }

    /// Runs `f` in a transaction and commits it; after a conflict again in another one, [`TRANSACT_ATTEMPTS_MAX`] times in all. `f` has
    /// no effect but through the transaction, since it may run several times. Each conflict means that somebody else has
    /// committed; where that is the rule, a [`crate::StateMachine`] decides without trying again.
    ///
    /// # Errors
    /// What `f` returns: then nothing is committed. `Conflict` when the last attempt met one as well, and as
    /// [`Transaction::commit`].
    pub fn transact<T>(
        &self,
        isolation: Isolation,
        mut f: impl FnMut(&mut Transaction) -> Result<T>,
    ) -> Result<(T, Commit)> {
        let mut attempt = 1;
        loop {
            let mut transaction = self.transaction(isolation)?;
            let value = f(&mut transaction)?;
            match transaction.commit() {
                Err(error) if error.kind() == ErrorKind::Conflict && attempt < TRANSACT_ATTEMPTS_MAX => attempt += 1,
                committed => return Ok((value, committed?)),
            }
        }
    }

    /// As [`Store::transact`], without blocking the thread. Not cancel safe: a dropped future may have written.
    ///
    /// # Errors
    /// As [`Store::transact`].
    pub fn transact_async<T: Send + 'static>(
        &self,
        isolation: Isolation,
        mut f: impl for<'a> FnMut(&'a mut Transaction) -> TransactFuture<'a, T> + Send + 'static,
    ) -> BoxFuture<Result<(T, Commit)>> {
        let this = self.clone();
        self.log.bind(async move {
            let mut attempt = 1;
            loop {
                let mut transaction = this.transaction_async(isolation).await?;
                let value = f(&mut transaction).await?;
                match transaction.commit_async().await {
                    Err(error) if error.kind() == ErrorKind::Conflict && attempt < TRANSACT_ATTEMPTS_MAX => {
                        attempt += 1
                    }
                    committed => return Ok((value, committed?)),
                }
            }
        })
    }
}
