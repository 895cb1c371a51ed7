//! What the log answers when it cannot do what was asked.

/// The result of a log operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A mistake in the call: a record that is empty or too long, a position that was never written.
    Invalid,
    /// The ring is full; release positions (flush memtables) and try again.
    OutOfSpace,
    /// Bytes that had been acknowledged do not match their checksum. Repair from a peer, or call an operator.
    Corrupt,
    /// The zone holds the log of another volume or a newer format.
    Foreign,
    /// The log is closed, by its owner or by a failed write. Reopen the volume.
    Closed,
    /// The device failed; the log is closed.
    Io,
}

/// A failed log operation.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<mainstay_io::Error>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// What callers are told after this failure has closed the log.
    pub(crate) fn as_closed(&self) -> Self {
        match self.kind {
            ErrorKind::Closed => self.clone(),
            _ => Self {
                kind: ErrorKind::Closed,
                message: format!("the log is closed by an earlier failure: {}", self.message),
                source: self.source.clone(),
            },
        }
    }

    /// The kind tells the caller what to do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<mainstay_io::Error> for Error {
    fn from(source: mainstay_io::Error) -> Self {
        Self { kind: ErrorKind::Io, message: "the device of the log failed".into(), source: Some(source) }
    }
}
