//! The engine as a whole over simulated disks: against a model, under crashes, replicas beside each other, full disks.

// Threads and waits belong to tests over threads: the deterministic runs are in `sim`.
#![allow(clippy::disallowed_methods)]

mod crash;
mod format;
mod harness;
mod hostile;
mod lifecycle;
mod model;
mod replicas;
mod space;
mod state_machine;
