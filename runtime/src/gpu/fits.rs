//! Whether a plan fits the memory of the GPUs.

use super::buffers::BufferSizes;
use super::{GPU_RESERVE_BYTES, Most};
use crate::error::LoadError;
use crate::gpu::devices::Devices;
use crate::gpu::rows::gpu_row_bytes;
use crate::layers::places::Places;
use crate::options::LoadOptions;
use tier_plan_formats::model::spec::ModelSpec;
use tier_plan_formats::placement::Placement;

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
