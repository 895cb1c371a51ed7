//! Several groups on one volume: one ring for the entries of all.

use std::sync::Mutex;

use mainstay_io::{BoxFuture, block_on};
use mainstay_wal::{GroupId, Lsn, RecordPos};

use super::harness::*;
use crate::{Command, Engine, GroupSettings, LocalLog, LogIndex, MAIN, OwnerPin, OwnerRecord, Result};

const BUSY: GroupId = GROUP;
const IDLE: GroupId = GroupId(8);
const VALUE_BYTES: usize = 4 << 10;

fn open(engine: &Engine, group: GroupId, found: &[OwnerRecord]) -> LocalLog {
    let settings = GroupSettings { memtable_bytes: 256 << 10, ..settings() };
    block_on(LocalLog::open(engine, group, settings, found.to_vec())).expect("opens")
}

fn write(log: &LocalLog, key: &str, value: &[u8]) {
    let applied =
        block_on(log.propose(Command { time_ms: 1000, body: put(MAIN, key, value) })).expect("the log takes it");
    applied.response.expect("not refused");
}

fn read(log: &LocalLog, key: &str) -> Option<bytes::Bytes> {
    get(&log.group().snapshot(MAIN).expect("main is always there"), key)
}

/// Its few entries are the oldest of the ring. They are brought into tables, and the ring is cut behind them: what the other group
/// writes is twice what the ring holds.
#[test]
fn an_idle_group_does_not_hold_the_ring() {
    let media = media();
    let (engine, found) = engine(&media, engine_settings()).expect("the volume opens");
    let busy = open(&engine, BUSY, &found);
    let idle = open(&engine, IDLE, &found);
    write(&idle, "k", b"of the idle one");
    // Each takes two blocks of the ring.
    let count = WAL_BYTES / VALUE_BYTES as u64;
    for n in 0..count {
        write(&busy, &format!("k{n}"), &[7; VALUE_BYTES]);
    }
    assert_eq!(read(&idle, "k").as_deref(), Some(b"of the idle one".as_slice()));
    assert_eq!(read(&busy, "k"), None, "the groups have nothing in common but the ring");

    // The power fails, and both are there again.
    drop((busy, idle, engine));
    media.crash(7);
    let (engine, found) = super::harness::engine(&media, engine_settings()).expect("the volume opens");
    let busy = open(&engine, BUSY, &found);
    let idle = open(&engine, IDLE, &found);
    assert_eq!(read(&idle, "k").as_deref(), Some(b"of the idle one".as_slice()));
    for n in 0..count {
        assert_eq!(read(&busy, &format!("k{n}")).map(|v| v.len()), Some(VALUE_BYTES), "k{n}");
    }
    block_on(busy.close()).expect("closes");
    block_on(idle.close()).expect("closes");
    block_on(engine.close()).expect("closes");
}

/// Memtables that no trickle ever fills: each write is some bytes of them and a block of the ring. The log asks for rotations of the group
/// that writes, and of the one that hardly does.
#[test]
fn a_trickle_of_tiny_writes_leaves_the_log_bounded() {
    let media = media();
    let (engine, found) = engine(&media, engine_settings()).expect("the volume opens");
    let open = |group| {
        let settings = GroupSettings { memtable_bytes: 1 << 30, ..settings() };
        block_on(LocalLog::open(&engine, group, settings, found.clone())).expect("opens")
    };
    let (one, other) = (open(BUSY), open(IDLE));
    let blocks = (WAL_BYTES / mainstay_io::BLOCK_BYTES as u64) as usize;
    for n in 0..blocks * 3 {
        write(&one, &format!("k{}", n % 100), b"tiny");
        if n % 500 == 0 {
            write(&other, &format!("k{n}"), b"tiny");
        }
        let status = engine.status();
        assert!(status.wal_used_bytes <= status.wal_ring_bytes, "{status:?}");
    }
    for log in [&one, &other] {
        let flushed = log.group().flushed().0;
        assert!(flushed > log.group().applied().0 / 3, "its older entries are in tables: flushed={flushed}");
    }
    block_on(one.close()).expect("closes");
    block_on(other.close()).expect("closes");
    block_on(engine.close()).expect("closes");
}

/// A group that nobody has opened yet keeps its entries, however much another one writes.
#[test]
fn a_group_that_is_not_open_keeps_its_entries() {
    let media = media();
    let (engine, found) = engine(&media, engine_settings()).expect("the volume opens");
    let idle = open(&engine, IDLE, &found);
    write(&idle, "k", b"of the absent one");
    drop((idle, engine));
    media.crash(3);

    let (engine, found) = super::harness::engine(&media, engine_settings()).expect("the volume opens");
    let busy = open(&engine, BUSY, &found);
    // More than half of the ring, which asks for a purge.
    for n in 0..WAL_BYTES / VALUE_BYTES as u64 / 3 {
        write(&busy, &format!("k{n}"), &[7; VALUE_BYTES]);
    }
    block_on(busy.group().shared().idle());
    drop((busy, engine));
    media.crash(4);

    let (engine, found) = super::harness::engine(&media, engine_settings()).expect("the volume opens");
    let idle = open(&engine, IDLE, &found);
    assert_eq!(read(&idle, "k").as_deref(), Some(b"of the absent one".as_slice()));
    block_on(idle.close()).expect("closes");
    block_on(engine.close()).expect("closes");
}

/// An owner of which one record stays where it is, and another does not.
struct Owner {
    stays: Option<RecordPos>,
    floors: Mutex<Vec<Lsn>>,
}

impl OwnerPin for Owner {
    fn pin(&self, _: LogIndex) -> BoxFuture<Option<RecordPos>> {
        Box::pin(std::future::ready(self.stays))
    }

    fn carry(&self, floor: Lsn) -> BoxFuture<Result<Option<RecordPos>>> {
        self.floors.lock().expect("not poisoned").push(floor);
        Box::pin(std::future::ready(Ok(self.stays)))
    }
}

/// What is carried is written anew: no further than the ring can be cut, and not at all when it cannot.
#[test]
fn owners_carry_their_records_as_far_as_the_ring_can_be_cut() {
    let media = media();
    let (engine, _) = engine(&media, engine_settings()).expect("the volume opens");
    let at = |lsn| RecordPos { batch: Lsn(lsn), offset: 96, length: 1 };
    let owner = |stays| std::sync::Arc::new(Owner { stays, floors: Mutex::default() });
    let log = open(&engine, GroupId(9), &[]);
    (0..10).for_each(|n| write(&log, &format!("k{n}"), &[7; VALUE_BYTES]));
    block_on(log.propose(Command { time_ms: 1, body: crate::CommandBody::Rotate })).expect("rotates");
    block_on(log.group().flushed_beyond(LogIndex(0)));
    let end = engine.wal().durable();
    for (stays, floor) in
        [([Some(0), None], None), ([Some(8192), Some(16384)], Some(8192)), ([None, None], Some(end.0))]
    {
        let owners = stays.map(|stays| owner(stays.map(at)));
        for (group, owner) in [GroupId(20), GroupId(21)].into_iter().zip(&owners) {
            drop(block_on(engine.group(group, settings())).expect("opens"));
            engine.set_owner_pin(group, owner.clone());
        }
        block_on(engine.shared_ref().purge()).expect("purges");
        for owner in &owners {
            let floors: Vec<u64> = owner.floors.lock().expect("not poisoned").iter().map(|floor| floor.0).collect();
            assert_eq!(floors.last().copied(), floor, "{stays:?}: {floors:?}");
        }
        assert_eq!(engine.wal().start().0, floor.unwrap_or(0));
    }
    block_on(log.close()).expect("closes");
}
