//! Uses of late and uses of very late, weighed against each other.
//!
//! Text keeps to a subject for a hundred tokens and to a phrase for a few, and experts follow both. One half-life catches
//! one of the two; here each has its own, and a weight says what a use within the phrase is worth beside one within the
//! subject. The planner tries half-lives and weights on the train prompts of a profile, and the plan carries them.

use super::decayed::Decayed;
use super::scored::Worth;
use tier_plan_formats::placement::MAX_RECENT_WEIGHT;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct TwoSpeeds {
    slow: Decayed,
    fast: Decayed,
    /// What the fast count is multiplied with.
    weight: u64,
}

impl TwoSpeeds {
    /// No uses yet.
    pub(super) fn new(n_expert: usize, half_life: u32, recent_half_life: u32, recent_weight: u32) -> Self {
        TwoSpeeds {
            slow: Decayed::new(n_expert, half_life),
            fast: Decayed::new(n_expert, recent_half_life),
            weight: u64::from(recent_weight.min(MAX_RECENT_WEIGHT)),
        }
    }
}

const _: () = assert!(MAX_RECENT_WEIGHT <= 1 << 10);

impl Worth for TwoSpeeds {
    fn token(&mut self) {
        self.slow.token();
        self.fast.token();
    }

    fn used(&mut self, expert: usize) {
        self.slow.used(expert);
        self.fast.used(expert);
    }

    /// `weight · fast + slow`, each divided by its unit, times both units. Below 2⁶³: counts are below 2³⁵, units at most
    /// 2¹⁷ and the weight at most 2¹⁰.
    fn of(&self, expert: usize) -> u64 {
        self.weight * self.fast.count(expert) * self.slow.unit() + self.slow.count(expert) * self.fast.unit()
    }
}
