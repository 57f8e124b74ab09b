//! Perplexity of a text, and divergence of a model's probabilities from another model's.
//!
//! The rules are llama.cpp's, so that numbers compare with those of its perplexity tool. The text
//! is cut into independent windows of `ctx` tokens. BOS replaces the first token of a window if the
//! model wants BOS. Positions from `ctx / 2` on are scored on the token that follows, so that every
//! score has some context.
//!
//! This module knows logits and log-probabilities, but neither files nor the engine.

use tier_plan_runtime::formats::logprobs::Row;
use tier_plan_runtime::kernels::scoped::spawn_or_run;

/// Range of a [`Row`] in nats below the most likely token. Rarer tokens count as that rare.
const ROW_NATS: f64 = 24.0;

/// Scores of one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// `ln Σ exp(logit)`. A logit minus it is a log-probability.
    pub log_sum: f64,
    /// Most likely token; ties go to the lowest id.
    pub best: u32,
    /// −ln of the probability of the token that followed.
    pub nll: f64,
}

/// Scores one position from its logits; returns `None` if they are NaN or infinite.
pub fn place(logits: &[f32], target: u32) -> Option<Place> {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if *logit > logits[best] {
            best = i;
        }
    }
    let top = *logits.get(best)?;
    let sum: f64 = logits.iter().map(|l| f64::from((l - top).exp())).sum();
    let log_sum = f64::from(top) + sum.ln();
    let nll = log_sum - f64::from(*logits.get(target as usize)?);
    nll.is_finite().then_some(Place {
        log_sum,
        best: best as u32,
        nll,
    })
}

/// Fills `row` with the log-probabilities of a position.
pub fn fill_row(logits: &[f32], place: &Place, row: &mut Row) {
    let top = logits.get(place.best as usize).copied().unwrap_or(0.0);
    let lowest = logits.iter().copied().fold(top, f32::min);
    let nats = f64::from(top - lowest).min(ROW_NATS);
    row.top = (f64::from(top) - place.log_sum) as f32;
    row.step = (nats / f64::from(u16::MAX)) as f32;
    row.target = -place.nll as f32;
    row.best = place.best;
    let per_nat = if row.step > 0.0 { 1.0 / row.step } else { 0.0 };
    row.steps.clear();
    // `as` saturates, which is the cut at ROW_NATS.
    row.steps
        .extend(logits.iter().map(|l| ((top - l) * per_nat).round() as u16));
}

/// Returns the Kullback–Leibler divergence, in nats, of a position's probabilities from the
/// reference's.
pub fn divergence(logits: &[f32], place: &Place, reference: &Row) -> f64 {
    let log_sum = place.log_sum as f32;
    let terms = logits.iter().zip(&reference.steps).map(|(logit, steps)| {
        let wanted = reference.top - reference.step * f32::from(*steps);
        // Clamped, since a token of probability 0 here and not there would make the divergence
        // infinite.
        let found = (logit - log_sum).max(-1e4);
        f64::from(wanted.exp() * (wanted - found))
    });
    terms.sum()
}

/// Calls `work` on every item, with the items distributed over `threads` threads.
pub fn in_parallel<T: Send>(threads: usize, items: &mut [T], work: impl Fn(usize, &mut T) + Sync) {
    let share = items.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for (part, items) in items.chunks_mut(share).enumerate() {
            let work = &work;
            spawn_or_run(scope, move || {
                for (i, item) in items.iter_mut().enumerate() {
                    work(part * share + i, item);
                }
            });
        }
    });
}

/// Running mean with its standard error.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mean {
    /// Number of values.
    pub n: u64,
    sum: f64,
    squares: f64,
}

impl Mean {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.n += 1;
        self.sum += value;
        self.squares += value * value;
    }

    /// Returns the mean; 0 without values.
    pub fn value(&self) -> f64 {
        self.sum / self.n.max(1) as f64
    }

    /// Returns the standard error of the mean for independent values; 0 for fewer than two.
    pub fn error(&self) -> f64 {
        if self.n < 2 {
            return 0.0;
        }
        let variance = self.squares / self.n as f64 - self.value() * self.value();
        (variance.max(0.0) / (self.n - 1) as f64).sqrt()
    }
}

/// Scores of a text.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    /// −ln probability of the tokens that followed.
    pub nll: Mean,
    /// Divergence from the reference, if there is one.
    pub against: Option<Against>,
}

impl Scores {
    /// Returns `exp` of the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        self.nll.value().exp()
    }

    /// Returns the standard error of the perplexity.
    pub fn perplexity_error(&self) -> f64 {
        self.nll.error() * self.perplexity()
    }
}

/// Divergence from a reference.
#[derive(Debug, Clone, Default)]
pub struct Against {
    /// The reference's −ln probability of the tokens that followed.
    pub reference_nll: Mean,
    /// Mean divergence in nats.
    pub divergence: Mean,
    /// Divergence per position, in nats.
    pub divergences: Vec<f64>,
    /// ln of the ratio of the probabilities of the tokens that followed.
    pub log_ratio: Mean,
    /// Positions where both agree on the most likely token.
    pub same_best: u64,
}

impl Against {
    /// Adds a position.
    pub fn add(&mut self, place: &Place, reference: &Row, divergence: f64) {
        let reference_nll = -f64::from(reference.target);
        self.reference_nll.add(reference_nll);
        self.divergence.add(divergence);
        self.divergences.push(divergence);
        self.log_ratio.add(place.nll - reference_nll);
        self.same_best += u64::from(place.best == reference.best);
    }

    /// Returns the share of positions where both agree on the most likely token.
    pub fn same_best_share(&self) -> f64 {
        self.same_best as f64 / self.divergence.n.max(1) as f64
    }

    /// Returns the perplexity over the reference's on the same positions.
    pub fn perplexity_ratio(&self) -> f64 {
        self.log_ratio.value().exp()
    }

    /// Returns the `q`-quantile (0 to 1) of the divergence; 0 without positions.
    pub fn quantile(&self, q: f64) -> f64 {
        let mut sorted = self.divergences.clone();
        sorted.sort_by(f64::total_cmp);
        let at = ((sorted.len() as f64 * q).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
        sorted.get(at).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Straight from the definitions, in double precision.
    fn log_probs(logits: &[f32]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        logits.iter().map(|l| f64::from(*l) - sum.ln()).collect()
    }

    #[test]
    fn an_even_choice_among_n_has_perplexity_n() {
        let mut scores = Scores::default();
        for target in 0..8 {
            scores.nll.add(place(&[2.5; 8], target).unwrap().nll);
        }
        assert!((scores.perplexity() - 8.0).abs() < 1e-5);
        assert!(scores.perplexity_error() < 1e-5);
    }

    #[test]
    fn what_is_no_number_has_no_score() {
        assert_eq!(place(&[0.0, f32::NAN], 0), None);
        assert_eq!(place(&[f32::NEG_INFINITY; 3], 0), None);
        assert_eq!(place(&[0.0, 1.0], 2), None);
        assert_eq!(place(&[], 0), None);
    }

    #[test]
    fn the_error_of_a_mean_is_the_textbook_one() {
        let mut mean = Mean::default();
        [1.0, 2.0, 3.0, 6.0].iter().for_each(|v| mean.add(*v));
        assert_eq!(mean.value(), 3.0);
        // Deviations −2, −1, 0, 3: the variance is 14/4, over 4 − 1.
        assert!((mean.error() - (14.0f64 / 4.0 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn quantiles_are_of_the_sorted_places() {
        let against = Against {
            divergences: vec![3.0, 1.0, 2.0, 4.0],
            ..Against::default()
        };
        assert_eq!(
            [0.0, 0.5, 0.75, 1.0].map(|q| against.quantile(q)),
            [1.0, 2.0, 3.0, 4.0]
        );
        assert_eq!(Against::default().quantile(0.5), 0.0);
    }

    #[test]
    fn parallel_work_touches_every_item_once() {
        for (n, threads) in [(0, 2), (1, 4), (7, 3), (64, 5)] {
            let mut items = vec![0usize; n];
            in_parallel(threads, &mut items, |i, item| *item += i + 1);
            assert_eq!(items, (1..=n).collect::<Vec<_>>());
        }
    }

    proptest! {
        #[test]
        fn scores_and_divergence_follow_their_definitions(
            pairs in proptest::collection::vec((-8.0f32..8.0, -8.0f32..8.0), 2..40), pick: usize,
        ) {
            let (theirs, ours): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let target = pick % ours.len();
            let (wanted, found) = (log_probs(&theirs), log_probs(&ours));
            let mine = place(&ours, target as u32).unwrap();
            prop_assert!((mine.nll + found[target]).abs() < 1e-5);
            prop_assert!(ours.iter().all(|l| *l <= ours[mine.best as usize]));
            let reference = place(&theirs, target as u32).unwrap();
            let mut row = Row::default();
            fill_row(&theirs, &reference, &mut row);
            for (i, w) in wanted.iter().enumerate() {
                let kept = f64::from(row.top - row.step * f32::from(row.steps[i]));
                prop_assert!((kept - w).abs() < 2e-4, "{} {}", kept, w);
            }
            let exact: f64 = wanted.iter().zip(&found).map(|(w, f)| w.exp() * (w - f)).sum();
            let close = divergence(&ours, &mine, &row);
            prop_assert!((close - exact).abs() < 1e-3 * (1.0 + exact), "{} {}", close, exact);
            // A model does not differ from itself.
            prop_assert!(divergence(&theirs, &reference, &row).abs() < 3e-4);
        }
    }
}
