//! The task that mends what is damaged, and the scrubber that looks for it.
//!
//! # Place
//! beside `upkeep`; the steps for one group are in `group::mend`
//! # Invariants
//! 1. The scrubber reads at most its rate, and the log, every table of every branch, clone and checkpoint, both copies of the
//!    manifest pages and the four of the superblock in each pass.
//! 2. A group is mended by one task, one thing after the other; pauses after failures grow.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::task::Poll;
use std::time::Duration;

use mainstay_io::IoClass;
use mainstay_wal::Lsn;
use xxhash_rust::xxh3::Xxh3;

use super::{EngineShared, pages};
use crate::group::{CHECK_READ_BYTES, GroupShared, digest_of};
use crate::stored::StoredTable;
use crate::{ErrorKind, Result};

/// Between two looks whether the log was cut behind damage.
const CUT_PAUSE: Duration = Duration::from_millis(100);
/// Looks before the scrubber goes on with the next pass.
const CUT_LOOKS_MAX: u32 = 100;
/// The shortest sleep between two attempts to mend.
const MEND_PAUSE_MIN: Duration = Duration::from_millis(10);

impl EngineShared {
    /// Runs `task` to its end; none when the engine closes before.
    async fn until_closing<T>(&self, task: impl Future<Output = T>) -> Option<T> {
        let mut ended = pin!(self.ended.notified());
        ended.as_mut().enable();
        if self.is_closing() {
            return None;
        }
        let mut task = pin!(task);
        std::future::poll_fn(|cx| match ended.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(None),
            Poll::Pending => task.as_mut().poll(cx).map(Some),
        })
        .await
    }

    /// Mends until the engine is closed.
    pub(super) async fn mend(self: Arc<Self>) {
        let clock = self.environment.clock.clone();
        loop {
            let mut work = pin!(self.heal.work.notified());
            work.as_mut().enable();
            let groups = self.open_groups();
            for group in &groups {
                if self.until_closing(group.mend()).await.is_none() {
                    return;
                }
            }
            let now = clock.now();
            let due = groups.iter().filter_map(|group| group.mend_due(now)).min();
            drop(groups);
            let mut sleep = due.map(|at| clock.sleep(at.saturating_sub(now).max(MEND_PAUSE_MIN)));
            let wake = std::future::poll_fn(|cx| match (work.as_mut().poll(cx), &mut sleep) {
                (Poll::Pending, Some(sleep)) => sleep.as_mut().poll(cx),
                (woken, _) => woken,
            });
            if self.until_closing(wake).await.is_none() {
                return;
            }
        }
    }

    /// Reads everything again and again until the engine is closed.
    pub(super) async fn scrub(self: Arc<Self>, bytes_per_second: u64, pause: Duration) {
        let clock = self.environment.clock.clone();
        while self.until_closing(clock.sleep(pause)).await.is_some() {
            match self.until_closing(self.scrub_pass(bytes_per_second)).await {
                None => return,
                Some(Ok(())) => {
                    let unix_ms = clock.unix().as_millis() as u64;
                    self.heal.scrub_last_ms.store(unix_ms, Ordering::Relaxed);
                    self.heal.scrub_passes.fetch_add(1, Ordering::Relaxed);
                }
                Some(Err(error)) => tracing::warn!(%error, "a pass of the scrubber was cut short"),
            }
        }
    }

    async fn scrub_pass(&self, bytes_per_second: u64) -> Result<()> {
        let copies = self.volume.scrub_superblock().await?;
        if copies > 0 {
            tracing::warn!(copies, "copies of the superblock were damaged and are written again");
            self.heal.superblocks_healed.fetch_add(copies, Ordering::Relaxed);
        }
        self.scrub_pages().await?;
        self.scrub_log(bytes_per_second).await?;
        for group in self.open_groups() {
            for stored in group.stored_tables() {
                self.scrub_table(&group, &stored, bytes_per_second).await?;
            }
        }
        Ok(())
    }

    async fn scrub_pages(&self) -> Result<()> {
        let turn = self.pages_turn().await;
        let Some(root) = self.volume.superblock().root else { return Ok(()) };
        let bad = match pages::read_copies(&self.volume, &root, IoClass::Background).await {
            Ok((_, bad)) => bad,
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) => pages::COPIES,
            Err(error) => return Err(error),
        };
        self.heal.scrub_bytes.fetch_add(root.bytes.saturating_mul(pages::COPIES), Ordering::Relaxed);
        if bad > 0 {
            tracing::warn!(copies = bad, "copies of the manifest pages were damaged: they are written again");
            self.write_pages(&turn, None).await?;
            self.heal.pages_healed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn scrub_log(&self, bytes_per_second: u64) -> Result<()> {
        // What the last pass gave up waiting for may have come since.
        self.log_is_cut();
        let end = self.wal().durable();
        let mut at = self.wal().start();
        while at < end {
            let checked = self.wal().check(at, CHECK_READ_BYTES).await?;
            let bytes = checked.next.0.saturating_sub(at.0);
            self.heal.scrub_bytes.fetch_add(bytes, Ordering::Relaxed);
            if let Some(damaged) = checked.damaged {
                self.cut_behind(damaged).await;
                return Ok(());
            }
            at = checked.next;
            self.pause_for(bytes, bytes_per_second).await;
        }
        Ok(())
    }

    /// Has the log cut behind damage. What lies there is in memory still, or in tables, so nothing has to be fetched: it is flushed, and
    /// what is small and old is written again, as for every cut. When that takes too long the next pass finds the damage again.
    async fn cut_behind(&self, damaged: Lsn) {
        let known = self.log_damage.lock().unwrap_or_else(PoisonError::into_inner).replace(damaged);
        if known != Some(damaged) {
            tracing::error!(lsn = damaged.0, "the log is damaged: it is cut behind that");
            self.heal.log_found.fetch_add(1, Ordering::Relaxed);
        }
        for _ in 0..CUT_LOOKS_MAX {
            if self.log_is_cut() {
                return;
            }
            self.open_groups().iter().filter(|group| group.is_settled()).for_each(|group| group.want_rotation());
            self.want_pages();
            self.environment.clock.sleep(CUT_PAUSE).await;
        }
        tracing::warn!(lsn = damaged.0, "the log could not be cut behind damage yet");
    }

    /// Whether no damage is known in what is left of the log.
    fn log_is_cut(&self) -> bool {
        let mut known = self.log_damage.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(damaged) = *known else { return true };
        if self.wal().start() <= damaged {
            return false;
        }
        *known = None;
        drop(known);
        tracing::info!(lsn = damaged.0, "the log was cut behind damage");
        self.heal.log_cut.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Keeps the rate.
    async fn pause_for(&self, bytes: u64, bytes_per_second: u64) {
        let nanos = bytes.saturating_mul(1_000_000_000) / bytes_per_second;
        self.environment.clock.sleep(Duration::from_nanos(nanos)).await;
    }

    async fn scrub_table(&self, group: &GroupShared, stored: &StoredTable, bytes_per_second: u64) -> Result<()> {
        let meta = &stored.meta;
        let mut digest = Xxh3::new();
        let mut offset = 0;
        let mut whole = true;
        while offset < meta.bytes {
            let part = CHECK_READ_BYTES.min(meta.bytes - offset);
            match stored.bytes.read_behind(offset, part as usize).await {
                Ok(bytes) => digest.update(&bytes),
                Err(error) if error.kind() == ErrorKind::Io => whole = false,
                Err(error) => return Err(error),
            }
            offset += part;
            self.heal.scrub_bytes.fetch_add(part, Ordering::Relaxed);
            self.pause_for(part, bytes_per_second).await;
        }
        if whole && digest.digest128() == meta.digest {
            group.heal.forget(meta.id);
            return Ok(());
        }
        // Once more: a misread is no damage.
        match digest_of(&stored.bytes, meta.bytes).await {
            Ok(digest) if digest == meta.digest => {}
            Err(error) if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) => return Err(error),
            _ => group.heal.found(meta.id),
        }
        Ok(())
    }
}
