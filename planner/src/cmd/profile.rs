//! `tier-plan profile`: which experts a model uses, over calibration prompts.

use crate::bundled;
use crate::cli::ProfileArgs;
use crate::profile::collect::{Settings, collect};
use crate::profile::prompts;
use crate::profile::stats::{Skew, skews};
use crate::session::{self, Opening, Session};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::profile::{Phase, Profile};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::SamplerConfig;

/// Runs it.
pub fn run(args: &ProfileArgs) -> Result<()> {
    ensure!(args.prompt_tokens > 0, "--prompt-tokens 0 leaves nothing to process; give 1 or more");
    let settings = Settings {
        prompt_tokens: args.prompt_tokens,
        decode_tokens: args.decode_tokens,
        temperature: args.temperature,
        seed: args.seed,
    };
    let context = args.prompt_tokens.checked_add(args.decode_tokens);
    let context =
        context.context("--prompt-tokens and --decode-tokens are more together than can be counted; give fewer")?;
    SamplerConfig { temperature: args.temperature, ..SamplerConfig::default() }.check()?;
    let folder = match &args.prompts {
        Some(folder) => folder.clone(),
        None => bundled::path("prompts")?,
    };
    let prompts = prompts::read(&folder)?;
    let output = args.output.clone().unwrap_or_else(|| {
        let stem = args.model.file_stem().unwrap_or_default();
        let mut name = PathBuf::from(stem);
        name.as_mut_os_string().push(".profile");
        name
    });
    safely::check(&output)?;
    let opening = Opening { context: Some(context), threads: args.threads, ..Opening::default() };
    let mut session = Session::open(&args.model, opening)?;
    let tokenizer = session.tokenizer_with(args.tokenizer_pre.as_deref())?;
    let _catching = session::catch_interrupts();
    let profile = collect(&mut session, &tokenizer, &prompts, settings, &output, args.restart)?;
    show(&profile, &output, args.json)
}

/// Says how skewed the access is, by domain, on held-out prompts.
pub fn show(profile: &Profile, output: &Path, as_json: bool) -> Result<()> {
    let skews = skews(profile)?;
    let tokens = |phase| profile.n_tokens(Some(phase), None);
    let (prompt_tokens, decode_tokens) = (tokens(Phase::Prompt), tokens(Phase::Decode));
    if as_json {
        let value = json!({
            "profile": output,
            "model": profile.model.name,
            "prompts": profile.prompts.len(),
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
            "n_expert": profile.n_expert,
            "n_used": profile.n_used,
            "layers": profile.layers,
            "skew": skews.iter().map(skew_json).collect::<Vec<_>>(),
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!(
        "{} prompts of {} domains: {prompt_tokens} prompt tokens and {decode_tokens} decoded, {} layers of {} experts",
        profile.prompts.len(),
        profile.domains().len(),
        profile.layers.len(),
        profile.n_expert
    );
    let Some(all) = skews.first() else {
        println!("nothing was decoded, so nothing can be said about the skew");
        return Ok(());
    };
    println!("share of held-out choices that the favourites of the train prompts catch (in brackets: an even choice)");
    print!("{:<14}", "domain");
    for uniform in all.uniform {
        print!(" {:>19}", format!("{:.0} % of experts", uniform * 100.0));
    }
    println!(" {:>19} {:>18}", "as many LRU slots*", "experts in effect");
    for skew in &skews {
        print!("{:<14}", skew.domain.as_deref().unwrap_or("all"));
        for (caught, uniform) in skew.caught.iter().zip(skew.uniform) {
            print!(" {:>19}", format!("{:.1} % ({:.1} %)", caught * 100.0, uniform * 100.0));
        }
        println!(" {:>17.1} % {:>18.1}", skew.cached[1] * 100.0, skew.effective_experts);
    }
    println!("* hits in {:.0} % of the experts as slots, nothing pinned", all.uniform[1] * 100.0);
    println!("{}", all.words());
    println!("profile: {}", output.display());
    Ok(())
}

/// A skew in the words of `--json`.
pub fn skew_json(skew: &Skew) -> serde_json::Value {
    json!({
        "domain": skew.domain,
        "tokens": skew.tokens,
        "uniform": skew.uniform,
        "caught": skew.caught,
        "cached": skew.cached,
        "effective_experts": skew.effective_experts,
        "verdict": skew.verdict().name(),
    })
}
