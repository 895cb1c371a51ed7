//! A replica of a replicated store.
//!
//! # Place
//! above the engine and openraft; `service` answers peers, `write` and `read` serve callers, `init` and
//!   `membership` decide who takes part, `tasks` runs what goes on beside
//! # Invariants
//! - I1. A node takes part only under an identity that its volume holds durably, given by `init` or by the leader of a
//!   cluster that knows its name. It never starts a cluster by itself.
//! - I2. An id is never used for another volume: `init` gives 1 to 64 in the order of names, and a node that joins later
//!   gets 64 plus the index of a committed entry that was written for that purpose (pitfall 9).
//! - I3. A restarted leader does not lead again without an election: what it had not made durable may have been
//!   replicated under the same log ids. [`raft_config`] asserts the settings that safety rests on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use mainstay_engine::{
    Applied, ClientToken, CommandBody, Engine, Group, GroupSettings, GroupStatus, Identity, LogIndex, OwnerRecord,
    Snapshot,
};
use mainstay_io::{BoxFuture, Environment, LatencyCounts};
use mainstay_wal::GroupId;
use openraft::SnapshotPolicy;
use openraft::async_runtime::WatchReceiver;
use openraft_rt::Instant;
use tokio::sync::{Notify, Semaphore};

use crate::init::Promise;
use crate::log_store::{LogHealStatus, LogStore};
use crate::network::{Durable, Networks};
use crate::pipeline::Hurry;
use crate::progress::{ApplyLag, Progress};
use crate::read::Rounds;
use crate::room::{PeerRooms, Room};
use crate::service::{InstallJob, Service};
use crate::state_machine::StateMachine;
use crate::types::{Raft, TypeConfig};
use crate::witness::Replica;
use crate::{
    DiskHealth, Durability, Error, ErrorKind, Hello, NodeId, PeerAddress, ReadLevel, Result, Runtime, SiteLag,
    SiteLagBound, TokioRuntime, Transport,
};

/// The group that a node replicates.
pub(crate) const GROUP: GroupId = GroupId(1);
/// Ids that `init` may give; later ones are larger.
pub(crate) const INIT_IDS: u64 = 64;
/// Entries of one append to a peer, at most; bytes are bounded by `READ_BYTES_MAX`.
const PAYLOAD_ENTRIES_MAX: u64 = 4096;

/// How a node takes part. Times are `Duration`s.
#[derive(Clone)]
pub struct NodeOptions {
    /// The name under which peers and operators know this process. 1 to 255 bytes.
    pub name: String,
    /// Where clients reach it, told to others so that they can name the leader.
    pub client_address: String,
    /// The label of the place where it stands (a zone, a region), for [`Durability::Site`]: at most 255 bytes, empty for
    /// none. Told to the cluster when the node becomes a member; [`Node::set_member_site`] changes it later.
    pub site: String,
    /// Who of those that may lead shall: leadership goes by itself to the voter of the highest priority that is caught up and
    /// well. Default 0. Told to the cluster when the node becomes a member; [`Node::set_member_priority`] changes it later.
    pub priority: u8,
    /// It votes and keeps the log, and holds no tables: a witness, for a third site that is to cost little. It answers no reads, and
    /// is never asked to lead. Fixed when the node becomes a member. Default no.
    pub witness: bool,
    /// Sites that may lag only so far, looked at by whichever member leads: equal on all. Default none.
    pub site_lag_bounds: Vec<SiteLagBound>,
    /// Names and addresses of the other processes, for discovery before and after `init`.
    pub peers: BTreeMap<String, PeerAddress>,
    /// Heartbeat interval. Default 100 ms.
    pub heartbeat: Duration,
    /// How long a leader may be silent before others stop waiting for it; at least twice the heartbeat. A follower calls
    /// an election 1.5 to 2 times this long after the leader's last word. Default 300 ms: shorter fails over faster,
    /// longer bears more delay of disks, processors and network.
    pub election_timeout: Duration,
    /// Settings equal on all replicas.
    pub group: GroupSettings,
    /// Bytes of entries kept in memory for peers and readers. Default 64 MiB.
    pub entry_cache_bytes: u64,
    /// The wall clock that stamps commands, and the source of identities.
    pub environment: Environment,
}

/// A command and what its answer shall promise.
#[derive(Clone, Debug)]
pub struct Write {
    /// What to do; the node adds the time.
    pub body: CommandBody,
    /// When to answer.
    pub durability: Durability,
}

/// The position of a write that was answered at [`Durability::Local`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommitToken {
    /// Raft term.
    pub term: u64,
    /// Its index, final only if it is committed in this term.
    pub index: LogIndex,
}

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberRole {
    /// Votes.
    Voter,
    /// Receives and does not vote.
    Learner,
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberInfo {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where it listens for peers.
    pub peer_address: PeerAddress,
    /// Where it listens for clients.
    pub client_address: String,
    /// The incarnation of its volume.
    pub incarnation: [u8; 16],
    /// The label of the place where it stands, for [`Durability::Site`]; empty for none.
    pub site: String,
    /// Leadership goes by itself to the voter with the largest one that is caught up and well; 0 for one without.
    pub priority: u8,
    /// It votes and holds no data.
    pub witness: bool,
    /// The version of its cluster ([`NodeStatus::cluster_version`]); 0 for the first.
    pub version: u16,
    /// Its role.
    pub role: MemberRole,
}

/// What a node knows of itself and its cluster.
#[derive(Clone, Debug, Default)]
pub struct NodeStatus {
    /// Zero before `init` or `join`.
    pub cluster: [u8; 16],
    /// Zero before `init` or `join`.
    pub id: NodeId,
    /// `leader`, `follower`, `candidate`, `learner`, `waiting` (no identity yet), `starting`, `recovering` (mends its log, see `failure`),
    /// `foreign` (the peers that it was told of refuse its volume, see `failure`), `twin` (another process has this identity, see `failure`), `removed`, `failed`, `closed`.
    pub role: String,
    /// Raft term.
    pub term: u64,
    /// Which formats its cluster may write, 1 to [`crate::CLUSTER_VERSION_MAX`], as far as it knows; [`Node::finalize`] raises it.
    pub cluster_version: u16,
    /// The leader it knows.
    pub leader: Option<NodeId>,
    /// Last entry in its log.
    pub last_log: LogIndex,
    /// Last entry known committed.
    pub committed: LogIndex,
    /// Of the group underneath.
    pub group: GroupStatus,
    /// Members.
    pub members: Vec<MemberInfo>,
    /// Entries that the last open found behind the tables. They are applied again once they are known to be committed.
    pub replayed: u64,
    /// For a leader: entries that each other member lacks.
    pub lag: BTreeMap<u64, u64>,
    /// For a leader: voters that have acknowledged nothing for two election timeouts. What is written meanwhile is on fewer volumes than
    /// there are voters.
    pub silent: std::collections::BTreeSet<u64>,
    /// For a leader: how far the sites lag that have a bound.
    pub site_lags: Vec<SiteLag>,
    /// Why the node left service, or does not take part yet.
    pub failure: Option<String>,
    /// Damage found and mended in the log.
    pub log_heal: LogHealStatus,
    /// What it finds of its own volume, looked at twice a second.
    pub disk: DiskHealth,
    /// Times that it told another voter to lead because its own disk was worse.
    pub disk_hand_overs: u64,
    /// Times that it handed leadership to a voter with a higher priority.
    pub priority_hand_overs: u64,
    /// Bytes of tables that it fetched from other members, for snapshots and for tables that it lost.
    pub fetched_bytes: u64,
}

/// Answers application requests that other nodes forwarded.
pub type ForwardHandler = Arc<dyn Fn(Bytes) -> BoxFuture<Result<Bytes>> + Send + Sync>;

/// What a node is about to do for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No identity yet.
    Waiting,
    /// Asks the other voters what it has promised them.
    Starting,
    /// Damage has taken a part of its log: it asks the others, and takes no part before it has it.
    Recovering(String),
    /// Those that it was told of refuse its volume.
    Foreign(String),
    /// Takes part.
    Member,
    /// Another process is this member, at that address.
    Twin(String),
    /// Was removed from its cluster: idle.
    Removed,
    /// Left service.
    Failed(String),
    /// Closed by its owner.
    Closed,
}

/// openraft at work.
pub(crate) struct Running<R: Runtime> {
    pub(crate) id: u64,
    pub(crate) raft: Raft<R>,
    pub(crate) metrics: Metrics<R>,
    /// Votes are refused before this: a vote that was forgotten by a restart could break a lease that it had granted.
    pub(crate) votes_from: R::Instant,
}

pub(crate) type Metrics<R> =
    openraft::type_config::alias::WatchReceiverOf<TypeConfig<R>, openraft::RaftMetrics<TypeConfig<R>>>;

/// A flag that can be waited for.
#[derive(Default)]
pub(crate) struct Latch {
    set: AtomicBool,
    notify: Notify,
}

impl Latch {
    pub(crate) fn set(&self) {
        self.set.store(true, Ordering::Release);
        self.notify.notify_waiters();
    }

    pub(crate) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Resolves once it is set. Cancel safe.
    pub(crate) async fn wait(&self) {
        loop {
            let mut notified = std::pin::pin!(self.notify.notified());
            notified.as_mut().enable();
            if self.is_set() {
                return;
            }
            notified.await;
        }
    }
}

pub(crate) struct Inner<R: Runtime> {
    pub(crate) number: GroupId,
    /// The replica of the first group, for one of another group. See [`crate::groups`].
    pub(crate) host: Option<std::sync::Weak<Inner<R>>>,
    /// Of the host: the replicas of the other groups that are open.
    pub(crate) groups: Mutex<BTreeMap<GroupId, Arc<Inner<R>>>>,
    /// Of the host: what the log held of other groups.
    pub(crate) found: Mutex<Vec<OwnerRecord>>,
    pub(crate) opening_groups: Semaphore,
    /// Of the host: which other processes live, and what they lead.
    pub(crate) liveness: crate::liveness::Liveness<R>,
    /// Of another group than the first: what its host remembers of it between two looks.
    pub(crate) rest: crate::rest::Rest<R>,
    /// Of another group than the first: what was found when its members were last compared with those of the first.
    pub(crate) followed: Mutex<crate::groups::Followed<R>>,
    /// Of a witness: the groups that it has heard of.
    pub(crate) heard_births: Mutex<BTreeMap<String, crate::groups::Birth>>,
    pub(crate) options: NodeOptions,
    pub(crate) engine: Engine,
    pub(crate) group: Group,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) log: LogStore,
    /// Entries behind the tables at open.
    pub(crate) replayed: u64,
    pub(crate) progress: Arc<Progress>,
    pub(crate) apply_lag: Arc<ApplyLag>,
    pub(crate) running: RwLock<Option<Arc<Running<R>>>>,
    pub(crate) phase: Mutex<Phase>,
    pub(crate) changed: Notify,
    pub(crate) closing: Latch,
    pub(crate) forward: RwLock<Option<ForwardHandler>>,
    pub(crate) promise: Mutex<Option<Promise<R>>>,
    pub(crate) install: Mutex<Option<Arc<InstallJob>>>,
    /// Ids that this node has seen leave the membership.
    pub(crate) removed: Mutex<std::collections::BTreeSet<u64>>,
    /// Members that said that they are elsewhere than the membership has them, and since when, by their ids.
    pub(crate) moved: Mutex<BTreeMap<u64, (PeerAddress, R::Instant)>>,
    /// Bytes of tables that were fetched from peers.
    pub(crate) fetched_bytes: AtomicU64,
    /// Snapshots pinned for receivers that asked for one, by their id; one each.
    pub(crate) pinned: Mutex<BTreeMap<u64, crate::service::Pinned<R>>>,
    /// Who last offered a snapshot, and where it listens.
    pub(crate) offered_by: Mutex<Option<(NodeId, PeerAddress)>>,
    /// One `init` at a time runs from here.
    pub(crate) initiating: Semaphore,
    /// One identity is taken on at a time.
    pub(crate) adopting: Semaphore,
    /// The leader changes the membership one step at a time.
    pub(crate) changing: Semaphore,
    pub(crate) rounds: Rounds,
    pub(crate) lease_rounds: Rounds,
    /// Of what the followers of this node may have to wait for.
    pub(crate) hurry: Arc<Hurry>,
    /// For commands on their way into the log.
    pub(crate) room: Arc<Room>,
    /// What the rings of the others take: one for all groups of a node, as their rings are.
    pub(crate) rooms: Arc<PeerRooms<R>>,
    /// A follower gets no further because its ring is full: nothing stays in this log for those that lag.
    pub(crate) relieves: AtomicBool,
    /// How far the sites lag that have a bound.
    pub(crate) lags: crate::lag::Lags<R>,
    /// What the others have promised.
    pub(crate) receipts: Arc<crate::receipts::Receipts>,
    /// Drawn at the start: tells this process from another with a copy of its volume.
    pub(crate) opening: [u8; 16],
    pub(crate) locals: crate::write::Locals,
    pub(crate) proposals: crate::proposals::Proposals<R>,
    pub(crate) levels: crate::levels::Levels,
    /// When the last round of reads began that a leader with a quorum answered, and at which index.
    pub(crate) fresh: Mutex<Option<(R::Instant, LogIndex)>>,
    /// The order in which the appends of each peer arrived.
    pub(crate) turns: crate::turns::Turns,
    /// When a leader was last heard: openraft keeps the name of one that is silent until there is another.
    pub(crate) heard: Mutex<Option<R::Instant>>,
    /// How the disk of this node did lately.
    pub(crate) disk: Mutex<crate::disk::Looks>,
    /// Times that this node told another to lead because of its disk.
    pub(crate) disk_hand_overs: AtomicU64,
    /// Times that this node handed leadership to a voter with a higher priority.
    pub(crate) priority_hand_overs: AtomicU64,
    /// When a leader last asked this node to lead in its place.
    pub(crate) asked_to_lead: Mutex<Option<R::Instant>>,
    /// Leadership is handed over by wish of an operator or by priority, one at a time.
    pub(crate) handing_over: Semaphore,
}

/// A node. Cloning gives another handle. Once the last handle is dropped the node stops as a crash would stop it; see
/// [`Node::close`].
pub struct Node<R: Runtime = TokioRuntime> {
    pub(crate) inner: Arc<Inner<R>>,
    _handle: Arc<StopOnDrop<R>>,
}

struct StopOnDrop<R: Runtime>(Arc<Inner<R>>);

impl<R: Runtime> Drop for StopOnDrop<R> {
    fn drop(&mut self) {
        let groups: Vec<_> = self.0.groups().values().cloned().collect();
        for replica in groups.iter().chain([&self.0]) {
            replica.closing.set();
            replica.progress.close();
            replica.log.detach();
        }
    }
}

impl<R: Runtime> Clone for Node<R> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), _handle: self._handle.clone() }
    }
}

impl<R: Runtime> std::fmt::Debug for Node<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("name", &self.inner.options.name).finish_non_exhaustive()
    }
}

/// openraft's settings. Those that safety or a promise of ours rests on are asserted here and nowhere an option. Of a group `beside` the
/// first the host keeps the time: see [`crate::rest`].
fn raft_config(options: &NodeOptions, beside: bool) -> Result<openraft::Config> {
    let lease = u64::try_from(options.election_timeout.as_millis()).unwrap_or(u64::MAX);
    let heartbeat = u64::try_from(options.heartbeat.as_millis()).unwrap_or(u64::MAX);
    if heartbeat == 0 || lease < heartbeat.saturating_mul(2) || lease > 600_000 {
        let message = format!(
            "the election timeout is twice the heartbeat at least and 10 minutes at most heartbeat_ms={heartbeat} \
             election_timeout_ms={lease}"
        );
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let config = openraft::Config {
        cluster_name: "mainstay".into(),
        heartbeat_interval: heartbeat,
        // A follower waits for the lease (the upper bound) and then for a random time between the bounds.
        // A witness waits as long as it may: it leads only if nobody else can.
        election_timeout_min: if options.witness {
            lease.max(heartbeat + 2) - 1
        } else {
            (lease / 2).max(heartbeat + 1)
        },
        election_timeout_max: lease.max(heartbeat + 2),
        // Off, always: a leader that lost power replicated entries that it had not made durable; as leader of the same
        // term it would give their log ids to other commands, and replicas would differ for ever without a trace.
        enable_leader_restore: Some(mainstay_io::mutant!(LeaderRestore)),
        enable_pre_vote: Some(true),
        // A leader without a quorum goes silent for this long at a time, so that one node that still hears it does not
        // keep a connected majority from electing. Lease and election timeout are both `election_timeout_max`.
        quorum_loss_probe_interval: (!beside).then_some(2 * lease.max(heartbeat + 2)),
        enable_tick: !beside,
        // Flushes decide when there is a snapshot, and bytes decide what is purged.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // Lag is bounded by the bytes of log that are kept, not by a count of entries (pitfall 7).
        replication_lag_threshold: u64::MAX,
        allow_log_reversion: Some(false),
        max_payload_entries: PAYLOAD_ENTRIES_MAX,
        max_append_entries: Some(PAYLOAD_ENTRIES_MAX),
        // `Network::full_snapshot` repeats its offer and bounds each wait itself.
        install_snapshot_timeout: 600_000,
        backoff: "20ms 50ms 100ms ...500ms".into(),
        ..openraft::Config::default()
    };
    let config = config.validate().map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()))?;
    assert_eq!(
        config.enable_leader_restore,
        Some(mainstay_io::mutant!(LeaderRestore)),
        "a restarted leader is elected again or does not lead"
    );
    assert_eq!(config.allow_log_reversion, Some(false), "a log that went back is another volume");
    assert_eq!(config.enable_pre_vote, Some(true));
    assert!(beside || config.quorum_loss_probe_interval.is_some());
    assert_eq!(config.enable_tick, !beside, "somebody keeps the time of each group");
    assert_eq!(config.snapshot_policy, SnapshotPolicy::Never);
    Ok(config)
}

/// A number that differs when a setting differs that must be equal on all replicas.
fn fingerprint(settings: &GroupSettings) -> u64 {
    // FNV-1a: stable for ever, which the standard hashers do not promise.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let values = [
        settings.memtable_bytes,
        settings.table_bytes,
        settings.base_level_bytes,
        settings.l0_compaction_runs as u64,
        settings.compression as u64,
    ];
    for byte in values.iter().flat_map(|v| v.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}

impl<R: Runtime> Inner<R> {
    pub(crate) fn phase(&self) -> Phase {
        self.phase.lock().expect("nothing panics while it holds this lock").clone()
    }

    /// Moves on to `phase`, unless the node has come to an end already.
    pub(crate) fn set_phase(&self, phase: Phase) {
        let mut current = self.phase.lock().expect("nothing panics while it holds this lock");
        if matches!(&*current, Phase::Failed(_) | Phase::Twin(_) | Phase::Closed) && phase != Phase::Closed {
            return;
        }
        if *current != phase {
            tracing::info!(node = %self.options.name, from = ?*current, to = ?phase, "phase");
            *current = phase;
        }
        drop(current);
        self.changed.notify_waiters();
    }

    pub(crate) fn hello(&self) -> Hello {
        let identity = self.engine.identity();
        Hello {
            cluster: identity.cluster,
            node: NodeId(identity.node),
            incarnation: self.engine.incarnation(),
            name: self.options.name.clone(),
            peer_address: self.transport.local_address(),
            settings_fingerprint: fingerprint(&self.options.group),
        }
    }

    pub(crate) fn me(&self) -> crate::types::Member {
        crate::types::Member {
            name: self.options.name.clone(),
            peer_address: self.transport.local_address().0,
            client_address: self.options.client_address.clone(),
            site: self.options.site.clone(),
            priority: self.options.priority,
            witness: self.options.witness,
            // The cluster's to say.
            version: 0,
            incarnation: self.engine.incarnation(),
        }
    }

    /// openraft, while this node takes part.
    pub(crate) fn running(&self) -> Result<Arc<Running<R>>> {
        match self.phase() {
            Phase::Member => {}
            Phase::Removed => {
                return Err(Error::new(ErrorKind::Unavailable, "the node was removed from its cluster"));
            }
            Phase::Waiting => return Err(Error::new(ErrorKind::Unavailable, "the node is not a member yet")),
            Phase::Starting => return Err(Error::new(ErrorKind::Unavailable, "the node is starting")),
            Phase::Recovering(reason) => {
                return Err(Error::new(ErrorKind::Unavailable, format!("the node mends its log: {reason}")));
            }
            Phase::Foreign(reason) => return Err(Error::new(ErrorKind::Unavailable, reason)),
            Phase::Twin(address) => {
                return Err(Error::new(ErrorKind::Unavailable, crate::receipts::twin_message(&address)));
            }
            Phase::Failed(reason) => return Err(Error::new(ErrorKind::Closed, format!("the node failed: {reason}"))),
            Phase::Closed => return Err(Error::new(ErrorKind::Closed, "the node is closed")),
        }
        if self.closing.is_set() {
            return Err(Error::new(ErrorKind::Closed, "the node is closed"));
        }
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        running.ok_or_else(|| Error::new(ErrorKind::Unavailable, "the node is starting"))
    }

    /// Runs `task` until it ends or the node closes.
    pub(crate) fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        let this = self.clone();
        drop(R::spawn(async move {
            let closing = std::pin::pin!(this.closing.wait());
            let task = std::pin::pin!(task);
            // The end first: what is closing does no further step.
            let _ = R::select2(closing, task).await;
        }));
    }

    /// Opens the replica of a group: its log and its tables, and what must not wait for openraft.
    pub(crate) async fn open(
        engine: Engine,
        number: GroupId,
        found: Vec<OwnerRecord>,
        options: NodeOptions,
        transport: Arc<dyn Transport>,
        host: Option<&Arc<Self>>,
    ) -> Result<Arc<Self>> {
        let group = engine.group(number, options.group.clone()).await?;
        let cache_bytes = options.entry_cache_bytes;
        let flushed = (!options.witness).then(|| group.flushed());
        if options.witness && group.applied() > LogIndex(0) {
            return Err(Error::new(ErrorKind::Foreign, "the volume holds tables, and a witness has none"));
        }
        let others = if host.is_none() { crate::groups::of_others(&found, number) } else { Vec::new() };
        let notes = Some(engine.owner_notes());
        let log = LogStore::open(engine.wal().clone(), notes, number, found, cache_bytes, flushed)?;
        let known = log.membership().membership().get_node(&engine.identity().node).map(|member| member.witness);
        // The first membership of another group says nothing of anybody.
        let known = known.filter(|_| host.is_none());
        if known.is_some_and(|witness| witness != options.witness) {
            let what = if options.witness { "holds data" } else { "is a witness" };
            let message = format!("this member {what}: remove it and add it with a blank volume to change that");
            return Err(Error::new(ErrorKind::Foreign, message));
        }
        let replayed = log.last().map_or(0, |last| last.index.saturating_sub(group.flushed().0));
        tracing::info!(node = %options.name, group = number.0, flushed = group.flushed().0, entries = replayed, "opened: entries to apply again");
        let opening = options.environment.random.id();
        let new_room = || Arc::new(Room::new(engine.wal().stats().ring_bytes));
        let room = host.map_or_else(new_room, |host| host.room.clone());
        let rooms = host.map_or_else(Arc::default, |host| host.rooms.clone());
        let apply_lag = Arc::new(ApplyLag::new(options.environment.clock.clone()));
        let inner = Arc::new(Inner {
            number,
            host: host.map(Arc::downgrade),
            groups: Mutex::default(),
            found: Mutex::new(others),
            opening_groups: Semaphore::new(1),
            liveness: crate::liveness::Liveness::default(),
            rest: crate::rest::Rest::default(),
            followed: Mutex::default(),
            heard_births: Mutex::default(),
            options,
            engine,
            group,
            transport,
            log,
            replayed,
            progress: Arc::default(),
            apply_lag,
            running: RwLock::new(None),
            phase: Mutex::new(Phase::Waiting),
            changed: Notify::new(),
            closing: Latch::default(),
            forward: RwLock::new(None),
            promise: Mutex::new(None),
            install: Mutex::new(None),
            removed: Mutex::default(),
            moved: Mutex::new(BTreeMap::new()),
            fetched_bytes: AtomicU64::new(0),
            pinned: Mutex::new(BTreeMap::new()),
            offered_by: Mutex::new(None),
            initiating: Semaphore::new(1),
            adopting: Semaphore::new(1),
            changing: Semaphore::new(1),
            rounds: Rounds::default(),
            lease_rounds: Rounds::default(),
            hurry: Arc::default(),
            room,
            rooms,
            relieves: AtomicBool::new(false),
            lags: crate::lag::Lags::default(),
            receipts: Arc::default(),
            opening,
            locals: crate::write::Locals::default(),
            proposals: crate::proposals::Proposals::default(),
            levels: crate::levels::Levels::default(),
            fresh: Mutex::new(None),
            turns: crate::turns::Turns::default(),
            heard: Mutex::new(None),
            disk: Mutex::default(),
            disk_hand_overs: AtomicU64::new(0),
            priority_hand_overs: AtomicU64::new(0),
            asked_to_lead: Mutex::new(None),
            handing_over: Semaphore::new(1),
        });
        inner.start_owner_task();
        inner.start_entry_healing();
        Ok(inner)
    }

    /// [`Inner::run`] on a log that was mended in an earlier life, or had holes that took nothing that is needed.
    pub(crate) async fn mend_vote_and_run(self: &Arc<Self>) -> Result<()> {
        if let Some(term) = self.log.least_vote() {
            self.log.raise_vote(term).await.map_err(|e| Error::new(ErrorKind::Closed, e.to_string()))?;
        }
        self.run().await
    }

    /// Starts openraft under the identity of the volume.
    pub(crate) async fn run(self: &Arc<Self>) -> Result<()> {
        let id = self.engine.identity().node;
        let config = Arc::new(raft_config(&self.options, self.host.is_some())?);
        let restarted = self.log.has_vote();
        let peers = Arc::new(crate::service::NodePeers(Arc::downgrade(self)));
        let witness = self.is_witness();
        let replica = if witness { Replica::of_witness(&self.log) } else { Replica::Full(self.group.clone()) };
        let machine = StateMachine::open(replica, self.log.clone(), peers, self.progress.clone())?;
        let machine = machine.with_apply_lag(self.apply_lag.clone());
        self.log.set_apply_lag(self.apply_lag.clone());
        let (transport, hurry) = (self.transport.clone(), self.hurry.clone());
        let applied = machine.last_applied();
        let (rooms, receipts) = (self.rooms.clone(), self.receipts.clone());
        let log = self.log.clone();
        let durable: Durable = Arc::new(move || log.last_durable());
        let group = self.number;
        let networks = Networks { me: id, group, witness, applied, durable, transport, hurry, rooms, receipts };
        let raft = Raft::<R>::new(id, config, networks, self.log.clone(), machine)
            .boxed()
            .await
            .map_err(|e| Error::new(ErrorKind::Internal, format!("openraft does not start: {e}")))?;
        let metrics = raft.metrics();
        let now = R::Instant::now();
        let votes_from = if restarted { now + self.options.election_timeout } else { now };
        let running = Arc::new(Running { id, raft, metrics, votes_from });
        *self.running.write().expect("nothing panics while it holds this lock") = Some(running.clone());
        self.set_phase(Phase::Member);
        self.start_tasks(&running);
        Ok(())
    }

    /// Takes on an identity: makes it durable, tells it to peers, starts openraft. Again under the same one is nothing.
    pub(crate) async fn adopt(self: &Arc<Self>, identity: Identity) -> Result<()> {
        let _one = self.adopting.acquire().await.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))?;
        let current = self.engine.identity();
        if current == identity && self.phase() != Phase::Waiting {
            return Ok(());
        }
        if current != Identity::default() && current != identity {
            let message = format!("the volume belongs to another cluster or id node={}", current.node);
            return Err(Error::new(ErrorKind::Foreign, message));
        }
        if let Err(error) = self.engine.set_identity(identity).await {
            // A failed durable write is final: without a start anew this volume never gets an identity.
            if matches!(error.kind(), ErrorKind::Io | ErrorKind::Closed) && !self.closing.is_set() {
                tracing::error!(%error, "the node leaves service");
                self.set_phase(Phase::Failed(error.to_string()));
                self.progress.close();
            }
            return Err(error.into());
        }
        // Who asks has to say who it is. The volume may be a blank copy of one that has promised something.
        self.transport.serve(self.hello(), Arc::new(Service(Arc::downgrade(self))));
        self.begin().await
    }

    /// True when the volume holds entries or state although it has no identity: a store that was alone, for instance.
    pub(crate) fn has_data(&self) -> bool {
        !self.log.is_pristine() || self.group.applied().0 > 0 || self.group.flushed().0 > 0
    }

    pub(crate) fn metrics_of<T>(
        running: &Running<R>,
        read: impl FnOnce(&openraft::RaftMetrics<TypeConfig<R>>) -> T,
    ) -> T {
        read(&running.metrics.borrow_watched())
    }
}

impl<R: Runtime> Node<R> {
    /// Starts a node on an open engine. Without an identity it waits for `init` or for a cluster that knows its name.
    /// `found` is what [`Engine::open`] delivered. When it cannot start, the volume can be opened again at once ([`Engine::abandon`]).
    ///
    /// # Errors
    /// `Invalid` for a name, times or a bound out of range, `Corrupt` or `Foreign` when the log does not fit the tables.
    pub async fn start(
        engine: Engine,
        found: Vec<OwnerRecord>,
        options: NodeOptions,
        transport: Arc<dyn Transport>,
    ) -> Result<Self> {
        let started = Self::start_over(engine.clone(), found, options, transport).await;
        if started.is_err() {
            let _ = engine.abandon().await;
        }
        started
    }

    async fn start_over(
        engine: Engine,
        found: Vec<OwnerRecord>,
        options: NodeOptions,
        transport: Arc<dyn Transport>,
    ) -> Result<Self> {
        if options.name.is_empty() || options.name.len() > crate::wire::NAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::Invalid, "a node's name has 1 to 255 bytes"));
        }
        if options.site.len() > crate::wire::NAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::Invalid, "the label of a site has at most 255 bytes"));
        }
        raft_config(&options, false)?;
        options.site_lag_bounds.iter().try_for_each(SiteLagBound::check)?;
        let inner = Inner::open(engine, GROUP, found, options, transport, None).await?;
        let damage = inner.log.damage();
        inner.open_groups().await?;
        let this = inner.clone();
        inner.spawn(async move { this.look_after_groups().await });
        let this = inner.clone();
        inner.spawn(async move { this.tend_groups().await });
        let node = Self { _handle: Arc::new(StopOnDrop(inner.clone())), inner: inner.clone() };
        if inner.engine.identity() != Identity::default() {
            // Who asks has to say who it is.
            inner.transport.serve(inner.hello(), Arc::new(Service(Arc::downgrade(&inner))));
            if let Some(address) = inner.twin().await {
                inner.stand_back(address).await;
                return Ok(node);
            }
        }
        match damage {
            Some(_) if inner.engine.identity() == Identity::default() => {
                return Err(Error::new(ErrorKind::Corrupt, "the log is damaged, and the volume belongs to no cluster"));
            }
            Some(damage) => inner.start_log_healing(&damage),
            None if inner.engine.identity() == Identity::default() => inner.start_join_task(),
            None => inner.begin().await?,
        }
        inner.transport.serve(inner.hello(), Arc::new(Service(Arc::downgrade(&inner))));
        Ok(node)
    }

    /// Gives birth to a cluster over `members` (names in [`NodeOptions::peers`], this one included). Two-phase and
    /// idempotent: the same call again finds the cluster made, or finishes what a crash left half done.
    ///
    /// # Errors
    /// `Invalid`: an unknown name, or a member that holds data. `Foreign`: a member of another cluster. `Unavailable`: a
    /// member cannot be reached, or another `init` is at work; call again.
    /// # Cancel safety
    /// Not cancel safe, but the same call again finishes it.
    pub async fn init(&self, members: &[String]) -> Result<[u8; 16]> {
        self.inner.init(members).await
    }

    /// Proposes a command; a follower forwards it to the leader. At [`Durability::All`] and [`Durability::Site`] the answer
    /// waits after the commit.
    ///
    /// # Errors
    /// `NotLeader`, `Unavailable`: not applied. `Indeterminate`: may have been; for a level beyond the quorum also when the
    /// write is committed and the level was not reached in time. `Invalid`: no member is at that site. `Unsupported`: see
    /// [`Durability`]; a write at [`Durability::Local`] has an answer of another type, see [`Node::write_local`].
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the command in the log.
    pub async fn write(&self, write: Write) -> Result<Applied> {
        self.inner.write(write).await
    }

    /// As [`Node::write`] for a `Batch` or a `Custom` command that applies once, however often it is proposed with this token: by
    /// this node, which proposes it again while its fate is unknown, and by its caller after an error, through this node or
    /// another. The answer is that of the first time. A client that is silent for 24 hours may be forgotten.
    ///
    /// # Errors
    /// As [`Node::write`]; after `Indeterminate` the same token may be tried again. `Invalid` in [`Applied::response`] when a later
    /// request of the client was answered.
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the command in the log.
    pub async fn write_once(&self, token: ClientToken, write: Write) -> Result<Applied> {
        self.inner.write_once(token, write).await
    }

    /// Proposes a command and answers when the leader alone has it durable. Only on the leader.
    ///
    /// # Errors
    /// `NotLeader`, `Unavailable`: not applied. `Indeterminate`: may have been.
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the command in the log.
    pub async fn write_local(&self, body: CommandBody) -> Result<CommitToken> {
        self.inner.write_local(body).await
    }

    /// Waits until what `write_local` promised holds at a stronger level. `Indeterminate` if the term ended first. A token
    /// with term 0 names an entry that is known to be committed. Cancel safe.
    pub async fn wait(&self, token: CommitToken, durability: Durability) -> Result<Applied> {
        self.inner.wait(token, durability).await
    }

    /// A read view at the level asked for, of the branch of that name (`main` or a clone).
    ///
    /// # Errors
    /// `NotFound` when there is no such branch; else as [`Node::read_barrier`]. Cancel safe.
    pub async fn snapshot(&self, branch: &str, level: ReadLevel) -> Result<Snapshot> {
        self.inner.read_barrier(level).await?;
        let id = self
            .inner
            .group
            .branch(branch)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no such branch name={branch}")))?;
        Ok(self.inner.group.snapshot(id)?)
    }

    /// Waits until a read of this level may be served here; returns the applied index that it may read at.
    ///
    /// # Errors
    /// `Unavailable` when no quorum answers in time, and of a witness; `Closed`. Cancel safe.
    pub async fn read_barrier(&self, level: ReadLevel) -> Result<LogIndex> {
        self.inner.read_barrier(level).await
    }

    /// Sends an application request to the leader (here if this is it). See [`Node::set_forward_handler`].
    ///
    /// # Errors
    /// `Unavailable`: it was not handled. `Indeterminate`: it may have been. Else what the handler answered.
    pub async fn forward(&self, request: Bytes) -> Result<Bytes> {
        self.inner.forward_request(request).await
    }

    /// Answers application requests that others forwarded.
    pub fn set_forward_handler(&self, handler: ForwardHandler) {
        *self.inner.forward.write().expect("nothing panics while it holds this lock") = Some(handler);
    }

    /// Adds the process of that name as a learner under a new id, and promotes it once it has caught up if `voter`.
    /// Again for a member of that name does what is missing.
    ///
    /// # Errors
    /// `Unavailable` when it cannot be reached or does not catch up in time: it stays a learner. `Foreign` when it belongs
    /// to another cluster, `Invalid` when it holds data or has another name.
    pub async fn add_member(&self, name: &str, address: PeerAddress, voter: bool) -> Result<MemberInfo> {
        self.inner.add_member(name, address, voter).await
    }

    /// Makes a learner a voter.
    pub async fn promote_member(&self, id: NodeId) -> Result<()> {
        self.inner.promote_member(id).await
    }

    /// Changes the addresses of a member.
    pub async fn update_member(&self, id: NodeId, address: PeerAddress) -> Result<()> {
        self.inner.update_member(id, address).await
    }

    /// Changes the label of the place where a member stands.
    pub async fn set_member_site(&self, id: NodeId, site: &str) -> Result<()> {
        self.inner.set_member_site(id, site).await
    }

    /// Changes the priority of a member; see [`NodeOptions::priority`].
    pub async fn set_member_priority(&self, id: NodeId, priority: u8) -> Result<()> {
        self.inner.set_member_priority(id, priority).await
    }

    /// Raises the version of the cluster ([`NodeStatus::cluster_version`]) to the newest that this build reads, once every member is of a
    /// build that reads it, and returns it. Until then each member may go back to the build before, with its volume; from then on none
    /// may. Nothing changes where the cluster has that version.
    ///
    /// # Errors
    /// `Unsupported`: a member reads less, which the message names, or the leader does. `Unavailable`: a member does not answer, or there
    /// is no leader. `Indeterminate`: it may have been raised; ask again. May be called again after each.
    ///
    /// Cancel safe: what was begun goes on.
    pub async fn finalize(&self) -> Result<u16> {
        self.inner.finalize().await
    }

    /// Removes a member. Its id is never used again; its node goes idle.
    pub async fn remove_member(&self, id: NodeId) -> Result<()> {
        self.inner.remove_member(id).await
    }

    /// Hands leadership to `to`, or to the voter with the highest priority of those that are caught up. Returns once this node sees
    /// another leader, which keeps leadership for a minute at least before it gives it to a voter with a higher priority.
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<NodeId> {
        self.inner.transfer_leader(to).await
    }

    /// Gives birth to a group of that name over the voters of the cluster, or finds it: a log with a leader of its own, beside the first
    /// one on the same volumes. The handle reads and writes in it as this one does in the first; members are changed through the
    /// first alone, and have no vote in any group once they are removed.
    ///
    /// # Errors
    /// `Invalid`: a name of 0 or more than [`crate::GROUP_NAME_BYTES_MAX`] bytes, or too many groups. `Unsupported`: this is the handle of
    /// such a group. `Unavailable` of a witness, since it reads nothing. Else as [`Node::write`]: the same call again finds what was made.
    /// # Cancel safety
    /// Not cancel safe, but the same call again finishes it.
    pub async fn create_group(&self, name: &str) -> Result<Self> {
        Ok(Self { inner: self.inner.create_group(name).await?, _handle: self._handle.clone() })
    }

    /// The group of that name.
    ///
    /// # Errors
    /// `NotFound`: nobody made it. `Unsupported`: this is the handle of such a group. Else as [`Node::read_barrier`]. Cancel safe.
    pub async fn open_group(&self, name: &str) -> Result<Self> {
        Ok(Self { inner: self.inner.open_group(name).await?, _handle: self._handle.clone() })
    }

    /// Names of the groups beside the first, as far as this node has applied it; of a witness as far as it has heard from one that did.
    pub fn group_names(&self) -> Vec<String> {
        self.inner.group_names()
    }

    /// Those with the number that each has in the log, whether they are open here or not.
    pub fn group_numbers(&self) -> BTreeMap<String, GroupId> {
        self.inner.group_numbers()
    }

    /// The groups beside the first that are open here, by name: for what they say of themselves.
    pub fn groups(&self) -> BTreeMap<String, Self> {
        let handle = |inner| Self { inner, _handle: self._handle.clone() };
        self.inner.groups_by_name().into_iter().map(|(name, inner)| (name, handle(inner))).collect()
    }

    /// The replicated state, for local reads; of a witness it is empty.
    pub fn group(&self) -> &Group {
        &self.inner.group
    }

    /// Times from the news of a commit until its entry is applied here, sampled one at a time.
    pub fn apply_lag(&self) -> LatencyCounts {
        self.inner.apply_lag.histogram.counts()
    }

    /// Counts and states.
    pub fn status(&self) -> NodeStatus {
        self.inner.status()
    }

    /// Resolves at each change of leader, role or membership. Cancel safe.
    pub async fn changed(&self) {
        self.inner.changed.notified().await;
    }

    /// Flushes, so that the next open has next to nothing to apply again ([`NodeStatus::replayed`]), hands leadership over if
    /// it leads, stops taking part, closes the engine. Without a leader it cannot flush: then the next open takes longer,
    /// and nothing is lost.
    ///
    /// # Errors
    /// Of the engine: the volume was not marked clean.
    pub async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}
