//! A batch of the log: header, records, and what they claim of each other.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    mainstay_wal::hooks::fuzz::batch(bytes);
});
