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
}

impl StageTime for TokenTimes<'_> {
    fn seconds(&self, config: &Config) -> f64 {
        let mut sum = 0.0;
        self.for_each_token(config, |_, times| {
            sum += times.iter().copied().fold(0.0, f64::max)
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
        TokenTimes {
            table,
            capacity,
            compute,
            transfer,
        }
    }

    /// Calls `each` with every token's path times under a configuration.
    fn for_each_token(&self, config: &Config, mut each: impl FnMut(usize, &[f64; MAX_PATHS])) {
        let (table, fast) = (self.table, self.capacity.fast());
        let n = self.capacity.tiers.len();
        // `[token]` misses among the pooled choices that were used before.
        let mut missed_again = vec![0u16; table.tokens];
        if config.slots > 0 {
            for choice in table.row(config.last_cut(fast)) {
                missed_again[choice.token()] += u16::from(choice.position >= config.slots);
            }
        }
        let choices = table
            .ranks
            .chunks_exact(table.used)
            .zip(table.cold.chunks_exact(table.used));
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
                counts[config.slot_tier.get()] += pooled;
                counts[n] = missed;
            } else if self.capacity.in_place {
                counts[fast] = pooled;
            } else {
                counts[self.capacity.staging_tier.get()] += pooled;
                counts[n] = pooled;
            }
            each(token, &self.path_times(&counts, config.slot_tier.get()));
        }
    }

    /// Returns the seconds of each path, with missed experts transferred to `slot_tier`.
    fn path_times(&self, counts: &[u16; MAX_PATHS], slot_tier: usize) -> [f64; MAX_PATHS] {
        let n = self.capacity.tiers.len();
        let mut times = [0.0; MAX_PATHS];
        for path in 0..n {
            if counts[path] > 0 {
                let PathTime {
                    per_expert_s,
                    fixed_s,
                } = self.compute[path];
                times[path] = fixed_s + f64::from(counts[path]) * per_expert_s;
            }
        }
        if counts[n] > 0 {
            let PathTime {
                per_expert_s,
                fixed_s,
            } = self.transfer[slot_tier];
            times[n] = (fixed_s + f64::from(counts[n]) * per_expert_s).max(0.0);
        }
        times
    }

    /// Returns `[token, path]` times under a configuration.
    pub(super) fn means(&self, config: &Config) -> Vec<f32> {
        let n = self.capacity.tiers.len() + 1;
        let mut means = vec![0.0; self.table.tokens * n];
        self.for_each_token(config, |token, times| {
            means[token * n..][..n]
                .iter_mut()
                .zip(times)
                .for_each(|(m, t)| *m = *t as f32);
        });
        means
    }
}
