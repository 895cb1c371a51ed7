//! Faults that come one at a time: something on the disk of one node is not what was written there, and no error tells.
//!
//! # Invariants
//! - S1. The next fault comes when all that the one before it did is healed: the node takes part, and every checksum of its
//!   volume matches, as `mainstay verify` would read them.
//! - S2. There is no operator. A node may restart, as any process does; nobody wipes, copies or mends anything.
//! - S3. A node restarts, for this fault or the next one, no sooner after a write of its log went astray than that log has
//!   been written or sealed behind it: of the very last batch no byte tells that it was durable (docs/testing.md, fault
//!   model).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mainstay_engine::{CommandBody, ErrorKind, MAIN};
use mainstay_io::Environment;
use mainstay_io::sim::Mishap;
use mainstay_replication::{Durability, Write};

use super::cluster::{Called, Cluster};
use super::faults::FaultStats;
use super::judge::scan;
use crate::disk::Zone;
use crate::rt::{Group, SimRng, WallClock, environment};

/// How long a write that is to go astray is waited for.
const COMES_MAX: Duration = Duration::from_secs(3);
/// A log that was not written for a second is sealed: by then anything in it is proven.
const PROVEN_AFTER: Duration = Duration::from_millis(1_500);
/// Virtual time in which a fault must be healed.
const HEALS_MAX: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Longest time between two faults.
const GAP_MAX_MICROS: u64 = 200_000;

/// What happens to the bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Flip,
    Unreadable,
    Astray(Mishap),
}

const KINDS: [Kind; 5] = [
    Kind::Flip,
    Kind::Unreadable,
    Kind::Astray(Mishap::Lost),
    Kind::Astray(Mishap::Misdirected),
    Kind::Astray(Mishap::Torn),
];
const ZONES: [Zone; 3] = [Zone::Superblock, Zone::Wal, Zone::Extents];

fn name(kind: Kind, zone: Zone) -> &'static str {
    let names: [&'static str; 3] = match kind {
        Kind::Flip => ["flip in superblock", "flip in log", "flip in extents"],
        Kind::Unreadable => ["unreadable superblock", "unreadable log", "unreadable extents"],
        Kind::Astray(Mishap::Lost) => ["lost superblock write", "lost log write", "lost extents write"],
        Kind::Astray(Mishap::Misdirected) => {
            ["misdirected superblock write", "misdirected log write", "misdirected extents write"]
        }
        Kind::Astray(Mishap::Torn) => ["torn superblock write", "torn log write", "torn extents write"],
    };
    names[zone as usize]
}

/// One fault after the other.
struct Single {
    cluster: Arc<Cluster>,
    rng: SimRng,
    environment: Environment,
    checkpoints: u64,
}

/// Lets `count` faults happen, each alone; ends early when something is wrong.
pub(crate) async fn run(cluster: Arc<Cluster>, rng: SimRng, count: u64) -> FaultStats {
    let environment = environment(&cluster.executor, Group::WORLD, WallClock::ahead(Duration::ZERO));
    let mut stats = FaultStats::new();
    let mut single = Single { cluster, rng, environment, checkpoints: 0 };
    // There has to be something that can be damaged.
    single.sleep(Duration::from_secs(2)).await;
    let mut done = 0;
    // A write that does not come is no fault.
    for _ in 0..count * 4 {
        if done == count || !single.cluster.problems().is_empty() {
            break;
        }
        let (kind, zone) = (*single.rng.pick(&KINDS), *single.rng.pick(&ZONES));
        match single.one(kind, zone).await {
            Ok(true) => {
                done += 1;
                *stats.entry(name(kind, zone)).or_default() += 1;
            }
            Ok(false) => {}
            Err(e) => single.cluster.problem(format!("{}: {e}", name(kind, zone))),
        }
    }
    stats
}

impl Single {
    async fn sleep(&self, length: Duration) {
        self.cluster.executor.sleep_until(self.cluster.executor.now() + length).await;
    }

    /// One fault and its end. False when it did not come about.
    async fn one(&mut self, kind: Kind, zone: Zone) -> Result<bool, String> {
        let gap = Duration::from_micros(self.rng.below(GAP_MAX_MICROS));
        self.sleep(gap).await;
        let i = self.rng.below(self.cluster.size() as u64) as usize;
        let came = match kind {
            Kind::Flip | Kind::Unreadable => self.spoil(i, zone, kind == Kind::Unreadable).await?,
            Kind::Astray(mishap) => self.astray(i, zone, mishap).await,
        };
        if came {
            self.healed(i).await?;
        }
        Ok(came)
    }

    /// What lies on the disk goes bad, while the node runs or while it has no power.
    async fn spoil(&mut self, i: usize, zone: Zone, unreadable: bool) -> Result<bool, String> {
        let at_rest = self.rng.chance(500);
        if at_rest {
            self.cluster.kill(i);
        }
        let disk = self.cluster.disk(i);
        let place = match zone {
            Zone::Extents => disk.place(zone, Some(&disk.survey(&self.environment).await?.live), unreadable),
            _ => disk.place(zone, None, unreadable),
        };
        if let Some(at) = place {
            self.cluster.log(|| format!("n{i}: {zone:?} goes bad at {at}, unreadable={unreadable} at_rest={at_rest}"));
            disk.spoil(zone, at, unreadable);
        }
        if at_rest {
            self.cluster.start(i);
        } else if self.rng.chance(300) {
            self.sleep(Duration::from_millis(20)).await;
            self.cluster.kill(i);
            self.cluster.start(i);
        }
        if place.is_some() && zone == Zone::Extents && self.rng.chance(500) {
            self.read_all(i).await?;
        }
        Ok(place.is_some())
    }

    /// A write is acknowledged and lands nowhere, elsewhere or in part.
    async fn astray(&mut self, i: usize, zone: Zone, mishap: Mishap) -> bool {
        let cluster = self.cluster.clone();
        let disk = cluster.disk(i);
        cluster.log(|| format!("n{i}: the next write to {zone:?} will be {mishap:?}"));
        // Each open writes all copies.
        if zone == Zone::Superblock {
            cluster.kill(i);
        }
        disk.plan(zone, mishap);
        match zone {
            Zone::Superblock => cluster.start(i),
            Zone::Extents => self.provoke_flush().await,
            Zone::Wal => {}
        }
        let until = cluster.executor.now() + COMES_MAX;
        while disk.is_planned() && cluster.executor.now() < until {
            self.sleep(Duration::from_millis(10)).await;
        }
        if disk.is_planned() {
            cluster.log(|| format!("n{i}: it did not come"));
            disk.calm();
            return false;
        }
        cluster.log(|| format!("n{i}: it has come"));
        // A misdirected write may have hit the log, wherever it belonged.
        if zone == Zone::Wal || mishap == Mishap::Misdirected {
            self.sleep(PROVEN_AFTER).await;
        }
        if self.rng.chance(500) {
            self.cluster.kill(i);
            cluster.start(i);
        }
        true
    }

    /// A checkpoint brings what is in memory into tables.
    async fn provoke_flush(&mut self) {
        self.checkpoints += 1;
        let name = format!("single-{}", self.checkpoints);
        for body in [
            CommandBody::CreateCheckpoint { name: name.clone(), branch: MAIN },
            CommandBody::DropCheckpoint { name: name.clone() },
        ] {
            let Some(leader) = self.cluster.leader() else { return };
            let called = self
                .cluster
                .call(leader, Duration::from_secs(2), |node| {
                    Box::pin(async move {
                        node.write(Write { body, durability: Durability::Quorum }).await.map_err(|e| e.to_string())
                    })
                })
                .await;
            if !matches!(called, Called::Answered(Ok(_))) {
                return;
            }
        }
    }

    /// Reads all that a node holds while some of it is damaged. What it reads is held against another replica.
    async fn read_all(&mut self, i: usize) -> Result<(), String> {
        let other = (i + 1) % self.cluster.size();
        let (Some(mine), Some(theirs)) = (self.checkpoints_of(i).await?, self.checkpoints_of(other).await?) else {
            return Ok(());
        };
        for (name, held) in &mine {
            if let Some(held_there) = theirs.get(name)
                && held_there != held
            {
                return Err(format!("n{i} reads {name} as {held:?}, and n{other} as {held_there:?}"));
            }
        }
        Ok(())
    }

    /// Every checkpoint of a node; none while it does not run, or waits for what others have to give.
    async fn checkpoints_of(&self, i: usize) -> Result<Option<BTreeMap<String, (u64, u128)>>, String> {
        let called = self
            .cluster
            .call(i, Duration::from_secs(30), |node| {
                Box::pin(async move {
                    let group = node.group();
                    let keyspaces = group.keyspaces();
                    let mut found = BTreeMap::new();
                    // The clients know what changes; here it is read to find the damage.
                    scan(&group.snapshot(MAIN)?, &keyspaces).await?;
                    for checkpoint in group.checkpoints() {
                        // One that was dropped meanwhile is not read.
                        if let Ok(view) = group.checkpoint(&checkpoint.name) {
                            found.insert(checkpoint.name, scan(&view, &keyspaces).await?);
                        }
                    }
                    Ok::<_, mainstay_engine::Error>(found)
                })
            })
            .await;
        match called {
            Called::Answered(Ok(found)) => Ok(Some(found)),
            Called::Answered(Err(e)) if e.kind() == ErrorKind::Unavailable => Ok(None),
            Called::Answered(Err(e)) => Err(format!("scan of n{i}: {:?}: {e}", e.kind())),
            Called::Down | Called::Lost => Ok(None),
        }
    }

    /// Waits until the node takes part and its volume is whole.
    async fn healed(&self, i: usize) -> Result<(), String> {
        let cluster = &self.cluster;
        let until = cluster.executor.now() + HEALS_MAX;
        loop {
            let status = cluster.node(i).map(|node| node.status());
            let serves =
                status.as_ref().is_some_and(|s| matches!(s.role.as_str(), "leader" | "follower" | "candidate"));
            let mut wrong = format!("it does not serve: {}", cluster.describe(i));
            if serves {
                match cluster.disk(i).survey(&self.environment).await {
                    Ok(survey) if survey.damage.is_empty() => return Ok(()),
                    Ok(survey) => wrong = format!("{:?}", survey.damage),
                    Err(e) => wrong = e,
                }
            }
            if !cluster.problems().is_empty() {
                return Ok(());
            }
            if cluster.executor.now() > until {
                return Err(format!("n{i} is not healed after {HEALS_MAX:?}: {wrong}"));
            }
            self.sleep(LOOK_EVERY).await;
        }
    }
}
