//! Chooses what serves the devices of a volume: two rings, or two pools of threads.

use std::sync::Arc;

use crate::file::OpenFile;
use crate::request::Executor;
use crate::threads::Pool;
use crate::uring::Ring;
use crate::{Backend, BackendChoice, Error, Result};

/// Threads that serve the log. As many batches may be in flight without waiting for each other.
const WAL_THREADS: usize = 4;

/// Threads that serve reads, extents and the superblock; at most half of them for background work.
const DATA_THREADS: usize = 8;

/// Places in the ring of the log: a few batches are in flight at once. Small, since locked memory may be scarce.
const WAL_ENTRIES: u32 = 32;

/// Places in the ring of all else.
const DATA_ENTRIES: u32 = 128;

/// Threads that reserve and discard space beside the rings.
const HELPER_THREADS: usize = 2;

/// What serves the log, and what serves all else.
pub(crate) struct Executors {
    pub(crate) wal: Arc<dyn Executor>,
    pub(crate) data: Arc<dyn Executor>,
    pub(crate) backend: Backend,
    /// Why it is threads although a ring was wanted.
    pub(crate) reason: Option<String>,
}

impl Executors {
    /// Starts the backend of `choice`, trying a ring on `file` itself.
    ///
    /// # Errors
    /// `Unusable` when io_uring was demanded and does not work here; `Os` when no thread can be started.
    pub(crate) fn start(choice: BackendChoice, file: &Arc<OpenFile>) -> Result<Self> {
        let reason = match choice {
            BackendChoice::Threads => None,
            BackendChoice::Auto | BackendChoice::Uring => match Self::rings(file) {
                Ok(rings) => return Ok(rings),
                Err(reason) => Some(reason),
            },
        };
        if let Some(reason) = &reason {
            if choice == BackendChoice::Uring {
                let message = format!("io_uring was demanded and does not work here: {reason}");
                return Err(Error::unusable("open", message));
            }
            tracing::warn!(reason, path = %file.path().display(), "io_uring does not work here; threads serve the volume");
        }
        let (wal, data) = (Pool::start("io-wal", WAL_THREADS)?, Pool::start("io-data", DATA_THREADS)?);
        Ok(Self { wal, data, backend: Backend::Threads, reason })
    }

    fn rings(file: &Arc<OpenFile>) -> std::result::Result<Self, String> {
        let helpers = Pool::start("io-help", HELPER_THREADS).map_err(|e| e.to_string())?;
        let wal = Ring::start("io-wal", WAL_ENTRIES, file, helpers.clone())?;
        let data = Ring::start("io-data", DATA_ENTRIES, file, helpers)?;
        Ok(Self { wal, data, backend: Backend::Uring, reason: None })
    }
}
