//! Any bytes as a placement plan: decoded, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::placement;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    if let Err(error) = placement::decode(bytes, Path::new("fuzz.placement")) {
        assert!(!error.to_string().is_empty());
    }
}
