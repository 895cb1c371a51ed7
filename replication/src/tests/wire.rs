//! Encodings: round trips, fixed bytes, hostile bytes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use openraft::raft::AppendEntriesRequest;

use crate::entry_index::Recovered;
use crate::network::{encode_append, read_append};
use crate::types::{Entry, EntryPayload, Member, Membership, Payload, StoredMembership, TypeConfig, Vote, log_id};
use crate::{ErrorKind, TokioRuntime, record};

fn members() -> Membership {
    let member = |name: &str| Member {
        name: name.into(),
        peer_address: format!("{name}:1"),
        client_address: format!("{name}:2"),
        incarnation: [7; 16],
        // One of them has a site, and is written in another way.
        site: if name == "b" { "north".into() } else { String::new() },
        // And another a priority.
        priority: if name == "c" { 200 } else { 0 },
        witness: name == "a",
        version: 0,
    };
    let nodes: BTreeMap<u64, Member> = [(1, member("a")), (2, member("b")), (70, member("c"))].into();
    Membership::new(vec![BTreeSet::from([1, 2]), BTreeSet::from([1, 70])], nodes).expect("every voter has a node")
}

fn all() -> Vec<(mainstay_wal::RecordKind, Vec<Bytes>, Recovered)> {
    let stored = StoredMembership::new(Some(log_id(2, 3)), members());
    let entry = |payload| Entry { log_id: log_id(5, 6), payload };
    let normal = entry(EntryPayload::Normal(Payload::new(Bytes::from_static(b"command"))));
    let change = entry(EntryPayload::Membership(members()));
    let blank = entry(EntryPayload::Blank);
    vec![
        (record::ENTRY, record::encode_entry(&normal), Recovered::Entry(normal)),
        (record::ENTRY, record::encode_entry(&change), Recovered::Entry(change)),
        (record::ENTRY, record::encode_entry(&blank), Recovered::Entry(blank)),
        (record::VOTE, record::encode_vote(&Vote::new(3, 2)), Recovered::Vote(Vote::new(3, 2))),
        (record::VOTE, record::encode_vote(&Vote::new_committed(3, 2)), Recovered::Vote(Vote::new_committed(3, 2))),
        (record::TRUNCATE, record::encode_truncate(None), Recovered::Truncate(None)),
        (record::TRUNCATE, record::encode_truncate(Some(&log_id(1, 2))), Recovered::Truncate(Some(log_id(1, 2)))),
        (record::PURGE, record::encode_anchor(&log_id(4, 9), &stored), Recovered::Purge(log_id(4, 9), stored.clone())),
        (record::INSTALL, record::encode_anchor(&log_id(4, 9), &stored), Recovered::Install(log_id(4, 9), stored)),
    ]
}

#[test]
fn records_survive_and_damage_is_refused() {
    for (kind, parts, expect) in all() {
        let bytes = Bytes::from(parts.concat());
        assert_eq!(record::decode(kind, &bytes).expect("ours"), expect);
        let mut newer = bytes.to_vec();
        newer[0] = 2;
        assert_eq!(record::decode(kind, &newer.into()).expect_err("newer").kind(), ErrorKind::Foreign);
        // A command is as long as its record: everything else has one length.
        let is_command = matches!(&expect, Recovered::Entry(e) if matches!(e.payload, EntryPayload::Normal(_)));
        if !is_command {
            let longer = Bytes::from([bytes.as_ref(), b"x"].concat());
            assert_eq!(record::decode(kind, &longer).expect_err("longer").kind(), ErrorKind::Corrupt);
            for cut in 1..bytes.len() {
                assert!(record::decode(kind, &bytes.slice(..cut)).is_err(), "kind={kind:?} cut={cut}");
            }
        }
    }
    assert_eq!(
        record::decode(mainstay_wal::RecordKind(99), &Bytes::from_static(&[1])).expect_err("unknown").kind(),
        ErrorKind::Foreign
    );
}

/// docs/format.md, "Raft records", says these bytes.
#[test]
fn records_have_the_documented_bytes() {
    let entry = Entry {
        log_id: log_id(0x0102, 0x0304),
        payload: EntryPayload::Normal(Payload::new(Bytes::from_static(b"xyz"))),
    };
    let mut expect = vec![1, 1];
    expect.extend_from_slice(&0x0102_u64.to_le_bytes());
    expect.extend_from_slice(&0x0304_u64.to_le_bytes());
    expect.extend_from_slice(b"xyz");
    assert_eq!(record::encode_entry(&entry).concat(), expect);
    assert_eq!(record::encode_entry(&entry).len(), 2, "the command is a part of its own: it is not copied");
    assert_eq!(
        [record::ENTRY.0, record::VOTE.0, record::TRUNCATE.0, record::PURGE.0, record::INSTALL.0],
        [32, 33, 34, 35, 36]
    );
    let vote = record::encode_vote(&Vote::new_committed(7, 3)).concat();
    let expect = [&[1][..], &7_u64.to_le_bytes(), &3_u64.to_le_bytes(), &[1]].concat();
    assert_eq!(vote, expect);
}

/// docs/format.md, "Raft records", says these bytes. Without a site and a priority they are those of the first release.
#[test]
fn members_have_the_documented_bytes() {
    use crate::wire::{PRIORITY_FLAG, Reader, SITE_FLAG, VERSION, VERSION_FLAG, Writer};

    let row = documented("| part | bytes |").into_iter().find(|row| row[0] == "member").expect("it is documented");
    assert!(
        row[1].contains(&format!("bit 15 ({SITE_FLAG:#x}) set in the length of the name, the site follows")),
        "{row:?}"
    );
    assert!(row[1].contains(&format!("bit 14 ({PRIORITY_FLAG:#x}) set, the priority is next (1)")), "{row:?}");
    let read = |bytes: Vec<u8>| {
        let mut reader = Reader::open(&Bytes::from([vec![VERSION], bytes].concat()))?;
        let member = reader.member()?;
        reader.end()?;
        Ok::<_, crate::Error>(member)
    };
    assert!(
        row[1].contains(&format!("bit 12 ({VERSION_FLAG:#x}) set, the version of the cluster is next (2)")),
        "{row:?}"
    );
    let check = |site: &str, priority: u8, version: u16, flags: u8, tail: &[u8]| {
        let witness = flags & 0x20 != 0;
        let mut expect = vec![1, flags, b'n', 3, 0];
        expect.extend_from_slice(b"p:1");
        expect.extend_from_slice(&[3, 0]);
        expect.extend_from_slice(b"c:2");
        expect.extend_from_slice(&[7; 16]);
        expect.extend_from_slice(tail);
        let member = Member {
            name: "n".into(),
            peer_address: "p:1".into(),
            client_address: "c:2".into(),
            incarnation: [7; 16],
            site: site.into(),
            priority,
            witness,
            version,
        };
        let mut writer = Writer::new();
        writer.member(&member);
        assert_eq!(writer.finish().get(1..), Some(expect.as_slice()), "site={site} priority={priority}");
        assert_eq!(read(expect).expect("ours"), member);
    };
    check("", 0, 0, 0, &[]);
    check("x", 0, 0, 0x80, &[1, 0, b'x']);
    check("", 200, 0, 0x40, &[200]);
    check("x", 255, 0, 0xc0, &[1, 0, b'x', 255]);
    check("", 0, 0, 0x20, &[]);
    check("x", 255, 0, 0xe0, &[1, 0, b'x', 255]);
    check("", 0, 2, 0x10, &[2, 0]);
    check("x", 255, 2, 0xf0, &[1, 0, b'x', 255, 2, 0]);
    // The first version has no bit, and one of a later build is not guessed at.
    let of = |version: u8| [&[1, 0x10, b'n', 0, 0, 0, 0][..], &[7; 16], &[version, 0]].concat();
    assert_eq!(read(of(1)).expect_err("never written").kind(), ErrorKind::Corrupt);
    let newest = crate::CLUSTER_VERSION_MAX;
    let next = u8::try_from(newest + 1).expect("small");
    let newer = read(of(next)).expect_err("of a newer build");
    assert_eq!(newer.kind(), ErrorKind::Foreign);
    assert!(newer.to_string().contains(&format!("version={next} newest={newest}")), "{newer}");
    // The bit without a priority.
    let zero = [&[1, 0x40, b'n', 0, 0, 0, 0][..], &[7; 16], &[0]].concat();
    assert_eq!(read(zero).expect_err("never written").kind(), ErrorKind::Corrupt);
}

#[test]
fn hostile_bytes_never_panic() {
    // Every record and message with every byte changed, cut anywhere, and noise of all lengths.
    let mut seeds: Vec<Vec<u8>> = all().into_iter().map(|(_, parts, _)| parts.concat()).collect();
    seeds.extend(crate::fuzzing::seeds().into_iter().map(|(_, seed)| seed.to_vec()));
    for seed in &seeds {
        for at in 0..seed.len() {
            crate::fuzzing::decode_all(&Bytes::copy_from_slice(&seed[..at]));
            for value in [0, 1, 2, 0x7f, 0x80, 0xff] {
                let mut bytes = seed.clone();
                bytes[at] = value;
                crate::fuzzing::decode_all(&bytes.into());
            }
        }
    }
    let mut state = 1_u64;
    for length in 0..400 {
        let noise: Vec<u8> = (0..length)
            .map(|i| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if i == 0 { 1 } else { (state >> 33) as u8 & if length % 2 == 0 { 3 } else { 255 } }
            })
            .collect();
        crate::fuzzing::decode_all(&noise.into());
    }
}

#[test]
fn entries_of_an_append_must_follow_each_other() {
    let blank = |index| Entry { log_id: log_id(3, index), payload: EntryPayload::Blank };
    let request = |entries| {
        let request = AppendEntriesRequest::<TypeConfig<TokioRuntime>> {
            vote: Vote::new_committed(3, 1),
            prev_log_id: Some(log_id(2, 5)),
            leader_commit: Some(log_id(2, 4)),
            entries,
        };
        read_append::<TokioRuntime>(&encode_append(&request, request.leader_commit, None)).map(|r| r.0.entries)
    };
    assert_eq!(request(vec![blank(6), blank(7)]).expect("dense"), [blank(6), blank(7)]);
    assert_eq!(request(vec![]).expect("a heartbeat"), []);
    assert_eq!(request(vec![blank(6), blank(8)]).expect_err("a hole").kind(), ErrorKind::Corrupt);
    assert_eq!(request(vec![blank(7)]).expect_err("a hole").kind(), ErrorKind::Corrupt);
}

#[test]
fn an_append_is_encoded_into_one_buffer() {
    let payload = EntryPayload::Normal(Payload::new(Bytes::from(vec![7; 100_000])));
    let request = AppendEntriesRequest::<TypeConfig<TokioRuntime>> {
        vote: Vote::new_committed(3, 1),
        prev_log_id: Some(log_id(2, 5)),
        leader_commit: Some(log_id(2, 4)),
        entries: vec![Entry { log_id: log_id(3, 6), payload }],
    };
    let body = encode_append(&request, request.leader_commit, Some(log_id(2, 3)));
    let bytes = body.len();
    let capacity = body.try_into_mut().expect("nobody else has it").capacity();
    assert_eq!(capacity, bytes, "as much as it takes, and no buffer before it");
}

/// The rows of the table that begins with `head` in docs/format.md.
fn documented(head: &str) -> Vec<Vec<String>> {
    let page = include_str!("../../../docs/format.md");
    let table = page.split_once(head).expect("the table is there").1;
    let rows = table.lines().skip(2).take_while(|l| l.starts_with('|'));
    rows.map(|l| l.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect()).collect()
}

#[test]
fn the_page_of_formats_names_the_kinds_of_the_code() {
    let kinds: Vec<(u8, String)> = documented("| kind | record | fields after the version |")
        .into_iter()
        .map(|row| (row[0].parse().expect("a number"), row[1].clone()))
        .collect();
    let expect = [
        (record::ENTRY, "entry"),
        (record::VOTE, "vote"),
        (record::TRUNCATE, "truncate"),
        (record::PURGE, "purge"),
        (record::INSTALL, "install"),
        (record::REPAIR, "repair"),
        (record::SEAL, "seal"),
    ];
    assert_eq!(kinds, expect.map(|(kind, name)| (kind.0, name.to_owned())));
    assert!(kinds.iter().all(|(kind, _)| *kind >= mainstay_wal::RecordKind::OWNER_FIRST));

    let fields = documented(
        "| checksum (8) | length (4) | kind (1) | method (1) | 0 (2) | number (8) | body ... |\n\n| offset | bytes | field | meaning, valid values |",
    );
    let end: usize = fields.iter().map(|f| f[1].parse::<usize>().expect("a number")).sum();
    assert_eq!(end, crate::tcp::HEADER_BYTES);
    assert_eq!(fields.last().map(|f| f[0].clone()), Some(end.to_string()));
    let length = &fields[1][3];
    assert!(length.contains(&crate::FRAME_BYTES_MAX.to_string()), "{length}");
}

#[test]
fn errors_cross_the_wire_as_they_are_and_numbers_of_tomorrow_are_internal() {
    use crate::wire::{Reader, Writer};
    use crate::{Error, NodeId};

    // The number on the wire, as docs/format.md lists them.
    let kinds = [
        (0, ErrorKind::Invalid),
        (1, ErrorKind::NotFound),
        (3, ErrorKind::Unavailable),
        (4, ErrorKind::Indeterminate),
        (5, ErrorKind::OutOfSpace),
        (6, ErrorKind::Corrupt),
        (7, ErrorKind::Foreign),
        (8, ErrorKind::Locked),
        (9, ErrorKind::Unsupported),
        (10, ErrorKind::Closed),
        (11, ErrorKind::Io),
        (12, ErrorKind::Conflict),
        (255, ErrorKind::Internal),
    ];
    let mut errors: Vec<_> = kinds.map(|(number, kind)| (number, Error::new(kind, "why"))).into();
    errors.push((2, Error::not_leader(None, "why")));
    errors.push((2, Error::not_leader(Some((NodeId(7), "there:1".into())), "why")));
    for (number, error) in errors {
        let mut writer = Writer::with_capacity(64);
        writer.error(&error);
        let bytes = writer.finish();
        assert_eq!(bytes.get(1), Some(&number), "{error:?}");
        let mut reader = Reader::open(&bytes).expect("this version");
        let read = reader.error().expect("whole");
        reader.end().expect("nothing behind");
        assert_eq!((read.kind(), read.leader(), read.to_string()), (error.kind(), error.leader(), error.to_string()));
    }
    let newer = Bytes::from_static(&[1, 13, 0, 0, 0, 0]);
    let read = Reader::open(&newer).expect("this version").error().expect("whole");
    assert_eq!(read.kind(), ErrorKind::Internal);
}
