//! The decoders as targets: any bytes in, no panic. Used by the fuzz targets and by the tests here.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_io::{BoxFuture, block_on};

use super::block::{Block, BlockCursor};
use super::filter::Filter;
use super::index::{FOOTER_BYTES, Handle, ROOT_BYTES, Root};
use super::{Table, TableBytes, TableCursor, TableMeta, ranges};
use crate::cache::BlockCache;
use crate::memory::MemoryBudget;
use crate::{Error, ErrorKind, LogIndex, Result, TableRanges};

/// Entries that a walk looks at, at most: hostile bytes may claim many.
const STEPS_MAX: usize = 1 << 16;

/// Puts a cursor somewhere.
type Start = fn(&mut BlockCursor, &[u8]) -> std::result::Result<(), super::block::Malformed>;

/// Walks `bytes` as a block, both ways, and looks for `probe`.
pub(crate) fn block(bytes: &[u8], probe: &[u8]) {
    let Ok(block) = Block::parse(Bytes::copy_from_slice(bytes)) else { return };
    if let Ok(Some(found)) = block.search(probe) {
        let _ = (block.part(&found.value).len(), block.slice(found.value));
    }
    for reverse in [false, true] {
        let mut cursor = BlockCursor::new(block.clone(), reverse);
        let starts: [Start; 4] = [
            |cursor, _| cursor.seek_start(),
            |cursor, probe| cursor.seek(probe, false),
            |cursor, probe| cursor.seek(probe, true),
            |cursor, probe| if cursor.is_reverse() { cursor.seek_ceiling(probe) } else { Ok(()) },
        ];
        for start in starts {
            let mut going = start(&mut cursor, probe).is_ok();
            for _ in 0..STEPS_MAX {
                if !going || !cursor.valid() {
                    break;
                }
                let _ = (cursor.key().len(), cursor.index(), cursor.value(), cursor.value_part().len());
                going = cursor.advance().is_ok();
            }
        }
    }
}

/// Takes `bytes` as a root, a handle, a filter and a block.
pub(crate) fn parts(bytes: &[u8]) {
    let _ = Root::decode(bytes);
    let _ = Handle::take(bytes, u64::MAX);
    if let Ok(filter) = Filter::parse(Bytes::copy_from_slice(bytes)) {
        for hash in [0, 1, u64::MAX, 0x9e37_79b9_7f4a_7c15] {
            let _ = filter.may_contain(hash);
        }
    }
    let _ = ranges::decode(Bytes::copy_from_slice(bytes));
    let probe = bytes.get(..bytes.len().min(8)).unwrap_or_default();
    block(bytes, probe);
}

struct Whole(Bytes);

impl TableBytes for Whole {
    fn read(&self, offset: u64, length: usize) -> BoxFuture<Result<Bytes>> {
        let end = usize::try_from(offset).ok().and_then(|from| Some(from..from.checked_add(length)?));
        let part = end.filter(|range| range.end <= self.0.len()).map(|range| self.0.slice(range));
        Box::pin(async move { part.ok_or_else(|| Error::new(ErrorKind::Io, "beyond the end")) })
    }
}

#[allow(clippy::disallowed_methods, reason = "a fuzz target has no runtime, and the bytes lie in memory")]
/// Opens `bytes` as a table by its own footer, and reads it in every way.
pub(crate) fn table(bytes: &[u8]) {
    let Some(footer) = bytes.len().checked_sub(FOOTER_BYTES).and_then(|at| bytes.get(at..)) else { return };
    let root = Bytes::copy_from_slice(footer.get(..ROOT_BYTES).unwrap_or_default());
    let Ok(decoded) = Root::decode(&root) else { return };
    let meta = TableMeta {
        first: Bytes::new(),
        last: Bytes::from_static(&[0xff; 16]),
        entries: decoded.entries,
        tombstones: decoded.tombstones,
        bytes: decoded.bytes,
        digest: xxhash_rust::xxh3::xxh3_128(bytes),
        root,
        ranges: TableRanges { tombstones: u64::from(decoded.has_ranges()), spans: Vec::new() },
    };
    let budget = MemoryBudget::new(16 << 20);
    let cache = BlockCache::new(&budget);
    let Ok(table) = Table::open(meta, Arc::new(Whole(Bytes::copy_from_slice(bytes))), &cache, &budget) else { return };
    block_on(async {
        let _ = table.verify().await;
        let _ = table.ranges().await.map(|ranges| ranges.cover(b"user/000007/name", LogIndex(u64::MAX)));
        let _ = table.get(b"user/000007/name", LogIndex(u64::MAX)).await;
        for reverse in [false, true] {
            let mut cursor = TableCursor::new(reverse);
            let mut going = cursor.seek_start(&table).await.is_ok();
            for _ in 0..STEPS_MAX {
                if !going || !cursor.valid() {
                    break;
                }
                let _ = (cursor.key().len(), cursor.value());
                going = cursor.advance(&table).await.is_ok();
            }
        }
    });
}
