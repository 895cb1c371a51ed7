//! Counts of durations by size.
//!
//! # Invariants
//! - H1. Recording never blocks and takes no memory: some additions. A snapshot taken beside it may lack the last of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets with an upper bound.
pub const LATENCY_BUCKETS: usize = 20;
/// Upper bound of the first bucket; each next one is twice as wide.
const FIRST_BOUND: Duration = Duration::from_micros(16);

/// How many durations fell into each bucket. Shared by who records and who looks.
#[derive(Debug, Default)]
pub struct LatencyHistogram {
    counts: [AtomicU64; LATENCY_BUCKETS + 1],
    sum_nanos: AtomicU64,
}

/// The counts at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencyCounts {
    /// Durations in each bucket, the last of them unbounded.
    pub counts: [u64; LATENCY_BUCKETS + 1],
    /// All durations together.
    pub sum: Duration,
}

/// Upper bound, inclusive, of a bucket: 16 us for the first, 8.4 s for the last that has one.
pub fn latency_bound(bucket: usize) -> Option<Duration> {
    let shift = u32::try_from(bucket).ok().filter(|_| bucket < LATENCY_BUCKETS)?;
    FIRST_BOUND.checked_mul(1 << shift)
}

impl LatencyHistogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let bucket = (0..LATENCY_BUCKETS)
            .find(|i| latency_bound(*i).is_some_and(|bound| duration <= bound))
            .unwrap_or(LATENCY_BUCKETS);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn counts(&self) -> LatencyCounts {
        LatencyCounts {
            counts: std::array::from_fn(|i| self.counts.get(i).map_or(0, |count| count.load(Ordering::Relaxed))),
            sum: Duration::from_nanos(self.sum_nanos.load(Ordering::Relaxed)),
        }
    }
}

impl LatencyCounts {
    /// Durations counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// What was counted since `earlier` was taken of the same histogram.
    pub fn since(&self, earlier: &Self) -> Self {
        let counts = std::array::from_fn(|i| self.counts[i].saturating_sub(earlier.counts[i]));
        Self { counts, sum: self.sum.saturating_sub(earlier.sum) }
    }

    /// A bound that half of the durations do not exceed: that of the bucket in which the median lies, twice that of the last
    /// bucket that has one for those beyond. `None` when nothing was counted.
    pub fn median_bound(&self) -> Option<Duration> {
        let half = self.total().div_ceil(2);
        let mut below = 0;
        let bucket = self.counts.iter().position(|count| {
            below += count;
            half > 0 && below >= half
        })?;
        latency_bound(bucket).or_else(|| latency_bound(LATENCY_BUCKETS - 1).map(|bound| bound * 2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_a_part_of_the_time_is_bounded_by_its_bucket() {
        let histogram = LatencyHistogram::default();
        let record = |micros: &[u64]| {
            let before = histogram.counts();
            micros.iter().for_each(|micros| histogram.record(Duration::from_micros(*micros)));
            histogram.counts().since(&before).median_bound()
        };
        assert_eq!(record(&[]), None);
        assert_eq!(record(&[100]), Some(Duration::from_micros(128)));
        assert_eq!(record(&[10, 10, 5000]), Some(Duration::from_micros(16)));
        assert_eq!(record(&[10, 5000, 5000]), Some(Duration::from_micros(8192)), "what was before does not count");
        assert_eq!(record(&[10, 5000]), Some(Duration::from_micros(16)), "the lower of two");
        assert_eq!(record(&[u64::MAX / 2000]), latency_bound(LATENCY_BUCKETS - 1).map(|bound| bound * 2));
    }

    #[test]
    fn a_duration_falls_into_the_first_bucket_that_holds_it() {
        let check = |micros: u64, bucket: usize| {
            let histogram = LatencyHistogram::default();
            histogram.record(Duration::from_micros(micros));
            let counts = histogram.counts();
            assert_eq!(counts.counts.iter().position(|n| *n == 1), Some(bucket), "{micros} us");
            assert_eq!((counts.total(), counts.sum), (1, Duration::from_micros(micros)));
        };
        check(0, 0);
        check(16, 0);
        check(17, 1);
        check(32, 1);
        check(1000, 6);
        check(8_388_608, LATENCY_BUCKETS - 1);
        check(8_388_609, LATENCY_BUCKETS);
        check(60_000_000, LATENCY_BUCKETS);
        assert_eq!(latency_bound(LATENCY_BUCKETS - 1), Some(Duration::from_micros(8_388_608)));
        assert_eq!(latency_bound(LATENCY_BUCKETS), None);
    }
}
