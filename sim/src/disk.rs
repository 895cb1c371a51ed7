//! The disk of a simulated node: `io::sim` on the executor's clock.
//!
//! # Place
//! between `io::sim`, which knows writes and crashes, and the executor, which knows time and groups

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mainstay_io::sim::{Faults, Latency, SimLayout, SimMedia, SimOptions, SimScheduler};
use mainstay_io::{BoxFuture, Media, Spawner, TaskHandle};

use crate::rt::{Executor, Group, SimRng};
use crate::world::Settings;

/// How much longer everything takes on a slow disk.
const SLOW_FACTOR: u32 = 50;

/// A disk and the power switch of the machine that it is in.
pub(crate) struct Disk {
    media: SimMedia,
    power: Arc<Power>,
    rng: Mutex<SimRng>,
}

/// What the disk takes from the machine: time, and a place for the resident task of the log.
struct Power {
    executor: Arc<Executor>,
    /// The group of the current life.
    group: AtomicU64,
    /// Nanoseconds of virtual time until which the disk is slow.
    slow_until: AtomicU64,
}

impl SimScheduler for Power {
    fn after(&self, delay: Duration, f: Box<dyn FnOnce() + Send>) {
        let slow = self.executor.now() < Duration::from_nanos(self.slow_until.load(Ordering::Relaxed));
        let delay = if slow { delay * SLOW_FACTOR } else { delay };
        // The disk outlives the node: a completion that comes too late finds that the operation is gone.
        self.executor.after(Group::WORLD, delay, f);
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
        });
        let mut latency = |most| Latency::micros(rng.range(5, 30), rng.range(40, most));
        let faults = if settings.lying_disks {
            Faults { lost_flush: 1_000_000, ..Faults::default() }
        } else {
            Faults::default()
        };
        let options = SimOptions {
            seed,
            capacity: 1 << 30,
            read_latency: latency(400),
            write_latency: latency(400),
            flush_latency: latency(4000),
            faults,
            enospc_after: None,
        };
        let layout = if rng.chance(500) { SimLayout::Directory } else { SimLayout::Device };
        let media = SimMedia::scheduled(layout, options, power.clone(), power.clone());
        Self { media, power, rng: Mutex::new(rng) }
    }

    /// A new life begins: what the disk starts belongs to `group`.
    pub(crate) fn power_on(&self, group: Group) {
        self.power.group.store(group.0, Ordering::Relaxed);
    }

    /// The power fails, with whatever was in flight.
    pub(crate) fn cut_power(&self) {
        let seed = self.rng.lock().unwrap_or_else(PoisonError::into_inner).u64();
        self.media.crash(seed);
        self.power.executor.trace(&[0xd15c, self.media.trace_hash()]);
    }

    /// Makes the disk slow for a while.
    pub(crate) fn slow(&self, length: Duration) {
        let until = self.power.executor.now() + length;
        self.power.slow_until.store(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Makes it fast again.
    pub(crate) fn calm(&self) {
        self.power.slow_until.store(0, Ordering::Relaxed);
    }

    /// Opens the volume for the current life.
    pub(crate) fn open(&self) -> Result<Arc<dyn Media>, String> {
        self.media.open().map_err(|e| e.to_string())
    }
}
