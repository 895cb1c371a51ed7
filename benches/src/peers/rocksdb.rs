//! RocksDB: `sync` in the options of each write, which writers that wait together share.

use std::path::Path;

use super::{Peer, Setup};

struct RocksDb(rocksdb::DB);

pub(super) fn open(path: &Path, setup: Setup) -> Box<dyn Peer> {
    let (memtable, cache) = match setup {
        Setup::Ordinary => (64 << 20, 160 << 20),
        Setup::Cold => (64 << 20, 64 << 20),
        Setup::LongLog => (3 << 30, 160 << 20),
    };
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    options.set_write_buffer_size(memtable);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    options.increase_parallelism(2);
    let mut table = rocksdb::BlockBasedOptions::default();
    table.set_block_cache(&rocksdb::Cache::new_lru_cache(cache));
    table.set_bloom_filter(10.0, false);
    options.set_block_based_table_factory(&table);
    Box::new(RocksDb(rocksdb::DB::open(&options, path).expect("rocksdb opens")))
}

impl Peer for RocksDb {
    fn name(&self) -> &'static str {
        "rocksdb"
    }

    fn put_durable(&self, key: &[u8], value: &[u8]) {
        let mut options = rocksdb::WriteOptions::default();
        options.set_sync(true);
        self.0.put_opt(key, value, &options).expect("a put succeeds");
    }

    fn load(&self, pairs: &[(Vec<u8>, Vec<u8>)]) {
        let mut batch = rocksdb::WriteBatch::default();
        for (key, value) in pairs {
            batch.put(key, value);
        }
        let mut options = rocksdb::WriteOptions::default();
        options.set_sync(true);
        self.0.write_opt(batch, &options).expect("a batch commits");
    }

    fn settle(&self) {
        self.0.flush().expect("a flush succeeds");
        self.0.compact_range::<&[u8], &[u8]>(None, None);
    }

    fn get(&self, key: &[u8]) -> Option<usize> {
        self.0.get_pinned(key).expect("a get succeeds").map(|value| value.len())
    }

    fn scan(&self, key: &[u8], limit: usize) -> (usize, usize) {
        let (mut count, mut bytes) = (0, 0);
        let mut iterator = self.0.raw_iterator();
        iterator.seek(key);
        while count < limit
            && let Some((key, value)) = iterator.item()
        {
            count += 1;
            bytes += key.len() + value.len();
            iterator.next();
        }
        (count, bytes)
    }
}
