//! The relaxation of one region: dynamic programming over tables, with weights fixed per token.

use super::{LayerSearch, MAX_PATHS, Region};
use crate::cost::PathTime;
use crate::solve::bound::local_descent::SlotRange;
use crate::solve::problem::capacity::MAX_FAST;
use crate::solve::problem::columns::Config;
use crate::solve::problem::reuse_table::ReusedChoice;
use tier_plan_runtime::formats::placement::TierIdx;

/// Width of the softmax over paths at first, as a share of a token's time.
const FIRST_SOFTMAX_WIDTH: f32 = 0.1;

/// Last cuts that are looked at to find the begin of a descent.
const SAMPLED_CUTS: usize = 48;

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
    /// With slots, which spare some transfers.
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

impl LayerSearch<'_> {
    /// Finds the least weighted mean over a region, which bounds it.
    pub(super) fn tighten(&self, region: &mut Region) {
        let (bound, point) = self.least(region, 1);
        if bound > region.bound || !bound.is_finite() {
            region.bound = bound;
        }
        region.point = point;
    }

    /// Finds where the weighted mean over a region is about least, by a part of the last cuts.
    ///
    /// That bounds nothing, but is a good place to begin a descent.
    pub(super) fn sample(&self, region: &mut Region) {
        let cuts = self.descent.timed.table.n_expert + 1;
        region.point = self.least(region, cuts.div_ceil(SAMPLED_CUTS)).1;
    }

    /// Returns the least weighted mean over every `stride`th last cut of a region, and where it is.
    fn least(&self, region: &Region, stride: usize) -> (f64, Config) {
        let fast = self.descent.capacity.fast();
        let weights = self.path_weights(region);
        let prefix = self.prefix_costs(&weights);
        let cuts = self.best_cuts(region, &prefix);
        let transfers = self.transfer_costs(region, &weights);
        // Two sums for each position: additions to one would wait for each other.
        let mut sums = vec![[0.0f64; 2]; self.descent.timed.table.n_expert + 1];
        let mut row = Vec::new();
        let mut bound = f64::INFINITY;
        let mut point = region.point;
        let last_cuts = if fast == 0 {
            0..=0
        } else {
            usize::from(region.low[fast - 1])..=usize::from(region.high[fast - 1])
        };
        for last in last_cuts.step_by(stride) {
            let pinned = if fast > 0 {
                prefix[fast - 1][last]
            } else {
                0.0
            };
            let base = cuts.cost[last] + pinned + self.pooled_cost(region, &prefix, last);
            if !base.is_finite() {
                continue;
            }
            let Some(choice) = self.best_slots(region, last, &transfers, &mut sums, &mut row)
            else {
                continue;
            };
            let value = base + choice.cost;
            if value < bound {
                bound = value;
                let slot_tier = region
                    .slot_tier
                    .map_or(self.descent.capacity.staging_tier, TierIdx::new);
                point = Config {
                    cuts: cuts.trace(last as u16, fast),
                    slots: choice.slots,
                    slot_tier,
                };
            }
        }
        (bound, point)
    }

    /// Returns the tier that the pooled experts of a region compute on.
    fn pool_tier(&self, region: &Region) -> usize {
        let capacity = self.descent.capacity;
        match region.slot_tier {
            Some(tier) => tier,
            None if capacity.in_place => capacity.fast(),
            None => capacity.staging_tier.get(),
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
                let PathTime {
                    per_expert_s,
                    fixed_s,
                } = self.descent.timed.compute[path];
                // What starts a path is paid once per token. That is exact for the first tier's
                // pins, whose first expert is the token's most used one. Else each expert pays its
                // part.
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
                let steps = weights.rank_s[path * n_expert..][..n_expert]
                    .iter()
                    .map(|&s| {
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
        compute + price[self.descent.capacity.fast()] * pooled
    }

    /// Third pass: for each last cut, the best cuts of the tiers above, tier by tier.
    fn best_cuts(&self, region: &Region, prefix: &[Vec<f64>]) -> BestCuts {
        let n_expert = self.descent.timed.table.n_expert;
        let fast = self.descent.capacity.fast();
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
        let to = region
            .slot_tier
            .unwrap_or(self.descent.capacity.staging_tier.get());
        let PathTime {
            per_expert_s,
            fixed_s,
        } = self.descent.timed.transfer[to].without_negative();
        let (each_s, fixed_s) = (per_expert_s * scale, fixed_s * scale);
        let mut by_cut = vec![0.0; n_expert + 1];
        if region.slot_tier.is_none() {
            if !self.descent.capacity.in_place {
                for (token, ranks) in table.ranks.chunks_exact(used).enumerate() {
                    let weight = weights.transfers[token];
                    ranks
                        .iter()
                        .for_each(|&r| by_cut[usize::from(r)] += weight * each_s);
                    by_cut[usize::from(ranks[used - 1])] += weight * fixed_s;
                }
                sum_from_the_end(&mut by_cut);
            }
            return TransferCosts::Staged(by_cut);
        }
        let per_token = weights.transfers.iter();
        let miss_s = per_token
            .flat_map(|w| [w * each_s, w * (each_s + fixed_s)])
            .collect();
        let choices = table
            .ranks
            .chunks_exact(used)
            .zip(table.cold.chunks_exact(used));
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
        TransferCosts::Missed {
            miss_s,
            cold_s: by_cut,
        }
    }

    /// Fifth pass: the number of slots that is best for a last cut.
    ///
    /// `sums` and `row` are scratch space. Returns `None` if the region has no number of slots for the cut.
    fn best_slots(
        &self,
        region: &Region,
        last: usize,
        transfers: &TransferCosts,
        sums: &mut [[f64; 2]],
        row: &mut Vec<ReusedChoice>,
    ) -> Option<SlotChoice> {
        let (miss_s, cold_s) = match transfers {
            TransferCosts::Staged(by_cut) => {
                return Some(SlotChoice {
                    slots: 0,
                    cost: by_cut[last],
                });
            }
            TransferCosts::Missed { miss_s, cold_s } => (miss_s, cold_s),
        };
        let fast = self.descent.capacity.fast();
        let price = self.descent.expert_price_s[region.slot_tier?];
        let SlotRange { least, most } = self.descent.slot_range(last as u16)?;
        let (low, high) = (region.low[fast].max(least), region.high[fast].min(most));
        if low > high {
            return None;
        }
        let bottom = low - 1;
        let sums = &mut sums[..=usize::from(high - bottom)];
        sums.fill([0.0; 2]);
        self.descent.timed.table.row(last as u16, row);
        for (at, choice) in row.iter().enumerate() {
            let place = choice.position.clamp(bottom, high) - bottom;
            sums[usize::from(place)][at & 1] += miss_s[choice.key as usize];
        }
        let (mut missed, mut best) = (
            cold_s[last],
            SlotChoice {
                slots: low,
                cost: f64::INFINITY,
            },
        );
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
