//! The metrics port: counts of each layer and of each request, as Prometheus text.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use mainstay::Node;
use mainstay_io::{LatencyCounts, latency_bound};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::context::Context;
use crate::limits::{Limits, Quota};
use crate::status::{SiteLagSection, Status};

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
    hot: [Hot; HOT_METHODS.len()],
}

impl Metrics {
    pub(crate) fn new(context: Arc<Context>, limits: Arc<Limits>) -> Arc<Self> {
        let mut registry = Registry::with_prefix("mainstay");
        let requests: Family<RequestLabels, Counter> = Family::default();
        registry.register("requests", "Requests on the client port by method and gRPC code", requests.clone());
        let seconds: Family<MethodLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0001, 2.0, 18)));
        registry.register(
            "request_seconds",
            "Time from a request to the head of its answer, in seconds",
            seconds.clone(),
        );
        registry.register_collector(Box::new(StatusCollector { context }));
        registry.register_collector(Box::new(LimitsCollector { limits }));
        let hot = HOT_METHODS.map(|method| {
            let labels = MethodLabels { method: method.to_owned() };
            let ok = RequestLabels { method: method.to_owned(), code: "Ok".into() };
            Hot {
                method,
                seconds: seconds.get_or_create(&labels).clone(),
                ok: Counter::clone(&*requests.get_or_create(&ok)),
            }
        });
        Arc::new(Self { registry, requests, seconds, hot })
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

/// Methods that are counted without making a label for each request: those of the KV service.
const HOT_METHODS: [&str; 4] =
    ["etcdserverpb.KV/Put", "etcdserverpb.KV/Range", "etcdserverpb.KV/Txn", "etcdserverpb.KV/DeleteRange"];

/// A method and where it counts when it ends well.
#[derive(Clone)]
struct Hot {
    method: &'static str,
    seconds: Histogram,
    ok: Counter,
}

impl Metrics {
    /// Begins to count a request of the client port. A stream counts when its answer begins; what breaks it later is not
    /// seen.
    pub(crate) fn begin(self: &Arc<Self>, path: &str) -> Counting {
        let path = path.trim_start_matches('/');
        let method = match self.hot.iter().position(|hot| hot.method == path) {
            Some(at) => Method::Hot(at),
            None => Method::Other(path.to_owned()),
        };
        Counting { metrics: self.clone(), method, start: Instant::now() }
    }
}

enum Method {
    /// A place in `Metrics::hot`.
    Hot(usize),
    Other(String),
}

/// A request that is not answered yet.
pub(crate) struct Counting {
    metrics: Arc<Metrics>,
    method: Method,
    start: Instant,
}

impl Counting {
    /// The head of the answer is there.
    pub(crate) fn end(self, http: StatusCode, headers: &HeaderMap) {
        let Self { metrics, method, start } = self;
        let seconds = start.elapsed().as_secs_f64();
        let code = code(http, headers);
        let method = match method {
            Method::Hot(at) if code == "Ok" => {
                let hot = &metrics.hot[at];
                hot.seconds.observe(seconds);
                hot.ok.inc();
                return;
            }
            Method::Hot(at) => metrics.hot[at].method.to_owned(),
            // Unknown paths share one label: a stranger cannot grow the memory.
            Method::Other(_) if code == "Unimplemented" => "unknown".to_owned(),
            Method::Other(path) => path,
        };
        metrics.seconds.get_or_create(&MethodLabels { method: method.clone() }).observe(seconds);
        metrics.requests.get_or_create(&RequestLabels { method, code: code.into_owned() }).inc();
    }
}

/// A refusal has its gRPC code among the headers; an answer has it behind its body, and it is `Ok`.
fn code(http: StatusCode, headers: &HeaderMap) -> Cow<'static, str> {
    if !http.is_success() {
        let code =
            if http == StatusCode::NOT_FOUND { "Unimplemented".into() } else { format!("Http{}", http.as_u16()) };
        return code.into();
    }
    match tonic::Status::from_header_map(headers) {
        Some(status) => format!("{:?}", status.code()).into(),
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
    ("raft_apply_lag", "Entries known committed and not applied here", Kind::Gauge, |s| {
        s.raft.committed.saturating_sub(s.raft.applied)
    }),
    ("raft_lag_max", "On the leader: entries that the slowest member lacks", Kind::Gauge, |s| {
        s.raft.members.iter().filter_map(|member| member.lag).max().unwrap_or(0)
    }),
    (
        "raft_under_replicated",
        "On the leader: voters that are silent or far behind, so that writes are on fewer volumes than they should be",
        Kind::Gauge,
        |s| s.raft.under_replicated,
    ),
    (
        "raft_disk_hand_overs",
        "Times that it told another voter to lead because its own disk was worse",
        Kind::Counter,
        |s| s.raft.disk_hand_overs,
    ),
    (
        "raft_priority_hand_overs",
        "Times that it handed leadership to a voter with a higher priority",
        Kind::Counter,
        |s| s.raft.priority_hand_overs,
    ),
    ("raft_fetched_bytes", "Bytes of tables fetched from other members", Kind::Counter, |s| s.raft.fetched_bytes),
    ("raft_groups", "Groups beside the first", Kind::Gauge, |s| s.raft.groups.len() as u64),
    ("raft_groups_without_leader", "Groups beside the first of which no leader is known", Kind::Gauge, |s| {
        s.raft.groups.iter().filter(|group| group.leader.is_none()).count() as u64
    }),
    ("engine_flushed_index", "Entries up to here are in tables", Kind::Gauge, |s| s.engine.flushed),
    ("engine_frozen_generations", "Memtables that wait for their flush", Kind::Gauge, |s| s.engine.frozen_generations),
    ("engine_tables", "Tables", Kind::Gauge, |s| s.engine.tables),
    ("engine_table_bytes", "Bytes of tables", Kind::Gauge, |s| s.engine.table_bytes),
    ("engine_absent_jobs", "Jobs that others have finished and this replica has not", Kind::Gauge, |s| {
        s.engine.absent_jobs
    }),
    (
        "engine_memory_used_bytes",
        "Bytes of memory in use, of the setting without the allocator's share",
        Kind::Gauge,
        |s| s.engine.memory_used_bytes,
    ),
    ("engine_memory_bytes", "The setting --memory", Kind::Gauge, |s| s.engine.memory_bytes),
    ("engine_memory_allocator_bytes", "What of the setting is left to the allocator", Kind::Gauge, |s| {
        s.engine.memory_allocator_bytes
    }),
    ("engine_user_bytes", "Bytes of keys and values applied", Kind::Counter, |s| s.engine.writes.user_bytes),
    ("engine_flush_bytes", "Bytes of tables written by flushes", Kind::Counter, |s| s.engine.writes.flush_bytes),
    ("engine_pages_bytes", "Bytes of manifest pages written", Kind::Counter, |s| s.engine.writes.pages_bytes),
    ("engine_fetched_bytes", "Bytes of tables written that came from other members", Kind::Counter, |s| {
        s.engine.writes.fetched_bytes
    }),
    ("engine_space_refusals", "Writes refused since the volume was full", Kind::Counter, |s| {
        s.engine.writes.space_refusals
    }),
    ("engine_divergences", "Tables that differed from the leader's", Kind::Counter, |s| s.engine.divergences),
    ("engine_jobs_retrying", "Flushes and compactions that failed and are tried again", Kind::Gauge, |s| {
        s.engine.jobs_retrying
    }),
    ("engine_refused_installs", "Flushes and compactions whose tables could not be installed", Kind::Counter, |s| {
        s.engine.refused_installs
    }),
    ("engine_jobs_failed", "Flushes and compactions that failed for good", Kind::Gauge, |s| s.engine.jobs_failed),
    ("heal_tables_found", "Tables found damaged", Kind::Counter, |s| s.engine.heal.tables_found),
    ("heal_tables_healed", "Damaged tables made anew from other members", Kind::Counter, |s| {
        s.engine.heal.tables_healed
    }),
    ("heal_tables_damaged", "Tables damaged now", Kind::Gauge, |s| s.engine.heal.tables_damaged),
    ("heal_reads_served", "Reads that met damage and were answered by another member", Kind::Counter, |s| {
        s.engine.heal.reads_served
    }),
    ("heal_tables_fetched", "Tables fetched because this replica could not make them", Kind::Counter, |s| {
        s.engine.heal.tables_fetched
    }),
    ("heal_superblocks_healed", "Copies of the superblock written again", Kind::Counter, |s| {
        s.engine.heal.superblocks_healed
    }),
    ("heal_pages_healed", "Times that damaged manifest pages were written again", Kind::Counter, |s| {
        s.engine.heal.pages_healed
    }),
    ("heal_log_found", "Places of the log that the scrubber found damaged", Kind::Counter, |s| s.engine.heal.log_found),
    ("heal_log_cut", "Damaged places of the log behind which it was cut", Kind::Counter, |s| s.engine.heal.log_cut),
    ("heal_entries_lost", "Entries of the log found missing or damaged", Kind::Counter, |s| s.engine.heal.entries_lost),
    ("heal_entries_healed", "Entries of the log fetched from other members and written again", Kind::Counter, |s| {
        s.engine.heal.entries_healed
    }),
    (
        "heal_went_back",
        "Times that the volume was found to have gone back behind what it had promised",
        Kind::Counter,
        |s| s.engine.heal.went_back,
    ),
    ("raft_is_twin", "1 while another process is this member", Kind::Gauge, |s| u64::from(s.raft.role == "twin")),
    ("raft_cluster_version", "Which formats the cluster may write", Kind::Gauge, |s| s.raft.cluster_version.into()),
    ("raft_cluster_version_max", "The newest such version that this build reads", Kind::Gauge, |s| {
        s.raft.cluster_version_max.into()
    }),
    ("scrub_bytes", "Bytes that the scrubber has read", Kind::Counter, |s| s.engine.heal.scrub_bytes),
    ("scrub_passes", "Whole passes of the scrubber", Kind::Counter, |s| s.engine.heal.scrub_passes),
    ("scrub_last_ms", "When the last whole pass ended, in Unix milliseconds", Kind::Gauge, |s| {
        s.engine.heal.scrub_last_ms
    }),
    ("engine_checkpoints", "Checkpoints", Kind::Gauge, |s| s.engine.checkpoints.len() as u64),
    ("engine_clones", "Clones", Kind::Gauge, |s| s.engine.clones.len() as u64),
    ("ready", "1 while the process is fit for clients", Kind::Gauge, |s| u64::from(s.ready)),
];

type SiteRow = (&'static str, &'static str, fn(&SiteLagSection) -> f64);

/// Name, help, value for each site with a bound, on the leader.
const SITE_ROWS: &[SiteRow] = &[
    ("raft_site_lag_bytes", "Bytes of the log that a site lacks", |lag| lag.bytes as f64),
    ("raft_site_lag_seconds", "How long a site has lacked an entry, in seconds", |lag| lag.time_ms as f64 / 1000.0),
    ("raft_site_lag_beyond", "1 while a site lags beyond its bound", |lag| f64::from(u8::from(lag.beyond))),
];

type Histograms = (&'static str, &'static str, fn(&Node) -> LatencyCounts);

/// Name, help, counts. Seconds.
const HISTOGRAMS: &[Histograms] = &[
    ("log_write_seconds", "Time of a device write of the log until it is durable, in seconds", |node| {
        node.engine().wal().stats().write_latency
    }),
    (
        "raft_apply_lag_seconds",
        "Time from the news of a commit until it is applied here, sampled, in seconds",
        |node| node.replica().apply_lag(),
    ),
];

fn buckets(counts: &LatencyCounts) -> Vec<(f64, u64)> {
    let bound = |i| latency_bound(i).map_or(f64::MAX, |bound| bound.as_secs_f64());
    counts.counts.iter().enumerate().map(|(i, count)| (bound(i), *count)).collect()
}

fn encode(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    kind: &Kind,
    value: u64,
) -> Result<(), std::fmt::Error> {
    match kind {
        Kind::Gauge => {
            let metric = ConstGauge::<i64>::new(i64::try_from(value).unwrap_or(i64::MAX));
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        }
        Kind::Counter => {
            let metric = ConstCounter::<u64>::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        }
    }
}

impl Collector for StatusCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(status) = self.context.status() else { return Ok(()) };
        for (name, help, kind, value) in ROWS {
            encode(&mut encoder, name, help, kind, value(&status))?;
        }
        for (name, help, value) in SITE_ROWS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for lag in &status.raft.site_lags {
                let metric = ConstGauge::<f64>::new(value(lag));
                metric.encode(family.encode_family(&[("site", lag.site.as_str())])?)?;
            }
        }
        let writes = &status.engine.writes;
        let help = "Bytes written to the device since the start for each byte of keys and values";
        let metric = ConstGauge::<f64>::new(writes.write_amplification);
        metric.encode(encoder.encode_descriptor("engine_write_amplification", help, None, MetricType::Gauge)?)?;
        let help = "Bytes of tables written by compactions, by the level that they joined";
        let mut family = encoder.encode_descriptor("engine_compaction_bytes", help, None, MetricType::Counter)?;
        for (level, bytes) in (1_u64..).zip(&writes.compaction_bytes) {
            ConstCounter::<u64>::new(*bytes).encode(family.encode_family(&[("level", level)])?)?;
        }
        let Some(node) = self.context.node() else { return Ok(()) };
        let help = "Waits of writers by what they waited for, in seconds";
        let mut family = encoder.encode_descriptor("engine_stall_seconds", help, None, MetricType::Histogram)?;
        for stall in &node.engine().status().stats.stalls {
            let (counts, labels) = (&stall.waits, [("cause", stall.cause.name())]);
            let mut metric = family.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(counts.sum.as_secs_f64(), counts.total(), &buckets(counts), None)?;
        }
        for (name, help, counts) in HISTOGRAMS {
            let counts = counts(node);
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            metric.encode_histogram::<NoLabelSet>(counts.sum.as_secs_f64(), counts.total(), &buckets(&counts), None)?;
        }
        Ok(())
    }
}

/// Turns the limits into metrics when they are asked for.
struct LimitsCollector {
    limits: Arc<Limits>,
}

impl std::fmt::Debug for LimitsCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LimitsCollector")
    }
}

type LimitRow = (&'static str, &'static str, fn(&Limits) -> &Quota);

/// Name, what it counts, quota.
const LIMIT_ROWS: &[LimitRow] = &[
    ("client_connections", "Connections of clients", |limits| &limits.connections),
    ("client_requests", "Requests under way on the client port", |limits| &limits.requests),
    ("client_streams", "Open streams of clients", |limits| &limits.streams),
    ("client_request_bytes", "Bytes of the bodies of requests under way", |limits| &limits.request_bytes),
    ("data_bytes", "Bytes of data on the volume, looked at every second", |limits| &limits.data),
];

impl Collector for LimitsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (name, what, quota) in LIMIT_ROWS {
            let quota = quota(&self.limits);
            let rows = [
                ("in_use", "now", Kind::Gauge, quota.in_use()),
                ("max", "at most", Kind::Gauge, quota.limit()),
                ("refused", "times that one more was refused", Kind::Counter, quota.refused()),
            ];
            for (suffix, which, kind, value) in rows {
                encode(&mut encoder, &format!("{name}_{suffix}"), &format!("{what}: {which}"), &kind, value)?;
            }
        }
        Ok(())
    }
}
