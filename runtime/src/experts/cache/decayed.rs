//! How often experts were used of late: counts in which a use loses half its weight within a number of tokens.
//!
//! Instead of making all counts smaller with every token, a use adds more with every token, from 1 to 2 within a
//! half-life; then all counts are halved and it begins again. In integers, so that it is the same everywhere.

use super::scored::Worth;

/// Binary digits after the point of the weight of a use while it grows.
const GROWTH_BITS: u32 = 30;

/// Binary digits after the point of a count.
const COUNT_BITS: u32 = 16;

/// The longest half-life, in tokens. With it, no count reaches 2³⁵.
const MAX_HALF_LIFE: u32 = tier_plan_formats::placement::MAX_HALF_LIFE;

const _: () = assert!(MAX_HALF_LIFE <= 1 << 16);

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Decayed {
    /// `[n_expert]` with [`COUNT_BITS`] digits after the point, to be divided by [`unit`](Self::unit).
    counts: Vec<u64>,
    half_life: u32,
    /// Tokens since the counts were halved.
    age: u32,
    /// What a use adds now, with [`GROWTH_BITS`] digits after the point: 1 to 2.
    weight: u64,
    /// By how much that grows with every token.
    growth: u64,
}

impl Decayed {
    /// No uses yet. A half-life of 0 tokens is taken as 1, one that is too long as the longest.
    pub(super) fn new(n_expert: usize, half_life: u32) -> Self {
        let half_life = half_life.clamp(1, MAX_HALF_LIFE);
        Decayed { counts: vec![0; n_expert], half_life, age: 0, weight: 1 << GROWTH_BITS, growth: growth(half_life) }
    }

    /// A use's weight now, in units of the counts: 2¹⁶ to 2¹⁷.
    pub(super) fn unit(&self) -> u64 {
        self.weight >> (GROWTH_BITS - COUNT_BITS)
    }

    /// The uses of an expert, in the units of now.
    pub(super) fn count(&self, expert: usize) -> u64 {
        self.counts[expert]
    }
}

impl Worth for Decayed {
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

    fn of(&self, expert: usize) -> u64 {
        self.count(expert)
    }
}

/// 2 to the power of 1 / `half_life`, rounded down to [`GROWTH_BITS`] digits after the point: the product of those square
/// roots of 2, of its square root, and so on, that the binary digits of the exponent name.
fn growth(half_life: u32) -> u64 {
    const BITS: u32 = 62;
    let mut digits = (1u64 << 32) / u64::from(half_life);
    let mut product = 1u128 << BITS;
    let mut root = 2u128 << BITS;
    for place in (0..=32).rev() {
        if digits >> place & 1 == 1 {
            product = (product * root) >> BITS;
            digits &= !(1 << place);
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
            assert!((growth(half_life) as f64 - exact).abs() < 2.0, "{half_life}");
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
                assert!((share - exact).abs() < 1e-3 * exact, "{half_life} {token} {share} {exact}");
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
