//! The replicated state behind openraft: applies entries to the engine's group, names its snapshots, takes them over.
//!
//! # Place
//! openraft's `RaftStateMachine` above [`mainstay_engine::Group`]; openraft's worker is the one applier
//! # Invariants
//! - S1. A Raft snapshot is what the engine has flushed (`Group::export`): O(1), nothing is written (pitfall 6). Its log
//!   id and membership come from `history`, which begins at what the log knows and grows with what is applied.
//! - S2. `applied_state` after a restart is the flushed index. Nothing else is stored: the log holds the entries from
//!   `purged` on and the anchor of `purged`, and `purged <= flushed` always, so it can name that index (X3).
//! - S3. Before a snapshot is taken over, an anchor with its log id and membership is durable in the log; not before all its tables are
//!   here, since each costs a record, also when nothing comes of it. Import is
//!   atomic in the engine; so after a crash at any point the flushed index is either the old one, which the log can
//!   name, or the new one, which the anchor names.
//! - S4. Every responder is answered (a lost one would hang its writer).
//!
//! # Why not
//! storing log id and membership with each flush: one more thing to keep in step with the manifest
//! # Why not
//! failing an install when the leader goes: openraft takes a failed install as a failed disk and stops. So an
//!   install asks on, for one as new from whoever leads then or any other member, until it is done or the node closes.
//!   Not from a leader alone: openraft gives no vote while it installs, and there may be no leader without that vote

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use mainstay_engine::{Applied, Command, ErrorKind as EngineErrorKind, Export, Group, LogIndex, TableId, TableSource};
use mainstay_io::BoxFuture;
use openraft::OptionalSend;
use openraft::entry::RaftPayload;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};

use crate::log_store::LogStore;
use crate::progress::{ApplyLag, Progress};
use crate::types::{
    Entry, EntryPayload, LogId, RaftSnapshot, Reply, SnapshotMeta, StoredMembership, TypeConfig, io_error, log_id,
    term_of,
};
use crate::{Error, ErrorKind, Result, Runtime};

/// Why an install waits though its tables are here.
pub(crate) const NO_ROOM: &str = "the log has no room for the name of the state that is to be taken over";

/// Pause before an install asks again for what it could not get.
const INSTALL_RETRY: Duration = Duration::from_millis(200);

/// What the state machine needs of a group. The second implementation is the double that openraft's own suite drives,
/// which applies entries that never were in a log.
pub(crate) trait State: Clone + Send + Sync + 'static {
    fn apply(
        &self,
        index: LogIndex,
        command: &Command,
    ) -> impl Future<Output = mainstay_engine::Result<Applied>> + Send;
    fn skip(&self, index: LogIndex);
    fn applied(&self) -> LogIndex;
    fn flushed(&self) -> LogIndex;
    fn export(&self) -> mainstay_engine::Result<Exported>;
    /// Takes over the state at `at`.
    fn import(
        &self,
        at: LogIndex,
        manifest: Bytes,
        source: &dyn TableSource,
    ) -> impl Future<Output = mainstay_engine::Result<LogIndex>> + Send;
}

impl State for Group {
    async fn apply(&self, index: LogIndex, command: &Command) -> mainstay_engine::Result<Applied> {
        Group::apply(self, index, command).await
    }

    fn skip(&self, index: LogIndex) {
        Group::skip(self, index);
    }

    fn applied(&self) -> LogIndex {
        Group::applied(self)
    }

    fn flushed(&self) -> LogIndex {
        Group::flushed(self)
    }

    fn export(&self) -> mainstay_engine::Result<Exported> {
        let export = Group::export(self)?;
        Ok(Exported { flushed: export.flushed, manifest: export.manifest.clone(), _pin: Some(export) })
    }

    async fn import(
        &self,
        _: LogIndex,
        manifest: Bytes,
        source: &dyn TableSource,
    ) -> mainstay_engine::Result<LogIndex> {
        Group::import(self, manifest, source).await
    }
}

/// The flushed state of this node; its tables stay while it lives.
#[derive(Clone, Debug)]
pub(crate) struct Exported {
    pub(crate) flushed: LogIndex,
    pub(crate) manifest: Bytes,
    pub(crate) _pin: Option<Export>,
}

/// A snapshot of a peer, as it is offered: the tables that it names are fetched by who lacks them.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) meta: SnapshotMeta,
    pub(crate) manifest: Bytes,
    /// Who holds the tables.
    pub(crate) from: u64,
}

/// What openraft carries as snapshot data.
#[derive(Clone, Debug)]
pub(crate) enum SnapshotHandle {
    /// Of this node: pins its tables while a receiver fetches them.
    Local(Exported),
    /// Of a peer.
    Remote {
        /// For `Group::import`.
        manifest: Bytes,
        /// Who holds the tables.
        from: u64,
    },
}

/// Where an install gets tables and, when they are gone, another snapshot.
pub(crate) trait Peers: Send + Sync + 'static {
    /// Bytes of a table held by a node.
    fn read_table(&self, from: u64, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>>;
    /// A snapshot of another member that reaches `least`, pinned there for this node.
    fn offer(&self, least: Option<LogId>) -> BoxFuture<Result<Offer>>;
    /// The end of the snapshot that openraft has been given and waits for the applier to take over.
    fn awaited(&self) -> Option<LogId>;
    /// True once the node closes: an install gives up.
    fn is_closing(&self) -> bool;
}

/// Reads tables from one node and remembers whether that failed, to tell it from a failure of this volume.
struct Source {
    peers: Arc<dyn Peers>,
    from: u64,
    failed: Mutex<Option<Error>>,
}

/// Bytes of one request for a part of a table; a longer one is cut.
pub(crate) const TABLE_READ_BYTES_MAX: u64 = 4 << 20;

struct SharedSource {
    source: Arc<Source>,
    /// Whose log shall name the state, and which was flushed before; none where it does already.
    naming: Option<(LogStore, SnapshotMeta, LogIndex)>,
}

impl TableSource for SharedSource {
    /// See S3.
    fn arrived(&self) -> BoxFuture<mainstay_engine::Result<()>> {
        let naming = self.naming.clone();
        Box::pin(async move {
            let Some((log, meta, flushed)) = naming else { return Ok(()) };
            match log.begin_install(&meta, flushed).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(mainstay_engine::Error::new(EngineErrorKind::OutOfSpace, NO_ROOM)),
                Err(error) => Err(mainstay_engine::Error::new(EngineErrorKind::Closed, error.to_string())),
            }
        })
    }

    fn read_table(&self, id: TableId, offset: u64, length: u64) -> BoxFuture<mainstay_engine::Result<Bytes>> {
        let source = self.source.clone();
        Box::pin(async move {
            let mut parts = Vec::new();
            let mut done = 0;
            while done < length {
                let part = (length - done).min(TABLE_READ_BYTES_MAX);
                let read = source.peers.read_table(source.from, id, offset + done, part).await;
                let bytes = match read {
                    Ok(bytes) if bytes.len() as u64 == part => bytes,
                    other => {
                        let error = other.err().unwrap_or_else(|| {
                            Error::new(ErrorKind::Corrupt, format!("a peer sent a part of another length table={id}"))
                        });
                        let kind = mainstay_engine::ErrorKind::Unavailable;
                        let message = error.to_string();
                        *source.failed.lock().expect("nothing panics while it holds this lock") = Some(error);
                        return Err(mainstay_engine::Error::new(kind, message));
                    }
                };
                done += part;
                parts.push(bytes);
            }
            Ok(match parts.len() {
                1 => parts.swap_remove(0),
                _ => parts.concat().into(),
            })
        })
    }
}

/// Takes over the state of a peer outside of openraft, which does not run yet. The caller has made its name durable (S3).
pub(crate) async fn take_tables<S: State>(state: &S, peers: Arc<dyn Peers>, offer: &Offer) -> Result<()> {
    let source = Arc::new(Source { peers, from: offer.from, failed: Mutex::new(None) });
    let source = SharedSource { source, naming: None };
    let at = LogIndex(offer.meta.last_log_id.map_or(0, |id| id.index));
    state.import(at, offer.manifest.clone(), &source).await?;
    Ok(())
}

/// Terms and memberships by the index from which on they hold.
#[derive(Debug, Default)]
struct History {
    terms: BTreeMap<u64, u64>,
    memberships: BTreeMap<u64, StoredMembership>,
}

impl History {
    fn add(&mut self, id: &LogId) {
        let term = term_of(id);
        if self.terms.last_key_value().is_none_or(|(i, t)| *t != term && *i < id.index) {
            self.terms.insert(id.index, term);
        }
    }

    fn at(&self, index: u64) -> Option<(LogId, StoredMembership)> {
        let (_, term) = self.terms.range(..=index).next_back()?;
        let membership = self.memberships.range(..=index).next_back().map(|(_, m)| m.clone()).unwrap_or_default();
        Some((log_id(*term, index), membership))
    }

    /// Forgets what no index from `index` on needs.
    fn prune(&mut self, index: u64) {
        fn cut<V>(map: &mut BTreeMap<u64, V>, index: u64) {
            if let Some(first) = map.range(..=index).next_back().map(|(i, _)| *i) {
                *map = map.split_off(&first);
            }
        }
        cut(&mut self.terms, index);
        cut(&mut self.memberships, index);
    }
}

/// The state machine that openraft drives.
pub(crate) struct StateMachine<R: Runtime, S: State> {
    state: S,
    log: LogStore,
    peers: Arc<dyn Peers>,
    progress: Arc<Progress>,
    apply_lag: Option<Arc<ApplyLag>>,
    history: Mutex<History>,
    last_applied: Option<LogId>,
    /// The last index that openraft knows to be applied. An install may go further.
    told: u64,
    membership: StoredMembership,
    runtime: std::marker::PhantomData<fn() -> R>,
}

impl<R: Runtime, S: State> StateMachine<R, S> {
    /// Goes on from what the engine has flushed (S2).
    ///
    /// # Errors
    /// `Corrupt` when the log cannot name that index.
    pub(crate) fn open(state: S, log: LogStore, peers: Arc<dyn Peers>, progress: Arc<Progress>) -> Result<Self> {
        let flushed = state.flushed();
        let (last_applied, membership) = log.state_at(flushed)?;
        let mut history = History::default();
        let (ids, memberships) = log.history_to(flushed);
        for id in ids {
            history.terms.insert(id.index, term_of(&id));
        }
        history.memberships.extend(memberships);
        progress.advance(flushed.0);
        Ok(Self {
            state,
            log,
            peers,
            progress,
            apply_lag: None,
            history: Mutex::new(history),
            last_applied,
            told: flushed.0,
            membership,
            runtime: std::marker::PhantomData,
        })
    }

    /// The last entry that is applied.
    pub(crate) fn last_applied(&self) -> Option<LogId> {
        self.last_applied
    }

    /// Tells `lag` of each entry that was applied.
    pub(crate) fn with_apply_lag(self, lag: Arc<ApplyLag>) -> Self {
        Self { apply_lag: Some(lag), ..self }
    }

    /// Names what is flushed now. Called by the worker and not by the task that openraft starts for a builder: that one
    /// runs beside the next apply, whose entries openraft does not know to be applied yet.
    fn current(&self) -> std::io::Result<RaftSnapshot> {
        let mut history = self.history.lock().expect("nothing panics while it holds this lock");
        let export = self.state.export().map_err(io_error)?;
        let index = export.flushed.0;
        let meta = match history.at(index) {
            Some((id, membership)) => SnapshotMeta { last_log_id: Some(id), last_membership: membership },
            None if index > 0 => return Err(io_error(format!("no log id for the flushed entry index={index}"))),
            None => SnapshotMeta::default(),
        };
        history.prune(index);
        Ok(RaftSnapshot { meta, snapshot: SnapshotHandle::Local(export) })
    }

    /// Applies a command, however long what it reads cannot be had: damaged here, and not held by those that were asked. No
    /// answer when the state of another member took the place of this one, with the entry in it.
    async fn apply_command(&mut self, id: LogId, command: &Command) -> std::io::Result<Option<Applied>> {
        loop {
            let error = match self.state.apply(LogIndex(id.index), command).await {
                Ok(applied) => return Ok(Some(applied)),
                Err(error) if error.kind() == EngineErrorKind::Unavailable => error,
                Err(error) => return Err(io_error(error)),
            };
            tracing::warn!(index = id.index, %error, "an entry waits for a block that is damaged here");
            if self.is_taken_over(id).await? {
                return Ok(None);
            }
        }
    }

    /// Finds an entry that its log could not give, however long no other member gives it. No answer when the state of another member took
    /// the place of this one, with the entry in it.
    async fn find_entry(&mut self, id: LogId) -> std::io::Result<Option<Entry>> {
        while !self.is_taken_over(id).await? {
            match self.log.read_again(id.index).await? {
                Some(entry) => return Ok(Some(entry)),
                None => tracing::error!(index = id.index, "an entry waits, which is lost here and not to be had yet"),
            }
        }
        Ok(None)
    }

    /// A pause, and an attempt to go on from the state of another member that holds the entry `id`.
    async fn is_taken_over(&mut self, id: LogId) -> std::io::Result<bool> {
        if self.peers.is_closing() {
            return Err(io_error("closed while an entry waited for what is damaged here"));
        }
        let awaited = self.peers.awaited();
        R::sleep(INSTALL_RETRY).await;
        match self.peers.offer(Some(id)).await {
            Ok(offer) if self.may_go_on_from(&offer, awaited) && self.try_take_over(&offer).await? => {
                tracing::warn!(index = id.index, "the state of another member took the place of an entry");
                self.go_on_from(offer.meta);
                return Ok(true);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "no state to be had yet that holds the entry"),
        }
        Ok(false)
    }

    /// Whether the state of a peer may take the place of this one between two entries. With one beyond the log here openraft would have to be
    /// told. It knows when it has asked: then an install of what lies behind the log, `awaited` before, waits yet for this very entry
    /// to be applied, and nothing comes into the log meanwhile. Like any install it may go further than it was asked to.
    fn may_go_on_from(&self, offer: &Offer, awaited: Option<LogId>) -> bool {
        let last = self.log.last();
        offer.meta.last_log_id <= last || (last < awaited && awaited == self.peers.awaited())
    }

    /// The state of a peer took the place of this one.
    fn go_on_from(&mut self, meta: SnapshotMeta) {
        let at = meta.last_log_id.expect("begin_install refuses a snapshot of nothing");
        let mut history = self.history.lock().expect("nothing panics while it holds this lock");
        history.terms = BTreeMap::from([(at.index, term_of(&at))]);
        history.memberships = BTreeMap::from([(at.index, meta.last_membership.clone())]);
        drop(history);
        self.last_applied = Some(at);
        self.membership = meta.last_membership;
    }

    /// Takes over the state of a peer, or a newer one when that peer cannot give it.
    async fn take_over(&mut self, mut offer: Offer) -> std::io::Result<SnapshotMeta> {
        let least = offer.meta.last_log_id;
        while !self.try_take_over(&offer).await? {
            loop {
                if self.peers.is_closing() {
                    return Err(io_error("closed during the install of a snapshot"));
                }
                R::sleep(INSTALL_RETRY).await;
                match self.peers.offer(least).await {
                    Ok(next) => {
                        offer = next;
                        break;
                    }
                    Err(error) => tracing::debug!(%error, "no snapshot to be had yet"),
                }
            }
        }
        Ok(offer.meta)
    }

    /// One attempt to take over the state of a peer. False, with nothing changed, when the peer could not give all of it or
    /// there is no space for it: worth another.
    async fn try_take_over(&mut self, offer: &Offer) -> std::io::Result<bool> {
        let source = Arc::new(Source { peers: self.peers.clone(), from: offer.from, failed: Mutex::new(None) });
        let naming = Some((self.log.clone(), offer.meta.clone(), self.state.flushed()));
        let shared = SharedSource { source: source.clone(), naming };
        let at = LogIndex(offer.meta.last_log_id.map_or(0, |id| id.index));
        let error = match self.state.import(at, offer.manifest.clone(), &shared).await {
            Ok(index) if index == at => return Ok(true),
            Ok(index) => {
                return Err(io_error(format!("the snapshot held another index index={index} meta={}", offer.meta)));
            }
            Err(error) => error,
        };
        // Not of this volume, though openraft would take it for that: what others sent is damaged, or of another version.
        let foreign = source.failed.lock().expect("nothing panics while it holds this lock").is_some()
            || matches!(error.kind(), EngineErrorKind::Corrupt | EngineErrorKind::Foreign);
        if !foreign && error.kind() != EngineErrorKind::OutOfSpace {
            return Err(io_error(format!("a snapshot could not be installed: {error}")));
        }
        tracing::warn!(from = offer.from, %error, "a snapshot is not complete: the members are asked again");
        Ok(false)
    }
}

impl<R: Runtime, S: State> RaftStateMachine<TypeConfig<R>> for StateMachine<R, S> {
    type SnapshotData = SnapshotHandle;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> std::io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> std::io::Result<()>
    where
        Strm: Stream<Item = std::io::Result<EntryResponder<TypeConfig<R>>>> + Unpin + OptionalSend,
    {
        while let Some(item) = entries.next().await {
            let (mut entry, responder) = item?;
            let id = entry.log_id;
            let index = LogIndex(id.index);
            // An install may have taken the state further than openraft asked for: those entries are in it.
            let mut fresh = index > self.state.applied();
            if self.log.take_unread(id.index) && fresh {
                self.log.note_awaited(Some(id.index));
                let found = self.find_entry(id).await?;
                self.log.note_awaited(None);
                match found {
                    Some(found) if found.log_id == id => entry = found,
                    Some(found) => {
                        return Err(io_error(format!("another entry is there wanted={id} found={}", found.log_id)));
                    }
                    None => fresh = false,
                }
            }
            // The two are equal only until the first entry after a restart.
            if mainstay_io::mutant!(ReplaySkipsOne) && index.0 > 1 && self.state.applied() == self.state.flushed() {
                self.state.skip(index);
                fresh = false;
            }
            let reply = match &entry.payload {
                EntryPayload::Normal(payload) if fresh => {
                    let command = Command::decode(&payload.bytes)
                        .map_err(|e| io_error(format!("a committed command cannot be read index={index}: {e}")))?;
                    Reply(self.apply_command(id, &command).await?)
                }
                EntryPayload::Normal(_) => Reply(None),
                EntryPayload::Blank | EntryPayload::Membership(_) => {
                    if fresh {
                        self.state.skip(index);
                    }
                    Reply(None)
                }
            };
            if self.last_applied.is_none_or(|last| last < id) {
                let mut history = self.history.lock().expect("nothing panics while it holds this lock");
                history.add(&id);
                if let Some(membership) = entry.payload.get_membership() {
                    self.membership = StoredMembership::new(Some(id), membership);
                    history.memberships.insert(id.index, self.membership.clone());
                }
                self.last_applied = Some(id);
            }
            self.told = self.told.max(id.index);
            self.progress.advance(id.index + u64::from(mainstay_io::mutant!(ProgressAhead)));
            if let Some(lag) = &self.apply_lag {
                lag.applied(id.index);
            }
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    /// Refuses while the tables are ahead of what openraft knows: after an install of a newer snapshot than it asked
    /// for, the name of the present one would lie beyond its applied entries, which it takes for a broken state.
    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<Self::SnapshotBuilder> {
        (self.state.flushed().0 <= self.told).then(|| Builder(self.current()))
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        Builder(self.current())
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotHandle) -> std::io::Result<()> {
        let (manifest, from) = match snapshot {
            SnapshotHandle::Remote { manifest, from } => (manifest, from),
            // What this node exported: it holds the tables and asks nobody.
            SnapshotHandle::Local(export) => (export.manifest, 0),
        };
        let asked = meta.last_log_id.map_or(0, |id| id.index);
        let applied = self.state.applied().0;
        if meta.last_log_id.is_some() && asked <= applied && meta.last_log_id <= self.last_applied {
            if self.log.last() < meta.last_log_id {
                // An entry that waited has gone further. The log is about to be purged up to here, and knows no membership of here.
                while !self.log.begin_install(meta, self.state.flushed()).await? {
                    if self.peers.is_closing() {
                        return Err(io_error("closed during the install of a snapshot"));
                    }
                    tracing::warn!("{NO_ROOM}");
                    R::sleep(INSTALL_RETRY).await;
                }
            }
            self.told = self.told.max(asked);
            self.progress.advance(applied);
            return Ok(());
        }
        let offer = Offer { meta: meta.clone(), manifest, from };
        let meta = self.take_over(offer).await?;
        self.told = self.told.max(asked);
        let at = meta.last_log_id.map_or(0, |id| id.index);
        self.go_on_from(meta);
        self.progress.advance(at);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> std::io::Result<Option<RaftSnapshot>> {
        if self.state.flushed().0 == 0 {
            return Ok(None);
        }
        self.current().map(Some)
    }
}

/// A snapshot that has been named already.
pub(crate) struct Builder(std::io::Result<RaftSnapshot>);

impl<R: Runtime> RaftSnapshotBuilder<TypeConfig<R>> for Builder {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> std::io::Result<RaftSnapshot> {
        match &self.0 {
            Ok(snapshot) => Ok(snapshot.clone()),
            Err(error) => Err(io_error(error)),
        }
    }
}
