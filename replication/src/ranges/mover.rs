//! Splits, joins and moves.
//!
//! # Place
//! called by operators, and by whoever waits for a move that its mover left; nothing of it is in memory, so anyone goes on with it
//! # Invariants
//! - M1. A range moves in pieces of about [`PIECE_BYTES`], each by these entries, every one of them conditional on the row before it:
//!   the old group says `Leaving` (writes stop), the new one says `Arriving`, the pairs are copied, the old group says `Left` (reads
//!   stop), the new one says `Held`, the old one deletes the pairs and the row.
//! - M2. What has the number of a mover is written by that attempt alone. Who takes a move over draws another number and writes it into
//!   the row of the old group first, so that the attempt before it cannot finish.
//! - M3. Pairs of the old group are deleted when the new group holds the range, never before. Pairs of a group whose row says `Left`
//!   are written by nobody else: a range comes back to a group only when that row is gone.
//! - M4. A range arrives only among the rows that its mover saw: each change of which rows there are draws the group's shape anew.
//!   A row of its own would not tell, since those around it may have been joined meanwhile.
//! - M5. A row with `Arriving` is cleared away by an attempt that was found to be the current one *after* it had seen that row: then its
//!   number is older. An attempt that does not know yet that it was taken over would clear what the newer one has copied.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use mainstay_engine::{KeyspaceId, Scan, Snapshot, WriteOp};

use super::row::shape_key;
use super::{Change, FIRST, Placed, RANGES_KEYSPACE, Row, State, has, put, row_key, snapshot_of};
use crate::node::Inner;
use crate::{Durability, Error, ErrorKind, ReadLevel, Result, Runtime};

/// Bytes of the pairs of a piece: how long the writes of a key wait for a move at most is a matter of this.
const PIECE_BYTES: usize = if cfg!(test) { 4 << 10 } else { 4 << 20 };
/// Bytes of pairs that one entry copies or deletes, but for a pair that is longer.
const ENTRY_BYTES: usize = if cfg!(test) { 1 << 10 } else { 256 << 10 };
/// Pairs of one entry.
const ENTRY_PAIRS: usize = 4096;
/// Longest key that a range may begin with, in bytes.
const BOUNDARY_BYTES_MAX: usize = 4096;
/// Attempts to take a step that others have changed the ground of.
const CONFLICTS_MAX: usize = 16;

/// A piece on its way: who gives it, who gets it.
struct Journey<R: Runtime> {
    from: Holder<R>,
    to: Holder<R>,
    /// As the giving group says it.
    row: Row,
    mover: u64,
}

/// The number that a group draws for each set of rows that it has; none before the first.
struct Shape(Option<Bytes>);

/// A group and its keyspaces.
struct Holder<R: Runtime> {
    name: String,
    group: Arc<Inner<R>>,
    rows: KeyspaceId,
    data: KeyspaceId,
}

impl<R: Runtime> Clone for Holder<R> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), group: self.group.clone(), rows: self.rows, data: self.data }
    }
}

impl<R: Runtime> Journey<R> {
    fn leaving(&self) -> Row {
        self.row.with(State::Leaving { to: self.to.name.clone(), mover: self.mover })
    }

    fn left(&self) -> Row {
        self.row.with(State::Left { to: self.to.name.clone(), mover: self.mover })
    }

    fn arriving(&self) -> Row {
        self.row.with(State::Arriving { from: self.from.name.clone(), mover: self.mover })
    }
}

impl<R: Runtime> Placed<R> {
    /// Makes the keys from `key` on a range of their own, in the group that they are in. Costs no copy. Nothing if one begins there.
    ///
    /// # Errors
    /// `Invalid`: a key of more than 4096 bytes. `Unavailable`: not done, the range is being moved. Else as [`crate::Node::write`].
    /// # Cancel safety
    /// Not cancel safe: a dropped future may have done it.
    pub async fn split(&self, key: &[u8]) -> Result<()> {
        if key.len() > BOUNDARY_BYTES_MAX {
            let message =
                format!("a range begins with a key of at most {BOUNDARY_BYTES_MAX} bytes bytes={}", key.len());
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        for _ in 0..CONFLICTS_MAX {
            let (holder, row) = self.holder_of(key).await?;
            if row.first == key {
                return Ok(());
            }
            self.must_be_held(&row)?;
            let key = Bytes::copy_from_slice(key);
            if self.cut(&holder, &row, &key).await? {
                return Ok(());
            }
        }
        Err(self.too_many_conflicts())
    }

    /// Makes the range that begins at `key` one with the range before it. Nothing if none begins there.
    ///
    /// # Errors
    /// `Invalid`: the two are in different groups: move one first. `Unavailable`: not done, one of them is being moved. Else as
    /// [`crate::Node::write`].
    /// # Cancel safety
    /// Not cancel safe: a dropped future may have done it.
    pub async fn join(&self, key: &[u8]) -> Result<()> {
        for _ in 0..CONFLICTS_MAX {
            let (holder, row) = self.holder_of(key).await?;
            if row.first != key || key.is_empty() {
                return Ok(());
            }
            let snapshot = snapshot_of(&holder.group, ReadLevel::Linearizable).await?;
            let before = self.row_before(&snapshot, key).await?;
            let Some(before) = before.filter(|before| before.end.as_deref() == Some(key) && before.serves()) else {
                let message = "the range before it is in another group: move one of them first";
                return Err(Error::new(ErrorKind::Invalid, message));
            };
            self.must_be_held(&before)?;
            self.must_be_held(&row)?;
            let whole = Row::held(before.first.clone(), row.end.clone());
            let changes = vec![change(Some(before), Some(whole)), change(Some(row), None)];
            if self.change(&holder, changes, vec![]).await? {
                return Ok(());
            }
        }
        Err(self.too_many_conflicts())
    }

    /// Moves the range that a key is in to another group; none is the first. Reads and writes go on: those of one piece of about 4 MiB
    /// at a time wait until it is copied. Also goes on with a move that was left half done. Nothing if the group holds it.
    ///
    /// # Errors
    /// `NotFound`: no such group here. `Unavailable`, `Indeterminate`: part of the range may have moved; the same call again goes on.
    /// # Cancel safety
    /// Not cancel safe: a dropped future leaves a piece on its way, whose writes wait until this is called again, or until one of them
    /// has waited for 2 s and goes on with it.
    pub async fn move_range(&self, key: &[u8], to: Option<&str>) -> Result<()> {
        let to = self.holder(to.unwrap_or(FIRST)).boxed().await?;
        let (_, whole) = self.holder_of(key).boxed().await?;
        let mut at = whole.first.clone();
        let mut conflicts = 0;
        loop {
            let (from, row) = self.holder_of(&at).boxed().await?;
            if from.name == to.name && row.state == State::Held {
                match row.end {
                    Some(end) if whole.end.as_ref().is_none_or(|whole| end < whole) => at = end,
                    _ => return Ok(()),
                }
                continue;
            }
            let moved = match &row.state {
                State::Held => self.move_piece(&from, &to, row).boxed().await?,
                _ => self.take_over(&from, row).boxed().await?,
            };
            if !moved {
                conflicts += 1;
                if conflicts > CONFLICTS_MAX {
                    return Err(self.too_many_conflicts());
                }
            }
        }
    }

    /// Goes on with the move of a key's range that somebody left half done; nothing if there is none.
    pub(crate) async fn finish_move(&self, key: &[u8]) -> Result<()> {
        for (name, snapshot) in self.newest().await? {
            let Some(row) = self.row_at(&snapshot, key).await? else { continue };
            match &row.state {
                State::Leaving { .. } => {
                    let from = self.holder(&name).await?;
                    self.take_over(&from, row).boxed().await?;
                }
                State::Left { .. } => {
                    let from = self.holder(&name).await?;
                    self.settle(&self.journey_of(&from, row).await?).boxed().await?;
                }
                State::Held | State::Arriving { .. } => {}
            }
        }
        Ok(())
    }

    /// A piece of a held range, from its beginning. False when others have changed it meanwhile.
    async fn move_piece(&self, from: &Holder<R>, to: &Holder<R>, row: Row) -> Result<bool> {
        let snapshot = snapshot_of(&from.group, ReadLevel::Linearizable).await?;
        let row = match self.end_of_piece(&snapshot, from, &row).await? {
            Some(end) if self.cut(from, &row, &end).await? => Row::held(row.first, Some(end)),
            Some(_) => return Ok(false),
            None => row,
        };
        let journey = Journey { from: from.clone(), to: to.clone(), row: row.clone(), mover: self.draw() };
        if !self.change(from, vec![change(Some(row), Some(journey.leaving()))], vec![]).await? {
            return Ok(false);
        }
        self.carry(&journey).boxed().await
    }

    /// Where a piece of a range ends; none if the range is no longer than one.
    async fn end_of_piece(&self, snapshot: &Snapshot, from: &Holder<R>, row: &Row) -> Result<Option<Bytes>> {
        let mut scan = scan_of(snapshot, from, row);
        let mut bytes = 0_usize;
        while let Some((key, value)) = scan.next().await? {
            if bytes >= PIECE_BYTES && key > row.first && key.len() <= BOUNDARY_BYTES_MAX {
                return Ok(Some(key));
            }
            bytes = bytes.saturating_add(key.len()).saturating_add(value.len());
        }
        Ok(None)
    }

    /// Another attempt at a piece that is on its way (M2).
    async fn take_over(&self, from: &Holder<R>, row: Row) -> Result<bool> {
        let State::Leaving { to, .. } = &row.state else { return Ok(false) };
        let to = self.holder(to).await?;
        let journey = Journey { from: from.clone(), to, row: row.clone(), mover: self.draw() };
        if !self.change(from, vec![change(Some(row), Some(journey.leaving()))], vec![]).await? {
            return Ok(false);
        }
        self.carry(&journey).boxed().await
    }

    /// From `Leaving` to the end. False when another attempt took it over.
    async fn carry(&self, journey: &Journey<R>) -> Result<bool> {
        let Some(shape) = self.make_way(journey).boxed().await? else { return Ok(false) };
        let arriving = journey.arriving();
        if !self.change_if(&journey.to, vec![change(None, Some(arriving.clone()))], vec![], Some(shape)).await? {
            return Ok(false);
        }
        let snapshot = snapshot_of(&journey.from.group, ReadLevel::Linearizable).await?;
        if self.row_at(&snapshot, &journey.row.first).await? != Some(journey.leaving()) {
            return Ok(false);
        }
        // Its writes have stopped: it is all that there is.
        let mut pairs = scan_of(&snapshot, &journey.from, &journey.row);
        loop {
            let ops = take_pairs(&mut pairs, |key, value| put(journey.to.data, key, value)).await?;
            if ops.is_empty() {
                break;
            }
            let same = change(Some(arriving.clone()), Some(arriving.clone()));
            if !self.change(&journey.to, vec![same], ops).await? {
                return Ok(false);
            }
        }
        if !self.change(&journey.from, vec![change(Some(journey.leaving()), Some(journey.left()))], vec![]).await? {
            return Ok(false);
        }
        self.settle(journey).boxed().await?;
        Ok(true)
    }

    /// Has nothing in the receiving group where a range is about to arrive: what a move before this one left there goes. Returns the
    /// shape that its rows had when that was so; nothing when another attempt has taken over.
    async fn make_way(&self, journey: &Journey<R>) -> Result<Option<Shape>> {
        for _ in 0..CONFLICTS_MAX {
            let snapshot = snapshot_of(&journey.to.group, ReadLevel::Linearizable).await?;
            let rows = self.rows_in(&snapshot).await?;
            let Some(row) = rows.into_iter().find(|row| row.overlaps(&journey.row)) else {
                return Ok(Some(Shape(snapshot.get(journey.to.rows, &shape_key(&self.shared.name)).await?)));
            };
            match &row.state {
                State::Left { .. } => self.settle(&self.journey_of(&journey.to, row).await?).boxed().await?,
                State::Arriving { from, mover } => {
                    // M5: after the row was seen, and not before.
                    if !self.is_current(journey).await? {
                        return Ok(None);
                    }
                    let left = row.with(State::Left { to: from.clone(), mover: *mover });
                    if self.change(&journey.to, vec![change(Some(row), Some(left.clone()))], vec![]).await? {
                        self.clear(&journey.to, &left).await?;
                    }
                }
                // Another attempt has brought it here since.
                State::Held | State::Leaving { .. } => return Ok(None),
            }
        }
        Err(self.too_many_conflicts())
    }

    /// True while no other attempt has taken the move over.
    async fn is_current(&self, journey: &Journey<R>) -> Result<bool> {
        let snapshot = snapshot_of(&journey.from.group, ReadLevel::Linearizable).await?;
        Ok(self.row_at(&snapshot, &journey.row.first).await? == Some(journey.leaving()))
    }

    /// What comes behind `Left`: the other group holds the range, and what is here goes. Whoever comes second finds nothing to do.
    async fn settle(&self, journey: &Journey<R>) -> Result<()> {
        for _ in 0..CONFLICTS_MAX {
            let snapshot = snapshot_of(&journey.to.group, ReadLevel::Linearizable).await?;
            let arriving = journey.arriving();
            if self.row_at(&snapshot, &journey.row.first).await? != Some(arriving.clone()) {
                // M3: it is held there since, or was passed on.
                return self.clear(&journey.from, &journey.left()).await;
            }
            let before = self.row_before(&snapshot, &journey.row.first).await?;
            let neighbour = before.filter(|b| b.state == State::Held && b.end.as_ref() == Some(&journey.row.first));
            let changes = match neighbour {
                Some(before) => {
                    let whole = Row::held(before.first.clone(), journey.row.end.clone());
                    vec![change(Some(before), Some(whole)), change(Some(arriving), None)]
                }
                None => vec![change(Some(arriving), Some(journey.row.with(State::Held)))],
            };
            // When it did not hold, the neighbour or the row has changed: the next look tells.
            self.change(&journey.to, changes, vec![]).await?;
        }
        Err(self.too_many_conflicts())
    }

    /// Deletes the pairs of a range that has left, and then its row. Nothing if the row is not that one any more.
    async fn clear(&self, holder: &Holder<R>, left: &Row) -> Result<()> {
        let snapshot = snapshot_of(&holder.group, ReadLevel::Linearizable).await?;
        let mut pairs = scan_of(&snapshot, holder, left);
        loop {
            let ops = take_pairs(&mut pairs, |key, _| WriteOp::Delete { keyspace: holder.data, key }).await?;
            let last = ops.is_empty();
            let next = (!last).then(|| left.clone());
            if !self.change(holder, vec![change(Some(left.clone()), next)], ops).await? || last {
                return Ok(());
            }
        }
    }

    /// Cuts a held range in two at a key inside it. False when the row is another by now.
    async fn cut(&self, holder: &Holder<R>, row: &Row, key: &Bytes) -> Result<bool> {
        let low = Row::held(row.first.clone(), Some(key.clone()));
        let high = Row::held(key.clone(), row.end.clone());
        self.change(holder, vec![change(Some(row.clone()), Some(low)), change(None, Some(high))], vec![]).await
    }

    /// Changes rows of a group and what is given beside them, if all are what they are thought to be.
    async fn change(&self, holder: &Holder<R>, changes: Vec<Change>, ops: Vec<WriteOp>) -> Result<bool> {
        self.change_if(holder, changes, ops, None).await
    }

    /// As [`Placed::change`], and if there are the same rows as when they had this shape (M4).
    async fn change_if(
        &self,
        holder: &Holder<R>,
        changes: Vec<Change>,
        mut ops: Vec<WriteOp>,
        shape: Option<Shape>,
    ) -> Result<bool> {
        let key = |change: &Change| row_key(&self.shared.name, &change.first);
        let mut conditions =
            changes.iter().map(|c| has(holder.rows, key(c), c.old.as_ref().map(Row::encode))).collect::<Vec<_>>();
        conditions.extend(shape.map(|Shape(shape)| has(holder.rows, shape_key(&self.shared.name), shape)));
        for change in changes.iter().filter(|change| change.old != change.new) {
            ops.push(match &change.new {
                Some(row) => put(holder.rows, key(change), row.encode()),
                None => WriteOp::Delete { keyspace: holder.rows, key: key(change) },
            });
        }
        if changes.iter().any(|change| change.old.is_some() != change.new.is_some()) {
            let shape = Bytes::copy_from_slice(&self.draw().to_le_bytes());
            ops.push(put(holder.rows, shape_key(&self.shared.name), shape));
        }
        let mut unsure = false;
        for _ in 0..CONFLICTS_MAX {
            match self.swap(&holder.group, conditions.clone(), ops.clone(), Durability::Quorum).boxed().await {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Conflict => {
                    return if unsure { self.are_changed(holder, &changes).await } else { Ok(false) };
                }
                // To do it twice is to do it once: nothing but it makes the rows what they are to become.
                Err(error) if error.kind() == ErrorKind::Indeterminate => unsure = true,
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(ErrorKind::Indeterminate, "a step of a move got no answer: call it again, it goes on"))
    }

    /// True when the rows are what the changes make them.
    async fn are_changed(&self, holder: &Holder<R>, changes: &[Change]) -> Result<bool> {
        let snapshot = snapshot_of(&holder.group, ReadLevel::Linearizable).await?;
        for change in changes {
            let value = snapshot.get(holder.rows, &row_key(&self.shared.name, &change.first)).await?;
            if value != change.new.as_ref().map(Row::encode) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The group that holds a key and the row that says so, as of now.
    async fn holder_of(&self, key: &[u8]) -> Result<(Holder<R>, Row)> {
        for _ in 0..CONFLICTS_MAX {
            for (name, snapshot) in self.newest().await? {
                if let Some(row) = self.row_at(&snapshot, key).await?.filter(Row::serves) {
                    return Ok((self.holder(&name).await?, row));
                }
            }
            // Between two groups: the one that gave it said so before the other one takes it.
            self.finish_move(key).boxed().await?;
        }
        Err(self.too_many_conflicts())
    }

    /// A view of each group that holds all that was acknowledged before the call.
    async fn newest(&self) -> Result<Vec<(String, Snapshot)>> {
        self.node.inner.open_groups().boxed().await?;
        let mut groups = self.node.inner.groups_by_name();
        groups.insert(FIRST.to_owned(), self.node.inner.clone());
        let mut views = Vec::with_capacity(groups.len());
        for (name, group) in groups {
            views.push((name, snapshot_of(&group, ReadLevel::Linearizable).await?));
        }
        Ok(views)
    }

    async fn holder(&self, name: &str) -> Result<Holder<R>> {
        let group = match name {
            FIRST => self.node.inner.clone(),
            name => self.node.inner.open_group(name).boxed().await?,
        };
        let rows = self.keyspace_of(&group, RANGES_KEYSPACE).boxed().await?;
        let data = self.keyspace_of(&group, &self.data_name()).boxed().await?;
        Ok(Holder { name: name.to_owned(), group, rows, data })
    }

    /// The move that a row with `Left` is the end of.
    async fn journey_of(&self, from: &Holder<R>, row: Row) -> Result<Journey<R>> {
        let (to, mover) = match &row.state {
            State::Left { to, mover } | State::Leaving { to, mover } => (to.clone(), *mover),
            State::Held | State::Arriving { .. } => {
                return Err(Error::new(ErrorKind::Internal, "a range that is not on its way has no journey"));
            }
        };
        Ok(Journey { from: from.clone(), to: self.holder(&to).await?, row, mover })
    }

    /// The last row that begins before a key.
    async fn row_before(&self, snapshot: &Snapshot, key: &[u8]) -> Result<Option<Row>> {
        let Some(mut scan) = self.scan_rows(snapshot, Some(key)) else { return Ok(None) };
        while let Some((at, value)) = scan.next_back().await? {
            let row = Row::decode(&self.shared.name, &at, &value)?;
            if row.first < key {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    fn must_be_held(&self, row: &Row) -> Result<()> {
        match row.state {
            State::Held => Ok(()),
            _ => Err(Error::new(ErrorKind::Unavailable, "the range is being moved: try again when it has arrived")),
        }
    }

    fn draw(&self) -> u64 {
        let id = self.node.inner.options.environment.random.id();
        u64::from_le_bytes(*id.first_chunk().expect("an id has 16 bytes"))
    }

    fn too_many_conflicts(&self) -> Error {
        let message = format!("others change the same ranges keyspace={}: try again", self.shared.name);
        Error::new(ErrorKind::Unavailable, message)
    }
}

fn change(old: Option<Row>, new: Option<Row>) -> Change {
    let first = old.as_ref().or(new.as_ref()).map(|row| row.first.clone()).unwrap_or_default();
    Change { first, old, new }
}

/// The pairs of a range in a group.
fn scan_of<R: Runtime>(snapshot: &Snapshot, holder: &Holder<R>, row: &Row) -> Scan {
    let upper = row.end.clone().map_or(Bound::Unbounded, Bound::Excluded);
    snapshot.range(holder.data, Bound::Included(row.first.clone()), upper)
}

/// As many mutations of the next pairs as one entry takes; none at the end.
async fn take_pairs(scan: &mut Scan, op: impl Fn(Bytes, Bytes) -> WriteOp) -> Result<Vec<WriteOp>> {
    let (mut ops, mut bytes) = (Vec::new(), 0_usize);
    while ops.len() < ENTRY_PAIRS && bytes < ENTRY_BYTES {
        let Some((key, value)) = scan.next().await? else { break };
        bytes = bytes.saturating_add(key.len()).saturating_add(value.len());
        ops.push(op(key, value));
    }
    Ok(ops)
}
