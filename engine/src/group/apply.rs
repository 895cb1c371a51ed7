//! Applies entries: the only writer of the memtables and of the logical manifest.
//!
//! # Invariants
//! 1. What an entry does depends on the entries before it alone: not on which jobs have finished here, nor on where a restart
//!    began its replay.
//! 2. Everything an entry writes becomes readable in one step, when the applied index reaches it.
//! 3. No I/O, but for reads of the embedder's state machine, of conditions, of values that are merged into by operators that do not combine
//!    operands, and of the answers to clients that ask for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use mainstay_io::yield_once;

use super::core::{Core, Edit};
use super::{Applied, GroupShared};
use crate::command::{WriteOp, check_span, encode_refusals};
use crate::expiry::{check_stamped, not_expiring, stamp};
use crate::manifest::{Effects, ManifestOp};
use crate::memtable::Memtable;
use crate::merge_operator::{Operator, join_operands, no_operator};
use crate::once::{apply_once, no_state_machine, not_once};
use crate::outcome::{OUTCOMES_KEYSPACE, Outcome, outcome_key};
use crate::range_tombstone::fold;
use crate::state_machine::Apply;
use crate::{
    BranchId, ClientToken, Command, CommandBody, ConditionalBatch, Error, ErrorKind, KeyspaceId, LogIndex, MAIN,
    Result, WriteBatch,
};

/// What a mutation counts besides its key and value when the bytes since the last rotation are summed.
pub(super) const OP_OVERHEAD_BYTES: u64 = 32;
/// Mutations of a command that are written before others get the thread: some milliseconds.
const WRITES_AT_ONCE: usize = 2048;

/// Keyspaces whose memtables a command keeps at hand while it writes.
const MET_MAX: usize = 16;

/// What an entry has done so far.
struct Entry {
    index: LogIndex,
    /// Its operations are in the manifest already.
    replayed: bool,
    ops: Vec<ManifestOp>,
    /// Readers need a new structure.
    publish: bool,
    /// Before it some pair was to end: who moves the time of the log knows.
    awaited_an_end: bool,
}

impl GroupShared {
    pub(super) async fn apply_entry(self: &Arc<Self>, index: LogIndex, command: &Command) -> Result<Applied> {
        self.check_alive()?;
        let response = match &command.body {
            CommandBody::Custom { branch, command: custom } => {
                self.apply_custom(index, command.time_ms, *branch, custom.clone()).await?
            }
            CommandBody::Once { token, body } => self.apply_token(index, command.time_ms, *token, body).await?,
            CommandBody::BatchIf(batch) => self.apply_batch_if(index, command.time_ms, batch).await?,
            CommandBody::BatchesIf(batches) => self.apply_batches_if(index, command.time_ms, batches).await?,
            CommandBody::Batch(batch) if self.is_merged_at_once(index, &batch.ops) => {
                let batch = ConditionalBatch { conditions: Vec::new(), batch: batch.clone() };
                self.apply_batch_if(index, command.time_ms, &batch).await?
            }
            CommandBody::Batches(batches) if batches.iter().any(|batch| self.is_merged_at_once(index, &batch.ops)) => {
                let plain = |batch: &WriteBatch| ConditionalBatch { conditions: Vec::new(), batch: batch.clone() };
                let batches: Vec<_> = batches.iter().map(plain).collect();
                self.apply_batches_if(index, command.time_ms, &batches).await?
            }
            body => {
                if let CommandBody::SetOperator { name, operator } = body {
                    // The others go on with it: what they write from here on could not be read here.
                    let registered = {
                        let core = self.lock();
                        match core.logical.keyspace_before(name, index) {
                            // It has one, so the entry changes nothing.
                            Some(id) if core.logical.operators.contains_key(&id) => Ok(()),
                            _ => core.operators.require(operator, name).map(drop),
                        }
                    };
                    registered.inspect_err(|error| self.fail(error.clone()))?;
                }
                let mut core = self.lock();
                let mut entry = self.enter(&mut core, index, Some(command.time_ms));
                let response = self.apply_body(&mut core, &mut entry, command.time_ms, body);
                if response.is_err() && matches!(body, CommandBody::Batch(_)) {
                    self.note(&mut core, &mut entry, Outcome::Refused);
                }
                self.leave(&mut core, entry);
                response
            }
        };
        self.applier_waits.store(false, Ordering::Relaxed);
        if let Some(state_machine) = &self.state_machine {
            state_machine.applied(index);
        }
        Ok(Applied { index, response })
    }

    /// The mutations are written when the values that they merge into have been read: operands of an operator that does not combine them
    /// stand nowhere.
    fn is_merged_at_once(&self, index: LogIndex, ops: &[WriteOp]) -> bool {
        let mut merges = ops.iter().filter(|op| matches!(op, WriteOp::Merge { .. })).peekable();
        if merges.peek().is_none() {
            return false;
        }
        let core = self.lock();
        let mut met = None;
        merges.any(|op| {
            let keyspace = op.keyspace();
            met.replace(keyspace) != Some(keyspace)
                && operator_before(&core, keyspace, index).is_some_and(|operator| !operator.combines())
        })
    }

    pub(super) fn skip_entry(self: &Arc<Self>, index: LogIndex) {
        let mut core = self.lock();
        let entry = self.enter(&mut core, index, None);
        self.leave(&mut core, entry);
    }

    fn enter(&self, core: &mut Core, index: LogIndex, time_ms: Option<u64>) -> Entry {
        let applied = self.applied();
        assert!(index > applied, "entries are applied in order: index={index} applied={applied}");
        turn_generation(core, index);
        let awaited_an_end = core.clock.waits_for_an_end();
        core.clock = core.clock_at(index, time_ms);
        Entry { index, replayed: index <= core.replay_to, ops: Vec::new(), publish: false, awaited_an_end }
    }

    /// Rotates if it is due, hands the operations on and makes the entry readable.
    fn leave(self: &Arc<Self>, core: &mut Core, mut entry: Entry) {
        if !entry.replayed && core.written >= core.logical.settings.memtable_bytes {
            self.rotate(core, &mut entry);
        }
        let index = entry.index;
        if !entry.ops.is_empty() {
            self.queue_edit(core, Edit { index, ops: entry.ops });
            entry.publish = true;
        }
        if entry.publish {
            self.publish(core, index);
        }
        self.times.set(index, core.clock.time_ms);
        self.applied.store(index.0, Ordering::Release);
        self.applies.notify_waiters();
        if core.clock.waits_for_an_end() && !entry.awaited_an_end {
            self.offers.notify_waiters();
        }
        turn_generation(core, LogIndex(index.0 + 1));
        // A frozen generation may have become complete.
        if core.logical.generations.values().any(|g| g.end == index) {
            self.engine.work.notify_one();
        }
        if self.engine.space_is_short() {
            self.engine.retry_space();
        }
    }

    /// An operation of this entry on the logical manifest.
    fn op(&self, core: &mut Core, entry: &mut Entry, op: ManifestOp) -> Result<Effects> {
        if entry.replayed {
            entry.publish = true;
            return Ok(Effects::default());
        }
        let effects = core.logical.apply(entry.index, &op, true)?;
        if effects.took_effect {
            entry.ops.push(op);
        }
        Ok(effects)
    }

    fn rotate(&self, core: &mut Core, entry: &mut Entry) {
        if entry.replayed {
            return;
        }
        let touched = core.touched();
        if touched.is_empty() && entry.index == core.logical.rotated {
            return;
        }
        let clock = (!core.logical.expiring.is_empty()).then_some(core.clock);
        let effects = self.op(core, entry, ManifestOp::Rotate { touched, clock }).expect("a rotation is never refused");
        if let Some(generation) = effects.generation {
            assert_eq!(generation, core.active, "a generation is numbered when its first entry is applied");
            core.active.0 += 1;
        }
        core.written = 0;
        core.rotate = None;
    }

    /// Writes down what the entry did, if anybody wants to know. Before the entry rotates: in replay there is no later generation yet.
    fn note(&self, core: &mut Core, entry: &mut Entry, outcome: Outcome) {
        if let Some(keyspace) = core.logical.keyspace_before(OUTCOMES_KEYSPACE, entry.index) {
            let (key, value) = (outcome_key(entry.index), outcome.encode());
            self.write(core, entry, MAIN, &[WriteOp::Put { keyspace, key, value }]);
        }
    }

    /// Notes the keyspace that the entry made, if it made one. Asked of the manifest: in replay the operation does nothing.
    fn note_made(&self, core: &mut Core, entry: &mut Entry) {
        let made = core.logical.keyspaces.iter().find(|(_, k)| k.created == entry.index).map(|(id, _)| *id);
        if let Some(id) = made {
            self.note(core, entry, Outcome::Keyspace(id));
        }
    }

    fn apply_body(&self, core: &mut Core, entry: &mut Entry, time_ms: u64, body: &CommandBody) -> Result<Bytes> {
        let index = entry.index;
        match body {
            CommandBody::Batch(batch) => {
                self.check_batch(core, index, batch.branch, &batch.ops, [])?;
                self.write(core, entry, batch.branch, &batch.ops);
                Ok(Bytes::new())
            }
            CommandBody::Batches(batches) => {
                let mut refusals = Vec::new();
                // Of one branch those one after the other: a range takes what the batches before it have written too, and operands
                // of one key are merged together.
                let mut accepted: BTreeMap<BranchId, Vec<&[WriteOp]>> = BTreeMap::new();
                for (place, batch) in batches.iter().enumerate() {
                    match self.check_batch(core, index, batch.branch, &batch.ops, []) {
                        Ok(()) => accepted.entry(batch.branch).or_default().push(&batch.ops),
                        Err(error) => refusals.push((place, error)),
                    }
                }
                for (branch, batches) in accepted {
                    let together = |op: &WriteOp| matches!(op, WriteOp::DeleteRange { .. } | WriteOp::Merge { .. });
                    if batches.len() > 1 && batches.iter().any(|ops| ops.iter().any(together)) {
                        self.write(core, entry, branch, &batches.concat());
                    } else {
                        batches.iter().for_each(|ops| self.write(core, entry, branch, ops));
                    }
                }
                if let Some(outcome) = Outcome::of_refusals(&refusals) {
                    self.note(core, entry, outcome);
                }
                Ok(encode_refusals(&refusals))
            }
            CommandBody::CreateKeyspace { name } => {
                self.op(core, entry, ManifestOp::CreateKeyspace { name: name.clone() })?;
                self.note_made(core, entry);
                Ok(id_of(core, entry, name))
            }
            CommandBody::CreateExpiring { name } => {
                self.op(core, entry, ManifestOp::CreateExpiring { name: name.clone() })?;
                // It is the first entry that moves the time, if it made the first of them.
                core.clock = core.clock_at(index, Some(time_ms));
                self.note_made(core, entry);
                Ok(id_of(core, entry, name))
            }
            CommandBody::SetOptions { name, options } => {
                self.op(core, entry, ManifestOp::SetOptions { name: name.clone(), options: *options })?;
                self.note_made(core, entry);
                Ok(id_of(core, entry, name))
            }
            CommandBody::SetOperator { name, operator } => {
                let (name, operator) = (name.clone(), operator.clone());
                self.op(core, entry, ManifestOp::SetOperator { name: name.clone(), operator })?;
                let given = core.logical.operators.iter().find(|(_, given)| given.since == index).map(|(id, _)| *id);
                if let Some(id) = given {
                    self.note(core, entry, Outcome::Keyspace(id));
                }
                Ok(id_of(core, entry, &name))
            }
            CommandBody::DropKeyspace { name } => {
                self.op(core, entry, ManifestOp::DropKeyspace { name: name.clone() })?;
                let dropped = core.logical.keyspaces.iter().find(|(_, k)| k.dropped == Some(index)).map(|(id, _)| *id);
                if let Some(id) = dropped {
                    self.note(core, entry, Outcome::Keyspace(id));
                }
                self.rotate(core, entry);
                Ok(Bytes::new())
            }
            CommandBody::Rotate => {
                self.rotate(core, entry);
                Ok(Bytes::new())
            }
            CommandBody::Install { job, tables } => {
                if entry.replayed {
                    entry.publish = true;
                    return Ok(Bytes::new());
                }
                let tables = tables.iter().cloned().map(Arc::new).collect();
                let effects = self.op(core, entry, ManifestOp::Install { job: *job, tables }).inspect_err(|error| {
                    self.refused_installs.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(group = %self.id, %job, %error, "a flush or compaction does not end");
                })?;
                if !effects.took_effect {
                    // Too early for a flush whose older generation is not installed: to be offered again.
                    core.offered.remove(job);
                    self.offers.notify_waiters();
                } else if core.touched().is_empty() {
                    self.rotate(core, entry);
                }
                Ok(Bytes::new())
            }
            CommandBody::CreateCheckpoint { name, branch } => {
                let refused = core.logical.checkpoints.contains_key(name)
                    || !core.logical.has_branch_before(*branch, index)
                    || crate::codec::check_name(name).is_err();
                if !refused {
                    self.rotate(core, entry);
                }
                // Who opens it reads at the time of the log at its index.
                let time_ms = if core.logical.counts_time_at(index) { core.clock.time_ms } else { time_ms };
                let op = ManifestOp::CreateCheckpoint { name: name.clone(), branch: *branch, time_ms };
                self.op(core, entry, op)?;
                Ok(Bytes::new())
            }
            CommandBody::DropCheckpoint { name } => {
                self.op(core, entry, ManifestOp::DropCheckpoint { name: name.clone() })?;
                Ok(Bytes::new())
            }
            CommandBody::CreateClone { name, checkpoint } => {
                let (name, checkpoint) = (name.clone(), checkpoint.clone());
                self.op(core, entry, ManifestOp::CreateClone { name, checkpoint, time_ms })?;
                Ok(Bytes::copy_from_slice(&index.0.to_le_bytes()))
            }
            CommandBody::DropClone { name } => {
                self.op(core, entry, ManifestOp::DropClone { name: name.clone() })?;
                self.rotate(core, entry);
                Ok(Bytes::new())
            }
            CommandBody::Compact { branch, keyspace, first, end } => {
                self.check_batch(core, index, *branch, &[], [*keyspace])?;
                check_span(first, end.as_ref())?;
                if core.touched().contains(&(*branch, *keyspace)) {
                    self.rotate(core, entry);
                }
                let (branch, keyspace, first, end) = (*branch, *keyspace, first.clone(), end.clone());
                self.op(core, entry, ManifestOp::Compact { branch, keyspace, first, end })?;
                Ok(Bytes::new())
            }
            CommandBody::Custom { .. }
            | CommandBody::Once { .. }
            | CommandBody::BatchIf(_)
            | CommandBody::BatchesIf(_) => {
                unreachable!("what reads the store takes its own way")
            }
        }
    }

    /// Refuses what cannot be written, and looks into keyspaces that are not there.
    pub(super) fn check_batch(
        &self,
        core: &Core,
        index: LogIndex,
        branch: BranchId,
        ops: &[WriteOp],
        looks: impl IntoIterator<Item = KeyspaceId>,
    ) -> Result<()> {
        if !core.logical.has_branch_before(branch, index) {
            return Err(no_branch(branch));
        }
        let mut known = None;
        let mut find = |keyspace| {
            if known != Some(keyspace) && !core.logical.has_keyspace_before(keyspace, index) {
                return Err(no_keyspace(keyspace));
            }
            known = Some(keyspace);
            Ok(())
        };
        looks.into_iter().try_for_each(&mut find)?;
        for op in ops {
            op.check()?;
            find(op.keyspace())?;
            if let Some(value) = op.value()
                && core.logical.expires_before(op.keyspace(), index)
            {
                check_stamped(op.keyspace(), value)?;
            } else if let WriteOp::PutFor { keyspace, .. } = op {
                return Err(not_expiring(*keyspace));
            }
            if let WriteOp::Merge { keyspace, operand, .. } = op {
                operator_before(core, *keyspace, index).ok_or_else(|| no_operator(*keyspace))?.check(operand)?;
            }
        }
        Ok(())
    }

    /// Writes checked mutations into the memtables in use. An entry that removes ranges or merges writes all of a branch at once.
    fn write(&self, core: &mut Core, entry: &mut Entry, branch: BranchId, ops: &[WriteOp]) {
        let ops = &*fold(ops);
        let written: u64 = ops.iter().map(|op| op.bytes() as u64).sum();
        let joined = join_operands(ops);
        let plain = if joined.is_empty() { ops } else { &[] };
        let ops = plain.iter().map(|op| (op, &[][..])).chain(joined.iter().map(|(op, operands)| (*op, &operands[..])));
        // Those of the keyspaces met so far: a command writes to a few in turns.
        let mut met: Vec<(KeyspaceId, Arc<Memtable>)> = Vec::new();
        for (op, operands) in ops {
            let keyspace = op.keyspace();
            let place = met.iter().position(|(known, _)| *known == keyspace).unwrap_or_else(|| {
                let key = (core.active, branch, keyspace);
                let memtable = core.memtables.entry(key).or_insert_with(|| {
                    entry.publish = true;
                    Arc::new(Memtable::new(&self.engine.budget))
                });
                if met.len() == MET_MAX {
                    met.clear();
                }
                met.push((keyspace, memtable.clone()));
                met.len() - 1
            });
            let memtable = &met[place].1;
            let bytes = match op {
                WriteOp::DeleteRange { range, .. } => memtable.remove_range(range, entry.index),
                WriteOp::Merge { keyspace, key, .. } => {
                    let operator = operator_before(core, *keyspace, entry.index).expect("the batch was checked");
                    memtable.merge(operator, key, entry.index, operands)
                }
                _ if core.logical.expires_before(keyspace, entry.index) => {
                    let end_ms = core.clock.end_of(op.ttl_ms());
                    let stamped = op.value().map(|value| stamp(end_ms, value));
                    memtable.insert(op.key(), entry.index, stamped.as_ref());
                    op.bytes() as u64
                }
                _ => {
                    memtable.insert(op.key(), entry.index, op.value());
                    op.bytes() as u64
                }
            };
            core.written += bytes + OP_OVERHEAD_BYTES;
        }
        self.engine.stats.user_bytes.fetch_add(written, Ordering::Relaxed);
    }

    async fn apply_custom(
        self: &Arc<Self>,
        index: LogIndex,
        time_ms: u64,
        branch: BranchId,
        command: Bytes,
    ) -> Result<Result<Bytes>> {
        let prepared = self.prepare_custom(index, time_ms, branch);
        let answer = match (prepared, &self.state_machine) {
            (Err(error), _) => Err(error),
            (Ok(_), None) => Err(no_state_machine()),
            (Ok(mut apply), Some(state_machine)) => {
                let answer = state_machine.apply(&mut apply, command).await;
                if let Some(error) = apply.broken() {
                    return Err(self.unread(error));
                }
                answer.map(|response| (response, vec![(branch, apply)]))
            }
        };
        let outcome = answer.is_err().then_some(Outcome::Refused);
        Ok(self.finish_apply((index, time_ms), answer, outcome).await)
    }

    async fn apply_token(
        self: &Arc<Self>,
        index: LogIndex,
        time_ms: u64,
        token: ClientToken,
        body: &CommandBody,
    ) -> Result<Result<Bytes>> {
        let branch = match body {
            CommandBody::Batch(batch) => Ok(batch.branch),
            CommandBody::BatchIf(conditional) => Ok(conditional.batch.branch),
            CommandBody::Custom { branch, .. } => Ok(*branch),
            _ => Err(not_once()),
        };
        let prepared = branch.and_then(|branch| Ok((branch, self.prepare_custom(index, time_ms, branch)?)));
        let answer = match prepared {
            Err(error) => Err(error),
            Ok((branch, mut apply)) => {
                let answer = apply_once(&mut apply, token, body, self.state_machine.as_ref()).await;
                if let Some(error) = apply.broken() {
                    return Err(self.unread(error));
                }
                answer.map(|response| (response, vec![(branch, apply)]))
            }
        };
        // A request that was answered before writes nothing, and one whose condition did not hold its answer alone.
        let done = answer.as_ref().is_ok_and(|(response, applies)| {
            let repeated = applies.iter().all(|(_, apply)| apply.is_clean());
            let broken = matches!(body, CommandBody::BatchIf(_)) && !response.is_empty();
            !repeated && !broken
        });
        let response = self.finish_apply((index, time_ms), answer, (!done).then_some(Outcome::Refused)).await;
        Ok(response.and_then(|response| self.answer_once(body, response)))
    }

    /// This replica could not read what the others read, so it has no answer. While they may yet give it what it lacks the
    /// entry is not applied, and may be again; else the group leaves service.
    pub(super) fn unread(&self, error: &Error) -> Error {
        // It may hold in memory what it made of the entry.
        if let Some(state_machine) = &self.state_machine {
            state_machine.restored(self.applied());
        }
        if error.kind() == ErrorKind::Unavailable {
            self.applier_waits.store(true, Ordering::Relaxed);
        } else {
            self.fail(error.clone());
        }
        error.clone()
    }

    /// Writes what was decided, or nothing, and makes the entry readable. Between some thousand mutations others get the core
    /// and the thread: nothing of the entry is readable before its end, and nobody but the applier changes the generation.
    pub(super) async fn finish_apply(
        self: &Arc<Self>,
        (index, time_ms): (LogIndex, u64),
        answer: Result<(Bytes, Vec<(BranchId, Apply)>)>,
        outcome: Option<Outcome>,
    ) -> Result<Bytes> {
        let (mut entry, response) = {
            let mut core = self.lock();
            let mut entry = self.enter(&mut core, index, Some(time_ms));
            // The manifest has made them already, and readers, the next entry among them, have to find them from here on.
            entry.publish |= entry.replayed && core.logical.keyspaces.values().any(|k| k.created == index);
            let response = answer.and_then(|(response, applies)| {
                let mut writes = Vec::with_capacity(applies.len());
                for (branch, apply) in applies {
                    let (created, ops) = apply.into_parts();
                    for (name, id) in created {
                        let effects = self.op(&mut core, &mut entry, ManifestOp::CreateKeyspace { name })?;
                        assert!(
                            entry.replayed || effects.keyspace == Some(id),
                            "keyspaces are numbered as they were promised"
                        );
                    }
                    writes.push((branch, ops));
                }
                Ok((response, writes))
            });
            if let Some(outcome) = outcome {
                self.note(&mut core, &mut entry, outcome);
            }
            if let Ok((_, writes)) = &response
                && writes.iter().map(|(_, ops)| ops.len()).sum::<usize>() <= WRITES_AT_ONCE
            {
                writes.iter().for_each(|(branch, ops)| self.write(&mut core, &mut entry, *branch, ops));
                self.leave(&mut core, entry);
                return response.map(|(response, _)| response);
            }
            (entry, response)
        };
        for (branch, ops) in response.iter().flat_map(|(_, writes)| writes) {
            for some in ops.chunks(WRITES_AT_ONCE) {
                self.write(&mut self.lock(), &mut entry, *branch, some);
                yield_once().await;
            }
        }
        self.leave(&mut self.lock(), entry);
        response.map(|(response, _)| response)
    }

    pub(super) fn prepare_custom(&self, index: LogIndex, time_ms: u64, branch: BranchId) -> Result<Apply> {
        let core = self.lock();
        if !core.logical.has_branch_before(branch, index) {
            return Err(no_branch(branch));
        }
        // In replay, the keyspaces that this very entry made have their numbers already.
        let made = core.logical.keyspaces.iter().filter(|(_, k)| k.created == index);
        let made = made.map(|(&id, k)| (k.name.clone(), id)).collect();
        let next_keyspace = core.logical.next_keyspace;
        let now_ms = core.clock_at(index, Some(time_ms)).time_ms;
        drop(core);
        // It judges by the time of its own entry.
        let before = self.snapshot_of(branch)?.at_time(now_ms);
        Ok(Apply::new(index, time_ms, before, made, next_keyspace))
    }
}

/// The answer of an entry that makes or finds a keyspace: its id. In replay it may have been refused; nobody asks then.
fn id_of(core: &Core, entry: &Entry, name: &str) -> Bytes {
    let id = core.logical.keyspace_before(name, LogIndex(entry.index.0 + 1));
    id.map(|id| Bytes::copy_from_slice(&id.0.to_le_bytes())).unwrap_or_default()
}

/// The merge operator of a keyspace as entry `index` finds it.
fn operator_before(core: &Core, keyspace: KeyspaceId, index: LogIndex) -> Option<&Operator> {
    core.operators.get(core.logical.operator_before(keyspace, index)?)
}

/// Sets the generation that entry `index` writes. In replay the manifest knows where generations ended, and some may be in
/// tables by now.
fn turn_generation(core: &mut Core, index: LogIndex) {
    while core.active < core.logical.next_generation {
        match core.logical.generations.get(&core.active) {
            Some(generation) if index <= generation.end => break,
            _ => {
                core.active.0 += 1;
                core.written = 0;
            }
        }
    }
}

pub(super) fn no_branch(branch: BranchId) -> Error {
    Error::new(ErrorKind::NotFound, format!("no such branch branch={branch}"))
}

pub(super) fn no_keyspace(keyspace: KeyspaceId) -> Error {
    Error::new(ErrorKind::NotFound, format!("no such keyspace keyspace={keyspace}"))
}
