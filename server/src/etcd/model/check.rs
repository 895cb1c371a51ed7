//! Checks of requests that need no state: done by the service before it proposes, and again at apply.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::record::KEY_BYTES_MAX;
use crate::etcd::error::Refusal;
use crate::proto::etcdserverpb::{self as pb, request_op::Request as Op};

/// A key that the store can hold.
fn check_key(key: &[u8]) -> Result<(), Refusal> {
    match key.len() {
        0 => Err(Refusal::EmptyKey),
        1..=KEY_BYTES_MAX => Ok(()),
        _ => Err(Refusal::RequestTooLarge),
    }
}

/// Checks a range.
pub(crate) fn check_range(request: &pb::RangeRequest) -> Result<(), Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    if pb::range_request::SortOrder::try_from(request.sort_order).is_err()
        || pb::range_request::SortTarget::try_from(request.sort_target).is_err()
    {
        return Err(Refusal::InvalidSortOption);
    }
    Ok(())
}

/// Checks a put.
pub(crate) fn check_put(request: &pb::PutRequest) -> Result<(), Refusal> {
    check_key(&request.key)?;
    if request.ignore_value && !request.value.is_empty() {
        return Err(Refusal::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Refusal::LeaseProvided);
    }
    Ok(())
}

/// Checks a delete.
pub(crate) fn check_delete(request: &pb::DeleteRangeRequest) -> Result<(), Refusal> {
    if request.key.is_empty() { Err(Refusal::EmptyKey) } else { Ok(()) }
}

/// Checks a transaction and everything in it.
pub(crate) fn check_txn(request: &pb::TxnRequest, ops_max: usize) -> Result<(), Refusal> {
    check_operations(request, ops_max)?;
    check_overlaps(&request.success)?;
    check_overlaps(&request.failure)?;
    Ok(())
}

fn check_operations(request: &pb::TxnRequest, ops_max: usize) -> Result<(), Refusal> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    let Some(left) = ops_max.checked_sub(ops) else { return Err(Refusal::TooManyOps) };
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Refusal::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Op::RequestRange(range)) => check_range(range)?,
            Some(Op::RequestPut(put)) => check_put(put)?,
            Some(Op::RequestDeleteRange(delete)) => check_delete(delete)?,
            Some(Op::RequestTxn(txn)) => check_operations(txn, left)?,
            None => return Err(Refusal::KeyNotFound),
        }
    }
    Ok(())
}

/// Disjoint half-open ranges of keys; an end of `None` is beyond every key.
#[derive(Default)]
struct KeyRanges(BTreeMap<Bytes, Option<Bytes>>);

impl KeyRanges {
    fn contains(&self, key: &Bytes) -> bool {
        self.0.range(..=key.clone()).next_back().is_some_and(|(_, end)| end.as_ref().is_none_or(|end| key < end))
    }

    fn insert(&mut self, mut start: Bytes, mut end: Option<Bytes>) {
        if end.as_ref().is_some_and(|end| *end <= start) {
            return;
        }
        // The one that begins before and touches, then all that begin inside.
        if let Some((before, before_end)) = self.0.range(..=start.clone()).next_back()
            && before_end.as_ref().is_none_or(|before_end| *before_end >= start)
        {
            start = before.clone();
        }
        loop {
            let inside = self.0.range(start.clone()..).next();
            let Some((next, next_end)) = inside.map(|(next, next_end)| (next.clone(), next_end.clone())) else { break };
            if end.as_ref().is_some_and(|end| next > *end) {
                break;
            }
            self.0.remove(&next);
            end = match (end, next_end) {
                (Some(end), Some(next_end)) => Some(end.max(next_end)),
                _ => None,
            };
        }
        self.0.insert(start, end);
    }
}

/// The half-open range that a request means by key and range end; `None` beyond every key.
pub(crate) fn range_of(key: &Bytes, range_end: &Bytes) -> (Bytes, Option<Bytes>) {
    if range_end.is_empty() {
        let mut successor = key.to_vec();
        successor.push(0);
        (key.clone(), Some(successor.into()))
    } else if is_from_key(range_end) {
        (key.clone(), None)
    } else {
        (key.clone(), Some(range_end.clone()))
    }
}

/// Whether a range end means all keys from the first on.
pub(crate) fn is_from_key(range_end: &[u8]) -> bool {
    range_end == [0]
}

/// Refuses a list of operations that puts a key twice, or puts one that it also deletes. The two branches of an inner
/// transaction exclude each other, so both may put the same key.
fn check_overlaps(ops: &[pb::RequestOp]) -> Result<(BTreeSet<Bytes>, KeyRanges), Refusal> {
    let mut deletes = KeyRanges::default();
    for op in ops {
        // A delete of "all keys from here" counts as none in this check: etcd takes such a transaction and runs it in order.
        if let Some(Op::RequestDeleteRange(delete)) = &op.request
            && !is_from_key(&delete.range_end)
        {
            let (start, end) = range_of(&delete.key, &delete.range_end);
            deletes.insert(start, end);
        }
    }
    let mut puts = BTreeSet::new();
    for op in ops {
        let Some(Op::RequestTxn(txn)) = &op.request else { continue };
        let (success, success_deletes) = check_overlaps(&txn.success)?;
        let (failure, failure_deletes) = check_overlaps(&txn.failure)?;
        for key in success.iter().chain(&failure) {
            if puts.contains(key) || deletes.contains(key) {
                return Err(Refusal::DuplicateKey);
            }
        }
        puts.extend(success);
        puts.extend(failure);
        for (start, end) in success_deletes.0.into_iter().chain(failure_deletes.0) {
            deletes.insert(start, end);
        }
    }
    for op in ops {
        if let Some(Op::RequestPut(put)) = &op.request
            && (deletes.contains(&put.key) || !puts.insert(put.key.clone()))
        {
            return Err(Refusal::DuplicateKey);
        }
    }
    Ok((puts, deletes))
}

/// Whether a transaction changes nothing whatever its compares say: ranges alone.
pub(crate) fn is_read_only(request: &pb::TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).all(|op| matches!(&op.request, Some(Op::RequestRange(_))))
}

/// Whether a transaction may put something, in any of its branches.
pub(crate) fn may_put(request: &pb::TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).any(|op| match &op.request {
        Some(Op::RequestPut(_)) => true,
        Some(Op::RequestTxn(inner)) => may_put(inner),
        _ => false,
    })
}

/// Whether a read-only transaction may be answered from what this replica has.
pub(crate) fn is_serializable(request: &pb::TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|op| matches!(&op.request, Some(Op::RequestRange(range)) if range.serializable))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &'static str) -> pb::RequestOp {
        let put = pb::PutRequest { key: key.into(), ..Default::default() };
        pb::RequestOp { request: Some(Op::RequestPut(put)) }
    }

    fn delete(key: &'static str, end: &'static str) -> pb::RequestOp {
        let delete = pb::DeleteRangeRequest { key: key.into(), range_end: end.into(), prev_kv: false };
        pb::RequestOp { request: Some(Op::RequestDeleteRange(delete)) }
    }

    fn txn(success: Vec<pb::RequestOp>, failure: Vec<pb::RequestOp>) -> pb::TxnRequest {
        pb::TxnRequest { compare: Vec::new(), success, failure }
    }

    fn inner(success: Vec<pb::RequestOp>, failure: Vec<pb::RequestOp>) -> pb::RequestOp {
        pb::RequestOp { request: Some(Op::RequestTxn(txn(success, failure))) }
    }

    #[test]
    fn a_key_changes_at_most_once_in_a_transaction() {
        let check = |ops: Vec<pb::RequestOp>, expect: Result<(), Refusal>| {
            assert_eq!(check_txn(&txn(ops.clone(), Vec::new()), 128), expect, "{ops:?}");
        };
        check(vec![put("a"), put("b")], Ok(()));
        check(vec![put("a"), put("a")], Err(Refusal::DuplicateKey));
        check(vec![put("b"), delete("a", "c")], Err(Refusal::DuplicateKey));
        check(vec![put("c"), delete("a", "c")], Ok(()));
        check(vec![put("z"), delete("a", "\0")], Ok(()));
        check(vec![delete("a", "c"), delete("b", "d")], Ok(()));
        check(vec![delete("a", "c"), delete("e", "g"), delete("b", "f"), put("d")], Err(Refusal::DuplicateKey));
        check(vec![inner(vec![put("a")], vec![put("a")])], Ok(()));
        check(vec![inner(vec![put("a")], vec![]), put("a")], Err(Refusal::DuplicateKey));
        check(vec![inner(vec![delete("a", "")], vec![]), put("a")], Err(Refusal::DuplicateKey));
        check(vec![inner(vec![], vec![put("a")]), inner(vec![put("a")], vec![])], Err(Refusal::DuplicateKey));
    }

    #[test]
    fn operations_are_counted_over_all_levels() {
        let many = |count: usize| {
            vec![
                pb::RequestOp {
                    request: Some(Op::RequestRange(pb::RangeRequest { key: "a".into(), ..Default::default() }))
                };
                count
            ]
        };
        assert_eq!(check_txn(&txn(many(128), many(128)), 128), Ok(()));
        assert_eq!(check_txn(&txn(many(129), Vec::new()), 128), Err(Refusal::TooManyOps));
        let nested = |count| txn(vec![inner(many(count), Vec::new())], Vec::new());
        assert_eq!(check_txn(&nested(127), 128), Ok(()));
        assert_eq!(check_txn(&nested(128), 128), Err(Refusal::TooManyOps));
        assert_eq!(check_txn(&txn(vec![pb::RequestOp { request: None }], Vec::new()), 128), Err(Refusal::KeyNotFound));
    }
}
