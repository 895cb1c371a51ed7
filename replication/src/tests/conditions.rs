//! Batches with conditions over three nodes: one outcome for each, whoever proposes it and whoever leads.

use mainstay_engine::{
    Applied, ClientToken, CommandBody, Condition, ConditionalBatch, LogIndex, MAIN, WriteBatch, WriteOp,
};

use super::cluster::*;
use crate::{Durability, ErrorKind, ReadLevel, Result, Write};

/// Adds 1 to a number that was read with this version.
fn add(seen: Option<(LogIndex, u64)>) -> CommandBody {
    let (keyspace, key) = (DEFAULT, "n".into());
    let condition = match seen {
        Some((version, _)) => Condition::Version { keyspace, key, version },
        None => Condition::Absent { keyspace, key },
    };
    let sum = seen.map_or(0, |(_, sum)| sum) + 1;
    let op = WriteOp::Put { keyspace: DEFAULT, key: "n".into(), value: sum.to_string().into() };
    let batch = WriteBatch { branch: MAIN, ops: vec![op] };
    CommandBody::BatchIf(ConditionalBatch { conditions: vec![condition], batch })
}

async fn read(cluster: &Cluster, i: usize) -> Result<Option<(LogIndex, u64)>> {
    let snapshot = cluster.node(i).snapshot("main", ReadLevel::Linearizable).await?;
    let found = snapshot.get_version(DEFAULT, b"n").await?;
    let number = |value: &[u8]| String::from_utf8_lossy(value).parse().expect("a number");
    Ok(found.map(|(version, value)| (version, number(&value))))
}

async fn write(cluster: &Cluster, i: usize, body: CommandBody) -> Result<LogIndex> {
    let Applied { index, response } = cluster.node(i).write(Write { body, durability: Durability::Quorum }).await?;
    response?;
    Ok(index)
}

/// What becomes of the request of a token, asked until it is known.
async fn settled(cluster: &Cluster, i: usize, token: ClientToken, body: CommandBody) -> Option<ErrorKind> {
    loop {
        let write = Write { body: body.clone(), durability: Durability::Quorum };
        let kind = match cluster.node(i).write_once(token, write).await {
            Ok(applied) => return applied.response.err().map(|error| error.kind()),
            Err(error) => error.kind(),
        };
        assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::Indeterminate | ErrorKind::NotLeader), "{kind:?}");
        pause().await;
    }
}

#[test]
fn one_of_many_that_compare_and_set_the_same_is_applied_through_whatever_node() {
    run(async {
        let cluster = Cluster::born(3).await;
        for round in 0..5_u64 {
            let seen = read(&cluster, 0).await.expect("a quorum");
            // Most of them share entries.
            let tries = (0..30).map(|n| write(&cluster, n % 3, add(seen)));
            let ended = futures_util::future::join_all(tries).await;
            assert_eq!(ended.iter().filter(|ended| ended.is_ok()).count(), 1, "{ended:?}");
            let refused = |ended: &Result<LogIndex>| ended.as_ref().is_err_and(|e| e.kind() == ErrorKind::Conflict);
            assert_eq!(ended.iter().filter(|ended| refused(ended)).count(), 29, "{ended:?}");
            let found = read(&cluster, 1).await.expect("a quorum");
            assert_eq!(found.map(|(_, sum)| sum), Some(round + 1));
            assert_eq!(found.map(|(version, _)| version), ended.into_iter().find_map(Result::ok));
        }
        cluster.finish().await;
    });
}

#[test]
fn at_local_durability_a_condition_has_no_answer() {
    run(async {
        let cluster = Cluster::born(3).await;
        let leader = cluster.leader().await;
        let last = cluster.node(leader).status().last_log;
        let error = cluster.node(leader).write_local(add(None)).await.expect_err("it is not known in time");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(cluster.node(leader).status().last_log, last, "nothing was proposed");
        cluster.finish().await;
    });
}

/// Adders with tokens go on while leadership goes round and a leader loses power: each outcome is told once, and the sum is the
/// number of those that were applied.
#[test]
fn no_outcome_is_lost_or_doubled_while_leaders_change() {
    run(async {
        let mut cluster = Cluster::born_with(3, 16 << 10).await;
        let mut applied = 0;
        for sequence in 0..60_u64 {
            if sequence % 15 == 7 {
                let next = (cluster.leader().await + 1) % 3;
                cluster.lead(next).await;
            }
            if sequence == 40 {
                let leader = cluster.leader().await;
                cluster.kill(leader).await;
                cluster.start(leader).await;
            }
            let i = (sequence % 3) as usize;
            let seen = loop {
                if let Ok(seen) = read(&cluster, i).await {
                    break seen;
                }
                pause().await;
            };
            // Every fourth is late: another came first.
            if sequence % 4 == 1 {
                let token = ClientToken { client: [4; 16], sequence };
                assert_eq!(settled(&cluster, i, token, add(seen)).await, None);
                applied += 1;
            }
            let token = ClientToken { client: [3; 16], sequence };
            let outcome = settled(&cluster, i, token, add(seen)).await;
            assert_eq!(outcome, (sequence % 4 == 1).then_some(ErrorKind::Conflict), "sequence={sequence}");
            applied += u64::from(outcome.is_none());
            let again = settled(&cluster, (i + 1) % 3, token, add(seen)).await;
            assert_eq!(again, outcome, "sequence={sequence}");
        }
        for i in 0..3 {
            let sum = read(&cluster, i).await.expect("a quorum").map(|(_, sum)| sum);
            assert_eq!(sum, Some(applied));
        }
        cluster.finish().await;
    });
}
