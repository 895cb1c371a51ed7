//! Mainstay, alone on one node.

use std::ops::ControlFlow;
use std::path::Path;

use mainstay::{Batch, Keyspace, Store};

use super::{Peer, Setup};

struct Mainstay {
    store: Store,
    keyspace: Keyspace,
}

pub(super) fn open(path: &Path, setup: Setup) -> Box<dyn Peer> {
    let builder = match setup {
        Setup::Ordinary => Store::builder().memory_bytes(256 << 20).wal_bytes(256 << 20),
        // All that it holds, as always: memtables, filters, and what an allocator keeps beside them.
        Setup::Cold => Store::builder().memory_bytes(128 << 20).wal_bytes(256 << 20),
        Setup::LongLog => Store::builder().memory_bytes(6 << 30).wal_bytes(4 << 30).memtable_bytes(3 << 30),
    };
    let store = builder.open(path).expect("mainstay opens");
    let keyspace = store.keyspace("bench").expect("a keyspace can be made");
    Box::new(Mainstay { store, keyspace })
}

impl Peer for Mainstay {
    fn name(&self) -> &'static str {
        "mainstay"
    }

    fn put_durable(&self, key: &[u8], value: &[u8]) {
        self.keyspace.insert(key, value).expect("a put succeeds");
    }

    fn load(&self, pairs: &[(Vec<u8>, Vec<u8>)]) {
        let mut batch = Batch::new();
        for (key, value) in pairs {
            batch.insert(&self.keyspace, key, value);
        }
        self.store.commit(batch).expect("a batch commits");
    }

    fn settle(&self) {
        self.store.compact(&self.keyspace, &b""[..]..).expect("a compaction succeeds");
    }

    fn get(&self, key: &[u8]) -> Option<usize> {
        self.keyspace.get(key).expect("a get succeeds").map(|value| value.len())
    }

    fn close(self: Box<Self>) {
        self.store.close().expect("it closes");
    }

    fn scan(&self, key: &[u8], limit: usize) -> (usize, usize) {
        let (mut count, mut bytes) = (0, 0);
        let pairs = self.keyspace.range(key..).visit(|key, value| {
            count += 1;
            bytes += key.len() + value.len();
            if count < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        pairs.expect("a scan succeeds");
        (count, bytes)
    }
}
