//! The memtable (signatures).
#![allow(dead_code, unused_variables)]
use std::sync::Arc;

use bytes::Bytes;

use crate::LogIndex;
use crate::memory::MemoryBudget;
use crate::read::Lookup;

/// Every version of the keys written in one generation to one keyspace of one branch. One writer (the applier), any
/// number of readers.
pub(crate) struct Memtable {}

impl Memtable {
    /// An empty memtable whose memory is counted in `budget`.
    pub(crate) fn new(budget: &Arc<MemoryBudget>) -> Self {
        todo!()
    }
    /// Sets (`Some`) or removes (`None`) a key at `index`. The later of two calls with one key and index wins.
    pub(crate) fn insert(&self, key: &[u8], index: LogIndex, value: Option<&Bytes>) {
        todo!()
    }
    /// The newest version of a key with an index of at most `at`.
    pub(crate) fn get(&self, key: &[u8], at: LogIndex) -> Option<Lookup> {
        todo!()
    }
    /// Memory held, about.
    pub(crate) fn bytes(&self) -> u64 {
        todo!()
    }
    /// Versions held.
    pub(crate) fn entries(&self) -> u64 {
        todo!()
    }
    /// True when nothing was inserted.
    pub(crate) fn is_empty(&self) -> bool {
        todo!()
    }
    /// First key.
    pub(crate) fn first_key(&self) -> Option<Bytes> {
        todo!()
    }
    /// Last key.
    pub(crate) fn last_key(&self) -> Option<Bytes> {
        todo!()
    }
}
