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
use crate::table::tests::{Entries, Place, key, options, place};
use crate::table::{Table, TableOptions};

/// Versions by key, newest last.
type Versions = BTreeMap<Vec<u8>, Vec<(u64, Option<Vec<u8>>)>>;
type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

#[derive(Clone, Debug)]
struct Layers {
    /// Oldest first: what each generation wrote. The first become levels, then L0 tables, then memtables.
    generations: Vec<Vec<(Vec<u8>, Option<Vec<u8>>)>>,
    levels: usize,
    l0: usize,
    options: TableOptions,
}

fn layers() -> impl Strategy<Value = Layers> {
    let op = (key(), prop::option::weighted(0.8, prop::collection::vec(any::<u8>(), 0..40)));
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

/// Builds the view, and the state at every index that the memtables can still show.
fn build(layers: &Layers, place: &Place) -> (Arc<ReadView>, Versions, u64, u64) {
    let mut view = ReadView::default();
    let mut all = Versions::new();
    let mut index = 0;
    let mut flushed = 0;
    for (at, generation) in layers.generations.iter().enumerate() {
        let memtable = Arc::new(Memtable::new(&place.budget));
        let mut own = Versions::new();
        for (key, value) in generation {
            index += 1;
            memtable.insert(key, LogIndex(index), value.clone().map(Bytes::from).as_ref());
            own.entry(key.clone()).or_default().push((index, value.clone()));
            all.entry(key.clone()).or_default().push((index, value.clone()));
        }
        let entries = newest(&own, u64::MAX);
        if at < layers.levels {
            // A level of several tables, from the bottom up.
            let mut tables = Vec::new();
            let entries: Vec<_> = entries.into_iter().collect();
            for part in entries.chunks(10) {
                tables.push(place.table(&layers.options, &part.iter().cloned().collect()));
            }
            view.levels.insert(0, tables.into());
            flushed = index;
        } else if at < layers.levels + layers.l0 {
            if !entries.is_empty() {
                view.l0.insert(0, place.table(&layers.options, &entries));
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
        let (view, all, _, _) = build(&layers, &place);
        let expected: Entries =
            newest(&all, u64::MAX).into_iter().filter(|entry| !drop_tombstones || entry.1.1.is_some()).collect();
        let mut tables: Vec<Arc<Table>> = view.levels.iter().flat_map(|level| level.iter().cloned()).collect();
        tables.extend(view.l0.iter().cloned());
        let mut input = MergeInput::new(view.memtables.clone(), tables, drop_tombstones);
        let found = block_on(async {
            let mut found = Vec::new();
            while let Some(entry) = input.next().await.expect("merge") {
                found.push((entry.key.to_vec(), (entry.index.0, entry.value.map(<[u8]>::to_vec))));
            }
            found
        });
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
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
