//! Three nodes in one process over TCP on loopback, each on simulated disks that can lose power.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{
    CommandBody, Engine, EngineSettings, GroupSettings, KeyspaceId, LogIndex, MAIN, MergeOperators, WriteBatch, WriteOp,
};
use mainstay_io::sim::{IoKind, SimMedia, SimOptions};
use mainstay_io::{BoxFuture, Clock, Environment};

use super::disturb::{Disturb, Outbound, disturbed};
use super::environment;
use crate::{
    Durability, Envelope, Error, ErrorKind, Hello, MemberRole, Node, NodeId, NodeOptions, NodeStatus, PeerAddress,
    ReadLevel, Result, TcpTransport, Transport, Write,
};

pub(super) const DEFAULT: KeyspaceId = KeyspaceId(0);
pub(super) const WAL_BYTES: u64 = 8 << 20;
const MEMTABLE_BYTES: u64 = 4 << 20;

/// Between a node and its sockets; the identity unless a test wants to disturb.
pub(super) type Wrap = Arc<dyn Fn(TcpTransport) -> Arc<dyn Transport> + Send + Sync>;

/// A process: its disks outlive it.
pub(super) struct Cell {
    pub(super) name: String,
    pub(super) media: SimMedia,
    pub(super) address: PeerAddress,
    life: Option<(Node, TcpTransport)>,
}

pub(super) struct Cluster {
    pub(super) cells: Vec<Cell>,
    peers: BTreeMap<String, PeerAddress>,
    pub(super) memtable_bytes: u64,
    pub(super) entry_cache_bytes: u64,
    /// Of the members in order; 0 for those behind its end.
    pub(super) priorities: Vec<u8>,
    /// Members that hold no data.
    pub(super) witnesses: Vec<usize>,
    pub(super) site_lag_bounds: Vec<crate::SiteLagBound>,
    /// What the members in order have registered; nothing of the embedder's for those behind its end.
    pub(super) merge_operators: Vec<MergeOperators>,
    crashes: u64,
    pub(super) wrap: Wrap,
    /// In the place of the clock of a test.
    pub(super) clock: Option<Arc<dyn Clock>>,
    pub(super) election_timeout: Duration,
}

pub(super) fn media(seed: u64) -> SimMedia {
    SimMedia::new(SimOptions { seed, capacity: 1 << 30, ..SimOptions::default() })
}

pub(super) fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(async { tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test ends") })
}

impl Cell {
    /// Closes the volume in order, without a word to the others.
    pub(super) async fn stop_quietly(&mut self) {
        let (node, _) = self.life.take().expect("it runs");
        node.close().await.expect("closes");
    }
}

impl Cluster {
    pub(super) async fn blank(count: usize) -> Self {
        let mut this = Self {
            cells: Vec::new(),
            peers: BTreeMap::new(),
            memtable_bytes: MEMTABLE_BYTES,
            entry_cache_bytes: 1 << 20,
            priorities: Vec::new(),
            witnesses: Vec::new(),
            site_lag_bounds: Vec::new(),
            merge_operators: Vec::new(),
            crashes: 0,
            wrap: Arc::new(|transport| Arc::new(transport)),
            clock: None,
            election_timeout: Duration::from_millis(300),
        };
        for i in 0..count {
            this.add_cell(i).await;
        }
        this
    }

    async fn add_cell(&mut self, i: usize) {
        let name = format!("n{i}");
        let media = media(i as u64);
        format_volume(&media, WAL_BYTES).await;
        let address = free_address().await;
        self.peers.insert(name.clone(), address.clone());
        self.cells.push(Cell { name, media, address, life: None });
    }

    /// Gives every process another address, and tells all of them that of `seed` and no other. None may run.
    pub(super) async fn move_all(&mut self, seed: usize) {
        self.peers.clear();
        for cell in &mut self.cells {
            cell.address = free_address().await;
        }
        self.peers.insert(self.cells[seed].name.clone(), self.cells[seed].address.clone());
    }

    pub(super) async fn start_all(&mut self) {
        for i in 0..self.cells.len() {
            self.start(i).await;
        }
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.cells.iter().map(|c| c.name.clone()).collect()
    }

    pub(super) async fn born(count: usize) -> Self {
        Self::born_with(count, MEMTABLE_BYTES).await
    }

    /// As [`Cluster::born`], with memtables of so many bytes.
    pub(super) async fn born_with(count: usize, memtable_bytes: u64) -> Self {
        let mut this = Self::blank(count).await;
        this.memtable_bytes = memtable_bytes;
        this.start_all().await;
        this.node(0).init(&this.names()).await.expect("born");
        this
    }

    pub(super) async fn try_start(&mut self, i: usize) -> Result<()> {
        let cell = &self.cells[i];
        let transport = loop {
            match TcpTransport::bind(&cell.address.0, None).await {
                Ok(transport) => break transport,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let mut found = Vec::new();
        let media = cell.media.open().expect("nobody else has it open");
        let settings = EngineSettings {
            memory_bytes: 64 << 20,
            background_tasks: 1,
            wal_in_flight_max: 3,
            scrub_bytes_per_second: 0,
            scrub_pause: mainstay_engine::SCRUB_PAUSE,
            log_holes: true,
        };
        let environment = match &self.clock {
            Some(clock) => Environment { clock: clock.clone(), ..environment() },
            None => environment(),
        };
        let engine = Engine::open(media, environment.clone(), settings, &mut |record| {
            found.push(record);
            Ok(())
        })
        .await?;
        let options = NodeOptions {
            name: cell.name.clone(),
            client_address: format!("client-of-{}", cell.name),
            site: format!("site-{i}"),
            priority: self.priorities.get(i).copied().unwrap_or(0),
            witness: self.witnesses.contains(&i),
            site_lag_bounds: self.site_lag_bounds.clone(),
            peers: self.peers.clone(),
            heartbeat: Duration::from_millis(100),
            election_timeout: self.election_timeout,
            group: GroupSettings {
                memtable_bytes: self.memtable_bytes,
                table_bytes: 256 << 10,
                base_level_bytes: 1 << 20,
                l0_compaction_runs: 4,
                compression: mainstay_engine::TableCompression::ByLevel,
                state_machine: None,
                merge_operators: self.merge_operators.get(i).cloned().unwrap_or_default(),
            },
            entry_cache_bytes: self.entry_cache_bytes,
            environment,
        };
        let node = Node::start(engine, found, options, (self.wrap)(transport.clone())).await?;
        self.cells[i].life = Some((node, transport));
        Ok(())
    }

    pub(super) async fn start(&mut self, i: usize) {
        self.try_start(i).await.expect("starts");
    }

    pub(super) fn node(&self, i: usize) -> Node {
        self.cells[i].life.as_ref().expect("it runs").0.clone()
    }

    /// Ends a node as a power cut does.
    pub(super) async fn kill(&mut self, i: usize) {
        let (node, transport) = self.cells[i].life.take().expect("it runs");
        transport.close().await;
        self.crashes += 1;
        self.cells[i].media.crash(self.crashes);
        drop(node);
    }

    /// As [`Cluster::kill`], and the disks are gone too.
    pub(super) async fn wipe(&mut self, i: usize) {
        self.kill(i).await;
        self.crashes += 1;
        self.cells[i].media = media(1000 + self.crashes);
        format_volume(&self.cells[i].media, WAL_BYTES).await;
    }

    pub(super) async fn stop(&mut self, i: usize) {
        let (node, _) = self.cells[i].life.take().expect("it runs");
        node.close().await.expect("closes");
    }

    pub(super) fn running(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.cells.len()).filter(|i| self.cells[*i].life.is_some())
    }

    /// The running node that leads, once all that run agree on one of them.
    pub(super) async fn leader(&self) -> usize {
        loop {
            let statuses: Vec<_> = self.running().map(|i| (i, self.node(i).status())).collect();
            let leader = statuses.iter().find(|(_, s)| s.role == "leader").map(|(i, s)| (*i, s.id));
            if let Some((i, id)) = leader
                && statuses.iter().all(|(_, s)| s.leader == Some(id) || s.role == "removed" || s.role == "waiting")
            {
                return i;
            }
            pause().await;
        }
    }

    /// Has `i` lead.
    pub(super) async fn lead(&self, i: usize) {
        let (leader, id) = (self.leader().await, self.node(i).status().id);
        if leader != i {
            self.node(leader).transfer_leader(Some(id)).await.expect("handed over");
        }
        self.until(i, |s| s.role == "leader").await;
    }

    pub(super) async fn until(&self, i: usize, what: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
        loop {
            let status = self.node(i).status();
            if what(&status) {
                return status;
            }
            pause().await;
        }
    }

    pub(super) async fn put(&self, i: usize, key: &str, value: impl Into<Bytes>) -> Result<LogIndex> {
        let applied = self.node(i).write(Write { body: put(key, value), durability: Durability::Quorum }).await?;
        applied.response?;
        Ok(applied.index)
    }

    pub(super) async fn get(&self, i: usize, key: &str, level: ReadLevel) -> Result<Option<Bytes>> {
        let snapshot = self.node(i).snapshot("main", level).await?;
        Ok(snapshot.get(DEFAULT, key.as_bytes()).await?)
    }

    pub(super) async fn finish(mut self) {
        for i in self.running().collect::<Vec<_>>() {
            let (node, _) = self.cells[i].life.take().expect("it runs");
            node.close().await.expect("closes");
        }
    }
}

async fn free_address() -> PeerAddress {
    let transport = TcpTransport::bind("127.0.0.1:0", None).await.expect("loopback");
    let address = transport.local_address();
    transport.close().await;
    address
}

/// Between two looks at a state of which there is no event across nodes; no test relies on its length.
pub(super) async fn pause() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

pub(super) async fn format_volume(media: &SimMedia, wal_bytes: u64) {
    let opened = media.open().expect("nobody has it open");
    Engine::format(opened, &environment(), wal_bytes, false).await.expect("formats");
}

pub(super) fn put(key: &str, value: impl Into<Bytes>) -> CommandBody {
    let op = WriteOp::Put { keyspace: DEFAULT, key: Bytes::copy_from_slice(key.as_bytes()), value: value.into() };
    CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![op] })
}

#[test]
fn a_cluster_is_born_writes_reads_and_forwards() {
    run(async {
        let cluster = Cluster::born(3).await;
        for i in 0..3 {
            cluster.put(i, &format!("k{i}"), format!("v{i}")).await.expect("written");
        }
        for i in 0..3 {
            for level in [ReadLevel::Linearizable, ReadLevel::Lease] {
                let value = cluster.get(i, "k2", level).await.expect("read");
                assert_eq!(value.as_deref(), Some(b"v2".as_ref()), "a write that was answered before the read began");
            }
        }
        let at = cluster.put(0, "own", "x").await.expect("written");
        let value = cluster.get(1, "own", ReadLevel::AtLeast(at)).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"x".as_ref()));

        let archive = cluster.node(0).write(Write { body: put("a", "b"), durability: Durability::Archive }).await;
        assert_eq!(archive.expect_err("not yet").kind(), ErrorKind::Unsupported);
        for i in 0..3 {
            cluster.node(i).set_forward_handler(Arc::new(move |bytes| {
                Box::pin(async move { Ok(Bytes::from(format!("{i}:{}", String::from_utf8_lossy(&bytes)))) })
            }));
        }
        let leader = cluster.leader().await;
        for i in 0..3 {
            let answer = cluster.node(i).forward(Bytes::from_static(b"hi")).await.expect("answered");
            assert_eq!(answer, format!("{leader}:hi"));
        }
        cluster.finish().await;
    });
}

#[test]
fn init_is_idempotent_and_refuses_others() {
    run(async {
        let mut cluster = Cluster::blank(4).await;
        cluster.start_all().await;
        let three: Vec<String> = cluster.names()[..3].to_vec();
        assert_eq!(cluster.node(0).status().role, "waiting");
        let error = cluster.node(0).init(&["n0".into(), "nobody".into()]).await.expect_err("unknown");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let error = cluster.node(3).init(&three).await.expect_err("not a member itself");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        cluster.kill(2).await;
        let error = cluster.node(0).init(&three).await.expect_err("one is away");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        cluster.start(2).await;

        let id = cluster.node(0).init(&three).await.expect("born");
        for i in 0..3 {
            assert_eq!(cluster.node(i).init(&three).await.expect("the same again"), id);
        }
        let error = cluster.node(3).init(&cluster.names()).await.expect_err("of another cluster");
        assert_eq!(error.kind(), ErrorKind::Foreign);
        let error = cluster.node(0).init(&cluster.names()).await.expect_err("other members");
        assert_eq!(error.kind(), ErrorKind::Foreign);
        cluster.put(0, "k", "v").await.expect("written");
        assert_eq!(cluster.node(3).status().role, "waiting", "nobody bootstraps itself");
        cluster.finish().await;
    });
}

#[test]
fn init_goes_on_where_a_crash_left_it() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.start_all().await;
        // One member took its identity, then the initiator died: phase two by hand.
        let identity = mainstay_engine::Identity { cluster: [5; 16], node: 2 };
        cluster.node(1).inner.adopt(identity).await.expect("taken");
        cluster.kill(1).await;
        cluster.start(1).await;
        let id = cluster.node(0).init(&cluster.names()).await.expect("goes on");
        assert_eq!(id, [5; 16]);
        cluster.put(2, "k", "v").await.expect("written");
        let other = mainstay_engine::Identity { cluster: [6; 16], node: 2 };
        let error = cluster.node(1).inner.adopt(other).await.expect_err("it has an identity");
        assert_eq!(error.kind(), ErrorKind::Foreign);
        cluster.finish().await;
    });
}

/// Closed in good order every replica has its data in tables; after a power cut it applies the log again.
#[test]
fn a_clean_close_leaves_next_to_nothing_to_replay() {
    /// Beside what closing leaves: what elections and flushes write themselves.
    const OWN_ENTRIES: u64 = 8;
    run(async {
        let mut cluster = Cluster::born(3).await;
        for k in 0..200 {
            cluster.put(k % 3, &format!("k{k}"), vec![7; 100]).await.expect("written");
        }
        let leader = cluster.leader().await;
        for i in [leader, (leader + 1) % 3, (leader + 2) % 3] {
            cluster.stop(i).await;
        }
        cluster.start_all().await;
        for i in 0..3 {
            let status = cluster.node(i).status();
            assert!(status.replayed <= crate::tasks::CLOSE_REPLAY_MAX + OWN_ENTRIES, "node={i} {status:?}");
            assert!(status.group.flushed.0 >= 200, "node={i} {status:?}");
            let value = cluster.get(i, "k199", ReadLevel::Linearizable).await.expect("read");
            assert_eq!(value.map(|v| v.len()), Some(100));
        }
        // The count counts: what is not closed is replayed.
        for k in 0..100 {
            cluster.put(0, &format!("k{k}"), "again").await.expect("written");
        }
        for i in 0..3 {
            cluster.kill(i).await;
        }
        cluster.start_all().await;
        let most = (0..3).map(|i| cluster.node(i).status().replayed).max();
        assert!(most >= Some(100), "{most:?}");
        assert_eq!(cluster.get(1, "k0", ReadLevel::Linearizable).await.expect("read").as_deref(), Some(&b"again"[..]));
        cluster.finish().await;
    });
}

#[test]
fn nothing_acknowledged_is_lost_when_the_leader_loses_power() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        let mut written = 0;
        for round in 0..4 {
            for _ in 0..50 {
                cluster.put(round % 3, &format!("k{written}"), vec![7; 300]).await.expect("written");
                written += 1;
            }
            let leader = cluster.leader().await;
            let began = tokio::time::Instant::now();
            cluster.kill(leader).await;
            let other = (leader + 1) % 3;
            // What was on its way to the dying leader may have been written or not: the same value again does no harm.
            while let Err(error) = cluster.put(other, &format!("k{written}"), "after").await {
                assert_eq!(error.kind(), ErrorKind::Indeterminate);
            }
            written += 1;
            println!("round {round}: writes again after {:?}", began.elapsed());
            cluster.start(leader).await;
            // It catches up by log and serves what it missed.
            let last = format!("k{}", written - 1);
            let value = cluster.get(leader, &last, ReadLevel::Linearizable).await.expect("read");
            assert_eq!(value.as_deref(), Some(b"after".as_ref()));
        }
        for i in 0..3 {
            let snapshot = cluster.node(i).snapshot("main", ReadLevel::Linearizable).await.expect("read");
            for k in 0..written {
                let value = snapshot.get(DEFAULT, format!("k{k}").as_bytes()).await.expect("read");
                assert!(value.is_some(), "node={i} key={k}");
            }
        }
        cluster.finish().await;
    });
}

#[test]
fn all_lose_power_at_once() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        for k in 0..100 {
            cluster.put(0, &format!("k{k}"), vec![1; 500]).await.expect("written");
        }
        for i in 0..3 {
            cluster.kill(i).await;
        }
        cluster.start_all().await;
        for i in 0..3 {
            let snapshot = cluster.node(i).snapshot("main", ReadLevel::Linearizable).await.expect("read");
            for k in 0..100 {
                let value = snapshot.get(DEFAULT, format!("k{k}").as_bytes()).await.expect("read");
                assert!(value.is_some(), "node={i} key={k}");
            }
        }
        cluster.finish().await;
    });
}

#[test]
fn a_follower_behind_the_log_is_sent_the_tables_it_lacks() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.memtable_bytes = 256 << 10;
        cluster.entry_cache_bytes = 64 << 10;
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let fill = |from: u64, to: u64| (from..to).map(|k| (format!("k{k:06}"), vec![(k % 251) as u8; 1000]));
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        for (key, value) in fill(0, 1000) {
            cluster.put(leader, &key, value).await.expect("written");
        }
        // Everybody has flushed something before one goes away: those tables need not be sent.
        cluster.until(away, |s| s.group.flushed.0 > 300).await;
        let before = cluster.node(away).status().group;
        cluster.kill(away).await;
        for (key, value) in fill(1000, 4000) {
            cluster.put(leader, &key, value).await.expect("written");
        }
        let purged = |c: &Cluster, i: usize| c.node(i).inner.log.purged().map_or(0, |id| id.index);
        while purged(&cluster, leader) <= before.applied.0 {
            pause().await;
        }
        cluster.start(away).await;
        let value = cluster.get(away, "k003999", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.map(|v| v.len()), Some(1000));
        let fetched = cluster.node(away).status().fetched_bytes;
        let total = cluster.node(leader).status().group.table_bytes;
        println!("fetched {fetched} of {total} bytes of tables");
        assert!(0 < fetched && fetched < total, "only what it lacked: {fetched} of {total}");
        let snapshot = cluster.node(away).snapshot("main", ReadLevel::Linearizable).await.expect("read");
        for (key, value) in fill(0, 4000) {
            let found = snapshot.get(DEFAULT, key.as_bytes()).await.expect("read");
            assert_eq!(found.as_deref(), Some(value.as_slice()), "{key}");
        }
        // And again after a power cut right behind it.
        cluster.kill(away).await;
        cluster.start(away).await;
        let value = cluster.get(away, "k000001", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.map(|v| v.len()), Some(1000));
        cluster.finish().await;
    });
}

#[test]
fn a_wiped_member_joins_anew_under_another_id() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        for k in 0..50 {
            cluster.put(0, &format!("k{k}"), "v").await.expect("written");
        }
        let leader = cluster.leader().await;
        let wiped = (leader + 1) % 3;
        let old = cluster.node(wiped).status().id;
        let old_hello = cluster.node(wiped).inner.hello();
        cluster.wipe(wiped).await;
        cluster.start(wiped).await;
        let status = cluster.until(wiped, |s| s.role == "follower" || s.role == "leader").await;
        assert!(status.id.0 > 64, "a fresh id: {}", status.id);
        let status = cluster.until(leader, |s| s.members.iter().all(|m| m.id != old)).await;
        assert_eq!(status.members.len(), 3);
        assert!(status.members.iter().all(|m| m.role == MemberRole::Voter));
        let value = cluster.get(wiped, "k49", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v".as_ref()));
        // The former volume, should it come back, is refused.
        let stranger = Hello { peer_address: PeerAddress("127.0.0.1:1".into()), ..old_hello };
        let request = crate::Envelope { method: crate::network::method::VOTE, body: Bytes::from_static(&[1]) };
        let service = crate::service::Service(Arc::downgrade(&cluster.node(leader).inner));
        let error = crate::Handler::handle(&service, stranger, request).await.expect_err("given up");
        assert_eq!(error.kind(), ErrorKind::Foreign);
        cluster.finish().await;
    });
}

#[test]
fn members_come_and_go() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.start_all().await;
        cluster.node(0).init(&["n0".into()]).await.expect("born alone");
        cluster.put(0, "k", "v").await.expect("written");
        let add = |i: usize, voter| {
            let (node, address) = (cluster.node(0), cluster.cells[i].address.clone());
            async move { node.add_member(&format!("n{i}"), address, voter).await }
        };
        let one = add(1, true).await.expect("added");
        assert_eq!(one.role, MemberRole::Voter);
        let two = add(2, false).await.expect("added");
        assert_eq!(two.role, MemberRole::Learner);
        assert_eq!(add(2, false).await.expect("the same again").id, two.id);
        // A learner serves linearizable reads.
        let value = cluster.get(2, "k", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v".as_ref()));
        cluster.node(1).promote_member(two.id).await.expect("promoted, asked of a follower");
        cluster.until(0, |s| s.members.iter().filter(|m| m.role == MemberRole::Voter).count() == 3).await;

        let elsewhere = PeerAddress("elsewhere:1".into());
        cluster.node(0).update_member(two.id, elsewhere.clone()).await.expect("changed");
        let status = cluster.until(0, |s| s.members.iter().any(|m| m.peer_address == elsewhere)).await;
        assert_eq!(status.members.len(), 3);

        let leader = cluster.leader().await;
        let to = cluster.node((leader + 1) % 3).status().id;
        assert_eq!(cluster.node((leader + 2) % 3).transfer_leader(Some(to)).await.expect("handed over"), to);
        assert_eq!(cluster.node(cluster.leader().await).status().id, to);
        let error = cluster.node(0).remove_member(NodeId(9999)).await.expect_err("unknown");
        assert_eq!(error.kind(), ErrorKind::NotFound);

        // A removed member notices and goes idle; the two that stay go on.
        let gone = (0..3).find(|i| cluster.node(*i).status().id == one.id).expect("it runs");
        let stays = (gone + 1) % 3;
        cluster.node(stays).remove_member(one.id).await.expect("removed");
        cluster.until(gone, |s| s.role == "removed").await;
        cluster.put(stays, "k", "w").await.expect("written by two");
        assert_eq!(cluster.until(stays, |s| s.members.len() == 2).await.members.len(), 2);
        // Also after a restart.
        cluster.kill(gone).await;
        cluster.start(gone).await;
        cluster.until(gone, |s| s.role == "removed").await;
        cluster.finish().await;
    });
}

#[test]
fn closing_hands_leadership_over() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        cluster.put(0, "k", "v").await.expect("written");
        let leader = cluster.leader().await;
        let term = cluster.node(leader).status().term;
        cluster.stop(leader).await;
        let next = cluster.leader().await;
        assert_eq!(cluster.node(next).status().term, term + 1, "one election, by request");
        cluster.start(leader).await;
        let value = cluster.get(leader, "k", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v".as_ref()));
        cluster.finish().await;
    });
}

#[test]
fn a_local_write_has_a_receipt_that_can_be_waited_for() {
    run(async {
        let cluster = Cluster::born(3).await;
        let leader = cluster.leader().await;
        cluster.put(leader, "first", "v").await.expect("written");
        let token = cluster.node(leader).write_local(put("k", "v")).await.expect("durable here");
        let applied = cluster.node(leader).wait(token, Durability::Quorum).await.expect("committed");
        assert_eq!(applied.index, token.index);
        let value = cluster.get((leader + 1) % 3, "k", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"v".as_ref()));
        let error = cluster.node((leader + 1) % 3).write_local(put("k", "w")).await.expect_err("a follower");
        assert_eq!((error.kind(), error.leader().is_some()), (ErrorKind::NotLeader, true));
        let old = crate::CommitToken { term: token.term, index: LogIndex(token.index.0 + 1000) };
        let error = cluster.node(leader).wait(old, Durability::Quorum).await.expect_err("unknown");
        assert_eq!(error.kind(), ErrorKind::Indeterminate);
        let error = cluster.node(leader).wait(token, Durability::Archive).await.expect_err("not yet");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        cluster.finish().await;
    });
}

#[test]
fn a_failed_log_write_takes_the_node_out_of_service() {
    run(async {
        let mut cluster = Cluster::born(3).await;
        cluster.put(0, "k", "v").await.expect("written");
        let leader = cluster.leader().await;
        let failing = (leader + 1) % 3;
        cluster.cells[failing].media.wal_disk().fail_next(IoKind::DurableWrite);
        cluster.put(leader, "k", "w").await.expect("the others are a quorum");
        let status = cluster.until(failing, |s| s.role == "failed").await;
        assert!(status.failure.is_some());
        let error = cluster.put(failing, "k", "x").await.expect_err("it left service");
        assert_eq!(error.kind(), ErrorKind::Closed);
        cluster.put(leader, "k", "x").await.expect("the others go on");
        // With new life it takes part again: what it had acknowledged it still has.
        cluster.kill(failing).await;
        cluster.start(failing).await;
        let value = cluster.get(failing, "k", ReadLevel::Linearizable).await.expect("read");
        assert_eq!(value.as_deref(), Some(b"x".as_ref()));
        cluster.finish().await;
    });
}

#[test]
fn a_log_that_fails_at_rest_takes_the_node_out_of_service() {
    run(async {
        let cluster = Cluster::born(3).await;
        let index = cluster.put(0, "k", "v").await.expect("written");
        for i in 0..3 {
            cluster.until(i, |s| s.group.applied >= index).await;
        }
        // What is written next is the record that proves the log, for which nobody waits.
        let leader = cluster.leader().await;
        cluster.cells[leader].media.wal_disk().fail_next(IoKind::DurableWrite);
        let status = cluster.until(leader, |s| s.role == "failed").await;
        assert!(status.failure.is_some());
        let other = (leader + 1) % 3;
        cluster.until(other, |s| s.leader.is_some_and(|id| id != status.id)).await;
        cluster.put(other, "k", "w").await.expect("the others go on");
        cluster.finish().await;
    });
}

#[test]
fn a_volume_that_fails_before_it_has_an_identity_takes_the_node_out_of_service() {
    run(async {
        let mut cluster = Cluster::blank(3).await;
        cluster.start_all().await;
        cluster.cells[2].media.superblock_disk().fail_next(IoKind::DurableWrite);
        let error = cluster.node(0).init(&cluster.names()).await.expect_err("one volume takes nothing");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let status = cluster.until(2, |s| s.role == "failed").await;
        assert!(status.failure.is_some());
        cluster.kill(2).await;
        cluster.start(2).await;
        cluster.node(0).init(&cluster.names()).await.expect("the same again");
        cluster.put(0, "k", "v").await.expect("written");
        cluster.finish().await;
    });
}

/// Appends that are under way together, and what a bad connection makes of them.
#[derive(Default)]
struct Wire {
    under_way: AtomicU64,
    under_way_max: AtomicU64,
    appends: AtomicU64,
    broken: AtomicU64,
}

/// A connection with some delay on which appends are lost, or their answers.
#[derive(Clone)]
struct BadWire(Arc<Wire>);

impl Disturb for BadWire {
    fn call(&self, tcp: &TcpTransport, outbound: Outbound) -> BoxFuture<Result<Envelope>> {
        let append = outbound.request.method == crate::network::method::APPEND_IN_TURN;
        let call = outbound.send(tcp);
        if !append {
            return call;
        }
        let wire = self.0.clone();
        let n = wire.appends.fetch_add(1, Ordering::Relaxed);
        let now = wire.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        wire.under_way_max.fetch_max(now, Ordering::Relaxed);
        Box::pin(async move {
            let answer = if n % 11 == 7 {
                Err(Error::new(ErrorKind::Unavailable, "the request was lost"))
            } else {
                // The delay of a network; nothing waits for it.
                let answer = call.await;
                tokio::time::sleep(Duration::from_millis(2)).await;
                if n % 11 == 3 { Err(Error::new(ErrorKind::Indeterminate, "the answer was lost")) } else { answer }
            };
            wire.broken.fetch_add(u64::from(n % 11 == 7 || n % 11 == 3), Ordering::Relaxed);
            wire.under_way.fetch_sub(1, Ordering::Relaxed);
            answer
        })
    }
}

/// With one append at a time at most two are under way, one for each follower.
#[test]
fn appends_are_under_way_together_and_a_broken_connection_loses_nothing() {
    const WRITERS: u64 = 8;
    const WRITES: u64 = 40;
    run(async {
        let wire = Arc::new(Wire::default());
        let mut cluster = Cluster::blank(3).await;
        cluster.wrap = disturbed(BadWire(wire.clone()));
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let leader = cluster.leader().await;
        let writers = (0..WRITERS).map(|w| {
            let cluster = &cluster;
            async move {
                for k in 0..WRITES {
                    // A leader that lost its followers for too long may be replaced: the same write again does no harm.
                    while let Err(error) = cluster.put(leader, &format!("w{w}-{k}"), "x").await {
                        assert_eq!(error.kind(), ErrorKind::Indeterminate);
                    }
                }
            }
        });
        futures_util::future::join_all(writers).await;
        for i in 0..3 {
            let snapshot = cluster.node(i).snapshot("main", ReadLevel::Linearizable).await.expect("read");
            for (w, k) in (0..WRITERS).flat_map(|w| (0..WRITES).map(move |k| (w, k))) {
                let value = snapshot.get(DEFAULT, format!("w{w}-{k}").as_bytes()).await.expect("read");
                assert_eq!(value.as_deref(), Some(b"x".as_ref()), "node={i} writer={w} write={k}");
            }
        }
        let (max, broken) = (wire.under_way_max.load(Ordering::Relaxed), wire.broken.load(Ordering::Relaxed));
        let appends = wire.appends.load(Ordering::Relaxed);
        println!("{} writes in {appends} appends, {broken} broken, {max} under way together", WRITERS * WRITES);
        assert!(max > 2, "more than one for each of two followers, found {max}");
        assert!(broken > 5, "{broken}");
        cluster.finish().await;
    });
}

/// Writes that wait behind each other go into one entry. On a ring of 2 MiB a record holds half a MiB: the entry held up to one MiB
/// of them, the log refused it, and the node left service.
#[test]
fn writes_that_share_an_entry_fit_into_a_record_of_a_small_ring() {
    run(async {
        let mut cluster = Cluster::blank(1).await;
        let media = media(77);
        let opened = media.open().expect("nobody has it open");
        Engine::format(opened, &environment(), 2 << 20, false).await.expect("formats");
        cluster.cells[0].media = media;
        cluster.start_all().await;
        cluster.node(0).init(&cluster.names()).await.expect("born");
        let keys: Vec<String> = (0..24).map(|i| format!("k{i}")).collect();
        let writes = keys.iter().map(|key| cluster.put(0, key, vec![7; 40_000]));
        for written in futures_util::future::join_all(writes).await {
            written.expect("written");
        }
        assert_eq!(cluster.node(0).status().failure, None);
        cluster.finish().await;
    });
}
