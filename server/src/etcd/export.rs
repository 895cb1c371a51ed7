//! The stream of `Maintenance.Snapshot`: the store as a database file of etcd's own format, so that `etcdctl snapshot save`,
//! `status` and `restore` work on it and nobody's data is held here.
//!
//! # Format
//! The page file of bbolt, as far as a file needs it that is written once in order of keys. Little-endian.
//!
//! ```text
//! page 0, 1   header (id u64 | flags u16 = 4 | count u16 | overflow u32), then magic u32 | version u32 | page bytes u32 |
//!             flags u32 | root bucket (page u64 | sequence u64) | freelist page u64 | pages u64 | transaction u64 | FNV-1a u64
//! page 2      header (flags 16), no free page
//! page 3 ..   leaves (flags 2) of each bucket and the branches (flags 1) above them; the last page lists the buckets
//! ```
//!
//! A leaf is a list of elements (flags u32 | position u32 | key bytes u32 | value bytes u32) and then their bytes; a branch has
//! (position u32 | key bytes u32 | page u64) and keys. Positions count from the element itself. SHA-256 of the file follows it.
//!
//! The pages that come first name pages whose place follows from everything after them, so the pinned state is read twice:
//! once to measure, once to write.

use std::ops::Bound;

use bytes::{BufMut, Bytes, BytesMut};
use mainstay_replication::NodeStatus;
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::error::status_of;
use super::maintenance::ETCD_VERSION;
use super::model::View;
use super::model::record::{Rev, RevRecord, decode_lease};
use super::model::store::{Reader, Space};
use crate::proto::etcdserverpb as pb;
use crate::proto::mvccpb::KeyValue;

const PAGE_BYTES: usize = 4096;
const PAGE_HEADER_BYTES: usize = 16;
const ELEMENT_BYTES: usize = 16;
const FLAG_BRANCH: u16 = 1;
const FLAG_LEAF: u16 = 2;
const FLAG_META: u16 = 4;
const FLAG_FREELIST: u16 = 16;
/// Of an element: its value is a bucket.
const ELEMENT_BUCKET: u32 = 1;
const MAGIC: u32 = 0xED0C_DAED;
const FILE_VERSION: u32 = 2;
/// Pages before those of the buckets.
const FIRST_PAGE: u64 = 3;
/// Records read at a time.
const READ_RECORDS: usize = 256;
/// Bytes of the file in an answer, at least, but for the last.
const BLOB_BYTES: usize = 64 << 10;
/// Answers that wait for the client, at most.
const BLOBS_WAITING_MAX: usize = 4;

/// The buckets that etcd expects, in order of names; those without a source are empty.
const BUCKETS: [(&str, Option<Source>); 10] = [
    ("alarm", None),
    ("auth", None),
    ("authRoles", None),
    ("authUsers", None),
    ("cluster", None),
    ("key", Some(Source::Revisions)),
    ("lease", Some(Source::Leases)),
    ("members", None),
    ("members_removed", None),
    ("meta", Some(Source::Meta)),
];

/// Where the pairs of a bucket come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Revisions,
    Leases,
    Meta,
}

type Pair = (Vec<u8>, Vec<u8>);

/// etcd's bytes of a revision.
fn revision_key(rev: Rev, deleted: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(18);
    out.put_u64(rev.main as u64);
    out.put_u8(b'_');
    out.put_u64(rev.sub as u64);
    if deleted {
        out.put_u8(b't');
    }
    out
}

/// A lease as etcd stores it.
#[derive(Clone, PartialEq, Message)]
struct StoredLease {
    #[prost(int64, tag = "1")]
    id: i64,
    #[prost(int64, tag = "2")]
    ttl: i64,
}

/// Reads a bucket's pairs in order, a portion at a time.
struct Pairs<'a, R> {
    export: &'a Export<R>,
    source: Source,
    after: Option<Bytes>,
    ended: bool,
}

impl<R: Reader> Pairs<'_, R> {
    /// The next portion; empty at the end.
    async fn next(&mut self) -> Result<Vec<Pair>, Status> {
        if self.ended {
            return Ok(Vec::new());
        }
        let space = match self.source {
            Source::Revisions => Space::Revs,
            Source::Leases => Space::Leases,
            Source::Meta => {
                self.ended = true;
                return Ok(self.export.meta_pairs());
            }
        };
        let lower = self.after.as_ref().map_or(Bound::Unbounded, |after| Bound::Excluded(&after[..]));
        let page = self.export.view.reader().page(space, lower, Bound::Unbounded, false, READ_RECORDS).await;
        let page = page.map_err(|error| status_of(&error.into()))?;
        self.ended = page.len() < READ_RECORDS;
        self.after = page.last().map(|(key, _)| key.clone()).or(self.after.take());
        page.into_iter().map(|(key, value)| self.pair(&key, &value)).collect()
    }

    fn pair(&self, key: &Bytes, value: &Bytes) -> Result<Pair, Status> {
        let corrupt = |error: mainstay_engine::Error| status_of(&error.into());
        if self.source == Source::Leases {
            let ttl = decode_lease(value).map_err(corrupt)?;
            let (id, _) = super::model::record::split_lease_key(key).map_err(corrupt)?;
            return Ok((key.to_vec(), StoredLease { id, ttl }.encode_to_vec()));
        }
        let rev = Rev::decode(key).map_err(corrupt)?;
        let record = RevRecord::decode(value).map_err(corrupt)?;
        let deleted = record.deleted;
        let kv =
            if deleted { KeyValue { key: record.key, ..Default::default() } } else { record.into_key_value(rev.main) };
        Ok((revision_key(rev, deleted), kv.encode_to_vec()))
    }
}

/// Fills pages with elements one after another.
#[derive(Default)]
struct Filling {
    bytes: usize,
    count: u16,
}

impl Filling {
    /// Whether an element still belongs on this page. A page takes one at least.
    fn takes(&self, element_bytes: usize) -> bool {
        self.count == 0 || (self.count < u16::MAX && PAGE_HEADER_BYTES + self.bytes + element_bytes <= PAGE_BYTES)
    }

    fn add(&mut self, element_bytes: usize) {
        self.bytes += element_bytes;
        self.count += 1;
    }

    fn pages(&self) -> u64 {
        (PAGE_HEADER_BYTES + self.bytes).div_ceil(PAGE_BYTES) as u64
    }
}

/// A page as the level above sees it.
#[derive(Clone)]
struct PageRef {
    first_key: Vec<u8>,
    page: u64,
}

/// Where the pages of a bucket lie.
struct Plan {
    source: Source,
    leaves: Vec<PageRef>,
    /// Levels of branches from the lowest; the last has one page. Each page with its children.
    branches: Vec<Vec<(u64, Vec<PageRef>)>>,
    root: u64,
}

struct Export<R> {
    view: View<R>,
    applied: u64,
    term: u64,
}

impl<R: Reader> Export<R> {
    fn pairs(&self, source: Source) -> Pairs<'_, R> {
        Pairs { export: self, source, after: None, ended: false }
    }

    fn meta_pairs(&self) -> Vec<Pair> {
        let mut pairs = vec![
            (b"consistent_index".to_vec(), self.applied.to_be_bytes().to_vec()),
            (b"term".to_vec(), self.term.to_be_bytes().to_vec()),
        ];
        let compacted = self.view.tip().compaction.revision;
        if compacted >= 0 {
            let at = revision_key(Rev::first(compacted), false);
            pairs.push((b"finishedCompactRev".to_vec(), at.clone()));
            pairs.push((b"scheduledCompactRev".to_vec(), at));
        }
        pairs.sort();
        pairs
    }

    /// Measures a bucket and gives its pages their numbers. `None` if it is empty.
    async fn plan(&self, source: Source, next_page: &mut u64) -> Result<Option<Plan>, Status> {
        let mut leaves: Vec<PageRef> = Vec::new();
        let mut filling = Filling::default();
        let mut pairs = self.pairs(source);
        loop {
            let portion = pairs.next().await?;
            if portion.is_empty() {
                break;
            }
            for (key, value) in portion {
                let bytes = ELEMENT_BYTES + key.len() + value.len();
                if leaves.is_empty() || !filling.takes(bytes) {
                    *next_page += if leaves.is_empty() { 0 } else { filling.pages() };
                    leaves.push(PageRef { first_key: key, page: *next_page });
                    filling = Filling::default();
                }
                filling.add(bytes);
            }
        }
        if leaves.is_empty() {
            return Ok(None);
        }
        *next_page += filling.pages();
        let mut branches = Vec::new();
        let mut level = leaves.clone();
        while level.len() > 1 {
            let mut pages: Vec<(u64, Vec<PageRef>)> = Vec::new();
            let mut filling = Filling::default();
            for child in level {
                let bytes = ELEMENT_BYTES + child.first_key.len();
                // Keys here are of a few bytes, so a branch has room for several children and the tree ends.
                if pages.is_empty() || !filling.takes(bytes) {
                    pages.push((*next_page, Vec::new()));
                    *next_page += 1;
                    filling = Filling::default();
                }
                filling.add(bytes);
                pages.last_mut().expect("just pushed if there was none").1.push(child);
            }
            level = pages
                .iter()
                .map(|(page, children)| PageRef { first_key: children[0].first_key.clone(), page: *page })
                .collect();
            branches.push(pages);
        }
        let root = level[0].page;
        Ok(Some(Plan { source, leaves, branches, root }))
    }

    /// Writes the whole file.
    async fn write(&self, out: &mut Output) -> Result<(), Status> {
        let mut next_page = FIRST_PAGE;
        let mut plans = Vec::new();
        let mut buckets = Vec::new();
        for (name, source) in BUCKETS {
            let plan = match source {
                Some(source) => self.plan(source, &mut next_page).await?,
                None => None,
            };
            let mut value = BytesMut::new();
            value.put_u64_le(plan.as_ref().map_or(0, |plan| plan.root));
            value.put_u64_le(0);
            if plan.is_none() {
                // An empty bucket lives in its value: a leaf without elements.
                put_header(&mut value, 0, FLAG_LEAF, 0, 0);
            }
            buckets.push((name.as_bytes().to_vec(), value.to_vec()));
            plans.extend(plan);
        }
        let root = next_page;
        let pages = root + 1;
        out.begin(pages * PAGE_BYTES as u64);
        for id in 0..2 {
            out.page(meta_page(id, root, pages)).await?;
        }
        let mut freelist = BytesMut::new();
        put_header(&mut freelist, 2, FLAG_FREELIST, 0, 0);
        out.page(freelist).await?;
        for plan in &plans {
            self.write_bucket(plan, out).await?;
        }
        out.page(leaf_page(root, ELEMENT_BUCKET, &buckets)).await?;
        out.finish().await
    }

    async fn write_bucket(&self, plan: &Plan, out: &mut Output) -> Result<(), Status> {
        let mut pairs = self.pairs(plan.source);
        let mut leaf: Vec<Pair> = Vec::new();
        let mut filling = Filling::default();
        let mut pages = plan.leaves.iter();
        loop {
            let portion = pairs.next().await?;
            let ended = portion.is_empty();
            for (key, value) in portion {
                let bytes = ELEMENT_BYTES + key.len() + value.len();
                if !leaf.is_empty() && !filling.takes(bytes) {
                    let page = pages.next().ok_or_else(moved)?.page;
                    out.page(leaf_page(page, 0, &leaf)).await?;
                    leaf.clear();
                    filling = Filling::default();
                }
                filling.add(bytes);
                leaf.push((key, value));
            }
            if ended {
                break;
            }
        }
        let page = pages.next().ok_or_else(moved)?.page;
        out.page(leaf_page(page, 0, &leaf)).await?;
        for (page, children) in plan.branches.iter().flatten() {
            out.page(branch_page(*page, children)).await?;
        }
        Ok(())
    }
}

fn moved() -> Status {
    Status::internal("a pinned state changed while it was written out")
}

fn put_header(out: &mut BytesMut, page: u64, flags: u16, count: usize, overflow: u32) {
    out.put_u64_le(page);
    out.put_u16_le(flags);
    out.put_u16_le(count as u16);
    out.put_u32_le(overflow);
}

fn meta_page(id: u64, root: u64, pages: u64) -> BytesMut {
    let mut meta = BytesMut::new();
    meta.put_u32_le(MAGIC);
    meta.put_u32_le(FILE_VERSION);
    meta.put_u32_le(PAGE_BYTES as u32);
    meta.put_u32_le(0);
    meta.put_u64_le(root);
    meta.put_u64_le(0);
    meta.put_u64_le(2);
    meta.put_u64_le(pages);
    meta.put_u64_le(id);
    let checksum = fnv1a(&meta);
    meta.put_u64_le(checksum);
    let mut out = BytesMut::new();
    put_header(&mut out, id, FLAG_META, 0, 0);
    out.extend_from_slice(&meta);
    out
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn leaf_page(page: u64, flags: u32, pairs: &[Pair]) -> BytesMut {
    let bytes: usize = pairs.iter().map(|(key, value)| ELEMENT_BYTES + key.len() + value.len()).sum();
    let overflow = (PAGE_HEADER_BYTES + bytes).div_ceil(PAGE_BYTES) - 1;
    let mut out = BytesMut::with_capacity(PAGE_HEADER_BYTES + bytes);
    put_header(&mut out, page, FLAG_LEAF, pairs.len(), overflow as u32);
    let mut position = pairs.len() * ELEMENT_BYTES;
    for (key, value) in pairs {
        out.put_u32_le(flags);
        out.put_u32_le(position as u32);
        out.put_u32_le(key.len() as u32);
        out.put_u32_le(value.len() as u32);
        // From the next element, which lies after this one.
        position = position + key.len() + value.len() - ELEMENT_BYTES;
    }
    for (key, value) in pairs {
        out.extend_from_slice(key);
        out.extend_from_slice(value);
    }
    out
}

fn branch_page(page: u64, children: &[PageRef]) -> BytesMut {
    let mut out = BytesMut::new();
    put_header(&mut out, page, FLAG_BRANCH, children.len(), 0);
    let mut position = children.len() * ELEMENT_BYTES;
    for child in children {
        out.put_u32_le(position as u32);
        out.put_u32_le(child.first_key.len() as u32);
        out.put_u64_le(child.page);
        position = position + child.first_key.len() - ELEMENT_BYTES;
    }
    for child in children {
        out.extend_from_slice(&child.first_key);
    }
    out
}

/// Sends the file in answers and sums it up.
struct Output {
    answers: mpsc::Sender<Result<pb::SnapshotResponse, Status>>,
    header: Option<pb::ResponseHeader>,
    blob: BytesMut,
    remaining: u64,
    hash: Sha256,
}

impl Output {
    fn begin(&mut self, file_bytes: u64) {
        self.remaining = file_bytes + 32;
    }

    /// Adds a page, padded to its end.
    async fn page(&mut self, page: BytesMut) -> Result<(), Status> {
        self.blob.extend_from_slice(&page);
        let pad = page.len().next_multiple_of(PAGE_BYTES) - page.len();
        self.blob.put_bytes(0, pad);
        if self.blob.len() >= BLOB_BYTES {
            self.send().await?;
        }
        Ok(())
    }

    async fn send(&mut self) -> Result<(), Status> {
        let blob = self.blob.split().freeze();
        self.hash.update(&blob);
        self.answer(blob).await
    }

    async fn answer(&mut self, blob: Bytes) -> Result<(), Status> {
        self.remaining = self.remaining.checked_sub(blob.len() as u64).ok_or_else(moved)?;
        let answer = pb::SnapshotResponse {
            header: self.header,
            remaining_bytes: self.remaining,
            blob,
            version: ETCD_VERSION.to_owned(),
        };
        self.answers.send(Ok(answer)).await.map_err(|_| Status::cancelled("the client went away"))
    }

    async fn finish(&mut self) -> Result<(), Status> {
        if !self.blob.is_empty() {
            self.send().await?;
        }
        let hash = std::mem::take(&mut self.hash).finalize();
        self.answer(Bytes::copy_from_slice(&hash)).await?;
        if self.remaining != 0 { Err(moved()) } else { Ok(()) }
    }
}

/// Streams a pinned state.
pub(super) fn stream<R: Reader + 'static>(
    status: NodeStatus,
    view: View<R>,
    header: Option<pb::ResponseHeader>,
) -> ReceiverStream<Result<pb::SnapshotResponse, Status>> {
    let (answers, outbound) = mpsc::channel(BLOBS_WAITING_MAX);
    let export = Export { view, applied: status.group.applied.0, term: status.term };
    let mut output =
        Output { answers: answers.clone(), header, blob: BytesMut::new(), remaining: 0, hash: Sha256::new() };
    tokio::spawn(async move {
        if let Err(status) = export.write(&mut output).await {
            let _ = answers.send(Err(status)).await;
        }
    });
    ReceiverStream::new(outbound)
}
