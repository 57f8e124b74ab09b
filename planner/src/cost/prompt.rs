//! Predicts how long a batch of a prompt takes.
//!
//! Prompts are processed in batches of [`BATCH`] tokens. A batch reads each weight once, and does
//! `2 · tokens` floating point operations with each value of it. So each step takes the longer of
//! the two times:
//!
//! - **A dense group**: `max(bytes / rate, 2 · macs · BATCH / gflops)` of its tier, one group after
//!   the other. The head is computed for the last token only. Of the embedding one row per token is
//!   read.
//! - **Routed experts**, layer by layer: each *distinct* chosen expert is read once, expert `e`
//!   with probability `1 − (1 − share)^BATCH`. A full set of slots spares its part of the pooled
//!   ones, and the paths overlap as for one token. The stage takes at least as long as the CPU
//!   computes on all its tiers together, and as the GPU computes on its own. Some of what is in main
//!   memory may pass through a GPU ([`prompt_stream`](super::prompt_stream)): the GPU computes it then,
//!   and the link is one more time.
//! - **The KV cache** of the batch is read once, layer by layer, and attention runs at
//!   [`ATTENTION`] of the rate; the longer of the two counts.
//!
//! An expert's matmul runs at `gflops · rows / (rows + h)` for the rows of the batch that use it,
//! with [`half_rows`](super::batch::half_rows) as `h`.
//!
//! Where the machine file has no rate of arithmetic ([`Prediction::prompt_gflops`]), reads alone
//! are charged: an upper limit of speed.
//!
//! [`Prediction::prompt_gflops`]: tier_plan_runtime::formats::placement::Prediction::prompt_gflops

use super::batch::MatmulRates;
use super::prompt_stream::{PromptStream, Streamed};
use super::{BATCH, ExpertStage, FixedTimes, group_read_s, home_in_place, read_s};
use crate::profile::prefetch::Prefetch;
use crate::profile::{Evidence, LayerEvidence};
use std::collections::BTreeMap;
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{LayerPlacement, PerTier, Pins, Placement, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// Rate of attention as a share of that of weights: floats instead of 8-bit integers. Measured with
/// AMX: 150 of 460 GFLOP/s.
const ATTENTION: f64 = 0.33;

/// Returns the seconds of the first batch of a prompt.
pub fn batch_s(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> f64 {
    let FixedTimes {
        overhead_s,
        dense_s,
        tiers,
        ..
    } = FixedTimes::of(plan, shape);
    let tier_of: BTreeMap<_, _> = plan
        .dense
        .iter()
        .map(|d| ((d.kind, d.layer), d.tier))
        .collect();
    let mut total = overhead_s + dense_s.iter().sum::<f64>();
    for group in &shape.dense {
        let Some(&tier) = tier_of.get(&(group.kind, group.layer)) else {
            continue;
        };
        let (reads, tokens) = match group.kind {
            DenseKind::Embedding | DenseKind::TokenTable => (f64::from(BATCH), 0.0),
            DenseKind::Head => (1.0, 1.0),
            _ => (1.0, f64::from(BATCH)),
        };
        let bytes = reads * group.token_bytes as f64;
        let read = group_read_s(group.kind, &tiers[tier], bytes);
        total += read.max(compute_s(plan, tier, tokens * group.macs as f64));
    }
    for (cache, tier) in shape
        .caches
        .iter()
        .zip(plan.cache_tiers(shape.caches.len()))
    {
        let macs: f64 = cache
            .rows
            .iter()
            .map(|rows| rows.prompt_macs(BATCH.into()))
            .sum();
        let moved = read_s(
            &tiers[tier],
            cache.moved_bytes(plan.kv_type, BATCH.into(), BATCH.into()) as f64,
        );
        total += moved.max(compute_s(plan, tier, macs / ATTENTION));
    }
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let stream = PromptStream::of(plan, shape, &evidence.shape, &tiers);
        total += experts_s(plan, layer, evidence, &tiers, stream);
    }
    total
}

/// Returns the seconds of multiply-accumulates on a tier; 0 where its rate is unknown.
fn compute_s(plan: &Placement, tier: TierIdx, macs: f64) -> f64 {
    match plan.predicted.prompt_gflops.get(tier) {
        Some(&gflops) if gflops > 0.0 => 2.0 * macs / (gflops * 1e9),
        _ => 0.0,
    }
}

/// Expected experts that a batch uses, and how often it uses them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Touched {
    pub(super) experts: f64,
    pub(super) uses: f64,
}

impl Touched {
    fn of(share: f64) -> Self {
        Touched {
            experts: 1.0 - (1.0 - share.min(1.0)).powi(BATCH as i32),
            uses: share * f64::from(BATCH),
        }
    }

    fn add(&mut self, more: Touched) {
        self.experts += more.experts;
        self.uses += more.uses;
    }

    fn take(&mut self, less: Touched) {
        self.experts -= less.experts;
        self.uses -= less.uses;
    }

    fn part(self, part: f64) -> Self {
        Touched {
            experts: self.experts * part,
            uses: self.uses * part,
        }
    }
}

fn experts_s(
    plan: &Placement,
    layer: &LayerPlacement,
    evidence: &LayerEvidence,
    tiers: &PerTier<Tier>,
    stream: Option<PromptStream>,
) -> f64 {
    let home = plan.home_tier();
    let in_place = home_in_place(tiers);
    let n_expert = evidence.shape.n_expert as usize;
    let mut pinned_on = vec![None; n_expert];
    for Pins {
        tier,
        experts: pins,
    } in &layer.pinned
    {
        for &expert in pins {
            if let Some(on) = pinned_on.get_mut(expert as usize) {
                *on = Some(*tier);
            }
        }
    }
    let stays = in_place && layer.slots == 0;
    let (mut on, mut pooled) = (
        PerTier::from_fn(tiers.len(), |_| Touched::default()),
        Touched::default(),
    );
    // Those that a GPU may read where they are.
    let mut in_memory: Vec<(Touched, TierIdx)> = Vec::new();
    for (share, pin) in evidence.prompt_share.iter().zip(&pinned_on) {
        let touched = Touched::of(*share);
        match pin {
            Some(tier) => on[*tier].add(touched),
            None => pooled.add(touched),
        }
        let tier = pin.or(stays.then_some(home));
        in_memory.extend(
            tier.filter(|tier| tiers[*tier].kind != TierKind::Vram)
                .map(|tier| (touched, tier)),
        );
    }
    let n_pooled = pinned_on.iter().filter(|pin| pin.is_none()).count();
    let resident = (f64::from(layer.slots) / n_pooled.max(1) as f64).min(1.0);
    let (hit, missed) = (pooled.part(resident), pooled.part(1.0 - resident));
    on[layer.slot_tier].add(hit);
    let brought_to = match (stays, in_place) {
        (true, _) => home,
        (false, true) => layer.slot_tier,
        (false, false) => plan.staging_tier,
    };
    on[brought_to].add(missed);
    let transfers = if stays { 0.0 } else { missed.experts };

    let (mut passed, mut streamed) = (Touched::default(), Streamed::default());
    if let Some(stream) = stream {
        in_memory.sort_by(|(a, _), (b, _)| b.uses.total_cmp(&a.uses));
        let busiest: Vec<Touched> = in_memory.iter().map(|(touched, _)| *touched).collect();
        let of_cpu = tiers
            .iter()
            .zip(&on)
            .filter(|(t, _)| t.kind != TierKind::Vram);
        streamed = stream.choose(&busiest, of_cpu.map(|(_, touched)| touched.uses).sum());
        for (touched, tier) in &in_memory[..streamed.n] {
            on[*tier].take(*touched);
            passed.add(*touched);
        }
    }

    let reads: Vec<f64> = on.iter().map(|t| t.experts).chain([transfers]).collect();
    let read = ExpertStage::new(tiers, evidence.shape.expert_bytes, Prefetch::default())
        .seconds(&reads, brought_to);
    let (mut of_cpu, mut of_gpu) = (streamed.copy_s, 0.0f64);
    for (at, tier) in tiers.enumerate() {
        let mut touched = on[at];
        if stream.is_some_and(|stream| stream.gpu == at) {
            touched.add(passed);
        }
        // Each expert that is used costs as much as some rows more.
        let more = MatmulRates::of_plan(plan).half_rows(at);
        let rows = touched.uses + more * touched.experts;
        let seconds = compute_s(plan, at, rows * evidence.shape.expert_macs as f64);
        match tier.kind {
            TierKind::Vram => of_gpu = of_gpu.max(seconds),
            _ => of_cpu += seconds,
        }
    }
    read.max(of_cpu).max(of_gpu).max(streamed.link_s)
}
