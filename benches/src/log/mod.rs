//! The log by itself: writers that each wait until their commit is durable before they make the next one.
//!
//! Each log is driven in every way that suits it, so that the best of one can be held against the best of the other.

use std::path::Path;
use std::time::Duration;

use crate::work::Outcome;

mod mainstay_wal;
#[cfg(feature = "raft-engine")]
mod raft_engine;

/// What is written, by how many, for how long.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writers, each with one commit under way.
    pub writers: usize,
    /// Bytes of a commit.
    pub bytes: usize,
    /// How long is measured.
    pub time: Duration,
    /// How long the same runs before, unmeasured.
    pub warm_up: Duration,
}

/// A log and a way to drive it.
pub struct Driver {
    /// Whose log.
    pub log: &'static str,
    /// Who waits and who writes.
    pub way: &'static str,
    /// Makes the log in an empty directory, runs the load on it and closes it.
    pub run: fn(&Path, Load) -> Outcome,
}

/// Every driver of this build; Mainstay's come first.
pub fn drivers() -> Vec<Driver> {
    #[allow(unused_mut, reason = "grows with the feature `raft-engine`")]
    let mut drivers = mainstay_wal::drivers();
    #[cfg(feature = "raft-engine")]
    drivers.extend(raft_engine::drivers());
    drivers
}

/// A runtime for writers that are tasks: one thread a core, as servers run it.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().build().expect("a runtime can be made")
}
