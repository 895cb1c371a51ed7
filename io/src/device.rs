//! The seam to the medium: [`BlockDevice`] and what it says of itself.

use std::sync::Arc;
use std::time::Duration;

use crate::{AlignedBuf, AlignedBytes, BoxFuture, Error, Op};

/// When a write is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// When the device has accepted it; a later [`BlockDevice::flush`] makes it durable.
    Cached,
    /// When it survives a loss of power, together with nothing else: earlier cached writes are not covered.
    Durable,
}

/// What the operation is for; devices keep classes apart so that background work does not delay commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoClass {
    /// The log.
    Wal = 0,
    /// A read that a caller waits for.
    Foreground,
    /// Flush, compaction, repair, snapshot traffic.
    Background,
}

/// Which implementation serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring with a ring thread of its own.
    Uring,
    /// A pool of threads with positional reads and writes.
    Threads,
    /// The seeded simulation.
    Sim,
}

/// What a device can do. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Bytes that can be addressed. For a sparse file this is the largest size it may grow to.
    pub capacity: u64,
    /// The largest single transfer; longer operations are split by the device.
    pub io_bytes_max: u64,
    /// Which implementation serves it.
    pub backend: Backend,
    /// Reads and writes go past the page cache.
    pub direct: bool,
    /// Why io_uring was not used although it was asked for, or why reads and writes go through the page cache.
    pub fallback_reason: Option<String>,
}

/// A range of blocks that can be read and written.
///
/// Offsets and lengths are multiples of [`crate::BLOCK_BYTES`]. Operations of a class start in the order of the calls and
/// complete in any order. A call may block while thousands of operations of the device are in flight. The device owns a buffer from the call until the completion, whatever happens to the returned [`Op`]:
/// dropping it cancels nothing.
///
/// A durable write or flush that fails poisons the device: every later write, flush and discard answers
/// [`crate::ErrorKind::Poisoned`]. `OutOfSpace` is the exception, since nothing was promised for the range.
pub trait BlockDevice: Send + Sync + 'static {
    /// What the device is.
    fn geometry(&self) -> &Geometry;

    /// Fills the whole of `buf` from `offset`, or fails. Blocks never written read as zeroes.
    fn read(&self, offset: u64, buf: AlignedBuf, class: IoClass) -> Op<AlignedBuf>;

    /// As [`BlockDevice::read`] for many ranges, handed to the backend together: io_uring gets them in one submission as far as the
    /// ring has places, threads take them at once. Answers in the order of `reads`, each for itself. A device that completes inside the
    /// call has nothing to gain.
    fn read_many(&self, reads: Vec<(u64, AlignedBuf)>, class: IoClass) -> Vec<Op<AlignedBuf>> {
        reads.into_iter().map(|(offset, buf)| self.read(offset, buf, class)).collect()
    }

    /// Writes `bufs` one after the other from `offset`. With [`WriteMode::Durable`] one write and one flush of the
    /// device cover all of them up to [`Geometry::io_bytes_max`]; what is longer takes several writes and one flush.
    fn write(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, class: IoClass) -> Op<()>;

    /// As [`BlockDevice::write`], for a caller that has nothing to do until it is complete: a device of files writes on the calling
    /// thread, and the operation is complete when the call returns.
    fn write_here(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, class: IoClass) -> Op<()> {
        self.write(offset, bufs, mode, class)
    }

    /// Makes every write that had completed before the call durable.
    fn flush(&self) -> Op<()>;

    /// Reserves space for the range, so that later writes into it cannot meet a full file system. Reads of it stay as
    /// they were. Devices that are never sparse only check the range.
    fn allocate(&self, offset: u64, length: u64) -> Op<()>;

    /// Gives the range back to the file system or device. Its content is undefined afterwards.
    fn discard(&self, offset: u64, length: u64) -> Op<()>;

    /// Runs `task` to its end where completions of this device arrive, so that it is woken without a change of thread.
    /// Used once a device, by the owner of the log.
    fn run_resident(&self, name: &str, task: BoxFuture<()>);

    /// The failure that poisoned the device.
    fn poisoned(&self) -> Option<Error>;

    /// Refuses new operations, waits up to `grace` for those in flight and for the resident task, and releases the
    /// device. Answers `Closed` if they did not end; buffers still in flight are then kept for good, never freed, and
    /// the operations answer `Closed` too, but for one that hangs in a call of a pool thread.
    fn shutdown(&self, grace: Duration) -> Op<()>;
}

/// Makes plain sharing read well: a device is passed by reference count.
pub(crate) type DeviceRef = Arc<dyn BlockDevice>;
