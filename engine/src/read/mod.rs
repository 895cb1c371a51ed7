//! Reading (signatures).
#![allow(dead_code, unused_variables)]
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

use crate::memtable::Memtable;
use crate::table::Table;
use crate::{LogIndex, Result};

/// What a memtable or a table knows of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// Its value.
    Value(Bytes),
    /// It was removed.
    Deleted,
}

/// Memtables and tables of one keyspace of one branch, pinned.
#[derive(Clone, Default)]
pub(crate) struct ReadView {
    /// Newest first.
    pub(crate) memtables: Vec<Arc<Memtable>>,
    /// Newest first.
    pub(crate) l0: Vec<Arc<Table>>,
    /// From L1 down; each sorted by key, without overlap.
    pub(crate) levels: Vec<Arc<[Arc<Table>]>>,
}

impl ReadView {
    /// The value of a key at `at`.
    pub(crate) async fn get(&self, key: &[u8], at: LogIndex) -> Result<Option<Bytes>> {
        todo!()
    }
    /// A scan over the bounds at `at`.
    pub(crate) fn scan(self: &Arc<Self>, lower: Bound<Bytes>, upper: Bound<Bytes>, at: LogIndex) -> ScanCursor {
        todo!()
    }
}

/// A scan over a view that it owns; ends meet in the middle.
pub(crate) struct ScanCursor {}

impl ScanCursor {
    pub(crate) async fn next(&mut self) -> Result<Option<(Bytes, Bytes)>> {
        todo!()
    }
    pub(crate) async fn next_back(&mut self) -> Result<Option<(Bytes, Bytes)>> {
        todo!()
    }
    pub(crate) async fn seek(&mut self, key: &[u8]) -> Result<()> {
        todo!()
    }
}

/// An entry on its way into a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryRef<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) index: LogIndex,
    /// `None` is a tombstone.
    pub(crate) value: Option<&'a [u8]>,
}

/// Merges memtables and tables for a flush or compaction: the newest version of each key, ascending.
pub(crate) struct MergeInput {}

impl MergeInput {
    /// Sources may be given in any order: the version with the highest index wins. `drop_tombstones` when nothing older lies below the output.
    pub(crate) fn new(memtables: Vec<Arc<Memtable>>, tables: Vec<Arc<Table>>, drop_tombstones: bool) -> Self {
        todo!()
    }
    /// The next entry. Reads go ahead and around the cache.
    pub(crate) async fn next(&mut self) -> Result<Option<EntryRef<'_>>> {
        todo!()
    }
}
