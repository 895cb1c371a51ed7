//! What the engine answers when it cannot do what was asked.

use crate::LogIndex;

/// The result of an engine operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about a failure. One set of kinds for the store of one node, for replicas and for the facade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Fix the call: an empty key, a value over the limit, a keyspace that was dropped, a name that is taken.
    Invalid,
    /// There is nothing under that name.
    NotFound,
    /// Go to the leader. It was not applied.
    NotLeader,
    /// Try again: no quorum, too busy, or not a member yet. It was not applied.
    Unavailable,
    /// It may have been applied: read before trying again.
    Indeterminate,
    /// A condition of the batch does not hold, or others wrote what the transaction depends on. Nothing was applied: read
    /// again and retry.
    Conflict,
    /// The log was cut: entries before this one are gone. Begin anew: read a snapshot or a checkpoint, and then the changes behind its
    /// index.
    Purged {
        /// The oldest entry that is there.
        oldest: LogIndex,
    },
    /// Free space or call an operator; reads go on.
    OutOfSpace,
    /// Bytes do not match their checksum. Call an operator.
    Corrupt,
    /// Not a volume, a newer format, a volume of someone else, or another cluster.
    Foreign,
    /// Another process has the volume open.
    Locked,
    /// Not built yet: a durability or an option whose type exists already.
    Unsupported,
    /// Closed; reopen. The message says by what.
    Closed,
    /// The device failed.
    Io,
    /// A mistake of ours.
    Internal,
}

/// A failed operation.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<Box<Source>>,
}

/// The error of the crate below that caused this one.
#[derive(Clone, Debug, thiserror::Error)]
enum Source {
    #[error(transparent)]
    Io(mainstay_io::Error),
    #[error(transparent)]
    Wal(mainstay_wal::Error),
}

impl Error {
    /// Makes an error of `kind`; the message is in lower case with values last as `key=value`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The kind tells the caller what to do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<mainstay_io::Error> for Error {
    fn from(source: mainstay_io::Error) -> Self {
        use mainstay_io::ErrorKind as K;
        let kind = match source.kind() {
            K::OutOfSpace => ErrorKind::OutOfSpace,
            K::Locked => ErrorKind::Locked,
            K::Closed | K::Poisoned => ErrorKind::Closed,
            K::OutOfRange | K::Misaligned => ErrorKind::Internal,
            K::Unusable => ErrorKind::Invalid,
            _ => ErrorKind::Io,
        };
        Self { kind, message: source.to_string(), source: Some(Box::new(Source::Io(source))) }
    }
}

impl From<mainstay_wal::Error> for Error {
    fn from(source: mainstay_wal::Error) -> Self {
        use mainstay_wal::ErrorKind as K;
        let kind = match source.kind() {
            K::Invalid => ErrorKind::Invalid,
            K::OutOfSpace => ErrorKind::OutOfSpace,
            K::Corrupt => ErrorKind::Corrupt,
            K::Foreign => ErrorKind::Foreign,
            K::Closed => ErrorKind::Closed,
            _ => ErrorKind::Io,
        };
        Self { kind, message: source.to_string(), source: Some(Box::new(Source::Wal(source))) }
    }
}
