//! Cursors: from leaf to leaf, by the order that each leaf had when the cursor came to it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::arena::Ref;
use crate::entry::{Head, Version};
use crate::node::{Leaf, Ranks};
use crate::sync::Ordering;
use crate::tree::Shared;

/// A cursor over one tree, which it keeps in memory. It copies nothing and holds no lock.
pub struct Cursor {
    shared: Arc<Shared>,
    at: u64,
    reverse: bool,
    leaf: Option<Ref<Leaf>>,
    ranks: Ranks,
    /// Ranks of the leaf that are left; forward they are counted from the highest.
    left: usize,
    entry: Option<Ref<Head>>,
}

impl Cursor {
    pub(crate) fn new(shared: Arc<Shared>, at: u64, reverse: bool) -> Self {
        Self { shared, at, reverse, leaf: None, ranks: Ranks::first(0), left: 0, entry: None }
    }

    /// The version that it stands on.
    #[inline]
    pub fn version(&self) -> Option<Version<'_>> {
        self.entry.map(|entry| Version::new(&self.shared.pages, entry))
    }

    /// Goes to the first key in the cursor's direction.
    pub fn seek_start(&mut self) {
        if self.reverse {
            let leaf = self.shared.last_leaf();
            self.enter(Some(leaf));
            self.advance();
        } else {
            self.seek(&[], false);
        }
    }

    /// Goes to the first key in the cursor's direction at `key`, or beyond it. With `exclusive`, beyond it.
    pub fn seek(&mut self, key: &[u8], exclusive: bool) {
        let leaf = self.shared.leaf(key);
        self.enter(Some(leaf));
        let (rank, found) = self.shared.pages.get(leaf).find(&self.shared.pages, self.ranks, key);
        let skip = usize::from(found && exclusive != self.reverse);
        self.left = if self.reverse { rank + skip } else { self.ranks.count() - rank - skip };
        self.advance();
    }

    /// Goes one key on.
    #[inline]
    pub fn advance(&mut self) {
        self.entry = None;
        while let Some(leaf) = self.leaf {
            let leaf = self.shared.pages.get(leaf);
            while self.left > 0 {
                let rank = if self.reverse { self.left - 1 } else { self.ranks.count() - self.left };
                self.left -= 1;
                let newest = leaf.entry(&self.shared.pages, self.ranks.slot(rank));
                if let Some(version) = newest.and_then(|newest| newest.visible(self.at)) {
                    self.entry = Some(version.at());
                    return;
                }
            }
            let beside = if self.reverse { &leaf.prev } else { &leaf.next };
            let beside = beside.load(Ordering::Acquire);
            self.enter(beside);
        }
    }

    fn enter(&mut self, leaf: Option<Ref<Leaf>>) {
        self.leaf = leaf;
        if let Some(leaf) = leaf {
            self.ranks = self.shared.pages.get(leaf).ranks();
            self.left = self.ranks.count();
        }
    }
}
