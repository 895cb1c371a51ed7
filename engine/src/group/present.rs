//! Moves operations from the logical to the present manifest, logs them, and gives back what they replaced.
//!
//! # Invariants
//! 1. Operations move in the order of their entries; an install moves only when its tables are on this volume, durable.
//! 2. An edit says after which index it comes; recovery applies an unbroken chain. When the log is full an edit is left out
//!    and the chain is broken until manifest pages are durable that hold it.
//! 3. A table is given back, and the flushed index grows, only when the edit that says so is durable, or pages that hold it.
//!
//! # Crash
//! Before an edit is durable the job that it installs is outstanding again after restart: its extents are free, since
//! nothing names them, and the entries that it covers are still in the log.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_wal::{GroupId, Record, RecordKind, RecordPos, Reserve};

use super::GroupShared;
use super::core::{Core, Edit, Structure, structure};
use super::jobs::discard;
use crate::codec::{Decoder, TableForm, put_varint};
use crate::heal::Retry;
use crate::manifest::{
    Manifest, ManifestOp, ManifestSettings, Places, TableShape, decode_op, encode_op, form_of, knows_time,
    names_operators, names_options, put_settings, take_settings,
};
use crate::stored::StoredTable;
use crate::{Error, ErrorKind, LogIndex, Result};

/// The kind of a manifest edit in the log.
pub(crate) const MANIFEST_EDIT: RecordKind = RecordKind(1);
/// The encoding of an edit that installs no table with range tombstones.
pub(crate) const EDIT_VERSION: u8 = 1;
/// The encoding of an edit whose settings say how tables are built: the first of a group. All others are written as before there was a choice.
pub(crate) const EDIT_VERSION_SHAPED: u8 = 2;
/// The encoding of one that installs such a table.
pub(crate) const EDIT_VERSION_RANGED: u8 = 3;
/// The encoding of one that names a merge operator.
pub(crate) const EDIT_VERSION_OPERATORS: u8 = 4;
/// The encoding of one of a group with expiring keyspaces that makes one or rotates: a byte says what is in it.
pub(crate) const EDIT_VERSION_EXPIRING: u8 = 5;
/// Bits of that byte: it has settings, they are those of [`EDIT_VERSION_SHAPED`], and its tables are of [`TableForm::Ranged`].
const WITH_SETTINGS: u8 = 1;
const WITH_SHAPED: u8 = 1 << 1;
const WITH_RANGES: u8 = 1 << 2;
/// Another one: its tables are of [`TableForm::Ending`].
const WITH_ENDS: u8 = 1 << 3;
/// The encoding of one that gives options to a keyspace, or a merge operator in an entry that rotates where there are expiring ones: the byte says all that is in it.
pub(crate) const EDIT_VERSION_PARTS: u8 = 6;
/// A bit of that byte: rotations say what is known of time.
const WITH_TIME: u8 = 1 << 4;
/// Of [`EDIT_VERSION_OPERATORS`]: its settings are those of [`EDIT_VERSION_SHAPED`].
const WITH_SHAPED_SETTINGS: u8 = 2;
/// Edits in the log after which pages are written.
const EDITS_MAX: usize = 512;

impl Durable {
    pub(super) fn new(lineage: u64) -> Self {
        Self { lineage, ..Self::default() }
    }

    /// True when no edit up to that index is on its way to the log, and what they replaced is given back.
    pub(super) fn is_settled_to(&self, index: LogIndex) -> bool {
        self.giving_back == 0 && self.pending.front().is_none_or(|pending| pending.index > index)
    }

    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }
}

/// Edits on their way to the log, and what waits for them.
#[derive(Default)]
pub(super) struct Durable {
    /// Of the state whose edits these are.
    lineage: u64,
    pending: VecDeque<Pending>,
    /// Edits that are durable in the log and not in pages.
    edits: usize,
    /// An edit was left out: only pages help.
    broken: bool,
    /// Tables that were made anew elsewhere; durable pages may still say that they lie here.
    replaced: Vec<StoredTable>,
    /// Who gives tables back that are pending no longer.
    giving_back: usize,
}

struct Pending {
    index: LogIndex,
    flushed: LogIndex,
    doomed: Vec<StoredTable>,
}

impl GroupShared {
    /// Takes the operations of an entry and moves on what can move.
    pub(super) fn queue_edit(self: &Arc<Self>, core: &mut Core, edit: Edit) {
        if let Some(overlay) = &mut core.overlay {
            apply_data(overlay, &edit);
        }
        core.queue.push_back(edit);
        self.advance(core);
    }

    /// Moves what can move. The caller publishes.
    pub(super) fn advance(self: &Arc<Self>, core: &mut Core) {
        let mut moved = false;
        while let Some(edit) = core.queue.front().cloned() {
            if !self.is_ready(core, &edit) {
                break;
            }
            core.queue.pop_front();
            self.make_present(core, &edit);
            moved = true;
        }
        if core.queue.is_empty() {
            core.overlay = None;
        } else if moved || core.overlay.is_none() {
            let mut overlay = core.present.clone();
            core.queue.iter().for_each(|edit| apply_data(&mut overlay, edit));
            core.overlay = Some(overlay);
        }
        // What was made for a job that has come to nothing.
        let (logical, present) = (&core.logical.jobs, &core.present.jobs);
        let gone: Vec<_> =
            core.done.keys().filter(|j| !logical.contains_key(j) && !present.contains_key(j)).copied().collect();
        for job in gone {
            core.done.remove(&job).into_iter().for_each(discard);
        }
        if moved {
            core.drop_flushed_memtables();
            self.engine.work.notify_one();
            self.offers.notify_waiters();
        }
    }

    /// True when every table that the edit installs is on this volume.
    fn is_ready(&self, core: &mut Core, edit: &Edit) -> bool {
        for op in &edit.ops {
            let ManifestOp::Install { job, tables } = op else { continue };
            match core.done.get(job) {
                Some(output) if output.tables.iter().map(|t| &t.meta).eq(tables) => {}
                Some(output) => {
                    // Never adopted in silence: the replica leaves service until it has fetched what the log says.
                    let own: Vec<_> = output.tables.iter().map(|t| format!("{:032x}", t.meta.digest)).collect();
                    let installed: Vec<_> = tables.iter().map(|t| format!("{:032x}", t.digest)).collect();
                    tracing::error!(group = %self.id, %job, index = %edit.index, ?own, ?installed,
                        "this replica made other tables from the same log");
                    self.divergences.fetch_add(1, Ordering::Relaxed);
                    core.diverged.insert(*job);
                    core.done.remove(job).into_iter().for_each(discard);
                    core.fetch = Retry::default();
                    self.heal.counts.work.notify_one();
                    return false;
                }
                None => {
                    let held = |t: &crate::manifest::TableRef| core.tables.get(&t.id).is_some_and(|s| s.meta == *t);
                    if tables.is_empty() || !tables.iter().all(held) {
                        if core.diverged.contains(job) || core.stuck.contains_key(job) {
                            // It will not be made here.
                            self.heal.counts.work.notify_one();
                        }
                        return false;
                    }
                }
            }
        }
        true
    }

    pub(super) fn make_present(self: &Arc<Self>, core: &mut Core, edit: &Edit) {
        let mut places = Places::new();
        let mut removed = BTreeMap::new();
        for op in &edit.ops {
            if let ManifestOp::Install { job, tables } = op {
                for stored in core.done.remove(job).into_iter().flat_map(|output| output.tables) {
                    core.tables.insert(stored.meta.id, stored);
                }
                core.diverged.remove(job);
                core.stuck.remove(job);
                places.extend(tables.iter().filter_map(|t| Some((t.id, core.tables.get(&t.id)?.place()))));
            }
            match core.present.apply(edit.index, op, true) {
                Ok(effects) => removed.extend(effects.removed.into_iter().map(|t| (t.id, t))),
                Err(error) => self.fail(Error::new(
                    ErrorKind::Internal,
                    format!("the present manifest refused what the logical one took: {error} index={}", edit.index),
                )),
            }
        }
        let unnamed = removed.values().filter(|t| !core.present.names(t));
        let doomed = unnamed
            .filter_map(|t| {
                self.heal.forget(t.id);
                core.tables.remove(&t.id)
            })
            .collect();
        let pending = Pending { index: edit.index, flushed: core.present.flushed(), doomed };
        let settings = std::mem::take(&mut core.born).then_some(core.present.settings);
        let payload = encode_edit(core.lineage, core.logged, edit, settings, &places);
        core.logged = edit.index;
        {
            let mut durable = self.durable();
            durable.pending.push_back(pending);
            if durable.broken {
                return self.engine.want_pages();
            }
        }
        let group = self.clone();
        let (lineage, index) = (core.lineage, edit.index);
        let record = Record { group: self.id, kind: MANIFEST_EDIT, payload: vec![payload] };
        let on_durable = Box::new(move |outcome| group.edit_logged(lineage, index, outcome));
        // One that finds no room is written with the manifest pages.
        self.engine.wal().append(record, Reserve::Install, on_durable);
    }

    /// The log tells what became of an edit. In order of the appends while they succeed.
    fn edit_logged(&self, lineage: u64, index: LogIndex, outcome: mainstay_wal::Result<RecordPos>) {
        match outcome {
            Ok(_) => {
                let mut durable = self.durable();
                if durable.broken || durable.lineage != lineage {
                    return;
                }
                durable.edits += 1;
                let many = durable.edits >= EDITS_MAX;
                drop(durable);
                self.settle(index);
                if many {
                    self.engine.want_pages();
                } else {
                    self.engine.check_log();
                }
            }
            Err(error) if error.kind() == mainstay_wal::ErrorKind::OutOfSpace => {
                self.durable().broken = true;
                self.engine.want_pages();
            }
            Err(error) => self.fail(error.into()),
        }
    }

    /// Everything up to `index` of the present manifest is durable.
    pub(super) fn settle(&self, index: LogIndex) {
        let mut doomed = Vec::new();
        let mut durable = self.durable();
        while durable.pending.front().is_some_and(|p| p.index <= index) {
            let Some(pending) = durable.pending.pop_front() else { break };
            self.flushed.fetch_max(pending.flushed.0, Ordering::AcqRel);
            doomed.extend(pending.doomed);
        }
        durable.giving_back += 1;
        drop(durable);
        doomed.iter().for_each(|stored: &StoredTable| stored.bytes.set_obsolete());
        drop(doomed);
        self.durable().giving_back -= 1;
        self.progress.notify_waiters();
    }

    /// Pages that hold the present manifest as of `index` are durable.
    pub(crate) fn pages_durable(&self, index: LogIndex) {
        self.settle(index);
        let mut durable = self.durable();
        let replaced = std::mem::take(&mut durable.replaced);
        replaced.iter().for_each(|stored| stored.bytes.set_obsolete());
        durable.edits = 0;
        if durable.broken {
            durable.broken = !durable.pending.is_empty();
            if durable.broken {
                self.engine.want_pages();
            }
        }
    }

    /// Another state takes the place of the one whose edits are on their way; its pages are durable. Returns the tables
    /// that waited to be given back.
    pub(super) fn replaced(&self, lineage: u64, flushed: LogIndex) -> Vec<StoredTable> {
        let mut durable = self.durable();
        let giving_back = durable.giving_back;
        let old = std::mem::replace(&mut *durable, Durable { lineage, giving_back, ..Durable::default() });
        self.flushed.store(flushed.0, Ordering::Release);
        old.pending.into_iter().flat_map(|p| p.doomed).chain(old.replaced).collect()
    }

    /// Edits are left out from here on, until pages are durable.
    pub(super) fn break_edits(&self) {
        self.durable().broken = true;
    }

    /// A table lies elsewhere from here on. The caller has the turn of the pages, so that none that say otherwise are on
    /// their way.
    pub(super) fn replace(&self, old: StoredTable) {
        self.durable().replaced.push(old);
    }

    /// Edits that pages would take out of the log.
    pub(crate) fn wants_pages(&self) -> bool {
        let durable = self.durable();
        durable.edits > 0 || durable.broken
    }

    pub(super) fn durable(&self) -> MutexGuard<'_, Durable> {
        // Every change is a push, a pop or a flag.
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows readers the state as entry `index` leaves it.
    pub(super) fn publish(&self, core: &mut Core, index: LogIndex) {
        self.publish_over(core, index, &self.structure.load());
    }

    /// As [`GroupShared::publish`]; shares with `before` what has not changed since.
    pub(super) fn publish_over(&self, core: &mut Core, index: LogIndex, before: &Structure) {
        let structure = structure(core, index, before);
        self.structure.store(Arc::new(structure));
        self.frozen.store(core.frozen_generations(), Ordering::Release);
        self.l0_runs.store(core.l0_runs_max(), Ordering::Release);
        self.diverged.store(!core.diverged.is_empty(), Ordering::Release);
        self.progress.notify_waiters();
    }

    /// Nothing is applied any more; why is told once.
    pub(super) fn fail(&self, error: Error) {
        if self.failed.set(error.clone()).is_ok() {
            tracing::error!(group = %self.id, %error, "the group is closed");
        }
        self.progress.notify_waiters();
        self.offers.notify_waiters();
        self.applies.notify_waiters();
    }
}

/// Applies what readers have to see before the tables of an install are here: everything but installs, and but compactions that were asked
/// for. Those change no data, and without installs none would end here: they would become more than there can be.
fn apply_data(overlay: &mut Manifest, edit: &Edit) {
    let data = |op: &&ManifestOp| !matches!(op, ManifestOp::Install { .. } | ManifestOp::Compact { .. });
    for op in edit.ops.iter().filter(data) {
        overlay.apply(edit.index, op, false).expect("the logical manifest took it, and installs change no name");
    }
}

fn encode_edit(
    lineage: u64,
    previous: LogIndex,
    edit: &Edit,
    settings: Option<ManifestSettings>,
    places: &Places,
) -> Bytes {
    let shaped = settings.is_some_and(|settings| settings.tables != TableShape::Uniform);
    let form = form_of(&edit.ops);
    assert!(!shaped || form == TableForm::Plain, "the first edit of a group installs nothing");
    let operators = names_operators(&edit.ops);
    let with_time = knows_time(&edit.ops);
    let in_parts = names_options(&edit.ops) || (operators && with_time);
    assert!(!(operators || in_parts) || form == TableForm::Plain, "what names an operator or options installs nothing");
    let version = match form {
        _ if in_parts => EDIT_VERSION_PARTS,
        _ if with_time => EDIT_VERSION_EXPIRING,
        TableForm::Plain if operators => EDIT_VERSION_OPERATORS,
        TableForm::Plain if shaped => EDIT_VERSION_SHAPED,
        TableForm::Plain => EDIT_VERSION,
        TableForm::Ranged => EDIT_VERSION_RANGED,
        TableForm::Ending => unreachable!("what has ends knows time"),
    };
    let with_settings = match (operators, shaped) {
        _ if in_parts || with_time => {
            let bit = |set: bool, bit| if set { bit } else { 0 };
            let tables = bit(form == TableForm::Ranged, WITH_RANGES) | bit(form == TableForm::Ending, WITH_ENDS);
            let time = bit(in_parts && with_time, WITH_TIME);
            bit(settings.is_some(), WITH_SETTINGS) | bit(shaped, WITH_SHAPED) | tables | time
        }
        (true, true) => WITH_SHAPED_SETTINGS,
        _ => settings.is_some().into(),
    };
    let mut out = vec![version, with_settings];
    put_varint(&mut out, lineage);
    put_varint(&mut out, previous.0);
    put_varint(&mut out, edit.index.0);
    if let Some(settings) = settings {
        put_settings(&mut out, &settings);
    }
    put_varint(&mut out, edit.ops.len() as u64);
    edit.ops.iter().for_each(|op| encode_op(&mut out, op, places, form, with_time));
    out.into()
}

/// A manifest as it was found on the volume.
#[derive(Clone, Debug)]
pub(crate) struct Recovered {
    pub(crate) lineage: u64,
    pub(crate) manifest: Manifest,
    pub(crate) places: Places,
    /// Where the oldest record of the owner lies that was found.
    pub(crate) oldest: Option<RecordPos>,
}

impl Recovered {
    /// Applies an edit found in the log to what is known of the group; `None` as long as nothing is.
    ///
    /// # Errors
    /// `Corrupt`, `Foreign`.
    pub(crate) fn apply_edit(known: &mut Option<Self>, group: GroupId, payload: Bytes) -> Result<()> {
        let mut from = Decoder::new(payload, "a manifest edit");
        let version = from.u8()?;
        let parts = from.u8()?;
        // What the byte may say where it is of bits.
        let bits = match version {
            EDIT_VERSION | EDIT_VERSION_SHAPED | EDIT_VERSION_RANGED | EDIT_VERSION_OPERATORS => None,
            EDIT_VERSION_EXPIRING => Some(WITH_SETTINGS | WITH_SHAPED | WITH_RANGES | WITH_ENDS),
            EDIT_VERSION_PARTS => Some(WITH_SETTINGS | WITH_SHAPED | WITH_RANGES | WITH_ENDS | WITH_TIME),
            version => {
                return Err(Error::new(
                    ErrorKind::Foreign,
                    format!("a manifest edit of another version version={version} known={EDIT_VERSION_PARTS}"),
                ));
            }
        };
        if bits.is_some_and(|bits| parts & !bits != 0) {
            return Err(Error::new(ErrorKind::Foreign, format!("a manifest edit with unknown parts parts={parts:#x}")));
        }
        let has = |bit: u8| bits.is_some() && parts & bit != 0;
        let form = match version {
            EDIT_VERSION_RANGED => TableForm::Ranged,
            _ if has(WITH_ENDS) => TableForm::Ending,
            _ if has(WITH_RANGES) => TableForm::Ranged,
            _ => TableForm::Plain,
        };
        let with_time = version == EDIT_VERSION_EXPIRING || has(WITH_TIME);
        let with_settings = if bits.is_some() { parts & WITH_SETTINGS } else { parts };
        let shaped = match version {
            EDIT_VERSION_OPERATORS => parts == WITH_SHAPED_SETTINGS,
            version => version == EDIT_VERSION_SHAPED || has(WITH_SHAPED),
        };
        let lineage = from.varint()?;
        let previous = LogIndex(from.varint()?);
        let index = LogIndex(from.varint()?);
        let settings = if with_settings != 0 { Some(take_settings(&mut from, !shaped)?) } else { None };
        if let (None, Some(settings)) = (&known, settings) {
            let manifest = Manifest::new(settings);
            *known = Some(Self { lineage, manifest, places: Places::new(), oldest: None });
        }
        // Edits from before the pages, of a state that an import replaced, or behind a gap in the chain.
        let Some(found) = known.as_mut().filter(|k| k.lineage == lineage && k.manifest.as_of == previous) else {
            tracing::debug!(%group, lineage, %previous, %index, "a manifest edit is not the next one");
            return Ok(());
        };
        let mut places = Places::new();
        for _ in 0..from.count(1)? {
            let op = decode_op(&mut from, &mut places, form, with_time)?;
            let effects = found.manifest.apply(index, &op, true).map_err(|error| {
                Error::new(ErrorKind::Corrupt, format!("a manifest edit cannot be applied: {error} index={index}"))
            })?;
            found.places.append(&mut places);
            for table in effects.removed {
                if !found.manifest.names(&table) {
                    found.places.remove(&table.id);
                }
            }
        }
        from.end()
    }
}
