//! The seam to the network: framed requests between nodes.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::Result;

/// The Raft id of a volume in a cluster. Never used again for another volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a node listens for peers: `host:port`, looked up again whenever a connection fails.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerAddress(pub String);

/// Who is at the other end; the first frame of a connection in both directions. A mismatch of cluster, or an incarnation
/// other than the one the membership names, ends the connection with `Foreign`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// All zero before `init` or `join`.
    pub cluster: [u8; 16],
    /// Zero before `init` or `join`.
    pub node: NodeId,
    /// Made with the volume.
    pub incarnation: [u8; 16],
    /// The name of the process, for instance of its pod.
    pub name: String,
    /// Where the sender listens for peers now; receivers prefer it to what they knew.
    pub peer_address: PeerAddress,
    /// Fingerprint of the settings that must be equal on all replicas.
    pub settings_fingerprint: u64,
}

/// A request or an answer: opaque to the transport, at most the transport's frame limit.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// Which service: Raft append, vote, snapshot, table read, client forward, admin. Owned by `node.rs`.
    pub method: u8,
    /// Its encoding, versioned.
    pub body: Bytes,
}

/// Answers requests of peers.
pub trait Handler: Send + Sync + 'static {
    /// Checks the other end before any request is served.
    fn accept(&self, hello: &Hello) -> Result<()>;

    /// Answers one request. Called in the order in which the requests of a connection arrived; the futures run beside each
    /// other.
    fn handle(&self, from: Hello, request: Envelope) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>>;
}

/// Sends requests to peers and receives theirs. A queue towards a peer is bounded; a full one answers `Unavailable`.
pub trait Transport: Send + Sync + 'static {
    /// Starts to serve `handler` under `hello`; called again when the identity changes.
    fn serve(&self, hello: Hello, handler: Arc<dyn Handler>);

    /// Sends a request to the node at `address` and waits for the answer. `expect` names the node id that must answer, if
    /// one is known.
    ///
    /// Requests are sent in the order in which the futures of their calls were first polled, and while no connection breaks
    /// they reach the handler in this order. Answers come in any.
    ///
    /// # Errors
    /// `Unavailable` when it was certainly not handled, `Indeterminate` when it may have been.
    fn call(
        &self,
        address: PeerAddress,
        expect: Option<NodeId>,
        request: Envelope,
        timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>>;

    /// Where this node can be reached.
    fn local_address(&self) -> PeerAddress;

    /// Ends all connections and tasks.
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}
