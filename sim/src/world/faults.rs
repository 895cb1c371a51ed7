//! What goes wrong, and when, drawn from the seed.
//!
//! # Invariants
//! - F1. One node of a seed is the victim: what destroys data at rest (rot, a wiped volume, an old copy) happens to it and to no
//!   other, so every entry that a majority holds is whole somewhere else.
//! - F2. Every fault ends, at the latest with [`calm`]; then full recovery is demanded.
//! - F3. A node may fail only in a life in which a fault is the reason; else its failure is a finding.
//! - F4. A copy of a volume comes up while those who remember what its member promised are heard, and nothing else goes wrong until
//!   the member has it again: they remember in memory, and what a volume forgot that only they knew is lost with them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_io::sim::IoKind;
use mainstay_replication::{MemberInfo, MemberRole, NodeId};

use super::cluster::{Called, Cluster, LastLogs, NO_FLOOD, VolumeCopy};
use crate::disk::Zone;
use crate::net::NetSettings;
use crate::rt::{Group, SimRng};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Fault {
    /// A node loses power.
    Crash,
    /// The leader loses power and is back before anybody has noticed.
    LeaderCrash,
    /// All nodes lose power.
    Blackout,
    /// A node is closed in good order and started again.
    Restart,
    /// One direction of one link is cut.
    OneWay,
    /// Both directions between two nodes are cut; all others hear both.
    Partial,
    /// A node is cut off.
    Isolated,
    /// A node, mostly the leader, hears nobody, and all hear it; clients write much through the others.
    Deaf,
    /// A node runs nothing for a while.
    Pause,
    /// A disk is slow.
    SlowDisk,
    /// The leader is asked to hand over.
    Transfer,
    /// Reads answer EIO, once or now and then.
    ReadError,
    /// A write answers EIO.
    WriteError,
    /// A flush, or that of a durable write, answers EIO.
    SyncError,
    /// A disk completes nothing for 1 s, 20 s, or ever.
    Stall,
    /// A disk is full for a while.
    FullDisk,
    /// The file system is remounted read-only for a while.
    ReadOnly,
    /// A wall clock jumps by up to an hour.
    ClockJump,
    /// Bits of the victim rot at rest, or blocks of it cannot be read any more.
    Rot,
    /// The victim comes back with a blank volume.
    Wipe,
    /// The victim comes back with an older copy of its volume.
    OldCopy,
    /// A second process comes up with a copy of the victim's volume.
    Twin,
    /// Members are added, promoted, removed, replaced.
    Membership,
}

/// Whether the run trusts the product to mend damaged tables from its peers, whatever was hit. While it does not, the operator of the
/// simulation wipes a volume that was damaged once the faults have stopped, and lets it join anew.
pub const HEALS_ITSELF: bool = false;

impl Fault {
    /// Every kind.
    pub const ALL: [Self; 23] = [
        Self::Crash,
        Self::LeaderCrash,
        Self::Blackout,
        Self::Restart,
        Self::OneWay,
        Self::Partial,
        Self::Isolated,
        Self::Deaf,
        Self::Pause,
        Self::SlowDisk,
        Self::Transfer,
        Self::ReadError,
        Self::WriteError,
        Self::SyncError,
        Self::Stall,
        Self::FullDisk,
        Self::ReadOnly,
        Self::ClockJump,
        Self::Rot,
        Self::Wipe,
        Self::OldCopy,
        Self::Twin,
        Self::Membership,
    ];

    /// What it is called in counts and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::LeaderCrash => "leader-crash",
            Self::Blackout => "blackout",
            Self::Restart => "restart",
            Self::OneWay => "one-way",
            Self::Partial => "partial",
            Self::Isolated => "isolated",
            Self::Deaf => "deaf",
            Self::Pause => "pause",
            Self::SlowDisk => "slow-disk",
            Self::Transfer => "transfer",
            Self::ReadError => "read-error",
            Self::WriteError => "write-error",
            Self::SyncError => "sync-error",
            Self::Stall => "stall",
            Self::FullDisk => "full-disk",
            Self::ReadOnly => "read-only",
            Self::ClockJump => "clock-jump",
            Self::Rot => "rot",
            Self::Wipe => "wipe",
            Self::OldCopy => "old-copy",
            Self::Twin => "twin",
            Self::Membership => "membership",
        }
    }

    /// Its largest weight among the others.
    fn weight_max(self) -> u64 {
        match self {
            Self::Crash | Self::LeaderCrash => 10,
            Self::OneWay | Self::Partial | Self::Isolated | Self::Membership => 5,
            Self::Pause | Self::SlowDisk | Self::Rot | Self::FullDisk => 4,
            Self::Blackout
            | Self::Deaf
            | Self::Restart
            | Self::Transfer
            | Self::ReadError
            | Self::WriteError
            | Self::SyncError
            | Self::Stall
            | Self::OldCopy => 3,
            Self::ReadOnly | Self::ClockJump | Self::Wipe | Self::Twin => 2,
        }
    }
}

/// Counts of a run, by kind.
pub type FaultStats = BTreeMap<&'static str, u64>;

/// Who does the damage.
struct Faults {
    cluster: Arc<Cluster>,
    rng: SimRng,
    /// The one whose data may be destroyed (F1).
    victim: usize,
    /// An older state of its volume.
    copy: Option<VolumeCopy>,
    /// Ids whose removal was asked for: one that was not answered may yet happen.
    leaving: BTreeSet<NodeId>,
}

/// Works until `until`, then leaves everything as it is; [`calm`] mends it.
pub(crate) async fn run(cluster: Arc<Cluster>, mut rng: SimRng, until: Duration) -> FaultStats {
    // Few kinds or many: each is met alone and with the others.
    let share = *rng.pick(&[80, 250, 600]);
    let mut weights: Vec<(Fault, u64)> = Vec::new();
    for fault in Fault::ALL {
        let drawn = if rng.chance(share) { rng.range(1, fault.weight_max() + 1) } else { 0 };
        let asked = cluster.settings.with.contains(&fault);
        let possible = fault != Fault::Membership || cluster.settings.spares > 0;
        weights.push((
            fault,
            if asked {
                fault.weight_max()
            } else if possible {
                drawn
            } else {
                0
            },
        ));
    }
    let sum: u64 = weights.iter().map(|(_, weight)| weight).sum();
    let gap_max = rng.range(100, 1500);
    let drawn = rng.below(cluster.settings.nodes as u64) as usize;
    // Beside a witness two hold the data, and either may be the only one that has what was acknowledged last.
    let victim = (0..cluster.settings.nodes).find(|i| cluster.is_witness(*i)).unwrap_or(drawn);
    let mut stats = FaultStats::default();
    let mut faults = Faults { cluster, rng, victim, copy: None, leaving: BTreeSet::new() };
    loop {
        let gap = Duration::from_micros(faults.rng.range(1000, gap_max * 1000));
        faults.cluster.executor.sleep_until(faults.cluster.executor.now() + gap).await;
        if faults.cluster.executor.now() >= until {
            return stats;
        }
        let mut left = faults.rng.below(sum);
        let chosen = weights.iter().find(|(_, weight)| {
            let here = left < *weight;
            left = left.saturating_sub(*weight);
            here
        });
        if let Some((fault, _)) = chosen.filter(|_| sum > 0) {
            *stats.entry(fault.name()).or_default() += 1;
            faults.begin(*fault).await;
        }
    }
}

impl Faults {
    fn any(&mut self) -> usize {
        self.rng.below(self.cluster.size() as u64) as usize
    }

    fn micros(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_micros(self.rng.range(low, high))
    }

    /// Starts one fault.
    async fn begin(&mut self, fault: Fault) {
        let node = self.any();
        match fault {
            Fault::Crash => self.crash(node, 3_000_000),
            Fault::LeaderCrash => {
                // It loses a log that is not synced and is back before anybody has noticed.
                let leader = self.cluster.leader().unwrap_or(node);
                self.crash(leader, 80_000);
            }
            Fault::Blackout => (0..self.cluster.size()).for_each(|i| self.crash(i, 1_000_000)),
            Fault::Restart => {
                if self.cluster.is_powered(node) {
                    self.cluster.stop(node).await;
                    let down = self.rng.below(500_000);
                    later(&self.cluster, down, move |cluster| start_if_down(&cluster, node));
                }
            }
            Fault::OneWay | Fault::Partial => {
                let size = self.cluster.size();
                let other = (node + 1 + self.rng.below(size as u64 - 1) as usize) % size;
                let links = [(node, other), (other, node)];
                self.cut(if fault == Fault::OneWay { &links[..1] } else { &links });
            }
            Fault::Isolated => {
                let others = (0..self.cluster.size()).filter(|i| *i != node);
                let links: Vec<_> = others.flat_map(|i| [(node, i), (i, node)]).collect();
                self.cut(&links);
            }
            Fault::Deaf => {
                // What it sends before it notices is committed by the next leader, and, as clients write much meanwhile, may be
                // behind a snapshot when it hears again.
                let node = if self.rng.chance(800) { self.cluster.leader().unwrap_or(node) } else { node };
                let others = (0..self.cluster.size()).filter(|i| *i != node);
                let links: Vec<_> = others.map(|i| (i, node)).collect();
                let length = self.micros(1_000_000, 4_000_000);
                self.cluster.flood.store(node, Ordering::Relaxed);
                later(&self.cluster, length.as_micros() as u64, |cluster| {
                    cluster.flood.store(NO_FLOOD, Ordering::Relaxed);
                });
                self.cut_for(&links, length);
            }
            Fault::Pause => {
                let length = self.micros(1_000, 2_000_000);
                self.cluster.log(|| format!("pause n{node} {length:?}"));
                self.cluster.executor.pause(self.cluster.group(node), length);
            }
            Fault::Transfer => self.transfer().await,
            Fault::ClockJump => {
                let ahead = self.micros(0, 3_600_000_000);
                self.cluster.log(|| format!("clock of n{node} is {ahead:?} ahead"));
                self.cluster.set_wall(node, ahead);
            }
            Fault::SlowDisk
            | Fault::ReadError
            | Fault::WriteError
            | Fault::SyncError
            | Fault::Stall
            | Fault::FullDisk
            | Fault::ReadOnly => self.disk(fault, node),
            Fault::Rot | Fault::Wipe => self.destroy(fault),
            Fault::OldCopy | Fault::Twin => {
                let net = self.cluster.net.clone();
                let before = net.set(NetSettings::calm());
                if fault == Fault::Twin {
                    self.twin().await;
                } else {
                    self.old_copy().await;
                }
                net.set(before);
            }
            Fault::Membership => self.change_members(),
        }
    }

    fn crash(&mut self, node: usize, down_max_micros: u64) {
        let down = self.rng.below(down_max_micros);
        if self.cluster.is_powered(node) {
            self.cluster.kill(node);
            later(&self.cluster, down, move |cluster| start_if_down(&cluster, node));
        }
    }

    fn cut(&mut self, links: &[(usize, usize)]) {
        let length = self.micros(50_000, 4_000_000);
        self.cut_for(links, length);
    }

    fn cut_for(&self, links: &[(usize, usize)], length: Duration) {
        let cluster = &self.cluster;
        cluster.log(|| format!("cut {links:?}"));
        for (from, to) in links {
            cluster.net.cut(cluster.address(*from), cluster.address(*to));
        }
        let links = links.to_vec();
        later(cluster, length.as_micros() as u64, move |cluster| {
            cluster.log(|| format!("mend {links:?}"));
            for (from, to) in &links {
                cluster.net.mend(cluster.address(*from), cluster.address(*to));
            }
        });
    }

    async fn transfer(&self) {
        let Some(leader) = self.cluster.leader() else { return };
        let done = self
            .cluster
            .call(leader, Duration::from_secs(2), |node| {
                Box::pin(async move { node.transfer_leader(None).await.map_err(|e| e.to_string()) })
            })
            .await;
        if let Called::Answered(answer) = done {
            self.cluster.log(|| format!("transfer from n{leader}: {answer:?}"));
        }
    }

    /// What goes wrong with a disk and ends again, with all data unharmed.
    fn disk(&mut self, fault: Fault, node: usize) {
        let length = self.micros(10_000, 3_000_000);
        let cluster = &self.cluster;
        let disk = cluster.disk(node);
        cluster.log(|| format!("{} n{node} {length:?}", fault.name()));
        match fault {
            Fault::SlowDisk => disk.slow(length.min(Duration::from_secs(1))),
            Fault::Stall => disk.stall(match self.rng.below(10) {
                0..6 => Duration::from_secs(1),
                6..8 => Duration::from_secs(20),
                _ => FOR_EVER,
            }),
            Fault::FullDisk => {
                disk.set_space(Some(self.rng.below(512 << 10)));
                self.until_mended(node, length, |disk| disk.set_space(None));
            }
            Fault::ReadOnly => {
                cluster.excuse(node);
                disk.set_read_only(true);
                self.until_mended(node, length, |disk| disk.set_read_only(false));
            }
            _ => {
                let kind = match fault {
                    Fault::ReadError => IoKind::Read,
                    // A write of the log is durable by itself: its sync fails with it.
                    Fault::SyncError => *self.rng.pick(&[IoKind::Flush, IoKind::DurableWrite]),
                    _ => IoKind::CachedWrite,
                };
                cluster.excuse(node);
                if kind == IoKind::Read && self.rng.chance(500) {
                    disk.fail_often(kind);
                    self.until_mended(node, length, crate::disk::Disk::mend);
                } else {
                    disk.fail_next(kind);
                }
            }
        }
    }

    fn until_mended(&self, node: usize, length: Duration, mend: fn(&crate::disk::Disk)) {
        let micros = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
        later(&self.cluster, micros, move |cluster| mend(cluster.disk(node)));
    }

    /// What the victim does not get over by itself (F1).
    fn destroy(&mut self, fault: Fault) {
        let (cluster, victim) = (self.cluster.clone(), self.victim);
        let down = self.rng.below(2_000_000);
        if fault == Fault::Rot && self.rng.chance(600) {
            // Tables rot while it runs: it finds out when it reads them.
            for _ in 0..self.rng.range(1, 4) {
                if cluster.disk(victim).rot(Zone::Extents) {
                    cluster.damage(victim);
                    cluster.log(|| format!("rot in the extents of n{victim}"));
                }
            }
            return;
        }
        if !cluster.is_powered(victim) {
            return;
        }
        cluster.kill(victim);
        match fault {
            Fault::Rot => {
                let zone = *self.rng.pick(&[Zone::Wal, Zone::Wal, Zone::Extents, Zone::Superblock]);
                if cluster.disk(victim).rot(zone) {
                    cluster.damage(victim);
                    cluster.log(|| format!("rot in the {zone:?} of n{victim} at rest"));
                }
            }
            _ => cluster.wipe(victim),
        }
        later(&cluster, down, move |cluster| start_if_down(&cluster, victim));
    }

    /// Waits until all takes its course (F4), with a good network from here on; false when that does not come about.
    async fn quiet(&self) -> bool {
        let cluster = &self.cluster;
        cluster.net.mend_all();
        (0..cluster.size()).for_each(|i| cluster.disk(i).calm());
        cluster.down().into_iter().for_each(|node| start_if_down(cluster, node));
        // Of the first leader of each group that is seen: clients go on writing.
        let mut last = LastLogs::new();
        self.comes_about(|cluster| cluster.are_whole_to(&mut last)).await
    }

    async fn comes_about(&self, mut what: impl FnMut(&Cluster) -> bool) -> bool {
        let executor = &self.cluster.executor;
        let until = executor.now() + QUIET_MAX;
        while !what(&self.cluster) {
            if executor.now() >= until {
                return false;
            }
            executor.sleep_until(executor.now() + Duration::from_millis(20)).await;
        }
        true
    }

    /// The victim comes back with an older state of its volume. The first time that state is only noted.
    async fn old_copy(&mut self) {
        let (cluster, victim) = (self.cluster.clone(), self.victim);
        if self.copy.is_none() {
            let role = cluster.node(victim).map(|node| node.status().role);
            if role.is_some_and(|role| matches!(role.as_str(), "leader" | "follower" | "learner")) {
                cluster.kill(victim);
                self.copy = Some(cluster.copy(victim));
                cluster.start(victim);
            }
            return;
        }
        if !self.quiet().await || cluster.changing.load(Ordering::Relaxed) {
            return;
        }
        let (Some(copy), Some(mut last)) = (self.copy.take(), cluster.last_logs()) else { return };
        cluster.log(|| format!("n{victim} gets an old copy of its volume"));
        cluster.kill(victim);
        cluster.restore(victim, copy);
        let down = self.micros(1_000, 2_000_000);
        cluster.executor.sleep_until(cluster.executor.now() + down).await;
        start_if_down(&cluster, victim);
        let whole = self.comes_about(|cluster| {
            // The copy may be from before its member was replaced or removed.
            match cluster.node(victim).map(|node| node.status().role).as_deref() {
                Some("removed") => true,
                Some("leader" | "follower" | "learner") => cluster.are_whole_to(&mut last),
                _ => false,
            }
        });
        if whole.await {
            // One that was removed says so again at every start, until it is wiped.
            if cluster.node(victim).is_some_and(|node| node.status().role != "removed") {
                cluster.is_itself_again(victim);
            }
        } else {
            cluster.problem(format!("n{victim} is not what it was, {QUIET_MAX:?} after an old copy was restored"));
        }
    }

    /// A spare machine comes up with a copy of the victim's volume, takes no part, and is wiped. Nothing else goes wrong until then: were those who
    /// remember what the victim promised started anew meanwhile, the copy could take part while the victim is away (docs/replication.md).
    async fn twin(&mut self) {
        let (cluster, victim) = (self.cluster.clone(), self.victim);
        if !self.quiet().await || cluster.is_witness(victim) {
            return;
        }
        let spare = (cluster.settings.nodes..cluster.size()).find(|i| {
            let waiting = cluster.node(*i).is_some_and(|node| node.status().role == "waiting");
            waiting && cluster.disk(*i).is_like(cluster.disk(victim))
        });
        let member = cluster.view().is_some_and(|members| members.iter().any(|m| m.name == cluster.name(victim)));
        let Some(spare) = spare.filter(|_| member && cluster.is_powered(victim)) else { return };
        let length = self.rng.range(200_000, 3_000_000);
        cluster.log(|| format!("n{spare} starts with a copy of n{victim}"));
        cluster.kill(spare);
        cluster.restore(spare, cluster.copy(victim));
        cluster.start(spare);
        let told = self.comes_about(|cluster| cluster.node(spare).is_some_and(|node| node.status().role == "twin"));
        if !told.await {
            cluster.problem(format!("n{spare} does not find that n{victim} is the same member"));
        }
        cluster.executor.sleep_until(cluster.executor.now() + Duration::from_micros(length)).await;
        cluster.kill(spare);
        cluster.wipe(spare);
        cluster.start(spare);
    }

    /// One change of the membership, in the background; the next one waits for its end.
    fn change_members(&mut self) {
        let cluster = self.cluster.clone();
        let Some(members) = cluster.view() else { return };
        let names: std::collections::BTreeSet<_> = members.iter().map(|m| &m.name).collect();
        if names.len() < members.len() {
            // A wiped volume is about to take the place of its former self: until then one voter is counted twice.
            return;
        }
        let stays = |m: &&MemberInfo| m.role == MemberRole::Voter && !self.leaving.contains(&m.id);
        let voters: Vec<_> = members.iter().filter(stays).cloned().collect();
        let learners: Vec<_> = members.iter().filter(|m| m.role == MemberRole::Learner).cloned().collect();
        let spare = (0..cluster.size()).find(|i| {
            cluster.node(*i).is_some_and(|node| node.status().role == "waiting")
                && !members.iter().any(|m| m.name == cluster.name(*i))
        });
        let (chosen, voter, promote) = (self.rng.below(4), self.rng.chance(500), self.rng.chance(700));
        let (add, end) = match chosen {
            // A learner that is there is promoted before another one is added.
            0 if promote && !learners.is_empty() => (None, Some((self.rng.pick(&learners).clone(), true))),
            0 | 1 => (spare, None),
            // Never below three voters: one of them may be the victim.
            2 if voters.len() > 3 => (None, Some((self.rng.pick(&voters).clone(), false))),
            2 => return,
            _ if spare.is_some() && !voters.is_empty() => (spare, Some((self.rng.pick(&voters).clone(), false))),
            _ => return,
        };
        if let Some((member, false)) = &end {
            self.leaving.insert(member.id);
        }
        let replaces = chosen == 3;
        if (add.is_none() && end.is_none()) || cluster.changing.swap(true, Ordering::Relaxed) {
            return;
        }
        let through = self.any();
        let me = cluster.clone();
        let task = Box::pin(async move {
            let mut goes_on = true;
            if let Some(i) = add {
                let (name, address) = (me.name(i).to_owned(), me.address(i).clone());
                let votes = voter || replaces;
                let added = me
                    .call(through, CHANGE_MAX, move |node| {
                        Box::pin(async move {
                            node.add_member(&name, address, votes).await.map(|m| m.role).map_err(|e| e.to_string())
                        })
                    })
                    .await;
                goes_on = matches!(added, Called::Answered(Ok(MemberRole::Voter)));
                me.log(|| format!("add n{i} votes={votes} through n{through}: {}", told(&added)));
            }
            if let Some((member, promote)) = end.filter(|_| goes_on) {
                let id = member.id;
                let done = me
                    .call(through, CHANGE_MAX, move |node| {
                        Box::pin(async move {
                            let done =
                                if promote { node.promote_member(id).await } else { node.remove_member(id).await };
                            done.map_err(|e| e.to_string())
                        })
                    })
                    .await;
                let what = if promote { "promote" } else { "remove" };
                me.log(|| format!("{what} {} through n{through}: {}", member.name, told(&done)));
            }
            me.changing.store(false, Ordering::Relaxed);
        });
        drop(cluster.executor.spawn(Group::WORLD, "membership", task));
    }
}

/// Longer than any run.
const FOR_EVER: Duration = Duration::from_secs(100_000);
/// How long a quiet moment, and the recovery in it, is waited for.
const QUIET_MAX: Duration = Duration::from_secs(60);
/// How long a change of the membership is waited for.
const CHANGE_MAX: Duration = Duration::from_secs(15);

fn told<T: std::fmt::Debug>(called: &Called<Result<T, String>>) -> String {
    match called {
        Called::Down => "down".to_owned(),
        Called::Lost => "no answer".to_owned(),
        Called::Answered(answer) => format!("{answer:?}"),
    }
}

fn start_if_down(cluster: &Arc<Cluster>, node: usize) {
    if !cluster.is_powered(node) && !cluster.ending.load(Ordering::Relaxed) {
        cluster.start(node);
    }
}

fn later(cluster: &Arc<Cluster>, micros: u64, run: impl FnOnce(Arc<Cluster>) + Send + 'static) {
    let me = cluster.clone();
    cluster.executor.after(Group::WORLD, Duration::from_micros(micros), Box::new(move || run(me)));
}

/// Ends all faults: links whole, disks fast and writable, power everywhere.
pub(crate) fn calm(cluster: &Arc<Cluster>) {
    cluster.log(|| "calm".to_owned());
    cluster.net.calm();
    for i in 0..cluster.size() {
        cluster.disk(i).calm();
    }
    for node in cluster.down() {
        cluster.start(node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_a_name_of_its_own_and_a_weight() {
        let names: std::collections::BTreeSet<_> = Fault::ALL.iter().map(|f| f.name()).collect();
        assert_eq!(names.len(), Fault::ALL.len());
        assert!(Fault::ALL.iter().all(|fault| fault.weight_max() > 0));
    }
}
