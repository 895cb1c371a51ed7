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
//! N6. A version says all that this memtable knows of its key up to its index: an operand that is inserted is merged into the version
//!     before it, or combined with it. So a reader looks at one version of a key, and a key that is merged into again and again
//!     costs a reader no more than one that is put.

mod ranges;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_memtree::{Cursor, Kind, New, Reader, Version, Writer};

use self::ranges::Ranges;
use crate::LogIndex;
use crate::memory::{MemoryBudget, MemoryKind, Reservation};
use crate::merge_operator::Operator;
use crate::range_tombstone::{Cover, Fragments, KeyRange};
use crate::read::Lookup;
use crate::table::block::EntryKind;

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
        self.insert_new(key, index, value.into());
    }

    /// Merges operands, the newest first, into what this memtable knows of a key (N6). Returns the bytes of what it stored, which are the
    /// same wherever the same was inserted.
    pub(crate) fn merge(&self, operator: &Operator, key: &[u8], index: LogIndex, operands: &[Bytes]) -> u64 {
        let hidden = self.hidden_below(key, index);
        let below = match self.get_version(key, index) {
            Some((found, below)) if found >= hidden => Some(below),
            _ if hidden > LogIndex(0) => Some(Lookup::Deleted),
            _ => None,
        };
        // It combined operands when the entry was looked at: one that does not now keeps no promise, and gets no value.
        let merged = operator.resolve(key, below, operands).unwrap_or(Lookup::Failed);
        let (new, bytes) = match &merged {
            Lookup::Value(value) => (New::Value(value), value.len()),
            Lookup::Operand(operand) => (New::Operand(operand), operand.len()),
            Lookup::Deleted => (New::Tombstone, 0),
            Lookup::Failed => (New::Failed, 0),
        };
        self.insert_new(key, index, new);
        (key.len() + bytes) as u64
    }

    fn insert_new(&self, key: &[u8], index: LogIndex, new: New<'_>) {
        let mut writer = self.writer();
        if writer.tree.insert_new(key, index.0, new) {
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
        let lookup = match (version.value(), version.kind()) {
            (Some(operand), Kind::Operand) => Lookup::Operand(operand),
            (Some(value), _) => Lookup::Value(value),
            (None, Kind::Failed) => Lookup::Failed,
            (None, _) => Lookup::Deleted,
        };
        Some((LogIndex(version.index()), lookup))
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

    /// What the version is.
    #[inline]
    pub(crate) fn kind(&self) -> EntryKind {
        match self.0.version().map(Version::kind) {
            Some(Kind::Value) => EntryKind::Value,
            Some(Kind::Tombstone) | None => EntryKind::Tombstone,
            Some(Kind::Operand) => EntryKind::Operand,
            Some(Kind::Failed) => EntryKind::Failed,
        }
    }

    /// `None` is a tombstone, or a key of which a merge was refused; of a merge the operand.
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
    use crate::{MergeOperators, OperatorId};

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

    /// An operand stays one until something is known that it merges into, and each version stands for itself: whoever reads at its index
    /// needs no other (N6).
    #[test]
    fn an_operand_is_merged_into_the_version_before_it() {
        let memtable = Memtable::new(&MemoryBudget::new(1 << 30));
        let append = MergeOperators::default().get(&OperatorId::APPEND).expect("one of this crate").clone();
        let merge = |index, operand: &'static [u8]| {
            memtable.merge(&append, b"key", LogIndex(index), &[Bytes::from_static(operand)])
        };
        assert_eq!(
            (merge(1, b"a"), merge(2, b"b"), merge(2, b"c")),
            (4, 5, 6),
            "bytes of the key and of what is held then"
        );
        memtable.insert(b"key", LogIndex(3), None);
        merge(4, b"d");
        let range = KeyRange::from_parts(Bytes::from_static(b"key"), None);
        memtable.remove_range(&range, LogIndex(5));
        merge(5, b"e");
        memtable.remove_range(&range, LogIndex(6));
        merge(7, b"f");
        merge(8, &[b'g'; crate::VALUE_BYTES_MAX]);
        merge(9, b"h");
        memtable.insert(b"key", LogIndex(10), Some(&Bytes::from_static(b"i")));
        merge(10, b"j");
        let bytes = Bytes::from_static;
        let expected = [
            (1, Lookup::Operand(bytes(b"a")), EntryKind::Operand),
            (2, Lookup::Operand(bytes(b"abc")), EntryKind::Operand),
            (3, Lookup::Deleted, EntryKind::Tombstone),
            (4, Lookup::Value(bytes(b"d")), EntryKind::Value),
            (5, Lookup::Value(bytes(b"e")), EntryKind::Value),
            (7, Lookup::Value(bytes(b"f")), EntryKind::Value),
            (8, Lookup::Failed, EntryKind::Failed),
            (9, Lookup::Failed, EntryKind::Failed),
            (10, Lookup::Value(bytes(b"ij")), EntryKind::Value),
        ];
        for (index, lookup, kind) in expected {
            assert_eq!(memtable.get_version(b"key", LogIndex(index)), Some((LogIndex(index), lookup.clone())));
            let mut cursor = memtable.cursor(LogIndex(index), false);
            cursor.seek_start();
            assert_eq!((cursor.index(), cursor.kind()), (LogIndex(index), kind));
            let value = match lookup {
                Lookup::Value(value) | Lookup::Operand(value) => Some(value),
                Lookup::Deleted | Lookup::Failed => None,
            };
            assert_eq!((cursor.value(), cursor.value_part()), (value.clone(), value.as_deref()), "at={index}");
        }
    }

    /// A large operand stays where it came in; what several were combined into is held in as many bytes as it has, which are counted.
    #[test]
    fn a_large_operand_is_counted_and_what_it_becomes_has_no_room_to_spare() {
        let budget = MemoryBudget::new(1 << 30);
        let memtable = Memtable::new(&budget);
        let append = MergeOperators::default().get(&OperatorId::APPEND).expect("one of this crate").clone();
        let operand = Bytes::from(vec![1; 100 << 10]);
        let found = |at| match memtable.get(b"key", LogIndex(at)) {
            Some(Lookup::Operand(operand)) => operand,
            other => panic!("{other:?}"),
        };
        memtable.merge(&append, b"key", LogIndex(1), std::slice::from_ref(&operand));
        assert_eq!(found(1).as_ptr(), operand.as_ptr());
        let before = budget.used();
        memtable.merge(&append, b"key", LogIndex(2), &[Bytes::from_static(b"and some")]);
        let combined = found(2);
        assert_eq!(combined.len(), operand.len() + 8);
        assert!(budget.used() >= before + combined.len() as u64);
        drop(memtable);
        assert_eq!(budget.used(), 0);
        let owned = combined.try_into_mut().expect("nobody else has it");
        assert_eq!(owned.capacity(), owned.len());
    }
}
