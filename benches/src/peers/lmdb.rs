//! LMDB through heed: each transaction is durable when it has committed, which is its default; one writer at a time.

use std::path::Path;

use super::{Peer, Setup};

type LmdbTable = heed::Database<heed::types::Bytes, heed::types::Bytes>;

struct Lmdb {
    env: heed::Env,
    table: LmdbTable,
}

pub(super) fn open(path: &Path, _: Setup) -> Box<dyn Peer> {
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
        // An empty key is no key here.
        let from = if key.is_empty() { Bound::Unbounded } else { Bound::Included(key) };
        let range = (from, Bound::Unbounded);
        for pair in self.table.range(&read, &range).expect("a range opens").take(limit) {
            let (key, value) = pair.expect("a scan succeeds");
            count += 1;
            bytes += key.len() + value.len();
        }
        (count, bytes)
    }
}
