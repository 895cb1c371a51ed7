//! Bad input and faults of one store on real files: a typed error that says what to do, and nothing lost.

use std::path::Path;
use std::process::Command;

use mainstay::{BackendChoice, ErrorKind, Store};
use mainstay_tests::{LoopDevice, binary};

fn small(path: &Path) -> mainstay::Result<Store> {
    Store::builder().wal_bytes(8 << 20).memory_bytes(32 << 20).memtable_bytes(1 << 20).open(path)
}

fn kind_of<T>(result: mainstay::Result<T>) -> ErrorKind {
    result.err().expect("the call is refused").kind()
}

#[test]
fn a_second_opener_is_told_who_holds_the_volume() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let store = small(folder.path()).expect("a blank folder becomes a store");
    let error = small(folder.path()).err().expect("one process at a time");
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    store.close().expect("closing succeeds");
    small(folder.path()).expect("the volume is free again").close().expect("closing succeeds");
}

#[test]
fn what_is_no_volume_is_refused_and_left_as_it_was() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    std::fs::write(folder.path().join("superblock"), b"somebody's notes").expect("a file can be written");
    let kind = kind_of(small(folder.path()));
    assert!(matches!(kind, ErrorKind::Foreign | ErrorKind::Invalid), "{kind:?}");
    let notes = std::fs::read(folder.path().join("superblock")).expect("the file is there");
    assert_eq!(notes, b"somebody's notes");
}

#[test]
fn sizes_beyond_their_limits_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let store = small(folder.path()).expect("a blank folder becomes a store");
    let keyspace = store.keyspace("k").expect("a keyspace can be made");
    assert_eq!(kind_of(keyspace.insert(b"", b"v")), ErrorKind::Invalid);
    assert_eq!(kind_of(keyspace.insert(vec![b'k'; (64 << 10) + 1], b"v")), ErrorKind::Invalid);
    assert_eq!(kind_of(keyspace.insert(b"k", vec![0; (16 << 20) + 1])), ErrorKind::Invalid);
    assert_eq!(keyspace.get(b"k").expect("a get succeeds"), None);
    keyspace.insert(b"k", b"v").expect("the store goes on");
    store.close().expect("closing succeeds");
}

/// Both ways of block I/O hold the same data: written through one, read through the other.
#[test]
fn a_store_moves_between_io_uring_and_threads() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let open = |backend| Store::builder().wal_bytes(8 << 20).backend(backend).open(folder.path());
    for (round, backend) in [BackendChoice::Threads, BackendChoice::Auto, BackendChoice::Threads].iter().enumerate() {
        let store = open(*backend).expect("the store opens");
        let keyspace = store.keyspace("k").expect("a keyspace can be made");
        for earlier in 0..round {
            let value = keyspace.get(format!("round {earlier}")).expect("a get succeeds");
            assert_eq!(value.as_deref(), Some(&b"there"[..]));
        }
        keyspace.insert(format!("round {round}"), b"there").expect("a put succeeds");
        store.close().expect("closing succeeds");
    }
}

/// A full file system: writes answer `OutOfSpace`, reads go on, and freeing space heals the store without opening it again.
#[test]
fn a_full_file_system_is_a_state_and_not_an_end() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let Some(disk) = LoopDevice::attach(&folder.path().join("disk"), 96 << 20) else { return };
    let mount = folder.path().join("mount");
    std::fs::create_dir(&mount).expect("a folder can be made");
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        let status = Command::new(program).args(arguments).status().expect("the program runs");
        assert!(status.success(), "{program} succeeds");
    };
    run("mkfs.ext4", &["-q".as_ref(), "-m".as_ref(), "0".as_ref(), disk.path().as_os_str()]);
    run("mount", &[disk.path().as_os_str(), mount.as_os_str()]);
    let outcome = std::panic::catch_unwind(|| fill_and_heal(&mount));
    run("umount", &[mount.as_os_str()]);
    outcome.expect("the store behaves on a full file system");
}

fn fill_and_heal(mount: &Path) {
    let ballast = mount.join("ballast");
    std::fs::write(&ballast, vec![1; 24 << 20]).expect("the ballast fits");
    let store = small(&mount.join("store")).expect("the store fits");
    let keyspace = store.keyspace("k").expect("a keyspace can be made");
    // Bytes that no compression makes smaller.
    let noise = |n: u64| -> Vec<u8> {
        let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..64 << 10)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect()
    };
    let mut written = 0;
    let refusal = loop {
        match keyspace.insert(written.to_string(), noise(written)) {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 4_000, "more was written than the file system holds");
    };
    assert_eq!(refusal.kind(), ErrorKind::OutOfSpace, "{refusal}");
    for n in 0..written {
        let value = keyspace.get(n.to_string()).expect("reads go on").expect("what was acknowledged is there");
        assert_eq!(value, noise(n), "{n}");
    }
    std::fs::remove_file(&ballast).expect("the ballast can be removed");
    mainstay_tests::until("the store takes writes again", || keyspace.insert(b"healed", b"yes").is_ok());
    store.close().expect("closing succeeds");
    let store = small(&mount.join("store")).expect("the store opens again");
    let keyspace = store.keyspace("k").expect("the keyspace is there");
    assert!(keyspace.get(b"healed").expect("a get succeeds").is_some());
    for n in 0..written {
        assert_eq!(keyspace.get(n.to_string()).expect("a get succeeds").expect("it is there"), noise(n), "{n}");
    }
    store.close().expect("closing succeeds");
}

/// One bit flipped anywhere that holds data: `verify` finds it, and no read returns it as data.
#[test]
fn a_flipped_bit_is_found_and_never_returned() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join("store");
    let store = small(&path).expect("a blank folder becomes a store");
    let keyspace = store.keyspace("k").expect("a keyspace can be made");
    for n in 0..2_000_u32 {
        keyspace.insert(format!("key {n:05}"), format!("value {n:0>90}")).expect("a put succeeds");
    }
    store.close().expect("closing succeeds");
    let verify = || Command::new(binary()).args(["verify", "--data"]).arg(&path).output().expect("verify runs");
    let clean = verify();
    assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stderr));

    let mut found_by_read = 0;
    for file in ["extents", "superblock"] {
        let whole = std::fs::read(path.join(file)).expect("the zone can be read");
        let data: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
        assert!(data.len() > 100, "{file} holds data");
        for step in 0..12 {
            let at = data[data.len() * step / 12];
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (step % 8);
            std::fs::write(path.join(file), &damaged).expect("the zone can be written");
            let report = verify();
            assert!(!report.status.success(), "verify misses bit {} of byte {at} of {file}", step % 8);
            found_by_read += u32::from(!reads_right(&path));
            // Opening may have rewritten what it could mend.
            std::fs::write(path.join(file), &whole).expect("the zone can be written");
        }
    }
    assert!(found_by_read > 0, "some of the damage is met by a read");
    let healed = verify();
    assert!(healed.status.success(), "{}", String::from_utf8_lossy(&healed.stderr));
}

/// True when everything is there; false when the damage was met. Panics when wrong data is returned.
fn reads_right(path: &Path) -> bool {
    // The copy is opened, so that the original stays as it was damaged.
    let copy = tempfile::tempdir().expect("a temporary folder can be made");
    for zone in ["superblock", "wal", "extents"] {
        std::fs::copy(path.join(zone), copy.path().join(zone)).expect("a zone can be copied");
    }
    let Ok(store) = small(copy.path()) else { return false };
    let keyspace = store.keyspace("k").expect("the keyspace is there");
    let mut right = true;
    for n in 0..2_000_u32 {
        match keyspace.get(format!("key {n:05}")) {
            Ok(Some(value)) => assert_eq!(value, format!("value {n:0>90}").as_bytes(), "damage returned as data"),
            Ok(None) => panic!("key {n} is gone without an error"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                right = false;
            }
        }
    }
    right
}
