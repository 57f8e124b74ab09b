//! Opens a model for a command: file, plan, engine, and tokenizer.

use crate::hint::HintExt;
use crate::opening::{Opening, check_threads};
use crate::prepared::{Prepared, check_memory, check_plan_context};
use crate::printable::printable;
use crate::progress;
use crate::store::Start;
use anyhow::{Context, Result, anyhow};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::tiers::shards::Shards;
use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerSource};
use tier_plan_runtime::units::show_bytes;
use tier_plan_runtime::{Engine, LoadOptions};

/// Part of the weights on the node that reads them below which a hint is given.
const MIN_SHARE_AT_HOME: f64 = 0.9;

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
    /// NUMA nodes that the weights are striped over.
    pub(crate) shards: Option<Arc<Shards>>,
}

impl Session {
    /// Opens and loads a model.
    ///
    /// # Errors
    /// When an option is invalid, a file cannot be read, or the model does not fit.
    pub fn open(model: &Path, opening: Opening<'_>) -> Result<Self> {
        Prepared::open(model, opening)?.load()
    }

    /// Loads an open file by a plan.
    ///
    /// # Errors
    /// When the model does not fit, or a read fails.
    pub fn load(gguf: Arc<Gguf>, plan: &Placement, threads: Option<usize>) -> Result<Self> {
        check_threads(threads)?;
        check_plan_context(plan)?;
        check_memory(plan)?;
        Self::load_with(
            gguf,
            plan,
            &LoadOptions {
                threads,
                cancel: crate::interrupt::request(),
                ..LoadOptions::default()
            },
            None,
        )
    }

    pub(crate) fn load_with(
        gguf: Arc<Gguf>,
        plan: &Placement,
        options: &LoadOptions,
        watch: Option<&dyn Fn(u64, u64)>,
    ) -> Result<Self> {
        let started = Instant::now();
        let bar = progress::bytes("loading");
        let engine = Engine::load(Arc::clone(&gguf), plan, options, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            watch.inspect(|watch| watch(done, total));
        })?;
        bar.finish_and_clear();
        if engine.lacks_locked_memory() {
            eprintln!(
                "warning: the GPU's driver locks no memory of experts, so the CPU computes those that the plan has \
                 streamed; decoding takes longer than predicted, and `tier-plan solve --no-streaming` makes a plan \
                 without them"
            );
        }
        for full in engine.gpus_without_room_to_stream() {
            let tier = &plan.tiers[full.tier].tier.name;
            eprintln!(
                "warning: GPU '{tier}' has {} free, and streaming experts to it for prompts needs {}; the CPU computes \
                 them, so prompts may take much longer than predicted, and a plan from `tier-plan solve` with a smaller \
                 --budget {tier}=SIZE leaves room",
                show_bytes(full.free),
                show_bytes(full.needed)
            );
        }
        Ok(Self {
            gguf,
            engine,
            started,
            notes: Vec::new(),
            start: None,
            shards: options.shards.clone(),
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

    /// Returns a sentence on the NUMA nodes that weights are striped over, and on whose threads have
    /// read them; `None` where nodes don't matter.
    pub fn numa_line(&self) -> Option<String> {
        let shards = self.shards.as_ref()?;
        let n = shards.n_nodes();
        let mut line = if shards.is_emulated() {
            format!("NUMA: threads and weights divided as on {n} emulated nodes")
        } else {
            format!("NUMA: weights striped over {n} nodes")
        };
        let percent = |part: f64| 100.0 * part;
        if let Some(share) = shards.share_at_home() {
            line += &format!(", {:.1} % of them where they should be", percent(share));
            if share < MIN_SHARE_AT_HOME {
                line += " (are transparent huge pages off, or a node full?)";
            }
        }
        let reads = self.engine.node_reads();
        if reads.bytes > 0 {
            let own = 1.0 - reads.remote_bytes as f64 / reads.bytes as f64;
            line += &format!("; {:.1} % were read by threads of their node", percent(own));
        }
        Some(line)
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
        lines.extend(self.numa_line());
        lines.extend(self.notes.iter().cloned());
        lines
    }

    /// Adds sentences on where experts come from, and fills the slots that the start names.
    pub(crate) fn begin(&mut self, note: Option<String>, start: Start) -> Result<()> {
        self.notes.extend(note);
        self.notes.extend(start.fill(&mut self.engine)?);
        self.start = Some(start);
        Ok(())
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
    let source = TokenizerSource::from_gguf(gguf)?;
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
