//! Planted bugs: the proof that the simulator finds such.
//!
//! # Place
//! `io` is below all, so every crate can plant one with [`crate::mutant!`]; the simulator chooses which is active, if any
//! # Invariants
//! - P1. Without `--cfg mainstay_mutants` this module does not exist and [`crate::mutant!`] is the constant `false`.
//! - P2. With it no build without debug assertions compiles: see the head of the crate.
//! - P3. A planted bug acts on the thread that chose it and on no other: simulations run beside each other.

use std::cell::Cell;

macro_rules! mutants {
    ($($variant:ident $name:literal $what:literal,)*) => {
        /// A bug that can be planted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Mutant {
            $(#[doc = $what] $variant,)*
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// What it is called on the command line and in tables.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// What is wrong with it.
            pub fn what(self) -> &'static str {
                match self {
                    $(Self::$variant => $what,)*
                }
            }
        }
    };
}

mutants! {
    AckBeforeSync "ack-before-sync" "the log acknowledges a batch when it gives it to the device",
    AckOutOfOrder "ack-out-of-order" "the log acknowledges a durable batch although one before it is not",
    CachedLog "cached-log" "the log writes without asking for durability",
    SkipBatchChecksum "skip-batch-checksum" "recovery of the log takes a torn batch for a whole one",
    HoleIsTail "hole-is-tail" "recovery cuts the log at damaged bytes that are proven to have been acknowledged",
    ForgetReceipts "forget-receipts" "nobody tells a member whose volume went back what it had promised",
    CutWithoutPages "cut-without-pages" "the log is cut before the superblock says so",
    TablesNotFlushed "tables-not-flushed" "an install is logged while its tables are not durable",
    SkipBlockChecksum "skip-block-checksum" "a block of a table is used without a look at its checksum",
    ReplaySkipsOne "replay-skips-one" "after a restart the first entry behind the flushed index is not applied",
    DropTombstones "drop-tombstones" "a flush or compaction drops tombstones although older versions lie below",
    FilterDenies "filter-denies" "the filter of a table denies one in 64 of its keys",
    OldestWins "oldest-wins" "a merge gives the oldest version of a key",
    LocalTableSize "local-table-size" "where a table is cut depends on the wall clock of the replica",
    CheckpointMoves "checkpoint-moves" "a checkpoint is read at the index of now and not at its own",
    CheckpointInUse "checkpoint-in-use" "a checkpoint shows what was written after it, while that is in memory",
    TimeGoesBack "time-goes-back" "the time of the log goes back with the clock of a leader",
    TimeStandsStill "time-stands-still" "nobody moves the time of a quiet log on, so that what may end does not",
    HalfIsAll "half-is-all" "a table of which half has ended is dropped unread",
    OwnClock "own-clock" "each replica drops what has ended by its own clock",
    ForgetVote "forget-vote" "a vote is given and not written to the log",
    LeaderRestore "leader-restore" "a leader that restarts goes on in its old term",
    AppendUnflushed "append-unflushed" "entries are reported durable when they are queued",
    LocalBeforeSync "local-before-sync" "a write at the level of the leader is acknowledged when it is queued",
    StaleLease "stale-lease" "a lease read asks nobody whether the lease holds",
    ReadIndexAlone "read-index-alone" "a leader confirms a read index without a quorum",
    ReadUnapplied "read-unapplied" "a read does not wait until its index is applied",
    ProgressAhead "progress-ahead" "an entry counts as readable when the one before it is applied",
    RetryForwarded "retry-forwarded" "a forwarded write without an answer is proposed again",
    RefuseDiscarded "refuse-discarded" "a write that another leader may have kept is called not applied",
    SameIdAfterWipe "same-id-after-wipe" "a wiped volume goes on under its old id, and nobody compares incarnations",
    SkipFrameChecksum "skip-frame-checksum" "a damaged message is handled",
    CacheKeepsTruncated "cache-keeps-truncated" "truncated entries stay in the cache and are served",
}

thread_local! {
    static PLANTED: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Plants a bug on this thread, or takes it out.
pub fn plant(mutant: Option<Mutant>) {
    PLANTED.set(mutant);
}

/// True if this bug is planted on this thread.
pub fn is_planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}
