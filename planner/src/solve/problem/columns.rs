//! Columns: the choices of the knapsack, with their costs and bytes.
//!
//! A layer's columns are configurations. A configuration pins the most used experts to the fastest
//! tier, the next to the second, and so on (`cuts`), and gives the rest some slots. Slots are none,
//! or at least as many as a token uses: fewer would be overwritten while their experts compute. A
//! dense group's columns are its places: tiers, and for attention on a GPU where its KV cache is.
//!
//! Layers about which the same is known share an [`Item`], and so do dense groups of equal bytes.
//! That keeps the integer program free of symmetry.

use super::capacity::{Capacity, LayerCache, MAX_FAST, MAX_ROWS, TICKS_PER_S};
use super::constraints::Constraints;
use super::draft::DensePlace;
use super::objective::{ColumnWeights, ObjectiveFunction, Tangent};
use crate::cost::batch::Step;
use crate::cost::{attention_fixed_s, group_read_s};
use crate::solve::options::Objective;
use std::collections::BTreeMap;
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, SlotPolicy, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, DenseShape, ModelShape};

/// Part of the largest column by which the bytes of two columns must differ to be apart.
const APART_FRACTION: u64 = 64;

/// One way to place a layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Config {
    /// `[fast tiers]` tier `t` pins the experts of rank `cuts[t - 1]..cuts[t]` by falling use; the
    /// rest is pooled.
    pub cuts: [u16; MAX_FAST],
    /// Slots of the pooled experts.
    pub slots: u16,
    /// Tier of the slots.
    pub slot_tier: TierIdx,
}

impl Config {
    /// Returns the experts pinned to each of the `fast` tiers.
    pub fn pins(&self, fast: usize) -> impl Iterator<Item = u16> + '_ {
        (0..fast).map(|tier| self.pins_on(tier))
    }

    /// Returns the experts pinned to one fast tier.
    pub fn pins_on(&self, tier: usize) -> u16 {
        self.cuts[tier] - if tier == 0 { 0 } else { self.cuts[tier - 1] }
    }

    /// Returns the experts pinned to all `fast` tiers together.
    pub fn last_cut(&self, fast: usize) -> u16 {
        if fast == 0 { 0 } else { self.cuts[fast - 1] }
    }

    /// Returns the placement of a layer that this stands for; `order` lists experts by falling use.
    pub fn placement(&self, layer: u32, order: &[u32], fast: usize) -> LayerPlacement {
        let mut from = 0;
        let mut pinned = Vec::new();
        for tier in 0..fast {
            let to = usize::from(self.cuts[tier]).min(order.len());
            if to > from {
                let mut experts = order[from..to].to_vec();
                experts.sort_unstable();
                pinned.push(Pins {
                    tier: TierIdx::new(tier),
                    experts,
                });
                from = to;
            }
        }
        LayerPlacement {
            layer,
            pinned,
            slots: self.slots.into(),
            slot_tier: self.slot_tier,
            policy: SlotPolicy::Lru,
        }
    }
}

/// What the columns of an item mean.
#[derive(Debug, Clone)]
pub enum Meaning {
    /// Dense groups: one place per column.
    Dense {
        /// Positions in the model's shape.
        groups: Vec<usize>,
        /// `[columns]`
        places: Vec<DensePlace>,
    },
    /// Layers with experts: one configuration per column.
    Experts {
        /// Positions in the model's shape.
        layers: Vec<usize>,
        /// `[columns]`
        configs: Vec<Config>,
    },
}

/// The Pareto front of bytes and cost: a staircase that falls as the bytes rise.
#[derive(Debug, Default)]
pub struct ParetoFront(BTreeMap<u64, f64>);

impl ParetoFront {
    /// Adds a point, unless one with no more bytes costs no more. Returns whether it was added.
    pub fn insert(&mut self, bytes: u64, cost_s: f64) -> bool {
        let below = self.0.range(..=bytes).next_back();
        if below.is_some_and(|(_, &cost)| cost <= cost_s) {
            return false;
        }
        while let Some((&above, _)) = self
            .0
            .range(bytes..)
            .next()
            .filter(|(_, cost)| **cost >= cost_s)
        {
            self.0.remove(&above);
        }
        self.0.insert(bytes, cost_s);
        true
    }
}

/// Something to choose one column for, once per member.
#[derive(Debug, Clone)]
pub struct Item {
    /// What its members and columns are.
    pub meaning: Meaning,
    /// `[columns]` seconds per token.
    pub cost_s: Vec<f64>,
    /// `[columns, rows]` bytes per tier, then ticks where time is limited.
    pub bytes: Vec<u64>,
}

impl Item {
    /// Returns the number of members, which each take a column.
    pub fn count(&self) -> usize {
        match &self.meaning {
            Meaning::Dense { groups, .. } => groups.len(),
            Meaning::Experts { layers, .. } => layers.len(),
        }
    }

    /// Returns the positions of its layers with experts; none of dense groups.
    pub fn layers(&self) -> &[usize] {
        match &self.meaning {
            Meaning::Dense { .. } => &[],
            Meaning::Experts { layers, .. } => layers,
        }
    }

    /// Returns an item of layers without columns.
    pub fn of_layers(layers: Vec<usize>) -> Self {
        Item {
            meaning: Meaning::Experts {
                layers,
                configs: Vec::new(),
            },
            cost_s: Vec::new(),
            bytes: Vec::new(),
        }
    }

    /// Returns the number of columns.
    pub fn len(&self) -> usize {
        self.cost_s.len()
    }

    /// Whether there is nothing to choose from.
    pub fn is_empty(&self) -> bool {
        self.cost_s.is_empty()
    }

    /// Returns the `[rows]` bytes of a column.
    pub fn column_bytes(&self, column: usize, n_rows: usize) -> &[u64] {
        &self.bytes[column * n_rows..][..n_rows]
    }

    /// Returns a column's cost with its bytes priced, in seconds.
    pub fn value(&self, column: usize, n_rows: usize, price: &[f64]) -> f64 {
        let bytes = self.column_bytes(column, n_rows).iter().zip(price);
        self.cost_s[column] + bytes.map(|(&b, p)| b as f64 * p).sum::<f64>()
    }

    /// Returns the column with the least cost and priced bytes, and that sum.
    pub fn cheapest(&self, price: &[f64]) -> Option<(usize, f64)> {
        // A length known to the compiler makes the inner loop fast.
        let mut padded = [0.0; MAX_ROWS];
        padded[..price.len()].copy_from_slice(price);
        let mut best: Option<(usize, f64)> = None;
        let bytes = self.bytes.chunks_exact(price.len().max(1));
        for (column, (&cost, bytes)) in self.cost_s.iter().zip(bytes).enumerate() {
            let value = cost
                + bytes
                    .iter()
                    .zip(&padded)
                    .map(|(&b, p)| b as f64 * p)
                    .sum::<f64>();
            if best.is_none_or(|(_, least)| value < least) {
                best = Some((column, value));
            }
        }
        best
    }

    /// Returns a test of whether two columns differ in bytes: by a 64th of the largest column.
    pub fn apart(&self, n_rows: usize) -> impl Fn(usize, usize) -> bool + '_ {
        let largest = self.bytes.iter().copied().max().unwrap_or(0);
        move |a, b| {
            let pairs = self
                .column_bytes(a, n_rows)
                .iter()
                .zip(self.column_bytes(b, n_rows));
            pairs
                .into_iter()
                .any(|(a, b)| a.abs_diff(*b) > largest / APART_FRACTION)
        }
    }

    /// Returns the cheapest columns at some prices, each apart from those before it.
    pub fn cheapest_apart(&self, price: &[f64], count: usize) -> Vec<usize> {
        let n = price.len();
        let values: Vec<f64> = (0..self.len()).map(|c| self.value(c, n, price)).collect();
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
        let is_apart = self.apart(n);
        let mut columns: Vec<usize> = Vec::new();
        for column in order {
            if columns.len() == count {
                break;
            }
            if columns.iter().all(|&other| is_apart(column, other)) {
                columns.push(column);
            }
        }
        columns
    }

    /// Keeps the columns for which `keep` holds, in their order.
    fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let n = self.bytes.len().checked_div(self.cost_s.len()).unwrap_or(0);
        let mut kept = 0;
        for column in 0..self.cost_s.len() {
            if keep(column) {
                self.cost_s[kept] = self.cost_s[column];
                self.bytes
                    .copy_within(column * n..(column + 1) * n, kept * n);
                match &mut self.meaning {
                    Meaning::Dense { places, .. } => places[kept] = places[column],
                    Meaning::Experts { configs, .. } => configs[kept] = configs[column],
                }
                kept += 1;
            }
        }
        self.cost_s.truncate(kept);
        self.bytes.truncate(kept * n);
        match &mut self.meaning {
            Meaning::Dense { places, .. } => places.truncate(kept),
            Meaning::Experts { configs, .. } => configs.truncate(kept),
        }
    }

    /// Drops dominated columns: another is no worse in cost and in bytes of every scarce tier.
    ///
    /// With more than two scarce tiers only columns of equal bytes are compared. Columns before
    /// `first` stay, but dominate others.
    pub(crate) fn drop_dominated(&mut self, first: usize, n_rows: usize, scarce: &[usize]) {
        let key = |item: &Item, c: usize| -> [u64; MAX_ROWS] {
            let mut key = [0; MAX_ROWS];
            let bytes = item.column_bytes(c, n_rows);
            scarce
                .iter()
                .zip(&mut key)
                .for_each(|(&row, k)| *k = bytes[row]);
            key
        };
        let mut order: Vec<u32> = (0..self.len() as u32).collect();
        let keys: Vec<_> = (0..self.len()).map(|c| key(self, c)).collect();
        order.sort_unstable_by(|&a, &b| {
            let (a, b) = (a as usize, b as usize);
            keys[a]
                .cmp(&keys[b])
                .then(self.cost_s[a].total_cmp(&self.cost_s[b]))
                .then(a.cmp(&b))
        });
        let mut front = ParetoFront::default();
        let mut last = None;
        let mut keep = vec![true; self.len()];
        for c in order.into_iter().map(|c| c as usize) {
            let is_good = if scarce.len() > 2 {
                last != Some(keys[c])
            } else {
                front.insert(keys[c][1], self.cost_s[c])
            };
            last = Some(keys[c]);
            keep[c] = is_good || c < first;
        }
        self.retain(|c| keep[c]);
    }
}

/// What columns cost, and what they take of what can run out.
#[derive(Debug, Clone, PartialEq)]
pub struct Charge {
    weights: ColumnWeights,
    /// Whether time is limited, as bytes are.
    pub limits_time: bool,
    /// The step of several sequences that is timed. Costs are its seconds divided by them.
    pub step: Option<Step>,
}

impl Charge {
    /// Makes the charge of an objective, which is linearized at a tangent where it is a product.
    pub fn new(objective: &ObjectiveFunction, tangent: Tangent) -> Self {
        let is_step = objective.kind == Objective::Throughput;
        let limits_time = objective.limits_time();
        Charge {
            weights: objective.column_weights(tangent),
            limits_time,
            step: is_step.then(|| objective.step.clone()),
        }
    }

    /// Makes the charge of an objective that is linear in seconds and bytes.
    pub fn linear(objective: &ObjectiveFunction) -> Self {
        Charge::new(
            objective,
            Tangent {
                usd: 1.0,
                seconds: 1.0,
            },
        )
    }

    /// Returns the cost of seconds and `[tiers]` bytes.
    pub(crate) fn cost(&self, seconds: f64, bytes: &[u64]) -> f64 {
        let weighted = bytes.iter().zip(&self.weights.per_byte);
        self.weights.per_second * seconds + weighted.map(|(&b, w)| b as f64 * w).sum::<f64>()
    }

    /// Appends the rows of a column: its bytes, and its ticks where time is limited.
    pub(crate) fn push_rows(&self, seconds: f64, bytes: &[u64], rows: &mut Vec<u64>) {
        rows.extend_from_slice(bytes);
        if self.limits_time {
            rows.push((seconds * TICKS_PER_S).ceil() as u64);
        }
    }

    /// Whether a column costs its seconds and nothing else.
    pub fn is_plain(&self) -> bool {
        self.step.is_none()
            && !self.limits_time
            && self.weights.per_second == 1.0
            && self.weights.per_byte.iter().all(|&w| w == 0.0)
    }
}

/// What dense groups are alike by.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct DenseKey {
    kind: DenseKind,
    macs: u64,
    bytes: u64,
    token_bytes: u64,
    places: Vec<DensePlace>,
    /// Position of the KV cache that moves with it, among the distinct ones.
    cache: Option<usize>,
}

/// Returns the items of the dense groups, alike groups together.
pub fn dense_items(
    shape: &ModelShape,
    capacity: &Capacity,
    charge: &Charge,
    constraints: &Constraints,
) -> Vec<Item> {
    let mut alike: BTreeMap<DenseKey, Vec<usize>> = BTreeMap::new();
    let mut caches: Vec<&LayerCache> = Vec::new();
    for (at, group) in shape.dense.iter().enumerate() {
        let fits = |&place: &DensePlace| {
            let mut taken = capacity
                .taken(group, place)
                .into_iter()
                .zip(&capacity.left_bytes);
            constraints.allows(group.kind, group.layer, place.tier)
                && taken.all(|(bytes, &left)| bytes <= left)
        };
        let places: Vec<DensePlace> = capacity.dense_places(group).filter(fits).collect();
        let cache = capacity
            .moving_cache(group, TierIdx::FIRST.into())
            .map(|(cache, _)| {
                caches.iter().position(|&c| c == cache).unwrap_or_else(|| {
                    caches.push(cache);
                    caches.len() - 1
                })
            });
        let key = DenseKey {
            kind: group.kind,
            macs: group.macs,
            bytes: group.bytes,
            token_bytes: group.token_bytes,
            places,
            cache,
        };
        alike.entry(key).or_default().push(at);
    }
    alike
        .into_iter()
        .map(|(key, groups)| {
            let group = &shape.dense[groups[0]];
            let (mut cost_s, mut bytes) = (Vec::new(), Vec::new());
            for &place in &key.places {
                let seconds = group_s(group, place, capacity, charge);
                let taken = capacity.taken(group, place);
                cost_s.push(charge.cost(seconds, &taken));
                charge.push_rows(seconds, &taken, &mut bytes);
            }
            Item {
                meaning: Meaning::Dense {
                    groups,
                    places: key.places,
                },
                cost_s,
                bytes,
            }
        })
        .collect()
}

/// Returns the cost and priced bytes of the dense groups, each at its cheapest place.
///
/// Returns `None` where a group fits no place.
pub fn dense_s(
    shape: &ModelShape,
    capacity: &Capacity,
    charge: &Charge,
    constraints: &Constraints,
    price: &[f64],
) -> Option<f64> {
    let items = dense_items(shape, capacity, charge, constraints);
    let least = |item: &Item| Some(item.count() as f64 * item.cheapest(price)?.1);
    items.iter().map(least).sum()
}

/// Returns the seconds per token of a dense group at a place.
fn group_s(group: &DenseShape, place: DensePlace, capacity: &Capacity, charge: &Charge) -> f64 {
    let tier = place.tier;
    let (read, launches) = match &charge.step {
        Some(step) => {
            let texts = f64::from(step.texts);
            let seconds = step.dense_s(group, tier, &capacity.tiers[tier]);
            (seconds / texts, step.micro_batches() / texts)
        }
        None => {
            let bytes = group.token_bytes as f64;
            (group_read_s(group.kind, &capacity.tiers[tier], bytes), 1.0)
        }
    };
    // Sequences share weights, but each has a KV cache of its own.
    let moving = capacity.moving_cache(group, place);
    let cache_s = moving.map_or(0.0, |(cache, cache_tier)| cache.seconds[cache_tier]);
    let mut seconds = read + cache_s;
    if group.kind == DenseKind::Attention {
        seconds += launches * attention_fixed_s(&capacity.tiers[tier], place.host_kv);
    }
    seconds
}
