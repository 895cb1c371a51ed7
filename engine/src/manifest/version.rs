//! The tables of one branch and keyspace at one instant.
//!
//! # Invariants
//! 1. `frozen` and `l0` are newest first; everything in `frozen` is newer than everything in `l0`, and that newer than
//!    what lies in the levels, each level newer than the next.
//! 2. The tables of a run and of a level are sorted by key and do not overlap.
//! 3. Lists are shared by reference count between versions that hold the same tables; they are never changed in place.

#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::{BranchId, Generation, InstallTable, TableId};

/// A table as the manifest names it.
pub(crate) type TableRef = Arc<InstallTable>;

/// Sorted tables without overlap: a run of L0 or a level.
pub(crate) type Tables = Arc<Vec<TableRef>>;

/// Levels below L0, the last included.
pub(crate) const LEVELS: usize = 6;

/// The memtables of one branch in one generation. A clone reads those of the branch that its checkpoint froze.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GenRef {
    pub(crate) generation: Generation,
    pub(crate) branch: BranchId,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Version {
    /// Generations not yet flushed, newest first.
    pub(crate) frozen: Vec<GenRef>,
    /// Runs, newest first, none of them empty.
    pub(crate) l0: Vec<Tables>,
    /// L1 and below: `levels[0]` is L1.
    pub(crate) levels: [Tables; LEVELS],
}

impl Version {
    /// The tables of level `level`, from 1.
    pub(crate) fn level(&self, level: u8) -> &Tables {
        let at = usize::from(level).wrapping_sub(1);
        self.levels.get(at).expect("levels are numbered from 1 to LEVELS")
    }

    pub(crate) fn set_level(&mut self, level: u8, tables: Vec<TableRef>) {
        let at = usize::from(level).wrapping_sub(1);
        *self.levels.get_mut(at).expect("levels are numbered from 1 to LEVELS") = Arc::new(tables);
    }

    /// All lists, newest first.
    pub(crate) fn lists(&self) -> impl Iterator<Item = &Tables> {
        self.l0.iter().chain(&self.levels)
    }

    /// All tables.
    pub(crate) fn tables(&self) -> impl Iterator<Item = &TableRef> {
        self.lists().flat_map(|list| list.iter())
    }

    /// True when the version names `table`.
    pub(crate) fn names(&self, table: &InstallTable) -> bool {
        self.lists().any(|list| holds(list, table))
    }

    /// Takes tables away from L0 or a level.
    pub(crate) fn remove(&mut self, level: u8, gone: &dyn Fn(TableId) -> bool) {
        let without = |list: &Tables| -> Option<Vec<TableRef>> {
            list.iter().any(|t| gone(t.id)).then(|| list.iter().filter(|t| !gone(t.id)).cloned().collect())
        };
        if level > 0 {
            if let Some(left) = without(self.level(level)) {
                self.set_level(level, left);
            }
            return;
        }
        for run in &mut self.l0 {
            if let Some(left) = without(run) {
                *run = Arc::new(left);
            }
        }
        self.l0.retain(|run| !run.is_empty());
    }

    /// Adds tables to a level; their keys are free there.
    pub(crate) fn add(&mut self, level: u8, tables: &[TableRef]) {
        if tables.is_empty() {
            return;
        }
        let mut all: Vec<TableRef> = self.level(level).iter().chain(tables).cloned().collect();
        all.sort_by(|a, b| a.first.cmp(&b.first));
        self.set_level(level, all);
    }

    /// True when every list is sorted and without overlap.
    pub(crate) fn is_sound(&self) -> bool {
        self.lists().all(|list| sorted(list)) && self.l0.iter().all(|run| !run.is_empty())
    }
}

/// True when `tables` are sorted and do not overlap.
pub(crate) fn sorted(tables: &[TableRef]) -> bool {
    tables.iter().zip(tables.iter().skip(1)).all(|(a, b)| a.last < b.first)
}

/// True when the sorted list holds the table.
pub(crate) fn holds(list: &[TableRef], table: &InstallTable) -> bool {
    let at = list.partition_point(|t| t.last < table.first);
    list.get(at).is_some_and(|t| t.id == table.id)
}

/// The tables of a sorted list that overlap `first..=last`.
pub(crate) fn overlap<'a>(list: &'a [TableRef], first: &[u8], last: &[u8]) -> &'a [TableRef] {
    let from = list.partition_point(|t| &t.last[..] < first);
    let rest = list.get(from..).unwrap_or_default();
    let count = rest.partition_point(|t| &t.first[..] <= last);
    rest.get(..count).unwrap_or_default()
}

/// Bytes of all tables.
pub(crate) fn bytes_of<'a>(tables: impl IntoIterator<Item = &'a TableRef>) -> u64 {
    tables.into_iter().fold(0, |sum, t| sum.saturating_add(t.bytes))
}
