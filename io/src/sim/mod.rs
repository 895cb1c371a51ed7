//! The simulated disk: one seed decides every latency, fault and crash.
//!
//! # Place
//! Beside the real backends, behind the same [`crate::BlockDevice`] and [`crate::Media`]. It starts no thread and reads
//! no clock: completions arrive through a [`SimScheduler`] of the caller, for instance a [`SimTimeline`]. Without one every operation is complete when
//! the call returns, which is all that most unit tests need:
//!
//! ```
//! use mainstay_io::{AlignedBuf, IoClass, WriteMode, sim::{SimMedia, SimOptions}};
//!
//! let disk = SimMedia::new(SimOptions::default());
//! let media = disk.open()?;
//! media.create_zones(1 << 20).wait()?;
//! let (wal, _extents) = media.zones(1 << 20)?;
//! let block = AlignedBuf::copy_from(b"durable").freeze();
//! wal.write(0, vec![block.clone()], WriteMode::Durable, IoClass::Wal).wait()?;
//! wal.write(4096, vec![block], WriteMode::Cached, IoClass::Wal).wait()?;
//!
//! disk.crash(7); // the power fails: the second write may be there, in part, or not at all
//! let (wal, _extents) = disk.open()?.zones(1 << 20)?;
//! let read = wal.read(0, AlignedBuf::zeroed(4096), IoClass::Foreground).wait()?;
//! assert!(read.starts_with(b"durable"));
//! # Ok::<(), mainstay_io::Error>(())
//! ```
//!
//! # What the disk promises, and what it may do
//! 1. A read sees the latest completed write, durable or not.
//! 2. A durable write that was acknowledged survives a crash, alone: it covers no other write.
//! 3. A flush covers the writes that had completed before it was called, and none after.
//! 4. On a crash every other write is kept, lost or torn: any set of its 512-byte sectors may have reached the medium.
//! 5. With [`Faults`] it also fails, lies and rots, at the given rates.

mod core;
mod device;
mod disk;
mod env;
mod faults;
mod image;
mod media;
mod medium;
mod ranges;
mod timeline;

pub use device::SimDevice;
pub use disk::SimDisk;
pub use env::{SimClock, SimRandom, SimScheduler};
pub use faults::{Faults, IoEvent, IoKind, Latency, Mishap, Outcome, SimOptions};
pub use image::{CrashImages, CrashPoint, DiskImage};
pub use media::{SimLayout, SimMedia, Watch};
pub use timeline::SimTimeline;
