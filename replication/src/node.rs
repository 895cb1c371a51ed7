//! A replica of a replicated store.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{
    Applied, CommandBody, Engine, Group, GroupSettings, GroupStatus, LogIndex, OwnerRecord, Snapshot,
};
use mainstay_io::Environment;

use crate::{Durability, NodeId, PeerAddress, ReadLevel, Result, Runtime, TokioRuntime, Transport};

/// How a node takes part. Times are `Duration`s.
#[derive(Clone)]
pub struct NodeOptions {
    /// The name under which peers and operators know this process.
    pub name: String,
    /// Where clients reach it, told to others so that they can name the leader.
    pub client_address: String,
    /// Names and addresses of the other processes, for discovery before and after `init`.
    pub peers: BTreeMap<String, PeerAddress>,
    /// Heartbeat interval. Default 100 ms.
    pub heartbeat: Duration,
    /// Election timeout, lower bound; the upper is twice as long. Default 300 ms.
    pub election_timeout: Duration,
    /// Settings equal on all replicas.
    pub group: GroupSettings,
    /// Bytes of entries kept in memory for peers and readers. Default 64 MiB.
    pub entry_cache_bytes: u64,
    /// The wall clock that stamps commands, and the source of identities.
    pub environment: Environment,
}

/// A command and what its answer shall promise.
#[derive(Clone, Debug)]
pub struct Write {
    /// What to do; the node adds the time.
    pub body: CommandBody,
    /// When to answer.
    pub durability: Durability,
}

/// The position of a write that was answered at [`Durability::Local`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitToken {
    /// Raft term.
    pub term: u64,
    /// Its index, final only if it is committed in this term.
    pub index: LogIndex,
}

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberRole {
    /// Votes.
    Voter,
    /// Receives and does not vote.
    Learner,
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberInfo {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where it listens for peers.
    pub peer_address: PeerAddress,
    /// Where it listens for clients.
    pub client_address: String,
    /// The incarnation of its volume.
    pub incarnation: [u8; 16],
    /// Its role.
    pub role: MemberRole,
}

/// What a node knows of itself and its cluster.
#[derive(Clone, Debug, Default)]
pub struct NodeStatus {
    /// Zero before `init` or `join`.
    pub cluster: [u8; 16],
    /// Zero before `init` or `join`.
    pub id: NodeId,
    /// `leader`, `follower`, `candidate`, `learner`, `waiting` (no identity yet), `removed`, `failed`.
    pub role: String,
    /// Raft term.
    pub term: u64,
    /// The leader it knows.
    pub leader: Option<NodeId>,
    /// Last entry in its log.
    pub last_log: LogIndex,
    /// Last entry known committed.
    pub committed: LogIndex,
    /// Of the group underneath.
    pub group: GroupStatus,
    /// Members.
    pub members: Vec<MemberInfo>,
    /// For a leader: entries that each other member lacks.
    pub lag: BTreeMap<u64, u64>,
    /// Why the node left service.
    pub failure: Option<String>,
}

/// A node. Cloning gives another handle.
pub struct Node<R: Runtime = TokioRuntime> {
    runtime: PhantomData<R>,
}

impl<R: Runtime> Node<R> {
    /// Starts a node on an open engine. Without an identity it waits for `init` or for a cluster that knows its name.
    pub async fn start(
        engine: Engine,
        found: Vec<OwnerRecord>,
        options: NodeOptions,
        transport: Arc<dyn Transport>,
    ) -> Result<Self> {
        let _ = (engine, found, options, transport);
        todo!()
    }

    /// Gives birth to a cluster over `members` (names in [`NodeOptions::peers`], this one included). Two-phase and
    /// idempotent: the same call again finds the cluster made. Refuses a member that has data or a cluster.
    pub async fn init(&self, members: &[String]) -> Result<[u8; 16]> {
        let _ = members;
        todo!()
    }

    /// Proposes a command; a follower forwards it to the leader.
    ///
    /// # Errors
    /// `NotLeader`, `Unavailable`: not applied. `Indeterminate`: may have been.
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the command in the log.
    pub async fn write(&self, write: Write) -> Result<Applied> {
        let _ = write;
        todo!()
    }

    /// Proposes a command and answers when the leader alone has it durable. Only on the leader.
    pub async fn write_local(&self, body: CommandBody) -> Result<CommitToken> {
        let _ = body;
        todo!()
    }

    /// Waits until what `write_local` promised holds at a stronger level. `Indeterminate` if the term ended first.
    pub async fn wait(&self, token: CommitToken, durability: Durability) -> Result<Applied> {
        let _ = (token, durability);
        todo!()
    }

    /// A read view at the level asked for, of the branch of that name (`main` or a clone).
    pub async fn snapshot(&self, branch: &str, level: ReadLevel) -> Result<Snapshot> {
        let _ = (branch, level);
        todo!()
    }

    /// Waits until a read of this level may be served here; returns the applied index that it may read at.
    pub async fn read_barrier(&self, level: ReadLevel) -> Result<LogIndex> {
        let _ = level;
        todo!()
    }

    /// Sends an application request to the leader (here if this is it). See [`Node::set_forward_handler`].
    pub async fn forward(&self, request: Bytes) -> Result<Bytes> {
        let _ = request;
        todo!()
    }

    /// Answers application requests that others forwarded.
    pub fn set_forward_handler(
        &self,
        handler: Arc<dyn Fn(Bytes) -> mainstay_io::BoxFuture<Result<Bytes>> + Send + Sync>,
    ) {
        let _ = handler;
        todo!()
    }

    /// Adds the process of that name as a learner under a new id, and promotes it once it has caught up if `voter`.
    pub async fn add_member(&self, name: &str, address: PeerAddress, voter: bool) -> Result<MemberInfo> {
        let _ = (name, address, voter);
        todo!()
    }

    /// Makes a learner a voter.
    pub async fn promote_member(&self, id: NodeId) -> Result<()> {
        let _ = id;
        todo!()
    }

    /// Changes the addresses of a member.
    pub async fn update_member(&self, id: NodeId, address: PeerAddress) -> Result<()> {
        let _ = (id, address);
        todo!()
    }

    /// Removes a member.
    pub async fn remove_member(&self, id: NodeId) -> Result<()> {
        let _ = id;
        todo!()
    }

    /// Hands leadership to `to`, or to the most caught-up voter. Returns once this node sees another leader.
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<NodeId> {
        let _ = to;
        todo!()
    }

    /// The replicated state, for local reads.
    pub fn group(&self) -> &Group {
        todo!()
    }

    /// Counts and states.
    pub fn status(&self) -> NodeStatus {
        todo!()
    }

    /// Resolves at each change of leader, role or membership. Cancel safe.
    pub async fn changed(&self) {
        todo!()
    }

    /// Hands leadership over if it leads, stops taking part, closes the engine.
    pub async fn close(&self) -> Result<()> {
        todo!()
    }
}
