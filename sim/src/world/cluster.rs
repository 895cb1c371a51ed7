//! The nodes of a world: disks, lives, power.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay_engine::{Engine, EngineSettings, ErrorKind, GroupSettings, LogIndex};
use mainstay_io::BoxFuture;
use mainstay_io::sim::DiskImage;
use mainstay_replication::{CommitToken, MemberInfo, MemberRole, Node, NodeOptions, PeerAddress};
use openraft_rt::AsyncRuntime;
use tokio::sync::oneshot;

use super::Settings;
use crate::application::Application;
use crate::disk::Disk;
use crate::net::Net;
use crate::rt::{Executor, Group, SimRng, SimRuntime, WallClock, environment};

/// A node as the world holds it.
pub(crate) type SimNode = Arc<Node<SimRuntime>>;
/// The last entry of each group, the first one without a name.
pub(crate) type LastLogs = BTreeMap<Option<String>, LogIndex>;

/// What became of an operation that was handed to a node.
pub(crate) enum Called<T> {
    /// The node was down: it certainly never saw the operation.
    Down,
    /// The node died, or gave no answer in time.
    Lost,
    /// The answer.
    Answered(T),
}

impl<T> Called<T> {
    /// The same, with another answer.
    pub(crate) fn map<U>(self, change: impl FnOnce(T) -> U) -> Called<U> {
        match self {
            Self::Down => Called::Down,
            Self::Lost => Called::Lost,
            Self::Answered(answer) => Called::Answered(change(answer)),
        }
    }
}

/// How far wall clocks lie apart before any of them jumps.
pub(crate) const WALL_SPREAD_MAX: Duration = Duration::from_secs(2);

/// In [`Cluster::flood`]: clients write as they always do.
pub(crate) const NO_FLOOD: usize = usize::MAX;

/// The nodes.
pub(crate) struct Cluster {
    pub(crate) executor: Arc<Executor>,
    pub(crate) net: Arc<Net>,
    pub(crate) settings: Settings,
    application: Arc<dyn Application>,
    members: Vec<Member>,
    /// A change of the membership is under way.
    pub(crate) changing: AtomicBool,
    /// The node that hears nobody while clients write much through the others; [`NO_FLOOD`] if there is none.
    pub(crate) flood: AtomicUsize,
    /// The world ends: nobody starts anything more.
    pub(crate) ending: AtomicBool,
    /// See [`Cluster::walls_jumped`].
    jumped: AtomicBool,
    /// What went wrong that no fault explains. The run has failed if there is any.
    problems: Mutex<Vec<String>>,
}

struct Member {
    name: String,
    address: PeerAddress,
    disk: Disk,
    wall: Arc<WallClock>,
    /// How much faster than the world its clock runs, in parts of a million.
    rate: i64,
    /// Told to the cluster when it becomes a member.
    priority: u8,
    /// It holds no data.
    witness: bool,
    slot: Mutex<Slot>,
}

/// A volume as it was once.
pub(crate) struct VolumeCopy {
    images: Vec<DiskImage>,
    damaged: bool,
}

#[derive(Default)]
struct Slot {
    /// Lives begun so far; the current one is the last.
    lives: u64,
    powered: bool,
    formatted: bool,
    node: Option<SimNode>,
    engine: Option<Engine>,
    /// Why the current life did not begin, and whether the volume was said to be damaged.
    boot_failure: Option<(String, bool)>,
    /// A fault is the reason if this life fails.
    excused: bool,
    /// Bytes at rest were damaged: it may say `Corrupt`.
    damaged: bool,
    /// The volume is a copy: it may be told so, and leave service.
    copied: bool,
    /// The last write that this life answered at `Local`.
    local: Option<CommitToken>,
    /// What the last life promised alone and the next one must still have, unless a newer leader took it back.
    promised: Option<CommitToken>,
}

/// What an operator sees of a node that does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It left service or did not start; starting it again may help.
    Failed,
    /// Its volume is damaged.
    Damaged,
    /// It was removed from its cluster.
    Removed,
}

impl Member {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cluster {
    pub(crate) fn new(
        executor: &Arc<Executor>,
        net: &Arc<Net>,
        settings: &Settings,
        application: Arc<dyn Application>,
        rng: &mut SimRng,
    ) -> Arc<Self> {
        let drift = settings.clock_drift;
        // A stream of its own: the rest of a seed is what it is without priorities.
        let mut ranks = rng.clone().fork();
        let ranked = ranks.chance(300);
        let witnessed = settings.witness.unwrap_or_else(|| ranks.clone().fork().chance(250));
        let members = (0..settings.nodes + settings.spares)
            .map(|i| Member {
                name: format!("n{i}"),
                address: PeerAddress(format!("n{i}:7000")),
                disk: Disk::new(executor, settings, rng.u64()),
                wall: WallClock::ahead(Duration::from_millis(rng.below(WALL_SPREAD_MAX.as_millis() as u64))),
                rate: rng.below(2 * drift + 1) as i64 - drift as i64,
                priority: if ranked { ranks.below(3) as u8 } else { 0 },
                witness: witnessed && i + 1 == settings.nodes,
                slot: Mutex::default(),
            })
            .collect();
        Arc::new(Self {
            executor: executor.clone(),
            net: net.clone(),
            settings: settings.clone(),
            application,
            members,
            changing: AtomicBool::new(false),
            jumped: AtomicBool::new(false),
            flood: AtomicUsize::new(NO_FLOOD),
            ending: AtomicBool::new(false),
            problems: Mutex::default(),
        })
    }

    pub(crate) fn size(&self) -> usize {
        self.members.len()
    }

    /// The names of those that found the cluster.
    pub(crate) fn names(&self) -> Vec<String> {
        self.members.iter().take(self.settings.nodes).map(|member| member.name.clone()).collect()
    }

    /// Whether a node holds no data.
    pub(crate) fn is_witness(&self, i: usize) -> bool {
        self.members[i].witness
    }

    /// The node of that name.
    pub(crate) fn by_name(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|member| member.name == name)
    }

    pub(crate) fn name(&self, i: usize) -> &str {
        &self.members[i].name
    }

    /// The members as the leader knows them.
    pub(crate) fn view(&self) -> Option<Vec<MemberInfo>> {
        Some(self.node(self.leader()?)?.status().members)
    }

    /// The wall clock of a node jumps.
    pub(crate) fn set_wall(&self, i: usize, ahead: Duration) {
        self.jumped.store(true, Ordering::Relaxed);
        self.members[i].wall.set(ahead);
    }

    /// Whether any wall clock has jumped: before, they lie within [`WALL_SPREAD_MAX`].
    pub(crate) fn walls_jumped(&self) -> bool {
        self.jumped.load(Ordering::Relaxed)
    }

    /// From now on this life may fail: a fault is the reason.
    pub(crate) fn excuse(&self, i: usize) {
        self.members[i].slot().excused = true;
    }

    pub(crate) fn is_excused(&self, i: usize) -> bool {
        let slot = self.members[i].slot();
        slot.excused || slot.damaged || slot.copied
    }

    /// Bytes of this volume were damaged: it may say so until it is wiped.
    pub(crate) fn damage(&self, i: usize) {
        self.members[i].slot().damaged = true;
    }

    /// A copy has become what the volume was.
    pub(crate) fn is_itself_again(&self, i: usize) {
        self.members[i].slot().copied = false;
    }

    pub(crate) fn is_damaged(&self, i: usize) -> bool {
        self.members[i].slot().damaged
    }

    /// A write was answered at `Local` by this life.
    pub(crate) fn promised(&self, i: usize, life: Group, token: CommitToken) {
        if self.group(i) == life {
            let mut slot = self.members[i].slot();
            slot.local = slot.local.max(Some(token));
        }
    }

    /// What an operator would see of a node.
    pub(crate) fn trouble(&self, i: usize) -> Option<Trouble> {
        let slot = self.members[i].slot();
        if let Some((_, damaged)) = &slot.boot_failure {
            return Some(if *damaged { Trouble::Damaged } else { Trouble::Failed });
        }
        let status = slot.node.as_ref()?.status();
        drop(slot);
        match status.role.as_str() {
            "failed" => Some(Trouble::Failed),
            "removed" => Some(Trouble::Removed),
            _ => None,
        }
    }

    /// Wipes the volume of a node that has no power: what comes back is blank.
    pub(crate) fn wipe(&self, i: usize) {
        let member = &self.members[i];
        let mut slot = member.slot();
        assert!(!slot.powered, "node {i} has power");
        slot.formatted = false;
        slot.damaged = false;
        slot.copied = false;
        slot.promised = None;
        drop(slot);
        self.log(|| format!("wipe {}", member.name));
        member.disk.wipe();
    }

    /// The volume as it is now, and whether bytes of it were damaged.
    pub(crate) fn copy(&self, i: usize) -> VolumeCopy {
        VolumeCopy { images: self.disk(i).images(), damaged: self.is_damaged(i) }
    }

    /// Puts a copy of some volume in the place of this one's. The node has no power.
    pub(crate) fn restore(&self, i: usize, copy: VolumeCopy) {
        let member = &self.members[i];
        let mut slot = member.slot();
        assert!(!slot.powered, "node {i} has power");
        slot.formatted = true;
        slot.copied = true;
        slot.damaged = copy.damaged;
        slot.promised = None;
        drop(slot);
        member.disk.restore(copy.images);
    }

    pub(crate) fn address(&self, i: usize) -> &PeerAddress {
        &self.members[i].address
    }

    pub(crate) fn disk(&self, i: usize) -> &Disk {
        &self.members[i].disk
    }

    /// The group of the current life of a node.
    pub(crate) fn group(&self, i: usize) -> Group {
        Group(1 + (i as u64) + 100 * self.members[i].slot().lives)
    }

    /// The node, if it has power and has started.
    pub(crate) fn node(&self, i: usize) -> Option<SimNode> {
        self.members[i].slot().node.clone()
    }

    /// What the node and its engine say of themselves, for messages.
    pub(crate) fn describe(&self, i: usize) -> String {
        let (node, engine) = {
            let slot = self.members[i].slot();
            (slot.node.clone(), slot.engine.clone())
        };
        let groups = node.iter().flat_map(|node| node.groups());
        let groups: String =
            groups.map(|(name, node)| format!("\n        {name}: {}", describe_replica(&node))).collect();
        let node = node.as_deref().map(describe_replica);
        let engine = engine.map(|engine| engine.status()).map(|s| {
            format!(
                "wal={}/{} memory={}/{} read_only={:?}",
                s.wal_used_bytes, s.wal_ring_bytes, s.memory_used_bytes, s.memory_bytes, s.read_only
            )
        });
        format!("{}: {node:?} {engine:?}{groups}", self.members[i].name)
    }

    /// [`Cluster::describe`] for all.
    pub(crate) fn describe_all(&self) -> String {
        (0..self.size()).map(|i| self.describe(i)).collect::<Vec<_>>().join("\n    ")
    }

    pub(crate) fn is_powered(&self, i: usize) -> bool {
        self.members[i].slot().powered
    }

    /// Nodes without power.
    pub(crate) fn down(&self) -> Vec<usize> {
        (0..self.size()).filter(|i| !self.is_powered(*i)).collect()
    }

    pub(crate) fn problem(&self, text: impl Into<String>) {
        let text = format!("{:?} {}", self.executor.now(), text.into());
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Settings equal on all nodes.
    pub(crate) fn group_settings(&self) -> GroupSettings {
        GroupSettings {
            memtable_bytes: self.settings.memtable_bytes,
            table_bytes: self.settings.table_bytes,
            base_level_bytes: self.settings.base_level_bytes,
            l0_compaction_runs: self.settings.l0_compaction_runs,
            compression: mainstay_engine::TableCompression::ByLevel,
            state_machine: Some(self.application.state_machine()),
            merge_operators: Default::default(),
        }
    }

    /// Gives a node power: a new life begins, and it starts in the background.
    pub(crate) fn start(self: &Arc<Self>, i: usize) {
        let member = &self.members[i];
        {
            let mut slot = member.slot();
            assert!(!slot.powered, "node {i} has power already");
            slot.powered = true;
            slot.lives += 1;
            slot.excused = member.disk.is_at_fault();
            slot.boot_failure = None;
        }
        let group = self.group(i);
        self.log(|| format!("start {} life={}", member.name, group.0));
        member.disk.power_on(group);
        let me = self.clone();
        let boot = Box::pin(async move {
            if let Err((e, kind)) = me.boot(i, group).await {
                let name = &me.members[i].name;
                if !me.is_excused(i) {
                    me.problem(format!("{name} did not start: {e}"));
                }
                me.log(|| format!("{name} did not start: {e}"));
                me.members[i].slot().boot_failure = Some((e, kind == Some(ErrorKind::Corrupt)));
            }
        });
        drop(self.executor.spawn(group, "boot", boot));
    }

    async fn boot(&self, i: usize, group: Group) -> Result<(), (String, Option<ErrorKind>)> {
        let member = &self.members[i];
        self.executor.set_rate(group, member.rate);
        let environment = environment(&self.executor, group, member.wall.clone());
        let media = member.disk.open().map_err(|e| (e, None))?;
        if !member.slot().formatted {
            // A power cut in the middle of a format leaves something that must be forced.
            Engine::format(media.clone(), &environment, self.settings.wal_bytes, true).await.map_err(|e| {
                if e.kind() == ErrorKind::OutOfSpace {
                    // The fault has filled the disk of a spare machine: it says so and changes nothing.
                    self.excuse(i);
                }
                (format!("format: {:?}: {e}", e.kind()), None)
            })?;
            member.slot().formatted = true;
        }
        let mut found = Vec::new();
        let engine_settings = EngineSettings {
            memory_bytes: self.settings.memory_bytes,
            background_tasks: 1,
            wal_in_flight_max: self.settings.wal_in_flight_max,
            scrub_bytes_per_second: 64 << 20,
            scrub_pause: self.settings.scrub_pause,
            log_holes: true,
        };
        let mut deliver = |record| {
            found.push(record);
            Ok(())
        };
        let engine = Engine::open(media, environment.clone(), engine_settings, &mut deliver)
            .await
            .map_err(|e| (format!("open: {:?}: {e}", e.kind()), Some(e.kind())))?;
        let peers: BTreeMap<String, PeerAddress> =
            self.members.iter().map(|m| (m.name.clone(), m.address.clone())).collect();
        let options = NodeOptions {
            name: member.name.clone(),
            client_address: format!("{}:2379", member.name),
            site: String::new(),
            priority: member.priority,
            witness: member.witness,
            site_lag_bounds: Vec::new(),
            peers,
            heartbeat: Duration::from_millis(100),
            election_timeout: Duration::from_millis(300),
            group: self.group_settings(),
            entry_cache_bytes: self.settings.entry_cache_bytes,
            environment,
        };
        let transport = self.net.transport(member.address.clone(), group);
        member.slot().engine = Some(engine.clone());
        let node = Node::<SimRuntime>::start(engine, found, options, transport).await.map_err(|e| {
            let damaged = matches!(e.kind(), mainstay_replication::ErrorKind::Corrupt);
            (format!("start: {:?}: {e}", e.kind()), damaged.then_some(ErrorKind::Corrupt))
        })?;
        let promised = {
            let mut slot = member.slot();
            slot.node = Some(Arc::new(node));
            slot.promised.take()
        };
        self.log(|| format!("up {}", member.name));
        if let Some(token) = promised {
            self.keeps(i, token).await;
        }
        Ok(())
    }

    /// What a leader alone had acknowledged is in its log when it comes back, unless another led meanwhile.
    async fn keeps(&self, i: usize, token: CommitToken) {
        // Consensus tells its state once it runs.
        for _ in 0..20 {
            let Some(status) = self.node(i).map(|node| node.status()) else { return };
            if status.term > token.term || status.last_log >= token.index {
                return;
            }
            self.executor.sleep_until(self.executor.now() + Duration::from_micros(100)).await;
        }
        let Some(status) = self.node(i).map(|node| node.status()) else { return };
        if status.term == token.term && status.last_log < token.index && !self.is_excused(i) {
            let (last, index) = (status.last_log, token.index);
            self.problem(format!(
                "n{i} lost what it had acknowledged alone: its log ends at {last} and not at {index}"
            ));
        }
    }

    /// Cuts the power of a node between two polls: what its disk had not made durable may be lost or torn.
    pub(crate) fn kill(&self, i: usize) {
        let member = &self.members[i];
        let group = self.group(i);
        let handles = {
            let mut slot = member.slot();
            if !slot.powered {
                return;
            }
            slot.powered = false;
            slot.boot_failure = None;
            // Whoever leads until the end has its log to itself.
            let local = slot.local.take();
            let status = slot.node.as_ref().map(|node| node.status());
            // What is committed a quorum keeps, with or without this disk.
            slot.promised = local.filter(|token| {
                status.is_some_and(|s| s.role == "leader" && s.term == token.term && s.committed < token.index)
            });
            (slot.node.take(), slot.engine.take())
        };
        self.log(|| format!("kill {} life={}", member.name, group.0));
        member.disk.cut_power();
        self.net.kill(group);
        self.executor.kill(group);
        self.executor.run_as(group, move || drop(handles));
    }

    /// Stops a node in good order; cuts its power if that takes too long.
    pub(crate) async fn stop(&self, i: usize) {
        self.log(|| format!("stop {}", self.members[i].name));
        let closed = self
            .call(i, Duration::from_secs(5), |node| {
                Box::pin(async move { node.close().await.map_err(|e| e.to_string()) })
            })
            .await;
        if let Called::Answered(Err(e)) = closed {
            self.log(|| format!("close answered: {e}"));
        }
        self.kill(i);
    }

    /// Runs an operation on a node, in the node's own group, and waits at most `patience` for its answer.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        i: usize,
        patience: Duration,
        operation: impl FnOnce(SimNode) -> BoxFuture<T>,
    ) -> Called<T> {
        let Some(node) = self.node(i) else { return Called::Down };
        let group = self.group(i);
        let (sender, receiver) = oneshot::channel();
        let future = operation(node);
        let task = Box::pin(async move {
            // The caller may have lost its patience.
            let _ = sender.send(future.await);
        });
        drop(self.executor.spawn(group, "client", task));
        match SimRuntime::timeout(patience, receiver).await {
            Ok(Ok(answer)) => Called::Answered(answer),
            Ok(Err(_)) | Err(_) => Called::Lost,
        }
    }

    /// The node that says it leads, if any; the latest term wins.
    pub(crate) fn leader(&self) -> Option<usize> {
        (0..self.size())
            .filter_map(|i| {
                let status = self.node(i)?.status();
                (status.role == "leader").then_some((status.term, i))
            })
            .max()
            .map(|(_, i)| i)
    }

    /// The replicas of a node that runs, by group, the first one without a name.
    pub(crate) fn replicas(&self, i: usize) -> Option<BTreeMap<Option<String>, SimNode>> {
        let node = self.node(i)?;
        let beside = node.groups().into_iter().map(|(name, replica)| (Some(name), Arc::new(replica)));
        Some(beside.chain([(None, node.clone())]).collect())
    }

    /// The last entry of the leader.
    pub(crate) fn last_log(&self) -> Option<LogIndex> {
        Some(self.node(self.leader()?)?.status().last_log)
    }

    /// The last entries of the leaders of all groups, the first one without a name; `None` while one of them has no leader.
    pub(crate) fn last_logs(&self) -> Option<LastLogs> {
        let mut last = LastLogs::from([(None, self.last_log()?)]);
        let nodes: Vec<SimNode> = (0..self.size()).filter_map(|i| self.node(i)).collect();
        for name in nodes.iter().flat_map(|node| node.group_names()).collect::<BTreeSet<_>>() {
            let replicas = nodes.iter().filter_map(|node| node.groups().remove(&name));
            let leader = replicas.map(|replica| replica.status()).find(|status| status.role == "leader")?;
            last.insert(Some(name), leader.last_log);
        }
        Some(last)
    }

    /// Whether, in every group, each member takes part, follows the leader, and has the entries up to the index in `last`, which are
    /// committed. What is not in it yet, a group that was born since, comes in as it is now.
    pub(crate) fn are_whole_to(&self, last: &mut LastLogs) -> bool {
        let (Some(members), Some(now)) = (self.view(), self.last_logs()) else { return false };
        for (name, index) in now {
            last.entry(name).or_insert(index);
        }
        last.iter().all(|(name, index)| {
            let replica = |member: &MemberInfo| {
                let node = self.by_name(&member.name).and_then(|i| self.node(i))?;
                let status = match name {
                    None => node.status(),
                    Some(name) => node.groups().get(name)?.status(),
                };
                let takes_part = matches!(status.role.as_str(), "leader" | "follower" | "learner");
                (takes_part && status.id == member.id).then_some(status)
            };
            let replicas: Option<Vec<_>> = members.iter().map(replica).collect();
            replicas.is_some_and(|replicas| {
                let leader = replicas.iter().find(|status| status.role == "leader" && status.committed >= *index);
                leader
                    .is_some_and(|leader| replicas.iter().all(|s| s.leader == Some(leader.id) && s.last_log >= *index))
            })
        })
    }

    /// Prints what happens, if the run was asked to.
    pub(crate) fn log(&self, text: impl FnOnce() -> String) {
        if self.settings.verbose {
            eprintln!("{:>12.6} {}", self.executor.now().as_secs_f64(), text());
        }
    }
}

/// What one replica says of itself; learners have a mark behind their ids.
fn describe_replica(node: &Node<SimRuntime>) -> String {
    let s = node.status();
    let mark = |role| if role == MemberRole::Voter { "" } else { "l" };
    let members: Vec<_> = s.members.iter().map(|m| format!("{}{}", m.id.0, mark(m.role))).collect();
    let group = &s.group;
    format!(
        "role={} id={} members={} term={} leader={:?} last={} committed={} applied={} flushed={} frozen={} absent={} tables={} \
         damaged={} retrying={} failed={} diverged={} waits={} failure={:?}",
        s.role,
        s.id.0,
        members.join(","),
        s.term,
        s.leader,
        s.last_log,
        s.committed,
        group.applied,
        group.flushed,
        group.frozen_generations,
        group.absent_jobs,
        group.tables,
        group.tables_damaged,
        group.jobs_retrying,
        group.jobs_failed,
        group.diverged,
        group.applier_waits,
        s.failure
    )
}
