//! Re-checks a plan with no solver in it: what lies where, how many bytes that is, and how fast it should be.
//!
//! It shares no arithmetic with what made the plan. Bytes are added up from the shape line by line, and the time is
//! found by stepping the engine's own slot cache through every judged token.

use crate::profile::{Evidence, Judged, LayerEvidence};
use crate::replay::Event;
use std::collections::BTreeMap;
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{
    ATTENTION_OF_A_TOKEN, DensePlacement, LayerPlacement, Placement, PlanTier, SlotPolicy, TierIdx,
};
use tier_plan_runtime::gpu::fully_on_gpu;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};
use tier_plan_runtime::units::show_bytes;

/// Relative difference of times that rounding explains.
const TOLERANCE: f64 = 1e-9;

/// What is wrong with a plan, in sentences; nothing if it holds.
pub fn check(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Vec<String> {
    let mut wrong = Vec::new();
    if plan.model.hash != shape.id.hash {
        wrong.push(format!("the plan is for model '{}', not '{}'", plan.model.name, shape.id.name));
    }
    if plan.tiers.is_empty() {
        wrong.push("the plan has no tiers".to_string());
        return wrong;
    }
    let bytes = lines(plan, shape, &mut wrong);
    if wrong.is_empty() {
        sums(plan, &bytes, &mut wrong);
        times(plan, shape, evidence, &mut wrong);
    }
    wrong
}

/// `[tiers]` bytes by line: dense, pinned, slots, cache, staging, home.
type Lines = Vec<[u128; 6]>;

const LINE_NAMES: [&str; 6] = ["dense", "pinned", "slot", "kv", "staging", "home"];

fn lines(plan: &Placement, shape: &ModelShape, wrong: &mut Vec<String>) -> Lines {
    let n = plan.tiers.len();
    let mut lines = vec![[0u128; 6]; n];
    let computes = |tier: usize| plan.tiers[tier].tier.kind != TierKind::Nvme;

    let mut placed: BTreeMap<_, u32> = BTreeMap::new();
    for dense in &plan.dense {
        let group = shape.dense.iter().find(|g| (g.kind, g.layer) == (dense.kind, dense.layer));
        let name = format!("{:?} of layer {:?}", dense.kind, dense.layer);
        *placed.entry((dense.kind, dense.layer)).or_default() += 1;
        match group {
            None => wrong.push(format!("{name} is placed, but the model has none")),
            Some(_) if dense.tier >= n => wrong.push(format!("{name} is on tier {} of {n}", dense.tier)),
            Some(_) if !computes(dense.tier) && dense.kind != DenseKind::Embedding => {
                wrong.push(format!("{name} is on '{}', where nothing computes", plan.tiers[dense.tier].tier.name));
            }
            Some(group) => lines[dense.tier][0] += u128::from(group.bytes),
        }
    }
    for group in &shape.dense {
        let times = placed.get(&(group.kind, group.layer)).copied().unwrap_or(0);
        if times != 1 {
            wrong.push(format!("{:?} of layer {:?} is placed {times} times, not once", group.kind, group.layer));
        }
    }

    let (have, want): (Vec<u32>, Vec<u32>) =
        (plan.layers.iter().map(|l| l.layer).collect(), shape.experts.iter().map(|e| e.layer).collect());
    if have != want {
        wrong.push(format!("layers with experts are {want:?} in the model, {have:?} in the plan"));
        return lines;
    }
    for (layer, experts) in plan.layers.iter().zip(&shape.experts) {
        let each = u128::from(experts.expert_bytes);
        let mut seen = vec![false; experts.n_expert as usize];
        for (tier, pinned) in &layer.pinned {
            if *tier >= n || !computes(*tier) {
                wrong.push(format!("layer {} pins experts to tier {tier}, where none can be", layer.layer));
                continue;
            }
            for &expert in pinned {
                match seen.get_mut(expert as usize) {
                    None => wrong.push(format!("layer {} pins expert {expert} of {}", layer.layer, experts.n_expert)),
                    Some(true) => wrong.push(format!("layer {} pins expert {expert} twice", layer.layer)),
                    Some(seen) => {
                        *seen = true;
                        lines[*tier][1] += each;
                    }
                }
            }
        }
        let pooled = seen.iter().filter(|&&s| !s).count();
        lines[n - 1][5] += each * pooled as u128;
        if layer.slots > 0 {
            if layer.slot_tier >= n || !computes(layer.slot_tier) {
                wrong.push(format!("layer {} has slots on tier {}", layer.layer, layer.slot_tier));
            } else {
                lines[layer.slot_tier][2] += each * u128::from(layer.slots);
            }
            if layer.slots as usize > pooled {
                wrong.push(format!("layer {} has {} slots for {pooled} pooled experts", layer.layer, layer.slots));
            }
        }
    }

    let largest = shape.experts.iter().map(|e| e.expert_bytes).max().unwrap_or(0);
    let staging = (plan.staging_tier, 4, u128::from(plan.staging_experts) * u128::from(largest));
    let mut others = vec![("staging".to_string(), staging)];
    for (layer, cache) in shape.caches.iter().enumerate() {
        let tier = cache_tier(plan, layer);
        let mut bytes = u128::from(cache.state_bytes);
        for rows in &cache.rows {
            let each = u128::from(plan.kv_type.row_bytes(rows.width)) * u128::from(rows.per_token);
            bytes += each * u128::from(plan.context);
        }
        others.push((format!("key and value cache of layer {layer}"), (tier, 3, bytes)));
        let attends = |d: &&DensePlacement| d.kind == DenseKind::Attention && d.layer == u32::try_from(layer).ok();
        let apart = plan.dense.iter().find(attends).filter(|d| d.tier != tier);
        if apart.is_some() && tier < n && plan.tiers[tier].tier.is_gpu() {
            wrong.push(format!("the key and value cache of layer {layer} is on a GPU, but not its attention"));
        }
    }
    for (name, (tier, line, bytes)) in others {
        if tier >= n || (bytes > 0 && !computes(tier)) {
            wrong.push(format!("the {name} is on tier {tier}, where nothing computes"));
        } else {
            lines[tier][line] += bytes;
        }
    }
    lines
}

/// Where a layer's keys and values are: on the GPU that has its attention, or with all others.
fn cache_tier(plan: &Placement, layer: usize) -> TierIdx {
    let mut attention = plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
    let of_layer = attention.find(|d| d.layer == u32::try_from(layer).ok()).map(|d| d.tier);
    let gpu = |t: &TierIdx| plan.tiers.get(*t).is_some_and(|t| t.tier.kind == TierKind::Vram && !t.tier.emulated);
    of_layer.filter(gpu).unwrap_or(plan.kv_tier)
}

fn sums(plan: &Placement, lines: &Lines, wrong: &mut Vec<String>) {
    for (tier, lines) in plan.tiers.iter().zip(lines) {
        let name = &tier.tier.name;
        let PlanTier { dense_bytes, pinned_bytes, slot_bytes, kv_bytes, staging_bytes, home_bytes, .. } = *tier;
        let said = [dense_bytes, pinned_bytes, slot_bytes, kv_bytes, staging_bytes, home_bytes];
        for ((said, &is), line) in said.into_iter().zip(lines).zip(LINE_NAMES) {
            if u128::from(said) != is {
                wrong.push(format!("tier '{name}' says {said} {line} bytes, but they are {is}"));
            }
        }
        let used: u128 = lines.iter().sum();
        if used > u128::from(tier.budget_bytes) {
            let over = show_bytes(u64::try_from(used - u128::from(tier.budget_bytes)).unwrap_or(u64::MAX));
            wrong.push(format!("tier '{name}' is over its budget of {} by {over}", show_bytes(tier.budget_bytes)));
        }
        if tier.budget_bytes > tier.tier.capacity_bytes {
            wrong.push(format!("tier '{name}' has a budget above its capacity"));
        }
    }
}

fn times(plan: &Placement, shape: &ModelShape, evidence: &Evidence, wrong: &mut Vec<String>) {
    let seconds = token_s(plan, shape, evidence);
    let differs = |said: f64| ((said - seconds) / seconds).abs() > TOLERANCE || said.is_nan();
    let predicted = plan.predicted.decode_tok_s;
    if differs(1.0 / predicted) {
        wrong.push(format!("the plan predicts {predicted} tok/s, but a replay gives {}", 1.0 / seconds));
    }
    if differs(plan.solver.objective_s) {
        wrong.push(format!("the plan's objective is {} s, but a replay gives {seconds} s", plan.solver.objective_s));
    }
    let Some(bound) = plan.solver.bound_s else { return };
    // A bound is over pins and slots with LRU; another policy may be faster than that.
    let mut with_lru = plan.clone();
    with_lru.layers.iter_mut().for_each(|layer| layer.policy = SlotPolicy::Lru);
    let bounded = if with_lru.layers == plan.layers { seconds } else { token_s(&with_lru, shape, evidence) };
    if bound > bounded * (1.0 + TOLERANCE) {
        wrong.push("the plan is better than its proven bound".to_string());
    }
}

/// Seconds of a decoded token, token by token as [`crate::cost`] states the charges.
pub fn token_s(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> f64 {
    let plan = &with_fixed_times(plan, shape);
    let mut total = 1e-6 * (plan.token_overhead_us + f64::from(shape.n_layer) * plan.layer_overhead_us);
    for dense in &plan.dense {
        if dense.kind == DenseKind::Attention {
            total += 1e-6 * plan.tiers[dense.tier].tier.accelerator.layer_us.unwrap_or(0.0);
        }
        for group in shape.dense.iter().filter(|g| (g.kind, g.layer) == (dense.kind, dense.layer)) {
            total += group.token_bytes as f64 / (plan.tiers[dense.tier].tier.read_gbps * 1e9);
        }
    }
    let charged = shape.caches.iter().enumerate().filter(|_| plan.predicted.at > 0);
    for (layer, cache) in charged {
        let (mut bytes, mut values) = (2.0 * cache.state_bytes as f64, 0.0);
        for rows in &cache.rows {
            let seen = rows.per_token * rows.window.unwrap_or(u64::MAX).min(plan.predicted.at.into());
            bytes += (plan.kv_type.row_bytes(rows.width) * seen) as f64;
            values += (rows.width * rows.queries * seen) as f64;
        }
        let at = cache_tier(plan, layer);
        let tier = &plan.tiers[at].tier;
        let mut seconds = bytes / (tier.read_gbps * 1e9);
        match plan.predicted.prompt_gflops.get(at) {
            Some(&rate) if rate > 0.0 && !tier.emulated => {
                seconds = seconds.max(2.0 * values / (ATTENTION_OF_A_TOKEN * rate * 1e9));
            }
            _ => {}
        }
        total += seconds;
    }
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        total += match &evidence.judged {
            Judged::Recorded(_) => stepped_s(plan, layer, evidence),
            Judged::Uniform => {
                let tiers: Vec<_> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
                let stage = crate::cost::ExpertStage::new(&tiers, evidence.shape.expert_bytes, evidence.ahead);
                let found = crate::cost::outcomes(layer, evidence, &tiers, plan.staging_tier);
                crate::cost::stage_mean_s(&stage, &found, layer.brought_to(plan.staging_tier))
            }
        };
    }
    total
}

/// The plan with the fixed times that hold for it: where all of the model stays on one accelerator, its layers have their
/// own, and launches are not waited for.
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

fn stepped_s(plan: &Placement, layer: &LayerPlacement, evidence: &LayerEvidence) -> f64 {
    let Judged::Recorded(trace) = &evidence.judged else { return 0.0 };
    let home = plan.tiers.len() - 1;
    let in_place = plan.tiers[home].tier.kind != TierKind::Nvme;
    let mut on = vec![None; evidence.shape.n_expert as usize];
    layer.pinned.iter().for_each(|(tier, experts)| experts.iter().for_each(|&e| on[e as usize] = Some(*tier)));
    let mut cache = SlotCache::new(evidence.shape.n_expert, layer.slots, layer.policy);
    let (mut out, mut sum, mut tokens) = (Vec::new(), 0.0, 0u64);
    // One expert is read while the dense stage before computes, if guesses are good.
    let ahead = evidence.ahead;
    let mut ahead_s = 0.0;
    if plan.tiers[home].tier.kind == TierKind::Nvme && !plan.tiers[home].tier.emulated && home > 0 && ahead.right >= 0.5
    {
        let dense_s = ahead.dense_bytes as f64 / (plan.tiers[0].tier.read_gbps * 1e9);
        let expert_s = evidence.shape.expert_bytes as f64 / (plan.tiers[home].tier.read_gbps * 1e9);
        ahead_s = ahead.right.min(1.0) * dense_s.min(expert_s);
    }
    for event in trace.events() {
        let pooled = |chosen: &[u16]| -> Vec<u32> {
            chosen.iter().map(|&e| e.into()).filter(|&e: &u32| on[e as usize].is_none()).collect()
        };
        let chosen = match event {
            Event::Prompt { tokens, touched } => {
                tokens.chunks_exact(trace.n_used()).for_each(|token| cache.note(pooled(token).into_iter()));
                cache.settle(&pooled(touched), &mut out);
                continue;
            }
            Event::Token(chosen) => chosen,
        };
        cache.step(&pooled(chosen), &mut out);
        let mut experts = vec![0u64; plan.tiers.len()];
        let mut missed = 0u64;
        chosen.iter().filter_map(|&e| on[usize::from(e)]).for_each(|tier| experts[tier] += 1);
        for access in &out {
            match access {
                Access::Hit { .. } => experts[layer.slot_tier] += 1,
                Access::Fill { .. } => (experts[layer.slot_tier], missed) = (experts[layer.slot_tier] + 1, missed + 1),
                Access::Staged if in_place => experts[home] += 1,
                Access::Staged => (experts[plan.staging_tier], missed) = (experts[plan.staging_tier] + 1, missed + 1),
            }
        }
        // The paths that overlap: every tier that computes, and the transfers from the last one.
        let each = evidence.shape.expert_bytes as f64;
        let read = |tier: usize, n: u64| n as f64 * each / (plan.tiers[tier].tier.read_gbps * 1e9);
        let latency = |tier: usize| plan.tiers[tier].tier.latency_us * 1e-6;
        // What goes to slots behind a link that is slower than the reads takes as long as on that.
        let to = if layer.slots > 0 { layer.slot_tier } else { plan.staging_tier };
        let link = plan.tiers[to].tier.accelerator.link_gbps.map_or(0.0, |gbps| missed as f64 * each / (gbps * 1e9));
        let mut longest = if missed > 0 { latency(home) + read(home, missed).max(link) - ahead_s } else { 0.0 };
        for (at, &n) in experts.iter().enumerate().filter(|(_, n)| **n > 0) {
            let launch = if plan.tiers[at].tier.kind == TierKind::Vram { latency(at) } else { 0.0 };
            longest = longest.max(launch + read(at, n));
        }
        sum += longest;
        tokens += 1;
    }
    sum / tokens.max(1) as f64
}
