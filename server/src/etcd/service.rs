//! What the services share: who this member is, the way to the log, views of the state, and the tasks behind them.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::BranchId;
use mainstay_replication::{Durability, MemberRole, ReadLevel};
use prost::Message;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::service::Routes;

use super::backend::{Backend, NodeBackend};
use super::cluster::ClusterService;
use super::context::Context;
use super::error::{Refusal, status_of};
use super::kv::KvService;
use super::lease::LeaseService;
use super::lessor::Lessor;
use super::maintenance::MaintenanceService;
use super::model::command::{Request, encode_command};
use super::model::{Model, View};
use super::proposer::Proposer;
use super::watch::WatchService;
use crate::limits::Quota;
use crate::proto::etcdserverpb as pb;

/// Room for what surrounds a request of the largest size in its message.
const MESSAGE_OVERHEAD_BYTES: usize = 512 << 10;
/// Bound of [`EtcdSettings::request_bytes_max`]: below the longest value of the engine, with room for what a record adds.
const REQUEST_BYTES_LIMIT: usize = 15 << 20;
/// How often the facts are read again when nobody tells of a change.
const FACTS_INTERVAL: Duration = Duration::from_secs(1);

/// Settings of the etcd API; may differ between replicas.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// Largest request in bytes. Default 1.5 MiB, as in etcd, at most 15 MiB; larger ones hold up the log for longer.
    pub request_bytes_max: usize,
    /// Operations in a transaction, on one level and those below. Default 128, as in etcd.
    pub txn_ops_max: usize,
    /// How often a watch with progress notifications is told the revision when nothing happens. Default 10 minutes.
    pub watch_progress_interval: Duration,
    /// How much data the volume may hold before what adds to it is refused. Default: no bound of its own.
    pub(crate) data: Option<Arc<Quota>>,
}

impl Default for EtcdSettings {
    fn default() -> Self {
        let watch_progress_interval = Duration::from_secs(600);
        Self { request_bytes_max: 3 << 19, txn_ops_max: 128, watch_progress_interval, data: None }
    }
}

/// What headers and decisions need of the node's status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) cluster: u64,
    pub(super) member: u64,
    pub(super) term: u64,
    pub(super) leader: Option<u64>,
    pub(super) is_leader: bool,
    pub(super) is_learner: bool,
}

impl Facts {
    fn read(backend: &impl Backend) -> Self {
        let status = backend.status();
        let is_learner =
            status.members.iter().any(|member| member.id == status.id && member.role == MemberRole::Learner);
        Self {
            cluster: cluster_id(&status.cluster),
            member: status.id.0,
            term: status.term,
            leader: status.leader.map(|leader| leader.0),
            is_leader: status.role == "leader",
            is_learner,
        }
    }
}

/// The cluster id as etcd's clients see it: the first half of ours.
pub(super) fn cluster_id(id: &[u8; 16]) -> u64 {
    let (first, _) = id.split_at(8);
    u64::from_be_bytes(first.try_into().expect("eight bytes"))
}

/// See the module. Shared by all services of a node.
pub(super) struct Core<B> {
    pub(super) backend: B,
    pub(super) model: Model,
    pub(super) settings: EtcdSettings,
    pub(super) lessor: Lessor,
    proposer: Proposer<B>,
    facts: watch::Sender<Facts>,
    stopping: watch::Sender<bool>,
}

impl<B: Backend> Core<B> {
    pub(super) fn facts(&self) -> Facts {
        self.facts.borrow().clone()
    }

    pub(super) fn watch_facts(&self) -> watch::Receiver<Facts> {
        self.facts.subscribe()
    }

    pub(super) fn watch_stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Fills in who answers.
    pub(super) fn sign(&self, header: &mut Option<pb::ResponseHeader>) {
        let header = header.get_or_insert_default();
        let facts = self.facts.borrow();
        header.cluster_id = facts.cluster;
        header.member_id = facts.member;
        header.raft_term = facts.term;
    }

    /// A header at a revision.
    pub(super) fn header(&self, revision: i64) -> Option<pb::ResponseHeader> {
        let mut header = Some(pb::ResponseHeader { revision, ..Default::default() });
        self.sign(&mut header);
        header
    }

    /// A header at what is applied here.
    pub(super) async fn header_now(&self, branch: BranchId) -> Result<Option<pb::ResponseHeader>, Status> {
        Ok(self.header(self.view(branch).await?.tip().revision))
    }

    /// Refuses what would add to the data of a volume that may hold no more, as etcd does.
    pub(super) fn admit_growth(&self) -> Result<(), Refusal> {
        let admits = self.settings.data.as_ref().is_none_or(|data| data.admits());
        if admits { Ok(()) } else { Err(Refusal::NoSpace) }
    }

    /// Proposes a request and decodes the answer.
    pub(super) async fn write<M: Message + Default>(&self, context: &Context, request: &Request) -> Result<M, Status> {
        if request.message_bytes() > self.settings.request_bytes_max {
            return Err(Refusal::RequestTooLarge.into());
        }
        let message = match context.durability {
            _ if context.token.is_some() => Box::pin(self.write_once(context, request)).await?,
            Durability::Quorum => self.proposer.propose(context.branch, request).await?,
            Durability::Local => {
                return Err(Status::failed_precondition(
                    "mainstay: only a put without prev_kv, lease, ignore_value and ignore_lease is answered before it is applied \
                     durability=local",
                ));
            }
            ref stronger => {
                let command = encode_command(context.branch, request);
                // Boxed, so that the common way does not carry the room for this one in every request.
                let answer = Box::pin(self.backend.propose(context.branch, command, stronger.clone())).await;
                only_item(answer)?
            }
        };
        M::decode(message).map_err(|error| Status::internal(format!("an answer does not decode: {error}")))
    }

    /// Proposes a request that applies once. It goes alone, since its answer is kept for it.
    async fn write_once(&self, context: &Context, request: &Request) -> Result<Bytes, Status> {
        let Some(token) = context.token else { return Err(Status::internal("no token")) };
        let command = encode_command(context.branch, request);
        only_item(self.backend.propose_once(token, context.branch, command, context.durability.clone()).await)
    }

    /// Proposes a request of the server's own on the main way.
    pub(super) async fn propose(&self, branch: BranchId, request: &Request) -> Result<Bytes, Status> {
        self.proposer.propose(branch, request).await
    }

    /// Looks at what is applied here.
    pub(super) async fn view(&self, branch: BranchId) -> Result<View<B::Reader>, Status> {
        let (reader, index) = self.backend.pin(branch).map_err(|error| status_of(&error))?;
        self.model.view(branch, reader, index).await.map_err(|error| status_of(&error.into()))
    }

    /// Waits until the read may be served here, then looks. `otherwise` is the level where the metadata names none.
    pub(super) async fn read(&self, context: &Context, otherwise: ReadLevel) -> Result<View<B::Reader>, Status> {
        let level = context.read_level.clone().unwrap_or(otherwise);
        if level != ReadLevel::Local {
            Box::pin(self.backend.read_barrier(level)).await.map_err(|error| status_of(&error))?;
        }
        self.view(context.branch).await
    }

    /// Collects what the compactions of a branch left, up to `revision`. Any member may: it proposes.
    pub(super) async fn collect(&self, branch: BranchId, revision: i64) -> Result<(), Status> {
        loop {
            let compaction = self.view(branch).await?.tip().compaction;
            if compaction.collected >= revision.min(compaction.revision) {
                return Ok(());
            }
            self.propose(branch, &Request::Collect).await?;
            // What was proposed through another member is to be seen here before the next look.
            let barrier = self.backend.read_barrier(ReadLevel::Linearizable).await;
            barrier.map_err(|error| status_of(&error))?;
        }
    }
}

/// The generated service of keys and values over a backend.
pub type KvServer<B = NodeBackend> = pb::kv_server::KvServer<KvService<B>>;

fn only_item(answer: mainstay_replication::Result<Bytes>) -> Result<Bytes, Status> {
    let answer = answer.map_err(|error| status_of(&error))?;
    let items = super::model::command::decode_answer(answer).map_err(|e| Status::internal(e.to_string()))?;
    Ok(items.into_iter().next().ok_or_else(|| Status::internal("an answer without an item"))??)
}

/// The etcd v3 API of a node. Cloning gives another handle.
#[derive(Clone)]
pub struct Etcd<B: Backend = NodeBackend> {
    core: Arc<Core<B>>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

impl<B: Backend> Etcd<B> {
    /// Starts the tasks of the API on the tokio runtime of the caller: leases, collection, facts. `model` is the one in the
    /// backend's groups. Takes the forward handler of the node.
    pub fn start(backend: B, model: Model, mut settings: EtcdSettings) -> Self {
        settings.request_bytes_max = settings.request_bytes_max.min(REQUEST_BYTES_LIMIT);
        let facts = watch::Sender::new(Facts::read(&backend));
        let core = Arc::new(Core {
            proposer: Proposer::new(backend.clone()),
            lessor: Lessor::default(),
            stopping: watch::Sender::new(false),
            backend,
            model,
            settings,
            facts,
        });
        let etcd = Self { core: core.clone(), tasks: Arc::default() };
        let forwarding = Arc::downgrade(&core);
        core.backend.set_forward_handler(Arc::new(move |request| {
            let core = forwarding.upgrade();
            Box::pin(async move {
                let core = core.ok_or_else(closed)?;
                super::lessor::answer_forwarded(&core, request).await
            })
        }));
        etcd.spawn(keep_facts(core.clone()));
        etcd.spawn(super::lessor::run(core.clone()));
        etcd.spawn(collect_garbage(core));
        etcd
    }

    /// All services, for the client port.
    pub fn routes(&self) -> Routes {
        macro_rules! service {
            ($server:ident :: $kind:ident, $service:ident) => {
                pb::$server::$kind::new($service(self.core.clone()))
                    .max_decoding_message_size(self.message_bytes())
                    .max_encoding_message_size(usize::MAX)
            };
        }
        Routes::new(self.kv())
            .add_service(service!(watch_server::WatchServer, WatchService))
            .add_service(service!(lease_server::LeaseServer, LeaseService))
            .add_service(service!(cluster_server::ClusterServer, ClusterService))
            .add_service(service!(maintenance_server::MaintenanceServer, MaintenanceService))
    }

    /// The KV service alone, for a front that calls it without a way through the routes.
    pub fn kv(&self) -> KvServer<B> {
        pb::kv_server::KvServer::new(KvService(self.core.clone()))
            .max_decoding_message_size(self.message_bytes())
            .max_encoding_message_size(usize::MAX)
    }

    fn message_bytes(&self) -> usize {
        self.core.settings.request_bytes_max + MESSAGE_OVERHEAD_BYTES
    }

    /// Ends the open streams with "server stopped" and the tasks.
    pub async fn close(&self) {
        self.core.stopping.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }

    #[cfg(test)]
    pub(super) fn core(&self) -> Arc<Core<B>> {
        self.core.clone()
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).spawn(task);
    }
}

fn closed() -> mainstay_replication::Error {
    mainstay_replication::Error::new(mainstay_replication::ErrorKind::Closed, "the etcd service is closed")
}

/// Keeps the facts fresh.
async fn keep_facts<B: Backend>(core: Arc<Core<B>>) {
    loop {
        if let Some(data) = &core.settings.data {
            data.observe(core.backend.engine_status().extent_bytes);
        }
        let now = Facts::read(&core.backend);
        core.facts.send_if_modified(|facts| {
            let changed = *facts != now;
            *facts = now;
            changed
        });
        // A change between the look and the wait is found a second later.
        let _ = tokio::time::timeout(FACTS_INTERVAL, core.backend.changed()).await;
    }
}

/// On the leader: goes on collecting what compactions left.
async fn collect_garbage<B: Backend>(core: Arc<Core<B>>) {
    let mut interval = tokio::time::interval(FACTS_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if !core.facts().is_leader {
            continue;
        }
        for branch in core.backend.branches() {
            if let Err(status) = core.collect(branch, i64::MAX).await {
                tracing::debug!(%status, %branch, "collection will be tried again");
            }
        }
    }
}
