//! The thread behind [`Clock::sleep`](crate::Clock::sleep) of the operating system's clock.
//!
//! # Place
//! owned by the clock: started by the first sleep, ended when the clock is dropped
//! # Invariants
//! 1. A sleep that was begun is completed once, at its time or when the clock goes away.
//! 2. Sleeps are few: each is of a background task that has one at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{BoxFuture, Completer, Op, threads};

#[derive(Default)]
struct State {
    /// By the time to wake, then by the order of calls.
    sleeps: BTreeMap<(Instant, u64), Completer<()>>,
    next: u64,
    running: bool,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is an insert, a remove or a flag.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            let due = state.sleeps.first_key_value().map(|(at, _)| at.0);
            state = match due {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) if at > now => {
                    self.changed.wait_timeout(state, at - now).unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    let first = state.sleeps.pop_first();
                    drop(state);
                    if let Some((_, sleep)) = first {
                        sleep.complete(Ok(()));
                    }
                    self.lock()
                }
            };
        }
    }
}

/// Completes sleeps at their time.
#[derive(Default)]
pub(crate) struct Timer(Arc<Shared>);

impl Timer {
    pub(crate) fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let (sleep, completer) = Op::pending();
        let mut state = self.0.lock();
        let number = state.next;
        state.next += 1;
        let now = Instant::now();
        let at = now.checked_add(duration).unwrap_or(now + Duration::from_secs(365 * 86_400));
        state.sleeps.insert((at, number), completer);
        let start = !std::mem::replace(&mut state.running, true);
        drop(state);
        if start {
            let shared = self.0.clone();
            if let Err(error) = threads::spawn("mainstay-timer", move || shared.run()) {
                // Without a thread nobody would ever wake: what sleeps goes on at once instead, and tries again.
                tracing::error!(%error, "the timer needs a thread");
                let mut state = self.0.lock();
                state.running = false;
                state.sleeps.clear();
            }
        } else {
            self.0.changed.notify_one();
        }
        Box::pin(async move {
            // A completer that was dropped answers too: the clock went away.
            let _ = sleep.await;
        })
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ended = true;
        state.sleeps.clear();
        drop(state);
        self.0.changed.notify_one();
    }
}

impl std::fmt::Debug for Timer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Timer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_on;

    #[test]
    fn sleeps_end_in_the_order_of_their_times() {
        let timer = Timer::default();
        let begun = Instant::now();
        let long = timer.sleep(Duration::from_millis(30));
        let short = timer.sleep(Duration::from_millis(5));
        block_on(short);
        let after_short = begun.elapsed();
        block_on(long);
        assert!(after_short >= Duration::from_millis(5), "{after_short:?}");
        assert!(begun.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn a_clock_that_goes_away_ends_what_sleeps() {
        let timer = Timer::default();
        let sleep = timer.sleep(Duration::from_secs(1 << 40));
        drop(timer);
        block_on(sleep);
    }
}
