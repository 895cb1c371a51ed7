//! Volumes that went back behind what their members had promised, and processes with a copy of another's volume.

use super::cluster::{Cluster, run};
use super::heal::{all_there, place, rot, written};
use crate::ReadLevel;
use crate::receipts::Receipt;
use crate::types::log_id;

/// What is put under a member.
#[derive(Clone, Copy, PartialEq)]
enum Copied {
    Leader,
    Follower,
    /// A follower, and an entry of the copy rotted too.
    Rotten,
}

/// A copy from before the last writes. Nobody else stops for it.
#[test]
fn a_member_whose_volume_went_back_fetches_what_it_had_promised() {
    for copied in [Copied::Leader, Copied::Follower, Copied::Rotten] {
        run(async move {
            let mut cluster = Cluster::born(3).await;
            let before = written(&cluster, 20).await;
            let leader = cluster.leader().await;
            let ill = if copied == Copied::Leader { leader } else { (leader + 1) % 3 };
            let (copy, at) = (cluster.cells[ill].media.images(), place(&cluster, ill, before - 10));
            let last = written(&cluster, 40).await;
            cluster.kill(ill).await;
            cluster.cells[ill].media.restore(copy);
            if copied == Copied::Rotten {
                rot(&cluster, ill, &[at]);
            }
            cluster.start(ill).await;
            cluster.until(ill, |s| s.leader.is_some() && s.last_log.0 >= last).await;
            assert_eq!(cluster.node(ill).status().log_heal.went_back, 1);
            for other in (0..3).filter(|i| *i != ill) {
                let status = cluster.node(other).status();
                assert_eq!((status.failure, status.log_heal.went_back), (None, 0), "n{other}");
            }
            cluster.put(ill, "k040", "v40").await.expect("written");
            all_there(&cluster, 41).await;
            // What it promised is durable here again.
            cluster.kill(ill).await;
            cluster.start(ill).await;
            cluster.until(ill, |s| s.leader.is_some()).await;
            assert_eq!(cluster.node(ill).status().log_heal.went_back, 0);
            cluster.finish().await;
        });
    }
}

/// Who remembers did not answer at the start: the member is told when it denies, and leaves service rather than to vote.
#[test]
fn a_member_that_is_told_of_a_promise_that_it_denies_leaves_service() {
    run(async {
        let cluster = Cluster::born(3).await;
        let last = written(&cluster, 5).await;
        let node = cluster.node((cluster.leader().await + 1) % 3);
        let term = node.status().term;
        let kept = Receipt { term, last: Some(log_id(term, last)) };
        assert!(!node.inner.told_of(kept).await, "it has that entry");
        assert!(node.status().failure.is_none());
        let denied = Receipt { term: term + 7, last: None };
        assert!(node.inner.told_of(denied).await);
        let status = node.status();
        assert_eq!((status.role.as_str(), status.log_heal.went_back), ("failed", 1));
        assert!(status.failure.expect("says why").contains("start the process again"));
        cluster.finish().await;
    });
}

/// The fourth process runs on a copy of the volume of a member that is dead.
async fn in_the_place_of_another() -> (Cluster, usize) {
    let (mut cluster, original) = with_a_spare().await;
    cluster.kill(original).await;
    let copy = cluster.cells[original].media.images();
    cluster.cells[3].media.restore(copy);
    cluster.start(3).await;
    (cluster, original)
}

/// Three members with twenty writes, a fourth process, and the member whose volume is copied under it.
async fn with_a_spare() -> (Cluster, usize) {
    let mut cluster = Cluster::blank(4).await;
    for i in 0..3 {
        cluster.start(i).await;
    }
    cluster.node(0).init(&cluster.names()[..3]).await.expect("born");
    written(&cluster, 20).await;
    let original = (cluster.leader().await + 1) % 3;
    (cluster, original)
}

#[test]
fn a_process_with_a_copy_of_the_volume_of_another_stands_back() {
    run(async {
        let (mut cluster, original) = with_a_spare().await;
        let copy = cluster.cells[original].media.images();
        cluster.cells[3].media.restore(copy);
        cluster.start(3).await;
        let status = cluster.node(3).status();
        assert_eq!((status.role.as_str(), status.id), ("twin", cluster.node(original).status().id));
        let address = &cluster.cells[original].address.0;
        assert!(status.failure.expect("says why").contains(address), "and names the other process");
        assert!(cluster.node(3).read_barrier(ReadLevel::Linearizable).await.is_err());
        assert!(cluster.put(3, "k", "v").await.is_err());
        // The original goes on, and so do the others with it.
        cluster.kill((original + 1) % 3).await;
        cluster.put(original, "k020", "v20").await.expect("two of three");
        cluster.start((original + 1) % 3).await;
        cluster.until((original + 1) % 3, |s| s.leader.is_some()).await;
        cluster.kill(3).await;
        all_there(&cluster, 21).await;
        cluster.finish().await;
    });
}

/// The original comes back while a copy of its volume runs in its place: the copy leaves, whoever was first.
#[test]
fn a_process_that_runs_in_the_place_of_another_leaves_when_that_is_back() {
    run(async {
        let (mut cluster, original) = in_the_place_of_another().await;
        cluster.until(3, |s| s.role == "follower").await;
        cluster.start(original).await;
        cluster.until(3, |s| s.role == "twin").await;
        cluster.kill(3).await;
        cluster.until(original, |s| s.leader.is_some()).await;
        cluster.put(original, "k020", "v20").await.expect("written");
        all_there(&cluster, 21).await;
        cluster.finish().await;
    });
}

/// The copy has run in the place of the original for so long that the members know it by its address: what it has acknowledged
/// meanwhile the original lacks, so the original leaves.
#[test]
fn a_process_that_comes_back_when_another_has_taken_its_address_stands_back() {
    run(async {
        let (mut cluster, original) = in_the_place_of_another().await;
        let there = cluster.cells[3].address.clone();
        cluster.until(3, |s| s.members.iter().any(|member| member.peer_address == there)).await;
        cluster.put(3, "k020", "v20").await.expect("written");
        cluster.start(original).await;
        cluster.until(original, |s| s.role == "twin").await;
        cluster.kill(original).await;
        all_there(&cluster, 21).await;
        cluster.finish().await;
    });
}
