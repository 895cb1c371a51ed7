//! Pairs that expire in a cluster to which nobody writes.

use std::time::Duration;

use mainstay_engine::{CommandBody, KeyspaceId, MAIN, WriteBatch, WriteOp};
use mainstay_io::Environment;

use super::cluster::*;
use crate::{Durability, ReadLevel, Write};

#[test]
fn a_quiet_cluster_lets_pairs_expire_and_is_quiet_again() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.clock = Some(Environment::system().clock);
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let leader = cluster.leader().await;
        let write = async |body| {
            let write = Write { body, durability: Durability::Quorum };
            let applied = cluster.node((leader + 1) % 3).write(write).await.expect("written");
            applied.response.expect("not refused")
        };
        let id = write(CommandBody::CreateExpiring { name: "sessions".into() }).await;
        let keyspace = KeyspaceId(u32::from_le_bytes(id[..].try_into().expect("an id")));
        let op = |key: &'static str, ttl_ms| WriteOp::PutFor { keyspace, key: key.into(), value: "v".into(), ttl_ms };
        let ops = vec![op("short", 1500), op("long", 4000)];
        write(CommandBody::Batch(WriteBatch { branch: MAIN, ops })).await;
        let found = async |i: usize, key: &str, level| {
            let snapshot = cluster.node(i).snapshot("main", level).await.expect("read");
            snapshot.get(keyspace, key.as_bytes()).await.expect("read").is_some()
        };
        for i in 0..3 {
            assert!(found(i, "short", ReadLevel::Linearizable).await, "n{i}");
        }
        for key in ["short", "long"] {
            for i in 0..3 {
                while found(i, key, ReadLevel::Local).await {
                    pause().await;
                }
            }
            assert!(!found(leader, key, ReadLevel::Linearizable).await);
        }
        // The last entry rotated the memtables, and the table that was made of them has ended: it goes as soon as it is there.
        let status = cluster.until(leader, |s| s.group.frozen_generations == 0).await;
        assert_eq!(status.group.tables, 0);
        // A little more than one entry a second, and none once nothing is to end.
        let entries = status.last_log.0;
        assert!(entries < 20, "{entries} entries");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(cluster.node(leader).status().last_log.0, entries);
        cluster.finish().await;
    });
}
