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
    let bytes_of = |room: CacheRoom| problem.kv_type.cache_bytes(problem.shape, room);
    let with_context = |context: u32| {
        bytes_of(CacheRoom {
            context,
            ..problem.room()
        })
    };
    let with_texts = |sequences: u32| {
        bytes_of(CacheRoom {
            sequences,
            ..problem.room()
        })
    };
    let now = bytes_of(problem.room());
    // The cache lies above the last tier, unless that is the only one.
    let holds_cache = tier.get() + 1 < problem.machine.tiers.len() || tier == TierIdx::FIRST;
    let is_enough = |bytes: u64| holds_cache && now.saturating_sub(bytes) >= missing;
    let q8_0 = KvType::Q8_0.cache_bytes(problem.shape, problem.room());
    if problem.kv_type != KvType::Q8_0 && is_enough(q8_0) {
        ways.push("give --kv-type q8_0".to_string());
    }
    if let Some(context) = most(problem.context, |context| is_enough(with_context(context))) {
        ways.push(format!("give --context {context}"));
    }
    if let Some(texts) = most(problem.sequences, |texts| is_enough(with_texts(texts))) {
        ways.push(format!("plan for {texts} texts at once"));
    }
    ways.join(", or ")
}

/// Returns the largest number from 1 to below `too_many` that is small enough, by bisection.
fn most(too_many: u32, is_enough: impl Fn(u32) -> bool) -> Option<u32> {
    if too_many < 2 || !is_enough(1) {
        return None;
    }
    let (mut fits, mut too_many) = (1, too_many);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        if is_enough(middle) {
            fits = middle
        } else {
            too_many = middle
        }
    }
    Some(fits)
}
