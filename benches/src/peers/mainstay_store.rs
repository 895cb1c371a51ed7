//! Mainstay, alone on one node.

use std::ops::ControlFlow;
use std::path::Path;

use mainstay::{Batch, Keyspace, Store};

use super::Peer;

struct Mainstay {
    store: Store,
    keyspace: Keyspace,
}

pub(super) fn open(path: &Path) -> Box<dyn Peer> {
    let store = Store::builder().memory_bytes(256 << 20).wal_bytes(256 << 20).open(path).expect("mainstay opens");
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
