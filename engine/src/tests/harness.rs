//! A store on simulated disks, opened and opened again.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::sim::{SimMedia, SimOptions};
use mainstay_io::{Environment, block_on};
use mainstay_wal::GroupId;

use crate::{
    Applied, BranchId, Command, CommandBody, Engine, EngineSettings, Group, GroupSettings, KeyRange, KeyspaceId,
    LocalLog, LogIndex, MAIN, OwnerRecord, Result, Snapshot, StateMachine, TableCompression, WriteBatch, WriteOp,
};

pub(super) const GROUP: GroupId = GroupId(7);
pub(super) const DEFAULT: KeyspaceId = KeyspaceId(0);
pub(super) const WAL_BYTES: u64 = 8 << 20;

/// Small bounds, so that a few writes reach every step.
pub(super) fn settings() -> GroupSettings {
    GroupSettings {
        memtable_bytes: 4 << 10,
        table_bytes: 16 << 10,
        base_level_bytes: 32 << 10,
        l0_compaction_runs: 3,
        compression: TableCompression::ByLevel,
        state_machine: None,
        merge_operators: crate::MergeOperators::default(),
    }
}

pub(super) fn engine_settings() -> EngineSettings {
    EngineSettings {
        memory_bytes: 32 << 20,
        background_tasks: 2,
        wal_in_flight_max: 3,
        scrub_bytes_per_second: 0,
        scrub_pause: crate::SCRUB_PAUSE,
        log_holes: false,
    }
}

pub(super) fn media() -> SimMedia {
    format(&SimMedia::new(SimOptions { capacity: 1 << 30, ..SimOptions::default() }), WAL_BYTES)
}

pub(super) fn format(media: &SimMedia, wal_bytes: u64) -> SimMedia {
    let opened = media.open().expect("nobody else holds it");
    block_on(Engine::format(opened, &Environment::system(), wal_bytes, false)).expect("a blank target is formatted");
    media.clone()
}

/// An engine and the owner's records that it found.
pub(super) fn engine(media: &SimMedia, settings: EngineSettings) -> Result<(Engine, Vec<OwnerRecord>)> {
    let mut found = Vec::new();
    let opened = media.open()?;
    let engine = block_on(Engine::open(opened, Environment::system(), settings, &mut |record| {
        found.push(record);
        Ok(())
    }))?;
    Ok((engine, found))
}

/// An open store.
pub(super) struct Store {
    pub(super) engine: Engine,
    pub(super) log: LocalLog,
    pub(super) replayed: usize,
}

impl Store {
    pub(super) fn open(media: &SimMedia) -> Self {
        Self::open_with(media, settings(), engine_settings()).expect("the volume opens")
    }

    pub(super) fn open_with(media: &SimMedia, group: GroupSettings, settings: EngineSettings) -> Result<Self> {
        let (engine, found) = engine(media, settings)?;
        let replayed = found.len();
        let log = block_on(LocalLog::open(&engine, GROUP, group, found))?;
        Ok(Self { engine, log, replayed })
    }

    pub(super) fn with_state_machine(media: &SimMedia, state_machine: Arc<dyn StateMachine>) -> Self {
        let group = GroupSettings { state_machine: Some(state_machine), ..settings() };
        Self::open_with(media, group, engine_settings()).expect("the volume opens")
    }

    pub(super) fn group(&self) -> &Group {
        self.log.group()
    }

    pub(super) fn propose(&self, body: CommandBody) -> Result<Applied> {
        block_on(self.log.propose(Command { time_ms: 1000, body }))
    }

    /// Proposes what must be taken.
    pub(super) fn must(&self, body: CommandBody) -> Applied {
        let applied = self.propose(body).expect("the log takes it");
        if let Err(error) = &applied.response {
            panic!("refused: {error}");
        }
        applied
    }

    pub(super) fn put(&self, key: &str, value: &[u8]) -> LogIndex {
        self.must(put(MAIN, key, value)).index
    }

    pub(super) fn get(&self, key: &str) -> Option<Bytes> {
        get(&self.group().snapshot(MAIN).expect("main is always there"), key)
    }

    /// Rotates and waits until all that was written is in tables.
    pub(super) fn flush(&self) {
        let applied = self.must(CommandBody::Rotate);
        block_on(self.group().flushed_beyond(LogIndex(applied.index.0 - 1)));
    }

    /// Waits until no job is outstanding.
    pub(super) fn settle(&self) {
        self.flush();
        block_on(self.group().shared().idle());
    }

    pub(super) fn close(self) {
        block_on(self.log.close()).expect("the log closes");
        block_on(self.engine.close()).expect("the engine closes");
    }
}

pub(super) fn put(branch: BranchId, key: &str, value: &[u8]) -> CommandBody {
    let op = WriteOp::Put {
        keyspace: DEFAULT,
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value),
    };
    CommandBody::Batch(WriteBatch { branch, ops: vec![op] })
}

pub(super) fn delete(branch: BranchId, key: &str) -> CommandBody {
    let op = WriteOp::Delete { keyspace: DEFAULT, key: Bytes::copy_from_slice(key.as_bytes()) };
    CommandBody::Batch(WriteBatch { branch, ops: vec![op] })
}

pub(super) fn compact(branch: BranchId, first: &str, end: Option<&str>) -> CommandBody {
    let (first, end) =
        (Bytes::copy_from_slice(first.as_bytes()), end.map(|end| Bytes::copy_from_slice(end.as_bytes())));
    CommandBody::Compact { branch, keyspace: DEFAULT, first, end }
}

/// Keys from `start` up to `end`, or to the last one.
pub(super) fn range(start: &str, end: Option<&str>) -> KeyRange {
    let key = |key: &str| Bytes::copy_from_slice(key.as_bytes());
    KeyRange::new(Bound::Included(key(start)), end.map_or(Bound::Unbounded, |end| Bound::Excluded(key(end))))
}

pub(super) fn delete_range(branch: BranchId, range: KeyRange) -> CommandBody {
    CommandBody::Batch(WriteBatch { branch, ops: vec![WriteOp::DeleteRange { keyspace: DEFAULT, range }] })
}

pub(super) fn get(snapshot: &Snapshot, key: &str) -> Option<Bytes> {
    block_on(snapshot.get(DEFAULT, key.as_bytes())).expect("the keyspace is always there")
}

/// All pairs of a keyspace, by a scan from the front.
pub(super) fn all(snapshot: &Snapshot, keyspace: KeyspaceId) -> BTreeMap<Vec<u8>, Vec<u8>> {
    block_on(async {
        let mut scan = snapshot.range(keyspace, Bound::Unbounded, Bound::Unbounded);
        let mut pairs = BTreeMap::new();
        while let Some((key, value)) = scan.next().await.expect("the scan goes on") {
            assert!(pairs.insert(key.to_vec(), value.to_vec()).is_none(), "a key comes once");
        }
        pairs
    })
}

/// The same from the back.
pub(super) fn all_back(snapshot: &Snapshot, keyspace: KeyspaceId) -> BTreeMap<Vec<u8>, Vec<u8>> {
    block_on(async {
        let mut scan = snapshot.range(keyspace, Bound::Unbounded, Bound::Unbounded);
        let mut pairs = BTreeMap::new();
        while let Some((key, value)) = scan.next_back().await.expect("the scan goes on") {
            assert!(pairs.insert(key.to_vec(), value.to_vec()).is_none(), "a key comes once");
        }
        pairs
    })
}

/// Compares what the volume holds in use with what the manifests name: nothing leaks, nothing is named twice.
pub(super) fn check_no_leak(media: &SimMedia) {
    let (engine, found) = engine(media, engine_settings()).expect("the volume opens");
    let log = block_on(LocalLog::open(&engine, GROUP, settings(), found)).expect("the log opens");
    block_on(log.group().shared().idle());
    block_on(log.close()).expect("the log closes");
    block_on(engine.close()).expect("the engine closes");
    // No task is left that could still hold or free anything.
    let shared = engine.shared_ref();
    let named: u64 = log.group().shared().named_extent_bytes() + shared.root_bytes();
    assert_eq!(shared.volume.space().live_bytes, named, "bytes in use and bytes named");
    drop((log, engine));
    media.kill(0);
}
