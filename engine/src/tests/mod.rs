//! The engine as a whole over simulated disks: against a model, under crashes, replicas beside each other, full disks.

#![allow(clippy::disallowed_methods, reason = "tests over threads wait; the deterministic runs are in `sim`")]

mod changes;
mod compact;
mod conditions;
mod crash;
mod expiry;
mod format;
mod golden;
mod groups;
mod harness;
mod heal;
mod hostile;
mod lifecycle;
mod many;
mod merges;
mod model;
mod offline;
mod once;
mod options;
mod ranges;
mod replicas;
mod space;
mod state_machine;
mod stats;
