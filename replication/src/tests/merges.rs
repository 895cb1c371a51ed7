//! Members that lack a merge operator: they leave service before they write what they could not read, and lose nothing.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_engine::{
    CommandBody, MAIN, MergeOperator, MergeOperators, MergeRefused, OperatorId, WriteBatch, WriteOp,
};

use super::cluster::*;
use crate::{Durability, ErrorKind, ReadLevel, Write};

/// Keeps the last operand.
struct Last;

impl Last {
    const ID: OperatorId = OperatorId::new_static("last", 2);
}

impl MergeOperator for Last {
    fn id(&self) -> OperatorId {
        Self::ID
    }

    fn merge(&self, _: &[u8], value: &mut Option<Vec<u8>>, operand: &[u8]) -> Result<(), MergeRefused> {
        *value = Some(operand.to_vec());
        Ok(())
    }
}

fn registered() -> MergeOperators {
    let mut operators = MergeOperators::default();
    operators.add(Arc::new(Last)).expect("a good name");
    operators
}

/// Three members, of which the last lacks the operator and does not lead.
async fn cluster() -> Cluster {
    let mut cluster = Cluster::blank(3).await;
    (cluster.memtable_bytes, cluster.entry_cache_bytes) = (128 << 10, 64 << 10);
    cluster.merge_operators = vec![registered(), registered()];
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()).await.expect("born");
    cluster.lead(0).await;
    cluster
}

async fn write(cluster: &Cluster, body: CommandBody) {
    let applied = cluster.node(0).write(Write { body, durability: Durability::Quorum }).await.expect("written");
    applied.response.expect("not refused");
}

async fn give_and_merge(cluster: &Cluster) {
    write(cluster, CommandBody::SetOperator { name: "default".into(), operator: Last::ID }).await;
    for operand in ["1", "2"] {
        let op = WriteOp::Merge { keyspace: DEFAULT, key: "merged".into(), operand: operand.into() };
        write(cluster, CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![op] })).await;
    }
}

/// It has left service with the name of what it lacks, and is there to say so.
async fn until_it_fails(cluster: &Cluster, i: usize) {
    let failure = cluster.until(i, |s| s.role == "failed").await.failure.expect("it says why");
    assert!(failure.contains("operator=last version=2 versions_registered=none"), "{failure}");
    assert_eq!(cluster.put(i, "k", "x").await.expect_err("it left service").kind(), ErrorKind::Closed);
}

/// The last member fails, and goes on when it is started with the operator.
async fn fails_until_it_has_it(cluster: &mut Cluster) {
    until_it_fails(cluster, 2).await;
    cluster.kill(2).await;
    cluster.merge_operators.push(registered());
    cluster.start(2).await;
    reads(cluster, 2).await;
}

async fn reads(cluster: &Cluster, i: usize) {
    for (key, value) in [("before", "v"), ("merged", "2")] {
        let found = cluster.get(i, key, ReadLevel::Linearizable).await.expect("read");
        assert_eq!(found, Some(Bytes::from(value)), "{key}");
    }
}

#[test]
fn a_member_without_the_operator_leaves_service_and_goes_on_once_it_has_it() {
    run(async {
        let mut cluster = cluster().await;
        cluster.put(2, "before", "v").await.expect("written");
        give_and_merge(&cluster).await;
        until_it_fails(&cluster, 2).await;
        reads(&cluster, 1).await;
        // Nothing but the log has it here: the node opens, and comes to the same entry.
        cluster.kill(2).await;
        cluster.start(2).await;
        fails_until_it_has_it(&mut cluster).await;
        // Now the manifest has it: without, the node does not open.
        let applied = cluster.node(2).status().group.applied;
        write(&cluster, CommandBody::Rotate).await;
        cluster.until(2, |s| s.group.flushed > applied).await;
        cluster.stop(2).await;
        cluster.merge_operators.pop();
        let error = cluster.try_start(2).await.expect_err("it lacks the operator");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("keyspace=default operator=last version=2"), "{error}");
        cluster.merge_operators.push(registered());
        cluster.start(2).await;
        reads(&cluster, 2).await;
        cluster.finish().await;
    });
}

/// The state of another member is not taken over by who could not read it; it stays as it was, and asks again.
#[test]
fn a_snapshot_with_an_operator_is_for_who_has_it() {
    run(async {
        let mut cluster = cluster().await;
        cluster.put(2, "before", "v").await.expect("written");
        let last = cluster.node(2).status().last_log.0;
        cluster.kill(2).await;
        give_and_merge(&cluster).await;
        // Enough for the log to be cut behind what the member has.
        for k in 0..100 {
            cluster.put(0, &format!("k{k}"), vec![0_u8; 32 << 10]).await.expect("written");
        }
        while cluster.node(0).inner.log.purged().is_none_or(|id| id.index <= last) {
            pause().await;
        }
        cluster.start(2).await;
        fails_until_it_has_it(&mut cluster).await;
        cluster.finish().await;
    });
}
