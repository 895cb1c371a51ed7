//! The tree against an ordered map, alone and beside readers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use super::*;

/// Miri runs the same with less of it.
const fn scale(all: u64, miri: u64) -> u64 {
    if cfg!(miri) { miri } else { all }
}

/// Key, and reversed index: for one key from the newest version to the oldest.
type Model = BTreeMap<(Vec<u8>, Reverse<u64>), Said>;
type Found = (Vec<u8>, u64, Said);
/// What a version says of its key, with the value or operand where there is one.
type Said = (Kind, Vec<u8>);

fn visible(model: &Model, at: u64) -> Vec<Found> {
    let mut out: Vec<Found> = Vec::new();
    for ((key, index), value) in model {
        if index.0 <= at && out.last().is_none_or(|last| &last.0 != key) {
            out.push((key.clone(), index.0, value.clone()));
        }
    }
    out
}

fn owned(version: Version<'_>) -> Found {
    let value = version.value();
    assert_eq!(value.as_deref(), version.value_part());
    assert_eq!(value.is_some(), matches!(version.kind(), Kind::Value | Kind::Operand), "{:?}", version.kind());
    let said = (version.kind(), value.map(Vec::from).unwrap_or_default());
    (version.key().to_vec(), version.index(), said)
}

fn insert(writer: &mut Writer, key: &[u8], index: u64, (kind, value): &Said) -> bool {
    let value = Bytes::copy_from_slice(value);
    match kind {
        Kind::Value => writer.insert(key, index, Some(&value)),
        Kind::Tombstone => writer.insert(key, index, None),
        Kind::Operand => writer.insert_new(key, index, New::Operand(&value)),
        Kind::Failed => writer.insert_new(key, index, New::Failed),
    }
}

fn drain(mut cursor: Cursor) -> Vec<Found> {
    let mut out = Vec::new();
    while let Some(version) = cursor.version() {
        out.push(owned(version));
        cursor.advance();
    }
    cursor.advance();
    assert!(cursor.version().is_none(), "a cursor at its end stays there");
    out
}

fn walk(reader: &Reader, at: u64, reverse: bool) -> Vec<Found> {
    let mut cursor = reader.cursor(at, reverse);
    cursor.seek_start();
    drain(cursor)
}

fn check(ops: &[(Vec<u8>, Said)], probes: &[Vec<u8>]) {
    let mut writer = Writer::new();
    let reader = writer.reader();
    let mut model = Model::new();
    for (at, (key, said)) in ops.iter().enumerate() {
        // Two mutations an index: a key may be written twice at one.
        let index = 1 + at as u64 / 2;
        let new = model.insert((key.clone(), Reverse(index)), said.clone()).is_none();
        assert_eq!(insert(&mut writer, key, index, said), new);
    }
    assert_eq!(reader.last_key(), model.last_key_value().map(|((key, _), _)| key.as_slice()));
    drop(writer);
    let last = ops.len() as u64;
    for at in [0, 1, last / 7, last / 3, last, u64::MAX] {
        let expected = visible(&model, at);
        assert_eq!(walk(&reader, at, false), expected, "at={at}");
        let mut reversed = expected.clone();
        reversed.reverse();
        assert_eq!(walk(&reader, at, true), reversed, "reverse at={at}");
        for probe in probes.iter().chain(ops.iter().map(|op| &op.0)) {
            let found = expected.binary_search_by(|found| found.0.cmp(probe)).ok().map(|place| &expected[place]);
            assert_eq!(reader.get(probe, at).map(owned).as_ref(), found, "get at={at} key={probe:?}");
        }
        for probe in probes {
            for exclusive in [false, true] {
                let inside = |key: &Vec<u8>| key != probe || !exclusive;
                let mut cursor = reader.cursor(at, false);
                cursor.seek(probe, exclusive);
                let above = |found: &&Found| found.0 >= *probe && inside(&found.0);
                let above: Vec<_> = expected.iter().filter(above).cloned().collect();
                assert_eq!(drain(cursor), above, "seek at={at} key={probe:?} exclusive={exclusive}");
                let mut cursor = reader.cursor(at, true);
                cursor.seek(probe, exclusive);
                let below = |found: &&Found| found.0 <= *probe && inside(&found.0);
                let below: Vec<_> = reversed.iter().filter(below).cloned().collect();
                assert_eq!(drain(cursor), below, "seek back at={at} key={probe:?} exclusive={exclusive}");
            }
        }
    }
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        // Few keys, so that some have many versions.
        (0u8..12).prop_map(|key| vec![b'k', key]),
        // Common prefixes around the eight bytes of a head, and zeros at the end.
        (prop::collection::vec(0u8..3, 0..12)).prop_map(|tail| [b"prefix".to_vec(), tail].concat()),
        // One long prefix, so that the nodes of a long time skip it and then have to be made anew.
        any::<u16>().prop_map(|key| [b"a/long/prefix/of/all/".as_slice(), &key.to_be_bytes()].concat()),
        prop::collection::vec(any::<u8>(), 0..20),
    ]
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: scale(32, 2) as u32,
        failure_persistence: (!cfg!(miri)).then(|| Box::new(FileFailurePersistence::default()) as _),
        ..ProptestConfig::default()
    }
}

/// Keys with one prefix first, so that edges skip it, then those of all kinds.
fn ops() -> impl Strategy<Value = Vec<(Vec<u8>, Said)>> {
    // Some around what is copied and what stays where it is.
    let lengths = prop_oneof![40 => 0..40_usize, 1 => INLINE_BYTES_MAX - 1..INLINE_BYTES_MAX + 3];
    let bytes = (any::<u8>(), lengths).prop_map(|(byte, length)| vec![byte; length]);
    let kinds = vec![Kind::Value, Kind::Tombstone, Kind::Operand, Kind::Failed];
    let said = (prop::sample::select(kinds), bytes).prop_map(|(kind, bytes)| match kind {
        Kind::Value | Kind::Operand => (kind, bytes),
        Kind::Tombstone | Kind::Failed => (kind, Vec::new()),
    });
    let said = said.boxed();
    let value = || said.clone();
    let narrow = any::<u16>().prop_map(|key| [b"a/long/prefix/of/all/".as_slice(), &key.to_be_bytes()].concat());
    let most = scale(300, 25) as usize;
    (prop::collection::vec((narrow, value()), 0..most), prop::collection::vec((key(), value()), 1..most))
        .prop_map(|(narrow, wide)| [narrow, wide].concat())
}

proptest! {
    #![proptest_config(config())]
    #[test]
    fn is_what_an_ordered_map_is(ops in ops(), probes in prop::collection::vec(key(), 8)) {
        check(&ops, &probes);
    }
}

#[test]
fn versions_of_one_key_are_found_at_every_index() {
    let versions = scale(3000, 100);
    let mut writer = Writer::new();
    let reader = writer.reader();
    for index in 1..=versions {
        // Every index but those that three divides; where seven does, written twice.
        for _ in 0..1 + u64::from(index % 7 == 0) {
            if index % 3 != 0 {
                writer.insert(b"hot", index, Some(&Bytes::copy_from_slice(&index.to_le_bytes())));
            }
        }
    }
    let newest = reader.get(b"hot", u64::MAX).expect("it is there");
    let chain: Vec<u64> = std::iter::successors(Some(newest), |version| version.before()).map(Version::index).collect();
    assert!(chain.is_sorted_by(|newer, older| newer > older));
    for at in 0..=versions + 2 {
        let found = reader.get(b"hot", at).map(Version::index);
        let index = at.min(versions);
        let index = if index % 3 == 0 { index.saturating_sub(1) } else { index };
        assert_eq!(found, (index > 0).then_some(index), "at={at}");
        let steps = std::iter::successors(Some(newest), |version| version.toward(at)).count();
        assert!(steps <= 3 * versions.ilog2() as usize, "at={at} steps={steps}");
    }
}

/// Where the keys are told apart behind what all share, in whatever order they come.
#[test]
fn ascending_descending_and_alternating_keys() {
    let keys = scale(6000, 300);
    let orders: [fn(u64, u64) -> u64; 3] = [
        |at, _| at,
        |at, keys| keys - at,
        |at, keys| if at % 2 == 0 { keys / 2 + at / 2 } else { keys / 2 - at / 2 - 1 },
    ];
    for order in orders {
        let mut writer = Writer::new();
        let reader = writer.reader();
        let key = |at: u64| format!("common/prefix/{:08}", order(at, keys)).into_bytes();
        for at in 0..keys {
            assert!(writer.insert(&key(at), 1, Some(&Bytes::from_static(b"value"))));
        }
        let found = walk(&reader, 1, false);
        assert!(found.len() as u64 == keys && found.is_sorted_by_key(|found| &found.0));
        assert!((0..keys).all(|at| reader.get(&key(at), 1).is_some()));
        assert!(reader.get(b"common", 1).is_none() && reader.get(b"d", 1).is_none());
    }
}

#[test]
fn a_large_value_stays_where_it_is_and_a_small_one_is_copied() {
    check_large(|bytes| New::Value(bytes), Kind::Value);
}

#[test]
fn a_large_operand_stays_where_it_is_and_a_small_one_is_copied() {
    check_large(|bytes| New::Operand(bytes), Kind::Operand);
}

fn check_large(new: fn(&Bytes) -> New<'_>, kind: Kind) {
    let mut writer = Writer::new();
    let reader = writer.reader();
    let entry = Bytes::from(vec![1; 100 << 10]);
    for index in 1..=3 {
        writer.insert_new(b"small", index, new(&entry.slice(..INLINE_BYTES_MAX)));
        writer.insert_new(b"large", index, new(&entry.slice(100..50_000)));
    }
    for key in [&b"small"[..], b"large"] {
        assert_eq!(reader.get(key, 2).map(Version::kind), Some(kind));
    }
    let value = |key: &[u8]| reader.get(key, 2).and_then(Version::value).expect("it is there");
    assert_eq!(value(b"large").as_ptr(), entry[100..].as_ptr());
    assert_ne!(value(b"small").as_ptr(), entry.as_ptr());
    let (small, large) = (value(b"small"), value(b"large"));
    assert!(!entry.is_unique());
    drop((reader, writer));
    assert_eq!((small.len(), large.len()), (INLINE_BYTES_MAX, 49_900), "values live longer than the tree");
    drop((small, large));
    assert!(entry.is_unique(), "nothing is kept of what it came in");
}

#[test]
#[should_panic = "indexes do not fall"]
fn a_version_is_not_written_behind_a_newer_one() {
    let mut writer = Writer::new();
    writer.insert(b"key", 2, None);
    writer.insert(b"key", 1, None);
}

/// The writer splits leaves below readers who came by older paths: each must see every key of its index, in order.
#[allow(clippy::disallowed_methods, reason = "real threads are what is tested")]
#[test]
fn readers_beside_the_writer_see_their_index_whole() {
    let keys = scale(20_000, 200);
    let mut writer = Writer::new();
    let reader = writer.reader();
    let written = AtomicU64::new(0);
    // Multiplication by an odd number scatters and stays a bijection. Every fourth is a newer version of an older key.
    let key = |at: u64| {
        let at = if at.is_multiple_of(4) { at / 2 } else { at };
        [b"prefix/".as_slice(), &at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()].concat()
    };
    let mut met = BTreeSet::new();
    let distinct: Vec<usize> = (0..=keys)
        .map(|at| {
            met.extend((at > 0).then(|| key(at)));
            met.len()
        })
        .collect();
    std::thread::scope(|scope| {
        for reverse in [false, true] {
            let (reader, written, distinct) = (reader.clone(), &written, &distinct);
            scope.spawn(move || {
                loop {
                    let at = written.load(Ordering::Acquire);
                    let seen = walk(&reader, at, reverse);
                    assert_eq!(seen.len(), distinct[at as usize], "at={at} reverse={reverse}");
                    assert!(seen.windows(2).all(|pair| (pair[0].0 < pair[1].0) != reverse));
                    for probe in (1..=at).rev().take(scale(500, 20) as usize) {
                        let found = reader.get(&key(probe), at).expect("every key of before");
                        assert!(probe <= found.index() && found.index() <= at, "key={probe} at={at}");
                    }
                    if at == keys {
                        break;
                    }
                }
            });
        }
        for at in 1..=keys {
            writer.insert(&key(at), at, Some(&Bytes::from_static(b"value")));
            written.store(at, Ordering::Release);
        }
    });
}
