//! Tests of the volume on devices in memory.

#![allow(clippy::disallowed_methods, reason = "no simulation runs here: every operation is complete in its call")]

mod format;
mod lives;
mod media;
mod space;
mod superblock;

use std::sync::Arc;

use mainstay_io::block_on;

use self::media::{MemMedia, WAL_BYTES, environment};
use super::*;

const EXTENTS_BYTES: usize = 64 * EXTENT_UNIT_BYTES as usize;

fn formatted() -> Arc<MemMedia> {
    let media = MemMedia::new(EXTENTS_BYTES);
    block_on(Volume::format(&*media, &environment(), WAL_BYTES, false)).expect("a blank target is formatted");
    media
}

fn open(media: &Arc<MemMedia>) -> (Volume, Superblock) {
    block_on(Volume::open(media.clone(), &environment())).expect("opens")
}

/// An open volume without live extents.
fn ready_volume() -> (Arc<MemMedia>, Volume) {
    let media = formatted();
    let (volume, _) = open(&media);
    volume.set_live([]).expect("nothing overlaps");
    (media, volume)
}
