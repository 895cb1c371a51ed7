//! What a simulated disk is asked to do, what may go wrong, and the record of what did.

use std::time::Duration;

use crate::ErrorKind;

/// How a simulated disk behaves. Equal options and equal calls give equal behaviour.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Decides all that is random.
    pub seed: u64,
    /// Bytes that can be addressed on each disk. Only what is written takes memory.
    pub capacity: u64,
    /// How long a read takes. Times count only where there is a scheduler.
    pub read_latency: Latency,
    /// How long a write takes.
    pub write_latency: Latency,
    /// How much longer a durable write takes, and how long a flush takes.
    pub flush_latency: Latency,
    /// What goes wrong, and how often.
    pub faults: Faults,
    /// Bytes that may be allocated on the disk that holds extents before it is full. Lifted by
    /// [`SimDisk::set_space`](super::SimDisk::set_space).
    pub enospc_after: Option<u64>,
}

impl Default for SimOptions {
    /// A healthy disk of 64 GiB that answers at once.
    fn default() -> Self {
        Self {
            seed: 0,
            capacity: 64 << 30,
            read_latency: Latency::default(),
            write_latency: Latency::default(),
            flush_latency: Latency::default(),
            faults: Faults::default(),
            enospc_after: None,
        }
    }
}

/// A range of times from which each operation draws one. Unequal ends let completions overtake each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// The shortest time.
    pub min: Duration,
    /// The longest time.
    pub max: Duration,
}

impl Latency {
    /// Between `min` and `max` microseconds.
    pub const fn micros(min: u64, max: u64) -> Self {
        Self { min: Duration::from_micros(min), max: Duration::from_micros(max) }
    }
}

/// Rates of faults, each in cases of a million operations of its kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A read answers `Media`; the data is unharmed.
    pub read_error: u32,
    /// A write answers `Media`; any of its sectors may have changed.
    pub write_error: u32,
    /// A flush answers `Media`; nothing became durable.
    pub flush_error: u32,
    /// A write is acknowledged and lands at another offset.
    pub misdirected_write: u32,
    /// A write is acknowledged and never happens.
    pub phantom_write: u32,
    /// A flush, or that of a durable write, is acknowledged and never happens.
    pub lost_flush: u32,
    /// Before a read, one bit of what it reads flips, for good.
    pub bit_rot: u32,
    /// The device transfers an operation in two parts. Seen by nobody but in time and in what a crash leaves.
    pub short_io: u32,
}

/// What becomes of one write that is acknowledged as if it had been done: see [`SimDisk::plan`](super::SimDisk::plan).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// It never happens.
    Lost,
    /// It lands at another offset, over data of somebody else.
    Misdirected,
    /// Some of its 512-byte sectors land, and at least one does not.
    Torn,
}

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// A read.
    Read,
    /// A write that promises nothing.
    CachedWrite,
    /// A write that is durable once acknowledged.
    DurableWrite,
    /// A flush.
    Flush,
    /// A reservation.
    Allocate,
    /// A range given back.
    Discard,
}

/// How an operation ended, as the disk knows it; the caller sees only [`Outcome::Failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As asked.
    Done,
    /// With an error.
    Failed(ErrorKind),
    /// Acknowledged, but written to this offset.
    Misdirected(u64),
    /// Acknowledged, but never written or flushed.
    Phantom,
    /// Acknowledged, but written in part.
    Torn,
    /// Read after a bit had flipped at this offset.
    Rotten(u64),
    /// Moved in two parts; this is the first.
    Short,
}

/// One line of the record of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEvent {
    /// Counts the events of a disk from zero.
    pub sequence: u64,
    /// What was asked.
    pub kind: IoKind,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u64,
    /// What came of it.
    pub outcome: Outcome,
}
