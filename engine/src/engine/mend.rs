//! The task that mends what is damaged, and the scrubber that looks for it.
//!
//! # Place
//! beside `upkeep`; the steps for one group are in `group::mend`
//! # Invariants
//! 1. The scrubber reads at most its rate, and every table of every branch, clone and checkpoint, both copies of the
//!    manifest pages and the four of the superblock in each pass.
//! 2. A group is mended by one task, one thing after the other; pauses after failures grow.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use mainstay_io::IoClass;
use xxhash_rust::xxh3::Xxh3;

use super::{EngineShared, pages};
use crate::group::{CHECK_READ_BYTES, GroupShared, digest_of};
use crate::stored::StoredTable;
use crate::{ErrorKind, Result};

/// Pause between two passes of the scrubber: a small store is not read over and over.
const SCRUB_PAUSE: Duration = Duration::from_secs(10);
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
    pub(super) async fn scrub(self: Arc<Self>, bytes_per_second: u64) {
        let clock = self.environment.clock.clone();
        while self.until_closing(clock.sleep(SCRUB_PAUSE)).await.is_some() {
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
            self.environment
                .clock
                .sleep(Duration::from_nanos(part.saturating_mul(1_000_000_000) / bytes_per_second))
                .await;
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
