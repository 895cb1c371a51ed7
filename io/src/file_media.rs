//! Volumes in a directory and on a raw block device.
//!
//! # Format
//! A directory holds `superblock` (1 MiB), `wal` (fixed size, written once with zeroes), `extents` (sparse) and `lock`
//! (the note of who holds it). A device holds the same zones one after the other.
//!
//! # Crash
//! Files are made, filled, synced and entered into a synced directory before [`Media::create_zones`] is complete. A
//! format that was cut short leaves a superblock of zeroes, which is still blank, and is begun anew.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::Executors;
use crate::file::{Extent, Missing, OpenFile, refused};
use crate::file_device::FileDevice;
use crate::lock::{LockFile, sync_directory};
use crate::threads::spawn;
use crate::{
    BLOCK_BYTES, Backend, BlockDevice, Error, Media, MediaOptions, Op, Result, SUPERBLOCK_ZONE_BYTES, Target, Zone,
};

/// The least that a volume needs for extents.
const EXTENT_ZONE_BYTES_MIN: u64 = 1 << 20;

/// A directory or device, opened and locked.
struct FileMedia {
    shared: Arc<Shared>,
    superblock: Zone,
}

struct Shared {
    name: String,
    layout: Layout,
    superblock: Arc<OpenFile>,
    data: Arc<dyn BlockDevice>,
    executors: Executors,
    zones: Mutex<Option<Zones>>,
}

enum Layout {
    /// Keeps the lock of the directory until the media is dropped.
    Directory {
        path: PathBuf,
        lock: Arc<LockFile>,
    },
    Device,
}

#[derive(Clone)]
struct Zones {
    wal_bytes: u64,
    wal: Zone,
    extents: Zone,
    devices: Vec<Arc<dyn BlockDevice>>,
    files: Vec<Arc<OpenFile>>,
}

/// Opens `target`; with [`Missing::Create`] makes the directory and its superblock file where they are missing.
pub(crate) fn open(target: &Target, options: &MediaOptions, missing: Missing) -> Result<Arc<dyn Media>> {
    let (path, layout, file) = match target {
        Target::Directory(path) => {
            let (lock, file) = open_directory(path, missing)?;
            (path, Layout::Directory { path: path.clone(), lock }, file)
        }
        Target::Device(path) => (path, Layout::Device, open_device(path)?),
    };
    let superblock = Arc::new(file);
    let executors = Executors::start(options.backend, &superblock)?;
    let data = executors.data_device(superblock.clone());
    let zone = Zone::new(data.clone(), 0, SUPERBLOCK_ZONE_BYTES);
    let name = path.display().to_string();
    let shared = Shared { name, layout, superblock, data, executors, zones: Mutex::new(None) };
    Ok(Arc::new(FileMedia { shared: Arc::new(shared), superblock: zone }))
}

fn open_directory(path: &Path, missing: Missing) -> Result<(Arc<LockFile>, OpenFile)> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => {
            let message = format!("{} is not a directory: name it as a device target", path.display());
            return Err(Error::unusable("open", message));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && missing == Missing::Create => {
            std::fs::create_dir_all(path).map_err(|e| refused(path, false, &e))?;
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            sync_directory(parent)?;
        }
        Err(e) => return Err(refused(path, false, &e)),
    }
    let file = path.join("superblock");
    if !file.exists() {
        if missing == Missing::Refuse {
            let message = format!("{} holds no volume: format it first, or correct the path", path.display());
            return Err(Error::unusable("open", message));
        }
        if let Some(left) = ["wal", "extents"].into_iter().find(|name| path.join(name).exists()) {
            let message = format!(
                "{} holds a file `{left}` but no `superblock`: restore it, or empty the directory to begin anew",
                path.display()
            );
            return Err(Error::unusable("open", message));
        }
    }
    let lock = Arc::new(LockFile::acquire(path)?);
    let mut superblock = OpenFile::open(&file, missing, Extent::Length, Some(lock.clone()))?;
    if superblock.capacity() < SUPERBLOCK_ZONE_BYTES {
        // Shorter than it ever is once it was made: what a crash left of making it, or a damaged file.
        // Whole blocks are read through the device; the bytes of a shorter file that is none of ours count as well.
        let notes = std::fs::read(&file).map_err(|e| refused(&file, false, &e))?;
        if missing == Missing::Refuse || notes.iter().any(|byte| *byte != 0) {
            let message = format!("{} has less than {SUPERBLOCK_ZONE_BYTES} bytes: restore it", file.display());
            return Err(Error::unusable("open", message));
        }
        superblock.zero(0, SUPERBLOCK_ZONE_BYTES)?;
        superblock.measure()?;
        sync_directory(path)?;
    }
    Ok((lock, superblock))
}

fn open_device(path: &Path) -> Result<OpenFile> {
    if path.is_dir() {
        let message = format!("{} is a directory: name it as a directory target", path.display());
        return Err(Error::unusable("open", message));
    }
    let file = OpenFile::open(path, Missing::Refuse, Extent::Length, None)?;
    let least = SUPERBLOCK_ZONE_BYTES + BLOCK_BYTES as u64 + EXTENT_ZONE_BYTES_MIN;
    if file.capacity() < least {
        let message = format!(
            "{} is too small for a volume: give it more than {least} bytes capacity={}",
            path.display(),
            file.capacity()
        );
        return Err(Error::unusable("open", message));
    }
    Ok(file)
}

impl Shared {
    /// A panic while the lock was held leaves the zones absent or whole.
    fn lock(&self) -> MutexGuard<'_, Option<Zones>> {
        self.zones.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create(&self, wal_bytes: u64) -> Result<()> {
        if wal_bytes == 0 || !wal_bytes.is_multiple_of(BLOCK_BYTES as u64) {
            let message = format!("wal_bytes must be a multiple of {BLOCK_BYTES} wal_bytes={wal_bytes}");
            return Err(Error::unusable("format", message));
        }
        if !self.superblock.is_zero(SUPERBLOCK_ZONE_BYTES)? {
            let message = format!("{} already holds data: empty it first, or choose another", self.name);
            return Err(Error::unusable("format", message));
        }
        match &self.layout {
            Layout::Directory { path, lock } => {
                for name in ["wal", "extents"] {
                    let path = path.join(name);
                    let file = OpenFile::open(&path, Missing::Create, Extent::Length, Some(lock.clone()))?;
                    file.truncate()?;
                    if name == "wal" {
                        file.zero(0, wal_bytes)?;
                    }
                }
                sync_directory(path)
            }
            Layout::Device => {
                self.fits(wal_bytes)?;
                self.superblock.zero(SUPERBLOCK_ZONE_BYTES, wal_bytes)
            }
        }
    }

    /// The extents zone of a raw device.
    fn fits(&self, wal_bytes: u64) -> Result<(u64, u64)> {
        let capacity = self.superblock.capacity();
        let begin = SUPERBLOCK_ZONE_BYTES.checked_add(wal_bytes);
        match begin.and_then(|begin| Some((begin, capacity.checked_sub(begin)?))) {
            Some((begin, length)) if length >= EXTENT_ZONE_BYTES_MIN => Ok((begin, length)),
            _ => {
                let message = format!(
                    "{} is too small for its log: enlarge it, or format it with a shorter log \
                     capacity={capacity} wal_bytes={wal_bytes}",
                    self.name
                );
                Err(Error::unusable("open", message))
            }
        }
    }

    fn open_zones(&self, wal_bytes: u64) -> Result<Zones> {
        match &self.layout {
            Layout::Directory { path, lock } => {
                let open = |name: &str, extent| {
                    OpenFile::open(&path.join(name), Missing::Refuse, extent, Some(lock.clone())).map(Arc::new)
                };
                let (wal, extents) = (open("wal", Extent::Length)?, open("extents", Extent::Sparse)?);
                if wal.capacity() < wal_bytes {
                    let message = format!(
                        "{} is shorter than the superblock says: restore it capacity={} wal_bytes={wal_bytes}",
                        wal.path().display(),
                        wal.capacity()
                    );
                    return Err(Error::unusable("open", message));
                }
                let capacity = extents.capacity();
                let files = vec![wal.clone(), extents.clone()];
                let (wal, extents) = (self.executors.wal_device(wal), self.executors.data_device(extents));
                Ok(Zones {
                    wal_bytes,
                    wal: Zone::new(wal.clone(), 0, wal_bytes),
                    extents: Zone::new(extents.clone(), 0, capacity),
                    devices: vec![wal, extents],
                    files,
                })
            }
            Layout::Device => {
                let (begin, length) = self.fits(wal_bytes)?;
                let wal = self.executors.wal_device(self.superblock.clone());
                Ok(Zones {
                    wal_bytes,
                    wal: Zone::new(wal.clone(), SUPERBLOCK_ZONE_BYTES, wal_bytes),
                    extents: Zone::new(self.data.clone(), begin, length),
                    devices: vec![wal],
                    files: Vec::new(),
                })
            }
        }
    }
}

impl Media for FileMedia {
    fn superblock(&self) -> Zone {
        self.superblock.clone()
    }

    fn create_zones(&self, wal_bytes: u64) -> Op<()> {
        let (op, done) = Op::pending();
        let shared = self.shared.clone();
        let run = move || {
            let answer = shared.create(wal_bytes);
            drop(shared);
            done.complete(answer);
        };
        match spawn("io-format", run) {
            Ok(_) => op,
            Err(e) => Op::ready(Err(e)),
        }
    }

    fn zones(&self, wal_bytes: u64) -> Result<(Zone, Zone)> {
        let mut opened = self.shared.lock();
        let zones = match opened.as_ref() {
            Some(zones) if zones.wal_bytes == wal_bytes => zones.clone(),
            Some(zones) => {
                let message = format!("the zones are open with another length wal_bytes={}", zones.wal_bytes);
                return Err(Error::unusable("open", message));
            }
            None => opened.insert(self.shared.open_zones(wal_bytes)?).clone(),
        };
        Ok((zones.wal, zones.extents))
    }

    fn is_blank(&self) -> Result<bool> {
        self.shared.superblock.is_zero(SUPERBLOCK_ZONE_BYTES)
    }

    fn backend(&self) -> (Backend, Option<String>) {
        let geometry = self.shared.data.geometry();
        (geometry.backend, geometry.fallback_reason.clone())
    }

    fn devices(&self) -> Vec<Arc<dyn BlockDevice>> {
        let zones = self.shared.lock().clone();
        let mut devices = zones.map(|zones| zones.devices).unwrap_or_default();
        devices.push(self.shared.data.clone());
        devices
    }

    fn unlock(&self) {
        // The lock of the directory last: who gets it finds the files free.
        let zones = self.shared.lock().clone();
        zones.iter().flat_map(|zones| &zones.files).for_each(|file| file.unlock());
        self.shared.superblock.unlock();
        match &self.shared.layout {
            Layout::Directory { lock, .. } => lock.release(),
            Layout::Device => {}
        }
    }

    fn name(&self) -> String {
        self.shared.name.clone()
    }
}

impl Executors {
    pub(crate) fn data_device(&self, file: Arc<OpenFile>) -> Arc<dyn BlockDevice> {
        FileDevice::over(file, self.backend, self.data.clone(), self.reason.clone())
    }

    pub(crate) fn wal_device(&self, file: Arc<OpenFile>) -> Arc<dyn BlockDevice> {
        FileDevice::over(file, self.backend, self.wal.clone(), self.reason.clone())
    }
}
