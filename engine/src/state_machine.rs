//! The embedder's own commands, decided at apply.

use std::ops::Bound;

use bytes::Bytes;

use crate::{KeyspaceId, LogIndex, Result};

/// Answers `Custom` commands. It runs on every replica, in log order, and must be deterministic: it may read the store
/// through [`Apply`] and the command, and nothing else. Table digests tell when it is not.
pub trait StateMachine: Send + Sync + 'static {
    /// Reads and writes through `apply` inside one atomic batch and answers. On `Err` nothing is written and the error
    /// is the answer.
    fn apply<'a>(
        &'a self,
        apply: &'a mut Apply,
        command: Bytes,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Bytes>> + Send + 'a>>;

    /// The writes of the entry at `index` are readable. For notifications on this replica; runs on the applier.
    fn applied(&self, index: LogIndex) {
        let _ = index;
    }

    /// The state was replaced or reopened and stands at `index`: anything held in memory is to be read again.
    fn restored(&self, index: LogIndex) {
        let _ = index;
    }
}

/// The view that a state machine has of the store while it applies one entry: everything applied before, its own
/// writes on top.
pub struct Apply {}

impl Apply {
    /// The index of the entry.
    pub fn index(&self) -> LogIndex {
        todo!()
    }

    /// The proposer's wall clock, milliseconds since the Unix epoch.
    pub fn time_ms(&self) -> u64 {
        todo!()
    }

    /// The id of a keyspace, made if it is absent.
    pub fn keyspace(&mut self, name: &str) -> Result<KeyspaceId> {
        let _ = name;
        todo!()
    }

    /// The value of a key.
    pub async fn get(&self, keyspace: KeyspaceId, key: &[u8]) -> Result<Option<Bytes>> {
        let _ = (keyspace, key);
        todo!()
    }

    /// Up to `limit` pairs within the bounds, in order of keys.
    pub async fn range(
        &self,
        keyspace: KeyspaceId,
        lower: Bound<&[u8]>,
        upper: Bound<&[u8]>,
        reverse: bool,
        limit: usize,
    ) -> Result<Vec<(Bytes, Bytes)>> {
        let _ = (keyspace, lower, upper, reverse, limit);
        todo!()
    }

    /// Sets a key.
    pub fn put(&mut self, keyspace: KeyspaceId, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<()> {
        let _ = (keyspace, key.into(), value.into());
        todo!()
    }

    /// Removes a key.
    pub fn delete(&mut self, keyspace: KeyspaceId, key: impl Into<Bytes>) -> Result<()> {
        let _ = (keyspace, key.into());
        todo!()
    }
}
