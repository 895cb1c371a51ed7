//! What a replicated store answers when it cannot do what was asked.

pub use mainstay_engine::ErrorKind;

use crate::NodeId;

/// The result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed operation.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    leader: Option<(NodeId, String)>,
}

impl Error {
    /// Makes an error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), leader: None }
    }

    /// Makes a [`ErrorKind::NotLeader`] that says who leads: its id and client address.
    pub fn not_leader(leader: Option<(NodeId, String)>, message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::NotLeader, message: message.into(), leader }
    }

    /// The kind tells the caller what to do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whom to go to, of a [`ErrorKind::NotLeader`] that knows it: the leader's id and client address.
    pub fn leader(&self) -> Option<&(NodeId, String)> {
        self.leader.as_ref()
    }
}

impl From<mainstay_engine::Error> for Error {
    fn from(source: mainstay_engine::Error) -> Self {
        let kind = match source.kind() {
            // A replica whose device failed has left the quorum: its caller goes to another.
            ErrorKind::Io => ErrorKind::Closed,
            kind => kind,
        };
        Self::new(kind, source.to_string())
    }
}
