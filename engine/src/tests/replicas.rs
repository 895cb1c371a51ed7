//! Groups fed the same log at different speeds, with different memory, and from each other.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::FutureExt;
use mainstay_io::sim::SimMedia;
use mainstay_io::{BackendChoice, BoxFuture, Environment, MediaOptions, Target, block_on, create_media};

use super::harness::*;
use crate::{
    BranchId, Command, CommandBody, CompactionStyle, Engine, EngineSettings, ErrorKind, Group, KeyspaceOptions,
    LogIndex, MAIN, Result, TableCompression, TableId, TableSource,
};

/// A replica without a log of its own: the test feeds it.
pub(super) struct Replica {
    pub(super) media: SimMedia,
    pub(super) engine: Engine,
    pub(super) group: Group,
}

impl Replica {
    pub(super) fn new(memory_bytes: u64, background_tasks: usize) -> Self {
        let media = media();
        let settings = EngineSettings {
            memory_bytes,
            background_tasks,
            wal_in_flight_max: 3,
            scrub_bytes_per_second: 0,
            scrub_pause: crate::SCRUB_PAUSE,
            log_holes: false,
        };
        let (engine, _) = engine(&media, settings).expect("opens");
        let group = block_on(engine.group(GROUP, settings_of_group())).expect("opens");
        Self { media, engine, group }
    }

    /// The power fails; the state of the volume comes back without the entries, which the test feeds again.
    pub(super) fn crash(self, seed: u64) -> Self {
        let Self { media, engine, group } = self;
        drop((engine, group));
        media.crash(seed);
        let (engine, _) = engine_of(&media);
        let group = block_on(engine.group(GROUP, settings_of_group())).expect("opens");
        Self { media, engine, group }
    }

    pub(super) fn feed(&self, log: &[Command]) {
        for (at, command) in log.iter().enumerate() {
            let index = LogIndex(at as u64 + 1);
            if index > self.group.applied() {
                block_on(self.group.apply(index, command)).expect("the group is open");
            }
        }
    }

    pub(super) fn all(&self, branch: BranchId) -> std::collections::BTreeMap<Vec<u8>, Vec<u8>> {
        all(&self.group.snapshot(branch).expect("the branch is there"), DEFAULT)
    }
}

fn engine_of(media: &SimMedia) -> (Engine, Vec<crate::OwnerRecord>) {
    engine(media, engine_settings()).expect("opens")
}

pub(super) fn settings_of_group() -> crate::GroupSettings {
    settings()
}

fn command(body: CommandBody) -> Command {
    Command { time_ms: 5, body }
}

/// Applies to the leader and writes the log, with the installs that its jobs make on the way and all that come after.
pub(super) fn lead(leader: &Replica, commands: impl Iterator<Item = CommandBody>) -> Vec<Command> {
    let mut log = Vec::new();
    let mut apply = |command: Command| {
        log.push(command);
        let index = LogIndex(log.len() as u64);
        block_on(leader.group.apply(index, log.last().expect("just pushed"))).expect("the group is open");
    };
    for body in commands {
        apply(command(body));
        while let Some(install) = leader.group.shared().take_offer() {
            apply(install);
        }
    }
    apply(command(CommandBody::Rotate));
    while leader.group.shared().has_jobs() {
        apply(block_on(leader.group.next_install()));
    }
    log
}

pub(super) fn work() -> impl Iterator<Item = CommandBody> {
    (0..1200_usize).map(|n| match n {
        300 => CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN },
        301 => CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() },
        400 | 1000 => compact(MAIN, "", None),
        550 => compact(MAIN, "k0100", Some("k0200")),
        450 => options(KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs: 3 })),
        // While jobs of before are under way: they go by what they began with.
        650 => options(KeyspaceOptions::new().compression(TableCompression::None).block_bytes(1024)),
        651 => options(KeyspaceOptions::new().compression(TableCompression::ByLevel)),
        850 => options(KeyspaceOptions::new().block_bytes(64 << 10).compaction(CompactionStyle::Tiered { runs: 6 })),
        700 => CommandBody::CreateCheckpoint { name: "d".into(), branch: MAIN },
        900 => CommandBody::DropCheckpoint { name: "c".into() },
        _ if n % 97 == 50 => {
            let (from, end) = (n * 31 % 500, n * 31 % 500 + n % 120);
            delete_range(MAIN, range(&format!("k{from:04}"), (n % 2 == 0).then_some(&format!("k{end:04}"))))
        }
        _ if n % 17 == 3 => delete(MAIN, &format!("k{:04}", n * 13 % 500)),
        _ => put(MAIN, &format!("k{:04}", n * 29 % 500), format!("{n:<60}").as_bytes()),
    })
}

fn options(options: KeyspaceOptions) -> CommandBody {
    CommandBody::SetOptions { name: "default".into(), options }
}

pub(super) fn check_equal(a: &Replica, b: &Replica) {
    block_on(b.group.shared().idle());
    let (x, y) = (a.group.status(), b.group.status());
    assert_eq!((x.digest_index, x.digest), (y.digest_index, y.digest));
    assert_eq!((y.absent_jobs, y.divergences), (0, 0));
    assert_eq!((x.refused_installs, y.refused_installs), (0, 0));
    assert_eq!((x.tables, x.table_bytes), (y.tables, y.table_bytes));
    for branch in a.group.branches() {
        assert_eq!(a.all(branch.id), b.all(branch.id), "{}", branch.name);
    }
}

/// A clone begins with the runs of its origin. As long as nothing is written to it nothing compacts them, so nobody waits for that.
#[test]
fn writes_do_not_wait_for_a_compaction_that_nothing_has_started() {
    let leader = Replica::new(64 << 20, 1);
    let mut index = LogIndex(0);
    let mut apply = |command: Command| {
        index = LogIndex(index.0 + 1);
        block_on(leader.group.apply(index, &command)).expect("the group is open");
    };
    let may_write = || leader.group.admit().now_or_never().is_some();
    let mut compactions = Vec::new();
    let mut rounds = 0;
    // All overlap, and no compaction is installed, though it is done.
    while may_write() {
        for n in 0..4 {
            apply(command(put(MAIN, &format!("k{n}"), b"v")));
        }
        apply(command(CommandBody::Rotate));
        loop {
            let install = block_on(leader.group.next_install());
            let CommandBody::Install { job, .. } = install.body else { continue };
            if leader.group.shared().is_flush(job) {
                apply(install);
                break;
            }
            compactions.push(install);
        }
        rounds += 1;
        assert!(rounds < 200, "writes are never held up");
    }
    apply(command(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN }));
    apply(command(CommandBody::CreateClone { name: "x".into(), checkpoint: "c".into() }));
    assert!(!may_write(), "the main branch is compacted first");
    compactions.into_iter().for_each(&mut apply);
    while leader.group.shared().has_jobs() {
        apply(block_on(leader.group.next_install()));
    }
    assert!(may_write(), "nothing compacts the clone");
}

#[test]
fn the_same_log_gives_the_same_tables_at_any_speed() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let installs = log.iter().filter(|c| matches!(c.body, CommandBody::Install { .. })).count();
    assert!(installs > 20, "the work reaches flush and compaction, {installs} installs");
    for (memory, tasks) in [(1 << 20, 1), (256 << 20, 4)] {
        let replica = Replica::new(memory, tasks);
        replica.feed(&log);
        check_equal(&leader, &replica);
    }
}

/// Applies the log, and gives the digest of the state behind each install. Whether the tables made here are those that an install names is
/// judged by the group (`divergences`).
fn digests(group: &Group, log: &[Command]) -> Vec<(LogIndex, u128)> {
    let mut digests = Vec::new();
    for (index, command) in (1..).map(LogIndex).zip(log) {
        block_on(group.apply(index, command)).expect("the group is open");
        if matches!(command.body, CommandBody::Install { .. }) {
            let status = group.status();
            digests.push((status.digest_index, status.digest));
        }
    }
    block_on(group.shared().idle());
    let status = group.status();
    assert_eq!((status.absent_jobs, status.divergences), (0, 0), "every table was made here, and is equal");
    digests
}

/// On disks that complete in the call, and on files with each interface: with other memory, other threads.
#[test]
fn every_install_finds_the_same_digest_whatever_serves_the_disk() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work().take(700));
    let first = Replica::new(8 << 20, 2);
    let expect = digests(&first.group, &log);
    assert!(expect.len() > 20, "the work reaches flush and compaction, {} installs", expect.len());
    for (backend, memory_bytes, background_tasks) in
        [(BackendChoice::Threads, 1 << 20, 4), (BackendChoice::Auto, 64 << 20, 1)]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let target = Target::Directory(folder.path().join("volume"));
        let media = create_media(&target, &MediaOptions { backend }).expect("a new volume");
        let settings = EngineSettings { memory_bytes, background_tasks, ..engine_settings() };
        let engine = block_on(async {
            Engine::format(media.clone(), &Environment::system(), WAL_BYTES, false).await?;
            Engine::open(media, Environment::system(), settings, &mut |_| Ok(())).await
        });
        let engine = engine.expect("opens");
        let group = block_on(engine.group(GROUP, settings_of_group())).expect("opens");
        assert_eq!(digests(&group, &log), expect, "{backend:?}");
        block_on(engine.close()).expect("closes");
    }
}

#[test]
fn a_replica_that_crashes_on_the_way_ends_with_the_same_tables() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let mut replica = Replica::new(64 << 20, 2);
    for (seed, part) in (0..).zip([200, 333, 650, 651, 1000]) {
        replica.feed(&log[..part]);
        // What is applied is readable, whatever of it is in tables.
        let expect = Replica::new(64 << 20, 1);
        expect.feed(&log[..part]);
        assert_eq!(replica.all(MAIN), expect.all(MAIN));
        replica = replica.crash(seed);
        assert!(replica.group.applied() == replica.group.flushed());
    }
    replica.feed(&log);
    check_equal(&leader, &replica);
}

struct From<'a> {
    leader: &'a Group,
    fetched: AtomicUsize,
    /// Flips a bit of what it serves.
    damage: bool,
}

impl TableSource for From<'_> {
    fn read_table(&self, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        if offset == 0 {
            self.fetched.fetch_add(1, Ordering::Relaxed);
        }
        let (leader, damage) = (self.leader.clone(), self.damage);
        Box::pin(async move {
            let bytes = leader.read_table(id, offset, length).await?;
            if !damage {
                return Ok(bytes);
            }
            let mut bytes = bytes.to_vec();
            bytes[100] ^= 1;
            Ok(bytes.into())
        })
    }
}

#[test]
fn an_import_fetches_what_is_not_held_and_goes_on_with_the_log() {
    let leader = Replica::new(64 << 20, 1);
    let log = lead(&leader, work());
    let export = leader.group.export().expect("the group is open");
    let tables = leader.group.status().tables as usize;
    let source = |damage| From { leader: &leader.group, fetched: AtomicUsize::new(0), damage };

    let receiver = Replica::new(64 << 20, 1);
    receiver.feed(&log[..40]);
    let before = receiver.all(MAIN);
    let refused = block_on(receiver.group.import(export.manifest.clone(), &source(true))).expect_err("damaged");
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
    assert_eq!(receiver.all(MAIN), before, "the old state stays");

    let good = source(false);
    let flushed = block_on(receiver.group.import(export.manifest.clone(), &good)).expect("all tables can be had");
    assert_eq!((flushed, receiver.group.applied()), (export.flushed, export.flushed));
    assert_eq!(good.fetched.load(Ordering::Relaxed), tables);
    receiver.feed(&log);
    check_equal(&leader, &receiver);

    // It survives the power, and a second import finds everything here.
    let receiver = receiver.crash(9);
    receiver.feed(&log);
    check_equal(&leader, &receiver);
    let again = source(false);
    block_on(receiver.group.import(export.manifest.clone(), &again)).expect("nothing is missing");
    assert_eq!(again.fetched.load(Ordering::Relaxed), 0);
    receiver.feed(&log);
    check_equal(&leader, &receiver);
}

/// Everything that was frozen is flushed and compacted, and its installs are in the log.
fn finish_jobs(leader: &Replica, log: &mut Vec<Command>) {
    while leader.group.shared().has_jobs() {
        log.push(block_on(leader.group.next_install()));
        leader.feed(log);
    }
}

/// The tables of an export are served until it is dropped, though the leader has compacted them away.
#[test]
fn an_export_pins_its_tables() {
    let leader = Replica::new(64 << 20, 1);
    // Without checkpoints and clones: they would keep what they find of the tables, by the pace of the jobs.
    let work = || work().filter(|body| matches!(body, CommandBody::Batch(_)));
    let mut log = lead(&leader, work().take(200));
    let export = leader.group.export().expect("the group is open");
    for body in work().skip(200) {
        log.push(command(body));
        leader.feed(&log);
        while let Some(install) = leader.group.shared().take_offer() {
            log.push(install);
            leader.feed(&log);
        }
    }
    finish_jobs(&leader, &mut log);
    let receiver = Replica::new(64 << 20, 1);
    let source = From { leader: &leader.group, fetched: AtomicUsize::new(0), damage: false };
    let flushed = block_on(receiver.group.import(export.manifest.clone(), &source)).expect("pinned");
    receiver.feed(&log[..]);
    assert!(flushed < leader.group.flushed());
    assert_eq!(receiver.all(MAIN), leader.all(MAIN));
    let gone = export.manifest.clone();
    drop(export);
    // Each round is compacted before the next: some rounds replace the last of its tables.
    let refused = (0..100).find_map(|_| {
        for body in work().take(100) {
            log.push(command(body));
            leader.feed(&log);
        }
        finish_jobs(&leader, &mut log);
        let late = Replica::new(64 << 20, 1);
        block_on(late.group.import(gone.clone(), &source)).err()
    });
    assert_eq!(refused.map(|error| error.kind()), Some(ErrorKind::NotFound), "no longer pinned");
}

/// Without anybody to ask, a replica whose tables differ says so and goes on with its inputs: it never takes the other's word.
#[test]
fn a_divergence_is_counted_and_not_adopted() {
    let leader = Replica::new(64 << 20, 1);
    let mut log = lead(&leader, work().take(200));
    let at = log.iter().position(|c| matches!(&c.body, CommandBody::Install { tables, .. } if !tables.is_empty()));
    let at = at.expect("something was flushed");
    if let CommandBody::Install { tables, .. } = &mut log[at].body {
        tables[0].digest ^= 1;
    }
    let replica = Replica::new(64 << 20, 1);
    replica.feed(&log[..=at]);
    block_on(replica.group.shared().diverged());
    assert_eq!(replica.group.status().divergences, 1);
    assert!(replica.group.is_diverged());
    replica.feed(&log);
    assert_eq!(replica.all(MAIN), leader.all(MAIN));
    assert!(replica.group.flushed() < leader.group.flushed());
    // An export of the leader heals it.
    let export = leader.group.export().expect("the group is open");
    let source = From { leader: &leader.group, fetched: AtomicUsize::new(0), damage: false };
    block_on(replica.group.import(export.manifest.clone(), &source)).expect("the leader serves");
    assert_eq!(replica.all(MAIN), leader.all(MAIN));
    assert!(!replica.group.is_diverged());
    drop((replica.engine, leader.engine, replica.media));
}
