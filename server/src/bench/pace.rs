//! When operations are due.
//!
//! # Invariants
//! 1. At a fixed rate the instants are settled before the run begins and nothing moves them. A client that is held up by one operation begins
//!    those that were due meanwhile one after the other, and their latencies count from when they were due.
//! # Why not
//! The next operation an interval after the last answer: a stall of a second then is one slow operation, and the thousand that would have
//! come meanwhile were never asked (coordinated omission).

use std::time::Duration;

/// The instants of one client, from the start of the run on.
pub(super) struct Pace {
    /// Between two operations; None at full speed.
    interval: Option<Duration>,
    due: Duration,
}

impl Pace {
    /// `rate` operations a second over all `clients`, which begin spread over one interval; without one as fast as answers come.
    pub(super) fn new(rate: Option<u64>, client: u32, clients: u32) -> Self {
        let interval = rate.map(|rate| Duration::from_secs_f64(f64::from(clients.max(1)) / rate.max(1) as f64));
        Self { interval, due: interval.unwrap_or_default() * client / clients.max(1) }
    }

    /// When the next operation is due, asked at `now`: perhaps before it, never when nobody has set a rate.
    pub(super) fn next(&mut self, now: Duration) -> Duration {
        match self.interval {
            None => now,
            Some(interval) => {
                let due = self.due;
                self.due += interval;
                due
            }
        }
    }

    /// Operations that are due from `due` on and before `end`.
    pub(super) fn due_before(&self, due: Duration, end: Duration) -> u64 {
        let Some(interval) = self.interval.filter(|_| due < end) else { return 0 };
        let nanos = (end - due).as_nanos().div_ceil(interval.as_nanos().max(1));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn instants_follow_each_other_whatever_the_time_is() {
        let mut pace = Pace::new(Some(100), 1, 2);
        assert_eq!([pace.next(ms(0)), pace.next(ms(5000)), pace.next(ms(5000))], [ms(10), ms(30), ms(50)]);
        let mut first = Pace::new(Some(100), 0, 2);
        assert_eq!([first.next(ms(0)), first.next(ms(0))], [ms(0), ms(20)]);
        let mut free = Pace::new(None, 1, 2);
        assert_eq!([free.next(ms(7)), free.next(ms(9))], [ms(7), ms(9)]);
    }

    #[test]
    fn what_is_due_and_not_begun_is_counted() {
        let pace = Pace::new(Some(100), 0, 1);
        let check = |due, end, expect| assert_eq!(pace.due_before(due, end), expect, "{due:?} {end:?}");
        check(ms(0), ms(0), 0);
        check(ms(10), ms(5), 0);
        check(ms(0), ms(1), 1);
        check(ms(0), ms(10), 1);
        check(ms(0), ms(11), 2);
        check(ms(500), ms(1000), 50);
        assert_eq!(Pace::new(None, 0, 1).due_before(ms(0), ms(1000)), 0);
    }
}
