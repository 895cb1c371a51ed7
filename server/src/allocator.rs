//! How the allocator of the programs is set.
//!
//! # Why not
//! the default: memory that was freed goes back to the kernel within a second and is asked for again with the next memtable. A page that is
//!   touched for the first time is cleared by the kernel in the middle of a write.

/// `mi_option_purge_delay` of mimalloc.h; the crate names no constant for it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
/// Milliseconds that freed memory stays with the process. Bounded, so that what a peak took goes back.
const PURGE_DELAY_MS: std::ffi::c_long = 60_000;

/// Keeps freed memory for a minute. `MIMALLOC_PURGE_DELAY` in the environment, in milliseconds, comes first.
///
/// # Safety
/// No other thread runs: they read what is written here whenever they allocate. So it is the first thing that `main` does.
#[allow(unsafe_code, reason = "an option of the allocator, written before there are threads")]
pub unsafe fn configure() {
    // SAFETY: it writes one number in a table of the allocator; the caller promises that nobody reads it meanwhile.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, PURGE_DELAY_MS) }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    /// What the environment sets and `configure` leaves; [`the_option_is_the_one_that_is_meant`] starts it.
    #[test]
    #[ignore = "prints for another test"]
    #[allow(unsafe_code, reason = "calls what it is about")]
    fn print_the_delay() {
        // SAFETY: the only test of its process, whose other thread waits for it.
        let delay = unsafe {
            super::configure();
            libmimalloc_sys::mi_option_get(super::PURGE_DELAY)
        };
        println!("delay={delay}.");
    }

    #[test]
    fn the_option_is_the_one_that_is_meant() {
        let printed = |set: Option<&str>| {
            let mut child = Command::new(std::env::current_exe().expect("this program"));
            child.args(["--exact", "allocator::tests::print_the_delay", "--ignored", "--nocapture"]);
            child.env_remove("MIMALLOC_PURGE_DELAY");
            child.envs(set.map(|value| ("MIMALLOC_PURGE_DELAY", value)));
            String::from_utf8(child.output().expect("it runs").stdout).expect("text")
        };
        assert!(printed(None).contains("delay=60000."), "{}", printed(None));
        assert!(printed(Some("4321")).contains("delay=4321."), "{}", printed(Some("4321")));
    }
}
