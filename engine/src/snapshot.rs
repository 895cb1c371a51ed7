//! Pinned read views.

use std::ops::Bound;

use bytes::Bytes;

use crate::{KeyspaceId, LogIndex, Result};

/// A value, sharing the memory of the block or memtable that holds it.
pub type Value = Bytes;

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
pub struct Snapshot {}

impl Snapshot {
    /// The index whose state it shows.
    pub fn index(&self) -> LogIndex {
        todo!()
    }

    /// The value of a key. Ready at the first poll when no block has to be read.
    pub async fn get(&self, keyspace: KeyspaceId, key: &[u8]) -> Result<Option<Value>> {
        let _ = (keyspace, key);
        todo!()
    }

    /// The id of a keyspace in this view.
    pub fn keyspace(&self, name: &str) -> Option<KeyspaceId> {
        let _ = name;
        todo!()
    }

    /// A scan over the bounds.
    pub fn range(&self, keyspace: KeyspaceId, lower: Bound<Bytes>, upper: Bound<Bytes>) -> Scan {
        let _ = (keyspace, lower, upper);
        todo!()
    }
}

/// An ordered scan over a snapshot, which it owns. Ends meet in the middle: no pair is given twice.
pub struct Scan {}

impl Scan {
    /// The next pair from the low end.
    pub async fn next(&mut self) -> Result<Option<(Bytes, Value)>> {
        todo!()
    }

    /// The next pair from the high end.
    pub async fn next_back(&mut self) -> Result<Option<(Bytes, Value)>> {
        todo!()
    }

    /// Moves the low end to the first key at or after `key`.
    pub async fn seek(&mut self, key: &[u8]) -> Result<()> {
        let _ = key;
        todo!()
    }
}
