//! Runs calibration prompts through a model and records every token's experts.
//!
//! After each prompt the unfinished profile is written beside the output. A later call with the
//! same model, prompts and settings resumes from it.

use super::prompts::Prompt;
use crate::interrupt::interrupted;
use crate::progress;
use crate::session::Session;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use tier_plan_runtime::engine::Routing;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::profile::{self, Guesses, Profile, PromptTrace};
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_runtime::{Engine, LogitsMode, RunError};

/// Settings of the run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Tokens per prompt that are processed at most.
    pub prompt_tokens: u32,
    /// Tokens that are decoded after each prompt.
    pub decode_tokens: u32,
    /// Temperature of the decoded text.
    pub temperature: f32,
    /// Seed of the decoded text.
    pub seed: u64,
}

impl Settings {
    /// Returns the sampler of a prompt. Each has the same seed, so that one prompt's text does not
    /// depend on the others.
    pub fn sampler(&self) -> Sampler {
        Sampler::new(SamplerConfig {
            temperature: self.temperature,
            seed: self.seed,
            ..SamplerConfig::default()
        })
    }

    /// Describes the settings for the profile, with a hash of the prompts.
    fn describe(&self, prompts: &[Prompt]) -> String {
        // Lengths keep texts apart that would otherwise run together.
        let one = |p: &Prompt| format!("{}/{} {}\n{}", p.domain, p.name, p.text.len(), p.text);
        let all: String = prompts.iter().map(one).collect();
        format!(
            "up to {} prompt tokens, then {} decoded at temperature {} with seed {}; prompts {}",
            self.prompt_tokens,
            self.decode_tokens,
            self.temperature,
            self.seed,
            SourceId::of_bytes("prompts", all.as_bytes()).hash
        )
    }
}

/// Profiles the model of an open session, writes the profile to `output`, and returns it.
pub fn collect(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    settings: Settings,
    output: &Path,
    restart: bool,
) -> Result<Profile> {
    let mut moe = session.engine.spec().moe_layers().peekable();
    let Some((n_expert, n_used)) = moe
        .peek()
        .map(|(_, m)| (m.n_expert as u32, m.n_used as u32))
    else {
        bail!(
            "'{}' has no routed experts, so there is nothing to profile",
            session.gguf.id().name
        );
    };
    let layers: Vec<u32> = moe.map(|(layer, _)| layer as u32).collect();
    let fresh = Profile {
        model: session.gguf.id(),
        layers,
        n_expert,
        n_used,
        made: settings.describe(prompts),
        prompts: Vec::new(),
        counted: None,
        guesses: None,
        id: SourceId {
            name: stem(output),
            hash: String::new(),
        },
    };
    let partial = partial_path(output);
    let mut profile = if restart {
        fresh
    } else {
        resume(&partial, fresh, prompts)
    };
    session.engine.score_predictions();
    let bar = progress::count("profiling prompts", prompts.len() as u64);
    bar.set_position(profile.prompts.len() as u64);
    for prompt in &prompts[profile.prompts.len()..] {
        let trace = run_prompt(&mut session.engine, tokenizer, prompt, settings)
            .with_context(|| format!("prompt {}/{}", prompt.domain, prompt.name))?;
        let Some(trace) = trace else {
            bail!(
                "interrupted after {} of {} prompts; the same command goes on from {}",
                profile.prompts.len(),
                prompts.len(),
                partial.display()
            );
        };
        profile.prompts.push(trace);
        add_guesses(&mut profile.guesses, &mut session.engine);
        profile.write(&partial)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let profile = profile.identified();
    profile.write(output)?;
    // The profile is safe; a leftover partial file is only untidy.
    let _ = std::fs::remove_file(&partial);
    Ok(profile)
}

/// Returns the unfinished profile, if it is of the same run.
fn resume(partial: &Path, fresh: Profile, prompts: &[Prompt]) -> Profile {
    let begins = |found: &Profile| {
        found.prompts.len() <= prompts.len()
            && found
                .prompts
                .iter()
                .zip(prompts)
                .all(|(f, p)| (&f.domain, &f.name) == (&p.domain, &p.name))
    };
    match profile::read(partial) {
        Ok(found) if found.made == fresh.made && found.model == fresh.model && begins(&found) => {
            eprintln!(
                "going on from {} ({} prompts done)",
                partial.display(),
                found.prompts.len()
            );
            Profile {
                id: fresh.id,
                ..found
            }
        }
        _ => fresh,
    }
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .map_or_else(|| "profile".into(), |s| s.to_string_lossy().into_owned())
}

fn partial_path(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    output.with_file_name(name)
}

/// Runs one prompt. Returns `None` when interrupted.
fn run_prompt(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    settings: Settings,
) -> Result<Option<PromptTrace>> {
    let mut tokens = tokenizer.encode(&prompt.text, true)?;
    tokens.truncate(settings.prompt_tokens as usize);
    ensure!(!tokens.is_empty(), "the file has no text");
    let mut trace = PromptTrace {
        domain: prompt.domain.clone(),
        name: prompt.name.clone(),
        split: prompt.split,
        prompt_tokens: tokens.len() as u32,
        decode_tokens: 0,
        experts: Vec::new(),
        weights: Vec::new(),
    };
    if interrupted() {
        return Ok(None);
    }
    engine.clear();
    let mut sampler = settings.sampler();
    let Some(mut logits) = forward(engine, &tokens)? else {
        return Ok(None);
    };
    append(&mut trace, engine.routing());
    for _ in 0..settings.decode_tokens {
        if interrupted() {
            return Ok(None);
        }
        let token = sampler.sample(&mut logits, &tokens);
        if tokenizer.is_eog(token) {
            break;
        }
        tokens.push(token);
        logits = match forward(engine, &[token])? {
            Some(logits) => logits,
            None => return Ok(None),
        };
        append(&mut trace, engine.routing());
        trace.decode_tokens += 1;
    }
    Ok(Some(trace))
}

/// Returns the logits after the last token, or `None` when interrupted.
fn forward(engine: &mut Engine, tokens: &[u32]) -> Result<Option<Vec<f32>>> {
    match engine.forward(tokens, LogitsMode::Last) {
        Ok(logits) => Ok(Some(logits.to_vec())),
        Err(RunError::Canceled) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Adds the accuracy of the engine's predictions for a prompt, and resets its counters.
fn add_guesses(guesses: &mut Option<Vec<Guesses>>, engine: &mut Engine) {
    let layers = &engine.counters().layers;
    let sums = guesses.get_or_insert_with(|| vec![Guesses::default(); layers.len()]);
    for (sum, layer) in sums.iter_mut().zip(layers) {
        sum.made += layer.predicted;
        sum.right += layer.predicted_right;
    }
    engine.reset_counters();
}

fn append(trace: &mut PromptTrace, routing: &Routing) {
    trace.experts.extend_from_slice(&routing.experts);
    trace.weights.extend(
        routing
            .weights
            .iter()
            .map(|w| (w * 255.0).round().clamp(0.0, 255.0) as u8),
    );
}
