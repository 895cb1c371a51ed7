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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{Extent, Missing, OpenFile};
    use crate::{ErrorKind, Op};

    fn gate() -> Arc<Gate> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        std::fs::write(&path, vec![0; 4 << 20]).expect("written");
        Gate::new(Arc::new(OpenFile::open(&path, Missing::Refuse, Extent::Length, None).expect("opened")))
    }

    fn flight(gate: &Arc<Gate>, body: Body) -> Flight {
        let ticket = gate.enter("test", 0, 0, true).expect("open");
        Flight::new(Request { ticket, class: IoClass::Wal, body }).ok().expect("something to do")
    }

    fn write(gate: &Arc<Gate>, bytes: usize, mode: WriteMode) -> (Flight, Op<()>) {
        let (op, done) = Op::pending();
        let bufs = vec![AlignedBuf::zeroed(bytes).freeze()];
        (flight(gate, Body::Write { offset: 0, bufs, mode, done }), op)
    }

    /// Feeds `results` of the kernel to the flight until it is done, and finishes it.
    fn run(mut flight: Flight, results: &[i32]) {
        for (n, result) in results.iter().enumerate() {
            let _ = flight.entry();
            match flight.advance(*result) {
                Progress::Again => assert!(n + 1 < results.len(), "not done after {results:?}"),
                Progress::Done(answer) => {
                    assert_eq!(n + 1, results.len(), "done too early in {results:?}");
                    return flight.finish(answer);
                }
            }
        }
    }

    #[test]
    fn short_and_interrupted_writes_are_resubmitted() {
        let gate = gate();
        let full = 16384;
        let cases: &[&[i32]] = &[
            &[full],
            &[4096, 4096, 8192],
            &[512, full],
            &[-libc::EAGAIN, -libc::EINTR, -libc::ECANCELED, full],
            &[0, full],
            // Without RWF_DSYNC the write is followed by a flush, which may be interrupted too.
            &[-libc::EOPNOTSUPP, full, -libc::EINTR, 0],
        ];
        for results in cases {
            let (flight, op) = write(&gate, full as usize, WriteMode::Durable);
            run(flight, results);
            op.wait().expect("durable");
        }
        assert_eq!(gate.drain(std::time::Duration::ZERO), (0, 0));
    }

    #[test]
    fn a_long_durable_write_is_flushed_once_at_its_end() {
        let (flight, op) = write(&gate(), 2 << 20, WriteMode::Durable);
        run(flight, &[1 << 20, 1 << 20, 0]);
        op.wait().expect("durable");
    }

    #[test]
    fn failures_are_typed_and_poison_what_promised_durability() {
        let cases = [
            (WriteMode::Cached, -libc::EIO, ErrorKind::Media, false),
            (WriteMode::Durable, -libc::ENOSPC, ErrorKind::OutOfSpace, false),
            (WriteMode::Durable, -libc::EIO, ErrorKind::Media, true),
            (WriteMode::Durable, -libc::EBADF, ErrorKind::Os, true),
        ];
        for (mode, result, kind, poisons) in cases {
            let gate = gate();
            let (failing, op) = write(&gate, 4096, mode);
            let (later, late_op) = write(&gate, 4096, WriteMode::Durable);
            run(failing, &[result]);
            assert_eq!(op.wait().expect_err("failed").kind(), kind);
            assert_eq!(gate.poisoned().is_some(), poisons);
            // In flight when the other failed, and written well: not acknowledged after a failure all the same.
            run(later, &[4096]);
            assert_eq!(late_op.wait().err().map(|e| e.kind()), poisons.then_some(ErrorKind::Poisoned));
        }
    }

    #[test]
    fn no_progress_ends_in_an_error() {
        for result in [-libc::EAGAIN, -libc::EINTR, 0] {
            let (mut flight, op) = write(&gate(), 4096, WriteMode::Durable);
            let mut rounds = 0;
            let answer = loop {
                match flight.advance(result) {
                    Progress::Again => rounds += 1,
                    Progress::Done(answer) => break answer,
                }
            };
            assert_eq!(rounds, STALLS_MAX);
            flight.finish(answer);
            assert!(op.wait().is_err());
        }
    }

    #[test]
    fn an_abandoned_operation_answers_once_and_keeps_its_place() {
        let gate = gate();
        let (mut flight, op) = write(&gate, 4096, WriteMode::Durable);
        flight.abandon();
        assert_eq!(op.wait().expect_err("abandoned").kind(), ErrorKind::Closed);
        assert_eq!(gate.drain(std::time::Duration::ZERO), (1, 0));
        run(flight, &[4096]);
        assert_eq!(gate.drain(std::time::Duration::ZERO), (0, 0));
    }

    #[test]
    fn a_read_behind_the_end_of_a_file_is_zeroes() {
        let (op, done) = Op::pending();
        let mut buf = AlignedBuf::zeroed(8192);
        buf.fill(1);
        run(flight(&gate(), Body::Read { offset: 0, buf, done }), &[4096, 0]);
        let buf = op.wait().expect("read");
        assert!(buf[..4096].iter().all(|b| *b == 1) && buf[4096..].iter().all(|b| *b == 0));
    }
}
