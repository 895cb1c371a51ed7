//! The fragmenter against a list that is searched from its end, sets of ranges against sets of keys, and tables of cases.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn range(start: &str, end: &str) -> KeyRange {
    KeyRange::from_parts(
        Bytes::copy_from_slice(start.as_bytes()),
        (!end.is_empty()).then(|| Bytes::copy_from_slice(end.as_bytes())),
    )
}

fn told(fragments: &Fragments) -> String {
    let one = |one: &RangeTombstone| format!("{:?}@{}", one.range, one.index);
    fragments.iter().map(one).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_fragmenter_follows_its_table_of_cases() {
    let check = |given: &[(&str, &str, u64)], expect: &str| {
        let tombstone = |&(start, end, index): &(&str, &str, u64)| RangeTombstone {
            range: range(start, end),
            index: LogIndex(index),
        };
        let mut list: Vec<_> = given.iter().map(tombstone).collect();
        assert_eq!(told(&fragment(list.clone())), expect, "{given:?}");
        list.reverse();
        assert_eq!(told(&fragment(list)), expect, "{given:?} from behind");
    };
    check(&[], "");
    check(&[("a", "c", 1)], "[a, c)@1");
    check(&[("a", "c", 1), ("d", "e", 2)], "[a, c)@1 [d, e)@2");
    // Neighbours of one index are one, of two indexes they are two.
    check(&[("a", "c", 1), ("c", "e", 1)], "[a, e)@1");
    check(&[("a", "c", 1), ("c", "e", 2)], "[a, c)@1 [c, e)@2");
    // The newer one over the older one, and the other way round.
    check(&[("a", "m", 1), ("f", "z", 2)], "[a, f)@1 [f, z)@2");
    check(&[("a", "m", 2), ("f", "z", 1)], "[a, m)@2 [m, z)@1");
    // One inside of another.
    check(&[("a", "z", 1), ("f", "m", 2)], "[a, f)@1 [f, m)@2 [m, z)@1");
    check(&[("a", "z", 2), ("f", "m", 1)], "[a, z)@2");
    check(
        &[("a", "z", 1), ("b", "c", 3), ("b", "d", 2), ("e", "f", 3)],
        "[a, b)@1 [b, c)@3 [c, d)@2 [d, e)@1 [e, f)@3 [f, z)@1",
    );
    // The same keys twice.
    check(&[("a", "c", 1), ("a", "c", 2)], "[a, c)@2");
    // Without an end.
    check(&[("a", "", 1), ("f", "m", 2)], "[a, f)@1 [f, m)@2 [m, )@1");
    check(&[("a", "", 1), ("f", "", 2)], "[a, f)@1 [f, )@2");
}

#[test]
fn bounds_become_the_places_that_they_mean() {
    let key = |key: &'static str| Bytes::from_static(key.as_bytes());
    let check = |lower, upper, expect: &str| assert_eq!(format!("{:?}", KeyRange::new(lower, upper)), expect);
    check(Bound::Included(key("a")), Bound::Excluded(key("c")), "[a, c)");
    check(Bound::Excluded(key("a")), Bound::Included(key("c")), "[a\\x00, c\\x00)");
    check(Bound::Unbounded, Bound::Unbounded, "[\\x00, )");
    check(Bound::Included(key("")), Bound::Excluded(key("c")), "[\\x00, c)");
    let all = KeyRange::new(Bound::Unbounded, Bound::Unbounded);
    assert!(all.contains(&last_key()) && all.contains(b"\0") && all.end().is_none());
    assert_eq!((last_before(&no_end()), all.bytes()), (last_key(), 1));
    assert_eq!((last_before(&key("b\0")), last_before(&key("b"))), (key("b"), key("b")));
}

/// A bound of the longest length stands behind a key and nowhere else: what comes of it as a first or last key is one.
#[test]
fn the_longest_bounds_are_behind_a_key() {
    let longest = |last: u8| Bytes::from([&[7; KEY_BYTES_MAX][..], &[last]].concat());
    for last in [0, 1, 255] {
        let range = KeyRange::from_parts("a".into(), Some(longest(last)));
        assert_eq!((range.end(), last_before(range.end_place()).len()), (Some(&longest(0)), KEY_BYTES_MAX));
        assert_eq!(*KeyRange::from_parts(longest(last), None).start(), longest(0));
    }
    let beyond = KeyRange::new(Bound::Unbounded, Bound::Included(last_key()));
    assert!(beyond.contains(&last_key()) && beyond.end().is_some());
}

#[test]
fn ranges_without_a_key_are_refused() {
    let longest = Bytes::from(vec![7; BOUND_BYTES_MAX]);
    let long = Bytes::from(vec![7; BOUND_BYTES_MAX + 1]);
    assert!(range("a", "b").check().is_ok() && range("a", "").check().is_ok());
    assert!(KeyRange::from_parts(longest.clone(), None).check().is_ok());
    let refused = [range("b", "b"), range("c", "b"), KeyRange::new(Bound::Unbounded, Bound::Excluded(Bytes::new()))];
    for range in
        refused.into_iter().chain([KeyRange::from_parts(long.clone(), None), KeyRange::from_parts(longest, Some(long))])
    {
        assert_eq!(range.check().expect_err("no key is in it").kind(), ErrorKind::Invalid);
    }
}

fn small() -> impl Strategy<Value = KeyRange> {
    (0u8..40, 1u8..20, any::<bool>()).prop_map(|(from, length, ends)| {
        KeyRange::from_parts(
            Bytes::from(vec![from]),
            (ends || length > 4).then(|| Bytes::from(vec![from.saturating_add(length)])),
        )
    })
}

proptest! {
    #[test]
    fn fragments_hide_what_was_given(given in prop::collection::vec((small(), 1u64..30), 0..40), turn in any::<prop::sample::Index>()) {
        let tombstone = |(range, index): &(KeyRange, u64)| RangeTombstone { range: range.clone(), index: LogIndex(*index) };
        let mut list: Vec<_> = given.iter().map(tombstone).collect();
        let fragments = fragment(list.clone());
        for key in 0u8..64 {
            let expect = given.iter().filter(|(range, _)| range.contains(&[key])).map(|(_, index)| *index).max();
            prop_assert_eq!(fragments.at(&[key]).map(|one| one.index.0), expect, "key={}", key);
            for at in [0, 10, 29] {
                let cover = fragments.cover(&[key], LogIndex(at));
                prop_assert!(cover.contains(&[key]));
                prop_assert_eq!(cover.index.0, expect.filter(|index| *index <= at).unwrap_or(0));
            }
        }
        prop_assert!(Fragments::new(fragments.clone().into_list()).is_some(), "in order and without overlap");
        let apart = |pair: &[RangeTombstone]| pair[0].range.end != pair[1].range.start || pair[0].index != pair[1].index;
        prop_assert!(fragments.clone().into_list().windows(2).all(apart), "neighbours are joined");
        // Whatever the order, and whatever was made fragments before.
        if !list.is_empty() {
            let middle = turn.index(list.len());
            list.rotate_left(middle);
            let parts = list.split_at(middle);
            let again = [fragment(parts.0.to_vec()).into_list(), fragment(parts.1.to_vec()).into_list()].concat();
            prop_assert_eq!(fragment(again), fragments.clone());
        }
        for (range, _) in &given {
            prop_assert!(fragments.hide(range));
        }
        if let Some((range, _)) = given.first() {
            let others = fragment(given.iter().skip(1).filter(|(other, _)| !other.contains(range.start())).map(tombstone).collect());
            prop_assert!(!others.hide(range));
        }
    }

    #[test]
    fn a_set_of_ranges_is_a_set_of_keys(given in prop::collection::vec(small(), 0..30)) {
        let mut set = RangeSet::default();
        given.iter().for_each(|range| set.add(range));
        let all: Vec<_> = set.iter().collect();
        prop_assert!(all.windows(2).all(|pair| pair[0].end < pair[1].start), "joined where they touch: {:?}", all);
        for key in 0u8..64 {
            let within = given.iter().any(|range| range.contains(&[key]));
            prop_assert_eq!(set.at(&[key]).is_some(), within);
        }
    }

    /// Every mutation one after the other, against what is left when ranges go first.
    #[test]
    fn folded_mutations_do_what_they_did_in_order(ops in prop::collection::vec((0u32..2, small(), any::<Option<bool>>()), 0..40)) {
        let op = |(keyspace, range, kind): (u32, KeyRange, Option<bool>)| {
            let (keyspace, key) = (KeyspaceId(keyspace), range.start().clone());
            match kind {
                None => WriteOp::DeleteRange { keyspace, range },
                Some(true) => WriteOp::Put { keyspace, key, value: Bytes::new() },
                Some(false) => WriteOp::Delete { keyspace, key },
            }
        };
        let ops: Vec<_> = ops.into_iter().map(op).collect();
        let everything = || (0..2).flat_map(|keyspace| (0u8..64).map(move |key| (KeyspaceId(keyspace), Bytes::from(vec![key]))));
        let play = |ops: &[WriteOp]| {
            let mut live: BTreeSet<(KeyspaceId, Bytes)> = everything().collect();
            for op in ops {
                match op {
                    WriteOp::Put { keyspace, key, .. } | WriteOp::PutFor { keyspace, key, .. } => drop(live.insert((*keyspace, key.clone()))),
                    WriteOp::Delete { keyspace, key } => drop(live.remove(&(*keyspace, key.clone()))),
                    WriteOp::Merge { .. } => unreachable!("none was given"),
                    WriteOp::DeleteRange { keyspace, range } => {
                        live.retain(|(at, key)| at != keyspace || !range.contains(key));
                    }
                }
            }
            live
        };
        let folded = fold(&ops);
        prop_assert_eq!(play(&folded), play(&ops));
        let last_range = folded.iter().rposition(|op| matches!(op, WriteOp::DeleteRange { .. }));
        let first_other = folded.iter().position(|op| !matches!(op, WriteOp::DeleteRange { .. }));
        prop_assert!(last_range.is_none() || first_other.is_none() || last_range < first_other, "ranges go first");
    }
}
