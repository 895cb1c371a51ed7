//! Round trips, hostile bytes, and the constants that docs/format.md repeats.

use std::ops::Bound;

use proptest::prelude::*;

use super::*;
use crate::{CompactionStyle, LogIndex, TableCompression};

fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 1..max).prop_map(Bytes::from)
}

fn op() -> impl Strategy<Value = WriteOp> {
    prop_oneof![
        (any::<u32>(), bytes(40), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(keyspace, key, value)| {
            WriteOp::Put { keyspace: KeyspaceId(keyspace), key, value: value.into() }
        }),
        (any::<u32>(), bytes(40)).prop_map(|(keyspace, key)| WriteOp::Delete { keyspace: KeyspaceId(keyspace), key }),
        (any::<u32>(), range())
            .prop_map(|(keyspace, range)| WriteOp::DeleteRange { keyspace: KeyspaceId(keyspace), range }),
        (any::<u32>(), bytes(40), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(keyspace, key, operand)| {
            WriteOp::Merge { keyspace: KeyspaceId(keyspace), key, operand: operand.into() }
        }),
    ]
}

fn range() -> impl Strategy<Value = KeyRange> {
    (bytes(20), prop::option::of(bytes(20))).prop_map(|(start, more)| {
        let end = more.map(|more| [&start[..], &more[..]].concat().into());
        KeyRange::from_parts(start, end)
    })
}

fn conditional() -> impl Strategy<Value = ConditionalBatch> {
    (prop::collection::vec(condition(), 0..4), any::<u64>(), prop::collection::vec(op(), 0..4)).prop_map(
        |(conditions, branch, ops)| ConditionalBatch {
            conditions,
            batch: WriteBatch { branch: BranchId(branch), ops },
        },
    )
}

fn condition() -> impl Strategy<Value = Condition> {
    let place = || (any::<u32>().prop_map(KeyspaceId), bytes(40));
    let bound = || {
        prop_oneof![
            Just(Bound::Unbounded),
            prop::collection::vec(any::<u8>(), 0..9).prop_map(|key| Bound::Included(key.into())),
            bytes(9).prop_map(Bound::Excluded),
        ]
    };
    prop_oneof![
        place().prop_map(|(keyspace, key)| Condition::Absent { keyspace, key }),
        place().prop_map(|(keyspace, key)| Condition::Present { keyspace, key }),
        (place(), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|((keyspace, key), value)| Condition::Value {
            keyspace,
            key,
            value: value.into()
        }),
        (place(), any::<u64>()).prop_map(|((keyspace, key), version)| Condition::Version {
            keyspace,
            key,
            version: LogIndex(version)
        }),
        (any::<u32>(), bound(), bound(), any::<(u64, u64)>()).prop_map(|(keyspace, lower, upper, (since, count))| {
            Condition::Range { keyspace: KeyspaceId(keyspace), lower, upper, since: LogIndex(since), count }
        }),
    ]
}

fn table() -> impl Strategy<Value = InstallTable> {
    (any::<(u64, u32, u64, u32)>(), bytes(20), bytes(20), any::<(u64, u64, u64, u128)>(), bytes(90)).prop_map(
        |((job, ordinal, branch, keyspace), a, b, (entries, tombstones, bytes, digest), root)| InstallTable {
            id: TableId { job: JobId(job), ordinal },
            branch: BranchId(branch),
            keyspace: KeyspaceId(keyspace),
            first: a.clone().min(b.clone()),
            last: a.max(b),
            entries,
            tombstones,
            bytes,
            digest,
            root,
            ranges: TableRanges::default(),
            ends: TableEnds::default(),
        },
    )
}

/// Some with range tombstones, of which the last may reach to the end.
fn ranged_table() -> impl Strategy<Value = InstallTable> {
    (table(), 0u64..3, prop::collection::btree_set("[b-y]{2}", 0..7), any::<bool>()).prop_map(
        |(mut table, tombstones, bounds, to_the_end)| {
            if tombstones > 0 {
                let bounds: Vec<_> = bounds.into_iter().map(Bytes::from).collect();
                let pairs = bounds.iter().step_by(2).zip(bounds.iter().skip(1).step_by(2));
                let mut spans: Vec<_> =
                    pairs.map(|(start, end)| KeyRange::from_parts(start.clone(), Some(end.clone()))).collect();
                (table.first, table.last) = ("a".into(), "z".into());
                if to_the_end {
                    spans.push(KeyRange::from_parts("z".into(), None));
                    table.last = crate::range_tombstone::last_key();
                }
                table.ranges = TableRanges { tombstones, spans };
            }
            table
        },
    )
}

/// Some whose pairs end.
fn ending_table() -> impl Strategy<Value = InstallTable> {
    let ends = prop::option::of((1..1u64 << 50, prop::option::of(0..1u64 << 50)));
    (ranged_table(), ends).prop_map(|(mut table, ends)| {
        if let Some((half_ms, more)) = ends {
            table.ends = TableEnds { half_ms, last_ms: more.map_or(0, |more| half_ms + more) };
        }
        table
    })
}

fn body() -> impl Strategy<Value = CommandBody> {
    let name = || "[a-z]{1,12}";
    prop_oneof![
        (any::<u64>(), prop::collection::vec(op(), 0..9))
            .prop_map(|(branch, ops)| CommandBody::Batch(WriteBatch { branch: BranchId(branch), ops })),
        prop::collection::vec((any::<u64>(), prop::collection::vec(op(), 0..4)), 0..5).prop_map(|batches| {
            let batch = |(branch, ops)| WriteBatch { branch: BranchId(branch), ops };
            CommandBody::Batches(batches.into_iter().map(batch).collect())
        }),
        name().prop_map(|name| CommandBody::CreateKeyspace { name }),
        name().prop_map(|name| CommandBody::DropKeyspace { name }),
        Just(CommandBody::Rotate),
        (any::<u64>(), prop::collection::vec(ending_table(), 0..5))
            .prop_map(|(job, tables)| CommandBody::Install { job: JobId(job), tables }),
        (name(), any::<u64>())
            .prop_map(|(name, branch)| CommandBody::CreateCheckpoint { name, branch: BranchId(branch) }),
        name().prop_map(|name| CommandBody::DropCheckpoint { name }),
        (name(), name()).prop_map(|(name, checkpoint)| CommandBody::CreateClone { name, checkpoint }),
        name().prop_map(|name| CommandBody::DropClone { name }),
        (any::<u64>(), bytes(60))
            .prop_map(|(branch, command)| CommandBody::Custom { branch: BranchId(branch), command }),
        conditional().prop_map(CommandBody::BatchIf),
        prop::collection::vec(conditional(), 0..5).prop_map(CommandBody::BatchesIf),
        (any::<(u64, u32)>(), bytes(20), prop::option::of(bytes(20))).prop_map(|((branch, keyspace), first, end)| {
            CommandBody::Compact { branch: BranchId(branch), keyspace: KeyspaceId(keyspace), first, end }
        }),
        (name(), name(), any::<u32>()).prop_map(|(name, operator, version)| {
            CommandBody::SetOperator { name, operator: OperatorId::new(operator, version) }
        }),
        (name(), 0..4_u8, 1024..9000_u32, 1..9_u8).prop_map(|(name, kind, block_bytes, runs)| {
            let options = match (kind, runs) {
                (0, 1) => KeyspaceOptions::new(),
                (1, 1) => KeyspaceOptions::new().compression(TableCompression::Lz4),
                (_, 1) => KeyspaceOptions::new().block_bytes(block_bytes),
                (_, runs) => KeyspaceOptions::new().compaction(CompactionStyle::Tiered { runs }),
            };
            CommandBody::SetOptions { name, options }
        }),
    ]
}

/// Any body, and those that may be asked for once also with a token.
fn any_body() -> impl Strategy<Value = CommandBody> {
    (body(), any::<([u8; 16], u64, bool)>()).prop_map(|(body, (client, sequence, once))| {
        if once && matches!(body, CommandBody::Batch(_) | CommandBody::BatchIf(_) | CommandBody::Custom { .. }) {
            CommandBody::Once { token: ClientToken { client, sequence }, body: Box::new(body) }
        } else {
            body
        }
    })
}

proptest! {
    #[test]
    fn every_command_comes_back(time_ms in any::<u64>(), body in any_body()) {
        let command = Command { time_ms, body };
        let bytes = command.encode().expect("within the limits");
        prop_assert_eq!(Command::decode(&bytes).expect("encoded above"), command);
    }

    #[test]
    fn bytes_of_any_content_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..16_u8) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = COMMAND_VERSION;
        }
        if let Some(second) = bytes.get_mut(1) {
            *second = kind;
        }
        if let Err(error) = Command::decode(&bytes.into()) {
            prop_assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Foreign), "{error}");
        }
    }

    /// A flipped byte or a cut gives another command or an error, never a panic.
    #[test]
    fn damage_never_panics(body in any_body(), at in any::<prop::sample::Index>(), flip in 1..=255_u8, cut in any::<bool>()) {
        let mut bytes = Command { time_ms: 1, body }.encode().expect("within the limits").to_vec();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else if let Some(byte) = bytes.get_mut(at) {
            *byte ^= flip;
        }
        let _ = Command::decode(&bytes.into());
    }
}

fn put(key: usize, value: usize) -> Command {
    let op = WriteOp::Put { keyspace: KeyspaceId(0), key: vec![1; key].into(), value: vec![2; value].into() };
    Command { time_ms: 0, body: CommandBody::Batch(WriteBatch { branch: crate::MAIN, ops: vec![op] }) }
}

#[test]
fn limits_are_refused_at_encode_by_their_kind() {
    put(KEY_BYTES_MAX, VALUE_BYTES_MAX).encode().expect("at the limits");
    for (key, value) in [(0, 1), (KEY_BYTES_MAX + 1, 1), (1, VALUE_BYTES_MAX + 1)] {
        assert_eq!(put(key, value).encode().expect_err("over a limit").kind(), ErrorKind::Invalid);
    }
    for name in [String::new(), "n".repeat(256)] {
        let command = Command { time_ms: 0, body: CommandBody::CreateKeyspace { name } };
        assert_eq!(command.encode().expect_err("a bad name").kind(), ErrorKind::Invalid);
    }
}

/// A batch of one removed range, as bytes that nobody checked.
fn removed_range(start: &[u8], end: &[u8]) -> Bytes {
    let mut bytes = vec![COMMAND_VERSION, KIND_BATCH, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, OP_DELETE_RANGE, 0];
    put_bytes(&mut bytes, start);
    put_bytes(&mut bytes, end);
    bytes.into()
}

#[test]
fn a_range_holds_a_key_or_is_refused() {
    let range = |start: &'static [u8], end: &'static [u8]| {
        let (keyspace, range) = (KeyspaceId(0), KeyRange::from_parts(start.into(), Some(end.into())));
        let batch = WriteBatch { branch: crate::MAIN, ops: vec![WriteOp::DeleteRange { keyspace, range }] };
        Command { time_ms: 0, body: CommandBody::Batch(batch) }
    };
    assert_eq!(range(b"a", b"c").encode().expect("it holds a key"), removed_range(b"a", b"c"));
    Command::decode(&removed_range(b"a", b"")).expect("without an end");
    for (start, end) in [(&b"c"[..], &b"a"[..]), (b"a", b"a")] {
        assert_eq!(range(start, end).encode().expect_err("no key").kind(), ErrorKind::Invalid);
        assert_eq!(Command::decode(&removed_range(start, end)).expect_err("no key").kind(), ErrorKind::Corrupt);
    }
    let long = vec![1; BOUND_BYTES_MAX + 1];
    for (start, end) in [(&b""[..], &b"a"[..]), (&long, b""), (b"\x01", &long)] {
        assert_eq!(Command::decode(&removed_range(start, end)).expect_err("out of bounds").kind(), ErrorKind::Corrupt);
    }
}

/// What builds from before range tombstones, and before ends, wrote is what is written as long as there are none.
#[test]
fn an_install_names_range_tombstones_and_ends_by_kinds_of_their_own() {
    let mut table = InstallTable {
        id: TableId { job: JobId(1), ordinal: 0 },
        branch: crate::MAIN,
        keyspace: KeyspaceId(0),
        first: "a".into(),
        last: "m".into(),
        entries: 1,
        tombstones: 1,
        bytes: 4096,
        digest: 7,
        root: Bytes::new(),
        ranges: TableRanges::default(),
        ends: TableEnds::default(),
    };
    let install = |table: &InstallTable| {
        let body = CommandBody::Install { job: JobId(1), tables: vec![table.clone()] };
        Command { time_ms: 0, body }.encode().expect("valid")
    };
    assert_eq!(install(&table).get(1), Some(&KIND_INSTALL));
    table.ranges = TableRanges { tombstones: 1, spans: vec![KeyRange::from_parts("b".into(), None)] };
    table.last = crate::range_tombstone::last_key();
    let bytes = install(&table);
    assert_eq!(bytes.get(1), Some(&KIND_INSTALL_RANGED));
    assert!(Command::lets_the_log_be_cut(&bytes));
    assert!(bytes.len() < 200, "the last key of all is written short: {}", bytes.len());
    table.ends = TableEnds { half_ms: 5, last_ms: 9 };
    let bytes = install(&table);
    assert_eq!(bytes.get(1), Some(&KIND_INSTALL_ENDING));
    assert!(Command::lets_the_log_be_cut(&bytes));
    assert!(
        matches!(Command::decode(&bytes).expect("valid").body, CommandBody::Install { tables, .. } if tables == [table.clone()])
    );
    table.ends = TableEnds { half_ms: 10, last_ms: 9 };
    assert_eq!(Command::decode(&install(&table)).expect_err("out of order").kind(), ErrorKind::Corrupt);
    table.ends = TableEnds::default();
    // What is hidden outside of the table.
    table.last = "c".into();
    assert_eq!(Command::decode(&install(&table)).expect_err("outside").kind(), ErrorKind::Corrupt);
}

#[test]
fn an_unknown_version_or_kind_is_foreign() {
    for bytes in [&[2, 1, 0, 0, 0, 0, 0, 0, 0, 0][..], &[1, 200, 0, 0, 0, 0, 0, 0, 0, 0]] {
        let error = Command::decode(&Bytes::copy_from_slice(bytes)).expect_err("unknown");
        assert_eq!(error.kind(), ErrorKind::Foreign);
    }
}

#[test]
fn values_share_the_memory_of_the_entry() {
    let bytes = put(3, 4096).encode().expect("within the limits");
    let command = Command::decode(&bytes).expect("encoded above");
    let CommandBody::Batch(batch) = command.body else { panic!("a batch was encoded") };
    let value = batch.ops.first().and_then(WriteOp::value).expect("a put was encoded");
    assert!(bytes.as_ptr_range().contains(&value.as_ptr()));
}

#[test]
fn batches_encoded_apart_are_the_command_that_holds_them() {
    let op = |key: &'static str| WriteOp::Delete { keyspace: KeyspaceId(3), key: key.into() };
    let batch = |branch, key| WriteBatch { branch: BranchId(branch), ops: vec![op(key)] };
    let (a, b) = (batch(1, "a"), batch(2, "b"));
    let encoded = |batch: &WriteBatch| batch.encode().expect("keys within their bounds");
    let one = Command::encode_batches(7, &[encoded(&a)]);
    assert_eq!(one, Command { time_ms: 7, body: CommandBody::Batch(a.clone()) }.encode().expect("valid"));
    let two = Command::encode_batches(7, &[encoded(&a), encoded(&b)]);
    assert_eq!(two, Command { time_ms: 7, body: CommandBody::Batches(vec![a, b]) }.encode().expect("valid"));
    let condition = Condition::Present { keyspace: KeyspaceId(3), key: "c".into() };
    let c = ConditionalBatch { conditions: vec![condition], batch: batch(3, "c") };
    let if_encoded = c.encode().expect("keys within their bounds");
    let alone = Command::encode_batches(7, std::slice::from_ref(&if_encoded));
    let body = CommandBody::BatchIf(c.clone());
    assert_eq!(alone, Command { time_ms: 7, body }.encode().expect("valid"));
    // Those beside it have no conditions, which is said in one byte.
    let plain = |batch| ConditionalBatch { conditions: Vec::new(), batch };
    let three = Command::encode_batches(7, &[encoded(&batch(1, "a")), if_encoded, encoded(&batch(2, "b"))]);
    let body = CommandBody::BatchesIf(vec![plain(batch(1, "a")), c, plain(batch(2, "b"))]);
    assert_eq!(three, Command { time_ms: 7, body }.encode().expect("valid"));
    let refused = WriteBatch { branch: crate::MAIN, ops: vec![op("")] }.encode();
    assert_eq!(refused.map(|_| ()).map_err(|e| e.kind()), Err(ErrorKind::Invalid));
}

#[test]
fn refusals_come_back_and_damage_is_told() {
    let refusals = [
        (3, Error::new(ErrorKind::NotFound, "no such keyspace")),
        (300, Error::new(ErrorKind::Invalid, "a key is empty")),
        (301, Error::new(ErrorKind::Conflict, "the key is there")),
    ];
    let bytes = encode_refusals(&refusals);
    let decoded = decode_refusals(&bytes).expect("just encoded");
    let plain = |(place, error): &(usize, Error)| (*place, error.kind(), error.to_string());
    assert_eq!(decoded.iter().map(plain).collect::<Vec<_>>(), refusals.iter().map(plain).collect::<Vec<_>>());
    assert!(decode_refusals(&encode_refusals(&[])).expect("nothing is no damage").is_empty());
    for cut in 1..bytes.len() {
        // A prefix is a shorter list or damage, and never a panic.
        if let Ok(shorter) = decode_refusals(&bytes.slice(..cut)) {
            assert!(shorter.len() < refusals.len());
        }
    }
    assert!(decode_refusals(&Bytes::from_static(&[0, 9, 0])).is_err());
}
