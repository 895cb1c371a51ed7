//! The peers: RocksDB, fjall, redb and LMDB, each as its own documentation says to use it for durable small writes.

use std::path::Path;

use super::{Open, Peer};

pub(super) fn all() -> Vec<(&'static str, Open)> {
    vec![("rocksdb", open_rocksdb), ("fjall", open_fjall), ("redb", open_redb), ("lmdb", open_lmdb)]
}

struct RocksDb(rocksdb::DB);

fn open_rocksdb(path: &Path) -> Box<dyn Peer> {
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    options.set_write_buffer_size(64 << 20);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    options.increase_parallelism(2);
    let mut table = rocksdb::BlockBasedOptions::default();
    table.set_block_cache(&rocksdb::Cache::new_lru_cache(160 << 20));
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
        self.0.write_opt(&batch, &options).expect("a batch commits");
    }

    fn settle(&self) {
        self.0.flush().expect("a flush succeeds");
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

struct Fjall {
    database: fjall::Database,
    keyspace: fjall::Keyspace,
}

fn open_fjall(path: &Path) -> Box<dyn Peer> {
    let database = fjall::Database::builder(path).cache_size(160 << 20).open().expect("fjall opens");
    let keyspace = database.keyspace("bench", fjall::KeyspaceCreateOptions::default).expect("a keyspace can be made");
    Box::new(Fjall { database, keyspace })
}

impl Peer for Fjall {
    fn name(&self) -> &'static str {
        "fjall"
    }

    fn put_durable(&self, key: &[u8], value: &[u8]) {
        let mut batch = self.database.batch().durability(Some(fjall::PersistMode::SyncData));
        batch.insert(&self.keyspace, key, value);
        batch.commit().expect("a put succeeds");
    }

    fn load(&self, pairs: &[(Vec<u8>, Vec<u8>)]) {
        let mut batch = self.database.batch().durability(Some(fjall::PersistMode::SyncData));
        for (key, value) in pairs {
            batch.insert(&self.keyspace, key.as_slice(), value.as_slice());
        }
        batch.commit().expect("a batch commits");
    }

    fn settle(&self) {
        self.database.persist(fjall::PersistMode::SyncAll).expect("a flush succeeds");
    }

    fn get(&self, key: &[u8]) -> Option<usize> {
        self.keyspace.get(key).expect("a get succeeds").map(|value| value.len())
    }

    fn scan(&self, key: &[u8], limit: usize) -> (usize, usize) {
        let (mut count, mut bytes) = (0, 0);
        for guard in self.keyspace.range(key..).take(limit) {
            let (key, value) = guard.into_inner().expect("a scan succeeds");
            count += 1;
            bytes += key.len() + value.len();
        }
        (count, bytes)
    }
}

const REDB_TABLE: redb::TableDefinition<'static, &'static [u8], &'static [u8]> = redb::TableDefinition::new("bench");

struct Redb(redb::Database);

fn open_redb(path: &Path) -> Box<dyn Peer> {
    std::fs::create_dir_all(path).expect("the directory can be made");
    let mut builder = redb::Builder::new();
    builder.set_cache_size(224 << 20);
    let database = builder.create(path.join("redb")).expect("redb opens");
    let write = database.begin_write().expect("a transaction begins");
    write.open_table(REDB_TABLE).expect("a table can be made");
    write.commit().expect("a transaction commits");
    Box::new(Redb(database))
}

impl Redb {
    fn write(&self, pairs: &mut dyn Iterator<Item = (&[u8], &[u8])>) {
        let write = self.0.begin_write().expect("a transaction begins");
        {
            let mut table = write.open_table(REDB_TABLE).expect("the table is there");
            for (key, value) in pairs {
                table.insert(key, value).expect("a put succeeds");
            }
        }
        write.commit().expect("a transaction commits");
    }
}

impl Peer for Redb {
    fn name(&self) -> &'static str {
        "redb"
    }

    fn put_durable(&self, key: &[u8], value: &[u8]) {
        self.write(&mut std::iter::once((key, value)));
    }

    fn load(&self, pairs: &[(Vec<u8>, Vec<u8>)]) {
        self.write(&mut pairs.iter().map(|(key, value)| (key.as_slice(), value.as_slice())));
    }

    fn settle(&self) {}

    fn get(&self, key: &[u8]) -> Option<usize> {
        use redb::{ReadableDatabase, ReadableTable};
        let read = self.0.begin_read().expect("a transaction begins");
        let table = read.open_table(REDB_TABLE).expect("the table is there");
        table.get(key).expect("a get succeeds").map(|value| value.value().len())
    }

    fn scan(&self, key: &[u8], limit: usize) -> (usize, usize) {
        use redb::{ReadableDatabase, ReadableTable};
        let read = self.0.begin_read().expect("a transaction begins");
        let table = read.open_table(REDB_TABLE).expect("the table is there");
        let (mut count, mut bytes) = (0, 0);
        for pair in table.range::<&[u8]>(key..).expect("a range opens").take(limit) {
            let (key, value) = pair.expect("a scan succeeds");
            count += 1;
            bytes += key.value().len() + value.value().len();
        }
        (count, bytes)
    }
}

type LmdbTable = heed::Database<heed::types::Bytes, heed::types::Bytes>;

struct Lmdb {
    env: heed::Env,
    table: LmdbTable,
}

fn open_lmdb(path: &Path) -> Box<dyn Peer> {
    std::fs::create_dir_all(path).expect("the directory can be made");
    // SAFETY: the file lies in a directory of this run alone and is opened once.
    let env = unsafe { heed::EnvOpenOptions::new().map_size(16 << 30).open(path) }.expect("lmdb opens");
    let mut write = env.write_txn().expect("a transaction begins");
    let table = env.create_database(&mut write, None).expect("a table can be made");
    write.commit().expect("a transaction commits");
    Box::new(Lmdb { env, table })
}

impl Peer for Lmdb {
    fn name(&self) -> &'static str {
        "lmdb"
    }

    fn put_durable(&self, key: &[u8], value: &[u8]) {
        let mut write = self.env.write_txn().expect("a transaction begins");
        self.table.put(&mut write, key, value).expect("a put succeeds");
        write.commit().expect("a transaction commits");
    }

    fn load(&self, pairs: &[(Vec<u8>, Vec<u8>)]) {
        let mut write = self.env.write_txn().expect("a transaction begins");
        for (key, value) in pairs {
            self.table.put(&mut write, key, value).expect("a put succeeds");
        }
        write.commit().expect("a transaction commits");
    }

    fn settle(&self) {}

    fn get(&self, key: &[u8]) -> Option<usize> {
        let read = self.env.read_txn().expect("a transaction begins");
        self.table.get(&read, key).expect("a get succeeds").map(<[u8]>::len)
    }

    fn scan(&self, key: &[u8], limit: usize) -> (usize, usize) {
        use std::ops::Bound;
        let read = self.env.read_txn().expect("a transaction begins");
        let (mut count, mut bytes) = (0, 0);
        let range = (Bound::Included(key), Bound::Unbounded);
        for pair in self.table.range(&read, &range).expect("a range opens").take(limit) {
            let (key, value) = pair.expect("a scan succeeds");
            count += 1;
            bytes += key.len() + value.len();
        }
        (count, bytes)
    }
}
