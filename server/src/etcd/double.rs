//! A backend in memory for tests of the services: one member, always the leader unless told otherwise.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_engine::{BranchId, ClientToken, EngineStatus, LogIndex, MAIN};
use mainstay_replication::{
    CommitToken, Durability, Error, ErrorKind, MemberInfo, MemberRole, NodeId, NodeStatus, PeerAddress, ReadLevel,
    Result,
};
use tokio::sync::Notify;

use super::backend::{Backend, ForwardHandler};
use super::model::Model;
use super::model::store::MemoryStore;

#[derive(Clone)]
pub(super) struct MemoryBackend {
    model: Model,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    /// Held while a command is applied, as the one applier of a group.
    applier: Arc<tokio::sync::Mutex<()>>,
}

struct State {
    branches: BTreeMap<BranchId, (String, MemoryStore)>,
    index: u64,
    status: NodeStatus,
    handler: Option<ForwardHandler>,
    /// Entries of which the answer took part.
    entries: u64,
    answered: BTreeMap<ClientToken, Bytes>,
    compacted: Vec<BranchId>,
}

impl MemoryBackend {
    pub(super) fn new(model: Model) -> Self {
        let member = MemberInfo {
            id: NodeId(7),
            name: "n1".into(),
            peer_address: PeerAddress("127.0.0.1:2380".into()),
            client_address: "127.0.0.1:2379".into(),
            incarnation: [1; 16],
            site: String::new(),
            priority: 0,
            witness: false,
            version: 0,
            role: MemberRole::Voter,
        };
        let status = NodeStatus {
            cluster: [9; 16],
            id: NodeId(7),
            role: "leader".into(),
            term: 3,
            leader: Some(NodeId(7)),
            members: vec![member],
            ..NodeStatus::default()
        };
        let branches = BTreeMap::from([(MAIN, ("main".to_owned(), MemoryStore::default()))]);
        let state = State {
            branches,
            index: 0,
            status,
            handler: None,
            entries: 0,
            answered: BTreeMap::new(),
            compacted: Vec::new(),
        };
        Self { model, state: Arc::new(Mutex::new(state)), changed: Arc::default(), applier: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a branch that begins as main is.
    pub(super) fn clone_main(&self, name: &str) -> BranchId {
        let mut state = self.state();
        state.index += 1;
        let id = BranchId(state.index);
        let store = state.branches[&MAIN].1.clone();
        state.branches.insert(id, (name.to_owned(), store));
        id
    }

    pub(super) fn set_status(&self, change: impl FnOnce(&mut NodeStatus)) {
        change(&mut self.state().status);
        self.changed.notify_waiters();
    }

    /// The branches whose space was asked for.
    pub(super) fn compacted(&self) -> Vec<BranchId> {
        self.state().compacted.clone()
    }

    pub(super) fn entries(&self) -> u64 {
        self.state().entries
    }

    /// As after a snapshot from a leader: nothing in memory is true any more.
    pub(super) fn replace(&self, branch: BranchId, store: MemoryStore) {
        let mut state = self.state();
        state.index += 1;
        if let Some((_, old)) = state.branches.get_mut(&branch) {
            *old = store;
        }
        drop(state);
        self.model.reset();
    }

    pub(super) fn store(&self, branch: BranchId) -> MemoryStore {
        self.state().branches[&branch].1.clone()
    }
}

impl Backend for MemoryBackend {
    type Reader = MemoryStore;

    async fn propose(&self, branch: BranchId, command: Bytes, durability: Durability) -> Result<Bytes> {
        if durability != Durability::Quorum {
            return Err(Error::new(ErrorKind::Unsupported, format!("not offered yet durability={durability:?}")));
        }
        if self.status().leader.is_none() {
            return Err(Error::new(ErrorKind::Unavailable, "no leader"));
        }
        let _applier = self.applier.lock().await;
        let (mut store, index) = {
            let mut state = self.state();
            state.index += 1;
            state.entries += 1;
            let index = LogIndex(state.index);
            let (_, store) = state.branches.get(&branch).ok_or_else(|| Error::new(ErrorKind::NotFound, "no branch"))?;
            (store.clone(), index)
        };
        let answer = self.model.apply_to(&mut store, index, command).await?;
        if let Some((_, old)) = self.state().branches.get_mut(&branch) {
            *old = store;
        }
        self.model.publish(index);
        Ok(answer)
    }

    async fn propose_once(
        &self,
        token: ClientToken,
        branch: BranchId,
        command: Bytes,
        durability: Durability,
    ) -> Result<Bytes> {
        let known = self.state().answered.get(&token).cloned();
        if let Some(answer) = known {
            return Ok(answer);
        }
        let answer = self.propose(branch, command, durability).await?;
        self.state().answered.insert(token, answer.clone());
        Ok(answer)
    }

    async fn compact(&self, branch: BranchId) -> Result<()> {
        self.state().compacted.push(branch);
        Ok(())
    }

    async fn propose_local(&self, branch: BranchId, command: Bytes) -> Result<CommitToken> {
        self.propose(branch, command, Durability::Quorum).await?;
        Ok(CommitToken { term: 3, index: LogIndex(self.state().index) })
    }

    async fn read_barrier(&self, level: ReadLevel) -> Result<LogIndex> {
        if let ReadLevel::Stale(_) = level {
            return Err(Error::new(ErrorKind::Unsupported, "not offered yet level=stale"));
        }
        let state = self.state();
        match state.status.leader {
            Some(_) => Ok(LogIndex(state.index)),
            None => Err(Error::new(ErrorKind::Unavailable, "no leader")),
        }
    }

    fn pin(&self, branch: BranchId) -> Result<(MemoryStore, LogIndex)> {
        let state = self.state();
        let (_, store) = state.branches.get(&branch).ok_or_else(|| Error::new(ErrorKind::NotFound, "no branch"))?;
        Ok((store.clone(), LogIndex(state.index)))
    }

    fn branch(&self, name: &str) -> Option<BranchId> {
        self.state().branches.iter().find(|(_, (n, _))| n == name).map(|(id, _)| *id)
    }

    fn branches(&self) -> Vec<BranchId> {
        self.state().branches.keys().copied().collect()
    }

    fn status(&self) -> NodeStatus {
        self.state().status.clone()
    }

    fn engine_status(&self) -> EngineStatus {
        EngineStatus::default()
    }

    async fn changed(&self) {
        self.changed.notified().await;
    }

    async fn forward(&self, request: Bytes) -> Result<Bytes> {
        let handler = self.state().handler.clone();
        handler.ok_or_else(|| Error::new(ErrorKind::Unavailable, "no handler"))?(request).await
    }

    fn set_forward_handler(&self, handler: ForwardHandler) {
        self.state().handler = Some(handler);
    }

    async fn add_member(&self, name: &str, address: PeerAddress, voter: bool) -> Result<MemberInfo> {
        let mut state = self.state();
        let member = MemberInfo {
            id: NodeId(state.status.members.len() as u64 + 7),
            name: name.to_owned(),
            peer_address: address,
            client_address: String::new(),
            incarnation: [2; 16],
            site: String::new(),
            priority: 0,
            witness: false,
            version: 0,
            role: if voter { MemberRole::Voter } else { MemberRole::Learner },
        };
        state.status.members.push(member.clone());
        Ok(member)
    }

    async fn promote_member(&self, id: NodeId) -> Result<()> {
        self.set_status(|status| {
            status.members.iter_mut().filter(|member| member.id == id).for_each(|m| m.role = MemberRole::Voter)
        });
        Ok(())
    }

    async fn update_member(&self, id: NodeId, address: PeerAddress) -> Result<()> {
        self.set_status(|status| {
            status.members.iter_mut().filter(|m| m.id == id).for_each(|m| m.peer_address = address.clone())
        });
        Ok(())
    }

    async fn remove_member(&self, id: NodeId) -> Result<()> {
        self.set_status(|status| status.members.retain(|member| member.id != id));
        Ok(())
    }

    async fn transfer_leader(&self, to: NodeId) -> Result<NodeId> {
        self.set_status(|status| {
            status.leader = Some(to);
            status.role = "follower".into();
            status.term += 1;
        });
        Ok(to)
    }
}
