//! What goes wrong, and when: crashes, cuts, pauses, slow and failing disks, drawn from the seed.

use std::sync::Arc;
use std::time::Duration;

use super::cluster::{Called, Cluster};
use crate::rt::SimRng;

/// Counts of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultStats {
    /// Power cuts of one node.
    pub crashes: u64,
    /// Power cuts of all nodes at once.
    pub blackouts: u64,
    /// Restarts in good order.
    pub restarts: u64,
    /// Cut links and partitions.
    pub cuts: u64,
    /// Nodes that stood still for a while.
    pub pauses: u64,
    /// Disks that were slow or failed.
    pub disks: u64,
    /// Leaders that were asked to hand over.
    pub transfers: u64,
}

impl FaultStats {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.crashes + self.blackouts + self.restarts + self.cuts + self.pauses + self.disks + self.transfers
    }
}

/// How much of each fault a seed has; some have none at all, so that each is also met alone.
struct Weights {
    crash: u64,
    leader: u64,
    blackout: u64,
    restart: u64,
    cut: u64,
    partition: u64,
    pause: u64,
    disk: u64,
    transfer: u64,
}

impl Weights {
    fn draw(rng: &mut SimRng) -> Self {
        let mut some = |most: u64| if rng.chance(300) { 0 } else { rng.range(1, most + 1) };
        Self {
            crash: some(10),
            leader: some(10),
            blackout: some(3),
            restart: some(3),
            cut: some(6),
            partition: some(6),
            pause: some(4),
            disk: some(4),
            transfer: some(3),
        }
    }
}

/// Works until `until`, then leaves everything as it is; [`calm`] mends it.
pub(crate) async fn run(cluster: Arc<Cluster>, mut rng: SimRng, until: Duration) -> FaultStats {
    let weights = Weights::draw(&mut rng);
    let gap_max = rng.range(100, 1500);
    let mut stats = FaultStats::default();
    loop {
        let gap = Duration::from_micros(rng.range(1000, gap_max * 1000));
        cluster.executor.sleep_until(cluster.executor.now() + gap).await;
        if cluster.executor.now() >= until {
            return stats;
        }
        one(&cluster, &mut rng, &weights, &mut stats).await;
    }
}

/// Chooses and starts one fault.
async fn one(cluster: &Arc<Cluster>, rng: &mut SimRng, weights: &Weights, stats: &mut FaultStats) {
    let choices = [
        weights.crash,
        weights.leader,
        weights.blackout,
        weights.restart,
        weights.cut,
        weights.partition,
        weights.pause,
        weights.disk,
        weights.transfer,
    ];
    let mut left = rng.below(choices.iter().sum());
    let chosen = choices.iter().position(|weight| {
        let here = left < *weight;
        left = left.saturating_sub(*weight);
        here
    });
    let node = rng.below(cluster.size() as u64) as usize;
    match chosen {
        Some(0) => {
            stats.crashes += 1;
            crash(cluster, rng, node, 3_000_000);
        }
        Some(1) => {
            // The leader loses power with a log that is not synced and is back before anybody has noticed.
            let leader = cluster.leader().unwrap_or(node);
            stats.crashes += 1;
            crash(cluster, rng, leader, 80_000);
        }
        Some(2) => {
            stats.blackouts += 1;
            for i in 0..cluster.size() {
                crash(cluster, rng, i, 1_000_000);
            }
        }
        Some(3) => {
            stats.restarts += 1;
            if cluster.is_powered(node) {
                cluster.stop(node).await;
                later(cluster, rng.below(500_000), move |cluster| start_if_down(&cluster, node));
            }
        }
        Some(4) => {
            stats.cuts += 1;
            let other = (node + 1 + rng.below(cluster.size() as u64 - 1) as usize) % cluster.size();
            cut(cluster, rng, &[(node, other)]);
        }
        Some(5) => {
            stats.cuts += 1;
            let links: Vec<_> =
                (0..cluster.size()).filter(|i| *i != node).flat_map(|i| [(node, i), (i, node)]).collect();
            cut(cluster, rng, &links);
        }
        Some(6) => {
            stats.pauses += 1;
            let length = Duration::from_micros(rng.range(1_000, 2_000_000));
            cluster.log(|| format!("pause n{node} {length:?}"));
            cluster.executor.pause(cluster.group(node), length);
        }
        Some(7) => {
            stats.disks += 1;
            let length = Duration::from_micros(rng.range(10_000, 1_000_000));
            cluster.log(|| format!("slow disk n{node} {length:?}"));
            cluster.disk(node).slow(length);
        }
        Some(8) => {
            stats.transfers += 1;
            if let Some(leader) = cluster.leader() {
                let done = cluster
                    .call(leader, Duration::from_secs(2), |node| {
                        Box::pin(async move { node.transfer_leader(None).await.map_err(|e| e.to_string()) })
                    })
                    .await;
                if let Called::Answered(answer) = done {
                    cluster.log(|| format!("transfer from n{leader}: {answer:?}"));
                }
            }
        }
        _ => {}
    }
}

fn crash(cluster: &Arc<Cluster>, rng: &mut SimRng, node: usize, down_max_micros: u64) {
    let down = rng.below(down_max_micros);
    if cluster.is_powered(node) {
        cluster.kill(node);
        later(cluster, down, move |cluster| start_if_down(&cluster, node));
    }
}

fn start_if_down(cluster: &Arc<Cluster>, node: usize) {
    if !cluster.is_powered(node) {
        cluster.start(node);
    }
}

fn cut(cluster: &Arc<Cluster>, rng: &mut SimRng, links: &[(usize, usize)]) {
    cluster.log(|| format!("cut {links:?}"));
    for (from, to) in links {
        cluster.net.cut(cluster.address(*from), cluster.address(*to));
    }
    let links = links.to_vec();
    later(cluster, rng.range(50_000, 4_000_000), move |cluster| {
        cluster.log(|| format!("mend {links:?}"));
        for (from, to) in &links {
            cluster.net.mend(cluster.address(*from), cluster.address(*to));
        }
    });
}

fn later(cluster: &Arc<Cluster>, micros: u64, run: impl FnOnce(Arc<Cluster>) + Send + 'static) {
    let me = cluster.clone();
    cluster.executor.after(crate::rt::Group::WORLD, Duration::from_micros(micros), Box::new(move || run(me)));
}

/// Ends all faults: links whole, disks fast, power everywhere.
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
