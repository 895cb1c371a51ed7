//! `mainstay serve`: opens the volume, starts the node, serves four ports, stops in order.
//!
//! # Invariants
//! 1. Each port has its own listener; no route is on two of them. Admin routes are on the admin port only.
//! 2. Ports are bound before the volume is opened, so that a taken port costs nothing; health is answered while it recovers.
//! 3. On SIGTERM: not ready, leadership handed over, no new connections, running requests finished within
//!    [`DRAIN_MAX`], volume closed, exit status 0.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay::{Node, NodeOptions, Store};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::service::Routes;
use tonic::transport::Server;

use crate::cli::Failure;
use crate::context::Context;
use crate::etcd::{Etcd, EtcdSettings, KvServer, Model, NodeBackend};
use crate::front::Front;
use crate::limits::{self, Limits};
use crate::metrics::Metrics;
use crate::placed::{self, Moves};
use crate::settings::{BadVolume, ServeSettings};
use crate::{admin, aside, connections, logs, memory, metrics, service};

/// Bytes of a request or an answer: the largest value, its key and room for what stands around them.
pub(crate) const MESSAGE_BYTES_MAX: usize = 20 << 20;
/// Longest wait for a leader to take over when this process stops.
const HAND_OVER_MAX: Duration = Duration::from_secs(5);
/// How long all who answer say that a volume is foreign before it is set aside.
const FOREIGN_FOR: Duration = Duration::from_secs(10);
/// Longest wait for running requests when this process stops. Watches have no end of their own.
const DRAIN_MAX: Duration = Duration::from_secs(3);

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(settings: ServeSettings) -> Result<(), Failure> {
    logs::start(&settings)?;
    limits::raise_open_files()?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = settings.worker_threads {
        runtime.worker_threads(threads);
    }
    let runtime = runtime.thread_name("mainstay").enable_all().build()?;
    let result = runtime.block_on(serve(settings));
    if let Err(failure) = &result {
        tracing::error!(error = %failure, "stopped by a failure");
    }
    // What still runs belongs to clients that were told to go.
    runtime.shutdown_background();
    result
}

/// A port that is bound and not yet served.
struct Port {
    name: &'static str,
    listener: Option<std::net::TcpListener>,
    address: Option<SocketAddr>,
}

impl Port {
    fn bind(name: &'static str, address: Option<SocketAddr>) -> Result<Self, Failure> {
        let Some(wanted) = address else { return Ok(Self { name, listener: None, address: None }) };
        let bound = std::net::TcpListener::bind(wanted).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok((listener.local_addr()?, listener))
        });
        let (address, listener) =
            bound.map_err(|e| Failure::other(format!("cannot listen for {name}: {e} address={wanted}")))?;
        Ok(Self { name, listener: Some(listener), address: Some(address) })
    }

    /// The listener, for what serves it.
    fn take(&mut self) -> Result<Option<TcpListener>, Failure> {
        Ok(self.listener.take().map(TcpListener::from_std).transpose()?)
    }

    /// Serves probes and scrapers, which speak HTTP/1 or HTTP/2, until `stop` changes.
    async fn serve_health<S>(mut self, service: S, mut stop: watch::Receiver<bool>) -> Result<(), Failure>
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send> + Clone + Send + 'static,
    {
        let Some(listener) = self.take()? else { return Ok(()) };
        Server::builder()
            .accept_http1(true)
            .serve_with_incoming_shutdown(service, TcpListenerStream::new(listener), async move {
                // An error means that the sender is gone, which is a stop as well.
                let _ = stop.wait_for(|stop| *stop).await;
            })
            .await
            .map_err(|e| Failure::other(format!("the {} port failed: {e}", self.name)))
    }
}

async fn serve(settings: ServeSettings) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut client = Port::bind("clients", settings.listen)?;
    let admin_port = Port::bind("admin", settings.listen_admin)?;
    let metrics_port = Port::bind("metrics", settings.listen_metrics)?;
    let advertise = settings.advertise.clone().or(client.address.map(|address| address.to_string()));
    let ports = [client.address, admin_port.address, metrics_port.address].map(|port| match port {
        Some(address) => address.to_string(),
        None => "none".into(),
    });

    let context = Context::new(&settings.name);
    let limits = Limits::new(&settings);
    let metrics = Metrics::new(context.clone(), limits.clone());
    let (stop_health, stopped_health) = watch::channel(false);
    let health = start_health(&context, &metrics, admin_port, metrics_port, stopped_health)?;
    let turning = tokio::spawn(turn(context.clone()));

    let model = Model::new();
    let sets_aside = settings.bad_volume == BadVolume::SetAside;
    if sets_aside {
        aside::finish(&settings.data)?;
    }
    let started = tokio::select! {
        node = Node::start(node_options(&settings, advertise, &model)) => Some(node),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
    };
    let mut foreign = None;
    if let Some(started) = started {
        let node = match started {
            Err(error) if sets_aside && error.kind() == mainstay::ErrorKind::Corrupt => {
                return Err(end_with_volume_aside(&settings.data, &error.to_string()));
            }
            started => started?,
        };
        context.set_node(node.clone());
        let (stop_clients, stopped_clients) = watch::channel(false);
        let bounded = EtcdSettings { data: Some(limits.data.clone()), ..EtcdSettings::default() };
        let etcd = Etcd::start(NodeBackend::new(node.clone(), model.clone()), model.clone(), bounded);
        let moves = Moves::default();
        let front = front(&context, &metrics, &etcd, &limits, &moves);
        let listener = client.take()?;
        let clients = tokio::spawn(async move {
            if let Some(listener) = listener {
                connections::serve(listener, front, limits, stopped_clients).await;
            }
        });
        let watching = tokio::spawn(log_changes(node.clone()));
        let following =
            settings.memory_follows.then(|| tokio::spawn(memory::follow_limit(node.clone(), settings.memory_bytes)));
        let [clients_at, admin_at, metrics_at] = ports;
        tracing::info!(
            clients = clients_at, admin = admin_at, metrics = metrics_at, peers = node.peer_address().0,
            data = %settings.data.display(), "serving"
        );

        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
            reason = is_foreign(&node), if sets_aside => foreign = Some(reason),
        }
        context.stop();
        hand_over(&node).await;
        etcd.close().await;
        moves.close().await;
        let _ = stop_clients.send(true);
        if tokio::time::timeout(DRAIN_MAX, clients).await.is_err() {
            tracing::info!("clients with open streams are cut off");
        }
        watching.abort();
        following.inspect(tokio::task::JoinHandle::abort);
        node.close().await?;
    }
    turning.abort();
    let _ = stop_health.send(true);
    // Probes that are under way get their answer; the thread ends by itself.
    let _ = tokio::time::timeout(Duration::from_secs(1), health).await;
    if let Some(reason) = foreign {
        return Err(end_with_volume_aside(&settings.data, &reason));
    }
    tracing::info!("closed");
    Ok(())
}

fn node_options(settings: &ServeSettings, advertise: Option<String>, model: &Model) -> NodeOptions {
    let storage = Store::builder()
        .memory_bytes(settings.memory_bytes)
        .wal_bytes(settings.wal_bytes)
        .memtable_bytes(settings.memtable_bytes)
        .compression(settings.compression.into())
        .background_tasks(settings.background_tasks)
        .backend(settings.backend.into())
        .state_machine(Arc::new(model.clone()));
    let mut options = NodeOptions::new(&settings.name, &settings.data)
        .listen(settings.listen_peer.to_string())
        .client_address(advertise.unwrap_or_default())
        .site(&settings.site)
        .priority(settings.priority)
        .witness(settings.witness)
        .heartbeat(settings.heartbeat)
        .election_timeout(settings.election_timeout)
        .storage(storage);
    if let Some(advertise) = &settings.advertise_peer {
        options = options.advertise(advertise);
    }
    for bound in &settings.site_lag_bounds {
        options = options.site_lag_bound(bound.clone());
    }
    for (name, address) in &settings.peers {
        options = options.peer(name, address);
    }
    options
}

/// What the client port serves.
fn front(
    context: &Arc<Context>,
    metrics: &Arc<Metrics>,
    etcd: &Etcd,
    limits: &Limits,
    moves: &Moves,
) -> Front<KvServer> {
    let store = service::service(context.clone());
    let placed = placed::service(context.clone(), limits.data.clone(), moves.clone());
    let others = etcd
        .routes()
        .add_service(store.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX))
        .add_service(placed.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX));
    Front::new(etcd.kv(), others, metrics.clone())
}

/// Serves admin and metrics on a thread of their own. The future resolves when it has ended.
fn start_health(
    context: &Arc<Context>,
    metrics: &Arc<Metrics>,
    admin_port: Port,
    metrics_port: Port,
    stopped: watch::Receiver<bool>,
) -> Result<tokio::sync::oneshot::Receiver<()>, Failure> {
    let admin_routes = admin::routes(context.clone());
    let metrics_routes = metrics::routes(metrics.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("mainstay-admin".into()).spawn(move || {
        runtime.block_on(async {
            let admin = admin_port.serve_health(Routes::from(admin_routes).prepare(), stopped.clone());
            let metrics = metrics_port.serve_health(Routes::from(metrics_routes).prepare(), stopped);
            let (admin, metrics) = futures_util::join!(admin, metrics);
            for failure in [admin.err(), metrics.err()].into_iter().flatten() {
                tracing::error!(error = %failure, "a port is not served any more");
            }
        });
        let _ = ended.send(());
    })?;
    Ok(end)
}

/// Shows that the event loop turns.
async fn turn(context: Arc<Context>) {
    let mut interval = tokio::time::interval(Duration::from_secs(1));
    loop {
        interval.tick().await;
        context.turn();
    }
}

/// Logs each change of role, term or leader.
async fn log_changes(node: Node) {
    let mut seen = None;
    loop {
        let status = node.status();
        let now = (status.role.clone(), status.term, status.leader, status.members.len(), status.failure.clone());
        if seen.as_ref() != Some(&now) {
            let leader = status.leader.map_or(0, |id| id.0);
            let (term, index, members) = (status.term, status.committed.0, status.members.len());
            match &status.failure {
                Some(failure) => {
                    tracing::error!(group = GROUP, term, index, error = %failure, "left service");
                }
                None => tracing::info!(group = GROUP, term, index, role = status.role, leader, members, "role"),
            }
            seen = Some(now);
        }
        node.changed().await;
    }
}

/// The group whose changes are logged: the first.
const GROUP: u64 = 1;

/// Sets the volume aside; what the process ends with.
fn end_with_volume_aside(data: &Path, reason: &str) -> Failure {
    match aside::set_aside(data) {
        Ok(aside) => {
            let aside = aside.display();
            Failure::other(format!(
                "the volume was set aside: start again to join as a new member path={aside}: {reason}"
            ))
        }
        Err(failure) => Failure::other(format!("{failure}: {reason}")),
    }
}

/// Resolves when the volume has been that of another cluster for [`FOREIGN_FOR`] without a break, to what the node says of it.
async fn is_foreign(node: &Node) -> String {
    let mut since = None;
    loop {
        let status = node.status();
        let now = tokio::time::Instant::now();
        since = (status.role == "foreign").then(|| since.unwrap_or(now));
        if since.is_some_and(|since| now.duration_since(since) >= FOREIGN_FOR) {
            return status.failure.unwrap_or_default();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Gives leadership away if this process has it and somebody can take it.
async fn hand_over(node: &Node) {
    let status = node.status();
    let others = status.members.iter().any(|m| m.id != status.id && m.role == mainstay::MemberRole::Voter);
    if status.role != "leader" || !others {
        return;
    }
    match tokio::time::timeout(HAND_OVER_MAX, node.transfer_leader(None)).await {
        Ok(Ok(leader)) => {
            tracing::info!(group = GROUP, term = status.term, leader = leader.0, "handed leadership over")
        }
        Ok(Err(e)) => tracing::warn!(group = GROUP, term = status.term, error = %e, "kept leadership until the end"),
        Err(_) => tracing::warn!(group = GROUP, term = status.term, "nobody took over in time"),
    }
}
