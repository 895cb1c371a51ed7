//! The same work on Mainstay and on its peers, in one process run, as ratios.
//!
//! Absolute numbers depend on the machine and on what else it does; the ratio of two numbers taken in one run, in turns, is
//! what is worth comparing. `cargo run --release --features peers --bin versus` prints it for stores, and with `--bin versus_log`
//! for the log by itself.

pub mod log;
pub mod peers;
pub mod served;
pub mod work;
