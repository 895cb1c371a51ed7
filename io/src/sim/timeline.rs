//! Virtual time for tests that have no executor of their own.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::SimScheduler;

/// Runs functions in the order of their times, those of one time in the order of their calls, whenever its owner says so.
#[derive(Default)]
pub struct SimTimeline(Mutex<Line>);

#[derive(Default)]
struct Line {
    now: Duration,
    calls: u64,
    due: BinaryHeap<Due>,
}

struct Due {
    at: Duration,
    call: u64,
    run: Box<dyn FnOnce() + Send>,
}

impl SimTimeline {
    /// Goes to the time of the next function and runs it; false when there is none.
    pub fn step(&self) -> bool {
        let mut line = self.lock();
        let Some(Due { at, run, .. }) = line.due.pop() else { return false };
        line.now = at;
        // It may ask for more.
        drop(line);
        run();
        true
    }

    /// Runs until nothing is left to run.
    pub fn run(&self) {
        while self.step() {}
    }

    /// The time of the last function that ran.
    pub fn now(&self) -> Duration {
        self.lock().now
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SimScheduler for SimTimeline {
    fn after(&self, delay: Duration, run: Box<dyn FnOnce() + Send>) {
        let mut line = self.lock();
        line.calls += 1;
        let due = Due { at: line.now + delay, call: line.calls, run };
        line.due.push(due);
    }
}

impl fmt::Debug for SimTimeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.lock();
        f.debug_struct("SimTimeline").field("now", &line.now).field("due", &line.due.len()).finish()
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.call == other.call
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    /// The heap gives out its greatest: the one that is due first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.call).cmp(&(self.at, self.call))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn functions_run_by_time_and_then_by_call() {
        let (timeline, order) = (Arc::new(SimTimeline::default()), Arc::new(Mutex::new(Vec::new())));
        for (name, ms) in [("late", 3), ("first", 1), ("second", 1)] {
            let (order, again) = (order.clone(), timeline.clone());
            let run = move || {
                order.lock().expect("one thread").push(name);
                if name == "first" {
                    again.after(
                        Duration::from_millis(1),
                        Box::new(move || order.lock().expect("one thread").push("nested")),
                    );
                }
            };
            timeline.after(Duration::from_millis(ms), Box::new(run));
        }
        timeline.run();
        assert_eq!(*order.lock().expect("one thread"), ["first", "second", "nested", "late"]);
        assert_eq!((timeline.now(), timeline.step()), (Duration::from_millis(3), false));
    }
}
