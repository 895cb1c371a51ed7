//! Options of keyspaces: which jobs go by them, and tables of cases for the picker of tiered ones.

use super::*;

#[test]
fn the_picker_of_a_tiered_keyspace_follows_its_table_of_cases() {
    let am: &[(&str, &str)] = &[("a", "m")];
    let check = |what: &str, runs, v: &Version, busy: &[(u64, u32)], outstanding, expect: &str| {
        let rules = Rules { style: CompactionStyle::Tiered { runs }, ..LEVELED };
        let busy = busy.iter().map(|&(job, ordinal)| TableId { job: JobId(job), ordinal }).collect();
        assert_eq!(told(pick(&rules, MAIN, KeyspaceId(0), v, &busy, outstanding)), expect, "{what}");
    };
    let level = |level: u8, bytes| -> (u8, Vec<(&str, &str, u64)>) { (level, vec![("a", "m", bytes)]) };
    let of = |l0: usize, levels: &[(u8, u64)]| {
        let levels: Vec<_> = levels.iter().map(|&(at, bytes)| level(at, bytes)).collect();
        let levels: Vec<(u8, &[(&str, &str, u64)])> = levels.iter().map(|(at, tables)| (*at, &tables[..])).collect();
        version(&vec![am; l0], &levels)
    };
    check("nothing", 4, &of(0, &[]), &[], 0, "-");
    check("fewer than allowed", 4, &of(2, &[(6, 1)]), &[], 0, "-");
    check("the first run gets the last place", 4, &of(4, &[]), &[], 0, "0>6 101-0,102-0,103-0,104-0+!");
    check("a larger one below stays as it is", 4, &of(3, &[(6, 900)]), &[], 0, "0>5 101-0,102-0,103-0+");
    check("a smaller one is merged too", 4, &of(3, &[(6, 300)]), &[], 0, "0>6 101-0,102-0,103-0+6-0!");
    check(
        "and the next, if it is no larger than all before it",
        4,
        &of(2, &[(4, 200), (5, 400), (6, 801)]),
        &[],
        0,
        "0>5 4-0,101-0,102-0+5-0",
    );
    check("as many as must be", 3, &of(1, &[(5, 5000), (6, 9000)]), &[], 0, "0>5 101-0+5-0");
    check("without a flush too", 2, &of(0, &[(5, 5000), (6, 9000)]), &[], 0, "5>6 5-0+6-0!");
    check(
        "no place is left above the first",
        9,
        &of(8, &[(1, 5000), (6, 90_000)]),
        &[],
        0,
        "0>1 101-0,102-0,103-0,104-0,105-0,106-0,107-0,108-0+1-0",
    );
    check("twice the last run is above it", 4, &of(2, &[(5, 1900), (6, 1000)]), &[], 0, "0>6 5-0,101-0,102-0+6-0!");
    check("not yet twice", 4, &of(2, &[(5, 1700), (6, 1000)]), &[], 0, "0>4 101-0,102-0+");
    let apart = version(&[&[("g", "h")], &[("e", "f")]], &[(5, &[("c", "d", 100)]), (6, &[("a", "b", 900)])]);
    check("runs that stand apart change their places", 4, &apart, &[], 0, "move 0>5 102-0,101-0");
    // While a merge is under way.
    check("levels wait", 4, &of(1, &[(4, 1), (5, 1), (6, 1)]), &[(5, 0)], 1, "-");
    check("flushes do not", 4, &of(2, &[(5, 1), (6, 1)]), &[(5, 0), (6, 0)], 1, "0>4 101-0,102-0+");
    check("unless few", 4, &of(1, &[(5, 1), (6, 1)]), &[(5, 0), (6, 0)], 1, "-");
    check("or without a place", 4, &of(2, &[(1, 1), (6, 1)]), &[(1, 0), (6, 0)], 1, "-");
    check("or merged themselves", 4, &of(4, &[(6, 1)]), &[(104, 0)], 1, "-");
    check("no more jobs than the bound", 4, &of(2, &[(5, 1), (6, 1)]), &[(5, 0), (6, 0)], 2, "-");
}

/// A run goes down with its tombstones once they are a quarter of what that reads, and the last one is rid of them.
#[test]
fn dead_entries_of_a_tiered_keyspace_go_down_with_their_run() {
    let dead = |t: TableRef, entries, tombstones| Arc::new(InstallTable { entries, tombstones, ..(*t).clone() });
    let told = |v: &Version| {
        let rules = Rules { style: CompactionStyle::Tiered { runs: 9 }, ..LEVELED };
        told(pick(&rules, MAIN, KeyspaceId(0), v, &Default::default(), 0))
    };
    let mut v = Version::default();
    v.l0.push(Arc::new(vec![dead(table(101, 0, "a", "m", 9), 100, 60)]));
    assert_eq!(told(&v), "0>6 101-0+!");
    v.set_level(5, vec![dead(table(5, 0, "a", "m", 9), 100, 0)]);
    v.set_level(6, vec![dead(table(6, 0, "a", "m", 9), 1000, 0)]);
    assert_eq!(told(&v), "0>5 101-0+5-0");
    v.l0.clear();
    assert_eq!(told(&v), "-");
    v.set_level(5, vec![dead(table(5, 0, "a", "m", 9), 400, 360)]);
    assert_eq!(told(&v), "5>6 5-0+6-0!");
    v.set_level(5, Vec::new());
    v.set_level(6, vec![dead(table(6, 0, "a", "b", 9), 100, 1), dead(table(6, 1, "c", "d", 9), 100, 25)]);
    assert_eq!(told(&v), "6>6 6-1+!");
    v.set_level(4, v.level(6).to_vec());
    v.set_level(6, Vec::new());
    assert_eq!(told(&v), "-", "26 of 200");
    v.set_level(4, vec![dead(table(4, 0, "a", "b", 9), 100, 25)]);
    assert_eq!(told(&v), "4>6 4-0+!");
}

/// What a job builds by is what the keyspace had when it was started, whatever is chosen before it runs.
#[test]
fn a_job_goes_by_the_options_of_its_start() {
    let mut m = Manifest::new(PICKER);
    let id = KeyspaceId(0);
    let set = |m: &mut Manifest, index, options| {
        ok(m, index, ManifestOp::SetOptions { name: DEFAULT_KEYSPACE.into(), options }).took_effect
    };
    let block = |bytes| KeyspaceOptions::new().block_bytes(bytes);
    assert!(!set(&mut m, 1, KeyspaceOptions::new()), "it has nothing else");
    ok(&mut m, 10, rotate(&[(0, 0)]));
    assert!(set(&mut m, 11, block(1024)));
    assert!(!set(&mut m, 12, block(1024)));
    assert!(set(&mut m, 13, block(2048)), "no job is between: it takes the place of the other");
    ok(&mut m, 20, rotate(&[(0, 0)]));
    assert!(set(&mut m, 21, block(4096)));
    let blocks = |m: &Manifest| [1, 2, 3].map(|job| m.options_for(id, JobId(job)).block_bytes);
    assert_eq!(blocks(&m), [None, Some(2048), Some(4096)]);
    assert_eq!(m.options_of(id), block(4096));
    assert_eq!(m.options[&id].len(), 2);
    let (again, _) = Manifest::decode(m.encode(None)).expect("own bytes");
    assert_eq!(again, m);
    // What nobody goes by any more is forgotten with the next choice.
    ok(&mut m, 30, install(1, vec![table(1, 0, "a", "b", 1)]));
    ok(&mut m, 31, install(2, vec![table(2, 0, "a", "b", 1)]));
    assert!(set(&mut m, 32, tiered(4)));
    assert_eq!(m.options[&id], [Chosen { since: JobId(3), options: tiered(4) }]);
    // A keyspace is made by it, and its options go with it.
    let made = ok(&mut m, 40, ManifestOp::SetOptions { name: "k".into(), options: tiered(2) }).keyspace.expect("made");
    assert_eq!(m.options_of(made), tiered(2));
    ok(&mut m, 41, ManifestOp::DropKeyspace { name: "k".into() });
    ok(&mut m, 42, rotate(&[]));
    assert!(!m.options.contains_key(&made));
    let refused = m.apply(LogIndex(43), &ManifestOp::SetOptions { name: "k".into(), options: tiered(1) }, true);
    assert_eq!(refused.expect_err("out of range").kind(), ErrorKind::Invalid);
}

/// Another style meets the tables that are there.
#[test]
fn a_keyspace_becomes_tiered_and_leveled_again() {
    let am: &[(&str, &str)] = &[("a", "m")];
    let v = version(&[am; 3], &[(6, &[("a", "m", 1000)])]);
    let mut m = manifest_of(v);
    let set = |m: &mut Manifest, index, options| {
        let effects = ok(m, index, ManifestOp::SetOptions { name: DEFAULT_KEYSPACE.into(), options });
        effects.started.iter().map(|job| told_job(m, *job)).collect::<Vec<_>>()
    };
    assert_eq!(set(&mut m, 300, tiered(4)), ["0>5 101-0,102-0,103-0+"], "by the change itself");
    ok(&mut m, 301, install(200, vec![table(200, 0, "a", "m", 300)]));
    assert_eq!(set(&mut m, 302, tiered(2)), ["5>6 200-0+6-0!"]);
    ok(&mut m, 303, install(201, vec![table(201, 0, "a", "m", 1000)]));
    assert!(set(&mut m, 304, KeyspaceOptions::new()).is_empty());
    assert_eq!(main_version(&m).level(6).len(), 1);
}

fn told_job(m: &Manifest, job: JobId) -> String {
    match &*m.jobs[&job] {
        Job::Compact(c) => told(Some(Pick::Start(c.clone()))),
        Job::Flush { generation } => format!("flush {generation}"),
    }
}
