//! The memtable: every version of the keys written in one generation to one keyspace of one branch.
//!
//! A tree of three kinds of nodes. *Leaves* hold up to [`LEAF_SLOTS`] versions in order, each leaf under a lock of its own
//! that the writer holds for the one insert. *Inner* nodes are immutable: when a leaf splits, the path to it is copied and
//! the root swapped. A leaf knows its right neighbour, so a reader that came by an old path walks on to the right.
//!
//! # Place
//! written by the applier of a group, read by everybody; below `read`
//! # Invariants
//! N1. One writer at a time; readers never wait for more than one insert into one leaf.
//! N2. Versions are ordered by key, and for one key from the newest to the oldest.
//! N3. A leaf holds exactly the versions from its `low` up to the `low` of its right neighbour. `low` never changes.
//! N4. Nothing is removed. So a cursor that copied a leaf has seen all that its reader may see of that range: versions that
//!     come later are above the reader's index.
//! N5. Removed ranges stand beside the tree ([`ranges`]): whoever reads versions compares them with those.
//!
//! # Why not
//! A concurrent skip list takes an allocation and a chain of cache misses a key: measured at 2.3 us an insert where this
//! takes a fraction. A sequence lock without reader locks would be faster still for many readers, and needs unsafe code.

mod ranges;

use std::cmp::Ordering;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};

use self::ranges::Ranges;
use crate::LogIndex;
use crate::memory::{MemoryBudget, MemoryKind, Reservation};
use crate::range_tombstone::{Cover, Fragments, KeyRange};
use crate::read::Lookup;
use crate::table::block::{common_prefix, head};

/// Versions of a leaf at most.
const LEAF_SLOTS: usize = 64;
/// Children of an inner node at most.
const INNER_CHILDREN: usize = 64;
/// A value of more than this many bytes stays a slice of the log entry; a smaller one is copied, so that it does not keep
/// the buffer of a whole batch in memory.
const INLINE_BYTES_MAX: usize = 4 << 10;
/// The first piece of memory for keys and values, doubled up to the second.
const ARENA_BYTES_MIN: usize = 4 << 10;
const ARENA_BYTES_MAX: usize = 256 << 10;
/// What an entry of an inner node costs.
const CHILD_BYTES: u64 = 64;

const _: () = assert!(size_of::<Slot>() <= 56, "with its head a slot takes a cache line");

/// All versions written in one generation to one keyspace of one branch.
pub(crate) struct Memtable {
    root: ArcSwap<Node>,
    ranges: Ranges,
    writer: Mutex<Writer>,
    entries: AtomicU64,
    bytes: AtomicU64,
}

struct Writer {
    arena: BytesMut,
    arena_bytes: usize,
    memory: Reservation,
}

/// One version of a key.
#[derive(Clone, Debug)]
struct Slot {
    index: u64,
    /// The key, and after it the value if that is inline.
    data: Bytes,
    large: Option<Box<Bytes>>,
    key_bytes: u32,
    deleted: bool,
}

impl Slot {
    fn key(&self) -> &[u8] {
        &self.data[..self.key_bytes as usize]
    }

    fn value(&self) -> Option<Bytes> {
        match &self.large {
            _ if self.deleted => None,
            Some(large) => Some((**large).clone()),
            None => Some(self.data.slice(self.key_bytes as usize..)),
        }
    }

    fn value_part(&self) -> Option<&[u8]> {
        match &self.large {
            _ if self.deleted => None,
            Some(large) => Some(large),
            None => Some(&self.data[self.key_bytes as usize..]),
        }
    }

    fn version(&self) -> (LogIndex, Lookup) {
        (LogIndex(self.index), self.value().map_or(Lookup::Deleted, Lookup::Value))
    }

    fn fence(&self) -> Fence {
        Fence { key: self.data.slice(..self.key_bytes as usize), index: self.index }
    }
}

/// A place in the order of versions.
#[derive(Clone, Debug)]
struct Fence {
    key: Bytes,
    index: u64,
}

/// The same, borrowed. `u64::MAX` as index stands before all versions of the key.
#[derive(Clone, Copy)]
struct Place<'a> {
    key: &'a [u8],
    index: u64,
}

impl Fence {
    fn cmp(&self, place: &Place<'_>) -> Ordering {
        self.key.as_ref().cmp(place.key).then(place.index.cmp(&self.index))
    }

    fn place(&self) -> Place<'_> {
        Place { key: &self.key, index: self.index }
    }
}

struct Leaf {
    low: Fence,
    state: RwLock<LeafState>,
}

struct LeafState {
    /// Of each slot, eight bytes of the key after what all keys of the leaf share. A search touches few lines of memory
    /// here, and then one slot.
    heads: [u64; LEAF_SLOTS],
    slots: Vec<Slot>,
    next: Option<Arc<Leaf>>,
    /// Bytes that all keys of the leaf have in common, not counted in the heads.
    shared: usize,
}

#[derive(Clone)]
enum Node {
    Inner(Arc<Inner>),
    Leaf(Arc<Leaf>),
}

#[derive(Clone)]
struct Inner {
    /// Bytes that all `lows` but the first have in common.
    shared: usize,
    heads: [u64; INNER_CHILDREN],
    lows: Vec<Fence>,
    children: Vec<Node>,
}

impl LeafState {
    fn new(capacity: usize, next: Option<Arc<Leaf>>) -> Self {
        Self { heads: [0; LEAF_SLOTS], slots: Vec::with_capacity(capacity), next, shared: 0 }
    }

    /// The first slot at or after `place`.
    fn position(&self, place: &Place<'_>) -> usize {
        let Some(first) = self.slots.first() else { return 0 };
        match compare_shared(place.key, first.key(), self.shared) {
            Ordering::Less => return 0,
            Ordering::Greater => return self.slots.len(),
            Ordering::Equal => {}
        }
        let wanted = head(place.key, self.shared);
        let heads = &self.heads[..self.slots.len()];
        let low = heads.partition_point(|head| *head < wanted);
        let equal = heads[low..].iter().take_while(|head| **head == wanted).count();
        let rest = &place.key[self.shared..];
        let before =
            |slot: &Slot| slot.key()[self.shared..].cmp(rest).then_with(|| place.index.cmp(&slot.index)).is_lt();
        // The newest version is the first of its key, and the one that most look for.
        match self.slots.get(low) {
            Some(first) if equal > 0 && before(first) => {
                low + 1 + self.slots[low + 1..low + equal].partition_point(before)
            }
            _ => low,
        }
    }

    /// Puts a slot where [`LeafState::position`] said; there is room.
    fn insert(&mut self, at: usize, slot: Slot) {
        match self.slots.first() {
            None => self.shared = slot.key().len(),
            Some(first) => {
                let shared = common_prefix(slot.key(), first.key());
                if shared < self.shared {
                    self.set_shared(shared);
                }
            }
        }
        let head = head(slot.key(), self.shared);
        self.heads.copy_within(at..self.slots.len(), at + 1);
        self.heads[at] = head;
        self.slots.insert(at, slot);
    }

    /// Counts the heads again after what the keys share.
    fn set_shared(&mut self, shared: usize) {
        self.shared = shared;
        for (place, slot) in self.heads.iter_mut().zip(&self.slots) {
            *place = head(slot.key(), shared);
        }
    }

    fn widest_shared(&self) -> usize {
        match (self.slots.first(), self.slots.last()) {
            (Some(first), Some(last)) => common_prefix(first.key(), last.key()),
            _ => 0,
        }
    }
}

/// Compares the first `shared` bytes; equal only if `key` has them all.
fn compare_shared(key: &[u8], of: &[u8], shared: usize) -> Ordering {
    key[..shared.min(key.len())].cmp(&of[..shared])
}

impl Leaf {
    fn new(low: Fence, state: LeafState) -> Arc<Self> {
        Arc::new(Self { low, state: RwLock::new(state) })
    }

    // A panic while the lock is held leaves a leaf whole: slots are moved by `Vec` in one step.
    fn read(&self) -> RwLockReadGuard<'_, LeafState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, LeafState> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn new(lows: Vec<Fence>, children: Vec<Node>) -> Self {
        let shared = match lows.get(1..) {
            Some([first, .., last]) => common_prefix(&first.key, &last.key),
            Some([only]) => only.key.len(),
            _ => 0,
        };
        let mut heads = [0; INNER_CHILDREN];
        for (place, low) in heads.iter_mut().zip(&lows) {
            *place = head(&low.key, shared);
        }
        Self { shared, heads, lows, children }
    }

    /// The child whose range holds `place`; with `before`, the one that holds what comes right before it.
    fn child(&self, place: &Place<'_>, before: bool) -> usize {
        let Some(second) = self.lows.get(1) else { return 0 };
        match compare_shared(place.key, &second.key, self.shared) {
            Ordering::Less => return 0,
            Ordering::Greater => return self.lows.len() - 1,
            Ordering::Equal => {}
        }
        let wanted = head(place.key, self.shared);
        let (mut low, mut high) = (1, self.lows.len());
        while low < high {
            let middle = low.midpoint(high);
            let order = self.heads[middle].cmp(&wanted).then_with(|| self.lows[middle].cmp(place));
            if order.is_lt() || (order.is_eq() && !before) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low - 1
    }
}

impl Node {
    /// The leaf whose range held `place` when this tree was made.
    fn leaf(&self, place: &Place<'_>, before: bool) -> &Arc<Leaf> {
        let mut node = self;
        loop {
            match node {
                Self::Leaf(leaf) => return leaf,
                Self::Inner(inner) => node = &inner.children[inner.child(place, before)],
            }
        }
    }

    /// A copy of the path with `leaf` in it; a second node when the first became too large.
    fn with(&self, leaf: &Arc<Leaf>) -> (Self, Option<(Fence, Self)>) {
        match self {
            Self::Leaf(_) => (self.clone(), Some((leaf.low.clone(), Self::Leaf(leaf.clone())))),
            Self::Inner(inner) => {
                let at = inner.child(&leaf.low.place(), false);
                let (child, second) = inner.children[at].with(leaf);
                let (mut lows, mut children) = (inner.lows.clone(), inner.children.clone());
                children[at] = child;
                if let Some((low, node)) = second {
                    lows.insert(at + 1, low);
                    children.insert(at + 1, node);
                }
                if children.len() <= INNER_CHILDREN {
                    return (Self::Inner(Arc::new(Inner::new(lows, children))), None);
                }
                // Ascending keys fill the nodes that they leave behind.
                let cut = if at + 2 == children.len() { children.len() - 1 } else { children.len() / 2 };
                let (right_lows, right_children) = (lows.split_off(cut), children.split_off(cut));
                let low = right_lows[0].clone();
                let right = Self::Inner(Arc::new(Inner::new(right_lows, right_children)));
                (Self::Inner(Arc::new(Inner::new(lows, children))), Some((low, right)))
            }
        }
    }
}

impl Memtable {
    /// An empty memtable whose memory is counted in `budget`.
    pub(crate) fn new(budget: &Arc<MemoryBudget>) -> Self {
        let low = Fence { key: Bytes::new(), index: u64::MAX };
        Self {
            root: ArcSwap::from_pointee(Node::Leaf(Leaf::new(low, LeafState::new(0, None)))),
            ranges: Ranges::default(),
            writer: Mutex::new(Writer {
                arena: BytesMut::new(),
                arena_bytes: ARENA_BYTES_MIN,
                memory: budget.reserve(MemoryKind::Memtable, 0),
            }),
            entries: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// Sets (`Some`) or removes (`None`) a key at `index`. The later of two calls with one key and one index wins.
    ///
    /// Readable when it returns by whoever reads at `index` or above.
    pub(crate) fn insert(&self, key: &[u8], index: LogIndex, value: Option<&Bytes>) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let inline = value.filter(|value| value.len() <= INLINE_BYTES_MAX);
        let large = value.filter(|value| value.len() > INLINE_BYTES_MAX);
        let mut grown = large.map_or(0, |value| value.len() as u64);
        let data = writer.store(key, inline.map_or(&[], |value| value.as_ref()), &mut grown);
        let slot = Slot {
            index: index.0,
            data,
            large: large.map(|value| Box::new(value.clone())),
            key_bytes: key.len() as u32,
            deleted: value.is_none(),
        };
        self.place(slot, &mut grown);
        self.grow(&mut writer, grown);
    }

    /// Removes the keys of a range at `index`: versions of before are hidden from whoever reads at `index` or above. Returns the bytes
    /// that it took, which are the same wherever the same was inserted.
    pub(crate) fn remove_range(&self, range: &KeyRange, index: LogIndex) -> u64 {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let grown = self.ranges.insert(range, index);
        self.grow(&mut writer, grown);
        grown
    }

    fn grow(&self, writer: &mut Writer, grown: u64) {
        if grown > 0 {
            let bytes = self.bytes.fetch_add(grown, Atomic::Relaxed) + grown;
            writer.memory.resize(bytes);
        }
    }

    fn place(&self, slot: Slot, grown: &mut u64) {
        let key = slot.data.slice(..slot.key_bytes as usize);
        let place = Place { key: &key, index: slot.index };
        // There is one writer, so the tree is as the last insert left it: no neighbour has to be looked for.
        let root = self.root.load();
        let leaf = root.leaf(&place, false);
        let mut state = leaf.write();
        let at = state.position(&place);
        if let Some(same) = state.slots.get_mut(at)
            && same.index == slot.index
            && same.key() == slot.key()
        {
            *same = slot;
            return;
        }
        self.entries.fetch_add(1, Atomic::Relaxed);
        let capacity = state.slots.capacity();
        if state.slots.len() < LEAF_SLOTS {
            state.insert(at, slot);
            *grown += ((state.slots.capacity() - capacity) * size_of::<Slot>()) as u64;
            return;
        }
        // Ascending keys fill the leaves that they leave behind.
        let cut = if at == LEAF_SLOTS { LEAF_SLOTS } else { LEAF_SLOTS / 2 };
        let mut right = LeafState::new(LEAF_SLOTS, state.next.take());
        right.slots.extend(state.slots.drain(cut..));
        right.set_shared(right.widest_shared());
        let widest = state.widest_shared();
        state.set_shared(widest);
        if at >= cut {
            right.insert(at - cut, slot)
        } else {
            state.insert(at, slot)
        }
        let right = Leaf::new(right.slots[0].fence(), right);
        state.next = Some(right.clone());
        drop(state);
        *grown += (LEAF_SLOTS * size_of::<Slot>() + size_of::<Leaf>()) as u64 + CHILD_BYTES;
        let (left, second) = root.with(&right);
        let root_new = match second {
            None => left,
            Some((low, node)) => {
                let first = Fence { key: Bytes::new(), index: u64::MAX };
                Node::Inner(Arc::new(Inner::new(vec![first, low], vec![left, node])))
            }
        };
        drop(root);
        self.root.store(Arc::new(root_new));
    }

    /// The newest version of a key with an index of at most `at`, without that index.
    pub(crate) fn get(&self, key: &[u8], at: LogIndex) -> Option<Lookup> {
        self.get_version(key, at).map(|(_, lookup)| lookup)
    }

    /// The newest version of a key with an index of at most `at`.
    pub(crate) fn get_version(&self, key: &[u8], at: LogIndex) -> Option<(LogIndex, Lookup)> {
        let place = Place { key, index: at.0 };
        let found = |slot: &Slot| (slot.key() == key).then(|| slot.version());
        self.visit(&place, false, |_, state| match state.slots.get(state.position(&place)) {
            Some(slot) => found(slot),
            // The versions of the key may go on in the neighbour, which then begins with one.
            None => {
                let next = state.next.as_ref().filter(|next| next.low.key.as_ref() == key)?;
                next.read().slots.first().and_then(found)
            }
        })
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
    pub(crate) fn cursor(self: &Arc<Self>, at: LogIndex, reverse: bool) -> MemtableCursor {
        MemtableCursor {
            memtable: self.clone(),
            at,
            reverse,
            buffer: Vec::with_capacity(LEAF_SLOTS),
            position: 0,
            more: More::Nothing,
            candidate: None,
        }
    }

    /// Memory held, about.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Atomic::Relaxed)
    }

    /// Versions held.
    pub(crate) fn entries(&self) -> u64 {
        self.entries.load(Atomic::Relaxed)
    }

    /// Nothing was inserted, and no range removed.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries() == 0 && !self.ranges.any()
    }

    /// The first key.
    #[cfg(test)]
    fn first_key(&self) -> Option<Bytes> {
        let place = Place { key: &[], index: u64::MAX };
        self.visit(&place, false, |_, state| state.slots.first().map(|slot| slot.fence().key))
    }

    /// The last key.
    pub(crate) fn last_key(&self) -> Option<Bytes> {
        let root = self.root.load();
        let mut node: &Node = &root;
        loop {
            match node {
                Node::Inner(inner) => node = inner.children.last().expect("an inner node has children"),
                Node::Leaf(leaf) => return last_of(leaf),
            }
        }
    }

    /// Calls `f` with the leaf whose range holds `place` (with `before`: what comes right before it), locked for reading.
    fn visit<R>(&self, place: &Place<'_>, before: bool, f: impl FnOnce(&Arc<Leaf>, &LeafState) -> R) -> R {
        let root = self.root.load();
        visit_from(root.leaf(place, before), place, before, f)
    }
}

/// Walks to the right while the leaf has been split since the path to it was read: at most as often as that happened.
fn visit_from<R>(leaf: &Arc<Leaf>, place: &Place<'_>, before: bool, f: impl FnOnce(&Arc<Leaf>, &LeafState) -> R) -> R {
    let next = {
        let state = leaf.read();
        let beyond = |next: &Leaf| if before { next.low.cmp(place).is_lt() } else { next.low.cmp(place).is_le() };
        match &state.next {
            Some(next) if beyond(next) => next.clone(),
            _ => return f(leaf, &state),
        }
    };
    visit_from(&next, place, before, f)
}

fn last_of(leaf: &Arc<Leaf>) -> Option<Bytes> {
    let next = {
        let state = leaf.read();
        match &state.next {
            Some(next) => next.clone(),
            None => return state.slots.last().map(|slot| slot.fence().key),
        }
    };
    last_of(&next)
}

impl Writer {
    /// Copies a key and an inline value into memory of the memtable.
    fn store(&mut self, key: &[u8], value: &[u8], grown: &mut u64) -> Bytes {
        let length = key.len() + value.len();
        if self.arena.capacity() - self.arena.len() < length {
            let piece = self.arena_bytes.max(length);
            self.arena = BytesMut::with_capacity(piece);
            self.arena_bytes = (self.arena_bytes * 2).min(ARENA_BYTES_MAX);
            *grown += piece as u64;
        }
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        self.arena.split().freeze()
    }
}

/// What a cursor has not copied yet.
enum More {
    Nothing,
    /// Forward: from this leaf on.
    Leaf(Arc<Leaf>),
    /// Reverse: what is before this place.
    Before(Fence),
}

/// A cursor over one memtable. Copies a leaf at a time, so it holds no lock between calls.
pub(crate) struct MemtableCursor {
    memtable: Arc<Memtable>,
    at: LogIndex,
    reverse: bool,
    buffer: Vec<Slot>,
    position: usize,
    more: More,
    /// Forward: the last key given a version, if the leaf ended with it. Reverse: the newest visible version of a key so
    /// far, whose newer versions may stand in the leaf before.
    candidate: Option<Slot>,
}

impl MemtableCursor {
    /// Stands on an entry.
    #[inline]
    pub(crate) fn valid(&self) -> bool {
        self.position < self.buffer.len()
    }

    /// The key; the cursor is valid.
    #[inline]
    pub(crate) fn key(&self) -> &[u8] {
        self.buffer.get(self.position).map_or(&[], Slot::key)
    }

    /// The index of the version.
    #[inline]
    pub(crate) fn index(&self) -> LogIndex {
        self.buffer.get(self.position).map_or(LogIndex(0), |slot| LogIndex(slot.index))
    }

    /// `None` is a tombstone.
    #[inline]
    pub(crate) fn value(&self) -> Option<Bytes> {
        self.buffer.get(self.position).and_then(Slot::value)
    }

    /// As [`MemtableCursor::value`], borrowed.
    #[inline]
    pub(crate) fn value_part(&self) -> Option<&[u8]> {
        self.buffer.get(self.position).and_then(Slot::value_part)
    }

    /// Goes to the first entry in the cursor's direction.
    pub(crate) fn seek_start(&mut self) {
        self.reset();
        if self.reverse {
            let memtable = self.memtable.clone();
            // A key that is inserted above it meanwhile is above this reader's index too.
            match memtable.last_key() {
                Some(key) => self.seek(&key, false),
                None => self.more = More::Nothing,
            }
        } else {
            self.seek(&[], false);
        }
    }

    /// Goes to the first entry in the cursor's direction at `key`, or beyond it. With `exclusive`, beyond it.
    pub(crate) fn seek(&mut self, key: &[u8], exclusive: bool) {
        self.reset();
        let mut successor;
        let key = if exclusive == self.reverse {
            key
        } else {
            // The place right after all versions of `key` is the first one of the key that follows it.
            successor = Vec::with_capacity(key.len() + 1);
            successor.extend_from_slice(key);
            successor.push(0);
            &successor
        };
        let place = Place { key, index: u64::MAX };
        let memtable = self.memtable.clone();
        if self.reverse {
            memtable.visit(&place, true, |leaf, state| self.take_back(leaf, state, state.position(&place)));
        } else {
            memtable.visit(&place, false, |_, state| self.take_forward(state, state.position(&place)));
        }
        self.fill();
    }

    /// Goes one entry on.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.position += 1;
        if self.position >= self.buffer.len() {
            self.fill();
        }
    }

    fn reset(&mut self) {
        self.buffer.clear();
        self.position = 0;
        self.more = More::Nothing;
        self.candidate = None;
    }

    /// Copies leaves until there is an entry or nothing is left.
    fn fill(&mut self) {
        while self.position >= self.buffer.len() {
            self.position = 0;
            if !self.reverse {
                self.candidate = self.buffer.pop().or(self.candidate.take());
            }
            self.buffer.clear();
            match std::mem::replace(&mut self.more, More::Nothing) {
                More::Nothing => {
                    if self.reverse {
                        self.buffer.extend(self.candidate.take());
                    }
                    return;
                }
                More::Leaf(leaf) => self.take_forward(&leaf.read(), 0),
                More::Before(fence) => {
                    let memtable = self.memtable.clone();
                    let place = fence.place();
                    memtable.visit(&place, true, |leaf, state| self.take_back(leaf, state, state.position(&place)));
                }
            }
        }
    }

    /// Copies the newest visible version of each key from `from` on.
    fn take_forward(&mut self, state: &LeafState, from: usize) {
        for slot in &state.slots[from..] {
            let same = self.buffer.last().or(self.candidate.as_ref()).is_some_and(|last| last.key() == slot.key());
            if slot.index <= self.at.0 && !same {
                self.buffer.push(slot.clone());
            }
        }
        self.more = state.next.clone().map_or(More::Nothing, More::Leaf);
    }

    /// Copies the newest visible version of each key before `to`, from the last on.
    fn take_back(&mut self, leaf: &Arc<Leaf>, state: &LeafState, to: usize) {
        for slot in state.slots[..to].iter().rev() {
            if self.candidate.as_ref().is_some_and(|candidate| candidate.key() != slot.key()) {
                self.buffer.extend(self.candidate.take());
            }
            // Older versions come first this way, so the last one that is visible is the newest.
            if slot.index <= self.at.0 {
                self.candidate = Some(slot.clone());
            }
        }
        self.more = if leaf.low.index == u64::MAX && leaf.low.key.is_empty() {
            More::Nothing
        } else {
            More::Before(leaf.low.clone())
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::Bound;

    use proptest::prelude::*;

    use super::*;

    /// Key, and reversed index: the same order as the memtable's.
    type Model = BTreeMap<(Vec<u8>, std::cmp::Reverse<u64>), Option<Vec<u8>>>;

    fn visible(model: &Model, at: u64) -> Vec<(Vec<u8>, u64, Option<Vec<u8>>)> {
        let mut out: Vec<(Vec<u8>, u64, Option<Vec<u8>>)> = Vec::new();
        for ((key, index), value) in model {
            if index.0 <= at && out.last().is_none_or(|last| &last.0 != key) {
                out.push((key.clone(), index.0, value.clone()));
            }
        }
        out
    }

    fn drain(mut cursor: MemtableCursor) -> Vec<(Vec<u8>, u64, Option<Vec<u8>>)> {
        let mut out = Vec::new();
        while cursor.valid() {
            out.push((cursor.key().to_vec(), cursor.index().0, cursor.value().map(|value| value.to_vec())));
            cursor.advance();
        }
        out
    }

    fn check(ops: &[(Vec<u8>, Option<Vec<u8>>)], probes: &[Vec<u8>]) {
        let budget = MemoryBudget::new(1 << 30);
        let memtable = Arc::new(Memtable::new(&budget));
        let mut model = Model::new();
        for (at, (key, value)) in ops.iter().enumerate() {
            // Two mutations an entry: a key may be written twice at one index.
            let index = 1 + at as u64 / 2;
            memtable.insert(key, LogIndex(index), value.clone().map(Bytes::from).as_ref());
            model.insert((key.clone(), std::cmp::Reverse(index)), value.clone());
        }
        assert_eq!(memtable.entries(), model.len() as u64);
        assert_eq!(memtable.first_key().map(|key| key.to_vec()), model.keys().next().map(|key| key.0.clone()));
        assert_eq!(memtable.last_key().map(|key| key.to_vec()), model.keys().next_back().map(|key| key.0.clone()));
        let newest = ops.len() as u64 / 2 + 1;
        for at in [0, 1, newest / 2, newest, u64::MAX] {
            let expected = visible(&model, at);
            let mut forward = memtable.cursor(LogIndex(at), false);
            forward.seek_start();
            assert_eq!(drain(forward), expected, "forward at={at}");
            let mut reverse = memtable.cursor(LogIndex(at), true);
            reverse.seek_start();
            assert_eq!(drain(reverse), expected.iter().rev().cloned().collect::<Vec<_>>(), "reverse at={at}");
            for probe in probes.iter().chain(ops.iter().map(|op| &op.0)) {
                let value = expected.iter().find(|entry| &entry.0 == probe).map(|entry| match &entry.2 {
                    Some(value) => Lookup::Value(value.clone().into()),
                    None => Lookup::Deleted,
                });
                assert_eq!(memtable.get(probe, LogIndex(at)), value, "get at={at} key={probe:?}");
            }
            for probe in probes {
                for exclusive in [false, true] {
                    let from = if exclusive { Bound::Excluded(probe) } else { Bound::Included(probe) };
                    let inside = |entry: &&(Vec<u8>, u64, Option<Vec<u8>>), above: bool| {
                        let order = if above { entry.0.cmp(probe) } else { probe.cmp(&entry.0) };
                        order.is_gt() || (order.is_eq() && from == Bound::Included(probe))
                    };
                    let mut cursor = memtable.cursor(LogIndex(at), false);
                    cursor.seek(probe, exclusive);
                    let above: Vec<_> = expected.iter().filter(|entry| inside(entry, true)).cloned().collect();
                    assert_eq!(drain(cursor), above, "seek at={at} key={probe:?} exclusive={exclusive}");
                    let mut cursor = memtable.cursor(LogIndex(at), true);
                    cursor.seek(probe, exclusive);
                    let below: Vec<_> = expected.iter().rev().filter(|entry| inside(entry, false)).cloned().collect();
                    assert_eq!(drain(cursor), below, "seek back at={at} key={probe:?} exclusive={exclusive}");
                }
            }
        }
        drop(memtable);
        assert_eq!(budget.used(), 0);
    }

    fn key() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            // Few keys, so that many versions of one go across leaves.
            (0u8..12).prop_map(|key| vec![b'k', key]),
            // Common prefixes around the eight bytes of a head, and zeros at the end.
            (prop::collection::vec(0u8..3, 0..12)).prop_map(|tail| [b"prefix".to_vec(), tail].concat()),
            prop::collection::vec(any::<u8>(), 1..20),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn is_what_an_ordered_map_is(
            ops in prop::collection::vec((key(), prop::option::of(prop::collection::vec(any::<u8>(), 0..40))), 1..600),
            probes in prop::collection::vec(key(), 8),
        ) {
            check(&ops, &probes);
        }
    }

    #[test]
    fn many_versions_of_one_key_span_leaves() {
        let ops: Vec<_> = (0..1000u32).map(|at| (b"hot".to_vec(), Some(at.to_le_bytes().to_vec()))).collect();
        check(&ops, &[b"hot".to_vec(), b"ho".to_vec(), b"hot\0".to_vec(), b"i".to_vec()]);
    }

    #[test]
    fn ascending_and_descending_keys() {
        for descending in [false, true] {
            let ops: Vec<_> = (0..6000u32)
                .map(|at| if descending { 6000 - at } else { at })
                .map(|at| (format!("common/prefix/{at:08}").into_bytes(), Some(vec![7; 3])))
                .collect();
            let memtable = Arc::new(Memtable::new(&MemoryBudget::new(1 << 30)));
            for (key, value) in &ops {
                memtable.insert(key, LogIndex(1), value.clone().map(Bytes::from).as_ref());
            }
            let mut cursor = memtable.cursor(LogIndex(1), false);
            cursor.seek_start();
            let found = drain(cursor);
            assert!(found.len() == ops.len() && found.is_sorted());
            assert!(ops.iter().all(|op| memtable.get(&op.0, LogIndex(1)).is_some()));
        }
    }

    #[test]
    fn a_large_value_stays_where_it_is_and_a_small_one_is_copied() {
        let memtable = Memtable::new(&MemoryBudget::new(1 << 30));
        let entry = Bytes::from(vec![1; 100 << 10]);
        memtable.insert(b"small", LogIndex(1), Some(&entry.slice(..100)));
        memtable.insert(b"large", LogIndex(1), Some(&entry.slice(100..50_000)));
        let address = |key| match memtable.get(key, LogIndex(1)) {
            Some(Lookup::Value(value)) => value.as_ptr(),
            other => panic!("{other:?}"),
        };
        assert_eq!(address(b"large"), entry[100..].as_ptr());
        assert_ne!(address(b"small"), entry.as_ptr());
    }

    /// The writer splits leaves below readers that came by older paths: each must see every key of its index, in order.
    #[allow(clippy::disallowed_methods, reason = "real threads are what is tested")]
    #[test]
    fn readers_beside_the_writer_see_their_index_whole() {
        const KEYS: u64 = 20_000;
        let memtable = Arc::new(Memtable::new(&MemoryBudget::new(1 << 30)));
        let written = AtomicU64::new(0);
        // Multiplication by an odd number scatters and stays a bijection.
        let key = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        std::thread::scope(|scope| {
            for reverse in [false, true] {
                let (memtable, written) = (memtable.clone(), &written);
                scope.spawn(move || {
                    loop {
                        let at = written.load(Atomic::Acquire);
                        let mut cursor = memtable.cursor(LogIndex(at), reverse);
                        cursor.seek_start();
                        let seen = drain(cursor);
                        assert_eq!(seen.len() as u64, at, "reverse={reverse}");
                        assert!(seen.windows(2).all(|pair| (pair[0].0 < pair[1].0) != reverse));
                        for probe in (1..=at).rev().take(500) {
                            assert!(memtable.get(&key(probe), LogIndex(at)).is_some(), "key={probe} at={at}");
                        }
                        if at == KEYS {
                            break;
                        }
                    }
                });
            }
            for at in 1..=KEYS {
                memtable.insert(&key(at), LogIndex(at), Some(&Bytes::from_static(b"value")));
                written.store(at, Atomic::Release);
            }
        });
    }
}
