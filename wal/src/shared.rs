//! What handles and the writer task share: the queue, the positions, the counts.
//!
//! # Place
//! handles push, the writer takes all at once; one lock, held for pushes and swaps only
//! # Invariants
//! 1. `start <= durable <= tail`, and each only grows.
//! 2. A record that was queued is answered exactly once, also when the writer task is dropped in the middle.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use mainstay_io::LatencyHistogram;

use crate::ring::Ring;
use crate::{Error, ErrorKind, Lsn, OnDurable, Record, Reserve, Result};

/// Bytes that may wait before [`crate::Wal::admit`] makes callers wait.
pub const QUEUED_BYTES_MAX: usize = 64 << 20;
/// What a queued record counts beyond its payload.
const QUEUED_OVERHEAD_BYTES: usize = 128;

/// A record that waits for its batch.
pub(crate) struct Pending {
    pub(crate) record: Record,
    pub(crate) payload_bytes: usize,
    pub(crate) reserve: Reserve,
    pub(crate) on_durable: OnDurable,
}

impl Pending {
    pub(crate) fn new(record: Record, reserve: Reserve, on_durable: OnDurable) -> Self {
        let payload_bytes = record.payload.iter().map(bytes::Bytes::len).sum();
        Self { record, payload_bytes, reserve, on_durable }
    }

    pub(crate) fn cost(&self) -> usize {
        self.payload_bytes.saturating_add(QUEUED_OVERHEAD_BYTES)
    }

    pub(crate) fn fail(self, error: Error) {
        (self.on_durable)(Err(error));
    }
}

#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) waiting: VecDeque<Pending>,
    /// Cost of all records that are not yet in a batch, those included that the writer has taken.
    pub(crate) queued_bytes: usize,
    /// The writer, when it sleeps and new records are a reason to wake: as soon as so many wait here.
    pub(crate) writer: Option<(Waker, usize)>,
    pub(crate) admits: Vec<Waker>,
    pub(crate) closers: Vec<Waker>,
    pub(crate) closing: bool,
    /// The writer has ended: by `close`, or by this failure.
    pub(crate) ended: Option<Result<()>>,
}

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) batches: AtomicU64,
    pub(crate) records: AtomicU64,
    pub(crate) payload_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) write_latency: LatencyHistogram,
    /// When the oldest write began that the device has not answered, in nanoseconds of the clock and one more; 0 for none.
    oldest_write: AtomicU64,
}

impl Counts {
    pub(crate) fn set_oldest_write(&self, begun: Option<Duration>) {
        let nanos = begun.map_or(0, |begun| u64::try_from(begun.as_nanos()).unwrap_or(u64::MAX - 1) + 1);
        self.oldest_write.store(nanos, Ordering::Relaxed);
    }

    pub(crate) fn oldest_write(&self) -> Option<Duration> {
        self.oldest_write.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_nanos)
    }
}

pub(crate) struct Shared {
    pub(crate) ring: Ring,
    queue: Mutex<Queue>,
    pub(crate) start: AtomicU64,
    pub(crate) durable: AtomicU64,
    pub(crate) tail: AtomicU64,
    pub(crate) counts: Counts,
}

impl Shared {
    pub(crate) fn new(ring: Ring, start: Lsn, end: Lsn) -> Self {
        Self {
            ring,
            queue: Mutex::default(),
            start: AtomicU64::new(start.0),
            durable: AtomicU64::new(end.0),
            tail: AtomicU64::new(end.0),
            counts: Counts::default(),
        }
    }

    /// The fields are set together under the lock by code that does not panic in between.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn start(&self) -> Lsn {
        Lsn(self.start.load(Ordering::Acquire))
    }

    pub(crate) fn durable(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::Acquire))
    }

    pub(crate) fn push(&self, pending: Pending) {
        let mut queue = self.lock();
        if queue.closing || queue.ended.is_some() {
            let error = queue.refusal();
            drop(queue);
            return pending.fail(error);
        }
        queue.queued_bytes = queue.queued_bytes.saturating_add(pending.cost());
        queue.waiting.push_back(pending);
        let waiting = queue.waiting.len();
        let writer = queue.writer.take_if(|(_, due)| waiting >= *due);
        drop(queue);
        if let Some((writer, _)) = writer {
            writer.wake();
        }
    }

    pub(crate) fn poll_admit(&self, cx: &Context<'_>) -> Poll<Result<()>> {
        let mut queue = self.lock();
        if queue.closing || queue.ended.is_some() {
            return Poll::Ready(Err(queue.refusal()));
        }
        if queue.queued_bytes < QUEUED_BYTES_MAX {
            return Poll::Ready(Ok(()));
        }
        remember(&mut queue.admits, cx);
        Poll::Pending
    }

    pub(crate) fn poll_close(&self, cx: &Context<'_>) -> Poll<Result<Lsn>> {
        let mut queue = self.lock();
        if let Some(ended) = &queue.ended {
            return Poll::Ready(ended.clone().map(|()| self.durable()));
        }
        remember(&mut queue.closers, cx);
        drop(queue);
        self.begin_close();
        Poll::Pending
    }

    /// Accepts nothing from here on; the writer ends once everything is answered.
    pub(crate) fn begin_close(&self) {
        let mut queue = self.lock();
        queue.closing = true;
        let writer = queue.writer.take();
        drop(queue);
        if let Some((writer, _)) = writer {
            writer.wake();
        }
    }

    /// Ends the log, by the first cause given: nothing is accepted from here on. Returns what still waited, for the
    /// caller to answer.
    pub(crate) fn end(&self, cause: Result<()>) -> VecDeque<Pending> {
        let mut queue = self.lock();
        queue.ended.get_or_insert(cause);
        queue.queued_bytes = 0;
        let waiting = std::mem::take(&mut queue.waiting);
        let wakers: Vec<Waker> = queue.admits.drain(..).collect();
        let closers: Vec<Waker> = queue.closers.drain(..).collect();
        drop(queue);
        wakers.into_iter().chain(closers).for_each(Waker::wake);
        waiting
    }
}

impl Queue {
    /// Why nothing is accepted any more.
    pub(crate) fn refusal(&self) -> Error {
        match &self.ended {
            Some(Err(cause)) => cause.as_closed(),
            _ => Error::new(ErrorKind::Closed, "the log is closed"),
        }
    }
}

fn remember(wakers: &mut Vec<Waker>, cx: &Context<'_>) {
    if !wakers.iter().any(|w| w.will_wake(cx.waker())) {
        wakers.push(cx.waker().clone());
    }
}
