//! The handle through which a node uses a simulated disk.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::IoKind;
use super::core::{Action, Core, What};
use super::disk::{Shared, SimDisk};
use super::medium::content;
use crate::{
    AlignedBuf, AlignedBytes, BLOCK_BYTES, BlockDevice, BoxFuture, Completer, Error, ErrorKind, Geometry, IoClass, Op,
    Result, WriteMode, block_on,
};

/// Counts what a handle has in flight.
#[derive(Default)]
pub(super) struct Door {
    state: Mutex<DoorState>,
    changed: Condvar,
}

#[derive(Default)]
struct DoorState {
    closed: bool,
    operations: usize,
    residents: usize,
    waiting: Option<Completer<()>>,
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, DoorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn enter(&self, resident: bool) -> bool {
        let mut state = self.lock();
        if !state.closed {
            *(if resident { &mut state.residents } else { &mut state.operations }) += 1;
        }
        !state.closed
    }

    pub(super) fn leave(&self, resident: bool) {
        let mut state = self.lock();
        *(if resident { &mut state.residents } else { &mut state.operations }) -= 1;
        let waiting = if state.operations + state.residents == 0 { state.waiting.take() } else { None };
        drop(state);
        self.changed.notify_all();
        if let Some(waiting) = waiting {
            waiting.complete(Ok(()));
        }
    }

    /// The grace has passed.
    fn give_up(&self) {
        let waiting = self.lock().waiting.take();
        if let Some(waiting) = waiting {
            let message = "the grace has passed with operations or a resident task left";
            waiting.complete(Err(Error::new(ErrorKind::Closed, "shutdown", 0, 0, message)));
        }
    }
}

/// A handle on a [`SimDisk`], for one life of a node.
pub struct SimDevice {
    disk: Arc<Shared>,
    epoch: u64,
    geometry: Geometry,
    door: Arc<Door>,
}

impl SimDevice {
    pub(super) fn new(disk: Arc<Shared>, epoch: u64, geometry: Geometry) -> Self {
        Self { disk, epoch, geometry, door: Arc::default() }
    }

    /// The disk underneath.
    pub fn disk(&self) -> SimDisk {
        SimDisk(self.disk.clone())
    }

    fn check(&self, op: &'static str, offset: u64, length: u64) -> Result<()> {
        if !offset.is_multiple_of(BLOCK_BYTES as u64) || !length.is_multiple_of(BLOCK_BYTES as u64) {
            let message = format!("offset and length must be multiples of {BLOCK_BYTES}");
            return Err(Error::new(ErrorKind::Misaligned, op, offset, length, message));
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.geometry.capacity => Ok(()),
            _ => {
                let message = format!("{} ends at {}", self.disk.name, self.geometry.capacity);
                Err(Error::new(ErrorKind::OutOfRange, op, offset, length, message))
            }
        }
    }

    fn start<T>(
        &self,
        op: &'static str,
        (kind, offset, length): (IoKind, u64, u64),
        action: impl FnOnce(&Core, Completer<T>) -> Action,
    ) -> Op<T> {
        if let Err(e) = self.check(op, offset, length) {
            return Op::ready(Err(e));
        }
        let what = What { op, kind, offset, length };
        self.disk.start((self.epoch, &self.door), what, action)
    }
}

impl BlockDevice for SimDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read(&self, offset: u64, buf: AlignedBuf, _class: IoClass) -> Op<AlignedBuf> {
        let what = (IoKind::Read, offset, buf.len() as u64);
        self.start("read", what, |_, done| Action::Read { buf, done })
    }

    fn write(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, _class: IoClass) -> Op<()> {
        let length = bufs.iter().map(|b| b.len() as u64).sum();
        if !bufs.iter().all(AlignedBytes::is_aligned) {
            let message = format!("every buffer must begin and end at a multiple of {BLOCK_BYTES}");
            return Op::ready(Err(Error::new(ErrorKind::Misaligned, "write", offset, length, message)));
        }
        let kind = match mode {
            WriteMode::Cached => IoKind::CachedWrite,
            WriteMode::Durable => IoKind::DurableWrite,
        };
        self.start("write", (kind, offset, length), |_, done| Action::Write { content: content(offset, &bufs), done })
    }

    fn flush(&self) -> Op<()> {
        let covers = |core: &Core, done| Action::Flush { covers: core.medium.sequence(), done };
        self.start("flush", (IoKind::Flush, 0, 0), covers)
    }

    fn allocate(&self, offset: u64, length: u64) -> Op<()> {
        self.start("allocate", (IoKind::Allocate, offset, length), |_, done| Action::Allocate { done })
    }

    fn discard(&self, offset: u64, length: u64) -> Op<()> {
        self.start("discard", (IoKind::Discard, offset, length), |_, done| Action::Discard { done })
    }

    fn run_resident(&self, name: &str, task: BoxFuture<()>) {
        if !self.door.enter(true) {
            return;
        }
        let door = self.door.clone();
        let task: BoxFuture<()> = Box::pin(async move {
            task.await;
            door.leave(true);
        });
        match &self.disk.runtime.spawner {
            Some(spawner) => drop(spawner.spawn(name, task)),
            None => {
                let builder = std::thread::Builder::new().name(name.to_owned());
                builder.spawn(move || block_on(task)).expect("a test may start a thread");
            }
        }
    }

    fn poisoned(&self) -> Option<Error> {
        self.disk.lock().poison.clone()
    }

    fn shutdown(&self, grace: Duration) -> Op<()> {
        let mut state = self.door.lock();
        state.closed = true;
        if state.operations + state.residents == 0 {
            return Op::ready(Ok(()));
        }
        let (op, done) = Op::pending();
        state.waiting = Some(done);
        drop(state);
        let door = self.door.clone();
        match &self.disk.runtime.scheduler {
            Some(scheduler) => scheduler.after(grace, Box::new(move || door.give_up())),
            // Only a resident task on its own thread can be left here: operations are complete before their calls end.
            None => {
                let wait = move || {
                    let left = |state: &mut DoorState| state.operations + state.residents > 0;
                    let guard = door.changed.wait_timeout_while(door.lock(), grace, left);
                    drop(guard.unwrap_or_else(PoisonError::into_inner));
                    door.give_up();
                };
                std::thread::spawn(wait);
            }
        }
        op
    }
}
