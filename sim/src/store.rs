//! A store of one node in the simulation: how it is opened, its commands, and the model that they change.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{
    Command, CommandBody, CompactionStyle, Condition, ConditionalBatch, Engine, EngineSettings, Group as EngineGroup,
    GroupSettings, KeyRange, KeyspaceId, KeyspaceOptions, LocalLog, LogIndex, TableCompression, WriteBatch, WriteOp,
};
use mainstay_io::Media;
use mainstay_wal::GroupId;
use openraft_rt::AsyncRuntime;
use tokio::sync::oneshot;

use crate::rt::{Executor, Group, SimRng, SimRuntime, WallClock, environment};
use crate::value::{decode, encode};
use crate::world::Settings;

/// Virtual time after which what has no answer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Keys of a keyspace by their value.
pub(crate) type Keys = BTreeMap<Bytes, u64>;
/// Keyspaces of a branch or a checkpoint by their id.
pub(crate) type State = BTreeMap<u32, Keys>;

/// Options by chance; in one of three the keyspace is tiered.
pub(crate) fn options(rng: &mut SimRng) -> KeyspaceOptions {
    let compressions = [TableCompression::None, TableCompression::Lz4, TableCompression::ByLevel];
    let options = KeyspaceOptions::new().compression(*rng.pick(&compressions));
    match rng.below(3) {
        0 => options,
        1 => options.block_bytes(rng.range(1 << 10, 8 << 10) as u32),
        _ => options.compaction(CompactionStyle::Tiered { runs: rng.range(2, 8) as u8 }),
    }
}

/// What the store should hold.
#[derive(Clone, Default)]
pub(crate) struct Model {
    /// Keyspaces by name.
    pub(crate) keyspaces: BTreeMap<String, u32>,
    pub(crate) branches: BTreeMap<String, State>,
    pub(crate) checkpoints: BTreeMap<String, State>,
}

/// A change of the model, as one command makes it.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Batch {
        branch: String,
        ops: Vec<(u32, Bytes, Option<u64>)>,
    },
    /// Writes `value` if the key holds `expect`.
    Conditional {
        branch: String,
        keyspace: u32,
        key: Bytes,
        expect: Option<u64>,
        value: u64,
    },
    RemoveRange {
        branch: String,
        keyspace: u32,
        range: KeyRange,
    },
    CreateKeyspace(String),
    DropKeyspace(String),
    Rotate,
    Compact(String),
    /// Of the default keyspace.
    SetOptions(KeyspaceOptions),
    CreateCheckpoint {
        name: String,
        branch: String,
    },
    DropCheckpoint(String),
    CreateClone {
        name: String,
        checkpoint: String,
    },
    DropClone(String),
}

impl Model {
    /// A store that was just made.
    pub(crate) fn new() -> Self {
        Self { branches: [("main".to_owned(), State::new())].into(), ..Self::default() }
    }

    /// True if the command of the change is refused, since its condition does not hold.
    pub(crate) fn refuses(&self, change: &Change) -> bool {
        match change {
            Change::Conditional { branch, keyspace, key, expect, .. } => {
                let keys = self.branches.get(branch).and_then(|state| state.get(keyspace));
                keys.and_then(|keys| keys.get(key)) != expect.as_ref()
            }
            _ => false,
        }
    }

    /// Makes the model follow a command that was not refused. `id` finds the keyspaces that were made.
    pub(crate) fn change(&mut self, change: Change, id: impl Fn(&str) -> Option<KeyspaceId>) -> Result<(), String> {
        match change {
            Change::Batch { branch, ops } => {
                let state = self.branches.get_mut(&branch).ok_or("no such branch in the model")?;
                for (keyspace, key, value) in ops {
                    let keys = state.entry(keyspace).or_default();
                    match value {
                        Some(value) => keys.insert(key, value),
                        None => keys.remove(&key),
                    };
                }
            }
            Change::Conditional { branch, keyspace, key, value, .. } => {
                let state = self.branches.get_mut(&branch).ok_or("no such branch in the model")?;
                state.entry(keyspace).or_default().insert(key, value);
            }
            Change::RemoveRange { branch, keyspace, range } => {
                let state = self.branches.get_mut(&branch).ok_or("no such branch in the model")?;
                state.entry(keyspace).or_default().retain(|key, _| !range.contains(key));
            }
            Change::CreateKeyspace(name) => {
                let id = id(&name).ok_or(format!("the keyspace {name} is not there"))?;
                self.keyspaces.insert(name, id.0);
            }
            Change::DropKeyspace(name) => {
                let id = self.keyspaces.remove(&name).unwrap_or_default();
                for state in self.branches.values_mut() {
                    state.remove(&id);
                }
            }
            Change::Rotate | Change::Compact(_) | Change::SetOptions(_) => {}
            Change::CreateCheckpoint { name, branch } => {
                let state = self.branches.get(&branch).cloned().unwrap_or_default();
                self.checkpoints.insert(name, state);
            }
            Change::DropCheckpoint(name) => drop(self.checkpoints.remove(&name)),
            Change::CreateClone { name, checkpoint } => {
                let mut state = self.checkpoints.get(&checkpoint).cloned().unwrap_or_default();
                // A keyspace that was dropped since is not in the clone.
                let live: BTreeSet<u32> = self.keyspaces.values().copied().chain([0]).collect();
                state.retain(|id, _| live.contains(id));
                self.branches.insert(name, state);
            }
            Change::DropClone(name) => drop(self.branches.remove(&name)),
        }
        Ok(())
    }

    /// Compares everything that the group holds with the model; returns the pairs that it found.
    pub(crate) async fn compare(self, group: EngineGroup) -> Result<u64, String> {
        let made = group.keyspaces().into_iter().filter(|(_, id)| id.0 != 0);
        let names: BTreeMap<String, u32> = made.map(|(name, id)| (name, id.0)).collect();
        if names != self.keyspaces {
            return Err(format!("keyspaces are {names:?} and not {:?}", self.keyspaces));
        }
        let names: BTreeSet<String> = group.branches().into_iter().map(|b| b.name).collect();
        if names != self.branches.keys().cloned().collect() {
            return Err(format!("branches are {names:?} and not {:?}", self.branches.keys()));
        }
        let names: BTreeSet<String> = group.checkpoints().into_iter().map(|c| c.name).collect();
        if names != self.checkpoints.keys().cloned().collect() {
            return Err(format!("checkpoints are {names:?} and not {:?}", self.checkpoints.keys()));
        }
        let mut places = Vec::new();
        for (name, state) in &self.branches {
            let id = group.branch(name).ok_or("a branch vanished")?;
            places.push((name, group.snapshot(id).map_err(|e| format!("{name}: {e}"))?, state));
        }
        for (name, state) in &self.checkpoints {
            places.push((name, group.checkpoint(name).map_err(|e| format!("{name}: {e}"))?, state));
        }
        let mut compared = 0;
        for (name, view, state) in places {
            for keyspace in state.keys().copied().chain([0]) {
                let expect = state.get(&keyspace).cloned().unwrap_or_default();
                let mut scan = view.range(KeyspaceId(keyspace), Bound::Unbounded, Bound::Unbounded);
                let mut found = Keys::new();
                while let Some((key, value)) = scan.next().await.map_err(|e| format!("{name}: {e}"))? {
                    found.insert(key, decode(&value).map_err(|e| format!("{name}: {e}"))?);
                }
                compared += found.len() as u64;
                if found != expect {
                    let lost: Vec<_> = expect.iter().filter(|(k, v)| found.get(*k) != Some(v)).take(3).collect();
                    let extra: Vec<_> = found.iter().filter(|(k, v)| expect.get(*k) != Some(v)).take(3).collect();
                    return Err(format!("{name} keyspace {keyspace}: lost {lost:?}, found instead {extra:?}"));
                }
            }
        }
        Ok(compared)
    }
}

impl Change {
    /// The command that makes the change in `group`.
    pub(crate) fn command(&self, group: &EngineGroup) -> Command {
        let branch = |name: &str| group.branch(name).unwrap_or_default();
        let body = match self.clone() {
            Change::Batch { branch: name, ops } => CommandBody::Batch(WriteBatch {
                branch: branch(&name),
                ops: ops
                    .into_iter()
                    .map(|(keyspace, key, value)| match value {
                        Some(value) => WriteOp::Put { keyspace: KeyspaceId(keyspace), key, value: encode(value) },
                        None => WriteOp::Delete { keyspace: KeyspaceId(keyspace), key },
                    })
                    .collect(),
            }),
            Change::Conditional { branch: name, keyspace, key, expect, value } => {
                let keyspace = KeyspaceId(keyspace);
                let condition = match expect {
                    Some(value) => Condition::Value { keyspace, key: key.clone(), value: encode(value) },
                    None => Condition::Absent { keyspace, key: key.clone() },
                };
                let ops = vec![WriteOp::Put { keyspace, key, value: encode(value) }];
                let batch = WriteBatch { branch: branch(&name), ops };
                CommandBody::BatchIf(ConditionalBatch { conditions: vec![condition], batch })
            }
            Change::RemoveRange { branch: name, keyspace, range } => CommandBody::Batch(WriteBatch {
                branch: branch(&name),
                ops: vec![WriteOp::DeleteRange { keyspace: KeyspaceId(keyspace), range }],
            }),
            Change::CreateKeyspace(name) => CommandBody::CreateKeyspace { name },
            Change::DropKeyspace(name) => CommandBody::DropKeyspace { name },
            Change::Rotate => CommandBody::Rotate,
            Change::Compact(from) => {
                let keyspace = KeyspaceId(0);
                CommandBody::Compact { branch: branch(&from), keyspace, first: Bytes::new(), end: None }
            }
            Change::SetOptions(options) => CommandBody::SetOptions { name: "default".to_owned(), options },
            Change::CreateCheckpoint { name, branch: from } => {
                CommandBody::CreateCheckpoint { name, branch: branch(&from) }
            }
            Change::DropCheckpoint(name) => CommandBody::DropCheckpoint { name },
            Change::CreateClone { name, checkpoint } => CommandBody::CreateClone { name, checkpoint },
            Change::DropClone(name) => CommandBody::DropClone { name },
        };
        Command { time_ms: 1, body }
    }
}

/// A store that was just opened.
pub(crate) struct Opened {
    pub(crate) engine: Engine,
    pub(crate) log: LocalLog,
    /// The last entry of the log that was found.
    pub(crate) applied: LogIndex,
    /// Bytes of the extents in use before any job ran.
    pub(crate) extent_bytes: u64,
}

/// Opens the store for the life `number`, whose tasks are those of the group of that number; the first makes the volume.
pub(crate) async fn open(
    executor: &Arc<Executor>,
    media: Arc<dyn Media>,
    settings: &Settings,
    number: u64,
    format: bool,
) -> Result<Opened, String> {
    let group = Group(number);
    let environment = environment(executor, group, WallClock::ahead(Duration::ZERO));
    let group_settings = GroupSettings {
        memtable_bytes: settings.memtable_bytes,
        table_bytes: settings.table_bytes,
        base_level_bytes: settings.base_level_bytes,
        l0_compaction_runs: settings.l0_compaction_runs,
        compression: mainstay_engine::TableCompression::ByLevel,
        state_machine: None,
        merge_operators: Default::default(),
    };
    let engine_settings = EngineSettings {
        memory_bytes: settings.memory_bytes,
        background_tasks: 1,
        wal_in_flight_max: settings.wal_in_flight_max,
        scrub_bytes_per_second: 64 << 20,
        scrub_pause: mainstay_engine::SCRUB_PAUSE,
        log_holes: false,
    };
    let wal_bytes = settings.wal_bytes;
    let opening = async move {
        if format {
            let format = Engine::format(media.clone(), &environment, wal_bytes, true).await;
            format.map_err(|e| format!("format: {e}"))?;
        }
        let mut found = Vec::new();
        let mut deliver = |record| {
            found.push(record);
            Ok(())
        };
        let engine = Engine::open(media, environment, engine_settings, &mut deliver).await;
        let engine = engine.map_err(|e| format!("open: {:?}: {e}", e.kind()))?;
        let extent_bytes = engine.status().extent_bytes;
        let log = LocalLog::open(&engine, GroupId(1), group_settings, found).await;
        let log = log.map_err(|e| format!("replay: {:?}: {e}", e.kind()))?;
        // Before any task of it runs and adds entries of its own.
        let applied = log.group().applied();
        Ok::<_, String>(Opened { engine, log, applied, extent_bytes })
    };
    within(executor, group, opening).await.unwrap_or(Err("open did not end".to_owned()))
}

/// Runs a future as code of a life, for as long as a client is patient; none if it does not end.
pub(crate) async fn within<T: Send + 'static>(
    executor: &Arc<Executor>,
    group: Group,
    future: impl Future<Output = T> + Send + 'static,
) -> Option<T> {
    let (send, answer) = oneshot::channel();
    let task = Box::pin(async move {
        // The receiver is gone only if the run has failed.
        let _ = send.send(future.await);
    });
    drop(executor.spawn(group, "client", task));
    patient(answer).await
}

/// The answer, if it comes while a client is patient.
pub(crate) async fn patient<T: Send>(answer: oneshot::Receiver<T>) -> Option<T> {
    SimRuntime::timeout(PATIENCE, answer).await.ok()?.ok()
}
