//! What is known of damaged tables, and whom to ask for other copies of them.
//!
//! # Place
//! between `stored`, whose readers report damage and read elsewhere, and `engine::mend`, which makes tables anew
//! # Invariants
//! 1. What another replica gives is verified before it is used: a block by the checksum in its referrer, a table by the
//!    digest in the manifest.
//! 2. A table is damaged from the first read that found it so until it was made anew, a scrub found it whole, or nothing
//!    names it any more.
//! 3. Attempts to mend are bounded in rate: each failure doubles the pause, up to [`RETRY_PAUSE_MAX`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use mainstay_io::BoxFuture;
use mainstay_wal::GroupId;
use tokio::sync::Notify;

use crate::events::{EventKind, Teller};
use crate::{Error, ErrorKind, Result, TableId};

/// Pause before the second attempt; each further one waits twice as long.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between two attempts.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(60);

/// The pause after `attempts` failures.
pub(crate) fn retry_pause(attempts: u32) -> Duration {
    RETRY_PAUSE.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(RETRY_PAUSE_MAX)
}

/// Other replicas that hold the same tables.
pub trait TablePeers: Send + Sync + 'static {
    /// How many can be asked now.
    fn count(&self) -> usize;

    /// Bytes `offset..offset + length` of a table as the replica number `copy` holds them. The receiver verifies them.
    fn read_table(&self, copy: usize, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>>;
}

/// What was found damaged on a volume, and what was mended, since open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealStatus {
    /// Tables found damaged by a read or by the scrubber.
    pub tables_found: u64,
    /// Damaged tables that were made anew from other replicas.
    pub tables_healed: u64,
    /// Tables damaged now.
    pub tables_damaged: u64,
    /// Reads that met damage and were answered with bytes of another replica.
    pub reads_served: u64,
    /// Tables of installs that this replica fetched because it could not make them, or made others.
    pub tables_fetched: u64,
    /// Copies of the superblock that were found damaged and written again.
    pub superblocks_healed: u64,
    /// Times that damaged manifest pages were written again.
    pub pages_healed: u64,
    /// Places of the log that the scrubber found damaged.
    pub log_found: u64,
    /// Those of them behind which the log was cut: nothing needs them any more.
    pub log_cut: u64,
    /// Bytes that the scrubber has read.
    pub scrub_bytes: u64,
    /// Whole passes of the scrubber.
    pub scrub_passes: u64,
    /// When the last whole pass ended, in milliseconds since the Unix epoch; 0 before the first.
    pub scrub_last_ms: u64,
}

/// Counts of a volume.
#[derive(Default)]
pub(crate) struct HealCounts {
    pub(crate) tables_found: AtomicU64,
    pub(crate) tables_healed: AtomicU64,
    pub(crate) reads_served: AtomicU64,
    pub(crate) tables_fetched: AtomicU64,
    pub(crate) superblocks_healed: AtomicU64,
    pub(crate) pages_healed: AtomicU64,
    pub(crate) log_found: AtomicU64,
    pub(crate) log_cut: AtomicU64,
    pub(crate) scrub_bytes: AtomicU64,
    pub(crate) scrub_passes: AtomicU64,
    pub(crate) scrub_last_ms: AtomicU64,
    /// There is something to mend.
    pub(crate) work: Notify,
    pub(crate) events: Arc<Teller>,
}

impl HealCounts {
    pub(crate) fn status(&self, tables_damaged: u64) -> HealStatus {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        HealStatus {
            tables_found: get(&self.tables_found),
            tables_healed: get(&self.tables_healed),
            tables_damaged,
            reads_served: get(&self.reads_served),
            tables_fetched: get(&self.tables_fetched),
            superblocks_healed: get(&self.superblocks_healed),
            pages_healed: get(&self.pages_healed),
            log_found: get(&self.log_found),
            log_cut: get(&self.log_cut),
            scrub_bytes: get(&self.scrub_bytes),
            scrub_passes: get(&self.scrub_passes),
            scrub_last_ms: get(&self.scrub_last_ms),
        }
    }
}

/// When a thing that failed is tried again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Retry {
    pub(crate) attempts: u32,
    pub(crate) at: Duration,
}

impl Retry {
    /// One more failure, now.
    pub(crate) fn failed(&mut self, now: Duration) {
        self.attempts = self.attempts.saturating_add(1);
        self.at = now.saturating_add(retry_pause(self.attempts));
    }
}

/// Damage of one group, and its peers.
pub(crate) struct GroupHeal {
    group: GroupId,
    pub(crate) counts: Arc<HealCounts>,
    peers: RwLock<Option<Arc<dyn TablePeers>>>,
    damaged: Mutex<BTreeMap<TableId, Retry>>,
}

impl GroupHeal {
    pub(crate) fn new(group: GroupId, counts: Arc<HealCounts>) -> Arc<Self> {
        Arc::new(Self { group, counts, peers: RwLock::default(), damaged: Mutex::default() })
    }

    pub(crate) fn set_peers(&self, peers: Option<Arc<dyn TablePeers>>) {
        *self.peers.write().unwrap_or_else(PoisonError::into_inner) = peers;
        self.counts.work.notify_one();
    }

    pub(crate) fn peers(&self) -> Option<Arc<dyn TablePeers>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn damaged(&self) -> MutexGuard<'_, BTreeMap<TableId, Retry>> {
        // Every change is an insert or a remove.
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read or the scrubber found the table damaged.
    pub(crate) fn found(&self, id: TableId) {
        let mut damaged = self.damaged();
        if let std::collections::btree_map::Entry::Vacant(place) = damaged.entry(id) {
            place.insert(Retry::default());
            drop(damaged);
            self.counts.tables_found.fetch_add(1, Ordering::Relaxed);
            tracing::error!(table = %id, "a table is damaged");
            self.counts.events.tell(Some(self.group), || EventKind::TableDamaged { table: id });
            self.counts.work.notify_one();
        }
    }

    /// The table is whole, or nothing names it any more.
    pub(crate) fn forget(&self, id: TableId) {
        self.damaged().remove(&id);
    }

    pub(crate) fn damaged_count(&self) -> u64 {
        self.damaged().len() as u64
    }

    /// All that are damaged, with when each is to be tried.
    pub(crate) fn list(&self) -> Vec<(TableId, Retry)> {
        self.damaged().iter().map(|(&id, &retry)| (id, retry)).collect()
    }

    pub(crate) fn failed(&self, id: TableId, now: Duration) {
        if let Some(retry) = self.damaged().get_mut(&id) {
            retry.failed(now);
        }
    }

    /// Bytes of another copy.
    pub(crate) fn read(&self, copy: usize, id: TableId, offset: u64, length: u64) -> BoxFuture<Result<Bytes>> {
        match self.peers() {
            Some(peers) => peers.read_table(copy, id, offset, length),
            None => {
                let error = Error::new(ErrorKind::NotFound, format!("no other replica to ask table={id}"));
                Box::pin(std::future::ready(Err(error)))
            }
        }
    }
}

/// What each of `copies` says at `offset`, block by block: the bytes that two of them agree on, else those of the first
/// that has any. Whether that was right, the digest of the whole table tells.
pub(crate) fn vote(copies: &[Option<Bytes>], length: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(length);
    while out.len() < length {
        let end = out.len().saturating_add(mainstay_io::BLOCK_BYTES).min(length);
        let here: Vec<&[u8]> = copies.iter().flatten().filter_map(|copy| copy.get(out.len()..end)).collect();
        let agreed = here.iter().find(|bytes| here.iter().filter(|other| other == bytes).count() > 1);
        out.extend_from_slice(agreed.or(here.first())?);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_of_all_copies_at_different_places_is_voted_out() {
        let good: Vec<u8> = (0..5 * 4096_u32).map(|n| n as u8).collect();
        let with = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            Some(Bytes::from(bytes))
        };
        let copies = [with(7), with(5000), with(20_000)];
        assert_eq!(vote(&copies, good.len()).as_deref(), Some(good.as_slice()));
        // Where one copy is missing, nothing agrees at the damaged places and the first copy wins: the digest tells.
        let copies = [None, with(5000), with(20_000)];
        assert_ne!(vote(&copies, good.len()).as_deref(), Some(good.as_slice()));
        assert_eq!(vote(&[None, None], 4096), None);
    }

    #[test]
    fn pauses_double_up_to_a_bound() {
        assert_eq!(retry_pause(1), RETRY_PAUSE);
        assert_eq!(retry_pause(2), RETRY_PAUSE * 2);
        assert_eq!(retry_pause(40), RETRY_PAUSE_MAX);
        let mut retry = Retry::default();
        retry.failed(Duration::from_secs(5));
        assert_eq!((retry.attempts, retry.at), (1, Duration::from_secs(5) + RETRY_PAUSE));
    }
}
