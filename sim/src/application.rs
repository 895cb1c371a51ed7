//! What an embedder brings into a world: a state machine, what clients ask of it, and the judgement of what they saw.
//!
//! # Place
//! beside the world, which calls it; [`crate::transactions`] is the one that every seed has, `examples/bank.rs` another
//! # Invariants
//! - A1. The state machine runs on every replica, in the order of the log, and reads nothing but the command and the store:
//!   the digests of tables tell when it does not.
//! - A2. All that a client decides comes from [`Session::below`]: then one seed is one run.
//! - A3. `Refused`, `Failed` and `Unknown` mean what they say; a history that treats `Unknown` as `Failed` accuses the
//!   store of what it never promised.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{CommandBody, LogIndex, MAIN, Snapshot, StateMachine};
use mainstay_replication::{Durability, Error, ErrorKind, ReadLevel, Write};

use crate::check::Stamp;
use crate::rt::SimRng;
use crate::world::{Called, Cluster, Notes};

/// A future of an application: it borrows what the world lent it.
pub type Step<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// An embedder's state machine with its clients and its checks. One value serves one world: what it notes belongs to one
/// seed.
pub trait Application: Send + Sync + 'static {
    /// The state machine of one life of a node.
    fn state_machine(&self) -> Arc<dyn StateMachine>;

    /// One step of a client, called again and again while faults come and go.
    fn step<'a>(&'a self, session: &'a mut Session) -> Step<'a, ()>;

    /// After the faults, once for each replica: reads through it (the session calls this replica and no other) and notes
    /// what it holds.
    ///
    /// # Errors
    /// What is wrong: the seed fails with it.
    fn look<'a>(&'a self, session: &'a mut Session) -> Step<'a, Result<(), String>>;

    /// The last word, when every replica was looked at.
    ///
    /// # Errors
    /// What is wrong with the history.
    fn judge(&self) -> Result<(), String>;
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Applied at this index; the state machine answered so.
    Done(LogIndex, Bytes),
    /// Applied, and the state machine said no: nothing was written.
    Refused(String),
    /// It certainly was not applied.
    Failed,
    /// It may have been applied, or may still be.
    Unknown,
}

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A client of the application.
pub struct Session {
    id: u64,
    cluster: Arc<Cluster>,
    notes: Arc<Notes>,
    rng: SimRng,
    fixed: Option<usize>,
}

impl Session {
    pub(crate) fn new(id: u64, cluster: &Arc<Cluster>, notes: &Arc<Notes>, rng: SimRng) -> Self {
        Self { id, cluster: cluster.clone(), notes: notes.clone(), rng, fixed: None }
    }

    /// From now on all calls go to this replica.
    pub(crate) fn fix(&mut self, node: usize) {
        self.fixed = Some(node);
    }

    /// The number of the client; sessions that look after the faults have numbers of their own.
    pub fn client(&self) -> u64 {
        self.id
    }

    /// A number below `bound`, from the seed.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.rng.below(bound)
    }

    /// The next instant of the history: no two are equal, over all clients.
    pub fn stamp(&self) -> Stamp {
        self.notes.stamp()
    }

    /// A number that nobody else was given.
    pub fn unique(&self) -> u64 {
        self.notes.value()
    }

    /// Counts something for the summary of the run.
    pub fn count(&self, what: &'static str) {
        self.notes.count(what);
    }

    fn node(&mut self) -> usize {
        let any = self.rng.below(self.cluster.size() as u64) as usize;
        self.fixed.unwrap_or(any)
    }

    /// Has the state machine decide about a command, through some replica, and waits at most two seconds of virtual time.
    pub async fn propose(&mut self, command: Bytes) -> Answer {
        let node = self.node();
        let called = self
            .cluster
            .call(node, PATIENCE, move |node| {
                Box::pin(async move {
                    let body = CommandBody::Custom { branch: MAIN, command };
                    node.write(Write { body, durability: Durability::Quorum }).await
                })
            })
            .await;
        match called {
            Called::Down => Answer::Failed,
            Called::Lost => Answer::Unknown,
            Called::Answered(Ok(applied)) => match applied.response {
                Ok(response) => Answer::Done(applied.index, response),
                Err(e) => Answer::Refused(e.to_string()),
            },
            Called::Answered(Err(e)) if was_not_applied(e.kind()) => Answer::Failed,
            Called::Answered(Err(_)) => Answer::Unknown,
        }
    }

    /// Reads a view of the main branch at `level` through some replica. `None` when there was no answer in time, or none
    /// but that it cannot be read now.
    pub async fn read<T: Send + 'static>(
        &mut self,
        level: ReadLevel,
        read: impl FnOnce(Snapshot) -> Step<'static, Result<T, mainstay_engine::Error>> + Send + 'static,
    ) -> Option<T> {
        let node = self.node();
        let called = self
            .cluster
            .call(node, PATIENCE, move |node| {
                Box::pin(async move {
                    let snapshot = node.snapshot("main", level).await?;
                    read(snapshot).await.map_err(Error::from)
                })
            })
            .await;
        match called {
            Called::Answered(Ok(value)) => Some(value),
            Called::Answered(Err(e))
                if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Internal) && !self.cluster.is_damaged(node) =>
            {
                self.cluster.problem(format!("the application read from n{node}: {:?}: {e}", e.kind()));
                None
            }
            Called::Answered(Err(_)) | Called::Down | Called::Lost => None,
        }
    }

    /// Waits, in virtual time.
    pub async fn pause(&mut self, length: Duration) {
        self.cluster.executor.sleep_until(self.cluster.executor.now() + length).await;
    }
}

/// True for errors that promise that the write was not applied (docs/replication.md).
pub(crate) fn was_not_applied(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotLeader
            | ErrorKind::Unavailable
            | ErrorKind::Unsupported
            | ErrorKind::Invalid
            | ErrorKind::NotFound
            | ErrorKind::OutOfSpace
            | ErrorKind::Closed
    )
}
