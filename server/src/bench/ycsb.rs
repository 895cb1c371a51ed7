//! What a client does next: the core workloads of YCSB and a few plain ones.
//!
//! # Place
//! pure but for the count of records, which clients share; `drive` carries out what is drawn here
//! # Sources
//! The files `workloads/workloada` to `workloadf` of YCSB, and the paper named in `draws`.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::draws::{Chooser, Numbers};
use crate::cli::{Distribution, Workload};

/// A scan takes from one to so many pairs, each number as often.
const SCAN_PAIRS_MAX: u64 = 100;

/// What an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Read,
    Update,
    Insert,
    Scan,
    /// A read and, when it is answered, an update of the same record; its latency is that of both.
    ReadModifyWrite,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Update => "update",
            Self::Insert => "insert",
            Self::Scan => "scan",
            Self::ReadModifyWrite => "read-modify-write",
        }
    }

    pub(super) fn writes(self) -> bool {
        matches!(self, Self::Update | Self::Insert | Self::ReadModifyWrite)
    }
}

/// A workload, as shares of 100.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    shares: [(Kind, u64); 2],
    pub(super) distribution: Distribution,
    /// All records are there before it begins.
    pub(super) loaded: bool,
}

/// What is done at all, how often of 100, and which records it meets.
pub(super) fn mix(workload: Workload) -> Mix {
    use Distribution::{Latest, Uniform, Zipfian};
    use Kind::{Insert, Read, ReadModifyWrite, Scan, Update};
    let (shares, distribution, loaded) = match workload {
        Workload::Put => ([(Update, 100), (Read, 0)], Uniform, false),
        Workload::Get => ([(Read, 100), (Update, 0)], Uniform, false),
        Workload::Mixed => ([(Update, 25), (Read, 75)], Uniform, false),
        Workload::A => ([(Read, 50), (Update, 50)], Zipfian, true),
        Workload::B => ([(Read, 95), (Update, 5)], Zipfian, true),
        Workload::C => ([(Read, 100), (Update, 0)], Zipfian, true),
        Workload::D => ([(Read, 95), (Insert, 5)], Latest, true),
        Workload::E => ([(Scan, 95), (Insert, 5)], Zipfian, true),
        Workload::F => ([(Read, 50), (ReadModifyWrite, 50)], Zipfian, true),
        Workload::Fill => ([(Insert, 100), (Read, 0)], Uniform, false),
        Workload::Overwrite => ([(Update, 100), (Read, 0)], Uniform, true),
        Workload::Read => ([(Read, 100), (Update, 0)], Uniform, true),
        Workload::Scan => ([(Scan, 100), (Read, 0)], Uniform, true),
    };
    Mix { shares, distribution, loaded }
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) kind: Kind,
    pub(super) record: u64,
    /// Of a scan.
    pub(super) pairs: u64,
    /// Which of the durabilities, for what writes.
    pub(super) level: usize,
}

/// The operations of one client, one after the other.
pub(super) struct Source {
    mix: Mix,
    levels: usize,
    numbers: Numbers,
    chooser: Chooser,
}

impl Source {
    pub(super) fn new(mix: Mix, levels: usize, seed: u64, client: u32) -> Self {
        let chooser = Chooser::new(mix.distribution);
        Self { mix, levels: levels.max(1), numbers: Numbers::of_client(seed, client), chooser }
    }

    pub(super) fn next(&mut self, population: &Population) -> Operation {
        let share = self.numbers.below(100);
        let [(first, shares), (second, _)] = self.mix.shares;
        let kind = if share < shares { first } else { second };
        let record = match kind {
            Kind::Insert => population.allot(),
            _ => self.chooser.choose(&mut self.numbers, population.known().max(1)),
        };
        let pairs = if kind == Kind::Scan { 1 + self.numbers.below(SCAN_PAIRS_MAX) } else { 0 };
        let level = if kind.writes() { self.numbers.below(self.levels as u64) as usize } else { 0 };
        Operation { kind, record, pairs, level }
    }
}

/// Which records there are: numbers from 0 on. Those that clients choose from are known, which is those up to the first insert that is not
/// answered yet.
pub(super) struct Population {
    next: AtomicU64,
    known: AtomicU64,
    /// Answered, behind one that is not.
    ahead: Mutex<BTreeSet<u64>>,
}

impl Population {
    pub(super) fn new(records: u64) -> Self {
        Self { next: AtomicU64::new(records), known: AtomicU64::new(records), ahead: Mutex::default() }
    }

    pub(super) fn known(&self) -> u64 {
        self.known.load(Ordering::Acquire)
    }

    /// The number of a record to insert.
    pub(super) fn allot(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// An insert was answered, or failed: nobody waits for it any more.
    pub(super) fn settle(&self, record: u64) {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        ahead.insert(record);
        let mut known = self.known();
        while ahead.remove(&known) {
            known += 1;
        }
        self.known.store(known, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_workload_does_what_its_shares_say() {
        for workload in Workload::value_variants() {
            let mix = mix(*workload);
            assert_eq!(mix.shares.iter().map(|(_, share)| share).sum::<u64>(), 100, "{workload:?}");
            let population = Population::new(1_000);
            let mut source = Source::new(mix, 2, 1, 0);
            let mut counts: BTreeMap<Kind, u64> = BTreeMap::new();
            let mut levels = [0; 2];
            for _ in 0..20_000 {
                let operation = source.next(&population);
                *counts.entry(operation.kind).or_default() += 1;
                levels[operation.level] += u64::from(operation.kind.writes());
                match operation.kind {
                    Kind::Insert => population.settle(operation.record),
                    _ => assert!(operation.record < population.known()),
                }
                assert_eq!((1..=SCAN_PAIRS_MAX).contains(&operation.pairs), operation.kind == Kind::Scan);
            }
            for (kind, share) in mix.shares {
                let drawn = counts.remove(&kind).unwrap_or_default() as f64 / 200.0;
                assert!((drawn - share as f64).abs() < 1.5, "{workload:?} {kind:?}: {drawn} of 100, not {share}");
            }
            assert!(counts.is_empty(), "{workload:?}: {counts:?}");
            let written = levels[0] + levels[1];
            assert!(levels[0].abs_diff(written / 2) <= written / 20, "{workload:?}: {levels:?}");
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_operations() {
        let drawn = |seed, client| {
            let population = Population::new(500);
            let mut source = Source::new(mix(Workload::A), 1, seed, client);
            (0..200).map(|_| source.next(&population)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(7, 3), drawn(7, 3));
        assert_ne!(drawn(7, 3), drawn(7, 4));
        assert_ne!(drawn(7, 3), drawn(8, 3));
    }

    #[test]
    fn a_record_is_known_once_all_before_it_are_answered() {
        let population = Population::new(2);
        let records = [population.allot(), population.allot(), population.allot()];
        assert_eq!((records, population.known()), ([2, 3, 4], 2));
        population.settle(4);
        population.settle(3);
        assert_eq!(population.known(), 2);
        population.settle(2);
        assert_eq!(population.known(), 5);
    }
}
