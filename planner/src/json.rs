//! Parts of `--json` output that several commands share.

use serde_json::{Value, json};
use std::path::Path;
use tier_plan_runtime::formats::placement::PlanTier;

/// Returns a path as a string. What is no UTF-8 in it becomes `\u{fffd}`: JSON has no other way.
pub fn path_json(path: impl AsRef<Path>) -> Value {
    path.as_ref().to_string_lossy().into()
}

/// Returns a plan's tier with its bytes.
pub fn tier_json(tier: &PlanTier) -> Value {
    json!({
        "name": tier.tier.name,
        "emulated": tier.tier.emulated,
        "budget_bytes": tier.budget_bytes,
        "used_bytes": tier.used_bytes(),
        "dense_bytes": tier.bytes.dense,
        "pinned_bytes": tier.bytes.pinned,
        "slot_bytes": tier.bytes.slots,
        "kv_bytes": tier.bytes.kv,
        "staging_bytes": tier.bytes.staging,
        "home_bytes": tier.bytes.home,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(unix)]
    fn any_path_is_a_string() {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::OsStr::from_bytes(b"a\xff.toml");
        assert_eq!(super::path_json(path), "a\u{fffd}.toml");
    }
}
