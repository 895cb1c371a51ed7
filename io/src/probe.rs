//! Finds out whether io_uring works here: makes a ring, asks for the operations it needs, and reads through it.
//!
//! # Why not
//! Asking the kernel version tells nothing: a seccomp profile, a sysctl or a sandbox refuses what the kernel can do, and
//! a limit of locked memory refuses a ring of one size and not of another.

use std::io;

use io_uring::{IoUring, Probe, opcode, types};

use crate::file::OpenFile;
use crate::{AlignedBuf, BLOCK_BYTES};

/// The smallest ring worth having.
const ENTRIES_MIN: u32 = 16;

/// Worker threads of the kernel that a ring may start, for bounded and unbounded work. Only flushes need one.
const KERNEL_WORKERS_MAX: u32 = 4;

/// A ring and the probe read that it did; or why there is none, with the remedy.
pub(crate) fn ring(entries: u32, file: &OpenFile) -> Result<IoUring, String> {
    let mut ring = build(entries)?;
    check_features(&ring)?;
    check_operations(&ring)?;
    // Older kernels have no such limit; nothing depends on it.
    let _ = ring.submitter().register_iowq_max_workers(&mut [KERNEL_WORKERS_MAX; 2]);
    read_once(&mut ring, file)?;
    Ok(ring)
}

/// Newest flags first: DEFER_TASKRUN since 6.1, COOP_TASKRUN since 5.19. EINVAL is one step down, ENOMEM a smaller ring.
fn build(entries: u32) -> Result<IoUring, String> {
    let mut entries = entries;
    let mut step = 0;
    loop {
        let mut builder = IoUring::builder();
        builder.dontfork();
        match step {
            0 => drop(builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag()),
            1 => drop(builder.setup_coop_taskrun().setup_taskrun_flag()),
            _ => {}
        }
        match builder.build(entries) {
            Ok(ring) => return Ok(ring),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && step < 2 => step += 1,
            Err(e) if e.raw_os_error() == Some(libc::ENOMEM) && entries > ENTRIES_MIN => entries /= 2,
            Err(e) => return Err(refusal("io_uring_setup", &e)),
        }
    }
}

fn check_features(ring: &IoUring) -> Result<(), String> {
    let params = ring.params();
    let missing = [
        (params.is_feature_nodrop(), "NODROP"),
        (params.is_feature_submit_stable(), "SUBMIT_STABLE"),
        (params.is_feature_ext_arg(), "EXT_ARG"),
    ];
    match missing.into_iter().find(|(present, _)| !present) {
        None => Ok(()),
        Some((_, name)) => Err(format!("io_uring of this kernel lacks {name}: use Linux 5.11 or later")),
    }
}

fn check_operations(ring: &IoUring) -> Result<(), String> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|e| refusal("io_uring_register", &e))?;
    let needed = [
        (opcode::Read::CODE, "READ"),
        (opcode::Write::CODE, "WRITE"),
        (opcode::Writev::CODE, "WRITEV"),
        (opcode::Fsync::CODE, "FSYNC"),
    ];
    match needed.into_iter().find(|(code, _)| !probe.is_supported(*code)) {
        None => Ok(()),
        Some((_, name)) => Err(format!("io_uring of this kernel lacks the operation {name}")),
    }
}

/// Reads the first block of the target through the ring, as every later read will.
fn read_once(ring: &mut IoUring, file: &OpenFile) -> Result<(), String> {
    let block = AlignedBuf::zeroed(BLOCK_BYTES);
    let read = opcode::Read::new(types::Fd(file.raw_fd()), block.as_ptr(), BLOCK_BYTES as u32).offset(0).build();
    // SAFETY: the entry is valid, its file is open, and its buffer stays until the completion was seen or for good.
    let pushed = unsafe { ring.submission().push(&read) };
    pushed.map_err(|_| "a new submission queue is full".to_owned())?;
    for _ in 0..crate::transfer::STALLS_MAX {
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            Err(e) => {
                std::mem::forget(block);
                return Err(refusal("io_uring_enter", &e));
            }
        }
        let Some(completion) = ring.completion().next() else { continue };
        let result = completion.result();
        // A target that cannot read its first block at all is not the ring's fault; EINVAL and its like are.
        return if result >= 0 || result == -libc::EIO {
            Ok(())
        } else {
            Err(refusal("a direct read through the ring", &io::Error::from_raw_os_error(-result)))
        };
    }
    std::mem::forget(block);
    Err("a read through the ring did not complete".to_owned())
}

/// What was refused, and what to do about it.
pub(crate) fn refusal(what: &str, e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => format!(
            "{what} was refused (EPERM): a seccomp profile or the sysctl kernel.io_uring_disabled forbids io_uring; install a \
             Localhost seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register"
        ),
        Some(libc::ENOSYS) => {
            format!(
                "{what} does not exist here (ENOSYS): the kernel has no io_uring, or a sandbox or seccomp profile hides it"
            )
        }
        Some(libc::ENOMEM) => {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
            let limit = limit.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
            format!("{what} found too little lockable memory (ENOMEM): raise RLIMIT_MEMLOCK limit={limit}")
        }
        _ => format!("{what} failed: {e}"),
    }
}
