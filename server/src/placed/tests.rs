//! The service over a node of one member with two groups.

use std::time::Duration;

use mainstay::{Node, NodeOptions, Store};
use tonic::Code;

use super::*;

struct Served {
    service: PlacedService,
    node: Node,
    _folder: tempfile::TempDir,
}

/// A cluster of one, with the groups `east` and `west` and the keyspace `users`.
async fn served(data_max: u64) -> Served {
    let folder = tempfile::tempdir().expect("a folder");
    let storage = Store::builder().wal_bytes(8 << 20).memory_bytes(32 << 20);
    let node = Node::start(NodeOptions::new("one", folder.path().join("one")).storage(storage)).await.expect("starts");
    node.init(["one"]).await.expect("a cluster");
    for group in ["east", "west"] {
        drop(node.create_group(group).await.expect("made"));
    }
    let context = Context::new("one");
    context.set_node(node.clone());
    let data = Quota::new("bytes of data", "data-max", data_max);
    let service = PlacedService { context, data, moves: Moves::default(), known: Mutex::default() };
    service.create(Request::new(pb::CreatePlacedRequest { keyspace: "users".into() })).await.expect("made");
    Served { service, node, _folder: folder }
}

fn users() -> String {
    "users".into()
}

fn with<T>(message: T, key: &'static str, word: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(key, word.parse().expect("a word"));
    request
}

fn put_of(key: impl Into<Bytes>, value: impl Into<Bytes>) -> pb::PutRequest {
    pb::PutRequest { keyspace: users(), key: key.into(), value: value.into() }
}

fn get_of(key: &'static str) -> pb::GetRequest {
    pb::GetRequest { keyspace: users(), key: key.into() }
}

fn put(key: &'static str, value: &'static str) -> pb::Mutation {
    pb::Mutation { mutation: Some(Mutation::Put(pb::Pair { key: key.into(), value: value.into() })) }
}

impl Served {
    async fn value(&self, key: &'static str) -> Option<Bytes> {
        self.service.get(Request::new(get_of(key))).await.expect("read").into_inner().value
    }

    async fn batch(&self, mutations: Vec<pb::Mutation>) -> Result<(), Status> {
        let request = pb::BatchRequest { keyspace: users(), mutations };
        self.service.batch(Request::new(request)).await.map(drop)
    }

    async fn split(&self, key: impl Into<Bytes>) -> Result<(), Status> {
        self.service.split(Request::new(pb::SplitRequest { keyspace: users(), key: key.into() })).await.map(drop)
    }

    async fn join(&self, key: impl Into<Bytes>) -> Result<(), Status> {
        self.service.join(Request::new(pb::JoinRequest { keyspace: users(), key: key.into() })).await.map(drop)
    }

    async fn move_to(&self, key: impl Into<Bytes>, to: impl Into<String>) -> Result<(), Status> {
        let request = pb::MoveRequest { keyspace: users(), key: key.into(), to: to.into() };
        self.service.r#move(Request::new(request)).await.map(drop)
    }

    /// `(first, group)` of each range.
    async fn ranges(&self) -> Vec<(Bytes, String)> {
        let request = Request::new(pb::ListRangesRequest { keyspace: users() });
        let ranges = self.service.list_ranges(request).await.expect("known").into_inner().ranges;
        ranges.into_iter().map(|range| (range.first, range.group)).collect()
    }

    /// All pages, as the client of a scan takes them.
    async fn pages(&self, mut range: pb::KeyRange, limit: u32, reverse: bool) -> Vec<Vec<Bytes>> {
        let mut pages = Vec::new();
        loop {
            let request = pb::ScanRequest { keyspace: users(), range: Some(range.clone()), limit, reverse };
            let page = self.service.scan(Request::new(request)).await.expect("read").into_inner();
            pages.push(page.pairs.into_iter().map(|pair| pair.key).collect());
            if page.next.is_empty() {
                return pages;
            }
            *(if reverse { &mut range.end } else { &mut range.start }) = page.next;
        }
    }

    async fn close(self) {
        self.service.moves.close().await;
        self.node.close().await.expect("closes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_are_split_moved_and_joined_and_a_batch_is_of_one_group() {
    let served = served(u64::MAX).await;
    served.batch(vec![put("a", "1"), put("m", "2"), put("t", "3")]).await.expect("one range");
    served.split("k").await.expect("split");
    served.split("s").await.expect("split");
    served.move_to("m", "east").await.expect("moved");
    served.move_to("z", "west").await.expect("moved");
    let at = |first: &'static str, group: &str| (Bytes::from(first), group.to_owned());
    assert_eq!(served.ranges().await, [at("", ""), at("k", "east"), at("s", "west")]);
    let refused = served.batch(vec![put("m", "4"), put("t", "5")]).await.expect_err("of two groups");
    assert_eq!(refused.code(), Code::InvalidArgument);
    for part in ["key=m is held by group=east", "key=t by group=west"] {
        assert!(refused.message().contains(part), "{refused}");
    }
    let key_range = |start: &'static str, end: &'static str| pb::KeyRange { start: start.into(), end: end.into() };
    let cleared = |range| pb::Mutation { mutation: Some(Mutation::DeleteRange(range)) };
    served.batch(vec![cleared(key_range("k", "s")), put("n", "6")]).await.expect("of one group");
    assert_eq!((served.value("m").await, served.value("n").await), (None, Some("6".into())));
    assert_eq!(served.join("s").await.expect_err("two groups").code(), Code::InvalidArgument);
    served.move_to("", "east").await.expect("the empty key is in the first range");
    served.join("k").await.expect("joined, or it was one already");
    assert_eq!(served.ranges().await, [at("", "east"), at("s", "west")]);
    served.move_to("a", "").await.expect("back to the first group");
    served.service.delete(Request::new(pb::DeleteRequest { keyspace: users(), key: "a".into() })).await.expect("gone");
    assert_eq!(served.value("a").await, None);
    let listed = served.service.list(Request::new(pb::ListPlacedRequest {})).await.expect("known").into_inner();
    assert_eq!(listed.keyspaces, ["users"]);
    served.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_follow_each_other_both_ways_and_are_bounded() {
    let served = served(u64::MAX).await;
    let keys: Vec<Bytes> = (0..7).map(|n| Bytes::from(format!("k{n}"))).collect();
    for key in &keys {
        served.service.put(Request::new(put_of(key.clone(), "v"))).await.expect("written");
    }
    served.split("k3").await.expect("split");
    served.move_to("k3", "east").await.expect("moved");
    let all = pb::KeyRange::default();
    for limit in [1, 2, 3, 7, 8] {
        let pages = served.pages(all.clone(), limit, false).await;
        assert!(pages.iter().all(|page| page.len() <= limit as usize), "{limit}: {pages:?}");
        assert_eq!(pages.len(), keys.len().div_ceil(limit as usize), "no page is empty");
        assert_eq!(pages.concat(), keys, "{limit}");
        let mut back = served.pages(all.clone(), limit, true).await.concat();
        back.reverse();
        assert_eq!(back, keys, "{limit}");
    }
    let some = pb::KeyRange { start: "k1".into(), end: "k4".into() };
    assert_eq!(served.pages(some.clone(), 2, false).await.concat(), keys[1..4]);
    assert_eq!(served.pages(some, 0, true).await, [["k3", "k2", "k1"].map(Bytes::from)]);
    // Two of these are more than a page holds, and one alone is as well.
    for key in ["k1", "k2", "k5"] {
        served.service.put(Request::new(put_of(key, vec![7; PAGE_BYTES_MAX + 1]))).await.expect("written");
    }
    let pages = served.pages(all, 0, false).await;
    let counts: Vec<usize> = pages.iter().map(Vec::len).collect();
    assert_eq!((counts, pages.concat()), (vec![1, 1, 1, 2, 1, 1], keys));
    served.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_has_the_code_of_its_kind() {
    let served = served(u64::MAX).await;
    let service = &served.service;
    let code = |status: Status| status.code();
    let long = || Bytes::from(vec![b'k'; KEY_BYTES_MAX + 1]);
    let put = async |message: pb::PutRequest| service.put(Request::new(message)).await.map(drop).map_err(code);
    assert_eq!(put(put_of("", "v")).await, Err(Code::InvalidArgument), "an empty key");
    assert_eq!(put(put_of(long(), "v")).await, Err(Code::InvalidArgument), "a long key");
    assert_eq!(put(put_of(vec![b'k'; KEY_BYTES_MAX], "v")).await, Ok(()), "the longest");
    assert_eq!(put(put_of("k", vec![0; VALUE_BYTES_MAX + 1])).await, Err(Code::InvalidArgument), "a long value");
    let elsewhere = pb::PutRequest { keyspace: "usres".into(), ..put_of("k", "v") };
    assert_eq!(put(elsewhere.clone()).await, Err(Code::NotFound), "nobody made it");
    assert_eq!(put(elsewhere).await, Err(Code::NotFound), "nor did the first try");
    assert_eq!(put(pb::PutRequest { keyspace: String::new(), ..put_of("k", "v") }).await, Err(Code::InvalidArgument));
    let empty = service.get(Request::new(get_of(""))).await.map(drop).map_err(code);
    assert_eq!(empty, Err(Code::InvalidArgument));
    for name in ["", "a\nb", &"n".repeat(PLACED_NAME_BYTES_MAX + 1)] {
        let request = pb::CreatePlacedRequest { keyspace: name.to_owned() };
        assert_eq!(service.create(Request::new(request)).await.map(drop).map_err(code), Err(Code::InvalidArgument));
    }

    let nothing = pb::Mutation { mutation: None };
    let many = vec![super::tests::put("k", "v"); MUTATIONS_MAX + 1];
    for mutations in [vec![], vec![nothing], many] {
        assert_eq!(served.batch(mutations).await.map_err(code), Err(Code::InvalidArgument));
    }
    let scan = async |range: pb::KeyRange, limit: u32| {
        let request = pb::ScanRequest { keyspace: users(), range: Some(range), limit, reverse: false };
        service.scan(Request::new(request)).await.map(|page| page.into_inner().pairs.len()).map_err(code)
    };
    assert_eq!(scan(pb::KeyRange::default(), PAGE_PAIRS_MAX as u32 + 1).await, Err(Code::InvalidArgument));
    // What a page of the longest key names as the next one is a bound.
    assert_eq!(scan(pb::KeyRange { start: long(), end: Bytes::new() }, 1).await, Ok(0));
    let beyond = [long(), long()].concat().into();
    assert_eq!(scan(pb::KeyRange { start: beyond, end: Bytes::new() }, 1).await, Err(Code::InvalidArgument));

    for key in [Bytes::new(), vec![b'k'; 4097].into()] {
        assert_eq!(served.split(key).await.map_err(code), Err(Code::InvalidArgument));
    }
    assert_eq!(served.join("").await.map_err(code), Err(Code::InvalidArgument));
    let unknown = served.move_to("k", "north").await.expect_err("nobody made it");
    assert_eq!((unknown.code(), unknown.message()), (Code::NotFound, "no such group name=north"));
    assert_eq!(served.move_to("k", "n".repeat(65)).await.map_err(code), Err(Code::InvalidArgument));
    assert_eq!(served.move_to(long(), "east").await.map_err(code), Err(Code::InvalidArgument));

    // What the metadata asks for is kept or refused.
    let writes = [
        ("mainstay-durability", "all", Code::Ok),
        ("mainstay-durability", "local", Code::Unimplemented),
        ("mainstay-durability", "archive", Code::Unimplemented),
        ("mainstay-durability", "fast", Code::InvalidArgument),
        ("mainstay-durability", "site:nowhere", Code::InvalidArgument),
        ("mainstay-branch", "trial", Code::Unimplemented),
        ("mainstay-client-token", "000102030405060708090a0b0c0d0e0f-17", Code::Unimplemented),
    ];
    for (key, word, expect) in writes {
        let answer = service.put(with(put_of("k", "v"), key, word)).await;
        assert_eq!(answer.map_or_else(code, |_| Code::Ok), expect, "{key}: {word}");
    }
    let reads = [
        ("mainstay-read-level", "lease", Code::Ok),
        ("mainstay-read-level", "local", Code::Ok),
        ("mainstay-read-level", "stale:5", Code::Ok),
        ("mainstay-read-level", "at-least:1", Code::Unimplemented),
        ("mainstay-read-level", "soon", Code::InvalidArgument),
        ("mainstay-branch", "trial", Code::Unimplemented),
    ];
    for (key, word, expect) in reads {
        let answer = service.get(with(get_of("k"), key, word)).await;
        assert_eq!(answer.map_or_else(code, |_| Code::Ok), expect, "{key}: {word}");
    }
    served.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_may_hold_no_more_takes_deletes_and_no_puts() {
    let served = served(1000).await;
    served.batch(vec![put("a", "1")]).await.expect("there is room");
    served.service.data.observe(1000);
    let refused = served.service.put(Request::new(put_of("b", "2"))).await.expect_err("no room");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("setting=data-max limit=1000"), "{refused}");
    assert_eq!(served.batch(vec![put("b", "2")]).await.expect_err("no room").code(), Code::ResourceExhausted);
    let removed = pb::Mutation { mutation: Some(Mutation::Delete("a".into())) };
    served.batch(vec![removed]).await.expect("it gives room");
    assert_eq!(served.value("a").await, None);
    served.close().await;
}

/// A client that waits no longer than it takes to begin: the RPC is dropped with it, the move is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_whose_client_goes_away_arrives() {
    let served = served(u64::MAX).await;
    for n in 0..40 {
        served.service.put(Request::new(put_of(format!("k{n:02}"), vec![n; 200_000]))).await.expect("written");
    }
    // Held as by another move of the keyspace: this one has begun and waits.
    let keyspace = served.service.keyspace("users").await.expect("made");
    let other = keyspace.moving.lock().await;
    {
        let mut moving = std::pin::pin!(served.move_to("k", "east"));
        assert!(futures_util::poll!(moving.as_mut()).is_pending());
    }
    assert_eq!(served.ranges().await, [(Bytes::new(), String::new())]);
    drop(other);
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while served.ranges().await != [(Bytes::new(), "east".to_owned())] {
        assert!(std::time::Instant::now() < end, "it did not arrive: {:?}", served.ranges().await);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(served.pages(pb::KeyRange::default(), 0, false).await.concat().len(), 40);
    served.close().await;
}
