//! Volumes that earlier builds wrote, in git: opened, read whole, and gone on with.
//!
//! A volume holds every structure there is on disk: superblock, log batches, records, commands, edits, manifest pages, tables.
//! `testdata/volume-*.zst` are the blocks of each zone that are not zero, packed by zstd (docs/testing.md says when one is added
//! and by what command). None is ever written again: a build that cannot read one of them cannot be released.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use mainstay_io::sim::{SimMedia, SimOptions};
use mainstay_io::{AlignedBuf, BLOCK_BYTES, BlockDevice as _, Environment, IoClass, WriteMode, block_on};

use super::harness::*;
use crate::{
    BranchId, ClientToken, CommandBody, CompactionStyle, Condition, ConditionalBatch, ErrorKind, GroupSettings,
    KeyRange, KeyspaceId, KeyspaceOptions, MAIN, Offline, OperatorId, TableCompression, WriteBatch, WriteOp,
};

/// The builds of which a volume is in git, oldest first.
const VOLUMES: [&str; 4] = ["volume-uniform", "volume-by-level", MERGES, OPTIONS];
/// The first that has merge operators.
const MERGES: &str = "volume-merges";
/// The first that has options of keyspaces; with an expiring one too.
const OPTIONS: &str = "volume-options";
/// A zone holds no more than this in a golden volume.
const ZONE_BYTES_MAX: u64 = 64 << 20;
/// The log of all golden volumes.
const LOG_BYTES: u64 = 1 << 20;
const ROUNDS: u32 = 6;
const KEYS: u32 = 120;
/// For how long a pair is there that expires: longer than any test looks.
const LONG_MS: u64 = 1 << 50;

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

fn key(at: u32) -> String {
    format!("user/{at:05}/name")
}

fn value(round: u32, at: u32) -> Vec<u8> {
    format!("round {round} of user {at} ").repeat(1 + at as usize % 5).into_bytes()
}

fn op(keyspace: KeyspaceId, key: &str, value: Option<&[u8]>) -> WriteOp {
    let key = Bytes::copy_from_slice(key.as_bytes());
    match value {
        Some(value) => WriteOp::Put { keyspace, key, value: Bytes::copy_from_slice(value) },
        None => WriteOp::Delete { keyspace, key },
    }
}

/// What a round writes: half of the keys anew, some gone.
fn round(round: u32) -> Vec<(String, Option<Vec<u8>>)> {
    let keys = (0..KEYS).filter(|at| (at + round).is_multiple_of(2));
    keys.map(|at| (key(at), (!(at + round).is_multiple_of(13)).then(|| value(round, at)))).collect()
}

/// What the default keyspace of the main branch holds after so many rounds.
fn expected(rounds: u32) -> Pairs {
    let mut pairs = Pairs::new();
    for (key, value) in (0..rounds).flat_map(round) {
        match value {
            Some(value) => pairs.insert(key.into_bytes(), value),
            None => pairs.remove(key.as_bytes()),
        };
    }
    pairs
}

fn write_round(store: &Store, number: u32) {
    let writes = round(number);
    for writes in writes.chunks(20) {
        let ops = writes.iter().map(|(key, value)| op(DEFAULT, key, value.as_deref())).collect();
        store.must(CommandBody::Batches(vec![WriteBatch { branch: MAIN, ops }]));
    }
}

/// What the default keyspace ends with.
fn chosen() -> KeyspaceOptions {
    let tiered = CompactionStyle::Tiered { runs: 5 };
    KeyspaceOptions::new().compression(TableCompression::Lz4).block_bytes(1 << 10).compaction(tiered)
}

fn check_options(store: &Store) {
    assert_eq!(store.group().keyspace_options(DEFAULT), Some(chosen()));
    let sessions = store.group().keyspace("sessions").expect("it was made");
    assert!(store.group().expires(sessions));
    assert_eq!(read(store, MAIN, sessions), Pairs::from([(b"ada".to_vec(), b"token".to_vec())]));
}

/// Adds to a sum for each of some keys; one is of text by then, and a few are removed in the middle.
fn add_round(store: &Store, number: u32) {
    let keyspace = store.group().keyspace("sums").expect("made before");
    let key = |at: u32| Bytes::from(key(at));
    let mut ops: Vec<_> = (0..9)
        .map(|at| WriteOp::Merge {
            keyspace,
            key: key(at),
            operand: Bytes::copy_from_slice(&u64::from(at).to_le_bytes()),
        })
        .collect();
    if number == 2 {
        let range = KeyRange::new(Bound::Included(key(3)), Bound::Excluded(key(5)));
        ops.insert(0, WriteOp::DeleteRange { keyspace, range });
        ops.push(op(keyspace, &self::key(8), Some(b"text")));
    }
    store.must(CommandBody::Batch(WriteBatch { branch: MAIN, ops }));
}

/// What so many of these leave.
fn check_sums(store: &Store, rounds: u32) {
    let keyspace = store.group().keyspace("sums").expect("made before");
    let snapshot = store.group().snapshot(MAIN).expect("it is there");
    for at in 0..9 {
        let found = block_on(snapshot.get(keyspace, key(at).as_bytes()));
        let times = if (3..5).contains(&at) { rounds - 2 } else { rounds };
        match found {
            Ok(value) => assert_eq!(value.as_deref(), Some(&u64::from(at * times).to_le_bytes()[..]), "at={at}"),
            Err(error) => assert_eq!((at, error.kind()), (8, ErrorKind::Invalid)),
        }
    }
}

/// A volume as a loss of power leaves it: tables at several levels, a checkpoint, a clone, a keyspace, an answered client, and
/// entries of each kind behind the tables.
fn write_volume() -> SimMedia {
    let media = blank();
    let group = GroupSettings { compression: TableCompression::ByLevel, ..settings() };
    let store = Store::open_with(&media, group, engine_settings()).expect("the volume opens");
    store.must(CommandBody::CreateKeyspace { name: "users".into() });
    store.must(CommandBody::SetOperator { name: "sums".into(), operator: OperatorId::U64_ADD });
    store.must(CommandBody::CreateExpiring { name: "sessions".into() });
    let sessions = store.group().keyspace("sessions").expect("just made");
    let token = WriteOp::PutFor { keyspace: sessions, key: "ada".into(), value: "token".into(), ttl_ms: LONG_MS };
    store.must(CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![token] }));
    let tiered = KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs: 3 });
    store.must(CommandBody::SetOptions { name: "default".into(), options: tiered });
    for number in 0..ROUNDS - 1 {
        write_round(&store, number);
        add_round(&store, number);
        store.flush();
    }
    store.must(CommandBody::SetOptions { name: "default".into(), options: chosen() });
    store.settle();
    store.must(CommandBody::CreateCheckpoint { name: "before".into(), branch: MAIN });
    store.must(CommandBody::CreateClone { name: "trial".into(), checkpoint: "before".into() });
    let trial = store.group().branch("trial").expect("just made");
    store.must(put(trial, "only/in/the/clone", b"yes"));
    store.flush();
    write_round(&store, ROUNDS - 1);
    add_round(&store, ROUNDS - 1);
    let users = store.group().keyspace("users").expect("made above");
    let ops = vec![op(users, "a", Some(b"1"))];
    store.must(CommandBody::BatchIf(ConditionalBatch {
        conditions: vec![Condition::Absent { keyspace: users, key: Bytes::from_static(b"a") }],
        batch: WriteBatch { branch: MAIN, ops: ops.clone() },
    }));
    let token = ClientToken { client: [7; 16], sequence: 3 };
    let body = CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![op(users, "b", Some(b"2"))] });
    store.must(CommandBody::Once { token, body: Box::new(body) });
    drop(store);
    media.kill(0);
    media
}

fn blank() -> SimMedia {
    let media = SimMedia::new(SimOptions { capacity: ZONE_BYTES_MAX, ..SimOptions::default() });
    format(&media, LOG_BYTES)
}

/// The blocks of the zones that are not zero.
fn pack(media: &SimMedia) -> Vec<u8> {
    let mut raw = Vec::new();
    for image in media.images() {
        let blocks: Vec<u64> =
            image.written().filter(|at| image.read(*at, BLOCK_BYTES).iter().any(|byte| *byte != 0)).collect();
        raw.extend_from_slice(&(blocks.len() as u64).to_le_bytes());
        for at in blocks {
            raw.extend_from_slice(&at.to_le_bytes());
            raw.extend_from_slice(&image.read(at, BLOCK_BYTES));
        }
    }
    let mut packed = Vec::with_capacity(zstd_safe::compress_bound(raw.len()));
    zstd_safe::compress(&mut packed, &raw, 19).expect("there is room");
    packed
}

fn unpack(packed: &[u8]) -> SimMedia {
    let mut raw: Vec<u8> = Vec::with_capacity(4 * ZONE_BYTES_MAX as usize);
    zstd_safe::decompress(&mut raw, packed).expect("it was packed");
    let mut rest = &raw[..];
    let number = |rest: &mut &[u8]| {
        let (number, behind) = rest.split_first_chunk::<8>().expect("not cut short");
        *rest = behind;
        u64::from_le_bytes(*number)
    };
    // Laid out so that the zones have their lengths; no byte of that stays where it counts.
    let media = blank();
    for disk in media.disks() {
        for _ in 0..number(&mut rest) {
            let at = number(&mut rest);
            let (block, behind) = rest.split_at(BLOCK_BYTES);
            rest = behind;
            let block = AlignedBuf::copy_from(block).freeze();
            let write = disk.device().write(at, vec![block], WriteMode::Durable, IoClass::Background);
            block_on(write).expect("a sound disk");
        }
    }
    media
}

fn read(store: &Store, branch: BranchId, keyspace: KeyspaceId) -> Pairs {
    all(&store.group().snapshot(branch).expect("it is there"), keyspace)
}

#[test]
fn volumes_of_earlier_builds_are_read_and_gone_on_with() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata");
    if let Some(name) = std::env::var_os("MAINSTAY_WRITE_GOLDEN_VOLUME") {
        let path = format!("{folder}/{}.zst", name.to_string_lossy());
        assert!(!std::path::Path::new(&path).exists(), "a volume in git is never written again path={path}");
        std::fs::write(path, pack(&write_volume())).expect("write");
    }
    for name in VOLUMES {
        let packed = std::fs::read(format!("{folder}/{name}.zst")).expect("it is in git");
        let media = unpack(&packed);
        let offline = block_on(Offline::open(media.open().expect("nobody else holds it"), &Environment::system()));
        let report = block_on(offline.expect("opens").verify(&mut |_| ())).expect("all can be read");
        assert_eq!(report.damage, [], "{name}");

        let store = Store::open(&media);
        assert!(store.replayed > 0, "{name}: there are entries behind the tables");
        assert_eq!(read(&store, MAIN, DEFAULT), expected(ROUNDS), "{name}");
        let users = store.group().keyspace("users").expect("it was made");
        let said = [(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"2".to_vec())];
        assert_eq!(read(&store, MAIN, users), Pairs::from(said), "{name}");
        let mut clone = expected(ROUNDS - 1);
        let checkpoint = store.group().checkpoint("before").expect("it was made");
        assert_eq!(all(&checkpoint, DEFAULT), clone, "{name}");
        clone.insert(b"only/in/the/clone".to_vec(), b"yes".to_vec());
        let trial = store.group().branch("trial").expect("it was made");
        assert_eq!(read(&store, trial, DEFAULT), clone, "{name}");
        if name == OPTIONS {
            check_options(&store);
        }
        let has_sums = [MERGES, OPTIONS].contains(&name);
        if has_sums {
            check_sums(&store, ROUNDS);
            add_round(&store, ROUNDS);
            check_sums(&store, ROUNDS + 1);
        }
        // A request of before that comes again is known.
        let token = ClientToken { client: [7; 16], sequence: 3 };
        let body = CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![op(users, "b", Some(b"3"))] });
        store.must(CommandBody::Once { token, body: Box::new(body) });
        assert_eq!(read(&store, MAIN, users).get(&b"b"[..]), Some(&b"2".to_vec()), "{name}");

        for number in ROUNDS..2 * ROUNDS {
            write_round(&store, number);
            store.flush();
        }
        store.settle();
        assert_eq!(read(&store, MAIN, DEFAULT), expected(2 * ROUNDS), "{name}");
        store.close();
        let store = Store::open(&media);
        assert_eq!(read(&store, MAIN, DEFAULT), expected(2 * ROUNDS), "{name}");
        assert_eq!(read(&store, trial, DEFAULT), clone, "{name}");
        if has_sums {
            check_sums(&store, ROUNDS + 1);
        }
        if name == OPTIONS {
            check_options(&store);
        }
        store.close();
    }
}
