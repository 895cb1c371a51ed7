//! A cluster that has lost its majority for good, taken up again from one volume.
//!
//! # Place
//! beside [`crate::Node`], on volumes that no process has open; `mainstay recover` is its command
//! # Invariants
//! - Q1. Looking writes nothing. What [`RecoveryPlan`] shows is all that [`recover`] acts on: the digest binds the two together.
//! - Q2. The survivor stays of the same cluster under the same id. It gets a membership of itself alone as the next entry of its log, in a
//!   term of its own that is above every term that a volume of the plan has seen, and nothing of its log is dropped.
//! - Q3. The vote of that term is durable before the entry: no other entry of that term can come from here.
//! - Q4. Nothing is done to a volume that is in use, damaged, not a member, or behind another one of the plan.
//!
//! # Crash
//! Between the two records there is a vote of a higher term and nothing else; the digest has changed, and the next plan goes on from there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mainstay_engine::{Engine, EngineSettings, Identity, LogIndex, Offline};
use mainstay_io::{Environment, Media};
use mainstay_wal::RecordKind;

use crate::entry_index::EntryIndex;
use crate::log_store::LogStore;
use crate::node::GROUP;
use crate::types::{Entry, EntryPayload, Member, Membership, Vote, log_id, members_of, term_of};
use crate::wire::Writer;
use crate::{Error, ErrorKind, MemberInfo, MemberRole, NodeId, Result, record};

/// Memory for an engine that runs no job.
const MEMORY_BYTES: u64 = 64 << 20;
/// Volumes of one plan.
const VOLUMES_MAX: usize = crate::wire::MEMBERS_MAX;

/// What one volume holds of its cluster's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryVolume {
    /// Where it is, for people.
    pub label: String,
    /// The cluster that it belongs to.
    pub cluster: [u8; 16],
    /// Its node id there.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: [u8; 16],
    /// The highest term that it has seen.
    pub term: u64,
    /// The term of its last entry.
    pub last_term: u64,
    /// Its last entry.
    pub last: LogIndex,
    /// Entries up to here are known to be committed, whatever the others hold. Those behind may have been, or not.
    pub committed: LogIndex,
    /// Entries up to here are in tables.
    pub flushed: LogIndex,
    /// The members as its log has them, committed or not.
    pub members: Vec<MemberInfo>,
}

/// What a recovery would do, and what it may lose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryPlan {
    /// The volume that shall go on.
    pub survivor: RecoveryVolume,
    /// Others that can be read, to compare.
    pub others: Vec<RecoveryVolume>,
}

impl RecoveryVolume {
    fn end(&self) -> (u64, u64) {
        (self.last_term, self.last.0)
    }

    fn write(&self, out: &mut Writer) {
        out.id(&self.cluster)
            .u64(self.node.0)
            .id(&self.incarnation)
            .u64(self.term)
            .u64(self.last_term)
            .u64(self.last.0);
        out.u64(self.committed.0).u64(self.flushed.0).member_infos(&self.members);
    }
}

impl RecoveryPlan {
    /// Compares volumes of one cluster.
    ///
    /// # Errors
    /// `Invalid`: a volume is named twice, or the survivor is no member. `Foreign`: another cluster.
    pub fn new(survivor: RecoveryVolume, mut others: Vec<RecoveryVolume>) -> Result<Self> {
        others.sort_by_key(|other| other.node);
        if others.len() >= VOLUMES_MAX {
            return Err(Error::new(ErrorKind::Invalid, format!("a plan has {VOLUMES_MAX} volumes at most")));
        }
        for (i, other) in others.iter().enumerate() {
            let mut before = others.iter().take(i).chain([&survivor]);
            if other.cluster != survivor.cluster {
                let message = format!("a volume of another cluster volume={}", other.label);
                return Err(Error::new(ErrorKind::Foreign, message));
            }
            if before.any(|b| b.node == other.node || b.incarnation == other.incarnation) {
                let message = format!("a volume or a copy of it is named twice node={}", other.node);
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        }
        let me = survivor.members.iter().find(|m| m.id == survivor.node);
        if me.is_none_or(|me| me.incarnation != survivor.incarnation) {
            let message = format!("the volume is no member of its cluster any more node={}", survivor.node);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if me.is_some_and(|me| me.witness) {
            let message = format!("the volume is that of a witness and holds no data node={}", survivor.node);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(Self { survivor, others })
    }

    /// Members that are given up: all but the survivor. Their ids are never used again.
    pub fn removed(&self) -> impl Iterator<Item = &MemberInfo> {
        self.survivor.members.iter().filter(|member| member.id != self.survivor.node)
    }

    /// Another volume whose log goes further: that one is to survive.
    pub fn further_ahead(&self) -> Option<&RecoveryVolume> {
        self.others.iter().filter(|other| other.end() > self.survivor.end()).max_by_key(|other| other.end())
    }

    /// Entries of the survivor that count as committed from then on although nobody here knows whether they were: first and last.
    pub fn uncertain(&self) -> Option<(LogIndex, LogIndex)> {
        let (committed, last) = (self.survivor.committed, self.survivor.last);
        (committed < last).then(|| (LogIndex(committed.0 + 1), last))
    }

    /// Voters whose volumes are not among those that were read. What they alone acknowledged, behind the last entry of the survivor, is
    /// lost; how much that is nobody here can say. Empty when there are none.
    pub fn unread_voters(&self) -> Vec<NodeId> {
        let read = |id: NodeId| id == self.survivor.node || self.others.iter().any(|other| other.node == id);
        self.survivor.members.iter().filter(|m| m.role == MemberRole::Voter && !read(m.id)).map(|m| m.id).collect()
    }

    /// True when a majority of the voters was read and none of them goes further: nothing that was acknowledged is lost.
    pub fn is_lossless(&self) -> bool {
        let voters = self.survivor.members.iter().filter(|m| m.role == MemberRole::Voter).count();
        // What a majority acknowledged is on one of these.
        voters - self.unread_voters().len() > voters / 2 && self.further_ahead().is_none()
    }

    /// The term that the survivor goes on in.
    fn term(&self) -> u64 {
        let all = self.others.iter().chain([&self.survivor]);
        all.map(|volume| volume.term.max(volume.last_term)).max().unwrap_or(0).saturating_add(1)
    }

    /// Names this plan: 16 hexadecimal digits over all that it is made of but the labels. Who asks for the recovery says it again.
    pub fn digest(&self) -> String {
        let mut out = Writer::new();
        self.survivor.write(&mut out);
        self.others.iter().for_each(|other| other.write(&mut out));
        format!("{:016x}", crc_fast::crc64_nvme(&out.finish()))
    }
}

/// Reads what a volume holds of its log; `label` is for people. Writes nothing.
///
/// # Errors
/// `Invalid`: it belongs to no cluster, or has no log. `Corrupt`, `Foreign`, `Io`: it cannot be read; a damaged log mends itself only
/// from other members.
pub async fn examine(media: Arc<dyn Media>, environment: &Environment, label: &str) -> Result<RecoveryVolume> {
    let volume = Offline::open(media, environment).await?;
    let superblock = volume.superblock();
    let identity = superblock.identity;
    if identity == Identity::default() {
        return Err(Error::new(ErrorKind::Invalid, format!("the volume belongs to no cluster volume={label}")));
    }
    let group = volume.manifest().await?.into_iter().find(|group| group.group == GROUP);
    let (flushed, as_of) = group.map_or((LogIndex(0), LogIndex(0)), |group| (group.flushed, group.as_of));
    let mut index = EntryIndex::new(0, flushed.0);
    let mut bad = None;
    volume
        .wal(&mut |batch| {
            let ours = |r: &&mainstay_wal::RecordInfo| r.group == GROUP && r.kind.0 >= RecordKind::OWNER_FIRST;
            for found in batch.records.iter().filter(ours) {
                match record::decode(found.kind, &found.payload) {
                    Ok(record) => index.recover(record, found.pos),
                    Err(error) => bad = bad.take().or(Some(error)),
                }
            }
        })
        .await?;
    if let Some(error) = bad {
        return Err(error);
    }
    index.settle();
    if let Some((_, note)) = superblock.notes.iter().find(|(group, _)| *group == GROUP) {
        index.recover_note(record::decode_vote_note(note)?);
    }
    index.check()?;
    index.state_at(flushed.0)?;
    let Some(last) = index.last() else {
        return Err(Error::new(ErrorKind::Invalid, format!("the volume holds no log volume={label}")));
    };
    // What is in tables was committed, and so was what changed the manifest.
    let purged = index.purged().map_or(0, |id| id.index);
    let committed = flushed.0.max(as_of.0).max(purged).min(last.index);
    Ok(RecoveryVolume {
        label: label.into(),
        cluster: identity.cluster,
        node: NodeId(identity.node),
        incarnation: superblock.incarnation,
        term: index.vote().map_or(0, |vote| vote.leader_id.term).max(term_of(&last)),
        last_term: term_of(&last),
        last: LogIndex(last.index),
        committed: LogIndex(committed),
        flushed,
        members: members_of(index.membership_at(last.index).membership()),
    })
}

/// Makes the volume of `media` the only member of its cluster. `others` are what [`examine`] said of the volumes to compare with, and
/// `digest` is that of the plan over all of them. Returns the plan that was carried out. The process that is then started on the volume leads
/// at once; new members are added to it as to any other.
///
/// # Errors
/// `Invalid`: the digest is another, or another volume goes further. As [`examine`] and [`RecoveryPlan::new`]. `Io`, `Closed`, `OutOfSpace`:
/// it was not finished; make a new plan.
/// # Cancel safety
/// Not cancel safe: see the crash rule of this module.
pub async fn recover(
    media: Arc<dyn Media>,
    environment: &Environment,
    label: &str,
    others: Vec<RecoveryVolume>,
    digest: &str,
) -> Result<RecoveryPlan> {
    let plan = RecoveryPlan::new(examine(media.clone(), environment, label).await?, others)?;
    if plan.digest() != digest {
        let message = format!("the volumes are not as in the confirmed plan confirmed={digest} now={}", plan.digest());
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    if let Some(ahead) = plan.further_ahead() {
        let (node, last) = (ahead.node, ahead.last);
        let message = format!("another volume goes further: recover that one node={node} last={last}");
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let settings = EngineSettings {
        memory_bytes: MEMORY_BYTES,
        background_tasks: 1,
        wal_in_flight_max: 1,
        scrub_bytes_per_second: 0,
        scrub_pause: mainstay_engine::SCRUB_PAUSE,
        log_holes: false,
    };
    let mut found = Vec::new();
    let engine = Engine::open(media, environment.clone(), settings, &mut |record| {
        found.push(record);
        Ok(())
    })
    .await?;
    let notes = Some(engine.owner_notes());
    let log = LogStore::open(engine.wal().clone(), notes, GROUP, found, 0, Some(plan.survivor.flushed))?;
    let written = write_membership(&log, &plan).await;
    // The records are durable by now; what a close would add is only that it was in order.
    let closed = engine.close().await;
    written?;
    closed?;
    Ok(plan)
}

async fn write_membership(log: &LogStore, plan: &RecoveryPlan) -> Result<()> {
    let survivor = &plan.survivor;
    let unchanged = log.last() == Some(log_id(survivor.last_term, survivor.last.0)) && log.damage().is_none();
    let me = survivor.members.iter().find(|member| member.id == survivor.node);
    let (Some(me), true) = (me, unchanged) else {
        return Err(Error::new(ErrorKind::Internal, "the log is not as it was read a moment ago"));
    };
    let (id, term) = (survivor.node.0, plan.term());
    let members = BTreeMap::from([(id, Member::from(me))]);
    let membership = Membership::new(vec![BTreeSet::from([id])], members)
        .map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))?;
    let entry = Entry {
        log_id: log_id(term, survivor.last.0.saturating_add(1)),
        payload: EntryPayload::Membership(membership),
    };
    let closed = |error: std::io::Error| Error::new(ErrorKind::Closed, error.to_string());
    log.vote_and_append(Vote::new(term, id), entry).await.map_err(closed)
}
