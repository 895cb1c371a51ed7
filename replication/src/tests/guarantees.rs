//! What each durability and each read level survives, and what it may lose: docs/replication.md, cut for cut.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_engine::{ClientToken, LogIndex};
use mainstay_io::sim::SimClock;
use mainstay_io::{BoxFuture, Clock};

use super::cluster::{Cluster, pause, put, run};
use super::disturb::{Disturb, Outbound, disturbed};
use crate::{
    CommitToken, Durability, Envelope, Error, ErrorKind, PeerAddress, ReadLevel, Result, TcpTransport, Transport, Write,
};

/// Nodes that nobody reaches and that reach nobody, by address.
#[derive(Clone, Default)]
pub(super) struct Islands(Arc<Mutex<BTreeSet<PeerAddress>>>);

impl Islands {
    pub(super) fn cut(&self, address: &PeerAddress) {
        self.0.lock().expect("not poisoned").insert(address.clone());
    }

    pub(super) fn mend(&self) {
        self.0.lock().expect("not poisoned").clear();
    }

    fn between(&self, a: &PeerAddress, b: &PeerAddress) -> bool {
        let islands = self.0.lock().expect("not poisoned");
        islands.contains(a) || islands.contains(b)
    }
}

impl Disturb for Islands {
    fn call(&self, tcp: &TcpTransport, outbound: Outbound) -> BoxFuture<Result<Envelope>> {
        let (islands, from, to) = (self.clone(), tcp.local_address(), outbound.address.clone());
        let call = outbound.send(tcp);
        Box::pin(async move {
            if islands.between(&from, &to) {
                return Err(Error::new(ErrorKind::Unavailable, "cut off"));
            }
            let answer = call.await;
            if islands.between(&from, &to) {
                return Err(Error::new(ErrorKind::Indeterminate, "cut off before the answer"));
            }
            answer
        })
    }
}

pub(super) async fn cuttable(count: usize) -> (Cluster, Islands) {
    let islands = Islands::default();
    let mut cluster = Cluster::blank(count).await;
    cluster.wrap = disturbed(islands.clone());
    (cluster, islands)
}

/// Three voters at site-0 to site-2.
async fn three() -> (Cluster, Islands) {
    let (mut cluster, islands) = cuttable(3).await;
    cluster.start_all().await;
    cluster.node(0).init(&cluster.names()).await.expect("born");
    (cluster, islands)
}

async fn write(cluster: &Cluster, i: usize, key: &str, durability: Durability) -> Result<LogIndex> {
    let applied = cluster.node(i).write(Write { body: put(key, "x"), durability }).await?;
    applied.response.expect("a put is not refused");
    Ok(applied.index)
}

fn site(i: usize) -> Durability {
    Durability::Site(format!("site-{i}"))
}

fn kind<T>(result: Result<T>) -> Option<ErrorKind> {
    result.err().map(|e| e.kind())
}

/// Which volumes hold the entry, each looked at while the others are away, as if they were lost.
async fn holders(cluster: &mut Cluster, index: LogIndex) -> Vec<usize> {
    for i in 0..3 {
        cluster.kill(i).await;
    }
    let mut found = Vec::new();
    for i in 0..3 {
        cluster.start(i).await;
        let last = cluster.node(i).inner.log.last().map_or(0, |last| last.index);
        found.extend((last >= index.0).then_some(i));
        cluster.kill(i).await;
    }
    found
}

#[test]
fn all_is_on_every_volume_and_quorum_may_miss_one() {
    run(async {
        let (mut cluster, islands) = three().await;
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        // Through a follower too: it asks the leader whether the level holds.
        write(&cluster, away, "k0", Durability::All).await.expect("written");
        let all = write(&cluster, leader, "k1", Durability::All).await.expect("written");
        assert_eq!(holders(&mut cluster, all).await, [0, 1, 2], "any one volume is enough");

        cluster.start_all().await;
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        islands.cut(&cluster.cells[away].address);
        let quorum = write(&cluster, leader, "k2", Durability::Quorum).await.expect("written");
        let held = holders(&mut cluster, quorum).await;
        assert_eq!(held.len(), 2);
        assert!(!held.contains(&away), "lost with the other two");
    });
}

/// A voter that is away holds up who asks for all, and the answer says that the write may be there, which it is.
#[test]
fn what_a_level_waits_for_holds_up_nobody_else() {
    run(async {
        let (cluster, islands) = three().await;
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        islands.cut(&cluster.cells[away].address);
        let before = cluster.node(leader).status().last_log;
        assert_eq!(
            kind(write(&cluster, leader, "k", Durability::Site("nowhere".into())).await),
            Some(ErrorKind::Invalid)
        );
        assert_eq!(cluster.node(leader).status().last_log, before, "what cannot be reached is not begun");
        let here = (leader + 2) % 3;
        let waits = futures_util::future::join3(
            write(&cluster, leader, "all", Durability::All),
            write(&cluster, here, "there", site(away)),
            async {
                for k in 0..20 {
                    write(&cluster, leader, &format!("k{k}"), Durability::Quorum).await.expect("written");
                    write(&cluster, leader, &format!("s{k}"), site(here)).await.expect("that site is there");
                }
            },
        );
        let (all, there, ()) = waits.await;
        assert_eq!((kind(all), kind(there)), (Some(ErrorKind::Indeterminate), Some(ErrorKind::Indeterminate)));
        for key in ["all", "there", "k19", "s19"] {
            let value = cluster.get(here, key, ReadLevel::Linearizable).await.expect("read");
            assert_eq!(value.as_deref(), Some(&b"x"[..]), "{key} is committed");
        }
        // Once it is back, what is committed can be waited for at the level.
        islands.mend();
        let index = cluster.node(leader).status().committed;
        let token = CommitToken { term: 0, index };
        cluster.node(leader).wait(token, Durability::All).await.expect("all have it");
        cluster.finish().await;
    });
}

#[test]
fn a_site_has_what_was_written_for_it_and_a_learner_is_one_too() {
    run(async {
        let (mut cluster, islands) = cuttable(4).await;
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()[..3]).await.expect("born");
        let leader = cluster.leader().await;
        let address = cluster.cells[3].address.clone();
        let learner = cluster.node(leader).add_member("n3", address.clone(), false).await.expect("added");
        assert_eq!(learner.site, "site-3");
        write(&cluster, leader, "k", site(3)).await.expect("the learner has it");
        cluster.node(leader).set_member_site(learner.id, "afar").await.expect("labelled anew");
        assert_eq!(kind(write(&cluster, leader, "k", site(3)).await), Some(ErrorKind::Invalid));
        let through = (leader + 1) % 3;
        // So that it has heard of the new label.
        cluster.get(through, "k", ReadLevel::Linearizable).await.expect("read");
        let index = write(&cluster, through, "k", Durability::Site("afar".into())).await.expect("written");
        let last = cluster.node(3).inner.log.last().expect("a log").index;
        assert!(last >= index.0, "durable there before the answer");

        // A quorum does not wait for it: cut off, it misses what the others have.
        islands.cut(&address);
        let index = write(&cluster, leader, "k", Durability::Quorum).await.expect("written");
        assert!(cluster.node(3).inner.log.last().expect("a log").index < index.0);
        islands.mend();

        // A voter's site, with all other volumes lost.
        let index = write(&cluster, leader, "k", site(1)).await.expect("written");
        assert!(holders(&mut cluster, index).await.contains(&1));
    });
}

#[test]
fn a_local_write_is_lost_with_the_leadership_and_nobody_has_read_it() {
    run(async {
        let (cluster, islands) = three().await;
        let leader = cluster.leader().await;
        let (other, third) = ((leader + 1) % 3, (leader + 2) % 3);
        let told = cluster.node(other).write_local(put("k", "lost")).await.expect_err("not the leader");
        let name = format!("client-of-n{leader}");
        let id = cluster.node(leader).status().id;
        assert_eq!((told.kind(), told.leader()), (ErrorKind::NotLeader, Some(&(id, name))), "it says where to go");

        islands.cut(&cluster.cells[leader].address);
        let token = cluster.node(leader).write_local(put("k", "lost")).await.expect("durable here");
        assert_eq!(cluster.get(leader, "k", ReadLevel::Local).await.expect("read"), None, "not readable before");
        while let Err(error) = cluster.put(other, "k", "kept").await {
            assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Indeterminate), "{error}");
        }
        islands.mend();
        let waited = cluster.node(leader).wait(token, Durability::Quorum).await;
        assert_eq!(kind(waited), Some(ErrorKind::Indeterminate));
        for i in [leader, other, third] {
            let value = cluster.get(i, "k", ReadLevel::Linearizable).await.expect("read");
            assert_eq!(value.as_deref(), Some(&b"kept"[..]), "node={i}");
        }
        cluster.finish().await;
    });
}

/// The power of the leader fails, and it leads again: its log is longer than that of who did not hear of the write.
#[test]
fn a_local_write_survives_the_leader_that_leads_again() {
    run(async {
        let (mut cluster, _) = three().await;
        let leader = cluster.leader().await;
        let (other, third) = ((leader + 1) % 3, (leader + 2) % 3);
        cluster.kill(other).await;
        cluster.kill(third).await;
        cluster.node(leader).write_local(put("k", "kept")).await.expect("durable here");
        cluster.kill(leader).await;
        cluster.start(leader).await;
        cluster.start(other).await;
        let value = cluster.get(other, "k", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(&b"kept"[..]));
        cluster.start(third).await;
        cluster.finish().await;
    });
}

/// A wall clock that jumps an hour forth and back at every look.
struct Jumping {
    steady: SimClock,
    looks: AtomicU64,
}

impl Clock for Jumping {
    fn now(&self) -> Duration {
        self.steady.now()
    }

    fn unix(&self) -> Duration {
        let forth = self.looks.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
        self.steady.unix() + Duration::from_secs(if forth { 3600 } else { 0 })
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        self.steady.sleep(duration)
    }
}

const HOUR: Duration = Duration::from_secs(3600);
const MOMENT: Duration = Duration::from_millis(1);

async fn read(cluster: &Cluster, i: usize, level: ReadLevel) -> Result<Option<String>> {
    let value = cluster.get(i, "k", level).await?;
    Ok(value.map(|v| String::from_utf8_lossy(&v).into_owned()))
}

async fn check(cluster: &Cluster, i: usize, cases: &[(ReadLevel, Option<&str>)]) {
    // Together, since each that fails waits as long as it may.
    let reads = cases.iter().map(|(level, expect)| async move {
        let found = read(cluster, i, level.clone()).await;
        match (found, expect) {
            (Ok(found), Some(expect)) => assert_eq!(found.as_deref(), Some(*expect), "node={i} {level:?}"),
            (Err(error), None) => assert_eq!(error.kind(), ErrorKind::Unavailable, "node={i} {level:?} {error}"),
            (found, _) => panic!("node={i} {level:?} found={found:?}"),
        }
    });
    futures_util::future::join_all(reads).await;
}

/// Every level on a leader, a follower and a learner; then on each of them cut off, where the levels that promise something
/// of the others answer `Unavailable` and the rest show what was there. The wall clocks jump all the while.
#[test]
fn reads_keep_their_promise_on_every_role_across_a_cut() {
    run(async {
        let (mut cluster, islands) = cuttable(4).await;
        let jumping = Jumping { steady: SimClock::new(Duration::from_secs(1_700_000_000)), looks: AtomicU64::new(0) };
        cluster.clock = Some(Arc::new(jumping));
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()[..3]).await.expect("born");
        let leader = cluster.leader().await;
        let (follower, third, learner) = ((leader + 1) % 3, (leader + 2) % 3, 3);
        cluster.node(leader).add_member("n3", cluster.cells[3].address.clone(), false).await.expect("added");

        let first = cluster.put(leader, "k", "1").await.expect("written");
        for i in [leader, follower, learner] {
            let levels = [
                (ReadLevel::Linearizable, Some("1")),
                (ReadLevel::Lease, Some("1")),
                (ReadLevel::AtLeast(first), Some("1")),
                (ReadLevel::Stale(MOMENT), Some("1")),
                (ReadLevel::Stale(HOUR), Some("1")),
            ];
            check(&cluster, i, &levels).await;
            check(&cluster, i, &[(ReadLevel::Local, Some("1"))]).await;
        }

        islands.cut(&cluster.cells[follower].address);
        let second = cluster.put(leader, "k", "2").await.expect("written");
        let cut_off = [
            (ReadLevel::Stale(HOUR), Some("1")),
            (ReadLevel::Local, Some("1")),
            (ReadLevel::AtLeast(first), Some("1")),
            (ReadLevel::Stale(MOMENT), None),
            (ReadLevel::Linearizable, None),
            (ReadLevel::Lease, None),
            (ReadLevel::AtLeast(second), None),
        ];
        check(&cluster, follower, &cut_off).await;
        check(&cluster, learner, &[(ReadLevel::Stale(MOMENT), Some("2")), (ReadLevel::Lease, Some("2"))]).await;
        islands.mend();
        check(&cluster, follower, &[(ReadLevel::Stale(MOMENT), Some("2"))]).await;

        // The leader is cut off, and another one takes writes: a lease that outlived its term would show the past.
        let leader = cluster.leader().await;
        let other = if leader == third { follower } else { third };
        check(&cluster, leader, &[(ReadLevel::Linearizable, Some("2")), (ReadLevel::Lease, Some("2"))]).await;
        islands.cut(&cluster.cells[leader].address);
        let lost = cluster.put(leader, "k", "lost");
        let taken = async {
            while let Err(error) = cluster.put(other, "k", "3").await {
                assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Indeterminate), "{error}");
            }
            let cut_off = [
                (ReadLevel::Lease, None),
                (ReadLevel::Linearizable, None),
                (ReadLevel::Stale(MOMENT), None),
                (ReadLevel::Stale(HOUR), Some("2")),
                (ReadLevel::Local, Some("2")),
            ];
            check(&cluster, leader, &cut_off).await;
            check(&cluster, other, &[(ReadLevel::Lease, Some("3")), (ReadLevel::Stale(MOMENT), Some("3"))]).await;
        };
        let (lost, ()) = futures_util::future::join(lost, taken).await;
        // It stands in a log, so nobody here can say that it was not applied.
        assert_eq!(kind(lost), Some(ErrorKind::Indeterminate));
        islands.mend();
        for i in 0..4 {
            while read(&cluster, i, ReadLevel::Linearizable).await.is_err() {
                pause().await;
            }
            check(&cluster, i, &[(ReadLevel::Lease, Some("3")), (ReadLevel::Stale(MOMENT), Some("3"))]).await;
        }
        cluster.finish().await;
    });
}

/// A counter of a state machine would show it; here the second write between shows it: a request whose answer was lost is
/// proposed again by its client, through another node, behind a failover, and does not undo what came after it.
#[test]
fn a_request_with_a_token_applies_once_through_failovers() {
    run(async {
        let (mut cluster, islands) = three().await;
        let client = [9; 16];
        for round in 1..=4_u64 {
            let leader = cluster.leader().await;
            let (other, third) = ((leader + 1) % 3, (leader + 2) % 3);
            let token = ClientToken { client, sequence: round };
            let request = |value: &str| Write { body: put("k", value.to_owned()), durability: Durability::Quorum };
            // The client hears nothing: its node is cut off in the middle, on one side of the commit or the other.
            let node = cluster.node(leader);
            let first = node.write_once(token, request(&format!("first {round}")));
            let address = cluster.cells[leader].address.clone();
            let cut = async {
                for _ in 0..(round - 1) * 400 {
                    tokio::task::yield_now().await;
                }
                islands.cut(&address);
            };
            let heard =
                futures_util::future::join(tokio::time::timeout(Duration::from_millis(300), first), cut).await.0;
            // Tried again elsewhere until it is answered.
            let again = loop {
                match cluster.node(other).write_once(token, request(&format!("first {round}"))).await {
                    Ok(applied) => break applied,
                    Err(error) => {
                        assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Indeterminate), "{error}")
                    }
                }
            };
            again.response.expect("applied once");
            cluster.put(third, "k", format!("second {round}")).await.expect("written");
            println!("round {round}: the first answer was {}", if heard.is_ok() { "heard" } else { "lost" });
            islands.mend();
            // And once more, through who was cut off, and after all lost power.
            if round % 2 == 0 {
                for i in 0..3 {
                    cluster.kill(i).await;
                }
                cluster.start_all().await;
            }
            let applied = loop {
                match cluster.node(leader).write_once(token, request(&format!("first {round}"))).await {
                    Ok(applied) => break applied,
                    Err(error) => {
                        assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Indeterminate), "{error}")
                    }
                }
            };
            applied.response.expect("the same answer");
            for i in 0..3 {
                let value = cluster.get(i, "k", ReadLevel::Linearizable).await.expect("read");
                assert_eq!(value.as_deref(), Some(format!("second {round}").as_bytes()), "node={i} round={round}");
            }
        }
        let old = ClientToken { client, sequence: 1 };
        let write = Write { body: put("k", "old"), durability: Durability::Quorum };
        let refused = cluster.node(0).write_once(old, write).await.expect("logged").response.expect_err("too late");
        assert_eq!(refused.kind(), mainstay_engine::ErrorKind::Invalid);
        cluster.finish().await;
    });
}

/// `Unavailable` is a promise too: what was answered so is nowhere.
#[test]
fn a_write_through_a_node_that_is_cut_off_is_unavailable_and_not_applied() {
    run(async {
        let (cluster, islands) = three().await;
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        islands.cut(&cluster.cells[away].address);
        let refused = cluster.put(away, "refused", "x").await;
        assert_eq!(kind(refused), Some(ErrorKind::Unavailable));
        islands.mend();
        let found: BTreeMap<usize, bool> = {
            let mut found = BTreeMap::new();
            for i in 0..3 {
                let value = cluster.get(i, "refused", ReadLevel::Linearizable).await.expect("read");
                found.insert(i, value.is_some());
            }
            found
        };
        assert!(found.values().all(|f| !f), "{found:?}");
        cluster.finish().await;
    });
}
