//! Predicts a step that decodes one token of each of several texts, as the engine takes it.
//!
//! The texts' tokens go through the layers together, in passes of up to [`PASS_ROWS`] rows.
//!
//! - **Once per pass**: the overhead of a token, the head, and each *distinct* expert that any row
//!   chose. An expert is read once and computed for all of its rows.
//! - **Once per micro-batch** of [`BATCH`] rows: the overhead of a layer, and its dense weights.
//! - **Once per row**: the row of the embedding, the text's own keys and values, and its recurrent
//!   state, which is read and written back.
//!
//! # Reads and arithmetic
//! A matrix that a step uses for `r` rows takes the longer of its read and of `2 · values · (r + h)
//! / gflops`. Unpacking the weights, and what of their read arithmetic does not hide, takes as long
//! as `h` rows ([`half_rows`]). For one row the read alone counts: the rate of a tier was measured
//! with the arithmetic of one row. Where the machine file has no rate of arithmetic, and on emulated
//! tiers, whose time is declared, reads alone count.
//!
//! # Distinct experts
//! Expert `e` is chosen with probability `q = 1 − (1 − share)^rows`, as if texts were independent,
//! and for one row alone with `rows · share · (1 − share)^(rows − 1)`. [`step_s`] takes the paths
//! of an expert stage to have their expected numbers of experts, and a full set of slots to spare
//! its part of the pooled ones. The solver prices columns so. [`super::steps`] replays tokens
//! instead, which knows how long experts stay in slots.

use super::{BATCH, ExpertStage, FixedTimes, group_read_s, home_in_place, read_s};
use crate::profile::prefetch::Prefetch;
use crate::profile::{Evidence, Judged, LayerEvidence};
use tier_plan_runtime::formats::machine::{FEW_ROWS, Tier, TierKind};
use tier_plan_runtime::formats::placement::{LayerPlacement, PerTier, Pins, Placement, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, DenseShape, ExpertShape, ModelShape};
use tier_plan_runtime::options::DEFAULT_BATCH;

/// Rows of a step that go through the layers together, at most.
pub const PASS_ROWS: u32 = DEFAULT_BATCH as u32;

/// Rows at which a matmul runs at half of the full rate, at most, and where the rate of
/// [`FEW_ROWS`] rows is not known. Measured with AMX: 358, 405 and 458 GFLOP/s with 14, 32 and 128
/// rows.
pub const HALF_ROWS: f64 = 4.0;

/// Matmul rates by tier, in 10⁹ floating-point operations per second: 0 where one is not known, and
/// empty where none is.
#[derive(Debug, Clone, Copy)]
pub struct MatmulRates<'a> {
    /// With many rows.
    pub many: &'a PerTier<f64>,
    /// With [`FEW_ROWS`], whose weights come from memory.
    pub few: &'a PerTier<f64>,
}

impl<'a> MatmulRates<'a> {
    /// Returns the rates that a plan was made with.
    pub fn of_plan(plan: &'a Placement) -> Self {
        Self {
            many: &plan.predicted.prompt_gflops,
            few: &plan.predicted.few_gflops,
        }
    }

    /// Returns the rows at which a matmul on a tier runs at half of its full rate.
    pub fn half_rows(self, at: TierIdx) -> f64 {
        let of = |rates: &PerTier<f64>| rates.get(at).copied().unwrap_or(0.0);
        half_rows(of(self.many), of(self.few))
    }
}

/// Returns the rows at which a matmul runs at half of the full rate: the `h` of `few = many ·
/// FEW_ROWS / (FEW_ROWS + h)`, from 0 to [`HALF_ROWS`], where both rates are known (not 0).
///
/// A larger `h` would come of a memory that is slow for this arithmetic, so that few rows wait for
/// their weights. More rows wait no longer.
pub fn half_rows(many_gflops: f64, few_gflops: f64) -> f64 {
    if many_gflops > 0.0 && few_gflops > 0.0 {
        (f64::from(FEW_ROWS) * (many_gflops / few_gflops - 1.0)).clamp(0.0, HALF_ROWS)
    } else {
        HALF_ROWS
    }
}

/// The rows of a step, and how fast tiers do their arithmetic.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Texts that each add one token.
    pub texts: u32,
    /// Matmul rate with many rows, in 10⁹ floating-point operations per second; 0 where only reads
    /// count.
    gflops: PerTier<f64>,
    /// By tier, the rows at which a matmul runs at half of that rate.
    half_rows: PerTier<f64>,
}

impl Step {
    /// Makes the step of some texts on tiers with these rates.
    pub fn new(texts: u32, tiers: &PerTier<Tier>, rates: MatmulRates<'_>) -> Self {
        let rate = |(at, tier): (TierIdx, &Tier)| {
            let known = rates.many.get(at).copied().filter(|_| !tier.emulated);
            known.filter(|rate| *rate > 0.0).unwrap_or(0.0)
        };
        Self {
            texts: texts.max(1),
            gflops: tiers.enumerate().map(rate).collect(),
            half_rows: tiers.indices().map(|at| rates.half_rows(at)).collect(),
        }
    }

    /// Returns the step of a plan.
    pub fn of_plan(plan: &Placement, texts: u32) -> Self {
        let tiers = plan.tiers.iter().map(|t| t.tier.clone()).collect();
        Self::new(texts, &tiers, MatmulRates::of_plan(plan))
    }

    /// Whether arithmetic counts on any tier.
    pub fn has_arithmetic(&self) -> bool {
        self.gflops.iter().any(|rate| *rate > 0.0)
    }

    /// Returns the number of passes.
    pub fn passes(&self) -> f64 {
        f64::from(self.texts.div_ceil(PASS_ROWS))
    }

    /// Returns the rows of a pass, a mean where there are several.
    pub fn pass_rows(&self) -> f64 {
        f64::from(self.texts) / self.passes()
    }

    /// Returns the number of micro-batches of all passes.
    pub fn micro_batches(&self) -> f64 {
        self.passes() * (self.pass_rows() / f64::from(BATCH)).ceil()
    }

    /// Returns the seconds of a matmul of `macs` values with some rows; 0 for one, and where the
    /// rate is unknown.
    fn arithmetic_s(&self, tier: TierIdx, macs: u64, rows: f64) -> f64 {
        match self.gflops.get(tier) {
            Some(&gflops) if gflops > 0.0 && rows > 1.0 => {
                2.0 * macs as f64 * (rows + self.half_rows[tier]) / (gflops * 1e9)
            }
            _ => 0.0,
        }
    }

    /// Returns the seconds of a dense group on a tier.
    pub fn dense_s(&self, group: &DenseShape, at: TierIdx, tier: &Tier) -> f64 {
        let read = read_s(tier, group.token_bytes as f64);
        let uses = match group.kind {
            DenseKind::Embedding => return f64::from(self.texts) * read,
            // A pass names the rows of all of its texts at once.
            DenseKind::TokenTable => {
                let latency = group_read_s(group.kind, tier, 0.0);
                return self.passes() * latency + f64::from(self.texts) * read;
            }
            DenseKind::Head => self.passes(),
            _ => self.micro_batches(),
        };
        let rows = f64::from(self.texts) / uses;
        uses * read.max(self.arithmetic_s(at, group.macs, rows))
    }

    /// Returns the overhead seconds of a step: those of its passes and of its layers.
    pub fn overhead_s(&self, n_layer: u32, layer_us: f64, token_us: f64) -> f64 {
        let layers = self.micro_batches() * f64::from(n_layer);
        (self.passes() * token_us + layers * layer_us) * 1e-6
    }
}

/// Expected use of experts by the rows of a pass.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Use {
    /// Experts that any row uses.
    pub experts: f64,
    /// Experts that exactly one row uses.
    pub once: f64,
    /// Uses of all rows.
    pub rows: f64,
}

impl Use {
    /// Returns the use of an expert that each of `rows` independent rows chooses with probability
    /// `share`.
    pub fn of(share: f64, rows: f64) -> Self {
        let share = share.clamp(0.0, 1.0);
        Self {
            experts: 1.0 - (1.0 - share).powf(rows),
            once: rows * share * (1.0 - share).powf(rows - 1.0),
            rows: rows * share,
        }
    }

    /// Returns the use of an expert that this many rows have chosen.
    pub fn counted(rows: u32) -> Self {
        Self {
            experts: f64::from(u8::from(rows > 0)),
            once: f64::from(u8::from(rows == 1)),
            rows: f64::from(rows),
        }
    }

    /// Returns a part of the use.
    #[must_use]
    pub fn part(self, part: f64) -> Self {
        Self {
            experts: self.experts * part,
            once: self.once * part,
            rows: self.rows * part,
        }
    }

    fn map(self, more: Self, with: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            experts: with(self.experts, more.experts),
            once: with(self.once, more.once),
            rows: with(self.rows, more.rows),
        }
    }
}

impl std::ops::Add for Use {
    type Output = Self;

    fn add(self, more: Self) -> Self {
        self.map(more, |a, b| a + b)
    }
}

impl std::ops::AddAssign for Use {
    fn add_assign(&mut self, more: Self) {
        *self = *self + more;
    }
}

impl std::ops::Sub for Use {
    type Output = Self;

    fn sub(self, less: Self) -> Self {
        self.map(less, |a, b| a - b)
    }
}

/// Returns `[n_expert]` expected uses of a layer's experts by a pass of some rows.
pub fn touched(layer: &LayerEvidence, rows: f64) -> Vec<Use> {
    let share = match &layer.judged {
        Judged::Recorded(trace) => trace.decode_share(),
        Judged::Uniform => layer.share.clone(),
    };
    share.iter().map(|&share| Use::of(share, rows)).collect()
}

/// Where the experts that a pass uses are.
#[derive(Debug, Clone)]
pub struct Spread {
    /// Expected use of experts pinned to each tier.
    pub pinned: PerTier<Use>,
    /// Expected use of pooled experts.
    pub pooled: Use,
    /// Pooled experts, used or not.
    pub n_pooled: f64,
    /// Slots of the pooled experts.
    pub slots: u32,
    /// Tier of the slots.
    pub slot_tier: TierIdx,
}

/// The expert stage of a layer on given tiers, for the rows of a pass.
#[derive(Debug, Clone)]
pub struct PassStage {
    reads: ExpertStage,
    /// Seconds of one row beside others, by tier.
    row_s: PerTier<f64>,
    /// Rows that an expert costs beside those that use it, by tier.
    half_rows: PerTier<f64>,
    /// Seconds of an expert that one row alone uses, by tier of the CPU with a known rate.
    once_s: PerTier<f64>,
    is_vram: PerTier<bool>,
    in_place: bool,
    staging: TierIdx,
}

impl PassStage {
    /// Makes the stage of a layer; missed experts without a slot go to the tier `staging`.
    pub fn new(step: &Step, tiers: &PerTier<Tier>, layer: &ExpertShape, staging: TierIdx) -> Self {
        let rate = |at: TierIdx| step.gflops.get(at).copied().filter(|rate| *rate > 0.0);
        let row_s = |at: TierIdx| {
            rate(at).map_or(0.0, |gflops| {
                2.0 * layer.expert_macs as f64 / (gflops * 1e9)
            })
        };
        let once_s =
            |at: TierIdx| rate(at).map_or(0.0, |_| read_s(&tiers[at], layer.expert_bytes as f64));
        Self {
            // A step of several texts is not prefetched one expert at a time.
            reads: ExpertStage::new(tiers, layer.expert_bytes, Prefetch::default()),
            row_s: tiers.indices().map(row_s).collect(),
            half_rows: step.half_rows.clone(),
            once_s: tiers.indices().map(once_s).collect(),
            is_vram: tiers.iter().map(|t| t.kind == TierKind::Vram).collect(),
            in_place: home_in_place(tiers),
            staging,
        }
    }

    /// Whether experts on the last tier compute in place.
    pub fn in_place(&self) -> bool {
        self.in_place
    }

    /// Returns the tier of the staging buffers.
    pub fn staging(&self) -> TierIdx {
        self.staging
    }

    /// Returns the seconds of a pass with expected numbers of experts.
    pub fn seconds(&self, spread: &Spread) -> f64 {
        let Spread {
            slots, slot_tier, ..
        } = *spread;
        let to = if slots > 0 { slot_tier } else { self.staging };
        let mut on = spread.pinned.clone();
        let home = on.len() - 1;
        let mut missed = 0.0;
        if slots == 0 && self.in_place {
            on[TierIdx::new(home)] += spread.pooled;
        } else {
            let hits = (f64::from(slots) / spread.n_pooled.max(1.0)).min(1.0);
            missed = spread.pooled.experts.max(0.0) * (1.0 - hits);
            on[to] += spread.pooled;
        }
        self.busiest_s(&on, missed, to)
    }

    /// Returns the seconds of a pass whose experts compute on these tiers, and of which `missed`
    /// are brought to the tier `to`.
    ///
    /// The tiers' reads overlap each other and the transfers. So do the processors: the CPU does
    /// the arithmetic of all of its tiers, a GPU that of its own.
    pub fn busiest_s(&self, on: &PerTier<Use>, missed: f64, to: TierIdx) -> f64 {
        let experts = on.iter().map(|used| used.experts.max(0.0));
        let reads: Vec<f64> = experts.chain([missed]).collect();
        let (mut cpu_s, mut longest) = (0.0, self.reads.seconds(&reads, to));
        for (at, used) in on.enumerate() {
            let shared = used.experts - used.once;
            let rows = (used.rows - used.once + self.half_rows[at] * shared).max(0.0);
            let seconds = rows * self.row_s[at];
            if self.is_vram[at] {
                longest = longest.max(seconds);
            } else {
                cpu_s += seconds + used.once.max(0.0) * self.once_s[at];
            }
        }
        longest.max(cpu_s)
    }
}

/// Returns the seconds of a step that do not depend on which experts it uses.
pub fn dense_step_s(plan: &Placement, shape: &ModelShape, step: &Step) -> f64 {
    let fixed = FixedTimes::of(plan, shape);
    let overhead_s = step.overhead_s(shape.n_layer, fixed.layer_us, plan.token_overhead_us);
    let launches: f64 = fixed.dense_s.iter().sum();
    let cache_s = f64::from(step.texts) * plan.predicted.kv_s;
    let mut total = overhead_s + step.micro_batches() * launches + cache_s;
    for dense in &plan.dense {
        let placed = |g: &&DenseShape| (g.kind, g.layer) == (dense.kind, dense.layer);
        for group in shape.dense.iter().filter(placed) {
            total += step.dense_s(group, dense.tier, &fixed.tiers[dense.tier]);
        }
    }
    total
}

/// Returns where the experts that a pass of `rows` rows uses are expected to be.
pub fn spread(
    layer: &LayerPlacement,
    evidence: &LayerEvidence,
    rows: f64,
    n_tiers: usize,
) -> Spread {
    let touched = touched(evidence, rows);
    let mut spread = Spread {
        pinned: PerTier::from_fn(n_tiers, |_| Use::default()),
        pooled: touched.iter().fold(Use::default(), |sum, &used| sum + used),
        n_pooled: touched.len() as f64,
        slots: layer.slots,
        slot_tier: layer.slot_tier,
    };
    for Pins {
        tier,
        experts: pins,
    } in &layer.pinned
    {
        for &used in pins.iter().filter_map(|&e| touched.get(e as usize)) {
            spread.pinned[*tier] += used;
            spread.pooled = spread.pooled - used;
        }
        spread.n_pooled -= pins.len() as f64;
    }
    spread
}

/// Returns the seconds of one step of a plan over `texts` texts, with expected numbers of experts.
pub fn step_s(plan: &Placement, shape: &ModelShape, evidence: &Evidence, texts: u32) -> f64 {
    let step = Step::of_plan(plan, texts);
    let tiers = FixedTimes::of(plan, shape).tiers;
    let mut total = dense_step_s(plan, shape, &step);
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let spread = spread(layer, evidence, step.pass_rows(), tiers.len());
        let stage = PassStage::new(&step, &tiers, &evidence.shape, plan.staging_tier);
        total += step.passes() * stage.seconds(&spread);
    }
    total
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
