//! raft-engine, every write synced. Its `write` blocks the caller, and callers that meet there share one sync.
//!
//! Two ways to drive it. `threads`: each writer is a thread with a group of its own that calls `write`. `merger`: writers are
//! tasks that hand their entry to one thread, which makes one batch of all that waits, as a store with many groups does; it
//! is the faster of the two as a rule. Each once as it is by default and, the merger, with its files written beforehand.

use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use protobuf::well_known_types::BytesValue;
use raft_engine::{Config, Engine, LogBatch, MessageExt, ReadableSize};
use tokio::sync::oneshot;

use super::{Driver, Load, runtime};
use crate::work::{Outcome, drive_each, drive_tasks, timed};

/// What is written beforehand: more than a run of some seconds fills.
const PREFILL_MIB: u64 = 1024;

pub(super) fn drivers() -> Vec<Driver> {
    vec![
        Driver { log: "raft-engine", way: "threads", run: threads },
        Driver { log: "raft-engine", way: "merger", run: |dir, load| merger(dir, load, false) },
        Driver { log: "raft-engine", way: "merger, prefilled", run: |dir, load| merger(dir, load, true) },
    ]
}

/// An entry: its index and filler, together as long as a commit.
#[derive(Clone)]
struct Entry;

impl MessageExt for Entry {
    type Entry = BytesValue;

    fn index(entry: &BytesValue) -> u64 {
        entry.value.first_chunk().map_or(0, |index| u64::from_le_bytes(*index))
    }
}

fn entry(index: u64, bytes: usize) -> BytesValue {
    let mut value = vec![0xa5; bytes.max(8)];
    value[..8].copy_from_slice(&index.to_le_bytes());
    BytesValue { value, ..BytesValue::default() }
}

fn open(dir: &Path, prefill: bool) -> Engine {
    let config = Config {
        dir: dir.to_str().expect("a path in UTF-8").into(),
        prefill_for_recycle: prefill,
        prefill_limit: prefill.then(|| ReadableSize::mb(PREFILL_MIB)),
        ..Config::default()
    };
    Engine::open(config).expect("raft-engine opens")
}

fn threads(dir: &Path, load: Load) -> Outcome {
    let engine = open(dir, false);
    let engine = &engine;
    let run = |time| {
        drive_each(load.writers, time, |writer| {
            let group = writer as u64 + 1;
            let mut index = engine.last_index(group).unwrap_or(0);
            move || {
                index += 1;
                let mut batch = LogBatch::default();
                batch.add_entries::<Entry>(group, &[entry(index, load.bytes)]).expect("an entry in order");
                engine.write(&mut batch, true).expect("the disk works");
            }
        })
    };
    run(load.warm_up);
    run(load.time)
}

fn merger(dir: &Path, load: Load, prefill: bool) -> Outcome {
    let (engine, runtime) = (open(dir, prefill), runtime());
    // Each writer has one commit under way, so this bound is never met.
    let (inbox, waiting) = sync_channel::<oneshot::Sender<()>>(load.writers);
    let merger = std::thread::spawn(move || {
        let mut index = 0;
        while let Ok(first) = waiting.recv() {
            let callers: Vec<_> = std::iter::once(first).chain(waiting.try_iter()).collect();
            let entries: Vec<_> = callers
                .iter()
                .map(|_| {
                    index += 1;
                    entry(index, load.bytes)
                })
                .collect();
            let mut batch = LogBatch::default();
            batch.add_entries::<Entry>(1, &entries).expect("entries in order");
            engine.write(&mut batch, true).expect("the disk works");
            for caller in callers {
                caller.send(()).expect("a writer waits for its answer");
            }
        }
    });
    let run = |time| {
        drive_tasks(&runtime, load.writers, time, |_, stop| {
            let inbox: SyncSender<_> = inbox.clone();
            async move {
                timed!(stop, {
                    let (done, answer) = oneshot::channel();
                    inbox.try_send(done).expect("there is a place for each writer");
                    answer.await.expect("the merger answers");
                })
            }
        })
    };
    run(load.warm_up);
    let outcome = run(load.time);
    drop(inbox);
    merger.join().expect("the merger does not panic");
    outcome
}
