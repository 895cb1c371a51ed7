//! The embedder's own commands, decided at apply.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::command::{WriteOp, check_key};
use crate::expiry::{check_stamped, not_expiring};
use crate::merge_operator::join_operands;
use crate::own_writes::OwnWrites;
use crate::range_tombstone::{KeyRange, fold};
use crate::{Error, ErrorKind, KeyspaceId, LogIndex, Result, Snapshot};

/// Answers `Custom` commands. It runs on every replica, in log order, and must be deterministic: it may read the store
/// through [`Apply`] and the command, and nothing else. Table digests tell when it is not.
pub trait StateMachine: Send + Sync + 'static {
    /// Reads and writes through `apply` inside one atomic batch and answers. On `Err` nothing is written and the error
    /// is the answer. Unless the store could not read for it: then whatever was answered counts for nothing, since no other
    /// replica would answer so. `restored` is called; then the entry is applied again when what is damaged here can be had from
    /// another replica, or this one leaves service.
    fn apply<'a>(
        &'a self,
        apply: &'a mut Apply,
        command: Bytes,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Bytes>> + Send + 'a>>;

    /// The writes of the entry at `index` are readable. For notifications on this replica; runs on the applier.
    fn applied(&self, index: LogIndex) {
        let _ = index;
    }

    /// The state was replaced or reopened and stands at `index`: anything held in memory is to be read again.
    fn restored(&self, index: LogIndex) {
        let _ = index;
    }
}

/// Reads of a command until others may run: a tenth of a millisecond of what is cached.
const READS_AT_ONCE: u64 = 64;

/// The view that a state machine has of the store while it applies one entry: everything applied before, its own
/// writes on top.
pub struct Apply {
    index: LogIndex,
    time_ms: u64,
    before: Snapshot,
    /// In replay: keyspaces that this entry has made.
    made: BTreeMap<String, KeyspaceId>,
    next_keyspace: KeyspaceId,
    /// Keyspaces to be made, in order.
    created: Vec<(String, KeyspaceId)>,
    writes: OwnWrites,
    /// What the store could not read for it.
    broken: OnceLock<Error>,
    /// So far.
    reads: AtomicU64,
}

impl Apply {
    pub(crate) fn new(
        index: LogIndex,
        time_ms: u64,
        before: Snapshot,
        made: BTreeMap<String, KeyspaceId>,
        next_keyspace: KeyspaceId,
    ) -> Self {
        let (created, writes) = (Vec::new(), OwnWrites::new(index.0 ^ time_ms.rotate_left(32)));
        let (broken, reads) = (OnceLock::new(), AtomicU64::new(0));
        Self { index, time_ms, before, made, next_keyspace, created, writes, broken, reads }
    }

    /// Why nothing that was decided here may count: this replica could not read what all others can. An answer that came of
    /// it, whatever it is, would be of this replica alone.
    pub(crate) fn broken(&self) -> Option<&Error> {
        self.broken.get()
    }

    /// Notes an error that depends on this replica and not on the entries.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Invalid)
        {
            // The first one counts.
            let _ = self.broken.set(error.clone());
        }
        result
    }

    /// Lets others run after every [`READS_AT_ONCE`] reads: what is cached is read without a wait, and a command may read a
    /// million keys.
    async fn pause(&self) {
        if self.reads.fetch_add(1, Ordering::Relaxed) % READS_AT_ONCE == READS_AT_ONCE - 1 {
            mainstay_io::yield_once().await;
        }
    }

    /// It has written nothing.
    pub(crate) fn is_clean(&self) -> bool {
        self.created.is_empty() && self.writes.is_empty()
    }

    /// The keyspaces to make, and the mutations: removed ranges, then one a key.
    pub(crate) fn into_parts(self) -> (Vec<(String, KeyspaceId)>, Vec<WriteOp>) {
        (self.created, self.writes.into_ops())
    }

    /// The index of the entry.
    pub fn index(&self) -> LogIndex {
        self.index
    }

    /// The proposer's wall clock, milliseconds since the Unix epoch.
    pub fn time_ms(&self) -> u64 {
        self.time_ms
    }

    /// The id of a keyspace, made if it is absent.
    ///
    /// # Errors
    /// `Invalid` for a name of 0 or more than 255 bytes.
    pub fn keyspace(&mut self, name: &str) -> Result<KeyspaceId> {
        crate::codec::check_name(name)?;
        if let Some(id) = self.before.keyspace(name).or_else(|| self.made.get(name).copied()) {
            return Ok(id);
        }
        if let Some((_, id)) = self.created.iter().find(|(created, _)| created == name) {
            return Ok(*id);
        }
        let id = self.next_keyspace;
        self.next_keyspace = KeyspaceId(
            id.0.checked_add(1)
                .ok_or_else(|| crate::Error::new(crate::ErrorKind::Invalid, "no keyspace number is left"))?,
        );
        self.created.push((name.to_owned(), id));
        Ok(id)
    }

    /// The value of a key.
    ///
    /// # Errors
    /// `NotFound` for an unknown keyspace, `Io`, `Corrupt`.
    pub async fn get(&self, keyspace: KeyspaceId, key: &[u8]) -> Result<Option<Bytes>> {
        Ok(self.get_version(keyspace, key).await?.map(|(_, value)| value))
    }

    /// The value of a key, and the entry that wrote it: this one for what it has written itself.
    ///
    /// # Errors
    /// As [`Apply::get`].
    pub async fn get_version(&self, keyspace: KeyspaceId, key: &[u8]) -> Result<Option<(LogIndex, Bytes)>> {
        self.pause().await;
        if let Some(value) = self.writes.get(keyspace, key) {
            return Ok(value.clone().map(|value| (self.index, value)));
        }
        if self.is_new(keyspace) {
            return Ok(None);
        }
        self.noted(self.before.get_version(keyspace, key).await)
    }

    /// The values of many keys, in their order, with the blocks that are not cached read from the device together. A command that knows
    /// the keys that it needs asks for all of them at once: the entries behind it wait for its reads.
    ///
    /// # Errors
    /// As [`Apply::get`].
    pub async fn get_many<K: AsRef<[u8]>>(&self, keyspace: KeyspaceId, keys: &[K]) -> Result<Vec<Option<Bytes>>> {
        let mut found = Vec::with_capacity(keys.len());
        for some in keys.chunks(READS_AT_ONCE as usize) {
            let own: Vec<_> = some.iter().map(|key| self.writes.get(keyspace, key.as_ref())).collect();
            let wanted = some.iter().zip(&own).filter(|(_, own)| own.is_none() && !self.is_new(keyspace));
            let wanted: Vec<&[u8]> = wanted.map(|(key, _)| key.as_ref()).collect();
            for _ in some {
                self.pause().await;
            }
            let before = match wanted.is_empty() {
                true => Vec::new(),
                false => self.noted(self.before.get_many(keyspace, &wanted).await)?,
            };
            let mut before = before.into_iter();
            found.extend(own.into_iter().map(|own| match own {
                Some(value) => value.clone(),
                None => before.next().flatten(),
            }));
        }
        Ok(found)
    }

    /// Whether the bounds hold `count` pairs, none of them written after `since`. Looks at so many pairs and one more at most.
    pub(crate) async fn is_unchanged(
        &self,
        keyspace: KeyspaceId,
        lower: &Bound<Bytes>,
        upper: &Bound<Bytes>,
        since: LogIndex,
        count: u64,
    ) -> Result<bool> {
        if is_empty(lower, upper) {
            return Ok(count == 0);
        }
        let own = self.own(keyspace, lower, upper, false).filter(|(_, value)| value.is_some()).count() as u64;
        if own > 0 && self.index > since {
            return Ok(false);
        }
        let (mut live, mut scan) = (own, self.before.range(keyspace, lower.clone(), upper.clone()));
        while live <= count && !self.is_new(keyspace) {
            self.pause().await;
            let Some((key, _)) = self.noted(scan.next().await)? else { break };
            if self.writes.get(keyspace, &key).is_some() {
                // It was counted as its own, or is removed.
                if let Some(range) = self.writes.removed_range(keyspace, &key) {
                    self.noted(scan.seek(range.end_place()).await)?;
                }
                continue;
            }
            if scan.version() > since {
                return Ok(false);
            }
            live += 1;
        }
        Ok(live == count)
    }

    /// Up to `limit` pairs within the bounds, in order of keys.
    ///
    /// # Errors
    /// As [`Apply::get`].
    pub async fn range(
        &self,
        keyspace: KeyspaceId,
        lower: Bound<&[u8]>,
        upper: Bound<&[u8]>,
        reverse: bool,
        limit: usize,
    ) -> Result<Vec<(Bytes, Bytes)>> {
        let (lower, upper) = (lower.map(Bytes::copy_from_slice), upper.map(Bytes::copy_from_slice));
        let mut found = Vec::new();
        if limit == 0 || is_empty(&lower, &upper) {
            return Ok(found);
        }
        let mut own = self.own(keyspace, &lower, &upper, reverse).peekable();
        let mut scan = (!self.is_new(keyspace)).then(|| self.before.range(keyspace, lower.clone(), upper.clone()));
        let mut stored: Option<(Bytes, Bytes)> = None;
        while found.len() < limit {
            self.pause().await;
            if stored.is_none()
                && let Some(open) = &mut scan
            {
                let next = if reverse { open.next_back().await } else { open.next().await };
                stored = self.noted(next)?;
                let Some((key, _)) = &stored else {
                    scan = None;
                    continue;
                };
                if let Some(range) = self.writes.removed_range(keyspace, key) {
                    stored = None;
                    // On behind the range, to whichever side that is.
                    let (lower, upper) = if reverse {
                        (lower.clone(), Bound::Excluded(range.start().clone()))
                    } else {
                        (Bound::Included(range.end_place().clone()), upper.clone())
                    };
                    scan = (!is_empty(&lower, &upper)).then(|| self.before.range(keyspace, lower, upper));
                    continue;
                }
            }
            // Of two with one key its own write wins.
            let order = match (own.peek(), &stored) {
                (None, None) => break,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some((key, _)), Some((other, _))) if reverse => other.cmp(key),
                (Some((key, _)), Some((other, _))) => (*key).cmp(other),
            };
            if order != std::cmp::Ordering::Greater {
                if order == std::cmp::Ordering::Equal {
                    stored = None;
                }
                if let Some((key, Some(value))) = own.next() {
                    found.push((key.clone(), value.clone()));
                }
            } else {
                found.extend(stored.take());
            }
        }
        Ok(found)
    }

    /// Sets a key of an expiring keyspace for a time, which begins with the time of this entry.
    ///
    /// # Errors
    /// `Invalid` for a key, value or time outside of its limits, or a keyspace that is not expiring; `NotFound` for an unknown one.
    pub fn put_for(
        &mut self,
        keyspace: KeyspaceId,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        ttl: Duration,
    ) -> Result<()> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        let op = WriteOp::PutFor { keyspace, key: key.into(), value: value.into(), ttl_ms };
        self.check(&op)?;
        write(&mut self.writes, &op);
        Ok(())
    }

    /// Sets a key.
    ///
    /// # Errors
    /// `Invalid` for a key or value outside of its limits, `NotFound` for an unknown keyspace.
    pub fn put(&mut self, keyspace: KeyspaceId, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<()> {
        let op = WriteOp::Put { keyspace, key: key.into(), value: value.into() };
        self.check(&op)?;
        if let WriteOp::Put { keyspace, key, value } = op {
            self.writes.write(keyspace, key, Some(value));
        }
        Ok(())
    }

    /// Removes a key.
    ///
    /// # Errors
    /// `Invalid` for a key outside of its limits, `NotFound` for an unknown keyspace.
    pub fn delete(&mut self, keyspace: KeyspaceId, key: impl Into<Bytes>) -> Result<()> {
        let key = key.into();
        check_key(&key)?;
        self.check_keyspace(keyspace)?;
        self.writes.write(keyspace, key, None);
        Ok(())
    }

    /// Removes all keys within the bounds, however many there are, for what one mutation costs. What this command writes to them later
    /// stays.
    ///
    /// # Errors
    /// `Invalid` for bounds that hold no key or are longer than keys are, `NotFound` for an unknown keyspace.
    pub fn delete_range(&mut self, keyspace: KeyspaceId, lower: Bound<Bytes>, upper: Bound<Bytes>) -> Result<()> {
        let range = KeyRange::new(lower, upper);
        range.check()?;
        self.check_keyspace(keyspace)?;
        self.writes.remove_range(keyspace, &range);
        Ok(())
    }

    /// Takes checked mutations over, all or none: operands are merged here.
    ///
    /// # Errors
    /// `Invalid`: an operator refuses, and nothing was written. As [`Apply::get`].
    pub(crate) async fn write_all(&mut self, ops: &[WriteOp]) -> Result<()> {
        if !ops.iter().any(|op| matches!(op, WriteOp::Merge { .. })) {
            ops.iter().for_each(|op| write(&mut self.writes, op));
            return Ok(());
        }
        let ops = &*fold(ops);
        // Beside what was written before, which stays if one of them is refused.
        let mut own = OwnWrites::new(self.index.0 ^ self.time_ms.rotate_left(32));
        for (op, operands) in &join_operands(ops) {
            if operands.is_empty() {
                write(&mut own, op);
                continue;
            }
            let (keyspace, key) = (op.keyspace(), op.key());
            let value = match own.get(keyspace, key) {
                Some(value) => value.clone(),
                None => self.get(keyspace, key).await?,
            };
            let merged = self.before.merge_all(keyspace, key, value.as_deref(), operands)?;
            own.write(keyspace, key.clone(), merged);
        }
        own.into_ops().iter().for_each(|op| write(&mut self.writes, op));
        Ok(())
    }

    /// Merges an operand into a key by the merge operator of its keyspace.
    ///
    /// # Errors
    /// `NotFound` for an unknown keyspace, `Invalid` for one without a merge operator, for bad lengths, and when the operator refuses:
    /// nothing was written. As [`Apply::get`].
    pub async fn merge(
        &mut self,
        keyspace: KeyspaceId,
        key: impl Into<Bytes>,
        operand: impl Into<Bytes>,
    ) -> Result<()> {
        let op = WriteOp::Merge { keyspace, key: key.into(), operand: operand.into() };
        self.check(&op)?;
        self.write_all(&[op]).await
    }

    /// Refuses what cannot be written.
    ///
    /// # Errors
    /// As [`Apply::merge`].
    pub(crate) fn check(&self, op: &WriteOp) -> Result<()> {
        op.check()?;
        self.check_keyspace(op.keyspace())?;
        match op {
            WriteOp::Merge { keyspace, operand, .. } => self.before.check_operand(*keyspace, operand),
            _ => self.check_life(op),
        }
    }

    /// Refuses a put for a time where none is, and a value that has no room for its end.
    fn check_life(&self, op: &WriteOp) -> Result<()> {
        match op.value() {
            Some(value) if self.before.expires(op.keyspace()) => check_stamped(op.keyspace(), value),
            _ if op.ttl_ms() > 0 => Err(not_expiring(op.keyspace())),
            _ => Ok(()),
        }
    }

    fn is_new(&self, keyspace: KeyspaceId) -> bool {
        self.created.iter().any(|(_, id)| *id == keyspace) || self.made.values().any(|id| *id == keyspace)
    }

    fn check_keyspace(&self, keyspace: KeyspaceId) -> Result<()> {
        if self.is_new(keyspace) || self.before.has_keyspace(keyspace) {
            return Ok(());
        }
        Err(crate::snapshot::no_keyspace(keyspace))
    }

    /// Own writes within the bounds, in the order asked for.
    fn own<'a>(
        &'a self,
        keyspace: KeyspaceId,
        lower: &'a Bound<Bytes>,
        upper: &'a Bound<Bytes>,
        reverse: bool,
    ) -> Box<dyn Iterator<Item = (&'a Bytes, &'a Option<Bytes>)> + Send + 'a> {
        // The bounds hold a key, or the caller would not be here: no range begins behind its end.
        let at = |key: &Bytes| (keyspace, key.clone());
        let from = match lower {
            Bound::Included(key) => Bound::Included(at(key)),
            Bound::Excluded(key) => Bound::Excluded(at(key)),
            Bound::Unbounded => Bound::Included((keyspace, Bytes::new())),
        };
        let to = match upper {
            Bound::Included(key) => Bound::Included(at(key)),
            Bound::Excluded(key) => Bound::Excluded(at(key)),
            Bound::Unbounded => match keyspace.0.checked_add(1) {
                Some(next) => Bound::Excluded((KeyspaceId(next), Bytes::new())),
                None => Bound::Unbounded,
            },
        };
        let all = self.writes.range(from, to);
        if reverse { Box::new(all.rev()) } else { Box::new(all) }
    }
}

/// Writes a mutation that was checked before, and merges nothing.
fn write(writes: &mut OwnWrites, op: &WriteOp) {
    match op {
        WriteOp::PutFor { keyspace, key, value, ttl_ms } => {
            writes.write_for(*keyspace, key.clone(), value.clone(), *ttl_ms);
        }
        WriteOp::DeleteRange { keyspace, range } => writes.remove_range(*keyspace, range),
        _ => writes.write(op.keyspace(), op.key().clone(), op.value().cloned()),
    }
}

/// True for bounds that hold no key.
pub(crate) fn is_empty(lower: &Bound<Bytes>, upper: &Bound<Bytes>) -> bool {
    match (lower, upper) {
        (Bound::Included(lower), Bound::Included(upper)) => lower > upper,
        (Bound::Included(lower) | Bound::Excluded(lower), Bound::Excluded(upper))
        | (Bound::Excluded(lower), Bound::Included(upper)) => lower >= upper,
        _ => false,
    }
}
