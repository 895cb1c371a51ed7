//! Block devices, aligned buffers, time, randomness and threads: the only crate that calls the operating system.
//!
//! Everything above takes these through traits, so that a whole cluster, disks included, runs in one thread from one
//! seed.

#[cfg(all(mainstay_mutants, not(debug_assertions)))]
compile_error!("planted bugs are for the simulator alone: no build without debug assertions can have them");

/// True where this bug is planted, which only the simulator does: without `--cfg mainstay_mutants` it is the constant `false`.
#[doc(hidden)]
#[macro_export]
macro_rules! mutant {
    ($name:ident) => {{
        #[cfg(mainstay_mutants)]
        let planted = $crate::mutants::is_planted($crate::mutants::Mutant::$name);
        #[cfg(not(mainstay_mutants))]
        let planted = false;
        planted
    }};
}

// What every ordinary build proves: the switch is known to be off when it is compiled.
#[cfg(not(mainstay_mutants))]
const _: () = assert!(!mutant!(AckBeforeSync));

mod backend;
mod buf;
mod device;
mod env;
mod error;
mod file;
mod file_device;
mod file_media;
mod flight;
mod gate;
mod histogram;
mod lock;
mod media;
#[cfg(mainstay_mutants)]
pub mod mutants;
mod op;
mod probe;
mod request;
mod ring;
mod scratch;
pub mod sim;
mod threads;
mod timer;
mod transfer;
mod uring;
mod zone;

pub use buf::{AlignedBuf, AlignedBytes, BLOCK_BYTES};
pub use device::{Backend, BlockDevice, Geometry, IoClass, WriteMode};
pub use env::{BoxFuture, Clock, Environment, Random, Spawner, TaskHandle};
pub use error::{Error, ErrorKind, Result};
pub use histogram::{LATENCY_BUCKETS, LatencyCounts, LatencyHistogram, latency_bound};
pub use media::{BackendChoice, Media, MediaOptions, SUPERBLOCK_ZONE_BYTES, Target, create_media, open_media};
pub use op::{Completer, Op, block_on, yield_once};
pub use scratch::{Scratch, open_scratch};
pub use zone::Zone;
