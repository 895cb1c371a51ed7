//! What a store frees, the file system or the device below gets back while it runs.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use mainstay::{Batch, Keyspace, Store};
use mainstay_io::Target;
use mainstay_tests::LoopDevice;

const WAL_BYTES: u64 = 8 << 20;
const DEVICE_BYTES: u64 = 256 << 20;
const KEYS: u32 = 16 << 10;
const VALUE_BYTES: usize = 1 << 10;
/// What is left of a store without data: the manifest pages, twice while they change, and what a block of the file system rounds up.
const REST_BYTES: u64 = 2 << 20;

fn open(target: Target) -> Store {
    let builder = Store::builder().wal_bytes(WAL_BYTES).memory_bytes(64 << 20);
    mainstay_io::block_on(builder.open_target(target)).expect("a blank target becomes a store")
}

/// Bytes that a file has on its file system.
fn allocated(file: &Path) -> u64 {
    // Of 512 bytes, whatever the file system.
    std::fs::metadata(file).expect("the file is there").blocks() * 512
}

/// A value that does not shrink.
fn value(n: u32) -> Vec<u8> {
    let mut state = u64::from(n) + 1;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(VALUE_BYTES).collect()
}

fn write(store: &Store, change: impl Fn(&mut Batch, u32)) {
    for from in (0..KEYS).step_by(256) {
        let mut batch = Batch::new();
        for n in from..from + 256 {
            change(&mut batch, n);
        }
        store.commit(batch).expect("written");
    }
}

/// Fills the store, removes everything, asks for the space, and sees `file` shrink to `rest_bytes` while the store is open.
fn fill_and_empty(store: &Store, file: &Path, rest_bytes: u64) {
    let keyspace: Keyspace = store.keyspace("k").expect("made");
    let bytes = u64::from(KEYS) * VALUE_BYTES as u64;
    write(store, |batch, n| {
        batch.insert(&keyspace, n.to_be_bytes(), value(n));
    });
    store.compact::<&[u8]>(&keyspace, ..).expect("compacted");
    let full = allocated(file);
    assert!(full >= bytes, "all of it lies in tables: bytes={bytes} allocated={full}");
    let before = keyspace.store().snapshot().expect("a view");
    write(store, |batch, n| {
        batch.remove(&keyspace, n.to_be_bytes());
    });
    // What a snapshot still reads stays for as long.
    store.compact::<&[u8]>(&keyspace, ..).expect("compacted");
    assert!(allocated(file) >= bytes, "a reader has it still");
    assert_eq!(before.iter(&keyspace).count(), KEYS as usize);
    drop(before);
    store.compact::<&[u8]>(&keyspace, ..).expect("nothing is left to compact");
    // What jobs had set aside and did not need may be on its way still.
    let deadline = Instant::now() + Duration::from_secs(60);
    while allocated(file) > rest_bytes {
        assert!(Instant::now() < deadline, "it never came back: full={full} allocated={}", allocated(file));
        std::thread::yield_now();
    }
    assert_eq!(keyspace.iter().count(), 0);
    keyspace.insert("k", "v").expect("it takes writes");
}

/// Blocks of the file of extents, on whatever file system the temporary folder has.
#[test]
fn a_file_system_gets_the_space_of_what_was_deleted_back() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let store = open(Target::Directory(folder.path().join("store")));
    fill_and_empty(&store, &folder.path().join("store/extents"), REST_BYTES);
    store.close().expect("closing succeeds");
}

/// A loop device passes what is discarded on to its file, as a solid-state disk does to its cells.
#[test]
fn a_device_hears_what_is_free() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let image = folder.path().join("image");
    let Some(disk) = LoopDevice::attach(&image, DEVICE_BYTES) else { return };
    let store = open(Target::Device(disk.path().into()));
    // The log is written with zeroes and stays.
    fill_and_empty(&store, &image, WAL_BYTES + (1 << 20) + REST_BYTES);
    store.close().expect("closing succeeds");
}
