//! The state of a simulated disk under its lock, and what each operation does to it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::device::Door;
use super::env::{SimRandom, decide, mix};
use super::image::{Block, Unsettled, torn};
use super::medium::Medium;
use super::{Faults, IoEvent, IoKind, Mishap, Outcome};
use crate::{AlignedBuf, BLOCK_BYTES, Completer, Error, ErrorKind, Result};

/// Events of a disk that [`super::SimDisk::trace`] keeps: the latest.
const TRACE_EVENTS_MAX: usize = 1 << 16;

pub(super) struct Core {
    pub(super) medium: Medium,
    pub(super) faults: Faults,
    /// Counts the lives of the node: handles of an earlier one are dead.
    pub(super) epoch: u64,
    pub(super) poison: Option<Error>,
    pub(super) flights: BTreeMap<u64, Flight>,
    pub(super) next_flight: u64,
    pub(super) fail_next: Vec<IoKind>,
    /// What becomes of the next write that begins in the range.
    pub(super) mishap: Option<(Mishap, Range<u64>)>,
    /// The file system was remounted read-only.
    pub(super) read_only: bool,
    pub(super) trace: VecDeque<IoEvent>,
    pub(super) events: u64,
    pub(super) hash: u64,
}

/// What was asked, without its buffers.
#[derive(Clone, Copy)]
pub(super) struct What {
    pub(super) op: &'static str,
    pub(super) kind: IoKind,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// An operation that the device has taken and not completed.
pub(super) struct Flight {
    pub(super) what: What,
    pub(super) action: Action,
    pub(super) door: Arc<Door>,
    pub(super) second_part: bool,
}

pub(super) enum Action {
    Read { buf: AlignedBuf, done: Completer<AlignedBuf> },
    Write { content: Vec<(u64, Block)>, done: Completer<()> },
    Flush { covers: u64, done: Completer<()> },
    Allocate { done: Completer<()> },
    Discard { done: Completer<()> },
}

/// What to tell the caller once the locks are released.
pub(super) enum Answer {
    Read(Completer<AlignedBuf>, Result<AlignedBuf>),
    Unit(Completer<()>, Result<()>),
}

impl Answer {
    pub(super) fn deliver(self) {
        match self {
            Answer::Read(done, result) => done.complete(result),
            Answer::Unit(done, result) => done.complete(result),
        }
    }
}

impl Core {
    /// Begins a new life on `medium`; what was in flight is returned and has to be ended.
    pub(super) fn restart(&mut self, medium: Medium) -> BTreeMap<u64, Flight> {
        self.medium = medium;
        self.epoch += 1;
        self.poison = None;
        std::mem::take(&mut self.flights)
    }

    pub(super) fn in_flight(&self) -> Vec<Unsettled> {
        let mut writes = Vec::new();
        for (id, flight) in &self.flights {
            if let Action::Write { content, .. } = &flight.action {
                writes.push(Unsettled { sequence: self.medium.sequence() + id, blocks: content.clone() });
            }
        }
        writes
    }

    pub(super) fn record(&mut self, what: What, outcome: Outcome) {
        let What { kind, offset, length, .. } = what;
        let event = IoEvent { sequence: self.events, kind, offset, length, outcome };
        self.events += 1;
        let (tag, detail) = match outcome {
            Outcome::Done => (0, 0),
            Outcome::Failed(kind) => (1, kind as u64),
            Outcome::Misdirected(to) => (2, to),
            Outcome::Phantom => (3, 0),
            Outcome::Rotten(at) => (4, at),
            Outcome::Short => (5, 0),
            Outcome::Torn => (6, 0),
        };
        self.hash = mix(self.hash ^ decide(event.kind as u64, &[event.offset, event.length, tag, detail]));
        if self.trace.len() == TRACE_EVENTS_MAX {
            self.trace.pop_front();
        }
        self.trace.push_back(event);
    }

    /// True when a planned failure or the rate says that this operation fails.
    fn fails(&mut self, kind: IoKind, random: &SimRandom) -> bool {
        if let Some(position) = self.fail_next.iter().position(|k| *k == kind) {
            self.fail_next.remove(position);
            return true;
        }
        let rate = match kind {
            IoKind::Read => self.faults.read_error,
            IoKind::CachedWrite | IoKind::DurableWrite => self.faults.write_error,
            IoKind::Flush => self.faults.flush_error,
            IoKind::Allocate | IoKind::Discard => 0,
        };
        random.chance(rate)
    }

    fn execute_write(&mut self, what: What, content: &[(u64, Block)], random: &SimRandom) -> (Outcome, Result<()>) {
        let durable = what.kind == IoKind::DurableWrite && !random.chance(self.faults.lost_flush);
        if !self.medium.reserve(what.offset, what.length) {
            return (Outcome::Failed(ErrorKind::OutOfSpace), Err(full("write", what.offset, what.length)));
        }
        if self.fails(what.kind, random) {
            let seed = random.number();
            let landed: Vec<_> =
                content.iter().filter(|(index, _)| decide(seed, &[*index]).is_multiple_of(2)).cloned().collect();
            self.medium.write(&landed);
            return (Outcome::Failed(ErrorKind::Media), Err(broken("write", what.offset, what.length)));
        }
        let planned = self.mishap.take_if(|(_, range)| range.contains(&what.offset)).map(|(mishap, _)| mishap);
        let drawn = || {
            if random.chance(self.faults.phantom_write) {
                Some(Mishap::Lost)
            } else {
                random.chance(self.faults.misdirected_write).then_some(Mishap::Misdirected)
            }
        };
        let outcome = match planned.or_else(drawn) {
            Some(Mishap::Lost) => Outcome::Phantom,
            Some(Mishap::Misdirected) => {
                // Somewhere among the data that is already there, where it does harm, and not where it belongs.
                let own = what.offset / BLOCK_BYTES as u64;
                let last = self.medium.written(0, self.medium.capacity()).next_back().unwrap_or(0);
                let room = self.medium.capacity().saturating_sub(what.length);
                let drawn = random.below(last / BLOCK_BYTES as u64 + 1).min(room / BLOCK_BYTES as u64);
                let first = if drawn == own { own.checked_sub(1).unwrap_or(own + 1) } else { drawn };
                let moved: Vec<_> = (first..).zip(content).map(|(index, (_, block))| (index, block.clone())).collect();
                self.land(durable, &moved);
                Outcome::Misdirected(first * BLOCK_BYTES as u64)
            }
            Some(Mishap::Torn) => {
                let part = torn(content, |index| self.medium.block(index), random.number());
                self.land(durable, &part);
                Outcome::Torn
            }
            None => {
                self.land(durable, content);
                Outcome::Done
            }
        };
        (outcome, Ok(()))
    }

    fn land(&mut self, durable: bool, content: &[(u64, Block)]) {
        if durable {
            self.medium.write_durable(content);
        } else {
            self.medium.write(content);
        }
    }

    fn execute_read(&mut self, what: What, buf: &mut AlignedBuf, random: &SimRandom) -> (Outcome, Result<()>) {
        let mut outcome = Outcome::Done;
        if random.chance(self.faults.bit_rot) {
            let written: Vec<_> = self.medium.written(what.offset, what.length).collect();
            if !written.is_empty() {
                let block = written[random.below(written.len() as u64) as usize];
                let at = block + random.below(BLOCK_BYTES as u64);
                self.medium.flip_bit(at, random.below(8) as u8);
                outcome = Outcome::Rotten(at);
            }
        }
        if self.fails(IoKind::Read, random) || !self.medium.read(what.offset, buf) {
            return (Outcome::Failed(ErrorKind::Media), Err(broken("read", what.offset, what.length)));
        }
        (outcome, Ok(()))
    }

    /// What everything but a read answers while the disk is read-only.
    fn refuse(&mut self, what: What, action: Action) -> (Outcome, Answer) {
        let error = Error::new(ErrorKind::Os, what.op, what.offset, what.length, "simulated read-only file system");
        let outcome = Outcome::Failed(ErrorKind::Os);
        let answer = match action {
            Action::Read { buf, done } => Answer::Read(done, Ok(buf)),
            Action::Write { done, .. } if what.kind == IoKind::DurableWrite => {
                Answer::Unit(done, self.settle(what, Err(error)))
            }
            Action::Flush { done, .. } => Answer::Unit(done, self.settle(what, Err(error))),
            Action::Write { done, .. } | Action::Allocate { done } | Action::Discard { done } => {
                Answer::Unit(done, Err(error))
            }
        };
        (outcome, answer)
    }

    /// Does what the operation asks, under the lock; the answer is given after it.
    pub(super) fn execute(&mut self, what: What, action: Action, random: &SimRandom) -> Answer {
        if self.read_only && what.kind != IoKind::Read {
            let (outcome, answer) = self.refuse(what, action);
            self.record(what, outcome);
            return answer;
        }
        let (outcome, answer) = match action {
            Action::Read { mut buf, done } => {
                let (outcome, result) = self.execute_read(what, &mut buf, random);
                (outcome, Answer::Read(done, result.map(|()| buf)))
            }
            Action::Write { content, done } => {
                let (outcome, result) = self.execute_write(what, &content, random);
                let durable = what.kind == IoKind::DurableWrite;
                (outcome, Answer::Unit(done, if durable { self.settle(what, result) } else { result }))
            }
            Action::Flush { covers, done } => {
                let (outcome, result) = if self.fails(IoKind::Flush, random) {
                    (Outcome::Failed(ErrorKind::Media), Err(broken("flush", 0, 0)))
                } else if random.chance(self.faults.lost_flush) {
                    (Outcome::Phantom, Ok(()))
                } else {
                    self.medium.flush(covers);
                    (Outcome::Done, Ok(()))
                };
                (outcome, Answer::Unit(done, self.settle(what, result)))
            }
            Action::Allocate { done } => {
                if self.medium.reserve(what.offset, what.length) {
                    (Outcome::Done, Answer::Unit(done, Ok(())))
                } else {
                    let error = full("allocate", what.offset, what.length);
                    (Outcome::Failed(ErrorKind::OutOfSpace), Answer::Unit(done, Err(error)))
                }
            }
            Action::Discard { done } => {
                self.medium.discard(what.offset, what.length, random.below(2) == 0);
                (Outcome::Done, Answer::Unit(done, Ok(())))
            }
        };
        self.record(what, outcome);
        answer
    }

    /// The poison rule of [`BlockDevice`].
    fn settle(&mut self, what: What, result: Result<()>) -> Result<()> {
        match (result, &self.poison) {
            (Err(e), _) => {
                if e.kind() != ErrorKind::OutOfSpace && self.poison.is_none() {
                    self.poison = Some(e.clone());
                }
                Err(e)
            }
            (Ok(()), Some(cause)) => Err(cause.poisoned(what.op, what.offset, what.length)),
            (Ok(()), None) => Ok(()),
        }
    }
}

fn broken(op: &'static str, offset: u64, length: u64) -> Error {
    Error::new(ErrorKind::Media, op, offset, length, "simulated input/output error")
}

pub(super) fn full(op: &'static str, offset: u64, length: u64) -> Error {
    Error::new(ErrorKind::OutOfSpace, op, offset, length, "the simulated disk is full")
}
