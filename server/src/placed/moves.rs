//! Moves of ranges under way, each a task of its own.
//!
//! # Place
//! Between the RPC, which a client may drop at any time, and `mainstay::Placed::move_range`, whose future leaves a piece on its way
//! when it is dropped.
//!
//! # Invariants
//! 1. A move goes on until it ends or the process stops, whoever waits for it.
//! 2. Who asks for what is under way waits for that, and begins nothing.
//! 3. At most [`MOVES_MAX`] are under way. One more is refused at once.
//!
//! # Crash
//! What a process leaves half done is one piece on its way: the same call to any member goes on with it, and so does whoever reads or
//! writes there (docs/replication.md, "Ranges").

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay::{Error, ErrorKind, Placed, Result};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;

use crate::context::grpc_status;

/// Moves under way in one process.
const MOVES_MAX: usize = 16;
/// How often one is tried until it is given up. Each try waits for a leader by itself.
const TRIES_MAX: u32 = 5;
/// Pause before the next try.
const TRY_PAUSE: Duration = Duration::from_secs(1);

/// What is moved, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Move {
    pub(super) keyspace: String,
    /// A key of the range.
    pub(super) key: Bytes,
    /// None for the first group.
    pub(super) to: Option<String>,
}

/// None until it has ended.
type Outcome = watch::Receiver<Option<Result<()>>>;

/// See the module. Cloning shares it.
#[derive(Clone, Default)]
pub(crate) struct Moves(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    under_way: BTreeMap<Move, Outcome>,
    tasks: JoinSet<()>,
    stopping: bool,
}

/// Takes a move off the list, however its task ends.
struct Entry {
    moves: Moves,
    asked: Move,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.moves.state().under_way.remove(&self.asked);
    }
}

impl Moves {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of a move: the one that is under way, or else `work`, which goes on when this future is dropped.
    pub(super) async fn join<F>(&self, asked: Move, work: impl FnOnce() -> F) -> std::result::Result<(), Status>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let mut outcome = self.begin(asked, work)?;
        let ended = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        match ended {
            Ok(outcome) => outcome.unwrap_or(Ok(())).map_err(grpc_status),
            // Its task was ended before it said anything.
            Err(_) => Err(stopping()),
        }
    }

    fn begin<F>(&self, asked: Move, work: impl FnOnce() -> F) -> std::result::Result<Outcome, Status>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let mut state = self.state();
        if state.stopping {
            return Err(stopping());
        }
        if let Some(outcome) = state.under_way.get(&asked) {
            return Ok(outcome.clone());
        }
        if state.under_way.len() >= MOVES_MAX {
            let message = format!("mainstay: too many moves of ranges are under way here limit={MOVES_MAX}");
            return Err(Status::resource_exhausted(message));
        }
        while state.tasks.try_join_next().is_some() {}
        let (ended, outcome) = watch::channel(None);
        state.under_way.insert(asked.clone(), outcome.clone());
        let entry = Entry { moves: self.clone(), asked };
        let work = work();
        state.tasks.spawn(async move {
            let outcome = work.await;
            // Before anybody hears of the end: who asks again then begins anew.
            drop(entry);
            ended.send_replace(Some(outcome));
        });
        Ok(outcome)
    }

    /// Ends all moves. Those who wait are told to ask another member.
    pub(crate) async fn close(&self) {
        let mut tasks = {
            let mut state = self.state();
            state.stopping = true;
            std::mem::take(&mut state.tasks)
        };
        tasks.shutdown().await;
    }
}

fn stopping() -> Status {
    Status::unavailable("the server stops: part of the range may have moved, the same call to another member goes on")
}

/// Moves a range, and goes on where leaders have changed.
pub(super) async fn carry(placed: Placed, asked: Move) -> Result<()> {
    let Move { keyspace, key, to } = &asked;
    let shown = key.get(..64).unwrap_or(key).escape_ascii().to_string();
    let to_shown = to.as_deref().unwrap_or_default();
    tracing::info!(keyspace, key = shown, to = to_shown, "a range is moved");
    let moved = until_done(TRY_PAUSE, || placed.move_range(key, to.as_deref())).await;
    match &moved {
        Ok(()) => tracing::info!(keyspace, key = shown, to = to_shown, "a range has moved"),
        Err(error) => tracing::warn!(keyspace, key = shown, to = to_shown, %error, "a range has not moved as a whole"),
    }
    moved
}

/// Tries again what passes: no leader, no answer, others at the same ranges.
async fn until_done<F>(pause: Duration, mut work: impl FnMut() -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let passes = |error: &Error| {
        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::NotLeader | ErrorKind::Indeterminate)
    };
    for _ in 1..TRIES_MAX {
        match work().await {
            Err(error) if passes(&error) => {
                tracing::debug!(%error, "the move of a range is tried again");
                tokio::time::sleep(pause).await;
            }
            ended => return ended,
        }
    }
    work().await
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use futures_util::FutureExt;
    use tokio::sync::oneshot;
    use tonic::Code;

    fn to(group: usize) -> Move {
        Move { keyspace: "users".into(), key: "k".into(), to: Some(group.to_string()) }
    }

    async fn never() -> Result<()> {
        std::future::pending().await
    }

    /// The RPC is dropped when its client goes away, and took the mover with it: a piece stood on its way.
    #[tokio::test]
    async fn a_move_goes_on_without_who_asked_for_it_and_is_joined_by_who_asks_again() {
        let moves = Moves::default();
        let (end, ended) = oneshot::channel();
        let work = || async move { ended.await.expect("said below") };
        let asked = moves.join(to(1), work);
        {
            let mut asked = std::pin::pin!(asked);
            assert!(futures_util::poll!(asked.as_mut()).is_pending());
        }
        let begun = AtomicUsize::new(0);
        let again = || {
            begun.fetch_add(1, Ordering::Relaxed);
            never()
        };
        let mut waits = [Box::pin(moves.join(to(1), again)), Box::pin(moves.join(to(1), again))];
        for wait in &mut waits {
            assert!(futures_util::poll!(wait.as_mut()).is_pending());
        }
        let failure = Error::new(ErrorKind::NotFound, "no such group name=1");
        end.send(Err(failure)).expect("the task waits for it");
        for wait in waits {
            let status = wait.await.expect_err("as the work says");
            assert_eq!((status.code(), status.message()), (Code::NotFound, "no such group name=1"));
        }
        assert_eq!(begun.load(Ordering::Relaxed), 0, "it was joined, not begun again");
        // What has ended is begun anew.
        assert!(moves.join(to(1), || async { Ok(()) }).await.is_ok());
        assert!(moves.state().under_way.is_empty());
    }

    #[tokio::test]
    async fn one_move_too_many_is_refused_and_the_end_of_the_process_is_told() {
        let moves = Moves::default();
        let mut waits: Vec<_> = (0..MOVES_MAX).map(|n| Box::pin(moves.join(to(n), never))).collect();
        for wait in &mut waits {
            assert!(futures_util::poll!(wait.as_mut()).is_pending());
        }
        let refused = moves.join(to(MOVES_MAX), never).now_or_never().expect("at once").expect_err("no room");
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        moves.close().await;
        for wait in waits {
            assert_eq!(wait.await.expect_err("it was ended").code(), Code::Unavailable);
        }
        assert!(moves.state().under_way.is_empty());
        let late = moves.join(to(0), never).now_or_never().expect("at once").expect_err("nothing begins any more");
        assert_eq!(late.code(), Code::Unavailable);
    }

    #[tokio::test]
    async fn what_passes_is_tried_again_a_bounded_number_of_times() {
        let check = async |kinds: &[ErrorKind], tries: u32, expect: Option<ErrorKind>| {
            let mut tried = 0;
            let outcome = until_done(Duration::ZERO, || {
                let kind = kinds.get(tried as usize).copied();
                tried += 1;
                async move { kind.map_or(Ok(()), |kind| Err(Error::new(kind, "as told"))) }
            });
            assert_eq!(outcome.await.err().map(|error| error.kind()), expect, "{kinds:?}");
            assert_eq!(tried, tries, "{kinds:?}");
        };
        use ErrorKind::{Indeterminate, NotFound, Unavailable};
        check(&[], 1, None).await;
        check(&[Unavailable, Indeterminate], 3, None).await;
        check(&[Unavailable, NotFound], 2, Some(NotFound)).await;
        check(&[Unavailable; 9], TRIES_MAX, Some(Unavailable)).await;
    }
}
