//! The simulated volume of a node: three disks, or three zones of one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::device::SimDevice;
use super::disk::{Runtime, SimDisk};
use super::env::{SimScheduler, decide};
use super::image::{CrashPoint, DiskImage};
use super::{Faults, IoKind, SimOptions};
use crate::{
    BLOCK_BYTES, Backend, BlockDevice, Error, ErrorKind, Media, Op, Result, SUPERBLOCK_ZONE_BYTES, Spawner, Zone,
};

/// How the zones lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SimLayout {
    /// Each on a disk of its own, as files of a directory do.
    #[default]
    Directory,
    /// One after the other on one disk, as on a raw device.
    Device,
}

/// Hears of each operation: see [`SimMedia::watch`].
pub type Watch = Arc<dyn Fn(IoKind) + Send + Sync>;

/// The disks of a node. They outlive its crashes; each life of the node [opens](SimMedia::open) them anew.
///
/// Cloning gives another handle on the same disks.
#[derive(Clone)]
pub struct SimMedia(Arc<Shared>);

struct Shared {
    layout: SimLayout,
    /// `superblock`, `wal`, `extents`; or one for all.
    disks: Vec<SimDisk>,
    holder: Mutex<Weak<()>>,
}

impl SimMedia {
    /// Blank disks for a directory, each operation complete inside its call.
    pub fn new(options: SimOptions) -> Self {
        Self::with_layout(SimLayout::Directory, options)
    }

    /// Blank disks, each operation complete inside its call.
    pub fn with_layout(layout: SimLayout, options: SimOptions) -> Self {
        Self::build(layout, &options, None, &Runtime::default())
    }

    /// Blank disks whose completions arrive through `scheduler` and whose resident tasks run on `spawner`.
    pub fn scheduled(
        layout: SimLayout,
        options: SimOptions,
        scheduler: Arc<dyn SimScheduler>,
        spawner: Arc<dyn Spawner>,
    ) -> Self {
        Self::build(layout, &options, None, &Runtime { scheduler: Some(scheduler), spawner: Some(spawner) })
    }

    /// Disks that hold `images`, as [`SimMedia::images`] gave them, each operation complete inside its call.
    pub fn from_images(layout: SimLayout, options: SimOptions, images: Vec<DiskImage>) -> Self {
        Self::build(layout, &options, Some(images), &Runtime::default())
    }

    fn build(layout: SimLayout, options: &SimOptions, images: Option<Vec<DiskImage>>, runtime: &Runtime) -> Self {
        let names: &[&str] = match layout {
            SimLayout::Directory => &["superblock", "wal", "extents"],
            SimLayout::Device => &["device"],
        };
        let mut images = images.unwrap_or_default().into_iter();
        let disks = names.iter().map(|name| {
            let blank = || DiskImage { capacity: options.capacity, ..DiskImage::default() };
            let mut options = options.clone();
            if matches!(*name, "superblock" | "wal") {
                options.enospc_after = None;
            }
            SimDisk::with_runtime(name, options, images.next().unwrap_or_else(blank), runtime.clone())
        });
        Self(Arc::new(Shared { layout, disks: disks.collect(), holder: Mutex::default() }))
    }

    /// Opens the volume for one life of the node.
    ///
    /// # Errors
    /// `Locked` while an earlier opening is neither dropped nor crashed.
    pub fn open(&self) -> Result<Arc<dyn Media>> {
        let mut holder = self.0.lock();
        if holder.upgrade().is_some() {
            let message = "the simulated volume is open already: drop it or crash it first";
            return Err(Error::new(ErrorKind::Locked, "open", 0, 0, message));
        }
        let life = Arc::new(());
        *holder = Arc::downgrade(&life);
        let data = self.disk(2).device();
        let (superblock, wal) = match self.0.layout {
            SimLayout::Directory => (self.disk(0).device(), self.disk(1).device()),
            SimLayout::Device => (data.clone(), self.disk(1).device()),
        };
        Ok(Arc::new(Opened { media: self.clone(), superblock, wal, data, _life: life }))
    }

    /// The power of the node fails: see [`SimDisk::crash`]. The volume may be opened again.
    pub fn crash(&self, seed: u64) {
        self.end_life(|index, disk| drop(disk.crash(decide(seed, &[index]))));
    }

    /// The process of the node dies: see [`SimDisk::kill`]. The volume may be opened again.
    pub fn kill(&self, seed: u64) {
        self.end_life(|index, disk| drop(disk.kill(decide(seed, &[index]))));
    }

    /// Calls `watch` for each operation from now on, on the way to its end: it is still in flight, and all before it are done. Together
    /// with [`SimMedia::crash_point`] it shows what a loss of power at any of them may leave.
    pub fn watch(&self, watch: Option<Watch>) {
        self.0.disks.iter().for_each(|disk| disk.watch(watch.clone()));
    }

    /// What a loss of power would find now; changes nothing. Of one instant only where nothing else moves the disks meanwhile.
    pub fn crash_point(&self) -> CrashPoint {
        CrashPoint::new(self.0.disks.iter().map(SimDisk::at_risk).collect())
    }

    fn end_life(&self, end: impl Fn(u64, &SimDisk)) {
        *self.0.lock() = Weak::new();
        for (index, disk) in (0..).zip(&self.0.disks) {
            end(index, disk);
        }
    }

    /// All disks: `superblock`, `wal` and `extents`, or `device`.
    pub fn disks(&self) -> &[SimDisk] {
        &self.0.disks
    }

    /// The disk under the superblock.
    pub fn superblock_disk(&self) -> &SimDisk {
        self.disk(0)
    }

    /// The disk under the log.
    pub fn wal_disk(&self) -> &SimDisk {
        self.disk(1)
    }

    /// The disk under the extents.
    pub fn extents_disk(&self) -> &SimDisk {
        self.disk(2)
    }

    /// The content of all disks with every completed write in it.
    pub fn images(&self) -> Vec<DiskImage> {
        self.0.disks.iter().map(SimDisk::image).collect()
    }

    /// Puts blank disks in the place of all: the volume was lost while the node was down.
    pub fn wipe(&self) {
        for disk in &self.0.disks {
            disk.restart(DiskImage { capacity: disk.capacity(), ..DiskImage::default() });
        }
    }

    /// Puts `images`, as [`SimMedia::images`] gave them, in the place of the content: the volume was restored from a copy
    /// while the node was down.
    pub fn restore(&self, images: Vec<DiskImage>) {
        for (disk, image) in self.0.disks.iter().zip(images) {
            disk.restart(image);
        }
    }

    /// Remounts all disks read-only, or writable again.
    pub fn set_read_only(&self, read_only: bool) {
        self.0.disks.iter().for_each(|disk| disk.set_read_only(read_only));
    }

    /// Changes the rates of faults on all disks.
    pub fn set_faults(&self, faults: Faults) {
        self.0.disks.iter().for_each(|disk| disk.set_faults(faults));
    }

    /// Ends all faults on all disks: see [`SimDisk::heal`].
    pub fn heal(&self) {
        self.0.disks.iter().for_each(SimDisk::heal);
    }

    /// A digest of all events of all disks.
    pub fn trace_hash(&self) -> u64 {
        self.0.disks.iter().fold(0, |hash, disk| decide(hash, &[disk.trace_hash()]))
    }

    fn disk(&self, zone: usize) -> &SimDisk {
        &self.0.disks[zone.min(self.0.disks.len() - 1)]
    }

    /// Where the log begins on its disk.
    fn wal_base(&self) -> u64 {
        match self.0.layout {
            SimLayout::Directory => 0,
            SimLayout::Device => SUPERBLOCK_ZONE_BYTES,
        }
    }

    /// Where the extents lie on their disk.
    fn extents(&self, wal_bytes: u64) -> Result<(u64, u64)> {
        let disk = self.disk(2);
        let base = match self.0.layout {
            SimLayout::Directory => 0,
            SimLayout::Device => SUPERBLOCK_ZONE_BYTES.saturating_add(wal_bytes),
        };
        match disk.capacity().checked_sub(base) {
            Some(length) if length > 0 && self.wal_base().saturating_add(wal_bytes) <= self.disk(1).capacity() => {
                Ok((base, length))
            }
            _ => {
                let message = format!("the simulated disk is too small wal_bytes={wal_bytes}");
                Err(Error::unusable("open", message))
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Weak<()>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for SimMedia {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimMedia").field("layout", &self.0.layout).field("disks", &self.0.disks).finish()
    }
}

/// One opening of a [`SimMedia`].
struct Opened {
    media: SimMedia,
    superblock: Arc<SimDevice>,
    wal: Arc<SimDevice>,
    data: Arc<SimDevice>,
    _life: Arc<()>,
}

impl Opened {
    fn create(&self, wal_bytes: u64) -> Result<()> {
        if wal_bytes == 0 || !wal_bytes.is_multiple_of(BLOCK_BYTES as u64) {
            let message = format!("wal_bytes must be a multiple of {BLOCK_BYTES} wal_bytes={wal_bytes}");
            return Err(Error::unusable("format", message));
        }
        if !self.is_blank()? {
            return Err(Error::unusable("format", "the simulated volume already holds data"));
        }
        self.media.extents(wal_bytes)?;
        self.media.disk(0).reserve_and_zero(0, SUPERBLOCK_ZONE_BYTES)?;
        self.media.disk(1).reserve_and_zero(self.media.wal_base(), wal_bytes)
    }
}

impl Media for Opened {
    fn superblock(&self) -> Zone {
        Zone::new(self.superblock.clone(), 0, SUPERBLOCK_ZONE_BYTES)
    }

    fn create_zones(&self, wal_bytes: u64) -> Op<()> {
        Op::ready(self.create(wal_bytes))
    }

    fn zones(&self, wal_bytes: u64) -> Result<(Zone, Zone)> {
        let (base, length) = self.media.extents(wal_bytes)?;
        let wal_base = self.media.wal_base();
        if self.media.disk(1).reserved_in(wal_base, wal_bytes) < wal_bytes {
            return Err(Error::unusable("open", "the simulated volume has no log of this length: format it first"));
        }
        Ok((Zone::new(self.wal.clone(), wal_base, wal_bytes), Zone::new(self.data.clone(), base, length)))
    }

    fn is_blank(&self) -> Result<bool> {
        Ok(self.media.disk(0).is_zero(SUPERBLOCK_ZONE_BYTES))
    }

    fn backend(&self) -> (Backend, Option<String>) {
        (Backend::Sim, None)
    }

    fn devices(&self) -> Vec<Arc<dyn BlockDevice>> {
        let mut devices: Vec<Arc<dyn BlockDevice>> = vec![self.wal.clone(), self.data.clone()];
        if self.media.0.layout == SimLayout::Directory {
            devices.push(self.superblock.clone());
        }
        devices
    }

    fn unlock(&self) {
        *self.media.0.lock() = Weak::new();
    }

    fn name(&self) -> String {
        "sim".to_owned()
    }
}
