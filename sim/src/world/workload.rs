//! What clients do: registers that all share, keys that each owns, pairs that move together, checkpoints and clones.
//!
//! Registers are judged by the checker of histories. The others carry a model of their own: a client is alone with its
//! keys, so it knows what they may hold.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{Applied, BranchId, CommandBody, KeyspaceId, LogIndex, MAIN, WriteBatch, WriteOp};
use mainstay_replication::{Durability, Error, ErrorKind, ReadLevel, Write};

use super::cluster::{Called, Cluster};
use crate::application::{Application, Session, was_not_applied};
use crate::check::{Action, Operation, Outcome};
use crate::rt::SimRng;
use crate::value::{decode, encode};

/// The keyspace of registers and pairs.
const SHARED: KeyspaceId = KeyspaceId(0);
/// Name of the keyspace of owned keys.
pub(crate) const OWNED: &str = "owned";
/// Registers that all clients write.
pub(crate) const REGISTERS: u64 = 8;
/// Keys of one client.
const OWNED_KEYS: u64 = 120;
/// Checkpoints and clones that one client keeps at a time.
const COPIES_MAX: usize = 3;

/// What all clients write down.
pub(crate) struct Notes {
    stamp: AtomicU64,
    value: AtomicU64,
    history: Mutex<Vec<Operation>>,
    pub(crate) stop: AtomicBool,
    /// Operations that were answered, by kind.
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Notes {
    pub(crate) fn new() -> Self {
        Self {
            stamp: AtomicU64::new(1),
            value: AtomicU64::new(1),
            history: Mutex::default(),
            stop: AtomicBool::new(false),
            counts: Mutex::default(),
        }
    }

    pub(crate) fn stamp(&self) -> u64 {
        self.stamp.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn value(&self) -> u64 {
        self.value.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn record(&self, operation: Operation) {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).push(operation);
    }

    pub(crate) fn history(&self) -> Vec<Operation> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
    }

    pub(crate) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub(crate) fn register(i: u64) -> Bytes {
    Bytes::from(format!("register-{i}"))
}

fn pair(i: u64) -> [Bytes; 2] {
    [Bytes::from(format!("pair-{i}-a")), Bytes::from(format!("pair-{i}-b"))]
}

fn put(keyspace: KeyspaceId, key: Bytes, value: u64) -> WriteOp {
    WriteOp::Put { keyspace, key, value: encode(value) }
}

/// How a write ended, by the contract of the error kinds.
fn outcome<T>(called: &Called<Result<T, Error>>, notes: &Notes) -> Outcome {
    match called {
        Called::Down => Outcome::Failed,
        Called::Lost => Outcome::Unknown,
        Called::Answered(Ok(_)) => Outcome::Done(notes.stamp()),
        Called::Answered(Err(e)) if was_not_applied(e.kind()) => Outcome::Failed,
        Called::Answered(Err(_)) => Outcome::Unknown,
    }
}

/// What one key may hold: the last certain state, and every write whose outcome is not known. Such a write may still be
/// on its way, so it stays possible for ever.
#[derive(Clone, Default, Debug)]
struct Possible {
    certain: Option<u64>,
    doubtful: BTreeSet<Option<u64>>,
    /// What was certain before, and until when.
    past: Vec<(Option<u64>, Duration)>,
}

impl Possible {
    fn apply(&mut self, value: Option<u64>, outcome: Outcome, now: Duration) {
        match outcome {
            Outcome::Done(_) => {
                self.past.push((self.certain, now));
                self.certain = value;
            }
            Outcome::Unknown => {
                self.doubtful.insert(value);
            }
            Outcome::Failed => {}
        }
    }

    fn holds(&self, value: Option<u64>) -> bool {
        self.certain == value || self.doubtful.contains(&value)
    }

    /// True for what may be seen by a read that may be as old as `since`.
    fn held_since(&self, value: Option<u64>, since: Duration) -> bool {
        self.holds(value) || self.past.iter().any(|(held, until)| *held == value && *until >= since)
    }
}

/// A checkpoint, or a clone made from one, and what the owner's keys may hold in it.
struct Copy {
    name: String,
    clone: Option<String>,
    /// The entry that made the checkpoint: what it shows ends there.
    index: LogIndex,
    keys: BTreeMap<Bytes, Possible>,
}

/// One client.
pub(crate) struct Client {
    id: u64,
    cluster: Arc<Cluster>,
    notes: Arc<Notes>,
    rng: SimRng,
    owned: BTreeMap<Bytes, Possible>,
    keyspace: KeyspaceId,
    copies: Vec<Copy>,
    copies_made: u64,
    application: Arc<dyn Application>,
    session: Session,
    /// The highest index at which a write of this client was acknowledged.
    acknowledged: LogIndex,
    /// The index of the last write that was acknowledged.
    last: LogIndex,
    /// The last operation had no effect.
    refused: bool,
}

const PATIENCE: Duration = Duration::from_secs(2);

impl Client {
    pub(crate) fn new(
        id: u64,
        cluster: &Arc<Cluster>,
        notes: &Arc<Notes>,
        application: &Arc<dyn Application>,
        mut rng: SimRng,
        keyspace: KeyspaceId,
    ) -> Self {
        let session = Session::new(id, cluster, notes, rng.fork());
        Self {
            id,
            cluster: cluster.clone(),
            notes: notes.clone(),
            rng,
            owned: BTreeMap::new(),
            keyspace,
            copies: Vec::new(),
            copies_made: 0,
            application: application.clone(),
            session,
            acknowledged: LogIndex(0),
            last: LogIndex(0),
            refused: false,
        }
    }

    /// Works until it is told to stop, and returns itself for the final checks.
    pub(crate) async fn run(mut self) -> Self {
        while !self.notes.stop.load(Ordering::Relaxed) {
            let node = self.rng.below(self.cluster.size() as u64) as usize;
            match self.rng.below(1000) {
                0..220 => self.write_register(node).await,
                220..420 => self.read_register(node).await,
                420..500 => self.write_pair(node).await,
                500..560 => self.read_pair(node).await,
                560..740 => self.write_owned(node).await,
                740..830 => self.read_owned(node).await,
                830..980 => self.application.clone().step(&mut self.session).await,
                980..990 => self.copy(node).await,
                _ => self.read_copy(node).await,
            }
            // Who is refused waits a little, as a client would.
            let refused = std::mem::take(&mut self.refused);
            if refused || self.rng.chance(300) {
                let pause = Duration::from_micros(self.rng.below(if refused { 20_000 } else { 5_000 }));
                self.cluster.executor.sleep_until(self.cluster.executor.now() + pause).await;
            }
        }
        self
    }

    async fn write(&mut self, node: usize, body: CommandBody) -> Outcome {
        // A leader answers at once what it alone has durable; the promise counts only once a quorum has it too.
        let local = self.rng.chance(100);
        let (cluster, life) = (self.cluster.clone(), self.cluster.group(node));
        let called = self
            .cluster
            .call(node, PATIENCE, move |replica| {
                Box::pin(async move {
                    if local {
                        let token = replica.write_local(body).await?;
                        cluster.promised(node, life, token);
                        return replica.wait(token, Durability::Quorum).await;
                    }
                    replica.write(Write { body, durability: Durability::Quorum }).await
                })
            })
            .await;
        let outcome = outcome(&called, &self.notes);
        match called {
            Called::Answered(Ok(Applied { index, response: Ok(_) })) => {
                self.acknowledged = self.acknowledged.max(index);
                self.last = index;
                self.notes.count("writes");
                outcome
            }
            // Applied and refused, the same on every replica.
            Called::Answered(Ok(Applied { response: Err(e), .. })) => {
                self.cluster.log(|| format!("client {} was refused: {e}", self.id));
                self.notes.count("refused");
                Outcome::Failed
            }
            _ => {
                self.refused = true;
                self.notes.count(if outcome == Outcome::Failed { "failed" } else { "unknown" });
                outcome
            }
        }
    }

    fn level(&mut self) -> ReadLevel {
        if self.rng.chance(200) { ReadLevel::Lease } else { ReadLevel::Linearizable }
    }

    /// Reads keys of one branch in one snapshot.
    async fn read(
        &mut self,
        node: usize,
        branch: &str,
        level: ReadLevel,
        keyspace: KeyspaceId,
        keys: Vec<Bytes>,
    ) -> Option<Vec<Option<u64>>> {
        let branch = branch.to_owned();
        let called = self
            .cluster
            .call(node, PATIENCE, move |node| {
                Box::pin(async move {
                    let snapshot = node.snapshot(&branch, level).await?;
                    let mut values = Vec::new();
                    for key in keys {
                        values.push(snapshot.get(keyspace, &key).await.map_err(Error::from)?);
                    }
                    Ok::<_, Error>(values)
                })
            })
            .await;
        self.judge_read(node, called)
    }

    fn judge_read(
        &mut self,
        node: usize,
        called: Called<Result<Vec<Option<Bytes>>, Error>>,
    ) -> Option<Vec<Option<u64>>> {
        match called {
            Called::Answered(Ok(values)) => {
                self.notes.count("reads");
                let decoded = values.iter().map(|v| v.as_ref().map(|v| decode(v)).transpose()).collect();
                match decoded {
                    Ok(values) => Some(values),
                    Err(e) => {
                        self.cluster.problem(format!("client {} read from n{node}: {e}", self.id));
                        None
                    }
                }
            }
            Called::Answered(Err(e)) if e.kind() == ErrorKind::Corrupt && self.cluster.is_damaged(node) => {
                self.notes.count("damage seen");
                self.refused = true;
                None
            }
            Called::Answered(Err(e)) if e.kind() == ErrorKind::Unsupported => {
                self.notes.count("unsupported");
                None
            }
            Called::Answered(Err(e)) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Internal) => {
                self.cluster.problem(format!("client {} read from n{node}: {:?}: {e}", self.id, e.kind()));
                None
            }
            _ => {
                self.refused = true;
                None
            }
        }
    }

    async fn write_register(&mut self, node: usize) {
        let key = self.rng.below(REGISTERS);
        let value = self.notes.value();
        let invoked = self.notes.stamp();
        let batch = WriteBatch { branch: MAIN, ops: vec![put(SHARED, register(key), value)] };
        let outcome = self.write(node, CommandBody::Batch(batch)).await;
        self.notes.record(Operation { key, action: Action::Write(value), invoked, outcome, client: self.id });
    }

    async fn read_register(&mut self, node: usize) {
        let key = self.rng.below(REGISTERS);
        let level = self.level();
        let invoked = self.notes.stamp();
        let Some(values) = self.read(node, "main", level, SHARED, vec![register(key)]).await else { return };
        let outcome = Outcome::Done(self.notes.stamp());
        let action = Action::Read(values.first().copied().flatten());
        self.notes.record(Operation { key, action, invoked, outcome, client: self.id });
    }

    async fn write_pair(&mut self, node: usize) {
        let value = self.notes.value();
        let [a, b] = pair(self.rng.below(4));
        let ops = vec![put(SHARED, a, value), put(SHARED, b, value)];
        self.write(node, CommandBody::Batch(WriteBatch { branch: MAIN, ops })).await;
    }

    async fn read_pair(&mut self, node: usize) {
        let i = self.rng.below(4);
        let level = if self.rng.chance(500) { ReadLevel::Local } else { self.level() };
        if let Some(values) = self.read(node, "main", level, SHARED, pair(i).to_vec()).await
            && values[0] != values[1]
        {
            self.cluster.problem(format!("pair {i} was read half written from n{node}: {values:?}"));
        }
    }

    fn owned_key(&mut self) -> Bytes {
        Bytes::from(format!("client-{}-{:03}", self.id, self.rng.below(OWNED_KEYS)))
    }

    async fn write_owned(&mut self, node: usize) {
        let mut changes = BTreeMap::new();
        for _ in 0..self.rng.range(1, 6) {
            let value = (!self.rng.chance(250)).then(|| self.notes.value());
            changes.insert(self.owned_key(), value);
        }
        let outcome = self.change(node, MAIN, &changes).await;
        let now = self.cluster.executor.now();
        for (key, value) in changes {
            self.owned.entry(key).or_default().apply(value, outcome, now);
        }
    }

    async fn change(&mut self, node: usize, branch: BranchId, changes: &BTreeMap<Bytes, Option<u64>>) -> Outcome {
        let keyspace = self.keyspace;
        let ops = changes
            .iter()
            .map(|(key, value)| match value {
                Some(value) => put(keyspace, key.clone(), *value),
                None => WriteOp::Delete { keyspace, key: key.clone() },
            })
            .collect();
        self.write(node, CommandBody::Batch(WriteBatch { branch, ops })).await
    }

    async fn read_owned(&mut self, node: usize) {
        let keys: Vec<Bytes> = (0..self.rng.range(1, 8)).map(|_| self.owned_key()).collect();
        let began = self.cluster.executor.now();
        // How old the answer may be, and where the level lets nothing be said but that somebody wrote it.
        let (level, since) = match self.rng.below(10) {
            0..4 => (self.level(), None),
            4..7 => (ReadLevel::AtLeast(self.acknowledged), None),
            7..9 => {
                let lag = Duration::from_micros(self.rng.below(500_000));
                // Clocks of replicas drift: what one takes for this long may be a little longer.
                (ReadLevel::Stale(lag), Some(began.saturating_sub(lag + lag / 8)))
            }
            _ => (ReadLevel::Local, Some(Duration::ZERO)),
        };
        let Some(values) = self.read(node, "main", level.clone(), self.keyspace, keys.clone()).await else { return };
        let Some(since) = since else {
            return self.compare(node, "main", &self.owned, keys.into_iter().zip(values));
        };
        for (key, value) in keys.into_iter().zip(values) {
            let possible = self.owned.get(&key).cloned().unwrap_or_default();
            // A replica that is catching up may hold the state before all writes.
            let unborn = level == ReadLevel::Local && value.is_none();
            if !unborn && !possible.held_since(value, since) {
                let key = String::from_utf8_lossy(&key);
                self.cluster.problem(format!("{key} on n{node} at {level:?} is {value:?} and may be {possible:?}"));
            }
        }
    }

    fn compare(
        &self,
        node: usize,
        place: &str,
        model: &BTreeMap<Bytes, Possible>,
        found: impl IntoIterator<Item = (Bytes, Option<u64>)>,
    ) {
        for (key, value) in found {
            let possible = model.get(&key).cloned().unwrap_or_default();
            if !possible.holds(value) {
                let key = String::from_utf8_lossy(&key);
                self.cluster.problem(format!("{key} in {place} on n{node} is {value:?} and may be {possible:?}"));
            }
        }
    }

    /// Makes a checkpoint, or a clone of one, or drops one; sometimes gives the keyspace other options.
    async fn copy(&mut self, node: usize) {
        if self.rng.chance(150) {
            let (name, options) = (OWNED.to_owned(), crate::store::options(&mut self.rng));
            if let Outcome::Done(_) = self.write(node, CommandBody::SetOptions { name, options }).await {
                self.notes.count("options");
            }
            return;
        }
        let full = self.copies.len() >= COPIES_MAX;
        if full || (!self.copies.is_empty() && self.rng.chance(200)) {
            let at = self.rng.below(self.copies.len() as u64) as usize;
            let copy = self.copies.swap_remove(at);
            if let Some(clone) = copy.clone {
                self.write(node, CommandBody::DropClone { name: clone }).await;
            }
            // Whatever the outcome is, the name is not used again.
            self.write(node, CommandBody::DropCheckpoint { name: copy.name }).await;
            return;
        }
        if !self.copies.is_empty() && self.rng.chance(500) {
            let at = self.rng.below(self.copies.len() as u64) as usize;
            if self.copies[at].clone.is_some() {
                return self.write_clone(node, at).await;
            }
            let (name, checkpoint) = (format!("{}-clone", self.copies[at].name), self.copies[at].name.clone());
            let body = CommandBody::CreateClone { name: name.clone(), checkpoint };
            if let Outcome::Done(_) = self.write(node, body).await {
                self.notes.count("clones");
                self.copies[at].clone = Some(name);
            }
            return;
        }
        self.copies_made += 1;
        let name = format!("copy-{}-{}", self.id, self.copies_made);
        let body = CommandBody::CreateCheckpoint { name: name.clone(), branch: MAIN };
        if let Outcome::Done(_) = self.write(node, body).await {
            self.notes.count("checkpoints");
            self.copies.push(Copy { name, clone: None, index: self.last, keys: self.owned.clone() });
        }
    }

    async fn write_clone(&mut self, node: usize, at: usize) {
        let Some(name) = self.copies[at].clone.clone() else { return };
        let found = self.cluster.node(node).and_then(|node| node.group().branch(&name));
        // A node that lags does not know the branch yet.
        let Some(branch) = found else { return };
        let mut changes = BTreeMap::new();
        for _ in 0..self.rng.range(1, 20) {
            let value = (!self.rng.chance(250)).then(|| self.notes.value());
            changes.insert(self.owned_key(), value);
        }
        let outcome = self.change(node, branch, &changes).await;
        let now = self.cluster.executor.now();
        for (key, value) in changes {
            self.copies[at].keys.entry(key).or_default().apply(value, outcome, now);
        }
    }

    async fn read_copy(&mut self, node: usize) {
        if self.copies.is_empty() {
            return;
        }
        let at = self.rng.below(self.copies.len() as u64) as usize;
        let keys: Vec<Bytes> = (0..self.rng.range(1, 20)).map(|_| self.owned_key()).collect();
        self.check_copy(node, at, keys).await;
    }

    async fn check_copy(&mut self, node: usize, at: usize, keys: Vec<Bytes>) {
        let (name, clone) = (self.copies[at].name.clone(), self.copies[at].clone.clone());
        let place = clone.clone().unwrap_or(name.clone());
        let (keyspace, index) = (self.keyspace, self.copies[at].index);
        let mut shown = None;
        let values = match clone {
            Some(clone) => self.read(node, &clone, ReadLevel::Linearizable, keyspace, keys.clone()).await,
            None => {
                let keys = keys.clone();
                let called = self
                    .cluster
                    .call(node, PATIENCE, move |node| {
                        Box::pin(async move {
                            // The checkpoint was acknowledged: after a barrier every replica has it.
                            node.read_barrier(ReadLevel::Linearizable).await?;
                            let snapshot = node.group().checkpoint(&name).map_err(Error::from)?;
                            let mut values = Vec::new();
                            for key in keys {
                                values.push(snapshot.get(keyspace, &key).await.map_err(Error::from)?);
                            }
                            Ok::<_, Error>((snapshot.index(), values))
                        })
                    })
                    .await;
                if let Called::Answered(Ok((seen, _))) = &called {
                    shown = Some(*seen);
                }
                let called = called.map(|answer| answer.map(|(_, values)| values));
                if let Called::Answered(Err(e)) = &called
                    && e.kind() == ErrorKind::NotFound
                {
                    self.cluster.problem(format!("n{node} has not the checkpoint {place}: {e}"));
                }
                self.judge_read(node, called)
            }
        };
        if let Some(values) = values {
            self.notes.count("copies read");
            self.compare(node, &place, &self.copies[at].keys, keys.into_iter().zip(values));
        }
        if let Some(shown) = shown.filter(|shown| *shown != index) {
            self.cluster.problem(format!("n{node} shows {place} as of {shown}, and it was made at {index}"));
        }
    }

    /// Compares everything this client owns with what a node holds, after the faults. True if the node answered.
    pub(crate) async fn check_all(&mut self, node: usize) -> bool {
        let keys: Vec<Bytes> = (0..OWNED_KEYS).map(|i| Bytes::from(format!("client-{}-{i:03}", self.id))).collect();
        let level = ReadLevel::Linearizable;
        let Some(values) = self.read(node, "main", level, self.keyspace, keys.clone()).await else { return false };
        self.compare(node, "main", &self.owned, keys.iter().cloned().zip(values));
        for at in 0..self.copies.len() {
            self.check_copy(node, at, keys.clone()).await;
        }
        true
    }
}

/// Reads every register once through a node and records it; the history then holds what each replica ended with.
pub(crate) async fn read_registers(cluster: &Arc<Cluster>, notes: &Arc<Notes>, node: usize) -> Result<(), String> {
    for key in 0..REGISTERS {
        let invoked = notes.stamp();
        let called = cluster
            .call(node, Duration::from_secs(10), move |node| {
                Box::pin(async move {
                    let snapshot = node.snapshot("main", ReadLevel::Linearizable).await.map_err(|e| e.to_string())?;
                    snapshot.get(SHARED, &register(key)).await.map_err(|e| e.to_string())
                })
            })
            .await;
        let bytes = match called {
            Called::Answered(Ok(bytes)) => bytes,
            Called::Answered(Err(e)) => return Err(format!("the last read of register {key} on n{node}: {e}")),
            Called::Down | Called::Lost => {
                return Err(format!("the last read of register {key} on n{node}: no answer"));
            }
        };
        let value =
            bytes.map(|bytes| decode(&bytes)).transpose().map_err(|e| format!("n{node} register {key}: {e}"))?;
        let outcome = Outcome::Done(notes.stamp());
        notes.record(Operation { key, action: Action::Read(value), invoked, outcome, client: 1000 + node as u64 });
    }
    Ok(())
}
