//! What a volume has written and why, and what writers waited for.
//!
//! # Place
//! held by the engine; jobs, applier, admission and the pages count, `status` shows. Since the volume was opened

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mainstay_io::{LatencyCounts, LatencyHistogram};

use crate::manifest::LEVELS;

/// What a writer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum StallCause {
    /// The log is nearly full, and has to be cut or flushed first.
    Log,
    /// Too many memtables wait for their flush.
    Flush,
    /// L0 has too many runs: compaction is behind.
    Compaction,
    /// Memtables hold their whole share of the memory.
    Memory,
    /// The device of the log is slower than the writers: too much is queued for it.
    Device,
}

impl StallCause {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Log, Self::Flush, Self::Compaction, Self::Memory, Self::Device];

    /// As metrics and status name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Flush => "flush",
            Self::Compaction => "compaction",
            Self::Memory => "memory",
            Self::Device => "device",
        }
    }
}

/// Waits of writers for one cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StallStats {
    /// What they waited for.
    pub cause: StallCause,
    /// How many waits have ended, and how long they were.
    pub waits: LatencyCounts,
}

/// Bytes written by cause, and waits, since the volume was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Keys and values of the mutations that were applied, by all groups, those that a restart applied again among them.
    pub user_bytes: u64,
    /// Bytes written by the log.
    pub log_bytes: u64,
    /// Bytes of tables written by flushes.
    pub flush_bytes: u64,
    /// Bytes of tables written by compactions, by the level that they joined: L1 first.
    pub compaction_bytes: Vec<u64>,
    /// Bytes of tables that came from other replicas.
    pub fetched_bytes: u64,
    /// Bytes of manifest pages.
    pub pages_bytes: u64,
    /// Writes that were refused since the volume was full.
    pub space_refusals: u64,
    /// Waits of writers, by cause.
    pub stalls: Vec<StallStats>,
}

impl EngineStats {
    /// Bytes that went to the device. Superblocks are left out: some KiB an update.
    pub fn device_bytes(&self) -> u64 {
        let compactions = self.compaction_bytes.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
        let all = [self.log_bytes, self.flush_bytes, compactions, self.fetched_bytes, self.pages_bytes];
        all.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// Bytes that went to the device for each byte of keys and values; 0 before the first.
    pub fn write_amplification(&self) -> f64 {
        if self.user_bytes == 0 { 0.0 } else { self.device_bytes() as f64 / self.user_bytes as f64 }
    }
}

/// What counts.
#[derive(Debug, Default)]
pub(crate) struct StatsCounts {
    pub(crate) user_bytes: AtomicU64,
    pub(crate) flush_bytes: AtomicU64,
    pub(crate) compaction_bytes: [AtomicU64; LEVELS],
    pub(crate) fetched_bytes: AtomicU64,
    pub(crate) pages_bytes: AtomicU64,
    pub(crate) space_refusals: AtomicU64,
    stalls: [LatencyHistogram; StallCause::ALL.len()],
}

impl StatsCounts {
    /// A writer has waited.
    pub(crate) fn stalled(&self, cause: StallCause, waited: Duration) {
        if let Some(histogram) = self.stalls.get(cause as usize) {
            histogram.record(waited);
        }
    }

    pub(crate) fn snapshot(&self, log_bytes: u64) -> EngineStats {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        EngineStats {
            user_bytes: get(&self.user_bytes),
            log_bytes,
            flush_bytes: get(&self.flush_bytes),
            compaction_bytes: self.compaction_bytes.iter().map(get).collect(),
            fetched_bytes: get(&self.fetched_bytes),
            pages_bytes: get(&self.pages_bytes),
            space_refusals: get(&self.space_refusals),
            stalls: StallCause::ALL
                .iter()
                .zip(&self.stalls)
                .map(|(&cause, histogram)| StallStats { cause, waits: histogram.counts() })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_the_device_are_those_of_all_causes() {
        let stats = EngineStats {
            user_bytes: 100,
            log_bytes: 110,
            flush_bytes: 90,
            compaction_bytes: vec![1, 2, 3, 4, 5, 85],
            fetched_bytes: 60,
            pages_bytes: 40,
            ..EngineStats::default()
        };
        assert_eq!((stats.device_bytes(), stats.write_amplification()), (400, 4.0));
        assert_eq!(EngineStats::default().write_amplification(), 0.0);
    }

    #[test]
    fn each_cause_has_its_own_waits() {
        let counts = StatsCounts::default();
        counts.stalled(StallCause::Flush, Duration::from_millis(3));
        counts.stalled(StallCause::Flush, Duration::from_millis(1));
        counts.stalled(StallCause::Memory, Duration::from_millis(5));
        let waits = |cause| {
            let stats = counts.snapshot(0).stalls;
            let found = stats.into_iter().find(|stall| stall.cause == cause).expect("every cause is there");
            (found.waits.total(), found.waits.sum)
        };
        assert_eq!(waits(StallCause::Flush), (2, Duration::from_millis(4)));
        assert_eq!(waits(StallCause::Memory), (1, Duration::from_millis(5)));
        assert_eq!(waits(StallCause::Log).0, 0);
    }
}
