//! How tokens are drawn, in llama.cpp's terms.

use super::value::{self, RecentTokens, Seed};
use anyhow::{Result, bail};
use clap::Args;
use tier_plan_runtime::sampler::{LogitBias, SamplerConfig};

/// How tokens are drawn.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Temperature; 0 is greedy: always the most likely token
    #[arg(
        long,
        visible_alias = "temp",
        value_name = "T",
        allow_negative_numbers = true,
        default_value_t = 0.0
    )]
    pub temperature: f32,
    /// Top-k sampling: keep the K most likely tokens; 0 or -1 keeps all
    #[arg(
        long,
        value_name = "K",
        allow_negative_numbers = true,
        value_parser = value::top_k,
        default_value = "0"
    )]
    pub top_k: usize,
    /// Nucleus sampling: keep the smallest set of tokens with total probability ≥ P
    #[arg(
        long,
        value_name = "P",
        allow_negative_numbers = true,
        default_value_t = 1.0
    )]
    pub top_p: f32,
    /// Min-p sampling: drop tokens less likely than P times the most likely one
    #[arg(
        long,
        value_name = "P",
        allow_negative_numbers = true,
        default_value_t = 0.0
    )]
    pub min_p: f32,
    /// Repeat penalty: divide the logits of recent tokens by X; 1 is no penalty
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        default_value_t = 1.0
    )]
    pub repeat_penalty: f32,
    /// Number of recent tokens that the repeat penalty applies to; 0 is none, -1 the whole context
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = RecentTokens(64))]
    pub repeat_last_n: RecentTokens,
    /// Presence penalty: lower the logits of tokens that were generated before by X, once
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        default_value_t = 0.0
    )]
    pub presence_penalty: f32,
    /// Frequency penalty: lower the logit of a token by X for each time that it was generated
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        default_value_t = 0.0
    )]
    pub frequency_penalty: f32,
    /// Raise or lower the logit of a token: its id, a sign, and the bias, such as 15043-1.5; repeat
    /// the option for more tokens
    #[arg(long, value_name = "ID±BIAS", value_parser = value::logit_bias)]
    pub logit_bias: Vec<LogitBias>,
    /// Seed of the random numbers; -1 draws a new one per run
    #[arg(
        short,
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value = "0"
    )]
    pub seed: Seed,
}

impl SamplingArgs {
    /// Returns the checked options. A random seed is printed to standard error, so that the run can
    /// be repeated.
    ///
    /// # Errors
    /// When an option is outside its range.
    pub fn checked(&self) -> Result<SamplerConfig> {
        let config = SamplerConfig {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n.0,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.number(),
        };
        check(&config)?;
        if self.seed == Seed::Random {
            eprintln!("seed: {}", config.seed);
        }
        Ok(config)
    }
}

/// Checks that biases are for tokens of a model with `n_vocab` tokens.
///
/// # Errors
/// The first token past the vocabulary.
pub fn check_biases(config: &SamplerConfig, n_vocab: usize) -> Result<()> {
    let past = |bias: &&LogitBias| bias.token as usize >= n_vocab;
    match config.logit_bias.iter().find(past) {
        Some(bias) => bail!(
            "--logit-bias: token {}, expected one of the model's: 0 to {}",
            bias.token,
            n_vocab.saturating_sub(1)
        ),
        None => Ok(()),
    }
}

/// Checks sampling options and names the one that is outside its range as the command line does.
///
/// # Errors
/// When an option is outside its range.
pub fn check(config: &SamplerConfig) -> Result<()> {
    if let Err(bad) = config.check() {
        let option = bad.option.trim_start_matches('-').replace('_', "-");
        bail!("--{option}: {}, expected {}", bad.found, bad.expected);
    }
    Ok(())
}
