//! A block device whose errors and delays a test commands: nbdkit holds the bytes in memory, nbdfuse shows them as a file, and
//! a loop device makes a raw device of that file.
//!
//! ```text
//!   mainstay serve ── /dev/loopN (direct I/O) ── file of nbdfuse ── unix socket ── nbdkit: error filter, delay filter, memory
//! ```
//!
//! # Invariants
//! 1. Loop device, mount and both processes go away when the [`FaultyDevice`] is dropped, also when the test panics. A server that
//!    uses it is dropped before: declare the device first.
//! 2. An error is answered only while its trigger exists, and nbdkit logs each one, so a test can tell that the fault was met.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::loopback::LoopDevice;

/// How long each of the parts may take to come up or to go.
const PART_MAX: Duration = Duration::from_secs(10);

/// A raw device that fails on command.
pub struct FaultyDevice {
    // Fields are dropped in this order: each lies on the ones below it.
    device: Option<LoopDevice>,
    mount: Option<Mount>,
    nbdkit: Option<Part>,
    folder: tempfile::TempDir,
}

/// What is asked of a device.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// Reads.
    Read,
    /// Writes, of zeros as well.
    Write,
}

impl FaultyDevice {
    /// Makes a blank device of so many bytes, each write of which takes `write_delay`. `None`, with the reason printed, where the
    /// machine lacks the rights or the means.
    pub fn create(bytes: u64, write_delay: Duration) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut device = Self { device: None, mount: None, nbdkit: None, folder };
        match device.make(bytes, write_delay) {
            Ok(()) => Some(device),
            Err(reason) => {
                eprintln!("not run: no device with errors here: {reason}");
                None
            }
        }
    }

    fn make(&mut self, bytes: u64, write_delay: Duration) -> Result<(), String> {
        let (socket, file) = (self.folder.path().join("socket"), self.folder.path().join("device"));
        File::create(&file).expect("a file can be made");
        let mut nbdkit = Command::new("nbdkit");
        // A test that is killed leaves no process behind: without nbdkit nbdfuse answers errors only.
        nbdkit.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket);
        nbdkit.args(["--filter=error", "--filter=delay", "memory", &format!("size={bytes}"), "error=EIO"]);
        for (kind, request) in [("pread", Request::Read), ("pwrite", Request::Write), ("zero", Request::Write)] {
            nbdkit.arg(format!("error-{kind}-rate=100%"));
            nbdkit.arg(format!("error-{kind}-file={}", self.trigger(request).display()));
        }
        nbdkit.arg(format!("wdelay={}ms", write_delay.as_millis()));
        let log = self.log();
        let part = self.nbdkit.insert(Part::start("nbdkit", nbdkit, &log)?);
        part.until(&log, || socket.exists())?;

        let log = self.folder.path().join("nbdfuse.log");
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse.arg(&file).arg("--unix").arg(&socket);
        let part = Part::start("nbdfuse", nbdfuse, &log)?;
        let mount = self.mount.insert(Mount { part, file: file.clone() });
        // The blank file below the mount has no bytes.
        let mounted = || std::fs::metadata(&file).is_ok_and(|file| file.len() == bytes);
        mount.part.until(&log, mounted)?;
        self.device = Some(LoopDevice::over(&file)?);
        Ok(())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.device.as_ref().expect("a device that was made has a loop device").path()
    }

    /// From now on every such request answers EIO.
    pub fn fail(&self, request: Request) {
        File::create(self.trigger(request)).expect("a trigger can be made");
    }

    /// From now on such requests succeed.
    pub fn mend(&self, request: Request) {
        std::fs::remove_file(self.trigger(request)).expect("a trigger that was made can be removed");
    }

    /// How many requests were answered with an error so far.
    pub fn errors(&self) -> usize {
        let log = std::fs::read_to_string(self.log()).expect("the log of nbdkit can be read");
        log.lines().filter(|line| line.contains("injecting EIO")).count()
    }

    fn trigger(&self, request: Request) -> PathBuf {
        self.folder.path().join(format!("{request:?}"))
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("nbdkit.log")
    }
}

/// One of the two processes; ended when dropped.
struct Part {
    name: &'static str,
    process: Child,
}

impl Part {
    fn start(name: &'static str, mut command: Command, log: &Path) -> Result<Self, String> {
        let log = File::create(log).expect("a log can be made");
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        Ok(Self { name, process: process.map_err(|e| format!("{name}: {e}"))? })
    }

    /// Waits until `done`, or fails with what the process said.
    fn until(&mut self, log: &Path, mut done: impl FnMut() -> bool) -> Result<(), String> {
        let began = Instant::now();
        while !done() {
            if self.has_ended() || began.elapsed() > PART_MAX {
                let said = std::fs::read_to_string(log).unwrap_or_default();
                return Err(format!("{}: {}", self.name, said.trim().lines().last().unwrap_or_default()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        self.process.try_wait().expect("a child can be waited for").is_some()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The file of nbdfuse; unmounted when dropped, upon which nbdfuse ends by itself.
struct Mount {
    part: Part,
    file: PathBuf,
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The kernel lets go of the loop device a moment after it was detached.
        let began = Instant::now();
        while !self.part.has_ended() && began.elapsed() < PART_MAX {
            let _ = Command::new("fusermount3").args(["-u", "-q"]).arg(&self.file).stderr(Stdio::null()).status();
            std::thread::sleep(Duration::from_millis(10));
        }
        if !self.part.has_ended() {
            let _ = Command::new("fusermount3").args(["-u", "-q", "-z"]).arg(&self.file).status();
        }
    }
}
