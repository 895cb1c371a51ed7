//! Bytes of tables from other members, for a replica whose own are damaged or missing.
//!
//! # Place
//! the engine asks through [`PeerTables`] from whatever task meets damage; a task of the node's runtime sends the requests
//! # Invariants
//! - H1. Nothing is trusted: the engine verifies what comes against its own manifest.
//! - H2. A replica that holds other tables than the log says serves no reads and leads nobody, until it has fetched them.
//! - H3. An install is proposed once a majority has made the same tables. When a majority made others the leader is the one
//!   that differs: it gives up what it made and leadership with it (H2). A majority that says nothing in time, for it is
//!   slow or away, holds nothing up, nor do voters that have all spoken and are no majority either way; a replica that finds itself to differ later does as H2 says.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use mainstay_engine::{JobId, TableId, TablePeers};
use mainstay_io::BoxFuture;
use openraft_rt::Instant;
use tokio::sync::{mpsc, oneshot};

use crate::network::method;
use crate::node::{Inner, Running};
use crate::state_machine::TABLE_READ_BYTES_MAX;
use crate::wire::{Reader, Writer, decode_result};
use crate::{Error, ErrorKind, MemberRole, NodeId, Result, Runtime};

/// Requests that wait at once; one more is refused, and its read fails as it would without peers.
const REQUESTS_MAX: usize = 256;
/// How long a member may take for a part of a table while a read waits for it.
const READ_TIMEOUT: Duration = Duration::from_secs(3);

/// A part of a table that is wanted.
struct Request {
    copy: usize,
    id: TableId,
    offset: u64,
    length: u64,
    done: oneshot::Sender<Result<Bytes>>,
}

/// The other members, as the engine asks them.
struct PeerTables<R: Runtime> {
    node: Weak<Inner<R>>,
    requests: mpsc::Sender<Request>,
}

impl<R: Runtime> TablePeers for PeerTables<R> {
    fn count(&self) -> usize {
        self.node.upgrade().map_or(0, |node| node.others().len())
    }

    fn read_table(
        &self,
        copy: usize,
        id: TableId,
        offset: u64,
        length: u64,
    ) -> BoxFuture<mainstay_engine::Result<Bytes>> {
        let (done, answer) = oneshot::channel();
        let sent = self.requests.try_send(Request { copy, id, offset, length, done });
        Box::pin(async move {
            let kind = ErrorKind::Unavailable;
            if sent.is_err() {
                return Err(mainstay_engine::Error::new(
                    kind,
                    "too many reads ask other members, or the node is closed",
                ));
            }
            match answer.await {
                Ok(Ok(bytes)) => Ok(bytes),
                Ok(Err(error)) => {
                    // Damage there is told from a member that cannot be reached: other copies make up for it.
                    let kind = match error.kind() {
                        damage @ (ErrorKind::Corrupt | ErrorKind::Io | ErrorKind::NotFound) => damage,
                        _ => kind,
                    };
                    Err(mainstay_engine::Error::new(kind, error.to_string()))
                }
                Err(_) => Err(mainstay_engine::Error::new(kind, "the node is closed")),
            }
        })
    }
}

/// How long a leader waits for others to have made the tables that it is about to propose.
const AGREE_WAIT: Duration = Duration::from_secs(1);
/// The same once somebody has made others.
const DISPUTE_WAIT: Duration = Duration::from_secs(10);
/// Between two times that it asks.
const AGREE_PAUSE: Duration = Duration::from_millis(20);
/// Digests of one answer at most.
const DIGESTS_MAX: usize = 1 << 16;

/// What the voters made of a job, this one included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agreement {
    /// A majority made the same.
    Same,
    /// A majority made the same, and it is not what this node made, or each of a majority made something else.
    Other,
    /// All have said what they made, and no majority made the same or something else.
    Split,
    /// Too few have said anything.
    Open,
}

/// Counts what the other voters said: equal to ours or not, or nothing.
fn agreement(voters: usize, said: &[Option<bool>]) -> Agreement {
    let majority = voters / 2 + 1;
    let same = 1 + said.iter().filter(|s| **s == Some(true)).count();
    let other = said.iter().filter(|s| **s == Some(false)).count();
    if same >= majority {
        Agreement::Same
    } else if other >= majority {
        Agreement::Other
    } else if said.iter().all(Option::is_some) {
        Agreement::Split
    } else {
        Agreement::Open
    }
}

pub(crate) fn write_digests(out: &mut Writer, digests: Option<Vec<u128>>) {
    out.option(digests, |w, digests| {
        w.u32(digests.len().min(DIGESTS_MAX) as u32);
        for digest in digests.iter().take(DIGESTS_MAX) {
            w.id(&digest.to_le_bytes());
        }
    });
}

pub(crate) fn read_digests(reader: &mut Reader) -> Result<Option<Vec<u128>>> {
    reader.option(|reader| {
        let count = reader.u32()? as usize;
        if count > DIGESTS_MAX {
            return Err(Error::new(ErrorKind::Corrupt, "too many digests"));
        }
        let mut digests = Vec::new();
        for _ in 0..count {
            digests.push(u128::from_le_bytes(reader.id()?));
        }
        Ok(digests)
    })
}

impl<R: Runtime> Inner<R> {
    /// H3: whether to propose what a job made here.
    pub(crate) async fn agree(&self, running: &Running<R>, job: JobId) -> bool {
        let Some(mine) = self.group.output_digests(job) else { return true };
        let voters: Vec<NodeId> = self.holders().filter(|m| m.role == MemberRole::Voter).map(|m| m.id).collect();
        let others: Vec<NodeId> = voters.iter().copied().filter(|id| id.0 != running.id).collect();
        let mut said: Vec<Option<bool>> = vec![None; others.len()];
        let began = R::Instant::now();
        loop {
            let disputed = said.contains(&Some(false));
            let deadline = began + if disputed { DISPUTE_WAIT } else { AGREE_WAIT };
            match agreement(voters.len(), &said) {
                Agreement::Same => return true,
                Agreement::Other => {
                    self.group.give_up_output(job);
                    return false;
                }
                // Nobody has anything to add.
                Agreement::Split => {
                    let message = "replicas made different tables, none of them a majority: those of the leader count";
                    tracing::error!(id = running.id, %job, ?said, message);
                    return true;
                }
                Agreement::Open if R::Instant::now() >= deadline || self.closing.is_set() => return true,
                Agreement::Open => {}
            }
            let left = deadline.saturating_duration_since(R::Instant::now());
            let mine = &mine;
            let asked = others.iter().zip(&said).map(|(id, said)| async move {
                if said.is_some() {
                    return *said;
                }
                let mut body = Writer::new();
                body.u64(job.0);
                let answer = self.call_member(*id, method::DIGESTS, body.finish(), left).await;
                let theirs = answer.and_then(|bytes| decode_result(&bytes, read_digests)).ok().flatten();
                theirs.map(|theirs| theirs == *mine)
            });
            let heard = join_all(asked).await;
            said = heard;
            if said.iter().any(Option::is_none) {
                R::sleep(AGREE_PAUSE).await;
            }
        }
    }

    /// The other members, the leader first.
    fn others(&self) -> Vec<NodeId> {
        let running = self.running.read().expect("nothing panics while it holds this lock").clone();
        let Some(running) = running else { return Vec::new() };
        let leader = self.leader_of(&running);
        let mut ids: Vec<u64> = self.holders().map(|member| member.id.0).filter(|id| *id != running.id).collect();
        ids.sort_by_key(|id| (Some(*id) != leader, *id));
        ids.into_iter().map(NodeId).collect()
    }

    /// Lets the engine ask other members from here on.
    pub(crate) fn start_healing(self: &Arc<Self>) {
        let (requests, mut wanted) = mpsc::channel(REQUESTS_MAX);
        self.group.set_table_peers(Some(Arc::new(PeerTables { node: Arc::downgrade(self), requests })));
        let this = self.clone();
        self.spawn(async move {
            while let Some(request) = wanted.recv().await {
                let node = this.clone();
                this.spawn(async move {
                    let Request { copy, id, offset, length, done } = request;
                    // Who asked may have gone.
                    let _ = done.send(node.read_elsewhere(copy, id, offset, length).await);
                });
            }
        });
    }

    async fn read_elsewhere(&self, copy: usize, id: TableId, offset: u64, length: u64) -> Result<Bytes> {
        let to = self.others().get(copy).copied();
        let to = to.ok_or_else(|| Error::new(ErrorKind::Unavailable, "there is no such member any more"))?;
        let mut parts = Vec::new();
        let mut got = 0;
        while got < length {
            let part = (length - got).min(TABLE_READ_BYTES_MAX);
            let mut body = Writer::new();
            body.table_id(id).u64(offset + got).u64(part);
            let answer = self.call_member(to, method::TABLE_READ, body.finish(), READ_TIMEOUT).await?;
            let bytes = decode_result(&answer, Reader::bytes)?;
            if bytes.len() as u64 != part {
                return Err(Error::new(ErrorKind::Corrupt, format!("a peer sent a part of another length table={id}")));
            }
            self.fetched_bytes.fetch_add(part, std::sync::atomic::Ordering::Relaxed);
            got += part;
            parts.push(bytes);
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { parts.concat().into() })
    }

    /// H2: gives leadership away while its tables differ, and takes part again when they do not. Returns whether they differ.
    pub(crate) async fn stand_aside(self: &Arc<Self>, running: &Arc<Running<R>>, aside: bool) -> bool {
        let diverged = self.group.is_diverged();
        if diverged != aside {
            running.raft.runtime_config().elect(!diverged);
            if diverged {
                tracing::error!(
                    id = running.id,
                    "this replica holds other tables than the log says: it leaves service"
                );
            } else {
                tracing::info!(id = running.id, "this replica holds the tables that the log says: it returns");
            }
        }
        if diverged
            && self.leader_of(running) == Some(running.id)
            && let Err(error) = self.hand_over(running, None).await
        {
            tracing::warn!(%error, "leadership was not handed over");
        }
        diverged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_majority_decides_whose_tables_are_wrong() {
        let check = |voters, said: &[Option<bool>], expect| assert_eq!(agreement(voters, said), expect, "{said:?}");
        check(1, &[], Agreement::Same);
        check(2, &[None], Agreement::Open);
        check(2, &[Some(false)], Agreement::Split);
        check(3, &[Some(true), None], Agreement::Same);
        check(3, &[Some(true), Some(false)], Agreement::Same);
        check(3, &[Some(false), None], Agreement::Open);
        check(3, &[Some(false), Some(false)], Agreement::Other);
        check(4, &[Some(true), Some(false), None], Agreement::Open);
        check(4, &[Some(true), Some(false), Some(false)], Agreement::Split);
        check(5, &[Some(false), Some(false), None, Some(true)], Agreement::Open);
        check(5, &[Some(false), Some(false), Some(false), Some(true)], Agreement::Other);
    }

    #[test]
    fn digests_survive_the_wire() {
        for digests in [None, Some(vec![]), Some(vec![7, u128::MAX])] {
            let answer = crate::wire::encode_result(Ok(digests.clone()), write_digests);
            assert_eq!(decode_result(&answer, read_digests).expect("decodes"), digests);
        }
    }
}
