//! The model against a reference that keeps the whole state of every revision.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::FutureExt;
use mainstay_engine::{BranchId, LogIndex, MAIN};
use proptest::prelude::*;
use prost::Message;

use super::command::{Request, begin_command, decode_answer, encode_command};
use super::record::{HISTORY_SPACING, Rev};
use super::store::{MemoryStore, Space};
use super::{LEASE_TTL_MIN, Model};
use crate::etcd::error::{Failure, Refusal};
use crate::proto::etcdserverpb::{self as pb, request_op, response_op};
use crate::proto::mvccpb::KeyValue;

type State = BTreeMap<Bytes, KeyValue>;

/// Every state that there was, and nothing clever.
#[derive(Clone)]
struct Reference {
    /// State after each revision, from revision 1.
    states: Vec<State>,
    /// Key and whether it was deleted, for each revision.
    events: Vec<Vec<(Bytes, bool)>>,
    compacted: i64,
    leases: BTreeMap<i64, i64>,
}

/// A request under way.
struct Draft {
    state: State,
    events: Vec<(Bytes, bool)>,
    revision: i64,
}

impl Draft {
    fn header(&self) -> Option<pb::ResponseHeader> {
        let revision = if self.events.is_empty() { self.revision - 1 } else { self.revision };
        Some(pb::ResponseHeader { revision, ..Default::default() })
    }
}

fn in_range(key: &Bytes, start: &Bytes, end: &Bytes) -> bool {
    match &end[..] {
        [] => key == start,
        [0] => key >= start,
        end => key >= start && &key[..] < end,
    }
}

impl Reference {
    fn new() -> Self {
        let empty = State::new();
        Self { states: vec![empty.clone(), empty], events: vec![Vec::new(); 2], compacted: -1, leases: BTreeMap::new() }
    }

    fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    fn draft(&self) -> Draft {
        let state = self.states.last().expect("never empty").clone();
        Draft { state, events: Vec::new(), revision: self.revision() + 1 }
    }

    fn commit(&mut self, draft: Draft) {
        if !draft.events.is_empty() {
            self.states.push(draft.state);
            self.events.push(draft.events);
        }
    }

    fn range(&self, draft: &Draft, request: &pb::RangeRequest) -> Result<pb::RangeResponse, Refusal> {
        let current = draft.header().expect("always").revision;
        let revision = if request.revision <= 0 { current } else { request.revision };
        if revision > current {
            return Err(Refusal::FutureRevision);
        }
        if revision < self.compacted {
            return Err(Refusal::Compacted);
        }
        let state = if revision == current { &draft.state } else { &self.states[revision as usize] };
        let mut kvs: Vec<KeyValue> =
            state.values().filter(|kv| in_range(&kv.key, &request.key, &request.range_end)).cloned().collect();
        let count = kvs.len() as i64;
        if request.count_only {
            kvs.clear();
        }
        let bound = |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
        let bounded = [
            request.min_mod_revision,
            request.max_mod_revision,
            request.min_create_revision,
            request.max_create_revision,
        ]
        .iter()
        .any(|bound| *bound != 0);
        if request.sort_order == 0 && !bounded && request.limit > 0 {
            // An order that is only implied by its target sorts what the limit left, and one more.
            kvs.truncate(request.limit as usize + 1);
        }
        kvs.retain(|kv| {
            bound(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
                && bound(kv.create_revision, request.min_create_revision, request.max_create_revision)
        });
        match request.sort_target {
            1 => kvs.sort_by_key(|kv| kv.version),
            2 => kvs.sort_by_key(|kv| kv.create_revision),
            3 => kvs.sort_by_key(|kv| kv.mod_revision),
            4 => kvs.sort_by_key(|kv| kv.value.clone()),
            _ => {}
        }
        if request.sort_order == 2 {
            kvs.reverse();
        }
        let more = request.limit > 0 && kvs.len() > request.limit as usize;
        if more {
            kvs.truncate(request.limit as usize);
        }
        if request.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
        Ok(pb::RangeResponse { header: draft.header(), kvs, more, count })
    }

    fn check_put(&self, draft: &Draft, put: &pb::PutRequest) -> Result<(), Refusal> {
        if put.key.is_empty() {
            return Err(Refusal::EmptyKey);
        }
        if put.ignore_value && !put.value.is_empty() {
            return Err(Refusal::ValueProvided);
        }
        if put.ignore_lease && put.lease != 0 {
            return Err(Refusal::LeaseProvided);
        }
        if (put.ignore_lease || put.ignore_value) && !draft.state.contains_key(&put.key) {
            return Err(Refusal::KeyNotFound);
        }
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(Refusal::LeaseNotFound);
        }
        Ok(())
    }

    fn put(draft: &mut Draft, put: &pb::PutRequest) -> pb::PutResponse {
        let before = draft.state.get(&put.key).cloned();
        let kept = before.clone().unwrap_or_default();
        let kv = KeyValue {
            key: put.key.clone(),
            create_revision: if before.is_some() { kept.create_revision } else { draft.revision },
            mod_revision: draft.revision,
            version: kept.version + 1,
            value: if put.ignore_value { kept.value.clone() } else { put.value.clone() },
            lease: if put.ignore_lease { kept.lease } else { put.lease },
        };
        draft.state.insert(put.key.clone(), kv);
        draft.events.push((put.key.clone(), false));
        pb::PutResponse { header: draft.header(), prev_kv: before.filter(|_| put.prev_kv) }
    }

    fn delete(draft: &mut Draft, delete: &pb::DeleteRangeRequest) -> pb::DeleteRangeResponse {
        let gone: Vec<KeyValue> =
            draft.state.values().filter(|kv| in_range(&kv.key, &delete.key, &delete.range_end)).cloned().collect();
        for kv in &gone {
            draft.state.remove(&kv.key);
            draft.events.push((kv.key.clone(), true));
        }
        pb::DeleteRangeResponse {
            header: draft.header(),
            deleted: gone.len() as i64,
            prev_kvs: if delete.prev_kv { gone } else { Vec::new() },
        }
    }

    fn holds(&self, state: &State, compare: &pb::Compare) -> bool {
        use pb::compare::TargetUnion;
        let matching: Vec<KeyValue> =
            state.values().filter(|kv| in_range(&kv.key, &compare.key, &compare.range_end)).cloned().collect();
        if matching.is_empty() && compare.target == 3 {
            return false;
        }
        let matching = if matching.is_empty() { vec![KeyValue::default()] } else { matching };
        matching.iter().all(|kv| {
            let ordering = match compare.target_union.as_ref().expect("always given here") {
                TargetUnion::Version(v) => kv.version.cmp(v),
                TargetUnion::CreateRevision(v) => kv.create_revision.cmp(v),
                TargetUnion::ModRevision(v) => kv.mod_revision.cmp(v),
                TargetUnion::Value(v) => kv.value.cmp(v),
                TargetUnion::Lease(v) => kv.lease.cmp(v),
            };
            match compare.result {
                0 => ordering.is_eq(),
                1 => ordering.is_gt(),
                2 => ordering.is_lt(),
                _ => ordering.is_ne(),
            }
        })
    }

    fn txn(&self, before: &State, draft: &mut Draft, txn: &pb::TxnRequest) -> Result<pb::TxnResponse, Refusal> {
        let succeeded = txn.compare.iter().all(|compare| self.holds(before, compare));
        let mut responses = Vec::new();
        for op in if succeeded { &txn.success } else { &txn.failure } {
            let response = match op.request.as_ref().expect("always given here") {
                request_op::Request::RequestRange(range) => {
                    // Judged against the state before the transaction.
                    if range.revision >= draft.revision {
                        return Err(Refusal::FutureRevision);
                    }
                    response_op::Response::ResponseRange(self.range(draft, range)?)
                }
                request_op::Request::RequestPut(put) => {
                    let start = Draft { state: before.clone(), events: Vec::new(), revision: draft.revision };
                    self.check_put(&start, put)?;
                    response_op::Response::ResponsePut(Self::put(draft, put))
                }
                request_op::Request::RequestDeleteRange(delete) => {
                    response_op::Response::ResponseDeleteRange(Self::delete(draft, delete))
                }
                request_op::Request::RequestTxn(txn) => {
                    let mut response = self.txn(before, draft, txn)?;
                    response.header = Some(pb::ResponseHeader::default());
                    response_op::Response::ResponseTxn(response)
                }
            };
            responses.push(pb::ResponseOp { response: Some(response) });
        }
        Ok(pb::TxnResponse { header: draft.header(), succeeded, responses })
    }

    /// The answer as bytes, without its kind.
    fn run(&mut self, request: &Request) -> Result<Vec<u8>, Refusal> {
        let mut draft = self.draft();
        let answer = match request {
            Request::Put(put) => {
                let checked = self.check_put(&draft, put);
                // A put alone is judged by its lease first.
                let no_lease = put.lease != 0 && !self.leases.contains_key(&put.lease);
                match checked {
                    Err(Refusal::KeyNotFound) if no_lease => return Err(Refusal::LeaseNotFound),
                    other => other?,
                }
                Self::put(&mut draft, put).encode_to_vec()
            }
            Request::DeleteRange(delete) => Self::delete(&mut draft, delete).encode_to_vec(),
            Request::Txn(txn) => {
                super::check::check_txn(txn, 128)?;
                let before = draft.state.clone();
                // Of several reasons the puts' come first: run once without judging ranges.
                let mut rehearsal = self.draft();
                match self.txn(&before, &mut rehearsal, &without_ranges(txn)) {
                    Ok(_) => {}
                    Err(refusal) => return Err(refusal),
                }
                self.txn(&before, &mut draft, txn)?.encode_to_vec()
            }
            Request::Compact(compact) => {
                if compact.revision <= self.compacted {
                    return Err(Refusal::Compacted);
                }
                if compact.revision > self.revision() {
                    return Err(Refusal::FutureRevision);
                }
                self.compacted = compact.revision;
                pb::CompactionResponse { header: draft.header() }.encode_to_vec()
            }
            Request::Collect => pb::CompactionResponse { header: draft.header() }.encode_to_vec(),
            Request::LeaseGrant(grant) => {
                if grant.ttl > super::LEASE_TTL_MAX {
                    return Err(Refusal::LeaseTtlTooLarge);
                }
                if self.leases.contains_key(&grant.id) {
                    return Err(Refusal::LeaseExist);
                }
                let ttl = grant.ttl.max(LEASE_TTL_MIN);
                self.leases.insert(grant.id, ttl);
                pb::LeaseGrantResponse { header: draft.header(), id: grant.id, ttl, error: String::new() }
                    .encode_to_vec()
            }
            Request::LeaseRevoke(revoke) => {
                self.leases.remove(&revoke.id).ok_or(Refusal::LeaseNotFound)?;
                let keys: Vec<Bytes> =
                    draft.state.values().filter(|kv| kv.lease == revoke.id).map(|kv| kv.key.clone()).collect();
                for key in keys {
                    draft.state.remove(&key);
                    draft.events.push((key, true));
                }
                pb::LeaseRevokeResponse { header: draft.header() }.encode_to_vec()
            }
        };
        self.commit(draft);
        Ok(answer)
    }
}

/// The transaction with every range turned into one of the present.
fn without_ranges(txn: &pb::TxnRequest) -> pb::TxnRequest {
    let strip = |ops: &[pb::RequestOp]| {
        ops.iter()
            .map(|op| match &op.request {
                Some(request_op::Request::RequestRange(range)) => {
                    let range = pb::RangeRequest { revision: 0, ..range.clone() };
                    pb::RequestOp { request: Some(request_op::Request::RequestRange(range)) }
                }
                Some(request_op::Request::RequestTxn(txn)) => {
                    pb::RequestOp { request: Some(request_op::Request::RequestTxn(without_ranges(txn))) }
                }
                _ => op.clone(),
            })
            .collect()
    };
    pb::TxnRequest { compare: txn.compare.clone(), success: strip(&txn.success), failure: strip(&txn.failure) }
}

const BRANCH: BranchId = MAIN;

/// A model over a store in memory.
struct Subject {
    model: Model,
    store: MemoryStore,
    index: u64,
}

impl Subject {
    fn new() -> Self {
        Self { model: Model::new(), store: MemoryStore::default(), index: 0 }
    }

    fn run(&mut self, requests: &[Request]) -> Vec<Result<Vec<u8>, Refusal>> {
        let mut command = begin_command(BRANCH, 0);
        requests.iter().for_each(|request| request.append_to(&mut command));
        self.index += 1;
        let index = LogIndex(self.index);
        let answer = self
            .model
            .apply_to(&mut self.store, index, command.freeze())
            .now_or_never()
            .expect("memory does not wait")
            .expect("memory does not fail");
        self.model.publish(index);
        let items = decode_answer(answer).expect("the model's own encoding");
        items.into_iter().map(|item| item.map(|message| message.to_vec())).collect()
    }

    fn view(&self) -> super::View<MemoryStore> {
        self.model
            .view(BRANCH, self.store.clone(), LogIndex(self.index))
            .now_or_never()
            .expect("memory does not wait")
            .expect("memory does not fail")
    }

    fn range(&self, request: &pb::RangeRequest) -> Result<pb::RangeResponse, Refusal> {
        match self.view().range(request).now_or_never().expect("memory does not wait") {
            Ok(response) => Ok(response),
            Err(Failure::Refused(refusal)) => Err(refusal),
            Err(Failure::Store(error)) => panic!("{error}"),
        }
    }
}

fn key() -> impl Strategy<Value = Bytes> {
    prop_oneof![Just("a"), Just("a\0"), Just("a\0\0"), Just("ab"), Just("b"), Just("c")].prop_map(Bytes::from)
}

fn range_end() -> impl Strategy<Value = Bytes> {
    prop_oneof![4 => Just(""), 1 => Just("\0"), 1 => Just("b"), 1 => Just("a\0\u{1}"), 1 => Just("d")]
        .prop_map(Bytes::from)
}

fn put() -> impl Strategy<Value = pb::PutRequest> {
    (key(), "[x-z]{0,2}", prop_oneof![3 => Just(0i64), 1 => 1i64..4], any::<bool>(), 0u8..10).prop_map(
        |(key, value, lease, prev_kv, ignore)| pb::PutRequest {
            key,
            value: if ignore == 0 { Bytes::new() } else { value.into() },
            lease: if ignore == 1 { 0 } else { lease },
            prev_kv,
            ignore_value: ignore == 0,
            ignore_lease: ignore == 1,
        },
    )
}

fn delete() -> impl Strategy<Value = pb::DeleteRangeRequest> {
    (key(), range_end(), any::<bool>()).prop_map(|(key, range_end, prev_kv)| pb::DeleteRangeRequest {
        key,
        range_end,
        prev_kv,
    })
}

pub(in crate::etcd) fn range() -> impl Strategy<Value = pb::RangeRequest> {
    let bound = || prop_oneof![4 => Just(0i64), 1 => 1i64..20];
    (
        (key(), range_end()),
        prop_oneof![2 => Just(0i64), 1 => 1i64..4],
        prop_oneof![1 => Just(0i64), 2 => 1i64..40],
        (0..3i32, 0..5i32),
        (any::<bool>(), proptest::bool::weighted(0.2)),
        [bound(), bound(), bound(), bound()],
    )
        .prop_map(
            |((key, range_end), limit, revision, (sort_order, sort_target), (keys_only, count_only), bounds)| {
                pb::RangeRequest {
                    key,
                    range_end,
                    limit,
                    revision,
                    sort_order,
                    sort_target,
                    serializable: false,
                    keys_only,
                    count_only,
                    min_mod_revision: bounds[0],
                    max_mod_revision: bounds[1],
                    min_create_revision: bounds[2],
                    max_create_revision: bounds[3],
                }
            },
        )
}

fn compare() -> impl Strategy<Value = pb::Compare> {
    use pb::compare::TargetUnion;
    (key(), range_end(), 0..4i32, 0..5i32, 0i64..6, "[x-z]{0,1}").prop_map(
        |(key, range_end, result, target, number, value)| {
            let target_union = Some(match target {
                0 => TargetUnion::Version(number),
                1 => TargetUnion::CreateRevision(number),
                2 => TargetUnion::ModRevision(number),
                3 => TargetUnion::Value(value.into()),
                _ => TargetUnion::Lease(number),
            });
            pb::Compare { result, target, key, range_end, target_union }
        },
    )
}

fn op() -> impl Strategy<Value = pb::RequestOp> {
    let flat = prop_oneof![
        3 => put().prop_map(request_op::Request::RequestPut),
        1 => delete().prop_map(request_op::Request::RequestDeleteRange),
        2 => range().prop_map(|mut range| { range.revision = range.revision.min(3); request_op::Request::RequestRange(range) }),
    ];
    flat.prop_map(|request| pb::RequestOp { request: Some(request) }).prop_recursive(2, 8, 3, |inner| {
        (
            proptest::collection::vec(compare(), 0..2),
            proptest::collection::vec(inner.clone(), 0..3),
            proptest::collection::vec(inner, 0..3),
        )
            .prop_map(|(compare, success, failure)| pb::RequestOp {
                request: Some(request_op::Request::RequestTxn(pb::TxnRequest { compare, success, failure })),
            })
    })
}

pub(in crate::etcd) fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        6 => put().prop_map(Request::Put),
        2 => delete().prop_map(Request::DeleteRange),
        4 => (proptest::collection::vec(compare(), 0..3), proptest::collection::vec(op(), 0..4), proptest::collection::vec(op(), 0..4))
            .prop_map(|(compare, success, failure)| Request::Txn(pb::TxnRequest { compare, success, failure })),
        1 => (-2i64..40).prop_map(|revision| Request::Compact(pb::CompactionRequest { revision, physical: false })),
        1 => Just(Request::Collect),
        1 => (1i64..4, 0i64..9).prop_map(|(id, ttl)| Request::LeaseGrant(pb::LeaseGrantRequest { ttl, id })),
        1 => (1i64..4).prop_map(|id| Request::LeaseRevoke(pb::LeaseRevokeRequest { id })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_and_every_revision_is_the_references(
        commands in proptest::collection::vec(proptest::collection::vec(request(), 1..4), 1..30),
        reads in proptest::collection::vec(range(), 40),
        restart_every in 2usize..9,
    ) {
        let mut reference = Reference::new();
        let mut subject = Subject::new();
        // One more handle, made anew now and then: what it answers must not depend on what is in memory.
        let mut replica = Subject::new();
        for (n, command) in commands.iter().enumerate() {
            if n % restart_every == 0 {
                replica.model = Model::new();
            }
            let expect: Vec<_> = command.iter().map(|request| reference.run(request)).collect();
            prop_assert_eq!(&subject.run(command), &expect, "command {:?}", command);
            prop_assert_eq!(&replica.run(command), &expect, "replica {:?}", command);
            prop_assert_eq!(subject.view().tip().revision, reference.revision());
            prop_assert_eq!(subject.view().tip().compaction.revision, reference.compacted);
        }
        for space in Space::ALL {
            prop_assert_eq!(subject.store.pairs(space), replica.store.pairs(space));
        }
        let draft = reference.draft();
        for read in &reads {
            prop_assert_eq!(subject.range(read), reference.range(&draft, read), "read {:?}", read);
        }
        for revision in reference.compacted.max(1)..=reference.revision() {
            let all = pb::RangeRequest { key: "\0".into(), range_end: "\0".into(), revision, ..Default::default() };
            let kvs: Vec<KeyValue> = subject.range(&all).expect("not compacted").kvs;
            let expect: Vec<KeyValue> = reference.states[revision as usize].values().cloned().collect();
            prop_assert_eq!(kvs, expect, "state at {}", revision);
        }
        // What watchers are told: everything from the compacted revision on.
        let from = reference.compacted.max(2);
        let changes = subject.view().changes(Rev::first(from), usize::MAX).now_or_never().expect("memory").expect("memory");
        let told: Vec<(i64, Bytes, bool)> = changes.into_iter().map(|(rev, record)| (rev.main, record.key, record.deleted)).collect();
        let expect: Vec<(i64, Bytes, bool)> = (from..=reference.revision())
            .flat_map(|revision| reference.events[revision as usize].iter().map(move |(key, deleted)| (revision, key.clone(), *deleted)))
            .collect();
        prop_assert_eq!(told, expect);
        // Once all is collected, nothing is kept that nobody can read.
        while subject.view().tip().compaction.collected < reference.compacted {
            subject.run(&[Request::Collect]);
        }
        let oldest = reference.compacted;
        let live = reference.states[oldest.max(1) as usize].len();
        let records = subject.store.pairs(Space::Revs);
        let before = records.iter().filter(|(key, _)| Rev::decode(key).expect("ours").main < oldest).count();
        prop_assert!(before <= live, "{} records before the compaction, {} keys then", before, live);
        let history = subject.store.pairs(Space::History);
        prop_assert!(history.iter().all(|(key, _)| super::record::split_history_key(key).expect("ours").1 > oldest));
        for id in reference.leases.keys() {
            let keys = subject.view().lease_keys(*id).now_or_never().expect("memory").expect("memory");
            let expect: Vec<Bytes> = draft.state.values().filter(|kv| kv.lease == *id).map(|kv| kv.key.clone()).collect();
            prop_assert_eq!(keys, expect);
        }
    }
}

/// A key that one transaction put and deleted: of the two changes the compaction of their own revision took away the put, so a
/// watcher that began there was told of a delete alone.
#[test]
fn a_compaction_keeps_every_change_of_its_own_revision() {
    let put = |key: &'static str| pb::PutRequest { key: key.into(), ..Default::default() };
    let delete = pb::DeleteRangeRequest { key: "a".into(), range_end: "\0".into(), ..Default::default() };
    let op = |request| pb::RequestOp { request: Some(request) };
    let both =
        vec![op(request_op::Request::RequestPut(put("ab"))), op(request_op::Request::RequestDeleteRange(delete))];
    let mut subject = Subject::new();
    subject.run(&[Request::Put(put("b"))]);
    subject.run(&[Request::Txn(pb::TxnRequest { success: both, ..Default::default() })]);
    let told = |subject: &Subject| {
        let changes =
            subject.view().changes(Rev::first(3), usize::MAX).now_or_never().expect("memory").expect("memory");
        changes.into_iter().map(|(rev, record)| (rev.main, record.key, record.deleted)).collect::<Vec<_>>()
    };
    let expect = [(3, Bytes::from("ab"), false), (3, Bytes::from("ab"), true), (3, Bytes::from("b"), true)];
    assert_eq!(told(&subject), expect);
    subject.run(&[Request::Compact(pb::CompactionRequest { revision: 3, physical: false })]);
    assert_eq!(told(&subject), expect);
    // They are garbage of the next one.
    subject.run(&[Request::Put(put("b"))]);
    subject.run(&[Request::Compact(pb::CompactionRequest { revision: 4, physical: false })]);
    while subject.view().tip().compaction.collected < 4 {
        subject.run(&[Request::Collect]);
    }
    assert_eq!(told(&subject), [(4, Bytes::from("b"), false)]);
}

/// Within one revision a key ends, begins anew (what a put may do is judged by the state before the transaction), and ends again. The second
/// end took the place of the first in the history, and the state before the transaction was lost to who reads at its revision.
#[test]
fn a_key_that_ends_twice_in_one_revision_keeps_what_it_was_before() {
    let put = |value: &'static str| pb::PutRequest { key: "c".into(), value: value.into(), ..Default::default() };
    let kept = request_op::Request::RequestPut(pb::PutRequest { ignore_value: true, ..put("") });
    let delete = || {
        let all = pb::DeleteRangeRequest { key: "a".into(), range_end: "\0".into(), ..Default::default() };
        request_op::Request::RequestDeleteRange(all)
    };
    let ops = |requests: Vec<request_op::Request>| {
        let success = requests.into_iter().map(|request| pb::RequestOp { request: Some(request) }).collect();
        Request::Txn(pb::TxnRequest { success, ..Default::default() })
    };
    let mut subject = Subject::new();
    subject.run(&[Request::Put(put("x"))]);
    subject.run(&[Request::Put(put("y"))]);
    assert!(subject.run(&[ops(vec![delete(), kept, delete()])])[0].is_ok());
    subject.run(&[Request::Put(put("z"))]);
    let at = |subject: &Subject, revision| {
        let read = pb::RangeRequest { key: "c".into(), revision, ..Default::default() };
        let kvs = subject.range(&read).expect("not compacted").kvs;
        kvs.into_iter().map(|kv| (kv.create_revision, kv.mod_revision, kv.version, kv.value)).collect::<Vec<_>>()
    };
    assert_eq!(at(&subject, 2), [(2, 2, 1, "x".into())]);
    assert_eq!(at(&subject, 3), [(2, 3, 2, "y".into())]);
    assert_eq!(at(&subject, 4), []);
    assert_eq!(at(&subject, 5), [(5, 5, 1, "z".into())]);
    subject.run(&[Request::Compact(pb::CompactionRequest { revision: 4, physical: false })]);
    while subject.view().tip().compaction.collected < 4 {
        subject.run(&[Request::Collect]);
    }
    assert_eq!((at(&subject, 4).len(), subject.store.pairs(Space::History).len()), (0, 0));
}

#[test]
fn a_lease_without_an_id_gets_one_of_its_own() {
    let mut subject = Subject::new();
    let grant = Request::LeaseGrant(pb::LeaseGrantRequest { ttl: 60, id: 0 });
    let answers = subject.run(&[grant.clone(), grant.clone()]);
    let more = subject.run(&[grant]);
    let mut ids: Vec<i64> = answers
        .into_iter()
        .chain(more)
        .map(|answer| pb::LeaseGrantResponse::decode(&answer.expect("granted")[..]).expect("ours").id)
        .collect();
    assert!(ids.iter().all(|id| *id > 0));
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3);
}

#[test]
fn bytes_that_are_no_command_are_refused_and_change_nothing() {
    let mut subject = Subject::new();
    let put = Request::Put(pb::PutRequest { key: "k".into(), value: "v".into(), ..Default::default() });
    let command = encode_command(BRANCH, &put);
    for cut in 0..command.len() {
        let outcome = subject.model.apply_to(&mut subject.store, LogIndex(1), command.slice(..cut)).now_or_never();
        if outcome.expect("memory does not wait").is_ok() {
            assert_eq!(cut, 9, "only a command without requests is whole");
        }
    }
    assert_eq!(subject.view().tip().revision, 1);
}

#[test]
fn watchers_get_changes_from_memory_only_while_they_are_whole() {
    let mut subject = Subject::new();
    let put = Request::Put(pb::PutRequest { key: "k".into(), value: "v".into(), ..Default::default() });
    subject.run(std::slice::from_ref(&put));
    let branch = subject.model.branch(BRANCH);
    let mut watching = branch.watch();
    assert_eq!(watching.published().revision, 2);
    assert!(branch.recent(3, 10).is_none(), "nothing is known before the first change that was watched");
    subject.run(&[put.clone(), put.clone()]);
    assert_eq!(watching.published().revision, 4);
    assert!(branch.recent(2, 10).is_none(), "revision 2 was not watched");
    let recent = branch.recent(3, 10).expect("3 and 4 were watched");
    assert_eq!(recent.iter().map(|changes| changes.revision).collect::<Vec<_>>(), vec![3, 4]);
    drop(watching);
    subject.run(std::slice::from_ref(&put));
    let _watching = branch.watch();
    assert!(branch.recent(5, 10).is_none(), "revision 5 was not watched");
    subject.run(&[put]);
    assert!(branch.recent(5, 10).is_none());
    assert_eq!(branch.recent(6, 10).expect("6 was watched").len(), 1);
}

/// Most states of a key have no entry in the history of their own: the nearest later one leads to them. That one may have been
/// made by the revision that deleted it.
#[test]
fn every_state_of_a_key_is_found_from_the_nearest_that_is_kept() {
    let put = |value: i64| pb::PutRequest { key: "k".into(), value: value.to_string().into(), ..Default::default() };
    let delete = || pb::DeleteRangeRequest { key: "a".into(), range_end: "\0".into(), ..Default::default() };
    let op = |request| pb::RequestOp { request: Some(request) };
    let states = 4 * HISTORY_SPACING + 1;
    let mut subject = Subject::new();
    // Two lives of the key: revisions 2 to `states + 1`, and again behind the revision that ends the first.
    let mut value_at = std::collections::BTreeMap::new();
    for life in 0..2 {
        for _ in 0..states {
            let revision = subject.view().tip().revision + 1;
            value_at.insert(revision, Some(revision));
            subject.run(&[Request::Put(put(revision))]);
        }
        let revision = subject.view().tip().revision + 1;
        value_at.insert(revision, None);
        match life {
            0 => subject.run(&[Request::DeleteRange(delete())]),
            _ => {
                let ops = vec![
                    op(request_op::Request::RequestPut(put(0))),
                    op(request_op::Request::RequestDeleteRange(delete())),
                ];
                subject.run(&[Request::Txn(pb::TxnRequest { success: ops, ..Default::default() })])
            }
        };
    }
    subject.run(&[Request::Put(put(1))]);
    let kept = subject.store.pairs(Space::History).len() as i64;
    assert_eq!(kept, 2 * (states / HISTORY_SPACING + 1));
    let check = |subject: &Subject, from: i64| {
        for (&revision, expect) in value_at.range(from..) {
            for range_end in ["", "z"] {
                let read =
                    pb::RangeRequest { key: "k".into(), range_end: range_end.into(), revision, ..Default::default() };
                let kvs = subject.range(&read).expect("not compacted").kvs;
                let found: Vec<_> = kvs.iter().map(|kv| (kv.mod_revision, kv.value.clone())).collect();
                let expect: Vec<_> = expect.iter().map(|r: &i64| (*r, Bytes::from(r.to_string()))).collect();
                assert_eq!(found, expect, "at {revision}");
            }
        }
    };
    check(&subject, 1);
    let mut compacted = 0;
    for revision in [HISTORY_SPACING, HISTORY_SPACING + 2, states + 2, states + 4, 2 * states + 2] {
        subject.run(&[Request::Compact(pb::CompactionRequest { revision, physical: false })]);
        check(&subject, revision);
        while subject.view().tip().compaction.collected < revision {
            subject.run(&[Request::Collect]);
            check(&subject, revision);
        }
        compacted = revision;
    }
    let history = subject.store.pairs(Space::History);
    assert!(history.iter().all(|(key, _)| super::record::split_history_key(key).expect("ours").1 > compacted));
}
