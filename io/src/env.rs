//! Time, randomness and threads as traits, so that a simulation can own them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// A boxed future that may move between threads.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// Reads time.
pub trait Clock: Send + Sync + 'static {
    /// Time since an arbitrary origin of this process; never goes back.
    fn now(&self) -> Duration;

    /// Time since the Unix epoch; may jump.
    fn unix(&self) -> Duration;
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

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Environment")
    }
}
