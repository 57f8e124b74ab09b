//! Any bytes as a run record: decoded, or refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tier_plan_formats::record;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = record::decode(bytes, Path::new("fuzz.record")) {
        assert!(!error.to_string().is_empty());
    }
});
