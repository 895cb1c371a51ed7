//! The one error of the public interface.

use std::sync::Arc;

/// The result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Fix the call: an empty key, a value over the limit, a keyspace that was dropped, a name that is taken.
    Invalid,
    /// There is nothing under that name.
    NotFound,
    /// Go to the leader. It was not applied.
    NotLeader {
        /// Its client address, if it is known.
        leader: Option<String>,
    },
    /// Try again: no quorum, too busy, or not a member yet. It was not applied.
    Unavailable,
    /// It may have been applied: read before trying again.
    Indeterminate,
    /// Free space or call an operator; reads go on.
    OutOfSpace,
    /// Bytes do not match their checksum. Call an operator.
    Corrupt,
    /// Not a volume, a newer format, or a volume of someone else.
    Foreign,
    /// Another process has the volume open.
    Locked,
    /// The type exists, the feature does not yet.
    Unsupported,
    /// Closed; reopen. The message says by what.
    Closed,
    /// The device failed.
    Io,
    /// A mistake of ours.
    Internal,
}

/// A failed operation. The message is in lower case, with values last as `key=value`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Makes an error of `kind`, for instance in a [`crate::StateMachine`] of one's own.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The kind tells the caller what to do.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// True when the same call may succeed later and was certainly not applied.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, ErrorKind::NotLeader { .. } | ErrorKind::Unavailable)
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
            K::Locked => ErrorKind::Locked,
            K::Unsupported => ErrorKind::Unsupported,
            K::Closed => ErrorKind::Closed,
            K::Io => ErrorKind::Io,
            _ => ErrorKind::Internal,
        };
        Self { kind, message: source.to_string(), source: Some(Arc::new(source)) }
    }
}

impl From<mainstay_replication::Error> for Error {
    fn from(source: mainstay_replication::Error) -> Self {
        use mainstay_replication::ErrorKind as K;
        let kind = match source.kind() {
            K::Invalid => ErrorKind::Invalid,
            K::NotFound => ErrorKind::NotFound,
            K::NotLeader { leader } => {
                ErrorKind::NotLeader { leader: leader.as_ref().map(|(_, address)| address.clone()) }
            }
            K::Unavailable => ErrorKind::Unavailable,
            K::Indeterminate => ErrorKind::Indeterminate,
            K::OutOfSpace => ErrorKind::OutOfSpace,
            K::Corrupt => ErrorKind::Corrupt,
            K::Foreign => ErrorKind::Foreign,
            K::Unsupported => ErrorKind::Unsupported,
            K::Closed => ErrorKind::Closed,
            _ => ErrorKind::Internal,
        };
        Self { kind, message: source.to_string(), source: Some(Arc::new(source)) }
    }
}

impl From<mainstay_io::Error> for Error {
    fn from(source: mainstay_io::Error) -> Self {
        mainstay_engine::Error::from(source).into()
    }
}
