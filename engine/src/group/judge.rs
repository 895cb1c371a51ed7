//! Applies batches that have conditions: each is decided behind those before it in the entry, and written or refused as a whole.
//!
//! # Place
//! beside `apply`, whose entries it is part of; what a condition looks at is decided in `condition`
//! # Invariants
//! 1. What is decided and what is written depends on the entries before this one alone: conditions are decided on [`Apply`], as
//!    the commands of the embedder are.
//! 2. A batch that is refused has written nothing: it is checked and decided before the first of its mutations.
//! # Why not
//! Deciding in the memtables, as plain batches are written: a condition may have to read a block, the lock of the group is
//! not held over that, and an entry that cannot be decided here must leave no trace.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::GroupShared;
use crate::command::encode_refusals;
use crate::condition::{decode_broken, first_broken};
use crate::outcome::Outcome;
use crate::state_machine::Apply;
use crate::{BranchId, CommandBody, Condition, ConditionalBatch, Error, LogIndex, Result};

/// What the batches of an entry write, by the branch that they write to.
type Writes = BTreeMap<BranchId, Apply>;

impl GroupShared {
    /// A batch that comes alone: refused, its error is the answer.
    pub(super) async fn apply_batch_if(
        self: &Arc<Self>,
        index: LogIndex,
        time_ms: u64,
        batch: &ConditionalBatch,
    ) -> Result<Result<Bytes>> {
        let alone = |_: &[(usize, Error)]| Some(Outcome::Refused);
        let mut refusals = self.apply_judged(index, time_ms, std::slice::from_ref(batch), alone).await?;
        Ok(refusals.pop().map_or_else(|| Ok(Bytes::new()), |(_, error)| Err(error)))
    }

    pub(super) async fn apply_batches_if(
        self: &Arc<Self>,
        index: LogIndex,
        time_ms: u64,
        batches: &[ConditionalBatch],
    ) -> Result<Result<Bytes>> {
        let refusals = self.apply_judged(index, time_ms, batches, Outcome::of_refusals).await?;
        Ok(Ok(encode_refusals(&refusals)))
    }

    /// Applies those that may be applied and returns the others with why.
    async fn apply_judged(
        self: &Arc<Self>,
        index: LogIndex,
        time_ms: u64,
        batches: &[ConditionalBatch],
        outcome: impl FnOnce(&[(usize, Error)]) -> Option<Outcome>,
    ) -> Result<Vec<(usize, Error)>> {
        let mut writes = Writes::new();
        let mut refusals = Vec::new();
        for (place, batch) in batches.iter().enumerate() {
            let refused = self.judge(index, time_ms, batch, &mut writes).await;
            if let Some(error) = writes.values().find_map(Apply::broken) {
                return Err(self.unread(error));
            }
            refusals.extend(refused.err().map(|error| (place, error)));
        }
        let outcome = if refusals.is_empty() { None } else { outcome(&refusals) };
        // Nothing in it is refused any more.
        let _ = self.finish_apply((index, time_ms), Ok((Bytes::new(), writes.into_iter().collect())), outcome).await;
        Ok(refusals)
    }

    /// Decides a batch and adds what it writes.
    async fn judge(&self, index: LogIndex, time_ms: u64, batch: &ConditionalBatch, writes: &mut Writes) -> Result<()> {
        let ConditionalBatch { conditions, batch } = batch;
        let keyspaces = conditions.iter().map(Condition::keyspace);
        conditions.iter().try_for_each(Condition::check)?;
        self.check_batch(&self.lock(), index, batch.branch, &batch.ops, keyspaces)?;
        let apply = match writes.entry(batch.branch) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                new.insert(self.prepare_custom(index, time_ms, batch.branch)?)
            }
        };
        if let Some(broken) = first_broken(conditions, apply).await? {
            return Err(self.conflict(conditions, broken));
        }
        apply.write_all(&batch.ops).await
    }

    /// The answer to the request of a token: of a conditional batch it says whether the batch was applied.
    pub(super) fn answer_once(&self, body: &CommandBody, response: Bytes) -> Result<Bytes> {
        let CommandBody::BatchIf(batch) = body else { return Ok(response) };
        match decode_broken(&response)? {
            Some(broken) => Err(self.conflict(&batch.conditions, broken)),
            None => Ok(response),
        }
    }

    /// Why the condition at this place refused its batch.
    fn conflict(&self, conditions: &[Condition], broken: usize) -> Error {
        let Some(condition) = conditions.get(broken) else {
            return Error::new(crate::ErrorKind::Conflict, "a condition did not hold: read again and retry");
        };
        let id = condition.keyspace();
        let core = self.lock();
        let name = core.logical.keyspaces.get(&id).map_or_else(|| id.to_string(), |keyspace| keyspace.name.clone());
        drop(core);
        condition.conflict(&name)
    }
}
