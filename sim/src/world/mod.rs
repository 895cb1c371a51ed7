//! One world: nodes, network, clients and faults from one seed, and the judgement of what they did.

mod cluster;
mod faults;
mod inserts;
mod judge;
mod operator;
mod placed;
#[cfg(test)]
mod rest;
mod sessions;
mod single;
mod workload;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_engine::{CommandBody, KeyspaceId};
use mainstay_replication::{Durability, Write};

use crate::application::Application;
use crate::net::{Net, NetSettings, NetStats};
use crate::rt::{Executor, Group, SimRng};
use crate::transactions::Transactions;
pub(crate) use cluster::{Called, Cluster};
pub use faults::{Fault, FaultStats, HEALS_ITSELF};
use inserts::Inserts;
use judge::Watcher;
use placed::PlacedClient;
use sessions::Sessions;
pub(crate) use workload::Notes;
use workload::{Client, OWNED};

/// What a world is made of. [`Settings::draw`] takes all of it from a seed.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Nodes that found the cluster.
    pub nodes: usize,
    /// Machines that stand by and may become members.
    pub spares: usize,
    /// Monotonic clocks run faster or slower than the world's by up to so many parts of a million.
    pub clock_drift: u64,
    /// Whether the last of those that found the cluster holds no data; without it the seed says so.
    pub witness: Option<bool>,
    /// Whether there is a group beside the first.
    pub group: bool,
    /// Whether a client puts pairs that expire: in one seed of four.
    pub sessions: bool,
    /// Faults that are drawn in any case.
    pub with: Vec<Fault>,
    /// Clients.
    pub clients: u64,
    /// Virtual time with faults.
    pub length: Duration,
    /// Bytes of the log ring of a node.
    pub wal_bytes: u64,
    /// See `mainstay_engine::GroupSettings`.
    pub memtable_bytes: u64,
    /// See `mainstay_engine::GroupSettings`.
    pub table_bytes: u64,
    /// See `mainstay_engine::GroupSettings`.
    pub base_level_bytes: u64,
    /// See `mainstay_engine::GroupSettings`.
    pub l0_compaction_runs: usize,
    /// See `mainstay_engine::EngineSettings`.
    pub memory_bytes: u64,
    /// See `mainstay_engine::EngineSettings`.
    pub wal_in_flight_max: usize,
    /// See `mainstay_replication::NodeOptions`.
    pub entry_cache_bytes: u64,
    /// The network while faults last.
    pub net: NetSettings,
    /// See `mainstay_engine::EngineSettings`.
    pub scrub_pause: Duration,
    /// So many faults, each alone and healed before the next, in place of all others; see [`Settings::with_single_faults`].
    pub single_faults: u64,
    /// The disks acknowledge writes and flushes that they do not keep: every check must notice.
    pub lying_disks: bool,
    /// Prints what happens.
    pub verbose: bool,
}

impl Settings {
    /// The settings of a seed: small enough that a short run sees rotation, flush, compaction, purge and snapshots.
    pub fn draw(rng: &mut SimRng) -> Self {
        let net = NetSettings {
            delay_min: Duration::from_micros(rng.range(10, 200)),
            delay_max: Duration::from_micros(rng.range(200, 3000)),
            slow: rng.below(20),
            loss: if rng.chance(500) { 0 } else { rng.below(20) },
            duplicate: if rng.chance(500) { 0 } else { rng.below(50) },
            corrupt: if rng.chance(700) { 0 } else { rng.below(5) },
            may_repeat: repeatable,
            ..NetSettings::calm()
        };
        Self {
            nodes: if rng.chance(850) { 3 } else { 5 },
            spares: if rng.chance(600) { 0 } else { rng.range(1, 3) as usize },
            // A lease is worth two thirds of the time that a follower waits before it elects.
            clock_drift: if rng.chance(500) { 0 } else { 50_000 },
            witness: None,
            group: false,
            sessions: false,
            with: Vec::new(),
            clients: 4,
            // Some are long enough for a disk that stands still for 20 s.
            length: Duration::from_millis(if rng.chance(900) {
                rng.range(4_000, 10_000)
            } else {
                rng.range(25_000, 40_000)
            }),
            wal_bytes: rng.range(2, 5) << 20,
            memtable_bytes: rng.range(16, 128) << 10,
            table_bytes: rng.range(16, 64) << 10,
            base_level_bytes: rng.range(32, 256) << 10,
            l0_compaction_runs: rng.range(2, 5) as usize,
            memory_bytes: rng.range(8, 32) << 20,
            wal_in_flight_max: rng.range(1, 5) as usize,
            entry_cache_bytes: rng.range(32, 1024) << 10,
            net,
            scrub_pause: mainstay_engine::SCRUB_PAUSE,
            single_faults: 0,
            lying_disks: false,
            verbose: false,
        }
    }

    /// Makes it a world in good weather, in which `count` faults meet the disk of one node each, with nobody there to mend
    /// anything by hand.
    pub fn with_single_faults(&mut self, count: u64) {
        (self.nodes, self.spares, self.clock_drift) = (3, 0, 0);
        self.sessions = false;
        self.witness = Some(false);
        self.net = NetSettings { delay_min: self.net.delay_min, delay_max: self.net.delay_max, ..NetSettings::calm() };
        self.clients = 1;
        self.wal_bytes = 2 << 20;
        self.memtable_bytes = 16 << 10;
        self.scrub_pause = Duration::from_millis(500);
        self.single_faults = count;
    }
}

/// Requests that change nothing when they arrive twice: appends, votes, reads of tables and of positions, greetings, pulses
/// (docs/format.md, peer protocol). A forwarded write is not among them.
fn repeatable(method: u8) -> bool {
    matches!(method, 1 | 2 | 3 | 6 | 8 | 15 | 16 | 31 | 32)
}

/// What a run did, whatever its verdict.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// The hash over every poll and event.
    pub trace: u64,
    /// Virtual time.
    pub time: Duration,
    /// Polls.
    pub polls: u64,
    /// Faults.
    pub faults: FaultStats,
    /// The network's counts.
    pub net: NetStats,
    /// Terms in which somebody was seen to lead.
    pub elections: u64,
    /// What clients did, by kind.
    pub counts: BTreeMap<&'static str, u64>,
    /// Operations in the history of registers.
    pub history: usize,
    /// Counts of the engines at the end, summed over the nodes.
    pub engine: EngineCounts,
    /// What went wrong. Empty for a seed that passed.
    pub problems: Vec<String>,
}

/// Counts of the engines at the end, for the judgement whether a run went deep enough.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineCounts {
    /// Last applied entry of the furthest node.
    pub applied: u64,
    /// Last entry in tables of the furthest node.
    pub flushed: u64,
    /// Tables of the furthest node.
    pub tables: u64,
}

impl Summary {
    /// Nodes that lost power.
    pub fn crashes(&self) -> u64 {
        let count = |fault: Fault| self.faults.get(fault.name()).copied().unwrap_or_default();
        count(Fault::Crash) + count(Fault::LeaderCrash) + count(Fault::Blackout) * 3
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |what| self.counts.get(what).copied().unwrap_or_default();
        write!(
            f,
            "trace={:016x} virtual={:.1}s polls={} applied={} flushed={} tables={} writes={} reads={} unknown={} \
             copies={} faults={} crashes={} elections={} calls={} lost={}",
            self.trace,
            self.time.as_secs_f64(),
            self.polls,
            self.engine.applied,
            self.engine.flushed,
            self.engine.tables,
            count("writes"),
            count("reads"),
            count("unknown"),
            count("checkpoints") + count("clones"),
            self.faults.values().sum::<u64>(),
            self.crashes(),
            self.elections,
            self.net.calls,
            self.net.lost
        )
    }
}

/// Runs one seed in a fresh world and judges it. `adjust` may change what the seed drew.
pub fn run(seed: u64, adjust: impl FnOnce(&mut Settings)) -> Summary {
    run_with(seed, Transactions::new(), adjust)
}

/// As [`run`], with a state machine and clients of the caller's.
pub fn run_with(seed: u64, application: Arc<dyn Application>, adjust: impl FnOnce(&mut Settings)) -> Summary {
    let mut rng = SimRng::new(seed);
    let mut settings = Settings::draw(&mut rng);
    settings.sessions = sessions::are_in(seed);
    adjust(&mut settings);
    let executor = Executor::new(seed);
    let summary = executor.block_on(live(&executor, settings, &application, rng));
    executor.shut_down();
    summary
}

async fn live(
    executor: &Arc<Executor>,
    settings: Settings,
    application: &Arc<dyn Application>,
    mut rng: SimRng,
) -> Summary {
    // Births happen in good weather: an operator watches them.
    let net = Net::new(executor, NetSettings::calm());
    let cluster = Cluster::new(executor, &net, &settings, application.clone(), &mut rng);
    let notes = Arc::new(Notes::new());
    let mut summary = Summary::default();
    for i in 0..cluster.size() {
        cluster.start(i);
    }
    match birth(&cluster).await {
        Err(e) => cluster.problem(e),
        Ok(keyspace) => {
            net.set(settings.net);
            let hand = rng.fork();
            if settings.single_faults == 0 {
                drop(executor.spawn(Group::WORLD, "operator", Box::pin(operator::run(cluster.clone(), hand))));
            }
            let watching = background(executor, "watcher", Watcher::default().run(cluster.clone(), notes.clone()));
            let mut running = Vec::new();
            for id in 0..settings.clients {
                let client = Client::new(id, &cluster, &notes, application, rng.fork(), keyspace);
                running.push(background(executor, "client", client.run()));
            }
            // Born while things go wrong.
            let aside = settings.group.then_some("aside");
            let inserts: Vec<Arc<Inserts>> =
                [None].into_iter().chain(aside.map(Some)).map(Inserts::into_group).collect();
            let mut inserting = Vec::new();
            for inserts in &inserts {
                let run = inserts.clone().run(cluster.clone(), notes.clone(), rng.fork());
                inserting.push(background(executor, "inserts", run));
            }
            // They give birth to groups of their own.
            for id in 0..aside.map_or(0, |_| placed::CLIENTS) {
                let client = PlacedClient::new(id, &cluster, &notes, rng.fork());
                inserting.push(background(executor, "placed", client.run()));
            }
            let mut sessions = None;
            if settings.sessions {
                let client = Sessions::new(&cluster, &notes, rng.fork());
                sessions = Some(background(executor, "sessions", client.run()));
            }
            let until = executor.now() + settings.length;
            summary.faults = match settings.single_faults {
                0 => faults::run(cluster.clone(), rng.fork(), until).await,
                count => single::run(cluster.clone(), rng.fork(), count).await,
            };
            faults::calm(&cluster);
            // Clients see the recovery too.
            executor.sleep_until(executor.now() + Duration::from_secs(1)).await;
            notes.stop.store(true, Ordering::Relaxed);
            let mut clients = Vec::new();
            for ended in running {
                clients.push(ended.await.expect("a client of the world is never killed"));
            }
            for inserting in inserting {
                inserting.await.expect("what the world runs is never killed");
            }
            let sessions = match sessions {
                Some(ended) => Some(ended.await.expect("a client of the world is never killed")),
                None => None,
            };
            let mut watcher = watching.await.expect("the watcher is never killed");
            faults::calm(&cluster);
            let aside = judge::Aside { inserts: &inserts, placed: aside.is_some(), sessions: sessions.as_ref() };
            let judged = judge::judge(&cluster, &notes, &mut watcher, &mut clients, &aside, &**application, &mut rng);
            if let Err(e) = judged.await {
                cluster.problem(e);
            }
            summary.elections = watcher.elections();
        }
    }
    cluster.ending.store(true, Ordering::Relaxed);
    for node in (0..cluster.size()).filter_map(|i| cluster.node(i)) {
        let group = node.status().group;
        summary.engine.applied = summary.engine.applied.max(group.applied.0);
        summary.engine.flushed = summary.engine.flushed.max(group.flushed.0);
        summary.engine.tables = summary.engine.tables.max(group.tables);
    }
    summary.trace = executor.trace_hash();
    summary.time = executor.now();
    summary.polls = executor.polls();
    summary.net = net.stats();
    summary.counts = notes.counts();
    summary.history = notes.history().len();
    for i in 0..cluster.size() {
        cluster.kill(i);
    }
    summary.problems = cluster.problems();
    summary
}

/// Runs a task of the world; resolves to what it returned.
fn background<T: Send + 'static>(
    executor: &Arc<Executor>,
    name: &str,
    task: impl Future<Output = T> + Send + 'static,
) -> tokio::sync::oneshot::Receiver<T> {
    let (done, ended) = tokio::sync::oneshot::channel();
    let task = Box::pin(async move {
        // The world has ended if nobody waits any more.
        let _ = done.send(task.await);
    });
    drop(executor.spawn(Group::WORLD, name, task));
    ended
}

/// Makes one cluster of the nodes and a keyspace in it.
async fn birth(cluster: &Arc<Cluster>) -> Result<KeyspaceId, String> {
    let deadline = cluster.executor.now() + Duration::from_secs(30);
    let mut last = "the first node did not start".to_owned();
    let mut born = false;
    while cluster.executor.now() < deadline {
        cluster.executor.sleep_until(cluster.executor.now() + Duration::from_millis(20)).await;
        if (0..cluster.size()).any(|i| cluster.node(i).is_none()) {
            continue;
        }
        if !born {
            let names = cluster.names();
            let init = cluster
                .call(0, Duration::from_secs(10), move |node| {
                    Box::pin(async move { node.init(&names).await.map_err(|e| e.to_string()) })
                })
                .await;
            match init {
                Called::Answered(Ok(_)) => born = true,
                Called::Answered(Err(e)) => last = format!("init: {e}"),
                Called::Down | Called::Lost => "init: no answer".clone_into(&mut last),
            }
            continue;
        }
        let made = cluster
            .call(0, Duration::from_secs(10), |node| {
                Box::pin(async move {
                    let body = CommandBody::CreateKeyspace { name: OWNED.to_owned() };
                    node.write(Write { body, durability: Durability::Quorum }).await.map_err(|e| e.to_string())?;
                    node.group().keyspace(OWNED).ok_or_else(|| "the keyspace is not there".to_owned())
                })
            })
            .await;
        match made {
            Called::Answered(Ok(id)) => return Ok(id),
            Called::Answered(Err(e)) => last = format!("first write: {e}"),
            Called::Down | Called::Lost => "first write: no answer".clone_into(&mut last),
        }
    }
    Err(format!("the cluster was not born: {last} {:?}", cluster.problems()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The short form, for who works on the core: one world, twice. `cargo xtask sim` runs many, in less time.
    #[test]
    fn a_seed_passes_and_repeats() {
        let run = || run(1, |settings| settings.length = Duration::from_secs(2));
        let first = run();
        assert_eq!(first.problems, Vec::<String>::new(), "{first}");
        assert_eq!(first.trace, run().trace);
    }

    /// The short form of `cargo xtask sim --single-faults`; and what does not heal is found.
    #[test]
    fn single_faults_heal_and_what_does_not_is_found() {
        let healed = run(1, |settings| settings.with_single_faults(4));
        assert_eq!(healed.problems, Vec::<String>::new(), "{healed}");
        assert_eq!(healed.faults.values().sum::<u64>(), 4);
        // Without a scrubber, and without clients whose writes have tables compacted away and the log cut.
        let neglected = run(1, |settings| {
            settings.with_single_faults(4);
            settings.clients = 0;
            settings.scrub_pause = Duration::from_secs(3600);
        });
        assert!(neglected.problems.iter().any(|problem| problem.contains("is not healed")), "{neglected}");
    }
}
