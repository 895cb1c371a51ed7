//! A directory and a raw device hold the same bytes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay::{Store, StoreBuilder};
use mainstay_io::sim::{SimClock, SimRandom};
use mainstay_io::{Environment, Target};
use mainstay_tests::LoopDevice;

const WAL_BYTES: u64 = 8 << 20;
const DEVICE_BYTES: u64 = 128 << 20;

/// Ids and times that are the same in every run, so that only the layout can differ.
fn builder() -> StoreBuilder {
    let environment = Environment {
        clock: Arc::new(SimClock::new(Duration::from_secs(1))),
        random: Arc::new(SimRandom::new(7)),
        ..Environment::system()
    };
    // One batch at a time, and no rotation before the end: the order of writes is the same in every run.
    Store::builder().environment(environment).wal_bytes(WAL_BYTES).memtable_bytes(16 << 20).background_tasks(1)
}

fn write_the_same(target: Target) {
    let store = mainstay_io::block_on(builder().open_target(target)).expect("a blank target becomes a store");
    let keyspace = store.keyspace("k").expect("a keyspace can be made");
    for n in 0..500_u32 {
        keyspace.insert(format!("key {n:05}"), format!("value {n:0>90}")).expect("a put succeeds");
    }
    store.close().expect("closing succeeds");
}

fn assert_same_bytes(directory: &Path, device: &[u8]) {
    let zone = |name: &str| std::fs::read(directory.join(name)).expect("the zone can be read");
    let (superblock, wal, extents) = (zone("superblock"), zone("wal"), zone("extents"));
    assert_eq!(wal.len() as u64, WAL_BYTES);
    let wal_at = 1 << 20;
    let extents_at = wal_at + wal.len();
    assert!(superblock[..] == device[..superblock.len()], "superblock zone");
    assert!(wal[..] == device[wal_at..extents_at], "log zone");
    assert!(!extents.is_empty() && extents.iter().any(|byte| *byte != 0), "tables were written");
    assert!(extents[..] == device[extents_at..extents_at + extents.len()], "extents zone");
}

#[test]
fn a_directory_and_a_device_image_hold_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (directory, image) = (folder.path().join("store"), folder.path().join("image"));
    std::fs::File::create(&image).and_then(|file| file.set_len(DEVICE_BYTES)).expect("an image can be made");
    write_the_same(Target::Directory(directory.clone()));
    write_the_same(Target::Device(image.clone()));
    assert_same_bytes(&directory, &std::fs::read(&image).expect("the image can be read"));
}

#[test]
fn a_directory_and_a_loop_device_hold_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (directory, image) = (folder.path().join("store"), folder.path().join("image"));
    let Some(disk) = LoopDevice::attach(&image, DEVICE_BYTES) else { return };
    write_the_same(Target::Directory(directory.clone()));
    write_the_same(Target::Device(disk.path().into()));
    drop(disk);
    let bytes = std::fs::read(&image).expect("the image can be read");
    assert_same_bytes(&directory, &bytes);

    // And `dd` moves one into the other: the device's zones, cut into files, are a store.
    let moved = folder.path().join("moved");
    std::fs::create_dir(&moved).expect("a folder can be made");
    let (wal_at, extents_at) = (1 << 20, (1 << 20) + WAL_BYTES as usize);
    let extents_bytes = std::fs::metadata(directory.join("extents")).expect("the zone is there").len() as usize;
    for (name, range) in
        [("superblock", 0..wal_at), ("wal", wal_at..extents_at), ("extents", extents_at..extents_at + extents_bytes)]
    {
        std::fs::write(moved.join(name), &bytes[range]).expect("a zone can be written");
    }
    let store = mainstay_io::block_on(builder().open_target(Target::Directory(moved))).expect("the moved store opens");
    let keyspace = store.keyspace("k").expect("the keyspace is there");
    assert_eq!(keyspace.iter().count(), 500);
    store.close().expect("closing succeeds");
}
