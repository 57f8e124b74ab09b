//! Finds where every tensor should live.
//!
//! The problem is a multiple-choice knapsack with several capacities: every layer and dense group
//! takes one column, and each tier's bytes are limited. It is solved by column generation:
//!
//! 1. [`problem`] sets aside what every plan needs, and lists columns with their costs.
//! 2. [`bound`] finds dual prices of bytes and with them a proven lower bound. It prices the
//!    columns that were not listed.
//! 3. [`primal`] turns the prices into an integer choice by LP rounding, greedy construction,
//!    exchange search, label setting, and a MIP.
//! 4. `optimize` runs that loop, and `branch` branches where the gap stays open. `assemble` makes
//!    plans of choices, `optimum` compares plans with the [`baselines`], and `kv_tier` does so for
//!    each tier that the KV cache may be on.
//! 5. `streaming` has a GPU compute some of a token's experts in main memory, where that pays.
//! 6. [`verify`] checks every plan with code that shares no arithmetic with the search.
//! 7. [`policy`] chooses how slots are refilled, and [`report`] explains the outcome.

mod assemble;
pub mod baselines;
pub mod bound;
mod branch;
mod cpu_only;
mod generate;
mod kv_tier;
mod optimize;
mod optimum;
pub mod options;
pub mod policy;
pub mod primal;
pub mod problem;
pub mod report;
mod shadow_prices;
mod solution;
mod streaming;
mod translate;
pub mod verify;

pub use problem::Problem;
pub use problem::pool::ColumnPool;
pub use shadow_prices::shadow_prices;
pub use solution::Solution;

use crate::profile::Evidence;
use anyhow::{Context, Result, ensure};
use baselines::Baseline;
use options::{Backend, Depth, Objective, Policy, Strategy};
use problem::capacity::Capacity;
use problem::constraints::Constraints;
use problem::instance::Instance;
use problem::objective::ObjectiveFunction;
use report::summary::summarize;
use std::time::{Duration, Instant};
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::ranges;
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::units::show_bytes;

/// Part of the time limit after which a search for plans with streamed experts begins, where they may pay.
const PART_OF_FIRST: f64 = 0.6;

/// How to make a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The optimum, or a baseline.
    pub strategy: Strategy,
    /// How slots are refilled. [`Policy::Lru`] is what columns are priced with.
    pub policy: Policy,
    /// Seconds after which the search stops improving.
    pub time_limit_s: f64,
    /// How far it goes where not all columns can be listed.
    pub depth: Depth,
    /// Quantity that the plan minimizes.
    pub objective: Objective,
    /// Sequences that are decoded together, for [`Objective::Throughput`].
    pub batch: Option<u32>,
    /// Solver of the integer program.
    pub backend: Backend,
    /// Tokens per second to reach.
    pub target_tok_s: Option<f64>,
    /// What is fixed or forbidden by hand.
    pub constraints: Constraints,
    /// Whether a GPU may compute some of a token's experts in main memory.
    pub streaming: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            strategy: Strategy::Optimal,
            policy: Policy::Lru,
            time_limit_s: 10.0,
            depth: Depth::default(),
            objective: Objective::Latency,
            batch: None,
            backend: Backend::default(),
            target_tok_s: None,
            constraints: Constraints::default(),
            streaming: true,
        }
    }
}

/// Checks a `--time-limit` and returns it.
///
/// # Errors
/// Fails if it is negative, or more than a million seconds.
pub fn time_limit(seconds: f64) -> Result<f64> {
    ensure!(
        seconds.is_finite() && (0.0..=1e6).contains(&seconds),
        "--time-limit {seconds}: give seconds between 0 and a million"
    );
    Ok(seconds)
}

/// Makes the plan and the baselines at equal bytes, each verified.
///
/// # Errors
/// Fails if the budgets cannot hold what every plan needs, the profile is of another model, a
/// number of the machine file is out of range, or the baseline that was asked for does not fit.
pub fn solve(problem: &Problem<'_>, options: &Options) -> Result<Solution> {
    solve_with_evidence(
        problem,
        &Evidence::new(problem.shape, problem.profile)?,
        options,
    )
}

/// Makes the plan from evidence that was gathered before; the problem's profile is only named.
///
/// # Errors
/// As [`solve`].
pub fn solve_with_evidence(
    problem: &Problem<'_>,
    evidence: &Evidence,
    options: &Options,
) -> Result<Solution> {
    solve_with_pool(problem, evidence, &ColumnPool::default(), options)
}

/// Makes the plan from evidence, beginning with the columns that a pool has.
///
/// The pool must come from problems of the same model and evidence, on tiers of the same rates and
/// latencies. It is added to.
///
/// # Errors
/// As [`solve`].
pub fn solve_with_pool(
    problem: &Problem<'_>,
    evidence: &Evidence,
    pool: &ColumnPool,
    options: &Options,
) -> Result<Solution> {
    let start = Instant::now();
    let Options {
        objective,
        batch,
        target_tok_s,
        constraints,
        backend,
        ..
    } = options;
    let objective = ObjectiveFunction::new(*objective, *batch, *target_tok_s, problem)?;

    constraints.check_gpus(problem.shape, problem.machine)?;

    // The choice: a baseline's, or the optimum.
    let baseline = Baseline::of_strategy(options.strategy);
    let choose = |problem: &Problem<'_>, deadline: Instant| {
        // One instance per tier that can hold the KV cache, and per GPU that can have what is together.
        let capacities = Capacity::per_kv_tier(problem, constraints)?;
        let instances: Vec<Instance<'_>> = capacities
            .iter()
            .map(|capacity| Instance {
                problem,
                evidence,
                capacity,
                objective: &objective,
                constraints,
                backend: *backend,
                pool,
                depth: options.depth,
                bounds_all: options.depth.bounds_all(),
            })
            .collect();
        match baseline {
            Some(baseline) => kv_tier::best_baseline(&instances, baseline),
            None => kv_tier::optimum(&instances, start, deadline),
        }
    };
    let is_plain = objective.kind == Objective::Latency && objective.target_tok_s.is_none();
    let is_allowed = options.streaming && baseline.is_none();
    let may_stream = is_allowed && is_plain && streaming::may_pay(problem);
    let part = if may_stream { PART_OF_FIRST } else { 1.0 };
    let mut best = choose(problem, deadline(start, options.time_limit_s * part)?)?;
    if may_stream {
        // The searches for plans with room for buffers begin with what the first has found.
        let end = deadline(start, options.time_limit_s)?;
        let choose = |smaller: &Problem<'_>| choose(smaller, end);
        streaming::improve(&mut best, problem, evidence, constraints, &choose)?;
    }
    // Sentences about it.
    let summary = if baseline.is_none() && objective.is_latency() {
        summarize(&best.plan, &best.baselines, &best.prices, problem)
    } else {
        Vec::new()
    };
    let mut notes = evidence.notes.clone();
    notes.extend(efficiency_note(problem));
    notes.extend(cpu_only::notes(problem, &best.plan));
    notes.extend(host_kv_note(&best.plan, problem.shape));
    notes.extend(best.notes);
    if objective.target_tok_s.is_some() || objective.kind != Objective::Latency {
        notes.push(format!("objective: {}", objective.describe()));
    }
    let ceiling_hit_rate = solution::ceiling_hit_rate(&best.plan, evidence);
    let (plan, baselines) = (best.plan, best.baselines);
    let mut solution = Solution {
        plan,
        baselines,
        notes,
        ceiling_hit_rate,
        summary,
    };
    if let Some(policy) = policy::to_apply(options.policy, options.strategy) {
        solution.notes.extend(policy::refill(
            &mut solution.plan,
            problem,
            evidence,
            policy,
        )?);
    }
    Ok(solution)
}

/// Returns the moment at which a search that starts now must end.
fn deadline(start: Instant, time_limit_s: f64) -> Result<Instant> {
    let limit = Duration::try_from_secs_f64(time_limit_s)
        .ok()
        .with_context(|| format!("a time limit of {time_limit_s} s; give a positive one"))?;
    start
        .checked_add(limit)
        .context("the time limit is too long; give less than a year")
}

fn efficiency_note(problem: &Problem<'_>) -> Option<String> {
    let efficiency = problem.machine.extras.efficiency;
    let name = &problem.machine.name;
    (efficiency != 1.0).then(|| {
        format!(
            "rates of the tiers that the CPU computes on are those of machine '{name}' times its efficiency of \
             {efficiency}"
        )
    })
}

/// Returns a sentence on the KV cache that a plan keeps off the GPUs that have the attention.
fn host_kv_note(plan: &Placement, shape: &ModelShape) -> Option<String> {
    let layers = plan.host_kv.iter();
    let caches = layers.filter_map(|layer| shape.caches.get(*layer as usize));
    let bytes = caches.map(|c| c.bytes(plan.kv_type, plan.room().whole()));
    (!plan.host_kv.is_empty()).then(|| {
        format!(
            "the CPU attends to the KV cache of layers {}, whose matrices are on a GPU: {} of VRAM are left for weights",
            ranges::show(&plan.host_kv),
            show_bytes(bytes.fold(0, u64::saturating_add))
        )
    })
}

#[cfg(test)]
mod tests;
