//! A score from use counts with two half-lives, long and short.
//!
//! Text keeps to a subject for about a hundred tokens and to a phrase for a few, and experts follow
//! both. One half-life captures only one of them. Here each has its own, and a weight says how much
//! a use within the phrase counts against one within the subject. The planner chooses half-lives
//! and weight on the training prompts of a profile, and the plan carries them.

use super::decayed::Decayed;
use super::scored::Score;
use tier_plan_formats::placement::MAX_RECENT_WEIGHT;

/// The weighted sum of a slowly and a quickly decaying use count per expert.
#[derive(Debug, Clone)]
pub(super) struct TwoHalfLives {
    slow: Decayed,
    fast: Decayed,
    /// Factor of the fast count.
    weight: u64,
}

impl TwoHalfLives {
    /// Starts all counts at zero. Half-lives are in tokens.
    pub(super) fn new(
        n_expert: usize,
        half_life: u32,
        recent_half_life: u32,
        recent_weight: u32,
    ) -> Self {
        TwoHalfLives {
            slow: Decayed::new(n_expert, half_life),
            fast: Decayed::new(n_expert, recent_half_life),
            weight: u64::from(recent_weight.min(MAX_RECENT_WEIGHT)),
        }
    }
}

const _: () = assert!(MAX_RECENT_WEIGHT <= 1 << 10);

impl Score for TwoHalfLives {
    fn token(&mut self) {
        self.slow.token();
        self.fast.token();
    }

    fn used(&mut self, expert: usize) {
        self.slow.used(expert);
        self.fast.used(expert);
    }

    /// Returns `weight · fast + slow`, each divided by its unit, times both units. It stays below
    /// 2⁶³: counts are below 2³⁵, units at most 2¹⁷, and the weight at most 2¹⁰.
    fn score(&self, expert: usize) -> u64 {
        self.weight * self.fast.count(expert) * self.slow.unit()
            + self.slow.count(expert) * self.fast.unit()
    }
}
