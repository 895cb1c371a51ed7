//! An operation in flight: a future, and a value that a thread can wait for.

use std::cell::RefCell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
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

struct Unpark {
    thread: Thread,
    woken: AtomicBool,
}

impl Unpark {
    fn new() -> Arc<Self> {
        Arc::new(Self { thread: std::thread::current(), woken: AtomicBool::new(false) })
    }
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.thread.unpark();
        }
    }
}

/// Runs `future` on the calling thread and parks it while the future waits.
///
/// The bridge from the synchronous API to the asynchronous one: a future that is ready at the first poll costs no
/// more than the poll. Calls may nest: each level has a wake-up flag of its own, so the inner one cannot consume the
/// outer one's.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    // Most of what is asked for is there: then nothing need be able to wake this thread.
    if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        return output;
    }
    thread_local! {
        static PARKER: RefCell<Option<Arc<Unpark>>> = const { RefCell::new(None) };
    }
    let parker = PARKER.with(|kept| kept.borrow_mut().take()).unwrap_or_else(Unpark::new);
    // An earlier use may have been woken after it had ended.
    parker.woken.store(false, Ordering::Release);
    let waker = Waker::from(parker.clone());
    let mut cx = Context::from_waker(&waker);
    let output = loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            break output;
        }
        while !parker.woken.swap(false, Ordering::AcqRel) {
            std::thread::park();
        }
    };
    PARKER.with(|kept| *kept.borrow_mut() = Some(parker));
    output
}

/// Lets the other tasks of the thread run, once, if they are ready. Work that takes long without waiting for anything calls it
/// between its steps: a task that a runtime has bound to the thread waits until then.
///
/// # Cancel safety
/// Cancel safe.
pub async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_before_and_after_the_wait() {
        let (op, done) = Op::pending();
        done.complete(Ok(7));
        assert_eq!(op.wait().expect("completed"), 7);

        let (op, done) = Op::pending();
        let thread = std::thread::spawn(move || done.complete(Ok(8)));
        assert_eq!(op.wait().expect("completed"), 8);
        thread.join().expect("no panic");
    }

    #[test]
    fn a_dropped_completer_answers_closed() {
        let (op, done) = Op::<()>::pending();
        drop(done);
        assert_eq!(op.wait().expect_err("nobody completed it").kind(), ErrorKind::Closed);
    }

    /// An inner wait used to eat the wake-up of the outer one: both shared the token of the thread.
    #[test]
    fn nested_waits_keep_their_wake_ups() {
        let (outer, outer_done) = Op::<u32>::pending();
        let mut outer = Box::pin(outer);
        let mut outer_done = Some(outer_done);
        let mut polls = 0;
        let value = block_on(std::future::poll_fn(|cx| {
            let polled = outer.as_mut().poll(cx);
            polls += 1;
            // The first poll has no waker of this thread yet.
            if polls == 2
                && let Some(done) = outer_done.take()
            {
                // Wakes the outer waker, then waits for something else on the same thread.
                done.complete(Ok(1));
                let (inner, inner_done) = Op::<u32>::pending();
                let thread = std::thread::spawn(move || inner_done.complete(Ok(2)));
                assert_eq!(inner.wait().expect("completed"), 2);
                thread.join().expect("no panic");
            }
            polled
        }));
        assert_eq!(value.expect("completed"), 1);
    }
}
