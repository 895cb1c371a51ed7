//! How far one operation has come, and what each answer of the kernel means for the rest of it.
//!
//! # Place
//! Pure: no I/O. Both backends move an operation on with [`Transfer::advance`], so partial results, interruptions and
//! the end of a sparse file are judged in one place.
//!
//! # Invariants
//! 1. Every step either makes progress of whole blocks or counts against [`STALLS_MAX`], so no operation runs for ever.
//! 2. A transfer that restarts writes the same bytes to the same place: positional writes may be repeated.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::BLOCK_BYTES;

/// The largest single transfer. A block device takes up to 256 pages without a worker thread of the kernel.
pub(crate) const IO_BYTES_MAX: u64 = 1 << 20;

/// Buffers that one vectored call may name (UIO_MAXIOV).
pub(crate) const VECTORS_MAX: usize = 1024;

/// Answers without progress, in a row, before an operation fails.
pub(crate) const STALLS_MAX: u32 = 64;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Progress of a read or write of `length` bytes at `offset`.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    offset: u64,
    length: u64,
    done: u64,
    stalls: u32,
    may_end: bool,
}

/// What to do after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// All bytes were transferred.
    Complete,
    /// Submit the rest. `stalled` says that the last answer was no progress, so a blocking context is better.
    Again {
        /// The last answer made no progress.
        stalled: bool,
    },
    /// The file ends here: what is left reads as zeroes.
    EndOfFile,
    /// The operation failed with this errno.
    Fail(i32),
}

impl Transfer {
    /// A read; `sparse` when the file may end before its capacity.
    pub(crate) fn read(offset: u64, length: u64, sparse: bool) -> Self {
        Self { offset, length, done: 0, stalls: 0, may_end: sparse }
    }

    /// A write.
    pub(crate) fn write(offset: u64, length: u64) -> Self {
        Self { offset, length, done: 0, stalls: 0, may_end: false }
    }

    /// Where the operation began.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// All of its bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Bytes already transferred, in whole blocks until the end.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    /// Offset on the device and length of the next call.
    pub(crate) fn next(&self) -> (u64, u64) {
        let left = self.length.saturating_sub(self.done);
        (self.offset.saturating_add(self.done), left.min(IO_BYTES_MAX))
    }

    /// Takes the answer to the call that [`Transfer::next`] described: bytes or an errno.
    pub(crate) fn advance(&mut self, answer: Result<u64, i32>) -> Step {
        match answer {
            Ok(0) if self.may_end => Step::EndOfFile,
            Ok(bytes) => {
                let reached = self.done.saturating_add(bytes).min(self.length);
                if reached == self.length {
                    self.done = reached;
                    return Step::Complete;
                }
                let whole = reached.saturating_sub(reached.checked_rem(BLOCK).unwrap_or(0));
                if whole > self.done {
                    self.done = whole;
                    self.stalls = 0;
                    return Step::Again { stalled: false };
                }
                self.stall(libc::EIO)
            }
            Err(errno @ (libc::EINTR | libc::EAGAIN | libc::ECANCELED)) => self.stall(errno),
            Err(errno) => Step::Fail(errno),
        }
    }

    fn stall(&mut self, errno: i32) -> Step {
        self.stalls = self.stalls.saturating_add(1);
        if self.stalls > STALLS_MAX { Step::Fail(errno) } else { Step::Again { stalled: true } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_answers_go_on_from_the_last_whole_block() {
        let mut t = Transfer::write(8192, 12288);
        assert_eq!(t.next(), (8192, 12288));
        assert_eq!(t.advance(Ok(4096)), Step::Again { stalled: false });
        assert_eq!(t.next(), (12288, 8192));
        assert_eq!(t.advance(Ok(4608)), Step::Again { stalled: false });
        assert_eq!(t.next(), (16384, 4096));
        assert_eq!(t.advance(Ok(512)), Step::Again { stalled: true });
        assert_eq!(t.advance(Ok(4096)), Step::Complete);
    }

    #[test]
    fn no_progress_is_bounded() {
        for answer in [Ok(0), Ok(512), Err(libc::EAGAIN), Err(libc::EINTR), Err(libc::ECANCELED)] {
            let mut t = Transfer::write(0, 4096);
            let mut steps = 0;
            while let Step::Again { .. } = t.advance(answer) {
                steps += 1;
                assert!(steps <= STALLS_MAX, "answer={answer:?}");
            }
            assert_eq!(steps, STALLS_MAX);
        }
    }

    #[test]
    fn progress_forgives_earlier_stalls() {
        let mut t = Transfer::read(0, 3 * 4096, false);
        for _ in 0..STALLS_MAX {
            assert_eq!(t.advance(Err(libc::EAGAIN)), Step::Again { stalled: true });
        }
        assert_eq!(t.advance(Ok(4096)), Step::Again { stalled: false });
        assert_eq!(t.advance(Err(libc::EINTR)), Step::Again { stalled: true });
    }

    #[test]
    fn a_sparse_file_ends_and_a_device_does_not() {
        assert_eq!(Transfer::read(0, 4096, true).advance(Ok(0)), Step::EndOfFile);
        let mut t = Transfer::read(0, 4096, false);
        let last = loop {
            match t.advance(Ok(0)) {
                Step::Again { .. } => {}
                end => break end,
            }
        };
        assert_eq!(last, Step::Fail(libc::EIO));
    }

    #[test]
    fn long_operations_are_cut() {
        let mut t = Transfer::read(0, IO_BYTES_MAX + 4096, false);
        assert_eq!(t.next(), (0, IO_BYTES_MAX));
        assert_eq!(t.advance(Ok(IO_BYTES_MAX)), Step::Again { stalled: false });
        assert_eq!(t.next(), (IO_BYTES_MAX, 4096));
    }

    #[test]
    fn other_errors_fail_at_once() {
        assert_eq!(Transfer::write(0, 4096).advance(Err(libc::EIO)), Step::Fail(libc::EIO));
        assert_eq!(Transfer::write(0, 4096).advance(Err(libc::ENOSPC)), Step::Fail(libc::ENOSPC));
    }
}
