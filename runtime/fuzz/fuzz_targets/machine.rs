//! Any bytes as a machine file: decoded, or refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tier_plan_formats::machine;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = machine::decode(bytes, Path::new("fuzz.machine")) {
        assert!(!error.to_string().is_empty());
    }
});
