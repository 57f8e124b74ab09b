//! Whether the parts of a model that a plan places on GPUs can run there.
//!
//! A part runs where its weights are: a layer's mixer (with its KV cache), its router, its shared
//! expert or dense block, the head, and the embedding. The hidden state is copied to where the next
//! part runs. Which parts no GPU can run is a property of the model ([`CpuOnly`]), which the solver
//! knows too.

use crate::error::LoadError;
use tier_plan_formats::model::gpu::{CpuOnly, CpuReason, Part};
use tier_plan_formats::model::shape::{DenseKind, ModelShape};
use tier_plan_formats::placement::{Placement, PlanTier, TierIdx};

/// Name of the KV cache in [`LoadError::OnGpu`], which is not a tensor group.
const KV_CACHE: &str = "kv_cache";

/// Rejects a plan that places a part on a GPU which can't run it.
///
/// # Errors
/// Names the part, the tier, and the reason.
pub fn check(shape: &ModelShape, plan: &Placement) -> Result<(), LoadError> {
    let found = |only: &CpuOnly| Some((gpu_of(plan, only)?, only.clone()));
    let (together, never): (Vec<&CpuOnly>, Vec<&CpuOnly>) =
        shape.cpu_only.iter().partition(|only| only.is_together());
    if let Some((tier, only)) = never.into_iter().find_map(found) {
        return Err(rejected(shape, plan, tier, only));
    }
    if let Some((tier, mut only)) = together.iter().copied().find_map(found)
        && let Some(away) = together.iter().find(|o| gpu_of(plan, o) != Some(tier))
    {
        let of = away
            .layer
            .map_or(String::new(), |layer| format!(" of layer {layer}"));
        let why = format!("{}, and {}{of} is elsewhere", only.why, away.part.name());
        only.why = CpuReason::Kernel(why);
        return Err(rejected(shape, plan, tier, only));
    }
    let cache = plan.tiers.get(plan.kv_tier).filter(|t| t.tier.is_gpu());
    let on_cpu = plan.dense.iter().find(|d| {
        let on_gpu = plan.tiers.get(d.tier).is_some_and(PlanTier::uses_gpu);
        d.kind == DenseKind::Attention && !on_gpu
    });
    match (cache, on_cpu) {
        (Some(tier), Some(attention)) => Err(LoadError::OnGpu {
            plan: plan.name.clone(),
            tier: tier.tier.name.clone(),
            group: KV_CACHE,
            layer: attention.layer.unwrap_or(0) as usize,
            why: "the CPU computes the layer's attention".into(),
        }),
        _ => Ok(()),
    }
}

/// Returns the tier of a GPU that a plan places some of a part on.
fn gpu_of(plan: &Placement, only: &CpuOnly) -> Option<TierIdx> {
    let is_gpu = |tier: &TierIdx| plan.tiers.get(*tier).is_some_and(PlanTier::uses_gpu);
    match only.part {
        Part::Dense(kind) => plan
            .dense
            .iter()
            .filter(|d| (d.kind, d.layer) == (kind, only.layer))
            .map(|d| d.tier)
            .find(is_gpu),
        Part::Experts => {
            let placed = plan.layers.iter().find(|l| Some(l.layer) == only.layer)?;
            let pinned = placed.pinned.iter().filter(|pins| !pins.experts.is_empty());
            pinned
                .map(|pins| pins.tier)
                .chain((placed.slots > 0).then_some(placed.slot_tier))
                .find(is_gpu)
        }
    }
}

fn rejected(shape: &ModelShape, plan: &Placement, tier: TierIdx, only: CpuOnly) -> LoadError {
    let (plan, tier) = (plan.name.clone(), plan.tiers[tier].tier.name.clone());
    match only.why {
        CpuReason::Factor(tensor) => LoadError::FactorOnGpu { plan, tier, tensor },
        why @ (CpuReason::Kernel(_) | CpuReason::Together(_)) => {
            // The head follows the last layer; the embedding precedes the first.
            let of_model = match only.part {
                Part::Dense(DenseKind::Head) => shape.n_layer,
                _ => 0,
            };
            LoadError::OnGpu {
                plan,
                tier,
                group: only.part.name(),
                layer: only.layer.unwrap_or(of_model) as usize,
                why: why.to_string(),
            }
        }
    }
}
