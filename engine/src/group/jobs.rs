//! Flushes and compactions: which runs next, how it writes its tables, and how its install is offered.
//!
//! # Invariants
//! 1. What a job writes is a pure function of its inputs, of the group's settings and of the options of its keyspace when it was started: equal on all replicas.
//! 2. Inputs are held by reference count while the job runs.
//! 3. Outputs are durable in their extents before they are offered or installed.
//! 4. Installs of flushes are offered in the order of their generations.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use mainstay_io::AlignedBytes;

use super::GroupShared;
use super::core::{Core, Stuck, TICK};
use crate::expiry::EndsOfTable;
use crate::manifest::{Job, Manifest, TableRef};
use crate::memory::MemoryKind;
use crate::memtable::Memtable;
use crate::merge_operator::Operator;
use crate::range_tombstone::RangeTombstone;
use crate::read::MergeInput;
use crate::stored::{ExtentWriter, StoredBytes, StoredTable};
use crate::table::{Table, TableBuilder, TableOptions};
use crate::volume::Reservation;
use crate::{
    BranchId, Command, CommandBody, Error, ErrorKind, EventKind, Generation, InstallTable, JobId, KeyspaceId, Result,
    TableId, WriteBatch,
};

/// Bytes of a table gathered before they are written.
const WRITE_BYTES: u64 = 512 << 10;
/// What a job reserves beyond the bytes of its inputs: one part in so many, and some for blocks that are not full.
const ESTIMATE_SHARE: u64 = 8;
const ESTIMATE_BYTES: u64 = 256 << 10;

/// Failures of a job, by what can pass, after which it is not tried again before a restart: some ten minutes.
pub(super) const JOB_ATTEMPTS_MAX: u32 = 18;

/// What a job made.
pub(super) struct Output {
    pub(super) tables: Vec<StoredTable>,
}

/// Gives back what no manifest ever named.
pub(super) fn discard(output: Output) {
    output.tables.iter().for_each(|stored| stored.bytes.set_obsolete());
}

/// A job with all that it reads, pinned.
pub(crate) struct Run {
    group: Arc<GroupShared>,
    lineage: u64,
    job: JobId,
    parts: Vec<Part>,
    table_bytes: u64,
    bytes: u64,
    /// For a compaction the levels from and to.
    levels: Option<(u8, u8)>,
}

/// One merge: a keyspace of a flush, or the whole of a compaction.
struct Part {
    branch: BranchId,
    keyspace: KeyspaceId,
    memtables: Vec<Arc<Memtable>>,
    tables: Vec<Arc<Table>>,
    drop_tombstones: bool,
    operator: Option<Operator>,
    /// Its pairs have ends.
    expires: bool,
    /// Pairs that ended by then are dropped; 0 for none.
    expired_by_ms: u64,
    /// How its tables are built.
    table: TableOptions,
}

/// What kind of job a worker asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobClass {
    Flush,
    Compact,
}

impl GroupShared {
    /// The next job of a class, marked as running.
    pub(crate) fn next_job(self: &Arc<Self>, class: JobClass) -> Option<Run> {
        if self.failed.get().is_some() {
            return None;
        }
        let now = self.engine.environment.clock.now();
        let mut core = self.lock();
        let (job, parts) = match class {
            JobClass::Flush => self.next_flush(&core, now)?,
            JobClass::Compact => next_compaction(&core, now)?,
        };
        let levels = match core.present.jobs.get(&job).map(|job| &**job) {
            Some(Job::Compact(compaction)) => Some((compaction.from, compaction.to)),
            _ => None,
        };
        core.running.insert(job);
        let bytes = parts.iter().map(|part| {
            let memtables: u64 = part.memtables.iter().map(|m| m.bytes()).sum();
            let tables: u64 = part.tables.iter().map(|t| t.meta().bytes).sum();
            memtables + tables + (memtables + tables) / ESTIMATE_SHARE + ESTIMATE_BYTES
        });
        Some(Run {
            group: self.clone(),
            lineage: core.lineage,
            job,
            levels,
            bytes: bytes.sum(),
            parts,
            table_bytes: core.logical.settings.table_bytes
                / if mainstay_io::mutant!(LocalTableSize) {
                    self.engine.environment.clock.unix().as_millis() as u64 % 2 + 1
                } else {
                    1
                },
        })
    }

    /// The oldest generation that is complete: of the logical manifest, whatever the present one waits for.
    fn next_flush(&self, core: &Core, now: Duration) -> Option<(JobId, Vec<Part>)> {
        let applied = self.applied();
        let generations = core.present.generations.iter().chain(&core.logical.generations);
        let (generation, frozen) = generations
            .filter(|(_, frozen)| frozen.end <= applied && eligible(core, frozen.job, now))
            .min_by_key(|(g, _)| **g)?;
        let parts = frozen.touched.iter().map(|&(branch, keyspace)| Part {
            branch,
            keyspace,
            memtables: core.memtables.get(&(*generation, branch, keyspace)).cloned().into_iter().collect(),
            tables: Vec::new(),
            drop_tombstones: false,
            operator: operator_of(core, keyspace),
            expires: expires(core, keyspace),
            // It has no time of its own.
            expired_by_ms: 0,
            table: table_options(core, keyspace, frozen.job, 0),
        });
        Some((frozen.job, parts.collect()))
    }

    /// Takes back what a job made, or why it failed.
    pub(crate) fn finish_job(self: &Arc<Self>, run: &Run, outcome: Result<Vec<StoredTable>>) {
        let mut core = self.lock();
        let current = core.lineage == run.lineage;
        if current {
            core.running.remove(&run.job);
        }
        match outcome {
            Ok(tables) => {
                let output = Output { tables };
                let known = core.logical.jobs.contains_key(&run.job) || core.present.jobs.contains_key(&run.job);
                if !current || !known || core.done.contains_key(&run.job) {
                    return discard(output);
                }
                core.stuck.remove(&run.job);
                core.done.insert(run.job, output);
                self.advance(&mut core);
                self.publish(&mut core, self.applied());
                drop(core);
                self.offers.notify_waiters();
            }
            // The engine tries again when there is space.
            Err(error) if error.kind() == ErrorKind::OutOfSpace => {}
            Err(error) => {
                if error.kind() == ErrorKind::Closed && !self.engine.is_closing() {
                    // The volume takes nothing any more, and what is in memory can never leave it.
                    self.fail(error.clone());
                }
                if current {
                    let mut retry = core.stuck.get(&run.job).map(|stuck| stuck.retry).unwrap_or_default();
                    retry.failed(self.engine.environment.clock.now());
                    let over = is_over(error.kind(), retry.attempts);
                    tracing::error!(group = %self.id, job = %run.job, attempts = retry.attempts, over, %error,
                        "a job failed");
                    core.stuck.insert(run.job, Stuck { error, retry, over });
                }
                drop(core);
                self.progress.notify_waiters();
                self.heal.counts.work.notify_one();
            }
        }
    }

    /// What to propose next, if there is something.
    pub(crate) fn take_offer(&self) -> Option<Command> {
        let now_ms = self.engine.environment.clock.unix().as_millis() as u64;
        let mut core = self.lock();
        let body = if core.rotate == Some(false) {
            core.rotate = Some(true);
            CommandBody::Rotate
        } else if let Some(job) = offerable(&core) {
            core.offered.insert(job);
            let tables = core.done.get(&job)?.tables.iter().map(|t| InstallTable::clone(&t.meta)).collect();
            CommandBody::Install { job, tables }
        } else if core.is_to_free(now_ms) {
            core.ticked_ms = now_ms;
            CommandBody::Rotate
        } else if core.is_to_tick(now_ms) {
            // It changes nothing but the time.
            core.ticked_ms = now_ms;
            CommandBody::Batch(WriteBatch::default())
        } else {
            return None;
        };
        drop(core);
        Some(Command { time_ms: now_ms, body })
    }

    /// A pause after which the time of the log may be due to be moved; none while no pair is to end.
    pub(crate) fn tick_pause(&self) -> Option<Duration> {
        self.lock().clock.waits_for_an_end().then_some(TICK)
    }

    /// Asks the leader for a rotation, so that the log can be cut or memory be freed. One that finds nothing written moves the
    /// flushed index over entries that wrote nothing.
    pub(crate) fn want_rotation(&self) {
        let mut core = self.lock();
        if core.rotate.is_none() && self.applied() > core.logical.rotated {
            core.rotate = Some(false);
            drop(core);
            self.offers.notify_waiters();
        }
    }

    /// A rotation was asked for, and nobody has proposed it here.
    pub(crate) fn wants_rotation(&self) -> bool {
        self.lock().rotate == Some(false)
    }
}

/// Whether a job that has failed so often is not tried again before a restart. What other replicas may yet give is waited for
/// as long as they are away.
fn is_over(kind: ErrorKind, attempts: u32) -> bool {
    match kind {
        ErrorKind::Unavailable => false,
        ErrorKind::Io | ErrorKind::Corrupt => attempts >= JOB_ATTEMPTS_MAX,
        _ => true,
    }
}

fn eligible(core: &Core, job: JobId, now: Duration) -> bool {
    !core.running.contains(&job)
        && !core.done.contains_key(&job)
        && !core.diverged.contains(&job)
        && core.stuck.get(&job).is_none_or(|stuck| !stuck.over && stuck.retry.at <= now)
}

fn next_compaction(core: &Core, now: Duration) -> Option<(JobId, Vec<Part>)> {
    core.present.jobs.iter().find_map(|(&id, job)| {
        let Job::Compact(compaction) = &**job else { return None };
        if !eligible(core, id, now) {
            return None;
        }
        let open = |t: &TableRef| core.tables.get(&t.id).map(|stored| stored.table.clone());
        let part = Part {
            branch: compaction.branch,
            keyspace: compaction.keyspace,
            memtables: Vec::new(),
            tables: compaction.inputs().map(open).collect::<Option<_>>()?,
            drop_tombstones: compaction.drop_tombstones,
            operator: operator_of(core, compaction.keyspace),
            expires: expires(core, compaction.keyspace),
            expired_by_ms: compaction.expired_by_ms,
            table: table_options(core, compaction.keyspace, id, compaction.to),
        };
        Some((id, vec![part]))
    })
}

/// The merge operator of a keyspace that a job reads. The logical manifest may have forgotten one that the present one still has.
fn operator_of(core: &Core, keyspace: KeyspaceId) -> Option<Operator> {
    let known = |manifest: &Manifest| manifest.operators.get(&keyspace).map(|assigned| assigned.operator.clone());
    core.operators.get(&known(&core.logical).or_else(|| known(&core.present))?).cloned()
}

/// How a job builds tables of a keyspace that join a level. The logical manifest has forgotten the options of jobs that it has installed.
fn table_options(core: &Core, keyspace: KeyspaceId, job: JobId, level: u8) -> TableOptions {
    let manifest = if core.logical.jobs.contains_key(&job) { &core.logical } else { &core.present };
    core.logical.settings.tables.options(level, &manifest.options_for(keyspace, job))
}

/// Whether pairs of a keyspace that a job reads have ends: see [`operator_of`].
fn expires(core: &Core, keyspace: KeyspaceId) -> bool {
    [&core.logical, &core.present].iter().any(|manifest| manifest.expiring.contains_key(&keyspace))
}

/// The first job whose install can be offered.
fn offerable(core: &Core) -> Option<JobId> {
    // Flushes one after the other: behind the first generation that is not done or offered none may go.
    let mut flushes_end = Generation(u64::MAX);
    for (&generation, frozen) in &core.logical.generations {
        if !core.offered.contains(&frozen.job) && !core.done.contains_key(&frozen.job) {
            flushes_end = generation;
            break;
        }
    }
    core.done.keys().copied().find(|id| {
        !core.offered.contains(id)
            && match core.logical.jobs.get(id).map(|job| &**job) {
                Some(Job::Flush { generation }) => *generation < flushes_end,
                Some(Job::Compact(_)) => true,
                None => false,
            }
    })
}

impl Run {
    pub(crate) fn group(&self) -> &Arc<GroupShared> {
        &self.group
    }

    /// Counts what the job writes.
    fn counted(&self) -> &AtomicU64 {
        let stats = &self.group.engine.stats;
        let level = self.levels.and_then(|(_, to)| stats.compaction_bytes.get(usize::from(to).wrapping_sub(1)));
        level.unwrap_or(&stats.flush_bytes)
    }

    /// Tells that the job begins.
    pub(crate) fn tell_begin(&self) {
        let job = self.job;
        self.group.engine.events.tell(Some(self.group.id), || match self.levels {
            None => EventKind::FlushBegun { job },
            Some((from, to)) => {
                let tables = self.parts.iter().flat_map(|part| &part.tables);
                let read_bytes = tables.map(|table| table.meta().bytes).sum();
                EventKind::CompactionBegun { job, from, to, read_bytes }
            }
        });
    }

    /// Tells how the job ended.
    pub(crate) fn tell_end(&self, took: Duration, outcome: &Result<Vec<StoredTable>>) {
        let job = self.job;
        self.group.engine.events.tell(Some(self.group.id), || {
            let written_bytes = outcome.iter().flatten().map(|stored| stored.meta.bytes).sum();
            let failure = outcome.as_ref().err().map(ToString::to_string);
            match self.levels {
                None => EventKind::FlushEnded { job, written_bytes, took, failure },
                Some(_) => EventKind::CompactionEnded { job, written_bytes, took, failure },
            }
        });
    }

    /// Bytes to reserve before the job runs.
    pub(crate) fn estimated_bytes(&self) -> u64 {
        self.bytes
    }

    /// The inputs are read: they are free as soon as nothing names them, however late the worker is done with the job.
    pub(crate) fn let_go(&mut self) {
        self.parts.clear();
    }

    /// Reads the inputs and writes the outputs, durable.
    ///
    /// # Errors
    /// `OutOfSpace`, `Io`, `Corrupt`; nothing is left behind.
    pub(crate) async fn execute(&self, reservation: &mut Reservation) -> Result<Vec<StoredTable>> {
        let mut tables = Vec::new();
        let outcome = self.write_tables(reservation, &mut tables).await;
        match outcome {
            Ok(()) => Ok(tables),
            Err(error) => {
                discard(Output { tables });
                Err(error)
            }
        }
    }

    async fn write_tables(&self, reservation: &mut Reservation, tables: &mut Vec<StoredTable>) -> Result<()> {
        for part in &self.parts {
            let (memtables, tables_in, operator) = (part.memtables.clone(), part.tables.clone(), part.operator.clone());
            let mut input = MergeInput::with_operator(memtables, tables_in, part.drop_tombstones, operator)
                .without_expired(match part.expired_by_ms {
                    1.. if mainstay_io::mutant!(OwnClock) => {
                        u64::try_from(self.group.engine.environment.clock.unix().as_millis()).unwrap_or(u64::MAX)
                    }
                    by_log => by_log,
                });
            let mut ranges = input.ranges().await?.into_iter().peekable();
            let mut open: Option<Writing<'_>> = None;
            loop {
                let entry = input.next().await?;
                let begun = |one: &RangeTombstone| entry.is_none_or(|entry| one.range.start().as_ref() <= entry.key);
                while let Some(range) = ranges.next_if(begun) {
                    self.cut(&mut open, range.range.start(), part, tables, reservation).await?;
                    open.get_or_insert_with(|| Writing::new(self, part)).builder.add_range(range);
                }
                let Some(entry) = entry else { break };
                self.cut(&mut open, entry.key, part, tables, reservation).await?;
                let writing = open.get_or_insert_with(|| Writing::new(self, part));
                if let (true, Some(value)) = (part.expires, entry.value) {
                    writing.ends.add(value)?;
                }
                writing.builder.add_entry(entry.key, entry.index, entry.kind, entry.value.unwrap_or_default());
                if writing.builder.estimated_bytes() >= writing.written + WRITE_BYTES {
                    writing.write(reservation).await?;
                }
            }
            if let Some(last) = open {
                tables.push(last.finish(self, part, tables.len(), reservation).await?);
            }
        }
        if !tables.is_empty() && !mainstay_io::mutant!(TablesNotFlushed) {
            self.group.engine.volume.flush().await?;
        }
        Ok(())
    }

    /// Ends a table that is full before `next`; what its last range tombstone has left over begins the one after it.
    async fn cut<'a>(
        &'a self,
        open: &mut Option<Writing<'a>>,
        next: &[u8],
        part: &Part,
        tables: &mut Vec<StoredTable>,
        reservation: &mut Reservation,
    ) -> Result<()> {
        let Some(mut full) = open.take_if(|writing| writing.builder.is_full(self.table_bytes, next)) else {
            return Ok(());
        };
        if let Some(rest) = full.builder.cut(next) {
            open.insert(Writing::new(self, part)).builder.add_range(rest);
        }
        tables.push(full.finish(self, part, tables.len(), reservation).await?);
        Ok(())
    }
}

/// A table on its way to its extents.
struct Writing<'a> {
    builder: TableBuilder,
    ends: EndsOfTable,
    writer: ExtentWriter<'a>,
    written: u64,
    /// What is gathered, and what is on its way to the device.
    _memory: crate::memory::Reservation,
}

impl<'a> Writing<'a> {
    fn new(run: &'a Run, part: &Part) -> Self {
        let writer = ExtentWriter::new(&run.group.engine.volume, run.counted());
        let memory = run.group.engine.budget.reserve(MemoryKind::Buffer, 2 * WRITE_BYTES);
        let builder = TableBuilder::new(part.table.clone());
        Self { builder, ends: EndsOfTable::default(), writer, written: 0, _memory: memory }
    }

    async fn write(&mut self, reservation: &mut Reservation) -> Result<()> {
        let chunks = self.builder.take_chunks();
        self.put(reservation, chunks).await
    }

    async fn put(&mut self, reservation: &mut Reservation, chunks: Vec<AlignedBytes>) -> Result<()> {
        if chunks.is_empty() {
            return Ok(());
        }
        self.written += chunks.iter().map(|c| c.len() as u64).sum::<u64>();
        self.writer.write(reservation, chunks).await
    }

    async fn finish(
        mut self,
        run: &Run,
        part: &Part,
        ordinal: usize,
        reservation: &mut Reservation,
    ) -> Result<StoredTable> {
        let builder = std::mem::replace(&mut self.builder, TableBuilder::new(part.table.clone()));
        let (chunks, meta) = builder.finish();
        self.put(reservation, chunks).await?;
        if meta.bytes != self.written {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("a table is not as long as it says bytes={} written={}", meta.bytes, self.written),
            ));
        }
        let install = InstallTable {
            id: TableId { job: run.job, ordinal: ordinal as u32 },
            branch: part.branch,
            keyspace: part.keyspace,
            first: meta.first,
            last: meta.last,
            entries: meta.entries,
            tombstones: meta.tombstones,
            bytes: meta.bytes,
            digest: meta.digest,
            root: meta.root,
            ranges: meta.ranges,
            ends: self.ends.finish(),
        };
        let engine = &run.group.engine;
        let bytes = StoredBytes::new(engine.volume.clone(), self.writer.finish(), meta.bytes);
        StoredTable::open(Arc::new(install), bytes.clone(), &engine.cache, &engine.budget, Some(&run.group.heal))
            .inspect_err(|_| bytes.set_obsolete())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_given_up_by_what_failed_it_and_how_often() {
        const LAST: u32 = JOB_ATTEMPTS_MAX;
        for (kind, attempts, over) in [
            (ErrorKind::Io, LAST - 1, false),
            (ErrorKind::Io, LAST, true),
            (ErrorKind::Corrupt, LAST - 1, false),
            (ErrorKind::Corrupt, LAST, true),
            (ErrorKind::Unavailable, LAST, false),
            (ErrorKind::Unavailable, u32::MAX, false),
            (ErrorKind::Internal, 1, true),
        ] {
            assert_eq!(is_over(kind, attempts), over, "{kind:?} after {attempts}");
        }
    }
}
