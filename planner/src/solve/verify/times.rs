//! How fast a plan is, token by token, with no arithmetic of the cost model but where no token is known.

use super::cache_tier;
use crate::cost::{self, ExpertStage};
use crate::profile::replay::Event;
use crate::profile::{Evidence, Judged, LayerEvidence};
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{
    ATTENTION_OF_A_TOKEN, LayerPlacement, PerTier, Pins, Placement, SlotPolicy, TierIdx,
};
use tier_plan_runtime::gpu::fully_on_gpu;
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// Relative difference of times that is rounding.
const TIME_TOLERANCE: f64 = 1e-9;

/// Least accuracy of predictions at which the engine prefetches.
const MIN_PREFETCH_ACCURACY: f64 = 0.5;

/// Compares the times that a plan predicts with a replay, and its bound with both.
pub(super) fn verify_times(
    plan: &Placement,
    shape: &ModelShape,
    evidence: &Evidence,
    wrong: &mut Vec<String>,
) {
    let seconds = token_s(plan, shape, evidence);
    let differs = |said: f64| ((said - seconds) / seconds).abs() > TIME_TOLERANCE || said.is_nan();
    let predicted = plan.predicted.decode_tok_s;
    if differs(1.0 / predicted) {
        wrong.push(format!(
            "the plan predicts {predicted} tok/s, but a replay gives {}",
            1.0 / seconds
        ));
    }
    if differs(plan.solver.objective_s) {
        wrong.push(format!(
            "the plan's objective is {} s, but a replay gives {seconds} s",
            plan.solver.objective_s
        ));
    }
    let Some(bound) = plan.solver.bound_s else {
        return;
    };
    // A bound is over pins and slots with LRU; another policy may be faster than that.
    let mut with_lru = plan.clone();
    with_lru
        .layers
        .iter_mut()
        .for_each(|layer| layer.policy = SlotPolicy::Lru);
    let bounded = if with_lru.layers == plan.layers {
        seconds
    } else {
        token_s(&with_lru, shape, evidence)
    };
    if bound > bounded * (1.0 + TIME_TOLERANCE) {
        wrong.push("the plan is better than its proven bound".to_string());
    }
}

/// Returns the seconds of a decoded token, token by token as [`crate::cost`] states the charges.
pub fn token_s(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> f64 {
    let plan = &with_fixed_times(plan, shape);
    let mut total =
        1e-6 * (plan.token_overhead_us + f64::from(shape.n_layer) * plan.layer_overhead_us);
    for dense in &plan.dense {
        if dense.kind == DenseKind::Attention {
            // A second trip where the CPU attends to the cache between the GPU's matrices.
            let apart = dense.layer.is_some_and(|l| plan.host_kv.contains(&l));
            total += if apart { 2e-6 } else { 1e-6 }
                * plan.tiers[dense.tier]
                    .tier
                    .accelerator
                    .layer_us
                    .unwrap_or(0.0);
        }
        for group in shape
            .dense
            .iter()
            .filter(|g| (g.kind, g.layer) == (dense.kind, dense.layer))
        {
            let tier = &plan.tiers[dense.tier].tier;
            total += group.token_bytes as f64 / (tier.read_gbps * 1e9);
            if group.kind == DenseKind::TokenTable && tier.kind == TierKind::Nvme {
                total += 1e-6 * tier.latency_us;
            }
        }
    }
    total += caches_s(plan, shape);
    // Layers of which the same is known, placed alike, take as long.
    let mut known: Vec<(&LayerPlacement, &LayerEvidence, f64)> = Vec::new();
    let streams = |layer: u32| plan.streaming.is_some() && runs_on_gpus(shape, layer);
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let is_same = |(placed, of, _): &&(&LayerPlacement, &LayerEvidence, f64)| {
            let placed = LayerPlacement {
                layer: layer.layer,
                ..(*placed).clone()
            };
            let streamed_alike = streams(evidence.shape.layer) == streams(of.shape.layer);
            evidence.is_like(of) && placed == *layer && streamed_alike
        };
        if let Some((.., seconds)) = known.iter().find(is_same) {
            total += seconds;
            continue;
        }
        let seconds = match &evidence.judged {
            Judged::Recorded(_) => stepped_s(plan, shape, layer, evidence),
            Judged::Uniform => {
                let tiers: PerTier<_> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
                let stage = ExpertStage::of_plan(plan, shape, &tiers, evidence);
                let found = cost::outcomes(layer, evidence, &tiers, plan.staging_tier);
                cost::stage_mean_s(&stage, &found, layer.brought_to(plan.staging_tier))
            }
        };
        known.push((layer, evidence, seconds));
        total += seconds;
    }
    total
}

/// Returns the plan with the fixed times that hold for it.
///
/// Where all of the model is fully on one GPU, its layers have their own, and launches do not wait.
fn with_fixed_times(plan: &Placement, shape: &ModelShape) -> Placement {
    let mut plan = plan.clone();
    if let Some(tier) = fully_on_gpu(&plan, shape)
        && let Some(layer_us) = plan.tiers[tier].tier.accelerator.resident_layer_us
    {
        plan.layer_overhead_us = layer_us;
        let tier = &mut plan.tiers[tier].tier;
        (tier.latency_us, tier.accelerator.layer_us) = (0.0, None);
    }
    plan
}

/// Returns the seconds of a decoded token's attention to the KV caches.
fn caches_s(plan: &Placement, shape: &ModelShape) -> f64 {
    let position = plan.predicted.at;
    if position == 0 {
        return 0.0;
    }
    let mut total = 0.0;
    for (layer, cache) in shape.caches.iter().enumerate() {
        let (mut bytes, mut values) = (2.0 * cache.state_bytes as f64, 0.0);
        for rows in &cache.rows {
            let most = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
            let reach = most(rows.window).min(most(rows.chosen));
            let seen = reach.min(position.into()).div_ceil(rows.every) * rows.per_token;
            let readers = cache.more_readers + 1;
            bytes += (plan.kv_type.row_bytes(rows.width) * seen * readers) as f64;
            values += (rows.width * rows.queries * seen) as f64;
        }
        let tier_idx = cache_tier(plan, layer);
        let tier = &plan.tiers[tier_idx].tier;
        let mut seconds = bytes / (tier.read_gbps * 1e9);
        match plan.predicted.prompt_gflops.get(tier_idx) {
            Some(&rate) if rate > 0.0 && !tier.emulated => {
                seconds = seconds.max(2.0 * values / (ATTENTION_OF_A_TOKEN * rate * 1e9));
            }
            _ => {}
        }
        total += seconds;
    }
    total
}

/// Experts of one token: those that compute on each tier, and those that are transferred.
struct TokenExperts {
    on_tier: PerTier<u64>,
    missed: u64,
}

/// Whether GPUs can run the experts of a layer.
fn runs_on_gpus(shape: &ModelShape, layer: u32) -> bool {
    let mut cpu_only = shape.cpu_only.iter();
    !cpu_only.any(|only| only.is(Part::Experts, Some(layer)))
}

/// Returns the mean seconds of a layer's expert stage, by stepping its slot cache.
fn stepped_s(
    plan: &Placement,
    shape: &ModelShape,
    layer: &LayerPlacement,
    evidence: &LayerEvidence,
) -> f64 {
    let Judged::Recorded(trace) = &evidence.judged else {
        return 0.0;
    };
    let home = plan.home_tier();
    let in_place = plan.tiers[home].tier.kind != TierKind::Nvme;
    let mut pinned_on = vec![None; evidence.shape.n_expert as usize];
    for Pins { tier, experts } in &layer.pinned {
        experts
            .iter()
            .for_each(|&e| pinned_on[e as usize] = Some(*tier));
    }
    let mut cache = SlotCache::new(evidence.shape.n_expert, layer.slots, layer.policy);
    let (mut accesses, mut sum, mut tokens) = (Vec::new(), 0.0, 0u64);
    let runs_on_gpus = runs_on_gpus(shape, layer.layer);
    let prefetched_s = prefetched_s(plan, evidence);
    for event in trace.events() {
        let pooled = |chosen: &[u16]| -> Vec<u32> {
            let chosen = chosen.iter().map(|&e| e.into());
            chosen
                .filter(|&e: &u32| pinned_on[e as usize].is_none())
                .collect()
        };
        let chosen = match event {
            Event::Prompt { tokens, touched } => {
                let tokens = tokens.chunks_exact(trace.n_used());
                tokens.for_each(|token| cache.note(pooled(token).into_iter()));
                cache.settle(&pooled(touched), &mut accesses);
                continue;
            }
            Event::Token(chosen) => chosen,
        };
        cache.step(&pooled(chosen), &mut accesses);
        let mut experts = TokenExperts {
            on_tier: PerTier::from_fn(plan.tiers.len(), |_| 0),
            missed: 0,
        };
        let pins = chosen.iter().filter_map(|&e| pinned_on[usize::from(e)]);
        pins.for_each(|tier: TierIdx| experts.on_tier[tier] += 1);
        for access in &accesses {
            let (tier, is_missed) = match access {
                Access::Hit { .. } => (layer.slot_tier, false),
                Access::Fill { .. } => (layer.slot_tier, true),
                Access::Staged if in_place => (home, false),
                Access::Staged => (plan.staging_tier, true),
            };
            experts.on_tier[tier] += 1;
            experts.missed += u64::from(is_missed);
        }
        let mut seconds = longest_path_s(plan, layer, evidence, &experts, prefetched_s);
        if experts.missed == 0 && runs_on_gpus {
            seconds = seconds.min(streamed_s(plan, evidence, &experts));
        }
        sum += seconds;
        tokens += 1;
    }
    sum / tokens.max(1) as f64
}

/// Returns the seconds of transfers that prefetching hides behind the dense stage.
///
/// One expert is read while the dense stage before computes, if predictions are good. Experts that
/// the token chooses are all read then.
fn prefetched_s(plan: &Placement, evidence: &LayerEvidence) -> f64 {
    let home = plan.home_tier();
    let last = &plan.tiers[home].tier;
    let prefetch = evidence.prefetch;
    if last.kind != TierKind::Nvme || plan.tiers.len() < 2 {
        return 0.0;
    }
    let dense_s = prefetch.dense_bytes as f64 / (plan.tiers[TierIdx::FIRST].tier.read_gbps * 1e9);
    if evidence.shape.by_token {
        return dense_s;
    }
    if last.emulated || prefetch.accuracy < MIN_PREFETCH_ACCURACY {
        return 0.0;
    }
    let expert_s = evidence.shape.expert_bytes as f64 / (last.read_gbps * 1e9);
    prefetch.accuracy.min(1.0) * dense_s.min(expert_s)
}

/// Returns the seconds of the longest of the paths that overlap.
///
/// They are every tier that computes, and the transfers from the last one.
fn longest_path_s(
    plan: &Placement,
    layer: &LayerPlacement,
    evidence: &LayerEvidence,
    experts: &TokenExperts,
    prefetched_s: f64,
) -> f64 {
    let home = plan.home_tier();
    let missed = experts.missed;
    let expert_bytes = evidence.shape.expert_bytes as f64;
    let read_s =
        |tier: TierIdx, n: u64| n as f64 * expert_bytes / (plan.tiers[tier].tier.read_gbps * 1e9);
    let latency_s = |tier: TierIdx| plan.tiers[tier].tier.latency_us * 1e-6;
    // Transfers over a link that is slower than the reads take as long as on the link.
    let to = if layer.slots > 0 {
        layer.slot_tier
    } else {
        plan.staging_tier
    };
    let link_gbps = plan.tiers[to].tier.accelerator.link_gbps;
    let link_s = link_gbps.map_or(0.0, |gbps| missed as f64 * expert_bytes / (gbps * 1e9));
    let mut longest = if missed > 0 {
        (latency_s(home) + read_s(home, missed).max(link_s) - prefetched_s).max(0.0)
    } else {
        0.0
    };
    for (tier, &n) in experts.on_tier.enumerate().filter(|(_, n)| **n > 0) {
        let is_vram = plan.tiers[tier].tier.kind == TierKind::Vram;
        let launch_s = if is_vram { latency_s(tier) } else { 0.0 };
        longest = longest.max(launch_s + read_s(tier, n));
    }
    longest
}

/// Returns the seconds of a token's experts where at least one is streamed, in the best way;
/// infinity where none can be.
fn streamed_s(plan: &Placement, evidence: &LayerEvidence, experts: &TokenExperts) -> f64 {
    let Some(streaming) = &plan.streaming else {
        return f64::INFINITY;
    };
    let bytes = evidence.shape.expert_bytes as f64;
    let seconds = |n: u64, gbps: f64| n as f64 * bytes / (gbps * 1e9);
    let [in_memory, own] = [streaming.from, streaming.tier].map(|tier| experts.on_tier[tier]);
    let gpu = &plan.tiers[streaming.tier].tier;
    let memory_gbps = plan.tiers[streaming.from].tier.read_gbps;
    let mut others = 0.0_f64;
    for (tier, &n) in experts.on_tier.enumerate() {
        let rates = &plan.tiers[tier].tier;
        if n > 0 && tier != streaming.from && tier != streaming.tier {
            let is_vram = rates.kind == TierKind::Vram;
            let launch_s = if is_vram {
                1e-6 * rates.latency_us
            } else {
                0.0
            };
            others = others.max(launch_s + seconds(n, rates.read_gbps));
        }
    }
    let mut least = f64::INFINITY;
    for n in 1..=in_memory.min(streaming.experts.into()) {
        let arrived_s = seconds(n, streaming.link_gbps).max(seconds(own, gpu.read_gbps));
        let on_gpu = 1e-6 * gpu.latency_us + arrived_s + seconds(n, gpu.read_gbps);
        let on_cpu = seconds(in_memory - n, memory_gbps * streaming.cpu_share);
        least = least.min(others.max(on_gpu).max(on_cpu));
    }
    least
}
