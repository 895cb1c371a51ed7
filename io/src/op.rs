//! An operation in flight: a future, and a value that a thread can wait for.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use crate::{Error, ErrorKind, Result};

/// An operation in flight.
///
/// # Cancel safety
/// Dropping it cancels nothing: the device keeps the buffer until the operation has completed.
#[must_use = "an operation that nobody waits for may fail unseen"]
pub struct Op<T>(State<T>);

enum State<T> {
    Ready(Option<Result<T>>),
    Pending(Arc<Slot<T>>),
}

struct Slot<T>(Mutex<SlotState<T>>);

struct SlotState<T> {
    result: Option<Result<T>>,
    waker: Option<Waker>,
}

impl<T> Slot<T> {
    /// A panic elsewhere while the lock was held cannot leave the two fields at odds: each is set in one step.
    fn lock(&self) -> MutexGuard<'_, SlotState<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device's end of an [`Op`]. Dropped without an answer it answers `Closed`.
pub struct Completer<T>(Option<Arc<Slot<T>>>);

impl<T> Op<T> {
    /// An operation that is already complete.
    pub fn ready(result: Result<T>) -> Self {
        Self(State::Ready(Some(result)))
    }

    /// An operation in flight and the end by which the device completes it.
    pub fn pending() -> (Self, Completer<T>) {
        let slot = Arc::new(Slot(Mutex::new(SlotState { result: None, waker: None })));
        (Self(State::Pending(slot.clone())), Completer(Some(slot)))
    }

    /// Blocks the calling thread until the operation is complete. Never call it from a task of the simulation.
    pub fn wait(self) -> Result<T> {
        block_on(self)
    }
}

impl<T> Unpin for Op<T> {}

impl<T> Future for Op<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Ready(result) => Poll::Ready(result.take().expect("an Op is not polled after it was ready")),
            State::Pending(slot) => {
                let mut state = slot.lock();
                match state.result.take() {
                    Some(result) => Poll::Ready(result),
                    None => {
                        match &mut state.waker {
                            Some(waker) => waker.clone_from(cx.waker()),
                            none => *none = Some(cx.waker().clone()),
                        }
                        Poll::Pending
                    }
                }
            }
        }
    }
}

impl<T> Completer<T> {
    /// Completes the operation and wakes who waits for it.
    pub fn complete(mut self, result: Result<T>) {
        if let Some(slot) = self.0.take() {
            Self::finish(&slot, result);
        }
    }

    fn finish(slot: &Slot<T>, result: Result<T>) {
        let mut state = slot.lock();
        state.result = Some(result);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Completer<T> {
    fn drop(&mut self) {
        if let Some(slot) = self.0.take() {
            Self::finish(&slot, Err(Error::new(ErrorKind::Closed, "complete", 0, 0, "the device went away")));
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `future` on the calling thread and parks it while the future waits.
///
/// The bridge from the synchronous API to the asynchronous one: a future that is ready at the first poll costs no
/// more than the poll.
pub fn block_on<F: Future>(future: F) -> F::Output {
    thread_local! {
        static WAKER: Waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    }
    let mut future = pin!(future);
    WAKER.with(|waker| {
        let mut cx = Context::from_waker(waker);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
                return output;
            }
            std::thread::park();
        }
    })
}
