//! Pinned read views and ordered scans.

use std::ops::{Bound, ControlFlow, RangeBounds};

use bytes::Bytes;
use mainstay_io::BoxFuture;

use crate::log::Log;
use crate::{Keyspace, LogIndex, Result, Value};

/// A pair of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Bytes,
    /// The value, sharing the memory of the block or memtable that holds it.
    pub value: Value,
}

impl From<Entry> for (Bytes, Value) {
    fn from(entry: Entry) -> Self {
        (entry.key, entry.value)
    }
}

/// A read view over all keyspaces at one index: what is written later is not seen, what is dropped later stays.
///
/// Cloning shares it. It pins memory and tables until the last clone and the scans made from it are dropped.
#[derive(Clone)]
pub struct Snapshot {
    pub(crate) inner: mainstay_engine::Snapshot,
}

impl Snapshot {
    /// The index whose state it shows.
    pub fn index(&self) -> LogIndex {
        self.inner.index()
    }

    /// The value of a key.
    ///
    /// # Errors
    /// `Invalid` (the keyspace did not exist), `Corrupt`, `Io`, `Closed`.
    pub fn get(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> Result<Option<Value>> {
        Ok(mainstay_io::block_on(self.inner.get(keyspace.id(), key.as_ref()))?)
    }

    /// As [`Snapshot::get`], without blocking the thread. Cancel safe.
    pub fn get_async(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> BoxFuture<Result<Option<Value>>> {
        let (inner, id, key) = (self.inner.clone(), keyspace.id(), Bytes::copy_from_slice(key.as_ref()));
        Box::pin(async move { Ok(inner.get(id, &key).await?) })
    }

    /// The values of many keys, in their order, as [`Keyspace::multi_get`].
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    pub fn multi_get<K: AsRef<[u8]>>(&self, keyspace: &Keyspace, keys: &[K]) -> Result<Vec<Option<Value>>> {
        Ok(mainstay_io::block_on(self.inner.get_many(keyspace.id(), keys))?)
    }

    /// As [`Snapshot::multi_get`], without blocking the thread. Cancel safe.
    pub fn multi_get_async<K: AsRef<[u8]>>(
        &self,
        keyspace: &Keyspace,
        keys: &[K],
    ) -> BoxFuture<Result<Vec<Option<Value>>>> {
        let keys: Vec<Bytes> = keys.iter().map(|key| Bytes::copy_from_slice(key.as_ref())).collect();
        let (inner, id) = (self.inner.clone(), keyspace.id());
        Box::pin(async move { Ok(inner.get_many(id, &keys).await?) })
    }

    /// The index of the entry that wrote the value of a key, none of an absent key: for [`crate::Batch::require_version`]. The same on
    /// every replica and in every clone.
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    pub fn version(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> Result<Option<LogIndex>> {
        mainstay_io::block_on(self.version_async(keyspace, key))
    }

    /// As [`Snapshot::version`], without blocking the thread. Cancel safe.
    pub fn version_async(&self, keyspace: &Keyspace, key: impl AsRef<[u8]>) -> BoxFuture<Result<Option<LogIndex>>> {
        let (inner, id, key) = (self.inner.clone(), keyspace.id(), Bytes::copy_from_slice(key.as_ref()));
        Box::pin(async move { Ok(inner.get_version(id, &key).await?.map(|(version, _)| version)) })
    }

    /// The pairs within `bounds` in order of keys; `.rev()` for the other way.
    pub fn range<K: AsRef<[u8]>>(&self, keyspace: &Keyspace, bounds: impl RangeBounds<K>) -> Scan {
        let (lower, upper) = owned_bounds(&bounds);
        Scan::open(self.inner.range(keyspace.id(), lower, upper))
    }

    /// The pairs whose key begins with `prefix`, in order of keys.
    pub fn prefix(&self, keyspace: &Keyspace, prefix: impl AsRef<[u8]>) -> Scan {
        let (lower, upper) = prefix_bounds(prefix.as_ref());
        Scan::open(self.inner.range(keyspace.id(), lower, upper))
    }

    /// All pairs in order of keys.
    pub fn iter(&self, keyspace: &Keyspace) -> Scan {
        Scan::open(self.inner.range(keyspace.id(), Bound::Unbounded, Bound::Unbounded))
    }
}

enum State {
    Opening(BoxFuture<Result<mainstay_engine::Scan>>),
    Open(Box<mainstay_engine::Scan>),
    Ended,
}

/// An ordered scan that owns the snapshot it reads. Both ends can be taken from at any time; they meet in the middle and
/// no pair is given twice. After an error it ends.
pub struct Scan {
    state: State,
}

impl Scan {
    fn open(inner: mainstay_engine::Scan) -> Self {
        Self { state: State::Open(Box::new(inner)) }
    }

    /// A scan whose snapshot is taken when the first pair is asked for.
    pub(crate) fn opening(
        log: &Log,
        open: impl Future<Output = Result<mainstay_engine::Scan>> + Send + 'static,
    ) -> Self {
        Self { state: State::Opening(log.bind(open)) }
    }

    async fn inner(&mut self) -> Result<Option<&mut mainstay_engine::Scan>> {
        if let State::Opening(open) = &mut self.state {
            self.state = match open.await {
                Ok(inner) => State::Open(Box::new(inner)),
                Err(e) => {
                    self.state = State::Ended;
                    return Err(e);
                }
            };
        }
        match &mut self.state {
            State::Open(inner) => Ok(Some(inner)),
            _ => Ok(None),
        }
    }

    /// The next pair from the low end. Cancel safe.
    ///
    /// # Errors
    /// `Corrupt`, `Io`, `Closed`, and what taking the snapshot can meet.
    pub async fn next_async(&mut self) -> Result<Option<Entry>> {
        let Some(inner) = self.inner().await? else { return Ok(None) };
        let found = inner.next().await;
        self.entry(found)
    }

    /// The next pair from the high end. Cancel safe.
    ///
    /// # Errors
    /// As [`Scan::next_async`].
    pub async fn next_back_async(&mut self) -> Result<Option<Entry>> {
        let Some(inner) = self.inner().await? else { return Ok(None) };
        let found = inner.next_back().await;
        self.entry(found)
    }

    /// Gives the key and value of each pair from the low end on to `each`, until it breaks or there are no more. They are borrowed
    /// from where they lie, so this is the cheapest way over many pairs.
    ///
    /// ```
    /// # fn main() -> mainstay::Result<()> {
    /// # let dir = tempfile::tempdir().expect("a folder");
    /// # let store = mainstay::Store::open(dir.path().join("data"))?;
    /// let sizes = store.keyspace("sizes")?;
    /// sizes.insert("a", "12")?;
    /// sizes.insert("b", "3456")?;
    /// let mut bytes = 0;
    /// sizes.iter().visit(|_, value| {
    ///     bytes += value.len();
    ///     std::ops::ControlFlow::Continue(())
    /// })?;
    /// assert_eq!(bytes, 6);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Scan::next_async`].
    pub fn visit(&mut self, each: impl FnMut(&[u8], &[u8]) -> ControlFlow<()> + Send) -> Result<()> {
        mainstay_io::block_on(self.visit_async(each))
    }

    /// As [`Scan::visit`], without blocking the thread but for `each`.
    ///
    /// # Errors
    /// As [`Scan::next_async`].
    /// # Cancel safety
    /// Cancel safe: what was given is not given again.
    pub async fn visit_async(&mut self, mut each: impl FnMut(&[u8], &[u8]) -> ControlFlow<()> + Send) -> Result<()> {
        if let Some(inner) = self.inner().await?
            && let Err(e) = inner.visit(&mut each).await
        {
            self.state = State::Ended;
            return Err(e.into());
        }
        Ok(())
    }

    /// Moves the low end to the first key at or after `key`.
    ///
    /// # Errors
    /// As [`Scan::next_async`].
    pub async fn seek_async(&mut self, key: impl AsRef<[u8]>) -> Result<()> {
        if let Some(inner) = self.inner().await?
            && let Err(e) = inner.seek(key.as_ref()).await
        {
            self.state = State::Ended;
            return Err(e.into());
        }
        Ok(())
    }

    /// As [`Scan::seek_async`], blocking the thread.
    ///
    /// # Errors
    /// As [`Scan::next_async`].
    pub fn seek(&mut self, key: impl AsRef<[u8]>) -> Result<()> {
        mainstay_io::block_on(self.seek_async(key))
    }

    /// Up to `max` pairs from the low end.
    ///
    /// # Errors
    /// As [`Scan::next_async`].
    pub async fn next_chunk_async(&mut self, max: usize) -> Result<Vec<Entry>> {
        let mut chunk = Vec::new();
        while chunk.len() < max
            && let Some(entry) = self.next_async().await?
        {
            chunk.push(entry);
        }
        Ok(chunk)
    }

    fn entry(&mut self, found: mainstay_engine::Result<Option<(Bytes, Value)>>) -> Result<Option<Entry>> {
        match found {
            Ok(Some((key, value))) => Ok(Some(Entry { key, value })),
            Ok(None) => Ok(None),
            Err(e) => {
                self.state = State::Ended;
                Err(e.into())
            }
        }
    }
}

impl Iterator for Scan {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        mainstay_io::block_on(self.next_async()).transpose()
    }
}

impl DoubleEndedIterator for Scan {
    fn next_back(&mut self) -> Option<Self::Item> {
        mainstay_io::block_on(self.next_back_async()).transpose()
    }
}

/// Copies bounds that borrow.
pub(crate) fn owned_bounds<K: AsRef<[u8]>>(bounds: &impl RangeBounds<K>) -> (Bound<Bytes>, Bound<Bytes>) {
    let owned = |bound: Bound<&K>| bound.map(|key| Bytes::copy_from_slice(key.as_ref()));
    (owned(bounds.start_bound()), owned(bounds.end_bound()))
}

/// The bounds of all keys that begin with `prefix`: up to the next sibling, which drops trailing `0xff` bytes.
pub(crate) fn prefix_bounds(prefix: &[u8]) -> (Bound<Bytes>, Bound<Bytes>) {
    if prefix.is_empty() {
        return (Bound::Unbounded, Bound::Unbounded);
    }
    let mut end = prefix.to_vec();
    let upper = loop {
        match end.pop() {
            None => break Bound::Unbounded,
            Some(u8::MAX) => {}
            Some(byte) => {
                end.push(byte + 1);
                break Bound::Excluded(Bytes::from(end));
            }
        }
    };
    (Bound::Included(Bytes::copy_from_slice(prefix)), upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_its_next_sibling() {
        let check = |prefix: &[u8], upper: Bound<&[u8]>| {
            let (_, found) = prefix_bounds(prefix);
            assert_eq!(found.as_ref().map(|b| &b[..]), upper, "prefix={prefix:?}");
        };
        check(b"", Bound::Unbounded);
        check(b"a", Bound::Excluded(b"b"));
        check(b"a\xff", Bound::Excluded(b"b"));
        check(b"a\xfe", Bound::Excluded(b"a\xff"));
        check(b"\xff\xff", Bound::Unbounded);
    }
}
