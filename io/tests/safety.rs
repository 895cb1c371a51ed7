//! Operations that nobody waits for, devices that go away under load, wakers that panic, signals, and calls that fail.

mod support;

use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use mainstay_io::sim::SimRandom;
use mainstay_io::{
    AlignedBuf, BackendChoice, ErrorKind, IoClass, Media, MediaOptions, Op, Target, WriteMode, create_media, open_media,
};
use support::{Place, WAL_BYTES, backends, block, child, close, directory, filled, open, raw};

fn formatted(place: &Place, backend: BackendChoice) -> Arc<dyn Media> {
    let media = open(place, backend);
    media.create_zones(WAL_BYTES).wait().expect("formatted");
    media
}

fn each_real(test: impl Fn(&Place, BackendChoice)) {
    for backend in backends() {
        for place in [Some(directory()), raw()].into_iter().flatten() {
            test(&place, backend);
        }
    }
}

fn poll_once<T>(op: Op<T>) {
    let mut op = pin!(op);
    let _ = op.as_mut().poll(&mut Context::from_waker(Waker::noop()));
}

/// The device keeps a buffer whatever happens to the operation; a dropped write is still a write.
#[test]
fn dropped_operations_are_carried_out() {
    const WRITES: u64 = 300;
    each_real(|place, backend| {
        let media = formatted(place, backend);
        let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
        let random = SimRandom::new(11);
        for n in 0..WRITES {
            let zone = if n % 2 == 0 { &wal } else { &extents };
            let mode = if random.below(4) == 0 { WriteMode::Durable } else { WriteMode::Cached };
            let write = zone.write(n * 4096, block(n as u8), mode, IoClass::Wal);
            let read = zone.read(random.below(n + 1) * 4096, AlignedBuf::zeroed(8192), IoClass::Foreground);
            match random.below(4) {
                0 => drop((write, read)),
                1 => {
                    poll_once(write);
                    drop(read);
                }
                2 => {
                    write.wait().expect("written");
                    poll_once(read);
                }
                _ => {
                    let elsewhere = std::thread::spawn(move || drop(write));
                    read.wait().expect("read");
                    elsewhere.join().expect("no panic");
                }
            }
            if random.below(50) == 0 {
                drop(zone.flush());
            }
        }
        // Waits for all that is in flight.
        close(&*media);
        drop((media, wal, extents));

        let media = open_media(&place.target, &MediaOptions { backend }).expect("opened again");
        let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
        for n in 0..WRITES {
            let zone = if n % 2 == 0 { &wal } else { &extents };
            let buf = zone.read(n * 4096, AlignedBuf::zeroed(4096), IoClass::Foreground).wait().expect("read");
            assert!(buf.iter().all(|b| *b == n as u8), "{} {backend:?} write {n} was lost", place.name);
        }
        close(&*media);
    });
}

/// A ring that was dropped with reads in flight went on writing into freed memory: 37 to 60 of 64 buffers were hit.
#[test]
fn memory_freed_after_a_shutdown_stays_untouched() {
    const READS: u64 = 48;
    let (full, canary) = (vec![0xee; 1 << 20], vec![0x55; 1 << 20]);
    each_real(|place, backend| {
        for grace in [Duration::ZERO, Duration::from_secs(20)] {
            let media = open(place, backend);
            if media.is_blank().expect("readable") {
                media.create_zones(WAL_BYTES).wait().expect("formatted");
                media.superblock().write(0, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("written");
            }
            let (_, extents) = media.zones(WAL_BYTES).expect("zones");
            extents.write(0, vec![filled(0xee, 8 << 20)], WriteMode::Cached, IoClass::Wal).wait().expect("written");
            let read = |n: u64| extents.read((n % 8) << 20, AlignedBuf::zeroed(1 << 20), IoClass::Foreground);
            let ops: Vec<_> = (0..READS).map(read).collect();
            let ended: Vec<_> = media.devices().iter().map(|d| d.shutdown(grace).wait()).collect();
            let late = extents.read(0, AlignedBuf::zeroed(4096), IoClass::Foreground).wait();
            assert_eq!(late.expect_err("closed").kind(), ErrorKind::Closed);
            if grace > Duration::ZERO {
                assert!(ended.iter().all(Result::is_ok), "{ended:?}");
            }
            for op in ops {
                match op.wait() {
                    Ok(buf) => assert!(buf[..] == full[..]),
                    Err(e) => assert_eq!((e.kind(), grace), (ErrorKind::Closed, Duration::ZERO)),
                }
            }
            // If a buffer in flight had been freed, one of these would be it.
            let mut canaries: Vec<_> = (0..READS).map(|_| AlignedBuf::zeroed(1 << 20)).collect();
            canaries.iter_mut().for_each(|buf| buf.copy_from_slice(&canary));
            drop(extents);
            // Joins the threads of the devices, and with them whatever was in flight.
            drop(media);
            assert!(canaries.iter().all(|buf| buf[..] == canary[..]), "{} {backend:?}", place.name);
        }
    });
}

/// A device without a shutdown: what was submitted is finished, and the lock is free once the threads are gone.
#[test]
fn a_volume_may_be_dropped_under_load() {
    each_real(|place, backend| {
        let media = formatted(place, backend);
        media.superblock().write(0, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("written");
        drop(media);
        for round in 0..5 {
            let media = reopen(place, backend);
            let (wal, _) = media.zones(WAL_BYTES).expect("zones");
            for n in 0..100 {
                drop(wal.write(n * 4096, block(round), WriteMode::Cached, IoClass::Wal));
            }
        }
        let (wal, _) = reopen(place, backend).zones(WAL_BYTES).expect("zones");
        let buf = wal.read(0, AlignedBuf::zeroed(100 * 4096), IoClass::Wal).wait().expect("read");
        assert!(buf.iter().all(|b| *b == 4), "{} {backend:?}", place.name);
    });
}

fn reopen(place: &Place, backend: BackendChoice) -> Arc<dyn Media> {
    open_media(&place.target, &MediaOptions { backend }).expect("free again")
}

struct PanickingWaker(AtomicU64);

impl Wake for PanickingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Release);
        panic!("a waker of the embedder (this message is part of the test)");
    }
}

#[test]
fn a_waker_that_panics_harms_nobody_else() {
    each_real(|place, backend| {
        let media = formatted(place, backend);
        let (wal, _) = media.zones(WAL_BYTES).expect("zones");
        let panics = Arc::new(PanickingWaker(AtomicU64::new(0)));
        let waker = Waker::from(panics.clone());
        let mut pending = 0;
        for n in 0..20 {
            let mut op = Box::pin(wal.write(n * 4096, block(1), WriteMode::Durable, IoClass::Wal));
            pending += u64::from(op.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            wal.write(n * 4096, block(2), WriteMode::Durable, IoClass::Wal).wait().expect("the next one works");
        }
        close(&*media);
        // The last wake-up may come after the answer to the close.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while panics.0.load(Ordering::Acquire) < pending && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(panics.0.load(Ordering::Acquire), pending, "{} {backend:?}", place.name);
    });
}

#[test]
fn a_resident_task_that_panics_ends_and_the_device_goes_on() {
    each_real(|place, backend| {
        let media = formatted(place, backend);
        let (wal, _) = media.zones(WAL_BYTES).expect("zones");
        let task = async { panic!("a resident task (this message is part of the test)") };
        wal.device().run_resident("log", Box::pin(task));
        wal.write(0, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("written");
        close(&*media);
    });
}

/// A future that submits from within its own wake-up, on the thread of the device.
#[test]
fn completions_may_submit_more() {
    each_real(|place, backend| {
        let media = formatted(place, backend);
        let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
        let (ended, end) = Op::<()>::pending();
        let task = async move {
            for n in 0..500u64 {
                let offset = n % 64 * 4096;
                let far = extents.write(offset, block(n as u8), WriteMode::Cached, IoClass::Background);
                wal.write(offset, block(n as u8), WriteMode::Cached, IoClass::Wal).await.expect("written");
                far.await.expect("written");
            }
            end.complete(Ok(()));
        };
        let inline = Arc::new(Inline(std::sync::Mutex::new(Some(Box::pin(task)))));
        inline.clone().wake();
        ended.wait().expect("ran on wake-ups alone");
        close(&*media);
    });
}

/// Polls its future inside the wake-up.
struct Inline(std::sync::Mutex<Option<mainstay_io::BoxFuture<()>>>);

impl Wake for Inline {
    fn wake(self: Arc<Self>) {
        let waker = Waker::from(self.clone());
        let mut slot = self.0.lock().expect("no panic");
        if let Some(task) = slot.as_mut()
            && let Poll::Ready(()) = task.as_mut().poll(&mut Context::from_waker(&waker))
        {
            *slot = None;
        }
    }
}

const ENTRY: &str = "the_part_of_a_child";

#[test]
fn the_part_of_a_child() {
    let Some((part, place)) = child::part() else { return };
    match part.split_once(' ') {
        Some(("signals", backend)) => in_a_storm_of_signals(&place, chosen(backend)),
        Some(("broken", errno)) => with_broken_writes(&place, errno.parse().expect("an errno")),
        Some(("unsupported", _)) => without_dsync(&place),
        Some(("flush", _)) => with_broken_flushes(&place),
        Some(("open", _)) => flushed_on_open(&place),
        other => panic!("no such part: {other:?}"),
    }
}

fn chosen(name: &str) -> BackendChoice {
    if name == "Uring" { BackendChoice::Uring } else { BackendChoice::Threads }
}

fn run(part: &str) {
    let dir = tempfile::tempdir().expect("a directory");
    child::run(ENTRY, part, dir.path(), false);
}

fn child_volume(place: &Path, backend: BackendChoice) -> Arc<dyn Media> {
    let target = Target::Directory(place.join("volume"));
    let media = create_media(&target, &MediaOptions { backend }).expect("opened");
    media.create_zones(WAL_BYTES).wait().expect("formatted");
    media
}

#[test]
fn signals_interrupt_nothing() {
    for backend in backends() {
        run(&format!("signals {backend:?}"));
    }
}

/// A timer that fires every 100 us, with a handler that does not restart system calls.
fn in_a_storm_of_signals(place: &Path, backend: BackendChoice) {
    static SIGNALS: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: libc::c_int) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: an all-zero sigaction is valid; the handler only adds to an atomic number.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        assert_eq!(libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()), 0);
    }
    let every = libc::timeval { tv_sec: 0, tv_usec: 100 };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: both pointers are valid for the call.
    assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) }, 0);
    let media = child_volume(place, backend);
    let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
    for n in 0..300u64 {
        let data = filled(n as u8, 65536);
        let ops = [
            wal.write(n % 60 * 65536, vec![data.clone()], WriteMode::Durable, IoClass::Wal),
            extents.write(n * 65536, vec![data], WriteMode::Cached, IoClass::Background),
        ];
        ops.into_iter().for_each(|op| op.wait().expect("written"));
        if n % 20 == 0 {
            extents.flush().wait().expect("flushed");
        }
        let buf = extents.read(n * 65536, AlignedBuf::zeroed(65536), IoClass::Foreground).wait().expect("read");
        assert!(buf.iter().all(|b| *b == n as u8));
    }
    close(&*media);
    assert!(SIGNALS.load(Ordering::Relaxed) > 10, "the storm did not blow");
}

#[test]
fn a_durable_write_that_fails_poisons_unless_the_disk_is_full() {
    for errno in [libc::EIO, libc::ENOSPC, libc::EINTR, libc::EAGAIN, libc::EROFS] {
        run(&format!("broken {errno}"));
    }
}

fn with_broken_writes(place: &Path, errno: i32) {
    let media = child_volume(place, BackendChoice::Threads);
    let (wal, _) = media.zones(WAL_BYTES).expect("zones");
    child::refuse(&[libc::SYS_pwritev2], errno, true);
    let write = |mode| wal.write(0, block(1), mode, IoClass::Wal).wait();
    let kind = write(WriteMode::Durable).expect_err("refused").kind();
    match errno {
        libc::EIO => assert_eq!(kind, ErrorKind::Media),
        libc::ENOSPC => assert_eq!(kind, ErrorKind::OutOfSpace),
        _ => assert_eq!(kind, ErrorKind::Os),
    }
    if errno == libc::ENOSPC {
        assert!(wal.device().poisoned().is_none());
        write(WriteMode::Cached).expect("nothing is poisoned");
        wal.flush().wait().expect("nothing is poisoned");
    } else {
        assert_eq!(wal.device().poisoned().expect("the cause").kind(), kind);
        for mode in [WriteMode::Cached, WriteMode::Durable] {
            assert_eq!(write(mode).expect_err("poisoned").kind(), ErrorKind::Poisoned);
        }
        for op in [wal.flush(), wal.allocate(0, 4096), wal.discard(0, 4096)] {
            assert_eq!(op.wait().expect_err("poisoned").kind(), ErrorKind::Poisoned);
        }
        wal.read(0, AlignedBuf::zeroed(4096), IoClass::Wal).wait().expect("reads go on");
    }
    close(&*media);
}

#[test]
fn a_flush_that_fails_poisons_also_when_the_disk_is_full() {
    run("flush now");
}

fn with_broken_flushes(place: &Path) {
    let media = child_volume(place, BackendChoice::Threads);
    let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
    extents.write(0, block(1), WriteMode::Cached, IoClass::Wal).wait().expect("written");
    child::refuse(&[libc::SYS_fdatasync], libc::ENOSPC, true);
    assert_eq!(extents.flush().wait().expect_err("refused").kind(), ErrorKind::Media);
    assert_eq!(extents.flush().wait().expect_err("poisoned").kind(), ErrorKind::Poisoned);
    // Longer than one transfer: written in parts, then flushed.
    let op = wal.write(0, vec![filled(1, 2 << 20)], WriteMode::Durable, IoClass::Wal);
    assert_eq!(op.wait().expect_err("refused").kind(), ErrorKind::Media);
    assert!(wal.device().poisoned().is_some());
    close(&*media);
}

/// Decisions at open must not rest on what a killed process left in the cache of the drive.
#[test]
fn opening_flushes_before_anything_is_read() {
    run("open again");
}

fn flushed_on_open(place: &Path) {
    let media = child_volume(place, BackendChoice::Threads);
    drop(media);
    child::refuse(&[libc::SYS_fdatasync], libc::EIO, true);
    let target = Target::Directory(place.join("volume"));
    let e = open_media(&target, &MediaOptions { backend: BackendChoice::Threads }).err().expect("refused");
    assert_eq!((e.kind(), e.op()), (ErrorKind::Media, "open"));
}

#[test]
fn without_rwf_dsync_a_write_and_a_flush_do() {
    run("unsupported here");
}

fn without_dsync(place: &Path) {
    let media = child_volume(place, BackendChoice::Threads);
    let (wal, _) = media.zones(WAL_BYTES).expect("zones");
    child::refuse(&[libc::SYS_pwritev2], libc::EOPNOTSUPP, true);
    for n in 0..10 {
        wal.write(n * 4096, block(9), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
    }
    child::refuse(&[libc::SYS_fdatasync], libc::EIO, true);
    let op = wal.write(0, block(9), WriteMode::Durable, IoClass::Wal);
    assert_eq!(op.wait().expect_err("it was the flush").kind(), ErrorKind::Media);
    close(&*media);
}

/// A file system of its own, small and in memory.
struct Mount(tempfile::TempDir);

impl Mount {
    fn of(kind: &str, options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let done = Command::new("mount").args(["-t", kind, "-o", options, kind]).arg(dir.path()).output();
        if !done.is_ok_and(|output| output.status.success()) {
            eprintln!("no {kind} can be mounted here: it is not tested");
            return None;
        }
        Some(Self(dir))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_file_system_refuses_and_heals() {
    let Some(mount) = Mount::of("tmpfs", "size=16m") else { return };
    for backend in backends() {
        let media = child_volume(&mount.0.path().join(format!("{backend:?}")), backend);
        let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
        extents.allocate(0, 4 << 20).wait().expect("room");
        let e = extents.allocate(4 << 20, 16 << 20).wait().expect_err("full");
        assert_eq!(e.kind(), ErrorKind::OutOfSpace);
        for mode in [WriteMode::Cached, WriteMode::Durable] {
            let op = extents.write(32 << 20, vec![filled(1, 12 << 20)], mode, IoClass::Background);
            assert_eq!(op.wait().expect_err("full").kind(), ErrorKind::OutOfSpace, "{backend:?} {mode:?}");
            extents.discard(32 << 20, 16 << 20).wait().expect("given back");
        }
        extents.write(0, vec![filled(1, 4 << 20)], WriteMode::Durable, IoClass::Wal).wait().expect("reserved space");
        wal.write(0, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("the log has its space");
        extents.discard(0, 4 << 20).wait().expect("given back");
        extents.allocate(8 << 20, 4 << 20).wait().expect("room again");
        assert!(media.devices().iter().all(|device| device.poisoned().is_none()));
        close(&*media);
        drop((media, wal, extents));
        std::fs::remove_dir_all(mount.0.path().join(format!("{backend:?}"))).expect("removed");
    }
}

#[test]
fn a_file_system_without_direct_io_is_used_through_its_cache() {
    let Some(mount) = Mount::of("ramfs", "size=64m") else { return };
    for backend in backends() {
        let media = child_volume(&mount.0.path().join(format!("{backend:?}")), backend);
        let (served, reason) = media.backend();
        assert_eq!(format!("{served:?}"), format!("{backend:?}"));
        assert!(reason.expect("a reason").contains("does not support O_DIRECT"));
        let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
        for zone in [&wal, &extents] {
            zone.write(8192, block(3), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
            let buf = zone.read(8192, AlignedBuf::zeroed(8192), IoClass::Wal).wait().expect("read");
            assert!(buf[..4096].iter().all(|b| *b == 3) && buf[4096..].iter().all(|b| *b == 0));
        }
        extents.allocate(0, 1 << 20).wait().expect("no file system is asked for what it cannot do");
        extents.discard(0, 1 << 20).wait().expect("no effect");
        extents.flush().wait().expect("flushed");
        close(&*media);
    }
}
