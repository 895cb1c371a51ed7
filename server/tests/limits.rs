//! What a client hears when it wants more than the settings allow, and that it is served again once there is room.

mod process;

use std::future::poll_fn;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use mainstay_server::proto::etcdserverpb as pb;
use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::lease_client::LeaseClient;
use mainstay_server::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use mainstay_server::proto::etcdserverpb::watch_client::WatchClient;
use process::{Ports, Server, get, json, mainstay, run, runtime};
use prost::Message;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::Request;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Long enough for a loaded machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

/// One replica that was born, with the limits of the test.
struct Limited {
    ports: Ports,
    server: Server,
    _folder: tempfile::TempDir,
}

impl Limited {
    fn start(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let ports = Ports::free();
        let server = Server::start_with("a", &folder.path().join("a"), &ports, "", args);
        json(&run(&["init", "--members", "a", "--admin", ports.admin(), "--json"]));
        Self { ports, server, _folder: folder }
    }

    async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.ports.client())).expect("an address");
        endpoint.connect().await.expect("connects")
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, text) = get(self.ports.metrics(), "/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("mainstay_{name} ")));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().expect("a count")
    }

    /// Waits until a metric has this value. The connections of the test go on meanwhile.
    async fn await_metric(&self, name: &str, value: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.metric(name) != value {
            assert!(Instant::now() < deadline, "{name} is {} and not {value}", self.metric(name));
            tokio::task::yield_now().await;
        }
    }

    /// Checks that the other ports answer and what the metrics say of a limit.
    async fn check(&self, name: &str, in_use: u64, max: u64, refused: u64) {
        self.await_metric(&format!("{name}_in_use"), in_use).await;
        assert_eq!(self.metric(&format!("{name}_max")), max);
        assert_eq!(self.metric(&format!("{name}_refused_total")), refused);
        for path in ["/livez", "/readyz"] {
            assert_eq!(get(self.ports.admin(), path).0, 200, "{path} knows no limits of clients");
        }
    }
}

fn put(bytes: usize) -> pb::PutRequest {
    pb::PutRequest { key: "k".into(), value: vec![7; bytes].into(), ..pb::PutRequest::default() }
}

fn check_refused<T: std::fmt::Debug>(answer: Result<T, Status>, message: &str) {
    let status = answer.expect_err("over the limit");
    assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, message));
}

/// An HTTP/2 connection below gRPC, to say half of a request.
async fn http(address: &str) -> (h2::client::SendRequest<Bytes>, tokio::task::JoinHandle<Result<(), h2::Error>>) {
    let stream = tokio::net::TcpStream::connect(address).await.expect("connects");
    let (client, connection) = h2::client::handshake(stream).await.expect("sent");
    (client, tokio::spawn(connection))
}

/// The head of a call: its answer, and the way for its body.
async fn call(
    client: &h2::client::SendRequest<Bytes>,
    method: &str,
) -> (h2::client::ResponseFuture, h2::SendStream<Bytes>) {
    let uri = format!("http://mainstay/etcdserverpb.KV/{method}");
    let request = Request::post(uri).header("content-type", "application/grpc").body(()).expect("a request");
    client.clone().ready().await.expect("open").send_request(request, false).expect("open")
}

/// The first `bytes` of the body of a put that is longer: the server waits for the rest.
async fn begin_put(client: &h2::client::SendRequest<Bytes>, bytes: usize) -> h2::SendStream<Bytes> {
    let (_, mut body) = call(client, "Put").await;
    let mut data = BytesMut::with_capacity(bytes);
    data.put_u8(0);
    data.put_u32(1 << 20);
    data.resize(bytes, 0);
    let mut data = data.freeze();
    while !data.is_empty() {
        body.reserve_capacity(data.len());
        let room = poll_fn(|context| body.poll_capacity(context)).await.expect("open").expect("open");
        body.send_data(data.split_to(room.min(data.len())), false).expect("open");
    }
    body
}

#[test]
fn a_connection_over_the_limit_is_told_to_go_and_one_that_ends_makes_room() {
    let limited = Limited::start(&["--connections-max", "2"]);
    runtime().block_on(async {
        let mut first = KvClient::new(limited.channel().await);
        first.put(put(1)).await.expect("written");
        let mut second = KvClient::new(limited.channel().await);
        second.put(put(1)).await.expect("written");

        let (_client, connection) = http(limited.ports.client()).await;
        let told = tokio::time::timeout(PATIENCE, connection).await.expect("at once").expect("no panic");
        let error = told.expect_err("told to go");
        assert!(error.is_go_away() && error.is_remote(), "{error:?}");
        assert_eq!(error.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
        limited.check("client_connections", 2, 2, 1).await;
        first.put(put(1)).await.expect("who is in is served on");

        drop(first);
        limited.await_metric("client_connections_in_use", 1).await;
        KvClient::new(limited.channel().await).put(put(1)).await.expect("there is room");
    });
    limited.server.stop();
}

#[test]
fn a_request_over_the_limit_is_answered_at_once_and_one_that_ends_makes_room() {
    let limited = Limited::start(&["--requests-max", "2"]);
    runtime().block_on(async {
        let mut kv = KvClient::new(limited.channel().await);
        let (client, _connection) = http(limited.ports.client()).await;
        let mut first = begin_put(&client, 5).await;
        limited.await_metric("client_requests_in_use", 1).await;
        kv.put(put(1)).await.expect("the second of two");

        limited.await_metric("client_requests_in_use", 1).await;
        let _second = begin_put(&client, 5).await;
        limited.await_metric("client_requests_in_use", 2).await;
        let message = "mainstay: too many requests under way setting=requests-max limit=2";
        check_refused(kv.put(put(1)).await, message);
        check_refused(kv.range(pb::RangeRequest { key: "k".into(), ..Default::default() }).await, message);
        limited.check("client_requests", 2, 2, 2).await;

        first.send_reset(h2::Reason::CANCEL);
        limited.await_metric("client_requests_in_use", 1).await;
        kv.put(put(1)).await.expect("there is room");
    });
    limited.server.stop();
}

/// An answer in memory costs what a request costs: given back with the head of the answer, its place would let a client that
/// reads nothing pile up answers.
#[test]
fn an_answer_that_nobody_reads_keeps_the_place_of_its_request() {
    let limited = Limited::start(&["--requests-max", "1"]);
    runtime().block_on(async {
        let mut kv = KvClient::new(limited.channel().await);
        kv.put(put(256 << 10)).await.expect("written");
        limited.await_metric("client_requests_in_use", 0).await;

        let (client, _connection) = http(limited.ports.client()).await;
        let (answer, mut body) = call(&client, "Range").await;
        let range = pb::RangeRequest { key: "k".into(), ..Default::default() };
        let mut data = BytesMut::new();
        data.put_u8(0);
        data.put_u32(range.encoded_len() as u32);
        range.encode(&mut data).expect("there is room");
        body.send_data(data.freeze(), true).expect("open");
        // Of the answer's 256 KiB the client takes the 64 KiB of its window.
        let unread = answer.await.expect("answered");
        let message = "mainstay: too many requests under way setting=requests-max limit=1";
        check_refused(kv.range(range.clone()).await, message);

        drop((unread, body));
        limited.await_metric("client_requests_in_use", 0).await;
        kv.range(range).await.expect("there is room");
    });
    limited.server.stop();
}

#[test]
fn open_streams_have_a_limit_of_their_own_and_leave_requests_theirs() {
    let limited = Limited::start(&["--streams-max", "1", "--requests-max", "1"]);
    runtime().block_on(async {
        let channel = limited.channel().await;
        let mut watches = WatchClient::new(channel.clone());
        let (asks, asked) = tokio::sync::mpsc::channel(1);
        let watch = watches.watch(ReceiverStream::new(asked)).await.expect("the first");
        check_open(&limited, &channel).await;

        let message = "mainstay: too many open streams setting=streams-max limit=1";
        check_refused(watches.watch(tokio_stream::pending()).await, message);
        check_refused(LeaseClient::new(channel.clone()).lease_keep_alive(tokio_stream::pending()).await, message);
        check_open(&limited, &channel).await;
        limited.check("client_streams", 1, 1, 2).await;
        limited.check("client_requests", 0, 1, 0).await;

        // Both directions end with the call.
        drop((asks, watch));
        limited.await_metric("client_streams_in_use", 0).await;
        watches.watch(tokio_stream::pending()).await.expect("there is room");
    });
    limited.server.stop();
}

/// A stream is open, and the only place of the requests is free.
async fn check_open(limited: &Limited, channel: &Channel) {
    limited.await_metric("client_streams_in_use", 1).await;
    limited.await_metric("client_requests_in_use", 0).await;
    KvClient::new(channel.clone()).put(put(1)).await.expect("written beside the stream");
}

#[test]
fn a_request_that_does_not_fit_in_the_memory_is_answered_at_once_and_fits_later() {
    const MEMORY: u64 = 4 << 20;
    const HELD: usize = 1000 << 10;
    let limited = Limited::start(&["--requests-memory", "4MiB"]);
    runtime().block_on(async {
        let mut kv = KvClient::new(limited.channel().await);
        kv.put(put(256 << 10)).await.expect("fits");
        let (client, _connection) = http(limited.ports.client()).await;
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(begin_put(&client, HELD).await);
        }
        limited.await_metric("client_request_bytes_in_use", 4 * HELD as u64).await;
        kv.put(put(64 << 10)).await.expect("the rest is enough");
        let message = "mainstay: too many bytes of requests under way setting=requests-memory limit=4194304";
        check_refused(kv.put(put(256 << 10)).await, message);
        limited.check("client_request_bytes", 4 * HELD as u64, MEMORY, 1).await;

        for mut body in held.drain(..) {
            body.send_reset(h2::Reason::CANCEL);
        }
        limited.await_metric("client_request_bytes_in_use", 0).await;
        kv.put(put(256 << 10)).await.expect("there is room");
    });
    limited.server.stop();
}

async fn alarms(maintenance: &mut MaintenanceClient<Channel>) -> Vec<pb::AlarmMember> {
    let request = pb::AlarmRequest { action: pb::alarm_request::AlarmAction::Get as i32, ..Default::default() };
    maintenance.alarm(request).await.expect("answered").into_inner().alarms
}

#[test]
fn data_over_the_limit_refuses_puts_and_nothing_else() {
    let limited = Limited::start(&["--data-max", "1MiB", "--memtable", "64KiB"]);
    runtime().block_on(async {
        let mut kv = KvClient::new(limited.channel().await);
        let mut maintenance = MaintenanceClient::new(limited.channel().await);
        let key = |n: usize| format!("k{n:05}").into_bytes();
        // Values that do not compress, until one is refused.
        let value = |n: usize| (0..4096_usize).map(|i| (((i * 31 + n) * 2_654_435_761) >> 7) as u8).collect::<Vec<_>>();
        let mut written = 0;
        let refused = loop {
            let put = pb::PutRequest { key: key(written).into(), value: value(written).into(), ..Default::default() };
            match kv.put(put).await {
                Ok(_) => written += 1,
                Err(status) => break status,
            }
            assert!(written < 20_000, "nothing bounds it");
        };
        let exceeded = "etcdserver: mvcc: database space exceeded";
        assert_eq!((refused.code(), refused.message()), (Code::ResourceExhausted, exceeded));
        assert!(written * 4096 >= 1 << 19, "written={written}");
        let raised = alarms(&mut maintenance).await;
        assert_eq!(raised.iter().map(|alarm| alarm.alarm).collect::<Vec<_>>(), [pb::AlarmType::Nospace as i32]);
        assert!(limited.metric("data_bytes_in_use") >= limited.metric("data_bytes_max"));
        assert!(limited.metric("data_bytes_refused_total") >= 1);
        // A transaction that may put is one of them, in whatever branch; one that deletes is not, nor is a read.
        let put_op = pb::RequestOp { request: Some(pb::request_op::Request::RequestPut(put(1))) };
        let inner = pb::TxnRequest { failure: vec![put_op], ..Default::default() };
        let nested = pb::RequestOp { request: Some(pb::request_op::Request::RequestTxn(inner)) };
        check_refused(kv.txn(pb::TxnRequest { success: vec![nested], ..Default::default() }).await, exceeded);
        let mut lease = LeaseClient::new(limited.channel().await);
        check_refused(lease.lease_grant(pb::LeaseGrantRequest { ttl: 60, id: 0 }).await, exceeded);
        let read = kv.range(pb::RangeRequest { key: key(0).into(), ..Default::default() }).await.expect("reads go on");
        assert_eq!(read.into_inner().kvs[0].value, value(0));

        let all = pb::DeleteRangeRequest { key: key(0).into(), range_end: b"l".to_vec().into(), prev_kv: false };
        let deleted = kv.delete_range(all).await.expect("deletes go on").into_inner();
        assert_eq!(deleted.deleted, written as i64);
        let revision = deleted.header.expect("a header").revision;
        kv.compact(pb::CompactionRequest { revision, physical: true }).await.expect("compactions go on");
    });
    // Until compaction has dropped what was deleted, a larger limit ends it.
    let Limited { ports, server, _folder: folder } = limited;
    server.stop();
    let server = Server::start_with("a", &folder.path().join("a"), &ports, "", &["--data-max", "64MiB"]);
    let limited = Limited { ports, server, _folder: folder };
    runtime().block_on(async {
        let mut kv = KvClient::new(limited.channel().await);
        kv.put(put(1)).await.expect("there is room");
        let mut maintenance = MaintenanceClient::new(limited.channel().await);
        assert_eq!(alarms(&mut maintenance).await, [], "an alarm ends with its cause");
    });
    limited.server.stop();
}

#[test]
fn a_limit_that_cannot_be_kept_is_refused_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().to_str().expect("utf-8");
    let check = |command: &mut Command, says: &str| {
        let output = command.args(["--name", "a", "--data", data]).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(says), "should say '{says}': {text}");
    };
    let serve = |args: &[&str]| {
        let mut command = mainstay();
        command.arg("serve").args(args);
        command
    };
    check(&mut serve(&["--connections-max", "0"]), "connections-max is out of range value=0 least=1");
    check(&mut serve(&["--requests-max", "0"]), "requests-max is out of range value=0 least=1 most=1048576");
    check(&mut serve(&["--streams-max", "many"]), "many");
    check(&mut serve(&["--requests-memory", "1MiB"]), "requests-memory is out of range value=1048576 least=4194304");
    check(&mut serve(&["--data-max", "1KiB"]), "data-max is out of range value=1024 least=1048576");
    check(serve(&[]).env("MAINSTAY_REQUESTS_MAX", "0"), "requests-max is out of range value=0");
    // Of 400 open files, 256 are for the rest of the process.
    let mut few_files = Command::new("sh");
    few_files.args(["-c", "ulimit -n 400 && exec \"$0\" serve --connections-max 145 \"$@\""]);
    few_files.arg(mainstay().get_program());
    check(&mut few_files, "connections-max is out of range value=145 least=1 most=144");
}
