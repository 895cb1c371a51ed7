//! Writes whose client waits as long as it takes: what they were told in the end is compared with what is there.
//!
//! The other clients give up after two seconds, and what they then do not know may be anything. The answers that come
//! late are those of a leader that was cut off and finds, when it hears the others again, that another has led meanwhile:
//! its entries are cut from its log, or are behind a snapshot that it takes over. Such a write may have been kept by the
//! others, and must not be called refused.
//!
//! Each write is the only one to its key, so every answer can be held against the last state.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{CommandBody, KeyspaceId, MAIN, WriteBatch, WriteOp};
use mainstay_replication::{Durability, Error, ErrorKind, ReadLevel, Write};

use super::cluster::{Called, Cluster, NO_FLOOD, SimNode};
use super::workload::Notes;
use crate::application::was_not_applied;
use crate::rt::{Group, SimRng};
use crate::value::{LONG, decode, encode};

/// Longer than any node waits for the commit of a write.
const PATIENCE: Duration = Duration::from_secs(15);
/// Writes on their way at once.
const PENDING_MAX: usize = 128;
/// Long values for one node that hears nobody: together longer than the log that its peers keep.
const FLOOD_MAX: u64 = 256;
/// Long ones on their way at once.
const LONG_PENDING_MAX: usize = 6;
/// The keyspace that every node begins with.
const SHARED: KeyspaceId = KeyspaceId(0);

/// What a client was told of its write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// No answer yet.
    Pending,
    /// It is there.
    Done,
    /// It certainly is not and never will be.
    Refused,
    /// It may be there.
    Unknown,
}

/// All inserts of a world into one group.
pub(crate) struct Inserts {
    /// The name of one beside the first, which whoever writes or reads makes if it is not there.
    group: Option<&'static str>,
    all: Mutex<BTreeMap<u64, (Told, String)>>,
}

fn key(n: u64) -> Bytes {
    Bytes::from(format!("insert-{n:012}"))
}

/// The handle of the group.
async fn enter(node: SimNode, group: Option<&'static str>) -> Result<SimNode, Error> {
    match group {
        Some(name) => Ok(Arc::new(node.create_group(name).await?)),
        None => Ok(node),
    }
}

impl Inserts {
    pub(crate) fn into_group(group: Option<&'static str>) -> Arc<Self> {
        Arc::new(Self { group, all: Mutex::default() })
    }

    fn set(&self, n: u64, told: Told, why: String) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).insert(n, (told, why));
    }

    /// Writes from `first` on that have no answer yet.
    fn pending(&self, first: u64) -> usize {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.range(first..).filter(|(_, (told, _))| *told == Told::Pending).count()
    }

    /// Inserts until it is told to stop, mostly through whoever leads, and waits for the last answer.
    pub(crate) async fn run(self: Arc<Self>, cluster: Arc<Cluster>, notes: Arc<Notes>, mut rng: SimRng) {
        let pause_max = rng.range(5_000, 60_000);
        let mut flooded = 0;
        for n in 0.. {
            let deaf = cluster.flood.load(Ordering::Relaxed);
            let leader = cluster.leader();
            flooded = if deaf == NO_FLOOD { 0 } else { flooded };
            // First the one that hears nobody takes writes, then, once another leads, that one takes many.
            let long = deaf != NO_FLOOD && leader.is_some_and(|leader| leader != deaf) && flooded < FLOOD_MAX;
            flooded += u64::from(long);
            let pause = Duration::from_micros(rng.below(if long { 4_000 } else { pause_max }));
            cluster.executor.sleep_until(cluster.executor.now() + pause).await;
            if notes.stop.load(Ordering::Relaxed) {
                break;
            }
            if self.pending(0) >= PENDING_MAX || long && self.pending(LONG) >= LONG_PENDING_MAX {
                continue;
            }
            let any = rng.below(cluster.size() as u64) as usize;
            let node = if long || rng.chance(700) { leader.unwrap_or(any) } else { any };
            let n = if long { LONG + n } else { n };
            self.set(n, Told::Pending, String::new());
            let (me, on, notes) = (self.clone(), cluster.clone(), notes.clone());
            let task = Box::pin(async move {
                let (told, why) = insert(&on, node, me.group, n).await;
                notes.count(match told {
                    Told::Done => "inserts",
                    Told::Refused => "inserts refused",
                    Told::Pending | Told::Unknown => "inserts unknown",
                });
                me.set(n, told, format!("n{node}: {why}"));
            });
            drop(cluster.executor.spawn(Group::WORLD, "insert", task));
        }
        while self.pending(0) > 0 {
            cluster.executor.sleep_until(cluster.executor.now() + Duration::from_millis(20)).await;
        }
    }

    /// Compares every answer with what a member holds.
    ///
    /// # Errors
    /// The first answer that was not so, or that the member cannot be read.
    pub(crate) async fn check(&self, cluster: &Arc<Cluster>, i: usize) -> Result<(), String> {
        let group = self.group;
        let called = cluster
            .call(i, Duration::from_secs(60), move |node| {
                Box::pin(async move {
                    let node = enter(node, group).await.map_err(|e| e.to_string())?;
                    let snapshot = node.snapshot("main", ReadLevel::Linearizable).await.map_err(|e| e.to_string())?;
                    let (low, high) = (Bytes::from_static(b"insert-"), Bytes::from_static(b"insert."));
                    let mut scan = snapshot.range(SHARED, Bound::Included(low), Bound::Excluded(high));
                    let mut found = BTreeMap::new();
                    while let Some((key, value)) = scan.next().await.map_err(|e| e.to_string())? {
                        found.insert(key, decode(&value)?);
                    }
                    Ok::<_, String>(found)
                })
            })
            .await;
        let mut found = match called {
            Called::Answered(found) => found.map_err(|e| format!("the scan of inserts on n{i}: {e}"))?,
            Called::Down | Called::Lost => return Err(format!("the scan of inserts on n{i}: no answer")),
        };
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        for (n, (told, why)) in all.iter() {
            let there = match found.remove(&key(*n)) {
                None => false,
                Some(value) if value == *n => true,
                Some(value) => return Err(format!("insert {n} on n{i} holds {value}")),
            };
            match told {
                Told::Done if !there => return Err(format!("insert {n} was acknowledged ({why}) and is not on n{i}")),
                Told::Refused if there => {
                    return Err(format!("insert {n} was called not applied ({why}) and is on n{i}"));
                }
                Told::Pending => return Err(format!("insert {n} was not answered")),
                Told::Done | Told::Refused | Told::Unknown => {}
            }
        }
        match found.first_key_value() {
            None => Ok(()),
            Some((key, _)) => Err(format!("n{i} holds {}, which nobody wrote", String::from_utf8_lossy(key))),
        }
    }
}

async fn insert(cluster: &Cluster, node: usize, group: Option<&'static str>, n: u64) -> (Told, String) {
    let op = WriteOp::Put { keyspace: SHARED, key: key(n), value: encode(n) };
    let body = CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![op] });
    let called = cluster
        .call(node, PATIENCE, move |node| {
            Box::pin(async move {
                // What is not entered is not written, whatever became of the birth.
                let entered =
                    enter(node, group).await.map_err(|e| Error::new(ErrorKind::Unavailable, e.to_string()))?;
                let applied = entered.write(Write { body, durability: Durability::Quorum }).await?;
                applied.response.map_err(Error::from)
            })
        })
        .await;
    match called {
        Called::Answered(Ok(_)) => (Told::Done, String::new()),
        Called::Answered(Err(e)) if was_not_applied(e.kind()) => (Told::Refused, format!("{:?}: {e}", e.kind())),
        Called::Answered(Err(e)) => (Told::Unknown, format!("{:?}: {e}", e.kind())),
        Called::Down => (Told::Refused, "it was down".to_owned()),
        Called::Lost => (Told::Unknown, "no answer".to_owned()),
    }
}
