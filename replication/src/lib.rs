//! Raft replication: openraft behind our own [`Node`].
//!
//! Only this crate names openraft, and not in its public API.

mod durability;
mod error;
mod node;
mod runtime;
mod transport;

pub use durability::{Durability, ReadLevel};
pub use error::{Error, ErrorKind, Result};
pub use node::{CommitToken, MemberInfo, MemberRole, Node, NodeOptions, NodeStatus, Write};
pub use runtime::{Runtime, TokioRuntime};
pub use transport::{Envelope, Handler, Hello, NodeId, PeerAddress, TcpTransport, Transport};
