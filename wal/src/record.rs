//! Positions, groups and kinds of records.

use std::fmt;

/// A byte position in the log; grows for ever. Position modulo ring size is the place in the zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

/// The owner of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u64);

/// What a record is, for its owner. Kinds below [`RecordKind::OWNER_FIRST`] belong to the engine, the others to the
/// owner of the group's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordKind(pub u8);

impl RecordKind {
    /// The first kind that the owner of a group's log may use.
    pub const OWNER_FIRST: u8 = 32;
    /// Never written: delivered at open in place of records that cannot be read, under group 0. Its payload is empty; its
    /// position is where they lay. How many they were, and whose, is not known.
    pub const HOLE: Self = Self(u8::MAX);
}

/// Where a record lies: the batch that carries it and the place inside. Ordered as the log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordPos {
    /// Where the batch begins.
    pub batch: Lsn,
    /// Bytes from the start of the batch to the record.
    pub offset: u32,
    /// Bytes of the record's payload.
    pub length: u32,
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
