//! What a durable write costs, by count and not by time: the device's own statistics on a loop device.

mod support;

use std::path::Path;
use std::process::Command;

use mainstay_io::{BackendChoice, IoClass, MediaOptions, Target, WriteMode, Zone, create_media};
use support::{LoopDevice, WAL_BYTES, backends, block, close, filled, image};

const WRITES: u64 = 200;

/// What a block device has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    /// Write requests. A flush that is no part of a write is one too, without data.
    requests: u64,
    bytes: u64,
    flushes: u64,
}

fn counts(device: &Path) -> Counts {
    let name = device.file_name().expect("a device").to_string_lossy();
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).expect("statistics");
    let fields: Vec<u64> = stat.split_whitespace().map(|field| field.parse().expect("a number")).collect();
    let flushes = fields.get(15).copied().expect("Linux 5.5 counts flushes");
    Counts { requests: fields[4], bytes: fields[6] * 512, flushes }
}

/// What the writes of [`append`] hold.
const BYTES: u64 = WRITES / 2 * (4096 + 12288);

/// Writes as the log does, one batch after the other, or as a caller does who has it to itself (`here`); what that cost the device.
fn append(device: &Path, wal: &Zone, here: bool) -> Counts {
    let before = counts(device);
    for n in 0..WRITES {
        let bufs = if n % 2 == 0 { block(n as u8) } else { vec![filled(1, 8192), filled(2, 4096)] };
        let write = if here { Zone::write_here } else { Zone::write };
        write(wal, n * 12288, bufs, WriteMode::Durable, IoClass::Wal).wait().expect("durable");
    }
    let after = counts(device);
    Counts {
        requests: after.requests - before.requests,
        bytes: after.bytes - before.bytes,
        flushes: after.flushes - before.flushes,
    }
}

/// Threads of the kernel that took work which could not be started at once.
fn kernel_workers() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("a process has threads").flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("iou-wrk")).count()
}

/// One test, so that no other one starts workers of the kernel in this process.
#[test]
fn a_durable_write_is_one_write_and_one_flush() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    image(&path, 48 << 20);
    let Some(device) = LoopDevice::over(&path) else {
        return eprintln!("no loop device on this machine: writes and flushes are not counted");
    };
    for backend in backends() {
        let media = create_media(&Target::Device(device.path.clone()), &MediaOptions { backend }).expect("opened");
        if media.is_blank().expect("readable") {
            media.create_zones(WAL_BYTES).wait().expect("formatted");
        }
        let (wal, _) = media.zones(WAL_BYTES).expect("zones");
        // The ring sends a write that ends with a flush, a thread a write and then a flush.
        let requests = if backend == BackendChoice::Uring { WRITES } else { 2 * WRITES };
        let expected = Counts { requests, bytes: BYTES, flushes: WRITES };
        assert_eq!(append(&device.path, &wal, false), expected, "raw {backend:?}");
        // A caller is a thread too.
        let expected = Counts { requests: 2 * WRITES, ..expected };
        assert_eq!(append(&device.path, &wal, true), expected, "raw {backend:?}, by the caller");
        assert_eq!(kernel_workers(), 0, "raw {backend:?}");
        close(&*media);
    }
    on_ext4(&device, &dir.path().join("mount"));
}

/// The same in a directory, where the file system must add nothing: the log was written with zeroes once.
fn on_ext4(device: &LoopDevice, mount: &Path) {
    std::fs::create_dir(mount).expect("a directory");
    let run = |name: &str, options: &[&str], paths: &[&Path]| {
        Command::new(name).args(options).args(paths).output().is_ok_and(|output| output.status.success())
    };
    // Nothing is to be written behind our back: no tables made lazily, no commit of the journal by its timer.
    let made = run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"], &[&device.path]);
    if !made || !run("mount", &["-o", "noatime,commit=3000"], &[&device.path, mount]) {
        return eprintln!("no ext4 can be made and mounted here: directories are not counted");
    }
    let mounted = Mounted(mount);
    let measured: Vec<_> =
        backends().into_iter().map(|backend| (backend, in_directory(device, mount, backend))).collect();
    drop(mounted);
    let each =
        measured.into_iter().flat_map(|(backend, (both, workers))| both.map(|counts| (backend, counts, workers)));
    for (backend, counts, workers) in each {
        eprintln!("ext4 {backend:?}: {counts:?}");
        // Memory pressure may still make the file system write something of its own.
        let few = |count: u64, least: u64| (least..least + least / 10).contains(&count);
        assert!(few(counts.flushes, WRITES), "ext4 {backend:?} {counts:?}");
        assert!(few(counts.bytes, BYTES), "ext4 {backend:?} {counts:?}");
        assert!(few(counts.requests, 2 * WRITES), "ext4 {backend:?} {counts:?}");
        assert_eq!(workers, 0, "ext4 {backend:?}");
    }
}

/// Unmounts also when a test fails.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

fn in_directory(device: &LoopDevice, mount: &Path, backend: BackendChoice) -> ([Counts; 2], usize) {
    let target = Target::Directory(mount.join(format!("{backend:?}")));
    let media = create_media(&target, &MediaOptions { backend }).expect("opened");
    media.create_zones(WAL_BYTES).wait().expect("formatted");
    let (wal, _) = media.zones(WAL_BYTES).expect("zones");
    let root = std::fs::File::open(mount).expect("the mount");
    rustix::fs::syncfs(&root).expect("the format is on the device");
    let measured = ([false, true].map(|here| append(&device.path, &wal, here)), kernel_workers());
    close(&*media);
    measured
}
