//! Every order of the loads and stores of the writer and a reader, as far as loom goes: nodes of three entries, so that few
//! inserts split leaves, inner nodes and the root.

use bytes::Bytes;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};

use crate::{Kind, New, Reader, Version, Writer};

/// All but the odd ones from 100 on begin alike, so that the edges of the tree skip that.
fn key(of: u8) -> [u8; 2] {
    [if of >= 100 && of % 2 == 1 { b'l' } else { b'k' }, of]
}

/// Each index writes another kind.
fn kind(index: u64) -> Kind {
    [Kind::Value, Kind::Operand, Kind::Tombstone, Kind::Failed][index as usize % 4]
}

fn check_kind(version: Version<'_>) {
    let kind = kind(version.index());
    assert_eq!(version.kind(), kind, "index={}", version.index());
    let value = matches!(kind, Kind::Value | Kind::Operand).then_some(&b"v"[..]);
    assert_eq!(version.value_part(), value, "index={}", version.index());
}

/// What a reader does with a tree in which the keys `0..at` by their places are to be found.
type Look = fn(&Reader, keys: &[u8], at: u64);

fn get(reader: &Reader, keys: &[u8], at: u64) {
    for (place, key) in keys.iter().enumerate().rev() {
        let index = place as u64 + 1;
        // Those above the index may be there or not, and are not to be seen.
        let newest = keys.iter().take(at as usize).rposition(|other| other == key).map(|place| place as u64 + 1);
        if index + 4 > at {
            let found = reader.get(&self::key(*key), at);
            assert_eq!(found.map(Version::index), newest, "key={key} at={at}");
            found.into_iter().for_each(check_kind);
        }
    }
}

fn walk(reader: &Reader, keys: &[u8], at: u64, reverse: bool) {
    let mut expected: Vec<u8> = keys.iter().take(at as usize).copied().collect();
    expected.sort_unstable();
    expected.dedup();
    if reverse {
        expected.reverse();
    }
    let mut cursor = reader.cursor(at, reverse);
    cursor.seek_start();
    let mut found = Vec::new();
    while let Some(version) = cursor.version() {
        assert!(version.index() <= at);
        check_kind(version);
        found.push(version.key()[1]);
        cursor.advance();
    }
    assert_eq!(found, expected, "reverse={reverse} at={at}");
}

/// Inserts the keys, the last `beside` of them while a reader looks.
fn check(keys: &'static [u8], beside: usize, look: Look) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(move || {
        let mut writer = Writer::new();
        let reader = writer.reader();
        let mut insert = move |at: usize| {
            let (index, value) = (at as u64 + 1, Bytes::from_static(b"v"));
            let new = match kind(index) {
                Kind::Value => New::Value(&value),
                Kind::Operand => New::Operand(&value),
                Kind::Tombstone => New::Tombstone,
                Kind::Failed => New::Failed,
            };
            writer.insert_new(&key(keys[at]), index, new);
        };
        let before = keys.len() - beside;
        (0..before).for_each(&mut insert);
        let written = Arc::new(AtomicU64::new(before as u64));
        let seen = written.clone();
        let thread = loom::thread::spawn(move || {
            let at = seen.load(Ordering::Acquire);
            look(&reader, keys, at);
        });
        for at in before..keys.len() {
            insert(at);
            written.store(at as u64 + 1, Ordering::Release);
        }
        thread.join().expect("the reader found what was there");
    });
}

fn each_look(keys: &'static [u8], beside: usize) {
    check(keys, beside, get);
    check(keys, beside, |reader, keys, at| walk(reader, keys, at, false));
    check(keys, beside, |reader, keys, at| walk(reader, keys, at, true));
}

#[test]
fn an_insert_into_a_leaf_with_room() {
    each_look(&[4, 2, 6, 1], 2);
}

#[test]
fn a_newer_version_of_a_key() {
    each_look(&[4, 2, 4, 4], 2);
}

#[test]
fn a_leaf_that_is_split() {
    each_look(&[2, 4, 6, 3, 5], 2);
}

#[test]
fn ascending_keys_open_a_leaf_behind_the_last() {
    each_look(&[2, 4, 6, 8, 10], 2);
}

#[test]
fn a_leaf_between_others_is_split() {
    each_look(&[2, 4, 6, 8, 10, 12, 5, 7], 2);
}

#[test]
fn an_inner_node_and_the_root_are_split() {
    each_look(&[2, 4, 6, 8, 10, 12, 14, 16, 18, 5, 11], 2);
}

#[test]
fn an_inner_node_is_opened_behind_the_last() {
    each_look(&[2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22], 2);
}

#[test]
fn the_edge_of_the_tree_is_made_anew_for_a_key_that_begins_otherwise() {
    each_look(&[2, 4, 6, 5, 8, 101, 103], 2);
    each_look(&[2, 4, 6, 5, 8, 10, 12, 14, 16, 18, 101, 103], 2);
}
