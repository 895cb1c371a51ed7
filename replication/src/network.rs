//! openraft's messages over [`Transport`].
//!
//! # Place
//! openraft's network traits above the transport; `serve_*` is the other end, called by `node`
//! # Invariants
//! - N1. What is sent is encoded by `wire` (pitfall 8), with its length bounded: at most `READ_BYTES_MAX` of entries
//!   beyond the first in one append.
//! - N2. A transport that could not deliver is `Unreachable`, never a granted pre-vote.
//! - N3. A snapshot is offered and not sent: the receiver fetches the tables it lacks. It is asked again and again while it
//!   works, so one that is dead, or has never heard of the offer, is noticed within [`OFFER_TIMEOUT`].

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use mainstay_io::BoxFuture;
use mainstay_wal::GroupId;
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderError, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft_rt::Select2;

use crate::pipeline::{Hurry, Matched, Pipeline};
use crate::receipts::{Receipt, Receipts, went_back};
use crate::room::PeerRooms;
use crate::state_machine::{Offer, SnapshotHandle};
use crate::types::{LogId, Member, RaftSnapshot, SnapshotMeta, TypeConfig, Vote, term_of};
use crate::wire::{Reader, Writer, decode_result};
use crate::{Envelope, Error, ErrorKind, NodeId, PeerAddress, Result, Runtime, Transport};

/// What an [`Envelope`] asks for. The numbers are the protocol's.
pub(crate) mod method {
    pub(crate) const APPEND: u8 = 1;
    pub(crate) const VOTE: u8 = 2;
    pub(crate) const PRE_VOTE: u8 = 3;
    pub(crate) const SNAPSHOT: u8 = 4;
    pub(crate) const TRANSFER: u8 = 5;
    pub(crate) const TABLE_READ: u8 = 6;
    pub(crate) const WRITE: u8 = 7;
    pub(crate) const READ_INDEX: u8 = 8;
    pub(crate) const FORWARD: u8 = 9;
    pub(crate) const PREPARE: u8 = 10;
    pub(crate) const ADOPT: u8 = 11;
    pub(crate) const JOIN: u8 = 12;
    pub(crate) const MEMBER: u8 = 13;
    pub(crate) const OFFER: u8 = 14;
    pub(crate) const WHO: u8 = 15;
    /// As `APPEND`, begun in the order in which a peer sent them.
    pub(crate) const APPEND_IN_TURN: u8 = 16;
    pub(crate) const AWAIT_LEVEL: u8 = 17;
    pub(crate) const LOG_GIVE: u8 = 20;
    pub(crate) const LOG_ENDS: u8 = 21;
    pub(crate) const DIGESTS: u8 = 22;
    pub(crate) const DISK: u8 = 23;
    /// As `OFFER`, of a follower too.
    pub(crate) const OFFER_OF_ANY: u8 = 24;
    /// What a log begins behind, for a member that has lost it.
    pub(crate) const LOG_BASE: u8 = 25;
    /// What the receiver remembers of the promises of who asks.
    pub(crate) const RECEIPT: u8 = 26;
    /// A promise that the receiver has denied.
    pub(crate) const DENIED: u8 = 27;
    /// A request for another group than the first.
    pub(crate) const GROUPED: u8 = 28;
    /// As `GROUPED`, of one that keeps its order.
    pub(crate) const GROUPED_IN_TURN: u8 = 29;
    /// What has become of a snapshot that was offered.
    pub(crate) const AWAIT_SNAPSHOT: u8 = 30;
    /// A sign of life for all groups of a process.
    pub(crate) const PULSE: u8 = 31;
    /// Which groups were born, for a witness.
    pub(crate) const BIRTHS: u8 = 32;
    /// The newest version of a cluster that the receiver reads.
    pub(crate) const VERSION: u8 = 33;
}

/// Whether requests of this method rest on reaching a peer in the order in which they were sent. A connection keeps the
/// order of all; a [`Transport`] without one has to do it for these.
pub fn keeps_order(method: u8) -> bool {
    matches!(method, method::APPEND_IN_TURN | method::GROUPED_IN_TURN)
}

/// How long entries may take to be durable at a follower. A follower that vanished is noticed by its heartbeats, which
/// end the connection.
pub(crate) const APPEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a receiver of a snapshot holds a question about it before it says that it still works on it.
pub(crate) const OFFER_WAIT: Duration = Duration::from_secs(1);
/// How long a leader waits for that answer: until then nothing tells a receiver that works from an offer that was lost.
pub(crate) const OFFER_TIMEOUT: Duration = Duration::from_secs(3);
/// What an offer takes longer than that for its manifest: even a slow link carries so many bytes in a second.
pub(crate) const OFFER_BYTES_PER_SECOND: u64 = 256 << 10;

/// Sends Raft's messages to one node.
pub(crate) struct Network<R: Runtime> {
    target: u64,
    address: PeerAddress,
    me: u64,
    group: GroupId,
    /// This node holds no tables.
    witness: bool,
    applied: Option<LogId>,
    durable: Durable,
    transport: Arc<dyn Transport>,
    /// See [`crate::pipeline`].
    pub(crate) hurry: Arc<Hurry>,
    /// See [`crate::room`].
    rooms: Arc<PeerRooms<R>>,
    receipts: Arc<Receipts>,
}

/// Tells up to where a log is durable.
pub(crate) type Durable = Arc<dyn Fn() -> Option<LogId> + Send + Sync>;

/// Makes a [`Network`] for each node.
pub(crate) struct Networks<R: Runtime> {
    pub(crate) me: u64,
    pub(crate) group: GroupId,
    pub(crate) witness: bool,
    /// The last entry that was applied when the node started.
    pub(crate) applied: Option<LogId>,
    /// The last entry that is durable in this node's log.
    pub(crate) durable: Durable,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) hurry: Arc<Hurry>,
    pub(crate) rooms: Arc<PeerRooms<R>>,
    pub(crate) receipts: Arc<Receipts>,
}

/// What an append says, as far as its answer is judged by it.
#[derive(Clone, Copy)]
pub(crate) struct Sent {
    pub(crate) term: u64,
    pub(crate) prev: Option<LogId>,
    /// The last entry, or `prev` without any.
    pub(crate) last: Option<LogId>,
}

impl Sent {
    pub(crate) fn of<R: Runtime>(rpc: &AppendEntriesRequest<TypeConfig<R>>) -> Self {
        let last = rpc.entries.last().map(|entry| entry.log_id).or(rpc.prev_log_id);
        Self { term: rpc.vote.leader_id.term, prev: rpc.prev_log_id, last }
    }

    /// What a success promises. Without entries it says that the log goes so far, and may come before the term is durable there.
    fn promise(&self) -> Receipt {
        let term = if self.last == self.prev { self.last.map_or(0, |id| term_of(&id)) } else { self.term };
        Receipt { term, last: self.last }
    }
}

impl<R: Runtime> RaftNetworkFactory<TypeConfig<R>> for Networks<R> {
    type Network = Network<R>;

    async fn new_client(&mut self, target: u64, node: &Member) -> Network<R> {
        Network {
            target,
            address: crate::wire::peer_address(node),
            me: self.me,
            witness: self.witness,
            applied: self.applied,
            durable: self.durable.clone(),
            transport: self.transport.clone(),
            hurry: self.hurry.clone(),
            group: self.group,
            rooms: self.rooms.clone(),
            receipts: self.receipts.clone(),
        }
    }
}

fn unreachable<R: Runtime>(error: &Error) -> Unreachable<TypeConfig<R>> {
    Unreachable::from_string(error)
}

/// Whether openraft shall back off from a peer, or try again at once.
pub(crate) fn rpc_error<R: Runtime>(error: &Error) -> RPCError<TypeConfig<R>> {
    match error.kind() {
        ErrorKind::Indeterminate => RPCError::Network(NetworkError::from_string(error)),
        _ => RPCError::Unreachable(unreachable(error)),
    }
}

impl<R: Runtime> Network<R> {
    async fn call<T>(
        &self,
        method: u8,
        body: Bytes,
        timeout: Duration,
        read: impl FnOnce(&mut Reader) -> Result<T>,
    ) -> Result<T> {
        let answer = self.send(method, body, timeout).await?;
        decode_result(&answer.body, read)
    }

    /// Hands a request to the transport, which queues it when the future is first polled.
    pub(crate) fn send(&self, method: u8, body: Bytes, timeout: Duration) -> BoxFuture<Result<Envelope>> {
        let request = Envelope { method, body };
        self.transport.call(self.address.clone(), Some(NodeId(self.target)), request, timeout)
    }

    /// The body of an append. A leader that has not committed an entry of its own term tells of no commit at all; what it had
    /// applied before is committed all the same. A follower whose log is full of entries that it may not apply for want of that
    /// news would have no room for the entry that would bring it.
    pub(crate) fn body(&self, rpc: &AppendEntriesRequest<TypeConfig<R>>) -> Bytes {
        encode_append(rpc, rpc.leader_commit.max(self.applied), (self.durable)())
    }

    /// As [`Network::send`] for an append: answers what Raft is told, and notes the rest. A member that denies what it has promised is
    /// asked about it, and Raft is not told.
    pub(crate) fn append(
        &self,
        method: u8,
        body: Bytes,
        timeout: Duration,
        sent: Sent,
    ) -> impl Future<Output = Result<AppendEntriesResponse<TypeConfig<R>>>> + Send + 'static {
        let answer = self.send(method, body, timeout);
        let (rooms, receipts, target) = (self.rooms.clone(), self.receipts.clone(), self.target);
        let group = self.group;
        let (transport, address) = (self.transport.clone(), self.address.clone());
        async move {
            let (response, room) = decode_result(&answer.await?.body, read_append_answer)?;
            if response.is_success() {
                rooms.note(target, group, room, sent.last.map_or(0, |id| id.index));
                receipts.note(target, sent.promise());
            }
            if matches!(response, AppendEntriesResponse::Conflict)
                && let Some(receipt) = receipts.contradict(target, sent.term, sent.prev)
            {
                let mut body = Writer::new();
                receipt.write(&mut body);
                let request = Envelope { method: method::DENIED, body: body.finish() };
                let told = transport.call(address, Some(NodeId(target)), request, timeout).await?;
                // An append that overtook another finds a conflict too, which is none any more.
                if decode_result(&told.body, Reader::bool)? {
                    tracing::error!(target, "a member denies what it has promised: its volume went back");
                    return Err(went_back(target));
                }
            }
            Ok(response)
        }
    }
}

/// A request about a snapshot: method, body, and how long its answer may take.
type Question = (u8, Bytes, Duration);

fn offer_snapshot(vote: &Vote, offer: &Offer) -> Question {
    let mut body = Writer::with_capacity(256 + offer.manifest.len());
    body.vote(vote);
    write_offer(&mut body, offer);
    let transfer = Duration::from_secs(offer.manifest.len() as u64 / OFFER_BYTES_PER_SECOND);
    (method::SNAPSHOT, body.finish(), OFFER_TIMEOUT + transfer)
}

fn await_snapshot(vote: &Vote, at: Option<&LogId>) -> Question {
    let mut body = Writer::new();
    body.vote(vote).option_log_id(at);
    (method::AWAIT_SNAPSHOT, body.finish(), OFFER_TIMEOUT)
}

/// Which snapshot is asked about: the vote of its leader, and the last entry in it.
pub(crate) fn read_await_snapshot(body: &Bytes) -> Result<(Vote, Option<LogId>)> {
    let mut reader = Reader::open(body)?;
    let asked = (reader.vote()?, reader.option(Reader::log_id)?);
    reader.end()?;
    Ok(asked)
}

/// The answer to who offered a snapshot: nothing while it is being installed.
pub(crate) fn write_installed(out: &mut Writer, vote: Option<Vote>) {
    out.option(vote, |w, vote| {
        w.vote(&vote);
    });
}

type Answers<'s, R> = futures_util::stream::BoxStream<'s, Result<Matched<R>, RPCError<TypeConfig<R>>>>;

impl<R: Runtime> RaftNetworkV2<TypeConfig<R>> for Network<R> {
    type SnapshotData = SnapshotHandle;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        let limit = if rpc.entries.is_empty() { option.soft_ttl() } else { APPEND_TIMEOUT };
        let body = self.body(&rpc);
        self.append(method::APPEND, body, limit, Sent::of(&rpc)).await.map_err(|e| rpc_error(&e))
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> futures_util::future::BoxFuture<'s, Result<Answers<'s, R>, RPCError<TypeConfig<R>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig<R>>> + OptionalSend + Unpin + 'static,
    {
        let answers: Answers<'s, R> = Box::pin(Pipeline::new(self, input, option.soft_ttl()));
        Box::pin(std::future::ready(Ok(answers)))
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        let body = encode_vote_request(&rpc);
        let answer = self.call(method::VOTE, body, option.soft_ttl(), read_vote_response).await;
        if answer.as_ref().is_ok_and(|answer| answer.vote_granted) {
            self.receipts.note(self.target, Receipt { term: rpc.vote.leader_id.term, last: None });
        }
        answer.map_err(|e| rpc_error(&e))
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        let body = encode_vote_request(&rpc);
        self.call(method::PRE_VOTE, body, option.soft_ttl(), read_vote_response).await.map_err(|e| rpc_error(&e))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: RaftSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig<R>>, StreamingError<TypeConfig<R>>> {
        if self.witness {
            let error = Error::new(ErrorKind::Unavailable, "a witness has no tables to send");
            return Err(StreamingError::Unreachable(unreachable(&error)));
        }
        // The export inside pins its tables until the receiver has them.
        let SnapshotHandle::Local(export) = &snapshot.snapshot else {
            let error = Error::new(ErrorKind::Internal, "a snapshot of a peer is not passed on");
            return Err(StreamingError::Unreachable(unreachable(&error)));
        };
        let offer = Offer { meta: snapshot.meta.clone(), manifest: export.manifest.clone(), from: self.me };
        let mut cancel = std::pin::pin!(cancel);
        let mut question = offer_snapshot(&vote, &offer);
        loop {
            let (method, body, timeout) = question;
            let call = std::pin::pin!(self.call(method, body, timeout, |r| r.option(Reader::vote)));
            match R::select2(cancel.as_mut(), call).await {
                Select2::First(closed) => return Err(StreamingError::Closed(closed)),
                Select2::Second(Ok(Some(answer))) => {
                    if answer == vote {
                        // As with an answer to no entries.
                        let term = offer.meta.last_log_id.map_or(0, |id| term_of(&id));
                        self.receipts.note(self.target, Receipt { term, last: offer.meta.last_log_id });
                    }
                    return Ok(SnapshotResponse::new(answer));
                }
                // It has the manifest, which is long, and needs it no second time.
                Select2::Second(Ok(None)) => question = await_snapshot(&vote, offer.meta.last_log_id.as_ref()),
                // Backs off also after a timeout: openraft would try again at once.
                Select2::Second(Err(error)) => return Err(StreamingError::Unreachable(unreachable(&error))),
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig<R>>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig<R>>, RPCError<TypeConfig<R>>> {
        let mut body = Writer::new();
        body.vote(req.from_leader()).u64(*req.to_node_id()).option_log_id(req.last_log_id());
        self.call(method::TRANSFER, body.finish(), option.soft_ttl(), read_transfer_response)
            .await
            .map_err(|e| rpc_error(&e))
    }
}

/// Bytes of an append before its entries: version, vote, three places in the log, count.
const APPEND_HEAD_BYTES_MAX: usize = 1 + 17 + 3 * 17 + 4;
/// Bytes of an entry beside its payload: kind, place in the log, length.
const ENTRY_BYTES: usize = 1 + 16 + 4;

/// `committed` in place of what the request says, and up to where the log of the leader is durable.
pub(crate) fn encode_append<R: Runtime>(
    rpc: &AppendEntriesRequest<TypeConfig<R>>,
    committed: Option<LogId>,
    durable: Option<LogId>,
) -> Bytes {
    // A byte short, and all of it is copied into a buffer of twice the size.
    let bytes: usize = rpc.entries.iter().map(|e| crate::wire::entry_parts(e).1.len() + ENTRY_BYTES).sum();
    let mut body = Writer::with_capacity(APPEND_HEAD_BYTES_MAX + bytes);
    body.vote(&rpc.vote)
        .option_log_id(rpc.prev_log_id.as_ref())
        .option_log_id(committed.as_ref())
        .option_log_id(durable.as_ref())
        .entries(&rpc.entries);
    body.finish()
}

/// The request, and up to where the log of its sender was durable.
pub(crate) fn read_append<R: Runtime>(body: &Bytes) -> Result<(AppendEntriesRequest<TypeConfig<R>>, Option<LogId>)> {
    let mut reader = Reader::open(body)?;
    let vote = reader.vote()?;
    let prev_log_id = reader.option(Reader::log_id)?;
    let leader_commit = reader.option(Reader::log_id)?;
    let durable = reader.option(Reader::log_id)?;
    let entries = reader.entries()?;
    reader.end()?;
    // openraft takes the entries as given: they must be what follows `prev_log_id`, one by one.
    let mut expect = prev_log_id.as_ref().map_or(0, |id| id.index.saturating_add(1));
    for entry in &entries {
        if entry.log_id.index != expect {
            return Err(Error::new(ErrorKind::Corrupt, "entries of an append do not follow each other"));
        }
        expect = expect.saturating_add(1);
    }
    Ok((AppendEntriesRequest { vote, prev_log_id, leader_commit, entries }, durable))
}

/// What a peer says to an append, and how many bytes more its log takes before it keeps the rest for what makes room.
type AppendAnswer<R> = (AppendEntriesResponse<TypeConfig<R>>, u64);

pub(crate) fn write_append_answer<R: Runtime>(out: &mut Writer, (answer, room): AppendAnswer<R>) {
    match answer {
        AppendEntriesResponse::Success => out.u8(0),
        AppendEntriesResponse::PartialSuccess(id) => out.u8(1).option_log_id(id.as_ref()),
        AppendEntriesResponse::Conflict => out.u8(2),
        AppendEntriesResponse::HigherVote(vote) => out.u8(3).vote(&vote),
    };
    out.u64(room);
}

pub(crate) fn read_append_answer<R: Runtime>(reader: &mut Reader) -> Result<AppendAnswer<R>> {
    let answer = match reader.u8()? {
        0 => AppendEntriesResponse::Success,
        1 => AppendEntriesResponse::PartialSuccess(reader.option(Reader::log_id)?),
        2 => AppendEntriesResponse::Conflict,
        3 => AppendEntriesResponse::HigherVote(reader.vote()?),
        _ => return Err(Error::new(ErrorKind::Corrupt, "unknown answer to an append")),
    };
    Ok((answer, reader.u64()?))
}

fn encode_vote_request<R: Runtime>(rpc: &VoteRequest<TypeConfig<R>>) -> Bytes {
    let mut body = Writer::new();
    body.vote(&rpc.vote).option_log_id(rpc.last_log_id.as_ref()).bool(rpc.leadership_transfer);
    body.finish()
}

pub(crate) fn read_vote_request<R: Runtime>(body: &Bytes) -> Result<VoteRequest<TypeConfig<R>>> {
    let mut reader = Reader::open(body)?;
    let mut request = VoteRequest::new(reader.vote()?, reader.option(Reader::log_id)?);
    request.leadership_transfer = reader.bool()?;
    reader.end()?;
    Ok(request)
}

pub(crate) fn write_vote_response<R: Runtime>(out: &mut Writer, answer: &VoteResponse<TypeConfig<R>>) {
    out.vote(&answer.vote).bool(answer.vote_granted).option_log_id(answer.last_log_id.as_ref());
}

fn read_vote_response<R: Runtime>(reader: &mut Reader) -> Result<VoteResponse<TypeConfig<R>>> {
    let vote = reader.vote()?;
    let granted = reader.bool()?;
    Ok(VoteResponse::new(vote, reader.option(Reader::log_id)?, granted))
}

pub(crate) fn read_transfer_request<R: Runtime>(body: &Bytes) -> Result<TransferLeaderRequest<TypeConfig<R>>> {
    let mut reader = Reader::open(body)?;
    let vote = reader.vote()?;
    let to = reader.u64()?;
    let request = TransferLeaderRequest::new(vote, to, reader.option(Reader::log_id)?);
    reader.end()?;
    Ok(request)
}

pub(crate) fn write_transfer_response<R: Runtime>(out: &mut Writer, answer: &TransferLeaderResponse<TypeConfig<R>>) {
    match answer {
        Ok(()) => out.u8(0),
        Err(TransferLeaderError::VoteChanged { expected, actual }) => out.u8(1).vote(expected).vote(actual),
        Err(TransferLeaderError::LogNotFlushed { expected, actual }) => {
            out.u8(2).option_log_id(expected.as_ref()).option_log_id(actual.as_ref())
        }
    };
}

fn read_transfer_response<R: Runtime>(reader: &mut Reader) -> Result<TransferLeaderResponse<TypeConfig<R>>> {
    Ok(match reader.u8()? {
        0 => Ok(()),
        1 => Err(TransferLeaderError::VoteChanged { expected: reader.vote()?, actual: reader.vote()? }),
        2 => Err(TransferLeaderError::LogNotFlushed {
            expected: reader.option(Reader::log_id)?,
            actual: reader.option(Reader::log_id)?,
        }),
        _ => return Err(Error::new(ErrorKind::Corrupt, "unknown answer to a transfer")),
    })
}

pub(crate) fn write_offer(out: &mut Writer, offer: &Offer) {
    out.u64(offer.from)
        .option_log_id(offer.meta.last_log_id.as_ref())
        .stored_membership(&offer.meta.last_membership)
        .bytes(&offer.manifest);
}

pub(crate) fn read_offer(reader: &mut Reader) -> Result<Offer> {
    let from = reader.u64()?;
    let last_log_id = reader.option(Reader::log_id)?;
    let last_membership = reader.stored_membership()?;
    Ok(Offer { from, meta: SnapshotMeta { last_log_id, last_membership }, manifest: reader.bytes()? })
}

/// Decodes arbitrary bytes as every answer to Raft's requests, for the fuzzer.
pub(crate) fn decode_any<R: Runtime>(bytes: &Bytes) {
    let _ = decode_result(bytes, read_append_answer::<R>);
    let _ = decode_result(bytes, read_vote_response::<R>);
    let _ = decode_result(bytes, read_transfer_response::<R>);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::log_id;

    /// A member whose disk took nothing had answered the heartbeat of a new leader; started again it was called one that went back.
    #[test]
    fn an_answer_to_no_entries_promises_the_log_and_not_the_term() {
        let sent = |prev, last| Sent { term: 8, prev, last };
        let (before, behind) = (Some(log_id(6, 87)), Some(log_id(8, 88)));
        assert_eq!(sent(before, before).promise(), Receipt { term: 6, last: before });
        assert_eq!(sent(before, behind).promise(), Receipt { term: 8, last: behind });
        assert_eq!(sent(None, None).promise(), Receipt { term: 0, last: None });
    }
}
