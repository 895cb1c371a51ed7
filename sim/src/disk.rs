//! The disk of a simulated node: `io::sim` on the executor's clock, and what goes wrong with it.
//!
//! # Place
//! between `io::sim`, which knows writes and crashes, and the executor, which knows time and groups

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay_engine::{EXTENT_UNIT_BYTES, Offline};
use mainstay_io::sim::{
    CrashPoint, DiskImage, Faults, IoEvent, IoKind, Latency, Mishap, Outcome, SimDisk, SimLayout, SimMedia, SimOptions,
    SimScheduler,
};
use mainstay_io::{BLOCK_BYTES, BoxFuture, Environment, Media, SUPERBLOCK_ZONE_BYTES, Spawner, TaskHandle};

use crate::rt::{Executor, Group, SimRng};
use crate::world::Settings;

/// Bytes of every disk.
const CAPACITY: u64 = 1 << 30;
/// How much longer everything takes on a slow disk.
const SLOW_FACTOR: u32 = 50;
/// Errors in a million operations of a disk that fails now and then.
const ERROR_RATE: u32 = 20_000;

/// A disk and the power switch of the machine that it is in.
pub(crate) struct Disk {
    media: SimMedia,
    layout: SimLayout,
    wal_bytes: u64,
    /// Batches of the log that may be in flight at once.
    in_flight_max: usize,
    /// What it does all the time: nothing bad, unless it is a disk that lies.
    ordinary: Faults,
    /// Operations fail, or are going to.
    failing: AtomicBool,
    read_only: AtomicBool,
    power: Arc<Power>,
    rng: Mutex<SimRng>,
}

/// Hears of an operation.
pub(crate) type Watch = Box<dyn Fn(IoKind, &dyn Fn() -> CrashPoint) + Send + Sync>;

/// A place on a disk that rots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zone {
    Superblock,
    /// Log that a later batch proves to have been durable.
    Wal,
    Extents,
}

/// What a volume holds that is wrong, and where what counts in its extents lies on the disk.
pub(crate) struct Survey {
    pub(crate) damage: Vec<(String, String)>,
    pub(crate) live: Vec<Range<u64>>,
}

/// What the disk takes from the machine: time, and a place for the resident task of the log.
struct Power {
    executor: Arc<Executor>,
    /// The group of the current life.
    group: AtomicU64,
    /// Nanoseconds of virtual time until which the disk is slow.
    slow_until: AtomicU64,
    /// Nanoseconds of virtual time until which nothing completes.
    stalled_until: Arc<AtomicU64>,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// How often a stalled disk looks whether the stall is over: it may be ended early.
const STALL_LOOK: Duration = Duration::from_millis(10);

/// Runs `f` once the disk is not stalled.
fn unless_stalled(executor: &Arc<Executor>, stalled: &Arc<AtomicU64>, f: Box<dyn FnOnce() + Send>) {
    if executor.now() >= Duration::from_nanos(stalled.load(Ordering::Relaxed)) {
        return f();
    }
    let (executor2, stalled) = (executor.clone(), stalled.clone());
    executor.after(Group::WORLD, STALL_LOOK, Box::new(move || unless_stalled(&executor2, &stalled, f)));
}

impl SimScheduler for Power {
    fn after(&self, delay: Duration, f: Box<dyn FnOnce() + Send>) {
        let slow = self.executor.now() < Duration::from_nanos(self.slow_until.load(Ordering::Relaxed));
        let delay = if slow { delay * SLOW_FACTOR } else { delay };
        let (executor, stalled) = (self.executor.clone(), self.stalled_until.clone());
        // The disk outlives the node: a completion that comes too late finds that the operation is gone.
        self.executor.after(Group::WORLD, delay, Box::new(move || unless_stalled(&executor, &stalled, f)));
    }
}

impl Spawner for Power {
    fn spawn(&self, name: &str, task: BoxFuture<()>) -> TaskHandle {
        self.executor.spawn(Group(self.group.load(Ordering::Relaxed)), name, task)
    }
}

impl Disk {
    pub(crate) fn new(executor: &Arc<Executor>, settings: &Settings, seed: u64) -> Self {
        let mut rng = SimRng::new(seed);
        let power = Arc::new(Power {
            executor: executor.clone(),
            group: AtomicU64::new(Group::WORLD.0),
            slow_until: AtomicU64::new(0),
            stalled_until: Arc::default(),
        });
        let mut latency = |most| Latency::micros(rng.range(5, 30), rng.range(40, most));
        let faults = if settings.lying_disks {
            Faults { lost_flush: 1_000_000, ..Faults::default() }
        } else {
            Faults::default()
        };
        let options = SimOptions {
            seed,
            capacity: CAPACITY,
            read_latency: latency(400),
            write_latency: latency(400),
            flush_latency: latency(4000),
            faults,
            enospc_after: None,
        };
        let layout = if rng.chance(500) { SimLayout::Directory } else { SimLayout::Device };
        let media = SimMedia::scheduled(layout, options, power.clone(), power.clone());
        let (wal_bytes, in_flight_max) = (settings.wal_bytes, settings.wal_in_flight_max);
        Self {
            media,
            layout,
            wal_bytes,
            in_flight_max,
            ordinary: faults,
            failing: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            power,
            rng: Mutex::new(rng),
        }
    }

    fn rng(&self) -> MutexGuard<'_, SimRng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new life begins: what the disk starts belongs to `group`.
    pub(crate) fn power_on(&self, group: Group) {
        self.power.group.store(group.0, Ordering::Relaxed);
    }

    /// The power fails, with whatever was in flight. A stall ends with it.
    pub(crate) fn cut_power(&self) {
        let seed = self.rng().u64();
        self.media.crash(seed);
        self.power.stalled_until.store(0, Ordering::Relaxed);
        self.trace();
    }

    fn trace(&self) {
        self.power.executor.trace(&[0xd15c, self.media.trace_hash()]);
    }

    fn until(&self, length: Duration) -> u64 {
        nanos(self.power.executor.now().saturating_add(length))
    }

    /// Makes the disk slow for a while.
    pub(crate) fn slow(&self, length: Duration) {
        self.power.slow_until.store(self.until(length), Ordering::Relaxed);
    }

    /// Lets nothing complete for a while.
    pub(crate) fn stall(&self, length: Duration) {
        self.power.stalled_until.store(self.until(length), Ordering::Relaxed);
    }

    /// True while something goes on for which a node cannot be blamed that does not start.
    pub(crate) fn is_at_fault(&self) -> bool {
        self.failing.load(Ordering::Relaxed) || self.read_only.load(Ordering::Relaxed)
    }

    /// The next operation of `kind` on some zone fails.
    pub(crate) fn fail_next(&self, kind: IoKind) {
        let disks = self.media.disks();
        let at = self.rng().below(disks.len() as u64) as usize;
        disks[at].fail_next(kind);
        self.failing.store(true, Ordering::Relaxed);
    }

    /// Operations fail now and then, until [`Disk::mend`].
    pub(crate) fn fail_often(&self, kind: IoKind) {
        self.failing.store(true, Ordering::Relaxed);
        let mut faults = self.ordinary;
        match kind {
            IoKind::Read => faults.read_error = ERROR_RATE,
            IoKind::Flush => faults.flush_error = ERROR_RATE,
            _ => faults.write_error = ERROR_RATE,
        }
        self.media.set_faults(faults);
    }

    /// Ends failures that go on.
    pub(crate) fn mend(&self) {
        self.media.set_faults(self.ordinary);
    }

    /// Leaves `bytes` beyond what is allocated now; `None` frees the rest again.
    pub(crate) fn set_space(&self, bytes: Option<u64>) {
        let disk = self.media.extents_disk();
        disk.set_space(bytes.map(|bytes| disk.allocated() + bytes));
    }

    /// Remounts read-only, or writable again.
    pub(crate) fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Relaxed);
        self.media.set_read_only(read_only);
    }

    /// The volume is lost. The node must be down.
    pub(crate) fn wipe(&self) {
        self.media.wipe();
        self.trace();
    }

    /// The content of the volume as it is now.
    pub(crate) fn images(&self) -> Vec<DiskImage> {
        self.media.images()
    }

    /// Calls `watch` for each operation on the way to its end, with what tells what a loss of power would find then.
    pub(crate) fn watch(&self, watch: Option<Watch>) {
        let media = self.media.clone();
        self.media
            .watch(watch.map(|watch| -> mainstay_io::sim::Watch {
                Arc::new(move |kind| watch(kind, &|| media.crash_point()))
            }));
    }

    /// Puts a copy in the place of the volume, of this node or another of the same layout. The node must be down.
    pub(crate) fn restore(&self, images: Vec<DiskImage>) {
        self.media.restore(images);
        self.trace();
    }

    /// True if a copy of `other` can be put here.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.layout == other.layout
    }

    /// Where a zone lies.
    fn zone(&self, zone: Zone) -> (&SimDisk, Range<u64>) {
        let base = match (self.layout, zone) {
            (SimLayout::Directory, _) | (SimLayout::Device, Zone::Superblock) => 0,
            (SimLayout::Device, Zone::Wal) => SUPERBLOCK_ZONE_BYTES,
            (SimLayout::Device, Zone::Extents) => SUPERBLOCK_ZONE_BYTES + self.wal_bytes,
        };
        match zone {
            Zone::Superblock => (self.media.superblock_disk(), base..base + SUPERBLOCK_ZONE_BYTES),
            Zone::Wal => (self.media.wal_disk(), base..base + self.wal_bytes),
            Zone::Extents => (self.media.extents_disk(), base..u64::MAX),
        }
    }

    /// Lets the next write that begins in the zone meet `mishap`.
    pub(crate) fn plan(&self, zone: Zone, mishap: Mishap) {
        let (disk, range) = self.zone(zone);
        disk.plan(mishap, range);
    }

    /// True while a mishap has not come.
    pub(crate) fn is_planned(&self) -> bool {
        self.media.disks().iter().any(SimDisk::is_planned)
    }

    /// Every checksum of the volume as it is now, as `mainstay verify` would read them, and where its data lies.
    pub(crate) async fn survey(&self, environment: &Environment) -> Result<Survey, String> {
        let options = SimOptions { capacity: CAPACITY, ..SimOptions::default() };
        let copy = SimMedia::from_images(
            self.layout,
            options,
            self.media.disks().iter().map(SimDisk::image_as_read).collect(),
        );
        let media = copy.open().map_err(|e| e.to_string())?;
        let offline = Offline::open(media, environment).await.map_err(|e| e.to_string())?;
        let report = offline.verify(&mut |_| ()).await.map_err(|e| e.to_string())?;
        let (_, extents) = self.zone(Zone::Extents);
        let place = |&(first, units): &(u64, u64)| {
            let begin = extents.start + first * EXTENT_UNIT_BYTES;
            begin..begin + units * EXTENT_UNIT_BYTES
        };
        let mut live: Vec<Range<u64>> = offline.superblock().root_extents.iter().map(place).collect();
        for group in offline.manifest().await.unwrap_or_default() {
            live.extend(group.tables.iter().flat_map(|table| &table.extents).map(place));
        }
        Ok(Survey { damage: report.damage, live })
    }

    /// A place within data that is to be spoiled: of the log a batch whose damage can be told, else in a block that was written
    /// and, of extents, within `live` if that is given. None when there is none.
    pub(crate) fn place(&self, zone: Zone, live: Option<&[Range<u64>]>, unreadable: bool) -> Option<u64> {
        let (disk, range) = self.zone(zone);
        let mut rng = self.rng();
        if zone == Zone::Wal {
            let event = self.batch(disk, &range, unreadable, &mut rng)?;
            return Some(event.offset + rng.below(event.length));
        }
        let counts = |at: &u64| live.is_none_or(|live| live.iter().any(|live| live.contains(at)));
        let written: Vec<u64> = disk.image().written().filter(|at| range.contains(at) && counts(at)).collect();
        (!written.is_empty()).then(|| rng.pick(&written) + rng.below(BLOCK_BYTES as u64))
    }

    /// Flips a bit of the byte there, or makes its block unreadable until it is written again.
    pub(crate) fn spoil(&self, zone: Zone, at: u64, unreadable: bool) {
        let (disk, _) = self.zone(zone);
        if unreadable {
            disk.damage(at, 1);
        } else {
            disk.flip_bit(at, self.rng().below(8) as u8);
        }
        self.power.executor.trace(&[0x5b01, at]);
    }

    /// Data at rest goes bad. False when there is none.
    pub(crate) fn rot(&self, zone: Zone) -> bool {
        let unreadable = self.rng().chance(400);
        let place = self.place(zone, None, unreadable);
        if let Some(at) = place {
            self.spoil(zone, at, unreadable);
        }
        place.is_some()
    }

    /// A batch of the log: behind one whose bytes change so many were written that one of them says that it was durable, since of
    /// the very last one no byte of the volume tells whether it rotted or was torn. Of one that cannot be read the device tells,
    /// and every other time it is the last.
    fn batch(&self, disk: &SimDisk, inside: &Range<u64>, unreadable: bool, rng: &mut SimRng) -> Option<IoEvent> {
        const RECENT: usize = 60;
        let last = unreadable && rng.chance(500);
        let batches: Vec<IoEvent> = disk
            .trace()
            .into_iter()
            .rev()
            .filter(|e| e.kind == IoKind::DurableWrite && e.outcome == Outcome::Done && inside.contains(&e.offset))
            .skip(if unreadable { 0 } else { 2 * self.in_flight_max + 2 })
            .take(if last { 1 } else { RECENT })
            .collect();
        (!batches.is_empty()).then(|| *rng.pick(&batches))
    }

    /// Ends every fault, also those that were planned and have not come. What rotted stays rotten.
    pub(crate) fn calm(&self) {
        self.power.slow_until.store(0, Ordering::Relaxed);
        self.power.stalled_until.store(0, Ordering::Relaxed);
        self.media.heal();
        self.mend();
        self.failing.store(false, Ordering::Relaxed);
        self.read_only.store(false, Ordering::Relaxed);
    }

    /// Opens the volume for the current life.
    pub(crate) fn open(&self) -> Result<Arc<dyn Media>, String> {
        self.media.open().map_err(|e| e.to_string())
    }
}
