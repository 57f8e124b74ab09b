//! Any bytes as a file of slots: decoded, or refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tier_plan_formats::slots;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = slots::decode(bytes, Path::new("fuzz.json")) {
        assert!(!error.to_string().is_empty());
    }
});
