//! `tier-plan profile`: which experts a model uses, over calibration prompts.

use crate::bundled;
use crate::catalogue::{self, Named};
use crate::cli::ProfileArgs;
use crate::profile::collect::{Settings, collect};
use crate::profile::stats::{Skew, skews};
use crate::profile::{imatrix, prompts};
use crate::session::{self, Opening, Session};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::profile::{Phase, Profile};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::SamplerConfig;

/// Runs it.
pub fn run(args: &ProfileArgs) -> Result<()> {
    if let Some(matrix) = &args.from_imatrix {
        return from_imatrix(args, matrix);
    }
    let model = args.model.as_deref().context("give the model to profile")?;
    if let Named::Shape(shape) = catalogue::named(model)? {
        bail!(
            "'{}' is a shape without weights, which cannot be run; give a model file, or --from-imatrix with the \
             importance matrix of that model",
            shape.name
        );
    }
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
    let output = output(args, model);
    safely::check(&output)?;
    let opening =
        Opening { context: Some(context), threads: args.threads, verify: args.verify.asked(), ..Opening::default() };
    let mut session = Session::open(model, opening)?;
    let tokenizer = session.tokenizer_with(args.tokenizer_pre.as_deref())?;
    let _catching = session::catch_interrupts();
    let profile = collect(&mut session, &tokenizer, &prompts, settings, &output, args.restart)?;
    show(&profile, &output, args.json)
}

/// Where the profile goes: where it was asked for, or beside the work under the stem of what it is made from.
fn output(args: &ProfileArgs, from: &Path) -> PathBuf {
    args.output.clone().unwrap_or_else(|| {
        let mut name = PathBuf::from(from.file_stem().unwrap_or_default());
        name.as_mut_os_string().push(".profile");
        name
    })
}

fn from_imatrix(args: &ProfileArgs, matrix: &Path) -> Result<()> {
    let known = args.model.as_deref().map(|model| catalogue::model(model, None)).transpose()?;
    // A shape's name has dots of its own.
    let stem = known.as_ref().and_then(|k| k.shape.as_ref()).map(|(of, _)| PathBuf::from(format!("{}.gguf", of.name)));
    let output = output(args, stem.as_deref().or(args.model.as_deref()).unwrap_or(matrix));
    safely::check(&output)?;
    let mut profile = imatrix::read(matrix, known.as_ref().map(|k| &k.sizes))?;
    if let Some((of, _)) = known.as_ref().and_then(|k| k.shape.as_ref()) {
        // The counts hold for every quantisation.
        profile.model.name = of.name.clone();
        profile = profile.identified();
    }
    profile.write(&output)?;
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
            "made": profile.made,
            "counted": profile.counted.is_some(),
            "skew": skews.iter().map(skew_json).collect::<Vec<_>>(),
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    if profile.counted.is_some() {
        return show_counted(profile, &skews, output);
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
    if all.held_out {
        println!(
            "share of held-out choices that the favourites of the train prompts catch (in brackets: an even choice)"
        );
    } else {
        println!("share of choices that the favourites of the same prompts catch (in brackets: an even choice)");
    }
    print!("{:<14}", "domain");
    for uniform in all.uniform {
        print!(" {:>19}", format!("{:.0} % of experts", uniform * 100.0));
    }
    println!(" {:>19} {:>18}  {}", "as many LRU slots*", "experts in effect", "verdict");
    for skew in &skews {
        print!("{:<14}", skew.domain.as_deref().unwrap_or("all"));
        for (caught, uniform) in skew.caught.iter().zip(skew.uniform) {
            print!(" {:>19}", format!("{:.1} % ({:.1} %)", caught * 100.0, uniform * 100.0));
        }
        let verdict = skew.verdict().name();
        println!(" {:>17.1} % {:>18.1}  {verdict}", skew.cached[1] * 100.0, skew.effective_experts);
    }
    println!("* hits in {:.0} % of the experts as slots, nothing pinned", all.uniform[1] * 100.0);
    println!("{}", all.words());
    println!("profile: {}", output.display());
    Ok(())
}

fn show_counted(profile: &Profile, skews: &[Skew], output: &Path) -> Result<()> {
    println!("{}: {}", profile.model.name, profile.made);
    let Some(all) = skews.first() else { return Ok(()) };
    println!(
        "{} layers of {} experts, {} used a token, at least {} tokens counted in each layer",
        profile.layers.len(),
        profile.n_expert,
        profile.n_used,
        all.tokens
    );
    println!("share of the counted choices that the favourites take (in brackets: an even choice)");
    for ((uniform, caught), cached) in all.uniform.iter().zip(all.caught).zip(all.cached) {
        println!(
            "{:>5.0} % of experts: {:>5.1} % ({:.1} %); as many LRU slots would hit {:.1} % of independent choices",
            uniform * 100.0,
            caught * 100.0,
            uniform * 100.0,
            cached * 100.0
        );
    }
    println!("experts in effect: {:.1}", all.effective_experts);
    println!("{}", all.words());
    println!(
        "note: counts know no order and come from prompts only: plans made from them are judged on tokens drawn from them"
    );
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
        "counted": skew.counted,
        "held_out": skew.held_out,
        "effective_experts": skew.effective_experts,
        "verdict": skew.verdict().name(),
    })
}
