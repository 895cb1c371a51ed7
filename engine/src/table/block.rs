//! Blocks: sorted entries with shared prefixes, and the handle by which a referrer finds and verifies one.
//!
//! # Place
//! below `builder` and `reader`; data blocks, index blocks and filter indexes are all of this form
//! # Format
//! docs/format.md, "Tables"
//!
//! ```text
//! entry    shared varint | unshared varint | kind u8 | index varint | value length varint | key suffix | value
//! block    entry* | offset of a restart u32 * n | n u32
//! ```
//!
//! # Invariants
//! B1. Keys ascend strictly. `shared` is the longest prefix in common with the key before, and 0 at a restart.
//! B2. Nothing here panics on any bytes: what does not parse is [`Malformed`]. Bytes that break B1 give a wrong order and
//!     never a wrong memory access; the checksum in the referrer is what makes them ours.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_memtree::key::{common_prefix, head};

use super::varint;
use crate::LogIndex;

/// A restart stands at every so many entries of a data block, or where a number of bytes have passed.
pub(crate) const RESTART_INTERVAL: usize = 16;
/// The bytes: of index blocks, and of data blocks of groups that were made before there was a choice of how tables are built.
pub(crate) const RESTART_BYTES: usize = 1 << 10;
/// The bytes in data blocks of other groups: a lookup decodes two entries of 100 bytes in place of five, each in memory that
/// no cache of the processor has.
pub(crate) const DATA_RESTART_BYTES: usize = 256;
/// The same for index blocks, where a search is to decode little.
pub(crate) const INDEX_RESTART_INTERVAL: usize = 4;
/// No block is larger than this when it is decompressed: the largest value, the largest key, and room.
pub(crate) const BLOCK_BYTES_MAX: usize = (16 << 20) + (256 << 10);

/// Bytes that are not what they should be; the text says what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

type Result<T> = std::result::Result<T, Malformed>;

/// What an entry is. The numbers are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum EntryKind {
    /// The key was removed; no value.
    Tombstone = 0,
    /// The value stands in the entry.
    Value = 1,
    /// The value is an operand, to be merged into what lies below.
    Operand = 2,
    /// The keys from this one up to the value were removed. Only in a block of range tombstones, where there is nothing else.
    RangeTombstone = 3,
    /// A merge was refused; no value.
    Failed = 5,
    // 4 reference to a blob: reserved, behind a feature bit of the root.
}

impl EntryKind {
    fn decode(byte: u8, ranges: bool) -> Result<Self> {
        match (byte, ranges) {
            (0, false) => Ok(Self::Tombstone),
            (1, false) => Ok(Self::Value),
            (2, false) => Ok(Self::Operand),
            (5, false) => Ok(Self::Failed),
            (3, true) => Ok(Self::RangeTombstone),
            _ => Err(Malformed("an entry of unknown kind")),
        }
    }
}

/// Builds one block.
#[derive(Debug)]
pub(crate) struct BlockBuilder {
    bytes: Vec<u8>,
    restarts: Vec<u32>,
    last: Vec<u8>,
    /// Entries since the last restart.
    since: usize,
    interval: usize,
    restart_bytes: usize,
}

impl BlockBuilder {
    /// With a restart at every `interval` entries, or [`RESTART_BYTES`].
    pub(crate) fn new(interval: usize) -> Self {
        let (bytes, restarts, last) = (Vec::new(), Vec::new(), Vec::new());
        Self { bytes, restarts, last, since: 0, interval, restart_bytes: RESTART_BYTES }
    }

    /// A data block, with a restart where `restart_bytes` have passed.
    pub(crate) fn data(restart_bytes: usize) -> Self {
        Self { restart_bytes, ..Self::new(RESTART_INTERVAL) }
    }

    /// Adds an entry; the caller keeps B1.
    #[allow(clippy::arithmetic_side_effects, reason = "lengths of memory that we hold")]
    pub(crate) fn add(&mut self, key: &[u8], kind: EntryKind, index: LogIndex, value: &[u8]) {
        let since = self.bytes.len() - self.restarts.last().map_or(0, |at| *at as usize);
        let shared = if self.since == 0 || self.since == self.interval || since >= self.restart_bytes {
            self.restarts.push(self.bytes.len() as u32);
            self.since = 0;
            0
        } else {
            common_prefix(&self.last, key)
        };
        let suffix = key.get(shared..).unwrap_or_default();
        varint::put(&mut self.bytes, shared as u64);
        varint::put(&mut self.bytes, suffix.len() as u64);
        self.bytes.push(kind as u8);
        varint::put(&mut self.bytes, index.0);
        varint::put(&mut self.bytes, value.len() as u64);
        self.bytes.extend_from_slice(suffix);
        self.bytes.extend_from_slice(value);
        self.last.truncate(shared);
        self.last.extend_from_slice(suffix);
        self.since += 1;
    }

    /// The last key added.
    pub(crate) fn last(&self) -> &[u8] {
        &self.last
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.restarts.is_empty()
    }

    /// The length that `finish` would give.
    #[allow(clippy::arithmetic_side_effects, reason = "lengths of memory that we hold")]
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.restarts.len() * 4 + 4
    }

    /// The block; the builder is empty again and keeps its memory. The caller hands the buffer back by
    /// [`BlockBuilder::recycle`].
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        for restart in &self.restarts {
            bytes.extend_from_slice(&restart.to_le_bytes());
        }
        bytes.extend_from_slice(&(self.restarts.len() as u32).to_le_bytes());
        self.restarts.clear();
        self.last.clear();
        self.since = 0;
        bytes
    }

    pub(crate) fn recycle(&mut self, mut bytes: Vec<u8>) {
        if self.bytes.is_empty() {
            bytes.clear();
            self.bytes = bytes;
        }
    }
}

/// A block in memory, decompressed. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Block(Arc<Frame>);

#[derive(Debug)]
struct Frame {
    bytes: Bytes,
    /// Where the entries end and the restarts begin.
    end: usize,
    restarts: usize,
    /// What all keys at restarts begin with, where it lies.
    prefix: Range<usize>,
    /// Of the key at each restart, eight bytes after those: a search touches few lines of memory before it is at the
    /// right restart.
    heads: Box<[u64]>,
    /// A block of range tombstones.
    ranges: bool,
}

/// One entry where it lies.
#[derive(Clone, Debug)]
struct Raw {
    shared: usize,
    suffix: Range<usize>,
    kind: EntryKind,
    index: u64,
    value: Range<usize>,
}

/// An entry that a search found.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) kind: EntryKind,
    pub(crate) index: LogIndex,
    /// Where in the block the value lies.
    pub(crate) value: Range<usize>,
    /// The key is the one that was looked for.
    pub(crate) exact: bool,
}

impl Block {
    /// Checks the frame of a block; entries are checked when they are met.
    pub(crate) fn parse(bytes: Bytes) -> Result<Self> {
        Self::parse_as(bytes, false)
    }

    /// The same for a block of range tombstones.
    pub(crate) fn parse_ranges(bytes: Bytes) -> Result<Self> {
        Self::parse_as(bytes, true)
    }

    fn parse_as(bytes: Bytes, ranges: bool) -> Result<Self> {
        const SHORT: Malformed = Malformed("a block without room for its restarts");
        if bytes.len() > BLOCK_BYTES_MAX {
            return Err(Malformed("a block over the limit"));
        }
        let (rest, count) = bytes.split_last_chunk::<4>().ok_or(SHORT)?;
        let restarts = u32::from_le_bytes(*count) as usize;
        let end = restarts.checked_mul(4).and_then(|bytes| rest.len().checked_sub(bytes)).ok_or(SHORT)?;
        if restarts == 0 || end == 0 {
            return Err(Malformed("a block without entries"));
        }
        let mut frame = Frame { bytes, end, restarts, prefix: 0..0, heads: Box::default(), ranges };
        if frame.restart(0)? != 0 {
            return Err(Malformed("a first restart that is not the first entry"));
        }
        let last = frame.restart_key(restarts.saturating_sub(1))?;
        let first = frame.entry(0)?.0.suffix;
        let shared = common_prefix(frame.part(&first), last);
        let heads = (0..restarts).map(|at| Ok(head(frame.restart_key(at)?, shared))).collect::<Result<_>>()?;
        frame.prefix = first.start..first.start.saturating_add(shared);
        frame.heads = heads;
        Ok(Self(Arc::new(frame)))
    }

    /// Bytes of memory that the block takes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (self.0.bytes.len() as u64).saturating_add((self.0.heads.len() as u64).saturating_mul(8))
    }

    /// A part of the block that shares its memory. The range is one that this block gave.
    pub(crate) fn slice(&self, range: Range<usize>) -> Bytes {
        self.0.bytes.slice(range)
    }

    /// The same without ownership.
    pub(crate) fn part(&self, range: &Range<usize>) -> &[u8] {
        self.0.part(range)
    }

    /// The first entry whose key is at or after `key`; no key is put together on the way.
    pub(crate) fn search(&self, key: &[u8]) -> Result<Option<Found>> {
        let frame = &*self.0;
        let Some(restart) = frame.last_restart(key, true) else {
            // The first key of the block is after `key`.
            return Ok(Some(frame.entry(0)?.0.found(false)));
        };
        let mut offset = frame.restart(restart)?;
        let limit = frame.restart_end(restart)?;
        // The key before is below `key` and shares `matched` bytes with it.
        let mut matched = 0;
        while offset < limit {
            let (raw, next) = frame.entry(offset)?;
            match raw.shared.cmp(&matched) {
                // It agrees with the key before where that differs from `key`.
                Ordering::Greater => {}
                // It left the key before, upwards, where that still agreed with `key`: B1.
                Ordering::Less => return Ok(Some(raw.found(false))),
                Ordering::Equal => {
                    let suffix = frame.part(&raw.suffix);
                    let wanted = key.get(matched..).unwrap_or_default();
                    let common = common_prefix(suffix, wanted);
                    match suffix.get(common..).unwrap_or_default().cmp(wanted.get(common..).unwrap_or_default()) {
                        Ordering::Less => matched = matched.saturating_add(common),
                        order => return Ok(Some(raw.found(order.is_eq()))),
                    }
                }
            }
            offset = next;
        }
        // All of the interval is below; the next interval begins after `key`.
        if offset < frame.end { Ok(Some(frame.entry(offset)?.0.found(false))) } else { Ok(None) }
    }
}

impl Frame {
    fn part(&self, range: &Range<usize>) -> &[u8] {
        self.bytes.get(range.clone()).unwrap_or_default()
    }

    fn restart(&self, at: usize) -> Result<usize> {
        const OUTSIDE: Malformed = Malformed("a restart outside of its block");
        let from = at.checked_mul(4).and_then(|at| at.checked_add(self.end)).ok_or(OUTSIDE)?;
        let bytes = self.bytes.get(from..).and_then(|bytes| bytes.first_chunk::<4>()).ok_or(OUTSIDE)?;
        let offset = u32::from_le_bytes(*bytes) as usize;
        if at < self.restarts && offset < self.end { Ok(offset) } else { Err(OUTSIDE) }
    }

    /// Where the interval of a restart ends.
    fn restart_end(&self, at: usize) -> Result<usize> {
        let next = at.saturating_add(1);
        if next < self.restarts { self.restart(next) } else { Ok(self.end) }
    }

    /// The key at a restart.
    fn restart_key(&self, at: usize) -> Result<&[u8]> {
        let (raw, _) = self.entry(self.restart(at)?)?;
        if raw.shared != 0 {
            return Err(Malformed("a restart that shares a prefix"));
        }
        Ok(self.part(&raw.suffix))
    }

    /// The last restart whose key is below `key`, or is `key` if that is `allowed`.
    fn last_restart(&self, key: &[u8], allowed: bool) -> Option<usize> {
        let shared = self.prefix.len();
        match key.get(..shared).unwrap_or(key).cmp(self.part(&self.prefix)) {
            Ordering::Less => return None,
            Ordering::Greater => return self.restarts.checked_sub(1),
            Ordering::Equal => {}
        }
        let wanted = head(key, shared);
        let Range { start: mut low, end: mut high } = alike(&self.heads, wanted);
        while low < high {
            let middle = low.midpoint(high);
            // Every restart was decoded by `parse`, so none can fail here.
            let order = self.restart_key(middle).unwrap_or_default().cmp(key);
            if order.is_lt() || (allowed && order.is_eq()) {
                low = middle.saturating_add(1);
            } else {
                high = middle;
            }
        }
        low.checked_sub(1)
    }

    /// The entry at `offset`, and where the next begins.
    #[inline]
    fn entry(&self, offset: usize) -> Result<(Raw, usize)> {
        const CUT: Malformed = Malformed("an entry that is cut short");
        let body = self.bytes.get(..self.end).ok_or(CUT)?;
        let mut input = body.get(offset..).ok_or(CUT)?;
        let (shared, unshared, kind) = match input.split_first_chunk::<3>() {
            // So are nearly all: what is shared and what is not take a byte each.
            Some((&[shared, unshared, kind], rest)) if (shared | unshared) < 0x80 => {
                input = rest;
                (u64::from(shared), u64::from(unshared), kind)
            }
            _ => {
                let shared = varint::take(&mut input).ok_or(CUT)?;
                let unshared = varint::take(&mut input).ok_or(CUT)?;
                let (&kind, rest) = input.split_first().ok_or(CUT)?;
                input = rest;
                (shared, unshared, kind)
            }
        };
        let index = varint::take(&mut input).ok_or(CUT)?;
        let value = varint::take(&mut input).ok_or(CUT)?;
        let kind = EntryKind::decode(kind, self.ranges)?;
        let start = self.end.checked_sub(input.len()).ok_or(CUT)?;
        let middle = usize::try_from(unshared).ok().and_then(|bytes| start.checked_add(bytes)).ok_or(CUT)?;
        let end = usize::try_from(value).ok().and_then(|bytes| middle.checked_add(bytes)).ok_or(CUT)?;
        if end > self.end {
            return Err(CUT);
        }
        let shared = usize::try_from(shared).map_err(|_| CUT)?;
        Ok((Raw { shared, suffix: start..middle, kind, index, value: middle..end }, end))
    }
}

impl Raw {
    fn found(self, exact: bool) -> Found {
        Found { kind: self.kind, index: LogIndex(self.index), value: self.value, exact }
    }
}

/// Where a cursor stands.
#[derive(Clone, Debug, Default)]
struct Place {
    key: Range<usize>,
    kind: Option<EntryKind>,
    index: u64,
    value: Range<usize>,
}

/// Walks a block in one direction. New, it stands nowhere: seek first.
#[derive(Clone, Debug)]
pub(crate) struct BlockCursor {
    block: Block,
    /// Key of the current entry (forward), keys of an interval (reverse).
    keys: Vec<u8>,
    current: Place,
    /// Forward: where the next entry begins.
    next: usize,
    /// Reverse: entries of the interval before the current one, and the restart of that interval.
    before: Vec<Place>,
    restart: usize,
    reverse: bool,
}

impl BlockCursor {
    /// A cursor that stands nowhere.
    pub(crate) fn new(block: Block, reverse: bool) -> Self {
        let next = block.0.end;
        Self { block, keys: Vec::new(), current: Place::default(), next, before: Vec::new(), restart: 0, reverse }
    }

    pub(crate) fn is_reverse(&self) -> bool {
        self.reverse
    }

    /// Stands on an entry.
    pub(crate) fn valid(&self) -> bool {
        self.current.kind.is_some()
    }

    pub(crate) fn key(&self) -> &[u8] {
        self.keys.get(self.current.key.clone()).unwrap_or_default()
    }

    pub(crate) fn index(&self) -> LogIndex {
        LogIndex(self.current.index)
    }

    /// `None` is a tombstone.
    pub(crate) fn value(&self) -> Option<Bytes> {
        match self.current.kind {
            Some(EntryKind::Value | EntryKind::Operand) => Some(self.block.slice(self.current.value.clone())),
            _ => None,
        }
    }

    pub(crate) fn kind(&self) -> EntryKind {
        self.current.kind.unwrap_or(EntryKind::Tombstone)
    }

    /// The value without ownership.
    pub(crate) fn value_part(&self) -> &[u8] {
        self.block.part(&self.current.value)
    }

    pub(crate) fn is_tombstone(&self) -> bool {
        self.current.kind == Some(EntryKind::Tombstone)
    }

    /// Goes to the first entry in the cursor's direction.
    pub(crate) fn seek_start(&mut self) -> Result<()> {
        if self.reverse {
            self.restart = self.block.0.restarts;
            self.before.clear();
            self.step_back()
        } else {
            self.next = 0;
            self.step_forward()
        }
    }

    /// Goes to the first entry in the cursor's direction at `key`, or beyond it. With `exclusive`, beyond it.
    pub(crate) fn seek(&mut self, key: &[u8], exclusive: bool) -> Result<()> {
        if self.reverse {
            // The last entry below `key`.
            let inside = |at: &[u8]| if exclusive { at < key } else { at <= key };
            self.before.clear();
            self.current = Place::default();
            let Some(restart) = self.block.0.last_restart(key, !exclusive) else { return Ok(()) };
            self.load_interval(restart, inside)?;
            return self.step_back();
        }
        let below = |at: &[u8]| if exclusive { at <= key } else { at < key };
        // The entry may stand in the interval of the last restart below, or be the restart after it.
        let restart = self.block.0.last_restart(key, exclusive).unwrap_or(0);
        self.next = self.block.0.restart(restart)?;
        self.step_forward()?;
        while self.valid() && below(self.key()) {
            self.step_forward()?;
        }
        Ok(())
    }

    /// Reverse only: goes to the first entry at or after `key`, or the last entry if there is none.
    pub(crate) fn seek_ceiling(&mut self, key: &[u8]) -> Result<()> {
        debug_assert!(self.reverse, "a forward cursor seeks");
        let mut found = false;
        let mut up_to_first = |at: &[u8]| {
            let wanted = !found;
            found = found || at >= key;
            wanted
        };
        let restart = self.block.0.last_restart(key, false).unwrap_or(0);
        self.load_interval(restart, &mut up_to_first)?;
        let next = restart.saturating_add(1);
        if !found && next < self.block.0.restarts {
            let mut first = true;
            self.load_interval(next, |_| std::mem::take(&mut first))?;
        }
        self.step_back()
    }

    /// Goes one entry on in the cursor's direction; at the end it stands nowhere.
    pub(crate) fn advance(&mut self) -> Result<()> {
        if self.reverse { self.step_back() } else { self.step_forward() }
    }

    #[inline]
    fn step_forward(&mut self) -> Result<()> {
        if self.next >= self.block.0.end {
            self.current = Place::default();
            return Ok(());
        }
        let (raw, next) = self.block.0.entry(self.next)?;
        // A seek may begin at any restart; what the buffer holds then is another key, but nothing of it is shared.
        if raw.shared > self.keys.len() {
            return Err(Malformed("a prefix longer than the key before"));
        }
        self.keys.truncate(raw.shared);
        self.keys.extend_from_slice(self.block.part(&raw.suffix));
        self.current = Place { key: 0..self.keys.len(), kind: Some(raw.kind), index: raw.index, value: raw.value };
        self.next = next;
        Ok(())
    }

    fn step_back(&mut self) -> Result<()> {
        if self.before.is_empty()
            && let Some(restart) = self.restart.checked_sub(1)
        {
            self.load_interval(restart, |_| true)?;
        }
        self.current = self.before.pop().unwrap_or_default();
        Ok(())
    }

    /// Decodes the entries of an interval up to the first that does not pass.
    fn load_interval(&mut self, restart: usize, mut passes: impl FnMut(&[u8]) -> bool) -> Result<()> {
        self.restart = restart;
        self.keys.clear();
        self.before.clear();
        let mut offset = self.block.0.restart(restart)?;
        let limit = self.block.0.restart_end(restart)?;
        let mut last: Range<usize> = 0..0;
        while offset < limit {
            let (raw, next) = self.block.0.entry(offset)?;
            if raw.shared > last.len() {
                return Err(Malformed("a prefix longer than the key before"));
            }
            // An interval of a few entries cannot make more of shared prefixes than this, unless it means harm.
            if self.keys.len() > BLOCK_BYTES_MAX {
                return Err(Malformed("an interval whose keys are over the limit"));
            }
            let start = self.keys.len();
            self.keys.extend_from_within(last.start..last.start.saturating_add(raw.shared));
            self.keys.extend_from_slice(self.block.part(&raw.suffix));
            last = start..self.keys.len();
            if !passes(self.keys.get(last.clone()).unwrap_or_default()) {
                break;
            }
            self.before.push(Place { key: last.clone(), kind: Some(raw.kind), index: raw.index, value: raw.value });
            offset = next;
        }
        Ok(())
    }
}

/// The places in `heads`, which ascend, of those that are `wanted`; where there is none, the place where it would be.
pub(crate) fn alike(heads: &[u64], wanted: u64) -> Range<usize> {
    let low = heads.partition_point(|head| *head < wanted);
    let rest = heads.get(low..).unwrap_or_default();
    match rest.first() {
        Some(head) if *head == wanted => low..low.saturating_add(rest.partition_point(|head| *head == wanted)),
        _ => low..low,
    }
}
