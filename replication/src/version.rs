//! Which formats the members of a cluster may write: its version, which is raised once all of them read the next one.
//!
//! # Place
//! beside `membership`, whose entries carry it; `write` asks before it proposes what an earlier build cannot read
//! # Invariants
//! - V1. Nothing that needs a version is proposed before the cluster has it. So until then a member may go back to a build of the version
//!   before, with the volume that the newer one has written.
//! - V2. A version is raised over members that all said that they read it, by one entry of the membership, and never falls: all members
//!   have the same, and who reads less is not let in.
//! - V3. What counts is the committed membership. An entry behind it in the log is not kept without it.
//!
//! # Why not
//! A version that rises by itself once all members can: an upgrade that goes wrong an hour later could not be taken back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::try_join_all;
use mainstay_engine::CommandBody;
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use openraft_rt::Instant;

use crate::network::method;
use crate::node::{Inner, Running};
use crate::types::{Member, Membership};
use crate::wire::{Reader, Writer, decode_result};
use crate::{Error, ErrorKind, MemberInfo, PeerAddress, ReadLevel, Result, Runtime};

/// The newest version of a cluster that this build reads and writes: see docs/replication.md, "Versions of a cluster".
pub const CLUSTER_VERSION_MAX: u16 = 4;
/// From this one on keyspaces may be given merge operators.
const MERGE_OPERATORS: u16 = 2;
/// From this one on there may be expiring keyspaces.
const EXPIRING: u16 = 3;
/// From this one on keyspaces may have options of their own.
const KEYSPACE_OPTIONS: u16 = 4;
/// How long a member is asked anew which version it reads.
const REACH_WAIT: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The version that a cluster must have before this is proposed.
fn needed(body: &CommandBody) -> u16 {
    match body {
        CommandBody::SetOperator { .. } => MERGE_OPERATORS,
        CommandBody::CreateExpiring { .. } => EXPIRING,
        CommandBody::SetOptions { .. } => KEYSPACE_OPTIONS,
        _ => 1,
    }
}

/// The version of a cluster whose members carry these.
pub(crate) fn of_all(carried: impl Iterator<Item = u16>) -> u16 {
    carried.min().unwrap_or(0).max(1)
}

/// The version that a membership gives its cluster.
fn of(membership: &Membership) -> u16 {
    of_all(membership.nodes().map(|(_, member)| member.version))
}

/// As a member carries it: the first version is written as before there were any.
pub(crate) fn carried(version: u16) -> u16 {
    if version > 1 { version } else { 0 }
}

fn keeping(version: u16, change: ChangeMembers<u64, Member>) -> ChangeMembers<u64, Member> {
    let kept = |nodes: BTreeMap<u64, Member>| {
        let kept = |member: Member| Member { version: member.version.max(carried(version)), ..member };
        nodes.into_iter().map(|(id, member)| (id, kept(member))).collect()
    };
    match change {
        ChangeMembers::AddVoters(nodes) => ChangeMembers::AddVoters(kept(nodes)),
        ChangeMembers::AddNodes(nodes) => ChangeMembers::AddNodes(kept(nodes)),
        ChangeMembers::SetNodes(nodes) => ChangeMembers::SetNodes(kept(nodes)),
        ChangeMembers::ReplaceAllNodes(nodes) => ChangeMembers::ReplaceAllNodes(kept(nodes)),
        ChangeMembers::Batch(changes) => {
            ChangeMembers::Batch(changes.into_iter().map(|change| keeping(version, change)).collect())
        }
        ids @ (ChangeMembers::AddVoterIds(_)
        | ChangeMembers::RemoveVoters(_)
        | ChangeMembers::ReplaceAllVoters(_)
        | ChangeMembers::RemoveNodes(_)) => ids,
    }
}

impl<R: Runtime> Inner<R> {
    /// The version of the cluster, as far as this node knows.
    pub(crate) fn cluster_version(&self) -> u16 {
        if let Some(host) = self.host() {
            return host.cluster_version();
        }
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        running.map_or(1, |r| of(r.metrics.borrow_watched().committed_membership_config.membership()))
    }

    /// Refuses what the cluster has no version for (V1).
    pub(crate) async fn check_version(self: &Arc<Self>, body: &CommandBody) -> Result<()> {
        let needed = needed(body);
        if needed <= self.cluster_version() {
            return Ok(());
        }
        // It may have been raised, and this node not have heard of it yet.
        let first = self.host().unwrap_or_else(|| self.clone());
        first.read_barrier(ReadLevel::Linearizable).boxed().await?;
        // What is shown of the members may come a moment later than the barrier.
        let running = first.running()?;
        let committed = running.raft.with_raft_state(|state| of(state.membership_state.committed().membership()));
        let version = committed.await.map_err(|e| crate::service::raft_error(&e))?;
        if needed <= version {
            return Ok(());
        }
        let message = format!(
            "the cluster has no version for this: finalize it once every member is of a build that reads it version={version} needed={needed}"
        );
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    /// Asks the process at an address for the newest version that it reads.
    pub(crate) async fn ask_version(&self, name: &str, address: &PeerAddress) -> Result<u16> {
        if *address == self.transport.local_address() {
            return Ok(CLUSTER_VERSION_MAX);
        }
        let deadline = R::Instant::now() + REACH_WAIT;
        loop {
            let answer = self.call_address(address, method::VERSION, Writer::new().finish()).await;
            match answer.and_then(|bytes| decode_result(&bytes, Reader::u16)) {
                Ok(version) => return Ok(version.max(1)),
                // A build from before there were versions knows no such request.
                Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(1),
                Err(error) if R::Instant::now() + RETRY_PAUSE >= deadline => {
                    let message = format!("a member does not say which version it reads name={name}: {error}");
                    return Err(Error::new(ErrorKind::Unavailable, message));
                }
                // It may be starting this moment. Asking changes nothing.
                Err(_) => R::sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// The newest version that all of these read, and who keeps it from being newer.
    pub(crate) async fn common_version(&self, members: &[(String, PeerAddress)]) -> Result<(u16, String)> {
        let asked = members.iter().map(|(name, address)| async move {
            Ok::<_, Error>((self.ask_version(name, address).await?, name.clone()))
        });
        let found = try_join_all(asked).await?;
        let lowest = found.into_iter().min().unwrap_or_default();
        Ok((lowest.0.clamp(1, CLUSTER_VERSION_MAX), lowest.1))
    }

    /// Refuses a volume that is opened by a build which does not read what this cluster writes (V2). The newest membership counts, whether
    /// it is committed or not: what comes behind it must not fall below.
    pub(crate) async fn check_reads(&self, running: &Running<R>, member: &Member) -> Result<()> {
        let version = of(running.metrics.borrow_watched().membership_config.membership());
        if version == 1 {
            return Ok(());
        }
        let reads = self.ask_version(&member.name, &PeerAddress(member.peer_address.clone())).await?;
        if reads < version {
            let name = &member.name;
            let message = format!(
                "start it with a newer build: it does not read what this cluster writes name={name} version={version} reads={reads}"
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }

    /// A change of the membership that lowers no version (V2): what it says of a member may have been read before a raise.
    pub(crate) fn keeping_version(
        &self,
        running: &Running<R>,
        change: ChangeMembers<u64, Member>,
    ) -> ChangeMembers<u64, Member> {
        keeping(of(running.metrics.borrow_watched().membership_config.membership()), change)
    }

    /// Gives the cluster the newest version that this build reads, if every member does.
    pub(crate) async fn raise_version(self: &Arc<Self>, running: &Arc<Running<R>>) -> Result<Vec<MemberInfo>> {
        // Nobody is let in meanwhile.
        let _one = self.changing.acquire().await.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))?;
        let members = self.members();
        if self.cluster_version() >= CLUSTER_VERSION_MAX {
            return Ok(members);
        }
        let asked: Vec<_> = members.iter().map(|m| (m.name.clone(), m.peer_address.clone())).collect();
        let (common, name) = self.common_version(&asked).await?;
        if common < CLUSTER_VERSION_MAX {
            let message = format!(
                "a member is of an earlier build: start it with this one and finalize again name={name} reads={common} version={CLUSTER_VERSION_MAX}"
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let raised: BTreeMap<u64, Member> =
            members.iter().map(|m| (m.id.0, Member { version: carried(common), ..Member::from(m) })).collect();
        self.change_members_locked(running, ChangeMembers::SetNodes(raised), true).await?;
        tracing::info!(version = common, "the version of the cluster is raised");
        Ok(self.members())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_change_of_the_membership_lowers_a_version() {
        let nodes = |version| BTreeMap::from([(7, Member { version, ..Member::default() })]);
        for of_nodes in [ChangeMembers::AddVoters, ChangeMembers::AddNodes, ChangeMembers::SetNodes] {
            for (cluster, said, kept) in [(1, 0, 0), (2, 0, 2), (1, 2, 2), (2, 2, 2), (3, 2, 3)] {
                assert_eq!(keeping(cluster, of_nodes(nodes(said))), of_nodes(nodes(kept)), "{cluster} {said}");
            }
        }
        let both = |version| {
            let removed = ChangeMembers::RemoveNodes(BTreeSet::from([3]));
            ChangeMembers::Batch(vec![removed, ChangeMembers::ReplaceAllNodes(nodes(version))])
        };
        assert_eq!(keeping(2, both(0)), both(2));
    }

    #[test]
    fn the_version_of_a_cluster_is_the_least_of_its_members() {
        for (carried, version) in [(&[][..], 1), (&[0], 1), (&[0, 2, 2], 1), (&[2, 2], 2), (&[3, 2], 2)] {
            assert_eq!(of_all(carried.iter().copied()), version, "{carried:?}");
        }
    }
}
