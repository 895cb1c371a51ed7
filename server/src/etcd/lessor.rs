//! Who decides when a lease ends: the leader, by its own clock, and the log.
//!
//! The leader holds a deadline for each lease in memory. A keep-alive moves it; nothing is written. When it has passed, the
//! leader proposes the lease's end, and only that entry ends it, on all replicas alike.
//!
//! # Invariants
//! L1. A lease that was granted or kept alive for `ttl` seconds does not end by time before they are over: a new leader
//!     begins with the full time of every lease, as etcd does.
//! L2. Only a leader that a quorum has just confirmed keeps a lease alive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use mainstay_engine::BranchId;
use mainstay_replication::{Error, ErrorKind, ReadLevel, Result};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use super::backend::Backend;
use super::error::{Refusal, status_of};
use super::model::command::Request;
use super::model::{LeaseChange, LeaseNews};
use super::service::Core;
use crate::proto::etcdserverpb as pb;

/// Leases read from the store at a time.
const LEASES_PAGE: usize = 1024;
/// Leases that are ended at the same time; etcd's bound for a second.
const ENDING_MAX: usize = 500;
/// Until an end that could not be proposed is tried again; also how long new branches may go unnoticed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

const FORWARD_VERSION: u8 = 1;
const FORWARD_KEEP_ALIVE: u8 = 1;
const FORWARD_REMAINING: u8 = 2;

type LeaseId = (BranchId, i64);

/// The deadlines of a leader.
#[derive(Default)]
pub(super) struct Lessor(Mutex<State>);

#[derive(Default)]
struct State {
    /// The term in which this member leads and knows all leases.
    term: Option<u64>,
    leases: BTreeMap<LeaseId, Deadline>,
    order: BTreeSet<(Instant, LeaseId)>,
}

#[derive(Clone, Copy)]
struct Deadline {
    ttl: i64,
    at: Instant,
    /// The end has been proposed.
    ending: bool,
}

impl State {
    fn set(&mut self, lease: LeaseId, ttl: i64, now: Instant) {
        self.remove(lease);
        let at = now + Duration::from_secs(u64::try_from(ttl).unwrap_or(0).min(super::model::LEASE_TTL_MAX as u64));
        self.leases.insert(lease, Deadline { ttl, at, ending: false });
        self.order.insert((at, lease));
    }

    fn remove(&mut self, lease: LeaseId) {
        if let Some(before) = self.leases.remove(&lease) {
            self.order.remove(&(before.at, lease));
        }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes leases whose time is over out of the order; they stay known as ending.
    fn take_expired(&mut self, now: Instant, max: usize) -> Vec<LeaseId> {
        let mut expired = Vec::new();
        while expired.len() < max {
            let Some(&(at, lease)) = self.order.first().filter(|(at, _)| *at <= now) else { break };
            self.order.remove(&(at, lease));
            if let Some(deadline) = self.leases.get_mut(&lease) {
                deadline.ending = true;
            }
            expired.push(lease);
        }
        expired
    }
}

impl Lessor {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the time of a lease anew. `None` if there is no such lease or it is about to end.
    fn renew(&self, lease: LeaseId, term: u64) -> Result<Option<i64>> {
        let mut state = self.state();
        if state.term != Some(term) {
            return Err(not_ready());
        }
        let Some(deadline) = state.leases.get(&lease).copied().filter(|deadline| !deadline.ending) else {
            return Ok(None);
        };
        state.set(lease, deadline.ttl, Instant::now());
        Ok(Some(deadline.ttl))
    }

    /// Whole seconds left.
    fn remaining(&self, lease: LeaseId, term: u64) -> Result<Option<i64>> {
        let state = self.state();
        if state.term != Some(term) {
            return Err(not_ready());
        }
        Ok(state.leases.get(&lease).map(|deadline| {
            let left = deadline.at.saturating_duration_since(Instant::now());
            i64::try_from(left.as_secs()).unwrap_or(i64::MAX)
        }))
    }
}

fn not_ready() -> Error {
    Error::new(ErrorKind::Unavailable, "this member does not decide about leases now")
}

/// Keeps a lease alive, here or at the leader. `None` if it is not there.
pub(super) async fn keep_alive<B: Backend>(core: &Core<B>, branch: BranchId, id: i64) -> Result<Option<i64>, Status> {
    ask_leader(core, FORWARD_KEEP_ALIVE, (branch, id)).await.map_err(|error| status_of(&error))
}

/// Seconds left of a lease, known to the leader. `None` if it is not there.
pub(super) async fn remaining<B: Backend>(core: &Core<B>, branch: BranchId, id: i64) -> Result<Option<i64>, Status> {
    ask_leader(core, FORWARD_REMAINING, (branch, id)).await.map_err(|error| status_of(&error))
}

async fn ask_leader<B: Backend>(core: &Core<B>, what: u8, lease: LeaseId) -> Result<Option<i64>> {
    if core.facts().is_leader {
        return decide(core, what, lease).await;
    }
    let mut request = BytesMut::with_capacity(18);
    request.put_u8(FORWARD_VERSION);
    request.put_u8(what);
    request.put_u64_le(lease.0.0);
    request.put_i64_le(lease.1);
    let mut answer = core.backend.forward(request.freeze()).await?;
    match (answer.try_get_u8(), answer.try_get_u8()) {
        (Ok(FORWARD_VERSION), Ok(0)) => Ok(None),
        (Ok(FORWARD_VERSION), Ok(1)) => match answer.try_get_i64_le() {
            Ok(seconds) => Ok(Some(seconds)),
            Err(_) => Err(malformed()),
        },
        _ => Err(malformed()),
    }
}

fn malformed() -> Error {
    Error::new(ErrorKind::Internal, "a forwarded lease request or answer does not decode")
}

async fn decide<B: Backend>(core: &Core<B>, what: u8, lease: LeaseId) -> Result<Option<i64>> {
    // L2: confirmed as leader in this term, and everything before this moment is applied here.
    core.backend.read_barrier(ReadLevel::Linearizable).await?;
    let status = core.backend.status();
    if status.role != "leader" {
        return Err(not_ready());
    }
    match what {
        FORWARD_KEEP_ALIVE => core.lessor.renew(lease, status.term),
        FORWARD_REMAINING => core.lessor.remaining(lease, status.term),
        _ => Err(malformed()),
    }
}

/// Answers what another member asked in [`keep_alive`] or [`remaining`].
pub(super) async fn answer_forwarded<B: Backend>(core: &Core<B>, mut request: Bytes) -> Result<Bytes> {
    let mut parse = || {
        let version = request.try_get_u8().ok()?;
        let what = request.try_get_u8().ok()?;
        let branch = BranchId(request.try_get_u64_le().ok()?);
        let id = request.try_get_i64_le().ok()?;
        (version == FORWARD_VERSION).then_some((what, (branch, id)))
    };
    let (what, lease) = parse().ok_or_else(malformed)?;
    let mut answer = BytesMut::with_capacity(10);
    answer.put_u8(FORWARD_VERSION);
    match decide(core, what, lease).await? {
        None => answer.put_u8(0),
        Some(seconds) => {
            answer.put_u8(1);
            answer.put_i64_le(seconds);
        }
    }
    Ok(answer.freeze())
}

/// The task: follows leadership and leases, and ends what has expired.
pub(super) async fn run<B: Backend>(core: Arc<Core<B>>) {
    let Some(mut news) = core.model.take_lease_news() else { return };
    let mut facts = core.watch_facts();
    let mut branches: BTreeSet<BranchId> = BTreeSet::new();
    let mut ending = FuturesUnordered::new();
    loop {
        let (is_leader, term) = {
            let facts = facts.borrow_and_update();
            (facts.is_leader, facts.term)
        };
        let known = core.lessor.state().term;
        if !is_leader {
            if known.is_some() {
                core.lessor.state().clear();
                branches.clear();
            }
        } else if known != Some(term) {
            core.lessor.state().clear();
            branches = core.backend.branches().into_iter().collect();
            match load(&core, &branches).await {
                Ok(()) => core.lessor.state().term = Some(term),
                Err(status) => {
                    tracing::debug!(%status, "leases are not read yet");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                    continue;
                }
            }
        } else {
            follow_branches(&core, &mut branches).await;
            let now = Instant::now();
            let room = ENDING_MAX.saturating_sub(ending.len());
            let expired = core.lessor.state().take_expired(now, room);
            for lease in expired {
                ending.push(end(core.clone(), lease));
            }
        }
        let next = core.lessor.state().order.first().map(|(at, _)| *at).filter(|_| ending.len() < ENDING_MAX);
        let retry = Instant::now() + RETRY_INTERVAL;
        tokio::select! {
            () = tokio::time::sleep_until(next.map_or(retry, |next| next.min(retry))) => {}
            change = facts.changed() => if change.is_err() { return },
            changed = news.recv() => match changed {
                Some(changed) => take_news(&core, &mut news, changed),
                None => return,
            },
            Some(()) = ending.next() => {}
        }
    }
}

/// Applies what waits in the queue.
fn take_news<B: Backend>(core: &Core<B>, news: &mut mpsc::Receiver<LeaseNews>, first: LeaseNews) {
    let mut lost = core.model.take_lease_loss();
    let mut state = core.lessor.state();
    if state.term.is_some() {
        let now = Instant::now();
        let mut next = Some(first);
        while let Some(change) = next {
            match change {
                LeaseNews::Changed(branch, LeaseChange { id, ttl: Some(ttl) }) => state.set((branch, id), ttl, now),
                LeaseNews::Changed(branch, LeaseChange { id, ttl: None }) => state.remove((branch, id)),
                LeaseNews::Lost => lost = true,
            }
            next = news.try_recv().ok();
        }
        if lost {
            // Read again from the store, each with its full time.
            state.clear();
        }
    }
}

/// Reads all leases of the branches, each with its full time.
async fn load<B: Backend>(core: &Core<B>, branches: &BTreeSet<BranchId>) -> Result<(), Status> {
    core.backend.read_barrier(ReadLevel::Linearizable).await.map_err(|error| status_of(&error))?;
    for branch in branches {
        load_branch(core, *branch).await?;
    }
    Ok(())
}

async fn load_branch<B: Backend>(core: &Core<B>, branch: BranchId) -> Result<(), Status> {
    let view = core.view(branch).await?;
    let mut after = None;
    loop {
        let page = view.leases(after, LEASES_PAGE).await.map_err(|error| status_of(&error.into()))?;
        let now = Instant::now();
        let mut state = core.lessor.state();
        for (id, ttl) in &page {
            state.set((branch, *id), *ttl, now);
            after = Some(*id);
        }
        if page.len() < LEASES_PAGE {
            return Ok(());
        }
    }
}

/// Takes the leases of new clones on, and forgets those of dropped ones.
async fn follow_branches<B: Backend>(core: &Core<B>, known: &mut BTreeSet<BranchId>) {
    let now: BTreeSet<BranchId> = core.backend.branches().into_iter().collect();
    if now == *known {
        return;
    }
    let gone: Vec<BranchId> = known.difference(&now).copied().collect();
    for branch in gone {
        let mut state = core.lessor.state();
        let leases: Vec<LeaseId> =
            state.leases.range((branch, i64::MIN)..=(branch, i64::MAX)).map(|(lease, _)| *lease).collect();
        leases.into_iter().for_each(|lease| state.remove(lease));
        known.remove(&branch);
    }
    let new: Vec<BranchId> = now.difference(known).copied().collect();
    for branch in new {
        match load_branch(core, branch).await {
            Ok(()) => {
                known.insert(branch);
            }
            Err(status) => tracing::debug!(%status, %branch, "leases of a clone are not read yet"),
        }
    }
}

/// Proposes the end of a lease whose time is over.
async fn end<B: Backend>(core: Arc<Core<B>>, lease: LeaseId) {
    let request = Request::LeaseRevoke(pb::LeaseRevokeRequest { id: lease.1 });
    match core.propose(lease.0, &request).await {
        Ok(_) => {}
        Err(status) if status.message() == Refusal::LeaseNotFound.message() => core.lessor.state().remove(lease),
        Err(status) => {
            tracing::debug!(%status, lease = lease.1, "the end of a lease will be proposed again");
            let mut state = core.lessor.state();
            if let Some(deadline) = state.leases.get(&lease).copied() {
                // No keep-alive brings it back: its holder may have been told already.
                let at = Instant::now() + RETRY_INTERVAL;
                state.leases.insert(lease, Deadline { at, ..deadline });
                state.order.insert((at, lease));
            }
        }
    }
}
