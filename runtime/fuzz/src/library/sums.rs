//! Any bytes as a file of checksums: decoded, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::sums;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    if let Err(error) = sums::decode(bytes, Path::new("fuzz.sums")) {
        assert!(!error.to_string().is_empty());
    }
}
