//! A model between opening and loading: what its header and its plan can tell is checked before a byte
//! of weights is read.

use crate::auto::{self, Asked, Decided, Learner, Report};
use crate::budget::{self, Chosen, Model};
use crate::hint::HintExt;
use crate::opening::{Opening, check_threads, naming};
use crate::printable::printable;
use crate::session::{Session, tokenizer_with};
use crate::store::{self, Start};
use crate::{context, progress, verify};
use anyhow::{Context, Result, anyhow, bail};
use std::path::Path;
use std::sync::Arc;
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{Placement, PlanTier};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::{ModelShape, shape_of};
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::tiers::numa::NumaPolicy;
use tier_plan_runtime::tiers::shards::Shards;
use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerError};
use tier_plan_runtime::units::show_bytes;
use tier_plan_runtime::{Cancel, LoadOptions};

/// Context in tokens without a plan, where the model would allow more.
const DEFAULT_CONTEXT: u32 = 4096;

/// A model whose options, plan, and files are checked, and of which no weights have been read.
///
/// What depends on the file's header alone is refused between opening and loading, so that it takes
/// neither the time nor the memory of the weights.
pub struct Prepared<'a> {
    model: &'a Path,
    gguf: Gguf,
    spec: ModelSpec,
    plan: Placement,
    /// Whether the weights are copied to memory first.
    copies: bool,
    /// Context asked for, if less than the plan's may be.
    context: Option<u32>,
    options: LoadOptions,
    start: Start,
    note: Option<String>,
    /// What was decided without being asked.
    report: Option<Report>,
    /// Told of the bytes that are loaded, and all of them.
    watch: Option<Box<dyn Fn(u64, u64)>>,
}

impl<'a> Prepared<'a> {
    /// Opens a model, chooses or reads its plan, and opens the files that loading needs.
    ///
    /// # Errors
    /// When an option is invalid, a file cannot be read, or the model does not fit.
    pub fn open(model: &'a Path, opening: Opening<'_>) -> Result<Self> {
        check_threads(opening.threads)?;
        let shards = applied(opening.numa)?.map(Arc::new);
        let gguf = Gguf::open(model)?;
        let spec = describe(&gguf).map_err(|e| naming(model, e))?;
        let (Chosen { plan, batch, fits }, report) =
            chosen(&gguf, &spec, &opening, shards.as_deref())?;
        check_plan_context(&plan)?;
        check_memory(&plan)?;
        let checks = verify::checks(&gguf, &spec, opening.verify)?;
        let start = Start::read(&gguf, opening.slots, opening.warm)?;
        let (pack, note) = store::pack(&gguf, &spec, &plan, opening.pack)?.unzip();
        let copies = store::copies(&gguf, &spec, &plan);
        Ok(Self {
            model,
            gguf,
            spec,
            plan,
            copies: fits,
            context: opening.context.filter(|context| *context > 0),
            options: LoadOptions {
                threads: opening.threads,
                batch,
                checks,
                pack,
                copies,
                stream: None,
                shards,
                cancel: crate::interrupt::request(),
            },
            start,
            note,
            report,
            watch: None,
        })
    }

    /// Has `watch` told of the bytes that are loaded, and all of them.
    pub fn watched(mut self, watch: impl Fn(u64, u64) + 'static) -> Self {
        self.watch = Some(Box::new(watch));
        self
    }

    /// Has `cancel` end the engine's work instead of a signal.
    pub fn canceled_by(mut self, cancel: Cancel) -> Self {
        self.options.cancel = cancel;
        self
    }

    /// Returns what was decided without being asked, if that was to be.
    pub fn report(&self) -> Option<&Report> {
        self.report.as_ref()
    }

    /// Returns the profile that texts are to be added to, if they are.
    pub fn learns(&self) -> Option<&Path> {
        self.report.as_ref()?.learns.as_deref()
    }

    /// Returns what records texts, if they are to be recorded.
    pub fn learner(&self) -> Option<Learner> {
        Learner::new(self.learns()?, self.gguf.id(), &self.spec)
    }

    /// Returns the open file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// Returns the network.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Returns the tokens that a text may have.
    pub fn context(&self) -> usize {
        self.context
            .map_or(self.plan.context, |asked| asked.min(self.plan.context)) as usize
    }

    /// Returns the plan.
    pub fn plan(&self) -> &Placement {
        &self.plan
    }

    /// Returns the tokens of the plan's context.
    pub fn plan_context(&self) -> u32 {
        self.plan.context
    }

    /// Returns the model's tokenizer, with the pre-tokenizer `pre` instead of the file's if given.
    ///
    /// # Errors
    /// When the file has no tokenizer, or one of an unknown kind.
    pub fn tokenizer_with(&self, pre: Option<&str>) -> Result<Tokenizer> {
        tokenizer_with(&self.gguf, pre)
    }

    /// Returns the tokens of a prompt that is to be continued.
    ///
    /// # Errors
    /// When the vocabulary can't spell it, or it is empty or longer than the context.
    pub fn prompt(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        let context = self.context();
        let prompt = match tokenizer.encode_within(text, true, context) {
            Err(TokenizerError::TooLong { least, .. }) => {
                bail!(
                    "context full: at least {least} tokens requested, {context} available: pass a shorter prompt or a \
                     larger --context; with a plan, solve again with a larger --context"
                )
            }
            encoded => encoded?,
        };
        if prompt.is_empty() {
            return Err(anyhow!("the prompt is empty, expected text"))
                .hint("pass text with --prompt or --file");
        }
        Ok(prompt)
    }

    /// Reads the weights.
    ///
    /// # Errors
    /// When a file cannot be read, or the model does not fit.
    pub fn load(mut self) -> Result<Session> {
        let watch = self.watch.as_deref();
        if self.copies {
            copy_to_memory(&mut self.gguf, &self.options, watch)?;
        }
        let loaded = Session::load_with(Arc::new(self.gguf), &self.plan, &self.options, watch);
        let mut session = loaded.map_err(|e| naming(self.model, e))?;
        if let Some(context) = self.context {
            session.engine.limit_context(context);
        }
        let trained = session.engine.shape().context;
        let longest = context::longest(&self.spec, trained);
        context::warn_beyond(session.engine.context() as u64, longest);
        session.begin(self.note, self.start)?;
        Ok(session)
    }
}

/// Makes a NUMA policy that of this process; returns the nodes that it stripes weights over, if any.
///
/// # Errors
/// When a node does not exist, or the system refuses.
pub(crate) fn applied(policy: Option<NumaPolicy>) -> Result<Option<Shards>> {
    let Some(policy) = policy else {
        return Ok(None);
    };
    policy.apply().context("--numa")?;
    let shards = Shards::of(policy).context("--numa")?;
    if policy == NumaPolicy::Shard && shards.is_none() {
        eprintln!("note: --numa shard has no effect: this machine has one NUMA node");
    }
    Ok(shards)
}

/// Reads the plan asked for, or chooses one.
fn chosen(
    gguf: &Gguf,
    spec: &ModelSpec,
    opening: &Opening<'_>,
    shards: Option<&Shards>,
) -> Result<(Chosen, Option<Report>)> {
    if let Some(path) = opening.plan {
        let chosen = Chosen {
            plan: opening.read_plan(gguf, path)?,
            batch: None,
            fits: false,
        };
        return Ok((chosen, None));
    }
    let shape = shape_of(gguf, spec);
    let context = context_without_plan(&shape, opening.context);
    let model = Model {
        gguf,
        spec,
        shape: &shape,
        context,
    };
    let Some(auto) = opening.auto else {
        return Ok((budget::choose(model, opening)?, None));
    };
    let asked = Asked {
        auto,
        model: gguf.path(),
        threads: opening.threads,
        numa: opening.numa,
        shards,
    };
    let Decided { chosen, report } = auto::choose(model, opening, &asked)?;
    Ok((chosen, Some(report)))
}

/// Returns the tokens of context of a model without a plan: those asked for, and for 0 those that it
/// was trained for.
pub(crate) fn context_without_plan(shape: &ModelShape, asked: Option<u32>) -> u32 {
    match asked {
        None => shape.context.min(DEFAULT_CONTEXT),
        Some(0) => shape.context,
        Some(context) => context,
    }
}

/// Fails if a plan has no context.
pub(crate) fn check_plan_context(plan: &Placement) -> Result<()> {
    if plan.context > 0 {
        return Ok(());
    }
    let empty = format!(
        "plan '{}': a context of 0 tokens, expected 1 or more",
        plan.name
    );
    Err(anyhow!(empty)).hint("solve again with a larger --context")
}

/// Fails if a plan takes more memory than this process may hold: the system would end it. Warns if
/// it takes more than is free.
pub(crate) fn check_memory(plan: &Placement) -> Result<()> {
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

/// Copies the weights to huge pages. Where there is no memory for that they stay mapped, which is
/// slower.
///
/// # Errors
/// When the file can't be read: looking at the mapped bytes would end the process.
fn copy_to_memory(
    gguf: &mut Gguf,
    options: &LoadOptions,
    watch: Option<&dyn Fn(u64, u64)>,
) -> Result<()> {
    let bar = progress::bytes("reading the model");
    let copied = tier_plan_runtime::copy_to_memory(gguf, options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        watch.inspect(|watch| watch(done, total));
    });
    bar.finish_and_clear();
    match copied {
        Err(error) if error.is_out_of_memory() => {
            eprintln!("warning: {error}; the weights stay mapped, which is slower");
            Ok(())
        }
        copied => Ok(copied?),
    }
}
