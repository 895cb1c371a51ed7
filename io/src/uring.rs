//! The handle of a ring thread: the inbox that other threads put operations into.
//!
//! # Place
//! One ring thread serves one or several devices. The log has a ring of its own, on whose thread the resident writer
//! task runs: what the writer submits, and what wakes it, crosses no thread.
//!
//! # Invariants
//! 1. A thread that puts something into the inbox either finds the ring thread awake, which looks again before it
//!    sleeps, or wakes it through the eventfd that the ring itself reads.
//!
//! # Why not
//! A ring for each worker of the embedder's runtime saves a hand-over of 3 us, but needs a hook into that runtime, and a
//! thread that ends takes its unfinished operations with it (ECANCELED). A shared ring under a lock costs more CPU.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

use rustix::event::EventfdFlags;

use crate::file::OpenFile;
use crate::gate::{Gate, Ticket, enter_device_thread};
use crate::request::{Body, Executor, Request};
use crate::ring::RingThread;
use crate::threads::{Crew, Pool};
use crate::{BoxFuture, Error, ErrorKind, probe};

/// A ring and its thread. Dropping it lets the thread finish what was submitted.
pub(crate) struct Ring {
    shared: Arc<Shared>,
    /// Runs what the ring has no good operation for.
    helpers: Arc<Pool>,
    crew: Crew,
}

/// What the ring thread and the threads that use it share.
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    sleeping: AtomicBool,
    wake: OwnedFd,
    /// Entries given to the kernel in each call.
    #[cfg(test)]
    pub(crate) entered: Mutex<Vec<u32>>,
}

/// Bounded by the gates of the devices: see [`crate::gate::OPERATIONS_MAX`].
#[derive(Default)]
pub(crate) struct Inbox {
    /// By class: the log, reads, background.
    pub(crate) classes: [VecDeque<Request>; 3],
    pub(crate) residents: Vec<Resident>,
    pub(crate) abandoned: Vec<Arc<Gate>>,
    pub(crate) stopping: bool,
    /// Why the ring serves nobody any more.
    pub(crate) dead: Option<String>,
}

impl Inbox {
    /// True when there is something that does not wait for a free place in the ring.
    pub(crate) fn is_urgent(&self) -> bool {
        !self.residents.is_empty() || !self.abandoned.is_empty()
    }

    /// True when no operation waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.classes.iter().all(VecDeque::is_empty)
    }
}

/// A task that lives on the ring thread.
pub(crate) struct Resident {
    pub(crate) task: BoxFuture<()>,
    pub(crate) ticket: Ticket,
    pub(crate) name: String,
    pub(crate) ready: Arc<ResidentWaker>,
}

/// Wakes a resident task.
pub(crate) struct ResidentWaker {
    ready: AtomicBool,
    shared: Arc<Shared>,
}

impl ResidentWaker {
    /// True when the task is to be polled; asks once.
    pub(crate) fn take(&self) -> bool {
        self.ready.swap(false, Ordering::SeqCst)
    }

    /// True when the task is to be polled.
    pub(crate) fn is_set(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }
}

impl Wake for ResidentWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.ready.swap(true, Ordering::SeqCst) {
            self.shared.rouse();
        }
    }
}

impl Shared {
    /// A panic while the lock was held cannot leave the inbox wrong: nothing in it panics half way.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the ring thread if it sleeps. Call it after the change that it shall see.
    pub(crate) fn rouse(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            self.ring_bell();
        }
    }

    /// Completes the read of the eventfd that the ring has in flight.
    #[expect(clippy::host_endian_bytes, reason = "the kernel takes the number of this machine")]
    pub(crate) fn ring_bell(&self) {
        // Fails only when the counter would overflow, and then the read is complete anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(crate) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// The ring thread is about to sleep, or has woken. After `true` it looks at the inbox once more.
    pub(crate) fn set_sleeping(&self, sleeping: bool) {
        self.sleeping.store(sleeping, Ordering::SeqCst);
    }
}

impl Ring {
    /// Starts a ring thread called `name` and tries it on `file`.
    ///
    /// # Errors
    /// Why io_uring does not work here, with the remedy.
    pub(crate) fn start(
        name: &str,
        entries: u32,
        file: &Arc<OpenFile>,
        helpers: Arc<Pool>,
    ) -> Result<Arc<Self>, String> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| format!("no eventfd: {e}"))?;
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            sleeping: AtomicBool::new(false),
            wake,
            #[cfg(test)]
            entered: Mutex::default(),
        });
        let crew = Crew::default();
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        let (file, inner) = (file.clone(), shared.clone());
        // The ring is made on the thread that will submit to it: SINGLE_ISSUER holds it to that.
        let run = move || {
            enter_device_thread();
            let probed = probe::ring(entries, &file);
            drop(file);
            match probed {
                Ok(ring) => {
                    let _ = answer.send(Ok(()));
                    RingThread::new(ring, inner).run();
                }
                Err(reason) => drop(answer.send(Err(reason))),
            }
        };
        crew.spawn(name, run).map_err(|e| e.to_string())?;
        answered.recv().unwrap_or_else(|_| Err("the ring thread ended while it was tried".to_owned()))?;
        Ok(Arc::new(Self { shared, helpers, crew }))
    }
}

impl Executor for Ring {
    fn submit(&self, request: Request) {
        if matches!(request.body, Body::Allocate { .. } | Body::Discard { .. }) {
            return self.helpers.submit(request);
        }
        let mut inbox = self.shared.lock();
        if let Some(reason) = inbox.dead.clone() {
            drop(inbox);
            return request.fail(&dead_ring(&reason));
        }
        inbox.classes[request.class as usize].push_back(request);
        drop(inbox);
        self.shared.rouse();
    }

    fn submit_reads(&self, requests: Vec<Request>) {
        let mut inbox = self.shared.lock();
        if let Some(reason) = inbox.dead.clone() {
            drop(inbox);
            let error = dead_ring(&reason);
            return requests.into_iter().for_each(|request| request.fail(&error));
        }
        // Under one lock: the ring thread finds all of them, and gives them to the kernel in one call.
        requests.into_iter().for_each(|request| inbox.classes[request.class as usize].push_back(request));
        drop(inbox);
        self.shared.rouse();
    }

    fn resident(&self, name: &str, task: BoxFuture<()>, ticket: Ticket) {
        let mut inbox = self.shared.lock();
        if inbox.dead.is_some() {
            drop(inbox);
            return self.helpers.resident(name, task, ticket);
        }
        let ready = Arc::new(ResidentWaker { ready: AtomicBool::new(true), shared: self.shared.clone() });
        inbox.residents.push(Resident { task, ticket, name: name.to_owned(), ready });
        drop(inbox);
        self.shared.rouse();
    }

    fn abandon(&self, gate: &Arc<Gate>) {
        self.helpers.abandon(gate);
        self.shared.lock().abandoned.push(gate.clone());
        self.shared.rouse();
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.rouse();
        self.crew.join();
    }
}

/// The answer of a ring that the kernel does not let in any more.
pub(crate) fn dead_ring(reason: &str) -> Error {
    Error::new(ErrorKind::Os, "io_uring_enter", 0, 0, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{Extent, Missing};
    use crate::file_device::FileDevice;
    use crate::{AlignedBuf, Backend, IoClass, WriteMode};

    /// Reads handed over one by one woke the ring thread at the first: the kernel was called for a few of them at a time.
    #[test]
    fn reads_handed_over_together_are_one_call_of_the_kernel() {
        const READS: usize = 64;
        const ROUNDS: usize = 100;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        let content: Vec<u8> = (0..READS).flat_map(|n| [n as u8; 4096]).collect();
        std::fs::write(&path, content).expect("written");
        let file = Arc::new(OpenFile::open(&path, Missing::Refuse, Extent::Length, None).expect("opened"));
        let helpers = Pool::start("help", 2).expect("threads");
        let ring = match Ring::start("ring", 128, &file, helpers) {
            Ok(ring) => ring,
            Err(reason) => return println!("the ring is not tested on this machine: {reason}"),
        };
        let device = FileDevice::over(file, Backend::Uring, ring.clone(), None);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Keeps the ring thread awake: one that sleeps would find all reads also when they come one by one.
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    device.read(0, AlignedBuf::zeroed(4096), IoClass::Foreground).wait().expect("read");
                }
            });
            for _ in 0..ROUNDS {
                let places = (0..READS as u64).rev().map(|n| (n * 4096, AlignedBuf::zeroed(4096)));
                let reads = device.read_many(places.collect(), IoClass::Foreground);
                for (n, read) in (0..READS).rev().zip(reads) {
                    assert!(read.wait().expect("read").iter().all(|byte| *byte == n as u8), "{n}");
                }
            }
            stop.store(true, Ordering::SeqCst);
        });
        let calls = ring.shared.entered.lock().expect("no test panics while it holds the counts").clone();
        let whole = calls.iter().filter(|entries| **entries as usize >= READS).count();
        assert_eq!(whole, ROUNDS, "{calls:?}");
    }

    #[test]
    fn a_write_for_a_caller_that_waits_is_complete_when_the_call_returns() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        std::fs::write(&path, [0; 8192]).expect("written");
        let file = Arc::new(OpenFile::open(&path, Missing::Refuse, Extent::Length, None).expect("opened"));
        let ring = match Ring::start("ring", 8, &file, Pool::start("help", 1).expect("threads")) {
            Ok(ring) => ring,
            Err(reason) => return println!("the ring is not tested on this machine: {reason}"),
        };
        let device = FileDevice::over(file, Backend::Uring, ring, None);
        let mut block = AlignedBuf::zeroed(4096);
        block.fill(7);
        let mut written = device.write_here(4096, vec![block.freeze()], WriteMode::Durable, IoClass::Wal);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(
            matches!(std::pin::Pin::new(&mut written).poll(&mut cx), std::task::Poll::Ready(Ok(()))),
            "done in the call"
        );
        assert_eq!(std::fs::read(&path).expect("readable"), [[0; 4096], [7; 4096]].concat());
        let refused = device.write_here(100, Vec::new(), WriteMode::Durable, IoClass::Wal).wait();
        assert_eq!(refused.expect_err("no block begins there").kind(), ErrorKind::Misaligned);
    }
}
