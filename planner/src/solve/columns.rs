//! What there is to choose from: for each layer its configurations with their times and bytes, for each kind of dense
//! group its tiers.
//!
//! A configuration pins the most used experts to the fastest tier, the next to the second, and so on (`cuts`), and
//! gives the rest some slots. Slots are none, or at least as many as a token uses: fewer would be overwritten while
//! their experts compute. Layers about which the same is known share their configurations, and so do dense groups of
//! equal bytes: that keeps the integer program free of symmetry.

use super::batch;
use super::goal::Goal;
use super::room::{LayerCache, MAX_FAST, MAX_ROWS, Room, TICKS};
use super::wishes::Wishes;
use crate::cost::{attention_fixed_s, read_s};
use std::collections::BTreeMap;
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, SlotPolicy, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// One way to treat a layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Config {
    /// `[fast tiers]` tier `t` gets the experts of rank `cuts[t - 1]..cuts[t]` by falling use; the rest is pooled.
    pub cuts: [u16; MAX_FAST],
    /// Slots of the pooled experts.
    pub slots: u16,
    /// Where they are.
    pub slot_tier: u8,
}

impl Config {
    /// Experts pinned to each of the `fast` tiers.
    pub fn pins(&self, fast: usize) -> impl Iterator<Item = u16> + '_ {
        (0..fast).map(|t| self.cuts[t] - if t == 0 { 0 } else { self.cuts[t - 1] })
    }

    /// The placement of a layer that this stands for.
    pub fn placement(&self, layer: u32, order: &[u32], fast: usize) -> LayerPlacement {
        let mut from = 0;
        let mut pinned = Vec::new();
        for tier in 0..fast {
            let to = usize::from(self.cuts[tier]).min(order.len());
            if to > from {
                let mut experts = order[from..to].to_vec();
                experts.sort_unstable();
                pinned.push(Pins { tier, experts });
                from = to;
            }
        }
        LayerPlacement {
            layer,
            pinned,
            slots: self.slots.into(),
            slot_tier: self.slot_tier.into(),
            policy: SlotPolicy::Lru,
        }
    }
}

/// What the columns of an item mean.
#[derive(Debug, Clone)]
pub enum Meaning {
    /// Dense groups (positions in the shape), a tier a column.
    Dense(Vec<usize>, Vec<TierIdx>),
    /// Layers with experts (positions in the shape), a configuration a column.
    Experts(Vec<usize>, Vec<Config>),
}

/// The least cost for no more than some bytes: a staircase that falls as the bytes rise.
#[derive(Debug, Default)]
pub struct Stairs(BTreeMap<u64, f64>);

impl Stairs {
    /// Adds a step, unless one with no more bytes costs no more; says whether it was added.
    pub fn insert(&mut self, bytes: u64, cost_s: f64) -> bool {
        if self.0.range(..=bytes).next_back().is_some_and(|(_, &cost)| cost <= cost_s) {
            return false;
        }
        while let Some((&above, _)) = self.0.range(bytes..).next().filter(|(_, cost)| **cost >= cost_s) {
            self.0.remove(&above);
        }
        self.0.insert(bytes, cost_s);
        true
    }
}

/// Something to choose one column for, once for each member.
#[derive(Debug, Clone)]
pub struct Item {
    /// What it is.
    pub meaning: Meaning,
    /// `[columns]` seconds a token.
    pub cost_s: Vec<f64>,
    /// `[columns, tiers]` bytes.
    pub bytes: Vec<u64>,
}

impl Item {
    /// Members that each get a column.
    pub fn count(&self) -> usize {
        match &self.meaning {
            Meaning::Dense(groups, _) => groups.len(),
            Meaning::Experts(layers, _) => layers.len(),
        }
    }

    /// Columns.
    pub fn len(&self) -> usize {
        self.cost_s.len()
    }

    /// Whether there is nothing to choose from.
    pub fn is_empty(&self) -> bool {
        self.cost_s.is_empty()
    }

    /// Keeps the columns for which `keep` holds, in their order.
    fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let n = self.bytes.len().checked_div(self.cost_s.len()).unwrap_or(0);
        let mut kept = 0;
        for at in 0..self.cost_s.len() {
            if keep(at) {
                self.cost_s[kept] = self.cost_s[at];
                self.bytes.copy_within(at * n..(at + 1) * n, kept * n);
                match &mut self.meaning {
                    Meaning::Dense(_, tiers) => tiers[kept] = tiers[at],
                    Meaning::Experts(_, configs) => configs[kept] = configs[at],
                }
                kept += 1;
            }
        }
        self.cost_s.truncate(kept);
        self.bytes.truncate(kept * n);
        match &mut self.meaning {
            Meaning::Dense(_, tiers) => tiers.truncate(kept),
            Meaning::Experts(_, configs) => configs.truncate(kept),
        }
    }

    /// Drops columns from `first` on that another one is no worse than: in cost and in bytes of every tier that can
    /// run out (`scarce`, at most two; with more of them only columns of equal bytes are compared). Columns before
    /// `first` stay, but count.
    pub(super) fn drop_dominated(&mut self, first: usize, n_tiers: usize, scarce: &[TierIdx]) {
        let key = |item: &Item, c: usize| -> [u64; MAX_ROWS] {
            let mut key = [0; MAX_ROWS];
            let bytes = item.column_bytes(c, n_tiers);
            scarce.iter().zip(&mut key).for_each(|(&tier, k)| *k = bytes[tier]);
            key
        };
        let mut order: Vec<u32> = (0..self.len() as u32).collect();
        let keys: Vec<_> = (0..self.len()).map(|c| key(self, c)).collect();
        order.sort_unstable_by(|&a, &b| {
            let (a, b) = (a as usize, b as usize);
            keys[a].cmp(&keys[b]).then(self.cost_s[a].total_cmp(&self.cost_s[b])).then(a.cmp(&b))
        });
        let mut stairs = Stairs::default();
        let mut last = None;
        let mut keep = vec![true; self.len()];
        for c in order.into_iter().map(|c| c as usize) {
            let good = if scarce.len() > 2 { last != Some(keys[c]) } else { stairs.insert(keys[c][1], self.cost_s[c]) };
            last = Some(keys[c]);
            keep[c] = good || c < first;
        }
        self.retain(|c| keep[c]);
    }

    /// `[tiers]` bytes of a column.
    pub fn column_bytes(&self, column: usize, n_tiers: usize) -> &[u64] {
        &self.bytes[column * n_tiers..][..n_tiers]
    }
}

/// What columns cost, and what they take of what can run out.
#[derive(Debug, Clone, PartialEq)]
pub struct Charge {
    /// Weight of a second.
    pub seconds: f64,
    /// `[tiers]` weight of a byte.
    pub bytes: Vec<f64>,
    /// Time is something that can run out.
    pub time_runs_out: bool,
    /// Sequences whose tokens are decoded in one step; seconds are those of a step by this number.
    pub batch: Option<u32>,
}

impl Charge {
    /// The charge of a goal, for a cost that is a product at its tangent.
    pub fn new(goal: &Goal, tangent: (f64, f64)) -> Self {
        let (seconds, bytes) = goal.columns(tangent.0, tangent.1);
        let batch = (goal.objective == crate::cli::Objective::Throughput).then_some(goal.batch);
        Charge { seconds, bytes, time_runs_out: goal.limits_time(), batch }
    }

    pub(super) fn cost(&self, seconds: f64, bytes: &[u64]) -> f64 {
        self.seconds * seconds + bytes.iter().zip(&self.bytes).map(|(&b, w)| b as f64 * w).sum::<f64>()
    }

    pub(super) fn rows(&self, seconds: f64, bytes: &[u64], to: &mut Vec<u64>) {
        to.extend_from_slice(bytes);
        if self.time_runs_out {
            to.push((seconds * TICKS).ceil() as u64);
        }
    }

    /// Whether seconds are all there is to it.
    pub fn is_plain(&self) -> bool {
        self.batch.is_none() && !self.time_runs_out && self.seconds == 1.0 && self.bytes.iter().all(|&w| w == 0.0)
    }
}

/// The dense groups, alike ones together.
pub fn dense_items(shape: &ModelShape, room: &Room, charge: &Charge, wishes: &Wishes) -> Vec<Item> {
    /// What groups are alike by: whether they are embeddings or attention, bytes, those of a token, tiers, and what they bring.
    type Key = ([bool; 2], u64, u64, Vec<TierIdx>, Option<usize>);
    let mut alike: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
    let mut caches: Vec<&LayerCache> = Vec::new();
    for (at, group) in shape.dense.iter().enumerate() {
        let fits = |&t: &TierIdx| {
            let mut taken = room.taken(group, t).into_iter().zip(&room.left_bytes);
            wishes.allows(group.kind, group.layer, t) && taken.all(|(bytes, &left)| bytes <= left)
        };
        let tiers: Vec<TierIdx> = room.dense_tiers(group).filter(fits).collect();
        let brings = room.brings(group, 0).map(|(cache, _)| {
            caches.iter().position(|&c| c == cache).unwrap_or_else(|| {
                caches.push(cache);
                caches.len() - 1
            })
        });
        let kind = [DenseKind::Embedding, DenseKind::Attention].map(|kind| group.kind == kind);
        alike.entry((kind, group.bytes, group.token_bytes, tiers, brings)).or_default().push(at);
    }
    alike
        .into_iter()
        .map(|(([_, attention], _, token_bytes, tiers, _), groups)| {
            let group = &shape.dense[groups[0]];
            let mut item = Item { meaning: Meaning::Dense(groups, Vec::new()), cost_s: Vec::new(), bytes: Vec::new() };
            for &tier in &tiers {
                let read = match charge.batch {
                    Some(batch) => batch::dense_bytes(group, batch) / f64::from(batch),
                    None => token_bytes as f64,
                };
                // Sequences share weights, but each has its own keys and values.
                let cache_s = room.brings(group, tier).map_or(0.0, |(cache, at)| cache.seconds[at]);
                let mut seconds = read_s(&room.tiers[tier], read) + cache_s;
                if attention {
                    seconds += attention_fixed_s(&room.tiers[tier]) / f64::from(charge.batch.unwrap_or(1));
                }
                let taken = room.taken(group, tier);
                item.cost_s.push(charge.cost(seconds, &taken));
                charge.rows(seconds, &taken, &mut item.bytes);
            }
            if let Meaning::Dense(_, of) = &mut item.meaning {
                *of = tiers;
            }
            item
        })
        .collect()
}
