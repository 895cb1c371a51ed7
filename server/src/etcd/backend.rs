//! What the services need of a replicated store.
//!
//! # Place
//! The services are written over [`Backend`]: [`NodeBackend`] in production, a store in memory in tests.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use mainstay::Node;
use mainstay_engine::{BranchId, ClientToken, CommandBody, EngineStatus, LogIndex};
use mainstay_io::BoxFuture;
use mainstay_replication::{
    CommitToken, Durability, MemberInfo, NodeId, NodeStatus, PeerAddress, ReadLevel, Result, Write,
};

use super::model::Model;
use super::model::store::{Reader, SnapshotReader, Space};

/// Answers a request that another member forwarded.
pub type ForwardHandler = Arc<dyn Fn(Bytes) -> BoxFuture<Result<Bytes>> + Send + Sync>;

/// A replicated store with the model in its groups.
pub trait Backend: Clone + Send + Sync + 'static {
    /// A pinned state.
    type Reader: Reader + Clone + 'static;

    /// Proposes a command of the model and waits for the model's answer.
    fn propose(
        &self,
        branch: BranchId,
        command: Bytes,
        durability: Durability,
    ) -> impl Future<Output = Result<Bytes>> + Send;

    /// As [`Backend::propose`] for a request that applies once, whose answer is that of the first time.
    fn propose_once(
        &self,
        token: ClientToken,
        branch: BranchId,
        command: Bytes,
        durability: Durability,
    ) -> impl Future<Output = Result<Bytes>> + Send;

    /// Proposes a command and answers when the leader alone has it durable. Only on the leader.
    fn propose_local(&self, branch: BranchId, command: Bytes) -> impl Future<Output = Result<CommitToken>> + Send;

    /// Has the data of the model in this branch written down to the last level, and waits until its space is given back here.
    fn compact(&self, branch: BranchId) -> impl Future<Output = Result<()>> + Send;

    /// Waits until a read of this level may be served here.
    fn read_barrier(&self, level: ReadLevel) -> impl Future<Output = Result<LogIndex>> + Send;

    /// Pins what is applied, and says at which index.
    fn pin(&self, branch: BranchId) -> Result<(Self::Reader, LogIndex)>;

    /// The branch of a name.
    fn branch(&self, name: &str) -> Option<BranchId>;

    /// All branches.
    fn branches(&self) -> Vec<BranchId>;

    /// What the node knows of itself and its cluster.
    fn status(&self) -> NodeStatus;

    /// What the volume says of itself.
    fn engine_status(&self) -> EngineStatus;

    /// Resolves at each change of leader, role or membership. Cancel safe.
    fn changed(&self) -> impl Future<Output = ()> + Send;

    /// Sends a request to the leader.
    fn forward(&self, request: Bytes) -> impl Future<Output = Result<Bytes>> + Send;

    /// Answers the requests that others forwarded.
    fn set_forward_handler(&self, handler: ForwardHandler);

    /// See [`mainstay_replication::Node::add_member`].
    fn add_member(
        &self,
        name: &str,
        address: PeerAddress,
        voter: bool,
    ) -> impl Future<Output = Result<MemberInfo>> + Send;

    /// See [`mainstay_replication::Node::promote_member`].
    fn promote_member(&self, id: NodeId) -> impl Future<Output = Result<()>> + Send;

    /// See [`mainstay_replication::Node::update_member`].
    fn update_member(&self, id: NodeId, address: PeerAddress) -> impl Future<Output = Result<()>> + Send;

    /// See [`mainstay_replication::Node::remove_member`].
    fn remove_member(&self, id: NodeId) -> impl Future<Output = Result<()>> + Send;

    /// See [`mainstay_replication::Node::transfer_leader`].
    fn transfer_leader(&self, to: NodeId) -> impl Future<Output = Result<NodeId>> + Send;
}

/// A node whose groups run the model.
#[derive(Clone)]
pub struct NodeBackend {
    node: Node,
    model: Model,
}

impl NodeBackend {
    /// `model` is the one that the node was started with.
    pub fn new(node: Node, model: Model) -> Self {
        Self { node, model }
    }
}

impl Backend for NodeBackend {
    type Reader = SnapshotReader;

    async fn propose(&self, branch: BranchId, command: Bytes, durability: Durability) -> Result<Bytes> {
        let body = CommandBody::Custom { branch, command };
        let applied = self.node.replica().write(Write { body, durability }).await?;
        Ok(applied.response?)
    }

    async fn propose_once(
        &self,
        token: ClientToken,
        branch: BranchId,
        command: Bytes,
        durability: Durability,
    ) -> Result<Bytes> {
        let body = CommandBody::Custom { branch, command };
        let applied = self.node.replica().write_once(token, Write { body, durability }).await?;
        Ok(applied.response?)
    }

    async fn propose_local(&self, branch: BranchId, command: Bytes) -> Result<CommitToken> {
        self.node.replica().write_local(CommandBody::Custom { branch, command }).await
    }

    async fn compact(&self, branch: BranchId) -> Result<()> {
        let (replica, group) = (self.node.replica(), self.node.replica().group());
        let mut asked = Vec::new();
        for keyspace in Space::ALL.iter().filter_map(|space| group.keyspace(space.name())) {
            let body = CommandBody::Compact { branch, keyspace, first: Bytes::new(), end: None };
            let applied = replica.write(Write { body, durability: Durability::Quorum }).await?;
            applied.response?;
            asked.push(applied.index);
        }
        if let Some(&last) = asked.last() {
            self.read_barrier(ReadLevel::AtLeast(last)).await?;
        }
        for index in asked {
            group.compacted(index).await?;
        }
        Ok(())
    }

    async fn read_barrier(&self, level: ReadLevel) -> Result<LogIndex> {
        self.node.replica().read_barrier(level).await
    }

    fn pin(&self, branch: BranchId) -> Result<(SnapshotReader, LogIndex)> {
        let reader = SnapshotReader::new(self.node.replica().group().snapshot(branch)?, self.model.space_ids());
        let index = reader.index();
        Ok((reader, index))
    }

    fn branch(&self, name: &str) -> Option<BranchId> {
        self.node.replica().group().branch(name)
    }

    fn branches(&self) -> Vec<BranchId> {
        self.node.replica().group().branches().into_iter().map(|branch| branch.id).collect()
    }

    fn status(&self) -> NodeStatus {
        self.node.status()
    }

    fn engine_status(&self) -> EngineStatus {
        self.node.engine().status()
    }

    async fn changed(&self) {
        self.node.replica().changed().await;
    }

    async fn forward(&self, request: Bytes) -> Result<Bytes> {
        self.node.replica().forward(request).await
    }

    fn set_forward_handler(&self, handler: ForwardHandler) {
        self.node.replica().set_forward_handler(handler);
    }

    async fn add_member(&self, name: &str, address: PeerAddress, voter: bool) -> Result<MemberInfo> {
        self.node.replica().add_member(name, address, voter).await
    }

    async fn promote_member(&self, id: NodeId) -> Result<()> {
        self.node.replica().promote_member(id).await
    }

    async fn update_member(&self, id: NodeId, address: PeerAddress) -> Result<()> {
        self.node.replica().update_member(id, address).await
    }

    async fn remove_member(&self, id: NodeId) -> Result<()> {
        self.node.replica().remove_member(id).await
    }

    async fn transfer_leader(&self, to: NodeId) -> Result<NodeId> {
        self.node.replica().transfer_leader(Some(to)).await
    }
}
