//! What a device answers when it cannot do what was asked.

use std::fmt;

/// The result of a device operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about a failed operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The medium could not read or write these bytes (EIO). A failed durable write or flush also poisons the device.
    Media,
    /// The file system or device is full. Nothing was promised; free space and try again.
    OutOfSpace,
    /// The range does not lie inside the device or zone. A mistake of the caller.
    OutOfRange,
    /// Offset, length or memory is not a multiple of the block size. A mistake of the caller.
    Misaligned,
    /// An earlier durable write or flush failed: nothing is written to this device again.
    Poisoned,
    /// The device was shut down.
    Closed,
    /// Another process holds the volume.
    Locked,
    /// The path does not exist, is no directory or block device, or may not be opened.
    Unusable,
    /// The operating system refused for a reason without a kind of its own; the message holds it.
    Os,
}

/// A failed operation: what was tried, where, and why it failed.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    op: &'static str,
    offset: u64,
    length: u64,
    message: String,
}

impl Error {
    /// Makes an error for operation `op` on `length` bytes at `offset`.
    pub fn new(kind: ErrorKind, op: &'static str, offset: u64, length: u64, message: impl Into<String>) -> Self {
        Self { kind, op, offset, length, message: message.into() }
    }

    /// The error for `errno` of the operating system.
    pub(crate) fn os(op: &'static str, offset: u64, length: u64, errno: i32) -> Self {
        let kind = match errno {
            libc::EIO
            | libc::ENODATA
            | libc::EILSEQ
            | libc::EREMOTEIO
            | libc::ETIMEDOUT
            | libc::ENOLINK
            | libc::ENXIO
            | libc::ENODEV => ErrorKind::Media,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::OutOfSpace,
            _ => ErrorKind::Os,
        };
        let message = std::io::Error::from_raw_os_error(errno).to_string();
        Self::new(kind, op, offset, length, message)
    }

    /// The error for a flush. One that found the file system full has lost data that was accepted: that is no
    /// `OutOfSpace`, after which the caller could go on.
    pub(crate) fn flush(op: &'static str, offset: u64, length: u64, errno: i32) -> Self {
        let error = Self::os(op, offset, length, errno);
        if error.kind == ErrorKind::OutOfSpace { Self { kind: ErrorKind::Media, ..error } } else { error }
    }

    /// A target that cannot be used; `message` names the path and the remedy.
    pub(crate) fn unusable(op: &'static str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unusable, op, 0, 0, message)
    }

    /// The answer of a poisoned device to `op`: `self` is what poisoned it.
    pub(crate) fn poisoned(&self, op: &'static str, offset: u64, length: u64) -> Self {
        Self::new(ErrorKind::Poisoned, op, offset, length, format!("an earlier operation failed for good: {self}"))
    }

    /// The kind tells the caller what to do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operation that failed, for instance `write`.
    pub fn op(&self) -> &'static str {
        self.op
    }

    /// Where on the device the operation began, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} failed: {} kind={:?} offset={} length={}",
            self.op, self.message, self.kind, self.offset, self.length
        )
    }
}

impl std::error::Error for Error {}
