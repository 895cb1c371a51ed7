//! Who takes part: joining, adding, promoting, removing, handing leadership over.
//!
//! # Invariants
//! - M1. The leader changes the membership, one change at a time; others pass requests on to it, once.
//! - M2. A voter is replaced by adding first: the new volume becomes a learner, catches up, and one joint change puts it
//!   in the place of the old id. Never the other way round, which would leave a smaller quorum meanwhile.
//! - M3. A wiped volume is let in by its name only when the former bearer of the name does not answer.
//! - M4. An id is given to the volume that answers then, and the next one not before that. So of the ids of one name the largest
//!   belongs to the newest volume, whatever request was late.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::Identity;
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft_rt::{Instant, Select2};

use crate::network::method;
use crate::node::{INIT_IDS, Inner, Phase, Running};
use crate::priority;
use crate::types::{Member, Membership, TypeConfig, members_ahead, members_of};
use crate::wire::{MEMBERS_MAX, NAME_BYTES_MAX, Reader, Writer, decode_result};
use crate::{Envelope, Error, ErrorKind, Hello, MemberInfo, MemberRole, NodeId, PeerAddress, Result, Runtime};

/// How long a change of the membership may take, a learner's catching up included.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a node that passed such a request on waits for the answer.
const CHANGE_CALL_TIMEOUT: Duration = Duration::from_secs(65);
/// How long a member is asked whether it lives.
const ALIVE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a hand-over may take until this node sees another leader.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(5);
/// Entries that a learner may lack and still be promoted.
const CAUGHT_UP_ENTRIES: u64 = 64;
/// How long a member has to be elsewhere before that is written into the membership: the process with a copy of its volume may be
/// there, and its own one about to start.
const MOVED: Duration = Duration::from_secs(5);
const RETRY_PAUSE: Duration = Duration::from_millis(50);
const JOIN_PAUSE_MIN: Duration = Duration::from_millis(100);
const JOIN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// A request to the leader.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    Add { name: String, address: String, voter: bool },
    Promote(u64),
    Update { id: u64, address: String },
    Remove(u64),
    Transfer(Option<u64>),
    Site { id: u64, site: String },
    Priority { id: u64, priority: u8 },
    Finalize,
}

impl Change {
    fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        match self {
            Self::Add { name, address, voter } => out.u8(1).string(name).string(address).bool(*voter),
            Self::Promote(id) => out.u8(2).u64(*id),
            Self::Update { id, address } => out.u8(3).u64(*id).string(address),
            Self::Remove(id) => out.u8(4).u64(*id),
            Self::Transfer(to) => out.u8(5).option(*to, |w, id| {
                w.u64(id);
            }),
            Self::Site { id, site } => out.u8(6).u64(*id).string(site),
            Self::Priority { id, priority } => out.u8(7).u64(*id).u8(*priority),
            Self::Finalize => out.u8(8),
        };
        out.finish()
    }

    pub(crate) fn decode(bytes: &Bytes) -> Result<Self> {
        let mut reader = Reader::open(bytes)?;
        let change = match reader.u8()? {
            1 => Self::Add { name: reader.string()?, address: reader.string()?, voter: reader.bool()? },
            2 => Self::Promote(reader.u64()?),
            3 => Self::Update { id: reader.u64()?, address: reader.string()? },
            4 => Self::Remove(reader.u64()?),
            5 => Self::Transfer(reader.option(Reader::u64)?),
            6 => Self::Site { id: reader.u64()?, site: reader.string()? },
            7 => Self::Priority { id: reader.u64()?, priority: reader.u8()? },
            8 => Self::Finalize,
            other => return Err(Error::new(ErrorKind::Unsupported, format!("no such change change={other}"))),
        };
        reader.end()?;
        Ok(change)
    }
}

/// What a node says of itself and its cluster to whoever asks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Who {
    pub(crate) member: Member,
    pub(crate) cluster: [u8; 16],
    pub(crate) node: u64,
    /// Drawn at the start of the process: tells it from another with a copy of its volume.
    pub(crate) opening: [u8; 16],
    pub(crate) blank: bool,
    pub(crate) members: Vec<MemberInfo>,
    pub(crate) leader: Option<u64>,
    /// It leads, and a quorum has just confirmed that: its list of members is the truth.
    pub(crate) confirmed: bool,
}

impl Who {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.member(&self.member)
            .id(&self.cluster)
            .u64(self.node)
            .id(&self.opening)
            .bool(self.blank)
            .member_infos(&self.members);
        out.option(self.leader, |w, id| {
            w.u64(id);
        });
        out.bool(self.confirmed);
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        Ok(Self {
            member: reader.member()?,
            cluster: reader.id()?,
            node: reader.u64()?,
            opening: reader.id()?,
            blank: reader.bool()?,
            members: reader.member_infos()?,
            leader: reader.option(Reader::u64)?,
            confirmed: reader.bool()?,
        })
    }
}

/// The next change that puts new volumes in the place of wiped ones: the voters to have, and the learners to drop. A
/// learner stands for a voter when it bears its name. A learner that is `counted` on stays: a group beside the first has it as a voter
/// still. A joint configuration that a leader before this one left is ended. Pure, so that a table of cases tests it.
fn replacement(
    membership: &Membership,
    caught_up: &BTreeSet<u64>,
    counted: &BTreeSet<u64>,
) -> Option<(BTreeSet<u64>, BTreeSet<u64>)> {
    let members = members_ahead(membership);
    // Ids grow, so the largest of a name is the newest volume of that name.
    let mut newest: BTreeMap<&str, u64> = BTreeMap::new();
    for member in &members {
        let id = newest.entry(&member.name).or_default();
        *id = (*id).max(member.id.0);
    }
    let mut voters = BTreeSet::new();
    let mut dropped = BTreeSet::new();
    let mut change = membership.get_joint_config().len() > 1;
    for member in &members {
        let new = newest[member.name.as_str()];
        let replaced = member.id.0 != new && caught_up.contains(&new);
        match (member.role, replaced) {
            (MemberRole::Voter, true) => {
                voters.insert(new);
                change = true;
            }
            (MemberRole::Voter, false) => {
                voters.insert(member.id.0);
            }
            (MemberRole::Learner, true) if !counted.contains(&member.id.0) => {
                dropped.insert(member.id.0);
                change = true;
            }
            (MemberRole::Learner, _) => {}
        }
    }
    change.then_some((voters, dropped))
}

impl<R: Runtime> Inner<R> {
    pub(crate) async fn add_member(
        self: &Arc<Self>,
        name: &str,
        address: PeerAddress,
        voter: bool,
    ) -> Result<MemberInfo> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || address.0.is_empty() || address.0.len() > NAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::Invalid, "a name and an address have 1 to 255 bytes"));
        }
        let change = Change::Add { name: name.into(), address: address.0, voter };
        let mut infos = self.change(change).await?;
        infos.pop().ok_or_else(|| Error::new(ErrorKind::Internal, "the leader named no member"))
    }

    pub(crate) async fn promote_member(self: &Arc<Self>, id: NodeId) -> Result<()> {
        self.change(Change::Promote(id.0)).await.map(|_| ())
    }

    pub(crate) async fn update_member(self: &Arc<Self>, id: NodeId, address: PeerAddress) -> Result<()> {
        if address.0.is_empty() || address.0.len() > NAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::Invalid, "an address has 1 to 255 bytes"));
        }
        self.change(Change::Update { id: id.0, address: address.0 }).await.map(|_| ())
    }

    pub(crate) async fn set_member_site(self: &Arc<Self>, id: NodeId, site: &str) -> Result<()> {
        if site.len() > NAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::Invalid, "the label of a site has at most 255 bytes"));
        }
        self.change(Change::Site { id: id.0, site: site.into() }).await.map(|_| ())
    }

    pub(crate) async fn set_member_priority(self: &Arc<Self>, id: NodeId, priority: u8) -> Result<()> {
        self.change(Change::Priority { id: id.0, priority }).await.map(|_| ())
    }

    /// Has the leader raise the version of the cluster, and says which it is.
    pub(crate) async fn finalize(self: &Arc<Self>) -> Result<u16> {
        let members = self.change(Change::Finalize).await?;
        Ok(crate::version::of_all(members.iter().map(|m| m.version)))
    }

    pub(crate) async fn remove_member(self: &Arc<Self>, id: NodeId) -> Result<()> {
        self.change(Change::Remove(id.0)).await.map(|_| ())
    }

    pub(crate) async fn transfer_leader(self: &Arc<Self>, to: Option<NodeId>) -> Result<NodeId> {
        let infos = self.change(Change::Transfer(to.map(|id| id.0))).await?;
        let leader =
            infos.first().map(|i| i.id).ok_or_else(|| Error::new(ErrorKind::Internal, "no leader was named"))?;
        let running = self.running()?;
        let mut metrics = running.metrics.clone();
        let seen = metrics.wait_until(|m| m.current_leader == Some(leader.0));
        match R::timeout(TRANSFER_TIMEOUT, seen).await {
            Ok(Ok(_)) => Ok(leader),
            _ => Err(Error::new(ErrorKind::Unavailable, "leadership moved, and this node has not seen it yet")),
        }
    }

    /// Has the leader do it: here, or with one message (M1).
    async fn change(self: &Arc<Self>, change: Change) -> Result<Vec<MemberInfo>> {
        let deadline = R::Instant::now() + CHANGE_TIMEOUT;
        loop {
            let running = self.running()?;
            let result = match self.leader_of(&running) {
                Some(id) if id == running.id => self.execute(&running, change.clone()).await,
                Some(id) => {
                    let answer =
                        self.call_member(NodeId(id), method::MEMBER, change.encode(), CHANGE_CALL_TIMEOUT).await;
                    answer.and_then(|bytes| decode_result(&bytes, Reader::member_infos))
                }
                None => Err(self.not_leader(&running)),
            };
            match result {
                Err(e) if matches!(e.kind(), ErrorKind::NotLeader) => {
                    if R::Instant::now() + RETRY_PAUSE >= deadline {
                        return Err(Error::new(ErrorKind::Unavailable, "no leader was found in time"));
                    }
                }
                other => return other,
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    pub(crate) async fn serve_member_change(self: &Arc<Self>, body: &Bytes) -> Result<Vec<MemberInfo>> {
        let change = Change::decode(body)?;
        let running = self.running()?;
        self.execute(&running, change).await
    }

    async fn execute(self: &Arc<Self>, running: &Arc<Running<R>>, change: Change) -> Result<Vec<MemberInfo>> {
        if !matches!(change, Change::Transfer(_)) {
            self.check_first()?;
        }
        if self.leader_of(running) != Some(running.id) {
            return Err(self.not_leader(running));
        }
        let known = |id: u64| {
            self.member(NodeId(id)).ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no such member id={id}")))
        };
        match change {
            Change::Add { name, address, voter } => {
                let id = self.add(running, &name, &address).await?;
                if voter {
                    self.promote(running, id).await?;
                }
                Ok(vec![known(id)?])
            }
            Change::Promote(id) => {
                known(id)?;
                self.promote(running, id).await?;
                Ok(vec![known(id)?])
            }
            Change::Update { id, address } => {
                let member = Member { peer_address: address, ..Member::from(&known(id)?) };
                self.change_members(running, ChangeMembers::SetNodes(BTreeMap::from([(id, member)])), true).await?;
                Ok(vec![known(id)?])
            }
            Change::Site { id, site } => {
                let member = Member { site, ..Member::from(&known(id)?) };
                self.change_members(running, ChangeMembers::SetNodes(BTreeMap::from([(id, member)])), true).await?;
                Ok(vec![known(id)?])
            }
            Change::Priority { id, priority } => {
                let member = Member { priority, ..Member::from(&known(id)?) };
                self.change_members(running, ChangeMembers::SetNodes(BTreeMap::from([(id, member)])), true).await?;
                Ok(vec![known(id)?])
            }
            Change::Finalize => self.raise_version(running).await,
            Change::Remove(id) => {
                let info = known(id)?;
                let voters = self.members().iter().filter(|m| m.role == MemberRole::Voter).count();
                if info.role == MemberRole::Voter && voters == 1 {
                    return Err(Error::new(ErrorKind::Invalid, "the last voter cannot be removed"));
                }
                let ids = BTreeSet::from([id]);
                let has_groups = self.may_have_groups();
                if has_groups {
                    self.let_go_of(running, &info).await?;
                }
                let votes = info.role == MemberRole::Voter && !has_groups;
                let change = if votes { ChangeMembers::RemoveVoters(ids) } else { ChangeMembers::RemoveNodes(ids) };
                self.change_members(running, change, false).await?;
                Ok(vec![info])
            }
            Change::Transfer(to) => {
                let closed = |_| Error::new(ErrorKind::Closed, "the node is closed");
                let _one = self.handing_over.acquire().await.map_err(closed)?;
                // A hand-over by priority may have gone before: the wish is the new leader's to fulfil then.
                if self.leader_of(running) != Some(running.id) {
                    return Err(self.not_leader(running));
                }
                let to = self.hand_over(running, to).await?;
                Ok(vec![known(to)?])
            }
        }
    }

    /// Takes its vote from a member that is about to be removed, here and in all other groups: who is a member no more is wiped, and a
    /// group that counted on it would have lost a vote for good.
    async fn let_go_of(self: &Arc<Self>, running: &Arc<Running<R>>, info: &MemberInfo) -> Result<()> {
        let id = info.id.0;
        if info.role == MemberRole::Voter && id == running.id {
            // A learner leads nothing: another goes on with this.
            let _one =
                self.handing_over.acquire().await.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))?;
            self.hand_over(running, None).await?;
            return Err(self.not_leader(running));
        }
        if info.role == MemberRole::Voter {
            self.change_members(running, ChangeMembers::RemoveVoters(BTreeSet::from([id])), true).await?;
        }
        self.await_groups_without(id, R::Instant::now() + CHANGE_TIMEOUT).await
    }

    /// Makes a process a learner and tells it; again for one that is a member gives its id.
    async fn add(self: &Arc<Self>, running: &Arc<Running<R>>, name: &str, address: &str) -> Result<u64> {
        let address = PeerAddress(address.into());
        let answer = self.call_address(&address, method::WHO, Writer::new().finish()).await;
        let who = answer.and_then(|bytes| decode_result(&bytes, Who::read)).map_err(|e| {
            Error::new(ErrorKind::Unavailable, format!("the process to add does not answer name={name}: {e}"))
        })?;
        if who.member.name != name {
            let found = &who.member.name;
            return Err(Error::new(ErrorKind::Invalid, format!("another name answers name={name} found={found}")));
        }
        let identity = self.engine.identity();
        if who.cluster == identity.cluster && self.member(NodeId(who.node)).is_some() {
            return Ok(who.node);
        }
        if who.cluster != [0; 16] {
            return Err(Error::new(ErrorKind::Foreign, format!("it belongs to another cluster name={name}")));
        }
        if !who.blank {
            return Err(Error::new(ErrorKind::Invalid, format!("its volume holds data name={name}")));
        }
        let mut member = who.member;
        member.peer_address = address.0.clone();
        let node = self.admit(running, member.clone()).await?;
        let mut body = Writer::new();
        body.id(&identity.cluster).u64(node).id(&member.incarnation);
        let answer = self.call_address(&address, method::ADOPT, body.finish()).await;
        if let Err(error) = answer.and_then(|bytes| decode_result(&bytes, |_| Ok(()))) {
            // It asks for itself as well, since it waits to join.
            tracing::info!(%error, name, "a new member was not told yet");
        }
        Ok(node)
    }

    /// Gives a volume an id of its own and makes it a learner (I2).
    async fn admit(self: &Arc<Self>, running: &Arc<Running<R>>, member: Member) -> Result<u64> {
        let _one = self.changing.acquire().await.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))?;
        let members = self.members();
        if let Some(known) = members.iter().find(|m| m.incarnation == member.incarnation && m.name == member.name) {
            return Ok(known.id.0);
        }
        if members.len() >= MEMBERS_MAX {
            return Err(Error::new(ErrorKind::Invalid, format!("a cluster has {MEMBERS_MAX} members at most")));
        }
        // The request may be older than the volume that sits there by now.
        let address = PeerAddress(member.peer_address.clone());
        let answer = self.call_address(&address, method::WHO, Writer::new().finish()).await;
        let who = answer.and_then(|bytes| decode_result(&bytes, Who::read)).map_err(|e| {
            let message = format!("the volume to let in does not answer name={}: {e}", member.name);
            Error::new(ErrorKind::Unavailable, message)
        })?;
        if who.member.incarnation != member.incarnation {
            let message = format!("another volume is there by now name={}", member.name);
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        self.check_reads(running, &member).await?;
        let reserved = running.raft.write_blank().await.map_err(|e| change_error(&e))?;
        let id = INIT_IDS + reserved.log_id.index;
        self.change_members_locked(running, ChangeMembers::AddNodes(BTreeMap::from([(id, member)])), true).await?;
        Ok(id)
    }

    async fn promote(self: &Arc<Self>, running: &Arc<Running<R>>, id: u64) -> Result<()> {
        if self.member(NodeId(id)).is_some_and(|m| m.role == MemberRole::Voter) {
            return Ok(());
        }
        let mut metrics = running.metrics.clone();
        let caught_up = metrics
            .wait_until(|m| m.replication.is_none() || lag_of(m, id).is_some_and(|lag| lag <= CAUGHT_UP_ENTRIES));
        if R::timeout(CHANGE_TIMEOUT, caught_up).await.is_err() {
            return Err(Error::new(ErrorKind::Unavailable, format!("the learner does not catch up id={id}")));
        }
        self.change_members(running, ChangeMembers::AddVoterIds(BTreeSet::from([id])), true).await
    }

    pub(crate) async fn change_members(
        self: &Arc<Self>,
        running: &Arc<Running<R>>,
        change: ChangeMembers<u64, Member>,
        retain: bool,
    ) -> Result<()> {
        let _one = self.changing.acquire().await.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))?;
        self.change_members_locked(running, change, retain).await
    }

    /// The caller holds `changing`. Tries again while another change is under way or the lease is not there yet
    /// (pitfall 4).
    pub(crate) async fn change_members_locked(
        &self,
        running: &Arc<Running<R>>,
        change: ChangeMembers<u64, Member>,
        retain: bool,
    ) -> Result<()> {
        check_witnesses(running.metrics.borrow_watched().membership_config.membership(), &change)?;
        let deadline = R::Instant::now() + CHANGE_TIMEOUT;
        let me = running.id;
        loop {
            // One that was removed leads until it has heard that this is committed. What it proposed yet openraft cannot carry out.
            let votes = running.raft.with_raft_state(move |state| {
                let members = state.membership_state.effective();
                members.voter_ids().any(|id| id == me)
            });
            if !votes.await.map_err(|e| crate::service::raft_error(&e))? {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "this leader was removed: another one changes the members",
                ));
            }
            self.awaken(running).await;
            let kept = self.keeping_version(running, change.clone());
            let attempt = R::timeout_at(deadline, running.raft.change_membership(kept, retain));
            let answer = match R::select2(std::pin::pin!(attempt), std::pin::pin!(self.removed_here())).await {
                Select2::First(answer) => answer,
                // The others have elected one of them before this leader heard that its last change is committed, and tell it
                // nothing any more.
                Select2::Second(()) if removes(&change, running.id) => return Ok(()),
                Select2::Second(()) => {
                    return Err(Error::new(
                        ErrorKind::Indeterminate,
                        "this node was removed before the change was done",
                    ));
                }
            };
            let error = match answer {
                Ok(Ok(done)) => {
                    // Whoever asks for the members next is told of it, unless it ended this replica.
                    let mut metrics = running.metrics.clone();
                    let shown =
                        metrics.wait_until(|m| m.committed_membership_config.log_id().as_ref() >= Some(&done.log_id));
                    let _ = R::timeout_at(deadline, shown).await;
                    return Ok(());
                }
                Ok(Err(error)) => error,
                Err(_) => {
                    return Err(Error::new(ErrorKind::Indeterminate, "the membership was not changed in time"));
                }
            };
            let again = match &error {
                RaftError::APIError(ClientWriteError::ForwardToLeader(f)) => {
                    f.leader_id.is_none() || f.leader_id == Some(running.id)
                }
                RaftError::APIError(ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_),
                )) => true,
                _ => false,
            };
            if !again || R::Instant::now() + RETRY_PAUSE >= deadline {
                return Err(change_error(&error));
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    /// Resolves when this node finds that it is no member any more.
    async fn removed_here(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.phase() == Phase::Removed {
                return;
            }
            changed.await;
        }
    }

    /// Hands leadership to `to`, or to the voter that [`priority::heir`] names, and waits until it is seen.
    pub(crate) async fn hand_over(&self, running: &Arc<Running<R>>, to: Option<u64>) -> Result<u64> {
        let mut heirs = self.heirs(running);
        match to {
            Some(to) if to == running.id => return Ok(to),
            Some(to) if heirs.iter().all(|heir| heir.id != to) => {
                return Err(Error::new(ErrorKind::NotFound, format!("no such voter id={to}")));
            }
            _ => {}
        }
        let deadline = R::Instant::now() + TRANSFER_TIMEOUT;
        loop {
            let to = to.or_else(|| priority::heir(&heirs));
            let to = to.ok_or_else(|| Error::new(ErrorKind::Invalid, "there is no other voter"))?;
            heirs.iter_mut().filter(|heir| heir.id == to).for_each(|heir| heir.told += 1);
            running.raft.trigger().transfer_leader(to).await.map_err(|e| crate::service::raft_error(&e))?;
            let mut metrics = running.metrics.clone();
            let me = running.id;
            let moved = metrics.wait_until(move |m| m.current_leader.is_some_and(|l| l != me));
            // A target that was behind refuses; told again once it has caught up, or another is where any will do.
            let part = (R::Instant::now() + self.options.election_timeout * 2).min(deadline);
            if let Ok(Ok(seen)) = R::timeout_at(part, moved).await {
                return Ok(seen.current_leader.expect("waited for"));
            }
            if R::Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::Unavailable, format!("leadership was not taken over id={to}")));
            }
        }
    }

    /// Answers a volume without an identity that looks for the cluster that knows its name.
    pub(crate) async fn serve_join(self: &Arc<Self>, member: Member, forwarded: bool) -> Result<([u8; 16], u64)> {
        let running = self.running()?;
        let leader = self.leader_of(&running);
        if leader != Some(running.id) {
            let Some(leader) = leader.filter(|_| !forwarded) else { return Err(self.not_leader(&running)) };
            let mut body = Writer::new();
            body.member(&member).bool(true);
            let answer = self.call_member(NodeId(leader), method::JOIN, body.finish(), CHANGE_TIMEOUT).await?;
            return decode_result(&answer, |r| Ok((r.id()?, r.u64()?)));
        }
        let cluster = self.engine.identity().cluster;
        let namesakes: Vec<_> = self.members().into_iter().filter(|m| m.name == member.name).collect();
        if namesakes.is_empty() {
            let message = format!("no member has this name: add it first name={}", member.name);
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        if let Some(known) =
            namesakes.iter().find(|m| m.incarnation == member.incarnation || mainstay_io::mutant!(SameIdAfterWipe))
        {
            return Ok((cluster, known.id.0));
        }
        for other in &namesakes {
            let request = Envelope { method: method::WHO, body: Writer::new().finish() };
            let call = self.transport.call(other.peer_address.clone(), Some(other.id), request, ALIVE_TIMEOUT);
            if other.id.0 == running.id || call.await.is_ok() {
                let message = format!("a member of this name is alive name={} id={}", other.name, other.id);
                return Err(Error::new(ErrorKind::Foreign, message));
            }
        }
        tracing::warn!(name = %member.name, "a member comes back with another volume: it joins under a new id");
        let node = self.admit(&running, member).await?;
        Ok((cluster, node))
    }

    /// Looks for a cluster that knows this name, until there is an identity.
    pub(crate) fn start_join_task(self: &Arc<Self>) {
        let this = self.clone();
        self.spawn(async move {
            let mut pause = JOIN_PAUSE_MIN;
            while this.phase() == Phase::Waiting {
                for (name, address) in &this.options.peers {
                    if *name == this.options.name || this.phase() != Phase::Waiting {
                        continue;
                    }
                    let mut body = Writer::new();
                    body.member(&this.me()).bool(false);
                    let answer = this.call_address(address, method::JOIN, body.finish()).await;
                    match answer.and_then(|bytes| decode_result(&bytes, |r| Ok((r.id()?, r.u64()?)))) {
                        Ok((cluster, node)) => {
                            if this.has_data() {
                                tracing::error!(
                                    "a cluster knows this name, but the volume holds data of a store alone"
                                );
                            } else if let Err(error) = this.adopt(Identity { cluster, node }).await {
                                tracing::error!(%error, "cannot take on an identity");
                            }
                        }
                        Err(error) => tracing::debug!(peer = %name, %error, "not let in"),
                    }
                }
                R::sleep(pause).await;
                pause = (pause * 2).min(JOIN_PAUSE_MAX);
            }
        });
    }

    pub(crate) async fn who(self: &Arc<Self>, from: &Hello) -> Result<Who> {
        let identity = self.engine.identity();
        let mut who = Who {
            member: self.me(),
            cluster: identity.cluster,
            node: identity.node,
            opening: self.opening,
            blank: identity == Identity::default() && !self.has_data(),
            members: Vec::new(),
            leader: None,
            confirmed: false,
        };
        // Strangers learn nothing of the cluster.
        if let Ok(running) = self.running()
            && from.cluster == identity.cluster
        {
            who.leader = self.leader_of(&running);
            if who.leader == Some(running.id) && from.node.0 != running.id {
                who.confirmed = self.leader_read_index(false).await.is_ok();
            }
            // Without a leader a node that restarted may know of no membership that is committed.
            who.members = if who.confirmed {
                let metrics = running.metrics.borrow_watched();
                members_of(metrics.committed_membership_config.membership())
            } else {
                self.members()
            };
            for member in &mut who.members {
                member.peer_address = self.address_of(member);
            }
        }
        Ok(who)
    }

    /// Asks around whether this node is still a member; `true` when the leader says that it is not.
    pub(crate) async fn is_given_up(self: &Arc<Self>, me: u64) -> bool {
        self.confirmed_members(me).await.is_some_and(|members| gives_up(&members, me))
    }

    /// The members as a leader names them that has just been confirmed by a quorum. Asks around for it.
    pub(crate) async fn confirmed_members(self: &Arc<Self>, me: u64) -> Option<Vec<MemberInfo>> {
        let mut asked: BTreeSet<PeerAddress> = BTreeSet::new();
        let mine = self.transport.local_address();
        let known = self.members().into_iter().filter(|m| m.id.0 != me).map(|m| m.peer_address);
        let mut todo: Vec<PeerAddress> = self.options.peers.values().cloned().chain(known).collect();
        while let Some(address) = todo.pop() {
            if address == mine || asked.len() > 2 * MEMBERS_MAX || !asked.insert(address.clone()) {
                continue;
            }
            let answer = self.call_address(&address, method::WHO, Writer::new().finish()).await;
            let Ok(who) = answer.and_then(|bytes| decode_result(&bytes, Who::read)) else { continue };
            if who.cluster != self.engine.identity().cluster {
                continue;
            }
            if who.confirmed {
                return Some(who.members);
            }
            // It may have heard where members are that came back elsewhere, and a handshake with them tells the transport. The leader
            // comes first.
            let (leader, others): (Vec<_>, _) = who.members.into_iter().partition(|m| Some(m.id.0) == who.leader);
            todo.extend(others.into_iter().chain(leader).map(|m| m.peer_address));
        }
        None
    }

    /// True for an id that the cluster has given up.
    pub(crate) fn was_removed(&self, id: NodeId) -> bool {
        if let Some(host) = self.host() {
            return host.was_removed(id);
        }
        if self.removed.lock().expect("nothing panics while it holds this lock").contains(&id.0) {
            return true;
        }
        // Ids of `init` were all in the first membership: one that is not there any more was removed. Any other is named after an
        // entry, and a change of the membership behind that entry made it a member.
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        let at = match running {
            Some(running) => Self::metrics_of(&running, |m| *m.membership_config.log_id()),
            None => *self.log.membership().log_id(),
        };
        at.is_some_and(|at| id.0 <= INIT_IDS || id.0 - INIT_IDS < at.index) && self.member(id).is_none()
    }

    /// Notes where a member is that says so in its hello, while the membership says otherwise.
    pub(crate) fn note_address(&self, hello: &Hello) {
        let Some(member) = self.member(hello.node).filter(|_| hello.node.0 != self.engine.identity().node) else {
            return;
        };
        let mut moved = self.moved.lock().expect("nothing panics while it holds this lock");
        if member.peer_address == hello.peer_address {
            moved.remove(&hello.node.0);
        } else if moved.get(&hello.node.0).is_none_or(|(address, _)| *address != hello.peer_address) {
            moved.insert(hello.node.0, (hello.peer_address.clone(), R::Instant::now()));
        }
    }

    /// Where a member listens, as far as this node knows.
    fn address_of(&self, member: &MemberInfo) -> PeerAddress {
        if member.id.0 == self.engine.identity().node {
            return self.transport.local_address();
        }
        let moved = self.moved.lock().expect("nothing panics while it holds this lock");
        moved.get(&member.id.0).map_or_else(|| member.peer_address.clone(), |(address, _)| address.clone())
    }

    /// Writes into the membership where a member is that came back elsewhere, so that all find it, also those that start later.
    /// Not while another process answers as it at the old address.
    pub(crate) async fn mind_addresses(self: &Arc<Self>, running: &Arc<Running<R>>) {
        let Some((member, address)) = self.moved_member(running) else { return };
        let who = async |address: &PeerAddress, expect| {
            let request = Envelope { method: method::WHO, body: Writer::new().finish() };
            let answer = self.transport.call(address.clone(), expect, request, ALIVE_TIMEOUT).await?;
            decode_result(&answer.body, Who::read)
        };
        let found = if member.id.0 == running.id {
            self.me()
        } else {
            let (cluster, node) = (self.engine.identity().cluster, member.id.0);
            if who(&member.peer_address, None).await.is_ok_and(|w| (w.cluster, w.node) == (cluster, node)) {
                return;
            }
            match who(&address, Some(member.id)).await {
                Ok(who) if who.member.peer_address == address.0 => who.member,
                _ => return,
            }
        };
        let moved =
            Member { peer_address: found.peer_address, client_address: found.client_address, ..Member::from(&member) };
        let change = ChangeMembers::SetNodes(BTreeMap::from([(member.id.0, moved)]));
        match self.change_members(running, change, true).await {
            Ok(()) => tracing::info!(id = %member.id, address = address.0, "a member is elsewhere"),
            Err(error) => tracing::warn!(%error, id = %member.id, "the address of a member is not changed yet"),
        }
    }

    /// A member that has been elsewhere for some time, and where.
    fn moved_member(&self, running: &Running<R>) -> Option<(MemberInfo, PeerAddress)> {
        let settled = |id: u64| {
            let moved = self.moved.lock().expect("nothing panics while it holds this lock");
            moved.get(&id).is_some_and(|(_, since)| since.elapsed() >= MOVED)
        };
        self.members().into_iter().find_map(|member| {
            let address = self.address_of(&member);
            let moved = address != member.peer_address && (member.id.0 == running.id || settled(member.id.0));
            moved.then_some((member, address))
        })
    }

    /// Puts caught-up volumes in the place of wiped ones of the same name, once no other change is under way.
    pub(crate) async fn reconcile(self: &Arc<Self>, running: &Arc<Running<R>>) {
        let Ok(_one) = self.changing.try_acquire() else { return };
        let plan = |counted: &BTreeSet<u64>| {
            let metrics = running.metrics.borrow_watched();
            let membership = metrics.membership_config.membership();
            replacement(membership, &caught_up(&metrics, membership), counted)
        };
        let Some((mut voters, mut dropped)) = plan(&BTreeSet::new()) else { return };
        // Groups follow: they let go of a member once it is a learner, and only then is it none.
        let has_groups = self.may_have_groups();
        if has_groups && !dropped.is_empty() {
            let mut counted = BTreeSet::new();
            for id in dropped {
                if !self.groups_counting_on(id).await.is_ok_and(|groups| groups.is_empty()) {
                    counted.insert(id);
                }
            }
            let Some(planned) = plan(&counted) else { return };
            (voters, dropped) = planned;
        }
        let change =
            ChangeMembers::Batch(vec![ChangeMembers::RemoveNodes(dropped), ChangeMembers::ReplaceAllVoters(voters)]);
        match self.change_members_locked(running, change, has_groups).await {
            Ok(()) => tracing::info!("the members are what was planned: new volumes stand for wiped ones"),
            Err(error) => tracing::warn!(%error, "a wiped member is not replaced yet"),
        }
    }
}

/// Members that lack next to nothing, as the leader sees it.
pub(crate) fn caught_up<R: Runtime>(
    metrics: &openraft::RaftMetrics<TypeConfig<R>>,
    membership: &Membership,
) -> BTreeSet<u64> {
    let near = |id: &u64| lag_of(metrics, *id).is_some_and(|lag| lag <= CAUGHT_UP_ENTRIES);
    membership.nodes().map(|(id, _)| *id).filter(near).collect()
}

/// Entries that a member lacks, as the leader sees it; `None` before it has heard from it.
pub(crate) fn lag_of<R: Runtime>(metrics: &openraft::RaftMetrics<TypeConfig<R>>, id: u64) -> Option<u64> {
    let matched = metrics.replication.as_ref()?.get(&id)?.as_ref()?;
    Some(metrics.last_log_index?.saturating_sub(matched.index))
}

fn change_error<R: Runtime>(error: &RaftError<TypeConfig<R>, ClientWriteError<TypeConfig<R>>>) -> Error {
    let kind = match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => ErrorKind::NotLeader,
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) | RaftError::Fatal(_) => ErrorKind::Indeterminate,
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_),
        )) => ErrorKind::Unavailable,
        RaftError::APIError(_) => ErrorKind::Invalid,
    };
    Error::new(kind, format!("the membership was not changed: {error}"))
}

/// Decodes arbitrary bytes as a request to change the membership, for the fuzzer.
pub(crate) fn decode_any(bytes: &Bytes) {
    let _ = Change::decode(bytes);
}

/// Whether members that a confirmed leader has named leave one out.
pub(crate) fn gives_up(members: &[MemberInfo], me: u64) -> bool {
    !members.is_empty() && members.iter().all(|m| m.id.0 != me)
}

/// Refuses a change after which too many of the voters would be witnesses. A joint configuration that another leader left is
/// left for its second half by any change, so only that counts: while the new volume of a witness takes its place, both are there.
fn check_witnesses(membership: &Membership, change: &ChangeMembers<u64, Member>) -> Result<()> {
    let members = members_ahead(membership);
    let voters = voters_after(&members, change);
    crate::witness::may_be(members.iter().filter(|m| voters.contains(&m.id.0)))
}

/// Who votes once the change is made.
fn voters_after(members: &[MemberInfo], change: &ChangeMembers<u64, Member>) -> BTreeSet<u64> {
    let mut voters: BTreeSet<u64> = members.iter().filter(|m| m.role == MemberRole::Voter).map(|m| m.id.0).collect();
    let mut todo = VecDeque::from([change]);
    while let Some(change) = todo.pop_front() {
        match change {
            ChangeMembers::AddVoterIds(ids) => voters.extend(ids),
            ChangeMembers::AddVoters(nodes) => voters.extend(nodes.keys()),
            ChangeMembers::RemoveVoters(ids) => voters.retain(|id| !ids.contains(id)),
            ChangeMembers::ReplaceAllVoters(ids) => voters = ids.clone(),
            ChangeMembers::Batch(changes) => todo.extend(changes),
            _ => {}
        }
    }
    voters
}

/// Whether the change ends the part of a node.
fn removes(change: &ChangeMembers<u64, Member>, id: u64) -> bool {
    matches!(change, ChangeMembers::RemoveVoters(ids) | ChangeMembers::RemoveNodes(ids) if ids.contains(&id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, name: &str, voter: bool) -> MemberInfo {
        Member { name: name.into(), ..Member::default() }
            .info(id, if voter { MemberRole::Voter } else { MemberRole::Learner })
    }

    fn membership(configs: &[&[u64]], members: &[MemberInfo]) -> Membership {
        let nodes: BTreeMap<u64, Member> = members.iter().map(|m| (m.id.0, Member::from(m))).collect();
        Membership::new(configs.iter().map(|ids| set(ids)).collect::<Vec<_>>(), nodes).expect("every voter is a member")
    }

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    fn check(members: &[MemberInfo], caught_up: &[u64], expect: Option<(&[u64], &[u64])>) {
        let voters: Vec<u64> = members.iter().filter(|m| m.role == MemberRole::Voter).map(|m| m.id.0).collect();
        check_joint(&[&voters], members, caught_up, expect);
    }

    fn check_joint(configs: &[&[u64]], members: &[MemberInfo], caught_up: &[u64], expect: Option<(&[u64], &[u64])>) {
        let got = replacement(&membership(configs, members), &set(caught_up), &set(&[]));
        assert_eq!(got, expect.map(|(v, d)| (set(v), set(d))));
    }

    #[test]
    fn a_member_that_a_group_counts_on_is_not_dropped() {
        let three = [member(1, "a", true), member(2, "b", false), member(3, "c", true), member(70, "b", true)];
        let plan = |members: &[MemberInfo], counted: &[u64]| {
            replacement(&membership(&[&[1, 3, 70]], members), &set(&[1, 3, 70, 80]), &set(counted))
        };
        assert_eq!(plan(&three, &[]), Some((set(&[1, 3, 70]), set(&[2]))));
        assert_eq!(plan(&three, &[2]), None);
        // Wiped again: votes change hands all the same.
        let twice = [three.as_slice(), &[member(80, "b", false)]].concat();
        assert_eq!(plan(&twice, &[2]), Some((set(&[1, 3, 80]), set(&[]))));
        assert_eq!(plan(&twice, &[70]), Some((set(&[1, 3, 80]), set(&[2]))));
    }

    #[test]
    fn a_new_volume_takes_the_place_of_its_namesake_once_it_caught_up() {
        let three = [member(1, "a", true), member(2, "b", true), member(3, "c", true)];
        check(&three, &[1, 2, 3], None);
        let wiped = [three.as_slice(), &[member(70, "b", false)]].concat();
        check(&wiped, &[1, 3], None);
        check(&wiped, &[1, 3, 70], Some((&[1, 3, 70], &[])));
        // Wiped again before it was promoted: the newest counts, the one between is dropped.
        let twice = [wiped.as_slice(), &[member(80, "b", false)]].concat();
        check(&twice, &[1, 3, 70], None);
        check(&twice, &[1, 3, 80], Some((&[1, 3, 80], &[70])));
        let learner = [three.as_slice(), &[member(90, "d", false)]].concat();
        check(&learner, &[90], None);
    }

    #[test]
    fn a_change_that_another_leader_began_is_ended() {
        let members = [member(1, "a", true), member(2, "b", true), member(3, "c", true), member(70, "b", true)];
        check_joint(&[&[1, 2, 3], &[1, 3, 70]], &members, &[1, 3], Some((&[1, 3, 70], &[])));
        // The volume that was to be the new voter is wiped as well, and its successor has caught up.
        let twice = [members.as_slice(), &[member(80, "b", false)]].concat();
        check_joint(&[&[1, 2, 3], &[1, 3, 70]], &twice, &[1, 3, 80], Some((&[1, 3, 80], &[2])));
    }

    #[test]
    fn a_witness_may_be_replaced_while_another_replacement_is_unfinished() {
        let witness = |id: u64| MemberInfo { witness: true, ..member(id, "w", true) };
        let members = [member(1, "a", true), member(2, "b", true), witness(3), witness(70)];
        let joint = membership(&[&[1, 2, 3], &[1, 2, 70]], &members);
        let newer = ChangeMembers::AddNodes(BTreeMap::from([(80, Member::from(&witness(80)))]));
        check_witnesses(&joint, &newer).expect("one witness of three voters");
        let both = ChangeMembers::ReplaceAllVoters(set(&[1, 2, 3, 70]));
        assert_eq!(check_witnesses(&joint, &both).expect_err("half are witnesses").kind(), ErrorKind::Invalid);
        let two = membership(&[&[1, 2, 3]], &members[..3]);
        let fewer = ChangeMembers::RemoveVoters(set(&[2]));
        assert_eq!(check_witnesses(&two, &fewer).expect_err("half are witnesses").kind(), ErrorKind::Invalid);
    }

    #[test]
    fn the_voters_after_a_change_are_known_before_it() {
        let members = [member(1, "a", true), member(2, "b", true), member(3, "c", false)];
        for (change, voters) in [
            (ChangeMembers::AddVoterIds(set(&[3])), set(&[1, 2, 3])),
            (ChangeMembers::AddVoters(BTreeMap::from([(4, Member::default())])), set(&[1, 2, 4])),
            (ChangeMembers::RemoveVoters(set(&[1])), set(&[2])),
            (ChangeMembers::ReplaceAllVoters(set(&[2, 3])), set(&[2, 3])),
            (ChangeMembers::RemoveNodes(set(&[3])), set(&[1, 2])),
            (
                ChangeMembers::Batch(vec![
                    ChangeMembers::RemoveNodes(set(&[9])),
                    ChangeMembers::ReplaceAllVoters(set(&[2, 3])),
                ]),
                set(&[2, 3]),
            ),
        ] {
            assert_eq!(voters_after(&members, &change), voters, "{change:?}");
        }
    }

    #[test]
    fn changes_survive_the_wire() {
        for change in [
            Change::Add { name: "n".into(), address: "h:1".into(), voter: true },
            Change::Promote(7),
            Change::Update { id: 7, address: "h:2".into() },
            Change::Remove(9),
            Change::Transfer(None),
            Change::Transfer(Some(3)),
            Change::Site { id: 7, site: "north".into() },
            Change::Priority { id: 7, priority: 200 },
            Change::Finalize,
        ] {
            assert_eq!(Change::decode(&change.encode()).expect("ours"), change);
        }
    }
}
