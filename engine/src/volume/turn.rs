//! One at a time, for tasks: a lock that may be held across an await, without a runtime.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_io::{Completer, Op};

/// Who holds the turn, and who waits for it in order.
#[derive(Default)]
pub(crate) struct Turnstile(Mutex<State>);

#[derive(Default)]
struct State {
    busy: bool,
    waiting: VecDeque<Completer<()>>,
}

/// The turn; dropping it lets the next one in.
pub(crate) struct Turn(Arc<Turnstile>);

impl Turnstile {
    /// Waits for the turn. Dropping the future gives the place in the line up.
    pub(crate) async fn enter(self: &Arc<Self>) -> Turn {
        loop {
            let wait = {
                let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                if !state.busy {
                    state.busy = true;
                    return Turn(self.clone());
                }
                let (wait, completer) = Op::pending();
                state.waiting.push_back(completer);
                wait
            };
            // It only says that it is worth another try.
            let _ = wait.await;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.busy = false;
            std::mem::take(&mut state.waiting)
        };
        // All are woken: one that was dropped meanwhile must not swallow the turn. Updates are few.
        for completer in waiting {
            completer.complete(Ok(()));
        }
    }
}
