//! Targets and backends that every test of a device runs on.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod child;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mainstay_io::sim::{SimLayout, SimMedia, SimOptions};
use mainstay_io::{
    AlignedBuf, AlignedBytes, Backend, BackendChoice, BlockDevice, Media, MediaOptions, Target, create_media,
};

pub(crate) const WAL_BYTES: u64 = 4 << 20;

/// A loop device over a file, given back when dropped.
pub(crate) struct LoopDevice {
    pub(crate) path: PathBuf,
}

impl LoopDevice {
    /// `None` where the machine has no loop devices or we may not make one.
    pub(crate) fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file).output().ok()?;
        let path = String::from_utf8(made.stdout).ok()?;
        (made.status.success() && path.starts_with("/dev/loop")).then(|| Self { path: path.trim().into() })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// A file of `bytes` without holes.
pub(crate) fn image(path: &Path, bytes: u64) {
    let file = std::fs::File::create(path).expect("a new file");
    let zeroes = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        std::io::Write::write_all(&mut &file, &zeroes).expect("room for an image");
    }
    file.sync_all().expect("synced");
}

fn sparse(path: &Path) {
    std::fs::File::create(path).and_then(|file| file.set_len(48 << 20)).expect("a new file");
}

/// Where a volume of a test lies; removed when dropped.
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) target: Target,
    _loop: Option<LoopDevice>,
    _dir: tempfile::TempDir,
}

pub(crate) fn directory() -> Place {
    let dir = tempfile::tempdir().expect("a directory");
    Place { name: "directory".to_owned(), target: Target::Directory(dir.path().join("volume")), _loop: None, _dir: dir }
}

/// A plain file that stands for a device.
pub(crate) fn file() -> Place {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    sparse(&path);
    Place { name: "file".to_owned(), target: Target::Device(path), _loop: None, _dir: dir }
}

/// A loop device, or `None` with a note where there is none.
pub(crate) fn raw() -> Option<Place> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    sparse(&path);
    let Some(device) = LoopDevice::over(&path) else {
        eprintln!("no loop device on this machine: raw devices are not tested");
        return None;
    };
    let target = Target::Device(device.path.clone());
    Some(Place { name: "loop device".to_owned(), target, _loop: Some(device), _dir: dir })
}

pub(crate) fn open(place: &Place, backend: BackendChoice) -> Arc<dyn Media> {
    create_media(&place.target, &MediaOptions { backend }).expect("opened")
}

/// True where a ring can be made. Otherwise says that its tests are left out.
pub(crate) fn has_uring() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        let media = create_media(&directory().target, &MediaOptions::default()).expect("opened");
        let (backend, reason) = media.backend();
        if backend != Backend::Uring {
            eprintln!("the ring is not tested on this machine: {}", reason.unwrap_or_default());
        }
        backend == Backend::Uring
    })
}

pub(crate) fn backends() -> Vec<BackendChoice> {
    let mut backends = vec![BackendChoice::Threads];
    backends.extend(has_uring().then_some(BackendChoice::Uring));
    backends
}

/// Runs `test` on a formatted volume of every backend and every kind of target.
pub(crate) fn everywhere(test: impl Fn(&str, &dyn Media)) {
    for backend in backends() {
        for place in [Some(directory()), raw(), Some(file())].into_iter().flatten() {
            let media = open(&place, backend);
            media.create_zones(WAL_BYTES).wait().expect("formatted");
            test(&format!("{backend:?} on a {}", place.name), &*media);
            close(&*media);
        }
    }
    for layout in [SimLayout::Directory, SimLayout::Device] {
        let disks = SimMedia::with_layout(layout, SimOptions { capacity: 48 << 20, ..SimOptions::default() });
        let media = disks.open().expect("opened");
        media.create_zones(WAL_BYTES).wait().expect("formatted");
        test(&format!("Sim in layout {layout:?}"), &*media);
        close(&*media);
    }
}

pub(crate) fn close(media: &dyn Media) {
    for device in media.devices() {
        device.shutdown(Duration::from_secs(20)).wait().expect("drained");
    }
}

pub(crate) fn filled(byte: u8, bytes: usize) -> AlignedBytes {
    let mut buf = AlignedBuf::zeroed(bytes);
    buf.fill(byte);
    buf.freeze()
}

pub(crate) fn block(byte: u8) -> Vec<AlignedBytes> {
    vec![filled(byte, 4096)]
}

pub(crate) fn device(media: &dyn Media) -> Arc<dyn BlockDevice> {
    media.devices().into_iter().next().expect("a device")
}
