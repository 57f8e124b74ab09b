//! How tokens are drawn, in llama.cpp's terms.

use super::value::{self, RecentTokens, Seed};
use anyhow::{Result, bail};
use clap::Args;
use tier_plan_runtime::sampler::SamplerConfig;

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
            seed: self.seed.number(),
            ..SamplerConfig::default()
        };
        check(&config)?;
        if self.seed == Seed::Random {
            eprintln!("seed: {}", config.seed);
        }
        Ok(config)
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
