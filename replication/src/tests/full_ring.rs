//! What a ring has to take when it is full of entries, and what it does not.

use bytes::Bytes;
use mainstay_engine::{Engine, EngineSettings, LogIndex, OwnerPin};
use mainstay_io::sim::SimMedia;
use mainstay_wal::{ErrorKind as WalErrorKind, GroupId, Record, Reserve};
use openraft::storage::RaftLogStorage;

use super::cluster::{format_volume, media};
use super::log::{
    append, cut_at, entries, ids, members, membership, normal, queue, read_vote, run, save_vote, truncate,
};
use super::{GROUP, environment};
use crate::ErrorKind;
use crate::log_store::LogStore;
use crate::record;
use crate::types::{Entry, EntryPayload, SnapshotMeta, StoredMembership, Vote, log_id};

const RING_BYTES: u64 = 1 << 20;
/// An eighth of the ring is kept from entries.
const KEPT_BLOCKS: u64 = RING_BYTES / 8 / 4096;
const CACHE_BYTES: u64 = 1 << 20;

/// The log of a group on a volume that loses power and is opened again.
struct Volume {
    media: SimMedia,
    engine: Engine,
    store: LogStore,
}

impl Volume {
    async fn new() -> Self {
        let media = media(1);
        format_volume(&media, RING_BYTES).await;
        Self::open(media).await
    }

    async fn open(media: SimMedia) -> Self {
        let settings = EngineSettings {
            memory_bytes: 16 << 20,
            background_tasks: 1,
            wal_in_flight_max: 3,
            scrub_bytes_per_second: 0,
            scrub_pause: mainstay_engine::SCRUB_PAUSE,
            log_holes: true,
        };
        let mut found = Vec::new();
        let opened = media.open().expect("nobody else has it open");
        let engine = Engine::open(opened, environment(), settings, &mut |record| {
            found.push(record);
            Ok(())
        })
        .await
        .expect("opens");
        let (wal, notes) = (engine.wal().clone(), Some(engine.owner_notes()));
        let store =
            LogStore::open(wal, notes, GROUP, found, CACHE_BYTES, Some(LogIndex(0))).expect("the raft log opens");
        Self { media, engine, store }
    }

    async fn crash(self, seed: u64) -> Self {
        let Self { media, engine, store } = self;
        media.crash(seed);
        drop((engine, store));
        Self::open(media).await
    }

    fn used(&self) -> u64 {
        self.engine.wal().stats().used_bytes
    }

    fn records(&self) -> u64 {
        self.engine.wal().stats().records
    }

    /// Entries until the ring takes no more; what waits behind them is not acknowledged. Returns the last that is durable.
    async fn fill(&mut self) -> u64 {
        append(&mut self.store, vec![membership(1, 0, &[1, 2, 3])]).await;
        let mut index = 0;
        while !self.store.is_stalled() {
            index += 1;
            // Refused at once or durable at once: one is in flight at a time.
            let told = queue(&mut self.store, vec![normal(1, index, 3000)]).await;
            while self.store.pos(index).is_none() && !self.store.is_stalled() {
                tokio::task::yield_now().await;
            }
            drop(told);
        }
        index - 1
    }

    /// The ring has taken or refused all that was queued.
    async fn settle(&self) {
        while !self.store.is_settled() {
            tokio::task::yield_now().await;
        }
    }

    /// Takes all of the ring but so many blocks.
    async fn take_all_but(&self, blocks: u64) {
        loop {
            let stats = self.engine.wal().stats();
            if stats.ring_bytes - stats.used_bytes <= blocks * 4096 {
                return;
            }
            let record = Record { group: GROUP, kind: record::SEAL, payload: record::encode_seal() };
            self.engine.wal().append_wait(record, Reserve::Critical).await.expect("there is room");
        }
    }

    /// Everything up to `index` is in tables, as far as the log knows.
    async fn cut(&mut self, index: u64) {
        self.store.purge_to(log_id(1, index)).expect("open");
        let pinned = cut_at(&self.store, self.engine.wal(), LogIndex(index)).await;
        self.engine.wal().release(pinned.batch);
    }
}

/// Leaders change again and again while nothing can be cut: as many votes as would fill the ring many times over. Each is durable when it is
/// answered, and the last of them is found; with room they are records again, and the volume is of the version that every build reads.
#[test]
fn votes_for_which_a_full_ring_has_no_room_are_notes_of_the_volume() {
    run(async {
        let mut volume = Volume::new().await;
        volume.fill().await;
        for term in 2..3 * KEPT_BLOCKS {
            save_vote(&mut volume.store, Vote::new(term, term % 3 + 1)).await;
            save_vote(&mut volume.store, Vote::new_committed(term, term % 3 + 1)).await;
        }
        let last = Vote::new_committed(3 * KEPT_BLOCKS - 1, (3 * KEPT_BLOCKS - 1) % 3 + 1);
        assert!(
            volume.used() <= RING_BYTES - KEPT_BLOCKS / 2 * 4096,
            "half of what is kept is left: {}",
            volume.used()
        );
        assert!(volume.store.holds(&last, log_id(1, 3)), "it is durable");
        for seed in 1..4 {
            volume = volume.crash(seed).await;
            assert_eq!(read_vote(&mut volume.store).await, Some(last));
            assert!(volume.store.damage().is_none() && volume.store.failure().is_none());
        }
        let durable = entries(&mut volume.store).await.last().expect("many").log_id.index;
        volume.cut(durable).await;
        assert!(volume.used() < RING_BYTES / 2);
        save_vote(&mut volume.store, Vote::new(9999, 2)).await;
        assert!(volume.engine.owner_notes().get(GROUP).is_some(), "it goes with the next superblock");
        volume.engine.set_identity(mainstay_engine::Identity { cluster: [7; 16], node: 1 }).await.expect("written");
        assert_eq!(volume.engine.owner_notes().get(GROUP), None);
        let mut volume = volume.crash(9).await;
        assert_eq!(read_vote(&mut volume.store).await, Some(Vote::new(9999, 2)));
    });
}

/// A note is not asked for while the ring has room, nor is a record copied for which there is a note.
#[test]
fn a_note_takes_the_place_of_a_record_until_there_is_room_again() {
    run(async {
        let mut volume = Volume::new().await;
        save_vote(&mut volume.store, Vote::new(2, 1)).await;
        assert_eq!(volume.engine.owner_notes().get(GROUP), None);
        let last = volume.fill().await;
        volume.take_all_but(KEPT_BLOCKS / 4).await;
        // The vote lies before the entries, and the ring is cut up to them.
        let before = volume.records();
        let floor = volume.engine.wal().durable();
        let needed = volume.store.carry(floor).await.expect("open").expect("entries");
        assert_eq!(volume.records(), before);
        assert_eq!(Some(needed), volume.store.pos(0));
        let note = volume.engine.owner_notes().get(GROUP).expect("written");
        assert_eq!(record::decode_vote_note(&note).expect("ours"), Vote::new(2, 1));
        volume.cut(last).await;
        volume.store.carry(volume.engine.wal().durable()).await.expect("open");
        assert!(volume.records() > before, "with room it is a record again");
        let mut volume = volume.crash(1).await;
        assert_eq!(read_vote(&mut volume.store).await, Some(Vote::new(2, 1)));
    });
}

/// Each leader has what is not in its log truncated, entries that the ring never took.
#[test]
fn what_the_ring_never_took_is_truncated_without_a_record() {
    run(async {
        let mut volume = Volume::new().await;
        let last = volume.fill().await;
        let before = volume.records();
        for term in 2..2 * KEPT_BLOCKS {
            truncate(&mut volume.store, log_id(1, last)).await;
            assert_eq!(volume.store.last(), Some(log_id(1, last)));
            drop(queue(&mut volume.store, vec![normal(term, last + 1, 3000), normal(term, last + 2, 10)]).await);
            volume.settle().await;
            assert!(volume.store.is_stalled());
        }
        assert_eq!(volume.records(), before);
        let mut volume = volume.crash(1).await;
        assert_eq!(volume.store.last(), Some(log_id(1, last)));
        assert_eq!(ids(&mut volume.store).await.len() as u64, last + 1);
    });
}

/// The first entry of a leader finds room though the one before it does not. Both are truncated, and what the next leader has in the place of
/// the one before it is in tables at once: what is left of the other must not be taken for what comes behind that.
#[test]
fn what_the_ring_took_behind_a_refused_entry_does_not_come_back() {
    run(async {
        let mut volume = Volume::new().await;
        let last = volume.fill().await;
        let blank = Entry { log_id: log_id(3, last + 2), payload: EntryPayload::Blank };
        truncate(&mut volume.store, log_id(1, last)).await;
        drop(queue(&mut volume.store, vec![normal(3, last + 1, 3000), blank]).await);
        volume.settle().await;
        let taken = volume.records();
        truncate(&mut volume.store, log_id(1, last)).await;
        assert_eq!(volume.records(), taken + 1, "that it is gone");
        drop(queue(&mut volume.store, vec![normal(2, last + 1, 3000)]).await);
        volume.settle().await;
        volume.store.purge_to(log_id(2, last + 1)).expect("open");
        let start = cut_at(&volume.store, volume.engine.wal(), LogIndex(last + 1)).await.batch;
        assert!(start > volume.engine.wal().start());
        let mut volume = volume.crash(1).await;
        assert_eq!(ids(&mut volume.store).await, []);
        assert_eq!(volume.store.last(), Some(log_id(2, last + 1)));
    });
}

/// Not even the record of a truncation finds room. What comes behind it waits, since a restart would take it for what follows the entries that
/// are gone; then it is written in order.
#[test]
fn a_truncation_without_room_holds_up_what_comes_behind_it() {
    run(async {
        enum Then {
            Waits,
            IsCut,
            IsPurged,
        }
        for then in [Then::Waits, Then::IsCut, Then::IsPurged] {
            let mut volume = Volume::new().await;
            let last = volume.fill().await;
            volume.take_all_but(KEPT_BLOCKS / 4).await;
            truncate(&mut volume.store, log_id(1, last - 1)).await;
            assert!(volume.store.is_stalled() && volume.store.failure().is_none());
            let told = queue(&mut volume.store, vec![normal(2, last, 10), normal(2, last + 1, 10)]).await;
            // Another leader, that knows less.
            truncate(&mut volume.store, log_id(1, last - 2)).await;
            drop(told);
            let told = queue(&mut volume.store, vec![normal(3, last - 1, 10)]).await;
            assert_eq!(volume.store.pos(last - 1), None);
            match then {
                Then::Waits => {}
                Then::IsCut => {
                    volume.cut(last - 4).await;
                    volume.store.resume();
                    told.await.expect("told").expect("durable");
                }
                // Applied from memory, and in tables.
                Then::IsPurged => volume.store.purge_to(log_id(3, last - 1)).expect("open"),
            }
            save_vote(&mut volume.store, Vote::new(4, 1)).await;
            let mut volume = volume.crash(1).await;
            let found = ids(&mut volume.store).await;
            let expect = match then {
                Then::Waits => Some(log_id(1, last)),
                Then::IsCut => Some(log_id(3, last - 1)),
                Then::IsPurged => None,
            };
            assert_eq!(found.last().copied(), expect);
            let terms: Vec<u64> = found.iter().map(crate::types::term_of).collect();
            assert!(terms.is_sorted(), "{terms:?}");
        }
    });
}

/// A follower that is to be sent tables and cannot get them asks five times a second.
#[test]
fn installs_that_come_to_nothing_leave_room_for_what_cuts_the_ring() {
    run(async {
        let mut volume = Volume::new().await;
        let last = volume.fill().await;
        let stored = StoredMembership::new(Some(log_id(1, 0)), members(&[1, 2, 3]));
        let meta = |index| SnapshotMeta { last_log_id: Some(log_id(2, index)), last_membership: stored.clone() };
        let before = volume.records();
        for _ in 0..100 {
            assert!(volume.store.begin_install(&meta(last + 10), LogIndex(0)).await.expect("open"));
        }
        assert_eq!(volume.records(), before + 1, "one name, one record");
        let mut begun = 0;
        for index in 0..KEPT_BLOCKS {
            begun += u64::from(volume.store.begin_install(&meta(last + 20 + index), LogIndex(0)).await.expect("open"));
        }
        assert!((1..KEPT_BLOCKS).contains(&begun), "{begun}");
        assert!(volume.used() <= RING_BYTES - KEPT_BLOCKS / 4 * 4096);
        assert!(volume.store.failure().is_none());
        // What was refused keeps nothing from being cut.
        volume.cut(last).await;
        assert!(volume.used() < RING_BYTES / 2);
        assert!(volume.store.begin_install(&meta(last + 99), LogIndex(last)).await.expect("open"));
    });
}

/// An idle group has nothing but a vote and the name of its tables. While another one keeps the ring from being cut these stay where they
/// are, however often that is tried.
#[test]
fn a_ring_that_cannot_be_cut_is_not_filled_with_copies() {
    run(async {
        let mut volume = Volume::new().await;
        let (wal, notes) = (volume.engine.wal().clone(), Some(volume.engine.owner_notes()));
        let other = GroupId(2);
        let mut idle = LogStore::open(wal, notes, other, Vec::new(), CACHE_BYTES, Some(LogIndex(0))).expect("opens");
        append(&mut idle, vec![membership(1, 0, &[1, 2, 3]), normal(1, 1, 10)]).await;
        save_vote(&mut idle, Vote::new_committed(1, 1)).await;
        idle.purge_to(log_id(1, 1)).expect("open");
        volume.fill().await;
        let before = volume.records();
        for _ in 0..100 {
            let floor = volume.store.pin(LogIndex(0)).await.expect("entries").batch;
            assert_eq!(idle.pin(LogIndex(1)).await, None, "nothing of it has to stay where it is");
            let needed = idle.carry(floor).await.expect("open").expect("a vote and a name");
            assert!(needed.batch >= floor);
        }
        assert!(volume.records() <= before + 2, "each is copied once: {} of {before}", volume.records());
    });
}

#[test]
fn a_vote_that_is_noted_is_read_again_and_other_bytes_are_refused() {
    for (term, node) in [(0, 0), (1, 2), (127, 128), (u64::MAX, u64::MAX), (1 << 35, 64 + (1 << 40))] {
        for vote in [Vote::new(term, node), Vote::new_committed(term, node)] {
            let note = record::encode_vote_note(&vote);
            assert_eq!(record::decode_vote_note(&note).expect("ours"), vote);
            for cut in 0..note.len() {
                assert_eq!(record::decode_vote_note(&note.slice(..cut)).expect_err("short").kind(), ErrorKind::Corrupt);
            }
            let long: Bytes = [&note[..], &[0]].concat().into();
            assert_eq!(record::decode_vote_note(&long).expect_err("long").kind(), ErrorKind::Corrupt);
        }
    }
    let refused = |bytes: &'static [u8]| record::decode_vote_note(&Bytes::from_static(bytes)).expect_err("bad").kind();
    assert_eq!(refused(&[2, 1, 1]), ErrorKind::Foreign);
    assert_eq!(refused(&[1, 0x80]), ErrorKind::Corrupt);
    assert_eq!(refused(&[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 1]), ErrorKind::Corrupt);
    // All groups of a process at once: 129 notes of these, with two bytes each that say whose they are.
    assert!(record::encode_vote_note(&Vote::new(1 << 34, 1 << 34)).len() <= 11);
}

/// The bound that the volume has for notes is told, and the vote goes where there is room for it.
#[test]
fn a_vote_that_the_volume_has_no_room_for_takes_what_the_ring_keeps() {
    run(async {
        let mut volume = Volume::new().await;
        volume.fill().await;
        let notes = volume.engine.owner_notes();
        for group in 100..300 {
            if notes.put(GroupId(group), Bytes::from_static(&[7; 32])).await.is_err() {
                break;
            }
        }
        volume.take_all_but(KEPT_BLOCKS / 4).await;
        let vote = Vote::new(u64::MAX - 1, u64::MAX);
        save_vote(&mut volume.store, vote).await;
        let full = volume
            .engine
            .wal()
            .append_wait(Record { group: GROUP, kind: record::SEAL, payload: record::encode_seal() }, Reserve::Vote);
        assert_eq!(full.await.expect_err("no room").kind(), WalErrorKind::OutOfSpace);
        let saved =
            RaftLogStorage::<crate::types::TypeConfig<crate::TokioRuntime>>::save_vote(&mut volume.store, &vote);
        saved.await.expect("durable");
        let mut volume = volume.crash(1).await;
        assert_eq!(read_vote(&mut volume.store).await, Some(vote));
    });
}
