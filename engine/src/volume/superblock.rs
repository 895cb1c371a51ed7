//! The superblock: its content and its bytes.
//!
//! # Place
//! used by `quorum`, which chooses among the copies, and by `volume`, which writes them
//! # Format
//! docs/format.md, section "Superblock"; a test ties the two
//! # Invariants
//! 1. The checksum stored in a copy is bound to the copy's number, so that a copy that was written to the place of
//!    another one does not count twice.
//! 2. The checksum of the content is the same for all copies; it is what the next superblock names as its parent.
//! 3. A superblock with notes has a version of its own, so that a build that would lose them does not open it; the next one without
//!    is of the first version again.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::BTreeMap;

use bytes::Bytes;
use crc_fast::crc64_nvme;
use mainstay_io::{AlignedBuf, BLOCK_BYTES, SUPERBLOCK_ZONE_BYTES};
use mainstay_wal::Lsn;

use super::extent::Extent;
use crate::codec::{Decoder, put_varint};

/// First bytes of every copy.
pub(crate) const MAGIC: [u8; 8] = *b"MAINSTAY";
/// The version of a volume without notes.
pub(crate) const VOLUME_FORMAT_VERSION: u16 = 1;
/// The version of a volume with notes, and the newest that this code opens.
pub(crate) const VOLUME_FORMAT_VERSION_NOTES: u16 = 2;
/// Copies of the superblock.
pub(crate) const COPIES: usize = 4;
/// Bytes from one copy to the next.
pub(crate) const COPY_STRIDE_BYTES: u64 = 256 << 10;
/// Extents that the root may have.
pub(crate) const ROOT_EXTENTS_MAX: usize = 256;

const OFFSET_VERSION: usize = 8;
const OFFSET_FLAGS: usize = 10;
const OFFSET_ROOT_EXTENTS_COUNT: usize = 12;
const OFFSET_VOLUME: usize = 16;
const OFFSET_INCARNATION: usize = 32;
const OFFSET_IDENTITY: usize = 48;
const OFFSET_SEQUENCE: usize = 80;
const OFFSET_PARENT: usize = 88;
const OFFSET_WAL_BYTES: usize = 96;
const OFFSET_EPOCH: usize = 104;
const OFFSET_WAL_START: usize = 112;
const OFFSET_CLEAN_END: usize = 120;
const OFFSET_ROOT_BYTES: usize = 128;
const OFFSET_ROOT_CHECKSUM: usize = 136;
const OFFSET_NOTES_BYTES: usize = 144;
const OFFSET_ROOT_EXTENTS: usize = 256;
const OFFSET_NOTES: usize = OFFSET_ROOT_EXTENTS + ROOT_EXTENTS_MAX * EXTENT_BYTES;
const OFFSET_CHECKSUM: usize = BLOCK_BYTES - 8;

/// Bytes of all notes together.
pub(crate) const NOTES_BYTES_MAX: usize = OFFSET_CHECKSUM - OFFSET_NOTES;
/// Bytes of one note.
pub(crate) const NOTE_BYTES_MAX: usize = 32;

const FLAG_CLEAN_END: u16 = 1;
const FLAG_ROOT: u16 = 2;
const FLAG_CLOSED: u16 = 4;
const EXTENT_BYTES: usize = 8;

const _: () = assert!(COPIES as u64 * COPY_STRIDE_BYTES == SUPERBLOCK_ZONE_BYTES);
const _: () = assert!(OFFSET_NOTES < OFFSET_CHECKSUM);

/// Where the manifest pages lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    /// At most [`ROOT_EXTENTS_MAX`].
    pub(crate) extents: Vec<Extent>,
    /// Bytes used in them.
    pub(crate) bytes: u64,
    /// For the owner of the pages; the volume does not read them.
    pub(crate) checksum: u64,
}

/// What a volume knows of itself before it has read anything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// Made at format; every batch of the log carries it.
    pub(crate) volume: [u8; 16],
    /// Made at format; tells this volume from one that bore the same identity before.
    pub(crate) incarnation: [u8; 16],
    /// Opaque here: whom the volume answers as. Zero until it was given one.
    pub(crate) identity: [u8; 32],
    /// One more with every update.
    pub(crate) sequence: u64,
    /// Checksum of the content that this one replaces; 0 for the first.
    pub(crate) parent: u64,
    /// Bytes of the WAL zone.
    pub(crate) wal_bytes: u64,
    /// The epoch of the log; one more with every open, durable before anything else is written.
    pub(crate) epoch: u64,
    /// Where the oldest batch of the log begins that is still needed.
    pub(crate) wal_start: Lsn,
    /// Where the log ended at the last clean close. It stays when the log goes on: the log never becomes shorter again, so
    /// it is a lower bound for the end of the log for ever.
    pub(crate) clean_end: Option<Lsn>,
    /// Nobody has opened the volume since the close that `clean_end` is from: the log ends there.
    pub(crate) closed: bool,
    /// The manifest pages; None until the first were written.
    pub(crate) root: Option<Root>,
    /// Opaque here: what the owner of a group's log keeps beside the log, at most [`NOTE_BYTES_MAX`] bytes each and
    /// [`NOTES_BYTES_MAX`] as they are stored.
    pub(crate) notes: BTreeMap<u64, Bytes>,
}

impl Superblock {
    /// The notes as they are stored.
    pub(crate) fn encoded_notes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut before = 0_u64;
        for (group, note) in &self.notes {
            put_varint(&mut out, group.saturating_sub(before));
            out.push(u8::try_from(note.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(note);
            before = *group;
        }
        out
    }

    fn decode_notes(bytes: &[u8]) -> crate::Result<BTreeMap<u64, Bytes>> {
        let mut from = Decoder::new(Bytes::copy_from_slice(bytes), "a note of the superblock");
        let mut notes = BTreeMap::new();
        let mut group = 0_u64;
        while !from.is_empty() {
            group = group.checked_add(from.varint()?).ok_or_else(|| from.corrupt("a group is above 64 bits"))?;
            let length = usize::from(from.u8()?);
            let note = from.take(length)?;
            if length > NOTE_BYTES_MAX || notes.insert(group, note).is_some() {
                return Err(from.corrupt("it is too long, or there are two of one group"));
            }
        }
        Ok(notes)
    }

    /// Checksum of the content, the same for all copies.
    pub(crate) fn checksum(&self) -> u64 {
        Self::content_checksum(&self.encode(0)).unwrap_or_default()
    }

    /// The bytes of copy `copy`.
    ///
    /// Panics when the root has more than [`ROOT_EXTENTS_MAX`] extents, or the notes more than [`NOTES_BYTES_MAX`] bytes;
    /// [`super::Volume::update`] checks that.
    #[allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "all offsets are constants of one block"
    )]
    pub(crate) fn encode(&self, copy: usize) -> AlignedBuf {
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        let flags =
            [(self.clean_end.is_some(), FLAG_CLEAN_END), (self.root.is_some(), FLAG_ROOT), (self.closed, FLAG_CLOSED)];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |flags, (_, flag)| flags | flag);
        put(0, &MAGIC);
        put(OFFSET_VERSION, &self.version().to_le_bytes());
        put(OFFSET_FLAGS, &flags.to_le_bytes());
        put(OFFSET_VOLUME, &self.volume);
        put(OFFSET_INCARNATION, &self.incarnation);
        put(OFFSET_IDENTITY, &self.identity);
        put(OFFSET_SEQUENCE, &self.sequence.to_le_bytes());
        put(OFFSET_PARENT, &self.parent.to_le_bytes());
        put(OFFSET_WAL_BYTES, &self.wal_bytes.to_le_bytes());
        put(OFFSET_EPOCH, &self.epoch.to_le_bytes());
        put(OFFSET_WAL_START, &self.wal_start.0.to_le_bytes());
        put(OFFSET_CLEAN_END, &self.clean_end.unwrap_or_default().0.to_le_bytes());
        if let Some(root) = &self.root {
            assert!(root.extents.len() <= ROOT_EXTENTS_MAX, "root of {} extents", root.extents.len());
            put(OFFSET_ROOT_EXTENTS_COUNT, &(root.extents.len() as u32).to_le_bytes());
            put(OFFSET_ROOT_BYTES, &root.bytes.to_le_bytes());
            put(OFFSET_ROOT_CHECKSUM, &root.checksum.to_le_bytes());
            for (i, extent) in root.extents.iter().enumerate() {
                put(OFFSET_ROOT_EXTENTS + i * EXTENT_BYTES, &extent.first_unit.to_le_bytes());
                put(OFFSET_ROOT_EXTENTS + i * EXTENT_BYTES + 4, &extent.units.to_le_bytes());
            }
        }
        let notes = self.encoded_notes();
        assert!(notes.len() <= NOTES_BYTES_MAX, "notes of {} bytes", notes.len());
        put(OFFSET_NOTES_BYTES, &(notes.len() as u32).to_le_bytes());
        put(OFFSET_NOTES, &notes);
        let stored = crc64_nvme(&block[..OFFSET_CHECKSUM]) ^ copy as u64;
        block[OFFSET_CHECKSUM..].copy_from_slice(&stored.to_le_bytes());
        block
    }

    /// The version that it is stored as.
    pub(crate) fn version(&self) -> u16 {
        if self.notes.is_empty() { VOLUME_FORMAT_VERSION } else { VOLUME_FORMAT_VERSION_NOTES }
    }

    fn content_checksum(block: &[u8]) -> Option<u64> {
        Some(crc64_nvme(block.get(..OFFSET_CHECKSUM)?))
    }

    /// Reads the fields of a block whose checksum has matched. None when they cannot be: a mistake of the writer.
    fn decode_fields(block: &[u8], version: u16) -> Option<Self> {
        let flags = u16::from_le_bytes(array_at(block, OFFSET_FLAGS)?);
        let u64_at = |at: usize| Some(u64::from_le_bytes(array_at(block, at)?));
        let root = if flags & FLAG_ROOT == 0 {
            None
        } else {
            let count = u32::from_le_bytes(array_at(block, OFFSET_ROOT_EXTENTS_COUNT)?) as usize;
            if count > ROOT_EXTENTS_MAX {
                return None;
            }
            let list = block.get(OFFSET_ROOT_EXTENTS..)?;
            let extents = list
                .chunks_exact(EXTENT_BYTES)
                .take(count)
                .map(|c| {
                    let first_unit = u32::from_le_bytes(array_at(c, 0)?);
                    Some(Extent { first_unit, units: u32::from_le_bytes(array_at(c, 4)?) })
                })
                .collect::<Option<Vec<Extent>>>()?;
            Some(Root { extents, bytes: u64_at(OFFSET_ROOT_BYTES)?, checksum: u64_at(OFFSET_ROOT_CHECKSUM)? })
        };
        let notes = if version < VOLUME_FORMAT_VERSION_NOTES {
            BTreeMap::new()
        } else {
            let bytes = u32::from_le_bytes(array_at(block, OFFSET_NOTES_BYTES)?) as usize;
            let end = OFFSET_NOTES.checked_add(bytes).filter(|end| *end <= OFFSET_CHECKSUM)?;
            Self::decode_notes(block.get(OFFSET_NOTES..end)?).ok()?
        };
        let clean_end = Lsn(u64_at(OFFSET_CLEAN_END)?);
        Some(Self {
            volume: array_at(block, OFFSET_VOLUME)?,
            incarnation: array_at(block, OFFSET_INCARNATION)?,
            identity: array_at(block, OFFSET_IDENTITY)?,
            sequence: u64_at(OFFSET_SEQUENCE)?,
            parent: u64_at(OFFSET_PARENT)?,
            wal_bytes: u64_at(OFFSET_WAL_BYTES)?,
            epoch: u64_at(OFFSET_EPOCH)?,
            wal_start: Lsn(u64_at(OFFSET_WAL_START)?),
            clean_end: (flags & FLAG_CLEAN_END != 0).then_some(clean_end),
            closed: flags & FLAG_CLOSED != 0,
            root,
            notes,
        })
    }
}

/// What lies at the place of one copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    /// Zeroes: never written.
    Blank,
    /// Bytes of someone else.
    NoMagic,
    /// A superblock whose checksum does not match.
    Damaged,
    /// The device answers an error for it.
    Unreadable,
    /// A whole superblock of a newer format.
    Newer(u16),
    /// A whole superblock and the checksum of its content.
    Whole(Box<Superblock>, u64),
}

impl Copy {
    /// Judges the block at the place of copy `copy`.
    pub(crate) fn decode(block: &[u8], copy: usize) -> Self {
        if block.iter().all(|&b| b == 0) {
            return Self::Blank;
        }
        if block.get(..MAGIC.len()) != Some(&MAGIC) {
            return Self::NoMagic;
        }
        let stored = array_at(block, OFFSET_CHECKSUM).map(u64::from_le_bytes);
        let Some(checksum) = Superblock::content_checksum(block) else { return Self::Damaged };
        if stored != Some(checksum ^ copy as u64) {
            return Self::Damaged;
        }
        match array_at(block, OFFSET_VERSION).map(u16::from_le_bytes) {
            Some(version @ VOLUME_FORMAT_VERSION..=VOLUME_FORMAT_VERSION_NOTES) => {
                match Superblock::decode_fields(block, version) {
                    Some(superblock) => Self::Whole(Box::new(superblock), checksum),
                    None => Self::Damaged,
                }
            }
            Some(version) if version > VOLUME_FORMAT_VERSION_NOTES => Self::Newer(version),
            _ => Self::Damaged,
        }
    }
}

/// The place of copy `copy` in the superblock zone.
pub(crate) fn copy_offset(copy: usize) -> u64 {
    (copy as u64).saturating_mul(COPY_STRIDE_BYTES)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Offset, bytes and name of every field, for the test that holds the document against them.
#[cfg(test)]
pub(crate) fn layout() -> Vec<(usize, usize, &'static str)> {
    vec![
        (0, 8, "magic"),
        (OFFSET_VERSION, 2, "version"),
        (OFFSET_FLAGS, 2, "flags"),
        (OFFSET_ROOT_EXTENTS_COUNT, 4, "root_extents_count"),
        (OFFSET_VOLUME, 16, "volume"),
        (OFFSET_INCARNATION, 16, "incarnation"),
        (OFFSET_IDENTITY, 32, "identity"),
        (OFFSET_SEQUENCE, 8, "sequence"),
        (OFFSET_PARENT, 8, "parent"),
        (OFFSET_WAL_BYTES, 8, "wal_bytes"),
        (OFFSET_EPOCH, 8, "epoch"),
        (OFFSET_WAL_START, 8, "wal_start"),
        (OFFSET_CLEAN_END, 8, "clean_end"),
        (OFFSET_ROOT_BYTES, 8, "root_bytes"),
        (OFFSET_ROOT_CHECKSUM, 8, "root_checksum"),
        (OFFSET_NOTES_BYTES, 4, "notes_bytes"),
        (OFFSET_ROOT_EXTENTS, ROOT_EXTENTS_MAX.saturating_mul(EXTENT_BYTES), "root_extents"),
        (OFFSET_NOTES, NOTES_BYTES_MAX, "notes"),
        (OFFSET_CHECKSUM, 8, "checksum"),
    ]
}
