//! Parts of `--json` output that several commands share.

use serde_json::{Value, json};
use tier_plan_runtime::formats::placement::PlanTier;

/// Returns a plan's tier with its bytes.
pub fn tier_json(tier: &PlanTier) -> Value {
    json!({
        "name": tier.tier.name,
        "emulated": tier.tier.emulated,
        "budget_bytes": tier.budget_bytes,
        "used_bytes": tier.used_bytes(),
        "dense_bytes": tier.dense_bytes,
        "pinned_bytes": tier.pinned_bytes,
        "slot_bytes": tier.slot_bytes,
        "kv_bytes": tier.kv_bytes,
        "staging_bytes": tier.staging_bytes,
        "home_bytes": tier.home_bytes,
    })
}
