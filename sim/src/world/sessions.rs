//! Pairs that expire, under clocks that differ and jump: what has not ended is there, what has ended does not come back, and in
//! the end all of it is gone although nobody writes.
//!
//! Each key is put once. When it ends depends on the clocks of those who led, so a read in between may find it or not; that replicas agree
//! at one index is judged with everything else that they hold.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{CommandBody, KeyspaceId, MAIN, WriteBatch, WriteOp};
use mainstay_replication::{Durability, Error, ReadLevel, Write};

use super::cluster::{Called, Cluster, WALL_SPREAD_MAX};
use super::workload::Notes;
use crate::application::was_not_applied;
use crate::rt::SimRng;
use crate::value::{decode, encode};

/// One world in so many has them.
const WORLDS: u64 = 4;
const NAME: &str = "sessions";
const PATIENCE: Duration = Duration::from_secs(2);
/// A wall clock that is further ahead than a jump takes any.
const BEYOND_JUMPS: Duration = Duration::from_secs(2 * 3600);

/// What the client was told of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Done,
    Refused,
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Session {
    told: Told,
    /// None for ever.
    ttl: Option<Duration>,
    /// When the put began.
    begun: Duration,
    /// It was there, and a read did not find it any more.
    gone: bool,
}

/// The client, and what it knows.
pub(crate) struct Sessions {
    cluster: Arc<Cluster>,
    notes: Arc<Notes>,
    rng: SimRng,
    keyspace: Option<KeyspaceId>,
    all: BTreeMap<u64, Session>,
}

/// Whether the world of a seed has such a client. Not drawn from its stream, so that worlds without are what they were.
pub(super) fn are_in(seed: u64) -> bool {
    SimRng::new(!seed).below(WORLDS) == 0
}

fn key(n: u64) -> Bytes {
    Bytes::from(format!("session-{n:08}"))
}

impl Sessions {
    pub(crate) fn new(cluster: &Arc<Cluster>, notes: &Arc<Notes>, rng: SimRng) -> Self {
        Self { cluster: cluster.clone(), notes: notes.clone(), rng, keyspace: None, all: BTreeMap::new() }
    }

    /// Works until it is told to stop, and returns itself for the final check.
    pub(crate) async fn run(mut self) -> Self {
        let pause_max = self.rng.range(5_000, 100_000);
        for n in 0.. {
            let pause = Duration::from_micros(self.rng.below(pause_max));
            self.cluster.executor.sleep_until(self.cluster.executor.now() + pause).await;
            if self.notes.stop.load(Ordering::Relaxed) {
                break;
            }
            let node = self.rng.below(self.cluster.size() as u64) as usize;
            match self.keyspace {
                None => self.keyspace = self.make(node).await,
                Some(keyspace) if self.rng.chance(600) => self.put(node, keyspace, n).await,
                Some(keyspace) => self.read(node, keyspace).await,
            }
        }
        self
    }

    async fn make(&self, node: usize) -> Option<KeyspaceId> {
        let called = self
            .cluster
            .call(node, PATIENCE, |node| {
                Box::pin(async move {
                    let body = CommandBody::CreateExpiring { name: NAME.to_owned() };
                    node.write(Write { body, durability: Durability::Quorum }).await?.response.map_err(Error::from)
                })
            })
            .await;
        let Called::Answered(Ok(id)) = called else { return None };
        Some(KeyspaceId(u32::from_le_bytes(*id.first_chunk()?)))
    }

    async fn put(&mut self, node: usize, keyspace: KeyspaceId, n: u64) {
        let ttl = (!self.rng.chance(100)).then(|| Duration::from_millis(self.rng.range(1, 8_000)));
        let (key, value) = (key(n), encode(n));
        let op = match ttl {
            Some(ttl) => WriteOp::PutFor { keyspace, key, value, ttl_ms: ttl.as_millis() as u64 },
            None => WriteOp::Put { keyspace, key, value },
        };
        let body = CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![op] });
        let begun = self.cluster.executor.now();
        let called = self
            .cluster
            .call(node, PATIENCE, move |node| {
                Box::pin(async move {
                    node.write(Write { body, durability: Durability::Quorum }).await?.response.map_err(Error::from)
                })
            })
            .await;
        let told = match called {
            Called::Answered(Ok(_)) => Told::Done,
            Called::Answered(Err(e)) if was_not_applied(e.kind()) => Told::Refused,
            Called::Down => Told::Refused,
            Called::Answered(Err(_)) | Called::Lost => Told::Unknown,
        };
        self.notes.count(if told == Told::Done { "sessions" } else { "sessions in doubt" });
        self.all.insert(n, Session { told, ttl, begun, gone: false });
    }

    /// Some that were put lately.
    async fn read(&mut self, node: usize, keyspace: KeyspaceId) {
        let lately: Vec<u64> = self.all.keys().rev().take(100).copied().collect();
        if lately.is_empty() {
            return;
        }
        let picked: Vec<u64> = (0..16).map(|_| *self.rng.pick(&lately)).collect();
        let keys: Vec<Bytes> = picked.iter().map(|n| key(*n)).collect();
        let called = self
            .cluster
            .call(node, PATIENCE, move |node| {
                Box::pin(async move {
                    let snapshot = node.snapshot("main", ReadLevel::Linearizable).await?;
                    let mut values = Vec::new();
                    for key in keys {
                        values.push(snapshot.get(keyspace, &key).await.map_err(Error::from)?);
                    }
                    Ok::<_, Error>(values)
                })
            })
            .await;
        let Called::Answered(Ok(values)) = called else { return };
        self.notes.count("sessions read");
        for (n, value) in picked.into_iter().zip(values) {
            if let Err(e) = self.judge(n, value) {
                self.cluster.problem(format!("session {n} on n{node}: {e}"));
            }
        }
    }

    fn judge(&mut self, n: u64, value: Option<Bytes>) -> Result<(), String> {
        let now = self.cluster.executor.now();
        let jumped = self.cluster.walls_jumped();
        let Some(session) = self.all.get_mut(&n) else { return Err("it was never put".to_owned()) };
        let shown = *session;
        match value {
            Some(value) if decode(&value)? != n => Err("it holds another value".to_owned()),
            Some(_) if session.told == Told::Refused => Err(format!("it was called not applied: {shown:?}")),
            Some(_) if session.gone => Err(format!("it came back at {now:?}: {shown:?}")),
            Some(_) => Ok(()),
            None if session.told != Told::Done => Ok(()),
            None => {
                session.gone = true;
                match session.ttl {
                    None => Err(format!("it is gone: {shown:?}")),
                    Some(ttl) if !jumped && now + WALL_SPREAD_MAX < session.begun + ttl => {
                        Err(format!("it is gone early, at {now:?}: {shown:?}"))
                    }
                    Some(_) => Ok(()),
                }
            }
        }
    }

    /// All clocks are set right, beyond any jump: what may end ends.
    pub(crate) fn set_walls(cluster: &Cluster) {
        (0..cluster.size()).for_each(|i| cluster.set_wall(i, BEYOND_JUMPS));
    }

    /// Once the cluster has come to rest behind [`Sessions::set_walls`].
    ///
    /// # Errors
    /// The first pair that is there or is not, and should not or should be.
    pub(crate) async fn check(&self, i: usize) -> Result<(), String> {
        let Some(keyspace) = self.keyspace else { return Ok(()) };
        let called = self
            .cluster
            .call(i, Duration::from_secs(60), move |node| {
                Box::pin(async move {
                    let snapshot = node.snapshot("main", ReadLevel::Linearizable).await.map_err(|e| e.to_string())?;
                    let mut scan = snapshot.range(keyspace, Bound::Unbounded, Bound::Unbounded);
                    let mut found = BTreeMap::new();
                    while let Some((key, value)) = scan.next().await.map_err(|e| e.to_string())? {
                        found.insert(key, decode(&value)?);
                    }
                    Ok::<_, String>(found)
                })
            })
            .await;
        let mut found = match called {
            Called::Answered(found) => found.map_err(|e| format!("the scan of sessions on n{i}: {e}"))?,
            Called::Down | Called::Lost => return Err(format!("the scan of sessions on n{i}: no answer")),
        };
        for (n, session) in &self.all {
            match found.remove(&key(*n)) {
                None if session.ttl.is_none() && session.told == Told::Done => {
                    return Err(format!("session {n} lives for ever and is not on n{i}: {session:?}"));
                }
                Some(_) if session.ttl.is_some() => {
                    return Err(format!("session {n} has not ended on n{i}: {session:?}"));
                }
                Some(_) if session.told == Told::Refused => {
                    return Err(format!("session {n} was called not applied and is on n{i}: {session:?}"));
                }
                _ => {}
            }
        }
        match found.first_key_value() {
            None => Ok(()),
            Some((key, _)) => Err(format!("n{i} holds {}, which nobody put", String::from_utf8_lossy(key))),
        }
    }
}
