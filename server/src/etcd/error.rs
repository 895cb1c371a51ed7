//! The refusals of the etcd v3 protocol, with its exact texts and codes, and what other failures look like to its clients.
//!
//! # Invariants
//! E1. A [`Refusal`] is decided at apply by the log and the state alone, so its wire number is equal on all replicas and
//!     never reused.

use mainstay_engine as engine;
use mainstay_replication as replication;
use tonic::{Code, Status};

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $code:ident, $text:literal;)*) => {
        /// Why the model or a service refused a request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Refusal {
            $($(#[$doc])* $name = $number,)*
        }

        impl Refusal {
            /// The refusal of a wire number.
            pub(crate) fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The text that clients compare with.
            pub fn message(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// The gRPC code.
            pub fn code(self) -> Code {
                match self {
                    $(Self::$name => Code::$code,)*
                }
            }
        }
    };
}

refusals! {
    /// An operation without a key.
    EmptyKey = 1, InvalidArgument, "etcdserver: key is not provided";
    /// `ignore_value` or `ignore_lease` of a key that does not exist; also an operation of a transaction that names nothing.
    KeyNotFound = 2, InvalidArgument, "etcdserver: key not found";
    /// A value together with `ignore_value`.
    ValueProvided = 3, InvalidArgument, "etcdserver: value is provided";
    /// A lease together with `ignore_lease`.
    LeaseProvided = 4, InvalidArgument, "etcdserver: lease is provided";
    /// More operations in a transaction than the setting allows.
    TooManyOps = 5, InvalidArgument, "etcdserver: too many operations in txn request";
    /// A key that a transaction puts twice, or puts and deletes.
    DuplicateKey = 6, InvalidArgument, "etcdserver: duplicate key given in txn request";
    /// A sort order or target that the protocol does not have.
    InvalidSortOption = 7, InvalidArgument, "etcdserver: invalid sort option";
    /// A revision before the last compaction.
    Compacted = 8, OutOfRange, "etcdserver: mvcc: required revision has been compacted";
    /// A revision that is not there yet.
    FutureRevision = 9, OutOfRange, "etcdserver: mvcc: required revision is a future revision";
    /// The volume is full.
    NoSpace = 10, ResourceExhausted, "etcdserver: mvcc: database space exceeded";
    /// No lease of that id.
    LeaseNotFound = 11, NotFound, "etcdserver: requested lease not found";
    /// A lease of that id is there already.
    LeaseExist = 12, FailedPrecondition, "etcdserver: lease already exists";
    /// More seconds than a lease may have.
    LeaseTtlTooLarge = 13, OutOfRange, "etcdserver: too large lease TTL";
    /// A request beyond the size limit.
    RequestTooLarge = 14, InvalidArgument, "etcdserver: request is too large";
    /// More requests waiting than the server holds.
    TooManyRequests = 15, ResourceExhausted, "etcdserver: too many requests";
    /// No member of that id.
    MemberNotFound = 16, NotFound, "etcdserver: member not found";
    /// The URLs of a member cannot be used.
    MemberBadUrls = 17, InvalidArgument, "etcdserver: given member URLs are invalid";
    /// A member of these URLs is there already.
    PeerUrlExist = 18, FailedPrecondition, "etcdserver: Peer URLs already exists";
    /// Promotion of a member that votes.
    MemberNotLearner = 19, FailedPrecondition, "etcdserver: can only promote a learner member";
    /// Promotion of a learner that lacks too many entries.
    LearnerNotReady = 20, FailedPrecondition, "etcdserver: can only promote a learner member which is in sync with leader";
    /// A change that would leave too few members to decide.
    MemberNotEnoughStarted = 21, FailedPrecondition, "etcdserver: re-configuration failed due to not enough started members";
    /// No leader is known.
    NoLeader = 22, Unavailable, "etcdserver: no leader";
    /// An order to hand over what this member does not have.
    NotLeader = 23, FailedPrecondition, "etcdserver: not leader";
    /// The server is closing.
    Stopped = 24, Unavailable, "etcdserver: server stopped";
    /// Nobody knows whether the request was done.
    Timeout = 25, Unavailable, "etcdserver: request timed out";
    /// The leader changed while the request was under way.
    LeaderChanged = 26, Unavailable, "etcdserver: leader changed";
    /// Stored bytes do not match their checksum.
    Corrupt = 27, DataLoss, "etcdserver: corrupt cluster";
    /// Leadership cannot go to that member.
    BadLeaderTransferee = 28, FailedPrecondition, "etcdserver: bad leader transferee";
    /// A learner does not answer this.
    NotSupportedForLearner = 29, FailedPrecondition, "etcdserver: rpc not supported for learner";
    /// The server does not offer this.
    NotCapable = 30, FailedPrecondition, "etcdserver: not capable";
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Status::new(refusal.code(), refusal.message())
    }
}

/// Why a command or a read of the model did not succeed.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The protocol has a word for it.
    Refused(Refusal),
    /// The store failed.
    Store(engine::Error),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Self {
        Self::Store(error)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(refusal) => refusal.into(),
            Failure::Store(error) => status_of(&error.into()),
        }
    }
}

/// What a failed write or read of the node looks like to an etcd client. A client sends a request again only where the
/// answer says that it was not done.
pub(crate) fn status_of(error: &replication::Error) -> Status {
    use replication::ErrorKind as K;
    let refusal = match error.kind() {
        K::NotLeader | K::Unavailable => Refusal::NoLeader,
        K::Indeterminate => Refusal::Timeout,
        K::OutOfSpace => Refusal::NoSpace,
        K::Corrupt => Refusal::Corrupt,
        K::Closed => Refusal::Stopped,
        K::Invalid => return Status::invalid_argument(error.to_string()),
        K::NotFound => return Status::not_found(error.to_string()),
        K::Conflict => return Status::aborted(error.to_string()),
        K::Foreign | K::Unsupported => return Status::failed_precondition(error.to_string()),
        _ => return Status::internal(error.to_string()),
    };
    tracing::debug!(%error, answer = refusal.message(), "request failed");
    refusal.into()
}
