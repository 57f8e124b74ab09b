//! Predicts how long a token takes under a placement, and states exactly what is charged.
//!
//! # What is charged
//! A decoded token lasts `token overhead + Σ layers (layer overhead + dense stage + expert stage) +
//! the dense groups of no layer` (embedding and head). The engine's emulated tiers charge the same:
//!
//! - **Dense stage**: `Σ token_bytes / rate(tier)` over the layer's groups and its KV cache, one
//!   after the other. There is no latency: the launches of an ordinary layer are part of the layer
//!   overhead, and the row of an embedding that stays on a block device counts as its bytes. A
//!   token's rows of a token table there are read at once, after the device's latency. That they
//!   are read ahead of the layers that use them is not credited: an upper limit of the time.
//! - **Expert stage**, only in layers with routed experts: the longest of the paths that overlap,
//!   which are
//!   - each tier that chosen experts compute from: `bytes / rate`, for VRAM after the latency of a
//!     launch;
//!   - for `m > 0` missed experts their transfer from the last tier: `latency + m · expert_bytes /
//!     rate`, less what [prefetching](crate::profile::prefetch::Prefetch) hides. Where slots are in
//!     VRAM behind a link, the rate is that of the link if it is the slower one
//!     ([`Tier::transfer_s`]). Experts that the token alone chooses are read from when the layer's
//!     dense stage begins, `max(0, latency + m · expert_bytes / rate − dense bytes / rate of the
//!     first tier)`.
//! - A chosen expert computes where it is pinned. A pooled one computes on its layer's slot tier if
//!   it lies in a slot or is brought into one; else it is brought into staging and computes there.
//!   So a miss is charged twice, on two paths: its transfer, and its computation from the slot or
//!   the buffer.
//! - Where the plan streams experts and a token brings none from the last tier, its experts of main
//!   memory and of that GPU are [divided](tier_plan_runtime::formats::placement::StreamTimes::divide)
//!   anew: the paths of both tiers take what the division says.
//! - Unless the last tier is a block device, a pooled expert that gets no slot computes in place:
//!   it is charged on that tier's path as a pinned one is, and nothing is staged.
//!
//! The maximum is taken token by token over recorded, held-out tokens and then averaged: the mean
//! of the maximum, not the maximum of means. Slots are replayed by their layer's policy, as
//! [`crate::profile::replay`] says. Without a profile, tokens are independent and all sets of
//! experts equally likely, and the slots hold that many pooled experts. The mean is then exact for
//! LRU. It is used for the other policies too, which can do no better there.
//!
//! On a GPU a dense stage has launches, and its router's choices come back: a layer whose attention
//! is there takes its `layer_us` more, and once more where its KV cache is on the host: the GPU sends
//! queries, keys, and values, and gets what the CPU made of them. Where a model is fully on one GPU,
//! nothing comes back between a token's number and its logits. Each layer then takes
//! `resident_layer_us` in place of the layer overhead, `layer_us` and the latency of launches.
//!
//! A dense stage also reads the keys and values of every position that the token attends to, or of
//! those within a layer's window. It reads and writes back recurrent state. All are charged at the
//! rate of the KV cache's tier: the real GPU that has the layer's attention, unless the CPU attends, or
//! the tier of all other layers. Where the arithmetic of attention takes longer than that, and its rate is known,
//! that counts instead.
//!
//! The time of a token so depends on its position in the text. A prediction is for the position
//! `at`, half of the planned context unless given; a run's record has it for the middle of what the
//! run decoded.
//!
//! Prompts are the subject of [`prompt`].

pub mod batch;
pub mod fit;
pub mod observed;
mod outcomes;
pub mod prompt;
mod prompt_stream;
mod stage;
pub mod steps;

pub use outcomes::{Outcomes, draw, outcomes};
pub use stage::{ExpertStage, PathTime, PathUse, stage_mean_s};

use crate::profile::Evidence;
use outcomes::Replays;
use std::collections::BTreeMap;
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{
    DensePlacement, PerTier, Placement, Prediction, TierIdx,
};
use tier_plan_runtime::gpu::fully_on_gpu;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// Tokens of a prompt that are processed together.
pub const BATCH: u32 = 512;

/// Whether experts on the last tier can compute in place.
pub fn home_in_place(tiers: &PerTier<Tier>) -> bool {
    tiers.last().is_some_and(|t| t.kind != TierKind::Nvme)
}

/// Returns the seconds to read bytes from a tier, latency left out.
pub fn read_s(tier: &Tier, bytes: f64) -> f64 {
    bytes / (tier.read_gbps * 1e9)
}

/// Returns the seconds of a dense group's reads for one token, with the latency of a table on a
/// block device.
pub fn group_read_s(kind: DenseKind, tier: &Tier, bytes: f64) -> f64 {
    let waits = kind == DenseKind::TokenTable && tier.kind == TierKind::Nvme;
    let latency_s = if waits { tier.latency_us * 1e-6 } else { 0.0 };
    latency_s + read_s(tier, bytes)
}

/// Returns the overhead seconds per token: its own and its layers'.
pub fn overhead_s(n_layer: u32, layer_overhead_us: f64, token_overhead_us: f64) -> f64 {
    (token_overhead_us + layer_overhead_us * f64::from(n_layer)) * 1e-6
}

/// The fixed times of a plan.
#[derive(Debug, Clone)]
pub struct FixedTimes {
    /// Overhead seconds per token: its own and its layers'.
    pub overhead_s: f64,
    /// Part of that per layer, in microseconds.
    pub layer_us: f64,
    /// Seconds per token, beside that, of layers whose attention is on a GPU.
    pub dense_s: PerTier<f64>,
    /// The plan's tiers as experts compute on them. Where a model is fully on one GPU, launches
    /// have no latency.
    pub tiers: PerTier<Tier>,
}

impl FixedTimes {
    /// Returns the fixed times of a plan for a model.
    pub fn of(plan: &Placement, shape: &ModelShape) -> Self {
        let mut tiers: PerTier<Tier> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
        let mut dense_s = PerTier::from_fn(tiers.len(), |_| 0.0);
        let resident = fully_on_gpu(plan, shape)
            .and_then(|tier| Some((tier, tiers[tier].accelerator.resident_layer_us?)));
        if let Some((tier, layer_us)) = resident {
            tiers[tier].latency_us = 0.0;
            return FixedTimes {
                overhead_s: overhead_s(shape.n_layer, layer_us, plan.token_overhead_us),
                layer_us,
                dense_s,
                tiers,
            };
        }
        for group in plan.dense.iter().filter(|d| d.kind == DenseKind::Attention) {
            let host_kv = group.layer.is_some_and(|layer| plan.has_host_kv(layer));
            dense_s[group.tier] += attention_fixed_s(&tiers[group.tier], host_kv);
        }
        FixedTimes {
            overhead_s: overhead_s(
                shape.n_layer,
                plan.layer_overhead_us,
                plan.token_overhead_us,
            ),
            layer_us: plan.layer_overhead_us,
            dense_s,
            tiers,
        }
    }
}

/// Returns the fixed seconds of a layer whose attention is on this tier, beside those of any layer.
/// Where the CPU attends to the KV cache (`host_kv`), the layer goes to the GPU twice.
pub fn attention_fixed_s(tier: &Tier, host_kv: bool) -> f64 {
    let trips = if host_kv { 2.0 } else { 1.0 };
    trips * tier.accelerator.layer_us.unwrap_or(0.0) * 1e-6
}

/// Returns the bytes that a decoded token reads of the dense groups, by tier.
fn dense_bytes(shape: &ModelShape, dense: &[DensePlacement], n_tiers: usize) -> PerTier<f64> {
    let tier_of: BTreeMap<_, _> = dense.iter().map(|d| ((d.kind, d.layer), d.tier)).collect();
    let mut bytes = PerTier::from_fn(n_tiers, |_| 0.0);
    for group in &shape.dense {
        if let Some(&tier) = tier_of.get(&(group.kind, group.layer)) {
            bytes[tier] += group.token_bytes as f64;
        }
    }
    bytes
}

/// Returns the seconds of latency that a decoded token waits for tables on block devices, by tier.
fn table_latency_s(plan: &Placement, shape: &ModelShape) -> PerTier<f64> {
    let mut seconds = PerTier::from_fn(plan.tiers.len(), |_| 0.0);
    let has_table = shape.dense.iter().any(|d| d.kind == DenseKind::TokenTable);
    let tables = plan
        .dense
        .iter()
        .filter(|d| d.kind == DenseKind::TokenTable);
    for table in tables.filter(|_| has_table) {
        seconds[table.tier] += group_read_s(table.kind, &plan.tiers[table.tier].tier, 0.0);
    }
    seconds
}

/// Returns the position that predictions for a context are for: halfway.
pub fn middle(context: u32) -> u32 {
    (context / 2).max(1)
}

/// Predicts a placement's speed, with its parts.
///
/// The position in the text and the arithmetic rates are those of the prediction that the plan has.
pub fn predict(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Prediction {
    let FixedTimes {
        overhead_s,
        mut dense_s,
        tiers,
        ..
    } = FixedTimes::of(plan, shape);
    let n = tiers.len();
    let mut read_bytes = dense_bytes(shape, &plan.dense, n);
    dense_s
        .iter_mut()
        .zip(&read_bytes)
        .zip(&tiers)
        .for_each(|((s, &bytes), tier)| *s += read_s(tier, bytes));
    dense_s
        .iter_mut()
        .zip(&table_latency_s(plan, shape))
        .for_each(|(s, latency_s)| *s += latency_s);
    let (mut expert_s, mut critical) = (PerTier::from_fn(n, |_| 0.0), 0.0);
    let (mut accesses, mut missed) = (0.0, 0.0);
    let mut replays = Replays::default();
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let stage = ExpertStage::of_plan(plan, shape, &tiers, evidence);
        let outcomes = replays.outcomes(layer, evidence, &tiers, plan.staging_tier);
        let to = layer.brought_to(plan.staging_tier);
        critical += stage_mean_s(&stage, &outcomes, to);
        accesses += f64::from(evidence.shape.n_used);
        for (experts, share) in outcomes.iter() {
            missed += share * experts[n - 1..].iter().copied().map(f64::from).sum::<f64>();
            for (path, used) in stage.paths(experts, to).into_iter().enumerate() {
                let tier = TierIdx::new(path.min(n - 1));
                let bytes = f64::from(used.experts) * evidence.shape.expert_bytes as f64;
                expert_s[tier] += share * used.seconds;
                read_bytes[tier] += share * bytes;
            }
        }
    }
    let at = plan.predicted.at;
    let kv_s = if at > 0 {
        plan.attention_s(shape, at.into())
    } else {
        0.0
    };
    let total = overhead_s + dense_s.iter().sum::<f64>() + kv_s + critical;
    Prediction {
        decode_tok_s: if total > 0.0 { 1.0 / total } else { 0.0 },
        prompt_tok_s: f64::from(BATCH)
            / prompt::batch_s(plan, shape, evidence).max(f64::MIN_POSITIVE),
        overhead_s,
        dense_s,
        expert_s,
        expert_critical_s: critical,
        hit_rate: if accesses > 0.0 {
            1.0 - missed / accesses
        } else {
            1.0
        },
        read_bytes,
        emulated: tiers.iter().all(|t| t.emulated),
        at,
        kv_s,
        prompt_gflops: plan.predicted.prompt_gflops.clone(),
        few_gflops: plan.predicted.few_gflops.clone(),
    }
}

/// Returns the seconds of a decoded token, from a prediction's parts.
pub fn token_s(prediction: &Prediction) -> f64 {
    prediction.token_s()
}

#[cfg(test)]
mod tests;
