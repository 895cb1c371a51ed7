//! Tables against an ordered map, against damage, and against what an earlier release wrote.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use mainstay_io::{BLOCK_BYTES, BoxFuture, block_on};
use proptest::prelude::*;

use super::block::{Block, BlockBuilder, BlockCursor, EntryKind};
use super::index::{
    Codec, FEATURE_FILTERS_12, FEATURE_ZSTD, FOOTER_BYTES, FORMAT_VERSION, Handle, MAGIC, ROOT_BYTES, Root, checksum,
    separator,
};
use super::*;
use crate::cache::BlockCache;
use crate::memory::MemoryBudget;
use crate::range_tombstone::{KeyRange, RangeTombstone};
use crate::read::Lookup;
use crate::{ErrorKind, LogIndex};

pub(crate) type Entries = BTreeMap<Vec<u8>, (u64, Option<Vec<u8>>)>;

/// A table in memory that counts its reads.
pub(crate) struct MemoryBytes {
    bytes: Bytes,
    pub(crate) reads: AtomicU64,
}

thread_local! {
    static STALLS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// The next so many reads of this thread never come back.
pub(crate) fn stall_next(reads: u64) {
    STALLS.set(reads);
}

impl MemoryBytes {
    pub(crate) fn new(bytes: impl Into<Bytes>) -> Arc<Self> {
        Arc::new(Self { bytes: bytes.into(), reads: AtomicU64::new(0) })
    }
}

impl TableBytes for MemoryBytes {
    fn read(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let bytes = self.bytes.slice(offset as usize..offset as usize + length);
        let stall = STALLS.get() > 0;
        STALLS.set(STALLS.get().saturating_sub(1));
        Box::pin(async move {
            if stall {
                std::future::pending::<()>().await;
            }
            Ok(bytes)
        })
    }
}

pub(crate) fn build(options: &TableOptions, entries: &Entries) -> (Vec<u8>, TableMeta) {
    let mut builder = TableBuilder::new(options.clone());
    let mut bytes = Vec::new();
    for (key, (index, value)) in entries {
        builder.add(key, LogIndex(*index), value.as_deref());
        for chunk in builder.take_chunks() {
            assert!(chunk.len().is_multiple_of(BLOCK_BYTES));
            bytes.extend_from_slice(&chunk);
        }
    }
    let (chunks, meta) = builder.finish();
    chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
    assert_eq!(bytes.len() as u64, meta.bytes);
    assert!(bytes.len().is_multiple_of(BLOCK_BYTES));
    (bytes, meta)
}

/// The same with range tombstones. What they hide is left out, as a merge leaves it out.
fn build_ranged(options: &TableOptions, entries: &Entries, ranges: &[RangeTombstone]) -> (Vec<u8>, TableMeta) {
    let mut builder = TableBuilder::new(options.clone());
    let mut left = ranges.iter().peekable();
    let hidden = |key: &[u8], index| ranges.iter().any(|one| one.range.contains(key) && index < one.index.0);
    for (key, (index, value)) in entries.iter().filter(|(key, (index, _))| !hidden(key, *index)) {
        while let Some(one) = left.next_if(|one| one.range.start().as_ref() <= key.as_slice()) {
            builder.add_range(one.clone());
        }
        builder.add(key, LogIndex(*index), value.as_deref());
    }
    left.for_each(|one| builder.add_range(one.clone()));
    let (chunks, meta) = builder.finish();
    (chunks.iter().flat_map(|chunk| chunk.to_vec()).collect(), meta)
}

/// From one key up to another, or to the end.
fn removed(start: &str, end: Option<&str>, index: u64) -> RangeTombstone {
    let key = |key: &str| Bytes::copy_from_slice(key.as_bytes());
    RangeTombstone { range: KeyRange::from_parts(key(start), end.map(key)), index: LogIndex(index) }
}

pub(crate) struct Place {
    pub(crate) budget: Arc<MemoryBudget>,
    pub(crate) cache: Arc<BlockCache>,
}

pub(crate) fn place() -> Place {
    let budget = MemoryBudget::new(64 << 20);
    let cache = BlockCache::new(&budget);
    Place { budget, cache }
}

impl Place {
    pub(crate) fn open(&self, meta: TableMeta, bytes: Arc<MemoryBytes>) -> Result<Table> {
        Table::open(meta, bytes, &self.cache, &self.budget)
    }

    pub(crate) fn table(&self, options: &TableOptions, entries: &Entries) -> Arc<Table> {
        let (bytes, meta) = build(options, entries);
        Arc::new(self.open(meta, MemoryBytes::new(bytes)).expect("own root"))
    }
}

/// All there are.
const COMPRESSIONS: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd];

type Found = Vec<(Vec<u8>, u64, Option<Vec<u8>>)>;

async fn drain(table: &Table, cursor: &mut TableCursor) -> Result<Found> {
    let mut out = Vec::new();
    while cursor.valid() {
        out.push((cursor.key().to_vec(), cursor.index().0, cursor.value().map(|value| value.to_vec())));
        cursor.advance(table).await?;
    }
    Ok(out)
}

fn flat<'a>(entries: impl Iterator<Item = (&'a Vec<u8>, &'a (u64, Option<Vec<u8>>))>) -> Found {
    entries.map(|(key, (index, value))| (key.clone(), *index, value.clone())).collect()
}

fn check(options: &TableOptions, entries: &Entries, probes: &[Vec<u8>]) {
    let place = place();
    let table = place.table(options, entries);
    block_on(async {
        table.verify().await.expect("a table just built");
        let all = flat(entries.iter());
        for bypass in [false, true] {
            let mut cursor = if bypass { TableCursor::new_bypass(&table) } else { TableCursor::new(false) };
            cursor.seek_start(&table).await.expect("seek");
            assert_eq!(drain(&table, &mut cursor).await.expect("scan"), all);
        }
        let mut cursor = TableCursor::new(true);
        cursor.seek_start(&table).await.expect("seek");
        assert_eq!(drain(&table, &mut cursor).await.expect("scan"), all.iter().rev().cloned().collect::<Vec<_>>());
        for probe in probes.iter().chain(entries.keys()) {
            for at in [0, 500, u64::MAX] {
                let expected = entries.get(probe).filter(|entry| entry.0 <= at).map(|entry| match &entry.1 {
                    Some(value) => Lookup::Value(value.clone().into()),
                    None => Lookup::Deleted,
                });
                assert_eq!(table.get(probe, LogIndex(at)).await.expect("get"), expected, "key={probe:?} at={at}");
            }
        }
        for probe in probes.iter().chain(entries.keys().step_by(7)) {
            let mut cursor = TableCursor::new(false);
            let mut back = TableCursor::new(true);
            for exclusive in [false, true] {
                let from = |key: &Vec<u8>| if exclusive { key > probe } else { key >= probe };
                let to = |key: &Vec<u8>| if exclusive { key < probe } else { key <= probe };
                cursor.seek(&table, probe, exclusive).await.expect("seek");
                let found = drain(&table, &mut cursor).await.expect("scan");
                assert_eq!(found, flat(entries.iter().filter(|entry| from(entry.0))), "{probe:?} {exclusive}");
                back.seek(&table, probe, exclusive).await.expect("seek");
                let found = drain(&table, &mut back).await.expect("scan");
                assert_eq!(found, flat(entries.iter().rev().filter(|entry| to(entry.0))), "{probe:?} {exclusive}");
            }
        }
    });
}

pub(crate) fn key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (0u16..400).prop_map(|key| format!("key{key:05}").into_bytes()),
        prop::collection::vec(0u8..3, 1..8),
        prop::collection::vec(any::<u8>(), 1..40),
    ]
}

fn value() -> impl Strategy<Value = Option<Vec<u8>>> {
    prop_oneof![
        1 => Just(None),
        4 => prop::collection::vec(any::<u8>(), 0..60).prop_map(Some),
        2 => (0u8..3, 0usize..400).prop_map(|(byte, length)| Some(vec![byte; length])),
    ]
}

pub(crate) fn options() -> impl Strategy<Value = TableOptions> {
    let compression = prop::sample::select(&COMPRESSIONS[..]);
    (prop_oneof![Just(64usize), Just(256), Just(16 << 10)], compression, prop::sample::select(&[0u8, 8, 12, 16][..]))
        .prop_map(|(block_bytes, compression, filter_bits)| TableOptions {
            block_bytes,
            compression,
            filter_bits,
            ..TableOptions::default()
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_table_is_what_an_ordered_map_is(
        options in options(),
        entries in prop::collection::btree_map(key(), (1u64..1000, value()), 1..300),
        probes in prop::collection::vec(key(), 12),
    ) {
        check(&options, &entries, &probes);
    }

    #[test]
    fn a_block_is_what_an_ordered_map_is(
        entries in prop::collection::btree_map(key(), (any::<u64>(), value()), 1..100),
        probes in prop::collection::vec(key(), 20),
        interval in 1usize..20,
    ) {
        let mut builder = BlockBuilder::new(interval);
        for (key, (index, value)) in &entries {
            let kind = if value.is_some() { EntryKind::Value } else { EntryKind::Tombstone };
            builder.add(key, kind, LogIndex(*index), value.as_deref().unwrap_or_default());
        }
        let length = builder.len();
        let bytes = builder.finish();
        prop_assert_eq!(bytes.len(), length);
        let block = Block::parse(bytes.into()).expect("own block");
        for probe in probes.iter().chain(entries.keys()) {
            let found = block.search(probe).expect("own block");
            let expected = entries.range(probe.clone()..).next();
            prop_assert_eq!(found.as_ref().map(|found| found.index.0), expected.map(|entry| entry.1.0));
            prop_assert_eq!(found.is_some_and(|found| found.exact), entries.contains_key(probe));
            let mut ceiling = BlockCursor::new(block.clone(), true);
            ceiling.seek_ceiling(probe).expect("own block");
            let expected = expected.or(entries.iter().next_back()).expect("not empty").0;
            prop_assert_eq!(ceiling.key(), expected.as_slice());
            ceiling.advance().expect("own block");
            let before = entries.range(..expected.clone()).next_back();
            prop_assert_eq!(ceiling.valid().then(|| ceiling.key()), before.map(|entry| entry.0.as_slice()));
        }
    }

    #[test]
    fn a_separator_separates(a in key(), b in key()) {
        prop_assume!(a != b);
        let (last, next) = if a < b { (a, b) } else { (b, a) };
        let separator = separator(&last, &next);
        prop_assert!(last <= separator && separator < next && separator.len() <= last.len());
    }

    #[test]
    fn hostile_blocks_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), probe in key(), frame in any::<bool>()) {
        if frame && bytes.len() > 8 {
            // A frame that holds, so that the entries are reached.
            let at = bytes.len() - 8;
            bytes.splice(at.., [0, 0, 0, 0, 1, 0, 0, 0]);
        }
        fuzzing::block(&bytes, &probe);
    }

    #[test]
    fn hostile_roots_handles_and_filters_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), hash in any::<u64>()) {
        let _ = Root::decode(&bytes);
        let _ = Handle::take(&bytes, 1 << 30);
        if let Ok(filter) = filter::Filter::parse(bytes.into()) {
            let _ = filter.may_contain(hash);
        }
    }

    /// Sealed with a right checksum, so that the decoder is reached: a peer or a broken build could do that.
    #[test]
    fn hostile_packed_blocks_never_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 1..300),
        raw in prop_oneof![any::<u32>(), 1u32..1 << 26],
        framed in any::<bool>(),
    ) {
        if framed {
            // The magic of a zstd frame, so that what follows is decoded.
            bytes.splice(..0, [0x28, 0xb5, 0x2f, 0xfd]);
        }
        let handle = Handle { offset: 0, stored: bytes.len() as u32, raw, checksum: checksum(&bytes) };
        let _ = codec::open(&bytes.into(), &handle);
    }

    /// Blocks that were right once: what the decoders make of them is the block, or an error, or other bytes of its length.
    #[test]
    fn mutated_packed_blocks_never_panic(
        seed in prop::collection::vec(any::<u8>(), 1..40),
        repeat in 2usize..200,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let raw = seed.repeat(repeat);
        for compression in [Compression::Lz4, Compression::Zstd] {
            let mut compressor = codec::Compressor::default();
            let Some((codec, packed)) = compressor.compress(&raw, compression) else { continue };
            let mut bytes = packed.to_vec();
            for (at, value) in &flips {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            bytes.truncate(bytes.len() - cut.index(bytes.len()).min(flips.len()));
            let handle = |bytes: &[u8]| Handle {
                offset: 0,
                stored: bytes.len() as u32,
                raw: Handle::raw_of(codec, raw.len()),
                checksum: checksum(bytes),
            };
            let opened = codec::open(&bytes.clone().into(), &handle(&bytes));
            if flips.is_empty() {
                prop_assert_eq!(opened.expect("as it was compressed"), &raw[..]);
            } else if let Ok(opened) = opened {
                prop_assert_eq!(opened.len(), raw.len());
            }
        }
    }

    /// A table whose middle was made by someone who knows the format: the frame holds and the rest is noise.
    #[test]
    fn mutated_blocks_never_panic(
        entries in prop::collection::btree_map(key(), (any::<u64>(), value()), 1..60),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        probe in key(),
    ) {
        let mut builder = BlockBuilder::new(4);
        for (key, (index, value)) in &entries {
            builder.add(key, EntryKind::Value, LogIndex(*index), value.as_deref().unwrap_or_default());
        }
        let mut bytes = builder.finish();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        fuzzing::block(&bytes, &probe);
    }
}

/// Three levels of blocks, several filter partitions, chunks, keys with long common prefixes.
#[test]
fn a_large_table_is_whole() {
    let entries: Entries = (0..150_000u64)
        .map(|at| {
            (format!("common/prefix/{:012}", at * 3).into_bytes(), (at + 1, (at % 50 != 0).then(|| vec![at as u8; 20])))
        })
        .collect();
    let place = place();
    let options = TableOptions { block_bytes: 1 << 10, compression: Compression::None, ..TableOptions::default() };
    let table = place.table(&options, &entries);
    block_on(async {
        table.verify().await.expect("a table just built");
        assert_eq!(table.levels(), 2);
        for at in (0..150_000u64).step_by(97) {
            let key = format!("common/prefix/{:012}", at * 3);
            let found = table.get(key.as_bytes(), LogIndex(u64::MAX)).await.expect("get");
            assert_eq!(found.is_some_and(|found| found == Lookup::Deleted), at % 50 == 0, "key={key}");
            let absent = format!("common/prefix/{:012}", at * 3 + 1);
            assert_eq!(table.get(absent.as_bytes(), LogIndex(u64::MAX)).await.expect("get"), None);
            let mut back = TableCursor::new(true);
            back.seek(&table, absent.as_bytes(), false).await.expect("seek");
            assert_eq!(back.key(), key.as_bytes());
        }
    });
}

#[test]
fn a_value_of_the_largest_size_comes_back_in_one_block() {
    let value: Vec<u8> = (0..16u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let key = vec![7; 64 << 10];
    let entries = Entries::from([(key.clone(), (1, Some(value.clone()))), (vec![8], (2, None))]);
    for compression in COMPRESSIONS {
        let table = place().table(&TableOptions { compression, ..TableOptions::default() }, &entries);
        block_on(async {
            table.verify().await.expect("a table just built");
            assert_eq!(table.get(&key, LogIndex(1)).await.expect("get"), Some(Lookup::Value(value.clone().into())));
        });
    }
}

fn small() -> Entries {
    (0..40u64)
        .map(|at| (format!("key{at:04}").into_bytes(), (at + 1, (at % 5 != 3).then(|| vec![at as u8; 9]))))
        .collect()
}

/// A flipped bit gives `Corrupt` or, where nothing reads it on the way (padding, another block), the right answer; and
/// `verify` finds it in every case. The old wrong result would be another value, or a key that is gone.
#[test]
fn every_flipped_bit_is_found_and_never_read_as_data() {
    // Between, around and behind the entries, and older than all of them.
    let ranges = [removed("a", Some("key"), 7), removed("key0003", Some("key0003\0"), 1), removed("m", None, 9)];
    let plain = COMPRESSIONS.into_iter().map(|compression| (compression, false));
    for (compression, ranged) in plain.chain([(Compression::None, true)]) {
        // zstd makes nothing of a few entries smaller: there blocks are larger.
        let block_bytes = if compression == Compression::Zstd { 512 } else { 128 };
        let options = TableOptions { block_bytes, compression, ..TableOptions::default() };
        let entries = small();
        let (good, meta) = if ranged { build_ranged(&options, &entries, &ranges) } else { build(&options, &entries) };
        let place = place();
        let all = flat(entries.iter());
        let used = good.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
        assert!(used > 0);
        for bit in 0..good.len() * 8 {
            // Padding: one bit in a byte is as good as another.
            if good[bit / 8] == 0 && bit % 8 != 0 {
                continue;
            }
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let table = place.open(meta.clone(), MemoryBytes::new(bad)).expect("the root is in the manifest");
            block_on(async {
                let error = table.verify().await.expect_err("a flipped bit");
                assert_eq!(error.kind(), ErrorKind::Corrupt, "bit={bit}");
                let mut cursor = TableCursor::new(false);
                let scan = match cursor.seek_start(&table).await {
                    Ok(()) => drain(&table, &mut cursor).await,
                    Err(error) => Err(error),
                };
                match scan {
                    Ok(found) => assert_eq!(found, all, "bit={bit}"),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "bit={bit}"),
                }
                match table.hidden_below(b"abc", LogIndex(u64::MAX), None).await {
                    Ok(found) => assert_eq!(found.0, if ranged { 7 } else { 0 }, "bit={bit}"),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "bit={bit}"),
                }
                for (key, (_, value)) in entries.iter().step_by(11) {
                    match table.get(key, LogIndex(u64::MAX)).await {
                        Ok(found) => assert_eq!(
                            found,
                            Some(value.clone().map_or(Lookup::Deleted, |value| Lookup::Value(value.into()))),
                            "bit={bit}"
                        ),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "bit={bit}"),
                    }
                }
            });
        }
    }
}

#[test]
fn every_flipped_bit_of_the_root_is_refused() {
    let (bytes, meta) = build(&TableOptions::default(), &small());
    for bit in 0..ROOT_BYTES * 8 {
        let mut root = meta.root.to_vec();
        root[bit / 8] ^= 1 << (bit % 8);
        let bad = TableMeta { root: root.into(), ..meta.clone() };
        let error = place().open(bad, MemoryBytes::new(bytes.clone())).expect_err("a damaged root");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "bit={bit}");
    }
}

/// Builds from before range tombstones know no feature: theirs is one bit, and only where there are some.
#[test]
fn range_tombstones_are_a_feature_of_the_tables_that_have_them() {
    let features = |meta: &TableMeta| u32::from_le_bytes([4, 5, 6, 7].map(|at| meta.root[at]));
    let options = TableOptions::default();
    assert_eq!(features(&build(&options, &small()).1), 0);
    assert_eq!(features(&build_ranged(&options, &small(), &[]).1), 0);
    let (bytes, meta) = build_ranged(&options, &small(), &[removed("a", Some("b"), 3)]);
    assert_eq!(features(&meta), index::FEATURE_RANGES);
    // The manifest has to say so as well.
    for ranges in [TableRanges::default(), TableRanges { tombstones: 1, spans: vec![removed("a", Some("c"), 0).range] }]
    {
        let table = place().open(TableMeta { ranges, ..meta.clone() }, MemoryBytes::new(bytes.clone()));
        let error = table.and_then(|table| block_on(table.verify())).expect_err("another than the table has");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn a_table_of_range_tombstones_alone_reaches_over_them() {
    let cases: &[(&[RangeTombstone], &[u8], &[u8], u64)] = &[
        (&[removed("b", Some("d"), 5)], b"b", b"d", 1),
        (&[removed("b", Some("d"), 5), removed("d", Some("f\0"), 6)], b"b", b"f", 1),
        (&[removed("b", Some("c"), 5), removed("x", None, 4)], b"b", &crate::range_tombstone::last_key(), 2),
    ];
    for (ranges, first, last, spans) in cases {
        let (bytes, meta) = build_ranged(&TableOptions::default(), &Entries::new(), ranges);
        assert_eq!((meta.first.as_ref(), meta.last.as_ref()), (*first, *last));
        assert_eq!((meta.entries, meta.tombstones), (1, 1), "it says again what the first one says");
        assert_eq!((meta.ranges.tombstones, meta.ranges.spans.len() as u64), (ranges.len() as u64, *spans));
        let table = place().open(meta, MemoryBytes::new(bytes)).expect("own root");
        block_on(async {
            table.verify().await.expect("a table just built");
            assert_eq!(table.ranges().await.expect("read").iter().cloned().collect::<Vec<_>>(), *ranges);
            for (key, at, expect) in
                [("b", 9, 5), ("bz", 9, 5), ("bz", 4, 0), ("a", 9, 0), ("z", 9, ranges[ranges.len() - 1].index.0)]
            {
                let expect = if key == "z" && last.len() == 1 { 0 } else { expect };
                assert_eq!(
                    table.hidden_below(key.as_bytes(), LogIndex(at), None).await.expect("read").0,
                    expect,
                    "{key} at {at}"
                );
            }
        });
    }
}

/// What the manifest keeps of many ranges is bounded, and what it keeps of long ones nothing.
#[test]
fn the_manifest_keeps_few_spans_and_short_ones() {
    let long = "k".repeat(ranges::SPAN_BYTES_MAX);
    let mut all = vec![removed("a", Some(&format!("a{long}")), 1)];
    all.extend((0..100).map(|at| removed(&format!("b{at:03}"), Some(&format!("b{at:03}x")), 2)));
    let (_, meta) = build_ranged(&TableOptions::default(), &Entries::new(), &all);
    assert_eq!((meta.ranges.tombstones, meta.ranges.spans.len()), (101, ranges::SPANS_MAX));
    assert_eq!(meta.ranges.spans[0], all[1].range);
}

/// Cut anywhere, two tables hide what one does, and do not overlap.
#[test]
fn a_range_goes_on_behind_the_last_key_of_the_table_before() {
    let cut = |entries: &[&str], range: RangeTombstone, next: &str| {
        let mut builder = TableBuilder::new(TableOptions::default());
        let mut range = Some(range);
        for key in entries {
            if let Some(range) = range.take_if(|range| range.range.start().as_ref() <= key.as_bytes()) {
                builder.add_range(range);
            }
            builder.add(key.as_bytes(), LogIndex(9), None);
        }
        range.into_iter().for_each(|range| builder.add_range(range));
        let rest = builder.cut(next.as_bytes());
        let meta = builder.finish().1;
        let spans: Vec<_> = meta.ranges.spans.iter().map(|span| format!("{span:?}")).collect();
        (meta.last, spans.concat(), rest.map(|rest| format!("{:?}", rest.range)))
    };
    let told = |last: &'static str, spans: &str, rest: Option<&str>| {
        (Bytes::from(last), spans.to_owned(), rest.map(str::to_owned))
    };
    let range = |start, end| removed(start, Some(end), 3);
    assert_eq!(cut(&["c", "f"], range("a", "m"), "k"), told("f", "[a, f\\x00)", Some("[f\\x00, m)")));
    assert_eq!(cut(&["c", "f"], range("a", "e"), "k"), told("f", "[a, e)", None));
    // It ends where the next one begins: its end is not in it, and the last key of a table is.
    assert_eq!(cut(&["c"], range("a", "k"), "k"), told("c", "[a, c\\x00)", Some("[c\\x00, k)")));
    assert_eq!(cut(&["c"], range("a", "c\0"), "k"), told("c", "[a, c\\x00)", None));
    // Before the first entry there is nothing but itself.
    assert_eq!(cut(&[], range("a", "m"), "k"), told("a", "[a, a\\x00)", Some("[a\\x00, m)")));
}

/// Behind the longest key there is no place to cut a range at. A table was never cut at such ranges, whatever their number, until its
/// block of them was longer than a reader takes.
#[test]
fn ranges_that_begin_behind_the_longest_keys_are_cut_between() {
    let behind_longest = |byte: u8| crate::range_tombstone::behind(&vec![byte; crate::command::KEY_BYTES_MAX]);
    let touching = |at: u8| behind_longest(at + 1);
    let apart = |at: u8| Bytes::copy_from_slice(&[at, 255]);
    for end in [&touching as &dyn Fn(u8) -> Bytes, &apart] {
        let all: Vec<RangeTombstone> = (0..40)
            .map(|at| RangeTombstone {
                range: KeyRange::from_parts(behind_longest(at), Some(end(at))),
                index: LogIndex(1 + u64::from(at % 2)),
            })
            .collect();
        let mut builder = TableBuilder::new(TableOptions::default());
        let mut tables = Vec::new();
        let mut ranges = 0;
        for range in &all {
            if builder.is_full(1 << 30, range.range.start()) {
                assert_eq!(builder.cut(range.range.start()), None, "nothing is left over");
                let full = std::mem::replace(&mut builder, TableBuilder::new(TableOptions::default()));
                tables.push(full.finish().1);
                ranges = 0;
            }
            builder.add_range(range.clone());
            ranges += 1;
            assert!(ranges <= 16, "a table has a MiB of ranges of 64 KiB");
        }
        tables.push(builder.finish().1);
        assert_eq!(tables.iter().map(|meta| meta.ranges.tombstones).sum::<u64>(), 40);
        assert!(tables.iter().zip(tables.iter().skip(1)).all(|(a, b)| a.last < b.first), "no two overlap");
    }
}

#[test]
fn a_newer_format_is_foreign() {
    let (bytes, meta) = build(&TableOptions::default(), &small());
    for (at, value) in [(0usize, FORMAT_VERSION as u8 + 1), (4, 0x40), (7, 0x80)] {
        let mut root = meta.root.to_vec();
        root[at] = value;
        let body = root.len() - 8;
        let sum = checksum(&root[..body]);
        root[body..].copy_from_slice(&sum.to_le_bytes());
        let newer = TableMeta { root: root.into(), ..meta.clone() };
        let error = place().open(newer, MemoryBytes::new(bytes.clone())).expect_err("a newer format");
        assert_eq!(error.kind(), ErrorKind::Foreign, "offset={at}");
    }
}

/// Two blocks of the right form and the right length, each with a checksum that holds somewhere, in each other's place:
/// only a checksum that stands in the referrer tells.
#[test]
fn blocks_in_each_others_place_are_found() {
    let entries: Entries = (0..64u64).map(|at| (at.to_be_bytes().to_vec(), (1, Some(vec![at as u8; 8])))).collect();
    let options =
        TableOptions { block_bytes: 256, compression: Compression::None, filter_bits: 0, ..TableOptions::default() };
    let (good, meta) = build(&options, &entries);
    let place = place();
    let table = place.open(meta.clone(), MemoryBytes::new(good.clone())).expect("own root");
    let (first, second) = block_on(async {
        let mut index = BlockCursor::new(table.top().await.expect("top").clone(), false);
        index.seek_start().expect("own index");
        index.advance().expect("own index");
        let first = table.handle_at(&index).expect("own handle");
        index.advance().expect("own index");
        (first, table.handle_at(&index).expect("own handle"))
    });
    assert_eq!(first.stored, second.stored);
    let mut bad = good.clone();
    let (a, b, length) = (first.offset as usize, second.offset as usize, first.stored as usize);
    bad[a..a + length].copy_from_slice(&good[b..b + length]);
    bad[b..b + length].copy_from_slice(&good[a..a + length]);
    let table = place.open(meta, MemoryBytes::new(bad)).expect("own root");
    let mut cursor = TableCursor::new(false);
    let error = block_on(async {
        cursor.seek_start(&table).await?;
        drain(&table, &mut cursor).await
    })
    .expect_err("swapped blocks");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn equal_input_gives_equal_bytes() {
    let entries: Entries =
        (0..5000u64).map(|at| (at.to_be_bytes().to_vec(), (at, Some(at.to_string().into_bytes())))).collect();
    let (a, meta_a) = build(&TableOptions::default(), &entries);
    let (b, meta_b) = build(&TableOptions::default(), &entries);
    assert_eq!((a, meta_a.clone()), (b, meta_b));
    let mut other = entries;
    other.get_mut(7u64.to_be_bytes().as_slice()).expect("present").0 += 1;
    assert_ne!(build(&TableOptions::default(), &other).1.digest, meta_a.digest);
}

/// What a block is compressed by stands in its handle. So blocks of one table may differ in that, a table says that it needs
/// zstd only where a block is compressed by it, and a build that does not know zstd says `Foreign` and not `Corrupt`.
#[test]
fn blocks_of_a_table_are_compressed_each_in_its_way() {
    let noise = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17).wrapping_mul(at | 1).to_be_bytes();
    let entries: Entries = (0..400u64)
        .map(|at| {
            let value = if at < 200 { (1..9).flat_map(|word| noise(at * 8 + word)).collect() } else { vec![b'v'; 60] };
            (at.to_be_bytes().to_vec(), (at + 1, Some(value)))
        })
        .collect();
    for (compression, codec, features) in [
        (Compression::None, None, 0),
        (Compression::Lz4, Some(Codec::Lz4), FEATURE_FILTERS_12),
        (Compression::Zstd, Some(Codec::Zstd), FEATURE_ZSTD),
    ] {
        let filter_bits = if features == FEATURE_FILTERS_12 { 12 } else { 16 };
        let options = TableOptions { block_bytes: 512, compression, filter_bits, ..TableOptions::default() };
        let (bytes, meta) = build(&options, &entries);
        assert_eq!(Root::decode(&meta.root).expect("own root").features, features);
        let place = place();
        let table = place.open(meta.clone(), MemoryBytes::new(bytes)).expect("own root");
        let found = block_on(async {
            let mut found = Vec::new();
            let mut index = BlockCursor::new(table.top().await.expect("top").clone(), false);
            index.seek_start().expect("own index");
            while index.valid() {
                let handle = table.handle_at(&index).expect("own handle");
                found.push(handle.packed().expect("own handle").map(|(codec, _)| codec));
                index.advance().expect("own index");
            }
            found
        });
        assert!(found.contains(&codec), "{compression:?}");
        assert!(found.contains(&None), "{compression:?}: what saves too little is stored as it is");
        assert!(found.iter().all(|found| *found == codec || found.is_none()), "{compression:?} {found:?}");
        check(&options, &entries, &[vec![1], vec![0; 8], vec![0xff]]);
    }
}

/// zstd keeps tables between the blocks that it compresses: what came before must not show in the bytes (T1, C1).
#[test]
fn what_a_block_is_compressed_to_depends_on_the_block_alone() {
    let block = |seed: u64| -> Vec<u8> {
        (0..900u64).flat_map(|at| format!("{:05}-{}", (at * seed) % 977, at % 7).into_bytes()).collect()
    };
    let mut used = codec::Compressor::default();
    for seed in 1..200 {
        let raw = block(seed);
        let mut fresh = codec::Compressor::default();
        let fresh = fresh.compress(&raw, Compression::Zstd).expect("it saves enough").1.to_vec();
        assert_eq!(used.compress(&raw, Compression::Zstd).expect("it saves enough").1, fresh, "seed={seed}");
    }
}

/// The handle of docs/format.md, byte by byte.
#[test]
fn a_handle_says_what_its_block_is_compressed_by() {
    for (raw, bytes, packed) in [
        (0, vec![0], Ok(None)),
        (300, vec![0xac, 2], Ok(Some((Codec::Lz4, 300)))),
        (1 << 25 | 300, vec![0xac, 0x82, 0x80, 0x10], Ok(Some((Codec::Zstd, 300)))),
        (2 << 25 | 300, vec![0xac, 0x82, 0x80, 0x20], Err(())),
        (7 << 25 | 300, vec![0xac, 0x82, 0x80, 0x70], Err(())),
    ] {
        let mut handle = vec![5, 9];
        handle.extend_from_slice(&bytes);
        handle.extend_from_slice(&7u64.to_le_bytes());
        let taken = Handle::take(&handle, 4096);
        assert_eq!(taken.map(|handle| handle.packed().expect("it was checked")).map_err(|_| ()), packed, "raw={raw}");
        let mut out = Vec::new();
        Handle { offset: 5, stored: 9, raw, checksum: 7 }.put(&mut out);
        assert_eq!(out, handle);
    }
}

/// A reader that has the blocks waits for nothing and reads nothing.
#[test]
fn a_cached_get_is_ready_at_the_first_poll() {
    let entries: Entries = (0..5000u64).map(|at| (at.to_be_bytes().to_vec(), (at, Some(vec![1; 300])))).collect();
    let (bytes, meta) = build(&TableOptions::default(), &entries);
    let bytes = MemoryBytes::new(bytes);
    let place = place();
    let table = place.open(meta, bytes.clone()).expect("own root");
    let key = 77u64.to_be_bytes();
    assert!(block_on(table.get(&key, LogIndex(77))).expect("get").is_some());
    let reads = bytes.reads.load(Ordering::Relaxed);
    let mut get = std::pin::pin!(table.get(&key, LogIndex(77)));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let std::task::Poll::Ready(found) = get.as_mut().poll(&mut context) else { panic!("pending on cached blocks") };
    assert!(found.expect("get").is_some());
    assert_eq!(bytes.reads.load(Ordering::Relaxed), reads);
}

#[test]
fn a_scan_reads_ahead_and_a_merge_input_leaves_the_cache_alone() {
    let entries: Entries = (0..20_000u64)
        .map(|at| {
            (at.to_be_bytes().to_vec(), (at, Some(at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes().repeat(12))))
        })
        .collect();
    let options = TableOptions { compression: Compression::None, ..TableOptions::default() };
    let (bytes, meta) = build(&options, &entries);
    let blocks = bytes.len() as u64 / (16 << 10);
    for (reverse, bypass) in [(false, false), (true, false), (false, true)] {
        let place = place();
        let bytes = MemoryBytes::new(bytes.clone());
        let table = place.open(meta.clone(), bytes.clone()).expect("own root");
        block_on(async {
            let mut cursor = if bypass { TableCursor::new_bypass(&table) } else { TableCursor::new(reverse) };
            cursor.seek_start(&table).await.expect("seek");
            assert_eq!(drain(&table, &mut cursor).await.expect("scan").len(), entries.len());
        });
        let reads = bytes.reads.load(Ordering::Relaxed);
        assert!(reads < blocks / 6, "reads={reads} blocks={blocks} reverse={reverse} bypass={bypass}");
        assert_eq!(place.cache.weight() < 64 << 10, bypass, "reverse={reverse}");
        drop(table);
        assert_eq!(place.budget.used(), place.cache.weight(), "what a table reserved it gave back");
    }
}

/// What was read ahead is held as it is stored, which the budget knows of; only blocks that the walk has entered are decompressed and cached.
#[test]
fn what_is_read_ahead_is_not_decompressed_before_it_is_met() {
    const BLOCK_BYTES: u64 = 16 << 10;
    let entries: Entries = (0..50_000u64).map(|at| (at.to_be_bytes().to_vec(), (at, Some(vec![b'v'; 100])))).collect();
    for compression in [Compression::Lz4, Compression::Zstd] {
        let options = TableOptions { compression, ..TableOptions::default() };
        let (bytes, meta) = build(&options, &entries);
        assert!(bytes.len() < 50_000 * 108 / 6, "it compresses: {}", bytes.len());
        for reverse in [false, true] {
            let place = place();
            let bytes = MemoryBytes::new(bytes.clone());
            let table = place.open(meta.clone(), bytes.clone()).expect("own root");
            block_on(async {
                let mut cursor = TableCursor::new(reverse);
                cursor.seek_start(&table).await.expect("seek");
                // Index blocks, and what is cached beside the bytes of each block.
                let beside = place.cache.weight().saturating_sub(BLOCK_BYTES) + 4 * BLOCK_BYTES;
                let mut passed = 0;
                while cursor.valid() {
                    passed += 108;
                    let cached = place.cache.weight();
                    assert!(
                        cached <= passed + passed / 8 + beside,
                        "cached={cached} passed={passed} reverse={reverse}"
                    );
                    cursor.advance(&table).await.expect("scan");
                }
                assert_eq!(passed, 50_000 * 108);
            });
            let reads = bytes.reads.load(Ordering::Relaxed);
            assert!(reads < 50_000 * 108 / BLOCK_BYTES / 8, "it reads ahead: reads={reads}");
        }
    }
}

#[test]
fn a_dropped_step_is_taken_again() {
    let entries: Entries = (0..2000u64)
        .map(|at| {
            (at.to_be_bytes().to_vec(), (at, Some(at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes().repeat(40))))
        })
        .collect();
    let options = TableOptions { block_bytes: 512, compression: Compression::None, ..TableOptions::default() };
    let (bytes, meta) = build(&options, &entries);
    for reverse in [false, true] {
        let bytes = MemoryBytes::new(bytes.clone());
        let place = place();
        let table = place.open(meta.clone(), bytes.clone()).expect("own root");
        let mut cursor = TableCursor::new(reverse);
        block_on(cursor.seek_start(&table)).expect("seek");
        let mut found = 0;
        let mut dropped = 0;
        while cursor.valid() {
            found += 1;
            stall_next(1);
            {
                let mut step = std::pin::pin!(cursor.advance(&table));
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                let ready = step.as_mut().poll(&mut context).is_ready();
                stall_next(0);
                if ready {
                    continue;
                }
            }
            dropped += 1;
            block_on(cursor.load(&table)).expect("load");
        }
        assert_eq!(found, entries.len(), "reverse={reverse}");
        assert!(dropped > 3, "reverse={reverse} dropped={dropped}");
    }
}

/// docs/format.md owns these numbers.
#[test]
fn the_layout_is_that_of_the_document() {
    let document = include_str!("../../../docs/format.md");
    for line in [
        format!("Format version: {FORMAT_VERSION}"),
        format!("Root: {ROOT_BYTES} bytes"),
        format!("Footer: {FOOTER_BYTES} bytes, magic `{}`", std::str::from_utf8(&MAGIC).expect("ascii")),
        format!("Filter partition: {} keys, header of {} bytes", filter::PARTITION_KEYS, filter::HEADER_BYTES),
        format!(
            "Restart interval: {} entries, {} in an index, or {} bytes, {} in data blocks of groups whose manifest says",
            block::RESTART_INTERVAL,
            block::INDEX_RESTART_INTERVAL,
            block::RESTART_BYTES,
            block::DATA_RESTART_BYTES
        ),
        format!("Largest block: {} bytes", block::BLOCK_BYTES_MAX),
        format!("Index block: cut at {} bytes", builder::INDEX_BLOCK_BYTES),
        format!("| {} | a block is compressed by zstd |", FEATURE_ZSTD.trailing_zeros()),
        format!("| {} | fingerprints of filters have 12 bits |", FEATURE_FILTERS_12.trailing_zeros()),
        format!("| bits of a fingerprint | {:?};", filter::WIDTHS).replace(['[', ']'], ""),
        format!("{} lz4 (block format, no size prefix); {} zstd", Codec::Lz4 as u8, Codec::Zstd as u8),
        format!("| {} | range tombstones, see there |", index::FEATURE_RANGES.trailing_zeros()),
        format!("| {} | merges: operands", index::FEATURE_MERGES.trailing_zeros()),
        format!("{} operand (the value is what", EntryKind::Operand as u8),
        format!("{} failed (no value", EntryKind::Failed as u8),
        format!("at most {} of them", ranges::SPANS_MAX),
        format!("none of more than {} bytes", ranges::SPAN_BYTES_MAX),
    ] {
        assert!(document.contains(&line), "docs/format.md lacks: {line}");
    }
}

/// Operands, and keys of which a merge was refused, among others.
fn build_merges(options: &TableOptions) -> (Vec<u8>, TableMeta) {
    let mut builder = TableBuilder::new(options.clone());
    for at in 0..100u64 {
        let (key, value) = (format!("user/{at:06}/name"), format!("operand {at} ").repeat(3));
        let kinds = [EntryKind::Value, EntryKind::Operand, EntryKind::Tombstone, EntryKind::Operand, EntryKind::Failed];
        let kind = kinds[at as usize % kinds.len()];
        let with_value = matches!(kind, EntryKind::Value | EntryKind::Operand);
        builder.add_entry(key.as_bytes(), LogIndex(at + 1), kind, if with_value { value.as_bytes() } else { b"" });
    }
    let (chunks, meta) = builder.finish();
    (chunks.iter().flat_map(|chunk| chunk.to_vec()).collect(), meta)
}

/// A build from before is told by a feature bit, and both ways of reading give the same.
#[test]
fn a_table_with_merges_says_so_and_gives_each_kind_back() {
    let (bytes, meta) = build_merges(&TableOptions { block_bytes: 512, ..TableOptions::default() });
    assert_eq!(Root::decode(&meta.root).expect("own root").features, index::FEATURE_MERGES);
    assert_eq!((meta.entries, meta.tombstones), (100, 20));
    let table = place().open(meta, MemoryBytes::new(bytes)).expect("own root");
    block_on(async {
        table.verify().await.expect("whole");
        let operand = |at: u64| Bytes::from(format!("operand {at} ").repeat(3));
        for (at, expect) in [
            (0, Lookup::Value(operand(0))),
            (1, Lookup::Operand(operand(1))),
            (2, Lookup::Deleted),
            (94, Lookup::Failed),
            (98, Lookup::Operand(operand(98))),
        ] {
            let key = format!("user/{at:06}/name");
            assert_eq!(table.get(key.as_bytes(), LogIndex(200)).await.expect("read"), Some(expect), "at={at}");
        }
        for reverse in [false, true] {
            let mut cursor = TableCursor::new(reverse);
            cursor.seek_start(&table).await.expect("read");
            let mut kinds = Vec::new();
            while cursor.valid() {
                kinds.push((cursor.kind(), cursor.value().is_some()));
                cursor.advance(&table).await.expect("read");
            }
            if reverse {
                kinds.reverse();
            }
            let count = |kind, value| kinds.iter().filter(|found| **found == (kind, value)).count();
            assert_eq!([count(EntryKind::Value, true), count(EntryKind::Operand, true)], [20, 40]);
            assert_eq!([count(EntryKind::Tombstone, false), count(EntryKind::Failed, false)], [20, 20]);
            assert_eq!(kinds[1], (EntryKind::Operand, true), "reverse={reverse}");
        }
    });
}

/// Tables that earlier builds wrote: a change of any byte here parts replicas of different builds, and old volumes.
/// `MAINSTAY_WRITE_GOLDEN=1` writes those of the present build: docs/testing.md.
#[test]
fn the_tables_in_git_are_read_and_written_again_byte_for_byte() {
    let mut entries: Entries = (0..200u64)
        .map(|at| {
            (
                format!("user/{:06}/name", at * 7).into_bytes(),
                (at + 1, Some(format!("value {at} ").repeat(3).into_bytes())),
            )
        })
        .collect();
    entries.insert(b"user/gone".to_vec(), (900, None));
    for (name, compression, filter_bits, restart_bytes) in [
        ("table-1", Compression::Lz4, 8, 1024),
        ("table-zstd", Compression::Zstd, 8, 256),
        ("table-filter-12", Compression::Lz4, 12, 256),
        ("table-filter-16", Compression::None, 16, 256),
        ("table-merges", Compression::Lz4, 16, 256),
    ] {
        let options = TableOptions { block_bytes: 1024, compression, filter_bits, restart_bytes };
        let (bytes, meta) = if name == "table-merges" { build_merges(&options) } else { build(&options, &entries) };
        let path = format!("{}/testdata/{name}.bin", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("MAINSTAY_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &bytes).expect("write");
        }
        let golden = std::fs::read(&path).expect("it is in git");
        assert!(bytes == golden, "the bytes of {name} have changed");
        let table = place().open(meta, MemoryBytes::new(golden)).expect("own root");
        block_on(table.verify()).expect("whole");
    }
}
