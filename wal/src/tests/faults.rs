//! A device that fails, and one that goes away.

use super::*;

#[test]
fn a_failed_write_closes_the_log_for_good() {
    let bench = Bench::blank(MIB);
    bench.commit(b"durable").expect("commits");
    let in_flight = bench.three_in_flight(0, 100);
    let queued = bench.append(b"queued");
    bench.device.complete(1, false);
    assert!(bench.device.turn(), "the task has ended");
    assert!(in_flight.iter().all(|o| o.get() == Some(Err(ErrorKind::Io))));
    assert_eq!(queued.get(), Some(Err(ErrorKind::Closed)));
    assert_eq!(bench.append(b"later").get(), Some(Err(ErrorKind::Closed)));
    // What completes afterwards acknowledges nothing, and nothing is written again.
    let writes = bench.device.counts().0;
    bench.device.complete(0, true);
    bench.device.complete(0, true);
    bench.device.hold(false);
    assert_eq!(bench.append(b"later").get(), Some(Err(ErrorKind::Closed)));
    assert_eq!((bench.device.counts().0, bench.wal.durable()), (writes, Lsn(4096)));
    let closed = bench.device.run(bench.wal.close()).expect_err("says why");
    assert_eq!(closed.kind(), ErrorKind::Io);
    assert_eq!(bench.device.run(bench.wal.admit()).expect_err("closed").kind(), ErrorKind::Closed);
    // The next life finds what was acknowledged, and the batch that became durable although nobody was told.
    assert_eq!(bench.crash(2).payloads(), [b"durable".to_vec(), payload(0, 100)]);
}

/// A batch before the failed one was already durable: its records are acknowledged, not swallowed by the failure.
#[test]
fn what_was_durable_before_the_failure_is_acknowledged() {
    let bench = Bench::blank(MIB);
    bench.device.hold(true);
    let first = bench.append(b"first");
    bench.device.turn();
    let second = bench.append(b"second");
    bench.device.turn();
    bench.device.complete(0, true);
    bench.device.turn();
    bench.device.complete(0, false);
    bench.device.turn();
    assert!(matches!(first.get(), Some(Ok(_))));
    assert_eq!(second.get(), Some(Err(ErrorKind::Io)));
}

#[test]
fn a_device_that_drops_the_task_answers_everyone() {
    let bench = Bench::blank(MIB);
    bench.device.hold(true);
    let in_flight = bench.append(b"in flight");
    bench.device.turn();
    let queued = bench.append(b"queued");
    bench.device.drop_resident();
    assert_eq!(in_flight.get(), Some(Err(ErrorKind::Closed)));
    assert_eq!(queued.get(), Some(Err(ErrorKind::Closed)));
    assert_eq!(bench.append(b"later").get(), Some(Err(ErrorKind::Closed)));
    assert_eq!(bench.device.run(bench.wal.close()).expect_err("not cleanly").kind(), ErrorKind::Closed);
}

/// Rot in a record that is read back alone.
#[test]
fn a_rotten_record_is_corrupt_when_it_is_read() {
    let bench = Bench::blank(MIB);
    let pos = bench.commit(&payload(1, 5000)).expect("commits");
    let mut image = bench.device.image();
    let rotten = Bench::open(image.clone(), options(2)).expect("opens");
    image[4500] ^= 1;
    rotten.device.put(image);
    assert_eq!(rotten.device.run(rotten.wal.read(pos)).expect_err("rotten").kind(), ErrorKind::Corrupt);
}

/// A killed process may leave writes in the device's cache: they are made durable before they are believed.
#[test]
fn the_device_is_flushed_before_it_is_read() {
    let bench = Bench::blank(MIB);
    assert_eq!(bench.device.trace(), ["flush", "read"]);
}
