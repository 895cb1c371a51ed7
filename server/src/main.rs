//! The `mainstay` program.

/// A put allocates on several threads and frees on others, where the system's allocator spends a sixth of the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { mainstay_server::allocator::configure() };
    mainstay_server::cli::main()
}
