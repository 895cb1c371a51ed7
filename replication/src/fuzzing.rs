//! Entry points of the fuzzer: decoders of what disks and peers give, and well-formed inputs to begin with.
//!
//! No part of the interface: it changes with the code behind it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use openraft::raft::AppendEntriesRequest;

use crate::groups::encode_grouped;
use crate::log_heal::write_base;
use crate::network::{encode_append, write_offer};
use crate::state_machine::Offer;
use crate::types::{
    Entry, EntryPayload, Member, Membership, Payload, SnapshotMeta, StoredMembership, TypeConfig, Vote, log_id,
};
use crate::wire::{Writer, encode_result};
use crate::{Error, Hello, MemberInfo, MemberRole, NodeId, PeerAddress, TokioRuntime, record};

/// The frame of a message as it goes over TCP, for who damages it on the way.
pub fn encode_frame(message: &crate::Envelope, answer: bool) -> Vec<u8> {
    crate::tcp::encode_frame(message, answer)
}

/// What arrives of a frame; `None` when the receiver ends the connection.
pub fn decode_frame(frame: &[u8]) -> Option<crate::Envelope> {
    crate::tcp::decode_frame(frame).ok()
}

/// Decodes arbitrary bytes as every record and message there is. Must not panic.
pub fn decode_all(bytes: &Bytes) {
    crate::tcp::decode_any(bytes);
    crate::service::decode_any(bytes);
    for kind in 32..40 {
        let _ = record::decode(mainstay_wal::RecordKind(kind), bytes);
    }
}

/// One well-formed input of each shape, by name.
pub fn seeds() -> Vec<(&'static str, Bytes)> {
    let stored = StoredMembership::new(Some(log_id(2, 3)), members());
    let entry = |index, payload| Entry { log_id: log_id(5, index), payload };
    let normal = entry(6, EntryPayload::Normal(Payload::new(Bytes::from_static(b"command"))));
    let change = entry(7, EntryPayload::Membership(members()));
    let append = AppendEntriesRequest::<TypeConfig<TokioRuntime>> {
        vote: Vote::new_committed(5, 1),
        prev_log_id: Some(log_id(4, 5)),
        leader_commit: Some(log_id(4, 4)),
        entries: vec![normal.clone(), change.clone(), entry(8, EntryPayload::Blank)],
    };
    let meta = SnapshotMeta { last_log_id: Some(log_id(4, 9)), last_membership: stored.clone() };
    let offer = Offer { from: 2, meta, manifest: Bytes::from_static(b"pages") };
    let infos: Vec<_> = members().nodes().map(|(id, member)| member.info(*id, MemberRole::Voter)).collect();
    let raised: Vec<_> = infos.iter().cloned().map(|info| MemberInfo { version: 2, ..info }).collect();
    let hello = Hello {
        cluster: [1; 16],
        node: NodeId(2),
        incarnation: [3; 16],
        name: "a".into(),
        peer_address: PeerAddress("a:1".into()),
        settings_fingerprint: 4,
    };
    let refusal = Error::not_leader(Some((NodeId(7), "there:1".into())), "not the leader");
    let mut add = Writer::new();
    add.u8(1).string("d").string("d:1").bool(true);
    vec![
        ("entry-membership", record::encode_entry(&change).concat().into()),
        ("vote", record::encode_vote(&Vote::new_committed(3, 2)).concat().into()),
        ("truncate", record::encode_truncate(Some(&log_id(1, 2))).concat().into()),
        ("anchor", record::encode_anchor(&log_id(4, 9), &stored).concat().into()),
        ("append", encode_append(&append, append.leader_commit, append.leader_commit)),
        ("base", encode_result(Ok((log_id(4, 9), stored)), |out, base| write_base(out, Some(&base)))),
        ("offer", encode_result(Ok(offer), |out, offer| write_offer(out, &offer))),
        (
            "members",
            encode_result(Ok(infos), |out, infos| {
                out.member_infos(&infos);
            }),
        ),
        (
            "members-raised",
            encode_result(Ok(raised), |out, infos| {
                out.member_infos(&infos);
            }),
        ),
        ("refusal", encode_result::<()>(Err(refusal), |_, ()| {})),
        ("hello", crate::tcp::encode_hello(&hello)),
        ("member-add", add.finish()),
        ("grouped", encode_grouped(2, crate::network::method::VOTE, b"vote")),
    ]
}

fn members() -> Membership {
    let member = |name: &str| Member {
        name: name.into(),
        peer_address: format!("{name}:1"),
        client_address: format!("{name}:2"),
        incarnation: [7; 16],
        site: "here".into(),
        priority: 9,
        witness: true,
        version: 0,
    };
    let nodes: BTreeMap<u64, Member> = [(1, member("a")), (2, member("b")), (70, member("c"))].into();
    Membership::new(vec![BTreeSet::from([1, 2]), BTreeSet::from([1, 70])], nodes).expect("every voter has a node")
}
