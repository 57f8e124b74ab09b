//! Any bytes as a profile: decoded, or refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tier_plan_formats::profile;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = profile::decode(bytes, Path::new("fuzz.profile")) {
        assert!(!error.to_string().is_empty());
    }
});
