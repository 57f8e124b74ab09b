//! Any bytes as a file of slots: decoded, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::slots;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    if let Err(error) = slots::decode(bytes, Path::new("fuzz.json")) {
        assert!(!error.to_string().is_empty());
    }
}
