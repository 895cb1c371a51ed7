//! Whether a disk is fit: a pure function of what was measured.
//!
//! # Sources
//! etcd documentation, FAQ and metrics: the 99th percentile of `wal_fsync_duration_seconds` of a disk that is fast enough is under 10 ms. The
//! other two bounds are the product's own: the interval of heartbeats, and the time after which a leader calls its disk stuck.

use std::time::Duration;

use serde::Serialize;

use super::device::Finding;
use crate::settings::HEARTBEAT_DEFAULT;

/// A p99 of a durable write up to here is fit.
pub(super) const P99_FIT: Duration = Duration::from_millis(10);
/// One beyond here is unfit: a hundredth of all commits takes longer than the pause between two heartbeats.
pub(super) const P99_UNFIT: Duration = HEARTBEAT_DEFAULT;
/// A single write as slow as this makes a disk slow: a leader hands over for it.
pub(super) const MAX_SLOW: Duration = Duration::from_secs(1);

/// The verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// For any use.
    Fit,
    /// It keeps what it promises, late.
    Slow,
    /// Writes fail, may be lost, or take so long that groups lose their leaders.
    Unfit,
}

impl Verdict {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fit => "fit",
            Self::Slow => "slow",
            Self::Unfit => "unfit",
        }
    }
}

/// What decides.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// Tests that did not come to their end.
    pub(super) failures: Vec<String>,
    /// Of a durable write of one block, alone: p99 and the longest.
    pub(super) durable: Option<(Duration, Duration)>,
    /// Why what lies there is gone with the power.
    pub(super) in_memory: Option<String>,
    /// Whether flushes reach the device.
    pub(super) flushes: Finding,
    /// Reads and writes go past the page cache.
    pub(super) direct_io: bool,
}

/// The verdict with its reasons, the worst first. A reason may also be a remark that changes no verdict.
pub(super) fn judge(facts: &Facts) -> (Verdict, Vec<String>) {
    let mut found: Vec<(Verdict, String)> = Vec::new();
    found.extend(facts.failures.iter().map(|failure| (Verdict::Unfit, failure.clone())));
    found.extend(facts.in_memory.iter().map(|why| (Verdict::Unfit, why.clone())));
    match facts.flushes {
        Finding::Suspect => {
            let why = "suspect: durable writes are answered without a flush of the volatile cache, so a loss of power may take them";
            found.push((Verdict::Unfit, why.to_owned()));
        }
        Finding::Unknown => {
            found.push((Verdict::Fit, "whether flushes reach the device cannot be seen here".to_owned()))
        }
        Finding::NotNeeded | Finding::Reached | Finding::Fua => {}
    }
    let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
    if let Some((p99, max)) = facts.durable {
        let (verdict, bound) = match p99 {
            p99 if p99 <= P99_FIT => (Verdict::Fit, P99_FIT),
            p99 if p99 <= P99_UNFIT => (Verdict::Slow, P99_FIT),
            _ => (Verdict::Unfit, P99_UNFIT),
        };
        let relation = if verdict == Verdict::Fit { "at most" } else { "more than" };
        found.push((verdict, format!("p99 of a durable write {}, {relation} {}", ms(p99), ms(bound))));
        if max >= MAX_SLOW {
            found.push((Verdict::Slow, format!("one durable write took {}, at least {}", ms(max), ms(MAX_SLOW))));
        }
    }
    if !facts.direct_io {
        let why = "O_DIRECT does not work: what is read and written is kept in the page cache as well";
        found.push((Verdict::Fit, why.to_owned()));
    }
    // Stable: reasons of one verdict stay in this order.
    found.sort_by_key(|(verdict, _)| std::cmp::Reverse(*verdict));
    let verdict = found.first().map_or(Verdict::Unfit, |(verdict, _)| *verdict);
    (verdict, found.into_iter().map(|(_, reason)| reason).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(p99_us: u64, max_us: u64) -> Facts {
        Facts {
            failures: Vec::new(),
            durable: Some((Duration::from_micros(p99_us), Duration::from_micros(max_us))),
            in_memory: None,
            flushes: Finding::Reached,
            direct_io: true,
        }
    }

    #[test]
    fn every_state_of_a_disk_has_one_verdict_and_says_why() {
        let check = |facts: Facts, verdict: Verdict, first: &str| {
            let (found, reasons) = judge(&facts);
            assert_eq!(found, verdict, "{facts:?}");
            assert!(reasons.first().is_some_and(|reason| reason.contains(first)), "{first}: {reasons:?}");
        };
        check(facts(200, 900), Verdict::Fit, "p99 of a durable write 0.20 ms, at most 10.00 ms");
        check(facts(10_000, 999_999), Verdict::Fit, "at most");
        check(facts(10_001, 20_000), Verdict::Slow, "p99 of a durable write 10.00 ms, more than 10.00 ms");
        check(facts(100_000, 200_000), Verdict::Slow, "more than 10.00 ms");
        check(facts(100_001, 200_000), Verdict::Unfit, "more than 100.00 ms");
        check(facts(200, 1_000_000), Verdict::Slow, "one durable write took 1000.00 ms");
        let with = |change: &dyn Fn(&mut Facts)| {
            let mut facts = facts(200, 900);
            change(&mut facts);
            facts
        };
        check(with(&|f| f.flushes = Finding::Suspect), Verdict::Unfit, "suspect: durable writes");
        check(with(&|f| f.flushes = Finding::Unknown), Verdict::Fit, "cannot be seen");
        check(with(&|f| f.flushes = Finding::NotNeeded), Verdict::Fit, "p99");
        check(with(&|f| f.flushes = Finding::Fua), Verdict::Fit, "p99");
        check(with(&|f| f.in_memory = Some("tmpfs".into())), Verdict::Unfit, "tmpfs");
        check(with(&|f| f.failures.push("a read failed".into())), Verdict::Unfit, "a read failed");
        check(with(&|f| f.direct_io = false), Verdict::Fit, "p99");
        // Without the figure that decides there is a failure, and without either nothing speaks for the disk.
        check(
            with(&|f| (f.durable, f.failures) = (None, vec!["a durable write failed".into()])),
            Verdict::Unfit,
            "a durable write failed",
        );
        assert_eq!(judge(&with(&|f| f.durable = None)).0, Verdict::Unfit);
        // The worst comes first, whatever else there is to say.
        let slow = Facts { in_memory: Some("tmpfs".into()), direct_io: false, ..facts(50_000, 50_000) };
        let (verdict, reasons) = judge(&slow);
        let order: Vec<bool> = ["tmpfs", "p99", "O_DIRECT"].iter().zip(&reasons).map(|(w, r)| r.contains(w)).collect();
        assert_eq!((verdict, order), (Verdict::Unfit, vec![true; 3]), "{reasons:?}");
    }
}
