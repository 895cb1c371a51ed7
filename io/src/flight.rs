//! An operation while the kernel has its buffers: the entry to submit, and what a completion means.
//!
//! # Crash
//! A durable write is one write with RWF_DSYNC: through a ring that is one write and one flush on files and on raw
//! devices alike. Longer than one transfer, it is written in parts and flushed once.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use crate::file::gather;
use crate::gate::{Gate, Ticket, closed};
use crate::request::{Body, Request, finish_flush, finish_write};
use crate::transfer::{IO_BYTES_MAX, STALLS_MAX, Step, Transfer, VECTORS_MAX};
use crate::{AlignedBuf, AlignedBytes, Completer, Error, IoClass, Result, WriteMode};

/// What a completion leads to.
pub(crate) enum Progress {
    /// Submit the rest.
    Again,
    /// The answer to the caller.
    Done(Result<()>),
}

/// An operation in flight.
pub(crate) struct Flight {
    pub(crate) class: IoClass,
    ticket: Ticket,
    job: Job,
    /// Stays in place until the completion.
    vectors: Vec<libc::iovec>,
    stalled: bool,
}

// SAFETY: the addresses in `vectors` point into the buffers of `job`, which the flight owns wherever it goes.
unsafe impl Send for Flight {}

enum Job {
    Read { transfer: Transfer, buf: AlignedBuf, done: Option<Completer<AlignedBuf>> },
    Write { transfer: Transfer, bufs: Vec<AlignedBytes>, mode: WriteMode, phase: Phase, done: Option<Completer<()>> },
    Flush { stalls: u32, done: Option<Completer<()>> },
}

/// Where a write is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Transferring; `true` with RWF_DSYNC on every part.
    Transfer(bool),
    /// Written in parts; the flush that makes them durable, and how often it was interrupted.
    Flush(u32),
}

impl Flight {
    /// Prepares `request`, or gives back how to complete one that has nothing to transfer.
    pub(crate) fn new(request: Request) -> std::result::Result<Self, impl FnOnce()> {
        let Request { ticket, class, body } = request;
        let empty = match &body {
            Body::Read { buf, .. } => buf.is_empty(),
            Body::Write { bufs, .. } => bufs.iter().all(|b| b.is_empty()),
            Body::Flush { .. } => false,
            Body::Allocate { .. } | Body::Discard { .. } => true,
        };
        if empty {
            return Err(move || Request { ticket, class, body }.run());
        }
        let job = match body {
            Body::Read { offset, buf, done } => {
                let transfer = Transfer::read(offset, buf.len() as u64, !ticket.file().is_raw());
                Job::Read { transfer, buf, done: Some(done) }
            }
            Body::Write { offset, bufs, mode, done } => {
                let length = bufs.iter().map(|b| b.len() as u64).sum();
                let single = length <= IO_BYTES_MAX && bufs.len() <= VECTORS_MAX && ticket.file().has_dsync();
                let phase = Phase::Transfer(mode == WriteMode::Durable && single);
                Job::Write { transfer: Transfer::write(offset, length), bufs, mode, phase, done: Some(done) }
            }
            Body::Flush { done } => Job::Flush { stalls: 0, done: Some(done) },
            Body::Allocate { .. } | Body::Discard { .. } => unreachable!("the helpers run these"),
        };
        Ok(Self { class, ticket, job, vectors: Vec::new(), stalled: false })
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        self.ticket.gate()
    }

    /// The entry for what is left to do.
    pub(crate) fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.ticket.file().raw_fd());
        let entry =
            match &mut self.job {
                Job::Read { transfer, buf, .. } => {
                    let (at, bytes) = transfer.next();
                    // The transfer never passes the end of the buffer that it was made for.
                    let to = buf.as_ptr().wrapping_add(transfer.done() as usize);
                    opcode::Read::new(fd, to, bytes as u32).offset(at).build()
                }
                Job::Write { transfer, bufs, phase: Phase::Transfer(dsync), .. } => {
                    let (at, bytes) = transfer.next();
                    let (slices, bytes) = gather(bufs, transfer.done(), bytes);
                    let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                    if let [slice] = slices[..] {
                        opcode::Write::new(fd, slice.as_ptr(), bytes as u32).offset(at).rw_flags(flags).build()
                    } else {
                        self.vectors.clear();
                        self.vectors.extend(slices.iter().map(|slice| libc::iovec {
                            iov_base: slice.as_ptr().cast_mut().cast(),
                            iov_len: slice.len(),
                        }));
                        let count = self.vectors.len() as u32;
                        opcode::Writev::new(fd, self.vectors.as_ptr(), count).offset(at).rw_flags(flags).build()
                    }
                }
                Job::Write { phase: Phase::Flush(_), .. } | Job::Flush { .. } => {
                    opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
                }
            };
        // What made no progress at once is left to a worker of the kernel, which may block.
        if self.stalled { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }

    /// Takes the result of the entry.
    pub(crate) fn advance(&mut self, result: i32) -> Progress {
        self.stalled = false;
        let answer = if result >= 0 { Ok(result as u64) } else { Err(result.wrapping_neg()) };
        match &mut self.job {
            Job::Read { transfer, buf, .. } => match transfer.advance(answer) {
                Step::Complete => Progress::Done(Ok(())),
                Step::EndOfFile => {
                    buf[transfer.done() as usize..].fill(0);
                    Progress::Done(Ok(()))
                }
                Step::Again { stalled } => {
                    self.stalled = stalled;
                    Progress::Again
                }
                Step::Fail(errno) => {
                    Progress::Done(Err(Error::os("read", transfer.offset(), transfer.length(), errno)))
                }
            },
            Job::Write { transfer, mode, phase, .. } => {
                let (offset, length) = (transfer.offset(), transfer.length());
                match *phase {
                    Phase::Transfer(true) if answer == Err(libc::EOPNOTSUPP) => {
                        self.ticket.file().lose_dsync();
                        *phase = Phase::Transfer(false);
                        Progress::Again
                    }
                    Phase::Transfer(dsync) => match transfer.advance(answer) {
                        Step::Complete if *mode == WriteMode::Durable && !dsync => {
                            *phase = Phase::Flush(0);
                            Progress::Again
                        }
                        Step::Complete => Progress::Done(Ok(())),
                        Step::Again { stalled } => {
                            self.stalled = stalled;
                            Progress::Again
                        }
                        Step::EndOfFile => Progress::Done(Err(Error::os("write", offset, length, libc::EIO))),
                        Step::Fail(errno) => Progress::Done(Err(Error::os("write", offset, length, errno))),
                    },
                    Phase::Flush(ref mut stalls) => flushed("write", offset, length, answer, stalls),
                }
            }
            Job::Flush { stalls, .. } => flushed("flush", 0, 0, answer, stalls),
        }
    }

    /// Gives the answer to the caller and lets go of everything.
    pub(crate) fn finish(self, answer: Result<()>) {
        let Self { ticket, job, .. } = self;
        match job {
            Job::Read { buf, done, .. } => {
                drop(ticket);
                if let Some(done) = done {
                    done.complete(answer.map(|()| buf));
                }
            }
            Job::Write { transfer, bufs, mode, done, .. } => {
                drop(bufs);
                let done = done.unwrap_or_else(nobody);
                finish_write(ticket, transfer.offset(), transfer.length(), mode, answer, done);
            }
            Job::Flush { done, .. } => finish_flush(ticket, answer, done.unwrap_or_else(nobody)),
        }
    }

    /// Answers `Closed` to whoever waits, and keeps the buffers.
    pub(crate) fn abandon(&mut self) {
        match &mut self.job {
            Job::Read { done, transfer, .. } => {
                let error = closed("read", transfer.offset(), transfer.length());
                done.take().into_iter().for_each(|done| done.complete(Err(error.clone())));
            }
            Job::Write { done, transfer, .. } => {
                let error = closed("write", transfer.offset(), transfer.length());
                done.take().into_iter().for_each(|done| done.complete(Err(error.clone())));
            }
            Job::Flush { done, .. } => {
                done.take().into_iter().for_each(|done| done.complete(Err(closed("flush", 0, 0))));
            }
        }
    }

    /// Answers `error` by the rules of the operation, and never frees the buffers: the kernel may still use them.
    pub(crate) fn fail_and_leak(self, error: &Error) {
        let Self { ticket, job, vectors, .. } = self;
        std::mem::forget(vectors);
        match job {
            Job::Read { buf, done, .. } => {
                std::mem::forget(buf);
                drop(ticket);
                done.into_iter().for_each(|done| done.complete(Err(error.clone())));
            }
            Job::Write { transfer, bufs, mode, done, .. } => {
                std::mem::forget(bufs);
                let done = done.unwrap_or_else(nobody);
                finish_write(ticket, transfer.offset(), transfer.length(), mode, Err(error.clone()), done);
            }
            Job::Flush { done, .. } => finish_flush(ticket, Err(error.clone()), done.unwrap_or_else(nobody)),
        }
    }

    /// Never frees what the kernel may still use, nor closes its file.
    pub(crate) fn leak(self) {
        let _kept = ManuallyDrop::new(self);
    }
}

/// Stands for a caller who was answered already.
fn nobody() -> Completer<()> {
    crate::Op::pending().1
}

/// The result of a flush.
fn flushed(
    op: &'static str,
    offset: u64,
    length: u64,
    answer: std::result::Result<u64, i32>,
    stalls: &mut u32,
) -> Progress {
    match answer {
        Ok(_) => Progress::Done(Ok(())),
        Err(libc::EINTR | libc::EAGAIN | libc::ECANCELED) if *stalls < STALLS_MAX => {
            *stalls += 1;
            Progress::Again
        }
        Err(errno) => Progress::Done(Err(Error::flush(op, offset, length, errno))),
    }
}
