//! Records that their caller writes.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::OwnWrite;

/// The end of an own write, polled by hand.
pub(crate) struct Finish(Pin<Box<dyn Future<Output = ()>>>);

impl Finish {
    pub(crate) fn of(write: OwnWrite) -> Self {
        Self(Box::pin(write.finish()))
    }

    pub(crate) fn poll(&mut self) -> Poll<()> {
        self.0.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }
}

/// A log whose task has looked once and sleeps.
fn idle() -> Bench {
    let bench = Bench::blank(MIB);
    assert!(bench.wal.turn().is_none(), "the task does not run yet");
    assert!(!bench.device.turn());
    bench
}

fn begin(bench: &Bench, payload: &[u8]) -> (Option<OwnWrite>, Outcome) {
    let outcome = Outcome::default();
    let turn = bench.wal.turn().expect("the log is idle");
    (turn.append(record(payload), Reserve::Normal, outcome.setter()), outcome)
}

#[test]
fn an_idle_log_is_written_by_its_caller_without_the_task() {
    let bench = idle();
    let before = bench.device.wakes();
    for i in 0..20 {
        let (write, outcome) = begin(&bench, &payload(i, 100 * i));
        assert_eq!(outcome.get(), None);
        assert!(Finish::of(write.expect("there is room")).poll().is_ready());
        assert!(matches!(outcome.get(), Some(Ok(_))), "answered when it is written");
    }
    assert_eq!(bench.device.wakes(), before, "nobody woke the task");
    assert_eq!(bench.device.counts(), (20, 1), "one write each, and the flush of the opening");
    let stats = bench.wal.stats();
    assert_eq!((stats.batches, stats.records, stats.oldest_write), (20, 20, None));
    assert_eq!(bench.wal.queued_bytes(), 0);
    let bench = bench.crash(2);
    assert_eq!(bench.payloads(), (0..20).map(|i| payload(i, 100 * i)).collect::<Vec<_>>());
}

#[test]
fn a_turn_is_given_only_while_nothing_waits_and_nothing_is_in_flight() {
    let bench = idle();
    let queued = bench.append(b"queued");
    assert!(bench.wal.turn().is_none(), "a record waits");
    bench.device.hold(true);
    bench.device.turn();
    assert!(bench.wal.turn().is_none(), "it is in flight");
    bench.device.complete(0, true);
    bench.device.turn();
    assert!(queued.get().is_some());
    let (write, _) = begin(&bench, b"own");
    assert!(bench.wal.turn().is_none(), "an own write is in flight");
    let mut finish = Finish::of(write.expect("there is room"));
    assert!(finish.poll().is_pending());
    bench.device.complete(0, true);
    assert!(finish.poll().is_ready());
    assert!(bench.wal.turn().is_some());
    bench.device.run(bench.wal.close()).expect("closes");
    assert!(bench.wal.turn().is_none(), "closed");
}

#[test]
fn records_behind_an_own_write_go_out_and_wait_for_it() {
    let bench = idle();
    bench.device.hold(true);
    let (write, first) = begin(&bench, b"first");
    let mut finish = Finish::of(write.expect("there is room"));
    assert!(finish.poll().is_pending());
    let second = bench.append(b"second");
    bench.device.turn();
    assert_eq!(bench.device.held().len(), 2, "the task writes behind it");
    bench.device.complete(1, true);
    bench.device.turn();
    assert_eq!((first.get(), second.get()), (None, None), "the prefix rule");
    // As many as are in flight are due.
    let rest: Vec<Outcome> = (0..2).map(|i| bench.append(&payload(i, 10))).collect();
    let wakes = bench.device.wakes();
    bench.device.complete(0, true);
    assert!(finish.poll().is_ready());
    assert!(bench.device.wakes() > wakes, "the task had come to wait for the batch");
    assert!(matches!((first.get(), second.get()), (Some(Ok(_)), Some(Ok(_)))));
    assert_eq!(bench.device.held().len(), 1, "who finishes gives the device what waits");
    bench.device.complete(0, true);
    bench.device.turn();
    assert!(rest.iter().all(|outcome| matches!(outcome.get(), Some(Ok(_)))));
    let delivered = bench.crash(2).payloads();
    assert_eq!(delivered, [b"first".to_vec(), b"second".to_vec(), payload(0, 10), payload(1, 10)]);
}

#[test]
fn the_task_answers_for_an_own_write_whose_caller_is_slow() {
    let bench = idle();
    let (write, own) = begin(&bench, b"own");
    let behind = bench.append(b"behind");
    bench.device.turn();
    assert_eq!((own.get(), behind.get()), (None, None), "the caller has not written yet");
    assert!(Finish::of(write.expect("there is room")).poll().is_ready());
    assert!(matches!((own.get(), behind.get()), (Some(Ok(_)), Some(Ok(_)))));
}

#[test]
fn an_own_write_that_fails_ends_the_log() {
    let bench = idle();
    bench.device.hold(true);
    let (write, own) = begin(&bench, b"own");
    let mut finish = Finish::of(write.expect("there is room"));
    assert!(finish.poll().is_pending());
    let behind = bench.append(b"behind");
    bench.device.complete(0, false);
    assert!(finish.poll().is_ready());
    assert_eq!(own.get(), Some(Err(ErrorKind::Io)));
    assert_eq!(behind.get(), Some(Err(ErrorKind::Closed)));
    assert!(bench.wal.failure().is_some());
    assert!(bench.wal.turn().is_none());
    assert!(bench.device.turn(), "the task ends");
    assert_eq!(bench.append(b"late").get(), Some(Err(ErrorKind::Closed)));
}

#[test]
fn an_own_write_that_is_dropped_ends_the_log() {
    let bench = idle();
    let (write, own) = begin(&bench, b"own");
    drop(write);
    let behind = bench.append(b"behind");
    assert!(bench.device.turn(), "the task ends");
    assert!(matches!(own.get(), Some(Err(_))));
    assert!(matches!(behind.get(), Some(Err(_))));
    assert!(bench.wal.failure().is_some());
}

#[test]
fn what_finds_no_room_is_refused_at_once() {
    let bench = idle();
    let (write, outcome) = begin(&bench, &payload(0, bench.wal.record_bytes_max() + 1));
    assert!(write.is_none());
    assert_eq!(outcome.get(), Some(Err(ErrorKind::Invalid)));
    let mut full = None;
    for i in 0..1000 {
        let (write, outcome) = begin(&bench, &payload(i, 4000));
        match write {
            Some(write) => assert!(Finish::of(write).poll().is_ready()),
            None => {
                full = outcome.get();
                break;
            }
        }
    }
    assert_eq!(full, Some(Err(ErrorKind::OutOfSpace)));
    assert_eq!(bench.wal.queued_bytes(), 0);
    assert!(bench.wal.turn().is_some(), "a full ring closes nothing");
}

#[test]
fn a_close_waits_for_an_own_write() {
    let bench = idle();
    let (write, own) = begin(&bench, b"own");
    let mut close = Box::pin(bench.wal.close());
    let mut cx = Context::from_waker(Waker::noop());
    assert!(close.as_mut().poll(&mut cx).is_pending());
    assert!(!bench.device.turn(), "a batch is in flight");
    assert!(Finish::of(write.expect("there is room")).poll().is_ready());
    assert!(matches!(own.get(), Some(Ok(_))));
    assert!(bench.device.turn(), "the task ends");
    let Poll::Ready(end) = close.as_mut().poll(&mut cx) else { panic!("it is closed") };
    assert_eq!(end.expect("closes"), Lsn(4096));
}
