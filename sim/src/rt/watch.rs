//! The watch channel of the runtime.
//!
//! # Why not
//! tokio's: it wakes receivers through a set of lists chosen by a process-wide random number, so that one
//! seed would not be one order. Its mpsc, oneshot and mutex are first come, first served, and are used as they are.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::task::{Poll, Waker};

use openraft_rt::watch::{RecvError, SendError};
use openraft_rt::{OptionalSend, OptionalSync, Watch, WatchReceiver, WatchSender};

/// The kind of channel.
#[derive(Debug)]
pub struct SimWatch;

struct Shared<T> {
    value: RwLock<T>,
    state: Mutex<State>,
}

struct State {
    version: u64,
    senders: usize,
    receivers: usize,
    receiver_next: u64,
    waiting: BTreeMap<u64, Waker>,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        let woken = {
            let mut state = self.lock();
            state.version += 1;
            std::mem::take(&mut state.waiting)
        };
        woken.into_values().for_each(Waker::wake);
    }

    fn modify<R>(&self, with: impl FnOnce(&mut T) -> R) -> R {
        // With one thread a lock that is taken will never be given back: say so and do not hang.
        with(&mut self.value.try_write().expect("a watched value is not written while it is borrowed"))
    }

    fn borrow(&self) -> SimRef<'_, T> {
        SimRef(self.value.try_read().expect("a watched value is not borrowed while it is written"))
    }
}

/// A borrowed value.
pub struct SimRef<'a, T>(RwLockReadGuard<'a, T>);

impl<T> Deref for SimRef<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// The writing end.
pub struct SimWatchSender<T>(Arc<Shared<T>>);

impl<T> Clone for SimWatchSender<T> {
    fn clone(&self) -> Self {
        self.0.lock().senders += 1;
        Self(self.0.clone())
    }
}

impl<T> Drop for SimWatchSender<T> {
    fn drop(&mut self) {
        let woken = {
            let mut state = self.0.lock();
            state.senders -= 1;
            if state.senders == 0 { std::mem::take(&mut state.waiting) } else { BTreeMap::new() }
        };
        woken.into_values().for_each(Waker::wake);
    }
}

/// The reading end.
pub struct SimWatchReceiver<T> {
    shared: Arc<Shared<T>>,
    id: u64,
    seen: u64,
}

impl<T> SimWatchReceiver<T> {
    fn new(shared: Arc<Shared<T>>, seen: Option<u64>) -> Self {
        let (id, seen) = {
            let mut state = shared.lock();
            state.receivers += 1;
            state.receiver_next += 1;
            (state.receiver_next, seen.unwrap_or(state.version))
        };
        Self { shared, id, seen }
    }
}

impl<T> Clone for SimWatchReceiver<T> {
    fn clone(&self) -> Self {
        Self::new(self.shared.clone(), Some(self.seen))
    }
}

impl<T> Drop for SimWatchReceiver<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.shared.lock();
            state.receivers -= 1;
            state.waiting.remove(&self.id)
        };
        drop(waker);
    }
}

impl Watch for SimWatch {
    type Sender<T: OptionalSend + OptionalSync> = SimWatchSender<T>;
    type Receiver<T: OptionalSend + OptionalSync> = SimWatchReceiver<T>;
    type Ref<'a, T: OptionalSend + 'a> = SimRef<'a, T>;

    fn channel<T: OptionalSend + OptionalSync>(init: T) -> (Self::Sender<T>, Self::Receiver<T>) {
        let state = State { version: 0, senders: 1, receivers: 0, receiver_next: 0, waiting: BTreeMap::new() };
        let shared = Arc::new(Shared { value: RwLock::new(init), state: Mutex::new(state) });
        (SimWatchSender(shared.clone()), SimWatchReceiver::new(shared, None))
    }
}

impl<T: OptionalSend + OptionalSync> WatchSender<SimWatch, T> for SimWatchSender<T> {
    fn send(&self, value: T) -> Result<(), SendError<T>> {
        if self.0.lock().receivers == 0 {
            return Err(SendError(value));
        }
        let old = self.0.modify(|current| std::mem::replace(current, value));
        drop(old);
        self.0.changed();
        Ok(())
    }

    fn send_if_modified<F>(&self, modify: F) -> bool
    where
        F: FnOnce(&mut T) -> bool,
    {
        let modified = self.0.modify(modify);
        if modified {
            self.0.changed();
        }
        modified
    }

    fn borrow_watched(&self) -> SimRef<'_, T> {
        self.0.borrow()
    }

    fn subscribe(&self) -> SimWatchReceiver<T> {
        SimWatchReceiver::new(self.0.clone(), None)
    }
}

impl<T: OptionalSend + OptionalSync> WatchReceiver<SimWatch, T> for SimWatchReceiver<T> {
    async fn changed(&mut self) -> Result<(), RecvError> {
        poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.version != self.seen {
                self.seen = state.version;
                return Poll::Ready(Ok(()));
            }
            if state.senders == 0 {
                return Poll::Ready(Err(RecvError(())));
            }
            let old = state.waiting.insert(self.id, cx.waker().clone());
            drop(state);
            drop(old);
            Poll::Pending
        })
        .await
    }

    fn borrow_watched(&self) -> SimRef<'_, T> {
        self.shared.borrow()
    }

    fn borrow_and_update(&mut self) -> SimRef<'_, T> {
        self.seen = self.shared.lock().version;
        self.shared.borrow()
    }
}
