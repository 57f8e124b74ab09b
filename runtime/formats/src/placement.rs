//! `placement.toml`: where every tensor lives, and what that is predicted to give.

mod check;
mod streaming;
mod tally;
mod validate;
mod violation;
mod wire;
mod write;

#[cfg(test)]
mod tests;

pub use crate::copies::ExpertCopy;
pub use crate::tier_idx::{PerTier, TierIdx};
pub use streaming::{Division, StreamTimes, Streaming};
pub use tally::TierBytes;
pub use validate::validate;
pub use violation::Violation;

use super::copies;
use super::kind::PLACEMENT;
use super::machine::{DriveIo, Tier};
use crate::model::kv::{CacheRoom, KvType};
use crate::model::shape::{CacheShape, DenseKind, ModelShape};
use crate::source_id::SourceId;
use crate::{FormatError, safely};
use std::collections::BTreeMap;
use std::path::Path;

/// Longest half-life of a policy, in tokens.
pub const MAX_HALF_LIFE: u32 = 1 << 16;

/// Largest weight of a recent use relative to one in the long memory.
pub const MAX_RECENT_WEIGHT: u32 = 1 << 10;

/// Arithmetic rate of one token's attention, as a share of the matmul rate of prompts. Measured
/// with AMX: 76 of 463 GFLOP/s, eight query heads per KV head.
pub const ATTENTION_OF_A_TOKEN: f64 = 0.16;

/// The replacement policy of a layer's slots.
///
/// ```
/// use tier_plan_formats::placement::SlotPolicy;
///
/// let policy = SlotPolicy::Lfu { half_life: 64 };
/// assert_eq!(policy.name(), "lfu");
/// assert_eq!(policy.to_string(), "lfu, half-life 64");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotPolicy {
    /// Least recently used: every used expert gets a slot, and the one whose last use is longest
    /// ago is evicted.
    Lru,
    /// Least frequently used: the experts with the most recent uses have the slots; one with fewer
    /// is not admitted.
    Lfu {
        /// Tokens after which a use counts half, 1 to [`MAX_HALF_LIFE`].
        half_life: u32,
    },
    /// Least frequently used, with a long and a short memory of uses added up.
    Adaptive {
        /// Tokens after which a use counts half in the long memory, 1 to [`MAX_HALF_LIFE`].
        half_life: u32,
        /// Tokens after which a use counts half in the short memory, 1 to [`MAX_HALF_LIFE`].
        recent_half_life: u32,
        /// Weight of a use in the short memory, relative to 1 in the long one; 0 to
        /// [`MAX_RECENT_WEIGHT`].
        recent_weight: u32,
    },
}

impl SlotPolicy {
    /// Returns the name in plans.
    pub fn name(self) -> &'static str {
        match self {
            SlotPolicy::Lru => "lru",
            SlotPolicy::Lfu { .. } => "lfu",
            SlotPolicy::Adaptive { .. } => "adaptive",
        }
    }

    /// Returns the first version of plans that has the policy.
    fn since_version(self) -> u64 {
        match self {
            SlotPolicy::Lru => 1,
            SlotPolicy::Lfu { .. } | SlotPolicy::Adaptive { .. } => 3,
        }
    }
}

impl std::fmt::Display for SlotPolicy {
    /// Writes the name with its parameters, for tables and sentences.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SlotPolicy::Lru => f.write_str("lru"),
            SlotPolicy::Lfu { half_life } => write!(f, "lfu, half-life {half_life}"),
            SlotPolicy::Adaptive {
                half_life,
                recent_half_life,
                recent_weight,
            } => {
                write!(
                    f,
                    "adaptive, half-life {half_life}, recent {recent_half_life} at weight {recent_weight}"
                )
            }
        }
    }
}

/// A tier of a plan: what it may hold, and how the plan fills it.
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
    /// Returns a tier of which the plan may use `budget_bytes` and uses none yet.
    pub fn new(tier: Tier, budget_bytes: u64) -> Self {
        Self {
            tier,
            budget_bytes,
            bytes: TierBytes::default(),
        }
    }

    /// Whether the tier is a real GPU's memory and the plan puts bytes there.
    pub fn uses_gpu(&self) -> bool {
        self.tier.is_gpu() && self.used_bytes() > 0
    }

    /// Returns the bytes that the plan puts there, `u64::MAX` if they are more than that, as in no
    /// readable plan.
    pub fn used_bytes(&self) -> u64 {
        self.bytes.total()
    }
}

/// A dense tensor group of some layers and its tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DensePlacement {
    /// The kind of tensors.
    pub kind: DenseKind,
    /// The layer, or `None` for the embedding and the head.
    pub layer: Option<u32>,
    /// The tier that they are on.
    pub tier: TierIdx,
}

/// The experts of one layer that are pinned on one tier.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pins {
    /// The tier that they are on.
    pub tier: TierIdx,
    /// The pinned experts, ascending.
    pub experts: Vec<u32>,
}

/// One layer's routed experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlacement {
    /// Number of the layer.
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
    /// Returns the tier that missed experts are transferred to: that of the slots, or of the
    /// staging buffers where there are no slots.
    pub fn brought_to(&self, staging: TierIdx) -> TierIdx {
        if self.slots > 0 {
            self.slot_tier
        } else {
            staging
        }
    }
}

/// How the plan was found and how good it is proven to be.
#[derive(Debug, Clone, PartialEq)]
pub struct SolverReport {
    /// What found or proved the choice: `microlp` (the integer program), `microlp prices, …` (its
    /// prices and bound, and which search), or the name of a rule for plans that no solver made.
    pub backend: String,
    /// `optimal`, `feasible`, `baseline`.
    pub status: String,
    /// Predicted seconds per token of the plan.
    pub objective_s: f64,
    /// Lower bound on the seconds per token of any plan under these budgets and this cost model.
    pub bound_s: Option<f64>,
    /// `(objective − bound) / objective`.
    pub gap: Option<f64>,
    /// Wall time of the solve.
    pub solve_s: f64,
    /// The minimized quantity, unless it is `objective_s` without further constraints.
    pub goal: Option<Goal>,
}

/// The quantity that a plan minimizes.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    /// `latency`, `throughput`, `cost`, `energy` or `memory`.
    pub objective: String,
    /// Value that the plan attains.
    pub value: f64,
    /// Unit of the value, `s per token`.
    pub unit: String,
    /// Lower bound on the value of any plan under these budgets and models; none if nothing is
    /// proven.
    pub bound: Option<f64>,
    /// Sequences decoded together.
    pub batch: Option<u32>,
    /// Tokens per second to reach.
    pub target_tok_s: Option<f64>,
}

/// The predicted speed, with its parts in seconds per decoded token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Prediction {
    /// Tokens per second when decoding.
    pub decode_tok_s: f64,
    /// Tokens per second of a batch of 512 prompt tokens, whose weights are read once. An upper
    /// limit where [`prompt_gflops`](Self::prompt_gflops) has no matmul rates.
    pub prompt_tok_s: f64,
    /// Fixed overheads per token.
    pub overhead_s: f64,
    /// Dense groups, by tier.
    pub dense_s: PerTier<f64>,
    /// Chosen experts by tier, before overlap: read in place or, from a block device, into memory.
    pub expert_s: PerTier<f64>,
    /// What the slowest of the overlapping expert paths costs, summed over layers.
    pub expert_critical_s: f64,
    /// Share of expert accesses served from pins or slots.
    pub hit_rate: f64,
    /// Bytes of weights that a decoded token reads, by tier.
    pub read_bytes: PerTier<f64>,
    /// Whether its rates are declared, not measured.
    pub emulated: bool,
    /// Positions that the decoded token attends to, its own included; 0 where the KV cache is not
    /// charged, as in plans of version 1 and 2.
    pub at: u32,
    /// Attention to the KV cache of that many positions, and the recurrent state.
    pub kv_s: f64,
    /// Matmul rate of prompts by tier, in 10⁹ floating-point operations per second, 0 where it is
    /// not known; empty where it is known of no tier.
    pub prompt_gflops: PerTier<f64>,
    /// Matmul rate of [`FEW_ROWS`](crate::machine::FEW_ROWS) rows by tier, in the same unit; 0 and
    /// empty likewise. Run records, whose predictions are never made anew, leave it out.
    pub few_gflops: PerTier<f64>,
}

impl Prediction {
    /// Returns the seconds per decoded token: the sum of the parts.
    pub fn token_s(&self) -> f64 {
        self.overhead_s + self.dense_s.iter().sum::<f64>() + self.kv_s + self.expert_critical_s
    }
}

/// Returns the seconds of a decoded token's attention, in one layer, to `positions` positions
/// cached on a tier: of reading or of arithmetic, whichever takes longer.
///
/// `gflops` is the matmul rate of prompts there. Where it is 0, not known, or the tier is emulated,
/// only reading counts.
pub fn attention_s(
    cache: &CacheShape,
    kv_type: KvType,
    tier: &Tier,
    gflops: f64,
    positions: u64,
) -> f64 {
    let moved = cache.moved_bytes(kv_type, positions, 1) as f64 / (tier.read_gbps * 1e9);
    let macs: f64 = cache
        .rows
        .iter()
        .map(|rows| rows.token_macs(positions))
        .sum();
    let rate = ATTENTION_OF_A_TOKEN * gflops * 1e9;
    if rate > 0.0 && !tier.emulated {
        moved.max(2.0 * macs / rate)
    } else {
        moved
    }
}

/// A plan: where every tensor of a model lives, and the predicted speed.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// A short name for tables and charts: `ilp`, `uniform`, `lru-only`.
    pub name: String,
    /// The model it is for.
    pub model: SourceId,
    /// The profile that it was made from; none for a default plan.
    pub profile: Option<SourceId>,
    /// The machine it was made for.
    pub machine: SourceId,
    /// Fixed microseconds per layer, as the machine file gave them.
    pub layer_overhead_us: f64,
    /// Fixed microseconds per token, as the machine file gave them.
    pub token_overhead_us: f64,
    /// Context length of a text that the KV cache is planned for, in tokens.
    pub context: u32,
    /// Texts at once that the KV cache is planned for.
    pub sequences: u32,
    /// Recurrent states and pages of windows that are kept beside those of the texts, for going
    /// back to.
    pub checkpoints: u32,
    /// Tokens of a batch whose rows layers with a sliding window hold beside the windows; none where
    /// such layers hold all positions, as in plans of versions before 7.
    pub window_chunk: Option<u32>,
    /// Tier of the KV cache and recurrent state. Layers whose attention is on a real GPU have
    /// theirs there instead, unless they are among [`host_kv`](Self::host_kv). So `kv_tier` is a
    /// real GPU only where real GPUs have all attention and all of its cache.
    pub kv_tier: TierIdx,
    /// Layers whose attention is on a real GPU while their KV cache is on [`kv_tier`](Self::kv_tier),
    /// ascending: the GPU multiplies their matrices, and the CPU attends to the cache.
    pub host_kv: Vec<u32>,
    /// Storage type of the KV cache.
    pub kv_type: KvType,
    /// Tier of staging buffers.
    pub staging_tier: TierIdx,
    /// Experts that staging can hold at once.
    pub staging_experts: u32,
    /// The tiers, fastest first.
    pub tiers: PerTier<PlanTier>,
    /// How experts are read from the last tier.
    pub reads: HomeReads,
    /// Which experts of main memory a GPU computes for a token, if any.
    pub streaming: Option<Streaming>,
    /// Every dense group of the model once; a plan that was read has them by kind, then by layer.
    pub dense: Vec<DensePlacement>,
    /// Every layer with routed experts once, ascending. What is not pinned is pooled and lives on
    /// the last tier.
    pub layers: Vec<LayerPlacement>,
    /// How the plan was found.
    pub solver: SolverReport,
    /// The predicted speed.
    pub predicted: Prediction,
}

/// How experts are read from the last tier.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HomeReads {
    /// With direct I/O or through the page cache; none leaves it to the program.
    pub io: Option<DriveIo>,
    /// Copies that reads are shared with, each on a drive of its own.
    pub copies: Vec<ExpertCopy>,
}

impl HomeReads {
    /// Returns the part of the last tier's rate that the model's own drive has.
    pub fn own_share(&self) -> f64 {
        copies::own_share(&self.copies)
    }
}

/// Reads a plan from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Placement, FormatError> {
    let text = PLACEMENT.open_toml(bytes, path)?;
    let plan = wire::decode(text).map_err(|what| FormatError::invalid(path, what))?;
    check::check(&plan).map_err(|violation| FormatError::invalid(path, violation.to_string()))?;
    Ok(plan)
}

/// Reads a plan from its file.
///
/// ```
/// use std::path::Path;
/// use tier_plan_formats::placement;
///
/// let path = Path::new("../../tests/data/formats/placement.v7.toml");
/// let plan = placement::read(path)?;
/// assert!(plan.tiers.iter().all(|tier| tier.used_bytes() <= tier.budget_bytes));
/// assert_eq!(placement::decode(plan.encode().as_bytes(), path)?, plan);
/// # Ok::<(), tier_plan_formats::FormatError>(())
/// ```
///
/// # Errors
/// When the file can't be read, is another kind of file, is newer than this program, or breaks a
/// rule of [`Violation`].
pub fn read(path: &Path) -> Result<Placement, FormatError> {
    decode(&PLACEMENT.read(path)?, path)
}

impl Placement {
    /// Encodes the file as text: dense groups by kind and tier, experts as ranges, like layers
    /// together.
    pub fn encode(&self) -> String {
        write::encode(self)
    }

    /// Writes the file, or says why its content would not be readable again.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        check::check(self)
            .map_err(|violation| FormatError::invalid(path, violation.to_string()))?;
        safely::write(path, self.encode().as_bytes())
    }

    /// Returns the tier that an expert is pinned to, or `None` when it is pooled. `layer_pos` is an
    /// index into [`Placement::layers`].
    pub fn pinned_tier(&self, layer_pos: usize, expert: u32) -> Option<TierIdx> {
        let layer = self.layers.get(layer_pos)?;
        layer
            .pinned
            .iter()
            .find(|pins| pins.experts.binary_search(&expert).is_ok())
            .map(|pins| pins.tier)
    }

    /// Returns the tier where pooled experts live: the last one.
    pub fn home_tier(&self) -> TierIdx {
        self.tiers.last_idx().unwrap_or(TierIdx::FIRST)
    }

    /// Returns the tier of the KV cache of the layer that a group of attention is of.
    pub fn cache_tier(&self, attention: &DensePlacement) -> TierIdx {
        let tier = attention.tier;
        let on_gpu = self.tiers.get(tier).is_some_and(|t| t.tier.is_gpu());
        if on_gpu && !attention.layer.is_some_and(|l| self.has_host_kv(l)) {
            tier
        } else {
            self.kv_tier
        }
    }

    /// Returns whether the KV cache of a layer is kept off the GPU that has its attention.
    pub fn has_host_kv(&self, layer: u32) -> bool {
        self.host_kv.binary_search(&layer).is_ok()
    }

    /// Returns the tier of each layer's KV cache and recurrent state, `[n_layer]`.
    pub fn cache_tiers(&self, n_layer: usize) -> Vec<TierIdx> {
        let mut tiers = vec![self.kv_tier; n_layer];
        for group in self.dense.iter().filter(|d| d.kind == DenseKind::Attention) {
            if let Some(tier) = group.layer.and_then(|layer| tiers.get_mut(layer as usize)) {
                *tier = self.cache_tier(group);
            }
        }
        tiers
    }

    /// Returns what the KV cache has room for.
    pub fn room(&self) -> CacheRoom {
        CacheRoom {
            context: self.context,
            sequences: self.sequences,
            checkpoints: self.checkpoints,
            window_chunk: self.window_chunk,
        }
    }

    /// Returns the figures of tiers that are above 0, by the tiers' names.
    pub fn by_name(&self, figures: &PerTier<f64>) -> BTreeMap<String, f64> {
        let known = self.tiers.iter().zip(figures).filter(|(_, x)| **x > 0.0);
        known.map(|(t, x)| (t.tier.name.clone(), *x)).collect()
    }

    /// Returns what a layer's KV cache on a tier has room for. On a GPU it has all positions of a
    /// text, whatever its window.
    pub fn room_on(&self, tier: TierIdx) -> CacheRoom {
        let room = self.room();
        match self.tiers.get(tier) {
            Some(t) if t.tier.is_gpu() => room.whole(),
            _ => room,
        }
    }

    /// Returns the bytes of KV cache and recurrent states on each tier for the planned texts.
    pub fn cache_bytes(&self, shape: &ModelShape) -> PerTier<u64> {
        let mut bytes = PerTier::from_fn(self.tiers.len(), |_| 0u64);
        for (cache, tier) in shape
            .caches
            .iter()
            .zip(self.cache_tiers(shape.caches.len()))
        {
            if let Some(sum) = bytes.get_mut(tier) {
                *sum = sum.saturating_add(cache.bytes(self.kv_type, self.room_on(tier)));
            }
        }
        bytes
    }

    /// Returns [`attention_s`] summed over all layers, each on the tier of its KV cache.
    pub fn attention_s(&self, shape: &ModelShape, positions: u64) -> f64 {
        let of = |(cache, at): (&CacheShape, TierIdx)| {
            let rate = self.predicted.prompt_gflops.get(at).copied().unwrap_or(0.0);
            self.tiers.get(at).map_or(0.0, |t| {
                attention_s(cache, self.kv_type, &t.tier, rate, positions)
            })
        };
        shape
            .caches
            .iter()
            .zip(self.cache_tiers(shape.caches.len()))
            .map(of)
            .sum()
    }

    /// Returns the predicted time of the KV cache by tier: split by the time that its bytes take
    /// there.
    pub fn kv_s_by_tier(&self) -> PerTier<f64> {
        let mut parts: PerTier<f64> = self
            .tiers
            .iter()
            .map(|t| t.bytes.kv as f64 / t.tier.read_gbps)
            .collect();
        let sum: f64 = parts.iter().sum();
        if sum > 0.0 {
            parts
                .iter_mut()
                .for_each(|part| *part *= self.predicted.kv_s / sum);
        } else if let Some(part) = parts.get_mut(self.kv_tier) {
            *part = self.predicted.kv_s;
        }
        parts
    }

    /// Returns the prediction for a token that attends to `at` positions. A prediction that does
    /// not charge the KV cache stays as it is.
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
