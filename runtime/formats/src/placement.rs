//! `placement.toml`: where every tensor lives, and what that is predicted to give.

mod check;
mod tally;
mod validate;
mod violation;
mod wire;
mod write;

#[cfg(test)]
mod tests;

pub use tally::TierBytes;
pub use validate::validate;
pub use violation::Violation;

use super::kind::PLACEMENT;
use super::machine::Tier;
use crate::model::kv::KvType;
use crate::model::shape::{CacheShape, DenseKind, ModelShape};
use crate::source_id::SourceId;
use crate::{FormatError, safely};
use std::path::Path;

/// Index into [`Placement::tiers`].
pub type TierIdx = usize;

/// The longest half-life of a policy, in tokens.
pub const MAX_HALF_LIFE: u32 = 1 << 16;

/// The most that a recent use may weigh beside one that is only remembered.
pub const MAX_RECENT_WEIGHT: u32 = 1 << 10;

/// Rate of the products of one token's attention, as a share of that of a prompt's weights. Measured with AMX: 76 of 463
/// GFLOP/s, eight query heads to each head of keys.
pub const ATTENTION_OF_A_TOKEN: f64 = 0.16;

/// The policy by which a layer's slots are refilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotPolicy {
    /// Every expert that is used gets a slot; the one whose last use is longest ago leaves.
    Lru,
    /// The experts with the most uses of late have the slots; one with fewer is not let in.
    Lfu {
        /// Tokens after which a use counts half, 1 to [`MAX_HALF_LIFE`].
        half_life: u32,
    },
    /// The same, with two memories of uses added up.
    Adaptive {
        /// Tokens after which a use counts half in the long memory, 1 to [`MAX_HALF_LIFE`].
        half_life: u32,
        /// The same of the short memory.
        recent_half_life: u32,
        /// What a use weighs in the short memory, where it weighs 1 in the long one; 0 to [`MAX_RECENT_WEIGHT`].
        recent_weight: u32,
    },
}

impl SlotPolicy {
    /// The name in plans.
    pub fn name(self) -> &'static str {
        match self {
            SlotPolicy::Lru => "lru",
            SlotPolicy::Lfu { .. } => "lfu",
            SlotPolicy::Adaptive { .. } => "adaptive",
        }
    }
}

impl std::fmt::Display for SlotPolicy {
    /// The name with its parameters, for tables and sentences.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SlotPolicy::Lru => f.write_str("lru"),
            SlotPolicy::Lfu { half_life } => write!(f, "lfu, half-life {half_life}"),
            SlotPolicy::Adaptive { half_life, recent_half_life, recent_weight } => {
                write!(f, "adaptive, half-life {half_life}, recent {recent_half_life} at weight {recent_weight}")
            }
        }
    }
}

/// What one tier may hold, and how the plan fills it.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanTier {
    /// The tier with its rates, as the machine file gave them.
    pub tier: Tier,
    /// Bytes that the plan may use of it.
    pub budget_bytes: u64,
    /// Bytes that the plan uses of it, never more than its budget: set by [`Placement::fill_sums`].
    pub bytes: TierBytes,
}

impl PlanTier {
    /// A tier of which the plan may use so many bytes, and uses none yet.
    pub fn new(tier: Tier, budget_bytes: u64) -> Self {
        Self { tier, budget_bytes, bytes: TierBytes::default() }
    }

    /// Whether the tier is a real GPU's memory and the plan puts bytes there.
    pub fn uses_gpu(&self) -> bool {
        self.tier.is_gpu() && self.used_bytes() > 0
    }

    /// Returns the bytes that the plan puts there, `u64::MAX` if they are more than that, as in no readable plan.
    pub fn used_bytes(&self) -> u64 {
        self.bytes.total()
    }
}

/// A dense tensor group of some layers and its tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DensePlacement {
    /// Which tensors.
    pub kind: DenseKind,
    /// The layer, or `None` for the embedding and the head.
    pub layer: Option<u32>,
    /// Where.
    pub tier: TierIdx,
}

/// The experts of one layer that are pinned on one tier.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pins {
    /// The tier that they are on.
    pub tier: TierIdx,
    /// The experts, ascending.
    pub experts: Vec<u32>,
}

/// One layer's routed experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlacement {
    /// The layer.
    pub layer: u32,
    /// Pinned experts: at most one entry per tier, no expert twice.
    pub pinned: Vec<Pins>,
    /// Slots that the pooled experts share.
    pub slots: u32,
    /// Where the slots are; of no meaning when there are none.
    pub slot_tier: TierIdx,
    /// How slots are refilled.
    pub policy: SlotPolicy,
}

impl LayerPlacement {
    /// The tier that missed experts are brought to: that of the slots, or of the staging buffers where there are none.
    pub fn brought_to(&self, staging: TierIdx) -> TierIdx {
        if self.slots > 0 { self.slot_tier } else { staging }
    }
}

/// How the plan was found and how good it is proven to be.
#[derive(Debug, Clone, PartialEq)]
pub struct SolverReport {
    /// What found or proved the choice: `microlp` (the integer program), `microlp prices, …` (its prices and bound, and
    /// which search), or the name of a rule for plans that no solver made.
    pub backend: String,
    /// `optimal`, `feasible`, `baseline`.
    pub status: String,
    /// Predicted seconds a token that the plan attains.
    pub objective_s: f64,
    /// No plan under the same budgets and cost model is faster than this, in seconds a token.
    pub bound_s: Option<f64>,
    /// `(objective − bound) / objective`.
    pub gap: Option<f64>,
    /// Wall time of the solve.
    pub solve_s: f64,
    /// What was made least, unless that is `objective_s` and nothing else was asked for.
    pub goal: Option<Goal>,
}

/// What a plan was asked to make least.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    /// `latency`, `throughput`, `cost`, `energy` or `memory`.
    pub objective: String,
    /// What the plan comes to.
    pub value: f64,
    /// The unit of the value, in words.
    pub unit: String,
    /// No plan under the same budgets and models comes to less; none if nothing is proven.
    pub bound: Option<f64>,
    /// Sequences that are decoded together.
    pub batch: Option<u32>,
    /// Tokens a second to reach.
    pub target_tok_s: Option<f64>,
}

/// The prediction, with its parts, in seconds a decoded token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Prediction {
    /// Tokens a second when decoding.
    pub decode_tok_s: f64,
    /// Tokens a second of a batch of 512 prompt tokens, whose weights are read once: a limit where
    /// [`prompt_gflops`](Self::prompt_gflops) does not say how fast products are computed.
    pub prompt_tok_s: f64,
    /// Fixed overheads.
    pub overhead_s: f64,
    /// Dense groups, by tier.
    pub dense_s: Vec<f64>,
    /// Chosen experts by tier when read in place or, for a block device, brought in: before overlap.
    pub expert_s: Vec<f64>,
    /// What the slowest of the overlapping expert paths costs, summed over layers.
    pub expert_critical_s: f64,
    /// Share of expert accesses served from pins or slots.
    pub hit_rate: f64,
    /// Bytes of weights that a decoded token reads, by tier.
    pub read_bytes: Vec<f64>,
    /// Every rate in it is declared, not measured.
    pub emulated: bool,
    /// Positions that the decoded token attends to, its own included; 0 where keys and values are not charged, as in
    /// plans of version 1 and 2.
    pub at: u32,
    /// Reading the keys and values of so many positions, and the recurrent state.
    pub kv_s: f64,
    /// Rate of products of many tokens with what lies on each tier, in 10⁹ floating-point operations a second, 0 where
    /// it is not known; empty where it is known of no tier.
    pub prompt_gflops: Vec<f64>,
}

impl Prediction {
    /// Seconds of a decoded token: the sum of the parts.
    pub fn token_s(&self) -> f64 {
        self.overhead_s + self.dense_s.iter().sum::<f64>() + self.kv_s + self.expert_critical_s
    }
}

/// Seconds of a decoded token's attention, in one layer, to `positions` positions that are cached on a tier: of the bytes
/// or of the products with them, whichever take longer. `gflops` is the rate of a prompt's products there; where it is 0,
/// not known, or the tier is emulated, bytes alone count.
pub fn attention_s(cache: &CacheShape, kv_type: KvType, tier: &Tier, gflops: f64, positions: u64) -> f64 {
    let moved = cache.moved_bytes(kv_type, positions, 1) as f64 / (tier.read_gbps * 1e9);
    let macs: f64 = cache.rows.iter().map(|rows| rows.token_macs(positions)).sum();
    let rate = ATTENTION_OF_A_TOKEN * gflops * 1e9;
    if rate > 0.0 && !tier.emulated { moved.max(2.0 * macs / rate) } else { moved }
}

/// A plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// A short name for tables and charts: `ilp`, `uniform`, `lru-only`.
    pub name: String,
    /// The model it is for.
    pub model: SourceId,
    /// The profile it was made from; none for the obvious plan.
    pub profile: Option<SourceId>,
    /// The machine it was made for.
    pub machine: SourceId,
    /// Fixed seconds a layer and a token, as the machine file gave them.
    pub layer_overhead_us: f64,
    /// See above.
    pub token_overhead_us: f64,
    /// Context length that the key and value cache is planned for.
    pub context: u32,
    /// Tier of what layers remember, keys, values and recurrent state, but for those whose attention is on a real GPU:
    /// that has its layers' own. So it is a real GPU only where real GPUs have all attention.
    pub kv_tier: TierIdx,
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Tier of staging buffers.
    pub staging_tier: TierIdx,
    /// Experts that staging can hold at once.
    pub staging_experts: u32,
    /// Fastest first.
    pub tiers: Vec<PlanTier>,
    /// Every dense group of the model once; a plan that was read has them by kind, then by layer.
    pub dense: Vec<DensePlacement>,
    /// Every layer with routed experts once, ascending. What is not pinned is pooled and lives on the last tier.
    pub layers: Vec<LayerPlacement>,
    /// How it was found.
    pub solver: SolverReport,
    /// What it should give.
    pub predicted: Prediction,
}

/// Reads a plan from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Placement, FormatError> {
    let text = PLACEMENT.open_toml(bytes, path)?;
    let plan = wire::decode(text).map_err(|what| FormatError::invalid(path, what))?;
    check::check(&plan).map_err(|violation| FormatError::invalid(path, violation.to_string()))?;
    Ok(plan)
}

/// Reads a plan.
pub fn read(path: &Path) -> Result<Placement, FormatError> {
    decode(&PLACEMENT.read(path)?, path)
}

impl Placement {
    /// The file as text: dense groups by kind and tier, experts as ranges, like layers together.
    pub fn encode(&self) -> String {
        write::encode(self)
    }

    /// Writes the file, or says why its content would not be readable again.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        check::check(self).map_err(|violation| FormatError::invalid(path, violation.to_string()))?;
        safely::write(path, self.encode().as_bytes())
    }

    /// The tier that an expert is pinned to, or `None` when it is pooled. `layer_pos` counts in [`Placement::layers`].
    pub fn pinned_tier(&self, layer_pos: usize, expert: u32) -> Option<TierIdx> {
        let layer = self.layers.get(layer_pos)?;
        layer.pinned.iter().find(|pins| pins.experts.binary_search(&expert).is_ok()).map(|pins| pins.tier)
    }

    /// The tier where pooled experts live: the last one.
    pub fn home_tier(&self) -> TierIdx {
        self.tiers.len().saturating_sub(1)
    }

    /// The tier of what a layer remembers whose attention is on the tier `attention`.
    pub fn cache_tier(&self, attention: TierIdx) -> TierIdx {
        let own = self.tiers.get(attention).is_some_and(|t| t.tier.is_gpu());
        if own { attention } else { self.kv_tier }
    }

    /// The tier of what each of so many layers remembers.
    pub fn cache_tiers(&self, n_layer: usize) -> Vec<TierIdx> {
        let mut tiers = vec![self.kv_tier; n_layer];
        for group in self.dense.iter().filter(|d| d.kind == DenseKind::Attention) {
            if let Some(tier) = group.layer.and_then(|layer| tiers.get_mut(layer as usize)) {
                *tier = self.cache_tier(group.tier);
            }
        }
        tiers
    }

    /// Bytes that a model's layers take on each tier for the planned context, `[tiers]`.
    pub fn cache_bytes(&self, shape: &ModelShape) -> Vec<u64> {
        let mut bytes = vec![0u64; self.tiers.len()];
        for (cache, tier) in shape.caches.iter().zip(self.cache_tiers(shape.caches.len())) {
            if let Some(sum) = bytes.get_mut(tier) {
                *sum = sum.saturating_add(cache.context_bytes(self.kv_type, self.context));
            }
        }
        bytes
    }

    /// [`attention_s`] of all layers, each where it is.
    pub fn attention_s(&self, shape: &ModelShape, positions: u64) -> f64 {
        let of = |(cache, at): (&CacheShape, TierIdx)| {
            let rate = self.predicted.prompt_gflops.get(at).copied().unwrap_or(0.0);
            self.tiers.get(at).map_or(0.0, |t| attention_s(cache, self.kv_type, &t.tier, rate, positions))
        };
        shape.caches.iter().zip(self.cache_tiers(shape.caches.len())).map(of).sum()
    }

    /// The predicted time of keys and values by tier, `[tiers]`: shared out by the time that their bytes take there.
    pub fn kv_s_by_tier(&self) -> Vec<f64> {
        let mut parts: Vec<f64> = self.tiers.iter().map(|t| t.bytes.kv as f64 / t.tier.read_gbps).collect();
        let sum: f64 = parts.iter().sum();
        if sum > 0.0 {
            parts.iter_mut().for_each(|part| *part *= self.predicted.kv_s / sum);
        } else if let Some(part) = parts.get_mut(self.kv_tier) {
            *part = self.predicted.kv_s;
        }
        parts
    }

    /// The prediction for a token that attends to `at` positions. A prediction that does not charge keys and values stays
    /// as it is.
    pub fn predicted_at(&self, shape: &ModelShape, at: u32) -> Prediction {
        let mut predicted = self.predicted.clone();
        if predicted.at > 0 && at > 0 {
            (predicted.at, predicted.kv_s) = (at, self.attention_s(shape, at.into()));
            predicted.decode_tok_s = 1.0 / predicted.token_s().max(f64::MIN_POSITIVE);
        }
        predicted
    }

    /// Refuses a plan that was made for another model, naming both.
    pub fn check_model(&self, id: &SourceId, path: &Path) -> Result<(), FormatError> {
        super::check_model(
            &self.model,
            id,
            "plan",
            "give the plan's own model, or run `tier-plan solve` for this one",
            path,
        )
    }
}
