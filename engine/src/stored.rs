//! Tables on this volume: their extents, the open reader, and when the extents are given back.
//!
//! # Place
//! above `volume` and `table`; the group holds a [`StoredTable`] for every table that its present manifest names
//! # Invariants
//! 1. Extents go back to the volume when the table is obsolete (no durable manifest names it) and the last reader that
//!    held it is gone, whichever comes later.
//! 2. A table that is not obsolete keeps its extents when it is dropped: the volume is being closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use mainstay_io::{AlignedBytes, BoxFuture, IoClass};

use crate::cache::BlockCache;
use crate::gather::Gather;
use crate::heal::GroupHeal;
use crate::manifest::TableRef;
use crate::memory::MemoryBudget;
use crate::table::{Table, TableBytes, TableMeta};
use crate::volume::{Extent, Reservation, Volume, extents_bytes};
use crate::{Error, ErrorKind, InstallTable, Result, TableId};

/// Bytes reserved at a time once an estimate was too low.
const RESERVE_MORE_BYTES: u64 = 4 << 20;

/// The bytes of a table in its extents.
pub(crate) struct StoredBytes {
    volume: Volume,
    pub(crate) extents: Vec<Extent>,
    bytes: u64,
    obsolete: AtomicBool,
}

impl StoredBytes {
    pub(crate) fn new(volume: Volume, extents: Vec<Extent>, bytes: u64) -> Arc<Self> {
        Arc::new(Self { volume, extents, bytes, obsolete: AtomicBool::new(false) })
    }

    /// No durable manifest names the table: the last reader gives its extents back.
    pub(crate) fn set_obsolete(&self) {
        self.obsolete.store(true, Ordering::Release);
    }

    /// A manifest names the table after all.
    pub(crate) fn set_live(&self) {
        self.obsolete.store(false, Ordering::Release);
    }

    /// As [`TableBytes::read`], behind what readers wait for.
    pub(crate) fn read_behind(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
        if let Err(error) = self.check(offset, length as u64) {
            return Box::pin(std::future::ready(Err(error)));
        }
        self.volume.read(&self.extents, offset, length, IoClass::Background)
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Corrupt,
                format!("a read beyond the end of a table offset={offset} length={length} bytes={}", self.bytes),
            )),
        }
    }
}

impl std::fmt::Debug for StoredBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredBytes")
            .field("extents", &self.extents)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl TableBytes for StoredBytes {
    fn read(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
        if let Err(error) = self.check(offset, length as u64) {
            return Box::pin(std::future::ready(Err(error)));
        }
        self.volume.read(&self.extents, offset, length, IoClass::Foreground)
    }

    fn read_in(&self, offset: u64, length: usize, reads: &Gather) -> BoxFuture<Result<Bytes>> {
        if let Err(error) = self.check(offset, length as u64) {
            return Box::pin(std::future::ready(Err(error)));
        }
        self.volume.read_in(&self.extents, offset, length, reads)
    }
}

impl Drop for StoredBytes {
    fn drop(&mut self) {
        if *self.obsolete.get_mut() {
            self.volume.free(std::mem::take(&mut self.extents));
        }
    }
}

/// The bytes of a table for its reader: from here, or from other replicas when they are damaged here.
struct HealedBytes {
    bytes: Arc<StoredBytes>,
    id: TableId,
    heal: Option<Arc<GroupHeal>>,
}

impl TableBytes for HealedBytes {
    fn read(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
        self.bytes.read(offset, length)
    }

    fn read_in(&self, offset: u64, length: usize, reads: &Gather) -> BoxFuture<Result<Bytes>> {
        self.bytes.read_in(offset, length, reads)
    }

    fn found_damaged(&self) -> usize {
        let Some(heal) = &self.heal else { return 0 };
        heal.found(self.id);
        heal.peers().map_or(0, |peers| peers.count())
    }

    fn read_elsewhere(&self, copy: usize, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
        match (&self.heal, self.bytes.check(offset, length as u64)) {
            (Some(heal), Ok(())) => heal.read(copy, self.id, offset, length as u64),
            (_, Err(error)) => Box::pin(std::future::ready(Err(error))),
            (None, Ok(())) => {
                let error = Error::new(ErrorKind::NotFound, format!("no other replica to ask table={}", self.id));
                Box::pin(std::future::ready(Err(error)))
            }
        }
    }

    fn served_elsewhere(&self) {
        if let Some(heal) = &self.heal {
            heal.counts.reads_served.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A table of the present manifest.
#[derive(Clone)]
pub(crate) struct StoredTable {
    pub(crate) meta: TableRef,
    pub(crate) table: Arc<Table>,
    pub(crate) bytes: Arc<StoredBytes>,
}

impl StoredTable {
    pub(crate) fn open(
        meta: TableRef,
        bytes: Arc<StoredBytes>,
        cache: &Arc<BlockCache>,
        budget: &Arc<MemoryBudget>,
        heal: Option<&Arc<GroupHeal>>,
    ) -> Result<Self> {
        let reads = HealedBytes { bytes: bytes.clone(), id: meta.id, heal: heal.cloned() };
        let table = Table::open(table_meta(&meta), Arc::new(reads), cache, budget)?;
        Ok(Self { meta, table: Arc::new(table), bytes })
    }

    pub(crate) fn place(&self) -> Vec<(u64, u64)> {
        self.bytes.extents.iter().map(|e| (e.first_unit.into(), e.units.into())).collect()
    }
}

fn table_meta(meta: &InstallTable) -> TableMeta {
    TableMeta {
        first: meta.first.clone(),
        last: meta.last.clone(),
        entries: meta.entries,
        tombstones: meta.tombstones,
        bytes: meta.bytes,
        digest: meta.digest,
        root: meta.root.clone(),
        ranges: meta.ranges.clone(),
    }
}

/// Extents of a place as the manifest stores it.
///
/// # Errors
/// `Corrupt` for numbers that no volume has.
pub(crate) fn extents_of(place: &[(u64, u64)]) -> Result<Vec<Extent>> {
    let corrupt = || Error::new(ErrorKind::Corrupt, "an extent lies outside of every volume");
    let extent = |&(first_unit, units): &(u64, u64)| {
        let first_unit = u32::try_from(first_unit).map_err(|_| corrupt())?;
        let units = u32::try_from(units).map_err(|_| corrupt())?;
        Ok(Extent { first_unit, units })
    };
    place.iter().map(extent).collect()
}

/// Writes bytes one after the other into extents as they come. Dropped before [`ExtentWriter::finish`] it gives all back.
pub(crate) struct ExtentWriter<'a> {
    volume: &'a Volume,
    extents: Vec<Extent>,
    written: u64,
    /// Counts what is written.
    counted: &'a AtomicU64,
}

impl<'a> ExtentWriter<'a> {
    pub(crate) fn new(volume: &'a Volume, counted: &'a AtomicU64) -> Self {
        Self { volume, extents: Vec::new(), written: 0, counted }
    }

    /// Writes whole blocks into space of the reservation; not durable until [`Volume::flush`].
    ///
    /// # Errors
    /// `OutOfSpace`, `Io`.
    pub(crate) async fn write(&mut self, reservation: &mut Reservation, chunks: Vec<AlignedBytes>) -> Result<()> {
        let bytes: u64 = chunks.iter().map(|c| c.len() as u64).sum();
        let end = self.written + bytes;
        let missing = end.saturating_sub(extents_bytes(&self.extents));
        if missing > 0 {
            if missing > reservation.bytes() {
                // The estimate was too low: what is left of it goes back.
                *reservation = self.volume.reserve(missing.max(RESERVE_MORE_BYTES)).await?;
            }
            join(&mut self.extents, reservation.take(missing)?);
        }
        self.volume.write(&self.extents, self.written, chunks).await?;
        self.written = end;
        self.counted.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// The extents.
    pub(crate) fn finish(mut self) -> Vec<Extent> {
        std::mem::take(&mut self.extents)
    }
}

impl Drop for ExtentWriter<'_> {
    fn drop(&mut self) {
        if !self.extents.is_empty() {
            self.volume.free(std::mem::take(&mut self.extents));
        }
    }
}

/// Appends extents and joins neighbours.
fn join(extents: &mut Vec<Extent>, more: Vec<Extent>) {
    for next in more {
        match extents.last_mut() {
            Some(last) if last.first_unit.checked_add(last.units) == Some(next.first_unit) => last.units += next.units,
            _ => extents.push(next),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined() {
        let extent = |first_unit, units| Extent { first_unit, units };
        let mut extents = vec![extent(0, 2)];
        join(&mut extents, vec![extent(2, 3), extent(9, 1)]);
        assert_eq!(extents, [extent(0, 5), extent(9, 1)]);
    }
}
