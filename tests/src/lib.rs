//! The one harness of the tests that run real processes on real files: servers on loopback, clients that remember what
//! was acknowledged, loop devices, devices with errors.
//!
//! # Invariants
//! 1. Every process that a test starts is ended by its id when its [`Server`] is dropped, also when the test panics.
//! 2. Every wait has a bound and names what it waited for.

#![forbid(unsafe_code)]

pub mod faulty_device;
pub mod ledger;
pub mod load;
pub mod loopback;
pub mod netns;
pub mod proxy;
pub mod registers;
pub mod server;

pub use faulty_device::{FaultyDevice, Request};
pub use ledger::Ledger;
pub use loopback::LoopDevice;
pub use netns::Network;
pub use proxy::{Damage, Proxy};
pub use registers::{Level, Registers};
pub use server::{Cluster, Server, WAIT_MAX, binary, until};
