//! The plan of least value for one instance, with what is proven of it.
//!
//! Objectives whose columns cost seconds alone are solved in one go. Where bytes have a price, the
//! fastest plan comes first, and the objective's tangent there is solved next. For a cost that is a
//! product of price and time, the tangent is taken anew at each better plan (sequential linear
//! programming). The best plan is then compared with the baselines, which see other columns.

use super::assemble::{BaselinePlans, assemble, verified};
use super::optimize::{Optimized, optimize};
use super::options::Objective;
use super::problem::capacity::TICKS_PER_S;
use super::problem::columns::Charge;
use super::problem::draft::Draft;
use super::problem::instance::{Instance, MAX_ROUNDING_GAP};
use super::problem::objective::{ObjectiveFunction, Tangent};
use super::report::infeasible;
use crate::cost::token_s;
use anyhow::{Result, bail};
use std::time::Instant;
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::gpu::fully_on_gpu;

/// Tangents of a product that are solved at most.
const MAX_TANGENTS: u32 = 4;

/// Name of plans that the search makes.
const PLAN_NAME: &str = "ilp";

/// Said of a plan whose search the time limit ended.
const CUT_SHORT_NOTE: &str = "the time limit ended the search, so that another run may come to another plan; a larger --time-limit lets it end by itself";

/// The best plan of an instance.
pub(super) struct Optimum {
    pub(super) plan: Placement,
    /// What the reader of the plan should know, in sentences.
    pub(super) notes: Vec<String>,
    /// The choice of columns that the plan, or the proof about it, comes from.
    pub(super) optimized: Optimized,
}

/// Returns the plan of least value.
///
/// # Errors
/// Fails if no choice fits, or a target cannot be reached.
pub(super) fn optimum(
    instance: &Instance<'_>,
    baselines: &BaselinePlans,
    start: Instant,
    deadline: Instant,
) -> Result<Optimum> {
    let mut notes = Vec::new();
    let (mut plan, optimized) = if instance.objective.has_weights() {
        weighted(instance, &baselines.drafts, start, deadline)?
    } else {
        let charge = Charge::linear(instance.objective);
        let optimized = optimize(
            instance,
            &charge,
            instance.capacity,
            &baselines.drafts,
            start,
            deadline,
        )?;
        (assemble(instance, PLAN_NAME, &optimized.draft), optimized)
    };
    // Layers of a model that is fully on one GPU have a fixed time of their own, which no column
    // knows.
    let on_one_gpu = baselines
        .plans
        .iter()
        .filter(|b| fully_on_gpu(b, instance.problem.shape).is_some());
    if let Some(best) = instance
        .least(on_one_gpu)
        .filter(|b| instance.value(b) < instance.value(&plan))
    {
        plan = Placement {
            name: plan.name,
            ..best.clone()
        };
    }
    report_proof(instance, &mut plan, &optimized);
    if !optimized.is_complete {
        notes.push(incomplete_note(instance, &plan, &optimized));
    }
    if optimized.is_cut_short {
        notes.push(CUT_SHORT_NOTE.to_string());
    }
    let value = instance.value(&plan);
    let least = instance.least(baselines.plans.iter());
    if let Some(baseline) = least.filter(|b| instance.value(b) < value * (1.0 - MAX_ROUNDING_GAP)) {
        plan = Placement {
            name: plan.name,
            ..baseline.clone()
        };
        plan.solver.status = format!(
            "feasible: the rule {} was faster on held-out tokens",
            baseline.name
        );
        notes.push(format!(
            "the rule '{}' happened to be faster on the held-out tokens than what the train split suggests, so \
             its plan was taken; nothing is proven about it",
            baseline.name
        ));
    }
    notes.extend(target_note(instance, &plan)?);
    plan.solver.solve_s = start.elapsed().as_secs_f64();
    Ok(Optimum {
        plan: verified(instance, plan)?,
        notes,
        optimized,
    })
}

/// Fills in what is proven of a plan.
fn report_proof(instance: &Instance<'_>, plan: &mut Placement, optimized: &Optimized) {
    let objective = instance.objective;
    plan.solver.backend = optimized.origin.name().to_string();
    plan.solver.status = "feasible".to_string();
    let gap = optimized.bound.and_then(|bound| instance.gap(plan, bound));
    plan.solver.gap = gap;
    if gap.is_some_and(|gap| gap <= MAX_ROUNDING_GAP) {
        plan.solver.status = "optimal".to_string();
    }
    let value = instance.value(plan);
    let bound = gap.map(|gap| value * (1.0 - gap));
    plan.solver.bound_s = match objective.kind {
        Objective::Latency | Objective::Energy | Objective::Cost => {
            gap.map(|gap| plan.solver.objective_s * (1.0 - gap))
        }
        Objective::Throughput | Objective::Memory => plan.solver.bound_s,
    };
    plan.solver.goal = objective.report(value, bound);
}

fn incomplete_note(instance: &Instance<'_>, plan: &Placement, optimized: &Optimized) -> String {
    let gap = optimized
        .bound_over_all
        .and_then(|bound| instance.gap(plan, bound));
    let over_all = gap.map_or(String::new(), |gap| {
        format!(
            "; over every count the gap is proven to be at most {:.2} %",
            gap * 100.0
        )
    });
    format!(
        "the model has too many experts to list every count of pins and slots: the bound and the gap are over \
         the {} that were tried{over_all}",
        optimized.n_columns
    )
}

/// Solves an objective in which bytes have a price.
fn weighted(
    instance: &Instance<'_>,
    drafts: &[Draft],
    start: Instant,
    deadline: Instant,
) -> Result<(Placement, Optimized)> {
    let objective = instance.objective;
    let part = deadline.saturating_duration_since(start) / (MAX_TANGENTS + 1);
    let latency = ObjectiveFunction::new(Objective::Latency, None, None, instance.problem)?;
    let fastest = Instance {
        objective: &latency,
        ..*instance
    };
    let charge = Charge::linear(&latency);
    let mut found = optimize(
        &fastest,
        &charge,
        instance.capacity,
        drafts,
        start,
        start + part,
    )?;
    let mut plan = assemble(instance, PLAN_NAME, &found.draft);
    if let Some(max_s) = objective
        .max_token_s()
        .filter(|_| !instance.is_allowed(&plan))
    {
        return allowed_baseline(instance, drafts, &plan, found, max_s);
    }
    let mut capacity = instance.capacity.clone();
    if let (true, Some(max_s)) = (objective.limits_time(), objective.max_token_s()) {
        let left_s = (max_s - instance.token_fixed_s()).max(0.0);
        capacity
            .left_bytes
            .push((left_s * TICKS_PER_S).floor().min(1e18) as u64);
    }
    let mut drafts = drafts.to_vec();
    let is_linear = objective.kind == Objective::Memory;
    for round in 0..if is_linear { 1 } else { MAX_TANGENTS } {
        drafts.insert(0, found.draft.clone());
        let tangent = Tangent {
            usd: objective.usd(&plan),
            seconds: token_s(&plan.predicted),
        };
        let charge = Charge::new(objective, tangent);
        let end = if is_linear {
            deadline
        } else {
            start + part * (round + 2)
        };
        let next = match optimize(instance, &charge, &capacity, &drafts, Instant::now(), end) {
            Ok(next) => next,
            // The target is so near the fastest plan that rounded times leave no other choice.
            // Nothing is known of less memory then.
            Err(_) if instance.is_allowed(&plan) => {
                (found.bound, found.bound_over_all) = (None, None);
                break;
            }
            Err(error) => return Err(error),
        };
        let candidate = assemble(instance, PLAN_NAME, &next.draft);
        let limit = instance.value(&plan) * (1.0 - MAX_ROUNDING_GAP);
        let improves = instance.is_allowed(&candidate) && instance.value(&candidate) < limit;
        if improves || is_linear {
            plan = candidate;
            found = next;
        }
        if !improves {
            break;
        }
    }
    Ok((plan, found))
}

/// Returns the best baseline that reaches the target which the `fastest` plan misses.
///
/// A baseline that is faster on held-out tokens may reach what the train split's plan does not.
fn allowed_baseline(
    instance: &Instance<'_>,
    drafts: &[Draft],
    fastest: &Placement,
    optimized: Optimized,
    max_s: f64,
) -> Result<(Placement, Optimized)> {
    let plans = drafts
        .iter()
        .map(|draft| (draft, assemble(instance, PLAN_NAME, draft)));
    let allowed = plans.filter(|(_, plan)| instance.is_allowed(plan));
    if let Some((draft, plan)) =
        allowed.min_by(|a, b| instance.value(&a.1).total_cmp(&instance.value(&b.1)))
    {
        let draft = draft.clone();
        return Ok((
            plan,
            Optimized {
                draft,
                bound: None,
                bound_over_all: None,
                ..optimized
            },
        ));
    }
    let bound_s = optimized
        .bound
        .map_or(0.0, |bound| bound + instance.token_fixed_s());
    bail!(infeasible::target(
        fastest,
        bound_s,
        max_s,
        instance.problem
    ))
}

/// Says whether a target is reached, and what share of each tier's rate that takes.
fn target_note(instance: &Instance<'_>, plan: &Placement) -> Result<Option<String>> {
    let objective = instance.objective;
    let (Some(target), Some(max_s)) = (objective.target_tok_s, objective.max_token_s()) else {
        return Ok(None);
    };
    if !objective.meets_target(plan, instance.problem.shape, instance.evidence) {
        let speed = match objective.kind {
            Objective::Throughput => 1.0 / instance.value(plan),
            _ => plan.predicted.decode_tok_s,
        };
        let note =
            format!("the target of {target} tok/s is not reached: {speed:.3} tok/s are predicted");
        return Ok(Some(note));
    }
    if objective.kind == Objective::Throughput {
        return Ok(None);
    }
    let shares = plan
        .tiers
        .iter()
        .zip(&plan.predicted.read_bytes)
        .map(|(tier, &bytes)| {
            let allowed = tier.tier.read_gbps * 1e9 * max_s;
            (tier.tier.name.as_str(), bytes / allowed)
        });
    // Reads of one tier follow each other, so this follows from the time of the token. It is
    // checked all the same.
    if let Some((name, share)) = shares.clone().find(|(_, share)| *share > 1.0 + 1e-9) {
        bail!(
            "'{name}' would be read at {share:.2} of its rate to reach {target} tok/s, a mistake in this program"
        );
    }
    let shares: Vec<String> = shares
        .map(|(name, share)| format!("{name} {:.0} %", share * 100.0))
        .collect();
    Ok(Some(format!(
        "at {target} tok/s the reads of a token take of each tier's rate: {}",
        shares.join(", ")
    )))
}
