//! The services over a store in memory, by clients over TCP and by etcdctl where the machine has it.

use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::MAIN;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::double::MemoryBackend;
use super::model::store::{Reader, Space};
use super::service::{Etcd, EtcdSettings};
use super::{BRANCH_KEY, CLIENT_TOKEN_KEY, COMMIT_TOKEN_KEY, DURABILITY_KEY, Model, READ_LEVEL_KEY, Refusal};
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::cluster_client::ClusterClient;
use crate::proto::etcdserverpb::kv_client::KvClient;
use crate::proto::etcdserverpb::lease_client::LeaseClient;
use crate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::proto::etcdserverpb::watch_client::WatchClient;
use crate::proto::mvccpb::Event;

/// Long enough for a loaded machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Bench {
    backend: MemoryBackend,
    etcd: Etcd<MemoryBackend>,
    /// For clients that are programs of their own.
    address: String,
    pub(super) channel: Channel,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Bench {
    pub(super) async fn start() -> Self {
        Self::start_with(EtcdSettings::default()).await
    }

    async fn start_with(settings: EtcdSettings) -> Self {
        let model = Model::new();
        let backend = MemoryBackend::new(model.clone());
        let etcd = Etcd::start(backend.clone(), model, settings);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound").to_string();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tonic::transport::Server::builder().add_routes(etcd.routes()).serve_with_incoming_shutdown(
            tokio_stream::wrappers::TcpListenerStream::new(listener),
            async move {
                let _ = stopped.await;
            },
        );
        tokio::spawn(serving);
        let channel =
            Channel::from_shared(format!("http://{address}")).expect("an address").connect().await.expect("listening");
        Self { backend, etcd, address, channel, stop: Some(stop) }
    }

    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel.clone())
    }

    async fn put(&self, key: &str, value: &str) -> i64 {
        let put = pb::PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() };
        self.kv().put(put).await.expect("put").into_inner().header.expect("header").revision
    }

    async fn delete(&self, key: &str) -> i64 {
        let delete = pb::DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() };
        self.kv().delete_range(delete).await.expect("delete").into_inner().header.expect("header").revision
    }

    async fn get(&self, key: &str) -> Option<Bytes> {
        let range = pb::RangeRequest { key: key.to_owned().into(), ..Default::default() };
        self.kv().range(range).await.expect("range").into_inner().kvs.into_iter().next().map(|kv| kv.value)
    }

    async fn compact(&self, revision: i64) {
        self.kv().compact(pb::CompactionRequest { revision, physical: true }).await.expect("compact");
    }

    async fn watch(&self) -> Watcher {
        let (requests, outbound) = tokio::sync::mpsc::channel(16);
        let mut client = WatchClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX);
        let answers = client.watch(ReceiverStream::new(outbound)).await.expect("watch").into_inner();
        Watcher { requests, answers }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}

struct Watcher {
    requests: tokio::sync::mpsc::Sender<pb::WatchRequest>,
    answers: tonic::Streaming<pb::WatchResponse>,
}

impl Watcher {
    async fn ask(&self, request: pb::watch_request::RequestUnion) {
        self.requests.send(pb::WatchRequest { request_union: Some(request) }).await.expect("the stream is open");
    }

    async fn create(&mut self, create: pb::WatchCreateRequest) -> pb::WatchResponse {
        self.ask(pb::watch_request::RequestUnion::CreateRequest(create)).await;
        let answer = self.next().await;
        assert!(answer.created, "{answer:?}");
        answer
    }

    async fn next(&mut self) -> pb::WatchResponse {
        self.try_next().await.expect("an answer")
    }

    async fn try_next(&mut self) -> Result<pb::WatchResponse, Status> {
        let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("in time")?;
        answer.ok_or_else(|| Status::aborted("the stream ended"))
    }

    /// Events until there are `count`, as "+key=value@revision" or "-key@revision".
    async fn events(&mut self, count: usize) -> Vec<String> {
        let mut told = Vec::new();
        while told.len() < count {
            let answer = self.next().await;
            assert!(!answer.canceled && !answer.created, "{answer:?}");
            told.extend(answer.events.iter().map(show));
        }
        told
    }
}

fn show(event: &Event) -> String {
    let kv = event.kv.clone().unwrap_or_default();
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    let before = event.prev_kv.as_ref().map(|kv| format!(" was {}", text(&kv.value))).unwrap_or_default();
    if event.r#type == 1 {
        format!("-{}@{}{before}", text(&kv.key), kv.mod_revision)
    } else {
        format!("+{}={}@{}{before}", text(&kv.key), text(&kv.value), kv.mod_revision)
    }
}

fn of_key(key: &'static str) -> pb::WatchCreateRequest {
    pb::WatchCreateRequest { key: key.into(), ..Default::default() }
}

fn of_all() -> pb::WatchCreateRequest {
    pb::WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>, refusal: Refusal) {
    let status = outcome.expect_err("refused");
    assert_eq!((status.code(), status.message()), (refusal.code(), refusal.message()));
}

#[tokio::test]
async fn refusals_have_etcds_codes_and_texts() {
    let bench = Bench::start().await;
    let put = |key: &'static str| pb::PutRequest { key: key.into(), ..Default::default() };
    refused(bench.kv().put(put("")).await, Refusal::EmptyKey);
    refused(bench.kv().range(pb::RangeRequest::default()).await, Refusal::EmptyKey);
    refused(bench.kv().delete_range(pb::DeleteRangeRequest::default()).await, Refusal::EmptyKey);
    refused(
        bench.kv().put(pb::PutRequest { value: "v".into(), ignore_value: true, ..put("k") }).await,
        Refusal::ValueProvided,
    );
    refused(bench.kv().put(pb::PutRequest { lease: 1, ignore_lease: true, ..put("k") }).await, Refusal::LeaseProvided);
    refused(bench.kv().put(pb::PutRequest { ignore_value: true, ..put("k") }).await, Refusal::KeyNotFound);
    refused(bench.kv().put(pb::PutRequest { lease: 5, ..put("k") }).await, Refusal::LeaseNotFound);
    refused(
        bench.kv().range(pb::RangeRequest { key: "k".into(), sort_order: 9, ..Default::default() }).await,
        Refusal::InvalidSortOption,
    );
    refused(
        bench.kv().range(pb::RangeRequest { key: "k".into(), revision: 2, ..Default::default() }).await,
        Refusal::FutureRevision,
    );
    refused(bench.kv().compact(pb::CompactionRequest { revision: 2, physical: false }).await, Refusal::FutureRevision);
    refused(bench.lease().lease_revoke(pb::LeaseRevokeRequest { id: 5 }).await, Refusal::LeaseNotFound);
    refused(
        bench.lease().lease_grant(pb::LeaseGrantRequest { ttl: 9_000_000_001, id: 0 }).await,
        Refusal::LeaseTtlTooLarge,
    );
    bench.lease().lease_grant(pb::LeaseGrantRequest { ttl: 60, id: 5 }).await.expect("granted");
    refused(bench.lease().lease_grant(pb::LeaseGrantRequest { ttl: 60, id: 5 }).await, Refusal::LeaseExist);
    let large = pb::PutRequest { value: vec![0; (3 << 19) + 1].into(), ..put("k") };
    refused(bench.kv().put(large).await, Refusal::RequestTooLarge);
    let op = pb::RequestOp { request: Some(pb::request_op::Request::RequestPut(put("k"))) };
    let txn = pb::TxnRequest { success: vec![op.clone(); 129], ..Default::default() };
    refused(bench.kv().txn(txn).await, Refusal::TooManyOps);
    let txn = pb::TxnRequest { success: vec![op; 2], ..Default::default() };
    refused(bench.kv().txn(txn).await, Refusal::DuplicateKey);
    assert_eq!(bench.put("k", "v").await, 2, "nothing that was refused took a revision");
    bench.put("k", "w").await;
    bench.compact(3).await;
    refused(bench.kv().compact(pb::CompactionRequest { revision: 3, physical: false }).await, Refusal::Compacted);
    refused(
        bench.kv().range(pb::RangeRequest { key: "k".into(), revision: 2, ..Default::default() }).await,
        Refusal::Compacted,
    );
}

#[tokio::test]
async fn headers_say_who_answered() {
    let bench = Bench::start().await;
    let range = pb::RangeRequest { key: "k".into(), ..Default::default() };
    let header = bench.kv().range(range).await.expect("range").into_inner().header.expect("header");
    assert_eq!((header.member_id, header.raft_term, header.revision), (7, 3, 1));
    assert_eq!(header.cluster_id, u64::from_be_bytes([9; 8]));
}

#[tokio::test]
async fn requests_that_wait_share_an_entry_and_keep_their_revisions() {
    let bench = Bench::start().await;
    let before = bench.backend.entries();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..256 {
        let mut kv = bench.kv();
        tasks.spawn(async move {
            let put = pb::PutRequest { key: format!("k{n}").into(), value: "v".into(), ..Default::default() };
            kv.put(put).await.expect("put").into_inner().header.expect("header").revision
        });
    }
    let mut revisions = tasks.join_all().await;
    revisions.sort_unstable();
    assert_eq!(revisions, (2..258).collect::<Vec<i64>>());
    let entries = bench.backend.entries() - before;
    assert!(entries < 256, "{entries} entries");
}

#[tokio::test]
async fn a_watch_is_told_every_change_in_order() {
    let bench = Bench::start().await;
    bench.put("a", "0").await;
    let mut watcher = bench.watch().await;
    let created = watcher.create(of_key("a")).await;
    assert_eq!((created.watch_id, created.header.expect("header").revision), (0, 2));
    bench.put("a", "1").await;
    bench.put("b", "1").await;
    bench.delete("a").await;
    bench.put("a", "2").await;
    assert_eq!(watcher.events(3).await, ["+a=1@3", "-a@5", "+a=2@6"]);
    // From the past, over a range, with what was before.
    let create = pb::WatchCreateRequest { start_revision: 2, prev_kv: true, watch_id: 40, ..of_all() };
    assert_eq!(watcher.create(create).await.watch_id, 40);
    assert_eq!(watcher.events(5).await, ["+a=0@2", "+a=1@3 was 0", "+b=1@4", "-a@5 was 1", "+a=2@6"]);
    // Filters.
    let mut filtered = bench.watch().await;
    filtered.create(pb::WatchCreateRequest { start_revision: 1, filters: vec![0], ..of_all() }).await;
    assert_eq!(filtered.events(1).await, ["-a@5"]);
    let mut filtered = bench.watch().await;
    filtered.create(pb::WatchCreateRequest { start_revision: 3, filters: vec![1], ..of_key("a") }).await;
    assert_eq!(filtered.events(2).await, ["+a=1@3", "+a=2@6"]);
    // A revision to come.
    let mut later = bench.watch().await;
    later.create(pb::WatchCreateRequest { start_revision: 8, ..of_key("a") }).await;
    bench.put("a", "7").await;
    bench.put("a", "8").await;
    assert_eq!(later.events(1).await, ["+a=8@8"]);
}

#[tokio::test]
async fn a_canceled_watch_is_told_nothing_more_and_others_go_on() {
    let bench = Bench::start().await;
    let mut watcher = bench.watch().await;
    assert_eq!(watcher.create(of_key("a")).await.watch_id, 0);
    assert_eq!(watcher.create(of_key("a")).await.watch_id, 1);
    let duplicate = watcher.create(pb::WatchCreateRequest { watch_id: 1, ..of_key("a") }).await;
    assert_eq!((duplicate.watch_id, duplicate.canceled), (-1, true));
    assert_eq!(duplicate.cancel_reason, "mvcc: duplicate watch ID provided on the WatchStream");
    let empty =
        watcher.create(pb::WatchCreateRequest { key: "b".into(), range_end: "a".into(), ..Default::default() }).await;
    assert_eq!((empty.watch_id, empty.canceled, &empty.cancel_reason[..]), (-1, true, "mvcc: watcher range is empty"));
    watcher.ask(pb::watch_request::RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id: 0 })).await;
    let canceled = watcher.next().await;
    assert_eq!((canceled.watch_id, canceled.canceled), (0, true));
    bench.put("a", "1").await;
    let answer = watcher.next().await;
    assert_eq!((answer.watch_id, answer.events.len()), (1, 1));
    assert_eq!(watcher.create(of_key("a")).await.watch_id, 2, "an id is not used again");
}

#[tokio::test]
async fn a_watch_from_before_the_compaction_is_canceled_with_its_revision() {
    let bench = Bench::start().await;
    for n in 0..5 {
        bench.put("a", &n.to_string()).await;
    }
    bench.delete("a").await;
    bench.compact(7).await;
    let mut watcher = bench.watch().await;
    watcher.create(pb::WatchCreateRequest { start_revision: 6, ..of_key("a") }).await;
    let canceled = watcher.next().await;
    assert_eq!((canceled.canceled, canceled.compact_revision, canceled.watch_id), (true, 7, 0));
    watcher.create(pb::WatchCreateRequest { start_revision: 7, prev_kv: true, ..of_key("a") }).await;
    assert_eq!(watcher.events(1).await, ["-a@7"], "the compacted revision itself can be watched, its past not be read");
}

#[tokio::test]
async fn progress_is_told_when_asked_and_when_quiet() {
    let settings = EtcdSettings { watch_progress_interval: Duration::from_millis(50), ..EtcdSettings::default() };
    let bench = Bench::start_with(settings).await;
    let mut watcher = bench.watch().await;
    watcher.create(pb::WatchCreateRequest { progress_notify: true, ..of_key("a") }).await;
    bench.put("b", "1").await;
    loop {
        let answer = watcher.next().await;
        assert!(answer.events.is_empty());
        assert_eq!(answer.watch_id, 0);
        if answer.header.expect("header").revision == 2 {
            break;
        }
    }
    let mut asker = bench.watch().await;
    asker.create(of_key("a")).await;
    asker.ask(pb::watch_request::RequestUnion::ProgressRequest(pb::WatchProgressRequest {})).await;
    let answer = asker.next().await;
    assert_eq!((answer.watch_id, answer.header.expect("header").revision), (-1, 2));
}

#[tokio::test]
async fn a_large_revision_is_split_only_where_the_client_allows_it() {
    let settings = EtcdSettings { request_bytes_max: 64 << 10, ..EtcdSettings::default() };
    let bench = Bench::start_with(settings).await;
    let mut whole = bench.watch().await;
    whole.create(of_all()).await;
    let mut parts = bench.watch().await;
    parts.create(pb::WatchCreateRequest { fragment: true, ..of_all() }).await;
    let op = |n: usize| pb::PutRequest {
        key: format!("k{n}").into(),
        value: vec![0; 20 << 10].into(),
        ..Default::default()
    };
    for n in 0..5 {
        bench.kv().put(op(n)).await.expect("put");
    }
    // All five go in one revision of which the events are larger than a request may be.
    let delete = pb::DeleteRangeRequest { key: "k".into(), range_end: "l".into(), prev_kv: false };
    bench.kv().delete_range(delete).await.expect("delete");
    assert_eq!(whole.events(10).await.len(), 10);
    assert_eq!(parts.events(10).await.len(), 10);
    let mut past = bench.watch().await;
    past.create(pb::WatchCreateRequest { fragment: true, prev_kv: true, start_revision: 7, ..of_all() }).await;
    let mut fragments = Vec::new();
    loop {
        let answer = past.next().await;
        fragments.push(answer.events.len());
        if !answer.fragment {
            break;
        }
    }
    assert_eq!(fragments.iter().sum::<usize>(), 5);
    assert!(fragments.len() > 1, "{fragments:?}");
    let mut past = bench.watch().await;
    past.create(pb::WatchCreateRequest { prev_kv: true, start_revision: 7, ..of_all() }).await;
    assert_eq!(past.next().await.events.len(), 5);
}

#[tokio::test]
async fn a_slow_watch_misses_nothing() {
    let bench = Bench::start().await;
    let mut watcher = bench.watch().await;
    watcher.create(of_all()).await;
    // Far more than the stream, the sockets and the ring hold.
    let value = "x".repeat(100 << 10);
    for n in 0..400 {
        bench.put(&format!("k{n:04}"), &value).await;
    }
    let told = watcher.events(400).await;
    for (n, event) in told.iter().enumerate() {
        assert!(event.starts_with(&format!("+k{n:04}=")) && event.ends_with(&format!("@{}", n + 2)));
    }
}

#[tokio::test]
async fn watches_go_on_after_the_state_was_replaced() {
    let bench = Bench::start().await;
    bench.put("a", "1").await;
    let other = Bench::start().await;
    for n in 1..5 {
        other.put("a", &n.to_string()).await;
    }
    let mut watcher = bench.watch().await;
    watcher.create(of_key("a")).await;
    bench.backend.replace(MAIN, other.backend.store(MAIN));
    assert_eq!(watcher.events(3).await, ["+a=2@3", "+a=3@4", "+a=4@5"]);
    assert_eq!(bench.put("a", "5").await, 6);
    assert_eq!(watcher.events(1).await, ["+a=5@6"]);
}

#[tokio::test]
async fn a_closed_server_tells_its_streams() {
    let bench = Bench::start().await;
    let mut watcher = bench.watch().await;
    watcher.create(of_key("a")).await;
    bench.etcd.close().await;
    refused(watcher.try_next().await, Refusal::Stopped);
}

#[tokio::test]
async fn a_stream_that_needs_a_leader_ends_without_one() {
    let bench = Bench::start().await;
    let (requests, outbound) = tokio::sync::mpsc::channel(1);
    let mut request = Request::new(ReceiverStream::new(outbound));
    request.metadata_mut().insert("hasleader", "true".parse().expect("ascii"));
    let mut client = WatchClient::new(bench.channel.clone());
    let mut answers = client.watch(request).await.expect("there is a leader").into_inner();
    let create = pb::watch_request::RequestUnion::CreateRequest(of_key("a"));
    requests.send(pb::WatchRequest { request_union: Some(create) }).await.expect("open");
    answers.message().await.expect("created");
    bench.backend.set_status(|status| status.leader = None);
    let ended = tokio::time::timeout(PATIENCE, answers.message()).await.expect("in time");
    refused(ended, Refusal::NoLeader);
    refused(bench.kv().put(pb::PutRequest { key: "k".into(), ..Default::default() }).await, Refusal::NoLeader);
}

#[tokio::test]
async fn a_lease_ends_with_its_keys_and_a_keep_alive_holds_it() {
    let bench = Bench::start().await;
    let granted =
        bench.lease().lease_grant(pb::LeaseGrantRequest { ttl: 1, id: 11 }).await.expect("granted").into_inner();
    assert_eq!(granted.ttl, super::model::LEASE_TTL_MIN, "no lease is shorter");
    bench.lease().lease_grant(pb::LeaseGrantRequest { ttl: 600, id: 12 }).await.expect("granted");
    for (key, lease) in [("a", 11), ("b", 11), ("c", 12)] {
        let put = pb::PutRequest { key: key.into(), value: "v".into(), lease, ..Default::default() };
        bench.kv().put(put).await.expect("put");
    }
    let ttl = bench
        .lease()
        .lease_time_to_live(pb::LeaseTimeToLiveRequest { id: 12, keys: true })
        .await
        .expect("ttl")
        .into_inner();
    assert_eq!((ttl.granted_ttl, ttl.keys), (600, vec![Bytes::from("c")]));
    assert!((590..=600).contains(&ttl.ttl), "{}", ttl.ttl);
    let leases = bench.lease().lease_leases(pb::LeaseLeasesRequest {}).await.expect("leases").into_inner().leases;
    assert_eq!(leases.iter().map(|lease| lease.id).collect::<Vec<_>>(), [11, 12]);
    // Kept alive once by stream, then left alone.
    let (requests, outbound) = tokio::sync::mpsc::channel(4);
    let mut answers = bench.lease().lease_keep_alive(ReceiverStream::new(outbound)).await.expect("stream").into_inner();
    let mut watcher = bench.watch().await;
    watcher.create(of_all()).await;
    requests.send(pb::LeaseKeepAliveRequest { id: 11 }).await.expect("open");
    let answer = answers.message().await.expect("answer").expect("open");
    assert_eq!((answer.id, answer.ttl), (11, 2));
    requests.send(pb::LeaseKeepAliveRequest { id: 99 }).await.expect("open");
    assert_eq!(answers.message().await.expect("answer").expect("open").ttl, 0, "no such lease");
    assert_eq!(watcher.events(2).await, ["-a@5", "-b@5"], "both keys in one revision");
    let gone = bench.lease().lease_time_to_live(pb::LeaseTimeToLiveRequest { id: 11, keys: false }).await.expect("ttl");
    assert_eq!(gone.into_inner().ttl, -1);
    assert_eq!(bench.get("c").await, Some("v".into()));
}

#[tokio::test]
async fn a_member_that_does_not_lead_asks_the_leader_about_leases() {
    let bench = Bench::start().await;
    bench.lease().lease_grant(pb::LeaseGrantRequest { ttl: 600, id: 12 }).await.expect("granted");
    // Another service over the same store that is told that it follows.
    let model = Model::new();
    let follower = MemoryBackend::new(model.clone());
    let leader = bench.backend.clone();
    follower.replace(MAIN, leader.store(MAIN));
    follower.set_status(|status| status.role = "follower".into());
    let etcd = Etcd::start(follower.clone(), model, EtcdSettings::default());
    super::backend::Backend::set_forward_handler(
        &follower,
        std::sync::Arc::new(move |request| {
            let leader = leader.clone();
            Box::pin(async move { super::backend::Backend::forward(&leader, request).await })
        }),
    );
    let core = etcd.core();
    assert_eq!(super::lessor::keep_alive(&core, MAIN, 12).await.expect("the leader answers"), Some(600));
    assert_eq!(super::lessor::keep_alive(&core, MAIN, 13).await.expect("the leader answers"), None);
    assert!(
        super::lessor::remaining(&core, MAIN, 12).await.expect("the leader answers").is_some_and(|left| left > 590)
    );
}

#[tokio::test]
async fn metadata_chooses_branch_durability_and_level() {
    let bench = Bench::start().await;
    bench.put("a", "1").await;
    bench.backend.clone_main("trial");
    fn with<T>(message: T, key: &'static str, value: &'static str) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(key, value.parse().expect("ascii"));
        request
    }
    let put = pb::PutRequest { key: "a".into(), value: "2".into(), ..Default::default() };
    let range = pb::RangeRequest { key: "a".into(), ..Default::default() };
    bench.kv().put(with(put.clone(), BRANCH_KEY, "trial")).await.expect("put into the clone");
    assert_eq!(bench.get("a").await, Some("1".into()), "main is as it was");
    let there = bench.kv().range(with(range.clone(), BRANCH_KEY, "trial")).await.expect("range").into_inner();
    assert_eq!((&there.kvs[0].value[..], there.header.expect("header").revision), (&b"2"[..], 3));
    let missing = bench.kv().range(with(range.clone(), BRANCH_KEY, "nowhere")).await.expect_err("no such branch");
    assert_eq!(missing.code(), Code::NotFound);

    let all = bench.kv().put(with(put.clone(), DURABILITY_KEY, "all")).await.expect_err("not offered");
    assert_eq!(all.code(), Code::FailedPrecondition);
    let odd = bench.kv().put(with(put.clone(), DURABILITY_KEY, "perhaps")).await.expect_err("no such level");
    assert_eq!(odd.code(), Code::InvalidArgument);
    let local = bench.kv().put(with(put.clone(), DURABILITY_KEY, "local")).await.expect("offered for a blind put");
    assert!(local.metadata().contains_key(COMMIT_TOKEN_KEY));
    let prev = pb::PutRequest { prev_kv: true, ..put };
    let local = bench.kv().put(with(prev, DURABILITY_KEY, "local")).await.expect_err("cannot be known yet");
    assert_eq!(local.code(), Code::FailedPrecondition);
    // The same request twice, another one between: the answer is the same, and nothing is undone.
    const TOKEN: &str = "000102030405060708090a0b0c0d0e0f-1";
    let once = pb::PutRequest { key: "once".into(), value: "1".into(), ..Default::default() };
    let first = bench.kv().put(with(once.clone(), CLIENT_TOKEN_KEY, TOKEN)).await.expect("put").into_inner();
    bench.put("once", "2").await;
    let again = bench.kv().put(with(once.clone(), CLIENT_TOKEN_KEY, TOKEN)).await.expect("put").into_inner();
    assert_eq!(first.header.expect("header").revision, again.header.expect("header").revision);
    assert_eq!(bench.get("once").await, Some("2".into()));
    let odd = bench.kv().put(with(once, CLIENT_TOKEN_KEY, "1")).await.expect_err("no token");
    assert_eq!(odd.code(), Code::InvalidArgument);
    bench.kv().range(with(range.clone(), READ_LEVEL_KEY, "local")).await.expect("range");
    let stale = bench.kv().range(with(range, READ_LEVEL_KEY, "stale:5")).await.expect_err("not offered");
    assert_eq!(stale.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn members_are_shown_and_changed() {
    let bench = Bench::start().await;
    let mut cluster = ClusterClient::new(bench.channel.clone());
    let list = cluster.member_list(pb::MemberListRequest { linearizable: true }).await.expect("list").into_inner();
    assert_eq!(list.members.len(), 1);
    assert_eq!((list.members[0].id, &list.members[0].name[..]), (7, "n1"));
    assert_eq!(list.members[0].peer_ur_ls, ["http://127.0.0.1:2380"]);
    let add = pb::MemberAddRequest { peer_ur_ls: vec!["http://n2@127.0.0.1:9".into()], is_learner: true };
    let added = cluster.member_add(add.clone()).await.expect("add").into_inner();
    let id = added.member.expect("member").id;
    assert!(added.members.iter().any(|member| member.id == id && member.is_learner && member.name == "n2"));
    refused(cluster.member_add(add).await, Refusal::PeerUrlExist);
    cluster.member_promote(pb::MemberPromoteRequest { id }).await.expect("promote");
    refused(cluster.member_promote(pb::MemberPromoteRequest { id }).await, Refusal::MemberNotLearner);
    let update = pb::MemberUpdateRequest { id, peer_ur_ls: vec!["http://127.0.0.1:10".into()] };
    let updated = cluster.member_update(update).await.expect("update").into_inner();
    assert!(updated.members.iter().any(|member| member.peer_ur_ls == ["http://127.0.0.1:10"]));
    refused(
        bench.maintenance().move_leader(pb::MoveLeaderRequest { target_id: 99 }).await,
        Refusal::BadLeaderTransferee,
    );
    let removed = cluster.member_remove(pb::MemberRemoveRequest { id }).await.expect("remove").into_inner();
    assert_eq!(removed.members.len(), 1);
    refused(cluster.member_remove(pb::MemberRemoveRequest { id }).await, Refusal::MemberNotFound);
}

#[tokio::test]
async fn equal_histories_hash_equally() {
    let (one, two) = (Bench::start().await, Bench::start().await);
    let hash = |bench: &Bench, revision: i64| {
        let mut client = bench.maintenance();
        async move { client.hash_kv(pb::HashKvRequest { revision }).await.expect("hash").into_inner() }
    };
    for bench in [&one, &two] {
        bench.put("a", "1").await;
        bench.put("a", "2").await;
        bench.delete("a").await;
    }
    let (a, b) = (hash(&one, 0).await, hash(&two, 0).await);
    assert_eq!((a.hash, a.compact_revision, a.hash_revision), (b.hash, -1, 4));
    one.put("b", "1").await;
    assert_eq!(hash(&one, 4).await.hash, b.hash, "up to the same revision");
    assert_ne!(hash(&one, 0).await.hash, b.hash);
    one.compact(4).await;
    two.compact(4).await;
    assert_eq!(hash(&one, 4).await.hash, hash(&two, 4).await.hash);
    assert_ne!(hash(&two, 4).await.hash, b.hash, "the compaction took something away");
}

/// Who defragments wants space: what compacted revisions left is collected first, and the tables are written again.
#[tokio::test]
async fn defragment_collects_and_compacts() {
    let bench = Bench::start().await;
    bench.put("a", "1").await;
    let revision = bench.put("a", "2").await;
    bench.compact(revision).await;
    bench.maintenance().defragment(pb::DefragmentRequest {}).await.expect("done");
    assert_eq!(bench.backend.compacted(), [MAIN]);
    let store = bench.backend.store(MAIN);
    let revs = store.page(Space::Revs, Bound::Unbounded, Bound::Unbounded, false, 9).await.expect("a page");
    assert_eq!(revs.len(), 1, "the superseded revision is collected");
}

/// Runs a program that speaks etcd and gives what it printed. `None` where the machine does not have it.
async fn run(program: &'static str, arguments: Vec<String>) -> Option<String> {
    let output = tokio::task::spawn_blocking(move || {
        std::process::Command::new(program).args(&arguments).env("ETCDCTL_API", "3").output()
    });
    let output = output.await.expect("no panic").ok()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    Some(format!("{}{}", text(&output.stdout), text(&output.stderr)))
}

impl Bench {
    async fn etcdctl(&self, line: &str) -> Option<String> {
        let mut arguments = vec!["--endpoints".to_owned(), self.address.clone()];
        arguments.extend(line.split(' ').map(str::to_owned));
        run("etcdctl", arguments).await
    }
}

/// What a user of etcdctl sees, against the same of etcd itself (3.4.23 printed these).
#[tokio::test]
async fn etcdctl_works_unchanged() {
    let bench = Bench::start().await;
    if bench.etcdctl("version").await.is_none() {
        eprintln!("etcdctl is not on this machine: `apt-get install etcd-client` for this test");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("snapshot.db").display().to_string();
    let table: &[(&str, &str)] = &[
        ("put a 1", "OK"),
        ("put b 2", "OK"),
        ("get a", "a\n1"),
        ("get a z --print-value-only", "1\n2"),
        ("get --prefix a --keys-only", "a"),
        ("put a 3 --prev-kv", "OK\na\n1"),
        ("get a --rev=2", "a\n1"),
        ("get a c --sort-by=modify --order=descend", "a\n3\nb\n2"),
        ("get --from-key b", "b\n2"),
        ("del b --prev-kv", "1\nb\n2"),
        ("get a --rev=99", "Error: etcdserver: mvcc: required revision is a future revision"),
        ("lease grant 600 -w simple", "lease "),
        ("lease list", "found 1 leases"),
        ("compact 4", "compacted revision 4"),
        ("get a --rev=3", "Error: etcdserver: mvcc: required revision has been compacted"),
        ("watch a --rev=2", "watch was canceled (etcdserver: mvcc: required revision has been compacted)"),
        ("member list", "7, started, n1, http://127.0.0.1:2380, http://127.0.0.1:2379, false"),
        (
            "member add n4 --peer-urls=http://n4@127.0.0.1:9 --learner",
            "Member                8 added to cluster  909090909090909",
        ),
        ("member remove 8", "Member                8 removed from cluster  909090909090909"),
        ("member remove 77", "Error: etcdserver: member not found"),
        ("endpoint health", " is healthy"),
        ("endpoint status", ", 7, 3.5.21, 0 B, true, false, 3, 0, 0"),
        ("endpoint hashkv", ", "),
        ("defrag", "Finished defragmenting etcd member"),
        ("alarm list", ""),
        ("snapshot save FILE", "Snapshot saved at "),
        ("snapshot status FILE", ", 5, "),
        ("snapshot restore FILE --data-dir=FILE.d", "added member"),
    ];
    for (line, expect) in table {
        let line = line.replace("FILE", &file);
        let printed = bench.etcdctl(&line).await.expect("it was there a moment ago");
        assert!(printed.contains(expect), "etcdctl {line}: {printed:?}, not {expect:?}");
    }
}

/// Each request has its future on the heap and moved about: what is rare in it has to be behind a box of its own.
#[tokio::test]
async fn futures_of_requests_are_small() {
    use crate::proto::etcdserverpb::kv_server::Kv;
    let bench = Bench::start().await;
    let kv = super::kv::KvService(bench.etcd.core());
    let sizes = [
        std::mem::size_of_val(&*kv.put(Request::new(pb::PutRequest::default()))),
        std::mem::size_of_val(&*kv.range(Request::new(pb::RangeRequest::default()))),
        std::mem::size_of_val(&*kv.txn(Request::new(pb::TxnRequest::default()))),
    ];
    assert!(sizes.iter().all(|size| *size < 2_000), "{sizes:?}");
}
