//! One interface over every store that is measured.

use std::path::Path;

#[cfg(feature = "fjall")]
mod fjall;
#[cfg(feature = "lmdb")]
mod lmdb;
mod mainstay_store;
#[cfg(feature = "redb")]
mod redb;
#[cfg(feature = "rocksdb")]
mod rocksdb;

/// A store as the workloads see it. Calls come from many threads.
pub trait Peer: Send + Sync {
    /// Its name in the report.
    fn name(&self) -> &'static str;
    /// Sets a key; durable on return.
    fn put_durable(&self, key: &[u8], value: &[u8]);
    /// Sets many keys at once; durable on return.
    fn load(&self, pairs: &[(Vec<u8>, Vec<u8>)]);
    /// Flushes and compacts everything down to the last level, where the store has levels.
    fn settle(&self);
    /// Reads a key and returns the length of its value.
    fn get(&self, key: &[u8]) -> Option<usize>;
    /// Closes it in order, so that it can be opened again in this process.
    fn close(self: Box<Self>) {}
    /// Reads up to `limit` pairs from `key` on, and returns how many there were and their bytes.
    fn scan(&self, key: &[u8], limit: usize) -> (usize, usize);
}

/// What a store is given beside a directory. docs/performance.md has the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// As all workloads run that do not say otherwise.
    Ordinary,
    /// Reads find next to nothing in memory: 64 MiB for blocks or pages.
    Cold,
    /// 1 GiB of writes stays in the log, and in memtables.
    LongLog,
}

/// Opens a peer in a directory that is empty, or that it has filled.
pub type Open = fn(&Path, Setup) -> Box<dyn Peer>;

/// Every peer of this build; Mainstay is the first.
pub fn all() -> Vec<(&'static str, Open)> {
    vec![
        ("mainstay", mainstay_store::open as Open),
        #[cfg(feature = "rocksdb")]
        ("rocksdb", rocksdb::open),
        #[cfg(feature = "fjall")]
        ("fjall", fjall::open),
        #[cfg(feature = "redb")]
        ("redb", redb::open),
        #[cfg(feature = "lmdb")]
        ("lmdb", lmdb::open),
    ]
}
