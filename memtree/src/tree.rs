//! The tree: how the one writer adds a version, and how a reader finds one.
//!
//! # Invariants
//! T1. Every node that a reader comes to was in the tree at some moment since the reader began, so it holds all that was inserted
//!     before. What the tree leads to at a moment leads on to what was in it then or later, and a node that is replaced has
//!     lost nothing that a reader of its time could see.
//! T2. The ranges of the nodes of a level join without gap or overlap, whichever mixture of replaced and new nodes a reader meets: a
//!     replaced node keeps its neighbours and children of then, and a new one holds the same keys.
//! T3. Readers never wait. They search a node again only if the writer has added a child to it meanwhile.
//! T4. Indexes of one key do not fall.
//!
//! # Why not
//! A sequence lock in each node: readers would wait for a writer that was interrupted in the middle of an insert. Nodes that are
//! written in place and searched again when they were split: as fast, half a node less in memory for each, and every load would have to be
//! right in an order that nobody sees.
#![forbid(unsafe_code)]

use std::sync::Arc;

use bytes::Bytes;

use crate::arena::{Arena, AtomicRef, Pages, Ref};
use crate::cursor::Cursor;
use crate::entry::{Head, New, NewEntry, Version};
use crate::key::common_prefix;
use crate::node::{Child, Inner, Item, Leaf, Prefix, Ranks, WIDTH};
use crate::sync::Ordering;

/// What the handles of one tree share.
pub(crate) struct Shared {
    root: AtomicRef<Inner>,
    pub(crate) pages: Pages,
}

/// Adds versions. There is one for each tree.
pub struct Writer {
    shared: Arc<Shared>,
    arena: Arena,
    /// What all keys begin with: so many bytes of this entry's.
    prefix: Option<(Ref<Head>, usize)>,
    /// The way from the root to the leaf of the last insert.
    path: Vec<Step>,
}

/// Reads a tree. Cloning gives another handle.
#[derive(Clone)]
pub struct Reader(Arc<Shared>);

/// One inner node on the way to a leaf, and which child the way goes on to.
#[derive(Clone, Copy)]
struct Step {
    inner: Ref<Inner>,
    ranks: Ranks,
    rank: usize,
}

/// The key from which on a node holds keys, and from which on no more; None for an end of the tree.
type Fences = (Option<Ref<Head>>, Option<Ref<Head>>);

/// What a change of a level asks of the level above it.
#[derive(Clone, Copy)]
enum Change {
    /// Another node in the place of the child.
    Replace(Child),
    /// One more child behind it.
    Add(Ref<Head>, Child),
    /// Both: the child was split.
    Split(Child, Ref<Head>, Child),
}

/// What adds to the tree, apart from what it adds to.
struct Growth<'a> {
    shared: &'a Shared,
    arena: &'a mut Arena,
    prefix: Option<(Ref<Head>, usize)>,
    path: &'a mut Vec<Step>,
}

impl Shared {
    fn root(&self) -> Ref<Inner> {
        self.root.load(Ordering::Acquire).expect("a tree has a root")
    }

    /// The leaf whose keys `key` is among.
    #[inline]
    pub(crate) fn leaf(&self, key: &[u8]) -> Ref<Leaf> {
        let mut inner = self.pages.get(self.root());
        loop {
            let (_, _, child) = inner.child(&self.pages, key);
            if inner.level == 1 {
                return child.leaf();
            }
            inner = self.pages.get(child.inner());
        }
    }

    /// The leaf with the highest keys.
    pub(crate) fn last_leaf(&self) -> Ref<Leaf> {
        let mut inner = self.pages.get(self.root());
        while inner.level > 1 {
            inner = self.pages.get(inner.last().inner());
        }
        inner.last().leaf()
    }

    /// As [`Shared::leaf`], with the way to it.
    fn path(&self, key: &[u8], path: &mut Vec<Step>) -> Ref<Leaf> {
        path.clear();
        let mut at = self.root();
        loop {
            let inner = self.pages.get(at);
            let (ranks, rank, child) = inner.child(&self.pages, key);
            path.push(Step { inner: at, ranks, rank });
            if inner.level == 1 {
                return child.leaf();
            }
            at = child.inner();
        }
    }
}

impl Reader {
    /// The newest version of a key with an index of at most `at`.
    #[inline]
    pub fn get(&self, key: &[u8], at: u64) -> Option<Version<'_>> {
        let pages = &self.0.pages;
        let leaf = pages.get(self.0.leaf(key));
        let ranks = leaf.ranks();
        let (rank, found) = leaf.find(pages, ranks, key);
        if !found {
            return None;
        }
        leaf.entry(pages, ranks.slot(rank))?.visible(at)
    }

    /// The last key, whatever its versions.
    pub fn last_key(&self) -> Option<&[u8]> {
        let pages = &self.0.pages;
        let leaf = pages.get(self.0.last_leaf());
        let ranks = leaf.ranks();
        let last = ranks.count().checked_sub(1)?;
        leaf.entry(pages, ranks.slot(last)).map(Version::key)
    }

    /// A cursor from the low end, or from the high end in `reverse`, over the newest version of each key with an index of at
    /// most `at`, tombstones included; it stands nowhere.
    pub fn cursor(&self, at: u64, reverse: bool) -> Cursor {
        Cursor::new(self.0.clone(), at, reverse)
    }
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// An empty tree.
    pub fn new() -> Self {
        let (pages, mut arena) = (Pages::new(), Arena::new());
        let none = Prefix { shared: 0, edge: false };
        let leaf = Leaf::new(&pages, &[], none, (None, None));
        let leaf = arena.node(&pages, leaf);
        let item = Item { entry: None, child: Some(leaf.into()) };
        let root = Inner::new(&pages, &[item], none, 1);
        let root = arena.node(&pages, root);
        let shared = Arc::new(Shared { root: AtomicRef::new(Some(root)), pages });
        Self { shared, arena, prefix: None, path: Vec::new() }
    }

    /// A handle for readers.
    pub fn reader(&self) -> Reader {
        Reader(self.shared.clone())
    }

    /// Bytes that the tree takes from the allocator, and those of large values.
    pub fn bytes(&self) -> u64 {
        let shared_bytes = size_of::<Shared>() + 2 * size_of::<usize>();
        let path_bytes = self.path.capacity() * size_of::<Step>();
        self.arena.bytes() + (shared_bytes + path_bytes) as u64
    }

    /// Sets (`Some`) or removes (`None`) a key at `index`. The later of two calls with one key and one index wins. Returns false
    /// when it put a version in the place of one.
    ///
    /// # Panics
    /// When the key has a version with a higher index.
    pub fn insert(&mut self, key: &[u8], index: u64, value: Option<&Bytes>) -> bool {
        self.insert_new(key, index, value.into())
    }

    /// As [`Writer::insert`], of any kind.
    ///
    /// # Panics
    /// As [`Writer::insert`].
    pub fn insert_new(&mut self, key: &[u8], index: u64, new: New<'_>) -> bool {
        let new = NewEntry { key, index, new };
        let Self { shared, arena, prefix, path } = self;
        let pages = &shared.pages;
        let at = shared.path(key, path);
        let leaf = pages.get(at);
        let ranks = leaf.ranks();
        let (rank, found) = leaf.find(pages, ranks, key);
        if found {
            let slot = ranks.slot(rank);
            let newest = leaf.entry(pages, slot).expect("a leaf has entries");
            assert!(newest.index() <= index, "indexes do not fall: index={index} newest={}", newest.index());
            let same = newest.index() == index;
            let older = if same { newest.before() } else { Some(newest) };
            leaf.supersede(slot, new.write(arena, pages, older));
            return !same;
        }
        let entry = new.write(arena, pages, None);
        narrow(prefix, pages, leaf, entry);
        if leaf.takes(pages, ranks, key) {
            leaf.insert(pages, ranks, rank, entry);
        } else {
            Growth { shared, arena, prefix: *prefix, path }.grow(at, ranks, rank, entry);
        }
        true
    }
}

/// Counts what all keys begin with. Between two keys that share a prefix every key has it.
fn narrow(prefix: &mut Option<(Ref<Head>, usize)>, pages: &Pages, leaf: &Leaf, entry: Ref<Head>) {
    let key = Version::new(pages, entry).key();
    match prefix {
        None => *prefix = Some((entry, key.len())),
        Some((sample, shared)) => {
            let inside = leaf.next.load(Ordering::Relaxed).is_some() && leaf.prev.load(Ordering::Relaxed).is_some();
            if !inside {
                *shared = (*shared).min(common_prefix(key, Version::new(pages, *sample).key()));
            }
        }
    }
}

impl Growth<'_> {
    /// Of the child that the last step goes on to.
    fn fences(&self) -> Fences {
        let pages = &self.shared.pages;
        let (mut low, mut high) = (None, None);
        for step in self.path.iter().rev() {
            let at = |rank: usize| {
                let low = pages.get(step.inner).low(pages, step.ranks.slot(rank));
                low.map(Version::at)
            };
            if low.is_none() && step.rank > 0 {
                low = at(step.rank);
            }
            if high.is_none() && step.rank + 1 < step.ranks.count() {
                high = at(step.rank + 1);
            }
        }
        (low, high)
    }

    /// What all keys between two fences begin with.
    fn prefix(&self, fences: Fences) -> Prefix {
        let pages = &self.shared.pages;
        let key = |at| Version::new(pages, at).key();
        match fences {
            (Some(low), Some(high)) => Prefix { shared: common_prefix(key(low), key(high)), edge: false },
            _ => Prefix { shared: self.prefix.map_or(0, |(_, shared)| shared), edge: true },
        }
    }

    /// Adds an entry to a leaf that cannot take it: one or two leaves come into its place, or one behind it.
    fn grow(&mut self, at: Ref<Leaf>, ranks: Ranks, rank: usize, entry: Ref<Head>) {
        let pages = &self.shared.pages;
        let leaf = pages.get(at);
        let (prev, next) = (leaf.prev.load(Ordering::Relaxed), leaf.next.load(Ordering::Relaxed));
        let (low, high) = self.fences();
        let new = Item { entry: Some(entry), child: None };
        let count = ranks.count();
        if rank == WIDTH {
            // Ascending keys fill the leaves that they leave behind.
            let right = Leaf::new(pages, &[new], self.prefix((Some(entry), high)), (Some(at), next));
            let right = self.arena.node(pages, right);
            join(pages, Some(at), right, right, next);
            return self.change(Change::Add(entry, right.into()));
        }
        let mut items = [new; WIDTH + 1];
        put(&mut items, leaf.items(pages, ranks), rank, new);
        let items = &items[..=count];
        if count < WIDTH {
            let wider = Leaf::new(pages, items, self.prefix((low, high)), (prev, next));
            let wider = self.arena.node(pages, wider);
            join(pages, prev, wider, wider, next);
            return self.change(Change::Replace(wider.into()));
        }
        let (left, right) = items.split_at(items.len() / 2);
        let middle = right[0].entry.expect("a leaf has entries");
        let left = Leaf::new(pages, left, self.prefix((low, Some(middle))), (prev, None));
        let left = self.arena.node(pages, left);
        let right = Leaf::new(pages, right, self.prefix((Some(middle), high)), (Some(left), next));
        let right = self.arena.node(pages, right);
        pages.get(left).next.store(right, Ordering::Release);
        join(pages, prev, left, right, next);
        self.change(Change::Split(left.into(), middle, right.into()));
    }

    /// Makes the change of a child in the node above it, and what follows from that.
    fn change(&mut self, change: Change) {
        let pages = &self.shared.pages;
        let Some(Step { inner: at, ranks, rank }) = self.path.pop() else { return self.change_root(change) };
        let inner = pages.get(at);
        let (replaced, low, child) = match change {
            Change::Replace(child) => return inner.replace(ranks, rank, child),
            Change::Add(low, child) => (None, low, child),
            Change::Split(left, low, right) => (Some(left), low, right),
        };
        if inner.takes(pages, ranks, Version::new(pages, low).key()) {
            inner.insert(pages, ranks, rank + 1, low, child);
            if let Some(left) = replaced {
                inner.replace(ranks, rank, left);
            }
            return;
        }
        let fences = self.fences();
        let new = Item { entry: Some(low), child: Some(child) };
        let count = ranks.count();
        if rank + 1 == WIDTH && replaced.is_none() {
            let right = Inner::new(pages, &[new], self.prefix((Some(low), fences.1)), inner.level);
            let right = self.arena.node(pages, right);
            return self.change(Change::Add(low, right.into()));
        }
        let mut items = [new; WIDTH + 1];
        put(&mut items, inner.items(pages, ranks), rank + 1, new);
        if let Some(left) = replaced {
            items[rank].child = Some(left);
        }
        let items = &items[..=count];
        if count < WIDTH {
            let wider = Inner::new(pages, items, self.prefix(fences), inner.level);
            let wider = self.arena.node(pages, wider);
            return self.change(Change::Replace(wider.into()));
        }
        let (left, right) = items.split_at(items.len() / 2);
        let middle = right[0].entry.expect("only the first child has no low end");
        let left = Inner::new(pages, left, self.prefix((fences.0, Some(middle))), inner.level);
        let left = self.arena.node(pages, left);
        let right = Inner::new(pages, right, self.prefix((Some(middle), fences.1)), inner.level);
        let right = self.arena.node(pages, right);
        self.change(Change::Split(left.into(), middle, right.into()));
    }

    fn change_root(&mut self, change: Change) {
        let shared = self.shared;
        let pages = &shared.pages;
        let root = shared.root();
        let (left, low, right) = match change {
            Change::Replace(root) => return shared.root.store(root.inner(), Ordering::Release),
            Change::Add(low, right) => (root.into(), low, right),
            Change::Split(left, low, right) => (left, low, right),
        };
        let items = [Item { entry: None, child: Some(left) }, Item { entry: Some(low), child: Some(right) }];
        let level = pages.get(root).level + 1;
        let root = Inner::new(pages, &items, self.prefix((None, None)), level);
        let root = self.arena.node(pages, root);
        shared.root.store(root, Ordering::Release);
    }
}

/// Links new leaves to their neighbours.
fn join(pages: &Pages, prev: Option<Ref<Leaf>>, left: Ref<Leaf>, right: Ref<Leaf>, next: Option<Ref<Leaf>>) {
    if let Some(prev) = prev {
        pages.get(prev).next.store(left, Ordering::Release);
    }
    if let Some(next) = next {
        pages.get(next).prev.store(right, Ordering::Release);
    }
}

/// The items of a node with a new one at a rank.
fn put(into: &mut [Item; WIDTH + 1], items: impl Iterator<Item = Item>, rank: usize, new: Item) {
    for (at, item) in items.enumerate() {
        into[at + usize::from(at >= rank)] = item;
    }
    into[rank] = new;
}
