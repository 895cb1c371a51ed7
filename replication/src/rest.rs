//! What keeps a group beside the first alive: next to nothing while it is at rest.
//!
//! # Place
//! one task of the host ([`Inner::tend_groups`]) goes over its groups; what it does for each is the pure [`next`], for which a table of
//! cases stands below. openraft's own clock is off in these groups: it neither sends heartbeats nor calls elections by itself
//! # Invariants
//! - R1. The lease of a leader and the time for which a voter refuses others are as in the first group. At rest nobody renews them, so
//!   whatever needs a lease renews it first ([`Inner::awaken`]): a round to a majority, as for a linearizable read.
//! - R2. Whether a leader lives is known of its process ([`crate::liveness`]), and whether it leads of what its process says. Its own
//!   heartbeats are the proof of that from one end to the other: without one for [`SILENT`] it is not believed.
//! - R3. A voter that was part of a lease calls an election no earlier than one and a half leases after it last heard anything from the
//!   process that led, as in the first group. Every election is asked for first (pre-vote).
//! - R4. A voter that hears the process of its leader refuses its vote, also while no lease binds it; so does a leader that hears a
//!   majority. A node that a leader alone cannot reach disturbs nobody.
//! - R5. A leader that hears no majority sends nothing, also not for who reads or writes: one node that still hears it would keep the
//!   others from electing.
//! - R6. Of several voters that miss a leader one calls the election and the others follow it in turn, [`Seen::rank`]; who comes first
//!   differs from group to group, so leaders spread. A witness comes last, and a lease later than its turn.
//!
//! # Why not
//! Raft's own heartbeats at a tenth of their rate, with leases as much longer: who gave a lease keeps it, and the death of a process would
//! be without remedy for as long. Heartbeats of all groups in one message: each of them wakes a core on either side.
//!
//! ```text
//! row  the replica of a group                                        then
//! A    leads and hears no majority                                   is silent
//! B    leads; was used of late, or is not acknowledged any more      sends a heartbeat at each look
//! C    leads; at rest; the last heartbeat is long ago                sends one
//! D    leads; at rest; it is not                                     does nothing
//! E    does not lead, and believes its leader or has no vote         does nothing
//! F    has a vote and misses a leader; its turn is not yet           does nothing
//! G    has a vote and misses a leader; it is its turn                asks for an election
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_wal::GroupId;
use openraft::async_runtime::WatchReceiver;
use openraft::{ReadPolicy, ServerState};
use openraft_rt::Instant;

use crate::liveness::Pulse;
use crate::network::method;
use crate::node::{Inner, Running};
use crate::types::Membership;
use crate::wire::{Writer, decode_result};
use crate::{NodeId, Runtime};

/// Longest time between two looks of the host.
const LOOK_MAX: Duration = Duration::from_millis(100);
/// Heartbeats of the first group for which a group counts as used after the last write or read.
const USED: u32 = 20;
/// Heartbeats of the first group between two heartbeats of a group at rest.
const REST: u32 = 10;
/// Leases after which a leader takes a process for gone that it does not hear: twice as long as who calls an election waits, so that one
/// that stood still for a moment does not give up what the others have not.
const GONE: u32 = 3;
/// Leases without a heartbeat after which a leader is not believed any more.
const SILENT: u32 = 10;
/// An election that came to nothing is tried again after a lease, two, and then each time after so many.
const TRIES_PAUSE_MAX: u32 = 4;

/// What the rows rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen<I> {
    leads: bool,
    /// Of a leader: it hears a majority of the voters' processes.
    majority: bool,
    /// Of a leader: a majority has acknowledged it lately.
    acknowledged: bool,
    votes: bool,
    witness: bool,
    /// Another is known to lead, and is believed (R2).
    believes: bool,
    /// The leader that it knows, and the term.
    view: (Option<u64>, u64),
    last_log: Option<u64>,
    /// Voters that are heard and whose turn is before this one's.
    rank: u32,
    used: bool,
    now: I,
}

/// What a replica does at a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Heartbeat,
    Elect,
}

/// What a replica remembers between two looks.
#[derive(Clone, Copy, Debug)]
struct Memory<I> {
    view: (Option<u64>, u64),
    /// When that became so.
    since: I,
    last_log: Option<u64>,
    used_at: I,
    heartbeat_at: I,
    /// When an election may be called, once a leader is missed.
    elect_at: Option<I>,
    tries: u32,
}

impl<I: Instant> Memory<I> {
    fn new(now: I) -> Self {
        let view = (None, 0);
        Self { view, since: now, last_log: None, used_at: now, heartbeat_at: now, elect_at: None, tries: 0 }
    }

    /// Takes in what is new. `heartbeat` and `lease` are those of the first group.
    fn next(&mut self, seen: &Seen<I>, heartbeat: Duration, lease: Duration) -> Step {
        if self.view != seen.view {
            (self.view, self.since, self.elect_at) = (seen.view, seen.now, None);
        }
        if seen.used || self.last_log != seen.last_log {
            (self.last_log, self.used_at) = (seen.last_log, seen.now);
        }
        if seen.leads {
            (self.elect_at, self.tries) = (None, 0);
            return self.lead(seen, heartbeat);
        }
        if seen.believes || !seen.votes {
            (self.elect_at, self.tries) = (None, 0);
            return Step::Nothing;
        }
        let turn = heartbeat * seen.rank;
        // Who has just given its vote waits for what becomes of it, as Raft does; a leader that is missed was waited for already.
        let wait = if seen.view.0.is_some() && !seen.witness { turn } else { lease + turn };
        let at = *self.elect_at.get_or_insert(seen.now + wait);
        if seen.now < at {
            return Step::Nothing;
        }
        self.elect_at = Some(seen.now + lease * (1_u32 << self.tries).min(TRIES_PAUSE_MAX) + turn);
        self.tries = (self.tries + 1).min(TRIES_PAUSE_MAX);
        Step::Elect
    }

    /// Rows A to D.
    fn lead(&mut self, seen: &Seen<I>, heartbeat: Duration) -> Step {
        if !seen.majority {
            return Step::Nothing;
        }
        let is_used = seen.now.saturating_duration_since(self.used_at) < heartbeat * USED;
        let rested = seen.now.saturating_duration_since(self.heartbeat_at);
        let interval = if is_used || !seen.acknowledged { heartbeat } else { heartbeat * REST };
        // A look comes a little early or late.
        if rested + heartbeat / 10 < interval {
            return Step::Nothing;
        }
        self.heartbeat_at = seen.now;
        Step::Heartbeat
    }
}

/// Of a replica of another group than the first.
pub(crate) struct Rest<R: Runtime> {
    /// A write or a read began since the last look.
    used: AtomicBool,
    memory: Mutex<Memory<R::Instant>>,
}

impl<R: Runtime> Default for Rest<R> {
    fn default() -> Self {
        Self { used: AtomicBool::new(false), memory: Mutex::new(Memory::new(R::Instant::now())) }
    }
}

/// Whether more than half of each of the sets of voters is counted.
fn is_majority(membership: &Membership, counts: impl Fn(u64) -> bool) -> bool {
    membership.get_joint_config().iter().all(|voters| {
        let counted = voters.iter().filter(|id| counts(**id)).count();
        counted > voters.len() / 2
    })
}

/// How many voters that may call an election come before `me`: in the order of their ids, which begins elsewhere in each group, witnesses
/// behind all others.
fn rank(
    voters: impl Iterator<Item = u64>,
    me: u64,
    group: GroupId,
    may: impl Fn(u64) -> bool,
    witness: impl Fn(u64) -> bool,
) -> u32 {
    let mut voters: Vec<u64> = voters.collect();
    voters.sort_unstable();
    voters.dedup();
    if let Ok(count @ 1..) = u64::try_from(voters.len()) {
        voters.rotate_left(usize::try_from(group.0 % count).unwrap_or_default());
    }
    voters.sort_by_key(|id| witness(*id));
    let before = voters.into_iter().take_while(|id| *id != me).filter(|id| may(*id)).count();
    u32::try_from(before).unwrap_or(u32::MAX)
}

impl<R: Runtime> Inner<R> {
    /// Of the host: looks after all other groups. One task, whatever their number.
    pub(crate) async fn tend_groups(self: &Arc<Self>) {
        let look = self.options.heartbeat.min(LOOK_MAX);
        let mut relieved = R::Instant::now();
        loop {
            R::sleep(look).await;
            let groups: Vec<Arc<Self>> = self.groups().values().cloned().collect();
            if groups.is_empty() {
                continue;
            }
            let mut leads = BTreeMap::new();
            for group in groups {
                group.keep_house(&mut relieved).await;
                if let Some(term) = group.tend(self).await {
                    leads.insert(group.number, term);
                }
            }
            self.liveness.claim(leads);
            self.ask_for_pulses();
        }
    }

    /// Asks those for a sign of life that gave none for a heartbeat (L1 of [`crate::liveness`]).
    fn ask_for_pulses(self: &Arc<Self>) {
        let me = self.engine.identity().node;
        for member in self.members() {
            if member.id.0 == me || !self.liveness.ask(member.id.0, self.options.heartbeat * 9 / 10) {
                continue;
            }
            let mut body = Writer::new();
            self.pulse().write(&mut body);
            let (this, body) = (self.clone(), body.finish());
            self.spawn(async move {
                let timeout = this.options.election_timeout;
                let answer = this.call_member(member.id, method::PULSE, body, timeout).await;
                if let Ok(pulse) = answer.and_then(|bytes| decode_result(&bytes, Pulse::read)) {
                    this.take_pulse(member.id.0, pulse);
                }
            });
        }
    }

    /// What this process says of itself.
    pub(crate) fn pulse(&self) -> Pulse {
        Pulse { room: self.own_room(), leads: self.liveness.claims() }
    }

    /// What another process says of itself.
    pub(crate) fn take_pulse(&self, from: u64, pulse: Pulse) {
        self.rooms.note_room(from, pulse.room);
        self.liveness.note(from, pulse);
    }

    /// How long nothing may come from a process that is taken for alive.
    fn alive_within(&self) -> Duration {
        self.options.election_timeout * 3 / 2
    }

    fn see(&self, running: &Running<R>, host: &Self) -> Seen<R::Instant> {
        let now = R::Instant::now();
        let me = running.id;
        let alive = |id: u64| id == me || host.liveness.is_heard(id, self.alive_within());
        let memory = *self.rest.memory.lock().expect("nothing panics while it holds this lock");
        let m = running.metrics.borrow_watched();
        let membership = m.membership_config.membership();
        let leads = m.state == ServerState::Leader;
        // One that was a leader before it was started again, or is to be the first, bears its own name.
        let leader = m.current_leader.filter(|id| leads || *id != me);
        let view = (leader, m.current_term);
        // Neither has proven itself yet.
        let since = if view == memory.view { memory.since } else { now };
        let lately = |at: Option<R::Instant>| {
            let at = at.map_or(since, |at| at.max(since));
            now.saturating_duration_since(at) < self.options.election_timeout * SILENT
        };
        let heard = *self.heard.lock().expect("nothing panics while it holds this lock");
        let believes = leader.is_some_and(|id| {
            // By then it knows that it leads, and says so.
            let after = since + self.options.election_timeout;
            id != me && alive(id) && lately(heard) && !host.liveness.disowns(id, self.number, view.1, after)
        });
        let alone = membership.voter_ids().count() == 1;
        let may_call = |id| leader != Some(id) && alive(id);
        let rank = || {
            // The first membership of a group says nothing of anybody.
            let witnesses: Vec<u64> = host.members().into_iter().filter(|m| m.witness).map(|m| m.id.0).collect();
            rank(membership.voter_ids(), me, self.number, may_call, |id| witnesses.contains(&id))
        };
        Seen {
            leads,
            majority: leads && self.hears_majority(membership, host),
            acknowledged: leads && (alone || lately(m.last_quorum_acked.as_ref().map(|at| **at))),
            votes: membership.voter_ids().any(|id| id == me),
            believes,
            view,
            last_log: m.last_log_index,
            rank: if leads || believes { 0 } else { rank() },
            witness: self.is_witness(),
            used: false,
            now,
        }
    }

    /// A look of the host at a group. Answers the term in which this process claims to lead it.
    async fn tend(&self, host: &Self) -> Option<u64> {
        let running = self.running().ok()?;
        let used = self.rest.used.swap(false, Ordering::Relaxed);
        let seen = Seen { used, ..self.see(&running, host) };
        let step = {
            let mut memory = self.rest.memory.lock().expect("nothing panics while it holds this lock");
            memory.next(&seen, self.options.heartbeat, self.options.election_timeout)
        };
        // The error of either says that the core has stopped.
        let _ = match step {
            Step::Nothing => Ok(()),
            Step::Heartbeat => running.raft.trigger().heartbeat().await,
            Step::Elect => {
                tracing::info!(group = self.number.0, view = ?seen.view, "misses a leader: asks for an election");
                running.raft.trigger().elect(true).await
            }
        };
        (seen.leads && seen.majority && seen.acknowledged).then_some(seen.view.1)
    }

    /// Of another group than the first: whether this node stands by the leader that it knows, itself or another (R4).
    pub(crate) fn stands_by_leader(&self, running: &Running<R>) -> bool {
        let Some(host) = self.host() else { return false };
        let seen = self.see(running, &host);
        if seen.leads {
            return seen.majority && seen.acknowledged;
        }
        // Shorter than what lets a voter call an election: who calls heard the leader about as long ago.
        seen.believes && seen.view.0.is_some_and(|id| host.liveness.is_heard(id, self.options.election_timeout))
    }

    /// Whether this leader may be heard by a majority. In the first group openraft itself goes silent (R5).
    pub(crate) fn may_have_majority(&self, running: &Running<R>) -> bool {
        let Some(host) = self.host() else { return true };
        self.hears_majority(running.metrics.borrow_watched().membership_config.membership(), &host)
    }

    fn hears_majority(&self, membership: &Membership, host: &Self) -> bool {
        let me = self.engine.identity().node;
        is_majority(membership, |id| id == me || host.liveness.is_heard(id, self.options.election_timeout * GONE))
    }

    /// Somebody reads or writes here.
    pub(crate) fn note_use(&self) {
        if self.host.is_some() {
            self.rest.used.store(true, Ordering::Relaxed);
        }
    }

    /// Of a leader of another group than the first: has the lease renewed that openraft wants for a new entry, if it is about to end (R1).
    pub(crate) async fn awaken(&self, running: &Running<R>) {
        if self.host.is_none() {
            return;
        }
        self.note_use();
        let lease = self.options.election_timeout.saturating_sub(self.options.heartbeat);
        let holds = Self::metrics_of(running, |m| {
            let alone = m.membership_config.voter_ids().count() == 1;
            let acked = m.last_quorum_acked.as_ref().is_some_and(|at| at.elapsed() < lease);
            m.state != ServerState::Leader || alone || acked
        });
        if holds || !self.may_have_majority(running) {
            return;
        }
        let round = running.raft.get_read_linearizer(ReadPolicy::ReadIndex);
        // Without an answer the entry is refused, and whoever proposes it tries again.
        let _ = R::timeout(self.options.election_timeout, round).await;
    }

    /// Of another group than the first, at each look: what its own task does in the first.
    async fn keep_house(&self, relieved: &mut R::Instant) {
        if self.closing.is_set() {
            return;
        }
        self.log.resume();
        // The log and its ring are the host's to look at.
        if self.log.is_stalled() || self.group.failure().is_some() {
            self.look_after_volume(relieved).await;
        }
    }

    /// Whether a member was heard lately by a leader of another group than the first; `None` in the first.
    pub(crate) fn hears_process(&self, id: NodeId, within: Duration) -> Option<bool> {
        self.host.as_ref()?;
        Some(self.host().is_some_and(|host| host.liveness.is_heard(id.0, within)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Time = <crate::TokioRuntime as openraft_rt::AsyncRuntime>::Instant;

    const HEARTBEAT: Duration = Duration::from_millis(100);
    const LEASE: Duration = Duration::from_millis(300);

    /// A follower that believes its leader.
    fn follower(now: Time) -> Seen<Time> {
        Seen {
            leads: false,
            majority: false,
            acknowledged: false,
            votes: true,
            witness: false,
            believes: true,
            view: (Some(1), 5),
            last_log: Some(9),
            rank: 0,
            used: false,
            now,
        }
    }

    fn leader(now: Time) -> Seen<Time> {
        Seen { leads: true, majority: true, acknowledged: true, believes: false, ..follower(now) }
    }

    /// The times, in steps of a heartbeat, at which something is done in so many.
    fn times(steps: u32, wanted: Step, seen: impl Fn(u32, Time) -> Seen<Time>) -> Vec<u32> {
        let began = Time::now();
        let mut memory = Memory::new(began);
        let mut at = |step: u32| memory.next(&seen(step, began + HEARTBEAT * step), HEARTBEAT, LEASE) == wanted;
        (0..steps).filter(|step| at(*step)).collect()
    }

    #[test]
    fn a_leader_at_rest_sends_a_tenth_of_the_heartbeats() {
        let beats = |seen: &dyn Fn(u32, Time) -> Seen<Time>| times(60, Step::Heartbeat, seen);
        // The term began with its first look; from 20 on it is at rest.
        let at_rest = beats(&|_, now| leader(now));
        assert_eq!(at_rest, (1..20).chain([29, 39, 49, 59]).collect::<Vec<_>>(), "rows B, C and D");
        let used = beats(&|step, now| Seen { used: step == 30, ..leader(now) });
        assert_eq!(used, (1..20).chain([29]).chain(30..50).chain([59]).collect::<Vec<_>>(), "row B: used");
        let wrote = beats(&|step, now| Seen { last_log: Some(u64::from(step > 30)), ..leader(now) });
        assert_eq!(wrote, (1..20).chain([29]).chain(31..51).collect::<Vec<_>>(), "row B: written");
        let unheard = beats(&|step, now| Seen { acknowledged: step < 40, ..leader(now) });
        assert_eq!(unheard, (1..20).chain([29, 39]).chain(40..60).collect::<Vec<_>>(), "row B: not acknowledged");
        assert!(beats(&|_, now| Seen { majority: false, ..leader(now) }).is_empty(), "row A");
        assert!(beats(&|_, now| follower(now)).is_empty());
    }

    #[test]
    fn who_misses_a_leader_asks_for_an_election_in_its_turn() {
        let calls = |seen: &dyn Fn(u32, Time) -> Seen<Time>| times(50, Step::Elect, seen);
        assert!(calls(&|_, now| follower(now)).is_empty(), "row E: it believes");
        assert!(calls(&|_, now| leader(now)).is_empty());
        let misses = |now| Seen { believes: false, ..follower(now) };
        assert!(calls(&|_, now| Seen { votes: false, ..misses(now) }).is_empty(), "row E: it has no vote");
        // Rows F and G: at once, and again after one, two and four leases.
        let dies = |rank| calls(&move |step, now| if step < 10 { follower(now) } else { Seen { rank, ..misses(now) } });
        assert_eq!(dies(0), [10, 13, 19, 31, 43]);
        assert_eq!(dies(1), [11, 15, 22, 35, 48]);
        let witness =
            |step, now| Seen { witness: true, rank: 2, ..if step < 10 { follower(now) } else { misses(now) } };
        assert_eq!(calls(&witness).first(), Some(&15), "a lease behind its turn");
        // One that comes back in time, and is missed anew.
        let twice = calls(&|step, now| if matches!(step, 12 | 30) { misses(now) } else { follower(now) });
        assert_eq!(twice, [12, 30], "each time at once");
        // It has given its vote to another: that one has a lease of time.
        let voted = calls(&|step, now| Seen { view: (None, if step < 11 { 6 } else { 7 }), ..misses(now) });
        assert_eq!(voted, [3, 6, 14, 26, 38]);
    }

    #[test]
    fn groups_have_first_candidates_of_their_own() {
        let first = |group, dead: Option<u64>| {
            let may = |id| Some(id) != dead;
            let ranks = [1, 2, 3].map(|me| rank([3, 1, 2].into_iter(), me, GroupId(group), may, |_| false));
            let alive = [1, 2, 3].into_iter().zip(ranks).filter(|(id, _)| Some(*id) != dead);
            alive.min_by_key(|(_, rank)| *rank)
        };
        assert_eq!([3, 4, 5, 6].map(|group| first(group, None)), [1, 2, 3, 1].map(|id| Some((id, 0))));
        assert_eq!([3, 4, 5].map(|group| first(group, Some(1))), [2, 2, 3].map(|id| Some((id, 0))));
        assert_eq!(rank([4].into_iter(), 4, GroupId(9), |_| true, |_| false), 0);
        let behind =
            |group| [1, 2, 3].map(|me| rank([1, 2, 3].into_iter(), me, GroupId(group), |_| true, |id| id == 1));
        assert_eq!([3, 4, 5].map(behind), [[2, 0, 1], [2, 0, 1], [2, 1, 0]]);
    }

    #[test]
    fn a_majority_is_one_of_each_set_of_voters() {
        let sets = |sets: &[&[u64]]| {
            let nodes: BTreeMap<u64, crate::types::Member> =
                sets.iter().flat_map(|ids| ids.iter()).map(|id| (*id, crate::types::Member::default())).collect();
            Membership::new(sets.iter().map(|ids| ids.iter().copied().collect()).collect(), nodes)
                .expect("nodes of all")
        };
        let check = |all: &[&[u64]], heard: &[u64]| is_majority(&sets(all), |id| heard.contains(&id));
        assert!(check(&[&[1, 2, 3]], &[1, 3]) && !check(&[&[1, 2, 3]], &[3]));
        assert!(!check(&[&[1, 2]], &[1]) && check(&[&[1]], &[1]));
        assert!(!check(&[&[1, 2, 3], &[3, 4, 5]], &[1, 2, 3]) && check(&[&[1, 2, 3], &[3, 4, 5]], &[1, 3, 4]));
    }

    #[test]
    fn the_table_in_the_text_has_the_rows_of_the_tests() {
        let rows: String = include_str!("rest.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! "))
            .filter(|line| {
                line.as_bytes().get(1..5) == Some(b"    ") && line.starts_with(|c: char| c.is_ascii_uppercase())
            })
            .filter_map(|line| line.chars().next())
            .collect();
        assert_eq!(rows, "ABCDEFG");
    }
}
