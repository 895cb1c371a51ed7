//! Runs the requests of a command: one revision a request that changes keys.
//!
//! # Invariants
//! X1. A request is refused before its first write: an entry carries many requests, and what one wrote cannot be taken back.
//! X2. Nothing is read but the store, the command, and the entry's index: every replica decides the same.

use std::future::Future;
use std::ops::Bound;
use std::pin::Pin;

use bytes::Bytes;
use mainstay_engine::{LogIndex, Result as StoreResult};

use super::Tip;
use super::check::{check_delete, check_put, check_range, check_txn, range_of};
use super::command::{Request, Response};
use super::metas::Metas;
use super::range::{KeysAt, header, key_value, range, record_of, revision_of};
use super::record::{
    self, COMPACTION_KEY, KeyMeta, Rev, RevRecord, history_key, lease_key, lease_member_key, split_lease_key,
};
use super::store::{Reader, Space, Store};
use crate::etcd::error::{Failure, Refusal};
use crate::proto::etcdserverpb::{self as pb, request_op, response_op};
use crate::proto::mvccpb::KeyValue;

/// Shortest lease in seconds: what etcd grants at least with its default election timeout.
pub const LEASE_TTL_MIN: i64 = 2;
/// Longest lease in seconds.
pub const LEASE_TTL_MAX: i64 = 9_000_000_000;
/// Revision records that one entry collects, at most: bounds the batch of the entry.
pub(super) const COLLECT_RECORDS_MAX: usize = if cfg!(test) { 3 } else { 2_000 };
/// Keys that a delete of a range removes before others get the thread.
const DELETES_AT_ONCE: usize = 256;
/// Operations on one level of a transaction and the levels below it, at most. Applying refuses what is beyond twice this,
/// so that the setting of a service may be raised without a change of the log.
pub(super) const TXN_OPS_LIMIT: usize = 100_000;
/// Keys of a lease or of a range that are read at a time.
const PAGE_PAIRS: usize = 1024;

/// A change of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseChange {
    /// The lease.
    pub id: i64,
    /// Seconds granted; `None` when it ended.
    pub ttl: Option<i64>,
}

/// What an entry did beside its writes.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// One key's change each, in order of revisions. Empty unless somebody watches.
    pub(super) events: Vec<(Rev, RevRecord)>,
    /// Leases made and ended.
    pub(super) leases: Vec<LeaseChange>,
}

/// The execution of one command.
pub(super) struct Execution<'a, S> {
    pub(super) store: &'a mut S,
    pub(super) tip: Tip,
    pub(super) index: LogIndex,
    pub(super) effects: Effects,
    /// Whether anybody wants `effects.events`.
    pub(super) watched: bool,
    /// Place of the next change within the revision that the request makes.
    sub: i64,
    pub(super) metas: Metas,
}

impl<'a, S: Store> Execution<'a, S> {
    pub(super) fn new(store: &'a mut S, tip: Tip, index: LogIndex, watched: bool, metas: Metas) -> Self {
        Self { store, tip, index, effects: Effects::default(), watched, sub: 0, metas }
    }

    /// Runs the request that is the `ordinal`-th of its entry.
    ///
    /// # Errors
    /// The store failed: the whole entry is void.
    pub(super) async fn run(&mut self, request: Request, ordinal: u64) -> StoreResult<Result<Response, Refusal>> {
        self.sub = 0;
        let outcome = match request {
            Request::Put(put) => self.put_request(put).await.map(Response::Put),
            Request::DeleteRange(delete) => self.delete_request(delete).await.map(Response::DeleteRange),
            Request::Txn(txn) => self.txn_request(txn).await.map(Response::Txn),
            Request::Compact(compact) => self.compact(compact).await.map(Response::Compact),
            Request::Collect => self.collect().await.map(Response::Compact).map_err(Failure::Store),
            Request::LeaseGrant(grant) => self.lease_grant(grant, ordinal).await.map(Response::LeaseGrant),
            Request::LeaseRevoke(revoke) => self.lease_revoke(revoke.id).await.map(Response::LeaseRevoke),
        };
        if self.sub > 0 {
            self.tip.revision = self.next_revision();
        }
        match outcome {
            Ok(response) => Ok(Ok(response)),
            Err(Failure::Refused(refusal)) => {
                debug_assert_eq!(self.sub, 0, "refused before the first write");
                Ok(Err(refusal))
            }
            Err(Failure::Store(error)) => Err(error),
        }
    }

    fn next_revision(&self) -> i64 {
        self.tip.revision.saturating_add(1)
    }

    /// The revision that a read inside the request sees, as the tip of that moment.
    fn tip_within(&self) -> Tip {
        let revision = if self.sub > 0 { self.next_revision() } else { self.tip.revision };
        Tip { revision, ..self.tip }
    }

    /// The place of the next change.
    fn take_rev(&mut self) -> Rev {
        let rev = Rev { main: self.next_revision(), sub: self.sub };
        self.sub = self.sub.saturating_add(1);
        rev
    }

    async fn meta_of(&self, key: &[u8]) -> StoreResult<Option<KeyMeta>> {
        if let Some(meta) = self.metas.get(key) {
            return Ok(Some(meta));
        }
        self.store.get(Space::Keys, key).await?.map(|value| KeyMeta::decode(&value)).transpose()
    }

    async fn lease_exists(&self, id: i64) -> StoreResult<bool> {
        Ok(self.store.get(Space::Leases, &lease_key(id)).await?.is_some())
    }

    /// Refuses a put that cannot be done in this state.
    async fn check_put_state(&self, put: &pb::PutRequest) -> Result<(), Failure> {
        if (put.ignore_value || put.ignore_lease) && self.meta_of(&put.key).await?.is_none() {
            return Err(Refusal::KeyNotFound.into());
        }
        if put.lease != 0 && !self.lease_exists(put.lease).await? {
            return Err(Refusal::LeaseNotFound.into());
        }
        Ok(())
    }

    async fn put_request(&mut self, put: pb::PutRequest) -> Result<pb::PutResponse, Failure> {
        check_put(&put)?;
        // The lease before the key, and within a transaction the other way round: so does etcd.
        if put.lease != 0 && !self.lease_exists(put.lease).await? {
            return Err(Refusal::LeaseNotFound.into());
        }
        let before = self.meta_of(&put.key).await?;
        if before.is_none() && (put.ignore_value || put.ignore_lease) {
            return Err(Refusal::KeyNotFound.into());
        }
        Ok(self.put(put, before).await?)
    }

    /// Puts a key whose present state is `before`. What could refuse it has been checked.
    async fn put(&mut self, put: pb::PutRequest, before: Option<KeyMeta>) -> StoreResult<pb::PutResponse> {
        let mut value = put.value;
        let mut lease = put.lease;
        let mut prev_kv = None;
        if let Some(before) = &before {
            if put.ignore_value || put.prev_kv {
                let kv = key_value(self.store, before).await?;
                if put.ignore_value {
                    value = kv.value.clone();
                }
                prev_kv = put.prev_kv.then_some(kv);
            }
            if put.ignore_lease {
                lease = before.lease;
            }
        }
        let rev = self.take_rev();
        let meta = match &before {
            Some(before) => KeyMeta { modified: rev, version: before.version.saturating_add(1), lease, ..*before },
            None => KeyMeta { create: rev.main, modified: rev, version: 1, lease },
        };
        let old_lease = before.as_ref().map_or(0, |before| before.lease);
        if old_lease != lease {
            if old_lease != 0 {
                self.store.delete(Space::LeaseKeys, lease_member_key(old_lease, &put.key))?;
            }
            if lease != 0 {
                self.store.put(Space::LeaseKeys, lease_member_key(lease, &put.key), Bytes::new())?;
            }
        }
        let record = RevRecord {
            deleted: false,
            previous: before.as_ref().map(|before| before.modified),
            key: put.key.clone(),
            create: meta.create,
            version: meta.version,
            lease,
            value,
        };
        self.metas.set(&put.key, meta);
        self.store.put(Space::Keys, put.key, meta.encode())?;
        self.record(rev, record, before.as_ref())?;
        Ok(pb::PutResponse { header: header(rev.main), prev_kv })
    }

    /// Writes the record of a change, and keeps the state that it ended for readers of older revisions.
    fn record(&mut self, rev: Rev, record: RevRecord, before: Option<&KeyMeta>) -> StoreResult<()> {
        // A key that this very revision began was visible to nobody; one of the same name that it ended before is there already.
        if let Some(before) = before
            && before.create != rev.main
            && record.left_history(rev)
        {
            self.store.put(Space::History, history_key(&record.key, rev.main), before.encode())?;
        }
        self.store.put(Space::Revs, Bytes::copy_from_slice(&rev.encode()), record.encode())?;
        if self.watched {
            self.effects.events.push((rev, record));
        }
        Ok(())
    }

    /// Deletes one live key.
    fn delete(&mut self, key: Bytes, before: &KeyMeta) -> StoreResult<()> {
        let rev = self.take_rev();
        if before.lease != 0 {
            self.store.delete(Space::LeaseKeys, lease_member_key(before.lease, &key))?;
        }
        self.metas.remove(&key);
        self.store.delete(Space::Keys, key.clone())?;
        let record = RevRecord {
            deleted: true,
            previous: Some(before.modified),
            key,
            create: 0,
            version: 0,
            lease: 0,
            value: Bytes::new(),
        };
        self.record(rev, record, Some(before))
    }

    async fn delete_request(&mut self, delete: pb::DeleteRangeRequest) -> Result<pb::DeleteRangeResponse, Failure> {
        check_delete(&delete)?;
        Ok(self.delete_range(&delete).await?)
    }

    async fn delete_range(&mut self, delete: &pb::DeleteRangeRequest) -> StoreResult<pb::DeleteRangeResponse> {
        let mut found: Vec<(Bytes, KeyMeta)> = Vec::new();
        if delete.range_end.is_empty() {
            if let Some(meta) = self.meta_of(&delete.key).await? {
                found.push((delete.key.clone(), meta));
            }
        } else {
            let (start, end) = range_of(&delete.key, &delete.range_end);
            let tip = self.tip_within();
            let mut keys = KeysAt::new(self.store, start, end, tip.revision, &tip, PAGE_PAIRS);
            while let Some(pair) = keys.next().await? {
                found.push(pair);
            }
        }
        let mut response = pb::DeleteRangeResponse { deleted: found.len() as i64, ..Default::default() };
        for (n, (key, meta)) in found.into_iter().enumerate() {
            if n % DELETES_AT_ONCE == DELETES_AT_ONCE - 1 {
                mainstay_io::yield_once().await;
            }
            if delete.prev_kv {
                response.prev_kvs.push(key_value(self.store, &meta).await?);
            }
            self.delete(key, &meta)?;
        }
        response.header = header(self.tip_within().revision);
        Ok(response)
    }

    async fn txn_request(&mut self, txn: pb::TxnRequest) -> Result<pb::TxnResponse, Failure> {
        check_txn(&txn, TXN_OPS_LIMIT)?;
        let path = decide(self.store, &self.tip, &txn).await?;
        // First what the puts need, then what the ranges do: of several reasons the client hears the one that etcd names.
        self.check_txn_state(&txn, &path, true).await?;
        self.check_txn_state(&txn, &path, false).await?;
        let mut response = self.txn(txn, path).await?;
        response.header = header(self.tip_within().revision);
        Ok(response)
    }

    /// Refuses a transaction of which an operation on its path cannot be done in this state.
    fn check_txn_state<'b>(
        &'b self,
        txn: &'b pb::TxnRequest,
        path: &'b TxnPath,
        puts: bool,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'b>> {
        Box::pin(async move {
            let mut inner = path.inner.iter();
            for op in path.ops(txn) {
                match &op.request {
                    Some(request_op::Request::RequestRange(range)) if !puts => {
                        check_range(range)?;
                        revision_of(range.revision, &self.tip)?;
                    }
                    Some(request_op::Request::RequestPut(put)) if puts => self.check_put_state(put).await?,
                    Some(request_op::Request::RequestTxn(txn)) => {
                        let path = inner.next().expect("the path has an item for each inner transaction");
                        self.check_txn_state(txn, path, puts).await?;
                    }
                    Some(_) | None => {}
                }
            }
            Ok(())
        })
    }

    fn txn<'b>(
        &'b mut self,
        txn: pb::TxnRequest,
        path: TxnPath,
    ) -> Pin<Box<dyn Future<Output = StoreResult<pb::TxnResponse>> + Send + 'b>> {
        Box::pin(async move {
            // Clients of inner transactions find a header there, if an empty one.
            let mut response = pb::TxnResponse {
                header: Some(pb::ResponseHeader::default()),
                succeeded: path.succeeded,
                ..Default::default()
            };
            let ops = if path.succeeded { txn.success } else { txn.failure };
            let mut inner = path.inner.into_iter();
            for op in ops {
                let answer = match op.request {
                    Some(request_op::Request::RequestRange(request)) => {
                        let tip = self.tip_within();
                        match range(self.store, &tip, &request).await {
                            Ok(answer) => Some(response_op::Response::ResponseRange(answer)),
                            Err(Failure::Store(error)) => return Err(error),
                            // Checked before the first write, but for an answer too large to send: it shows the count alone.
                            Err(Failure::Refused(_)) => {
                                let request = pb::RangeRequest { count_only: true, ..request };
                                let counted = range(self.store, &tip, &request).await.unwrap_or_default();
                                Some(response_op::Response::ResponseRange(counted))
                            }
                        }
                    }
                    Some(request_op::Request::RequestPut(put)) => {
                        let before = self.meta_of(&put.key).await?;
                        Some(response_op::Response::ResponsePut(self.put(put, before).await?))
                    }
                    Some(request_op::Request::RequestDeleteRange(delete)) => {
                        Some(response_op::Response::ResponseDeleteRange(self.delete_range(&delete).await?))
                    }
                    Some(request_op::Request::RequestTxn(txn)) => {
                        let path = inner.next().expect("the path has an item for each inner transaction");
                        Some(response_op::Response::ResponseTxn(self.txn(txn, path).await?))
                    }
                    None => None,
                };
                response.responses.push(pb::ResponseOp { response: answer });
            }
            Ok(response)
        })
    }

    async fn compact(&mut self, compact: pb::CompactionRequest) -> Result<pb::CompactionResponse, Failure> {
        if compact.revision <= self.tip.compaction.revision {
            return Err(Refusal::Compacted.into());
        }
        if compact.revision > self.tip.revision {
            return Err(Refusal::FutureRevision.into());
        }
        // Deletes at the revision of the compaction before may have been passed over by a collection under way.
        let from = Rev::first(self.tip.compaction.revision.max(0));
        self.tip.compaction.next = self.tip.compaction.next.min(from);
        self.tip.compaction.revision = compact.revision;
        Ok(self.collect().await?)
    }

    /// Removes up to [`COLLECT_RECORDS_MAX`] records' worth of what the compaction made unreadable, and keeps the place.
    ///
    /// A record at or before the compacted revision names the one that it superseded, which nobody can read any more; and a
    /// delete before it has itself nothing to say. All changes of the compacted revision stay for watchers that begin there, until
    /// the next compaction.
    async fn collect(&mut self) -> StoreResult<pb::CompactionResponse> {
        let mut compaction = self.tip.compaction;
        if compaction.collected < compaction.revision {
            let upper = Rev::first(compaction.revision.saturating_add(1)).encode();
            let lower = compaction.next.encode();
            let page = self
                .store
                .page(Space::Revs, Bound::Included(&lower), Bound::Excluded(&upper), false, COLLECT_RECORDS_MAX)
                .await?;
            let ended = page.len() < COLLECT_RECORDS_MAX;
            for (key, value) in page {
                let rev = Rev::decode(&key)?;
                let record = RevRecord::decode(&value)?;
                // A state that the compacted revision itself began and ended is one of its changes: see above.
                if let Some(previous) = record.previous.filter(|previous| previous.main < compaction.revision) {
                    self.store.delete(Space::Revs, Bytes::copy_from_slice(&previous.encode()))?;
                }
                if record.left_history(rev) {
                    self.store.delete(Space::History, history_key(&record.key, rev.main))?;
                }
                if record.deleted && rev.main < compaction.revision {
                    self.store.delete(Space::Revs, key)?;
                }
                compaction.next = Rev { main: rev.main, sub: rev.sub.saturating_add(1) };
            }
            if ended {
                compaction.collected = compaction.revision;
                // The next compaction begins here: a delete of this revision is its garbage.
                compaction.next = Rev::first(compaction.revision.max(0));
            }
            self.store.put(Space::Meta, Bytes::from_static(COMPACTION_KEY), compaction.encode())?;
            self.tip.compaction = compaction;
        }
        Ok(pb::CompactionResponse { header: header(self.tip.revision) })
    }

    async fn lease_grant(
        &mut self,
        grant: pb::LeaseGrantRequest,
        ordinal: u64,
    ) -> Result<pb::LeaseGrantResponse, Failure> {
        if grant.ttl > LEASE_TTL_MAX {
            return Err(Refusal::LeaseTtlTooLarge.into());
        }
        let ttl = grant.ttl.max(LEASE_TTL_MIN);
        let mut id = grant.id;
        if id == 0 {
            // Chosen by the place in the log, so that replicas agree, and spread, so that clients do not guess others'.
            let mut seed = self.index.0.rotate_left(20) ^ ordinal;
            loop {
                id = (spread(seed) >> 1) as i64;
                if id != 0 && !self.lease_exists(id).await? {
                    break;
                }
                seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            }
        } else if self.lease_exists(id).await? {
            return Err(Refusal::LeaseExist.into());
        }
        self.store.put(Space::Leases, Bytes::copy_from_slice(&lease_key(id)), record::encode_lease(ttl))?;
        self.effects.leases.push(LeaseChange { id, ttl: Some(ttl) });
        Ok(pb::LeaseGrantResponse { header: header(self.tip.revision), id, ttl, error: String::new() })
    }

    /// Ends a lease; its keys go in one revision.
    async fn lease_revoke(&mut self, id: i64) -> Result<pb::LeaseRevokeResponse, Failure> {
        if !self.lease_exists(id).await? {
            return Err(Refusal::LeaseNotFound.into());
        }
        self.store.delete(Space::Leases, Bytes::copy_from_slice(&lease_key(id)))?;
        for key in lease_keys(self.store, id).await? {
            match self.meta_of(&key).await? {
                Some(meta) => self.delete(key, &meta)?,
                None => self.store.delete(Space::LeaseKeys, lease_member_key(id, &key))?,
            }
        }
        self.effects.leases.push(LeaseChange { id, ttl: None });
        Ok(pb::LeaseRevokeResponse { header: header(self.tip_within().revision) })
    }
}

/// The keys that die with a lease, in order.
pub(super) async fn lease_keys(reader: &impl Reader, id: i64) -> StoreResult<Vec<Bytes>> {
    let mut keys = Vec::new();
    let prefix = lease_key(id);
    // Ids are compared as unsigned numbers here; the last one has no successor.
    let end = (id as u64).checked_add(1).map(u64::to_be_bytes);
    let upper = end.as_ref().map_or(Bound::Unbounded, |end| Bound::Excluded(&end[..]));
    let mut after: Option<Bytes> = None;
    loop {
        let lower = after.as_ref().map_or(Bound::Included(&prefix[..]), |after| Bound::Excluded(&after[..]));
        let page = reader.page(Space::LeaseKeys, lower, upper, false, PAGE_PAIRS).await?;
        let ended = page.len() < PAGE_PAIRS;
        for (encoded, _) in page {
            keys.push(split_lease_key(&encoded)?.1);
            after = Some(encoded);
        }
        if ended {
            return Ok(keys);
        }
    }
}

/// Mixes the bits of a number (the finalizer of SplitMix64).
fn spread(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Which branch a transaction takes, and each transaction inside that branch: all decided on the state before it.
#[derive(Debug)]
pub(super) struct TxnPath {
    succeeded: bool,
    inner: Vec<TxnPath>,
}

impl TxnPath {
    fn ops<'b>(&self, txn: &'b pb::TxnRequest) -> &'b [pb::RequestOp] {
        if self.succeeded { &txn.success } else { &txn.failure }
    }
}

/// Decides the path of a transaction.
fn decide<'b, R: Reader>(
    reader: &'b R,
    tip: &'b Tip,
    txn: &'b pb::TxnRequest,
) -> Pin<Box<dyn Future<Output = StoreResult<TxnPath>> + Send + 'b>> {
    Box::pin(async move {
        let mut path = TxnPath { succeeded: true, inner: Vec::new() };
        for compare in &txn.compare {
            if !holds(reader, tip, compare).await? {
                path.succeeded = false;
                break;
            }
        }
        for op in path.ops(txn) {
            if let Some(request_op::Request::RequestTxn(txn)) = &op.request {
                let inner = decide(reader, tip, txn).await?;
                path.inner.push(inner);
            }
        }
        Ok(path)
    })
}

/// Whether a condition holds for every key that it names; for none, for the absent key.
async fn holds(reader: &impl Reader, tip: &Tip, compare: &pb::Compare) -> StoreResult<bool> {
    let by_value = compare.target == pb::compare::CompareTarget::Value as i32;
    let (start, end) = range_of(&compare.key, &compare.range_end);
    let mut keys = KeysAt::new(reader, start, end, tip.revision, tip, 1);
    let mut any = false;
    while let Some((key, meta)) = keys.next().await? {
        any = true;
        let value = if by_value { record_of(reader, meta.modified).await?.value } else { Bytes::new() };
        let kv = KeyValue {
            key,
            create_revision: meta.create,
            mod_revision: meta.modified.main,
            version: meta.version,
            value,
            lease: meta.lease,
        };
        if !compare_holds(compare, &kv) {
            return Ok(false);
        }
    }
    // There is no word for the value of an absent key: such a comparison fails whatever it asks.
    Ok(any || (!by_value && compare_holds(compare, &KeyValue::default())))
}

fn compare_holds(compare: &pb::Compare, kv: &KeyValue) -> bool {
    use pb::compare::{CompareResult, CompareTarget, TargetUnion};
    use std::cmp::Ordering;
    let ordering = match (CompareTarget::try_from(compare.target), &compare.target_union) {
        (Ok(CompareTarget::Value), Some(TargetUnion::Value(value))) => kv.value.cmp(value),
        (Ok(CompareTarget::Value), _) => kv.value[..].cmp(&[]),
        (Ok(CompareTarget::Version), Some(TargetUnion::Version(version))) => kv.version.cmp(version),
        (Ok(CompareTarget::Version), _) => kv.version.cmp(&0),
        (Ok(CompareTarget::Create), Some(TargetUnion::CreateRevision(revision))) => kv.create_revision.cmp(revision),
        (Ok(CompareTarget::Create), _) => kv.create_revision.cmp(&0),
        (Ok(CompareTarget::Mod), Some(TargetUnion::ModRevision(revision))) => kv.mod_revision.cmp(revision),
        (Ok(CompareTarget::Mod), _) => kv.mod_revision.cmp(&0),
        (Ok(CompareTarget::Lease), Some(TargetUnion::Lease(lease))) => kv.lease.cmp(lease),
        (Ok(CompareTarget::Lease), _) => kv.lease.cmp(&0),
        (Err(_), _) => Ordering::Equal,
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering == Ordering::Equal,
        Ok(CompareResult::NotEqual) => ordering != Ordering::Equal,
        Ok(CompareResult::Greater) => ordering == Ordering::Greater,
        Ok(CompareResult::Less) => ordering == Ordering::Less,
        Err(_) => true,
    }
}

/// Answers a transaction of ranges alone.
pub(super) async fn read_txn(
    reader: &impl Reader,
    tip: &Tip,
    txn: &pb::TxnRequest,
) -> Result<pb::TxnResponse, Failure> {
    let path = decide(reader, tip, txn).await?;
    let mut response =
        pb::TxnResponse { header: header(tip.revision), succeeded: path.succeeded, responses: Vec::new() };
    for op in path.ops(txn) {
        if let Some(request_op::Request::RequestRange(request)) = &op.request {
            let answer = response_op::Response::ResponseRange(range(reader, tip, request).await?);
            response.responses.push(pb::ResponseOp { response: Some(answer) });
        }
    }
    Ok(response)
}
