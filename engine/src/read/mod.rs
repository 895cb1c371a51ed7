//! Reading: point lookups and scans over memtables and tables, and the merge that feeds flush and compaction.
//!
//! # Place
//! above `memtable` and `table`; `Snapshot` and the group's jobs use it

mod merge;
#[cfg(test)]
#[allow(clippy::disallowed_methods, clippy::type_complexity, reason = "a test has no runtime; its bytes lie in memory")]
mod tests;
mod view;

use bytes::Bytes;

pub(crate) use merge::MergeInput;
pub(crate) use view::{LevelView, ReadView, ScanCursor};

/// What a memtable or a table knows of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// Its value.
    Value(Bytes),
    /// It was removed.
    Deleted,
    /// An operand, to be merged into what is below.
    Operand(Bytes),
    /// A merge was refused.
    Failed,
}
