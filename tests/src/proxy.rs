//! A TCP proxy that damages what passes: before the peer port of a server it is a network without checksums.
//!
//! TCP hides what the wire does; a broken middle box, a bad card or a driver is seen above it. Each fault acts on a chunk,
//! what one read of the socket gave, in one direction of one connection, and is drawn at the rate that is set.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// What becomes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit of it is flipped.
    Corrupt,
    /// It arrives twice.
    Duplicate,
    /// It arrives behind the next one.
    Reorder,
    /// A part of it arrives, and then the connection ends.
    Truncate,
    /// It arrives up to 100 ms later, and what follows it as well.
    Delay,
}

impl Damage {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Corrupt, Self::Duplicate, Self::Reorder, Self::Truncate, Self::Delay];
}

/// Chunks of at most this length.
const CHUNK_BYTES: usize = 4096;
/// The rates are parts of this.
const WHOLE: u64 = 10_000;

#[derive(Default)]
struct Rates {
    /// By the order of [`Damage::ALL`].
    rates: [AtomicU64; 5],
    done: [AtomicU64; 5],
    chunks: AtomicU64,
    connections: AtomicU64,
}

/// A proxy in front of one address.
pub struct Proxy {
    address: SocketAddr,
    rates: Arc<Rates>,
    /// Its tasks end with it.
    _runtime: Runtime,
}

impl Proxy {
    /// Listens on a free port of loopback and passes all connections on to `target`, unharmed until told otherwise.
    pub fn start(target: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("tokio starts");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("loopback has a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let (rates, target) = (Arc::new(Rates::default()), target.to_owned());
        let shared = rates.clone();
        runtime.spawn(async move {
            while let Ok((incoming, _)) = listener.accept().await {
                let number = shared.connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(pass(incoming, target.clone(), shared.clone(), number));
            }
        });
        Self { address, rates, _runtime: runtime }
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// So many chunks of 10,000 are treated so from now on.
    pub fn set(&self, damage: Damage, rate: u64) {
        self.rates.rates[damage as usize].store(rate, Ordering::Relaxed);
    }

    /// How many chunks were treated so.
    pub fn count(&self, damage: Damage) -> u64 {
        self.rates.done[damage as usize].load(Ordering::Relaxed)
    }

    /// Chunks that have passed, whole or not, and connections that were made.
    pub fn passed(&self) -> (u64, u64) {
        (self.rates.chunks.load(Ordering::Relaxed), self.rates.connections.load(Ordering::Relaxed))
    }
}

async fn pass(incoming: TcpStream, target: String, rates: Arc<Rates>, number: u64) {
    let Ok(outgoing) = TcpStream::connect(&target).await else { return };
    // Small frames pass at once, as without the proxy.
    let _ = (incoming.set_nodelay(true), outgoing.set_nodelay(true));
    let ((in_read, in_write), (out_read, out_write)) = (incoming.into_split(), outgoing.into_split());
    // When one direction ends, so does the connection.
    tokio::select! {
        () = pump(in_read, out_write, rates.clone(), 2 * number + 1) => {}
        () = pump(out_read, in_write, rates, 2 * number + 2) => {}
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, rates: Arc<Rates>, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut below = move |bound: u64| {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % bound
    };
    let mut held: Option<Vec<u8>> = None;
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let count = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        rates.chunks.fetch_add(1, Ordering::Relaxed);
        let mut chunk = buffer[..count].to_vec();
        let mut left = below(WHOLE);
        let drawn = Damage::ALL.into_iter().find(|damage| {
            let rate = rates.rates[*damage as usize].load(Ordering::Relaxed);
            let here = left < rate;
            left = left.saturating_sub(rate);
            here
        });
        if let Some(damage) = drawn {
            rates.done[damage as usize].fetch_add(1, Ordering::Relaxed);
        }
        match drawn {
            None => {}
            Some(Damage::Corrupt) => chunk[below(count as u64) as usize] ^= 1 << below(8),
            Some(Damage::Duplicate) => chunk.extend_from_within(..),
            Some(Damage::Delay) => tokio::time::sleep(Duration::from_millis(below(100))).await,
            Some(Damage::Truncate) => {
                let _ = to.write_all(&chunk[..below(count as u64) as usize]).await;
                return;
            }
            Some(Damage::Reorder) if held.is_none() => {
                // A part of a frame may now be missing until the next chunk comes.
                held = Some(chunk);
                continue;
            }
            Some(Damage::Reorder) => {}
        }
        if let Some(earlier) = held.take() {
            chunk.extend_from_slice(&earlier);
        }
        if to.write_all(&chunk).await.is_err() {
            return;
        }
    }
}
