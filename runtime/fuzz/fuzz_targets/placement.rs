//! Any bytes as a placement plan: decoded, or refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tier_plan_formats::placement;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = placement::decode(bytes, Path::new("fuzz.placement")) {
        assert!(!error.to_string().is_empty());
    }
});
