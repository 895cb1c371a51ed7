//! One operation on its way from the caller to the kernel, and its blocking execution.

use std::sync::Arc;

use crate::gate::{Gate, Ticket, closed};
use crate::{AlignedBuf, AlignedBytes, BoxFuture, Completer, Error, IoClass, Op, Result, WriteMode};

/// An admitted operation. It owns its buffers until it is complete.
pub(crate) struct Request {
    pub(crate) ticket: Ticket,
    pub(crate) class: IoClass,
    pub(crate) body: Body,
}

/// What to do, with the end that completes it.
pub(crate) enum Body {
    Read { offset: u64, buf: AlignedBuf, done: Completer<AlignedBuf> },
    Write { offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, done: Completer<()> },
    Flush { done: Completer<()> },
    Allocate { offset: u64, length: u64, done: Completer<()> },
    Discard { offset: u64, length: u64, done: Completer<()> },
}

/// Where admitted operations run.
pub(crate) trait Executor: Send + Sync + 'static {
    /// Takes over the operation.
    fn submit(&self, request: Request);

    /// Takes over reads of one class together.
    fn submit_reads(&self, requests: Vec<Request>);

    /// Runs `task` to its end, holding `ticket` meanwhile.
    fn resident(&self, name: &str, task: BoxFuture<()>, ticket: Ticket);

    /// Answers `Closed` for every operation of `gate` that has not ended, without freeing a buffer in flight.
    fn abandon(&self, gate: &Arc<Gate>);
}

impl Request {
    /// Runs it on the calling thread.
    pub(crate) fn run(self) {
        let Self { ticket, body, .. } = self;
        match body {
            Body::Read { offset, mut buf, done } => {
                let answer = ticket.file().read(offset, &mut buf);
                drop(ticket);
                done.complete(answer.map(|()| buf));
            }
            Body::Write { offset, bufs, mode, done } => {
                let answer = ticket.file().write(offset, &bufs, mode);
                let length = bufs.iter().map(|b| b.len() as u64).sum();
                drop(bufs);
                finish_write(ticket, offset, length, mode, answer, done);
            }
            Body::Flush { done } => {
                let answer = ticket.file().sync("flush", 0, 0);
                finish_flush(ticket, answer, done);
            }
            Body::Allocate { offset, length, done } => {
                let answer = ticket.file().allocate(offset, length);
                drop(ticket);
                done.complete(answer);
            }
            Body::Discard { offset, length, done } => {
                let answer = ticket.file().discard(offset, length);
                drop(ticket);
                done.complete(answer);
            }
        }
    }

    /// Completes it with `error`, by the rules of the operation: a durable write that fails poisons.
    pub(crate) fn fail(self, error: &Error) {
        let Self { ticket, body, .. } = self;
        match body {
            Body::Read { done, .. } => {
                drop(ticket);
                done.complete(Err(error.clone()));
            }
            Body::Write { offset, bufs, mode, done } => {
                let length = bufs.iter().map(|b| b.len() as u64).sum();
                finish_write(ticket, offset, length, mode, Err(error.clone()), done);
            }
            Body::Flush { done } => finish_flush(ticket, Err(error.clone()), done),
            Body::Allocate { done, .. } | Body::Discard { done, .. } => {
                drop(ticket);
                done.complete(Err(error.clone()));
            }
        }
    }

    /// Completes it as one that was never started since its device was shut down.
    pub(crate) fn refuse_closed(self) {
        let Self { ticket, body, .. } = self;
        drop(ticket);
        let error = closed("submit", 0, 0);
        match body {
            Body::Read { done, .. } => done.complete(Err(error)),
            Body::Write { done, .. }
            | Body::Flush { done }
            | Body::Allocate { done, .. }
            | Body::Discard { done, .. } => done.complete(Err(error)),
        }
    }
}

/// Ends a write: poison rule, release, completion, in this order.
pub(crate) fn finish_write(
    ticket: Ticket,
    offset: u64,
    length: u64,
    mode: WriteMode,
    answer: Result<()>,
    done: Completer<()>,
) {
    let answer = match mode {
        WriteMode::Durable => ticket.gate().settle("write", offset, length, answer),
        WriteMode::Cached => answer,
    };
    drop(ticket);
    done.complete(answer);
}

/// Ends a flush like a durable write.
pub(crate) fn finish_flush(ticket: Ticket, answer: Result<()>, done: Completer<()>) {
    let answer = ticket.gate().settle("flush", 0, 0, answer);
    drop(ticket);
    done.complete(answer);
}

/// Turns an admission that failed into an operation that is already complete.
pub(crate) fn refused<T>(error: Error) -> Op<T> {
    Op::ready(Err(error))
}
