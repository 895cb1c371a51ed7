//! Looking at a volume that nobody has open, and finding every flipped bit in it.

use mainstay_io::sim::{SimDisk, SimMedia, SimOptions, SimRandom};
use mainstay_io::{AlignedBuf, Environment, IoClass, WriteMode, block_on};

use super::harness::*;
use crate::{CommandBody, ErrorKind, JobId, MAIN, Offline, TableId, VerifyReport, holds_volume};

/// A volume with tables, a checkpoint and a clone, closed cleanly.
fn volume() -> SimMedia {
    let media = media();
    let store = Store::open(&media);
    for n in 0..600_usize {
        store.put(&format!("key-{n:05}"), &n.to_le_bytes().repeat(10));
    }
    store.must(CommandBody::CreateCheckpoint { name: "before".into(), branch: MAIN });
    store.must(CommandBody::CreateClone { name: "try".into(), checkpoint: "before".into() });
    store.settle();
    store.close();
    media
}

fn look(media: &SimMedia) -> crate::Result<Offline> {
    let opened = media.open().expect("nobody else holds it");
    block_on(Offline::open(opened, &Environment::system()))
}

fn verify(media: &SimMedia) -> VerifyReport {
    block_on(look(media).expect("two copies are enough").verify(&mut |_| ())).expect("all can be read")
}

#[test]
fn a_sound_volume_is_shown_and_verified_and_not_changed() {
    let media = volume();
    let before = media.trace_hash();
    let offline = look(&media).expect("opens");
    let superblock = offline.superblock();
    assert_eq!((superblock.copies.len(), superblock.copies_differ, superblock.epoch), (4, 0, 1));
    assert!(superblock.clean_end.is_some() && superblock.root_bytes.is_some());
    let groups = block_on(offline.manifest()).expect("reads");
    assert_eq!(groups.iter().map(|g| g.group).collect::<Vec<_>>(), [GROUP]);
    let group = &groups[0];
    let sets: Vec<(&str, &str)> = group.sets.iter().map(|s| (s.kind, s.name.as_str())).collect();
    assert_eq!(sets, [("branch", "main"), ("branch", "try"), ("checkpoint", "before")]);
    assert!(group.sets.iter().all(|s| !s.levels.is_empty()));
    let first = &group.tables[0];
    let table = block_on(offline.table(GROUP, first.meta.id)).expect("is sound");
    assert_eq!(table.meta, first.meta);
    let absent = TableId { job: JobId(999_999), ordinal: 0 };
    assert_eq!(block_on(offline.table(GROUP, absent)).expect_err("no such").kind(), ErrorKind::NotFound);
    let mut batches = 0;
    let recovery = block_on(offline.wal(&mut |_| batches += 1)).expect("walks");
    assert_eq!(recovery.batches, batches);
    let report = block_on(offline.verify(&mut |_| ())).expect("all can be read");
    assert_eq!(report.damage, []);
    assert_eq!(report.tables, group.tables.len() as u64);
    assert_eq!(report.table_bytes, group.tables.iter().map(|t| t.meta.bytes).sum::<u64>());
    drop(offline);
    let writes = |disk: &SimDisk| disk.trace().iter().filter(|e| e.kind != mainstay_io::sim::IoKind::Read).count();
    let again = look(&media).expect("opens");
    let counts: Vec<usize> = media.disks().iter().map(writes).collect();
    block_on(again.verify(&mut |_| ())).expect("all can be read");
    assert_eq!(media.disks().iter().map(writes).collect::<Vec<_>>(), counts, "nothing but reads");
    assert_ne!(media.trace_hash(), before);
}

/// Every byte that anything refers to: a flipped bit in it is found and named.
#[test]
fn a_flipped_bit_in_any_part_is_found() {
    let media = volume();
    // Records that are in the log alone: killed, for a clean close would leave none.
    let store = Store::open(&media);
    for n in 0..20 {
        store.put(&format!("late-{n}"), b"in the log");
    }
    drop(store);
    media.kill(1);
    let offline = look(&media).expect("opens");
    let superblock = offline.superblock();
    let groups = block_on(offline.manifest()).expect("reads");
    let mut batches = Vec::new();
    block_on(offline.wal(&mut |batch| batches.push((batch.lsn.0 % WAL_BYTES, batch.bytes)))).expect("walks");
    drop(offline);
    // Behind the last batch nothing says that it was durable: damage of it looks as a torn tail does.
    batches.pop();
    assert!(batches.len() >= 10, "{batches:?}");
    let mut tables: Vec<(u64, u64)> = groups
        .iter()
        .flat_map(|g| &g.tables)
        .map(|t| {
            let [(first, _)] = t.extents[..] else { panic!("a small table lies in one extent") };
            (first * (64 << 10), t.meta.bytes)
        })
        .collect();
    let root_bytes = superblock.root_bytes.expect("pages were written at close");
    tables.push((superblock.root_extents[0].0 * (64 << 10), root_bytes));
    let copies: Vec<(u64, u64)> = (0..4).map(|copy| (copy * (256 << 10), 4096)).collect();
    let random = SimRandom::new(3);
    let parts = [("superblock", copies), ("wal", batches), ("extents", tables)];
    for (disk, (part, ranges)) in media.disks().iter().zip(parts) {
        for _ in 0..60 {
            let (offset, bytes) = ranges[random.below(ranges.len() as u64) as usize];
            let (at, bit) = (offset + random.below(bytes), random.below(8) as u8);
            disk.flip_bit(at, bit);
            let report = verify(&media);
            assert!(!report.damage.is_empty(), "{part}: bit {bit} of byte {at} was not found");
            disk.flip_bit(at, bit);
        }
    }
    assert_eq!(verify(&media).damage, []);
}

#[test]
fn an_offline_volume_is_held_alone() {
    let media = volume();
    let offline = look(&media).expect("opens");
    assert!(media.open().is_err());
    drop(offline);
    Store::open(&media).close();
}

#[test]
fn what_is_no_volume_is_foreign() {
    let media = SimMedia::new(mainstay_io::sim::SimOptions::default());
    assert_eq!(look(&media).expect_err("blank").kind(), ErrorKind::Foreign);
}

/// Who writes over a device asks this: what cannot be opened may still be mended, so it counts as well.
#[test]
fn a_volume_is_found_by_one_copy_in_any_state() {
    let held = |media: &SimMedia| {
        let opened = media.open().expect("nobody else holds it");
        block_on(holds_volume(&*opened)).expect("readable")
    };
    let write = |media: &SimMedia, copy: u64, bytes: &[u8]| {
        let superblock = media.open().expect("nobody else holds it").superblock();
        let block = vec![AlignedBuf::copy_from(bytes).freeze()];
        superblock.write(copy * (256 << 10), block, WriteMode::Durable, IoClass::Foreground).wait().expect("written");
    };
    let empty = SimMedia::new(SimOptions { capacity: 1 << 30, ..SimOptions::default() });
    assert!(!held(&empty));
    write(&empty, 0, b"the beginning of something else");
    assert!(!held(&empty));
    write(&empty, 3, b"MAINSTAY, or what is left of it");
    assert!(held(&empty), "a damaged copy");

    let media = volume();
    assert!(held(&media));
    for copy in 0..3 {
        write(&media, copy, b"written over");
    }
    assert!(look(&media).is_err() && held(&media), "the last copy");
    write(&media, 3, b"written over");
    assert!(!held(&media));
}
