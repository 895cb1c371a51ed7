//! The pages of a manifest.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    mainstay_engine::hooks::fuzz::manifest(bytes);
});
