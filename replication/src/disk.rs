//! How the disk of this node does, and when a leader hands over because of it.
//!
//! # Place
//! `tasks` looks at each tick; the decision is the pure [`successor`], for which a table of cases stands below
//! # Invariants
//! - D1. Every node measures itself: its own writes, by its own clock, over the last [`WINDOW_TICKS`] looks. Nobody is judged by how
//!   long the network takes to it.
//! - D2. Nothing is asked of others while a leader finds nothing wrong with itself.
//! - D3. Leadership goes only to a voter that says it is well and lacks next to nothing. When nobody is better the leader stays: a
//!   volume that is full everywhere moves nothing.
//! - D4. A leader that has led for less than [`LED_MIN`], or that tried less long ago, does not try. So sick nodes that take turns in
//!   being well move leadership once in that time at most, whatever they say.
//! - D5. One look is an accident: it has to be wrong at [`LOOKS_MIN`] in a row.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use mainstay_io::LatencyCounts;
use openraft_rt::Instant;

use crate::membership::lag_of;
use crate::network::method;
use crate::node::{Inner, Running};
use crate::wire::{Reader, Writer, decode_result};
use crate::{MemberRole, NodeId, Result, Runtime};

/// Looks over which the latency of writes is taken; one each half second.
const WINDOW_TICKS: usize = 4;
/// Writes in the window below which nothing is said of their latency.
const WRITES_MIN: u64 = 8;
/// A disk that answers faster is not slow, however fast the others are.
const SLOW_MIN: Duration = Duration::from_millis(4);
/// A disk that answers slower is slow, whatever the others say: they may have nothing to write because of it.
pub(crate) const STUCK: Duration = Duration::from_secs(1);
/// How many times the median of the group a slow disk takes.
pub(crate) const SLOW_FACTOR: u32 = 8;
/// Entries that a successor may lack: it fetches them before it calls the election.
pub(crate) const LAG_MAX: u64 = 1024;
/// Looks in a row that have to find the disk of the leader wrong.
const LOOKS_MIN: u32 = 2;
/// How long a node leads before it hands over for its disk, and the pause between two attempts.
pub(crate) const LED_MIN: Duration = Duration::from_secs(5);
/// How long a voter may take to say how it does.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);

/// What a node finds of its own volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskHealth {
    /// There is no space for tables.
    pub full: bool,
    /// The ring of the log is full: entries wait in memory.
    pub stalled: bool,
    /// A flush or a compaction failed, and has not succeeded since; or the next entry cannot be applied for damage.
    pub failing: bool,
    /// What half of the latest writes of the log do not exceed, or how long the oldest has been without an answer if that is
    /// longer. `None` while there are too few.
    pub write_latency: Option<Duration>,
}

/// Why a leader hands over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Full,
    Stalled,
    Failing,
    Slow,
}

/// Another voter, as the leader knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Other {
    pub(crate) id: u64,
    /// Entries that it lacks; `None` for one that has not answered.
    pub(crate) lag: Option<u64>,
    /// `None` for one that does not say.
    pub(crate) health: Option<DiskHealth>,
}

impl DiskHealth {
    pub(crate) fn is_broken(&self) -> bool {
        self.full || self.stalled || self.failing
    }

    /// Whether it is worth it to ask how the others do.
    fn is_suspect(&self) -> bool {
        self.is_broken() || self.write_latency.is_some_and(|latency| latency >= SLOW_MIN)
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.bool(self.full).bool(self.stalled).bool(self.failing);
        out.option(self.write_latency, |w, latency| {
            w.u64(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
        });
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        Ok(Self {
            full: reader.bool()?,
            stalled: reader.bool()?,
            failing: reader.bool()?,
            write_latency: reader.option(Reader::u64)?.map(Duration::from_micros),
        })
    }
}

/// The median of the latencies that are known; the lower of two.
pub(crate) fn median(own: &DiskHealth, others: &[Other]) -> Option<Duration> {
    let said = others.iter().filter_map(|other| other.health?.write_latency);
    let mut all: Vec<Duration> = own.write_latency.into_iter().chain(said).collect();
    all.sort_unstable();
    all.get(all.len().saturating_sub(1) / 2).copied()
}

/// Whether a write takes `factor` times as long as elsewhere, and long enough to be minded.
pub(crate) fn is_slow(latency: Duration, than: Duration, factor: u32) -> bool {
    latency >= SLOW_MIN && latency >= than.saturating_mul(factor)
}

/// Who shall lead in the place of a leader whose disk is `own`, and why; `None` when it stays.
fn successor(own: &DiskHealth, others: &[Other]) -> Option<(u64, Reason)> {
    let slow = |latency: Duration, than: Duration| is_slow(latency, than, SLOW_FACTOR);
    let median = median(own, others);
    let reason = match own {
        DiskHealth { full: true, .. } => Reason::Full,
        DiskHealth { stalled: true, .. } => Reason::Stalled,
        DiskHealth { failing: true, .. } => Reason::Failing,
        DiskHealth { write_latency: Some(latency), .. }
            if *latency >= STUCK || median.is_some_and(|median| slow(*latency, median)) =>
        {
            Reason::Slow
        }
        _ => return None,
    };
    let fit = |other: &&Other| {
        let Some(health) = other.health.filter(|health| !health.is_broken()) else { return false };
        let fast = match (reason, own.write_latency, health.write_latency) {
            (Reason::Slow, Some(own), Some(latency)) => slow(own, latency),
            (Reason::Slow, Some(own), None) => own >= STUCK,
            (Reason::Slow, None, _) => false,
            // It writes what this one writes: worse than a full disk is one that answers nothing.
            (_, _, Some(latency)) => !median.is_some_and(|median| slow(latency, median)),
            (_, _, None) => true,
        };
        fast && other.lag.is_some_and(|lag| lag <= LAG_MAX)
    };
    let best = others.iter().filter(fit).min_by_key(|other| (other.lag, other.id))?;
    Some((best.id, reason))
}

/// The latest looks at the writes of the log.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    window: VecDeque<LatencyCounts>,
    health: DiskHealth,
}

impl Looks {
    fn take(&mut self, counts: LatencyCounts, oldest: Option<Duration>, flags: DiskHealth) {
        let since = counts.since(self.window.front().unwrap_or(&counts));
        let median = since.median_bound().filter(|_| since.total() >= WRITES_MIN);
        let oldest = oldest.filter(|age| *age >= SLOW_MIN);
        self.health = DiskHealth { write_latency: median.max(oldest), ..flags };
        self.window.push_back(counts);
        if self.window.len() > WINDOW_TICKS {
            self.window.pop_front();
        }
    }
}

/// What a leader remembers between two looks.
pub(crate) struct HandOver<R: Runtime> {
    term: u64,
    /// D4.
    not_before: R::Instant,
    looks: u32,
}

impl<R: Runtime> HandOver<R> {
    pub(crate) fn new() -> Self {
        Self { term: 0, not_before: R::Instant::now(), looks: 0 }
    }
}

impl<R: Runtime> Inner<R> {
    /// How the disk of this node did at the last look.
    pub(crate) fn disk_health(&self) -> DiskHealth {
        self.disk.lock().expect("nothing panics while it holds this lock").health
    }

    /// Looks at the own disk (D1).
    pub(crate) fn look_at_disk(&self) {
        let stats = self.engine.wal().stats();
        let group = self.group.status();
        let applier_waits = group.applier_waits || self.log.heal_status().awaited_entry.is_some();
        let flags = DiskHealth {
            full: self.engine.is_full(),
            stalled: self.log.is_stalled(),
            failing: group.jobs_retrying + group.jobs_failed > 0 || applier_waits,
            write_latency: None,
        };
        let mut looks = self.disk.lock().expect("nothing panics while it holds this lock");
        looks.take(stats.write_latency, stats.oldest_write, flags);
    }

    /// Hands leadership to a voter whose disk is better, if this node leads and its own is wrong.
    pub(crate) async fn mind_disk(self: &Arc<Self>, running: &Arc<Running<R>>, state: &mut HandOver<R>) {
        let (leads, term) = Self::metrics_of(running, |m| (m.current_leader == Some(running.id), m.current_term));
        let now = R::Instant::now();
        if leads && state.term != term {
            *state = HandOver { term, not_before: now + LED_MIN, looks: 0 };
        }
        let own = self.disk_health();
        if !leads || !own.is_suspect() {
            state.looks = 0;
            return;
        }
        state.looks = state.looks.saturating_add(1);
        if state.looks < LOOKS_MIN || now < state.not_before {
            return;
        }
        let others = self.ask_disks(running).await;
        let Some((to, reason)) = successor(&own, &others) else { return };
        tracing::warn!(?reason, ?own, to, "the disk of this leader is worse than those of others: it hands over");
        // Counted here: a leader whose disk answers nothing does not see the next one before it can write down its term.
        self.disk_hand_overs.fetch_add(1, Ordering::Relaxed);
        match self.hand_over(running, Some(to)).await {
            Ok(to) => tracing::info!(to, "handed leadership over"),
            Err(error) => tracing::warn!(%error, "leadership was not handed over, as far as this node can see"),
        }
        state.not_before = R::Instant::now() + LED_MIN;
    }

    /// Asks the other voters how their disks do.
    pub(crate) async fn ask_disks(&self, running: &Running<R>) -> Vec<Other> {
        let voters: Vec<(u64, Option<u64>)> = {
            let members = self.members();
            let voters = members.iter().filter(|m| m.role == MemberRole::Voter && !m.witness && m.id.0 != running.id);
            Self::metrics_of(running, |m| voters.map(|v| (v.id.0, lag_of(m, v.id.0))).collect())
        };
        join_all(voters.into_iter().map(|(id, lag)| async move {
            let answer = self.call_member(NodeId(id), method::DISK, Writer::new().finish(), ASK_TIMEOUT).await;
            let health = answer.and_then(|bytes| decode_result(&bytes, DiskHealth::read)).ok();
            Other { id, lag, health }
        }))
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_io::LatencyHistogram;

    fn well(micros: u64) -> DiskHealth {
        DiskHealth { write_latency: Some(Duration::from_micros(micros)), ..DiskHealth::default() }
    }

    fn other(id: u64, lag: u64, health: DiskHealth) -> Other {
        Other { id, lag: Some(lag), health: Some(health) }
    }

    /// | row | own disk | other voters | then |
    /// |---|---|---|---|
    /// | A | well | any | stays |
    /// | B | full, stalled, failing | one is well and near | to it: the one that lacks least, of equals the smallest id |
    /// | C | the same | broken too, or much slower than the rest | stays |
    /// | D | the same | silent, or far behind | stays |
    /// | E | slow against the median | one is that much faster | to it |
    /// | F | slow as most | one is faster | stays |
    /// | G | slower than the rest, and fast | any | stays |
    /// | H | slow | nobody says how fast it is | stays, unless a second is not enough for half of its writes |
    /// | I | as slow as that | not eight times faster | stays |
    #[test]
    fn every_row_of_the_table() {
        let check = |row, own: DiskHealth, others: &[Other], expect| {
            assert_eq!(successor(&own, others), expect, "row {row}: {own:?} {others:?}");
        };
        let full = DiskHealth { full: true, ..well(200) };
        let stalled = DiskHealth { stalled: true, ..well(200) };
        let failing = DiskHealth { failing: true, write_latency: None, ..DiskHealth::default() };
        let fine = [other(2, 3, well(256)), other(3, 0, well(512))];
        check("A", well(256), &fine, None);
        check("A", DiskHealth::default(), &fine, None);
        check("A", well(256), &[other(2, 0, full), other(3, 0, well(1 << 20))], None);
        check("B", full, &fine, Some((3, Reason::Full)));
        check("B", stalled, &fine, Some((3, Reason::Stalled)));
        check("B", failing, &fine, Some((3, Reason::Failing)));
        check("B", full, &[other(2, 7, well(256)), other(3, 7, well(64))], Some((2, Reason::Full)));
        check("B", full, &[other(2, 0, stalled), other(3, LAG_MAX, DiskHealth::default())], Some((3, Reason::Full)));
        check("C", full, &[other(2, 0, full), other(3, 0, failing)], None);
        check("C", full, &[other(2, 0, well(1 << 20)), other(3, 9, well(256))], Some((3, Reason::Full)));
        check("C", full, &[other(2, 0, well(1 << 20)), other(3, 9, stalled)], None);
        check("D", full, &[Other { health: None, ..fine[0] }, Other { lag: None, ..fine[1] }], None);
        check("D", full, &[other(2, LAG_MAX + 1, well(256))], None);
        check("D", full, &[], None);
        check("E", well(16384), &fine, Some((3, Reason::Slow)));
        check("E", well(16384), &[fine[0], Other { health: None, ..fine[1] }], Some((2, Reason::Slow)));
        let five = [other(2, 0, well(8192)), other(3, 5, well(128)), other(4, 6, well(512)), other(5, 4, well(512))];
        check("E", well(8192), &five, Some((5, Reason::Slow)));
        check("F", well(16384), &[other(2, 0, well(16384)), other(3, 0, well(256))], None);
        check("F", well(16384), &[other(2, 0, well(8192)), other(3, 0, well(64))], None);
        check("G", well(2048), &[other(2, 0, well(32)), other(3, 0, well(32))], None);
        check("G", well(4096), &[other(2, 0, well(1024)), other(3, 0, well(1024))], None);
        let idle = [other(2, 1, DiskHealth::default()), other(3, 0, DiskHealth::default())];
        check("H", well(1 << 19), &idle, None);
        check("H", well(1 << 20), &idle, Some((3, Reason::Slow)));
        check("I", well(1 << 20), &[other(2, 0, well(1 << 18)), other(3, 0, well(1 << 21))], None);
    }

    #[test]
    fn latency_is_that_of_the_window_or_of_a_write_without_an_answer() {
        let histogram = LatencyHistogram::default();
        let mut looks = Looks::default();
        let mut look = |micros: u64, writes: u64, oldest: Option<u64>| {
            (0..writes).for_each(|_| histogram.record(Duration::from_micros(micros)));
            looks.take(histogram.counts(), oldest.map(Duration::from_millis), DiskHealth::default());
            looks.health.write_latency.map(|latency| latency.as_micros())
        };
        assert_eq!(look(100, 1000, None), None, "what was before the first look is not counted");
        assert_eq!(look(100, WRITES_MIN - 1, None), None);
        assert_eq!(look(100, 1, None), Some(128));
        assert_eq!(look(5000, WRITES_MIN + 1, None), Some(8192));
        assert_eq!(look(0, 0, Some(3000)), Some(3_000_000));
        assert_eq!(look(0, 0, Some(1)), Some(8192), "a write that has just begun says nothing");
        for _ in 0..WINDOW_TICKS {
            look(0, 0, None);
        }
        assert_eq!(look(0, 0, None), None, "forgotten once it is out of the window");
    }

    #[test]
    fn health_survives_the_wire() {
        for health in [well(77), DiskHealth { full: true, stalled: true, failing: true, write_latency: None }] {
            let answer = crate::wire::encode_result(Ok(health), |w, health| health.write(w));
            assert_eq!(decode_result(&answer, DiskHealth::read).expect("decodes"), health);
        }
    }
}
