//! What a group holds in memory, under one lock, and what readers see of it.
//!
//! # Place
//! `apply` changes it entry by entry, `present` moves operations on, `jobs` takes from it what a job reads
//! # Invariants
//! 1. `present` is `logical` without the edits in `queue`. `overlay` is `present` with all that wait in `queue` but the
//!    installs, and without picking; it is made only while something waits. An install changes no data, so readers may use it.
//! 2. A [`Structure`] is published before the index of the first entry that needs it, and after everything that it holds was
//!    applied. So a reader that finds one structure before and after it has read the applied index pairs them rightly.
//! 3. Memtables of a generation are kept until the present manifest has its tables.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::jobs::Output;
use crate::expiry::LogClock;
use crate::heal::Retry;
use crate::manifest::{Job, Manifest, ManifestOp, Version};
use crate::memtable::Memtable;
use crate::merge_operator::Operator;
use crate::read::{LevelView, ReadView};
use crate::stored::StoredTable;
use crate::table::Table;
use crate::{BranchId, CompactionStyle, Error, Generation, JobId, KeyspaceId, LogIndex, MergeOperators, TableId};

/// How long the time of the log may stand while some pair is to end.
pub(super) const TICK: Duration = Duration::from_secs(1);

/// How long tables in which pairs have ended wait for a rotation that is made for them.
const FREE_PAUSE: Duration = Duration::from_secs(60);

/// What one entry did to the manifest.
#[derive(Clone, Debug)]
pub(super) struct Edit {
    pub(super) index: LogIndex,
    pub(super) ops: Vec<ManifestOp>,
}

/// A job that failed.
pub(super) struct Stuck {
    pub(super) error: Error,
    pub(super) retry: Retry,
    /// Nothing that can pass, or it has not passed: only opening the volume anew tries again.
    pub(super) over: bool,
}

pub(super) struct Core {
    /// One more with every import: edits of the state before it are not those of this one.
    pub(super) lineage: u64,
    pub(super) logical: Manifest,
    pub(super) present: Manifest,
    pub(super) queue: VecDeque<Edit>,
    pub(super) overlay: Option<Manifest>,
    /// Entries up to here are in the manifest already: replay of them only fills memtables.
    pub(super) replay_to: LogIndex,
    /// The generation that is written now.
    pub(super) active: Generation,
    /// What is known of time, as the last applied entry leaves it; nothing without an expiring keyspace.
    pub(super) clock: LogClock,
    /// When the passage of time was last offered to the log, by the wall clock.
    pub(super) ticked_ms: u64,
    /// Bytes applied since the last rotation.
    pub(super) written: u64,
    pub(super) memtables: BTreeMap<(Generation, BranchId, KeyspaceId), Arc<Memtable>>,
    pub(super) tables: BTreeMap<TableId, StoredTable>,
    /// Outputs of jobs of ours that the present manifest does not name yet.
    pub(super) done: BTreeMap<JobId, Output>,
    pub(super) running: BTreeSet<JobId>,
    /// Jobs whose output was another than the one that was installed.
    pub(super) diverged: BTreeSet<JobId>,
    /// Jobs that failed for another reason than space.
    pub(super) stuck: BTreeMap<JobId, Stuck>,
    /// When installs that cannot be made here are next fetched.
    pub(super) fetch: Retry,
    /// Jobs whose install was offered.
    pub(super) offered: BTreeSet<JobId>,
    /// A rotation is asked for, and whether it was offered.
    pub(super) rotate: Option<bool>,
    /// The edit before the next one, as the log was told.
    pub(super) logged: LogIndex,
    /// The first edit of a new group carries its settings.
    pub(super) born: bool,
    /// The digest of the logical manifest, as of an index.
    pub(super) digest: Option<(LogIndex, u128)>,
    /// What the embedder has registered.
    pub(super) operators: MergeOperators,
}

impl Core {
    pub(super) fn new(
        lineage: u64,
        manifest: Manifest,
        tables: BTreeMap<TableId, StoredTable>,
        born: bool,
        operators: MergeOperators,
    ) -> Self {
        Self {
            lineage,
            replay_to: manifest.as_of,
            active: first_active(&manifest),
            clock: manifest.flushed_clock(),
            ticked_ms: 0,
            logged: manifest.as_of,
            present: manifest.clone(),
            logical: manifest,
            queue: VecDeque::new(),
            overlay: None,
            written: 0,
            memtables: BTreeMap::new(),
            tables,
            done: BTreeMap::new(),
            running: BTreeSet::new(),
            diverged: BTreeSet::new(),
            stuck: BTreeMap::new(),
            fetch: Retry::default(),
            offered: BTreeSet::new(),
            rotate: None,
            born,
            digest: None,
            operators,
        }
    }

    /// Why a job will not be tried again.
    pub(super) fn given_up(&self) -> Option<&Error> {
        self.stuck.values().find(|stuck| stuck.over).map(|stuck| &stuck.error)
    }

    /// True when some pair is to end, and nobody has moved the time of the log for [`TICK`].
    pub(super) fn is_to_tick(&self, now_ms: u64) -> bool {
        let last_ms = self.clock.time_ms.max(self.ticked_ms);
        !mainstay_io::mutant!(TimeStandsStill)
            && self.clock.waits_for_an_end()
            && now_ms >= last_ms.saturating_add(TICK.as_millis() as u64)
    }

    /// True when a rotation would let tables go in which pairs have ended: a while after the last one, or when the last pair has ended and
    /// nobody moves the time of the log.
    pub(super) fn is_to_free(&self, now_ms: u64) -> bool {
        let rotated_ms = self.logical.rotated_clock.time_ms;
        let may = now_ms >= rotated_ms.max(self.ticked_ms).saturating_add(FREE_PAUSE.as_millis() as u64);
        (self.is_to_tick(now_ms) && now_ms >= self.clock.latest_end_ms)
            || (may && self.logical.has_ended_between(rotated_ms, now_ms))
    }

    /// What is known of time as an entry of that time leaves it; none of its own for one that is no command.
    pub(super) fn clock_at(&self, index: LogIndex, time_ms: Option<u64>) -> LogClock {
        match self.logical.counts_time_at(index) {
            true => self.clock.at(time_ms.unwrap_or(0)),
            false => LogClock::default(),
        }
    }

    /// The manifest that readers follow.
    pub(super) fn readable(&self) -> &Manifest {
        self.overlay.as_ref().unwrap_or(&self.present)
    }

    /// Generations in memory that are no longer written.
    pub(super) fn frozen_generations(&self) -> usize {
        let frozen: BTreeSet<Generation> = self.memtables.keys().map(|k| k.0).filter(|g| *g < self.active).collect();
        frozen.len()
    }

    /// What was written since the last rotation.
    pub(super) fn touched(&self) -> Vec<(BranchId, KeyspaceId)> {
        let from = (self.active, BranchId(0), KeyspaceId(0));
        self.memtables.range(from..).filter(|(_, m)| !m.is_empty()).map(|(&(_, b, k), _)| (b, k)).collect()
    }

    /// Places of all tables, for the pages.
    pub(super) fn places(&self) -> crate::manifest::Places {
        self.tables.iter().map(|(&id, stored)| (id, stored.place())).collect()
    }

    /// Lets go of the memtables that the present manifest has as tables.
    pub(super) fn drop_flushed_memtables(&mut self) {
        let present = &self.present;
        let active = self.active;
        self.memtables.retain(|&(g, _, _), _| {
            g >= active || g >= present.next_generation || present.generations.contains_key(&g)
        });
    }

    /// The most L0 runs of any version that is being compacted. What waits for fewer of them waits for a job: a clone that nobody
    /// writes to keeps those of its origin, and so does a keyspace that was dropped and is not forgotten yet. Those that a tiered keyspace may
    /// have do not count.
    pub(super) fn l0_runs_max(&self) -> usize {
        let compacted = self.present.jobs.values().filter_map(|job| match &**job {
            Job::Compact(compaction) => {
                let version = self.present.version(compaction.branch, compaction.keyspace)?;
                let allowed = match self.present.options_of(compaction.keyspace).compaction {
                    CompactionStyle::Leveled => 0,
                    CompactionStyle::Tiered { runs } => usize::from(runs),
                };
                Some(version.l0.len().saturating_sub(allowed))
            }
            Job::Flush { .. } => None,
        });
        compacted.max().unwrap_or(0)
    }
}

/// The generation that the first entry after the flushed index writes.
pub(super) fn first_active(manifest: &Manifest) -> Generation {
    manifest.generations.first_key_value().map_or(manifest.next_generation, |(&g, _)| g)
}

/// Names of keyspaces as a reader finds them.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Names {
    pub(crate) keyspaces: BTreeMap<String, KeyspaceId>,
    /// Of those that have one.
    pub(crate) operators: BTreeMap<KeyspaceId, Operator>,
    /// Those whose pairs can expire.
    pub(crate) expiring: BTreeSet<KeyspaceId>,
}

/// A keyspace of a branch as it was published, with what it was made from.
#[derive(Clone)]
pub(crate) struct Published {
    pub(crate) view: Arc<ReadView>,
    version: Option<Arc<Version>>,
}

pub(crate) type Views = BTreeMap<KeyspaceId, Published>;

/// What readers see: replaced as a whole when memtables or tables change.
#[derive(Default)]
pub(crate) struct Structure {
    pub(crate) branches: BTreeMap<BranchId, Arc<Views>>,
    pub(crate) names: Arc<Names>,
}

/// The structure as entry `index` leaves it; takes over from `before` what has not changed.
pub(super) fn structure(core: &Core, index: LogIndex, before: &Structure) -> Structure {
    let next = LogIndex(index.0.saturating_add(1));
    let manifest = core.readable();
    let keyspaces = manifest.keyspaces.keys().filter(|&&k| manifest.has_keyspace_before(k, next));
    let names = Names {
        keyspaces: keyspaces.filter_map(|k| Some((manifest.keyspaces.get(k)?.name.clone(), *k))).collect(),
        operators: operators(core, manifest, next),
        expiring: expiring(manifest, next),
    };
    let names = if *before.names == names { before.names.clone() } else { Arc::new(names) };
    let mut branches = BTreeMap::new();
    for (&id, branch) in &manifest.branches {
        if !manifest.has_branch_before(id, next) {
            continue;
        }
        let old = before.branches.get(&id);
        let mut views = Views::new();
        for &keyspace in names.keyspaces.values() {
            let version = branch.versions.get(&keyspace);
            let memtables = memtables(core, id, keyspace, version);
            if version.is_none() && memtables.is_empty() {
                continue;
            }
            let form = (names.operators.get(&keyspace), names.expiring.contains(&keyspace));
            let old = old.and_then(|o| o.get(&keyspace));
            views.insert(keyspace, published(core, version, memtables, form, old));
        }
        let same = |old: &&Arc<Views>| {
            old.len() == views.len()
                && old.iter().zip(&views).all(|(a, b)| a.0 == b.0 && Arc::ptr_eq(&a.1.view, &b.1.view))
        };
        branches.insert(id, old.filter(same).cloned().unwrap_or_else(|| Arc::new(views)));
    }
    Structure { branches, names }
}

/// The merge operators as entry `before` finds them. All are registered: else the group was not opened, or it has failed.
pub(super) fn operators(core: &Core, manifest: &Manifest, before: LogIndex) -> BTreeMap<KeyspaceId, Operator> {
    let known = |id: &KeyspaceId| core.operators.get(manifest.operator_before(*id, before)?).cloned();
    manifest.operators.keys().filter_map(|id| Some((*id, known(id)?))).collect()
}

/// The expiring keyspaces as entry `before` finds them.
pub(super) fn expiring(manifest: &Manifest, before: LogIndex) -> BTreeSet<KeyspaceId> {
    manifest.expiring.keys().copied().filter(|id| manifest.expires_before(*id, before)).collect()
}

/// Memtables of a version, newest first: the one in use, then the frozen ones that it names. During replay those come
/// into being one after the other.
fn memtables(
    core: &Core,
    branch: BranchId,
    keyspace: KeyspaceId,
    version: Option<&Arc<Version>>,
) -> Vec<Arc<Memtable>> {
    let frozen = version.into_iter().flat_map(|v| &v.frozen).map(|f| (f.generation, f.branch, keyspace));
    let active = (core.active, branch, keyspace);
    let all = std::iter::once(active).chain(frozen.filter(|&f| f != active));
    all.filter_map(|key| core.memtables.get(&key).cloned()).collect()
}

/// The view of a version; what `old` holds of it is shared.
fn published(
    core: &Core,
    version: Option<&Arc<Version>>,
    memtables: Vec<Arc<Memtable>>,
    (operator, expires): (Option<&Operator>, bool),
    old: Option<&Published>,
) -> Published {
    let old_version = old.and_then(|o| o.version.as_ref());
    let same_version = match (version, old_version) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    if let Some(old) = old
        && same_version
        && old.view.operator.as_ref() == operator
        && old.view.memtables.len() == memtables.len()
        && old.view.memtables.iter().zip(&memtables).all(|(a, b)| Arc::ptr_eq(a, b))
    {
        return old.clone();
    }
    let open = |id: TableId| -> Arc<Table> {
        core.tables.get(&id).expect("every table that the present manifest names is stored here").table.clone()
    };
    let mut view = ReadView { memtables, operator: operator.cloned(), expires, ..ReadView::default() };
    if let Some(version) = version {
        view.l0 = version.l0.iter().flat_map(|run| run.iter()).map(|t| open(t.id)).collect();
        let levels = version.levels.iter().enumerate().map(|(at, level)| {
            let shared = old.zip(old_version).filter(|(_, v)| Arc::ptr_eq(&v.levels[at], level));
            match shared.and_then(|(o, _)| o.view.levels.get(at)) {
                Some(list) => list.clone(),
                None => level.iter().map(|t| open(t.id)).collect::<LevelView>(),
            }
        });
        view.levels = levels.collect();
    }
    Published { view: Arc::new(view), version: version.cloned() }
}

/// The views of a checkpoint, made when it is opened. The memtables in use are not among them: the entry that made it rotated.
pub(super) fn checkpoint_views(core: &Core, checkpoint: &crate::manifest::Checkpoint, names: &Names) -> Views {
    let view = |(&keyspace, version): (&KeyspaceId, &Arc<Version>)| {
        let frozen = version.frozen.iter().map(|f| (f.generation, f.branch, keyspace));
        let memtables = if mainstay_io::mutant!(CheckpointInUse) {
            memtables(core, checkpoint.branch, keyspace, Some(version))
        } else {
            frozen.filter_map(|key| core.memtables.get(&key).cloned()).collect()
        };
        let form = (names.operators.get(&keyspace), names.expiring.contains(&keyspace));
        (keyspace, published(core, Some(version), memtables, form, None))
    };
    checkpoint.versions.iter().map(view).collect()
}
