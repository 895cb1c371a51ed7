//! The same requests to these services and to etcd itself, where the machine has it: every answer must be the same.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use prost::Message;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use super::model::command::Request;
use super::model::tests::{range, request};
use super::tests::Bench;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::kv_client::KvClient;
use crate::proto::etcdserverpb::lease_client::LeaseClient;
use crate::proto::etcdserverpb::watch_client::WatchClient;
use crate::proto::mvccpb::Event;

/// Requests sent to both.
const REQUESTS: usize = 1_500;

/// A running etcd; ended when dropped.
struct Etcd {
    process: Child,
    _data: tempfile::TempDir,
    channel: Channel,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Etcd {
    /// `None` where the machine does not have it.
    async fn start() -> Option<Self> {
        let free_port = || std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let (client, peer) = (free_port().expect("loopback"), free_port().expect("loopback"));
        let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
        let data = tempfile::tempdir().expect("a temporary folder");
        let process = Command::new("etcd")
            .args(["--data-dir", &data.path().display().to_string(), "--unsafe-no-fsync"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "fatal"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let endpoint = Channel::from_shared(client).expect("an address");
        let mut etcd = Self { process, _data: data, channel: endpoint.connect_lazy() };
        loop {
            if let Some(status) = etcd.process.try_wait().expect("a child") {
                panic!("etcd ended {status}");
            }
            let range = pb::RangeRequest { key: "k".into(), ..Default::default() };
            if KvClient::new(etcd.channel.clone()).range(range).await.is_ok() {
                return Some(etcd);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Leaves out who answered.
fn unsigned(header: &mut Option<pb::ResponseHeader>) {
    if let Some(header) = header {
        *header = pb::ResponseHeader { revision: header.revision, ..Default::default() };
    }
}

/// etcd does not say in which order it puts equals.
fn settle(response: &mut pb::RangeResponse, target: i32) {
    unsigned(&mut response.header);
    match target {
        1 => response.kvs.sort_by_key(|kv| (kv.version, kv.key.clone())),
        2 => response.kvs.sort_by_key(|kv| (kv.create_revision, kv.key.clone())),
        3 => response.kvs.sort_by_key(|kv| (kv.mod_revision, kv.key.clone())),
        4 => response.kvs.sort_by_key(|kv| kv.key.clone()),
        _ => {}
    }
}

fn settle_txn(request: &pb::TxnRequest, response: &mut pb::TxnResponse) {
    unsigned(&mut response.header);
    let ops = if response.succeeded { &request.success } else { &request.failure };
    for (op, answer) in ops.iter().zip(&mut response.responses) {
        use pb::request_op::Request as Op;
        use pb::response_op::Response as Answer;
        match (&op.request, &mut answer.response) {
            (Some(Op::RequestRange(range)), Some(Answer::ResponseRange(answer))) => settle(answer, range.sort_target),
            (Some(Op::RequestTxn(txn)), Some(Answer::ResponseTxn(answer))) => settle_txn(txn, answer),
            _ => {}
        }
    }
}

/// A range whose answer is the same however equals are ordered.
fn decided(mut range: pb::RangeRequest) -> pb::RangeRequest {
    if range.sort_target != 0 {
        range.limit = 0;
    }
    range
}

fn decided_ops(ops: &mut [pb::RequestOp]) {
    use pb::request_op::Request as Op;
    for op in ops {
        match &mut op.request {
            Some(Op::RequestRange(range)) => *range = decided(range.clone()),
            Some(Op::RequestTxn(txn)) => decided_txn(txn),
            _ => {}
        }
    }
}

fn decided_txn(txn: &mut pb::TxnRequest) {
    decided_ops(&mut txn.success);
    decided_ops(&mut txn.failure);
}

/// The answer as bytes, or code and text of the refusal.
async fn ask(channel: &Channel, request: Request) -> Result<Vec<u8>, (i32, String)> {
    let refused = |status: Status| (status.code() as i32, status.message().to_owned());
    let mut kv = KvClient::new(channel.clone());
    let mut lease = LeaseClient::new(channel.clone());
    macro_rules! unsigned_bytes {
        ($answer:expr) => {{
            let mut answer = $answer.await.map_err(refused)?.into_inner();
            unsigned(&mut answer.header);
            Ok(answer.encode_to_vec())
        }};
    }
    match request {
        Request::Put(put) => unsigned_bytes!(kv.put(put)),
        Request::DeleteRange(delete) => unsigned_bytes!(kv.delete_range(delete)),
        Request::Txn(txn) => {
            let mut answer = kv.txn(txn.clone()).await.map_err(refused)?.into_inner();
            settle_txn(&txn, &mut answer);
            Ok(answer.encode_to_vec())
        }
        Request::Compact(compact) => unsigned_bytes!(kv.compact(compact)),
        Request::Collect => Ok(Vec::new()),
        Request::LeaseGrant(grant) => unsigned_bytes!(lease.lease_grant(grant)),
        Request::LeaseRevoke(revoke) => unsigned_bytes!(lease.lease_revoke(revoke)),
    }
}

async fn ask_range(channel: &Channel, request: pb::RangeRequest) -> Result<pb::RangeResponse, (i32, String)> {
    let target = request.sort_target;
    let answer = KvClient::new(channel.clone()).range(request).await;
    let mut answer = answer.map_err(|status| (status.code() as i32, status.message().to_owned()))?.into_inner();
    settle(&mut answer, target);
    Ok(answer)
}

/// All events from a revision up to another.
async fn events(channel: &Channel, from: i64, to: i64) -> Vec<Event> {
    let (requests, outbound) = tokio::sync::mpsc::channel(1);
    let create = pb::WatchCreateRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        start_revision: from,
        prev_kv: true,
        ..Default::default()
    };
    let union = pb::watch_request::RequestUnion::CreateRequest(create);
    requests.send(pb::WatchRequest { request_union: Some(union) }).await.expect("open");
    let answers = WatchClient::new(channel.clone()).watch(ReceiverStream::new(outbound)).await;
    let mut answers = answers.expect("a stream").into_inner();
    let mut events: Vec<Event> = Vec::new();
    while events.last().and_then(|event| event.kv.as_ref()).is_none_or(|kv| kv.mod_revision < to) {
        let answer = answers.message().await.expect("an answer").expect("open");
        assert!(!answer.canceled, "{answer:?}");
        events.extend(answer.events);
    }
    events
}

#[tokio::test]
async fn every_answer_is_etcds() {
    let Some(etcd) = Etcd::start().await else {
        eprintln!("etcd is not on this machine: `apt-get install etcd-server` for this test");
        return;
    };
    let bench = Bench::start().await;
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let (mut revision, mut compacted, mut changed) = (1, 1, 1);
    for n in 0..REQUESTS {
        let mut request = request().new_tree(&mut runner).expect("a strategy without filters").current();
        match &mut request {
            Request::Txn(txn) => decided_txn(txn),
            Request::Compact(compact) => {
                // Near the present now and then; a compaction to before the first revision is etcd's own affair.
                compact.revision = (revision - 60 + compact.revision).max(1);
                compact.physical = true;
            }
            // Long enough not to end by time here.
            Request::LeaseGrant(grant) => grant.ttl += 3_600,
            _ => {}
        }
        let expect = ask(&etcd.channel, request.clone()).await;
        let answer = ask(&bench.channel, request.clone()).await;
        assert_eq!(answer, expect, "request {n}: {request:?}");
        if let (Request::Compact(compact), Ok(_)) = (&request, &answer) {
            compacted = compact.revision;
        }
        let mut read = decided(range().new_tree(&mut runner).expect("a strategy without filters").current());
        if read.revision > 0 {
            read.revision = (revision - 35 + read.revision).max(1);
        }
        let expect = ask_range(&etcd.channel, read.clone()).await;
        let answer = ask_range(&bench.channel, read.clone()).await;
        assert_eq!(answer, expect, "read {n}: {read:?}");
        let now = answer.map_or(revision, |answer| answer.header.expect("header").revision);
        if now > revision {
            changed = now;
        }
        revision = now;
    }
    assert!(revision > 500, "{revision}");
    // A change that is surely the last.
    let put = pb::PutRequest { key: "z".into(), ..Default::default() };
    assert_eq!(ask(&bench.channel, Request::Put(put.clone())).await, ask(&etcd.channel, Request::Put(put)).await);
    let from = compacted + 1;
    let (ours, theirs) =
        (events(&bench.channel, from, changed + 1).await, events(&etcd.channel, from, changed + 1).await);
    assert_eq!(ours, theirs);
}
