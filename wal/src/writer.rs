//! The one task that writes the log, and the writer that it runs.
//!
//! # Place
//! the task runs where completions of the device arrive; owned by the device, told to end by [`crate::Wal::close`]. Who has the
//! log to itself runs the writer too: see [`crate::turn`]
//! # Invariants
//! 1. One batch is one device write, durable by itself.
//! 2. A record is acknowledged when its batch and every batch before it are durable (prefix rule), in log order.
//! 3. The end of a batch is at most `IN_FLIGHT_SPAN_MAX` from the durable position unless the batch is alone in flight;
//!    recovery relies on it to know how far to look.
//! 4. After a failed write nothing is written and nothing is acknowledged.
//! 5. Behind batches in flight the next goes out once it is full or holds as many records as they do together; what they hold
//!    shrinks as they complete. A write costs the device much the same whatever its length, so many small ones would only queue
//!    there, and none is acknowledged before those in front of it.
//! # Why not
//! A timer, or a minimum for a batch that nothing is in front of: an idle log answers after one write.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use mainstay_io::{AlignedBuf, AlignedBytes, Clock, IoClass, Op, WriteMode, Zone};

use crate::batch::{HEADER_BYTES, Header, RECORD_HEADER_BYTES, WAL_FORMAT_VERSION, padded, put_record};
use crate::ring::IN_FLIGHT_SPAN_MAX;
use crate::shared::{Pending, Shared};
use crate::{Error, ErrorKind, Lsn, OnDurable, QUEUED_BYTES_MAX, RecordPos, Reserve, Result};

/// Rounds of a poll before others get their turn: a device that completes at once must not keep the thread.
const ROUNDS_MAX: usize = 64;

/// A batch that the device has.
struct InFlight {
    /// None once the write has completed.
    write: Option<Op<()>>,
    /// When the device got it.
    begun: Duration,
    end: Lsn,
    batch_bytes: u64,
    payload_bytes: u64,
    answers: Vec<(OnDurable, RecordPos)>,
}

/// What the next batch will hold.
struct Plan {
    count: usize,
    filled: usize,
    begin: Lsn,
}

pub(crate) struct Writer {
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
    zone: Zone,
    volume: [u8; 16],
    epoch: u64,
    chain: u64,
    in_flight_max: usize,
    batch_bytes_max: usize,
    /// Taken from the queue, not yet in a batch.
    waiting: VecDeque<Pending>,
    in_flight: VecDeque<InFlight>,
    /// Cost of what left the queue since the last time the lock was held.
    left_bytes: usize,
    tail: Lsn,
    ended: bool,
    /// Of the task, whoever runs the writer: what the writer waits for wakes the task. None before its first poll.
    task: Option<Waker>,
}

/// The task of the device. A lock held for no longer than a poll of it takes: never while the device writes.
pub(crate) struct WriterTask(pub(crate) Arc<Mutex<Writer>>);

/// A batch that is ready to be written.
pub(crate) struct Write {
    pub(crate) place: u64,
    pub(crate) bytes: AlignedBytes,
    pub(crate) mode: WriteMode,
}

/// Callbacks under the lock only set values and send. One that panicked would end the task, or be its caller's.
pub(crate) fn lock(writer: &Mutex<Writer>) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct WriterSettings {
    pub(crate) volume: [u8; 16],
    pub(crate) epoch: u64,
    pub(crate) chain: u64,
    pub(crate) tail: Lsn,
    pub(crate) in_flight_max: usize,
    pub(crate) batch_bytes_max: usize,
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, clock: Arc<dyn Clock>, zone: Zone, settings: WriterSettings) -> Self {
        let WriterSettings { volume, epoch, chain, tail, in_flight_max, batch_bytes_max } = settings;
        Self {
            shared,
            clock,
            zone,
            volume,
            epoch,
            chain,
            in_flight_max,
            batch_bytes_max,
            waiting: VecDeque::new(),
            in_flight: VecDeque::with_capacity(in_flight_max),
            left_bytes: 0,
            tail,
            ended: false,
            task: None,
        }
    }

    /// True when the task runs, and nothing is in flight or waits for it.
    pub(crate) fn is_idle(&self) -> bool {
        self.task.is_some() && !self.ended && self.in_flight.is_empty() && self.waiting.is_empty()
    }

    /// Makes a batch of `pending` alone. The writer is idle; the record counts as queued. Nothing if it was answered here. Whoever
    /// writes the batch completes `write`, and runs the writer.
    pub(crate) fn begin_alone(&mut self, pending: Pending, write: Op<()>) -> Option<Write> {
        self.waiting.push_back(pending);
        let Some(plan) = self.plan() else {
            let mut queue = self.shared.lock();
            queue.queued_bytes = queue.queued_bytes.saturating_sub(std::mem::take(&mut self.left_bytes));
            return None;
        };
        let batch = self.build(&plan, write);
        self.note_oldest();
        Some(batch)
    }

    /// Runs the writer in place of the task.
    pub(crate) fn run_for_task(&mut self) {
        let Some(task) = self.task.clone() else { return };
        if self.run(&mut Context::from_waker(&task)).is_ready() {
            // It has to end, and be dropped.
            task.wake();
        }
    }

    /// Moves all that waits out of the shared queue.
    fn take(&mut self) {
        let mut queue = self.shared.lock();
        queue.queued_bytes = queue.queued_bytes.saturating_sub(std::mem::take(&mut self.left_bytes));
        if self.waiting.is_empty() {
            std::mem::swap(&mut self.waiting, &mut queue.waiting);
        } else {
            self.waiting.append(&mut queue.waiting);
        }
        let admits = if queue.queued_bytes < QUEUED_BYTES_MAX { std::mem::take(&mut queue.admits) } else { vec![] };
        drop(queue);
        admits.into_iter().for_each(Waker::wake);
    }

    fn records_in_flight(&self) -> usize {
        self.in_flight.iter().map(|batch| batch.answers.len()).sum()
    }

    /// Prepares to sleep; false when there is something to do. The waker is left under the lock under which the queue
    /// was seen too short, with the length at which it is to wake. While nothing more can go to the device it is not left:
    /// then only a completion is a reason to wake.
    fn sleep(&mut self, cx: &Context<'_>) -> bool {
        let due = self.records_in_flight().max(1);
        let can_write = self.waiting.len() < due && self.in_flight.len() < self.in_flight_max;
        if !can_write {
            return true;
        }
        let missing = due - self.waiting.len();
        let mut queue = self.shared.lock();
        let idle = queue.waiting.len() < missing && !(queue.closing && self.in_flight.is_empty());
        if idle {
            queue.writer = Some((cx.waker().clone(), missing));
        }
        idle
    }

    /// Ends the log when its owner has closed it and everything is answered.
    fn finish(&mut self) -> bool {
        if self.in_flight.is_empty() && self.waiting.is_empty() {
            let queue = self.shared.lock();
            self.ended = queue.closing && queue.waiting.is_empty();
        }
        if self.ended {
            // Since `closing` is set nothing more is queued.
            self.shared.end(Ok(()));
        }
        self.ended
    }

    /// Chooses the records of the next batch. Those that can never be written or find no space are answered here.
    fn plan(&mut self) -> Option<Plan> {
        let ring = self.shared.ring;
        let start = self.shared.start();
        let durable = self.shared.durable();
        let mut plan = Plan { count: 0, filled: HEADER_BYTES, begin: self.tail };
        while let Some(next) = self.waiting.get(plan.count) {
            if next.payload_bytes > ring.record_bytes_max() {
                let max = ring.record_bytes_max();
                let message = format!("the record is too long bytes={} max={max}", next.payload_bytes);
                self.reject(plan.count, Error::new(ErrorKind::Invalid, message));
                continue;
            }
            let filled = plan.filled + RECORD_HEADER_BYTES + next.payload_bytes;
            let bytes = padded(filled as u64);
            let begin = ring.begin(self.tail, bytes);
            let end = begin.0 + bytes;
            let full = end - start.0 > ring.usable(next.reserve);
            let far = !self.in_flight.is_empty() && end - durable.0 > IN_FLIGHT_SPAN_MAX;
            if plan.count > 0 && (filled > self.batch_bytes_max || begin != plan.begin || full || far) {
                break;
            }
            if full {
                self.reject_full(next.reserve, end - start.0);
                continue;
            }
            if far {
                return None;
            }
            plan = Plan { count: plan.count + 1, filled, begin };
        }
        (plan.count > 0).then_some(plan)
    }

    fn reject(&mut self, index: usize, error: Error) {
        if let Some(pending) = self.waiting.remove(index) {
            self.left_bytes += pending.cost();
            pending.fail(error);
        }
    }

    /// The first waiting record finds no space. All that wait and may use no more than it go with it, so that a record
    /// never overtakes one that its owner queued before.
    fn reject_full(&mut self, reserve: Reserve, need: u64) {
        let ring = self.shared.ring.bytes();
        let message = format!("the log is full need_bytes={need} ring_bytes={ring}");
        tracing::warn!(need, ring, ?reserve, "a record found no space in the log");
        let error = Error::new(ErrorKind::OutOfSpace, message);
        let (refused, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|p| p.reserve <= reserve);
        self.waiting = kept;
        for pending in refused {
            self.left_bytes += pending.cost();
            pending.fail(error.clone());
        }
    }

    /// Builds the planned batch and gives it to the device.
    fn submit(&mut self, plan: &Plan) {
        // Replaced before anybody can poll it: the batch is built under the same lock.
        let Write { place, bytes, mode } = self.build(plan, Op::ready(Ok(())));
        let write = self.zone.write(place, vec![bytes], mode, IoClass::Wal);
        if let Some(batch) = self.in_flight.back_mut() {
            batch.write = Some(write);
        }
    }

    /// Builds the planned batch; it is in flight until `write` is complete.
    fn build(&mut self, plan: &Plan, write: Op<()>) -> Write {
        let batch_bytes = padded(plan.filled as u64);
        let mut buf = AlignedBuf::zeroed(batch_bytes as usize);
        let mut answers = Vec::with_capacity(plan.count);
        let mut offset = HEADER_BYTES;
        let mut payload_bytes = 0;
        for pending in self.waiting.drain(..plan.count) {
            self.left_bytes += pending.cost();
            payload_bytes += pending.payload_bytes as u64;
            let length = pending.payload_bytes as u32;
            let pos = RecordPos { batch: plan.begin, offset: offset as u32, length };
            offset = put_record(&mut buf, offset, plan.begin, &pending.record, pending.payload_bytes);
            answers.push((pending.on_durable, pos));
        }
        assert!(offset == plan.filled, "batch filled to {offset}, planned {}", plan.filled);
        let mut header = Header {
            version: WAL_FORMAT_VERSION,
            records: plan.count as u32,
            volume: self.volume,
            epoch: self.epoch,
            lsn: plan.begin,
            follows: self.tail,
            durable: self.shared.durable(),
            chain: self.chain,
            batch_bytes: batch_bytes as u32,
            payload_bytes: (plan.filled - HEADER_BYTES) as u32,
            body_checksum: 0,
            checksum: 0,
        };
        self.chain = header.seal(&mut buf);
        let end = header.end();
        let start = self.shared.start();
        assert!(end.0 - start.0 <= self.shared.ring.bytes(), "batch to {end} overwrites the log from {start}");
        self.tail = end;
        self.shared.tail.store(end.0, Ordering::Release);
        let place = self.shared.ring.place(plan.begin);
        if mainstay_io::mutant!(AckBeforeSync) {
            answers.drain(..).for_each(|(answer, pos): (crate::OnDurable, _)| answer(Ok(pos)));
        }
        let mode = if mainstay_io::mutant!(CachedLog) { WriteMode::Cached } else { WriteMode::Durable };
        let begun = self.clock.now();
        self.in_flight.push_back(InFlight { write: Some(write), begun, end, batch_bytes, payload_bytes, answers });
        Write { place, bytes: buf.freeze(), mode }
    }

    fn note_oldest(&self) {
        let oldest = self.in_flight.iter().find(|batch| batch.write.is_some());
        self.shared.counts.set_oldest_write(oldest.map(|batch| batch.begun));
    }

    /// Polls the writes in flight and moves those that are durable with all before them to `done`.
    fn complete(&mut self, cx: &mut Context<'_>, done: &mut Vec<InFlight>) -> Result<()> {
        for batch in &mut self.in_flight {
            if let Some(write) = &mut batch.write
                && let Poll::Ready(result) = Pin::new(write).poll(cx)
            {
                batch.write = None;
                result?;
                if mainstay_io::mutant!(AckOutOfOrder) {
                    batch.answers.drain(..).for_each(|(answer, pos)| answer(Ok(pos)));
                }
                self.shared.counts.write_latency.record(self.clock.now().saturating_sub(batch.begun));
            }
        }
        while self.in_flight.front().is_some_and(|batch| batch.write.is_none()) {
            let Some(batch) = self.in_flight.pop_front() else { break };
            let counts = &self.shared.counts;
            counts.batches.fetch_add(1, Ordering::Relaxed);
            counts.records.fetch_add(batch.answers.len() as u64, Ordering::Relaxed);
            counts.payload_bytes.fetch_add(batch.payload_bytes, Ordering::Relaxed);
            counts.written_bytes.fetch_add(batch.batch_bytes, Ordering::Relaxed);
            self.shared.durable.store(batch.end.0, Ordering::Release);
            done.push(batch);
        }
        Ok(())
    }

    /// Ends the log for good and answers everything that is not acknowledged.
    fn fail(&mut self, cause: Error) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        tracing::error!(error = %cause, "the log is closed by a failure");
        self.shared.counts.set_oldest_write(None);
        let queued = self.shared.end(Err(cause.clone()));
        for batch in std::mem::take(&mut self.in_flight) {
            for (answer, _) in batch.answers {
                answer(Err(cause.clone()));
            }
        }
        for pending in std::mem::take(&mut self.waiting).into_iter().chain(queued) {
            pending.fail(cause.as_closed());
        }
    }
}

impl Future for WriterTask {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut writer = lock(&self.0);
        match &mut writer.task {
            Some(task) => task.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        writer.run(cx)
    }
}

impl Writer {
    /// Completes, answers and submits until there is nothing to do. Ready when the log has ended.
    fn run(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut done = Vec::new();
        for _ in 0..ROUNDS_MAX {
            if self.ended {
                return Poll::Ready(());
            }
            if let Err(cause) = self.complete(cx, &mut done) {
                self.answer(&mut done);
                self.fail(cause);
                return Poll::Ready(());
            }
            let mut submitted = false;
            while self.in_flight.len() < self.in_flight_max {
                self.take();
                let Some(plan) = self.plan() else { break };
                if plan.count == self.waiting.len() && plan.count < self.records_in_flight() {
                    break;
                }
                self.submit(&plan);
                submitted = true;
            }
            let answered = !done.is_empty();
            self.answer(&mut done);
            if submitted || answered {
                self.note_oldest();
                continue;
            }
            if self.finish() {
                return Poll::Ready(());
            }
            if self.sleep(cx) {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn answer(&self, done: &mut Vec<InFlight>) {
        for batch in done.drain(..) {
            for (answer, pos) in batch.answers {
                answer(Ok(pos));
            }
        }
    }
}

impl Drop for WriterTask {
    /// The device dropped the task before its end: whoever waits must hear of it.
    fn drop(&mut self) {
        lock(&self.0).fail(Error::new(ErrorKind::Closed, "the device ended the task of the log"));
    }
}
