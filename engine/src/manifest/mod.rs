//! Which tables, memtables and jobs a group has: a pure state machine over the entries of its log.
//!
//! # Place
//! [`crate::Group`] holds two instances, *logical* and *present* (docs/architecture.md). No I/O, no time, no chance
//! # Format
//! docs/format.md, "Manifest"
//! # Invariants
//! 1. Equal operations give equal manifests, byte for byte ([`Manifest::encode`]).
//! 2. Generations are contiguous in the index and are flushed in order: [`Manifest::flushed`] is where the oldest begins.
//! 3. What was dropped after [`Manifest::flushed`] is kept, hidden, until the flushed index has passed its drop: replay
//!    of the entries before the drop still finds it.
//! 4. Keyspace, branch, generation and job numbers are never used twice.

#![deny(clippy::indexing_slicing)]

mod codec;
mod manual;
mod ops;
pub(crate) mod picker;
mod shape;
mod tiered;
pub(crate) mod version;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

#[cfg(test)]
pub(crate) use self::codec::{
    MANIFEST_VERSION, MANIFEST_VERSION_MANUAL, MANIFEST_VERSION_PARTS, MANIFEST_VERSION_SHAPED, OP_KINDS,
};
pub(crate) use self::codec::{
    Places, decode_op, encode_op, form_of, knows_time, names_operators, names_options, put_settings, take_settings,
};
pub(crate) use self::manual::Manual;
pub(crate) use self::ops::Effects;
pub(crate) use self::picker::Compaction;
pub(crate) use self::shape::TableShape;
pub(crate) use self::version::{GenRef, LEVELS, TableRef, Version};
use crate::expiry::LogClock;
use crate::{
    BranchId, Generation, InstallTable, JobId, KeyspaceId, KeyspaceOptions, LogIndex, MAIN, OperatorId, TableId,
};

/// The name of keyspace 0, which every group is born with.
pub(crate) const DEFAULT_KEYSPACE: &str = "default";
/// The name of [`MAIN`].
pub(crate) const MAIN_BRANCH: &str = "main";

/// The settings that decide where memtables rotate, which compactions run and how tables are built: fixed when the group is
/// born, since a change on one replica alone would make its tables differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ManifestSettings {
    pub(crate) memtable_bytes: u64,
    pub(crate) table_bytes: u64,
    pub(crate) base_level_bytes: u64,
    pub(crate) l0_compaction_runs: u32,
    pub(crate) tables: TableShape,
}

/// The versions of a branch or checkpoint. A keyspace without one is empty.
pub(crate) type Versions = BTreeMap<KeyspaceId, Arc<Version>>;

/// A keyspace of the group.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Keyspace {
    pub(crate) name: String,
    /// The entry that made it; 0 for the first.
    pub(crate) created: LogIndex,
    /// The entry that dropped it; kept until that is flushed.
    pub(crate) dropped: Option<LogIndex>,
}

/// The merge operator of a keyspace.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Assigned {
    pub(crate) operator: OperatorId,
    /// The entry that gave it to the keyspace.
    pub(crate) since: LogIndex,
}

/// Options of a keyspace, and which jobs they are for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Chosen {
    /// The first job that was started behind their choice.
    pub(crate) since: JobId,
    pub(crate) options: KeyspaceOptions,
}

/// The main line or a clone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Branch {
    pub(crate) name: String,
    pub(crate) origin: Option<String>,
    pub(crate) created_ms: u64,
    pub(crate) dropped: Option<LogIndex>,
    pub(crate) versions: Versions,
}

/// A frozen set of versions.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Checkpoint {
    pub(crate) index: LogIndex,
    pub(crate) created_ms: u64,
    pub(crate) branch: BranchId,
    /// Names of its keyspaces as they were.
    pub(crate) keyspaces: Vec<(String, KeyspaceId)>,
    pub(crate) versions: Versions,
}

/// Frozen memtables that are not in tables yet: entries in `(start, end]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FrozenGeneration {
    pub(crate) start: LogIndex,
    /// What was known of time there.
    pub(crate) start_clock: LogClock,
    pub(crate) end: LogIndex,
    /// What was written in it, sorted.
    pub(crate) touched: Vec<(BranchId, KeyspaceId)>,
    /// The job that flushes it.
    pub(crate) job: JobId,
}

/// A job that was started and not yet installed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Job {
    Flush { generation: Generation },
    Compact(Compaction),
}

/// An operation on the manifest: what an accepted entry does to it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ManifestOp {
    /// The memtables written since the last rotation are frozen. With nothing written only the start of the next
    /// generation moves.
    Rotate {
        touched: Vec<(BranchId, KeyspaceId)>,
        /// What is known of time there, where there are expiring keyspaces.
        clock: Option<LogClock>,
    },
    Install {
        job: JobId,
        tables: Vec<TableRef>,
    },
    CreateKeyspace {
        name: String,
    },
    DropKeyspace {
        name: String,
    },
    CreateCheckpoint {
        name: String,
        branch: BranchId,
        time_ms: u64,
    },
    DropCheckpoint {
        name: String,
    },
    CreateClone {
        name: String,
        checkpoint: String,
        time_ms: u64,
    },
    DropClone {
        name: String,
    },
    /// The keyspace, made if it is not there, has the operator from here on.
    SetOperator {
        name: String,
        operator: OperatorId,
    },
    /// The keyspace is made, and its pairs can expire.
    CreateExpiring {
        name: String,
    },
    /// The keyspace, made if it is not there, has the options from here on.
    SetOptions {
        name: String,
        options: KeyspaceOptions,
    },
    /// What is in tables of the version, or in generations that are frozen, goes down to the last level: keys from `first` and before
    /// `end`.
    Compact {
        branch: BranchId,
        keyspace: KeyspaceId,
        first: Bytes,
        end: Option<Bytes>,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Manifest {
    pub(crate) settings: ManifestSettings,
    /// The last entry that changed it.
    pub(crate) as_of: LogIndex,
    /// Where the generation in use begins.
    pub(crate) rotated: LogIndex,
    /// What was known of time there.
    pub(crate) rotated_clock: LogClock,
    pub(crate) next_generation: Generation,
    pub(crate) next_job: JobId,
    pub(crate) next_keyspace: KeyspaceId,
    pub(crate) keyspaces: BTreeMap<KeyspaceId, Keyspace>,
    pub(crate) branches: BTreeMap<BranchId, Branch>,
    pub(crate) checkpoints: BTreeMap<String, Arc<Checkpoint>>,
    pub(crate) generations: BTreeMap<Generation, Arc<FrozenGeneration>>,
    pub(crate) jobs: BTreeMap<JobId, Arc<Job>>,
    /// Compactions that were asked for and have not ended, by their entry.
    pub(crate) manuals: BTreeMap<LogIndex, Manual>,
    /// The merge operators of keyspaces, dropped ones included as long as a version of theirs is left.
    pub(crate) operators: BTreeMap<KeyspaceId, Assigned>,
    /// The keyspaces whose pairs can expire, with the entries that made them, as long as the operators of others are kept.
    pub(crate) expiring: BTreeMap<KeyspaceId, LogIndex>,
    /// What keyspaces were given, the oldest first and none that no job and no later one goes by; kept as long as the operators of others.
    pub(crate) options: BTreeMap<KeyspaceId, Vec<Chosen>>,
}

impl Manifest {
    /// What every group is born with: the main branch and the keyspace `default`.
    pub(crate) fn new(settings: ManifestSettings) -> Self {
        let keyspace = Keyspace { name: DEFAULT_KEYSPACE.into(), created: LogIndex(0), dropped: None };
        let main =
            Branch { name: MAIN_BRANCH.into(), origin: None, created_ms: 0, dropped: None, versions: Versions::new() };
        Self {
            settings,
            as_of: LogIndex(0),
            rotated: LogIndex(0),
            rotated_clock: LogClock::default(),
            next_generation: Generation(1),
            next_job: JobId(1),
            next_keyspace: KeyspaceId(1),
            keyspaces: BTreeMap::from([(KeyspaceId(0), keyspace)]),
            branches: BTreeMap::from([(MAIN, main)]),
            checkpoints: BTreeMap::new(),
            generations: BTreeMap::new(),
            jobs: BTreeMap::new(),
            manuals: BTreeMap::new(),
            operators: BTreeMap::new(),
            expiring: BTreeMap::new(),
            options: BTreeMap::new(),
        }
    }

    /// What was known of time at [`Manifest::flushed`].
    pub(crate) fn flushed_clock(&self) -> LogClock {
        self.generations.first_key_value().map_or(self.rotated_clock, |(_, g)| g.start_clock)
    }

    /// True when entry `index` moves the time of the log: from the first expiring keyspace on.
    pub(crate) fn counts_time_at(&self, index: LogIndex) -> bool {
        self.expiring.values().any(|since| *since <= index)
    }

    /// True when entry `index` finds the keyspace, and that its pairs can expire.
    pub(crate) fn expires_before(&self, id: KeyspaceId, index: LogIndex) -> bool {
        self.expiring.get(&id).is_some_and(|since| *since < index)
    }

    /// The options of a keyspace that a job goes by which is outstanding in this manifest.
    pub(crate) fn options_for(&self, id: KeyspaceId, job: JobId) -> KeyspaceOptions {
        let chosen = self.options.get(&id).map(Vec::as_slice).unwrap_or_default();
        chosen.iter().rfind(|chosen| chosen.since <= job).map(|chosen| chosen.options).unwrap_or_default()
    }

    /// The options of a keyspace from here on.
    pub(crate) fn options_of(&self, id: KeyspaceId) -> KeyspaceOptions {
        self.options_for(id, JobId(u64::MAX))
    }

    /// Entries up to here are in tables.
    pub(crate) fn flushed(&self) -> LogIndex {
        self.generations.first_key_value().map_or(self.rotated, |(_, g)| g.start)
    }

    /// The keyspace of that name as entry `index` finds it.
    pub(crate) fn keyspace_before(&self, name: &str, index: LogIndex) -> Option<KeyspaceId> {
        self.keyspaces.iter().find(|(_, k)| k.name == name && exists(k.created, k.dropped, index)).map(|(&id, _)| id)
    }

    /// True when entry `index` finds the keyspace.
    pub(crate) fn has_keyspace_before(&self, id: KeyspaceId, index: LogIndex) -> bool {
        self.keyspaces.get(&id).is_some_and(|k| exists(k.created, k.dropped, index))
    }

    /// The merge operator of a keyspace as entry `index` finds it.
    pub(crate) fn operator_before(&self, id: KeyspaceId, index: LogIndex) -> Option<&OperatorId> {
        self.operators.get(&id).filter(|assigned| assigned.since < index).map(|assigned| &assigned.operator)
    }

    /// True when entry `index` finds the branch.
    pub(crate) fn has_branch_before(&self, id: BranchId, index: LogIndex) -> bool {
        self.branches.get(&id).is_some_and(|b| exists(LogIndex(id.0), b.dropped, index))
    }

    /// The branch of that name as entry `index` finds it.
    pub(crate) fn branch_before(&self, name: &str, index: LogIndex) -> Option<BranchId> {
        self.branches
            .iter()
            .find(|(id, b)| b.name == name && exists(LogIndex(id.0), b.dropped, index))
            .map(|(&id, _)| id)
    }

    /// All sets of versions: those of branches, dropped ones included, and of checkpoints.
    pub(crate) fn version_sets(&self) -> impl Iterator<Item = &Versions> {
        self.branches.values().map(|b| &b.versions).chain(self.checkpoints.values().map(|c| &c.versions))
    }

    /// True when any version names the table.
    pub(crate) fn names(&self, table: &InstallTable) -> bool {
        self.version_sets().any(|set| set.get(&table.keyspace).is_some_and(|version| version.names(table)))
    }

    /// Every table that a version names, once, by id.
    pub(crate) fn tables(&self) -> BTreeMap<TableId, TableRef> {
        let mut tables = BTreeMap::new();
        let mut seen = std::collections::BTreeSet::new();
        for list in self.version_sets().flat_map(|set| set.values()).flat_map(|version| version.lists()) {
            // A list that many versions share is walked once.
            if seen.insert(Arc::as_ptr(list) as usize) {
                tables.extend(list.iter().map(|t| (t.id, t.clone())));
            }
        }
        tables
    }

    /// Digest over everything that must be equal on all replicas at this index.
    pub(crate) fn digest(&self) -> u128 {
        xxhash_rust::xxh3::xxh3_128(&self.encode(None))
    }

    /// The manifest as bytes; with `places` also where each table lies on this volume.
    pub(crate) fn encode(&self, places: Option<&Places>) -> Bytes {
        codec::encode(self, places)
    }

    /// Reads what [`Manifest::encode`] wrote.
    ///
    /// # Errors
    /// `Corrupt`, `Foreign`.
    pub(crate) fn decode(bytes: Bytes) -> crate::Result<(Self, Places)> {
        codec::decode(bytes)
    }
}

/// Made before entry `index` and not dropped before it.
fn exists(created: LogIndex, dropped: Option<LogIndex>, index: LogIndex) -> bool {
    created < index && dropped.is_none_or(|dropped| dropped >= index)
}

#[cfg(test)]
mod exists_tests {
    use super::*;

    #[test]
    fn an_entry_finds_what_stood_before_it() {
        let check = |created, dropped: Option<u64>, index, expect| {
            assert_eq!(exists(LogIndex(created), dropped.map(LogIndex), LogIndex(index)), expect);
        };
        check(0, None, 1, true);
        check(5, None, 5, false);
        check(5, None, 6, true);
        check(5, Some(8), 8, true);
        check(5, Some(8), 9, false);
    }
}
