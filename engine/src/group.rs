//! One replicated state: applies entries, serves snapshots, flushes and compacts.
//!
//! # Place
//! one writer (the applier of its log) calls [`Group::apply`]; any number of readers; jobs run on the tasks of
//! the engine. Locks, in order: `core`, `durable`; none is held across an await
//! # Invariants docs/architecture.md, "A group and its log"; those of each step stand in `core`, `apply`, `present`, `jobs`

mod apply;
mod core;
mod jobs;
mod judge;
mod mend;
mod present;
mod transfer;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::select;
use mainstay_io::BoxFuture;
use mainstay_wal::GroupId;
use tokio::sync::Notify;

use self::core::{Core, Structure, checkpoint_views, expiring, operators};
pub(crate) use self::core::{Names, Views};
pub(crate) use self::jobs::{JobClass, Run};
pub(crate) use self::mend::{CHECK_READ_BYTES, digest_of};
use self::present::Durable;
#[cfg(test)]
pub(crate) use self::present::{
    EDIT_VERSION, EDIT_VERSION_EXPIRING, EDIT_VERSION_OPERATORS, EDIT_VERSION_PARTS, EDIT_VERSION_RANGED,
    EDIT_VERSION_SHAPED,
};
pub(crate) use self::present::{MANIFEST_EDIT, Recovered};
#[cfg(test)]
pub(crate) use self::transfer::EXPORT_VERSION;
pub use self::transfer::Export;
use self::transfer::Pins;
use crate::engine::EngineShared;
use crate::expiry::{ReadAt, Times};
use crate::heal::{GroupHeal, TablePeers};
use crate::manifest::{Manifest, ManifestSettings};
use crate::{
    BranchId, BranchInfo, CheckpointInfo, Command, Error, ErrorKind, EventKind, JobId, KeyspaceId, KeyspaceOptions,
    LogIndex, MergeOperators, OperatorId, Result, Snapshot, StallCause, StateMachine, TableCompression, TableId,
};

/// Frozen generations above which writers wait.
const FROZEN_GENERATIONS_MAX: usize = 4;
/// L0 runs above which writers wait, as a multiple of those at which compaction starts.
const L0_STALL_FACTOR: usize = 6;

/// Settings that must be equal on all replicas of a group.
#[derive(Clone)]
pub struct GroupSettings {
    /// Bytes applied between two rotations.
    pub memtable_bytes: u64,
    /// Size at which a compaction output is cut.
    pub table_bytes: u64,
    /// Bytes of the first level below L0.
    pub base_level_bytes: u64,
    /// L0 runs at which compaction starts.
    pub l0_compaction_runs: usize,
    /// How tables are compressed.
    pub compression: TableCompression,
    /// The embedder's own; answers `Custom` commands.
    pub state_machine: Option<Arc<dyn StateMachine>>,
    /// The merge operators that keyspaces have or may be given.
    pub merge_operators: MergeOperators,
}

/// What applying an entry gave.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The entry.
    pub index: LogIndex,
    /// The answer: of the state machine for `Custom`, an id for `CreateKeyspace`, empty for the others. A refusal (an
    /// unknown keyspace, a name that is taken) is an `Err` here and the same on every replica.
    pub response: Result<Bytes>,
}

/// Counts and states of a group.
#[derive(Clone, Debug, Default)]
pub struct GroupStatus {
    /// Entries up to here are applied.
    pub applied: LogIndex,
    /// Entries up to here are in tables.
    pub flushed: LogIndex,
    /// Generations frozen and not yet in tables.
    pub frozen_generations: u64,
    /// Jobs whose outputs the logical manifest has and this volume has not.
    pub absent_jobs: u64,
    /// Tables named by the present manifest, and their bytes.
    pub tables: u64,
    /// See `tables`.
    pub table_bytes: u64,
    /// Digest over all tables of the logical manifest, for comparison between replicas at one index.
    pub digest: u128,
    /// The index of the last entry that changed the logical manifest.
    pub digest_index: LogIndex,
    /// Tables whose digest differed from the leader's.
    pub divergences: u64,
    /// Installs of the log that the manifest refused since the volume was opened: the flush or compaction that they were of does not end.
    /// None, unless the engine that wrote them has a defect.
    pub refused_installs: u64,
    /// The next entry reads a block that is damaged here and that no other replica has given yet.
    pub applier_waits: bool,
    /// This replica made other tables than the log says and has not fetched those yet: what it reads may be wrong.
    pub diverged: bool,
    /// Jobs that failed and are tried again.
    pub jobs_retrying: u64,
    /// Jobs that failed for good, until the volume is opened anew.
    pub jobs_failed: u64,
    /// Tables damaged now.
    pub tables_damaged: u64,
}

/// Where a receiver gets tables that it does not hold.
pub trait TableSource: Send + Sync {
    /// Bytes `offset..offset + length` of a table.
    fn read_table(&self, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>>;

    /// All tables are here, and the state is replaced next: what the owner wants durable before that it makes durable now. With an error
    /// nothing is replaced.
    fn arrived(&self) -> BoxFuture<Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A writer that waits; it ends when this is dropped, also by a caller that waits no longer.
struct Stall<'a> {
    group: &'a GroupShared,
    cause: StallCause,
    began: Duration,
}

impl<'a> Stall<'a> {
    fn begin(group: &'a GroupShared, cause: StallCause) -> Self {
        group.engine.events.tell(Some(group.id), || EventKind::StallBegun { cause });
        Self { group, cause, began: group.engine.environment.clock.now() }
    }
}

impl Drop for Stall<'_> {
    fn drop(&mut self) {
        let (engine, cause) = (&self.group.engine, self.cause);
        let took = engine.environment.clock.now().saturating_sub(self.began);
        engine.stats.stalled(cause, took);
        engine.events.tell(Some(self.group.id), || EventKind::StallEnded { cause, took });
    }
}

/// Refuses a state with a keyspace whose merge operator is not registered.
fn require_operators(manifest: &Manifest, operators: &MergeOperators) -> Result<()> {
    manifest.operators.iter().try_for_each(|(id, assigned)| {
        let name = manifest.keyspaces.get(id).map_or_else(|| id.to_string(), |keyspace| keyspace.name.clone());
        operators.require(&assigned.operator, &name).map(drop)
    })
}

/// A group. Cloning gives another handle.
#[derive(Clone)]
pub struct Group(Arc<GroupShared>);

/// What the handles of a group share.
pub(crate) struct GroupShared {
    id: GroupId,
    engine: Arc<EngineShared>,
    state_machine: Option<Arc<dyn StateMachine>>,
    core: Mutex<Core>,
    /// The time of the log at the latest entries: written before `applied`.
    times: Times,
    /// See `core`, invariant 2, for the order in which these two are written and read.
    applied: AtomicU64,
    structure: ArcSwap<Structure>,
    /// Of the durable present manifest.
    flushed: AtomicU64,
    frozen: AtomicUsize,
    l0_runs: AtomicUsize,
    l0_runs_max: usize,
    divergences: AtomicU64,
    refused_installs: AtomicU64,
    applier_waits: AtomicBool,
    /// Set while jobs of `Core::diverged` are to be fetched.
    diverged: AtomicBool,
    pub(crate) heal: Arc<GroupHeal>,
    durable: Mutex<Durable>,
    /// Why nothing is applied any more.
    failed: OnceLock<Error>,
    /// The flushed index, memory or space has changed.
    progress: Notify,
    /// There may be something to propose.
    offers: Notify,
    /// The applied index has grown.
    applies: Notify,
    pins: Mutex<Vec<Weak<Pins>>>,
}

impl GroupShared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        // A panic while it was held is a failed assertion about the state: whoever comes next must not build on it.
        self.core.lock().expect("no step of the group has failed half way")
    }

    pub(crate) fn id(&self) -> GroupId {
        self.id
    }

    pub(crate) fn applied(&self) -> LogIndex {
        LogIndex(self.applied.load(Ordering::Acquire))
    }

    fn check_alive(&self) -> Result<()> {
        match self.failed.get() {
            None => Ok(()),
            Some(error) => Err(Error::new(ErrorKind::Closed, format!("the group is closed: {error}"))),
        }
    }

    /// The present manifest with the places of its tables, the flushed index in it, and its lineage.
    pub(crate) fn pages(&self) -> (u64, Manifest, crate::manifest::Places) {
        let core = self.lock();
        (core.lineage, core.present.clone(), core.places())
    }

    pub(crate) fn present_flushed(&self) -> LogIndex {
        self.lock().present.flushed()
    }

    /// True when nothing frozen waits for its flush.
    pub(crate) fn is_settled(&self) -> bool {
        self.lock().frozen_generations() == 0
    }

    pub(crate) fn snapshot_of(&self, branch: BranchId) -> Result<Snapshot> {
        let mut structure = self.structure.load();
        loop {
            let at = self.times.read(|| self.applied());
            let again = self.structure.load();
            if !Arc::ptr_eq(&structure, &again) {
                structure = again;
                continue;
            }
            let views = structure.branches.get(&branch).ok_or_else(|| apply::no_branch(branch))?;
            return Ok(Snapshot::new(at, views.clone(), structure.names.clone()));
        }
    }

    /// The volume failed for good.
    pub(crate) fn give_up(&self, error: &Error) {
        self.fail(error.clone());
    }

    /// Wakes who waits for space or memory.
    pub(crate) fn wake(&self) {
        self.progress.notify_waiters();
        self.applies.notify_waiters();
    }

    pub(crate) fn offer_again(&self) {
        let mut core = self.lock();
        core.offered.clear();
        if let Some(offered) = &mut core.rotate {
            *offered = false;
        }
        drop(core);
        self.offers.notify_waiters();
    }

    /// The entry that the present manifest stands at, once nothing of the compaction of entry `index` is left.
    fn compaction_ended(&self, index: LogIndex) -> Result<Option<LogIndex>> {
        let core = self.lock();
        let waits = core.logical.manuals.contains_key(&index)
            || core.present.manuals.contains_key(&index)
            || core.queue.front().is_some_and(|edit| edit.index <= index);
        match core.given_up() {
            _ if !waits => Ok(Some(core.present.as_of)),
            Some(error) => Err(Error::new(error.kind(), format!("the compaction cannot go on: {error}"))),
            None => Ok(None),
        }
    }

    /// What the writer has to wait for, if it has to.
    fn waits_for(&self) -> Result<Option<StallCause>> {
        self.check_alive()?;
        if self.engine.space_is_short() {
            self.engine.retry_space();
            self.engine.stats.space_refusals.fetch_add(1, Ordering::Relaxed);
            return Err(Error::new(ErrorKind::OutOfSpace, "the volume is full: free space; reads go on"));
        }
        if self.engine.log_is_nearly_full() {
            // Flushed, what is in memory lets the log be cut. Where nothing can be, the log itself answers.
            self.want_rotation();
            self.engine.check_log();
            if self.engine.purge_may_help() {
                return Ok(Some(StallCause::Log));
            }
            let core = self.lock();
            if core.present.flushed() < self.applied() && core.given_up().is_none() && core.diverged.is_empty() {
                return Ok(Some(StallCause::Log));
            }
        }
        if self.frozen.load(Ordering::Acquire) > FROZEN_GENERATIONS_MAX {
            // Waiting for a flush that has failed for good would be for ever.
            return match self.lock().given_up() {
                None => Ok(Some(StallCause::Flush)),
                Some(error) => Err(Error::new(error.kind(), format!("memory is full and cannot be flushed: {error}"))),
            };
        }
        if self.l0_runs.load(Ordering::Acquire) > self.l0_runs_max && self.lock().given_up().is_none() {
            return Ok(Some(StallCause::Compaction));
        }
        if self.engine.memtables_are_over() {
            // Only what is frozen can be flushed: ask for a rotation, and wait if that frees something here.
            self.want_rotation();
            return Ok((!self.lock().memtables.is_empty()).then_some(StallCause::Memory));
        }
        Ok(None)
    }

    /// Waits until all that is frozen is in tables, durable, or cannot be for now. For a clean close.
    pub(crate) async fn settled(&self, index: LogIndex) {
        loop {
            let mut changed = pin!(self.progress.notified());
            changed.as_mut().enable();
            let blocked = {
                let core = self.lock();
                !core.stuck.is_empty() || !core.diverged.is_empty()
            };
            let done = self.flushed.load(Ordering::Acquire) >= index.0;
            if done || blocked || self.engine.space_is_short() || self.failed.get().is_some() {
                return;
            }
            changed.await;
        }
    }

    /// Waits until no job is outstanding and every edit is durable.
    #[cfg(test)]
    pub(crate) async fn idle(&self) {
        loop {
            let mut changed = pin!(self.progress.notified());
            changed.as_mut().enable();
            let busy = {
                let core = self.lock();
                !core.logical.jobs.is_empty() || !core.queue.is_empty()
            };
            if !busy && self.durable().is_settled() {
                return;
            }
            changed.await;
        }
    }

    #[cfg(test)]
    pub(crate) fn has_jobs(&self) -> bool {
        !self.lock().logical.jobs.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn is_flush(&self, job: crate::JobId) -> bool {
        self.lock().logical.jobs.get(&job).is_some_and(|job| matches!(**job, crate::manifest::Job::Flush { .. }))
    }

    /// Waits until a divergence was found.
    #[cfg(test)]
    pub(crate) async fn diverged(&self) {
        loop {
            let mut changed = pin!(self.progress.notified());
            changed.as_mut().enable();
            if self.divergences.load(Ordering::Relaxed) > 0 {
                // Counted under the lock under which it is then published.
                drop(self.lock());
                return;
            }
            changed.await;
        }
    }

    /// Bytes of the extents that the present manifest names, or that a finished job will have it name.
    #[cfg(test)]
    pub(crate) fn named_extent_bytes(&self) -> u64 {
        let core = self.lock();
        let tables = core.tables.values().chain(core.done.values().flat_map(|output| &output.tables));
        tables.map(|stored| crate::volume::extents_bytes(&stored.bytes.extents)).sum()
    }

    /// Makes the group of what was found on the volume, or a new one.
    pub(crate) fn open(
        id: GroupId,
        engine: Arc<EngineShared>,
        settings: GroupSettings,
        found: Option<Recovered>,
    ) -> Result<Arc<Self>> {
        let wanted = ManifestSettings {
            memtable_bytes: settings.memtable_bytes.max(1),
            table_bytes: settings.table_bytes.max(1),
            base_level_bytes: settings.base_level_bytes.max(1),
            l0_compaction_runs: u32::try_from(settings.l0_compaction_runs.max(1)).unwrap_or(u32::MAX),
            tables: settings.compression.into(),
        };
        let born = found.is_none();
        let (lineage, manifest, places) = match found {
            Some(found) => (found.lineage, found.manifest, found.places),
            None => (0, Manifest::new(wanted), Default::default()),
        };
        if manifest.settings != wanted {
            tracing::warn!(group = %id, kept = ?manifest.settings, given = ?wanted,
                "the group keeps the settings that it was made with");
        }
        require_operators(&manifest, &settings.merge_operators)?;
        let heal = GroupHeal::new(id, engine.heal.clone());
        let tables = engine.open_tables(&manifest, places, &heal)?;
        let flushed = manifest.flushed();
        let l0_runs_max = (manifest.settings.l0_compaction_runs as usize).saturating_mul(L0_STALL_FACTOR);
        let operators = settings.merge_operators;
        let mut core = Core::new(lineage, manifest, tables, born, operators.clone());
        let shared = Self {
            id,
            engine,
            state_machine: settings.state_machine,
            times: Times::new(),
            applied: AtomicU64::new(flushed.0),
            structure: ArcSwap::default(),
            flushed: AtomicU64::new(flushed.0),
            frozen: AtomicUsize::new(0),
            l0_runs: AtomicUsize::new(0),
            l0_runs_max,
            divergences: AtomicU64::new(0),
            refused_installs: AtomicU64::new(0),
            applier_waits: AtomicBool::new(false),
            diverged: AtomicBool::new(false),
            heal,
            durable: Mutex::new(Durable::new(lineage)),
            failed: OnceLock::new(),
            progress: Notify::new(),
            offers: Notify::new(),
            applies: Notify::new(),
            pins: Mutex::default(),
            core: Mutex::new(Core::new(0, Manifest::new(wanted), Default::default(), false, operators)),
        };
        shared.times.set(flushed, core.clock.time_ms);
        shared.publish(&mut core, flushed);
        *shared.core.lock().unwrap_or_else(PoisonError::into_inner) = core;
        if let Some(state_machine) = &shared.state_machine {
            state_machine.restored(flushed);
        }
        Ok(Arc::new(shared))
    }
}

impl Group {
    pub(crate) fn new(shared: Arc<GroupShared>) -> Self {
        Self(shared)
    }

    pub(crate) fn shared(&self) -> &Arc<GroupShared> {
        &self.0
    }

    /// Applies an entry; one caller, in order, each index once after [`Group::flushed`]. Readable when it returns.
    ///
    /// # Errors
    /// `Closed` when the group can no longer log what it does to its manifest. A refusal is not an error here: see
    /// [`Applied::response`].
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the entry unapplied.
    pub async fn apply(&self, index: LogIndex, command: &Command) -> Result<Applied> {
        self.0.apply_entry(index, command).await
    }

    /// Advances the applied index over an entry that is none of ours (a blank or membership entry).
    pub fn skip(&self, index: LogIndex) {
        self.0.skip_entry(index);
    }

    /// Pins what is applied now.
    ///
    /// # Errors
    /// `NotFound` when the branch does not exist.
    pub fn snapshot(&self, branch: BranchId) -> Result<Snapshot> {
        self.0.snapshot_of(branch)
    }

    /// Opens a checkpoint for reading.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn checkpoint(&self, name: &str) -> Result<Snapshot> {
        let core = self.0.lock();
        let applied = self.0.applied();
        let found = core.readable().checkpoints.get(name).filter(|c| c.index <= applied).cloned();
        let checkpoint =
            found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no such checkpoint name={name}")))?;
        let next = LogIndex(checkpoint.index.0.saturating_add(1));
        let names = Names {
            keyspaces: checkpoint.keyspaces.iter().cloned().collect(),
            operators: operators(&core, core.readable(), next),
            expiring: expiring(core.readable(), next),
        };
        let views = checkpoint_views(&core, &checkpoint, &names);
        let index = if mainstay_io::mutant!(CheckpointMoves) { applied } else { checkpoint.index };
        let index = if mainstay_io::mutant!(CheckpointInUse) { applied } else { index };
        let at = ReadAt { index, time_ms: checkpoint.created_ms };
        Ok(Snapshot::new(at, Arc::new(views), Arc::new(names)))
    }

    /// Why nothing is applied any more, if so: for good, until the volume is opened again.
    pub fn failure(&self) -> Option<Error> {
        self.0.failed.get().cloned()
    }

    /// Entries up to here are in tables; the log may be purged up to here.
    pub fn flushed(&self) -> LogIndex {
        LogIndex(self.0.flushed.load(Ordering::Acquire))
    }

    /// Entries up to here are applied.
    pub fn applied(&self) -> LogIndex {
        self.0.applied()
    }

    /// The next `Install` that this replica's jobs made, a `Rotate` when the log or memory asks for it, or a batch of nothing when the time of
    /// the log has stood while pairs are to end. A leader proposes it; others may drop it. Cancel safe.
    pub async fn next_install(&self) -> Command {
        loop {
            let mut changed = pin!(self.0.offers.notified());
            changed.as_mut().enable();
            if let Some(command) = self.0.take_offer() {
                return command;
            }
            match self.0.tick_pause() {
                None => changed.await,
                Some(pause) => drop(select(changed, self.0.engine.environment.clock.sleep(pause)).await),
            }
        }
    }

    /// Asks for a rotation, which the leader proposes ([`Group::next_install`]): the log is wanted to be cut. Without effect when nothing
    /// was written since the last one.
    pub fn want_rotation(&self) {
        self.0.want_rotation();
    }

    /// Resolves when the log or the memory of this replica asks for a rotation: at once while [`Group::next_install`] has one that
    /// was not taken. Where this replica does not lead, it is to ask the leader: a log whose disk is faster writes more and
    /// smaller batches of the same entries, so it fills up sooner. Cancel safe.
    pub async fn rotation_wanted(&self) {
        loop {
            let mut changed = pin!(self.0.offers.notified());
            changed.as_mut().enable();
            if self.0.wants_rotation() {
                return;
            }
            changed.await;
        }
    }

    /// Makes all finished, uninstalled jobs appear in [`Group::next_install`] again: a new leader calls it.
    pub fn offer_installs(&self) {
        self.0.offer_again();
    }

    /// Waits until the compaction that entry `index` asked for ([`Compact`](crate::CommandBody::Compact)) has ended on this replica and the space that it freed
    /// is given back to the file system or the device. At once where that entry asked for none, or what it was for was dropped. Space that
    /// a checkpoint, a clone or a snapshot still names comes back with those.
    ///
    /// # Errors
    /// `OutOfSpace`, while the volume is full, and what a job failed of for good: the compaction goes on once that has passed.
    /// `Closed`, `Io`.
    ///
    /// # Cancel safety
    /// Cancel safe: the compaction goes on.
    pub async fn compacted(&self, index: LogIndex) -> Result<()> {
        let mut as_of = None;
        loop {
            let mut changed = pin!(self.0.progress.notified());
            changed.as_mut().enable();
            self.0.check_alive()?;
            as_of = match as_of {
                None => self.0.compaction_ended(index)?,
                ended => ended,
            };
            if as_of.is_some_and(|as_of| self.0.durable().is_settled_to(as_of)) {
                return self.0.engine.give_back().await;
            }
            if self.0.engine.space_is_short() {
                self.0.engine.retry_space();
                return Err(Error::new(ErrorKind::OutOfSpace, "the volume is full: the compaction waits for space"));
            }
            changed.await;
        }
    }

    /// Resolves when [`Group::flushed`] has grown beyond `index`. Cancel safe.
    pub async fn flushed_beyond(&self, index: LogIndex) {
        loop {
            let mut changed = pin!(self.0.progress.notified());
            changed.as_mut().enable();
            if self.flushed() > index {
                return;
            }
            changed.await;
        }
    }

    /// Resolves when [`Group::applied`] has grown beyond `index`. Cancel safe.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn applied_beyond(&self, index: LogIndex) -> Result<()> {
        loop {
            let mut changed = pin!(self.0.applies.notified());
            changed.as_mut().enable();
            if self.applied() > index {
                return Ok(());
            }
            self.check_open()?;
            changed.await;
        }
    }

    /// Refuses where nothing is applied any more.
    pub(crate) fn check_open(&self) -> Result<()> {
        self.0.check_alive()?;
        if self.0.engine.is_closing() {
            return Err(Error::new(ErrorKind::Closed, "the engine is closed"));
        }
        Ok(())
    }

    /// The entry that made a keyspace, if the keyspace is there.
    pub(crate) fn keyspace_made(&self, name: &str) -> Option<LogIndex> {
        let core = self.0.lock();
        let id = core.logical.keyspace_before(name, LogIndex(self.applied().0.saturating_add(1)))?;
        core.logical.keyspaces.get(&id).map(|keyspace| keyspace.created)
    }

    /// Waits until the writer may go on: memory and L0 are within their bounds. Called by the leader before it
    /// proposes. Cancel safe.
    ///
    /// # Errors
    /// `OutOfSpace` while the volume is full: each call tries again whether there is space. `Closed`.
    pub async fn admit(&self) -> Result<()> {
        let mut stall: Option<Stall<'_>> = None;
        loop {
            if self.0.waits_for()?.is_none() {
                return Ok(());
            }
            let mut changed = pin!(self.0.progress.notified());
            changed.as_mut().enable();
            let Some(cause) = self.0.waits_for()? else { return Ok(()) };
            if stall.as_ref().is_none_or(|stall| stall.cause != cause) {
                // The one before has ended.
                drop(stall.take());
                stall = Some(Stall::begin(&self.0, cause));
            }
            changed.await;
        }
    }

    /// Waits until the log takes a record: its queue has no bound of its own. Called behind [`Group::admit`]. Cancel safe.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn admit_to_log(&self) -> Result<()> {
        let mut admitted = pin!(self.0.engine.wal().admit());
        let mut stall = None;
        let outcome = poll_fn(|cx| {
            let polled = admitted.as_mut().poll(cx);
            if polled.is_pending() {
                stall.get_or_insert_with(|| Stall::begin(&self.0, StallCause::Device));
            }
            polled
        });
        Ok(outcome.await?)
    }

    /// Generations frozen and not yet in tables, as [`GroupStatus::frozen_generations`].
    pub fn frozen_generations(&self) -> usize {
        self.0.frozen.load(Ordering::Acquire)
    }

    /// Pins the flushed state for a receiver.
    ///
    /// # Errors
    /// `Closed`.
    pub fn export(&self) -> Result<Export> {
        self.0.export_flushed()
    }

    /// Serves a receiver: bytes of a table of this volume.
    ///
    /// # Errors
    /// `NotFound` when the table is neither in use nor pinned by an [`Export`]; `Corrupt` beyond its end; `Io`.
    pub async fn read_table(&self, id: TableId, offset: u64, length: u64) -> Result<Bytes> {
        self.0.read_stored(id, offset, length).await
    }

    /// Replaces the state by an export: fetches the tables that this volume does not hold, verifies their digests,
    /// makes it durable, then switches. Returns the new flushed index.
    ///
    /// # Errors
    /// `Corrupt` when a table does not match its digest, `Foreign`, `OutOfSpace`, `Io`, and what the source answers; the
    /// old state stays.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped import leaves the old state or, once that is durable, the new one.
    pub async fn import(&self, manifest: Bytes, source: &dyn TableSource) -> Result<LogIndex> {
        self.0.import_state(manifest, source).await
    }

    /// Tells whom to ask for other copies of the tables, or that there is nobody. With peers, a read that meets damage is
    /// answered with their bytes, damaged tables are made anew, and installs that this replica cannot make are fetched.
    pub fn set_table_peers(&self, peers: Option<Arc<dyn TablePeers>>) {
        self.0.heal.set_peers(peers);
    }

    /// The digests of the tables that a job made here, in order, while no install has named any. None when it is not done,
    /// or behind it.
    pub fn output_digests(&self, job: JobId) -> Option<Vec<u128>> {
        self.0.digests_of(job)
    }

    /// Gives up what a job made here, because most replicas made something else: what the log will say is fetched.
    pub fn give_up_output(&self, job: JobId) {
        self.0.give_up_output(job);
    }

    /// True while this replica holds other tables than the log says: its reads may be wrong.
    pub fn is_diverged(&self) -> bool {
        self.0.diverged.load(Ordering::Acquire)
    }

    /// The id of a keyspace of the applied state.
    pub fn keyspace(&self, name: &str) -> Option<KeyspaceId> {
        self.0.structure.load().names.keyspaces.get(name).copied()
    }

    /// Names and ids of the keyspaces.
    pub fn keyspaces(&self) -> Vec<(String, KeyspaceId)> {
        self.0.structure.load().names.keyspaces.iter().map(|(name, id)| (name.clone(), *id)).collect()
    }

    /// True when pairs of a keyspace of the applied state can expire.
    pub fn expires(&self, keyspace: KeyspaceId) -> bool {
        self.0.structure.load().names.expiring.contains(&keyspace)
    }

    /// The options of a keyspace of the applied state; `None` where it is not there.
    pub fn keyspace_options(&self, keyspace: KeyspaceId) -> Option<KeyspaceOptions> {
        let core = self.0.lock();
        let is_there = core.logical.keyspaces.get(&keyspace).is_some_and(|k| k.dropped.is_none());
        is_there.then(|| core.logical.options_of(keyspace))
    }

    /// The merge operator of a keyspace of the applied state.
    pub fn merge_operator(&self, keyspace: KeyspaceId) -> Option<OperatorId> {
        let structure = self.0.structure.load();
        structure.names.operators.get(&keyspace).map(|operator| operator.id())
    }

    /// Refuses an operator that is not registered here, before a keyspace is given it: no replica without it goes on behind that
    /// entry.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check_operator(&self, operator: &OperatorId, keyspace: &str) -> Result<()> {
        self.0.lock().operators.require(operator, keyspace).map(drop)
    }

    /// The branch of a name; `main` is [`crate::MAIN`].
    pub fn branch(&self, name: &str) -> Option<BranchId> {
        self.0.lock().logical.branch_before(name, LogIndex(self.applied().0 + 1))
    }

    /// All branches.
    pub fn branches(&self) -> Vec<BranchInfo> {
        let core = self.0.lock();
        let next = LogIndex(self.applied().0 + 1);
        let alive = core.logical.branches.iter().filter(|(id, _)| core.logical.has_branch_before(**id, next));
        let info = |(&id, b): (&BranchId, &crate::manifest::Branch)| BranchInfo {
            id,
            name: b.name.clone(),
            origin: b.origin.clone(),
            created_ms: b.created_ms,
        };
        alive.map(info).collect()
    }

    /// All checkpoints.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        let core = self.0.lock();
        let applied = self.applied();
        let made = core.logical.checkpoints.iter().filter(|(_, c)| c.index <= applied);
        made.map(|(name, c)| CheckpointInfo { name: name.clone(), index: c.index, created_ms: c.created_ms }).collect()
    }

    /// Counts and states.
    pub fn status(&self) -> GroupStatus {
        let mut core = self.0.lock();
        let as_of = core.logical.as_of;
        let digest = match core.digest {
            Some((index, digest)) if index == as_of => digest,
            _ => {
                let digest = core.logical.digest();
                core.digest = Some((as_of, digest));
                digest
            }
        };
        let absent = core.queue.iter().flat_map(|edit| &edit.ops);
        GroupStatus {
            applied: self.applied(),
            flushed: self.flushed(),
            frozen_generations: core.frozen_generations() as u64,
            absent_jobs: absent.filter(|op| matches!(op, crate::manifest::ManifestOp::Install { .. })).count() as u64,
            tables: core.tables.len() as u64,
            table_bytes: core.tables.values().map(|t| t.meta.bytes).sum(),
            digest,
            digest_index: as_of,
            divergences: self.0.divergences.load(Ordering::Relaxed),
            refused_installs: self.0.refused_installs.load(Ordering::Relaxed),
            applier_waits: self.0.applier_waits.load(Ordering::Relaxed),
            diverged: !core.diverged.is_empty(),
            jobs_retrying: core.stuck.values().filter(|stuck| !stuck.over).count() as u64,
            jobs_failed: core.stuck.values().filter(|stuck| stuck.over).count() as u64,
            tables_damaged: self.0.heal.damaged_count(),
        }
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("id", &self.0.id).field("applied", &self.applied()).finish_non_exhaustive()
    }
}
