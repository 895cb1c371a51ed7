//! Opening, creating and refusing targets.

mod support;

use std::path::Path;

use mainstay_io::{
    AlignedBuf, BackendChoice, ErrorKind, IoClass, MediaOptions, SUPERBLOCK_ZONE_BYTES, Target, WriteMode,
    create_media, open_media, open_scratch,
};
use support::{WAL_BYTES, backends, block, close};

fn threads() -> MediaOptions {
    MediaOptions { backend: BackendChoice::Threads }
}

fn directory(path: &Path) -> Target {
    Target::Directory(path.to_owned())
}

fn image(path: &Path, bytes: u64) -> Target {
    let file = std::fs::File::create(path).expect("a new file");
    file.set_len(bytes).expect("a sparse file");
    Target::Device(path.to_owned())
}

fn format_write_reopen(target: &Target, backend: BackendChoice) {
    let options = MediaOptions { backend };
    let media = create_media(target, &options).expect("created");
    assert!(media.is_blank().expect("readable"));
    media.create_zones(WAL_BYTES).wait().expect("formatted");
    assert_eq!(media.superblock().length(), SUPERBLOCK_ZONE_BYTES);
    let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
    assert_eq!(wal.length(), WAL_BYTES);
    let last = wal.length() - 4096;
    wal.write(last, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
    extents.allocate(1 << 20, 65536).wait().expect("reserved");
    extents.write(1 << 20, block(2), WriteMode::Cached, IoClass::Background).wait().expect("written");
    extents.flush().wait().expect("flushed");
    media.superblock().write(0, block(3), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
    close(&*media);
    drop(media);

    let media = open_media(target, &options).expect("opened again");
    assert!(!media.is_blank().expect("readable"));
    let (wal, extents) = media.zones(WAL_BYTES).expect("zones");
    for (zone, offset, byte) in [(&wal, last, 1), (&extents, 1 << 20, 2), (&media.superblock(), 0, 3)] {
        let read = zone.read(offset, AlignedBuf::zeroed(4096), IoClass::Foreground).wait().expect("read");
        assert!(read.iter().all(|b| *b == byte), "byte={byte}");
    }
    // Never written: zeroes, far behind the end of the file too.
    let read = extents.read(extents.length() - 8192, AlignedBuf::zeroed(8192), IoClass::Foreground);
    assert!(read.wait().expect("read").iter().all(|b| *b == 0));
    let e = media.create_zones(WAL_BYTES).wait().expect_err("a volume is never formatted over");
    assert_eq!(e.kind(), ErrorKind::Unusable);
    extents.discard(1 << 20, 65536).wait().expect("discarded");
    close(&*media);
    drop(media);
}

#[test]
fn a_directory_keeps_what_was_written() {
    let dir = tempfile::tempdir().expect("a directory");
    for backend in backends() {
        format_write_reopen(&directory(&dir.path().join(format!("made/by/create/{backend:?}"))), backend);
    }
}

#[test]
fn a_plain_file_stands_for_a_device() {
    let dir = tempfile::tempdir().expect("a directory");
    for backend in backends() {
        format_write_reopen(&image(&dir.path().join("disk"), 32 << 20), backend);
    }
}

#[test]
fn a_raw_device_keeps_what_was_written() {
    for backend in backends() {
        if let Some(place) = support::raw() {
            format_write_reopen(&place.target, backend);
        }
    }
}

#[test]
fn a_second_opener_is_told_who_holds_the_volume() {
    let dir = tempfile::tempdir().expect("a directory");
    let raw = support::raw();
    let mut targets = vec![directory(&dir.path().join("d")), image(&dir.path().join("disk"), 32 << 20)];
    targets.extend(raw.iter().map(|place| place.target.clone()));
    for target in targets {
        let media = create_media(&target, &MediaOptions::default()).expect("created");
        let e = open_media(&target, &threads()).err().expect("held");
        assert_eq!(e.kind(), ErrorKind::Locked);
        assert!(e.to_string().contains(&format!("pid={}", std::process::id())), "{e}");
        close(&*media);
        drop(media);
        open_media(&target, &threads()).expect("free again");
    }
}

#[test]
fn a_target_that_cannot_be_used_is_named_with_a_remedy() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("small");
    let small = image(&file, 1 << 20);
    let cases = [
        (directory(&dir.path().join("absent")), "does not exist"),
        (directory(dir.path()), "holds no volume: format it first"),
        (directory(&file), "name it as a device target"),
        (Target::Device(dir.path().join("absent")), "does not exist"),
        (Target::Device(dir.path().to_owned()), "name it as a directory target"),
        (Target::Device("/dev/null".into()), "neither a block device nor a plain file"),
        (small, "too small"),
    ];
    for (target, message) in cases {
        let e = open_media(&target, &threads()).err().expect("unusable");
        assert_eq!(e.kind(), ErrorKind::Unusable, "{e}");
        assert!(e.to_string().contains(message), "{e}");
    }
}

#[test]
fn a_directory_without_its_superblock_is_not_formatted_over() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("wal"), b"precious").expect("written");
    let e = create_media(&directory(dir.path()), &threads()).err().expect("refused");
    assert!(e.to_string().contains("restore it"), "{e}");
}

#[test]
fn a_log_longer_than_the_device_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let media = open_media(&image(&dir.path().join("disk"), 8 << 20), &threads()).expect("opened");
    let e = media.create_zones(8 << 20).wait().expect_err("too long");
    assert_eq!(e.kind(), ErrorKind::Unusable);
    assert!(media.is_blank().expect("readable"));
}

/// What somebody measures a file system with must not be found there afterwards, and behaves as the zones of a volume do.
#[test]
fn scratch_zones_are_used_as_those_of_a_volume_and_have_no_name() {
    for backend in backends() {
        let dir = tempfile::tempdir().expect("a directory");
        let names = || std::fs::read_dir(dir.path()).expect("a directory").count();
        let options = MediaOptions { backend };
        let scratch = open_scratch(dir.path(), WAL_BYTES, 8 << 20, &options).expect("made");
        assert_eq!((scratch.wal.length(), scratch.data.length(), names()), (WAL_BYTES, 8 << 20, 0));
        let read = |zone: &mainstay_io::Zone, offset| {
            let buf = AlignedBuf::zeroed(4096);
            zone.read(offset, buf, IoClass::Foreground).wait().expect("readable")[0]
        };
        let last = WAL_BYTES - 4096;
        assert_eq!(read(&scratch.wal, last), 0);
        scratch.wal.write(last, block(1), WriteMode::Durable, IoClass::Wal).wait().expect("durable");
        scratch.data.allocate(0, 8 << 20).wait().expect("reserved");
        scratch.data.write((8 << 20) - 4096, block(2), WriteMode::Cached, IoClass::Background).wait().expect("written");
        scratch.data.flush().wait().expect("flushed");
        assert_eq!((read(&scratch.wal, last), read(&scratch.data, (8 << 20) - 4096)), (1, 2));
        assert_eq!(names(), 0, "nothing has a name");

        for (wal_bytes, data_bytes) in [(0, 4096), (4097, 4096), (4096, 1)] {
            let refused = open_scratch(dir.path(), wal_bytes, data_bytes, &options).expect_err("no whole blocks");
            assert_eq!(refused.kind(), ErrorKind::Unusable);
        }
        let missing = open_scratch(&dir.path().join("missing"), 4096, 4096, &options).expect_err("no such directory");
        assert_eq!(missing.kind(), ErrorKind::Unusable);
    }
}
