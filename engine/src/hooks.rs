//! Entry points for the fuzz targets and benches of this workspace.
//!
//! No part of the interface: it changes with the code behind it.

/// Decoders: any bytes in, no panic.
pub mod fuzz {
    use std::ops::Bound;
    use std::sync::Arc;

    use bytes::Bytes;
    use mainstay_io::BLOCK_BYTES;
    use mainstay_wal::Lsn;

    use crate::volume::superblock::ROOT_EXTENTS_MAX;
    use crate::{InstallTable, JobId, KeyRange, KeyspaceId, LogIndex, MAIN, TableEnds, TableId, TableRanges};

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

    /// Takes `bytes` as a copy of the superblock: as it is, and with a checksum made right.
    pub fn superblock(bytes: &[u8]) {
        use crate::volume::superblock::Copy;

        let mut sealed = vec![0; BLOCK_BYTES];
        let length = bytes.len().min(BLOCK_BYTES - 8);
        sealed[..length].copy_from_slice(&bytes[..length]);
        let checksum = crc_fast::crc64_nvme(&sealed[..BLOCK_BYTES - 8]);
        for copy in 0..4 {
            let _ = Copy::decode(bytes, copy);
            sealed[BLOCK_BYTES - 8..].copy_from_slice(&(checksum ^ copy as u64).to_le_bytes());
            if let Copy::Whole(superblock, checksum) = Copy::decode(&sealed, copy) {
                assert!(superblock.root.is_none_or(|root| root.extents.len() <= ROOT_EXTENTS_MAX), "{checksum}");
            }
        }
    }

    /// Tables of a few shapes.
    pub fn table_seeds() -> Vec<Vec<u8>> {
        use crate::range_tombstone::RangeTombstone;
        use crate::table::block::EntryKind;
        use crate::table::{Compression, TableBuilder, TableOptions};

        let range = |start: &'static [u8], end: Option<&'static [u8]>| RangeTombstone {
            range: KeyRange::from_parts(Bytes::from_static(start), end.map(Bytes::from_static)),
            index: LogIndex(1),
        };
        let shapes = [
            (Compression::None, 0, 3u64, false),
            (Compression::Lz4, 8, 40, false),
            (Compression::None, 16, 20, false),
            (Compression::Zstd, 8, 60, false),
            (Compression::Lz4, 12, 30, false),
            (Compression::None, 8, 5, true),
            (Compression::None, 8, 6, false),
        ];
        shapes
            .map(|(compression, filter_bits, entries, ranged)| {
                let mut builder = TableBuilder::new(TableOptions {
                    block_bytes: 512,
                    compression,
                    filter_bits,
                    ..TableOptions::default()
                });
                for at in 0..entries {
                    let value = format!("value {at}").repeat(3);
                    let value = (at % 7 != 5).then_some(value.as_bytes());
                    let key = format!("user/{at:06}/name");
                    // One shape has operands, and a key of which a merge was refused.
                    match (entries, at) {
                        (6, 1 | 2) => {
                            builder.add_entry(key.as_bytes(), LogIndex(at + 1), EntryKind::Operand, b"operand");
                        }
                        (6, 4) => builder.add_entry(key.as_bytes(), LogIndex(at + 1), EntryKind::Failed, b""),
                        _ => builder.add(key.as_bytes(), LogIndex(at + 1), value),
                    }
                }
                if ranged {
                    builder.add_range(range(b"user/", Some(b"user/000003")));
                    builder.add_range(range(b"user/000003", None));
                }
                builder.finish().0.iter().flat_map(|chunk| chunk.to_vec()).collect()
            })
            .to_vec()
    }

    /// A manifest with a keyspace, a frozen generation, a table, a checkpoint, a clone of it and a compaction that was asked for.
    pub fn manifest_seed() -> Vec<u8> {
        use crate::manifest::{Manifest, ManifestOp, ManifestSettings, TableShape};

        let settings = ManifestSettings {
            memtable_bytes: 1 << 20,
            table_bytes: 1 << 20,
            base_level_bytes: 1 << 20,
            l0_compaction_runs: 4,
            tables: TableShape::ByLevel,
        };
        let mut manifest = Manifest::new(settings);
        let table = InstallTable {
            id: TableId { job: JobId(1), ordinal: 0 },
            branch: MAIN,
            keyspace: KeyspaceId(0),
            first: Bytes::from_static(b"a"),
            last: Bytes::from_static(b"m"),
            entries: 10,
            tombstones: 1,
            bytes: 4096,
            digest: 7,
            root: Bytes::from_static(&[1; 112]),
            ranges: TableRanges {
                tombstones: 2,
                spans: vec![KeyRange::new(Bound::Included("b".into()), Bound::Excluded("d".into()))],
            },
            ends: TableEnds::default(),
        };
        let ops = [
            ManifestOp::CreateKeyspace { name: "users".into() },
            ManifestOp::Rotate { touched: vec![(MAIN, KeyspaceId(0))], clock: None },
            ManifestOp::Install { job: JobId(1), tables: vec![Arc::new(table)] },
            ManifestOp::Rotate { touched: vec![(MAIN, KeyspaceId(0)), (MAIN, KeyspaceId(1))], clock: None },
            ManifestOp::CreateCheckpoint { name: "monday".into(), branch: MAIN, time_ms: 7 },
            ManifestOp::CreateClone { name: "trial".into(), checkpoint: "monday".into(), time_ms: 8 },
            ManifestOp::Compact { branch: MAIN, keyspace: KeyspaceId(0), first: Bytes::new(), end: None },
            ManifestOp::SetOperator { name: "users".into(), operator: crate::OperatorId::APPEND },
            ManifestOp::SetOptions {
                name: "users".into(),
                options: crate::KeyspaceOptions::new().compaction(crate::CompactionStyle::Tiered { runs: 4 }),
            },
        ];
        for (at, op) in ops.iter().enumerate() {
            manifest.apply(LogIndex(at as u64 + 1), op, true).expect("the operation is valid here");
        }
        manifest.encode(None).to_vec()
    }

    /// A superblock with everything in it.
    pub fn superblock_seed() -> Vec<u8> {
        use crate::volume::Extent;
        use crate::volume::superblock::{Root, Superblock};

        let root = Root { extents: vec![Extent { first_unit: 1, units: 2 }], bytes: 100_000, checksum: 9 };
        Superblock {
            volume: [1; 16],
            incarnation: [2; 16],
            identity: [3; 32],
            sequence: 5,
            parent: 4,
            wal_bytes: 64 << 20,
            epoch: 6,
            wal_start: Lsn(8192),
            clean_end: Some(Lsn(16384)),
            closed: true,
            root: Some(root),
            notes: [(1, Bytes::from_static(b"note")), (70, Bytes::from_static(b"other"))].into(),
        }
        .encode(0)
        .to_vec()
    }
}

/// Faults that no device makes: for tests of what finds them.
pub mod fault {
    use crate::Group;

    /// Writes what no entry says into the memtable in use, as broken memory would: the tables that this replica makes next
    /// differ from those of the others. False when nothing was written since the last rotation.
    pub fn disturb(group: &Group, key: &[u8], value: &'static [u8]) -> bool {
        group.shared().disturb_memtable(key, value)
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
                _ => None,
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

    /// What the blocks of a table are compressed by.
    #[derive(Clone, Copy, Debug)]
    #[allow(clippy::exhaustive_enums, reason = "for the benches of this workspace alone")]
    pub enum Packing {
        /// Nothing.
        Raw,
        /// lz4.
        Lz4,
        /// zstd.
        Zstd,
    }

    /// A table in memory behind a cache of `cache_bytes`.
    pub struct Table {
        table: Arc<table::Table>,
        meta: TableMeta,
        bytes: Bytes,
    }

    impl Table {
        /// Builds one of pairs in key order.
        pub fn new<'a>(
            pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>,
            packing: Packing,
            cache_bytes: u64,
        ) -> Result<Self> {
            let compression = match packing {
                Packing::Raw => table::Compression::None,
                Packing::Lz4 => table::Compression::Lz4,
                Packing::Zstd => table::Compression::Zstd,
            };
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
                operator: None,
                expires: false,
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

    /// A partition of a filter.
    pub struct Filter(table::filter::Filter);

    impl Filter {
        /// Builds one of keys, with so many bits a fingerprint.
        pub fn new<'a>(keys: impl Iterator<Item = &'a [u8]>, bits: u8) -> Option<Self> {
            let bytes = table::filter::build(keys.map(table::filter::hash).collect(), bits);
            table::filter::Filter::parse(bytes.into()).ok().map(Self)
        }

        /// Bytes that it takes.
        pub fn bytes(&self) -> usize {
            self.0.len()
        }

        /// False: the key was not added.
        pub fn may_contain(&self, key: &[u8]) -> bool {
            self.0.may_contain(table::filter::hash(key))
        }
    }

    /// A block of 16 KiB.
    pub struct DataBlock(Block);

    impl DataBlock {
        /// Builds one of as many pairs as fit.
        pub fn new<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Option<Self> {
            let mut builder = BlockBuilder::data(crate::table::block::DATA_RESTART_BYTES);
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
