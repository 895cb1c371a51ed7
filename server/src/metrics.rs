//! The metrics port: counts of each layer and of each request, as Prometheus text.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::context::Context;
use crate::status::Status;

/// A request by what was called and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: String,
}

/// Everything that is counted.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    seconds: Family<MethodLabels, Histogram, fn() -> Histogram>,
}

impl Metrics {
    pub(crate) fn new(context: Arc<Context>) -> Arc<Self> {
        let mut registry = Registry::with_prefix("mainstay");
        let requests = Family::default();
        registry.register("requests", "Requests on the client port by method and gRPC code", requests.clone());
        let seconds: Family<MethodLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0001, 2.0, 18)));
        registry.register(
            "request_seconds",
            "Time from a request to the head of its answer, in seconds",
            seconds.clone(),
        );
        registry.register_collector(Box::new(StatusCollector { context }));
        Arc::new(Self { registry, requests, seconds })
    }
}

/// The routes of the metrics port.
pub(crate) fn routes(metrics: Arc<Metrics>) -> Router {
    Router::new().route("/metrics", get(show)).with_state(metrics)
}

async fn show(State(metrics): State<Arc<Metrics>>) -> Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &metrics.registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot encode: {e}\n")).into_response(),
    }
}

/// Counts a request of the client port. A stream counts when its answer begins; what breaks it later is not seen.
pub(crate) async fn count(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let path = request.uri().path().trim_start_matches('/').to_owned();
    let response = next.run(request).await;
    let code = code(response.status(), response.headers());
    // Unknown paths share one label: a stranger cannot grow the memory.
    let method = if code == "Unimplemented" { "unknown".to_owned() } else { path };
    metrics.seconds.get_or_create(&MethodLabels { method: method.clone() }).observe(start.elapsed().as_secs_f64());
    metrics.requests.get_or_create(&RequestLabels { method, code }).inc();
    response
}

/// A refusal has its gRPC code among the headers; an answer has it behind its body, and it is `Ok`.
fn code(http: StatusCode, headers: &HeaderMap) -> String {
    if !http.is_success() {
        return if http == StatusCode::NOT_FOUND { "Unimplemented".into() } else { format!("Http{}", http.as_u16()) };
    }
    match tonic::Status::from_header_map(headers) {
        Some(status) => format!("{:?}", status.code()),
        None => "Ok".into(),
    }
}

/// Turns the status into metrics when it is asked for.
struct StatusCollector {
    context: Arc<Context>,
}

impl std::fmt::Debug for StatusCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StatusCollector")
    }
}

enum Kind {
    Gauge,
    Counter,
}

type Row = (&'static str, &'static str, Kind, fn(&Status) -> u64);

/// Name, help, kind, value. A counter gets `_total` behind its name.
const ROWS: &[Row] = &[
    ("disk_extent_bytes", "Bytes of extents in use", Kind::Gauge, |s| s.disk.extent_bytes),
    ("disk_read_only", "1 while the volume takes no writes", Kind::Gauge, |s| u64::from(s.disk.read_only.is_some())),
    ("disk_fallback", "1 while a slower disk interface serves than the one asked for", Kind::Gauge, |s| {
        u64::from(s.disk.fallback_reason.is_some())
    }),
    ("log_batches", "Device writes of the log, each with one flush", Kind::Counter, |s| s.log.batches),
    ("log_records", "Records made durable", Kind::Counter, |s| s.log.records),
    ("log_payload_bytes", "Bytes of records", Kind::Counter, |s| s.log.payload_bytes),
    ("log_written_bytes", "Bytes written to the device by the log", Kind::Counter, |s| s.log.written_bytes),
    ("log_used_bytes", "Bytes of the log in use", Kind::Gauge, |s| s.log.used_bytes),
    ("log_ring_bytes", "Bytes of the log ring", Kind::Gauge, |s| s.log.ring_bytes),
    ("raft_term", "Term", Kind::Gauge, |s| s.raft.term),
    ("raft_is_leader", "1 on the leader", Kind::Gauge, |s| u64::from(s.raft.role == "leader")),
    ("raft_has_leader", "1 while a leader is known", Kind::Gauge, |s| u64::from(s.raft.leader.is_some())),
    ("raft_members", "Members, learners included", Kind::Gauge, |s| s.raft.members.len() as u64),
    ("raft_last_log_index", "Last entry of the log", Kind::Gauge, |s| s.raft.last_log),
    ("raft_committed_index", "Last entry known committed", Kind::Gauge, |s| s.raft.committed),
    ("raft_applied_index", "Last entry applied", Kind::Gauge, |s| s.raft.applied),
    ("raft_lag_max", "On the leader: entries that the slowest member lacks", Kind::Gauge, |s| {
        s.raft.members.iter().filter_map(|member| member.lag).max().unwrap_or(0)
    }),
    ("engine_flushed_index", "Entries up to here are in tables", Kind::Gauge, |s| s.engine.flushed),
    ("engine_frozen_generations", "Memtables that wait for their flush", Kind::Gauge, |s| s.engine.frozen_generations),
    ("engine_tables", "Tables", Kind::Gauge, |s| s.engine.tables),
    ("engine_table_bytes", "Bytes of tables", Kind::Gauge, |s| s.engine.table_bytes),
    ("engine_absent_jobs", "Jobs that others have finished and this replica has not", Kind::Gauge, |s| {
        s.engine.absent_jobs
    }),
    ("engine_memory_used_bytes", "Bytes of the memory budget in use", Kind::Gauge, |s| s.engine.memory_used_bytes),
    ("engine_memory_bytes", "The memory budget", Kind::Gauge, |s| s.engine.memory_bytes),
    ("engine_divergences", "Tables that differed from the leader's", Kind::Counter, |s| s.engine.divergences),
    ("engine_checkpoints", "Checkpoints", Kind::Gauge, |s| s.engine.checkpoints.len() as u64),
    ("engine_clones", "Clones", Kind::Gauge, |s| s.engine.clones.len() as u64),
    ("ready", "1 while the process is fit for clients", Kind::Gauge, |s| u64::from(s.ready)),
];

impl Collector for StatusCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(status) = self.context.status() else { return Ok(()) };
        for (name, help, kind, value) in ROWS {
            let value = value(&status);
            match kind {
                Kind::Gauge => {
                    let metric = ConstGauge::<i64>::new(i64::try_from(value).unwrap_or(i64::MAX));
                    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)?;
                }
                Kind::Counter => {
                    let metric = ConstCounter::<u64>::new(value);
                    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)?;
                }
            }
        }
        Ok(())
    }
}
