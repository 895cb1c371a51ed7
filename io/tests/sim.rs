//! The simulated disk seen from outside: what a node may rely on, and what it must survive.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_io::sim::{
    DiskImage, Faults, IoKind, Latency, Mishap, Outcome, SimDisk, SimLayout, SimMedia, SimOptions, SimRandom,
    SimTimeline,
};
use mainstay_io::{
    AlignedBuf, AlignedBytes, BlockDevice, BoxFuture, ErrorKind, IoClass, Op, Spawner, TaskHandle, WriteMode,
};

fn block(byte: u8) -> Vec<AlignedBytes> {
    vec![AlignedBuf::copy_from(&[byte; 4096]).freeze()]
}

fn write(device: &dyn BlockDevice, index: u64, byte: u8, mode: WriteMode) -> Op<()> {
    device.write(index * 4096, block(byte), mode, IoClass::Foreground)
}

fn read(device: &dyn BlockDevice, index: u64) -> Op<AlignedBuf> {
    device.read(index * 4096, AlignedBuf::zeroed(4096), IoClass::Foreground)
}

/// No task of these tests is resident.
struct NoTasks;

impl Spawner for NoTasks {
    fn spawn(&self, name: &str, _task: BoxFuture<()>) -> TaskHandle {
        panic!("{name} was not expected")
    }
}

fn slow() -> SimOptions {
    SimOptions {
        seed: 5,
        capacity: 1 << 20,
        read_latency: Latency::micros(20, 200),
        write_latency: Latency::micros(20, 200),
        flush_latency: Latency::micros(50, 500),
        ..SimOptions::default()
    }
}

fn scheduled(options: SimOptions) -> (Arc<SimTimeline>, SimDisk) {
    let time = Arc::new(SimTimeline::default());
    let image = SimDisk::new("disk", options.clone()).image();
    let disk = SimDisk::scheduled("disk", options, image, time.clone(), Arc::new(NoTasks));
    (time, disk)
}

#[test]
fn a_durable_write_covers_only_itself_through_a_crash() {
    let mut lost = 0;
    for seed in 0..50 {
        let disk = SimDisk::new("disk", SimOptions::default());
        let device = disk.device();
        write(&*device, 0, 1, WriteMode::Cached).wait().expect("written");
        write(&*device, 1, 2, WriteMode::Durable).wait().expect("durable");
        assert_eq!(read(&*device, 0).wait().expect("read")[0], 1);
        disk.crash(seed);
        let device = disk.device();
        lost += u32::from(read(&*device, 0).wait().expect("read")[0] == 0);
        assert_eq!(read(&*device, 1).wait().expect("read")[0], 2);
    }
    assert!((5..45).contains(&lost), "lost={lost}");
}

#[test]
fn a_flush_covers_all_writes_that_completed_before_it() {
    for seed in 0..50 {
        let disk = SimDisk::new("disk", SimOptions::default());
        let device = disk.device();
        for index in 0..20 {
            write(&*device, index, 7, WriteMode::Cached).wait().expect("written");
        }
        device.flush().wait().expect("flushed");
        write(&*device, 20, 7, WriteMode::Cached).wait().expect("written");
        let image = disk.crash(seed);
        assert!(image.read(0, 20 * 4096).iter().all(|b| *b == 7), "seed={seed}");
    }
}

#[test]
fn a_flush_does_not_cover_a_write_still_in_flight_when_it_was_called() {
    let mut survived = 0;
    for seed in 0..40 {
        let (time, disk) = scheduled(slow());
        let device = disk.device();
        let written = write(&*device, 0, 1, WriteMode::Cached);
        let flushed = device.flush();
        time.run();
        written.wait().expect("written");
        flushed.wait().expect("flushed");
        survived += u32::from(disk.crash(seed).read(0, 1) == [1]);
    }
    assert!((1..40).contains(&survived), "survived={survived}");
}

#[test]
fn completions_overtake_each_other_and_take_virtual_time_only() {
    let (time, disk) = scheduled(slow());
    let device = disk.device();
    let ops: Vec<_> = (0..20).map(|index| write(&*device, index, 1, WriteMode::Cached)).collect();
    time.run();
    ops.into_iter().for_each(|op| op.wait().expect("written"));
    let events: Vec<_> = disk.trace().iter().map(|e| e.offset / 4096).collect();
    assert_eq!(events.len(), 20);
    assert!(!events.is_sorted(), "{events:?}");
    assert!(time.now() >= Duration::from_micros(20) && time.now() <= Duration::from_micros(200));
}

#[test]
fn equal_seeds_give_equal_runs() {
    let run = |seed| {
        let faults = Faults {
            read_error: 50_000,
            write_error: 20_000,
            bit_rot: 50_000,
            misdirected_write: 50_000,
            phantom_write: 50_000,
            short_io: 200_000,
            ..Faults::default()
        };
        let (time, disk) = scheduled(SimOptions { seed, faults, ..slow() });
        let device = disk.device();
        let random = SimRandom::new(1);
        for step in 0..300u64 {
            let index = random.below(50);
            match step % 3 {
                0 => drop(read(&*device, index)),
                1 => drop(write(&*device, index, step as u8, WriteMode::Cached)),
                _ => drop(device.write(index * 4096, [block(1), block(2)].concat(), WriteMode::Cached, IoClass::Wal)),
            }
            if step % 7 == 0 {
                time.step();
            }
        }
        let image = disk.crash_image(seed);
        time.run();
        (disk.trace_hash(), image, disk.image())
    };
    assert!(run(1) == run(1));
    assert_ne!(run(1).0, run(2).0);
}

#[test]
fn writes_in_flight_at_a_crash_may_land_in_part_and_answer_closed() {
    let (mut none, mut some, mut all) = (0, 0, 0);
    for seed in 0..100 {
        let (time, disk) = scheduled(slow());
        let device = disk.device();
        let op = device.write(0, vec![AlignedBuf::copy_from(&[1; 16384]).freeze()], WriteMode::Durable, IoClass::Wal);
        match disk.crash(seed).read(0, 16384).iter().filter(|b| **b == 1).count() {
            0 => none += 1,
            16384 => all += 1,
            n => {
                assert!(n % 512 == 0);
                some += 1;
            }
        }
        time.run();
        assert_eq!(op.wait().expect_err("the node is gone").kind(), ErrorKind::Closed);
        assert_eq!(read(&*device, 0).wait().expect_err("an old handle").kind(), ErrorKind::Closed);
    }
    assert!(none > 5 && some > 5 && all > 5, "none={none} some={some} all={all}");
}

#[test]
fn a_killed_process_loses_no_completed_write() {
    for seed in 0..20 {
        let disk = SimDisk::new("disk", SimOptions::default());
        write(&*disk.device(), 0, 1, WriteMode::Cached).wait().expect("written");
        assert_eq!(disk.kill(seed).read(0, 1), [1]);
    }
}

#[test]
fn a_failed_durable_write_or_flush_poisons_until_the_restart() {
    for kind in [IoKind::DurableWrite, IoKind::Flush] {
        let disk = SimDisk::new("disk", SimOptions::default());
        let device = disk.device();
        disk.fail_next(kind);
        let first = match kind {
            IoKind::Flush => device.flush(),
            _ => write(&*device, 0, 1, WriteMode::Durable),
        };
        assert_eq!(first.wait().expect_err("planned").kind(), ErrorKind::Media);
        disk.heal();
        for op in [device.flush(), write(&*device, 0, 1, WriteMode::Cached), device.discard(0, 4096)] {
            assert_eq!(op.wait().expect_err("poisoned").kind(), ErrorKind::Poisoned);
        }
        read(&*device, 0).wait().expect("reads go on");
        assert_eq!(device.poisoned().expect("the cause").kind(), ErrorKind::Media);
        disk.crash(1);
        write(&*disk.device(), 0, 1, WriteMode::Durable).wait().expect("a new life");
    }
}

#[test]
fn a_failed_cached_write_or_read_poisons_nothing() {
    let disk = SimDisk::new("disk", SimOptions::default());
    let device = disk.device();
    disk.fail_next(IoKind::CachedWrite);
    assert_eq!(write(&*device, 0, 1, WriteMode::Cached).wait().expect_err("planned").kind(), ErrorKind::Media);
    disk.fail_next(IoKind::Read);
    assert_eq!(read(&*device, 0).wait().expect_err("planned").kind(), ErrorKind::Media);
    device.flush().wait().expect("not poisoned");
}

#[test]
fn a_full_disk_refuses_heals_and_poisons_nothing() {
    let disk = SimDisk::new("disk", SimOptions { enospc_after: Some(128 << 10), ..SimOptions::default() });
    let device = disk.device();
    device.allocate(0, 64 << 10).wait().expect("room");
    write(&*device, 0, 1, WriteMode::Durable).wait().expect("inside the reservation");
    assert_eq!(device.allocate(1 << 20, 128 << 10).wait().expect_err("full").kind(), ErrorKind::OutOfSpace);
    device.allocate(1 << 20, 64 << 10).wait().expect("just enough");
    assert_eq!(write(&*device, 999, 1, WriteMode::Durable).wait().expect_err("full").kind(), ErrorKind::OutOfSpace);
    assert!(device.poisoned().is_none());
    device.discard(1 << 20, 64 << 10).wait().expect("given back");
    write(&*device, 999, 1, WriteMode::Durable).wait().expect("room again");
    assert_eq!(disk.allocated(), (64 << 10) + 4096);
    disk.set_space(None);
    device.allocate(1 << 30, 1 << 30).wait().expect("no bound");
}

#[test]
fn a_read_only_disk_reads_and_refuses_the_rest_until_it_is_writable_and_the_node_restarts() {
    let disk = SimDisk::new("disk", SimOptions::default());
    let device = disk.device();
    write(&*device, 0, 1, WriteMode::Durable).wait().expect("writable");
    disk.set_read_only(true);
    assert_eq!(write(&*device, 0, 2, WriteMode::Cached).wait().expect_err("read-only").kind(), ErrorKind::Os);
    assert_eq!(device.allocate(0, 4096).wait().expect_err("read-only").kind(), ErrorKind::Os);
    assert_eq!(write(&*device, 0, 2, WriteMode::Durable).wait().expect_err("read-only").kind(), ErrorKind::Os);
    assert_eq!(read(&*device, 0).wait().expect("readable")[0], 1);
    disk.set_read_only(false);
    // The failed durable write is final for the handle, as on any device.
    assert_eq!(write(&*device, 0, 2, WriteMode::Durable).wait().expect_err("poisoned").kind(), ErrorKind::Poisoned);
    disk.kill(1);
    write(&*disk.device(), 0, 2, WriteMode::Durable).wait().expect("writable again");
}

#[test]
fn a_volume_is_wiped_and_restored_from_a_copy() {
    for layout in [SimLayout::Directory, SimLayout::Device] {
        let disks = SimMedia::with_layout(layout, SimOptions { capacity: 1 << 30, ..SimOptions::default() });
        let first = |disks: &SimMedia| {
            let (wal, _) = disks.open().expect("opened").zones(1 << 20).expect("zones");
            wal.read(0, AlignedBuf::zeroed(4096), IoClass::Wal).wait().expect("read")[0]
        };
        let put = |disks: &SimMedia, byte| {
            let (wal, _) = disks.open().expect("opened").zones(1 << 20).expect("zones");
            wal.write(0, block(byte), WriteMode::Durable, IoClass::Wal).wait().expect("written");
        };
        disks.open().expect("opened").create_zones(1 << 20).wait().expect("made");
        put(&disks, 1);
        let copy = disks.images();
        put(&disks, 2);
        disks.crash(1);
        disks.restore(copy);
        assert_eq!(first(&disks), 1, "{layout:?}");
        disks.crash(2);
        disks.wipe();
        let media = disks.open().expect("opened");
        assert!(media.is_blank().expect("readable"));
        media.create_zones(1 << 20).wait().expect("made anew");
    }
}

#[test]
fn a_planned_mishap_comes_to_the_next_write_of_its_range_and_to_no_other() {
    let planned = |mishap, seed| {
        let disk = SimDisk::new("disk", SimOptions { seed, ..SimOptions::default() });
        let device = disk.device();
        for index in 0..8 {
            write(&*device, index, 1, WriteMode::Durable).wait().expect("written");
        }
        disk.plan(mishap, 4 * 4096..6 * 4096);
        write(&*device, 1, 2, WriteMode::Durable).wait().expect("written");
        assert!(disk.is_planned(), "that one begins elsewhere");
        write(&*device, 5, 2, WriteMode::Durable).wait().expect("acknowledged");
        assert!(!disk.is_planned());
        write(&*device, 4, 2, WriteMode::Durable).wait().expect("written");
        let outcomes: Vec<_> = disk.trace().into_iter().skip(8).map(|e| e.outcome).collect();
        assert_eq!((outcomes[0], outcomes[2]), (Outcome::Done, Outcome::Done));
        (outcomes[1], disk.image())
    };
    let (outcome, image) = planned(Mishap::Lost, 7);
    assert_eq!((outcome, image.read(5 * 4096, 4096)), (Outcome::Phantom, vec![1; 4096]));

    let (outcome, image) = planned(Mishap::Torn, 7);
    let sectors: Vec<u8> = image.read(5 * 4096, 4096).chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(outcome, Outcome::Torn);
    assert!(sectors.contains(&1) && sectors.contains(&2), "{sectors:?}");

    for seed in 0..64 {
        let (outcome, image) = planned(Mishap::Misdirected, seed);
        let Outcome::Misdirected(to) = outcome else { panic!("{outcome:?}") };
        assert_ne!(to, 5 * 4096, "seed={seed}: that would be no mishap");
        assert_eq!(image.read(5 * 4096, 4096), vec![1; 4096], "seed={seed}");
        // What was written to block 4 behind it may have come to lie over it.
        assert!(to == 4 * 4096 || image.read(to, 4096) == vec![2; 4096], "seed={seed}");
    }
}

#[test]
fn a_damaged_block_outlives_a_crash_and_ends_with_a_write_or_another_disk() {
    let disk = SimDisk::new("disk", SimOptions::default());
    let reads = |block| read(&*disk.device(), block).wait().map(|buf| buf[0]).map_err(|e| e.kind());
    for block in 0..2 {
        write(&*disk.device(), block, 1, WriteMode::Durable).wait().expect("written");
    }
    disk.damage(0, 2 * 4096);
    disk.crash(1);
    disk.kill(2);
    assert_eq!((reads(0), reads(1)), (Err(ErrorKind::Media), Err(ErrorKind::Media)));
    write(&*disk.device(), 0, 3, WriteMode::Durable).wait().expect("written");
    disk.crash(3);
    assert_eq!((reads(0), reads(1)), (Ok(3), Err(ErrorKind::Media)));
    disk.restart(disk.image());
    assert_eq!((reads(0), reads(1)), (Ok(3), Ok(1)));
}

#[test]
fn a_lying_disk_is_lying_as_recorded() {
    let outcome_of = |faults: Faults| {
        let disk = SimDisk::new("disk", SimOptions { faults, ..SimOptions::default() });
        let device = disk.device();
        write(&*device, 3, 1, WriteMode::Durable).wait().expect("acknowledged");
        let value = read(&*device, 3).wait().expect("read").to_vec();
        (disk.trace().into_iter().map(|e| e.outcome).collect::<Vec<_>>(), value, disk)
    };
    let always = 1_000_000;
    let (events, value, _) = outcome_of(Faults { phantom_write: always, ..Faults::default() });
    assert_eq!((events[0], value[0]), (Outcome::Phantom, 0));

    let (events, value, disk) = outcome_of(Faults { misdirected_write: always, ..Faults::default() });
    let Outcome::Misdirected(to) = events[0] else { panic!("{events:?}") };
    assert_eq!((disk.image().read(to, 1)[0], value[0]), (1, 0));

    let (events, value, disk) = outcome_of(Faults { bit_rot: always, ..Faults::default() });
    let Outcome::Rotten(at) = events[1] else { panic!("{events:?}") };
    assert_ne!(value[(at - 3 * 4096) as usize], 1);
    assert_eq!(disk.image().read(3 * 4096, 4096), value, "rot stays");

    let disk = SimDisk::new("disk", SimOptions::default());
    disk.set_faults(Faults { lost_flush: always, ..Faults::default() });
    write(&*disk.device(), 0, 1, WriteMode::Cached).wait().expect("written");
    disk.device().flush().wait().expect("acknowledged");
    write(&*disk.device(), 8192, 1, WriteMode::Durable).wait().expect("acknowledged");
    for offset in [0, 8192] {
        assert!((0..50).any(|seed| disk.crash_image(seed).read(offset, 1) == [0]), "offset={offset}");
    }
}

#[test]
fn short_transfers_are_absorbed() {
    let faults = Faults { short_io: 1_000_000, ..Faults::default() };
    let (time, disk) = scheduled(SimOptions { faults, ..slow() });
    let device = disk.device();
    let data = AlignedBuf::copy_from(&[9; 16384]).freeze();
    let op = device.write(0, vec![data.clone()], WriteMode::Durable, IoClass::Wal);
    assert!(time.step());
    // Half of it is there, and nothing of it is promised.
    assert_eq!(disk.image().read(0, 16384).iter().filter(|b| **b == 9).count(), 8192);
    time.run();
    op.wait().expect("whole");
    for seed in 0..20 {
        assert_eq!(disk.crash_image(seed).read(0, 16384), data[..]);
    }
}

#[test]
fn every_crash_image_keeps_what_is_durable() {
    let disk = SimDisk::new("disk", SimOptions::default());
    let device = disk.device();
    write(&*device, 0, 1, WriteMode::Durable).wait().expect("durable");
    for index in 1..5 {
        write(&*device, index, 2, WriteMode::Cached).wait().expect("written");
    }
    let images: Vec<_> = disk.crash_images().collect();
    assert_eq!(images.len(), 16 + 8);
    assert!(images.iter().all(|image| image.read(0, 4096) == [1; 4096]));
    assert!(images.iter().any(|image| image.read(4096, 4 * 4096) == [0; 4 * 4096]));
}

#[test]
fn bounds_and_alignment_are_checked() {
    let disk = SimDisk::new("disk", SimOptions { capacity: 8192, ..SimOptions::default() });
    let device = disk.device();
    assert_eq!(write(&*device, 2, 1, WriteMode::Cached).wait().expect_err("outside").kind(), ErrorKind::OutOfRange);
    assert_eq!(device.discard(1, 4096).wait().expect_err("unaligned").kind(), ErrorKind::Misaligned);
}

#[test]
fn a_volume_lives_through_crashes_in_both_layouts() {
    for layout in [SimLayout::Directory, SimLayout::Device] {
        let disks = SimMedia::with_layout(layout, SimOptions { capacity: 64 << 20, ..SimOptions::default() });
        let media = disks.open().expect("opened");
        assert!(media.is_blank().expect("readable"));
        assert!(media.zones(1 << 20).is_err(), "not formatted");
        media.create_zones(1 << 20).wait().expect("formatted");
        let (wal, extents) = media.zones(1 << 20).expect("zones");
        media.superblock().write(0, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
        wal.write(0, block(2), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
        extents.write(0, block(3), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
        assert_eq!(disks.open().err().expect("open already").kind(), ErrorKind::Locked);
        disks.crash(1);
        assert_eq!(wal.flush().wait().expect_err("an old handle").kind(), ErrorKind::Closed);

        let media = disks.open().expect("opened again, though the old handle lives");
        assert!(!media.is_blank().expect("readable"));
        let (wal, extents) = media.zones(1 << 20).expect("zones");
        for (zone, byte) in [(media.superblock(), 1), (wal, 2), (extents, 3)] {
            let buf = zone.read(0, AlignedBuf::zeroed(4096), IoClass::Wal).wait().expect("read");
            assert_eq!(buf[0], byte, "{layout:?}");
        }
        let copy = SimMedia::from_images(layout, SimOptions::default(), disks.images());
        assert!(!copy.open().expect("opened").is_blank().expect("readable"));
    }
}

#[test]
fn shutdown_waits_for_operations_and_the_resident_task() {
    let disk = SimDisk::new("disk", SimOptions::default());
    let device = disk.device();
    let (go, done) = Op::<()>::pending();
    device.run_resident("resident", Box::pin(async move { drop(go.await) }));
    let closing = device.shutdown(Duration::from_secs(60));
    assert_eq!(read(&*device, 0).wait().expect_err("shut").kind(), ErrorKind::Closed);
    done.complete(Ok(()));
    closing.wait().expect("drained");

    let (time, disk) = scheduled(slow());
    let device = disk.device();
    let op = write(&*device, 0, 1, WriteMode::Durable);
    let closing = device.shutdown(Duration::from_secs(1));
    time.run();
    closing.wait().expect("drained");
    op.wait().expect("an operation in flight ends well");

    let device = disk.device();
    drop(write(&*device, 0, 1, WriteMode::Durable));
    let closing = device.shutdown(Duration::ZERO);
    time.run();
    // Whichever came first in virtual time: the grace is over at once.
    assert_eq!(closing.wait().expect_err("no grace").kind(), ErrorKind::Closed);
}

/// Each operation is seen while it is in flight and all before it are done; a loss of power then finds what is durable on each
/// disk, and of the rest any writes whole, halves of any, or what a seed says.
#[test]
fn a_watch_sees_what_a_crash_at_each_operation_may_leave() {
    let disk = SimMedia::new(SimOptions { capacity: 1 << 20, ..SimOptions::default() });
    let media = disk.open().expect("nobody else holds it");
    media.create_zones(1 << 16).wait().expect("blank");
    let (wal, extents) = media.zones(1 << 16).expect("made");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (watched, points) = (disk.clone(), seen.clone());
    disk.watch(Some(Arc::new(move |kind| points.lock().expect("whole").push((kind, watched.crash_point())))));
    wal.write(0, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
    extents.write(4096, block(2), WriteMode::Cached, IoClass::Background).wait().expect("written");
    wal.write(4096, block(3), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
    extents.flush().wait().expect("durable");
    disk.watch(None);
    wal.write(8192, block(4), WriteMode::Durable, IoClass::Wal).wait().expect("durable");

    let seen = seen.lock().expect("whole");
    let kinds: Vec<_> = seen.iter().map(|(kind, point)| (*kind, point.writes())).collect();
    let (cached, durable) = (IoKind::CachedWrite, IoKind::DurableWrite);
    assert_eq!(kinds, [(durable, 1), (cached, 1), (durable, 2), (IoKind::Flush, 1)]);
    // The log's second write is in flight and that of the extents is not flushed: the log's comes first.
    let (_, point) = &seen[2];
    let bytes = |images: &[DiskImage], at: u64| {
        [images[1].read(0, 1)[0], images[1].read(4096 + at, 1)[0], images[2].read(4096 + at, 1)[0]]
    };
    assert_eq!(bytes(&point.subset(|_| false), 0), [1, 0, 0]);
    assert_eq!(bytes(&point.subset(|write| write == 0), 0), [1, 3, 0]);
    assert_eq!(bytes(&point.subset(|write| write == 1), 0), [1, 0, 2]);
    assert_eq!((bytes(&point.torn(1, true), 0), bytes(&point.torn(1, true), 4095)), ([1, 3, 0], [1, 3, 2]));
    assert_eq!((bytes(&point.torn(0, false), 0), bytes(&point.torn(0, false), 4095)), ([1, 3, 2], [1, 0, 2]));
    let drawn: BTreeSet<_> = (0..100).map(|seed| bytes(&point.drawn(seed), 0)).collect();
    assert_eq!(drawn, BTreeSet::from([[1, 0, 0], [1, 0, 2], [1, 3, 0], [1, 3, 2]]));
}
