//! Commands on a volume that no process has open: `format`, `verify`, `inspect`. The last two write nothing.

use std::path::Path;

use mainstay::{Store, target_of};
use mainstay_engine::{GroupInfo, Offline, TableId, TableInfo};
use mainstay_io::{Environment, MediaOptions};
use mainstay_wal::{BatchInfo, GroupId, RecordKind};
use serde_json::{Value, json};

use crate::cli::{Failure, FormatArgs, InspectCommand, OfflineArgs, print};
use crate::status::hex;
use crate::units::ByteSize;

/// Bytes of a key that are shown.
const KEY_SHOWN_BYTES: usize = 1024;

/// Lays out a volume.
pub(crate) fn format(args: &FormatArgs) -> Result<(), Failure> {
    let builder = Store::builder().wal_bytes(args.wal.0).backend(args.backend.into());
    mainstay_io::block_on(builder.format(target_of(&args.data), args.force))?;
    let document = json!({ "formatted": args.data, "wal_bytes": args.wal.0 });
    print(args.json, &document, || format!("formatted {} with a log of {}", args.data.display(), args.wal))
}

fn engine(error: mainstay_engine::Error) -> Failure {
    Failure::other(error.to_string())
}

async fn open(data: &Path) -> Result<Offline, Failure> {
    let media = mainstay_io::open_media(&target_of(data), &MediaOptions::default());
    let media = media.map_err(|e| Failure::other(e.to_string()))?;
    Offline::open(media, &Environment::system()).await.map_err(engine)
}

/// Checks every checksum.
pub(crate) fn verify(args: &OfflineArgs) -> Result<(), Failure> {
    let report = mainstay_io::block_on(async {
        let volume = open(&args.data).await?;
        volume.verify(&mut |_| {}).await.map_err(engine)
    })?;
    let damage: Vec<Value> = report.damage.iter().map(|(part, what)| json!({ "part": part, "what": what })).collect();
    let document = json!({
        "sound": damage.is_empty(),
        "damage": damage,
        "superblock_copies_cut_short": report.superblock_copies_cut_short,
        "wal_batches": report.wal_batches,
        "wal_records": report.wal_records,
        "wal_torn_bytes": report.wal_torn_bytes,
        "tables": report.tables,
        "table_bytes": report.table_bytes,
    });
    print(args.json, &document, || {
        let mut text = format!(
            "{} batches with {} records of the log and {} tables of {} are as they were written\n",
            report.wal_batches,
            report.wal_records,
            report.tables,
            ByteSize(report.table_bytes)
        );
        if report.superblock_copies_cut_short > 0 {
            let count = report.superblock_copies_cut_short;
            text += &format!("an update of the superblock was cut short: the next start writes {count} copies again\n");
        }
        if report.wal_torn_bytes > 0 {
            text += &format!("the log ends in {} torn bytes, never acknowledged\n", report.wal_torn_bytes);
        }
        for (part, what) in &report.damage {
            text += &format!("DAMAGED {part}: {what}\n");
        }
        text
    })?;
    match report.damage.len() {
        0 => Ok(()),
        count => Err(Failure::other(format!("the volume is damaged parts={count} path={}", args.data.display()))),
    }
}

/// Shows a part.
pub(crate) fn inspect(command: &InspectCommand) -> Result<(), Failure> {
    mainstay_io::block_on(async {
        match command {
            InspectCommand::Superblock(args) => superblock(args).await,
            InspectCommand::Wal(args) => wal(args).await,
            InspectCommand::Manifest(args) => manifest(args).await,
            InspectCommand::Table { id, volume } => table(id, volume).await,
        }
    })
}

/// `key: value` a line, for a flat document.
fn lines(document: &Value) -> String {
    let Value::Object(map) = document else { return document.to_string() };
    map.iter()
        .map(|(key, value)| format!("{key}: {}\n", value.as_str().map_or(value.to_string(), str::to_owned)))
        .collect()
}

async fn superblock(args: &OfflineArgs) -> Result<(), Failure> {
    let found = open(&args.data).await?.superblock();
    let document = json!({
        "copies": found.copies,
        "copies_differ": found.copies_differ,
        "copies_cut_short": found.copies_cut_short,
        "format_version": found.format_version,
        "volume": hex(&found.volume),
        "incarnation": hex(&found.incarnation),
        "cluster": hex(&found.identity.cluster),
        "node": found.identity.node,
        "sequence": found.sequence,
        "epoch": found.epoch,
        "wal_bytes": found.wal_bytes,
        "wal_start": found.wal_start.0,
        "clean_end": found.clean_end.map(|end| end.0),
        "root_bytes": found.root_bytes,
        "extents_bytes": found.extents_bytes,
        "notes": found.notes.iter().map(|(group, note)| format!("group {} {}", group.0, hex(note))).collect::<Vec<_>>(),
    });
    print(args.json, &document, || lines(&document))
}

fn batch_document(batch: &BatchInfo) -> Value {
    let records: Vec<Value> = batch
        .records
        .iter()
        .map(|record| {
            let owner = if record.kind.0 < RecordKind::OWNER_FIRST { "engine" } else { "log" };
            json!({
                "group": record.group.0,
                "kind": record.kind.0,
                "owner": owner,
                "offset": record.pos.offset,
                "bytes": record.payload.len(),
            })
        })
        .collect();
    json!({
        "lsn": batch.lsn.0,
        "bytes": batch.bytes,
        "epoch": batch.epoch,
        "durable": batch.durable.0,
        "checksum": format!("{:016x}", batch.checksum),
        "records": records,
    })
}

async fn wal(args: &OfflineArgs) -> Result<(), Failure> {
    let volume = open(&args.data).await?;
    let mut batches = Vec::new();
    let mut text = String::new();
    let recovery = volume
        .wal(&mut |batch| {
            if args.json {
                batches.push(batch_document(&batch));
                return;
            }
            text += &format!("batch lsn={} bytes={} epoch={}\n", batch.lsn, batch.bytes, batch.epoch);
            for record in &batch.records {
                let (group, kind, bytes) = (record.group, record.kind.0, record.payload.len());
                text += &format!("  record group={group} kind={kind} offset={} bytes={bytes}\n", record.pos.offset);
            }
        })
        .await
        .map_err(engine)?;
    let document = json!({
        "batches": batches,
        "records": recovery.records,
        "end": recovery.end.0,
        "torn_bytes": recovery.torn_bytes,
    });
    print(args.json, &document, || {
        let (count, records, torn) = (recovery.batches, recovery.records, recovery.torn_bytes);
        text + &format!("end lsn={} batches={count} records={records} torn_bytes={torn}\n", recovery.end)
    })
}

/// The beginning of a key: where a range without an end is removed, the last key of its table is the longest there can be.
fn shown(key: &[u8]) -> &[u8] {
    key.get(..KEY_SHOWN_BYTES).unwrap_or(key)
}

fn table_document(group: GroupId, table: &TableInfo) -> Value {
    let meta = &table.meta;
    json!({
        "id": format!("{group}/{}", meta.id),
        "branch": meta.branch.0,
        "keyspace": meta.keyspace.0,
        "first": String::from_utf8_lossy(shown(&meta.first)),
        "last": String::from_utf8_lossy(shown(&meta.last)),
        "entries": meta.entries,
        "tombstones": meta.tombstones,
        "range_tombstones": meta.ranges.tombstones,
        "half_ended_ms": meta.ends.half_ms,
        "all_ended_ms": meta.ends.last_ms,
        "merges": table.merges,
        "bytes": meta.bytes,
        "digest": format!("{:032x}", meta.digest),
        "extents": table.extents.iter().map(|(first, units)| json!({ "first_unit": first, "units": units })).collect::<Vec<_>>(),
    })
}

fn group_document(group: &GroupInfo) -> Value {
    let levels = |levels: &[(mainstay::KeyspaceId, u8, usize, u64)]| -> Vec<Value> {
        let level = |(keyspace, level, tables, bytes): &(mainstay::KeyspaceId, u8, usize, u64)| json!({ "keyspace": keyspace.0, "level": level, "tables": tables, "bytes": bytes });
        levels.iter().map(level).collect()
    };
    json!({
        "group": group.group.0,
        "as_of": group.as_of.0,
        "flushed": group.flushed.0,
        "generations": group.generations,
        "jobs": group.jobs,
        "keyspaces": group.keyspaces.iter().map(|(id, name)| json!({ "id": id.0, "name": name })).collect::<Vec<_>>(),
        "operators": group.operators.iter().map(|(id, operator)| json!({
            "keyspace": id.0,
            "name": operator.name(),
            "version": operator.version(),
        })).collect::<Vec<_>>(),
        "sets": group.sets.iter().map(|set| json!({
            "kind": set.kind,
            "name": set.name,
            "origin": set.origin,
            "levels": levels(&set.levels),
        })).collect::<Vec<_>>(),
        "tables": group.tables.iter().map(|table| table_document(group.group, table)).collect::<Vec<_>>(),
    })
}

fn group_text(group: &GroupInfo) -> String {
    let mut text = format!(
        "group {} as_of={} flushed={} generations={} jobs={} tables={}\n",
        group.group,
        group.as_of,
        group.flushed,
        group.generations,
        group.jobs,
        group.tables.len()
    );
    for (id, name) in &group.keyspaces {
        text += &format!("  keyspace {id} {name}\n");
    }
    for (id, operator) in &group.operators {
        text += &format!("  keyspace {id} has the merge operator {operator}\n");
    }
    for set in &group.sets {
        let origin = set.origin.as_deref().map(|origin| format!(" of {origin}")).unwrap_or_default();
        text += &format!("  {} {}{origin}\n", set.kind, set.name);
        for (keyspace, level, tables, bytes) in &set.levels {
            text += &format!("    keyspace {keyspace} level {level}: {tables} tables of {}\n", ByteSize(*bytes));
        }
    }
    for table in &group.tables {
        let meta = &table.meta;
        let (first, last) = (shown(&meta.first).escape_ascii(), shown(&meta.last).escape_ascii());
        let ranges = match meta.ranges.tombstones {
            0 => String::new(),
            count => format!(", {count} range tombstones"),
        };
        text += &format!(
            "  table {}/{} {} entries{ranges}{}, {}, from {first} to {last}\n",
            group.group,
            meta.id,
            meta.entries,
            if table.merges { ", with merges" } else { "" },
            ByteSize(meta.bytes)
        );
    }
    text
}

async fn manifest(args: &OfflineArgs) -> Result<(), Failure> {
    let groups = open(&args.data).await?.manifest().await.map_err(engine)?;
    let document: Vec<Value> = groups.iter().map(group_document).collect();
    print(args.json, &document, || groups.iter().map(group_text).collect())
}

/// `GROUP/JOB-ORDINAL`, as the manifest shows it.
fn parse_table(text: &str) -> Option<(GroupId, TableId)> {
    let (group, table) = text.split_once('/')?;
    let (job, ordinal) = table.split_once('-')?;
    let id = TableId { job: mainstay_engine::JobId(job.parse().ok()?), ordinal: ordinal.parse().ok()? };
    Some((GroupId(group.parse().ok()?), id))
}

async fn table(id: &str, args: &OfflineArgs) -> Result<(), Failure> {
    let wrong = || Failure::usage(format!("a table is GROUP/JOB-ORDINAL, as `inspect manifest` shows it found='{id}'"));
    let (group, table) = parse_table(id).ok_or_else(wrong)?;
    let found = open(&args.data).await?.table(group, table).await.map_err(engine)?;
    let mut document = table_document(group, &found);
    document["sound"] = true.into();
    print(args.json, &document, || lines(&document))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_named_as_the_manifest_shows_it() {
        let id = TableId { job: mainstay_engine::JobId(12), ordinal: 3 };
        assert_eq!(parse_table("1/12-3"), Some((GroupId(1), id)));
        assert_eq!(parse_table(&format!("{}/{id}", GroupId(1))), Some((GroupId(1), id)));
        for wrong in ["", "12-3", "1/12", "a/1-2", "1/-2", "1/2-"] {
            assert_eq!(parse_table(wrong), None, "{wrong}");
        }
    }
}
