//! What runs in a pod before it is stopped: hold while stopping this process would cost the quorum, then let go of
//! leadership.
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

#[derive(Serialize)]
struct Done {
    held_ms: u64,
    others_are_quorum: bool,
    leader: Option<u64>,
}

pub(crate) async fn run(args: PrestopArgs) -> Result<(), Failure> {
    let start = Instant::now();
    let others_are_quorum = hold(&args, start + args.hold.0).await?;
    let leader = if others_are_quorum { let_go(&args).await? } else { None };
    tokio::time::sleep(args.drain.0).await;
    let held_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let done = Done { held_ms, others_are_quorum, leader };
    print(args.admin.json, &done, || {
        format!("held {held_ms} ms, the others are{} a quorum", if others_are_quorum { "" } else { " not" })
    })
}

/// Waits until the others are a quorum; false when the time is over.
async fn hold(args: &PrestopArgs, deadline: Instant) -> Result<bool, Failure> {
    loop {
        let own = status_of(&args.admin.admin, args.admin.timeout.0).await?;
        let mut answers = Vec::new();
        for member in others(&own) {
            answers.push(store_status_of(&member.client_address, LOOK_TIMEOUT).await.ok());
        }
        if others_are_quorum(&own, &answers) {
            return Ok(true);
        }
        if Instant::now() + LOOK_INTERVAL >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn others(own: &Status) -> impl Iterator<Item = &MemberSection> {
    own.raft.members.iter().filter(|member| member.voter && member.id != own.raft.id)
}

/// True when stopping this process leaves a quorum of members that are well, or when it has no say.
fn others_are_quorum(own: &Status, answers: &[Option<Status>]) -> bool {
    let voters = own.raft.members.iter().filter(|member| member.voter).count();
    let is_voter = own.raft.members.iter().any(|member| member.voter && member.id == own.raft.id);
    if !is_voter || voters == 1 {
        // A learner, a stranger or the only one: holding helps nobody.
        return true;
    }
    let well = answers.iter().flatten().filter(|other| other.ready && other.raft.cluster == own.raft.cluster).count();
    well > voters / 2
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
            checkpoints: vec![],
            clones: vec![],
        })
    }

    #[test]
    fn it_holds_while_the_others_are_no_quorum_without_it() {
        let check = |voters: u64, others: &[Option<bool>], expect: bool| {
            let answers: Vec<_> = others.iter().map(|well| well.map(|ready| status(2, voters, ready))).collect();
            assert_eq!(others_are_quorum(&status(1, voters, true), &answers), expect, "voters={voters} {others:?}");
        };
        check(1, &[], true);
        check(2, &[Some(true)], false);
        check(3, &[Some(true), Some(true)], true);
        check(3, &[Some(true), Some(false)], false);
        check(3, &[Some(true), None], false);
        check(5, &[Some(true), Some(true), Some(true), None], true);
        check(5, &[Some(true), Some(true), None, None], false);
    }

    #[test]
    fn a_process_without_a_vote_goes_at_once() {
        let own = status(9, 3, true);
        assert!(others_are_quorum(&own, &[None, None, None]));
    }
}
