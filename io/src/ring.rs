//! The ring thread: keeps the ring filled, completes operations, and runs the resident task in between.
//!
//! # Invariants
//! 1. A buffer that an entry of the ring names is not freed before its completion was seen. What cannot be waited for is
//!    leaked: dropping a ring does not stop the kernel.
//! 2. No more entries are in flight than the ring has places, so completions never overflow.
//! 3. No entry is linked to another: a short write would pass a linked flush unseen.
//! 4. The thread ends only when nothing is in flight: the kernel cancels what an ending thread has left to its workers.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use crate::flight::{Flight, Progress};
use crate::gate::Gate;
use crate::probe::refusal;
use crate::request::Request;
use crate::threads::spawn;
use crate::uring::{Resident, Shared, dead_ring};
use crate::{IoClass, block_on};

/// How long a ring whose devices are all gone waits for operations in flight.
const STOP_GRACE: Duration = Duration::from_secs(30);

/// Refusals of the kernel to take entries for lack of memory, in a row, before the ring is given up.
const REFUSALS_MAX: u32 = 10_000;

/// IORING_ENTER_GETEVENTS.
const GET_EVENTS: u32 = 1;

/// IORING_ENTER_NO_IOWAIT, since 6.15.
const NO_IOWAIT: u32 = 1 << 7;

/// The completion of the read of the eventfd.
const BELL: u64 = u64::MAX;

/// Owns the ring.
pub(crate) struct RingThread {
    ring: IoUring,
    shared: Arc<Shared>,
    flights: Flights,
    /// Flights to be given to the kernel, first time or again.
    to_submit: VecDeque<usize>,
    residents: Vec<Resident>,
    /// What the kernel writes when the bell rings; leaked if it may still do so.
    bell: Option<Box<u64>>,
    bell_armed: bool,
    refusals: u32,
    quiet_wait: bool,
    completions: Vec<(u64, i32)>,
    deadline: Option<Instant>,
}

/// Operations whose buffers the kernel may use.
struct Flights {
    places: Vec<Option<Flight>>,
    free: Vec<usize>,
    background: usize,
}

impl Flights {
    fn new(places: usize) -> Self {
        Self { places: (0..places).map(|_| None).collect(), free: (0..places).rev().collect(), background: 0 }
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.places.len()
    }

    /// True when background work may take another place: half of them at most.
    fn has_room_for(&self, class: IoClass) -> bool {
        !self.free.is_empty() && (class != IoClass::Background || self.background * 2 < self.places.len())
    }

    fn put(&mut self, flight: Flight) -> usize {
        let place = self.free.pop().expect("asked for room before");
        self.background += usize::from(flight.class == IoClass::Background);
        self.places[place] = Some(flight);
        place
    }

    fn take(&mut self, place: usize) -> Flight {
        let flight = self.places[place].take().expect("a place is free only after its completion");
        self.background -= usize::from(flight.class == IoClass::Background);
        self.free.push(place);
        flight
    }

    /// The operation at `place`, which is in flight.
    fn get(&mut self, place: usize) -> &mut Flight {
        self.places[place].as_mut().expect("a place is free only after its completion")
    }
}

impl Drop for Flights {
    /// Reached with operations in flight only when they cannot be waited for.
    fn drop(&mut self) {
        self.places.drain(..).flatten().for_each(Flight::leak);
    }
}

impl RingThread {
    pub(crate) fn new(ring: IoUring, shared: Arc<Shared>) -> Self {
        let places = ring.params().sq_entries() as usize - 1;
        Self {
            quiet_wait: ring.params().is_feature_no_iowait(),
            ring,
            shared,
            flights: Flights::new(places),
            to_submit: VecDeque::with_capacity(places),
            residents: Vec::new(),
            bell: Some(Box::new(0)),
            bell_armed: false,
            refusals: 0,
            completions: Vec::with_capacity(2 * places),
            deadline: None,
        }
    }

    /// Serves until all devices are gone and nothing is in flight.
    pub(crate) fn run(mut self) {
        loop {
            self.poll_residents();
            let stopping = self.take_inbox();
            if stopping && self.flights.is_empty() && self.residents.is_empty() {
                break;
            }
            let deadline = self.deadline.filter(|_| self.residents.is_empty());
            let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if timeout == Some(Duration::ZERO) {
                tracing::error!("operations did not end after their devices were gone; their buffers are leaked");
                break;
            }
            self.fill();
            self.shared.set_sleeping(true);
            let want = usize::from(!self.has_work());
            let entered = self.enter(want, timeout);
            self.shared.set_sleeping(false);
            if let Err(reason) = entered {
                return self.die(&reason);
            }
            self.reap();
        }
        self.silence_bell();
    }

    /// Polls the residents that were woken. What they submit is in the inbox afterwards.
    fn poll_residents(&mut self) {
        let mut place = 0;
        while place < self.residents.len() {
            let resident = &mut self.residents[place];
            if !resident.ready.take() {
                place += 1;
                continue;
            }
            let waker = Waker::from(resident.ready.clone());
            let mut cx = Context::from_waker(&waker);
            match catch_unwind(AssertUnwindSafe(|| resident.task.as_mut().poll(&mut cx))) {
                Ok(Poll::Pending) => place += 1,
                Ok(Poll::Ready(())) => drop(self.residents.swap_remove(place)),
                Err(_) => {
                    tracing::error!(task = resident.name, "the resident task of a device panicked");
                    drop(self.residents.swap_remove(place));
                }
            }
        }
    }

    /// Takes from the inbox what there is room for; true when all devices are gone.
    fn take_inbox(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut inbox = shared.lock();
        self.residents.append(&mut inbox.residents);
        let mut nothing_to_do = Vec::new();
        for class in [IoClass::Wal, IoClass::Foreground, IoClass::Background] {
            let queue = &mut inbox.classes[class as usize];
            while self.flights.has_room_for(class) {
                let Some(request) = queue.pop_front() else { break };
                match Flight::new(request) {
                    Ok(flight) => self.to_submit.push_back(self.flights.put(flight)),
                    Err(done) => nothing_to_do.push(done),
                }
            }
        }
        let abandoned = std::mem::take(&mut inbox.abandoned);
        let mut refused = Vec::new();
        for gate in &abandoned {
            for class in &mut inbox.classes {
                let (gone, kept): (VecDeque<Request>, _) =
                    class.drain(..).partition(|r| Arc::ptr_eq(r.ticket.gate(), gate));
                *class = kept;
                refused.extend(gone);
            }
        }
        let stopping = inbox.stopping && inbox.is_empty();
        if inbox.stopping && self.deadline.is_none() {
            self.deadline = Some(Instant::now() + STOP_GRACE);
        }
        drop(inbox);
        // Completions run wakers, and those may put something into the inbox.
        nothing_to_do.into_iter().for_each(guarded);
        refused.into_iter().for_each(|request| guarded(|| request.refuse_closed()));
        abandoned.iter().for_each(|gate| self.abandon(gate));
        stopping
    }

    /// Answers who waits for operations of `gate`; the buffers stay until the kernel is done with them.
    fn abandon(&mut self, gate: &Arc<Gate>) {
        for flight in self.flights.places.iter_mut().flatten() {
            if Arc::ptr_eq(flight.gate(), gate) {
                guarded(|| flight.abandon());
            }
        }
    }

    /// Puts entries into the submission queue.
    fn fill(&mut self) {
        if !self.bell_armed
            && let Some(bell) = &mut self.bell
        {
            let bell: *mut u64 = &mut **bell;
            let read = opcode::Read::new(types::Fd(self.shared.wake_fd()), bell.cast(), 8).build().user_data(BELL);
            self.bell_armed = push(&mut self.ring, &read);
        }
        // In the order of the calls.
        while let Some(place) = self.to_submit.pop_front() {
            let entry = self.flights.get(place).entry().user_data(place as u64);
            if !push(&mut self.ring, &entry) {
                // Never more entries than places: only a refused submission leaves the queue full. Later.
                self.to_submit.push_front(place);
                break;
            }
        }
    }

    /// True when the thread must not sleep. Looks after `sleeping` was set: whoever comes later rings the bell.
    fn has_work(&self) -> bool {
        if !self.to_submit.is_empty() || self.residents.iter().any(|resident| resident.ready.is_set()) {
            return true;
        }
        let inbox = self.shared.lock();
        let room = |class: IoClass| self.flights.has_room_for(class) && !inbox.classes[class as usize].is_empty();
        inbox.is_urgent()
            || [IoClass::Wal, IoClass::Foreground, IoClass::Background].into_iter().any(room)
            || inbox.stopping && self.deadline.is_none()
            || inbox.stopping && self.flights.is_empty() && self.residents.is_empty()
    }

    /// Gives the entries to the kernel and waits for `want` completions; an error is final.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> Result<(), String> {
        // A ring that waits for the bell alone is idle. Without this it counts as a processor that waits for a disk.
        let idle = want > 0 && self.quiet_wait && self.flights.is_empty() && timeout.is_none();
        let entries = self.ring.submission().len() as u32;
        #[cfg(test)]
        self.shared.entered.lock().expect("no test panics while it holds the counts").push(entries);
        let submitter = self.ring.submitter();
        let answer = match timeout {
            None if idle => {
                // SAFETY: the flags need no argument, and the entries are those that `push` vouches for.
                unsafe { submitter.enter::<libc::sigset_t>(entries, want as u32, GET_EVENTS | NO_IOWAIT, None) }
            }
            None => submitter.submit_and_wait(want),
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                submitter.submit_with_args(want, &types::SubmitArgs::new().timespec(&time))
            }
        };
        match answer {
            Ok(_) => {
                self.refusals = 0;
                Ok(())
            }
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::ETIME) => Ok(()),
                // Out of memory for entries, or completions to be taken first.
                Some(libc::EAGAIN | libc::EBUSY) if self.refusals < REFUSALS_MAX => {
                    self.refusals += 1;
                    std::thread::yield_now();
                    Ok(())
                }
                _ => Err(refusal("io_uring_enter", &e)),
            },
        }
    }

    /// Takes the completions and acts on them.
    fn reap(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion().map(|c| (c.user_data(), c.result())));
        for (user_data, result) in completions.drain(..) {
            if user_data == BELL {
                self.bell_armed = false;
                continue;
            }
            let place = user_data as usize;
            match self.flights.get(place).advance(result) {
                Progress::Again => self.to_submit.push_back(place),
                Progress::Done(answer) => {
                    let flight = self.flights.take(place);
                    guarded(|| flight.finish(answer));
                }
            }
        }
        self.completions = completions;
    }

    /// The kernel does not let this thread in any more, for instance behind a seccomp filter that came later. What it
    /// has may still be written to, so it is leaked; everybody is told.
    fn die(mut self, reason: &str) {
        tracing::error!(reason, "io_uring stopped working; the device serves nothing any more");
        let error = dead_ring(reason);
        let shared = self.shared.clone();
        let mut inbox = shared.lock();
        inbox.dead = Some(reason.to_owned());
        let waiting: Vec<_> = inbox.classes.iter_mut().flat_map(|class| class.drain(..)).collect();
        self.residents.append(&mut inbox.residents);
        drop(inbox);
        for flight in self.flights.places.drain(..).flatten() {
            guarded(|| flight.fail_and_leak(&error));
        }
        waiting.into_iter().for_each(|request| guarded(|| request.fail(&error)));
        for resident in std::mem::take(&mut self.residents) {
            // It learns from the failures that it has to end.
            let Resident { task, ticket, name, .. } = resident;
            let run = move || {
                let _ticket = ticket;
                block_on(task);
            };
            if let Err(e) = spawn(&name, run) {
                tracing::error!(error = %e, task = name, "no thread for the resident task");
            }
        }
        std::mem::forget(self.bell.take());
    }

    /// Ends the read of the eventfd, so that its memory can be freed.
    fn silence_bell(&mut self) {
        for _ in 0..100 {
            if !self.bell_armed {
                return;
            }
            self.shared.ring_bell();
            if self.enter(1, Some(Duration::from_millis(10))).is_err() {
                break;
            }
            for completion in self.ring.completion() {
                self.bell_armed &= completion.user_data() != BELL;
            }
        }
        std::mem::forget(self.bell.take());
    }
}

/// Puts one entry into the queue; false when it is full.
fn push(ring: &mut IoUring, entry: &squeue::Entry) -> bool {
    // SAFETY: the entry comes from a flight (or is the bell) whose file is open and whose memory stays in place until its
    // completion was seen, or for good: invariant 1.
    unsafe { ring.submission().push(entry).is_ok() }
}

/// Runs what may call a waker of the embedder: a panic in it must not unwind through the ring.
fn guarded(f: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(f)).is_err() {
        tracing::error!("a waker panicked on a thread of the device");
    }
}
