//! Three replicas in one process: a cluster is born, the leader goes away, nothing is lost.
//!
//! Run: `cargo run --example replicated`.

use mainstay::{Node, NodeOptions, ReadLevel, Result, Store};

#[tokio::main]
async fn main() -> Result<()> {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let peers: Vec<(String, String)> = ["a", "b", "c"].map(|name| (name.into(), free_address())).into();

    let mut nodes = Vec::new();
    for (name, address) in &peers {
        let mut options = NodeOptions::new(name, scratch.path().join(name)).listen(address);
        for (peer, address) in &peers {
            options = options.peer(peer, address);
        }
        nodes.push(Node::start(options.storage(Store::builder().wal_bytes(16 << 20))).await?);
    }
    // No node starts a cluster by itself: this is its one explicit birth.
    nodes[0].init(["a", "b", "c"]).await?;

    let numbers = nodes[0].store().keyspace_async("numbers").await?;
    let mut last = None;
    for number in 0..1000u32 {
        last = Some(numbers.insert_async(number.to_be_bytes(), format!("{number}")).await?);
    }
    let last = last.expect("a thousand writes").index();

    // Any replica serves the writer's own writes: it waits until it has applied them.
    for node in &nodes {
        let store = node.store().with_read_level(ReadLevel::AtLeast(last));
        let view = store.snapshot_async().await?;
        let numbers = store.keyspace_async("numbers").await?;
        println!("{} holds {} numbers at index {}", node.peer_address().0, view.iter(&numbers).count(), view.index());
    }

    let leader = nodes.iter().position(Node::is_leader).expect("an acknowledged write came from a leader");
    nodes.remove(leader).close().await?;
    let numbers = nodes[0].store().keyspace_async("numbers").await?;
    numbers.insert_async("after", "the leader left").await?;
    println!("after a hand-over: {:?}", numbers.get_async("after").await?);
    for node in nodes {
        node.close().await?;
    }
    Ok(())
}

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound").to_string()
}
