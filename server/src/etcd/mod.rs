//! The etcd v3 API: the model that decides at apply, and the gRPC services over it.
//!
//! # Place
//! [`Model`] goes into the node as its state machine, [`Etcd`] serves it. docs/etcd.md says what is served and where it
//! differs from etcd.

mod backend;
mod cluster;
mod context;
mod error;
mod export;
mod kv;
mod lease;
mod lessor;
mod maintenance;
pub mod model;
mod proposer;
mod service;
mod watch;

pub use backend::{Backend, ForwardHandler, NodeBackend};
pub use context::{
    BRANCH_KEY, CLIENT_TOKEN_KEY, COMMIT_TOKEN_KEY, DURABILITY_KEY, READ_LEVEL_KEY, parse_durability, parse_read_level,
};
pub(crate) use context::{asked_durability, asked_read_level};
pub use error::{Failure, Refusal};
pub use maintenance::ETCD_VERSION;
pub use model::Model;
pub use service::{Etcd, EtcdSettings, KvServer};

#[cfg(test)]
mod beside_etcd;
#[cfg(test)]
mod double;
#[cfg(test)]
mod tests;
