//! Damage below the durable position, for an owner that has the records from elsewhere.

use super::*;

const BLOCK: usize = 4096;

fn with_holes(epoch: u64) -> WalOptions {
    WalOptions { holes: true, ..options(epoch) }
}

/// Batches of one block with one record each; the last `seal` of them say that those before were durable.
fn committed(count: usize) -> Vec<u8> {
    let bench = Bench::blank(64 * KIB);
    for i in 0..count {
        bench.commit(&payload(i, 3000)).expect("commits");
    }
    bench.device.image()
}

/// What was delivered: the number of a record, or none for a hole.
fn found(bench: &Bench) -> Vec<Option<usize>> {
    let number = |payload: &Bytes| (0..100).find(|&i| self::payload(i, payload.len()) == payload[..]);
    let each = bench.delivered.iter().map(|(_, kind, _, bytes)| match *kind {
        RecordKind::HOLE => None,
        _ => Some(number(bytes).expect("a record that was written")),
    });
    each.collect()
}

#[test]
fn a_damaged_batch_is_a_hole_and_the_log_goes_on() {
    let damages: [fn(&mut [u8]); 4] = [|b| b[2000] ^= 1, |b| b[50] ^= 1, |b| b.fill(0), |b| b[96..].fill(0xFF)];
    for damage in damages {
        for at in 0..4 {
            let mut image = committed(5);
            damage(&mut image[at * BLOCK..(at + 1) * BLOCK]);
            let refused = Bench::open(image.clone(), options(2)).err().expect("without holes it is corrupt");
            assert_eq!(refused.kind(), ErrorKind::Corrupt);
            let bench = Bench::open(image, with_holes(2)).expect("opens");
            let expect: Vec<_> = (0..5).map(|i| (i != at).then_some(i)).collect();
            assert_eq!(found(&bench), expect, "damage of batch {at}");
            assert_eq!((bench.recovery.holes, bench.recovery.end), (1, Lsn(5 * BLOCK as u64)));
            // It goes on behind what was there, and the hole is met again.
            bench.commit(&payload(7, 3000)).expect("commits");
            let again = Bench::open(bench.device.image(), with_holes(3)).expect("opens again");
            assert_eq!(found(&again), [expect, vec![Some(7)]].concat());
        }
    }
}

#[test]
fn of_a_damaged_batch_the_whole_records_are_delivered() {
    let bench = Bench::blank(64 * KIB);
    // The log's task has not run yet, so they share a batch.
    let outcomes: Vec<_> = (0..6).map(|i| bench.append(&payload(i, 300))).collect();
    for _ in 0..4 {
        bench.device.turn();
    }
    assert!(outcomes.iter().all(|o| o.get().is_some_and(|r| r.is_ok())));
    bench.commit(&payload(6, 300)).expect("commits");
    let image = bench.device.image();
    let opened = Bench::open(image.clone(), with_holes(2)).expect("opens");
    let places: Vec<RecordPos> = opened.delivered.iter().map(|d| d.2).collect();
    let shared = places.iter().filter(|p| p.batch == places[3].batch).count();
    assert!(shared >= 3, "a batch of some records: {places:?}");
    let at = |pos: &RecordPos| pos.batch.0 as usize + pos.offset as usize;
    // The payload of one record, its length, and the padding.
    let cases: [(usize, u64); 3] = [(at(&places[3]) + 100, 1), (at(&places[3]) + 8, 1), (0, 0)];
    for (place, holes) in cases {
        let mut image = image.clone();
        let place = if place == 0 { places[3].batch.0 as usize + 4095 } else { place };
        image[place] ^= 0x10;
        let bench = Bench::open(image, with_holes(2)).expect("opens");
        assert_eq!(bench.recovery.holes, holes, "damage at {place}");
        let seen = found(&bench);
        assert!((0..3).all(|i| seen.contains(&Some(i))), "{seen:?}");
        assert!(seen.contains(&Some(6)), "{seen:?}");
        assert_eq!(seen.contains(&Some(3)), holes == 0);
    }
}

#[test]
fn damage_at_the_end_of_a_clean_log_is_a_hole_up_to_its_end() {
    for bad in [4 * BLOCK + 50, 4 * BLOCK + 1000] {
        let mut image = committed(5);
        image[bad] ^= 1;
        let clean = Some(Lsn(5 * BLOCK as u64));
        let bench = Bench::open(image, WalOptions { clean_end: clean, ..with_holes(2) }).expect("opens");
        assert_eq!(found(&bench), [Some(0), Some(1), Some(2), Some(3), None]);
        assert_eq!(bench.recovery.end, Lsn(5 * BLOCK as u64));
    }
}

#[test]
fn a_torn_tail_is_cut_and_no_hole() {
    let mut image = committed(5);
    image[4 * BLOCK + 1000] ^= 1;
    let bench = Bench::open(image, with_holes(2)).expect("opens");
    assert_eq!(found(&bench), [Some(0), Some(1), Some(2), Some(3)]);
    assert_eq!((bench.recovery.holes, bench.recovery.end), (0, Lsn(4 * BLOCK as u64)));
}

/// Both may be the work of one thing.
#[test]
fn a_torn_tail_behind_damage_is_a_hole_too() {
    let mut image = committed(5);
    image[BLOCK + 1000] ^= 1;
    image[4 * BLOCK + 1000] ^= 1;
    let bench = Bench::open(image, with_holes(2)).expect("opens");
    assert_eq!(found(&bench), [Some(0), None, Some(2), Some(3), None]);
    assert_eq!((bench.recovery.holes, bench.recovery.end), (2, Lsn(5 * BLOCK as u64)));
}

#[test]
fn an_end_that_cannot_be_read_is_a_hole_until_something_is_written_behind_it() {
    let image = committed(5);
    for unread in [&[4 * BLOCK][..], &[4 * BLOCK, 5 * BLOCK, 6 * BLOCK], &[3 * BLOCK, 4 * BLOCK]] {
        let lost = unread.iter().filter(|offset| **offset < 5 * BLOCK).count();
        let left = (0..5 - lost).map(Some);
        let hole: Vec<_> = left.chain([None]).collect();
        let end = Lsn((unread[unread.len() - 1] + BLOCK) as u64);
        // Nothing was written: it is met again.
        for _ in 0..2 {
            let bench = Bench::open_without(image.clone(), unread, with_holes(2)).expect("opens");
            assert_eq!((found(&bench), bench.recovery.end), (hole.clone(), end), "{unread:?}");
        }
        let bench = Bench::open_without(image.clone(), unread, with_holes(2)).expect("opens");
        bench.commit(&payload(7, 3000)).expect("commits");
        let again = Bench::open_without(bench.device.image(), unread, with_holes(3)).expect("opens again");
        assert_eq!(found(&again), [hole.clone(), vec![Some(7)]].concat(), "{unread:?}");
        // Given again, it is what it was. What lies between, if anything does, is a hole.
        let given = Bench::open(bench.device.image(), with_holes(3)).expect("opens when it can be read again");
        let between = if end == Lsn(5 * BLOCK as u64) { vec![] } else { vec![None] };
        assert_eq!(found(&given), [(0..5).map(Some).collect(), between, vec![Some(7)]].concat(), "{unread:?}");
    }
}

#[test]
fn of_two_batches_in_flight_the_second_shows_where_the_log_goes_on_behind_the_first() {
    let bench = Bench::open(committed(3), options(2)).expect("opens");
    bench.device.hold(true);
    for i in 3..5 {
        let _ = bench.append(&payload(i, 3000));
        bench.device.turn();
    }
    bench.device.complete(0, true);
    bench.device.complete(0, true);
    let opened = Bench::open_without(bench.device.image(), &[3 * BLOCK], with_holes(3)).expect("opens");
    assert_eq!(found(&opened), [Some(0), Some(1), Some(2), None, Some(4)]);
    assert_eq!(opened.recovery.end, Lsn(5 * BLOCK as u64));
}
