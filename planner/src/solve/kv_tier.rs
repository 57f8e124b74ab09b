//! Search over the tier of the KV cache, and over the GPU of parts that are on one only together.
//!
//! A layer's KV cache is on the real GPU that has its attention, or on one tier with all others that
//! are on no GPU; attention's columns say which. Each tier that has room for these gives an instance of
//! its own.
//!
//! 1. Each instance gets a part of the time that is left, and begins with the columns and prices of
//!    those before it.
//! 2. The prices that one ends with bound an instance that differs by the cache alone, so some
//!    instances need not be solved.
//! 3. The rest of the time goes to the best instance that ran out of it, then to others that may
//!    still be better.
//!
//! The reported bound is the least over all instances.

use super::assemble::{BaselinePlans, baseline_plans};
use super::baselines::Baseline;
use super::optimize::bound_over_all;
use super::optimum::{Optimum, optimum as solve_instance};
use super::problem::instance::{Instance, MAX_ROUNDING_GAP};
use anyhow::{Context, Result};
use std::time::Instant;
use tier_plan_runtime::formats::placement::Placement;

/// Part of the time left that an instance may take, if others follow.
const PART_OF_ONE: f64 = 0.6;

/// The best plan over all KV tiers.
pub(super) struct Best {
    pub(super) plan: Placement,
    /// Baselines, each with the KV tier where it does best.
    pub(super) baselines: Vec<Placement>,
    /// `[tiers]` seconds per byte.
    pub(super) prices: Vec<f64>,
    pub(super) notes: Vec<String>,
}

/// Returns the plan of one baseline, and all baselines.
///
/// # Errors
/// Fails if the baseline fits no instance.
pub(super) fn best_baseline(instances: &[Instance<'_>], baseline: Baseline) -> Result<Best> {
    let plans = instances
        .iter()
        .map(baseline_plans)
        .collect::<Result<Vec<_>>>()?;
    let baselines = best_of_each(instances, plans);
    let plan = baselines
        .iter()
        .find(|b| b.name == baseline.name())
        .cloned()
        .with_context(|| {
            format!(
                "the rule '{}' makes no plan on these tiers and budgets; try --strategy optimal",
                baseline.name()
            )
        })?;
    Ok(Best {
        plan,
        baselines,
        prices: Vec::new(),
        notes: Vec::new(),
    })
}

/// Returns the best plan of instances that differ by the tier of the KV cache.
///
/// # Errors
/// Fails if no instance has a solution.
pub(super) fn optimum(
    instances: &[Instance<'_>],
    start: Instant,
    deadline: Instant,
) -> Result<Best> {
    let baselines = instances
        .iter()
        .map(baseline_plans)
        .collect::<Result<Vec<_>>>()?;
    let mut best = search(instances, &baselines, start, deadline)?;
    best.baselines = best_of_each(instances, baselines);
    Ok(best)
}

/// Returns each baseline's best plan over the instances.
fn best_of_each(instances: &[Instance<'_>], baselines: Vec<BaselinePlans>) -> Vec<Placement> {
    let mut best: Vec<(f64, Placement)> = Vec::new();
    for (instance, BaselinePlans { plans, .. }) in instances.iter().zip(baselines) {
        for plan in plans {
            let value = instance.value(&plan);
            match best.iter_mut().find(|(_, known)| known.name == plan.name) {
                Some(known) if value < known.0 => *known = (value, plan),
                Some(_) => {}
                None => best.push((value, plan)),
            }
        }
    }
    best.into_iter().map(|(_, plan)| plan).collect()
}

/// An instance with the best plan found for it.
struct Attempt<'a, 'b> {
    instance: &'a Instance<'b>,
    baselines: &'a BaselinePlans,
    best: Best,
    value: f64,
    /// Least value that a plan of the instance's columns can have; unknown for some objectives.
    bound: Option<f64>,
    /// Seconds that the instance's plans take at least by the prices alone.
    lagrangian_s: f64,
    /// Whether all columns were listed.
    is_complete: bool,
    /// Whether its search ended because its part of the time did.
    is_cut_short: bool,
}

impl<'a, 'b> Attempt<'a, 'b> {
    fn new(
        instance: &'a Instance<'b>,
        baselines: &'a BaselinePlans,
        deadline: Instant,
    ) -> Result<Self> {
        let Optimum {
            plan,
            notes,
            optimized,
        } = solve_instance(instance, baselines, Instant::now(), deadline)?;
        let lagrangian_s = optimized.lagrangian_bound + instance.token_fixed_s();
        let value = instance.value(&plan);
        let is_complete = optimized.is_complete;
        let gap = optimized.bound.and_then(|bound| instance.gap(&plan, bound));
        let bound = gap.map(|gap| value * (1.0 - gap));
        let best = Best {
            plan,
            baselines: Vec::new(),
            prices: optimized.price,
            notes,
        };
        Ok(Attempt {
            instance,
            baselines,
            best,
            value,
            bound,
            lagrangian_s,
            is_complete,
            is_cut_short: Instant::now() >= deadline,
        })
    }

    /// Returns the least seconds of plans of an instance that has the KV cache elsewhere.
    ///
    /// Returns `None` where the two differ by more. A tier that has room for one layer's experts
    /// there and not here makes columns that these prices have not seen. Columns of dense groups
    /// are few and priced anew, since the cache moves with attention.
    fn bound_of(&self, other: &Instance<'_>) -> Option<f64> {
        let (here, there) = (self.instance.capacity, other.capacity);
        let largest = self.instance.largest_column();
        let mut left = here.left_bytes.iter().zip(&there.left_bytes);
        let same_columns = left.all(|(here, there)| there <= here || *here >= largest);
        if !self.instance.objective.is_latency() || !same_columns {
            return None;
        }
        let prices = &self.best.prices;
        let moved = other.token_fixed_s() - self.instance.token_fixed_s()
            + other.dense_s(prices)?
            - self.instance.dense_s(prices)?;
        Some(self.lagrangian_s + moved + here.priced_left(prices) - there.priced_left(prices))
    }

    /// Returns the relative gap that is good enough: none where all columns were listed.
    fn tolerance(&self) -> f64 {
        if self.is_complete {
            MAX_ROUNDING_GAP
        } else {
            self.instance.depth.tolerance()
        }
    }

    /// Whether more time may find something better than `value`.
    fn is_open(&self, value: f64) -> bool {
        let tolerance = self.tolerance();
        self.is_cut_short
            && self
                .bound
                .is_none_or(|bound| bound < value * (1.0 - tolerance))
    }
}

fn search(
    instances: &[Instance<'_>],
    baselines: &[BaselinePlans],
    start: Instant,
    deadline: Instant,
) -> Result<Best> {
    if let ([only], [baselines]) = (instances, baselines) {
        return Ok(Attempt::new(only, baselines, deadline)?.best);
    }
    // A bound over all columns takes all the time there is, so it comes last.
    let searched: Vec<Instance<'_>> = instances
        .iter()
        .map(|instance| Instance {
            bounds_all: false,
            ..*instance
        })
        .collect();
    let mut attempts: Vec<Attempt<'_, '_>> = Vec::new();
    // Least bound of the instances that were not solved.
    let mut skipped_bound = f64::INFINITY;
    let mut first_error = None;
    for (at, (instance, baselines)) in searched.iter().zip(baselines).enumerate() {
        let least = attempts
            .iter()
            .map(|a| a.value)
            .fold(f64::INFINITY, f64::min);
        let bound = attempts
            .iter()
            .filter_map(|a| a.bound_of(instance))
            .fold(f64::NEG_INFINITY, f64::max);
        // A baseline that ignores the train split may be better than every plan under the bound.
        let beaten_by_baseline = baselines
            .plans
            .iter()
            .any(|plan| instance.value(plan) < least);
        let tolerance = attempts.first().map_or(0.0, Attempt::tolerance);
        if bound >= least * (1.0 - tolerance) && !beaten_by_baseline {
            skipped_bound = skipped_bound.min(bound);
            continue;
        }
        let now = Instant::now();
        // Those after the first begin with its columns, and need less.
        let left = deadline.saturating_duration_since(now);
        let is_last = at + 1 == searched.len();
        let part = if is_last {
            left
        } else {
            left.mul_f64(PART_OF_ONE)
        };
        match Attempt::new(instance, baselines, now + part) {
            Ok(attempt) => attempts.push(attempt),
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    loop {
        attempts.sort_by(|a, b| a.value.total_cmp(&b.value));
        let least = attempts.first().map_or(0.0, |a| a.value);
        let in_time = Instant::now() < deadline;
        let Some(open) = attempts
            .iter_mut()
            .find(|a| a.is_open(least))
            .filter(|_| in_time)
        else {
            break;
        };
        open.is_cut_short = false;
        // Both bounds hold, each for the columns tried, and the first round's plan stays known.
        if let Ok(again) = Attempt::new(open.instance, open.baselines, deadline)
            && again.value <= open.value
        {
            *open = again;
        }
    }
    let mut attempts = attempts.into_iter();
    let Some(mut first) = attempts.next() else {
        let none = || anyhow::anyhow!("no tier has room for what is not divided");
        return Err(first_error.unwrap_or_else(none));
    };
    let others = attempts
        .map(|a| a.bound)
        .try_fold(skipped_bound, |least, bound| Some(least.min(bound?)));
    lower_proof(&mut first.best.plan, first.value, others);
    let is_plain = first.instance.objective.is_latency() && !first.is_complete;
    if is_plain
        && first.instance.depth.bounds_all()
        && let Ok(Some(bound)) = bound_over_all(first.instance, deadline)
        && let Some(gap) = first.instance.gap(&first.best.plan, bound)
    {
        first.best.notes.push(format!(
            "over every count of pins and slots the gap is proven to be at most {:.2} %",
            gap * 100.0
        ));
    }
    first.best.plan.solver.solve_s = start.elapsed().as_secs_f64();
    Ok(first.best)
}

/// Lowers what is proven of a plan to the bound that also holds for the other instances.
fn lower_proof(plan: &mut Placement, value: f64, others: Option<f64>) {
    let solver = &mut plan.solver;
    let wider = |gap: f64| others.map(|bound| gap.max((value - bound) / value));
    solver.gap = solver.gap.and_then(wider);
    let proven = solver.gap.map(|gap| 1.0 - gap);
    solver.bound_s = solver
        .bound_s
        .and(proven)
        .map(|part| solver.objective_s * part);
    if let Some(goal) = &mut solver.goal {
        goal.bound = goal.bound.and(proven).map(|part| value * part);
    }
    if solver.status == "optimal" && solver.gap.is_none_or(|gap| gap > MAX_ROUNDING_GAP) {
        solver.status = "feasible".to_string();
    }
}
