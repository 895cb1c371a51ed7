//! The flushed state of a group on its way from one replica to another.
//!
//! # Invariants
//! 1. A receiver trusts nothing but the manifest: every table that it fetches has the digest that the manifest names.
//! 2. The new state replaces the old one by one superblock update: a crash leaves one or the other, and edits of the old
//!    one are told by their lineage.
//! 3. What the old state alone named is given back after that update.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use mainstay_io::{AlignedBuf, BLOCK_BYTES};
use xxhash_rust::xxh3::Xxh3;

use super::core::Core;
use super::{GroupShared, TableSource};
use crate::manifest::{Manifest, TableRef};
use crate::stored::{ExtentWriter, StoredBytes, StoredTable};
use crate::table::TableBytes;
use crate::{Error, ErrorKind, LogIndex, Result, TableId};

/// The encoding of an export written today.
pub(crate) const EXPORT_VERSION: u8 = 1;
/// Bytes asked for at a time.
const FETCH_BYTES: u64 = 1 << 20;

/// The tables that an export names.
#[derive(Debug)]
pub(super) struct Pins(BTreeMap<TableId, Arc<StoredBytes>>);

/// The flushed state, pinned for a receiver: tables are not freed while it lives.
#[derive(Clone, Debug)]
pub struct Export {
    /// Entries up to here are in the tables.
    pub flushed: LogIndex,
    /// Opaque to the owner: what [`crate::Group::import`] takes.
    pub manifest: Bytes,
    #[allow(dead_code, reason = "held for what its drop does")]
    pins: Arc<Pins>,
}

impl GroupShared {
    pub(super) fn export_flushed(&self) -> Result<Export> {
        self.check_alive()?;
        let core = self.lock();
        let pins = Arc::new(Pins(core.tables.iter().map(|(&id, stored)| (id, stored.bytes.clone())).collect()));
        let mut manifest = vec![EXPORT_VERSION];
        manifest.extend_from_slice(&core.present.encode(None));
        let export = Export { flushed: core.present.flushed(), manifest: manifest.into(), pins: pins.clone() };
        drop(core);
        let mut all = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|pins| pins.strong_count() > 0);
        all.push(Arc::downgrade(&pins));
        Ok(export)
    }

    pub(super) async fn read_stored(&self, id: TableId, offset: u64, length: u64) -> Result<Bytes> {
        let held = self.lock().tables.get(&id).map(|stored| stored.bytes.clone());
        let bytes = held.or_else(|| {
            let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
            pins.iter().filter_map(std::sync::Weak::upgrade).find_map(|pins| pins.0.get(&id).cloned())
        });
        let Some(bytes) = bytes else {
            return Err(Error::new(ErrorKind::NotFound, format!("no such table table={id}")));
        };
        let length = usize::try_from(length).map_err(|_| Error::new(ErrorKind::Invalid, "a read is too long"))?;
        bytes.read(offset, length).await
    }

    pub(super) async fn import_state(self: &Arc<Self>, bytes: Bytes, source: &dyn TableSource) -> Result<LogIndex> {
        self.check_alive()?;
        match bytes.first() {
            Some(&EXPORT_VERSION) => {}
            Some(version) => {
                return Err(Error::new(ErrorKind::Foreign, format!("an export of another version version={version}")));
            }
            None => return Err(Error::new(ErrorKind::Corrupt, "an export is empty")),
        }
        let (manifest, _) = Manifest::decode(bytes.slice(1..))?;
        super::require_operators(&manifest, &self.lock().operators)?;
        let mut fetched = Fetched::default();
        let mut tables = BTreeMap::new();
        for (id, meta) in manifest.tables() {
            // A table that is held has the bytes that its digest names.
            let held = self.lock().tables.get(&id).filter(|stored| stored.meta == meta).cloned();
            let stored = match held {
                Some(stored) => stored,
                None => {
                    let stored = match self.fetch(meta.clone(), source).await {
                        // What the source holds is damaged: the other replicas hold the same table.
                        Err(error) if error.kind() == ErrorKind::Corrupt => {
                            self.fetch_from_peers(meta, None).await.map_err(|_| error)?
                        }
                        stored => stored?,
                    };
                    fetched.0.push(stored.clone());
                    stored
                }
            };
            tables.insert(id, stored);
        }
        self.engine.volume.flush().await?;
        source.arrived().await?;

        // From here on it is done in a task of its own: once the pages are durable the old state must not be served again,
        // whether the caller still waits or not.
        let (done, outcome) = tokio::sync::oneshot::channel();
        let group = self.clone();
        let task = async move {
            let _ = done.send(group.switch(manifest, tables, fetched).await);
        };
        drop(self.engine.environment.spawner.spawn("mainstay-import", Box::pin(task)));
        outcome.await.map_err(|_| Error::new(ErrorKind::Closed, "the import was ended"))?
    }

    async fn switch(
        self: Arc<Self>,
        manifest: Manifest,
        tables: BTreeMap<TableId, StoredTable>,
        mut fetched: Fetched,
    ) -> Result<LogIndex> {
        // No purge may write the old state over the new one from here on.
        let turn = self.engine.pages_turn().await;
        let lineage = self.lock().lineage + 1;
        let places = tables.iter().map(|(&id, stored)| (id, stored.place())).collect();
        self.engine.write_pages(&turn, Some((self.id, lineage, &manifest, &places))).await?;
        fetched.0.clear();

        let (flushed, as_of) = (manifest.flushed(), manifest.as_of);
        let mut core = self.lock();
        let old = {
            let operators = core.operators.clone();
            std::mem::replace(&mut *core, Core::new(lineage, manifest, tables, false, operators))
        };
        let kept = |stored: &StoredTable| core.tables.get(&stored.meta.id).is_some_and(|now| now.meta == stored.meta);
        let mut doomed: Vec<StoredTable> = old.tables.values().filter(|s| !kept(s)).cloned().collect();
        doomed.extend(self.replaced(lineage, flushed).into_iter().filter(|s| !kept(s)));
        doomed.iter().for_each(|stored| stored.bytes.set_obsolete());
        core.tables.values().for_each(|stored| stored.bytes.set_live());
        self.times.set(flushed, core.clock.time_ms);
        self.applied.store(flushed.0, std::sync::atomic::Ordering::Release);
        self.publish(&mut core, flushed);
        self.applies.notify_waiters();
        drop(core);
        old.done.into_values().for_each(super::jobs::discard);
        drop((doomed, old.tables));
        tracing::info!(group = %self.id, %as_of, %flushed, "the state was replaced by that of another replica");
        if let Some(state_machine) = &self.state_machine {
            state_machine.restored(flushed);
        }
        self.engine.work.notify_one();
        Ok(flushed)
    }

    pub(super) async fn fetch(&self, meta: TableRef, source: &dyn TableSource) -> Result<StoredTable> {
        let engine = &self.engine;
        let mut reservation = engine.volume.reserve(meta.bytes).await?;
        let mut writer = ExtentWriter::new(&engine.volume, &engine.stats.fetched_bytes);
        let mut digest = Xxh3::new();
        let mut offset = 0;
        while offset < meta.bytes {
            let length = FETCH_BYTES.min(meta.bytes - offset);
            let bytes = source.read_table(meta.id, offset, length).await?;
            if bytes.len() as u64 != length {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("a table came short table={} offset={offset} length={length}", meta.id),
                ));
            }
            digest.update(&bytes);
            // Tables are whole blocks long; a hostile length would be padded and then fail its digest.
            debug_assert!(bytes.len().is_multiple_of(BLOCK_BYTES));
            writer.write(&mut reservation, vec![AlignedBuf::copy_from(&bytes).freeze()]).await?;
            offset += length;
        }
        if digest.digest128() != meta.digest {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("a table does not have the digest that the manifest names table={}", meta.id),
            ));
        }
        let bytes = StoredBytes::new(engine.volume.clone(), writer.finish(), meta.bytes);
        StoredTable::open(meta, bytes.clone(), &engine.cache, &engine.budget, Some(&self.heal))
            .inspect_err(|_| bytes.set_obsolete())
    }
}

/// Tables that were fetched and that nothing durable names yet: dropped early, they are given back.
#[derive(Default)]
pub(super) struct Fetched(pub(super) Vec<StoredTable>);

impl Drop for Fetched {
    fn drop(&mut self) {
        self.0.iter().for_each(|stored| stored.bytes.set_obsolete());
    }
}
