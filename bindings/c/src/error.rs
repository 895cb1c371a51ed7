//! Codes, and the message of the last failure of a thread.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use facade::{Error, ErrorKind};

/// What a call answers. The code tells the caller what to do.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, clippy::exhaustive_enums, reason = "named as C names constants; codes are only added")]
pub enum MainstayCode {
    /// Done.
    MAINSTAY_OK = 0,
    /// Fix the call: a null argument, an empty key, a value over the limit, a name that is taken.
    MAINSTAY_INVALID = 1,
    /// There is nothing under that name or key.
    MAINSTAY_NOT_FOUND = 2,
    /// Go to the leader. It was not applied.
    MAINSTAY_NOT_LEADER = 3,
    /// Try again: it was not applied.
    MAINSTAY_UNAVAILABLE = 4,
    /// It may have been applied: read before trying again.
    MAINSTAY_INDETERMINATE = 5,
    /// Free space; reads go on.
    MAINSTAY_OUT_OF_SPACE = 6,
    /// Bytes do not match their checksum. Call an operator.
    MAINSTAY_CORRUPT = 7,
    /// Not a volume, a newer format, or a volume of someone else.
    MAINSTAY_FOREIGN = 8,
    /// Another process has the volume open.
    MAINSTAY_LOCKED = 9,
    /// Not built yet.
    MAINSTAY_UNSUPPORTED = 10,
    /// Closed; open again.
    MAINSTAY_CLOSED = 11,
    /// The device failed.
    MAINSTAY_IO = 12,
    /// A mistake in Mainstay.
    MAINSTAY_INTERNAL = 13,
    /// A condition does not hold: nothing was applied; read again and retry.
    MAINSTAY_CONFLICT = 14,
}

use MainstayCode::*;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// What failed last on this thread, as UTF-8 with a zero at its end; empty before the first failure. Valid until the
/// next call into this library on the same thread.
#[unsafe(no_mangle)]
pub extern "C" fn mainstay_last_error() -> *const c_char {
    LAST.with(|last| last.try_borrow().map_or(ptr::null(), |message| message.as_ptr()))
}

/// A failure on its way to a code.
pub(crate) struct Failure(MainstayCode, String);

impl Failure {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self(MAINSTAY_INVALID, message.into())
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self(MAINSTAY_NOT_FOUND, message.into())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            ErrorKind::Invalid => MAINSTAY_INVALID,
            ErrorKind::NotFound => MAINSTAY_NOT_FOUND,
            ErrorKind::NotLeader => MAINSTAY_NOT_LEADER,
            ErrorKind::Unavailable => MAINSTAY_UNAVAILABLE,
            ErrorKind::Indeterminate => MAINSTAY_INDETERMINATE,
            ErrorKind::Conflict => MAINSTAY_CONFLICT,
            ErrorKind::OutOfSpace => MAINSTAY_OUT_OF_SPACE,
            ErrorKind::Corrupt => MAINSTAY_CORRUPT,
            ErrorKind::Foreign => MAINSTAY_FOREIGN,
            ErrorKind::Locked => MAINSTAY_LOCKED,
            ErrorKind::Unsupported => MAINSTAY_UNSUPPORTED,
            ErrorKind::Closed => MAINSTAY_CLOSED,
            ErrorKind::Io => MAINSTAY_IO,
            _ => MAINSTAY_INTERNAL,
        };
        Self(code, error.to_string())
    }
}

/// Runs the body of an exported function: keeps its failure for [`mainstay_last_error`] and stops panics (I1).
pub(crate) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> MainstayCode {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        Err(Failure(MAINSTAY_INTERNAL, "the library panicked; the handle should not be used on".into()))
    });
    match outcome {
        Ok(()) => MAINSTAY_OK,
        Err(Failure(code, message)) => {
            let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
            LAST.with(|last| {
                if let Ok(mut last) = last.try_borrow_mut() {
                    *last = message;
                }
            });
            code
        }
    }
}
