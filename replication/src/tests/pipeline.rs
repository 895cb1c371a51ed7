//! Appends to a peer that are under way together, over a transport whose answers the test gives one by one.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use mainstay_wal::GroupId;
use openraft::errors::RPCError;
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, StreamAppendError};
use tokio::sync::{Notify, oneshot};

use crate::network::{Network, Networks, method, read_append, write_append_answer};
use crate::pipeline::{APPEND_BYTES_MAX, APPENDS_MAX, Matched, NEWS_HOLD};
use crate::receipts::{Receipt, read_receipt};
use crate::types::{Entry, EntryPayload, LogId, Member, Payload, TypeConfig, Vote, log_id};
use crate::wire::encode_result;
use crate::{Envelope, Error, ErrorKind, Handler, Hello, NodeId, PeerAddress, Result, TokioRuntime, Transport};

pub(super) type Config = TypeConfig<TokioRuntime>;
type Request = AppendEntriesRequest<Config>;
type Response = AppendEntriesResponse<Config>;
type Answer = Result<Matched<TokioRuntime>, RPCError<Config>>;

pub(super) struct Call {
    pub(super) request: Envelope,
    pub(super) timeout: Duration,
    pub(super) answer: oneshot::Sender<Result<Envelope>>,
}

/// Keeps what was sent until the test answers it.
#[derive(Default)]
pub(super) struct Held(Mutex<Vec<Option<Call>>>, Notify);

impl Held {
    pub(super) fn sent(&self) -> usize {
        self.0.lock().expect("not poisoned").len()
    }

    pub(super) fn take(&self, i: usize) -> Call {
        self.0.lock().expect("not poisoned")[i].take().expect("not answered yet")
    }

    fn answer(&self, i: usize, response: Response) {
        let body = encode_result(Ok((response, 0)), write_append_answer::<TokioRuntime>);
        let _ = self.take(i).answer.send(Ok(Envelope { method: 0, body }));
    }

    pub(super) fn fail(&self, i: usize, kind: ErrorKind) {
        let _ = self.take(i).answer.send(Err(Error::new(kind, "broken")));
    }

    fn unanswered(&self) -> Vec<usize> {
        let calls = self.0.lock().expect("not poisoned");
        (0..calls.len()).filter(|i| calls[*i].is_some()).collect()
    }
}

impl Transport for Held {
    fn serve(&self, _: Hello, _: Arc<dyn Handler>) {}

    fn call(
        &self,
        _: PeerAddress,
        expect: Option<NodeId>,
        request: Envelope,
        timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>> {
        assert_eq!(expect, Some(NodeId(2)));
        let (answer, wait) = oneshot::channel();
        self.0.lock().expect("not poisoned").push(Some(Call { request, timeout, answer }));
        self.1.notify_one();
        Box::pin(async move { wait.await.expect("the test answers or drops the stream") })
    }

    fn local_address(&self) -> PeerAddress {
        PeerAddress(String::new())
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(std::future::ready(()))
    }
}

pub(super) fn run<T>(test: impl AsyncFnOnce(Arc<Held>, Network<TokioRuntime>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let held = Arc::new(Held::default());
        let mut networks = Networks {
            me: 1,
            group: GroupId(1),
            witness: false,
            applied: Some(id(2)),
            durable: Arc::new(|| Some(id(4))),
            transport: held.clone(),
            hurry: Arc::default(),
            rooms: Arc::default(),
            receipts: Arc::default(),
        };
        let member = Member::default();
        let network = RaftNetworkFactory::<Config>::new_client(&mut networks, 2, &member).await;
        test(held, network).await
    })
}

fn id(index: u64) -> LogId {
    log_id(3, index)
}

/// The request that carries the entry `index`, of so many bytes; none for an empty one.
fn request(index: u64, bytes: Option<usize>) -> Request {
    let payload = |bytes| EntryPayload::Normal(Payload::new(Bytes::from(vec![1; bytes])));
    let entries = bytes.map(|bytes| Entry { log_id: id(index), payload: payload(bytes) });
    let prev = if bytes.is_some() { index - 1 } else { index };
    AppendEntriesRequest {
        vote: Vote::new_committed(3, 1),
        prev_log_id: Some(id(prev)),
        leader_commit: None,
        entries: entries.into_iter().collect(),
    }
}

fn requests(indexes: std::ops::RangeInclusive<u64>) -> impl futures_util::Stream<Item = Request> + Unpin {
    stream::iter(indexes.map(|i| request(i, Some(10))).collect::<Vec<_>>())
}

pub(super) fn option() -> RPCOption {
    RPCOption::new(Duration::from_millis(100))
}

/// A follower may need the news of what the leader had applied before its term to have room for the leader's first entry.
#[test]
fn what_was_applied_when_the_node_started_is_told_as_committed() {
    run(async |held, mut network| {
        for (told, expect) in [(None, id(2)), (Some(id(1)), id(2)), (Some(id(3)), id(3))] {
            let rpc = AppendEntriesRequest { leader_commit: told, ..request(5, None) };
            let append = RaftNetworkV2::append_entries(&mut network, rpc, option()).now_or_never();
            assert!(append.is_none(), "it waits for the peer");
            let sent = held.take(held.sent() - 1).request;
            let (request, durable) = read_append::<TokioRuntime>(&sent.body).expect("ours");
            assert_eq!(request.leader_commit, Some(expect), "openraft told {told:?}");
            assert_eq!(durable, Some(id(4)));
        }
    });
}

fn matched(answer: Option<Option<Answer>>) -> u64 {
    let answer = answer.expect("an answer is there").expect("the stream goes on").expect("delivered");
    answer.expect("accepted").expect("of an entry").index
}

#[test]
fn several_appends_are_under_way_and_answered_in_order() {
    run(async |held, mut network| {
        let mut answers = network.stream_append(requests(1..=10), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), APPENDS_MAX, "sent before the first is answered");
        held.answer(1, Response::Success);
        assert!(answers.next().now_or_never().is_none(), "the one before is not answered");
        held.answer(0, Response::Success);
        assert_eq!(matched(answers.next().now_or_never()), 1);
        assert_eq!(matched(answers.next().now_or_never()), 2);
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), APPENDS_MAX + 2, "each answer makes room for one");
        for i in 2..6 {
            let call = held.take(i);
            assert_eq!(call.request.method, method::APPEND_IN_TURN);
            let (sent, _) = read_append::<TokioRuntime>(&call.request.body).expect("readable");
            assert_eq!(sent.prev_log_id, Some(id(i as u64)), "sent in order");
        }
    });
}

/// A round: everything that was sent is answered. One request at a time would need as many rounds as requests.
#[test]
fn round_trips_are_shared() {
    run(async |held, mut network| {
        let mut answers = network.stream_append(requests(1..=12), option()).await.expect("a stream");
        let (mut rounds, mut acknowledged) = (0, 0);
        loop {
            match answers.next().now_or_never() {
                Some(None) => break,
                Some(answer) => {
                    acknowledged += 1;
                    assert_eq!(matched(Some(answer)), acknowledged);
                }
                None => {
                    rounds += 1;
                    held.unanswered().into_iter().for_each(|i| held.answer(i, Response::Success));
                }
            }
        }
        assert_eq!((rounds, acknowledged), (12_usize.div_ceil(APPENDS_MAX), 12));
    });
}

#[test]
fn a_break_in_the_middle_ends_the_stream_behind_what_was_acknowledged() {
    for kind in [ErrorKind::Indeterminate, ErrorKind::Unavailable] {
        run(async |held, mut network| {
            let mut answers = network.stream_append(requests(1..=10), option()).await.expect("a stream");
            assert!(answers.next().now_or_never().is_none());
            held.answer(0, Response::Success);
            held.fail(1, kind);
            // It arrived, and its answer did too: it is not taken for one of the request that was lost.
            held.answer(2, Response::Success);
            assert_eq!(matched(answers.next().now_or_never()), 1);
            let broken = answers.next().await.expect("told").expect_err("broken");
            match kind {
                ErrorKind::Indeterminate => assert!(matches!(broken, RPCError::Network(_)), "{broken}"),
                _ => assert!(matches!(broken, RPCError::Unreachable(_)), "{broken}"),
            }
            assert!(answers.next().await.is_none());
            assert!(held.sent() <= APPENDS_MAX + 1, "nothing is sent after it was known");
        });
    }
}

/// openraft stops in a panic when a peer's conflict lies before what that peer had acknowledged.
/// openraft would stop in an assertion.
#[test]
fn a_conflict_of_a_member_that_went_back_is_not_told() {
    run(async |held, mut network| {
        for denied in [true, false] {
            let before = held.sent();
            let mut answers = network.stream_append(requests(5..=5), option()).await.expect("a stream");
            assert!(answers.next().now_or_never().is_none());
            held.answer(before, Response::Success);
            assert_eq!(matched(answers.next().now_or_never()), 5);
            drop(answers);
            let mut answers = network.stream_append(requests(5..=5), option()).await.expect("a stream");
            assert!(answers.next().now_or_never().is_none());
            held.answer(before + 1, Response::Conflict);
            assert!(answers.next().now_or_never().is_none());
            let asked = held.take(before + 2);
            assert_eq!(asked.request.method, method::DENIED);
            let receipt = read_receipt(&asked.request.body).expect("a receipt");
            assert_eq!(receipt, Receipt { term: 3, last: Some(id(5)) });
            let body = encode_result(Ok(denied), |w, denied| {
                w.bool(denied);
            });
            asked.answer.send(Ok(Envelope { method: method::DENIED, body })).expect("waited for");
            let told = answers.next().await.expect("told");
            if denied {
                assert!(matches!(told, Err(RPCError::Unreachable(_))), "{told:?}");
            } else {
                assert_eq!(told.expect("delivered"), Err(StreamAppendError::Conflict(id(4))));
            }
        }
    });
}

#[test]
fn only_the_first_answer_may_tell_of_a_conflict() {
    run(async |held, mut network| {
        let mut answers = network.stream_append(requests(5..=7), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        held.answer(0, Response::Conflict);
        let answer = answers.next().await.expect("told").expect("delivered");
        assert_eq!(answer, Err(StreamAppendError::Conflict(id(4))));
        assert!(answers.next().await.is_none());
        drop(answers);

        let before = held.sent();
        let mut answers = network.stream_append(requests(5..=7), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        held.answer(before + 1, Response::Conflict);
        held.answer(before, Response::Success);
        assert_eq!(matched(answers.next().now_or_never()), 5);
        // It has acknowledged what it misses there: it is asked whether its volume went back.
        assert!(answers.next().now_or_never().is_none());
        let asked = held.take(held.sent() - 1);
        assert_eq!(asked.request.method, method::DENIED);
        let denied = encode_result(Ok(false), |w, denied| {
            w.bool(denied);
        });
        asked.answer.send(Ok(Envelope { method: method::DENIED, body: denied })).expect("waited for");
        let overtaken = answers.next().await.expect("told").expect_err("tried again");
        assert!(matches!(overtaken, RPCError::Network(_)), "{overtaken}");
        assert!(answers.next().await.is_none());
        drop(answers);

        // A peer that finds a conflict where nothing is said to be before the entries.
        let mut first = request(1, Some(10));
        first.prev_log_id = None;
        let before = held.sent();
        let mut answers = network.stream_append(stream::iter(vec![first]), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        held.answer(before, Response::Conflict);
        assert!(answers.next().await.expect("told").is_err());
    });
}

#[test]
fn an_acknowledgement_of_what_was_not_sent_is_refused() {
    run(async |held, mut network| {
        for (answered, taken) in [(5, true), (4, true), (3, false), (6, false)] {
            let before = held.sent();
            let mut answers = network.stream_append(requests(5..=5), option()).await.expect("a stream");
            assert!(answers.next().now_or_never().is_none());
            held.answer(before, Response::PartialSuccess(Some(id(answered))));
            let answer = answers.next().await.expect("told");
            assert_eq!(answer.is_ok(), taken, "{answered} {answer:?}");
            assert!(answers.next().await.is_none());
        }
    });
}

#[test]
fn bytes_under_way_are_bounded() {
    run(async |held, mut network| {
        let half = APPEND_BYTES_MAX / 2;
        let large: Vec<_> = (1..=4).map(|i| request(i, Some(half))).collect();
        let mut answers = network.stream_append(stream::iter(large), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 2);
        held.answer(0, Response::Success);
        assert_eq!(matched(answers.next().now_or_never()), 1);
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 3);
    });
}

/// A heartbeat must not wait behind entries that wait for a disk, and must not wait as long.
#[test]
fn what_carries_nothing_takes_no_turn() {
    run(async |held, mut network| {
        let mixed = vec![request(4, None), request(5, Some(10))];
        let mut answers = network.stream_append(stream::iter(mixed), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        let calls: Vec<_> = (0..2).map(|i| held.take(i)).collect();
        assert_eq!((calls[0].request.method, calls[1].request.method), (method::APPEND, method::APPEND_IN_TURN));
        assert!(calls[0].timeout < calls[1].timeout);
    });
}

#[test]
fn the_news_of_a_commit_rides_on_the_next_entries_and_is_acknowledged_with_them() {
    run(async |held, mut network| {
        let mixed = vec![request(1, Some(10)), request(1, None), request(1, None), request(2, Some(10))];
        let mut answers = network.stream_append(stream::iter(mixed), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 2, "only what carries entries");
        held.answer(0, Response::Success);
        // The answer to what was sent before says nothing of when the peer heard of the rest, and openraft would take it for one
        // to all that ends with the same entry: it took its lease from a peer's answer of before it was stopped.
        assert!(answers.next().now_or_never().is_none());
        held.answer(1, Response::Success);
        assert_eq!([1, 1, 1, 2], [(); 4].map(|()| matched(answers.next().now_or_never())));
        assert!(answers.next().await.is_none());
        assert_eq!(held.sent(), 2);
    });
}

/// A stream that has acknowledged entry 1, and what is sent into it.
async fn acknowledged<'n>(
    held: &Held,
    network: &'n mut Network<TokioRuntime>,
) -> (futures_util::stream::BoxStream<'n, Answer>, tokio::sync::mpsc::UnboundedSender<Request>) {
    let (input, requests) = tokio::sync::mpsc::unbounded_channel();
    let requests = stream::unfold(requests, async |mut requests| Some((requests.recv().await?, requests)));
    let mut answers = network.stream_append(Box::pin(requests), option()).await.expect("a stream");
    input.send(request(1, Some(10))).expect("open");
    assert!(answers.next().now_or_never().is_none());
    held.answer(0, Response::Success);
    assert_eq!(matched(answers.next().now_or_never()), 1);
    (answers, input)
}

#[test]
fn the_news_of_a_commit_waits_a_moment_for_entries_that_carry_it() {
    run(async |held, mut network| {
        let (mut answers, input) = acknowledged(&held, &mut network).await;
        input.send(request(1, None)).expect("open");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 1, "held");
        input.send(request(2, Some(10))).expect("open");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 2, "the entries go at once");
        held.answer(1, Response::Success);
        assert_eq!([1, 2], [(); 2].map(|()| matched(answers.next().now_or_never())));

        input.send(request(2, None)).expect("open");
        let since = std::time::Instant::now();
        let sent = async {
            while held.sent() == 2 {
                held.1.notified().await;
            }
            held.answer(2, Response::Success);
        };
        let both = futures_util::future::join(answers.next(), sent);
        let (answer, ()) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("it goes by itself");
        assert_eq!(matched(Some(answer)), 2);
        assert!(since.elapsed() >= NEWS_HOLD);
    });
}

#[test]
fn the_news_of_a_commit_goes_at_once_when_a_read_waits_for_it() {
    run(async |held, mut network| {
        let hurry = network.hurry.clone();
        let (mut answers, input) = acknowledged(&held, &mut network).await;
        let reading = hurry.begin();
        input.send(request(1, None)).expect("open");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 2, "not held");
        held.answer(1, Response::Success);
        assert_eq!(matched(answers.next().now_or_never()), 1);
        drop(reading);

        input.send(request(1, None)).expect("open");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 2, "held");
        drop(hurry.begin());
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 3, "whoever begins to hurry sends what is held");
    });
}

/// While something else waits behind it, it may not wait.
#[test]
fn news_that_holds_others_up_goes_at_once() {
    run(async |held, mut network| {
        let (mut answers, input) = acknowledged(&held, &mut network).await;
        for _ in 0..APPENDS_MAX {
            input.send(request(1, None)).expect("open");
        }
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 2, "entries would find no place behind it");
        held.answer(1, Response::Success);
        assert_eq!([1; APPENDS_MAX], [(); APPENDS_MAX].map(|()| matched(answers.next().now_or_never())));

        // The answer to entries counts from the news behind them: the entries are not acknowledged before it is.
        input.send(request(2, Some(10))).expect("open");
        input.send(request(2, None)).expect("open");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 3);
        held.answer(2, Response::Success);
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 4, "not held");
    });
}

#[test]
fn the_news_of_a_commit_goes_by_itself_when_nothing_carries_it() {
    run(async |held, mut network| {
        let mixed = vec![request(1, Some(10)), request(1, None), request(1, None)];
        let mut answers = network.stream_append(stream::iter(mixed), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 1);
        held.answer(0, Response::Success);
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(held.sent(), 2, "one for both");
        held.answer(1, Response::Success);
        assert_eq!([1, 1, 1], [(); 3].map(|()| matched(answers.next().now_or_never())));
        assert!(answers.next().await.is_none());
        drop(answers);

        // What fails to carry it fails for it too.
        let mixed = vec![request(1, Some(10)), request(1, None), request(2, Some(10))];
        let mut answers = network.stream_append(stream::iter(mixed), option()).await.expect("a stream");
        assert!(answers.next().now_or_never().is_none());
        held.answer(2, Response::Success);
        held.fail(3, ErrorKind::Indeterminate);
        assert!(answers.next().await.expect("told").is_err());
        assert!(answers.next().await.is_none());
    });
}
