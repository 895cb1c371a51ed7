//! A volume opened: its log, its extents, its groups.
//!
//! # Place
//! below `LocalLog` and `replication`, which own the entries in the log; above `volume` and `wal`
//! # Crash
//! docs/architecture.md, "Restart": pages, then the edits found in the log, then the entries, which the owner
//! applies again. Extents that no manifest names are free

mod mend;
mod offline;
mod pages;
mod upkeep;

pub use self::offline::{GroupInfo, Offline, SuperblockInfo, TableInfo, VerifyReport, VersionSetInfo};

#[cfg(test)]
pub(crate) use self::pages::{PAGES_VERSION, decode_pages};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::{Backend, BoxFuture, Environment, Media, Spawner, TaskHandle};
use mainstay_wal::{GroupId, Lsn, RecordKind, RecordPos, Wal, WalOptions};
use tokio::sync::Notify;

use crate::cache::BlockCache;
use crate::events::Teller;
use crate::group::{GroupShared, MANIFEST_EDIT, Recovered};
use crate::heal::{GroupHeal, HealCounts};
use crate::manifest::{Manifest, Places};
use crate::memory::{MemoryBudget, MemoryKind};
use crate::stats::StatsCounts;
use crate::stored::{StoredBytes, StoredTable, extents_of};
use crate::volume::Volume;
use crate::{EngineStats, Error, ErrorKind, Events, Group, GroupSettings, HealStatus, Result, TableId};

/// Memtables may hold this much of the memory budget: so many parts in four.
const MEMTABLE_QUARTERS: u64 = 2;
/// Background tasks at most.
const BACKGROUND_TASKS_MAX: usize = 64;

/// Settings of one replica; may differ between replicas.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Bytes for memtables, block cache, filters and buffers together, with what the allocator keeps for them.
    pub memory_bytes: u64,
    /// Background tasks for flush and compaction. Default 1.
    pub background_tasks: usize,
    /// Batches of the log in flight.
    pub wal_in_flight_max: usize,
    /// Bytes a second that the scrubber reads at most; 0 for no scrubber. See [`SCRUB_BYTES_PER_SECOND`].
    pub scrub_bytes_per_second: u64,
    /// Pause between two passes of the scrubber. See [`SCRUB_PAUSE`].
    pub scrub_pause: Duration,
    /// The owner of the log can get damaged records from elsewhere: they are delivered as [`RecordKind::HOLE`]. Without it
    /// the volume does not open then.
    pub log_holes: bool,
}

/// What the scrubber reads a second unless it is told otherwise: 10 GiB in an hour and a half, and less than a hundredth of
/// what an ordinary disk reads.
pub const SCRUB_BYTES_PER_SECOND: u64 = 2 << 20;

/// Pause between two passes of the scrubber unless it is told otherwise: a small store is not read over and over.
pub const SCRUB_PAUSE: Duration = Duration::from_secs(10);

/// Whom this volume answers as; all zero until `init` or `join`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Minted once by `init`.
    pub cluster: [u8; 16],
    /// The Raft node id under which this volume was admitted; never used for another volume.
    pub node: u64,
}

/// A record of the owner of a group's log, found at open; or, with [`RecordKind::HOLE`], that records of any group are lost.
#[derive(Clone, Debug)]
pub struct OwnerRecord {
    /// The group.
    pub group: GroupId,
    /// Its kind, at least [`RecordKind::OWNER_FIRST`].
    pub kind: RecordKind,
    /// Where it lies.
    pub pos: RecordPos,
    /// Its payload.
    pub payload: Bytes,
}

/// What `status` shows of a volume.
#[derive(Clone, Debug, Default)]
pub struct EngineStatus {
    /// `uring`, `threads` or `sim`.
    pub backend: String,
    /// Why it is not the one asked for.
    pub fallback_reason: Option<String>,
    /// Bytes of extents in use.
    pub extent_bytes: u64,
    /// Records of the log made durable since it was opened.
    pub wal_records: u64,
    /// Bytes of the log in use, and of the ring.
    pub wal_used_bytes: u64,
    /// See `wal_used_bytes`.
    pub wal_ring_bytes: u64,
    /// Bytes of memory in use, of the setting without the allocator's share.
    pub memory_used_bytes: u64,
    /// The setting: [`EngineSettings::memory_bytes`].
    pub memory_bytes: u64,
    /// What of the setting is left to the allocator.
    pub memory_allocator_bytes: u64,
    /// Why the volume takes no writes, if so.
    pub read_only: Option<String>,
    /// Damage found and mended.
    pub heal: HealStatus,
    /// Bytes written by cause, and what writers waited for.
    pub stats: EngineStats,
}

/// An open volume. Cloning gives another handle. When the last is dropped without [`Engine::close`], the background tasks
/// end as if the process had been killed.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<EngineShared>,
    _closer: Arc<Closer>,
}

/// Ends the tasks when the last handle is gone.
struct Closer(Arc<EngineShared>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.end_tasks();
        self.0.events.end();
        // The groups hold the engine: without this neither would ever be dropped.
        self.0.groups().clear();
        self.0.pins.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// A group of the volume.
pub(crate) enum Slot {
    /// Found, and nobody has asked for it yet.
    Found(Box<Recovered>),
    Open(Arc<GroupShared>),
}

/// What the handles, the groups and the tasks share.
pub(crate) struct EngineShared {
    pub(crate) environment: Environment,
    pub(crate) volume: Volume,
    wal: Wal,
    /// The setting; the budget is what may be counted of it.
    memory_bytes: AtomicU64,
    pub(crate) budget: Arc<MemoryBudget>,
    pub(crate) cache: Arc<BlockCache>,
    pub(crate) heal: Arc<HealCounts>,
    pub(crate) stats: StatsCounts,
    pub(crate) events: Arc<Teller>,
    groups: Mutex<BTreeMap<GroupId, Slot>>,
    /// The oldest record of each group that nobody has asked for and of which the manifest knows nothing yet.
    unknown: Mutex<BTreeMap<GroupId, RecordPos>>,
    pins: Mutex<BTreeMap<GroupId, Arc<dyn OwnerPin>>>,
    tasks: Mutex<Vec<TaskHandle>>,
    /// There may be a job to run.
    pub(crate) work: Notify,
    /// There may be pages to write, log to cut or extents to let go.
    upkeep: Notify,
    pages: tokio::sync::Mutex<()>,
    pages_wanted: AtomicBool,
    /// Groups whose installs are to be offered again behind the next purge.
    offer_again: Mutex<Vec<Weak<GroupShared>>>,
    /// Where the log ended when it was last cut.
    purged_at: AtomicU64,
    /// The last purge failed: nobody waits for the next one.
    purge_failed: AtomicBool,
    /// Bytes of the log are damaged there, and it has not been cut behind them yet.
    log_damage: Mutex<Option<Lsn>>,
    full: AtomicBool,
    retry: AtomicBool,
    closing: AtomicBool,
    /// Told when `closing` is set.
    ended: Notify,
}

impl Engine {
    /// Lays out a new volume on a blank target and makes it durable.
    ///
    /// # Errors
    /// `Invalid` when the target holds data (unless `force`) or is too small, `Locked`, `Io`.
    pub async fn format(media: Arc<dyn Media>, environment: &Environment, wal_bytes: u64, force: bool) -> Result<()> {
        Volume::format(&*media, environment, wal_bytes, force).await
    }

    /// Opens a volume: superblock, manifest pages, log. `deliver` gets the owner's records in log order.
    ///
    /// # Errors
    /// `Foreign`, `Corrupt`, `Locked`, `Io`.
    pub async fn open(
        media: Arc<dyn Media>,
        environment: Environment,
        settings: EngineSettings,
        deliver: &mut (dyn FnMut(OwnerRecord) -> Result<()> + Send),
    ) -> Result<Self> {
        let (volume, found) = Volume::open(media, &environment).await?;
        let superblock = volume.superblock();
        let mut bad_pages = 0;
        let mut groups: BTreeMap<GroupId, Option<Recovered>> = match &superblock.root {
            Some(root) => {
                let (groups, bad) = pages::read_pages(&volume, root).await?;
                bad_pages = bad;
                groups.into_iter().map(|(id, r)| (id, Some(r))).collect()
            }
            None => BTreeMap::new(),
        };
        let mut options = WalOptions::new(superblock.volume, superblock.epoch, superblock.wal_start, found.clean_end);
        options.closed = found.closed;
        options.in_flight_max = settings.wal_in_flight_max;
        options.holes = settings.log_holes;
        // The error of a record keeps its kind on its way through the log.
        let mut failed = None;
        let mut oldest: BTreeMap<GroupId, RecordPos> = BTreeMap::new();
        let mut sort = |group, kind: RecordKind, pos, payload: Bytes| -> Result<()> {
            if kind == RecordKind::HOLE {
                return deliver(OwnerRecord { group, kind, pos, payload });
            }
            if kind.0 >= RecordKind::OWNER_FIRST {
                oldest.entry(group).or_insert(pos);
                return deliver(OwnerRecord { group, kind, pos, payload });
            }
            if kind != MANIFEST_EDIT {
                return Err(Error::new(ErrorKind::Foreign, format!("a record of an unknown kind kind={}", kind.0)));
            }
            Recovered::apply_edit(groups.entry(group).or_default(), group, payload)
        };
        let opened = Wal::open(volume.wal_zone(), environment.clone(), options, &mut |group, kind, pos, payload| {
            sort(group, kind, pos, payload).map_err(|error| {
                let stop = mainstay_io::Error::new(mainstay_io::ErrorKind::Closed, "deliver", 0, 0, error.to_string());
                failed.get_or_insert(error);
                stop.into()
            })
        })
        .await;
        let (wal, _) = match (opened, failed) {
            (Ok(opened), _) => opened,
            (Err(_), Some(error)) => return Err(error),
            (Err(error), None) => return Err(error.into()),
        };
        let mut live = Vec::new();
        let mut slots = BTreeMap::new();
        for (id, found) in groups {
            let Some(mut found) = found else { continue };
            // Only what the manifest still names: a job's input may have been replaced by the last edits.
            let named = found.manifest.tables();
            found.places.retain(|id, _| named.contains_key(id));
            for place in found.places.values() {
                live.extend(extents_of(place)?);
            }
            found.oldest = oldest.remove(&id);
            slots.insert(id, Slot::Found(Box::new(found)));
        }
        volume.set_live(live)?;
        let budget = MemoryBudget::new(crate::memory::countable(settings.memory_bytes));
        let cache = BlockCache::new(&budget);
        let events = Arc::<Teller>::default();
        let shared = Arc::new(EngineShared {
            // All that is found may be due to be cut.
            purged_at: AtomicU64::new(wal.start().0),
            environment,
            volume,
            wal,
            memory_bytes: AtomicU64::new(settings.memory_bytes),
            budget,
            cache,
            heal: Arc::new(HealCounts { events: events.clone(), ..HealCounts::default() }),
            stats: StatsCounts::default(),
            events,
            groups: Mutex::new(slots),
            unknown: Mutex::new(oldest),
            pins: Mutex::default(),
            tasks: Mutex::default(),
            work: Notify::new(),
            upkeep: Notify::new(),
            pages: tokio::sync::Mutex::default(),
            pages_wanted: AtomicBool::new(false),
            offer_again: Mutex::default(),
            purge_failed: AtomicBool::new(false),
            log_damage: Mutex::default(),
            full: AtomicBool::new(false),
            retry: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            ended: Notify::new(),
        });
        if bad_pages > 0 {
            tracing::warn!(copies = bad_pages, "a copy of the manifest pages is damaged: they are written again");
            shared.heal.pages_healed.fetch_add(1, Ordering::Relaxed);
            shared.want_pages();
        }
        let spawner = &shared.environment.spawner;
        let mut tasks = vec![spawner.spawn("mainstay-upkeep", Box::pin(shared.clone().keep_up()))];
        for n in 0..settings.background_tasks.clamp(1, BACKGROUND_TASKS_MAX) {
            let jobs = Box::pin(shared.clone().work_on_jobs());
            tasks.push(spawner.spawn_background(&format!("mainstay-job-{n}"), jobs));
        }
        tasks.push(spawner.spawn("mainstay-mend", Box::pin(shared.clone().mend())));
        if settings.scrub_bytes_per_second > 0 {
            let scrub = shared.clone().scrub(settings.scrub_bytes_per_second, settings.scrub_pause);
            tasks.push(spawner.spawn_background("mainstay-scrub", Box::pin(scrub)));
        }
        *shared.tasks.lock().unwrap_or_else(PoisonError::into_inner) = tasks;
        Ok(Self { _closer: Arc::new(Closer(shared.clone())), shared })
    }

    /// The log, for the owner of the groups' entries.
    pub fn wal(&self) -> &Wal {
        self.shared.wal()
    }

    /// Opens or makes a group. One handle a group: a second call gives a clone of the first. The settings of a group are
    /// fixed when it is made.
    ///
    /// # Errors
    /// `Corrupt` when what the manifest says of a table cannot be; `Closed`.
    pub async fn group(&self, id: GroupId, settings: GroupSettings) -> Result<Group> {
        let mut groups = self.shared.groups();
        if self.shared.is_closing() {
            return Err(Error::new(ErrorKind::Closed, "the engine is closed"));
        }
        let found = match groups.remove(&id) {
            Some(Slot::Open(group)) => {
                groups.insert(id, Slot::Open(group.clone()));
                return Ok(Group::new(group));
            }
            Some(Slot::Found(found)) => Some(found),
            None => None,
        };
        let group = match GroupShared::open(id, self.shared.clone(), settings, found.as_deref().cloned()) {
            Ok(group) => group,
            Err(error) => {
                // It is on the volume as before: pages that are written without it would lose it.
                groups.extend(found.map(|found| (id, Slot::Found(found))));
                return Err(error);
            }
        };
        groups.insert(id, Slot::Open(group.clone()));
        self.shared.unknown.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        drop(groups);
        self.shared.work.notify_one();
        Ok(Group::new(group))
    }

    /// The id made with this volume.
    pub fn incarnation(&self) -> [u8; 16] {
        self.shared.volume.superblock().incarnation
    }

    /// Whom the volume answers as.
    pub fn identity(&self) -> Identity {
        Identity::from_bytes(self.shared.volume.superblock().identity)
    }

    /// Makes a new identity durable. Refused once one is set, unless it is the same.
    ///
    /// # Errors
    /// `Invalid` when the volume answers as someone else already; `Io`, `Closed`.
    pub async fn set_identity(&self, identity: Identity) -> Result<()> {
        // Two calls at once: the superblock decides which came first.
        let bytes = identity.to_bytes();
        self.shared
            .volume
            .update(move |superblock| {
                if superblock.identity == [0; 32] {
                    superblock.identity = bytes;
                }
            })
            .await?;
        if self.identity() == identity {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Invalid, "the volume answers as another node already; format it to use it anew"))
    }

    /// Tells which records of a group the owner of its log still needs: what lies before the oldest of all groups is not kept,
    /// and of a group without a pin everything is. When it purges the engine asks all owners first what has to stay ([`OwnerPin::pin`]), then
    /// each to carry what is small behind the oldest of that ([`OwnerPin::carry`]): a record that is carried without need fills the ring.
    pub fn set_owner_pin(&self, group: GroupId, pin: Arc<dyn OwnerPin>) {
        self.shared.pins.lock().unwrap_or_else(PoisonError::into_inner).insert(group, pin);
    }

    /// What the owners of the groups' logs keep beside the ring.
    pub fn owner_notes(&self) -> OwnerNotes {
        OwnerNotes(self.shared.volume.clone())
    }

    /// Counts and states.
    pub fn status(&self) -> EngineStatus {
        let shared = &self.shared;
        let (backend, fallback_reason) = shared.volume.media().backend();
        let backend = match backend {
            Backend::Uring => "uring",
            Backend::Threads => "threads",
            Backend::Sim => "sim",
        };
        let memory_bytes = shared.memory_bytes.load(Ordering::Relaxed);
        let wal = shared.wal().stats();
        let poisoned = shared.volume.media().devices().iter().find_map(|device| device.poisoned());
        let full = shared.space_is_short().then(|| "the volume is full".to_owned());
        EngineStatus {
            backend: backend.into(),
            fallback_reason,
            extent_bytes: shared.volume.live_bytes(),
            wal_records: wal.records,
            wal_used_bytes: wal.used_bytes,
            wal_ring_bytes: wal.ring_bytes,
            memory_used_bytes: shared.budget.used(),
            memory_bytes,
            memory_allocator_bytes: memory_bytes.saturating_sub(shared.budget.total()),
            read_only: poisoned.map(|error| error.to_string()).or(full),
            stats: shared.stats.snapshot(wal.written_bytes),
            heal: shared.heal.status(shared.open_groups().iter().map(|group| group.heal.damaged_count()).sum()),
        }
    }

    /// Sets [`EngineSettings::memory_bytes`] anew. Less takes blocks out of the cache before it returns; memtables over their share are
    /// flushed, and writers wait for that.
    pub fn set_memory_bytes(&self, bytes: u64) {
        self.shared.memory_bytes.store(bytes, Ordering::Relaxed);
        self.shared.budget.set_total(crate::memory::countable(bytes));
        // Who waits for memory may have it.
        self.shared.open_groups().iter().for_each(|group| group.wake());
    }

    /// Listens to what happens behind the writes from now on: flushes, compactions, waits, space, damage. A listener that does not listen loses
    /// events and hears how many.
    pub fn events(&self) -> Events {
        self.shared.events.listen()
    }

    /// Ends the background tasks, writes the manifest pages, cuts the log and marks the volume clean. The owner has stopped
    /// applying; what it wants flushed it has rotated and waited for.
    ///
    /// # Errors
    /// `Io`, `Closed`, `OutOfSpace`: the volume is as after a kill, and nothing acknowledged is lost.
    pub async fn close(&self) -> Result<()> {
        let shared = &self.shared;
        if !shared.await_tasks().await {
            return Ok(());
        }
        let purged = shared.purge().await;
        let end = shared.wal().close().await?;
        purged?;
        let ended = move |superblock: &mut crate::volume::Superblock| {
            superblock.clean_end = Some(end);
            superblock.closed = true;
        };
        shared.volume.update(ended).await?;
        shared.give_up_volume().await
    }

    /// Ends the background tasks and leaves the volume as a kill would, for an owner that could not begin: it can be opened again
    /// when this returns.
    ///
    /// # Errors
    /// `Io`, `Closed`: nothing acknowledged is lost.
    pub async fn abandon(&self) -> Result<()> {
        if !self.shared.await_tasks().await {
            return Ok(());
        }
        self.shared.wal().close().await?;
        self.shared.give_up_volume().await
    }

    pub(crate) fn shared_ref(&self) -> &Arc<EngineShared> {
        &self.shared
    }

    pub(crate) fn spawner(&self) -> &Arc<dyn Spawner> {
        &self.shared.environment.spawner
    }
}

impl Engine {
    /// True while there was no space for tables when it was last asked for: writes are refused, reads go on.
    pub fn is_full(&self) -> bool {
        self.shared.space_is_short()
    }

    /// Has the log cut when half of its ring is used. For the owner of a log whose entries come from elsewhere: nothing else looks
    /// at it while they are appended.
    pub fn check_log(&self) {
        self.shared.check_log();
    }

    /// True while bytes of the log are damaged and it waits to be cut behind them: an owner keeps nothing there that tables hold.
    pub fn log_is_damaged(&self) -> bool {
        self.shared.log_damage.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// For an owner whose records find no space in the log: asks for the log to be cut if more than half of it is used. It
    /// happens in the background.
    pub fn relieve_log(&self) {
        self.shared.relieve_log();
    }
}

impl EngineShared {
    pub(crate) fn wal(&self) -> &Wal {
        &self.wal
    }

    fn groups(&self) -> MutexGuard<'_, BTreeMap<GroupId, Slot>> {
        // Every change is an insert or a remove.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_groups(&self) -> Vec<Arc<GroupShared>> {
        let groups = self.groups();
        let open = groups.values().filter_map(|slot| match slot {
            Slot::Open(group) => Some(group.clone()),
            Slot::Found(_) => None,
        });
        open.collect()
    }

    /// Bytes of the extents of the manifest pages.
    #[cfg(test)]
    pub(crate) fn root_bytes(&self) -> u64 {
        self.volume.superblock().root.map_or(0, |root| crate::volume::extents_bytes(&root.extents))
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn end_tasks(&self) {
        self.closing.store(true, Ordering::Release);
        self.ended.notify_waiters();
        self.open_groups().iter().for_each(|group| group.wake());
        self.work.notify_one();
        self.upkeep.notify_one();
    }

    /// Ends the tasks and waits for them. False when somebody did before.
    async fn await_tasks(&self) -> bool {
        self.end_tasks();
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let had_some = !tasks.is_empty();
        for task in tasks {
            task.await;
        }
        had_some
    }

    /// The last step of a close.
    async fn give_up_volume(&self) -> Result<()> {
        self.volume.quiet().await;
        self.events.end();
        self.volume.shutdown().await
    }

    /// True while memtables hold more than their part of the memory.
    pub(crate) fn memtables_are_over(&self) -> bool {
        self.budget.reserved(MemoryKind::Memtable) > self.budget.total() / 4 * MEMTABLE_QUARTERS
    }

    /// Opens the tables that a manifest names, without reading them.
    pub(crate) fn open_tables(
        &self,
        manifest: &Manifest,
        mut places: Places,
        heal: &Arc<GroupHeal>,
    ) -> Result<BTreeMap<TableId, StoredTable>> {
        let open = |(id, meta): (TableId, crate::manifest::TableRef)| {
            let place = places.remove(&id).filter(|place| !place.is_empty()).ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, format!("the manifest does not say where a table lies table={id}"))
            })?;
            let bytes = StoredBytes::new(self.volume.clone(), extents_of(&place)?, meta.bytes);
            Ok((id, StoredTable::open(meta, bytes, &self.cache, &self.budget, Some(heal))?))
        };
        manifest.tables().into_iter().map(open).collect()
    }
}

impl Identity {
    fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.cluster);
        bytes[16..24].copy_from_slice(&self.node.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 32]) -> Self {
        let (cluster, rest) = bytes.split_first_chunk().expect("16 of 32 bytes");
        let (node, _) = rest.split_first_chunk().expect("8 of 16 bytes");
        Self { cluster: *cluster, node: u64::from_le_bytes(*node) }
    }
}

/// A note for each group, in the superblock: for the few bytes that the owner of a log has to make durable although its ring has no room. Each
/// takes the place of the one before it. Costs an update of the superblock, which is two writes, one behind the other.
#[derive(Clone, Debug)]
pub struct OwnerNotes(Volume);

impl OwnerNotes {
    /// The note of a group, as it is durable.
    pub fn get(&self, group: GroupId) -> Option<Bytes> {
        self.0.note(group.0)
    }

    /// Makes the note of a group durable, of at most 32 bytes.
    ///
    /// # Errors
    /// `OutOfSpace`: it is too long, or there is no room for those of all groups together; nothing was changed. `Io`, `Closed`: no later one is
    /// made durable either.
    /// # Cancel safety
    /// A dropped future does not stop it.
    pub fn put(&self, group: GroupId, note: Bytes) -> BoxFuture<Result<()>> {
        self.0.put_note(group.0, note)
    }

    /// The note of a group is needed no more: it goes with the next update of the superblock, whatever that is for.
    pub fn forget(&self, group: GroupId) {
        self.0.forget_note(group.0);
    }
}

/// How the owner of a group's log takes part in purging the ring.
pub trait OwnerPin: Send + Sync + 'static {
    /// The ring is about to be cut: entries of the group up to `flushed` are in tables. Purges, and tells the oldest record that stays
    /// where it is.
    fn pin(&self, flushed: crate::LogIndex) -> BoxFuture<Option<RecordPos>>;

    /// No group has a record before `floor` that stays where it is. Copies forward what is small and lies before it, and returns the oldest
    /// record that the owner still needs.
    fn carry(&self, floor: Lsn) -> BoxFuture<Result<Option<RecordPos>>>;
}
