//! The log of a node alone in the simulation: appends, power cuts, clean closes, releases, wraps.
//!
//! # Checked
//! - L1. Acknowledgements come in the order of the calls.
//! - L2. After a power cut the log delivers every acknowledged record that was not released, in order, whole,
//!   then perhaps some that were appended and not acknowledged, and nothing else.
//! - L3. A record that was acknowledged can be read at its position until it is released.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_wal::{GroupId, Lsn, Record, RecordKind, RecordPos, Reserve, Wal, WalOptions};

use crate::disk::Disk;
use crate::rt::{Executor, Group, SimRng, WallClock, environment};
use crate::world::Settings;

/// What the superblock would hold.
#[derive(Clone, Copy)]
struct Super {
    epoch: u64,
    start: Lsn,
    clean_end: Option<Lsn>,
    /// In the life before this one.
    closed: bool,
}

/// What a life of the log has been told.
#[derive(Default)]
struct Told {
    /// The next record that must be acknowledged.
    next: u64,
    positions: BTreeMap<u64, RecordPos>,
    problems: Vec<String>,
}

fn payload(number: u64) -> Vec<Bytes> {
    let mut rng = SimRng::new(number);
    let length = if rng.chance(20) { rng.range(0, 150_000) } else { rng.range(0, 5000) };
    let mut tail = vec![0; length as usize];
    rng.fill(&mut tail);
    vec![Bytes::copy_from_slice(&number.to_le_bytes()), Bytes::from(tail)]
}

fn number(bytes: &Bytes) -> Result<u64, String> {
    let Some(number) = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)) else {
        return Err(format!("a record of {} bytes", bytes.len()));
    };
    if payload(number).concat() == bytes[..] { Ok(number) } else { Err(format!("record {number} is not whole")) }
}

/// Runs one seed: `lives` lives of the log, most of them ended by a power cut. Returns the records appended.
///
/// # Errors
/// What did not hold.
pub fn run(seed: u64, lives: u64, lying_disks: bool) -> Result<u64, String> {
    let mut rng = SimRng::new(seed);
    let settings = Settings { lying_disks, ..Settings::draw(&mut rng) };
    let executor = Executor::new(seed);
    let result = executor.block_on(live(&executor, &settings, &mut rng, lives));
    executor.shut_down();
    result
}

async fn live(executor: &Arc<Executor>, settings: &Settings, rng: &mut SimRng, lives: u64) -> Result<u64, String> {
    let wal_bytes = rng.range(1, 4) << 20;
    let disk = Disk::new(executor, settings, rng.u64());
    let mut stored = Super { epoch: 0, start: Lsn(0), clean_end: None, closed: false };
    let mut formatted = false;
    // Records below `released` may be gone; those below `acknowledged` and not released must be there.
    let (mut released, mut acknowledged, mut next) = (0, 0, 0);
    for life in 1..=lives {
        let group = Group(life);
        disk.power_on(group);
        let media = disk.open()?;
        if !formatted {
            media.create_zones(wal_bytes).await.map_err(|e| e.to_string())?;
            formatted = true;
        }
        let (zone, _) = media.zones(wal_bytes).map_err(|e| e.to_string())?;
        let mut found: Vec<(u64, RecordPos)> = Vec::new();
        let mut bad = None;
        stored.epoch += 1;
        let options = WalOptions {
            volume: [7; 16],
            epoch: stored.epoch,
            start: stored.start,
            clean_end: stored.clean_end,
            closed: stored.closed,
            in_flight_max: rng.range(1, 6) as usize,
            batch_bytes_max: 1 << rng.range(16, 21),
            holes: false,
        };
        let mut deliver = |_, _, pos, payload: Bytes| {
            match number(&payload) {
                Ok(number) => found.push((number, pos)),
                Err(e) => bad = Some(e),
            }
            Ok(())
        };
        let environment = environment(executor, group, WallClock::ahead(Duration::ZERO));
        let opened = Wal::open(zone, environment, options, &mut deliver).await;
        let (wal, recovery) = opened.map_err(|e| format!("life {life}: open: {e} acknowledged={acknowledged}"))?;
        if let Some(e) = bad {
            return Err(format!("life {life}: {e}"));
        }
        for pair in found.windows(2) {
            if pair[1].0 != pair[0].0 + 1 || pair[1].1 <= pair[0].1 {
                return Err(format!("life {life}: {:?} follows {:?}", pair[1], pair[0]));
            }
        }
        let (first, end) = match (found.first(), found.last()) {
            (Some(first), Some(last)) => (first.0, last.0 + 1),
            _ => (released, released),
        };
        if first > released || end < acknowledged || end > next {
            return Err(format!(
                "life {life}: the log holds {first}..{end}, not released from {released}, acknowledged to \
                 {acknowledged}, appended to {next}, {recovery:?}"
            ));
        }
        if stored.closed && end != next {
            return Err(format!("life {life}: a clean log lost records: holds to {end}, appended to {next}"));
        }
        stored.closed = false;
        next = end;
        let told = Arc::new(Mutex::new(Told { next, positions: found.into_iter().collect(), problems: Vec::new() }));
        let death = executor.now() + Duration::from_micros(rng.range(10, 60_000));
        while executor.now() < death {
            for _ in 0..rng.range(1, 12) {
                let record = Record { group: GroupId(next % 3), kind: RecordKind(33), payload: payload(next) };
                let (told, this) = (told.clone(), next);
                let on_durable = Box::new(move |result: mainstay_wal::Result<RecordPos>| {
                    let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(pos) if told.next == this => {
                            told.next += 1;
                            told.positions.insert(this, pos);
                        }
                        Ok(_) => {
                            let expected = told.next;
                            told.problems.push(format!("{this} was acknowledged before {expected}"));
                        }
                        Err(_) => {}
                    }
                });
                if wal.stats().used_bytes > wal_bytes / 3 {
                    break;
                }
                wal.append(record, Reserve::Normal, on_durable);
                next += 1;
            }
            executor.sleep_until(executor.now() + Duration::from_micros(rng.range(1, 3000))).await;
            let sample = {
                let told = told.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(problem) = told.problems.first() {
                    return Err(format!("life {life}: {problem}"));
                }
                let count = told.positions.len() as u64;
                told.positions.iter().nth(rng.below(count) as usize).map(|(n, p)| (*n, *p))
            };
            if let Some((expect, pos)) = sample {
                let bytes = wal.read(pos).await.map_err(|e| format!("life {life}: read of {expect}: {e}"))?;
                if number(&bytes)? != expect {
                    return Err(format!("life {life}: another record stands where {expect} was"));
                }
                if wal.stats().used_bytes > wal_bytes / 4 && rng.chance(300) {
                    stored.start = pos.batch;
                    released = expect;
                    wal.release(pos.batch);
                    let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                    told.positions.retain(|_, p| p.batch >= pos.batch);
                }
            }
        }
        acknowledged = told.lock().unwrap_or_else(PoisonError::into_inner).next;
        if rng.chance(200) {
            let end = wal.close().await.map_err(|e| format!("life {life}: close: {e}"))?;
            (stored.clean_end, stored.closed) = (Some(end), true);
            acknowledged = told.lock().unwrap_or_else(PoisonError::into_inner).next;
            if acknowledged != next {
                return Err(format!("life {life}: closed with {acknowledged} of {next} acknowledged"));
            }
        }
        disk.cut_power();
        executor.kill(group);
        executor.run_as(group, move || drop((wal, media)));
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_what_it_acknowledged() {
        let mut records = 0;
        for seed in 0..40 {
            match run(seed, 12, false) {
                Ok(count) => records += count,
                Err(e) => panic!("seed {seed}: {e}"),
            }
        }
        assert!(records > 5_000, "the runs are long enough to wrap the ring: records={records}");
    }

    #[test]
    fn a_disk_that_lies_is_found_out() {
        let found = (0..20).filter(|seed| run(*seed, 12, true).is_err()).count();
        assert!(found > 10, "found={found} of 20");
    }
}
