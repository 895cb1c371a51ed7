//! The transport over real sockets on loopback.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::{
    Envelope, Error, ErrorKind, FRAME_BYTES_MAX, Handler, Hello, NodeId, PeerAddress, Result, TcpTransport, Transport,
};

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(test)
}

/// Answers with what it got; method 9 waits for `go`, method 8 fails.
#[derive(Default)]
struct Echo {
    handled: AtomicU64,
    order: Mutex<Vec<u8>>,
    go: Notify,
    arrived: Notify,
}

struct EchoHandler(Arc<Echo>, [u8; 16]);

impl Handler for EchoHandler {
    fn accept(&self, hello: &Hello) -> Result<()> {
        if hello.cluster == self.1 { Ok(()) } else { Err(Error::new(ErrorKind::Foreign, "another cluster")) }
    }

    fn handle(&self, from: Hello, request: Envelope) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>> {
        let echo = self.0.clone();
        echo.order.lock().expect("not poisoned").push(request.body.first().copied().unwrap_or(0));
        Box::pin(async move {
            echo.handled.fetch_add(1, Ordering::Relaxed);
            echo.arrived.notify_one();
            match request.method {
                8 => Err(Error::not_leader(Some((from.node, "there".into())), "no")),
                9 => {
                    echo.go.notified().await;
                    Ok(request)
                }
                _ => Ok(request),
            }
        })
    }
}

fn hello(node: u64, cluster: u8, address: &PeerAddress) -> Hello {
    Hello {
        cluster: [cluster; 16],
        node: NodeId(node),
        incarnation: [node as u8; 16],
        name: format!("n{node}"),
        peer_address: address.clone(),
        settings_fingerprint: 1,
    }
}

async fn node(id: u64, cluster: u8) -> (TcpTransport, Arc<Echo>) {
    let transport = TcpTransport::bind("127.0.0.1:0", None).await.expect("loopback");
    let echo = Arc::new(Echo::default());
    let address = transport.local_address();
    transport.serve(hello(id, cluster, &address), Arc::new(EchoHandler(echo.clone(), [cluster; 16])));
    (transport, echo)
}

fn request(method: u8, body: &'static [u8]) -> Envelope {
    Envelope { method, body: Bytes::from_static(body) }
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn requests_are_answered_and_errors_keep_their_kind() {
    run(async {
        let (a, _) = node(1, 7).await;
        let (b, echo) = node(2, 7).await;
        let to = b.local_address();
        let answer = a.call(to.clone(), Some(NodeId(2)), request(3, b"hi"), LONG).await.expect("answered");
        assert_eq!((answer.method, answer.body.as_ref()), (3, b"hi".as_ref()));
        let error = a.call(to.clone(), Some(NodeId(2)), request(8, b""), LONG).await.expect_err("refused");
        assert_eq!((error.kind(), error.leader()), (ErrorKind::NotLeader, Some(&(NodeId(1), "there".into()))));
        let big = Envelope { method: 3, body: Bytes::from(vec![5; 20 << 20]) };
        let answer = a.call(to.clone(), None, big, LONG).await.expect("20 MiB fit a frame");
        assert_eq!(answer.body.len(), 20 << 20);
        let huge = Envelope { method: 3, body: Bytes::from(vec![5; FRAME_BYTES_MAX + 1]) };
        assert_eq!(a.call(to.clone(), None, huge, LONG).await.expect_err("too long").kind(), ErrorKind::Invalid);

        // A slow request does not hold up the others of its connection.
        let slow = tokio::spawn(a.call(to.clone(), Some(NodeId(2)), request(9, b"slow"), LONG));
        while echo.handled.load(Ordering::Relaxed) < 4 {
            echo.arrived.notified().await;
        }
        a.call(to.clone(), Some(NodeId(2)), request(3, b"fast"), LONG).await.expect("answered");
        echo.go.notify_one();
        slow.await.expect("no panic").expect("answered");
        a.close().await;
        b.close().await;
        let error = a.call(to, None, request(3, b""), LONG).await.expect_err("closed");
        assert_eq!(error.kind(), ErrorKind::Closed);
    });
}

#[test]
fn a_stranger_is_refused_at_the_door() {
    run(async {
        let (a, _) = node(1, 7).await;
        let (b, echo) = node(2, 8).await;
        let (c, _) = node(3, 7).await;
        let error = a.call(b.local_address(), None, request(3, b""), LONG).await.expect_err("another cluster");
        assert_eq!(error.kind(), ErrorKind::Foreign);
        let error = a.call(c.local_address(), Some(NodeId(4)), request(3, b""), LONG).await.expect_err("another id");
        assert_eq!(error.kind(), ErrorKind::Foreign);
        assert_eq!(echo.handled.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn nobody_there_is_unavailable_and_a_lost_answer_is_not() {
    run(async {
        let (a, _) = node(1, 7).await;
        let (b, echo) = node(2, 7).await;
        let to = b.local_address();
        let waiting = tokio::spawn(a.call(to.clone(), Some(NodeId(2)), request(9, b""), LONG));
        echo.arrived.notified().await;
        b.close().await;
        let error = waiting.await.expect("no panic").expect_err("it went away");
        assert_eq!(error.kind(), ErrorKind::Indeterminate);
        let error = a.call(to.clone(), Some(NodeId(2)), request(3, b""), LONG).await.expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::Unavailable);

        // Back under the same address: the next call dials again.
        let again = loop {
            match TcpTransport::bind(&to.0, None).await {
                Ok(transport) => break transport,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        again.serve(hello(2, 7, &to), Arc::new(EchoHandler(Arc::default(), [7; 16])));
        while a.call(to.clone(), Some(NodeId(2)), request(3, b""), LONG).await.is_err() {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_silent_peer_costs_one_timeout() {
    run(async {
        let (a, _) = node(1, 7).await;
        // Accepts and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let to = PeerAddress(silent.local_addr().expect("bound").to_string());
        let held = tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                held.push(silent.accept().await.expect("accepts"));
            }
        });
        let short = Duration::from_millis(50);
        let error = a.call(to, None, request(3, b""), short).await.expect_err("it says nothing");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "the request was never given to the socket");
        held.abort();

        // Answers the handshake, then nothing: what was sent may have been handled, and the connection is given up.
        let (b, echo) = node(2, 7).await;
        let to = b.local_address();
        let error = a.call(to.clone(), Some(NodeId(2)), request(9, b""), short).await.expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::Indeterminate);
        // On another connection, once the first has noticed.
        while a.call(to.clone(), Some(NodeId(2)), request(3, b""), LONG).await.is_err() {
            tokio::task::yield_now().await;
        }
        assert!(echo.handled.load(Ordering::Relaxed) >= 2);
    });
}

#[test]
fn the_address_that_a_peer_announced_is_tried_first() {
    run(async {
        let (a, _) = node(1, 7).await;
        let (b, echo) = node(2, 7).await;
        // b says where it is by dialling a; what a was told by others is stale.
        b.call(a.local_address(), Some(NodeId(1)), request(3, b""), LONG).await.expect("answered");
        let nowhere = PeerAddress("127.0.0.1:1".into());
        a.call(nowhere, Some(NodeId(2)), request(3, b""), LONG).await.expect("found where it said");
        assert_eq!(echo.handled.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn hostile_connections_end_and_harm_nobody() {
    run(async {
        let (a, _) = node(1, 7).await;
        let (b, _) = node(2, 7).await;
        let to = b.local_address();
        let mut long = b"MSTNPEER".to_vec();
        long.extend_from_slice(&[0; 8]);
        long.extend_from_slice(&u32::MAX.to_le_bytes());
        long.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut wrong = b"MSTNPEER".to_vec();
        wrong.extend_from_slice(&[9; 24]);
        for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 100], long, wrong] {
            let mut stream = TcpStream::connect(&to.0).await.expect("accepts");
            // The other end may close before all is written.
            let _ = stream.write_all(&bytes).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.len() < 200, "nothing of use");
        }
        a.call(to, Some(NodeId(2)), request(3, b""), LONG).await.expect("still serves");
    });
}

#[test]
fn handlers_see_the_requests_of_a_connection_in_order() {
    run(async {
        let (a, _) = node(1, 7).await;
        let (b, echo) = node(2, 7).await;
        let bodies: Vec<u8> = (0..200).collect();
        let calls: Vec<_> = bodies
            .iter()
            .map(|i| a.call(b.local_address(), Some(NodeId(2)), Envelope { method: 3, body: vec![*i].into() }, LONG))
            .collect();
        for answer in futures_util::future::join_all(calls).await {
            answer.expect("answered");
        }
        assert_eq!(*echo.order.lock().expect("not poisoned"), bodies);
    });
}
