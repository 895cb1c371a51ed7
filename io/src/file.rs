//! An opened file or raw block device, and the blocking calls on it.
//!
//! # Place
//! Below both backends: the thread pool runs every operation by these calls, the ring those that it has no good opcode
//! for. All of them may run on several threads at once.
//!
//! # Crash
//! A durable write is `pwritev2(RWF_DSYNC)` on a file. On a raw device it is a write and `fdatasync`: there the kernel
//! answers a synchronous RWF_DSYNC with a FUA write and a second flush of the whole cache. Opening locks, then flushes,
//! and only then may anybody read.

use std::fs::OpenOptions;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use crate::lock::{self, LockFile};
use crate::transfer::{IO_BYTES_MAX, STALLS_MAX, Step, Transfer, VECTORS_MAX};
use crate::{AlignedBuf, AlignedBytes, BLOCK_BYTES, Error, Result, WriteMode};

/// Logical size of the `extents` file: sparse, so a large number costs nothing.
const SPARSE_BYTES_MAX: u64 = 8 << 40;

/// The smallest limit of a file system that is still worth trying.
const SPARSE_BYTES_MIN: u64 = 1 << 30;

/// Failure that poisoned a medium; shared by the devices that lie on it.
pub(crate) type Poison = Arc<OnceLock<Error>>;

/// What to do when the file is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    Refuse,
    Create,
}

/// How much of the file can be addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Its length.
    Length,
    /// As far as the file system lets it grow.
    Sparse,
}

/// An open file or block device. Closing the last reference closes it and gives up its lock.
#[derive(Debug)]
pub(crate) struct OpenFile {
    fd: OwnedFd,
    path: PathBuf,
    raw: bool,
    capacity: u64,
    buffered: Option<String>,
    no_dsync: AtomicBool,
    poison: Poison,
    _lock: Option<Arc<LockFile>>,
}

impl OpenFile {
    /// Opens `path` for direct reads and writes, alone: a block device with O_EXCL, and either kind with a lock.
    ///
    /// # Errors
    /// `Unusable` with the path and a remedy, or `Locked` with what is known of the holder.
    pub(crate) fn open(path: &Path, missing: Missing, extent: Extent, held: Option<Arc<LockFile>>) -> Result<Self> {
        let raw = match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => true,
            Ok(meta) if meta.is_file() => false,
            Ok(_) => {
                let message = format!("{} is neither a block device nor a plain file", path.display());
                return Err(Error::unusable("open", message));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && missing == Missing::Create => false,
            Err(e) => return Err(refused(path, false, &e)),
        };
        let (fd, buffered) = lock::retry(path, || open_locked(path, raw, missing))?;
        Self::over(fd, path, raw, buffered, extent, held)
    }

    /// A file in `directory` that has no name, so that it goes with its last reference, however the process ends.
    ///
    /// # Errors
    /// As [`OpenFile::open`].
    pub(crate) fn unnamed(directory: &Path, extent: Extent) -> Result<Self> {
        let (fd, buffered) = open_unnamed(directory)?;
        Self::over(fd, directory, false, buffered, extent, None)
    }

    fn over(
        fd: OwnedFd,
        path: &Path,
        raw: bool,
        mut buffered: Option<String>,
        extent: Extent,
        held: Option<Arc<LockFile>>,
    ) -> Result<Self> {
        if raw {
            let block = rustix::fs::ioctl_blksszget(&fd).map_err(|e| Error::os("open", 0, 0, e.raw_os_error()))?;
            if block as usize > BLOCK_BYTES {
                let message = format!(
                    "{} has logical blocks of {block} bytes; Mainstay needs a device with blocks of at most {BLOCK_BYTES}",
                    path.display()
                );
                return Err(Error::unusable("open", message));
            }
        }
        let length = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(|e| Error::os("open", 0, 0, e.raw_os_error()))?;
        let mut file = Self {
            capacity: whole_blocks(length),
            fd,
            path: path.to_owned(),
            raw,
            buffered: None,
            no_dsync: AtomicBool::new(false),
            poison: Poison::default(),
            _lock: held,
        };
        if extent == Extent::Sparse {
            file.capacity = file.growth_limit();
        }
        if buffered.is_none() {
            buffered = file.probe_direct()?;
        }
        file.buffered = buffered;
        // What a killed process wrote may still be only in the cache of the drive: nothing is decided on it before it
        // is durable.
        file.sync("open", 0, 0)?;
        Ok(file)
    }

    /// Reads a block, so that what O_DIRECT does not support here is known before it matters.
    fn probe_direct(&mut self) -> Result<Option<String>> {
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        match rustix::io::pread(&self.fd, &mut *block, 0) {
            Ok(_) => Ok(None),
            Err(Errno::INVAL) if !self.raw => {
                let flags = rustix::fs::fcntl_getfl(&self.fd).map_err(|e| Error::os("open", 0, 0, e.raw_os_error()))?;
                rustix::fs::fcntl_setfl(&self.fd, flags - rustix::fs::OFlags::DIRECT)
                    .map_err(|e| Error::os("open", 0, 0, e.raw_os_error()))?;
                Ok(Some(buffered_reason(&self.path)))
            }
            Err(Errno::INVAL) => {
                let message = format!("{} refuses direct reads of {BLOCK_BYTES} bytes", self.path.display());
                Err(Error::unusable("open", message))
            }
            // A bad first block is for the reader of that block to report.
            Err(_) => Ok(None),
        }
    }

    /// The largest size that this file may have, found without changing it: a seek beyond it fails.
    fn growth_limit(&self) -> u64 {
        let quota = rustix::process::getrlimit(rustix::process::Resource::Fsize).current.unwrap_or(u64::MAX);
        let mut limit = SPARSE_BYTES_MAX;
        while limit > SPARSE_BYTES_MIN && rustix::fs::seek(&self.fd, SeekFrom::Start(limit)).is_err() {
            limit /= 2;
        }
        whole_blocks(limit.min(quota)).max(self.capacity)
    }

    /// Takes over a new length.
    pub(crate) fn measure(&mut self) -> Result<()> {
        let length =
            rustix::fs::seek(&self.fd, SeekFrom::End(0)).map_err(|e| Error::os("open", 0, 0, e.raw_os_error()))?;
        self.capacity = whole_blocks(length);
        Ok(())
    }

    /// Drops all content of a file.
    pub(crate) fn truncate(&self) -> Result<()> {
        rustix::fs::ftruncate(&self.fd, 0).map_err(|e| Error::os("truncate", 0, 0, e.raw_os_error()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// True for a block device.
    pub(crate) fn is_raw(&self) -> bool {
        self.raw
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Why reads and writes go through the page cache.
    pub(crate) fn buffered(&self) -> Option<&str> {
        self.buffered.as_deref()
    }

    pub(crate) fn poison(&self) -> &Poison {
        &self.poison
    }

    /// Fills `buf` from `offset`; what lies behind the end of a file is zero.
    pub(crate) fn read(&self, offset: u64, buf: &mut AlignedBuf) -> Result<()> {
        let length = buf.len() as u64;
        let mut transfer = Transfer::read(offset, length, !self.raw);
        if length == 0 {
            return Ok(());
        }
        loop {
            let (at, bytes) = transfer.next();
            let from = transfer.done() as usize;
            let part = &mut buf[from..from + bytes as usize];
            let answer = rustix::io::pread(&self.fd, part, at);
            match transfer.advance(answer.map(|n| n as u64).map_err(Errno::raw_os_error)) {
                Step::Complete => return Ok(()),
                Step::EndOfFile => {
                    buf[transfer.done() as usize..].fill(0);
                    return Ok(());
                }
                Step::Again { stalled } => pause(stalled),
                Step::Fail(errno) => return Err(Error::os("read", offset, length, errno)),
            }
        }
    }

    /// Writes `bufs` one after the other from `offset`.
    pub(crate) fn write(&self, offset: u64, bufs: &[AlignedBytes], mode: WriteMode) -> Result<()> {
        let length: u64 = bufs.iter().map(|b| b.len() as u64).sum();
        if length == 0 {
            return Ok(());
        }
        let mut dsync = mode == WriteMode::Durable && self.dsync_in_one_call(length, bufs.len());
        let mut transfer = Transfer::write(offset, length);
        loop {
            let (at, bytes) = transfer.next();
            let (slices, _) = gather(bufs, transfer.done(), bytes);
            let flags = if dsync { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
            let answer = if dsync {
                rustix::io::pwritev2(&self.fd, &slices, at, flags)
            } else {
                rustix::io::pwritev(&self.fd, &slices, at)
            };
            if dsync && matches!(answer, Err(Errno::OPNOTSUPP | Errno::NOSYS)) {
                self.lose_dsync();
                dsync = false;
                continue;
            }
            match transfer.advance(answer.map(|n| n as u64).map_err(Errno::raw_os_error)) {
                Step::Complete => break,
                Step::Again { stalled } => pause(stalled),
                Step::EndOfFile => return Err(Error::os("write", offset, length, libc::EIO)),
                Step::Fail(errno) => return Err(Error::os("write", offset, length, errno)),
            }
        }
        if mode == WriteMode::Durable && !dsync { self.sync("write", offset, length) } else { Ok(()) }
    }

    /// True when one call writes all of it and makes it durable.
    fn dsync_in_one_call(&self, length: u64, count: usize) -> bool {
        !self.raw && length <= IO_BYTES_MAX && count <= VECTORS_MAX && self.has_dsync()
    }

    /// True until a write with RWF_DSYNC was refused as unsupported.
    pub(crate) fn has_dsync(&self) -> bool {
        !self.no_dsync.load(Ordering::Relaxed)
    }

    /// Remembers that RWF_DSYNC is not supported here.
    pub(crate) fn lose_dsync(&self) {
        self.no_dsync.store(true, Ordering::Relaxed);
    }

    /// Makes completed writes durable. A failure is final: see [`crate::BlockDevice`].
    pub(crate) fn sync(&self, op: &'static str, offset: u64, length: u64) -> Result<()> {
        let mut stalls = 0;
        loop {
            match rustix::fs::fdatasync(&self.fd) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) if stalls < STALLS_MAX => stalls += 1,
                Err(e) => return Err(Error::flush(op, offset, length, e.raw_os_error())),
            }
        }
    }

    /// Reserves the range in a file; on a raw device there is nothing to reserve.
    pub(crate) fn allocate(&self, offset: u64, length: u64) -> Result<()> {
        if self.raw || length == 0 {
            return Ok(());
        }
        let mut stalls = 0;
        loop {
            match rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, length) {
                Ok(()) => return Ok(()),
                // The write that needs the space will say so itself.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                Err(Errno::INTR) if stalls < STALLS_MAX => stalls += 1,
                Err(e) => return Err(Error::os("allocate", offset, length, e.raw_os_error())),
            }
        }
    }

    /// Gives the range back. A medium that cannot keeps it: success without effect.
    pub(crate) fn discard(&self, offset: u64, length: u64) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        let mut stalls = 0;
        loop {
            let answer = if self.raw {
                block_range(self.fd.as_fd(), BLKDISCARD, offset, length)
            } else {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.fd, flags, offset, length)
            };
            match answer {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY) => return Ok(()),
                Err(Errno::INTR) if stalls < STALLS_MAX => stalls += 1,
                Err(e) => return Err(Error::os("discard", offset, length, e.raw_os_error())),
            }
        }
    }

    /// Writes zeroes over the range and makes them durable: real blocks, so that a later durable write changes no
    /// metadata of the file system.
    pub(crate) fn zero(&self, offset: u64, length: u64) -> Result<()> {
        self.allocate(offset, length)?;
        let whole = self.raw && block_range(self.fd.as_fd(), BLKZEROOUT, offset, length).is_ok();
        if !whole {
            let chunk = AlignedBuf::zeroed(length.min(IO_BYTES_MAX) as usize).freeze();
            let mut at = 0;
            while at < length {
                let bytes = (length - at).min(chunk.len() as u64);
                self.write(offset + at, &[chunk.slice(0..bytes as usize)], WriteMode::Cached)?;
                at += bytes;
            }
        }
        // The length of the file is metadata that fdatasync covers too; fsync also settles times, once, here.
        rustix::fs::fsync(&self.fd).map_err(|e| Error::os("zero", offset, length, e.raw_os_error()))
    }

    /// Lets another opener have the file although this one still has it open. A block device stays taken: its lock is the
    /// exclusive opening. A failure has nobody to tell: it shows as `Locked` to the next opener.
    pub(crate) fn unlock(&self) {
        let _ = rustix::fs::flock(&self.fd, rustix::fs::FlockOperation::NonBlockingUnlock);
    }

    /// True when the first `length` bytes are zeroes.
    pub(crate) fn is_zero(&self, length: u64) -> Result<bool> {
        let mut buf = AlignedBuf::zeroed(length.min(self.capacity) as usize);
        self.read(0, &mut buf)?;
        Ok(buf.iter().all(|byte| *byte == 0))
    }
}

/// The part of `bufs` that begins `done` bytes in and is at most `bytes` long, and how long it is.
pub(crate) fn gather(bufs: &[AlignedBytes], done: u64, bytes: u64) -> (Vec<IoSlice<'_>>, u64) {
    let mut skip = done as usize;
    let mut left = bytes as usize;
    let mut slices = Vec::with_capacity(bufs.len().min(VECTORS_MAX));
    for buf in bufs {
        if left == 0 || slices.len() == VECTORS_MAX {
            break;
        }
        if skip >= buf.len() {
            skip -= buf.len();
            continue;
        }
        let take = (buf.len() - skip).min(left);
        slices.push(IoSlice::new(&buf[skip..skip + take]));
        left -= take;
        skip = 0;
    }
    (slices, bytes - left as u64)
}

fn whole_blocks(length: u64) -> u64 {
    length - length % BLOCK_BYTES as u64
}

/// Lets other threads run after an answer without progress. The bound is in [`Transfer`].
fn pause(stalled: bool) {
    if stalled {
        std::thread::yield_now();
    }
}

fn buffered_reason(path: &Path) -> String {
    format!("{} does not support O_DIRECT: reads and writes go through the page cache", path.display())
}

/// Opens and locks; the second value says why direct I/O is not used.
fn open_locked(path: &Path, raw: bool, missing: Missing) -> lock::Attempt<(OwnedFd, Option<String>)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(missing == Missing::Create && !raw).mode(0o600);
    options.custom_flags(libc::O_DIRECT | if raw { libc::O_EXCL } else { 0 });
    let (file, buffered) = match options.open(path) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) && !raw => {
            let file = options.custom_flags(0).open(path).map_err(|e| refused(path, raw, &e))?;
            (file, Some(buffered_reason(path)))
        }
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
        Err(e) => return Err(refused(path, raw, &e)),
        Ok(file) => (file, None),
    };
    let fd = OwnedFd::from(file);
    Ok(lock::flock(&fd, path)?.then_some((fd, buffered)))
}

/// Names tried for a file that is to have none.
const NAMES_MAX: u32 = 16;

/// Makes a file without a name, or under one that is gone before anything is written; the second value says why direct I/O is
/// not used.
fn open_unnamed(directory: &Path) -> Result<(OwnedFd, Option<String>)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let file = match options.clone().custom_flags(libc::O_TMPFILE).open(directory) {
        Ok(file) => file,
        // The file system has none, or the kernel does not know them and takes the directory for what is to be opened.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
            open_and_remove(directory, &options)?
        }
        Err(e) => return Err(refused(directory, false, &e)),
    };
    let fd = OwnedFd::from(file);
    let os = |e: Errno| Error::os("open", 0, 0, e.raw_os_error());
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(os)?;
    match rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::DIRECT) {
        Ok(()) => Ok((fd, None)),
        Err(Errno::INVAL) => Ok((fd, Some(buffered_reason(directory)))),
        Err(e) => Err(os(e)),
    }
}

fn open_and_remove(directory: &Path, options: &OpenOptions) -> Result<std::fs::File> {
    let mut attempt = 1;
    loop {
        let path = directory.join(format!(".mainstay-scratch-{}-{attempt}", std::process::id()));
        match options.clone().create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path).map_err(|e| refused(&path, false, &e))?;
                return Ok(file);
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && attempt < NAMES_MAX => attempt += 1,
            Err(e) => return Err(refused(&path, false, &e)),
        }
    }
}

/// Says what is wrong with `path` and what to do.
pub(crate) fn refused(path: &Path, raw: bool, e: &std::io::Error) -> Error {
    let path = path.display();
    let message = match e.raw_os_error() {
        Some(libc::ENOENT) => format!("{path} does not exist: create it, or correct the path"),
        Some(libc::ENOTDIR) => format!("a part of {path} is not a directory: correct the path"),
        Some(libc::EACCES | libc::EPERM) if raw => format!(
            "{path} may not be opened by this user: give it read and write access to the device; in Kubernetes set \
             device_ownership_from_security_context in containerd's CRI settings, so that the device follows runAsUser"
        ),
        Some(libc::EACCES | libc::EPERM) => {
            format!("{path} may not be opened by this user: give it read and write access, in Kubernetes by fsGroup")
        }
        Some(libc::EROFS) => format!("{path} is read-only: mount or attach it for writing"),
        Some(libc::EISDIR) => format!("{path} is a directory: name it as a directory target"),
        Some(libc::ENOSPC | libc::EDQUOT) => format!("{path} cannot be created, its file system is full: free space"),
        Some(libc::ENXIO | libc::ENODEV) => format!("{path} has no device behind it: attach it, or correct the path"),
        _ => format!("{path} cannot be opened: {e}"),
    };
    Error::unusable("open", message)
}

const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;

/// BLKDISCARD and BLKZEROOUT: both take a range of bytes.
fn block_range(fd: BorrowedFd<'_>, request: u64, offset: u64, length: u64) -> rustix::io::Result<()> {
    let range = [offset, length];
    // SAFETY: both requests read two u64 from the pointer, which lives through the call, and write nothing to it.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, range.as_ptr()) };
    if answer == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_removed_at_once_is_still_written_and_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = open_and_remove(directory.path(), &options).expect("made");
        assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);
        std::os::unix::fs::FileExt::write_all_at(&file, b"kept", 0).expect("written");
        let mut found = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).expect("read");
        assert_eq!(&found, b"kept");
        // A name that is taken is not the only one.
        let taken = directory.path().join(format!(".mainstay-scratch-{}-1", std::process::id()));
        std::fs::write(&taken, "of somebody else").expect("written");
        open_and_remove(directory.path(), &options).expect("made under another name");
        assert_eq!(std::fs::read(&taken).expect("untouched"), b"of somebody else");
    }

    #[test]
    fn gather_begins_in_the_middle_and_ends_at_the_bound() {
        let bufs: Vec<_> = (1..=3u8).map(|n| AlignedBuf::copy_from(&vec![n; 8192]).freeze()).collect();
        let (slices, bytes) = gather(&bufs, 4096, 12288);
        assert_eq!(bytes, 12288);
        assert_eq!(slices.iter().map(|s| (s[0], s.len())).collect::<Vec<_>>(), [(1, 4096), (2, 8192)]);
        let (slices, bytes) = gather(&bufs, 16384, 1 << 20);
        assert_eq!((slices.len(), bytes), (1, 8192));
    }
}
