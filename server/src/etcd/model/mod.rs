//! The etcd model: revisions, ranges, transactions, compaction and leases, decided at apply.
//!
//! # Place
//! [`Model`] is the [`StateMachine`] of the group under an etcd service. Services propose commands made of
//! [`command::Request`]s, read through [`Model::view`] and follow changes through [`Branch`].
//!
//! # Invariants
//! M1. Everything in memory here is a function of the applied entries, and is dropped when the state is replaced.
//! M2. The revision of a branch is the main revision of the last record in `etcd.revs`, or 1; it never goes back.
//! M3. A mark of an entry is set before its writes are readable, so a reader finds the revision of the index it pinned.
//!
//! # Crash
//! Nothing to repair: the state comes back by tables and log, and what is in memory is read from it again.

pub mod check;
pub mod command;
mod execute;
mod feed;
mod metas;
mod range;
pub mod record;
pub mod store;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_engine::{Apply, BranchId, LogIndex, Result as StoreResult, StateMachine};
use tokio::sync::mpsc;

use self::command::{append_answer, begin_answer, decode_command};
use self::execute::Execution;
pub use self::execute::{LEASE_TTL_MAX, LEASE_TTL_MIN, LeaseChange};
pub use self::feed::{Branch, Change, Changes, Published, Watching};
use self::record::{COMPACTION_KEY, Compaction, Rev, RevRecord, decode_lease, lease_key, split_lease_key};
use self::store::{ApplyStore, Reader, Space, SpaceIds, Store};
use crate::etcd::error::{Failure, Refusal};
use crate::proto::etcdserverpb as pb;

/// Lease changes that wait for the lessor, at most; beyond, it reads all leases again.
const LEASE_CHANGES_MAX: usize = 4096;

/// How far a branch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tip {
    /// The last revision; 1 when nothing was written.
    pub revision: i64,
    /// How far it is compacted.
    pub compaction: Compaction,
}

/// A lease changed in a branch, or so many did that they must be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseNews {
    /// One lease.
    Changed(BranchId, LeaseChange),
    /// All of them must be read again.
    Lost,
}

/// The state machine. Cloning gives another handle.
#[derive(Clone)]
pub struct Model {
    shared: Arc<Shared>,
}

struct Shared {
    ids: SpaceIds,
    branches: Mutex<BTreeMap<BranchId, Arc<Branch>>>,
    /// What entries did that are applied but not yet told to be readable, in order of indexes.
    staged: Mutex<Vec<Staged>>,
    lease_news: mpsc::Sender<LeaseNews>,
    lease_news_taken: Mutex<Option<mpsc::Receiver<LeaseNews>>>,
    /// The queue of lease news was full.
    lease_news_lost: AtomicBool,
}

struct Staged {
    index: LogIndex,
    branch: Arc<Branch>,
    revision: i64,
    changes: Vec<Arc<Changes>>,
    leases: Vec<LeaseChange>,
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is whole between any two statements: a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Model {
    /// A model for one group. It is told of the state by the group that it is given to.
    pub fn new() -> Self {
        let (lease_news, receiver) = mpsc::channel(LEASE_CHANGES_MAX);
        Self {
            shared: Arc::new(Shared {
                ids: SpaceIds::default(),
                branches: Mutex::default(),
                staged: Mutex::default(),
                lease_news,
                lease_news_taken: Mutex::new(Some(receiver)),
                lease_news_lost: AtomicBool::new(false),
            }),
        }
    }

    /// What readers of the group's snapshots need.
    pub fn space_ids(&self) -> &SpaceIds {
        &self.shared.ids
    }

    /// A branch, known or not.
    pub fn branch(&self, id: BranchId) -> Arc<Branch> {
        lock(&self.shared.branches).entry(id).or_insert_with(|| Arc::new(Branch::new(id))).clone()
    }

    /// Takes the stream of lease changes; once.
    pub(crate) fn take_lease_news(&self) -> Option<mpsc::Receiver<LeaseNews>> {
        lock(&self.shared.lease_news_taken).take()
    }

    /// Whether lease changes were dropped since the last call.
    pub(crate) fn take_lease_loss(&self) -> bool {
        self.shared.lease_news_lost.swap(false, Ordering::AcqRel)
    }

    /// Looks at a pinned state of a branch at `index`.
    pub async fn view<R: Reader>(&self, branch: BranchId, reader: R, index: LogIndex) -> StoreResult<View<R>> {
        let branch = self.branch(branch);
        let tip = match branch.tip_at(index) {
            Some(tip) => tip,
            None => {
                let tip = read_tip(&reader).await?;
                branch.learn(index, tip);
                tip
            }
        };
        Ok(View { reader, tip })
    }

    /// Applies a command to any store; what the state machine does with the engine's.
    pub(crate) async fn apply_to<S: Store>(
        &self,
        store: &mut S,
        index: LogIndex,
        command: Bytes,
    ) -> StoreResult<Bytes> {
        let (branch, requests) = decode_command(command)?;
        let branch = self.branch(branch);
        let outcome = self.apply_requests(store, index, &branch, requests).await;
        if outcome.is_err() {
            // Nothing was written: what was computed on the way is void.
            branch.forget();
        }
        outcome
    }

    async fn apply_requests<S: Store>(
        &self,
        store: &mut S,
        index: LogIndex,
        branch: &Arc<Branch>,
        requests: Vec<command::Request>,
    ) -> StoreResult<Bytes> {
        let before = match branch.tip() {
            Some(tip) => tip,
            None => read_tip(store).await?,
        };
        // Lost, and so empty for the next entry, on every way out but the last.
        let metas = branch.take_metas();
        let mut execution = Execution::new(store, before, index, branch.is_watched(), metas);
        let mut answer = begin_answer();
        for (ordinal, request) in requests.into_iter().enumerate() {
            let outcome = execution.run(request, ordinal as u64).await?;
            append_answer(&mut answer, &outcome);
        }
        let (tip, effects) = (execution.tip, execution.effects);
        branch.keep_metas(execution.metas);
        branch.mark(index, tip);
        if tip.revision != before.revision || !effects.leases.is_empty() {
            let staged = Staged {
                index,
                branch: branch.clone(),
                revision: tip.revision,
                changes: feed::group(effects.events),
                leases: effects.leases,
            };
            lock(&self.shared.staged).push(staged);
        }
        Ok(answer.freeze())
    }

    /// Tells watchers and the lessor what the entries up to `index` did.
    pub(crate) fn publish(&self, index: LogIndex) {
        self.shared.ids.settle();
        let mut staged = lock(&self.shared.staged);
        let ready = staged.partition_point(|staged| staged.index <= index);
        let ready: Vec<Staged> = staged.drain(..ready).collect();
        drop(staged);
        for Staged { branch, revision, changes, leases, .. } in ready {
            for change in leases {
                self.tell_lease(LeaseNews::Changed(branch.id(), change));
            }
            branch.publish(revision, changes);
        }
    }

    /// Drops everything read from the state that was.
    pub(crate) fn reset(&self) {
        lock(&self.shared.staged).clear();
        self.shared.ids.forget();
        for branch in lock(&self.shared.branches).values() {
            branch.reset();
        }
        self.tell_lease(LeaseNews::Lost);
    }

    fn tell_lease(&self, news: LeaseNews) {
        if self.shared.lease_news.try_send(news).is_err() {
            // Whoever drains the queue finds this and reads all leases again.
            self.shared.lease_news_lost.store(true, Ordering::Release);
        }
    }
}

impl StateMachine for Model {
    fn apply<'a>(
        &'a self,
        apply: &'a mut Apply,
        command: Bytes,
    ) -> Pin<Box<dyn Future<Output = StoreResult<Bytes>> + Send + 'a>> {
        Box::pin(async move {
            let index = apply.index();
            let mut store = ApplyStore::new(apply, &self.shared.ids)?;
            let outcome = self.apply_to(&mut store, index, command).await;
            if outcome.is_ok() {
                self.shared.ids.propose(&store);
            }
            outcome
        })
    }

    fn applied(&self, index: LogIndex) {
        self.publish(index);
    }

    fn restored(&self, index: LogIndex) {
        let _ = index;
        self.reset();
    }
}

/// Reads how far a state is.
async fn read_tip(reader: &impl Reader) -> StoreResult<Tip> {
    let last = reader.page(Space::Revs, Bound::Unbounded, Bound::Unbounded, true, 1).await?;
    let revision = match last.first() {
        Some((key, _)) => Rev::decode(key)?.main,
        None => 1,
    };
    let compaction = match reader.get(Space::Meta, COMPACTION_KEY).await? {
        Some(value) => Compaction::decode(&value)?,
        None => Compaction::default(),
    };
    Ok(Tip { revision, compaction })
}

/// A pinned state of a branch with its revision.
#[derive(Clone)]
pub struct View<R> {
    reader: R,
    tip: Tip,
}

impl<R: Reader> View<R> {
    /// How far the state is.
    pub fn tip(&self) -> Tip {
        self.tip
    }

    /// The state underneath.
    pub fn reader(&self) -> &R {
        &self.reader
    }

    /// Reads a range.
    ///
    /// # Errors
    /// `Compacted`, `FutureRevision`, `InvalidSortOption`; the store's.
    pub async fn range(&self, request: &pb::RangeRequest) -> Result<pb::RangeResponse, Failure> {
        range::range(&self.reader, &self.tip, request).await
    }

    /// Runs a transaction that only reads.
    pub async fn read_txn(&self, request: &pb::TxnRequest) -> Result<pb::TxnResponse, Failure> {
        execute::read_txn(&self.reader, &self.tip, request).await
    }

    /// Seconds granted to a lease, `None` if there is none.
    pub async fn lease_ttl(&self, id: i64) -> StoreResult<Option<i64>> {
        self.reader.get(Space::Leases, &lease_key(id)).await?.map(|value| decode_lease(&value)).transpose()
    }

    /// The keys that die with a lease, in order.
    pub async fn lease_keys(&self, id: i64) -> StoreResult<Vec<Bytes>> {
        execute::lease_keys(&self.reader, id).await
    }

    /// Up to `limit` leases after one of them, with the seconds granted.
    pub async fn leases(&self, after: Option<i64>, limit: usize) -> StoreResult<Vec<(i64, i64)>> {
        let after = after.map(lease_key);
        let lower = after.as_ref().map_or(Bound::Unbounded, |after| Bound::Excluded(&after[..]));
        let page = self.reader.page(Space::Leases, lower, Bound::Unbounded, false, limit).await?;
        page.into_iter().map(|(key, value)| Ok((split_lease_key(&key)?.0, decode_lease(&value)?))).collect()
    }

    /// The changes from a place on: up to `limit` records, in order.
    pub async fn changes(&self, from: Rev, limit: usize) -> StoreResult<Vec<(Rev, RevRecord)>> {
        let lower = from.encode();
        let page = self.reader.page(Space::Revs, Bound::Included(&lower), Bound::Unbounded, false, limit).await?;
        page.into_iter().map(|(key, value)| Ok((Rev::decode(&key)?, RevRecord::decode(&value)?))).collect()
    }

    /// The record at a place, `None` if it is collected.
    pub async fn record(&self, rev: Rev) -> StoreResult<Option<RevRecord>> {
        self.reader.get(Space::Revs, &rev.encode()).await?.map(|bytes| RevRecord::decode(&bytes)).transpose()
    }

    /// Refuses a revision that is compacted or not there yet; 0 is the present one.
    pub fn check_revision(&self, revision: i64) -> Result<i64, Refusal> {
        range::revision_of(revision, &self.tip)
    }
}

#[cfg(test)]
pub(super) mod tests;
