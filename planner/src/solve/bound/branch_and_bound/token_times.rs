//! Path times of a layer's recorded tokens under any configuration.

use super::MAX_PATHS;
use crate::cost::{ExpertStage, PathTime};
use crate::solve::bound::local_descent::StageTime;
use crate::solve::problem::capacity::{Capacity, MAX_FAST};
use crate::solve::problem::columns::Config;
use crate::solve::problem::reuse_table::ReuseTable;
use tier_plan_runtime::formats::placement::TierIdx;

/// A layer's recorded tokens under any configuration.
pub(super) struct TokenTimes<'a> {
    pub(super) table: &'a ReuseTable,
    pub(super) capacity: &'a Capacity,
    /// `[tiers]` time of experts that compute from there.
    pub(super) compute: [PathTime; MAX_FAST + 1],
    /// `[tiers]` time of experts that are transferred there.
    pub(super) transfer: [PathTime; MAX_FAST + 1],
    /// `[tiers][used + 1]` seconds by the number of experts that compute from there.
    compute_s: Vec<f64>,
    /// `[tiers][used + 1]` seconds by the number of experts that are transferred there.
    transfer_s: Vec<f64>,
}

impl StageTime for TokenTimes<'_> {
    fn seconds(&self, config: &Config) -> f64 {
        let mut sum = 0.0;
        let stride = self.table.used + 1;
        let n = self.capacity.tiers.len();
        let transfer_s = &self.transfer_s[config.slot_tier.get() * stride..][..stride];
        self.for_each_token(config, |_, counts| {
            let mut longest = transfer_s[usize::from(counts[n])];
            for (&count, of_tier) in counts[..n].iter().zip(self.compute_s.chunks_exact(stride)) {
                longest = longest.max(of_tier[usize::from(count)]);
            }
            sum += longest;
        });
        sum / self.table.tokens as f64
    }
}

impl<'a> TokenTimes<'a> {
    /// Makes the times of a layer's expert stage.
    pub(super) fn new(table: &'a ReuseTable, capacity: &'a Capacity, stage: &ExpertStage) -> Self {
        let mut compute = [PathTime::default(); MAX_FAST + 1];
        let mut transfer = [PathTime::default(); MAX_FAST + 1];
        let n = capacity.tiers.len();
        for tier in 0..n {
            compute[tier] = stage.path(tier, TierIdx::new(tier));
            transfer[tier] = stage.path(n, TierIdx::new(tier));
        }
        let by_count = |paths: &[PathTime]| {
            let of_path = |path: &PathTime| {
                let path = *path;
                (0..=table.used).map(move |count| path.seconds(count as f64))
            };
            paths.iter().flat_map(of_path).collect()
        };
        TokenTimes {
            table,
            capacity,
            compute,
            transfer,
            compute_s: by_count(&compute[..n]),
            transfer_s: by_count(&transfer[..n]),
        }
    }

    /// Calls `each` with every token's experts on each path under a configuration.
    fn for_each_token(&self, config: &Config, mut each: impl FnMut(usize, &[u16; MAX_PATHS])) {
        let (table, fast) = (self.table, self.capacity.fast());
        let n = self.capacity.tiers.len();
        let (has_slots, last_cut) = (config.slots > 0, config.last_cut(fast));
        // Where pooled experts compute.
        let pool_tier = if has_slots {
            config.slot_tier.get()
        } else if self.capacity.in_place {
            fast
        } else {
            self.capacity.staging_tier.get()
        };
        for (token, ranks) in table.ranks.chunks_exact(table.used).enumerate() {
            let mut counts = [0u16; MAX_PATHS];
            let (mut tier, mut pooled, mut missed) = (0, 0u16, 0u16);
            for (at, &rank) in ranks.iter().enumerate() {
                while tier < fast && rank >= config.cuts[tier] {
                    tier += 1;
                }
                if tier < fast {
                    counts[tier] += 1;
                    continue;
                }
                pooled += 1;
                if has_slots {
                    let choice = token * table.used + at;
                    let is_missed =
                        table.cold[choice] || table.position(choice, last_cut) >= config.slots;
                    missed += u16::from(is_missed);
                }
            }
            counts[pool_tier] += pooled;
            counts[n] = if has_slots {
                missed
            } else if self.capacity.in_place {
                0
            } else {
                pooled
            };
            each(token, &counts);
        }
    }

    /// Returns `[token, path]` times under a configuration.
    pub(super) fn means(&self, config: &Config) -> Vec<f32> {
        let n = self.capacity.tiers.len() + 1;
        let mut means = vec![0.0; self.table.tokens * n];
        let stride = self.table.used + 1;
        let paths = self.compute_s.chunks_exact(stride);
        let to = &self.transfer_s[config.slot_tier.get() * stride..][..stride];
        let paths: Vec<&[f64]> = paths.chain([to]).collect();
        self.for_each_token(config, |token, counts| {
            for ((mean, path), &count) in means[token * n..].iter_mut().zip(&paths).zip(counts) {
                *mean = path[usize::from(count)] as f32;
            }
        });
        means
    }
}
