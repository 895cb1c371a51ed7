//! Changes of a store in the order of its log.

use mainstay_io::BoxFuture;
use tokio::runtime::Handle;

use crate::log::Log;
use crate::{Change, LogIndex, Result, Store};

/// What was changed in a store from an index on, in the order of the log: [`Store::changes`].
///
/// It gives what this replica has applied, and reads it from the log: nothing is kept for a reader, no writer waits for one, and a
/// reader takes a bounded part of the log into memory at a time. A reader that is slower than the log is cut is told so, by
/// [`crate::ErrorKind::Purged`] with the oldest index that is there, and begins anew: it reads a [`Store::snapshot`] or a checkpoint, and then
/// the changes from the index behind it. A store alone keeps a quarter of its ring for readers, a replica what it keeps for others that lag.
///
/// A reader that notes [`Changes::position`] with what it has done goes on from there after a restart, its own or the store's, and on
/// any other replica: indexes and changes are the same on all of them.
///
/// It keeps the volume open, as a [`crate::Snapshot`] does: drop it before the volume is opened again.
///
/// As an iterator it blocks the thread, waits for what is yet to be written, and ends never, but with an error.
///
/// ```
/// # fn main() -> mainstay::Result<()> {
/// # let dir = tempfile::tempdir().expect("a folder");
/// # let store = mainstay::Store::open(dir.path().join("data"))?;
/// use mainstay::{ChangeKind, LogIndex, WriteOp};
///
/// let from = store.record_changes()?; // once in the life of a store
/// let names = store.keyspace("names")?;
/// let mut changes = store.changes(from)?;
/// names.insert("ada", "1815")?;
/// while let Some(change) = changes.try_next()? {
///     if let ChangeKind::Writes(ops) = change.kind {
///         assert_eq!((ops[0].keyspace(), &ops[0].key()[..]), (names.id(), &b"ada"[..]));
///     }
/// }
/// let position = changes.position(); // note it: the next reader goes on from there
/// # assert!(position > from);
/// # Ok(())
/// # }
/// ```
pub struct Changes {
    inner: mainstay_engine::Changes,
    /// Of a replica: what reads of its log may need.
    handle: Option<Handle>,
}

impl Changes {
    /// The next change, waited for.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Purged`], `NotFound` (the clone was dropped), `Corrupt`, `Io`, `Unavailable` (a replica that mends its log: try again),
    /// `Closed`.
    ///
    /// # Cancel safety
    /// Cancel safe: a change that was not given is given by the next call.
    pub async fn next_async(&mut self) -> Result<Change> {
        let Self { inner, handle } = self;
        entered(handle.as_ref(), async { Ok(inner.next().await?) }).await
    }

    /// The next change; none when all that is applied was given.
    ///
    /// # Errors
    /// As [`Changes::next_async`].
    pub fn try_next(&mut self) -> Result<Option<Change>> {
        mainstay_io::block_on(self.try_next_async())
    }

    /// As [`Changes::try_next`], without blocking the thread. Cancel safe, as [`Changes::next_async`].
    ///
    /// # Errors
    /// As [`Changes::next_async`].
    pub async fn try_next_async(&mut self) -> Result<Option<Change>> {
        let Self { inner, handle } = self;
        entered(handle.as_ref(), async { Ok(inner.try_next().await?) }).await
    }

    /// Where to go on from: every change before this index was given.
    pub fn position(&self) -> LogIndex {
        self.inner.position()
    }
}

impl Iterator for Changes {
    type Item = Result<Change>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(mainstay_io::block_on(self.next_async()))
    }
}

/// Polls with the runtime of a replica entered, so that it works under any executor.
async fn entered<T>(handle: Option<&Handle>, future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        let _entered = handle.map(Handle::enter);
        future.as_mut().poll(cx)
    })
    .await
}

impl Store {
    /// Has it recorded from now on what becomes of each entry, which [`Store::changes`] needs, and returns the first index from which on
    /// changes can be read. Again it returns the same, or a later one. For good, and for all clones: it costs a pair for each batch that is
    /// refused, and on a store alone a quarter of the ring.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub fn record_changes(&self) -> Result<LogIndex> {
        self.log.wait(self.record_changes_inner())
    }

    /// As [`Store::record_changes`], without blocking the thread.
    pub fn record_changes_async(&self) -> BoxFuture<Result<LogIndex>> {
        let this = self.clone();
        self.log.bind(async move { this.record_changes_inner().await })
    }

    /// The changes of this store, or clone, from entry `from` on, which may be yet to come. A replica gives what it has applied itself, whatever the
    /// read level.
    ///
    /// # Errors
    /// `Unsupported` (nobody had them recorded: [`Store::record_changes`]), [`crate::ErrorKind::Purged`] (the log was cut, or they were not recorded
    /// yet), `NotFound` (the clone was dropped), `Corrupt`, `Io`, `Closed`.
    pub fn changes(&self, from: LogIndex) -> Result<Changes> {
        self.log.wait(self.changes_inner(from))
    }

    /// As [`Store::changes`], without blocking the thread. Cancel safe.
    pub fn changes_async(&self, from: LogIndex) -> BoxFuture<Result<Changes>> {
        let this = self.clone();
        self.log.bind(async move { this.changes_inner(from).await })
    }

    async fn record_changes_inner(&self) -> Result<LogIndex> {
        let index = self.make_keyspace(mainstay_engine::OUTCOMES_KEYSPACE).await?;
        Ok(LogIndex(index.0.saturating_add(1)))
    }

    async fn changes_inner(&self, from: LogIndex) -> Result<Changes> {
        match &self.log {
            Log::Alone(alone) => {
                let (group, source) = (alone.log.group().clone(), alone.log.entries());
                let inner = mainstay_engine::Changes::open(group, self.branch.id, source, from).await?;
                Ok(Changes { inner, handle: None })
            }
            Log::Replicated(replicated) => {
                let inner = replicated.node.changes(&self.branch.name, from).await?;
                Ok(Changes { inner, handle: Some(replicated.handle.clone()) })
            }
        }
    }
}
