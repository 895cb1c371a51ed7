//! Tables of cases for the operations and the picker, and two manifests that must stay equal.

#![allow(
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::type_complexity,
    reason = "tests; proptest spawns its own"
)]

use bytes::Bytes;
use proptest::prelude::*;

use super::picker::{LEVEL_RATIO, Pick, Rules, pick, targets};
use super::version::{LEVELS, Tables, overlap};
use super::*;
use crate::codec::{Decoder, TableForm};
use crate::range_tombstone::{KeyRange, last_before};
use crate::{CompactionStyle, ErrorKind, Result, TableEnds, TableRanges};

mod options;

const PICKER: ManifestSettings = ManifestSettings {
    memtable_bytes: 1 << 20,
    table_bytes: 1 << 20,
    base_level_bytes: 1000,
    l0_compaction_runs: 4,
    tables: TableShape::Uniform,
};

fn table(job: u64, ordinal: u32, first: &str, last: &str, bytes: u64) -> TableRef {
    Arc::new(InstallTable {
        id: TableId { job: JobId(job), ordinal },
        branch: MAIN,
        keyspace: KeyspaceId(0),
        first: Bytes::copy_from_slice(first.as_bytes()),
        last: Bytes::copy_from_slice(last.as_bytes()),
        entries: 1,
        tombstones: 0,
        bytes,
        digest: u128::from(job) << 32 | u128::from(ordinal),
        root: Bytes::from_static(b"root"),
        ranges: TableRanges::default(),
        ends: TableEnds::default(),
    })
}

/// The same with range tombstones over these keys; an empty end is none. `bare`: and nothing else but tombstones.
fn ranged(t: &TableRef, spans: &[(&str, &str)], bare: bool) -> TableRef {
    let key = |key: &str| Bytes::copy_from_slice(key.as_bytes());
    let span = |&(a, b): &(&str, &str)| KeyRange::from_parts(key(a), (!b.is_empty()).then(|| key(b)));
    let spans: Vec<_> = spans.iter().map(span).collect();
    let last = spans.last().map_or(t.last.clone(), |span| last_before(span.end_place()).max(t.last.clone()));
    let ranges = TableRanges { tombstones: spans.len() as u64, spans };
    Arc::new(InstallTable { last, ranges, tombstones: bare.into(), ..(**t).clone() })
}

fn in_place(t: &TableRef, branch: BranchId, keyspace: u32) -> TableRef {
    Arc::new(InstallTable { branch, keyspace: KeyspaceId(keyspace), ..(**t).clone() })
}

fn apply(manifest: &mut Manifest, index: u64, op: ManifestOp) -> Result<Effects> {
    manifest.apply(LogIndex(index), &op, true)
}

fn ok(manifest: &mut Manifest, index: u64, op: ManifestOp) -> Effects {
    apply(manifest, index, op).expect("the operation is valid here")
}

fn rotate(touched: &[(u64, u32)]) -> ManifestOp {
    ManifestOp::Rotate { touched: touched.iter().map(|&(b, k)| (BranchId(b), KeyspaceId(k))).collect(), clock: None }
}

fn install(job: u64, tables: Vec<TableRef>) -> ManifestOp {
    ManifestOp::Install { job: JobId(job), tables }
}

fn checkpoint(name: &str) -> ManifestOp {
    ManifestOp::CreateCheckpoint { name: name.into(), branch: MAIN, time_ms: 7 }
}

fn clone_of(name: &str, checkpoint: &str) -> ManifestOp {
    ManifestOp::CreateClone { name: name.into(), checkpoint: checkpoint.into(), time_ms: 8 }
}

fn compact(first: &'static str, end: Option<&'static str>) -> ManifestOp {
    let (first, end) = (Bytes::from_static(first.as_bytes()), end.map(|end| Bytes::from_static(end.as_bytes())));
    ManifestOp::Compact { branch: MAIN, keyspace: KeyspaceId(0), first, end }
}

fn main_version(manifest: &Manifest) -> &Version {
    manifest.version(MAIN, KeyspaceId(0)).expect("the main branch was written")
}

#[test]
fn a_flush_replaces_its_generation_in_every_version_that_names_it() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 10, checkpoint("c"));
    ok(&mut m, 11, clone_of("x", "c"));
    assert_eq!((m.flushed(), m.rotated), (LogIndex(0), LogIndex(10)));
    let t = table(1, 0, "a", "m", 10);
    let effects = ok(&mut m, 12, install(1, vec![t.clone()]));
    assert!(effects.took_effect && m.jobs.is_empty());
    assert_eq!(m.flushed(), LogIndex(10));
    for set in m.version_sets() {
        let version = set.get(&KeyspaceId(0)).expect("each of the three has the keyspace");
        assert!(version.frozen.is_empty());
        assert_eq!(version.l0, vec![Arc::new(vec![t.clone()])]);
    }
    assert!(m.names(&t));
}

#[test]
fn a_younger_generation_waits_for_the_older_one() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 20, rotate(&[(0, 0)]));
    let before = m.clone();
    assert!(!ok(&mut m, 21, install(2, vec![table(2, 0, "a", "b", 1)])).took_effect);
    assert_eq!(m, before);
    ok(&mut m, 22, install(1, vec![table(1, 0, "a", "b", 1)]));
    assert_eq!(m.flushed(), LogIndex(10));
    ok(&mut m, 23, install(2, vec![table(2, 0, "a", "b", 1)]));
    assert_eq!(m.flushed(), LogIndex(20));
    assert_eq!(main_version(&m).l0.iter().map(|run| run[0].id.job.0).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn an_install_of_an_unknown_job_is_without_effect_and_a_second_one_too() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 11, install(1, vec![table(1, 0, "a", "b", 1)]));
    let before = m.clone();
    assert!(!ok(&mut m, 12, install(1, vec![table(1, 0, "a", "b", 1)])).took_effect);
    assert!(!ok(&mut m, 13, install(9, Vec::new())).took_effect);
    assert_eq!(m, before);
}

#[test]
fn what_cannot_be_a_job_output_is_refused_and_changes_nothing() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    let before = m.clone();
    let cases = [
        vec![table(2, 0, "a", "b", 1)],
        vec![table(1, 1, "a", "b", 1)],
        vec![table(1, 0, "a", "m", 1), table(1, 1, "c", "z", 1)],
        vec![in_place(&table(1, 0, "a", "b", 1), MAIN, 5)],
    ];
    for tables in cases {
        assert_eq!(apply(&mut m, 11, install(1, tables)).expect_err("not an output").kind(), ErrorKind::Invalid);
        assert_eq!(m, before);
    }
}

#[test]
fn an_empty_rotation_moves_the_flushed_index() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 5, rotate(&[]));
    assert_eq!((m.flushed(), m.next_generation), (LogIndex(5), Generation(1)));
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 15, rotate(&[]));
    assert_eq!(m.flushed(), LogIndex(5));
    ok(&mut m, 16, install(1, Vec::new()));
    assert_eq!(m.flushed(), LogIndex(15));
}

#[test]
fn names_are_taken_found_and_refused() {
    let mut m = Manifest::new(PICKER);
    assert_eq!(ok(&mut m, 1, ManifestOp::CreateKeyspace { name: "a".into() }).keyspace, Some(KeyspaceId(1)));
    assert_eq!(ok(&mut m, 2, ManifestOp::CreateKeyspace { name: "a".into() }).keyspace, Some(KeyspaceId(1)));
    ok(&mut m, 3, checkpoint("c"));
    ok(&mut m, 4, clone_of("x", "c"));
    let check = |m: &mut Manifest, op: ManifestOp, kind: ErrorKind| {
        let before = m.clone();
        assert_eq!(apply(m, 5, op).expect_err("refused").kind(), kind);
        assert_eq!(*m, before);
    };
    check(&mut m, checkpoint("c"), ErrorKind::Invalid);
    check(&mut m, clone_of("x", "c"), ErrorKind::Invalid);
    check(&mut m, clone_of("main", "c"), ErrorKind::Invalid);
    check(&mut m, clone_of("y", "d"), ErrorKind::NotFound);
    check(&mut m, ManifestOp::DropCheckpoint { name: "d".into() }, ErrorKind::NotFound);
    check(&mut m, ManifestOp::DropClone { name: "y".into() }, ErrorKind::NotFound);
    check(&mut m, ManifestOp::DropClone { name: "main".into() }, ErrorKind::Invalid);
    check(&mut m, ManifestOp::DropKeyspace { name: "default".into() }, ErrorKind::Invalid);
    check(&mut m, ManifestOp::DropKeyspace { name: "z".into() }, ErrorKind::NotFound);
    check(&mut m, ManifestOp::CreateKeyspace { name: String::new() }, ErrorKind::Invalid);
}

/// Replay of entries before a drop still finds what was dropped; once the drop is flushed it is forgotten and its tables
/// are given back.
#[test]
fn what_was_dropped_stays_until_its_drop_is_flushed() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 1, ManifestOp::CreateKeyspace { name: "a".into() });
    ok(&mut m, 10, rotate(&[(0, 1)]));
    let t = in_place(&table(1, 0, "a", "b", 1), MAIN, 1);
    ok(&mut m, 11, install(1, vec![t.clone()]));
    ok(&mut m, 20, ManifestOp::DropKeyspace { name: "a".into() });
    assert!(m.has_keyspace_before(KeyspaceId(1), LogIndex(20)));
    assert!(!m.has_keyspace_before(KeyspaceId(1), LogIndex(21)));
    assert!(m.names(&t));
    let effects = ok(&mut m, 20, rotate(&[]));
    assert_eq!(effects.removed, vec![t.clone()]);
    assert!(!m.names(&t) && !m.keyspaces.contains_key(&KeyspaceId(1)));
    // Numbers are not used again.
    assert_eq!(ok(&mut m, 21, ManifestOp::CreateKeyspace { name: "a".into() }).keyspace, Some(KeyspaceId(2)));
}

#[test]
fn a_checkpoint_keeps_what_the_branch_drops() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 1, ManifestOp::CreateKeyspace { name: "a".into() });
    ok(&mut m, 10, rotate(&[(0, 1)]));
    ok(&mut m, 10, checkpoint("c"));
    ok(&mut m, 11, ManifestOp::DropKeyspace { name: "a".into() });
    let t = in_place(&table(1, 0, "a", "b", 1), MAIN, 1);
    ok(&mut m, 12, install(1, vec![t.clone()]));
    ok(&mut m, 13, rotate(&[]));
    assert!(m.names(&t) && !m.keyspaces.contains_key(&KeyspaceId(1)));
    // A clone of it has no part in a keyspace that is gone.
    ok(&mut m, 14, clone_of("x", "c"));
    let effects = ok(&mut m, 15, ManifestOp::DropCheckpoint { name: "c".into() });
    assert_eq!(effects.removed, vec![t.clone()]);
    assert!(!m.names(&t));
}

#[test]
fn a_clone_and_its_origin_change_apart() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 11, install(1, vec![table(1, 0, "a", "b", 1)]));
    ok(&mut m, 12, checkpoint("c"));
    ok(&mut m, 13, clone_of("x", "c"));
    let x = BranchId(13);
    ok(&mut m, 20, rotate(&[(0, 0), (13, 0)]));
    let of_x = in_place(&table(2, 1, "c", "d", 1), x, 0);
    ok(&mut m, 21, install(2, vec![table(2, 0, "a", "b", 1), of_x.clone()]));
    let l0 = |branch| -> Vec<TableId> {
        let version = m.version(branch, KeyspaceId(0)).expect("it was written");
        version.l0.iter().flat_map(|run| run.iter().map(|t| t.id)).collect()
    };
    let id = |job, ordinal| TableId { job: JobId(job), ordinal };
    assert_eq!(l0(MAIN), [id(2, 0), id(1, 0)]);
    assert_eq!(l0(x), [id(2, 1), id(1, 0)]);
    assert_eq!(m.checkpoints["c"].versions[&KeyspaceId(0)].l0.len(), 1);
}

fn version(l0: &[&[(&str, &str)]], levels: &[(u8, &[(&str, &str, u64)])]) -> Version {
    let mut v = Version::default();
    for (job, run) in (101..).zip(l0) {
        v.l0.push(Arc::new(run.iter().enumerate().map(|(o, (a, b))| table(job, o as u32, a, b, 100)).collect()));
    }
    for &(level, tables) in levels {
        let tables = tables.iter().enumerate().map(|(o, &(a, b, n))| table(level.into(), o as u32, a, b, n));
        v.set_level(level, tables.collect());
    }
    v
}

fn picked(v: &Version, busy: &[(u64, u32)]) -> Option<Pick> {
    picked_at(v, busy, 0)
}

fn picked_at(v: &Version, busy: &[(u64, u32)], time_ms: u64) -> Option<Pick> {
    let busy = busy.iter().map(|&(job, ordinal)| TableId { job: JobId(job), ordinal }).collect();
    pick(&Rules { time_ms, ..LEVELED }, MAIN, KeyspaceId(0), v, &busy, 0)
}

const LEVELED: Rules<'static> = Rules { settings: &PICKER, style: CompactionStyle::Leveled, time_ms: 0 };

/// `from>to upper+lower` with `!` where tombstones end, or `move`, or `drop`, or `-`.
fn told(pick: Option<Pick>) -> String {
    let names = |tables: &[TableRef]| tables.iter().map(|t| t.id.to_string()).collect::<Vec<_>>().join(",");
    match pick {
        None => "-".into(),
        Some(Pick::Move { from, to, tables }) => format!("move {from}>{to} {}", names(&tables)),
        Some(Pick::Drop { tables }) => format!("drop {}", names(&tables)),
        Some(Pick::Start(c)) => {
            let end = if c.drop_tombstones { "!" } else { "" };
            format!("{}>{} {}+{}{end}", c.from, c.to, names(&c.upper), names(&c.lower))
        }
    }
}

#[test]
fn the_picker_follows_its_table_of_cases() {
    let am: &[(&str, &str)] = &[("a", "m")];
    let cases: &[(&str, Version, &[(u64, u32)], &str)] = &[
        ("nothing", version(&[], &[]), &[], "-"),
        ("too few runs", version(&[am; 3], &[]), &[], "-"),
        ("all runs to the last level", version(&[am; 4], &[]), &[], "0>6 101-0,102-0,103-0,104-0+!"),
        (
            "disjoint runs move",
            version(&[&[("g", "h")], &[("e", "f")], &[("c", "d")], &[("a", "b")]], &[(6, &[("i", "k", 10)])]),
            &[],
            "move 0>6 104-0,103-0,102-0,101-0",
        ),
        (
            "what overlaps below joins",
            version(&[am; 4], &[(6, &[("a", "c", 10), ("l", "o", 10), ("p", "q", 10)])]),
            &[],
            "0>6 101-0,102-0,103-0,104-0+6-0,6-1!",
        ),
        ("one from L0 at a time", version(&[am; 5], &[]), &[(103, 0)], "-"),
        ("a busy table below", version(&[am; 4], &[(6, &[("a", "c", 10)])]), &[(6, 0)], "-"),
        (
            "above a large last level the base rises",
            version(&[am; 4], &[(6, &[("a", "c", 5_000)])]),
            &[],
            "0>5 101-0,102-0,103-0,104-0+",
        ),
        (
            "least overlap goes first",
            version(
                &[],
                &[
                    (5, &[("a", "c", 1000), ("d", "f", 1000), ("g", "i", 1000)]),
                    (6, &[("a", "b", 900), ("d", "e", 100), ("g", "h", 800)]),
                ],
            ),
            &[],
            "5>6 5-1+6-1!",
        ),
        (
            "no overlap moves",
            version(&[], &[(5, &[("a", "c", 1000), ("d", "f", 1000)]), (6, &[("a", "b", 900)])]),
            &[],
            "move 5>6 5-1",
        ),
        (
            "busy tables do not count",
            version(&[], &[(5, &[("a", "c", 600), ("d", "f", 600)]), (6, &[("a", "z", 900)])]),
            &[(5, 0), (6, 0)],
            "-",
        ),
        (
            "tombstones stay above data",
            version(&[], &[(4, &[("a", "c", 3000)]), (5, &[("a", "b", 900)]), (6, &[("b", "d", 900)])]),
            &[],
            "4>5 4-0+5-0",
        ),
    ];
    for (name, v, busy, expect) in cases {
        assert!(v.is_sound(), "{name}");
        assert_eq!(told(picked(v, busy)), *expect, "{name}");
    }
}

/// Each table has 100 entries; behind its level and number stands how many are tombstones.
#[test]
fn tombstones_go_down_where_they_are_many() {
    let am: &[(&str, &str)] = &[("a", "m")];
    let levels: &[(u8, &[(&str, &str, u64)])] = &[
        (4, &[("a", "c", 100), ("k", "m", 100)]),
        (5, &[("b", "d", 100), ("k", "l", 100), ("l0", "m", 100)]),
        (6, &[("a", "f", 100)]),
    ];
    let bottom: &[(u8, &[(&str, &str, u64)])] = &[(6, &[("a", "c", 100), ("d", "f", 100)])];
    let cases: &[(&str, Version, &[(u64, u32, u64)], &[(u64, u32)], &str)] = &[
        ("none", version(&[am], levels), &[], &[], "-"),
        ("too few for what is below", version(&[], levels), &[(4, 0, 49), (4, 1, 74)], &[], "-"),
        ("a quarter of the inputs", version(&[], levels), &[(4, 0, 50)], &[], "4>5 4-0+5-0"),
        ("and where nothing is below they end", version(&[], levels), &[(4, 1, 75)], &[], "4>5 4-1+5-1,5-2!"),
        ("what is busy below waits", version(&[], levels), &[(4, 0, 100)], &[(5, 0)], "-"),
        (
            "what overlaps nothing and cannot end yet moves",
            version(&[], &[levels[0], levels[2]]),
            &[(4, 0, 100)],
            &[],
            "move 4>5 4-0",
        ),
        ("the last level is written again", version(&[], bottom), &[(6, 1, 25)], &[], "6>6 6-1+!"),
        ("but not for a few", version(&[], bottom), &[(6, 0, 24), (6, 1, 24)], &[], "-"),
        ("nor twice at once", version(&[], bottom), &[(6, 1, 25)], &[(6, 1)], "-"),
        ("one run of L0", version(&[am], bottom), &[(101, 0, 75)], &[], "0>6 101-0+6-0,6-1!"),
        ("not for a few", version(&[am], bottom), &[(101, 0, 74)], &[], "-"),
        ("where nothing is below they do not move", version(&[am], &[]), &[(101, 0, 25)], &[], "0>6 101-0+!"),
        (
            "a job may write one table for what stands apart, so it takes what stands between",
            version(&[&[("k", "m")], &[("a", "c")]], &[(6, &[("e", "f", 100), ("x", "y", 100)])]),
            &[(102, 0, 75)],
            &[],
            "0>6 102-0,101-0+6-0!",
        ),
        (
            "or waits for it",
            version(&[&[("k", "m")], &[("a", "c")]], &[(6, &[("e", "f", 100)])]),
            &[(102, 0, 75)],
            &[(6, 0)],
            "-",
        ),
    ];
    for (name, v, tombstones, busy, expect) in cases {
        let filled = |t: &TableRef| {
            let found = tombstones.iter().find(|(job, ordinal, _)| (t.id.job.0, t.id.ordinal) == (*job, *ordinal));
            Arc::new(InstallTable { entries: 100, tombstones: found.map_or(0, |found| found.2), ..(**t).clone() })
        };
        let list = |tables: &Arc<Vec<TableRef>>| Arc::new(tables.iter().map(filled).collect());
        let l0 = v.l0.iter().map(list).collect();
        let v = Version { frozen: Vec::new(), l0, levels: v.levels.each_ref().map(list) };
        assert_eq!(told(picked(&v, busy)), *expect, "{name}");
    }
}

/// Each table has 100 entries; behind its level and number stands when half of them have ended, and all. It is 50.
#[test]
fn pairs_that_ended_go_as_tombstones_do() {
    let am: &[(&str, &str)] = &[("a", "m")];
    let bottom: &[(u8, &[(&str, &str, u64)])] = &[(6, &[("a", "c", 100), ("d", "f", 100)])];
    let levels: &[(u8, &[(&str, &str, u64)])] = &[(5, &[("a", "c", 100), ("x", "z", 100)]), (6, &[("a", "f", 100)])];
    let cases: &[(&str, Version, &[(u64, u32, u64, u64)], &[(u64, u32)], &str)] = &[
        ("none yet", version(&[am], bottom), &[(6, 0, 51, 60), (6, 1, 51, 0)], &[], "-"),
        ("half of the last level: it is written again", version(&[], bottom), &[(6, 1, 50, 0)], &[], "6>6 6-1+!"),
        ("all of it: unread", version(&[], bottom), &[(6, 1, 10, 50)], &[], "drop 6-1"),
        ("but not what a job reads", version(&[], bottom), &[(6, 1, 10, 50)], &[(6, 1)], "-"),
        ("half of what lies above goes down", version(&[], levels), &[(5, 0, 50, 0)], &[], "5>6 5-0+6-0!"),
        (
            "all of it hides what is older, as a tombstone does",
            version(&[], levels),
            &[(5, 0, 9, 9)],
            &[],
            "5>6 5-0+6-0!",
        ),
        ("unless that has ended as well", version(&[], levels), &[(5, 0, 9, 9), (6, 0, 7, 7)], &[], "drop 6-0"),
        ("or nothing is below", version(&[], levels), &[(5, 1, 9, 9)], &[], "drop 5-1"),
        ("L0 too", version(&[am], &[]), &[(101, 0, 9, 9)], &[], "drop 101-0"),
        ("half of L0", version(&[am], bottom), &[(101, 0, 9, 51)], &[], "-"),
        ("half of L0, and little below", version(&[am], &[]), &[(101, 0, 9, 51)], &[], "0>6 101-0+!"),
    ];
    for (name, v, ends, busy, expect) in cases {
        let filled = |t: &TableRef| {
            let found = ends.iter().find(|(job, ordinal, _, _)| (t.id.job.0, t.id.ordinal) == (*job, *ordinal));
            let ends = found.map(|&(_, _, half_ms, last_ms)| TableEnds { half_ms, last_ms }).unwrap_or_default();
            Arc::new(InstallTable { entries: 100, ends, ..(**t).clone() })
        };
        let list = |tables: &Arc<Vec<TableRef>>| Arc::new(tables.iter().map(filled).collect());
        let l0 = v.l0.iter().map(list).collect();
        let v = Version { frozen: Vec::new(), l0, levels: v.levels.each_ref().map(list) };
        assert_eq!(told(picked_at(&v, busy, 50)), *expect, "{name}");
        assert_eq!(told(picked_at(&v, busy, 0)), "-", "{name}: of what does not expire nothing has ended");
    }
}

/// A rotation looks for what has ended since the last one, in the versions of expiring keyspaces alone, and once.
#[test]
fn a_rotation_lets_tables_go_that_have_ended() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 1, ManifestOp::CreateExpiring { name: "sessions".into() });
    let sessions = 1;
    let at = |touched: &[(u64, u32)], time_ms| match rotate(touched) {
        ManifestOp::Rotate { touched, .. } => {
            ManifestOp::Rotate { touched, clock: Some(LogClock { time_ms, latest_end_ms: 100 }) }
        }
        _ => unreachable!("it is a rotation"),
    };
    ok(&mut m, 10, at(&[(0, 0), (0, sessions)], 5));
    let ends = TableEnds { half_ms: 30, last_ms: 60 };
    let mine = InstallTable { entries: 10, ends, ..(*in_place(&table(1, 1, "a", "m", 10), MAIN, sessions)).clone() };
    ok(&mut m, 11, install(1, vec![table(1, 0, "a", "m", 10), Arc::new(mine)]));
    assert_eq!((m.tables().len(), m.jobs.len()), (2, 0));
    assert!(!m.has_ended_between(5, 29) && m.has_ended_between(29, 30) && m.has_ended_between(5, 99));
    assert!(!m.has_ended_between(30, 59) && m.has_ended_between(59, 60) && !m.has_ended_between(60, 1000));
    ok(&mut m, 12, checkpoint("c"));
    ok(&mut m, 20, at(&[], 29));
    assert_eq!((m.tables().len(), m.jobs.len()), (2, 0));
    // Half: it is written again, without what has ended by then.
    ok(&mut m, 21, at(&[], 35));
    assert!(matches!(&*m.jobs[&JobId(2)], Job::Compact(c) if c.expired_by_ms == 35 && c.drop_tombstones));
    let left = InstallTable {
        entries: 5,
        ends: TableEnds { half_ms: 50, last_ms: 60 },
        ..(*in_place(&table(2, 0, "a", "k", 10), MAIN, sessions)).clone()
    };
    ok(&mut m, 22, install(2, vec![Arc::new(left)]));
    assert_eq!(m.jobs.len(), 0);
    // All: unread, but for who has a checkpoint of it.
    let effects = ok(&mut m, 23, at(&[], 60));
    assert_eq!(effects.removed.iter().map(|t| t.id.job.0).collect::<Vec<_>>(), [2]);
    assert_eq!(m.tables().keys().map(|id| (id.job.0, id.ordinal)).collect::<Vec<_>>(), [(1, 0), (1, 1)]);
    assert_eq!(m.jobs.len(), 0);
    let (decoded, _) = Manifest::decode(m.encode(None)).expect("encoded here");
    assert_eq!(decoded, m);
}

/// A version with range tombstones in the tables that these ids name.
fn with_ranges(mut v: Version, ranges: &[((u64, u32), &[(&str, &str)], bool)]) -> Version {
    let with = |list: &Tables| {
        let of = |t: &TableRef| match ranges.iter().find(|(id, _, _)| *id == (t.id.job.0, t.id.ordinal)) {
            Some((_, spans, bare)) => ranged(t, spans, *bare),
            None => t.clone(),
        };
        Arc::new(list.iter().map(of).collect())
    };
    v.l0 = v.l0.iter().map(with).collect();
    v.levels = v.levels.each_ref().map(with);
    v
}

#[test]
fn what_ranges_hide_is_dropped_by_its_table_of_cases() {
    let [a, bc] = [[("a", "a")], [("b", "c")]];
    let (a, bc): (&[(&str, &str)], &[(&str, &str)]) = (&a, &bc);
    let six: (u8, &[(&str, &str, u64)]) = (6, &[("a", "c", 10), ("d", "f", 10), ("g", "i", 10)]);
    let cases: &[(&str, Version, &[(u64, u32)], &str)] = &[
        ("no range, nothing to drop", version(&[a], &[six]), &[], "-"),
        (
            "what lies within, and not what reaches out",
            with_ranges(version(&[a], &[six]), &[((101, 0), &[("a", "h")], false)]),
            &[],
            "drop 6-0,6-1",
        ),
        (
            "an end is not hidden itself",
            with_ranges(version(&[a], &[six]), &[((101, 0), &[("a", "f")], false)]),
            &[],
            "drop 6-0",
        ),
        (
            "nor is what lies above or beside",
            with_ranges(version(&[bc, a], &[six]), &[((102, 0), &[("a", "d")], false), ((6, 2), &[("a", "z")], false)]),
            &[],
            "drop 6-0",
        ),
        (
            "an older run, and levels between",
            with_ranges(version(&[a, bc], &[(5, &[("a", "b", 10)]), six]), &[((101, 0), &[("a", "")], false)]),
            &[],
            "drop 5-0,6-0,6-1,6-2,102-0",
        ),
        (
            "two that touch hide together",
            with_ranges(
                version(&[bc, a], &[six]),
                &[((101, 0), &[("b", "d")], false), ((102, 0), &[("a", "b")], false)],
            ),
            &[],
            "drop 6-0",
        ),
        (
            "two with a gap do not",
            with_ranges(
                version(&[bc, a], &[six]),
                &[((101, 0), &[("bb", "d")], false), ((102, 0), &[("a", "b")], false)],
            ),
            &[],
            "-",
        ),
        (
            "not what a job reads",
            with_ranges(version(&[a], &[six]), &[((101, 0), &[("a", "h")], false)]),
            &[(6, 1)],
            "drop 6-0",
        ),
        (
            "tombstones over nothing",
            with_ranges(version(&[a], &[(6, &[("d", "f", 10)])]), &[((101, 0), &[("a", "c")], true)]),
            &[],
            "drop 101-0",
        ),
        (
            "not while something older is there: they go down to it",
            with_ranges(version(&[a], &[(6, &[("c", "f", 10)])]), &[((101, 0), &[("a", "d")], true)]),
            &[],
            "0>6 101-0+6-0!",
        ),
        (
            "nor with a value beside them",
            with_ranges(version(&[a], &[(6, &[("d", "f", 10)])]), &[((101, 0), &[("a", "c")], false)]),
            &[],
            "-",
        ),
        (
            "where nothing is below they do not move",
            with_ranges(
                version(&[&[("g", "h")], &[("e", "f")], &[("c", "d")], a], &[]),
                &[((104, 0), &[("a", "b")], false)],
            ),
            &[],
            "0>6 104-0,103-0,102-0,101-0+!",
        ),
    ];
    for (name, v, busy, expect) in cases {
        assert!(v.is_sound(), "{name}");
        assert_eq!(told(picked(v, busy)), *expect, "{name}");
    }
}

/// All keys are removed: every table below goes unread, and then the one that said so. A checkpoint keeps them all.
#[test]
fn a_cleared_keyspace_holds_nothing() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 11, install(1, vec![table(1, 0, "a", "c", 10), table(1, 1, "d", "f", 10)]));
    ok(&mut m, 12, checkpoint("c"));
    ok(&mut m, 20, rotate(&[(0, 0)]));
    let cleared = ranged(&table(2, 0, "a", "a", 10), &[("a", "")], true);
    let effects = ok(&mut m, 21, install(2, vec![cleared.clone()]));
    assert!(main_version(&m).tables().next().is_none());
    let mut removed: Vec<_> = effects.removed.iter().map(|t| (t.id.job.0, t.id.ordinal, m.names(t))).collect();
    removed.sort_unstable();
    removed.dedup();
    assert_eq!(removed, [(1, 0, true), (1, 1, true), (2, 0, false)], "the checkpoint names two of them");
}

#[test]
fn no_more_jobs_than_the_bound_but_moves_go_on() {
    let am: &[(&str, &str)] = &[("a", "m")];
    let v = version(&[am; 4], &[]);
    assert_eq!(pick(&LEVELED, MAIN, KeyspaceId(0), &v, &Default::default(), 2), None);
    let v = version(&[&[("g", "h")], &[("e", "f")], &[("c", "d")], &[("a", "b")]], &[]);
    let pick = pick(&LEVELED, MAIN, KeyspaceId(0), &v, &Default::default(), 2);
    assert!(matches!(pick, Some(Pick::Move { .. })));
}

fn tiered(runs: u8) -> KeyspaceOptions {
    KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs })
}

/// A manifest whose one version is this.
fn manifest_of(v: Version) -> Manifest {
    let mut m = Manifest::new(PICKER);
    // Above the jobs of its tables.
    m.next_job = JobId(200);
    m.branches.get_mut(&MAIN).expect("main").versions.insert(KeyspaceId(0), Arc::new(v));
    m
}

/// The job that is outstanding, with what it is for, and its install: the inputs as one table, without tombstones where those are dropped.
fn only_job(m: &Manifest) -> (String, ManifestOp) {
    let (id, job) = m.jobs.first_key_value().expect("a job is outstanding");
    assert_eq!(m.jobs.len(), 1);
    let Job::Compact(c) = &**job else { panic!("a flush") };
    let first = c.inputs().map(|t| &t.first).min().expect("inputs");
    let last = c.inputs().map(|t| &t.last).max().expect("inputs");
    let mut t = (*table(id.0, 0, "a", "b", c.inputs().map(|t| t.bytes).sum())).clone();
    (t.first, t.last) = (first.clone(), last.clone());
    t.tombstones = if c.drop_tombstones { 0 } else { c.inputs().map(|t| t.tombstones).sum() };
    (told(Some(Pick::Start(c.clone()))), install(id.0, vec![Arc::new(t)]))
}

/// Level by level, in the order of keys, and only what has keys of the range; the last level where it holds tombstones.
#[test]
fn what_was_asked_for_goes_down_to_the_last_level() {
    let dirty = |t: &TableRef| Arc::new(InstallTable { entries: 100, tombstones: 1, ..(**t).clone() });
    let mut v = version(
        &[&[("a", "m")]],
        &[
            (4, &[("b", "c", 100), ("x", "y", 100)]),
            (5, &[("d", "e", 100), ("f", "g", 100)]),
            (6, &[("a", "h", 100), ("i", "k", 100), ("l", "n", 100), ("o", "q", 100)]),
        ],
    );
    let last = v.level(6).iter().enumerate().map(|(at, t)| if at % 2 == 1 { dirty(t) } else { t.clone() }).collect();
    v.set_level(6, last);
    let steps = |first, end| {
        let mut m = manifest_of(v.clone());
        ok(&mut m, 10, compact(first, end));
        let mut steps = Vec::new();
        while !m.manuals.is_empty() {
            let (told, install) = only_job(&m);
            steps.push(told);
            let next = 11 + steps.len() as u64;
            ok(&mut m, next, install);
        }
        assert!(m.jobs.is_empty());
        steps
    };
    // The tables "d" to "g" are met again as part of what came down before them.
    let all = ["0>4 101-0+4-0", "4>5 200-0+5-0,5-1", "5>6 201-0+6-0,6-1,6-2!", "6>6 6-3+!"];
    assert_eq!(steps("", None), all);
    assert_eq!(steps("", Some("o")), &all[..3]);
    assert_eq!(steps("d", Some("n")), &all[..3]);
    assert_eq!(steps("o", Some("p")), &all[3..]);
    assert_eq!(steps("r", None), Vec::<String>::new());
    assert_eq!(steps("z", Some("a")), Vec::<String>::new());
}

/// What is only in memory when it is asked for is waited for; what is written behind it is not.
#[test]
fn it_begins_with_what_the_entry_found_and_ends_with_that() {
    let mut m = Manifest::new(PICKER);
    assert!(!ok(&mut m, 9, compact("", None)).took_effect, "there is nothing");
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 10, compact("", None));
    ok(&mut m, 20, rotate(&[(0, 0)]));
    assert_eq!((m.manuals.len(), m.jobs.len()), (1, 2));
    // Without tombstones, it moves to the last level.
    ok(&mut m, 21, install(1, vec![table(1, 0, "a", "m", 10)]));
    assert!(m.manuals.is_empty());
    assert_eq!(main_version(&m).level(6).len(), 1);
    ok(&mut m, 22, install(2, vec![table(2, 0, "a", "m", 10)]));
    assert_eq!((main_version(&m).l0.len(), m.jobs.len()), (1, 0));
}

#[test]
fn tombstones_do_not_move_where_they_can_go() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    ok(&mut m, 10, compact("", None));
    let t = InstallTable { tombstones: 1, ..(*table(1, 0, "a", "m", 10)).clone() };
    ok(&mut m, 11, install(1, vec![Arc::new(t)]));
    assert_eq!(only_job(&m).0, "0>6 1-0+!");
    // Nothing is left.
    ok(&mut m, 12, install(2, Vec::new()));
    assert!(m.manuals.is_empty() && m.jobs.is_empty());
}

/// A level is full of what came down behind the entry: it does not begin anew.
#[test]
fn what_is_newer_is_passed_over() {
    let mut m = manifest_of(version(&[], &[(5, &[("a", "b", 100), ("m", "n", 100)]), (6, &[("a", "z", 100)])]));
    ok(&mut m, 10, compact("", None));
    let (told, first) = only_job(&m);
    assert_eq!(told, "5>6 5-0+6-0!");
    // Meanwhile the same keys are written and reach level 5.
    let v = Arc::make_mut(m.branches.get_mut(&MAIN).expect("main").versions.get_mut(&KeyspaceId(0)).expect("it"));
    v.add(5, &[table(150, 0, "c", "d", 100)]);
    v.remove(5, &|id| id == TableId { job: JobId(5), ordinal: 0 });
    v.add(5, &[table(151, 0, "a", "b", 100), table(5, 0, "b0", "b1", 100)]);
    ok(&mut m, 11, first);
    // Behind the cursor: nothing says that it is newer.
    assert_eq!(only_job(&m).0, "5>6 150-0+200-0!");
    assert!(main_version(&m).level(5).iter().any(|t| t.id.job == JobId(151)));
}

/// Writers wait for L0, so it goes first; and it is not held up by step after step.
#[test]
fn l0_goes_first_where_it_is_due() {
    let am: &[(&str, &str)] = &[("a", "m")];
    let mut m = manifest_of(version(&[am; 4], &[(5, &[("a", "b", 100)]), (6, &[("a", "z", 100)])]));
    ok(&mut m, 10, compact("n", None));
    assert_eq!(only_job(&m).0, "0>5 101-0,102-0,103-0,104-0+5-0");
}

#[test]
fn no_more_are_asked_for_than_the_bound_and_a_drop_ends_them() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 1, ManifestOp::CreateKeyspace { name: "a".into() });
    ok(&mut m, 10, rotate(&[(0, 1)]));
    let asked = |keyspace| ManifestOp::Compact { branch: MAIN, keyspace, first: Bytes::new(), end: None };
    let max = super::manual::MANUALS_MAX as u64;
    for n in 0..max {
        ok(&mut m, 11 + n, asked(KeyspaceId(1)));
    }
    let before = m.clone();
    assert_eq!(apply(&mut m, 100, asked(KeyspaceId(1))).expect_err("one too many").kind(), ErrorKind::Invalid);
    assert_eq!(m, before);
    ok(&mut m, 101, ManifestOp::DropKeyspace { name: "a".into() });
    assert!(m.manuals.is_empty());
}

#[test]
fn what_was_asked_for_is_encoded_and_without_it_nothing_is_new() {
    let mut m = manifest_of(version(&[], &[(5, &[("a", "b", 100)]), (6, &[("a", "z", 100)])]));
    assert_eq!(m.encode(None)[0], MANIFEST_VERSION);
    ok(&mut m, 10, compact("a", Some("x")));
    let bytes = m.encode(None);
    assert_eq!(bytes[0], MANIFEST_VERSION_MANUAL);
    assert_eq!(Manifest::decode(bytes).expect("encoded here").0, m);
    let mut lost = m.clone();
    lost.jobs.clear();
    assert_eq!(Manifest::decode(lost.encode(None)).expect_err("its job is gone").kind(), ErrorKind::Corrupt);
}

#[test]
fn the_base_level_follows_the_size() {
    let check = |last: u64, base: u8| {
        let v = version(&[], &[(6, &[("a", "b", last)])]);
        let targets = targets(&v, PICKER.base_level_bytes);
        assert_eq!(targets.base, base, "last={last}");
        assert!(targets.bytes[usize::from(base) - 1] >= PICKER.base_level_bytes);
    };
    check(0, 6);
    check(1000, 6);
    check(1001, 5);
    check(1000 * LEVEL_RATIO, 5);
    check(1000 * LEVEL_RATIO + 10, 4);
    check(u64::MAX, 1);
}

#[test]
fn overlap_is_of_closed_ranges() {
    let list = [table(1, 0, "b", "d", 1), table(1, 1, "f", "h", 1), table(1, 2, "k", "m", 1)];
    let check = |first: &str, last: &str, expect: &[u32]| {
        let found: Vec<u32> = overlap(&list, first.as_bytes(), last.as_bytes()).iter().map(|t| t.id.ordinal).collect();
        assert_eq!(found, expect, "{first}..={last}");
    };
    check("a", "a", &[]);
    check("a", "b", &[0]);
    check("d", "f", &[0, 1]);
    check("e", "e", &[]);
    check("g", "z", &[1, 2]);
    check("n", "z", &[]);
    check("a", "z", &[0, 1, 2]);
}

/// An operation as numbers, so that it can be made valid for the manifest that it meets.
#[derive(Clone, Debug)]
enum Step {
    Rotate(Vec<u8>),
    Install(u8, Vec<(u8, u16)>),
    Keyspace(u8, bool),
    Checkpoint(u8, bool),
    Branch(u8, u8, bool),
    Compact(u8, u8, u8),
    Options(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..4).prop_map(Step::Rotate),
        8 => (any::<u8>(), prop::collection::vec((any::<u8>(), 1..2000_u16), 0..6)).prop_map(|(a, b)| Step::Install(a, b)),
        1 => (0..3_u8, any::<bool>()).prop_map(|(a, b)| Step::Keyspace(a, b)),
        1 => (0..3_u8, any::<bool>()).prop_map(|(a, b)| Step::Checkpoint(a, b)),
        1 => (0..3_u8, 0..3_u8, any::<bool>()).prop_map(|(a, b, c)| Step::Branch(a, b, c)),
        1 => (any::<u8>(), 0..20_u8, 0..22_u8).prop_map(|(a, b, c)| Step::Compact(a, b, c)),
        1 => (0..4_u8, 0..4_u8).prop_map(|(a, b)| Step::Options(a, b)),
    ]
}

/// The operations that a step means here.
fn operations(m: &Manifest, index: LogIndex, step: &Step) -> Vec<ManifestOp> {
    let all = || -> Vec<_> {
        let branches = m.branches.keys().filter(|&&b| m.has_branch_before(b, index));
        branches
            .flat_map(|&b| m.keyspaces.keys().filter(|&&k| m.has_keyspace_before(k, index)).map(move |&k| (b, k)))
            .collect()
    };
    match step {
        Step::Rotate(picks) => {
            let all = all();
            let mut touched: Vec<_> = picks.iter().map(|&p| all[usize::from(p) % all.len()]).collect();
            touched.sort_unstable();
            touched.dedup();
            let clock = LogClock { time_ms: index.0 * 10, latest_end_ms: 0 };
            vec![ManifestOp::Rotate { touched, clock: (!m.expiring.is_empty()).then_some(clock) }]
        }
        Step::Install(pick, sizes) => {
            let Some((&job, outstanding)) = m.jobs.iter().nth(usize::from(*pick) % m.jobs.len().max(1)) else {
                return Vec::new();
            };
            let places: Vec<(BranchId, KeyspaceId, String, u64)> = match &**outstanding {
                Job::Flush { generation } => {
                    let touched = &m.generations[generation].touched;
                    let cut = |k: u8| char::from(b'a' + k % 20).to_string();
                    touched.iter().zip(sizes).map(|(&(b, k), &(s, n))| (b, k, cut(s), n.into())).collect()
                }
                Job::Compact(c) => {
                    // The inputs again, under the keys they had.
                    let mut inputs: Vec<_> = c.inputs().collect();
                    inputs.sort_by(|a, b| a.first.cmp(&b.first));
                    inputs.dedup_by(|b, a| b.first <= a.last);
                    let name = |t: &TableRef| String::from_utf8_lossy(&t.first).into_owned();
                    inputs.into_iter().map(|t| (c.branch, c.keyspace, name(t), t.bytes)).collect()
                }
            };
            let last = places.last().map(|(_, _, key, _)| key.clone());
            let together = matches!(**outstanding, Job::Compact(_)) && pick % 2 == 0;
            let places = places.into_iter().take(if together { 1 } else { usize::MAX });
            let tables = places.enumerate().map(|(at, (branch, keyspace, key, bytes))| {
                // One table may hold what all inputs did.
                let last = last.as_ref().filter(|_| together).unwrap_or(&key);
                let t = table(job.0, at as u32, &key, last, bytes);
                let dropped = matches!(&**outstanding, Job::Compact(c) if c.drop_tombstones);
                let ends = match m.expiring.contains_key(&keyspace) {
                    true => TableEnds { half_ms: bytes, last_ms: if bytes % 7 == 0 { 0 } else { bytes * 2 } },
                    false => TableEnds::default(),
                };
                let t = InstallTable { tombstones: u64::from(bytes % 3 == 0 && !dropped), ends, ..(*t).clone() };
                let flush = matches!(**outstanding, Job::Flush { .. });
                let end =
                    ["", "f", "m", "r"].into_iter().find(|end| end.is_empty() && bytes % 5 == 0 || **end > key[..]);
                let t = match end.filter(|_| flush && bytes % 4 == 0) {
                    Some(end) => ranged(&Arc::new(t), &[(&key, end)], bytes % 8 == 0),
                    None => Arc::new(t),
                };
                in_place(&t, branch, keyspace.0)
            });
            vec![ManifestOp::Install { job, tables: tables.collect() }]
        }
        Step::Keyspace(n, true) if n % 2 == 1 => {
            let operator = OperatorId::new("sum", u32::from(*n));
            vec![ManifestOp::SetOperator { name: format!("k{n}"), operator }]
        }
        Step::Keyspace(2, true) => vec![ManifestOp::CreateExpiring { name: "k2".into() }],
        Step::Keyspace(n, true) => vec![ManifestOp::CreateKeyspace { name: format!("k{n}") }],
        Step::Keyspace(n, false) => vec![ManifestOp::DropKeyspace { name: format!("k{n}") }],
        Step::Checkpoint(n, true) => vec![checkpoint(&format!("c{n}"))],
        Step::Checkpoint(n, false) => vec![ManifestOp::DropCheckpoint { name: format!("c{n}") }],
        Step::Branch(n, c, true) => vec![clone_of(&format!("b{n}"), &format!("c{c}"))],
        Step::Branch(n, _, false) => vec![ManifestOp::DropClone { name: format!("b{n}") }],
        Step::Compact(pick, first, end) => {
            let all = all();
            let (branch, keyspace) = all[usize::from(*pick) % all.len()];
            let key = |n: u8| Bytes::from(vec![b'a' + n]);
            let (first, end) = (key(*first), (*end < 20).then(|| key(*end)));
            vec![ManifestOp::Compact { branch, keyspace, first, end }]
        }
        Step::Options(n, choice) => {
            let name = if *n == 3 { DEFAULT_KEYSPACE.to_owned() } else { format!("k{n}") };
            let options = match choice {
                0 => KeyspaceOptions::new(),
                1 => KeyspaceOptions::new().block_bytes(4096),
                runs => KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs: *runs }),
            };
            vec![ManifestOp::SetOptions { name, options }]
        }
    }
}

fn check_sound(m: &Manifest) {
    for version in m.version_sets().flat_map(|set| set.values()) {
        assert!(version.is_sound());
        // Invariant 1 of the picker.
        if let Some(first) = version.levels.iter().position(|l| !l.is_empty()) {
            assert!(usize::from(targets(version, PICKER.base_level_bytes).base) <= first + 1 && first < LEVELS);
        }
    }
    for manual in m.manuals.values() {
        let job = manual.job.map(|job| m.jobs.get(&job).map(|job| &**job));
        assert!(job.is_none_or(|job| matches!(job, Some(Job::Compact(c)) if c.branch == manual.branch)));
    }
    for job in m.jobs.values() {
        if let Job::Compact(c) = &**job {
            let version = m.version(c.branch, c.keyspace).expect("a compaction has its version");
            assert!(c.inputs().all(|t| version.names(t)));
        }
    }
}

proptest! {
    /// Any operations in any order: the manifest stays sound, the same operations give the same bytes, and what is decoded
    /// goes on as what was encoded.
    #[test]
    fn equal_operations_give_equal_manifests(steps in prop::collection::vec(step(), 1..120), again in any::<prop::sample::Index>()) {
        let mut a = Manifest::new(PICKER);
        let mut b = Manifest::new(PICKER);
        let again = again.index(steps.len());
        for (at, step) in steps.iter().enumerate() {
            let index = LogIndex(at as u64 + 1);
            for op in operations(&a, index, step) {
                let named = a.tables();
                let effects = a.apply(index, &op, true);
                prop_assert_eq!(effects.is_err(), b.apply(index, &op, true).is_err());
                if matches!(op, ManifestOp::Install { .. }) {
                    prop_assert!(effects.is_ok(), "{:?}", effects);
                }
                // Whatever is no longer named was told.
                let now = a.tables();
                let removed: Vec<TableId> = effects.iter().flat_map(|e| &e.removed).map(|t| t.id).collect();
                for id in named.keys().filter(|id| !now.contains_key(id)) {
                    prop_assert!(removed.contains(id), "{id} went away unseen");
                }
                check_sound(&a);
            }
            if at == again {
                let (decoded, _) = Manifest::decode(b.encode(None)).expect("encoded here");
                prop_assert_eq!(&decoded, &b);
                b = decoded;
            }
        }
        prop_assert_eq!(a.encode(None), b.encode(None));
        prop_assert_eq!(a.digest(), b.digest());
    }

    #[test]
    fn damaged_bytes_never_panic(steps in prop::collection::vec(step(), 1..40), at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
        let mut m = Manifest::new(PICKER);
        for (at, step) in steps.iter().enumerate() {
            let index = LogIndex(at as u64 + 1);
            for op in operations(&m, index, step) {
                let _ = m.apply(index, &op, true);
            }
        }
        let mut bytes = m.encode(Some(&Places::new())).to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let _ = Manifest::decode(bytes.clone().into());
        bytes.truncate(at);
        prop_assert!(Manifest::decode(bytes.into()).is_err());
    }

    #[test]
    fn bytes_of_any_content_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 2..300)) {
        for with_time in [false, true] {
            let _ = decode_op(&mut Decoder::new(bytes.clone().into(), "test"), &mut Places::new(), TableForm::Ranged, with_time);
            let _ = decode_op(&mut Decoder::new(bytes.clone().into(), "test"), &mut Places::new(), TableForm::Ending, with_time);
        }
        for version in [MANIFEST_VERSION, MANIFEST_VERSION_MANUAL, MANIFEST_VERSION_PARTS] {
            bytes[0] = version;
            let _ = Manifest::decode(bytes.clone().into());
        }
    }
}

#[test]
fn operations_come_back_with_their_places() {
    let t = table(3, 0, "a", "b", 9);
    let ends = TableEnds { half_ms: 1 << 40, last_ms: 0 };
    let ending = Arc::new(InstallTable { ends, ..(*ranged(&t, &[("a", "c")], false)).clone() });
    let ops = [
        rotate(&[(0, 0), (5, 2)]),
        install(3, vec![t.clone()]),
        install(3, vec![ranged(&t, &[("a", "c"), ("d", "")], false)]),
        install(3, vec![ending.clone()]),
        ManifestOp::CreateKeyspace { name: "k".into() },
        ManifestOp::CreateExpiring { name: "k".into() },
        ManifestOp::SetOptions { name: "k".into(), options: tiered(4).block_bytes(4096) },
        ManifestOp::Rotate { touched: vec![], clock: Some(LogClock { time_ms: 9, latest_end_ms: 1 << 40 }) },
        ManifestOp::DropKeyspace { name: "k".into() },
        checkpoint("c"),
        ManifestOp::DropCheckpoint { name: "c".into() },
        clone_of("x", "c"),
        ManifestOp::DropClone { name: "x".into() },
        compact("b", Some("m")),
        compact("", None),
    ];
    let places = Places::from([(t.id, vec![(65536, 131_072), (0, 65536)])]);
    for op in ops {
        let mut out = Vec::new();
        let form = form_of(std::slice::from_ref(&op));
        let with_time = knows_time(std::slice::from_ref(&op));
        encode_op(&mut out, &op, &places, form, with_time);
        let mut found = Places::new();
        let mut from = Decoder::new(out.into(), "test");
        assert_eq!(decode_op(&mut from, &mut found, form, with_time).expect("encoded above"), op);
        from.end().expect("nothing follows");
        if matches!(op, ManifestOp::Install { .. }) {
            assert_eq!(found, places);
        }
    }
}

/// A checkpoint of a version with many tables costs a few bytes, not a copy of its lists.
#[test]
fn checkpoints_share_what_they_name() {
    let mut m = Manifest::new(PICKER);
    ok(&mut m, 10, rotate(&[(0, 0)]));
    let tables = (0..1000).map(|n| table(1, n, &format!("{n:05}a"), &format!("{n:05}b"), 1)).collect();
    ok(&mut m, 11, install(1, tables));
    let before = m.encode(None).len();
    for n in 0..10 {
        ok(&mut m, 20 + n, checkpoint(&format!("c{n}")));
    }
    assert!(m.encode(None).len() < before + 10 * 64);
}

/// What a build wrote before there was a choice of tables: read, and written again byte for byte, so that such a group makes the
/// tables that it made and can go back to that build.
#[test]
fn a_manifest_from_before_the_choice_of_tables_comes_back_as_it_was() {
    let mut manifest = Manifest::new(PICKER);
    ok(&mut manifest, 1, rotate(&[(0, 0)]));
    let bytes = manifest.encode(None);
    assert_eq!(bytes[0], MANIFEST_VERSION);
    let (again, _) = Manifest::decode(bytes.clone()).expect("own bytes");
    assert_eq!((&again, again.encode(None)), (&manifest, bytes.clone()));

    let shaped = Manifest { settings: ManifestSettings { tables: TableShape::ByLevel, ..PICKER }, ..manifest };
    let bytes = shaped.encode(None);
    assert_eq!(bytes[0], MANIFEST_VERSION_SHAPED);
    assert_eq!(Manifest::decode(bytes.clone()).expect("own bytes").0, shaped);
    // The byte behind the four numbers: another build's way to make tables.
    let at = 2 + 3 + 3 + 2 + 1;
    assert_eq!(bytes[at], TableShape::ByLevel as u8);
    let mut foreign = bytes.to_vec();
    foreign[at] = 9;
    assert_eq!(Manifest::decode(foreign.into()).expect_err("not known").kind(), ErrorKind::Foreign);
}
