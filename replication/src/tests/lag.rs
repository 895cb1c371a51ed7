//! Sites that lag: what is told, and what becomes of writes.

use std::time::Duration;

use super::cluster::*;
use super::guarantees::{Islands, cuttable};
use crate::{ErrorKind, SiteLagBound};

const VALUE_BYTES: usize = 4 << 10;
/// What an entry takes in the log at most.
const ENTRY_BYTES: u64 = 12 << 10;

/// Three voters at a site each, which may lag so far; and the leader and one that is cut off from the others.
async fn one_cut_off(bytes: u64, time: Duration, wait: bool) -> (Cluster, Islands, usize, usize) {
    let (mut cluster, islands) = cuttable(3).await;
    cluster.site_lag_bounds = (0..3).map(|i| SiteLagBound { site: format!("site-{i}"), bytes, time, wait }).collect();
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()).await.expect("born");
    let leader = cluster.leader().await;
    let away = (leader + 1) % 3;
    cluster.put(leader, "before", "v").await.expect("written");
    islands.cut(&cluster.cells[away].address);
    (cluster, islands, leader, away)
}

/// Bytes that the site of node `i` lacks, if that is more than it may.
fn beyond(cluster: &Cluster, leader: usize, i: usize) -> Option<u64> {
    let inner = &cluster.node(leader).inner;
    let lag = inner.awaited_site(&inner.running().expect("it runs"))?;
    assert_eq!(lag.site, format!("site-{i}"), "the others are not behind");
    Some(lag.bytes)
}

#[test]
fn writes_wait_for_a_site_that_lags_too_far_until_it_is_back_or_taken_out() {
    const BOUND: u64 = 256 << 10;
    for comes_back in [true, false] {
        run(async move {
            let (cluster, islands, leader, away) = one_cut_off(BOUND, Duration::from_secs(600), true).await;
            let mut written = 0;
            let lag = loop {
                if let Some(bytes) = beyond(&cluster, leader, away) {
                    break bytes;
                }
                cluster.put(leader, &format!("k{written}"), vec![7; VALUE_BYTES]).await.expect("within the bound");
                written += 1;
            };
            assert!(lag > BOUND && lag <= BOUND + ENTRY_BYTES, "{lag} bytes after {written} writes");
            let node = cluster.node(leader);
            let command = mainstay_engine::Command { time_ms: 0, body: put("waits", "v") }.encode().expect("short");
            let running = node.inner.running().expect("it runs");
            let refusal = node.inner.not_admitted(&running, &command);
            assert_eq!(refusal.kind(), ErrorKind::Unavailable);
            assert!(refusal.to_string().contains(&format!("site=site-{away} ")), "{refusal}");
            let waits = node.inner.admit_command(&running, &command);
            assert!(
                tokio::time::timeout(Duration::from_millis(300), waits).await.is_err(),
                "admitted beyond the bound"
            );
            if comes_back {
                islands.mend();
            } else {
                node.remove_member(cluster.node(away).status().id).await.expect("taken out");
            }
            cluster.put(leader, "after", "v").await.expect("written");
            assert_eq!(beyond(&cluster, leader, away), None);
            cluster.finish().await;
        });
    }
}

#[test]
fn a_site_that_lags_too_long_is_told_and_holds_up_nobody_without_being_asked_to() {
    run(async {
        let (cluster, islands, leader, away) = one_cut_off(u64::MAX, Duration::from_secs(1), false).await;
        cluster.put(leader, "k", "v").await.expect("written");
        let site = format!("site-{away}");
        let lags_long = |s: &crate::NodeStatus| s.site_lags.iter().any(|lag| lag.site == site && lag.beyond);
        let status = cluster.until(leader, lags_long).await;
        let (there, others): (Vec<_>, Vec<_>) = status.site_lags.iter().partition(|lag| lag.site == site);
        assert!(there[0].time > Duration::from_secs(1) && there[0].bytes > 0, "{there:?}");
        assert!(others.iter().all(|lag| !lag.beyond), "{others:?}");
        cluster.put(leader, "k", "w").await.expect("nothing waits");
        islands.mend();
        cluster.until(leader, |s| s.site_lags.len() == 3 && !lags_long(s)).await;
        cluster.finish().await;
    });
}
