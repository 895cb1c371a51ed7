//! The admin port: health and status over HTTP, birth and membership over gRPC.
//!
//! # Place
//! On a thread of its own, so that a stuck event loop is seen and not shared. `mainstay.v1.Admin` is on no other port.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use mainstay::{MemberInfo, MemberRole, NodeId, PeerAddress};
use tonic::{Request, Response as Answer, Status};

use crate::context::{Context, grpc_status};
use crate::proto::mainstay::v1 as pb;
use crate::settings::check_site;
use pb::admin_server::{Admin, AdminServer};

/// The routes of the admin port.
pub(crate) fn routes(context: Arc<Context>) -> Router {
    let service = AdminServer::new(AdminService { context: context.clone() });
    let grpc = tonic::service::Routes::new(service).prepare().into_axum_router();
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .with_state(context)
        .merge(grpc)
        .fallback(unknown)
}

/// What is not there: an HTTP status for probes, a gRPC code for gRPC, which has it behind a 200.
async fn unknown(request: axum::extract::Request) -> Response {
    let content = request.headers().get(header::CONTENT_TYPE);
    match content.is_some_and(|content| content.as_bytes().starts_with(b"application/grpc")) {
        true => Status::unimplemented("not on the admin port").into_http::<axum::body::Body>(),
        false => (StatusCode::NOT_FOUND, "not on the admin port\n").into_response(),
    }
}

/// 200 while the event loop turns: never asks for a quorum, a peer or the disk.
async fn livez(State(context): State<Arc<Context>>) -> (StatusCode, &'static str) {
    match context.is_alive() {
        true => (StatusCode::OK, "ok\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the event loop does not turn\n"),
    }
}

/// 200 while clients are well served here.
async fn readyz(State(context): State<Arc<Context>>) -> (StatusCode, String) {
    match context.status() {
        None => (StatusCode::SERVICE_UNAVAILABLE, "the volume recovers\n".into()),
        Some(status) => match status.not_ready_reason {
            None => (StatusCode::OK, "ok\n".into()),
            Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        },
    }
}

async fn status(State(context): State<Arc<Context>>) -> Response {
    match context.status_message() {
        Ok(message) => ([(header::CONTENT_TYPE, "application/json")], message.document).into_response(),
        Err(status) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", status.message())).into_response(),
    }
}

struct AdminService {
    context: Arc<Context>,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn init(&self, request: Request<pb::InitRequest>) -> Result<Answer<pb::InitResponse>, Status> {
        let members = request.into_inner().members;
        if members.is_empty() {
            return Err(Status::invalid_argument("a cluster has members: name them"));
        }
        let cluster = self.context.node_or_status()?.init(members).await.map_err(grpc_status)?;
        Ok(Answer::new(pb::InitResponse { cluster: Bytes::copy_from_slice(&cluster) }))
    }

    async fn list_members(
        &self,
        _: Request<pb::ListMembersRequest>,
    ) -> Result<Answer<pb::ListMembersResponse>, Status> {
        let status = self.context.node_or_status()?.status();
        let leader = status.leader;
        let members = status.members.into_iter().map(|info| member(info, leader)).collect();
        Ok(Answer::new(pb::ListMembersResponse { members }))
    }

    async fn add_member(
        &self,
        request: Request<pb::AddMemberRequest>,
    ) -> Result<Answer<pb::AddMemberResponse>, Status> {
        let pb::AddMemberRequest { name, peer_address, voter } = request.into_inner();
        let node = self.context.node_or_status()?;
        let info = node.add_member(&name, PeerAddress(peer_address), voter).await.map_err(grpc_status)?;
        Ok(Answer::new(pb::AddMemberResponse { member: Some(member(info, None)) }))
    }

    async fn promote_member(
        &self,
        request: Request<pb::PromoteMemberRequest>,
    ) -> Result<Answer<pb::PromoteMemberResponse>, Status> {
        let id = NodeId(request.into_inner().id);
        self.context.node_or_status()?.promote_member(id).await.map_err(grpc_status)?;
        Ok(Answer::new(pb::PromoteMemberResponse {}))
    }

    async fn set_member(
        &self,
        request: Request<pb::SetMemberRequest>,
    ) -> Result<Answer<pb::SetMemberResponse>, Status> {
        let pb::SetMemberRequest { id, site, priority } = request.into_inner();
        // All is checked before anything changes: each of the two is an entry of the membership of its own.
        let invalid = |message: String| Status::invalid_argument(message);
        let priority = priority.map(u8::try_from).transpose().map_err(|_| invalid("a priority is 0 to 255".into()))?;
        if let Some(site) = &site {
            check_site(site).map_err(invalid)?;
        }
        if site.is_none() && priority.is_none() {
            return Err(invalid("nothing to change: give a site or a priority".into()));
        }
        let node = self.context.node_or_status()?;
        if let Some(site) = site {
            node.set_member_site(NodeId(id), &site).await.map_err(grpc_status)?;
        }
        if let Some(priority) = priority {
            node.set_member_priority(NodeId(id), priority).await.map_err(grpc_status)?;
        }
        Ok(Answer::new(pb::SetMemberResponse {}))
    }

    async fn remove_member(
        &self,
        request: Request<pb::RemoveMemberRequest>,
    ) -> Result<Answer<pb::RemoveMemberResponse>, Status> {
        let id = NodeId(request.into_inner().id);
        self.context.node_or_status()?.remove_member(id).await.map_err(grpc_status)?;
        Ok(Answer::new(pb::RemoveMemberResponse {}))
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::TransferLeaderRequest>,
    ) -> Result<Answer<pb::TransferLeaderResponse>, Status> {
        let to = Some(request.into_inner().to).filter(|to| *to != 0).map(NodeId);
        let leader = self.context.node_or_status()?.transfer_leader(to).await.map_err(grpc_status)?;
        Ok(Answer::new(pb::TransferLeaderResponse { leader: leader.0 }))
    }

    async fn finalize(&self, _: Request<pb::FinalizeRequest>) -> Result<Answer<pb::FinalizeResponse>, Status> {
        let version = self.context.node_or_status()?.finalize().await.map_err(grpc_status)?;
        Ok(Answer::new(pb::FinalizeResponse { version: version.into() }))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Answer<pb::StatusResponse>, Status> {
        self.context.status_message().map(Answer::new)
    }
}

fn member(info: MemberInfo, leader: Option<NodeId>) -> pb::Member {
    pb::Member {
        id: info.id.0,
        name: info.name,
        peer_address: info.peer_address.0,
        client_address: info.client_address,
        voter: info.role == MemberRole::Voter,
        leader: Some(info.id) == leader,
        incarnation: Bytes::copy_from_slice(&info.incarnation),
        site: info.site,
        priority: info.priority.into(),
        witness: info.witness,
    }
}
