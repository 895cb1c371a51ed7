//! Reads keys at one revision.
//!
//! # Invariants
//! A state of a key is visible at revision `r` when `modified <= r`, and `r < until` where a later change superseded it, so
//! at most one is. Live states are in `etcd.keys`. Of the superseded ones the last of each life and every
//! [16th](super::record::HISTORY_SPACING) are in `etcd.history`; those between are reached from the next later one of
//! their life, each by the record of the one after it.

use std::future::Future;
use std::ops::Bound;
use std::pin::Pin;

use bytes::{BufMut, Bytes};
use mainstay_engine::Result as StoreResult;

use super::Tip;
use super::check::range_of;
use super::record::{KeyMeta, Rev, RevRecord, corrupt, history_bound, history_key, history_prefix, split_history_key};
use super::store::{Page, Reader, Space};
use crate::etcd::error::{Failure, Refusal};
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader};
use crate::proto::mvccpb::KeyValue;

/// Pairs read from the store at a time, at most.
const PAGE_PAIRS_MAX: usize = 1024;
/// Pairs read in the first page of a scan without a limit.
const PAGE_PAIRS_FIRST: usize = 64;
/// Bytes of keys and values in an answer, at most; more is `ResourceExhausted` at the client's transport anyway.
const ANSWER_BYTES_MAX: usize = 1 << 30;

/// The header of an answer of the model: the service adds who answers.
pub(crate) fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..Default::default() })
}

/// A scan over one keyspace that reads pages which grow.
struct Pages<'a, R> {
    reader: &'a R,
    space: Space,
    lower: Bound<Bytes>,
    upper: Bound<Bytes>,
    page: std::vec::IntoIter<(Bytes, Bytes)>,
    page_pairs: usize,
    ended: bool,
}

impl<'a, R: Reader> Pages<'a, R> {
    fn new(reader: &'a R, space: Space, lower: Bytes, upper: Option<Bytes>, first: usize) -> Self {
        let ended = upper.as_ref().is_some_and(|upper| *upper <= lower);
        Self {
            reader,
            space,
            lower: Bound::Included(lower),
            upper: upper.map_or(Bound::Unbounded, Bound::Excluded),
            page: Page::new().into_iter(),
            page_pairs: first.clamp(1, PAGE_PAIRS_MAX),
            ended,
        }
    }

    async fn next(&mut self) -> StoreResult<Option<(Bytes, Bytes)>> {
        loop {
            if let Some(pair) = self.page.next() {
                return Ok(Some(pair));
            }
            if self.ended {
                return Ok(None);
            }
            let (lower, upper) = (self.lower.as_ref().map(|b| &b[..]), self.upper.as_ref().map(|b| &b[..]));
            let page = self.reader.page(self.space, lower, upper, false, self.page_pairs).await?;
            self.ended = page.len() < self.page_pairs;
            if let Some((last, _)) = page.last() {
                self.lower = Bound::Excluded(last.clone());
            }
            self.page_pairs = self.page_pairs.saturating_mul(4).min(PAGE_PAIRS_MAX);
            self.page = page.into_iter();
        }
    }

    /// Goes on at the first key at or after `key`, which lies beyond what was given.
    fn skip_to(&mut self, key: Bytes) {
        let rest = self.page.as_slice();
        if rest.last().is_some_and(|(last, _)| *last >= key) {
            let passed = rest.partition_point(|(k, _)| *k < key);
            if let Some(passed) = passed.checked_sub(1) {
                self.page.nth(passed);
            }
            return;
        }
        self.page = Page::new().into_iter();
        if let Bound::Excluded(upper) = &self.upper
            && *upper <= key
        {
            self.ended = true;
        }
        if !self.ended {
            self.lower = Bound::Included(key);
        }
    }
}

/// The superseded states that are visible at a revision, in order of keys.
struct HistoryAt<'a, R> {
    pages: Pages<'a, R>,
    revision: i64,
}

impl<'a, R: Reader> HistoryAt<'a, R> {
    fn new(reader: &'a R, start: &Bytes, end: Option<&Bytes>, revision: i64) -> Self {
        // From the first state of `start` that was still there at the revision.
        let lower = history_key(start, revision.saturating_add(1));
        let upper = end.map(|end| history_bound(end));
        Self { pages: Pages::new(reader, Space::History, lower, upper, PAGE_PAIRS_FIRST), revision }
    }

    async fn next(&mut self) -> StoreResult<Option<(Bytes, KeyMeta)>> {
        while let Some((encoded, value)) = self.pages.next().await? {
            let (key, until) = split_history_key(&encoded)?;
            if until <= self.revision {
                self.pages.skip_to(history_key(&key, self.revision.saturating_add(1)));
                continue;
            }
            // The first state that ended after the revision: the later ones began after this one ended.
            let mut beyond = history_prefix(&key);
            beyond.put_u64(u64::MAX);
            self.pages.skip_to(beyond.freeze());
            if let Some(meta) = state_at(self.pages.reader, KeyMeta::decode(&value)?, self.revision).await? {
                return Ok(Some((key, meta)));
            }
        }
        Ok(None)
    }
}

/// The state at `revision` of the life of a key of which `meta` is a state; none when the life began later.
async fn state_at(reader: &impl Reader, mut meta: KeyMeta, revision: i64) -> StoreResult<Option<KeyMeta>> {
    if meta.create > revision {
        return Ok(None);
    }
    if meta.modified.main <= revision {
        return Ok(Some(meta));
    }
    let mut record = record_of(reader, meta.modified).await?;
    while meta.modified.main > revision {
        let previous = record.previous.ok_or_else(|| corrupt("life of a key"))?;
        record = record_of(reader, previous).await?;
        if record.deleted || previous >= meta.modified {
            return Err(corrupt("life of a key"));
        }
        meta = KeyMeta { create: record.create, modified: previous, version: record.version, lease: record.lease };
    }
    Ok(Some(meta))
}

/// The keys of a range that are visible at a revision, in order.
pub(super) struct KeysAt<'a, R> {
    live: Pages<'a, R>,
    history: Option<HistoryAt<'a, R>>,
    revision: i64,
    next_live: Option<(Bytes, KeyMeta)>,
    next_history: Option<(Bytes, KeyMeta)>,
}

impl<'a, R: Reader> KeysAt<'a, R> {
    /// `first` is how many keys are likely to be wanted.
    pub(super) fn new(reader: &'a R, start: Bytes, end: Option<Bytes>, revision: i64, tip: &Tip, first: usize) -> Self {
        let history = (revision < tip.revision).then(|| HistoryAt::new(reader, &start, end.as_ref(), revision));
        Self {
            live: Pages::new(reader, Space::Keys, start, end, first),
            history,
            revision,
            next_live: None,
            next_history: None,
        }
    }

    pub(super) async fn next(&mut self) -> StoreResult<Option<(Bytes, KeyMeta)>> {
        while self.next_live.is_none() {
            let Some((key, value)) = self.live.next().await? else { break };
            let meta = KeyMeta::decode(&value)?;
            if meta.create <= self.revision {
                self.next_live = Some((key, meta));
            }
        }
        if let (None, Some(history)) = (&self.next_history, &mut self.history) {
            self.next_history = history.next().await?;
            if self.next_history.is_none() {
                self.history = None;
            }
        }
        if let Some((old, _)) = &self.next_history {
            match &self.next_live {
                Some((live, _)) if live < old => {}
                // A state between the revision and the present one: the nearer of the two to begin at.
                Some((live, _)) if live == old => {
                    self.next_live = None;
                    return Ok(self.next_history.take());
                }
                _ => return Ok(self.next_history.take()),
            }
        }
        let Some((key, meta)) = self.next_live.take() else { return Ok(None) };
        let meta = state_at(self.live.reader, meta, self.revision).await?;
        Ok(meta.map(|meta| (key, meta)))
    }
}

/// The record of a state that a key's metadata names.
pub(super) async fn record_of(reader: &impl Reader, rev: Rev) -> StoreResult<RevRecord> {
    let bytes = reader.get(Space::Revs, &rev.encode()).await?.ok_or_else(|| corrupt("missing revision"))?;
    RevRecord::decode(&bytes)
}

/// The state of a key as the protocol shows it.
pub(super) async fn key_value(reader: &impl Reader, meta: &KeyMeta) -> StoreResult<KeyValue> {
    Ok(record_of(reader, meta.modified).await?.into_key_value(meta.modified.main))
}

/// The revision that a request reads at.
pub(super) fn revision_of(requested: i64, tip: &Tip) -> Result<i64, Refusal> {
    let revision = if requested <= 0 { tip.revision } else { requested };
    if revision > tip.revision {
        Err(Refusal::FutureRevision)
    } else if revision < tip.compaction.revision {
        Err(Refusal::Compacted)
    } else {
        Ok(revision)
    }
}

/// Reads a range with all its options.
pub(super) fn range<'a, R: Reader>(
    reader: &'a R,
    tip: &'a Tip,
    request: &'a RangeRequest,
) -> Pin<Box<dyn Future<Output = Result<RangeResponse, Failure>> + Send + 'a>> {
    Box::pin(async move {
        let revision = revision_of(request.revision, tip)?;
        let mut response = RangeResponse { header: header(tip.revision), ..Default::default() };
        let limit = usize::try_from(request.limit).unwrap_or(0);
        let (start, end) = range_of(&request.key, &request.range_end);

        if request.range_end.is_empty() && revision == tip.revision {
            // One key as it is now: no scan.
            let Some(value) = reader.get(Space::Keys, &request.key).await? else { return Ok(response) };
            response.count = 1;
            if request.count_only {
                return Ok(response);
            }
            let meta = KeyMeta::decode(&value)?;
            if within_bounds(&meta, request) {
                response.kvs.push(shown(reader, start, &meta, request.keys_only).await?);
            }
            return Ok(response);
        }

        let order = SortOrder::try_from(request.sort_order).map_err(|_| Refusal::InvalidSortOption)?;
        let target = SortTarget::try_from(request.sort_target).map_err(|_| Refusal::InvalidSortOption)?;
        // As the store gives them: by key, ascending.
        let natural = order == SortOrder::None || (target == SortTarget::Key && order == SortOrder::Ascend);
        // The protocol cuts before it sorts where an order is implied by a target alone, and else after.
        let filtered = request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0;
        let keep = if natural && !filtered && limit > 0 { limit.saturating_add(1) } else { usize::MAX };

        let mut found: Vec<(Bytes, KeyMeta)> = Vec::new();
        let mut keys =
            KeysAt::new(reader, start, end, revision, tip, if keep == usize::MAX { PAGE_PAIRS_FIRST } else { keep });
        while let Some((key, meta)) = keys.next().await? {
            response.count = response.count.saturating_add(1);
            if !request.count_only && found.len() < keep && within_bounds(&meta, request) {
                found.push((key, meta));
            }
        }
        drop(keys);
        if request.count_only {
            return Ok(response);
        }

        let descend = order == SortOrder::Descend;
        let by_value = target == SortTarget::Value && !(order == SortOrder::None && found.len() < 2);
        if !by_value {
            let by = |meta: &KeyMeta| match target {
                SortTarget::Version => meta.version,
                SortTarget::Create => meta.create,
                SortTarget::Mod => meta.modified.main,
                SortTarget::Key | SortTarget::Value => 0,
            };
            if target != SortTarget::Key {
                found.sort_by_key(|(_, meta)| by(meta));
            }
            if descend {
                found.reverse();
            }
            cut(&mut found, limit, &mut response.more);
        }
        let mut bytes = 0_usize;
        response.kvs.reserve(found.len());
        for (key, meta) in found {
            let kv = shown(reader, key, &meta, request.keys_only && !by_value).await?;
            bytes = bytes.saturating_add(kv.key.len()).saturating_add(kv.value.len());
            if bytes > ANSWER_BYTES_MAX {
                return Err(Refusal::TooManyRequests.into());
            }
            response.kvs.push(kv);
        }
        if by_value {
            response.kvs.sort_by(|a, b| a.value.cmp(&b.value));
            if descend {
                response.kvs.reverse();
            }
            cut(&mut response.kvs, limit, &mut response.more);
            if request.keys_only {
                response.kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
            }
        }
        Ok(response)
    })
}

fn cut<T>(list: &mut Vec<T>, limit: usize, more: &mut bool) {
    if limit > 0 && list.len() > limit {
        list.truncate(limit);
        *more = true;
    }
}

/// Whether a state is within the request's four bounds of revisions.
fn within_bounds(meta: &KeyMeta, request: &RangeRequest) -> bool {
    let within = |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    within(meta.modified.main, request.min_mod_revision, request.max_mod_revision)
        && within(meta.create, request.min_create_revision, request.max_create_revision)
}

/// A state with its value, or without.
async fn shown(reader: &impl Reader, key: Bytes, meta: &KeyMeta, keys_only: bool) -> StoreResult<KeyValue> {
    if !keys_only {
        return key_value(reader, meta).await;
    }
    Ok(KeyValue {
        key,
        create_revision: meta.create,
        mod_revision: meta.modified.main,
        version: meta.version,
        value: Bytes::new(),
        lease: meta.lease,
    })
}
