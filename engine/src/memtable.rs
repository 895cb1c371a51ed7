//! The memtable: every version of the keys written in one generation to one keyspace of one branch.
//!
//! The tree is [`mainstay_memtree`]: one writer, readers that take no lock and wait for nobody. Here stand the removed ranges beside it,
//! and what both cost the memory budget.
//!
//! # Place
//! written by the applier of a group, read by everybody; below `read`
//! # Invariants
//! N1. One writer at a time. Without removed ranges no reader waits for it.
//! N2. Of a key a reader finds the newest version with an index up to its own, whatever is written meanwhile: indexes only grow, and the
//!     reader's was published after all up to it were inserted.
//! N3. Nothing is removed, and all memory is given back at once.
//! N4. The budget counts what the tree took from the allocator, byte for byte, and large values, which stay slices of their entries.
//! N5. Removed ranges stand beside the tree ([`ranges`]): whoever reads versions compares them with those.

mod ranges;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_memtree::{Cursor, Reader, Version, Writer};

use self::ranges::Ranges;
use crate::LogIndex;
use crate::memory::{MemoryBudget, MemoryKind, Reservation};
use crate::range_tombstone::{Cover, Fragments, KeyRange};
use crate::read::Lookup;

/// All versions written in one generation to one keyspace of one branch.
pub(crate) struct Memtable {
    tree: Reader,
    ranges: Ranges,
    writer: Mutex<TreeWriter>,
    entries: AtomicU64,
    bytes: AtomicU64,
}

struct TreeWriter {
    tree: Writer,
    ranges_bytes: u64,
    memory: Reservation,
}

impl Memtable {
    /// An empty memtable whose memory is counted in `budget`.
    pub(crate) fn new(budget: &Arc<MemoryBudget>) -> Self {
        let tree = Writer::new();
        let bytes = tree.bytes();
        Self {
            tree: tree.reader(),
            ranges: Ranges::default(),
            writer: Mutex::new(TreeWriter {
                tree,
                ranges_bytes: 0,
                memory: budget.reserve(MemoryKind::Memtable, bytes),
            }),
            entries: AtomicU64::new(0),
            bytes: AtomicU64::new(bytes),
        }
    }

    /// Sets (`Some`) or removes (`None`) a key at `index`. The later of two calls with one key and one index wins.
    ///
    /// Readable when it returns by whoever reads at `index` or above.
    pub(crate) fn insert(&self, key: &[u8], index: LogIndex, value: Option<&Bytes>) {
        let mut writer = self.writer();
        if writer.tree.insert(key, index.0, value) {
            // Nobody else counts.
            self.entries.store(self.entries() + 1, Ordering::Relaxed);
        }
        self.count(&mut writer);
    }

    /// Removes the keys of a range at `index`: versions of before are hidden from whoever reads at `index` or above. Returns the bytes
    /// that it took, which are the same wherever the same was inserted.
    pub(crate) fn remove_range(&self, range: &KeyRange, index: LogIndex) -> u64 {
        let mut writer = self.writer();
        let grown = self.ranges.insert(range, index);
        writer.ranges_bytes += grown;
        self.count(&mut writer);
        grown
    }

    fn writer(&self) -> MutexGuard<'_, TreeWriter> {
        // A panic while it is locked is in the tree, which then has an entry more or not.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, writer: &mut TreeWriter) {
        let bytes = writer.tree.bytes() + writer.ranges_bytes;
        if bytes != self.bytes() {
            self.bytes.store(bytes, Ordering::Relaxed);
            writer.memory.resize(bytes);
        }
    }

    /// The newest version of a key with an index of at most `at`, without that index.
    pub(crate) fn get(&self, key: &[u8], at: LogIndex) -> Option<Lookup> {
        self.get_version(key, at).map(|(_, lookup)| lookup)
    }

    /// The newest version of a key with an index of at most `at`.
    pub(crate) fn get_version(&self, key: &[u8], at: LogIndex) -> Option<(LogIndex, Lookup)> {
        let version = self.tree.get(key, at.0)?;
        Some((LogIndex(version.index()), version.value().map_or(Lookup::Deleted, Lookup::Value)))
    }

    /// Some ranges were removed.
    pub(crate) fn has_ranges(&self) -> bool {
        self.ranges.any()
    }

    /// The newest removal with an index of at most `at` of a range that holds `key`; 0 for none.
    #[inline]
    pub(crate) fn hidden_below(&self, key: &[u8], at: LogIndex) -> LogIndex {
        if self.ranges.any() { self.ranges.cover(key, at).index } else { LogIndex(0) }
    }

    /// The same, and for which keys around it too.
    pub(crate) fn cover(&self, key: &[u8], at: LogIndex) -> Cover {
        self.ranges.wide_cover(key, at)
    }

    /// All that was removed, by the newest index.
    pub(crate) fn ranges(&self) -> Fragments {
        self.ranges.newest()
    }

    /// A cursor from the low end, or from the high end in `reverse`, over what a reader at `at` sees, tombstones
    /// included; it stands nowhere.
    pub(crate) fn cursor(&self, at: LogIndex, reverse: bool) -> MemtableCursor {
        MemtableCursor(self.tree.cursor(at.0, reverse))
    }

    /// Memory held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Versions held.
    pub(crate) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// Nothing was inserted, and no range removed.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries() == 0 && !self.ranges.any()
    }
}

/// A cursor over one memtable. It keeps the tree in memory and holds no lock. Who has it keeps the memtable too, so that its bytes count.
pub(crate) struct MemtableCursor(Cursor);

impl MemtableCursor {
    /// Stands on an entry.
    #[inline]
    pub(crate) fn valid(&self) -> bool {
        self.0.version().is_some()
    }

    /// The key; the cursor is valid.
    #[inline]
    pub(crate) fn key(&self) -> &[u8] {
        self.0.version().map_or(&[], Version::key)
    }

    /// The index of the version.
    #[inline]
    pub(crate) fn index(&self) -> LogIndex {
        LogIndex(self.0.version().map_or(0, Version::index))
    }

    /// `None` is a tombstone.
    #[inline]
    pub(crate) fn value(&self) -> Option<Bytes> {
        self.0.version().and_then(Version::value)
    }

    /// As [`MemtableCursor::value`], borrowed.
    #[inline]
    pub(crate) fn value_part(&self) -> Option<&[u8]> {
        self.0.version().and_then(Version::value_part)
    }

    /// Goes to the first entry in the cursor's direction.
    pub(crate) fn seek_start(&mut self) {
        self.0.seek_start();
    }

    /// Goes to the first entry in the cursor's direction at `key`, or beyond it. With `exclusive`, beyond it.
    pub(crate) fn seek(&mut self, key: &[u8], exclusive: bool) {
        self.0.seek(key, exclusive);
    }

    /// Goes one entry on.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.0.advance();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_counts_what_is_held_and_gets_all_of_it_back() {
        let budget = MemoryBudget::new(1 << 30);
        let memtable = Memtable::new(&budget);
        let large = Bytes::from(vec![1; 100 << 10]);
        let mut before = budget.used();
        for index in 1..100 {
            memtable.insert(&[index], LogIndex(index.into()), Some(&Bytes::from_static(&[7; 1000])));
            memtable.insert(b"large", LogIndex(index.into()), Some(&large));
            assert!(budget.used() >= before + (100 << 10), "a large value counts as a whole");
            let range = KeyRange::from_parts(Bytes::from(vec![index]), Some(Bytes::from(vec![index + 1])));
            let with_value = budget.used();
            assert_eq!(memtable.remove_range(&range, LogIndex(index.into())), budget.used() - with_value);
            assert_eq!(memtable.bytes(), budget.used());
            before = budget.used();
        }
        assert_eq!(memtable.entries(), 198);
        assert!(memtable.has_ranges());
        drop(memtable);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_reader_finds_its_own_version_and_a_tombstone_as_such() {
        let memtable = Memtable::new(&MemoryBudget::new(1 << 30));
        assert!(memtable.is_empty());
        memtable.insert(b"key", LogIndex(3), Some(&Bytes::from_static(b"three")));
        memtable.insert(b"key", LogIndex(5), None);
        memtable.insert(b"key", LogIndex(7), Some(&Bytes::from_static(b"seven")));
        memtable.insert(b"key", LogIndex(7), Some(&Bytes::from_static(b"later")));
        assert_eq!(memtable.entries(), 3);
        let value = |value| Some(Lookup::Value(Bytes::from_static(value)));
        assert_eq!(memtable.get(b"key", LogIndex(2)), None);
        assert_eq!(memtable.get(b"key", LogIndex(4)), value(b"three"));
        assert_eq!(memtable.get_version(b"key", LogIndex(6)), Some((LogIndex(5), Lookup::Deleted)));
        assert_eq!(memtable.get(b"key", LogIndex(7)), value(b"later"));
        for reverse in [false, true] {
            let mut cursor = memtable.cursor(LogIndex(6), reverse);
            cursor.seek_start();
            assert!(cursor.valid() && cursor.value().is_none() && cursor.value_part().is_none());
            assert_eq!((cursor.key(), cursor.index()), (b"key".as_slice(), LogIndex(5)));
            cursor.advance();
            assert!(!cursor.valid());
        }
    }
}
