//! `mainstay.v1.Placed`: keyspaces whose ranges of keys lie in different groups.
//!
//! # Place
//! Over `mainstay::Placed`, which finds who holds a key and waits for moves. Here is what a stranger may ask of it: names, sizes,
//! counts, and calls that outlive their client ([`moves`]).
//!
//! # Invariants
//! 1. A keyspace is made by [`Create`](Placed::create) alone: a name that is spelt wrong is `NotFound`, and makes nothing.
//! 2. What an answer holds in memory is bounded: a page by [`PAGE_BYTES_MAX`] or one pair, and by [`PAGE_PAIRS_MAX`].

mod client;
mod moves;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay::{
    Durability, Entry, Error, ErrorKind, KEY_BYTES_MAX, PLACED_NAME_BYTES_MAX, Placed as PlacedHandle, PlacedBatch,
    PlacedScan, RangeInfo, ReadLevel, VALUE_BYTES_MAX,
};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::context::{Context, check_name, check_new_name, grpc_status};
use crate::etcd::{BRANCH_KEY, CLIENT_TOKEN_KEY, asked_durability, asked_read_level};
use crate::limits::Quota;
use crate::proto::mainstay::v1 as pb;
use moves::Move;
use pb::mutation::Mutation;
use pb::placed_server::{Placed, PlacedServer};

pub(crate) use client::{placed, range};
pub(crate) use moves::Moves;

/// Keyspaces that clients may make.
const KEYSPACES_MAX: usize = 1024;
/// Mutations of one batch.
const MUTATIONS_MAX: usize = 10_000;
/// Pairs of a page, when the request names no number.
const PAGE_PAIRS: usize = 1_000;
/// The same at most.
const PAGE_PAIRS_MAX: usize = 10_000;
/// Bytes of the keys and values of a page, unless one pair alone has more. Below what clients of gRPC take without being told.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// Longest bound of a range: the place right behind the longest key.
const BOUND_BYTES_MAX: usize = KEY_BYTES_MAX + 1;

/// The service over the node of the context.
pub(crate) fn service(context: Arc<Context>, data: Arc<Quota>, moves: Moves) -> PlacedServer<impl Placed> {
    PlacedServer::new(PlacedService { context, data, moves, known: Mutex::default() })
}

struct PlacedService {
    context: Arc<Context>,
    data: Arc<Quota>,
    moves: Moves,
    /// Keyspaces that were asked for before. None is ever dropped, so what is known stays true.
    known: Mutex<BTreeMap<String, Arc<Keyspace>>>,
}

struct Keyspace {
    handle: PlacedHandle,
    /// Held by the one move of it that this process makes at a time: two of one range would take it from each other again and again.
    moving: tokio::sync::Mutex<()>,
}

impl PlacedService {
    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Keyspace>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keyspace of that name; `NotFound` if nobody made it.
    async fn keyspace(&self, name: &str) -> Result<Arc<Keyspace>, Status> {
        if let Some(keyspace) = self.known().get(name) {
            return Ok(keyspace.clone());
        }
        check_name("a placed keyspace", name, PLACED_NAME_BYTES_MAX)?;
        let handle = self.context.node_or_status()?.open_placed(name).await.map_err(grpc_status)?;
        Ok(self.keep(name, handle))
    }

    fn keep(&self, name: &str, handle: PlacedHandle) -> Arc<Keyspace> {
        let mut known = self.known();
        if let Some(keyspace) = known.get(name) {
            return keyspace.clone();
        }
        let keyspace = Arc::new(Keyspace { handle, moving: tokio::sync::Mutex::default() });
        // The library makes as many as it is asked for.
        if known.len() < KEYSPACES_MAX {
            known.insert(name.to_owned(), keyspace.clone());
        }
        keyspace
    }

    /// The keyspace for a read as the metadata of its request asks for.
    async fn for_read(&self, metadata: &MetadataMap, name: &str) -> Result<PlacedHandle, Status> {
        refuse_foreign(metadata)?;
        let level = asked_read_level(metadata)?.unwrap_or(ReadLevel::Linearizable);
        Ok(self.keyspace(name).await?.handle.with_read_level(level))
    }

    async fn commit(&self, metadata: &MetadataMap, name: &str, batch: PlacedBatch) -> Result<(), Status> {
        refuse_foreign(metadata)?;
        let durability = asked_durability(metadata)?.unwrap_or(Durability::Quorum);
        let keyspace = self.keyspace(name).await?;
        keyspace.handle.with_durability(durability).commit_async(batch).await.map_err(grpc_status)
    }
}

/// What calls of the etcd API may ask for and these may not: to pass it over would promise what is not kept.
fn refuse_foreign(metadata: &MetadataMap) -> Result<(), Status> {
    let refused = [
        (BRANCH_KEY, "a placed keyspace is in no clone"),
        (CLIENT_TOKEN_KEY, "no write to a placed keyspace applies once through a move of its range"),
    ];
    match refused.into_iter().find(|(key, _)| metadata.contains_key(*key)) {
        Some((key, why)) => Err(grpc_status(Error::new(ErrorKind::Unsupported, format!("{why} metadata={key}")))),
        None => Ok(()),
    }
}

fn invalid(message: impl Into<String>) -> Status {
    grpc_status(Error::new(ErrorKind::Invalid, message))
}

fn check_key(key: &[u8]) -> Result<(), Status> {
    match key.len() {
        1..=KEY_BYTES_MAX => Ok(()),
        bytes => Err(invalid(format!("a key has 1 to {KEY_BYTES_MAX} bytes bytes={bytes}"))),
    }
}

fn check_value(value: &[u8]) -> Result<(), Status> {
    match value.len() {
        0..=VALUE_BYTES_MAX => Ok(()),
        bytes => Err(invalid(format!("a value has at most {VALUE_BYTES_MAX} bytes bytes={bytes}"))),
    }
}

/// The bounds of a range: an empty one is none.
fn bounds(range: Option<pb::KeyRange>) -> Result<(Bound<Bytes>, Bound<Bytes>), Status> {
    let pb::KeyRange { start, end } = range.unwrap_or_default();
    let longest = start.len().max(end.len());
    if longest > BOUND_BYTES_MAX {
        return Err(invalid(format!("a bound of a range has at most {BOUND_BYTES_MAX} bytes bytes={longest}")));
    }
    let bound =
        |key: Bytes, bound: fn(Bytes) -> Bound<Bytes>| if key.is_empty() { Bound::Unbounded } else { bound(key) };
    Ok((bound(start, Bound::Included), bound(end, Bound::Excluded)))
}

/// Adds a mutation. True for one that may add to the data of the volume.
fn add(batch: &mut PlacedBatch, mutation: pb::Mutation) -> Result<bool, Status> {
    match mutation.mutation {
        Some(Mutation::Put(pb::Pair { key, value })) => {
            check_key(&key)?;
            check_value(&value)?;
            batch.insert(key, value);
            return Ok(true);
        }
        Some(Mutation::Delete(key)) => {
            check_key(&key)?;
            batch.remove(key);
        }
        Some(Mutation::DeleteRange(range)) => {
            batch.remove_range(bounds(Some(range))?);
        }
        None => return Err(invalid("a mutation says nothing, or something that this server does not know")),
    }
    Ok(false)
}

/// A page, and where the next one begins.
async fn page(mut scan: PlacedScan, limit: usize, reverse: bool) -> mainstay::Result<pb::ScanResponse> {
    let mut page = pb::ScanResponse::default();
    let mut bytes = 0_usize;
    loop {
        let found = if reverse { scan.next_back_async().await? } else { scan.next_async().await? };
        let Some(Entry { key, value }) = found else { return Ok(page) };
        bytes = bytes.saturating_add(key.len()).saturating_add(value.len());
        if page.pairs.len() == limit || (bytes > PAGE_BYTES_MAX && !page.pairs.is_empty()) {
            // The bound at the low end is of what follows, that at the high end is not.
            page.next = if reverse { [&key[..], &[0]].concat().into() } else { key };
            return Ok(page);
        }
        page.pairs.push(pb::Pair { key, value });
    }
}

fn range_of(info: RangeInfo) -> pb::Range {
    let RangeInfo { first, end, group, is_moving } = info;
    pb::Range { first, end, group: group.unwrap_or_default(), is_moving }
}

#[tonic::async_trait]
impl Placed for PlacedService {
    async fn create(
        &self,
        request: Request<pb::CreatePlacedRequest>,
    ) -> Result<Response<pb::CreatePlacedResponse>, Status> {
        let name = request.into_inner().keyspace;
        check_new_name("a placed keyspace", &name, PLACED_NAME_BYTES_MAX)?;
        let node = self.context.node_or_status()?;
        let names = node.placed_names().await.map_err(grpc_status)?;
        if names.len() >= KEYSPACES_MAX && !names.contains(&name) {
            return Err(invalid(format!("a cluster has at most {KEYSPACES_MAX} placed keyspaces")));
        }
        self.keep(&name, node.placed(&name).await.map_err(grpc_status)?);
        Ok(Response::new(pb::CreatePlacedResponse {}))
    }

    async fn list(&self, _: Request<pb::ListPlacedRequest>) -> Result<Response<pb::ListPlacedResponse>, Status> {
        let keyspaces = self.context.node_or_status()?.placed_names().await.map_err(grpc_status)?;
        Ok(Response::new(pb::ListPlacedResponse { keyspaces }))
    }

    async fn get(&self, request: Request<pb::GetRequest>) -> Result<Response<pb::GetResponse>, Status> {
        let (metadata, _, pb::GetRequest { keyspace, key }) = request.into_parts();
        check_key(&key)?;
        let placed = self.for_read(&metadata, &keyspace).await?;
        let value = placed.get_async(key).await.map_err(grpc_status)?;
        Ok(Response::new(pb::GetResponse { value }))
    }

    async fn put(&self, request: Request<pb::PutRequest>) -> Result<Response<pb::PutResponse>, Status> {
        let (metadata, _, pb::PutRequest { keyspace, key, value }) = request.into_parts();
        check_key(&key)?;
        check_value(&value)?;
        self.data.admit_more()?;
        let mut batch = PlacedBatch::new();
        batch.insert(key, value);
        self.commit(&metadata, &keyspace, batch).await?;
        Ok(Response::new(pb::PutResponse {}))
    }

    async fn delete(&self, request: Request<pb::DeleteRequest>) -> Result<Response<pb::DeleteResponse>, Status> {
        let (metadata, _, pb::DeleteRequest { keyspace, key }) = request.into_parts();
        check_key(&key)?;
        let mut batch = PlacedBatch::new();
        batch.remove(key);
        self.commit(&metadata, &keyspace, batch).await?;
        Ok(Response::new(pb::DeleteResponse {}))
    }

    async fn batch(&self, request: Request<pb::BatchRequest>) -> Result<Response<pb::BatchResponse>, Status> {
        let (metadata, _, pb::BatchRequest { keyspace, mutations }) = request.into_parts();
        if mutations.is_empty() || mutations.len() > MUTATIONS_MAX {
            return Err(invalid(format!("a batch has 1 to {MUTATIONS_MAX} mutations mutations={}", mutations.len())));
        }
        let mut batch = PlacedBatch::new();
        let mut may_grow = false;
        for mutation in mutations {
            may_grow |= add(&mut batch, mutation)?;
        }
        if may_grow {
            self.data.admit_more()?;
        }
        self.commit(&metadata, &keyspace, batch).await?;
        Ok(Response::new(pb::BatchResponse {}))
    }

    async fn scan(&self, request: Request<pb::ScanRequest>) -> Result<Response<pb::ScanResponse>, Status> {
        let (metadata, _, pb::ScanRequest { keyspace, range, limit, reverse }) = request.into_parts();
        let limit = match limit as usize {
            0 => PAGE_PAIRS,
            limit @ 1..=PAGE_PAIRS_MAX => limit,
            limit => return Err(invalid(format!("a page has at most {PAGE_PAIRS_MAX} pairs limit={limit}"))),
        };
        let bounds = bounds(range)?;
        let placed = self.for_read(&metadata, &keyspace).await?;
        Ok(Response::new(page(placed.range(bounds), limit, reverse).await.map_err(grpc_status)?))
    }

    async fn list_ranges(
        &self,
        request: Request<pb::ListRangesRequest>,
    ) -> Result<Response<pb::ListRangesResponse>, Status> {
        let keyspace = self.keyspace(&request.into_inner().keyspace).await?;
        let ranges = keyspace.handle.ranges().await.map_err(grpc_status)?;
        Ok(Response::new(pb::ListRangesResponse { ranges: ranges.into_iter().map(range_of).collect() }))
    }

    async fn split(&self, request: Request<pb::SplitRequest>) -> Result<Response<pb::SplitResponse>, Status> {
        let pb::SplitRequest { keyspace, key } = request.into_inner();
        check_key(&key)?;
        self.keyspace(&keyspace).await?.handle.split(key).await.map_err(grpc_status)?;
        Ok(Response::new(pb::SplitResponse {}))
    }

    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<Response<pb::JoinResponse>, Status> {
        let pb::JoinRequest { keyspace, key } = request.into_inner();
        check_key(&key)?;
        self.keyspace(&keyspace).await?.handle.join(key).await.map_err(grpc_status)?;
        Ok(Response::new(pb::JoinResponse {}))
    }

    async fn r#move(&self, request: Request<pb::MoveRequest>) -> Result<Response<pb::MoveResponse>, Status> {
        let pb::MoveRequest { keyspace: name, key, to } = request.into_inner();
        // The empty key is in the first range.
        if !key.is_empty() {
            check_key(&key)?;
        }
        let to = Some(to).filter(|to| !to.is_empty());
        if let Some(group) = &to {
            check_name("a group", group, mainstay::GROUP_NAME_BYTES_MAX)?;
        }
        let keyspace = self.keyspace(&name).await?;
        let asked = Move { keyspace: name, key, to };
        let work = asked.clone();
        self.moves
            .join(asked, || async move {
                let _one = keyspace.moving.lock().await;
                moves::carry(keyspace.handle.clone(), work).await
            })
            .await?;
        Ok(Response::new(pb::MoveResponse {}))
    }
}

#[cfg(test)]
mod tests;
