//! When the next of several entries of one queue may go.
//!
//! # Place
//! under queues that put requests which wait together into one entry: batches of a `Node`, requests of a server
//! # Invariants
//! - B1. An entry goes at once when none is under way. A further one goes while fewer than [`ENTRIES_MAX`] are, only when as
//!   many requests wait as the one under way holds, and only when that one has been under way for [`PATIENCE`]: it then waits
//!   for a disk or a network, and not for a processor that a further entry would take from it.
//! - B2. While an entry is about to be filled no other begins: what waits is its own.
//!
//! # Why not
//! the next entry as soon as anything waits: the requests of many writers then fall apart into many small entries, each of
//!   which costs every replica the wakes of several threads, and stay so
//! a second entry however fast the first is: it is sent before the first is committed, so the followers hear of that by a
//!   message of its own

use std::time::Duration;

/// Entries of one queue under way at the same time: one that is being replicated, and the next behind it.
const ENTRIES_MAX: usize = 2;
/// From when on an entry counts as waiting. Replicas near each other with disks that answer commit within it.
const PATIENCE: Duration = Duration::from_millis(4);

/// What of a queue is under way. It needs no lock of its own: it is kept beside the queue.
#[derive(Debug, Default)]
pub struct Batching {
    entries: usize,
    /// In all entries under way that are filled.
    requests: usize,
    /// An entry has begun and is not filled.
    is_filling: bool,
    /// When the last one began, by the caller's clock.
    begun: Duration,
}

/// An entry under way.
#[derive(Debug)]
#[must_use = "an entry that does not end keeps the others from their turn"]
pub struct UnderWay(Option<usize>);

impl Batching {
    /// An entry may begin, if `waiting` requests are worth one `now`, on any clock that does not go back. Whoever gets it takes
    /// what waits, says so by [`Batching::fill`], and calls [`Batching::end`] when it is done.
    pub fn begin(&mut self, waiting: usize, now: Duration) -> Option<UnderWay> {
        let is_slow = now.saturating_sub(self.begun) >= PATIENCE;
        let may = match self.entries {
            0 => waiting > 0,
            n => n < ENTRIES_MAX && is_slow && !self.is_filling && waiting >= self.requests.max(1),
        };
        may.then(|| {
            self.entries += 1;
            self.is_filling = true;
            self.begun = now;
            UnderWay(None)
        })
    }

    /// The entry holds so many requests.
    pub fn fill(&mut self, entry: &mut UnderWay, requests: usize) {
        if entry.0.is_none() {
            entry.0 = Some(requests);
            self.is_filling = false;
            self.requests += requests;
        }
    }

    /// The entry is done, or was given up.
    pub fn end(&mut self, entry: UnderWay) {
        match entry.0 {
            Some(requests) => self.requests -= requests,
            None => self.is_filling = false,
        }
        self.entries -= 1;
    }

    /// Nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.entries == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGUN: Duration = Duration::from_secs(7);
    const LATER: Duration = BEGUN.saturating_add(PATIENCE);

    #[test]
    fn a_second_entry_goes_when_it_is_as_large_as_the_first_and_that_one_takes_long() {
        let mut batching = Batching::default();
        assert!(batching.begin(0, BEGUN).is_none(), "nothing waits");
        let mut first = batching.begin(1, BEGUN).expect("none is under way");
        assert!(batching.begin(9, LATER).is_none(), "the first one takes what waits");
        batching.fill(&mut first, 9);
        assert!(batching.begin(8, LATER).is_none(), "smaller than the one under way");
        assert!(batching.begin(9, LATER - Duration::from_nanos(1)).is_none(), "the first may be done any moment");
        let mut second = batching.begin(9, LATER).expect("as large");
        batching.fill(&mut second, 9);
        assert!(batching.begin(1000, LATER + PATIENCE).is_none(), "two are under way");
        batching.end(first);
        assert!(batching.begin(8, LATER + PATIENCE).is_none(), "smaller than the one that is left");
        assert!(batching.begin(9, LATER).is_none(), "the one that is left has only begun");
        batching.end(second);
        assert!(batching.is_idle());
        let lone = batching.begin(1, LATER).expect("none is under way");
        batching.end(lone);
        assert!(
            batching.is_idle() && batching.begin(1, LATER).is_some(),
            "one that was given up unfilled blocks nobody"
        );
    }

    #[test]
    fn an_entry_that_found_nothing_blocks_nobody() {
        let mut batching = Batching::default();
        let mut empty = batching.begin(1, BEGUN).expect("none is under way");
        batching.fill(&mut empty, 0);
        assert!(batching.begin(0, LATER).is_none());
        let second = batching.begin(1, LATER).expect("one waits");
        batching.end(empty);
        batching.end(second);
        assert!(batching.is_idle());
    }
}
