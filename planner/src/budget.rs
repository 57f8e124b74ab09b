//! Chooses a plan for a model that has none: everything in memory if it fits, else a plan within a
//! budget.

use crate::hint::HintExt;
use crate::opening::{Opening, Texts};
use crate::profile::Evidence;
use crate::solve::options::Policy;
use crate::solve::problem::capacity::page_share;
use crate::solve::{self, Options, Problem};
use anyhow::{Context, Result, anyhow};
use std::path::Path;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Extras, Machine};
use tier_plan_runtime::formats::placement::{Placement, Prediction, TierIdx};
use tier_plan_runtime::formats::profile;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::kv::{CacheRoom, KvType};
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::plans::budget::{
    Budgeted, FixedMemory, buffer_bytes, lines, machine_tiers, within,
};
use tier_plan_runtime::plans::in_memory::in_memory_with;
use tier_plan_runtime::tiers::limits::{Limit, memory_limit};
use tier_plan_runtime::units::show_bytes;

/// Time limit of the search for pins, in seconds.
const SOLVE_S: f64 = 5.0;

/// Most checkpoints of recurrent states per text.
const CHECKPOINTS_PER_TEXT: u32 = 16;

/// Fraction (1/n) of the memory left over that checkpoints may take.
const CHECKPOINT_FRACTION: u64 = 4;

/// An open model.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// Its file.
    pub gguf: &'a Gguf,
    /// Its network.
    pub spec: &'a ModelSpec,
    /// Its sizes.
    pub shape: &'a ModelShape,
    /// Tokens of context.
    pub context: u32,
}

/// Plan chosen for a model without one.
pub struct Chosen {
    /// The plan.
    pub plan: Placement,
    /// Tokens per batch, if the budget allows fewer than usual.
    pub batch: Option<usize>,
    /// Whether everything fits memory, including a copy of the weights.
    pub fits: bool,
}

impl Chosen {
    /// Returns where the weights are under the plan.
    pub fn fit(&self) -> Fit {
        match self.batch {
            _ if self.fits => Fit::Memory,
            Some(_) => Fit::Budget,
            None => Fit::Mapped,
        }
    }
}

/// Where the weights of a model are that has no plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// All of them in memory.
    Memory,
    /// As many experts as fit in memory, the others in the file.
    Budget,
    /// All of them in the mapped file, which the system reads again where memory is short.
    Mapped,
}

/// A plan that was chosen, and what there is to be said about it.
pub struct Decision {
    /// The plan.
    pub chosen: Chosen,
    /// Lines for standard error.
    pub notes: Vec<String>,
}

/// Returns a plan for a model without one. Prints the decision to standard error if memory is
/// short.
///
/// # Errors
/// When the model does not fit the memory asked for, or the profile is unusable.
pub fn choose(model: Model<'_>, opening: &Opening<'_>) -> Result<Chosen> {
    let Decision { chosen, notes } = decide(model, opening, memory_limit().as_ref())?;
    for note in notes {
        eprintln!("{note}");
    }
    Ok(chosen)
}

/// Returns a plan for a model without one, within a limit of the process's memory.
///
/// # Errors
/// As [`choose`].
pub fn decide(model: Model<'_>, opening: &Opening<'_>, limit: Option<&Limit>) -> Result<Decision> {
    let Model {
        gguf,
        spec,
        shape,
        context,
    } = model;
    let kv_type = opening.kv_type.unwrap_or_default();
    let memory = opening.memory.or(limit.map(|limit| limit.bytes));
    let room_of = |sequences| {
        let room = CacheRoom {
            sequences,
            ..CacheRoom::of_one(context)
        };
        room.for_model(shape)
    };
    let cache_bytes = |sequences| kv_type.cache_bytes(shape, room_of(sequences));
    let room = room_of(opening.texts.number(cache_bytes, memory));
    let mapped = |notes| Decision {
        chosen: Chosen {
            plan: in_memory_with(shape, room, kv_type),
            batch: None,
            fits: false,
        },
        notes,
    };
    check_texts(shape, room, kv_type, limit)?;
    if opening.mapped {
        return Ok(mapped(Vec::new()));
    }
    let budget = match (opening.memory, limit) {
        (Some(asked), Some(limit)) => asked.min(limit.bytes),
        (Some(asked), None) => asked,
        (None, Some(limit)) => limit.bytes,
        (None, None) => return Ok(mapped(Vec::new())),
    };
    let fixed = FixedMemory::new(gguf, spec, shape, room, kv_type, budget);
    if fixed.bytes(budget).saturating_add(gguf.file_bytes()) <= budget {
        let left = budget - fixed.bytes(budget) - gguf.file_bytes();
        let room = CacheRoom {
            checkpoints: checkpoints(shape, room, kv_type, left),
            ..room
        };
        return Ok(Decision {
            chosen: Chosen {
                plan: in_memory_with(shape, room, kv_type),
                batch: None,
                fits: true,
            },
            notes: Vec::new(),
        });
    }
    let made = match opening.profile {
        Some(path) => with_profile(model, path, room, &fixed, opening, budget).map(|plan| {
            let lines = lines(&plan, &buffer_bytes(gguf, spec), &fixed, budget);
            Budgeted {
                plan,
                batch: fixed.batch,
                lines,
            }
        }),
        None => within(gguf, spec, shape, room, kv_type, budget).map_err(anyhow::Error::from),
    };
    let Budgeted { plan, batch, lines } = match made {
        Ok(made) => made,
        Err(error)
            if opening.memory.is_none()
                && opening.profile.is_none()
                && !matches!(opening.texts, Texts::Count(2..)) =>
        {
            return Ok(mapped(vec![format!(
                "warning: {error:#}; the mapped file is used instead, and the system reads it again and again"
            )]));
        }
        Err(error) if room.sequences > 1 => {
            return Err(error).hint("pass a smaller --parallel or --context");
        }
        Err(error) => return Err(error),
    };
    let mut notes = vec![sentence(model, opening.memory, limit, budget)];
    let width = lines
        .iter()
        .map(|line| line.purpose.len())
        .max()
        .unwrap_or(0);
    notes.extend(
        lines
            .iter()
            .map(|line| format!("  {:<width$} {:>10}", line.purpose, show_bytes(line.bytes))),
    );
    Ok(Decision {
        chosen: Chosen {
            plan,
            batch: Some(batch),
            fits: false,
        },
        notes,
    })
}

/// Returns how many checkpoints of recurrent states and windows there are: those that `room` has, or
/// more within a part of the `left` memory that is not missed.
fn checkpoints(shape: &ModelShape, room: CacheRoom, kv_type: KvType, left: u64) -> u32 {
    let most = CHECKPOINTS_PER_TEXT.saturating_mul(room.sequences);
    let each = shape.caches.iter().fold(0u64, |sum, cache| {
        sum.saturating_add(cache.checkpoint_bytes(kv_type, room))
    });
    let more = match each {
        0 => 0,
        bytes => u32::try_from(left / CHECKPOINT_FRACTION / bytes).unwrap_or(most),
    };
    room.checkpoints
        .saturating_add(more)
        .min(most.max(room.checkpoints))
}

/// Fails if the keys and values of several texts alone are more than the process may hold: its
/// weights may stay in the file, those may not.
fn check_texts(
    shape: &ModelShape,
    room: CacheRoom,
    kv_type: KvType,
    limit: Option<&Limit>,
) -> Result<()> {
    let bytes = kv_type.cache_bytes(shape, room);
    let Some(limit) = limit.filter(|limit| room.sequences > 1 && bytes > limit.bytes) else {
        return Ok(());
    };
    let much = format!(
        "no memory for the KV cache: {} for {} texts of {} tokens, expected at most {}, the {}",
        show_bytes(bytes),
        room.sequences,
        room.context,
        show_bytes(limit.bytes),
        limit.source
    );
    Err(anyhow!(much)).hint("ask for fewer texts at once, or shorter ones")
}

fn sentence(model: Model<'_>, asked: Option<u64>, limit: Option<&Limit>, budget: u64) -> String {
    let why = match (asked, limit) {
        (Some(asked), Some(limit)) if limit.bytes < asked => {
            format!(
                "--memory {}, but {} is {}",
                show_bytes(asked),
                limit.source,
                show_bytes(limit.bytes)
            )
        }
        (Some(_), _) => "--memory".to_string(),
        (None, Some(limit)) => limit.source.to_string(),
        (None, None) => "no limit".to_string(),
    };
    format!(
        "{} of weights do not fit {} ({why}): experts are read from the file on demand",
        show_bytes(model.shape.weight_bytes()),
        show_bytes(budget)
    )
}

/// Returns the solver's plan. It predicts no speed, since the rates of the two tiers are unknown.
fn with_profile(
    model: Model<'_>,
    path: &Path,
    room: CacheRoom,
    fixed: &FixedMemory,
    opening: &Opening<'_>,
    budget: u64,
) -> Result<Placement> {
    let Model {
        gguf, spec, shape, ..
    } = model;
    let kv_type = opening.kv_type.unwrap_or_default();
    let profile = profile::read(path)?;
    profile.check_model(&shape.id, path)?;
    // Slots are padded to whole pages, which a plan does not count.
    let share = |(buffer, e): (u64, &tier_plan_runtime::model::shape::ExpertShape)| {
        buffer as f64 / e.expert_bytes as f64
    };
    let padded = buffer_bytes(gguf, spec)
        .into_iter()
        .zip(&shape.experts)
        .map(share)
        .fold(1.0, f64::max);
    let left = budget.saturating_sub(fixed.outside_bytes(budget));
    let experts: u64 = shape
        .experts
        .iter()
        .map(|e| e.expert_bytes * u64::from(e.n_expert))
        .sum();
    let dense = shape.weight_bytes() - experts + kv_type.cache_bytes(shape, room);
    let counted = dense.saturating_add((left.saturating_sub(dense) as f64 / padded) as u64);
    // The solver reserves a share for pages itself, which suffices if it is as large.
    let counted = if 1.0 - 1.0 / padded <= page_share(shape) {
        left
    } else {
        counted
    };
    let name = "this machine".to_string();
    let machine = Machine {
        id: SourceId {
            name: name.clone(),
            hash: String::new(),
        },
        name,
        description: String::new(),
        tiers: machine_tiers(left, experts).to_vec(),
        layer_overhead_us: 0.0,
        token_overhead_us: 0.0,
        extras: Extras::default(),
    };
    let problem = Problem {
        shape,
        profile: Some(&profile),
        machine: &machine,
        budgets: vec![counted, experts],
        context: room.context,
        sequences: room.sequences,
        kv_type,
    };
    let options = Options {
        policy: Policy::Auto,
        time_limit_s: SOLVE_S,
        ..Options::default()
    };
    let what = "making a plan from the profile";
    let evidence = Evidence::new(shape, Some(&profile)).context(what)?;
    let mut plan = solve::solve_with_evidence(&problem, &evidence, &options)
        .context(what)?
        .plan;
    plan.tiers[TierIdx::FIRST].budget_bytes = left;
    plan.predicted = Prediction::default();
    Ok(plan)
}
