//! openraft's own suite for stores, over the node's log.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use super::{Bench, Double, NoPeers};
use crate::TokioRuntime;
use crate::log_store::LogStore;
use crate::state_machine::StateMachine;
use crate::types::TypeConfig;

type Config = TypeConfig<TokioRuntime>;
type Machine = StateMachine<TokioRuntime, Double>;

struct Builder {
    cache_bytes: u64,
}

impl StoreBuilder<Config, LogStore, Machine, Bench> for Builder {
    async fn build(&self) -> Result<(Bench, LogStore, Machine), StorageError<Config>> {
        let bench = Bench::new(self.cache_bytes).await;
        let store = bench.store.clone();
        let machine = StateMachine::open(Double::default(), store.clone(), Arc::new(NoPeers), Arc::default())
            .expect("an empty log names index 0");
        Ok((bench, store, machine))
    }
}

#[test]
fn openraft_accepts_the_stores_with_all_entries_cached() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(Suite::test_all(Builder { cache_bytes: 1 << 20 })).expect("the suite passes");
}

#[test]
fn openraft_accepts_the_stores_with_entries_read_back() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(Suite::test_all(Builder { cache_bytes: 1 })).expect("the suite passes");
}
