//! Branch and bound over all configurations of one layer, at given prices of bytes.
//!
//! A large layer has more configurations than can be listed: 384 experts over four tiers have
//! billions. A token's time is the longest of its paths, and a longest path is at least any
//! weighted mean of the paths. With weights that are fixed per token, the layer's time separates
//! into terms of one cut each, and one of the last cut and the slots. Dynamic programming over
//! tables then finds its least value over all cuts and slots, which is a lower bound whatever the
//! weights.
//!
//! Where the bound is not good enough, weights move towards the paths that are longest at its least
//! point, and the [`Region`] of configurations is split in two. The least point is also the next
//! candidate to price exactly. [`LayerSearch::tighten`] computes, for one region:
//!
//! 1. `path_weights`: `[path][rank]` weighted seconds of the experts of a rank on a path, and
//!    `[token]` the weight of the transfers;
//! 2. `prefix_costs`: `[tier][cut]` seconds and priced bytes of the experts before a cut on a tier;
//! 3. `best_cuts`: `[cut]` the least cost of all cuts above the last one, and where it comes from;
//! 4. `transfer_costs`: `[cut]` seconds of the transfers that no slot spares, and the seconds of
//!    each miss that slots may spare;
//! 5. `best_slots`: for a last cut, the number of slots with the least transfers and priced bytes.

mod tighten;
mod token_times;

use super::local_descent::{LocalDescent, ROUGH_STEPS, SlotRange, TimedConfig};
use crate::cost::ExpertStage;
use crate::profile::LayerEvidence;
use crate::solve::problem::capacity::{Capacity, MAX_FAST};
use crate::solve::problem::columns::Config;
use crate::solve::problem::pool::Priced;
use crate::solve::problem::reuse_table::ReuseTable;
use std::collections::BTreeSet;
use std::time::Instant;
use tier_plan_runtime::formats::placement::TierIdx;
use token_times::TokenTimes;

/// Times that the weights of a region move before it is split.
const MAX_WEIGHT_MOVES: u32 = 4;

/// Weight moves that a new half counts as done already.
const MOVES_OF_NEW_HALF: u32 = MAX_WEIGHT_MOVES - 2;

/// Configurations that descents start from at least.
const MIN_DESCENTS: usize = 4;

/// Rounds in which a thorough search moves weights before it descends.
const THOROUGH_WEIGHT_MOVES: usize = 2;

/// Weight of a region's width beside the spread of its points when it is split.
const WIDTH_WEIGHT: f64 = 1e-3;

/// Paths at most: the tiers, and the transfers.
const MAX_PATHS: usize = MAX_FAST + 2;

/// Bounds of a region: `[fast tiers]` cuts, then the slots.
type Limits = [u16; MAX_FAST + 1];

/// A box of configurations that have slots on one tier, or none.
struct Region {
    slot_tier: Option<usize>,
    low: Limits,
    high: Limits,
    /// Points tried in it.
    points: Vec<Config>,
    /// `[token, path]` mean path times of the points; the parent's while there are none.
    mean: Vec<f32>,
    weight_moves: u32,
    bound: f64,
    /// Where the weighted mean is least.
    point: Config,
}

/// The search of one layer at some prices.
pub struct LayerSearch<'a> {
    descent: LocalDescent<'a, TokenTimes<'a>>,
}

impl<'a> LayerSearch<'a> {
    /// Makes the search of a layer with its reuse table.
    pub fn new(
        table: &'a ReuseTable,
        capacity: &'a Capacity,
        layer: &LayerEvidence,
        price: &[f64],
    ) -> Self {
        let stage = ExpertStage::new(&capacity.tiers, layer.shape.expert_bytes, layer.prefetch);
        let tokens = TokenTimes::new(table, capacity, &stage);
        LayerSearch {
            descent: LocalDescent::new(tokens, capacity, layer.shape, price),
        }
    }

    /// Keeps the layer's experts from some tiers. The bound is over all tiers then, which holds.
    #[must_use]
    pub fn forbidding(self, tiers: &BTreeSet<TierIdx>) -> Self {
        LayerSearch {
            descent: self.descent.forbidding(tiers),
        }
    }

    /// Takes configurations as priced.
    #[must_use]
    pub fn knowing(self, known: Priced) -> Self {
        LayerSearch {
            descent: self.descent.knowing(known),
        }
    }

    /// Returns all configurations that were priced.
    pub fn into_known(self) -> Priced {
        self.descent.into_known()
    }

    /// Returns the configurations that descents from some known ones lead to, the cheapest first.
    ///
    /// At most `descents` are made, at least [`MIN_DESCENTS`] where the search is `thorough`: that
    /// also descends from where the weighted means are least.
    pub fn cheapest(
        &mut self,
        start: &[Config],
        thorough: bool,
        descents: usize,
        deadline: Instant,
    ) -> Vec<TimedConfig> {
        start.iter().for_each(|config| {
            self.descent.value(config);
        });
        let mut begin = start.to_vec();
        for mut region in if thorough {
            self.all_regions(start)
        } else {
            Vec::new()
        } {
            for _ in 0..THOROUGH_WEIGHT_MOVES {
                if Instant::now() >= deadline {
                    break;
                }
                self.sample(&mut region);
                let (point, means) = (region.point, self.descent.timed.means(&region.point));
                region
                    .mean
                    .iter_mut()
                    .zip(&means)
                    .for_each(|(m, new)| *m += (new - *m) / 2.0);
                if self.descent.fits(&point) && !begin.contains(&point) {
                    begin.push(point);
                }
            }
        }
        let descents = if thorough {
            descents.max(MIN_DESCENTS)
        } else {
            descents
        };
        let found = self.descent.cheapest(begin, descents, deadline);
        if !thorough {
            return found;
        }
        self.descent.scan(&ROUGH_STEPS, deadline);
        self.descent.by_value()
    }

    /// Returns the mean seconds of a configuration.
    pub fn seconds(&mut self, config: &Config) -> f64 {
        self.descent.seconds(config)
    }

    /// Returns the configurations around some, the cheapest first.
    pub fn around(&mut self, centers: &BTreeSet<Config>, deadline: Instant) -> Vec<TimedConfig> {
        self.descent.around(centers, deadline)
    }

    /// Returns a lower bound on the seconds and priced bytes of every configuration.
    ///
    /// Searches from some known configurations until the bound is within `tolerance` (relative) of
    /// the best, or the deadline passes. The bound is −∞ if there was no time at all.
    pub fn bound(&mut self, start: &[Config], tolerance: f64, deadline: Instant) -> f64 {
        let mut best = f64::INFINITY;
        for config in start {
            best = best.min(self.descent.value(config));
        }
        let mut open = self.all_regions(start);
        // Least bound of the regions that need no more search.
        let mut closed = f64::INFINITY;
        let least_bound = |open: &[Region]| {
            (0..open.len()).min_by(|&a, &b| open[a].bound.total_cmp(&open[b].bound))
        };
        while let Some(at) = least_bound(&open) {
            if open[at].bound >= best - tolerance * best.abs() || Instant::now() >= deadline {
                break;
            }
            let mut region = open.swap_remove(at);
            self.tighten(&mut region);
            if region.bound == f64::INFINITY {
                continue;
            }
            let point = region.point;
            let value = self.descent.value(&point);
            if self.descent.fits(&point) && value < best {
                best = value;
            }
            if region.bound >= best - tolerance * best.abs() {
                closed = closed.min(region.bound);
                continue;
            }
            if region.low == region.high {
                closed = closed.min(value);
                continue;
            }
            self.move_weights(&mut region, point);
            if region.weight_moves > MAX_WEIGHT_MOVES
                && let Some(halves) = self.split(&region)
            {
                open.extend(halves);
            } else {
                open.push(region);
            }
        }
        open.iter()
            .map(|region| region.bound)
            .fold(closed, f64::min)
    }

    /// Moves a region's weights towards the paths that are longest at a point.
    fn move_weights(&self, region: &mut Region, point: Config) {
        let means = self.descent.timed.means(&point);
        if region.points.contains(&point) {
            region.weight_moves += 1;
        } else {
            region.points.push(point);
        }
        let n_points = region.points.len();
        let share = if n_points == 1 {
            1.0
        } else {
            1.0 / n_points as f32
        };
        region
            .mean
            .iter_mut()
            .zip(&means)
            .for_each(|(m, new)| *m += (new - *m) * share);
        region.weight_moves += 1;
    }

    /// Returns regions that hold all configurations: one per tier of slots, and one without slots.
    fn all_regions(&self, start: &[Config]) -> Vec<Region> {
        let capacity = self.descent.capacity;
        let fast = capacity.fast();
        let most = self.descent.timed.table.n_expert as u16;
        let staging_tier = capacity.staging_tier;
        let slot_tiers = capacity
            .slot_tiers()
            .map(TierIdx::get)
            .map(Some)
            .chain([None]);
        slot_tiers
            .map(|slot_tier| {
                let (mut low, mut high) = ([0; MAX_FAST + 1], [0; MAX_FAST + 1]);
                high[..fast].fill(most);
                if slot_tier.is_some() {
                    (low[fast], high[fast]) = (1, most);
                }
                let slots_of = |c: &Config| (c.slots > 0).then_some(c.slot_tier.get());
                let alike = start.iter().filter(|c| slots_of(c) == slot_tier);
                let value = |c: &Config| self.descent.known_value(c);
                let cheapest = alike.min_by(|a, b| value(a).total_cmp(&value(b)));
                let begin = cheapest
                    .or(start.first())
                    .map(|&config| self.with_slots_on(config, slot_tier));
                let none = Config {
                    cuts: [0; MAX_FAST],
                    slots: 0,
                    slot_tier: staging_tier,
                };
                let point = begin.unwrap_or(none);
                Region {
                    slot_tier,
                    low,
                    high,
                    points: vec![point],
                    mean: self.descent.timed.means(&point),
                    weight_moves: 1,
                    bound: f64::NEG_INFINITY,
                    point,
                }
            })
            .collect()
    }

    /// Returns a configuration with its slots moved to another tier, or taken away.
    fn with_slots_on(&self, mut config: Config, slot_tier: Option<usize>) -> Config {
        let capacity = self.descent.capacity;
        match slot_tier {
            Some(tier) => {
                config.slot_tier = TierIdx::new(tier);
                let last_cut = config.last_cut(capacity.fast());
                if let Some(SlotRange { least, most }) = self.descent.slot_range(last_cut) {
                    config.slots = config.slots.clamp(least, most);
                }
            }
            None => (config.slots, config.slot_tier) = (0, capacity.staging_tier),
        }
        config
    }

    /// Returns two halves of a region, split where the points tried differ most.
    fn split(&self, region: &Region) -> Option<[Region; 2]> {
        let fast = self.descent.capacity.fast();
        let coordinate =
            |c: &Config, axis: usize| if axis == fast { c.slots } else { c.cuts[axis] };
        let timed = &self.descent.timed;
        let to = region
            .slot_tier
            .unwrap_or(self.descent.capacity.staging_tier.get());
        let transfer_s = timed.transfer[to].per_expert_s;
        let next_tier_s = |axis: usize| {
            if axis + 1 >= fast {
                transfer_s
            } else {
                timed.compute[axis + 1].per_expert_s
            }
        };
        // Range of the points tried, within the region.
        let range = |axis: usize| {
            let points = region.points.iter().map(|c| coordinate(c, axis));
            let least = points.clone().min().unwrap_or(region.low[axis]);
            let most = points.max().unwrap_or(region.high[axis]);
            (least.max(region.low[axis]), most.min(region.high[axis]))
        };
        let spread = |axis: usize| {
            let (least, most) = range(axis);
            f64::from(most.saturating_sub(least)) * next_tier_s(axis)
        };
        let width = |axis: usize| {
            f64::from(region.high[axis] - region.low[axis]) * next_tier_s(axis) * WIDTH_WEIGHT
        };
        let weight = |axis: usize| spread(axis) + width(axis);
        let axis = (0..=fast).max_by(|&a, &b| weight(a).total_cmp(&weight(b)))?;
        if region.high[axis] == region.low[axis] {
            return None;
        }
        let (least, most) = range(axis);
        let (least, most) = if least < most {
            (least, most)
        } else {
            (region.low[axis], region.high[axis])
        };
        let middle = least + (most - least) / 2;
        let half = |low: u16, high: u16| {
            let inside = |c: &&Config| (low..=high).contains(&coordinate(c, axis));
            let points: Vec<Config> = region.points.iter().filter(inside).copied().collect();
            let mean = if points.is_empty() {
                region.mean.clone()
            } else {
                self.mean_of(&points)
            };
            let mut limits = (region.low, region.high);
            (limits.0[axis], limits.1[axis]) = (low, high);
            Region {
                slot_tier: region.slot_tier,
                low: limits.0,
                high: limits.1,
                points,
                mean,
                weight_moves: MOVES_OF_NEW_HALF,
                bound: region.bound,
                point: region.point,
            }
        };
        Some([
            half(region.low[axis], middle),
            half(middle + 1, region.high[axis]),
        ])
    }

    /// Returns `[token, path]` mean path times of some points.
    fn mean_of(&self, points: &[Config]) -> Vec<f32> {
        let timed = &self.descent.timed;
        let mut mean = vec![0.0; timed.table.tokens * (self.descent.capacity.tiers.len() + 1)];
        let share = 1.0 / points.len() as f32;
        for point in points {
            mean.iter_mut()
                .zip(timed.means(point))
                .for_each(|(m, t)| *m += t * share);
        }
        mean
    }
}
