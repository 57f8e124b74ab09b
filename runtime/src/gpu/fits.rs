//! Whether a plan fits the memory of the GPUs.

use super::buffers::BufferSizes;
use super::{GPU_RESERVE_BYTES, Most};
use crate::error::LoadError;
use crate::gpu::devices::Devices;
use crate::gpu::rows::gpu_row_bytes;
use crate::layers::places::Places;
use crate::options::LoadOptions;
use tier_plan_formats::model::spec::{ModelSpec, MoeSpec};
use tier_plan_formats::placement::{LayerPlacement, Placement, TierIdx};

/// Returns the bytes of the tables of experts' biases on a GPU.
fn bias_bytes(spec: &ModelSpec, plan: &Placement, tier: TierIdx) -> u64 {
    let shared = plan.streaming.filter(|s| s.tier == tier);
    let shared = shared.map_or(0, |s| u64::from(s.experts));
    let of_layer = |((_, moe), placed): ((usize, &MoeSpec), &LayerPlacement)| {
        let has_biases = moe.expert_linears().any(|l| l.bias.is_some());
        let mut pins = placed.pinned.iter();
        let is_pinned = pins.any(|pins| pins.tier == tier && !pins.experts.is_empty());
        let pinned = if is_pinned { moe.n_expert as u64 } else { 0 };
        let has_slots = placed.slot_tier == tier;
        let slots = if has_slots {
            u64::from(placed.slots)
        } else {
            0
        };
        let width = (2 * moe.expert_ffn + moe.expert_width()) as u64;
        let entries = if has_biases {
            pinned + slots + shared
        } else {
            0
        };
        entries.saturating_mul(4 * width)
    };
    let layers = spec.moe_layers().zip(&plan.layers);
    layers.map(of_layer).fold(0, u64::saturating_add)
}

/// Compares the bytes that a plan needs on each GPU with the bytes that are free.
///
/// # Errors
/// When a GPU has too little memory, or does not answer.
pub(crate) fn check(
    spec: &ModelSpec,
    plan: &Placement,
    options: &LoadOptions,
    devices: &Devices,
) -> Result<(), LoadError> {
    let places = Places::new(plan, spec.layers.len());
    for (tier, device) in devices.all() {
        let t = &plan.tiers[tier];
        let free = device.free_bytes().map_err(|source| LoadError::Gpu {
            plan: plan.name.clone(),
            source,
        })? as u64;
        let of_experts = t.bytes.pinned + t.bytes.slots + t.bytes.staging;
        let (weights, cache) = (t.bytes.dense + of_experts, t.bytes.kv);
        let dense = if places.uses(tier) {
            BufferSizes::new(spec, &places, tier, Most::of(plan, options)).bytes()
        } else {
            0
        };
        let experts = if of_experts > 0 {
            gpu_row_bytes(spec)
        } else {
            0
        };
        let experts = experts.saturating_add(bias_bytes(spec, plan, tier));
        let (work, reserve) = (dense + experts, GPU_RESERVE_BYTES);
        let needed = [weights, cache, work, reserve]
            .into_iter()
            .fold(0, u64::saturating_add);
        if needed > free {
            let (plan, tier, device) = (
                plan.name.clone(),
                t.tier.name.clone(),
                device.name().to_string(),
            );
            return Err(LoadError::GpuFull {
                plan,
                tier,
                device,
                free,
                needed,
                weights,
                cache,
                work,
                reserve,
            });
        }
    }
    Ok(())
}
