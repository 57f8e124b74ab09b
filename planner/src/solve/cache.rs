//! Where keys and values are: those of attention on a real GPU there, which columns of attention say, and all others on one
//! tier, chosen with everything else.
//!
//! Every tier that has room for these gives a problem of its own. Each gets a part of the time at first. The prices for
//! bytes that one ends with say what a problem that differs by the cache alone can come to at best, so some need not be
//! solved. What is left of the time goes to the best one, then to those that might still be better. The bound is the
//! least of all of them.

use super::planner::{NO_GAP, Planner};
use super::rules::Draft;
use anyhow::Result;
use std::time::Instant;
use tier_plan_runtime::formats::placement::Placement;

/// Part of the time that all problems together get at first.
const QUICK: f64 = 0.3;

/// The best plan over all places of the cache.
pub(super) struct Found {
    pub(super) plan: Placement,
    /// The rules' plans, each with the cache where it does best.
    pub(super) baselines: Vec<Placement>,
    /// `[tiers]` worth of a byte.
    pub(super) prices: Vec<f64>,
    pub(super) notes: Vec<String>,
}

/// The rules' drafts and plans of one problem.
type Rules = (Vec<Draft>, Vec<Placement>);

/// Of each rule the plan that does best, wherever it has the cache.
pub(super) fn baselines(planners: &[Planner<'_>], rules: Vec<Rules>) -> Vec<Placement> {
    let mut best: Vec<(f64, Placement)> = Vec::new();
    for (planner, (_, plans)) in planners.iter().zip(rules) {
        for plan in plans {
            let value = planner.value(&plan);
            match best.iter_mut().find(|(_, known)| known.name == plan.name) {
                Some(known) if value < known.0 => *known = (value, plan),
                Some(_) => {}
                None => best.push((value, plan)),
            }
        }
    }
    best.into_iter().map(|(_, plan)| plan).collect()
}

/// One problem, solved.
struct Attempt<'a, 'b> {
    planner: &'a Planner<'b>,
    found: Found,
    value: f64,
    /// No plan of its columns has less value; not known of every goal.
    bound: Option<f64>,
    /// What the prices say that its plans take at least, in seconds.
    priced_s: f64,
    /// It had all the time there was.
    thorough: bool,
}

impl<'a, 'b> Attempt<'a, 'b> {
    fn new((planner, rules): (&'a Planner<'b>, &Rules), deadline: Instant, thorough: bool) -> Result<Self> {
        let (drafts, baselines) = rules;
        let mut notes = Vec::new();
        let (plan, programmed) = planner.optimum(drafts, baselines, Instant::now(), deadline, &mut notes)?;
        let priced_s = programmed.priced + planner.fixed_s(1);
        let value = planner.value(&plan);
        let gap = programmed.bound.and_then(|bound| planner.gap(&plan, bound));
        let found = Found { plan, baselines: Vec::new(), prices: programmed.price, notes };
        Ok(Attempt { planner, found, value, bound: gap.map(|gap| value * (1.0 - gap)), priced_s, thorough })
    }

    /// What the plans of a problem that has the cache elsewhere take at least; nothing where the two differ by more: a tier
    /// that has room for one layer's experts there and not here makes columns that these prices have not seen. Columns of
    /// dense groups are few, and priced anew: with attention goes the cache.
    fn bound_of(&self, other: &Planner<'_>) -> Option<f64> {
        let (this, that) = (self.planner.room, other.room);
        let largest = self.planner.largest_column();
        let mut left = this.left_bytes.iter().zip(&that.left_bytes);
        let same_columns = left.all(|(here, there)| there <= here || *here >= largest);
        if !self.planner.goal.is_latency() || !same_columns {
            return None;
        }
        let prices = &self.found.prices;
        let moved =
            other.fixed_s(1) - self.planner.fixed_s(1) + other.dense_s(prices)? - self.planner.dense_s(prices)?;
        Some(self.priced_s + moved + this.priced_left(prices) - that.priced_left(prices))
    }

    /// Whether it might have something better than `value`, and had not all the time yet.
    fn is_open(&self, value: f64) -> bool {
        !self.thorough && self.bound.is_none_or(|bound| bound < value * (1.0 - NO_GAP))
    }
}

/// The best plan of problems that differ by the tier of the cache.
///
/// # Errors
/// When none of them has a solution.
pub(super) fn best(planners: &[Planner<'_>], start: Instant, deadline: Instant) -> Result<Found> {
    let rules = planners.iter().map(Planner::baselines).collect::<Result<Vec<Rules>>>()?;
    let mut found = search(planners, &rules, start, deadline)?;
    found.baselines = baselines(planners, rules);
    Ok(found)
}

fn search(planners: &[Planner<'_>], rules: &[Rules], start: Instant, deadline: Instant) -> Result<Found> {
    if let ([only], [rules]) = (planners, rules) {
        return Ok(Attempt::new((only, rules), deadline, true)?.found);
    }
    let part = deadline.saturating_duration_since(start).mul_f64(QUICK / planners.len().max(1) as f64);
    let mut attempts: Vec<(Attempt<'_, '_>, &Rules)> = Vec::new();
    let mut left_out = f64::INFINITY;
    let mut first_error = None;
    for (planner, rules) in planners.iter().zip(rules) {
        let least = attempts.iter().map(|(a, _)| a.value).fold(f64::INFINITY, f64::min);
        let bound = attempts.iter().filter_map(|(a, _)| a.bound_of(planner)).fold(f64::NEG_INFINITY, f64::max);
        // A rule that ignores the train split may be luckier than every plan that the bound is of.
        let lucky = rules.1.iter().any(|plan| planner.value(plan) < least);
        if bound >= least && !lucky {
            left_out = left_out.min(bound);
            continue;
        }
        match Attempt::new((planner, rules), deadline.min(Instant::now() + part), false) {
            Ok(attempt) => attempts.push((attempt, rules)),
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    loop {
        attempts.sort_by(|a, b| a.0.value.total_cmp(&b.0.value));
        let least = attempts.first().map_or(0.0, |(a, _)| a.value);
        let in_time = Instant::now() < deadline;
        let Some((open, rules)) = attempts.iter_mut().find(|(a, _)| a.is_open(least)).filter(|_| in_time) else {
            break;
        };
        open.thorough = true;
        // Both bounds hold, each for what was tried; and what was found in a hurry stays found.
        if let Ok(again) = Attempt::new((open.planner, rules), deadline, true)
            && again.value <= open.value
        {
            *open = again;
        }
    }
    let mut attempts = attempts.into_iter().map(|(attempt, _)| attempt);
    let Some(mut best) = attempts.next() else {
        let none = || anyhow::anyhow!("no tier has room for the key and value cache");
        return Err(first_error.unwrap_or_else(none));
    };
    let others = attempts.map(|a| a.bound).try_fold(left_out, |least, bound| Some(least.min(bound?)));
    take_in(&mut best.found.plan, best.value, others);
    best.found.plan.solver.solve_s = start.elapsed().as_secs_f64();
    Ok(best.found)
}

/// Lowers what is proven of a plan with this value to what holds for the other problems too.
fn take_in(plan: &mut Placement, value: f64, others: Option<f64>) {
    let solver = &mut plan.solver;
    let worse = |gap: f64| others.map(|bound| gap.max((value - bound) / value));
    solver.gap = solver.gap.and_then(worse);
    let proven = solver.gap.map(|gap| 1.0 - gap);
    solver.bound_s = solver.bound_s.and(proven).map(|part| solver.objective_s * part);
    if let Some(goal) = &mut solver.goal {
        goal.bound = goal.bound.and(proven).map(|part| value * part);
    }
    if solver.status == "optimal" && solver.gap.is_none_or(|gap| gap > NO_GAP) {
        solver.status = "feasible".to_string();
    }
}
