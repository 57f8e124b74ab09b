//! How long a token takes under a placement: a pure prediction, and what exactly it charges.
//!
//! # What is charged
//! A decoded token lasts `token overhead + Σ layers (layer overhead + dense stage + expert stage) + the dense groups
//! of no layer` (embedding and head). The engine's emulated tiers charge the same:
//!
//! - **Dense stage**: `Σ token_bytes / rate(tier)` over the layer's groups and its cache, one after the other. No latency: the
//!   launches of an ordinary layer are part of the layer overhead, and the row of an embedding that stays on a block
//!   device counts as its bytes.
//! - **Expert stage**, only in layers with routed experts: the longest of the paths that overlap, which are
//!   - each tier that chosen experts compute from: `bytes / rate`, for VRAM after the latency of a launch;
//!   - for `m > 0` missed experts their transfer from the last tier: `latency + m · expert_bytes / rate`, less what reading
//!     ahead of the router hides ([`Ahead`]). Where slots are in VRAM behind a link, the rate is that of the link if it is
//!     the slower one ([`Tier::transfer_s`]).
//! - A chosen expert computes where it is pinned. A pooled one computes on its layer's slot tier if it lies in a slot
//!   or is brought into one; else it is brought into staging and computes there. So a miss is charged twice, on two
//!   paths: its transfer, and its computation from the slot or the buffer.
//! - Unless the last tier is a block device, a pooled expert that gets no slot computes where it lies: it is charged
//!   on that tier's path as a pinned one is, and nothing is staged.
//!
//! The maximum is taken token by token over recorded, held-out tokens and then averaged: the mean of the maximum, not
//! the maximum of means. Slots are replayed by their layer's policy as [`crate::replay`] says. Without a profile, tokens
//! are independent and all sets of experts equally likely, and the slots hold that many pooled experts; the mean is then
//! exact for LRU, and taken for the other policies too, which can do no better there.
//!
//! On an accelerator a dense stage has launches, and its router's choices come back: a layer whose attention is there takes
//! its `layer_us` more. Where one accelerator has all of a model, nothing comes back between a token's number and its
//! logits, and each layer takes `resident_layer_us` in place of the layer overhead, `layer_us` and the latency of launches.
//!
//! A dense stage also reads the keys and values of every position that the token attends to (of as many as a layer's
//! window has), and reads and writes back recurrent state, all at the rate of the tier that the layer's cache is on: the
//! real GPU that has its attention, or the one that all others are on. Where the
//! products with them take longer than that, and their rate is known, those count. The time
//! of a token so depends on its place in the text: a prediction is for the place `at`, half of the planned context
//! unless told otherwise, and a run's record has it for the middle of what the run decoded.
//!
//! Prompts are the subject of [`prompt`].

pub mod fit;
pub mod prompt;

use crate::profile::{Evidence, Judged, LayerEvidence};
use crate::replay::{Positions, play};
use std::collections::BTreeMap;
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{
    DensePlacement, LayerPlacement, Placement, Prediction, SlotPolicy, TierIdx,
};
use tier_plan_runtime::gpu::fully_on_gpu;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// Tokens of a prompt that are processed together.
pub const BATCH: u32 = 512;

/// Whether what lives on the last tier can compute where it lies.
pub fn home_in_place(tiers: &[Tier]) -> bool {
    tiers.last().is_some_and(|t| t.kind != TierKind::Nvme)
}

/// Seconds to read so many bytes from a tier, latency left out.
pub fn read_s(tier: &Tier, bytes: f64) -> f64 {
    bytes / (tier.read_gbps * 1e9)
}

/// What reading ahead of a layer's router can hide of its transfers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ahead {
    /// Share of the experts guessed for the layer that it did choose; 0 where nothing is known of it.
    pub right: f64,
    /// Bytes that the dense stage before the experts reads.
    pub dense_bytes: u64,
}

impl Ahead {
    /// Seconds of a layer's transfers that are over when its experts begin, if any is missed: the engine reads one expert
    /// ahead of each layer, from a block device that is not emulated, while at least half of its guesses come true. It has
    /// the time of the dense stage, taken to lie on the fastest tier.
    fn hidden_s(self, tiers: &[Tier], each_s: f64) -> f64 {
        let (Some(first), Some(home)) = (tiers.first(), tiers.last()) else { return 0.0 };
        let reads_ahead = self.right >= 0.5 && home.kind == TierKind::Nvme && !home.emulated && tiers.len() > 1;
        if reads_ahead { self.right.min(1.0) * each_s.min(read_s(first, self.dense_bytes as f64)) } else { 0.0 }
    }
}

/// The expert stage of one layer on given tiers.
#[derive(Debug, Clone)]
pub struct ExpertStage {
    /// `[tiers]` seconds of an expert that computes from there, and fixed seconds if there is any.
    compute: Vec<(f64, f64)>,
    /// `[tiers]` the same of an expert that is brought there.
    transfers: Vec<(f64, f64)>,
}

impl ExpertStage {
    /// The stage of a layer whose experts have `expert_bytes` bytes.
    pub fn new(tiers: &[Tier], expert_bytes: u64, ahead: Ahead) -> Self {
        let each = |tier: &Tier| read_s(tier, expert_bytes as f64);
        let launch = |tier: &Tier| if tier.kind == TierKind::Vram { tier.latency_us * 1e-6 } else { 0.0 };
        let brought = |to: &Tier| {
            let Some(home) = tiers.last() else { return (0.0, 0.0) };
            let fixed = home.latency_us * 1e-6 - ahead.hidden_s(tiers, each(home));
            (to.transfer_s(home, expert_bytes as f64), fixed)
        };
        ExpertStage {
            compute: tiers.iter().map(|t| (each(t), launch(t))).collect(),
            transfers: tiers.iter().map(brought).collect(),
        }
    }

    /// Seconds an expert of one path, and its fixed seconds. Paths are the tiers, then the transfers to the tier `to`.
    pub fn path(&self, path: usize, to: TierIdx) -> (f64, f64) {
        self.compute.get(path).copied().unwrap_or_else(|| self.transfers[to])
    }

    /// Seconds that one path takes for so many experts, before any overlap.
    pub fn path_s(&self, path: usize, experts: f64, to: TierIdx) -> f64 {
        let (each, fixed) = self.path(path, to);
        if experts > 0.0 { fixed + experts * each } else { 0.0 }
    }

    /// Seconds of the stage when so many experts are on each path.
    pub fn seconds(&self, experts: &[f64], to: TierIdx) -> f64 {
        experts.iter().enumerate().map(|(path, &n)| self.path_s(path, n, to)).fold(0.0, f64::max)
    }

    /// The same for whole experts: those of one token.
    pub fn token_s(&self, experts: &[u16], to: TierIdx) -> f64 {
        let path = |(&n, &(each, fixed)): (&u16, &(f64, f64))| if n > 0 { fixed + f64::from(n) * each } else { 0.0 };
        let paths = self.compute.iter().chain([&self.transfers[to]]);
        experts.iter().zip(paths).map(path).fold(0.0, f64::max)
    }
}

/// What a token does in one layer: experts on each path of [`ExpertStage`] (`[tiers + 1]`: computed from each tier,
/// then transferred), and the share of tokens that do this.
pub type Outcomes = BTreeMap<Vec<u16>, f64>;

/// The distribution of outcomes of one layer under its placement, over the evidence's tokens.
pub fn outcomes(layer: &LayerPlacement, evidence: &LayerEvidence, tiers: &[Tier], staging: TierIdx) -> Outcomes {
    let n_expert = evidence.shape.n_expert as usize;
    let home = tiers.len() - 1;
    let in_place = home_in_place(tiers);
    let mut pinned_on = vec![None; n_expert];
    for (tier, experts) in &layer.pinned {
        for &expert in experts {
            if let Some(on) = pinned_on.get_mut(expert as usize) {
                *on = Some(*tier);
            }
        }
    }
    let mut found = Outcomes::new();
    let bring_in = |experts: &mut Vec<u16>, kept: bool| {
        if !kept && in_place {
            experts[home] += 1;
        } else {
            experts[home + 1] += 1;
            experts[if kept { layer.slot_tier } else { staging }] += 1;
        }
    };
    match &evidence.judged {
        Judged::Recorded(trace) if layer.policy != SlotPolicy::Lru => {
            let pinned: Vec<bool> = pinned_on.iter().map(Option::is_some).collect();
            let share = 1.0 / trace.tokens().max(1) as f64;
            let mut cache = SlotCache::new(evidence.shape.n_expert, layer.slots, layer.policy);
            play(trace, &pinned, &mut cache, |chosen, accesses| {
                let mut experts = vec![0u16; tiers.len() + 1];
                for tier in chosen.iter().filter_map(|&e| pinned_on[usize::from(e)]) {
                    experts[tier] += 1;
                }
                for access in accesses {
                    match access {
                        Access::Hit { .. } => experts[layer.slot_tier] += 1,
                        Access::Fill { .. } => bring_in(&mut experts, true),
                        Access::Staged => bring_in(&mut experts, false),
                    }
                }
                *found.entry(experts).or_insert(0.0) += share;
            });
        }
        Judged::Recorded(trace) => {
            let pinned: Vec<bool> = pinned_on.iter().map(Option::is_some).collect();
            let positions = Positions::new(trace, &pinned);
            let share = 1.0 / positions.tokens().max(1) as f64;
            for (token, (chosen, _)) in trace.steps().filter(|(_, counted)| *counted).enumerate() {
                let mut experts = vec![0u16; tiers.len() + 1];
                for &expert in chosen {
                    if let Some(tier) = pinned_on[usize::from(expert)] {
                        experts[tier] += 1;
                    }
                }
                let pooled = positions.token(token);
                for (at, &position) in pooled.iter().enumerate() {
                    if u32::from(position) < layer.slots {
                        experts[layer.slot_tier] += 1;
                    } else {
                        bring_in(&mut experts, pooled.len() - at <= layer.slots as usize);
                    }
                }
                *found.entry(experts).or_insert(0.0) += share;
            }
        }
        Judged::Uniform => {
            // Groups of alike experts: pinned by tier, resident in slots, neither.
            let mut groups = vec![0u32; tiers.len()];
            pinned_on.iter().flatten().for_each(|&tier| groups[tier] += 1);
            let pooled = evidence.shape.n_expert - groups.iter().sum::<u32>();
            let resident = layer.slots.min(pooled);
            groups.extend([resident, pooled - resident]);
            draw(&groups, evidence.shape.n_used, |drawn, share| {
                let mut experts: Vec<u16> = drawn[..tiers.len()].iter().map(|&n| n as u16).chain([0]).collect();
                let (hits, missed) = (drawn[tiers.len()], drawn[tiers.len() + 1]);
                experts[layer.slot_tier] += hits as u16;
                for at in 0..missed {
                    bring_in(&mut experts, hits + at < resident);
                }
                *found.entry(experts).or_insert(0.0) += share;
            });
        }
    }
    found
}

/// Calls `each` with every way in which `k` distinct experts can fall on groups of the given sizes, and its
/// probability when all sets are equally likely (the multivariate hypergeometric distribution).
pub fn draw(groups: &[u32], k: u32, mut each: impl FnMut(&[u32], f64)) {
    let total: u32 = groups.iter().sum();
    let ln_fact = ln_factorials(total as usize);
    let ln_choose = |n: u32, k: u32| ln_fact[n as usize] - ln_fact[k as usize] - ln_fact[(n - k) as usize];
    let all = ln_choose(total, k.min(total));
    let mut drawn = vec![0u32; groups.len()];
    fn fill(
        groups: &[u32],
        at: usize,
        left: u32,
        ln: f64,
        drawn: &mut Vec<u32>,
        ln_choose: &impl Fn(u32, u32) -> f64,
        each: &mut impl FnMut(&[u32], f64),
    ) {
        if at == groups.len() {
            if left == 0 {
                each(drawn, ln.exp());
            }
            return;
        }
        let after: u32 = groups[at + 1..].iter().sum();
        for n in left.saturating_sub(after)..=left.min(groups[at]) {
            drawn[at] = n;
            fill(groups, at + 1, left - n, ln + ln_choose(groups[at], n), drawn, ln_choose, each);
        }
    }
    fill(groups, 0, k.min(total), -all, &mut drawn, &ln_choose, &mut each);
}

/// `[n + 1]` natural logarithms of 0!, 1!, ..., n!.
fn ln_factorials(n: usize) -> Vec<f64> {
    let mut sum = 0.0;
    std::iter::once(0.0)
        .chain((1..=n).map(|i| {
            sum += (i as f64).ln();
            sum
        }))
        .collect()
}

/// Mean seconds of the expert stage over a layer's outcomes, with missed experts brought to the tier `to`.
pub fn stage_mean_s(stage: &ExpertStage, outcomes: &Outcomes, to: TierIdx) -> f64 {
    outcomes.iter().map(|(experts, share)| share * stage.token_s(experts, to)).sum()
}

/// Fixed seconds a token: its own and its layers'.
pub fn overhead_s(n_layer: u32, layer_overhead_us: f64, token_overhead_us: f64) -> f64 {
    (token_overhead_us + layer_overhead_us * f64::from(n_layer)) * 1e-6
}

/// The fixed times of a plan.
#[derive(Debug, Clone)]
pub struct Fixed {
    /// Seconds a token: its own and its layers'.
    pub overhead_s: f64,
    /// `[tiers]` seconds a token, beside that, of layers whose attention is on an accelerator.
    pub dense_s: Vec<f64>,
    /// The plan's tiers as experts compute on them: where all of a model stays on one accelerator, nobody waits for a
    /// launch.
    pub tiers: Vec<Tier>,
}

impl Fixed {
    /// Those of a plan for a model.
    pub fn of(plan: &Placement, shape: &ModelShape) -> Self {
        let mut tiers: Vec<Tier> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
        let mut dense_s = vec![0.0; tiers.len()];
        let resident =
            fully_on_gpu(plan, shape).and_then(|tier| Some((tier, tiers[tier].accelerator.resident_layer_us?)));
        if let Some((tier, layer_us)) = resident {
            tiers[tier].latency_us = 0.0;
            return Fixed { overhead_s: overhead_s(shape.n_layer, layer_us, plan.token_overhead_us), dense_s, tiers };
        }
        for group in plan.dense.iter().filter(|d| d.kind == DenseKind::Attention) {
            dense_s[group.tier] += attention_fixed_s(&tiers[group.tier]);
        }
        Fixed { overhead_s: overhead_s(shape.n_layer, plan.layer_overhead_us, plan.token_overhead_us), dense_s, tiers }
    }
}

/// Fixed seconds of a layer whose attention is on this tier, beside those of any layer.
pub fn attention_fixed_s(tier: &Tier) -> f64 {
    tier.accelerator.layer_us.unwrap_or(0.0) * 1e-6
}

/// Bytes that a decoded token reads of the dense groups, by tier.
fn dense_bytes(shape: &ModelShape, dense: &[DensePlacement], n_tiers: usize) -> Vec<f64> {
    let tier_of: BTreeMap<_, _> = dense.iter().map(|d| ((d.kind, d.layer), d.tier)).collect();
    let mut bytes = vec![0.0; n_tiers];
    for group in &shape.dense {
        if let Some(&tier) = tier_of.get(&(group.kind, group.layer)) {
            bytes[tier] += group.token_bytes as f64;
        }
    }
    bytes
}

/// Where in the text tokens are predicted that a context of so many is planned for: halfway.
pub fn middle(context: u32) -> u32 {
    (context / 2).max(1)
}

/// Moves a plan's prediction, and with it what its solver says, to tokens that attend to `at` positions: every plan for
/// this model with its cache on these tiers takes as much longer or shorter.
pub fn move_to(plan: &mut Placement, shape: &ModelShape, at: u32) {
    let before = plan.predicted.token_s();
    let predicted = plan.predicted_at(shape, at);
    let solver = &mut plan.solver;
    // An objective of another kind does not follow the time of a token.
    if (solver.objective_s - before).abs() <= 1e-9 * before {
        let more = predicted.token_s() - before;
        let bound = solver.bound_s.map(|bound| (bound + more).max(0.0));
        (solver.objective_s, solver.bound_s) = (predicted.token_s(), bound);
        solver.gap = bound.map(|bound| ((solver.objective_s - bound) / solver.objective_s).max(0.0));
    }
    plan.predicted = predicted;
}

/// Predicts a placement's speed from its own tiers, with its parts. For which place in the text, and with which rates of
/// products, is taken from the prediction that the plan has.
pub fn predict(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Prediction {
    let Fixed { overhead_s, mut dense_s, tiers } = Fixed::of(plan, shape);
    let n = tiers.len();
    let mut read_bytes = dense_bytes(shape, &plan.dense, n);
    dense_s.iter_mut().zip(&read_bytes).zip(&tiers).for_each(|((s, &bytes), tier)| *s += read_s(tier, bytes));
    let (mut expert_s, mut critical) = (vec![0.0; n], 0.0);
    let (mut accesses, mut missed) = (0.0, 0.0);
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let stage = ExpertStage::new(&tiers, evidence.shape.expert_bytes, evidence.ahead);
        let outcomes = outcomes(layer, evidence, &tiers, plan.staging_tier);
        let to = layer.brought_to(plan.staging_tier);
        critical += stage_mean_s(&stage, &outcomes, to);
        accesses += f64::from(evidence.shape.n_used);
        for (experts, share) in &outcomes {
            missed += share * experts[n - 1..].iter().copied().map(f64::from).sum::<f64>();
            for (path, &count) in experts.iter().enumerate() {
                let tier = path.min(n - 1);
                expert_s[tier] += share * stage.path_s(path, f64::from(count), to);
                read_bytes[tier] += share * f64::from(count) * evidence.shape.expert_bytes as f64;
            }
        }
    }
    let (at, prompt_gflops) = (plan.predicted.at, plan.predicted.prompt_gflops.clone());
    let kv_s = if at > 0 { plan.attention_s(shape, at.into()) } else { 0.0 };
    let total = overhead_s + dense_s.iter().sum::<f64>() + kv_s + critical;
    Prediction {
        decode_tok_s: if total > 0.0 { 1.0 / total } else { 0.0 },
        prompt_tok_s: f64::from(BATCH) / prompt::batch_s(plan, shape, evidence).max(f64::MIN_POSITIVE),
        overhead_s,
        dense_s,
        expert_s,
        expert_critical_s: critical,
        hit_rate: if accesses > 0.0 { 1.0 - missed / accesses } else { 1.0 },
        read_bytes,
        emulated: tiers.iter().all(|t| t.emulated),
        at,
        kv_s,
        prompt_gflops,
    }
}

/// Seconds of a decoded token, from a prediction's parts.
pub fn token_s(prediction: &Prediction) -> f64 {
    prediction.token_s()
}

#[cfg(test)]
mod tests;
