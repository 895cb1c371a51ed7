//! The reference server and its command line: the etcd v3 API and the project's own gRPC services over a replicated store.
//!
//! # Place
//! Above the facade; no storage logic. [`settings`] is what is set, `serve` what runs, [`status`] what it says of itself.

#![deny(unsafe_code)]

pub mod allocator;
mod aside;
pub mod cli;
pub mod codec;
pub mod etcd;
pub mod proto;
pub mod settings;
pub mod status;
pub mod units;

mod admin;
pub mod bench;
pub mod client;
mod connections;
mod context;
pub mod demo;
mod disk_check;
mod front;
mod limits;
mod logs;
mod memory;
mod metrics;
mod offline;
mod placed;
mod prestop;
mod recover;
mod serve;
mod service;
