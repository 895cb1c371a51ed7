//! Options of keyspaces, on a store of this process.

use mainstay::{CompactionStyle, ErrorKind, Keyspace, KeyspaceOptions, Store, TableCompression};

const VALUE_BYTES: usize = 200;

fn tiered(runs: u8) -> KeyspaceOptions {
    KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs })
}

/// Writes keys in no order, `rounds` times over, in batches.
fn fill(store: &Store, keyspace: &Keyspace, rounds: u32) {
    for round in 0..rounds {
        for first in (0..4000_u32).step_by(100) {
            let mut batch = mainstay::Batch::new();
            for n in first..first + 100 {
                batch.insert(keyspace, key(n), vec![(round + n % 7) as u8; VALUE_BYTES]);
            }
            store.commit(batch).expect("written");
        }
    }
}

fn key(n: u32) -> [u8; 4] {
    n.wrapping_mul(2_654_435_761).to_be_bytes()
}

fn check(keyspace: &Keyspace, last_round: u32) {
    assert_eq!(keyspace.iter().count(), 4000);
    for n in (0..4000).step_by(37) {
        let value = keyspace.get(key(n)).expect("read").expect("it was written");
        assert_eq!(&value[..], [(last_round + n % 7) as u8; VALUE_BYTES], "{n}");
    }
}

#[test]
fn options_are_kept_and_the_data_is_the_same_under_all_of_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = || {
        let small = Store::builder().wal_bytes(16 << 20).memtable_bytes(256 << 10);
        small.open(folder.path().join("store")).expect("opens")
    };
    let store = open();
    let all = [
        ("leveled", KeyspaceOptions::new()),
        ("tiered", tiered(4)),
        ("raw", tiered(3).compression(TableCompression::None).block_bytes(1 << 10)),
        ("large", KeyspaceOptions::new().compression(TableCompression::Lz4).block_bytes(256 << 10)),
    ];
    for (name, options) in all {
        let keyspace = store.keyspace_with_options(name, options).expect("made");
        assert_eq!(keyspace.options().expect("there"), options, "{name}");
        fill(&store, &keyspace, 3);
        check(&keyspace, 2);
    }
    assert_eq!(store.keyspace("plain").expect("made").options().expect("there"), KeyspaceOptions::new());
    drop(store);
    // Without a clean close: entries are replayed.
    let store = open();
    for (name, options) in all {
        let keyspace = store.keyspace_with_options(name, options).expect("there");
        check(&keyspace, 2);
        // Another choice meets what is there.
        let next = if options == tiered(4) { KeyspaceOptions::new() } else { tiered(4).block_bytes(4 << 10) };
        let same = store.keyspace_with_options(name, next).expect("changed");
        assert_eq!((same.id(), keyspace.options().expect("there")), (keyspace.id(), next), "{name}");
        fill(&store, &keyspace, 4);
        store.compact::<&[u8]>(&keyspace, ..).expect("compacted");
        check(&keyspace, 3);
    }
    store.close().expect("closes");
}

#[test]
fn what_is_out_of_range_is_refused_and_makes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::builder().wal_bytes(16 << 20).open(folder.path().join("store")).expect("opens");
    for options in [tiered(1), tiered(65), KeyspaceOptions::new().block_bytes(100)] {
        let error = store.keyspace_with_options("new", options).err().expect("out of range");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let error = store.keyspace_with_options("mainstay.own", tiered(4)).err().expect("a name of this crate");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(store.keyspace_if_exists("new").is_none());
    let gone = store.keyspace_with_options("gone", tiered(4)).expect("made");
    store.drop_keyspace("gone").expect("dropped");
    assert_eq!(gone.options().expect_err("it was dropped").kind(), ErrorKind::Invalid);
    let again = store.keyspace("gone").expect("made");
    assert_eq!(again.options().expect("there"), KeyspaceOptions::new(), "options go with their keyspace");
    store.close().expect("closes");
}
