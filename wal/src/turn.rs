//! A record that its own caller writes, while nobody else uses the log.
//!
//! # Place
//! beside [`Wal::append`], for a caller that blocks until its record is durable: it saves the way to the task of the log and back,
//! two changes of thread beside one write of the device
//! # Invariants
//! 1. A batch of a caller is one of the writer's: in flight like any other, behind which others may go, acknowledged by the prefix rule.
//! 2. A turn is given only while nothing is in flight and nothing waits, and is begun under the same locks: no record is overtaken.
//! 3. The lock of the writer is not held while the device writes: others queue meanwhile, and the task writes for them.
//! # Crash
//! as for every batch
//! # Why not
//! every record: callers that do not block would keep their thread, and those that come together would not share a batch

use std::sync::{Arc, Mutex, MutexGuard};

use mainstay_io::{Completer, IoClass, Op, Zone};

use crate::shared::{Pending, Queue};
use crate::wal::{Record, Wal};
use crate::writer::{Write, Writer, lock};
use crate::{OnDurable, Reserve};

/// The right to write one record, while the log is idle. Holds the log up: use it or drop it at once.
pub struct Turn<'a> {
    wal: &'a Wal,
    writer: MutexGuard<'a, Writer>,
    queue: MutexGuard<'a, Queue>,
}

/// A batch of the log that its owner has to write by [`OwnWrite::finish`].
///
/// # Cancel safety
/// Not cancel safe: dropped before its end, or with `finish` in the middle, it ends the log as a failed write does.
#[must_use = "the log waits for it"]
pub struct OwnWrite {
    writer: Arc<Mutex<Writer>>,
    zone: Zone,
    write: Write,
    done: Completer<()>,
}

impl Wal {
    /// The turn to write, if nothing is in flight or waits and the log takes records. Never blocks.
    pub fn turn(&self) -> Option<Turn<'_>> {
        let writer = self.writer.try_lock().ok().filter(|writer| writer.is_idle())?;
        let queue = self.shared.lock();
        let is_free = queue.waiting.is_empty() && !queue.closing && queue.ended.is_none();
        is_free.then_some(Turn { wal: self, writer, queue })
    }
}

impl Turn<'_> {
    /// As [`Wal::append`]; the record is on its way once the caller polls [`OwnWrite::finish`]. Nothing when it was refused: then
    /// `on_durable` has run. Otherwise it runs before `finish` has ended, on the caller's thread or on that of the log.
    pub fn append(mut self, record: Record, reserve: Reserve, on_durable: OnDurable) -> Option<OwnWrite> {
        let pending = Pending::new(record, reserve, on_durable);
        self.queue.queued_bytes = self.queue.queued_bytes.saturating_add(pending.cost());
        drop(self.queue);
        let (op, done) = Op::pending();
        let write = self.writer.begin_alone(pending, op)?;
        Some(OwnWrite { writer: self.wal.writer.clone(), zone: self.wal.zone.clone(), write, done })
    }
}

impl OwnWrite {
    /// Writes the batch, on the calling thread where the device can, and answers who waits for it.
    pub async fn finish(self) {
        let Self { writer, zone, write, done } = self;
        let Write { place, bytes, mode } = write;
        let outcome = zone.write_here(place, vec![bytes], mode, IoClass::Wal).await;
        // Wakes the task only if it has come to wait for this batch.
        done.complete(outcome);
        lock(&writer).run_for_task();
    }
}
