//! Pinned read views.
//!
//! # Invariants
//! 1. A snapshot holds the memtables and tables that it reads by reference count: neither flush, nor compaction, nor a
//!    drop takes them away.
//! 2. Its index was applied when it was made and its views hold everything up to that index; versions above it are skipped.

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use bytes::Bytes;

use crate::expiry::ReadAt;
use crate::group::{Names, Views};
use crate::merge_operator::{Operator, no_operator};
use crate::read::{ReadView, ScanCursor};
use crate::{Error, ErrorKind, KeyspaceId, LogIndex, Result};

/// A value, sharing the memory of the block or memtable that holds it.
pub type Value = Bytes;

/// Takes a key and its value, and says whether it wants more.
pub type Visitor<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + Send + 'a;

/// Which way a scan goes first; both ends can be taken from at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Ascending keys.
    Forward,
    /// Descending keys.
    Reverse,
}

/// A read view of one branch over all keyspaces at one index. Cloning shares it.
#[derive(Clone)]
pub struct Snapshot {
    at: ReadAt,
    views: Arc<Views>,
    names: Arc<Names>,
}

impl Snapshot {
    pub(crate) fn new(at: ReadAt, views: Arc<Views>, names: Arc<Names>) -> Self {
        Self { at, views, names }
    }

    /// The same for who reads at that time.
    pub(crate) fn at_time(self, time_ms: u64) -> Self {
        Self { at: ReadAt { time_ms, ..self.at }, ..self }
    }

    /// The index whose state it shows.
    pub fn index(&self) -> LogIndex {
        self.at.index
    }

    /// The value of a key. Ready at the first poll when no block has to be read.
    ///
    /// # Errors
    /// `NotFound` for an unknown keyspace, `Io`, `Corrupt`.
    pub async fn get(&self, keyspace: KeyspaceId, key: &[u8]) -> Result<Option<Value>> {
        match self.view(keyspace)? {
            Some(view) => view.get(key, self.at).await,
            None => Ok(None),
        }
    }

    /// The value of a key, and the index of the entry that wrote it: the same on every replica and in every clone, and
    /// untouched by flush, compaction and restart.
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    pub async fn get_version(&self, keyspace: KeyspaceId, key: &[u8]) -> Result<Option<(LogIndex, Value)>> {
        match self.view(keyspace)? {
            Some(view) => view.get_version(key, self.at).await,
            None => Ok(None),
        }
    }

    /// The values of many keys, in their order. Every key is looked up in memory first; the blocks that are not cached are then read from
    /// the device together. Ready at the first poll when none is.
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    /// # Cancel safety
    /// Cancel safe.
    pub async fn get_many<K: AsRef<[u8]>>(&self, keyspace: KeyspaceId, keys: &[K]) -> Result<Vec<Option<Value>>> {
        let versions = self.get_many_versions(keyspace, keys).await?;
        Ok(versions.into_iter().map(|found| found.map(|(_, value)| value)).collect())
    }

    /// As [`Snapshot::get_many`], each with the index of the entry that wrote it.
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    /// # Cancel safety
    /// Cancel safe.
    pub async fn get_many_versions<K: AsRef<[u8]>>(
        &self,
        keyspace: KeyspaceId,
        keys: &[K],
    ) -> Result<Vec<Option<(LogIndex, Value)>>> {
        match self.view(keyspace)? {
            Some(view) => view.get_many(keys, self.at).await,
            None => Ok(vec![None; keys.len()]),
        }
    }

    /// What a value of a key, `None` for an absent one, becomes when an operand is merged into it by the merge operator of the keyspace.
    ///
    /// # Errors
    /// `Invalid`: the keyspace has no merge operator, or that refuses.
    pub fn merge(
        &self,
        keyspace: KeyspaceId,
        key: &[u8],
        value: Option<&[u8]>,
        operand: &[u8],
    ) -> Result<Option<Value>> {
        self.check_operand(keyspace, operand)?;
        self.merge_all(keyspace, key, value, &[Bytes::copy_from_slice(operand)])
    }

    /// As [`Snapshot::merge`], of operands that were checked, the newest first.
    ///
    /// # Errors
    /// As [`Snapshot::merge`].
    pub(crate) fn merge_all(
        &self,
        keyspace: KeyspaceId,
        key: &[u8],
        value: Option<&[u8]>,
        operands: &[Bytes],
    ) -> Result<Option<Value>> {
        self.operator(keyspace)?.apply(key, value, operands)
    }

    /// Refuses an operand that must not be written.
    ///
    /// # Errors
    /// As [`Snapshot::merge`].
    pub(crate) fn check_operand(&self, keyspace: KeyspaceId, operand: &[u8]) -> Result<()> {
        self.operator(keyspace)?.check(operand)
    }

    fn operator(&self, keyspace: KeyspaceId) -> Result<&Operator> {
        self.names.operators.get(&keyspace).ok_or_else(|| no_operator(keyspace))
    }

    /// The id of a keyspace in this view.
    pub fn keyspace(&self, name: &str) -> Option<KeyspaceId> {
        self.names.keyspaces.get(name).copied()
    }

    /// A scan over the bounds.
    pub fn range(&self, keyspace: KeyspaceId, lower: Bound<Bytes>, upper: Bound<Bytes>) -> Scan {
        let cursor = match self.view(keyspace) {
            Err(error) => Err(error),
            Ok(None) => Ok(None),
            Ok(Some(_)) if crate::state_machine::is_empty(&lower, &upper) => Ok(None),
            Ok(Some(view)) => Ok(Some(Box::new(view.scan(lower, upper, self.at)))),
        };
        Scan { cursor }
    }

    pub(crate) fn expires(&self, keyspace: KeyspaceId) -> bool {
        self.names.expiring.contains(&keyspace)
    }

    pub(crate) fn has_keyspace(&self, keyspace: KeyspaceId) -> bool {
        self.names.keyspaces.values().any(|id| *id == keyspace)
    }

    /// The view of a keyspace; none if nothing was ever written to it.
    fn view(&self, keyspace: KeyspaceId) -> Result<Option<&Arc<ReadView>>> {
        match self.views.get(&keyspace) {
            Some(published) => Ok(Some(&published.view)),
            None if self.has_keyspace(keyspace) => Ok(None),
            None => Err(no_keyspace(keyspace)),
        }
    }
}

pub(crate) fn no_keyspace(keyspace: KeyspaceId) -> Error {
    Error::new(ErrorKind::NotFound, format!("no such keyspace keyspace={keyspace}"))
}

/// An ordered scan over a snapshot, which it owns. Ends meet in the middle: no pair is given twice.
pub struct Scan {
    /// None for bounds or a keyspace without a key.
    cursor: Result<Option<Box<ScanCursor>>>,
}

impl Scan {
    fn cursor(&mut self) -> Result<Option<&mut ScanCursor>> {
        match &mut self.cursor {
            Ok(cursor) => Ok(cursor.as_deref_mut()),
            Err(error) => Err(error.clone()),
        }
    }

    /// The next pair from the low end.
    ///
    /// # Errors
    /// `NotFound` for an unknown keyspace, `Io`, `Corrupt`.
    pub async fn next(&mut self) -> Result<Option<(Bytes, Value)>> {
        match self.cursor()? {
            Some(cursor) => cursor.next().await,
            None => Ok(None),
        }
    }

    /// Gives the pairs from the low end on to `each`, borrowed from where they lie, until it breaks or there are no more.
    ///
    /// # Errors
    /// As [`Scan::next`].
    /// # Cancel safety
    /// Cancel safe: what was given is not given again.
    pub async fn visit(&mut self, each: &mut Visitor<'_>) -> Result<()> {
        match self.cursor()? {
            Some(cursor) => cursor.visit(each).await,
            None => Ok(()),
        }
    }

    /// The entry that wrote the pair that [`Scan::next`] has just given.
    pub(crate) fn version(&self) -> LogIndex {
        self.cursor.as_ref().ok().and_then(Option::as_ref).map_or(LogIndex(0), |cursor| cursor.version())
    }

    /// The next pair from the high end.
    ///
    /// # Errors
    /// As [`Scan::next`].
    pub async fn next_back(&mut self) -> Result<Option<(Bytes, Value)>> {
        match self.cursor()? {
            Some(cursor) => cursor.next_back().await,
            None => Ok(None),
        }
    }

    /// Moves the low end to the first key at or after `key`.
    ///
    /// # Errors
    /// As [`Scan::next`].
    pub async fn seek(&mut self, key: &[u8]) -> Result<()> {
        match self.cursor()? {
            Some(cursor) => cursor.seek(key).await,
            None => Ok(()),
        }
    }
}
