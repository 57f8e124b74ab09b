//! Draws tokens from counts: what plans are judged on where no tokens were recorded.
//!
//! A token's experts are drawn so that each is chosen exactly as often as counted, and tokens are
//! independent of each other. Real text repeats itself, so a cache does better on it than on these.

use super::synthetic::Random;
use crate::profile::replay::LayerTrace;

/// Drawn tokens per layer that are judged.
pub const TOKENS: usize = 1024;

/// Drawn tokens per layer that fill the slots first.
const WARM_UP: usize = 256;

/// Seed of the drawing. It is fixed, so that a plan can be made again.
pub const SEED: u64 = 1;

/// Returns `[n_expert]` shares of tokens that choose each expert, from how often each was chosen;
/// they sum to `n_used`.
pub fn shares(counts: &[u64], n_used: u32) -> Vec<f64> {
    let sum: u64 = counts.iter().sum();
    let tokens = sum as f64 / f64::from(n_used);
    // No token chooses an expert twice; rounding of large counts may say so.
    counts
        .iter()
        .map(|&c| (c as f64 / tokens.max(f64::MIN_POSITIVE)).min(1.0))
        .collect()
}

/// Draws a layer's tokens. `share` is as from [`shares`].
pub fn trace(share: &[f64], n_used: usize, layer: u32) -> LayerTrace {
    let mut random = Random::new(SEED.wrapping_add(u64::from(layer) << 8));
    let mut order: Vec<u16> = (0..share.len() as u16).collect();
    let mut draw = |tokens: usize| {
        let mut chosen = Vec::with_capacity(tokens * n_used);
        for _ in 0..tokens {
            one(share, n_used, &mut order, &mut random, &mut chosen);
        }
        chosen
    };
    let warm_up = draw(WARM_UP);
    LayerTrace::made_up(share.len(), n_used, &warm_up, draw(TOKENS))
}

/// Draws one token by systematic sampling (W. G. Madow, 1949).
///
/// Experts are laid out in random order, each as long as its share. Marks at equal distances hit
/// `n_used` different ones, each as often as its share says.
fn one(
    share: &[f64],
    n_used: usize,
    order: &mut [u16],
    random: &mut Random,
    chosen: &mut Vec<u16>,
) {
    (1..order.len()).for_each(|i| order.swap(i, random.below(i + 1)));
    let total: f64 = share.iter().sum();
    let step = total / n_used as f64;
    let mut mark = random.unit() * step;
    let from = chosen.len();
    let mut end = 0.0;
    for &expert in order.iter() {
        end += share[usize::from(expert)];
        // A share above a step, which only rounding makes, is still chosen once.
        if mark < end && chosen.len() - from < n_used {
            chosen.push(expert);
            mark += step;
        }
    }
    // Rounding may leave the last mark beyond the end.
    for &expert in order.iter().rev() {
        if chosen.len() - from == n_used {
            break;
        }
        if !chosen[from..].contains(&expert) {
            chosen.push(expert);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tokens_choose_different_experts_as_often_as_counted(
            weights in proptest::collection::vec(0u64..1000, 8..60),
            used in 1usize..8,
        ) {
            let tokens = 10_000u64;
            let used = used as u64;
            // Whole counts with the right sum, none above the number of tokens.
            let mut counts: Vec<u64> = weights.iter().map(|w| w * tokens / 1000).collect();
            let mut at = 0;
            let n = counts.len();
            while counts.iter().sum::<u64>() != used * tokens {
                let sum: u64 = counts.iter().sum();
                let this = &mut counts[at % n];
                *this = if sum < used * tokens {
                    (*this + used * tokens - sum).min(tokens)
                } else {
                    *this - (*this).min(sum - used * tokens)
                };
                at += 1;
            }
            let share = shares(&counts, used as u32);
            let trace = trace(&share, used as usize, 3);
            prop_assert_eq!(trace.tokens(), TOKENS);
            for (chosen, _) in trace.steps().filter(|(_, counted)| *counted) {
                let mut sorted = chosen.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                prop_assert_eq!(sorted.len(), used as usize);
            }
            for (drawn, share) in trace.decode_share().iter().zip(&share) {
                // Thousands of shares are looked at in a run: seven standard deviations.
                let error = 7.0 * (share * (1.0 - share) / TOKENS as f64).sqrt() + 1e-9;
                prop_assert!((drawn - share).abs() <= error, "{} {}", drawn, share);
            }
        }
    }

    #[test]
    fn the_same_counts_draw_the_same_tokens() {
        let share = shares(&[5, 10, 5, 20], 2);
        assert_eq!(share, [0.25, 0.5, 0.25, 1.0]);
        assert_eq!(trace(&share, 2, 1), trace(&share, 2, 1));
        assert_ne!(trace(&share, 2, 1), trace(&share, 2, 2));
    }
}
