//! The manifest and its operations as bytes.
//!
//! # Format
//! docs/format.md, "Manifest". Each table is written once, each list of tables once: versions that share a level
//! name the same list, so a checkpoint costs a few bytes for each keyspace
//! # Invariants
//! 1. Equal manifests have equal bytes: nothing depends on addresses or on the order of events.
//! 2. Bytes of any content give a manifest that keeps the invariants of [`Version`], or `Corrupt`.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::manual::{MANUALS_MAX, Manual};
use super::picker::{Compaction, LAST};
use super::version::{LEVELS, Tables};
use super::{
    Assigned, Branch, Checkpoint, Chosen, FrozenGeneration, GenRef, Job, Keyspace, Manifest, ManifestOp,
    ManifestSettings, TableRef, TableShape, Version, Versions,
};
use crate::codec::{
    Decoder, SPAN_BYTES_MAX, TABLE_BYTES_MIN, TableForm, put_bytes, put_operator, put_span, put_table, put_varint,
    take_operator, take_span, take_table,
};
use crate::expiry::LogClock;
use crate::keyspace_options::{put_options, take_options};
use crate::{BranchId, Error, ErrorKind, Generation, JobId, KeyspaceId, LogIndex, Result, TableId};

/// The encoding of a manifest that needs none of what later ones add: builds from before read it.
pub(crate) const MANIFEST_VERSION: u8 = 1;
/// As [`MANIFEST_VERSION`], with compactions that were asked for at its end, and jobs that write tables of the last level again.
pub(crate) const MANIFEST_VERSION_MANUAL: u8 = 2;
/// As [`MANIFEST_VERSION_MANUAL`], with [`TableShape`] behind the settings: of every group that has one.
pub(crate) const MANIFEST_VERSION_SHAPED: u8 = 3;
/// As [`MANIFEST_VERSION`], with a byte that says what else there is; written where a table has range tombstones.
pub(crate) const MANIFEST_VERSION_PARTS: u8 = 4;
/// A bit of that byte: what [`MANIFEST_VERSION_MANUAL`] adds.
const PART_MANUALS: u8 = 1;
/// Another one: tables are of [`TableForm::Ranged`].
const PART_RANGED: u8 = 1 << 1;
/// Another one: what [`MANIFEST_VERSION_SHAPED`] adds to the settings.
const PART_SHAPE: u8 = 1 << 2;
/// Another one: merge operators of keyspaces at the end.
const PART_OPERATORS: u8 = 1 << 3;
/// Another one: expiring keyspaces at the end, and what is known of time.
const PART_EXPIRING: u8 = 1 << 4;
/// Another one: tables are of [`TableForm::Ending`].
const PART_ENDING: u8 = 1 << 5;
/// Another one: options of keyspaces at the end.
const PART_OPTIONS: u8 = 1 << 6;
/// The parts of [`MANIFEST_VERSION_SHAPED`].
const PARTS_SHAPED: u8 = PART_SHAPE | PART_MANUALS;

/// Where tables lie on this volume: `(offset, length)` of each extent in order.
pub(crate) type Places = BTreeMap<TableId, Vec<(u64, u64)>>;

/// No log counts this far: what comes after a decoded number can be counted without an overflow.
const NUMBER_MAX: u64 = u64::MAX >> 1;

const JOB_FLUSH: u8 = 1;
const JOB_COMPACT: u8 = 2;

const OP_ROTATE: u8 = 1;
const OP_INSTALL: u8 = 2;
const OP_CREATE_KEYSPACE: u8 = 3;
const OP_DROP_KEYSPACE: u8 = 4;
const OP_CREATE_CHECKPOINT: u8 = 5;
const OP_DROP_CHECKPOINT: u8 = 6;
const OP_CREATE_CLONE: u8 = 7;
const OP_DROP_CLONE: u8 = 8;
const OP_COMPACT: u8 = 9;
const OP_SET_OPERATOR: u8 = 10;
const OP_CREATE_EXPIRING: u8 = 11;
const OP_SET_OPTIONS: u8 = 12;

/// The kinds as docs/format.md has them.
#[cfg(test)]
pub(crate) const OP_KINDS: [(u8, &str); 12] = [
    (OP_ROTATE, "Rotate"),
    (OP_INSTALL, "Install"),
    (OP_CREATE_KEYSPACE, "CreateKeyspace"),
    (OP_DROP_KEYSPACE, "DropKeyspace"),
    (OP_CREATE_CHECKPOINT, "CreateCheckpoint"),
    (OP_DROP_CHECKPOINT, "DropCheckpoint"),
    (OP_CREATE_CLONE, "CreateClone"),
    (OP_DROP_CLONE, "DropClone"),
    (OP_COMPACT, "Compact"),
    (OP_SET_OPERATOR, "SetOperator"),
    (OP_CREATE_EXPIRING, "CreateExpiring"),
    (OP_SET_OPTIONS, "SetOptions"),
];

/// Numbers the tables and lists of a manifest in the order in which they are met.
#[derive(Default)]
struct Pool {
    tables: BTreeMap<TableId, TableRef>,
    lists: BTreeMap<Vec<TableId>, usize>,
    order: Vec<Vec<TableId>>,
    /// A list met before, by address: only saves work.
    known: BTreeMap<usize, usize>,
}

impl Pool {
    fn list(&mut self, list: &Tables) -> usize {
        let address = Arc::as_ptr(list) as usize;
        if let Some(&number) = self.known.get(&address) {
            return number;
        }
        self.tables.extend(list.iter().map(|t| (t.id, t.clone())));
        let ids: Vec<TableId> = list.iter().map(|t| t.id).collect();
        let next = self.order.len();
        let number = *self.lists.entry(ids.clone()).or_insert(next);
        if number == next {
            self.order.push(ids);
        }
        self.known.insert(address, number);
        number
    }
}

pub(super) fn encode(manifest: &Manifest, places: Option<&Places>) -> Bytes {
    let mut pool = Pool::default();
    let mut body = Vec::new();
    let count = |out: &mut Vec<u8>, n: usize| put_varint(out, n as u64);

    count(&mut body, manifest.keyspaces.len());
    for (id, keyspace) in &manifest.keyspaces {
        put_varint(&mut body, id.0.into());
        put_bytes(&mut body, keyspace.name.as_bytes());
        put_varint(&mut body, keyspace.created.0);
        put_option(&mut body, keyspace.dropped);
    }
    count(&mut body, manifest.branches.len());
    for (id, branch) in &manifest.branches {
        put_varint(&mut body, id.0);
        put_bytes(&mut body, branch.name.as_bytes());
        put_bytes(&mut body, branch.origin.as_deref().unwrap_or_default().as_bytes());
        put_varint(&mut body, branch.created_ms);
        put_option(&mut body, branch.dropped);
        put_versions(&mut body, &branch.versions, &mut pool);
    }
    count(&mut body, manifest.checkpoints.len());
    for (name, checkpoint) in &manifest.checkpoints {
        put_bytes(&mut body, name.as_bytes());
        put_varint(&mut body, checkpoint.index.0);
        put_varint(&mut body, checkpoint.created_ms);
        put_varint(&mut body, checkpoint.branch.0);
        count(&mut body, checkpoint.keyspaces.len());
        for (name, id) in &checkpoint.keyspaces {
            put_bytes(&mut body, name.as_bytes());
            put_varint(&mut body, id.0.into());
        }
        put_versions(&mut body, &checkpoint.versions, &mut pool);
    }
    count(&mut body, manifest.generations.len());
    for (id, generation) in &manifest.generations {
        put_varint(&mut body, id.0);
        put_varint(&mut body, generation.start.0);
        put_varint(&mut body, generation.end.0);
        put_varint(&mut body, generation.job.0);
        put_touched(&mut body, &generation.touched);
    }
    count(&mut body, manifest.jobs.len());
    for (id, job) in &manifest.jobs {
        put_varint(&mut body, id.0);
        match &**job {
            Job::Flush { generation } => {
                body.push(JOB_FLUSH);
                put_varint(&mut body, generation.0);
            }
            Job::Compact(c) => {
                body.push(JOB_COMPACT);
                put_varint(&mut body, c.branch.0);
                put_varint(&mut body, c.keyspace.0.into());
                body.extend([c.from, c.to, c.drop_tombstones.into()]);
                for inputs in [&c.upper, &c.lower] {
                    count(&mut body, inputs.len());
                    for table in inputs {
                        pool.tables.insert(table.id, table.clone());
                        put_id(&mut body, table.id);
                    }
                }
            }
        }
    }

    let again = |job: &Arc<Job>| matches!(&**job, Job::Compact(c) if c.from == c.to);
    let mut parts = 0;
    if manifest.settings.tables != TableShape::Uniform {
        parts |= PARTS_SHAPED;
    } else if !manifest.manuals.is_empty() || manifest.jobs.values().any(again) {
        parts |= PART_MANUALS;
    }
    if parts & PART_MANUALS != 0 {
        put_manuals(&mut body, manifest);
    }
    if !manifest.operators.is_empty() {
        parts |= PART_OPERATORS;
        count(&mut body, manifest.operators.len());
        for (id, assigned) in &manifest.operators {
            put_varint(&mut body, id.0.into());
            put_operator(&mut body, &assigned.operator);
            put_varint(&mut body, assigned.since.0);
        }
    }
    if !manifest.expiring.is_empty() {
        parts |= PART_EXPIRING;
        put_expiring(&mut body, manifest);
    }
    if !manifest.options.is_empty() {
        parts |= PART_OPTIONS;
        count(&mut body, manifest.options.len());
        for (id, chosen) in &manifest.options {
            put_varint(&mut body, id.0.into());
            count(&mut body, chosen.len());
            for one in chosen {
                put_varint(&mut body, one.since.0);
                put_options(&mut body, &one.options);
            }
        }
    }
    let form = TableForm::of(pool.tables.values().map(|table| &**table));
    parts |= match form {
        TableForm::Plain => 0,
        TableForm::Ranged => PART_RANGED,
        TableForm::Ending => PART_ENDING,
    };
    let mut out = match parts {
        0 => vec![MANIFEST_VERSION],
        PART_MANUALS => vec![MANIFEST_VERSION_MANUAL],
        PARTS_SHAPED => vec![MANIFEST_VERSION_SHAPED],
        parts => vec![MANIFEST_VERSION_PARTS, parts],
    };
    out.push(places.is_some().into());
    put_settings(&mut out, &manifest.settings);
    put_varint(&mut out, manifest.as_of.0);
    put_varint(&mut out, manifest.rotated.0);
    put_varint(&mut out, manifest.next_generation.0);
    put_varint(&mut out, manifest.next_job.0);
    put_varint(&mut out, manifest.next_keyspace.0.into());
    count(&mut out, pool.tables.len());
    for (id, table) in &pool.tables {
        put_table(&mut out, table, form);
        if let Some(places) = places {
            put_place(&mut out, places.get(id).map(Vec::as_slice).unwrap_or_default());
        }
    }
    count(&mut out, pool.order.len());
    for ids in &pool.order {
        count(&mut out, ids.len());
        ids.iter().for_each(|&id| put_id(&mut out, id));
    }
    out.extend_from_slice(&body);
    out.into()
}

pub(super) fn decode(bytes: Bytes) -> Result<(Manifest, Places)> {
    let mut from = Decoder::new(bytes, "a manifest");
    let parts = match from.u8()? {
        MANIFEST_VERSION => 0,
        MANIFEST_VERSION_MANUAL => PART_MANUALS,
        MANIFEST_VERSION_SHAPED => PARTS_SHAPED,
        MANIFEST_VERSION_PARTS => from.u8()?,
        version => {
            return Err(Error::new(
                ErrorKind::Foreign,
                format!("a manifest of another version version={version} known={MANIFEST_VERSION_PARTS}"),
            ));
        }
    };
    const KNOWN: u8 = PARTS_SHAPED | PART_RANGED | PART_OPERATORS | PART_EXPIRING | PART_ENDING | PART_OPTIONS;
    if parts & !KNOWN != 0 {
        return Err(Error::new(ErrorKind::Foreign, format!("a manifest with unknown parts parts={parts:#x}")));
    }
    let form = match (parts & PART_ENDING != 0, parts & PART_RANGED != 0) {
        (true, _) => TableForm::Ending,
        (false, true) => TableForm::Ranged,
        (false, false) => TableForm::Plain,
    };
    let with_places = from.u8()? != 0;
    let mut manifest = Manifest {
        settings: take_settings(&mut from, parts & PART_SHAPE == 0)?,
        as_of: LogIndex(from.varint()?),
        rotated: LogIndex(from.varint()?),
        rotated_clock: LogClock::default(),
        next_generation: Generation(from.varint()?),
        next_job: JobId(from.varint()?),
        next_keyspace: KeyspaceId(from.varint_u32()?),
        keyspaces: BTreeMap::new(),
        branches: BTreeMap::new(),
        checkpoints: BTreeMap::new(),
        generations: BTreeMap::new(),
        jobs: BTreeMap::new(),
        manuals: BTreeMap::new(),
        operators: BTreeMap::new(),
        expiring: BTreeMap::new(),
        options: BTreeMap::new(),
    };
    let mut places = Places::new();
    let mut tables = BTreeMap::new();
    for _ in 0..from.count(TABLE_BYTES_MIN)? {
        let table = take_table(&mut from, form)?;
        if with_places {
            places.insert(table.id, take_place(&mut from)?);
        }
        tables.insert(table.id, Arc::new(table));
    }
    let mut lists: Vec<Tables> = Vec::new();
    for _ in 0..from.count(1)? {
        let list = (0..from.count(2)?).map(|_| take_known(&mut from, &tables)).collect::<Result<Vec<_>>>()?;
        if !super::version::sorted(&list) {
            return Err(from.corrupt("tables of a list overlap"));
        }
        lists.push(Arc::new(list));
    }
    for _ in 0..from.count(4)? {
        let id = KeyspaceId(from.varint_u32()?);
        let name = from.name()?;
        let (created, dropped) = (LogIndex(from.varint()?), take_option(&mut from)?);
        manifest.keyspaces.insert(id, Keyspace { name, created, dropped });
    }
    for _ in 0..from.count(6)? {
        let id = BranchId(from.varint()?);
        let name = from.name()?;
        let origin = from.bytes(0, crate::codec::NAME_BYTES_MAX)?;
        let origin = String::from_utf8(origin.into()).map_err(|_| from.corrupt("a name is not UTF-8"))?;
        let branch = Branch {
            name,
            origin: (!origin.is_empty()).then_some(origin),
            created_ms: from.varint()?,
            dropped: take_option(&mut from)?,
            versions: take_versions(&mut from, &lists)?,
        };
        manifest.branches.insert(id, branch);
    }
    for _ in 0..from.count(6)? {
        let name = from.name()?;
        let checkpoint = Checkpoint {
            index: LogIndex(from.varint()?),
            created_ms: from.varint()?,
            branch: BranchId(from.varint()?),
            keyspaces: (0..from.count(3)?)
                .map(|_| Ok((from.name()?, KeyspaceId(from.varint_u32()?))))
                .collect::<Result<_>>()?,
            versions: take_versions(&mut from, &lists)?,
        };
        manifest.checkpoints.insert(name, Arc::new(checkpoint));
    }
    for _ in 0..from.count(5)? {
        let id = Generation(from.varint()?);
        let generation = FrozenGeneration {
            start: LogIndex(from.varint()?),
            start_clock: LogClock::default(),
            end: LogIndex(from.varint()?),
            job: JobId(from.varint()?),
            touched: take_touched(&mut from)?,
        };
        manifest.generations.insert(id, Arc::new(generation));
    }
    for _ in 0..from.count(3)? {
        let id = JobId(from.varint()?);
        let job = match from.u8()? {
            JOB_FLUSH => Job::Flush { generation: Generation(from.varint()?) },
            JOB_COMPACT => Job::Compact(take_compaction(&mut from, &tables)?),
            _ => return Err(from.corrupt("a job is of an unknown kind")),
        };
        manifest.jobs.insert(id, Arc::new(job));
    }
    if parts & PART_MANUALS != 0 {
        manifest.manuals = take_manuals(&mut from)?;
    }
    if parts & PART_OPERATORS != 0 {
        for _ in 0..from.count(4)? {
            let id = KeyspaceId(from.varint_u32()?);
            let assigned = Assigned { operator: take_operator(&mut from)?, since: LogIndex(from.varint()?) };
            manifest.operators.insert(id, assigned);
        }
    }
    if parts & PART_EXPIRING != 0 {
        take_expiring(&mut from, &mut manifest)?;
    }
    if parts & PART_OPTIONS != 0 {
        manifest.options = take_chosen(&mut from)?;
    }
    from.end()?;
    check(&manifest, &from)?;
    Ok((manifest, places))
}

fn take_chosen(from: &mut Decoder) -> Result<BTreeMap<KeyspaceId, Vec<Chosen>>> {
    let mut options = BTreeMap::new();
    for _ in 0..from.count(6)? {
        let id = KeyspaceId(from.varint_u32()?);
        let one = |from: &mut Decoder| Ok(Chosen { since: JobId(from.varint()?), options: take_options(from)? });
        let chosen = (0..from.count(4)?).map(|_| one(from)).collect::<Result<Vec<_>>>()?;
        if chosen.is_empty() || !chosen.is_sorted_by(|a, b| a.since < b.since) {
            return Err(from.corrupt("options of a keyspace are not in the order of their choice"));
        }
        options.insert(id, chosen);
    }
    if options.is_empty() {
        return Err(from.corrupt("no keyspace has options"));
    }
    Ok(options)
}

/// The keyspaces, then what is known of time where the generation in use begins and where each frozen one does, and up to when each compaction
/// drops what has ended, in their order.
fn put_expiring(out: &mut Vec<u8>, manifest: &Manifest) {
    put_varint(out, manifest.expiring.len() as u64);
    for (id, since) in &manifest.expiring {
        put_varint(out, id.0.into());
        put_varint(out, since.0);
    }
    put_clock(out, manifest.rotated_clock);
    manifest.generations.values().for_each(|generation| put_clock(out, generation.start_clock));
    for job in manifest.jobs.values() {
        if let Job::Compact(compaction) = &**job {
            put_varint(out, compaction.expired_by_ms);
        }
    }
}

fn take_expiring(from: &mut Decoder, manifest: &mut Manifest) -> Result<()> {
    for _ in 0..from.count(2)? {
        manifest.expiring.insert(KeyspaceId(from.varint_u32()?), LogIndex(from.varint()?));
    }
    if manifest.expiring.is_empty() {
        return Err(from.corrupt("no keyspace is expiring"));
    }
    manifest.rotated_clock = take_clock(from)?;
    for generation in manifest.generations.values_mut() {
        Arc::make_mut(generation).start_clock = take_clock(from)?;
    }
    for job in manifest.jobs.values_mut() {
        if let Job::Compact(compaction) = Arc::make_mut(job) {
            compaction.expired_by_ms = from.varint()?;
        }
    }
    Ok(())
}

fn put_clock(out: &mut Vec<u8>, clock: LogClock) {
    put_varint(out, clock.time_ms);
    put_varint(out, clock.latest_end_ms);
}

fn take_clock(from: &mut Decoder) -> Result<LogClock> {
    Ok(LogClock { time_ms: from.varint()?, latest_end_ms: from.varint()? })
}

pub(crate) fn put_settings(out: &mut Vec<u8>, settings: &ManifestSettings) {
    put_varint(out, settings.memtable_bytes);
    put_varint(out, settings.table_bytes);
    put_varint(out, settings.base_level_bytes);
    put_varint(out, settings.l0_compaction_runs.into());
    if settings.tables != TableShape::Uniform {
        out.push(settings.tables as u8);
    }
}

/// `uniform`: they were written without [`TableShape`].
pub(crate) fn take_settings(from: &mut Decoder, uniform: bool) -> Result<ManifestSettings> {
    Ok(ManifestSettings {
        memtable_bytes: from.varint()?,
        table_bytes: from.varint()?,
        base_level_bytes: from.varint()?,
        l0_compaction_runs: from.varint_u32()?,
        tables: if uniform { TableShape::Uniform } else { take_shape(from)? },
    })
}

fn take_shape(from: &mut Decoder) -> Result<TableShape> {
    let number = from.u8()?;
    TableShape::decode(number).ok_or_else(|| {
        Error::new(ErrorKind::Foreign, format!("tables of a shape that this build does not make shape={number}"))
    })
}

/// Relations that a decoded manifest must keep.
fn check(manifest: &Manifest, from: &Decoder) -> Result<()> {
    let mut end = None;
    for generation in manifest.generations.values() {
        if generation.start >= generation.end || end.is_some_and(|end| end != generation.start) {
            return Err(from.corrupt("generations are not contiguous"));
        }
        end = Some(generation.end);
        let flush = manifest.jobs.get(&generation.job);
        if !matches!(flush.map(|j| &**j), Some(Job::Flush { generation: g }) if manifest.generations.contains_key(g)) {
            return Err(from.corrupt("a generation has no job"));
        }
    }
    if end.is_some_and(|end| end != manifest.rotated) || manifest.rotated > manifest.as_of {
        return Err(from.corrupt("generations do not end where the next begins"));
    }
    // Every number in between is walked when replay looks for the generation of an entry.
    let ids = manifest.generations.keys().map(|g| g.0).rev();
    if !ids.zip((0..manifest.next_generation.0).rev()).all(|(id, expect)| id == expect) {
        return Err(from.corrupt("generations are not numbered one after the other"));
    }
    let numbers = [manifest.next_generation.0, manifest.next_job.0, manifest.as_of.0];
    if numbers.iter().any(|&number| number > NUMBER_MAX) {
        return Err(from.corrupt("a number is larger than any log makes it"));
    }
    let last = |id: Option<u64>, next: u64| id.is_none_or(|id| id < next);
    if !last(manifest.jobs.last_key_value().map(|(id, _)| id.0), manifest.next_job.0)
        || !last(manifest.generations.last_key_value().map(|(id, _)| id.0), manifest.next_generation.0)
        || !last(manifest.keyspaces.last_key_value().map(|(id, _)| id.0.into()), manifest.next_keyspace.0.into())
        || !last(manifest.operators.last_key_value().map(|(id, _)| id.0.into()), manifest.next_keyspace.0.into())
        || !last(manifest.options.last_key_value().map(|(id, _)| id.0.into()), manifest.next_keyspace.0.into())
    {
        return Err(from.corrupt("a number is used that comes later"));
    }
    for manual in manifest.manuals.values() {
        let job = |id| matches!(manifest.jobs.get(&id).map(|job| &**job), Some(Job::Compact(_)));
        if manifest.version(manual.branch, manual.keyspace).is_none() || !manual.job.is_none_or(job) {
            return Err(from.corrupt("a compaction was asked for of an unknown version, or its job is unknown"));
        }
    }
    if !manifest.branches.contains_key(&crate::MAIN) || !manifest.keyspaces.contains_key(&KeyspaceId(0)) {
        return Err(from.corrupt("the main branch or the default keyspace is missing"));
    }
    Ok(())
}

fn take_compaction(from: &mut Decoder, tables: &BTreeMap<TableId, TableRef>) -> Result<Compaction> {
    let (branch, keyspace) = (BranchId(from.varint()?), KeyspaceId(from.varint_u32()?));
    let (source, to, drop_tombstones) = (from.u8()?, from.u8()?, from.u8()? != 0);
    if (source >= to && (source, to) != (LAST, LAST)) || usize::from(to) > LEVELS {
        return Err(from.corrupt("a compaction between unknown levels"));
    }
    let mut inputs = || (0..from.count(2)?).map(|_| take_known(from, tables)).collect::<Result<Vec<_>>>();
    let (upper, lower) = (inputs()?, inputs()?);
    Ok(Compaction { branch, keyspace, from: source, to, upper, lower, drop_tombstones, expired_by_ms: 0 })
}

fn put_versions(out: &mut Vec<u8>, versions: &Versions, pool: &mut Pool) {
    put_varint(out, versions.len() as u64);
    for (keyspace, version) in versions {
        put_varint(out, keyspace.0.into());
        put_varint(out, version.frozen.len() as u64);
        for source in &version.frozen {
            put_varint(out, source.generation.0);
            put_varint(out, source.branch.0);
        }
        put_varint(out, version.l0.len() as u64);
        for list in version.lists() {
            put_varint(out, pool.list(list) as u64);
        }
    }
}

fn take_versions(from: &mut Decoder, lists: &[Tables]) -> Result<Versions> {
    let mut versions = Versions::new();
    for _ in 0..from.count(LEVELS.saturating_add(3))? {
        let keyspace = KeyspaceId(from.varint_u32()?);
        let frozen = (0..from.count(2)?)
            .map(|_| Ok(GenRef { generation: Generation(from.varint()?), branch: BranchId(from.varint()?) }))
            .collect::<Result<_>>()?;
        let mut version = Version { frozen, ..Version::default() };
        for _ in 0..from.count(1)? {
            version.l0.push(take_list(from, lists)?);
        }
        for level in &mut version.levels {
            *level = take_list(from, lists)?;
        }
        if !version.is_sound() {
            return Err(from.corrupt("a run is empty"));
        }
        versions.insert(keyspace, Arc::new(version));
    }
    Ok(versions)
}

fn take_list(from: &mut Decoder, lists: &[Tables]) -> Result<Tables> {
    let at = from.varint()?;
    let list = usize::try_from(at).ok().and_then(|at| lists.get(at));
    list.cloned().ok_or_else(|| from.corrupt("a version names an unknown list"))
}

fn put_manuals(out: &mut Vec<u8>, manifest: &Manifest) {
    put_varint(out, manifest.manuals.len() as u64);
    for (index, manual) in &manifest.manuals {
        put_varint(out, index.0);
        put_varint(out, manual.branch.0);
        put_varint(out, manual.keyspace.0.into());
        put_span(out, &manual.first, manual.end.as_ref());
        put_varint(out, manual.before.0);
        out.push(manual.level);
        put_bytes(out, &manual.cursor);
        put_varint(out, manual.job.map_or(0, |job| job.0));
    }
}

fn take_manuals(from: &mut Decoder) -> Result<BTreeMap<LogIndex, Manual>> {
    let mut manuals = BTreeMap::new();
    for _ in 0..from.count(9)? {
        let index = LogIndex(from.varint()?);
        let (branch, keyspace) = (BranchId(from.varint()?), KeyspaceId(from.varint_u32()?));
        let (first, end) = take_span(from)?;
        let (before, level) = (JobId(from.varint()?), from.u8()?);
        let cursor = from.bytes(0, SPAN_BYTES_MAX)?;
        let job = Some(JobId(from.varint()?)).filter(|job| job.0 > 0);
        if level > LAST {
            return Err(from.corrupt("a compaction has come to an unknown level"));
        }
        manuals.insert(index, Manual { branch, keyspace, first, end, before, level, cursor, job });
    }
    if manuals.len() > MANUALS_MAX {
        return Err(from.corrupt("more compactions were asked for than there can be"));
    }
    Ok(manuals)
}

fn put_id(out: &mut Vec<u8>, id: TableId) {
    put_varint(out, id.job.0);
    put_varint(out, id.ordinal.into());
}

fn take_known(from: &mut Decoder, tables: &BTreeMap<TableId, TableRef>) -> Result<TableRef> {
    let id = TableId { job: JobId(from.varint()?), ordinal: from.varint_u32()? };
    tables.get(&id).cloned().ok_or_else(|| from.corrupt("a list names an unknown table"))
}

fn put_option(out: &mut Vec<u8>, index: Option<LogIndex>) {
    out.push(index.is_some().into());
    if let Some(index) = index {
        put_varint(out, index.0);
    }
}

fn take_option(from: &mut Decoder) -> Result<Option<LogIndex>> {
    Ok(if from.u8()? == 0 { None } else { Some(LogIndex(from.varint()?)) })
}

fn put_touched(out: &mut Vec<u8>, touched: &[(BranchId, KeyspaceId)]) {
    put_varint(out, touched.len() as u64);
    for (branch, keyspace) in touched {
        put_varint(out, branch.0);
        put_varint(out, keyspace.0.into());
    }
}

fn take_touched(from: &mut Decoder) -> Result<Vec<(BranchId, KeyspaceId)>> {
    (0..from.count(2)?).map(|_| Ok((BranchId(from.varint()?), KeyspaceId(from.varint_u32()?)))).collect()
}

fn put_place(out: &mut Vec<u8>, place: &[(u64, u64)]) {
    put_varint(out, place.len() as u64);
    for &(offset, length) in place {
        put_varint(out, offset);
        put_varint(out, length);
    }
}

fn take_place(from: &mut Decoder) -> Result<Vec<(u64, u64)>> {
    (0..from.count(2)?).map(|_| Ok((from.varint()?, from.varint()?))).collect()
}

/// The form in which the tables of these operations can be written.
pub(crate) fn form_of(ops: &[ManifestOp]) -> TableForm {
    let tables = ops.iter().flat_map(|op| match op {
        ManifestOp::Install { tables, .. } => tables.as_slice(),
        _ => &[],
    });
    TableForm::of(tables.map(|table| &**table))
}

/// One of these operations names a merge operator.
pub(crate) fn names_operators(ops: &[ManifestOp]) -> bool {
    ops.iter().any(|op| matches!(op, ManifestOp::SetOperator { .. }))
}

/// One of these operations gives options to a keyspace.
pub(crate) fn names_options(ops: &[ManifestOp]) -> bool {
    ops.iter().any(|op| matches!(op, ManifestOp::SetOptions { .. }))
}

/// One of these operations is of a group with expiring keyspaces.
pub(crate) fn knows_time(ops: &[ManifestOp]) -> bool {
    ops.iter().any(|op| match op {
        ManifestOp::CreateExpiring { .. } | ManifestOp::Rotate { clock: Some(_), .. } => true,
        ManifestOp::Install { tables, .. } => tables.iter().any(|table| table.has_ends()),
        _ => false,
    })
}

/// Appends an operation; an `Install` with the places of its tables.
/// `with_time`: rotations say what is known of time.
pub(crate) fn encode_op(out: &mut Vec<u8>, op: &ManifestOp, places: &Places, form: TableForm, with_time: bool) {
    match op {
        ManifestOp::Rotate { touched, clock } => {
            out.push(OP_ROTATE);
            put_touched(out, touched);
            if with_time {
                put_clock(out, clock.unwrap_or_default());
            }
        }
        ManifestOp::Install { job, tables } => {
            out.push(OP_INSTALL);
            put_varint(out, job.0);
            put_varint(out, tables.len() as u64);
            for table in tables {
                put_table(out, table, form);
                put_place(out, places.get(&table.id).map(Vec::as_slice).unwrap_or_default());
            }
        }
        ManifestOp::CreateKeyspace { name } => put_named(out, OP_CREATE_KEYSPACE, name),
        ManifestOp::CreateExpiring { name } => put_named(out, OP_CREATE_EXPIRING, name),
        ManifestOp::DropKeyspace { name } => put_named(out, OP_DROP_KEYSPACE, name),
        ManifestOp::CreateCheckpoint { name, branch, time_ms } => {
            put_named(out, OP_CREATE_CHECKPOINT, name);
            put_varint(out, branch.0);
            put_varint(out, *time_ms);
        }
        ManifestOp::DropCheckpoint { name } => put_named(out, OP_DROP_CHECKPOINT, name),
        ManifestOp::CreateClone { name, checkpoint, time_ms } => {
            put_named(out, OP_CREATE_CLONE, name);
            put_bytes(out, checkpoint.as_bytes());
            put_varint(out, *time_ms);
        }
        ManifestOp::DropClone { name } => put_named(out, OP_DROP_CLONE, name),
        ManifestOp::SetOperator { name, operator } => {
            put_named(out, OP_SET_OPERATOR, name);
            put_operator(out, operator);
        }
        ManifestOp::SetOptions { name, options } => {
            put_named(out, OP_SET_OPTIONS, name);
            put_options(out, options);
        }
        ManifestOp::Compact { branch, keyspace, first, end } => {
            out.push(OP_COMPACT);
            put_varint(out, branch.0);
            put_varint(out, keyspace.0.into());
            put_span(out, first, end.as_ref());
        }
    }
}

fn put_named(out: &mut Vec<u8>, tag: u8, name: &str) {
    out.push(tag);
    put_bytes(out, name.as_bytes());
}

/// Reads what [`encode_op`] wrote and adds the places to `places`.
pub(crate) fn decode_op(
    from: &mut Decoder,
    places: &mut Places,
    form: TableForm,
    with_time: bool,
) -> Result<ManifestOp> {
    Ok(match from.u8()? {
        OP_ROTATE => {
            let touched = take_touched(from)?;
            ManifestOp::Rotate { touched, clock: if with_time { Some(take_clock(from)?) } else { None } }
        }
        OP_INSTALL => {
            let job = JobId(from.varint()?);
            let mut tables = Vec::new();
            for _ in 0..from.count(TABLE_BYTES_MIN)? {
                let table = take_table(from, form)?;
                places.insert(table.id, take_place(from)?);
                tables.push(Arc::new(table));
            }
            ManifestOp::Install { job, tables }
        }
        OP_CREATE_KEYSPACE => ManifestOp::CreateKeyspace { name: from.name()? },
        OP_CREATE_EXPIRING => ManifestOp::CreateExpiring { name: from.name()? },
        OP_DROP_KEYSPACE => ManifestOp::DropKeyspace { name: from.name()? },
        OP_CREATE_CHECKPOINT => ManifestOp::CreateCheckpoint {
            name: from.name()?,
            branch: BranchId(from.varint()?),
            time_ms: from.varint()?,
        },
        OP_DROP_CHECKPOINT => ManifestOp::DropCheckpoint { name: from.name()? },
        OP_CREATE_CLONE => {
            ManifestOp::CreateClone { name: from.name()?, checkpoint: from.name()?, time_ms: from.varint()? }
        }
        OP_DROP_CLONE => ManifestOp::DropClone { name: from.name()? },
        OP_SET_OPERATOR => ManifestOp::SetOperator { name: from.name()?, operator: take_operator(from)? },
        OP_SET_OPTIONS => ManifestOp::SetOptions { name: from.name()?, options: take_options(from)? },
        OP_COMPACT => {
            let (branch, keyspace) = (BranchId(from.varint()?), KeyspaceId(from.varint_u32()?));
            let (first, end) = take_span(from)?;
            ManifestOp::Compact { branch, keyspace, first, end }
        }
        _ => return Err(from.corrupt("an operation is of an unknown kind")),
    })
}
