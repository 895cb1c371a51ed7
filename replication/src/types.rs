//! The types that openraft is instantiated with. None of them leaves this crate.
//!
//! # Place
//! below every other module; names openraft so that the others read like Raft and not like generics
//! # Invariants
//! - T1. Standard Raft: one leader a term, so `(term, index)` names one entry for ever. That is what makes a
//!   [`crate::CommitToken`] of two numbers sound.
//! - T2. The Raft index is the engine's [`LogIndex`]. Index 0 is the membership that `init` wrote; the engine's 0 means
//!   "before all", and no command ever has it.

use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use mainstay_engine::{Applied, LogIndex};
use openraft::vote::RaftLeaderId;
use tokio::sync::oneshot;

use crate::{CommitToken, MemberInfo, MemberRole, NodeId, PeerAddress, Runtime};

pub(crate) type LeaderId = openraft::vote::leader_id_std::LeaderId<u64, u64>;
pub(crate) type Clid = <LeaderId as RaftLeaderId>::Committed;
pub(crate) type LogId = openraft::LogId<Clid>;
pub(crate) type Vote = openraft::Vote<LeaderId>;
pub(crate) type Membership = openraft::Membership<u64, Member>;
pub(crate) type StoredMembership = openraft::StoredMembership<Clid, u64, Member>;
pub(crate) type EntryPayload = openraft::EntryPayload<Payload, u64, Member>;
pub(crate) type Entry = openraft::Entry<Clid, EntryPayload>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<Clid, u64, Member>;
pub(crate) type RaftSnapshot = openraft::Snapshot<Clid, u64, Member, crate::state_machine::SnapshotHandle>;

/// Makes a log id.
pub(crate) fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId::new(term, 0).to_committed(), index)
}

/// The term of a log id.
pub(crate) fn term_of(id: &LogId) -> u64 {
    id.committed_leader_id().term
}

/// What membership entries say of a node. The incarnation is what a handshake is checked against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) peer_address: String,
    pub(crate) client_address: String,
    pub(crate) incarnation: [u8; 16],
    /// Where it stands; empty for nowhere in particular.
    pub(crate) site: String,
    /// Who of those that may lead shall: the larger one.
    pub(crate) priority: u8,
    /// Keeps the log and no tables.
    pub(crate) witness: bool,
    /// The version of its cluster; 0 for the first one, which is not written.
    pub(crate) version: u16,
}

impl Member {
    pub(crate) fn info(&self, id: u64, role: MemberRole) -> MemberInfo {
        MemberInfo {
            id: NodeId(id),
            name: self.name.clone(),
            peer_address: PeerAddress(self.peer_address.clone()),
            client_address: self.client_address.clone(),
            incarnation: self.incarnation,
            site: self.site.clone(),
            priority: self.priority,
            witness: self.witness,
            version: self.version,
            role,
        }
    }
}

impl From<&MemberInfo> for Member {
    fn from(info: &MemberInfo) -> Self {
        Self {
            name: info.name.clone(),
            peer_address: info.peer_address.0.clone(),
            client_address: info.client_address.clone(),
            incarnation: info.incarnation,
            site: info.site.clone(),
            priority: info.priority,
            witness: info.witness,
            version: info.version,
        }
    }
}

/// Members of a configuration with their roles.
pub(crate) fn members_of(membership: &Membership) -> Vec<MemberInfo> {
    infos(membership, &membership.voter_ids().collect())
}

/// Every member with the role that it has once the change under way is done: of a joint configuration the second half counts.
pub(crate) fn members_ahead(membership: &Membership) -> Vec<MemberInfo> {
    infos(membership, &membership.get_joint_config().last().cloned().unwrap_or_default())
}

fn infos(membership: &Membership, voters: &BTreeSet<u64>) -> Vec<MemberInfo> {
    membership
        .nodes()
        .map(|(id, member)| member.info(*id, if voters.contains(id) { MemberRole::Voter } else { MemberRole::Learner }))
        .collect()
}

/// Told once the entry that carries it is durable in this node's log, with the entry's position; dropped when it never
/// will be. This is how `Durability::Local` learns the position of its entry: openraft says it only at commit.
#[derive(Clone)]
pub(crate) struct LocalWaiter(Arc<Mutex<Option<oneshot::Sender<CommitToken>>>>);

impl LocalWaiter {
    pub(crate) fn new() -> (Self, oneshot::Receiver<CommitToken>) {
        let (tx, rx) = oneshot::channel();
        (Self(Arc::new(Mutex::new(Some(tx)))), rx)
    }

    pub(crate) fn durable(&self, term: u64, index: u64) {
        if let Some(tx) = self.0.lock().expect("nothing panics while it holds this lock").take() {
            // The writer may have gone; nobody else is told.
            let _ = tx.send(CommitToken { term, index: LogIndex(index) });
        }
    }

    /// The entry will never be durable here.
    pub(crate) fn abandon(&self) {
        self.0.lock().expect("nothing panics while it holds this lock").take();
    }
}

/// The payload of a normal entry: an encoded engine command, shared with the log's queue and the peers' frames.
#[derive(Clone)]
pub(crate) struct Payload {
    pub(crate) bytes: Bytes,
    /// Only on the leader that proposed it, never stored or sent.
    pub(crate) waiter: Option<LocalWaiter>,
}

impl Payload {
    pub(crate) fn new(bytes: Bytes) -> Self {
        Self { bytes, waiter: None }
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes.len())
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What applying an entry answers: nothing for blank and membership entries.
#[derive(Debug)]
pub(crate) struct Reply(pub(crate) Option<Applied>);

/// The type configuration over a runtime.
pub(crate) struct TypeConfig<R>(PhantomData<fn() -> R>);

impl<R> fmt::Debug for TypeConfig<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TypeConfig")
    }
}

impl<R> Clone for TypeConfig<R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for TypeConfig<R> {}

impl<R> Default for TypeConfig<R> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<R> PartialEq for TypeConfig<R> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<R> Eq for TypeConfig<R> {}

impl<R> PartialOrd for TypeConfig<R> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<R> Ord for TypeConfig<R> {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

impl<R: Runtime> openraft::RaftTypeConfig for TypeConfig<R> {
    type D = Payload;
    type R = Reply;
    type NodeId = u64;
    type Node = Member;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = EntryPayload;
    type Entry = Entry;
    type AsyncRuntime = R;
    type Responder<T>
        = openraft::impls::ProgressResponder<Self, T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// openraft over the engine.
pub(crate) type Raft<R> = openraft::Raft<TypeConfig<R>, crate::state_machine::StateMachine<R, crate::witness::Replica>>;

/// Turns an error of a seam into what openraft's storage traits want.
pub(crate) fn io_error(message: impl fmt::Display) -> std::io::Error {
    std::io::Error::other(message.to_string())
}
