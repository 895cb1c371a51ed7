//! What is measured: a server through the etcd API, or a store in this process.
//!
//! # Place
//! `drive` asks, whoever answers; a test answers in virtual time

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use mainstay::{Durability, Keyspace, Store};
use tonic::codegen::http::HeaderValue;

use super::records::KEYS_END;
use super::unary::{Connection, Route};
use crate::cli::Failure;
use crate::etcd::DURABILITY_KEY;
use crate::proto::etcdserverpb::{PutRequest, PutResponse, RangeRequest, RangeResponse};

/// A pair that a scan found.
pub(super) type Pair = (Bytes, Bytes);

/// One client's way to the store.
pub(super) trait Target: Send {
    /// The value of a key.
    fn read(&mut self, key: Bytes) -> impl Future<Output = Result<Option<Bytes>, String>> + Send;

    /// Up to `pairs` pairs from a key on.
    fn scan(&mut self, from: Bytes, pairs: u64) -> impl Future<Output = Result<Vec<Pair>, String>> + Send;

    /// Sets a key and waits for the durability of that number.
    fn write(&mut self, key: Bytes, value: Bytes, level: usize) -> impl Future<Output = Result<(), String>> + Send;
}

/// A server.
pub(super) struct Served {
    connection: Connection,
    /// One for each durability.
    puts: Vec<Route>,
    range: Route,
    serializable: bool,
}

impl Served {
    /// Writes have the durabilities of these names, or what the server does without any.
    pub(super) fn new(connection: Connection, levels: &[String], serializable: bool) -> Result<Self, Failure> {
        let put = |metadata: &[(&'static str, HeaderValue)]| connection.method("/etcdserverpb.KV/Put", metadata);
        let named = |level: &String| {
            let value = level.parse().map_err(|_| Failure::usage(format!("no durability found='{level}'")))?;
            put(&[(DURABILITY_KEY, value)])
        };
        let puts = match levels {
            [] => vec![put(&[])?],
            levels => levels.iter().map(named).collect::<Result<_, _>>()?,
        };
        let range = connection.method("/etcdserverpb.KV/Range", &[])?;
        Ok(Self { connection, puts, range, serializable })
    }

    async fn range(&mut self, request: RangeRequest) -> Result<RangeResponse, String> {
        let request = RangeRequest { serializable: self.serializable, ..request };
        self.connection.call::<RangeResponse>(&self.range, &request).await
    }
}

impl Target for Served {
    async fn read(&mut self, key: Bytes) -> Result<Option<Bytes>, String> {
        let answer = self.range(RangeRequest { key, ..RangeRequest::default() }).await?;
        Ok(answer.kvs.into_iter().next().map(|pair| pair.value))
    }

    async fn scan(&mut self, from: Bytes, pairs: u64) -> Result<Vec<Pair>, String> {
        let limit = i64::try_from(pairs).unwrap_or(i64::MAX);
        let request = RangeRequest { key: from, range_end: KEYS_END.into(), limit, ..RangeRequest::default() };
        Ok(self.range(request).await?.kvs.into_iter().map(|pair| (pair.key, pair.value)).collect())
    }

    async fn write(&mut self, key: Bytes, value: Bytes, level: usize) -> Result<(), String> {
        let request = PutRequest { key, value, ..PutRequest::default() };
        let put = self.puts.get(level).ok_or("there is no durability of this number")?;
        self.connection.call::<PutResponse>(put, &request).await.map(drop)
    }
}

/// A store in this process. Cloning gives another handle.
#[derive(Clone)]
pub(super) struct Embedded {
    /// One for each durability.
    keyspaces: Vec<Keyspace>,
}

/// The keyspace that is written.
const KEYSPACE: &str = "bench";

impl Embedded {
    /// Opens or makes the store at `path`.
    pub(super) async fn open(
        path: &Path,
        memory_bytes: u64,
        wal_bytes: u64,
        levels: &[Durability],
    ) -> Result<(Store, Self), Failure> {
        let store = Store::builder().memory_bytes(memory_bytes).wal_bytes(wal_bytes).open_async(path).await?;
        let mut keyspaces = Vec::new();
        for level in levels {
            keyspaces.push(store.with_durability(level.clone()).keyspace_async(KEYSPACE).await?);
        }
        if keyspaces.is_empty() {
            keyspaces.push(store.keyspace_async(KEYSPACE).await?);
        }
        Ok((store, Self { keyspaces }))
    }

    fn keyspace(&self, level: usize) -> Result<&Keyspace, String> {
        self.keyspaces.get(level).ok_or_else(|| "there is no durability of this number".to_owned())
    }
}

impl Target for Embedded {
    async fn read(&mut self, key: Bytes) -> Result<Option<Bytes>, String> {
        let value = self.keyspace(0)?.get_async(key).await.map_err(|e| e.to_string())?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    async fn scan(&mut self, from: Bytes, pairs: u64) -> Result<Vec<Pair>, String> {
        let mut scan = self.keyspace(0)?.range(from..Bytes::from_static(KEYS_END.as_bytes()));
        let pairs = usize::try_from(pairs).unwrap_or(usize::MAX);
        let found = scan.next_chunk_async(pairs).await.map_err(|e| e.to_string())?;
        Ok(found.into_iter().map(|entry| (entry.key, Bytes::copy_from_slice(&entry.value))).collect())
    }

    async fn write(&mut self, key: Bytes, value: Bytes, level: usize) -> Result<(), String> {
        self.keyspace(level)?.insert_async(key, value).await.map(drop).map_err(|e| e.to_string())
    }
}

/// Time since the start of a run.
pub(super) trait Clock: Send + Sync {
    fn now(&self) -> Duration;

    fn sleep_until(&self, at: Duration) -> impl Future<Output = ()> + Send;
}

/// The clock of the machine.
pub(super) struct Started(tokio::time::Instant);

impl Started {
    pub(super) fn now() -> Self {
        Self(tokio::time::Instant::now())
    }
}

impl Clock for Started {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    async fn sleep_until(&self, at: Duration) {
        tokio::time::sleep_until(self.0 + at).await;
    }
}
