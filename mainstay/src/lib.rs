//! An ordered key-value store with one log, alone on one node or replicated by Raft.
//!
//! # A store in your process
//!
//! ```
//! # fn main() -> mainstay::Result<()> {
//! # let dir = tempfile::tempdir().expect("a temporary directory");
//! # let path = dir.path().join("store");
//! use mainstay::{Batch, Store};
//!
//! let store = Store::open(&path)?; // a directory or a block device; laid out if it is new
//! let users = store.keyspace("users")?;
//! users.insert("ada", "1815")?; // durable when it returns
//! assert_eq!(users.get("ada")?.as_deref(), Some(&b"1815"[..]));
//!
//! // Batches are atomic over keyspaces.
//! let years = store.keyspace("years")?;
//! let mut batch = Batch::new();
//! batch.insert(&users, "alan", "1912").insert(&years, "1912", "alan").remove(&users, "nobody");
//! store.commit(batch)?;
//!
//! // Ranges and prefixes run both ways.
//! let names: Vec<_> = users.prefix("a").rev().map(|entry| Ok(entry?.key)).collect::<mainstay::Result<_>>()?;
//! assert_eq!(names, ["alan", "ada"]);
//! # store.close()
//! # }
//! ```
//!
//! # Snapshots, checkpoints, clones
//!
//! A [`Snapshot`] pins a view in memory. A checkpoint is durable and has a name; a clone is a writable store that began as one. Neither copies
//! data.
//!
//! ```
//! # fn main() -> mainstay::Result<()> {
//! # let dir = tempfile::tempdir().expect("a temporary directory");
//! # let store = mainstay::Store::builder().wal_bytes(16 << 20).open(dir.path().join("store"))?;
//! let config = store.keyspace("config")?;
//! config.insert("color", "blue")?;
//! let before = store.snapshot()?;
//! store.checkpoint("monday")?;
//! config.insert("color", "red")?;
//! assert_eq!(before.get(&config, "color")?.as_deref(), Some(&b"blue"[..]));
//!
//! let trial = store.create_clone("trial", "monday")?; // starts as it was on monday
//! let trial_config = trial.keyspace("config")?;
//! trial_config.insert("color", "green")?;
//! assert_eq!(trial_config.get("color")?.as_deref(), Some(&b"green"[..]));
//! assert_eq!(config.get("color")?.as_deref(), Some(&b"red"[..]));
//! # store.close()
//! # }
//! ```
//!
//! # Async
//!
//! Every call that can wait has a form ending in `_async` whose future is `Send + 'static` and runs under any executor.
//!
//! ```
//! # fn main() -> mainstay::Result<()> {
//! # let dir = tempfile::tempdir().expect("a temporary directory");
//! # let path = dir.path().join("store");
//! # let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
//! # runtime.block_on(async {
//! let store = mainstay::Store::builder().wal_bytes(16 << 20).open_async(&path).await?;
//! let events = store.keyspace_async("events").await?;
//! events.insert_async("1", "started").await?;
//! let mut scan = events.iter();
//! while let Some(entry) = scan.next_async().await? {
//!     println!("{:?} = {:?}", entry.key, entry.value);
//! }
//! store.close_async().await
//! # })
//! # }
//! ```
//!
//! # Replicated
//!
//! A [`Node`] is a replica. Its [`Node::store`] is the same [`Store`]; [`Durability`] and [`ReadLevel`] say what a write and a read promise.
//! A cluster is born once, by [`Node::init`] on any one of its first members. See `examples/replicated.rs` for three nodes.
//!
//! ```
//! # fn main() -> mainstay::Result<()> {
//! # let dir = tempfile::tempdir().expect("a temporary directory");
//! # let path = dir.path().join("node");
//! use mainstay::{Durability, Node, NodeOptions, ReadLevel, Store};
//!
//! let options = NodeOptions::new("one", &path).storage(Store::builder().wal_bytes(16 << 20));
//! let node = Node::start_blocking(options)?;
//! node.block_on(node.init(["one"]))?;
//!
//! let store = node.store().with_durability(Durability::Quorum);
//! let users = store.keyspace("users")?;
//! let commit = users.insert("ada", "1815")?;
//! let here = store.with_read_level(ReadLevel::AtLeast(commit.index())).keyspace("users")?;
//! assert_eq!(here.get("ada")?.as_deref(), Some(&b"1815"[..]));
//! # node.block_on(node.close())
//! # }
//! ```
//!
//! # Conditions and transactions
//!
//! A [`Batch`] may say what must hold for it to be applied, and a [`Transaction`] reads one snapshot and commits only if nothing it
//! depends on was written since. Both are decided by every replica alike, at one place of the log.
//!
//! ```
//! # fn main() -> mainstay::Result<()> {
//! # let dir = tempfile::tempdir().expect("a temporary directory");
//! # let store = mainstay::Store::builder().wal_bytes(16 << 20).open(dir.path().join("store"))?;
//! use mainstay::{ErrorKind, Isolation};
//!
//! let accounts = store.keyspace("accounts")?;
//! accounts.insert("ada", [90])?;
//!
//! // Tried again, a bounded number of times, when others were faster.
//! let (left, _) = store.transact(Isolation::Serializable, |transaction| {
//!     let has = transaction.get(&accounts, "ada")?.map_or(0, |value| value[0]);
//!     transaction.insert(&accounts, "ada", [has - 20])?;
//!     transaction.insert(&accounts, "alan", [20])?;
//!     Ok(has - 20)
//! })?;
//! assert_eq!(left, 70);
//!
//! // By hand: a conflict changes nothing.
//! let mut late = store.transaction(Isolation::Snapshot)?;
//! accounts.insert("ada", [0])?;
//! late.insert(&accounts, "ada", [100])?;
//! assert_eq!(late.commit().unwrap_err().kind(), ErrorKind::Conflict);
//! # store.close()
//! # }
//! ```
//!
//! # Your own commands
//!
//! A [`StateMachine`] decides commands of your own at apply, on every replica alike: see `examples/state_machine.rs`.
//!
//! # Errors
//!
//! There is one [`Error`]; its [`Error::kind`] tells what to do about it.

#![forbid(unsafe_code)]

mod batch;
mod changes;
mod error;
mod keyspace;
mod log;
mod node;
mod options;
mod placed;
mod platform;
mod snapshot;
mod store;
mod transaction;

pub use batch::{Batch, Commit};
pub use changes::Changes;
pub use error::{Error, ErrorKind, Result};
pub use keyspace::Keyspace;
pub use mainstay_engine::{
    Apply, BranchInfo, CLIENTS_KEYSPACE, Change, ChangeKind, CheckpointInfo, ClientToken, CompactionStyle, EVENTS_MAX,
    EngineStats, EngineStatus, Error as ApplyError, Event, EventKind, Events, GroupStatus, KEY_BYTES_MAX, KeyRange,
    KeyspaceId, KeyspaceOptions, LogIndex, MergeOperator, MergeRefused, OperandCombiner, OperatorId, StallCause,
    StallStats, StateMachine, TableCompression, VALUE_BYTES_MAX, Value, WriteOp,
};
pub use mainstay_io::{BackendChoice, BoxFuture, Target};
pub use mainstay_replication::{
    CLUSTER_VERSION_MAX, CommitToken, Durability, GROUP_NAME_BYTES_MAX, MemberInfo, MemberRole, NodeId, NodeStatus,
    PLACED_NAME_BYTES_MAX, PeerAddress, RangeInfo, ReadLevel, SiteLag, SiteLagBound, Transport,
};
pub use node::{Node, NodeOptions};
pub use options::{MEMORY_BYTES_DEFAULT, StoreBuilder, WAL_BYTES_DEFAULT, target_of};
pub use placed::{Placed, PlacedBatch, PlacedScan};
pub use snapshot::{Entry, Scan, Snapshot};
pub use store::{Store, StoreStatus};
pub use transaction::{
    Isolation, TRANSACT_ATTEMPTS_MAX, TRANSACTION_BYTES_MAX, TransactFuture, Transaction, TransactionScan,
};

pub(crate) use store::Branch;

#[cfg(test)]
mod tests {
    use super::*;

    fn owned<T: Send + Sync + 'static>() {}
    fn shared<T: Clone + Send + Sync + 'static>() {}

    #[test]
    fn handles_are_shared_between_threads() {
        shared::<Store>();
        shared::<Keyspace>();
        shared::<Snapshot>();
        shared::<Node>();
        shared::<NodeOptions>();
        shared::<StoreBuilder>();
        shared::<Batch>();
        shared::<Commit>();
        shared::<Entry>();
        shared::<Error>();
        fn movable<T: Send + 'static>() {}
        movable::<Scan>();
        owned::<Value>();
    }
}

/// Runs the code of the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
