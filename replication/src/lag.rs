//! Bounds for sites that follow asynchronously: how far one may lag, and what becomes of writes beyond that.
//!
//! # Place
//! the leader looks twice a second beside the members (`tasks`), and before each command that `room` admits
//! # Invariants
//! - G1. A site lags as its member does that holds most. A site without a member that holds data has no lag.
//! - G2. Neither what lets the log be cut nor a change of the members waits for a site: one that is gone for good can be taken out.
//! - G3. A time is counted from the first look that saw the entry, so it may be half a second short, and begins anew with a leader.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft_rt::Instant;

use crate::levels::{Level, durable};
use crate::node::{Inner, Running};
use crate::{Error, ErrorKind, Result, Runtime};

/// Looks that are remembered: half of them go when there are more.
const MARKS_MAX: usize = 1024;

/// How far a site may lag behind the log of the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteLagBound {
    /// The label of the members that count.
    pub site: String,
    /// Bytes of the log that the site may lack.
    pub bytes: u64,
    /// How long it may lack an entry; one second at least, since it is looked at twice a second.
    pub time: Duration,
    /// Beyond it writes wait, and are `Unavailable` after their time; without, it is told in [`crate::NodeStatus::site_lags`] and in the
    /// log and nothing else happens.
    pub wait: bool,
}

/// How far a site lags that has a bound, as its leader knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteLag {
    /// The label.
    pub site: String,
    /// Bytes of the log that it lacks; an estimate when the log of the leader begins behind them.
    pub bytes: u64,
    /// How long it has lacked an entry.
    pub time: Duration,
    /// Whether that is more than it may.
    pub beyond: bool,
}

impl SiteLagBound {
    pub(crate) fn check(&self) -> Result<()> {
        if self.site.is_empty() || self.bytes == 0 || self.time < Duration::from_secs(1) {
            let message = format!("a bound has a site, a byte and a second at least bound={self:?}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(())
    }

    fn lag(&self, (bytes, time): (u64, Duration)) -> SiteLag {
        SiteLag { site: self.site.clone(), bytes, time, beyond: bytes > self.bytes || time > self.time }
    }
}

/// Where the log ended at a look.
struct Mark<I> {
    last: u64,
    /// Of the first byte behind it, counted from the birth of the log.
    end: u64,
    at: I,
}

/// The looks at the log since this node leads, oldest first.
struct Marks<I>(VecDeque<Mark<I>>);

impl<I: Instant> Marks<I> {
    fn mark(&mut self, last: u64, end: u64, at: I) {
        if self.0.back().is_some_and(|mark| mark.last >= last) {
            return;
        }
        if self.0.len() >= MARKS_MAX {
            let mut nth = 0;
            self.0.retain(|_| {
                nth += 1;
                nth % 2 == 1
            });
        }
        self.0.push_back(Mark { last, end, at });
    }

    /// What a holder of the entries up to `held` lacks of a log that ends at byte `end`: bytes at least, and since when.
    fn lacking(&self, held: u64, end: u64, now: I) -> (u64, Duration) {
        let at = self.0.partition_point(|mark| mark.last <= held);
        let from = at.checked_sub(1).and_then(|before| self.0.get(before)).or(self.0.front());
        let bytes = from.map_or(0, |mark| end.saturating_sub(mark.end));
        (bytes, self.0.get(at).map_or(Duration::ZERO, |mark| now.saturating_duration_since(mark.at)))
    }
}

/// What a leader remembers of its log, and what it found at the last look.
pub(crate) struct Lags<R: Runtime>(Mutex<(Marks<R::Instant>, Vec<SiteLag>)>);

impl<R: Runtime> Default for Lags<R> {
    fn default() -> Self {
        Self(Mutex::new((Marks(VecDeque::new()), Vec::new())))
    }
}

impl<R: Runtime> Inner<R> {
    /// The sites with a bound at the last look; none unless this node leads.
    pub(crate) fn site_lags(&self) -> Vec<SiteLag> {
        self.lags.0.lock().expect("nothing panics while it holds this lock").1.clone()
    }

    /// Looks how far the sites are, and tells when one went beyond its bound or came back.
    pub(crate) fn look_at_sites(&self, running: &Running<R>) {
        let bounds = &self.options.site_lag_bounds;
        if bounds.is_empty() {
            return;
        }
        let (leads, last) = Self::metrics_of(running, |m| (m.state == ServerState::Leader, m.last_log_index));
        if leads {
            let end = self.engine.wal().durable().0;
            let mut lags = self.lags.0.lock().expect("nothing panics while it holds this lock");
            lags.0.mark(last.unwrap_or(0), end, R::Instant::now());
        }
        let found: Vec<_> = bounds.iter().filter_map(|bound| self.site_lag(running, bound)).collect();
        let mut lags = self.lags.0.lock().expect("nothing panics while it holds this lock");
        for lag in &found {
            let was = lags.1.iter().any(|before| before.site == lag.site && before.beyond);
            match (was, lag.beyond) {
                (false, true) => {
                    tracing::warn!(site = lag.site, bytes = lag.bytes, time = ?lag.time, "a site lags too far")
                }
                (true, false) => tracing::info!(site = lag.site, "a site is within its bound again"),
                _ => {}
            }
        }
        lags.1 = found;
        if !leads {
            lags.0.0.clear();
        }
    }

    /// How far a site lags now. `None` without a member there, and unless this node leads.
    fn site_lag(&self, running: &Running<R>, bound: &SiteLagBound) -> Option<SiteLag> {
        let (held, last) = {
            let metrics = running.metrics.borrow_watched();
            let members = metrics.membership_config.membership();
            let there = members.nodes().any(|(_, member)| member.site == bound.site && !member.witness);
            if metrics.state != ServerState::Leader || !there {
                return None;
            }
            let level = Level::Site(bound.site.clone());
            (level.holds_to(members, |id| durable(&metrics.replication, id)), metrics.last_log_index.unwrap_or(0))
        };
        if held >= last {
            return Some(bound.lag((0, Duration::ZERO)));
        }
        let lags = self.lags.0.lock().expect("nothing panics while it holds this lock");
        let (bytes, time) = lags.0.lacking(held, self.engine.wal().durable().0, R::Instant::now());
        Some(bound.lag((self.log.bytes_lacking(held).unwrap_or(bytes), time)))
    }

    /// A site that writes wait for.
    pub(crate) fn awaited_site(&self, running: &Running<R>) -> Option<SiteLag> {
        let bounds = self.options.site_lag_bounds.iter().filter(|bound| bound.wait);
        bounds.filter_map(|bound| self.site_lag(running, bound)).find(|lag| lag.beyond)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Moment = <crate::TokioRuntime as openraft_rt::AsyncRuntime>::Instant;

    #[test]
    fn a_lag_is_counted_from_the_first_look_that_saw_an_entry() {
        let begin = Moment::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut marks = Marks(VecDeque::new());
        assert_eq!(marks.lacking(0, 700, at(9)), (0, Duration::ZERO), "nothing was looked at");
        for (last, end, seconds) in [(10, 1000, 0), (20, 1500, 1), (20, 1500, 2), (30, 3000, 3)] {
            marks.mark(last, end, at(seconds));
        }
        for (held, bytes, seconds) in
            [(0, 2100, 4), (9, 2100, 4), (10, 2100, 3), (19, 2100, 3), (20, 1600, 1), (30, 100, 0)]
        {
            assert_eq!(marks.lacking(held, 3100, at(4)), (bytes, Duration::from_secs(seconds)), "held {held}");
        }
    }

    #[test]
    fn a_long_lag_is_remembered_in_bounded_memory() {
        let begin = Moment::now();
        let mut marks = Marks(VecDeque::new());
        for n in 1..=10 * MARKS_MAX as u64 {
            marks.mark(n, n * 100, begin + Duration::from_secs(n));
        }
        assert!(marks.0.len() <= MARKS_MAX);
        let n = 10 * MARKS_MAX as u64;
        assert_eq!(marks.lacking(0, n * 100, begin + Duration::from_secs(n)).1, Duration::from_secs(n - 1));
    }

    #[test]
    fn a_bound_of_nothing_is_refused() {
        let good = SiteLagBound { site: "west".into(), bytes: 1, time: Duration::from_secs(1), wait: false };
        good.check().expect("the least");
        for bad in [
            SiteLagBound { site: String::new(), ..good.clone() },
            SiteLagBound { bytes: 0, ..good.clone() },
            SiteLagBound { time: Duration::from_millis(999), ..good.clone() },
        ] {
            assert_eq!(bad.check().expect_err("too little").kind(), ErrorKind::Invalid, "{bad:?}");
        }
    }
}
