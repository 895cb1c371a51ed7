//! A volume: superblock, log zone, extents, and who may use which bytes.
//!
//! # Place
//! above `io::Media`, below the store; knows extents, not tables
//! # Format
//! docs/format.md, section "Superblock"; `superblock` has the bytes, `quorum` the rule that chooses a copy
//! # Invariants
//! 1. At every moment two copies at least of one superblock are whole on the device.
//! 2. The epoch in the superblock is durable before anything is written under it.
//! 3. A freed extent is reused or discarded only after a superblock is durable whose update began after it was freed.
//! 4. A failed superblock write is final: every later update answers `Closed`.
//! 5. A note that its owner has forgotten goes with the next update, and one that is put meanwhile stays.
//! # Crash
//! the table in `quorum`

mod allocator;
mod extent;
mod free_map;
mod inspect;
mod quorum;
pub(crate) mod superblock;
mod turn;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::{
    AlignedBuf, AlignedBytes, BLOCK_BYTES, BoxFuture, Environment, IoClass, Media, Op, SUPERBLOCK_ZONE_BYTES, Spawner,
    WriteMode, Zone,
};
use mainstay_wal::{Lsn, RING_BYTES_MIN};
use tokio::sync::Notify;

pub(crate) use self::allocator::{Reservation, SpaceStats};
pub use self::extent::EXTENT_UNIT_BYTES;
pub(crate) use self::extent::{Extent, extents_bytes};
pub use self::inspect::holds_volume;
pub(crate) use self::inspect::{SuperblockReport, inspect};
pub(crate) use self::superblock::{NOTE_BYTES_MAX, NOTES_BYTES_MAX, ROOT_EXTENTS_MAX, Root, Superblock};

use self::allocator::Allocator;
use self::extent::pieces;
use self::quorum::{Verdict, choose};
use self::superblock::{COPIES, Copy, VOLUME_FORMAT_VERSION_NOTES, copy_offset};
use self::turn::Turnstile;
use crate::gather::Gather;
use crate::{Error, ErrorKind, Result};

/// How long closing waits for operations in flight before it leaks their buffers.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// Units that the extents zone has at least.
const EXTENTS_UNITS_MIN: u64 = 16;

/// An open volume. Cloning gives another handle.
#[derive(Clone)]
pub(crate) struct Volume(Arc<Inner>);

struct Inner {
    media: Arc<dyn Media>,
    superblock_zone: Zone,
    wal_zone: Zone,
    extents_zone: Zone,
    spawner: Arc<dyn Spawner>,
    allocator: Arc<Allocator>,
    /// Held by the one update in progress.
    turnstile: Arc<Turnstile>,
    updates: Arc<Updates>,
    current: Mutex<Current>,
}

/// Tasks of updates that have not ended; each holds the volume open.
#[derive(Default)]
struct Updates {
    running: AtomicUsize,
    ended: Notify,
}

struct Current {
    superblock: Superblock,
    /// Groups whose notes nobody needs any more.
    forgotten: BTreeSet<u64>,
    /// Why nothing is written any more.
    failed: Option<Error>,
}

impl Volume {
    /// Lays out a volume with a log of `wal_bytes` and makes it durable. The identity is empty, the ids are new.
    ///
    /// # Errors
    /// `Invalid` when the target holds something and `force` is not set, when it is too small, or for a `wal_bytes` that
    /// is no multiple of a block or too small; `Io`.
    pub(crate) async fn format(
        media: &dyn Media,
        environment: &Environment,
        wal_bytes: u64,
        force: bool,
    ) -> Result<()> {
        if !wal_bytes.is_multiple_of(BLOCK_BYTES as u64) || wal_bytes < RING_BYTES_MIN {
            let message =
                format!("the log must be a multiple of {BLOCK_BYTES} bytes wal_bytes={wal_bytes} min={RING_BYTES_MIN}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let zone = media.superblock();
        if !media.is_blank()? {
            if !force {
                let message = format!("{} holds data already; format it by force to lose that", media.name());
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            let zeroes = AlignedBuf::zeroed(SUPERBLOCK_ZONE_BYTES as usize).freeze();
            zone.write(0, vec![zeroes], WriteMode::Durable, IoClass::Foreground).await?;
        }
        media.create_zones(wal_bytes).await?;
        let (_, extents) = media.zones(wal_bytes)?;
        check_extents(media, &extents)?;
        let superblock = Superblock {
            volume: environment.random.id(),
            incarnation: environment.random.id(),
            identity: [0; 32],
            sequence: 1,
            parent: 0,
            wal_bytes,
            epoch: 0,
            wal_start: Lsn(0),
            clean_end: None,
            closed: false,
            root: None,
            notes: BTreeMap::new(),
        };
        write_copies(&zone, &superblock).await
    }

    /// Opens the volume: chooses the superblock among its copies, mends the others, and makes a new epoch durable before
    /// anything else is written. Returns the superblock as it was found; [`Volume::superblock`] has the new epoch.
    ///
    /// [`Volume::set_live`] comes next, before space is reserved.
    ///
    /// # Errors
    /// `Foreign` for what is no volume (the message says how to make one) or of a newer format, `Corrupt`, `Io`,
    /// `Invalid` when a zone is missing or too short.
    pub(crate) async fn open(media: Arc<dyn Media>, environment: &Environment) -> Result<(Volume, Superblock)> {
        let zone = media.superblock();
        // What a killed process left in a cache must not be built upon before it is durable.
        zone.flush().await?;
        let copies = read_copies(&zone).await?;
        let found = judge(media.name(), &copies)?;
        mend(&zone, &copies, &found).await?;
        let volume = Self::over(media, environment, found.clone(), None)?;
        volume
            .update(|superblock| {
                superblock.epoch += 1;
                superblock.closed = false;
            })
            .await?;
        Ok((volume, found))
    }

    /// Opens the volume to look at it: nothing is written, and every update is refused.
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub(crate) async fn look(media: Arc<dyn Media>, environment: &Environment) -> Result<(Volume, SuperblockReport)> {
        let report = inspect(&*media).await?;
        let refused = Error::new(ErrorKind::Closed, "the volume was opened to look at it");
        let volume = Self::over(media, environment, report.superblock.clone(), Some(refused))?;
        Ok((volume, report))
    }

    fn over(
        media: Arc<dyn Media>,
        environment: &Environment,
        superblock: Superblock,
        failed: Option<Error>,
    ) -> Result<Volume> {
        let (wal_zone, extents_zone) = media.zones(superblock.wal_bytes)?;
        check_extents(&*media, &extents_zone)?;
        let spawner = environment.spawner.clone();
        Ok(Volume(Arc::new(Inner {
            superblock_zone: media.superblock(),
            wal_zone,
            allocator: Arc::new(Allocator::new(extents_zone.clone(), spawner.clone())),
            extents_zone,
            spawner,
            turnstile: Arc::default(),
            updates: Arc::default(),
            current: Mutex::new(Current { superblock, forgotten: BTreeSet::new(), failed }),
            media,
        })))
    }

    /// The superblock that is durable.
    pub(crate) fn superblock(&self) -> Superblock {
        self.0.current().superblock.clone()
    }

    /// Changes the superblock and makes it durable: copies 0 and 1, then 2 and 3. Updates take turns; `change` sees the
    /// outcome of those before it and does not touch sequence and parent.
    ///
    /// When it returns, what was freed before the call is on its way to be reusable, and so are the extents of the root
    /// that `change` replaced: nobody frees those.
    ///
    /// # Errors
    /// `Closed` after an earlier failure; `Io`; `Invalid` when the root has too many extents (nothing was changed).
    ///
    /// # Cancel safety
    /// A task of its own does the work: a dropped future does not stop it.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Superblock) + Send + 'static) -> BoxFuture<Result<()>> {
        let (done, completer) = Op::<Result<()>>::pending();
        let inner = self.0.clone();
        let updates = inner.updates.clone();
        updates.running.fetch_add(1, Ordering::AcqRel);
        let task = async move {
            let turn = inner.turnstile.enter().await;
            let outcome = inner.update_now(change).await;
            drop(turn);
            match outcome {
                Ok(leaving) => {
                    completer.complete(Ok(Ok(())));
                    inner.allocator.leave(leaving).await;
                }
                Err(error) => completer.complete(Ok(Err(error))),
            }
            // In this order: who waits for the end may open the volume anew.
            drop(inner);
            updates.running.fetch_sub(1, Ordering::AcqRel);
            updates.ended.notify_waiters();
        };
        drop(self.0.spawner.spawn("mainstay-superblock", Box::pin(task)));
        Box::pin(async move { done.await? })
    }

    /// The note of a group.
    pub(crate) fn note(&self, group: u64) -> Option<Bytes> {
        self.0.current().superblock.notes.get(&group).cloned()
    }

    /// Makes a note of a group durable in the place of an earlier one.
    ///
    /// # Errors
    /// As [`Volume::update`]; `OutOfSpace` when the notes of all groups do not fit (nothing was changed).
    pub(crate) fn put_note(&self, group: u64, note: Bytes) -> BoxFuture<Result<()>> {
        self.update(move |superblock| {
            superblock.notes.insert(group, note);
        })
    }

    /// Lets the note of a group go with the next update.
    pub(crate) fn forget_note(&self, group: u64) {
        let mut current = self.0.current();
        if current.superblock.notes.contains_key(&group) {
            current.forgotten.insert(group);
        }
    }

    /// Reads the copies of the superblock and writes those again that are damaged; returns how many.
    ///
    /// # Errors
    /// As [`Volume::update`].
    pub(crate) async fn scrub_superblock(&self) -> Result<u64> {
        let copies = {
            // An update in the middle would look like damage.
            let _turn = self.0.turnstile.enter().await;
            let current = self.superblock();
            let copies = read_copies(&self.0.superblock_zone).await?;
            let same = |copy: &&Copy| matches!(copy, Copy::Whole(found, _) if **found == current);
            copies.iter().filter(|copy| !same(copy)).count()
        };
        if copies > 0 {
            // The next one goes to every copy, in the order that keeps two whole at every moment.
            self.update(|_| {}).await?;
        }
        Ok(copies as u64)
    }

    /// Why neither superblock nor tables can be made durable any more.
    pub(crate) fn failure(&self) -> Option<Error> {
        let superblock = self.0.current().failed.clone();
        superblock.or_else(|| self.0.extents_zone.device().poisoned().map(Error::from))
    }

    /// Waits until no task of an update holds the volume open any more.
    pub(crate) async fn quiet(&self) {
        loop {
            let mut ended = pin!(self.0.updates.ended.notified());
            ended.as_mut().enable();
            if self.0.updates.running.load(Ordering::Acquire) == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Ends the devices and lets another process open the volume. What still holds a table reads `Closed` from here on.
    pub(crate) async fn shutdown(&self) -> Result<()> {
        for device in self.0.media.devices() {
            device.shutdown(SHUTDOWN_GRACE).await?;
        }
        self.0.media.unlock();
        Ok(())
    }

    /// The ring of the log.
    pub(crate) fn wal_zone(&self) -> Zone {
        self.0.wal_zone.clone()
    }

    /// Bytes of the extents zone.
    pub(crate) fn extents_zone_bytes(&self) -> u64 {
        self.0.extents_zone.length()
    }

    /// What the volume lies on.
    pub(crate) fn media(&self) -> &Arc<dyn Media> {
        &self.0.media
    }

    /// Tells which extents are in use; those of the root need not be named. Once, before the first [`Volume::reserve`].
    ///
    /// # Errors
    /// `Corrupt` when one is named twice or lies outside of the volume.
    pub(crate) fn set_live(&self, live: impl IntoIterator<Item = Extent>) -> Result<()> {
        let root = self.0.current().superblock.root.clone().map(|root| root.extents).unwrap_or_default();
        self.0.allocator.set_live(live.into_iter().chain(root))
    }

    /// Sets aside at least `bytes` for a job, so that a full disk is met before it starts.
    ///
    /// # Errors
    /// `OutOfSpace`, of the volume or of the file system below; `Io`, `Closed`.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn reserve(&self, bytes: u64) -> Result<Reservation> {
        self.0.allocator.reserve(bytes).await
    }

    /// Gives extents back that were taken or live. Call it when the edit that drops them is durable and no reader holds
    /// them; they are reusable after the next [`Volume::update`] that begins after this call.
    pub(crate) fn free(&self, extents: Vec<Extent>) {
        self.0.allocator.free(extents);
    }

    /// Bytes of extents in use.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.0.allocator.stats().live_bytes
    }

    /// Bytes of extents by state.
    pub(crate) fn space(&self) -> SpaceStats {
        self.0.allocator.stats()
    }

    /// Writes `bufs` one after the other at byte `offset` of the concatenation of `extents`; offset and lengths are
    /// multiples of [`BLOCK_BYTES`]. Durable after [`Volume::flush`]. The writes start in this call.
    pub(crate) fn write(&self, extents: &[Extent], offset: u64, bufs: Vec<AlignedBytes>) -> BoxFuture<Result<()>> {
        let bytes = bufs.iter().map(|b| b.len() as u64).sum();
        let Some(pieces) = pieces(extents, offset, bytes) else {
            return ready(Err(outside(extents, offset, bytes)));
        };
        let mut bufs = bufs.into_iter();
        let mut next = bufs.next();
        let mut writes = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let mut rest = piece.bytes as usize;
            let mut parts = Vec::new();
            while rest > 0 {
                let Some(buf) = next.take() else { break };
                if buf.len() <= rest {
                    rest -= buf.len();
                    parts.push(buf);
                    next = bufs.next();
                } else {
                    parts.push(buf.slice(0..rest));
                    next = Some(buf.slice(rest..buf.len()));
                    rest = 0;
                }
            }
            let zone = &self.0.extents_zone;
            writes.push(zone.write(piece.zone_offset, parts, WriteMode::Cached, IoClass::Background));
        }
        Box::pin(async move {
            // All are waited for, so that an error does not leave a write behind that the caller thinks is over.
            let mut outcome = Ok(());
            for write in writes {
                if let Err(error) = write.await {
                    outcome = outcome.and(Err(error.into()));
                }
            }
            outcome
        })
    }

    /// Makes the writes durable that were complete before the call.
    pub(crate) fn flush(&self) -> BoxFuture<Result<()>> {
        let flush = self.0.extents_zone.flush();
        Box::pin(async move { Ok(flush.await?) })
    }

    /// Bytes `offset..offset + length` of the concatenation of `extents`; any alignment. Whole blocks are read. Without a
    /// copy when they lie in one extent.
    pub(crate) fn read(
        &self,
        extents: &[Extent],
        offset: u64,
        length: usize,
        class: IoClass,
    ) -> BoxFuture<Result<Bytes>> {
        self.read_by(extents, offset, length, |zone, at, bytes| {
            // It starts here and not when it is polled.
            let read = zone.read(at, AlignedBuf::zeroed(bytes), class);
            async move { Ok(read.await?.freeze()) }
        })
    }

    /// As [`Volume::read`], with its reads added to `reads` instead of started.
    pub(crate) fn read_in(
        &self,
        extents: &[Extent],
        offset: u64,
        length: usize,
        reads: &Gather,
    ) -> BoxFuture<Result<Bytes>> {
        self.read_by(extents, offset, length, |zone, at, bytes| reads.read(zone, at, bytes))
    }

    fn read_by<R>(
        &self,
        extents: &[Extent],
        offset: u64,
        length: usize,
        read: impl Fn(&Zone, u64, usize) -> R,
    ) -> BoxFuture<Result<Bytes>>
    where
        R: Future<Output = mainstay_io::Result<AlignedBytes>> + Send + 'static,
    {
        let block = BLOCK_BYTES as u64;
        let first = offset - offset % block;
        let Some(end) = offset.checked_add(length as u64).and_then(|end| end.checked_next_multiple_of(block)) else {
            return ready(Err(outside(extents, offset, length as u64)));
        };
        let Some(pieces) = pieces(extents, first, end - first) else {
            return ready(Err(outside(extents, offset, length as u64)));
        };
        let zone = &self.0.extents_zone;
        let reads: Vec<R> = pieces.iter().map(|p| read(zone, p.zone_offset, p.bytes as usize)).collect();
        let skip = (offset - first) as usize;
        Box::pin(async move {
            let single = reads.len() == 1;
            let mut joined = if single { Vec::new() } else { Vec::with_capacity((end - first) as usize) };
            for read in reads {
                let part = read.await?;
                if single {
                    return Ok(part.into_bytes().slice(skip..skip + length));
                }
                joined.extend_from_slice(&part);
            }
            Ok(Bytes::from(joined).slice(skip..skip + length))
        })
    }
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volume").field("name", &self.0.media.name()).finish_non_exhaustive()
    }
}

impl Inner {
    fn current(&self) -> MutexGuard<'_, Current> {
        // Every change is one assignment.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller has the turn. Returns the extents that nothing names any more.
    async fn update_now(&self, change: impl FnOnce(&mut Superblock) + Send) -> Result<Vec<Extent>> {
        let (old, forgotten) = {
            let mut current = self.current();
            if let Some(failed) = &current.failed {
                let message = format!("the superblock could not be written before: {failed}");
                return Err(Error::new(ErrorKind::Closed, message));
            }
            (current.superblock.clone(), std::mem::take(&mut current.forgotten))
        };
        // Before `change` looks at anything: what is freed later may still be named by what it writes.
        let mut leaving = self.allocator.parked();
        let mut new = old.clone();
        new.notes.retain(|group, _| !forgotten.contains(group));
        change(&mut new);
        new.sequence = old.sequence + 1;
        new.parent = old.checksum();
        let root_extents = new.root.as_ref().map_or(0, |root| root.extents.len());
        let notes_bytes = new.encoded_notes().len();
        let refused = if root_extents > ROOT_EXTENTS_MAX {
            let message = format!("the root has too many extents extents={root_extents} max={ROOT_EXTENTS_MAX}");
            Some(Error::new(ErrorKind::Invalid, message))
        } else if notes_bytes > NOTES_BYTES_MAX || new.notes.values().any(|note| note.len() > NOTE_BYTES_MAX) {
            let message = format!("the notes do not fit notes_bytes={notes_bytes} max={NOTES_BYTES_MAX}");
            Some(Error::new(ErrorKind::OutOfSpace, message))
        } else {
            None
        };
        if let Some(refused) = refused {
            self.allocator.park_again(leaving);
            self.current().forgotten.extend(forgotten);
            return Err(refused);
        }
        if let Err(error) = write_copies(&self.superblock_zone, &new).await {
            tracing::error!(%error, "the superblock could not be written");
            self.current().failed = Some(error.clone());
            self.allocator.park_again(leaving);
            return Err(error);
        }
        if let Some(root) = old.root
            && new.root.as_ref() != Some(&root)
        {
            let kept = new.root.as_ref().map(|root| root.extents.as_slice()).unwrap_or_default();
            let retired: Vec<Extent> = root.extents.into_iter().filter(|e| !kept.contains(e)).collect();
            self.allocator.retire(&retired);
            leaving.extend(retired);
        }
        self.current().superblock = new;
        Ok(leaving)
    }
}

fn ready<T: Send + 'static>(result: Result<T>) -> BoxFuture<Result<T>> {
    Box::pin(std::future::ready(result))
}

fn outside(extents: &[Extent], offset: u64, bytes: u64) -> Error {
    let message =
        format!("a range reaches out of its extents offset={offset} bytes={bytes} extents={}", extents_bytes(extents));
    Error::new(ErrorKind::Corrupt, message)
}

fn check_extents(media: &dyn Media, extents: &Zone) -> Result<()> {
    if extents.length() < EXTENTS_UNITS_MIN * EXTENT_UNIT_BYTES {
        let (min, have) = (EXTENTS_UNITS_MIN * EXTENT_UNIT_BYTES, extents.length());
        let message = format!("{} has too little room for data extents_bytes={have} min={min}", media.name());
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(())
}

/// Copies 0 and 1 together, then 2 and 3 together, each durable.
async fn write_copies(zone: &Zone, superblock: &Superblock) -> Result<()> {
    for pair in [[0, 1], [2, 3]] {
        let writes = pair.map(|copy| write_copy(zone, superblock, copy));
        let mut outcome = Ok(());
        for write in writes {
            outcome = outcome.and(write.await);
        }
        outcome?;
    }
    Ok(())
}

fn write_copy(zone: &Zone, superblock: &Superblock, copy: usize) -> Op<()> {
    let block = superblock.encode(copy).freeze();
    zone.write(copy_offset(copy), vec![block], WriteMode::Durable, IoClass::Foreground)
}

/// What lies at the place of each copy. A block that cannot be read counts as damaged.
async fn read_copies(zone: &Zone) -> Result<[Copy; COPIES]> {
    let mut copies = [Copy::Damaged, Copy::Damaged, Copy::Damaged, Copy::Damaged];
    for (i, copy) in copies.iter_mut().enumerate() {
        match zone.read(copy_offset(i), AlignedBuf::zeroed(BLOCK_BYTES), IoClass::Foreground).await {
            Ok(block) => *copy = Copy::decode(&block, i),
            Err(error) if error.kind() == mainstay_io::ErrorKind::Media => {
                tracing::warn!(%error, copy = i, "a copy of the superblock cannot be read");
                *copy = Copy::Unreadable;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(copies)
}

fn judge(name: String, copies: &[Copy; COPIES]) -> Result<Superblock> {
    let (row, verdict) = choose(copies);
    let (kind, message) = match verdict {
        Verdict::Take(superblock) => return Ok(*superblock),
        Verdict::NotAVolume => {
            (ErrorKind::Foreign, format!("{name} is not a volume; `mainstay format` makes one of it case={row}"))
        }
        Verdict::FormatCutShort => (
            ErrorKind::Foreign,
            format!("the format of {name} was cut short; run `mainstay format --force` case={row}"),
        ),
        Verdict::NewerFormat(version) => (
            ErrorKind::Foreign,
            format!(
                "{name} was written by a newer release; open it with that one version={version} \
                 supported={VOLUME_FORMAT_VERSION_NOTES} case={row}"
            ),
        ),
        Verdict::Corrupt(why) if copies.contains(&Copy::Unreadable) => (
            ErrorKind::Io,
            format!("{name}: the device does not give all copies of the superblock, and {why} case={row}"),
        ),
        Verdict::Corrupt(why) => (ErrorKind::Corrupt, format!("{name}: {why} case={row}")),
    };
    Err(Error::new(kind, message))
}

/// Writes what was chosen to every copy that differs: first where nothing whole is lost, one at a time.
async fn mend(zone: &Zone, copies: &[Copy; COPIES], chosen: &Superblock) -> Result<()> {
    let same = |copy: &Copy| matches!(copy, Copy::Whole(superblock, _) if **superblock == *chosen);
    let whole = |copy: &Copy| matches!(copy, Copy::Whole(..));
    let damaged = (0..COPIES).filter(|&i| copies.get(i).is_some_and(|c| !whole(c)));
    let stale = (0..COPIES).filter(|&i| copies.get(i).is_some_and(|c| whole(c) && !same(c)));
    for copy in damaged.chain(stale) {
        tracing::warn!(copy, sequence = chosen.sequence, "a copy of the superblock is written again");
        write_copy(zone, chosen, copy).await?;
    }
    Ok(())
}
