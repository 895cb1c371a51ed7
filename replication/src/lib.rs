//! Raft replication: openraft behind our own [`Node`].
//!
//! Only this crate names openraft, and not in its public API. docs/replication.md says what each [`Durability`] and
//! [`ReadLevel`] promises and what happens on failures.

mod batching;
mod changes;
mod disk;
mod durability;
mod entry_index;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod groups;
mod heal;
mod init;
mod lag;
mod levels;
mod liveness;
mod log_cases;
mod log_heal;
mod log_store;
mod membership;
mod network;
mod node;
mod pipeline;
mod priority;
mod progress;
mod proposals;
mod ranges;
mod read;
mod receipts;
mod record;
mod recover;
mod relief;
mod rest;
mod room;
mod runtime;
mod service;
mod state_machine;
mod status;
mod tasks;
mod tcp;
mod transport;
mod turns;
mod types;
mod version;
mod wire;
mod witness;
mod write;

#[cfg(test)]
mod tests;

pub use batching::{Batching, UnderWay};
pub use disk::DiskHealth;
pub use durability::{Durability, ReadLevel};
pub use error::{Error, ErrorKind, Result};
pub use groups::{GROUP_KEYSPACE_PREFIX, GROUP_NAME_BYTES_MAX};
pub use lag::{SiteLag, SiteLagBound};
pub use log_store::LogHealStatus;
pub use network::keeps_order;
pub use node::{CommitToken, ForwardHandler, MemberInfo, MemberRole, Node, NodeOptions, NodeStatus, Write};
pub use ranges::{PLACED_NAME_BYTES_MAX, Placed, PlacedOp, PlacedScan, RangeInfo};
pub use recover::{RecoveryPlan, RecoveryVolume, examine, recover};
pub use runtime::{Runtime, TokioRuntime};
pub use tcp::{FRAME_BYTES_MAX, TcpTransport};
pub use transport::{Envelope, Handler, Hello, NodeId, PeerAddress, Transport};
pub use version::CLUSTER_VERSION_MAX;
