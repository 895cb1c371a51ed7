//! The KV service.

use std::sync::Arc;

use mainstay_replication::{Durability, ReadLevel};
use tonic::{Request, Response, Status};

use super::backend::Backend;
use super::context::{COMMIT_TOKEN_KEY, Context};
use super::error::{Refusal, status_of};
use super::model::check::{check_delete, check_put, check_range, check_txn, is_read_only, is_serializable, may_put};
use super::model::command::{self, encode_command};
use super::service::Core;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::kv_server::Kv;

/// Puts, ranges, deletes, transactions and compactions.
pub struct KvService<B>(pub(super) Arc<Core<B>>);

impl<B: Backend> KvService<B> {
    /// A put that is answered when the leader alone has it durable: its revision is not known yet, so the header tells what
    /// is applied, and the metadata of the answer where the put stands in the log.
    async fn put_local(&self, context: &Context, put: pb::PutRequest) -> Result<Response<pb::PutResponse>, Status> {
        let core = &self.0;
        let request = command::Request::Put(put);
        if request.message_bytes() > core.settings.request_bytes_max {
            return Err(Refusal::RequestTooLarge.into());
        }
        let command = encode_command(context.branch, &request);
        let token = core.backend.propose_local(context.branch, command).await.map_err(|error| status_of(&error))?;
        let header = core.header_now(context.branch).await?;
        let mut response = Response::new(pb::PutResponse { header, prev_kv: None });
        let token = format!("{}-{}", token.term, token.index);
        if let Ok(token) = token.parse() {
            response.metadata_mut().insert(COMMIT_TOKEN_KEY, token);
        }
        Ok(response)
    }
}

#[tonic::async_trait]
impl<B: Backend> Kv for KvService<B> {
    async fn range(&self, request: Request<pb::RangeRequest>) -> Result<Response<pb::RangeResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let request = request.into_inner();
        check_range(&request)?;
        if core.facts().is_learner && !request.serializable {
            return Err(Refusal::NotSupportedForLearner.into());
        }
        let level = if request.serializable { ReadLevel::Local } else { ReadLevel::Linearizable };
        let view = core.read(&context, level).await?;
        let mut response = view.range(&request).await?;
        core.sign(&mut response.header);
        Ok(Response::new(response))
    }

    async fn put(&self, request: Request<pb::PutRequest>) -> Result<Response<pb::PutResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let put = request.into_inner();
        check_put(&put)?;
        core.admit_growth()?;
        let blind = !put.prev_kv && put.lease == 0 && !put.ignore_value && !put.ignore_lease;
        if context.durability == Durability::Local && context.token.is_none() && blind {
            return Box::pin(self.put_local(&context, put)).await;
        }
        let mut response: pb::PutResponse = core.write(&context, &command::Request::Put(put)).await?;
        core.sign(&mut response.header);
        Ok(Response::new(response))
    }

    async fn delete_range(
        &self,
        request: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let delete = request.into_inner();
        check_delete(&delete)?;
        let mut response: pb::DeleteRangeResponse =
            core.write(&context, &command::Request::DeleteRange(delete)).await?;
        core.sign(&mut response.header);
        Ok(Response::new(response))
    }

    async fn txn(&self, request: Request<pb::TxnRequest>) -> Result<Response<pb::TxnResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let txn = request.into_inner();
        check_txn(&txn, core.settings.txn_ops_max)?;
        let mut response = if is_read_only(&txn) {
            let serializable = is_serializable(&txn);
            if core.facts().is_learner && !serializable {
                return Err(Refusal::NotSupportedForLearner.into());
            }
            let level = if serializable { ReadLevel::Local } else { ReadLevel::Linearizable };
            Box::pin(async { Ok::<_, Status>(core.read(&context, level).await?.read_txn(&txn).await?) }).await?
        } else {
            if may_put(&txn) {
                core.admit_growth()?;
            }
            core.write(&context, &command::Request::Txn(txn)).await?
        };
        core.sign(&mut response.header);
        Ok(Response::new(response))
    }

    async fn compact(
        &self,
        request: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, Status> {
        let core = &self.0;
        let context = Context::of(core, request.metadata())?;
        let compact = request.into_inner();
        let mut response: pb::CompactionResponse = core.write(&context, &command::Request::Compact(compact)).await?;
        if compact.physical {
            let barrier = Box::pin(core.backend.read_barrier(ReadLevel::Linearizable)).await;
            barrier.map_err(|error| status_of(&error))?;
            core.collect(context.branch, compact.revision).await?;
        }
        core.sign(&mut response.header);
        Ok(Response::new(response))
    }
}
