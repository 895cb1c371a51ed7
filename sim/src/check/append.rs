//! Decides whether a history of transactions over lists is strictly serializable.
//!
//! # Method
//! A transaction reads whole lists and appends values that are written once, so every list that was read tells the order
//! of all appends before it. From that follow the edges between transactions: who appended next (ww), who read what
//! whom appended (wr), who read before whom appended (rw), and who ended before whom began (real time). The history is
//! strictly serializable exactly when there is no cycle. Real time goes over a chain of returns, so there are O(n) edges.
//! # Unknown
//! A transaction without an answer happened if one of its values was seen; else it is left out, and its reads say nothing.
//! # Sources
//! Kingsbury and Alvaro, Elle: Inferring Isolation Anomalies from Experimental Observations, VLDB 14 (2020)

use std::collections::BTreeMap;

use super::{Outcome, Stamp};

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Micro {
    /// Appended a value that no other step appends.
    Append(u64, u64),
    /// Read a list; nothing is known of it while the transaction has no answer.
    Read(u64, Option<Vec<u64>>),
}

/// One transaction.
#[derive(Clone, Debug)]
pub struct Transaction {
    /// Its steps, in order.
    pub steps: Vec<Micro>,
    /// When it was called.
    pub invoked: Stamp,
    /// How it ended.
    pub outcome: Outcome,
}

/// Checks a history.
///
/// # Errors
/// The first violation found: lists that cannot be, or a cycle of transactions.
pub fn check(history: &[Transaction]) -> Result<(), String> {
    let lists = longest(history)?;
    let graph = Graph::of(history, &lists)?;
    match graph.cycle() {
        None => Ok(()),
        Some(cycle) => {
            let names: Vec<_> = cycle.iter().take(8).map(|t| format!("{:?}", history[*t])).collect();
            Err(format!("a cycle of {} transactions: {}", cycle.len(), names.join(" then ")))
        }
    }
}

/// The longest list seen under each key; every other one is a prefix of it.
fn longest(history: &[Transaction]) -> Result<BTreeMap<u64, Vec<u64>>, String> {
    let mut lists: BTreeMap<u64, &Vec<u64>> = BTreeMap::new();
    let reads = || {
        history.iter().filter(|t| matches!(t.outcome, Outcome::Done(_))).flat_map(|t| &t.steps).filter_map(|step| {
            match step {
                Micro::Read(key, Some(list)) => Some((*key, list)),
                Micro::Read(..) | Micro::Append(..) => None,
            }
        })
    };
    for (key, list) in reads() {
        let best = lists.entry(key).or_insert(list);
        if list.len() > best.len() {
            *best = list;
        }
    }
    for (key, list) in reads() {
        if !lists[&key].starts_with(list) {
            return Err(format!("list {key} was read as {list:?} and as {:?}", lists[&key]));
        }
    }
    Ok(lists.into_iter().map(|(key, list)| (key, list.clone())).collect())
}

/// Edges from a transaction to those that come after it. Behind the transactions come the instants of returns.
struct Graph {
    edges: Vec<Vec<usize>>,
    transactions: usize,
}

impl Graph {
    fn of(history: &[Transaction], lists: &BTreeMap<u64, Vec<u64>>) -> Result<Self, String> {
        let mut writer: BTreeMap<(u64, u64), usize> = BTreeMap::new();
        for (t, transaction) in history.iter().enumerate() {
            for step in &transaction.steps {
                if let Micro::Append(key, value) = step
                    && writer.insert((*key, *value), t).is_some()
                {
                    return Err(format!("the value {value} was appended twice: the history cannot be judged"));
                }
            }
        }
        let mut seen = vec![false; history.len()];
        for (key, list) in lists {
            for (i, value) in list.iter().enumerate() {
                let Some(t) = writer.get(&(*key, *value)) else {
                    return Err(format!("list {key} holds {value}, which nobody appended"));
                };
                if history[*t].outcome == Outcome::Failed {
                    return Err(format!("list {key} holds {value}, whose transaction was refused"));
                }
                if list[..i].contains(value) {
                    return Err(format!("list {key} holds {value} twice"));
                }
                seen[*t] = true;
            }
        }
        let counts = |t: usize| matches!(history[t].outcome, Outcome::Done(_)) || seen[t];
        let mut graph = Self { edges: vec![Vec::new(); history.len()], transactions: history.len() };
        // Certain appends that no list shows come after all that one shows.
        let mut unseen: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for ((key, value), t) in &writer {
            if counts(*t) && !lists.get(key).is_some_and(|list| list.contains(value)) {
                unseen.entry(*key).or_default().push(*t);
            }
        }
        for (key, list) in lists {
            for pair in list.windows(2) {
                graph.edge(writer[&(*key, pair[0])], writer[&(*key, pair[1])]);
            }
            if let Some(last) = list.last() {
                for t in unseen.get(key).into_iter().flatten() {
                    graph.edge(writer[&(*key, *last)], *t);
                }
            }
        }
        for (t, transaction) in history.iter().enumerate() {
            if matches!(transaction.outcome, Outcome::Done(_)) {
                graph.reads(t, transaction, &writer, lists, &unseen)?;
            }
        }
        graph.real_time(history, &counts);
        Ok(graph)
    }

    fn edge(&mut self, from: usize, to: usize) {
        if from != to {
            self.edges[from].push(to);
        }
    }

    /// The edges that a transaction's reads give.
    fn reads(
        &mut self,
        t: usize,
        transaction: &Transaction,
        writer: &BTreeMap<(u64, u64), usize>,
        lists: &BTreeMap<u64, Vec<u64>>,
        unseen: &BTreeMap<u64, Vec<usize>>,
    ) -> Result<(), String> {
        let mut own: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for step in &transaction.steps {
            let (key, list) = match step {
                Micro::Append(key, value) => {
                    own.entry(*key).or_default().push(*value);
                    continue;
                }
                Micro::Read(key, Some(list)) => (key, list),
                Micro::Read(_, None) => continue,
            };
            let mine = own.get(key).map_or(&[][..], Vec::as_slice);
            if !list.ends_with(mine) {
                return Err(format!("a transaction does not see its own appends {mine:?} in list {key}: {list:?}"));
            }
            let before = &list[..list.len() - mine.len()];
            if let Some(last) = before.last() {
                if writer[&(*key, *last)] == t {
                    return Err(format!("a transaction sees its append {last} to list {key} before it was made"));
                }
                self.edge(writer[&(*key, *last)], t);
            }
            match lists[key].get(list.len()) {
                Some(next) => self.edge(t, writer[&(*key, *next)]),
                None => {
                    for later in unseen.get(key).into_iter().flatten() {
                        self.edge(t, *later);
                    }
                }
            }
        }
        Ok(())
    }

    /// Who ended before whom began, over a chain of the instants of returns.
    fn real_time(&mut self, history: &[Transaction], counts: &dyn Fn(usize) -> bool) {
        let mut returns: Vec<(Stamp, usize)> = history
            .iter()
            .enumerate()
            .filter_map(|(t, transaction)| match transaction.outcome {
                Outcome::Done(at) => Some((at, t)),
                Outcome::Failed | Outcome::Unknown => None,
            })
            .collect();
        returns.sort_unstable();
        let first = self.edges.len();
        self.edges.resize(first + returns.len(), Vec::new());
        for (i, (_, t)) in returns.iter().enumerate() {
            self.edges[*t].push(first + i);
            if i > 0 {
                self.edges[first + i - 1].push(first + i);
            }
        }
        for (t, transaction) in history.iter().enumerate().filter(|(t, _)| counts(*t)) {
            let before = returns.partition_point(|(at, _)| *at < transaction.invoked);
            if before > 0 {
                self.edges[first + before - 1].push(t);
            }
        }
    }

    /// The transactions of some cycle.
    fn cycle(&self) -> Option<Vec<usize>> {
        let mut done = vec![false; self.edges.len()];
        let mut on_path = vec![false; self.edges.len()];
        for root in 0..self.edges.len() {
            let mut path = vec![(root, 0)];
            while let Some((node, next)) = path.pop() {
                if next == 0 {
                    if done[node] {
                        continue;
                    }
                    on_path[node] = true;
                }
                let Some(to) = self.edges[node].get(next) else {
                    on_path[node] = false;
                    done[node] = true;
                    continue;
                };
                path.push((node, next + 1));
                if on_path[*to] {
                    let from = path.iter().position(|(n, _)| n == to).unwrap_or(0);
                    return Some(path[from..].iter().map(|(n, _)| *n).filter(|n| *n < self.transactions).collect());
                }
                if !done[*to] {
                    path.push((*to, 0));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rt::SimRng;

    /// Tries every order of the transactions that happened, with every choice of the unknown ones.
    fn brute_force(history: &[Transaction]) -> bool {
        fn place(left: &mut Vec<&Transaction>, state: &mut BTreeMap<u64, Vec<u64>>) -> bool {
            if left.iter().all(|t| t.outcome == Outcome::Unknown) {
                return true;
            }
            (0..left.len()).any(|i| {
                let next = left[i];
                if left.iter().any(|t| matches!(t.outcome, Outcome::Done(at) if at < next.invoked)) {
                    return false;
                }
                let before = state.clone();
                let certain = matches!(next.outcome, Outcome::Done(_));
                let fits = next.steps.iter().all(|step| match step {
                    Micro::Append(key, value) => {
                        state.entry(*key).or_default().push(*value);
                        true
                    }
                    Micro::Read(key, Some(list)) => !certain || state.get(key).map_or(&[][..], Vec::as_slice) == list,
                    Micro::Read(_, None) => true,
                });
                if fits {
                    left.remove(i);
                    if place(left, state) {
                        return true;
                    }
                    left.insert(i, next);
                }
                *state = before;
                false
            })
        }
        let mut left: Vec<&Transaction> = history.iter().filter(|t| t.outcome != Outcome::Failed).collect();
        place(&mut left, &mut BTreeMap::new())
    }

    /// On 20,000 small histories, many of them wrong, cycles and a search over all orders agree.
    #[test]
    fn cycles_agree_with_every_order_tried() {
        let mut rng = SimRng::new(9);
        let mut right = 0;
        for _ in 0..20_000 {
            let count = rng.range(2, 6);
            let mut stamps: Vec<u64> = (1..=count * 2).collect();
            for i in (1..stamps.len()).rev() {
                stamps.swap(i, i.saturating_sub(rng.below(4) as usize));
            }
            let mut state: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
            let mut history = Vec::new();
            let mut value = 0;
            for t in 0..count as usize {
                let outcome = match rng.below(10) {
                    0 => Outcome::Unknown,
                    1 => Outcome::Failed,
                    _ => Outcome::Done(stamps[t * 2].max(stamps[t * 2 + 1])),
                };
                let takes_effect = outcome != Outcome::Failed && (outcome != Outcome::Unknown || rng.chance(500));
                let mut after = state.clone();
                let mut steps = Vec::new();
                for _ in 0..rng.range(1, 4) {
                    let key = rng.below(2);
                    if rng.chance(500) {
                        value += 1;
                        after.entry(key).or_default().push(value);
                        steps.push(Micro::Append(key, value));
                    } else {
                        let mut list = after.get(&key).cloned().unwrap_or_default();
                        if rng.chance(100) {
                            list.pop();
                        }
                        steps.push(Micro::Read(key, Some(list).filter(|_| outcome != Outcome::Unknown)));
                    }
                }
                if takes_effect {
                    state = after;
                }
                history.push(Transaction { steps, invoked: stamps[t * 2].min(stamps[t * 2 + 1]), outcome });
            }
            let expect = brute_force(&history);
            right += u64::from(expect);
            assert_eq!(check(&history).is_ok(), expect, "{history:#?}\n{:?}", check(&history));
        }
        assert!((3_000..18_000).contains(&right), "both answers are common: right={right}");
    }

    fn done(steps: Vec<Micro>, invoked: Stamp, returned: Stamp) -> Transaction {
        Transaction { steps, invoked, outcome: Outcome::Done(returned) }
    }

    #[test]
    fn write_skew_and_a_lost_append_are_found() {
        let skew = [
            done(vec![Micro::Read(1, Some(vec![])), Micro::Append(2, 1)], 1, 10),
            done(vec![Micro::Read(2, Some(vec![])), Micro::Append(1, 2)], 2, 9),
            done(vec![Micro::Read(1, Some(vec![2])), Micro::Read(2, Some(vec![1]))], 11, 12),
        ];
        assert!(check(&skew).is_err());
        let lost = [done(vec![Micro::Append(1, 1)], 1, 2), done(vec![Micro::Read(1, Some(vec![]))], 3, 4)];
        assert!(check(&lost).is_err());
        let concurrent = [done(vec![Micro::Append(1, 1)], 1, 5), done(vec![Micro::Read(1, Some(vec![]))], 3, 4)];
        assert_eq!(check(&concurrent), Ok(()));
    }

    #[test]
    fn a_long_history_is_judged_at_once() {
        let mut list = Vec::new();
        let mut history = Vec::new();
        for i in 0..3_000 {
            list.push(i);
            let steps = vec![Micro::Append(i / 100, i), Micro::Read(i / 100, Some(list.clone()))];
            history.push(done(steps, i * 2 + 1, i * 2 + 2));
            if i % 100 == 99 {
                list.clear();
            }
        }
        assert_eq!(check(&history), Ok(()));
        history.push(done(vec![Micro::Read(3, Some((300..350).collect()))], 10_000, 10_001));
        assert!(check(&history).is_err());
    }
}
