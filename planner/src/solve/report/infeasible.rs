//! Explains why there is no plan: by how much it misses, and the nearest change that makes one.

use crate::cost::token_s;
use crate::printable::printable;
use crate::solve::problem::Problem;
use crate::solve::problem::capacity::Capacity;
use crate::solve::problem::constraints::Constraints;
use crate::solve::problem::hint;
use tier_plan_runtime::formats::placement::{PerTier, Placement};
use tier_plan_runtime::units::show_bytes;

/// Explains why nothing fits although the sums do.
///
/// A dense group is larger than what is left of any one tier, or too much was fixed to one by hand.
pub fn no_division(
    problem: &Problem<'_>,
    capacity: &Capacity,
    constraints: &Constraints,
) -> String {
    let left: Vec<String> = capacity
        .tiers
        .iter()
        .zip(&capacity.left_bytes)
        .map(|(t, &b)| format!("'{}' {}", printable(&t.name), show_bytes(b)))
        .collect();
    let left = left.join(", ");
    // Bytes fixed to each tier by hand.
    let mut fixed = PerTier::from_fn(capacity.tiers.len(), |_| 0u64);
    for (tier, bytes) in capacity.tiers.indices().zip(&mut fixed) {
        for group in &problem.shape.dense {
            let only = capacity
                .tiers
                .indices()
                .all(|t| (t == tier) == constraints.allows(group.kind, group.layer, t));
            // Attention may leave its KV cache elsewhere.
            let places = capacity.dense_places(group).filter(|p| p.tier == tier);
            let least = places.map(|place| capacity.taken(group, place)[tier.get()]);
            let least = least.min().unwrap_or(group.bytes);
            *bytes = bytes.saturating_add(if only { least } else { 0 });
        }
        for layer in &problem.shape.experts {
            let here = constraints
                .layer(layer.layer)
                .fixed
                .values()
                .filter(|&&t| t == tier)
                .count() as u64;
            *bytes = bytes.saturating_add(here.saturating_mul(layer.expert_bytes));
        }
    }
    for (tier, &bytes) in fixed.enumerate() {
        if let Some(over) = bytes
            .checked_sub(capacity.left_bytes[tier.get()])
            .filter(|&over| over > 0)
        {
            return format!(
                "--fix puts {} on '{}', which has {} left for weights: {} too much; fix less there, or {}",
                show_bytes(bytes),
                printable(&capacity.tiers[tier].name),
                show_bytes(capacity.left_bytes[tier.get()]),
                show_bytes(over),
                hint(problem, tier, over)
            );
        }
    }
    let by_hand = if constraints.is_empty() {
        ""
    } else {
        " under what --fix and --forbid ask for; take some of it back, or"
    };
    let largest = problem.shape.dense.iter().max_by_key(|d| d.bytes);
    let roomiest = capacity
        .computing_tiers()
        .max_by_key(|&t| capacity.left_bytes[t.get()]);
    let (Some(largest), Some(tier)) = (largest, roomiest) else {
        return format!(
            "no way to divide the model among the tiers was found: {left} are left for weights{by_hand}"
        );
    };
    let missing = largest
        .bytes
        .saturating_sub(capacity.left_bytes[tier.get()])
        .max(largest.bytes / 2)
        .max(1);
    format!(
        "no way to divide the model among the tiers was found{by_hand}: {left} are left for weights; the largest dense \
         group ({}{}) is {}, and groups are not cut in two; {}",
        largest.kind,
        largest
            .layer
            .map_or(String::new(), |l| format!(" of layer {l}")),
        show_bytes(largest.bytes),
        hint(problem, capacity.staging_tier, missing)
    )
}

/// Explains why a target cannot be reached, and what would help most.
///
/// `max_s` are the seconds per token that the target allows.
pub fn target(fastest: &Placement, bound_s: f64, max_s: f64, problem: &Problem<'_>) -> String {
    let predicted = &fastest.predicted;
    let parts = fastest
        .tiers
        .iter()
        .zip(predicted.dense_s.iter().zip(&predicted.expert_s));
    let slowest = parts.max_by(|a, b| (a.1.0 + a.1.1).total_cmp(&(b.1.0 + b.1.1)));
    let proven = if bound_s > max_s {
        format!(
            "no plan of those tried is faster than {:.3} tok/s",
            1.0 / bound_s
        )
    } else {
        "whether a faster one exists was not settled in the time given; raise --time-limit"
            .to_string()
    };
    let help = slowest.map_or(String::new(), |(tier, (dense, expert))| {
        format!(
            "; most of its time goes to reads of '{}' ({:.1} ms of {:.1}), so raise the budgets of the tiers above it",
            printable(&tier.tier.name),
            (dense + expert) * 1e3,
            token_s(predicted) * 1e3
        )
    });
    format!(
        "no plan for '{}' on '{}' reaches {:.3} tok/s: the fastest is predicted to give {:.3}, {:.1} ms per token too slow; \
         {proven}{help}, or lower --target-tok-s",
        printable(&problem.shape.id.name),
        printable(&problem.machine.name),
        1.0 / max_s,
        predicted.decode_tok_s,
        (token_s(predicted) - max_s) * 1e3
    )
}
