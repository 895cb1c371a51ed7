//! The etcd API over three replicas in one process: what each member answers, across flushes, leaders and restarts.

use std::path::PathBuf;
use std::time::Duration;

use mainstay::{Node, NodeOptions, Store};
use mainstay_server::etcd::{BRANCH_KEY, Etcd, EtcdSettings, Model, NodeBackend};
use mainstay_server::proto::etcdserverpb as pb;
use mainstay_server::proto::etcdserverpb::cluster_client::ClusterClient;
use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::lease_client::LeaseClient;
use mainstay_server::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use mainstay_server::proto::etcdserverpb::watch_client::WatchClient;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Long enough for a loaded machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

struct Replica {
    name: String,
    folder: PathBuf,
    peers: Vec<(String, String)>,
    running: Option<Running>,
}

struct Running {
    node: Node,
    etcd: Etcd,
    channel: Channel,
    stop: tokio::sync::oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<()>,
}

impl Replica {
    async fn start(&mut self) {
        let model = Model::new();
        let storage = Store::builder()
            .memory_bytes(32 << 20)
            .wal_bytes(16 << 20)
            .memtable_bytes(256 << 10)
            .state_machine(std::sync::Arc::new(model.clone()));
        // A machine that does much else at the same time shall not take leadership away in the middle.
        let mut options = NodeOptions::new(&self.name, &self.folder)
            .storage(storage)
            .heartbeat(Duration::from_millis(200))
            .election_timeout(Duration::from_secs(2));
        for (name, address) in &self.peers {
            options = if *name == self.name { options.listen(address) } else { options.peer(name, address) };
        }
        let node = Node::start(options).await.expect("a volume and a port");
        let etcd = Etcd::start(NodeBackend::new(node.clone(), model.clone()), model, EtcdSettings::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let server = tonic::transport::Server::builder().add_routes(etcd.routes());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let stopped = async {
                let _ = stopped.await;
            };
            let _ = server.serve_with_incoming_shutdown(incoming, stopped).await;
        });
        let channel = Channel::from_shared(format!("http://{address}")).expect("an address").connect_lazy();
        self.running = Some(Running { node, etcd, channel, stop, serving });
    }

    async fn stop(&mut self) {
        let Running { node, etcd, channel, stop, serving } = self.running.take().expect("it runs");
        etcd.close().await;
        drop(channel);
        let _ = stop.send(());
        tokio::time::timeout(PATIENCE, serving).await.expect("connections end").expect("no panic");
        drop(etcd);
        node.close().await.expect("closes");
    }

    fn node(&self) -> &Node {
        &self.running.as_ref().expect("it runs").node
    }

    fn channel(&self) -> Channel {
        self.running.as_ref().expect("it runs").channel.clone()
    }

    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel())
    }

    async fn put(&self, key: &str, value: &str) -> i64 {
        let put = pb::PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() };
        retried(|| {
            let (mut kv, put) = (self.kv(), put.clone());
            async move { kv.put(put).await }
        })
        .await
        .header
        .expect("a header")
        .revision
    }

    async fn range(&self, range: pb::RangeRequest) -> pb::RangeResponse {
        retried(|| {
            let (mut kv, range) = (self.kv(), range.clone());
            async move { kv.range(range).await }
        })
        .await
    }

    async fn hash(&self, revision: i64) -> pb::HashKvResponse {
        retried(|| {
            let mut client = MaintenanceClient::new(self.channel());
            async move { client.hash_kv(pb::HashKvRequest { revision }).await }
        })
        .await
    }
}

/// Asks again while members look for a leader.
async fn retried<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(mut ask: impl FnMut() -> F) -> T {
    let asking = async {
        loop {
            match ask().await {
                Ok(answer) => return answer.into_inner(),
                Err(status) if status.code() == Code::Unavailable || status.code() == Code::OutOfRange => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(status) => panic!("{status}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect("in time")
}

async fn cluster(folder: &std::path::Path) -> Vec<Replica> {
    let ports: Vec<std::net::TcpListener> =
        (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    let peers: Vec<(String, String)> = ports
        .iter()
        .enumerate()
        .map(|(n, port)| (format!("n{n}"), port.local_addr().expect("bound").to_string()))
        .collect();
    drop(ports);
    let mut replicas = Vec::new();
    for (name, _) in &peers {
        let mut replica =
            Replica { name: name.clone(), folder: folder.join(name), peers: peers.clone(), running: None };
        replica.start().await;
        replicas.push(replica);
    }
    let names: Vec<String> = peers.into_iter().map(|(name, _)| name).collect();
    replicas[0].node().init(names).await.expect("a birth");
    replicas
}

async fn leader(replicas: &[Replica]) -> usize {
    let looking = async {
        loop {
            if let Some(leader) = replicas.iter().position(|r| r.running.is_some() && r.node().is_leader()) {
                return leader;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.expect("in time")
}

async fn watch_all(channel: Channel, from: i64) -> tonic::Streaming<pb::WatchResponse> {
    let (requests, outbound) = tokio::sync::mpsc::channel(1);
    let create =
        pb::WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), start_revision: from, ..Default::default() };
    let union = pb::watch_request::RequestUnion::CreateRequest(create);
    requests.send(pb::WatchRequest { request_union: Some(union) }).await.expect("open");
    let mut answers = WatchClient::new(channel).watch(ReceiverStream::new(outbound)).await.expect("watch").into_inner();
    assert!(answers.message().await.expect("an answer").expect("open").created);
    answers
}

/// Revisions of the events until there are `count`.
async fn told(answers: &mut tonic::Streaming<pb::WatchResponse>, count: usize) -> Vec<i64> {
    let mut revisions = Vec::new();
    while revisions.len() < count {
        let answer = tokio::time::timeout(PATIENCE, answers.message()).await.expect("in time");
        let answer = answer.expect("an answer").expect("open");
        assert!(!answer.canceled, "{answer:?}");
        revisions.extend(answer.events.into_iter().map(|event| event.kv.expect("a key").mod_revision));
    }
    revisions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_answers_alike_across_flushes_leaders_and_restarts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut replicas = cluster(folder.path()).await;
    let first = leader(&replicas).await;
    let (follower, other) = ((first + 1) % 3, (first + 2) % 3);

    // Through all members, enough to flush and compact several times.
    let mut watching = watch_all(replicas[follower].channel(), 2).await;
    let value = "v".repeat(1 << 10);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..900_usize {
        let put = pb::PutRequest {
            key: format!("k{:03}", n % 300).into(),
            value: format!("{value}{n}").into(),
            ..Default::default()
        };
        let channel = replicas[n % 3].channel();
        tasks.spawn(async move {
            retried(|| {
                let (mut kv, put) = (KvClient::new(channel.clone()), put.clone());
                async move { kv.put(put).await }
            })
            .await
            .header
            .expect("a header")
            .revision
        });
    }
    let mut revisions = tasks.join_all().await;
    revisions.sort_unstable();
    // An answer that was lost may stand for a second put of the same: then there are more revisions, never fewer.
    assert!(revisions.windows(2).all(|pair| pair[0] < pair[1]));
    let last = *revisions.last().expect("900 of them");
    let seen = told(&mut watching, usize::try_from(last - 1).expect("small")).await;
    assert_eq!(seen, (2..=last).collect::<Vec<i64>>(), "a follower tells every revision in order");
    for replica in &replicas {
        let range = pb::RangeRequest { key: "k".into(), range_end: "l".into(), count_only: true, ..Default::default() };
        assert_eq!(replica.range(range.clone()).await.count, 300);
        let past = pb::RangeRequest { revision: 200, count_only: false, keys_only: true, ..range };
        let past = replica.range(past).await;
        assert!(past.kvs.iter().all(|kv| kv.mod_revision <= 200));
    }

    // Leases through a member that does not lead.
    let mut leases = LeaseClient::new(replicas[follower].channel());
    let lease = leases.lease_grant(pb::LeaseGrantRequest { ttl: 2, id: 0 }).await.expect("granted").into_inner().id;
    let put = pb::PutRequest { key: "leased".into(), value: "x".into(), lease, ..Default::default() };
    let at = replicas[other].kv().put(put).await.expect("put").into_inner().header.expect("a header").revision;
    let (requests, outbound) = tokio::sync::mpsc::channel(1);
    let mut alive = leases.lease_keep_alive(ReceiverStream::new(outbound)).await.expect("a stream").into_inner();
    requests.send(pb::LeaseKeepAliveRequest { id: lease }).await.expect("open");
    assert_eq!(alive.message().await.expect("an answer").expect("open").ttl, 2);
    assert_eq!(told(&mut watching, 2).await, [at, at + 1], "the key came, and went with its lease");

    // A clone has a life of its own.
    let store = replicas[first].node().store();
    store.checkpoint_async("before").await.expect("a checkpoint");
    store.create_clone_async("trial", "before").await.expect("a clone");
    drop(store);
    let mut put = Request::new(pb::PutRequest { key: "k000".into(), value: "changed".into(), ..Default::default() });
    put.metadata_mut().insert(BRANCH_KEY, "trial".parse().expect("ascii"));
    replicas[first].kv().put(put).await.expect("into the clone");
    let main = replicas[first].range(pb::RangeRequest { key: "k000".into(), ..Default::default() }).await;
    assert_ne!(&main.kvs[0].value[..], b"changed");

    // Compaction, and equal hashes once each member has it.
    let compact = pb::CompactionRequest { revision: at, physical: true };
    replicas[follower].kv().compact(compact).await.expect("compacted");
    let now = replicas[first].put("after", "compaction").await;
    let hash = replicas[first].hash(now).await.hash;
    for replica in &replicas {
        // A member that has not come so far says that the revision is a future one, and is asked again.
        let hashed = replica.hash(now).await;
        assert_eq!((hashed.hash, hashed.compact_revision), (hash, at));
    }

    // Another leader, then a member that was away.
    let first = leader(&replicas).await;
    let (follower, other) = ((first + 1) % 3, (first + 2) % 3);
    let list = ClusterClient::new(replicas[first].channel())
        .member_list(pb::MemberListRequest { linearizable: true })
        .await
        .expect("members")
        .into_inner();
    let target = list.members.iter().find(|member| member.name == replicas[other].name).expect("a member").id;
    MaintenanceClient::new(replicas[first].channel())
        .move_leader(pb::MoveLeaderRequest { target_id: target })
        .await
        .expect("handed over");
    assert_eq!(leader(&replicas).await, other);
    drop((watching, alive, leases, requests));
    replicas[first].stop().await;
    for n in 0..50 {
        replicas[follower].put(&format!("away{n}"), &value).await;
    }
    replicas[first].start().await;
    let now = replicas[other].put("last", "1").await;
    let hash = replicas[other].hash(now).await.hash;
    for replica in &replicas {
        assert_eq!(replica.hash(now).await.hash, hash);
    }
    for replica in &mut replicas {
        replica.stop().await;
    }
    // All together again: everything is there.
    for replica in &mut replicas {
        replica.start().await;
    }
    for replica in &replicas {
        assert_eq!(replica.hash(now).await.hash, hash);
        let range = pb::RangeRequest { key: "away".into(), range_end: "away~".into(), ..Default::default() };
        assert_eq!(replica.range(range).await.kvs.len(), 50);
    }
    for replica in &mut replicas {
        replica.stop().await;
    }
}
