//! Sampling: chooses the next token from the logits.
//!
//! The stages follow llama.cpp's order: logit bias, penalties, top-k, top-p, min-p, temperature,
//! draw. Top-p and min-p therefore see the model's own probabilities, whatever the temperature. The
//! module knows nothing of vocabularies. Equal logits, history and seed give equal tokens.
//!
//! [`log_probabilities`] says how likely a token was, and [`StopStrings`] where a text ends.

mod config;
mod logprobs;
mod random;
mod stop;
#[cfg(test)]
mod tests;

pub use config::{BadSampling, LogitBias, SamplerConfig};
pub use logprobs::{LogProbability, TokenLogProbabilities, log_probabilities};
pub use stop::{Passed, StopStrings};

use random::Random;
use std::collections::BTreeMap;

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
    /// How often each token was drawn, as far as a penalty asks for that.
    drawn: BTreeMap<u32, u32>,
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
            drawn: BTreeMap::new(),
        }
    }

    /// Chooses a token from `logits`, `[n_vocab]`, given the tokens so far, `recent`, newest last.
    ///
    /// For the repeat penalty, only the last `repeat_last_n` tokens count. The other penalties count
    /// the tokens that this sampler has chosen. NaN counts as impossible. Biases and penalties are
    /// left applied in `logits`. Returns token 0 where all logits are impossible, and where there
    /// are none.
    pub fn sample(&mut self, logits: &mut [f32], recent: &[u32]) -> u32 {
        for l in logits.iter_mut() {
            *l = clean(*l);
        }
        for b in &self.config.logit_bias {
            if let Some(l) = logits.get_mut(b.token as usize) {
                *l = clean(*l + b.bias);
            }
        }
        self.penalize(logits, recent);
        self.penalize_drawn(logits);
        let token = self.choose(logits);
        if self.counts_drawn() {
            let count = self.drawn.entry(token).or_default();
            *count = count.saturating_add(1);
        }
        token
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        // Also what `check` would refuse, so that it stays harmless.
        if self.config.temperature <= 0.0 || self.config.temperature.is_nan() {
            return most_likely(logits);
        }
        self.gather(logits);
        self.keep_top_p();
        self.keep_min_p();
        self.draw()
    }

    /// Whether a penalty asks for the tokens that were drawn.
    fn counts_drawn(&self) -> bool {
        self.config.presence_penalty != 0.0 || self.config.frequency_penalty != 0.0
    }

    /// Applies the presence and the frequency penalty.
    fn penalize_drawn(&self, logits: &mut [f32]) {
        for (&id, &count) in &self.drawn {
            if let Some(l) = logits.get_mut(id as usize) {
                let frequency = count as f32 * self.config.frequency_penalty;
                *l = clean(*l - frequency - self.config.presence_penalty);
            }
        }
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
                *l = clean(if *l > 0.0 { *l / penalty } else { *l * penalty });
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

/// Returns a logit that can be ordered and subtracted: NaN is impossible, and infinity is finite.
fn clean(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        logit.min(f32::MAX)
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
