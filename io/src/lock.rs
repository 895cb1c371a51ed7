//! Locks against a second process on one volume, and who holds them.
//!
//! # Crash
//! A lock goes with its last open file description. The kernel keeps that one open while I/O of a killed process is in
//! flight, so a lock on the data files themselves also waits for writes that may still land; hence the retries.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::{Error, ErrorKind, Result};

const ATTEMPTS: u32 = 5;
const ATTEMPT_DELAY: Duration = Duration::from_millis(50);

/// Bytes of a lock file that are read for a message.
const NOTE_BYTES_MAX: u64 = 256;

/// Processes whose files are looked at for a message.
const PROCESSES_MAX: usize = 100_000;

/// `None`: somebody else holds it, try again.
pub(crate) type Attempt<T> = Result<Option<T>>;

/// The locked file `lock` of a directory. Its content names the holder; only the lock decides.
#[derive(Debug)]
pub(crate) struct LockFile {
    file: File,
}

impl LockFile {
    /// Locks `directory`.
    pub(crate) fn acquire(directory: &Path) -> Result<Self> {
        let path = directory.join("lock");
        retry(&path, || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let mut file = options.open(&path).map_err(|e| crate::file::refused(&path, false, &e))?;
            if !flock(&file, &path)? {
                return Ok(None);
            }
            let host = rustix::system::uname();
            let note = format!("pid={} host={}\n", std::process::id(), host.nodename().to_string_lossy());
            // Only for messages: a full file system must not keep a volume from opening.
            let _ = file.set_len(0).and_then(|()| file.write_all(note.as_bytes()));
            Ok(Some(Self { file }))
        })
    }

    /// Lets another process in although files of this opening still live. The note goes first, so that it never names
    /// a process that holds nothing; both are only for messages and for openers to come, so a failure has nobody to tell.
    pub(crate) fn release(&self) {
        let _ = self.file.set_len(0);
        let _ = rustix::fs::flock(&self.file, FlockOperation::NonBlockingUnlock);
    }
}

/// Runs `attempt` until it gets the lock, five times 50 ms apart.
///
/// # Errors
/// `Locked` with the holder as far as it can be found out, or what `attempt` failed with.
pub(crate) fn retry<T>(path: &Path, mut attempt: impl FnMut() -> Attempt<T>) -> Result<T> {
    for round in 1..=ATTEMPTS {
        if let Some(value) = attempt()? {
            return Ok(value);
        }
        if round < ATTEMPTS {
            std::thread::sleep(ATTEMPT_DELAY);
        }
    }
    let message = format!("{} is in use by {}: stop it first, or use another volume", path.display(), holder(path));
    Err(Error::new(ErrorKind::Locked, "open", 0, 0, message))
}

/// Takes the lock of an open file; false when another holds it.
pub(crate) fn flock(fd: impl rustix::fd::AsFd, path: &Path) -> Result<bool> {
    loop {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(e) => {
                let e = std::io::Error::from_raw_os_error(e.raw_os_error());
                let message = format!("{} cannot be locked: {e}: use a file system with flock", path.display());
                return Err(Error::unusable("open", message));
            }
        }
    }
}

/// Whatever says best who holds `path`: a process with it open, the note in it, a mount.
fn holder(path: &Path) -> String {
    let process = process_with(path);
    let note = (path.file_name() == Some("lock".as_ref())).then(|| note(path)).flatten();
    match (process, note, mount_of(path)) {
        (Some(process), _, _) => process,
        (None, Some(note), _) => note,
        (None, None, Some(mount)) => format!("the mount on {mount}"),
        (None, None, None) => "another process, or writes of a killed one that are still in flight".to_owned(),
    }
}

fn note(path: &Path) -> Option<String> {
    let mut note = String::new();
    File::open(path).ok()?.take(NOTE_BYTES_MAX).read_to_string(&mut note).ok()?;
    let note = note.trim();
    (!note.is_empty()).then(|| note.to_owned())
}

/// The process that has `path` open, from /proc where there is one and we may look.
fn process_with(path: &Path) -> Option<String> {
    let wanted = std::fs::metadata(path).ok()?;
    for process in std::fs::read_dir("/proc").ok()?.flatten().take(PROCESSES_MAX) {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(files) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let mut paths = files.flatten().map(|f| f.path());
        let open =
            |file: PathBuf| std::fs::metadata(file).is_ok_and(|m| (m.dev(), m.ino()) == (wanted.dev(), wanted.ino()));
        if paths.any(open) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("pid={pid} name={}", name.trim()));
        }
    }
    None
}

/// Where the block device `path` is mounted.
fn mount_of(path: &Path) -> Option<String> {
    let device = std::fs::metadata(path).ok()?.rdev();
    let wanted = format!("{}:{}", libc::major(device), libc::minor(device));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut lines = mounts.lines().map(|line| line.split(' '));
    lines.find_map(|mut fields| {
        let device = fields.nth(2)?;
        let point = fields.nth(1)?;
        (device == wanted).then(|| point.to_owned())
    })
}

/// Makes the entries of `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    let dir = File::open(directory).map_err(|e| crate::file::refused(directory, false, &e))?;
    let fd = OwnedFd::from(dir);
    rustix::fs::fsync(&fd).map_err(|e| Error::os("sync directory", 0, 0, e.raw_os_error()))
}
