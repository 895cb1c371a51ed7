//! The background tasks of an engine: workers that run jobs, and the upkeep that writes manifest pages, cuts the log and lets
//! freed extents go.
//!
//! # Invariants
//! 1. The log is released up to `start` only after a superblock is durable that says so, and whose pages hold every edit
//!    before it. Records that are not durable yet lie behind what was durable when the purge began, so they are never cut.
//! 2. While the volume is full no job starts, but for one attempt each time that something asks for it.
//! 3. A durable write that failed is final: upkeep ends with it, and every group leaves service.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use mainstay_wal::{Lsn, RecordPos};

use super::pages::flushed_of;
use super::{EngineShared, Slot};
use crate::group::{GroupShared, JobClass};
use crate::{Error, ErrorKind, EventKind, Result};

/// Freed bytes that wait for a superblock before one is written for them alone.
const PARKED_BYTES_MAX: u64 = 64 << 20;
/// Between two purges the log has grown by one part of the ring in so many.
const PURGE_SHARE: u64 = 16;

impl EngineShared {
    /// Runs jobs until the engine is closed.
    pub(super) async fn work_on_jobs(self: Arc<Self>) {
        while !self.is_closing() {
            match self.next_job() {
                Some(run) => {
                    // Another worker may find another job.
                    self.work.notify_one();
                    self.run_job(run).await;
                }
                None => self.work.notified().await,
            }
        }
        // The permit that ended this worker ends the next one too.
        self.work.notify_one();
    }

    fn next_job(&self) -> Option<crate::group::Run> {
        let full = self.full.load(Ordering::Acquire);
        if full && !self.retry.swap(false, Ordering::AcqRel) {
            return None;
        }
        let groups: Vec<_> = self.open_groups();
        // Flushes first: they free memory and the log, and are short.
        let job = [JobClass::Flush, JobClass::Compact]
            .into_iter()
            .find_map(|class| groups.iter().find_map(|group| group.next_job(class)));
        if full && job.is_none() {
            // What there was no space for has come to nothing, or was manifest pages.
            if self.pages_wanted.load(Ordering::Acquire) {
                self.upkeep.notify_one();
            } else {
                self.set_full(false);
            }
        }
        job
    }

    async fn run_job(&self, mut run: crate::group::Run) {
        let began = self.environment.clock.now();
        run.tell_begin();
        let outcome = match self.volume.reserve(run.estimated_bytes()).await {
            Ok(mut reservation) => run.execute(&mut reservation).await,
            Err(error) => Err(error),
        };
        match &outcome {
            Err(error) if error.kind() == ErrorKind::OutOfSpace => self.set_full(true),
            _ => self.set_full(false),
        }
        run.tell_end(self.environment.clock.now().saturating_sub(began), &outcome);
        run.let_go();
        run.group().finish_job(&run, outcome);
        if self.volume.space().parked_bytes >= PARKED_BYTES_MAX {
            self.upkeep.notify_one();
        }
    }

    fn set_full(&self, full: bool) {
        if full && !self.space_is_short() {
            // Asked for while there was space, an attempt is taken by no worker: who asks from now on wakes one.
            self.retry.store(false, Ordering::Release);
        }
        if self.full.swap(full, Ordering::AcqRel) == full {
            return;
        }
        self.events.tell(None, || if full { EventKind::Full } else { EventKind::HasSpace });
        if full {
            tracing::warn!(volume = %self.volume.media().name(), "the volume is full: writes are refused, reads go on");
            // What was freed but waits for a superblock may be enough.
            self.upkeep.notify_one();
        } else {
            tracing::info!(volume = %self.volume.media().name(), "the volume has space again");
        }
        self.open_groups().iter().for_each(|group| group.wake());
    }

    pub(crate) fn space_is_short(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    /// Lets one job try whether there is space again.
    pub(crate) fn retry_space(&self) {
        if !self.retry.swap(true, Ordering::AcqRel) {
            self.work.notify_one();
            if self.volume.space().parked_bytes > 0 {
                self.upkeep.notify_one();
            }
        }
    }

    /// Waits until what was freed is free, discarded on the file system or the device.
    pub(crate) async fn give_back(&self) -> Result<()> {
        if self.volume.space().parked_bytes > 0 {
            self.volume.update(|_| {}).await?;
        }
        self.volume.quiet().await;
        Ok(())
    }

    /// Pages are to be written whatever the log looks like.
    pub(crate) fn want_pages(&self) {
        self.pages_wanted.store(true, Ordering::Release);
        self.upkeep.notify_one();
    }

    /// Leaves the volume as upkeep does that found no space for pages, when an attempt was asked for shortly before.
    #[cfg(test)]
    pub(crate) fn find_full(&self) {
        self.retry.store(true, Ordering::Release);
        self.set_full(true);
    }

    /// Asks for a purge when half of the ring is used and the log has grown since the last one.
    pub(crate) fn check_log(&self) {
        if self.log_is_half_full() {
            self.upkeep.notify_one();
        }
    }

    /// Records of the owner find no space: cuts the log, however little it has grown since that was last tried.
    pub(crate) fn relieve_log(&self) {
        if self.log_is_half_full() {
            self.want_pages();
        }
    }

    /// True when writers have to wait until the log is cut.
    pub(crate) fn log_is_nearly_full(&self) -> bool {
        let stats = self.wal().stats();
        stats.used_bytes > stats.ring_bytes / 4 * 3
    }

    /// True when the log has grown enough since it was last cut that cutting it is due, and nothing keeps that from being done.
    pub(crate) fn purge_may_help(&self) -> bool {
        !self.purge_failed.load(Ordering::Acquire) && self.purge_is_due()
    }

    fn purge_is_due(&self) -> bool {
        let grown = self.wal().durable().0.saturating_sub(self.purged_at.load(Ordering::Acquire));
        grown >= self.wal().stats().ring_bytes / PURGE_SHARE
    }

    fn log_is_half_full(&self) -> bool {
        let stats = self.wal().stats();
        stats.used_bytes.saturating_mul(2) > stats.ring_bytes
    }

    /// Keeps the log short and lets freed extents go until the engine is closed.
    pub(crate) async fn keep_up(self: Arc<Self>) {
        loop {
            self.upkeep.notified().await;
            if self.is_closing() {
                return;
            }
            let Err(error) = self.keep_up_once().await else { continue };
            if error.kind() == ErrorKind::OutOfSpace {
                self.set_full(true);
                continue;
            }
            tracing::error!(%error, "the manifest pages could not be written");
            if self.is_closing() {
                continue;
            }
            let failed = self.failure();
            if failed.is_some() || error.kind() == ErrorKind::Closed {
                // Nor ever will be: the log fills up, and nothing that was freed comes back.
                self.open_groups().iter().for_each(|group| group.give_up(&error));
            }
            if failed.is_some() {
                return;
            }
        }
    }

    /// Why nothing can be made durable on this volume any more until it is opened again.
    fn failure(&self) -> Option<Error> {
        let log = self.wal().failure().map(Error::from);
        log.or_else(|| self.volume.failure())
    }

    async fn keep_up_once(&self) -> Result<()> {
        let wanted = self.pages_wanted.swap(false, Ordering::AcqRel);
        if wanted || self.log_is_half_full() {
            let edits = self.open_groups().iter().any(|group| group.wants_pages());
            if wanted || edits || self.purge_is_due() {
                let outcome = self.purge().await;
                self.purge_failed.store(outcome.is_err(), Ordering::Release);
                // Whoever waits for the log to be cut looks again, also when that failed.
                self.open_groups().iter().for_each(|group| group.wake());
                // To be tried again when there is space.
                let short = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::OutOfSpace);
                self.pages_wanted.fetch_or(short, Ordering::AcqRel);
                outcome?;
                if self.space_is_short() {
                    self.retry_space();
                }
                let again = std::mem::take(&mut *self.offer_again.lock().unwrap_or_else(PoisonError::into_inner));
                again.iter().filter_map(std::sync::Weak::upgrade).for_each(|group| group.offer_again());
            }
            if self.log_is_half_full() {
                // An idle group's few entries may hold the rest of the ring.
                self.open_groups().iter().filter(|group| group.is_settled()).for_each(|group| group.want_rotation());
            }
        }
        let space = self.volume.space();
        if space.parked_bytes >= PARKED_BYTES_MAX || (self.space_is_short() && space.parked_bytes > 0) {
            self.volume.update(|_| {}).await?;
            if self.space_is_short() {
                self.retry.store(true, Ordering::Release);
                self.work.notify_one();
            }
        }
        Ok(())
    }

    /// Writes the pages and cuts the log before what is still needed.
    pub(crate) async fn purge(&self) -> Result<()> {
        let turn = self.pages_turn().await;
        let limit = self.wal().durable();
        let start = self.oldest_needed(limit).await?;
        if !mainstay_io::mutant!(CutWithoutPages) {
            self.write_pages_from(&turn, None, Some(start)).await?;
        }
        self.wal().release(start);
        self.purged_at.store(limit.0, Ordering::Release);
        Ok(())
    }

    /// An install could not be logged: it is offered again behind the next purge.
    pub(crate) fn offer_after_purge(&self, group: &Arc<GroupShared>) {
        self.offer_again.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(group));
        self.want_pages();
    }

    /// The oldest record of a group that nobody has asked for and that has nothing in tables.
    fn unknown(&self) -> Option<RecordPos> {
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner).values().min().copied()
    }

    /// The oldest position that an owner of a group's log needs, at most `limit`.
    async fn oldest_needed(&self, limit: Lsn) -> Result<Lsn> {
        let start = self.wal().start();
        let mut oldest = limit;
        let slots: Vec<_> = {
            let groups = self.groups();
            let found = |slot: &Slot| match slot {
                Slot::Found(found) => Some(found.oldest),
                Slot::Open(_) => None,
            };
            oldest = oldest.min(self.unknown().map_or(oldest, |pos| pos.batch));
            groups.iter().map(|(&id, slot)| (id, flushed_of(slot), found(slot))).collect()
        };
        let mut pins = Vec::with_capacity(slots.len());
        for (id, flushed, found) in slots {
            let pin = self.pins.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
            let stays = match (found, pin) {
                // Nobody has asked for the group yet: all of it stays.
                (Some(found), _) => found,
                (None, Some(pin)) => {
                    let stays = pin.pin(flushed).await;
                    pins.push(pin);
                    stays
                }
                (None, None) => return Ok(start),
            };
            oldest = stays.map_or(oldest, |pos| oldest.min(pos.batch));
        }
        let floor = oldest;
        if floor <= start {
            return Ok(start);
        }
        for pin in pins {
            let needed = pin.carry(floor).await?;
            oldest = needed.map_or(oldest, |pos| oldest.min(pos.batch));
        }
        Ok(oldest.max(start))
    }
}
