//! Mutations applied all or none.

use bytes::Bytes;
use mainstay_engine::{KeyspaceId, WriteOp};

use crate::{Keyspace, LogIndex};

/// Mutations over any keyspaces of one store, applied all or none by [`crate::Store::commit`]. The later of two mutations
/// of one key wins.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(crate) ops: Vec<WriteOp>,
    bytes: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key. The key has 1 byte to 64 KiB, the value at most 16 MiB; [`crate::Store::commit`] refuses others.
    pub fn insert(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> &mut Self {
        self.insert_bytes(keyspace, Bytes::copy_from_slice(key.as_ref()), Bytes::copy_from_slice(value.as_ref()))
    }

    /// As [`Batch::insert`], sharing the memory of key and value.
    pub fn insert_bytes(&mut self, keyspace: &Keyspace, key: Bytes, value: Bytes) -> &mut Self {
        self.bytes += key.len() + value.len();
        self.ops.push(WriteOp::Put { keyspace: keyspace.id(), key, value });
        self
    }

    /// Removes a key; nothing if it is absent.
    pub fn remove(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> &mut Self {
        self.remove_in(keyspace.id(), Bytes::copy_from_slice(key.as_ref()))
    }

    pub(crate) fn remove_in(&mut self, keyspace: KeyspaceId, key: Bytes) -> &mut Self {
        self.bytes += key.len();
        self.ops.push(WriteOp::Delete { keyspace, key });
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

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Removes all mutations, keeping the memory.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.bytes = 0;
    }
}

/// Where a write stands in the log. Pass it to [`crate::Store::wait`] to raise a [`crate::Durability::Local`] write to a quorum, or its
/// index to [`crate::ReadLevel::AtLeast`] to read it on any replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    pub(crate) token: mainstay_replication::CommitToken,
}

impl Commit {
    /// The index of the entry: the version of every key that it wrote.
    pub fn index(&self) -> LogIndex {
        self.token.index
    }
}
