//! `tier-plan logits`: the raw output of the network for given tokens.

use crate::cli::LogitsArgs;
use crate::session::{Opening, Session};
use anyhow::{Result, ensure};
use tier_plan_runtime::exec::Wanted;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};

/// Runs it.
pub fn run(args: &LogitsArgs) -> Result<()> {
    let needed = args.tokens.len() as u32 + args.greedy;
    let opening = Opening { plan: args.plan.as_deref(), context: None, threads: args.threads };
    // Files without a plan get a context that fits the tokens exactly, whatever the model was trained for.
    let context = args.plan.is_none().then_some(needed.max(1));
    let mut session = Session::open(&args.model, Opening { context, ..opening })?;
    ensure!(!args.tokens.is_empty(), "--tokens is empty; give at least one id");
    let n_vocab = session.engine.spec().n_vocab;
    let logits = session.engine.forward(&args.tokens, Wanted::All)?;
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
                last = session.engine.forward(&[token], Wanted::Last)?.to_vec();
            }
        }
        println!("{}", serde_json::to_string(&ids)?);
    }
    Ok(())
}
