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
        "dense_bytes": tier.bytes.dense,
        "pinned_bytes": tier.bytes.pinned,
        "slot_bytes": tier.bytes.slots,
        "kv_bytes": tier.bytes.kv,
        "staging_bytes": tier.bytes.staging,
        "home_bytes": tier.bytes.home,
    })
}
