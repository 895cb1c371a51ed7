//! A volume looked at while nobody has it open: what is in it, and whether every checksum holds.
//!
//! # Place
//! beside [`crate::Engine`]; for `mainstay inspect` and `mainstay verify`
//! # Invariants
//! 1. Nothing is written: no copy is mended, no tail is cut, no epoch is taken.
//! 2. Verifying goes on behind damage as far as it can, so that one report shows all of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::{Environment, Media};
use mainstay_wal::{BatchInfo, GroupId, Lsn, Recovery};

use super::{Identity, pages};
use crate::cache::BlockCache;
use crate::group::{MANIFEST_EDIT, Recovered};
use crate::manifest::{TableRef, Versions};
use crate::memory::MemoryBudget;
use crate::stored::{StoredBytes, StoredTable, extents_of};
use crate::table::Root;
use crate::volume::{Superblock, SuperblockReport, Volume, extents_bytes};
use crate::{Error, ErrorKind, InstallTable, KeyspaceId, LogIndex, OperatorId, Result, TableId};

/// Memory for blocks while tables are read.
const MEMORY_BYTES: u64 = 64 << 20;

/// A volume that is only looked at.
pub struct Offline {
    volume: Volume,
    report: SuperblockReport,
    budget: Arc<MemoryBudget>,
    cache: Arc<BlockCache>,
}

/// What the superblock says.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SuperblockInfo {
    /// One line for each copy.
    pub copies: Vec<String>,
    /// Copies that differ from what counts; an open writes them again.
    pub copies_differ: usize,
    /// Those of them that are no damage: a crash in the middle of an update left them whole, one update away.
    pub copies_cut_short: usize,
    /// Format version of the volume.
    pub format_version: u16,
    /// Made at format; in every batch of the log.
    pub volume: [u8; 16],
    /// Made at format; tells the volume from an earlier one of the same node.
    pub incarnation: [u8; 16],
    /// Whom the volume answers as.
    pub identity: Identity,
    /// Updates since format.
    pub sequence: u64,
    /// Opens since format.
    pub epoch: u64,
    /// Bytes of the log zone.
    pub wal_bytes: u64,
    /// Where the log begins.
    pub wal_start: Lsn,
    /// Where it ended at the last clean close.
    pub clean_end: Option<Lsn>,
    /// Bytes of the manifest pages, if there are any.
    pub root_bytes: Option<u64>,
    /// Where they lie: first unit and units of 64 KiB.
    pub root_extents: Vec<(u64, u64)>,
    /// Bytes of the extents zone.
    pub extents_bytes: u64,
    /// What the owners of the groups' logs keep there: see [`crate::OwnerNotes`].
    pub notes: Vec<(GroupId, Bytes)>,
}

/// A group as the manifest pages and the edits in the log describe it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GroupInfo {
    /// The group.
    pub group: GroupId,
    /// The last entry that changed its manifest.
    pub as_of: LogIndex,
    /// Entries up to here are in tables.
    pub flushed: LogIndex,
    /// Generations that are in no table yet.
    pub generations: usize,
    /// Jobs that were started and not installed.
    pub jobs: usize,
    /// Its keyspaces, dropped ones left out.
    pub keyspaces: Vec<(KeyspaceId, String)>,
    /// The merge operators of those that have one, and of dropped ones that a checkpoint still has.
    pub operators: Vec<(KeyspaceId, OperatorId)>,
    /// Its branches and checkpoints, with what each holds.
    pub sets: Vec<VersionSetInfo>,
    /// Every table, once.
    pub tables: Vec<TableInfo>,
}

/// The tables of a branch or checkpoint.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VersionSetInfo {
    /// `branch` or `checkpoint`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// For a clone the checkpoint it began as; for a checkpoint its index.
    pub origin: Option<String>,
    /// By keyspace and level (0 for the runs of L0): tables and their bytes.
    pub levels: Vec<(KeyspaceId, u8, usize, u64)>,
}

/// A table.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TableInfo {
    /// What names it.
    pub meta: InstallTable,
    /// Where it lies: first unit and units of 64 KiB.
    pub extents: Vec<(u64, u64)>,
    /// It has merge operands, or keys of which a merge was refused.
    pub merges: bool,
}

/// What [`Offline::verify`] found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Damage: which part, and what is wrong.
    pub damage: Vec<(String, String)>,
    /// Copies of the superblock that a crash in the middle of an update left whole and one update away, which an open would write again.
    pub superblock_copies_cut_short: usize,
    /// Batches of the log that were checked.
    pub wal_batches: u64,
    /// Records in them.
    pub wal_records: u64,
    /// Bytes of a torn tail, which an open would cut.
    pub wal_torn_bytes: u64,
    /// Tables that were checked.
    pub tables: u64,
    /// Their bytes.
    pub table_bytes: u64,
}

impl Offline {
    /// Reads the superblock.
    ///
    /// # Errors
    /// `Foreign`, `Corrupt`, `Invalid`, `Io`.
    pub async fn open(media: Arc<dyn Media>, environment: &Environment) -> Result<Self> {
        let (volume, report) = Volume::look(media, environment).await?;
        let budget = MemoryBudget::new(MEMORY_BYTES);
        let cache = BlockCache::new(&budget);
        Ok(Self { volume, report, budget, cache })
    }

    fn found(&self) -> &Superblock {
        &self.report.superblock
    }

    /// What the superblock says.
    pub fn superblock(&self) -> SuperblockInfo {
        let found = self.found();
        SuperblockInfo {
            copies: self.report.copies.to_vec(),
            copies_differ: self.report.differ,
            copies_cut_short: self.report.cut_short,
            format_version: found.version(),
            volume: found.volume,
            incarnation: found.incarnation,
            identity: Identity::from_bytes(found.identity),
            sequence: found.sequence,
            epoch: found.epoch,
            wal_bytes: found.wal_bytes,
            wal_start: found.wal_start,
            clean_end: found.clean_end,
            root_bytes: found.root.as_ref().map(|root| root.bytes),
            root_extents: found
                .root
                .iter()
                .flat_map(|root| &root.extents)
                .map(|e| (u64::from(e.first_unit), u64::from(e.units)))
                .collect(),
            extents_bytes: self.volume.extents_zone_bytes(),
            notes: found.notes.iter().map(|(group, note)| (GroupId(*group), note.clone())).collect(),
        }
    }

    /// Walks the log and hands every batch to `visit`. Every checksum of the log is checked.
    ///
    /// # Errors
    /// `Corrupt` naming the position, `Foreign`, `Io`.
    pub async fn wal(&self, visit: &mut (dyn FnMut(BatchInfo) + Send)) -> Result<Recovery> {
        let found = self.found();
        let mut hand_over = |batch| {
            visit(batch);
            Ok(())
        };
        let zone = self.volume.wal_zone();
        let walk =
            mainstay_wal::inspect(&zone, found.volume, found.wal_start, found.clean_end, found.closed, &mut hand_over);
        Ok(walk.await?)
    }

    /// The groups: manifest pages, and the edits in the log on top of them.
    ///
    /// # Errors
    /// `Corrupt`, `Foreign`, `Io`.
    pub async fn manifest(&self) -> Result<Vec<GroupInfo>> {
        let (mut groups, _) = self.pages().await?;
        self.apply_log(&mut groups).await?;
        Ok(groups.into_iter().filter_map(|(id, found)| Some(group_info(id, &found?))).collect())
    }

    /// Reads and checks every byte of one table.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Io`.
    pub async fn table(&self, group: GroupId, id: TableId) -> Result<TableInfo> {
        let groups = self.manifest().await?;
        let tables = groups.into_iter().filter(|g| g.group == group).flat_map(|g| g.tables);
        let Some(table) = tables.into_iter().find(|t| t.meta.id == id) else {
            return Err(Error::new(ErrorKind::NotFound, format!("no such table group={group} table={id}")));
        };
        self.verify_table(&Arc::new(table.meta.clone()), &table.extents).await?;
        Ok(table)
    }

    /// Reads everything and checks every checksum. `progress` is told the name of each part before it is read.
    ///
    /// # Errors
    /// `Io` and `Closed`: then it is not known whether the rest is sound. Damage is no error here but a line of the report.
    pub async fn verify(&self, progress: &mut (dyn FnMut(&str) + Send)) -> Result<VerifyReport> {
        let mut report = VerifyReport::default();
        progress("superblock");
        report.superblock_copies_cut_short = self.report.cut_short;
        let damaged = self.report.differ.saturating_sub(self.report.cut_short);
        if damaged > 0 {
            let what =
                format!("{damaged} of {} copies are damaged; an open writes them again", self.report.copies.len());
            report.damage.push(("superblock".into(), what));
        }
        progress("manifest");
        let mut groups = match self.pages().await {
            Ok((groups, 0)) => groups,
            Ok((groups, bad)) => {
                let what = format!("{bad} of {} copies of the manifest pages are damaged", pages::COPIES);
                report.damage.push(("manifest".into(), what));
                groups
            }
            Err(error) => {
                self.note(&mut report, "manifest", error)?;
                BTreeMap::new()
            }
        };
        progress("wal");
        match self.apply_log(&mut groups).await {
            Ok((batches, recovery)) => {
                report.wal_batches = batches;
                report.wal_records = recovery.records;
                report.wal_torn_bytes = recovery.torn_bytes;
            }
            Err(error) => self.note(&mut report, "wal", error)?,
        }
        let mut places: Vec<(u64, u64, String)> = Vec::new();
        for (group, found) in groups {
            let Some(found) = found else { continue };
            for (id, table) in found.manifest.tables() {
                let name = format!("table {group}/{id}");
                progress(&name);
                let place = found.places.get(&id).cloned().unwrap_or_default();
                places.extend(place.iter().map(|&(first, units)| (first, first.saturating_add(units), name.clone())));
                match self.verify_table(&table, &place).await {
                    Ok(()) => {
                        report.tables += 1;
                        report.table_bytes += table.bytes;
                    }
                    Err(error) => self.note(&mut report, &name, error)?,
                }
            }
        }
        let root = self.found().root.iter().flat_map(|root| &root.extents);
        let root = root.map(|e| (u64::from(e.first_unit), u64::from(e.first_unit) + u64::from(e.units)));
        places.extend(root.map(|(first, end)| (first, end, "manifest".to_owned())));
        places.sort();
        for pair in places.windows(2) {
            if let [(_, end, one), (next, _, other)] = pair
                && next < end
            {
                report.damage.push((other.clone(), format!("shares extents with {one}")));
            }
        }
        Ok(report)
    }

    /// Damage goes into the report; anything else ends the check.
    fn note(&self, report: &mut VerifyReport, part: &str, error: Error) -> Result<()> {
        match error.kind() {
            ErrorKind::Corrupt | ErrorKind::Foreign => {
                report.damage.push((part.to_owned(), error.to_string()));
                Ok(())
            }
            // A part of the medium that cannot be read is damage of what lies there.
            ErrorKind::Io => {
                report.damage.push((part.to_owned(), format!("cannot be read: {error}")));
                Ok(())
            }
            _ => Err(error),
        }
    }

    async fn pages(&self) -> Result<(BTreeMap<GroupId, Option<Recovered>>, u64)> {
        match &self.found().root {
            Some(root) => {
                let (groups, bad) = pages::read_pages(&self.volume, root).await?;
                Ok((groups.into_iter().map(|(id, r)| (id, Some(r))).collect(), bad))
            }
            None => Ok((BTreeMap::new(), 0)),
        }
    }

    async fn apply_log(&self, groups: &mut BTreeMap<GroupId, Option<Recovered>>) -> Result<(u64, Recovery)> {
        let mut edits: Vec<(GroupId, Bytes)> = Vec::new();
        let mut batches = 0;
        let recovery = self
            .wal(&mut |batch| {
                batches += 1;
                for record in batch.records {
                    if record.kind == MANIFEST_EDIT {
                        edits.push((record.group, record.payload));
                    }
                }
            })
            .await?;
        for (group, payload) in edits {
            Recovered::apply_edit(groups.entry(group).or_default(), group, payload)?;
        }
        for found in groups.values_mut().flatten() {
            let named = found.manifest.tables();
            found.places.retain(|id, _| named.contains_key(id));
        }
        Ok((batches, recovery))
    }

    async fn verify_table(&self, table: &TableRef, place: &[(u64, u64)]) -> Result<()> {
        let extents = extents_of(place)?;
        if extents_bytes(&extents) < table.bytes {
            let (have, need) = (extents_bytes(&extents), table.bytes);
            let message = format!("the extents of the table are too short bytes={need} extents_bytes={have}");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let bytes = StoredBytes::new(self.volume.clone(), extents, table.bytes);
        StoredTable::open(table.clone(), bytes, &self.cache, &self.budget, None)?.table.verify().await
    }
}

impl std::fmt::Debug for Offline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offline").field("volume", &self.volume).finish_non_exhaustive()
    }
}

fn group_info(group: GroupId, found: &Recovered) -> GroupInfo {
    let manifest = &found.manifest;
    let branches = manifest.branches.values().filter(|b| b.dropped.is_none()).map(|b| VersionSetInfo {
        kind: "branch",
        name: b.name.clone(),
        origin: b.origin.clone(),
        levels: levels(&b.versions),
    });
    let checkpoints = manifest.checkpoints.iter().map(|(name, c)| VersionSetInfo {
        kind: "checkpoint",
        name: name.clone(),
        origin: Some(c.index.to_string()),
        levels: levels(&c.versions),
    });
    let tables = manifest.tables().into_iter().map(|(id, table)| TableInfo {
        merges: Root::decode(&table.root).is_ok_and(|root| root.has_merges()),
        meta: (*table).clone(),
        extents: found.places.get(&id).cloned().unwrap_or_default(),
    });
    GroupInfo {
        group,
        as_of: manifest.as_of,
        flushed: manifest.flushed(),
        generations: manifest.generations.len(),
        jobs: manifest.jobs.len(),
        keyspaces: manifest
            .keyspaces
            .iter()
            .filter(|(_, k)| k.dropped.is_none())
            .map(|(&id, k)| (id, k.name.clone()))
            .collect(),
        operators: manifest.operators.iter().map(|(&id, assigned)| (id, assigned.operator.clone())).collect(),
        sets: branches.chain(checkpoints).collect(),
        tables: tables.collect(),
    }
}

fn levels(versions: &Versions) -> Vec<(KeyspaceId, u8, usize, u64)> {
    let mut out = Vec::new();
    for (&keyspace, version) in versions {
        let l0 = version.l0.iter().flat_map(|run| run.iter());
        let below = version.levels.iter().map(|level| level.iter());
        let mut add = |level: u8, tables: &mut dyn Iterator<Item = &TableRef>| {
            let (count, bytes) = tables.fold((0, 0), |(count, bytes), table| (count + 1, bytes + table.bytes));
            if count > 0 {
                out.push((keyspace, level, count, bytes));
            }
        };
        add(0, &mut l0.into_iter());
        for (level, mut tables) in (1..).zip(below) {
            add(level, &mut tables);
        }
    }
    out
}
