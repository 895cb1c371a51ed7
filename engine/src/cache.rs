//! The block cache: verified, decompressed blocks, shared by all tables of a volume.
//!
//! # Place
//! below `table::reader`, which is the only one that fills it; its capacity follows [`MemoryBudget`]
//! # Invariants
//! C1. A cached block has matched its referrer's checksum and is never changed.
//! C2. Owners are numbered when a table is opened and never reused, so a block of a dropped table is never met again.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

use crate::Result;
use crate::memory::MemoryBudget;
use crate::table::CachedBlock;

/// A shard holds at least this much; more shards only where the capacity allows it.
const SHARD_BYTES_MIN: u64 = 8 << 20;
/// Shards at most.
const SHARDS_MAX: u64 = 64;
/// What one block costs besides its bytes: its frame, its place in the cache, and what an allocator adds to three allocations.
const OVERHEAD_BYTES: u64 = 256;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct BlockKey {
    owner: u64,
    offset: u64,
}

/// The same on every run: the order of eviction must not depend on the process.
#[derive(Clone, Copy, Default, Debug)]
struct FixedHash;

struct FixedHasher(u64);

impl BuildHasher for FixedHash {
    type Hasher = FixedHasher;

    fn build_hasher(&self) -> FixedHasher {
        FixedHasher(0)
    }
}

impl Hasher for FixedHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        // One folded multiplication a word: both words are small counters, so that every bit has to be spread.
        let product = u128::from(self.0 ^ value ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }
}

#[derive(Clone, Copy, Debug)]
struct BlockWeight;

impl Weighter<BlockKey, CachedBlock> for BlockWeight {
    fn weight(&self, _: &BlockKey, block: &CachedBlock) -> u64 {
        block.memory_bytes() + OVERHEAD_BYTES
    }
}

/// Blocks by owner and offset, bounded by weight.
pub(crate) struct BlockCache {
    blocks: Cache<BlockKey, CachedBlock, BlockWeight, FixedHash>,
    owners: AtomicU64,
}

impl BlockCache {
    /// A cache that holds what `budget` leaves, and follows it.
    pub(crate) fn new(budget: &Arc<MemoryBudget>) -> Arc<Self> {
        let capacity = budget.cache_capacity();
        let shards = (capacity / SHARD_BYTES_MIN).clamp(1, SHARDS_MAX).next_power_of_two();
        let options = OptionsBuilder::new()
            .weight_capacity(capacity)
            .estimated_items_capacity((capacity / (16 << 10)).max(16) as usize)
            .shards(shards as usize)
            .build()
            .expect("every option that is required is given");
        let cache = Arc::new(Self {
            blocks: Cache::with_options(
                options,
                BlockWeight,
                FixedHash,
                quick_cache::sync::DefaultLifecycle::default(),
            ),
            owners: AtomicU64::new(0),
        });
        budget.attach(&cache);
        cache
    }

    /// A number for a table just opened.
    pub(crate) fn owner(&self) -> u64 {
        self.owners.fetch_add(1, Ordering::Relaxed)
    }

    /// The block, if it is cached.
    pub(crate) fn get(&self, owner: u64, offset: u64) -> Option<CachedBlock> {
        self.blocks.get(&BlockKey { owner, offset })
    }

    /// The block, loaded by one of those who ask for it at the same time while the others wait.
    ///
    /// # Cancel safety
    /// Cancel safe: when the one that loads is dropped, another loads.
    pub(crate) async fn get_or_load(
        &self,
        owner: u64,
        offset: u64,
        load: impl Future<Output = Result<CachedBlock>>,
    ) -> Result<CachedBlock> {
        match self.blocks.get_value_or_guard_async(&BlockKey { owner, offset }).await {
            Ok(block) => Ok(block),
            Err(guard) => {
                let block = load.await?;
                // The entry may have been removed meanwhile: then the block is just not cached.
                let _ = guard.insert(block.clone());
                Ok(block)
            }
        }
    }

    /// Puts in a block that was read ahead.
    pub(crate) fn insert(&self, owner: u64, offset: u64, block: CachedBlock) {
        self.blocks.insert(BlockKey { owner, offset }, block);
    }

    /// Bytes held.
    pub(crate) fn weight(&self) -> u64 {
        self.blocks.weight()
    }

    /// Bytes that may be held.
    pub(crate) fn capacity(&self) -> u64 {
        self.blocks.capacity()
    }

    pub(crate) fn set_capacity(&self, bytes: u64) {
        self.blocks.set_capacity(bytes);
    }
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockCache").field("weight", &self.weight()).field("capacity", &self.capacity()).finish()
    }
}
