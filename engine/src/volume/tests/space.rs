//! Extents: reserving, taking, freeing, and when freed space comes back.

use proptest::prelude::*;

use super::media::Event;
use super::*;
use crate::volume::free_map::FreeMap;

fn aligned(bytes: &[u8]) -> AlignedBytes {
    AlignedBuf::copy_from(bytes).freeze()
}

fn total(space: &SpaceStats) -> u64 {
    space.free_bytes + space.reserved_bytes + space.live_bytes + space.parked_bytes + space.leaving_bytes
}

#[test]
fn what_is_written_over_many_extents_is_read_back_from_any_offset() {
    let (_, volume) = ready_volume();
    let extents =
        [Extent { first_unit: 9, units: 1 }, Extent { first_unit: 2, units: 2 }, Extent { first_unit: 20, units: 1 }];
    let data: Vec<u8> = (0..4 * EXTENT_UNIT_BYTES).map(|i| ((i * 7) ^ (i >> 9)) as u8).collect();
    let bufs = [&data[..4096], &data[4096..200_704], &data[200_704..]].map(aligned).to_vec();
    block_on(volume.write(&extents, 0, bufs)).expect("writes");
    block_on(volume.flush()).expect("flushes");
    for (offset, length) in [(0, 10), (65_000, 2000), (4095, 2), (0, data.len()), (262_143, 1), (131_072, 0)] {
        let read = block_on(volume.read(&extents, offset, length, IoClass::Foreground)).expect("reads");
        assert_eq!(read, data[offset as usize..offset as usize + length], "{offset} {length}");
    }
    let over = block_on(volume.read(&extents, 262_100, 100, IoClass::Foreground)).expect_err("ends there");
    assert_eq!(over.kind(), ErrorKind::Corrupt);
    assert!(block_on(volume.write(&extents, 4 * EXTENT_UNIT_BYTES, vec![aligned(&[1])])).is_err());
    assert!(block_on(volume.read(&extents, u64::MAX - 5, 100, IoClass::Foreground)).is_err());
}

#[test]
fn a_reservation_is_backed_and_what_is_left_of_it_goes_back() {
    let (media, volume) = ready_volume();
    let before = volume.space();
    let mut reservation = block_on(volume.reserve(5 * EXTENT_UNIT_BYTES - 1)).expect("there is room");
    assert_eq!(media.extents.state().events, [Event::Allocate { offset: 0, length: 5 * EXTENT_UNIT_BYTES }]);
    let taken = reservation.take(2 * EXTENT_UNIT_BYTES).expect("is inside");
    assert_eq!(taken, [Extent { first_unit: 0, units: 2 }]);
    assert_eq!(reservation.take(4 * EXTENT_UNIT_BYTES).expect_err("only three are left").kind(), ErrorKind::Internal);
    assert_eq!((reservation.bytes(), volume.live_bytes()), (3 * EXTENT_UNIT_BYTES, 2 * EXTENT_UNIT_BYTES));
    drop(reservation);
    let after = volume.space();
    assert_eq!(after.free_bytes, before.free_bytes - 2 * EXTENT_UNIT_BYTES);
    assert_eq!((after.reserved_bytes, after.leaving_bytes), (0, 0));
    let discard = Event::Discard { offset: 2 * EXTENT_UNIT_BYTES, length: 3 * EXTENT_UNIT_BYTES };
    assert_eq!(media.extents.state().events.last(), Some(&discard));
}

#[test]
fn a_full_volume_and_a_full_file_system_are_out_of_space_and_lose_nothing() {
    let (media, volume) = ready_volume();
    let before = volume.space();
    let full = block_on(volume.reserve(65 * EXTENT_UNIT_BYTES)).expect_err("64 there are");
    assert_eq!(full.kind(), ErrorKind::OutOfSpace);
    assert_eq!(block_on(volume.reserve(u64::MAX)).expect_err("far too much").kind(), ErrorKind::OutOfSpace);
    media.extents.state().allocatable = Some(3 * EXTENT_UNIT_BYTES);
    let full = block_on(volume.reserve(4 * EXTENT_UNIT_BYTES)).expect_err("the file system has three");
    assert_eq!(full.kind(), ErrorKind::OutOfSpace);
    assert_eq!(volume.space(), before);
    block_on(volume.reserve(3 * EXTENT_UNIT_BYTES)).expect("three go");
}

/// Invariant 3 of the volume: the update must have begun after the space was freed.
#[test]
fn freed_space_is_reused_and_discarded_only_after_the_next_superblock() {
    let (media, volume) = ready_volume();
    let mut reservation = block_on(volume.reserve(64 * EXTENT_UNIT_BYTES)).expect("all of it");
    let extents = reservation.take(64 * EXTENT_UNIT_BYTES).expect("all of it");
    volume.free(extents.clone());
    assert_eq!(block_on(volume.reserve(1)).expect_err("still named").kind(), ErrorKind::OutOfSpace);
    assert_eq!(volume.space().parked_bytes, 64 * EXTENT_UNIT_BYTES);
    // Freed while the update runs: the superblock that it writes may name them still.
    let other = volume.clone();
    let mut second = None;
    let slot = &mut second;
    block_on(volume.update(|_| ())).expect("is made durable");
    assert!(media.extents.state().events.contains(&Event::Discard { offset: 0, length: 64 * EXTENT_UNIT_BYTES }));
    let mut again = block_on(volume.reserve(EXTENT_UNIT_BYTES)).expect("reusable");
    *slot = Some(again.take(EXTENT_UNIT_BYTES).expect("is inside"));
    let late = second.expect("taken");
    let freed = late.clone();
    block_on(volume.update(move |_| other.free(late))).expect("is made durable");
    assert_eq!(volume.space().parked_bytes, EXTENT_UNIT_BYTES, "freed after the update began");
    block_on(volume.update(|_| ())).expect("is made durable");
    assert_eq!(volume.space().parked_bytes, 0);
    assert_eq!(freed.len(), 1);
}

#[test]
fn nothing_is_discarded_when_the_superblock_fails() {
    let (media, volume) = ready_volume();
    let extents =
        block_on(volume.reserve(EXTENT_UNIT_BYTES)).expect("there is room").take(EXTENT_UNIT_BYTES).expect("is inside");
    volume.free(extents);
    media.superblock.state().writes_fail = true;
    block_on(volume.update(|_| ())).expect_err("fails");
    assert_eq!(volume.space().parked_bytes, EXTENT_UNIT_BYTES);
    assert!(!media.extents.state().events.iter().any(|e| matches!(e, Event::Discard { .. })));
}

#[test]
fn the_root_is_live_and_the_one_that_it_replaces_goes_back() {
    let (media, volume) = ready_volume();
    let mut reservation = block_on(volume.reserve(2 * EXTENT_UNIT_BYTES)).expect("there is room");
    let root = |extents| Root { extents, bytes: 10, checksum: 1 };
    let first = root(reservation.take(EXTENT_UNIT_BYTES).expect("is inside"));
    let second = root(reservation.take(EXTENT_UNIT_BYTES).expect("is inside"));
    block_on(volume.update(move |sb| sb.root = Some(first))).expect("is made durable");
    assert_eq!(volume.live_bytes(), 2 * EXTENT_UNIT_BYTES);
    block_on(volume.update(move |sb| sb.root = Some(second))).expect("is made durable");
    assert_eq!(volume.live_bytes(), EXTENT_UNIT_BYTES);
    drop(reservation);
    let (volume, _) = open(&media);
    volume.set_live([]).expect("nothing overlaps");
    assert_eq!(volume.live_bytes(), EXTENT_UNIT_BYTES);
}

#[test]
fn extents_named_twice_or_outside_are_corrupt() {
    for live in [
        vec![Extent { first_unit: 1, units: 4 }, Extent { first_unit: 4, units: 1 }],
        vec![Extent { first_unit: 60, units: 5 }],
        vec![Extent { first_unit: u32::MAX, units: 2 }],
        vec![Extent { first_unit: 5, units: 0 }],
    ] {
        let (volume, _) = open(&formatted());
        assert_eq!(volume.set_live(live.clone()).expect_err("refused").kind(), ErrorKind::Corrupt, "{live:?}");
    }
}

proptest! {
    /// The free map against a vector of booleans.
    #[test]
    fn the_free_map_is_a_set_of_units(steps in prop::collection::vec((any::<bool>(), 1_u32..12, 1_usize..5, any::<prop::sample::Index>()), 1..200)) {
        let mut map = FreeMap::new(64);
        let mut free = [true; 64];
        let mut taken: Vec<Extent> = Vec::new();
        for (take, units, extents_max, which) in steps {
            if take {
                match map.take(units, extents_max) {
                    Some(extents) => {
                        prop_assert_eq!(extents.iter().map(|e| e.units).sum::<u32>(), units);
                        prop_assert!(extents.len() <= extents_max);
                        for unit in extents.iter().flat_map(|e| e.first_unit..e.first_unit + e.units) {
                            prop_assert!(std::mem::replace(&mut free[unit as usize], false));
                        }
                        taken.extend(extents);
                    }
                    None => {
                        let mut runs: Vec<u32> = map.runs().iter().map(|r| r.units).collect();
                        runs.sort_by_key(|r| std::cmp::Reverse(*r));
                        prop_assert!(runs.iter().take(extents_max).sum::<u32>() < units);
                    }
                }
            } else if !taken.is_empty() {
                let extent = taken.swap_remove(which.index(taken.len()));
                free[extent.first_unit as usize..(extent.first_unit + extent.units) as usize].fill(true);
                map.put(extent);
            }
            let runs: Vec<u32> = map.runs().iter().flat_map(|r| r.first_unit..r.first_unit + r.units).collect();
            let model: Vec<u32> = (0..64).filter(|&u| free[u as usize]).collect();
            prop_assert_eq!(runs, model);
            prop_assert!(map.runs().windows(2).all(|w| w[0].first_unit + w[0].units < w[1].first_unit), "neighbours are joined");
            prop_assert_eq!(map.free_bytes(), free.iter().filter(|f| **f).count() as u64 * EXTENT_UNIT_BYTES);
        }
    }

    /// Whatever is reserved, taken, dropped and freed: no unit is lost, none is in two states, and after the next open
    /// the map derived from what is live is the same.
    #[test]
    fn space_is_neither_lost_nor_doubled(steps in prop::collection::vec((0_u8..4, 1_u64..9), 1..60)) {
        let (media, volume) = ready_volume();
        let mut live: Vec<Vec<Extent>> = Vec::new();
        for (step, units) in steps {
            match step {
                0 => {
                    if let Ok(mut reservation) = block_on(volume.reserve(units * EXTENT_UNIT_BYTES)) {
                        live.push(reservation.take((units / 2 + 1) * EXTENT_UNIT_BYTES).expect("is inside"));
                    }
                }
                1 if !live.is_empty() => volume.free(live.swap_remove(units as usize % live.len())),
                2 => block_on(volume.update(|_| ())).expect("is made durable"),
                _ => drop(block_on(volume.reserve(units * EXTENT_UNIT_BYTES))),
            }
            let space = volume.space();
            prop_assert_eq!(total(&space), space.total_bytes);
            prop_assert_eq!(space.live_bytes, live.iter().map(|e| extents_bytes(e)).sum::<u64>());
        }
        block_on(volume.update(|_| ())).expect("is made durable");
        let (reopened, _) = open(&media);
        reopened.set_live(live.into_iter().flatten()).expect("no two overlap");
        prop_assert_eq!(reopened.space(), volume.space());
    }
}
