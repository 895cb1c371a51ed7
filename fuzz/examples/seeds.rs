//! Writes the seeds: one or a few well-formed inputs for each target, so that a run begins behind the first checks.
//!
//! `cargo run --example seeds` in this folder, after a change of a format.

use std::ops::Bound;
use std::path::Path;

use bytes::Bytes;
use mainstay_engine::{
    BranchId, Command, CommandBody, Condition, ConditionalBatch, InstallTable, JobId, KeyRange, KeyspaceId, LogIndex,
    MAIN, TableId, TableRanges, WriteBatch, WriteOp,
};

fn main() -> std::io::Result<()> {
    let mut seeds: Vec<(&str, String, Vec<u8>)> = Vec::new();
    for (at, seed) in mainstay_engine::hooks::fuzz::table_seeds().into_iter().enumerate() {
        seeds.push(("table", format!("table-{at}"), seed));
    }
    seeds.push(("manifest", "manifest".into(), mainstay_engine::hooks::fuzz::manifest_seed()));
    seeds.push(("superblock", "superblock".into(), mainstay_engine::hooks::fuzz::superblock_seed()));
    seeds.push(("wal_record", "batch".into(), mainstay_wal::hooks::fuzz::batch_seed()));
    for (name, body) in commands() {
        let command = Command { time_ms: 1_700_000_000_000, body };
        let bytes = command.encode().expect("a command within its limits").to_vec();
        // A node's log holds commands inside entries: version, kind, term, node, index.
        let mut entry = vec![1, 1];
        entry.extend_from_slice(&[0; 16]);
        entry.extend_from_slice(&bytes);
        seeds.push(("peer_message", format!("entry-{name}"), entry));
        seeds.push(("command", name.into(), bytes));
    }
    for (name, seed) in mainstay_replication::fuzzing::seeds() {
        seeds.push(("peer_message", name.into(), seed.to_vec()));
    }
    seeds.push(("peer_message", "empty".into(), vec![1]));
    seeds.push(("peer_message", "zeros".into(), vec![1; 64]));
    for (target, name, bytes) in seeds {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(name), bytes)?;
    }
    Ok(())
}

fn commands() -> Vec<(&'static str, CommandBody)> {
    let keyspace = KeyspaceId(1);
    let put = |key: &'static str, value: &'static str| WriteOp::Put {
        keyspace,
        key: Bytes::from_static(key.as_bytes()),
        value: Bytes::from_static(value.as_bytes()),
    };
    let delete = WriteOp::Delete { keyspace, key: Bytes::from_static(b"gone") };
    let table = InstallTable {
        id: TableId { job: JobId(7), ordinal: 1 },
        branch: MAIN,
        keyspace,
        first: Bytes::from_static(b"a"),
        last: Bytes::from_static(b"z"),
        entries: 10,
        tombstones: 1,
        bytes: 4096,
        digest: 0x0123_4567_89ab_cdef,
        root: Bytes::from_static(&[1; 112]),
        ranges: TableRanges::default(),
    };
    let range = |upper| KeyRange::new(Bound::Included(Bytes::from_static(b"c")), upper);
    let (range, rest) = (range(Bound::Excluded(Bytes::from_static(b"m"))), range(Bound::Unbounded));
    let ranged = InstallTable { ranges: TableRanges { tombstones: 2, spans: vec![range.clone()] }, ..table.clone() };
    vec![
        (
            "batch",
            CommandBody::Batch(WriteBatch { branch: MAIN, ops: vec![put("key", "value"), delete, put("b", "")] }),
        ),
        ("create-keyspace", CommandBody::CreateKeyspace { name: "users".into() }),
        ("drop-keyspace", CommandBody::DropKeyspace { name: "users".into() }),
        ("rotate", CommandBody::Rotate),
        ("install", CommandBody::Install { job: JobId(7), tables: vec![table] }),
        ("install-ranged", CommandBody::Install { job: JobId(7), tables: vec![ranged] }),
        (
            "batch-ranges",
            CommandBody::Batch(WriteBatch {
                branch: MAIN,
                ops: [range, rest].map(|range| WriteOp::DeleteRange { keyspace, range }).to_vec(),
            }),
        ),
        (
            "batch-merge",
            CommandBody::Batch(WriteBatch {
                branch: MAIN,
                ops: vec![WriteOp::Merge { keyspace, key: "key".into(), operand: "operand".into() }],
            }),
        ),
        (
            "set-operator",
            CommandBody::SetOperator { name: "counts".into(), operator: mainstay_engine::OperatorId::U64_ADD },
        ),
        ("create-checkpoint", CommandBody::CreateCheckpoint { name: "monday".into(), branch: MAIN }),
        ("drop-checkpoint", CommandBody::DropCheckpoint { name: "monday".into() }),
        ("create-clone", CommandBody::CreateClone { name: "trial".into(), checkpoint: "monday".into() }),
        ("drop-clone", CommandBody::DropClone { name: "trial".into() }),
        (
            "batches",
            CommandBody::Batches(vec![
                WriteBatch { branch: MAIN, ops: vec![put("key", "value")] },
                WriteBatch { branch: BranchId(3), ops: vec![put("key", "other")] },
            ]),
        ),
        (
            "once",
            CommandBody::Once {
                token: mainstay_engine::ClientToken { client: [7; 16], sequence: 9 },
                body: Box::new(CommandBody::Custom { branch: BranchId(3), command: Bytes::from_static(b"custom") }),
            },
        ),
        ("compact", CommandBody::Compact { branch: MAIN, keyspace, first: "a".into(), end: Some("m".into()) }),
        ("batch-if", CommandBody::BatchIf(conditional())),
        (
            "batches-if",
            CommandBody::BatchesIf(vec![
                conditional(),
                ConditionalBatch {
                    conditions: Vec::new(),
                    batch: WriteBatch { branch: BranchId(3), ops: vec![put("key", "other")] },
                },
            ]),
        ),
        (
            "once-batch-if",
            CommandBody::Once {
                token: mainstay_engine::ClientToken { client: [7; 16], sequence: 9 },
                body: Box::new(CommandBody::BatchIf(conditional())),
            },
        ),
        ("custom", CommandBody::Custom { branch: BranchId(3), command: Bytes::from_static(b"custom") }),
    ]
}

/// With a condition of each kind.
fn conditional() -> ConditionalBatch {
    let (keyspace, key) = (KeyspaceId(1), Bytes::from_static(b"key"));
    let conditions = vec![
        Condition::Absent { keyspace, key: key.clone() },
        Condition::Present { keyspace, key: key.clone() },
        Condition::Value { keyspace, key: key.clone(), value: Bytes::from_static(b"value") },
        Condition::Version { keyspace, key: key.clone(), version: LogIndex(300) },
        Condition::Range {
            keyspace,
            lower: Bound::Included(key.clone()),
            upper: Bound::Excluded(Bytes::from_static(b"z")),
            since: LogIndex(300),
            count: 2,
        },
        Condition::Range { keyspace, lower: Bound::Unbounded, upper: Bound::Unbounded, since: LogIndex(1), count: 0 },
    ];
    let op = WriteOp::Put { keyspace, key, value: Bytes::from_static(b"value") };
    ConditionalBatch { conditions, batch: WriteBatch { branch: MAIN, ops: vec![op] } }
}
