//! A whole cluster in one thread, from one seed: runtime, disks, network, faults, clients and the checks of what they saw.
//!
//! docs/testing.md says how to run it, what may go wrong in it and how to replay a seed.

#![forbid(unsafe_code)]

pub mod application;
pub mod check;
pub mod crash_points;
mod disk;
pub mod log_world;
#[cfg(mainstay_mutants)]
pub mod mutants;
pub mod net;
pub mod rt;
mod store;
pub mod store_world;
pub mod transactions;
mod value;
pub mod world;
