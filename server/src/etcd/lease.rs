//! The Lease service.

use std::sync::Arc;

use mainstay_replication::ReadLevel;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::backend::Backend;
use super::context::Context;
use super::error::Refusal;
use super::lessor::{keep_alive, remaining};
use super::model::command;
use super::service::Core;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::lease_server::Lease;

/// Answers of a keep-alive stream that wait for the client, at most; a slower one is not read from.
const ANSWERS_WAITING_MAX: usize = 16;
/// Leases read from the store at a time.
const LEASES_PAGE: usize = 1024;

pub(super) struct LeaseService<B>(pub(super) Arc<Core<B>>);

#[tonic::async_trait]
impl<B: Backend> Lease for LeaseService<B> {
    async fn lease_grant(
        &self,
        request: Request<pb::LeaseGrantRequest>,
    ) -> Result<Response<pb::LeaseGrantResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let grant = request.into_inner();
        core.admit_growth()?;
        let mut response: pb::LeaseGrantResponse = core.write(&context, &command::Request::LeaseGrant(grant)).await?;
        core.sign(&mut response.header);
        Ok(Response::new(response))
    }

    async fn lease_revoke(
        &self,
        request: Request<pb::LeaseRevokeRequest>,
    ) -> Result<Response<pb::LeaseRevokeResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let revoke = request.into_inner();
        let mut response: pb::LeaseRevokeResponse =
            core.write(&context, &command::Request::LeaseRevoke(revoke)).await?;
        core.sign(&mut response.header);
        Ok(Response::new(response))
    }

    type LeaseKeepAliveStream = ReceiverStream<Result<pb::LeaseKeepAliveResponse, Status>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<pb::LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let core = self.0.clone();
        let context = Context::of(&core, request.metadata())?;
        let mut inbound = request.into_inner();
        let (answers, outbound) = mpsc::channel(ANSWERS_WAITING_MAX);
        let mut stopping = core.watch_stopping();
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    message = inbound.next() => message,
                    _ = stopping.wait_for(|stopping| *stopping) => Some(Err(Refusal::Stopped.into())),
                    () = answers.closed() => None,
                };
                let answer = match message {
                    Some(Ok(request)) => keep_alive_once(&core, &context, request.id).await,
                    Some(Err(status)) => Err(status),
                    None => return,
                };
                let failed = answer.is_err();
                if answers.send(answer).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<pb::LeaseTimeToLiveRequest>,
    ) -> Result<Response<pb::LeaseTimeToLiveResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let request = request.into_inner();
        let view = core.read(&context, ReadLevel::Linearizable).await?;
        let mut response = pb::LeaseTimeToLiveResponse {
            header: core.header(view.tip().revision),
            id: request.id,
            ttl: -1,
            ..Default::default()
        };
        let Some(granted) = view.lease_ttl(request.id).await.map_err(super::error::Failure::Store)? else {
            return Ok(Response::new(response));
        };
        let Some(left) = remaining(core, context.branch, request.id).await? else {
            return Ok(Response::new(response));
        };
        response.ttl = left;
        response.granted_ttl = granted;
        if request.keys {
            response.keys = view.lease_keys(request.id).await.map_err(super::error::Failure::Store)?;
        }
        Ok(Response::new(response))
    }

    async fn lease_leases(
        &self,
        request: Request<pb::LeaseLeasesRequest>,
    ) -> Result<Response<pb::LeaseLeasesResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let view = core.read(&context, ReadLevel::Linearizable).await?;
        let mut leases: Vec<pb::LeaseStatus> = Vec::new();
        loop {
            let after = leases.last().map(|lease| lease.id);
            let page = view.leases(after, LEASES_PAGE).await.map_err(super::error::Failure::Store)?;
            let ended = page.len() < LEASES_PAGE;
            leases.extend(page.into_iter().map(|(id, _)| pb::LeaseStatus { id }));
            if ended {
                break;
            }
        }
        Ok(Response::new(pb::LeaseLeasesResponse { header: core.header(view.tip().revision), leases }))
    }
}

/// One round of a keep-alive stream: seconds from now, or 0 for a lease that is not there.
async fn keep_alive_once<B: Backend>(
    core: &Core<B>,
    context: &Context,
    id: i64,
) -> Result<pb::LeaseKeepAliveResponse, Status> {
    let ttl = keep_alive(core, context.branch, id).await?.unwrap_or(0);
    let header = core.header_now(context.branch).await?;
    Ok(pb::LeaseKeepAliveResponse { header, id, ttl })
}
