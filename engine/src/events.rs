//! What happens behind the writes, told to whoever listens.
//!
//! # Place
//! held by the engine; jobs, admission, upkeep and the healing tell, [`crate::Engine::events`] listens
//! # Invariants
//! 1. Telling never waits and takes no more memory than [`EVENTS_MAX`] events a listener: what goes beyond is dropped and counted.
//! 2. Without listeners an event costs one load.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use mainstay_wal::GroupId;
use tokio::sync::Notify;

use crate::{JobId, StallCause, TableId};

/// Events that wait for one listener.
pub const EVENTS_MAX: usize = 1024;

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The group that it happened to; none for the volume.
    pub group: Option<GroupId>,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// A flush began.
    FlushBegun {
        /// The job.
        job: JobId,
    },
    /// A flush ended: its tables are durable, or it failed.
    FlushEnded {
        /// The job.
        job: JobId,
        /// Bytes of the tables that it made.
        written_bytes: u64,
        /// How long it ran.
        took: Duration,
        /// Why it failed.
        failure: Option<String>,
    },
    /// A compaction began.
    CompactionBegun {
        /// The job.
        job: JobId,
        /// The level it takes from; 0 is L0.
        from: u8,
        /// The level it writes to.
        to: u8,
        /// Bytes of the tables that it reads.
        read_bytes: u64,
    },
    /// A compaction ended: its tables are durable, or it failed.
    CompactionEnded {
        /// The job.
        job: JobId,
        /// Bytes of the tables that it made.
        written_bytes: u64,
        /// How long it ran.
        took: Duration,
        /// Why it failed.
        failure: Option<String>,
    },
    /// A writer has to wait.
    StallBegun {
        /// For what.
        cause: StallCause,
    },
    /// That writer waits no longer.
    StallEnded {
        /// For what it had waited.
        cause: StallCause,
        /// How long.
        took: Duration,
    },
    /// The volume is full: writes are refused.
    Full,
    /// The volume has space again.
    HasSpace,
    /// A table was found damaged.
    TableDamaged {
        /// Which.
        table: TableId,
    },
    /// A damaged table was made anew from other replicas.
    TableHealed {
        /// Which.
        table: TableId,
    },
}

/// Who tells.
#[derive(Default)]
pub(crate) struct Teller {
    listeners: Mutex<Vec<Weak<Queue>>>,
    /// How many there were when last looked at.
    count: AtomicUsize,
    ended: AtomicBool,
}

#[derive(Default)]
struct Queue {
    events: Mutex<VecDeque<Event>>,
    dropped: AtomicU64,
    news: Notify,
    ended: AtomicBool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        // Every change is a push or a pop.
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Events from the call of [`crate::Engine::events`] on. Dropping it ends listening.
pub struct Events(Arc<Queue>);

impl Teller {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Queue>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn listen(&self) -> Events {
        let queue = Arc::new(Queue::default());
        let mut listeners = self.lock();
        // Under the lock: an end that is not seen here finds the queue in the list.
        queue.ended.store(self.ended.load(Ordering::Acquire), Ordering::Release);
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Arc::downgrade(&queue));
        self.count.store(listeners.len(), Ordering::Release);
        Events(queue)
    }

    pub(crate) fn tell(&self, group: Option<GroupId>, kind: impl FnOnce() -> EventKind) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let event = Event { group, kind: kind() };
        let mut listeners = self.lock();
        listeners.retain(|listener| {
            let Some(queue) = listener.upgrade() else { return false };
            let mut events = queue.lock();
            if events.len() < EVENTS_MAX {
                events.push_back(event.clone());
            } else {
                queue.dropped.fetch_add(1, Ordering::Relaxed);
            }
            drop(events);
            queue.news.notify_one();
            true
        });
        self.count.store(listeners.len(), Ordering::Release);
    }

    /// The volume is closed: who listens hears what waits, and then the end.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        for queue in self.lock().iter().filter_map(Weak::upgrade) {
            queue.ended.store(true, Ordering::Release);
            queue.news.notify_one();
        }
    }
}

impl Events {
    /// The next event; none when the volume was closed and nothing waits any more. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            let news = pin!(self.0.news.notified());
            // Before the queue is looked at: what is told before the end is there by then.
            let ended = self.0.ended.load(Ordering::Acquire);
            let next = self.0.lock().pop_front();
            if let Some(event) = next {
                return Some(event);
            }
            if ended {
                return None;
            }
            news.await;
        }
    }

    /// The next event if one waits.
    pub fn try_next(&mut self) -> Option<Event> {
        self.0.lock().pop_front()
    }

    /// Events that were dropped because [`EVENTS_MAX`] waited already.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("waiting", &self.0.lock().len()).field("dropped", &self.dropped()).finish()
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test has no executor")]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_does_not_listen_costs_a_bounded_queue() {
        let teller = Teller::default();
        let mut made = 0;
        teller.tell(None, || unreachable!("nobody listens"));
        let mut slow = teller.listen();
        for _ in 0..EVENTS_MAX + 5 {
            teller.tell(None, || {
                made += 1;
                EventKind::Full
            });
        }
        assert_eq!((made, slow.dropped()), (EVENTS_MAX + 5, 5));
        let mut late = teller.listen();
        assert_eq!(late.try_next(), None, "it hears what comes after it");
        teller.end();
        mainstay_io::block_on(async {
            for _ in 0..EVENTS_MAX {
                assert_eq!(slow.next().await.map(|event| event.kind), Some(EventKind::Full));
            }
            assert_eq!((slow.next().await, late.next().await), (None, None));
        });
        drop(slow);
        assert_eq!(mainstay_io::block_on(teller.listen().next()), None, "it has ended before");
    }
}
