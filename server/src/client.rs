//! The commands that talk to a running replica.

use std::time::{Duration, Instant};

use serde::Serialize;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

use crate::cli::{
    AdminArgs, CheckpointCommand, CloneCommand, CompactArgs, EndpointsArgs, Failure, FinalizeArgs, GroupCommand,
    InitArgs, MemberCommand, StatusArgs, TransferArgs, print,
};
use crate::proto::mainstay::v1 as pb;
use crate::status::{Health, Status, hex};
use pb::admin_client::AdminClient;
use pb::store_client::StoreClient;

/// Wait between two tries of `init`.
const INIT_RETRY: Duration = Duration::from_millis(250);

/// How long what takes as long as there is data waits at least: the answer comes when all is written.
pub(crate) const WORK_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Opens a connection to one `HOST:PORT`.
///
/// # Errors
/// A usage failure for an address that is none, another for one that does not answer.
pub async fn connect(address: &str, timeout: Duration) -> Result<Channel, Failure> {
    let endpoint = endpoint(address, timeout)?;
    let channel = endpoint.connect().await;
    channel.map_err(|e| Failure::other(format!("no connection: {} address={address}", deepest(&e))))
}

/// How to reach one `HOST:PORT`.
pub(crate) fn endpoint(address: &str, timeout: Duration) -> Result<Endpoint, Failure> {
    let address = address.trim();
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint =
        Endpoint::from_shared(uri).map_err(|_| Failure::usage(format!("not HOST:PORT found='{address}'")))?;
    Ok(endpoint.connect_timeout(timeout.min(Duration::from_secs(2))).timeout(timeout).tcp_nodelay(true))
}

fn deepest(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Connects to the first of `HOST:PORT,...` that answers.
pub(crate) async fn connect_any(addresses: &str, timeout: Duration) -> Result<Channel, Failure> {
    let mut last = Failure::usage("no address given");
    for address in addresses.split(',').filter(|address| !address.trim().is_empty()) {
        match connect(address, timeout).await {
            Ok(channel) => return Ok(channel),
            Err(failure) if failure.status() == 2 => return Err(failure),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

async fn admin_client(args: &AdminArgs) -> Result<AdminClient<Channel>, Failure> {
    Ok(AdminClient::new(connect_any(&args.admin, args.timeout.0).await?))
}

async fn store_client(args: &EndpointsArgs) -> Result<StoreClient<Channel>, Failure> {
    Ok(StoreClient::new(connect_any(&args.endpoints, args.timeout.0).await?))
}

/// The answer's message with what its code adds.
pub(crate) fn refused(status: tonic::Status) -> Failure {
    let hint = match status.code() {
        Code::Unavailable => " (try again: it was not done)",
        Code::Unknown => " (it may have been done: look before trying again)",
        Code::DeadlineExceeded | Code::Cancelled => " (no answer in time: look before trying again)",
        // A server that knows the call and what it does not offer says why.
        Code::Unimplemented if status.message().is_empty() => "the server does not know this (is it the right port?)",
        _ => "",
    };
    Failure::other(format!("{}{hint}", status.message()))
}

#[derive(Serialize)]
struct Initialised {
    cluster: String,
    members: Vec<String>,
}

pub(crate) async fn init(args: InitArgs) -> Result<(), Failure> {
    let deadline = Instant::now() + args.wait.0;
    let cluster = loop {
        let tried = init_once(&args).await;
        match tried {
            Ok(cluster) => break cluster,
            // Only what was certainly not done is tried again; a second try of what was done would succeed as well.
            Err((failure, retry)) if !retry || Instant::now() >= deadline => return Err(failure),
            Err(_) => tokio::time::sleep(INIT_RETRY).await,
        }
    };
    let done = Initialised { cluster: hex(&cluster), members: args.members };
    print(args.admin.json, &done, || format!("cluster {} of {}", done.cluster, done.members.join(", ")))
}

async fn init_once(args: &InitArgs) -> Result<Vec<u8>, (Failure, bool)> {
    let mut client = admin_client(&args.admin).await.map_err(|failure| {
        let retry = failure.status() != 2;
        (failure, retry)
    })?;
    let request = pb::InitRequest { members: args.members.clone() };
    match client.init(request).await {
        Ok(answer) => Ok(answer.into_inner().cluster.to_vec()),
        Err(status) => {
            let retry = matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded);
            Err((refused(status), retry))
        }
    }
}

/// Asks one admin port for its status.
pub(crate) async fn status_of(address: &str, timeout: Duration) -> Result<Status, Failure> {
    let mut client = AdminClient::new(connect(address, timeout).await?);
    let answer = client.status(pb::StatusRequest {}).await.map_err(refused)?.into_inner();
    parse_status(&answer.document)
}

/// Asks one client port for its status.
pub(crate) async fn store_status_of(address: &str, timeout: Duration) -> Result<Status, Failure> {
    let mut client = StoreClient::new(connect(address, timeout).await?);
    let answer = client.status(pb::StatusRequest {}).await.map_err(refused)?.into_inner();
    parse_status(&answer.document)
}

fn parse_status(document: &str) -> Result<Status, Failure> {
    serde_json::from_str(document).map_err(|e| Failure::other(format!("the status is of another version: {e}")))
}

pub(crate) async fn status(args: StatusArgs) -> Result<(), Failure> {
    let mut found = Vec::new();
    let mut failures = Vec::new();
    for address in args.admin.admin.split(',').filter(|address| !address.trim().is_empty()) {
        match status_of(address, args.admin.timeout.0).await {
            Ok(status) => found.push(status),
            Err(failure) if failure.status() == 2 => return Err(failure),
            Err(failure) => failures.push(failure.to_string()),
        }
    }
    print(args.admin.json, &found, || found.iter().map(Status::text).collect())?;
    if !failures.is_empty() {
        return Err(Failure::other(failures.join("\nmainstay: ")));
    }
    match found.iter().find(|status| status.health == Health::Bad) {
        Some(status) => Err(Failure::other(format!("a replica is not well member={}", status.member))),
        None => Ok(()),
    }
}

#[derive(Serialize)]
struct MemberRow {
    id: u64,
    name: String,
    peer_address: String,
    client_address: String,
    voter: bool,
    leader: bool,
    incarnation: String,
    site: String,
    priority: u32,
    witness: bool,
}

impl From<pb::Member> for MemberRow {
    fn from(member: pb::Member) -> Self {
        Self {
            id: member.id,
            name: member.name,
            peer_address: member.peer_address,
            client_address: member.client_address,
            voter: member.voter,
            leader: member.leader,
            incarnation: hex(&member.incarnation),
            site: member.site,
            priority: member.priority,
            witness: member.witness,
        }
    }
}

impl MemberRow {
    fn text(&self) -> String {
        let role = match (self.leader, self.voter, self.witness) {
            (true, ..) => "leader",
            (false, true, false) => "voter",
            (false, true, true) => "witness",
            (false, false, _) => "learner",
        };
        let Self { id, name, peer_address, client_address, site, .. } = self;
        // Without a priority a line is as it was before there were any.
        let priority = if self.priority == 0 { String::new() } else { format!("priority={}", self.priority) };
        let line = format!("{id:<20} {name:<16} {role:<8} {peer_address} {client_address} {site}");
        format!("{}\n", format!("{} {priority}", line.trim_end()).trim_end())
    }
}

async fn members(client: &mut AdminClient<Channel>) -> Result<Vec<MemberRow>, Failure> {
    let answer = client.list_members(pb::ListMembersRequest {}).await.map_err(refused)?.into_inner();
    Ok(answer.members.into_iter().map(MemberRow::from).collect())
}

/// The id of a member given by name or id.
async fn member_id(client: &mut AdminClient<Channel>, member: &str) -> Result<u64, Failure> {
    let members = members(client).await?;
    let found = members.iter().find(|m| m.name == member || m.id.to_string() == member);
    found.map(|m| m.id).ok_or_else(|| {
        let names: Vec<&str> = members.iter().map(|m| m.name.as_str()).collect();
        Failure::other(format!("no such member member={member} members={}", names.join(",")))
    })
}

pub(crate) async fn member(command: MemberCommand) -> Result<(), Failure> {
    match command {
        MemberCommand::Add { name, peer_address, learner, admin } => {
            let mut client = admin_client(&admin).await?;
            let request = pb::AddMemberRequest { name, peer_address, voter: !learner };
            let answer = client.add_member(request).await.map_err(refused)?.into_inner();
            let row = MemberRow::from(answer.member.unwrap_or_default());
            print(admin.json, &row, || row.text())
        }
        MemberCommand::Remove { member, admin } => {
            let mut client = admin_client(&admin).await?;
            let id = member_id(&mut client, &member).await?;
            client.remove_member(pb::RemoveMemberRequest { id }).await.map_err(refused)?;
            print(admin.json, &serde_json::json!({ "removed": id }), || format!("removed {member} id={id}"))
        }
        MemberCommand::Promote { member, admin } => {
            let mut client = admin_client(&admin).await?;
            let id = member_id(&mut client, &member).await?;
            client.promote_member(pb::PromoteMemberRequest { id }).await.map_err(refused)?;
            print(admin.json, &serde_json::json!({ "promoted": id }), || format!("promoted {member} id={id}"))
        }
        MemberCommand::Set { member, priority, site, admin } => {
            let mut client = admin_client(&admin).await?;
            let id = member_id(&mut client, &member).await?;
            let request = pb::SetMemberRequest { id, site: site.clone(), priority: priority.map(u32::from) };
            client.set_member(request).await.map_err(refused)?;
            let document = serde_json::json!({ "set": id, "priority": priority, "site": site });
            let priority = priority.map(|priority| format!(" priority={priority}")).unwrap_or_default();
            let site = site.map(|site| format!(" site={site}")).unwrap_or_default();
            print(admin.json, &document, || format!("set {member} id={id}{priority}{site}"))
        }
        MemberCommand::List { admin } => {
            let rows = members(&mut admin_client(&admin).await?).await?;
            print(admin.json, &rows, || rows.iter().map(MemberRow::text).collect())
        }
    }
}

pub(crate) async fn transfer_leader(args: TransferArgs) -> Result<(), Failure> {
    let mut client = admin_client(&args.admin).await?;
    let to = match &args.to {
        Some(member) => member_id(&mut client, member).await?,
        None => 0,
    };
    let leader = transfer(&mut client, to).await?;
    print(args.admin.json, &serde_json::json!({ "leader": leader }), || format!("leader id={leader}"))
}

pub(crate) async fn finalize(args: FinalizeArgs) -> Result<(), Failure> {
    let mut client = admin_client(&args.admin).await?;
    let version = client.finalize(pb::FinalizeRequest {}).await.map_err(refused)?.into_inner().version;
    print(args.admin.json, &serde_json::json!({ "cluster_version": version }), || format!("cluster version={version}"))
}

pub(crate) async fn transfer(client: &mut AdminClient<Channel>, to: u64) -> Result<u64, Failure> {
    let answer = client.transfer_leader(pb::TransferLeaderRequest { to }).await.map_err(refused)?;
    Ok(answer.into_inner().leader)
}

#[derive(Serialize)]
struct CheckpointRow {
    name: String,
    index: u64,
    created_ms: u64,
}

impl From<pb::Checkpoint> for CheckpointRow {
    fn from(checkpoint: pb::Checkpoint) -> Self {
        Self { name: checkpoint.name, index: checkpoint.index, created_ms: checkpoint.created_ms }
    }
}

pub(crate) async fn checkpoint(command: CheckpointCommand) -> Result<(), Failure> {
    let line = |row: &CheckpointRow| format!("{:<32} index={} created_ms={}\n", row.name, row.index, row.created_ms);
    match command {
        CheckpointCommand::Create { name, clone, endpoints } => {
            let mut client = store_client(&endpoints).await?;
            let request = pb::CreateCheckpointRequest { name, clone: clone.unwrap_or_default() };
            let answer = client.create_checkpoint(request).await.map_err(refused)?.into_inner();
            let row = CheckpointRow::from(answer.checkpoint.unwrap_or_default());
            print(endpoints.json, &row, || line(&row))
        }
        CheckpointCommand::List { endpoints } => {
            let mut client = store_client(&endpoints).await?;
            let answer = client.list_checkpoints(pb::ListCheckpointsRequest {}).await.map_err(refused)?.into_inner();
            let rows: Vec<CheckpointRow> = answer.checkpoints.into_iter().map(CheckpointRow::from).collect();
            print(endpoints.json, &rows, || rows.iter().map(line).collect())
        }
        CheckpointCommand::Drop { name, endpoints } => {
            let mut client = store_client(&endpoints).await?;
            client.drop_checkpoint(pb::DropCheckpointRequest { name: name.clone() }).await.map_err(refused)?;
            print(endpoints.json, &serde_json::json!({ "dropped": name }), || format!("dropped {name}"))
        }
    }
}

#[derive(Serialize)]
struct CloneRow {
    name: String,
    checkpoint: String,
    created_ms: u64,
}

impl From<pb::Clone> for CloneRow {
    fn from(clone: pb::Clone) -> Self {
        Self { name: clone.name, checkpoint: clone.checkpoint, created_ms: clone.created_ms }
    }
}

pub(crate) async fn clone(command: CloneCommand) -> Result<(), Failure> {
    let line =
        |row: &CloneRow| format!("{:<32} checkpoint={} created_ms={}\n", row.name, row.checkpoint, row.created_ms);
    match command {
        CloneCommand::Create { name, checkpoint, endpoints } => {
            let mut client = store_client(&endpoints).await?;
            let request = Request::new(pb::CreateCloneRequest { name, checkpoint });
            let answer = client.create_clone(request).await.map_err(refused)?.into_inner();
            let row = CloneRow::from(answer.clone.unwrap_or_default());
            print(endpoints.json, &row, || line(&row))
        }
        CloneCommand::List { endpoints } => {
            let mut client = store_client(&endpoints).await?;
            let answer = client.list_clones(pb::ListClonesRequest {}).await.map_err(refused)?.into_inner();
            let rows: Vec<CloneRow> = answer.clones.into_iter().map(CloneRow::from).collect();
            print(endpoints.json, &rows, || rows.iter().map(line).collect())
        }
        CloneCommand::Drop { name, endpoints } => {
            let mut client = store_client(&endpoints).await?;
            client.drop_clone(pb::DropCloneRequest { name: name.clone() }).await.map_err(refused)?;
            print(endpoints.json, &serde_json::json!({ "dropped": name }), || format!("dropped {name}"))
        }
    }
}

#[derive(Serialize)]
struct GroupRow {
    number: u64,
    name: String,
    role: String,
    term: u64,
    leader: Option<u64>,
    leader_name: Option<String>,
    last_log: u64,
    committed: u64,
    applied: u64,
}

impl From<pb::Group> for GroupRow {
    fn from(group: pb::Group) -> Self {
        Self {
            number: group.number,
            name: group.name,
            role: group.role,
            term: group.term,
            leader: Some(group.leader).filter(|leader| *leader != 0),
            leader_name: Some(group.leader_name).filter(|name| !name.is_empty()),
            last_log: group.last_log,
            committed: group.committed,
            applied: group.applied,
        }
    }
}

impl GroupRow {
    fn text(&self) -> String {
        let Self { number, name, role, term, leader_name, applied, .. } = self;
        let name = if name.is_empty() { "(the first)" } else { name };
        let leader = leader_name.as_deref().unwrap_or("none");
        format!("{number:<6} {name:<24} {role:<8} leader={leader} term={term} applied={applied}\n")
    }
}

pub(crate) async fn group(command: GroupCommand) -> Result<(), Failure> {
    match command {
        GroupCommand::Create { name, endpoints } => {
            let mut client = store_client(&endpoints).await?;
            let answer = client.create_group(pb::CreateGroupRequest { name }).await.map_err(refused)?.into_inner();
            let row = GroupRow::from(answer.group.unwrap_or_default());
            print(endpoints.json, &row, || row.text())
        }
        GroupCommand::List { endpoints } => {
            let mut client = store_client(&endpoints).await?;
            let answer = client.list_groups(pb::ListGroupsRequest {}).await.map_err(refused)?.into_inner();
            let rows: Vec<GroupRow> = answer.groups.into_iter().map(GroupRow::from).collect();
            print(endpoints.json, &rows, || rows.iter().map(GroupRow::text).collect())
        }
    }
}

#[derive(Serialize)]
struct Compacted {
    keyspace: Option<String>,
    before_bytes: u64,
    after_bytes: u64,
}

pub(crate) async fn compact(args: CompactArgs) -> Result<(), Failure> {
    let CompactArgs { keyspace, clone, endpoints } = args;
    let channel = connect_any(&endpoints.endpoints, endpoints.timeout.0.max(WORK_TIMEOUT)).await?;
    let request =
        pb::CompactRequest { keyspace: keyspace.clone().unwrap_or_default(), clone: clone.unwrap_or_default() };
    let answer = StoreClient::new(channel).compact(request).await.map_err(refused)?.into_inner();
    let pb::CompactResponse { before_bytes, after_bytes } = answer;
    print(endpoints.json, &Compacted { keyspace, before_bytes, after_bytes }, || {
        format!("compacted before_bytes={before_bytes} after_bytes={after_bytes}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_shown_by_what_it_does() {
        for (leader, voter, witness, role) in [
            (true, true, false, "leader"),
            (true, true, true, "leader"),
            (false, true, false, "voter"),
            (false, true, true, "witness"),
            (false, false, false, "learner"),
            (false, false, true, "learner"),
        ] {
            let row = MemberRow::from(pb::Member { id: 7, leader, voter, witness, ..pb::Member::default() });
            assert_eq!(row.text().split_whitespace().nth(1), Some(role), "{leader} {voter} {witness}");
            assert_eq!(serde_json::to_value(&row).expect("a document")["witness"], witness);
        }
    }
}
