//! Decayed use counts: a use loses half its weight within a half-life, given in tokens.
//!
//! Instead of shrinking all counts with every token, the weight of a new use grows with every
//! token, from 1 to 2 within a half-life. Then all counts are halved, and the weight starts at 1
//! again. The arithmetic is of integers, so results are identical on all machines.

use super::scored::Score;

/// Fraction bits of the weight of a use.
const GROWTH_BITS: u32 = 30;

/// Fraction bits of a count.
const COUNT_BITS: u32 = 16;

/// Longest half-life, in tokens. It keeps counts below 2³⁵.
const MAX_HALF_LIFE: u32 = tier_plan_formats::placement::MAX_HALF_LIFE;

const _: () = assert!(MAX_HALF_LIFE <= 1 << 16);

/// The decayed use count of each expert of a layer.
#[derive(Debug, Clone)]
pub(super) struct Decayed {
    /// `[n_expert]`, in units of 1 / [`unit`](Self::unit) uses.
    counts: Vec<u64>,
    /// In tokens.
    half_life: u32,
    /// Tokens since the counts were halved.
    age: u32,
    /// Weight of a use now, 1 to 2, with [`GROWTH_BITS`] fraction bits.
    weight: u64,
    /// Factor by which the weight grows per token, with [`GROWTH_BITS`] fraction bits.
    growth: u64,
}

impl Decayed {
    /// Starts all counts at zero. The half-life is clamped to 1 to [`MAX_HALF_LIFE`] tokens.
    pub(super) fn new(n_expert: usize, half_life: u32) -> Self {
        let half_life = half_life.clamp(1, MAX_HALF_LIFE);
        Decayed {
            counts: vec![0; n_expert],
            half_life,
            age: 0,
            weight: 1 << GROWTH_BITS,
            growth: growth(half_life),
        }
    }

    /// Returns what a use adds to a count now: 2¹⁶ to 2¹⁷.
    pub(super) fn unit(&self) -> u64 {
        self.weight >> (GROWTH_BITS - COUNT_BITS)
    }

    /// Returns the count of an expert, to be divided by the present [`unit`](Self::unit).
    pub(super) fn count(&self, expert: usize) -> u64 {
        self.counts[expert]
    }
}

impl Score for Decayed {
    fn token(&mut self) {
        self.age += 1;
        if self.age == self.half_life {
            self.age = 0;
            self.weight = 1 << GROWTH_BITS;
            self.counts.iter_mut().for_each(|count| *count >>= 1);
        } else {
            // Both are below 2³¹.
            self.weight = (self.weight * self.growth) >> GROWTH_BITS;
        }
    }

    fn used(&mut self, expert: usize) {
        self.counts[expert] += self.unit();
    }

    fn score(&self, expert: usize) -> u64 {
        self.count(expert)
    }
}

/// Returns 2^(1 / `half_life`), rounded down to [`GROWTH_BITS`] fraction bits. It is the product of
/// 2^(2⁻ⁱ) over all set bits `i` of the exponent's binary fraction, each factor the square root of
/// the one before.
fn growth(half_life: u32) -> u64 {
    const BITS: u32 = 62;
    let mut exponent = (1u64 << 32) / u64::from(half_life);
    let mut product = 1u128 << BITS;
    let mut root = 2u128 << BITS;
    for bit in (0..=32).rev() {
        if exponent >> bit & 1 == 1 {
            product = (product * root) >> BITS;
            exponent &= !(1 << bit);
        }
        root = (root << BITS).isqrt();
    }
    (product >> (BITS - GROWTH_BITS)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_a_root_of_two() {
        for half_life in [1, 2, 3, 7, 16, 100, 4096, MAX_HALF_LIFE] {
            let exact = 2f64.powf(1.0 / f64::from(half_life)) * f64::from(1 << GROWTH_BITS);
            assert!(
                (growth(half_life) as f64 - exact).abs() < 2.0,
                "{half_life}"
            );
        }
    }

    #[test]
    fn a_use_loses_half_its_weight_in_a_half_life() {
        for half_life in [1, 5, 16, 1000] {
            let mut uses = Decayed::new(2, half_life);
            uses.token();
            uses.used(0);
            for token in 1..=4 * half_life {
                uses.token();
                let share = uses.count(0) as f64 / uses.unit() as f64;
                let exact = 0.5f64.powf(f64::from(token) / f64::from(half_life));
                assert!(
                    (share - exact).abs() < 1e-3 * exact,
                    "{half_life} {token} {share} {exact}"
                );
            }
            assert_eq!(uses.count(1), 0);
        }
    }

    #[test]
    fn the_largest_count_leaves_room() {
        let mut uses = Decayed::new(1, MAX_HALF_LIFE);
        for _ in 0..20 * MAX_HALF_LIFE {
            uses.token();
            uses.used(0);
        }
        assert!(uses.count(0) < 1 << 35, "{}", uses.count(0));
        assert_eq!(Decayed::new(1, 0).half_life, 1);
        assert_eq!(Decayed::new(1, u32::MAX).half_life, MAX_HALF_LIFE);
    }
}
