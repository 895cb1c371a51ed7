//! The Watch service: many watches on one stream, each told every change of its keys once and in order.
//!
//! # Place
//! One task a stream. It takes changes from the branch's ring in memory; what is not there it reads from `etcd.revs`, in
//! bounded portions. Nothing is queued for a slow client: its task waits, falls out of the ring, and reads the store.
//!
//! # Invariants
//! W1. A watch in step has been told everything up to `told`, as far as it is at or above its own first revision.
//! W2. A watch behind has been told everything below its `next`.
//! W3. The changes of a revision are in one answer, unless the client allowed fragments.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_engine::BranchId;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::backend::Backend;
use super::context::Context;
use super::error::{Refusal, status_of};
use super::model::check::{is_from_key, range_of};
use super::model::record::{Rev, RevRecord};
use super::model::{Change, Changes, View, Watching};
use super::service::{Core, Facts};
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::watch_create_request::FilterType;
use crate::proto::etcdserverpb::watch_server::Watch;
use crate::proto::mvccpb::{Event, KeyValue, event::EventType};

/// Answers of a stream that wait for the client, at most.
const ANSWERS_WAITING_MAX: usize = 16;
/// Watches of one stream, at most.
const WATCHES_MAX: usize = 65_536;
/// Revisions taken from memory at a time.
const RECENT_REVISIONS: usize = 512;
/// Records read from the store at a time, and in all before the client's words are heard again.
const BEHIND_PAGE: usize = 128;
/// See [`BEHIND_PAGE`].
const BEHIND_RECORDS: usize = 1024;
/// Bytes of values in one portion from the store, at most, but for one revision that is larger.
const BEHIND_BYTES: usize = 4 << 20;
/// Bytes at which an answer is sent, between two revisions.
const ANSWER_BYTES: usize = 1 << 20;
/// How long a stream that asked for a leader goes on without one.
const NO_LEADER_MAX: std::time::Duration = std::time::Duration::from_secs(3);
/// The watch id of answers that are about no watch.
const NO_WATCH: i64 = -1;

pub(super) struct WatchService<B>(pub(super) Arc<Core<B>>);

#[tonic::async_trait]
impl<B: Backend> Watch for WatchService<B> {
    type WatchStream = ReceiverStream<Result<pb::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let core = self.0.clone();
        let context = Context::of(&core, request.metadata())?;
        let inbound = request.into_inner();
        let watching = core.model.branch(context.branch).watch();
        let told = core.view(context.branch).await?.tip().revision;
        let (answers, outbound) = mpsc::channel(ANSWERS_WAITING_MAX);
        let stream = Stream {
            stopping: core.watch_stopping(),
            facts: core.watch_facts(),
            core,
            branch: context.branch,
            watching,
            resets: 0,
            watches: BTreeMap::new(),
            in_step: Index::default(),
            told,
            next_id: 0,
            progress_asked: false,
            answers: answers.clone(),
        };
        tokio::spawn(async move {
            if let Err(End::Failed(status)) = stream.run(inbound, context.needs_leader).await {
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

/// Why a stream ends.
enum End {
    /// Nobody listens.
    Gone,
    /// The client is told.
    Failed(Status),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

struct OneWatch {
    start: Bytes,
    end: Option<Bytes>,
    /// First revision that it has not been told, while it is behind; the first that it wants, while it is in step.
    next: i64,
    behind: bool,
    no_puts: bool,
    no_deletes: bool,
    prev_kv: bool,
    fragment: bool,
    progress: bool,
    /// Something was sent since the last round of progress.
    busy: bool,
}

impl OneWatch {
    fn wants(&self, record: &RevRecord) -> bool {
        !(if record.deleted { self.no_deletes } else { self.no_puts })
    }

    fn covers(&self, key: &Bytes) -> bool {
        *key >= self.start && self.end.as_ref().is_none_or(|end| key < end)
    }

    fn single_key(&self) -> bool {
        // The successor of a key is the key and a zero byte.
        self.end
            .as_ref()
            .is_some_and(|end| end.len() == self.start.len() + 1 && end.starts_with(&self.start) && end.ends_with(&[0]))
    }
}

/// Watches in step by what they watch.
#[derive(Default)]
struct Index {
    keys: BTreeMap<Bytes, Vec<i64>>,
    ranges: Vec<i64>,
}

impl Index {
    fn insert(&mut self, id: i64, watch: &OneWatch) {
        if watch.single_key() {
            self.keys.entry(watch.start.clone()).or_default().push(id);
        } else {
            self.ranges.push(id);
        }
    }

    fn remove(&mut self, id: i64, watch: &OneWatch) {
        if !watch.single_key() {
            self.ranges.retain(|other| *other != id);
        } else if let Some(ids) = self.keys.get_mut(&watch.start) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.keys.remove(&watch.start);
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.ranges.is_empty()
    }
}

struct Stream<B: Backend> {
    core: Arc<Core<B>>,
    branch: BranchId,
    watching: Watching,
    resets: u64,
    watches: BTreeMap<i64, OneWatch>,
    in_step: Index,
    /// W1.
    told: i64,
    next_id: i64,
    /// The client asked how far the stream is, and some watch was behind.
    progress_asked: bool,
    answers: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    stopping: watch::Receiver<bool>,
    facts: watch::Receiver<Facts>,
}

impl<B: Backend> Stream<B> {
    async fn run(mut self, mut inbound: Streaming<pb::WatchRequest>, needs_leader: bool) -> Result<(), End> {
        let interval = self.core.settings.watch_progress_interval;
        let mut progress_at = Instant::now() + interval;
        let mut inbound_open = true;
        let mut leaderless: Option<Instant> = None;
        loop {
            self.deliver_recent().await?;
            let more = self.deliver_behind().await?;
            if self.progress_asked && self.watches.values().all(|watch| !watch.behind) {
                self.progress_asked = false;
                self.send(pb::WatchResponse {
                    header: self.core.header(self.told),
                    watch_id: NO_WATCH,
                    ..Default::default()
                })
                .await?;
            }
            if Instant::now() >= progress_at {
                progress_at = Instant::now() + interval;
                self.notify_progress().await?;
            }
            if needs_leader {
                let since = match self.facts.borrow_and_update().leader {
                    Some(_) => None,
                    None => Some(leaderless.unwrap_or_else(Instant::now)),
                };
                leaderless = since;
            }
            let no_leader_at = leaderless.map(|since| since + NO_LEADER_MAX);
            let wake = no_leader_at.map_or(progress_at, |at| at.min(progress_at));
            let message = tokio::select! {
                biased;
                message = inbound.next(), if inbound_open => message,
                // With more to read there is nothing to wait for.
                () = std::future::ready(()), if more => continue,
                () = self.watching.changed() => continue,
                changed = self.facts.changed(), if needs_leader => {
                    if changed.is_err() {
                        return Err(End::Failed(Refusal::Stopped.into()));
                    }
                    continue
                },
                _ = self.stopping.wait_for(|stopping| *stopping) => return Err(End::Failed(Refusal::Stopped.into())),
                () = self.answers.closed() => return Err(End::Gone),
                () = tokio::time::sleep_until(wake) => {
                    if no_leader_at.is_some_and(|at| at <= Instant::now()) {
                        return Err(End::Failed(Refusal::NoLeader.into()));
                    }
                    continue
                },
            };
            match message {
                Some(Ok(request)) => self.hear(request).await?,
                // The client is gone, or has gone wrong: whatever it is, nobody reads on.
                Some(Err(_)) => return Err(End::Gone),
                // The client said all that it has to say, and may still listen.
                None => inbound_open = false,
            }
        }
    }

    async fn send(&self, answer: pb::WatchResponse) -> Result<(), End> {
        self.answers.send(Ok(answer)).await.map_err(|_| End::Gone)
    }

    async fn view(&self) -> Result<View<B::Reader>, End> {
        Ok(self.core.view(self.branch).await?)
    }

    async fn hear(&mut self, request: pb::WatchRequest) -> Result<(), End> {
        use pb::watch_request::RequestUnion;
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create).await,
            Some(RequestUnion::CancelRequest(cancel)) => {
                let Some(watch) = self.watches.remove(&cancel.watch_id) else { return Ok(()) };
                if !watch.behind {
                    self.in_step.remove(cancel.watch_id, &watch);
                }
                let header = self.core.header(self.told);
                self.send(pb::WatchResponse { header, watch_id: cancel.watch_id, canceled: true, ..Default::default() })
                    .await
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                self.progress_asked = true;
                Ok(())
            }
            None => Ok(()),
        }
    }

    async fn create(&mut self, create: pb::WatchCreateRequest) -> Result<(), End> {
        let tip = self.view().await?.tip();
        let mut answer = pb::WatchResponse {
            header: self.core.header(tip.revision),
            watch_id: NO_WATCH,
            created: true,
            ..Default::default()
        };
        let key = if create.key.is_empty() { Bytes::from_static(&[0]) } else { create.key };
        let empty = !create.range_end.is_empty() && !is_from_key(&create.range_end) && create.range_end <= key;
        let refusal = if create.start_revision < 0 {
            Some(Refusal::Compacted.message())
        } else if empty {
            Some("mvcc: watcher range is empty")
        } else if create.watch_id != 0 && self.watches.contains_key(&create.watch_id) {
            Some("mvcc: duplicate watch ID provided on the WatchStream")
        } else if self.watches.len() >= WATCHES_MAX {
            Some(Refusal::TooManyRequests.message())
        } else {
            None
        };
        if let Some(refusal) = refusal {
            answer.canceled = true;
            answer.cancel_reason = refusal.to_owned();
            return self.send(answer).await;
        }
        let mut id = create.watch_id;
        if id == 0 {
            while self.watches.contains_key(&self.next_id) {
                self.next_id += 1;
            }
            id = self.next_id;
            self.next_id += 1;
        }
        let (start, end) = range_of(&key, &create.range_end);
        let next = if create.start_revision == 0 { tip.revision + 1 } else { create.start_revision };
        let watch = OneWatch {
            start,
            end,
            next,
            behind: next <= self.told,
            no_puts: create.filters.contains(&(FilterType::Noput as i32)),
            no_deletes: create.filters.contains(&(FilterType::Nodelete as i32)),
            prev_kv: create.prev_kv,
            fragment: create.fragment,
            progress: create.progress_notify,
            busy: false,
        };
        if !watch.behind {
            self.in_step.insert(id, &watch);
        }
        self.watches.insert(id, watch);
        answer.watch_id = id;
        self.send(answer).await
    }

    /// Tells the watches in step what the ring has.
    async fn deliver_recent(&mut self) -> Result<(), End> {
        loop {
            let published = self.watching.published();
            if published.resets != self.resets {
                self.resets = published.resets;
                self.fall_behind().await?;
            }
            if published.revision <= self.told {
                return Ok(());
            }
            if self.in_step.is_empty() {
                self.told = published.revision;
                return Ok(());
            }
            match self.watching.branch().recent(self.told + 1, RECENT_REVISIONS) {
                Some(recent) => {
                    let Some(last) = recent.last() else { return Ok(()) };
                    let upto = last.revision;
                    self.tell_in_step(&recent).await?;
                    self.told = upto;
                }
                None => self.fall_behind().await?,
            }
        }
    }

    /// The ring does not have what comes next: all read the store until they are in step again.
    async fn fall_behind(&mut self) -> Result<(), End> {
        let tip = self.view().await?.tip();
        for watch in self.watches.values_mut().filter(|watch| !watch.behind) {
            watch.next = watch.next.max(self.told + 1);
            watch.behind = true;
        }
        self.in_step = Index::default();
        self.told = self.told.max(tip.revision);
        self.step_in();
        Ok(())
    }

    /// Puts watches in step that have been told everything up to `told`.
    fn step_in(&mut self) {
        for (id, watch) in self.watches.iter_mut().filter(|(_, watch)| watch.behind) {
            if watch.next > self.told {
                watch.behind = false;
                self.in_step.insert(*id, watch);
            }
        }
    }

    async fn tell_in_step(&mut self, recent: &[Arc<Changes>]) -> Result<(), End> {
        let mut found: BTreeMap<i64, Vec<&Change>> = BTreeMap::new();
        for change in recent.iter().flat_map(|changes| &changes.changes) {
            let exact = self.in_step.keys.get(&change.record.key).into_iter().flatten();
            for id in exact.chain(&self.in_step.ranges) {
                let Some(watch) = self.watches.get(id) else { continue };
                if watch.next <= change.rev.main && watch.wants(&change.record) && watch.covers(&change.record.key) {
                    found.entry(*id).or_default().push(change);
                }
            }
        }
        let upto = recent.last().map_or(self.told, |last| last.revision);
        for (id, changes) in found {
            self.tell(id, changes.into_iter().map(|change| (change.rev, &change.record)), upto).await?;
        }
        Ok(())
    }

    /// Tells the watches behind a portion from the store. True if there is more to tell at once.
    async fn deliver_behind(&mut self) -> Result<bool, End> {
        if self.watches.values().all(|watch| !watch.behind) {
            return Ok(false);
        }
        let view = self.view().await?;
        let tip = view.tip();
        let compacted = tip.compaction.revision;
        let late: Vec<i64> = self
            .watches
            .iter()
            .filter(|(_, watch)| watch.behind && watch.next < compacted)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            self.watches.remove(&id);
            self.send(pb::WatchResponse {
                header: self.core.header(tip.revision),
                watch_id: id,
                canceled: true,
                compact_revision: compacted,
                ..Default::default()
            })
            .await?;
        }
        let Some(from) = self.watches.values().filter(|watch| watch.behind).map(|watch| watch.next).min() else {
            return Ok(false);
        };
        let (records, upto) = read_portion(&view, from, tip.revision).await.map_err(End::Failed)?;
        let behind: Vec<i64> =
            self.watches.iter().filter(|(_, watch)| watch.behind && watch.next <= upto).map(|(id, _)| *id).collect();
        for id in behind {
            let Some(watch) = self.watches.get(&id) else { continue };
            let wanted: Vec<(Rev, &RevRecord)> = records
                .iter()
                .filter(|(rev, record)| rev.main >= watch.next && watch.wants(record) && watch.covers(&record.key))
                .map(|(rev, record)| (*rev, record))
                .collect();
            if !wanted.is_empty() {
                self.tell(id, wanted.into_iter(), upto).await?;
            }
            if let Some(watch) = self.watches.get_mut(&id) {
                watch.next = upto + 1;
            }
        }
        self.step_in();
        Ok(self.watches.values().any(|watch| watch.behind))
    }

    /// Sends changes to a watch that has then been told everything up to `upto`.
    async fn tell<'a>(
        &mut self,
        id: i64,
        changes: impl Iterator<Item = (Rev, &'a RevRecord)>,
        upto: i64,
    ) -> Result<(), End> {
        let Some(watch) = self.watches.get_mut(&id) else { return Ok(()) };
        watch.busy = true;
        let (prev_kv, fragment) = (watch.prev_kv, watch.fragment);
        let limit = self.core.settings.request_bytes_max;
        let mut view: Option<View<B::Reader>> = None;
        let mut answer = pb::WatchResponse { watch_id: id, ..Default::default() };
        let mut bytes = 0_usize;
        let mut last = 0_i64;
        for (rev, record) in changes {
            let mut event = event_of(rev, record);
            if prev_kv {
                if view.is_none() {
                    view = Some(self.core.view(self.branch).await?);
                }
                if let Some(view) = &view {
                    event.prev_kv = previous(view, rev, record).await.map_err(End::Failed)?;
                }
            }
            let size = event.encoded_len();
            // W3: an answer ends with a revision, or is a fragment.
            let between = rev.main != last && bytes.saturating_add(size) > ANSWER_BYTES;
            let within = fragment && rev.main == last && bytes.saturating_add(size) > limit;
            if !answer.events.is_empty() && (between || within) {
                let events = std::mem::take(&mut answer.events);
                let header = self.core.header(last);
                self.send(pb::WatchResponse { header, watch_id: id, fragment: within, events, ..Default::default() })
                    .await?;
                bytes = 0;
            }
            bytes = bytes.saturating_add(size);
            last = rev.main;
            answer.events.push(event);
        }
        if !answer.events.is_empty() {
            answer.header = self.core.header(upto);
            self.send(answer).await?;
        }
        Ok(())
    }

    /// Tells quiet watches in step how far they are.
    async fn notify_progress(&mut self) -> Result<(), End> {
        let header = self.core.header(self.told);
        let mut quiet = Vec::new();
        for (id, watch) in &mut self.watches {
            if watch.progress && !watch.behind && !std::mem::take(&mut watch.busy) {
                quiet.push(*id);
            }
        }
        for id in quiet {
            self.send(pb::WatchResponse { header, watch_id: id, ..Default::default() }).await?;
        }
        Ok(())
    }
}

/// Whole revisions from `from` on, and the revision up to which they are all.
async fn read_portion<R: super::model::store::Reader>(
    view: &View<R>,
    from: i64,
    tip: i64,
) -> Result<(Vec<(Rev, RevRecord)>, i64), Status> {
    let mut records: Vec<(Rev, RevRecord)> = Vec::new();
    let mut next = Rev::first(from);
    let mut bytes = 0_usize;
    loop {
        let page = view.changes(next, BEHIND_PAGE).await.map_err(|error| status_of(&error.into()))?;
        let ended = page.len() < BEHIND_PAGE;
        bytes = bytes.saturating_add(page.iter().map(|(_, record)| record.key.len() + record.value.len()).sum());
        records.extend(page);
        let Some((last, _)) = records.last() else { return Ok((records, tip)) };
        if ended {
            return Ok((records, tip));
        }
        let last = *last;
        next = Rev { main: last.main, sub: last.sub + 1 };
        if bytes >= BEHIND_BYTES || records.len() >= BEHIND_RECORDS {
            // The last revision may go on beyond the page.
            let whole = records.partition_point(|(rev, _)| rev.main < last.main);
            if whole > 0 {
                records.truncate(whole);
                return Ok((records, last.main - 1));
            }
        }
    }
}

fn event_of(rev: Rev, record: &RevRecord) -> Event {
    let kv = if record.deleted {
        KeyValue { key: record.key.clone(), mod_revision: rev.main, ..Default::default() }
    } else {
        record.clone().into_key_value(rev.main)
    };
    let kind = if record.deleted { EventType::Delete } else { EventType::Put };
    Event { r#type: kind as i32, kv: Some(kv), prev_kv: None }
}

/// The state before a change, if there was one and it can still be read.
async fn previous<R: super::model::store::Reader>(
    view: &View<R>,
    rev: Rev,
    record: &RevRecord,
) -> Result<Option<KeyValue>, Status> {
    if rev.main - 1 < view.tip().compaction.revision {
        return Ok(None);
    }
    let mut place = record.previous;
    while let Some(at) = place {
        let Some(found) = view.record(at).await.map_err(|error| status_of(&error.into()))? else { return Ok(None) };
        if at.main < rev.main {
            return Ok(Some(found.into_key_value(at.main)));
        }
        // Changed twice in one revision: what counts is the state before the revision.
        place = found.previous;
    }
    Ok(None)
}
