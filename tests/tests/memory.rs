//! Memory stays within the budget while more is loaded than the budget holds. One test in this binary, since the peak
//! is the process's.

use mainstay::{Batch, Store};

/// What a process holds besides a small budget: code, stacks, the log's batches in flight.
const BESIDES_BYTES: u64 = 32 << 20;
/// From here on the budget covers them.
const COVERED_BYTES: u64 = 256 << 20;

fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the kernel tells");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the kernel tells the peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number of KiB") << 10
}

/// The short form loads 400,000 keys into a budget of 32 MiB; `MAINSTAY_MEMORY_KEYS=5000000 MAINSTAY_MEMORY_MIB=256` is the
/// long one.
#[test]
fn loading_stays_within_the_budget() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default);
    let (keys, budget) = (number("MAINSTAY_MEMORY_KEYS", 400_000), number("MAINSTAY_MEMORY_MIB", 32) << 20);
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let store =
        Store::builder().memory_bytes(budget).wal_bytes(64 << 20).open(folder.path()).expect("a store can be made");
    let keyspace = store.keyspace("k").expect("a keyspace can be made");
    let mut next = 1_u64;
    for from in (0..keys).step_by(1_000) {
        let mut batch = Batch::new();
        for n in from..(from + 1_000).min(keys) {
            next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            batch.insert(&keyspace, format!("{next:016x}"), format!("{n:0>100}"));
        }
        store.commit(batch).expect("a batch commits");
    }
    let engine = store.status().engine;
    assert_eq!(engine.memory_bytes, budget, "the setting is shown as it was given");
    let (used, countable) = (engine.memory_used_bytes, budget - engine.memory_allocator_bytes);
    assert!(used <= countable && countable < budget, "accounted {used} of {countable} of {budget} bytes");
    assert_eq!(keyspace.iter().count() as u64, keys, "everything is there");
    store.close().expect("closing succeeds");
    let peak = peak_resident_bytes();
    eprintln!("{keys} keys, budget {} MiB, peak resident {} MiB", budget >> 20, peak >> 20);
    let besides = if budget < COVERED_BYTES { BESIDES_BYTES } else { 0 };
    assert!(peak <= budget + besides, "peak resident {peak} bytes with a budget of {budget}");
}
