//! The state machine where the log and its openraft disagree about how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::{TryStreamExt, stream};
use mainstay_engine::{Applied, Command, JobId, LogIndex, TableId, TableSource};
use mainstay_io::BoxFuture;
use openraft::storage::{RaftLogReader, RaftStateMachine};

use super::{Bench, Double};
use crate::log_store::EntryRequest;
use crate::progress::Progress;
use crate::state_machine::{Exported, Offer, Peers, SnapshotHandle, State, StateMachine};
use crate::types::{Entry, EntryPayload, LogId, SnapshotMeta, StoredMembership, TypeConfig, log_id};
use crate::{Error, ErrorKind, Result, TokioRuntime};

/// As [`Double`], but the tables of the snapshot at 5 have to be fetched, and the command at `blind_at` reads a block that
/// is damaged here.
#[derive(Clone, Default)]
struct Fetching {
    double: Double,
    blind_at: Option<u64>,
}

impl State for Fetching {
    async fn apply(&self, index: LogIndex, command: &Command) -> mainstay_engine::Result<Applied> {
        if self.blind_at == Some(index.0) {
            return Err(mainstay_engine::Error::new(mainstay_engine::ErrorKind::Unavailable, "damaged here"));
        }
        self.double.apply(index, command).await
    }

    fn skip(&self, index: LogIndex) {
        self.double.skip(index);
    }

    fn applied(&self) -> LogIndex {
        self.double.applied()
    }

    fn flushed(&self) -> LogIndex {
        self.double.flushed()
    }

    fn export(&self) -> mainstay_engine::Result<Exported> {
        self.double.export()
    }

    async fn import(
        &self,
        at: LogIndex,
        manifest: Bytes,
        source: &dyn TableSource,
    ) -> mainstay_engine::Result<LogIndex> {
        if manifest == manifest_at(5) {
            let bytes = source.read_table(TableId { job: JobId(1), ordinal: 0 }, 0, 1).await?;
            if bytes != WHOLE {
                return Err(mainstay_engine::Error::new(mainstay_engine::ErrorKind::Corrupt, "another digest"));
            }
        }
        self.double.import(at, manifest, source).await
    }
}

/// What the table holds.
const WHOLE: &[u8] = b"1";

fn manifest_at(index: u64) -> Bytes {
    Bytes::copy_from_slice(&index.to_le_bytes())
}

fn meta_at(index: u64) -> SnapshotMeta {
    SnapshotMeta { last_log_id: Some(log_id(1, index)), last_membership: StoredMembership::default() }
}

/// The sender of the snapshot has dropped its tables; its newer one, at 9, needs none.
struct MovedOn;

impl Peers for MovedOn {
    fn read_table(&self, _: u64, _: TableId, _: u64, _: u64) -> BoxFuture<Result<Bytes>> {
        Box::pin(async { Err(Error::new(ErrorKind::NotFound, "that table is gone")) })
    }

    fn offer(&self, _: Option<LogId>) -> BoxFuture<Result<Offer>> {
        Box::pin(async { Ok(Offer { meta: meta_at(9), manifest: manifest_at(9), from: 2 }) })
    }

    fn awaited(&self) -> Option<LogId> {
        None
    }

    fn is_closing(&self) -> bool {
        false
    }
}

/// The sender of the snapshot has the table, damaged, and so has everybody else; its newer one, at 9, needs none.
struct Rotten;

impl Peers for Rotten {
    fn read_table(&self, _: u64, _: TableId, _: u64, _: u64) -> BoxFuture<Result<Bytes>> {
        Box::pin(async { Ok(Bytes::from_static(b"0")) })
    }

    fn offer(&self, least: Option<LogId>) -> BoxFuture<Result<Offer>> {
        MovedOn.offer(least)
    }

    fn awaited(&self) -> Option<LogId> {
        None
    }

    fn is_closing(&self) -> bool {
        false
    }
}

/// Others have moved on to 9, and openraft has been given a snapshot that ends at `awaited`. Gives up when it was asked some times.
struct Ahead {
    awaited: u64,
    asked: AtomicU64,
}

impl Ahead {
    fn new(awaited: u64) -> Arc<Self> {
        Arc::new(Self { awaited, asked: AtomicU64::new(0) })
    }
}

impl Peers for Ahead {
    fn read_table(&self, from: u64, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        MovedOn.read_table(from, id, offset, length)
    }

    fn offer(&self, least: Option<LogId>) -> BoxFuture<Result<Offer>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        MovedOn.offer(least)
    }

    fn awaited(&self) -> Option<LogId> {
        Some(log_id(1, self.awaited))
    }

    fn is_closing(&self) -> bool {
        self.asked.load(Ordering::Relaxed) >= 3
    }
}

/// openraft takes a failed install for a failed disk, and the node would leave service.
#[test]
fn damage_at_others_does_not_end_an_install() {
    type Config = TypeConfig<TokioRuntime>;
    type Machine = StateMachine<TokioRuntime, Fetching>;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let bench = Bench::new(1 << 20).await;
        let peers = Arc::new(Rotten);
        let mut machine =
            Machine::open(Fetching::default(), bench.store.clone(), peers, Arc::default()).expect("an empty log");
        let handle = SnapshotHandle::Remote { manifest: manifest_at(5), from: 2 };
        RaftStateMachine::<Config>::install_snapshot(&mut machine, &meta_at(5), handle).await.expect("installed");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut machine).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 9)), "the newer one");
    });
}

/// An entry of which only the index matters.
fn entry(index: u64) -> Entry {
    let command = Command { time_ms: 1, body: mainstay_engine::CommandBody::Rotate }.encode().expect("encodes");
    Entry { log_id: log_id(1, index), payload: EntryPayload::Normal(crate::types::Payload::new(command)) }
}

/// A log of so many of them.
async fn bench_with(entries: u64) -> Bench {
    let mut bench = Bench::new(1 << 20).await;
    super::log::append(&mut bench.store, (0..entries).map(entry).collect()).await;
    bench
}

/// The others have compacted away the table that the next entry reads, which is damaged here and nowhere else to be had: the
/// replica goes on with the state of one of them. It waits for one that holds the entry and that its own log reaches.
#[test]
fn an_entry_that_reads_what_nobody_has_any_more_is_taken_over_with_the_state() {
    type Config = TypeConfig<TokioRuntime>;
    type Machine = StateMachine<TokioRuntime, Fetching>;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let bench = bench_with(12).await;
        let blind = || Fetching { blind_at: Some(7), ..Fetching::default() };
        let mut machine =
            Machine::open(blind(), bench.store.clone(), Arc::new(MovedOn), Arc::default()).expect("opens");
        let entries = stream::iter((1..=11).map(|index| Ok((entry(index), None))));
        RaftStateMachine::<Config>::apply(&mut machine, entries).await.expect("applied");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut machine).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 11)), "7 to 9 with the state at 9, the rest as ever");

        // Nobody answers, and the node closes.
        let mut alone =
            Machine::open(blind(), bench.store.clone(), Arc::new(super::NoPeers), Arc::default()).expect("opens");
        let entries = stream::iter((1..=11).map(|index| Ok((entry(index), None))));
        RaftStateMachine::<Config>::apply(&mut alone, entries).await.expect_err("closed while it waited");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut alone).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 6)), "and applied nothing that it could not read");
    });
}

/// A log of so many entries, none of them in memory, of which those at `lost` are damaged, and what is asked of others.
async fn bench_that_lost(entries: u64, lost: &[u64]) -> (Bench, tokio::sync::mpsc::Receiver<EntryRequest>) {
    let mut bench = Bench::new(1).await;
    super::log::append(&mut bench.store, (0..entries).map(entry).collect()).await;
    for &index in lost {
        let pos = bench.store.pos(index).expect("a durable entry");
        let at = pos.batch.0 % super::RING_BYTES + u64::from(pos.offset) + super::heal::RECORD_HEADER_BYTES;
        bench.disk.flip_bit(at, 2);
    }
    let requests = bench.store.entry_requests();
    (bench, requests)
}

/// The node left service for good: no log has the entry that it is to apply next, since all others have it in tables.
#[test]
fn entries_that_no_log_gives_are_taken_over_with_the_state() {
    type Config = TypeConfig<TokioRuntime>;
    type Machine = StateMachine<TokioRuntime, Fetching>;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (bench, mut requests) = bench_that_lost(12, &[6, 7]).await;
        let asked = tokio::spawn(async move {
            let mut asked = Vec::new();
            while let Some(EntryRequest { id, done }) = requests.recv().await {
                asked.push(id.index);
                drop(done);
            }
            asked
        });
        let mut reader = bench.store.clone();
        let mut machine =
            Machine::open(Fetching::default(), bench.store.clone(), Arc::new(MovedOn), Arc::default()).expect("opens");
        let entries = RaftLogReader::<Config>::entries_stream(&mut reader, 1..12).await;
        let entries = entries.map_ok(|entry| (entry, None));
        RaftStateMachine::<Config>::apply(&mut machine, entries).await.expect("applied");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut machine).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 11)), "6 to 9 with the state at 9, the rest as ever");

        // Nobody answers, and the node closes.
        let mut alone =
            Machine::open(Fetching::default(), bench.store.clone(), Arc::new(super::NoPeers), Arc::default())
                .expect("opens");
        let entries = RaftLogReader::<Config>::entries_stream(&mut reader, 1..12).await;
        let entries = entries.map_ok(|entry| (entry, None));
        RaftStateMachine::<Config>::apply(&mut alone, entries).await.expect_err("closed while it waited");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut alone).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 5)), "and nothing took the place of what it could not read");
        drop((reader, machine, alone, bench));
        assert_eq!(asked.await.expect("it ends"), [6, 7, 6]);
    });
}

/// Others that have it only come back later, or have no state that may take the place of this one.
#[test]
fn an_entry_that_is_given_late_is_applied() {
    type Config = TypeConfig<TokioRuntime>;
    type Machine = StateMachine<TokioRuntime, Fetching>;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (bench, mut requests) = bench_that_lost(8, &[6]).await;
        let log = bench.store.clone();
        tokio::spawn(async move {
            let mut asked = 0;
            while let Some(EntryRequest { id, done }) = requests.recv().await {
                asked += 1;
                assert_eq!(log.heal_status().awaited_entry, (asked > 1).then_some(LogIndex(6)));
                if asked == 3 {
                    let _ = done.send(entry(id.index));
                }
            }
        });
        let mut reader = bench.store.clone();
        // The log ends before the state that is offered, which openraft has not asked for.
        let mut machine =
            Machine::open(Fetching::default(), bench.store.clone(), Ahead::new(7), Arc::default()).expect("opens");
        let entries = RaftLogReader::<Config>::entries_stream(&mut reader, 1..8).await;
        let entries = entries.map_ok(|entry| (entry, None));
        RaftStateMachine::<Config>::apply(&mut machine, entries).await.expect("applied");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut machine).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 7)));
        assert_eq!(bench.store.heal_status().awaited_entry, None);
    });
}

/// A replica waited for ever: an entry for a block that is damaged here and that nobody has any more, the install of a snapshot, which the leader
/// had begun to offer, for that entry, and the log for the install, so that no state of another member was one that it reached.
#[test]
fn an_entry_that_cannot_be_read_gives_way_to_the_install_that_waits_behind_it() {
    type Config = TypeConfig<TokioRuntime>;
    type Machine = StateMachine<TokioRuntime, Fetching>;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let bench = bench_with(7).await;
        let blind = || Fetching { blind_at: Some(5), ..Fetching::default() };
        let entries = || stream::iter((1..=6).map(|index| Ok((entry(index), None))));

        // What the log reaches openraft may have by itself: it is no sign that it waits for more.
        let mut machine = Machine::open(blind(), bench.store.clone(), Ahead::new(6), Arc::default()).expect("opens");
        RaftStateMachine::<Config>::apply(&mut machine, entries()).await.expect_err("closed while it waited");

        let progress: Arc<Progress> = Arc::default();
        let mut machine = Machine::open(blind(), bench.store.clone(), Ahead::new(8), progress.clone()).expect("opens");
        RaftStateMachine::<Config>::apply(&mut machine, entries()).await.expect("applied");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut machine).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 9)), "the newer one, with all of the log in it");

        let handle = SnapshotHandle::Remote { manifest: manifest_at(8), from: 2 };
        RaftStateMachine::<Config>::install_snapshot(&mut machine, &meta_at(8), handle).await.expect("it is in there");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut machine).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 9)), "nothing was taken back");
        assert_eq!(progress.applied(), LogIndex(9), "reads wait for no entry behind it");
        let named = RaftStateMachine::<Config>::try_create_snapshot_builder(&mut machine, false).await;
        assert!(named.is_none(), "openraft knows of 8 only");
        RaftStateMachine::<Config>::apply(&mut machine, stream::iter([Ok((entry(9), None))])).await.expect("applied");
        let named = RaftStateMachine::<Config>::try_create_snapshot_builder(&mut machine, false).await;
        assert!(named.is_some(), "openraft has caught up");
    });
}

/// An install that had to take a newer snapshot than openraft asked for puts the tables at 9 while openraft knows of 5.
/// A snapshot named then would be at 9, beyond what openraft knows to be applied, and stops it in a panic.
#[test]
fn no_snapshot_is_named_before_openraft_has_caught_up_with_an_install() {
    type Config = TypeConfig<TokioRuntime>;
    type Machine = StateMachine<TokioRuntime, Fetching>;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let bench = Bench::new(1 << 20).await;
        let peers = Arc::new(MovedOn);
        let mut machine =
            Machine::open(Fetching::default(), bench.store.clone(), peers, Arc::default()).expect("an empty log");
        let handle = SnapshotHandle::Remote { manifest: manifest_at(5), from: 2 };
        RaftStateMachine::<Config>::install_snapshot(&mut machine, &meta_at(5), handle).await.expect("installed");
        let (applied, _) = RaftStateMachine::<Config>::applied_state(&mut machine).await.expect("known");
        assert_eq!(applied, Some(log_id(1, 9)), "the newer one");
        for index in 6..=9 {
            let builder = RaftStateMachine::<Config>::try_create_snapshot_builder(&mut machine, false).await;
            assert!(builder.is_none(), "openraft knows of {} only", index - 1);
            let entry = Entry { log_id: log_id(1, index), payload: EntryPayload::Blank };
            let entries = stream::iter([Ok((entry, None))]);
            RaftStateMachine::<Config>::apply(&mut machine, entries).await.expect("applied");
        }
        let builder = RaftStateMachine::<Config>::try_create_snapshot_builder(&mut machine, false).await;
        assert!(builder.is_some(), "openraft has caught up");
    });
}
