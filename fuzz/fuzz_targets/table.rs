//! A table by its own footer, and each of its parts alone.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    mainstay_engine::hooks::fuzz::table(bytes);
    mainstay_engine::hooks::fuzz::table_parts(bytes);
});
