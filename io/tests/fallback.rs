//! Where io_uring is refused, threads serve the volume and the reason with its remedy is reported.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay_io::{
    AlignedBuf, Backend, BackendChoice, ErrorKind, IoClass, Media, MediaOptions, Target, WriteMode, create_media,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use support::{WAL_BYTES, block, child, close, has_uring};

const ENTRY: &str = "the_part_of_a_child";

/// Opens a volume, uses every operation, and prints what serves it.
fn serve(place: &Path, backend: BackendChoice) -> Arc<dyn Media> {
    let target = Target::Directory(place.join("volume"));
    let media = create_media(&target, &MediaOptions { backend }).expect("a volume opens without io_uring");
    media.create_zones(WAL_BYTES).wait().expect("formatted");
    let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
    for offset in (0..WAL_BYTES).step_by(1 << 20) {
        wal.write(offset, block(5), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
    }
    extents.allocate(0, 1 << 20).wait().expect("reserved");
    extents.write(0, block(6), WriteMode::Cached, IoClass::Background).wait().expect("written");
    extents.flush().wait().expect("flushed");
    let read = extents.read(0, AlignedBuf::zeroed(4096), IoClass::Foreground).wait().expect("read");
    assert!(read.iter().all(|b| *b == 6));
    extents.discard(0, 1 << 20).wait().expect("discarded");
    let (backend, reason) = media.backend();
    println!("backend={backend:?} reason={}", reason.unwrap_or_default());
    media
}

/// What a child does; nothing in the process that the test runner started.
#[test]
fn the_part_of_a_child() {
    let Some((part, place)) = child::part() else { return };
    let mut words = part.split(' ');
    match words.next() {
        Some("refuse") => {
            let errno = words.next().and_then(|word| word.parse().ok()).expect("an errno");
            let numbers: Vec<i64> = words.map(|word| word.parse().expect("a system call")).collect();
            child::refuse(&numbers, errno, false);
            let e = create_media(
                &Target::Directory(place.join("demanded")),
                &MediaOptions { backend: BackendChoice::Uring },
            );
            assert_eq!(e.err().expect("io_uring was demanded").kind(), ErrorKind::Unusable);
            close(&*serve(&place, BackendChoice::Auto));
        }
        Some("later") => refused_later(&place),
        Some("memlock") => {
            let bytes = words.next().and_then(|word| word.parse().ok()).expect("a limit");
            setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), maximum: Some(bytes) }).expect("lowered");
            close(&*serve(&place, BackendChoice::Auto));
        }
        other => panic!("no such part: {other:?}"),
    }
}

#[test]
fn threads_serve_where_a_filter_refuses_io_uring() {
    let (setup, enter, register) = (libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register);
    for (errno, says) in [(libc::EPERM, "Localhost seccomp profile"), (libc::ENOSYS, "ENOSYS")] {
        for calls in [&[setup, enter, register][..], &[setup], &[enter], &[register]] {
            let dir = tempfile::tempdir().expect("a directory");
            let calls: Vec<_> = calls.iter().map(i64::to_string).collect();
            let said = child::run(ENTRY, &format!("refuse {errno} {}", calls.join(" ")), dir.path(), false);
            assert!(said.contains("backend=Threads reason=io_uring_"), "{said}");
            // On a machine without io_uring the reason is that of the machine.
            assert!(said.contains(says) || !has_uring(), "{said}");
        }
    }
}

/// The filter comes when the rings already run: nothing hangs, everybody is told, the log is poisoned.
fn refused_later(place: &Path) {
    let media = serve(place, BackendChoice::Auto);
    if media.backend().0 != Backend::Uring {
        return println!("no io_uring on this machine");
    }
    let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
    let (zone, (ended, end)) = (wal.clone(), mainstay_io::Op::<()>::pending());
    let (started, start) = mainstay_io::Op::<()>::pending();
    let task = async move {
        start.complete(Ok(()));
        while zone.write(0, block(1), WriteMode::Durable, IoClass::Wal).await.is_ok() {}
        end.complete(Ok(()));
    };
    wal.device().run_resident("log", Box::pin(task));
    started.wait().expect("started");
    child::refuse(&[libc::SYS_io_uring_enter], libc::EPERM, true);
    ended.wait().expect("the resident task learns of it and ends");
    assert!(wal.device().poisoned().is_some());
    let op = extents.read(0, AlignedBuf::zeroed(4096), IoClass::Foreground);
    assert_eq!(op.wait().expect_err("no ring").kind(), ErrorKind::Os);
    let op = extents.write(0, block(1), WriteMode::Durable, IoClass::Background);
    assert_eq!(op.wait().expect_err("no ring").kind(), ErrorKind::Os);
    let op = extents.write(0, block(1), WriteMode::Durable, IoClass::Background);
    assert_eq!(op.wait().expect_err("poisoned").kind(), ErrorKind::Poisoned);
    for device in media.devices() {
        device.shutdown(Duration::from_secs(10)).wait().expect("nothing is left in flight");
    }
}

#[test]
fn a_filter_that_comes_later_fails_operations_and_hangs_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let said = child::run(ENTRY, "later", dir.path(), false);
    assert!(said.contains("backend=Uring") || !has_uring(), "{said}");
}

#[test]
fn a_small_limit_of_locked_memory_is_lived_with() {
    for bytes in [0, 64 << 10] {
        let dir = tempfile::tempdir().expect("a directory");
        let said = child::run(ENTRY, &format!("memlock {bytes}"), dir.path(), true);
        let threads = said.contains("backend=Threads") && said.contains("RLIMIT_MEMLOCK") || !has_uring();
        assert!(said.contains("backend=Uring") || threads, "{said}");
        eprintln!("limit={bytes}: {}", said.lines().find(|line| line.contains("backend=")).unwrap_or_default());
    }
}
