//! Why there is no plan, by how much, and the nearest change that makes one.

use super::Inputs;
use super::room::Room;
use super::wishes::Wishes;
use crate::cost::token_s;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::units::show_bytes;

/// Ways to find `missing` bytes more in a tier: a larger budget, if the tier holds that much, or a smaller cache, if that
/// is enough.
pub fn mends(inputs: &Inputs<'_>, tier: usize, missing: u64) -> String {
    let mut ways = Vec::new();
    let (of, budget) = (&inputs.machine.tiers[tier], inputs.budgets[tier]);
    let needed = budget.saturating_add(missing);
    if needed <= of.capacity_bytes {
        ways.push(format!("raise the budget of '{}' by {} to {}", of.name, show_bytes(missing), show_bytes(needed)));
    } else {
        ways.push(format!(
            "'{}' holds {} and would need to hold {}",
            of.name,
            show_bytes(of.capacity_bytes),
            show_bytes(needed)
        ));
    }
    let cache = |kv_type: KvType, context: u32| kv_type.context_bytes(inputs.shape, context);
    let now = cache(inputs.kv_type, inputs.context);
    // The cache lies above the last tier, unless that is the only one.
    let beside = tier + 1 < inputs.machine.tiers.len() || tier == 0;
    let saves = |bytes: u64| beside && now.saturating_sub(bytes) >= missing;
    if inputs.kv_type != KvType::Q8_0 && saves(cache(KvType::Q8_0, inputs.context)) {
        ways.push("give --kv-type q8_0".to_string());
    }
    if saves(cache(inputs.kv_type, 1)) {
        // The longest context that is short enough.
        let (mut fits, mut over) = (1, inputs.context);
        while over - fits > 1 {
            let middle = fits + (over - fits) / 2;
            if saves(cache(inputs.kv_type, middle)) { fits = middle } else { over = middle }
        }
        ways.push(format!("give --context {fits}"));
    }
    ways.join(", or ")
}

/// Why nothing fits although the sums do: a piece is larger than what is left of any one tier, or by hand too much was
/// fixed to one.
pub fn no_division(inputs: &Inputs<'_>, room: &Room, wishes: &Wishes) -> String {
    let left: Vec<String> =
        room.tiers.iter().zip(&room.left_bytes).map(|(t, &b)| format!("'{}' {}", t.name, show_bytes(b))).collect();
    let left = left.join(", ");
    // What lies on each tier by hand.
    let mut fixed = vec![0u64; room.tiers.len()];
    for (tier, bytes) in fixed.iter_mut().enumerate() {
        for group in &inputs.shape.dense {
            let only = (0..room.tiers.len()).all(|t| (t == tier) == wishes.allows(group.kind, group.layer, t));
            *bytes = bytes.saturating_add(if only { room.taken(group, tier)[tier] } else { 0 });
        }
        for layer in &inputs.shape.experts {
            let here = wishes.layer(layer.layer).fixed.values().filter(|&&t| t == tier).count() as u64;
            *bytes = bytes.saturating_add(here.saturating_mul(layer.expert_bytes));
        }
    }
    for (tier, &bytes) in fixed.iter().enumerate() {
        if let Some(over) = bytes.checked_sub(room.left_bytes[tier]).filter(|&over| over > 0) {
            return format!(
                "--fix puts {} on '{}', which has {} left for weights: {} too much; fix less there, or {}",
                show_bytes(bytes),
                room.tiers[tier].name,
                show_bytes(room.left_bytes[tier]),
                show_bytes(over),
                mends(inputs, tier, over)
            );
        }
    }
    let by_hand =
        if wishes.is_empty() { "" } else { " under what --fix and --forbid ask for; take some of it back, or" };
    let largest = inputs.shape.dense.iter().max_by_key(|d| d.bytes);
    let roomiest = room.computing_tiers().max_by_key(|&t| room.left_bytes[t]);
    let (Some(largest), Some(tier)) = (largest, roomiest) else {
        return format!("no way to divide the model among the tiers was found: {left} are left for weights{by_hand}");
    };
    let missing = largest.bytes.saturating_sub(room.left_bytes[tier]).max(largest.bytes / 2).max(1);
    format!(
        "no way to divide the model among the tiers was found{by_hand}: {left} are left for weights; the largest dense \
         group ({:?}{}) is {}, and groups are not cut in two; {}",
        largest.kind,
        largest.layer.map_or(String::new(), |l| format!(" of layer {l}")),
        show_bytes(largest.bytes),
        mends(inputs, room.staging_tier, missing)
    )
}

/// Why a target can't be reached, and what would help most.
pub fn target(fastest: &Placement, bound_s: f64, most_s: f64, inputs: &Inputs<'_>) -> String {
    let predicted = &fastest.predicted;
    let parts = fastest.tiers.iter().zip(predicted.dense_s.iter().zip(&predicted.expert_s));
    let slowest = parts.max_by(|a, b| (a.1.0 + a.1.1).total_cmp(&(b.1.0 + b.1.1)));
    let proven = if bound_s > most_s {
        format!("no plan of those tried is faster than {:.3} tok/s", 1.0 / bound_s)
    } else {
        "whether a faster one exists was not settled in the time given; raise --time-limit".to_string()
    };
    let help = slowest.map_or(String::new(), |(tier, (dense, expert))| {
        format!(
            "; most of its time goes to reads of '{}' ({:.1} ms of {:.1}), so raise the budgets of the tiers above it",
            tier.tier.name,
            (dense + expert) * 1e3,
            token_s(predicted) * 1e3
        )
    });
    format!(
        "no plan for '{}' on '{}' reaches {:.3} tok/s: the fastest is predicted to give {:.3}, {:.1} ms a token too slow; \
         {proven}{help}, or lower --target-tok-s",
        inputs.shape.id.name,
        inputs.machine.name,
        1.0 / most_s,
        predicted.decode_tok_s,
        (token_s(predicted) - most_s) * 1e3
    )
}
