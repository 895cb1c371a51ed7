//! `mainstay.v1.Store`: what the etcd API has no word for.

use std::sync::Arc;
use std::time::Duration;

use mainstay::{
    BranchInfo, CheckpointInfo, CommitToken, Durability, GROUP_NAME_BYTES_MAX, LogIndex, ReadLevel,
    Store as StoreHandle,
};
use tonic::{Request, Response, Status};

use crate::context::{self, Context, check_new_name, grpc_status};
use crate::proto::mainstay::v1 as pb;
use crate::status::{GroupSection, GroupSource, group_section};
use pb::store_server::{Store, StoreServer};

/// The service over the node of the context.
pub(crate) fn service(context: Arc<Context>) -> StoreServer<impl Store> {
    StoreServer::new(StoreService { context })
}

/// The number of the first group, which has no name.
const FIRST_GROUP: u64 = 1;

struct StoreService {
    context: Arc<Context>,
}

impl StoreService {
    fn store(&self) -> Result<StoreHandle, Status> {
        Ok(self.context.node_or_status()?.store())
    }

    /// All groups, the first one before the others.
    fn groups(&self) -> Result<Vec<pb::Group>, Status> {
        let node = self.context.node_or_status()?;
        let status = node.status();
        let members = status.members.clone();
        let first = GroupSource { number: FIRST_GROUP, name: String::new(), node: Some(status) };
        let all = std::iter::once(first).chain(context::groups(node));
        Ok(all.map(|group| group_message(group_section(&group, &members))).collect())
    }
}

#[tonic::async_trait]
impl Store for StoreService {
    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        self.context.status_message().map(Response::new)
    }

    async fn create_checkpoint(
        &self,
        request: Request<pb::CreateCheckpointRequest>,
    ) -> Result<Response<pb::CreateCheckpointResponse>, Status> {
        let pb::CreateCheckpointRequest { name, clone } = request.into_inner();
        let mut store = self.store()?;
        if !clone.is_empty() {
            store = store.open_clone(&clone).map_err(grpc_status)?;
        }
        let info = store.checkpoint_async(&name).await.map_err(grpc_status)?;
        Ok(Response::new(pb::CreateCheckpointResponse { checkpoint: Some(checkpoint(info)) }))
    }

    async fn list_checkpoints(
        &self,
        _: Request<pb::ListCheckpointsRequest>,
    ) -> Result<Response<pb::ListCheckpointsResponse>, Status> {
        let checkpoints = self.store()?.checkpoints().into_iter().map(checkpoint).collect();
        Ok(Response::new(pb::ListCheckpointsResponse { checkpoints }))
    }

    async fn drop_checkpoint(
        &self,
        request: Request<pb::DropCheckpointRequest>,
    ) -> Result<Response<pb::DropCheckpointResponse>, Status> {
        let name = request.into_inner().name;
        self.store()?.drop_checkpoint_async(&name).await.map_err(grpc_status)?;
        Ok(Response::new(pb::DropCheckpointResponse {}))
    }

    async fn create_clone(
        &self,
        request: Request<pb::CreateCloneRequest>,
    ) -> Result<Response<pb::CreateCloneResponse>, Status> {
        let pb::CreateCloneRequest { name, checkpoint } = request.into_inner();
        let store = self.store()?;
        store.create_clone_async(&name, &checkpoint).await.map_err(grpc_status)?;
        let made = store.clones().into_iter().find(|info| info.name == name).map(clone);
        Ok(Response::new(pb::CreateCloneResponse { clone: made }))
    }

    async fn list_clones(&self, _: Request<pb::ListClonesRequest>) -> Result<Response<pb::ListClonesResponse>, Status> {
        let clones = self.store()?.clones().into_iter().map(clone).collect();
        Ok(Response::new(pb::ListClonesResponse { clones }))
    }

    async fn drop_clone(
        &self,
        request: Request<pb::DropCloneRequest>,
    ) -> Result<Response<pb::DropCloneResponse>, Status> {
        let name = request.into_inner().name;
        self.store()?.drop_clone_async(&name).await.map_err(grpc_status)?;
        Ok(Response::new(pb::DropCloneResponse {}))
    }

    async fn create_group(
        &self,
        request: Request<pb::CreateGroupRequest>,
    ) -> Result<Response<pb::CreateGroupResponse>, Status> {
        let name = request.into_inner().name;
        check_new_name("a group", &name, GROUP_NAME_BYTES_MAX)?;
        drop(self.context.node_or_status()?.create_group(&name).await.map_err(grpc_status)?);
        let group = self.groups()?.into_iter().find(|group| group.name == name);
        Ok(Response::new(pb::CreateGroupResponse { group }))
    }

    async fn list_groups(&self, _: Request<pb::ListGroupsRequest>) -> Result<Response<pb::ListGroupsResponse>, Status> {
        Ok(Response::new(pb::ListGroupsResponse { groups: self.groups()? }))
    }

    async fn compact(&self, request: Request<pb::CompactRequest>) -> Result<Response<pb::CompactResponse>, Status> {
        let pb::CompactRequest { keyspace, clone } = request.into_inner();
        let mut store = self.store()?;
        if !clone.is_empty() {
            store = store.open_clone(&clone).map_err(grpc_status)?;
        }
        if !keyspace.is_empty() && store.keyspace_if_exists(&keyspace).is_none() {
            return Err(Status::not_found(format!("no keyspace of that name name={keyspace}")));
        }
        let used = || self.context.node_or_status().map(|node| node.engine().status().extent_bytes);
        let before_bytes = used()?;
        store.compact_keyspaces_async(|name| keyspace.is_empty() || name == keyspace).await.map_err(grpc_status)?;
        Ok(Response::new(pb::CompactResponse { before_bytes, after_bytes: used()? }))
    }

    async fn wait(&self, request: Request<pb::WaitRequest>) -> Result<Response<pb::WaitResponse>, Status> {
        let request = request.into_inner();
        let durability = match request.durability() {
            pb::Durability::Local => Durability::Local,
            pb::Durability::All => Durability::All,
            pb::Durability::Site => Durability::Site(request.site),
            pb::Durability::Unspecified | pb::Durability::Quorum => Durability::Quorum,
        };
        let token = CommitToken { term: request.term, index: LogIndex(request.index) };
        let applied = self.context.node_or_status()?.replica().wait(token, durability).await;
        applied.map_err(|e| grpc_status(e.into()))?;
        Ok(Response::new(pb::WaitResponse {}))
    }

    async fn barrier(&self, request: Request<pb::BarrierRequest>) -> Result<Response<pb::BarrierResponse>, Status> {
        let request = request.into_inner();
        let level = match request.level() {
            pb::ReadLevel::Lease => ReadLevel::Lease,
            pb::ReadLevel::AtLeast => ReadLevel::AtLeast(LogIndex(request.index)),
            pb::ReadLevel::Local => ReadLevel::Local,
            pb::ReadLevel::Stale => ReadLevel::Stale(Duration::from_millis(request.lag_max_ms)),
            pb::ReadLevel::Unspecified | pb::ReadLevel::Linearizable => ReadLevel::Linearizable,
        };
        let reached = self.context.node_or_status()?.replica().read_barrier(level).await;
        let index = reached.map_err(|e| grpc_status(e.into()))?;
        Ok(Response::new(pb::BarrierResponse { index: index.0 }))
    }
}

fn group_message(group: GroupSection) -> pb::Group {
    pb::Group {
        number: group.number,
        name: group.name,
        role: group.role,
        term: group.term,
        leader: group.leader.unwrap_or(0),
        leader_name: group.leader_name.unwrap_or_default(),
        last_log: group.last_log,
        committed: group.committed,
        applied: group.applied,
    }
}

fn checkpoint(info: CheckpointInfo) -> pb::Checkpoint {
    pb::Checkpoint { name: info.name, index: info.index.0, created_ms: info.created_ms }
}

fn clone(info: BranchInfo) -> pb::Clone {
    pb::Clone { name: info.name, checkpoint: info.origin.unwrap_or_default(), created_ms: info.created_ms }
}
