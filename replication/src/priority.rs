//! Which voter shall lead of those that can, and when a leader hands over because of it: a pure function over a table of cases.
//!
//! # Place
//! `tasks` looks at each tick, behind the look at the disk; the decision is the pure [`preferred`]
//! # Invariants
//! - P1. A priority is a wish and no part of Raft: every voter may be elected, whatever its priority, and votes do not look at it.
//! - P2. Leadership goes to a higher priority only. So among equals nothing moves, and hand-overs come to an end.
//! - P3. Nobody leads by priority whom `disk` would tell to go: the same facts are asked for, and a slow disk must have become faster
//!   than what it was left for.
//! - P4. Who was asked to lead keeps leadership for [`ASKED_GRACE`]: an operator had a reason, and so had a leader that left for its disk
//!   or was closed. A failover asks nobody, so there leadership returns sooner.
//! - P5. A leader that has led for less than [`LED_MIN`], or that tried less than [`PAUSE`] ago, does not try.
//! - P6. The membership does not change while a hand-over by priority is under way, nor the other way round.
//! - P7. A leader that goes in any case, since it is closed, was asked to go without a target, or holds other tables, prefers as well, and
//!   asks nobody: it does not wait for the answer of a slow disk. Who leads then with a bad one leaves it by `disk`.
//!
//! # Crash
//! The time of P4 is in memory of the node that was asked. With its process the wish is over: another is elected, or it is again.
//!
//! # Why not
//! Candidates of higher priority that wait less before they call an election: a node that lags would stand in the way of one that could
//! lead, and the tail of each failover would rest on it.
//!
//! ```text
//! row  the leader                                              then
//! A    leads, tried, or was asked to lead too short a time ago  stays
//! B    rested; the membership is changing                       stays
//! C    rested, nothing changes; its own disk is wrong           stays: `disk` chooses who leads
//! D    its disk is well too; no other voter is fit              stays
//! E    its disk is well too; some are fit                       the highest of them leads; of equals the one that lacks least
//!
//! row  another voter                                            is
//! F    its priority is not higher                               not preferred
//! G    higher; it does not answer                               silent
//! H    it answers; it lacks more than is bearable               behind
//! I    it is near; full, stalled or failing                     broken
//! J    none of these; its writes are slow against the group     slow
//! K    none of these; they are not                              fit
//!
//! row  another voter, to a leader that goes (P7)                is asked
//! L    heard of late, and near                                  first: the highest; of equals the one that lacks least
//! M    heard of late; it lacks more, or nobody knows how much   behind all of L: the one that lacks least
//! N    not heard of late                                        behind all of M: the one that lacks least
//! ```

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft_rt::Instant;

use crate::disk::{self, DiskHealth, LAG_MAX, LED_MIN, Other, SLOW_FACTOR, STUCK, is_slow};
use crate::membership::lag_of;
use crate::node::{Inner, Running};
use crate::{MemberInfo, MemberRole, NodeId, Runtime};

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_secs(10);
/// Pause after others were asked and nobody was fit.
const ASK_PAUSE: Duration = Duration::from_secs(2);
/// How long a node that was asked to lead does not look at priorities.
pub(crate) const ASKED_GRACE: Duration = Duration::from_secs(60);
/// How many times the median of the group a disk takes that is not given leadership. Less than what it is left for, so that one at the
/// border does not take and give in turns.
const RETURN_FACTOR: u32 = SLOW_FACTOR / 2;

/// What a leader knows of itself.
#[derive(Clone, Copy, Debug)]
struct Leader {
    priority: u8,
    /// P4 and P5 are observed.
    rested: bool,
    /// A change of the membership is under way (P6).
    changing: bool,
    health: DiskHealth,
}

/// Another voter, as the leader knows it.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    priority: u8,
    /// Without a health it does not answer.
    other: Other,
}

/// What a voter is to a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    NotPreferred,
    Silent,
    Behind,
    Broken,
    Slow,
    Fit,
}

fn is_slow_in(health: &DiskHealth, median: Option<Duration>, factor: u32) -> bool {
    health
        .write_latency
        .is_some_and(|latency| latency >= STUCK || median.is_some_and(|median| is_slow(latency, median, factor)))
}

/// Rows F to K.
fn judge(leader: &Leader, candidate: &Candidate, median: Option<Duration>) -> Verdict {
    if candidate.priority <= leader.priority {
        return Verdict::NotPreferred;
    }
    let Some(health) = candidate.other.health else { return Verdict::Silent };
    if candidate.other.lag.is_none_or(|lag| lag > LAG_MAX) {
        return Verdict::Behind;
    }
    if health.is_broken() {
        return Verdict::Broken;
    }
    if is_slow_in(&health, median, RETURN_FACTOR) {
        return Verdict::Slow;
    }
    Verdict::Fit
}

/// Who shall lead in the place of `leader`; `None` when it stays. Rows A to E.
fn preferred(leader: &Leader, candidates: &[Candidate]) -> Option<u64> {
    if !leader.rested || leader.changing {
        return None;
    }
    let others: Vec<Other> = candidates.iter().map(|candidate| candidate.other).collect();
    let median = disk::median(&leader.health, &others);
    if leader.health.is_broken() || is_slow_in(&leader.health, median, SLOW_FACTOR) {
        return None;
    }
    let fit = candidates.iter().filter(|candidate| judge(leader, candidate, median) == Verdict::Fit);
    let best = fit.min_by_key(|c| (Reverse(c.priority), c.other.lag, c.other.id))?;
    Some(best.other.id)
}

/// Another voter, as a leader knows it that goes and asks nobody.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heir {
    pub(crate) id: u64,
    priority: u8,
    lag: Option<u64>,
    heard: bool,
    /// How many times it was told to lead and did not take over in its time.
    pub(crate) told: u32,
}

/// How well a leader that goes reaches a voter, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    Near,
    Behind,
    Silent,
}

/// Rows L to N.
fn reach(heir: &Heir) -> Reach {
    match (heir.heard, heir.lag) {
        (true, Some(lag)) if lag <= LAG_MAX => Reach::Near,
        (true, _) => Reach::Behind,
        (false, _) => Reach::Silent,
    }
}

/// Who shall lead in the place of a leader that goes (P7): of those that were told least often the one in the first row.
pub(crate) fn heir(heirs: &[Heir]) -> Option<u64> {
    let rank = |heir: &&Heir| {
        let reach = reach(heir);
        let priority = if reach == Reach::Near { heir.priority } else { 0 };
        (heir.told, reach, Reverse(priority), heir.lag.unwrap_or(u64::MAX), heir.id)
    };
    heirs.iter().min_by_key(rank).map(|heir| heir.id)
}

/// When a leader looks at priorities that sees `now` that it leads (P4, P5).
fn rests_until<I: Instant>(now: I, asked: Option<I>) -> I {
    let led = now + LED_MIN;
    asked.map_or(led, |at| led.max(at + ASKED_GRACE))
}

/// What a leader remembers between two looks.
pub(crate) struct Preference<R: Runtime> {
    term: u64,
    /// P4 and P5.
    not_before: R::Instant,
}

impl<R: Runtime> Preference<R> {
    pub(crate) fn new() -> Self {
        Self { term: 0, not_before: R::Instant::now() }
    }
}

impl<R: Runtime> Inner<R> {
    /// Hands leadership to a voter of a higher priority that is fit, if this node leads.
    pub(crate) async fn mind_priority(self: &Arc<Self>, running: &Arc<Running<R>>, state: &mut Preference<R>) {
        let (leads, term) = Self::metrics_of(running, |m| (m.current_leader == Some(running.id), m.current_term));
        if !leads {
            return;
        }
        let now = R::Instant::now();
        if state.term != term {
            let asked = *self.asked_to_lead.lock().expect("nothing panics while it holds this lock");
            *state = Preference { term, not_before: rests_until(now, asked) };
        }
        if now < state.not_before || self.disk_health().is_broken() {
            return;
        }
        let members = self.members();
        let priority = |id: u64| members.iter().find(|m| m.id.0 == id).map_or(0, |m| m.priority);
        let own = priority(running.id);
        // Nobody is asked while there is nobody to prefer.
        let may_lead = |m: &MemberInfo| m.role == MemberRole::Voter && !m.witness;
        if !members.iter().any(|m| may_lead(m) && m.priority > own && self.hears(running, m.id)) {
            return;
        }
        let others = self.ask_disks(running).await;
        state.not_before = R::Instant::now() + ASK_PAUSE;
        // P6. An operator's wish that is under way goes before.
        let (Ok(_members), Ok(_wish)) = (self.changing.try_acquire(), self.handing_over.try_acquire()) else { return };
        let changing = Self::metrics_of(running, |m| {
            let effective = &m.membership_config;
            effective.membership().get_joint_config().len() > 1
                || effective.log_id() != m.committed_membership_config.log_id()
        });
        let heard =
            |other: Other| Other { health: other.health.filter(|_| self.hears(running, NodeId(other.id))), ..other };
        let candidates: Vec<Candidate> =
            others.into_iter().map(|other| Candidate { priority: priority(other.id), other: heard(other) }).collect();
        let leader = Leader { priority: own, rested: true, changing, health: self.disk_health() };
        let Some(to) = preferred(&leader, &candidates) else { return };
        tracing::info!(
            to,
            own,
            priority = priority(to),
            "a voter with a higher priority can lead: it is handed leadership"
        );
        match self.hand_over(running, Some(to)).await {
            Ok(to) => {
                self.priority_hand_overs.fetch_add(1, Ordering::Relaxed);
                tracing::info!(to, "handed leadership over");
            }
            Err(error) => tracing::warn!(%error, to, "leadership was not handed over"),
        }
        state.not_before = R::Instant::now() + PAUSE;
    }

    /// The other voters, to choose from when this leader goes.
    pub(crate) fn heirs(&self, running: &Running<R>) -> Vec<Heir> {
        let members = self.members();
        let voters = members.iter().filter(|m| m.role == MemberRole::Voter && !m.witness && m.id.0 != running.id);
        let of = |m: &MemberInfo| Heir {
            id: m.id.0,
            priority: m.priority,
            lag: Self::metrics_of(running, |metrics| lag_of(metrics, m.id.0)),
            heard: self.hears(running, m.id),
            told: 0,
        };
        voters.map(of).collect()
    }

    /// Whether a member has acknowledged a message of this leader lately: one that answers other requests may take no part in Raft.
    pub(crate) fn hears(&self, running: &Running<R>, id: NodeId) -> bool {
        if let Some(heard) = self.hears_process(id, self.options.election_timeout * 2) {
            return heard;
        }
        let metrics = running.metrics.borrow_watched();
        let at = metrics.heartbeat.as_ref().and_then(|heartbeats| heartbeats.get(&id.0)?.as_ref());
        at.is_some_and(|at| at.elapsed() < self.options.election_timeout * 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well(micros: u64) -> DiskHealth {
        DiskHealth { write_latency: Some(Duration::from_micros(micros)), ..DiskHealth::default() }
    }

    fn broken() -> [DiskHealth; 3] {
        let none = DiskHealth::default();
        [
            DiskHealth { full: true, ..none },
            DiskHealth { stalled: true, ..well(200) },
            DiskHealth { failing: true, ..none },
        ]
    }

    /// Everything that a disk may say, and what it is when the median of the group is [`MEDIAN`]: broken, too slow to be given
    /// leadership, slow enough to be left for it.
    fn disks() -> Vec<(DiskHealth, [bool; 3])> {
        let sick = broken().map(|health| (health, [true, false, false]));
        let fine = [DiskHealth::default(), well(256), well(2048), well(3999)].map(|h| (h, [false, false, false]));
        let border = [well(4096), well(8191)].map(|h| (h, [false, true, false]));
        let slow = [well(8192), well(16384), well(1 << 20)].map(|h| (h, [false, true, true]));
        sick.into_iter().chain(fine).chain(border).chain(slow).collect()
    }

    const MEDIAN: Option<Duration> = Some(Duration::from_micros(1024));

    /// Rows F to K: each is tested for alone, in the words of the table, and exactly one of them is true of each input.
    #[test]
    fn exactly_one_row_matches_each_voter() {
        type Row = (char, fn(u8, &Candidate, [bool; 3]) -> bool, Verdict);
        let table: [Row; 6] = [
            ('F', |own, c, _| c.priority <= own, Verdict::NotPreferred),
            ('G', |own, c, _| c.priority > own && c.other.health.is_none(), Verdict::Silent),
            ('H', |own, c, _| c.priority > own && c.other.health.is_some() && !is_near(c), Verdict::Behind),
            ('I', |own, c, d| c.priority > own && c.other.health.is_some() && is_near(c) && d[0], Verdict::Broken),
            (
                'J',
                |own, c, d| c.priority > own && c.other.health.is_some() && is_near(c) && !d[0] && d[1],
                Verdict::Slow,
            ),
            (
                'K',
                |own, c, d| c.priority > own && c.other.health.is_some() && is_near(c) && !d[0] && !d[1],
                Verdict::Fit,
            ),
        ];
        let mut seen = std::collections::BTreeSet::new();
        let healths = disks().into_iter().map(|(health, said)| (Some(health), said)).chain([(None, [false; 3])]);
        for (health, said) in healths {
            for lag in [None, Some(0), Some(LAG_MAX), Some(LAG_MAX + 1), Some(u64::MAX)] {
                for (own, priority) in [(0, 0), (0, 1), (1, 0), (7, 7), (7, 8), (254, 255), (255, 255)] {
                    let leader = Leader { priority: own, rested: true, changing: false, health: well(256) };
                    let candidate = Candidate { priority, other: Other { id: 2, lag, health } };
                    let rows: Vec<_> = table.iter().filter(|(_, row, _)| row(own, &candidate, said)).collect();
                    let [(letter, _, verdict)] = rows.as_slice() else {
                        panic!("{candidate:?} is matched by {}", rows.len())
                    };
                    assert_eq!(judge(&leader, &candidate, MEDIAN), *verdict, "row {letter}: {candidate:?}");
                    seen.insert(*letter);
                }
            }
        }
        assert_eq!(seen.len(), table.len(), "every row is met: {seen:?}");
    }

    fn is_near(candidate: &Candidate) -> bool {
        candidate.other.lag.is_some_and(|lag| lag <= LAG_MAX)
    }

    /// Rows A to E in the same way.
    #[test]
    fn exactly_one_row_matches_each_leader() {
        type Row = (char, fn(&Leader, bool, bool) -> bool, Option<u64>);
        let table: [Row; 5] = [
            ('A', |l, _, _| !l.rested, None),
            ('B', |l, _, _| l.rested && l.changing, None),
            ('C', |l, wrong, _| l.rested && !l.changing && wrong, None),
            ('D', |l, wrong, fit| l.rested && !l.changing && !wrong && !fit, None),
            ('E', |l, wrong, fit| l.rested && !l.changing && !wrong && fit, Some(2)),
        ];
        let mut seen = std::collections::BTreeSet::new();
        for rested in [false, true] {
            for changing in [false, true] {
                for (health, [broken, _, slow]) in disks() {
                    for fit in [false, true] {
                        let leader = Leader { priority: 3, rested, changing, health };
                        let priority = if fit { 4 } else { 3 };
                        let others = [(2, priority), (3, 0), (4, 0)]
                            .map(|(id, priority)| Candidate { priority, other: other(id, 5, well(1024)) });
                        let wrong = broken || slow;
                        let rows: Vec<_> = table.iter().filter(|(_, row, _)| row(&leader, wrong, fit)).collect();
                        let [(letter, _, to)] = rows.as_slice() else {
                            panic!("{leader:?} is matched by {}", rows.len())
                        };
                        assert_eq!(preferred(&leader, &others), *to, "row {letter}: {leader:?}");
                        seen.insert(*letter);
                    }
                }
            }
        }
        assert_eq!(seen.len(), table.len(), "every row is met: {seen:?}");
    }

    fn other(id: u64, lag: u64, health: DiskHealth) -> Other {
        Other { id, lag: Some(lag), health: Some(health) }
    }

    #[test]
    fn the_highest_that_is_fit_leads() {
        let leader = Leader { priority: 1, rested: true, changing: false, health: well(256) };
        let check = |candidates: &[(u8, Other)], expect| {
            let candidates: Vec<_> =
                candidates.iter().map(|(priority, other)| Candidate { priority: *priority, other: *other }).collect();
            assert_eq!(preferred(&leader, &candidates), expect, "{candidates:?}");
        };
        let fine = well(256);
        let full = broken()[0];
        check(&[], None);
        check(&[(1, other(2, 0, fine)), (0, other(3, 0, fine))], None);
        check(&[(2, other(2, 0, fine)), (9, other(3, 900, fine))], Some(3));
        check(&[(9, other(2, 7, fine)), (9, other(3, 6, fine))], Some(3));
        check(&[(9, other(2, 7, fine)), (9, other(3, 7, fine))], Some(2));
        // The next one while the highest cannot.
        check(&[(2, other(2, 0, fine)), (9, other(3, 0, full))], Some(2));
        check(&[(2, other(2, 0, fine)), (9, other(3, LAG_MAX + 1, fine))], Some(2));
        check(&[(0, other(2, 0, fine)), (9, other(3, 0, full))], None);
        // Four times the median: a leader is not left for it, and nobody is given leadership with it.
        let five = [(9, other(2, 0, well(4096))), (0, other(3, 0, well(1024))), (0, other(4, 0, well(1024)))];
        check(&five, None);
        let slow = Leader { health: well(4096), ..leader };
        let others =
            [(9, well(1024)), (0, well(1024))].map(|(priority, h)| Candidate { priority, other: other(2, 0, h) });
        assert_eq!(preferred(&slow, &others), Some(2));
    }

    /// Rows L to N in the same way: no priority lifts a voter out of its row, and within a row each has its own order.
    #[test]
    fn exactly_one_row_matches_each_heir() {
        type Row = (char, fn(&Heir, bool) -> bool, Reach);
        let table: [Row; 3] = [
            ('L', |heir, near| heir.heard && near, Reach::Near),
            ('M', |heir, near| heir.heard && !near, Reach::Behind),
            ('N', |heir, _| !heir.heard, Reach::Silent),
        ];
        let mut seen = std::collections::BTreeSet::new();
        for heard in [false, true] {
            for (lag, near) in [(Some(0), true), (Some(LAG_MAX), true), (Some(LAG_MAX + 1), false), (None, false)] {
                for priority in [0, 255] {
                    let heir = Heir { id: 2, priority, lag, heard, told: 0 };
                    let rows: Vec<_> = table.iter().filter(|(_, row, _)| row(&heir, near)).collect();
                    let [(letter, _, expect)] = rows.as_slice() else {
                        panic!("{heir:?} is matched by {}", rows.len())
                    };
                    assert_eq!(reach(&heir), *expect, "row {letter}: {heir:?}");
                    seen.insert(*letter);
                }
            }
        }
        assert_eq!(seen.len(), table.len(), "every row is met: {seen:?}");
    }

    #[test]
    fn a_leader_that_goes_tells_the_highest_that_is_near() {
        let heard = |id, priority, lag| Heir { id, priority, lag, heard: true, told: 0 };
        let silent = |id, priority, lag| Heir { heard: false, ..heard(id, priority, lag) };
        let told = |heir: Heir, told| Heir { told, ..heir };
        let check = |heirs: &[Heir], expect| assert_eq!(heir(heirs), expect, "{heirs:?}");
        check(&[], None);
        // L: a priority below that of who goes is as good as any.
        check(&[heard(2, 0, Some(0)), heard(3, 9, Some(LAG_MAX))], Some(3));
        check(&[heard(2, 3, Some(9)), heard(3, 9, Some(0)), heard(4, 9, Some(7))], Some(3));
        check(&[heard(2, 0, Some(7)), heard(3, 0, Some(6))], Some(3));
        check(&[heard(2, 0, Some(7)), heard(3, 0, Some(7))], Some(2));
        // L before M and N, whatever the priority.
        check(&[heard(2, 9, Some(LAG_MAX + 1)), heard(3, 0, Some(LAG_MAX))], Some(3));
        check(&[heard(2, 9, None), heard(3, 0, Some(LAG_MAX))], Some(3));
        check(&[silent(2, 9, Some(0)), heard(3, 0, Some(LAG_MAX))], Some(3));
        // M: who lacks much takes long to catch up, so the least counts.
        check(&[heard(2, 9, Some(LAG_MAX + 2)), heard(3, 0, Some(LAG_MAX + 1))], Some(3));
        check(&[heard(2, 9, None), heard(3, 0, Some(u64::MAX - 1))], Some(3));
        check(&[silent(2, 9, Some(0)), heard(3, 0, None)], Some(3));
        // N: as when nobody has acknowledged anything yet.
        check(&[silent(2, 9, Some(7)), silent(3, 0, Some(6))], Some(3));
        check(&[silent(2, 0, None), silent(3, 9, None)], Some(2));
        // Who did not take over is told again when all others were told as well.
        check(&[told(heard(2, 9, Some(0)), 1), heard(3, 0, Some(5)), silent(4, 0, None)], Some(3));
        check(&[told(heard(2, 9, Some(0)), 1), told(heard(3, 0, Some(5)), 1), silent(4, 0, None)], Some(4));
        check(&[told(heard(2, 9, Some(0)), 1), told(heard(3, 0, Some(5)), 1)], Some(2));
    }

    #[test]
    fn who_was_asked_to_lead_rests_for_longer_than_who_was_elected() {
        let began = <<crate::TokioRuntime as openraft_rt::AsyncRuntime>::Instant as Instant>::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        let check = |now, asked: Option<u64>, expect| {
            assert_eq!(rests_until(after(now), asked.map(after)), after(expect), "now={now} asked={asked:?}");
        };
        check(100, None, 105);
        check(100, Some(100), 160);
        check(100, Some(70), 130);
        check(100, Some(46), 106);
        check(100, Some(44), 105);
        check(100, Some(1), 105);
    }

    #[test]
    fn the_tables_in_the_text_have_the_rows_of_the_tests() {
        let text: String = include_str!("priority.rs")
            .lines()
            .filter_map(|l| l.strip_prefix("//! "))
            .filter(|l| l.as_bytes().get(1..5) == Some(b"    ") && l.starts_with(|c: char| c.is_ascii_uppercase()))
            .filter_map(|l| l.chars().next())
            .collect();
        assert_eq!(text, "ABCDEFGHIJKLMN");
    }
}
