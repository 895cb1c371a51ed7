//! Makes present what the manifest names and this volume does not hold, or holds damaged: by fetching it from other replicas.
//!
//! # Place
//! driven by `engine::mend`, one call at a time for each group
//! # Invariants
//! 1. A table that was made anew takes the place of the damaged one in memory first, then in durable pages; only then the
//!    extents of the damaged one are given back. A crash in between finds the damaged one again, and mends again.
//! 2. Nothing that was fetched is used before it has the digest that the manifest names.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::{BLOCK_BYTES, BoxFuture};
use xxhash_rust::xxh3::Xxh3;

use super::core::Structure;
use super::jobs::Output;
use super::transfer::Fetched;
use super::{GroupShared, TableSource};
use crate::heal::{GroupHeal, vote};
use crate::manifest::{ManifestOp, TableRef};
use crate::stored::{StoredBytes, StoredTable};
use crate::{Error, ErrorKind, EventKind, JobId, Result, TableId};

/// Other replicas that are asked for one table at most.
const COPIES_ASKED_MAX: usize = 16;
/// Bytes of one read of a whole table.
pub(crate) const CHECK_READ_BYTES: u64 = 256 << 10;

/// One other replica.
struct OneCopy<'a> {
    heal: &'a GroupHeal,
    copy: usize,
}

impl TableSource for OneCopy<'_> {
    fn read_table(&self, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        self.heal.read(self.copy, id, offset, length)
    }
}

/// All copies, this one included: each block as two of them have it. For a table of which no copy is whole.
struct Voted {
    heal: Arc<GroupHeal>,
    local: Option<Arc<StoredBytes>>,
    copies: usize,
}

impl TableSource for Voted {
    fn read_table(&self, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        let (heal, local, count) = (self.heal.clone(), self.local.clone(), self.copies);
        Box::pin(async move {
            let mut copies = Vec::with_capacity(count.saturating_add(1));
            if let Some(local) = local {
                copies.push(read_what_can_be(offset, length, |at, bytes| local.read_behind(at, bytes as usize)).await);
            }
            for copy in 0..count {
                copies.push(read_what_can_be(offset, length, |at, bytes| heal.read(copy, id, at, bytes)).await);
            }
            let voted = usize::try_from(length).ok().and_then(|length| vote(&copies, length));
            voted.map(Bytes::from).ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, format!("no copy of a table can be read table={id} offset={offset}"))
            })
        })
    }
}

/// The bytes of one copy, with zeroes for blocks that cannot be read; none when nothing can.
async fn read_what_can_be(
    offset: u64,
    length: u64,
    read: impl Fn(u64, u64) -> BoxFuture<Result<Bytes>>,
) -> Option<Bytes> {
    let error = match read(offset, length).await {
        Ok(bytes) => return (bytes.len() as u64 == length).then_some(bytes),
        Err(error) => error,
    };
    if !matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt) {
        return None;
    }
    let block = BLOCK_BYTES as u64;
    let mut out = Vec::new();
    let mut any = false;
    while (out.len() as u64) < length {
        let bytes = block.min(length - out.len() as u64);
        match read(offset + out.len() as u64, bytes).await {
            Ok(part) if part.len() as u64 == bytes => {
                any = true;
                out.extend_from_slice(&part);
            }
            _ => out.resize(out.len() + bytes as usize, 0),
        }
    }
    any.then(|| out.into())
}

impl GroupShared {
    /// When there is something to mend or to try again, on the clock; none when all is well, or nobody can help.
    pub(crate) fn mend_due(&self, now: Duration) -> Option<Duration> {
        let helped = self.heal.peers().is_some();
        let damaged = self.heal.list().into_iter().filter(|_| helped).map(|(_, retry)| retry.at);
        let core = self.lock();
        let jobs = core.stuck.values().filter(|stuck| !stuck.over && stuck.retry.at > now).map(|s| s.retry.at);
        let fetch = (helped && !self.absent(&core).is_empty()).then_some(core.fetch.at);
        damaged.chain(jobs).chain(fetch).min()
    }

    /// Does what is due.
    pub(crate) async fn mend(self: &Arc<Self>) {
        let clock = &self.engine.environment.clock;
        let now = clock.now();
        if self.lock().stuck.values().any(|stuck| !stuck.over && stuck.retry.at <= now) {
            self.engine.work.notify_one();
        }
        if self.failed.get().is_some() || self.heal.peers().is_none() {
            return;
        }
        for (id, retry) in self.heal.list() {
            if retry.at <= now
                && let Err(error) = self.mend_table(id).await
            {
                tracing::warn!(group = %self.id, table = %id, attempts = retry.attempts, %error,
                    "a damaged table cannot be made anew yet");
                self.heal.failed(id, clock.now());
            }
        }
        let absent = {
            let core = self.lock();
            if core.fetch.at <= now { self.absent(&core) } else { Vec::new() }
        };
        for (job, tables) in absent {
            let fetched = match self.fetch_install(job, tables).await {
                // The others have replaced them already: so will this one.
                Err(error) if error.kind() == ErrorKind::NotFound => self.leap().await,
                fetched => fetched,
            };
            if let Err(error) = fetched {
                tracing::warn!(group = %self.id, %job, %error, "the tables of an install cannot be fetched yet");
                self.lock().fetch.failed(clock.now());
                return;
            }
        }
    }

    /// Installs that wait for tables that this replica will not make.
    fn absent(&self, core: &super::core::Core) -> Vec<(JobId, Vec<TableRef>)> {
        let installs = core.queue.iter().flat_map(|edit| &edit.ops).filter_map(|op| match op {
            ManifestOp::Install { job, tables } => Some((*job, tables)),
            _ => None,
        });
        let needed = |job: &JobId| {
            (core.diverged.contains(job) || core.stuck.contains_key(job))
                && !core.done.contains_key(job)
                && !core.running.contains(job)
        };
        installs.filter(|(job, _)| needed(job)).map(|(job, tables)| (job, tables.clone())).collect()
    }

    async fn fetch_install(self: &Arc<Self>, job: JobId, tables: Vec<TableRef>) -> Result<()> {
        let lineage = self.lock().lineage;
        let mut fetched = Fetched::default();
        for meta in tables {
            fetched.0.push(self.fetch_from_peers(meta, None).await?);
        }
        self.engine.volume.flush().await?;
        let mut core = self.lock();
        let known = core.logical.jobs.contains_key(&job) || core.present.jobs.contains_key(&job);
        if core.lineage != lineage || !known || core.done.contains_key(&job) || core.running.contains(&job) {
            return Ok(());
        }
        self.heal.counts.tables_fetched.fetch_add(fetched.0.len() as u64, Ordering::Relaxed);
        core.done.insert(job, Output { tables: std::mem::take(&mut fetched.0) });
        core.fetch = Default::default();
        self.advance(&mut core);
        self.publish(&mut core, self.applied());
        tracing::info!(group = %self.id, %job, "the tables of an install were fetched from other replicas");
        Ok(())
    }

    /// Makes the present manifest the logical one in one step, with the tables that are not held fetched. Tables that were
    /// made and replaced in between are never needed.
    async fn leap(self: &Arc<Self>) -> Result<()> {
        let (lineage, index, wanted) = {
            let core = self.lock();
            (core.lineage, core.logical.as_of, core.logical.tables())
        };
        let mut fetched = Fetched::default();
        for (id, meta) in wanted {
            let held = {
                let core = self.lock();
                let mut all = core.tables.get(&id).into_iter().chain(core.done.values().flat_map(|o| &o.tables));
                all.any(|stored| stored.meta == meta)
            };
            if !held {
                fetched.0.push(self.fetch_from_peers(meta, None).await?);
            }
        }
        self.engine.volume.flush().await?;
        let mut core = self.lock();
        if core.lineage != lineage || core.logical.as_of < index {
            return Ok(());
        }
        // The edits in between name tables that lie nowhere: only pages can hold the outcome.
        self.break_edits();
        for stored in std::mem::take(&mut fetched.0) {
            match core.tables.entry(stored.meta.id) {
                std::collections::btree_map::Entry::Vacant(place) => {
                    self.heal.counts.tables_fetched.fetch_add(1, Ordering::Relaxed);
                    place.insert(stored);
                }
                std::collections::btree_map::Entry::Occupied(_) => stored.bytes.set_obsolete(),
            }
        }
        while core.queue.front().is_some_and(|edit| edit.index <= index) {
            let Some(edit) = core.queue.pop_front() else { break };
            for op in &edit.ops {
                let ManifestOp::Install { job, tables } = op else { continue };
                let other = |output: &Output| !output.tables.iter().map(|t| &t.meta).eq(tables);
                if core.done.get(job).is_some_and(other) {
                    self.divergences.fetch_add(1, Ordering::Relaxed);
                    core.done.remove(job).into_iter().for_each(super::jobs::discard);
                }
            }
            self.make_present(&mut core, &edit);
        }
        core.fetch = Default::default();
        core.overlay = None;
        core.drop_flushed_memtables();
        self.advance(&mut core);
        self.publish(&mut core, self.applied());
        drop(core);
        tracing::info!(group = %self.id, %index, "the tables of the manifest were fetched from other replicas");
        self.engine.work.notify_one();
        self.engine.want_pages();
        Ok(())
    }

    /// A table with the digest of `meta`, from whichever replica has it whole, or of what each has whole.
    pub(super) async fn fetch_from_peers(
        &self,
        meta: TableRef,
        local: Option<&Arc<StoredBytes>>,
    ) -> Result<StoredTable> {
        let count = self.heal.peers().map_or(0, |peers| peers.count()).min(COPIES_ASKED_MAX);
        let mut last = Error::new(ErrorKind::NotFound, format!("no other replica to ask table={}", meta.id));
        let mut damaged = 0;
        for copy in 0..count {
            match self.fetch(meta.clone(), &OneCopy { heal: &self.heal, copy }).await {
                Ok(stored) => return Ok(stored),
                Err(error) if error.kind() == ErrorKind::OutOfSpace => return Err(error),
                Err(error) => {
                    damaged += usize::from(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io));
                    last = error;
                }
            }
        }
        if damaged == 0 {
            return Err(last);
        }
        let all = Voted { heal: self.heal.clone(), local: local.cloned(), copies: count };
        self.fetch(meta, &all).await
    }

    async fn mend_table(self: &Arc<Self>, id: TableId) -> Result<()> {
        let Some(stored) = self.lock().tables.get(&id).cloned() else {
            self.heal.forget(id);
            return Ok(());
        };
        // An error that has passed by itself.
        if matches!(digest_of(&stored.bytes, stored.meta.bytes).await, Ok(digest) if digest == stored.meta.digest) {
            self.heal.forget(id);
            return Ok(());
        }
        let mut fetched = Fetched(vec![self.fetch_from_peers(stored.meta.clone(), Some(&stored.bytes)).await?]);
        self.engine.volume.flush().await?;
        let turn = self.engine.pages_turn().await;
        {
            let mut core = self.lock();
            match core.tables.get(&id) {
                Some(held) if Arc::ptr_eq(&held.bytes, &stored.bytes) => {}
                // It was compacted away meanwhile, or taken over from elsewhere.
                _ => {
                    self.heal.forget(id);
                    return Ok(());
                }
            }
            let Some(new) = fetched.0.pop() else { return Ok(()) };
            core.tables.insert(id, new);
            self.replace(stored);
            // Views keep the tables of a version that has not changed: here one has.
            self.publish_over(&mut core, self.applied(), &Structure::default());
            // What failed for this table may go on.
            for stuck in core.stuck.values_mut().filter(|stuck| !stuck.over) {
                stuck.retry.at = Duration::ZERO;
            }
        }
        self.heal.forget(id);
        tracing::info!(group = %self.id, table = %id, "a damaged table was made anew from other replicas");
        self.engine.work.notify_one();
        if let Err(error) = self.engine.write_pages(&turn, None).await {
            tracing::warn!(%error, "the place of a mended table is not durable yet");
            self.engine.want_pages();
        }
        // Not before its place was to be made durable: until it is, the next open finds the table damaged again.
        self.heal.counts.tables_healed.fetch_add(1, Ordering::Relaxed);
        self.engine.events.tell(Some(self.id), || EventKind::TableHealed { table: id });
        Ok(())
    }

    /// Writes what no entry says, as broken memory would. False when nothing was written since the last rotation.
    pub(crate) fn disturb_memtable(&self, key: &[u8], value: &'static [u8]) -> bool {
        let core = self.lock();
        let Some((_, active)) = core.memtables.iter().next_back().filter(|(key, _)| key.0 >= core.active) else {
            return false;
        };
        active.insert(key, self.applied(), Some(&Bytes::from_static(value)));
        true
    }

    /// The digests of the tables that a job made here and that no install has named yet.
    pub(super) fn digests_of(&self, job: JobId) -> Option<Vec<u128>> {
        let core = self.lock();
        core.done.get(&job).map(|output| output.tables.iter().map(|stored| stored.meta.digest).collect())
    }

    /// Most others made other tables of a job: those of this replica are given up, and those that the log will name fetched.
    pub(super) fn give_up_output(&self, job: JobId) {
        let mut core = self.lock();
        let Some(output) = core.done.remove(&job) else { return };
        super::jobs::discard(output);
        self.divergences.fetch_add(1, Ordering::Relaxed);
        core.diverged.insert(job);
        core.offered.remove(&job);
        core.fetch = Default::default();
        self.publish(&mut core, self.applied());
        drop(core);
        tracing::error!(group = %self.id, %job, "most replicas made other tables than this one");
        self.heal.counts.work.notify_one();
    }

    /// The tables that the present manifest names, for the scrubber.
    pub(crate) fn stored_tables(&self) -> Vec<StoredTable> {
        self.lock().tables.values().cloned().collect()
    }
}

/// The digest of a table as it lies here.
pub(crate) async fn digest_of(bytes: &StoredBytes, length: u64) -> Result<u128> {
    let mut digest = Xxh3::new();
    let mut offset = 0;
    while offset < length {
        let part = CHECK_READ_BYTES.min(length - offset);
        digest.update(&bytes.read_behind(offset, part as usize).await?);
        offset += part;
    }
    Ok(digest.digest128())
}
