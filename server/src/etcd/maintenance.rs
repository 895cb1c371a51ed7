//! The Maintenance service.

use std::sync::Arc;

use crc_fast::{CrcAlgorithm, Digest};
use mainstay_engine::MAIN;
use mainstay_replication::{MemberRole, NodeId, NodeStatus};
use std::ops::Bound;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::backend::Backend;
use super::context::Context;
use super::error::{Failure, Refusal, status_of};
use super::export;
use super::model::View;
use super::model::record::Rev;
use super::model::store::{Reader, Space};
use super::service::Core;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::maintenance_server::Maintenance;

/// The version of the etcd protocol that the answers follow; clients look here for what they may use.
pub const ETCD_VERSION: &str = "3.5.21";
/// Records hashed at a time.
const HASH_PAGE: usize = 1024;

pub(super) struct MaintenanceService<B>(pub(super) Arc<Core<B>>);

fn this_member(status: &NodeStatus, requested: u64) -> bool {
    requested == 0 || requested == status.id.0
}

/// The conditions of this member that etcd has an alarm for. They follow the state; nobody needs to disarm them.
fn alarms<B: Backend>(core: &Core<B>) -> Vec<pb::AlarmMember> {
    let status = core.backend.status();
    let mut alarms = Vec::new();
    let mut raise = |alarm: pb::AlarmType| alarms.push(pb::AlarmMember { member_id: status.id.0, alarm: alarm as i32 });
    let over_quota = core.settings.data.as_ref().is_some_and(|data| data.is_reached());
    if over_quota || core.backend.engine_status().read_only.is_some() {
        raise(pb::AlarmType::Nospace);
    }
    if status.group.diverged || status.group.tables_damaged > 0 {
        raise(pb::AlarmType::Corrupt);
    }
    alarms
}

/// A checksum over the records of a keyspace within the bounds.
async fn hash_space<R: Reader>(
    digest: &mut Digest,
    reader: &R,
    space: Space,
    upper: Bound<&[u8]>,
) -> Result<(), Failure> {
    let mut after: Option<bytes::Bytes> = None;
    loop {
        let lower = after.as_ref().map_or(Bound::Unbounded, |after| Bound::Excluded(&after[..]));
        let page = reader.page(space, lower, upper, false, HASH_PAGE).await?;
        let ended = page.len() < HASH_PAGE;
        for (key, value) in page {
            digest.update(&(key.len() as u64).to_le_bytes());
            digest.update(&key);
            digest.update(&(value.len() as u64).to_le_bytes());
            digest.update(&value);
            after = Some(key);
        }
        if ended {
            return Ok(());
        }
        // A long hash leaves the thread to others between two pages.
        tokio::task::yield_now().await;
    }
}

fn crc32c() -> Digest {
    Digest::new(CrcAlgorithm::Crc32Iscsi)
}

impl<B: Backend> MaintenanceService<B> {
    /// The state once nothing is left to collect: what is there then is a function of the revision and the compaction alone.
    async fn collected_view(&self, context: &Context) -> Result<View<B::Reader>, Status> {
        loop {
            let view = self.0.view(context.branch).await?;
            let compaction = view.tip().compaction;
            if compaction.collected >= compaction.revision {
                return Ok(view);
            }
            self.0.collect(context.branch, compaction.revision).await?;
        }
    }
}

#[tonic::async_trait]
impl<B: Backend> Maintenance for MaintenanceService<B> {
    async fn alarm(&self, request: Request<pb::AlarmRequest>) -> Result<Response<pb::AlarmResponse>, Status> {
        let core = &self.0;
        Context::of(core, request.metadata())?;
        let request = request.into_inner();
        let action = pb::alarm_request::AlarmAction::try_from(request.action);
        let alarms = match action {
            Ok(pb::alarm_request::AlarmAction::Get) => {
                let status = core.backend.status();
                let mut alarms = if this_member(&status, request.member_id) { alarms(core) } else { Vec::new() };
                alarms.retain(|alarm| request.alarm == 0 || alarm.alarm == request.alarm);
                alarms
            }
            // An alarm ends with its cause: there is nothing to take back.
            Ok(pb::alarm_request::AlarmAction::Deactivate) => Vec::new(),
            Ok(pb::alarm_request::AlarmAction::Activate) => {
                return Err(Status::unimplemented("mainstay: an alarm is a condition of a member and cannot be set"));
            }
            Err(_) => return Err(Status::invalid_argument("mainstay: unknown alarm action")),
        };
        Ok(Response::new(pb::AlarmResponse { header: core.header_now(MAIN).await?, alarms }))
    }

    async fn status(&self, request: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let status = core.backend.status();
        let engine = core.backend.engine_status();
        let mut errors: Vec<String> = status.failure.iter().chain(&engine.read_only).cloned().collect();
        if status.leader.is_none() {
            errors.push(Refusal::NoLeader.message().to_owned());
        }
        let is_learner =
            status.members.iter().any(|member| member.id == status.id && member.role == MemberRole::Learner);
        let mut response = pb::StatusResponse {
            header: core.header_now(context.branch).await?,
            version: ETCD_VERSION.to_owned(),
            db_size: engine.extent_bytes.saturating_add(engine.wal_used_bytes) as i64,
            leader: status.leader.map_or(0, |leader| leader.0),
            raft_index: status.committed.0,
            raft_term: status.term,
            raft_applied_index: status.group.applied.0,
            errors,
            db_size_in_use: status.group.table_bytes.saturating_add(engine.wal_used_bytes) as i64,
            is_learner,
            storage_version: "3.5.0".to_owned(),
            db_size_quota: 0,
            downgrade_info: None,
        };
        // The facts may be a moment behind the status just read: one answer tells one story.
        if let Some(header) = &mut response.header {
            header.raft_term = status.term;
        }
        Ok(Response::new(response))
    }

    async fn defragment(
        &self,
        request: Request<pb::DefragmentRequest>,
    ) -> Result<Response<pb::DefragmentResponse>, Status> {
        // There is no file to rewrite, and nobody has to ask: space comes back by and by. Who does ask wants it now, and it is given back
        // before the answer, of what is left to collect of compacted revisions as well.
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        drop(self.collected_view(&context).await?);
        core.backend.compact(context.branch).await.map_err(|error| status_of(&error))?;
        Ok(Response::new(pb::DefragmentResponse { header: core.header_now(context.branch).await? }))
    }

    async fn hash(&self, request: Request<pb::HashRequest>) -> Result<Response<pb::HashResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let view = core.view(context.branch).await?;
        let mut digest = crc32c();
        for space in Space::ALL {
            hash_space(&mut digest, view.reader(), space, Bound::Unbounded).await?;
        }
        let hash = digest.finalize() as u32;
        Ok(Response::new(pb::HashResponse { header: core.header(view.tip().revision), hash }))
    }

    async fn hash_kv(&self, request: Request<pb::HashKvRequest>) -> Result<Response<pb::HashKvResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let requested = request.into_inner().revision;
        let view = self.collected_view(&context).await?;
        let revision = view.check_revision(requested)?;
        let upper = Rev::first(revision.saturating_add(1)).encode();
        let mut digest = crc32c();
        hash_space(&mut digest, view.reader(), Space::Revs, Bound::Excluded(&upper)).await?;
        Ok(Response::new(pb::HashKvResponse {
            header: core.header(view.tip().revision),
            hash: digest.finalize() as u32,
            compact_revision: view.tip().compaction.revision,
            hash_revision: revision,
        }))
    }

    type SnapshotStream = ReceiverStream<Result<pb::SnapshotResponse, Status>>;

    async fn snapshot(&self, request: Request<pb::SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        let core = self.0.clone();
        let context = Context::of(&core, request.metadata())?;
        let view = self.collected_view(&context).await?;
        let header = core.header(view.tip().revision);
        Ok(Response::new(export::stream(core.backend.status(), view, header)))
    }

    async fn move_leader(
        &self,
        request: Request<pb::MoveLeaderRequest>,
    ) -> Result<Response<pb::MoveLeaderResponse>, Status> {
        let core = &self.0;
        Context::of(core, request.metadata())?;
        let target = NodeId(request.into_inner().target_id);
        let status = core.backend.status();
        if status.role != "leader" {
            return Err(Refusal::NotLeader.into());
        }
        if !status.members.iter().any(|member| member.id == target && member.role == MemberRole::Voter) {
            return Err(Refusal::BadLeaderTransferee.into());
        }
        if target != status.id {
            core.backend.transfer_leader(target).await.map_err(|error| status_of(&error))?;
        }
        Ok(Response::new(pb::MoveLeaderResponse { header: core.header_now(MAIN).await? }))
    }

    async fn downgrade(
        &self,
        request: Request<pb::DowngradeRequest>,
    ) -> Result<Response<pb::DowngradeResponse>, Status> {
        let _ = request;
        Err(Status::unimplemented("mainstay: there is no etcd to go back to"))
    }
}
