//! Decides whether a history of compare-and-set on a register is linearizable.
//!
//! # Method
//! A register that is changed by nothing but compare-and-set with values that are written once tells its own order: who
//! succeeded named the value before and the value after, so the changes form one chain from the first state. With the
//! i-th value of the chain, its change has rank 2i and every read of it rank 2i + 1. The order of ranks is forced, so
//! the history is linearizable exactly when no operation ended before another of lower rank began. O(n log n).
//! # Unknown
//! A compare-and-set without an answer happened if somebody saw its value, as a read or as what a later one expected;
//! else it may have been the last and makes no difference.

use std::collections::BTreeMap;

use super::{Outcome, Stamp};

/// What an operation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Changed `from` into `to`, a value that no other operation writes.
    Swap {
        /// What the register held; nothing before the first change.
        from: Option<u64>,
        /// What it holds since.
        to: u64,
    },
    /// Read a value, or was told it when a comparison failed.
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
    /// How it ended. A comparison that failed is a read.
    pub outcome: Outcome,
}

/// Checks every register of a history.
///
/// # Errors
/// The first violation found, by the order of registers.
pub fn check(history: &[Operation]) -> Result<(), String> {
    let mut registers: BTreeMap<u64, Vec<&Operation>> = BTreeMap::new();
    for operation in history {
        registers.entry(operation.key).or_default().push(operation);
    }
    registers
        .into_iter()
        .try_for_each(|(key, operations)| check_register(&operations).map_err(|what| format!("register {key}: {what}")))
}

/// A change and what is known of it.
#[derive(Clone, Copy)]
struct Change<'a> {
    from: Option<u64>,
    operation: &'a Operation,
}

fn check_register(operations: &[&Operation]) -> Result<(), String> {
    let mut changes: BTreeMap<u64, Change<'_>> = BTreeMap::new();
    for operation in operations {
        let Action::Swap { from, to } = operation.action else { continue };
        if changes.insert(to, Change { from, operation }).is_some() {
            return Err(format!("the value {to} was written twice: the history cannot be judged"));
        }
    }
    let happened = happened(operations, &changes)?;
    // The chain from its first value: each value has one successor.
    let mut next: BTreeMap<Option<u64>, u64> = BTreeMap::new();
    for to in happened.keys() {
        let from = changes[to].from;
        if let Some(other) = next.insert(from, *to) {
            return Err(format!("both {other} and {to} took the place of {from:?}"));
        }
    }
    let mut ranks: BTreeMap<Option<u64>, u64> = BTreeMap::from([(None, 0)]);
    let (mut at, mut rank) = (None, 0);
    while let Some(to) = next.remove(&at) {
        rank += 1;
        at = Some(to);
        ranks.insert(at, rank);
    }
    if let Some((from, to)) = next.first_key_value() {
        return Err(format!("{to} took the place of {from:?}, which the register never held"));
    }
    // (invoked, returned, rank); who never returned ended at the end of time.
    let mut intervals = Vec::new();
    for operation in operations {
        let (value, odd) = match operation.action {
            Action::Swap { to, .. } => (Some(to), 0),
            Action::Read(value) => (value, 1),
        };
        let returned = match operation.outcome {
            Outcome::Done(at) => at,
            Outcome::Unknown => Stamp::MAX,
            Outcome::Failed => continue,
        };
        if odd == 1 && returned == Stamp::MAX {
            continue;
        }
        // A change that nobody saw and nobody answered may have come to nothing.
        let Some(rank) = ranks.get(&value) else { continue };
        intervals.push((operation.invoked, returned, rank * 2 + odd));
    }
    let mut by_return = intervals.clone();
    by_return.sort_unstable_by_key(|i| i.1);
    intervals.sort_unstable();
    let (mut ended, mut highest) = (by_return.into_iter().peekable(), (0, 0));
    for (invoked, _, rank) in intervals {
        while let Some((_, returned, other)) = ended.next_if(|e| e.1 < invoked) {
            highest = highest.max((other, returned));
        }
        if rank < highest.0 {
            let (other, returned) = highest;
            return Err(format!(
                "an operation of rank {rank} began at {invoked}, after one of rank {other} had ended at {returned}"
            ));
        }
    }
    Ok(())
}

/// The values that the register certainly held.
fn happened(operations: &[&Operation], changes: &BTreeMap<u64, Change<'_>>) -> Result<BTreeMap<u64, ()>, String> {
    let mut happened = BTreeMap::new();
    let mut seen: Vec<u64> = Vec::new();
    for operation in operations {
        let Outcome::Done(_) = operation.outcome else { continue };
        match operation.action {
            Action::Swap { from, to } => seen.extend(from.into_iter().chain([to])),
            Action::Read(value) => seen.extend(value),
        }
    }
    while let Some(value) = seen.pop() {
        let Some(change) = changes.get(&value) else { return Err(format!("{value} was seen, and nobody wrote it")) };
        if change.operation.outcome == Outcome::Failed {
            return Err(format!("{value} was seen, and its write was refused"));
        }
        if happened.insert(value, ()).is_none() {
            // What it took the place of was there too.
            seen.extend(change.from);
        }
    }
    Ok(happened)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rt::SimRng;

    fn op(action: Action, invoked: Stamp, outcome: Outcome) -> Operation {
        Operation { key: 1, action, invoked, outcome }
    }

    fn swap(from: Option<u64>, to: u64, invoked: Stamp, returned: Stamp) -> Operation {
        op(Action::Swap { from, to }, invoked, Outcome::Done(returned))
    }

    fn read(value: Option<u64>, invoked: Stamp, returned: Stamp) -> Operation {
        op(Action::Read(value), invoked, Outcome::Done(returned))
    }

    /// Tries every order.
    fn brute_force(operations: &[Operation]) -> bool {
        fn place(left: &mut Vec<Operation>, value: Option<u64>) -> bool {
            if left.iter().all(|o| o.outcome == Outcome::Unknown) {
                return true;
            }
            (0..left.len()).any(|i| {
                let next = left[i];
                let free = left.iter().all(|o| !matches!(o.outcome, Outcome::Done(at) if at < next.invoked));
                let after = match next.action {
                    Action::Swap { from, to } if from == value => Some(to),
                    Action::Read(v) if v == value => v,
                    Action::Swap { .. } | Action::Read(_) => return false,
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

    /// On 60,000 small histories, many of them wrong, the ranks and a search over all orders agree.
    #[test]
    fn ranks_agree_with_every_order_tried() {
        let mut rng = SimRng::new(5);
        let mut linearizable = 0;
        for _ in 0..60_000 {
            let count = rng.range(2, 7);
            let mut stamps: Vec<u64> = (1..=count * 2).collect();
            for i in (1..stamps.len()).rev() {
                // Near their place: a history that is in order about half of the time.
                let j = i.saturating_sub(rng.below(3) as usize);
                stamps.swap(i, j);
            }
            let mut history = Vec::new();
            let mut value = None;
            for i in 0..count {
                let (a, b) = (stamps[i as usize * 2], stamps[i as usize * 2 + 1]);
                let any = Some(rng.below(count + 1)).filter(|v| *v > 0);
                let state = if rng.chance(850) { value } else { any };
                let action = if rng.chance(500) {
                    value = Some(i + 1);
                    Action::Swap { from: state, to: i + 1 }
                } else {
                    Action::Read(state)
                };
                let outcome = match rng.below(12) {
                    0 => Outcome::Unknown,
                    1 if matches!(action, Action::Swap { .. }) => Outcome::Failed,
                    _ => Outcome::Done(a.max(b)),
                };
                history.push(op(action, a.min(b), outcome));
            }
            let expect = brute_force(&history);
            linearizable += u64::from(expect);
            assert_eq!(check(&history).is_ok(), expect, "{history:#?}\n{:?}", check(&history));
        }
        assert!((6_000..54_000).contains(&linearizable), "both answers are common: linearizable={linearizable}");
    }

    #[test]
    fn two_successes_over_one_value_and_a_stale_read_are_found() {
        assert!(check(&[swap(None, 1, 1, 2), swap(Some(1), 2, 3, 4), read(Some(2), 5, 6)]).is_ok());
        assert!(check(&[swap(None, 1, 1, 2), swap(Some(1), 2, 3, 6), swap(Some(1), 3, 4, 5)]).is_err());
        assert!(check(&[swap(None, 1, 1, 2), swap(Some(1), 2, 3, 4), read(Some(1), 5, 6)]).is_err());
        // An unknown change that was seen and is gone again.
        let unknown = op(Action::Swap { from: None, to: 1 }, 1, Outcome::Unknown);
        assert!(check(&[unknown, read(Some(1), 2, 3), read(Some(1), 4, 5)]).is_ok());
        assert!(check(&[unknown, read(Some(1), 2, 3), read(None, 4, 5)]).is_err());
    }
}
