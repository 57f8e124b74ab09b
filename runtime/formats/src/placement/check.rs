//! What a plan must satisfy to be written or believed, without knowing the model it is for.
//!
//! Stops at the first violation: a hostile file could break more rules than fit in memory.

use super::{
    HomeReads, LayerPlacement, MAX_HALF_LIFE, MAX_RECENT_WEIGHT, Pins, Placement, PlanTier,
    SlotPolicy, Streaming, TierIdx, Violation,
};
use crate::machine::{GBPS, Medium, TierKind, check_tiers};
use crate::model::shape::DenseKind;
use crate::ranges::{Allowance, MAX_EXPERT, MAX_LAYER};
use crate::text::{check_amount, check_bytes, check_rate};
use std::collections::{HashMap, HashSet};

/// Most experts that the staging buffers may hold.
const MAX_STAGING_EXPERTS: u32 = 1 << 20;

/// Returns the first rule that a plan breaks.
pub(super) fn check(plan: &Placement) -> Result<(), Violation> {
    check_tiers(plan.tiers.iter().map(|t| &t.tier)).map_err(Violation::Tiers)?;
    plan.tiers
        .enumerate()
        .try_for_each(|(index, tier)| check_bytes_of(plan, index, tier))?;
    check_amount("layer_overhead_us", plan.layer_overhead_us)?;
    check_amount("token_overhead_us", plan.token_overhead_us)?;
    check_working_tier(plan, plan.kv_tier, "kv_tier")?;
    check_working_tier(plan, plan.staging_tier, "the tier of staging")?;
    if plan.staging_experts > MAX_STAGING_EXPERTS {
        return Err(Violation::StagingTooLarge {
            found: plan.staging_experts,
            max: MAX_STAGING_EXPERTS,
        });
    }
    if plan.window_chunk == Some(0) {
        return Err(Violation::WindowChunk);
    }
    check_reads(plan)?;
    check_streaming(plan)?;
    check_dense(plan)?;
    check_cache(plan)?;
    check_host_kv(plan)?;
    check_layers(plan)?;
    check_numbers(plan)
}

/// Checks what is said of reads from the last tier.
fn check_reads(plan: &Placement) -> Result<(), Violation> {
    let HomeReads { io, copies } = &plan.reads;
    let is_drive = plan.tiers.last().is_some_and(|t| t.tier.is_drive());
    if (io.is_some() || !copies.is_empty()) && !is_drive {
        return Err(Violation::ReadsWithoutDrive);
    }
    Ok(crate::copies::check(copies)?)
}

/// Checks where experts are streamed from, and to, and how fast.
pub(super) fn check_streaming(plan: &Placement) -> Result<(), Violation> {
    let Some(Streaming {
        tier,
        from,
        experts,
        link_gbps,
        cpu_share,
    }) = plan.streaming
    else {
        return Ok(());
    };
    check_tier(plan, tier, "streaming.tier")?;
    check_tier(plan, from, "streaming.from")?;
    let [to, source] = [tier, from].map(|tier| &plan.tiers[tier].tier);
    if !to.is_gpu() {
        return Err(Violation::StreamsToNoGpu {
            tier: to.name.clone(),
        });
    }
    if source.kind != TierKind::Dram || source.emulated {
        return Err(Violation::StreamsFromElsewhere {
            from: source.name.clone(),
        });
    }
    if experts == 0 || experts > MAX_EXPERT + 1 {
        return Err(Violation::StreamedExperts {
            found: experts,
            max: MAX_EXPERT + 1,
        });
    }
    check_rate("streaming.link_gbps", link_gbps, GBPS)?;
    if !(cpu_share > 0.0 && cpu_share <= 1.0) {
        return Err(Violation::CpuShare { found: cpu_share });
    }
    Ok(())
}

/// Checks the sums of one tier against its budget.
fn check_bytes_of(plan: &Placement, index: TierIdx, tier: &PlanTier) -> Result<(), Violation> {
    let name = &tier.tier.name;
    let mut used = 0u64;
    for (line, bytes) in tier.bytes.lines() {
        check_bytes(&format!("{line} of tier '{name}'"), bytes)?;
        used = used
            .checked_add(bytes)
            .ok_or_else(|| Violation::Uncountable { tier: name.clone() })?;
    }
    check_bytes(&format!("budget_bytes of tier '{name}'"), tier.budget_bytes)?;
    if used > tier.budget_bytes {
        return Err(Violation::OverBudget {
            tier: name.clone(),
            used,
            budget: tier.budget_bytes,
        });
    }
    if tier.bytes.home > 0 && index != plan.home_tier() {
        return Err(Violation::HomeNotLast { tier: name.clone() });
    }
    Ok(())
}

fn check_tier(plan: &Placement, tier: TierIdx, what: &str) -> Result<(), Violation> {
    if plan.tiers.get(tier).is_some() {
        Ok(())
    } else {
        Err(Violation::tier_number(plan, what, tier))
    }
}

/// Checks that a tier can be written to and computed on while the model runs.
fn check_working_tier(plan: &Placement, tier: TierIdx, what: &str) -> Result<(), Violation> {
    check_tier(plan, tier, what)?;
    let tier = &plan.tiers[tier].tier;
    match tier.medium() {
        Medium::Drive => Err(Violation::WorksOnDrive {
            what: what.into(),
            tier: tier.name.clone(),
        }),
        Medium::Gpu | Medium::Addressable => Ok(()),
    }
}

fn check_dense(plan: &Placement) -> Result<(), Violation> {
    let mut seen = HashSet::new();
    for group in &plan.dense {
        let kind = group.kind;
        let of_no_layer = kind.is_of_model();
        match group.layer {
            None if !of_no_layer => return Err(Violation::GroupWithoutLayer { kind }),
            Some(layer) if of_no_layer => return Err(Violation::GroupInLayer { kind, layer }),
            Some(layer) if layer > MAX_LAYER => {
                return Err(Violation::GroupPastEnd {
                    kind,
                    layer,
                    max: MAX_LAYER,
                });
            }
            _ => {}
        }
        check_tier(plan, group.tier, &format!("the tier of the {kind} group"))?;
        if !seen.insert((kind, group.layer)) {
            return Err(Violation::GroupTwice {
                kind,
                layer: group.layer,
            });
        }
    }
    Ok(())
}

/// Checks that a real GPU has the KV cache of its own layers, and of no others.
fn check_cache(plan: &Placement) -> Result<(), Violation> {
    let attention = || plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
    let on_gpu = |tier: TierIdx| plan.tiers[tier].tier.is_gpu();
    let kv_tier = || plan.tiers[plan.kv_tier].tier.name.clone();
    if let (true, Some(group)) = (on_gpu(plan.kv_tier), attention().find(|d| !on_gpu(d.tier))) {
        return Err(Violation::CacheOnGpu {
            kv_tier: kv_tier(),
            layer: group.layer.unwrap_or_default(),
            attention_tier: plan.tiers[group.tier].tier.name.clone(),
        });
    }
    let has_cache = |tier: TierIdx| match attention().next() {
        Some(_) => attention().any(|d| plan.cache_tier(d) == tier),
        None => tier == plan.kv_tier,
    };
    match plan
        .tiers
        .enumerate()
        .find(|&(index, t)| t.bytes.kv > 0 && !has_cache(index))
    {
        Some((_, t)) => Err(Violation::CacheElsewhere {
            tier: t.tier.name.clone(),
            kv_tier: kv_tier(),
        }),
        None => Ok(()),
    }
}

/// Checks that each layer whose KV cache is kept off a GPU has its attention on one, and that the
/// cache is elsewhere.
pub(super) fn check_host_kv(plan: &Placement) -> Result<(), Violation> {
    let Some(&first) = plan.host_kv.first() else {
        return Ok(());
    };
    if let Some(pair) = plan.host_kv.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(Violation::HostKvOrder {
            first: pair[0],
            second: pair[1],
        });
    }
    let kv_tier = plan.tiers.get(plan.kv_tier).map(|t| &t.tier);
    if let Some(tier) = kv_tier.filter(|tier| tier.is_gpu()) {
        return Err(Violation::HostKvOnGpu {
            layer: first,
            kv_tier: tier.name.clone(),
        });
    }
    let on_gpu = |layer: u32| {
        let mut attention = plan.dense.iter();
        attention.any(|d| {
            let tier = plan.tiers.get(d.tier);
            (d.kind, d.layer) == (DenseKind::Attention, Some(layer))
                && tier.is_some_and(|t| t.tier.is_gpu())
        })
    };
    match plan.host_kv.iter().find(|layer| !on_gpu(**layer)) {
        Some(&layer) => Err(Violation::HostKvWithoutGpu { layer }),
        None => Ok(()),
    }
}

fn check_layers(plan: &Placement) -> Result<(), Violation> {
    let mut allowance = Allowance::for_a_file();
    for pair in plan.layers.windows(2) {
        let [first, second] = [pair[0].layer, pair[1].layer];
        if first >= second {
            return Err(Violation::LayerOrder { first, second });
        }
    }
    for placed in &plan.layers {
        let layer = placed.layer;
        if layer > MAX_LAYER {
            return Err(Violation::LayerPastEnd {
                layer,
                max: MAX_LAYER,
            });
        }
        check_layer(plan, placed, &mut allowance).map_err(|violation| violation.in_layer(layer))?;
    }
    Ok(())
}

fn check_layer(
    plan: &Placement,
    layer: &LayerPlacement,
    allowance: &mut Allowance,
) -> Result<(), Violation> {
    if layer.slots > MAX_EXPERT + 1 {
        return Err(Violation::TooManySlots {
            slots: layer.slots,
            max: MAX_EXPERT + 1,
        });
    }
    if layer.slots > 0 {
        check_working_tier(plan, layer.slot_tier, "slot_tier")?;
    } else {
        check_tier(plan, layer.slot_tier, "slot_tier")?;
    }
    check_policy(layer.policy)?;
    let mut tiers = HashSet::new();
    let mut homes: HashMap<u32, TierIdx> = HashMap::new();
    for Pins { tier, experts } in &layer.pinned {
        check_tier(plan, *tier, "a tier of pinned experts")?;
        let name = || plan.tiers[*tier].tier.name.clone();
        if !tiers.insert(tier) {
            return Err(Violation::PinTierTwice { tier: name() });
        }
        allowance
            .take(experts.len() as u64)
            .map_err(Violation::TooLong)?;
        if let Some(pair) = experts.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(Violation::PinOrder {
                tier: name(),
                first: pair[0],
                second: pair[1],
            });
        }
        if let Some(&expert) = experts.last().filter(|&&last| last > MAX_EXPERT) {
            return Err(Violation::ExpertPastEnd {
                expert,
                max: MAX_EXPERT,
            });
        }
        for &expert in experts {
            if let Some(other) = homes.insert(expert, *tier) {
                let first = plan.tiers[other].tier.name.clone();
                return Err(Violation::PinnedTwice {
                    expert,
                    first,
                    second: name(),
                });
            }
        }
    }
    Ok(())
}

fn check_policy(policy: SlotPolicy) -> Result<(), Violation> {
    let half_life = |key: &'static str, tokens: u32| match tokens {
        1..=MAX_HALF_LIFE => Ok(()),
        _ => Err(Violation::HalfLife {
            key,
            tokens,
            max: MAX_HALF_LIFE,
        }),
    };
    match policy {
        SlotPolicy::Lru => Ok(()),
        SlotPolicy::Lfu { half_life: tokens } => half_life("half_life", tokens),
        SlotPolicy::Adaptive {
            half_life: tokens,
            recent_half_life,
            recent_weight,
        } => {
            half_life("half_life", tokens)?;
            half_life("recent_half_life", recent_half_life)?;
            if recent_weight > MAX_RECENT_WEIGHT {
                return Err(Violation::RecentWeight {
                    found: recent_weight,
                    max: MAX_RECENT_WEIGHT,
                });
            }
            Ok(())
        }
    }
}

fn check_numbers(plan: &Placement) -> Result<(), Violation> {
    let solver = &plan.solver;
    check_amount("solver.objective_s", solver.objective_s)?;
    check_amount("solver.solve_s", solver.solve_s)?;
    if let Some(bound) = solver.bound_s {
        check_amount("solver.bound_s", bound)?;
    }
    if let Some(gap) = solver.gap.filter(|gap| !gap.is_finite()) {
        return Err(Violation::Gap(gap));
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
        ("predicted.few_gflops", &predicted.few_gflops),
    ] {
        if !parts.is_empty() && parts.len() != plan.tiers.len() {
            return Err(Violation::Parts {
                what,
                found: parts.len(),
                n_tiers: plan.tiers.len(),
            });
        }
        parts.iter().try_for_each(|&x| check_amount(what, x))?;
    }
    Ok(())
}
