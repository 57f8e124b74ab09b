//! What a plan must satisfy beside the model it is for, and on this machine, before anything is
//! loaded.

use crate::error::LoadError;
use crate::tiers::arena::{Arena, ArenaError};
use crate::tiers::nodes;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{Placement, validate};

/// Allocates the KV cache's memory once and frees it: a vector that is too large ends the program.
pub(super) fn context_fits(shape: &ModelShape, plan: &Placement) -> Result<(), LoadError> {
    let context = plan.context;
    // The cache on GPUs is counted with everything else there.
    let on_host = plan
        .cache_bytes(shape)
        .into_iter()
        .zip(&plan.tiers)
        .filter(|(_, t)| !t.tier.is_gpu());
    let bytes = on_host.fold(0, |sum: u64, (bytes, _)| sum.saturating_add(bytes));
    if bytes == 0 {
        return Ok(());
    }
    match Arena::new("", bytes) {
        Err(ArenaError::Map { source, .. }) => Err(LoadError::Context {
            context,
            bytes,
            r#source,
        }),
        other => Ok(other.map(|_| ())?),
    }
}

/// Refuses a plan whose tiers are NUMA nodes that this machine doesn't have, or that are too full.
pub(super) fn memory_nodes(plan: &Placement) -> Result<(), LoadError> {
    let in_use = plan.tiers.iter().filter(|t| t.used_bytes() > 0);
    nodes::check(in_use.map(|t| (&t.tier, t.used_bytes()))).map_err(|r#source| LoadError::Node {
        plan: plan.name.clone(),
        r#source,
    })
}

/// Refuses a plan that contradicts its model or itself, with the first violation.
pub(super) fn plan(shape: &ModelShape, plan: &Placement) -> Result<(), LoadError> {
    match validate(plan, shape).into_iter().next() {
        Some(violation) => Err(LoadError::Plan {
            plan: plan.name.clone(),
            model: shape.id.name.clone(),
            violation: Box::new(violation),
        }),
        None => Ok(()),
    }
}
