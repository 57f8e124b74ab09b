//! Shadow prices: the worth of one more byte of each tier, from the master LP's dual.

use super::generate::generate;
use super::options::{Backend, Depth, Objective};
use super::problem::capacity::Capacity;
use super::problem::columns::{self, Charge};
use super::problem::constraints::Constraints;
use super::problem::enumerate::ColumnEnumerator;
use super::problem::instance::Instance;
use super::problem::objective::ObjectiveFunction;
use super::problem::pool::ColumnPool;
use super::{Problem, deadline};
use crate::profile::Evidence;
use anyhow::Result;
use std::time::Instant;
use tier_plan_runtime::formats::placement::{DensePlacement, Placement, TierIdx};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::ModelShape;

/// Returns `[tiers]` seconds per byte of a decoded token, with the KV cache on `kv_tier`.
///
/// # Errors
/// Fails if the problem has no solution, or the time limit is negative.
pub fn shadow_prices(
    problem: &Problem<'_>,
    evidence: &Evidence,
    plan: &Placement,
    time_limit_s: f64,
) -> Result<Vec<f64>> {
    let constraints = Constraints::default();
    let mut capacities = Capacity::per_kv_tier(problem, &constraints)?;
    // A plan may name a GPU as the tier of the KV cache, where none of it is set aside.
    let on = together_on(plan, problem.shape);
    let is = |capacity: &&Capacity| capacity.together_on == on;
    let with_cache = capacities
        .iter()
        .position(|c| is(&c) && c.kv_tier == plan.kv_tier);
    let at = with_cache.or(capacities.iter().position(|c| is(&c)));
    let at = at.unwrap_or(0);
    let capacity = &capacities.swap_remove(at);
    let objective = &ObjectiveFunction::new(Objective::Latency, None, None, problem)?;
    let backend = Backend::default();
    let instance = Instance {
        problem,
        evidence,
        capacity,
        objective,
        constraints: &constraints,
        backend,
        pool: &ColumnPool::default(),
        depth: Depth::Quick,
        bounds_all: false,
    };
    let charge = Charge::linear(objective);
    let deadline = deadline(Instant::now(), time_limit_s)?;
    let shape = problem.shape;
    let enumerator = ColumnEnumerator::new(
        shape,
        evidence,
        capacity,
        &charge,
        &constraints,
        instance.depth.grid_s(time_limit_s),
    );
    let dense = columns::dense_items(shape, capacity, &charge, &constraints);
    Ok(generate(&instance, &enumerator, dense, &[], deadline)?
        .dual
        .price)
}

/// Returns the GPU that has the parts which run on one only together, if any.
fn together_on(plan: &Placement, shape: &ModelShape) -> Option<TierIdx> {
    let is_together = |d: &DensePlacement| {
        let mut together = shape.cpu_only.iter().filter(|only| only.is_together());
        together.any(|only| only.is(Part::Dense(d.kind), d.layer))
    };
    let on_gpu = |d: &&DensePlacement| plan.tiers.get(d.tier).is_some_and(|t| t.tier.is_gpu());
    let mut dense = plan.dense.iter().filter(on_gpu);
    dense.find(|d| is_together(d)).map(|d| d.tier)
}
