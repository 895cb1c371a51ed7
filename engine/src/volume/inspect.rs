//! Looks at a superblock zone without opening the volume: for `mainstay inspect superblock` and `mainstay verify`.

use mainstay_io::Media;

use super::quorum::cut_short;
use super::superblock::{COPIES, Copy};
use super::{Superblock, judge, read_copies};
use crate::Result;

/// What lies in the superblock zone.
#[derive(Clone, Debug)]
pub(crate) struct SuperblockReport {
    /// One line for each copy: its sequence, or what is wrong with it.
    pub(crate) copies: [String; COPIES],
    /// Copies that opening would write again.
    pub(crate) differ: usize,
    /// Those of them that a crash in the middle of an update accounts for.
    pub(crate) cut_short: usize,
    /// The one that opening would take.
    pub(crate) superblock: Superblock,
}

/// Whether anything of a volume is in the superblock zone, be it damaged, cut short, or of a newer release: of what is not so, nobody has
/// stored anything there.
///
/// # Errors
/// The device does not answer.
pub async fn holds_volume(media: &dyn Media) -> Result<bool> {
    let copies = read_copies(&media.superblock()).await?;
    Ok(copies.iter().any(|copy| !matches!(copy, Copy::Blank | Copy::NoMagic)))
}

/// Reads the copies and chooses as opening does. Nothing is written.
///
/// # Errors
/// As [`super::Volume::open`].
pub(crate) async fn inspect(media: &dyn Media) -> Result<SuperblockReport> {
    let copies = read_copies(&media.superblock()).await?;
    let superblock = judge(media.name(), &copies)?;
    let same = |copy: &Copy| matches!(copy, Copy::Whole(found, _) if **found == superblock);
    let differ = copies.iter().filter(|copy| !same(copy)).count();
    let cut_short = cut_short(&copies, &superblock);
    let copies = copies.map(|copy| match copy {
        Copy::Blank => "blank".to_string(),
        Copy::NoMagic => "not a superblock".to_string(),
        Copy::Damaged => "damaged".to_string(),
        Copy::Unreadable => "cannot be read".to_string(),
        Copy::Newer(version) => format!("format version {version}"),
        Copy::Whole(found, checksum) => format!("sequence {} checksum {checksum:016x}", found.sequence),
    });
    Ok(SuperblockReport { copies, differ, cut_short, superblock })
}
