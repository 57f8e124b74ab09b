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
use tier_plan_runtime::formats::machine::{Extras, Machine, Medium};
use tier_plan_runtime::formats::placement::{Placement, Prediction};
use tier_plan_runtime::formats::profile::{self, Profile};
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
    /// Room of the KV cache.
    pub room: CacheRoom,
    /// Memory of the process in bytes, if it is bounded.
    pub budget: Option<u64>,
    /// Lines for standard error.
    pub notes: Vec<String>,
}

/// Returns a plan for a model without one. Prints the decision to standard error if memory is
/// short.
///
/// # Errors
/// When the model does not fit the memory asked for, or the profile is unusable.
pub fn choose(model: Model<'_>, opening: &Opening<'_>) -> Result<Chosen> {
    let Decision { chosen, notes, .. } = decide(model, opening, memory_limit().as_ref())?;
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
        room,
        budget: memory,
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
            room,
            budget: Some(budget),
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
        room,
        budget: Some(budget),
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
    let shape = model.shape;
    let kv_type = opening.kv_type.unwrap_or_default();
    let profile = profile::read(path)?;
    profile.check_model(&shape.id, path)?;
    let what = "making a plan from the profile";
    let evidence = Evidence::new(shape, Some(&profile)).context(what)?;
    let left = budget.saturating_sub(fixed.outside_bytes(budget));
    let name = "this machine".to_string();
    let machine = Machine {
        id: SourceId {
            name: name.clone(),
            hash: String::new(),
        },
        name,
        description: String::new(),
        tiers: machine_tiers(left, expert_bytes(shape)).to_vec(),
        layer_overhead_us: 0.0,
        token_overhead_us: 0.0,
        extras: Extras::default(),
    };
    let basis = Basis {
        machine: &machine,
        profile: Some(&profile),
        evidence: &evidence,
    };
    let mut plan = solved(model, &basis, room, kv_type, left).context(what)?;
    plan.predicted = Prediction::default();
    Ok(plan)
}

/// What a plan is solved for.
pub struct Basis<'a> {
    /// Machine with one tier of main memory and the drive of the file as its last tier.
    pub machine: &'a Machine,
    /// Profile that the evidence is of.
    pub profile: Option<&'a Profile>,
    /// How the experts are used.
    pub evidence: &'a Evidence,
}

/// Returns the solver's plan with `left` bytes of main memory for what plans count.
///
/// # Errors
/// When the model's dense tensors do not fit, or the machine's numbers are out of range.
pub fn solved(
    model: Model<'_>,
    basis: &Basis<'_>,
    room: CacheRoom,
    kv_type: KvType,
    left: u64,
) -> Result<Placement> {
    let Model {
        gguf, spec, shape, ..
    } = model;
    // Slots are padded to whole pages, which a plan does not count.
    let share = |(buffer, e): (u64, &tier_plan_runtime::model::shape::ExpertShape)| {
        buffer as f64 / e.expert_bytes as f64
    };
    let padded = buffer_bytes(gguf, spec)
        .into_iter()
        .zip(&shape.experts)
        .map(share)
        .fold(1.0, f64::max);
    let experts = expert_bytes(shape);
    let dense = shape.weight_bytes() - experts + kv_type.cache_bytes(shape, room);
    let counted = dense.saturating_add((left.saturating_sub(dense) as f64 / padded) as u64);
    // The solver reserves a share for pages itself, which suffices if it is as large.
    let counted = if 1.0 - 1.0 / padded <= page_share(shape) {
        left
    } else {
        counted
    };
    // What a process may hold of main memory and of the file is known better than what was measured.
    let mut machine = basis.machine.clone();
    for tier in &mut machine.tiers {
        match tier.medium() {
            Medium::Gpu => {}
            Medium::Addressable => tier.capacity_bytes = left,
            Medium::Drive => tier.capacity_bytes = tier.capacity_bytes.max(experts),
        }
    }
    let budgets = machine.tiers.iter().map(|tier| match tier.medium() {
        Medium::Gpu => tier.capacity_bytes,
        Medium::Addressable => counted,
        Medium::Drive => experts,
    });
    let problem = Problem {
        shape,
        profile: basis.profile,
        machine: &machine,
        budgets: budgets.collect(),
        context: room.context,
        sequences: room.sequences,
        kv_type,
        position: None,
    };
    let options = Options {
        policy: Policy::Auto,
        time_limit_s: SOLVE_S,
        ..Options::default()
    };
    let mut plan = solve::solve_with_evidence(&problem, basis.evidence, &options)?.plan;
    for tier in plan.tiers.iter_mut() {
        if tier.tier.medium() == Medium::Addressable {
            tier.budget_bytes = left;
        }
    }
    Ok(plan)
}

/// Returns the bytes of all routed experts.
fn expert_bytes(shape: &ModelShape) -> u64 {
    let layers = shape.experts.iter();
    layers.map(|e| e.expert_bytes * u64::from(e.n_expert)).sum()
}
