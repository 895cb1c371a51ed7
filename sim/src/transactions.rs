//! The application of every seed: compare-and-set on registers, and transactions that read and append to lists.
//!
//! Both are decided by a state machine on every replica, so that what an embedder builds on is checked: commands in the
//! order of the log, once each, with answers that fit.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use mainstay_engine::{Apply, Error, ErrorKind, KeyspaceId, Result, Snapshot, StateMachine};
use mainstay_replication::ReadLevel;

use crate::application::{Answer, Application, Session, Step};
use crate::check::append::{self, Micro, Transaction};
use crate::check::chain::{self, Action, Operation};
use crate::check::{Outcome, Stamp};

const KEYSPACE: &str = "transactions";
/// Registers that are compared and set.
const REGISTERS: u64 = 4;
/// Lists in use at a time; later ones take their place, so that none grows without end.
const LISTS: u64 = 4;
/// Numbers drawn from [`Session::unique`] before the next lists are used.
const LISTS_EVERY: u64 = 400;

const SWAP: u8 = 1;
const TRANSACT: u8 = 2;

fn register(key: u64) -> Bytes {
    Bytes::from(format!("register-{key}"))
}

fn list(key: u64) -> Bytes {
    Bytes::from(format!("list-{key:06}"))
}

/// A compare-and-set as it lies in the log.
fn encode_swap(key: u64, from: Option<u64>, to: u64) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(SWAP);
    out.put_u64_le(key);
    out.put_u64_le(from.unwrap_or(0));
    out.put_u64_le(to);
    out.freeze()
}

fn encode_steps(steps: &[Micro]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(TRANSACT);
    for step in steps {
        let (kind, key, value) = match step {
            Micro::Append(key, value) => (1, *key, *value),
            Micro::Read(key, _) => (0, *key, 0),
        };
        out.put_u8(kind);
        out.put_u64_le(key);
        out.put_u64_le(value);
    }
    out.freeze()
}

/// The numbers in a row of little-endian words.
fn numbers(bytes: &[u8]) -> Result<Vec<u64>> {
    let (words, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(Error::new(ErrorKind::Corrupt, format!("no row of numbers bytes={}", bytes.len())));
    }
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// A register's value; zero stands for none.
fn value_of(bytes: Option<&Bytes>) -> Result<Option<u64>> {
    let words = bytes.map_or(Ok(Vec::new()), |bytes| numbers(bytes))?;
    Ok(words.first().copied().filter(|v| *v > 0))
}

struct Machine;

impl StateMachine for Machine {
    fn apply<'a>(&'a self, apply: &'a mut Apply, command: Bytes) -> Step<'a, Result<Bytes>> {
        Box::pin(async move {
            let keyspace = apply.keyspace(KEYSPACE)?;
            let invalid = || Error::new(ErrorKind::Invalid, "not a command of this state machine");
            let (kind, rest) = command.split_first().ok_or_else(invalid)?;
            match *kind {
                SWAP => {
                    let &[key, from, to] = numbers(rest)?.as_slice() else { return Err(invalid()) };
                    swap(apply, keyspace, key, Some(from).filter(|v| *v > 0), to).await
                }
                TRANSACT => transact(apply, keyspace, rest).await,
                _ => Err(invalid()),
            }
        })
    }
}

/// Answers what the register held.
async fn swap(apply: &mut Apply, keyspace: KeyspaceId, key: u64, from: Option<u64>, to: u64) -> Result<Bytes> {
    let held = value_of(apply.get(keyspace, &register(key)).await?.as_ref())?;
    if held == from {
        apply.put(keyspace, register(key), to.to_le_bytes().to_vec())?;
    }
    Ok(Bytes::copy_from_slice(&held.unwrap_or(0).to_le_bytes()))
}

/// Answers the lists that were read, each with its length before it.
async fn transact(apply: &mut Apply, keyspace: KeyspaceId, steps: &[u8]) -> Result<Bytes> {
    let mut answer = BytesMut::new();
    for step in steps.as_chunks::<17>().0 {
        let (kind, words) = (step[0], numbers(&step[1..])?);
        let (key, value) = (list(words[0]), words[1]);
        let held = apply.get(keyspace, &key).await?.unwrap_or_default();
        if kind == 0 {
            answer.put_u64_le(held.len() as u64 / 8);
            answer.put_slice(&held);
        } else {
            let mut longer = BytesMut::from(&held[..]);
            longer.put_u64_le(value);
            apply.put(keyspace, key, longer.freeze())?;
        }
    }
    Ok(answer.freeze())
}

/// The lists in an answer, one for each read.
fn decode_lists(answer: &[u8]) -> Result<Vec<Vec<u64>>> {
    let words = numbers(answer)?;
    let (mut lists, mut at) = (Vec::new(), 0);
    while let Some(length) = words.get(at) {
        let end = at + 1 + *length as usize;
        let list = words.get(at + 1..end).ok_or_else(|| Error::new(ErrorKind::Corrupt, "a list that is cut short"))?;
        lists.push(list.to_vec());
        at = end;
    }
    Ok(lists)
}

#[derive(Default)]
struct History {
    swaps: Vec<Operation>,
    transactions: Vec<Transaction>,
    /// The register's value that a client saw last: what it compares with.
    held: std::collections::BTreeMap<u64, Option<u64>>,
    /// Lists up to this one were used.
    lists: u64,
    /// Answers that no state machine of ours gives.
    problems: Vec<String>,
}

/// See the head of the file.
#[derive(Default)]
pub struct Transactions(Mutex<History>);

impl Transactions {
    /// With an empty history.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn history<T>(&self, with: impl FnOnce(&mut History) -> T) -> T {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn compare_and_set(&self, session: &mut Session) {
        let key = session.below(REGISTERS);
        let from = self.history(|h| h.held.get(&key).copied().flatten());
        let (to, invoked) = (session.unique(), session.stamp());
        let answer = session.propose(encode_swap(key, from, to)).await;
        let (action, outcome) = match answer {
            Answer::Done(_, held) => {
                let held = self.decoded(value_of(Some(&held)));
                let done = Outcome::Done(session.stamp());
                session.count("swaps");
                let action = if held == from { Action::Swap { from, to } } else { Action::Read(held) };
                let now = if held == from { Some(to) } else { held };
                self.history(|h| h.held.insert(key, now));
                (action, done)
            }
            Answer::Failed | Answer::Refused(_) => (Action::Swap { from, to }, Outcome::Failed),
            Answer::Unknown => (Action::Swap { from, to }, Outcome::Unknown),
        };
        self.history(|h| h.swaps.push(Operation { key, action, invoked, outcome }));
    }

    async fn read_register(&self, session: &mut Session) {
        let key = session.below(REGISTERS);
        let level = if session.below(4) == 0 { ReadLevel::Lease } else { ReadLevel::Linearizable };
        let invoked = session.stamp();
        let Some(held) = session.read(level, move |view| Box::pin(read_key(view, register(key)))).await else { return };
        let returned = session.stamp();
        self.saw(key, held.as_ref(), invoked, returned);
    }

    fn saw(&self, key: u64, held: Option<&Bytes>, invoked: Stamp, returned: Stamp) {
        let value = self.decoded(value_of(held));
        self.history(|h| {
            h.held.insert(key, value);
            h.swaps.push(Operation { key, action: Action::Read(value), invoked, outcome: Outcome::Done(returned) });
        });
    }

    fn decoded<T: Default>(&self, result: Result<T>) -> T {
        result.unwrap_or_else(|e| {
            self.history(|h| h.problems.push(e.to_string()));
            T::default()
        })
    }

    async fn transact(&self, session: &mut Session) {
        let steps: Vec<Micro> = (0..=session.below(4))
            .map(|_| {
                let value = session.unique();
                let key = value / LISTS_EVERY * LISTS + session.below(LISTS);
                if session.below(2) == 0 { Micro::Append(key, value) } else { Micro::Read(key, None) }
            })
            .collect();
        let most = steps.iter().map(|step| match step {
            Micro::Append(key, _) | Micro::Read(key, _) => *key,
        });
        let most = most.max().unwrap_or(0);
        let invoked = session.stamp();
        let answer = session.propose(encode_steps(&steps)).await;
        let (steps, outcome) = match answer {
            Answer::Done(_, answer) => {
                let outcome = Outcome::Done(session.stamp());
                session.count("transactions");
                (self.filled(steps, &answer), outcome)
            }
            Answer::Failed | Answer::Refused(_) => (steps, Outcome::Failed),
            Answer::Unknown => (steps, Outcome::Unknown),
        };
        self.history(|h| {
            h.lists = h.lists.max(most + 1);
            h.transactions.push(Transaction { steps, invoked, outcome });
        });
    }

    /// The steps with the lists of an answer in the place of what was not known.
    fn filled(&self, steps: Vec<Micro>, answer: &[u8]) -> Vec<Micro> {
        let mut lists = self.decoded(decode_lists(answer)).into_iter();
        let filled = steps.into_iter().map(|step| match step {
            Micro::Read(key, _) => Micro::Read(key, lists.next()),
            append @ Micro::Append(..) => append,
        });
        filled.collect()
    }
}

async fn read_key(view: Snapshot, key: Bytes) -> Result<Option<Bytes>> {
    match view.keyspace(KEYSPACE) {
        Some(keyspace) => view.get(keyspace, &key).await,
        None => Ok(None),
    }
}

impl Application for Transactions {
    fn state_machine(&self) -> Arc<dyn StateMachine> {
        Arc::new(Machine)
    }

    fn step<'a>(&'a self, session: &'a mut Session) -> Step<'a, ()> {
        Box::pin(async move {
            match session.below(10) {
                0..3 => self.compare_and_set(session).await,
                3..6 => self.read_register(session).await,
                _ => self.transact(session).await,
            }
        })
    }

    fn look<'a>(&'a self, session: &'a mut Session) -> Step<'a, std::result::Result<(), String>> {
        Box::pin(async move {
            let lists = self.history(|h| h.lists);
            let invoked = session.stamp();
            let read = session.read(ReadLevel::Linearizable, move |view| {
                Box::pin(async move {
                    let (mut registers, mut held) = (Vec::new(), Vec::new());
                    for key in 0..REGISTERS {
                        registers.push(read_key(view.clone(), register(key)).await?);
                    }
                    for key in 0..lists {
                        held.push(read_key(view.clone(), list(key)).await?.unwrap_or_default());
                    }
                    Ok((registers, held))
                })
            });
            let Some((registers, held)) = read.await else { return Err("no answer to the last look".to_owned()) };
            let returned = session.stamp();
            for (key, value) in (0..).zip(&registers) {
                self.saw(key, value.as_ref(), invoked, returned);
            }
            let steps = (0..).zip(held).map(|(key, list)| Micro::Read(key, Some(self.decoded(numbers(&list)))));
            let transaction = Transaction { steps: steps.collect(), invoked, outcome: Outcome::Done(returned) };
            self.history(|h| h.transactions.push(transaction));
            // A moment, so that looks at different replicas are not one.
            session.pause(Duration::from_millis(1)).await;
            Ok(())
        })
    }

    fn judge(&self) -> std::result::Result<(), String> {
        self.history(|h| {
            if let Some(problem) = h.problems.first() {
                return Err(problem.clone());
            }
            chain::check(&h.swaps).map_err(|e| format!("compare-and-set is not linearizable: {e}"))?;
            append::check(&h.transactions).map_err(|e| format!("transactions are not serializable: {e}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_back_as_they_were_given() {
        let mut answer = BytesMut::new();
        for list in [&[][..], &[3, 4], &[5]] {
            answer.put_u64_le(list.len() as u64);
            list.iter().for_each(|v| answer.put_u64_le(*v));
        }
        assert_eq!(decode_lists(&answer).expect("whole"), [vec![], vec![3, 4], vec![5]]);
        assert!(decode_lists(&answer[..answer.len() - 8]).is_err());
        assert!(decode_lists(&answer[..answer.len() - 3]).is_err());
    }
}
