//! The content of a simulated disk at rest, and what a crash may have left of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::env::decide;
use super::ranges::Ranges;
use crate::BLOCK_BYTES;

/// What a drive writes whole; a crash tears between these.
pub(crate) const SECTOR_BYTES: usize = 512;

/// Writes whose subsets are all enumerated: 2^10 images.
const SUBSET_WRITES_MAX: usize = 10;

/// Images drawn when there are too many subsets.
const SAMPLES: u64 = 1024;

pub(crate) type Block = Arc<[u8; BLOCK_BYTES]>;

/// The content of a disk at rest. Cloning shares the blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskImage {
    pub(crate) capacity: u64,
    pub(crate) blocks: BTreeMap<u64, Block>,
    pub(crate) reserved: Ranges,
}

impl DiskImage {
    /// Bytes that can be addressed.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The `length` bytes from `offset`. Ranges beyond what was written are zeroes.
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut out = vec![0; length];
        let mut at = 0;
        while at < length {
            let position = offset + at as u64;
            let inside = (position % BLOCK_BYTES as u64) as usize;
            let take = (BLOCK_BYTES - inside).min(length - at);
            if let Some(block) = self.blocks.get(&(position / BLOCK_BYTES as u64)) {
                out[at..at + take].copy_from_slice(&block[inside..inside + take]);
            }
            at += take;
        }
        out
    }

    /// Flips one bit of the byte at `offset`.
    pub fn flip_bit(&mut self, offset: u64, bit: u8) {
        flip(&mut self.blocks, offset, bit);
    }

    /// The offsets of the blocks that were ever written, ascending.
    pub fn written(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().map(|index| index * BLOCK_BYTES as u64)
    }

    /// Lets `writes` reach the medium as far as `keep` says for each write and sector.
    fn land(&mut self, writes: &[Unsettled], keep: impl Fn(&Unsettled, usize, usize) -> bool) {
        for write in writes {
            for (position, (index, block)) in write.blocks.iter().enumerate() {
                let sectors = BLOCK_BYTES / SECTOR_BYTES;
                let kept: Vec<_> = (0..sectors).map(|sector| keep(write, position, sector)).collect();
                if kept.iter().all(|k| *k) {
                    self.blocks.insert(*index, block.clone());
                } else if kept.iter().any(|k| *k) {
                    let target = Arc::make_mut(self.blocks.entry(*index).or_insert_with(zero_block));
                    for sector in (0..sectors).filter(|s| kept[*s]) {
                        let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                        target[range.clone()].copy_from_slice(&block[range]);
                    }
                }
            }
        }
    }
}

pub(crate) fn zero_block() -> Block {
    Arc::new([0; BLOCK_BYTES])
}

pub(crate) fn flip(blocks: &mut BTreeMap<u64, Block>, offset: u64, bit: u8) {
    let block = blocks.entry(offset / BLOCK_BYTES as u64).or_insert_with(zero_block);
    Arc::make_mut(block)[(offset % BLOCK_BYTES as u64) as usize] ^= 1 << (bit % 8);
}

/// A write that no crash-proof acknowledgement covers.
#[derive(Clone, Debug)]
pub(crate) struct Unsettled {
    pub(crate) sequence: u64,
    pub(crate) blocks: Vec<(u64, Block)>,
}

/// What lands of a write of which `seed` lets some sectors go astray, at least one: the others keep what `before` tells.
pub(crate) fn torn(content: &[(u64, Block)], before: impl Fn(u64) -> Block, seed: u64) -> Vec<(u64, Block)> {
    const SECTORS: usize = BLOCK_BYTES / SECTOR_BYTES;
    let missed = decide(seed, &[0]) % (content.len() * SECTORS).max(1) as u64;
    let lands = |place: usize| place as u64 != missed && decide(seed, &[place as u64, 1]).is_multiple_of(2);
    let blocks = content.iter().enumerate().map(|(position, (index, block))| {
        let mut mixed = before(*index);
        for sector in (0..SECTORS).filter(|sector| lands(position * SECTORS + sector)) {
            let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
            Arc::make_mut(&mut mixed)[range.clone()].copy_from_slice(&block[range]);
        }
        (*index, mixed)
    });
    blocks.collect()
}

/// What `seed` lets a loss of power leave of `durable` and of the writes on top of it.
pub(crate) fn after_crash(durable: &DiskImage, writes: &[Unsettled], seed: u64) -> DiskImage {
    let mut image = durable.clone();
    image.land(writes, |write, position, sector| match decide(seed, &[write.sequence]) % 4 {
        0 => false,
        1 => true,
        // A cut: the first sectors arrived.
        2 => {
            let sectors = (write.blocks.len() * (BLOCK_BYTES / SECTOR_BYTES)) as u64;
            let cut = decide(seed, &[write.sequence, 1]) % (sectors + 1);
            ((position * (BLOCK_BYTES / SECTOR_BYTES) + sector) as u64) < cut
        }
        // Any sectors.
        _ => decide(seed, &[write.sequence, position as u64, sector as u64, 2]).is_multiple_of(2),
    });
    image
}

/// What a loss of power finds on all disks of a volume at one instant: what is durable, and the writes of which any may have
/// landed. See [`super::SimMedia::crash_point`].
#[derive(Clone, Debug)]
pub struct CrashPoint {
    disks: Vec<(DiskImage, Vec<Unsettled>)>,
}

impl CrashPoint {
    pub(crate) fn new(disks: Vec<(DiskImage, Vec<Unsettled>)>) -> Self {
        Self { disks }
    }

    /// How many writes may have landed or not: those of the first disk, oldest first, then those of the next.
    pub fn writes(&self) -> usize {
        self.disks.iter().map(|(_, writes)| writes.len()).sum()
    }

    /// The content of each disk when of the writes those have landed whole for which `landed` says so.
    pub fn subset(&self, landed: impl Fn(usize) -> bool) -> Vec<DiskImage> {
        self.image(|write, _, _| landed(write))
    }

    /// The content of each disk when all writes have landed but the first half of the sectors of one, or the second.
    pub fn torn(&self, write: usize, first: bool) -> Vec<DiskImage> {
        self.image(|other, at, total| other != write || (at < total / 2) != first)
    }

    /// The content of each disk when `seed` decides for each write whether it landed, did not, or tore.
    pub fn drawn(&self, seed: u64) -> Vec<DiskImage> {
        let disks = (0..).zip(&self.disks);
        disks.map(|(disk, (durable, writes))| after_crash(durable, writes, decide(seed, &[disk]))).collect()
    }

    /// `landed` is asked about a write, one of its sectors, and how many it has.
    fn image(&self, landed: impl Fn(usize, usize, usize) -> bool) -> Vec<DiskImage> {
        let mut before = 0;
        let image = |(durable, writes): &(DiskImage, Vec<Unsettled>)| {
            let mut image = durable.clone();
            for (number, write) in (before..).zip(writes) {
                image.land(std::slice::from_ref(write), |write, position, sector| {
                    const SECTORS: usize = BLOCK_BYTES / SECTOR_BYTES;
                    landed(number, position * SECTORS + sector, write.blocks.len() * SECTORS)
                });
            }
            before += writes.len();
            image
        };
        self.disks.iter().map(image).collect()
    }
}

/// Images that a crash at one instant may leave: see [`super::SimDisk::crash_images`].
#[derive(Debug)]
pub struct CrashImages {
    durable: DiskImage,
    writes: Vec<Unsettled>,
    next: u64,
}

impl CrashImages {
    pub(crate) fn new(durable: DiskImage, writes: Vec<Unsettled>) -> Self {
        Self { durable, writes, next: 0 }
    }

    fn subsets(&self) -> u64 {
        if self.writes.len() <= SUBSET_WRITES_MAX { 1 << self.writes.len() } else { SAMPLES }
    }

    fn subset(&self, number: u64) -> DiskImage {
        if self.writes.len() > SUBSET_WRITES_MAX {
            return after_crash(&self.durable, &self.writes, number);
        }
        let mut image = self.durable.clone();
        let kept = |sequence: u64| self.writes.iter().position(|w| w.sequence == sequence).unwrap_or(0);
        image.land(&self.writes, |write, _, _| number >> kept(write.sequence) & 1 == 1);
        image
    }

    /// All writes whole but one, of which the first or the last sectors are missing.
    fn torn(&self, number: u64) -> Option<DiskImage> {
        let torn = self.writes.get((number / 2) as usize)?.sequence;
        let mut image = self.durable.clone();
        image.land(&self.writes, |write, position, sector| {
            let total = write.blocks.len() * (BLOCK_BYTES / SECTOR_BYTES);
            let at = position * (BLOCK_BYTES / SECTOR_BYTES) + sector;
            write.sequence != torn || (at < total / 2) == number.is_multiple_of(2)
        });
        Some(image)
    }
}

impl Iterator for CrashImages {
    type Item = DiskImage;

    fn next(&mut self) -> Option<DiskImage> {
        let number = self.next;
        self.next += 1;
        match number.checked_sub(self.subsets()) {
            None => Some(self.subset(number)),
            Some(torn) => self.torn(torn),
        }
    }
}
