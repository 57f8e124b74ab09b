//! `tier-plan logits`: writes the raw logits of given tokens.

use crate::cmd::args::{ModelArgs, ThreadArgs};
use crate::hint::HintExt;
use crate::opening::Opening;
use crate::prepared::Prepared;
use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use std::path::PathBuf;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::{KvType, LogitsMode, RunError};

/// Options of `tier-plan logits`.
#[derive(Debug, Args)]
#[command(
    about = "Write the logits of given tokens, to check one engine against another",
    after_long_help = "Example:\n  tier-plan logits MODEL.gguf --tokens 1,2,3 -o out.f32"
)]
pub struct LogitsArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS")]
    pub tokens: Vec<u32>,
    /// File to write: little-endian f32 `[tokens, vocab]`
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: PathBuf,
    /// Placement plan [default: everything in main memory]
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Also decode this many tokens greedily, and print their ids as a JSON array
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub greedy: u32,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &LogitsArgs) -> Result<()> {
    ensure!(
        !args.tokens.is_empty(),
        "--tokens: no ids, expected at least one"
    );
    let needed = u32::try_from(args.tokens.len())
        .ok()
        .and_then(|n| n.checked_add(args.greedy));
    let needed =
        needed.context("--tokens and --greedy: too many tokens to count, expected fewer")?;
    let threads = args.threads.checked()?;
    safely::check(&args.output)?;
    // Without a plan: a context that fits the tokens exactly, and keys and values as exact as they
    // can be.
    let opening = match &args.plan {
        Some(plan) => Opening {
            plan: Some(plan),
            threads,
            ..Opening::default()
        },
        None => {
            let kv_type = Some(KvType::F32);
            Opening {
                context: Some(needed),
                threads,
                kv_type,
                ..Opening::default()
            }
        }
    };
    let prepared = Prepared::open(args.model.path()?, opening)?;
    let planned = prepared.context();
    // The last of the decoded tokens needs no pass of its own.
    if needed as usize > planned + usize::from(args.greedy > 0) {
        let full = format!(
            "--tokens and --greedy: {needed} tokens together, expected at most {planned}, the context"
        );
        return Err(anyhow!(full)).hint(format!(
            "pass fewer, or solve again with --context {needed}"
        ));
    }
    let n_vocab = prepared.spec().n_vocab;
    if let Some(token) = args.tokens.iter().find(|token| **token as usize >= n_vocab) {
        let token = *token;
        return Err(RunError::Token { token, n_vocab }.into());
    }
    let mut session = prepared.load()?;
    let logits = session.engine.forward(&args.tokens, LogitsMode::All)?;
    let bytes: Vec<u8> = logits.iter().flat_map(|l| l.to_le_bytes()).collect();
    safely::write(&args.output, &bytes)?;
    if args.greedy > 0 {
        let mut last = logits[logits.len() - n_vocab..].to_vec();
        let mut sampler = Sampler::new(SamplerConfig::default());
        let mut ids = Vec::new();
        for i in 0..args.greedy {
            let token = sampler.sample(&mut last, &[]);
            ids.push(token);
            if i + 1 < args.greedy {
                last = session.engine.forward(&[token], LogitsMode::Last)?.to_vec();
            }
        }
        println!("{}", serde_json::to_string(&ids)?);
    }
    Ok(())
}
