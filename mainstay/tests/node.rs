//! The replicated store through the facade.

use mainstay::{
    Batch, Change, ChangeKind, Durability, ErrorKind, Keyspace, LogIndex, Node, NodeOptions, PlacedBatch, ReadLevel,
    Store,
};

fn options(name: &str, path: &std::path::Path) -> NodeOptions {
    NodeOptions::new(name, path.join(name)).storage(Store::builder().wal_bytes(8 << 20).memory_bytes(32 << 20))
}

const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three that know each other.
fn three(path: &std::path::Path) -> Vec<NodeOptions> {
    let address =
        |_| std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").to_string();
    let addresses = NAMES.map(address);
    let of = |(name, address): (&&str, &String)| {
        let options = options(name, path).listen(address);
        NAMES.iter().zip(&addresses).fold(options, |options, (peer, address)| options.peer(*peer, address))
    };
    NAMES.iter().zip(&addresses).map(of).collect()
}

#[test]
fn one_node_without_tokio_serves_the_blocking_interface() {
    let folder = tempfile::tempdir().expect("a folder");
    let node = Node::start_blocking(options("one", folder.path()).site("here").priority(3)).expect("starts");
    assert_eq!(node.status().role, "waiting");
    let early = node.store().keyspace("data").err().expect("no cluster yet");
    assert!(early.is_retryable() || matches!(early.kind(), ErrorKind::Unavailable), "{early}");
    let cluster = node.block_on(node.init(["one"])).expect("a cluster");
    assert_eq!(node.block_on(node.init(["one"])).expect("the same again"), cluster);
    let priorities = || node.status().members.iter().map(|m| (m.id, m.priority)).collect::<Vec<_>>();
    let id = node.status().id;
    assert_eq!(priorities(), [(id, 3)], "told at birth");
    node.block_on(node.set_member_priority(id, 200)).expect("changed");
    assert_eq!(priorities(), [(id, 200)]);
    let store = node.store();
    let data = store.keyspace("data").expect("made");
    let commit = data.insert("a", "1").expect("written");
    assert_eq!(data.get("a").expect("readable").as_deref(), Some(&b"1"[..]));
    let local = store.with_read_level(ReadLevel::AtLeast(commit.index())).keyspace("data").expect("there");
    assert_eq!(local.iter().count(), 1);

    let mut batch = Batch::new();
    batch.insert(&data, "b", "2");
    let commit = store.commit_with(batch, Durability::Local).expect("durable here");
    store.wait(commit, Durability::Quorum).expect("durable on a quorum");
    assert!(data.contains_key("b").expect("readable"));
    let all = store.commit_with(Batch::new(), Durability::All).expect("the one voter has it");
    store.wait(all, Durability::Site("here".into())).expect("so does its site");
    let unsupported = store.commit_with(Batch::new(), Durability::Archive).expect_err("not yet");
    assert_eq!(unsupported.kind(), ErrorKind::Unsupported);
    let nowhere = store.commit_with(Batch::new(), Durability::Site("nowhere".into())).expect_err("nobody is there");
    assert_eq!(nowhere.kind(), ErrorKind::Invalid);
    let stale = store.with_read_level(ReadLevel::Stale(std::time::Duration::from_millis(5)));
    assert!(stale.keyspace("data").expect("there").contains_key("b").expect("readable"));
    node.block_on(node.close()).expect("closes");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_serve_one_store_and_its_clones() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut nodes = Vec::new();
    for options in three(folder.path()) {
        nodes.push(Node::start(options).await.expect("starts"));
    }
    nodes[1].init(NAMES).await.expect("a cluster");
    let data = nodes[2].store().keyspace_async("data").await.expect("made");
    for number in 0..50u32 {
        data.insert_async(number.to_be_bytes(), "x").await.expect("written");
    }
    let checkpoint = nodes[0].store().checkpoint_async("first").await.expect("taken");
    let clone = nodes[1].store().create_clone_async("trial", "first").await.expect("made");
    clone.keyspace_async("data").await.expect("there").insert_async("only here", "y").await.expect("written");
    for node in &nodes {
        let view = node.store().snapshot_async().await.expect("a view");
        let data = node.store().keyspace_async("data").await.expect("there");
        let mut scan = view.iter(&data);
        assert_eq!(scan.next_chunk_async(1000).await.expect("readable").len(), 50);
        let found = node.store().checkpoints();
        assert_eq!(found.iter().map(|c| (c.name.as_str(), c.index)).collect::<Vec<_>>(), [("first", checkpoint.index)]);
        let trial = node.store().open_clone("trial").expect("applied");
        let trial = trial.keyspace_async("data").await.expect("there");
        assert!(trial.get_async("only here").await.expect("readable").is_some());
    }
    let leader = nodes.iter().position(Node::is_leader).expect("a leader");
    nodes.remove(leader).close().await.expect("hands over and closes");
    data.insert_async("after", "z").await.ok();
    let data = nodes[0].store().keyspace_async("data").await.expect("there");
    data.insert_async("after", "z").await.expect("written under the next leader");
    for node in nodes {
        node.close().await.expect("closes");
    }
}

/// All that a node gives from `from` to `upto`.
async fn changes(node: &Node, from: LogIndex, upto: LogIndex) -> Vec<Change> {
    let mut changes = node.store().changes_async(from).await.expect("recorded");
    let mut found = Vec::new();
    while changes.position() <= upto {
        let change = changes.next_async().await.expect("the log is there");
        if change.index <= upto {
            found.push(change);
        }
    }
    found
}

/// A reader of the log alone would give what conditions held back, and whoever applied it later might give something else.
#[tokio::test(flavor = "multi_thread")]
async fn every_node_gives_the_same_changes() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = three(folder.path());
    let mut nodes = Vec::new();
    for options in options.clone() {
        nodes.push(Node::start(options).await.expect("starts"));
    }
    nodes[0].init(NAMES).await.expect("a cluster");
    let data = nodes[0].store().keyspace_async("data").await.expect("made");
    let leader = nodes.iter().find(|node| node.is_leader()).expect("one leads");
    let unrecorded = leader.store().changes_async(LogIndex(1)).await.err().map(|error| error.kind());
    assert_eq!(unrecorded, Some(ErrorKind::Unsupported));
    let from = nodes[2].store().record_changes_async().await.expect("recorded");
    let (mut last, mut away) = (from, 0);
    for round in 0..3 {
        // Most of them share entries; of three that claim one key one gets it.
        let claims = (0..30).map(|n| {
            let (store, data) = (nodes[n % nodes.len()].store(), data.clone());
            tokio::spawn(async move {
                let (key, mut batch) = (format!("k{round}-{}", n / 3), Batch::new());
                batch.require_absent(&data, &key).insert(&data, &key, n.to_string());
                store.commit_async(batch).await
            })
        });
        let mut made = 0;
        for claim in claims.collect::<Vec<_>>() {
            match claim.await.expect("no panic") {
                Ok(commit) => (made, last) = (made + 1, last.max(commit.index())),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Conflict, "{error}"),
            }
        }
        assert_eq!(made, 10);
        if round == 0 {
            away = nodes.iter().position(|node| !node.is_leader()).expect("one leads");
            nodes.remove(away).close().await.expect("closes");
        }
    }
    let found = changes(&nodes[0], from, last).await;
    let ops = found.iter().flat_map(|change| match &change.kind {
        ChangeKind::Writes(ops) => ops.iter(),
        other => panic!("{other:?}"),
    });
    let view = nodes[0].store().snapshot_async().await.expect("a view");
    let ops: Vec<_> = ops.filter(|op| op.keyspace() == data.id()).collect();
    assert_eq!(ops.len(), 30);
    for op in ops {
        assert_eq!(view.get_async(&data, op.key()).await.expect("readable").as_ref(), op.value(), "as it was decided");
    }
    assert_eq!(changes(&nodes[1], from, last).await, found);
    // On one that was away, from where a reader was on another.
    let (given, rest) = found.split_at(found.len() / 2);
    let position = LogIndex(given.last().expect("some").index.0 + 1);
    nodes.push(Node::start(options[away].clone()).await.expect("starts again"));
    assert_eq!(changes(&nodes[2], position, last).await, rest);
    for node in nodes {
        node.close().await.expect("closes");
    }
}

/// What is written in many groups at once shares the writes of the device. On one thread, so that all of it is proposed before the first is durable.
#[tokio::test]
async fn many_groups_share_one_log() {
    const GROUPS: usize = 16;
    const WRITES: usize = 30;
    let folder = tempfile::tempdir().expect("a folder");
    let node = Node::start(options("one", folder.path())).await.expect("starts");
    node.init(["one"]).await.expect("a cluster");
    let mut groups = Vec::new();
    for n in 0..GROUPS {
        let store = node.create_group(&format!("g{n}")).await.expect("made");
        groups.push(store.keyspace_async("data").await.expect("made"));
    }
    assert_eq!(node.group_names().len(), GROUPS);
    assert_eq!(node.store().keyspaces(), ["default"], "what groups are made of is not for callers");
    let reserved = node.store().keyspace_async("mainstay.group.1.x").await.err().expect("reserved");
    assert_eq!(reserved.kind(), ErrorKind::Invalid);
    let before = node.engine().wal().stats();
    for key in 0..WRITES {
        let write = |(n, data): (usize, &Keyspace)| tokio::spawn(data.insert_async(format!("k{key}"), n.to_string()));
        for write in groups.iter().enumerate().map(write).collect::<Vec<_>>() {
            write.await.expect("no panic").expect("written");
        }
    }
    let after = node.engine().wal().stats();
    let (batches, records) = (after.batches - before.batches, after.records - before.records);
    assert!(records >= (GROUPS * WRITES) as u64, "{records} records");
    assert!(batches < records, "{batches} device writes for {records} records");
    drop(groups);
    node.close().await.expect("closes");

    // As they were, and apart.
    let node = Node::start(options("one", folder.path())).await.expect("starts again");
    while !node.is_leader() {
        node.changed().await;
    }
    for n in 0..GROUPS {
        let data = node.open_group(&format!("g{n}")).await.expect("there").keyspace_async("data").await.expect("there");
        let value = data.get_async("k0").await.expect("readable");
        assert_eq!(value.as_deref(), Some(n.to_string().as_bytes()));
    }
    assert_eq!(node.open_group("g16").await.err().map(|e| e.kind()), Some(ErrorKind::NotFound));
    node.close().await.expect("closes");
}

/// The blocking forms from a thread without a runtime, the others under an executor that is not the node's.
#[test]
fn a_placed_keyspace_is_one_map_wherever_its_ranges_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let node = Node::start_blocking(options("one", folder.path())).expect("starts");
    node.block_on(node.init(["one"])).expect("a cluster");
    drop(node.block_on(node.create_group("east")).expect("made"));
    let absent = node.block_on(node.open_placed("cities")).err().expect("nobody made it");
    assert_eq!(absent.kind(), ErrorKind::NotFound);
    assert!(node.block_on(node.placed_names()).expect("known").is_empty());
    let cities = node.block_on(node.placed("cities")).expect("made");
    assert_eq!(cities.name(), "cities");
    drop(node.block_on(node.placed("areas")).expect("made"));
    assert_eq!(node.block_on(node.open_placed("cities")).expect("there").name(), "cities");
    assert_eq!(node.block_on(node.placed_names()).expect("known"), ["areas", "cities"]);
    for name in ["athens", "berlin", "cairo", "delhi"] {
        cities.insert(name, name.to_uppercase()).expect("written");
    }
    node.block_on(cities.split("c")).expect("split");
    node.block_on(cities.move_range("cairo", Some("east"))).expect("moved");
    let ranges = node.block_on(cities.ranges()).expect("known");
    let held: Vec<_> = ranges.iter().map(|range| (&range.first[..], range.group.as_deref())).collect();
    assert_eq!(held, [(&b""[..], None), (&b"c"[..], Some("east"))]);

    let mut batch = PlacedBatch::new();
    batch.remove("cairo").insert("dakar", "DAKAR");
    assert_eq!((batch.len(), batch.is_empty()), (2, false));
    cities.commit(batch.clone()).expect("of one group");
    batch.insert("bergen", "BERGEN");
    let refused = cities.commit(batch).expect_err("of two");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.to_string().contains("key=bergen"), "{refused}");
    let mut long = PlacedBatch::new();
    long.insert("b".repeat(60_000), "").insert("d".repeat(60_000), "");
    let refused = cities.commit(long).expect_err("of two").to_string();
    assert!(refused.len() < 1024 && refused.contains("group=east"), "{refused}");
    let local = cities.with_durability(Durability::Local).insert("x", "y").expect_err("decided at apply");
    assert_eq!(local.kind(), ErrorKind::Unsupported);

    let names = |scan: mainstay::PlacedScan| -> Vec<String> {
        scan.map(|entry| String::from_utf8(entry.expect("read").key.to_vec()).expect("text")).collect()
    };
    assert_eq!(names(cities.iter()), ["athens", "berlin", "dakar", "delhi"]);
    assert_eq!(names(cities.prefix("d")), ["dakar", "delhi"]);
    let local = cities.with_read_level(ReadLevel::Local);
    let last = local.range("b".."delhi").next_back().expect("one").expect("read");
    assert_eq!((&last.key[..], &last.value[..]), (&b"dakar"[..], &b"DAKAR"[..]));
    let elsewhere = mainstay_io::block_on(async {
        let mut scan = cities.iter();
        let first = scan.next_async().await.expect("read");
        (first.map(|entry| entry.key), cities.get_async("cairo").await.expect("read"))
    });
    assert_eq!(elsewhere, (Some("athens".into()), None));
    assert_eq!(node.store().keyspaces(), ["default"], "what it is made of is not for callers");
    cities.remove("athens").expect("removed");
    assert_eq!(cities.get("athens").expect("read"), None);
    node.block_on(node.close()).expect("closes");
}
