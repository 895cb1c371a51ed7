//! Merge operators through the facade: stores, batches, transactions, the embedder's own operators, and a replica.

use std::sync::Arc;

use mainstay::{
    Batch, ErrorKind, Isolation, MergeOperator, MergeRefused, Node, NodeOptions, OperandCombiner, OperatorId, Result,
    Store, StoreBuilder,
};

/// Keeps the larger of two texts, and takes none that are empty.
struct Largest;

const LARGEST: OperatorId = OperatorId::new_static("largest", 1);

impl MergeOperator for Largest {
    fn id(&self) -> OperatorId {
        LARGEST
    }

    fn check(&self, operand: &[u8]) -> Result<(), MergeRefused> {
        if operand.is_empty() { Err(MergeRefused::new("it is empty")) } else { Ok(()) }
    }

    fn merge(&self, _: &[u8], value: &mut Option<Vec<u8>>, operand: &[u8]) -> Result<(), MergeRefused> {
        if value.as_deref() < Some(operand) {
            *value = Some(operand.to_vec());
        }
        Ok(())
    }

    fn combiner(&self) -> Option<&dyn OperandCombiner> {
        Some(self)
    }
}

impl OperandCombiner for Largest {
    fn combine(&self, _: &[u8], older: &mut Vec<u8>, newer: &[u8]) -> Result<(), MergeRefused> {
        if older.as_slice() < newer {
            *older = newer.to_vec();
        }
        Ok(())
    }
}

fn builder() -> StoreBuilder {
    Store::builder().wal_bytes(8 << 20).memory_bytes(32 << 20)
}

fn with_largest() -> StoreBuilder {
    builder().merge_operator(Arc::new(Largest)).expect("a good name")
}

#[test]
fn an_operator_of_the_embedder_merges_and_has_to_be_there_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let store = with_largest().open(&path).expect("opens");
    let names = store.keyspace_with_operator("names", LARGEST).expect("made");
    names.insert("k", "alan").expect("written");
    names.merge("k", "ada").expect("written");
    names.merge("fresh", "grace").expect("written");
    let mut batch = Batch::new();
    batch.merge(&names, "k", "grace").merge(&names, "k", "barbara").remove(&names, "fresh");
    assert_eq!((batch.len(), batch.bytes()), (3, 19));
    store.commit(batch).expect("committed");
    assert_eq!(names.get("k").expect("read").as_deref(), Some(&b"grace"[..]));
    assert_eq!(names.get("fresh").expect("read"), None);
    let error = names.merge("k", "").expect_err("it takes none that are empty");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let plain = store.keyspace("plain").expect("made");
    assert_eq!(plain.merge("k", "x").expect_err("no operator").kind(), ErrorKind::Invalid);
    for other in [OperatorId::APPEND, OperatorId::new("largest", 2)] {
        assert_eq!(
            store.keyspace_with_operator("names", other).err().map(|error| error.kind()),
            Some(ErrorKind::Invalid)
        );
    }
    store.close().expect("closes");
    let error = builder().open(&path).err().expect("the operator is missing");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("keyspace=names operator=largest version=1"), "{error}");
    let store = with_largest().open(&path).expect("opens");
    let names = store.keyspace("names").expect("it is there");
    names.merge("k", "margaret").expect("the keyspace has it still");
    assert_eq!(names.get("k").expect("read").as_deref(), Some(&b"margaret"[..]));
    store.close().expect("closes");
}

#[test]
fn a_transaction_sees_what_it_merges_and_conflicts_with_who_writes_the_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let log = store.keyspace_with_operator("log", OperatorId::APPEND).expect("made");
    log.insert("day", "1").expect("written");
    let begin = || store.transaction(Isolation::Snapshot).expect("begun");
    let mut transaction = begin();
    transaction.merge(&log, "day", "2").expect("recorded");
    transaction.merge(&log, "day", "3").expect("recorded");
    transaction.merge(&log, "night", "4").expect("recorded");
    assert_eq!(transaction.get(&log, "day").expect("read").as_deref(), Some(&b"123"[..]));
    let mut late = begin();
    late.merge(&log, "day", "late").expect("recorded");
    transaction.commit().expect("nobody else wrote");
    assert_eq!(late.commit().expect_err("somebody did").kind(), ErrorKind::Conflict);
    assert_eq!(log.get("day").expect("read").as_deref(), Some(&b"123"[..]));
    assert_eq!(log.get("night").expect("read").as_deref(), Some(&b"4"[..]));
    let plain = store.keyspace("plain").expect("made");
    assert_eq!(begin().merge(&plain, "k", "x").expect_err("no operator").kind(), ErrorKind::Invalid);
    let mut batch = Batch::new();
    batch.require_value(&log, "day", "123").merge(&log, "day", "5");
    store.commit(batch.clone()).expect("it has that value");
    assert_eq!(store.commit(batch).expect_err("it has another").kind(), ErrorKind::Conflict);
    store.close().expect("closes");
}

#[test]
fn a_replica_merges_as_a_store_alone_does() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = NodeOptions::new("a", folder.path().join("a")).storage(builder());
    let node = Node::start_blocking(options).expect("starts");
    node.block_on(node.init(["a"])).expect("born");
    let sums = node.store().keyspace_with_operator("sums", OperatorId::U64_ADD).expect("made");
    for n in 1..=4u64 {
        sums.merge("n", n.to_le_bytes()).expect("written");
    }
    assert_eq!(sums.get("n").expect("read").as_deref(), Some(&10u64.to_le_bytes()[..]));
    let unknown = node.store().keyspace_with_operator("names", LARGEST);
    assert_eq!(unknown.err().map(|error| error.kind()), Some(ErrorKind::Invalid));
    node.block_on(node.close()).expect("closes");
}
