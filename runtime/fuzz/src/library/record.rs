//! Any bytes as a run record: decoded, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::record;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    if let Err(error) = record::decode(bytes, Path::new("fuzz.record")) {
        assert!(!error.to_string().is_empty());
    }
}
