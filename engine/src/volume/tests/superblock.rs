//! The quorum of copies, crashes in the middle of an update, and what is no volume.

use mainstay_io::sim::{SimMedia, SimOptions};

use super::media::Event;
use super::*;
use crate::volume::inspect::inspect;
use crate::volume::quorum::{choose, row};
use crate::volume::superblock::COPY_STRIDE_BYTES;
use crate::{Engine, ErrorKind};

const COPY: usize = COPY_STRIDE_BYTES as usize;

fn image(media: &MemMedia) -> Vec<u8> {
    media.superblock.state().bytes.clone()
}

fn open_image(image: Vec<u8>) -> Result<(Volume, Superblock)> {
    block_on(Volume::open(MemMedia::from_image(image, EXTENTS_BYTES), &environment()))
}

fn refusal(image: Vec<u8>) -> Error {
    open_image(image).map(|_| ()).expect_err("refused")
}

#[test]
fn a_new_volume_has_ids_and_no_identity() {
    let media = formatted();
    let (volume, found) = open(&media);
    assert_ne!(found.volume, found.incarnation);
    assert_eq!((found.identity, found.epoch, found.wal_start, found.clean_end), ([0; 32], 0, Lsn(0), None));
    assert_eq!((found.sequence, volume.superblock().sequence, volume.superblock().epoch), (1, 2, 1));
    assert_eq!(volume.wal_zone().length(), WAL_BYTES);
}

#[test]
fn every_open_has_an_epoch_of_its_own() {
    let media = formatted();
    for epoch in 1..5 {
        assert_eq!(open(&media).0.superblock().epoch, epoch);
    }
}

#[test]
fn an_update_is_found_again() {
    let media = formatted();
    let (volume, _) = open(&media);
    let root = Root { extents: vec![Extent { first_unit: 3, units: 2 }], bytes: 70_000, checksum: 99 };
    let want = root.clone();
    block_on(volume.update(move |sb| {
        sb.identity = [7; 32];
        sb.wal_start = Lsn(8192);
        sb.clean_end = Some(Lsn(12_288));
        sb.root = Some(root);
    }))
    .expect("is made durable");
    let (_, found) = open(&media);
    assert_eq!((found.identity, found.wal_start, found.clean_end), ([7; 32], Lsn(8192), Some(Lsn(12_288))));
    assert_eq!(found.root, Some(want));
}

/// The states in which a crash can leave one write of a copy: not begun, torn at a sector, done.
fn torn(old: &[u8], new: &[u8]) -> Vec<Vec<u8>> {
    [0, 512, 1024, 2048, 4096 - 512, 4096]
        .map(|cut| new[..cut].iter().chain(&old[cut..]).copied().collect())
        .into_iter()
        .collect()
}

#[test]
fn a_crash_at_any_write_of_an_update_leaves_the_old_or_the_new_superblock() {
    let media = formatted();
    let (volume, _) = open(&media);
    let before = image(&media);
    let old = volume.superblock();
    media.superblock.state().events.clear();
    block_on(volume.update(|sb| sb.identity = [9; 32])).expect("is made durable");
    let new = volume.superblock();
    let events = media.superblock.state().events.clone();
    let writes: Vec<(usize, Vec<u8>)> = events
        .into_iter()
        .map(|event| match event {
            Event::Write { offset, data, mode } => {
                assert_eq!(mode, WriteMode::Durable);
                (offset as usize, data)
            }
            other => panic!("an update only writes: {other:?}"),
        })
        .collect();
    assert_eq!(writes.iter().map(|w| w.0 / COPY).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let mut outcomes = (0, 0);
    for pair in [0, 2] {
        let mut image = before.clone();
        for (offset, data) in &writes[..pair] {
            image[*offset..offset + 4096].copy_from_slice(data);
        }
        let states = |i: usize| torn(&image[writes[i].0..writes[i].0 + 4096], &writes[i].1);
        for first in states(pair) {
            for second in states(pair + 1) {
                let mut image = image.clone();
                image[writes[pair].0..writes[pair].0 + 4096].copy_from_slice(&first);
                image[writes[pair + 1].0..writes[pair + 1].0 + 4096].copy_from_slice(&second);
                let report = block_on(inspect(&*MemMedia::from_image(image.clone(), EXTENTS_BYTES))).expect("readable");
                let torn = [(0, &first), (1, &second)].into_iter().filter(|(i, state)| {
                    let states = states(pair + i);
                    Some(*state) != states.first() && Some(*state) != states.last()
                });
                assert_eq!(report.differ - report.cut_short, torn.count(), "what is whole is no damage");
                let (volume, found) = open_image(image).expect("opens after a crash");
                assert!(found == old || found == new, "{found:?}");
                assert!(pair == 0 || found == new, "the first pair was durable");
                assert_eq!(volume.superblock().epoch, found.epoch + 1);
                if found == old { outcomes.0 += 1 } else { outcomes.1 += 1 }
            }
        }
    }
    assert!(outcomes.0 > 0 && outcomes.1 > 0, "{outcomes:?}");
}

#[test]
fn a_crash_while_copies_are_mended_loses_nothing() {
    let media = formatted();
    let (volume, _) = open(&media);
    let old = image(&media);
    block_on(volume.update(|sb| sb.identity = [9; 32])).expect("is made durable");
    let new = image(&media);
    // The crash came before the second copy, and one old copy is damaged besides: row G.
    let mut start = old.clone();
    start[..4096].copy_from_slice(&new[..4096]);
    start[COPY..COPY + 4096].copy_from_slice(&torn(&old[COPY..COPY + 4096], &new[COPY..COPY + 4096])[2]);
    start[2 * COPY + 100] ^= 1;
    let mended = MemMedia::from_image(start.clone(), EXTENTS_BYTES);
    let (_, found) = open(&mended);
    assert_eq!(found.identity, [9; 32]);
    let events = mended.superblock.state().events.clone();
    let mut image = start;
    for event in events {
        let Event::Write { offset, data, .. } = event else { continue };
        let at = offset as usize;
        for state in torn(&image[at..at + 4096], &data) {
            let mut image = image.clone();
            image[at..at + 4096].copy_from_slice(&state);
            let (_, found) = open_image(image).expect("opens after a crash in the middle of mending");
            assert_eq!(found.identity, [9; 32]);
        }
        image[at..at + 4096].copy_from_slice(&data);
    }
}

#[test]
fn any_two_copies_are_enough_and_the_others_are_written_again() {
    let media = formatted();
    let (_, _) = open(&media);
    let good = image(&media);
    for a in 0..4 {
        for b in a + 1..4 {
            let mut image = good.clone();
            image[a * COPY + 300] ^= 0x10;
            image[b * COPY] ^= 1;
            let media = MemMedia::from_image(image, EXTENTS_BYTES);
            let report = block_on(inspect(&*media)).expect("two are enough");
            assert_eq!((report.differ, report.cut_short, report.superblock.epoch), (2, 0, 1));
            open(&media);
            assert_eq!(block_on(inspect(&*media)).expect("all are whole").differ, 0);
        }
    }
}

#[test]
fn a_copy_that_cannot_be_read_counts_as_damaged() {
    let media = formatted();
    media.superblock.state().unreadable = Some(COPY as u64);
    open(&media);
}

/// What a device does not give now is not lost: nobody is told to throw the volume away.
#[test]
fn copies_that_cannot_be_read_are_no_corruption() {
    let sim = SimMedia::new(SimOptions { capacity: 1 << 30, ..SimOptions::default() });
    let format = || block_on(Engine::format(sim.open().expect("free"), &Environment::system(), 8 << 20, false));
    format().expect("formats");
    for copy in 0..3 {
        sim.superblock_disk().damage(copy * COPY as u64, 4096);
    }
    let look = || block_on(inspect(&*sim.open().expect("free")));
    let refused = look().expect_err("one copy is not enough");
    assert_eq!(refused.kind(), ErrorKind::Io, "{refused}");
    sim.superblock_disk().damage(3 * COPY as u64, 4096);
    assert_eq!(look().expect_err("nor none").kind(), ErrorKind::Io);
    sim.superblock_disk().heal();
    assert_eq!(look().expect("they are there").differ, 0);
}

#[test]
fn one_whole_copy_is_not_enough() {
    let media = formatted();
    let (_, _) = open(&media);
    let mut image = image(&media);
    for copy in [0, 1, 3] {
        image[copy * COPY + 60] ^= 1;
    }
    assert_eq!(refusal(image.clone()).kind(), ErrorKind::Corrupt);
    image[2 * COPY + 60] ^= 1;
    assert_eq!(refusal(image).kind(), ErrorKind::Corrupt);
}

/// A misdirected write put copy 0 over copy 1. The checksum is bound to the place, so it does not count as two.
#[test]
fn a_copy_at_the_place_of_another_one_does_not_count() {
    let media = formatted();
    let mut image = image(&media);
    let copy = image[..4096].to_vec();
    image[COPY..COPY + 4096].copy_from_slice(&copy);
    image[2 * COPY] ^= 1;
    image[3 * COPY] ^= 1;
    assert_eq!(refusal(image).kind(), ErrorKind::Corrupt);
}

#[test]
fn what_is_no_volume_says_how_to_make_one() {
    let blank = refusal(vec![0; SUPERBLOCK_ZONE_BYTES as usize]);
    assert_eq!(blank.kind(), ErrorKind::Foreign);
    assert!(blank.to_string().contains("mainstay format"), "{blank}");
    assert_eq!(refusal(vec![0xAB; SUPERBLOCK_ZONE_BYTES as usize]).kind(), ErrorKind::Foreign);
}

#[test]
fn a_newer_format_names_both_versions() {
    let media = formatted();
    let mut image = image(&media);
    let block = &mut image[2 * COPY..2 * COPY + 4096];
    block[8] = 7;
    let checksum = crc_fast::crc64_nvme(&block[..4088]) ^ 2;
    block[4088..].copy_from_slice(&checksum.to_le_bytes());
    let error = refusal(image);
    assert_eq!(error.kind(), ErrorKind::Foreign);
    assert!(error.to_string().contains("version=7 supported=2"), "{error}");
}

#[test]
fn a_format_that_was_cut_short_is_no_volume() {
    let media = formatted();
    let whole = image(&media);
    let mut image = vec![0; whole.len()];
    image[..4096].copy_from_slice(&whole[..4096]);
    let error = refusal(image);
    assert_eq!(error.kind(), ErrorKind::Foreign);
    assert!(error.to_string().contains("--force"), "{error}");
}

#[test]
fn a_target_that_holds_data_is_formatted_only_by_force() {
    let media = formatted();
    let (_, first) = open(&media);
    let again = |force| block_on(Volume::format(&*media, &environment_of_another_seed(), WAL_BYTES, force));
    assert_eq!(again(false).expect_err("refused").kind(), ErrorKind::Invalid);
    assert_eq!(open(&media).1.volume, first.volume);
    again(true).expect("by force");
    let (_, second) = open(&media);
    assert_ne!(second.volume, first.volume);
    assert_ne!(second.incarnation, first.incarnation);
    assert_eq!(second.sequence, 1);
}

fn environment_of_another_seed() -> Environment {
    let environment = environment();
    let _ = (environment.random.id(), environment.random.id());
    environment
}

#[test]
fn sizes_that_cannot_be_are_invalid() {
    let media = MemMedia::new(EXTENTS_BYTES);
    for wal_bytes in [0, 4096, (64 << 10) + 1] {
        let error = block_on(Volume::format(&*media, &environment(), wal_bytes, false)).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{wal_bytes}");
    }
    let small = MemMedia::new(4 * EXTENT_UNIT_BYTES as usize);
    let error = block_on(Volume::format(&*small, &environment(), WAL_BYTES, false)).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_failed_superblock_write_is_final() {
    let media = formatted();
    let (volume, _) = open(&media);
    media.superblock.state().writes_fail = true;
    assert_eq!(block_on(volume.update(|sb| sb.identity = [1; 32])).expect_err("fails").kind(), ErrorKind::Io);
    media.superblock.state().writes_fail = false;
    assert_eq!(block_on(volume.update(|_| ())).expect_err("for good").kind(), ErrorKind::Closed);
    assert_eq!(volume.superblock().identity, [0; 32]);
}

/// What a volume says of itself in the first copy: its version.
fn version(media: &MemMedia) -> u16 {
    let image = image(media);
    u16::from_le_bytes([image[8], image[9]])
}

/// The version is what keeps a build that knows no notes from opening the volume, and then only while there are some.
#[test]
fn notes_are_found_again_until_they_are_forgotten() {
    let media = formatted();
    let (volume, _) = open(&media);
    assert_eq!(version(&media), 1);
    for (group, note) in [(9, "nine"), (1, "one"), (u64::MAX, "last"), (9, "again")] {
        block_on(volume.put_note(group, note.into())).expect("is made durable");
    }
    let (volume, found) = open(&media);
    let notes: Vec<(u64, Bytes)> = found.notes.into_iter().collect();
    assert_eq!(notes, [(1, "one".into()), (9, "again".into()), (u64::MAX, "last".into())]);
    assert_eq!((version(&media), volume.note(9)), (2, Some("again".into())));
    volume.forget_note(9);
    volume.forget_note(9);
    volume.forget_note(7);
    assert_eq!(open(&media).1.notes.len(), 3, "not before the next update");
    let (volume, _) = open(&media);
    [1, 9, u64::MAX].iter().for_each(|group| volume.forget_note(*group));
    // What is put anew stays, whenever the earlier one was forgotten.
    block_on(volume.put_note(9, "anew".into())).expect("is made durable");
    let (volume, found) = open(&media);
    assert_eq!(found.notes, [(9, Bytes::from("anew"))].into());
    volume.forget_note(9);
    block_on(volume.update(|_| ())).expect("is made durable");
    assert_eq!((version(&media), volume.note(9)), (1, None));
    assert!(open(&media).1.notes.is_empty());
}

#[test]
fn notes_that_do_not_fit_change_nothing() {
    let media = formatted();
    let (volume, _) = open(&media);
    block_on(volume.put_note(1, "one".into())).expect("is made durable");
    let long = block_on(volume.put_note(2, vec![7; NOTE_BYTES_MAX + 1].into())).expect_err("too long");
    assert_eq!(long.kind(), ErrorKind::OutOfSpace);
    volume.forget_note(1);
    let full = (100..).find_map(|group| block_on(volume.put_note(group, vec![7; NOTE_BYTES_MAX].into())).err());
    assert_eq!(full.map(|error| error.kind()), Some(ErrorKind::OutOfSpace));
    let notes = volume.superblock().notes;
    assert_eq!(notes.len(), NOTES_BYTES_MAX / (NOTE_BYTES_MAX + 2));
    assert_eq!(open(&media).1.notes, notes);
    // The votes of all groups of a process, each with as many bytes as one has after years.
    let media = formatted();
    let (volume, _) = open(&media);
    (1..=129).for_each(|group| block_on(volume.put_note(group, vec![7; 11].into())).expect("there is room"));
    assert_eq!(open(&media).1.notes.len(), 129);
}

#[test]
fn a_root_of_too_many_extents_changes_nothing() {
    let media = formatted();
    let (volume, _) = open(&media);
    let before = volume.superblock();
    let extents = vec![Extent { first_unit: 0, units: 1 }; ROOT_EXTENTS_MAX + 1];
    let root = Root { extents, bytes: 1, checksum: 0 };
    let error = block_on(volume.update(move |sb| sb.root = Some(root))).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    block_on(volume.update(|_| ())).expect("goes on");
    assert_eq!(volume.superblock().sequence, before.sequence + 1);
}

/// All states of all copies: each lands in one row, and what is taken is never older than an acknowledged content.
#[test]
fn every_mixture_of_copies_has_a_row() {
    let first = Superblock {
        volume: [1; 16],
        incarnation: [2; 16],
        identity: [0; 32],
        sequence: 1,
        parent: 0,
        wal_bytes: WAL_BYTES,
        epoch: 0,
        wal_start: Lsn(0),
        clean_end: None,
        closed: false,
        root: None,
        notes: BTreeMap::new(),
    };
    let after =
        |sb: &Superblock, epoch| Superblock { sequence: sb.sequence + 1, parent: sb.checksum(), epoch, ..sb.clone() };
    let second = after(&first, 1);
    let third = after(&second, 2);
    let rival = after(&first, 9);
    let whole = |sb: &Superblock| Copy::Whole(Box::new(sb.clone()), sb.checksum());
    let states = [
        Copy::Blank,
        Copy::NoMagic,
        Copy::Damaged,
        Copy::Unreadable,
        Copy::Newer(3),
        whole(&first),
        whole(&second),
        whole(&third),
        whole(&rival),
    ];
    let mut rows = std::collections::BTreeMap::<char, usize>::new();
    for index in 0..states.len().pow(4) {
        let pick = |place: u32| states[index / states.len().pow(place) % states.len()].clone();
        let copies = [pick(0), pick(1), pick(2), pick(3)];
        let (letter, verdict) = choose(&copies);
        *rows.entry(letter).or_default() += 1;
        let count = |sb: &Superblock| copies.iter().filter(|c| **c == whole(sb)).count();
        if let Verdict::Take(taken) = &verdict {
            assert!(count(taken) >= 2 || letter == 'G', "{letter} {copies:?}");
            let newer = [&second, &third, &rival].into_iter().filter(|sb| sb.sequence > taken.sequence);
            assert!(newer.map(count).sum::<usize>() <= 1, "a quorum was passed over: {letter} {copies:?}");
        }
        match verdict {
            Verdict::Take(_) => assert!("DFG".contains(letter)),
            Verdict::NotAVolume => assert_eq!(letter, 'C'),
            Verdict::FormatCutShort => assert_eq!(letter, 'H'),
            Verdict::NewerFormat(version) => assert_eq!((letter, version), ('A', 3)),
            Verdict::Corrupt(_) => assert!("BEI".contains(letter)),
        }
    }
    assert_eq!(rows.keys().collect::<String>(), "ABCDEFGHI");
    let _ = row;
}
