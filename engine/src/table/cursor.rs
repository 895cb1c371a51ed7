//! Walks a table in one direction, reading ahead once it is clear that the walk goes on.
//!
//! # Place
//! below `read::merge`; the table is passed to each call, so that whoever owns both holds one reference
//! # Invariants
//! W1. A step that needs no block is synchronous ([`TableCursor::step`]); [`TableCursor::load`] is the rest.
//! W2. Dropping a future of `load` loses nothing: the next `load` goes on where that one was.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::VecDeque;

use bytes::Bytes;

use super::block::{Block, BlockCursor, EntryKind};
use super::index::Handle;
use super::reader::{Table, is_damage};
use crate::memory::{MemoryKind, Reservation};
use crate::{LogIndex, Result};

/// Bytes read ahead at first by a scan, which doubles them with each read.
const AHEAD_BYTES_MIN: usize = 32 << 10;
/// Bytes read ahead at most by a scan.
const AHEAD_BYTES_MAX: usize = 256 << 10;
/// Bytes read at once by a flush, compaction or verification.
const BYPASS_AHEAD_BYTES: usize = 512 << 10;
/// A scan reads ahead from this miss on: the first may be a short scan's only one.
const MISSES_BEFORE_AHEAD: u32 = 2;

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// On an entry, or at the end.
    Done,
    /// A block has to be loaded.
    Load,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On an entry.
    At,
    /// Between blocks: the next one is to be loaded.
    Between,
    End,
}

/// What was read ahead, as it is stored: blocks are decompressed as the walk enters them, so that no more memory is held than was
/// reserved.
#[derive(Default)]
struct Ahead {
    /// Where in the table `bytes` begins.
    start: u64,
    bytes: Bytes,
    /// In the cursor's direction.
    blocks: VecDeque<Handle>,
}

impl Ahead {
    /// The stored bytes of the block, if they are here; those of blocks before it are passed over.
    fn stored(&mut self, handle: &Handle) -> Option<Bytes> {
        while let Some(block) = self.blocks.pop_front() {
            if block.offset == handle.offset {
                let from = usize::try_from(block.offset.checked_sub(self.start)?).ok()?;
                let stored = self.bytes.slice(from..from.checked_add(block.stored as usize)?);
                if self.blocks.is_empty() {
                    *self = Self::default();
                }
                return Some(stored);
            }
        }
        *self = Self::default();
        None
    }
}

/// A cursor over one table.
pub(crate) struct TableCursor {
    reverse: bool,
    bypass: bool,
    state: State,
    /// The block that comes next, taken from the index and not yet entered.
    pending: Option<Handle>,
    /// Over the top index; only with two levels.
    top: Option<BlockCursor>,
    /// The index block that comes next.
    pending_index: Option<Handle>,
    index: Option<BlockCursor>,
    data: Option<BlockCursor>,
    ahead: Ahead,
    ahead_bytes: usize,
    misses: u32,
    memory: Option<Reservation>,
}

impl TableCursor {
    /// A cursor through the cache; it stands nowhere.
    pub(crate) fn new(reverse: bool) -> Self {
        Self {
            reverse,
            bypass: false,
            state: State::End,
            pending: None,
            top: None,
            pending_index: None,
            index: None,
            data: None,
            ahead: Ahead::default(),
            ahead_bytes: AHEAD_BYTES_MIN,
            misses: 0,
            memory: None,
        }
    }

    /// A cursor that reads in large pieces and leaves the cache as it is; it stands nowhere.
    pub(crate) fn new_bypass(table: &Table) -> Self {
        let memory = table.budget().reserve(MemoryKind::Buffer, BYPASS_AHEAD_BYTES as u64);
        Self {
            bypass: true,
            ahead_bytes: BYPASS_AHEAD_BYTES,
            misses: MISSES_BEFORE_AHEAD,
            memory: Some(memory),
            ..Self::new(false)
        }
    }

    /// Stands on an entry.
    #[inline]
    pub(crate) fn valid(&self) -> bool {
        self.state == State::At
    }

    #[inline]
    pub(crate) fn key(&self) -> &[u8] {
        self.data.as_ref().map_or(&[], BlockCursor::key)
    }

    #[inline]
    pub(crate) fn index(&self) -> LogIndex {
        self.data.as_ref().map_or(LogIndex(0), BlockCursor::index)
    }

    /// `None` is a tombstone; of a merge the operand. The value shares the memory of its block.
    #[inline]
    pub(crate) fn value(&self) -> Option<Bytes> {
        self.data.as_ref().and_then(BlockCursor::value)
    }

    /// As [`TableCursor::value`], borrowed.
    #[inline]
    pub(crate) fn value_part(&self) -> Option<&[u8]> {
        self.data.as_ref().filter(|data| !data.is_tombstone()).map(BlockCursor::value_part)
    }

    #[inline]
    pub(crate) fn kind(&self) -> EntryKind {
        self.data.as_ref().map_or(EntryKind::Tombstone, BlockCursor::kind)
    }

    pub(crate) fn is_tombstone(&self) -> bool {
        self.data.as_ref().is_some_and(BlockCursor::is_tombstone)
    }

    /// Goes to the first entry in the cursor's direction.
    pub(crate) async fn seek_start(&mut self, table: &Table) -> Result<()> {
        self.seek_from(table, None, false).await
    }

    /// Goes to the first entry in the cursor's direction at `key`, or beyond it. With `exclusive`, beyond it.
    pub(crate) async fn seek(&mut self, table: &Table, key: &[u8], exclusive: bool) -> Result<()> {
        self.seek_from(table, Some(key), exclusive).await
    }

    async fn seek_from(&mut self, table: &Table, key: Option<&[u8]>, exclusive: bool) -> Result<()> {
        self.state = State::End;
        self.data = None;
        self.pending = None;
        self.pending_index = None;
        self.index = None;
        self.top = None;
        self.ahead = Ahead::default();
        let mut leaf = table.top().await?.clone();
        if table.levels() == 2 {
            let top = self.descend(table, leaf, key)?;
            if !top.valid() {
                return Ok(());
            }
            leaf = self.index_block(table, &table.handle_at(&top)?).await?;
            self.top = Some(top);
        }
        let index = self.descend(table, leaf, key)?;
        if !index.valid() {
            // Beyond the last separator: only forward, and then there is nothing.
            return Ok(());
        }
        let handle = table.handle_at(&index)?;
        self.index = Some(index);
        let block = self.next_block(table, &handle).await?;
        let mut data = BlockCursor::new(block, self.reverse);
        match key {
            Some(key) => data.seek(key, exclusive),
            None => data.seek_start(),
        }
        .map_err(|error| table.corrupt(error, &handle))?;
        self.state = if data.valid() { State::At } else { State::Between };
        self.data = Some(data);
        if self.state == State::Between {
            self.load(table).await?;
        }
        Ok(())
    }

    /// A cursor over an index block on the child in which `key` would be.
    fn descend(&self, table: &Table, block: Block, key: Option<&[u8]>) -> Result<BlockCursor> {
        let mut cursor = BlockCursor::new(block, self.reverse);
        match key {
            Some(key) if self.reverse => cursor.seek_ceiling(key),
            Some(key) => cursor.seek(key, false),
            None => cursor.seek_start(),
        }
        .map_err(|error| table.corrupt(error, &Handle::default()))?;
        Ok(cursor)
    }

    /// Goes one entry on if that needs no other block.
    #[inline]
    pub(crate) fn step(&mut self, table: &Table) -> Result<Step> {
        match (&mut self.data, self.state) {
            (Some(data), State::At) => {
                data.advance().map_err(|error| table.corrupt(error, &Handle::default()))?;
                if data.valid() {
                    return Ok(Step::Done);
                }
                self.state = State::Between;
                Ok(Step::Load)
            }
            (_, State::Between) => Ok(Step::Load),
            _ => Ok(Step::Done),
        }
    }

    /// Goes one entry on.
    pub(crate) async fn advance(&mut self, table: &Table) -> Result<()> {
        match self.step(table)? {
            Step::Done => Ok(()),
            Step::Load => self.load(table).await,
        }
    }

    /// Enters the next block after [`Step::Load`].
    pub(crate) async fn load(&mut self, table: &Table) -> Result<()> {
        while self.state == State::Between {
            let Some(handle) = self.next_handle(table).await? else {
                self.state = State::End;
                self.data = None;
                break;
            };
            let block = self.next_block(table, &handle).await?;
            self.pending = None;
            let mut data = BlockCursor::new(block, self.reverse);
            data.seek_start().map_err(|error| table.corrupt(error, &handle))?;
            if data.valid() {
                self.state = State::At;
            }
            self.data = Some(data);
        }
        Ok(())
    }

    /// The next data block, by the index.
    async fn next_handle(&mut self, table: &Table) -> Result<Option<Handle>> {
        if self.pending.is_some() {
            return Ok(self.pending);
        }
        let broken = |error| table.corrupt(error, &Handle::default());
        loop {
            if let Some(handle) = self.pending_index {
                let block = self.index_block(table, &handle).await?;
                let mut index = BlockCursor::new(block, self.reverse);
                index.seek_start().map_err(broken)?;
                self.pending_index = None;
                self.index = Some(index);
            } else if let Some(index) = &mut self.index {
                index.advance().map_err(broken)?;
            }
            let Some(index) = &self.index else { return Ok(None) };
            if index.valid() {
                self.pending = Some(table.handle_at(index)?);
                return Ok(self.pending);
            }
            let Some(top) = &mut self.top else {
                self.index = None;
                return Ok(None);
            };
            top.advance().map_err(broken)?;
            if !top.valid() {
                self.index = None;
                return Ok(None);
            }
            self.pending_index = Some(table.handle_at(top)?);
        }
    }

    async fn index_block(&self, table: &Table, handle: &Handle) -> Result<Block> {
        // Index blocks are few and go through the cache also when data does not.
        table.block(handle).await
    }

    /// A data block: read ahead, cached, or read now together with those that follow.
    async fn next_block(&mut self, table: &Table, handle: &Handle) -> Result<Block> {
        if let Some(stored) = self.ahead.stored(handle) {
            return self.enter(table, handle, stored).await;
        }
        if let Some(block) = table.cached(handle) {
            return Ok(block);
        }
        self.misses = self.misses.saturating_add(1);
        if self.misses < MISSES_BEFORE_AHEAD {
            return table.block(handle).await;
        }
        let group = self.contiguous(table, handle)?;
        let start = group.iter().map(|handle| handle.offset).min().unwrap_or(handle.offset);
        let end = group.iter().map(Handle::end).max().unwrap_or(handle.end());
        let length = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
        if !self.bypass {
            let memory = self.memory.get_or_insert_with(|| table.budget().reserve(MemoryKind::Buffer, 0));
            memory.resize(length as u64);
        }
        let bytes = match table.read(start, length).await {
            Err(error) if is_damage(&error) => return table.load_again(handle, !self.bypass).await,
            bytes => bytes?,
        };
        self.ahead = Ahead { start, bytes, blocks: group.into() };
        if !self.bypass {
            self.ahead_bytes = self.ahead_bytes.saturating_mul(2).min(AHEAD_BYTES_MAX);
        }
        let Some(stored) = self.ahead.stored(handle) else {
            return Err(table.corrupt(super::block::Malformed("nothing where a block should be"), handle));
        };
        self.enter(table, handle, stored).await
    }

    /// The block of these bytes; if they are damaged, of what is read once more, here or elsewhere.
    async fn enter(&self, table: &Table, handle: &Handle, stored: Bytes) -> Result<Block> {
        let block = match table.decode(&stored, handle, !self.bypass) {
            Err(error) if is_damage(&error) => table.load_again(handle, !self.bypass).await?,
            block => block?,
        };
        if !self.bypass {
            table.cache(handle, &block);
        }
        Ok(block)
    }

    /// `first` and the blocks that follow it in the cursor's direction without a gap, up to the window.
    fn contiguous(&self, table: &Table, first: &Handle) -> Result<Vec<Handle>> {
        let mut group = vec![*first];
        let mut total = first.stored as usize;
        let Some(mut index) = self.index.clone() else { return Ok(group) };
        let mut last = *first;
        loop {
            index.advance().map_err(|error| table.corrupt(error, &Handle::default()))?;
            if !index.valid() {
                return Ok(group);
            }
            let next = table.handle_at(&index)?;
            let adjacent = if self.reverse { next.end() == last.offset } else { last.end() == next.offset };
            total = total.saturating_add(next.stored as usize);
            if !adjacent || total > self.ahead_bytes {
                return Ok(group);
            }
            group.push(next);
            last = next;
        }
    }
}
