//! Sampling: chooses the next token from the logits.
//!
//! The stages follow llama.cpp's order: repeat penalty, top-k, top-p, min-p, temperature, draw.
//! Top-p and min-p therefore see the model's own probabilities, whatever the temperature. The
//! module knows nothing of vocabularies. Equal logits, history and seed give equal tokens.

use thiserror::Error;

/// Options of sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits before the draw; 0 takes the most likely token (greedy).
    pub temperature: f32,
    /// Top-k: keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Nucleus sampling: keeps the smallest set of most likely tokens with at least this total
    /// probability; 1 keeps all.
    pub top_p: f32,
    /// Min-p: drops tokens with less than this share of the highest probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits of recent tokens and multiplies negative ones; 1 changes nothing.
    pub repeat_penalty: f32,
    /// Number of last tokens that count as recent.
    pub repeat_last_n: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for SamplerConfig {
    /// Returns greedy sampling without a penalty.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

/// A sampling option outside its range.
#[derive(Debug, Error, PartialEq)]
#[error("{option} is {found}, expected {expected}")]
pub struct BadSampling {
    /// The option, as its field in [`SamplerConfig`] is called.
    pub option: &'static str,
    /// The value given.
    pub found: f32,
    /// The range, with the meaning of its ends.
    pub expected: &'static str,
}

impl SamplerConfig {
    /// Checks every option.
    ///
    /// # Errors
    /// The first option that is outside its range or not a number.
    pub fn check(&self) -> Result<(), BadSampling> {
        let within = |ok: bool, option, found, expected| {
            if ok {
                Ok(())
            } else {
                Err(BadSampling {
                    option,
                    found,
                    expected,
                })
            }
        };
        let t = self.temperature;
        within(
            (0.0..=100.0).contains(&t),
            "temperature",
            t,
            "0 (the most likely token) to 100",
        )?;
        within(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            self.top_p,
            "more than 0, up to 1 (all tokens)",
        )?;
        within(
            (0.0..=1.0).contains(&self.min_p),
            "min_p",
            self.min_p,
            "0 (all tokens) to 1",
        )?;
        let r = self.repeat_penalty;
        within(
            (0.01..=100.0).contains(&r),
            "repeat_penalty",
            r,
            "0.01 to 100, where 1 is no penalty",
        )
    }
}

/// Draws tokens from logits.
///
/// ```
/// use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
///
/// let mut greedy = Sampler::new(SamplerConfig::default());
/// assert_eq!(greedy.sample(&mut [0.1, 2.5, -1.0], &[]), 1);
///
/// let config = SamplerConfig { temperature: 0.8, top_p: 0.9, seed: 1, ..SamplerConfig::default() };
/// config.check()?;
/// let mut sampler = Sampler::new(config);
/// let token = sampler.sample(&mut [0.1, 2.5, 2.4], &[]);
/// assert!(token == 1 || token == 2);
/// # Ok::<(), tier_plan_runtime::sampler::BadSampling>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    random: Random,
    /// Buffer of a draw.
    candidates: Vec<Candidate>,
    /// Recent tokens, each once.
    penalized: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
}

/// Orders the most likely first, and of equals the lowest id first; logits are never NaN here.
fn by_logit(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Sampler {
    /// Makes a sampler at the start of its random numbers. [`SamplerConfig::check`] refuses options
    /// outside their range; here they do no harm but make little sense.
    pub fn new(config: SamplerConfig) -> Self {
        let random = Random::new(config.seed);
        Self {
            config,
            random,
            candidates: Vec::new(),
            penalized: Vec::new(),
        }
    }

    /// Chooses a token from `logits`, `[n_vocab]`, given the tokens so far, `recent`, newest last.
    ///
    /// Only the last `repeat_last_n` tokens count. NaN counts as impossible. The penalty is left
    /// applied in `logits`. Returns token 0 where all logits are impossible, and where there are
    /// none.
    pub fn sample(&mut self, logits: &mut [f32], recent: &[u32]) -> u32 {
        for l in logits.iter_mut() {
            if l.is_nan() {
                *l = f32::NEG_INFINITY;
            } else if *l == f32::INFINITY {
                *l = f32::MAX;
            }
        }
        self.penalize(logits, recent);
        // Also what `check` would refuse, so that it stays harmless.
        if self.config.temperature <= 0.0 || self.config.temperature.is_nan() {
            return most_likely(logits);
        }
        self.gather(logits);
        self.keep_top_p();
        self.keep_min_p();
        self.draw()
    }

    fn penalize(&mut self, logits: &mut [f32], recent: &[u32]) {
        let penalty = self.config.repeat_penalty;
        if penalty == 1.0 || self.config.repeat_last_n == 0 {
            return;
        }
        let from = recent.len().saturating_sub(self.config.repeat_last_n);
        self.penalized.clear();
        self.penalized.extend_from_slice(&recent[from..]);
        self.penalized.sort_unstable();
        self.penalized.dedup();
        for &id in &self.penalized {
            if let Some(l) = logits.get_mut(id as usize) {
                let changed = if *l > 0.0 { *l / penalty } else { *l * penalty };
                *l = if changed.is_nan() {
                    f32::NEG_INFINITY
                } else {
                    changed
                };
            }
        }
    }

    /// Fills the candidates, most likely first: all that are possible, or the top k.
    fn gather(&mut self, logits: &[f32]) {
        let c = &mut self.candidates;
        c.clear();
        // Ids are 32-bit in every file format.
        let possible = (0u32..)
            .zip(logits)
            .filter(|(_, l)| **l > f32::NEG_INFINITY);
        c.extend(possible.map(|(id, &logit)| Candidate { id, logit }));
        let k = self.config.top_k;
        if k > 0 && k < c.len() {
            c.select_nth_unstable_by(k - 1, by_logit);
            c.truncate(k);
        }
        c.sort_unstable_by(by_logit);
    }

    /// Keeps the most likely candidates whose probabilities first add up to `top_p`, at least one.
    fn keep_top_p(&mut self) {
        let Some(top) = self.candidates.first().map(|c| c.logit) else {
            return;
        };
        if self.config.top_p >= 1.0 {
            return;
        }
        let share = |c: &Candidate| f64::from(c.logit - top).exp();
        let enough = self.candidates.iter().map(share).sum::<f64>() * f64::from(self.config.top_p);
        let mut sum = 0.0;
        let kept = self.candidates.iter().position(|c| {
            sum += share(c);
            sum >= enough
        });
        self.candidates.truncate(kept.map_or(usize::MAX, |i| i + 1));
    }

    /// Keeps the candidates that are at least `min_p` times as likely as the first.
    fn keep_min_p(&mut self) {
        let Some(top) = self.candidates.first().map(|c| c.logit) else {
            return;
        };
        if self.config.min_p > 0.0 {
            let least = top + self.config.min_p.ln();
            let kept = self.candidates.partition_point(|c| c.logit >= least);
            self.candidates.truncate(kept.max(1));
        }
    }

    fn draw(&mut self) -> u32 {
        let Some(top) = self.candidates.first().copied() else {
            return 0;
        };
        // Differences first: logits divided by a small temperature would overflow.
        let temperature = f64::from(self.config.temperature);
        let weight =
            |c: &Candidate| ((f64::from(c.logit) - f64::from(top.logit)) / temperature).exp();
        let total: f64 = self.candidates.iter().map(weight).sum();
        let mut left = self.random.unit() * total;
        for c in &self.candidates {
            left -= weight(c);
            if left < 0.0 {
                return c.id;
            }
        }
        // Rounding left a rest: it belongs to the last token that can be drawn at all.
        self.candidates
            .iter()
            .rev()
            .find(|c| weight(c) > 0.0)
            .map_or(top.id, |c| c.id)
    }
}

/// Returns the token with the highest logit, the lowest id of equals.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = (0u32, f32::NEG_INFINITY);
    for (id, &l) in (0u32..).zip(logits) {
        if l > best.1 {
            best = (id, l);
        }
    }
    best.0
}

/// xoshiro256++ (Blackman and Vigna, public domain), its state filled by SplitMix64.
#[derive(Debug, Clone)]
struct Random([u64; 4]);

impl Random {
    fn new(seed: u64) -> Self {
        let mut at = seed;
        Self(std::array::from_fn(|_| {
            at = at.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (at ^ (at >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }))
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Returns a number from 0 to just under 1, all 53 bits of it random.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn warm() -> SamplerConfig {
        SamplerConfig {
            temperature: 1.0,
            ..Default::default()
        }
    }

    /// Returns the share of `n` draws that each of `logits` has.
    fn shares(config: SamplerConfig, logits: &[f32], recent: &[u32], n: u32) -> Vec<f64> {
        let mut sampler = Sampler::new(config);
        let mut counts = vec![0u32; logits.len()];
        for _ in 0..n {
            counts[sampler.sample(&mut logits.to_vec(), recent) as usize] += 1;
        }
        counts
            .iter()
            .map(|c| f64::from(*c) / f64::from(n))
            .collect()
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        // Five standard deviations of 40 000 draws are at most 0.0125.
        let near = found
            .iter()
            .zip(expected)
            .all(|(f, e)| (f - e).abs() < 0.0125);
        assert!(
            near && found.len() == expected.len(),
            "{found:?} is not {expected:?}"
        );
    }

    fn logs(shares: &[f32]) -> Vec<f32> {
        shares.iter().map(|p| p.ln() + 3.0).collect()
    }

    #[test]
    fn random_numbers_are_the_published_ones() {
        // First outputs for the state 1, 2, 3, 4, from the reference implementation's
        // documentation.
        let mut r = Random([1, 2, 3, 4]);
        assert_eq!(
            [r.next(), r.next(), r.next()],
            [41_943_041, 58_720_359, 3_588_806_011_781_223]
        );
        // SplitMix64 of 0.
        assert_eq!(Random::new(0).0[0], 0xE220_A839_7B1D_CDAF);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut s = Sampler::new(SamplerConfig::default());
        assert_eq!(s.sample(&mut [1.0, 7.0, 7.0, f32::NAN], &[]), 1);
        assert_eq!(s.sample(&mut [f32::NAN, -3.0], &[]), 1);
        assert_eq!(s.sample(&mut [f32::NAN, f32::NEG_INFINITY], &[]), 0);
        assert_eq!(s.sample(&mut [], &[]), 0);
        assert_eq!(s.sample(&mut [0.0, f32::INFINITY], &[]), 1);
    }

    #[test]
    fn draws_have_the_shares_of_the_softmax() {
        let p = [0.5, 0.2, 0.2, 0.1];
        assert_near(
            &shares(warm(), &logs(&p.map(|x| x as f32)), &[], 40_000),
            &p,
        );
        // Temperature 2 takes the square root of the shares.
        let roots = p.map(f64::sqrt);
        let sum: f64 = roots.iter().sum();
        let hot = SamplerConfig {
            temperature: 2.0,
            ..warm()
        };
        assert_near(
            &shares(hot, &logs(&p.map(|x| x as f32)), &[], 40_000),
            &roots.map(|r| r / sum),
        );
    }

    #[test]
    fn each_filter_keeps_what_it_says() {
        let logits = logs(&[0.1, 0.5, 0.15, 0.25]);
        let top_k = SamplerConfig { top_k: 2, ..warm() };
        assert_near(
            &shares(top_k, &logits, &[], 40_000),
            &[0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0],
        );
        let top_p = SamplerConfig {
            top_p: 0.6,
            ..warm()
        };
        assert_near(
            &shares(top_p, &logits, &[], 40_000),
            &[0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0],
        );
        let one = SamplerConfig {
            top_p: 0.01,
            ..warm()
        };
        assert_near(&shares(one, &logits, &[], 100), &[0.0, 1.0, 0.0, 0.0]);
        let min_p = SamplerConfig {
            min_p: 0.28,
            ..warm()
        };
        assert_near(
            &shares(min_p, &logits, &[], 40_000),
            &[0.0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9],
        );
        // Top-p looks at what top-k left: of 2/3 and 1/3 the first is enough for 0.6.
        let both = SamplerConfig {
            top_k: 2,
            top_p: 0.6,
            ..warm()
        };
        assert_near(&shares(both, &logits, &[], 100), &[0.0, 1.0, 0.0, 0.0]);
        // Filters come before the temperature, so a hot draw is among the same tokens.
        let hot = SamplerConfig {
            top_p: 0.6,
            temperature: 50.0,
            ..warm()
        };
        let found = shares(hot, &logits, &[], 4000);
        assert!(
            found[0] == 0.0 && found[2] == 0.0 && found[3] > 0.45,
            "{found:?}"
        );
    }

    #[test]
    fn recent_tokens_are_penalized_once_and_only_as_far_back_as_asked() {
        let config = SamplerConfig {
            repeat_penalty: 2.0,
            repeat_last_n: 2,
            ..Default::default()
        };
        let mut logits = [4.0, -1.0, 3.0, 3.5];
        assert_eq!(
            Sampler::new(config.clone()).sample(&mut logits, &[3, 0, 0]),
            3
        );
        assert_eq!(logits, [2.0, -1.0, 3.0, 3.5]);
        Sampler::new(config).sample(&mut logits, &[1, 99]);
        assert_eq!(logits, [2.0, -2.0, 3.0, 3.5]);
    }

    #[test]
    fn a_seed_is_a_text() {
        let text = |seed| {
            let mut s = Sampler::new(SamplerConfig { seed, ..warm() });
            (0..50)
                .map(|_| s.sample(&mut [0.0; 100], &[]))
                .collect::<Vec<_>>()
        };
        assert_eq!(text(7), text(7));
        assert_ne!(text(7), text(8));
    }

    #[test]
    fn bad_options_are_named() {
        let ok = SamplerConfig {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            ..Default::default()
        };
        assert_eq!(ok.check(), Ok(()));
        let message = |c: SamplerConfig| c.check().unwrap_err().to_string();
        assert!(
            message(SamplerConfig {
                temperature: -0.1,
                ..ok.clone()
            })
            .starts_with("temperature is -0.1, expected 0")
        );
        assert!(
            message(SamplerConfig {
                temperature: f32::NAN,
                ..ok.clone()
            })
            .contains("temperature is NaN")
        );
        assert!(
            message(SamplerConfig {
                top_p: 0.0,
                ..ok.clone()
            })
            .contains("top_p")
        );
        assert!(
            message(SamplerConfig {
                min_p: 1.5,
                ..ok.clone()
            })
            .contains("min_p")
        );
        assert!(
            message(SamplerConfig {
                repeat_penalty: 0.0,
                ..ok
            })
            .contains("repeat_penalty")
        );
    }

    proptest! {
        #[test]
        fn any_input_gives_a_possible_token(
            logits in prop::collection::vec(prop_oneof![any::<f32>(), Just(f32::NAN), -5f32..5.0], 1..40),
            (temperature, top_k, top_p, min_p) in (0f32..3.0, 0usize..50, 0.01f32..=1.0, 0f32..=1.0),
            recent in prop::collection::vec(0u32..50, 0..9),
            seed in any::<u64>(),
        ) {
            let config = SamplerConfig { temperature, top_k, top_p, min_p, repeat_penalty: 1.3, repeat_last_n: 4, seed };
            prop_assert_eq!(config.check(), Ok(()));
            let mut changed = logits.clone();
            let id = Sampler::new(config).sample(&mut changed, &recent) as usize;
            prop_assert!(id < logits.len());
            let possible = |l: f32| !l.is_nan() && l > f32::NEG_INFINITY;
            prop_assert!(possible(changed[id]) || !changed.iter().any(|l| possible(*l)));
            // Never outside the top k.
            let better = changed.iter().filter(|l| **l > changed[id]).count();
            prop_assert!(top_k == 0 || temperature == 0.0 || better < top_k);
        }
    }
}
