//! The log on the backends of the machine, with writers on many threads.

#![allow(clippy::disallowed_methods, reason = "these tests are about threads; the deterministic ones are in src/tests")]

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use mainstay_io::{BackendChoice, Environment, Media, MediaOptions, Target, block_on, create_media};
use mainstay_wal::{ErrorKind, GroupId, Lsn, Record, RecordKind, RecordPos, Reserve, Wal, WalOptions};

const WAL_BYTES: u64 = 8 << 20;
const WRITERS: u64 = 16;
const RECORDS: u64 = 60;

type Found = Vec<(GroupId, RecordPos, Bytes)>;

fn media(directory: &Path, backend: BackendChoice) -> std::sync::Arc<dyn Media> {
    create_media(&Target::Directory(directory.to_path_buf()), &MediaOptions { backend }).expect("the directory is ours")
}

fn open(media: &dyn Media, epoch: u64, clean_end: Option<Lsn>) -> (Wal, Found) {
    let (zone, _) = media.zones(WAL_BYTES).expect("the zones were made");
    let mut found = Found::new();
    let options = WalOptions::new([5; 16], epoch, Lsn(0), clean_end);
    let mut deliver = |group, _, pos, payload| {
        found.push((group, pos, payload));
        Ok(())
    };
    let opened = block_on(Wal::open(zone, Environment::system(), options, &mut deliver));
    (opened.expect("the log opens").0, found)
}

fn payload(writer: u64, n: u64) -> Bytes {
    let mut bytes = n.to_le_bytes().to_vec();
    bytes.resize(8 + ((writer * 131 + n * 977) % 3000) as usize, writer as u8);
    bytes.into()
}

fn many_writers(backend: BackendChoice) {
    let directory = tempfile::tempdir().expect("a directory");
    let first = media(directory.path(), backend);
    first.create_zones(WAL_BYTES).wait().expect("the zones are made");
    let (wal, found) = open(&*first, 1, None);
    assert!(found.is_empty());
    let positions: BTreeMap<u64, Vec<RecordPos>> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let wal = wal.clone();
                let write = move |n| {
                    let record =
                        Record { group: GroupId(writer), kind: RecordKind(40), payload: vec![payload(writer, n)] };
                    block_on(wal.append_wait(record, Reserve::Normal)).expect("is durable")
                };
                (writer, scope.spawn(move || (0..RECORDS).map(write).collect()))
            })
            .collect();
        writers.into_iter().map(|(writer, thread)| (writer, thread.join().expect("no writer panics"))).collect()
    });
    for (&writer, positions) in &positions {
        assert!(positions.is_sorted());
        for (n, pos) in (0..).zip(positions).step_by(7) {
            assert_eq!(block_on(wal.read(*pos)).expect("reads back"), payload(writer, n));
        }
    }
    let stats = wal.stats();
    assert_eq!(stats.records, WRITERS * RECORDS);
    assert!(stats.batches <= stats.records);
    let end = block_on(wal.close()).expect("closes");
    let late = Record { group: GroupId(0), kind: RecordKind(40), payload: vec![] };
    assert_eq!(block_on(wal.append_wait(late, Reserve::Normal)).expect_err("closed").kind(), ErrorKind::Closed);
    drop((wal, first));

    let again = media(directory.path(), backend);
    let (wal, found) = open(&*again, 2, Some(end));
    assert_eq!(found.len() as u64, WRITERS * RECORDS);
    assert!(found.windows(2).all(|w| w[0].1 < w[1].1), "delivered in the order of the log");
    for writer in 0..WRITERS {
        let own: Vec<(RecordPos, Bytes)> =
            found.iter().filter(|(group, ..)| *group == GroupId(writer)).map(|(_, pos, b)| (*pos, b.clone())).collect();
        let expected: Vec<(RecordPos, Bytes)> =
            (0..RECORDS).map(|n| (positions[&writer][n as usize], payload(writer, n))).collect();
        assert_eq!(own, expected);
    }
    block_on(wal.close()).expect("closes");
}

#[test]
fn many_writers_on_the_best_backend_of_this_machine() {
    many_writers(BackendChoice::Auto);
}

#[test]
fn many_writers_on_threads() {
    many_writers(BackendChoice::Threads);
}
