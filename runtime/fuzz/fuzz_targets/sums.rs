//! Any bytes as a file of checksums: decoded, or refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tier_plan_formats::sums;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = sums::decode(bytes, Path::new("fuzz.sums")) {
        assert!(!error.to_string().is_empty());
    }
});
