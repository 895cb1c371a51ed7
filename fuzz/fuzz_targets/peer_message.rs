//! What a peer sends, and the records of its log.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    mainstay_replication::fuzzing::decode_all(&bytes::Bytes::copy_from_slice(bytes));
});
