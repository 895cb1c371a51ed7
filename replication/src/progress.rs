//! How far this replica has applied, and who waits for it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_engine::LogIndex;
use mainstay_io::{Clock, LatencyHistogram};
use tokio::sync::oneshot;

use crate::{Error, ErrorKind, Result};

/// Reads that wait for the applier at once.
const WAITERS_MAX: usize = 1 << 16;

#[derive(Debug, Default)]
struct Waiters {
    by_index: BTreeMap<(u64, u64), oneshot::Sender<()>>,
    next: u64,
    closed: bool,
}

/// The applied index. The state machine advances it, reads wait for it.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    applied: AtomicU64,
    waiters: Mutex<Waiters>,
}

impl Progress {
    pub(crate) fn applied(&self) -> LogIndex {
        LogIndex(self.applied.load(Ordering::Acquire))
    }

    /// Everything up to `index` can be read.
    pub(crate) fn advance(&self, index: u64) {
        if self.applied.fetch_max(index, Ordering::AcqRel) >= index {
            return;
        }
        let mut waiters = self.waiters.lock().expect("nothing panics while it holds this lock");
        if waiters.by_index.is_empty() {
            return;
        }
        let later = waiters.by_index.split_off(&(index + 1, 0));
        let ready = std::mem::replace(&mut waiters.by_index, later);
        drop(waiters);
        for waiter in ready.into_values() {
            // A dropped receiver has given up.
            let _ = waiter.send(());
        }
    }

    /// Wakes all who wait: the node takes no further part.
    pub(crate) fn close(&self) {
        let mut waiters = self.waiters.lock().expect("nothing panics while it holds this lock");
        waiters.closed = true;
        waiters.by_index.clear();
    }

    /// Waits until `index` is applied here. Cancel safe.
    pub(crate) async fn reached(&self, index: LogIndex) -> Result<()> {
        let wait = {
            // Under the lock, so that an advance either is seen here or finds the waiter.
            let mut waiters = self.waiters.lock().expect("nothing panics while it holds this lock");
            if self.applied() >= index {
                return Ok(());
            }
            if waiters.closed {
                return Err(Error::new(ErrorKind::Closed, "the node is closed"));
            }
            if waiters.by_index.len() >= WAITERS_MAX {
                waiters.by_index.retain(|_, w| !w.is_closed());
                if waiters.by_index.len() >= WAITERS_MAX {
                    return Err(Error::new(ErrorKind::Unavailable, "too many reads wait for the applier"));
                }
            }
            let (tx, rx) = oneshot::channel();
            let key = (index.0, waiters.next);
            waiters.next += 1;
            waiters.by_index.insert(key, tx);
            rx
        };
        wait.await.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))
    }
}

/// How long entries wait here between the news of their commit and their end in the applier. A sample at a time: the first
/// commit that is heard of while none is followed.
pub(crate) struct ApplyLag {
    clock: Arc<dyn Clock>,
    /// The index that is followed, and since when.
    followed: Mutex<Option<(u64, Duration)>>,
    /// The same index, or one that is never applied: the applier looks here before it takes the lock.
    index: AtomicU64,
    pub(crate) histogram: LatencyHistogram,
}

impl ApplyLag {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            followed: Mutex::new(None),
            index: AtomicU64::new(u64::MAX),
            histogram: LatencyHistogram::default(),
        }
    }

    /// Everything up to `index` is known to be committed.
    pub(crate) fn committed(&self, index: u64) {
        let mut followed = self.followed.lock().expect("nothing panics while it holds this lock");
        if followed.is_none() {
            *followed = Some((index, self.clock.now()));
            self.index.store(index, Ordering::Release);
        }
    }

    /// Everything up to `index` is applied.
    pub(crate) fn applied(&self, index: u64) {
        if index < self.index.load(Ordering::Acquire) {
            return;
        }
        let mut followed = self.followed.lock().expect("nothing panics while it holds this lock");
        if let Some((_, since)) = followed.take_if(|(followed, _)| *followed <= index) {
            self.index.store(u64::MAX, Ordering::Release);
            self.histogram.record(self.clock.now().saturating_sub(since));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_wakes_at_its_index_and_not_before() {
        let progress = Progress::default();
        let mut wait = Box::pin(progress.reached(LogIndex(5)));
        let waker = futures_util::task::noop_waker();
        let mut context = std::task::Context::from_waker(&waker);
        assert!(wait.as_mut().poll(&mut context).is_pending());
        progress.advance(4);
        assert!(wait.as_mut().poll(&mut context).is_pending());
        progress.advance(7);
        assert!(wait.as_mut().poll(&mut context).is_ready());
        assert!(Box::pin(progress.reached(LogIndex(7))).as_mut().poll(&mut context).is_ready());
        let mut late = Box::pin(progress.reached(LogIndex(8)));
        assert!(late.as_mut().poll(&mut context).is_pending());
        progress.close();
        assert!(late.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn lag_is_the_time_from_commit_to_apply_of_one_entry_at_a_time() {
        let clock = Arc::new(mainstay_io::sim::SimClock::new(Duration::ZERO));
        let lag = ApplyLag::new(clock.clone());
        lag.applied(3);
        assert_eq!(lag.histogram.counts().total(), 0, "nobody said that it was committed");
        lag.committed(5);
        clock.advance(Duration::from_millis(2));
        lag.committed(9);
        lag.applied(4);
        assert_eq!(lag.histogram.counts().total(), 0);
        clock.advance(Duration::from_millis(1));
        lag.applied(5);
        assert_eq!((lag.histogram.counts().total(), lag.histogram.counts().sum), (1, Duration::from_millis(3)));
        lag.committed(12);
        lag.applied(20);
        assert_eq!((lag.histogram.counts().total(), lag.histogram.counts().sum), (2, Duration::from_millis(3)));
    }
}
