//! One number bounds what the engine keeps in memory: memtables, tables held open, buffers, and the block cache, which
//! gets what the others leave.
//!
//! # Place
//! made by the engine at open; memtables, tables and buffers hold a [`Reservation`] each
//! # Invariants
//! M1. What a [`Reservation`] took, its drop gives back.
//! M2. The cache may hold the rest of the total, and at least a quarter of it ([`CACHE_SHARE_MIN`]).
//!
//! Reserving never fails and never waits: who may grow is decided before (admission, rotation), here it is counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use crate::cache::BlockCache;

/// The cache keeps at least this share of the total: one part in so many.
pub(crate) const CACHE_SHARE_MIN: u64 = 4;
/// What the allocator keeps beyond what it was asked for: pieces between allocations of many sizes, and what it has not given
/// back yet. One part in so many of what the process is to hold.
const ALLOCATOR_SHARE: u64 = 5;
/// The cache is resized when what it may hold has moved by one part of the total in so many.
const RESIZE_STEP: u64 = 64;

/// For what memory is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryKind {
    /// Memtables, active and frozen.
    Memtable,
    /// What an open table keeps outside the cache: top index and filter index.
    Table,
    /// Buffers of flush, compaction and scans.
    Buffer,
}

const KINDS: usize = 3;

/// Counts memory by kind and tells the cache what is left.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    total: AtomicU64,
    reserved: [AtomicU64; KINDS],
    /// What the cache was last told.
    cache_capacity: AtomicU64,
    cache: OnceLock<Weak<BlockCache>>,
}

/// What may be counted, so that the process holds no more than `resident` bytes for it.
pub(crate) fn countable(resident: u64) -> u64 {
    resident - resident / ALLOCATOR_SHARE
}

impl MemoryBudget {
    /// A budget of `total` bytes.
    pub(crate) fn new(total: u64) -> Arc<Self> {
        Arc::new(Self {
            total: AtomicU64::new(total),
            reserved: [const { AtomicU64::new(0) }; KINDS],
            cache_capacity: AtomicU64::new(total),
            cache: OnceLock::new(),
        })
    }

    /// Bytes that all kinds and the cache may hold together.
    pub(crate) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Changes the total at run time.
    pub(crate) fn set_total(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.resize_cache(0);
    }

    /// Bytes held now: every kind, and what lies in the cache.
    pub(crate) fn used(&self) -> u64 {
        self.reserved_total() + self.cache.get().and_then(Weak::upgrade).map_or(0, |cache| cache.weight())
    }

    /// Bytes reserved for one kind.
    pub(crate) fn reserved(&self, kind: MemoryKind) -> u64 {
        self.reserved[kind as usize].load(Ordering::Relaxed)
    }

    /// What the cache may hold.
    pub(crate) fn cache_capacity(&self) -> u64 {
        let total = self.total();
        total.saturating_sub(self.reserved_total()).max(total / CACHE_SHARE_MIN)
    }

    /// Reserves `bytes` for `kind` until the reservation is dropped.
    pub(crate) fn reserve(self: &Arc<Self>, kind: MemoryKind, bytes: u64) -> Reservation {
        let mut reservation = Reservation { budget: self.clone(), kind, bytes: 0 };
        reservation.resize(bytes);
        reservation
    }

    /// The cache that follows this budget; the first one stays.
    pub(crate) fn attach(&self, cache: &Arc<BlockCache>) {
        let _ = self.cache.set(Arc::downgrade(cache));
    }

    fn reserved_total(&self) -> u64 {
        self.reserved.iter().map(|bytes| bytes.load(Ordering::Relaxed)).sum()
    }

    fn resize_cache(&self, step: u64) {
        let capacity = self.cache_capacity();
        let told = self.cache_capacity.load(Ordering::Relaxed);
        if capacity.abs_diff(told) <= step {
            return;
        }
        self.cache_capacity.store(capacity, Ordering::Relaxed);
        if let Some(cache) = self.cache.get().and_then(Weak::upgrade) {
            cache.set_capacity(capacity);
        }
    }
}

/// Bytes reserved for one owner; given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<MemoryBudget>,
    kind: MemoryKind,
    bytes: u64,
}

impl Reservation {
    /// Bytes reserved.
    #[cfg(test)]
    fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reserves more or less.
    pub(crate) fn resize(&mut self, bytes: u64) {
        let counter = &self.budget.reserved[self.kind as usize];
        if bytes >= self.bytes {
            counter.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        } else {
            counter.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
        self.budget.resize_cache(self.budget.total() / RESIZE_STEP);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_is_given_back() {
        let budget = MemoryBudget::new(1 << 20);
        let mut a = budget.reserve(MemoryKind::Memtable, 1000);
        let b = budget.reserve(MemoryKind::Buffer, 500);
        assert_eq!((budget.used(), budget.reserved(MemoryKind::Memtable)), (1500, 1000));
        a.resize(200);
        assert_eq!((budget.used(), a.bytes()), (700, 200));
        drop(b);
        drop(a);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_cache_gets_the_rest_and_at_least_a_quarter() {
        let budget = MemoryBudget::new(1 << 20);
        let cache = BlockCache::new(&budget);
        let mut a = budget.reserve(MemoryKind::Memtable, 1 << 19);
        assert_eq!((budget.cache_capacity(), cache.capacity()), (1 << 19, 1 << 19));
        a.resize(1 << 20);
        assert_eq!((budget.cache_capacity(), cache.capacity()), (1 << 18, 1 << 18));
        budget.set_total(4 << 20);
        assert_eq!((budget.cache_capacity(), cache.capacity()), (3 << 20, 3 << 20));
    }
}
