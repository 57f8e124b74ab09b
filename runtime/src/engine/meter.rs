//! The meter of a pass: what its stages are counted as, and how long they must take on emulated
//! tiers.
//!
//! Counting and pacing belong together, as both need the bytes that a stage reads from each tier.

use super::batch::{Batch, Phase};
use super::sequences::WHOLE;
use crate::cancel::Cancel;
use crate::experts::counters::{Counters, PrefetchCount};
use crate::experts::store::Step;
use crate::layers::index::{Layer, LayerIdx, MoeIdx};
use crate::layers::mixer::CacheReads;
use crate::tiers::file::DriveUse;
use crate::tiers::pace::{Missed, Pacer, StageBytes, settle};
use std::ops::Range;
use std::time::{Duration, Instant};
use tier_plan_formats::model::Model;
use tier_plan_formats::model::shape::{DenseKind, ExpertShape, ModelShape};
use tier_plan_formats::placement::{PerTier, Placement, TierIdx};

/// Clocks, counters and pacing of an engine.
pub(crate) struct Meter {
    counters: Counters,
    /// What the reads of experts had brought when the last step ended.
    drive: DriveUse,
    /// Present where a tier is emulated.
    pacer: Option<Pacer>,
    /// By layer.
    dense: Vec<DenseTraffic>,
    /// By MoE layer: the tier that missed experts are copied to.
    miss_tiers: Vec<TierIdx>,
    /// By MoE layer: the bytes of its dense stage, behind which the reads of experts that the token
    /// chose are hidden; none in other layers.
    ahead_bytes: Vec<Option<u64>>,
    embedding: TierBytes,
    /// Rows of tables beside the embedding; of no bytes in a model without one.
    table: TierBytes,
    head: TierBytes,
    /// The tier that misses are read from.
    slow_tier: TierIdx,
    /// Bytes that a batch reads outside the layers.
    outside: StageBytes,
    /// Bytes of the experts that the current stage computed, by the tier that they were read from.
    pub(crate) computed: StageBytes,
    /// Ends waits for declared times.
    cancel: Cancel,
}

/// What a dense stage moves.
struct DenseTraffic {
    weights: StageBytes,
    cache: CacheReads,
    cache_tier: TierIdx,
}

impl DenseTraffic {
    /// Returns the bytes of KV cache and recurrent states that rows of a batch move.
    fn cache_bytes(&self, batch: &Batch, rows: &Range<usize>) -> u64 {
        batch
            .segments(rows, WHOLE)
            .map(|text| {
                let tokens = text.rows.len();
                self.cache.bytes((text.past + tokens) as u64, tokens as u64)
            })
            .fold(0, u64::saturating_add)
    }
}

struct TierBytes {
    tier: TierIdx,
    bytes: u64,
}

/// When the stages of a layer began.
#[derive(Clone, Copy)]
pub(crate) struct LayerClock {
    dense: Instant,
    experts: Instant,
}

impl Meter {
    pub(crate) fn new(model: &Model, plan: &Placement, cancel: &Cancel) -> Self {
        let (spec, shape) = (model.spec(), model.shape());
        let tiers: PerTier<_> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
        let tier_of = |kind, layer| {
            plan.dense
                .iter()
                .find(|d| d.kind == kind && d.layer == layer)
                .map(|d| d.tier)
        };
        let mut weights = vec![StageBytes::new(tiers.len()); spec.layers.len()];
        for group in &shape.dense {
            if let (Some(layer), Some(tier)) = (group.layer, tier_of(group.kind, group.layer)) {
                weights[layer as usize].add(tier, group.token_bytes);
            }
        }
        let dense = spec
            .layers
            .iter()
            .zip(weights)
            .zip(plan.cache_tiers(spec.layers.len()));
        let dense = dense.map(|((layer, weights), cache_tier)| DenseTraffic {
            weights,
            cache: CacheReads::new(spec, layer, plan.kv_type),
            cache_tier,
        });
        let head_tier = tier_of(DenseKind::Head, None).unwrap_or(TierIdx::FIRST);
        let head_bytes = shape
            .dense
            .iter()
            .filter(|d| d.kind == DenseKind::Head)
            .map(|d| d.token_bytes)
            .sum();
        let read = |kind| {
            let groups = shape.dense.iter().filter(move |d| d.kind == kind);
            groups.map(|d| d.token_bytes).sum::<u64>()
        };
        let table = &model.gguf().tensors()[spec.embedding];
        let row_bytes = table.n_bytes / spec.n_vocab as u64;
        let tied_bytes = if spec.tied() { row_bytes } else { 0 };
        Self {
            counters: Counters::new(tiers.len(), plan.layers.len()),
            drive: DriveUse::default(),
            cancel: cancel.clone(),
            pacer: Pacer::new(&tiers, plan.layer_overhead_us, plan.token_overhead_us),
            dense: dense.collect(),
            miss_tiers: plan
                .layers
                .iter()
                .map(|placed| placed.brought_to(plan.staging_tier))
                .collect(),
            ahead_bytes: shape
                .experts
                .iter()
                .map(|e| ahead_bytes(shape, e))
                .collect(),
            table: TierBytes {
                tier: tier_of(DenseKind::TokenTable, None).unwrap_or(head_tier),
                bytes: read(DenseKind::TokenTable),
            },
            // The head of a tied model is the embedding.
            embedding: TierBytes {
                tier: tier_of(DenseKind::Embedding, None).unwrap_or(head_tier),
                bytes: read(DenseKind::Embedding) + tied_bytes,
            },
            head: TierBytes {
                tier: head_tier,
                bytes: head_bytes,
            },
            slow_tier: plan.home_tier(),
            outside: StageBytes::new(tiers.len()),
            computed: StageBytes::new(tiers.len()),
        }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Starts counting at zero.
    pub(crate) fn reset(&mut self) {
        self.counters = Counters::new(self.outside.by_tier().len(), self.counters.layers.len());
    }

    /// Counts the rows of the embedding and of other tables that a batch reads.
    pub(crate) fn begin_pass(&mut self, batch: &Batch) {
        self.outside.clear();
        for rows in [&self.embedding, &self.table] {
            self.outside.add(rows.tier, batch.len() as u64 * rows.bytes);
        }
    }

    /// Waits until the dense stage of rows of a batch, which began at `start`, has taken the declared
    /// time.
    pub(crate) fn pace_dense(
        &mut self,
        start: Instant,
        layer: LayerIdx,
        batch: &Batch,
        rows: &Range<usize>,
    ) {
        if let Some(pacer) = &self.pacer {
            let traffic = &self.dense[layer.get()];
            let cache = traffic.cache_bytes(batch, rows);
            let declared = pacer.dense(&traffic.weights, traffic.cache_tier, cache);
            self.settle(start, declared, batch.phase);
        }
    }

    /// Waits until `declared` has passed since `start`, and counts it for decoded tokens.
    fn settle(&mut self, start: Instant, declared: Duration, phase: Phase) {
        settle(start, declared, &self.cancel);
        if phase == Phase::Decode {
            self.counters.declared += declared;
        }
    }

    /// Counts the dense stages of a batch in a layer, which began at `start`, and starts the clock
    /// of its experts.
    pub(crate) fn finish_dense(
        &mut self,
        start: Instant,
        layer: Layer<'_>,
        batch: &Batch,
    ) -> LayerClock {
        let clock = LayerClock {
            dense: start,
            experts: Instant::now(),
        };
        let time = clock.experts - clock.dense;
        match batch.phase {
            Phase::Prompt => self.counters.prompt_stages[0] += time,
            Phase::Decode => self.charge_dense(layer.index, time, batch),
        }
        clock
    }

    /// Counts the dense stage of decoded tokens: its weights, and its time by tier. On emulated tiers
    /// the time is shared out by what is declared, for keys and values too.
    fn charge_dense(&mut self, layer: LayerIdx, time: Duration, batch: &Batch) {
        let traffic = &self.dense[layer.get()];
        let Some(pacer) = &self.pacer else {
            return self.counters.charge(&traffic.weights, time);
        };
        let cache = traffic.cache_bytes(batch, &(0..batch.len()));
        self.counters.count(&traffic.weights);
        self.counters.charge_paths(
            &pacer.dense_by_tier(&traffic.weights, traffic.cache_tier, cache),
            time,
        );
    }

    /// Counts how many experts a prediction named and how many of them the router chose, where
    /// there was one.
    pub(crate) fn count_prediction(&mut self, moe: MoeIdx, predicted_right: Option<(u64, u64)>) {
        if let Some((predicted, right)) = predicted_right {
            let layer = &mut self.counters.layers[moe.get()];
            layer.predicted += predicted;
            layer.predicted_right += right;
        }
    }

    /// Waits until the experts of a layer have taken the declared time, and counts them.
    pub(crate) fn finish_experts(
        &mut self,
        clock: LayerClock,
        moe: MoeIdx,
        batch: &Batch,
        step: &Step,
    ) {
        let phase = batch.phase;
        let alone = batch.single && phase == Phase::Decode;
        let missed = Missed {
            bytes: step.read_bytes,
            to: self.miss_tiers[moe.get()],
            ahead_bytes: self.ahead_bytes[moe.get()].filter(|_| alone),
        };
        let paths = self
            .pacer
            .as_ref()
            .map(|p| p.expert_paths(&self.computed, &missed));
        if let Some(longest) = paths.as_ref().and_then(|p| p.iter().max()) {
            self.settle(clock.experts, *longest, phase);
        }
        let time = clock.experts.elapsed();
        match phase {
            Phase::Prompt => {
                self.counters.prompt_missed_bytes += step.read_bytes;
                self.counters.prompt_stages[1] += time;
            }
            Phase::Decode => {
                let layer = &mut self.counters.layers[moe.get()];
                layer.dense += clock.experts - clock.dense;
                layer.experts += time;
                self.charge_experts(moe, step, paths.as_ref(), time);
            }
        }
    }

    /// Counts a decoded token's experts; `paths` are the declared times by tier where a tier is
    /// emulated.
    fn charge_experts(
        &mut self,
        moe: MoeIdx,
        step: &Step,
        paths: Option<&PerTier<Duration>>,
        time: Duration,
    ) {
        let layer = &mut self.counters.layers[moe.get()];
        layer.pinned_hits += step.pinned_hits;
        layer.slot_hits += step.slot_hits;
        layer.misses += step.misses;
        layer.streamed += step.streamed;
        layer.missed_bytes += step.read_bytes;
        // An emulated device's reads are part of the declared time.
        if paths.is_none() {
            layer.reading += step.reading();
            layer.waited += step.waited;
        }
        self.counters.read_bytes[self.slow_tier] += step.read_bytes;
        if let Some(paths) = paths {
            self.counters.count(&self.computed);
            self.counters.charge_paths(paths, time);
        } else {
            let waited = step.waited.min(time);
            self.counters.busy[self.slow_tier] += waited;
            self.counters.charge(&self.computed, time - waited);
        }
    }

    /// Waits until the head, which began at `start`, has taken the declared time, and counts what a
    /// batch read outside the layers.
    pub(crate) fn finish_head(&mut self, start: Instant, batch: &Batch) {
        if !batch.logits.is_empty() {
            self.outside.add(self.head.tier, self.head.bytes);
            if let Some(pacer) = &self.pacer {
                let has_table = self.table.bytes > 0;
                let table = has_table.then_some(self.table.tier);
                let declared = pacer.outside(&self.outside, table);
                self.settle(start, declared, batch.phase);
            }
        }
        if batch.phase == Phase::Decode {
            self.counters.charge(&self.outside, start.elapsed());
        }
    }

    /// Counts decoded tokens that never left the GPU of `tier`. Nothing was waited for in between, so
    /// their time since `start` is shared out by bytes. `experts` are those of each MoE layer.
    pub(crate) fn count_step_on_gpu(
        &mut self,
        start: Instant,
        tier: TierIdx,
        experts: &[StepExperts<'_>],
    ) {
        let time = start.elapsed();
        let mut total = StageBytes::new(self.outside.by_tier().len());
        total.add(self.embedding.tier, self.embedding.bytes);
        total.add(self.table.tier, self.table.bytes);
        total.add(self.head.tier, self.head.bytes);
        for traffic in &self.dense {
            traffic
                .weights
                .by_tier()
                .enumerate()
                .for_each(|(tier, bytes)| total.add(tier, *bytes));
        }
        experts
            .iter()
            .for_each(|layer| total.add(tier, layer.bytes));
        let sum: u64 = total.by_tier().iter().sum();
        let share = |bytes: u64| time.mul_f64(bytes as f64 / sum.max(1) as f64);
        for &StepExperts {
            layer,
            n_used,
            bytes,
        } in experts
        {
            let Some(moe) = layer.moe else { continue };
            let counters = &mut self.counters.layers[moe.index.get()];
            counters.pinned_hits += n_used;
            counters.dense += share(self.dense[layer.index.get()].weights.by_tier().iter().sum());
            counters.experts += share(bytes);
        }
        self.counters.charge(&total, time);
    }

    /// Counts a step of `n_tokens` tokens, which began at `start`.
    pub(crate) fn finish_step(&mut self, start: Instant, phase: Phase, n_tokens: usize) {
        let time = start.elapsed();
        match phase {
            Phase::Decode => {
                self.counters.decode_tokens += n_tokens as u64;
                self.counters.decode += time;
            }
            Phase::Prompt => {
                self.counters.prompt_tokens += n_tokens as u64;
                self.counters.prompt += time;
            }
        }
    }

    /// Counts what the reads of experts, `all` so far, brought since the last step.
    pub(crate) fn count_reads(&mut self, all: DriveUse, phase: Phase) {
        if phase == Phase::Decode {
            self.counters.drive += all.since(self.drive);
        }
        self.drive = all;
    }

    /// Takes back `n` decoded tokens, which were not to be. Their time stays.
    pub(crate) fn uncount_decoded(&mut self, n: usize) {
        self.counters.decode_tokens = self.counters.decode_tokens.saturating_sub(n as u64);
    }

    /// Counts experts that were prefetched.
    pub(crate) fn count_prefetched(&mut self, count: PrefetchCount) {
        self.counters.prefetch += count;
    }
}

/// Returns the bytes of the dense stage before the experts of a layer, where the token alone chooses
/// them.
fn ahead_bytes(shape: &ModelShape, experts: &ExpertShape) -> Option<u64> {
    experts
        .by_token
        .then(|| shape.dense_bytes_of(experts.layer))
}

/// The experts that the tokens of a step use in one layer, each counted once.
#[derive(Clone, Copy)]
pub(crate) struct StepExperts<'a> {
    pub(crate) layer: Layer<'a>,
    pub(crate) n_used: u64,
    /// Bytes of all of them.
    pub(crate) bytes: u64,
}
