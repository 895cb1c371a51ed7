//! Block devices, aligned buffers, time, randomness and threads: the only crate that calls the operating system.
//!
//! Everything above takes these through traits, so that a whole cluster, disks included, runs in one thread from one
//! seed.

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
mod lock;
mod media;
mod op;
mod probe;
mod request;
mod ring;
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
pub use media::{BackendChoice, Media, MediaOptions, SUPERBLOCK_ZONE_BYTES, Target, create_media, open_media};
pub use op::{Completer, Op, block_on};
pub use zone::Zone;
