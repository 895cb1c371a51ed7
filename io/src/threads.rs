//! The thread pool: positional reads and writes that block, a thread each.
//!
//! The supported way to run where io_uring is refused, and the helper of the ring for what has no good opcode.
//!
//! # Invariants
//! 1. Operations start in the order of the calls within a class; the log goes before reads, reads before background.
//! 2. Background operations never hold all threads.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::gate::{Gate, Ticket, enter_device_thread, is_device_thread};
use crate::request::{Executor, Request};
use crate::{BoxFuture, Error, IoClass, Result, block_on};

/// A pool of threads. Dropping it lets them finish what was submitted.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    crew: Crew,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    background_max: usize,
}

#[derive(Default)]
struct Queue {
    /// Bounded by the gates of the devices: see [`crate::gate::OPERATIONS_MAX`].
    classes: [VecDeque<Request>; 3],
    background: usize,
    stopping: bool,
}

impl Shared {
    /// A panic while the lock was held cannot leave the queue wrong: nothing in it panics half way.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        enter_device_thread();
        let mut queue = self.lock();
        loop {
            let Some(request) = self.take(&mut queue) else {
                if queue.stopping && queue.classes.iter().all(VecDeque::is_empty) {
                    return;
                }
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let background = request.class == IoClass::Background;
            drop(queue);
            // A waker of the embedder may panic; the pool goes on without it.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| request.run())).is_err() {
                tracing::error!("a waker panicked on a thread of the device");
            }
            queue = self.lock();
            if background {
                queue.background -= 1;
                self.ready.notify_one();
            }
        }
    }

    fn take(&self, queue: &mut Queue) -> Option<Request> {
        let [wal, foreground, background] = &mut queue.classes;
        if let Some(request) = wal.pop_front().or_else(|| foreground.pop_front()) {
            return Some(request);
        }
        if queue.background >= self.background_max {
            return None;
        }
        let request = background.pop_front()?;
        queue.background += 1;
        Some(request)
    }
}

impl Pool {
    /// Starts `threads` threads called `name`, 2 or more.
    ///
    /// # Errors
    /// `Os` when the process may not start another thread.
    pub(crate) fn start(name: &str, threads: usize) -> Result<Arc<Self>> {
        let background_max = (threads / 2).max(1);
        let shared = Arc::new(Shared { queue: Mutex::default(), ready: Condvar::new(), background_max });
        let pool = Arc::new(Self { shared, crew: Crew::default() });
        for _ in 0..threads {
            let shared = pool.shared.clone();
            pool.crew.spawn(name, move || shared.work())?;
        }
        Ok(pool)
    }
}

impl Executor for Pool {
    fn submit(&self, request: Request) {
        let mut queue = self.shared.lock();
        queue.classes[request.class as usize].push_back(request);
        drop(queue);
        self.shared.ready.notify_one();
    }

    fn submit_reads(&self, requests: Vec<Request>) {
        let mut queue = self.shared.lock();
        requests.into_iter().for_each(|request| queue.classes[request.class as usize].push_back(request));
        drop(queue);
        self.shared.ready.notify_all();
    }

    fn resident(&self, name: &str, task: BoxFuture<()>, ticket: Ticket) {
        let run = move || {
            let _ticket = ticket;
            block_on(task);
        };
        spawn(name, run).expect("a process that runs a log may start its thread");
    }

    fn abandon(&self, gate: &Arc<Gate>) {
        let mut abandoned = Vec::new();
        for class in &mut self.shared.lock().classes {
            let (gone, kept) = class.drain(..).partition::<VecDeque<_>, _>(|r| Arc::ptr_eq(r.ticket.gate(), gate));
            *class = kept;
            abandoned.extend(gone);
        }
        abandoned.into_iter().for_each(Request::refuse_closed);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.ready.notify_all();
        self.crew.join();
    }
}

/// How long the end of threads is waited for. One that hangs in the kernel must not hang its owner.
const JOIN_GRACE: Duration = Duration::from_secs(5);

/// The threads of one backend, joined by the last who holds it.
#[derive(Default)]
pub(crate) struct Crew {
    threads: Mutex<Vec<JoinHandle<()>>>,
    alive: Arc<(Mutex<usize>, Condvar)>,
}

/// Counts a thread until it ends, by return or by panic.
struct Alive(Arc<(Mutex<usize>, Condvar)>);

impl Drop for Alive {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.1.notify_all();
    }
}

impl Crew {
    /// Starts a thread.
    ///
    /// # Errors
    /// `Os` when the process may not start another thread.
    pub(crate) fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
        *self.alive.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let alive = Alive(self.alive.clone());
        let thread = spawn(name, move || {
            let _alive = alive;
            run();
        })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Waits for threads that were told to end. On a thread of a device it does not wait: a waker there may drop the
    /// last handle of its own device.
    pub(crate) fn join(&self) {
        if is_device_thread() {
            return;
        }
        let (count, changed) = &*self.alive;
        let count = count.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = changed.wait_timeout_while(count, JOIN_GRACE, |count| *count > 0);
        if !ended.is_ok_and(|(_, timeout)| timeout.timed_out()) {
            for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                // A panic was reported by the panic hook.
                let _ = thread.join();
            }
        }
    }
}

/// Starts a thread of the device layer.
///
/// # Errors
/// `Os` when the process may not start another thread.
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(run).map_err(|e| Error::os("start thread", 0, 0, e.raw_os_error().unwrap_or(libc::EAGAIN)))
}
