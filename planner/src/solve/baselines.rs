//! Baselines: plans that rules of thumb make from the same bytes, to compare with.
//!
//! All place the dense groups alike, kind by kind. Each then uses what is left of every tier as
//! fully as its rule allows.

use super::options::Strategy;
use super::problem::capacity::Capacity;
use super::problem::draft::{DensePlace, Draft};
use crate::profile::{Evidence, LayerEvidence};
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, SlotPolicy, TierIdx};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::{DenseKind, DenseShape, ModelShape};

/// A rule of thumb.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Baseline {
    /// The same number of experts in every layer, evenly spaced by expert number.
    Uniform,
    /// The experts most used in the train split, over all layers.
    FrequencyFirst,
    /// No pins; slots in proportion to the layers' bytes.
    LruOnly,
    /// llama.cpp's rule: whole layers of experts, the last ones on the fastest tier.
    FirstLayersCpu,
}

impl Baseline {
    /// All baselines, in the order of reports.
    pub const ALL: [Baseline; 4] = [
        Baseline::Uniform,
        Baseline::FrequencyFirst,
        Baseline::LruOnly,
        Baseline::FirstLayersCpu,
    ];

    /// Returns the baseline that a strategy asks for, if it is one.
    pub fn of_strategy(strategy: Strategy) -> Option<Baseline> {
        match strategy {
            Strategy::Optimal => None,
            Strategy::Uniform => Some(Baseline::Uniform),
            Strategy::FrequencyFirst => Some(Baseline::FrequencyFirst),
            Strategy::LruOnly => Some(Baseline::LruOnly),
            Strategy::FirstLayersCpu => Some(Baseline::FirstLayersCpu),
        }
    }

    /// Returns the name of its plans.
    pub fn name(self) -> &'static str {
        match self {
            Baseline::Uniform => "uniform",
            Baseline::FrequencyFirst => "frequency-first",
            Baseline::LruOnly => "lru-only",
            Baseline::FirstLayersCpu => "first-layers-cpu",
        }
    }
}

/// Order in which dense groups are placed: by how much of each a token reads.
const DENSE_ORDER: [DenseKind; 7] = [
    DenseKind::Attention,
    DenseKind::Router,
    DenseKind::SharedExpert,
    DenseKind::DenseFfn,
    DenseKind::Head,
    DenseKind::Embedding,
    DenseKind::TokenTable,
];

/// Drafts a baseline. Returns `None` if it does not fit the tiers.
pub fn draft(
    baseline: Baseline,
    shape: &ModelShape,
    evidence: &Evidence,
    capacity: &Capacity,
) -> Option<Draft> {
    let mut left = capacity.left_bytes.clone();
    let mut dense = vec![TierIdx::FIRST.into(); shape.dense.len()];
    // What a GPU has only together comes before what else would fit there.
    let is_first = |group: &DenseShape| {
        let part = (Part::Dense(group.kind), group.layer);
        capacity.together_on.is_some() && capacity.together.contains(&part)
    };
    let passes = [true, false].map(|first| DENSE_ORDER.map(|kind| (first, kind)));
    for (first, kind) in passes.into_iter().flatten() {
        for (at, group) in shape
            .dense
            .iter()
            .enumerate()
            .filter(|(_, g)| g.kind == kind && is_first(g) == first)
        {
            let fits = |left: &[u64], place: DensePlace| {
                capacity
                    .taken(group, place)
                    .iter()
                    .zip(left)
                    .all(|(bytes, left)| bytes <= left)
            };
            // No rule keeps the KV cache off a GPU that has the attention.
            let fitting = capacity
                .dense_places(group)
                .filter(|&place| !place.host_kv && fits(&left, place));
            let fitting: Vec<DensePlace> = fitting.collect();
            // A token reads so few rows of a table that the slowest tier serves them.
            let place = match kind {
                DenseKind::TokenTable => fitting.last(),
                _ => fitting.first(),
            };
            dense[at] = *place?;
            let taken = capacity.taken(group, dense[at]);
            left.iter_mut()
                .zip(taken)
                .for_each(|(left, bytes)| *left -= bytes);
        }
    }
    let mut filler = Filler {
        evidence,
        capacity,
        left,
        layers: Vec::new(),
    };
    filler.layers = evidence
        .layers
        .iter()
        .map(|l| LayerFill::new(l.shape.layer, capacity))
        .collect();
    match baseline {
        Baseline::Uniform => filler.uniform(),
        Baseline::FrequencyFirst => filler.frequency_first(),
        Baseline::LruOnly if capacity.slot_tiers().len() == 0 => return None,
        Baseline::LruOnly => filler.lru_only(),
        Baseline::FirstLayersCpu => filler.first_layers_cpu(),
    }
    let layers = filler.layers.iter().zip(&evidence.layers);
    let home: u64 = layers
        .map(|(fill, e)| fill.n_pooled(e) * e.shape.expert_bytes)
        .sum();
    let fits = home <= filler.left[capacity.fast()];
    let layers = filler.layers.into_iter().map(LayerFill::placement);
    fits.then(|| Draft {
        dense,
        layers: layers.collect(),
    })
}

/// The pins and slots of one layer so far.
#[derive(Clone)]
struct LayerFill {
    layer: u32,
    /// `[fast tiers]` experts.
    pinned: Vec<Vec<u32>>,
    slots: u32,
    slot_tier: TierIdx,
}

impl LayerFill {
    fn new(layer: u32, capacity: &Capacity) -> Self {
        let pinned = vec![Vec::new(); capacity.fast()];
        LayerFill {
            layer,
            pinned,
            slots: 0,
            slot_tier: capacity.staging_tier,
        }
    }

    /// Returns the number of experts that are not pinned.
    fn n_pooled(&self, evidence: &LayerEvidence) -> u64 {
        let pinned = self.pinned.iter().map(|p| p.len() as u64).sum();
        u64::from(evidence.shape.n_expert).saturating_sub(pinned)
    }

    fn placement(self) -> LayerPlacement {
        let mut pinned = Vec::new();
        for (tier, mut experts) in self.pinned.into_iter().enumerate() {
            if !experts.is_empty() {
                experts.sort_unstable();
                pinned.push(Pins {
                    tier: TierIdx::new(tier),
                    experts,
                });
            }
        }
        LayerPlacement {
            layer: self.layer,
            pinned,
            slots: self.slots,
            slot_tier: self.slot_tier,
            policy: SlotPolicy::Lru,
        }
    }
}

/// An expert with its share of uses.
struct ExpertUse {
    share: f64,
    layer: usize,
    expert: u32,
}

/// Fills what is left of the tiers.
struct Filler<'a> {
    evidence: &'a Evidence,
    capacity: &'a Capacity,
    /// `[tiers]` bytes.
    left: Vec<u64>,
    layers: Vec<LayerFill>,
}

impl Filler<'_> {
    fn expert_bytes(&self, layer: usize) -> u64 {
        self.evidence.layers[layer].shape.expert_bytes
    }

    /// Whether a layer's experts run on a tier.
    fn runs(&self, layer: usize, tier: usize) -> bool {
        let layer = self.evidence.layers[layer].shape.layer;
        self.capacity.runs_experts(layer, TierIdx::new(tier))
    }

    fn n_pooled(&self, layer: usize) -> u64 {
        self.layers[layer].n_pooled(&self.evidence.layers[layer])
    }

    fn uniform(&mut self) {
        let n = self.layers.len();
        for tier in 0..self.capacity.fast() {
            let runs: Vec<bool> = (0..n).map(|l| self.runs(l, tier)).collect();
            let there = (0..n).filter(|&l| runs[l]);
            let one_each: u64 = there.map(|l| self.expert_bytes(l)).sum();
            let each = self.left[tier].checked_div(one_each).unwrap_or(0);
            let most = |l: usize| if runs[l] { self.n_pooled(l) } else { 0 };
            let mut counts: Vec<u64> = (0..n).map(|l| each.min(most(l))).collect();
            let taken = counts
                .iter()
                .enumerate()
                .map(|(l, count)| count * self.expert_bytes(l));
            self.left[tier] -= taken.sum::<u64>();
            for (l, count) in counts.iter_mut().enumerate() {
                let fits = self.expert_bytes(l) <= self.left[tier];
                if runs[l] && *count < self.n_pooled(l) && fits {
                    *count += 1;
                    self.left[tier] -= self.expert_bytes(l);
                }
            }
            for (l, count) in counts.into_iter().enumerate() {
                let fill = &mut self.layers[l];
                let is_free = |e: &u32| !fill.pinned.iter().any(|p| p.contains(e));
                let free: Vec<u32> = (0..self.evidence.layers[l].shape.n_expert)
                    .filter(is_free)
                    .collect();
                let spaced = (0..count).map(|i| free[(i * free.len() as u64 / count) as usize]);
                fill.pinned[tier] = spaced.collect();
            }
        }
    }

    fn frequency_first(&mut self) {
        let mut uses: Vec<ExpertUse> = Vec::new();
        for (layer, evidence) in self.evidence.layers.iter().enumerate() {
            let share = |expert: u32| evidence.share[expert as usize];
            let order = evidence.order.iter();
            uses.extend(order.map(|&expert| ExpertUse {
                share: share(expert),
                layer,
                expert,
            }));
        }
        // Stable, so that equal shares keep the layer's own order.
        uses.sort_by(|a, b| b.share.total_cmp(&a.share));
        // Once a layer's expert does not fit a tier, its later ones must not go there either,
        // though a smaller layer's may.
        let mut tier_of = vec![0; self.layers.len()];
        for ExpertUse { layer, expert, .. } in uses {
            let bytes = self.expert_bytes(layer);
            while tier_of[layer] < self.capacity.fast()
                && (self.left[tier_of[layer]] < bytes || !self.runs(layer, tier_of[layer]))
            {
                tier_of[layer] += 1;
            }
            if tier_of[layer] < self.capacity.fast() {
                self.left[tier_of[layer]] -= bytes;
                self.layers[layer].pinned[tier_of[layer]].push(expert);
            }
        }
    }

    /// Shares a tier's bytes among the slots of some layers, the same count in each.
    ///
    /// Where that would be less than a token uses, fewer layers get that many.
    fn spread_slots(&mut self, layers: &[usize], tier: TierIdx) {
        let runs = |&layer: &usize| self.runs(layer, tier.get());
        let layers: Vec<usize> = layers.iter().copied().filter(runs).collect();
        let layers = &layers[..];
        let one_each: u64 = layers.iter().map(|&l| self.expert_bytes(l)).sum();
        let each = self.left[tier.get()].checked_div(one_each).unwrap_or(0);
        for &layer in layers {
            self.add_slots(layer, tier, each);
        }
        for &layer in layers {
            if self.layers[layer].slots > 0 {
                self.add_slots(layer, tier, 1);
            }
        }
    }

    /// Gives a layer more slots on a tier, if they fit: at least as many as a token uses.
    fn add_slots(&mut self, layer: usize, tier: TierIdx, more: u64) {
        let pooled = self.n_pooled(layer);
        let least = u64::from(self.evidence.layers[layer].shape.n_used).min(pooled);
        let have = u64::from(self.layers[layer].slots);
        let slots = (have + more).max(least).min(pooled);
        let bytes = (slots - have.min(slots)) * self.expert_bytes(layer);
        if slots > have && bytes <= self.left[tier.get()] {
            self.left[tier.get()] -= bytes;
            (self.layers[layer].slots, self.layers[layer].slot_tier) = (slots as u32, tier);
        }
    }

    fn lru_only(&mut self) {
        let shapes = self.evidence.layers.iter().map(|l| l.shape);
        let total: u128 = shapes
            .map(|e| u128::from(e.expert_bytes) * u128::from(e.n_expert))
            .sum();
        let have: u128 = self
            .capacity
            .slot_tiers()
            .map(|t| u128::from(self.left[t.get()]))
            .sum();
        let share = if total == 0 {
            0.0
        } else {
            (have as f64 / total as f64).min(1.0)
        };
        let last = self.capacity.fast() - 1;
        let mut tier = 0;
        let mut taken = 0.0;
        let mut on_tier: Vec<Vec<usize>> = vec![Vec::new(); self.capacity.fast()];
        for layer in (0..self.layers.len()).rev() {
            let n_expert = f64::from(self.evidence.layers[layer].shape.n_expert);
            let wanted = share * n_expert * self.expert_bytes(layer) as f64;
            while tier < last && taken + wanted > self.left[tier] as f64 * (1.0 + 1e-12) {
                (tier, taken) = (tier + 1, 0.0);
            }
            // A layer that can't be on this tier is on a later one.
            let runs = (tier..=last).find(|&t| self.runs(layer, t));
            if runs == Some(tier) {
                taken += wanted;
            }
            if let Some(tier) = runs {
                on_tier[tier].push(layer);
            }
        }
        for (tier, layers) in on_tier.iter().enumerate() {
            self.spread_slots(layers, TierIdx::new(tier));
        }
    }

    fn first_layers_cpu(&mut self) {
        let mut rest: Vec<usize> = (0..self.layers.len()).collect();
        for tier in 0..self.capacity.fast() {
            while let Some(at) = rest.iter().rposition(|&layer| self.runs(layer, tier)) {
                let layer = rest[at];
                let n_expert = self.evidence.layers[layer].shape.n_expert;
                let layer_bytes = u64::from(n_expert) * self.expert_bytes(layer);
                if layer_bytes > self.left[tier] {
                    break;
                }
                self.left[tier] -= layer_bytes;
                self.layers[layer].pinned[tier] = (0..n_expert).collect();
                rest.remove(at);
            }
        }
        // What is left of the tiers becomes slots. The tier with the most bytes serves most layers,
        // the others serve one each.
        let mut by_left: Vec<TierIdx> = self.capacity.slot_tiers().collect();
        by_left.sort_by_key(|&tier| self.left[tier.get()]);
        let Some(largest) = by_left.pop() else { return };
        for tier in by_left {
            if rest.len() < 2 {
                break;
            }
            let layer = rest[rest.len() - 1];
            self.spread_slots(&[layer], tier);
            if self.layers[layer].slots > 0 {
                rest.pop();
            }
        }
        self.spread_slots(&rest, largest);
    }
}
