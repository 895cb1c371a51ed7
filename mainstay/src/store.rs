//! A store: keyspaces, batches, snapshots, checkpoints and clones over one log.

use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use mainstay_engine::{
    BranchId, BranchInfo, CheckpointInfo, ClientToken, CommandBody, EngineStatus, GroupStatus, KeyspaceOptions,
    LocalLog, MAIN, OperatorId,
};
use mainstay_io::{BoxFuture, Media};
use mainstay_wal::GroupId;

use crate::log::{Alone, Log};
use crate::snapshot::owned_bounds;
use crate::{
    Batch, Commit, Durability, Error, ErrorKind, Events, Keyspace, KeyspaceId, ReadLevel, Result, Snapshot,
    StoreBuilder,
};

/// The group of a store alone on one node.
const GROUP: GroupId = GroupId(1);
/// Keyspaces of this crate begin with it.
const RESERVED_PREFIX: &str = "mainstay.";
/// Keyspaces that one call compacts at a time: a group has 64 such compactions at most.
const COMPACTIONS_AT_ONCE: usize = 16;
/// The name of the branch that every store is born with.
const MAIN_NAME: &str = "main";

/// The branch a handle reads and writes.
#[derive(Debug)]
pub(crate) struct Branch {
    pub(crate) id: BranchId,
    pub(crate) name: String,
}

/// An ordered key-value store, alone on this node ([`Store::open`]) or a replica ([`crate::Node::store`]).
///
/// Cloning shares it. A handle carries the [`Durability`] of its writes and the [`ReadLevel`] of its reads; see
/// [`Store::with_durability`] and [`Store::with_read_level`]. Blocking calls wait on the calling thread: inside async code use
/// the `_async` forms, which run under any executor.
#[derive(Clone)]
pub struct Store {
    pub(crate) log: Log,
    pub(crate) branch: Arc<Branch>,
    durability: Durability,
    read_level: ReadLevel,
}

/// Counts and states of a store.
#[derive(Clone, Debug, Default)]
pub struct StoreStatus {
    /// Of the volume.
    pub engine: EngineStatus,
    /// Of the data.
    pub group: GroupStatus,
    /// Entries that the last open found behind the tables and applied again: next to none after a close.
    pub replayed: u64,
}

impl Store {
    /// Opens the store at `path`, a directory (made if absent) or a block device, with default settings. Lays out a
    /// volume where nothing is yet; never touches what is not a volume.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder().open(path)
    }

    /// Settings for [`StoreBuilder::open`].
    pub fn builder() -> StoreBuilder {
        StoreBuilder::default()
    }

    pub(crate) async fn open_media(builder: StoreBuilder, media: Arc<dyn Media>) -> Result<Self> {
        let environment = builder.environment_or_system();
        let name = media.name();
        let (engine, found) = builder.open_engine(media, environment.clone(), false).await?;
        let identity = engine.identity();
        if identity.node != 0 {
            engine.close().await?;
            let message = format!("the volume is a replica of a cluster: start it as a node path={name}");
            return Err(Error::new(ErrorKind::Foreign, message));
        }
        let log = match LocalLog::open(&engine, GROUP, builder.group_settings(), found).await {
            Ok(log) => log,
            Err(error) => {
                // So that it can be opened again at once, for instance with a merge operator that was missing.
                let _ = engine.abandon().await;
                return Err(error.into());
            }
        };
        Ok(Self::over(Log::Alone(Arc::new(Alone { engine, log, environment, closed: AtomicBool::new(false) }))))
    }

    pub(crate) fn over(log: Log) -> Self {
        Self {
            log,
            branch: Arc::new(Branch { id: MAIN, name: MAIN_NAME.into() }),
            durability: Durability::default(),
            read_level: ReadLevel::default(),
        }
    }

    /// This store with another durability for the writes of the handle and of the keyspaces made from it.
    pub fn with_durability(&self, durability: Durability) -> Self {
        Self { durability, ..self.clone() }
    }

    /// This store with another level for the reads of the handle and of the keyspaces made from it. A store alone
    /// answers every level with the newest state.
    pub fn with_read_level(&self, read_level: ReadLevel) -> Self {
        Self { read_level, ..self.clone() }
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability.clone()
    }

    /// The name of the branch: `main`, or that of the clone.
    pub fn branch_name(&self) -> &str {
        &self.branch.name
    }

    /// The keyspace of that name, made if it is absent (in every clone).
    ///
    /// # Errors
    /// `Invalid` (a name of 0 or more than 255 bytes, or one that begins with `mainstay.`), and as [`Store::commit`] if it is made.
    pub fn keyspace(&self, name: &str) -> Result<Keyspace> {
        self.log.wait(self.keyspace_inner(name))
    }

    /// As [`Store::keyspace`], without blocking the thread.
    pub fn keyspace_async(&self, name: &str) -> BoxFuture<Result<Keyspace>> {
        let (this, name) = (self.clone(), name.to_owned());
        self.log.bind(async move { this.keyspace_inner(&name).await })
    }

    async fn keyspace_inner(&self, name: &str) -> Result<Keyspace> {
        self.keyspace_by(name, |_| true, CommandBody::CreateKeyspace { name: name.into() }).await
    }

    /// The keyspace of that name where it is there and as wanted, else what the entry makes of it.
    async fn keyspace_by(
        &self,
        name: &str,
        is_as_wanted: impl Fn(KeyspaceId) -> bool,
        body: CommandBody,
    ) -> Result<Keyspace> {
        if let Some(id) = self.log.group().keyspace(name).filter(|id| is_as_wanted(*id)) {
            return Ok(Keyspace::new(self.clone(), id, name));
        }
        check_keyspace(name)?;
        let response = self.write(body).await?;
        Ok(Keyspace::new(self.clone(), keyspace_id(&response)?, name))
    }

    /// The keyspace of that name whose pairs can expire ([`Batch::insert_for`]): made if it is absent (in every clone). One that exists and was not made so is
    /// refused: a keyspace stays what it is. It takes no merge operator.
    ///
    /// Every value of it takes a byte more, and seven where it has an end. What has ended is absent to every read from that moment on; its space comes back when
    /// half of a table has ended, or all of it, within a minute or so; at once with [`Store::compact`].
    ///
    /// ```
    /// # fn main() -> mainstay::Result<()> {
    /// # let dir = tempfile::tempdir().expect("a temporary directory");
    /// # let store = mainstay::Store::builder().wal_bytes(16 << 20).open(dir.path().join("store"))?;
    /// use std::time::Duration;
    ///
    /// let sessions = store.keyspace_expiring("sessions")?;
    /// sessions.insert_for("ada", "token", Duration::from_secs(3600))?;
    /// sessions.insert("forever", "token")?;
    /// assert_eq!(sessions.get("ada")?.as_deref(), Some(&b"token"[..]));
    /// # store.close()
    /// # }
    /// ```
    ///
    /// # Errors
    /// `Invalid`: a keyspace of that name exists and is not expiring. `Unsupported`: a member of the cluster would not read it
    /// ([`crate::Node::finalize`]). As [`Store::keyspace`].
    pub fn keyspace_expiring(&self, name: &str) -> Result<Keyspace> {
        self.log.wait(self.keyspace_expiring_inner(name))
    }

    /// As [`Store::keyspace_expiring`], without blocking the thread.
    pub fn keyspace_expiring_async(&self, name: &str) -> BoxFuture<Result<Keyspace>> {
        let (this, name) = (self.clone(), name.to_owned());
        self.log.bind(async move { this.keyspace_expiring_inner(&name).await })
    }

    async fn keyspace_expiring_inner(&self, name: &str) -> Result<Keyspace> {
        let body = CommandBody::CreateExpiring { name: name.into() };
        self.keyspace_by(name, |id| self.log.group().expires(id), body).await
    }

    /// Makes a keyspace of this crate, if it is absent, and waits until it is here. Returns the entry that asked for it.
    pub(crate) async fn make_keyspace(&self, name: &str) -> Result<mainstay_engine::LogIndex> {
        let body = CommandBody::CreateKeyspace { name: name.into() };
        let (applied, _) = self.log.write(body, Durability::Quorum).await?;
        applied.response?;
        self.log.barrier(ReadLevel::AtLeast(applied.index)).await?;
        Ok(applied.index)
    }

    /// The keyspace of that name with a merge operator ([`Batch::merge`]): made if it is absent, and given the operator if it has none
    /// (in every clone). A keyspace keeps its operator.
    ///
    /// ```
    /// # fn main() -> mainstay::Result<()> {
    /// # let dir = tempfile::tempdir().expect("a temporary directory");
    /// # let store = mainstay::Store::builder().wal_bytes(16 << 20).open(dir.path().join("store"))?;
    /// use mainstay::OperatorId;
    ///
    /// let visits = store.keyspace_with_operator("visits", OperatorId::U64_ADD)?;
    /// for _ in 0..3 {
    ///     visits.merge("front page", 1u64.to_le_bytes())?;
    /// }
    /// assert_eq!(visits.get("front page")?.as_deref(), Some(&3u64.to_le_bytes()[..]));
    /// # store.close()
    /// # }
    /// ```
    ///
    /// # Errors
    /// `Invalid`: the operator is not registered here ([`StoreBuilder::merge_operator`]), or the keyspace has another one; and as [`Store::keyspace`].
    pub fn keyspace_with_operator(&self, name: &str, operator: OperatorId) -> Result<Keyspace> {
        self.log.wait(self.keyspace_with_operator_inner(name, operator))
    }

    /// As [`Store::keyspace_with_operator`], without blocking the thread.
    pub fn keyspace_with_operator_async(&self, name: &str, operator: OperatorId) -> BoxFuture<Result<Keyspace>> {
        let (this, name) = (self.clone(), name.to_owned());
        self.log.bind(async move { this.keyspace_with_operator_inner(&name, operator).await })
    }

    async fn keyspace_with_operator_inner(&self, name: &str, operator: OperatorId) -> Result<Keyspace> {
        let group = self.log.group();
        group.check_operator(&operator, name)?;
        let body = CommandBody::SetOperator { name: name.into(), operator: operator.clone() };
        self.keyspace_by(name, |id| group.merge_operator(id).as_ref() == Some(&operator), body).await
    }

    /// The keyspace of that name with these options, in place of all that it had: made if it is absent (in every clone). They hold from here on for
    /// what is flushed and merged; a table that is there stays as it is until it is merged with another, those of the last level with what is written anew.
    ///
    /// ```
    /// # fn main() -> mainstay::Result<()> {
    /// # let dir = tempfile::tempdir().expect("a temporary directory");
    /// # let store = mainstay::Store::builder().wal_bytes(16 << 20).open(dir.path().join("store"))?;
    /// use mainstay::{CompactionStyle, KeyspaceOptions};
    ///
    /// let options = KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs: 8 });
    /// let events = store.keyspace_with_options("events", options)?;
    /// events.insert("2026-01-01", "much is written here, and little read")?;
    /// assert_eq!(events.options()?, options);
    /// # store.close()
    /// # }
    /// ```
    ///
    /// # Errors
    /// `Invalid`: an option is out of its range. `Unsupported`: a member of the cluster would not read it ([`crate::Node::finalize`]). As
    /// [`Store::keyspace`].
    pub fn keyspace_with_options(&self, name: &str, options: KeyspaceOptions) -> Result<Keyspace> {
        self.log.wait(self.keyspace_with_options_inner(name, options))
    }

    /// As [`Store::keyspace_with_options`], without blocking the thread.
    pub fn keyspace_with_options_async(&self, name: &str, options: KeyspaceOptions) -> BoxFuture<Result<Keyspace>> {
        let (this, name) = (self.clone(), name.to_owned());
        self.log.bind(async move { this.keyspace_with_options_inner(&name, options).await })
    }

    async fn keyspace_with_options_inner(&self, name: &str, options: KeyspaceOptions) -> Result<Keyspace> {
        options.check()?;
        let body = CommandBody::SetOptions { name: name.into(), options };
        self.keyspace_by(name, |id| self.log.group().keyspace_options(id) == Some(options), body).await
    }

    /// The keyspace of that name if it is there.
    pub fn keyspace_if_exists(&self, name: &str) -> Option<Keyspace> {
        self.log.group().keyspace(name).map(|id| Keyspace::new(self.clone(), id, name))
    }

    /// Names of the keyspaces that this replica has applied.
    pub fn keyspaces(&self) -> Vec<String> {
        let names = self.log.group().keyspaces().into_iter().map(|(name, _)| name);
        names.filter(|name| check_keyspace(name).is_ok()).collect()
    }

    /// Drops a keyspace and its data in every clone; checkpoints keep it. Handles to it answer `Invalid` from then on.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` (a name that begins with `mainstay.`), and as [`Store::commit`].
    pub fn drop_keyspace(&self, name: &str) -> Result<()> {
        check_keyspace(name)?;
        self.log.wait(self.write(CommandBody::DropKeyspace { name: name.into() })).map(drop)
    }

    /// Applies a batch, all or none, and returns when the durability of this handle holds.
    ///
    /// # Errors
    /// Not applied: `Invalid` (an empty key, a key over 64 KiB, a value over 16 MiB, a dropped keyspace), `NotLeader`,
    /// `Unavailable`, `OutOfSpace`, `Unsupported`, `Closed`; of a batch with conditions `Conflict` (one does not hold: read again
    /// and retry), and `Unsupported` at [`Durability::Local`] where there are other replicas: that is answered before the
    /// batch is applied. `Indeterminate`: read before trying again.
    pub fn commit(&self, batch: Batch) -> Result<Commit> {
        self.log.wait(self.commit_inner(batch, self.durability.clone()))
    }

    /// As [`Store::commit`] at another durability.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub fn commit_with(&self, batch: Batch, durability: Durability) -> Result<Commit> {
        self.log.wait(self.commit_inner(batch, durability))
    }

    /// As [`Store::commit`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn commit_async(&self, batch: Batch) -> BoxFuture<Result<Commit>> {
        self.commit_with_async(batch, self.durability.clone())
    }

    /// As [`Store::commit_with`], without blocking the thread. Not cancel safe: a dropped future may have written.
    pub fn commit_with_async(&self, batch: Batch, durability: Durability) -> BoxFuture<Result<Commit>> {
        let this = self.clone();
        self.log.bind(async move { this.commit_inner(batch, durability).await })
    }

    pub(crate) async fn commit_inner(&self, batch: Batch, durability: Durability) -> Result<Commit> {
        let body = batch.into_body(self.branch.id);
        let (applied, token) = self.log.write(body, durability).await?;
        applied.response?;
        Ok(Commit { token })
    }

    /// Applies a batch once, however often it is given with the same token: after an error, after a restart of the caller, through
    /// this replica or another. The index that is answered may be that of a repetition. A token whose client was silent for 24
    /// hours may be forgotten.
    ///
    /// # Errors
    /// As [`Store::commit`]; after `Indeterminate` and `Unavailable` give the same batch with the same token again. `Invalid` when a
    /// later request of this client was answered, `Unsupported` at [`Durability::Local`] where there are other replicas. `Conflict` is the
    /// outcome of the request, and answered again: another attempt takes the next sequence.
    pub fn commit_once(&self, token: ClientToken, batch: Batch) -> Result<Commit> {
        self.log.wait(self.commit_once_inner(token, batch))
    }

    /// As [`Store::commit_once`], without blocking the thread.
    pub fn commit_once_async(&self, token: ClientToken, batch: Batch) -> BoxFuture<Result<Commit>> {
        let this = self.clone();
        self.log.bind(async move { this.commit_once_inner(token, batch).await })
    }

    pub(crate) async fn commit_once_inner(&self, client: ClientToken, batch: Batch) -> Result<Commit> {
        let body = batch.into_body(self.branch.id);
        let (applied, token) = self.log.write_once(client, body, self.durability.clone()).await?;
        applied.response?;
        Ok(Commit { token })
    }

    /// Waits until a write answered at [`Durability::Local`] holds at `durability`.
    ///
    /// # Errors
    /// `Indeterminate` when leadership changed first: read before writing again. `Unsupported`, `Closed`.
    pub fn wait(&self, commit: Commit, durability: Durability) -> Result<()> {
        self.log.wait(self.log.wait_durable(commit.token, durability))
    }

    /// As [`Store::wait`], without blocking the thread. Cancel safe.
    pub fn wait_async(&self, commit: Commit, durability: Durability) -> BoxFuture<Result<()>> {
        let log = self.log.clone();
        self.log.bind(async move { log.wait_durable(commit.token, durability).await })
    }

    /// Gives a command to the state machine ([`StoreBuilder::state_machine`]) and returns its answer.
    ///
    /// # Errors
    /// What the state machine answered, and as [`Store::commit`].
    pub fn execute(&self, command: impl Into<Bytes>) -> Result<Bytes> {
        self.log.wait(self.execute_inner(command.into()))
    }

    /// As [`Store::execute`], without blocking the thread. Not cancel safe: a dropped future may have been applied.
    pub fn execute_async(&self, command: impl Into<Bytes>) -> BoxFuture<Result<Bytes>> {
        let (this, command) = (self.clone(), command.into());
        self.log.bind(async move { this.execute_inner(command).await })
    }

    async fn execute_inner(&self, command: Bytes) -> Result<Bytes> {
        self.write(CommandBody::Custom { branch: self.branch.id, command }).await
    }

    /// Proposes what has no batch and gives its answer. Such entries are never answered before they are applied.
    async fn write(&self, body: CommandBody) -> Result<Bytes> {
        let durability = match self.durability.clone() {
            Durability::Local => Durability::Quorum,
            other => other,
        };
        let (applied, _) = self.log.write(body, durability).await?;
        Ok(applied.response?)
    }

    pub(crate) async fn view(&self) -> Result<mainstay_engine::Snapshot> {
        self.log.snapshot(&self.branch, self.read_level.clone()).await
    }

    /// Pins the state at the read level of this handle.
    ///
    /// # Errors
    /// `Unavailable` (a replicated store without a leader), `NotFound` (the clone was dropped), `Closed`.
    pub fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot { inner: self.log.wait(self.view())? })
    }

    /// As [`Store::snapshot`], without blocking the thread. Cancel safe.
    pub fn snapshot_async(&self) -> BoxFuture<Result<Snapshot>> {
        self.snapshot_with_async(self.read_level.clone())
    }

    /// As [`Store::snapshot`] at another level.
    ///
    /// # Errors
    /// As [`Store::snapshot`].
    pub fn snapshot_with(&self, level: ReadLevel) -> Result<Snapshot> {
        Ok(Snapshot { inner: self.log.wait(self.log.snapshot(&self.branch, level))? })
    }

    /// As [`Store::snapshot_with`], without blocking the thread. Cancel safe.
    pub fn snapshot_with_async(&self, level: ReadLevel) -> BoxFuture<Result<Snapshot>> {
        let this = self.clone();
        self.log.bind(async move { Ok(Snapshot { inner: this.log.snapshot(&this.branch, level).await? }) })
    }

    /// Freezes this store under a name: a durable copy at one index that shares all data, the same on every replica.
    ///
    /// # Errors
    /// `Invalid` (the name is taken or too long), and as [`Store::commit`].
    pub fn checkpoint(&self, name: &str) -> Result<CheckpointInfo> {
        self.log.wait(self.checkpoint_inner(name))
    }

    /// As [`Store::checkpoint`], without blocking the thread.
    pub fn checkpoint_async(&self, name: &str) -> BoxFuture<Result<CheckpointInfo>> {
        let (this, name) = (self.clone(), name.to_owned());
        self.log.bind(async move { this.checkpoint_inner(&name).await })
    }

    async fn checkpoint_inner(&self, name: &str) -> Result<CheckpointInfo> {
        self.write(CommandBody::CreateCheckpoint { name: name.into(), branch: self.branch.id }).await?;
        self.log.barrier(ReadLevel::Linearizable).await?;
        let made = self.checkpoints().into_iter().find(|checkpoint| checkpoint.name == name);
        made.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("the checkpoint was dropped again name={name}")))
    }

    /// All checkpoints that this replica has applied, of all branches.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        self.log.group().checkpoints()
    }

    /// Opens a checkpoint for reading.
    ///
    /// # Errors
    /// `NotFound`, `Closed`.
    pub fn open_checkpoint(&self, name: &str) -> Result<Snapshot> {
        Ok(Snapshot { inner: self.log.group().checkpoint(name)? })
    }

    /// Drops a checkpoint. Clones made from it stay.
    ///
    /// # Errors
    /// `NotFound`, and as [`Store::commit`].
    pub fn drop_checkpoint(&self, name: &str) -> Result<()> {
        self.log.wait(self.write(CommandBody::DropCheckpoint { name: name.into() })).map(drop)
    }

    /// As [`Store::drop_checkpoint`], without blocking the thread.
    pub fn drop_checkpoint_async(&self, name: &str) -> BoxFuture<Result<()>> {
        let (this, name) = (self.clone(), name.to_owned());
        self.log.bind(async move { this.write(CommandBody::DropCheckpoint { name }).await.map(drop) })
    }

    /// Makes a writable store from a checkpoint; it shares the checkpoint's data and costs no copy.
    ///
    /// # Errors
    /// `NotFound` (no such checkpoint), `Invalid` (the name is taken), and as [`Store::commit`].
    pub fn create_clone(&self, name: &str, checkpoint: &str) -> Result<Store> {
        self.log.wait(self.create_clone_inner(name, checkpoint))
    }

    /// As [`Store::create_clone`], without blocking the thread.
    pub fn create_clone_async(&self, name: &str, checkpoint: &str) -> BoxFuture<Result<Store>> {
        let (this, name, checkpoint) = (self.clone(), name.to_owned(), checkpoint.to_owned());
        self.log.bind(async move { this.create_clone_inner(&name, &checkpoint).await })
    }

    async fn create_clone_inner(&self, name: &str, checkpoint: &str) -> Result<Store> {
        self.write(CommandBody::CreateClone { name: name.into(), checkpoint: checkpoint.into() }).await?;
        self.log.barrier(ReadLevel::Linearizable).await?;
        self.open_clone(name)
    }

    /// The store of a clone, beside this one and with the same levels; `main` is the first store.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn open_clone(&self, name: &str) -> Result<Store> {
        let id = self.log.group().branch(name);
        let id = id.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no clone of that name name={name}")))?;
        Ok(Self { branch: Arc::new(Branch { id, name: name.into() }), ..self.clone() })
    }

    /// All clones that this replica has applied.
    pub fn clones(&self) -> Vec<BranchInfo> {
        self.log.group().branches().into_iter().filter(|branch| branch.id != MAIN).collect()
    }

    /// Drops a clone. Handles to it answer `NotFound` from then on.
    ///
    /// # Errors
    /// `NotFound`, and as [`Store::commit`].
    pub fn drop_clone(&self, name: &str) -> Result<()> {
        self.log.wait(self.write(CommandBody::DropClone { name: name.into() })).map(drop)
    }

    /// As [`Store::drop_clone`], without blocking the thread.
    pub fn drop_clone_async(&self, name: &str) -> BoxFuture<Result<()>> {
        let (this, name) = (self.clone(), name.to_owned());
        self.log.bind(async move { this.write(CommandBody::DropClone { name }).await.map(drop) })
    }

    /// Has what the bounds of a keyspace hold written down to the last level, on every replica, and waits until that is done on this one: what was
    /// removed and superseded before the call is gone, and its space given back to the file system or the device. It goes on by itself,
    /// so there is no need to call it: it is for space that is wanted now. Reads and writes go on meanwhile. What a checkpoint, another
    /// clone or a snapshot still holds stays with those.
    ///
    /// # Errors
    /// `Invalid` (64 such calls wait, or a bound is over 64 KiB), `NotFound` (the clone or the keyspace was dropped), and as [`Store::commit`]. After `OutOfSpace`,
    /// and an error of a damaged or failing disk, it goes on once that has passed.
    pub fn compact<K: AsRef<[u8]>>(&self, keyspace: &Keyspace, bounds: impl RangeBounds<K>) -> Result<()> {
        let (first, end) = span(&bounds);
        self.log.wait(self.compact_inner(vec![keyspace.id()], first, end))
    }

    /// As [`Store::compact`], without blocking the thread.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future, once it was polled, leaves a compaction that goes on.
    pub fn compact_async<K: AsRef<[u8]>>(
        &self,
        keyspace: &Keyspace,
        bounds: impl RangeBounds<K>,
    ) -> BoxFuture<Result<()>> {
        let (this, keyspaces, (first, end)) = (self.clone(), vec![keyspace.id()], span(&bounds));
        self.log.bind(async move { this.compact_inner(keyspaces, first, end).await })
    }

    /// As [`Store::compact_async`] for all of the keyspaces of which the name is taken by `pick`, those that this crate and a state machine made
    /// for themselves among them. 16 at a time.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future leaves those going on that it has begun, and begins no other.
    pub fn compact_keyspaces_async(&self, pick: impl Fn(&str) -> bool) -> BoxFuture<Result<()>> {
        let keyspaces = self.log.group().keyspaces().into_iter().filter(|(name, _)| pick(name)).map(|(_, id)| id);
        let (this, keyspaces) = (self.clone(), keyspaces.collect());
        self.log.bind(async move { this.compact_inner(keyspaces, Bytes::new(), None).await })
    }

    async fn compact_inner(&self, keyspaces: Vec<KeyspaceId>, first: Bytes, end: Option<Bytes>) -> Result<()> {
        for some in keyspaces.chunks(COMPACTIONS_AT_ONCE) {
            let mut asked = Vec::with_capacity(some.len());
            for &keyspace in some {
                let (first, end) = (first.clone(), end.clone());
                let body = CommandBody::Compact { branch: self.branch.id, keyspace, first, end };
                let (applied, _) = self.log.write(body, Durability::Quorum).await?;
                applied.response?;
                asked.push(applied.index);
            }
            if let Some(&last) = asked.last() {
                self.log.barrier(ReadLevel::AtLeast(last)).await?;
            }
            for index in asked {
                self.log.group().compacted(index).await?;
            }
        }
        Ok(())
    }

    /// Counts and states.
    pub fn status(&self) -> StoreStatus {
        StoreStatus {
            engine: self.log.engine().status(),
            group: self.log.group().status(),
            replayed: self.log.replayed(),
        }
    }

    /// Sets the memory of the volume anew, as [`StoreBuilder::memory_bytes`]: of all stores and groups on it. Less is let go of at once.
    pub fn set_memory_bytes(&self, bytes: u64) {
        self.log.engine().set_memory_bytes(bytes);
    }

    /// Listens to what happens behind the writes of the volume from now on: flushes, compactions, waits of writers, space, damage. Each listener has
    /// a queue of [`crate::EVENTS_MAX`] events; what goes beyond is dropped and counted.
    pub fn events(&self) -> Events {
        self.log.engine().events()
    }

    /// Flushes what is in memory, so that the next open has next to nothing to apply again ([`StoreStatus::replayed`]), and
    /// marks the volume clean. Every handle answers `Closed` from then on. A store that is dropped without it loses nothing: the next open replays the log.
    ///
    /// # Errors
    /// `Io`, `Closed`.
    pub fn close(&self) -> Result<()> {
        self.log.wait(self.log.close())
    }

    /// As [`Store::close`], without blocking the thread.
    pub fn close_async(&self) -> BoxFuture<Result<()>> {
        let log = self.log.clone();
        self.log.bind(async move { log.close().await })
    }
}

/// The first key of the bounds, and the first behind them.
fn span<K: AsRef<[u8]>>(bounds: &impl RangeBounds<K>) -> (Bytes, Option<Bytes>) {
    let behind = |key: Bytes| Bytes::from([&key[..], &[0]].concat());
    let (lower, upper) = owned_bounds(bounds);
    let first = match lower {
        Bound::Included(key) => key,
        Bound::Excluded(key) => behind(key),
        Bound::Unbounded => Bytes::new(),
    };
    let end = match upper {
        Bound::Included(key) => Some(behind(key)),
        Bound::Excluded(key) => Some(key),
        Bound::Unbounded => None,
    };
    (first, end)
}

/// Refuses names that are not for callers.
fn check_keyspace(name: &str) -> Result<()> {
    if name.starts_with(RESERVED_PREFIX) {
        let message = format!("names of keyspaces that begin with {RESERVED_PREFIX} are reserved name={name}");
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(())
}

fn keyspace_id(response: &[u8]) -> Result<KeyspaceId> {
    let bytes = response.first_chunk().copied();
    let bytes = bytes.ok_or_else(|| Error::new(ErrorKind::Internal, "the answer holds no keyspace id"))?;
    Ok(KeyspaceId(u32::from_le_bytes(bytes)))
}
