//! The log across restarts, crashes and a full ring. openraft's suite never restarts a store (pitfall 14).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{LogIndex, OwnerPin};
use mainstay_io::sim::{IoKind, SimDisk, SimOptions, SimScheduler};
use mainstay_wal::{Lsn, RecordPos, Wal};
use openraft::async_runtime::Oneshot;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft_rt::AsyncRuntime;

use super::{Bench, RING_BYTES, environment};
use crate::TokioRuntime;
use crate::log_store::LogStore;
use crate::types::{
    Entry, EntryPayload, LogId, Membership, Payload, SnapshotMeta, StoredMembership, TypeConfig, Vote, log_id,
};

type Config = TypeConfig<TokioRuntime>;
type Receiver<T> = <<TokioRuntime as AsyncRuntime>::Oneshot as Oneshot>::Receiver<T>;

pub(super) fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(test)
}

pub(super) fn normal(term: u64, index: u64, bytes: usize) -> Entry {
    let payload = Payload::new(Bytes::from(vec![index as u8; bytes]));
    Entry { log_id: log_id(term, index), payload: EntryPayload::Normal(payload) }
}

pub(super) fn members(ids: &[u64]) -> Membership {
    Membership::new_with_defaults(vec![ids.iter().copied().collect()], [])
}

pub(super) fn membership(term: u64, index: u64, ids: &[u64]) -> Entry {
    Entry { log_id: log_id(term, index), payload: EntryPayload::Membership(members(ids)) }
}

/// Queues entries and returns what tells that they are durable.
pub(super) async fn queue(store: &mut LogStore, entries: Vec<Entry>) -> Receiver<std::io::Result<()>> {
    let (tx, rx) = <TokioRuntime as AsyncRuntime>::Oneshot::channel();
    RaftLogStorage::<Config>::append(store, entries, IOFlushed::signal(tx)).await.expect("queued");
    rx
}

pub(super) async fn append(store: &mut LogStore, entries: Vec<Entry>) {
    queue(store, entries).await.await.expect("told").expect("durable");
}

pub(super) async fn entries(store: &mut LogStore) -> Vec<Entry> {
    RaftLogReader::<Config>::try_get_log_entries(store, 0..u64::MAX).await.expect("readable")
}

pub(super) async fn ids(store: &mut LogStore) -> Vec<LogId> {
    entries(store).await.iter().map(|e| e.log_id).collect()
}

pub(super) async fn save_vote(store: &mut LogStore, vote: Vote) {
    RaftLogStorage::<Config>::save_vote(store, &vote).await.expect("durable");
}

pub(super) async fn read_vote(store: &mut LogStore) -> Option<Vote> {
    RaftLogReader::<Config>::read_vote(store).await.expect("known")
}

async fn purge(store: &mut LogStore, upto: LogId) {
    RaftLogStorage::<Config>::purge(store, upto).await.expect("queued");
}

pub(super) async fn truncate(store: &mut LogStore, after: LogId) {
    RaftLogStorage::<Config>::truncate_after(store, Some(after)).await.expect("queued");
}

/// Up to where the engine may cut the ring of this group alone.
pub(super) async fn cut_at(store: &LogStore, wal: &Wal, flushed: LogIndex) -> RecordPos {
    let floor = store.pin(flushed).await.map_or(wal.durable(), |pos| pos.batch);
    store.carry(floor).await.expect("open").expect("a log")
}

#[test]
fn what_was_durable_is_found_after_a_crash() {
    run(async {
        for cache in [1, 1 << 20] {
            let mut bench = Bench::new(cache).await;
            let store = &mut bench.store;
            save_vote(store, Vote::new(3, 2)).await;
            append(store, vec![membership(1, 0, &[1, 2, 3]), normal(1, 1, 100)]).await;
            append(store, vec![normal(1, 2, 5000), normal(1, 3, 0)]).await;
            truncate(store, log_id(1, 1)).await;
            append(store, vec![normal(3, 2, 10), membership(3, 3, &[1, 2]), normal(3, 4, 10)]).await;
            save_vote(store, Vote::new_committed(3, 2)).await;
            let before = entries(store).await;

            let mut bench = bench.crash(1, Lsn(0), cache).await;
            let store = &mut bench.store;
            assert_eq!(entries(store).await, before);
            assert_eq!(read_vote(store).await, Some(Vote::new_committed(3, 2)));
            let (id, m) = store.state_at(LogIndex(2)).expect("known");
            assert_eq!((id, m.membership()), (Some(log_id(3, 2)), &members(&[1, 2, 3])));
            let (id, m) = store.state_at(LogIndex(4)).expect("known");
            assert_eq!((id, m.membership()), (Some(log_id(3, 4)), &members(&[1, 2])));
            assert_eq!(*m.log_id(), Some(log_id(3, 3)));

            // What may be purged is what the engine has; the state there keeps its name.
            purge(store, log_id(3, 3)).await;
            append(store, vec![normal(3, 5, 10)]).await;
            let mut bench = bench.crash(2, Lsn(0), cache).await;
            let store = &mut bench.store;
            assert_eq!(ids(store).await, [log_id(3, 4), log_id(3, 5)]);
            assert_eq!(store.purged(), Some(log_id(3, 3)));
            let (id, m) = store.state_at(LogIndex(3)).expect("anchored");
            assert_eq!((id, m.membership()), (Some(log_id(3, 3)), &members(&[1, 2])));
            assert!(store.state_at(LogIndex(2)).is_err());
        }
    });
}

#[test]
fn what_was_acknowledged_survives_every_crash_and_nothing_has_a_hole() {
    run(async {
        for seed in 0..60 {
            let options = SimOptions { capacity: RING_BYTES, seed, ..SimOptions::default() };
            let mut bench = Bench::of(options, 1 << 20).await;
            let mut last = 0;
            let mut acknowledged = 0;
            let mut voted = 0;
            for round in 1..=6 {
                // Some are waited for and some are only queued when the power goes.
                let mut waits = Vec::new();
                for _ in 0..(seed + round) % 7 {
                    last += 1;
                    waits.push((last, queue(&mut bench.store, vec![normal(round, last - 1, 700)]).await));
                }
                let keep = waits.len() / 2;
                for (index, wait) in waits.into_iter().take(keep) {
                    wait.await.expect("told").expect("durable");
                    acknowledged = index;
                }
                if seed % 2 == 0 {
                    save_vote(&mut bench.store, Vote::new(round, 1)).await;
                    voted = round;
                    acknowledged = last;
                }
                bench = bench.crash(seed * 10 + round, Lsn(0), 1 << 20).await;
                let found = ids(&mut bench.store).await;
                assert!(found.len() as u64 >= acknowledged, "seed={seed} round={round}");
                for (i, id) in found.iter().enumerate() {
                    assert_eq!(id.index, i as u64, "seed={seed}");
                }
                last = found.len() as u64;
                assert_eq!(read_vote(&mut bench.store).await.map_or(0, |v| v.leader_id.term), voted, "seed={seed}");
            }
        }
    });
}

#[test]
fn an_idle_log_lets_go_of_the_ring() {
    run(async {
        let mut bench = Bench::new(1 << 20).await;
        let store = &mut bench.store;
        save_vote(store, Vote::new_committed(1, 1)).await;
        append(store, vec![membership(1, 0, &[1]), normal(1, 1, 100)]).await;
        purge(store, log_id(1, 1)).await;
        append(store, vec![normal(1, 2, 50_000), normal(1, 3, 50_000)]).await;
        let pinned = cut_at(store, &bench.wal, LogIndex(1)).await;
        let oldest = store_pos(store, 2).map(|pos| pos.batch);
        assert_eq!(Some(pinned.batch), oldest, "vote and purge do not stand before the oldest entry any more");

        purge(store, log_id(1, 3)).await;
        let pinned = cut_at(store, &bench.wal, LogIndex(3)).await;
        assert!(pinned.batch.0 > 100_000, "only the copies are left");
        bench.wal.release(pinned.batch);
        let mut bench = bench.crash(1, pinned.batch, 1 << 20).await;
        let store = &mut bench.store;
        assert_eq!(read_vote(store).await, Some(Vote::new_committed(1, 1)));
        assert_eq!((store.purged(), store.last()), (Some(log_id(1, 3)), Some(log_id(1, 3))));
        let (_, m) = store.state_at(LogIndex(3)).expect("anchored");
        assert_eq!(m.membership(), &members(&[1]));
        append(store, vec![normal(1, 4, 10)]).await;
    });
}

fn store_pos(store: &LogStore, index: u64) -> Option<mainstay_wal::RecordPos> {
    store.pos(index)
}

#[test]
fn the_state_can_be_named_before_and_after_an_install_whatever_the_crash_left() {
    run(async {
        let mut bench = Bench::new(1 << 20).await;
        append(&mut bench.store, vec![membership(1, 0, &[1]), normal(1, 1, 10), normal(1, 2, 10)]).await;
        let stored = StoredMembership::new(Some(log_id(4, 80)), members(&[1, 2]));
        let meta = SnapshotMeta { last_log_id: Some(log_id(5, 90)), last_membership: stored.clone() };
        assert!(bench.store.begin_install(&meta, LogIndex(2)).await.expect("durable"));
        let mut bench = bench.crash(3, Lsn(0), 1 << 20).await;
        // The engine had not switched.
        assert_eq!(bench.store.state_at(LogIndex(2)).expect("known").0, Some(log_id(1, 2)));
        // It had.
        assert_eq!(bench.store.state_at(LogIndex(90)).expect("anchored"), (Some(log_id(5, 90)), stored.clone()));
        // openraft then purges up to there; copies forward keep the name.
        purge(&mut bench.store, log_id(5, 90)).await;
        let pinned = cut_at(&bench.store, &bench.wal, LogIndex(90)).await;
        let mut bench = bench.crash(4, pinned.batch, 1 << 20).await;
        assert_eq!(bench.store.state_at(LogIndex(90)).expect("anchored"), (Some(log_id(5, 90)), stored));
        append(&mut bench.store, vec![normal(6, 91, 10)]).await;
        assert_eq!(ids(&mut bench.store).await, [log_id(6, 91)]);
    });
}

#[test]
fn entries_wait_for_space_in_order_and_votes_go_through() {
    run(async {
        let mut bench = Bench::new(64 << 20).await;
        append(&mut bench.store, vec![membership(1, 0, &[1])]).await;
        // More than the ring holds: some are refused, later and smaller ones may not overtake them.
        let mut waits = Vec::new();
        for i in 1..=24 {
            waits.push(queue(&mut bench.store, vec![normal(1, 2 * i - 1, 1 << 20)]).await);
            waits.push(queue(&mut bench.store, vec![normal(1, 2 * i, 10)]).await);
        }
        save_vote(&mut bench.store, Vote::new(2, 2)).await;
        assert!(bench.store.is_stalled());
        assert_eq!(entries(&mut bench.store).await.len(), 49, "all can be read");
        let durable = (0..49).take_while(|i| bench.store.pos(*i).is_some()).count() as u64;
        assert!(durable < 49);
        assert_eq!(
            (durable..49).filter(|i| bench.store.pos(*i).is_some()).count(),
            0,
            "nothing behind the first refused"
        );

        // What a crash finds now is what was acknowledged, in order.
        let upto = durable - 2;
        purge(&mut bench.store, log_id(1, upto)).await;
        let pinned = cut_at(&bench.store, &bench.wal, LogIndex(upto)).await;
        bench.wal.release(pinned.batch);
        bench.store.resume();
        for wait in waits.drain(..waits.len().min(30)) {
            // Those that were purged were told before.
            let _ = wait.await;
        }
        save_vote(&mut bench.store, Vote::new(3, 2)).await;
        let found = ids(&mut bench.store).await;
        let mut bench = bench.crash(9, pinned.batch, 64 << 20).await;
        let after = ids(&mut bench.store).await;
        assert_eq!(after, found[..after.len()]);
        assert!(after.len() > 2, "space was used again");
        assert_eq!(after[0].index, upto + 1);
        assert_eq!(read_vote(&mut bench.store).await, Some(Vote::new(3, 2)));
    });
}

/// What openraft has decided to purge is carried out for it while an entry without room keeps it from doing so; when it comes to it
/// nothing is left to be done.
#[test]
fn a_purge_that_is_carried_out_before_openraft_comes_to_it_makes_room_once() {
    run(async {
        let mut bench = Bench::new(64 << 20).await;
        append(&mut bench.store, vec![membership(1, 0, &[1])]).await;
        let mut waits = Vec::new();
        for i in 1..=18 {
            waits.push(queue(&mut bench.store, vec![normal(1, i, 1 << 20)]).await);
        }
        save_vote(&mut bench.store, Vote::new(1, 2)).await;
        assert!(bench.store.is_stalled());
        let last = waits.pop().expect("eighteen");
        bench.store.purge_to(log_id(1, 10)).expect("open");
        let pinned = cut_at(&bench.store, &bench.wal, LogIndex(10)).await;
        bench.wal.release(pinned.batch);
        bench.store.resume();
        last.await.expect("told").expect("durable");
        assert!(!bench.store.is_stalled());
        for upto in [8, 10] {
            let records = bench.wal.stats().records;
            purge(&mut bench.store, log_id(1, upto)).await;
            save_vote(&mut bench.store, Vote::new(2, upto)).await;
            assert_eq!(bench.wal.stats().records, records + 1, "the vote alone");
            assert_eq!(ids(&mut bench.store).await[0], log_id(1, 11));
        }
    });
}

/// Each attempt names the newest state of a leader, and the tables do not come.
#[test]
fn installs_that_come_to_nothing_can_be_begun_for_ever() {
    run(async {
        let mut bench = Bench::new(1 << 20).await;
        append(&mut bench.store, vec![membership(1, 0, &[1]), normal(1, 1, 10)]).await;
        let stored = StoredMembership::new(Some(log_id(1, 0)), members(&[1]));
        for index in 10..60 {
            let meta = SnapshotMeta { last_log_id: Some(log_id(2, index)), last_membership: stored.clone() };
            assert!(bench.store.begin_install(&meta, LogIndex(1)).await.expect("begun"));
            assert_eq!(bench.store.state_at(LogIndex(index)).expect("named").0, Some(log_id(2, index)));
            assert_eq!(bench.store.state_at(LogIndex(1)).expect("named").0, Some(log_id(1, 1)));
        }
        // One of them was taken over: it stays named while others are begun.
        for index in 70..80 {
            let meta = SnapshotMeta { last_log_id: Some(log_id(2, index)), last_membership: stored.clone() };
            assert!(bench.store.begin_install(&meta, LogIndex(59)).await.expect("begun"));
            assert_eq!(bench.store.state_at(LogIndex(59)).expect("named").0, Some(log_id(2, 59)));
        }
    });
}

/// Whether an offered snapshot is of no use: the log has its last entry and goes on in the term of who offers it.
#[test]
fn a_log_tells_what_it_holds_durably_under_a_vote() {
    run(async {
        let mut bench = Bench::new(1 << 20).await;
        let (vote, other) = (Vote::new_committed(3, 2), Vote::new_committed(4, 1));
        save_vote(&mut bench.store, vote).await;
        append(&mut bench.store, vec![membership(1, 0, &[1]), normal(3, 1, 10), normal(3, 2, 10)]).await;
        assert!(bench.store.holds(&vote, log_id(3, 1)) && bench.store.holds(&vote, log_id(3, 2)));
        assert!(!bench.store.holds(&other, log_id(3, 1)), "of another leader");
        assert!(!bench.store.holds(&vote, log_id(2, 1)) && !bench.store.holds(&vote, log_id(3, 3)));
        purge(&mut bench.store, log_id(3, 1)).await;
        assert!(!bench.store.holds(&vote, log_id(3, 1)), "it is in a snapshot");
    });
}

#[test]
fn a_failed_write_ends_the_log_for_good() {
    run(async {
        let mut bench = Bench::new(1 << 20).await;
        append(&mut bench.store, vec![membership(1, 0, &[1])]).await;
        bench.disk.fail_next(IoKind::DurableWrite);
        let failed = queue(&mut bench.store, vec![normal(1, 1, 10)]).await.await.expect("told");
        assert!(failed.is_err());
        assert!(bench.store.failure().is_some());
        let vote = RaftLogStorage::<Config>::save_vote(&mut bench.store, &Vote::new(9, 1)).await;
        assert!(vote.is_err(), "no vote after a failed write");
        let (tx, _rx) = <TokioRuntime as AsyncRuntime>::Oneshot::channel();
        let again =
            RaftLogStorage::<Config>::append(&mut bench.store, vec![normal(1, 2, 10)], IOFlushed::signal(tx)).await;
        assert!(again.is_err());
    });
}

/// Completes what a disk does at once, or keeps it until it is let go.
#[derive(Default)]
struct Held {
    holding: AtomicBool,
    kept: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl SimScheduler for Held {
    fn after(&self, _delay: Duration, f: Box<dyn FnOnce() + Send>) {
        if self.holding.load(Ordering::Acquire) {
            self.kept.lock().expect("not poisoned").push(f);
        } else {
            // Never inside this call.
            drop(environment().spawner.spawn("completion", Box::pin(async move { f() })));
        }
    }
}

#[test]
fn append_does_not_wait_for_the_device() {
    run(async {
        let held = Arc::new(Held::default());
        let options = SimOptions { capacity: RING_BYTES, ..SimOptions::default() };
        let image = SimDisk::new("wal", options.clone()).image();
        let disk = SimDisk::scheduled("wal", options, image, held.clone(), environment().spawner);
        let mut bench = Bench::open(disk, 1, Lsn(0), 1 << 20).await;
        held.holding.store(true, Ordering::Release);
        let wait = queue(&mut bench.store, vec![normal(1, 0, 10), normal(1, 1, 10)]).await;
        assert_eq!(entries(&mut bench.store).await.len(), 2, "readable while the disk still works");
        assert_eq!(bench.store.pos(1), None, "and not durable");
        held.holding.store(false, Ordering::Release);
        // The write may reach the disk before or after it was let go.
        let mut wait = wait;
        while futures_util::FutureExt::now_or_never(&mut wait).is_none() {
            for f in std::mem::take(&mut *held.kept.lock().expect("not poisoned")) {
                f();
            }
            tokio::task::yield_now().await;
        }
        assert!(bench.store.pos(1).is_some());
    });
}

/// While the engine asks what it may cut, a purge that is on its way to the disk takes the place of the one that was
/// copied for the answer. An answer that counts neither lets the engine cut the copy's original; a power cut before the
/// new one is durable then leaves entries whose beginning nothing explains.
#[test]
fn the_ring_is_not_cut_behind_a_purge_that_is_not_durable_yet() {
    run(async {
        let held = Arc::new(Held::default());
        let options = SimOptions { capacity: RING_BYTES, ..SimOptions::default() };
        let image = SimDisk::new("wal", options.clone()).image();
        let disk = SimDisk::scheduled("wal", options, image, held.clone(), environment().spawner);
        let mut bench = Bench::open(disk, 1, Lsn(0), 1 << 20).await;
        let wal = bench.wal.clone();
        let store = &mut bench.store;
        append(store, vec![membership(1, 0, &[1]), normal(1, 1, 10)]).await;
        purge(store, log_id(1, 1)).await;
        append(store, vec![normal(1, 2, 10), normal(1, 3, 10)]).await;

        held.holding.store(true, Ordering::Release);
        let kept = || held.kept.lock().expect("not poisoned").len();
        let mut pin = store.carry(wal.durable());
        assert!(futures_util::poll!(&mut pin).is_pending());
        while kept() < 1 {
            tokio::task::yield_now().await;
        }
        purge(store, log_id(1, 2)).await;
        while kept() < 2 {
            tokio::task::yield_now().await;
        }
        let batches = wal.stats().batches;
        let copy = held.kept.lock().expect("not poisoned").remove(0);
        copy();
        while wal.stats().batches == batches {
            tokio::task::yield_now().await;
        }
        for _ in 0..1000 {
            assert!(futures_util::poll!(&mut pin).is_pending(), "the purge at 2 is not durable");
            std::thread::yield_now();
        }
        let pinned = loop {
            for f in std::mem::take(&mut *held.kept.lock().expect("not poisoned")) {
                f();
            }
            if let std::task::Poll::Ready(pinned) = futures_util::poll!(&mut pin) {
                break pinned.expect("open").expect("a log");
            }
            tokio::task::yield_now().await;
        };
        held.holding.store(false, Ordering::Release);
        let mut bench = bench.crash(1, pinned.batch, 1 << 20).await;
        assert_eq!(bench.store.purged(), Some(log_id(1, 2)));
        assert_eq!(ids(&mut bench.store).await, [log_id(1, 3)]);
    });
}

#[test]
fn saved_commit_index_is_in_memory_and_clamped() {
    run(async {
        let mut bench = Bench::new(1 << 20).await;
        append(&mut bench.store, vec![membership(1, 0, &[1]), normal(1, 1, 10)]).await;
        let written = bench.wal.stats().records;
        let save = RaftLogStorage::<Config>::save_committed(&mut bench.store, Some(log_id(1, 9))).await;
        save.expect("in memory");
        let read = RaftLogStorage::<Config>::read_committed(&mut bench.store).await.expect("in memory");
        assert_eq!(read, Some(log_id(1, 1)));
        assert_eq!(bench.wal.stats().records, written, "no record was written for it");
    });
}
