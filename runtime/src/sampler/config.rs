//! Options of sampling, with their ranges.

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
    /// Taken from the logit of every token that was drawn before, once; negative values encourage
    /// it.
    pub presence_penalty: f32,
    /// Taken from the logit of a token for each time that it was drawn before.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, before all else.
    pub logit_bias: Vec<LogitBias>,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// What is added to the logit of a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitBias {
    /// The token; one past the vocabulary is ignored.
    pub token: u32,
    /// -100 to 100. Either end practically forbids or forces the token.
    pub bias: f32,
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
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
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
        )?;
        for (option, found) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            let ok = (-2.0..=2.0).contains(&found);
            within(ok, option, found, "-2 to 2, where 0 is no penalty")?;
        }
        let outside = |b: &&LogitBias| !(-100.0..=100.0).contains(&b.bias);
        self.logit_bias.iter().find(outside).map_or(Ok(()), |b| {
            within(false, "logit_bias", b.bias, "-100 to 100")
        })
    }
}
