//! Puts batches that wait together into one entry of the log.
//!
//! # Place
//! between `Node::write` and the proposal of an entry
//! # Invariants
//! - P1. A batch goes into one entry, alone or with others, and is applied as if it had come alone: all or nothing by itself, and
//!   one with conditions behind those before it in the entry.
//! - P2. There is no timer: a batch that finds no entry under way goes at once. What arrives while one is forms the next entry,
//!   which goes behind it as soon as it is as large, or when the first is done. So few writers wait for nobody, and many
//!   make few large entries: two groups that take turns, never many small ones.
//! - P3. Whoever waits is answered: a driver that ends early, because the node closes, answers for what it leaves.
//! - P4. What waits is bounded by [`WAITING_BYTES_MAX`]; beyond it writers wait for room.
//!
//! # Cancel safety
//! A batch whose caller went away is proposed nevertheless.
//!
//! # Why not
//! an entry a batch: an entry costs every replica wakes of three threads, a record and an answer, about 30 microseconds of
//!   processor over three replicas, where a small batch inside a larger entry costs a sixth of it

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mainstay_engine::{Applied, Command, EncodedBatch, decode_refusals};
use mainstay_io::yield_once;
use openraft_rt::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::batching::{Batching, UnderWay};
use crate::node::Inner;
use crate::write::WRITE_TIMEOUT;
use crate::{Error, ErrorKind, Result, Runtime};

/// Batches in one entry.
const ENTRY_BATCHES_MAX: usize = 1024;
/// Bytes at which an entry takes no further batch.
const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Bytes of the batches that wait or are under way.
const WAITING_BYTES_MAX: usize = 64 << 20;
/// What a waiting batch counts besides its bytes.
const OVERHEAD_BYTES: usize = 256;

/// See the module.
pub(crate) struct Proposals<R: Runtime> {
    queue: Mutex<Queue<R>>,
    room: Arc<Semaphore>,
    /// From where the clock of the batching counts.
    since: R::Instant,
}

struct Queue<R: Runtime> {
    waiting: VecDeque<Waiting<R>>,
    batching: Batching,
}

struct Waiting<R: Runtime> {
    batch: EncodedBatch,
    /// After this it is not proposed any more.
    deadline: R::Instant,
    reply: oneshot::Sender<Result<Applied>>,
    _room: OwnedSemaphorePermit,
}

impl<R: Runtime> Default for Proposals<R> {
    fn default() -> Self {
        let queue = Mutex::new(Queue { waiting: VecDeque::new(), batching: Batching::default() });
        Self { queue, room: Arc::new(Semaphore::new(WAITING_BYTES_MAX)), since: R::Instant::now() }
    }
}

impl<R: Runtime> Proposals<R> {
    fn lock(&self) -> MutexGuard<'_, Queue<R>> {
        self.queue.lock().expect("nothing panics while it holds this lock")
    }

    fn now(&self) -> Duration {
        R::Instant::now().saturating_duration_since(self.since)
    }
}

impl<R: Runtime> Queue<R> {
    /// The batches of the next entry, whose record holds `bytes_max` of them; one at least if any waits.
    fn take(&mut self, bytes_max: usize) -> Vec<Waiting<R>> {
        let bytes = |waiting: &Waiting<R>| waiting.batch.bytes() + EncodedBatch::BESIDE_CONDITIONS_BYTES;
        let count = count_together(self.waiting.iter().map(bytes), bytes_max);
        self.waiting.drain(..count).collect()
    }
}

/// How many batches of these sizes, from the first on, one entry takes. Each of them fits into a record by itself; what they
/// are together must too, or the log refuses the entry and the node leaves service.
fn count_together(sizes: impl Iterator<Item = usize>, bytes_max: usize) -> usize {
    let bytes_max = bytes_max.min(ENTRY_BYTES_MAX);
    let (mut count, mut bytes) = (0, 0_usize);
    for size in sizes.take(ENTRY_BATCHES_MAX) {
        bytes = bytes.saturating_add(size);
        if count > 0 && bytes > bytes_max {
            break;
        }
        count += 1;
    }
    count
}

/// The right to have an entry under way.
struct Driver<R: Runtime> {
    inner: Arc<Inner<R>>,
    entry: Option<UnderWay>,
}

impl<R: Runtime> Drop for Driver<R> {
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        // Dropped before its end: the node closes.
        let mut queue = self.inner.proposals.lock();
        queue.batching.end(entry);
        let left = if queue.batching.is_idle() { std::mem::take(&mut queue.waiting) } else { VecDeque::new() };
        drop(queue);
        for waiting in left {
            let _ = waiting.reply.send(Err(Error::new(ErrorKind::Closed, "the node is closed")));
        }
    }
}

impl<R: Runtime> Inner<R> {
    pub(crate) async fn write_batch(self: &Arc<Self>, batch: EncodedBatch) -> Result<Applied> {
        self.running()?;
        let deadline = R::Instant::now() + WRITE_TIMEOUT;
        self.check_length(batch.bytes())?;
        let cost = (batch.bytes() + OVERHEAD_BYTES).min(WAITING_BYTES_MAX);
        let cost = u32::try_from(cost).expect("64 MiB at most");
        let room = match R::timeout_at(deadline, self.proposals.room.clone().acquire_many_owned(cost)).await {
            Ok(room) => room.expect("the semaphore is never closed"),
            Err(_) => {
                return Err(Error::new(ErrorKind::Unavailable, "too many writes wait: none was answered in time"));
            }
        };
        let (reply, answer) = oneshot::channel();
        let entry = {
            let mut queue = self.proposals.lock();
            queue.waiting.push_back(Waiting { batch, deadline, reply, _room: room });
            let waiting = queue.waiting.len();
            queue.batching.begin(waiting, self.proposals.now())
        };
        if entry.is_some() {
            let driver = Driver { inner: self.clone(), entry };
            self.spawn(async move { driver.run().await });
        }
        match answer.await {
            Ok(result) => result,
            // Its driver was dropped with the entry on its way.
            Err(_) => Err(Error::new(ErrorKind::Indeterminate, "the node closed before the write was answered")),
        }
    }
}

impl<R: Runtime> Driver<R> {
    /// Proposes entries until no other is worth it.
    async fn run(mut self) {
        let bytes_max = self.inner.command_bytes_max();
        loop {
            let taken = {
                let mut queue = self.inner.proposals.lock();
                let taken = queue.take(bytes_max);
                if let Some(entry) = &mut self.entry {
                    queue.batching.fill(entry, taken.len());
                }
                taken
            };
            self.propose_all(taken).await;
            // Those who were just answered are ready to run, and may want to write again.
            yield_once().await;
            let mut queue = self.inner.proposals.lock();
            if let Some(entry) = self.entry.take() {
                queue.batching.end(entry);
            }
            let waiting = queue.waiting.len();
            self.entry = queue.batching.begin(waiting, self.inner.proposals.now());
            if self.entry.is_none() {
                return;
            }
        }
    }

    async fn propose_all(&self, taken: Vec<Waiting<R>>) {
        let now = R::Instant::now();
        let mut batches = Vec::with_capacity(taken.len());
        let mut replies = Vec::with_capacity(taken.len());
        for Waiting { batch, deadline, reply, _room: room } in taken {
            if now < deadline {
                batches.push(batch);
                replies.push((reply, room));
            } else {
                let message = "no leader with a quorum was found in time";
                let _ = reply.send(Err(Error::new(ErrorKind::Unavailable, message)));
            }
        }
        if batches.is_empty() {
            return;
        }
        let command = Command::encode_batches(self.inner.now_ms(), &batches);
        drop(batches);
        let mut outcomes = outcomes(self.inner.propose(command, false).await, replies.len()).into_iter();
        for (reply, _room) in replies {
            let outcome = outcomes.next().expect("an outcome for each");
            let _ = reply.send(outcome);
        }
    }
}

/// What became of each of the batches of an entry.
fn outcomes(entry: Result<Applied>, count: usize) -> Vec<Result<Applied>> {
    let applied = match entry {
        Ok(applied) if count == 1 => return vec![Ok(applied)],
        Ok(applied) => applied,
        Err(error) => return vec![Err(error); count],
    };
    let refusals = match applied.response.map(|response| decode_refusals(&response)) {
        Ok(Ok(refusals)) => refusals,
        Ok(Err(error)) | Err(error) => {
            return vec![Ok(Applied { index: applied.index, response: Err(error) }); count];
        }
    };
    let mut outcomes = vec![Ok(Applied { index: applied.index, response: Ok(bytes::Bytes::new()) }); count];
    for (place, error) in refusals {
        if let Some(outcome) = outcomes.get_mut(place) {
            *outcome = Ok(Applied { index: applied.index, response: Err(error) });
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use mainstay_engine::LogIndex;

    use super::*;

    #[test]
    fn an_entry_takes_what_a_record_holds() {
        let check = |sizes: &[usize], bytes_max, expect| {
            assert_eq!(count_together(sizes.iter().copied(), bytes_max), expect, "{sizes:?} {bytes_max}");
        };
        check(&[], 100, 0);
        check(&[100], 100, 1);
        check(&[60, 40, 1], 100, 2);
        check(&[60, 41], 100, 1);
        // By itself it was found short enough for a record before, however long an entry may be otherwise.
        check(&[ENTRY_BYTES_MAX + 1, 1], 2 * ENTRY_BYTES_MAX, 1);
        check(&[ENTRY_BYTES_MAX / 2; 3], 2 * ENTRY_BYTES_MAX, 2);
        check(&[1; ENTRY_BATCHES_MAX + 1], ENTRY_BYTES_MAX, ENTRY_BATCHES_MAX);
    }

    #[test]
    fn an_entry_answers_for_each_of_its_batches() {
        let applied = |response| Applied { index: LogIndex(9), response };
        let unavailable = Error::new(ErrorKind::Unavailable, "no leader");
        assert!(outcomes(Err(unavailable), 2).iter().all(|outcome| outcome.is_err()));
        let all = outcomes(Ok(applied(Ok(Bytes::new()))), 3);
        assert!(all.iter().all(|outcome| outcome.as_ref().is_ok_and(|a| a.response.is_ok() && a.index == LogIndex(9))));
        // Place 1, not found, no message.
        let one = outcomes(Ok(applied(Ok(Bytes::from_static(&[1, 1, 0])))), 3);
        let refused: Vec<bool> = one.iter().map(|o| o.as_ref().is_ok_and(|a| a.response.is_err())).collect();
        assert_eq!(refused, [false, true, false]);
        let damaged = outcomes(Ok(applied(Ok(Bytes::from_static(&[0xff])))), 2);
        assert!(damaged.iter().all(|o| o.as_ref().is_ok_and(|a| a.response.is_err())));
    }
}
