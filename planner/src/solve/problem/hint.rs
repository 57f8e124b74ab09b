//! Suggests changes that make an infeasible problem feasible.

use super::Problem;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::units::show_bytes;

/// Returns ways to free `missing` more bytes in a tier.
///
/// Suggests a larger budget if the tier holds that much, and a smaller KV type or a shorter context
/// if that is enough.
pub(crate) fn hint(problem: &Problem<'_>, tier: TierIdx, missing: u64) -> String {
    let mut ways = Vec::new();
    let (machine_tier, budget) = (
        &problem.machine.tiers[tier.get()],
        problem.budgets[tier.get()],
    );
    let name = &machine_tier.name;
    let needed = budget.saturating_add(missing);
    if needed <= machine_tier.capacity_bytes {
        let (missing, needed) = (show_bytes(missing), show_bytes(needed));
        ways.push(format!(
            "raise the budget of '{name}' by {missing} to {needed}"
        ));
    } else {
        let capacity = show_bytes(machine_tier.capacity_bytes);
        ways.push(format!(
            "'{name}' holds {capacity} and would need to hold {}",
            show_bytes(needed)
        ));
    }
    let cache_bytes = |kv_type: KvType, context: u32| {
        let room = CacheRoom {
            context,
            ..problem.room()
        };
        kv_type.cache_bytes(problem.shape, room)
    };
    let now = cache_bytes(problem.kv_type, problem.context);
    // The cache lies above the last tier, unless that is the only one.
    let holds_cache = tier.get() + 1 < problem.machine.tiers.len() || tier == TierIdx::FIRST;
    let is_enough = |bytes: u64| holds_cache && now.saturating_sub(bytes) >= missing;
    if problem.kv_type != KvType::Q8_0 && is_enough(cache_bytes(KvType::Q8_0, problem.context)) {
        ways.push("give --kv-type q8_0".to_string());
    }
    if is_enough(cache_bytes(problem.kv_type, 1)) {
        // Bisects for the longest context that is short enough.
        let (mut fits, mut too_long) = (1, problem.context);
        while too_long - fits > 1 {
            let middle = fits + (too_long - fits) / 2;
            if is_enough(cache_bytes(problem.kv_type, middle)) {
                fits = middle
            } else {
                too_long = middle
            }
        }
        ways.push(format!("give --context {fits}"));
    }
    ways.join(", or ")
}
