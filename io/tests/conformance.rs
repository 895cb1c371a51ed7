//! One suite for every backend and every kind of target: what `BlockDevice` promises holds on all of them.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mainstay_io::{AlignedBuf, ErrorKind, IoClass, Media, Op, WriteMode, Zone};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::{WAL_BYTES, block, everywhere, filled};

const MODES: [WriteMode; 2] = [WriteMode::Cached, WriteMode::Durable];

fn zones(media: &dyn Media) -> (Zone, Zone) {
    media.zones(WAL_BYTES).expect("zones")
}

fn read(zone: &Zone, offset: u64, bytes: usize) -> Vec<u8> {
    let buf = zone.read(offset, AlignedBuf::zeroed(bytes), IoClass::Foreground).wait().expect("read");
    assert_eq!(buf.len(), bytes);
    buf.to_vec()
}

#[test]
fn a_read_after_a_write_sees_it() {
    everywhere(|on, media| {
        let (wal, extents) = zones(media);
        for zone in [&wal, &extents, &media.superblock()] {
            for (mode, byte) in MODES.into_iter().zip(1..) {
                zone.write(8192, block(byte), mode, IoClass::Wal).wait().expect("written");
                assert_eq!(read(zone, 8192, 4096), [byte; 4096], "{on}");
            }
            zone.flush().wait().expect("flushed");
        }
    });
}

#[test]
fn reads_together_answer_each_for_itself() {
    everywhere(|on, media| {
        let (_, extents) = zones(media);
        for n in 0..40u8 {
            extents
                .write(u64::from(n) * 8192, block(n), WriteMode::Cached, IoClass::Background)
                .wait()
                .expect("written");
        }
        let end = extents.length() / 4096 * 4096;
        // Those that cannot be answered stand among those that can.
        let offsets = (0..40u64).rev().flat_map(|n| [n * 8192, end, 4095]);
        let reads = offsets.map(|offset| (offset, AlignedBuf::zeroed(4096))).collect();
        let mut answers = extents.read_many(reads, IoClass::Foreground).into_iter().map(Op::wait);
        for n in (0..40u8).rev() {
            let [found, outside, crooked] = [(); 3].map(|()| answers.next().expect("an answer for each"));
            assert!(found.expect("read").iter().all(|byte| *byte == n), "{on} {n}");
            assert_eq!(outside.expect_err("outside").kind(), ErrorKind::OutOfRange, "{on}");
            assert_eq!(crooked.expect_err("not aligned").kind(), ErrorKind::Misaligned, "{on}");
        }
        assert!(answers.next().is_none() && extents.read_many(Vec::new(), IoClass::Foreground).is_empty());
    });
}

#[test]
fn what_was_never_written_reads_as_zeroes() {
    everywhere(|on, media| {
        let (_, extents) = zones(media);
        extents.write(0, block(1), WriteMode::Cached, IoClass::Background).wait().expect("written");
        assert!(read(&extents, 4096, 1 << 20).iter().all(|b| *b == 0), "{on}");
        // A read that begins in data and ends in nothing.
        let data = read(&extents, 0, 8192);
        assert!(data[..4096].iter().all(|b| *b == 1) && data[4096..].iter().all(|b| *b == 0), "{on}");
        let last = extents.length() / 4096 * 4096 - 4096;
        assert!(read(&extents, last, 4096).iter().all(|b| *b == 0), "{on}");
    });
}

#[test]
fn a_gathered_write_joins_its_buffers() {
    everywhere(|on, media| {
        let (wal, _) = zones(media);
        for mode in MODES {
            // Odd sizes, a slice of a larger buffer, and an empty one.
            let large = filled(7, 32768);
            let bufs = vec![filled(1, 4096), large.slice(4096..12288), filled(2, 0), filled(3, 12288)];
            wal.write(4096, bufs, mode, IoClass::Wal).wait().expect("written");
            let data = read(&wal, 4096, 24576);
            let expected = [vec![1; 4096], vec![7; 8192], vec![3; 12288]].concat();
            assert!(data == expected, "{on} {mode:?}");
        }
        // More buffers than one vectored call may name.
        let bufs: Vec<_> = (0..1000u32).map(|n| filled(n as u8, 4096)).collect();
        for mode in MODES {
            wal.write(0, bufs.clone(), mode, IoClass::Wal).wait().expect("written");
            let data = read(&wal, 0, 1000 * 4096);
            assert!(data.chunks(4096).zip(0u32..).all(|(b, n)| b.iter().all(|b| *b == n as u8)), "{on} {mode:?}");
        }
    });
}

#[test]
fn long_operations_are_split_and_whole() {
    everywhere(|on, media| {
        let (_, extents) = zones(media);
        let bytes = 5 * media.devices()[0].geometry().io_bytes_max as usize + 4096;
        let mut buf = AlignedBuf::zeroed(bytes);
        buf.chunks_mut(4096).zip(0u64..).for_each(|(block, n)| block[..8].copy_from_slice(&n.to_le_bytes()));
        let data = buf.freeze();
        for mode in MODES {
            extents.write(65536, vec![data.clone()], mode, IoClass::Background).wait().expect("written");
            assert!(read(&extents, 65536, bytes) == data[..], "{on} {mode:?}");
            extents.discard(65536, bytes.next_multiple_of(65536) as u64).wait().expect("discarded");
        }
    });
}

#[test]
fn an_empty_operation_succeeds() {
    everywhere(|_, media| {
        let (wal, extents) = zones(media);
        wal.write(0, Vec::new(), WriteMode::Durable, IoClass::Wal).wait().expect("written");
        assert!(wal.read(0, AlignedBuf::zeroed(0), IoClass::Wal).wait().expect("read").is_empty());
        extents.allocate(0, 0).wait().expect("reserved");
        extents.discard(0, 0).wait().expect("discarded");
    });
}

#[test]
fn the_bounds_of_zone_and_device_hold() {
    everywhere(|on, media| {
        let (wal, extents) = zones(media);
        for zone in [&wal, &extents, &media.superblock()] {
            let end = zone.length() / 4096 * 4096;
            for offset in [end, end - 4096, u64::MAX - 4095] {
                let op = zone.write(offset, vec![filled(1, 8192)], WriteMode::Cached, IoClass::Wal);
                assert_eq!(op.wait().expect_err("outside").kind(), ErrorKind::OutOfRange, "{on}");
                let op = zone.read(offset, AlignedBuf::zeroed(8192), IoClass::Wal);
                assert_eq!(op.wait().expect_err("outside").kind(), ErrorKind::OutOfRange, "{on}");
                for op in [zone.allocate(offset, 8192), zone.discard(offset, 8192)] {
                    assert_eq!(op.wait().expect_err("outside").kind(), ErrorKind::OutOfRange, "{on}");
                }
            }
        }
        for device in media.devices() {
            let op = device.read(device.geometry().capacity, AlignedBuf::zeroed(4096), IoClass::Wal);
            assert_eq!(op.wait().expect_err("outside").kind(), ErrorKind::OutOfRange, "{on}");
        }
    });
}

#[test]
fn misaligned_operations_are_refused() {
    everywhere(|on, media| {
        let (wal, _) = zones(media);
        let half = filled(1, 4096).slice(0..2048);
        let crooked = filled(1, 8192).slice(512..4608);
        let ops = [
            wal.write(512, block(1), WriteMode::Cached, IoClass::Wal),
            wal.write(0, vec![half.clone(), half], WriteMode::Cached, IoClass::Wal),
            wal.write(0, vec![crooked], WriteMode::Durable, IoClass::Wal),
            wal.allocate(1, 4096),
            wal.discard(0, 1),
        ];
        for op in ops {
            assert_eq!(op.wait().expect_err("misaligned").kind(), ErrorKind::Misaligned, "{on}");
        }
        let op = wal.read(1, AlignedBuf::zeroed(4096), IoClass::Wal);
        assert_eq!(op.wait().expect_err("misaligned").kind(), ErrorKind::Misaligned, "{on}");
        assert!(wal.device().poisoned().is_none(), "a mistake of the caller poisons nothing");
    });
}

#[test]
fn the_resident_task_runs_and_is_waited_for() {
    everywhere(|on, media| {
        let (wal, _) = zones(media);
        let written = Arc::new(AtomicU64::new(0));
        let (zone, count) = (wal.clone(), written.clone());
        let (ended, end) = Op::<()>::pending();
        let task = async move {
            for n in 0..100 {
                let a = zone.write(n * 8192, block(1), WriteMode::Durable, IoClass::Wal);
                let b = zone.write(n * 8192 + 4096, block(2), WriteMode::Durable, IoClass::Wal);
                a.await.expect("durable");
                b.await.expect("durable");
                count.fetch_add(2, Ordering::Relaxed);
            }
            end.complete(Ok(()));
        };
        wal.device().run_resident("log", Box::pin(task));
        ended.wait().expect("ran");
        assert_eq!(written.load(Ordering::Relaxed), 200, "{on}");
        assert!(read(&wal, 0, 200 * 4096).chunks(8192).all(|c| c[0] == 1 && c[4096] == 2), "{on}");
    });
}

#[test]
fn a_resident_task_is_woken_from_other_threads() {
    everywhere(|on, media| {
        let (wal, _) = zones(media);
        let (zone, (ended, end)) = (wal.clone(), Op::<u64>::pending());
        let (ops, completers): (Vec<_>, Vec<_>) = (0..200).map(|_| Op::<()>::pending()).unzip();
        let task = async move {
            let mut sum = 0;
            for (n, op) in (0..).zip(ops) {
                op.await.expect("told");
                let byte = vec![filled(n as u8, 4096)];
                zone.write(n % 64 * 4096, byte, WriteMode::Cached, IoClass::Wal).await.expect("written");
                sum += n;
            }
            end.complete(Ok(sum));
        };
        wal.device().run_resident("log", Box::pin(task));
        let teller = std::thread::spawn(move || completers.into_iter().for_each(|done| done.complete(Ok(()))));
        assert_eq!(ended.wait().expect("ran"), 199 * 200 / 2, "{on}");
        teller.join().expect("no panic");
    });
}

#[test]
fn a_closed_device_answers_closed() {
    everywhere(|on, media| {
        let (wal, extents) = zones(media);
        support::close(media);
        for zone in [wal, extents] {
            let e = zone.write(0, block(1), WriteMode::Durable, IoClass::Wal).wait().expect_err("closed");
            assert_eq!(e.kind(), ErrorKind::Closed, "{on}");
            assert!(zone.device().poisoned().is_none(), "{on}");
            zone.device().run_resident("late", Box::pin(async { panic!("a closed device runs nothing") }));
        }
    });
}

/// Blocks of the model: few, so that operations meet.
const BLOCKS: u64 = 64;

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, blocks: u64, durable: bool },
    Read { at: u64, blocks: u64 },
    Flush,
    Allocate { at: u64, blocks: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..BLOCKS, 1..20u64).prop_map(|(at, blocks)| (at, blocks.min(BLOCKS - at)));
    let step = prop_oneof![
        4 => (range(), any::<bool>()).prop_map(|((at, blocks), durable)| Step::Write { at, blocks, durable }),
        4 => range().prop_map(|(at, blocks)| Step::Read { at, blocks }),
        1 => Just(Step::Flush),
        1 => range().prop_map(|(at, blocks)| Step::Allocate { at, blocks }),
    ];
    prop::collection::vec(step, 1..60)
}

/// Operations that do not meet are in flight together; one that meets an earlier one waits for it. Every read must show
/// the model as of its call.
#[test]
fn concurrent_operations_agree_with_a_model() {
    everywhere(|on, media| {
        let (_, extents) = zones(media);
        let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
        let outcome = runner.run(&steps(), |steps| {
            let mut version = 0u64;
            let mut model = vec![0u64; BLOCKS as usize];
            let blank = vec![filled(0, BLOCKS as usize * 4096)];
            extents.write(0, blank, WriteMode::Cached, IoClass::Wal).wait().expect("written");
            let mut writes: Vec<(u64, u64, Op<()>)> = Vec::new();
            let mut reads: Vec<(u64, u64, Vec<u64>, Op<AlignedBuf>)> = Vec::new();
            let meets = |a: u64, n: u64, b: u64, m: u64| a < b + m && b < a + n;
            for step in steps {
                let (at, blocks, changes) = match step {
                    Step::Write { at, blocks, .. } => (at, blocks, true),
                    Step::Read { at, blocks } | Step::Allocate { at, blocks } => (at, blocks, false),
                    Step::Flush => (0, 0, false),
                };
                for (_, _, op) in writes.extract_if(.., |(b, m, _)| meets(at, blocks, *b, *m)) {
                    op.wait().expect("written");
                }
                for (_, _, expected, op) in reads.extract_if(.., |(b, m, ..)| changes && meets(at, blocks, *b, *m)) {
                    check(&expected, &op.wait().expect("read"));
                }
                match step {
                    Step::Write { durable, .. } => {
                        version += 1;
                        let mut buf = AlignedBuf::zeroed((blocks * 4096) as usize);
                        for (n, block) in (at..).zip(buf.chunks_mut(4096)) {
                            block.chunks_mut(8).for_each(|word| word.copy_from_slice(&version.to_le_bytes()));
                            model[n as usize] = version;
                        }
                        let mode = if durable { WriteMode::Durable } else { WriteMode::Cached };
                        let data = buf.freeze();
                        let bufs = data.chunks(4096).enumerate();
                        let bufs = bufs.map(|(n, _)| data.slice(n * 4096..(n + 1) * 4096)).collect();
                        writes.push((at, blocks, extents.write(at * 4096, bufs, mode, IoClass::Wal)));
                    }
                    Step::Read { .. } => {
                        let expected = model[at as usize..(at + blocks) as usize].to_vec();
                        let buf = AlignedBuf::zeroed((blocks * 4096) as usize);
                        reads.push((at, blocks, expected, extents.read(at * 4096, buf, IoClass::Foreground)));
                    }
                    Step::Flush => extents.flush().wait().expect("flushed"),
                    Step::Allocate { .. } => extents.allocate(at * 4096, blocks * 4096).wait().expect("reserved"),
                }
            }
            writes.into_iter().for_each(|(_, _, op)| op.wait().expect("written"));
            reads.into_iter().for_each(|(_, _, expected, op)| check(&expected, &op.wait().expect("read")));
            Ok(())
        });
        outcome.unwrap_or_else(|e| panic!("{on}: {e}"));
    });
}

fn check(expected: &[u64], buf: &[u8]) {
    for (version, block) in expected.iter().zip(buf.chunks(4096)) {
        assert!(block.chunks(8).all(|word| word == version.to_le_bytes()), "expected version {version}");
    }
}
