//! `tier-plan logits`: the raw output of the network for given tokens.

use crate::cli::LogitsArgs;
use crate::session::{Opening, Session};
use anyhow::{Context, Result, ensure};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::{KvType, LogitsMode};

/// Runs it.
pub fn run(args: &LogitsArgs) -> Result<()> {
    ensure!(!args.tokens.is_empty(), "--tokens is empty; give at least one id");
    let needed = u32::try_from(args.tokens.len()).ok().and_then(|n| n.checked_add(args.greedy));
    let needed = needed.context("--tokens and --greedy are more tokens together than can be counted; give fewer")?;
    safely::check(&args.output)?;
    // Without a plan: a context that fits the tokens exactly, and keys and values as exact as they can be.
    let opening = match &args.plan {
        Some(plan) => Opening { plan: Some(plan), threads: args.threads, ..Opening::default() },
        None => {
            let kv_type = Some(KvType::F32);
            Opening { context: Some(needed), threads: args.threads, kv_type, ..Opening::default() }
        }
    };
    let mut session = Session::open(&args.model, opening)?;
    let planned = session.engine.context();
    // The last of the decoded tokens needs no pass of its own.
    ensure!(
        needed as usize <= planned + usize::from(args.greedy > 0),
        "--tokens and --greedy are {needed} tokens together, but the context is {planned}; give fewer, or solve again \
         with --context {needed}"
    );
    let n_vocab = session.engine.spec().n_vocab;
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
