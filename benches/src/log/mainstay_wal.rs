//! Mainstay's log: writers are threads that block, or tasks that await; the log itself makes batches of what waits.

use std::path::Path;

use bytes::Bytes;
use mainstay_io::{Environment, MediaOptions, Target, block_on, create_media};
use mainstay_wal::{GroupId, Lsn, Record, RecordKind, Reserve, Wal, WalOptions};

use super::{Driver, Load, runtime};
use crate::work::{Outcome, drive_each, drive_tasks, timed};

/// The ring that a node has by default.
const WAL_BYTES: u64 = 256 << 20;

pub(super) fn drivers() -> Vec<Driver> {
    vec![Driver { log: "mainstay", way: "threads", run: threads }, Driver { log: "mainstay", way: "tasks", run: tasks }]
}

fn open(dir: &Path) -> Wal {
    let media = create_media(&Target::Directory(dir.into()), &MediaOptions::default()).expect("a directory opens");
    media.create_zones(WAL_BYTES).wait().expect("the ring can be made");
    let (zone, _) = media.zones(WAL_BYTES).expect("the ring is there");
    let options = WalOptions::new([1; 16], 1, Lsn(0), None);
    let mut nothing = |_, _, _, _| Ok(());
    block_on(Wal::open(zone, Environment::system(), options, &mut nothing)).expect("an empty log opens").0
}

fn payload(load: Load) -> Bytes {
    Bytes::from(vec![0xa5; load.bytes])
}

async fn commit(wal: &Wal, payload: &Bytes) {
    let record =
        Record { group: GroupId(1), kind: RecordKind(RecordKind::OWNER_FIRST), payload: vec![payload.clone()] };
    let pos = wal.append_wait(record, Reserve::Normal).await.expect("the disk works");
    // As an owner does that needs nothing of it any more: the ring is not full.
    wal.release(pos.batch);
}

fn threads(dir: &Path, load: Load) -> Outcome {
    let (wal, payload) = (open(dir), payload(load));
    let run = |time| drive_each(load.writers, time, |_| || block_on(commit(&wal, &payload)));
    run(load.warm_up);
    let outcome = run(load.time);
    block_on(wal.close()).expect("the log closes");
    outcome
}

fn tasks(dir: &Path, load: Load) -> Outcome {
    let (wal, payload, runtime) = (open(dir), payload(load), runtime());
    let run = |time| {
        drive_tasks(&runtime, load.writers, time, |_, stop| {
            let (wal, payload) = (wal.clone(), payload.clone());
            async move { timed!(stop, commit(&wal, &payload).await) }
        })
    };
    run(load.warm_up);
    let outcome = run(load.time);
    block_on(wal.close()).expect("the log closes");
    outcome
}
