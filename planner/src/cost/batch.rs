//! Predicts one step that decodes a token of each of several sequences.
//!
//! A layer then reads each *distinct* expert that any sequence chooses once. Expert `e` is chosen
//! with probability `1 − (1 − share)^B`, where the share is that of the judged decoded tokens, as
//! if sequences were independent. The paths of the expert stage take their expected numbers of
//! experts, and a full set of slots spares its part of the pooled ones. Dense groups are read once,
//! the rows of an embedding once per sequence.
//!
//! Rates of arithmetic are left out, so this is the time of the reads alone: an upper limit of
//! speed that is near it for few sequences only.

use super::{ExpertStage, FixedTimes, home_in_place, read_s};
use crate::profile::prefetch::Prefetch;
use crate::profile::{Evidence, Judged, LayerEvidence};
use tier_plan_runtime::formats::placement::{PerTier, Pins, Placement, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, DenseShape, ModelShape};

/// Returns `[n_expert]` chances that a step over `batch` sequences uses each expert of a layer.
pub fn touched(layer: &LayerEvidence, batch: u32) -> Vec<f64> {
    let share = match &layer.judged {
        Judged::Recorded(trace) => trace.decode_share(),
        Judged::Uniform => layer.share.clone(),
    };
    share
        .iter()
        .map(|s| 1.0 - (1.0 - s.clamp(0.0, 1.0)).powf(f64::from(batch)))
        .collect()
}

/// Returns the bytes of a dense group that a step reads.
pub fn dense_bytes(group: &DenseShape, batch: u32) -> f64 {
    let times = if group.kind == DenseKind::Embedding {
        f64::from(batch)
    } else {
        1.0
    };
    times * group.token_bytes as f64
}

/// Where the experts that a step uses are.
#[derive(Debug, Clone)]
pub struct Spread {
    /// Expected experts that are used, pinned to each tier.
    pub pinned: PerTier<f64>,
    /// Expected pooled experts that are used.
    pub pooled: f64,
    /// Pooled experts, used or not.
    pub n_pooled: f64,
    /// Slots of the pooled experts.
    pub slots: u32,
    /// Tier of the slots.
    pub slot_tier: TierIdx,
}

/// Returns the seconds of a layer's expert stage.
pub fn stage_s(stage: &ExpertStage, spread: &Spread, in_place: bool, staging: TierIdx) -> f64 {
    let Spread {
        slots, slot_tier, ..
    } = *spread;
    let to = if slots > 0 { slot_tier } else { staging };
    let n = spread.pinned.len();
    let mut experts = Vec::from(spread.pinned.clone());
    experts.push(0.0);
    let pooled = spread.pooled.max(0.0);
    if slots == 0 && in_place {
        experts[n - 1] += pooled;
    } else {
        let hits = pooled * (f64::from(slots) / spread.n_pooled.max(1.0)).min(1.0);
        experts[n] += pooled - hits;
        experts[to.get()] += pooled;
    }
    stage.seconds(&experts, to)
}

/// Returns the seconds of one step of a plan over `batch` sequences.
pub fn step_s(plan: &Placement, shape: &ModelShape, evidence: &Evidence, batch: u32) -> f64 {
    let FixedTimes {
        overhead_s,
        dense_s,
        tiers,
    } = FixedTimes::of(plan, shape);
    let in_place = home_in_place(&tiers);
    let mut total = overhead_s + dense_s.iter().sum::<f64>();
    total += f64::from(batch) * plan.predicted.kv_s;
    for dense in &plan.dense {
        for group in shape
            .dense
            .iter()
            .filter(|g| (g.kind, g.layer) == (dense.kind, dense.layer))
        {
            total += read_s(&tiers[dense.tier], dense_bytes(group, batch));
        }
    }
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let touched = touched(evidence, batch);
        let mut spread = Spread {
            pinned: PerTier::from_fn(tiers.len(), |_| 0.0),
            pooled: touched.iter().sum(),
            n_pooled: touched.len() as f64,
            slots: layer.slots,
            slot_tier: layer.slot_tier,
        };
        for Pins {
            tier,
            experts: pins,
        } in &layer.pinned
        {
            let here: f64 = pins.iter().filter_map(|&e| touched.get(e as usize)).sum();
            spread.pinned[*tier] += here;
            spread.pooled -= here;
            spread.n_pooled -= pins.len() as f64;
        }
        let stage = ExpertStage::new(&tiers, evidence.shape.expert_bytes, Prefetch::default());
        total += stage_s(&stage, &spread, in_place, plan.staging_tier);
    }
    total
}
