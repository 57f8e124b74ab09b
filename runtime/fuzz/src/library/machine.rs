//! Any bytes as a machine file: decoded, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::machine;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    if let Err(error) = machine::decode(bytes, Path::new("fuzz.machine")) {
        assert!(!error.to_string().is_empty());
    }
}
