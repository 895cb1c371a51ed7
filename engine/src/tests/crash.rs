//! Power cuts and kills at any moment: what was acknowledged is there, what was not may be.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mainstay_io::sim::{DiskImage, SimLayout, SimMedia, SimOptions};
use mainstay_io::{Environment, block_on};

use super::harness::*;
use crate::{CommandBody, MAIN, Offline};

fn key(n: u64) -> String {
    format!("key-{:03}", n % 120)
}

/// Writes from several threads until the disks stop, then compares. Each thread owns its keys, so the newest acknowledged
/// value of a key is known, and one later value may have been on its way.
fn round(seed: u64, power: bool) {
    const WRITERS: u64 = 4;
    let media = media();
    let mut acknowledged: BTreeMap<(u64, String), u64> = BTreeMap::new();
    let mut next = 0;
    for life in 0..3 {
        let store = Store::open(&media);
        let mut lost = Vec::new();
        for (&(writer, ref key), &n) in &acknowledged {
            let found = store.get(&format!("{writer}-{key}")).unwrap_or_else(|| panic!("{writer}-{key} is lost"));
            let found: u64 = String::from_utf8_lossy(&found).trim().parse().expect("a number was written");
            if found < n {
                lost.push((writer, n, found));
            }
        }
        lost.sort();
        assert!(lost.is_empty(), "seed {seed} life {life} applied {}: {lost:?}", store.group().applied());
        let stop = 60 + (seed * 37 + life * 101) % 400;
        let log = &store.log;
        let first = next;
        let results: Vec<Vec<(String, u64)>> = std::thread::scope(|scope| {
            let write = |writer: u64| {
                let media = media.clone();
                move || {
                    let mut done = Vec::new();
                    for n in 0..1000 {
                        let (key, n) = (key(n * 31 + seed), first + n);
                        if writer == 0 && n - first == stop {
                            if power { media.crash(seed) } else { media.kill(seed) }
                        }
                        let value = format!("{n:<100}");
                        let body = put(MAIN, &format!("{writer}-{key}"), value.as_bytes());
                        let command = crate::Command { time_ms: 1, body };
                        // Half of them write their entries themselves when they can.
                        let applied = match writer % 2 {
                            0 => mainstay_io::block_on(log.propose_here(command)),
                            _ => mainstay_io::block_on(log.propose(command)),
                        };
                        match applied {
                            Ok(applied) => {
                                applied.response.expect("a put is not refused");
                                done.push((key, n));
                            }
                            Err(_) => break,
                        }
                    }
                    done
                }
            };
            let threads: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(write(writer))).collect();
            threads.into_iter().map(|t| t.join().expect("a writer does not panic")).collect()
        });
        next = first + 1000;
        for (writer, done) in (0..).zip(results) {
            assert!(done.len() < 1000, "the disks stopped before the writer did");
            acknowledged.extend(done.into_iter().map(|(key, n)| ((writer, key), n)));
        }
        drop(store);
    }
    check_no_leak(&media);
}

#[test]
fn what_was_acknowledged_survives_power_cuts() {
    (0..6).for_each(|seed| round(seed, true));
}

#[test]
fn what_was_acknowledged_survives_kills() {
    (0..4).for_each(|seed| round(seed + 100, false));
}

/// A cut between the manifest and the data: at each of many moments of a run with flushes, compactions and checkpoints the
/// volume opens, shows a prefix of what was written that holds all that was acknowledged, and leaks nothing.
#[test]
fn every_cut_leaves_a_prefix() {
    let media = media();
    let store = Store::open(&media);
    for n in 0..150_u64 {
        store.put(&key(n), format!("{n:<200}").as_bytes());
        if n == 70 {
            store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
        }
        if n % 30 == 29 {
            let images: Vec<_> = media.disks().iter().map(|disk| disk.crash_image(n)).collect();
            let options = mainstay_io::sim::SimOptions { capacity: 1 << 30, ..Default::default() };
            let cut = mainstay_io::sim::SimMedia::from_images(Default::default(), options, images);
            let after = Store::open(&cut);
            for m in 0..=n {
                // The newest of the numbers up to `n` that share the key.
                let newest = (0..=n).rev().find(|x| key(*x) == key(m)).expect("m itself");
                let found = after.get(&key(m)).expect("acknowledged");
                assert_eq!(String::from_utf8_lossy(&found).trim(), newest.to_string());
            }
            assert_eq!(after.group().checkpoint("c").is_ok(), n >= 70);
            drop(after);
            cut.kill(0);
            check_no_leak(&cut);
        }
    }
    store.close();
}

const WRITERS: usize = 3;
/// Keys of a writer, which writes one after the other and begins anew.
const KEYS: u64 = 40;
const INSTANTS: usize = 200;

/// What a volume held at one instant, and how much of each writer had been acknowledged before it.
struct Copied {
    image: DiskImage,
    /// Writes that were not flushed are in it in part.
    torn: bool,
    acknowledged: [u64; WRITERS],
    checkpoints: usize,
}

fn options() -> SimOptions {
    SimOptions { capacity: 1 << 30, ..SimOptions::default() }
}

/// A snapshot of the volume under a running process, made below it: all blocks as of one instant. At 200 instants of a run with
/// flushes, compactions and checkpoints, every checksum of the copy matches, it opens, leaks nothing, and holds of each writer what
/// it wrote up to one of its writes, which is no earlier than the last that was acknowledged before the instant.
#[test]
fn a_copy_of_any_instant_under_load_opens() {
    // One disk, so that one image of it is of one instant.
    let media = format(&SimMedia::with_layout(SimLayout::Device, options()), WAL_BYTES);
    let store = Store::open(&media);
    let (stop, counts) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; WRITERS]);
    let mut copies = Vec::new();
    std::thread::scope(|scope| {
        for (writer, count) in counts.iter().enumerate() {
            let (store, stop) = (&store, &stop);
            scope.spawn(move || {
                for n in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    store.put(&format!("{writer}-{:03}", n % KEYS), format!("{n:<200}").as_bytes());
                    count.store(n + 1, Ordering::Release);
                }
            });
        }
        let acknowledged = || counts.each_ref().map(|count| count.load(Ordering::Acquire));
        for instant in 0..INSTANTS {
            let before: u64 = acknowledged().iter().sum();
            while acknowledged().iter().sum::<u64>() < before + 5 {
                std::thread::yield_now();
            }
            if instant % 40 == 20 {
                let name = format!("c{}", instant / 40);
                store.must(CommandBody::CreateCheckpoint { name, branch: MAIN });
            }
            let acknowledged = acknowledged();
            // Every second time the power of the storage fails with the snapshot: what was not flushed is there in part.
            let disk = &media.disks()[0];
            let torn = instant % 2 == 1;
            let image = if torn { disk.crash_image(instant as u64) } else { disk.image() };
            copies.push(Copied { image, torn, acknowledged, checkpoints: (instant + 20) / 40 });
        }
        stop.store(true, Ordering::Relaxed);
    });
    store.close();
    for (instant, copied) in copies.into_iter().enumerate() {
        let media = check_copy(copied);
        if instant % 8 == 0 {
            check_no_leak(&media);
        }
    }
}

fn check_copy(copied: Copied) -> SimMedia {
    let media = SimMedia::from_images(SimLayout::Device, options(), vec![copied.image]);
    let opened = media.open().expect("nobody else holds it");
    let report = block_on(async { Offline::open(opened, &Environment::system()).await?.verify(&mut |_| ()).await });
    let mut damage = report.expect("all can be read").damage;
    // Of a copy of the superblock that tore nobody can tell that it did not rot.
    damage.retain(|(part, _)| !(copied.torn && part == "superblock"));
    assert_eq!(damage, []);
    let store = Store::open(&media);
    for (writer, least) in copied.acknowledged.into_iter().enumerate() {
        let number = |key: u64| -> Option<u64> {
            let value = store.get(&format!("{writer}-{key:03}"))?;
            Some(String::from_utf8_lossy(&value).trim().parse().expect("a number was written"))
        };
        let found: Vec<_> = (0..KEYS).map(number).collect();
        let written = found.iter().flatten().max().map_or(0, |last| last + 1);
        assert!(written >= least, "writer {writer}: {least} acknowledged, {written} found");
        let newest = |key: u64| (written.saturating_sub(KEYS)..written).find(|n| n % KEYS == key);
        assert_eq!(found, (0..KEYS).map(newest).collect::<Vec<_>>(), "writer {writer}");
    }
    assert!(store.group().checkpoints().len() >= copied.checkpoints);
    drop(store);
    media.kill(0);
    media
}
