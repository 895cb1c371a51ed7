//! fjall: each commit persists its journal.

use std::path::Path;

use super::{Peer, Setup};

struct Fjall {
    database: fjall::Database,
    keyspace: fjall::Keyspace,
}

pub(super) fn open(path: &Path, setup: Setup) -> Box<dyn Peer> {
    let builder = fjall::Database::builder(path);
    let builder = match setup {
        Setup::Ordinary => builder.cache_size(160 << 20),
        Setup::Cold => builder.cache_size(64 << 20),
        Setup::LongLog => builder.cache_size(160 << 20).max_journaling_size(4 << 30),
    };
    let database = builder.open().expect("fjall opens");
    let keyspace = || match setup {
        Setup::LongLog => fjall::KeyspaceCreateOptions::default().max_memtable_size(3 << 30),
        Setup::Ordinary | Setup::Cold => fjall::KeyspaceCreateOptions::default(),
    };
    let keyspace = database.keyspace("bench", keyspace).expect("a keyspace can be made");
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
        self.keyspace.rotate_memtable_and_wait().expect("a flush succeeds");
        self.keyspace.major_compact().expect("a compaction succeeds");
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
