//! Time, randomness and tasks of the runtime as the engine takes them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mainstay_io::{BoxFuture, Clock, Environment, Op, Random, Spawner, TaskHandle};

use super::executor::{Executor, Group};
use super::rng::SimRng;

/// The wall clock at the start of every simulation.
const UNIX_ORIGIN: Duration = Duration::from_secs(1_700_000_000);

struct SimClock {
    executor: Arc<Executor>,
    group: Group,
    skew: Arc<WallClock>,
}

/// How far the wall clock of a node is ahead of the world's: it jumps while the monotonic clock goes on.
#[derive(Debug, Default)]
pub struct WallClock(AtomicU64);

impl WallClock {
    /// A wall clock that is ahead by `skew`.
    pub fn ahead(skew: Duration) -> Arc<Self> {
        let clock = Self::default();
        clock.set(skew);
        Arc::new(clock)
    }

    /// Sets it: a jump forward or back.
    pub fn set(&self, skew: Duration) {
        self.0.store(u64::try_from(skew.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn now(&self) -> Duration {
        self.executor.local_now()
    }

    fn unix(&self) -> Duration {
        UNIX_ORIGIN + Duration::from_nanos(self.skew.0.load(Ordering::Relaxed)) + self.executor.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let (sleep, completer) = Op::pending();
        self.executor.after(self.group, duration, Box::new(move || completer.complete(Ok(()))));
        Box::pin(async move {
            let _ = sleep.await;
        })
    }
}

struct SimRandom(Mutex<SimRng>);

impl Random for SimRandom {
    fn fill(&self, out: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).fill(out);
    }
}

struct SimSpawner {
    executor: Arc<Executor>,
    group: Group,
}

impl Spawner for SimSpawner {
    fn spawn(&self, name: &str, task: BoxFuture<()>) -> TaskHandle {
        self.executor.spawn(self.group, name, task)
    }
}

/// The environment of one life of a node. Its tasks belong to `group`; its wall clock is `skew` ahead of the world's.
pub fn environment(executor: &Arc<Executor>, group: Group, skew: Arc<WallClock>) -> Environment {
    Environment {
        clock: Arc::new(SimClock { executor: executor.clone(), group, skew }),
        random: Arc::new(SimRandom(Mutex::new(executor.fork_rng()))),
        spawner: Arc::new(SimSpawner { executor: executor.clone(), group }),
    }
}
