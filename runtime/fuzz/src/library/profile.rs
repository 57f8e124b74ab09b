//! Any bytes as a profile: decoded, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::profile;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    if let Err(error) = profile::decode(bytes, Path::new("fuzz.profile")) {
        assert!(!error.to_string().is_empty());
    }
}
