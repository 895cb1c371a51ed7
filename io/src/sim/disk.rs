//! A simulated disk: takes operations, lets them land in their time, and crashes.
//!
//! # Place
//! [`SimDisk`] belongs to the test: it outlives crashes and looks at the medium. [`SimDevice`] belongs to the node: a
//! crash or kill makes all its handles answer `Closed`.
//!
//! Lock order: disk, then handle. No waker runs under a lock.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::core::{Action, Core, Flight, What, full};
use super::device::{Door, SimDevice};
use super::env::{SimRandom, SimScheduler, decide};
use super::image::{CrashImages, DiskImage, Unsettled, after_crash};
use super::media::Watch;
use super::medium::{Medium, blocks};
use super::{Faults, IoEvent, IoKind, Latency, Mishap, Outcome, SimOptions};
use crate::gate::closed;
use crate::transfer::IO_BYTES_MAX;
use crate::{BLOCK_BYTES, Backend, Completer, Geometry, Op, Result, Spawner};

/// Where completions and resident tasks of a disk run.
#[derive(Clone, Default)]
pub(crate) struct Runtime {
    pub(crate) scheduler: Option<Arc<dyn SimScheduler>>,
    pub(crate) spawner: Option<Arc<dyn Spawner>>,
}

/// A simulated disk. Cloning gives another handle on the same one.
#[derive(Clone)]
pub struct SimDisk(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) name: String,
    options: SimOptions,
    random: SimRandom,
    pub(super) runtime: Runtime,
    core: Mutex<Core>,
    watch: Mutex<Option<Watch>>,
}

impl SimDisk {
    /// An empty disk that completes every operation inside the call.
    pub fn new(name: &str, options: SimOptions) -> Self {
        let image = DiskImage { capacity: options.capacity, ..DiskImage::default() };
        Self::from_image(name, options, image)
    }

    /// A disk that holds `image`, otherwise as [`SimDisk::new`].
    pub fn from_image(name: &str, options: SimOptions, image: DiskImage) -> Self {
        Self::with_runtime(name, options, image, Runtime::default())
    }

    /// A disk that holds `image` and whose completions arrive through `scheduler`, its resident task through `spawner`.
    pub fn scheduled(
        name: &str,
        options: SimOptions,
        image: DiskImage,
        scheduler: Arc<dyn SimScheduler>,
        spawner: Arc<dyn Spawner>,
    ) -> Self {
        Self::with_runtime(name, options, image, Runtime { scheduler: Some(scheduler), spawner: Some(spawner) })
    }

    pub(crate) fn with_runtime(name: &str, options: SimOptions, image: DiskImage, runtime: Runtime) -> Self {
        let seed = name.bytes().fold(options.seed, |seed, byte| decide(seed, &[u64::from(byte)]));
        let core = Core {
            medium: Medium::new(image, options.enospc_after),
            faults: options.faults,
            epoch: 0,
            poison: None,
            flights: BTreeMap::new(),
            next_flight: 0,
            fail_next: Vec::new(),
            mishap: None,
            read_only: false,
            trace: VecDeque::new(),
            events: 0,
            hash: 0,
        };
        let random = SimRandom::new(seed);
        let (core, watch) = (Mutex::new(core), Mutex::default());
        Self(Arc::new(Shared { name: name.to_owned(), options, random, runtime, core, watch }))
    }

    /// A device handle of the node's present life.
    pub fn device(&self) -> Arc<SimDevice> {
        let core = self.0.lock();
        let geometry = Geometry {
            capacity: core.medium.capacity(),
            io_bytes_max: IO_BYTES_MAX,
            backend: Backend::Sim,
            direct: true,
            fallback_reason: None,
        };
        Arc::new(SimDevice::new(self.0.clone(), core.epoch, geometry))
    }

    /// What the disk is called.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The power fails: what `seed` lets survive is the content from now on, and is returned. Operations in flight
    /// answer `Closed`, as do all handles from before; new ones come from [`SimDisk::device`].
    pub fn crash(&self, seed: u64) -> DiskImage {
        let mut core = self.0.lock();
        let (durable, mut writes) = core.medium.at_risk();
        writes.extend(shuffled(core.in_flight(), seed));
        let image = after_crash(&durable, &writes, seed);
        // Under one lock: what completes in between would be acknowledged and lost.
        let medium = core.medium.after_crash(image.clone());
        let flights = core.restart(medium);
        drop(core);
        end_flights(flights);
        image
    }

    /// The process dies while the disk keeps its power: completed writes stay, those in flight may land or not. Handles
    /// end as in a [crash](SimDisk::crash).
    pub fn kill(&self, seed: u64) -> DiskImage {
        let mut core = self.0.lock();
        let image = after_crash(&core.medium.image(), &shuffled(core.in_flight(), seed), seed);
        let medium = core.medium.after_crash(image.clone());
        let flights = core.restart(medium);
        drop(core);
        end_flights(flights);
        image
    }

    /// What a [crash](SimDisk::crash) by `seed` would leave; changes nothing.
    pub fn crash_image(&self, seed: u64) -> DiskImage {
        let core = self.0.lock();
        let (durable, mut writes) = core.medium.at_risk();
        writes.extend(shuffled(core.in_flight(), seed));
        after_crash(&durable, &writes, seed)
    }

    /// Images that a crash now could leave: every subset of the writes at risk while they are at most ten, else 1024
    /// draws; then every such write torn at its middle, with all others whole.
    pub fn crash_images(&self) -> CrashImages {
        let (durable, writes) = self.at_risk();
        CrashImages::new(durable, writes)
    }

    /// What is durable for certain, and the writes that are not, completed or in flight.
    pub(super) fn at_risk(&self) -> (DiskImage, Vec<Unsettled>) {
        let core = self.0.lock();
        let (durable, mut writes) = core.medium.at_risk();
        writes.extend(core.in_flight());
        (durable, writes)
    }

    /// See [`SimMedia::watch`](super::SimMedia::watch).
    pub(super) fn watch(&self, watch: Option<Watch>) {
        *self.0.watch.lock().unwrap_or_else(PoisonError::into_inner) = watch;
    }

    /// The content with every completed write in it.
    pub fn image(&self) -> DiskImage {
        self.0.lock().medium.image()
    }

    /// The content with every completed write in it; blocks that cannot be read are zeroes.
    pub fn image_as_read(&self) -> DiskImage {
        self.0.lock().medium.image_as_read()
    }

    /// Puts `image` in the place of the content, as if the disk had been exchanged while the node was down.
    pub fn restart(&self, image: DiskImage) {
        let mut core = self.0.lock();
        let medium = Medium::new(image, core.medium.space());
        let flights = core.restart(medium);
        drop(core);
        end_flights(flights);
    }

    /// Changes the rates of faults.
    pub fn set_faults(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// Ends all faults: rates, planned failures, unreadable ranges, lack of space and a read-only mount. What rotted stays
    /// rotten, and a poisoned device stays poisoned until the node restarts.
    pub fn heal(&self) {
        let mut core = self.0.lock();
        core.faults = Faults::default();
        core.fail_next.clear();
        core.mishap = None;
        core.read_only = false;
        core.medium.set_space(None);
        core.medium.heal();
    }

    /// Bytes that may be allocated in all; `None` lifts the bound.
    pub fn set_space(&self, bytes: Option<u64>) {
        self.0.lock().medium.set_space(bytes);
    }

    /// Remounts the file system read-only, as Linux does after an error, or writable again: while it is read-only all but
    /// reads answer `Os`.
    pub fn set_read_only(&self, read_only: bool) {
        self.0.lock().read_only = read_only;
    }

    /// Bytes that are allocated.
    pub fn allocated(&self) -> u64 {
        self.0.lock().medium.reserved()
    }

    /// Lets the next operation of `kind` answer `Media`.
    pub fn fail_next(&self, kind: IoKind) {
        self.0.lock().fail_next.push(kind);
    }

    /// Lets the next write that begins in `range` meet `mishap`, in place of what was planned before. Its record in
    /// [`SimDisk::trace`] tells when it has come.
    pub fn plan(&self, mishap: Mishap, range: Range<u64>) {
        self.0.lock().mishap = Some((mishap, range));
    }

    /// True while a planned mishap has not come.
    pub fn is_planned(&self) -> bool {
        self.0.lock().mishap.is_some()
    }

    /// Flips one bit of the byte at `offset`, for good.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        self.0.lock().medium.flip_bit(offset, bit);
    }

    /// Makes the range unreadable (`Media`) until it is written again, through crashes too.
    pub fn damage(&self, offset: u64, length: u64) {
        self.0.lock().medium.damage(offset, length);
    }

    /// The latest events of the disk, oldest first: at most 65,536.
    pub fn trace(&self) -> Vec<IoEvent> {
        self.0.lock().trace.iter().copied().collect()
    }

    /// A digest of all events since the disk was made: equal runs have equal ones.
    pub fn trace_hash(&self) -> u64 {
        self.0.lock().hash
    }

    pub(crate) fn reserve_and_zero(&self, offset: u64, length: u64) -> Result<()> {
        let mut core = self.0.lock();
        core.medium.zero(offset, length);
        if core.medium.reserve(offset, length) { Ok(()) } else { Err(full("format", offset, length)) }
    }

    pub(crate) fn reserved_in(&self, offset: u64, length: u64) -> u64 {
        self.0.lock().medium.reserved_in(offset, length)
    }

    pub(crate) fn is_zero(&self, length: u64) -> bool {
        let image = self.0.lock().medium.image();
        image.blocks.range(blocks(0, length)).all(|(_, block)| block.iter().all(|byte| *byte == 0))
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.0.lock().medium.capacity()
    }
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDisk").field("name", &self.0.name).finish_non_exhaustive()
    }
}

/// Writes that were in flight together reach the medium in any order.
fn shuffled(mut writes: Vec<Unsettled>, seed: u64) -> Vec<Unsettled> {
    writes.sort_by_key(|write| decide(seed, &[write.sequence, 3]));
    writes
}

/// Answers operations of the life that has ended. Without the lock of the disk: an answer may wake anyone.
fn end_flights(flights: BTreeMap<u64, Flight>) {
    for flight in flights.into_values() {
        let Flight { action, door, .. } = flight;
        // A dropped completer answers `Closed`, and wakes whoever is left to hear it.
        drop(action);
        door.leave(false);
    }
}

impl Shared {
    /// A panic while the lock was held is a failed test; the state stays readable for its message.
    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn delay(&self, kind: IoKind) -> Duration {
        let draw = |latency: Latency| {
            let width = latency.max.saturating_sub(latency.min).as_nanos() as u64;
            latency.min + Duration::from_nanos(if width == 0 { 0 } else { self.random.below(width + 1) })
        };
        let o = &self.options;
        match kind {
            IoKind::Read => draw(o.read_latency),
            IoKind::CachedWrite | IoKind::Allocate | IoKind::Discard => draw(o.write_latency),
            IoKind::DurableWrite => draw(o.write_latency) + draw(o.flush_latency),
            IoKind::Flush => draw(o.flush_latency),
        }
    }

    /// Starts an operation of a handle of life `epoch`.
    pub(super) fn start<T>(
        self: &Arc<Self>,
        (epoch, door): (u64, &Arc<Door>),
        what: What,
        action: impl FnOnce(&Core, Completer<T>) -> Action,
    ) -> Op<T> {
        let mut core = self.lock();
        if what.kind != IoKind::Read
            && let Some(cause) = &core.poison
        {
            return Op::ready(Err(cause.poisoned(what.op, what.offset, what.length)));
        }
        if core.epoch != epoch || !door.enter(false) {
            return Op::ready(Err(closed(what.op, what.offset, what.length)));
        }
        let (pending, done) = Op::pending();
        let action = action(&core, done);
        let id = core.next_flight;
        core.next_flight += 1;
        core.flights.insert(id, Flight { what, action, door: door.clone(), second_part: false });
        drop(core);
        self.launch(id, what.kind);
        pending
    }

    fn launch(self: &Arc<Self>, id: u64, kind: IoKind) {
        match &self.runtime.scheduler {
            None => self.land(id),
            Some(scheduler) => {
                let delay = self.delay(kind);
                let disk = self.clone();
                scheduler.after(delay, Box::new(move || disk.land(id)));
            }
        }
    }

    /// The time of flight `id` has come. One that a crash took is gone.
    fn land(self: &Arc<Self>, id: u64) {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(watch) = watch {
            let kind = self.lock().flights.get(&id).map(|flight| flight.what.kind);
            // Without a lock: it looks at the disks.
            kind.into_iter().for_each(|kind| watch(kind));
        }
        let mut core = self.lock();
        let Some(mut flight) = core.flights.remove(&id) else { return };
        let what = flight.what;
        if !flight.second_part && what.length > BLOCK_BYTES as u64 && self.random.chance(core.faults.short_io) {
            if let Action::Write { content, .. } = &flight.action {
                let first = content[..content.len() / 2].to_vec();
                if core.medium.reserve(what.offset, what.length / 2) {
                    core.medium.write(&first);
                }
            }
            core.record(what, Outcome::Short);
            flight.second_part = true;
            core.flights.insert(id, flight);
            drop(core);
            return self.launch(id, what.kind);
        }
        let Flight { action, door, .. } = flight;
        let answer = core.execute(what, action, &self.random);
        drop(core);
        answer.deliver();
        door.leave(false);
    }
}
