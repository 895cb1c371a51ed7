//! Views over memtables, L0 and levels against an ordered map.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use mainstay_io::block_on;
use proptest::prelude::*;

use super::*;
use crate::LogIndex;
use crate::memtable::Memtable;
use crate::range_tombstone::{KeyRange, RangeTombstone};
use crate::table::tests::{Entries, MemoryBytes, Place, key, options, place};
use crate::table::{Table, TableBuilder, TableOptions};

/// Versions by key, newest last.
type Versions = BTreeMap<Vec<u8>, Vec<(u64, Option<Vec<u8>>)>>;
type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

#[derive(Clone, Debug)]
enum Op {
    /// `None` removes.
    Write(Vec<u8>, Option<Vec<u8>>),
    RemoveRange(KeyRange),
}

#[derive(Clone, Debug)]
struct Layers {
    /// Oldest first: what each generation wrote. The first become levels, then L0 tables, then memtables.
    generations: Vec<Vec<Op>>,
    levels: usize,
    l0: usize,
    options: TableOptions,
}

fn layers() -> impl Strategy<Value = Layers> {
    let range = |(a, b, to_the_end): (Vec<u8>, Vec<u8>, bool)| {
        let (low, high) = (a.clone().min(b.clone()), a.max(b));
        let upper = if to_the_end { Bound::Unbounded } else { Bound::Included(high.into()) };
        Op::RemoveRange(KeyRange::new(Bound::Included(low.into()), upper))
    };
    let value = prop::option::weighted(0.8, prop::collection::vec(any::<u8>(), 0..40));
    let op = prop_oneof![
        30 => (key(), value).prop_map(|(key, value)| Op::Write(key, value)),
        1 => (key(), key(), prop::bool::weighted(0.1)).prop_map(range),
    ];
    (prop::collection::vec(prop::collection::vec(op, 0..120), 1..6), 0usize..3, 0usize..3, options())
        .prop_map(|(generations, levels, l0, options)| Layers { generations, levels, l0, options })
}

fn newest(at: &Versions, limit: u64) -> Entries {
    let mut out = Entries::new();
    for (key, versions) in at {
        if let Some(version) = versions.iter().rev().find(|version| version.0 <= limit) {
            out.insert(key.clone(), version.clone());
        }
    }
    out
}

/// What a memtable holds as tables, cut before every so many entries and range tombstones.
fn tables_of(place: &Place, options: &TableOptions, memtable: &Arc<Memtable>, each: usize) -> Vec<Arc<Table>> {
    let mut input = MergeInput::new(vec![memtable.clone()], Vec::new(), false);
    let mut tables = Vec::new();
    let finish = |builder: TableBuilder| {
        let (chunks, meta) = builder.finish();
        let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.to_vec()).collect();
        let table = place.open(meta, MemoryBytes::new(bytes)).expect("own root");
        block_on(table.verify()).expect("a table just built");
        Arc::new(table)
    };
    block_on(async {
        let mut ranges = input.ranges().await.expect("in memory").into_iter().peekable();
        let (mut open, mut added) = (TableBuilder::new(options.clone()), 0);
        let mut make_room = |open: &mut TableBuilder, next: &[u8], added: &mut usize| {
            if *added >= each && open.may_be_cut(next) {
                *added = 0;
                let rest = open.cut(next);
                tables.push(finish(std::mem::replace(open, TableBuilder::new(options.clone()))));
                rest.into_iter().for_each(|rest| open.add_range(rest));
            }
            *added += 1;
        };
        loop {
            let entry = input.next().await.expect("in memory");
            let begun = |one: &RangeTombstone| entry.is_none_or(|entry| one.range.start().as_ref() <= entry.key);
            while let Some(range) = ranges.next_if(begun) {
                make_room(&mut open, range.range.start(), &mut added);
                open.add_range(range);
            }
            let Some(entry) = entry else { break };
            make_room(&mut open, entry.key, &mut added);
            open.add(entry.key, entry.index, entry.value);
        }
        if added > 0 {
            tables.push(finish(open));
        }
    });
    let apart = |pair: &[Arc<Table>]| pair[0].meta().last < pair[1].meta().first;
    assert!(tables.windows(2).all(apart), "tables of a run do not overlap: {:?}", tables);
    tables
}

/// Builds the view, and the state at every index that the memtables can still show.
fn build(layers: &Layers, place: &Place) -> (Arc<ReadView>, Versions, u64, u64) {
    let mut view = ReadView::default();
    let mut all = Versions::new();
    let mut index = 0;
    let mut flushed = 0;
    for (at, generation) in layers.generations.iter().enumerate() {
        let memtable = Arc::new(Memtable::new(&place.budget));
        for op in generation {
            index += 1;
            match op {
                Op::Write(key, value) => {
                    memtable.insert(key, LogIndex(index), value.clone().map(Bytes::from).as_ref());
                    all.entry(key.clone()).or_default().push((index, value.clone()));
                }
                Op::RemoveRange(range) => {
                    memtable.remove_range(range, LogIndex(index));
                    let covered = all.iter_mut().filter(|(key, _)| range.contains(key));
                    covered.for_each(|(_, versions)| versions.push((index, None)));
                }
            }
        }
        if at < layers.levels {
            // A level of several tables, from the bottom up.
            view.levels.insert(0, tables_of(place, &layers.options, &memtable, 10).into_iter().collect());
            flushed = index;
        } else if at < layers.levels + layers.l0 {
            for table in tables_of(place, &layers.options, &memtable, usize::MAX) {
                view.l0.insert(0, table);
            }
            flushed = index;
        } else {
            view.memtables.insert(0, memtable);
        }
    }
    (Arc::new(view), all, flushed, index)
}

fn state(all: &Versions, at: u64) -> Pairs {
    newest(all, at).into_iter().filter_map(|(key, (_, value))| Some((key, value?))).collect()
}

/// Keeps up to `count` pairs.
fn visitor(pairs: &mut Pairs, count: usize) -> impl FnMut(&[u8], &[u8]) -> ControlFlow<()> + Send {
    let wanted = pairs.len() + count;
    move |key, value| {
        pairs.push((key.to_vec(), value.to_vec()));
        if pairs.len() < wanted { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// Of the pairs from the low end two are visited and one is taken, in turns.
async fn drain(mut scan: ScanCursor, mut back: impl FnMut() -> bool) -> Pairs {
    let (mut front, mut rear) = (Vec::new(), Vec::new());
    loop {
        let reverse = back();
        if !reverse && front.len() % 3 == 0 {
            let given = front.len();
            scan.visit(&mut visitor(&mut front, 2)).await.expect("scan");
            if front.len() < given + 2 {
                break;
            }
            continue;
        }
        let pair = if reverse { scan.next_back().await } else { scan.next().await }.expect("scan");
        match pair {
            Some((key, value)) if reverse => rear.push((key.to_vec(), value.to_vec())),
            Some((key, value)) => front.push((key.to_vec(), value.to_vec())),
            None => break,
        }
    }
    assert!(scan.next().await.expect("scan").is_none() && scan.next_back().await.expect("scan").is_none());
    front.extend(rear.into_iter().rev());
    front
}

fn bound(kind: u8, key: &[u8]) -> Bound<Bytes> {
    match kind % 3 {
        0 => Bound::Unbounded,
        1 => Bound::Included(Bytes::copy_from_slice(key)),
        _ => Bound::Excluded(Bytes::copy_from_slice(key)),
    }
}

fn inside(key: &[u8], lower: &Bound<Bytes>, upper: &Bound<Bytes>) -> bool {
    let low = match lower {
        Bound::Unbounded => true,
        Bound::Included(low) => low.as_ref() <= key,
        Bound::Excluded(low) => low.as_ref() < key,
    };
    low && match upper {
        Bound::Unbounded => true,
        Bound::Included(high) => key <= high.as_ref(),
        Bound::Excluded(high) => key < high.as_ref(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_view_is_what_an_ordered_map_is(
        layers in layers(),
        probes in prop::collection::vec((key(), key(), any::<u8>(), any::<u8>()), 8),
        turns in prop::collection::vec(any::<bool>(), 1..40),
    ) {
        let place = place();
        let (view, all, flushed, last) = build(&layers, &place);
        for level in &view.levels {
            for key in probes.iter().flat_map(|(low, high, ..)| [low, high]).chain(all.keys()) {
                let naive = level.tables.iter().find(|table| table.meta().last.as_ref() >= key.as_slice());
                let found = level.table_of(key);
                assert_eq!(found.map(|table| table.meta()), naive.map(|table| table.meta()), "{key:?}");
            }
        }
        block_on(async {
            for at in [flushed, flushed.midpoint(last), last, u64::MAX] {
                let pairs = state(&all, at);
                let mut turn = turns.iter().cycle();
                for back in 0..3 {
                    let scan = view.scan(Bound::Unbounded, Bound::Unbounded, LogIndex(at));
                    let found = drain(scan, || match back {
                        0 => false,
                        1 => true,
                        _ => *turn.next().expect("a cycle"),
                    })
                    .await;
                    assert_eq!(found, pairs, "at={at} back={back}");
                }
                for (low, high, kind_low, kind_high) in &probes {
                    let (lower, upper) = (bound(*kind_low, low), bound(*kind_high, high));
                    let expected: Pairs =
                        pairs.iter().filter(|pair| inside(&pair.0, &lower, &upper)).cloned().collect();
                    let mut turn = turns.iter().cycle();
                    let scan = view.scan(lower.clone(), upper.clone(), LogIndex(at));
                    let found = drain(scan, || *turn.next().expect("a cycle")).await;
                    assert_eq!(found, expected, "at={at} lower={lower:?} upper={upper:?}");
                    // A seek from anywhere moves up and never down.
                    let mut scan = view.scan(lower.clone(), upper.clone(), LogIndex(at));
                    let given = turns.len() % 3;
                    for _ in 0..given {
                        scan.next().await.expect("scan");
                    }
                    scan.seek(high).await.expect("seek");
                    let rest: Pairs =
                        expected.iter().skip(given).filter(|pair| pair.0 >= *high).cloned().collect();
                    assert_eq!(drain(scan, || false).await, rest, "at={at} seek={high:?}");
                    let value = pairs.iter().find(|pair| &pair.0 == low).map(|pair| pair.1.clone());
                    let found = view.get(low, LogIndex(at)).await.expect("get");
                    assert_eq!(found.map(|value| value.to_vec()), value, "at={at} key={low:?}");
                }
                let keys: Vec<&Vec<u8>> = probes.iter().map(|probe| &probe.0).chain(all.keys().step_by(3)).collect();
                let many = view.get_many(&keys, LogIndex(at)).await.expect("get");
                for (key, found) in keys.into_iter().zip(many) {
                    assert_eq!(found, view.get_version(key, LogIndex(at)).await.expect("get"), "at={at} key={key:?}");
                }
                for key in all.keys().step_by(5) {
                    let value = pairs.iter().find(|pair| &pair.0 == key).map(|pair| pair.1.clone());
                    let found = view.get(key, LogIndex(at)).await.expect("get");
                    assert_eq!(found.map(|value| value.to_vec()), value, "at={at} key={key:?}");
                }
            }
        });
    }

    #[test]
    fn a_merge_gives_the_newest_of_each_key(layers in layers(), drop_tombstones in any::<bool>()) {
        let place = place();
        let (view, all, _, last) = build(&layers, &place);
        let mut tables: Vec<Arc<Table>> = view.levels.iter().flat_map(|level| level.tables.iter().cloned()).collect();
        tables.extend(view.l0.iter().cloned());
        let mut input = MergeInput::new(view.memtables.clone(), tables, drop_tombstones);
        let (ranges, found) = block_on(async {
            let (ranges, mut found) = (input.ranges().await.expect("merge"), Entries::new());
            while let Some(entry) = input.next().await.expect("merge") {
                found.insert(entry.key.to_vec(), (entry.index.0, entry.value.map(<[u8]>::to_vec)));
            }
            (ranges, found)
        });
        let live = |(key, (_, value)): (&Vec<u8>, &(u64, Option<Vec<u8>>))| Some((key.clone(), value.clone()?));
        assert_eq!(found.iter().filter_map(live).collect::<Pairs>(), state(&all, last));
        let tombstones = found.values().filter(|(_, value)| value.is_none()).count();
        assert!(!drop_tombstones || (ranges.is_empty() && tombstones == 0));
        // Every removal goes on to the output, as one of a key or within a range, and none twice.
        let removed = newest(&all, u64::MAX).into_iter().filter(|(_, (_, value))| value.is_none());
        for (key, (index, _)) in removed.filter(|_| !drop_tombstones) {
            let by_range = ranges.iter().find(|one| one.range.contains(&key)).map_or(0, |one| one.index.0);
            let by_key = found.get(&key).map_or(0, |(index, _)| *index);
            assert_eq!(by_range.max(by_key), index, "{key:?}");
            assert!(by_key == 0 || by_range < by_key, "{key:?} is removed twice");
        }
    }

    /// Every future of the scan is dropped at its first wait and asked again.
    #[test]
    fn a_dropped_scan_step_loses_nothing(layers in layers(), turns in prop::collection::vec(any::<bool>(), 1..40)) {
        let place = place();
        let (view, all, _, last) = build(&layers, &place);
        let pairs = state(&all, last);
        let mut scan = view.scan(Bound::Unbounded, Bound::Unbounded, LogIndex(last));
        let (mut front, mut rear) = (Vec::new(), Vec::new());
        let mut context = Context::from_waker(Waker::noop());
        for reverse in turns.iter().cycle() {
            if !*reverse && front.len() % 2 == 1 {
                let given = front.len();
                crate::table::tests::stall_next(1);
                let first = std::pin::pin!(scan.visit(&mut visitor(&mut front, 2))).as_mut().poll(&mut context);
                crate::table::tests::stall_next(0);
                let visited = match first {
                    Poll::Ready(visited) => visited,
                    Poll::Pending => block_on(scan.visit(&mut visitor(&mut front, 1))),
                };
                visited.expect("scan");
                if front.len() == given {
                    break;
                }
                continue;
            }
            crate::table::tests::stall_next(1);
            let first = if *reverse {
                std::pin::pin!(scan.next_back()).as_mut().poll(&mut context)
            } else {
                std::pin::pin!(scan.next()).as_mut().poll(&mut context)
            };
            crate::table::tests::stall_next(0);
            let pair = match first {
                Poll::Ready(pair) => pair,
                Poll::Pending if *reverse => block_on(scan.next_back()),
                Poll::Pending => block_on(scan.next()),
            };
            match pair.expect("scan") {
                Some((key, value)) if *reverse => rear.push((key.to_vec(), value.to_vec())),
                Some((key, value)) => front.push((key.to_vec(), value.to_vec())),
                None => break,
            }
        }
        front.extend(rear.into_iter().rev());
        assert_eq!(front, pairs);
    }
}

/// A range over most of a large table, removed in memory: neither end of a scan reads what it covers, nor does a lookup.
#[test]
fn what_a_range_hides_is_passed_over_unread() {
    let place = place();
    let (keys, key) = (5000, |at: u32| format!("key{at:06}").into_bytes());
    let entries: Entries = (0..keys).map(|at| (key(at), (1, Some(vec![at as u8; 50])))).collect();
    let options = TableOptions { block_bytes: 512, ..TableOptions::default() };
    let (bytes, meta) = crate::table::tests::build(&options, &entries);
    let bytes = MemoryBytes::new(bytes);
    let below = MemoryBytes::new({
        let (bytes, _) = crate::table::tests::build(&options, &entries);
        bytes
    });
    let table = Arc::new(place.open(meta.clone(), bytes.clone()).expect("own root"));
    let below_table = Arc::new(place.open(meta, below.clone()).expect("own root"));
    let memtable = Arc::new(Memtable::new(&place.budget));
    let removed = KeyRange::new(Bound::Included(key(100).into()), Bound::Excluded(key(keys - 100).into()));
    memtable.remove_range(&removed, LogIndex(2));
    memtable.insert(&key(2500), LogIndex(3), Some(&Bytes::from_static(b"later")));
    let view = Arc::new(ReadView {
        memtables: vec![memtable],
        l0: vec![table],
        levels: vec![[below_table].into_iter().collect()],
        operator: None,
        expires: false,
    });
    block_on(async {
        for reverse in [false, true] {
            let scan = view.scan(Bound::Unbounded, Bound::Unbounded, LogIndex(3));
            assert_eq!(drain(scan, || reverse).await.len(), 201, "reverse={reverse}");
        }
        let reads = [&bytes, &below].map(|bytes| bytes.reads.load(std::sync::atomic::Ordering::Relaxed));
        assert!(reads.iter().all(|reads| *reads < 30), "{reads:?} of some 600 blocks each");
        assert_eq!(view.get(&key(1000), LogIndex(3)).await.expect("get"), None);
        assert!(view.get(&key(1000), LogIndex(1)).await.expect("get").is_some(), "a reader from before finds it");
        let scan = view.scan(Bound::Unbounded, Bound::Unbounded, LogIndex(1));
        assert_eq!(drain(scan, || false).await.len(), keys as usize);
        // A scan that ends within goes no further than that, though nothing of it is live.
        let before = bytes.reads.load(std::sync::atomic::Ordering::Relaxed);
        let scan = view.scan(Bound::Included(key(200).into()), Bound::Excluded(key(300).into()), LogIndex(3));
        assert!(drain(scan, || false).await.is_empty());
        assert!(bytes.reads.load(std::sync::atomic::Ordering::Relaxed) - before < 10);
    });
}
