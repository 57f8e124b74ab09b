//! Factors beside matrices, for which GPUs have no kernels: what has some stays on the CPU.

use crate::error::LoadError;
use crate::layers::places::Places;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{Ffn, GatedFfn, LayerSpec, ModelSpec, MoeSpec, TensorId};
use tier_plan_formats::placement::{LayerPlacement, Placement, TierIdx};

/// Rejects a plan that places a matrix with a factor on a GPU.
///
/// # Errors
/// Names the tensor and the tier.
pub(super) fn check(
    gguf: &Gguf,
    spec: &ModelSpec,
    plan: &Placement,
    places: &Places,
) -> Result<(), LoadError> {
    if spec.scales.is_empty() {
        return Ok(());
    }
    let mut found = Vec::new();
    for (layer, at) in spec.layers.iter().zip(&places.layers) {
        let parts = [
            (at.mixer, layer.mixer.tensors().matrices),
            (at.ffn, dense_block(layer)),
            (at.shared, shared_expert(layer)),
        ];
        for (tier, matrices) in parts {
            found.extend(matrices.into_iter().filter_map(|id| Some((tier?, id))));
        }
    }
    found.extend(places.head.map(|tier| (tier, spec.output)));
    for (placed, (_, moe)) in plan.layers.iter().zip(spec.moe_layers()) {
        let on_gpu = |tier: &TierIdx| plan.tiers.get(*tier).is_some_and(|t| t.uses_gpu());
        for tier in tiers_of(placed).filter(on_gpu) {
            found.extend(moe.expert_linears().map(|l| (tier, l.weight)));
        }
    }
    match found.into_iter().find(|(_, id)| spec.scales.has(*id)) {
        None => Ok(()),
        Some((tier, id)) => Err(LoadError::FactorOnGpu {
            plan: plan.name.clone(),
            tier: plan.tiers[tier].tier.name.clone(),
            tensor: gguf.tensors()[id].name.clone(),
        }),
    }
}

/// Whether routed experts have factors, so that none of them may go to a GPU.
pub(crate) fn of_experts(spec: &ModelSpec, moe: &MoeSpec) -> bool {
    moe.expert_linears().any(|l| spec.scales.has(l.weight))
}

/// Returns the tiers that experts of a layer are pinned to, or have slots on.
fn tiers_of(placed: &LayerPlacement) -> impl Iterator<Item = TierIdx> {
    let pinned = placed.pinned.iter().map(|pins| pins.tier);
    pinned.chain((placed.slots > 0).then_some(placed.slot_tier))
}

fn dense_block(layer: &LayerSpec) -> Vec<TensorId> {
    match &layer.ffn {
        Ffn::None => Vec::new(),
        Ffn::Dense(ffn) => matrices(ffn),
        Ffn::Moe(_) => Vec::new(),
    }
}

fn shared_expert(layer: &LayerSpec) -> Vec<TensorId> {
    let shared = layer.moe().and_then(|moe| moe.shared.as_ref());
    shared.map_or_else(Vec::new, |shared| matrices(&shared.ffn))
}

fn matrices(ffn: &GatedFfn) -> Vec<TensorId> {
    ffn.linears().map(|l| l.weight).collect()
}
