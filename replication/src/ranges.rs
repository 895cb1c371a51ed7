//! A keyspace placed on groups by key range: who holds a key, and reads and writes that find out.
//!
//! # Place
//! above [`Node`] and its groups: all that it does is batches and reads of theirs, so it needs no state of its own
//! # Invariants
//! - Q1. A write carries the row of its range as a condition, so it is applied in the group that holds the range when it is applied, or
//!   nowhere. What a replica believes of the ranges is a hint: a wrong one costs another attempt.
//! - Q2. A read looks at the row in the very view that it reads from.
//! - Q3. A range changes hands by the entry of its old group that makes `Leaving` into `Left`; the new group answers for it only behind
//!   that entry. See [`mover`](self) for the order.
//! - Q4. Keys of two groups are in no batch: nothing would order them.
//! # Why not
//! A directory of all ranges in the first group: every process holds a replica of every group, so the rows of the groups are at hand,
//! and a second truth would have to be kept equal to them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use mainstay_engine::{
    Applied, CommandBody, Condition, ConditionalBatch, KeyRange, KeyspaceId, MAIN, Scan, Snapshot, Value, WriteBatch,
    WriteOp,
};
use openraft_rt::Instant;

use crate::node::{Inner, Write};
use crate::write::{RETRY_PAUSE, WRITE_TIMEOUT};
use crate::{Durability, Error, ErrorKind, Node, ReadLevel, Result, Runtime, TokioRuntime};

mod mover;
mod row;

use row::{Layout, Row, State, birth_key, births, name_of_birth, row_key};

/// The keyspace of each group that holds the rows.
const RANGES_KEYSPACE: &str = "mainstay.ranges";
/// What the keyspace of each group begins with that holds the keys; the name follows.
const PLACED_KEYSPACE_PREFIX: &str = "mainstay.placed.";
/// Longest name of a placed keyspace, in bytes.
pub const PLACED_NAME_BYTES_MAX: usize = 200;
/// How the first group is called among the others.
const FIRST: &str = "";
/// Bytes of a key that a message shows.
const SHOWN_BYTES_MAX: usize = 128;
/// What waits so long for one attempt at a move takes the move on itself.
const HELP_AFTER: Duration = Duration::from_secs(4);

/// One mutation of a placed keyspace.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlacedOp {
    /// Sets a key.
    Put {
        /// 1 to [`mainstay_engine::KEY_BYTES_MAX`] bytes.
        key: Bytes,
        /// At most [`mainstay_engine::VALUE_BYTES_MAX`] bytes.
        value: Bytes,
    },
    /// Removes a key; nothing if it is absent.
    Delete {
        /// 1 to [`mainstay_engine::KEY_BYTES_MAX`] bytes.
        key: Bytes,
    },
    /// Removes all keys of a range, however many there are. One group holds all of it.
    DeleteRange {
        /// Which keys.
        range: KeyRange,
    },
}

impl PlacedOp {
    /// The first key that it may write.
    fn first(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
            Self::DeleteRange { range } => range.start(),
        }
    }

    /// The rows of what it may write, each with a key of it; none where nobody is known to answer for one.
    fn rows<'a>(&self, layout: &'a Layout) -> Option<Vec<(&'a str, &'a Row, Bytes)>> {
        let mut rows = Vec::new();
        let mut key = self.first().clone();
        loop {
            let (group, row) = layout.covering(&key)?;
            rows.push((group, row, key));
            match (self, &row.end) {
                (Self::DeleteRange { range }, Some(end)) if range.contains(end) => key = end.clone(),
                _ => return Some(rows),
            }
        }
    }

    fn in_keyspace(&self, keyspace: KeyspaceId) -> WriteOp {
        match self.clone() {
            Self::Put { key, value } => put(keyspace, key, value),
            Self::Delete { key } => WriteOp::Delete { keyspace, key },
            Self::DeleteRange { range } => WriteOp::DeleteRange { keyspace, range },
        }
    }
}

/// A range of keys and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeInfo {
    /// Its first key; empty for the first range.
    pub first: Bytes,
    /// Where the next one begins; none for the last range.
    pub end: Option<Bytes>,
    /// The group that holds it; none for the first group.
    pub group: Option<String>,
    /// It is on its way to another group: its writes wait.
    pub is_moving: bool,
}

/// A keyspace of a cluster whose ranges of keys lie in different groups, so that more than one leader orders its writes.
///
/// Cloning shares it. It is one range of the first group until [`Placed::split`] and [`Placed::move_range`] are called; both work while
/// it is read and written. Cloning, checkpoints and snapshots are of one group each, and so of no use here.
pub struct Placed<R: Runtime = TokioRuntime> {
    node: Node<R>,
    shared: Arc<Shared<R>>,
}

impl<R: Runtime> Clone for Placed<R> {
    fn clone(&self) -> Self {
        Self { node: self.node.clone(), shared: self.shared.clone() }
    }
}

struct Shared<R: Runtime> {
    name: String,
    /// What was found last; none to look again.
    view: Mutex<Option<Arc<View<R>>>>,
}

/// What this replica believes.
struct View<R: Runtime> {
    layout: Layout,
    groups: BTreeMap<String, Arc<Inner<R>>>,
}

/// A row as a batch changes it: nothing is written unless it is still `old`.
struct Change {
    first: Bytes,
    old: Option<Row>,
    new: Option<Row>,
}

impl<R: Runtime> Node<R> {
    /// The keyspace of that name that is placed on the groups of this cluster by key range. It is made if it is absent: one range, in the
    /// first group. It has nothing in common with a keyspace of a group of the same name.
    ///
    /// # Errors
    /// `Invalid`: a name of 0 or more than [`PLACED_NAME_BYTES_MAX`] bytes. `Unsupported`: this is the handle of another group than the
    /// first. Else as [`Node::write`]: the same call again finds what was made.
    /// # Cancel safety
    /// Not cancel safe, but the same call again finishes it.
    pub async fn placed(&self, name: &str) -> Result<Placed<R>> {
        let placed = self.handle_of(name)?;
        placed.be_born().boxed().await?;
        Ok(placed)
    }

    /// The placed keyspace of that name, if it was made.
    ///
    /// # Errors
    /// `NotFound`: nobody made it. `Invalid`, `Unsupported`: as [`Node::placed`]. Else as [`Node::read_barrier`]. Cancel safe.
    pub async fn open_placed(&self, name: &str) -> Result<Placed<R>> {
        let placed = self.handle_of(name)?;
        match placed.is_born().boxed().await? {
            true => Ok(placed),
            false => Err(Error::new(ErrorKind::NotFound, format!("no such placed keyspace name={name}"))),
        }
    }

    /// Names of the placed keyspaces that were made, in order.
    ///
    /// # Errors
    /// `Unsupported`: this is the handle of another group than the first. Else as [`Node::read_barrier`]. Cancel safe.
    pub async fn placed_names(&self) -> Result<Vec<String>> {
        self.inner.check_first()?;
        let snapshot = snapshot_of(&self.inner, ReadLevel::Linearizable).boxed().await?;
        let mut names = Vec::new();
        let Some(rows) = snapshot.keyspace(RANGES_KEYSPACE) else { return Ok(names) };
        let (lower, upper) = births();
        let mut scan = snapshot.range(rows, Bound::Excluded(lower), Bound::Excluded(upper));
        while let Some((key, _)) = scan.next().await? {
            names.push(name_of_birth(&key)?);
        }
        Ok(names)
    }

    fn handle_of(&self, name: &str) -> Result<Placed<R>> {
        self.inner.check_first()?;
        if name.is_empty() || name.len() > PLACED_NAME_BYTES_MAX {
            let message = format!("the name of a placed keyspace has 1 to {PLACED_NAME_BYTES_MAX} bytes name={name}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let shared = Arc::new(Shared { name: name.to_owned(), view: Mutex::new(None) });
        Ok(Placed { node: self.clone(), shared })
    }
}

impl<R: Runtime> Placed<R> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The first range is written once in the life of a cluster, whoever asks for it and however often.
    async fn be_born(&self) -> Result<()> {
        if self.is_born().await? {
            return Ok(());
        }
        let first = &self.node.inner;
        let rows = self.keyspace_of(first, RANGES_KEYSPACE).await?;
        let birth = birth_key(&self.shared.name);
        let row = Row::held(Bytes::new(), None);
        let key = row_key(&self.shared.name, &row.first);
        let ops = vec![put(rows, birth.clone(), Bytes::new()), put(rows, key, row.encode())];
        match self.swap(first, vec![has(rows, birth, None)], ops, Durability::Quorum).await {
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(()),
            other => other.map(drop),
        }
    }

    /// As of all that was acknowledged before the call.
    async fn is_born(&self) -> Result<bool> {
        let snapshot = snapshot_of(&self.node.inner, ReadLevel::Linearizable).await?;
        let Some(rows) = snapshot.keyspace(RANGES_KEYSPACE) else { return Ok(false) };
        Ok(snapshot.get(rows, &birth_key(&self.shared.name)).await?.is_some())
    }

    /// The keyspace of that name in a group, made if it is absent there.
    async fn keyspace_of(&self, group: &Arc<Inner<R>>, name: &str) -> Result<KeyspaceId> {
        if let Some(id) = group.group.keyspace(name) {
            return Ok(id);
        }
        let body = CommandBody::CreateKeyspace { name: name.to_owned() };
        group.write(Write { body, durability: Durability::Quorum }).await?.response?;
        group.read_barrier(ReadLevel::Linearizable).await?;
        let made = group.group.keyspace(name);
        made.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("a keyspace was dropped name={name}")))
    }

    fn data_name(&self) -> String {
        format!("{PLACED_KEYSPACE_PREFIX}{}", self.shared.name)
    }

    /// What this replica has applied of the ranges, as of the last look.
    async fn view(&self) -> Result<Arc<View<R>>> {
        let known = self.shared.view.lock().expect("nothing panics while it holds this lock").clone();
        if let Some(view) = known {
            return Ok(view);
        }
        let mut groups = self.node.inner.groups_by_name();
        groups.insert(FIRST.to_owned(), self.node.inner.clone());
        let mut layout = Layout::default();
        for (name, group) in &groups {
            let snapshot = snapshot_of(group, ReadLevel::Local).await?;
            for row in self.rows_in(&snapshot).await? {
                layout.add(name, row);
            }
        }
        let view = Arc::new(View { layout, groups });
        *self.shared.view.lock().expect("nothing panics while it holds this lock") = Some(view.clone());
        Ok(view)
    }

    /// The next [`Placed::view`] looks again.
    fn forget_view(&self) {
        *self.shared.view.lock().expect("nothing panics while it holds this lock") = None;
    }

    /// All rows of this keyspace in a view of a group.
    async fn rows_in(&self, snapshot: &Snapshot) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let Some(mut scan) = self.scan_rows(snapshot, None) else { return Ok(rows) };
        while let Some((key, value)) = scan.next().await? {
            rows.push(Row::decode(&self.shared.name, &key, &value)?);
        }
        Ok(rows)
    }

    /// The rows up to the one that begins at or before `key`.
    fn scan_rows(&self, snapshot: &Snapshot, key: Option<&[u8]>) -> Option<Scan> {
        let rows = snapshot.keyspace(RANGES_KEYSPACE)?;
        let lower = Bound::Included(row_key(&self.shared.name, b""));
        let upper = match key {
            Some(key) => Bound::Included(row_key(&self.shared.name, key)),
            None => Bound::Excluded(end_of_rows(&self.shared.name)),
        };
        Some(snapshot.range(rows, lower, upper))
    }

    /// The row of a view that covers a key.
    async fn row_at(&self, snapshot: &Snapshot, key: &[u8]) -> Result<Option<Row>> {
        let Some(mut scan) = self.scan_rows(snapshot, Some(key)) else { return Ok(None) };
        let Some((at, value)) = scan.next_back().await? else { return Ok(None) };
        let row = Row::decode(&self.shared.name, &at, &value)?;
        Ok(row.covers(key).then_some(row))
    }

    /// Applies the mutations in one group, all or none. They wait while their range is being moved.
    ///
    /// # Errors
    /// `Invalid`: keys or a range of two groups, which the message names, or what [`Node::write`] refuses. `Unsupported`: [`Durability::Local`].
    /// `Unavailable`: not applied, the range is being moved or its group has no leader. Else as [`Node::write`].
    /// # Cancel safety
    /// Not cancel safe: a dropped future may have written.
    pub async fn write(&self, ops: Vec<PlacedOp>, durability: Durability) -> Result<Applied> {
        if durability == Durability::Local {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "a write to a placed keyspace is answered when it is applied",
            ));
        }
        let Some(key) = ops.first().map(|op| op.first().clone()) else {
            return Err(Error::new(ErrorKind::Invalid, "the batch is empty"));
        };
        let mut waits = Waits::<R>::new();
        loop {
            if let Some(applied) = self.try_write(&ops, &durability, waits.is_later).boxed().await? {
                return Ok(applied);
            }
            waits.again(self, &key).boxed().await?;
        }
    }

    /// None when the ranges are not what this replica believed. Before keys of two groups are refused it has `looked_again`.
    async fn try_write(
        &self,
        ops: &[PlacedOp],
        durability: &Durability,
        looked_again: bool,
    ) -> Result<Option<Applied>> {
        let view = self.view().await?;
        let mut rows = BTreeMap::new();
        let mut holder: Option<(&str, Bytes)> = None;
        for op in ops {
            let Some(written) = op.rows(&view.layout) else { return Ok(None) };
            for (group, row, key) in written {
                match &holder {
                    Some((held, first)) if *held != group => {
                        return if looked_again { Err(two_groups((held, first), (group, &key))) } else { Ok(None) };
                    }
                    _ => holder = Some((group, key)),
                }
                if row.state != State::Held {
                    return Ok(None);
                }
                rows.insert(row.first.clone(), row);
            }
        }
        let Some(group) = holder.and_then(|(name, _)| view.groups.get(name)) else { return Ok(None) };
        let names = [RANGES_KEYSPACE.to_owned(), self.data_name()].map(|name| group.group.keyspace(&name));
        let [Some(ranges), data] = names else { return Ok(None) };
        let data = match data {
            Some(data) => data,
            None => self.keyspace_of(group, &self.data_name()).await?,
        };
        let conditions = rows.into_values().map(|row| has(ranges, self.key_of(row), Some(row.encode()))).collect();
        let ops = ops.iter().map(|op| op.in_keyspace(data));
        match self.swap(group, conditions, ops.collect(), durability.clone()).await {
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(None),
            other => other.map(Some),
        }
    }

    /// The attempt that has a key on its way, as far as this replica has applied it.
    async fn mover_of(&self, key: &[u8]) -> Result<Option<u64>> {
        for group in self.view().await?.groups.values() {
            let snapshot = snapshot_of(group, ReadLevel::Local).await?;
            if let Some(State::Leaving { mover, .. } | State::Left { mover, .. }) =
                self.row_at(&snapshot, key).await?.map(|row| row.state)
            {
                return Ok(Some(mover));
            }
        }
        Ok(None)
    }

    fn key_of(&self, row: &Row) -> Bytes {
        row_key(&self.shared.name, &row.first)
    }

    /// A batch that is applied if every condition holds, `Conflict` otherwise.
    async fn swap(
        &self,
        group: &Arc<Inner<R>>,
        conditions: Vec<Condition>,
        ops: Vec<WriteOp>,
        durability: Durability,
    ) -> Result<Applied> {
        let batch = WriteBatch { branch: MAIN, ops };
        let body = CommandBody::BatchIf(ConditionalBatch { conditions, batch });
        let applied = group.write(Write { body, durability }).await?;
        applied.response.clone()?;
        Ok(applied)
    }

    /// The value of a key, as [`ReadLevel`] promises it of the group that holds it.
    ///
    /// # Errors
    /// `Unsupported`: [`ReadLevel::AtLeast`], since an index is of one group. `Unavailable`: its range is changing hands for too long, or
    /// as [`Node::read_barrier`]. Cancel safe.
    pub async fn get(&self, key: &[u8], level: ReadLevel) -> Result<Option<Value>> {
        let mut waits = Waits::<R>::new();
        loop {
            if let Some((snapshot, _)) = self.look_at(key, &level).await? {
                let Some(data) = snapshot.keyspace(&self.data_name()) else { return Ok(None) };
                return Ok(snapshot.get(data, key).await?);
            }
            waits.again(self, key).boxed().await?;
        }
    }

    /// A view of the group that holds a key and the range around it in that view (Q2); none to look again.
    async fn look_at(&self, key: &[u8], level: &ReadLevel) -> Result<Option<(Snapshot, Row)>> {
        if matches!(level, ReadLevel::AtLeast(_)) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "an index is of one group: read a placed keyspace at another level",
            ));
        }
        let view = self.view().await?;
        let Some(group) = view.layout.covering(key).and_then(|(name, _)| view.groups.get(name)) else {
            return Ok(None);
        };
        let snapshot = snapshot_of(group, level.clone()).await?;
        let row = self.row_at(&snapshot, key).await?;
        Ok(row.filter(Row::serves).map(|row| (snapshot, row)))
    }

    /// The pairs within bounds in order of keys, from both ends. Each range is read from a view of its own, taken when the scan comes to
    /// it: over several ranges it is no snapshot.
    pub fn range(&self, lower: Bound<Bytes>, upper: Bound<Bytes>, level: ReadLevel) -> PlacedScan<R> {
        PlacedScan { placed: self.clone(), level, lower, upper, front: None, back: None }
    }

    /// The ranges and who holds them, as this replica has applied it.
    ///
    /// # Errors
    /// `Closed`, `Io`, `Corrupt`. Cancel safe.
    pub async fn ranges(&self) -> Result<Vec<RangeInfo>> {
        self.forget_view();
        let view = self.view().await?;
        let info = |(group, row): (&str, &Row)| RangeInfo {
            first: row.first.clone(),
            end: row.end.clone(),
            group: (group != FIRST).then(|| group.to_owned()),
            is_moving: row.state != State::Held,
        };
        Ok(view.layout.iter().map(info).collect())
    }
}

/// An ordered scan of a placed keyspace.
pub struct PlacedScan<R: Runtime = TokioRuntime> {
    placed: Placed<R>,
    level: ReadLevel,
    /// What is left: every pair that was given moves one of them.
    lower: Bound<Bytes>,
    upper: Bound<Bytes>,
    front: Option<Part>,
    back: Option<Part>,
}

/// The range that one end of a scan is in.
struct Part {
    scan: Option<Scan>,
    row: Row,
}

impl<R: Runtime> PlacedScan<R> {
    /// The next pair from the low end. After an error the same call again goes on. Cancel safe.
    ///
    /// # Errors
    /// As [`Placed::get`].
    pub async fn next(&mut self) -> Result<Option<(Bytes, Value)>> {
        while !is_over(&self.lower, &self.upper) {
            let mut part = match self.front.take() {
                Some(part) => part,
                None => self.open(&first_key(&self.lower)).boxed().await?,
            };
            let found = part.next().await?;
            if let Some((key, value)) = found {
                if !within(&key, &self.lower, &self.upper) {
                    return Ok(None);
                }
                self.lower = Bound::Excluded(key.clone());
                self.front = Some(part);
                return Ok(Some((key, value)));
            }
            let Some(end) = part.row.end else { break };
            self.lower = Bound::Included(end);
        }
        self.upper = Bound::Excluded(Bytes::new());
        Ok(None)
    }

    /// The next pair from the high end. After an error the same call again goes on. Cancel safe.
    ///
    /// # Errors
    /// As [`Placed::get`].
    pub async fn next_back(&mut self) -> Result<Option<(Bytes, Value)>> {
        while !is_over(&self.lower, &self.upper) {
            let mut part = match self.back.take() {
                Some(part) => part,
                None => self.open_last().boxed().await?,
            };
            let found = part.next_back().await?;
            if let Some((key, value)) = found {
                if !within(&key, &self.lower, &self.upper) {
                    return Ok(None);
                }
                self.upper = Bound::Excluded(key.clone());
                self.back = Some(part);
                return Ok(Some((key, value)));
            }
            if part.row.first.is_empty() {
                break;
            }
            self.upper = Bound::Excluded(part.row.first);
        }
        self.upper = Bound::Excluded(Bytes::new());
        Ok(None)
    }

    async fn open(&self, key: &Bytes) -> Result<Part> {
        let mut waits = Waits::<R>::new();
        loop {
            if let Some((snapshot, row)) = self.placed.look_at(key, &self.level).await? {
                return Ok(self.part(&snapshot, row));
            }
            waits.again(&self.placed, key).boxed().await?;
        }
    }

    /// The range with the last keys before the high end.
    async fn open_last(&self) -> Result<Part> {
        let mut waits = Waits::<R>::new();
        loop {
            let view = self.placed.view().await?;
            let found = match &self.upper {
                Bound::Included(key) => view.layout.covering(key),
                Bound::Excluded(key) => view.layout.before(Some(key)),
                Bound::Unbounded => view.layout.before(None),
            };
            let first = found.map(|(_, row)| row.first.clone());
            let Some(first) = first else {
                waits.again(&self.placed, &first_key(&self.lower)).boxed().await?;
                continue;
            };
            if let Some((snapshot, row)) = self.placed.look_at(&first, &self.level).await?
                && reaches(&row, &self.upper)
            {
                return Ok(self.part(&snapshot, row));
            }
            waits.again(&self.placed, &first).boxed().await?;
        }
    }

    fn part(&self, snapshot: &Snapshot, row: Row) -> Part {
        let lower = match &self.lower {
            Bound::Included(key) | Bound::Excluded(key) if *key >= row.first => self.lower.clone(),
            _ => Bound::Included(row.first.clone()),
        };
        let upper = match (&self.upper, &row.end) {
            (Bound::Included(key) | Bound::Excluded(key), Some(end)) if key < end => self.upper.clone(),
            (_, Some(end)) => Bound::Excluded(end.clone()),
            (upper, None) => upper.clone(),
        };
        let scan = snapshot.keyspace(&self.placed.data_name()).map(|data| snapshot.range(data, lower, upper));
        Part { scan, row }
    }
}

impl Part {
    async fn next(&mut self) -> Result<Option<(Bytes, Value)>> {
        match &mut self.scan {
            Some(scan) => Ok(scan.next().await?),
            None => Ok(None),
        }
    }

    async fn next_back(&mut self) -> Result<Option<(Bytes, Value)>> {
        match &mut self.scan {
            Some(scan) => Ok(scan.next_back().await?),
            None => Ok(None),
        }
    }
}

/// Attempts of one call, until its time is over.
struct Waits<R: Runtime> {
    deadline: R::Instant,
    /// The attempt at a move that it waits for, and when that has taken too long.
    mover: Option<u64>,
    help_at: R::Instant,
    /// Not the first attempt: what it goes by was looked up for it.
    is_later: bool,
}

impl<R: Runtime> Waits<R> {
    fn new() -> Self {
        let now = R::Instant::now();
        Self { deadline: now + WRITE_TIMEOUT, mover: None, help_at: now + HELP_AFTER, is_later: false }
    }

    /// Looks again in a moment. A range that stands still for longer was left on its way by who moved it.
    async fn again(&mut self, placed: &Placed<R>, key: &[u8]) -> Result<()> {
        let now = R::Instant::now();
        if now + RETRY_PAUSE >= self.deadline {
            let message = format!("the range is changing hands, or this replica lags keyspace={}", placed.shared.name);
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        let mover = placed.mover_of(key).await?;
        if mover.is_none() || mover != self.mover {
            (self.mover, self.help_at) = (mover, now + HELP_AFTER);
        } else if now >= self.help_at {
            self.help_at = now + HELP_AFTER;
            // Somebody else may be faster; the next attempt tells.
            let _ = R::timeout_at(self.deadline, placed.finish_move(key)).await;
        }
        placed.forget_view();
        self.is_later = true;
        R::sleep(RETRY_PAUSE).await;
        Ok(())
    }
}

async fn snapshot_of<R: Runtime>(group: &Arc<Inner<R>>, level: ReadLevel) -> Result<Snapshot> {
    group.read_barrier(level).await?;
    Ok(group.group.snapshot(MAIN)?)
}

/// A key has this value, or none.
fn has(keyspace: KeyspaceId, key: Bytes, value: Option<Bytes>) -> Condition {
    match value {
        Some(value) => Condition::Value { keyspace, key, value },
        None => Condition::Absent { keyspace, key },
    }
}

fn put(keyspace: KeyspaceId, key: Bytes, value: Bytes) -> WriteOp {
    WriteOp::Put { keyspace, key, value }
}

/// Behind the rows of a name: the keys of rows begin with its length and itself, and no byte of a name is the last one.
fn end_of_rows(name: &str) -> Bytes {
    let mut end = row_key(name, b"").to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end.into()
}

fn two_groups(one: (&str, &Bytes), other: (&str, &Bytes)) -> Error {
    let name = |group: &str| if group == FIRST { "the first".to_owned() } else { group.to_owned() };
    let message = format!(
        "a batch is of one group: key={} is held by group={} and key={} by group={}: write them one after the other",
        shown(one.1),
        name(one.0),
        shown(other.1),
        name(other.0)
    );
    Error::new(ErrorKind::Invalid, message)
}

/// A key for people, cut where it is long: a message may have to fit into the header of an answer.
fn shown(key: &Bytes) -> String {
    let (head, rest) = key.split_at(key.len().min(SHOWN_BYTES_MAX));
    let more = if rest.is_empty() { "" } else { "..." };
    format!("{}{more}", head.escape_ascii())
}

/// A key that is in the range where the low end of a scan is.
fn first_key(lower: &Bound<Bytes>) -> Bytes {
    match lower {
        Bound::Included(key) => key.clone(),
        Bound::Excluded(key) => [key, &[0][..]].concat().into(),
        Bound::Unbounded => Bytes::new(),
    }
}

fn is_over(lower: &Bound<Bytes>, upper: &Bound<Bytes>) -> bool {
    match (lower, upper) {
        (_, Bound::Excluded(upper)) if upper.is_empty() => true,
        (Bound::Unbounded, _) | (_, Bound::Unbounded) => false,
        (Bound::Included(lower), Bound::Included(upper)) => lower > upper,
        (Bound::Included(lower) | Bound::Excluded(lower), Bound::Included(upper) | Bound::Excluded(upper)) => {
            lower >= upper
        }
    }
}

fn within(key: &Bytes, lower: &Bound<Bytes>, upper: &Bound<Bytes>) -> bool {
    use std::ops::RangeBounds;
    (lower.clone(), upper.clone()).contains(key)
}

/// True when a range holds the last keys before the high end of a scan.
fn reaches(row: &Row, upper: &Bound<Bytes>) -> bool {
    match (upper, &row.end) {
        (_, None) => true,
        (Bound::Unbounded, Some(_)) => false,
        (Bound::Included(key), Some(end)) => key < end,
        (Bound::Excluded(key), Some(end)) => key <= end,
    }
}
