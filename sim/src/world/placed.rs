//! Registers of a keyspace placed on groups, read and written while their ranges are split, joined and moved by movers that die.
//!
//! They are in the history of registers beside those of the first group, so one check judges them: a write that two groups took, or
//! none kept, or a read of the group that has given a range away, is no order of anything.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::BoxFuture;
use mainstay_replication::{Durability, Error, ErrorKind, Placed, PlacedOp, ReadLevel};
use openraft_rt::AsyncRuntime;

use super::cluster::{Called, Cluster};
use super::workload::Notes;
use crate::application::was_not_applied;
use crate::check::{Action, Operation, Outcome};
use crate::rt::{SimRng, SimRuntime};
use crate::value::{decode, encode};

/// The keyspace.
const NAME: &str = "placed";
/// The group beside the first that ranges go to. A third one would be more to choose from, and more votes in the smallest rings.
const GROUPS: [&str; 1] = ["aside"];
/// Its registers.
const REGISTERS: u64 = 6;
/// Where they begin among all registers of the history.
const FIRST_REGISTER: u64 = 1000;
/// Clients of one world.
pub(crate) const CLIENTS: u64 = 3;
/// Longer than a write looks for the group of its range.
const PATIENCE: Duration = Duration::from_secs(12);

/// One client of it.
pub(crate) struct PlacedClient {
    id: u64,
    cluster: Arc<Cluster>,
    notes: Arc<Notes>,
    rng: SimRng,
}

fn register(n: u64) -> Bytes {
    Bytes::from(format!("r{n}"))
}

impl PlacedClient {
    pub(crate) fn new(id: u64, cluster: &Arc<Cluster>, notes: &Arc<Notes>, rng: SimRng) -> Self {
        Self { id: FIRST_REGISTER + id, cluster: cluster.clone(), notes: notes.clone(), rng }
    }

    /// Reads, writes and moves until it is told to stop.
    pub(crate) async fn run(mut self) {
        while !self.notes.stop.load(Ordering::Relaxed) {
            let pause = Duration::from_micros(self.rng.range(1_000, 80_000));
            self.cluster.executor.sleep_until(self.cluster.executor.now() + pause).await;
            let node = self.rng.below(self.cluster.size() as u64) as usize;
            match self.rng.below(100) {
                0..45 => self.write(node).await,
                45..80 => {
                    let n = self.rng.below(REGISTERS);
                    // Who gets no answer has seen nothing.
                    let _ = read(&self.cluster, &self.notes, node, n, self.id).await;
                }
                80..88 => self.reshape(node).await,
                _ => self.hand_over(node).await,
            }
        }
    }

    async fn write(&mut self, node: usize) {
        let (n, value) = (self.rng.below(REGISTERS), self.notes.value());
        let invoked = self.notes.stamp();
        let ops = vec![PlacedOp::Put { key: register(n), value: encode(value) }];
        let called = on(&self.cluster, node, move |placed| {
            Box::pin(async move { placed.write(ops, Durability::Quorum).await.map(drop) })
        })
        .await;
        let outcome = match &called {
            Called::Down => Outcome::Failed,
            Called::Answered(Ok(())) => Outcome::Done(self.notes.stamp()),
            Called::Answered(Err(e)) if was_not_applied(e.kind()) => Outcome::Failed,
            Called::Answered(Err(_)) | Called::Lost => Outcome::Unknown,
        };
        self.notes.count(match outcome {
            Outcome::Done(_) => "placed writes",
            Outcome::Failed => "placed writes refused",
            Outcome::Unknown => "placed writes unknown",
        });
        let (key, action) = (FIRST_REGISTER + n, Action::Write(value));
        self.notes.record(Operation { key, action, invoked, outcome, client: self.id });
    }

    /// Splits or joins somewhere.
    async fn reshape(&mut self, node: usize) {
        let key = register(self.rng.below(REGISTERS));
        let split = self.rng.chance(600);
        let called = on(&self.cluster, node, move |placed| {
            Box::pin(async move { if split { placed.split(&key).await } else { placed.join(&key).await } })
        })
        .await;
        self.must_be_about_the_weather(node, &called, &[ErrorKind::Invalid]);
        if matches!(called, Called::Answered(Ok(()))) {
            self.notes.count(if split { "splits" } else { "joins" });
        }
    }

    /// Moves a range, and dies in the middle of it every other time.
    async fn hand_over(&mut self, node: usize) {
        let key = register(self.rng.below(REGISTERS));
        let to = GROUPS.get(self.rng.below(GROUPS.len() as u64 + 1) as usize).copied();
        let life = if self.rng.chance(500) { self.rng.range(1_000, 400_000) } else { PATIENCE.as_micros() as u64 };
        let called = on(&self.cluster, node, move |placed| {
            Box::pin(async move {
                let moving = placed.move_range(&key, to);
                match SimRuntime::timeout(Duration::from_micros(life), moving).await {
                    Ok(moved) => moved,
                    Err(_) => Err(Error::new(ErrorKind::Unavailable, "the mover died")),
                }
            })
        })
        .await;
        self.must_be_about_the_weather(node, &called, &[ErrorKind::NotFound]);
        if matches!(called, Called::Answered(Ok(()))) {
            self.notes.count("moves");
        }
    }

    /// What went wrong may come from the faults, or be one of these.
    fn must_be_about_the_weather(&self, node: usize, called: &Called<Result<(), Error>>, others: &[ErrorKind]) {
        use ErrorKind::{Closed, Indeterminate, Io, NotLeader, OutOfSpace, Unavailable};
        if let Called::Answered(Err(e)) = called
            && !matches!(e.kind(), Closed | Indeterminate | Io | NotLeader | OutOfSpace | Unavailable)
            && !others.contains(&e.kind())
            && !(e.kind() == ErrorKind::Corrupt && self.cluster.is_damaged(node))
        {
            self.cluster.problem(format!("ranges were changed through n{node}: {:?}: {e}", e.kind()));
        }
    }
}

/// Runs an operation on the handle of a node.
async fn on<T: Send + 'static>(
    cluster: &Cluster,
    node: usize,
    operation: impl FnOnce(Placed<SimRuntime>) -> BoxFuture<Result<T, Error>> + Send + 'static,
) -> Called<Result<T, Error>> {
    cluster
        .call(node, PATIENCE, move |node| {
            Box::pin(async move {
                for name in GROUPS {
                    // What is not there is not used: nothing is written then, whatever became of the birth.
                    let made = node.create_group(name).await;
                    made.map_err(|e| Error::new(ErrorKind::Unavailable, e.to_string()))?;
                }
                let placed = node.placed(NAME).await;
                operation(placed.map_err(|e| Error::new(ErrorKind::Unavailable, e.to_string()))?).await
            })
        })
        .await
}

/// Reads a register and writes down what it saw.
async fn read(cluster: &Cluster, notes: &Notes, node: usize, n: u64, client: u64) -> Result<(), String> {
    let invoked = notes.stamp();
    let called = on(cluster, node, move |placed| {
        Box::pin(async move { placed.get(&register(n), ReadLevel::Linearizable).await })
    })
    .await;
    let value = match called {
        Called::Answered(Ok(value)) => value.map(|value| decode(&value)).transpose()?,
        Called::Answered(Err(e)) => return Err(format!("{:?}: {e}", e.kind())),
        Called::Down | Called::Lost => return Err("no answer".to_owned()),
    };
    notes.count("placed reads");
    let (key, outcome) = (FIRST_REGISTER + n, Outcome::Done(notes.stamp()));
    notes.record(Operation { key, action: Action::Read(value), invoked, outcome, client });
    Ok(())
}

/// Reads all registers through a member in good weather, and looks at the ranges: each key has a holder.
///
/// # Errors
/// What is not so.
pub(crate) async fn check(cluster: &Arc<Cluster>, notes: &Notes, i: usize) -> Result<(), String> {
    for n in 0..REGISTERS {
        read(cluster, notes, i, n, FIRST_REGISTER)
            .await
            .map_err(|e| format!("the last read of placed register {n} on n{i}: {e}"))?;
    }
    let called = on(cluster, i, |placed| {
        Box::pin(async move {
            // Whatever is on its way arrives.
            for n in 0..REGISTERS {
                placed.move_range(&register(n), Some(GROUPS[0])).await?;
            }
            placed.ranges().await
        })
    })
    .await;
    let ranges = match called {
        Called::Answered(ranges) => ranges.map_err(|e| format!("the last moves through n{i}: {:?}: {e}", e.kind()))?,
        Called::Down | Called::Lost => return Err(format!("the last moves through n{i}: no answer")),
    };
    let mut at = Some(Bytes::new());
    for range in &ranges {
        if at.as_ref() != Some(&range.first) || range.is_moving {
            return Err(format!("ranges do not follow each other, or one is on its way: {ranges:?}"));
        }
        at.clone_from(&range.end);
    }
    if at.is_some() { Err(format!("nobody holds the last keys: {ranges:?}")) } else { Ok(()) }
}
