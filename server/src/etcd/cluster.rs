//! The Cluster service: members of the node as etcd shows them.
//!
//! etcd adds a member by its URLs alone; here a member has a name by which its process is known. It is the user part of the
//! peer URL (`http://NAME@host:port`), or else the first label of the host name, as pods of a StatefulSet have it.

use std::sync::Arc;

use mainstay_engine::MAIN;
use mainstay_replication::{ErrorKind, MemberInfo, MemberRole, NodeId, PeerAddress, ReadLevel};
use tonic::{Request, Response, Status};

use super::backend::Backend;
use super::context::Context;
use super::error::{Refusal, status_of};
use super::service::Core;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::cluster_server::Cluster;

pub(super) struct ClusterService<B>(pub(super) Arc<Core<B>>);

impl<B: Backend> ClusterService<B> {
    fn members(&self) -> Vec<pb::Member> {
        self.0.backend.status().members.iter().map(shown).collect()
    }

    async fn header(&self) -> Result<Option<pb::ResponseHeader>, Status> {
        self.0.header_now(MAIN).await
    }

    fn member(&self, id: u64) -> Result<MemberInfo, Status> {
        let members = self.0.backend.status().members;
        members.into_iter().find(|member| member.id.0 == id).ok_or_else(|| Refusal::MemberNotFound.into())
    }
}

fn shown(member: &MemberInfo) -> pb::Member {
    let url = |address: &str| match address {
        "" => Vec::new(),
        address => vec![format!("http://{address}")],
    };
    pb::Member {
        id: member.id.0,
        name: member.name.clone(),
        peer_ur_ls: url(&member.peer_address.0),
        client_ur_ls: url(&member.client_address),
        is_learner: member.role == MemberRole::Learner,
    }
}

/// Name and address of the one usable peer URL.
fn parse_peer_urls(urls: &[String]) -> Result<(Option<String>, PeerAddress), Refusal> {
    let [url] = urls else { return Err(Refusal::MemberBadUrls) };
    let rest = url.strip_prefix("http://").ok_or(Refusal::MemberBadUrls)?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (user, address) = match rest.split_once('@') {
        Some((user, address)) => (Some(user), address),
        None => (None, rest),
    };
    let (host, port) = address.rsplit_once(':').ok_or(Refusal::MemberBadUrls)?;
    let bad_host = host.is_empty() || host.contains(['/', '?', '#', '@']);
    if bad_host || port.parse::<u16>().is_err() || user.is_some_and(str::is_empty) {
        return Err(Refusal::MemberBadUrls);
    }
    let is_ip = host.starts_with('[') || host.parse::<std::net::IpAddr>().is_ok();
    let name = match user {
        Some(user) => Some(user.to_owned()),
        None if is_ip => None,
        None => host.split('.').next().map(str::to_owned),
    };
    Ok((name, PeerAddress(address.to_owned())))
}

#[tonic::async_trait]
impl<B: Backend> Cluster for ClusterService<B> {
    async fn member_add(
        &self,
        request: Request<pb::MemberAddRequest>,
    ) -> Result<Response<pb::MemberAddResponse>, Status> {
        let core = &self.0;
        Context::of(core, request.metadata())?;
        let request = request.into_inner();
        let (name, address) = parse_peer_urls(&request.peer_ur_ls)?;
        let name = name.ok_or_else(|| {
            Status::invalid_argument(format!(
                "{}: a member needs a name, given as http://NAME@host:port",
                Refusal::MemberBadUrls.message()
            ))
        })?;
        if core.backend.status().members.iter().any(|member| member.peer_address == address || member.name == name) {
            return Err(Refusal::PeerUrlExist.into());
        }
        let added = core.backend.add_member(&name, address, !request.is_learner).await;
        let added = added.map_err(|error| match error.kind() {
            // There is a leader, so what does not answer is the process to be added: it has to run first.
            ErrorKind::Unavailable if core.facts().leader.is_some() => {
                tracing::warn!(%error, member = name, "a member was not added");
                Refusal::MemberNotEnoughStarted.into()
            }
            _ => status_of(&error),
        })?;
        Ok(Response::new(pb::MemberAddResponse {
            header: self.header().await?,
            member: Some(shown(&added)),
            members: self.members(),
        }))
    }

    async fn member_remove(
        &self,
        request: Request<pb::MemberRemoveRequest>,
    ) -> Result<Response<pb::MemberRemoveResponse>, Status> {
        Context::of(&self.0, request.metadata())?;
        let member = self.member(request.into_inner().id)?;
        self.0.backend.remove_member(member.id).await.map_err(|error| status_of(&error))?;
        Ok(Response::new(pb::MemberRemoveResponse { header: self.header().await?, members: self.members() }))
    }

    async fn member_update(
        &self,
        request: Request<pb::MemberUpdateRequest>,
    ) -> Result<Response<pb::MemberUpdateResponse>, Status> {
        Context::of(&self.0, request.metadata())?;
        let request = request.into_inner();
        let (_, address) = parse_peer_urls(&request.peer_ur_ls)?;
        let member = self.member(request.id)?;
        self.0.backend.update_member(member.id, address).await.map_err(|error| status_of(&error))?;
        Ok(Response::new(pb::MemberUpdateResponse { header: self.header().await?, members: self.members() }))
    }

    async fn member_list(
        &self,
        request: Request<pb::MemberListRequest>,
    ) -> Result<Response<pb::MemberListResponse>, Status> {
        Context::of(&self.0, request.metadata())?;
        if request.into_inner().linearizable {
            let barrier = self.0.backend.read_barrier(ReadLevel::Linearizable).await;
            barrier.map_err(|error| status_of(&error))?;
        }
        Ok(Response::new(pb::MemberListResponse { header: self.header().await?, members: self.members() }))
    }

    async fn member_promote(
        &self,
        request: Request<pb::MemberPromoteRequest>,
    ) -> Result<Response<pb::MemberPromoteResponse>, Status> {
        Context::of(&self.0, request.metadata())?;
        let member = self.member(request.into_inner().id)?;
        if member.role != MemberRole::Learner {
            return Err(Refusal::MemberNotLearner.into());
        }
        let promoted = self.0.backend.promote_member(NodeId(member.id.0)).await;
        promoted.map_err(|error| match error.kind() {
            // A learner that has not caught up is the one reason that is no failure of the cluster.
            ErrorKind::Invalid => Refusal::LearnerNotReady.into(),
            _ => status_of(&error),
        })?;
        Ok(Response::new(pb::MemberPromoteResponse { header: self.header().await?, members: self.members() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_url_gives_name_and_address() {
        let check = |url: &str, expect: Option<(Option<&str>, &str)>| {
            let parsed = parse_peer_urls(&[url.to_owned()]);
            let expect = expect
                .map(|(name, address)| (name.map(str::to_owned), PeerAddress(address.to_owned())))
                .ok_or(Refusal::MemberBadUrls);
            assert_eq!(parsed, expect, "{url}");
        };
        check("http://n3@127.0.0.1:2380", Some((Some("n3"), "127.0.0.1:2380")));
        check("http://mainstay-3.mainstay.ns.svc:2380", Some((Some("mainstay-3"), "mainstay-3.mainstay.ns.svc:2380")));
        check("http://[::1]:2380/", Some((None, "[::1]:2380")));
        check("http://127.0.0.1:2380", Some((None, "127.0.0.1:2380")));
        for bad in
            ["127.0.0.1:2380", "https://a:1", "http://a", "http://:1", "http://a:99999", "http://@a:1", "http://a/b:1"]
        {
            check(bad, None);
        }
        assert_eq!(parse_peer_urls(&[]), Err(Refusal::MemberBadUrls));
    }
}
