//! Opening a model for a command: the file, the plan or the default one, the engine and the tokenizer.

use crate::budget::{self, Chosen, Model};
use crate::store::{self, Start};
use crate::{progress, verify};
use anyhow::{Context, Result, ensure};
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tier_plan_runtime::formats::placement::{self, Placement};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::{describe, shape::shape_of};
use tier_plan_runtime::threads::physical_cores;
use tier_plan_runtime::tiers::numa::NumaPolicy;
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_runtime::units::{parse_bytes, show_bytes};
use tier_plan_runtime::{Engine, KvType, LoadOptions};

/// Context of the default plan where the model would allow more.
const DEFAULT_CONTEXT: u32 = 4096;

/// Set by Ctrl-C.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether a message is being waited for, so that Ctrl-C has nothing to stop.
static WAITING: AtomicBool = AtomicBool::new(false);

/// Whether somebody looks at [`interrupted`].
static CATCHING: AtomicBool = AtomicBool::new(false);

/// While it lives, Ctrl-C is noted instead of ending the program; a second one ends it.
#[must_use = "Ctrl-C is noted only while this lives"]
pub struct Catching(());

impl Drop for Catching {
    fn drop(&mut self) {
        CATCHING.store(false, Ordering::SeqCst);
    }
}

/// From now on Ctrl-C is noted, for those who ask [`interrupted`] before long: not while files are opened and models
/// loaded, which may take minutes and which nothing is lost by ending.
pub fn catch_interrupts() -> Catching {
    // Fails only if a handler is set already, and then that one serves.
    let _ = ctrlc::set_handler(|| {
        let waiting = WAITING.load(Ordering::SeqCst);
        // Who waits for a pipe has nobody to ask for more.
        let idle = !CATCHING.load(Ordering::SeqCst) || (waiting && !std::io::stdin().is_terminal());
        if idle || INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        if waiting {
            eprintln!("\n(Ctrl-C again, Ctrl-D or /quit ends)");
        }
    });
    CATCHING.store(true, Ordering::SeqCst);
    Catching(())
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Says that a message is waited for, or no longer; a Ctrl-C before that counts no more.
pub fn waiting(yes: bool) {
    WAITING.store(yes, Ordering::SeqCst);
    INTERRUPTED.store(false, Ordering::SeqCst);
}

/// An open model.
pub struct Session {
    /// The file.
    pub gguf: Arc<Gguf>,
    /// The loaded model.
    pub engine: Engine,
    /// When loading began.
    pub started: Instant,
    /// What else there is to say about where experts come from.
    notes: Vec<String>,
    start: Option<Start>,
}

/// What to open and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct Opening<'a> {
    /// The plan; one that fits memory when `None`.
    pub plan: Option<&'a Path>,
    /// Bytes of memory that may be used when there is no plan; what there is when `None`.
    pub dram: Option<u64>,
    /// The profile that says which experts to pin when there is no plan.
    pub profile: Option<&'a Path>,
    /// Context length asked for.
    pub context: Option<u32>,
    /// Threads asked for.
    pub threads: Option<usize>,
    /// How keys and values should be stored; as the plan says, or 16-bit floats without one, when `None`.
    pub kv_type: Option<KvType>,
    /// Leave the weights where the system maps the file, where they could be copied to huge pages.
    pub mapped: bool,
    /// Where memory goes on a machine with several memory nodes; as the system does it when `None`.
    pub numa: Option<NumaPolicy>,
    /// Whether to compare what is read with checksums; of this file, or of the one beside the model.
    pub verify: Option<Option<&'a Path>>,
    /// A packed copy of the experts; the one beside the model, if it is there, when `None`.
    pub pack: Option<&'a Path>,
    /// Where the slots' contents are kept from one run to the next.
    pub slots: Option<&'a Path>,
    /// A profile whose most used experts fill empty slots.
    pub warm: Option<&'a Path>,
}

impl Session {
    /// Opens a model and its plan and loads it.
    pub fn open(model: &Path, opening: Opening<'_>) -> Result<Self> {
        check_threads(opening.threads)?;
        opening.numa.map_or(Ok(()), NumaPolicy::apply).context("--numa")?;
        ensure!(opening.context != Some(0), "a context of 0 tokens holds no text; give --ctx 1 or more");
        let mut gguf = Gguf::open(model)?;
        let spec = describe(&gguf).map_err(|e| naming(model, e))?;
        let Chosen { plan, batch, fits } = match opening.plan {
            Some(path) => {
                let plan = placement::read(path)?;
                plan.check_model(&gguf.id(), path)?;
                let context = opening.context.unwrap_or(plan.context);
                ensure!(
                    context <= plan.context,
                    "--ctx {context} is more than the {} tokens that {} was made for; solve again with --context {context}",
                    plan.context,
                    path.display()
                );
                let kv_type = opening.kv_type.unwrap_or(plan.kv_type);
                ensure!(
                    kv_type == plan.kv_type,
                    "--kv-type {kv_type}: {} was made for keys and values as {}; solve again with --kv-type {kv_type}",
                    path.display(),
                    plan.kv_type
                );
                Chosen { plan, batch: None, fits: false }
            }
            None => {
                let shape = shape_of(&gguf, &spec);
                let context = opening.context.unwrap_or(shape.context.min(DEFAULT_CONTEXT));
                budget::choose(Model { gguf: &gguf, spec: &spec, shape: &shape, context }, &opening)?
            }
        };
        if fits {
            copy_to_memory(&mut gguf, opening.threads);
        }
        let checks = verify::checks(&gguf, &spec, opening.verify)?;
        let start = Start::read(&gguf, opening.slots, opening.warm)?;
        let (pack, note) = store::pack(&gguf, &spec, &plan, opening.pack)?.unzip();
        let options = LoadOptions { threads: opening.threads, batch, checks, pack, stream: None };
        let loaded = Self::load_with(Arc::new(gguf), &plan, &options);
        let mut session = loaded.map_err(|e| naming(model, e))?;
        if let Some(context) = opening.context {
            session.engine.limit_context(context);
        }
        session.notes.extend(note);
        session.notes.extend(start.fill(&mut session.engine)?);
        session.start = Some(start);
        Ok(session)
    }

    /// Loads an open file as a plan says.
    pub fn load(gguf: Arc<Gguf>, plan: &Placement, threads: Option<usize>) -> Result<Self> {
        check_threads(threads)?;
        Self::load_with(gguf, plan, &LoadOptions { threads, ..LoadOptions::default() })
    }

    fn load_with(gguf: Arc<Gguf>, plan: &Placement, options: &LoadOptions) -> Result<Self> {
        ensure!(
            plan.context > 0,
            "plan '{}' has a context of 0 tokens, which holds no text; solve again with --context 1 or more",
            plan.name
        );
        let started = Instant::now();
        let bar = progress::bytes("loading");
        let engine = Engine::load(Arc::clone(&gguf), plan, options, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        Ok(Self { gguf, engine, started, notes: Vec::new(), start: None })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.tokenizer_with(None)
    }

    /// The model's tokenizer, with the split pattern `pre` instead of the file's if one is given.
    pub fn tokenizer_with(&self, pre: Option<&str>) -> Result<Tokenizer> {
        tokenizer_with(&self.gguf, pre)
    }

    /// A sentence on what runs where, and per tier the planned and the counted bytes.
    pub fn residency(&self) -> Vec<String> {
        let plan = self.engine.plan();
        let mut lines = Vec::new();
        if plan.solver.status == "obvious" {
            let copied = self.gguf.is_copied();
            let place = if copied { "on huge pages where the system has them" } else { "where it is mapped" };
            lines.push(format!("no plan given: everything stays in main memory, {place}"));
        } else if plan.solver.backend == "none" {
            lines.push(format!("no plan given: '{}', with as many slots in every layer as fit", plan.name));
        } else {
            lines.push(format!("plan '{}' ({} by {})", plan.name, plan.solver.status, plan.solver.backend));
        }
        let padding = self.engine.padding_bytes();
        for ((t, resident), padding) in plan.tiers.iter().zip(self.engine.resident_bytes()).zip(padding) {
            let verdict = if *resident == t.used_bytes() { "as planned" } else { "NOT as planned" };
            let emulated = if t.tier.emulated { " (emulated)" } else { "" };
            let beside = match padding {
                0 => String::new(),
                bytes => format!("; beside them {} so that whole pages are read in place", show_bytes(*bytes)),
            };
            lines.push(format!(
                "  {}{emulated}: {} planned, {} counted: {verdict}{beside}",
                t.tier.name,
                show_bytes(t.used_bytes()),
                show_bytes(*resident)
            ));
        }
        lines.extend(self.notes.iter().cloned());
        lines
    }

    /// What there is to say about where experts come from, beyond the plan.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Keeps for the next run what this one leaves, where that was asked for.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn keep(&self) -> Result<()> {
        self.start.as_ref().map_or(Ok(()), |start| start.keep(&self.engine))
    }
}

/// Ctrl-C ended a command before its work was done: exit code 130, and not a word of error.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Copies the weights to huge pages; where that fails they stay mapped, which is slower and no harm.
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

/// Puts a file's name before an error that does not begin with it.
pub fn naming(file: &Path, error: impl Into<anyhow::Error>) -> anyhow::Error {
    let (error, name) = (error.into(), file.display().to_string());
    if error.to_string().starts_with(&name) { error } else { error.context(name) }
}

/// The bytes that `--dram` names.
pub fn dram(size: Option<&str>) -> Result<Option<u64>> {
    size.map(|size| parse_bytes(size).with_context(|| format!("--dram {size}"))).transpose()
}

/// Refuses a `--threads` that makes no sense.
pub fn check_threads(threads: Option<usize>) -> Result<()> {
    let threads = threads.unwrap_or(1);
    ensure!((1..=1024).contains(&threads), "--threads {threads}: expected 1 to 1024");
    Ok(())
}

/// The tokenizer in a file.
///
/// # Errors
/// When the file has none, or one that isn't known: the caller has text.
pub fn tokenizer(gguf: &Gguf) -> Result<Tokenizer> {
    tokenizer_with(gguf, None)
}

/// The tokenizer in a file, with the split pattern `pre` instead of the file's if one is given.
pub fn tokenizer_with(gguf: &Gguf, pre: Option<&str>) -> Result<Tokenizer> {
    let source = tier_plan_runtime::tokenizer::TokenizerSource::from_gguf(gguf)?;
    ensure!(
        source.model != "none",
        "{}: this model has no tokenizer (tokenizer.ggml.model is 'none'), so it can't take text; \
         `tier-plan logits --tokens` and `tier-plan bench` run it",
        gguf.path().display()
    );
    let tokenizer = Tokenizer::with_pre(source, pre).with_context(|| gguf.path().display().to_string())?;
    if let Some(warning) = tokenizer.warning() {
        eprintln!("warning: {warning}");
    }
    Ok(tokenizer)
}
