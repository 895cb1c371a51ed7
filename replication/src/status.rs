//! What a node tells of itself.

use mainstay_engine::LogIndex;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;

use crate::node::{Inner, Phase};
use crate::types::members_of;
use crate::{MemberInfo, MemberRole, NodeId, NodeStatus, Runtime};

impl<R: Runtime> Inner<R> {
    pub(crate) fn status(&self) -> NodeStatus {
        let identity = self.engine.identity();
        let mut status = NodeStatus {
            cluster: identity.cluster,
            id: NodeId(identity.node),
            group: self.group.status(),
            log_heal: self.log.heal_status(),
            replayed: self.replayed,
            disk: self.disk_health(),
            disk_hand_overs: self.disk_hand_overs.load(std::sync::atomic::Ordering::Relaxed),
            priority_hand_overs: self.priority_hand_overs.load(std::sync::atomic::Ordering::Relaxed),
            fetched_bytes: self.fetched_bytes.load(std::sync::atomic::Ordering::Relaxed),
            site_lags: self.site_lags(),
            cluster_version: self.cluster_version(),
            ..NodeStatus::default()
        };
        if self.is_witness() {
            (status.group.applied, status.group.flushed) = (self.progress.applied(), self.progress.applied());
        }
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        if let Some(running) = running {
            let metrics = running.metrics.borrow_watched();
            status.term = metrics.current_term;
            status.leader = metrics.current_leader.map(NodeId);
            status.last_log = LogIndex(metrics.last_log_index.unwrap_or(0));
            status.committed = LogIndex(metrics.local_committed.as_ref().map_or(0, |id| id.index));
            status.members = members_of(metrics.membership_config.membership());
            let last = metrics.last_log_index.map_or(0, |i| i + 1);
            for (id, matched) in metrics.replication.iter().flatten() {
                if *id != running.id {
                    let matched = matched.as_ref().map_or(0, |m| m.index + 1);
                    status.lag.insert(*id, last.saturating_sub(matched));
                }
            }
            status.role = match metrics.state {
                ServerState::Leader => "leader",
                ServerState::Follower => "follower",
                ServerState::Candidate => "candidate",
                _ => "learner",
            }
            .into();
            let leads = metrics.state == ServerState::Leader;
            drop(metrics);
            let voters = status.members.iter().filter(|m| leads && m.role == MemberRole::Voter && m.id.0 != running.id);
            status.silent = voters.map(|m| m.id).filter(|id| !self.hears(&running, *id)).map(|id| id.0).collect();
        }
        match self.phase() {
            Phase::Member => {}
            Phase::Waiting => status.role = "waiting".into(),
            Phase::Starting => status.role = "starting".into(),
            Phase::Recovering(reason) => {
                status.role = "recovering".into();
                status.failure = Some(reason);
                status.members = self.members();
            }
            Phase::Foreign(reason) => {
                status.role = "foreign".into();
                status.failure = Some(reason);
            }
            Phase::Removed => status.role = "removed".into(),
            Phase::Closed => status.role = "closed".into(),
            Phase::Twin(address) => {
                status.role = "twin".into();
                status.failure = Some(crate::receipts::twin_message(&address));
            }
            Phase::Failed(reason) => {
                status.role = "failed".into();
                status.failure = Some(reason);
            }
        }
        status
    }

    /// Members of the configuration in force here, committed or not.
    pub(crate) fn members(&self) -> Vec<MemberInfo> {
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        match running {
            Some(running) => members_of(running.metrics.borrow_watched().membership_config.membership()),
            None => members_of(self.log.membership().membership()),
        }
    }

    /// Entries up to here are committed, as far as this node knows.
    pub(crate) fn committed(&self) -> u64 {
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        let known = running.and_then(|r| r.metrics.borrow_watched().local_committed.as_ref().map(|id| id.index));
        known.unwrap_or(0).max(self.group.applied().0)
    }

    pub(crate) fn member(&self, id: NodeId) -> Option<MemberInfo> {
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        let Some(running) = running else { return self.members().into_iter().find(|member| member.id == id) };
        let metrics = running.metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let member = membership.get_node(&id.0)?;
        let voter = membership.voter_ids().any(|v| v == id.0);
        Some(member.info(id.0, if voter { MemberRole::Voter } else { MemberRole::Learner }))
    }
}
