//! A store alone on one node in the simulation: commands, removed ranges, reads, pinned snapshots, checkpoints, clones, power cuts.
//!
//! # Checked
//! - S1. After a power cut the store holds every acknowledged command, and each command in flight wholly or not
//!   at all.
//! - S2. Gets, scans both ways and seeks agree with a model, on live branches, checkpoints and pinned snapshots.
//! - S3. One digest an index, over all lives: replay makes the same tables.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{Applied, Engine, ErrorKind, KeyRange, KeyspaceId, LocalLog, LogIndex, Snapshot};
use openraft_rt::AsyncRuntime;
use tokio::sync::oneshot;

use crate::disk::Disk;
use crate::rt::{Executor, Group, SimRng, SimRuntime};
use crate::store::{self, Change, Model, State};
use crate::value::decode;
use crate::world::Settings;

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Commands acknowledged.
    pub commands: u64,
    /// Keys and pairs compared.
    pub compared: u64,
    /// Last entry in tables at the end.
    pub flushed: u64,
    /// Tables at the end.
    pub tables: u64,
    /// Power cuts.
    pub crashes: u64,
    /// The hash over every poll and event.
    pub trace: u64,
}

struct World<'a> {
    executor: &'a Arc<Executor>,
    disk: Disk,
    settings: &'a Settings,
    rng: SimRng,
    model: Model,
    /// Values and names handed out.
    fresh: u64,
    digests: BTreeMap<u64, u128>,
    counts: Counts,
}

/// One life of the store.
struct Life {
    group: Group,
    engine: Engine,
    log: Arc<LocalLog>,
    pinned: Vec<(Snapshot, State)>,
}

/// Runs one seed of `lives` lives.
///
/// # Errors
/// What did not hold.
pub fn run(seed: u64, lives: u64, lying_disks: bool) -> Result<Counts, String> {
    let mut rng = SimRng::new(seed);
    let settings = Settings { lying_disks, ..Settings::draw(&mut rng) };
    let executor = Executor::new(seed);
    let disk = Disk::new(&executor, &settings, rng.u64());
    let (fresh, digests, counts) = (1, BTreeMap::new(), Counts::default());
    let model = Model::new();
    let mut world = World { executor: &executor, disk, settings: &settings, rng, model, fresh, digests, counts };
    let result = executor.block_on(async { world.live(lives).await });
    world.counts.trace = executor.trace_hash();
    let counts = world.counts;
    executor.shut_down();
    result.map(|()| counts)
}

impl World<'_> {
    async fn live(&mut self, lives: u64) -> Result<(), String> {
        // Commands whose outcome the last life did not tell, all of one round.
        let mut doubtful: Vec<Change> = Vec::new();
        for number in 1..=lives {
            let at = |e: String| format!("life {number}: {e}");
            let mut life = self.open(number).await.map_err(at)?;
            self.settle(&life, std::mem::take(&mut doubtful)).await.map_err(at)?;
            self.compare_all(&life).await.map_err(at)?;
            let death = self.executor.now() + Duration::from_micros(self.rng.range(200, 400_000));
            while self.executor.now() < death {
                self.executor.trace(&[0x570e, self.counts.commands]);
                let changes = self.round();
                let left = self.propose(&life, changes, death).await.map_err(at)?;
                if !left.is_empty() {
                    doubtful = left;
                    break;
                }
                self.read(&mut life).await.map_err(at)?;
                self.look(&life).map_err(at)?;
            }
            if doubtful.is_empty() && self.rng.chance(250) {
                let (log, engine) = (life.log.clone(), life.engine.clone());
                let closed = self.within(&life, async move {
                    log.close().await.map_err(|e| format!("close: {e}"))?;
                    engine.close().await.map_err(|e| format!("close: {e}"))
                });
                closed.await.unwrap_or(Err("close did not end".to_owned())).map_err(at)?;
            } else {
                self.counts.crashes += 1;
            }
            let status = life.log.group().status();
            (self.counts.flushed, self.counts.tables) = (status.flushed.0, status.tables);
            self.disk.cut_power();
            self.executor.kill(life.group);
            let group = life.group;
            self.executor.run_as(group, move || drop(life));
        }
        Ok(())
    }

    async fn open(&mut self, number: u64) -> Result<Life, String> {
        let group = Group(number);
        self.disk.power_on(group);
        let media = self.disk.open()?;
        let opened = store::open(self.executor, media, self.settings, number, number == 1).await?;
        Ok(Life { group, engine: opened.engine, log: Arc::new(opened.log), pinned: Vec::new() })
    }

    /// Runs a future as code of the life.
    async fn within<T: Send + 'static>(
        &self,
        life: &Life,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        store::within(self.executor, life.group, future).await
    }

    fn fresh(&mut self) -> u64 {
        self.fresh += 1;
        self.fresh
    }

    fn key(&mut self) -> Bytes {
        // Few keys are written often, so that versions pile up; some share long prefixes.
        let number = if self.rng.chance(500) { self.rng.below(30) } else { self.rng.below(2000) };
        Bytes::from(match number % 3 {
            0 => format!("{number:04}"),
            1 => format!("a-prefix-that-many-keys-share/{number:04}"),
            _ => format!("{}{number}", "z".repeat(number as usize % 200)),
        })
    }

    fn pick<T: Clone>(&mut self, of: impl Iterator<Item = T>) -> Option<T> {
        let all: Vec<T> = of.collect();
        (!all.is_empty()).then(|| self.rng.pick(&all).clone())
    }

    /// The commands of one round: several batches without a common key, or one of the other kinds.
    fn round(&mut self) -> Vec<Change> {
        let fresh = self.fresh();
        let model = self.model.clone();
        let other = match self.rng.below(1000) {
            0..6 => (model.keyspaces.len() < 4).then(|| Change::CreateKeyspace(format!("keyspace-{fresh}"))),
            6..8 => self.pick(model.keyspaces.into_keys()).map(Change::DropKeyspace),
            8..17 => Some(Change::Rotate),
            17..20 => self.pick(model.branches.into_keys()).map(Change::Compact),
            20..35 if model.checkpoints.len() < 5 => {
                let branch = self.pick(model.branches.into_keys()).unwrap_or_default();
                Some(Change::CreateCheckpoint { name: format!("checkpoint-{fresh}"), branch })
            }
            35..45 => self.pick(model.checkpoints.into_keys()).map(Change::DropCheckpoint),
            45..55 if model.branches.len() < 4 => self
                .pick(model.checkpoints.into_keys())
                .map(|checkpoint| Change::CreateClone { name: format!("clone-{fresh}"), checkpoint }),
            55..61 => self.pick(model.branches.into_keys().filter(|name| name != "main")).map(Change::DropClone),
            61..110 => self.remove_range(),
            110..150 => self.conditional(),
            150..155 => Some(Change::SetOptions(store::options(&mut self.rng))),
            _ => None,
        };
        if let Some(change) = other {
            return vec![change];
        }
        let mut used = BTreeSet::new();
        let mut changes = Vec::new();
        for _ in 0..self.rng.range(1, 9) {
            let branches = self.model.branches.keys().cloned().collect::<Vec<_>>();
            let branch = if self.rng.chance(700) { "main".to_owned() } else { self.rng.pick(&branches).clone() };
            let mut ops = Vec::new();
            for _ in 0..self.rng.range(1, 12) {
                let keyspaces = self.model.keyspaces.values().copied().chain([0]).collect::<Vec<_>>();
                let keyspace = *self.rng.pick(&keyspaces);
                let key = self.key();
                let value = (!self.rng.chance(300)).then(|| self.fresh());
                if used.insert((branch.clone(), keyspace, key.clone())) {
                    ops.push((keyspace, key, value));
                }
            }
            changes.push(Change::Batch { branch, ops });
        }
        changes
    }

    /// On a key as it is, or as it may not be.
    fn conditional(&mut self) -> Option<Change> {
        let branch = self.pick(self.model.branches.clone().into_keys())?;
        let (keyspace, key) = (0, self.key());
        let held = self.model.branches.get(&branch).and_then(|state| state.get(&keyspace)?.get(&key)).copied();
        let expect = if self.rng.chance(700) { held } else { self.rng.chance(500).then_some(1) };
        let value = self.fresh();
        Some(Change::Conditional { branch, keyspace, key, expect, value })
    }

    /// From one key up to another, or to the last one; now and then all keys.
    fn remove_range(&mut self) -> Option<Change> {
        let branch = self.pick(self.model.branches.clone().into_keys())?;
        let keyspace = self.pick(self.model.keyspaces.clone().into_values().chain([0]))?;
        let (a, b) = (self.key(), self.key());
        let (lower, upper) = match self.rng.below(10) {
            0 => (Bound::Unbounded, Bound::Unbounded),
            1 => (Bound::Included(a), Bound::Unbounded),
            _ => (Bound::Included(a.clone().min(b.clone())), Bound::Included(a.max(b))),
        };
        Some(Change::RemoveRange { branch, keyspace, range: KeyRange::new(lower, upper) })
    }

    /// Proposes all at once and returns those without an answer when the power fails at `death`.
    async fn propose(&mut self, life: &Life, changes: Vec<Change>, death: Duration) -> Result<Vec<Change>, String> {
        let mut waiting = Vec::new();
        for change in changes {
            let (command, log) = (change.command(life.log.group()), life.log.clone());
            let (send, answer) = oneshot::channel();
            // As one who blocks meanwhile, or as one who does not.
            let here = self.rng.below(2) == 0;
            let task = Box::pin(async move {
                let applied = if here { log.propose_here(command).await } else { log.propose(command).await };
                let _ = send.send(applied);
            });
            drop(self.executor.spawn(life.group, "client", task));
            waiting.push((change, answer));
        }
        let mut left = Vec::new();
        // A round that began long before the end may take its time; a hang is found by the patience of the others.
        let deadline = death.max(self.executor.now() + Duration::from_micros(self.rng.below(3_000)));
        for (change, answer) in waiting {
            let wait = deadline.saturating_sub(self.executor.now());
            match SimRuntime::timeout(wait, answer).await {
                Ok(Ok(Ok(applied))) => self.acknowledged(life, change, &applied)?,
                Ok(Ok(Err(e))) => return Err(format!("{change:?}: {:?}: {e}", e.kind())),
                Ok(Err(_)) => return Err(format!("{change:?}: the proposal was dropped")),
                Err(_) => left.push(change),
            }
        }
        Ok(left)
    }

    fn acknowledged(&mut self, life: &Life, change: Change, applied: &Applied) -> Result<(), String> {
        let refused = self.model.refuses(&change);
        match &applied.response {
            Err(e) if refused && e.kind() == ErrorKind::Conflict => return Ok(()),
            Ok(_) if !refused => {}
            other => return Err(format!("{change:?} was answered {other:?}")),
        }
        self.counts.commands += 1;
        self.change(life, change)
    }

    /// Makes the model follow a command.
    fn change(&mut self, life: &Life, change: Change) -> Result<(), String> {
        self.model.change(change, |name| life.log.group().keyspace(name))
    }

    /// Finds out which commands of the last life's last round are in the store, each wholly or not at all (S1).
    async fn settle(&mut self, life: &Life, doubtful: Vec<Change>) -> Result<(), String> {
        let group = life.log.group().clone();
        for change in doubtful {
            let happened = match &change {
                Change::Batch { branch, ops } => {
                    let view = group.branch(branch).and_then(|id| group.snapshot(id).ok());
                    let view = view.ok_or(format!("the branch {branch} is gone"))?;
                    let (mut yes, mut no) = (0, 0);
                    let before = self.model.branches.get(branch).cloned().unwrap_or_default();
                    for (keyspace, key, value) in ops {
                        let old = before.get(keyspace).and_then(|keys| keys.get(key)).copied();
                        let new = self.get(life, &view, *keyspace, key.clone()).await?;
                        if new == *value && old != *value {
                            yes += 1;
                        } else if new == old && old != *value {
                            no += 1;
                        } else if new != old {
                            return Err(format!("{key:?} is {new:?}: it was {old:?}, {value:?} was in flight"));
                        }
                    }
                    if yes > 0 && no > 0 {
                        return Err(format!("a batch is there in part: {yes} yes, {no} no, {ops:?}"));
                    }
                    yes > 0
                }
                Change::RemoveRange { branch, keyspace, range } => {
                    let view = group.branch(branch).and_then(|id| group.snapshot(id).ok());
                    let view = view.ok_or(format!("the branch {branch} is gone"))?;
                    let state = self.model.branches.get(branch).and_then(|state| state.get(keyspace));
                    let within: Vec<_> = state.into_iter().flatten().filter(|(key, _)| range.contains(key)).collect();
                    let within: Vec<(Bytes, u64)> =
                        within.into_iter().map(|(key, value)| (key.clone(), *value)).collect();
                    let mut left = 0;
                    for (key, value) in &within {
                        match self.get(life, &view, *keyspace, key.clone()).await? {
                            Some(found) if found == *value => left += 1,
                            None => {}
                            other => {
                                return Err(format!(
                                    "{key:?} is {other:?} and was {value}: its range was being removed"
                                ));
                            }
                        }
                    }
                    if left > 0 && left < within.len() {
                        return Err(format!("a range is gone in part: {left} of {} are left, {range:?}", within.len()));
                    }
                    left == 0
                }
                Change::Conditional { branch, keyspace, key, value, .. } => {
                    let view = group.branch(branch).and_then(|id| group.snapshot(id).ok());
                    let view = view.ok_or(format!("the branch {branch} is gone"))?;
                    !self.model.refuses(&change) && self.get(life, &view, *keyspace, key.clone()).await? == Some(*value)
                }
                Change::CreateKeyspace(name) => group.keyspace(name).is_some(),
                Change::DropKeyspace(name) => group.keyspace(name).is_none(),
                Change::Rotate | Change::Compact(_) | Change::SetOptions(_) => false,
                Change::CreateCheckpoint { name, .. } => group.checkpoint(name).is_ok(),
                Change::DropCheckpoint(name) => group.checkpoint(name).is_err(),
                Change::CreateClone { name, .. } => group.branch(name).is_some(),
                Change::DropClone(name) => group.branch(name).is_none(),
            };
            if happened {
                self.change(life, change)?;
            }
        }
        Ok(())
    }

    async fn get(&mut self, life: &Life, view: &Snapshot, keyspace: u32, key: Bytes) -> Result<Option<u64>, String> {
        let view = view.clone();
        let read = async move { view.get(KeyspaceId(keyspace), &key).await };
        let read = self.within(life, read).await.ok_or("a read did not end")?;
        read.map_err(|e| format!("read: {e}"))?.map(|bytes| decode(&bytes)).transpose()
    }

    /// A view and what it should show.
    fn view(&mut self, life: &mut Life) -> Result<(Snapshot, State, String), String> {
        let group = life.log.group();
        let choice = self.rng.below(10);
        if choice < 2 && !life.pinned.is_empty() {
            let at = self.rng.below(life.pinned.len() as u64) as usize;
            let (view, state) = if choice == 0 { life.pinned[at].clone() } else { life.pinned.swap_remove(at) };
            return Ok((view, state, "a pinned snapshot".to_owned()));
        }
        if choice < 4
            && let Some(name) = self.pick(self.model.checkpoints.clone().into_keys())
        {
            let view = group.checkpoint(&name).map_err(|e| format!("{name}: {e}"))?;
            return Ok((view, self.model.checkpoints[&name].clone(), name));
        }
        let name = self.pick(self.model.branches.clone().into_keys()).unwrap_or_default();
        let id = group.branch(&name).ok_or(format!("the branch {name} is gone"))?;
        let view = group.snapshot(id).map_err(|e| format!("{name}: {e}"))?;
        let state = self.model.branches[&name].clone();
        if life.pinned.len() < 4 && self.rng.chance(100) {
            life.pinned.push((view.clone(), state.clone()));
        }
        Ok((view, state, name))
    }

    /// Reads something somewhere and compares it with the model (S2).
    async fn read(&mut self, life: &mut Life) -> Result<(), String> {
        let (view, state, place) = self.view(life)?;
        let keyspaces = state.keys().copied().chain([0]).collect::<Vec<_>>();
        let keyspace = *self.rng.pick(&keyspaces);
        let keys = state.get(&keyspace).cloned().unwrap_or_default();
        if self.rng.chance(700) {
            for _ in 0..self.rng.range(1, 10) {
                let key = self.key();
                let found = self.get(life, &view, keyspace, key.clone()).await.map_err(|e| format!("{place}: {e}"))?;
                self.counts.compared += 1;
                if found != keys.get(&key).copied() {
                    let expect = keys.get(&key);
                    return Err(format!("{key:?} in {place} keyspace {keyspace} is {found:?} and not {expect:?}"));
                }
            }
            return Ok(());
        }
        let (a, b) = (self.key(), self.key());
        let (low, high) = (a.clone().min(b.clone()), a.max(b));
        let (low, high) = match self.rng.below(4) {
            0 => (Bound::Unbounded, Bound::Excluded(high)),
            1 => (Bound::Excluded(low), Bound::Included(high)),
            2 => (Bound::Included(low), Bound::Unbounded),
            _ => (Bound::Included(low), Bound::Excluded(high)),
        };
        if matches!((&low, &high), (Bound::Excluded(a), Bound::Included(b)) | (Bound::Included(a), Bound::Excluded(b)) if a >= b)
        {
            return Ok(());
        }
        let expect: Vec<(Bytes, u64)> =
            keys.range((low.clone(), high.clone())).map(|(key, value)| (key.clone(), *value)).collect();
        // From which end each pair is taken.
        let ends: Vec<bool> = match self.rng.below(3) {
            0 => vec![true; expect.len() + 1],
            1 => vec![false; expect.len() + 1],
            _ => (0..=expect.len()).map(|_| self.rng.chance(500)).collect(),
        };
        let mut scan = view.range(KeyspaceId(keyspace), low.clone(), high.clone());
        let pairs = async move {
            let (mut front, mut back) = (Vec::new(), Vec::new());
            for end in ends {
                let pair = if end { scan.next().await } else { scan.next_back().await }.map_err(|e| e.to_string())?;
                let Some((key, value)) = pair else { break };
                if end { front.push((key, value)) } else { back.push((key, value)) }
            }
            front.extend(back.into_iter().rev());
            front.into_iter().map(|(key, value)| Ok((key, decode(&value)?))).collect::<Result<Vec<_>, String>>()
        };
        let found = self.within(life, pairs).await.ok_or("a scan did not end")?.map_err(|e| format!("{place}: {e}"))?;
        self.counts.compared += expect.len() as u64;
        if found != expect {
            let first = found.iter().zip(&expect).position(|(a, b)| a != b).unwrap_or(found.len().min(expect.len()));
            return Err(format!(
                "scan {low:?}..{high:?} of {place} keyspace {keyspace}: {} pairs and not {}, first difference at {first}: \
                 {:?} and not {:?}",
                found.len(),
                expect.len(),
                found.get(first),
                expect.get(first)
            ));
        }
        Ok(())
    }

    /// Compares everything with the model.
    async fn compare_all(&mut self, life: &Life) -> Result<(), String> {
        let compare = self.model.clone().compare(life.log.group().clone());
        self.counts.compared += self.within(life, compare).await.ok_or("a full scan did not end")??;
        Ok(())
    }

    /// One digest an index, over all lives (S3).
    fn look(&mut self, life: &Life) -> Result<(), String> {
        let status = life.log.group().status();
        let LogIndex(index) = status.digest_index;
        let digest = *self.digests.entry(index).or_insert(status.digest);
        if digest != status.digest {
            return Err(format!("two digests at index {index}: {digest:032x} and {:032x}", status.digest));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_alone_keeps_what_it_acknowledged() {
        for seed in 0..4 {
            if let Err(e) = run(seed, 5, false) {
                panic!("seed {seed}: {e}");
            }
        }
    }

    #[test]
    fn a_disk_that_lies_is_found_out() {
        assert!((0..6).any(|seed| run(seed, 6, true).is_err()));
    }
}
