//! What is known in memory of a branch: its revision at each recent index, and its recent changes for watchers.
//!
//! # Invariants
//! F1. The ring holds every change above its floor up to the published revision, while somebody watches; a watcher that is
//!     at or below the floor reads the store.
//! F2. A revision is published only when its records are readable.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use mainstay_engine::{BranchId, LogIndex};
use tokio::sync::watch;

use super::metas::Metas;
use super::record::{Rev, RevRecord};
use super::{Tip, lock};

/// Indexes of which the revision is remembered. A reader looks right after it pinned an index.
const MARKS_MAX: usize = 4096;
/// Revisions in the ring, at most.
const RING_REVISIONS_MAX: usize = 16_384;
/// Bytes of keys and values in the ring, at most.
const RING_BYTES_MAX: usize = 16 << 20;

/// One key's change.
#[derive(Clone, Debug)]
pub struct Change {
    /// Where it is.
    pub rev: Rev,
    /// What it is.
    pub record: RevRecord,
}

/// All changes of one revision.
#[derive(Clone, Debug)]
pub struct Changes {
    /// The revision.
    pub revision: i64,
    /// Its changes in order.
    pub changes: Vec<Change>,
}

impl Changes {
    fn bytes(&self) -> usize {
        self.changes.iter().map(|change| change.record.key.len() + change.record.value.len() + 64).sum()
    }
}

/// Puts changes together that are of one revision.
pub(super) fn group(events: Vec<(Rev, RevRecord)>) -> Vec<Arc<Changes>> {
    let mut groups: Vec<Changes> = Vec::new();
    for (rev, record) in events {
        match groups.last_mut() {
            Some(last) if last.revision == rev.main => last.changes.push(Change { rev, record }),
            _ => groups.push(Changes { revision: rev.main, changes: vec![Change { rev, record }] }),
        }
    }
    groups.into_iter().map(Arc::new).collect()
}

/// A branch.
pub struct Branch {
    id: BranchId,
    marks: Mutex<Marks>,
    metas: Mutex<Metas>,
    ring: Mutex<Ring>,
    watchers: AtomicUsize,
    published: watch::Sender<Published>,
}

/// How far a branch is for watchers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// The last revision that was published in this process; 0 before the first.
    pub revision: i64,
    /// How often the state was replaced: after that, revisions may have come that were never published.
    pub resets: u64,
}

#[derive(Default)]
struct Marks {
    /// The tip after each entry that changed it, in order of indexes.
    list: VecDeque<(LogIndex, Tip)>,
    /// What a reader found at an index. The same index is the same state for ever, so this never grows old.
    learned: Option<(LogIndex, Tip)>,
}

struct Ring {
    changes: VecDeque<Arc<Changes>>,
    bytes: usize,
    /// Changes up to here are not in the ring.
    floor: i64,
}

impl Branch {
    pub(super) fn new(id: BranchId) -> Self {
        Self {
            id,
            marks: Mutex::default(),
            metas: Mutex::default(),
            ring: Mutex::new(Ring { changes: VecDeque::new(), bytes: 0, floor: i64::MAX }),
            watchers: AtomicUsize::new(0),
            published: watch::Sender::new(Published::default()),
        }
    }

    /// Its id.
    pub fn id(&self) -> BranchId {
        self.id
    }

    /// The states of keys for the entry that is applied now. Whoever does not give them back has dropped them.
    pub(super) fn take_metas(&self) -> Metas {
        std::mem::take(&mut *lock(&self.metas))
    }

    /// The entry succeeded: these are the states behind it.
    pub(super) fn keep_metas(&self, metas: Metas) {
        *lock(&self.metas) = metas;
    }

    /// The applied tip, if an entry was applied since the state was opened. For the applier.
    pub(super) fn tip(&self) -> Option<Tip> {
        lock(&self.marks).list.back().map(|(_, tip)| *tip)
    }

    /// The tip of a pinned index, if it is remembered.
    pub(super) fn tip_at(&self, index: LogIndex) -> Option<Tip> {
        let marks = lock(&self.marks);
        let after = marks.list.partition_point(|(marked, _)| *marked <= index);
        match after.checked_sub(1).and_then(|last| marks.list.get(last)) {
            Some((_, tip)) => Some(*tip),
            None => marks.learned.filter(|(learned, _)| *learned == index).map(|(_, tip)| tip),
        }
    }

    /// Remembers what a reader found at a pinned index.
    pub(super) fn learn(&self, index: LogIndex, tip: Tip) {
        lock(&self.marks).learned = Some((index, tip));
    }

    /// Remembers the tip after an entry. For the applier, before the entry is readable.
    pub(super) fn mark(&self, index: LogIndex, tip: Tip) {
        let mut marks = lock(&self.marks);
        if marks.list.back().is_some_and(|(_, last)| *last == tip) {
            return;
        }
        if marks.list.len() >= MARKS_MAX {
            marks.list.pop_front();
        }
        marks.list.push_back((index, tip));
    }

    /// The applied tip must be read again.
    pub(super) fn forget(&self) {
        self.take_metas();
        lock(&self.marks).list.clear();
    }

    /// The state was replaced.
    pub(super) fn reset(&self) {
        self.forget();
        let mut ring = lock(&self.ring);
        ring.changes.clear();
        ring.bytes = 0;
        ring.floor = i64::MAX;
        drop(ring);
        // Watchers look at the store and find where they are.
        self.published.send_modify(|published| published.resets = published.resets.wrapping_add(1));
    }

    /// Whether changes are to be kept for watchers.
    pub(super) fn is_watched(&self) -> bool {
        self.watchers.load(Ordering::Acquire) > 0
    }

    /// Makes changes known that are readable now. `changes` may be empty when nobody watched as they were applied.
    pub(super) fn publish(&self, revision: i64, changes: Vec<Arc<Changes>>) {
        if self.is_watched() || !changes.is_empty() {
            let mut ring = lock(&self.ring);
            let published = self.published.borrow().revision;
            // Changes are missing where nobody watched as their entry was applied.
            let whole = changes.first().is_some_and(|first| first.revision == published.saturating_add(1))
                && changes.last().is_some_and(|last| last.revision == revision);
            if !whole || ring.floor == i64::MAX {
                ring.changes.clear();
                ring.bytes = 0;
                ring.floor = changes.first().map_or(revision, |first| first.revision.saturating_sub(1));
            }
            for changes in changes {
                ring.bytes = ring.bytes.saturating_add(changes.bytes());
                ring.changes.push_back(changes);
            }
            while ring.changes.len() > RING_REVISIONS_MAX || ring.bytes > RING_BYTES_MAX {
                let Some(oldest) = ring.changes.pop_front() else { break };
                ring.bytes = ring.bytes.saturating_sub(oldest.bytes());
                ring.floor = oldest.revision;
            }
        } else {
            let mut ring = lock(&self.ring);
            if ring.floor != i64::MAX {
                ring.changes.clear();
                ring.bytes = 0;
                ring.floor = i64::MAX;
            }
        }
        self.published.send_modify(|published| published.revision = revision.max(published.revision));
    }

    /// The changes from `from` on, up to `limit` revisions. `None` if they are not all in memory: read the store.
    pub fn recent(&self, from: i64, limit: usize) -> Option<Vec<Arc<Changes>>> {
        let ring = lock(&self.ring);
        if from <= ring.floor {
            return None;
        }
        let start = ring.changes.partition_point(|changes| changes.revision < from);
        Some(ring.changes.iter().skip(start).take(limit).cloned().collect())
    }

    /// Watches the branch: until the guard is dropped its changes are kept in the ring.
    pub fn watch(self: &Arc<Self>) -> Watching {
        self.watchers.fetch_add(1, Ordering::AcqRel);
        Watching { branch: self.clone(), published: self.published.subscribe() }
    }
}

/// See [`Branch::watch`].
pub struct Watching {
    branch: Arc<Branch>,
    published: watch::Receiver<Published>,
}

impl Watching {
    /// The branch.
    pub fn branch(&self) -> &Arc<Branch> {
        &self.branch
    }

    /// How far the branch is. Marks it as seen.
    pub fn published(&mut self) -> Published {
        *self.published.borrow_and_update()
    }

    /// Resolves when a revision is published that was not seen, or the state was replaced. Cancel safe.
    pub async fn changed(&mut self) {
        // The sender lives in the branch, which this holds.
        let _ = self.published.changed().await;
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.branch.watchers.fetch_sub(1, Ordering::AcqRel);
    }
}
