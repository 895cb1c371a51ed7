//! Groups beside the first: logs with leaders of their own over one volume, one ring and one connection a peer.
//!
//! # Place
//! The *host* is the replica of the first group: it has the identity, admits members and knows which groups there are. Each other
//! group is an [`Inner`] of its own, which reaches its peers through the host's transport ([`GroupTransport`]).
//! # Invariants
//! - P1. A group is born by an entry of the first group, which creates a keyspace named after it and its first voters. Keyspaces are
//!   numbered in the order of their entries, so of two births of one name all see the same first one, and no number is used twice.
//! - P2. All first voters give the same first membership to openraft, and nobody else gives any.
//! - P3. Who takes part is decided by the first group alone. The leader of every other group follows it: who comes learns first, then
//!   all votes change hands at once, and no voter is given up of whom the first group has not let go. Who goes loses its vote in the
//!   first group, then in all others, and only then is it no member: so whoever is wiped for that takes no vote from any.
//! - P4. A process serves all its groups or none: when a replica leaves service, the host does.
//! - P5. Entries of a group are kept in the ring until its replica is opened: those that the tables of the first group name are opened
//!   before anything is cut.
//! - P6. A witness has no tables that name groups: it asks the members that do, whenever it has applied more of the first group, until one
//!   answers that has applied as much. What it has heard only grows. A majority that counts on its vote has such a member.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard, Weak};
use std::time::Duration;

use mainstay_engine::{CommandBody, GroupSettings, KeyspaceId, OwnerRecord};
use mainstay_io::BoxFuture;
use mainstay_wal::{GroupId, RecordKind};
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{InitializeError, RaftError};
use openraft_rt::Instant;

use crate::network::{keeps_order, method};
use crate::node::{Inner, Phase, Running, Write};
use crate::relief::Stuck;
use crate::types::{LogId, Member, Membership, members_of};
use crate::wire::{MEMBERS_MAX, Reader, Writer, decode_result};
use crate::{
    Durability, Envelope, Error, ErrorKind, Handler, Hello, MemberInfo, MemberRole, NodeId, NodeOptions, PeerAddress,
    ReadLevel, Result, Runtime, Transport,
};

/// What the keyspace of a group begins with; the first voters and the name follow.
pub const GROUP_KEYSPACE_PREFIX: &str = "mainstay.group.";
/// Longest name of a group, in bytes.
pub const GROUP_NAME_BYTES_MAX: usize = 64;
/// Longest name of a keyspace, in bytes.
const KEYSPACE_NAME_BYTES_MAX: usize = 255;
/// Groups of one cluster beside the first: openraft serves about a hundred in a process.
const GROUPS_MAX: usize = 128;
/// How often a host looks for groups that were born, and a group for members that came or went.
const LOOK: Duration = Duration::from_millis(500);

/// What the first group says of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Birth {
    number: GroupId,
    voters: BTreeSet<u64>,
}

/// What a member with data answers to who asks for the groups.
pub(crate) struct Births {
    /// It has applied the first group up to here.
    applied: u64,
    births: BTreeMap<String, Birth>,
}

impl Births {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.u64(self.applied).u32(self.births.len() as u32);
        for (name, birth) in &self.births {
            out.u64(birth.number.0).string(name).u32(birth.voters.len() as u32);
            birth.voters.iter().for_each(|id| {
                out.u64(*id);
            });
        }
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        let too_many = |what: &str| Error::new(ErrorKind::Corrupt, format!("an answer names too many {what}"));
        let (applied, count) = (reader.u64()?, reader.u32()?);
        if count as usize > GROUPS_MAX {
            return Err(too_many("groups"));
        }
        let mut births = BTreeMap::new();
        for _ in 0..count {
            let (number, name, voters_count) = (GroupId(reader.u64()?), reader.string()?, reader.u32()?);
            if voters_count as usize > MEMBERS_MAX {
                return Err(too_many("voters"));
            }
            let voters = (0..voters_count).map(|_| reader.u64()).collect::<Result<BTreeSet<u64>>>()?;
            births.insert(name, Birth { number, voters });
        }
        Ok(Self { applied, births })
    }
}

/// The whole of an answer.
pub(crate) fn read_births(body: &bytes::Bytes) -> Result<Births> {
    decode_result(body, Births::read)
}

/// The name of the keyspace that is the birth of a group.
fn keyspace_of(name: &str, voters: &BTreeSet<u64>) -> Result<String> {
    let ids: Vec<String> = voters.iter().map(ToString::to_string).collect();
    let keyspace = format!("{GROUP_KEYSPACE_PREFIX}{}.{name}", ids.join("-"));
    if name.is_empty() || name.len() > GROUP_NAME_BYTES_MAX || keyspace.len() > KEYSPACE_NAME_BYTES_MAX {
        let message = format!("the name of a group has 1 to {GROUP_NAME_BYTES_MAX} bytes name={name}");
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(keyspace)
}

/// The births among keyspaces, by the name of the group. Of one name the first counts.
fn births(mut keyspaces: Vec<(String, KeyspaceId)>) -> BTreeMap<String, Birth> {
    keyspaces.sort_by_key(|(_, id)| *id);
    let mut births = BTreeMap::new();
    for (keyspace, id) in keyspaces {
        let Some((ids, name)) = keyspace.strip_prefix(GROUP_KEYSPACE_PREFIX).and_then(|rest| rest.split_once('.'))
        else {
            continue;
        };
        let Ok(voters) = ids.split('-').map(str::parse).collect::<std::result::Result<BTreeSet<u64>, _>>() else {
            continue;
        };
        // The first group is number 1, and the default keyspace number 0.
        let number = GroupId(u64::from(id.0) + 1);
        births.entry(name.to_owned()).or_insert(Birth { number, voters });
    }
    births
}

/// What the leader of a group does next so that its members become those of the first group.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Members that are new or say something else of themselves.
    Learners(BTreeMap<u64, Member>),
    Known(BTreeMap<u64, Member>),
    Voters(BTreeSet<u64>),
    /// Learners that are none any more.
    Gone(BTreeSet<u64>),
}

/// See P3. `caught_up` are learners that have nearly all of the log. Pure, so that a table of cases tests it.
fn next_step(group: &Membership, host: &[MemberInfo], caught_up: &BTreeSet<u64>) -> Option<Step> {
    let nodes: BTreeMap<u64, Member> = host.iter().map(|member| (member.id.0, Member::from(member))).collect();
    let known: BTreeMap<u64, &Member> = group.nodes().map(|(id, member)| (*id, member)).collect();
    let (new, old): (BTreeMap<_, _>, BTreeMap<_, _>) = nodes.into_iter().partition(|(id, _)| !known.contains_key(id));
    if !new.is_empty() {
        return Some(Step::Learners(new));
    }
    let other: BTreeMap<_, _> = old.into_iter().filter(|(id, member)| known[id] != member).collect();
    if !other.is_empty() {
        return Some(Step::Known(other));
    }
    let may_vote: BTreeSet<u64> = host.iter().filter(|m| m.role == MemberRole::Voter).map(|m| m.id.0).collect();
    let joint = group.get_joint_config();
    let voters = joint.last().cloned().unwrap_or_default();
    // All at once, when each of them has the log: a group that took in who comes before it let go of who left would need more votes than
    // it has lost, and one that let go first would have fewer.
    let has_come = |id: &u64| voters.contains(id) || caught_up.contains(id);
    let wanted = if may_vote.iter().all(has_come) { may_vote } else { voters.clone() };
    if !wanted.is_empty() && (wanted != voters || joint.len() > 1) {
        return Some(Step::Voters(wanted));
    }
    let votes: BTreeSet<u64> = group.voter_ids().collect();
    let stays = |id: &u64| votes.contains(id) || host.iter().any(|member| member.id.0 == *id);
    let gone: BTreeSet<u64> = known.into_keys().filter(|id| !stays(id)).collect();
    (!gone.is_empty()).then_some(Step::Gone(gone))
}

/// What a replica of another group than the first remembers of the members of both.
pub(crate) struct Followed<R: Runtime> {
    /// Where the memberships of the first group and of this one stand that were found to be equal.
    compared: Option<(Option<LogId>, Option<LogId>)>,
    /// A change is being made.
    at_work: bool,
    stuck: Stuck<R::Instant>,
}

impl<R: Runtime> Default for Followed<R> {
    fn default() -> Self {
        Self { compared: None, at_work: false, stuck: Stuck::default() }
    }
}

/// The way of one group to its peers.
pub(crate) struct GroupTransport<R: Runtime> {
    pub(crate) host: Weak<Inner<R>>,
    pub(crate) number: GroupId,
}

impl<R: Runtime> Transport for GroupTransport<R> {
    /// The host serves all groups.
    fn serve(&self, _: Hello, _: Arc<dyn Handler>) {}

    fn call(
        &self,
        address: PeerAddress,
        expect: Option<NodeId>,
        request: Envelope,
        timeout: Duration,
    ) -> BoxFuture<Result<Envelope>> {
        let Some(host) = self.host.upgrade() else {
            return Box::pin(async { Err(Error::new(ErrorKind::Closed, "the node is closed")) });
        };
        // The first membership of a group names nobody, and the first group knows best where a member listens.
        let known = expect.and_then(|id| host.member(id));
        let address = known.map_or(address, |member| member.peer_address);
        let kind = if keeps_order(request.method) { method::GROUPED_IN_TURN } else { method::GROUPED };
        let body = encode_grouped(self.number.0, request.method, &request.body);
        let call = host.transport.call(address, expect, Envelope { method: kind, body }, timeout);
        let host = self.host.clone();
        Box::pin(async move {
            let body = call.await?.body;
            if let (Some(host), Some(id)) = (host.upgrade(), expect) {
                host.liveness.hear(id.0);
            }
            Ok(Envelope { method: request.method, body })
        })
    }

    fn local_address(&self) -> PeerAddress {
        self.host.upgrade().map_or_else(|| PeerAddress(String::new()), |host| host.transport.local_address())
    }

    fn close(&self) -> BoxFuture<()> {
        Box::pin(std::future::ready(()))
    }
}

/// The body of a request for a group.
pub(crate) fn encode_grouped(number: u64, method: u8, body: &[u8]) -> bytes::Bytes {
    let mut out = Writer::with_capacity(body.len() + 32);
    out.u64(number).u8(method).bytes(body);
    out.finish()
}

/// Of a request for a group: which one, and what is asked of it.
pub(crate) fn read_grouped(body: &bytes::Bytes) -> Result<(GroupId, Envelope)> {
    let mut reader = Reader::open(body)?;
    let number = GroupId(reader.u64()?);
    let (method, body) = (reader.u8()?, reader.bytes()?);
    reader.end()?;
    Ok((number, Envelope { method, body }))
}

/// Records of other groups than the first, and the holes, which may have taken any.
pub(crate) fn of_others(found: &[OwnerRecord], first: GroupId) -> Vec<OwnerRecord> {
    found.iter().filter(|record| record.group != first || record.kind == RecordKind::HOLE).cloned().collect()
}

impl<R: Runtime> Inner<R> {
    /// The replica of the first group, for one of another group.
    pub(crate) fn host(&self) -> Option<Arc<Self>> {
        self.host.as_ref()?.upgrade()
    }

    pub(crate) fn groups(&self) -> MutexGuard<'_, BTreeMap<GroupId, Arc<Self>>> {
        self.groups.lock().expect("nothing panics while it holds this lock")
    }

    /// Refuses what only the first group decides.
    pub(crate) fn check_first(&self) -> Result<()> {
        match self.host {
            Some(_) => Err(Error::new(ErrorKind::Unsupported, "the first group decides that for all")),
            None => Ok(()),
        }
    }

    /// The groups that were born, as far as this node has applied the first one, or a witness has heard of it.
    fn born(&self) -> BTreeMap<String, Birth> {
        match self.is_witness() {
            true => self.heard_births.lock().expect("nothing panics while it holds this lock").clone(),
            false => births(self.group.keyspaces()),
        }
    }

    /// What a member that holds data knows of the groups.
    pub(crate) fn known_births(&self) -> Result<Births> {
        self.check_holds_data()?;
        // In this order: what is born meanwhile may be missing from what is said to hold it.
        let applied = self.group.applied().0;
        Ok(Births { applied, births: births(self.group.keyspaces()) })
    }

    /// Of a witness: see P6. Whether it knows now of all groups that were born up to what it has applied.
    async fn hear_of_births(self: &Arc<Self>) -> bool {
        let applied = self.progress.applied().0;
        let holders: Vec<NodeId> = self.holders().map(|member| member.id).collect();
        let ask = |id| self.call_member(id, method::BIRTHS, Writer::new().finish(), self.options.election_timeout);
        let mut knows = false;
        for answer in futures_util::future::join_all(holders.into_iter().map(ask)).await {
            let Ok(Births { applied: up_to, births }) = answer.and_then(|body| read_births(&body)) else { continue };
            knows |= up_to >= applied;
            self.heard_births.lock().expect("nothing panics while it holds this lock").extend(births);
        }
        knows
    }

    /// Whether there may be groups beside the first. A witness does not know without asking.
    pub(crate) fn may_have_groups(&self) -> bool {
        self.is_witness() || !self.born().is_empty()
    }

    /// Names of the groups that were born, as far as this node has applied the first one.
    pub(crate) fn group_names(&self) -> Vec<String> {
        self.born().into_keys().collect()
    }

    /// The same with the number of each.
    pub(crate) fn group_numbers(&self) -> BTreeMap<String, GroupId> {
        self.born().into_iter().map(|(name, birth)| (name, birth.number)).collect()
    }

    /// The replicas here of those.
    pub(crate) fn groups_by_name(&self) -> BTreeMap<String, Arc<Self>> {
        let open = self.groups();
        let named = self.born().into_iter();
        named.filter_map(|(name, birth)| Some((name, open.get(&birth.number)?.clone()))).collect()
    }

    /// Waits until no group counts on the vote of a member that is a learner of the first one (P3).
    pub(crate) async fn await_groups_without(self: &Arc<Self>, id: u64, deadline: R::Instant) -> Result<()> {
        loop {
            let groups = self.groups_counting_on(id).await?;
            if groups.is_empty() {
                return Ok(());
            }
            if R::Instant::now() + LOOK >= deadline {
                let message =
                    format!("groups count on the member yet: the same call again goes on id={id} groups={groups:?}");
                return Err(Error::new(ErrorKind::Unavailable, message));
            }
            R::sleep(LOOK).await;
        }
    }

    /// The groups in which a member has a vote, or may have one.
    pub(crate) async fn groups_counting_on(self: &Arc<Self>, id: u64) -> Result<Vec<String>> {
        if self.is_witness() && !self.hear_of_births().await {
            return Err(Error::new(ErrorKind::Unavailable, "a witness has not heard of all groups yet"));
        }
        self.open_groups().await?;
        let mut counting = Vec::new();
        for (name, group) in self.groups_by_name() {
            // A replica that lags may not know yet that the member votes.
            let is_abreast =
                R::timeout(LOOK, group.read_barrier(ReadLevel::Linearizable)).await.is_ok_and(|r| r.is_ok());
            let votes = group.running().is_ok_and(|running| {
                Self::metrics_of(&running, |m| m.committed_membership_config.voter_ids().any(|voter| voter == id))
            });
            if votes || !is_abreast {
                counting.push(name);
            }
        }
        Ok(counting)
    }

    /// Gives birth to a group over the voters of now, or finds it.
    pub(crate) async fn create_group(self: &Arc<Self>, name: &str) -> Result<Arc<Self>> {
        self.check_first()?;
        keyspace_of(name, &BTreeSet::new())?;
        self.read_barrier(ReadLevel::Linearizable).await?;
        let born = self.born();
        if born.contains_key(name) {
            return self.open_group(name).await;
        }
        if born.len() >= GROUPS_MAX {
            let message = format!("a cluster has {GROUPS_MAX} groups beside the first at most");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let members = self.members();
        let voters =
            members.iter().filter(|member| member.role == MemberRole::Voter).map(|member| member.id.0).collect();
        let body = CommandBody::CreateKeyspace { name: keyspace_of(name, &voters)? };
        self.write(Write { body, durability: Durability::Quorum }).await?.response?;
        self.open_group(name).await
    }

    /// The replica here of a group that was born.
    pub(crate) async fn open_group(self: &Arc<Self>, name: &str) -> Result<Arc<Self>> {
        self.check_first()?;
        self.read_barrier(ReadLevel::Linearizable).await?;
        let born = self.born();
        let birth =
            born.get(name).ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no such group name={name}")))?;
        self.open_groups().await?;
        let open = self.groups().get(&birth.number).cloned();
        open.ok_or_else(|| Error::new(ErrorKind::Closed, "the node is closed"))
    }

    /// Opens the replicas of all groups that were born, and has them take part once this node is a member.
    pub(crate) async fn open_groups(self: &Arc<Self>) -> Result<()> {
        let closed = |_| Error::new(ErrorKind::Closed, "the node is closed");
        let _one = self.opening_groups.acquire().await.map_err(closed)?;
        for birth in self.born().into_values() {
            let number = birth.number;
            let open = self.groups().get(&number).cloned();
            let group = match open {
                Some(group) => group,
                None if self.closing.is_set() => return Ok(()),
                None => {
                    let options = NodeOptions {
                        group: GroupSettings { state_machine: None, ..self.options.group.clone() },
                        ..self.options.clone()
                    };
                    let found = self.found.lock().expect("nothing panics while it holds this lock").clone();
                    let transport = Arc::new(GroupTransport { host: Arc::downgrade(self), number });
                    let group = Self::open(self.engine.clone(), number, found, options, transport, Some(self)).await?;
                    self.groups().insert(number, group.clone());
                    let mut found = self.found.lock().expect("nothing panics while it holds this lock");
                    found.retain(|record| record.group != number);
                    group
                }
            };
            if self.phase() == Phase::Member && group.phase() == Phase::Waiting {
                group.begin_group(&birth).await?;
            }
        }
        Ok(())
    }

    async fn begin_group(self: &Arc<Self>, birth: &Birth) -> Result<()> {
        let unborn = self.log.is_pristine();
        match self.log.damage() {
            Some(damage) => self.start_log_healing(&damage),
            None => self.take_part().await?,
        }
        let Some(running) = self.running().ok().filter(|running| unborn && birth.voters.contains(&running.id)) else {
            return Ok(());
        };
        let first: BTreeMap<u64, Member> = birth.voters.iter().map(|id| (*id, Member::default())).collect();
        match running.raft.initialize(first).await {
            // Another voter of the first membership was faster.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(Error::new(ErrorKind::Internal, format!("the first membership was refused: {error}"))),
        }
    }

    /// Of the host: opens what is born, and ends all groups with it.
    pub(crate) async fn look_after_groups(self: &Arc<Self>) {
        let mut seen = None;
        loop {
            R::sleep(LOOK).await;
            match self.phase() {
                Phase::Member => {}
                Phase::Failed(_) | Phase::Twin(_) | Phase::Removed | Phase::Closed => return self.stop_groups().await,
                _ => continue,
            }
            if let Some(reason) = self.failed_group() {
                // Whoever looks after this process looks at the first group.
                self.leave_service(reason).await;
                continue;
            }
            let groups: Vec<Arc<Self>> = self.groups().values().cloned().collect();
            let now = if self.is_witness() { self.progress.applied() } else { self.group.applied() };
            // A witness that was not answered asks at the next look.
            let heard = !self.is_witness() || seen == Some(now) || self.hear_of_births().await;
            if seen != Some(now) || groups.iter().any(|group| group.phase() == Phase::Waiting) {
                seen = heard.then_some(now);
                if let Err(error) = self.open_groups().await
                    && !self.closing.is_set()
                {
                    self.leave_service(format!("a group cannot be opened: {error}")).await;
                }
            }
            for group in groups {
                group.follow_host(self).await;
            }
        }
    }

    fn failed_group(&self) -> Option<String> {
        self.groups_by_name().into_iter().find_map(|(name, group)| match group.phase() {
            Phase::Failed(reason) => Some(format!("a group has left service name={name}: {reason}")),
            _ => None,
        })
    }

    async fn stop_groups(&self) {
        let groups: Vec<Arc<Self>> = self.groups().values().cloned().collect();
        for group in groups {
            group.stop(self.phase()).await;
        }
    }

    fn followed(&self) -> MutexGuard<'_, Followed<R>> {
        self.followed.lock().expect("nothing panics while it holds this lock")
    }

    /// Of another group, at each look of its host: follows the first one's members while it leads.
    async fn follow_host(self: &Arc<Self>, host: &Arc<Self>) {
        let Ok(running) = self.running() else { return };
        let leads = running.metrics.borrow_watched().state == ServerState::Leader;
        if leads
            && !self.followed().at_work
            && let Some(step) = self.wanted_step(host, &running)
        {
            // It may take long, and others are looked at meanwhile.
            self.followed().at_work = true;
            let (this, running) = (self.clone(), running.clone());
            self.spawn(async move {
                if let Err(error) = this.change_by(&running, step).await {
                    tracing::debug!(group = this.number.0, %error, "the members are not those of the first group yet");
                }
                this.followed().at_work = false;
            });
        }
        let mut stuck = std::mem::take(&mut self.followed().stuck);
        self.relieve_followers(&running, &mut stuck).await;
        self.followed().stuck = stuck;
        self.unpin_idle();
    }

    /// See P3. At rest a comparison of where the two memberships stand.
    fn wanted_step(&self, host: &Self, running: &Running<R>) -> Option<Step> {
        let first = host.running().ok()?;
        let decided_at = Self::metrics_of(&first, |m| *m.committed_membership_config.log_id());
        let compared = (decided_at, Self::metrics_of(running, |m| *m.membership_config.log_id()));
        if self.followed().compared == Some(compared) {
            return None;
        }
        // Between two sets of voters those of both vote: what comes after counts.
        let members = Self::metrics_of(&first, |m| {
            let membership = m.committed_membership_config.membership();
            (membership.get_joint_config().len() == 1).then(|| members_of(membership))
        })?;
        let (step, learns) = {
            let metrics = running.metrics.borrow_watched();
            let membership = metrics.membership_config.membership();
            let step = next_step(membership, &members, &crate::membership::caught_up(&metrics, membership));
            (step, membership.nodes().count() != membership.voter_ids().count())
        };
        // A learner may catch up while neither changes.
        if step.is_none() && !learns {
            self.followed().compared = Some(compared);
        }
        step
    }

    async fn change_by(self: &Arc<Self>, running: &Arc<Running<R>>, step: Step) -> Result<()> {
        use openraft::ChangeMembers;
        let (change, retain) = match step {
            Step::Learners(nodes) => (ChangeMembers::AddNodes(nodes), true),
            Step::Known(nodes) => (ChangeMembers::SetNodes(nodes), true),
            Step::Voters(ids) => (ChangeMembers::ReplaceAllVoters(ids), true),
            Step::Gone(ids) => (ChangeMembers::RemoveNodes(ids), true),
        };
        self.change_members(running, change, retain).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn of_two_births_of_a_name_the_first_counts_and_what_is_no_birth_is_skipped() {
        let keyspace = |name: &str, voters: &[u64]| keyspace_of(name, &set(voters)).expect("short");
        let found = births(vec![
            (keyspace("b", &[1, 2, 70]), KeyspaceId(9)),
            ("default".into(), KeyspaceId(0)),
            (keyspace("a.b", &[1]), KeyspaceId(4)),
            (keyspace("b", &[1, 2, 3]), KeyspaceId(7)),
            (format!("{GROUP_KEYSPACE_PREFIX}x.y"), KeyspaceId(1)),
            (format!("{GROUP_KEYSPACE_PREFIX}1"), KeyspaceId(2)),
        ]);
        let birth = |number, voters: &[u64]| Birth { number: GroupId(number), voters: set(voters) };
        assert_eq!(found, [("a.b".to_owned(), birth(5, &[1])), ("b".to_owned(), birth(8, &[1, 2, 3]))].into());
    }

    #[test]
    fn names_of_groups_are_bounded() {
        let check = |name: &str, voters: &BTreeSet<u64>| keyspace_of(name, voters).map_err(|e| e.kind());
        assert!(check(&"n".repeat(GROUP_NAME_BYTES_MAX), &set(&[1, 2, 3])).is_ok());
        assert_eq!(check("", &set(&[1])), Err(ErrorKind::Invalid));
        assert_eq!(check(&"n".repeat(GROUP_NAME_BYTES_MAX + 1), &set(&[1])), Err(ErrorKind::Invalid));
        assert_eq!(check("n", &(u64::MAX - 64..u64::MAX).collect()), Err(ErrorKind::Invalid), "no name holds them");
    }

    #[test]
    fn every_step_from_the_members_of_a_group_to_those_of_the_first() {
        let member = |id: u64, role| {
            let mut info = members_of(&Membership::new_with_defaults(vec![set(&[id])], []))[0].clone();
            (info.name, info.role) = (format!("n{id}"), role);
            info
        };
        let host = |voters: &[u64], learners: &[u64]| -> Vec<MemberInfo> {
            let voters = voters.iter().map(|id| member(*id, MemberRole::Voter));
            voters.chain(learners.iter().map(|id| member(*id, MemberRole::Learner))).collect()
        };
        let known = |ids: &[u64]| -> BTreeMap<u64, Member> {
            ids.iter().map(|id| (*id, Member { name: format!("n{id}"), ..Member::default() })).collect()
        };
        let group = |configs: &[&[u64]], nodes: BTreeMap<u64, Member>| {
            Membership::new(configs.iter().map(|ids| set(ids)).collect(), nodes).expect("every voter has a node")
        };
        let blank: BTreeMap<u64, Member> = (1..=3).map(|id| (id, Member::default())).collect();
        let all = host(&[1, 2, 3], &[]);
        for (group, host, caught_up, expect) in [
            (group(&[&[1, 2, 3]], blank), all.clone(), set(&[1, 2, 3]), Some(Step::Known(known(&[1, 2, 3])))),
            (group(&[&[1, 2, 3]], known(&[1, 2, 3])), all.clone(), set(&[]), None),
            // One that came: first it learns.
            (
                group(&[&[1, 2, 3]], known(&[1, 2, 3])),
                host(&[1, 2, 3, 70], &[]),
                set(&[]),
                Some(Step::Learners(known(&[70]))),
            ),
            (group(&[&[1, 2, 3]], known(&[1, 2, 3, 70])), host(&[1, 2, 3, 70], &[]), set(&[1]), None),
            (
                group(&[&[1, 2, 3]], known(&[1, 2, 3, 70])),
                host(&[1, 2, 3, 70], &[]),
                set(&[1, 70]),
                Some(Step::Voters(set(&[1, 2, 3, 70]))),
            ),
            (group(&[&[1, 2, 3]], known(&[1, 2, 3, 70])), host(&[1, 2, 3], &[70]), set(&[1, 70]), None),
            // One that went.
            (group(&[&[1, 2, 3]], known(&[1, 2, 3])), host(&[1, 2], &[]), set(&[]), Some(Step::Voters(set(&[1, 2])))),
            (group(&[&[1, 2]], known(&[1, 2, 3])), host(&[1, 2], &[]), set(&[]), Some(Step::Gone(set(&[3])))),
            // A change that another leader left half done.
            (
                group(&[&[1, 2, 3], &[1, 2]], known(&[1, 2, 3])),
                host(&[1, 2], &[]),
                set(&[]),
                Some(Step::Voters(set(&[1, 2]))),
            ),
            // None of those that may vote has the log: nothing is given up.
            (group(&[&[1]], known(&[1, 70])), host(&[70], &[]), set(&[]), None),
            // One of them lacks it: who is to go stays until it has the log.
            (group(&[&[1, 2, 3]], known(&[1, 2, 3, 70])), host(&[1, 2, 70], &[3]), set(&[1, 2, 3]), None),
            (
                group(&[&[1, 2, 3]], known(&[1, 2, 3, 70])),
                host(&[1, 2, 70], &[3]),
                set(&[1, 70]),
                Some(Step::Voters(set(&[1, 2, 70]))),
            ),
            (group(&[&[1, 2, 3]], known(&[1, 2, 3, 70, 71])), host(&[1, 2, 3, 70, 71], &[]), set(&[1, 70]), None),
        ] {
            assert_eq!(next_step(&group, &host, &caught_up), expect, "{group:?} {host:?} {caught_up:?}");
        }
    }

    #[test]
    fn what_is_known_of_groups_survives_the_wire() {
        let birth = |number, voters: &[u64]| Birth { number: GroupId(number), voters: set(voters) };
        let births: BTreeMap<_, _> = [("a".to_owned(), birth(5, &[1, 2, 3])), ("b".to_owned(), birth(8, &[]))].into();
        let sent = Births { applied: 7, births: births.clone() };
        let body = crate::wire::encode_result(Ok(()), |out, ()| sent.write(out));
        let read = read_births(&body).expect("ours");
        assert_eq!((read.applied, read.births), (7, births));
        for hostile in [(u32::MAX, 0), (1, u32::MAX)] {
            let body = crate::wire::encode_result(Ok(()), |out, ()| {
                out.u64(7).u32(hostile.0).u64(5).string("a").u32(hostile.1);
            });
            assert_eq!(read_births(&body).map(|_| ()).map_err(|e| e.kind()), Err(ErrorKind::Corrupt));
        }
    }

    #[test]
    fn a_request_for_a_group_survives_the_wire() {
        let (number, request) = read_grouped(&encode_grouped(7, method::VOTE, b"body")).expect("ours");
        assert_eq!((number, request.method, request.body.as_ref()), (GroupId(7), method::VOTE, b"body".as_slice()));
        assert!(read_grouped(&bytes::Bytes::from_static(b"?")).is_err());
    }
}
