//! Mutations applied all or none, and what must hold for them to be.

use std::ops::RangeBounds;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{BranchId, CommandBody, Condition, ConditionalBatch, KeyRange, KeyspaceId, WriteBatch, WriteOp};

use crate::snapshot::{owned_bounds, prefix_bounds};
use crate::{Keyspace, LogIndex};

/// Mutations over any keyspaces of one store, applied all or none by [`crate::Store::commit`]. The later of two mutations
/// of one key wins, and an operand merges into what stands before it; a range that is removed takes what stands before it in the batch, and nothing that comes after.
///
/// A batch may have conditions: see [`Batch::require_value`] and the others beside it. They are decided when the batch is applied,
/// on the state before its mutations, and by every replica alike. If one does not hold the batch changes nothing and is
/// answered with [`crate::ErrorKind::Conflict`], whose message names keyspace and key. A batch of conditions alone asks whether they hold.
///
/// ```
/// # fn main() -> mainstay::Result<()> {
/// # let dir = tempfile::tempdir().expect("a temporary directory");
/// # let store = mainstay::Store::builder().wal_bytes(16 << 20).open(dir.path().join("store"))?;
/// use mainstay::{Batch, ErrorKind};
///
/// let jobs = store.keyspace("jobs")?;
/// jobs.insert("7", "waiting")?;
///
/// // Whoever turns "waiting" into a name has the job.
/// let take = |name: &str| {
///     let mut batch = Batch::new();
///     batch.require_value(&jobs, "7", "waiting").insert(&jobs, "7", name);
///     store.commit(batch)
/// };
/// take("ada")?;
/// let late = take("alan").unwrap_err();
/// assert_eq!(late.kind(), ErrorKind::Conflict);
/// assert_eq!(jobs.get("7")?.as_deref(), Some(&b"ada"[..]));
/// # store.close()
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Batch {
    conditions: Vec<Condition>,
    ops: Vec<WriteOp>,
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
        self.insert_in(keyspace.id(), key, value)
    }

    pub(crate) fn insert_in(&mut self, keyspace: KeyspaceId, key: Bytes, value: Bytes) -> &mut Self {
        self.bytes += key.len() + value.len();
        self.ops.push(WriteOp::Put { keyspace, key, value });
        self
    }

    /// Sets a key of an expiring keyspace ([`crate::Store::keyspace_expiring`]) for a time, which counts in milliseconds, at least one, from when the batch is
    /// applied, by the clocks of leaders: those move the time of the log, which never goes back, and about once a second while nothing is written. Then the key is
    /// absent as if it had been removed. [`crate::Store::commit`] refuses a shorter time, and other keyspaces. The value has at most 16 MiB less 10 bytes.
    pub fn insert_for(
        &mut self,
        keyspace: &Keyspace,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        ttl: Duration,
    ) -> &mut Self {
        let (key, value) = (Bytes::copy_from_slice(key.as_ref()), Bytes::copy_from_slice(value.as_ref()));
        self.insert_for_in(keyspace.id(), key, value, millis(ttl))
    }

    pub(crate) fn insert_for_in(&mut self, keyspace: KeyspaceId, key: Bytes, value: Bytes, ttl_ms: u64) -> &mut Self {
        self.bytes += key.len() + value.len();
        self.ops.push(WriteOp::PutFor { keyspace, key, value, ttl_ms });
        self
    }

    /// Merges an operand into the value of a key, absent or not, by the merge operator of the keyspace
    /// ([`crate::Store::keyspace_with_operator`]). The operand has at most 16 MiB, as the value may have that comes of it.
    ///
    /// An operator that combines operands, as those of this crate do, is written blindly: nothing is read before the commit
    /// is answered. Should it turn out that it cannot merge into the value there is, or that the value would be too long, whoever reads the key is
    /// answered with [`crate::ErrorKind::Invalid`] until it is put or removed. In a batch with conditions, and by an operator that does
    /// not combine, the value is read as the batch is applied: then the batch is refused, and changes nothing.
    pub fn merge(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>, operand: impl AsRef<[u8]>) -> &mut Self {
        self.merge_bytes(keyspace, Bytes::copy_from_slice(key.as_ref()), Bytes::copy_from_slice(operand.as_ref()))
    }

    /// As [`Batch::merge`], sharing the memory of key and operand.
    pub fn merge_bytes(&mut self, keyspace: &Keyspace, key: Bytes, operand: Bytes) -> &mut Self {
        self.bytes += key.len() + operand.len();
        self.ops.push(WriteOp::Merge { keyspace: keyspace.id(), key, operand });
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

    /// Removes all keys within the bounds, however many there are: one mutation, whose cost does not depend on them. Their space is given
    /// back when it is flushed, as far as whole tables are within, and by compaction.
    ///
    /// Bounds that hold no key, or are longer than a key may be, are refused by [`crate::Store::commit`].
    ///
    /// ```
    /// # fn main() -> mainstay::Result<()> {
    /// # let dir = tempfile::tempdir().expect("a temporary directory");
    /// # let store = mainstay::Store::builder().wal_bytes(16 << 20).open(dir.path().join("store"))?;
    /// use mainstay::Batch;
    ///
    /// let jobs = store.keyspace("jobs")?;
    /// for n in 0..100 {
    ///     jobs.insert(format!("{n:03}"), "done")?;
    /// }
    /// let mut batch = Batch::new();
    /// batch.remove_range(&jobs, "000".."090").insert(&jobs, "next", "090");
    /// store.commit(batch)?;
    /// assert_eq!(jobs.range("0".."1").count(), 10);
    /// # store.close()
    /// # }
    /// ```
    pub fn remove_range<K: AsRef<[u8]>>(&mut self, keyspace: &Keyspace, bounds: impl RangeBounds<K>) -> &mut Self {
        let (lower, upper) = owned_bounds(&bounds);
        self.remove_range_in(keyspace.id(), KeyRange::new(lower, upper))
    }

    /// Removes all keys that begin with `prefix`, as [`Batch::remove_range`]; an empty one is that of all keys.
    pub fn remove_prefix(&mut self, keyspace: &Keyspace, prefix: impl AsRef<[u8]>) -> &mut Self {
        let (lower, upper) = prefix_bounds(prefix.as_ref());
        self.remove_range_in(keyspace.id(), KeyRange::new(lower, upper))
    }

    pub(crate) fn remove_range_in(&mut self, keyspace: KeyspaceId, range: KeyRange) -> &mut Self {
        self.bytes += range.bytes();
        self.ops.push(WriteOp::DeleteRange { keyspace, range });
        self
    }

    /// The batch is applied only if the key is absent: never written, or removed.
    pub fn require_absent(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> &mut Self {
        self.require_version(keyspace, key, None)
    }

    /// The batch is applied only if the key has a value, whichever.
    pub fn require_present(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> &mut Self {
        let key = Bytes::copy_from_slice(key.as_ref());
        self.require([Condition::Present { keyspace: keyspace.id(), key }])
    }

    /// The batch is applied only if the key has exactly this value. One that was written, changed and written back counts as
    /// the same; [`Batch::require_version`] tells them apart.
    pub fn require_value(&mut self, keyspace: &Keyspace, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> &mut Self {
        let (key, value) = (Bytes::copy_from_slice(key.as_ref()), Bytes::copy_from_slice(value.as_ref()));
        self.require([Condition::Value { keyspace: keyspace.id(), key, value }])
    }

    /// The batch is applied only if the key was not written since it had this version: [`crate::Snapshot::version`], or the
    /// [`Commit::index`] of the batch that wrote it. None: the key is absent.
    ///
    /// There is no condition on the index of a removal, which is forgotten sooner on one replica than on another.
    pub fn require_version(
        &mut self,
        keyspace: &Keyspace,
        key: impl AsRef<[u8]>,
        version: Option<LogIndex>,
    ) -> &mut Self {
        self.require([unchanged(keyspace.id(), Bytes::copy_from_slice(key.as_ref()), version)])
    }

    pub(crate) fn require(&mut self, conditions: impl IntoIterator<Item = Condition>) -> &mut Self {
        for condition in conditions {
            self.bytes += condition.bytes();
            self.conditions.push(condition);
        }
        self
    }

    /// What it proposes to a branch: without conditions a plain batch.
    pub(crate) fn into_body(self, branch: BranchId) -> CommandBody {
        let batch = WriteBatch { branch, ops: self.ops };
        match self.conditions {
            none if none.is_empty() => CommandBody::Batch(batch),
            conditions => CommandBody::BatchIf(ConditionalBatch { conditions, batch }),
        }
    }

    /// Count of mutations.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// True without mutations and conditions.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty() && self.conditions.is_empty()
    }

    /// Bytes of keys, bounds of ranges, values and operands, and about those of the conditions.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Removes all mutations and conditions, keeping the memory.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.conditions.clear();
        self.bytes = 0;
    }
}

/// Whole milliseconds of a time to live.
pub(crate) fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)
}

/// That a key has the version that was found; none: that it is absent.
pub(crate) fn unchanged(keyspace: KeyspaceId, key: Bytes, version: Option<LogIndex>) -> Condition {
    match version {
        Some(version) => Condition::Version { keyspace, key, version },
        None => Condition::Absent { keyspace, key },
    }
}

/// Where a write stands in the log. Pass it to [`crate::Store::wait`] to raise a [`crate::Durability::Local`] write to a quorum, or its
/// index to [`crate::ReadLevel::AtLeast`] to read it on any replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    pub(crate) token: mainstay_replication::CommitToken,
}

impl Commit {
    /// Of what is in the log already.
    pub(crate) fn at(index: LogIndex) -> Self {
        Self { token: mainstay_replication::CommitToken { term: 0, index } }
    }

    /// The index of the entry: the version of every key that it wrote.
    pub fn index(&self) -> LogIndex {
        self.token.index
    }
}
