//! Sets a volume aside that cannot serve, where the operator asked for that, so that its process joins the cluster anew.
//!
//! # Place
//! `serve` calls it when no device of the volume is open any more, and before one is opened
//! # Invariants
//! 1. Nothing is deleted: the zones are moved into the folder `aside` of the data folder. While there is one, nothing more is set aside.
//! 2. The superblock goes last: what a crash left in between is finished at the next start, before anything is opened.
//! # Why not
//! - In place of the process: it ends, so that whoever started it sees that and why; the next start finds an empty folder.
//! - A raw device: there is nowhere to keep what it holds.

use std::fs::{File, create_dir, rename};
use std::path::{Path, PathBuf};

use crate::cli::Failure;

/// The folder that keeps them.
const ASIDE: &str = "aside";
/// In the order in which they go.
const ZONES: [&str; 3] = ["wal", "extents", "superblock"];

/// Moves the zones of a volume aside and says where they are.
///
/// # Errors
/// The data are no folder, something was set aside before, or a file cannot be moved.
pub(crate) fn set_aside(data: &Path) -> Result<PathBuf, Failure> {
    let shown = data.display();
    if !data.is_dir() {
        return Err(Failure::other(format!("a device cannot be set aside: look at it, then format it path={shown}")));
    }
    let aside = data.join(ASIDE);
    if aside.exists() {
        let message = format!("a volume was set aside before: look at it and remove it path={}", aside.display());
        return Err(Failure::other(message));
    }
    create_dir(&aside).map_err(|e| failed(&aside, &e))?;
    sync(data)?;
    move_zones(data, &aside)?;
    Ok(aside)
}

/// Finishes what a crash in the middle of [`set_aside`] left.
///
/// # Errors
/// A file cannot be moved.
pub(crate) fn finish(data: &Path) -> Result<(), Failure> {
    let aside = data.join(ASIDE);
    let last = ZONES.last().map(|zone| aside.join(zone));
    if aside.is_dir() && last.is_some_and(|superblock| !superblock.exists()) {
        move_zones(data, &aside)?;
    }
    Ok(())
}

fn move_zones(data: &Path, aside: &Path) -> Result<(), Failure> {
    for zone in ZONES.map(|zone| (data.join(zone), aside.join(zone))) {
        let (from, to) = zone;
        if from.exists() {
            rename(&from, &to).map_err(|e| failed(&from, &e))?;
            sync(aside)?;
            sync(data)?;
        }
    }
    Ok(())
}

/// Makes the names in a folder durable.
fn sync(folder: &Path) -> Result<(), Failure> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| failed(folder, &e))
}

fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::other(format!("the volume could not be set aside: {error} path={}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for zone in ZONES {
            std::fs::write(folder.path().join(zone), zone).expect("written");
        }
        folder
    }

    fn zones_of(folder: &Path) -> usize {
        ZONES.iter().filter(|zone| std::fs::read(folder.join(zone)).is_ok_and(|bytes| bytes == zone.as_bytes())).count()
    }

    #[test]
    fn a_volume_is_set_aside_once() {
        let folder = volume();
        let aside = set_aside(folder.path()).expect("moved");
        assert_eq!((zones_of(folder.path()), zones_of(&aside)), (0, 3));
        finish(folder.path()).expect("nothing to do");
        let refused = set_aside(folder.path()).expect_err("one is there").to_string();
        assert!(refused.contains("look at it and remove it"), "{refused}");
        let device = folder.path().join("device");
        std::fs::write(&device, "").expect("written");
        assert!(set_aside(&device).expect_err("no folder").to_string().contains("a device cannot be set aside"));
    }

    #[test]
    fn what_a_crash_left_in_between_is_finished() {
        for moved in 0..=ZONES.len() {
            let folder = volume();
            let aside = folder.path().join(ASIDE);
            create_dir(&aside).expect("made");
            for zone in &ZONES[..moved] {
                rename(folder.path().join(zone), aside.join(zone)).expect("moved");
            }
            finish(folder.path()).expect("finished");
            assert_eq!((zones_of(folder.path()), zones_of(&aside)), (0, 3), "after {moved}");
        }
    }
}
