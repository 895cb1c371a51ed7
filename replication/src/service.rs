//! Answers the requests of peers.
//!
//! # Place
//! the [`Handler`] that a node gives to its transport
//! # Invariants
//! - V1. No request is served that comes under another cluster id, under other group settings, or under the id of a
//!   member with another incarnation than the membership names. A wiped volume never answers as the member it was.
//! - V2. Votes wait until a lease that this node may have granted before a restart is over.
//! - V3. While the ring is full, entries of a peer are refused here: what openraft has accepted it must hold in memory.
//! - V4. The appends of a peer's stream come to the core in the order in which they arrived. One that overtakes another
//!   is refused as a conflict and costs a round trip, never an entry.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{LogIndex, TableId};
use mainstay_io::BoxFuture;
use openraft::raft::AppendEntriesRequest;
use openraft_rt::Instant;
use tokio::sync::Notify;

use crate::groups::read_grouped;
use crate::heal::{read_digests, write_digests};
use crate::levels::Level;
use crate::liveness::read_pulse;
use crate::log_heal::{read_base, read_given, read_lost, read_wanted, write_base, write_given};
use crate::network::{
    OFFER_WAIT, method, read_append, read_await_snapshot, read_offer, read_transfer_request, read_vote_request,
    write_append_answer, write_installed, write_offer, write_transfer_response, write_vote_response,
};
use crate::node::{Inner, Running};
use crate::receipts::{Receipt, Remembered, read_receipt};
use crate::state_machine::{Exported, Offer, Peers, SnapshotHandle, TABLE_READ_BYTES_MAX};
use crate::turns::Turn;
use crate::types::{LeaderId, LogId, RaftSnapshot, Vote};
use crate::wire::{Reader, Writer, decode_result, encode_result};
use crate::{Envelope, Error, ErrorKind, Handler, Hello, NodeId, Result, Runtime};

/// The handler of a node; knows it weakly, since the node owns the transport that owns this.
pub(crate) struct Service<R: Runtime>(pub(crate) Weak<Inner<R>>);

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the node is closed")
}

/// How long a part of a table may take.
const TABLE_READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a member is asked for a snapshot before the next one is.
const OFFER_ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two looks whether the log is durable as far as a snapshot goes that is offered.
const DURABLE_PAUSE: Duration = Duration::from_millis(20);
/// How long a snapshot stays pinned for a receiver that reads none of its tables: some times what it waits for a part.
const PIN_IDLE: Duration = Duration::from_secs(60);

/// A snapshot on its way in: started by the first offer, joined by its repetitions.
pub(crate) struct InstallJob {
    vote: Vote,
    at: Option<LogId>,
    result: Mutex<Option<Result<Vote>>>,
    done: Notify,
}

impl InstallJob {
    /// Whether it brings what was offered under that vote up to `at`.
    fn is_of(&self, vote: &Vote, at: Option<LogId>) -> bool {
        self.vote == *vote && self.at >= at
    }

    fn result(&self) -> MutexGuard<'_, Option<Result<Vote>>> {
        self.result.lock().expect("nothing panics while it holds this lock")
    }
}

impl<R: Runtime> Handler for Service<R> {
    fn accept(&self, hello: &Hello) -> Result<()> {
        let inner = self.0.upgrade().ok_or_else(closed)?;
        inner.accept(hello)?;
        inner.note_address(hello);
        Ok(())
    }

    fn handle(&self, from: Hello, request: Envelope) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>> {
        let Some(inner) = self.0.upgrade() else { return Box::pin(async { Err(closed()) }) };
        if inner.host.is_none() {
            inner.liveness.hear(from.node.0);
        }
        if matches!(request.method, method::GROUPED | method::GROUPED_IN_TURN) {
            return inner.handle_grouped(from, request);
        }
        // Taken here, in the order of the connection, and not in the future, which runs beside others.
        let turn = (request.method == method::APPEND_IN_TURN).then(|| inner.turns.take(from.node.0));
        Box::pin(async move {
            inner.accept(&from)?;
            let method = request.method;
            let body = inner.serve(from, request, turn).await?;
            Ok(Envelope { method, body })
        })
    }
}

impl<R: Runtime> Inner<R> {
    /// Passes a request on to its group, at once: the order of the connection is that of each group.
    fn handle_grouped(&self, from: Hello, request: Envelope) -> BoxFuture<Result<Envelope>> {
        let group = read_grouped(&request.body).and_then(|(number, inside)| {
            let group = self.groups().get(&number).map(Arc::downgrade);
            let group = group.ok_or_else(|| Error::new(ErrorKind::Unavailable, "this group is not open here"))?;
            Ok(Service(group).handle(from, inside))
        });
        Box::pin(async move { Ok(Envelope { method: request.method, body: group?.await?.body }) })
    }

    fn accept(&self, hello: &Hello) -> Result<()> {
        if let Some(host) = self.host() {
            return host.accept(hello);
        }
        let mine = self.hello();
        let foreign = |what: &str| Error::new(ErrorKind::Foreign, format!("{what} name={}", hello.name));
        if hello.settings_fingerprint != mine.settings_fingerprint {
            return Err(foreign("a node with other settings of the group"));
        }
        if mainstay_io::mutant!(SameIdAfterWipe) {
            return Ok(());
        }
        let blank = [0; 16];
        if hello.cluster != blank && mine.cluster != blank && hello.cluster != mine.cluster {
            return Err(foreign("a node of another cluster"));
        }
        if hello.node == mine.node && hello.node != NodeId(0) && hello.incarnation != mine.incarnation {
            return Err(foreign("a node under the id of this one"));
        }
        if hello.node != NodeId(0)
            && let Some(member) = self.member(hello.node)
            && member.incarnation != hello.incarnation
        {
            return Err(foreign("a volume other than the one that was admitted under its id"));
        }
        Ok(())
    }

    async fn serve(self: &Arc<Self>, from: Hello, request: Envelope, turn: Option<Turn>) -> Result<Bytes> {
        let body = request.body;
        match request.method {
            method::APPEND | method::APPEND_IN_TURN => {
                let running = self.raft_peer(&from)?;
                let (request, durable) = read_append::<R>(&body)?;
                let LeaderId { term, voted_for } = request.vote.leader_id;
                if voted_for == from.node.0 {
                    // What a leader has made durable counts for what is committed, as a follower's acknowledgement does.
                    self.receipts.note(from.node.0, Receipt { term, last: durable });
                }
                *self.heard.lock().expect("nothing panics while it holds this lock") = Some(R::Instant::now());
                let mut turn = turn;
                if let Some(turn) = &mut turn {
                    turn.wait().await;
                }
                if self.log.is_stalled() && !request.entries.is_empty() {
                    return Err(Error::new(ErrorKind::Unavailable, "the ring of the log is full"));
                }
                if !request.entries.is_empty() {
                    // The log's queue has no bound of its own: a peer that sends faster than the disk writes waits.
                    self.engine.wal().admit().await.map_err(mainstay_engine::Error::from)?;
                }
                let mut append = std::pin::pin!(running.raft.append_entries(request));
                // The first poll queues it in the core; then the next one may come (V4).
                let answer = match futures_util::poll!(append.as_mut()) {
                    Poll::Ready(answer) => answer,
                    Poll::Pending => {
                        drop(turn);
                        append.await
                    }
                };
                let answer = answer.map(|answer| (answer, self.own_room())).map_err(|e| raft_error(&e));
                Ok(encode_result(answer, write_append_answer::<R>))
            }
            method::VOTE | method::PRE_VOTE => {
                let running = self.raft_peer(&from)?;
                let vote = read_vote_request::<R>(&body)?;
                if R::Instant::now() < running.votes_from && !vote.leadership_transfer {
                    return Err(Error::new(ErrorKind::Unavailable, "restarted a moment ago: no vote yet"));
                }
                if !vote.leadership_transfer && self.stands_by_leader(&running) {
                    return Err(Error::new(ErrorKind::Unavailable, "the leader of this group is well: no vote"));
                }
                let answer = if request.method == method::VOTE {
                    running.raft.vote(vote).await
                } else {
                    running.raft.pre_vote(vote).await
                };
                Ok(encode_result(answer.map_err(|e| raft_error(&e)), |w, a| write_vote_response::<R>(w, &a)))
            }
            method::TRANSFER => {
                let running = self.raft_peer(&from)?;
                let transfer = read_transfer_request::<R>(&body)?;
                if *transfer.to_node_id() == running.id {
                    *self.asked_to_lead.lock().expect("nothing panics while it holds this lock") =
                        Some(R::Instant::now());
                }
                let answer = running.raft.handle_transfer_leader(transfer).await.map_err(|e| raft_error(&e));
                Ok(encode_result(answer, |w, a| write_transfer_response::<R>(w, &a)))
            }
            method::SNAPSHOT => {
                let running = self.raft_peer(&from)?;
                let mut reader = Reader::open(&body)?;
                let vote = reader.vote()?;
                let offer = read_offer(&mut reader)?;
                reader.end()?;
                // It may have become a member behind the end of the log here.
                *self.offered_by.lock().expect("nothing panics while it holds this lock") =
                    Some((from.node, from.peer_address));
                let answer = match self.take_offer(&running, vote, offer) {
                    Ok(install) => self.wait_for(install).await,
                    Err(error) => Err(error),
                };
                Ok(encode_result(answer, write_installed))
            }
            method::AWAIT_SNAPSHOT => {
                self.raft_peer(&from)?;
                let (vote, at) = read_await_snapshot(&body)?;
                let answer = match self.install_of(&vote, at) {
                    Some(install) => self.wait_for(install).await,
                    // This process has forgotten it.
                    None => Err(Error::new(ErrorKind::Unavailable, "no such snapshot is being installed")),
                };
                Ok(encode_result(answer, write_installed))
            }
            method::TABLE_READ => {
                self.cluster_peer(&from)?;
                let mut reader = Reader::open(&body)?;
                let id = reader.table_id()?;
                let offset = reader.u64()?;
                let length = reader.u64()?.min(TABLE_READ_BYTES_MAX);
                reader.end()?;
                if let Some(pinned) = self.pinned().get_mut(&from.node.0) {
                    pinned.read = R::Instant::now();
                }
                let read = self.group.read_table(id, offset, length).await.map_err(|error| match error.kind() {
                    // Who asks tells a damaged copy from a member that does not answer.
                    ErrorKind::Io => Error::new(ErrorKind::Io, error.to_string()),
                    _ => error.into(),
                });
                Ok(encode_result(read, |w, bytes| {
                    w.bytes(&bytes);
                }))
            }
            method::LOG_GIVE => {
                self.cluster_peer(&from)?;
                let (first, last, anchor) = read_lost(&body)?;
                let committed = self.committed();
                let given = self.log.give(first, last, anchor, committed).await;
                let given = given.map_err(|e| Error::new(ErrorKind::Unavailable, e.to_string()));
                Ok(encode_result(given, |w, given| write_given(w, &given)))
            }
            method::LOG_BASE => {
                self.cluster_peer(&from)?;
                let (index, known) = read_wanted(&body)?;
                Ok(encode_result(Ok(self.log.base_for(index, known)), |w, base| write_base(w, base.as_ref())))
            }
            method::RECEIPT => {
                self.cluster_peer(&from)?;
                Ok(encode_result(Ok(self.remembered(from.node.0)), |w, remembered| remembered.write(w)))
            }
            method::DENIED => {
                self.raft_peer(&from)?;
                let receipt = read_receipt(&body)?;
                Ok(encode_result(Ok(self.told_of(receipt).await), |w, denied| {
                    w.bool(denied);
                }))
            }
            method::DIGESTS => {
                self.cluster_peer(&from)?;
                let mut reader = Reader::open(&body)?;
                let job = mainstay_engine::JobId(reader.u64()?);
                reader.end()?;
                Ok(encode_result(Ok(self.group.output_digests(job)), write_digests))
            }
            method::DISK => {
                self.cluster_peer(&from)?;
                // Who asks looks for one to lead: a node that takes no part yet, or stands aside, does not offer itself.
                self.running()?;
                if self.group.is_diverged() {
                    return Err(Error::new(ErrorKind::Unavailable, "this replica mends its tables and leads nobody"));
                }
                Ok(encode_result(Ok(self.disk_health()), |w, health| health.write(w)))
            }
            method::BIRTHS => {
                self.cluster_peer(&from)?;
                Ok(encode_result(self.known_births(), |w, births| births.write(w)))
            }
            method::LOG_ENDS => {
                self.cluster_peer(&from)?;
                Ok(encode_result(Ok(self.ends()), |w, ends| ends.write(w)))
            }
            method::OFFER | method::OFFER_OF_ANY => {
                let running = self.raft_peer(&from)?;
                let answer = if request.method == method::OFFER && self.leader_of(&running) != Some(running.id) {
                    Err(self.not_leader(&running))
                } else {
                    self.make_offer(&running, from.node).await
                };
                Ok(encode_result(answer, |w, offer| write_offer(w, &offer)))
            }
            method::WRITE => {
                self.cluster_peer(&from)?;
                let mut reader = Reader::open(&body)?;
                let command = reader.bytes()?;
                reader.end()?;
                let answer = self.propose(command, true).await;
                Ok(encode_result(answer, |w, applied| {
                    w.applied(&applied);
                }))
            }
            method::READ_INDEX => {
                self.cluster_peer(&from)?;
                let mut reader = Reader::open(&body)?;
                let lease = reader.bool()?;
                reader.end()?;
                let answer = self.leader_read_index(lease).await;
                Ok(encode_result(answer, |w, index| {
                    w.u64(index.0);
                }))
            }
            method::AWAIT_LEVEL => {
                self.cluster_peer(&from)?;
                let mut reader = Reader::open(&body)?;
                let index = LogIndex(reader.u64()?);
                let level = Level::read(&mut reader)?;
                reader.end()?;
                let answer = self.serve_level(index, &level).await;
                Ok(encode_result(answer, |_, ()| ()))
            }
            method::FORWARD => {
                self.cluster_peer(&from)?;
                let mut reader = Reader::open(&body)?;
                let request = reader.bytes()?;
                reader.end()?;
                let answer = self.answer_forwarded(request).await;
                Ok(encode_result(answer, |w, bytes| {
                    w.bytes(&bytes);
                }))
            }
            method::PREPARE => {
                let mut reader = Reader::open(&body)?;
                let cluster = reader.id()?;
                reader.end()?;
                let answer = self.prepare(from.incarnation, cluster);
                Ok(encode_result(answer, |w, prepared| prepared.write(w)))
            }
            method::ADOPT => {
                let mut reader = Reader::open(&body)?;
                let cluster = reader.id()?;
                let node = reader.u64()?;
                let incarnation = reader.id()?;
                reader.end()?;
                let answer = self.serve_adopt(&from, cluster, node, incarnation).await;
                Ok(encode_result(answer, |_, ()| ()))
            }
            method::JOIN => {
                let mut reader = Reader::open(&body)?;
                let member = reader.member()?;
                let forwarded = reader.bool()?;
                reader.end()?;
                let answer = self.serve_join(member, forwarded).await;
                Ok(encode_result(answer, |w, (cluster, node)| {
                    w.id(&cluster).u64(node);
                }))
            }
            method::MEMBER => {
                self.cluster_peer(&from)?;
                let answer = self.serve_member_change(&body).await;
                Ok(encode_result(answer, |w, info| {
                    w.member_infos(&info);
                }))
            }
            method::PULSE => {
                self.cluster_peer(&from)?;
                self.take_pulse(from.node.0, read_pulse(&body)?);
                Ok(encode_result(Ok(self.pulse()), |w, pulse| pulse.write(w)))
            }
            method::WHO => {
                let answer = self.who(&from).await;
                Ok(encode_result(answer, |w, who| who.write(w)))
            }
            method::VERSION => Ok(encode_result(Ok(crate::CLUSTER_VERSION_MAX), |w, version| {
                w.u16(version);
            })),
            other => Err(Error::new(ErrorKind::Unsupported, format!("no such request method={other}"))),
        }
    }

    /// Only nodes of this cluster speak Raft, and only one whose id was not given up.
    fn raft_peer(&self, from: &Hello) -> Result<Arc<Running<R>>> {
        self.cluster_peer(from)?;
        if self.was_removed(from.node) {
            return Err(Error::new(ErrorKind::Foreign, format!("a node that was removed id={}", from.node)));
        }
        self.running()
    }

    fn cluster_peer(&self, from: &Hello) -> Result<()> {
        if from.cluster != self.engine.identity().cluster || from.node == NodeId(0) {
            return Err(Error::new(ErrorKind::Unavailable, "not of one cluster yet"));
        }
        Ok(())
    }

    /// Starts to install an offered snapshot, or finds the install at work.
    fn take_offer(self: &Arc<Self>, running: &Arc<Running<R>>, vote: Vote, offer: Offer) -> Result<Arc<InstallJob>> {
        let at = offer.meta.last_log_id;
        let mut install = self.install();
        match &*install {
            Some(job) if job.is_of(&vote, at) => Ok(job.clone()),
            Some(job) if job.result().is_none() => {
                Err(Error::new(ErrorKind::Unavailable, "another snapshot is being installed"))
            }
            _ => {
                let job = Arc::new(InstallJob { vote, at, result: Mutex::new(None), done: Notify::new() });
                *install = Some(job.clone());
                let (this, running, mine) = (self.clone(), running.clone(), job.clone());
                self.spawn(async move {
                    let result = this.install_offered(&running, vote, offer).await;
                    *mine.result() = Some(result);
                    mine.done.notify_waiters();
                });
                Ok(job)
            }
        }
    }

    async fn install_offered(self: &Arc<Self>, running: &Arc<Running<R>>, vote: Vote, offer: Offer) -> Result<Vote> {
        let at = offer.meta.last_log_id;
        // openraft answers at once for what it knows to be committed, though it may not be durable here: the sender would count
        // on entries that a power cut takes.
        while at.is_some_and(|at| self.log.is_on_its_way(at.index)) {
            R::sleep(DURABLE_PAUSE).await;
        }
        let data = SnapshotHandle::Remote { manifest: offer.manifest, from: offer.from };
        let snapshot = RaftSnapshot { meta: offer.meta, snapshot: data };
        // openraft would take the end of the snapshot for that of a log that goes on behind it.
        if at.is_some_and(|at| self.log.holds(&vote, at)) {
            return Ok(vote);
        }
        if let Some(at) = at
            && let Some(index) = self.log.denied_by(at)
        {
            self.drop_denied(running, vote, at, index).await;
        }
        let result = running.raft.install_full_snapshot(vote, snapshot).await;
        result.map(|r| r.vote).map_err(|e| raft_error(&e))
    }

    fn install(&self) -> MutexGuard<'_, Option<Arc<InstallJob>>> {
        self.install.lock().expect("nothing panics while it holds this lock")
    }

    /// The install of that snapshot, if it is at work or was a moment ago.
    fn install_of(&self, vote: &Vote, at: Option<LogId>) -> Option<Arc<InstallJob>> {
        self.install().clone().filter(|job| job.is_of(vote, at))
    }

    /// What an install has come to; `None` while it goes on.
    async fn wait_for(&self, job: Arc<InstallJob>) -> Result<Option<Vote>> {
        let mut done = std::pin::pin!(job.done.notified());
        done.as_mut().enable();
        if job.result().is_none() {
            let pause = std::pin::pin!(R::sleep(OFFER_WAIT));
            let _ = R::select2(done, pause).await;
        }
        let result = job.result().clone();
        if result.is_some() {
            let mut install = self.install();
            if install.as_ref().is_some_and(|i| Arc::ptr_eq(i, &job)) {
                *install = None;
            }
        }
        result.transpose()
    }

    /// Drops the entries from `index` on, of a later term than that of the snapshot which goes beyond them: the leader with this
    /// vote holds none of them. openraft compares the two logs at the end of the snapshot alone, where this one has nothing.
    async fn drop_denied(&self, running: &Arc<Running<R>>, vote: Vote, at: LogId, index: u64) {
        let prev_log_id = Some(LogId::new(*at.committed_leader_id(), index));
        let append = AppendEntriesRequest { vote, prev_log_id, entries: Vec::new(), leader_commit: None };
        // Refused as a conflict: the entries go with that. If the vote is refused, the snapshot will be too.
        let answer = running.raft.append_entries(append).await;
        tracing::info!(index, ?answer, "entries of a leader that was none make way for a snapshot");
    }

    /// A snapshot of this node for a peer whose install lost its source; pinned while the peer reads on. What is in tables is
    /// committed, whoever leads.
    async fn make_offer(self: &Arc<Self>, running: &Arc<Running<R>>, to: NodeId) -> Result<Offer> {
        self.check_holds_data()?;
        if self.group.is_diverged() {
            return Err(Error::new(ErrorKind::Unavailable, "this replica mends its tables"));
        }
        let snapshot = running.raft.get_snapshot().await.map_err(|e| raft_error(&e))?;
        let Some(RaftSnapshot { meta, snapshot: SnapshotHandle::Local(export) }) = snapshot else {
            return Err(Error::new(ErrorKind::Unavailable, "there is no snapshot yet"));
        };
        let manifest = export.manifest.clone();
        self.pinned().insert(to.0, Pinned { _export: export, read: R::Instant::now() });
        Ok(Offer { meta, manifest, from: running.id })
    }

    fn pinned(&self) -> MutexGuard<'_, BTreeMap<u64, Pinned<R>>> {
        self.pinned.lock().expect("nothing panics while it holds this lock")
    }

    /// Gives up the snapshots whose receivers have stopped to read them.
    pub(crate) fn unpin_idle(&self) {
        self.pinned().retain(|_, pinned| pinned.read.elapsed() < PIN_IDLE);
    }
}

/// A snapshot that a receiver asked for.
pub(crate) struct Pinned<R: Runtime> {
    _export: Exported,
    /// When it last read a table.
    read: R::Instant,
}

/// What openraft says to one who asks a node that stopped or lost its disk.
pub(crate) fn raft_error(error: &impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unavailable, format!("raft does not answer: {error}"))
}

/// Where an install gets what it lacks.
pub(crate) struct NodePeers<R: Runtime>(pub(crate) Weak<Inner<R>>);

impl<R: Runtime> Peers for NodePeers<R> {
    fn read_table(&self, from: u64, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        let inner = self.0.upgrade();
        Box::pin(async move {
            let inner = inner.ok_or_else(closed)?;
            let mut body = Writer::new();
            body.table_id(id).u64(offset).u64(length);
            let answer = inner.call_member(NodeId(from), method::TABLE_READ, body.finish(), TABLE_READ_TIMEOUT).await?;
            let bytes = decode_result(&answer, Reader::bytes)?;
            inner.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            Ok(bytes)
        })
    }

    /// Of the leader first: its own is the newest.
    fn offer(&self, least: Option<LogId>) -> BoxFuture<Result<Offer>> {
        let inner = self.0.upgrade();
        Box::pin(async move {
            let inner = inner.ok_or_else(closed)?;
            let running = inner.running()?;
            let leader = inner.leader_of(&running);
            let others = inner.members().into_iter().map(|m| m.id.0).filter(|id| Some(*id) != leader);
            let mut last = Error::new(ErrorKind::Unavailable, "no other member is known");
            for id in leader.into_iter().chain(others).filter(|id| *id != running.id) {
                let call =
                    inner.call_member(NodeId(id), method::OFFER_OF_ANY, Writer::new().finish(), OFFER_ASK_TIMEOUT);
                match call.await.and_then(|answer| decode_result(&answer, read_offer)) {
                    Ok(offer) if offer.meta.last_log_id >= least => return Ok(offer),
                    Ok(offer) => {
                        let message = format!("the snapshot of a member is too old id={id} meta={}", offer.meta);
                        last = Error::new(ErrorKind::Unavailable, message);
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        })
    }

    fn awaited(&self) -> Option<LogId> {
        let job = self.0.upgrade()?.install().clone()?;
        let waits = job.result().is_none();
        job.at.filter(|_| waits)
    }

    fn is_closing(&self) -> bool {
        self.0.upgrade().is_none_or(|inner| inner.closing.is_set())
    }
}

/// Decodes arbitrary bytes as every request and answer, for the fuzzer.
pub(crate) fn decode_any(bytes: &Bytes) {
    type R = crate::TokioRuntime;
    let _ = read_append::<R>(bytes);
    let _ = read_vote_request::<R>(bytes);
    let _ = read_transfer_request::<R>(bytes);
    let _ = read_await_snapshot(bytes);
    let _ = decode_result(bytes, read_offer);
    let _ = decode_result(bytes, Level::read);
    let _ = decode_result(bytes, crate::DiskHealth::read);
    let _ = decode_result(bytes, read_given);
    let _ = decode_result(bytes, read_digests);
    let _ = read_lost(bytes);
    let _ = read_grouped(bytes);
    let _ = read_pulse(bytes);
    let _ = read_wanted(bytes);
    let _ = read_receipt(bytes);
    let _ = decode_result(bytes, Remembered::read);
    let _ = decode_result(bytes, read_base);
    let _ = decode_result(bytes, crate::log_heal::Ends::read);
    let _ = decode_result(bytes, Reader::applied);
    let _ = decode_result(bytes, Reader::member_infos);
    let _ = decode_result(bytes, crate::init::Prepared::read);
    let _ = decode_result(bytes, crate::membership::Who::read);
    crate::network::decode_any::<R>(bytes);
    crate::membership::decode_any(bytes);
}
