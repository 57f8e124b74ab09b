//! Plans that rules of thumb make from the same bytes, to compare with.
//!
//! Each places the dense groups in the same sensible way and then uses what is left of every tier as fully as its
//! rule allows.

use super::room::Room;
use crate::profile::Evidence;
use tier_plan_runtime::formats::placement::{self, LayerPlacement, SlotPolicy, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// A rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The same number of experts in every layer, spread evenly over their numbers.
    Uniform,
    /// The experts with the most uses by the train split, over all layers.
    FrequencyFirst,
    /// No pins; slots in proportion to the layers' bytes.
    LruOnly,
    /// As llama.cpp places experts: whole layers, the last ones to the fastest tier.
    FirstLayersCpu,
}

impl Rule {
    /// All of them.
    pub const ALL: [Rule; 4] = [Rule::Uniform, Rule::FrequencyFirst, Rule::LruOnly, Rule::FirstLayersCpu];

    /// The name of its plans.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Uniform => "uniform",
            Rule::FrequencyFirst => "frequency-first",
            Rule::LruOnly => "lru-only",
            Rule::FirstLayersCpu => "first-layers-cpu",
        }
    }
}

/// Which tier every dense group and expert gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// `[dense groups of the shape]` tiers.
    pub dense: Vec<TierIdx>,
    /// `[layers with experts]`.
    pub layers: Vec<LayerPlacement>,
}

/// The order in which dense groups are placed: by how much of each a token reads.
const DENSE_ORDER: [DenseKind; 6] = [
    DenseKind::Attention,
    DenseKind::Router,
    DenseKind::SharedExpert,
    DenseKind::DenseFfn,
    DenseKind::Head,
    DenseKind::Embedding,
];

/// The rule's plan, or nothing if its rule does not fit the tiers.
pub fn draft(rule: Rule, shape: &ModelShape, evidence: &Evidence, room: &Room) -> Option<Draft> {
    let mut left = room.left_bytes.clone();
    let mut dense = vec![0; shape.dense.len()];
    for kind in DENSE_ORDER {
        for (at, group) in shape.dense.iter().enumerate().filter(|(_, g)| g.kind == kind) {
            let fits = |left: &[u64], t: TierIdx| room.taken(group, t).iter().zip(left).all(|(b, left)| b <= left);
            dense[at] = room.dense_tiers(group).find(|&t| fits(&left, t))?;
            left.iter_mut().zip(room.taken(group, dense[at])).for_each(|(left, bytes)| *left -= bytes);
        }
    }
    let mut filler = Filler { evidence, room, left, layers: Vec::new() };
    filler.layers = evidence.layers.iter().map(|l| Pins::new(l.shape.layer, room)).collect();
    match rule {
        Rule::Uniform => filler.uniform(),
        Rule::FrequencyFirst => filler.frequency_first(),
        Rule::LruOnly if room.slot_tiers().is_empty() => return None,
        Rule::LruOnly => filler.lru_only(),
        Rule::FirstLayersCpu => filler.first_layers_cpu(),
    }
    let home: u64 = filler.layers.iter().zip(&evidence.layers).map(|(p, e)| p.pooled(e) * e.shape.expert_bytes).sum();
    let fits = home <= filler.left[room.home()];
    fits.then(|| Draft { dense, layers: filler.layers.into_iter().map(Pins::placement).collect() })
}

#[derive(Clone)]
struct Pins {
    layer: u32,
    /// `[fast tiers]`.
    pinned: Vec<Vec<u32>>,
    slots: u32,
    slot_tier: TierIdx,
}

impl Pins {
    fn new(layer: u32, room: &Room) -> Self {
        Pins { layer, pinned: vec![Vec::new(); room.home()], slots: 0, slot_tier: room.staging_tier }
    }

    fn pooled(&self, evidence: &crate::profile::LayerEvidence) -> u64 {
        u64::from(evidence.shape.n_expert).saturating_sub(self.pinned.iter().map(|p| p.len() as u64).sum())
    }

    fn placement(self) -> LayerPlacement {
        let mut pinned = Vec::new();
        for (tier, mut experts) in self.pinned.into_iter().enumerate() {
            if !experts.is_empty() {
                experts.sort_unstable();
                pinned.push(placement::Pins { tier, experts });
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

struct Filler<'a> {
    evidence: &'a Evidence,
    room: &'a Room,
    left: Vec<u64>,
    layers: Vec<Pins>,
}

impl Filler<'_> {
    fn bytes(&self, layer: usize) -> u64 {
        self.evidence.layers[layer].shape.expert_bytes
    }

    fn uniform(&mut self) {
        for tier in 0..self.room.home() {
            let round: u64 = (0..self.layers.len()).map(|l| self.bytes(l)).sum();
            let each = self.left[tier].checked_div(round).unwrap_or(0);
            let mut counts: Vec<u64> =
                (0..self.layers.len()).map(|l| each.min(self.layers[l].pooled(&self.evidence.layers[l]))).collect();
            self.left[tier] -= counts.iter().enumerate().map(|(l, n)| n * self.bytes(l)).sum::<u64>();
            for (l, count) in counts.iter_mut().enumerate() {
                if *count < self.layers[l].pooled(&self.evidence.layers[l]) && self.bytes(l) <= self.left[tier] {
                    *count += 1;
                    self.left[tier] -= self.bytes(l);
                }
            }
            for (l, count) in counts.into_iter().enumerate() {
                let pins = &mut self.layers[l];
                let free: Vec<u32> = (0..self.evidence.layers[l].shape.n_expert)
                    .filter(|e| !pins.pinned.iter().any(|p| p.contains(e)))
                    .collect();
                pins.pinned[tier] = (0..count).map(|i| free[(i * free.len() as u64 / count) as usize]).collect();
            }
        }
    }

    fn frequency_first(&mut self) {
        let mut all: Vec<(f64, usize, u32)> = Vec::new();
        for (l, layer) in self.evidence.layers.iter().enumerate() {
            all.extend(layer.order.iter().map(|&e| (layer.share[e as usize], l, e)));
        }
        // Stable, so that equal shares keep the layer's own order.
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        // Once a layer's expert does not fit a tier, its later ones must not either, though a smaller layer's may.
        let mut tier_of = vec![0; self.layers.len()];
        for (_, layer, expert) in all {
            let bytes = self.bytes(layer);
            while tier_of[layer] < self.room.home() && self.left[tier_of[layer]] < bytes {
                tier_of[layer] += 1;
            }
            if tier_of[layer] < self.room.home() {
                self.left[tier_of[layer]] -= bytes;
                self.layers[layer].pinned[tier_of[layer]].push(expert);
            }
        }
    }

    /// Shares a tier's bytes among the slots of some layers, the same count in each; where that would be less than a
    /// token uses, fewer layers get that many.
    fn spread_slots(&mut self, layers: &[usize], tier: TierIdx) {
        let round: u64 = layers.iter().map(|&l| self.bytes(l)).sum();
        let each = self.left[tier].checked_div(round).unwrap_or(0);
        let spread = |this: &mut Self, layer: usize, want: u64| {
            let evidence = &this.evidence.layers[layer];
            let pooled = this.layers[layer].pooled(evidence);
            let least = u64::from(evidence.shape.n_used).min(pooled);
            let have = u64::from(this.layers[layer].slots);
            let to = (have + want).max(least).min(pooled);
            let cost = (to - have.min(to)) * this.bytes(layer);
            if to > have && cost <= this.left[tier] {
                this.left[tier] -= cost;
                (this.layers[layer].slots, this.layers[layer].slot_tier) = (to as u32, tier);
            }
        };
        for &layer in layers {
            spread(self, layer, each);
        }
        for &layer in layers {
            if self.layers[layer].slots > 0 {
                spread(self, layer, 1);
            }
        }
    }

    fn lru_only(&mut self) {
        let whole: u128 =
            self.evidence.layers.iter().map(|l| u128::from(l.shape.expert_bytes) * u128::from(l.shape.n_expert)).sum();
        let have: u128 = self.room.slot_tiers().map(|t| u128::from(self.left[t])).sum();
        let share = if whole == 0 { 0.0 } else { (have as f64 / whole as f64).min(1.0) };
        let last = self.room.home() - 1;
        let mut tier = 0;
        let mut taken = 0.0;
        let mut on_tier: Vec<Vec<usize>> = vec![Vec::new(); self.room.home()];
        for layer in (0..self.layers.len()).rev() {
            let want = share * f64::from(self.evidence.layers[layer].shape.n_expert) * self.bytes(layer) as f64;
            while tier < last && taken + want > self.left[tier] as f64 * (1.0 + 1e-12) {
                (tier, taken) = (tier + 1, 0.0);
            }
            taken += want;
            on_tier[tier].push(layer);
        }
        for (tier, layers) in on_tier.iter().enumerate() {
            self.spread_slots(layers, tier);
        }
    }

    fn first_layers_cpu(&mut self) {
        let mut rest: Vec<usize> = (0..self.layers.len()).collect();
        for tier in 0..self.room.home() {
            while let Some(&layer) = rest.last() {
                let n_expert = self.evidence.layers[layer].shape.n_expert;
                let whole = u64::from(n_expert) * self.bytes(layer);
                if whole > self.left[tier] {
                    break;
                }
                self.left[tier] -= whole;
                self.layers[layer].pinned[tier] = (0..n_expert).collect();
                rest.pop();
            }
        }
        // What is left of the tiers becomes slots: the roomiest tier serves most layers, the others one each.
        let mut by_left: Vec<TierIdx> = self.room.slot_tiers().collect();
        by_left.sort_by_key(|&t| self.left[t]);
        let Some(roomiest) = by_left.pop() else { return };
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
        self.spread_slots(&rest, roomiest);
    }
}
