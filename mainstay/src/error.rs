//! The one error of the public interface.

use std::sync::Arc;

pub use mainstay_engine::ErrorKind;

/// The result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed operation. The message is in lower case, with values last as `key=value`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    leader: Option<String>,
    #[source]
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Makes an error of `kind`, for instance in a [`crate::StateMachine`] of one's own.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), leader: None, source: None }
    }

    /// The kind tells the caller what to do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The client address of the leader, of a [`ErrorKind::NotLeader`] that knows it.
    pub fn leader(&self) -> Option<&str> {
        self.leader.as_deref()
    }

    /// True when the same call may succeed later and was certainly not applied. Not so a [`ErrorKind::Conflict`]: what it was decided
    /// on has to be read again.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, ErrorKind::NotLeader | ErrorKind::Unavailable)
    }
}

impl From<mainstay_engine::Error> for Error {
    fn from(source: mainstay_engine::Error) -> Self {
        Self { kind: source.kind(), message: source.to_string(), leader: None, source: Some(Arc::new(source)) }
    }
}

impl From<mainstay_replication::Error> for Error {
    fn from(source: mainstay_replication::Error) -> Self {
        let leader = source.leader().map(|(_, address)| address.clone());
        Self { kind: source.kind(), message: source.to_string(), leader, source: Some(Arc::new(source)) }
    }
}

impl From<mainstay_io::Error> for Error {
    fn from(source: mainstay_io::Error) -> Self {
        mainstay_engine::Error::from(source).into()
    }
}
