//! The hot pieces one by one: checksum, memtable, filter, block, table, scan, batch of the log.
//!
//! `cargo bench --bench pieces` in this folder; a word after `--` picks those whose name contains it. The keys scatter, and
//! their beginnings are alike, as keys of applications are.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mainstay_engine::hooks::bench::{DataBlock, Filter, Memtable, Packing, Table, checksum};
use mainstay_io::block_on;
use mainstay_wal::hooks::bench::encode;
use mainstay_wal::{GroupId, Record, RecordKind};

const KEYS: u64 = 200_000;
const VALUE: [u8; 100] = [7; 100];

/// A bijection that scatters (the finaliser of SplitMix64).
fn scatter(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn key(at: u64) -> Vec<u8> {
    format!("user/{:016x}", scatter(at)).into_bytes()
}

/// Walks `0..KEYS` in an order that no cache likes.
fn walk<'a>(keys: &'a [Vec<u8>]) -> impl FnMut() -> &'a [u8] + 'a {
    let mut at = 0u64;
    move || {
        at += 1;
        &keys[(scatter(at) % keys.len() as u64) as usize]
    }
}

fn checksums(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for bytes in [256usize, 4 << 10, 16 << 10] {
        let data = vec![3u8; bytes];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(format!("{bytes}"), |b| b.iter(|| checksum(black_box(&data))));
    }
}

fn memtables(c: &mut Criterion) {
    let mut group = c.benchmark_group("memtable");
    group.throughput(Throughput::Elements(1));
    let value = Bytes::from_static(&VALUE);
    let keys: Vec<Vec<u8>> = (0..KEYS).map(key).collect();
    let full = || {
        let memtable = Memtable::new();
        for (at, key) in keys.iter().enumerate() {
            memtable.insert(key, at as u64 + 1, &value);
        }
        memtable
    };
    group.bench_function("insert_scattered", |b| {
        let (mut memtable, mut at) = (full(), KEYS);
        b.iter(|| {
            // Between one and two times KEYS, so that the depth is that of a memtable in use.
            if at == 2 * KEYS {
                (memtable, at) = (full(), KEYS);
            }
            at += 1;
            memtable.insert(&key(at), at, &value);
        });
    });
    group.bench_function("insert_ascending", |b| {
        let (memtable, mut at) = (Memtable::new(), 0);
        b.iter(|| {
            at += 1;
            memtable.insert(format!("user/{at:016x}").as_bytes(), at, &value);
        });
    });
    let memtable = full();
    group.bench_function("get", |b| {
        let mut next = walk(&keys);
        b.iter(|| black_box(memtable.get(next())));
    });
    group.throughput(Throughput::Elements(KEYS));
    group.sample_size(20);
    group.bench_function("scan", |b| b.iter(|| memtable.scan(false)));
    group.bench_function("scan_back", |b| b.iter(|| memtable.scan(true)));
    group.bench_function("flush", |b| b.iter(|| block_on(memtable.flush()).expect("in memory")));
}

fn tables(c: &mut Criterion) {
    let mut keys: Vec<Vec<u8>> = (0..KEYS).map(key).collect();
    keys.sort();
    let values: Vec<Vec<u8>> =
        (0..KEYS).map(|at| format!("{:020}-field;", scatter(at)).repeat(4).into_bytes()).collect();
    let pairs = || keys.iter().zip(&values).map(|(key, value)| (key.as_slice(), value.as_slice()));

    let mut group = c.benchmark_group("block");
    group.throughput(Throughput::Elements(1));
    let block = DataBlock::new(pairs()).expect("a block of one's own");
    group.bench_function("get", |b| {
        let mut next = walk(&keys[..100]);
        b.iter(|| black_box(block.get(next())));
    });
    group.finish();

    let mut group = c.benchmark_group("table");
    let table = Table::new(pairs(), Packing::Lz4, 1 << 30).expect("in memory");
    group.throughput(Throughput::Elements(1));
    group.bench_function("get_cached", |b| {
        let mut next = walk(&keys);
        b.iter(|| block_on(table.get(next())).expect("in memory"));
    });
    group.bench_function("get_hot", |b| {
        let mut next = walk(&keys[..100]);
        b.iter(|| block_on(table.get(next())).expect("in memory"));
    });
    let absent: Vec<Vec<u8>> = keys.iter().map(|key| [key.as_slice(), b"?"].concat()).collect();
    group.bench_function("get_absent", |b| {
        let mut next = walk(&absent);
        b.iter(|| block_on(table.get(next())).expect("in memory"));
    });
    let cold = table.reopen(2 << 20).expect("in memory");
    group.bench_function("get_decompressed", |b| {
        let mut next = walk(&keys);
        b.iter(|| block_on(cold.get(next())).expect("in memory"));
    });
    let zstd = Table::new(pairs(), Packing::Zstd, 2 << 20).expect("in memory");
    group.bench_function("get_decompressed_zstd", |b| {
        let mut next = walk(&keys);
        b.iter(|| block_on(zstd.get(next())).expect("in memory"));
    });
    group.sample_size(20);
    group.throughput(Throughput::Elements(KEYS));
    for (name, packing) in [("raw", Packing::Raw), ("lz4", Packing::Lz4), ("zstd", Packing::Zstd)] {
        let build = || Table::new(pairs(), packing, 1 << 20).expect("in memory").bytes();
        group.bench_function(format!("build_{name}"), |b| b.iter(build));
    }
    group.bench_function("scan", |b| b.iter(|| block_on(Table::scan(&[&table], &[], false)).expect("in memory")));
    group.bench_function("scan_back", |b| b.iter(|| block_on(Table::scan(&[&table], &[], true)).expect("in memory")));
    group.bench_function("scan_uncached", |b| {
        b.iter_batched_ref(
            || table.reopen(1 << 30).expect("in memory"),
            |table| block_on(Table::scan(&[table], &[], false)).expect("in memory"),
            BatchSize::PerIteration,
        );
    });
    let memtable = Memtable::new();
    for (at, key) in keys.iter().step_by(5).enumerate() {
        memtable.insert(key, at as u64 + 2, &Bytes::from_static(&VALUE));
    }
    group.bench_function("scan_merged", |b| {
        b.iter(|| block_on(Table::scan(&[&table, &cold], &[&memtable], false)).expect("in memory"));
    });
    group.bench_function("verify", |b| b.iter(|| block_on(table.verify()).expect("whole")));
}

fn filters(c: &mut Criterion) {
    let mut group = c.benchmark_group("filter");
    group.throughput(Throughput::Elements(1));
    let keys: Vec<Vec<u8>> = (0..1 << 16).map(key).collect();
    let absent: Vec<Vec<u8>> = (1 << 16..1 << 17).map(key).collect();
    for bits in [8u8, 12, 16] {
        let filter = Filter::new(keys.iter().map(Vec::as_slice), bits).expect("a partition of one's own");
        group.bench_function(format!("absent_{bits}"), |b| {
            let mut next = walk(&absent);
            b.iter(|| black_box(filter.may_contain(next())));
        });
    }
}

fn log(c: &mut Criterion) {
    let mut group = c.benchmark_group("wal");
    for records in [1usize, 64] {
        let record = |_| Record {
            group: GroupId(1),
            kind: RecordKind(RecordKind::OWNER_FIRST),
            payload: vec![Bytes::from_static(&[1; 18]), Bytes::from_static(&[2; 256])],
        };
        let records: Vec<Record> = (0..records).map(record).collect();
        group.throughput(Throughput::Elements(records.len() as u64));
        group.bench_function(format!("encode_{}", records.len()), |b| b.iter(|| encode(black_box(&records))));
    }
}

criterion_group!(pieces, checksums, memtables, filters, tables, log);
criterion_main!(pieces);
