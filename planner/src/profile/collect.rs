//! Runs calibration prompts through a model and records every token's experts.
//!
//! After each prompt the unfinished profile is written beside the output. A later call with the
//! same model, prompts, tokenizer, and settings resumes from it. One of another run is moved aside:
//! going on from it would mix two runs, and overwriting it would lose the first.

use super::prompts::Prompt;
use crate::interrupt::interrupted;
use crate::progress;
use crate::session::Session;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use tier_plan_runtime::engine::Routing;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::profile::{self, Guesses, Profile, PromptTrace};
use tier_plan_runtime::formats::safely::Resumable;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::ModelSpec;
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

    /// Describes everything that decides a profile beside the model, which has a hash of its own.
    fn describe(&self, prompts: &[Prompt], tokenizer: &Tokenizer) -> String {
        // Lengths keep texts apart that would otherwise run together.
        let one = |p: &Prompt| format!("{}/{} {}\n{}", p.domain, p.name, p.text.len(), p.text);
        let all: String = prompts.iter().map(one).collect();
        format!(
            "up to {} prompt tokens{SEPARATOR}{} decoded{SEPARATOR}temperature {}{SEPARATOR}seed {}{SEPARATOR}tokenizer {}{SEPARATOR}prompts {}",
            self.prompt_tokens,
            self.decode_tokens,
            self.temperature,
            self.seed,
            tokenizer.pre().unwrap_or("of the file"),
            SourceId::of_bytes("prompts", all.as_bytes()).hash
        )
    }
}

/// Between the parts of a description.
const SEPARATOR: &str = "; ";

/// Tokenizes the prompts, each cut to the most tokens that are processed.
///
/// # Errors
/// When the vocabulary can't spell a prompt, or a prompt has no tokens.
pub fn tokenize(
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    settings: &Settings,
) -> Result<Vec<Vec<u32>>> {
    let one = |prompt: &Prompt| {
        let tokens = tokenizer.encode(&prompt.text, true);
        let mut tokens = tokens.with_context(|| prompt.title())?;
        tokens.truncate(settings.prompt_tokens as usize);
        tokens.shrink_to_fit();
        ensure!(
            !tokens.is_empty(),
            "{}: the file has no text",
            prompt.title()
        );
        Ok(tokens)
    };
    prompts.iter().map(one).collect()
}

/// A calibration run: what is run, and how.
#[derive(Debug, Clone, Copy)]
pub struct Calibration<'a> {
    /// The tokenizer of the prompts.
    pub tokenizer: &'a Tokenizer,
    /// The prompts.
    pub prompts: &'a [Prompt],
    /// `[prompts.len()]`, their tokens as [`tokenize`] returns them.
    pub tokens: &'a [Vec<u32>],
    /// Settings of the run.
    pub settings: Settings,
}

/// Checks that a model can be profiled.
///
/// # Errors
/// When it has no routed experts, or its layers differ in their numbers.
pub fn check_experts(gguf: &Gguf, spec: &ModelSpec) -> Result<()> {
    Profile::of_model(gguf.id(), spec, String::new())?;
    Ok(())
}

/// Profiles the model of an open session, writes the profile to `output`, and returns it.
pub fn collect(
    session: &mut Session,
    run: &Calibration<'_>,
    output: &Path,
    mut unfinished: Unfinished,
) -> Result<Profile> {
    let prompts = run.prompts;
    let made = run.settings.describe(prompts, run.tokenizer);
    let mut fresh = Profile::of_model(session.gguf.id(), session.engine.spec(), made)?;
    fresh.id.name = stem(output);
    let mut profile = unfinished.resume(fresh, prompts)?;
    session.engine.score_predictions();
    let bar = progress::count("profiling prompts", prompts.len() as u64);
    bar.set_position(profile.prompts.len() as u64);
    let left = prompts.iter().zip(run.tokens).skip(profile.prompts.len());
    for (prompt, tokens) in left {
        let trace = run_prompt(&mut session.engine, run, prompt, tokens.clone())
            .with_context(|| prompt.title())?;
        let Some(trace) = trace else {
            bail!(
                "interrupted after {} of {} prompts; the same command goes on from {}",
                profile.prompts.len(),
                prompts.len(),
                unfinished.file.path().display()
            );
        };
        profile.prompts.push(trace);
        add_guesses(&mut profile.guesses, &mut session.engine);
        unfinished.file.write(&profile.encode())?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let profile = profile.identified();
    profile.write(output)?;
    unfinished.file.remove();
    Ok(profile)
}

/// The profile of the prompts done so far, in a file beside the output.
#[derive(Debug)]
pub struct Unfinished {
    file: Resumable,
    restart: bool,
}

impl Unfinished {
    /// Opens what an earlier run to the same output left, which `restart` discards.
    ///
    /// # Errors
    /// When the file beside the output is not this user's own, or another process is writing it.
    pub fn open(output: &Path, restart: bool) -> Result<Self> {
        let file = Resumable::open(&partial_path(output))?;
        Ok(Self { file, restart })
    }

    /// Returns the unfinished profile if it is of the same run. One of another run is moved aside.
    fn resume(&mut self, fresh: Profile, prompts: &[Prompt]) -> Result<Profile> {
        let path = self.file.path().to_path_buf();
        let shown = path.display();
        let held = self.file.file().with_context(|| shown.to_string())?;
        let Some(held) = held.filter(|_| !self.restart) else {
            return Ok(fresh);
        };
        let found = match profile::read_from(held, &path) {
            Ok(found) => found,
            Err(error) => {
                eprintln!("warning: {error}; starting from the first prompt");
                return Ok(fresh);
            }
        };
        let Some(difference) = difference(&found, &fresh, prompts) else {
            eprintln!(
                "going on from {shown} ({} prompts done)",
                found.prompts.len()
            );
            return Ok(Profile {
                id: fresh.id,
                ..found
            });
        };
        let mut aside = path.as_os_str().to_os_string();
        aside.push(".old");
        let aside = PathBuf::from(aside);
        self.file.set_aside(&aside)?;
        eprintln!(
            "warning: {shown} is of another run ({difference}), so it is kept as {} and this run starts from the first \
             prompt; to finish the other run, give it its name back and repeat its options",
            aside.display()
        );
        Ok(fresh)
    }
}

/// Returns how an unfinished profile differs from the run that would go on from it, `None` if it
/// does not.
fn difference(found: &Profile, fresh: &Profile, prompts: &[Prompt]) -> Option<String> {
    if found.model != fresh.model {
        let (theirs, ours) = (&found.model, &fresh.model);
        return Some(if theirs.name == ours.name {
            format!("another file of the model {}", ours.name)
        } else {
            format!("model {} there, {} here", theirs.name, ours.name)
        });
    }
    if found.made != fresh.made {
        let parts = |made: &str| made.split(SEPARATOR).map(String::from).collect::<Vec<_>>();
        let (theirs, ours) = (parts(&found.made), parts(&fresh.made));
        let only = |these: &[String], others: &[String]| {
            let these: Vec<&str> = these
                .iter()
                .filter(|part| !others.contains(part))
                .map(String::as_str)
                .collect();
            these.join(", ")
        };
        let (there, here) = (only(&theirs, &ours), only(&ours, &theirs));
        return Some(format!("{there} there, {here} here"));
    }
    let same = found.prompts.len() <= prompts.len()
        && found
            .prompts
            .iter()
            .zip(prompts)
            .all(|(f, p)| (&f.domain, &f.name) == (&p.domain, &p.name));
    let layers = found.layers == fresh.layers
        && (found.n_expert, found.n_used) == (fresh.n_expert, fresh.n_used);
    (!same || !layers).then(|| "other prompts or layers".to_string())
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
    run: &Calibration<'_>,
    prompt: &Prompt,
    mut tokens: Vec<u32>,
) -> Result<Option<PromptTrace>> {
    let settings = &run.settings;
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
    add(&mut trace, engine.routing());
    for _ in 0..settings.decode_tokens {
        if interrupted() {
            return Ok(None);
        }
        let token = sampler.sample(&mut logits, &tokens);
        if run.tokenizer.is_eog(token) {
            break;
        }
        tokens.push(token);
        logits = match forward(engine, &[token])? {
            Some(logits) => logits,
            None => return Ok(None),
        };
        add(&mut trace, engine.routing());
        trace.decode_tokens += 1;
    }
    Ok(Some(trace))
}

fn add(trace: &mut PromptTrace, routing: &Routing) {
    trace.add(&routing.experts, &routing.weights);
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
