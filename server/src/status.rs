//! What a replica says of itself: one document, one verdict for each layer.
//!
//! # Place
//! Pure: from the counts of engine and node to the document that `/status`, `mainstay status` and both gRPC services show.

use mainstay::{EngineStats, EngineStatus, MemberInfo, MemberRole, NodeId, NodeStatus, SiteLag, StallStats};
use serde::{Deserialize, Serialize};

/// How a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Nothing to do.
    Ok,
    /// It serves; look at it today.
    Warn,
    /// It does not serve.
    Bad,
}

/// One line on one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// How it is.
    pub health: Health,
    /// Why, for people.
    pub line: String,
}

/// A verdict for each layer, from the medium upwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdicts {
    /// The device and its interface.
    pub disk: Verdict,
    /// The write-ahead log.
    pub log: Verdict,
    /// Consensus.
    pub raft: Verdict,
    /// Tables and memory.
    pub engine: Verdict,
}

/// Counts of the volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskSection {
    /// `uring`, `threads` or `sim`.
    pub backend: String,
    /// Why it is not the one asked for.
    pub fallback_reason: Option<String>,
    /// Bytes of extents in use.
    pub extent_bytes: u64,
    /// Why the volume takes no writes.
    pub read_only: Option<String>,
    /// What half of the latest writes of the log do not exceed, in microseconds, or how long the oldest has been without an answer;
    /// nothing while there are few.
    pub write_latency_micros: Option<u64>,
}

/// Counts of the log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogSection {
    /// Bytes in use.
    pub used_bytes: u64,
    /// Bytes of the ring.
    pub ring_bytes: u64,
    /// Device writes since open.
    pub batches: u64,
    /// Records since open.
    pub records: u64,
    /// Bytes of payload since open.
    pub payload_bytes: u64,
    /// Bytes written since open.
    pub written_bytes: u64,
}

/// A member as seen from here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemberSection {
    /// Its id, in decimal.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Whether it votes.
    pub voter: bool,
    /// Where it listens for peers.
    pub peer_address: String,
    /// Where it listens for clients.
    pub client_address: String,
    /// Where it stands; empty for nowhere in particular, and from a server that does not say it yet.
    #[serde(default)]
    pub site: String,
    /// The voter with the highest one shall lead.
    pub priority: u8,
    /// It votes and holds no data; false from a server that does not say it yet.
    #[serde(default)]
    pub witness: bool,
    /// Entries that it lacks, known to the leader only.
    pub lag: Option<u64>,
}

/// Another group than the first, as its replica here has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupSection {
    /// Its number in the log; the first group is 1.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// As in [`NodeStatus::role`]; `opening` until its replica is open.
    pub role: String,
    /// Term.
    pub term: u64,
    /// Id of the leader that the replica knows.
    pub leader: Option<u64>,
    /// Its name.
    pub leader_name: Option<String>,
    /// Last entry in its log.
    pub last_log: u64,
    /// Last entry known committed.
    pub committed: u64,
    /// Last entry applied.
    pub applied: u64,
    /// On its leader: voters that are silent or far behind.
    pub under_replicated: u64,
}

/// Counts of consensus.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RaftSection {
    /// Cluster id in hexadecimal, empty before birth.
    pub cluster: String,
    /// Own id, 0 before birth.
    pub id: u64,
    /// As in [`NodeStatus::role`].
    pub role: String,
    /// Term.
    pub term: u64,
    /// Id of the leader it knows.
    pub leader: Option<u64>,
    /// Name of the leader it knows.
    pub leader_name: Option<String>,
    /// Last entry in its log.
    pub last_log: u64,
    /// Last entry known committed.
    pub committed: u64,
    /// Last entry applied.
    pub applied: u64,
    /// Members.
    pub members: Vec<MemberSection>,
    /// Why it left service.
    pub failure: Option<String>,
    /// Times that it told another voter to lead because its own disk was full, failing, or slow against the others'.
    pub disk_hand_overs: u64,
    /// Times that it handed leadership to a voter with a higher priority.
    pub priority_hand_overs: u64,
    /// Bytes of tables that it fetched from other members, for snapshots and for tables that it lost.
    pub fetched_bytes: u64,
    /// Which formats the cluster may write; 0 from a server that does not say it yet.
    #[serde(default)]
    pub cluster_version: u16,
    /// The newest such version that this build reads: `mainstay finalize` raises the other one to it.
    #[serde(default)]
    pub cluster_version_max: u16,
    /// On the leader: voters that are silent or far behind, so that what is written now is on fewer volumes than it should be.
    #[serde(default)]
    pub under_replicated: u64,
    /// On the leader: how far the sites lag that have a bound.
    #[serde(default)]
    pub site_lags: Vec<SiteLagSection>,
    /// Groups beside the first; the counts above are of that one. None from a server that does not say it yet.
    #[serde(default)]
    pub groups: Vec<GroupSection>,
}

/// How far a site lags that has a bound.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SiteLagSection {
    /// Its label.
    pub site: String,
    /// Bytes of the log that it lacks.
    pub bytes: u64,
    /// How long it has lacked an entry, in milliseconds.
    pub time_ms: u64,
    /// Whether that is more than it may.
    pub beyond: bool,
}

/// Counts of the engine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineSection {
    /// Entries up to here are in tables.
    pub flushed: u64,
    /// Generations that wait for their flush.
    pub frozen_generations: u64,
    /// Tables of the present manifest.
    pub tables: u64,
    /// Their bytes.
    pub table_bytes: u64,
    /// Jobs that other replicas have finished and this one has not.
    pub absent_jobs: u64,
    /// Memory in use, of what the setting leaves without the allocator's share.
    pub memory_used_bytes: u64,
    /// The setting: `--memory`.
    pub memory_bytes: u64,
    /// What of the setting is left to the allocator; nothing from a server that does not say it yet.
    #[serde(default)]
    pub memory_allocator_bytes: u64,
    /// Digest over all tables, in hexadecimal.
    pub digest: String,
    /// The index it holds for.
    pub digest_index: u64,
    /// Tables that differed from the leader's.
    pub divergences: u64,
    /// Flushes and compactions whose tables could not be installed.
    #[serde(default)]
    pub refused_installs: u64,
    /// Jobs that failed: tried again, and given up.
    pub jobs_retrying: u64,
    /// See `jobs_retrying`.
    pub jobs_failed: u64,
    /// Damage found and mended.
    pub heal: HealSection,
    /// What was written to the device and why; nothing from a server that does not say it yet.
    #[serde(default)]
    pub writes: WritesSection,
    /// What writers waited for; nothing from a server that does not say it yet.
    #[serde(default)]
    pub stalls: Vec<StallSection>,
    /// Names of checkpoints.
    pub checkpoints: Vec<String>,
    /// Names of clones.
    pub clones: Vec<String>,
}

/// Bytes written since the process started, by cause. Those of the log are in its own section.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct WritesSection {
    /// Keys and values that were applied.
    pub user_bytes: u64,
    /// By flushes.
    pub flush_bytes: u64,
    /// By compactions, into L1 first.
    pub compaction_bytes: Vec<u64>,
    /// Tables that came from other members.
    pub fetched_bytes: u64,
    /// Manifest pages.
    pub pages_bytes: u64,
    /// All that was written, the log included, for each byte of keys and values.
    pub write_amplification: f64,
    /// Writes that were refused since the volume was full.
    pub space_refusals: u64,
}

/// Waits of writers for one cause.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StallSection {
    /// `log`, `flush`, `compaction`, `memory` or `device`.
    pub cause: String,
    /// How many have ended.
    pub count: u64,
    /// How long they were together.
    pub time_ms: u64,
}

/// Damage found and mended since the process started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HealSection {
    /// Tables found damaged by a read or by the scrubber.
    pub tables_found: u64,
    /// Damaged tables made anew from other members.
    pub tables_healed: u64,
    /// Tables damaged now.
    pub tables_damaged: u64,
    /// Reads that met damage and were answered with bytes of another member.
    pub reads_served: u64,
    /// Tables fetched because this replica could not make them, or made others.
    pub tables_fetched: u64,
    /// Copies of the superblock written again.
    pub superblocks_healed: u64,
    /// Times that the manifest pages were written again.
    pub pages_healed: u64,
    /// Entries of the log found missing at start, or damaged when they were read.
    pub entries_lost: u64,
    /// Entries of the log that were fetched from other members and written again.
    pub entries_healed: u64,
    /// Times that the volume was found to have gone back behind what this member had promised.
    pub went_back: u64,
    /// Places of the log that the scrubber found damaged.
    pub log_found: u64,
    /// Those of them behind which the log was cut: nothing needs them any more.
    pub log_cut: u64,
    /// Bytes that the scrubber has read.
    pub scrub_bytes: u64,
    /// Whole passes of the scrubber.
    pub scrub_passes: u64,
    /// When the last whole pass ended, in milliseconds since the Unix epoch; 0 before the first.
    pub scrub_last_ms: u64,
}

/// The document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Name of the process.
    pub member: String,
    /// The worst of the verdicts.
    pub health: Health,
    /// True when it is fit for clients: `/readyz`.
    pub ready: bool,
    /// Why not.
    pub not_ready_reason: Option<String>,
    /// One line a layer.
    pub verdicts: Verdicts,
    /// The volume.
    pub disk: DiskSection,
    /// The log.
    pub log: LogSection,
    /// Consensus.
    pub raft: RaftSection,
    /// The engine.
    pub engine: EngineSection,
}

/// Entries that a replica may lack and still be ready.
pub const READY_LAG_MAX: u64 = 10_000;

/// What another group than the first says of itself.
pub struct GroupSource {
    /// Its number in the log.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// Of its replica here; none until that is open.
    pub node: Option<NodeStatus>,
}

/// Where the status comes from.
pub struct Sources {
    /// Name of the process.
    pub member: String,
    /// The process is about to stop.
    pub stopping: bool,
    /// Of the volume.
    pub engine: EngineStatus,
    /// Of the log.
    pub wal: mainstay_wal::WalStats,
    /// Of consensus and data.
    pub node: NodeStatus,
    /// Of the groups beside the first.
    pub groups: Vec<GroupSource>,
    /// Names of checkpoints.
    pub checkpoints: Vec<String>,
    /// Names of clones.
    pub clones: Vec<String>,
}

impl Status {
    /// Judges the counts.
    pub fn new(sources: Sources) -> Self {
        let Sources { member, stopping, engine, wal, node, groups, checkpoints, clones } = sources;
        let groups: Vec<GroupSection> = groups.iter().map(|group| group_section(group, &node.members)).collect();
        let verdicts = Verdicts {
            disk: disk_verdict(&engine),
            log: log_verdict(&engine, &wal),
            raft: with_groups(raft_verdict(&node), &groups),
            engine: engine_verdict(&engine, &node),
        };
        let all = [&verdicts.disk, &verdicts.log, &verdicts.raft, &verdicts.engine];
        let health = all.into_iter().map(|verdict| verdict.health).max().unwrap_or(Health::Ok);
        let not_ready_reason = not_ready_reason(stopping, &node);
        let leader_name = name_of(node.leader, &node.members);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            member,
            health,
            ready: not_ready_reason.is_none(),
            not_ready_reason,
            verdicts,
            disk: DiskSection {
                backend: engine.backend.clone(),
                fallback_reason: engine.fallback_reason.clone(),
                extent_bytes: engine.extent_bytes,
                read_only: engine.read_only.clone(),
                write_latency_micros: node
                    .disk
                    .write_latency
                    .map(|latency| u64::try_from(latency.as_micros()).unwrap_or(u64::MAX)),
            },
            log: LogSection {
                used_bytes: engine.wal_used_bytes,
                ring_bytes: engine.wal_ring_bytes,
                batches: wal.batches,
                records: wal.records,
                payload_bytes: wal.payload_bytes,
                written_bytes: wal.written_bytes,
            },
            raft: RaftSection {
                cluster: if node.cluster == [0; 16] { String::new() } else { hex(&node.cluster) },
                id: node.id.0,
                role: node.role.clone(),
                term: node.term,
                leader: node.leader.map(|id| id.0),
                leader_name,
                last_log: node.last_log.0,
                committed: node.committed.0,
                applied: node.group.applied.0,
                members: node
                    .members
                    .iter()
                    .map(|m| MemberSection {
                        id: m.id.0,
                        name: m.name.clone(),
                        voter: m.role == MemberRole::Voter,
                        peer_address: m.peer_address.0.clone(),
                        client_address: m.client_address.clone(),
                        site: m.site.clone(),
                        priority: m.priority,
                        witness: m.witness,
                        lag: node.lag.get(&m.id.0).copied(),
                    })
                    .collect(),
                failure: node.failure.clone(),
                disk_hand_overs: node.disk_hand_overs,
                priority_hand_overs: node.priority_hand_overs,
                fetched_bytes: node.fetched_bytes,
                cluster_version: node.cluster_version,
                cluster_version_max: mainstay::CLUSTER_VERSION_MAX,
                under_replicated: under_replicated(&node),
                site_lags: node.site_lags.iter().map(site_lag_section).collect(),
                groups,
            },
            engine: EngineSection {
                flushed: node.group.flushed.0,
                frozen_generations: node.group.frozen_generations,
                tables: node.group.tables,
                table_bytes: node.group.table_bytes,
                absent_jobs: node.group.absent_jobs,
                memory_used_bytes: engine.memory_used_bytes,
                memory_bytes: engine.memory_bytes,
                memory_allocator_bytes: engine.memory_allocator_bytes,
                digest: format!("{:032x}", node.group.digest),
                digest_index: node.group.digest_index.0,
                divergences: node.group.divergences,
                refused_installs: node.group.refused_installs,
                jobs_retrying: node.group.jobs_retrying,
                jobs_failed: node.group.jobs_failed,
                heal: HealSection {
                    tables_found: engine.heal.tables_found,
                    tables_healed: engine.heal.tables_healed,
                    tables_damaged: engine.heal.tables_damaged,
                    reads_served: engine.heal.reads_served,
                    tables_fetched: engine.heal.tables_fetched,
                    superblocks_healed: engine.heal.superblocks_healed,
                    pages_healed: engine.heal.pages_healed,
                    entries_lost: node.log_heal.entries_lost,
                    entries_healed: node.log_heal.entries_healed,
                    went_back: node.log_heal.went_back,
                    log_found: engine.heal.log_found,
                    log_cut: engine.heal.log_cut,
                    scrub_bytes: engine.heal.scrub_bytes,
                    scrub_passes: engine.heal.scrub_passes,
                    scrub_last_ms: engine.heal.scrub_last_ms,
                },
                writes: writes_section(&engine.stats),
                stalls: engine.stats.stalls.iter().map(stall_section).collect(),
                checkpoints,
                clones,
            },
        }
    }

    /// For people: a line a layer, one where the cluster has an earlier version than it could, a line a member and a line a group.
    pub fn text(&self) -> String {
        let mut text = format!("{} {} ready={}\n", self.member, label(self.health), self.ready);
        let layers = [
            ("disk", &self.verdicts.disk),
            ("log", &self.verdicts.log),
            ("raft", &self.verdicts.raft),
            ("engine", &self.verdicts.engine),
        ];
        for (name, verdict) in layers {
            text += &format!("  {name:<7} {:<5} {}\n", label(verdict.health), verdict.line);
        }
        let RaftSection { cluster_version: version, cluster_version_max: reads, .. } = self.raft;
        if version > 0 && version < reads && !self.raft.cluster.is_empty() {
            text += &format!("  version {version}: this build reads {reads}, `mainstay finalize` raises it\n");
        }
        for member in &self.raft.members {
            let role = match (Some(member.id) == self.raft.leader, member.voter) {
                (true, _) => "leader",
                (false, true) => "voter",
                (false, false) => "learner",
            };
            let lag = member.lag.map(|lag| format!(" lag={lag}")).unwrap_or_default();
            let site = Some(&member.site).filter(|site| !site.is_empty());
            let site = site.map(|site| format!(" site={site}")).unwrap_or_default();
            let priority = Some(member.priority).filter(|priority| *priority > 0);
            let priority = priority.map(|priority| format!(" priority={priority}")).unwrap_or_default();
            let witness = if member.witness { " witness" } else { "" };
            let MemberSection { id, name, peer_address, .. } = member;
            text += &format!("  member  {role:<8} {name} id={id} peer={peer_address}{witness}{site}{priority}{lag}\n");
        }
        for group in &self.raft.groups {
            let GroupSection { number, name, role, term, leader_name, applied, .. } = group;
            let leader = leader_name.as_deref().unwrap_or("none");
            text +=
                &format!("  group   {role:<8} {name} number={number} leader={leader} term={term} applied={applied}\n");
        }
        text
    }
}

/// A group as its replica here has it. `members` are those of the first group, which alone knows their names.
pub(crate) fn group_section(group: &GroupSource, members: &[MemberInfo]) -> GroupSection {
    let GroupSource { number, name, node } = group;
    let closed = NodeStatus { role: "opening".into(), ..NodeStatus::default() };
    let node = node.as_ref().unwrap_or(&closed);
    GroupSection {
        number: *number,
        name: name.clone(),
        role: node.role.clone(),
        term: node.term,
        leader: node.leader.map(|id| id.0),
        leader_name: name_of(node.leader, members),
        last_log: node.last_log.0,
        committed: node.committed.0,
        applied: node.group.applied.0,
        under_replicated: under_replicated(node),
    }
}

fn name_of(id: Option<NodeId>, members: &[MemberInfo]) -> Option<String> {
    id.and_then(|id| members.iter().find(|member| member.id == id)).map(|member| member.name.clone())
}

fn writes_section(stats: &EngineStats) -> WritesSection {
    WritesSection {
        user_bytes: stats.user_bytes,
        flush_bytes: stats.flush_bytes,
        compaction_bytes: stats.compaction_bytes.clone(),
        fetched_bytes: stats.fetched_bytes,
        pages_bytes: stats.pages_bytes,
        write_amplification: stats.write_amplification(),
        space_refusals: stats.space_refusals,
    }
}

fn stall_section(stall: &StallStats) -> StallSection {
    StallSection {
        cause: stall.cause.name().into(),
        count: stall.waits.total(),
        time_ms: u64::try_from(stall.waits.sum.as_millis()).unwrap_or(u64::MAX),
    }
}

fn label(health: Health) -> &'static str {
    match health {
        Health::Ok => "ok",
        Health::Warn => "WARN",
        Health::Bad => "BAD",
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn verdict(health: Health, line: String) -> Verdict {
    Verdict { health, line }
}

fn size(bytes: u64) -> crate::units::ByteSize {
    crate::units::ByteSize(bytes)
}

fn disk_verdict(engine: &EngineStatus) -> Verdict {
    let in_use = size(engine.extent_bytes);
    match (&engine.read_only, &engine.fallback_reason) {
        (Some(reason), _) => verdict(Health::Bad, format!("takes no writes: {reason}")),
        (None, Some(reason)) => {
            verdict(Health::Warn, format!("{in_use} in use by {} because {reason}", engine.backend))
        }
        (None, None) => verdict(Health::Ok, format!("{in_use} in use by {}", engine.backend)),
    }
}

fn log_verdict(engine: &EngineStatus, wal: &mainstay_wal::WalStats) -> Verdict {
    let (used, ring) = (engine.wal_used_bytes, engine.wal_ring_bytes);
    let percent = used.saturating_mul(100).checked_div(ring).unwrap_or(0);
    let records_a_batch = wal.records as f64 / wal.batches.max(1) as f64;
    let line = format!("{percent} % of {} in use, {records_a_batch:.1} records a device write", size(ring));
    verdict(if percent > 90 { Health::Warn } else { Health::Ok }, line)
}

fn raft_verdict(node: &NodeStatus) -> Verdict {
    if node.role == "recovering" {
        return verdict(Health::Bad, format!("mends its log: {}", node.failure.as_deref().unwrap_or_default()));
    }
    if let Some(failure) = &node.failure {
        return verdict(Health::Bad, format!("left service: {failure}"));
    }
    if node.role == "starting" {
        return verdict(Health::Warn, "asks the other members what it has promised them".into());
    }
    if node.role == "waiting" {
        return verdict(Health::Warn, "waits for `mainstay init` or for a cluster that knows its name".into());
    }
    if node.role == "removed" {
        return verdict(Health::Bad, "was removed from its cluster: wipe the volume to join anew".into());
    }
    let line = format!("{} in term {}, applied {} of {}", node.role, node.term, node.group.applied, node.committed);
    if node.leader.is_none() {
        return verdict(Health::Bad, format!("{line}, knows no leader"));
    }
    let behind = node.lag.iter().filter(|(_, lag)| **lag > READY_LAG_MAX).count();
    if !node.silent.is_empty() || behind > 0 {
        let silent = node.silent.len();
        return verdict(
            Health::Warn,
            format!("{line}, under-replicated: {silent} voters silent, {behind} members far behind"),
        );
    }
    if let Some(lag) = node.site_lags.iter().find(|lag| lag.beyond) {
        let lacks = size(lag.bytes);
        return verdict(Health::Warn, format!("{line}, site {} lacks {lacks}, for {:?}", lag.site, lag.time));
    }
    verdict(Health::Ok, line)
}

/// The verdict on the first group made one on all: the worst of them decides and is named.
fn with_groups(first: Verdict, groups: &[GroupSection]) -> Verdict {
    let judged = groups.iter().map(|group| (group_health(group), group));
    let Some(worst) = judged.clone().map(|((health, _), _)| health).max() else { return first };
    let Verdict { health, line } = first;
    if worst == Health::Ok {
        let plural = if groups.len() == 1 { "" } else { "s" };
        return verdict(health, format!("{line}, {} group{plural} beside the first", groups.len()));
    }
    let named: Vec<_> = judged.filter(|((health, _), _)| *health == worst).collect();
    let why = named.first().map(|((_, why), group)| format!("group {} {why}", group.name)).unwrap_or_default();
    let others = match named.len() {
        0 | 1 => String::new(),
        count => format!(" and {} more of {}", count - 1, groups.len()),
    };
    verdict(health.max(worst), format!("{line}; {why}{others}"))
}

/// How a group beside the first is, and why. A replica that left service takes its process with it, which the first group says.
fn group_health(group: &GroupSection) -> (Health, &'static str) {
    match group.role.as_str() {
        "opening" | "waiting" | "starting" => (Health::Warn, "does not take part here yet"),
        "recovering" => (Health::Bad, "mends its log"),
        _ if group.leader.is_none() => (Health::Bad, "knows no leader"),
        _ if group.under_replicated > 0 => (Health::Warn, "is under-replicated"),
        _ => (Health::Ok, ""),
    }
}

fn site_lag_section(lag: &SiteLag) -> SiteLagSection {
    let SiteLag { site, bytes, time, beyond } = lag.clone();
    SiteLagSection { site, bytes, time_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX), beyond }
}

/// Voters of a leader that are silent or far behind.
fn under_replicated(node: &NodeStatus) -> u64 {
    let far = |id: &u64| node.lag.get(id).is_some_and(|lag| *lag > READY_LAG_MAX);
    let voters = node.members.iter().filter(|m| m.role == MemberRole::Voter);
    voters.filter(|m| node.silent.contains(&m.id.0) || far(&m.id.0)).count() as u64
}

fn engine_verdict(engine: &EngineStatus, node: &NodeStatus) -> Verdict {
    let group = &node.group;
    let line = format!(
        "{} tables of {}, memory {} of {} with {} left to the allocator, {} generations wait for their flush",
        group.tables,
        size(group.table_bytes),
        size(engine.memory_used_bytes),
        size(engine.memory_bytes),
        size(engine.memory_allocator_bytes),
        group.frozen_generations
    );
    let heal = &engine.heal;
    if group.diverged {
        return verdict(Health::Bad, format!("its tables differ from the leader's, out of service: {line}"));
    }
    if let Some(index) = node.log_heal.awaited_entry {
        return verdict(Health::Bad, format!("entry {index} is lost here and no other member gives it: {line}"));
    }
    if heal.tables_damaged > 0 {
        return verdict(Health::Bad, format!("{} tables are damaged: {line}", heal.tables_damaged));
    }
    if group.jobs_failed > 0 {
        return verdict(Health::Bad, format!("{} flushes or compactions failed for good: {line}", group.jobs_failed));
    }
    if group.refused_installs > 0 {
        let refused = group.refused_installs;
        return verdict(Health::Bad, format!("{refused} flushes or compactions could not be installed: {line}"));
    }
    let found = heal.tables_found
        + heal.superblocks_healed
        + heal.pages_healed
        + heal.log_found
        + group.divergences
        + node.log_heal.entries_lost;
    let line = match found {
        0 => line,
        _ => format!("{line}, {found} damages found and healed"),
    };
    let full = engine.memory_used_bytes.saturating_add(engine.memory_allocator_bytes) > engine.memory_bytes;
    let warn = full || group.frozen_generations > 4 || group.jobs_retrying > 0 || found > 0;
    verdict(if warn { Health::Warn } else { Health::Ok }, line)
}

/// Why clients should go elsewhere, from what this node knows without asking anybody.
fn not_ready_reason(stopping: bool, node: &NodeStatus) -> Option<String> {
    if stopping {
        return Some("stopping".into());
    }
    if node.role == "recovering" {
        return Some("mends its log".into());
    }
    if let Some(failure) = &node.failure {
        return Some(format!("left service: {failure}"));
    }
    if node.group.diverged {
        return Some("its tables differ from the leader's and are fetched".into());
    }
    if matches!(node.role.as_str(), "waiting" | "starting" | "removed") {
        return Some(format!("not a member: {}", node.role));
    }
    if node.leader.is_none() {
        return Some("knows no leader".into());
    }
    let lag = node.committed.0.saturating_sub(node.group.applied.0);
    (lag > READY_LAG_MAX).then(|| format!("has {lag} entries to apply"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Sources {
        let leader = mainstay::MemberInfo {
            id: mainstay::NodeId(2),
            name: "b".into(),
            peer_address: mainstay::PeerAddress("b:2380".into()),
            client_address: "b:2379".into(),
            incarnation: [0; 16],
            site: String::new(),
            priority: 0,
            witness: false,
            version: 0,
            role: MemberRole::Voter,
        };
        let node = NodeStatus {
            role: "follower".into(),
            leader: Some(leader.id),
            term: 3,
            members: vec![leader],
            site_lags: vec![SiteLag { site: "west".into(), bytes: 0, time: std::time::Duration::ZERO, beyond: false }],
            ..NodeStatus::default()
        };
        let waits = mainstay_io::LatencyCounts::default();
        let stalls = vec![StallStats { cause: mainstay::StallCause::Log, waits }];
        let engine = EngineStatus {
            stats: EngineStats { stalls, ..EngineStats::default() },
            backend: "uring".into(),
            memory_bytes: 6 << 20,
            memory_allocator_bytes: 1 << 20,
            ..EngineStatus::default()
        };
        let wal = mainstay_wal::WalStats::default();
        let groups = vec![group("east")];
        Sources { member: "a".into(), stopping: false, engine, wal, node, groups, checkpoints: vec![], clones: vec![] }
    }

    fn group(name: &str) -> GroupSource {
        let node = NodeStatus { role: "leader".into(), leader: Some(NodeId(2)), term: 5, ..NodeStatus::default() };
        GroupSource { number: 7, name: name.into(), node: Some(node) }
    }

    #[test]
    fn each_fault_shows_in_the_verdict_of_its_layer() {
        let check = |name: &str, expect: Health, change: &dyn Fn(&mut Sources)| {
            let mut sources = sources();
            change(&mut sources);
            let status = Status::new(sources);
            let found = [&status.verdicts.disk, &status.verdicts.log, &status.verdicts.raft, &status.verdicts.engine];
            let layer = ["disk", "log", "raft", "engine"].iter().position(|layer| *layer == name).expect("a layer");
            for (at, verdict) in found.iter().enumerate() {
                let expect = if at == layer { expect } else { Health::Ok };
                assert_eq!(verdict.health, expect, "{name}: {verdict:?}");
            }
            assert_eq!(status.health, expect);
        };
        check("disk", Health::Ok, &|_| {});
        check("disk", Health::Bad, &|s| s.engine.read_only = Some("device failed".into()));
        check("disk", Health::Warn, &|s| s.engine.fallback_reason = Some("EPERM".into()));
        check("log", Health::Warn, &|s| (s.engine.wal_used_bytes, s.engine.wal_ring_bytes) = (95, 100));
        check("raft", Health::Bad, &|s| s.node.leader = None);
        check("raft", Health::Bad, &|s| s.node.failure = Some("log failed".into()));
        check("raft", Health::Warn, &|s| s.node.role = "waiting".into());
        check("raft", Health::Warn, &|s| s.node.lag = [(3, READY_LAG_MAX + 1)].into());
        let lags = |beyond| SiteLag { site: "west".into(), bytes: 1, time: std::time::Duration::ZERO, beyond };
        check("raft", Health::Ok, &|s| s.node.site_lags = vec![lags(false)]);
        check("raft", Health::Warn, &|s| s.node.site_lags = vec![lags(false), lags(true)]);
        fn east(sources: &mut Sources) -> &mut NodeStatus {
            sources.groups[0].node.as_mut().expect("it is open")
        }
        check("raft", Health::Bad, &|s| east(s).leader = None);
        check("raft", Health::Bad, &|s| east(s).role = "recovering".into());
        check("raft", Health::Warn, &|s| s.groups[0].node = None);
        check("raft", Health::Warn, &|s| (east(s).leader, east(s).role) = (None, "waiting".into()));
        check("raft", Health::Warn, &|s| {
            east(s).members = s.node.members.clone();
            east(s).silent = [2].into();
        });
        check("raft", Health::Bad, &|s| {
            s.node.lag = [(3, READY_LAG_MAX + 1)].into();
            east(s).leader = None;
        });
        check("engine", Health::Bad, &|s| s.node.group.diverged = true);
        check("engine", Health::Warn, &|s| s.node.group.divergences = 1);
        check("engine", Health::Bad, &|s| s.engine.heal.tables_damaged = 1);
        check("engine", Health::Bad, &|s| s.node.log_heal.awaited_entry = Some(mainstay::LogIndex(7)));
        check("engine", Health::Warn, &|s| s.engine.heal.tables_found = 1);
        check("engine", Health::Warn, &|s| s.node.group.jobs_retrying = 1);
        check("engine", Health::Bad, &|s| s.node.group.jobs_failed = 1);
        check("engine", Health::Bad, &|s| s.node.group.refused_installs = 1);
        check("engine", Health::Ok, &|s| s.engine.memory_used_bytes = 5 << 20);
        check("engine", Health::Warn, &|s| s.engine.memory_used_bytes = (5 << 20) + 1);
    }

    #[test]
    fn the_worst_of_the_groups_is_named_beside_the_first() {
        let check = |groups: Vec<GroupSource>, expect: &str| {
            let status = Status::new(Sources { groups, ..sources() });
            assert_eq!(status.verdicts.raft.line, format!("follower in term 3, applied 0 of 0{expect}"));
            status
        };
        let without_leader = |name| {
            let mut group = group(name);
            group.node.as_mut().expect("it is open").leader = None;
            group
        };
        check(vec![], "");
        check(vec![group("east")], ", 1 group beside the first");
        let status = check(vec![group("east"), group("west")], ", 2 groups beside the first");
        let line = "  group   leader   east number=7 leader=b term=5 applied=0\n";
        assert!(status.text().contains(line), "{}", status.text());
        let closed = GroupSource { node: None, ..group("north") };
        let status = check(vec![closed, without_leader("east"), group("west")], "; group east knows no leader");
        assert!(status.text().contains("group   opening  north number=7 leader=none"), "{}", status.text());
        // Clients of the first group are served.
        assert!(status.ready);
        check(vec![without_leader("a"), group("b"), without_leader("c")], "; group a knows no leader and 1 more of 3");
    }

    #[test]
    fn a_version_that_can_be_raised_is_shown() {
        let text = |cluster: [u8; 16], cluster_version| {
            let mut sources = sources();
            (sources.node.cluster, sources.node.cluster_version) = (cluster, cluster_version);
            Status::new(sources).text()
        };
        let newest = mainstay::CLUSTER_VERSION_MAX;
        let line = format!("  version 1: this build reads {newest}, `mainstay finalize` raises it\n");
        assert!(text([1; 16], 1).contains(&line), "{}", text([1; 16], 1));
        assert!(!text([1; 16], newest).contains("finalize"));
        assert!(!text([0; 16], 1).contains("finalize"), "there is no cluster yet");
    }

    /// The budget without the allocator's share stood where the setting was looked for: 26.7 MiB of `--memory 32MiB`.
    #[test]
    fn memory_is_shown_as_it_was_set() {
        let mut sources = sources();
        sources.engine.memory_used_bytes = 2 << 20;
        let status = Status::new(sources);
        let engine = &status.engine;
        assert_eq!(
            (engine.memory_used_bytes, engine.memory_bytes, engine.memory_allocator_bytes),
            (2 << 20, 6 << 20, 1 << 20)
        );
        let line = &status.verdicts.engine.line;
        assert!(line.contains("memory 2.0 MiB of 6.0 MiB with 1.0 MiB left to the allocator"), "{line}");
    }

    #[test]
    fn readiness_names_its_reason() {
        let check = |expect: Option<&str>, change: &dyn Fn(&mut Sources)| {
            let mut sources = sources();
            change(&mut sources);
            let status = Status::new(sources);
            assert_eq!(status.not_ready_reason.as_deref(), expect);
            assert_eq!(status.ready, expect.is_none());
        };
        check(None, &|_| {});
        check(Some("stopping"), &|s| s.stopping = true);
        check(Some("knows no leader"), &|s| s.node.leader = None);
        check(Some("not a member: waiting"), &|s| s.node.role = "waiting".into());
        check(Some("has 10001 entries to apply"), &|s| s.node.committed.0 = READY_LAG_MAX + 1);
        check(None, &|s| s.node.committed.0 = READY_LAG_MAX);
    }

    #[test]
    fn the_keys_of_the_document_are_a_promise() {
        let document = serde_json::to_value(Status::new(sources())).expect("plain data");
        let mut keys = Vec::new();
        walk("", &document, &mut keys);
        let expect = include_str!("../testdata/status_keys.txt");
        assert_eq!(keys.join("\n"), expect.trim_end(), "testdata/status_keys.txt: scripts read these keys");
    }

    fn walk(path: &str, value: &serde_json::Value, keys: &mut Vec<String>) {
        if let Some(first) = value.get(0) {
            walk(path, first, keys);
        }
        if let serde_json::Value::Object(map) = value {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                keys.push(path.clone());
                walk(&path, value, keys);
            }
        }
    }
}
