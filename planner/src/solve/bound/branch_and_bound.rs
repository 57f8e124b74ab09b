//! Branch and bound over all configurations of one layer, at given prices of bytes.
//!
//! A large layer has more configurations than can be listed: 384 experts over four tiers have
//! billions. A token's time is the longest of its paths, and a longest path is at least any weighted
//! mean of the paths. With weights that are fixed per token, the layer's time separates into terms of
//! one cut each, and one of the last cut and the slots. Dynamic programming over tables then finds
//! its least value over all cuts and slots, which is a lower bound whatever the weights.
//!
//! Where the bound is not good enough, weights move towards the paths that are longest at its least
//! point, and the [`Region`] of configurations is split in two. The least point is also the next
//! candidate to price exactly. [`LayerSearch::tighten`] computes, for one region:
//!
//! 1. `path_weights`: `[path][rank]` weighted seconds of the experts of a rank on a path, and
//!    `[token]` the weight of the transfers;
//! 2. `prefix_costs`: `[tier][cut]` seconds and priced bytes of the experts before a cut on a tier;
//! 3. `best_cuts`: `[cut]` the least cost of all cuts above the last one, and where it comes from;
//! 4. `transfer_costs`: `[cut]` seconds of the transfers that no slot spares, and the seconds of each
//!    miss that slots may spare;
//! 5. `best_slots`: for a last cut, the number of slots with the least transfers and priced bytes.

use super::local_descent::{LocalDescent, SlotRange, StageTime, TimedConfig};
use crate::cost::{ExpertStage, PathTime};
use crate::profile::LayerEvidence;
use crate::solve::problem::capacity::{Capacity, MAX_FAST};
use crate::solve::problem::columns::Config;
use crate::solve::problem::reuse_table::ReuseTable;
use std::collections::BTreeSet;
use std::time::Instant;
use tier_plan_runtime::formats::placement::TierIdx;

/// Times that the weights of a region move before it is split.
const MAX_WEIGHT_MOVES: u32 = 4;

/// Weight moves that a new half counts as done already.
const MOVES_OF_NEW_HALF: u32 = MAX_WEIGHT_MOVES - 2;

/// Configurations that descents start from at least.
const MIN_DESCENTS: usize = 4;

/// Rounds in which a thorough search moves weights before it descends.
const THOROUGH_WEIGHT_MOVES: usize = 2;

/// Width of the softmax over paths at first, as a share of a token's time.
const FIRST_SOFTMAX_WIDTH: f32 = 0.1;

/// Weight of a region's width beside the spread of its points when it is split.
const WIDTH_WEIGHT: f64 = 1e-3;

/// Paths at most: the tiers, and the transfers.
const MAX_PATHS: usize = MAX_FAST + 2;

/// Bounds of a region: `[fast tiers]` cuts, then the slots.
type Limits = [u16; MAX_FAST + 1];

/// A box of configurations that have slots on one tier, or none.
struct Region {
    slot_tier: Option<TierIdx>,
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

/// A layer's recorded tokens under any configuration.
struct TokenTimes<'a> {
    table: &'a ReuseTable,
    capacity: &'a Capacity,
    /// `[tiers]` time of experts that compute from there.
    compute: [PathTime; MAX_FAST + 1],
    /// `[tiers]` time of experts that are transferred there.
    transfer: [PathTime; MAX_FAST + 1],
}

impl StageTime for TokenTimes<'_> {
    fn seconds(&self, config: &Config) -> f64 {
        let mut sum = 0.0;
        self.for_each_token(config, |_, times| sum += times.iter().copied().fold(0.0, f64::max));
        sum / self.table.tokens as f64
    }
}

impl TokenTimes<'_> {
    /// Calls `each` with every token's path times under a configuration.
    fn for_each_token(&self, config: &Config, mut each: impl FnMut(usize, &[f64; MAX_PATHS])) {
        let (table, fast) = (self.table, self.capacity.home());
        let n = self.capacity.tiers.len();
        // `[token]` misses among the pooled choices that were used before.
        let mut missed_again = vec![0u16; table.tokens];
        if config.slots > 0 {
            for choice in table.row(config.last_cut(fast)) {
                missed_again[choice.token()] += u16::from(choice.position >= config.slots);
            }
        }
        let choices = table.ranks.chunks_exact(table.used).zip(table.cold.chunks_exact(table.used));
        for (token, ((ranks, cold), missed_again)) in choices.zip(missed_again).enumerate() {
            let mut counts = [0u16; MAX_PATHS];
            let (mut tier, mut pooled, mut missed) = (0, 0u16, missed_again);
            for (&rank, &cold) in ranks.iter().zip(cold) {
                while tier < fast && rank >= config.cuts[tier] {
                    tier += 1;
                }
                if tier < fast {
                    counts[tier] += 1;
                } else {
                    pooled += 1;
                    missed += u16::from(cold);
                }
            }
            if config.slots > 0 {
                counts[usize::from(config.slot_tier)] += pooled;
                counts[n] = missed;
            } else if self.capacity.in_place {
                counts[fast] = pooled;
            } else {
                counts[self.capacity.staging_tier] += pooled;
                counts[n] = pooled;
            }
            each(token, &self.path_times(&counts, usize::from(config.slot_tier)));
        }
    }

    /// Returns the seconds of each path, with missed experts transferred to `slot_tier`.
    fn path_times(&self, counts: &[u16; MAX_PATHS], slot_tier: TierIdx) -> [f64; MAX_PATHS] {
        let n = self.capacity.tiers.len();
        let mut times = [0.0; MAX_PATHS];
        for path in 0..n {
            if counts[path] > 0 {
                let PathTime { per_expert_s, fixed_s } = self.compute[path];
                times[path] = fixed_s + f64::from(counts[path]) * per_expert_s;
            }
        }
        if counts[n] > 0 {
            let PathTime { per_expert_s, fixed_s } = self.transfer[slot_tier];
            times[n] = fixed_s + f64::from(counts[n]) * per_expert_s;
        }
        times
    }

    /// Returns `[token, path]` times under a configuration.
    fn means(&self, config: &Config) -> Vec<f32> {
        let n = self.capacity.tiers.len() + 1;
        let mut means = vec![0.0; self.table.tokens * n];
        self.for_each_token(config, |token, times| {
            means[token * n..][..n].iter_mut().zip(times).for_each(|(m, t)| *m = *t as f32);
        });
        means
    }
}

/// First table: what fixed weights make of the paths.
struct PathWeights {
    /// `[path][rank]` weighted seconds of the experts of each rank, if they are on this path.
    rank_s: Vec<f64>,
    /// `[token]` weight of the transfers.
    transfers: Vec<f64>,
}

/// Third table: the best cuts above the last one.
struct BestCuts {
    /// `[cut]` least cost of the tiers above, if the last fast tier ends at this cut.
    cost: Vec<f64>,
    /// `[tier][cut]` the cut of the tier that is best for the next tier's cut.
    from: Vec<Vec<u16>>,
}

/// Fourth table: weighted seconds of transfers.
enum TransferCosts {
    /// Without slots: `[cut]` seconds of moving every pooled choice.
    Staged(Vec<f64>),
    /// With slots.
    Missed {
        /// `[2 · token + deepest]` seconds of a miss. The deepest choice also pays what is fixed.
        miss_s: Vec<f64>,
        /// `[cut]` seconds of first uses, which no number of slots can serve.
        cold_s: Vec<f64>,
    },
}

/// The number of slots that is best for a last cut, and its cost.
struct SlotChoice {
    slots: u16,
    cost: f64,
}

/// The search of one layer at some prices.
pub struct LayerSearch<'a> {
    descent: LocalDescent<'a, TokenTimes<'a>>,
}

impl<'a> LayerSearch<'a> {
    /// Makes the search of a layer with its reuse table.
    pub fn new(table: &'a ReuseTable, capacity: &'a Capacity, layer: &LayerEvidence, price: &[f64]) -> Self {
        let stage = ExpertStage::new(&capacity.tiers, layer.shape.expert_bytes, layer.prefetch);
        let mut compute = [PathTime::default(); MAX_FAST + 1];
        let mut transfer = [PathTime::default(); MAX_FAST + 1];
        let n = capacity.tiers.len();
        for tier in 0..n {
            compute[tier] = stage.path(tier, tier);
            transfer[tier] = stage.path(n, tier);
        }
        let tokens = TokenTimes { table, capacity, compute, transfer };
        LayerSearch { descent: LocalDescent::new(tokens, capacity, layer.shape, price) }
    }

    /// Returns the configurations that descents from some known ones lead to, the cheapest first.
    ///
    /// A `thorough` search also descends from where the weighted means are least.
    pub fn cheapest(&mut self, start: &[Config], thorough: bool, deadline: Instant) -> Vec<TimedConfig> {
        start.iter().for_each(|config| {
            self.descent.value(config);
        });
        let mut begin = start.to_vec();
        for mut region in if thorough { self.all_regions(start) } else { Vec::new() } {
            for _ in 0..THOROUGH_WEIGHT_MOVES {
                if Instant::now() >= deadline {
                    break;
                }
                self.tighten(&mut region);
                let (point, means) = (region.point, self.descent.timed.means(&region.point));
                region.mean.iter_mut().zip(&means).for_each(|(m, new)| *m += (new - *m) / 2.0);
                if self.descent.fits(&point) && !begin.contains(&point) {
                    begin.push(point);
                }
            }
        }
        let descents = start.len().max(MIN_DESCENTS);
        self.descent.cheapest(begin, descents, deadline)
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
        let least_bound = |open: &[Region]| (0..open.len()).min_by(|&a, &b| open[a].bound.total_cmp(&open[b].bound));
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
        open.iter().map(|region| region.bound).fold(closed, f64::min)
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
        let share = if n_points == 1 { 1.0 } else { 1.0 / n_points as f32 };
        region.mean.iter_mut().zip(&means).for_each(|(m, new)| *m += (new - *m) * share);
        region.weight_moves += 1;
    }

    /// Returns regions that hold all configurations: one per tier of slots, and one without slots.
    fn all_regions(&self, start: &[Config]) -> Vec<Region> {
        let capacity = self.descent.capacity;
        let fast = capacity.home();
        let most = self.descent.timed.table.n_expert as u16;
        let staging_tier = capacity.staging_tier as u8;
        let slot_tiers = capacity.slot_tiers().map(Some).chain([None]);
        slot_tiers
            .map(|slot_tier| {
                let (mut low, mut high) = ([0; MAX_FAST + 1], [0; MAX_FAST + 1]);
                high[..fast].fill(most);
                if slot_tier.is_some() {
                    (low[fast], high[fast]) = (1, most);
                }
                let slots_of = |c: &Config| (c.slots > 0).then_some(usize::from(c.slot_tier));
                let alike = start.iter().filter(|c| slots_of(c) == slot_tier);
                let value = |c: &Config| self.descent.known_value(c);
                let cheapest = alike.min_by(|a, b| value(a).total_cmp(&value(b)));
                let begin = cheapest.or(start.first()).map(|&config| self.with_slots_on(config, slot_tier));
                let none = Config { cuts: [0; MAX_FAST], slots: 0, slot_tier: staging_tier };
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
    fn with_slots_on(&self, mut config: Config, slot_tier: Option<TierIdx>) -> Config {
        let capacity = self.descent.capacity;
        match slot_tier {
            Some(tier) => {
                config.slot_tier = tier as u8;
                let last_cut = config.last_cut(capacity.home());
                if let Some(SlotRange { least, most }) = self.descent.slot_range(last_cut) {
                    config.slots = config.slots.clamp(least, most);
                }
            }
            None => (config.slots, config.slot_tier) = (0, capacity.staging_tier as u8),
        }
        config
    }

    /// Finds the least weighted mean over a region, which bounds it.
    fn tighten(&self, region: &mut Region) {
        let fast = self.descent.capacity.home();
        let weights = self.path_weights(region);
        let prefix = self.prefix_costs(&weights);
        let cuts = self.best_cuts(region, &prefix);
        let transfers = self.transfer_costs(region, &weights);
        // Two sums for each position: additions to one would wait for each other.
        let mut sums = vec![[0.0f64; 2]; self.descent.timed.table.n_expert + 1];
        let mut bound = f64::INFINITY;
        let mut point = region.point;
        let last_cuts =
            if fast == 0 { 0..=0 } else { usize::from(region.low[fast - 1])..=usize::from(region.high[fast - 1]) };
        for last in last_cuts {
            let pinned = if fast > 0 { prefix[fast - 1][last] } else { 0.0 };
            let base = cuts.cost[last] + pinned + self.pooled_cost(region, &prefix, last);
            if !base.is_finite() {
                continue;
            }
            let Some(choice) = self.best_slots(region, last, &transfers, &mut sums) else { continue };
            let value = base + choice.cost;
            if value < bound {
                bound = value;
                let slot_tier = region.slot_tier.unwrap_or(self.descent.capacity.staging_tier) as u8;
                point = Config { cuts: cuts.trace(last as u16, fast), slots: choice.slots, slot_tier };
            }
        }
        if bound > region.bound || !bound.is_finite() {
            region.bound = bound;
        }
        region.point = point;
    }

    /// Returns the tier that the pooled experts of a region compute on.
    fn pool_tier(&self, region: &Region) -> TierIdx {
        let capacity = self.descent.capacity;
        match region.slot_tier {
            Some(tier) => tier,
            None if capacity.in_place => capacity.home(),
            None => capacity.staging_tier,
        }
    }

    /// First pass: weights each token's paths by the region's mean path times.
    ///
    /// The longest path's weight is spread over those that are nearly as long, by a softmax.
    fn path_weights(&self, region: &Region) -> PathWeights {
        let table = self.descent.timed.table;
        let (n, n_expert) = (self.descent.capacity.tiers.len(), table.n_expert);
        let (used, paths) = (table.used, n + 1);
        let longest_of = |m: &[f32]| m.iter().copied().fold(0.0, f32::max);
        let longest: Vec<f32> = region.mean.chunks_exact(paths).map(longest_of).collect();
        let mean_longest = longest.iter().sum::<f32>() / longest.len().max(1) as f32;
        let width = (mean_longest * FIRST_SOFTMAX_WIDTH / region.weight_moves as f32).max(1e-12);
        let mut rank_s = vec![0.0f64; paths * n_expert];
        let mut transfers = vec![0.0f64; table.tokens];
        let pool_tier = self.pool_tier(region);
        for (token, ranks) in table.ranks.chunks_exact(used).enumerate() {
            let mean = &region.mean[token * paths..][..paths];
            let mut weight = [0.0f64; MAX_PATHS];
            let mut sum = 0.0;
            for (w, &m) in weight.iter_mut().zip(mean) {
                *w = f64::from((m - longest[token]) / width).exp();
                sum += *w;
            }
            for path in 0..n {
                let w = weight[path] / sum;
                let on = &mut rank_s[path * n_expert..][..n_expert];
                let PathTime { per_expert_s, fixed_s } = self.descent.timed.compute[path];
                // What starts a path is paid once per token. That is exact for the first tier's pins,
                // whose first expert is the token's most used one. Else each expert pays its part.
                let is_exact = path == 0 && pool_tier != 0;
                let part_s = if is_exact { 0.0 } else { fixed_s / used as f64 };
                for &rank in ranks {
                    on[usize::from(rank)] += w * (per_expert_s + part_s);
                }
                if is_exact {
                    on[usize::from(ranks[0])] += w * fixed_s;
                }
            }
            transfers[token] = weight[n] / sum;
        }
        PathWeights { rank_s, transfers }
    }

    /// Second pass: sums the ranks' costs into `[tier][cut]` costs of the experts before a cut.
    fn prefix_costs(&self, weights: &PathWeights) -> Vec<Vec<f64>> {
        let table = self.descent.timed.table;
        let n_expert = table.n_expert;
        let scale = 1.0 / table.tokens as f64;
        (0..self.descent.capacity.tiers.len())
            .map(|path| {
                let mut sum = 0.0;
                let price = self.descent.expert_price_s[path];
                let steps = weights.rank_s[path * n_expert..][..n_expert].iter().map(|&s| {
                    sum += s * scale + price;
                    sum
                });
                std::iter::once(0.0).chain(steps).collect()
            })
            .collect()
    }

    /// Returns the cost of the experts from a cut on, which compute on one tier and have their
    /// backing copies on the last.
    fn pooled_cost(&self, region: &Region, prefix: &[Vec<f64>], cut: usize) -> f64 {
        let n_expert = self.descent.timed.table.n_expert;
        let (price, tier) = (&self.descent.expert_price_s, self.pool_tier(region));
        let pooled = (n_expert - cut) as f64;
        let compute = prefix[tier][n_expert] - prefix[tier][cut] - price[tier] * pooled;
        compute + price[self.descent.capacity.home()] * pooled
    }

    /// Third pass: for each last cut, the best cuts of the tiers above, tier by tier.
    fn best_cuts(&self, region: &Region, prefix: &[Vec<f64>]) -> BestCuts {
        let n_expert = self.descent.timed.table.n_expert;
        let fast = self.descent.capacity.home();
        let mut cost = vec![0.0f64; n_expert + 1];
        let mut from: Vec<Vec<u16>> = Vec::with_capacity(fast);
        for tier in 0..fast.saturating_sub(1) {
            let (mut best, mut best_cut) = (f64::INFINITY, 0u16);
            let mut trace = vec![0u16; n_expert + 1];
            for cut in 0..=n_expert {
                if (usize::from(region.low[tier])..=usize::from(region.high[tier])).contains(&cut) {
                    let value = cost[cut] + prefix[tier][cut] - prefix[tier + 1][cut];
                    if value < best {
                        (best, best_cut) = (value, cut as u16);
                    }
                }
                trace[cut] = best_cut;
                cost[cut] = best;
            }
            from.push(trace);
        }
        BestCuts { cost, from }
    }

    /// Fourth pass: the weighted seconds of transfers by cut and by miss.
    fn transfer_costs(&self, region: &Region, weights: &PathWeights) -> TransferCosts {
        let table = self.descent.timed.table;
        let (n_expert, used) = (table.n_expert, table.used);
        let scale = 1.0 / table.tokens as f64;
        let to = region.slot_tier.unwrap_or(self.descent.capacity.staging_tier);
        let PathTime { per_expert_s, fixed_s } = self.descent.timed.transfer[to];
        let (each_s, fixed_s) = (per_expert_s * scale, fixed_s * scale);
        let mut by_cut = vec![0.0; n_expert + 1];
        if region.slot_tier.is_none() {
            if !self.descent.capacity.in_place {
                for (token, ranks) in table.ranks.chunks_exact(used).enumerate() {
                    let weight = weights.transfers[token];
                    ranks.iter().for_each(|&r| by_cut[usize::from(r)] += weight * each_s);
                    by_cut[usize::from(ranks[used - 1])] += weight * fixed_s;
                }
                sum_from_the_end(&mut by_cut);
            }
            return TransferCosts::Staged(by_cut);
        }
        let per_token = weights.transfers.iter();
        let miss_s = per_token.flat_map(|w| [w * each_s, w * (each_s + fixed_s)]).collect();
        let choices = table.ranks.chunks_exact(used).zip(table.cold.chunks_exact(used));
        for ((ranks, cold), weight) in choices.zip(&weights.transfers) {
            let mut deepest = None;
            for (&rank, _) in ranks.iter().zip(cold).filter(|(_, cold)| **cold) {
                by_cut[usize::from(rank)] += weight * each_s;
                deepest = Some(rank);
            }
            if let Some(rank) = deepest {
                by_cut[usize::from(rank)] += weight * fixed_s;
            }
        }
        sum_from_the_end(&mut by_cut);
        TransferCosts::Missed { miss_s, cold_s: by_cut }
    }

    /// Fifth pass: the number of slots that is best for a last cut.
    ///
    /// `sums` is scratch space. Returns `None` if the region has no number of slots for the cut.
    fn best_slots(
        &self,
        region: &Region,
        last: usize,
        transfers: &TransferCosts,
        sums: &mut [[f64; 2]],
    ) -> Option<SlotChoice> {
        let (miss_s, cold_s) = match transfers {
            TransferCosts::Staged(by_cut) => return Some(SlotChoice { slots: 0, cost: by_cut[last] }),
            TransferCosts::Missed { miss_s, cold_s } => (miss_s, cold_s),
        };
        let fast = self.descent.capacity.home();
        let price = self.descent.expert_price_s[region.slot_tier?];
        let range = self.descent.slot_range(last as u16)?;
        let (low, high) = (region.low[fast].max(range.least), region.high[fast].min(range.most));
        if low > high {
            return None;
        }
        let bottom = low - 1;
        let sums = &mut sums[..=usize::from(high - bottom)];
        sums.fill([0.0; 2]);
        for (at, choice) in self.descent.timed.table.row(last as u16).iter().enumerate() {
            let place = choice.position.clamp(bottom, high) - bottom;
            sums[usize::from(place)][at & 1] += miss_s[choice.key as usize];
        }
        let (mut missed, mut best) = (cold_s[last], SlotChoice { slots: low, cost: f64::INFINITY });
        for slots in (low..=high).rev() {
            let [a, b] = sums[usize::from(slots - bottom)];
            missed += a + b;
            let cost = missed + price * f64::from(slots);
            if cost < best.cost {
                best = SlotChoice { slots, cost };
            }
        }
        Some(best)
    }

    /// Returns two halves of a region, split where the points tried differ most.
    fn split(&self, region: &Region) -> Option<[Region; 2]> {
        let fast = self.descent.capacity.home();
        let coordinate = |c: &Config, axis: usize| if axis == fast { c.slots } else { c.cuts[axis] };
        let timed = &self.descent.timed;
        let to = region.slot_tier.unwrap_or(self.descent.capacity.staging_tier);
        let transfer_s = timed.transfer[to].per_expert_s;
        let next_tier_s =
            |axis: usize| if axis + 1 >= fast { transfer_s } else { timed.compute[axis + 1].per_expert_s };
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
        let width = |axis: usize| f64::from(region.high[axis] - region.low[axis]) * next_tier_s(axis) * WIDTH_WEIGHT;
        let weight = |axis: usize| spread(axis) + width(axis);
        let axis = (0..=fast).max_by(|&a, &b| weight(a).total_cmp(&weight(b)))?;
        if region.high[axis] == region.low[axis] {
            return None;
        }
        let (least, most) = range(axis);
        let (least, most) = if least < most { (least, most) } else { (region.low[axis], region.high[axis]) };
        let middle = least + (most - least) / 2;
        let half = |low: u16, high: u16| {
            let inside = |c: &&Config| (low..=high).contains(&coordinate(c, axis));
            let points: Vec<Config> = region.points.iter().filter(inside).copied().collect();
            let mean = if points.is_empty() { region.mean.clone() } else { self.mean_of(&points) };
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
        Some([half(region.low[axis], middle), half(middle + 1, region.high[axis])])
    }

    /// Returns `[token, path]` mean path times of some points.
    fn mean_of(&self, points: &[Config]) -> Vec<f32> {
        let timed = &self.descent.timed;
        let mut mean = vec![0.0; timed.table.tokens * (self.descent.capacity.tiers.len() + 1)];
        let share = 1.0 / points.len() as f32;
        for point in points {
            mean.iter_mut().zip(timed.means(point)).for_each(|(m, t)| *m += t * share);
        }
        mean
    }
}

impl BestCuts {
    /// Returns the cuts that lead to a last cut.
    fn trace(&self, last: u16, fast: usize) -> [u16; MAX_FAST] {
        let mut cuts = [0; MAX_FAST];
        let mut cut = last;
        for tier in (0..fast).rev() {
            if tier + 1 < fast {
                cut = self.from[tier][usize::from(cut)];
            }
            cuts[tier] = cut;
        }
        cuts
    }
}

/// Turns values by rank into sums of the ranks from each one on.
fn sum_from_the_end(values: &mut [f64]) {
    for at in (0..values.len() - 1).rev() {
        values[at] += values[at + 1];
    }
}
