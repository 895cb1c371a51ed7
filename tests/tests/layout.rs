//! A directory and a raw device hold the same bytes.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay::{Store, StoreBuilder};
use mainstay_io::sim::{SimClock, SimRandom};
use mainstay_io::{Environment, Target};
use mainstay_tests::LoopDevice;

const WAL_BYTES: u64 = 8 << 20;
const DEVICE_BYTES: u64 = 128 << 20;
/// Runs on a directory before they count as different from the one on a device.
const RUNS_MAX: usize = 24;
/// The command, and what it changes in the manifest.
const RECORDS_OF_A_KEYSPACE: u64 = 2;

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
    // What the keyspace changes in the manifest follows as a batch of its own, or with the first put: let it be durable before that.
    let deadline = Instant::now() + Duration::from_secs(60);
    while store.status().engine.wal_records < RECORDS_OF_A_KEYSPACE {
        assert!(Instant::now() < deadline, "the change of the manifest is logged");
        std::thread::yield_now();
    }
    for n in 0..500_u32 {
        keyspace.insert(format!("key {n:05}"), format!("value {n:0>90}")).expect("a put succeeds");
    }
    store.close().expect("closing succeeds");
}

/// Writes to `directory` until it holds what the device holds. Which records share a batch depends on threads, within a
/// store's close too, so the bytes of two runs may differ on one layout; that a whole run is the same on both shows that the
/// layout changes nothing.
fn assert_same_bytes(directory: &Path, device: &[u8]) {
    let mut differences = Vec::new();
    for _ in 0..RUNS_MAX {
        write_the_same(Target::Directory(directory.to_owned()));
        match difference(directory, device) {
            None => return,
            Some(difference) => differences.push(difference),
        }
        std::fs::remove_dir_all(directory).expect("the folder can be removed");
    }
    panic!("no run on a directory gave the bytes of the device: {differences:#?}");
}

fn difference(directory: &Path, device: &[u8]) -> Option<(&'static str, usize, String)> {
    let mut at = 0;
    for name in ["superblock", "wal", "extents"] {
        let zone = std::fs::read(directory.join(name)).expect("the zone can be read");
        match name {
            "wal" => assert_eq!(zone.len() as u64, WAL_BYTES),
            "extents" => assert!(zone.iter().any(|byte| *byte != 0), "tables were written"),
            _ => {}
        }
        if let Some((place, bytes)) = first_difference(&zone, &device[at..at + zone.len()]) {
            return Some((name, place, bytes));
        }
        at += zone.len();
    }
    None
}

/// Where two zones begin to differ, and the bytes from there on.
fn first_difference(a: &[u8], b: &[u8]) -> Option<(usize, String)> {
    let at = a.iter().zip(b).position(|(a, b)| a != b)?;
    let from = |bytes: &[u8]| bytes[at..].iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>();
    Some((at, format!("{} and {}", from(a), from(b))))
}

#[test]
fn a_directory_and_a_device_image_hold_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (directory, image) = (folder.path().join("store"), folder.path().join("image"));
    std::fs::File::create(&image).and_then(|file| file.set_len(DEVICE_BYTES)).expect("an image can be made");
    write_the_same(Target::Device(image.clone()));
    assert_same_bytes(&directory, &std::fs::read(&image).expect("the image can be read"));
}

#[test]
fn a_directory_and_a_loop_device_hold_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (directory, image) = (folder.path().join("store"), folder.path().join("image"));
    let Some(disk) = LoopDevice::attach(&image, DEVICE_BYTES) else { return };
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
