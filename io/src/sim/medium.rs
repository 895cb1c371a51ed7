//! The medium itself: what is durable, what is only in the cache of the drive, what is reserved.
//!
//! Pure state, without time, faults or locks. Its rules are those that [`super`] lists.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::image::{Block, DiskImage, Unsettled, flip, zero_block};
use super::ranges::Ranges;
use crate::{AlignedBuf, AlignedBytes, BLOCK_BYTES};

const BLOCK: u64 = BLOCK_BYTES as u64;

#[derive(Debug)]
pub(crate) struct Medium {
    /// What survives a crash for certain.
    durable: DiskImage,
    /// What a read sees.
    current: BTreeMap<u64, Block>,
    /// Completed writes that nothing has made durable, by block; the latest last.
    unsynced: BTreeMap<u64, Vec<(u64, Block)>>,
    /// Blocks that cannot be read until they are written again.
    unreadable: Ranges,
    /// Blocks that may be reserved.
    space: Option<u64>,
    sequence: u64,
}

impl Medium {
    pub(crate) fn new(image: DiskImage, space: Option<u64>) -> Self {
        Self {
            current: image.blocks.clone(),
            durable: image,
            unsynced: BTreeMap::new(),
            unreadable: Ranges::default(),
            space: space.map(|bytes| bytes / BLOCK),
            sequence: 0,
        }
    }

    /// What is left after a crash, which reads as `image`. What could not be read still cannot, unless it was written.
    pub(crate) fn after_crash(&self, image: DiskImage) -> Self {
        let mut unreadable = self.unreadable.clone();
        if unreadable.total() > 0 {
            for (&index, _) in image.blocks.iter().filter(|&(index, block)| self.current.get(index) != Some(block)) {
                unreadable.remove(index..index + 1);
            }
        }
        Self { unreadable, ..Self::new(image, self.space()) }
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.durable.capacity
    }

    pub(crate) fn set_space(&mut self, bytes: Option<u64>) {
        self.space = bytes.map(|bytes| bytes / BLOCK);
    }

    pub(crate) fn space(&self) -> Option<u64> {
        self.space.map(|blocks| blocks * BLOCK)
    }

    /// Bytes that are reserved or written.
    pub(crate) fn reserved(&self) -> u64 {
        self.durable.reserved.total() * BLOCK
    }

    /// Bytes of the range that are reserved or written.
    pub(crate) fn reserved_in(&self, offset: u64, length: u64) -> u64 {
        self.durable.reserved.covered(blocks(offset, length)) * BLOCK
    }

    /// The number that the next write will get. Writes with smaller ones have completed.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Reserves the range; false when the disk is full.
    pub(crate) fn reserve(&mut self, offset: u64, length: u64) -> bool {
        let range = blocks(offset, length);
        let wanted = range.end - range.start - self.durable.reserved.covered(range.clone());
        if wanted > 0 && self.space.is_some_and(|space| self.durable.reserved.total() + wanted > space) {
            return false;
        }
        self.durable.reserved.insert(range);
        true
    }

    /// Completes a write that promises nothing yet.
    pub(crate) fn write(&mut self, content: &[(u64, Block)]) {
        let sequence = self.sequence;
        self.sequence += 1;
        for (index, block) in content {
            self.current.insert(*index, block.clone());
            self.unsynced.entry(*index).or_default().push((sequence, block.clone()));
            self.unreadable.remove(*index..index + 1);
        }
    }

    /// Completes a durable write: nothing that was written below it can come back.
    pub(crate) fn write_durable(&mut self, content: &[(u64, Block)]) {
        self.sequence += 1;
        for (index, block) in content {
            self.current.insert(*index, block.clone());
            self.durable.blocks.insert(*index, block.clone());
            self.unsynced.remove(index);
            self.unreadable.remove(*index..index + 1);
        }
    }

    /// Makes the writes with numbers below `sequence` durable.
    pub(crate) fn flush(&mut self, sequence: u64) {
        let durable = &mut self.durable.blocks;
        self.unsynced.retain(|index, versions| {
            let covered = versions.partition_point(|(number, _)| *number < sequence);
            if let Some((_, block)) = versions.drain(..covered).next_back() {
                durable.insert(*index, block);
            }
            !versions.is_empty()
        });
    }

    /// Fills `buf`; false when a block of the range cannot be read.
    pub(crate) fn read(&self, offset: u64, buf: &mut AlignedBuf) -> bool {
        let range = blocks(offset, buf.len() as u64);
        if self.unreadable.covered(range.clone()) > 0 {
            return false;
        }
        buf.fill(0);
        for (index, block) in self.current.range(range.clone()) {
            let at = ((index - range.start) * BLOCK) as usize;
            buf[at..at + BLOCK_BYTES].copy_from_slice(&block[..]);
        }
        true
    }

    /// A block as a read sees it.
    pub(crate) fn block(&self, index: u64) -> Block {
        self.current.get(&index).cloned().unwrap_or_else(zero_block)
    }

    /// Gives the range back. It reads as zeroes, or `stale` as before, and keeps that through a crash.
    pub(crate) fn discard(&mut self, offset: u64, length: u64, stale: bool) {
        let range = blocks(offset, length);
        self.durable.reserved.remove(range.clone());
        if !stale {
            self.erase(range);
        }
    }

    /// Makes the range zeroes, durably.
    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        self.erase(blocks(offset, length));
    }

    fn erase(&mut self, range: Range<u64>) {
        for map in [&mut self.current, &mut self.durable.blocks] {
            let gone: Vec<_> = map.range(range.clone()).map(|(index, _)| *index).collect();
            for index in gone {
                map.remove(&index);
            }
        }
        let gone: Vec<_> = self.unsynced.range(range.clone()).map(|(index, _)| *index).collect();
        for index in gone {
            self.unsynced.remove(&index);
        }
        self.unreadable.remove(range);
    }

    /// Flips a bit where it stands, in the cache and on the medium.
    pub(crate) fn flip_bit(&mut self, offset: u64, bit: u8) {
        flip(&mut self.current, offset, bit);
        let index = offset / BLOCK;
        match self.unsynced.get_mut(&index).and_then(|versions| versions.last_mut()) {
            Some((_, block)) => Arc::make_mut(block)[(offset % BLOCK) as usize] ^= 1 << (bit % 8),
            None => flip(&mut self.durable.blocks, offset, bit),
        }
    }

    /// Makes the range unreadable until it is written again.
    pub(crate) fn damage(&mut self, offset: u64, length: u64) {
        self.unreadable.insert(blocks(offset, length));
    }

    /// Undoes [`Medium::damage`].
    pub(crate) fn heal(&mut self) {
        self.unreadable = Ranges::default();
    }

    /// Offsets that hold data within the range; the whole disk for the widest.
    pub(crate) fn written(&self, offset: u64, length: u64) -> impl DoubleEndedIterator<Item = u64> + '_ {
        self.current.range(blocks(offset, length)).map(|(index, _)| index * BLOCK)
    }

    /// What is durable for certain, and the completed writes that are not.
    pub(crate) fn at_risk(&self) -> (DiskImage, Vec<Unsettled>) {
        let mut writes: BTreeMap<u64, Vec<(u64, Block)>> = BTreeMap::new();
        for (index, versions) in &self.unsynced {
            for (sequence, block) in versions {
                writes.entry(*sequence).or_default().push((*index, block.clone()));
            }
        }
        let writes = writes.into_iter().map(|(sequence, blocks)| Unsettled { sequence, blocks }).collect();
        (self.durable.clone(), writes)
    }

    /// The content with every completed write in it, without the blocks that cannot be read.
    pub(crate) fn image_as_read(&self) -> DiskImage {
        let mut image = self.image();
        image.blocks.retain(|index, _| self.unreadable.covered(*index..index + 1) == 0);
        image
    }

    /// The content with every completed write in it.
    pub(crate) fn image(&self) -> DiskImage {
        DiskImage { blocks: self.current.clone(), ..self.durable.clone() }
    }
}

/// The blocks of a range.
pub(crate) fn blocks(offset: u64, length: u64) -> Range<u64> {
    offset / BLOCK..(offset + length).div_ceil(BLOCK)
}

/// The blocks of a write.
pub(crate) fn content(offset: u64, bufs: &[AlignedBytes]) -> Vec<(u64, Block)> {
    let chunks = bufs.iter().flat_map(|buf| buf.as_chunks::<BLOCK_BYTES>().0);
    (offset / BLOCK..).zip(chunks).map(|(index, chunk)| (index, Arc::new(*chunk))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::image::{CrashImages, after_crash};

    fn medium() -> Medium {
        Medium::new(DiskImage { capacity: 1 << 20, ..DiskImage::default() }, None)
    }

    fn put(index: u64, byte: u8) -> Vec<(u64, Block)> {
        vec![(index, Arc::new([byte; BLOCK_BYTES]))]
    }

    fn byte(image: &DiskImage, index: u64) -> u8 {
        image.read(index * BLOCK, 1)[0]
    }

    /// Every value that the first byte of a block may have after a crash.
    fn survivors(medium: &Medium, index: u64) -> Vec<u8> {
        let (durable, writes) = medium.at_risk();
        let mut seen: Vec<_> = (0..200).map(|seed| byte(&after_crash(&durable, &writes, seed), index)).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn a_durable_write_covers_only_itself() {
        let mut m = medium();
        m.write(&put(0, 1));
        m.write_durable(&put(1, 2));
        assert_eq!(survivors(&m, 0), [0, 1]);
        assert_eq!(survivors(&m, 1), [2]);
    }

    #[test]
    fn a_durable_write_buries_what_was_below_it() {
        let mut m = medium();
        m.write(&put(0, 1));
        m.write_durable(&put(0, 2));
        assert_eq!(survivors(&m, 0), [2]);
        m.write(&put(0, 3));
        assert_eq!(survivors(&m, 0), [2, 3]);
    }

    #[test]
    fn a_flush_covers_what_completed_before_it_was_called() {
        let mut m = medium();
        m.write(&put(0, 1));
        m.write(&put(1, 1));
        let called = m.sequence();
        m.write(&put(1, 2));
        m.flush(called);
        assert_eq!(survivors(&m, 0), [1]);
        assert_eq!(survivors(&m, 1), [1, 2]);
    }

    #[test]
    fn a_read_sees_the_latest_write_before_it_is_durable() {
        let mut m = medium();
        m.write_durable(&put(0, 1));
        m.write(&put(0, 2));
        let mut buf = AlignedBuf::zeroed(2 * BLOCK_BYTES);
        assert!(m.read(0, &mut buf));
        assert_eq!((buf[0], buf[BLOCK_BYTES]), (2, 0));
    }

    #[test]
    fn a_crash_tears_between_sectors_and_nowhere_else() {
        let mut m = medium();
        m.write(&put(0, 0xff));
        let (durable, writes) = m.at_risk();
        let mut torn = 0;
        for seed in 0..100 {
            let image = after_crash(&durable, &writes, seed).read(0, BLOCK_BYTES);
            let sectors: Vec<_> = image.chunks(512).map(|s| (s[0], s.iter().all(|b| *b == s[0]))).collect();
            assert!(sectors.iter().all(|(_, whole)| *whole), "seed={seed}");
            torn += u32::from(sectors.iter().any(|s| s.0 != sectors[0].0));
        }
        assert!(torn > 20, "torn={torn}");
    }

    #[test]
    fn all_subsets_of_a_few_writes_are_enumerated() {
        let mut m = medium();
        for index in 0..3 {
            m.write(&put(index, 1));
        }
        let (durable, writes) = m.at_risk();
        let images: Vec<_> = CrashImages::new(durable, writes).collect();
        let mut whole: Vec<_> = images[..8].iter().map(|i| (byte(i, 0), byte(i, 1), byte(i, 2))).collect();
        whole.sort_unstable();
        whole.dedup();
        assert_eq!(whole.len(), 8);
        // Then each write torn at its middle, either way.
        assert_eq!(images.len(), 8 + 6);
        assert_eq!((images[8].read(0, 1)[0], images[8].read(4095, 1)[0]), (1, 0));
        assert_eq!((images[9].read(0, 1)[0], images[9].read(4095, 1)[0]), (0, 1));
    }

    #[test]
    fn space_is_taken_once_and_given_back() {
        let mut m = medium();
        m.set_space(Some(2 * BLOCK));
        assert!(m.reserve(0, 2 * BLOCK));
        assert!(m.reserve(BLOCK, BLOCK));
        assert!(!m.reserve(2 * BLOCK, BLOCK));
        m.discard(0, BLOCK, false);
        assert!(m.reserve(2 * BLOCK, BLOCK));
        m.set_space(None);
        assert!(m.reserve(0, 1 << 20));
    }

    #[test]
    fn rot_stays_and_damage_ends_with_a_write() {
        let mut m = medium();
        m.write_durable(&put(0, 1));
        m.flip_bit(5, 1);
        assert_eq!(m.image().read(5, 1), [3]);
        assert_eq!(m.at_risk().0.read(5, 1), [3]);
        m.damage(0, BLOCK);
        let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
        assert!(!m.read(0, &mut buf));
        m.write(&put(0, 4));
        assert!(m.read(0, &mut buf));
    }
}
