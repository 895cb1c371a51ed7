//! What options of a keyspace do to its tables, by count.

use super::harness::*;
use crate::{CommandBody, CompactionStyle, KeyspaceOptions, MAIN, OUTCOMES_KEYSPACE, OperatorId, TableCompression};

fn set(store: &Store, options: KeyspaceOptions) {
    store.must(CommandBody::SetOptions { name: "default".into(), options });
    assert_eq!(store.group().keyspace_options(DEFAULT), Some(options));
}

fn key(n: u32) -> String {
    format!("key-{:08x}", n.wrapping_mul(2_654_435_761))
}

/// Writes what no codec makes shorter, in no order, and waits for all jobs at each step.
fn fill(store: &Store, keys: u32) {
    for n in 0..keys {
        let value: Vec<u8> =
            (0..25).flat_map(|i| (u64::from(n) << 8 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()).collect();
        store.put(&key(n), &value);
        if n % 40 == 39 {
            store.settle();
        }
    }
}

#[test]
fn runs_that_are_merged_whole_are_written_less_often() {
    let compacted = |style| {
        let store = Store::open(&media());
        set(&store, KeyspaceOptions::new().compression(TableCompression::None).compaction(style));
        fill(&store, 4000);
        let written: u64 = store.engine.status().stats.compaction_bytes.iter().sum();
        let status = store.group().status();
        assert_eq!((status.refused_installs, status.frozen_generations), (0, 0));
        for n in (0..4000).step_by(7) {
            assert!(store.get(&key(n)).is_some(), "{n}");
        }
        store.close();
        written
    };
    let (leveled, tiered) = (compacted(CompactionStyle::Leveled), compacted(CompactionStyle::Tiered { runs: 8 }));
    assert!(tiered * 2 < leveled, "tiered {tiered}, leveled {leveled}");
}

/// What is noted of an entry that gives a keyspace something may be what fills the memtables: then the entry rotates too.
#[test]
fn an_entry_that_gives_an_operator_or_options_may_rotate_where_pairs_expire() {
    let mut rotated = 0;
    for value_bytes in (3800..4096).step_by(8) {
        let media = media();
        let store = Store::open(&media);
        store.must(CommandBody::CreateKeyspace { name: OUTCOMES_KEYSPACE.into() });
        store.must(CommandBody::CreateExpiring { name: "sessions".into() });
        store.must(CommandBody::Rotate);
        store.put("k", &vec![7; value_bytes]);
        let generations = || store.group().status().frozen_generations + store.group().status().tables;
        let before = generations();
        store.must(CommandBody::SetOperator { name: "sums".into(), operator: OperatorId::U64_ADD });
        let options = KeyspaceOptions::new().block_bytes(4096);
        store.must(CommandBody::SetOptions { name: "events".into(), options });
        rotated += u32::from(generations() > before);
        drop(store);
        media.kill(0);
        let store = Store::open(&media);
        let [sums, events] = ["sums", "events"].map(|name| store.group().keyspace(name).expect("made above"));
        assert_eq!(store.group().merge_operator(sums), Some(OperatorId::U64_ADD));
        assert_eq!(store.group().keyspace_options(events), Some(options));
        assert_eq!(store.get("k").map(|value| value.len()), Some(value_bytes));
        store.close();
    }
    assert!(rotated > 1, "none of them was at the bound");
}

#[test]
fn tables_that_are_made_behind_a_choice_follow_it_and_the_others_stay() {
    let store = Store::open(&media());
    let bytes = |store: &Store| store.group().status().table_bytes;
    for n in 0..1600 {
        store.put(&key(n), &[7; 100]);
    }
    store.settle();
    let compressed = bytes(&store);
    set(&store, KeyspaceOptions::new().compression(TableCompression::None));
    store.settle();
    assert_eq!(bytes(&store), compressed, "they stay as they are");
    // What is merged with other tables is written by the new ones.
    for n in 0..1600 {
        store.put(&key(n), &[7; 100]);
    }
    store.must(compact(MAIN, "", None));
    store.settle();
    assert!(bytes(&store) > 1600 * 100, "{} bytes, and {compressed} before", bytes(&store));
    let raw = bytes(&store);
    // Small blocks have a larger index.
    set(&store, KeyspaceOptions::new().compression(TableCompression::None).block_bytes(1 << 10));
    for n in 0..1600 {
        store.put(&key(n), &[7; 100]);
    }
    store.must(compact(MAIN, "", None));
    store.settle();
    assert!(bytes(&store) > raw, "{} bytes, and {raw} before", bytes(&store));
    store.close();
}
