//! [`Transport`] over TCP: one outgoing connection to a peer, requests multiplexed by number.
//!
//! # Place
//! the only file that opens sockets; runs on tokio, whatever runtime the node is generic over
//! # Format
//! docs/format.md, "Peer protocol": a preamble, then frames of a header of 24 bytes and a body
//! # Invariants
//! - P1. No request is served, and none is sent, before both ends have said [`Hello`] and accepted the other's.
//! - P2. A frame is at most [`FRAME_BYTES_MAX`] and has the checksum it says; else the connection ends.
//! - P3. A request is `Unavailable` exactly when no byte of it was given to a socket.
//! - P4. Every wait has a limit: connect, handshake, request. A connection on which a request waited in vain without a
//!   single byte coming back is given up, so a peer that vanished without a word costs one timeout and not each one.
//! - P5. It listens where it was told and nowhere else. It has no encryption and no authentication yet: whoever lets it
//!   listen beyond loopback decides that.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the one file that is on tokio; a simulation has a transport of its own"
)]

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use mainstay_io::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::wire::{Reader, Writer};
use crate::{Envelope, Error, ErrorKind, Handler, Hello, NodeId, PeerAddress, Result, Transport};

/// Longest body of a frame.
pub const FRAME_BYTES_MAX: usize = 32 << 20;
/// Requests that wait towards one peer.
const QUEUE_MAX: usize = 1024;
/// Requests of one peer in work at once; more wait in its socket.
const IN_WORK_MAX: usize = 1024;
/// Incoming connections at once.
const CONNECTIONS_MAX: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// After a failed connect, requests are refused for this long instead of dialling for each.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);
const PREAMBLE: &[u8; 8] = b"MSTNPEER";
pub(crate) const HEADER_BYTES: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hello = 1,
    Request = 2,
    Answer = 3,
    Refusal = 4,
}

struct Frame {
    kind: Kind,
    method: u8,
    number: u64,
    body: Bytes,
}

fn unavailable(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unavailable, message)
}

fn checksum(head: &[u8], body: &[u8]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(head);
    digest.update(body);
    digest.finalize()
}

fn encode_header(frame: &Frame) -> [u8; HEADER_BYTES] {
    let mut tail = BytesMut::with_capacity(HEADER_BYTES);
    tail.extend_from_slice(&u32::try_from(frame.body.len()).unwrap_or(u32::MAX).to_le_bytes());
    tail.extend_from_slice(&[frame.kind as u8, frame.method, 0, 0]);
    tail.extend_from_slice(&frame.number.to_le_bytes());
    let mut header = [0; HEADER_BYTES];
    let crc = checksum(&tail, &frame.body).to_le_bytes();
    for (to, from) in header.iter_mut().zip(crc.iter().chain(tail.iter())) {
        *to = *from;
    }
    header
}

/// Kind, method, number, length of the body and checksum of a header.
fn decode_header(header: &[u8; HEADER_BYTES]) -> Result<(Kind, u8, u64, usize, u64)> {
    let damaged = |what: &str| Error::new(ErrorKind::Corrupt, format!("frame is damaged what={what}"));
    let (crc, rest) = header.split_first_chunk::<8>().ok_or_else(|| damaged("header"))?;
    let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("header"))?;
    let (&[kind, method, zero0, zero1], number) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("header"))?;
    let number = number.first_chunk::<8>().ok_or_else(|| damaged("header"))?;
    let kind = match kind {
        1 => Kind::Hello,
        2 => Kind::Request,
        3 => Kind::Answer,
        4 => Kind::Refusal,
        _ => return Err(damaged("kind")),
    };
    if (zero0, zero1) != (0, 0) {
        return Err(damaged("reserved"));
    }
    let length = u32::from_le_bytes(*length) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(Error::new(ErrorKind::Corrupt, format!("frame is too long bytes={length}")));
    }
    Ok((kind, method, u64::from_le_bytes(*number), length, u64::from_le_bytes(*crc)))
}

/// What a handler answers, as it is sent.
fn answer_frame(number: u64, answer: Result<Envelope>) -> Frame {
    let refusal = |error: &Error| Frame { kind: Kind::Refusal, method: 0, number, body: encode_error(error) };
    match answer {
        Ok(answer) if answer.body.len() <= FRAME_BYTES_MAX => {
            Frame { kind: Kind::Answer, method: answer.method, number, body: answer.body }
        }
        Ok(_) => refusal(&Error::new(ErrorKind::Internal, "the answer is longer than a frame")),
        Err(error) => refusal(&error),
    }
}

async fn write_frame(out: &mut BufWriter<OwnedWriteHalf>, frame: &Frame) -> std::io::Result<()> {
    out.write_all(&encode_header(frame)).await?;
    out.write_all(&frame.body).await
}

async fn read_frame(from: &mut BufReader<OwnedReadHalf>) -> Result<Frame> {
    let mut header = [0; HEADER_BYTES];
    let lost = |e: std::io::Error| unavailable(format!("connection lost: {e}"));
    from.read_exact(&mut header).await.map_err(lost)?;
    let (kind, method, number, length, crc) = decode_header(&header)?;
    // Grows with what arrives: a header alone reserves nothing.
    let mut body = BytesMut::with_capacity(length.min(64 << 10));
    let mut left = (&mut *from).take(length as u64);
    while body.len() < length {
        if left.read_buf(&mut body).await.map_err(lost)? == 0 {
            return Err(unavailable("connection lost inside a frame"));
        }
    }
    let body = body.freeze();
    verify(&header, &body, crc)?;
    Ok(Frame { kind, method, number, body })
}

/// P2: what was sent is what arrived.
fn verify(header: &[u8; HEADER_BYTES], body: &[u8], crc: u64) -> Result<()> {
    let tail = header.get(8..).unwrap_or_default();
    if checksum(tail, body) != crc && !mainstay_io::mutant!(SkipFrameChecksum) {
        return Err(Error::new(ErrorKind::Corrupt, "frame does not match its checksum"));
    }
    Ok(())
}

/// The bytes of a frame, for a simulation that damages them.
pub(crate) fn encode_frame(message: &Envelope, answer: bool) -> Vec<u8> {
    let kind = if answer { Kind::Answer } else { Kind::Request };
    let frame = Frame { kind, method: message.method, number: 1, body: message.body.clone() };
    let mut bytes = encode_header(&frame).to_vec();
    bytes.extend_from_slice(&frame.body);
    bytes
}

/// What a receiver of these bytes would handle; an error ends its connection.
pub(crate) fn decode_frame(bytes: &[u8]) -> Result<Envelope> {
    let short = || Error::new(ErrorKind::Corrupt, "frame is damaged what=header");
    let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(short)?;
    let (_, method, _, length, crc) = decode_header(header)?;
    // The connection would wait for bytes that never come, or take the next frame for the end of this one.
    let body = body.get(..length).ok_or_else(short)?;
    verify(header, body, crc)?;
    Ok(Envelope { method, body: Bytes::copy_from_slice(body) })
}

pub(crate) fn encode_hello(hello: &Hello) -> Bytes {
    let mut out = Writer::new();
    out.id(&hello.cluster)
        .u64(hello.node.0)
        .id(&hello.incarnation)
        .string(&hello.name)
        .string(&hello.peer_address.0)
        .u64(hello.settings_fingerprint);
    out.finish()
}

pub(crate) fn decode_hello(body: &Bytes) -> Result<Hello> {
    let mut reader = Reader::open(body)?;
    let hello = Hello {
        cluster: reader.id()?,
        node: NodeId(reader.u64()?),
        incarnation: reader.id()?,
        name: reader.string()?,
        peer_address: PeerAddress(reader.string()?),
        settings_fingerprint: reader.u64()?,
    };
    reader.end()?;
    Ok(hello)
}

fn encode_error(error: &Error) -> Bytes {
    let mut out = Writer::new();
    out.error(error);
    out.finish()
}

fn decode_error(body: &Bytes) -> Error {
    let read = || {
        let mut reader = Reader::open(body)?;
        let error = reader.error()?;
        reader.end()?;
        Ok(error)
    };
    read().unwrap_or_else(|error| error)
}

/// Decodes whatever a peer may send as the first bytes of a frame, for the fuzzer.
pub(crate) fn decode_any(bytes: &Bytes) {
    if let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let _ = decode_header(header);
    }
    let _ = decode_hello(bytes);
    let _ = decode_error(bytes);
}

/// What is served, and under which name; replaced when the identity changes.
#[derive(Clone)]
struct Service {
    hello: Hello,
    handler: Arc<dyn Handler>,
    epoch: u64,
}

type Waiting = Arc<Mutex<BTreeMap<u64, oneshot::Sender<Result<Envelope>>>>>;

struct Outgoing {
    number: u64,
    request: Envelope,
    given: Arc<AtomicBool>,
}

/// A peer as seen by those who call it.
#[derive(Clone)]
struct Peer {
    queue: mpsc::Sender<Outgoing>,
    waiting: Waiting,
    number: Arc<AtomicU64>,
    /// Frames that arrived.
    heard: Arc<AtomicU64>,
    give_up: Arc<Notify>,
    address: Arc<Mutex<PeerAddress>>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PeerKey {
    Node(NodeId),
    Address(PeerAddress),
}

struct Inner {
    local: PeerAddress,
    listener: Mutex<Option<TcpListener>>,
    service: watch::Sender<Option<Service>>,
    peers: Mutex<BTreeMap<PeerKey, Peer>>,
    announced: Mutex<BTreeMap<NodeId, PeerAddress>>,
    tasks: Mutex<JoinSet<()>>,
    closing: watch::Sender<bool>,
}

/// TCP on tokio with length limits, timeouts and one connection a peer. Cloning gives another handle.
#[derive(Clone)]
pub struct TcpTransport {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for TcpTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpTransport").field("local", &self.inner.local).finish_non_exhaustive()
    }
}

impl TcpTransport {
    /// Listens on `listen` (`host:port`, port 0 for any) and is known to others as `advertise`, or as where it listens.
    /// Serves nothing before [`Transport::serve`]. Call it inside tokio.
    ///
    /// # Errors
    /// `Unavailable` when the address cannot be listened on.
    pub async fn bind(listen: &str, advertise: Option<&str>) -> Result<Self> {
        let failed = |e| unavailable(format!("cannot listen for peers address={listen}: {e}"));
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let local = match advertise {
            Some(address) => address.to_owned(),
            None => listener.local_addr().map_err(failed)?.to_string(),
        };
        Ok(Self {
            inner: Arc::new(Inner {
                local: PeerAddress(local),
                listener: Mutex::new(Some(listener)),
                service: watch::Sender::new(None),
                peers: Mutex::new(BTreeMap::new()),
                announced: Mutex::new(BTreeMap::new()),
                tasks: Mutex::new(JoinSet::new()),
                closing: watch::Sender::new(false),
            }),
        })
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut closing = self.inner.closing.subscribe();
        let mut tasks = self.inner.tasks.lock().expect("nothing panics while it holds this lock");
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                _ = closing.wait_for(|c| *c) => {}
            }
        });
    }

    fn service(&self) -> Option<Service> {
        self.inner.service.borrow().clone()
    }

    fn learn(&self, hello: &Hello) {
        if hello.node != NodeId(0) && !hello.peer_address.0.is_empty() {
            let mut announced = self.inner.announced.lock().expect("nothing panics while it holds this lock");
            announced.insert(hello.node, hello.peer_address.clone());
        }
    }

    async fn accept(self, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: waiting is all that helps.
                    tracing::warn!(%error, "cannot accept a peer");
                    tokio::time::sleep(RECONNECT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = room.clone().try_acquire_owned() else {
                tracing::warn!("too many connections of peers: one is refused");
                continue;
            };
            let this = self.clone();
            self.spawn(async move {
                if let Err(error) = this.serve_connection(stream).await {
                    tracing::debug!(%error, "the connection of a peer ended");
                }
                drop(permit);
            });
        }
    }

    async fn serve_connection(&self, stream: TcpStream) -> Result<()> {
        let lost = |e: std::io::Error| unavailable(format!("connection lost: {e}"));
        stream.set_nodelay(true).map_err(lost)?;
        let (read, write) = stream.into_split();
        let (mut read, mut write) = (BufReader::new(read), BufWriter::new(write));
        let service = self.service().ok_or_else(|| unavailable("nothing is served yet"))?;
        let hello = timeout(HANDSHAKE_TIMEOUT, async {
            let mut preamble = [0; 8];
            read.read_exact(&mut preamble).await.map_err(lost)?;
            if &preamble != PREAMBLE {
                return Err(Error::new(ErrorKind::Foreign, "not a peer of this protocol"));
            }
            let first = read_frame(&mut read).await?;
            let verdict = if first.kind == Kind::Hello {
                decode_hello(&first.body).and_then(|hello| service.handler.accept(&hello).map(|()| hello))
            } else {
                Err(Error::new(ErrorKind::Corrupt, "the first frame is not a hello"))
            };
            let (kind, body) = match &verdict {
                Ok(_) => (Kind::Hello, encode_hello(&service.hello)),
                Err(error) => (Kind::Refusal, encode_error(error)),
            };
            write_frame(&mut write, &Frame { kind, method: 0, number: 0, body }).await.map_err(lost)?;
            write.flush().await.map_err(lost)?;
            verdict
        })
        .await
        .map_err(|_| unavailable("the peer did not say who it is"))??;
        self.learn(&hello);

        let (answers, mut outgoing) = mpsc::channel::<Frame>(IN_WORK_MAX);
        let (waits, mut begun) = mpsc::channel::<BoxFuture<Frame>>(IN_WORK_MAX);
        let writer = async move {
            // Appends in turn wait here for the log, and not in a task each: their answers wake the task that writes them.
            let mut in_turn = FuturesUnordered::new();
            loop {
                let frame = tokio::select! {
                    Some(frame) = in_turn.next() => frame,
                    frame = outgoing.recv() => match frame {
                        Some(frame) => frame,
                        None => return Ok::<(), Error>(()),
                    },
                    Some(wait) = begun.recv() => {
                        in_turn.push(wait);
                        continue;
                    }
                };
                write_frame(&mut write, &frame).await.map_err(lost)?;
                loop {
                    while let Ok(wait) = begun.try_recv() {
                        in_turn.push(wait);
                    }
                    let Some(frame) = outgoing.try_recv().ok().or_else(|| in_turn.next().now_or_never().flatten())
                    else {
                        break;
                    };
                    write_frame(&mut write, &frame).await.map_err(lost)?;
                }
                write.flush().await.map_err(lost)?;
            }
        };
        let in_work = Arc::new(Semaphore::new(IN_WORK_MAX));
        let this = self.clone();
        let reader = async move {
            loop {
                let permit = in_work.clone().acquire_owned().await.map_err(|_| unavailable("closed"))?;
                let frame = read_frame(&mut read).await?;
                if frame.kind != Kind::Request {
                    return Err(Error::new(ErrorKind::Corrupt, "a peer sent what is not a request"));
                }
                let Some(service) = this.service() else { return Err(unavailable("nothing is served any more")) };
                // Called here and not in the task: the handler sees requests in the order of the connection.
                let work = service.handler.handle(hello.clone(), Envelope { method: frame.method, body: frame.body });
                let number = frame.number;
                let answer = async move {
                    let frame = answer_frame(number, work.await);
                    drop(permit);
                    frame
                };
                if crate::network::keeps_order(frame.method) {
                    // The writer ends only with the connection.
                    let _ = waits.send(Box::pin(answer)).await;
                    continue;
                }
                let answers = answers.clone();
                this.spawn(async move {
                    // The connection may have ended meanwhile.
                    let _ = answers.send(answer.await).await;
                });
            }
        };
        tokio::select! {
            end = reader => end,
            end = writer => end,
        }
    }

    fn peer(&self, key: PeerKey, address: PeerAddress) -> Peer {
        let mut peers = self.inner.peers.lock().expect("nothing panics while it holds this lock");
        if let Some(peer) = peers.get(&key)
            && !peer.queue.is_closed()
        {
            *peer.address.lock().expect("nothing panics while it holds this lock") = address;
            return peer.clone();
        }
        let (queue, outgoing) = mpsc::channel(QUEUE_MAX);
        let peer = Peer {
            queue,
            waiting: Waiting::default(),
            number: Arc::default(),
            heard: Arc::default(),
            give_up: Arc::default(),
            address: Arc::new(Mutex::new(address)),
        };
        peers.insert(key.clone(), peer.clone());
        drop(peers);
        let this = self.clone();
        let run = peer.clone();
        let run = PeerTask { waiting: run.waiting, heard: run.heard, give_up: run.give_up, address: run.address, key };
        self.spawn(async move { this.run_peer(run, outgoing).await });
        peer
    }

    /// Dials for the first request that waits, carries requests until the connection ends, and so on.
    async fn run_peer(self, peer: PeerTask, mut queue: mpsc::Receiver<Outgoing>) {
        let mut refused: Option<(Instant, Error)> = None;
        while let Some(first) = queue.recv().await {
            if let Some((until, error)) = &refused
                && Instant::now() < *until
            {
                peer.finish(first.number, Err(error.clone()));
                continue;
            }
            refused = None;
            let Some(service) = self.service() else {
                peer.finish(first.number, Err(unavailable("the transport serves nothing yet")));
                continue;
            };
            let connected = self.connect(&peer, &service).await;
            let error = match connected {
                Ok((read, write)) => {
                    let error = self.carry(&peer, &service, read, write, first, &mut queue).await;
                    tracing::debug!(peer = ?peer.key, %error, "the connection to a peer ended");
                    let kind = ErrorKind::Indeterminate;
                    peer.finish_all(&Error::new(kind, format!("the connection ended before the answer: {error}")));
                    continue;
                }
                Err(error) => error,
            };
            tracing::debug!(peer = ?peer.key, %error, "cannot reach a peer");
            peer.finish(first.number, Err(error.clone()));
            while let Ok(next) = queue.try_recv() {
                peer.finish(next.number, Err(error.clone()));
            }
            refused = Instant::now().checked_add(RECONNECT_PAUSE).map(|until| (until, error));
        }
    }

    async fn connect(
        &self,
        peer: &PeerTask,
        service: &Service,
    ) -> Result<(BufReader<OwnedReadHalf>, BufWriter<OwnedWriteHalf>)> {
        let given = peer.address.lock().expect("nothing panics while it holds this lock").clone();
        let announced = match &peer.key {
            PeerKey::Node(id) => {
                self.inner.announced.lock().expect("nothing panics while it holds this lock").get(id).cloned()
            }
            PeerKey::Address(_) => None,
        };
        // What a peer said of itself is newer than what anybody wrote down; but it may have been lent to another since.
        let mut last = unavailable("the peer has no address");
        for address in announced.into_iter().chain([given]) {
            match self.dial(&address, &peer.key, service).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn dial(
        &self,
        address: &PeerAddress,
        key: &PeerKey,
        service: &Service,
    ) -> Result<(BufReader<OwnedReadHalf>, BufWriter<OwnedWriteHalf>)> {
        let failed = |e: std::io::Error| unavailable(format!("cannot reach a peer address={}: {e}", address.0));
        // Looks the name up again each time.
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(&address.0))
            .await
            .map_err(|_| unavailable(format!("cannot reach a peer in time address={}", address.0)))?
            .map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let (read, write) = stream.into_split();
        let (mut read, mut write) = (BufReader::new(read), BufWriter::new(write));
        let hello = timeout(HANDSHAKE_TIMEOUT, async {
            write.write_all(PREAMBLE).await.map_err(failed)?;
            let body = encode_hello(&service.hello);
            write_frame(&mut write, &Frame { kind: Kind::Hello, method: 0, number: 0, body }).await.map_err(failed)?;
            write.flush().await.map_err(failed)?;
            let answer = read_frame(&mut read).await?;
            match answer.kind {
                Kind::Hello => decode_hello(&answer.body),
                Kind::Refusal => Err(decode_error(&answer.body)),
                _ => Err(Error::new(ErrorKind::Corrupt, "the first frame is not a hello")),
            }
        })
        .await
        .map_err(|_| unavailable(format!("a peer did not say who it is address={}", address.0)))??;
        service.handler.accept(&hello)?;
        if let PeerKey::Node(expect) = key
            && hello.node != *expect
        {
            let message = format!(
                "another node answers address={} expected={expect} found={} name={}",
                address.0, hello.node, hello.name
            );
            let kind = if hello.node == NodeId(0) { ErrorKind::Unavailable } else { ErrorKind::Foreign };
            return Err(Error::new(kind, message));
        }
        self.learn(&hello);
        Ok((read, write))
    }

    /// Sends what is queued and hands out answers until the connection ends; returns why.
    async fn carry(
        &self,
        peer: &PeerTask,
        service: &Service,
        mut read: BufReader<OwnedReadHalf>,
        mut write: BufWriter<OwnedWriteHalf>,
        first: Outgoing,
        queue: &mut mpsc::Receiver<Outgoing>,
    ) -> Error {
        let lost = |e: std::io::Error| unavailable(format!("connection lost: {e}"));
        let reader = async {
            loop {
                let frame = match read_frame(&mut read).await {
                    Ok(frame) => frame,
                    Err(error) => return error,
                };
                peer.heard.fetch_add(1, Ordering::Relaxed);
                match frame.kind {
                    Kind::Answer => {
                        peer.finish(frame.number, Ok(Envelope { method: frame.method, body: frame.body }));
                    }
                    Kind::Refusal => peer.finish(frame.number, Err(decode_error(&frame.body))),
                    _ => return Error::new(ErrorKind::Corrupt, "a peer answered what is not an answer"),
                }
            }
        };
        let writer = async {
            let mut next = Some(first);
            loop {
                let Some(outgoing) = next else { return unavailable("the transport is closed") };
                if peer.is_waiting(outgoing.number) {
                    outgoing.given.store(true, Ordering::Relaxed);
                    let Envelope { method, body } = outgoing.request;
                    let frame = Frame { kind: Kind::Request, method, number: outgoing.number, body };
                    if let Err(error) = write_frame(&mut write, &frame).await {
                        return lost(error);
                    }
                }
                next = match queue.try_recv() {
                    Ok(more) => Some(more),
                    Err(_) => {
                        if let Err(error) = write.flush().await {
                            return lost(error);
                        }
                        queue.recv().await
                    }
                };
            }
        };
        // A wish to give up the former connection does not concern this one.
        let _ = peer.give_up.notified().now_or_never();
        let mut services = self.inner.service.subscribe();
        let replaced = services.wait_for(|s| s.as_ref().is_none_or(|s| s.epoch != service.epoch));
        tokio::select! {
            error = reader => error,
            error = writer => error,
            () = peer.give_up.notified() => unavailable("the peer does not answer"),
            _ = replaced => unavailable("this node has another identity now"),
        }
    }
}

/// A peer as seen by the task that talks to it: without the sender of its queue, so that the queue can end.
struct PeerTask {
    waiting: Waiting,
    heard: Arc<AtomicU64>,
    give_up: Arc<Notify>,
    address: Arc<Mutex<PeerAddress>>,
    key: PeerKey,
}

impl PeerTask {
    fn finish(&self, number: u64, answer: Result<Envelope>) {
        let waiter = self.waiting.lock().expect("nothing panics while it holds this lock").remove(&number);
        if let Some(waiter) = waiter {
            // A caller that gave up has removed its waiter, or is about to.
            let _ = waiter.send(answer);
        }
    }

    fn is_waiting(&self, number: u64) -> bool {
        self.waiting.lock().expect("nothing panics while it holds this lock").contains_key(&number)
    }

    /// Ends all requests. Those whose bytes were not given to the socket are told apart by their caller (P3).
    fn finish_all(&self, error: &Error) {
        let all = std::mem::take(&mut *self.waiting.lock().expect("nothing panics while it holds this lock"));
        for waiter in all.into_values() {
            let _ = waiter.send(Err(error.clone()));
        }
    }
}

impl Transport for TcpTransport {
    fn serve(&self, hello: Hello, handler: Arc<dyn Handler>) {
        let mut epoch = 0_u64;
        self.inner.service.send_modify(|service| {
            epoch = service.as_ref().map_or(1, |s| s.epoch.saturating_add(1));
            *service = Some(Service { hello, handler, epoch });
        });
        let listener = self.inner.listener.lock().expect("nothing panics while it holds this lock").take();
        if let Some(listener) = listener {
            let this = self.clone();
            self.spawn(async move { this.accept(listener).await });
        }
    }

    fn call(
        &self,
        address: PeerAddress,
        expect: Option<NodeId>,
        request: Envelope,
        limit: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>> {
        let this = self.clone();
        Box::pin(async move {
            if *this.inner.closing.borrow() {
                return Err(Error::new(ErrorKind::Closed, "the transport is closed"));
            }
            if request.body.len() > FRAME_BYTES_MAX {
                return Err(Error::new(ErrorKind::Invalid, "the request is longer than a frame"));
            }
            let key = expect.map_or_else(|| PeerKey::Address(address.clone()), PeerKey::Node);
            let peer = this.peer(key, address);
            let number = peer.number.fetch_add(1, Ordering::Relaxed);
            let given = Arc::new(AtomicBool::new(false));
            let (tx, rx) = oneshot::channel();
            let waiter = Waiter { waiting: peer.waiting.clone(), number };
            peer.waiting.lock().expect("nothing panics while it holds this lock").insert(number, tx);
            let outgoing = Outgoing { number, request, given: given.clone() };
            if peer.queue.try_send(outgoing).is_err() {
                return Err(unavailable("too many requests wait for this peer"));
            }
            let heard = peer.heard.load(Ordering::Relaxed);
            let answer = timeout(limit, rx).await;
            drop(waiter);
            match answer {
                Ok(Ok(Err(error))) if error.kind() == ErrorKind::Indeterminate && !given.load(Ordering::Relaxed) => {
                    Err(unavailable(error.to_string()))
                }
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => Err(if given.load(Ordering::Relaxed) {
                    Error::new(ErrorKind::Indeterminate, "the transport was closed before the answer")
                } else {
                    Error::new(ErrorKind::Closed, "the transport is closed")
                }),
                Err(_) if given.load(Ordering::Relaxed) => {
                    if peer.heard.load(Ordering::Relaxed) == heard {
                        peer.give_up.notify_one();
                    }
                    Err(Error::new(ErrorKind::Indeterminate, "the peer did not answer in time"))
                }
                Err(_) => Err(unavailable("the peer could not be reached in time")),
            }
        })
    }

    fn local_address(&self) -> PeerAddress {
        self.inner.local.clone()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let this = self.clone();
        Box::pin(async move {
            this.inner.closing.send_replace(true);
            this.inner.peers.lock().expect("nothing panics while it holds this lock").clear();
            this.inner.listener.lock().expect("nothing panics while it holds this lock").take();
            let mut tasks =
                std::mem::take(&mut *this.inner.tasks.lock().expect("nothing panics while it holds this lock"));
            while tasks.join_next().await.is_some() {}
            // The handler holds the node, and the node this transport.
            this.inner.service.send_replace(None);
        })
    }
}

/// Forgets a request when its caller goes.
struct Waiter {
    waiting: Waiting,
    number: u64,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.waiting.lock().expect("nothing panics while it holds this lock").remove(&self.number);
    }
}
