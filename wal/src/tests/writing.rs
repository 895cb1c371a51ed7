//! Batches, the prefix rule, the ring's space, closing.

use super::*;

#[test]
fn what_is_appended_is_found_again_in_order() {
    let bench = Bench::blank(MIB);
    let payloads: Vec<Vec<u8>> = (0..50).map(|i| payload(i, i * 37)).collect();
    let positions: Vec<RecordPos> = payloads.iter().map(|p| bench.commit(p).expect("commits")).collect();
    assert!(positions.is_sorted());
    let bench = bench.crash(2);
    assert_eq!(bench.payloads(), payloads);
    let found: Vec<RecordPos> = bench.delivered.iter().map(|d| d.2).collect();
    assert_eq!(found, positions);
    for (pos, payload) in positions.iter().zip(&payloads) {
        assert_eq!(bench.device.run(bench.wal.read(*pos)).expect("reads back"), payload);
    }
    assert_eq!((bench.recovery.records, bench.recovery.batches, bench.recovery.torn_bytes), (50, 50, 0));
}

#[test]
fn what_waits_becomes_one_batch_with_one_write() {
    let bench = Bench::blank(MIB);
    let outcomes: Vec<Outcome> = (0..100).map(|i| bench.append(&payload(i, 256))).collect();
    assert_eq!(bench.device.counts().0, 0);
    bench.device.turn();
    assert_eq!(bench.device.counts().0, 1);
    assert!(outcomes.iter().all(|o| matches!(o.get(), Some(Ok(pos)) if pos.batch == Lsn(0))));
    let stats = bench.wal.stats();
    assert_eq!((stats.batches, stats.records, stats.payload_bytes), (1, 100, 25_600));
    // The flush that open made is the only one: the write is durable by itself.
    assert_eq!(bench.device.counts().1, 1);
}

#[test]
fn batches_are_acknowledged_in_order_whatever_the_order_of_completions() {
    let bench = Bench::blank(MIB);
    let outcomes = bench.three_in_flight(0, 100);
    bench.device.complete(2, true);
    bench.device.complete(1, true);
    bench.device.turn();
    assert!(outcomes.iter().all(|o| o.get().is_none()));
    assert!(bench.wal.stats().oldest_write.is_some(), "the first has no answer yet");
    assert_eq!(bench.wal.durable(), Lsn(0));
    bench.device.complete(0, true);
    bench.device.turn();
    assert!(outcomes.iter().all(|o| matches!(o.get(), Some(Ok(_)))));
    assert_eq!(bench.wal.durable(), Lsn(3 * 4096));
    assert_eq!(bench.wal.stats().write_latency.total(), 3, "each write is timed by itself");
    assert_eq!(bench.wal.stats().oldest_write, None);
}

#[test]
fn no_more_batches_are_in_flight_than_allowed_and_the_rest_shares_the_next() {
    let bench = Bench::blank(MIB);
    bench.device.hold(true);
    for i in 0..10 {
        let _ = bench.append(&payload(i, 100));
        bench.device.turn();
    }
    assert_eq!(bench.device.held().len(), 3, "of one, one and two records");
    let wakes = bench.device.wakes();
    let last = bench.append(&payload(10, 100));
    assert_eq!(bench.device.wakes(), wakes, "a record cannot be written now, so it wakes nobody");
    bench.device.complete(0, true);
    bench.device.turn();
    assert_eq!(bench.device.counts().0, 4);
    bench.device.hold(false);
    while !bench.device.held().is_empty() {
        bench.device.complete(0, true);
    }
    bench.device.turn();
    assert_eq!(bench.device.counts().0, 4);
    assert!(matches!(last.get(), Some(Ok(pos)) if pos.batch == Lsn(3 * 4096)));
}

/// Few records behind many wait for more of them or for the device, whichever comes first.
#[test]
fn behind_batches_in_flight_goes_one_of_as_many_records() {
    let bench = Bench::blank(MIB);
    bench.device.hold(true);
    let first: Vec<Outcome> = (0..4).map(|i| bench.append(&payload(i, 100))).collect();
    bench.device.turn();
    let wakes = bench.device.wakes();
    let mut second: Vec<Outcome> = (4..7).map(|i| bench.append(&payload(i, 100))).collect();
    bench.device.turn();
    assert_eq!((bench.device.held().len(), bench.device.wakes()), (1, wakes), "three behind four wake nobody");
    second.push(bench.append(&payload(7, 100)));
    assert_eq!(bench.device.wakes(), wakes + 1, "four do");
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 2);

    let third = bench.append(&payload(8, 100));
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 2, "one behind eight waits");
    bench.device.complete(0, true);
    bench.device.complete(0, true);
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 1, "and goes when the device is done with them");
    bench.device.complete(0, true);
    bench.device.turn();
    assert!(first.iter().chain(&second).chain([&third]).all(|o| matches!(o.get(), Some(Ok(_)))));
    assert_eq!((bench.wal.stats().batches, bench.wal.stats().records), (3, 9));
}

/// Long records: a batch holds few of them, and is not waited for until it holds more than it can.
#[test]
fn a_batch_of_long_records_goes_when_it_is_full() {
    let bench = Bench::open(vec![0; 8 * MIB], WalOptions { batch_bytes_max: 64 * KIB, ..options(1) }).expect("opens");
    bench.device.hold(true);
    let outcomes: Vec<Outcome> = (0..7).map(|i| bench.append(&payload(i, 24 * KIB))).collect();
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 3, "two in each, and one that does not fit");
    bench.device.hold(false);
    while !bench.device.held().is_empty() {
        bench.device.complete(0, true);
    }
    bench.device.turn();
    assert!(outcomes.iter().all(|o| matches!(o.get(), Some(Ok(_)))));
}

#[test]
fn a_sleeping_writer_is_woken_once() {
    let bench = Bench::blank(MIB);
    bench.device.turn();
    let before = bench.device.wakes();
    for i in 0..5 {
        let _ = bench.append(&payload(i, 10));
    }
    assert_eq!(bench.device.wakes(), before + 1);
}

#[test]
fn a_record_longer_than_a_batch_has_one_of_its_own() {
    let bench = Bench::open(vec![0; 8 * MIB], WalOptions { batch_bytes_max: 64 * KIB, ..options(1) }).expect("opens");
    let small = bench.append(&payload(1, 100));
    let large = bench.append(&payload(2, MIB + 77));
    let after = bench.append(&payload(3, 100));
    bench.device.turn();
    assert_eq!(bench.device.counts().0, 3);
    assert!([small, large, after].iter().all(|o| matches!(o.get(), Some(Ok(_)))));
    assert_eq!(bench.crash(2).payloads(), [payload(1, 100), payload(2, MIB + 77), payload(3, 100)]);
}

#[test]
fn the_longest_record_fits_and_one_byte_more_is_invalid() {
    let bench = Bench::blank(80 * MIB);
    assert_eq!(bench.wal.record_bytes_max(), crate::RECORD_BYTES_MAX);
    let long = payload(1, crate::RECORD_BYTES_MAX);
    let pos = bench.commit(&long).expect("the longest record");
    assert_eq!(bench.device.run(bench.wal.read(pos)).expect("reads back"), long);
    let refused = bench.commit(&payload(2, crate::RECORD_BYTES_MAX + 1)).expect_err("too long");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    bench.commit(b"goes on").expect("an invalid record closes nothing");
    assert_eq!(bench.crash(2).delivered.len(), 2);
}

#[test]
fn an_empty_record_is_a_record() {
    let bench = Bench::blank(MIB);
    bench.commit(b"").expect("commits");
    assert_eq!(bench.crash(2).payloads(), [Vec::<u8>::new()]);
}

#[test]
fn a_full_ring_refuses_and_stays_open() {
    let bench = Bench::blank(64 * KIB);
    let mut accepted = 0;
    let refused = loop {
        match bench.commit(&payload(accepted, 3000)) {
            Ok(_) => accepted += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::OutOfSpace);
    assert_eq!(accepted, 14, "two of sixteen blocks are kept for critical records");
    let critical = bench.device.run(bench.wal.append_wait(record(b"vote"), Reserve::Critical));
    critical.expect("the reserve is for such records");
    let second = bench.device.run(bench.wal.append_wait(record(b"vote"), Reserve::Critical)).expect("and for two");
    let full = bench.device.run(bench.wal.append_wait(record(b"vote"), Reserve::Critical)).expect_err("it has an end");
    assert_eq!(full.kind(), ErrorKind::OutOfSpace);
    bench.wal.release(second.batch);
    bench.commit(b"goes on").expect("released space is usable");
    assert_eq!(bench.crash(2).payloads(), [b"vote".to_vec(), b"goes on".to_vec()]);
}

#[test]
fn a_full_ring_takes_what_relieves_it_and_then_only_what_is_critical() {
    let bench = Bench::blank(MIB);
    let fill = |reserve, bytes| {
        (0..)
            .find_map(|n| {
                let refused = bench.device.run(bench.wal.append_wait(record(&payload(n, bytes)), reserve)).err()?;
                assert_eq!(refused.kind(), ErrorKind::OutOfSpace, "{refused}");
                Some(n)
            })
            .expect("it has an end")
    };
    // An eighth is kept from entries: 32 blocks, of which each kind takes a quarter more than the one before it.
    assert_eq!(fill(Reserve::Normal, 3000), 256 - 32);
    assert_eq!(fill(Reserve::Relief, 100), 8);
    assert_eq!(fill(Reserve::Normal, 1), 0);
    assert_eq!(fill(Reserve::Vote, 100), 8);
    assert_eq!(fill(Reserve::Relief, 100), 0);
    assert_eq!(fill(Reserve::Install, 100), 8);
    assert_eq!(fill(Reserve::Vote, 100), 0);
    assert_eq!(fill(Reserve::Critical, 100), 8);
    assert_eq!(fill(Reserve::Install, 100), 0);
}

#[test]
fn a_refused_record_is_not_overtaken_by_a_shorter_one_behind_it() {
    // Also by one that may use less of the ring than it, and would find the space.
    for reserve in [Reserve::Normal, Reserve::Relief] {
        let bench = Bench::blank(64 * KIB);
        for i in 0..13 {
            bench.commit(&payload(i, 3000)).expect("commits");
        }
        let long = bench.append_as(&payload(0, 5000), reserve);
        let short = bench.append(&payload(1, 10));
        let critical = bench.append_as(&payload(2, 10), Reserve::Critical);
        bench.device.turn();
        assert_eq!(long.get(), Some(Err(ErrorKind::OutOfSpace)), "{reserve:?}");
        assert_eq!(short.get(), Some(Err(ErrorKind::OutOfSpace)), "{reserve:?}");
        assert!(matches!(critical.get(), Some(Ok(_))), "{reserve:?}");
    }
}

#[test]
fn the_ring_wraps_for_many_laps() {
    let mut bench = Bench::blank(64 * KIB);
    let mut kept: Vec<(RecordPos, Vec<u8>)> = Vec::new();
    for i in 0..2000 {
        let bytes = payload(i, (i * 709) % 9000);
        kept.push((bench.commit(&bytes).expect("space was released"), bytes));
        if kept.len() > 3 {
            kept.remove(0);
            bench.wal.release(kept[0].0.batch);
        }
        if i % 97 == 0 {
            bench = bench.crash(i as u64 + 2);
            let expected: Vec<Vec<u8>> = kept.iter().map(|k| k.1.clone()).collect();
            assert_eq!(bench.payloads(), expected, "after record {i}");
        }
        for (pos, bytes) in &kept {
            assert_eq!(bench.device.run(bench.wal.read(*pos)).expect("reads back"), bytes);
        }
    }
    assert!(bench.wal.durable().0 > 50 * 64 * KIB as u64);
}

#[test]
fn a_log_released_to_its_end_opens_empty_and_goes_on() {
    let bench = Bench::blank(64 * KIB);
    for i in 0..5 {
        bench.commit(&payload(i, 100)).expect("commits");
    }
    bench.wal.release(bench.wal.durable());
    let bench = bench.crash(2);
    assert!(bench.delivered.is_empty());
    bench.commit(b"first of the new epoch").expect("commits");
    assert_eq!(bench.crash(3).payloads(), [b"first of the new epoch".to_vec()]);
}

#[test]
fn close_answers_what_is_queued_and_refuses_what_comes() {
    let bench = Bench::blank(MIB);
    let queued = bench.append(b"queued");
    let end = bench.device.run(bench.wal.close()).expect("closes");
    assert!(matches!(queued.get(), Some(Ok(_))));
    assert_eq!(end, Lsn(4096));
    assert_eq!(bench.append(b"late").get(), Some(Err(ErrorKind::Closed)));
    assert_eq!(bench.device.run(bench.wal.close()).expect("a second close answers the same"), end);
    assert_eq!(bench.device.run(bench.wal.admit()).expect_err("closed").kind(), ErrorKind::Closed);
    let clean = WalOptions { clean_end: Some(end), ..options(2) };
    assert_eq!(Bench::open(bench.device.image(), clean).expect("opens").payloads(), [b"queued".to_vec()]);
}

#[test]
fn admit_waits_while_too_much_is_queued() {
    let bench = Bench::blank(MIB);
    bench.device.hold(true);
    bench.device.run(bench.wal.admit()).expect("nothing is queued");
    let part = Bytes::from(vec![1; 200 * KIB]);
    while bench.wal.queued_bytes() < crate::QUEUED_BYTES_MAX {
        let record = Record { group: GroupId(1), kind: RecordKind(1), payload: vec![part.clone()] };
        bench.wal.append(record, Reserve::Normal, Box::new(|_| ()));
    }
    let mut admit = Box::pin(bench.wal.admit());
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(std::future::Future::poll(admit.as_mut(), &mut cx).is_pending());
    // The ring holds less than what waits: most of it is refused, and the queue is short again.
    bench.device.turn();
    while !bench.device.held().is_empty() {
        bench.device.complete(0, true);
        bench.device.turn();
    }
    bench.device.run(admit).expect("the queue is short again");
    assert_eq!(bench.wal.queued_bytes(), 0);
}

#[test]
fn a_position_that_is_not_durable_or_released_is_not_read() {
    let bench = Bench::blank(MIB);
    let first = bench.commit(b"first").expect("commits");
    let second = bench.commit(b"second").expect("commits");
    let kind = |pos| bench.device.run(bench.wal.read(pos)).expect_err("no such record").kind();
    assert_eq!(kind(RecordPos { batch: bench.wal.durable(), ..first }), ErrorKind::Invalid);
    assert_eq!(kind(RecordPos { length: u32::MAX, ..first }), ErrorKind::Invalid);
    assert_eq!(kind(RecordPos { offset: 0, ..first }), ErrorKind::Invalid);
    assert_eq!(kind(RecordPos { offset: first.offset + 1, ..first }), ErrorKind::Corrupt);
    bench.wal.release(second.batch);
    assert_eq!(kind(first), ErrorKind::Invalid);
    assert_eq!(bench.device.run(bench.wal.read(second)).expect("still there"), b"second".as_slice());
}

#[test]
fn options_out_of_range_are_invalid() {
    for in_flight_max in [0, crate::IN_FLIGHT_MAX_LIMIT + 1] {
        let error = Bench::open(vec![0; MIB], WalOptions { in_flight_max, ..options(1) }).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let small = Bench::open(vec![0; 32 * KIB], options(1)).err().expect("refused");
    assert_eq!(small.kind(), ErrorKind::Invalid);
    let start = Bench::open(vec![0; MIB], WalOptions { start: Lsn(77), ..options(1) }).err().expect("refused");
    assert_eq!(start.kind(), ErrorKind::Invalid);
}

/// Recovery looks only so far behind the end; so batches in flight reach only so far.
#[test]
fn batches_in_flight_span_a_bounded_part_of_the_ring() {
    let bench = Bench::open(vec![0; 64 * MIB], WalOptions { in_flight_max: 8, ..options(1) }).expect("opens");
    bench.device.hold(true);
    let long: Vec<Outcome> = (0..6).map(|i| bench.append(&payload(i, 3 * MIB))).collect();
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 2, "three would reach farther than 8 MiB");
    bench.device.complete(0, true);
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 2);
    while !bench.device.held().is_empty() {
        bench.device.complete(0, true);
        bench.device.turn();
    }
    assert!(long.iter().all(|o| matches!(o.get(), Some(Ok(_)))));
    // One that is longer than the bound by itself goes alone.
    let longest = [bench.append(&payload(7, 12 * MIB)), bench.append(b"short")];
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 1);
    bench.device.complete(0, true);
    bench.device.turn();
    bench.device.complete(0, true);
    bench.device.turn();
    assert!(longest.iter().all(|o| matches!(o.get(), Some(Ok(_)))));
}

/// All batches from the start of what is kept to the durable end, however often the ring has come round.
#[test]
fn batches_are_read_back_over_the_end_of_a_lap() {
    let bench = Bench::blank(256 * KIB);
    let mut kept: Vec<(Lsn, Vec<u8>)> = Vec::new();
    for i in 0..60 {
        let bytes = payload(i, 1000 + i % 23 * 700);
        let pos = bench.commit(&bytes).expect("commits");
        kept.push((pos.batch, bytes));
        if kept.len() > 4 {
            kept.remove(0);
            bench.wal.release(kept[0].0);
        }
        let (mut lsn, mut found) = (bench.wal.start(), Vec::new());
        while let Some(batch) = bench.device.run(bench.wal.read_batch(lsn)).expect("it is there") {
            let payloads = batch.records.iter().map(|record| (batch.lsn, record.payload.to_vec()));
            found.extend(payloads);
            lsn = batch.end;
        }
        assert_eq!((lsn, &found), (bench.wal.durable(), &kept), "{i}");
    }
    let outside = [Lsn(0), Lsn(kept[1].0.0 + 1), Lsn(bench.wal.durable().0 + 4096)];
    for lsn in outside {
        let error = bench.device.run(bench.wal.read_batch(lsn)).expect_err("nothing is there");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{lsn}");
    }
    // The middle of a long batch is no beginning.
    let error = bench.device.run(bench.wal.read_batch(Lsn(kept[3].0.0 + 4096))).expect_err("no batch begins there");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}
