//! Admission to a device: who may start an operation, how many are in flight, and when the device is free again.
//!
//! # Invariants
//! 1. An operation holds a [`Ticket`] from the call until its buffers are no longer the kernel's. The file stays open
//!    and locked as long as a ticket lives.
//! 2. At most [`OPERATIONS_MAX`] operations of a device are in flight; a caller above that waits. Threads of a device
//!    never wait, since they are the ones that make room: what they submit comes from callers that are bounded.
//! 3. Nobody waits who holds a ticket that was not submitted: many that did would wait for each other.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::file::{OpenFile, Poison};
use crate::{Error, ErrorKind, Result};

/// Operations of one device that may be in flight.
pub(crate) const OPERATIONS_MAX: usize = 4096;

thread_local! {
    static DEVICE_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one that completes operations.
pub(crate) fn enter_device_thread() {
    DEVICE_THREAD.with(|flag| flag.set(true));
}

/// True on a thread that [`enter_device_thread`] marked.
pub(crate) fn is_device_thread() -> bool {
    DEVICE_THREAD.with(Cell::get)
}

/// The door of one device.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    poison: Poison,
}

#[derive(Debug)]
struct State {
    file: Option<Arc<OpenFile>>,
    operations: usize,
    residents: usize,
    /// Callers that wait for a change: without one nobody is woken, which is a call of the kernel.
    waiting: usize,
}

/// The right to use the file of a device. Dropping it gives up the file first and then the place.
#[derive(Debug)]
pub(crate) struct Ticket {
    file: Option<Arc<OpenFile>>,
    gate: Arc<Gate>,
    resident: bool,
}

impl Gate {
    pub(crate) fn new(file: Arc<OpenFile>) -> Arc<Self> {
        let poison = file.poison().clone();
        let state = Mutex::new(State { file: Some(file), operations: 0, residents: 0, waiting: 0 });
        Arc::new(Self { state, changed: Condvar::new(), poison })
    }

    /// A panic while the lock was held cannot leave the counts wrong: each is changed in one step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits one operation, waiting for room if the calling thread may wait.
    ///
    /// # Errors
    /// `Closed`; `Poisoned` when it `changes` the medium.
    pub(crate) fn enter(self: &Arc<Self>, op: &'static str, offset: u64, length: u64, changes: bool) -> Result<Ticket> {
        if changes && let Some(cause) = self.poison.get() {
            return Err(cause.poisoned(op, offset, length));
        }
        let mut state = self.lock();
        while state.file.is_some() && state.operations >= OPERATIONS_MAX && !is_device_thread() {
            state.waiting += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        let file = state.file.clone().ok_or_else(|| closed(op, offset, length))?;
        state.operations += 1;
        Ok(Ticket { file: Some(file), gate: self.clone(), resident: false })
    }

    /// As [`Gate::enter`] of a read, and none where that would wait: who holds operations that it has not submitted must not.
    pub(crate) fn try_enter(self: &Arc<Self>, op: &'static str, offset: u64, length: u64) -> Option<Result<Ticket>> {
        let mut state = self.lock();
        if state.file.is_some() && state.operations >= OPERATIONS_MAX && !is_device_thread() {
            return None;
        }
        let Some(file) = state.file.clone() else { return Some(Err(closed(op, offset, length))) };
        state.operations += 1;
        Some(Ok(Ticket { file: Some(file), gate: self.clone(), resident: false }))
    }

    /// Admits the resident task.
    pub(crate) fn enter_resident(self: &Arc<Self>) -> Option<Ticket> {
        let mut state = self.lock();
        state.file.as_ref()?;
        state.residents += 1;
        Some(Ticket { file: None, gate: self.clone(), resident: true })
    }

    /// Refuses all that comes from now on.
    pub(crate) fn close(&self) {
        let file = self.lock().file.take();
        self.changed.notify_all();
        drop(file);
    }

    /// Waits until nothing is in flight, at most `grace`; how many operations and residents are left.
    pub(crate) fn drain(&self, grace: Duration) -> (usize, usize) {
        let deadline = Instant::now() + grace;
        let mut state = self.lock();
        while state.operations + state.residents > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state.waiting += 1;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= 1;
        }
        (state.operations, state.residents)
    }

    /// The failure that poisoned the medium.
    pub(crate) fn poisoned(&self) -> Option<Error> {
        self.poison.get().cloned()
    }

    /// Judges the answer to an operation that promised durability: a failure poisons the medium, and after one nothing
    /// is acknowledged any more.
    pub(crate) fn settle(&self, op: &'static str, offset: u64, length: u64, answer: Result<()>) -> Result<()> {
        match answer {
            Err(e) if e.kind() == ErrorKind::OutOfSpace => Err(e),
            Err(e) => {
                if self.poison.set(e.clone()).is_ok() {
                    tracing::error!(error = %e, "a durable write failed: nothing is written to this device again");
                }
                Err(e)
            }
            Ok(()) => match self.poison.get() {
                Some(cause) => Err(cause.poisoned(op, offset, length)),
                None => Ok(()),
            },
        }
    }
}

impl Ticket {
    /// The file. Residents have none.
    pub(crate) fn file(&self) -> &Arc<OpenFile> {
        self.file.as_ref().expect("the ticket of an operation holds the file until it is dropped")
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // First the file: whoever waits for the count to reach zero may open the target again at once.
        drop(self.file.take());
        let mut state = self.gate.lock();
        if self.resident {
            state.residents -= 1;
        } else {
            state.operations -= 1;
        }
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.gate.changed.notify_all();
        }
    }
}

/// The answer of a device that was shut down.
pub(crate) fn closed(op: &'static str, offset: u64, length: u64) -> Error {
    Error::new(ErrorKind::Closed, op, offset, length, "the device was shut down")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{Extent, Missing};

    #[test]
    fn who_waits_for_room_or_for_the_end_is_woken() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        std::fs::write(&path, [0; 4096]).expect("written");
        let file = OpenFile::open(&path, Missing::Refuse, Extent::Length, None).expect("opened");
        let gate = Gate::new(Arc::new(file));
        let enter = || gate.enter("write", 0, 4096, true).expect("open");
        let mut tickets: Vec<Ticket> = (0..OPERATIONS_MAX).map(|_| enter()).collect();
        assert!(gate.try_enter("read", 0, 4096).is_none(), "full");
        std::thread::scope(|scope| {
            let late = scope.spawn(enter);
            while gate.lock().waiting == 0 {
                std::thread::yield_now();
            }
            drop(tickets.pop());
            tickets.push(late.join().expect("it was let in"));
            let drained = scope.spawn(|| gate.drain(Duration::from_secs(60)));
            while gate.lock().waiting == 0 {
                std::thread::yield_now();
            }
            tickets.clear();
            assert_eq!(drained.join().expect("it was told"), (0, 0));
        });
        assert_eq!(gate.lock().waiting, 0);
    }
}
