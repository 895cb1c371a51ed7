//! Rot of a log that is open: found before a restart needs what it has taken.

use super::*;
use crate::Checked;

const BLOCK: usize = 4096;

fn check(bench: &Bench, from: Lsn) -> Checked {
    bench.device.run(bench.wal.check(from, u64::MAX)).expect("readable")
}

/// A ring of sixteen blocks that has been gone round, with a batch that skipped the end of a lap.
fn round() -> Bench {
    let bench = Bench::blank(64 * KIB);
    for i in 0..14 {
        bench.commit(&payload(i, 3000)).expect("commits");
    }
    bench.wal.release(Lsn(10 * BLOCK as u64));
    // Three blocks do not fit into the two that are left of the lap.
    for i in 14..16 {
        bench.commit(&payload(i, 10_000)).expect("commits");
    }
    bench
}

#[test]
fn a_whole_log_is_read_to_its_end_and_in_parts() {
    let bench = round();
    let (start, end) = (bench.wal.start(), bench.wal.durable());
    assert!(end.0 > 64 * KIB as u64, "it went round");
    assert_eq!(check(&bench, start), Checked { next: end, damaged: None });
    // One batch at a time; what was released meanwhile is left out.
    let mut at = Lsn(0);
    let mut parts = 0;
    while at < end {
        let checked = bench.device.run(bench.wal.check(at, 1)).expect("readable");
        assert!(checked.damaged.is_none() && checked.next > at);
        (at, parts) = (checked.next, parts + 1);
    }
    assert_eq!(parts, 4 + 2);
}

#[test]
fn damage_is_found_wherever_it_is_and_gone_once_the_log_is_cut_behind_it() {
    let whole = round();
    let (start, end, image) = (whole.wal.start(), whole.wal.durable(), whole.device.image());
    // Every block that a batch lies in.
    let mut places: Vec<u64> = (10..14).chain(16..22).map(|block| block * BLOCK as u64).collect();
    let begins = [10, 11, 12, 13, 16, 19].map(|block| block * BLOCK as u64);
    for place in places.drain(..) {
        let mut damages: Vec<fn(&mut [u8])> = vec![|b| b.fill(0), |b| b[200] ^= 1, |b| b[4095] ^= 1];
        if begins.contains(&place) {
            damages.push(|b| b[20] ^= 1);
        }
        let begin = begins.into_iter().rev().find(|begin| *begin <= place).expect("in some batch");
        for damage in damages {
            let mut bytes = image.clone();
            let at = place as usize % bytes.len();
            damage(&mut bytes[at..at + BLOCK]);
            whole.device.put(bytes);
            let checked = check(&whole, start);
            // Where the end of a lap was skipped, the batch is missed where the one before it ended.
            let expect = if begin == 16 * BLOCK as u64 { 14 * BLOCK as u64 } else { begin };
            assert_eq!(checked, Checked { next: Lsn(expect), damaged: Some(Lsn(expect)) }, "damage at {place}");
        }
    }
    whole.device.put(image.clone());
    let mut bytes = image;
    bytes[11 * BLOCK + 300] ^= 4;
    whole.device.put(bytes);
    whole.wal.release(Lsn(12 * BLOCK as u64));
    assert_eq!(check(&whole, start), Checked { next: end, damaged: None });
}

#[test]
fn what_was_never_written_there_is_damage_though_it_is_whole() {
    let bench = round();
    let (start, mut image) = (bench.wal.start(), bench.device.image());
    // A write that was lost leaves what an earlier lap had; one that went astray puts a batch where another belongs.
    let moved: Vec<u8> = image[11 * BLOCK..12 * BLOCK].to_vec();
    image[12 * BLOCK..13 * BLOCK].copy_from_slice(&moved);
    bench.device.put(image);
    assert_eq!(check(&bench, start).damaged, Some(Lsn(12 * BLOCK as u64)));
}

#[test]
fn what_is_not_durable_is_not_judged() {
    let bench = round();
    let end = bench.wal.durable();
    bench.device.hold(true);
    let _waits = bench.append(&payload(20, 3000));
    for _ in 0..4 {
        bench.device.turn();
    }
    assert_eq!(bench.device.held().len(), 1, "it is under way");
    assert_eq!(check(&bench, bench.wal.start()), Checked { next: end, damaged: None });
}
