//! Leaders whose disk is worse than those of the others give leadership away, and keep it when nobody is better.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_engine::LogIndex;
use mainstay_io::Environment;
use mainstay_io::sim::{SimMedia, SimOptions, SimScheduler};

use super::Threads;
use super::cluster::{Cluster, WAL_BYTES, format_volume, pause, run};
use crate::ErrorKind;

/// Elections of a busy machine that a test lives through.
const ELECTIONS_MAX: usize = 3;

/// The disk answers nothing.
const NEVER: u64 = u64::MAX;

/// How long the operations of a disk take, and what it has not answered while it answers nothing.
#[derive(Default)]
struct Pace {
    millis: AtomicU64,
    held: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

struct Paced {
    pace: Arc<Pace>,
    runtime: tokio::runtime::Handle,
}

impl Pace {
    fn set(&self, millis: u64) {
        self.millis.store(millis, Ordering::Release);
        if millis != NEVER {
            let held = std::mem::take(&mut *self.held.lock().expect("not poisoned"));
            held.into_iter().for_each(|land| land());
        }
    }
}

impl SimScheduler for Paced {
    fn after(&self, delay: Duration, land: Box<dyn FnOnce() + Send>) {
        match self.pace.millis.load(Ordering::Acquire) {
            NEVER => self.pace.held.lock().expect("not poisoned").push(land),
            millis => drop(self.runtime.spawn(async move {
                let delay = delay + Duration::from_millis(millis);
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                land();
            })),
        }
    }
}

/// Three voters on disks whose pace the test sets, with rings of so many bytes, on a clock that goes.
async fn paced(wal_bytes: u64) -> (Cluster, Vec<Arc<Pace>>) {
    let mut cluster = Cluster::blank(3).await;
    cluster.clock = Some(Environment::system().clock);
    let mut paces = Vec::new();
    for (i, cell) in cluster.cells.iter_mut().enumerate() {
        let pace = Arc::new(Pace::default());
        let scheduler = Paced { pace: pace.clone(), runtime: tokio::runtime::Handle::current() };
        let options = SimOptions { seed: i as u64, capacity: 1 << 30, ..SimOptions::default() };
        let layout = mainstay_io::sim::SimLayout::Directory;
        cell.media = SimMedia::scheduled(layout, options, Arc::new(scheduler), Arc::new(Threads));
        format_volume(&cell.media, wal_bytes).await;
        paces.push(pace);
    }
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()).await.expect("born");
    (cluster, paces)
}

/// Writes through node `i` until `done`; what is refused meanwhile is told by `refused`. Returns how many were written.
async fn write_until(cluster: &Cluster, i: usize, value: &[u8], done: impl Fn() -> bool) -> (u64, Vec<ErrorKind>) {
    let (mut written, mut refused) = (0, Vec::new());
    while !done() {
        match cluster.put(i, &format!("k{written}"), value.to_vec()).await {
            Ok(_) => written += 1,
            Err(error) => {
                refused.push(error.kind());
                pause().await;
            }
        }
    }
    (written, refused)
}

fn hand_overs(cluster: &Cluster) -> u64 {
    cluster.running().map(|i| cluster.node(i).status().disk_hand_overs).sum()
}

async fn leaves_the_slow(millis: u64) {
    // What is written until it may hand over stays below half of a ring: no cut is due, which takes its disk too.
    let (cluster, paces) = paced(8 * WAL_BYTES).await;
    let sick = cluster.leader().await;
    let id = cluster.node(sick).status().id;
    let other = (sick + 1) % 3;
    paces[sick].set(millis);
    let moved = || cluster.node(other).status().leader.is_some_and(|leader| leader != id);
    for _ in 0..ELECTIONS_MAX {
        write_until(&cluster, other, b"v", moved).await;
        if cluster.node(sick).status().disk_hand_overs > 0 {
            break;
        }
        // Others took over by themselves, on a machine too busy for heartbeats: the sick one is made to lead again.
        let leader = cluster.leader().await;
        let _ = cluster.node(leader).transfer_leader(Some(id)).await;
    }
    assert_eq!(cluster.node(sick).status().disk_hand_overs, 1, "it went because it was handed over");
    let health = cluster.until(sick, |status| status.disk.write_latency.is_some()).await.disk;
    assert!(health.write_latency >= Some(Duration::from_millis(10)), "{health:?}");
    cluster.put(other, "after", "v").await.expect("the new leader takes writes");
    paces[sick].set(0);
    cluster.put(sick, "healed", "v").await.expect("written");
    cluster.finish().await;
}

#[test]
fn a_leader_with_a_slow_disk_hands_over() {
    run(leaves_the_slow(40));
}

#[test]
fn a_leader_whose_disk_answers_nothing_hands_over() {
    run(leaves_the_slow(NEVER));
}

/// A leader whose disk is slower than those of the others puts several entries into a batch where they write one each. Their rings
/// were full of batches while its own was nearly empty: nobody proposed the rotation without which no ring is cut, and none
/// could be appended any more, so the cluster took no write for ever.
#[test]
fn the_rings_of_followers_that_fill_up_first_are_cut() {
    run(async {
        let (cluster, paces) = paced(2 << 20).await;
        let leader = cluster.leader().await;
        paces[leader].set(40);
        // Each of the rings has room for half as many batches.
        let (mut written, mut refused) = (0, Vec::new());
        while written < 1024 {
            match cluster.put(leader, &format!("k{written}"), "v").await {
                Ok(_) => written += 1,
                Err(error) => refused.push(error),
            }
            assert!(refused.len() <= ELECTIONS_MAX, "rings are not cut in time written={written}: {refused:?}");
        }
        paces[leader].set(0);
        cluster.finish().await;
    });
}

/// Equal disks are no reason, however slow they are.
#[test]
fn a_leader_stays_when_all_disks_are_slow() {
    run(async {
        let (cluster, paces) = paced(WAL_BYTES).await;
        let leader = cluster.leader().await;
        paces.iter().for_each(|pace| pace.set(20));
        // Longer than it takes until a leader may hand over, with several looks behind it.
        let began = tokio::time::Instant::now();
        let (written, _) =
            write_until(&cluster, leader, b"v", || began.elapsed() > crate::disk::LED_MIN + Duration::from_secs(3))
                .await;
        assert!(written > 0);
        let status = cluster.node(leader).status();
        assert!(status.disk.write_latency >= Some(Duration::from_millis(20)), "{:?}", status.disk);
        assert_eq!(hand_overs(&cluster), 0);
        paces.iter().for_each(|pace| pace.set(0));
        cluster.finish().await;
    });
}

#[test]
fn a_leader_on_a_full_disk_hands_over_and_writes_go_on() {
    run(async {
        let cluster = Cluster::born_with(3, 256 << 10).await;
        let sick = cluster.leader().await;
        let id = cluster.node(sick).status().id;
        let other = (sick + 1) % 3;
        let disk = cluster.cells[sick].media.extents_disk().clone();
        disk.set_space(Some(disk.allocated()));
        let value = vec![7; 16 << 10];
        let moved = || cluster.node(other).status().leader.is_some_and(|leader| leader != id);
        let (_, refused) = write_until(&cluster, other, &value, moved).await;
        assert!(!refused.is_empty(), "a leader without space refuses writes");
        assert_eq!(cluster.until(sick, |status| status.disk.full).await.disk_hand_overs, 1);
        // More than the memtables of the sick one hold: nobody waits for it.
        for i in 0..64 {
            cluster.put(other, &format!("later{i}"), value.clone()).await.expect("the new leader takes writes");
        }
        disk.set_space(None);
        let applied = cluster.node(other).status().group.applied;
        cluster.until(sick, |status| !status.disk.full && status.group.applied >= applied).await;
        assert!(applied > LogIndex(64));
        cluster.finish().await;
    });
}

#[test]
fn a_leader_stays_when_all_disks_are_full() {
    run(async {
        let cluster = Cluster::born_with(3, 256 << 10).await;
        let leader = cluster.leader().await;
        for cell in &cluster.cells {
            let disk = cell.media.extents_disk();
            disk.set_space(Some(disk.allocated()));
        }
        let value = vec![7; 16 << 10];
        let full = || (0..3).all(|i| cluster.node(i).status().disk.full);
        write_until(&cluster, leader, &value, full).await;
        let began = tokio::time::Instant::now();
        let asked = || began.elapsed() > crate::disk::LED_MIN + Duration::from_secs(2);
        let (written, refused) = write_until(&cluster, leader, &value, asked).await;
        assert_eq!(written, 0);
        assert!(refused.iter().all(|kind| *kind == ErrorKind::OutOfSpace), "{refused:?}");
        assert_eq!(hand_overs(&cluster), 0);
        for cell in &cluster.cells {
            cell.media.extents_disk().set_space(None);
        }
        // The first that asks is still refused, and has it looked at.
        while let Err(error) = cluster.put(leader, "after", "v").await {
            assert_eq!(error.kind(), ErrorKind::OutOfSpace, "{error}");
            pause().await;
        }
        cluster.finish().await;
    });
}
