//! Damage of tables, pages and superblocks, and failing jobs: found, served by others, mended.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::sim::{Faults, SimClock, SimMedia};
use mainstay_io::{BoxFuture, Environment, block_on};

use super::harness::*;
use super::replicas::{Replica, check_equal, lead, settings_of_group, work};
use crate::stored::StoredTable;
use crate::{
    Command, CommandBody, Engine, EngineSettings, ErrorKind, Group, HealStatus, MAIN, Result, TableId, TablePeers,
};

/// Replicas in the same process.
struct Others(Vec<Group>);

impl TablePeers for Others {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn read_table(&self, copy: usize, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        let group = self.0[copy].clone();
        Box::pin(async move { group.read_table(id, offset, length).await })
    }
}

fn befriend(replicas: &[&Replica]) {
    for (at, replica) in replicas.iter().enumerate() {
        let others = replicas.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, other)| other.group.clone());
        replica.group.set_table_peers(Some(Arc::new(Others(others.collect()))));
    }
}

/// Waits for another thread to get there.
fn until(what: impl Fn() -> bool) {
    while !what() {
        std::thread::yield_now();
    }
}

fn heal_of(engine: &Engine) -> HealStatus {
    engine.status().heal
}

fn largest(group: &Group) -> StoredTable {
    let tables = group.shared().stored_tables();
    tables.into_iter().max_by_key(|stored| stored.meta.bytes).expect("there are tables")
}

/// Where byte `at` of a table lies on the disk of the extents.
fn place(stored: &StoredTable, mut at: u64) -> u64 {
    for extent in &stored.bytes.extents {
        if at < extent.bytes() {
            return extent.offset() + at;
        }
        at -= extent.bytes();
    }
    panic!("beyond the end of the table");
}

fn damage_all_of(media: &SimMedia, stored: &StoredTable) {
    for at in (0..stored.meta.bytes).step_by(4096) {
        media.extents_disk().damage(place(stored, at), 4096);
    }
}

fn replicas_of(log: &[Command], count: usize) -> Vec<Replica> {
    let make = |_| {
        let replica = Replica::new(64 << 20, 1);
        replica.feed(log);
        block_on(replica.group.shared().idle());
        replica
    };
    (0..count).map(make).collect()
}

#[test]
fn a_damaged_table_is_read_from_a_peer_and_made_anew() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let replica = replicas_of(&log, 1).pop().expect("one");
    let expect = leader.all(MAIN);
    let stored = largest(&replica.group);
    damage_all_of(&replica.media, &stored);
    let snapshot = replica.group.snapshot(MAIN).expect("main is always there");
    let key = std::str::from_utf8(&stored.meta.first).expect("a key of the test").to_owned();
    // Alone: a typed error, and the damage is known.
    let read = stored.table.get(&stored.meta.first, crate::LogIndex(u64::MAX));
    let refused = block_on(read).expect_err("damaged, and nobody to ask");
    assert_eq!(refused.kind(), ErrorKind::Io, "the disk says that it cannot be read");
    drop(stored);
    assert_eq!((heal_of(&replica.engine).tables_found, heal_of(&replica.engine).tables_damaged), (1, 1));

    befriend(&[&replica, &leader]);
    assert_eq!(get(&snapshot, &key).as_deref(), expect.get(key.as_bytes()).map(Vec::as_slice));
    assert_eq!(replica.all(MAIN), expect);
    until(|| heal_of(&replica.engine).tables_healed == 1);
    assert_eq!(heal_of(&replica.engine).tables_damaged, 0);
    check_equal(&leader, &replica);

    // What was mended is durable, and what was damaged is given back.
    replica.group.set_table_peers(None);
    drop(snapshot);
    let replica = replica.crash(3);
    replica.feed(&log);
    check_equal(&leader, &replica);
    assert_eq!(heal_of(&replica.engine), HealStatus::default());
    let shared = replica.engine.shared_ref();
    let named = replica.group.shared().named_extent_bytes() + shared.root_bytes();
    assert_eq!(shared.volume.space().live_bytes, named, "bytes in use and bytes named");
}

#[test]
fn damage_of_every_replica_at_different_places_loses_nothing() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let expect = leader.all(MAIN);
    let mut replicas = replicas_of(&log, 2);
    replicas.push(leader);
    for (n, replica) in replicas.iter().enumerate() {
        // Every table of every replica, each at another place.
        for stored in replica.group.shared().stored_tables() {
            let at = (n as u64 * 4096) % stored.meta.bytes;
            if stored.meta.bytes >= 3 * 4096 {
                replica.media.extents_disk().damage(place(&stored, at), 4096);
            } else if n == 0 {
                replica.media.extents_disk().damage(place(&stored, 0), 4096);
            }
        }
    }
    befriend(&replicas.iter().collect::<Vec<_>>());
    // A replica without what its cache had.
    let third = replicas.pop().expect("three").crash(1);
    third.feed(&log);
    befriend(&[&replicas[0], &replicas[1], &third]);
    assert_eq!(third.all(MAIN), expect);
    for replica in [&third, &replicas[0], &replicas[1]] {
        for stored in replica.group.shared().stored_tables() {
            replica.group.shared().heal.found(stored.meta.id);
        }
        until(|| heal_of(&replica.engine).tables_damaged == 0);
        for stored in replica.group.shared().stored_tables() {
            block_on(stored.table.verify()).expect("whole");
        }
        assert_eq!(replica.all(MAIN), expect);
    }
}

/// The same block damaged everywhere: an error that says so, and never other bytes.
#[test]
fn damage_of_every_replica_at_one_place_is_an_error_that_names_it() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let replicas = replicas_of(&log, 2);
    for replica in &replicas {
        damage_all_of(&replica.media, &largest(&replica.group));
    }
    befriend(&[&replicas[0], &replicas[1]]);
    let stored = largest(&replicas[0].group);
    let refused = block_on(stored.table.get(&stored.meta.first, crate::LogIndex(u64::MAX))).expect_err("no copy");
    assert_eq!(refused.kind(), ErrorKind::Io);
    assert!(refused.to_string().contains(&format!("{:032x}", stored.meta.digest)), "{refused}");
    assert_eq!(heal_of(&replicas[0].engine).tables_damaged, 1);
}

#[test]
fn a_diverged_replica_fetches_what_the_log_says_and_returns() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let replica = Replica::new(64 << 20, 1);
    let at = log.iter().position(|c| matches!(&c.body, CommandBody::Install { tables, .. } if !tables.is_empty()));
    let at = at.expect("something was flushed");
    // Its memory is not what the log says: one value more than the others have.
    replica.feed(&log[..3]);
    let shared = replica.group.shared();
    assert!(shared.disturb_memtable(b"k-nobody-wrote", b"wrong"));
    replica.feed(&log[..at]);
    replica.group.set_table_peers(Some(Arc::new(Others(Vec::new()))));
    replica.feed(&log[..=at]);
    block_on(shared.diverged());
    assert!(replica.group.is_diverged());
    assert_eq!(replica.group.status().divergences, 1);
    // Within one install: nothing behind it has been applied. The leader has replaced those tables since: the replica
    // fetches what has taken their place.
    replica.feed(&log);
    befriend(&[&replica, &leader]);
    until(|| !replica.group.is_diverged());
    assert!(heal_of(&replica.engine).tables_fetched > 0);
    block_on(shared.idle());
    assert_eq!(replica.all(MAIN), leader.all(MAIN), "the wrong value is gone");
    assert_eq!(replica.group.status().digest, leader.group.status().digest);
}

/// A disk that cannot be read for a while: the job says so, is tried again, and ends when the disk is well.
#[test]
fn a_job_that_failed_is_tried_again() {
    let media = media();
    let store = Store::open(&media);
    let round = |n: usize| {
        for key in 0..20 {
            store.put(&format!("k{key:03}"), format!("{n:0100}").as_bytes());
        }
        store.flush();
    };
    round(0);
    block_on(store.group().shared().idle());
    let ill = Faults { read_error: 1_000_000, ..Faults::default() };
    media.extents_disk().set_faults(ill);
    // Flushes only write; the compaction that they make due has to read.
    (1..4).for_each(round);
    until(|| store.group().status().jobs_retrying > 0);
    assert_eq!(store.group().status().jobs_failed, 0);
    media.extents_disk().heal();
    block_on(store.group().shared().idle());
    let status = store.group().status();
    assert_eq!((status.jobs_retrying, status.jobs_failed), (0, 0));
    assert_eq!(store.get("k001").as_deref(), Some(format!("{:0100}", 3).as_bytes()));
    store.close();
}

/// An engine whose time is the test's.
fn scrubbed(media: &SimMedia, bytes_per_second: u64) -> (Engine, Arc<SimClock>, Vec<crate::OwnerRecord>) {
    let clock = Arc::new(SimClock::new(Duration::from_secs(1_700_000_000)));
    let environment = Environment { clock: clock.clone(), ..Environment::system() };
    let settings = EngineSettings { scrub_bytes_per_second: bytes_per_second, ..engine_settings() };
    let mut found = Vec::new();
    let opened = media.open().expect("nobody else has it open");
    let engine = block_on(Engine::open(opened, environment, settings, &mut |record| {
        found.push(record);
        Ok(())
    }));
    (engine.expect("opens"), clock, found)
}

#[test]
fn the_scrubber_finds_damage_that_nobody_reads() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let replica = replicas_of(&log, 1).pop().expect("one");
    let Replica { media, engine, group } = replica;
    block_on(engine.close()).expect("closes");
    drop((engine, group));
    let (engine, clock, _) = scrubbed(&media, 1 << 20);
    let group = block_on(engine.group(GROUP, settings_of_group())).expect("opens");
    let pass = |passes: u64| {
        until(|| {
            clock.advance(Duration::from_millis(50));
            heal_of(&engine).scrub_passes >= passes
        });
    };
    pass(1);
    let (well, tables) = (heal_of(&engine), group.status().table_bytes);
    assert!(well.scrub_bytes >= tables, "all tables are read: {} of {tables}", well.scrub_bytes);
    assert_eq!((well.tables_found, well.superblocks_healed, well.pages_healed), (0, 0, 0));
    assert!(well.scrub_last_ms >= 1_700_000_000_000);

    let stored = largest(&group);
    media.extents_disk().flip_bit(place(&stored, stored.meta.bytes - 1), 3);
    media.superblock_disk().damage(crate::volume::superblock::copy_offset(2), 4096);
    let root = engine.shared_ref().volume.superblock().root.expect("the close wrote pages");
    media.extents_disk().damage(root.extents[0].offset(), 512);
    let passes = heal_of(&engine).scrub_passes;
    pass(passes + 2);
    let found = heal_of(&engine);
    assert_eq!((found.tables_found, found.tables_damaged), (1, 1));
    assert_eq!((found.superblocks_healed, found.pages_healed), (1, 1));
    group.set_table_peers(Some(Arc::new(Others(vec![leader.group.clone()]))));
    until(|| {
        clock.advance(Duration::from_millis(50));
        heal_of(&engine).tables_healed == 1
    });
    assert_eq!(heal_of(&engine).tables_damaged, 0);
    drop((group, stored));
    drop(engine);
}

/// A store alone has nobody to ask, but what rots in its log is in memory still. The clock of the test may run away from the threads that
/// flush: then the pass that found the rot has given up waiting, and the next one tells that it is cut.
#[test]
fn the_log_is_cut_behind_rot_that_the_scrubber_finds_in_it() {
    let media = media();
    let (engine, clock, found) = scrubbed(&media, 64 << 20);
    let log = block_on(crate::LocalLog::open(&engine, GROUP, settings(), found)).expect("opens");
    let write = |n: usize| {
        let body = put(MAIN, &format!("k{n:03}"), &[7; 100]);
        block_on(log.propose(Command { time_ms: 1, body })).expect("written").response.expect("taken");
    };
    (0..40).for_each(write);
    let damaged = engine.wal().start().0 + 3 * 4096;
    media.wal_disk().flip_bit(damaged + 150, 1);
    (40..60).for_each(write);
    until(|| {
        clock.advance(Duration::from_millis(50));
        heal_of(&engine).log_cut == 1
    });
    let heal = heal_of(&engine);
    assert_eq!((heal.log_found, engine.log_is_damaged()), (1, false));
    assert!(engine.wal().start().0 > damaged);
    // The next pass finds nothing, and neither does a restart, which would not start with that damage.
    let passes = heal.scrub_passes;
    until(|| {
        clock.advance(Duration::from_millis(50));
        heal_of(&engine).scrub_passes >= passes + 2
    });
    assert_eq!(heal_of(&engine).log_found, 1);
    block_on(log.close()).expect("closes");
    drop((log, engine));
    media.kill(5);
    let store = Store::open(&media);
    for n in 0..60 {
        assert_eq!(store.get(&format!("k{n:03}")).as_deref(), Some([7; 100].as_slice()), "k{n:03}");
    }
    store.close();
}

/// One of the others does not answer, and one has replaced the table: the replica has to wait, and says so.
#[test]
fn damage_that_others_may_yet_make_good_is_no_corruption() {
    struct Silent;
    impl TablePeers for Silent {
        fn count(&self) -> usize {
            2
        }

        fn read_table(&self, copy: usize, id: TableId, _: u64, _: u64) -> BoxFuture<Result<Bytes>> {
            let kind = if copy == 0 { ErrorKind::Unavailable } else { ErrorKind::NotFound };
            Box::pin(std::future::ready(Err(crate::Error::new(kind, format!("not to be had table={id}")))))
        }
    }
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let replica = replicas_of(&log, 1).pop().expect("one");
    let stored = largest(&replica.group);
    damage_all_of(&replica.media, &stored);
    replica.group.set_table_peers(Some(Arc::new(Silent)));
    let read = stored.table.get(&stored.meta.first, crate::LogIndex(u64::MAX));
    let refused = block_on(read).expect_err("nobody has it now");
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
    befriend(&[&replica, &leader]);
    until(|| heal_of(&replica.engine).tables_damaged == 0);
    assert_eq!(replica.all(MAIN), leader.all(MAIN));
}

#[test]
fn one_damaged_copy_of_the_manifest_pages_is_written_again_at_open() {
    for copy in 0..2 {
        let media = media();
        let store = Store::open(&media);
        for n in 0..200 {
            store.put(&format!("k{n}"), b"value");
        }
        store.settle();
        store.close();
        let root = {
            let (engine, _) = engine(&media, engine_settings()).expect("opens");
            let root = engine.shared_ref().volume.superblock().root.expect("the close wrote pages");
            drop(engine);
            media.kill(1);
            root
        };
        let length = root.bytes.next_multiple_of(4096);
        media.extents_disk().damage(root.extents[0].offset() + copy * length, root.bytes);
        let store = Store::open(&media);
        assert_eq!(store.get("k7").as_deref(), Some(b"value".as_slice()));
        assert_eq!(heal_of(&store.engine).pages_healed, 1);
        store.close();
        let store = Store::open(&media);
        assert_eq!(heal_of(&store.engine).pages_healed, 0);
        store.close();
    }
}
