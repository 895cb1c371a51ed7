//! What all ports of a running process share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use mainstay::Node;

use crate::status::{GroupSource, Sources, Status};

/// Longest time without a turn of the event loop that counts as alive.
const TURN_AGE_MAX: Duration = Duration::from_secs(30);

/// The state of the process. Ports are served from the first moment, also while the volume recovers.
pub(crate) struct Context {
    member: String,
    node: OnceLock<Node>,
    stopping: AtomicBool,
    started: Instant,
    /// Milliseconds from `started` to the last turn of the event loop.
    turned_ms: AtomicU64,
}

impl Context {
    pub(crate) fn new(member: &str) -> Arc<Self> {
        Arc::new(Self {
            member: member.to_owned(),
            node: OnceLock::new(),
            stopping: AtomicBool::new(false),
            started: Instant::now(),
            turned_ms: AtomicU64::new(0),
        })
    }

    /// Publishes the node once it runs.
    pub(crate) fn set_node(&self, node: Node) {
        // A second node would be a mistake of `serve`; the first stays.
        let _ = self.node.set(node);
    }

    pub(crate) fn node(&self) -> Option<&Node> {
        self.node.get()
    }

    /// The node, or what to answer while there is none.
    pub(crate) fn node_or_status(&self) -> Result<&Node, tonic::Status> {
        self.node().ok_or_else(|| tonic::Status::unavailable("the volume recovers"))
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// The event loop has turned.
    pub(crate) fn turn(&self) {
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.turned_ms.store(ms, Ordering::Relaxed);
    }

    /// True while the event loop turns. Never asks disk, peers or quorum.
    pub(crate) fn is_alive(&self) -> bool {
        let turned = Duration::from_millis(self.turned_ms.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(turned) < TURN_AGE_MAX
    }

    /// The document of `/status`; `None` while the volume recovers.
    pub(crate) fn status(&self) -> Option<Status> {
        let node = self.node()?;
        let store = node.store();
        Some(Status::new(Sources {
            member: self.member.clone(),
            stopping: self.stopping.load(Ordering::Relaxed),
            engine: node.engine().status(),
            wal: node.engine().wal().stats(),
            node: node.status(),
            groups: groups(node),
            checkpoints: store.checkpoints().into_iter().map(|checkpoint| checkpoint.name).collect(),
            clones: store.clones().into_iter().map(|clone| clone.name).collect(),
        }))
    }

    /// The document as a message.
    pub(crate) fn status_message(&self) -> Result<crate::proto::mainstay::v1::StatusResponse, tonic::Status> {
        let status = self.status().ok_or_else(|| tonic::Status::unavailable("the volume recovers"))?;
        let document = serde_json::to_string(&status).map_err(|e| tonic::Status::internal(e.to_string()))?;
        Ok(crate::proto::mainstay::v1::StatusResponse { document })
    }
}

/// What the groups beside the first say of themselves, in the order of their numbers.
pub(crate) fn groups(node: &Node) -> Vec<GroupSource> {
    let replica = node.replica();
    let mut open = replica.groups();
    let numbered = replica.group_numbers().into_iter();
    let mut groups: Vec<GroupSource> = numbered
        .map(|(name, number)| GroupSource {
            number: number.0,
            node: open.remove(&name).map(|node| node.status()),
            name,
        })
        .collect();
    groups.sort_by_key(|group| group.number);
    groups
}

/// Refuses a name that can be nobody's. The message does not hold it: a stranger may send megabytes.
pub(crate) fn check_name(whose: &str, name: &str, bytes_max: usize) -> Result<(), tonic::Status> {
    match name.len() {
        0 => Err(tonic::Status::invalid_argument(format!("the name of {whose} is empty"))),
        bytes if bytes > bytes_max => {
            let message = format!("the name of {whose} has at most {bytes_max} bytes bytes={bytes}");
            Err(tonic::Status::invalid_argument(message))
        }
        _ => Ok(()),
    }
}

/// As [`check_name`], and refuses what would break the lines of a list.
pub(crate) fn check_new_name(whose: &str, name: &str, bytes_max: usize) -> Result<(), tonic::Status> {
    check_name(whose, name, bytes_max)?;
    match name.contains(char::is_control) {
        true => Err(tonic::Status::invalid_argument(format!("the name of {whose} has no control characters"))),
        false => Ok(()),
    }
}

/// An error as gRPC says it.
pub(crate) fn grpc_status(error: mainstay::Error) -> tonic::Status {
    use mainstay::ErrorKind as K;
    use tonic::Code;
    let code = match error.kind() {
        K::Invalid => Code::InvalidArgument,
        K::NotFound => Code::NotFound,
        K::NotLeader | K::Unavailable | K::Closed => Code::Unavailable,
        K::Indeterminate => Code::Unknown,
        K::Conflict => Code::Aborted,
        K::OutOfSpace => Code::ResourceExhausted,
        K::Corrupt => Code::DataLoss,
        K::Foreign | K::Locked => Code::FailedPrecondition,
        K::Unsupported => Code::Unimplemented,
        _ => Code::Internal,
    };
    tonic::Status::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_break_no_line() {
        let check = |name: &str, is_name: bool, is_new: bool| {
            assert_eq!(check_name("a group", name, 4).is_ok(), is_name, "{name:?}");
            assert_eq!(check_new_name("a group", name, 4).is_ok(), is_new, "{name:?}");
        };
        check("", false, false);
        check("a b.", true, true);
        check("a\nb", true, false);
        check("abcde", false, false);
        check("éé", true, true);
        let long = check_name("a group", &"x".repeat(1 << 20), 4).expect_err("too long");
        assert!(long.message().len() < 100, "it does not come back");
    }
}
