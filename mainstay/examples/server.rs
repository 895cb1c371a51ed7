//! A replicated store inside a server of one's own: `SET key value`, `GET key`, `DEL key`, `INIT` by lines over TCP.
//!
//! Run three: `cargo run --example server -- a /tmp/a 127.0.0.1:8001 a=127.0.0.1:9001 b=127.0.0.1:9002 c=127.0.0.1:9003` and
//! so on, say `INIT` to one of them with `nc 127.0.0.1 8001`, then write to any and read from any.

use mainstay::{ErrorKind, Keyspace, Node, NodeOptions, Result};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, path, clients, peers @ ..] = &args[..] else {
        return Err("usage: server NAME DIR CLIENT_ADDRESS NAME=PEER_ADDRESS...".into());
    };

    let mut options = NodeOptions::new(name, path).client_address(clients);
    let mut members = Vec::new();
    for peer in peers {
        let (peer, address) = peer.split_once('=').ok_or("a peer is NAME=ADDRESS")?;
        options = if peer == name { options.listen(address) } else { options.peer(peer, address) };
        members.push(peer.to_owned());
    }
    let node = Node::start(options).await?;

    let listener = TcpListener::bind(clients).await?;
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (node, members) = (node.clone(), members.clone());
                tokio::spawn(async move { serve(accepted?.0, node, members).await });
            }
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    node.close().await?; // hands leadership over, then closes the volume
    Ok(())
}

async fn serve(stream: TcpStream, node: Node, members: Vec<String>) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let answer = match answer(&node, &members, &line).await {
            Ok(answer) => answer,
            Err(e) if e.kind() == ErrorKind::Indeterminate => format!("UNKNOWN {e}"),
            Err(e) => format!("ERROR {e}"),
        };
        write.write_all(format!("{answer}\n").as_bytes()).await?;
    }
    Ok(())
}

async fn answer(node: &Node, members: &[String], line: &str) -> Result<String> {
    let words: Vec<&str> = line.splitn(3, ' ').collect();
    if words == ["INIT"] {
        node.init(members).await?;
        return Ok("OK".into());
    }
    let data: Keyspace = node.store().keyspace_async("data").await?;
    Ok(match words[..] {
        ["SET", key, value] => format!("OK {}", data.insert_async(key, value).await?.index()),
        ["DEL", key] => format!("OK {}", data.remove_async(key).await?.index()),
        ["GET", key] => match data.get_async(key).await? {
            Some(value) => String::from_utf8_lossy(&value).into_owned(),
            None => "NONE".into(),
        },
        _ => "ERROR say SET, GET, DEL or INIT".into(),
    })
}
