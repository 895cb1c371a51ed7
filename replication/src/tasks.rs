//! What a node does beside: purging, leading, watching itself, closing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use mainstay_engine::{Command, CommandBody, LogIndex};
use mainstay_wal::Lsn;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft_rt::{Instant, Select2, Select3};

use crate::disk::HandOver;
use crate::node::{Inner, Phase, Running, Write};
use crate::priority::Preference;
use crate::relief::Stuck;
use crate::types::{Payload, term_of};
use crate::{Durability, ErrorKind, Result, Runtime};

/// How often what nothing else wakes is looked at.
const HOUSEKEEPING: Duration = Duration::from_millis(100);
/// How long openraft may take for a step of a purge, before the ring is cut without it.
const PURGE_STEP_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause before a proposal of ours is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Pause between two rotations that a follower asks for.
const ROTATION_PAUSE: Duration = Duration::from_millis(50);
/// How often a node looks at its disk, and a leader for members to replace.
const RECONCILE: Duration = Duration::from_millis(500);
/// How long a member is without a leader before it asks whether it is one still.
const ORPHAN: Duration = Duration::from_secs(3);
/// How often a node whose ring is full asks for it to be cut.
const RELIEVE: Duration = Duration::from_secs(1);
/// How long closing waits for another leader.
const HAND_OVER: Duration = Duration::from_secs(3);
/// How long closing waits until that one has committed something.
const FIRST_COMMIT: Duration = Duration::from_secs(1);
/// Entries behind the tables that closing leaves to the next open: applying them again is cheaper than a flush of all
/// replicas.
pub(crate) const CLOSE_REPLAY_MAX: u64 = 8;
/// How long closing waits until a rotation is committed, which takes a quorum.
const CLOSE_ROTATE: Duration = Duration::from_secs(2);
/// How long closing waits until what was rotated is in tables.
const CLOSE_FLUSH: Duration = Duration::from_secs(10);

/// A log without a write for this long gets a record behind its last batch that proves it.
const SEAL_TICKS: u32 = 10;

/// How long nothing was written to the log.
#[derive(Default)]
struct Idle {
    end: Lsn,
    ticks: u32,
    /// The log is proven up to here.
    sealed: Option<Lsn>,
}

impl Idle {
    /// Once for each time that the log has come to rest.
    fn wants_seal(&mut self, end: Lsn) -> bool {
        if self.end != end {
            (self.end, self.ticks) = (end, 0);
        }
        self.ticks = self.ticks.saturating_add(1);
        self.ticks == SEAL_TICKS && self.sealed != Some(end)
    }
}

impl<R: Runtime> Inner<R> {
    /// Purges after flushes and when the engine asks, and queues again what a full ring refused.
    pub(crate) fn start_owner_task(self: &Arc<Self>) {
        let mut requests = self.log.attach(&self.engine);
        let this = self.clone();
        self.spawn(async move {
            let mut seen = this.group.flushed();
            let mut idle = Idle::default();
            let mut relieved = R::Instant::now();
            loop {
                let event = {
                    let request = std::pin::pin!(requests.recv());
                    let flushed = std::pin::pin!(this.group.flushed_beyond(seen));
                    if this.host.is_some() {
                        // The host looks after the rest.
                        match R::select2(request, flushed).await {
                            Select2::First(request) => Select3::First(request),
                            Select2::Second(()) => Select3::Second(()),
                        }
                    } else {
                        let tick = std::pin::pin!(R::sleep(HOUSEKEEPING));
                        R::select3(request, flushed, tick).await
                    }
                };
                this.log.resume();
                this.look_after_volume(&mut relieved).await;
                match event {
                    Select3::First(Some(request)) => {
                        this.purge(request.flushed).await;
                        // An engine that gave up waiting is content with what there is.
                        let _ = request.done.send(());
                    }
                    Select3::First(None) => return,
                    Select3::Second(()) => {
                        seen = this.group.flushed();
                        if this.log.may_purge() {
                            this.purge(seen).await;
                        }
                    }
                    Select3::Third(()) => {
                        idle.sealed = this.log.take_seal().or(idle.sealed);
                        // One seal proves the ring for all groups.
                        if this.phase() == Phase::Member && idle.wants_seal(this.engine.wal().durable()) {
                            this.log.seal();
                        }
                    }
                }
            }
        });
    }

    /// For good, as far as this process goes.
    pub(crate) async fn leave_service(&self, reason: String) {
        tracing::error!(%reason, "the node leaves service");
        self.stop(Phase::Failed(reason)).await;
    }

    /// Consensus ends, and with it all that waits for it.
    pub(crate) async fn stop(&self, phase: Phase) {
        self.set_phase(phase);
        self.progress.close();
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        if let Some(running) = running {
            // Its error says that the core has stopped already.
            let _ = running.raft.shutdown().await;
        }
    }

    /// Leaves service when the volume has failed, and sees that a full ring is cut: a node that starts with one appends
    /// nothing, and without appends nobody else would ask for it.
    pub(crate) async fn look_after_volume(&self, relieved: &mut R::Instant) {
        let failure = self.group.failure().map(|e| e.to_string());
        // A write that nobody waited for may have ended the log of a node at rest.
        let failure = failure.or_else(|| Some(self.engine.wal().failure()?.to_string()));
        if let Some(reason) = failure
            && matches!(
                self.phase(),
                Phase::Waiting | Phase::Starting | Phase::Recovering(_) | Phase::Foreign(_) | Phase::Member
            )
            && !self.closing.is_set()
        {
            self.leave_service(reason).await;
        }
        self.engine.check_log();
        if self.log.is_stalled() && R::Instant::now() >= *relieved + RELIEVE {
            *relieved = R::Instant::now();
            self.engine.relieve_log();
        }
    }

    /// Tells openraft that everything up to `flushed` is in a snapshot, and has it purge all but a tail for followers
    /// that lag.
    pub(crate) async fn purge(&self, flushed: LogIndex) {
        let Ok(running) = self.running() else { return };
        // What a witness has applied it needs for others alone.
        let flushed = if self.is_witness() { self.progress.applied() } else { flushed };
        if flushed.0 == 0 || self.phase() != Phase::Member {
            return;
        }
        if running.raft.trigger().snapshot().await.is_err() {
            return;
        }
        let mut metrics = running.metrics.clone();
        let named = metrics.wait_until(|m| m.snapshot.as_ref().is_some_and(|s| s.index >= flushed.0));
        if R::timeout(PURGE_STEP_TIMEOUT, named).await.is_err() {
            return;
        }
        let ring = self.engine.wal().stats().ring_bytes;
        // What lies behind damage cannot be cut while anything before it is kept.
        let tail = if self.engine.log_is_damaged() || self.relieves.load(Ordering::Relaxed) {
            0
        } else if self.is_witness() {
            ring / 8 * 3
        } else {
            self.options.entry_cache_bytes.min(ring / 4)
        };
        let Some(target) = self.log.purge_target(flushed, tail) else { return };
        // What a leader puts off, because it is being sent, openraft does not take up again as a follower, unless it is asked for
        // more: one entry is left for that until the rest is gone.
        let leads = || running.metrics.borrow_watched().state == ServerState::Leader;
        let upto = if leads() && tail > 0 { target.min(flushed.0 - 1) } else { target };
        if self.purge_by(&running, upto).await {
            if upto < target {
                self.purge_by(&running, target).await;
            }
            return;
        }
        if !leads() && upto < flushed.0 && self.purge_by(&running, flushed.0).await {
            return;
        }
        // openraft carries out one step after the other, and one that waits until an entry is durable holds up the purge that
        // would make room for that entry. What it has decided to purge it never asks for again. It decides to when a snapshot
        // begins to be installed: of that no more goes than is in tables now.
        let decided = running.raft.with_raft_state(|state| state.log_ids.purged().map(|id| id.index)).await;
        let upto = decided.ok().flatten().and_then(|decided| self.log.log_id(decided.min(flushed.0)));
        if let Some(upto) = upto
            && let Err(error) = self.log.purge_to(upto)
        {
            tracing::warn!(%error, "the log was not purged");
        }
    }

    /// Has openraft purge up to `upto`. `false` when it did not in time.
    async fn purge_by(&self, running: &Running<R>, upto: u64) -> bool {
        if running.raft.trigger().purge_log(upto).await.is_err() {
            return true;
        }
        let mut metrics = running.metrics.clone();
        let purged = metrics.wait_until(|m| m.purged.as_ref().is_some_and(|p| p.index >= upto));
        R::timeout(PURGE_STEP_TIMEOUT, purged).await.is_ok()
    }

    pub(crate) fn start_tasks(self: &Arc<Self>, running: &Arc<Running<R>>) {
        self.start_healing();
        let (this, r) = (self.clone(), running.clone());
        self.spawn(async move { this.watch(&r).await });
        let (this, r) = (self.clone(), running.clone());
        self.spawn(async move { this.lead(&r).await });
        let (this, r) = (self.clone(), running.clone());
        self.spawn(async move { this.ask_for_rotations(&r).await });
        let (this, r) = (self.clone(), running.clone());
        if self.host.is_none() {
            self.spawn(async move { this.look_after_members(&r).await });
            let (this, r) = (self.clone(), running.clone());
            self.spawn(async move { this.ask_when_orphaned(&r).await });
        }
        // A dropped node stops as in a crash: openraft ends with it.
        let (this, r) = (self.clone(), running.clone());
        drop(R::spawn(async move {
            this.closing.wait().await;
            let _ = r.raft.shutdown().await;
            this.transport.close().await;
        }));
    }

    /// Follows openraft's state: announces changes, and leaves service when it stops.
    ///
    /// By the metrics of role and membership alone, here and in [`Inner::lead`]: those with the progress of the log change at
    /// each step of an entry, and each change wakes all who wait for one.
    async fn watch(self: &Arc<Self>, running: &Arc<Running<R>>) {
        let mut metrics = running.raft.server_metrics();
        let mut last = None;
        let mut known: BTreeSet<u64> = BTreeSet::new();
        loop {
            let (now, committed, voter_once) = {
                let m = metrics.borrow_and_update();
                let committed: BTreeSet<u64> =
                    m.committed_membership_config.membership().nodes().map(|(id, _)| *id).collect();
                let now = (m.state, m.vote, m.current_leader, *m.membership_config.log_id());
                let inside = m.membership_config.get_node(&running.id).is_some();
                (now, committed, inside)
            };
            if !committed.is_empty() {
                let gone: Vec<u64> = known.difference(&committed).copied().collect();
                // The first group decides for all. The leader of another one that does not know the first one's last entries yet lets go of
                // whom they have made a member, and takes it in again.
                if gone.contains(&running.id) && !voter_once && self.host.is_none() {
                    self.leave(running);
                }
                let mut removed = self.removed.lock().expect("nothing panics while it holds this lock");
                removed.extend(gone);
                known = committed;
            }
            if last != Some(now) {
                last = Some(now);
                self.changed.notify_waiters();
            }
            if metrics.changed().await.is_err() {
                if !self.closing.is_set() {
                    let stopped =
                        Self::metrics_of(running, |m| m.running_state.as_ref().err().map(ToString::to_string));
                    let reason = self.log.failure().or(stopped).unwrap_or_else(|| "raft stopped".into());
                    self.set_phase(Phase::Failed(reason));
                    self.progress.close();
                }
                return;
            }
        }
    }

    /// The cluster has given this node up: it goes idle, says so, and does not disturb.
    fn leave(&self, running: &Running<R>) {
        tracing::warn!(id = running.id, "this node was removed from its cluster");
        running.raft.runtime_config().elect(false);
        running.raft.runtime_config().heartbeat(false);
        self.set_phase(Phase::Removed);
    }

    /// While it leads: proposes what its jobs produced.
    async fn lead(&self, running: &Arc<Running<R>>) {
        let mut metrics = running.raft.server_metrics();
        loop {
            let Ok(leading) = metrics.wait_until(|m| m.state == ServerState::Leader).await else { return };
            let vote = leading.vote;
            if self.is_witness() {
                self.give_leadership_away(running).await;
                continue;
            }
            // What finished while another led, or was lost with it.
            self.group.offer_installs();
            loop {
                let mut ended = metrics.clone();
                let ended = std::pin::pin!(ended.wait_until(|m| m.state != ServerState::Leader || m.vote != vote));
                let next = std::pin::pin!(self.group.next_install());
                let command = match R::select2(ended, next).await {
                    Select2::First(Ok(_)) => break,
                    Select2::First(Err(_)) => return,
                    Select2::Second(command) => command,
                };
                if let CommandBody::Install { job, .. } = &command.body
                    && !self.agree(running, *job).await
                {
                    continue;
                }
                let bytes = match command.encode() {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        tracing::error!(%error, "an install cannot be encoded");
                        continue;
                    }
                };
                // Not admitted like a client's write: it is what makes room.
                while self.propose_install(running, bytes.clone()).await.is_none() {
                    let leads = metrics.borrow_watched().state == ServerState::Leader;
                    if !leads || self.closing.is_set() {
                        break;
                    }
                    R::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// While another leads: asks it for the rotations without which the log here cannot be cut.
    async fn ask_for_rotations(self: &Arc<Self>, running: &Arc<Running<R>>) {
        loop {
            self.group.rotation_wanted().await;
            if self.leader_of(running) != Some(running.id) {
                let command = Command { time_ms: self.now_ms(), body: CommandBody::Rotate };
                let asked = match command.encode() {
                    Ok(command) => self.propose(command, false).await.map(|_| ()),
                    Err(error) => Err(error.into()),
                };
                if let Err(error) = asked {
                    tracing::debug!(%error, "the leader was asked in vain for a rotation");
                }
            }
            // The rotation takes the wish away when it is applied here, or the task of the leader takes it.
            R::sleep(ROTATION_PAUSE).await;
        }
    }

    /// `None` when it was not appended and may be tried again.
    async fn propose_install(&self, running: &Arc<Running<R>>, bytes: bytes::Bytes) -> Option<()> {
        self.awaken(running).await;
        match running.raft.client_write(Payload::new(bytes)).await {
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => None,
            Ok(response) => {
                if let Some(Err(error)) = response.data.0.map(|a| a.response) {
                    tracing::warn!(%error, "an install had no effect");
                }
                Some(())
            }
            Err(error) => {
                tracing::warn!(%error, "an install was not committed here");
                Some(())
            }
        }
    }

    async fn look_after_members(self: &Arc<Self>, running: &Arc<Running<R>>) {
        let mut aside = false;
        let mut hand_over = HandOver::new();
        let mut preference = Preference::new();
        let mut stuck = Stuck::default();
        loop {
            R::sleep(RECONCILE).await;
            self.look_at_disk();
            self.look_at_sites(running);
            if let Some(address) = self.twin().await {
                self.stand_back(address).await;
                return;
            }
            if self.phase() == Phase::Member {
                aside = self.stand_aside(running, aside).await;
            }
            if self.phase() == Phase::Member && !aside && !self.is_witness() {
                self.mind_disk(running, &mut hand_over).await;
                self.mind_priority(running, &mut preference).await;
            }
            let leads = running.metrics.borrow_watched().state == ServerState::Leader;
            if leads {
                self.reconcile(running).await;
                self.mind_addresses(running).await;
            }
            self.relieve_followers(running, &mut stuck).await;
            self.unpin_idle();
        }
    }

    /// A removed node hears nothing any more, not even that it was removed: it asks.
    async fn ask_when_orphaned(self: &Arc<Self>, running: &Arc<Running<R>>) {
        let mut since = R::Instant::now();
        loop {
            R::sleep(ORPHAN / 3).await;
            let led = running.metrics.borrow_watched().current_leader.is_some();
            let now = R::Instant::now();
            if self.phase() != Phase::Member {
                continue;
            }
            // A leader that somebody does not hear may lead a cluster that was taken up again without it.
            if self.leader_of(running) == Some(running.id) {
                if !self.is_heard_by_all(running) && self.is_given_up(running.id).await {
                    self.leave(running);
                }
                continue;
            }
            if led && !self.is_silent() {
                since = now;
                continue;
            }
            if now.saturating_duration_since(since) < ORPHAN {
                continue;
            }
            since = now;
            if self.is_given_up(running.id).await {
                self.leave(running);
            }
        }
    }

    /// True when every voter has acknowledged a message of this leader within the last [`ORPHAN`].
    fn is_heard_by_all(&self, running: &Running<R>) -> bool {
        let m = running.metrics.borrow_watched();
        let Some(heartbeats) = &m.heartbeat else { return true };
        let heard = |id| heartbeats.get(&id).is_some_and(|at| at.as_ref().is_some_and(|at| at.elapsed() < ORPHAN));
        m.membership_config.voter_ids().all(|id| id == running.id || heard(id))
    }

    /// True while the leader that this node knows has said nothing for [`ORPHAN`]: openraft keeps its name until there is another.
    fn is_silent(&self) -> bool {
        let heard = *self.heard.lock().expect("nothing panics while it holds this lock");
        heard.is_none_or(|at| at.elapsed() > ORPHAN)
    }

    /// Entries that a restart would apply again.
    pub(crate) fn behind_tables(&self) -> u64 {
        self.group.applied().0.saturating_sub(self.group.flushed().0)
    }

    /// Brings what is applied into tables, so that the next open has nothing to apply again. All replicas rotate with it:
    /// those that are closed next find it done, or wait for their own part of it. Without a leader or in time it is left out, and
    /// nothing is lost.
    async fn flush_to_close(self: &Arc<Self>, running: &Arc<Running<R>>) {
        let entries = self.behind_tables();
        if entries <= CLOSE_REPLAY_MAX {
            return;
        }
        if self.leader_of(running).is_some() {
            let write = Write { body: CommandBody::Rotate, durability: Durability::Quorum };
            match R::timeout(CLOSE_ROTATE, self.write(write).boxed()).await {
                Ok(Ok(applied)) => {
                    let before = LogIndex(applied.index.0.saturating_sub(1));
                    if R::timeout(CLOSE_FLUSH, self.group.flushed_beyond(before)).await.is_err() {
                        let entries = self.behind_tables();
                        return tracing::warn!(entries, "not flushed in time: the next open applies entries again");
                    }
                    return tracing::info!(entries, left = self.behind_tables(), "flushed to close");
                }
                Ok(Err(error)) => tracing::warn!(%error, entries, "no rotation"),
                Err(_) => tracing::warn!(entries, "no rotation in time"),
            }
        }
        // Others closed before, and rotated: what they have installed is being written here.
        let until = R::Instant::now() + CLOSE_ROTATE;
        let is_writing = || self.group.frozen_generations() > 0 || self.group.status().absent_jobs > 0;
        while self.behind_tables() > CLOSE_REPLAY_MAX && is_writing() {
            if R::timeout_at(until, self.group.flushed_beyond(self.group.flushed())).await.is_err() {
                break;
            }
        }
        let left = self.behind_tables();
        if left > CLOSE_REPLAY_MAX {
            tracing::warn!(left, "the next open applies entries again");
        }
    }

    pub(crate) async fn close(self: &Arc<Self>) -> Result<()> {
        if self.phase() == Phase::Closed {
            return Ok(());
        }
        let groups: Vec<Arc<Self>> = self.groups().values().cloned().collect();
        for group in groups {
            group.close_replica().await;
        }
        let failed = matches!(self.phase(), Phase::Failed(_));
        self.close_replica().await;
        self.transport.close().await;
        match self.engine.close().await {
            // The volume left service already, and its close can say no more than that.
            Err(_) if failed => Ok(()),
            result => Ok(result?),
        }
    }

    /// Of two that are left the one that closes is needed for what the new leader commits first: only then does that one know what was
    /// committed before, a rotation among it.
    async fn await_first_commit(&self, running: &Running<R>) {
        let mut metrics = running.metrics.clone();
        let committed = metrics.wait_until(|m| m.last_applied.as_ref().is_some_and(|id| term_of(id) >= m.current_term));
        if R::timeout(FIRST_COMMIT, committed).await.is_err() {
            tracing::warn!("the new leader has committed nothing in time");
        }
    }

    /// Ends what this replica does, in order.
    async fn close_replica(self: &Arc<Self>) {
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        if let Some(running) = &running
            && self.phase() == Phase::Member
        {
            // First, while it still leads or follows: a rotation is an entry, and so is what the flush produced.
            self.flush_to_close(running).await;
        }
        if let Some(running) = &running
            && self.phase() == Phase::Member
            && self.leader_of(running) == Some(running.id)
        {
            match R::timeout(HAND_OVER, self.hand_over(running, None)).await {
                Ok(Ok(to)) => {
                    tracing::info!(to, "handed leadership over");
                    self.await_first_commit(running).await;
                }
                // A leader without other voters is the common case.
                Ok(Err(e)) if e.kind() == ErrorKind::Invalid => {}
                Ok(Err(error)) => tracing::warn!(%error, "leadership was not handed over"),
                Err(_) => tracing::warn!("leadership was not handed over in time"),
            }
        }
        self.set_phase(Phase::Closed);
        self.closing.set();
        self.progress.close();
        self.log.detach();
        if let Some(running) = running {
            // Its error says that the core panicked or was cancelled; nothing more can be done here.
            let _ = running.raft.shutdown().await;
        }
        *self.running.write().expect("nothing panics while it holds this lock") = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_at_rest_is_sealed_once() {
        let mut idle = Idle::default();
        let wanted = |idle: &mut Idle, end| (0..50).filter(|_| idle.wants_seal(Lsn(end))).count();
        assert_eq!(wanted(&mut idle, 4096), 1);
        // The seal itself moves the end.
        idle.sealed = Some(Lsn(8192));
        assert_eq!(wanted(&mut idle, 8192), 0);
        // Something was written with the seal: that is not proven.
        assert_eq!(wanted(&mut idle, 12288), 1);
    }
}
