//! Proposals: on the leader to openraft, elsewhere to the leader.
//!
//! # Invariants
//! - R1. An answer `Unavailable` or `NotLeader` means that no entry was appended for this command by anybody; anything
//!   else that is not the result is `Indeterminate`.
//! - R2. An empty `ForwardToLeader` means "try again here" (pitfall 4): a leader refuses until a quorum has acknowledged
//!   it, for some milliseconds after each election. Retries end at [`WRITE_TIMEOUT`].
//! - R3. A command crosses the network once at most: whom the leader's name turns out to be wrong says so.
//! - R4. `Durability::Local` has a function and a receipt of its own (pitfall 15), so that nobody takes a write that may
//!   vanish for one that may not. Durability beyond the quorum waits after the commit and is never part of it (pitfall
//!   13): a site that is away must not keep the cluster from changing its members.
//! - R5. A request with a client token may be proposed again when its fate is unknown: the state decides whether it was
//!   applied before.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use mainstay_engine::{Applied, ClientToken, Command, CommandBody};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::ClientWriteResponse;
use openraft_rt::Instant;

use crate::levels::Level;
use crate::network::method;
use crate::node::{Inner, Running, Write};
use crate::types::{LocalWaiter, Payload, TypeConfig};
use crate::wire::{Reader, Writer, decode_result};
use crate::{CommitToken, Durability, Envelope, Error, ErrorKind, NodeId, Result, Runtime};

/// How long a write looks for a leader, and then waits for its commit.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a write that came from another node, which waits for the answer.
pub(crate) const FORWARDED_TIMEOUT: Duration = Duration::from_secs(8);
/// How long the request of a client token is proposed again while its fate is unknown.
const ONCE_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause before a write that met no leader tries again.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Bytes of a command before its batches, at most.
const COMMAND_HEAD_BYTES_MAX: usize = 32;
/// Writes at `Durability::Local` whose commit can still be waited for.
const LOCALS_MAX: usize = 1 << 16;

type LocalResult = Shared<BoxFuture<'static, Result<Applied>>>;

/// Writes answered at `Durability::Local`, until somebody waits for more; the oldest are forgotten.
#[derive(Default)]
pub(crate) struct Locals(Mutex<BTreeMap<CommitToken, LocalResult>>);

fn unsupported(durability: &Durability) -> Error {
    Error::new(ErrorKind::Unsupported, format!("durability is not supported here durability={durability:?}"))
}

type WriteError<R> = RaftError<TypeConfig<R>, ClientWriteError<TypeConfig<R>>>;

/// What became of one attempt.
enum Attempt {
    Done(Result<Applied>),
    /// Not appended; try where it says, or here again.
    Elsewhere(Option<u64>),
}

impl<R: Runtime> Inner<R> {
    /// The wall clock that stamps commands, milliseconds since the Unix epoch.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.options.environment.clock.unix().as_millis()).unwrap_or(u64::MAX)
    }

    fn encode(&self, body: CommandBody) -> Result<Bytes> {
        let bytes = Command { time_ms: self.now_ms(), body }.encode()?;
        self.check_length(bytes.len())?;
        Ok(bytes)
    }

    /// Bytes of a command without its head that a record of this log can hold: a small ring has small records.
    pub(crate) fn command_bytes_max(&self) -> usize {
        let max = self.engine.wal().record_bytes_max().saturating_sub(crate::record::ENTRY_HEADER_BYTES);
        max.saturating_sub(COMMAND_HEAD_BYTES_MAX)
    }

    /// Refuses what no record of the log can hold. `bytes` may lack the head of a command, which the limit leaves room
    /// for.
    pub(crate) fn check_length(&self, bytes: usize) -> Result<()> {
        let max = self.command_bytes_max();
        if bytes > max {
            let message = format!("the command is too long for the log bytes={bytes} max={max}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(())
    }

    pub(crate) async fn write(self: &Arc<Self>, write: Write) -> Result<Applied> {
        let level = Level::of(&write.durability);
        match (&write.durability, &level) {
            (Durability::Quorum, _) => {}
            (_, Some(level)) => self.check_level(level)?,
            _ => return Err(unsupported(&write.durability)),
        }
        let applied = match write.body {
            CommandBody::Batch(batch) => self.write_batch(batch.encode()?).await?,
            CommandBody::BatchIf(batch) => self.write_batch(batch.encode()?).await?,
            body => {
                self.check_version(&body).await?;
                self.propose(self.encode(body)?, false).await?
            }
        };
        // What was refused at apply has changed nothing that could be lost.
        if let (Some(level), Ok(_)) = (&level, &applied.response) {
            self.await_level(applied.index, level).boxed().await?;
        }
        Ok(applied)
    }

    /// Proposes an encoded command here or, unless it was forwarded already, at the leader.
    pub(crate) async fn propose(self: &Arc<Self>, command: Bytes, forwarded: bool) -> Result<Applied> {
        let deadline = R::Instant::now() + if forwarded { FORWARDED_TIMEOUT } else { WRITE_TIMEOUT };
        loop {
            let running = self.running()?;
            let attempt = match self.leader_of(&running) {
                Some(id) if id == running.id => self.propose_here(&running, command.clone(), deadline).await,
                other => Attempt::Elsewhere(other),
            };
            let leader = match attempt {
                Attempt::Done(result) => return result,
                Attempt::Elsewhere(leader) => leader.filter(|id| *id != running.id),
            };
            if let Some(leader) = leader {
                if forwarded {
                    return Err(self.not_leader(&running));
                }
                let mut body = Writer::with_capacity(command.len() + 8);
                body.bytes(&command);
                let answer = self.call_member(NodeId(leader), method::WRITE, body.finish(), WRITE_TIMEOUT).await;
                match answer.and_then(|bytes| decode_result(&bytes, Reader::applied)) {
                    Err(e) if mainstay_io::mutant!(RetryForwarded) && e.kind() == ErrorKind::Indeterminate => {}
                    // Neither was applied: whoever leads now is asked.
                    Err(e) if matches!(e.kind(), ErrorKind::NotLeader | ErrorKind::Unavailable) => {
                        if R::Instant::now() + RETRY_PAUSE >= deadline {
                            return Err(e);
                        }
                    }
                    other => return other,
                }
            }
            if R::Instant::now() + RETRY_PAUSE >= deadline {
                return Err(Error::new(ErrorKind::Unavailable, "no leader with a quorum was found in time"));
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    async fn propose_here(&self, running: &Arc<Running<R>>, command: Bytes, deadline: R::Instant) -> Attempt {
        if self.is_witness() && !crate::room::makes_room(&command) {
            // It is giving leadership away.
            return Attempt::Elsewhere(None);
        }
        let _admitted = match R::timeout_at(deadline, self.admit_command(running, &command)).await {
            Ok(Ok(admitted)) => admitted,
            Ok(Err(error)) => return Attempt::Done(Err(error)),
            Err(_) => return Attempt::Done(Err(self.not_admitted(running, &command))),
        };
        self.awaken(running).await;
        let write = running.raft.client_write(Payload::new(command));
        match R::timeout_at(deadline, write).await {
            Ok(result) => classify(result),
            Err(_) => Attempt::Done(Err(Error::new(ErrorKind::Indeterminate, "the write was not committed in time"))),
        }
    }

    pub(crate) async fn write_local(self: &Arc<Self>, body: CommandBody) -> Result<CommitToken> {
        if matches!(body, CommandBody::BatchIf(_) | CommandBody::BatchesIf(_)) {
            // It is answered before it is applied, and only then known whether its conditions hold.
            let message =
                "a batch with conditions is not answered at this durability: write it at a quorum durability=Local";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let running = self.running()?;
        if self.leader_of(&running) != Some(running.id) || self.is_witness() {
            return Err(self.not_leader(&running));
        }
        self.check_version(&body).await?;
        let command = self.encode(body)?;
        let _admitted = match R::timeout(WRITE_TIMEOUT, self.admit_command(&running, &command)).await {
            Ok(admitted) => admitted?,
            Err(_) => return Err(self.not_admitted(&running, &command)),
        };
        self.awaken(&running).await;
        let (waiter, durable) = LocalWaiter::new();
        let payload = Payload { bytes: command, waiter: Some(waiter) };
        let raft = running.raft.clone();
        let committed: LocalResult = async move {
            match classify(raft.client_write(payload).await) {
                Attempt::Done(result) => result,
                Attempt::Elsewhere(_) => Err(Error::not_leader(None, "not the leader")),
            }
        }
        .boxed()
        .shared();
        // Runs on by itself: its entry is in the log whether somebody waits or not.
        self.spawn(committed.clone().map(|_| ()));
        let refused = committed.clone();
        let deadline = std::pin::pin!(R::sleep(WRITE_TIMEOUT));
        match R::select3(durable, refused, deadline).await {
            openraft_rt::Select3::First(Ok(token)) => {
                self.keep_receipt(token, committed);
                Ok(token)
            }
            openraft_rt::Select3::Second(Err(error)) => Err(error),
            openraft_rt::Select3::Second(Ok(applied)) => {
                // Committed by the others before this disk was done; that is more than was asked for.
                let term = Self::metrics_of(&running, |m| m.current_term);
                let token = CommitToken { term, index: applied.index };
                self.keep_receipt(token, committed);
                Ok(token)
            }
            openraft_rt::Select3::First(Err(_)) | openraft_rt::Select3::Third(()) => {
                Err(Error::new(ErrorKind::Indeterminate, "the write was not durable in time"))
            }
        }
    }

    /// Remembers what a receipt stands for, the newest [`LOCALS_MAX`] of them.
    fn keep_receipt(&self, token: CommitToken, committed: LocalResult) {
        let mut locals = self.locals.0.lock().expect("nothing panics while it holds this lock");
        while locals.len() >= LOCALS_MAX {
            locals.pop_first();
        }
        locals.insert(token, committed);
    }

    pub(crate) async fn wait(self: &Arc<Self>, token: CommitToken, durability: Durability) -> Result<Applied> {
        let level = Level::of(&durability);
        match (&durability, &level) {
            (Durability::Local | Durability::Quorum, _) => {}
            (_, Some(level)) => self.check_level(level)?,
            _ => return Err(unsupported(&durability)),
        }
        let applied = if token.term == 0 {
            Applied { index: token.index, response: Ok(Bytes::new()) }
        } else {
            self.wait_committed(token).await?
        };
        if let Some(level) = &level {
            self.await_level(applied.index, level).boxed().await?;
        }
        Ok(applied)
    }

    /// Proposes the request of a token until it is known to be applied, or until the time is over (R5).
    pub(crate) async fn write_once(self: &Arc<Self>, token: ClientToken, write: Write) -> Result<Applied> {
        let deadline = R::Instant::now() + ONCE_TIMEOUT;
        let Write { body, durability } = write;
        let body = CommandBody::Once { token, body: Box::new(body) };
        loop {
            let result = self.write(Write { body: body.clone(), durability: durability.clone() }).boxed().await;
            match result {
                Err(e) if e.kind() == ErrorKind::Indeterminate && R::Instant::now() + RETRY_PAUSE < deadline => {}
                other => return other,
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    async fn wait_committed(self: &Arc<Self>, token: CommitToken) -> Result<Applied> {
        let known = {
            let locals = self.locals.0.lock().expect("nothing panics while it holds this lock");
            locals.get(&token).cloned()
        };
        let Some(committed) = known else {
            let message = "the write is too old to be waited for here: read to know what became of it";
            return Err(Error::new(ErrorKind::Indeterminate, message));
        };
        let result = R::timeout(WRITE_TIMEOUT, committed).await;
        match result {
            Ok(Ok(applied)) if applied.index == token.index => Ok(applied),
            Ok(Ok(_) | Err(_)) => {
                Err(Error::new(ErrorKind::Indeterminate, "the term ended before the write was committed"))
            }
            Err(_) => Err(Error::new(ErrorKind::Indeterminate, "the write was not committed in time")),
        }
    }

    /// Asks the member, at the address that the membership names, or that it named itself when it offered a snapshot.
    pub(crate) async fn call_member(&self, id: NodeId, method: u8, body: Bytes, timeout: Duration) -> Result<Bytes> {
        let offered_by = || self.offered_by.lock().expect("nothing panics while it holds this lock").clone();
        let known = self.member(id).map(|member| member.peer_address);
        let address = known
            .or_else(|| offered_by().filter(|(by, _)| *by == id).map(|(_, address)| address))
            .ok_or_else(|| Error::new(ErrorKind::Unavailable, format!("no address is known id={id}")))?;
        let request = Envelope { method, body };
        match self.transport.call(address, Some(id), request, timeout).await {
            Ok(answer) => Ok(answer.body),
            // Another node sits at that address: nothing was handled, and who leads may be found elsewhere.
            Err(e) if e.kind() == ErrorKind::Foreign => Err(Error::new(ErrorKind::Unavailable, e.to_string())),
            Err(e) => Err(e),
        }
    }

    pub(crate) async fn forward_request(self: &Arc<Self>, request: Bytes) -> Result<Bytes> {
        let deadline = R::Instant::now() + WRITE_TIMEOUT;
        loop {
            let running = self.running()?;
            match self.leader_of(&running) {
                Some(id) if id == running.id && !self.is_witness() => return self.answer_forwarded(request).await,
                // A witness that leads: another will in a moment.
                Some(id) if id == running.id && R::Instant::now() + RETRY_PAUSE < deadline => {}
                Some(id) => {
                    let mut body = Writer::with_capacity(request.len() + 8);
                    body.bytes(&request);
                    let answer = self.call_member(NodeId(id), method::FORWARD, body.finish(), WRITE_TIMEOUT).await;
                    match answer.and_then(|bytes| decode_result(&bytes, Reader::bytes)) {
                        Err(e) if matches!(e.kind(), ErrorKind::NotLeader | ErrorKind::Unavailable) => {
                            if R::Instant::now() + RETRY_PAUSE >= deadline {
                                return Err(e);
                            }
                        }
                        other => return other,
                    }
                }
                None if R::Instant::now() + RETRY_PAUSE >= deadline => {
                    return Err(Error::new(ErrorKind::Unavailable, "no leader was found in time"));
                }
                None => {}
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    pub(crate) async fn answer_forwarded(&self, request: Bytes) -> Result<Bytes> {
        let running = self.running()?;
        if self.leader_of(&running) != Some(running.id) || self.is_witness() {
            return Err(self.not_leader(&running));
        }
        let handler = self.forward.read().expect("nothing panics while it holds this lock").clone();
        match handler {
            Some(handler) => handler(request).await,
            None => Err(Error::new(ErrorKind::Unsupported, "this node answers no forwarded requests")),
        }
    }

    /// The leader that this node knows.
    pub(crate) fn leader_of(&self, running: &Running<R>) -> Option<u64> {
        running.metrics.borrow_watched().current_leader
    }

    pub(crate) fn not_leader(&self, running: &Running<R>) -> Error {
        let leader = self.leader_of(running).filter(|id| *id != running.id);
        let leader = leader.map(|id| {
            let address = self.member(NodeId(id)).map(|m| m.client_address).unwrap_or_default();
            (NodeId(id), address)
        });
        Error::not_leader(leader, "not the leader")
    }
}

fn classify<R: Runtime>(result: Result<ClientWriteResponse<TypeConfig<R>>, WriteError<R>>) -> Attempt {
    match result {
        Ok(response) => Attempt::Done(response.data.0.ok_or_else(|| {
            Error::new(ErrorKind::Indeterminate, "the write is in a snapshot that was installed before it was applied")
        })),
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => Attempt::Elsewhere(forward.leader_id),
        Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => {
            let kind =
                if mainstay_io::mutant!(RefuseDiscarded) { ErrorKind::Unavailable } else { ErrorKind::Indeterminate };
            Attempt::Done(Err(Error::new(kind, "another leader took over before the commit")))
        }
        Err(RaftError::APIError(other)) => Attempt::Done(Err(Error::new(ErrorKind::Internal, other.to_string()))),
        // The core stopped with the entry on its way; peers may have it.
        Err(RaftError::Fatal(fatal)) => {
            Attempt::Done(Err(Error::new(ErrorKind::Indeterminate, format!("the node left service: {fatal}"))))
        }
    }
}
