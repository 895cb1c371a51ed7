//! Many lives of one volume on simulated disks: superblock, log and extents together, killed at any step.
//!
//! One seed decides the work, the latencies, the moment of each crash, and what it leaves of the writes in flight.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::sim::{Latency, SimClock, SimLayout, SimMedia, SimOptions, SimRandom, SimScheduler, SimTimeline};
use mainstay_io::{BoxFuture, Environment, Random, Spawner, TaskHandle};
use mainstay_wal::{GroupId, Record, RecordKind, RecordPos, Reserve, Wal, WalOptions};

use super::*;

const RING_BYTES: u64 = 256 << 10;

/// Virtual time and tasks, one at a time.
#[derive(Default)]
struct World {
    state: Mutex<State>,
    timeline: SimTimeline,
}

#[derive(Default)]
struct State {
    tasks: BTreeMap<u64, BoxFuture<()>>,
    ready: VecDeque<u64>,
    next: u64,
}

struct Ready(Arc<World>, u64);

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.0.lock().ready.push_back(self.1);
    }
}

/// The world as the disks and the volume see it.
struct Seen(Arc<World>);

impl World {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no task runs while the world is locked")
    }

    /// One task, or else one function of the timeline. False when nothing is left to do.
    fn step(self: &Arc<Self>) -> bool {
        let mut state = self.lock();
        if let Some(id) = state.ready.pop_front() {
            let Some(mut task) = state.tasks.remove(&id) else { return true };
            drop(state);
            let waker = Waker::from(Arc::new(Ready(self.clone(), id)));
            if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                self.lock().tasks.insert(id, task);
            }
            return true;
        }
        drop(state);
        self.timeline.step()
    }

    /// Runs `future` for at most `steps`; None when the power fails before it ends.
    fn run<F: Future>(self: &Arc<Self>, future: F, steps: u64) -> Option<F::Output> {
        let mut future = pin!(future);
        for _ in 0..steps {
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return Some(output);
            }
            assert!(self.step(), "the future waits for what never comes");
        }
        None
    }

    /// All tasks of a life end with it. They are dropped outside of the lock, for they may wake one another.
    fn end_life(&self) {
        let tasks = std::mem::take(&mut self.lock().tasks);
        drop(tasks);
        self.lock().ready.clear();
    }
}

impl SimScheduler for Seen {
    fn after(&self, delay: Duration, run: Box<dyn FnOnce() + Send>) {
        self.0.timeline.after(delay, run);
    }
}

impl Spawner for Seen {
    fn spawn(&self, _: &str, task: BoxFuture<()>) -> TaskHandle {
        let mut state = self.0.lock();
        state.next += 1;
        let id = state.next;
        state.tasks.insert(id, task);
        state.ready.push_back(id);
        Box::pin(std::future::pending())
    }
}

/// What was promised.
#[derive(Default)]
struct Promises {
    /// Records in the order in which they were queued, and where each one lies once that is known.
    records: Vec<(u64, Option<RecordPos>)>,
    next_record: u64,
    /// The last root that was acknowledged, and those that may have become durable since.
    root: u64,
    roots_tried: Vec<u64>,
    wal_start: Lsn,
}

#[derive(Clone)]
struct Life {
    media: SimMedia,
    environment: Environment,
    random: Arc<SimRandom>,
    promises: Arc<Mutex<Promises>>,
}

fn filled(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    SimRandom::new(seed).fill(&mut out);
    out
}

fn record_bytes(id: u64) -> Vec<u8> {
    let mut bytes = id.to_le_bytes().to_vec();
    bytes.extend(filled(id, (id * 977 % 6000) as usize));
    bytes
}

impl Life {
    fn promises(&self) -> MutexGuard<'_, Promises> {
        self.promises.lock().expect("no check fails while the promises are locked")
    }

    async fn live(self) -> Result<()> {
        let (volume, found) = Volume::open(self.media.open()?, &self.environment).await?;
        self.check_root(&volume, &found).await?;
        let epoch = volume.superblock().epoch;
        let closed = found.closed;
        let options = WalOptions { closed, ..WalOptions::new(found.volume, epoch, found.wal_start, found.clean_end) };
        let mut delivered = Vec::new();
        let mut deliver = |_, _, pos, payload: Bytes| {
            delivered.push((pos, payload));
            Ok(())
        };
        let (wal, _) = Wal::open(volume.wal_zone(), self.environment.clone(), options, &mut deliver).await?;
        self.check_records(&found, delivered);
        volume.set_live([])?;
        for _ in 0..60 {
            match self.random.below(10) {
                0 => self.new_root(&volume, &wal).await?,
                1..=7 => {
                    let queued = self.append(&wal);
                    if self.random.below(3) == 0 {
                        queued.await?;
                    }
                }
                _ => drop(volume.reserve(self.random.below(4 * EXTENT_UNIT_BYTES)).await?),
            }
        }
        let end = wal.close().await?;
        let ended = move |superblock: &mut super::Superblock| {
            superblock.clean_end = Some(end);
            superblock.closed = true;
        };
        volume.update(ended).await
    }

    fn append(&self, wal: &Wal) -> Op<()> {
        let (queued, completer) = Op::pending();
        let id = {
            let mut promises = self.promises();
            promises.next_record += 1;
            let id = promises.next_record;
            promises.records.push((id, None));
            id
        };
        let payload = vec![Bytes::from(record_bytes(id))];
        let record = Record { group: GroupId(1), kind: RecordKind(32), payload };
        let promises = self.promises.clone();
        let on_durable = Box::new(move |result: mainstay_wal::Result<RecordPos>| {
            let mut promises = promises.lock().expect("no check fails while the promises are locked");
            let index = promises.records.iter().position(|(other, _)| *other == id);
            let Some(index) = index else { return };
            match result {
                Ok(pos) => promises.records[index].1 = Some(pos),
                Err(error) if error.kind() == mainstay_wal::ErrorKind::OutOfSpace => {
                    promises.records.remove(index);
                }
                // The power failed: it may be there or not.
                Err(_) => {}
            }
            drop(promises);
            completer.complete(Ok(()));
        });
        wal.append(record, Reserve::Normal, on_durable);
        queued
    }

    /// Writes pages to new extents and names them in the superblock, with a new start of the log; as a purge does.
    async fn new_root(&self, volume: &Volume, wal: &Wal) -> Result<()> {
        let id = 1 + self.random.number() % (1 << 40);
        let bytes = (1 + self.random.below(3 * EXTENT_UNIT_BYTES / 4096)) * 4096;
        let pages = filled(id, bytes as usize);
        let mut reservation = volume.reserve(bytes).await?;
        let extents = reservation.take(bytes)?;
        volume.write(&extents, 0, vec![AlignedBuf::copy_from(&pages).freeze()]).await?;
        volume.flush().await?;
        let durable: Vec<RecordPos> = self.promises().records.iter().filter_map(|(_, pos)| *pos).collect();
        let start = match durable.len() as u64 {
            0 => wal.start(),
            count => durable[self.random.below(count) as usize].batch,
        };
        let start = start.max(wal.start());
        self.promises().roots_tried.push(id);
        volume
            .update(move |superblock| {
                superblock.root = Some(Root { extents, bytes, checksum: id });
                superblock.wal_start = start;
            })
            .await?;
        let mut promises = self.promises();
        promises.root = id;
        promises.roots_tried.clear();
        promises.wal_start = start;
        drop(promises);
        wal.release(start);
        Ok(())
    }

    async fn check_root(&self, volume: &Volume, found: &Superblock) -> Result<()> {
        let id = found.root.as_ref().map_or(0, |root| root.checksum);
        {
            let mut promises = self.promises();
            let (root, tried) = (promises.root, promises.roots_tried.clone());
            assert!(id == root || tried.contains(&id), "root {id}, promised {root}, tried {tried:?}");
            assert!(found.wal_start >= promises.wal_start, "the start of the log went back");
            promises.root = id;
            promises.roots_tried.clear();
            promises.wal_start = found.wal_start;
        }
        if let Some(root) = &found.root {
            let pages = volume.read(&root.extents, 0, root.bytes as usize, IoClass::Foreground).await?;
            assert_eq!(pages, filled(id, root.bytes as usize), "the pages of the root were overwritten");
        }
        Ok(())
    }

    fn check_records(&self, found: &Superblock, delivered: Vec<(RecordPos, Bytes)>) {
        let mut promises = self.promises();
        promises.records.retain(|(_, pos)| pos.is_none_or(|pos| pos.batch >= found.wal_start));
        let acknowledged = promises.records.iter().filter(|(_, pos)| pos.is_some()).count();
        assert!(delivered.len() >= acknowledged, "{} of {acknowledged} acknowledged records", delivered.len());
        promises.records.truncate(delivered.len());
        for ((id, known), (pos, payload)) in promises.records.iter_mut().zip(delivered) {
            assert_eq!(payload, record_bytes(*id));
            assert!(known.is_none_or(|known| known == pos));
            *known = Some(pos);
        }
    }
}

fn lives(seed: u64, layout: SimLayout) -> (u64, u64) {
    let world = Arc::new(World::default());
    let random = Arc::new(SimRandom::new(seed));
    let options = SimOptions {
        seed,
        capacity: 8 << 20,
        read_latency: Latency::micros(20, 200),
        write_latency: Latency::micros(20, 400),
        flush_latency: Latency::micros(20, 600),
        ..SimOptions::default()
    };
    let media = SimMedia::scheduled(layout, options, Arc::new(Seen(world.clone())), Arc::new(Seen(world.clone())));
    let environment = Environment {
        clock: Arc::new(SimClock::new(Duration::ZERO)),
        random: Arc::new(SimRandom::new(seed ^ 1)),
        spawner: Arc::new(Seen(world.clone())),
    };
    let opened = media.open().expect("nobody has it open");
    world
        .run(Volume::format(&*opened, &environment, RING_BYTES, false), u64::MAX)
        .expect("has all the steps it needs")
        .expect("formats");
    drop(opened);
    let promises = Arc::default();
    let life = Life { media: media.clone(), environment, random: random.clone(), promises };
    let (mut crashes, mut ends) = (0, 0);
    for _ in 0..15 {
        let steps = 1 + random.below(900);
        match world.run(life.clone().live(), steps) {
            Some(outcome) => {
                outcome.expect("a healthy disk gives no error");
                ends += 1;
            }
            None => crashes += 1,
        }
        if random.below(2) == 0 {
            media.crash(random.number())
        } else {
            media.kill(random.number())
        }
        world.end_life();
    }
    (crashes, ends)
}

#[test]
fn every_life_finds_what_the_lives_before_it_promised() {
    let mut total = (0, 0);
    for seed in 0..24 {
        for layout in [SimLayout::Directory, SimLayout::Device] {
            let (crashes, ends) = lives(seed, layout);
            total = (total.0 + crashes, total.1 + ends);
        }
    }
    assert!(total.0 > 100 && total.1 > 20, "crashed and ended: {total:?}");
}
