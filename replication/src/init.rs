//! The birth of a cluster.
//!
//! # Invariants
//! - B1. A cluster is born by `init` alone, over members that are all reachable and all blank.
//! - B2. Phase one mints an id and has every member promise to take no other for [`PROMISE`]; phase two has each make its
//!   identity durable, the initiator last; then the initiator writes the first membership. So whatever a crash leaves,
//!   the same call finds members of at most one unfinished cluster, and goes on with that.
//!
//! # Crash
//!
//! | Members found | Does |
//! |---|---|
//! | all blank | mints an id, goes on |
//! | some hold identities of one cluster, nobody its log | goes on with that id |
//! | somebody holds the log of a cluster of these very members | returns its id |
//! | somebody holds the log of a cluster of other members | `Foreign` |
//! | identities of two clusters | `Foreign` |
//! | data without an identity | `Invalid` |

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use mainstay_engine::Identity;
use openraft::errors::{InitializeError, RaftError};
use openraft_rt::Instant;

use crate::network::method;
use crate::node::{INIT_IDS, Inner, Phase};
use crate::types::Member;
use crate::wire::{Reader, Writer, decode_result};
use crate::{Envelope, Error, ErrorKind, Hello, PeerAddress, Result, Runtime};

/// How long a promised member refuses another `init`.
const PROMISE: Duration = Duration::from_secs(30);
/// How long one request of `init` may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long `init` tries to reach a member.
const REACH_WAIT: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long `init` waits for the first leader before it returns.
const LEADER_WAIT: Duration = Duration::from_secs(5);

const BLANK: [u8; 16] = [0; 16];

/// A cluster id that this blank node has promised to take, or none other, for a while.
pub(crate) struct Promise<R: Runtime> {
    /// The incarnation of the initiator: it alone may change its mind.
    by: [u8; 16],
    cluster: [u8; 16],
    until: R::Instant,
}

/// What a member says in phase one.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prepared {
    pub(crate) member: Member,
    pub(crate) cluster: [u8; 16],
    pub(crate) node: u64,
    /// Names of the members of the cluster whose log it holds.
    pub(crate) formed: Vec<String>,
}

impl Prepared {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.member(&self.member).id(&self.cluster).u64(self.node).strings(&self.formed);
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        Ok(Self { member: reader.member()?, cluster: reader.id()?, node: reader.u64()?, formed: reader.strings()? })
    }
}

/// What phase one found, reduced to what to do. Pure, so that a table of cases tests it.
#[derive(Debug, PartialEq)]
enum Plan {
    /// Go on to phase two under this id.
    Adopt([u8; 16]),
    /// Somebody holds an identity of this unfinished cluster: ask all to promise it.
    Again([u8; 16]),
    /// The cluster exists.
    Made([u8; 16]),
}

fn plan(names: &[String], promised: [u8; 16], found: &[Prepared]) -> Result<Plan> {
    let foreign = |message: String| Err(Error::new(ErrorKind::Foreign, message));
    if let Some(holder) = found.iter().find(|p| !p.formed.is_empty()) {
        let mut formed = holder.formed.clone();
        formed.sort();
        formed.dedup();
        return if formed == names {
            Ok(Plan::Made(holder.cluster))
        } else {
            foreign(format!("a cluster of other members exists members={}", formed.join(",")))
        };
    }
    for (name, prepared) in names.iter().zip(found) {
        if prepared.member.name != *name {
            let (found, address) = (&prepared.member.name, &prepared.member.peer_address);
            return foreign(format!("another node answers for a member name={name} found={found} address={address}"));
        }
    }
    let clusters: std::collections::BTreeSet<_> = found.iter().map(|p| p.cluster).filter(|c| *c != BLANK).collect();
    if clusters.len() > 1 {
        return foreign("the members belong to more than one cluster".into());
    }
    let Some(cluster) = clusters.first().copied() else { return Ok(Plan::Adopt(promised)) };
    for (i, prepared) in found.iter().enumerate() {
        if prepared.cluster != BLANK && prepared.node != i as u64 + 1 {
            return foreign(format!("a member of an unfinished cluster of other members name={}", names[i]));
        }
    }
    Ok(if cluster == promised { Plan::Adopt(cluster) } else { Plan::Again(cluster) })
}

impl<R: Runtime> Inner<R> {
    pub(crate) async fn init(self: &Arc<Self>, members: &[String]) -> Result<[u8; 16]> {
        let _one = self.initiating.acquire().await.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))?;
        let result = self.init_one(members).await;
        if result.is_err() {
            // Another initiator need not wait for what came to nothing here.
            let mut promise = self.promise.lock().expect("nothing panics while it holds this lock");
            if promise.as_ref().is_some_and(|p| p.by == self.engine.incarnation()) {
                *promise = None;
            }
        }
        result
    }

    async fn init_one(self: &Arc<Self>, members: &[String]) -> Result<[u8; 16]> {
        let invalid = |message: String| Error::new(ErrorKind::Invalid, message);
        let mut names = members.to_vec();
        names.sort();
        names.dedup();
        if names.is_empty() || names.len() as u64 > INIT_IDS {
            return Err(invalid(format!("a cluster has 1 to {INIT_IDS} members count={}", names.len())));
        }
        if !names.contains(&self.options.name) {
            let named = names.join(",");
            return Err(invalid(format!(
                "init is sent to one of the members that it names name={} members={named}",
                self.options.name
            )));
        }
        let mut addresses = Vec::new();
        for name in &names {
            let address = if *name == self.options.name {
                self.transport.local_address()
            } else {
                let found = self.options.peers.get(name).cloned();
                found.ok_or_else(|| invalid(format!("no address of a member is known name={name}")))?
            };
            addresses.push(address);
        }
        let mut cluster = match self.engine.identity().cluster {
            BLANK => self.options.environment.random.id(),
            mine => mine,
        };
        // Twice at most: the second time all promise the id that the first time found.
        for _ in 0..2 {
            let found = self.prepare_all(&names, &addresses, cluster).await?;
            match plan(&names, cluster, &found)? {
                Plan::Made(cluster) => return Ok(cluster),
                Plan::Again(found) => cluster = found,
                Plan::Adopt(cluster) => {
                    let voters: Vec<_> =
                        found.iter().map(|p| p.member.info(p.node, crate::MemberRole::Voter)).collect();
                    crate::witness::may_be(voters.iter())?;
                    let asked: Vec<_> = names.iter().cloned().zip(addresses.iter().cloned()).collect();
                    let (version, _) = self.common_version(&asked).await?;
                    self.adopt_all(&names, &addresses, cluster, &found).await?;
                    self.write_first_membership(&found, version).await?;
                    tracing::info!(members = %names.join(","), "a cluster is born");
                    return Ok(cluster);
                }
            }
        }
        Err(Error::new(ErrorKind::Unavailable, "the members changed during init: try again"))
    }

    async fn prepare_all(
        self: &Arc<Self>,
        names: &[String],
        addresses: &[PeerAddress],
        cluster: [u8; 16],
    ) -> Result<Vec<Prepared>> {
        let calls = names.iter().zip(addresses).map(|(name, address)| async move {
            if *name == self.options.name {
                return self.prepare(self.engine.incarnation(), cluster);
            }
            let deadline = R::Instant::now() + REACH_WAIT;
            loop {
                let mut body = Writer::new();
                body.id(&cluster);
                let answer = self.call_address(address, method::PREPARE, body.finish()).await;
                match answer.and_then(|bytes| decode_result(&bytes, Prepared::read)) {
                    Ok(prepared) => return Ok(prepared),
                    Err(e) => {
                        // The question may be asked again, so a broken connection leaves nothing in doubt.
                        let kind = match e.kind() {
                            ErrorKind::Indeterminate => ErrorKind::Unavailable,
                            kind => kind,
                        };
                        // It may be starting this moment, as this node did.
                        if kind != ErrorKind::Unavailable || R::Instant::now() >= deadline {
                            return Err(Error::new(kind, format!("member cannot take part name={name}: {e}")));
                        }
                    }
                }
                R::sleep(RETRY_PAUSE).await;
            }
        });
        let answers = join_all(calls).await;
        // Who holds the log of a cluster decides, whether the others can be reached or not.
        if let Some(Ok(holder)) = answers.iter().find(|a| matches!(a, Ok(p) if !p.formed.is_empty())) {
            return Ok(vec![holder.clone()]);
        }
        answers.into_iter().collect()
    }

    async fn adopt_all(
        self: &Arc<Self>,
        names: &[String],
        addresses: &[PeerAddress],
        cluster: [u8; 16],
        found: &[Prepared],
    ) -> Result<()> {
        let others =
            names.iter().zip(addresses).zip(found).enumerate().map(|(i, ((name, address), prepared))| async move {
                let node = i as u64 + 1;
                if *name == self.options.name {
                    return Ok(());
                }
                let mut body = Writer::new();
                body.id(&cluster).u64(node).id(&prepared.member.incarnation);
                let answer = self.call_address(address, method::ADOPT, body.finish()).await;
                answer.and_then(|bytes| decode_result(&bytes, |_| Ok(()))).map_err(|e| {
                    let kind = if e.kind() == ErrorKind::Foreign { ErrorKind::Foreign } else { ErrorKind::Unavailable };
                    Error::new(kind, format!("member did not take its identity, call init again name={name}: {e}"))
                })
            });
        join_all(others).await.into_iter().collect::<Result<Vec<()>>>()?;
        let mine = names.iter().position(|n| *n == self.options.name).expect("checked by init");
        self.adopt(Identity { cluster, node: mine as u64 + 1 }).await
    }

    async fn write_first_membership(self: &Arc<Self>, found: &[Prepared], version: u16) -> Result<()> {
        let running = self.running()?;
        let version = crate::version::carried(version);
        let member = |p: &Prepared| Member { version, ..p.member.clone() };
        let members: BTreeMap<u64, Member> = found.iter().enumerate().map(|(i, p)| (i as u64 + 1, member(p))).collect();
        match running.raft.initialize(members).await {
            // Done before, by a call that did not live to say so.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(error) => {
                return Err(Error::new(ErrorKind::Internal, format!("the first membership was refused: {error}")));
            }
        }
        // A convenience: what follows an `init` at once finds a leader.
        let deadline = R::Instant::now() + LEADER_WAIT;
        while self.leader_of(&running).is_none() {
            if R::timeout_at(deadline, self.changed.notified()).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Phase one at a member.
    pub(crate) fn prepare(&self, by: [u8; 16], cluster: [u8; 16]) -> Result<Prepared> {
        let identity = self.engine.identity();
        if identity.cluster != BLANK {
            let formed = self.members().into_iter().map(|m| m.name).collect();
            return Ok(Prepared { member: self.me(), cluster: identity.cluster, node: identity.node, formed });
        }
        match self.phase() {
            Phase::Waiting => {}
            other => return Err(Error::new(ErrorKind::Unavailable, format!("the node is not ready phase={other:?}"))),
        }
        if self.has_data() {
            return Err(Error::new(ErrorKind::Invalid, "the volume holds data and no identity"));
        }
        let mut promise = self.promise.lock().expect("nothing panics while it holds this lock");
        let now = R::Instant::now();
        if promise.as_ref().is_some_and(|p| p.by != by && now < p.until) {
            return Err(Error::new(ErrorKind::Unavailable, "another init is at work"));
        }
        *promise = Some(Promise { by, cluster, until: now + PROMISE });
        Ok(Prepared { member: self.me(), ..Prepared::default() })
    }

    /// Phase two at a member; also how a leader tells a node that it was added.
    pub(crate) async fn serve_adopt(
        self: &Arc<Self>,
        from: &Hello,
        cluster: [u8; 16],
        node: u64,
        incarnation: [u8; 16],
    ) -> Result<()> {
        if incarnation != self.engine.incarnation() {
            return Err(Error::new(ErrorKind::Foreign, "the identity is meant for another volume"));
        }
        let identity = Identity { cluster, node };
        if self.engine.identity() != identity {
            if self.engine.identity() == Identity::default() && self.has_data() {
                return Err(Error::new(ErrorKind::Invalid, "the volume holds data and no identity"));
            }
            let promised = {
                let promise = self.promise.lock().expect("nothing panics while it holds this lock");
                promise.as_ref().is_some_and(|p| p.cluster == cluster && R::Instant::now() < p.until)
            };
            if !promised && from.cluster != cluster {
                return Err(Error::new(ErrorKind::Unavailable, "this cluster id was not promised"));
            }
        }
        self.adopt(identity).await
    }

    /// Asks whoever listens at an address.
    pub(crate) async fn call_address(&self, address: &PeerAddress, method: u8, body: Bytes) -> Result<Bytes> {
        let request = Envelope { method, body };
        Ok(self.transport.call(address.clone(), None, request, CALL_TIMEOUT).await?.body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, cluster: u8, node: u64, formed: &[&str]) -> Prepared {
        Prepared {
            member: Member { name: name.into(), ..Member::default() },
            cluster: [cluster; 16],
            node,
            formed: formed.iter().map(|s| (*s).into()).collect(),
        }
    }

    fn check(found: &[Prepared], expect: Result<Plan, ErrorKind>) {
        let names: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        assert_eq!(plan(&names, [9; 16], found).map_err(|e| e.kind()), expect, "{found:?}");
    }

    #[test]
    fn every_row_of_the_crash_table() {
        let all = ["c", "b", "a"];
        let blank = |n| member(n, 0, 0, &[]);
        check(&[blank("a"), blank("b"), blank("c")], Ok(Plan::Adopt([9; 16])));
        check(&[blank("a"), member("b", 3, 2, &[]), blank("c")], Ok(Plan::Again([3; 16])));
        check(&[member("a", 9, 1, &[]), member("b", 9, 2, &[]), blank("c")], Ok(Plan::Adopt([9; 16])));
        check(&[blank("a"), member("b", 3, 2, &all), member("c", 3, 3, &[])], Ok(Plan::Made([3; 16])));
        check(&[blank("a"), member("b", 3, 2, &["b", "d"]), blank("c")], Err(ErrorKind::Foreign));
        check(&[member("a", 3, 1, &[]), member("b", 4, 2, &[]), blank("c")], Err(ErrorKind::Foreign));
        check(&[member("a", 3, 2, &[]), blank("b"), blank("c")], Err(ErrorKind::Foreign));
        check(&[blank("a"), blank("x"), blank("c")], Err(ErrorKind::Foreign));
    }
}
