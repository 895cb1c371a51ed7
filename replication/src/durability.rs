//! What a write waits for and what a read promises.

use mainstay_engine::LogIndex;
use std::time::Duration;

/// What an answer to a write promises. docs/replication.md says what each may lose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Durability {
    /// The leader has it durable. May be lost in a failover; not readable before it is committed.
    Local,
    /// A majority has it durable, and the leader has applied it.
    #[default]
    Quorum,
    /// Every voter has it durable, and the leader has applied it.
    All,
    /// A quorum, and at least one member that bears this label as its site, voter or learner, have it durable; and the
    /// leader has applied it.
    Site(String),
    /// A quorum and the archive have it. `Unsupported` so far.
    Archive,
}

/// What a read promises.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReadLevel {
    /// Sees every write acknowledged before the read began. One quorum round shared by all waiting reads (ReadIndex).
    #[default]
    Linearizable,
    /// As `Linearizable` while clocks run at bounded rates; no round.
    Lease,
    /// Sees at least this index; waits for it here.
    AtLeast(LogIndex),
    /// Sees every write acknowledged up to so long before the read began. At once while a round of this replica to the
    /// leader is no older; else as `Linearizable`.
    Stale(Duration),
    /// Whatever is applied here.
    Local,
}
