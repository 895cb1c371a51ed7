//! Nodes: up to [`WIDTH`] entries in the order that one word says.
//!
//! # Invariants
//! O1. A slot is written once, before the first order that names it is stored. So who has loaded an order finds all that it names,
//!     whatever the writer does meanwhile.
//! O2. An order only gains slots. Which entries a node has shrinks in another way: it is replaced by new nodes, and stays as it was
//!     for those who are in it.
//! O3. All keys of a node begin with the same `shared` bytes. Whoever searches there for a key that begins otherwise has come to an
//!     `edge` of the tree; elsewhere the fences in the nodes above share those bytes, and no search compares them.
#![forbid(unsafe_code)]

use std::array::from_fn;
use std::cmp::Ordering as Order;

use crate::arena::{AtomicRef, Pages, Ref};
use crate::entry::{Head, Version};
use crate::key::{compare_shared, head};
use crate::sync::{AtomicU64, Ordering};

/// Entries of a node at most: a leaf is four lines of the cache. Few for loom, so that few inserts split.
pub(crate) const WIDTH: usize = if cfg!(loom) { 3 } else { 14 };

#[cfg(not(loom))]
const _: () = assert!(size_of::<Leaf>() == 256 && size_of::<Inner>() == 384);

/// Which slots of a node are in use, by rank: their count in the lowest four bits, then four bits for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ranks(u64);

impl Ranks {
    /// Slots `0..count` as they lie.
    pub(crate) fn first(count: usize) -> Self {
        debug_assert!(count <= WIDTH);
        (0..count).fold(Self(0), |ranks, rank| ranks.insert(rank))
    }

    #[inline]
    pub(crate) fn count(self) -> usize {
        (self.0 & 15) as usize
    }

    /// The slot of a rank below the count.
    #[inline]
    pub(crate) fn slot(self, rank: usize) -> usize {
        debug_assert!(rank < self.count());
        (self.0 >> (4 * rank + 4)) as usize & 15
    }

    /// Gives the next free slot the rank, and those from there on the next ones.
    #[must_use]
    pub(crate) fn insert(self, rank: usize) -> Self {
        let (slots, count) = (self.0 >> 4, self.0 & 15);
        let below = slots & ((1 << (4 * rank)) - 1);
        let above = slots >> (4 * rank) << (4 * rank + 4);
        Self((above | count << (4 * rank) | below) << 4 | (count + 1))
    }
}

/// The part that leaves and inner nodes have in common.
#[repr(C)]
struct Keys {
    ranks: AtomicU64,
    shared: u32,
    edge: bool,
    slots: [Slot; WIDTH],
}

/// A key of a node, and where it leads: what a search follows comes into the cache with what it compares.
struct Slot {
    /// Eight bytes of the key after those that all share.
    head: AtomicU64,
    /// In a leaf the newest version of the key, in an inner node the child.
    to: AtomicRef<()>,
}

/// A slot as it is copied from node to node.
#[derive(Clone, Copy)]
pub(crate) struct Item {
    /// None at the low end of an inner node that nothing is below.
    pub(crate) entry: Option<Ref<Head>>,
    /// In an inner node.
    pub(crate) child: Option<Child>,
}

/// What all keys of a node begin with.
#[derive(Clone, Copy)]
pub(crate) struct Prefix {
    pub(crate) shared: usize,
    pub(crate) edge: bool,
}

/// A node of the level below.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Child(Ref<()>);

/// Entries, one for each key: the newest version.
#[repr(C, align(128))]
pub(crate) struct Leaf {
    keys: Keys,
    /// Neighbours. A leaf that was replaced keeps those that it had then, and they hold what they held for a reader who was there.
    pub(crate) next: AtomicRef<Leaf>,
    pub(crate) prev: AtomicRef<Leaf>,
}

/// Children, each by the low end of its keys.
#[repr(C, align(128))]
pub(crate) struct Inner {
    keys: Keys,
    /// Of each child the first entry that it ever had: its key is the low end of the child.
    lows: [AtomicRef<Head>; WIDTH],
    /// 1 above the leaves.
    pub(crate) level: u32,
}

impl Child {
    pub(crate) fn leaf(self) -> Ref<Leaf> {
        self.0.cast()
    }

    pub(crate) fn inner(self) -> Ref<Inner> {
        self.0.cast()
    }
}

impl From<Ref<Leaf>> for Child {
    fn from(leaf: Ref<Leaf>) -> Self {
        Self(leaf.cast())
    }
}

impl From<Ref<Inner>> for Child {
    fn from(inner: Ref<Inner>) -> Self {
        Self(inner.cast())
    }
}

impl Keys {
    fn new(pages: &Pages, items: &[Item], prefix: Prefix, to: impl Fn(&Item) -> Option<Ref<()>>) -> Self {
        let key_head = |at: Ref<Head>| head(Version::new(pages, at).key(), prefix.shared);
        Self {
            ranks: AtomicU64::new(Ranks::first(items.len()).0),
            shared: prefix.shared as u32,
            edge: prefix.edge && prefix.shared > 0,
            slots: from_fn(|slot| {
                let item = items.get(slot);
                let head = item.and_then(|item| item.entry).map_or(0, key_head);
                Slot { head: AtomicU64::new(head), to: AtomicRef::new(item.and_then(&to)) }
            }),
        }
    }

    #[inline]
    fn ranks(&self) -> Ranks {
        Ranks(self.ranks.load(Ordering::Acquire))
    }

    /// The rank of the first key of an order that is not below `key`, and whether it is that key.
    #[inline]
    fn find<'a>(&self, ranks: Ranks, key: &[u8], entry: impl Fn(usize) -> Option<Version<'a>>) -> (usize, bool) {
        let count = ranks.count();
        let shared = self.shared as usize;
        if self.edge
            && let Some(last) = entry(ranks.slot(count - 1))
        {
            match compare_shared(key, last.key(), shared) {
                Order::Less => return (0, false),
                Order::Greater => return (count, false),
                Order::Equal => {}
            }
        }
        let wanted = head(key, shared);
        let mut rank = self.below(count, wanted);
        while rank < count {
            let slot = ranks.slot(rank);
            if self.slots[slot].head.load(Ordering::Relaxed) != wanted {
                break;
            }
            match entry(slot).map(|entry| entry.key()[shared..].cmp(&key[shared..])) {
                None | Some(Order::Less) => rank += 1,
                Some(order) => return (rank, order.is_eq()),
            }
        }
        (rank, false)
    }

    /// How many of the first `count` heads are below: the rank, since slots are used from the first on, in whatever order they lie.
    #[inline]
    fn below(&self, count: usize, wanted: u64) -> usize {
        let (fours, rest) = self.slots[..count.min(WIDTH)].as_chunks::<4>();
        let below = |slot: &Slot| usize::from(slot.head.load(Ordering::Relaxed) < wanted);
        let mut rank = 0;
        for [a, b, c, d] in fours {
            rank += below(a) + below(b) + below(c) + below(d);
        }
        rank + rest.iter().map(below).sum::<usize>()
    }

    /// True when there is room for `key` in this very node, whose last entry is `last`.
    fn takes<'a>(&self, ranks: Ranks, key: &[u8], last: impl Fn(usize) -> Option<Version<'a>>) -> bool {
        let alike = |last: Version<'_>| compare_shared(key, last.key(), self.shared as usize).is_eq();
        let count = ranks.count();
        count < WIDTH && (!self.edge || last(ranks.slot(count - 1)).is_none_or(alike))
    }

    /// Puts a key at a rank, into the next free slot; there is room. Whatever else belongs to the slot is written before.
    fn insert(&self, ranks: Ranks, rank: usize, key: &[u8], to: Ref<()>) {
        let slot = &self.slots[ranks.count()];
        slot.head.store(head(key, self.shared as usize), Ordering::Relaxed);
        slot.to.store(to, Ordering::Relaxed);
        self.ranks.store(ranks.insert(rank).0, Ordering::Release);
    }

    /// Where a slot that an order named leads.
    #[inline]
    fn to(&self, slot: usize) -> Option<Ref<()>> {
        self.slots[slot].to.load(Ordering::Acquire)
    }
}

impl Leaf {
    pub(crate) fn new(
        pages: &Pages,
        items: &[Item],
        prefix: Prefix,
        (prev, next): (Option<Ref<Leaf>>, Option<Ref<Leaf>>),
    ) -> Self {
        let keys = Keys::new(pages, items, prefix, |item| item.entry.map(Ref::cast));
        Self { keys, next: AtomicRef::new(next), prev: AtomicRef::new(prev) }
    }

    /// The order of now.
    #[inline]
    pub(crate) fn ranks(&self) -> Ranks {
        self.keys.ranks()
    }

    /// The newest version in a slot that an order named.
    #[inline]
    pub(crate) fn entry<'a>(&self, pages: &'a Pages, slot: usize) -> Option<Version<'a>> {
        self.keys.to(slot).map(|at| Version::new(pages, at.cast()))
    }

    /// The rank of the first key of an order that is not below `key`, and whether it is that key.
    #[inline]
    pub(crate) fn find(&self, pages: &Pages, ranks: Ranks, key: &[u8]) -> (usize, bool) {
        self.keys.find(ranks, key, |slot| self.entry(pages, slot))
    }

    /// True when there is room for an entry with this key in this very leaf.
    pub(crate) fn takes(&self, pages: &Pages, ranks: Ranks, key: &[u8]) -> bool {
        self.keys.takes(ranks, key, |slot| self.entry(pages, slot))
    }

    /// Puts an entry at a rank; the leaf takes it.
    pub(crate) fn insert(&self, pages: &Pages, ranks: Ranks, rank: usize, entry: Ref<Head>) {
        self.keys.insert(ranks, rank, Version::new(pages, entry).key(), entry.cast());
    }

    /// Puts a newer version before the one in the slot.
    pub(crate) fn supersede(&self, slot: usize, entry: Ref<Head>) {
        self.keys.slots[slot].to.store(entry.cast(), Ordering::Release);
    }

    /// The entries by rank.
    pub(crate) fn items(&self, pages: &Pages, ranks: Ranks) -> impl Iterator<Item = Item> {
        (0..ranks.count())
            .map(move |rank| Item { entry: self.entry(pages, ranks.slot(rank)).map(Version::at), child: None })
    }
}

impl Inner {
    pub(crate) fn new(pages: &Pages, items: &[Item], prefix: Prefix, level: u32) -> Self {
        let low = |slot: usize| items.get(slot).and_then(|item| item.entry);
        let keys = Keys::new(pages, items, prefix, |item| item.child.map(|child| child.0));
        Self { keys, lows: from_fn(|slot| AtomicRef::new(low(slot))), level }
    }

    /// The entry whose key is the low end of the child in a slot that an order named.
    #[inline]
    pub(crate) fn low<'a>(&self, pages: &'a Pages, slot: usize) -> Option<Version<'a>> {
        self.lows[slot].load(Ordering::Relaxed).map(|at| Version::new(pages, at))
    }

    /// The child whose keys `key` is among.
    #[inline]
    pub(crate) fn child(&self, pages: &Pages, key: &[u8]) -> (Ranks, usize, Child) {
        loop {
            let ranks = self.keys.ranks();
            let (rank, found) = self.keys.find(ranks, key, |slot| self.low(pages, slot));
            let rank = if found { rank } else { rank.saturating_sub(1) };
            if let Some(child) = self.child_at(ranks, rank) {
                return (ranks, rank, child);
            }
        }
    }

    /// The child with the highest keys.
    pub(crate) fn last(&self) -> Child {
        loop {
            let ranks = self.keys.ranks();
            if let Some(child) = self.child_at(ranks, ranks.count() - 1) {
                return child;
            }
        }
    }

    /// The child of a rank, unless the order has changed. A child that is split is replaced by its lower half after the upper half
    /// is in the order: who finds the lower half by an order without the upper one would miss what is there.
    #[inline]
    fn child_at(&self, ranks: Ranks, rank: usize) -> Option<Child> {
        let child = self.keys.to(ranks.slot(rank));
        let same = self.keys.ranks.load(Ordering::Relaxed) == ranks.0;
        child.map(Child).filter(|_| same)
    }

    /// True when there is room for a child with this low end in this very node.
    pub(crate) fn takes(&self, pages: &Pages, ranks: Ranks, key: &[u8]) -> bool {
        self.keys.takes(ranks, key, |slot| self.low(pages, slot))
    }

    /// Puts a child at a rank; the node takes it.
    pub(crate) fn insert(&self, pages: &Pages, ranks: Ranks, rank: usize, low: Ref<Head>, child: Child) {
        self.lows[ranks.count()].store(low, Ordering::Relaxed);
        self.keys.insert(ranks, rank, Version::new(pages, low).key(), child.0);
    }

    /// Puts another node in the place of a child: one that holds as much, or its lower half when the upper one is in the order.
    pub(crate) fn replace(&self, ranks: Ranks, rank: usize, child: Child) {
        self.keys.slots[ranks.slot(rank)].to.store(child.0, Ordering::Release);
    }

    /// The children by rank.
    pub(crate) fn items(&self, pages: &Pages, ranks: Ranks) -> impl Iterator<Item = Item> {
        (0..ranks.count()).map(move |rank| {
            let slot = ranks.slot(rank);
            Item { entry: self.low(pages, slot).map(Version::at), child: self.keys.to(slot).map(Child) }
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_a_list_of_slots() {
        let mut list = Vec::new();
        let mut ranks = Ranks::first(0);
        for (slot, at) in [0, 0, 1, 3, 2, 0, 6, 7, 4, 9, 1, 11, 5, 13].into_iter().enumerate() {
            list.insert(at, slot);
            ranks = ranks.insert(at);
            assert_eq!((0..ranks.count()).map(|rank| ranks.slot(rank)).collect::<Vec<_>>(), list);
        }
        assert_eq!(list.len(), WIDTH);
        assert_eq!((0..5).map(|rank| Ranks::first(5).slot(rank)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
}
