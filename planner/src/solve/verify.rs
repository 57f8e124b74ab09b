//! Verifies a plan with no solver in it: what lies where, how many bytes that is, and how fast it
//! is.
//!
//! It shares no arithmetic with what made the plan. Bytes are added up from the model's shape line
//! by line. The time is found by stepping the engine's own slot cache through every judged token.

mod times;

pub use times::token_s;

use crate::profile::Evidence;
use std::collections::BTreeMap;
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{
    DensePlacement, LayerPlacement, PerTier, Pins, Placement, TierBytes, TierIdx,
};
use tier_plan_runtime::model::gpu::{CpuOnly, Part};
use tier_plan_runtime::model::kv::PAGE;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, ExpertShape, ModelShape};
use tier_plan_runtime::units::show_bytes;
use times::verify_times;

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
        tally.check_host_kv(shape);
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
        let is = |only: &&CpuOnly, d: &DensePlacement| only.is(Part::Dense(d.kind), d.layer);
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

    /// Checks that each KV cache which is kept off a GPU may be: the CPU attends to it, and the GPU
    /// has the layer's matrices.
    fn check_host_kv(&mut self, shape: &ModelShape) {
        for layer in &self.plan.host_kv {
            let name = format!("key and value cache of layer {layer}");
            let rows = shape.caches.get(*layer as usize);
            let is_plain = rows.is_some_and(|cache| {
                let mut rows = cache.rows.iter();
                let values: u64 = cache.rows.iter().map(|r| r.per_token).sum();
                values >= 2
                    && cache.state_bytes == 0
                    && cache.more_readers == 0
                    && rows.all(|r| r.every == 1 && r.chosen.is_none())
            });
            if !is_plain {
                self.wrong.push(format!(
                    "the {name} is nothing that can be apart from its attention"
                ));
            }
            let is_gpu = |tier: TierIdx| {
                let tier = self.plan.tiers.get(tier);
                tier.is_some_and(|t| t.tier.kind == TierKind::Vram && !t.tier.emulated)
            };
            let mut dense = self.plan.dense.iter();
            let on_gpu = dense.any(|d| attends(d, *layer as usize) && is_gpu(d.tier));
            if !on_gpu || is_gpu(self.plan.kv_tier) {
                self.wrong
                    .push(format!("the {name} is not apart from its attention"));
            }
        }
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

/// Returns the tier of a layer's KV cache: the GPU that has its attention, unless the CPU attends to
/// it, or else that of all others.
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
    let apart = plan.host_kv.iter().any(|l| *l as usize == layer);
    of_layer
        .filter(|tier| is_gpu(tier) && !apart)
        .unwrap_or(plan.kv_tier)
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
