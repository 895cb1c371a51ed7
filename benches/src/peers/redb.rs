//! redb: each transaction is durable when it has committed, which is its default; one writer at a time.

use std::path::Path;

use super::{Peer, Setup};

const REDB_TABLE: redb::TableDefinition<'static, &'static [u8], &'static [u8]> = redb::TableDefinition::new("bench");

struct Redb(redb::Database);

pub(super) fn open(path: &Path, setup: Setup) -> Box<dyn Peer> {
    std::fs::create_dir_all(path).expect("the directory can be made");
    let mut builder = redb::Builder::new();
    builder.set_cache_size(if setup == Setup::Cold { 64 << 20 } else { 224 << 20 });
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
        use redb::ReadableDatabase;
        let read = self.0.begin_read().expect("a transaction begins");
        let table = read.open_table(REDB_TABLE).expect("the table is there");
        table.get(key).expect("a get succeeds").map(|value| value.value().len())
    }

    fn scan(&self, key: &[u8], limit: usize) -> (usize, usize) {
        use redb::ReadableDatabase;
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
