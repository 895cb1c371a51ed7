//! What a run gave: counted while it runs, shown when it is over.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::ycsb::Kind;
use crate::cli::Failure;

/// Longest latency that the histogram tells apart, in nanoseconds.
const LATENCY_NANOS_MAX: u64 = 600_000_000_000;
const NANOS_PER_MS: f64 = 1e6;
/// Points of time that a report shows at most.
const INTERVALS_MAX: usize = 600;
/// Of a latency curve: each step halves what lies above it, so many steps at most.
const CURVE_STEPS_MAX: u32 = 20;

/// What a run gave.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// What was done.
    pub workload: String,
    /// Requests in flight.
    pub clients: u32,
    /// Bytes of a value.
    pub value_bytes: u64,
    /// Operations answered.
    pub ops: u64,
    /// Operations refused or unanswered.
    pub errors: u64,
    /// The first refusal.
    pub first_error: Option<String>,
    /// Time of the run.
    pub seconds: f64,
    /// Answered operations a second.
    pub ops_per_second: f64,
    /// Latencies in milliseconds, of all operations.
    pub mean_ms: f64,
    /// See `mean_ms`.
    pub p50_ms: f64,
    /// See `mean_ms`.
    pub p90_ms: f64,
    /// See `mean_ms`.
    pub p99_ms: f64,
    /// See `mean_ms`.
    pub p999_ms: f64,
    /// See `mean_ms`.
    pub p9999_ms: f64,
    /// See `mean_ms`.
    pub max_ms: f64,
    /// `served` through the etcd API, or `embedded` in this process.
    pub through: String,
    /// Records that there were at the beginning, or were to be written.
    pub records: u64,
    /// How records were chosen.
    pub distribution: String,
    /// What all that was drawn followed from.
    pub seed: u64,
    /// Operations a second that were asked for.
    pub rate: Option<u64>,
    /// Operations that were due at that rate before the end and not begun: the store did not keep up.
    pub not_begun: u64,
    /// The same figures for each kind of operation and each durability.
    pub operations: Vec<Row>,
    /// The run over time.
    pub intervals: Vec<Interval>,
    /// The records that were written before it.
    pub load: Option<Load>,
    /// What reading back showed.
    pub verified: Option<Verified>,
}

/// The figures of one kind of operation.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Row {
    /// `read`, `update`, `insert`, `scan`, `read-modify-write`.
    pub operation: String,
    /// Of a write: as it was asked for, `default` where it was not.
    pub durability: Option<String>,
    /// Operations answered.
    pub ops: u64,
    /// A second.
    pub ops_per_second: f64,
    /// Latencies in milliseconds.
    pub mean_ms: f64,
    /// See `mean_ms`.
    pub p50_ms: f64,
    /// See `mean_ms`.
    pub p90_ms: f64,
    /// See `mean_ms`.
    pub p99_ms: f64,
    /// See `mean_ms`.
    pub p999_ms: f64,
    /// See `mean_ms`.
    pub p9999_ms: f64,
    /// See `mean_ms`.
    pub max_ms: f64,
    /// Percentiles and their latencies in milliseconds, closer together towards 100.
    pub curve: Vec<(f64, f64)>,
}

/// A part of the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Where it begins, from the start of the run.
    pub at_seconds: f64,
    /// Operations answered a second.
    pub ops_per_second: f64,
    /// Of those answered in it.
    pub mean_ms: f64,
    /// See `mean_ms`.
    pub max_ms: f64,
}

/// How the records came to be there.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Load {
    /// Inserts answered.
    pub records: u64,
    /// Time that they took.
    pub seconds: f64,
    /// A second.
    pub ops_per_second: f64,
}

/// What reading back showed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Values looked at while it ran.
    pub during: u64,
    /// Records read when it was over: all that were written.
    pub after: u64,
    /// Acknowledged and not there.
    pub missing: u64,
    /// Another value than was written there last.
    pub wrong: u64,
    /// Not answered when all were read back.
    pub unread: u64,
    /// The first few of them.
    pub examples: Vec<String>,
}

/// Examples that are kept.
const EXAMPLES_MAX: usize = 10;

impl Verified {
    /// Nothing is wrong.
    pub fn is_sound(&self) -> bool {
        (self.missing, self.wrong, self.unread) == (0, 0, 0)
    }

    pub(super) fn example(&mut self, text: String) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(text);
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.during += other.during;
        self.after += other.after;
        self.missing += other.missing;
        self.wrong += other.wrong;
        self.unread += other.unread;
        other.examples.into_iter().for_each(|text| self.example(text));
    }
}

impl Report {
    /// The figures of a run from the latencies of what was answered, of which `per_ms` units are a millisecond.
    pub fn new(
        workload: String,
        clients: u32,
        value_bytes: u64,
        seconds: f64,
        latencies: &Histogram<u64>,
        per_ms: f64,
    ) -> Self {
        let row = Row::new(String::new(), None, seconds, latencies, per_ms);
        let Row { ops, ops_per_second, mean_ms, p50_ms, p90_ms, p99_ms, p999_ms, p9999_ms, max_ms, .. } = row;
        Self {
            workload,
            clients,
            value_bytes,
            ops,
            seconds,
            ops_per_second,
            mean_ms,
            p50_ms,
            p90_ms,
            p99_ms,
            p999_ms,
            p9999_ms,
            max_ms,
            ..Self::default()
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        if let Some(load) = &self.load {
            let Load { records, seconds, ops_per_second } = load;
            text += &format!("loaded {records} records in {seconds:.1} s = {ops_per_second:.0} inserts/s\n");
        }
        text += &format!(
            "{} with {} clients and {} byte values: {} ops in {:.1} s = {:.0} ops/s, {} errors\n\
             latency ms: mean {:.2}  p50 {:.2}  p90 {:.2}  p99 {:.2}  p99.9 {:.2}  p99.99 {:.2}  max {:.2}\n",
            self.workload,
            self.clients,
            self.value_bytes,
            self.ops,
            self.seconds,
            self.ops_per_second,
            self.errors,
            self.mean_ms,
            self.p50_ms,
            self.p90_ms,
            self.p99_ms,
            self.p999_ms,
            self.p9999_ms,
            self.max_ms
        );
        if !self.operations.is_empty() {
            let _ = writeln!(
                text,
                "{:<18} {:<10} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
                "operation", "durability", "ops", "ops/s", "mean ms", "p50", "p90", "p99", "p99.9", "p99.99", "max"
            );
        }
        for row in &self.operations {
            let _ = writeln!(
                text,
                "{:<18} {:<10} {:>10} {:>10.0} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3}",
                row.operation,
                row.durability.as_deref().unwrap_or("-"),
                row.ops,
                row.ops_per_second,
                row.mean_ms,
                row.p50_ms,
                row.p90_ms,
                row.p99_ms,
                row.p999_ms,
                row.p9999_ms,
                row.max_ms
            );
        }
        if self.not_begun > 0 {
            let (rate, count) = (self.rate.unwrap_or_default(), self.not_begun);
            let _ = writeln!(text, "behind the rate of {rate}/s: {count} operations were due and not begun by the end");
        }
        if let Some(verified) = &self.verified {
            let Verified { during, after, missing, wrong, unread, .. } = verified;
            let _ = writeln!(
                text,
                "verified {during} values during the run and {after} records after it: {missing} missing, {wrong} wrong, {unread} unread"
            );
            text.extend(verified.examples.iter().map(|example| format!("  {example}\n")));
        }
        if let Some(error) = &self.first_error {
            let _ = writeln!(text, "first error: {error}");
        }
        text
    }
}

impl Row {
    fn new(
        operation: String,
        durability: Option<String>,
        seconds: f64,
        latencies: &Histogram<u64>,
        per_ms: f64,
    ) -> Self {
        let at = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / per_ms;
        Self {
            operation,
            durability,
            ops: latencies.len(),
            ops_per_second: latencies.len() as f64 / seconds.max(1e-9),
            mean_ms: latencies.mean() / per_ms,
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            p9999_ms: at(0.9999),
            max_ms: latencies.max() as f64 / per_ms,
            curve: curve(latencies, per_ms),
        }
    }
}

/// Latencies at percentiles that come closer together towards 100, as far as there are operations that tell them apart.
fn curve(latencies: &Histogram<u64>, per_ms: f64) -> Vec<(f64, f64)> {
    let point = |quantile: f64| (100.0 * quantile, latencies.value_at_quantile(quantile) as f64 / per_ms);
    let mut points = vec![point(0.0)];
    for step in 0..CURVE_STEPS_MAX {
        let above = 0.5f64.powi(step as i32);
        if above * (latencies.len() as f64) < 1.0 {
            break;
        }
        // Four points to each halving.
        points.extend((1..=4).map(|quarter| point(1.0 - above + above / 8.0 * f64::from(quarter))));
    }
    points.push((100.0, latencies.max() as f64 / per_ms));
    points
}

/// Counts latencies in nanoseconds, to three digits.
pub(crate) fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NANOS_MAX, 3).expect("the bounds are constants that a histogram takes")
}

/// A latency as the histogram takes it.
pub(crate) fn nanos(latency: Duration) -> u64 {
    u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_NANOS_MAX).clamp(1, LATENCY_NANOS_MAX)
}

/// Counts while a run goes on. One for several clients.
pub(super) struct Recorder {
    rows: BTreeMap<(Kind, usize), Histogram<u64>>,
    tick: Duration,
    ticks: Vec<Tick>,
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
    pub(super) not_begun: u64,
    pub(super) verified: Verified,
}

#[derive(Clone, Copy, Default)]
struct Tick {
    ops: u64,
    nanos: u64,
    nanos_max: u64,
}

impl Recorder {
    /// `duration`, if it is known, says how finely time is divided.
    pub(super) fn new(duration: Option<Duration>) -> Self {
        let fine = duration.is_some_and(|duration| duration <= Duration::from_secs(60));
        let tick = if fine { Duration::from_millis(100) } else { Duration::from_secs(1) };
        let verified = Verified::default();
        Self { rows: BTreeMap::new(), tick, ticks: Vec::new(), errors: 0, first_error: None, not_begun: 0, verified }
    }

    /// Counts an operation that was due at `due` and answered at `now`, both from the start of the run on.
    pub(super) fn answered(&mut self, kind: Kind, level: usize, due: Duration, now: Duration) {
        let nanos = nanos(now.saturating_sub(due));
        self.rows.entry((kind, level)).or_insert_with(latencies).saturating_record(nanos);
        let at = usize::try_from(now.as_nanos() / self.tick.as_nanos()).unwrap_or(usize::MAX);
        if self.ticks.len() <= at {
            self.ticks.resize(at + 1, Tick::default());
        }
        if let Some(tick) = self.ticks.get_mut(at) {
            tick.ops += 1;
            tick.nanos = tick.nanos.saturating_add(nanos);
            tick.nanos_max = tick.nanos_max.max(nanos);
        }
    }

    pub(super) fn failed(&mut self, error: String) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }

    pub(super) fn add(&mut self, other: Self) -> Result<(), Failure> {
        for (row, latencies) in other.rows {
            let into = self.rows.entry(row).or_insert_with(self::latencies);
            into.add(&latencies).map_err(|e| Failure::other(e.to_string()))?;
        }
        if self.ticks.len() < other.ticks.len() {
            self.ticks.resize(other.ticks.len(), Tick::default());
        }
        for (tick, other) in self.ticks.iter_mut().zip(other.ticks) {
            tick.ops += other.ops;
            tick.nanos = tick.nanos.saturating_add(other.nanos);
            tick.nanos_max = tick.nanos_max.max(other.nanos_max);
        }
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
        self.not_begun += other.not_begun;
        self.verified.add(other.verified);
        Ok(())
    }

    /// All operations together.
    pub(super) fn all(&self) -> Result<Histogram<u64>, Failure> {
        let mut all = latencies();
        for latencies in self.rows.values() {
            all.add(latencies).map_err(|e| Failure::other(e.to_string()))?;
        }
        Ok(all)
    }

    /// The report of a run of `seconds` with these durabilities.
    pub(super) fn report(
        &self,
        workload: String,
        clients: u32,
        value_bytes: u64,
        seconds: f64,
        levels: &[String],
    ) -> Result<Report, Failure> {
        let report = Report::new(workload, clients, value_bytes, seconds, &self.all()?, NANOS_PER_MS);
        let row = |((kind, level), latencies): (&(Kind, usize), &Histogram<u64>)| {
            let name = levels.get(*level).cloned().unwrap_or_else(|| "default".to_owned());
            Row::new(kind.name().to_owned(), kind.writes().then_some(name), seconds, latencies, NANOS_PER_MS)
        };
        Ok(Report {
            errors: self.errors,
            first_error: self.first_error.clone(),
            not_begun: self.not_begun,
            operations: self.rows.iter().map(row).collect(),
            intervals: self.intervals(),
            ..report
        })
    }

    fn intervals(&self) -> Vec<Interval> {
        let width = self.ticks.len().div_ceil(INTERVALS_MAX).max(1);
        let seconds = self.tick.as_secs_f64() * width as f64;
        let interval = |(n, ticks): (usize, &[Tick])| {
            let ops: u64 = ticks.iter().map(|tick| tick.ops).sum();
            let nanos: u64 = ticks.iter().map(|tick| tick.nanos).fold(0, u64::saturating_add);
            let nanos_max = ticks.iter().map(|tick| tick.nanos_max).max().unwrap_or_default();
            Interval {
                at_seconds: seconds * n as f64,
                ops_per_second: ops as f64 / (self.tick.as_secs_f64() * ticks.len() as f64),
                mean_ms: nanos as f64 / NANOS_PER_MS / ops.max(1) as f64,
                max_ms: nanos_max as f64 / NANOS_PER_MS,
            }
        };
        self.ticks.chunks(width).enumerate().map(interval).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn every_kind_and_durability_has_figures_of_its_own() {
        let mut recorder = Recorder::new(Some(ms(1_000)));
        (1..=1_000).for_each(|n| recorder.answered(Kind::Read, 0, ms(0), ms(n)));
        let mut other = Recorder::new(Some(ms(1_000)));
        other.answered(Kind::Update, 1, ms(100), ms(105));
        other.failed("no leader".into());
        other.not_begun = 3;
        recorder.add(other).expect("alike");
        let levels = ["local".to_owned(), "quorum".to_owned()];
        let report = recorder.report("a".into(), 4, 100, 2.0, &levels).expect("figures");
        assert_eq!((report.ops, report.errors, report.not_begun), (1_001, 1, 3));
        assert_eq!(report.first_error.as_deref(), Some("no leader"));
        let [read, update] = &report.operations[..] else { panic!("{report:?}") };
        assert_eq!((read.operation.as_str(), read.durability.as_deref(), read.ops), ("read", None, 1_000));
        assert_eq!(
            (update.operation.as_str(), update.durability.as_deref(), update.ops),
            ("update", Some("quorum"), 1)
        );
        let near = |found: f64, expect: f64| assert!((found / expect - 1.0).abs() < 0.002, "{found} {expect}");
        near(read.mean_ms, 500.5);
        near(read.p50_ms, 500.0);
        near(read.p99_ms, 990.0);
        near(read.p9999_ms, 1_000.0);
        near(read.max_ms, 1_000.0);
        near(read.ops_per_second, 500.0);
        near(update.max_ms, 5.0);
        assert!(read.curve.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1), "{:?}", read.curve);
        assert_eq!(read.curve.last().map(|(percentile, _)| *percentile), Some(100.0));
        let text = report.text();
        for part in
            ["1001 ops in 2.0 s", "p99.99", "update", "quorum", "3 operations were due", "first error: no leader"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn time_is_divided_and_a_stall_is_seen_where_it_was() {
        let mut recorder = Recorder::new(Some(ms(1_000)));
        [10, 20, 110].iter().for_each(|at| recorder.answered(Kind::Read, 0, ms(*at - 1), ms(*at)));
        recorder.answered(Kind::Read, 0, ms(120), ms(420));
        let intervals = recorder.intervals();
        let shown: Vec<_> = intervals.iter().map(|i| (i.ops_per_second.round(), i.max_ms.round())).collect();
        assert_eq!(shown, [(20.0, 1.0), (10.0, 1.0), (0.0, 0.0), (0.0, 0.0), (10.0, 300.0)]);
        // A long run is shown by as many points as fit a page.
        let mut long = Recorder::new(None);
        (0..100_000).for_each(|second| long.answered(Kind::Read, 0, ms(second * 1_000), ms(second * 1_000 + 1)));
        let intervals = long.intervals();
        assert!(intervals.len() <= INTERVALS_MAX, "{}", intervals.len());
        assert!(intervals.iter().all(|interval| interval.ops_per_second == 1.0));
    }

    #[test]
    fn reading_back_is_sound_only_without_any_finding() {
        assert!(Verified { during: 5, after: 7, ..Verified::default() }.is_sound());
        for found in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            let mut all = Verified::default();
            all.add(Verified { missing: found.0, wrong: found.1, unread: found.2, ..Verified::default() });
            assert!(!all.is_sound(), "{found:?}");
        }
    }
}
