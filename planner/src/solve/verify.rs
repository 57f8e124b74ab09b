//! Verifies a plan with no solver in it: what lies where, how many bytes that is, and how fast it
//! is.
//!
//! It shares no arithmetic with what made the plan. Bytes are added up from the model's shape line
//! by line. The time is found by stepping the engine's own slot cache through every judged token.

use crate::cost::{self, ExpertStage};
use crate::profile::replay::Event;
use crate::profile::{Evidence, Judged, LayerEvidence};
use std::collections::BTreeMap;
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{
    ATTENTION_OF_A_TOKEN, DensePlacement, LayerPlacement, PerTier, Pins, Placement, SlotPolicy,
    TierBytes, TierIdx,
};
use tier_plan_runtime::gpu::fully_on_gpu;
use tier_plan_runtime::model::gpu::{CpuOnly, Part};
use tier_plan_runtime::model::kv::PAGE;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, ExpertShape, ModelShape};
use tier_plan_runtime::units::show_bytes;

/// Relative difference of times that is rounding.
const TIME_TOLERANCE: f64 = 1e-9;

/// Least accuracy of predictions at which the engine prefetches.
const MIN_PREFETCH_ACCURACY: f64 = 0.5;

/// Returns what is wrong with a plan, in sentences; none if it holds.
pub fn verify(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Vec<String> {
    let mut wrong = Vec::new();
    if plan.model.hash != shape.id.hash {
        wrong.push(format!(
            "the plan is for model '{}', not '{}'",
            plan.model.name, shape.id.name
        ));
    }
    if plan.tiers.is_empty() {
        wrong.push("the plan has no tiers".to_string());
        return wrong;
    }
    let mut tally = Tally {
        plan,
        bytes: PerTier::from_fn(plan.tiers.len(), |_| [0; LINES]),
        wrong,
    };
    tally.add_dense(shape);
    tally.check_together(shape);
    if tally.has_all_layers(shape) {
        for (layer, experts) in plan.layers.iter().zip(&shape.experts) {
            tally.check_gpus(shape, layer);
            tally.add_experts(layer, experts);
        }
        tally.add_staging(shape);
        tally.add_caches(shape);
    }
    let Tally {
        bytes, mut wrong, ..
    } = tally;
    if wrong.is_empty() {
        verify_sums(plan, &bytes, &mut wrong);
        verify_times(plan, shape, evidence, &mut wrong);
    }
    wrong
}

/// Kinds of bytes that are counted apart.
const LINES: usize = 6;

const LINE_NAMES: [&str; LINES] = ["dense", "pinned", "slot", "kv", "staging", "home"];

const DENSE: usize = 0;
const PINNED: usize = 1;
const SLOTS: usize = 2;
const KV: usize = 3;
const STAGING: usize = 4;
const HOME: usize = 5;

/// Bytes counted from the model's shape, and what was found wrong on the way.
struct Tally<'a> {
    plan: &'a Placement,
    /// Bytes by line.
    bytes: PerTier<[u128; LINES]>,
    wrong: Vec<String>,
}

impl Tally<'_> {
    fn n_tiers(&self) -> usize {
        self.plan.tiers.len()
    }

    fn computes(&self, tier: TierIdx) -> bool {
        self.plan.tiers[tier].tier.kind != TierKind::Nvme
    }

    /// Whether a tier is a GPU that can't run a part.
    fn is_refused(
        &self,
        shape: &ModelShape,
        part: Part,
        layer: Option<u32>,
        tier: TierIdx,
    ) -> bool {
        let only = |only: &CpuOnly| (only.part, only.layer) == (part, layer) && !only.is_together();
        let tier = &self.plan.tiers[tier].tier;
        let is_gpu = tier.kind == TierKind::Vram && !tier.emulated;
        is_gpu && shape.cpu_only.iter().any(only)
    }

    /// Checks that one GPU has all parts that run only together, or none has any.
    fn check_together(&mut self, shape: &ModelShape) {
        let together: Vec<&CpuOnly> = shape.cpu_only.iter().filter(|o| o.is_together()).collect();
        let is = |only: &&CpuOnly, d: &DensePlacement| {
            (only.part, only.layer) == (Part::Dense(d.kind), d.layer)
        };
        let placed = self.plan.dense.iter();
        let placed = placed.filter(|d| together.iter().any(|only| is(only, d)));
        let placed: Vec<&DensePlacement> = placed.collect();
        let tiers: Vec<TierIdx> = placed.iter().map(|d| d.tier).collect();
        let gpu = tiers.iter().find(|t| {
            let tier = self.plan.tiers.get(**t);
            tier.is_some_and(|t| t.tier.kind == TierKind::Vram && !t.tier.emulated)
        });
        let apart = gpu.and_then(|gpu| placed.iter().find(|d| d.tier != *gpu));
        if let (Some(gpu), Some(away)) = (gpu, apart) {
            let (name, gpu) = (
                group_name(away.kind, away.layer),
                &self.plan.tiers[*gpu].tier.name,
            );
            self.wrong.push(format!(
                "{name} is not on the GPU '{gpu}', which has parts that it can run only together with it"
            ));
        }
    }

    /// Checks that no experts of a layer are on a GPU that can't run them.
    fn check_gpus(&mut self, shape: &ModelShape, placed: &LayerPlacement) {
        let pins = placed.pinned.iter().filter(|pins| !pins.experts.is_empty());
        let slots = (placed.slots > 0).then_some(placed.slot_tier);
        let tiers: Vec<TierIdx> = pins.map(|pins| pins.tier).chain(slots).collect();
        let (layer, n) = (placed.layer, self.n_tiers());
        for tier in tiers.into_iter().filter(|t| t.get() < n) {
            if self.is_refused(shape, Part::Experts, Some(layer), tier) {
                let tier = &self.plan.tiers[tier].tier.name;
                self.wrong.push(format!(
                    "experts of layer {layer} are on the GPU '{tier}', which can't run them"
                ));
            }
        }
    }

    /// Counts the dense groups; each must be placed once, where it computes.
    fn add_dense(&mut self, shape: &ModelShape) {
        let n = self.n_tiers();
        let mut placed: BTreeMap<_, u32> = BTreeMap::new();
        for dense in &self.plan.dense {
            let group = shape
                .dense
                .iter()
                .find(|g| (g.kind, g.layer) == (dense.kind, dense.layer));
            let name = group_name(dense.kind, dense.layer);
            *placed.entry((dense.kind, dense.layer)).or_default() += 1;
            let tier = dense.tier;
            match group {
                None => self
                    .wrong
                    .push(format!("{name} is placed, but the model has none")),
                Some(_) if tier.get() >= n => {
                    self.wrong.push(format!("{name} is on tier {tier} of {n}"))
                }
                Some(_) if !self.computes(tier) && !dense.kind.is_named_by_tokens() => {
                    let tier = &self.plan.tiers[tier].tier.name;
                    self.wrong
                        .push(format!("{name} is on '{tier}', where nothing computes"));
                }
                Some(_) if self.is_refused(shape, Part::Dense(dense.kind), dense.layer, tier) => {
                    let tier = &self.plan.tiers[tier].tier.name;
                    self.wrong
                        .push(format!("{name} is on the GPU '{tier}', which can't run it"));
                }
                Some(group) => self.bytes[tier][DENSE] += u128::from(group.bytes),
            }
        }
        for group in &shape.dense {
            let times = placed.get(&(group.kind, group.layer)).copied().unwrap_or(0);
            if times != 1 {
                let name = group_name(group.kind, group.layer);
                self.wrong
                    .push(format!("{name} is placed {times} times, not once"));
            }
        }
    }

    /// Whether the plan places the layers with experts that the model has.
    fn has_all_layers(&mut self, shape: &ModelShape) -> bool {
        let have: Vec<u32> = self.plan.layers.iter().map(|l| l.layer).collect();
        let want: Vec<u32> = shape.experts.iter().map(|e| e.layer).collect();
        if have != want {
            self.wrong.push(format!(
                "layers with experts are {want:?} in the model, {have:?} in the plan"
            ));
        }
        have == want
    }

    /// Counts a layer's pins, slots and backing copies.
    fn add_experts(&mut self, placed: &LayerPlacement, experts: &ExpertShape) {
        let n = self.n_tiers();
        let layer = placed.layer;
        let expert_bytes = u128::from(experts.expert_bytes);
        let mut seen = vec![false; experts.n_expert as usize];
        for Pins {
            tier,
            experts: pinned,
        } in &placed.pinned
        {
            if tier.get() >= n || !self.computes(*tier) {
                self.wrong.push(format!(
                    "layer {layer} pins experts to tier {tier}, where none can be"
                ));
                continue;
            }
            for &expert in pinned {
                match seen.get_mut(expert as usize) {
                    None => {
                        let n_expert = experts.n_expert;
                        self.wrong
                            .push(format!("layer {layer} pins expert {expert} of {n_expert}"));
                    }
                    Some(true) => self
                        .wrong
                        .push(format!("layer {layer} pins expert {expert} twice")),
                    Some(seen) => {
                        *seen = true;
                        self.bytes[*tier][PINNED] += expert_bytes;
                    }
                }
            }
        }
        let pooled = seen.iter().filter(|&&s| !s).count();
        self.bytes[self.plan.home_tier()][HOME] += expert_bytes * pooled as u128;
        let (slots, slot_tier) = (placed.slots, placed.slot_tier);
        if slots > 0 {
            if slot_tier.get() >= n || !self.computes(slot_tier) {
                self.wrong
                    .push(format!("layer {layer} has slots on tier {slot_tier}"));
            } else {
                self.bytes[slot_tier][SLOTS] += expert_bytes * u128::from(slots);
            }
            if slots as usize > pooled {
                self.wrong.push(format!(
                    "layer {layer} has {slots} slots for {pooled} pooled experts"
                ));
            }
        }
    }

    fn add_staging(&mut self, shape: &ModelShape) {
        let largest = shape
            .experts
            .iter()
            .map(|e| e.expert_bytes)
            .max()
            .unwrap_or(0);
        let bytes = u128::from(self.plan.staging_experts) * u128::from(largest);
        self.add_line("staging", self.plan.staging_tier, STAGING, bytes);
        let Some(streaming) = &self.plan.streaming else {
            return;
        };
        let n = self.n_tiers();
        let tier = |tier: TierIdx| self.plan.tiers.get(tier).map(|t| (t.tier.kind, &t.tier));
        let to_gpu = matches!(tier(streaming.tier), Some((TierKind::Vram, t)) if !t.emulated);
        let from_memory = matches!(tier(streaming.from), Some((TierKind::Dram, t)) if !t.emulated);
        if !to_gpu || !from_memory || streaming.experts == 0 {
            let (from, to) = (streaming.from, streaming.tier);
            self.wrong.push(format!(
                "experts are streamed from tier {from} to tier {to} of {n}, but only from main memory to a GPU they can be"
            ));
            return;
        }
        let bytes = u128::from(streaming.experts) * u128::from(largest);
        self.add_line("streamed experts", streaming.tier, STAGING, bytes);
    }

    /// Counts the KV caches; one on a GPU must be with its layer's attention.
    fn add_caches(&mut self, shape: &ModelShape) {
        let plan = self.plan;
        for (layer, cache) in shape.caches.iter().enumerate() {
            let tier = cache_tier(plan, layer);
            // Several texts have whole pages each; one has its context.
            let texts = u128::from(plan.sequences);
            let page = if texts > 1 { u128::from(PAGE) } else { 1 };
            let positions = u128::from(plan.context).div_ceil(page) * page * texts;
            let positions = window_positions(plan, tier, cache, positions);
            let states = texts + u128::from(plan.checkpoints);
            let mut bytes = u128::from(cache.state_bytes) * states;
            for rows in &cache.rows {
                let row_bytes = u128::from(plan.kv_type.row_bytes(rows.width));
                bytes += row_bytes * u128::from(rows.per_token) * held(positions, rows.every);
            }
            let name = format!("key and value cache of layer {layer}");
            let apart = plan
                .dense
                .iter()
                .find(|d| attends(d, layer))
                .filter(|d| d.tier != tier);
            if apart.is_some() && plan.tiers.get(tier).is_some_and(|t| t.tier.is_gpu()) {
                self.wrong
                    .push(format!("the {name} is on a GPU, but not its attention"));
            }
            self.add_line(&name, tier, KV, bytes);
        }
    }

    fn add_line(&mut self, name: &str, tier: TierIdx, line: usize, bytes: u128) {
        if tier.get() >= self.n_tiers() || (bytes > 0 && !self.computes(tier)) {
            self.wrong.push(format!(
                "the {name} is on tier {tier}, where nothing computes"
            ));
        } else {
            self.bytes[tier][line] += bytes;
        }
    }
}

/// Names a dense group in a message.
fn group_name(kind: DenseKind, layer: Option<u32>) -> String {
    let layer = layer.map_or(String::new(), |layer| format!(" of layer {layer}"));
    format!("the {kind} group{layer}")
}

fn attends(dense: &DensePlacement, layer: usize) -> bool {
    dense.kind == DenseKind::Attention && dense.layer == u32::try_from(layer).ok()
}

/// Returns the tier of a layer's KV cache: the GPU that has its attention, or that of all others.
fn cache_tier(plan: &Placement, layer: usize) -> TierIdx {
    let attention = plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
    let of_layer = attention
        .into_iter()
        .find(|d| attends(d, layer))
        .map(|d| d.tier);
    let is_gpu = |tier: &TierIdx| {
        let tier = plan.tiers.get(*tier);
        tier.is_some_and(|t| t.tier.kind == TierKind::Vram && !t.tier.emulated)
    };
    of_layer.filter(is_gpu).unwrap_or(plan.kv_tier)
}

/// Compares the bytes that a plan states with those counted, and with its budgets.
fn verify_sums(plan: &Placement, counted: &PerTier<[u128; LINES]>, wrong: &mut Vec<String>) {
    for (tier, counted) in plan.tiers.iter().zip(counted) {
        let name = &tier.tier.name;
        let TierBytes {
            dense,
            pinned,
            slots,
            kv,
            staging,
            home,
        } = tier.bytes;
        let stated = [dense, pinned, slots, kv, staging, home];
        for ((stated, &counted), line) in stated.into_iter().zip(counted).zip(LINE_NAMES) {
            if u128::from(stated) != counted {
                wrong.push(format!(
                    "tier '{name}' says {stated} {line} bytes, but they are {counted}"
                ));
            }
        }
        let used: u128 = counted.iter().sum();
        if used > u128::from(tier.budget_bytes) {
            let over =
                show_bytes(u64::try_from(used - u128::from(tier.budget_bytes)).unwrap_or(u64::MAX));
            wrong.push(format!(
                "tier '{name}' is over its budget of {} by {over}",
                show_bytes(tier.budget_bytes)
            ));
        }
        if tier.budget_bytes > tier.tier.capacity_bytes {
            wrong.push(format!("tier '{name}' has a budget above its capacity"));
        }
    }
}

/// Compares the times that a plan predicts with a replay, and its bound with both.
fn verify_times(
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
            total += 1e-6
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

/// Returns the rows of so many positions, of which `every` share one: in every page, as many as blocks
/// may end there.
fn held(positions: u128, every: u64) -> u128 {
    let (page, every) = (u128::from(PAGE), u128::from(every));
    positions / page * page.div_ceil(every) + (positions % page).div_ceil(every)
}

/// Returns the positions that a layer holds, of the `all` positions of the planned texts: where no
/// token sees more than a window, and pages of the windows, a batch, and the checkpoints are fewer.
fn window_positions(plan: &Placement, tier: TierIdx, cache: &CacheShape, all: u128) -> u128 {
    let widest = cache.rows.iter().map(|rows| rows.window).max().flatten();
    let no_window = cache.rows.iter().any(|rows| rows.window.is_none());
    let on_gpu = plan.tiers[tier].tier.is_gpu();
    let (Some(window), Some(chunk), false) = (widest, plan.window_chunk, no_window || on_gpu)
    else {
        return all;
    };
    let page = u128::from(PAGE);
    let pages = u128::from(window).div_ceil(page);
    let least = (pages + 2) * u128::from(plan.sequences) + u128::from(chunk).div_ceil(page);
    if least >= all.div_ceil(page) {
        return all;
    }
    (least + (pages + 1) * u128::from(plan.checkpoints)) * page
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
    let refused = |only: &CpuOnly| (only.part, only.layer) == (Part::Experts, Some(layer));
    !shape.cpu_only.iter().any(refused)
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
