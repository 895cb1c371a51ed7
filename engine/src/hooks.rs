//! Entry points for the fuzz targets and benches of this workspace.
//!
//! No part of the interface: it changes with the code behind it.

/// Decoders: any bytes in, no panic.
pub mod fuzz {
    use bytes::Bytes;

    /// Opens `bytes` as a table by its own footer and reads it in every way.
    pub fn table(bytes: &[u8]) {
        crate::table::fuzzing::table(bytes);
    }

    /// Takes `bytes` as each part of a table: root, handle, filter, block.
    pub fn table_parts(bytes: &[u8]) {
        crate::table::fuzzing::parts(bytes);
    }

    /// Takes `bytes` as the pages of a manifest.
    pub fn manifest(bytes: &[u8]) {
        if let Ok((manifest, places)) = crate::manifest::Manifest::decode(Bytes::copy_from_slice(bytes)) {
            let again = manifest.encode(Some(&places));
            assert!(crate::manifest::Manifest::decode(again).is_ok(), "what was decoded is encoded and decoded again");
        }
    }

    /// Takes `bytes` as a copy of the superblock.
    pub fn superblock(bytes: &[u8]) {
        for copy in 0..4 {
            let _ = crate::volume::superblock::Copy::decode(bytes, copy);
        }
    }
}

/// The hot pieces one by one.
pub mod bench {
    use std::ops::Bound;
    use std::sync::Arc;

    use bytes::Bytes;
    use mainstay_io::BoxFuture;

    use crate::cache::BlockCache;
    use crate::memory::MemoryBudget;
    use crate::read::{Lookup, MergeInput, ReadView};
    use crate::table::block::{Block, BlockBuilder, EntryKind};
    use crate::table::{self, TableBytes, TableMeta, TableOptions};
    use crate::{LogIndex, Result};

    /// A memtable.
    #[derive(Clone)]
    pub struct Memtable(Arc<crate::memtable::Memtable>);

    impl Default for Memtable {
        fn default() -> Self {
            Self::new()
        }
    }

    impl Memtable {
        /// An empty one.
        pub fn new() -> Self {
            Self(Arc::new(crate::memtable::Memtable::new(&MemoryBudget::new(1 << 40))))
        }

        /// Sets a key.
        pub fn insert(&self, key: &[u8], index: u64, value: &Bytes) {
            self.0.insert(key, LogIndex(index), Some(value));
        }

        /// The newest value.
        pub fn get(&self, key: &[u8]) -> Option<Bytes> {
            match self.0.get(key, LogIndex(u64::MAX))? {
                Lookup::Value(value) => Some(value),
                Lookup::Deleted => None,
            }
        }

        /// Walks all of it and counts.
        pub fn scan(&self, reverse: bool) -> u64 {
            let mut cursor = self.0.cursor(LogIndex(u64::MAX), reverse);
            cursor.seek_start();
            let mut count = 0;
            while cursor.valid() {
                count += u64::from(!cursor.key().is_empty());
                cursor.advance();
            }
            count
        }

        /// Bytes held.
        pub fn bytes(&self) -> u64 {
            self.0.bytes()
        }

        /// Builds a table of it by the merge that a flush uses, and returns the length.
        pub async fn flush(&self) -> Result<u64> {
            let mut input = MergeInput::new(vec![self.0.clone()], Vec::new(), false);
            let mut builder = table::TableBuilder::new(TableOptions::default());
            while let Some(entry) = input.next().await? {
                builder.add(entry.key, entry.index, entry.value);
                builder.take_chunks();
            }
            Ok(builder.finish().1.bytes)
        }
    }

    struct Memory(Bytes);

    impl TableBytes for Memory {
        fn read(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
            let bytes = self.0.slice(offset as usize..offset as usize + length);
            Box::pin(std::future::ready(Ok(bytes)))
        }
    }

    /// A table in memory behind a cache of `cache_bytes`.
    pub struct Table {
        table: Arc<table::Table>,
        meta: TableMeta,
        bytes: Bytes,
    }

    impl Table {
        /// Builds one of pairs in key order.
        pub fn new<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>, lz4: bool, cache_bytes: u64) -> Result<Self> {
            let compression = if lz4 { table::Compression::Lz4 } else { table::Compression::None };
            let mut builder = table::TableBuilder::new(TableOptions { compression, ..TableOptions::default() });
            let mut bytes = Vec::new();
            for (key, value) in pairs {
                builder.add(key, LogIndex(1), Some(value));
                builder.take_chunks().iter().for_each(|chunk| bytes.extend_from_slice(chunk));
            }
            let (chunks, meta) = builder.finish();
            chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
            let bytes = Bytes::from(bytes);
            Ok(Self { table: Self::open(&meta, &bytes, cache_bytes)?, meta, bytes })
        }

        fn open(meta: &TableMeta, bytes: &Bytes, cache_bytes: u64) -> Result<Arc<table::Table>> {
            let budget = MemoryBudget::new(cache_bytes);
            let cache = BlockCache::new(&budget);
            Ok(Arc::new(table::Table::open(meta.clone(), Arc::new(Memory(bytes.clone())), &cache, &budget)?))
        }

        /// The same table behind an empty cache.
        pub fn reopen(&self, cache_bytes: u64) -> Result<Self> {
            let table = Self::open(&self.meta, &self.bytes, cache_bytes)?;
            Ok(Self { table, meta: self.meta.clone(), bytes: self.bytes.clone() })
        }

        /// A lookup.
        pub async fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
            Ok(match self.table.get(key, LogIndex(u64::MAX)).await? {
                Some(Lookup::Value(value)) => Some(value),
                _ => None,
            })
        }

        /// Scans `tables` and `memtables` as one view and counts.
        pub async fn scan(tables: &[&Self], memtables: &[&Memtable], reverse: bool) -> Result<u64> {
            let view = Arc::new(ReadView {
                memtables: memtables.iter().map(|memtable| memtable.0.clone()).collect(),
                l0: tables.iter().map(|table| table.table.clone()).collect(),
                levels: Vec::new(),
            });
            let mut scan = view.scan(Bound::Unbounded, Bound::Unbounded, LogIndex(u64::MAX));
            let mut count = 0;
            while if reverse { scan.next_back().await? } else { scan.next().await? }.is_some() {
                count += 1;
            }
            Ok(count)
        }

        /// Reads and checks everything.
        pub async fn verify(&self) -> Result<()> {
            self.table.verify().await
        }

        /// Length.
        pub fn bytes(&self) -> u64 {
            self.meta.bytes
        }
    }

    /// A block of 16 KiB.
    pub struct DataBlock(Block);

    impl DataBlock {
        /// Builds one of as many pairs as fit.
        pub fn new<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Option<Self> {
            let mut builder = BlockBuilder::new(16);
            for (key, value) in pairs {
                if builder.len() > 16 << 10 {
                    break;
                }
                builder.add(key, EntryKind::Value, LogIndex(1), value);
            }
            Block::parse(builder.finish().into()).ok().map(Self)
        }

        /// Looks a key up.
        pub fn get(&self, key: &[u8]) -> bool {
            matches!(self.0.search(key), Ok(Some(found)) if found.exact)
        }
    }

    /// The checksum of blocks.
    pub fn checksum(bytes: &[u8]) -> u64 {
        crc_fast::crc64_nvme(bytes)
    }
}
