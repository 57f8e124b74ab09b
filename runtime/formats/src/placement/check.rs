//! What a plan must satisfy to be written or believed, without knowing the model it is for.

use super::{LayerPlacement, MAX_HALF_LIFE, MAX_RECENT_WEIGHT, Placement, SlotPolicy, TierIdx};
use crate::machine::{TierKind, check_tiers};
use crate::model::shape::DenseKind;
use crate::ranges::{Allowance, MAX_EXPERT, MAX_LAYER};
use crate::text::{check_amount, check_bytes};
use crate::units::show_bytes;
use std::collections::{HashMap, HashSet};

/// Most experts that staging may hold.
const MAX_STAGING: u32 = 1 << 20;

/// Says what is wrong with a plan.
pub(super) fn check(plan: &Placement) -> Result<(), String> {
    check_tiers(plan.tiers.iter().map(|t| &t.tier))?;
    for (at, tier) in plan.tiers.iter().enumerate() {
        let name = &tier.tier.name;
        let mut used = 0u64;
        for (line, bytes) in tier.lines() {
            check_bytes(&format!("{line} of tier '{name}'"), bytes)?;
            used = used
                .checked_add(bytes)
                .ok_or_else(|| format!("the lines of tier '{name}' add up to more bytes than can be counted"))?;
        }
        check_bytes(&format!("budget_bytes of tier '{name}'"), tier.budget_bytes)?;
        if used > tier.budget_bytes {
            return Err(format!(
                "the lines of tier '{name}' add up to {used} bytes ({}), but its budget_bytes is {} ({}); \
                 solve again with a larger budget",
                show_bytes(used),
                tier.budget_bytes,
                show_bytes(tier.budget_bytes)
            ));
        }
        if tier.home_bytes > 0 && at + 1 != plan.tiers.len() {
            return Err(format!("home_bytes of tier '{name}' must be 0: pooled experts live on the last tier"));
        }
    }
    check_amount("layer_overhead_us", plan.layer_overhead_us)?;
    check_amount("token_overhead_us", plan.token_overhead_us)?;
    check_working_tier(plan, plan.kv_tier, "kv_tier")?;
    check_working_tier(plan, plan.staging_tier, "the tier of staging")?;
    if plan.staging_experts > MAX_STAGING {
        return Err(format!("staging holds {} experts, but {MAX_STAGING} is the most", plan.staging_experts));
    }
    check_dense(plan)?;
    check_cache(plan)?;
    check_layers(plan)?;
    check_numbers(plan)
}

fn check_tier(plan: &Placement, tier: TierIdx, what: &str) -> Result<(), String> {
    if tier < plan.tiers.len() {
        Ok(())
    } else {
        Err(format!("{what} is tier number {tier}, but the plan has {}", plan.tiers.len()))
    }
}

/// A tier that is written to and computed on while the model runs.
fn check_working_tier(plan: &Placement, tier: TierIdx, what: &str) -> Result<(), String> {
    check_tier(plan, tier, what)?;
    let found = &plan.tiers[tier].tier;
    if found.kind == TierKind::Nvme {
        return Err(format!("{what} is '{}', a block device; choose a tier of memory", found.name));
    }
    Ok(())
}

fn check_dense(plan: &Placement) -> Result<(), String> {
    let mut seen = HashSet::new();
    for group in &plan.dense {
        let kind = group.kind;
        let whole = matches!(kind, DenseKind::Embedding | DenseKind::Head);
        match group.layer {
            None if !whole => return Err(format!("the {kind:?} group has no layer")),
            Some(layer) if whole => {
                return Err(format!("the {kind:?} group stands in layer {layer}, but has no layer"));
            }
            Some(layer) if layer > MAX_LAYER => {
                return Err(format!("the {kind:?} group of layer {layer} is past {MAX_LAYER}, the highest layer"));
            }
            _ => {}
        }
        check_tier(plan, group.tier, &format!("the tier of the {kind:?} group"))?;
        if !seen.insert((kind, group.layer)) {
            let place = group.layer.map_or(String::new(), |l| format!(" of layer {l}"));
            return Err(format!("the {kind:?} group{place} is placed twice; keep one"));
        }
    }
    Ok(())
}

/// A real GPU has what its layers remember, and nobody else's.
fn check_cache(plan: &Placement) -> Result<(), String> {
    let attention = || plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
    let on_gpu = |tier: TierIdx| plan.tiers[tier].tier.is_gpu();
    let common = &plan.tiers[plan.kv_tier].tier.name;
    if let (true, Some(group)) = (on_gpu(plan.kv_tier), attention().find(|d| !on_gpu(d.tier))) {
        return Err(format!(
            "kv_tier is '{common}', a GPU's memory, but the attention of layer {} is on '{}', and so its keys and values \
             can't be there; name a tier of memory",
            group.layer.unwrap_or_default(),
            plan.tiers[group.tier].tier.name
        ));
    }
    let has_cache = |at: TierIdx| match attention().next() {
        Some(_) => attention().any(|d| plan.cache_tier(d.tier) == at),
        None => at == plan.kv_tier,
    };
    match plan.tiers.iter().enumerate().find(|&(at, t)| t.kv_bytes > 0 && !has_cache(at)) {
        Some((_, t)) => Err(format!(
            "kv_bytes of tier '{}' must be 0: a layer's keys and values are on the GPU that has its attention, or else on \
             '{common}', the kv_tier",
            t.tier.name
        )),
        None => Ok(()),
    }
}

fn check_layers(plan: &Placement) -> Result<(), String> {
    let mut allowance = Allowance::for_a_file();
    for pair in plan.layers.windows(2) {
        if pair[0].layer >= pair[1].layer {
            return Err(format!(
                "layer {} comes after layer {}; list each layer once, in ascending order",
                pair[1].layer, pair[0].layer
            ));
        }
    }
    for layer in &plan.layers {
        if layer.layer > MAX_LAYER {
            return Err(format!("layer {} is past {MAX_LAYER}, the highest that can be named", layer.layer));
        }
        check_layer(plan, layer, &mut allowance).map_err(|what| format!("layer {}: {what}", layer.layer))?;
    }
    Ok(())
}

fn check_layer(plan: &Placement, layer: &LayerPlacement, allowance: &mut Allowance) -> Result<(), String> {
    if layer.slots > MAX_EXPERT + 1 {
        return Err(format!("{} slots, but {} is the most", layer.slots, MAX_EXPERT + 1));
    }
    if layer.slots > 0 {
        check_working_tier(plan, layer.slot_tier, "slot_tier")?;
    } else {
        check_tier(plan, layer.slot_tier, "slot_tier")?;
    }
    check_policy(layer.policy)?;
    let mut tiers = HashSet::new();
    let mut homes: HashMap<u32, TierIdx> = HashMap::new();
    for (tier, experts) in &layer.pinned {
        check_tier(plan, *tier, "a tier of pinned experts")?;
        let name = &plan.tiers[*tier].tier.name;
        if !tiers.insert(tier) {
            return Err(format!("tier '{name}' is listed twice under pinned"));
        }
        allowance.take(experts.len() as u64)?;
        if let Some(pair) = experts.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(format!("on tier '{name}', expert {} comes after expert {}", pair[1], pair[0]));
        }
        if let Some(&last) = experts.last().filter(|&&last| last > MAX_EXPERT) {
            return Err(format!("expert {last} is past {MAX_EXPERT}, the highest that can be named"));
        }
        for &expert in experts {
            if let Some(other) = homes.insert(expert, *tier) {
                let other = &plan.tiers[other].tier.name;
                return Err(format!("expert {expert} is pinned to both '{other}' and '{name}'; keep one"));
            }
        }
    }
    Ok(())
}

fn check_policy(policy: SlotPolicy) -> Result<(), String> {
    let half_life = |key: &str, tokens: u32| match tokens {
        1..=MAX_HALF_LIFE => Ok(()),
        _ => Err(format!("{key} is {tokens} tokens, but must be between 1 and {MAX_HALF_LIFE}")),
    };
    match policy {
        SlotPolicy::Lru => Ok(()),
        SlotPolicy::Lfu { half_life: tokens } => half_life("half_life", tokens),
        SlotPolicy::Adaptive { half_life: tokens, recent_half_life, recent_weight } => {
            half_life("half_life", tokens)?;
            half_life("recent_half_life", recent_half_life)?;
            if recent_weight > MAX_RECENT_WEIGHT {
                return Err(format!("recent_weight is {recent_weight}, but {MAX_RECENT_WEIGHT} is the most"));
            }
            Ok(())
        }
    }
}

fn check_numbers(plan: &Placement) -> Result<(), String> {
    let solver = &plan.solver;
    check_amount("solver.objective_s", solver.objective_s)?;
    check_amount("solver.solve_s", solver.solve_s)?;
    if let Some(bound) = solver.bound_s {
        check_amount("solver.bound_s", bound)?;
    }
    if let Some(gap) = solver.gap.filter(|gap| !gap.is_finite()) {
        return Err(format!("solver.gap is {gap}; leave it out when nothing is proven"));
    }
    if let Some(goal) = &solver.goal {
        check_amount("solver.objective_value", goal.value)?;
        check_amount("solver.objective_bound", goal.bound.unwrap_or(0.0))?;
        check_amount("solver.target_tok_s", goal.target_tok_s.unwrap_or(0.0))?;
    }
    let predicted = &plan.predicted;
    for (what, x) in [
        ("predicted.decode_tok_s", predicted.decode_tok_s),
        ("predicted.prompt_tok_s", predicted.prompt_tok_s),
        ("predicted.overhead_s", predicted.overhead_s),
        ("predicted.expert_critical_s", predicted.expert_critical_s),
        ("predicted.hit_rate", predicted.hit_rate),
        ("predicted.kv_s", predicted.kv_s),
    ] {
        check_amount(what, x)?;
    }
    for (what, parts) in [
        ("predicted.dense_s", &predicted.dense_s),
        ("predicted.expert_s", &predicted.expert_s),
        ("predicted.read_bytes", &predicted.read_bytes),
        ("predicted.prompt_gflops", &predicted.prompt_gflops),
    ] {
        if !parts.is_empty() && parts.len() != plan.tiers.len() {
            return Err(format!("{what} has {} parts, but the plan has {} tiers", parts.len(), plan.tiers.len()));
        }
        parts.iter().try_for_each(|&x| check_amount(what, x))?;
    }
    Ok(())
}
