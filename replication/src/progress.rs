//! How far this replica has applied, and who waits for it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use mainstay_engine::LogIndex;
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
}
