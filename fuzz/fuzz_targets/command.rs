//! An entry of a group's log. What decodes is encoded again, and decodes to the same.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_engine::Command;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(command) = Command::decode(&Bytes::copy_from_slice(bytes))
        && let Ok(again) = command.encode()
    {
        assert_eq!(Command::decode(&again).expect("own bytes"), command);
    }
});
