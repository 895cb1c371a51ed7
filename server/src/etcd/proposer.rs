//! Puts requests that wait together into one entry of the log.
//!
//! A request that finds no entry under way goes at once; while one is, the requests that arrive form the next entry, which goes
//! when [`Batching`] says so. There is no timer: an idle server adds no wait, a busy one writes few large entries. Each request
//! keeps its own revision and its own answer.
//!
//! # Cancel safety
//! A request whose caller went away is proposed nevertheless.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mainstay_engine::BranchId;
use mainstay_io::yield_once;
use mainstay_replication::{Batching, Durability, UnderWay};
use tokio::sync::oneshot;
use tonic::Status;

use super::backend::Backend;
use super::error::{Refusal, status_of};
use super::model::command::{Request, begin_command, decode_answer};

/// Requests in one entry.
const BATCH_REQUESTS_MAX: usize = 512;
/// Bytes at which an entry takes no further request.
const BATCH_BYTES_MAX: usize = 512 << 10;
/// Requests of a branch that wait; more are refused.
const WAITING_REQUESTS_MAX: usize = 16_384;
/// Bytes of the requests of a branch that wait; more are refused.
const WAITING_BYTES_MAX: usize = 64 << 20;

/// See the module. Cloning gives another handle.
#[derive(Clone)]
pub(super) struct Proposer<B> {
    backend: B,
    queues: Arc<Mutex<BTreeMap<BranchId, Queue>>>,
    /// From where the clock of the batching counts.
    since: Instant,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Batch>,
    waiting_requests: usize,
    waiting_bytes: usize,
    batching: Batching,
}

struct Batch {
    command: BytesMut,
    replies: Vec<oneshot::Sender<Result<Bytes, Status>>>,
}

impl Queue {
    fn push(
        &mut self,
        branch: BranchId,
        request: &Request,
    ) -> Result<oneshot::Receiver<Result<Bytes, Status>>, Refusal> {
        if self.waiting_requests >= WAITING_REQUESTS_MAX || self.waiting_bytes >= WAITING_BYTES_MAX {
            return Err(Refusal::TooManyRequests);
        }
        let open = self
            .waiting
            .back()
            .is_some_and(|last| last.replies.len() < BATCH_REQUESTS_MAX && last.command.len() < BATCH_BYTES_MAX);
        if !open {
            let command = begin_command(branch, request.message_bytes());
            self.waiting.push_back(Batch { command, replies: Vec::with_capacity(1) });
        }
        let batch = self.waiting.back_mut().expect("one was pushed if there was none");
        let before = batch.command.len();
        request.append_to(&mut batch.command);
        self.waiting_requests += 1;
        self.waiting_bytes += batch.command.len() - before;
        let (reply, answer) = oneshot::channel();
        batch.replies.push(reply);
        Ok(answer)
    }

    /// The next entry, if it is worth one now.
    fn begin(&mut self, now: Duration) -> Option<(Batch, UnderWay)> {
        let mut entry = self.batching.begin(self.waiting_requests, now)?;
        let batch = self.waiting.pop_front();
        self.batching.fill(&mut entry, batch.as_ref().map_or(0, |batch| batch.replies.len()));
        let Some(batch) = batch else {
            self.batching.end(entry);
            return None;
        };
        self.waiting_requests -= batch.replies.len();
        self.waiting_bytes = self.waiting_bytes.saturating_sub(batch.command.len());
        Some((batch, entry))
    }
}

impl<B: Backend> Proposer<B> {
    pub(super) fn new(backend: B) -> Self {
        Self { backend, queues: Arc::default(), since: Instant::now() }
    }

    /// Proposes a request and waits for its message.
    pub(super) async fn propose(&self, branch: BranchId, request: &Request) -> Result<Bytes, Status> {
        let answer = {
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            let queue = queues.entry(branch).or_default();
            let answer = queue.push(branch, request)?;
            if let Some((batch, entry)) = queue.begin(self.since.elapsed()) {
                tokio::spawn(self.clone().drive(branch, batch, entry));
            }
            answer
        };
        answer.await.unwrap_or_else(|_| Err(Refusal::Stopped.into()))
    }

    /// Proposes batches until no other is worth it.
    async fn drive(self, branch: BranchId, mut batch: Batch, mut entry: UnderWay) {
        loop {
            let outcome = self.backend.propose(branch, batch.command.freeze(), Durability::Quorum).await;
            match outcome.and_then(|answer| Ok(decode_answer(answer)?)) {
                Ok(items) => {
                    let mut items = items.into_iter();
                    for reply in batch.replies {
                        let item = items.next().ok_or_else(|| Status::internal("an answer has too few items"));
                        let _ = reply.send(item.and_then(|item| item.map_err(Status::from)));
                    }
                }
                Err(error) => {
                    let status = status_of(&error);
                    for reply in batch.replies {
                        let _ = reply.send(Err(status.clone()));
                    }
                }
            }
            // Those who were just answered are ready to run, and may want more.
            yield_once().await;
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(queue) = queues.get_mut(&branch) else { return };
            queue.batching.end(entry);
            match queue.begin(self.since.elapsed()) {
                Some(next) => (batch, entry) = next,
                None => {
                    if queue.batching.is_idle() {
                        queues.remove(&branch);
                    }
                    return;
                }
            }
        }
    }
}
