//! What a read waits for.
//!
//! # Invariants
//! - D1. A linearizable read begins after its round began: a round serves only reads that waited when it started.
//! - D2. `Lease` falls back to a round when the lease is over (pitfall 10: it assumes clocks of bounded rate; the
//!   default never does).
//! - D3. Followers and learners ask the leader for the read index and wait until they have applied it.
//! - D4. A read of bounded staleness leans on a round that began here no longer ago than the bound, and on nothing that a
//!   leader said unasked: how long such a message was under way nobody here knows. A lease is no such round.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_engine::LogIndex;
use openraft::ReadPolicy;
use openraft::errors::{LinearizableReadError, RaftError};
use openraft_rt::Instant;
use tokio::sync::oneshot;

use crate::network::method;
use crate::node::{Inner, Running};
use crate::wire::{Writer, decode_result};
use crate::{Error, ErrorKind, NodeId, ReadLevel, Result, Runtime};

/// How long a read looks for a leader with a quorum, and waits for the applier.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one request to the leader may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before a read that met no leader asks again.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Reads that wait for one round.
const ROUND_READS_MAX: usize = 1 << 16;

type Waiter = oneshot::Sender<Result<LogIndex>>;

/// Reads that wait for the next round; while a round is under way, for the one after it.
#[derive(Default)]
pub(crate) struct Rounds(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiter>,
    at_work: bool,
}

fn too_late() -> Error {
    Error::new(ErrorKind::Unavailable, "no quorum answered the read in time")
}

impl<R: Runtime> Inner<R> {
    pub(crate) async fn read_barrier(self: &Arc<Self>, level: ReadLevel) -> Result<LogIndex> {
        self.check_holds_data()?;
        if self.group.is_diverged() {
            let message = "this replica holds other tables than the log says and fetches them: ask another";
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        let index = match level {
            ReadLevel::Local => {
                if self.closing.is_set() {
                    return Err(Error::new(ErrorKind::Closed, "the node is closed"));
                }
                return Ok(self.group.applied());
            }
            ReadLevel::Stale(lag_max) => match self.fresh_enough(lag_max) {
                Some(index) => return Ok(index),
                None => self.read_index(false).await?,
            },
            ReadLevel::AtLeast(index) => index,
            ReadLevel::Linearizable => self.read_index(false).await?,
            ReadLevel::Lease => self.read_index(true).await?,
        };
        if mainstay_io::mutant!(ReadUnapplied) {
            return Ok(self.progress.applied());
        }
        match R::timeout(READ_TIMEOUT, self.progress.reached(index)).await {
            Ok(result) => result?,
            Err(_) => {
                let message = format!("the entry is not applied here yet index={index}");
                return Err(Error::new(ErrorKind::Unavailable, message));
            }
        }
        Ok(self.progress.applied())
    }

    /// The applied index, if it holds everything that was acknowledged up to `lag_max` ago (D4).
    fn fresh_enough(&self, lag_max: Duration) -> Option<LogIndex> {
        if self.closing.is_set() {
            return None;
        }
        let (began, index) = (*self.fresh.lock().expect("nothing panics while it holds this lock"))?;
        let applied = self.progress.applied();
        (applied >= index && R::Instant::now().saturating_duration_since(began) <= lag_max).then_some(applied)
    }

    async fn read_index(self: &Arc<Self>, lease: bool) -> Result<LogIndex> {
        if lease {
            // On the leader no message is needed; elsewhere it costs one to the leader.
            let running = self.running()?;
            if self.leader_of(&running) == Some(running.id)
                && let Some(index) = self.lease_index(&running).await
            {
                return Ok(index);
            }
        }
        let wait = {
            let mut queue = self.rounds(lease).0.lock().expect("nothing panics while it holds this lock");
            if queue.waiting.len() >= ROUND_READS_MAX {
                return Err(Error::new(ErrorKind::Unavailable, "too many reads wait"));
            }
            let (tx, rx) = oneshot::channel();
            queue.waiting.push(tx);
            if !queue.at_work {
                queue.at_work = true;
                let this = self.clone();
                self.spawn(async move { this.run_rounds(lease).await });
            }
            rx
        };
        wait.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Closed, "the node is closed")))
    }

    /// Reads that may lean on the lease have rounds of their own: the others must not.
    fn rounds(&self, lease: bool) -> &Rounds {
        if lease { &self.lease_rounds } else { &self.rounds }
    }

    /// One round after the other while reads wait (D1).
    async fn run_rounds(self: Arc<Self>, lease: bool) {
        loop {
            let waiting = {
                let mut queue = self.rounds(lease).0.lock().expect("nothing panics while it holds this lock");
                if queue.waiting.is_empty() {
                    queue.at_work = false;
                    return;
                }
                std::mem::take(&mut queue.waiting)
            };
            let began = R::Instant::now();
            let result = self.round(lease).await;
            if let (Ok(index), false) = (&result, lease) {
                *self.fresh.lock().expect("nothing panics while it holds this lock") = Some((began, *index));
            }
            for waiter in waiting {
                // A dropped receiver has given up.
                let _ = waiter.send(result.clone());
            }
        }
    }

    async fn round(self: &Arc<Self>, lease: bool) -> Result<LogIndex> {
        let deadline = R::Instant::now() + READ_TIMEOUT;
        loop {
            let running = self.running()?;
            let result = match self.leader_of(&running) {
                Some(id) if id == running.id => self.leader_read_index(false).await,
                Some(id) => {
                    let mut body = Writer::new();
                    body.bool(lease);
                    let answer = self.call_member(NodeId(id), method::READ_INDEX, body.finish(), CALL_TIMEOUT).await;
                    answer.and_then(|bytes| decode_result(&bytes, |r| Ok(LogIndex(r.u64()?))))
                }
                None => Err(too_late()),
            };
            match result {
                Ok(index) => return Ok(index),
                // A read changes nothing, so whatever went wrong on the way is tried again.
                Err(e)
                    if matches!(e.kind(), ErrorKind::NotLeader | ErrorKind::Unavailable | ErrorKind::Indeterminate) =>
                {
                    if R::Instant::now() + RETRY_PAUSE >= deadline {
                        return Err(too_late());
                    }
                }
                Err(e) => return Err(e),
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    async fn lease_index(&self, running: &Running<R>) -> Option<LogIndex> {
        if mainstay_io::mutant!(StaleLease) {
            return Some(self.group.applied());
        }
        self.note_use();
        let linearizer = running.raft.get_read_linearizer(ReadPolicy::LeaseRead).await.ok()?;
        Some(LogIndex(linearizer.read_log_id().index()))
    }

    /// The read index of the leader, which this node is.
    pub(crate) async fn leader_read_index(self: &Arc<Self>, lease: bool) -> Result<LogIndex> {
        let running = self.running()?;
        if self.leader_of(&running) != Some(running.id) {
            return Err(self.not_leader(&running));
        }
        // The round is an append to each follower, and the news of the commit may be one that a follower waits for.
        let _hurrying = self.hurry.begin();
        if lease && let Some(index) = self.lease_index(&running).await {
            return Ok(index);
        }
        if mainstay_io::mutant!(ReadIndexAlone) {
            return Ok(self.group.applied());
        }
        self.note_use();
        if !self.may_have_majority(&running) {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "no quorum confirms the leader: too few of the others are heard",
            ));
        }
        let round = running.raft.get_read_linearizer(ReadPolicy::ReadIndex);
        match R::timeout(READ_TIMEOUT, round).await {
            Ok(Ok(linearizer)) => Ok(LogIndex(linearizer.read_log_id().index())),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_)))) => Err(self.not_leader(&running)),
            Ok(Err(error)) => {
                Err(Error::new(ErrorKind::Unavailable, format!("no quorum confirms the leader: {error}")))
            }
            Err(_) => Err(too_late()),
        }
    }
}
