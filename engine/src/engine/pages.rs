//! Manifest pages: the present manifests of all groups in the extents that the superblock names.
//!
//! # Format
//! docs/format.md, "Manifest pages"
//! # Invariants
//! 1. Pages are durable before the superblock that names them; the extents of the pages that it replaces are given back by
//!    the volume.
//! 2. One writer at a time: whoever holds the [`Turn`].
//! 3. They are written twice, one copy behind the other, since nothing else could take their place. Opening takes the first
//!    whole one; the scrubber reads both.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::BTreeMap;

use bytes::Bytes;
use mainstay_io::{AlignedBuf, BLOCK_BYTES, IoClass};
use mainstay_wal::{GroupId, Lsn};
use xxhash_rust::xxh3::xxh3_64;

use super::{EngineShared, Slot};
use crate::codec::{Decoder, put_bytes, put_varint};
use crate::group::Recovered;
use crate::manifest::{Manifest, Places};
use crate::stored::ExtentWriter;
use crate::volume::{Root, Volume, extents_bytes};
use crate::{Error, ErrorKind, LogIndex, Result};

/// The encoding written today.
pub(crate) const PAGES_VERSION: u8 = 1;
/// Bytes written at a time.
const WRITE_BYTES: usize = 1 << 20;
/// Copies of the pages, each at the next whole block behind the one before it.
pub(crate) const COPIES: u64 = 2;
const _: () = assert!(WRITE_BYTES.is_multiple_of(BLOCK_BYTES));

/// The right to write pages.
pub(crate) struct Turn<'a>(#[allow(dead_code, reason = "held for what its drop does")] tokio::sync::MutexGuard<'a, ()>);

/// A group's state that takes the place of the one in memory.
pub(crate) type Replacement<'a> = (GroupId, u64, &'a Manifest, &'a Places);

impl EngineShared {
    pub(crate) async fn pages_turn(&self) -> Turn<'_> {
        Turn(self.pages.lock().await)
    }

    /// Writes the present manifests of all groups and makes them the root of the volume.
    ///
    /// # Errors
    /// `OutOfSpace`, `Io`, `Closed`.
    pub(crate) async fn write_pages(&self, turn: &Turn<'_>, replacement: Option<Replacement<'_>>) -> Result<()> {
        self.write_pages_from(turn, replacement, None).await
    }

    /// As [`EngineShared::write_pages`], and with `start` moves the start of the log in the same superblock.
    pub(crate) async fn write_pages_from(
        &self,
        _turn: &Turn<'_>,
        replacement: Option<Replacement<'_>>,
        start: Option<Lsn>,
    ) -> Result<()> {
        let mut states = BTreeMap::new();
        let mut open = Vec::new();
        {
            let groups = self.groups();
            for (&id, slot) in groups.iter() {
                match slot {
                    Slot::Found(found) => {
                        let bytes = found.manifest.encode(Some(&found.places));
                        states.insert(id, (found.lineage, bytes));
                    }
                    Slot::Open(group) => open.push(group.clone()),
                }
            }
        }
        let mut as_of = Vec::new();
        for group in open {
            let (lineage, manifest, places) = group.pages();
            states.insert(group.id(), (lineage, manifest.encode(Some(&places))));
            as_of.push((group, manifest.as_of));
        }
        if let Some((id, lineage, manifest, places)) = replacement {
            states.insert(id, (lineage, manifest.encode(Some(places))));
            as_of.retain(|(group, _)| group.id() != id);
        }
        let mut out = vec![PAGES_VERSION];
        put_varint(&mut out, states.len() as u64);
        for (id, (lineage, bytes)) in &states {
            put_varint(&mut out, id.0);
            put_varint(&mut out, *lineage);
            put_bytes(&mut out, bytes);
        }
        self.write_root(out, start).await?;
        for (group, index) in as_of {
            group.pages_durable(index);
        }
        Ok(())
    }

    async fn write_root(&self, bytes: Vec<u8>, start: Option<Lsn>) -> Result<()> {
        let copy_bytes = (bytes.len() as u64).next_multiple_of(BLOCK_BYTES as u64);
        let mut reservation = self.volume.reserve(copy_bytes.saturating_mul(COPIES)).await?;
        let mut writer = ExtentWriter::new(&self.volume, &self.stats.pages_bytes);
        for _ in 0..COPIES {
            for chunk in bytes.chunks(WRITE_BYTES) {
                writer.write(&mut reservation, vec![AlignedBuf::copy_from(chunk).freeze()]).await?;
            }
        }
        self.volume.flush().await?;
        let root = Root { extents: writer.finish(), bytes: bytes.len() as u64, checksum: xxh3_64(&bytes) };
        self.volume
            .update(move |superblock| {
                superblock.root = Some(root);
                if let Some(start) = start {
                    superblock.wal_start = start;
                }
            })
            .await
    }
}

/// Reads the pages that the superblock names, and counts the copies that are damaged.
///
/// # Errors
/// `Corrupt` when every copy is, `Foreign`, `Io`.
pub(crate) async fn read_pages(volume: &Volume, root: &Root) -> Result<(BTreeMap<GroupId, Recovered>, u64)> {
    let (bytes, bad) = read_copies(volume, root, IoClass::Foreground).await?;
    Ok((decode_pages(bytes)?, bad))
}

/// The first whole copy, and how many are not whole. A volume of an early release has one copy.
pub(crate) async fn read_copies(volume: &Volume, root: &Root, class: IoClass) -> Result<(Bytes, u64)> {
    let length = usize::try_from(root.bytes).map_err(|_| damaged("they are too long"))?;
    let copy_bytes =
        root.bytes.checked_next_multiple_of(BLOCK_BYTES as u64).ok_or_else(|| damaged("they are too long"))?;
    let room = extents_bytes(&root.extents);
    let (mut whole, mut bad) = (None, 0_u64);
    let mut failure = damaged("they do not match their checksum");
    for copy in 0..COPIES {
        let offset = copy_bytes.saturating_mul(copy);
        if copy > 0 && offset.saturating_add(root.bytes) > room {
            break;
        }
        match volume.read(&root.extents, offset, length, class).await {
            Ok(bytes) if xxh3_64(&bytes) == root.checksum => whole = whole.or(Some(bytes)),
            Ok(_) => bad = bad.saturating_add(1),
            Err(error) if error.kind() == ErrorKind::Io => {
                bad = bad.saturating_add(1);
                failure = error;
            }
            Err(error) => return Err(error),
        }
    }
    Ok((whole.ok_or(failure)?, bad))
}

fn damaged(why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the manifest pages are damaged: {why}"))
}

pub(crate) fn decode_pages(bytes: Bytes) -> Result<BTreeMap<GroupId, Recovered>> {
    let mut from = Decoder::new(bytes, "the manifest pages");
    let version = from.u8()?;
    if version != PAGES_VERSION {
        return Err(Error::new(
            ErrorKind::Foreign,
            format!("manifest pages of another version version={version} known={PAGES_VERSION}"),
        ));
    }
    let mut groups = BTreeMap::new();
    for _ in 0..from.count(3)? {
        let id = GroupId(from.varint()?);
        let lineage = from.varint()?;
        let (manifest, places) = Manifest::decode(from.bytes(1, usize::MAX)?)?;
        groups.insert(id, Recovered { lineage, manifest, places, oldest: None });
    }
    from.end()?;
    Ok(groups)
}

/// The flushed index that pages written now would have, by group; what the owners of the log are asked with.
pub(crate) fn flushed_of(slot: &Slot) -> LogIndex {
    match slot {
        Slot::Found(found) => found.manifest.flushed(),
        Slot::Open(group) => group.present_flushed(),
    }
}
