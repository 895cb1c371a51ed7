//! What a replicated store answers when it cannot do what was asked.

use crate::NodeId;

/// The result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Fix the call.
    Invalid,
    /// There is nothing under that name.
    NotFound,
    /// Go to the leader, if it is known; else try again. It was not applied.
    NotLeader {
        /// Its id and client address.
        leader: Option<(NodeId, String)>,
    },
    /// Try again: no quorum, too busy, not a member yet. It was not applied.
    Unavailable,
    /// It may have been applied: read before trying again.
    Indeterminate,
    /// Free space or call an operator; reads go on.
    OutOfSpace,
    /// Bytes do not match their checksum. Call an operator.
    Corrupt,
    /// Another cluster, or a volume that is not who it says.
    Foreign,
    /// The type exists, the feature does not yet.
    Unsupported,
    /// Closed; the message says by what.
    Closed,
    /// A mistake of ours.
    Internal,
}

/// A failed operation.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    /// Makes an error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The kind tells the caller what to do.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }
}

impl From<mainstay_engine::Error> for Error {
    fn from(source: mainstay_engine::Error) -> Self {
        use mainstay_engine::ErrorKind as K;
        let kind = match source.kind() {
            K::Invalid => ErrorKind::Invalid,
            K::NotFound => ErrorKind::NotFound,
            K::NotLeader => ErrorKind::NotLeader { leader: None },
            K::Unavailable => ErrorKind::Unavailable,
            K::Indeterminate => ErrorKind::Indeterminate,
            K::OutOfSpace => ErrorKind::OutOfSpace,
            K::Corrupt => ErrorKind::Corrupt,
            K::Foreign => ErrorKind::Foreign,
            K::Unsupported => ErrorKind::Unsupported,
            K::Closed | K::Io | K::Locked => ErrorKind::Closed,
            _ => ErrorKind::Internal,
        };
        Self { kind, message: source.to_string() }
    }
}
