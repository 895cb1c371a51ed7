//! Several appends to one peer under way at once.
//!
//! # Place
//! between openraft's replication stream, which hands out one request after the other, and [`crate::Transport`], which
//! carries requests by number; `turns` is the other end
//! # Invariants
//! - A1. Answers go to openraft in the order of the requests, whatever order they arrive in.
//! - A2. At most [`APPENDS_MAX`] requests are under way, and none is added while [`APPEND_BYTES_MAX`] are.
//! - A3. The first answer that is not a success ends the stream. What was sent behind it is forgotten here: openraft
//!   begins again after the last entry that was acknowledged, and a peer that has them already says so.
//! - A4. Only the first request of a stream may report a conflict. A later one follows what this stream itself has
//!   seen acknowledged, so its conflict says that requests overtook each other and not that the peer's log went back,
//!   which openraft would take for the loss of a disk.
//! - A5. The news of a commit is not sent while other requests are under way: the next entries carry it, and so does their
//!   answer. Without any it goes once all before it are answered and [`NEWS_HOLD`] is over, or at once while somebody is in a
//!   [`Hurry`]. The commit itself never waits: only what a follower knows of it does.
//! - A6. openraft takes an answer for one to every request that it has handed out and that ends with the same entry, and
//!   counts leases and confirms reads from when it handed out the last of them. So an answer waits until the news behind it,
//!   which end with the same entry, are answered too: a leader that was stopped would else take what a peer said before for an
//!   answer to what it asks now.
//!
//! # Why not
//! One request at a time costs a write that comes just too late a second round trip, and leaves disk and network of the
//! peer idle for as long as the other works. More than a few at a time only makes them smaller: entries that wait are
//! merged into the next request.
//! The news at once: writers that were just answered write again, and the entries that come a moment later would have
//! carried it. Each message by itself wakes a follower and costs its leader an answer.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, StreamExt};
use openraft::errors::{NetworkError, RPCError};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, StreamAppendResult};
use tokio::sync::Notify;

use crate::network::{APPEND_TIMEOUT, Network, Sent, method, rpc_error};
use crate::types::{LogId, TypeConfig};
use crate::{Result, Runtime};

/// Appends to one peer that may be under way at once.
pub(crate) const APPENDS_MAX: usize = 4;
/// Bytes of appends under way beyond which no further one begins. Each holds at most `READ_BYTES_MAX` beyond its first
/// entry.
pub(crate) const APPEND_BYTES_MAX: usize = 4 << 20;

/// How long the news of a commit waits for entries that carry it. Bounds what a follower's state is behind by it.
pub(crate) const NEWS_HOLD: Duration = Duration::from_millis(1);

/// Who cannot wait for [`NEWS_HOLD`]: reads that have the leader confirmed, and those of followers.
#[derive(Default)]
pub(crate) struct Hurry {
    count: AtomicUsize,
    begun: Notify,
}

/// One in a hurry, until it is dropped.
pub(crate) struct Hurrying(Arc<Hurry>);

impl Hurry {
    /// What is held goes now, and nothing is held until the answer is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> Hurrying {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.begun.notify_waiters();
        Hurrying(self.clone())
    }
}

impl Drop for Hurrying {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
    }
}

type Answer<R> = Result<AppendEntriesResponse<TypeConfig<R>>>;

struct UnderWay<R: Runtime> {
    prev: Option<LogId>,
    last: Option<LogId>,
    bytes: usize,
    /// Until it is sent.
    rpc: Option<AppendEntriesRequest<TypeConfig<R>>>,
    /// From then on until it is answered.
    call: Option<BoxFuture<'static, Answer<R>>>,
    answer: Option<Answer<R>>,
}

/// Sends the requests of `input` and yields their answers.
pub(crate) struct Pipeline<'s, R: Runtime, S> {
    network: &'s Network<R>,
    input: Option<S>,
    /// For a request without entries.
    idle_timeout: Duration,
    under_way: VecDeque<UnderWay<R>>,
    bytes: usize,
    answered: u64,
    /// Over when the news has waited long enough.
    hold: Option<BoxFuture<'static, ()>>,
}

impl<'s, R: Runtime, S> Pipeline<'s, R, S> {
    pub(crate) fn new(network: &'s Network<R>, input: S, idle_timeout: Duration) -> Self {
        let under_way = VecDeque::new();
        Self { network, input: Some(input), idle_timeout, under_way, bytes: 0, answered: 0, hold: None }
    }

    /// Sends `rpc`, or keeps it for the next one to carry (A5).
    fn push(&mut self, rpc: AppendEntriesRequest<TypeConfig<R>>, cx: &mut Context<'_>) {
        let prev = rpc.prev_log_id;
        let last = rpc.entries.last().map(|e| e.log_id).or(prev);
        // The first one of a stream is how openraft finds out where the peer's log ends.
        let is_news = rpc.entries.is_empty() && (self.answered > 0 || !self.under_way.is_empty());
        self.under_way.push_back(UnderWay { prev, last, bytes: 0, rpc: Some(rpc), call: None, answer: None });
        if !is_news {
            self.begin(self.under_way.len() - 1, cx);
        }
    }

    /// Gives the request at `at` to the transport.
    fn begin(&mut self, at: usize, cx: &mut Context<'_>) {
        let request = &mut self.under_way[at];
        let Some(rpc) = request.rpc.take() else { return };
        // It carries what was held.
        self.hold = None;
        let body = self.network.body(&rpc);
        request.bytes = body.len();
        self.bytes += request.bytes;
        // A heartbeat, or the news of a commit to a peer that has nothing to do: it waits for no disk, and takes no turn
        // behind entries that do. openraft gives every append the time of a heartbeat; entries wait for the follower's
        // disk, and a slow one is no reason to send them again.
        let (method, timeout) = if rpc.entries.is_empty() {
            (method::APPEND, self.idle_timeout)
        } else {
            (method::APPEND_IN_TURN, APPEND_TIMEOUT)
        };
        let mut call = self.network.append(method, body, timeout, Sent::of(&rpc)).boxed();
        // The first poll queues it at the transport: so the order of requests is that of these calls.
        match call.poll_unpin(cx) {
            Poll::Ready(answer) => request.answer = Some(answer),
            Poll::Pending => request.call = Some(call),
        }
    }

    /// The answer that counts for the first request, and how many requests stand before the one that it is an answer to.
    fn first_answer(&mut self, cx: &mut Context<'_>) -> Poll<(usize, Answer<R>)> {
        let last = self.under_way[0].last;
        // Those that openraft takes for answered together (A6); they are counted from the last of them.
        let newest = self.under_way.iter().take_while(|request| request.last == last).count() - 1;
        for at in 0..newest {
            if self.under_way[at].rpc.is_some() {
                continue;
            }
            match std::task::ready!(self.poll_answer(at, cx)) {
                Ok(AppendEntriesResponse::Success) => {
                    self.under_way[at].answer = Some(Ok(AppendEntriesResponse::Success));
                }
                other => return Poll::Ready((at, other)),
            }
        }
        let sent = (newest..self.under_way.len()).find(|at| self.under_way[*at].rpc.is_none());
        let at = match sent {
            Some(at) => at,
            None => {
                std::task::ready!(self.poll_hold(newest, cx));
                // Nothing carries them: the newest goes by itself.
                self.begin(newest, cx);
                newest
            }
        };
        self.poll_answer(at, cx).map(|answer| (at, answer))
    }

    /// Whether the news in the requests up to `newest` has waited long enough.
    fn poll_hold(&mut self, newest: usize, cx: &mut Context<'_>) -> Poll<()> {
        // The answer to entries waits for the news behind them (A6), and so may their commit; a full queue keeps entries out.
        let delays = self.under_way.len() == APPENDS_MAX || self.under_way.range(..=newest).any(|r| r.rpc.is_none());
        if delays || self.input.is_none() || self.network.hurry.count.load(Ordering::SeqCst) > 0 {
            return Poll::Ready(());
        }
        let hurry = &self.network.hurry;
        let hold = self.hold.get_or_insert_with(|| {
            let hurry = hurry.clone();
            async move {
                let begun = std::pin::pin!(hurry.begun.notified());
                // Whoever hurries from here on wakes it.
                if hurry.count.load(Ordering::SeqCst) == 0 {
                    let over = std::pin::pin!(R::sleep(NEWS_HOLD));
                    let _ = R::select2(begun, over).await;
                }
            }
            .boxed()
        });
        hold.poll_unpin(cx)
    }

    /// The answer to a request that was sent.
    fn poll_answer(&mut self, at: usize, cx: &mut Context<'_>) -> Poll<Answer<R>> {
        let request = &mut self.under_way[at];
        if let Some(answer) = request.answer.take() {
            return Poll::Ready(answer);
        }
        let call = request.call.as_mut().expect("what was sent and is not answered has a call");
        let answer = std::task::ready!(call.poll_unpin(cx));
        request.call = None;
        Poll::Ready(answer)
    }

    fn end(&mut self) {
        self.input = None;
        self.under_way.clear();
    }

    #[allow(
        clippy::result_large_err,
        reason = "openraft's error may name a member with all that is said of it; it is rare"
    )]
    fn judge(&mut self, done: UnderWay<R>, answer: Answer<R>) -> Result<Matched<R>, RPCError<TypeConfig<R>>> {
        self.bytes -= done.bytes;
        let first = self.answered == 0;
        self.answered += 1;
        let answer = answer.map_err(|e| rpc_error(&e)).inspect_err(|_| self.end())?;
        if answer.is_conflict() && (!first || done.prev.is_none()) {
            self.end();
            let message = "an append overtook the one before it, or the peer answered out of turn";
            return Err(RPCError::Network(NetworkError::from_string(message)));
        }
        let result = answer.into_stream_result(done.prev, done.last);
        if !matches!(&result, Ok(matched) if *matched == done.last) {
            self.end();
        }
        if matches!(&result, Ok(matched) if *matched < done.prev || done.last < *matched) {
            return Err(RPCError::Network(NetworkError::from_string("a peer acknowledged what it was not sent")));
        }
        Ok(result)
    }
}

pub(crate) type Matched<R> = StreamAppendResult<TypeConfig<R>>;

impl<R, S> Stream for Pipeline<'_, R, S>
where
    R: Runtime,
    S: Stream<Item = AppendEntriesRequest<TypeConfig<R>>> + Unpin,
{
    type Item = Result<Matched<R>, RPCError<TypeConfig<R>>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while this.under_way.len() < APPENDS_MAX
            && this.bytes < APPEND_BYTES_MAX
            && let Some(input) = &mut this.input
        {
            match input.poll_next_unpin(cx) {
                Poll::Ready(Some(rpc)) => this.push(rpc, cx),
                Poll::Ready(None) => this.input = None,
                Poll::Pending => break,
            }
        }
        if this.under_way.is_empty() {
            return if this.input.is_none() { Poll::Ready(None) } else { Poll::Pending };
        }
        // Those behind the first that was sent are looked at when their turn comes (A1).
        let (at, answer) = std::task::ready!(this.first_answer(cx));
        let done = this.under_way.pop_front().expect("it is not empty");
        if at > 0 && done.rpc.is_none() && !matches!(answer, Ok(AppendEntriesResponse::Success) | Err(_)) {
            // It has been acknowledged itself: a conflict of what came behind it is none of its own (A4).
            this.end();
            let message = "a peer took back what it had acknowledged, or answered out of turn";
            return Poll::Ready(Some(Err(RPCError::Network(NetworkError::from_string(message)))));
        }
        if at > 0 && matches!(answer, Ok(AppendEntriesResponse::Success)) {
            // Carried by a later one, which is answered next.
            this.under_way[at - 1].answer = Some(answer);
            return Poll::Ready(Some(this.judge(done, Ok(AppendEntriesResponse::Success))));
        }
        Poll::Ready(Some(this.judge(done, answer)))
    }
}
