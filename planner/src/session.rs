//! Opens a model for a command: file, plan, engine, and tokenizer.

use crate::budget::{self, Chosen, Model};
use crate::hint::HintExt;
use crate::opening::{Opening, check_threads, naming};
use crate::printable::printable;
use crate::store::{self, Start};
use crate::{progress, verify};
use anyhow::{Context, Result, anyhow};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{Placement, PlanTier};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::{describe, shape::shape_of};
use tier_plan_runtime::threads::physical_cores;
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::tiers::numa::NumaPolicy;
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_runtime::units::show_bytes;
use tier_plan_runtime::{Engine, LoadOptions};

/// Context in tokens without a plan, where the model would allow more.
const DEFAULT_CONTEXT: u32 = 4096;

/// A loaded model.
pub struct Session {
    /// The file.
    pub gguf: Arc<Gguf>,
    /// The loaded model.
    pub engine: Engine,
    /// When loading began.
    pub started: Instant,
    /// Sentences on where experts come from, beyond the plan.
    notes: Vec<String>,
    start: Option<Start>,
}

impl Session {
    /// Opens and loads a model.
    ///
    /// # Errors
    /// When an option is invalid, a file cannot be read, or the model does not fit.
    pub fn open(model: &Path, opening: Opening<'_>) -> Result<Self> {
        check_threads(opening.threads)?;
        opening
            .numa
            .map_or(Ok(()), NumaPolicy::apply)
            .context("--numa")?;
        let mut gguf = Gguf::open(model)?;
        let spec = describe(&gguf).map_err(|e| naming(model, e))?;
        let Chosen { plan, batch, fits } = match opening.plan {
            Some(path) => {
                let plan = opening.read_plan(&gguf, path)?;
                Chosen {
                    plan,
                    batch: None,
                    fits: false,
                }
            }
            None => {
                let shape = shape_of(&gguf, &spec);
                let context = match opening.context {
                    None => shape.context.min(DEFAULT_CONTEXT),
                    Some(0) => shape.context,
                    Some(context) => context,
                };
                budget::choose(
                    Model {
                        gguf: &gguf,
                        spec: &spec,
                        shape: &shape,
                        context,
                    },
                    &opening,
                )?
            }
        };
        if fits {
            copy_to_memory(&mut gguf, opening.threads);
        }
        let checks = verify::checks(&gguf, &spec, opening.verify)?;
        let start = Start::read(&gguf, opening.slots, opening.warm)?;
        let (pack, note) = store::pack(&gguf, &spec, &plan, opening.pack)?.unzip();
        let options = LoadOptions {
            threads: opening.threads,
            batch,
            checks,
            pack,
            stream: None,
            cancel: crate::interrupt::request(),
        };
        let loaded = Self::load_with(Arc::new(gguf), &plan, &options);
        let mut session = loaded.map_err(|e| naming(model, e))?;
        if let Some(context) = opening.context.filter(|context| *context > 0) {
            session.engine.limit_context(context);
        }
        session.notes.extend(note);
        session.notes.extend(start.fill(&mut session.engine)?);
        session.start = Some(start);
        Ok(session)
    }

    /// Loads an open file by a plan.
    ///
    /// # Errors
    /// When the model does not fit, or a read fails.
    pub fn load(gguf: Arc<Gguf>, plan: &Placement, threads: Option<usize>) -> Result<Self> {
        check_threads(threads)?;
        Self::load_with(
            gguf,
            plan,
            &LoadOptions {
                threads,
                cancel: crate::interrupt::request(),
                ..LoadOptions::default()
            },
        )
    }

    fn load_with(gguf: Arc<Gguf>, plan: &Placement, options: &LoadOptions) -> Result<Self> {
        if plan.context == 0 {
            let empty = format!(
                "plan '{}': a context of 0 tokens, expected 1 or more",
                plan.name
            );
            return Err(anyhow!(empty)).hint("solve again with a larger --context");
        }
        check_memory(plan)?;
        let started = Instant::now();
        let bar = progress::bytes("loading");
        let engine = Engine::load(Arc::clone(&gguf), plan, options, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        Ok(Self {
            gguf,
            engine,
            started,
            notes: Vec::new(),
            start: None,
        })
    }

    /// Returns the model's tokenizer.
    ///
    /// # Errors
    /// When the file has none, or one of an unknown kind.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.tokenizer_with(None)
    }

    /// Returns the model's tokenizer, with the pre-tokenizer `pre` instead of the file's if given.
    ///
    /// # Errors
    /// When the file has no tokenizer, or one of an unknown kind.
    pub fn tokenizer_with(&self, pre: Option<&str>) -> Result<Tokenizer> {
        tokenizer_with(&self.gguf, pre)
    }

    /// Returns a sentence on the plan, and per tier the planned and the counted bytes.
    pub fn residency(&self) -> Vec<String> {
        let plan = self.engine.plan();
        let mut lines = Vec::new();
        if plan.solver.status == "obvious" {
            let copied = self.gguf.is_copied();
            let place = if copied {
                "on huge pages if the system has them"
            } else {
                "as a mapped file"
            };
            lines.push(format!(
                "no plan given: everything stays in main memory, {place}"
            ));
        } else if plan.solver.backend == "none" {
            lines.push(format!(
                "no plan given: '{}', with as many slots in every layer as fit",
                printable(&plan.name)
            ));
        } else {
            lines.push(format!(
                "plan '{}' ({} by {})",
                printable(&plan.name),
                plan.solver.status,
                plan.solver.backend
            ));
        }
        let padding = self.engine.padding_bytes();
        for ((t, resident), padding) in plan
            .tiers
            .iter()
            .zip(self.engine.resident_bytes())
            .zip(padding)
        {
            let verdict = if *resident == t.used_bytes() {
                "as planned"
            } else {
                "NOT as planned"
            };
            let emulated = if t.tier.emulated { " (emulated)" } else { "" };
            let beside = match padding {
                0 => String::new(),
                bytes => format!(
                    "; beside them {} so that whole pages are read in place",
                    show_bytes(*bytes)
                ),
            };
            lines.push(format!(
                "  {}{emulated}: {} planned, {} counted: {verdict}{beside}",
                printable(&t.tier.name),
                show_bytes(t.used_bytes()),
                show_bytes(*resident)
            ));
        }
        lines.extend(self.notes.iter().cloned());
        lines
    }

    /// Returns sentences on where experts come from, beyond the plan.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Writes the contents of the slots for the next run, if asked for.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn keep(&self) -> Result<()> {
        self.start
            .as_ref()
            .map_or(Ok(()), |start| start.keep(&self.engine))
    }
}

/// Fails if a plan takes more memory than this process may hold: the system would end it. Warns if
/// it takes more than is free.
fn check_memory(plan: &Placement) -> Result<()> {
    let in_memory = |t: &&PlanTier| t.tier.kind != TierKind::Vram || t.tier.emulated;
    // The last tier is the file itself, whose pages the system can drop.
    let upper = plan.tiers.iter().take(plan.tiers.len().saturating_sub(1));
    let bytes = upper
        .filter(in_memory)
        .fold(0u64, |sum, t| sum.saturating_add(t.used_bytes()));
    let Some(limit) = memory_limit().filter(|limit| bytes > limit.bytes) else {
        return Ok(());
    };
    let short = format!(
        "plan '{}' takes {} of main memory, expected at most {}, the {}",
        printable(&plan.name),
        show_bytes(bytes),
        show_bytes(limit.bytes),
        limit.source
    );
    if limit.is_hard {
        return Err(anyhow!(short)).hint("solve again with a smaller --budget for main memory");
    }
    eprintln!("warning: {short}");
    Ok(())
}

/// Copies the weights to huge pages. If that fails they stay mapped, which is slower.
fn copy_to_memory(gguf: &mut Gguf, threads: Option<usize>) {
    let bar = progress::bytes("reading the model");
    let threads = threads.unwrap_or_else(physical_cores);
    let copied = gguf.copy_to_memory(threads, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    if let Err(error) = copied {
        eprintln!("warning: {error}; the weights stay mapped, which is slower");
    }
}

/// Reads the tokenizer of a file.
///
/// # Errors
/// When the file has none, or one of an unknown kind.
pub fn tokenizer(gguf: &Gguf) -> Result<Tokenizer> {
    tokenizer_with(gguf, None)
}

/// Reads the tokenizer of a file, with the pre-tokenizer `pre` instead of the file's if given.
///
/// # Errors
/// When the file has none, or one of an unknown kind.
pub fn tokenizer_with(gguf: &Gguf, pre: Option<&str>) -> Result<Tokenizer> {
    let source = tier_plan_runtime::tokenizer::TokenizerSource::from_gguf(gguf)?;
    if source.model == "none" {
        let path = gguf.path().display();
        let none = format!(
            "{path}: this model has no tokenizer (tokenizer.ggml.model is 'none') and cannot take text"
        );
        return Err(anyhow!(none)).hint("`tier-plan logits --tokens` and `tier-plan bench` run it");
    }
    let tokenizer =
        Tokenizer::with_pre(source, pre).with_context(|| gguf.path().display().to_string())?;
    if let Some(warning) = tokenizer.warning() {
        eprintln!("warning: {warning}");
    }
    Ok(tokenizer)
}
