//! Writers that never give up on a key, and what was acknowledged to them.
//!
//! # Invariants
//! 1. A pair is in the model if and only if the server acknowledged it. A write without an answer is sent again with the
//!    same value, so it may have been applied twice and never differently.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use indicatif::ProgressBar;
use tokio::task::JoinHandle;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use super::cluster::Cluster;
use super::verify::CLONE;
use crate::cli::Failure;
use crate::client::endpoint;
use crate::etcd::BRANCH_KEY;

use crate::proto::etcdserverpb::PutRequest;
use crate::proto::etcdserverpb::kv_client::KvClient;

/// Longest wait for one answer; then the write goes to the next replica.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Longest time that one write is tried again.
const WRITE_MAX: Duration = Duration::from_secs(60);
/// Wait after a refusal.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Acknowledged pairs and when.
struct Model {
    acknowledged: BTreeMap<String, Vec<u8>>,
    latencies: Histogram<u64>,
    last: Option<Instant>,
    gap_max: Duration,
    /// Time spent in phases that write.
    busy: Duration,
}

struct Shared {
    model: Mutex<Model>,
    channels: Vec<Channel>,
    next_channel: AtomicUsize,
    next_number: AtomicU64,
    stop: AtomicBool,
}

#[derive(Clone)]
pub(super) struct Load {
    shared: Arc<Shared>,
}

/// What was reached.
pub(super) struct Figures {
    pub(super) writes: u64,
    pub(super) writes_per_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
}

impl Load {
    pub(super) fn new(cluster: &Cluster) -> Result<Self, Failure> {
        let channels: Result<Vec<Channel>, Failure> =
            cluster.clients().map(|address| Ok(endpoint(address, ANSWER_MAX)?.connect_lazy())).collect();
        let latencies = Histogram::new_with_bounds(1, 600_000_000, 3).map_err(|e| Failure::other(e.to_string()))?;
        let model = Model {
            acknowledged: BTreeMap::new(),
            latencies,
            last: None,
            gap_max: Duration::ZERO,
            busy: Duration::ZERO,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                model: Mutex::new(model),
                channels: channels?,
                next_channel: AtomicUsize::new(0),
                next_number: AtomicU64::new(0),
                stop: AtomicBool::new(false),
            }),
        })
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.shared.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes all pairs with many requests in flight.
    pub(super) async fn write_all(
        &self,
        pairs: &[(String, Vec<u8>)],
        writers: usize,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let start = Instant::now();
        let pairs: Arc<[(String, Vec<u8>)]> = pairs.into();
        let next = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<JoinHandle<Result<(), Failure>>> = (0..writers)
            .map(|_| {
                let (this, pairs, next, bar) = (self.clone(), pairs.clone(), next.clone(), bar.clone());
                tokio::spawn(async move {
                    while let Some((key, value)) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        this.write(key, value).await?;
                        bar.inc(1);
                    }
                    Ok(())
                })
            })
            .collect();
        for task in tasks {
            task.await.map_err(|e| Failure::other(format!("a writer failed: {e}")))??;
        }
        self.model().busy += start.elapsed();
        Ok(())
    }

    /// Starts writers of new keys that run until [`Load::stop_writing`].
    pub(super) fn start_writing(&self, writers: usize) -> Vec<JoinHandle<Result<(), Failure>>> {
        let task = |_| {
            let this = self.clone();
            tokio::spawn(async move {
                while !this.shared.stop.load(Ordering::Relaxed) {
                    let number = this.shared.next_number.fetch_add(1, Ordering::Relaxed);
                    this.write(&format!("live/{number:09}"), format!("written live, number {number}").as_bytes())
                        .await?;
                }
                Ok(())
            })
        };
        let writers = (0..writers).map(task).collect();
        self.model().last = None;
        writers
    }

    pub(super) fn stop_writing(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Begins to look for the longest time without an acknowledgement.
    pub(super) fn arm_gap(&self) {
        self.model().gap_max = Duration::ZERO;
    }

    pub(super) fn longest_gap(&self) -> Duration {
        let model = self.model();
        model.gap_max.max(model.last.map(|last| last.elapsed()).unwrap_or_default())
    }

    /// Waits for an acknowledgement after a gap that began at `moment`.
    pub(super) async fn wait_for_acknowledgement(&self, moment: Instant, patience: Duration) -> Result<(), Failure> {
        let mut seen = self.model().acknowledged.len();
        // What was on its way when the leader died may still come in: a steady stream is meant.
        let mut steady = 0;
        while steady < 10 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.model().acknowledged.len();
            steady = if now > seen { steady + 1 } else { 0 };
            seen = now;
            if moment.elapsed() > patience {
                return Err(Failure::other("no write was acknowledged any more"));
            }
        }
        Ok(())
    }

    async fn write(&self, key: &str, value: &[u8]) -> Result<(), Failure> {
        let latency = self.put(key, value, None).await?;
        let now = Instant::now();
        let mut model = self.model();
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        model.latencies.saturating_record(micros.max(1));
        if let Some(last) = model.last {
            model.gap_max = model.gap_max.max(now.saturating_duration_since(last));
        }
        model.last = Some(now);
        model.acknowledged.insert(key.to_owned(), value.to_vec());
        Ok(())
    }

    /// Sends a write until it is acknowledged.
    async fn put(&self, key: &str, value: &[u8], clone: Option<&'static str>) -> Result<Duration, Failure> {
        let start = Instant::now();
        loop {
            let at = self.shared.next_channel.fetch_add(1, Ordering::Relaxed) % self.shared.channels.len();
            let mut client = KvClient::new(self.shared.channels[at].clone());
            let (key, value) = (key.as_bytes().to_vec().into(), value.to_vec().into());
            let mut request = Request::new(PutRequest { key, value, ..PutRequest::default() });
            if let Some(clone) = clone {
                request.metadata_mut().insert(BRANCH_KEY, MetadataValue::from_static(clone));
            }
            match client.put(request).await {
                Ok(_) => return Ok(start.elapsed()),
                Err(status) if start.elapsed() > WRITE_MAX => {
                    return Err(Failure::other(format!("a write is refused again and again: {}", status.message())));
                }
                Err(_) => tokio::time::sleep(RETRY_INTERVAL).await,
            }
        }
    }

    /// Writes pairs to the clone; they are not part of the model.
    pub(super) async fn write_clone(&self, pairs: &[(String, Vec<u8>)], writers: usize) -> Result<(), Failure> {
        for some in pairs.chunks(writers) {
            let puts = some.iter().map(|(key, value)| self.put(key, value, Some(CLONE)));
            futures_util::future::try_join_all(puts).await?;
        }
        Ok(())
    }

    /// Everything that was acknowledged.
    pub(super) fn acknowledged(&self) -> BTreeMap<String, Vec<u8>> {
        self.model().acknowledged.clone()
    }

    /// Latencies over all writes; the rate of the undisturbed load.
    pub(super) fn figures(&self) -> Figures {
        let model = self.model();
        let at = |quantile: f64| model.latencies.value_at_quantile(quantile) as f64 / 1000.0;
        let loaded = model.acknowledged.keys().filter(|key| !key.starts_with("live/")).count();
        Figures {
            writes: model.latencies.len(),
            writes_per_second: loaded as f64 / model.busy.as_secs_f64().max(0.001),
            p50_ms: at(0.5),
            p99_ms: at(0.99),
        }
    }
}
