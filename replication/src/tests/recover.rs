//! Clusters that have lost their majority for good: what a plan says, what is refused, and what the lost ones can still do.

use std::sync::Arc;

use mainstay_engine::LogIndex;
use mainstay_io::Media;

use super::cluster::{Cluster, DEFAULT, put, run};
use super::environment;
use crate::recover::{RecoveryPlan, RecoveryVolume, examine, recover};
use crate::{Durability, Error, ErrorKind, NodeId, ReadLevel, Result, Write};

fn media(cluster: &Cluster, i: usize) -> Arc<dyn Media> {
    cluster.cells[i].media.open().expect("no process has it open")
}

async fn look(cluster: &Cluster, i: usize) -> RecoveryVolume {
    examine(media(cluster, i), &environment(), &format!("n{i}")).await.expect("it can be read")
}

async fn plan(cluster: &Cluster, survivor: usize, others: &[usize]) -> RecoveryPlan {
    let mut volumes = Vec::new();
    for i in others {
        volumes.push(look(cluster, *i).await);
    }
    RecoveryPlan::new(look(cluster, survivor).await, volumes).expect("volumes of one cluster")
}

async fn act(cluster: &Cluster, plan: &RecoveryPlan, survivor: usize, digest: &str) -> Result<RecoveryPlan> {
    let label = format!("n{survivor}");
    recover(media(cluster, survivor), &environment(), &label, plan.others.clone(), digest).await
}

fn refused(result: Result<RecoveryPlan>) -> (ErrorKind, String) {
    let error: Error = result.expect_err("refused");
    (error.kind(), error.to_string())
}

/// Three voters with `count` writes that every one has durably; then all lose power.
async fn three_dead(count: u64) -> (Cluster, LogIndex) {
    let mut cluster = Cluster::born(3).await;
    let mut last = LogIndex(0);
    for i in 0..count {
        let write = Write { body: put(&format!("k{i}"), format!("v{i}")), durability: Durability::All };
        last = cluster.node(0).write(write).await.expect("written").index;
    }
    for i in 0..3 {
        cluster.kill(i).await;
    }
    (cluster, last)
}

#[test]
fn one_of_three_goes_on_alone_with_all_that_it_has() {
    run(async {
        let (mut cluster, last) = three_dead(40).await;
        let plan = plan(&cluster, 1, &[]).await;
        let before = &plan.survivor;
        assert_eq!((before.node, before.members.len()), (NodeId(2), 3));
        assert!(before.last >= last && before.committed <= before.last && before.last_term <= before.term);
        assert_eq!(plan.removed().map(|m| m.id.0).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(plan.unread_voters(), [NodeId(1), NodeId(3)]);
        assert!(!plan.is_lossless(), "the others may have had more");
        assert_eq!(plan.uncertain().map(|(_, end)| end), Some(before.last), "nothing of it is in tables");
        let done = act(&cluster, &plan, 1, &plan.digest()).await.expect("recovered");
        assert_eq!(done, plan);

        cluster.start(1).await;
        assert_eq!(cluster.leader().await, 1);
        let status = cluster.node(1).status();
        assert_eq!((status.id, status.cluster), (before.node, before.cluster));
        assert_eq!(status.members.iter().map(|m| m.id).collect::<Vec<_>>(), [NodeId(2)]);
        assert!(status.term > before.term);
        for i in 0..40 {
            let value = cluster.get(1, &format!("k{i}"), ReadLevel::Linearizable).await.expect("read");
            assert_eq!(value.as_deref(), Some(format!("v{i}").as_bytes()));
        }
        cluster.put(1, "alone", "v").await.expect("it is its own majority");
        // It outlives a loss of power like any other.
        cluster.kill(1).await;
        cluster.start(1).await;
        cluster.leader().await;
        let value = cluster.get(1, "alone", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v".as_slice()));
        cluster.finish().await;
    });
}

#[test]
fn what_is_not_as_in_the_plan_is_refused_and_changes_nothing() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        cluster.put(0, "a", "v").await.expect("written");
        let leader = cluster.leader().await;
        let (behind, ahead) = ((leader + 1) % 3, (leader + 2) % 3);
        cluster.kill(behind).await;
        let last = cluster.put(leader, "b", "v").await.expect("written by the other two");
        cluster.until(ahead, |status| status.group.applied >= last).await;
        // A volume that a process has open is left alone.
        let open = cluster.cells[ahead].media.open();
        assert_eq!(open.err().map(|e| e.kind()), Some(mainstay_io::ErrorKind::Locked));
        cluster.kill(leader).await;
        cluster.kill(ahead).await;

        let alone = plan(&cluster, behind, &[]).await;
        let compared = plan(&cluster, behind, &[ahead]).await;
        assert_eq!(compared.further_ahead().map(|v| (v.node, v.last)), {
            let other = look(&cluster, ahead).await;
            Some((other.node, other.last))
        });
        assert!(!compared.is_lossless());
        let best = plan(&cluster, ahead, &[behind]).await;
        assert!(best.further_ahead().is_none() && best.is_lossless());
        assert_ne!(alone.digest(), compared.digest());
        assert_ne!(best.digest(), compared.digest());
        assert_eq!(plan(&cluster, ahead, &[behind]).await.digest(), best.digest(), "looking changes nothing");

        let (kind, message) = refused(act(&cluster, &compared, behind, &compared.digest()).await);
        assert!(kind == ErrorKind::Invalid && message.contains("goes further"), "{message}");
        let (kind, message) = refused(act(&cluster, &compared, behind, &alone.digest()).await);
        assert!(kind == ErrorKind::Invalid && message.contains("confirmed plan"), "{message}");
        let (kind, _) = refused(act(&cluster, &best, ahead, "0000000000000000").await);
        assert_eq!(kind, ErrorKind::Invalid);
        let twice = RecoveryPlan::new(best.survivor.clone(), vec![best.survivor.clone()]);
        assert_eq!(refused(twice).0, ErrorKind::Invalid);
        let mut foreign = best.others[0].clone();
        foreign.cluster = [9; 16];
        assert_eq!(refused(RecoveryPlan::new(best.survivor.clone(), vec![foreign])).0, ErrorKind::Foreign);
        assert_eq!(plan(&cluster, ahead, &[behind]).await, best, "nothing was written by what was refused");

        // One that has moved on since the plan is another volume.
        for i in [leader, ahead] {
            cluster.start(i).await;
        }
        let leader = cluster.leader().await;
        cluster.put(leader, "c", "v").await.expect("a majority is back");
        for i in cluster.running().collect::<Vec<_>>() {
            cluster.kill(i).await;
        }
        let (_, message) = refused(act(&cluster, &best, ahead, &best.digest()).await);
        assert!(message.contains("confirmed plan"), "{message}");
        let now = plan(&cluster, ahead, &[behind]).await;
        act(&cluster, &now, ahead, &now.digest()).await.expect("recovered");
        // Carried out, the plan is no plan any more.
        assert_eq!(refused(act(&cluster, &now, ahead, &now.digest()).await).0, ErrorKind::Invalid);
        // The others are no members in its eyes, and in theirs still are.
        let again = look(&cluster, ahead).await;
        assert_eq!(again.members.iter().map(|m| m.id).collect::<Vec<_>>(), [again.node]);
        assert!(again.last_term > now.survivor.term);
    });
}

#[test]
fn the_lost_ones_come_back_and_are_refused_and_go_idle() {
    run(async {
        let (mut cluster, _) = three_dead(5).await;
        let plan = plan(&cluster, 0, &[1, 2]).await;
        assert!(plan.is_lossless());
        act(&cluster, &plan, 0, &plan.digest()).await.expect("recovered");
        cluster.start(0).await;
        cluster.leader().await;
        let term = cluster.node(0).status().term;
        // One alone: no majority of the past, and nobody of the present listens.
        cluster.start(1).await;
        cluster.until(1, |status| status.role == "removed").await;
        // Two are a majority of the past: they lead each other until the first of them hears of the present.
        cluster.kill(1).await;
        cluster.start(1).await;
        cluster.start(2).await;
        for i in [1, 2] {
            cluster.until(i, |status| status.role == "removed").await;
            let error = cluster.put(i, "past", "v").await.expect_err("it takes part in nothing");
            assert_eq!(error.kind(), ErrorKind::Unavailable);
        }
        let status = cluster.node(0).status();
        assert_eq!((status.role.as_str(), status.term, status.members.len()), ("leader", term, 1));
        cluster.put(0, "present", "v").await.expect("undisturbed");
        let snapshot = cluster.node(0).snapshot("main", ReadLevel::Linearizable).await.expect("reads");
        assert_eq!(snapshot.get(DEFAULT, b"past").await.expect("read"), None);
        drop(snapshot);
        cluster.finish().await;
    });
}
