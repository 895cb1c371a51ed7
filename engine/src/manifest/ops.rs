//! What each operation does to the manifest.

#![deny(clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use super::manual::{self, MANUALS_MAX, Manual, Next};
use super::picker::{self, Dead, Pick, Rules};
use super::version::{LEVELS, overlap, sorted};
use super::{
    Assigned, Branch, Checkpoint, Chosen, Compaction, FrozenGeneration, GenRef, Job, Keyspace, Manifest, ManifestOp,
    TableRef, Version, Versions,
};
use crate::codec::check_name;
use crate::expiry::LogClock;
use crate::{
    BranchId, Error, ErrorKind, Generation, JobId, KeyspaceId, KeyspaceOptions, LogIndex, MAIN, OperatorId, Result,
    TableId,
};

/// What an operation changed that others have to follow.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Effects {
    /// Jobs that were started, in order.
    pub(crate) started: Vec<JobId>,
    /// Jobs that came to nothing since what they were for was dropped.
    pub(crate) cancelled: Vec<JobId>,
    /// Tables that some version no longer names: to be freed where no other does.
    pub(crate) removed: Vec<TableRef>,
    /// Versions of branches that changed.
    pub(crate) changed: Vec<(BranchId, KeyspaceId)>,
    /// False for an `Install` that was without effect.
    pub(crate) took_effect: bool,
    /// The keyspace made or found.
    pub(crate) keyspace: Option<KeyspaceId>,
    /// The branch made.
    pub(crate) branch: Option<BranchId>,
    /// The generation made.
    pub(crate) generation: Option<Generation>,
}

impl Manifest {
    /// Applies an operation of entry `index`. With `picking` compactions are started where they are due; without, none
    /// is, which gives the same data.
    ///
    /// # Errors
    /// `Invalid` and `NotFound`: nothing changed, on any replica.
    pub(crate) fn apply(&mut self, index: LogIndex, op: &ManifestOp, picking: bool) -> Result<Effects> {
        let mut effects = match op {
            ManifestOp::Rotate { touched, clock } => self.rotate(index, touched, clock.unwrap_or_default()),
            ManifestOp::Install { job, tables } => self.install(*job, tables)?,
            ManifestOp::CreateKeyspace { name } => self.create_keyspace(index, name)?,
            ManifestOp::DropKeyspace { name } => self.drop_keyspace(index, name)?,
            ManifestOp::CreateCheckpoint { name, branch, time_ms } => {
                self.create_checkpoint(index, name, *branch, *time_ms)?
            }
            ManifestOp::DropCheckpoint { name } => self.drop_checkpoint(name)?,
            ManifestOp::CreateClone { name, checkpoint, time_ms } => {
                self.create_clone(index, name, checkpoint, *time_ms)?
            }
            ManifestOp::DropClone { name } => self.drop_clone(index, name)?,
            ManifestOp::SetOperator { name, operator } => self.set_operator(index, name, operator)?,
            ManifestOp::CreateExpiring { name } => self.create_expiring(index, name)?,
            ManifestOp::SetOptions { name, options } => self.set_options(index, name, options)?,
            ManifestOp::Compact { branch, keyspace, first, end } => {
                self.compact(index, (*branch, *keyspace), first.clone(), end.clone())?
            }
        };
        if effects.took_effect {
            self.as_of = index;
            self.forget_dropped(&mut effects);
            if picking {
                self.start_compactions(&mut effects);
            }
        }
        Ok(effects)
    }

    fn rotate(&mut self, index: LogIndex, touched: &[(BranchId, KeyspaceId)], clock: LogClock) -> Effects {
        let mut effects = Effects { took_effect: true, ..Effects::default() };
        let start = std::mem::replace(&mut self.rotated, index);
        let start_clock = std::mem::replace(&mut self.rotated_clock, clock);
        effects.changed = self.ended_between(start_clock.time_ms, clock.time_ms).collect();
        if touched.is_empty() {
            // The entries since then wrote nothing: a frozen generation before them reaches over them.
            if let Some(mut last) = self.generations.last_entry() {
                Arc::make_mut(last.get_mut()).end = index;
            }
            return effects;
        }
        let generation = self.next_generation;
        self.next_generation = Generation(generation.0 + 1);
        let job = self.start(Job::Flush { generation }, &mut effects);
        for &(branch, keyspace) in touched {
            if let Some(b) = self.branches.get_mut(&branch) {
                let version = Arc::make_mut(b.versions.entry(keyspace).or_default());
                version.frozen.insert(0, GenRef { generation, branch });
            }
        }
        let frozen = FrozenGeneration { start, start_clock, end: index, touched: touched.to_vec(), job };
        self.generations.insert(generation, Arc::new(frozen));
        effects.generation = Some(generation);
        effects
    }

    /// Versions of branches in which half of a table, or all of it, has ended since a time.
    fn ended_between(&self, since_ms: u64, now_ms: u64) -> impl Iterator<Item = (BranchId, KeyspaceId)> {
        let since = move |end_ms: u64| since_ms < end_ms && end_ms <= now_ms;
        let some = move |version: &Version| version.tables().any(|t| since(t.ends.half_ms) || since(t.ends.last_ms));
        self.branches.iter().flat_map(move |(&id, branch)| {
            let expiring = branch.versions.iter().filter(|(keyspace, _)| self.expiring.contains_key(keyspace));
            expiring.filter(move |(_, version)| some(version)).map(move |(&keyspace, _)| (id, keyspace))
        })
    }

    /// True where a rotation finds tables of which half or all has ended since a time.
    pub(crate) fn has_ended_between(&self, since_ms: u64, now_ms: u64) -> bool {
        self.ended_between(since_ms, now_ms).next().is_some()
    }

    fn install(&mut self, job: JobId, tables: &[TableRef]) -> Result<Effects> {
        let Some(outstanding) = self.jobs.get(&job).cloned() else { return Ok(Effects::default()) };
        if !tables.iter().enumerate().all(|(at, t)| t.id.job == job && t.id.ordinal as usize == at) {
            return Err(invalid_install(job, "its tables are not numbered in order"));
        }
        match &*outstanding {
            Job::Flush { generation } => self.install_flush(job, *generation, tables),
            Job::Compact(compaction) => self.install_compaction(job, compaction, tables),
        }
    }

    fn install_flush(&mut self, job: JobId, generation: Generation, tables: &[TableRef]) -> Result<Effects> {
        let mut effects = Effects { took_effect: true, ..Effects::default() };
        match self.generations.first_key_value() {
            Some((&oldest, frozen)) if oldest == generation => {
                if !tables.iter().all(|t| frozen.touched.contains(&(t.branch, t.keyspace))) {
                    return Err(invalid_install(job, "a table is for what the generation did not write"));
                }
            }
            // A younger generation waits for the older one: it is offered again.
            _ => return Ok(Effects::default()),
        }
        let frozen = self.generations.get(&generation).cloned().expect("it was just found");
        let mut runs = Vec::new();
        for &(branch, keyspace) in &frozen.touched {
            let run: Vec<TableRef> =
                tables.iter().filter(|t| (t.branch, t.keyspace) == (branch, keyspace)).cloned().collect();
            if !sorted(&run) {
                return Err(invalid_install(job, "tables of a run overlap"));
            }
            runs.push((GenRef { generation, branch }, keyspace, Arc::new(run)));
        }
        let install = |versions: &mut Versions| -> Vec<KeyspaceId> {
            let mut changed = Vec::new();
            for (source, keyspace, run) in &runs {
                let Some(version) = versions.get_mut(keyspace) else { continue };
                if !version.frozen.contains(source) {
                    continue;
                }
                let version = Arc::make_mut(version);
                version.frozen.retain(|f| f != source);
                if !run.is_empty() {
                    version.l0.insert(0, run.clone());
                }
                changed.push(*keyspace);
            }
            changed
        };
        for (&id, branch) in &mut self.branches {
            effects.changed.extend(install(&mut branch.versions).into_iter().map(|keyspace| (id, keyspace)));
        }
        for checkpoint in self.checkpoints.values_mut() {
            let named = checkpoint.versions.values().any(|v| v.frozen.iter().any(|f| f.generation == generation));
            if named {
                install(&mut Arc::make_mut(checkpoint).versions);
            }
        }
        // Tables that no version took are to be freed: all that named them were dropped meanwhile.
        effects.removed.extend(tables.iter().cloned());
        self.generations.remove(&generation);
        self.jobs.remove(&job);
        Ok(effects)
    }

    fn install_compaction(&mut self, job: JobId, compaction: &Compaction, tables: &[TableRef]) -> Result<Effects> {
        let place = (compaction.branch, compaction.keyspace);
        if !sorted(tables) || !tables.iter().all(|t| (t.branch, t.keyspace) == place) {
            return Err(invalid_install(job, "its tables overlap or are of another version"));
        }
        let version = self
            .branches
            .get_mut(&compaction.branch)
            .and_then(|b| b.versions.get_mut(&compaction.keyspace))
            .ok_or_else(|| invalid_install(job, "its version is gone"))?;
        let inputs: BTreeSet<_> = compaction.inputs().map(|t| t.id).collect();
        let stay = version.level(compaction.to).iter().filter(|t| !inputs.contains(&t.id)).cloned().collect::<Vec<_>>();
        if tables.iter().any(|t| !overlap(&stay, &t.first, &t.last).is_empty()) {
            return Err(invalid_install(job, "its tables overlap others of their level"));
        }
        let version = Arc::make_mut(version);
        let gone = |id| inputs.contains(&id);
        (compaction.from..=compaction.to).for_each(|level| version.remove(level, &gone));
        version.add(compaction.to, tables);
        self.jobs.remove(&job);
        self.manuals.values_mut().filter(|manual| manual.job == Some(job)).for_each(|manual| manual.job = None);
        Ok(Effects {
            took_effect: true,
            removed: compaction.inputs().cloned().collect(),
            changed: vec![place],
            ..Effects::default()
        })
    }

    fn create_keyspace(&mut self, index: LogIndex, name: &str) -> Result<Effects> {
        check_name(name)?;
        // One entry may make several, so those of this very entry count as found.
        if let Some(id) = self.keyspace_before(name, LogIndex(index.0.saturating_add(1))) {
            return Ok(Effects { keyspace: Some(id), ..Effects::default() });
        }
        let id = self.next_keyspace;
        self.next_keyspace = KeyspaceId(
            id.0.checked_add(1).ok_or_else(|| Error::new(ErrorKind::Invalid, "no keyspace number is left"))?,
        );
        self.keyspaces.insert(id, Keyspace { name: name.into(), created: index, dropped: None });
        Ok(Effects { took_effect: true, keyspace: Some(id), ..Effects::default() })
    }

    fn set_operator(&mut self, index: LogIndex, name: &str, operator: &OperatorId) -> Result<Effects> {
        check_name(operator.name())?;
        if let Some(id) = self.keyspace_before(name, index)
            && let Some(has) = self.operators.get(&id)
        {
            if has.operator == *operator {
                return Ok(Effects { keyspace: Some(id), ..Effects::default() });
            }
            let message = format!(
                "the keyspace has another merge operator keyspace={name} operator={} version={}",
                has.operator.name(),
                has.operator.version()
            );
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if let Some(id) = self.keyspace_before(name, index)
            && self.expiring.contains_key(&id)
        {
            let message = format!("pairs of the keyspace expire: it takes no merge operator keyspace={name}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let mut effects = self.create_keyspace(index, name)?;
        if let Some(id) = effects.keyspace {
            self.operators.insert(id, Assigned { operator: operator.clone(), since: index });
            effects.took_effect = true;
        }
        Ok(effects)
    }

    fn create_expiring(&mut self, index: LogIndex, name: &str) -> Result<Effects> {
        if let Some(id) = self.keyspace_before(name, index)
            && !self.expiring.contains_key(&id)
        {
            let message = format!("a keyspace of that name exists, and its pairs do not expire name={name}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let effects = self.create_keyspace(index, name)?;
        if let (true, Some(id)) = (effects.took_effect, effects.keyspace) {
            self.expiring.insert(id, index);
        }
        Ok(effects)
    }

    fn set_options(&mut self, index: LogIndex, name: &str, options: &KeyspaceOptions) -> Result<Effects> {
        options.check()?;
        let mut effects = self.create_keyspace(index, name)?;
        let Some(id) = effects.keyspace else { return Ok(effects) };
        if self.options_of(id) == *options {
            return Ok(effects);
        }
        let since = self.next_job;
        let chosen = self.options.entry(id).or_default();
        chosen.retain(|before| before.since < since);
        chosen.push(Chosen { since, options: *options });
        // Those between which no job was started that is outstanding are asked for no more.
        let until: Vec<Option<JobId>> = chosen.iter().skip(1).map(|next| Some(next.since)).chain([None]).collect();
        let mut until = until.into_iter();
        let jobs = &self.jobs;
        chosen.retain(|one| match until.next().flatten() {
            Some(end) => jobs.range(one.since..end).next().is_some(),
            None => true,
        });
        effects.took_effect = true;
        let branches = self.branches.iter().filter(|(_, branch)| branch.versions.contains_key(&id));
        effects.changed.extend(branches.map(|(&branch, _)| (branch, id)));
        Ok(effects)
    }

    fn drop_keyspace(&mut self, index: LogIndex, name: &str) -> Result<Effects> {
        let id = self.keyspace_before(name, index).ok_or_else(|| not_found("keyspace", name))?;
        if id == KeyspaceId(0) {
            return Err(Error::new(ErrorKind::Invalid, "the default keyspace cannot be dropped"));
        }
        if let Some(keyspace) = self.keyspaces.get_mut(&id) {
            keyspace.dropped = Some(index);
        }
        let mut effects = Effects { took_effect: true, ..Effects::default() };
        self.cancel(&mut effects, |_, keyspace| keyspace == id);
        Ok(effects)
    }

    fn create_checkpoint(&mut self, index: LogIndex, name: &str, branch: BranchId, created_ms: u64) -> Result<Effects> {
        check_name(name)?;
        if self.checkpoints.contains_key(name) {
            return Err(taken("checkpoint", name));
        }
        if !self.has_branch_before(branch, index) {
            return Err(Error::new(ErrorKind::NotFound, format!("no such branch branch={branch}")));
        }
        let alive = |id: &KeyspaceId| self.has_keyspace_before(*id, index);
        let versions = self.branches.get(&branch).map(|b| &b.versions).into_iter().flatten();
        let versions = versions.filter(|(id, _)| alive(id)).map(|(&id, v)| (id, v.clone())).collect();
        let keyspaces =
            self.keyspaces.iter().filter(|(id, _)| alive(id)).map(|(&id, k)| (k.name.clone(), id)).collect();
        let checkpoint = Checkpoint { index, created_ms, branch, keyspaces, versions };
        self.checkpoints.insert(name.into(), Arc::new(checkpoint));
        Ok(Effects { took_effect: true, ..Effects::default() })
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<Effects> {
        let checkpoint = self.checkpoints.remove(name).ok_or_else(|| not_found("checkpoint", name))?;
        let removed = tables_of(&checkpoint.versions);
        Ok(Effects { took_effect: true, removed, ..Effects::default() })
    }

    fn create_clone(&mut self, index: LogIndex, name: &str, checkpoint: &str, created_ms: u64) -> Result<Effects> {
        check_name(name)?;
        if self.branch_before(name, index).is_some() {
            return Err(taken("branch", name));
        }
        let from = self.checkpoints.get(checkpoint).ok_or_else(|| not_found("checkpoint", checkpoint))?;
        // A keyspace that was dropped since is dropped in every branch, this one included.
        let alive = |id: &KeyspaceId| self.has_keyspace_before(*id, index);
        let versions = from.versions.iter().filter(|(id, _)| alive(id)).map(|(&id, v)| (id, v.clone())).collect();
        let branch = Branch { name: name.into(), origin: Some(checkpoint.into()), created_ms, dropped: None, versions };
        let id = BranchId(index.0);
        self.branches.insert(id, branch);
        Ok(Effects { took_effect: true, branch: Some(id), ..Effects::default() })
    }

    fn drop_clone(&mut self, index: LogIndex, name: &str) -> Result<Effects> {
        let id = self.branch_before(name, index).ok_or_else(|| not_found("branch", name))?;
        if id == MAIN {
            return Err(Error::new(ErrorKind::Invalid, "the main branch cannot be dropped"));
        }
        if let Some(branch) = self.branches.get_mut(&id) {
            branch.dropped = Some(index);
        }
        let mut effects = Effects { took_effect: true, ..Effects::default() };
        self.cancel(&mut effects, |branch, _| branch == id);
        Ok(effects)
    }

    fn start(&mut self, job: Job, effects: &mut Effects) -> JobId {
        let id = self.next_job;
        self.next_job = JobId(id.0 + 1);
        self.jobs.insert(id, Arc::new(job));
        effects.started.push(id);
        id
    }

    fn compact(
        &mut self,
        index: LogIndex,
        place: (BranchId, KeyspaceId),
        first: Bytes,
        end: Option<Bytes>,
    ) -> Result<Effects> {
        let (branch, keyspace) = place;
        if self.version(branch, keyspace).is_none() || end.as_ref().is_some_and(|end| *end <= first) {
            return Ok(Effects::default());
        }
        if self.manuals.len() >= MANUALS_MAX {
            let message = format!("too many compactions wait: ask again when some have ended max={MANUALS_MAX}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let before = self.next_job;
        let manual = Manual { branch, keyspace, cursor: first.clone(), first, end, before, level: 0, job: None };
        self.manuals.insert(index, manual);
        Ok(Effects { took_effect: true, changed: vec![place], ..Effects::default() })
    }

    fn cancel(&mut self, effects: &mut Effects, of: impl Fn(BranchId, KeyspaceId) -> bool) {
        self.manuals.retain(|_, manual| !of(manual.branch, manual.keyspace));
        let gone = self.jobs.iter().filter(|(_, job)| matches!(&***job, Job::Compact(c) if of(c.branch, c.keyspace)));
        let gone: Vec<JobId> = gone.map(|(&id, _)| id).collect();
        for id in gone {
            self.jobs.remove(&id);
            effects.cancelled.push(id);
        }
    }

    /// Lets go of what was dropped at or before the flushed index (invariant 3 of the manifest).
    fn forget_dropped(&mut self, effects: &mut Effects) {
        let flushed = self.flushed();
        let passed = |dropped: Option<LogIndex>| dropped.is_some_and(|at| at <= flushed);
        self.branches.retain(|_, branch| {
            let gone = passed(branch.dropped);
            if gone {
                effects.removed.extend(tables_of(&branch.versions));
            }
            !gone
        });
        let keyspaces: Vec<KeyspaceId> =
            self.keyspaces.iter().filter(|(_, k)| passed(k.dropped)).map(|(&id, _)| id).collect();
        for id in keyspaces {
            self.keyspaces.remove(&id);
            for branch in self.branches.values_mut() {
                let version = branch.versions.remove(&id);
                effects.removed.extend(version.iter().flat_map(|v| v.tables()).cloned());
            }
        }
        if !self.operators.is_empty() || !self.expiring.is_empty() || !self.options.is_empty() {
            let (keyspaces, checkpoints) = (&self.keyspaces, &self.checkpoints);
            let kept = |id: &KeyspaceId| checkpoints.values().any(|c| c.keyspaces.iter().any(|(_, of)| of == id));
            let kept = |id: &KeyspaceId| keyspaces.contains_key(id) || kept(id);
            self.operators.retain(|id, _| kept(id));
            self.options.retain(|id, _| kept(id));
            if !self.expiring.is_empty() {
                self.expiring.retain(|id, _| kept(id));
                self.forget_time();
            }
        }
    }

    /// Without an expiring keyspace nothing is known of time: what is not written anywhere must not be found later.
    fn forget_time(&mut self) {
        if self.expiring.is_empty() {
            self.rotated_clock = LogClock::default();
            for generation in self.generations.values_mut() {
                Arc::make_mut(generation).start_clock = LogClock::default();
            }
        }
    }

    /// Starts what is due in the versions that changed.
    fn start_compactions(&mut self, effects: &mut Effects) {
        let settings = self.settings;
        let mut changed = effects.changed.clone();
        changed.sort_unstable();
        changed.dedup();
        for (branch, keyspace) in changed {
            let alive = self.branches.get(&branch).is_some_and(|b| b.dropped.is_none())
                && self.keyspaces.get(&keyspace).is_some_and(|k| k.dropped.is_none());
            if !alive {
                continue;
            }
            // At or before the time of this entry, and so of every reader of what is left.
            let time_ms = if self.expiring.contains_key(&keyspace) { self.rotated_clock.time_ms } else { 0 };
            let style = self.options_of(keyspace).compaction;
            let rules = Rules { settings: &settings, style, time_ms };
            while let Some(version) = self.version(branch, keyspace) {
                let mut busy = BTreeSet::new();
                let mut outstanding = 0;
                for job in self.jobs.values() {
                    if let Job::Compact(c) = &**job
                        && (c.branch, c.keyspace) == (branch, keyspace)
                    {
                        busy.extend(c.inputs().map(|t| t.id));
                        outstanding += 1;
                    }
                }
                // What is dropped unread need not be compacted by whoever asked for it.
                let picker_first = picker::l0_is_due(&rules, version, &busy)
                    || !picker::hidden_tables(version, &busy, time_ms).is_empty();
                let manual = match picker_first {
                    true => None,
                    false => self.next_manual(branch, keyspace, &busy, outstanding, time_ms),
                };
                let pick = match &manual {
                    Some((_, pick)) => Some(pick.clone()),
                    None => self
                        .version(branch, keyspace)
                        .and_then(|version| picker::pick(&rules, branch, keyspace, version, &busy, outstanding)),
                };
                let (job, upper) = match pick {
                    None => break,
                    Some(Pick::Start(mut compaction)) => {
                        compaction.expired_by_ms = time_ms;
                        let upper = compaction.upper.clone();
                        (Some(self.start(Job::Compact(compaction), effects)), upper)
                    }
                    Some(Pick::Move { from, to, tables }) => {
                        // Each move takes tables down, so the loop ends.
                        let Some(version) = self.branches.get_mut(&branch).and_then(|b| b.versions.get_mut(&keyspace))
                        else {
                            break;
                        };
                        let version = Arc::make_mut(version);
                        let moved: BTreeSet<_> = tables.iter().map(|t| t.id).collect();
                        (from..to).for_each(|level| version.remove(level, &|id| moved.contains(&id)));
                        version.add(to, &tables);
                        (None, tables)
                    }
                    Some(Pick::Drop { tables }) => {
                        let Some(version) = self.branches.get_mut(&branch).and_then(|b| b.versions.get_mut(&keyspace))
                        else {
                            break;
                        };
                        let version = Arc::make_mut(version);
                        let gone: BTreeSet<_> = tables.iter().map(|t| t.id).collect();
                        (0..=LEVELS as u8).for_each(|level| version.remove(level, &|id| gone.contains(&id)));
                        effects.removed.extend(tables);
                        continue;
                    }
                };
                if let Some(manual) = manual.and_then(|(index, _)| self.manuals.get_mut(&index)) {
                    manual.took(&upper, job);
                }
            }
        }
    }

    /// The next step of the oldest compaction that was asked for of a version, if one can be taken. Those that have ended go.
    fn next_manual(
        &mut self,
        branch: BranchId,
        keyspace: KeyspaceId,
        busy: &BTreeSet<TableId>,
        outstanding: usize,
        time_ms: u64,
    ) -> Option<(LogIndex, Pick)> {
        loop {
            let version = self.branches.get(&branch)?.versions.get(&keyspace)?.clone();
            let place = |manual: &Manual| (manual.branch, manual.keyspace) == (branch, keyspace);
            let (&index, manual) = self.manuals.iter_mut().find(|(_, manual)| place(manual))?;
            let older = |f: &GenRef| self.generations.get(&f.generation).is_some_and(|g| g.job < manual.before);
            let unflushed = version.frozen.iter().any(older);
            let base = picker::targets(&version, self.settings.base_level_bytes).base;
            let expiring = self.expiring.contains_key(&keyspace);
            let dead = Dead { share: manual::SHARE, time_ms };
            match manual.next(&version, base, busy, unflushed, expiring, dead) {
                Next::Wait => return None,
                Next::Take { from, inputs } => {
                    let pick = picker::decide(branch, keyspace, &version, outstanding, from, inputs, dead)?;
                    return Some((index, pick));
                }
                Next::Done => drop(self.manuals.remove(&index)),
            }
        }
    }

    pub(crate) fn version(&self, branch: BranchId, keyspace: KeyspaceId) -> Option<&Version> {
        self.branches.get(&branch)?.versions.get(&keyspace).map(|v| &**v)
    }
}

fn tables_of(versions: &Versions) -> Vec<TableRef> {
    versions.values().flat_map(|v| v.tables()).cloned().collect()
}

fn invalid_install(job: JobId, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("what a job produced cannot be installed: {why} job={job}"))
}

fn not_found(what: &str, name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("no such {what} name={name}"))
}

fn taken(what: &str, name: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("a {what} of that name exists name={name}"))
}
