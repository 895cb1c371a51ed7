//! Every row of the table of cases, on bytes; torn tails at every sector; what was cut stays cut.

use super::device::SECTOR_BYTES;
use super::*;
use crate::batch::Header;
use crate::cases::TABLE;

const BLOCK: usize = 4096;

/// Changes fields of the header at `offset` and makes its checksum right again.
fn reseal(image: &mut [u8], offset: usize, change: impl FnOnce(&mut [u8])) {
    let header = &mut image[offset..offset + 96];
    change(header);
    let checksum = crc_fast::crc64_nvme(&header[..88]);
    header[88..96].copy_from_slice(&checksum.to_le_bytes());
}

fn refusal(image: Vec<u8>, options: WalOptions) -> crate::Error {
    Bench::open(image, options).err().expect("the log does not open")
}

#[track_caller]
fn check(error: &crate::Error, kind: ErrorKind, lsn: usize, case: char) {
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    assert!(text.ends_with(&format!("lsn={lsn} case={case}")), "{text}");
}

/// Batches of one block, each waited for, so that each says that all before it was durable.
fn committed(count: usize) -> Vec<u8> {
    let bench = Bench::blank(64 * KIB);
    for i in 0..count {
        bench.commit(&payload(i, 3000)).expect("commits");
    }
    bench.device.image()
}

/// As [`committed`] with 13 batches, and then `more` that go to the next lap: 10 are released, three blocks are left at
/// the end of the lap, and the first of `more` needs four.
fn wrapped(more: usize) -> (Vec<u8>, WalOptions) {
    let bench = Bench::open(committed(13), options(2)).expect("opens");
    bench.wal.release(Lsn(10 * BLOCK as u64));
    for i in 0..more {
        let bytes = if i == 0 { 14_000 } else { 3000 };
        let pos = bench.commit(&payload(100 + i, bytes)).expect("commits");
        assert_eq!(pos.batch, Lsn(64 * KIB as u64 + if i == 0 { 0 } else { (3 + i) * BLOCK } as u64));
    }
    (bench.device.image(), WalOptions { start: Lsn(10 * BLOCK as u64), ..options(3) })
}

#[test]
fn row_a_the_log_goes_on() {
    assert_eq!(Bench::open(committed(5), options(2)).expect("opens").delivered.len(), 5);
}

#[test]
fn row_b_a_newer_format_is_foreign() {
    let mut image = committed(5);
    reseal(&mut image, 2 * BLOCK, |h| h[8] = 2);
    check(&refusal(image, options(2)), ErrorKind::Foreign, 2 * BLOCK, 'B');
}

#[test]
fn row_c_another_volume_is_foreign() {
    let other = WalOptions { volume: [9; 16], ..options(2) };
    check(&refusal(committed(5), other), ErrorKind::Foreign, 0, 'C');
}

#[test]
fn row_d_an_epoch_that_nobody_was_given_is_corrupt() {
    check(&refusal(committed(5), options(1)), ErrorKind::Corrupt, 0, 'D');
}

/// The device lost the write of an acknowledged batch and kept an older one there that also fits its predecessor.
#[test]
fn row_e_a_batch_that_follows_another_one_is_corrupt() {
    let mut image = committed(5);
    let bench =
        Bench::open(image[..BLOCK].iter().copied().chain([0; 15 * BLOCK]).collect(), options(2)).expect("opens");
    bench.commit(b"something else").expect("commits");
    let other = bench.device.image();
    // As if epoch 1 had written it, so that the epoch does not give it away.
    image[BLOCK..2 * BLOCK].copy_from_slice(&other[BLOCK..2 * BLOCK]);
    reseal(&mut image, BLOCK, |h| h[32..40].copy_from_slice(&1_u64.to_le_bytes()));
    check(&refusal(image, options(3)), ErrorKind::Corrupt, 2 * BLOCK, 'E');
}

#[test]
fn row_f_the_end_of_a_lap_is_skipped() {
    let (image, options) = wrapped(3);
    let bench = Bench::open(image, options).expect("opens");
    assert_eq!(bench.delivered.len(), 6);
    assert_eq!(bench.recovery.end, Lsn((64 * KIB + 6 * BLOCK) as u64));
}

#[test]
fn rows_g_h_i_j_judge_the_next_lap_as_the_place_itself() {
    type Case = (char, ErrorKind, usize, fn(&mut [u8]));
    let cases: [Case; 4] = [
        ('G', ErrorKind::Foreign, 64 * KIB, |h| h[8] = 2),
        ('H', ErrorKind::Foreign, 64 * KIB, |h| h[16..32].fill(9)),
        ('I', ErrorKind::Corrupt, 64 * KIB, |h| h[32] = 99),
        ('J', ErrorKind::Corrupt, 13 * BLOCK, |h| h[64] ^= 1),
    ];
    for (row, kind, lsn, change) in cases {
        let (mut image, options) = wrapped(1);
        reseal(&mut image, 0, change);
        check(&refusal(image, options), kind, lsn, row);
    }
}

#[test]
fn row_k_damage_before_a_batch_that_says_it_was_durable_is_corrupt() {
    let damages: [fn(&mut [u8]); 4] = [|b| b[3000] ^= 1, |b| b[50] ^= 1, |b| b.fill(0), |b| b[96..].fill(0xFF)];
    for damage in damages {
        for at in 0..4 {
            let mut image = committed(5);
            damage(&mut image[at * BLOCK..(at + 1) * BLOCK]);
            let before = image.clone();
            let device = MemDevice::new(image);
            let mut deliver = |_, _, _, _| Ok(());
            let opened = device.run(Wal::open(device.zone(), environment(), options(2), &mut deliver));
            check(&opened.expect_err("does not open"), ErrorKind::Corrupt, at * BLOCK, 'K');
            assert_eq!(device.image(), before, "nothing was cut");
        }
    }
}

#[test]
fn row_k_damage_behind_a_skipped_lap_end_names_the_lap() {
    let (mut image, options) = wrapped(3);
    image[5000] ^= 1;
    check(&refusal(image, options), ErrorKind::Corrupt, 64 * KIB, 'K');
}

/// The batch that proves the damage lies as far behind as it can: every batch in between is damaged too.
#[test]
fn row_k_the_proof_is_found_anywhere_in_the_window() {
    let bench = Bench::blank(64 * MIB);
    let long = payload(1, 3 * MIB);
    for _ in 0..10 {
        bench.commit(&long).expect("commits");
    }
    let end = bench.wal.durable();
    let mut image = bench.device.image();
    let window = 8 * MIB + 2 * crate::ring::Ring::new(64 * MIB as u64).expect("large").batch_bytes_limit() as usize;
    assert!(window > 30 * MIB);
    let last = end.0 as usize - image_batch_bytes(&image, 0);
    let header = Header::decode(&image[last..]).expect("the last batch");
    assert!(header.durable > Lsn(0));
    image[96..last].fill(0xEE);
    check(&refusal(image, options(2)), ErrorKind::Corrupt, 0, 'K');
}

fn image_batch_bytes(image: &[u8], at: usize) -> usize {
    Header::decode(&image[at..]).expect("a batch is there").batch_bytes as usize
}

#[test]
fn row_l_a_clean_log_that_is_shorter_is_corrupt() {
    let clean = |blocks: usize| WalOptions { clean_end: Some(Lsn((blocks * BLOCK) as u64)), ..options(2) };
    check(&refusal(committed(5), clean(6)), ErrorKind::Corrupt, 5 * BLOCK, 'L');
    let mut image = committed(5);
    image[4 * BLOCK + 200] ^= 1;
    check(&refusal(image, clean(5)), ErrorKind::Corrupt, 4 * BLOCK, 'L');
    for blocks in 0..=5 {
        assert_eq!(Bench::open(committed(5), clean(blocks)).expect("opens").delivered.len(), 5);
    }
    check(&refusal(vec![0; 64 * KIB], clean(1)), ErrorKind::Corrupt, 0, 'L');
}

#[test]
fn row_m_a_torn_tail_is_cut_at_every_sector() {
    let bench = Bench::open(committed(3), options(2)).expect("opens");
    bench.device.hold(true);
    let torn = bench.append(&payload(9, 13_000));
    bench.device.turn();
    let held = bench.device.held();
    let (offset, data) = (held[0].0 as usize, &held[0].1);
    let sectors = data.len() / SECTOR_BYTES;
    assert_eq!((sectors, torn.get()), (32, None));
    for sector in 0..sectors {
        let (from, to) = (sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES);
        // A first part only, and all but one sector. What was there before are zeroes or bytes of an earlier lap.
        for old in [0, 0x5A] {
            let mut prefix = bench.device.image();
            prefix[offset..offset + data.len()].fill(old);
            let mut hole = prefix.clone();
            prefix[offset..offset + from].copy_from_slice(&data[..from]);
            hole[offset..offset + data.len()].copy_from_slice(data);
            hole[offset + from..offset + to].fill(old);
            for image in [prefix, hole] {
                // Where the sector held nothing but zeroes, nothing was torn.
                let whole = image[offset..offset + data.len()] == data[..];
                let opened = Bench::open(image, options(3)).expect("a torn tail is cut");
                assert_eq!(opened.delivered.len(), if whole { 4 } else { 3 }, "sector {sector}");
            }
        }
    }
}

#[test]
fn row_n_a_torn_tail_behind_a_skipped_lap_end_is_cut() {
    let (mut image, options) = wrapped(1);
    image[5000] ^= 1;
    let bench = Bench::open(image, options).expect("a torn tail is cut");
    assert_eq!((bench.delivered.len(), bench.recovery.end), (3, Lsn(13 * BLOCK as u64)));
    assert!(bench.recovery.torn_bytes > 0);
}

#[test]
fn row_o_an_empty_ring_and_the_end_of_a_log() {
    assert_eq!(Bench::blank(64 * KIB).recovery.end, Lsn(0));
    let bench = Bench::open(committed(5), options(2)).expect("opens");
    assert_eq!((bench.recovery.end, bench.recovery.torn_bytes), (Lsn(5 * BLOCK as u64), 0));
}

#[test]
fn row_p_a_block_that_cannot_be_read_at_the_end_is_corrupt() {
    let refused = |image: &[u8], unread: &[usize], options| {
        Bench::open_without(image.to_vec(), unread, options).err().expect("the log does not open")
    };
    let image = committed(5);
    // The last batch, and the place of the one that may follow it.
    check(&refused(&image, &[4 * BLOCK], options(2)), ErrorKind::Corrupt, 4 * BLOCK, 'P');
    check(&refused(&image, &[5 * BLOCK], options(2)), ErrorKind::Corrupt, 5 * BLOCK, 'P');
    // The body of the last batch.
    let bench = Bench::open(image.clone(), options(2)).expect("opens");
    bench.commit(&payload(9, 13_000)).expect("commits");
    check(&refused(&bench.device.image(), &[7 * BLOCK], options(3)), ErrorKind::Corrupt, 5 * BLOCK, 'P');
    // Behind a skipped lap end, where the last batch is.
    let (lap, lap_options) = wrapped(1);
    check(&refused(&lap, &[0], lap_options), ErrorKind::Corrupt, 13 * BLOCK, 'P');
    // Further on nothing can have been acknowledged while this is not there, and of a clean log the end is known.
    for (unread, clean_end) in [(6 * BLOCK, None), (5 * BLOCK, Some(Lsn(5 * BLOCK as u64)))] {
        let closed = clean_end.is_some();
        let bench = Bench::open_without(image.clone(), &[unread], WalOptions { clean_end, closed, ..options(2) });
        assert_eq!(bench.expect("opens").delivered.len(), 5, "unread={unread}");
    }
    // One that went on behind a clean close says nothing of its end.
    for (clean_end, before) in [(3, 'P'), (5, 'L')] {
        let went_on = WalOptions { clean_end: Some(Lsn((clean_end * BLOCK) as u64)), ..options(2) };
        check(&refused(&image, &[4 * BLOCK], went_on.clone()), ErrorKind::Corrupt, 4 * BLOCK, before);
        check(&refused(&image, &[5 * BLOCK], went_on), ErrorKind::Corrupt, 5 * BLOCK, 'P');
    }
    // Where the longest batch fits the next one does not skip to the next lap.
    let later = WalOptions { start: Lsn(BLOCK as u64), ..options(2) };
    assert_eq!(Bench::open_without(image, &[0], later).expect("opens").delivered.len(), 4);
}

#[test]
fn a_block_that_is_read_at_the_next_attempt_is_no_damage() {
    for times in 1..=3 {
        let device = super::device::MemDevice::new(committed(5));
        device.fail_reads(4 * BLOCK, times);
        assert_eq!(Bench::open_on(device, options(2)).expect("opens").delivered.len(), 5, "failed {times} times");
    }
}

#[test]
fn every_row_has_a_test() {
    let text = include_str!("recovery.rs");
    for row in &TABLE {
        let letter = row.letter.to_ascii_lowercase();
        let named = text
            .lines()
            .filter_map(|l| l.strip_prefix("fn row"))
            .any(|name| name.split('_').any(|part| part.len() == 1 && part.starts_with(letter)));
        assert!(named, "no test is named after row {}", row.letter);
    }
}

/// Behind three batches that are committed three more in flight: the first is lost, the others are whole.
fn first_of_three_in_flight_lost() -> Bench {
    let bench = Bench::open(committed(3), options(2)).expect("opens");
    let _ = bench.three_in_flight(50, 1900);
    bench.device.complete(1, true);
    bench.device.complete(1, true);
    bench
}

/// Three batches in flight, the first is lost and the others are whole: none was acknowledged, all are cut. A new epoch
/// then fills the gap with a batch of the same length, so that an old one stands exactly where the next one belongs.
/// The chain does not fit; but once the log is released up to there, nobody knows the chain any more.
#[test]
fn what_was_cut_is_never_adopted_later() {
    let bench = first_of_three_in_flight_lost();
    let bench = bench.crash(3);
    assert_eq!((bench.delivered.len(), bench.recovery.end), (3, Lsn(3 * BLOCK as u64)));
    assert_eq!(bench.recovery.torn_bytes, 3 * BLOCK as u64);
    bench.commit(&payload(60, 1900)).expect("commits");
    let image = bench.device.image();
    assert_eq!(Bench::open(image.clone(), options(4)).expect("opens").delivered.len(), 4);
    let start = Lsn(4 * BLOCK as u64);
    let bench = Bench::open(image, WalOptions { start, ..options(4) }).expect("opens");
    assert_eq!((bench.delivered.len(), bench.recovery.end), (0, start));
}

/// The cut itself is cut short by a crash: the next open comes to the same end.
#[test]
fn a_crash_while_the_tail_is_wiped_changes_nothing() {
    let bench = first_of_three_in_flight_lost();
    let image = bench.device.image();
    for wiped in [vec![], vec![4], vec![5], vec![4, 5]] {
        let mut image = image.clone();
        for block in wiped {
            image[block * BLOCK..(block + 1) * BLOCK].fill(0);
        }
        let bench = Bench::open(image, options(3)).expect("opens");
        assert_eq!((bench.delivered.len(), bench.recovery.end), (3, Lsn(3 * BLOCK as u64)));
    }
}

/// Batches of the last lap lie behind the end of this one, whole and of this volume.
#[test]
fn batches_of_an_earlier_lap_are_no_tail() {
    let mut bench = Bench::blank(64 * KIB);
    for i in 0..40 {
        let pos = bench.commit(&payload(i, 3000)).expect("commits");
        bench.wal.release(Lsn(pos.batch.0.saturating_sub(2 * BLOCK as u64)));
    }
    for epoch in 2..6 {
        bench = bench.crash(epoch);
        assert_eq!((bench.delivered.len(), bench.recovery.torn_bytes), (3, 0));
    }
}

#[test]
fn a_tail_torn_in_every_epoch_is_cut_in_every_epoch() {
    let mut bench = Bench::blank(64 * KIB);
    let mut expected = Vec::new();
    for epoch in 2..30_usize {
        let kept = payload(epoch, 500);
        let pos = bench.commit(&kept).expect("commits");
        expected.push(kept);
        if expected.len() > 2 {
            expected.remove(0);
            bench.wal.release(Lsn(pos.batch.0 - BLOCK as u64));
        }
        bench.device.hold(true);
        let _ = bench.append(&payload(epoch + 100, 7000));
        bench.device.turn();
        // Every other time the batch is cut in its first block, else behind it.
        let sectors = if epoch % 2 == 0 { 1 } else { 9 };
        let (offset, data) = bench.device.held().remove(0);
        let mut image = bench.device.image();
        image[offset as usize..offset as usize + sectors * SECTOR_BYTES]
            .copy_from_slice(&data[..sectors * SECTOR_BYTES]);
        let start = bench.wal.start();
        bench = Bench::open(image, WalOptions { start, ..options(epoch as u64) }).expect("opens");
        assert_eq!(bench.payloads(), expected);
    }
}

#[test]
fn the_owner_can_refuse_a_record() {
    let device = MemDevice::new(committed(3));
    let mut deliver = |_, _, _, _| Err(crate::Error::new(ErrorKind::Corrupt, "an entry that nobody understands"));
    let error = device.run(Wal::open(device.zone(), environment(), options(2), &mut deliver)).expect_err("refused");
    assert_eq!(error.to_string(), "an entry that nobody understands");
}

#[test]
fn inspecting_sees_every_batch_and_changes_nothing() {
    let (mut image, options) = wrapped(3);
    let last = 5 * BLOCK;
    image[last + 300] ^= 1;
    let device = MemDevice::new(image.clone());
    let mut batches = Vec::new();
    let mut visit = |batch: crate::BatchInfo| {
        batches.push((batch.lsn.0, batch.follows.0, batch.epoch, batch.records.len(), batch.bytes));
        Ok(())
    };
    let found =
        device.run(crate::inspect(&device.zone(), VOLUME, options.start, None, false, &mut visit)).expect("walks");
    let block = BLOCK as u64;
    let lap = 16 * block;
    assert_eq!(
        batches,
        [
            (10 * block, 10 * block, 1, 1, block),
            (11 * block, 11 * block, 1, 1, block),
            (12 * block, 12 * block, 1, 1, block),
            (lap, 13 * block, 2, 1, 4 * block),
            (lap + 4 * block, lap + 4 * block, 2, 1, block),
        ]
    );
    assert_eq!((found.records, found.torn_bytes), (5, block));
    assert_eq!(device.image(), image);
    assert_eq!(device.counts().0, 0);
}

/// A batch that fits in everything but its epoch: a later epoch has written before it, so it is a leftover.
#[test]
fn epochs_never_go_down() {
    let bench = Bench::open(committed(2), options(5)).expect("opens");
    for i in 2..4 {
        bench.commit(&payload(i, 3000)).expect("commits");
    }
    let mut image = bench.device.image();
    assert_eq!(Bench::open(image.clone(), options(6)).expect("opens").delivered.len(), 4);
    reseal(&mut image, 3 * BLOCK, |h| h[32..40].copy_from_slice(&1_u64.to_le_bytes()));
    assert_eq!(Bench::open(image, options(6)).expect("opens").delivered.len(), 3);
}
