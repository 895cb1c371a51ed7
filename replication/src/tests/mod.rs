//! Tests of the log store and the state machine over a simulated disk.
#![allow(clippy::disallowed_methods, reason = "tests over real sockets run on tokio, and their disks on threads")]

mod cluster;
mod conditions;
mod disk;
mod disturb;
mod expiry;
mod full_ring;
mod golden;
mod groups;
mod guarantees;
mod heal;
mod installs;
mod lag;
mod log;
mod machine;
mod members;
mod merges;
mod offers;
mod pipeline;
mod priority;
mod ranges;
mod recover;
mod ring;
mod suite;
mod tcp;
mod version;
mod went_back;
mod wire;
mod witness;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use mainstay_engine::{Applied, Command, LogIndex, OwnerRecord, TableId, TableSource};
use mainstay_io::sim::{SimClock, SimDisk, SimOptions, SimRandom};
use mainstay_io::{BoxFuture, Environment, Spawner, TaskHandle, Zone};
use mainstay_wal::{GroupId, Lsn, Wal, WalOptions};

use crate::log_store::LogStore;
use crate::state_machine::{Exported, Offer, Peers, State};
use crate::types::LogId;
use crate::{Error, ErrorKind, Result};

pub(crate) const GROUP: GroupId = GroupId(1);
pub(crate) const RING_BYTES: u64 = 16 << 20;

pub(crate) struct Threads;

impl Spawner for Threads {
    fn spawn(&self, name: &str, task: BoxFuture<()>) -> TaskHandle {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || mainstay_io::block_on(task)).expect("a test may start a thread");
        Box::pin(async move { thread.join().expect("the task ends") })
    }
}

pub(crate) fn environment() -> Environment {
    // Each has a seed of its own: no two volumes may have one incarnation.
    static SEED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let seed = SEED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    Environment {
        clock: Arc::new(SimClock::new(std::time::Duration::from_secs(1_700_000_000))),
        random: Arc::new(SimRandom::new(seed)),
        spawner: Arc::new(Threads),
    }
}

/// A log on a simulated disk that can be crashed and opened again.
pub(crate) struct Bench {
    pub(crate) disk: SimDisk,
    pub(crate) wal: Wal,
    pub(crate) store: LogStore,
    epoch: u64,
}

impl Bench {
    pub(crate) async fn new(cache_bytes: u64) -> Self {
        Self::of(SimOptions { capacity: RING_BYTES, ..SimOptions::default() }, cache_bytes).await
    }

    pub(crate) async fn of(options: SimOptions, cache_bytes: u64) -> Self {
        Self::open(SimDisk::new("wal", options), 1, Lsn(0), cache_bytes).await
    }

    pub(crate) async fn open(disk: SimDisk, epoch: u64, start: Lsn, cache_bytes: u64) -> Self {
        let zone = Zone::new(disk.device(), 0, disk.device_capacity());
        let mut found = Vec::new();
        let mut deliver = |group, kind, pos, payload| {
            found.push(OwnerRecord { group, kind, pos, payload });
            Ok(())
        };
        let options = WalOptions::new(*b"volume-of-a-test", epoch, start, None);
        let (wal, _) = Wal::open(zone, environment(), options, &mut deliver).await.expect("the log opens");
        let store = LogStore::open(wal.clone(), None, GROUP, found, cache_bytes, Some(LogIndex(0)))
            .expect("the raft log opens");
        Self { disk, wal, store, epoch }
    }

    /// Loses power: what was not durable is lost, torn or kept, as the seed decides.
    pub(crate) async fn crash(self, seed: u64, start: Lsn, cache_bytes: u64) -> Self {
        let image = self.disk.crash(seed);
        self.disk.restart(image);
        Self::open(self.disk, self.epoch + 1, start, cache_bytes).await
    }
}

trait Capacity {
    fn device_capacity(&self) -> u64;
}

impl Capacity for SimDisk {
    fn device_capacity(&self) -> u64 {
        RING_BYTES
    }
}

/// A state that is only a counter: everything applied is flushed at once, so that the suite of openraft, which applies
/// entries that no log holds and snapshots them at once, can drive it.
#[derive(Clone, Default)]
pub(crate) struct Double(Arc<Mutex<u64>>);

impl State for Double {
    async fn apply(&self, index: LogIndex, _command: &Command) -> mainstay_engine::Result<Applied> {
        *self.0.lock().expect("not poisoned") = index.0;
        Ok(Applied { index, response: Ok(Bytes::new()) })
    }

    fn skip(&self, index: LogIndex) {
        *self.0.lock().expect("not poisoned") = index.0;
    }

    fn applied(&self) -> LogIndex {
        LogIndex(*self.0.lock().expect("not poisoned"))
    }

    fn flushed(&self) -> LogIndex {
        self.applied()
    }

    fn export(&self) -> mainstay_engine::Result<Exported> {
        let manifest = Bytes::copy_from_slice(&self.applied().0.to_le_bytes());
        Ok(Exported { flushed: self.applied(), manifest, _pin: None })
    }

    async fn import(
        &self,
        _at: LogIndex,
        manifest: Bytes,
        source: &dyn TableSource,
    ) -> mainstay_engine::Result<LogIndex> {
        source.arrived().await?;
        let index = u64::from_le_bytes(manifest.as_ref().try_into().expect("eight bytes"));
        *self.0.lock().expect("not poisoned") = index;
        Ok(LogIndex(index))
    }
}

/// Nobody to ask.
pub(crate) struct NoPeers;

impl Peers for NoPeers {
    fn read_table(&self, _: u64, _: TableId, _: u64, _: u64) -> BoxFuture<Result<Bytes>> {
        Box::pin(async { Err(Error::new(ErrorKind::Unavailable, "nobody is there")) })
    }

    fn offer(&self, _: Option<LogId>) -> BoxFuture<Result<Offer>> {
        Box::pin(async { Err(Error::new(ErrorKind::Unavailable, "nobody is there")) })
    }

    fn awaited(&self) -> Option<LogId> {
        None
    }

    fn is_closing(&self) -> bool {
        true
    }
}
