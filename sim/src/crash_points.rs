//! A store alone whose power fails at every operation of its disks.
//!
//! One run of a fixed course: every kind of command, several at a time, with flushes, compactions, purges of the log, a clean close and a
//! second life. At each write, flush and discard it is looked at what a loss of power would find, and images are made of it: every
//! subset of the writes at risk up to a bound, else some of them and draws that also tear sectors, then each of the last writes torn
//! at its middle with all others whole.
//!
//! # Checked
//! Of every image, and of what a second loss of power leaves while the store recovers from it and goes on:
//! - C1. Every checksum matches, and no two things share an extent.
//! - C2. It opens, and the bytes in use are those that the manifest names.
//! - C3. It holds what the first entries of the log made, up to one that is no earlier than any that was acknowledged, or that an
//!   earlier life has shown: nothing is lost, nothing in part, nothing comes back.
//! - C4. Writing goes on; after a clean close C1 and C2 hold without exception, and it opens again with the same content.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{Engine, ErrorKind, KeyRange, LocalLog};
use mainstay_io::Environment;
use mainstay_io::sim::{CrashPoint, DiskImage, IoKind};
use tokio::sync::oneshot;

use crate::disk::Disk;
use crate::rt::{Executor, Group, SimRng, WallClock, environment};
use crate::store::{self, Change, Model};
use crate::world::Settings;

/// Writes at the end of those at risk that are torn, each at its first half and at its second.
const TORN_MAX: usize = 3;

/// How much of all that can happen is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Of so many points one.
    pub every: u64,
    /// Of so many writes at risk every subset is an image.
    pub subset_writes_max: u32,
    /// Images of a point when there are more; with 0 one image of each point is drawn from all kinds.
    pub draws: u64,
    /// Of so many images one sees a second loss of power.
    pub second_every: u64,
    /// Points of such an image that are looked at, each with one image.
    pub second_points: usize,
    /// Threads.
    pub jobs: usize,
}

impl Effort {
    /// What a test has time for.
    pub const SHORT: Self =
        Self { every: 24, subset_writes_max: 0, draws: 0, second_every: 4, second_points: 3, jobs: 1 };
    /// Every operation.
    pub const LONG: Self =
        Self { every: 1, subset_writes_max: 6, draws: 64, second_every: 8, second_points: 6, jobs: 1 };
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations at which the power failed.
    pub points: u64,
    /// Images that were opened.
    pub images: u64,
    /// Those of a second loss of power.
    pub second: u64,
    /// Pairs compared.
    pub compared: u64,
}

/// What the store holds behind each entry that changes something.
#[derive(Clone)]
struct Course(Vec<(u64, Model)>);

impl Course {
    fn last(&self) -> &Model {
        &self.0.last().expect("it begins with an empty store").1
    }
}

/// An instant at which the power fails.
struct Point {
    kind: IoKind,
    crash: CrashPoint,
    acknowledged: u64,
}

type Points = Arc<Mutex<Vec<Point>>>;

/// A store under its course, and what is known of it outside.
struct World<'a> {
    executor: &'a Arc<Executor>,
    disk: &'a Disk,
    settings: &'a Settings,
    rng: SimRng,
    course: Course,
    /// The last entry that was acknowledged or seen.
    acknowledged: Arc<AtomicU64>,
    /// Values handed out.
    fresh: u64,
    compared: u64,
}

struct Life {
    group: Group,
    engine: Engine,
    log: Arc<LocalLog>,
    /// The last entry of the log that it found.
    found: u64,
}

/// One seed.
struct Run {
    seed: u64,
    settings: Settings,
    effort: Effort,
}

/// Small bounds, so that a short course meets every kind of work.
fn settings(rng: &mut SimRng) -> Settings {
    Settings {
        wal_bytes: 512 << 10,
        memtable_bytes: rng.range(4, 16) << 10,
        table_bytes: rng.range(4, 16) << 10,
        base_level_bytes: rng.range(16, 64) << 10,
        l0_compaction_runs: 2,
        ..Settings::draw(rng)
    }
}

/// Runs the course of one seed and looks at the points.
///
/// # Errors
/// What did not hold, with the point and the image.
pub fn run(seed: u64, effort: Effort) -> Result<Counts, String> {
    let run = Run { seed, settings: settings(&mut SimRng::new(seed)), effort };
    let (points, course) = run.travel().map_err(|e| format!("before any loss of power: {e}"))?;
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let failure = || failure.lock().unwrap_or_else(PoisonError::into_inner);
    let work = || {
        let mut counts = Counts::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(point) = points.get(number).filter(|_| failure().is_none()) else { return counts };
            if !(number as u64 + seed).is_multiple_of(effort.every) {
                continue;
            }
            counts.points += 1;
            if let Err(e) = run.look(number as u64, point, &course, &mut counts) {
                failure().get_or_insert(format!("point {number} of {}, {:?}: {e}", points.len(), point.kind));
            }
        }
    };
    let mut counts = Counts::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..effort.jobs).map(|_| scope.spawn(work)).collect();
        let mine = work();
        let theirs = threads.into_iter().map(|thread| thread.join().expect("what does not hold is no panic"));
        for one in theirs.chain([mine]) {
            counts.points += one.points;
            counts.images += one.images;
            counts.second += one.second;
            counts.compared += one.compared;
        }
    });
    match failure().take() {
        Some(e) => Err(e),
        None => Ok(counts),
    }
}

impl Run {
    /// A world whose disks lie as those of the course do: how follows from the seed.
    fn world<'a>(&'a self, executor: &'a Arc<Executor>, disk: &'a Disk, course: Course) -> World<'a> {
        World {
            executor,
            disk,
            settings: &self.settings,
            rng: executor.fork_rng(),
            course,
            acknowledged: Arc::default(),
            fresh: executor.fork_rng().u64() >> 26,
            compared: 0,
        }
    }

    /// Runs the whole course and keeps every point of it.
    fn travel(&self) -> Result<(Vec<Point>, Course), String> {
        let executor = Executor::new(self.seed);
        let disk = Disk::new(&executor, &self.settings, self.seed);
        let mut world = self.world(&executor, &disk, Course(vec![(0, Model::new())]));
        let points = Points::default();
        let outcome = executor.block_on(async {
            let mut life = world.open(1, true).await?.0;
            world.watch(&points);
            for round in 0.. {
                match world.round(round) {
                    None => break,
                    Some(changes) if changes.is_empty() => {
                        world.close(life).await?;
                        life = world.open(2, false).await?.0;
                    }
                    Some(changes) => world.propose(&life, changes).await?,
                }
            }
            world.close(life).await
        });
        disk.watch(None);
        let course = world.course;
        executor.shut_down();
        outcome?;
        Ok((taken(&points), course))
    }

    /// Makes the images of a point and checks each.
    fn look(&self, number: u64, point: &Point, course: &Course, counts: &mut Counts) -> Result<(), String> {
        let mut rng = SimRng::new(self.seed ^ number << 32);
        let effort = &self.effort;
        for (name, images) in images(&point.crash, effort, &mut rng) {
            let second = rng.chance(1000 / effort.second_every);
            let after = self.survive(rng.u64(), images, point.acknowledged, course, second);
            let after = after.map_err(|e| format!("{name}: {e}"))?;
            counts.images += 1;
            counts.compared += after.compared;
            for _ in 0..effort.second_points.min(after.points.len()) {
                let at = rng.below(after.points.len() as u64) as usize;
                let point = &after.points[at];
                let (again, images) = one_image(&point.crash, &mut rng);
                let outcome = self.survive(rng.u64(), images, point.acknowledged, &after.course, false);
                let outcome =
                    outcome.map_err(|e| format!("{name}, then operation {at} of the life after it, {again}: {e}"))?;
                counts.images += 1;
                counts.second += 1;
                counts.compared += outcome.compared;
            }
        }
        Ok(())
    }

    /// Opens what the loss of power left, checks it, goes on, closes and opens it again.
    fn survive(
        &self,
        seed: u64,
        images: Vec<DiskImage>,
        acknowledged: u64,
        course: &Course,
        second: bool,
    ) -> Result<After, String> {
        let executor = Executor::new(seed);
        let disk = Disk::new(&executor, &self.settings, self.seed);
        disk.restore(images);
        let mut world = self.world(&executor, &disk, course.clone());
        world.acknowledged.store(acknowledged, Ordering::Relaxed);
        let points = Points::default();
        if second {
            world.watch(&points);
        }
        let outcome = executor.block_on(world.go_on());
        disk.watch(None);
        let World { course, compared, .. } = world;
        executor.shut_down();
        outcome?;
        Ok(After { points: taken(&points), course, compared })
    }
}

fn taken(points: &Points) -> Vec<Point> {
    std::mem::take(&mut *points.lock().unwrap_or_else(PoisonError::into_inner))
}

type Image = (String, Vec<DiskImage>);

fn images(crash: &CrashPoint, effort: &Effort, rng: &mut SimRng) -> Vec<Image> {
    if effort.draws == 0 {
        return vec![one_image(crash, rng)];
    }
    let writes = crash.writes();
    let mut all: Vec<Image> = if writes <= effort.subset_writes_max as usize {
        let subset = |set: u64| (format!("writes {set:#b} of {writes}"), crash.subset(|write| set >> write & 1 == 1));
        (0..1 << writes).map(subset).collect()
    } else {
        (0..effort.draws).map(|_| drawn(crash, rng)).collect()
    };
    let torn = writes.saturating_sub(TORN_MAX)..writes;
    let torn = torn.flat_map(|write| [true, false].map(|first| (write, first)));
    all.extend(torn.map(|(write, first)| self::torn(crash, write, first)));
    all
}

fn one_image(crash: &CrashPoint, rng: &mut SimRng) -> Image {
    let writes = crash.writes() as u64;
    match rng.below(4) {
        0 if writes > 0 => torn(crash, rng.below(writes) as usize, rng.chance(500)),
        1 => {
            let set = rng.u64();
            (format!("writes {set:#b} of {writes}"), crash.subset(|write| set >> (write % 64) & 1 == 1))
        }
        _ => drawn(crash, rng),
    }
}

fn drawn(crash: &CrashPoint, rng: &mut SimRng) -> Image {
    let seed = rng.u64();
    (format!("image of seed {seed} of {} writes", crash.writes()), crash.drawn(seed))
}

fn torn(crash: &CrashPoint, write: usize, first: bool) -> Image {
    let half = if first { "first" } else { "second" };
    (format!("write {write} of {} without its {half} half", crash.writes()), crash.torn(write, first))
}

/// What a life after a loss of power leaves for a second one.
struct After {
    points: Vec<Point>,
    course: Course,
    compared: u64,
}

impl World<'_> {
    /// Keeps every operation from now on that changes something on a disk.
    fn watch(&self, points: &Points) {
        let (points, acknowledged) = (points.clone(), self.acknowledged.clone());
        self.disk.watch(Some(Box::new(move |kind, crash_point| {
            if !matches!(kind, IoKind::Read | IoKind::Allocate) {
                let acknowledged = acknowledged.load(Ordering::Relaxed);
                let point = Point { kind, crash: crash_point(), acknowledged };
                points.lock().unwrap_or_else(PoisonError::into_inner).push(point);
            }
        })));
    }

    /// Opens the store, and tells the bytes in use before anything is done with it.
    async fn open(&self, number: u64, format: bool) -> Result<(Life, u64), String> {
        let group = Group(number);
        self.disk.power_on(group);
        let media = self.disk.open()?;
        let opened = store::open(self.executor, media, self.settings, number, format).await?;
        let life = Life { group, engine: opened.engine, log: Arc::new(opened.log), found: opened.applied.0 };
        Ok((life, opened.extent_bytes))
    }

    async fn close(&self, life: Life) -> Result<(), String> {
        let Life { group, engine, log, .. } = life;
        let closing = async move {
            log.close().await.map_err(|e| format!("close: {e}"))?;
            engine.close().await.map_err(|e| format!("close: {e}"))
        };
        store::within(self.executor, group, closing).await.unwrap_or(Err("close did not end".to_owned()))
    }

    /// Proposes all at once and lets the course follow.
    async fn propose(&mut self, life: &Life, changes: Vec<Change>) -> Result<(), String> {
        let mut waiting = Vec::new();
        for change in changes {
            let (command, log) = (change.command(life.log.group()), life.log.clone());
            let acknowledged = self.acknowledged.clone();
            // The first of a round finds the log idle, if any does.
            let here = waiting.is_empty();
            let proposing = async move {
                let applied = if here { log.propose_here(command).await } else { log.propose(command).await };
                let applied = applied.map_err(|e| e.to_string())?;
                acknowledged.fetch_max(applied.index.0, Ordering::Relaxed);
                Ok::<_, String>(applied)
            };
            let (send, answer) = oneshot::channel();
            let task = Box::pin(async move {
                // The receiver is gone only if the run has failed.
                let _ = send.send(proposing.await);
            });
            drop(self.executor.spawn(life.group, "client", task));
            waiting.push((change, answer));
        }
        let mut done = BTreeMap::new();
        for (change, answer) in waiting {
            let answer = store::patient(answer).await.ok_or(format!("{change:?} has no answer"))?;
            let applied = answer.map_err(|e| format!("{change:?}: {e}"))?;
            done.insert(applied.index.0, (change, applied.response));
        }
        for (index, (change, response)) in done {
            let mut model = self.course.last().clone();
            match response.map_err(|e| e.kind()) {
                Ok(_) if !model.refuses(&change) => {
                    model.change(change, |name| life.log.group().keyspace(name))?;
                    self.course.0.push((index, model));
                }
                Err(ErrorKind::Conflict) if model.refuses(&change) => {}
                other => return Err(format!("{change:?} was answered {other:?}")),
            }
        }
        Ok(())
    }

    /// Every checksum of the disks as they are (C1), and the bytes that the manifest names.
    async fn survey(&self, superblock_may_differ: bool) -> Result<u64, String> {
        let environment: Environment = environment(self.executor, Group::WORLD, WallClock::ahead(Duration::ZERO));
        let mut survey = self.disk.survey(&environment).await?;
        // Of a copy that tore nobody can tell that it did not rot.
        survey.damage.retain(|(part, _)| !(superblock_may_differ && part == "superblock"));
        if !survey.damage.is_empty() {
            return Err(format!("damage: {:?}", survey.damage));
        }
        Ok(survey.live.iter().map(|range| range.end - range.start).sum())
    }

    /// Compares what the store holds with the end of the course (C3).
    async fn compare(&mut self, life: &Life) -> Result<(), String> {
        let compare = self.course.last().clone().compare(life.log.group().clone());
        let compared = store::within(self.executor, life.group, compare).await.ok_or("a scan did not end")?;
        self.compared += compared?;
        Ok(())
    }

    /// Ends the course where the log ends that was found, which holds what was acknowledged (C3). What it holds stays from here on.
    fn cut(&mut self, life: &Life) -> Result<(), String> {
        let (found, acknowledged) = (life.found, self.acknowledged.load(Ordering::Relaxed));
        if found < acknowledged {
            return Err(format!("the log ends at {found} and {acknowledged} was acknowledged"));
        }
        self.course.0.retain(|(index, _)| *index <= found);
        self.acknowledged.store(found, Ordering::Relaxed);
        Ok(())
    }

    /// The lives after a loss of power.
    async fn go_on(&mut self) -> Result<(), String> {
        let named = self.survey(true).await.map_err(|e| format!("as the power left it: {e}"))?;
        let before = self.acknowledged.load(Ordering::Relaxed);
        let (life, used) = self.open(1, false).await?;
        if used != named {
            return Err(format!("{used} bytes are in use and the manifest names {named}"));
        }
        self.cut(&life)?;
        let (found, acknowledged) = (life.found, before);
        let at = |e| format!("at entry {found}, {acknowledged} acknowledged: {e}");
        self.compare(&life).await.map_err(at)?;
        for changes in self.more() {
            self.propose(&life, changes).await.map_err(|e| format!("writing goes on: {e}"))?;
        }
        self.compare(&life).await.map_err(|e| format!("writing has gone on: {e}"))?;
        self.close(life).await?;
        let named = self.survey(false).await.map_err(|e| format!("after the close: {e}"))?;
        let (life, used) = self.open(2, false).await.map_err(|e| format!("opened again: {e}"))?;
        if used != named {
            return Err(format!("opened again: {used} bytes are in use and the manifest names {named}"));
        }
        self.cut(&life).map_err(|e| format!("opened again: {e}"))?;
        self.compare(&life).await.map_err(|e| format!("opened again: {e}"))?;
        self.executor.kill(life.group);
        self.executor.run_as(life.group, move || drop(life));
        Ok(())
    }

    fn key(&mut self) -> Bytes {
        Bytes::from(format!("key-{:02}", self.rng.below(40)))
    }

    fn batches(&mut self, branch: &str) -> Vec<Change> {
        let batch = |world: &mut Self| {
            let mut ops = BTreeMap::new();
            for _ in 0..world.rng.range(2, 5) {
                let keyspaces: Vec<u32> = world.course.last().keyspaces.values().copied().chain([0]).collect();
                let (keyspace, key) = (*world.rng.pick(&keyspaces), world.key());
                world.fresh += 1;
                let value = (!world.rng.chance(200)).then_some(world.fresh);
                ops.insert((keyspace, key), value);
            }
            let ops = ops.into_iter().map(|((keyspace, key), value)| (keyspace, key, value)).collect();
            Change::Batch { branch: branch.to_owned(), ops }
        };
        (0..4).map(|_| batch(self)).collect()
    }

    fn remove(&mut self, branch: &str) -> Change {
        let (a, b) = (self.key(), self.key());
        let range = KeyRange::new(Bound::Included(a.clone().min(b.clone())), Bound::Included(a.max(b)));
        Change::RemoveRange { branch: branch.to_owned(), keyspace: 0, range }
    }

    /// One condition that holds and one that does not, in one order or the other.
    fn conditional(&mut self, branch: &str) -> Vec<Change> {
        let key = self.key();
        let held = self.course.last().branches.get(branch).and_then(|state| state.get(&0)?.get(&key)).copied();
        self.fresh += 2;
        let with = |expect, value| Change::Conditional {
            branch: branch.to_owned(),
            keyspace: 0,
            key: key.clone(),
            expect,
            value,
        };
        vec![with(held, self.fresh - 1), with(held, self.fresh)]
    }

    /// The commands of a round, all proposed at once. Without any: a clean close, and a life after it.
    fn round(&mut self, number: u64) -> Option<Vec<Change>> {
        let checkpoint = |name: &str, branch: &str| {
            vec![Change::CreateCheckpoint { name: name.to_owned(), branch: branch.to_owned() }]
        };
        let clone = |name: &str, checkpoint: &str| {
            vec![Change::CreateClone { name: name.to_owned(), checkpoint: checkpoint.to_owned() }]
        };
        let mut changes = match number {
            2 => vec![Change::CreateKeyspace("a".to_owned())],
            4 | 19 => vec![self.remove("main")],
            6 => self.conditional("main"),
            8 => vec![Change::Rotate],
            9 | 29 => vec![Change::SetOptions(store::options(&mut self.rng))],
            10 => checkpoint("c1", "main"),
            12 => clone("b1", "c1"),
            14 => vec![Change::Compact("main".to_owned())],
            16 => vec![self.remove("b1")],
            17 => vec![Change::CreateKeyspace("b".to_owned())],
            20 => vec![Change::DropKeyspace("a".to_owned())],
            22 => vec![Change::DropCheckpoint("c1".to_owned())],
            24 => checkpoint("c2", "b1"),
            26 => return Some(Vec::new()),
            28 => {
                vec![Change::RemoveRange {
                    branch: "main".to_owned(),
                    keyspace: 0,
                    range: KeyRange::new(Bound::Unbounded, Bound::Unbounded),
                }]
            }
            30 => vec![Change::DropClone("b1".to_owned())],
            31 => clone("b2", "c2"),
            33 => self.conditional("b2"),
            35 => vec![Change::Compact("b2".to_owned())],
            37 => vec![Change::DropCheckpoint("c2".to_owned())],
            40.. => return None,
            _ => Vec::new(),
        };
        let others = self.course.last().branches.keys().rfind(|name| *name != "main").cloned();
        let branch = others.filter(|_| number % 4 == 1).unwrap_or_else(|| "main".to_owned());
        if changes.is_empty() || self.rng.chance(300) {
            // They need nothing of the commands that they are with.
            if !changes.iter().any(|change| matches!(change, Change::DropKeyspace(_) | Change::DropClone(_))) {
                changes.extend(self.batches(&branch));
            }
        }
        Some(changes)
    }

    /// What is written after a loss of power.
    fn more(&mut self) -> Vec<Vec<Change>> {
        self.fresh += 1;
        let name = format!("after-{}", self.fresh);
        vec![
            self.batches("main"),
            vec![self.remove("main")],
            vec![Change::CreateCheckpoint { name, branch: "main".to_owned() }],
            self.batches("main"),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_of_power_at_any_operation_leaves_a_prefix_that_holds_what_was_acknowledged() {
        for seed in 0..2 {
            let counts = run(seed, Effort::SHORT).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert!(counts.points > 10 && counts.second > 0, "{counts:?}");
        }
    }
}
