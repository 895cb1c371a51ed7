//! What Linux says of the device below a path, and whether it was told to flush.
//!
//! # Place
//! reads sysfs and the table of mounts; decides nothing but what the counts mean
//! # Why not
//! Asking the device itself (ATA IDENTIFY, NVMe Identify): that takes rights that who runs this rarely has, and says what the device has,
//! not what the kernel between does with it.
//! # Sources
//! Linux `Documentation/admin-guide/iostats.rst` for the fields of `stat`, `Documentation/ABI/stable/sysfs-block` for `queue/write_cache`
//! and `queue/fua`.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Devices below a device that are looked at; and how far down.
const LEAVES_MAX: usize = 64;
const DEPTH_MAX: usize = 8;

/// File systems without anything below them.
const MEMORY_FILE_SYSTEMS: [&str; 3] = ["tmpfs", "ramfs", "devtmpfs"];

/// What is known of a device.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Device {
    name: String,
    model: Option<String>,
    rotational: Option<bool>,
    /// True: what was written may be lost with the power until it is flushed.
    volatile_cache: Option<bool>,
    fua: Option<bool>,
    logical_block_bytes: Option<u64>,
    physical_block_bytes: Option<u64>,
    /// The devices that it is made of, if it is no device itself.
    over: Vec<String>,
}

impl Device {
    fn at(block: &Path) -> Self {
        Self {
            name: name_of(block),
            model: text(&block.join("device/model")),
            rotational: flag(&block.join("queue/rotational")),
            volatile_cache: volatile_cache(block),
            fua: flag(&block.join("queue/fua")),
            logical_block_bytes: number(&block.join("queue/logical_block_size")),
            physical_block_bytes: number(&block.join("queue/physical_block_size")),
            over: Vec::new(),
        }
    }

    pub(super) fn line(&self) -> String {
        let model = self.model.as_deref().map(|model| format!(" ({model})")).unwrap_or_default();
        let over = if self.over.is_empty() { String::new() } else { format!(" over {}", self.over.join(", ")) };
        let kind = match self.rotational {
            Some(true) => "turning disk",
            Some(false) => "no turning disk",
            None => "of unknown kind",
        };
        let cache = match self.volatile_cache {
            Some(true) => "volatile cache",
            Some(false) => "no volatile cache",
            None => "unknown whether it has a volatile cache",
        };
        let fua = match self.fua {
            Some(true) => ", FUA",
            Some(false) => ", no FUA",
            None => "",
        };
        let blocks = match (self.logical_block_bytes, self.physical_block_bytes) {
            (Some(logical), Some(physical)) => format!(", blocks of {logical} bytes, {physical} inside"),
            _ => String::new(),
        };
        format!("device {}{model}{over}: {kind}, {cache}{fua}{blocks}", self.name)
    }
}

/// What the durable writes were to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Finding {
    /// There is no volatile cache, by what the device says of itself.
    NotNeeded,
    /// As many flushes as durable writes.
    Reached,
    /// The device takes durable writes as such (FUA), and those are not counted apart.
    Fua,
    /// Not to be seen.
    Unknown,
    /// There is a volatile cache, and it was not told to write out what was to be durable.
    Suspect,
}

/// What was counted while durable writes were measured, one at a time.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Flushes {
    pub(super) finding: Finding,
    durable_writes: u64,
    device_writes: Option<u64>,
    device_flushes: Option<u64>,
    #[serde(skip)]
    pub(super) says: String,
}

/// What the devices have done since they are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    writes: u64,
    flushes: u64,
}

/// A device that is over no other.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    volatile_cache: Option<bool>,
    fua: bool,
    /// Its driver takes requests from queues of the block layer, where flushes are counted; those that take what was submitted do not
    /// all count them.
    counts_flushes: bool,
}

/// What lies below a path.
pub(super) struct Storage {
    pub(super) file_system: Option<String>,
    pub(super) in_memory: Option<String>,
    pub(super) device: Option<Device>,
    leaves: Vec<PathBuf>,
}

impl Storage {
    /// Looks as far as one may here: what cannot be read is not known.
    pub(super) fn of(path: &Path) -> Self {
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let found = fs::metadata(&path).ok();
        let raw = found.as_ref().is_some_and(|found| found.file_type().is_block_device());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mount = if raw { None } else { mount_of(&path, &mounts) };
        let number = found.as_ref().map(|found| if raw { found.rdev() } else { found.dev() });
        // A file system over several devices has a number of its own, and names one of them as its source.
        let source = mount.as_ref().and_then(|mount| fs::metadata(&mount.source).ok()).map(|found| found.rdev());
        let block = number.into_iter().chain(source).find_map(|number| block_of(Path::new("/sys"), number));
        let file_system = mount.map(|mount| mount.file_system);
        let leaves = block.iter().flat_map(|block| leaves_of(block)).collect::<Vec<_>>();
        let device = block.as_deref().map(|block| {
            let over = leaves.iter().filter(|leaf| *leaf != block).map(|leaf| name_of(leaf)).collect();
            Device { over, ..Device::at(block) }
        });
        let in_memory = in_memory(file_system.as_deref(), device.as_ref().map(|device| device.name.as_str()));
        Self { file_system, in_memory, device, leaves }
    }

    pub(super) fn counts(&self) -> Option<Counts> {
        let mut all = Counts::default();
        for leaf in &self.leaves {
            let counts = parse_stat(&fs::read_to_string(leaf.join("stat")).ok()?)?;
            all.writes = all.writes.saturating_add(counts.writes);
            all.flushes = all.flushes.saturating_add(counts.flushes);
        }
        (!self.leaves.is_empty()).then_some(all)
    }

    /// What the counts before and after `durable_writes` mean.
    pub(super) fn flushes(&self, before: Option<Counts>, after: Option<Counts>, durable_writes: u64) -> Flushes {
        let leaves: Vec<Leaf> = self.leaves.iter().map(|leaf| leaf_at(leaf)).collect();
        let done = before.zip(after).map(|(before, after)| Counts {
            writes: after.writes.saturating_sub(before.writes),
            flushes: after.flushes.saturating_sub(before.flushes),
        });
        let (finding, says) = judge_flushes(&leaves, done, durable_writes);
        let (device_writes, device_flushes) = (done.map(|done| done.writes), done.map(|done| done.flushes));
        Flushes { finding, durable_writes, device_writes, device_flushes, says }
    }
}

/// What it means that devices did `done` while `durable_writes` were answered one after the other. Others may write meanwhile: then more is
/// counted, never less.
fn judge_flushes(leaves: &[Leaf], done: Option<Counts>, durable_writes: u64) -> (Finding, String) {
    let unknown = |why: &str| (Finding::Unknown, why.to_owned());
    if leaves.is_empty() {
        return unknown("no device is known below this path");
    }
    let caches: Option<Vec<bool>> = leaves.iter().map(|leaf| leaf.volatile_cache).collect();
    match caches {
        None => return unknown("the device does not say whether it has a volatile cache"),
        Some(caches) if !caches.contains(&true) => {
            return (Finding::NotNeeded, "none needed: the device says that it has no volatile cache".to_owned());
        }
        Some(_) => {}
    }
    let Some(done) = done else { return unknown("this kernel does not count flushes") };
    let counted = format!("{} flushes for {durable_writes} durable writes", done.flushes);
    let nine_tenths = durable_writes - durable_writes / 10;
    if durable_writes == 0 {
        return unknown("no durable write was measured");
    }
    if done.flushes >= nine_tenths {
        return (Finding::Reached, format!("{counted}: they reach the device"));
    }
    if leaves.iter().any(|leaf| leaf.volatile_cache == Some(true) && !leaf.counts_flushes) {
        return unknown("the driver of the device does not count flushes");
    }
    if done.writes < nine_tenths {
        return unknown("the writes did not go to the device that is known below this path");
    }
    if leaves.iter().all(|leaf| leaf.volatile_cache == Some(false) || leaf.fua) {
        return (
            Finding::Fua,
            format!("{counted}: the device takes durable writes as such (FUA), which are not counted"),
        );
    }
    (Finding::Suspect, format!("{counted}: they do not reach the device"))
}

/// The counts in a `stat` of sysfs; None before Linux 5.5, which counts no flushes.
fn parse_stat(text: &str) -> Option<Counts> {
    let mut fields = text.split_whitespace().map(|field| field.parse::<u64>().ok());
    let writes = fields.nth(4)??;
    let flushes = fields.nth(10)??;
    Some(Counts { writes, flushes })
}

/// Why what is written there is gone with the power.
fn in_memory(file_system: Option<&str>, device: Option<&str>) -> Option<String> {
    if let Some(name) = file_system.filter(|name| MEMORY_FILE_SYSTEMS.contains(name)) {
        return Some(format!("{name} keeps everything in memory: a loss of power takes it"));
    }
    let digits = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit());
    let device =
        device.filter(|name| ["zram", "ram"].iter().any(|kind| name.strip_prefix(kind).is_some_and(digits)))?;
    Some(format!("the device {device} keeps everything in memory: a loss of power takes it"))
}

struct Mount {
    file_system: String,
    source: PathBuf,
}

/// The mount that holds `path`, of the lines of `/proc/self/mountinfo`: the longest mount point above it, the last of equals.
fn mount_of(path: &Path, mounts: &str) -> Option<Mount> {
    let mut best: Option<(usize, Mount)> = None;
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4) else { continue };
        // Spaces are written as octal numbers.
        let point = point.replace("\\040", " ");
        let mut right = right.split(' ');
        let (Some(file_system), Some(source)) = (right.next(), right.next()) else { continue };
        let length = point.len();
        if path.starts_with(&point) && best.as_ref().is_none_or(|(longest, _)| length >= *longest) {
            best = Some((length, Mount { file_system: file_system.to_owned(), source: source.into() }));
        }
    }
    best.map(|(_, mount)| mount)
}

/// The partitions of the block device at `path`: of what is on them nothing is seen at the beginning of the device.
pub(super) fn partitions(path: &Path) -> Vec<String> {
    let number = fs::metadata(path).map(|found| found.rdev()).unwrap_or_default();
    partitions_of(Path::new("/sys"), number)
}

fn partitions_of(sys: &Path, number: u64) -> Vec<String> {
    let entries = fs::read_dir(entry_of(sys, number)).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut names: Vec<String> =
        entries.filter(|path| path.join("partition").exists()).map(|path| name_of(&path)).collect();
    names.sort();
    names
}

/// What sysfs has of the device `number`.
fn entry_of(sys: &Path, number: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    sys.join(format!("dev/block/{major}:{minor}"))
}

/// The whole device with or around the device `number`.
fn block_of(sys: &Path, number: u64) -> Option<PathBuf> {
    whole(&entry_of(sys, number))
}

/// The device that `link` of sysfs leads to; for a partition the one that it is a part of.
fn whole(link: &Path) -> Option<PathBuf> {
    let found = fs::canonicalize(link).ok()?;
    if found.join("partition").exists() { found.parent().map(Path::to_owned) } else { Some(found) }
}

/// The devices that `block` is over, or itself.
fn leaves_of(block: &Path) -> Vec<PathBuf> {
    let mut leaves = Vec::new();
    let mut above = vec![(block.to_owned(), 0)];
    while let Some((block, depth)) = above.pop() {
        let below: Vec<PathBuf> = match fs::read_dir(block.join("slaves")) {
            Ok(entries) if depth < DEPTH_MAX => entries.flatten().filter_map(|entry| whole(&entry.path())).collect(),
            _ => Vec::new(),
        };
        if below.is_empty() && !leaves.contains(&block) && leaves.len() < LEAVES_MAX {
            leaves.push(block);
        } else if above.len() < LEAVES_MAX {
            above.extend(below.into_iter().map(|block| (block, depth + 1)));
        }
    }
    leaves.sort();
    leaves
}

fn leaf_at(block: &Path) -> Leaf {
    Leaf {
        volatile_cache: volatile_cache(block),
        fua: flag(&block.join("queue/fua")).unwrap_or_default(),
        counts_flushes: block.join("mq").is_dir(),
    }
}

fn volatile_cache(block: &Path) -> Option<bool> {
    match text(&block.join("queue/write_cache"))?.as_str() {
        "write back" => Some(true),
        "write through" => Some(false),
        _ => None,
    }
}

fn name_of(block: &Path) -> String {
    block.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

fn flag(path: &Path) -> Option<bool> {
    number(path).map(|number| number != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_counts_mean_is_one_row_of_a_table() {
        let leaf = |volatile_cache, fua, counts_flushes| Leaf { volatile_cache, fua, counts_flushes };
        let plain = leaf(Some(true), false, true);
        let through = leaf(Some(false), false, true);
        let done = |writes, flushes| Some(Counts { writes, flushes });
        let check = |leaves: &[Leaf], done: Option<Counts>, finding: Finding| {
            let (found, says) = judge_flushes(leaves, done, 1000);
            assert_eq!(found, finding, "{leaves:?} {done:?}: {says}");
        };
        check(&[], done(1000, 1000), Finding::Unknown);
        check(&[leaf(None, false, true)], done(1000, 1000), Finding::Unknown);
        check(&[through], done(1000, 0), Finding::NotNeeded);
        check(&[through, plain], done(1000, 0), Finding::Suspect);
        check(&[plain], None, Finding::Unknown);
        check(&[plain], done(1000, 1000), Finding::Reached);
        check(&[plain], done(5000, 3000), Finding::Reached);
        check(&[plain], done(1000, 900), Finding::Reached);
        check(&[plain], done(1000, 899), Finding::Suspect);
        check(&[plain], done(1000, 0), Finding::Suspect);
        check(&[plain], done(10, 0), Finding::Unknown);
        check(&[leaf(Some(true), true, true)], done(1000, 3), Finding::Fua);
        check(&[leaf(Some(true), true, true), plain], done(1000, 3), Finding::Suspect);
        check(&[leaf(Some(true), false, false)], done(1000, 0), Finding::Unknown);
        check(&[leaf(Some(true), false, false)], done(1000, 1000), Finding::Reached);
        assert_eq!(judge_flushes(&[plain], done(0, 0), 0).0, Finding::Unknown);
    }

    #[test]
    fn the_statistics_of_a_device_are_read_by_place() {
        let check = |text: &str, expect: Option<(u64, u64)>| {
            let expect = expect.map(|(writes, flushes)| Counts { writes, flushes });
            assert_eq!(parse_stat(text), expect, "{text}");
        };
        check("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n", Some((5, 16)));
        check("   1 2 3 4 5 6 7 8 9 10 11 12 13 14 15\n", None);
        check("1 2 3 4 x 6 7 8 9 10 11 12 13 14 15 16 17", None);
        check("", None);
    }

    #[test]
    fn the_mount_is_the_longest_one_above() {
        let mounts = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                      30 22 0:26 / /dev/shm rw - tmpfs tmpfs rw\n\
                      31 22 0:40 /@ /data rw - btrfs /dev/vdb rw\n\
                      32 22 8:1 / /data/my\\040own rw - xfs /dev/sda1 rw\n\
                      not a line\n";
        let check = |path: &str, expect: Option<(&str, &str)>| {
            let found = mount_of(Path::new(path), mounts);
            let found = found.map(|mount| (mount.file_system, mount.source.display().to_string()));
            assert_eq!(found.as_ref().map(|(name, source)| (name.as_str(), source.as_str())), expect, "{path}");
        };
        check("/var/lib", Some(("ext4", "/dev/vda")));
        check("/dev/shm/x", Some(("tmpfs", "tmpfs")));
        check("/data", Some(("btrfs", "/dev/vdb")));
        check("/database", Some(("ext4", "/dev/vda")));
        check("/data/my own/volume", Some(("xfs", "/dev/sda1")));
        assert!(mount_of(Path::new("/x"), "").is_none());
    }

    #[test]
    fn memory_is_no_device() {
        let check = |file_system, device, expect: bool| {
            assert_eq!(in_memory(file_system, device).is_some(), expect, "{file_system:?} {device:?}");
        };
        check(Some("tmpfs"), None, true);
        check(Some("ext4"), Some("zram0"), true);
        check(None, Some("ram12"), true);
        check(Some("ext4"), Some("vda"), false);
        check(Some("ext4"), Some("ram"), false);
        check(None, Some("rampart"), false);
        check(None, None, false);
    }

    /// A partition of one disk and another disk, joined by a driver that is over both.
    #[test]
    fn a_device_is_looked_at_by_the_devices_that_it_is_over() {
        let sys = tempfile::tempdir().expect("a folder");
        let root = fs::canonicalize(sys.path()).expect("there");
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, text).expect("written");
        };
        for (disk, cache, model) in [("sda", "write back", "DISK A \n"), ("sdb", "write through", "")] {
            put(&format!("{disk}/queue/write_cache"), cache);
            put(&format!("{disk}/queue/fua"), "0\n");
            put(&format!("{disk}/device/model"), model);
            put(&format!("{disk}/stat"), "0 0 0 0 70 0 0 0 0 0 0 0 0 0 0 30 0\n");
            fs::create_dir(root.join(disk).join("mq")).expect("made");
        }
        put("sda/sda1/partition", "1\n");
        put("dm-0/queue/write_cache", "write back\n");
        fs::create_dir_all(root.join("dm-0/slaves")).expect("made");
        fs::create_dir_all(root.join("dev/block")).expect("made");
        let link = |from: &str, to: &str| {
            std::os::unix::fs::symlink(root.join(to), root.join(from)).expect("linked");
        };
        link("dm-0/slaves/sda1", "sda/sda1");
        link("dm-0/slaves/sdb", "sdb");
        link("dev/block/253:0", "dm-0");
        link("dev/block/8:1", "sda/sda1");
        link("dev/block/8:0", "sda");

        let block = block_of(&root, rustix::fs::makedev(253, 0)).expect("known");
        assert_eq!(name_of(&block), "dm-0");
        assert_eq!(block_of(&root, rustix::fs::makedev(8, 1)), Some(root.join("sda")));
        assert_eq!(block_of(&root, rustix::fs::makedev(9, 9)), None);
        let partitions = [(8, 0), (8, 1), (253, 0), (9, 9)].map(|(major, minor)| {
            let number = rustix::fs::makedev(major, minor);
            partitions_of(&root, number).join(",")
        });
        assert_eq!(partitions, ["sda1", "", "", ""]);
        let leaves = leaves_of(&block);
        assert_eq!(leaves, [root.join("sda"), root.join("sdb")]);
        assert_eq!(leaves_of(&root.join("sda")), [root.join("sda")]);
        let device = Device::at(&root.join("sda"));
        assert_eq!(
            (device.model.as_deref(), device.volatile_cache, device.fua),
            (Some("DISK A"), Some(true), Some(false))
        );
        assert_eq!(Device::at(&root.join("sdb")).model, None);
        let storage = Storage { file_system: None, in_memory: None, device: None, leaves };
        assert_eq!(storage.counts(), Some(Counts { writes: 140, flushes: 60 }));
        let flushes = storage.flushes(Some(Counts { writes: 40, flushes: 58 }), storage.counts(), 100);
        assert_eq!(
            (flushes.finding, flushes.device_writes, flushes.device_flushes),
            (Finding::Suspect, Some(100), Some(2))
        );
    }
}
