//! Seeded randomness, a clock that is set by hand, and the scheduler that completions arrive through.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::{BoxFuture, Clock, Completer, Op, Random};

/// Runs functions later, in virtual time. The owner decides what "later" is and in which order equal times come.
pub trait SimScheduler: Send + Sync + 'static {
    /// Runs `f` once `delay` of virtual time has passed, never inside this call.
    fn after(&self, delay: Duration, f: Box<dyn FnOnce() + Send>);
}

/// Random numbers from a seed (SplitMix64): equal seeds give equal sequences.
#[derive(Debug)]
pub struct SimRandom(AtomicU64);

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl SimRandom {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// The next number of the sequence.
    pub fn number(&self) -> u64 {
        mix(self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP))
    }

    /// A number below `bound`, which is above zero.
    pub fn below(&self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below zero");
        // The high half of the product: the bias is below 2^-32 for the bounds used here.
        ((u128::from(self.number()) * u128::from(bound)) >> 64) as u64
    }

    /// True in `rate` of a million draws.
    pub fn chance(&self, rate: u32) -> bool {
        rate > 0 && self.below(1_000_000) < u64::from(rate)
    }
}

impl Random for SimRandom {
    fn fill(&self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.number().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// Scrambles a number so that equal inputs give equal outputs and near inputs give unrelated ones.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A decision of `seed` about the thing that `parts` name.
pub(crate) fn decide(seed: u64, parts: &[u64]) -> u64 {
    parts.iter().fold(mix(seed.wrapping_add(STEP)), |hash, part| mix(hash ^ part.wrapping_mul(STEP)))
}

/// A clock that moves only when it is told to.
pub struct SimClock {
    nanos: AtomicU64,
    unix_origin: Duration,
    /// What sleeps, with the time to wake.
    sleeps: Mutex<Vec<(Duration, Completer<()>)>>,
}

impl SimClock {
    /// A clock at zero, whose zero is `unix_origin` after the Unix epoch.
    pub fn new(unix_origin: Duration) -> Self {
        Self { nanos: AtomicU64::new(0), unix_origin, sleeps: Mutex::default() }
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.nanos.fetch_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.wake();
    }

    /// Moves the clock to `to`, never back.
    pub fn advance_to(&self, to: Duration) {
        self.nanos.fetch_max(u64::try_from(to.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.wake();
    }

    /// How many sleep.
    pub fn sleeping(&self) -> usize {
        self.sleeps.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Ends the sleeps whose time has come, in its order.
    fn wake(&self) {
        let mut sleeps = self.sleeps.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let (mut due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut *sleeps).into_iter().partition(|s| s.0 <= now);
        *sleeps = later;
        drop(sleeps);
        due.sort_by_key(|sleep| sleep.0);
        due.into_iter().for_each(|(_, sleep)| sleep.complete(Ok(())));
    }
}

impl std::fmt::Debug for SimClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimClock").field("now", &self.now()).finish_non_exhaustive()
    }
}

impl Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }

    fn unix(&self) -> Duration {
        self.unix_origin + self.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let (sleep, completer) = Op::pending();
        self.sleeps.lock().unwrap_or_else(PoisonError::into_inner).push((self.now() + duration, completer));
        // A sleep of no length, or one that the clock was moved beyond meanwhile.
        self.wake();
        Box::pin(async move {
            let _ = sleep.await;
        })
    }
}
