//! Time, randomness and threads as traits, so that a simulation can own them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::timer::Timer;
use crate::{Op, block_on, threads};

/// A boxed future that may move between threads.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// Reads time.
pub trait Clock: Send + Sync + 'static {
    /// Time since an arbitrary origin of this process; never goes back.
    fn now(&self) -> Duration;

    /// Time since the Unix epoch; may jump.
    fn unix(&self) -> Duration;

    /// Resolves once `duration` has passed on [`Clock::now`], or the clock has gone away. For what goes on in the
    /// background: a thing that waits for an event waits for the event. Cancel safe.
    fn sleep(&self, duration: Duration) -> BoxFuture<()>;
}

/// Draws random bits. Not for secrets in a simulation; the operating system's source in production.
pub trait Random: Send + Sync + 'static {
    /// Fills `out`.
    fn fill(&self, out: &mut [u8]);

    /// One number.
    fn u64(&self) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// One identifier of 128 bits.
    fn id(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        self.fill(&mut bytes);
        bytes
    }
}

/// Resolves when the task has ended; dropping it detaches the task.
pub type TaskHandle = BoxFuture<()>;

/// Runs background tasks: a thread each in production, a step of the one thread in a simulation.
pub trait Spawner: Send + Sync + 'static {
    /// Starts `task` under `name` and returns a handle that resolves when it has ended.
    fn spawn(&self, name: &str, task: BoxFuture<()>) -> TaskHandle;

    /// As [`Spawner::spawn`] for work that can wait, as flush, compaction and scrubbing: where processors are short, those tasks run that
    /// callers wait for.
    fn spawn_background(&self, name: &str, task: BoxFuture<()>) -> TaskHandle {
        self.spawn(name, task)
    }
}

/// Everything of the outside world but disk and network.
#[derive(Clone)]
pub struct Environment {
    /// Reads time.
    pub clock: Arc<dyn Clock>,
    /// Draws random bits.
    pub random: Arc<dyn Random>,
    /// Runs background tasks.
    pub spawner: Arc<dyn Spawner>,
}

impl Environment {
    /// The clock and the random source of the operating system, and a thread for each task.
    pub fn system() -> Self {
        Self {
            clock: Arc::new(SystemClock { origin: Instant::now(), timer: Timer::default() }),
            random: Arc::new(SystemRandom),
            spawner: Arc::new(ThreadSpawner),
        }
    }
}

/// The clock of the operating system.
#[derive(Debug)]
struct SystemClock {
    origin: Instant,
    timer: Timer,
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn unix(&self) -> Duration {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        self.timer.sleep(duration)
    }
}

/// The random source of the operating system.
#[derive(Debug)]
struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&self, out: &mut [u8]) {
        let mut filled = 0;
        while filled < out.len() {
            // Interrupted calls and short answers go on; the source itself cannot fail once the system is up.
            match rustix::rand::getrandom(&mut out[filled..], rustix::rand::GetRandomFlags::empty()) {
                Ok(bytes) => filled += bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => panic!("the operating system gives no random numbers: {e}"),
            }
        }
    }
}

/// Runs every task on a thread of its own.
#[derive(Debug)]
struct ThreadSpawner;

/// The nice value of threads for work that can wait: a tenth of the weight of others, so that it goes on under any load.
const BACKGROUND_NICE: i32 = 10;

impl ThreadSpawner {
    fn start(name: &str, background: bool, task: BoxFuture<()>) -> TaskHandle {
        let (ended, completer) = Op::<()>::pending();
        let run = move || {
            // Dropped on return and on panic alike, after the task: either ends the wait.
            let _completer = completer;
            if background && let Err(e) = lower_priority() {
                tracing::debug!(error = %e, "a thread for work that can wait runs as urgently as others");
            }
            block_on(task);
        };
        if let Err(e) = threads::spawn(name, run) {
            panic!("task {name} needs a thread: {e}");
        }
        Box::pin(async move {
            // The completer is only ever dropped, which answers `Closed`: the task has ended.
            let _ = ended.await;
        })
    }
}

/// Makes the calling thread one for work that can wait, unless the whole program is. Linux takes the id of a thread for that of a process here.
fn lower_priority() -> rustix::io::Result<()> {
    let thread = Some(rustix::thread::gettid());
    if rustix::process::getpriority_process(thread)? < BACKGROUND_NICE {
        rustix::process::setpriority_process(thread, BACKGROUND_NICE)?;
    }
    Ok(())
}

impl Spawner for ThreadSpawner {
    fn spawn(&self, name: &str, task: BoxFuture<()>) -> TaskHandle {
        Self::start(name, false, task)
    }

    fn spawn_background(&self, name: &str, task: BoxFuture<()>) -> TaskHandle {
        Self::start(name, true, task)
    }
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Environment")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

    use super::*;

    #[test]
    fn a_task_handle_resolves_when_the_task_has_ended() {
        let env = Environment::system();
        let ran = Arc::new(AtomicBool::new(false));
        let flag = ran.clone();
        let named = |name: &'static str| assert_eq!(std::thread::current().name(), Some(name));
        let task = async move {
            named("probe");
            flag.store(true, Ordering::Release);
        };
        block_on(env.spawner.spawn("probe", Box::pin(task)));
        assert!(ran.load(Ordering::Acquire));
    }

    #[test]
    fn work_that_can_wait_has_a_thread_of_low_priority() {
        let env = Environment::system();
        let nice = || rustix::process::getpriority_process(Some(rustix::thread::gettid())).expect("a priority");
        let usual = nice();
        let seen = |start: &dyn Fn(BoxFuture<()>) -> TaskHandle| {
            let seen = Arc::new(AtomicI32::new(i32::MIN));
            let to = seen.clone();
            block_on(start(Box::pin(async move { to.store(nice(), Ordering::Release) })));
            seen.load(Ordering::Acquire)
        };
        assert_eq!(seen(&|task| env.spawner.spawn_background("background", task)), usual.max(BACKGROUND_NICE));
        assert_eq!(seen(&|task| env.spawner.spawn("usual", task)), usual);
        assert_eq!(nice(), usual, "the priority is that of one thread");
    }

    #[test]
    fn random_numbers_differ_and_time_does_not_go_back() {
        let env = Environment::system();
        assert_ne!(env.random.id(), env.random.id());
        let (a, b) = (env.clock.now(), env.clock.now());
        assert!(a <= b);
        assert!(env.clock.unix() > Duration::from_secs(1_600_000_000));
    }
}
