//! What runs in a pod before it is stopped: hold while stopping this process would cost the quorum, then let go of
//! leadership.
//!
//! # Cases
//! | voters, this one among them | the others | then |
//! |---|---|---|
//! | none of them is this one, or it alone | | go at once: it has no say, or nobody to wait for |
//! | 2 | | go at once: one of two is no quorum however well it is, so waiting changes nothing. Writes stop until one is back |
//! | 3 and more | a quorum of them is well | go at once |
//! | 3 and more | not | hold, look again, and go when `--hold` is over |
//!
//! # Why not
//! Without the hold, a parallel stateful set that rolls out while another member is frozen stops a healthy one and the
//! quorum with it (kubernetes #96218). The process goes on serving while the hook holds.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::{Failure, PrestopArgs, print};
use crate::client::{connect_any, refused, status_of, store_status_of, transfer};
use crate::proto::mainstay::v1::admin_client::AdminClient;
use crate::status::{MemberSection, Status};

/// Wait between two looks at the others.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Longest wait for one of the others.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the hook lets this process go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Reason {
    /// The others are a quorum and well.
    Quorum,
    /// This process has no vote, or is the only voter.
    NothingToHoldFor,
    /// One of two voters is never a quorum.
    OneOfTwo,
    /// `--hold` is over.
    TimeOver,
}

impl Reason {
    fn text(self) -> &'static str {
        match self {
            Self::Quorum => "the others are a quorum",
            Self::NothingToHoldFor => "there is no quorum to hold for",
            Self::OneOfTwo => {
                "one of two voters is no quorum, so holding cannot help: writes stop until this one is back"
            }
            Self::TimeOver => "the time is over and the others are no quorum",
        }
    }
}

#[derive(Serialize)]
struct Done {
    held_ms: u64,
    reason: Reason,
    leader: Option<u64>,
}

pub(crate) async fn run(args: PrestopArgs) -> Result<(), Failure> {
    let start = Instant::now();
    let reason = hold(&args, start + args.hold.0).await?;
    // Also to one that will be no quorum: it then has all that was written, and leads at once when this one is back.
    let leader = if reason == Reason::TimeOver { None } else { let_go(&args).await? };
    tokio::time::sleep(args.drain.0).await;
    let held_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let done = Done { held_ms, reason, leader };
    print(args.admin.json, &done, || format!("held {held_ms} ms: {}", reason.text()))
}

/// Waits until there is a reason to go.
async fn hold(args: &PrestopArgs, deadline: Instant) -> Result<Reason, Failure> {
    loop {
        let own = status_of(&args.admin.admin, args.admin.timeout.0).await?;
        let mut answers = Vec::new();
        for member in others(&own) {
            answers.push(store_status_of(&member.client_address, LOOK_TIMEOUT).await.ok());
        }
        if let Some(reason) = reason_to_go(&own, &answers) {
            return Ok(reason);
        }
        if Instant::now() + LOOK_INTERVAL >= deadline {
            return Ok(Reason::TimeOver);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn others(own: &Status) -> impl Iterator<Item = &MemberSection> {
    own.raft.members.iter().filter(|member| member.voter && member.id != own.raft.id)
}

/// Why this process may be stopped now; none while that would cost a quorum which holding may save.
fn reason_to_go(own: &Status, answers: &[Option<Status>]) -> Option<Reason> {
    let voters = own.raft.members.iter().filter(|member| member.voter).count();
    let is_voter = own.raft.members.iter().any(|member| member.voter && member.id == own.raft.id);
    if !is_voter || voters == 1 {
        return Some(Reason::NothingToHoldFor);
    }
    let well = answers.iter().flatten().filter(|other| other.ready && other.raft.cluster == own.raft.cluster).count();
    match voters {
        2 => Some(Reason::OneOfTwo),
        _ => (well > voters / 2).then_some(Reason::Quorum),
    }
}

/// Hands leadership over if this process has it.
async fn let_go(args: &PrestopArgs) -> Result<Option<u64>, Failure> {
    let own = status_of(&args.admin.admin, args.admin.timeout.0).await?;
    let others = others(&own).count();
    if own.raft.role != "leader" || others == 0 {
        return Ok(own.raft.leader);
    }
    let mut client = AdminClient::new(connect_any(&args.admin.admin, args.admin.timeout.0).await?);
    match transfer(&mut client, 0).await {
        Ok(leader) => Ok(Some(leader)),
        // The process hands over once more when it is told to stop.
        Err(failure) => {
            eprintln!("mainstay: {}", refused(tonic::Status::unavailable(failure.to_string())));
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Sources;
    use mainstay::{MemberInfo, MemberRole, NodeId, NodeStatus, PeerAddress};

    fn status(id: u64, voters: u64, ready: bool) -> Status {
        let members = (1..=voters).map(|id| MemberInfo {
            id: NodeId(id),
            name: format!("m{id}"),
            peer_address: PeerAddress(String::new()),
            client_address: String::new(),
            incarnation: [0; 16],
            site: String::new(),
            priority: 0,
            witness: false,
            version: 0,
            role: MemberRole::Voter,
        });
        let node = NodeStatus {
            cluster: [7; 16],
            id: NodeId(id),
            role: "follower".into(),
            leader: ready.then_some(NodeId(1)),
            members: members.collect(),
            ..NodeStatus::default()
        };
        let (engine, wal) = Default::default();
        Status::new(Sources {
            member: String::new(),
            stopping: false,
            engine,
            wal,
            node,
            groups: vec![],
            checkpoints: vec![],
            clones: vec![],
        })
    }

    #[test]
    fn it_holds_while_the_others_are_no_quorum_and_may_become_one() {
        let check = |voters: u64, others: &[Option<bool>], expect: Option<Reason>| {
            let answers: Vec<_> = others.iter().map(|well| well.map(|ready| status(2, voters, ready))).collect();
            assert_eq!(reason_to_go(&status(1, voters, true), &answers), expect, "voters={voters} {others:?}");
        };
        check(1, &[], Some(Reason::NothingToHoldFor));
        check(3, &[Some(true), Some(true)], Some(Reason::Quorum));
        check(3, &[Some(true), Some(false)], None);
        check(3, &[Some(true), None], None);
        check(4, &[Some(true), Some(true), None], None);
        check(5, &[Some(true), Some(true), Some(true), None], Some(Reason::Quorum));
        check(5, &[Some(true), Some(true), None, None], None);
    }

    /// With two voters the hook held for its whole time, at each restart, although nothing could come of it.
    #[test]
    fn one_of_two_voters_goes_at_once_whatever_the_other_is() {
        for other in [Some(true), Some(false), None] {
            let answers = [other.map(|ready| status(2, 2, ready))];
            let reason = reason_to_go(&status(1, 2, true), &answers);
            assert_eq!(reason, Some(Reason::OneOfTwo), "{other:?}");
            assert!(reason.expect("a reason").text().contains("no quorum"), "it says why");
        }
    }

    #[test]
    fn a_process_without_a_vote_goes_at_once() {
        let own = status(9, 3, true);
        assert_eq!(reason_to_go(&own, &[None, None, None]), Some(Reason::NothingToHoldFor));
    }
}
