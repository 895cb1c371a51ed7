//! Decides whether a history of reads and writes of registers is linearizable.
//!
//! # Place
//! above nothing: it takes a finished history
//! # Method
//! Every value is written once, so each read names the write that it saw: the write and its reads form a
//! cluster that must take effect at one instant. With `start` the latest invocation and `finish` the earliest
//! return in a cluster, some operation of A ends before some operation of B begins if
//! `A.finish < B.start`. Two clusters that hold this in both directions can be put in no order; if no two
//! do, sorting them gives an order. Exact, in O(n log n).
//! # Unknown
//! A write without an answer may take effect at any time after its invocation, or never: it returns at the
//! end of time, and without readers it is left out. A read without an answer says nothing.
//! # Sources
//! Gibbons and Korach, Testing Shared Memories, SIAM J. Comput. 26 (1997), section 4 ("zones")

pub mod append;
pub mod chain;

use std::collections::BTreeMap;
use std::fmt;

/// An instant: the place of an event in the history. No two events share one.
pub type Stamp = u64;

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It took effect between invocation and this return.
    Done(Stamp),
    /// It certainly had no effect.
    Failed,
    /// It may have had, or may still have, an effect.
    Unknown,
}

/// What an operation did to one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Wrote a value that no other operation writes.
    Write(u64),
    /// Read a value; `None` is the state before all writes.
    Read(Option<u64>),
}

/// One operation on one register.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Which register.
    pub key: u64,
    /// What it did.
    pub action: Action,
    /// When it was called.
    pub invoked: Stamp,
    /// How it ended.
    pub outcome: Outcome,
    /// Who called it, for messages.
    pub client: u64,
}

/// Why a history is not linearizable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The register.
    pub key: u64,
    /// What was found, with the values and stamps.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "register {}: {}", self.key, self.what)
    }
}

/// A write and the reads that saw it.
#[derive(Clone, Copy)]
struct Cluster {
    value: Option<u64>,
    /// When the write was invoked; no read may end before.
    born: Stamp,
    /// Latest invocation.
    start: Stamp,
    /// Earliest return.
    finish: Stamp,
    reads: u64,
    /// False for a write that may never have happened.
    certain: bool,
}

/// Checks every register of a history.
///
/// # Errors
/// The first violation found, by the order of registers.
pub fn check(history: &[Operation]) -> Result<(), Violation> {
    let mut registers: BTreeMap<u64, Vec<&Operation>> = BTreeMap::new();
    for operation in history {
        registers.entry(operation.key).or_default().push(operation);
    }
    registers
        .into_iter()
        .try_for_each(|(key, operations)| check_register(&operations).map_err(|what| Violation { key, what }))
}

fn check_register(operations: &[&Operation]) -> Result<(), String> {
    let mut clusters: BTreeMap<Option<u64>, Cluster> = BTreeMap::new();
    // The initial value was written before everything.
    clusters.insert(None, Cluster { value: None, born: 0, start: 0, finish: 0, reads: 0, certain: true });
    let mut refused: BTreeMap<u64, ()> = BTreeMap::new();
    for operation in operations {
        let Action::Write(value) = operation.action else { continue };
        let finish = match operation.outcome {
            Outcome::Done(at) => at,
            Outcome::Unknown => Stamp::MAX,
            Outcome::Failed => {
                refused.insert(value, ());
                continue;
            }
        };
        let born = operation.invoked;
        let certain = finish != Stamp::MAX;
        let cluster = Cluster { value: Some(value), born, start: born, finish, reads: 0, certain };
        if clusters.insert(Some(value), cluster).is_some() {
            return Err(format!("the value {value} was written twice: the history cannot be judged"));
        }
    }
    for operation in operations {
        let (Action::Read(value), Outcome::Done(at)) = (operation.action, operation.outcome) else { continue };
        let Some(cluster) = clusters.get_mut(&value) else {
            let why = match value {
                Some(value) if refused.contains_key(&value) => "whose write was refused",
                _ => "that nobody wrote",
            };
            return Err(format!("client {} read {value:?}, {why}, at={at}", operation.client));
        };
        if at < cluster.born {
            let born = cluster.born;
            return Err(format!(
                "client {} read {value:?} before it was written, at={at} written={born}",
                operation.client
            ));
        }
        cluster.start = cluster.start.max(operation.invoked);
        cluster.finish = cluster.finish.min(at);
        cluster.reads += 1;
    }
    let zones: Vec<Cluster> = clusters.into_values().filter(|c| c.certain || c.reads > 0).collect();
    let mut forward: Vec<Cluster> = zones.iter().copied().filter(|c| c.finish < c.start).collect();
    forward.sort_unstable_by_key(|c| c.finish);
    for pair in forward.windows(2) {
        if pair[1].finish < pair[0].start {
            return Err(conflict(&pair[0], &pair[1]));
        }
    }
    // The forward zones are disjoint from here on, so only the last one that begins before a backward zone can hold it.
    for zone in zones.iter().filter(|c| c.finish >= c.start) {
        let before = forward.partition_point(|f| f.finish < zone.start);
        if let Some(around) = before.checked_sub(1).and_then(|i| forward.get(i))
            && zone.finish < around.start
        {
            return Err(conflict(around, zone));
        }
    }
    Ok(())
}

fn conflict(a: &Cluster, b: &Cluster) -> String {
    format!(
        "{:?} was seen both before and after {:?}: an operation on the first ended at {} and another began at {}, \
         an operation on the second ended at {} and another began at {}",
        a.value, b.value, a.finish, a.start, b.finish, b.start
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rt::SimRng;

    fn op(action: Action, invoked: Stamp, outcome: Outcome) -> Operation {
        Operation { key: 1, action, invoked, outcome, client: 0 }
    }

    fn write(value: u64, from: Stamp, to: Stamp) -> Operation {
        op(Action::Write(value), from, Outcome::Done(to))
    }

    fn read(value: Option<u64>, from: Stamp, to: Stamp) -> Operation {
        op(Action::Read(value), from, Outcome::Done(to))
    }

    /// Tries every order: the definition itself, for a handful of operations.
    fn brute_force(operations: &[Operation]) -> bool {
        fn place(left: &mut Vec<Operation>, value: Option<u64>) -> bool {
            if left.iter().all(|o| o.outcome == Outcome::Unknown) {
                return true;
            }
            (0..left.len()).any(|i| {
                let next = left[i];
                // Whoever returned before `next` was called must have been placed already.
                let free = left.iter().all(|o| !matches!(o.outcome, Outcome::Done(at) if at < next.invoked));
                let after = match next.action {
                    Action::Write(v) => Some(v),
                    Action::Read(v) if v == value => v,
                    Action::Read(_) => return false,
                };
                if !free {
                    return false;
                }
                left.remove(i);
                let fits = place(left, after);
                left.insert(i, next);
                fits
            })
        }
        let mut left: Vec<Operation> = operations
            .iter()
            .filter(|o| o.outcome != Outcome::Failed)
            .filter(|o| !(o.outcome == Outcome::Unknown && matches!(o.action, Action::Read(_))))
            .copied()
            .collect();
        place(&mut left, None)
    }

    /// The zones are a clever way to say something simple. On 60,000 small histories, half of them wrong, both agree.
    #[test]
    fn zones_agree_with_every_order_tried() {
        let mut rng = SimRng::new(11);
        let mut linearizable = 0;
        for _ in 0..60_000 {
            let count = rng.range(2, 7);
            let mut stamps: Vec<u64> = (1..=count * 2).collect();
            for i in (1..stamps.len()).rev() {
                stamps.swap(i, rng.below(i as u64 + 1) as usize);
            }
            let mut history = Vec::new();
            for i in 0..count {
                let (a, b) = (stamps[i as usize * 2], stamps[i as usize * 2 + 1]);
                let (invoked, returned) = (a.min(b), a.max(b));
                let action = if rng.chance(450) {
                    Action::Write(i + 1)
                } else {
                    let value = rng.below(count + 1);
                    Action::Read((value > 0).then_some(value))
                };
                let outcome = match rng.below(10) {
                    0 => Outcome::Unknown,
                    1 if matches!(action, Action::Write(_)) => Outcome::Failed,
                    _ => Outcome::Done(returned),
                };
                history.push(op(action, invoked, outcome));
            }
            let expect = brute_force(&history);
            linearizable += u64::from(expect);
            assert_eq!(check(&history).is_ok(), expect, "{history:#?}");
        }
        assert!((10_000..50_000).contains(&linearizable), "both answers are common: linearizable={linearizable}");
    }

    #[test]
    fn a_planted_stale_read_and_a_planted_lost_write_are_found() {
        // 2 was acknowledged at 4; a read called at 5 must not see 1.
        assert!(check(&[write(1, 1, 2), write(2, 3, 4), read(Some(1), 5, 6)]).is_err());
        assert!(check(&[write(1, 1, 2), write(2, 3, 4), read(Some(2), 5, 6)]).is_ok());
        // Lost: the register is back in its first state.
        assert!(check(&[write(1, 1, 2), read(None, 3, 4)]).is_err());
        // Two reads see two concurrent writes in opposite orders.
        let opposite =
            [write(1, 1, 10), write(2, 2, 11), read(Some(1), 3, 4), read(Some(2), 5, 6), read(Some(1), 7, 8)];
        assert!(check(&opposite).is_err());
    }

    #[test]
    fn an_unknown_write_may_happen_late_or_never_but_not_come_and_go() {
        let unknown = op(Action::Write(2), 3, Outcome::Unknown);
        assert!(check(&[write(1, 1, 2), unknown, read(Some(1), 5, 6)]).is_ok());
        assert!(check(&[write(1, 1, 2), unknown, read(Some(1), 5, 6), read(Some(2), 7, 8)]).is_ok());
        let come_and_go = [write(1, 1, 2), unknown, read(Some(2), 5, 6), read(Some(1), 7, 8)];
        assert!(check(&come_and_go).is_err());
        let refused = op(Action::Write(2), 3, Outcome::Failed);
        assert!(check(&[write(1, 1, 2), refused, read(Some(2), 5, 6)]).is_err());
    }

    /// A long sequential history is linearizable; swapping what two reads far apart saw makes it wrong, and it is found.
    #[test]
    fn one_wrong_read_in_a_hundred_thousand_is_found() {
        let mut rng = SimRng::new(3);
        let (mut history, mut now, mut value) = (Vec::new(), 0, None);
        for i in 0..100_000 {
            now += 2;
            if rng.chance(300) {
                history.push(write(i + 1, now, now + 1));
                value = Some(i + 1);
            } else {
                history.push(read(value, now, now + 1));
            }
        }
        assert_eq!(check(&history), Ok(()));
        let victim = history.iter().rposition(|o| matches!(o.action, Action::Read(_))).expect("reads are common");
        let old = history.iter().find(|o| matches!(o.action, Action::Write(_))).expect("writes are common").action;
        let Action::Write(old) = old else { unreachable!("it is a write") };
        history[victim].action = Action::Read(Some(old));
        assert!(check(&history).is_err());
    }
}
