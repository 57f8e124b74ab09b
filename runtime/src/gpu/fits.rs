//! Whether a plan fits the GPUs that there are.

use super::buffers::Sizes;
use crate::error::LoadError;
use crate::gpu::devices::Devices;
use crate::gpu::rows::gpu_room_bytes;
use crate::layers::places::Places;
use crate::options::LoadOptions;
use crate::options::batches;
use tier_plan_formats::model::spec::ModelSpec;
use tier_plan_formats::placement::{Placement, TierIdx};

/// What is left of a GPU's memory for the driver, kernels and small tables.
const GPU_RESERVE: u64 = 128 << 20;

/// Compares what the GPUs must hold with what is free there.
///
/// # Errors
/// When one has too little, or does not answer.
pub(crate) fn check(
    spec: &ModelSpec,
    plan: &Placement,
    options: &LoadOptions,
    devices: &Devices,
) -> Result<(), LoadError> {
    let places = Places::new(plan, spec.layers.len());
    for (tier, device) in devices.all() {
        let t = &plan.tiers[tier];
        let free = device.free_bytes().map_err(|source| LoadError::Gpu { plan: plan.name.clone(), source })? as u64;
        let (weights, cache) = (t.bytes.dense + t.bytes.pinned + t.bytes.slots, t.bytes.kv);
        let dense = if places.uses(tier) { room(spec, plan, options, &places, tier).bytes() } else { 0 };
        let experts = if t.bytes.pinned + t.bytes.slots > 0 { gpu_room_bytes(spec) } else { 0 };
        let work = dense + experts;
        let needed = [weights, cache, work, GPU_RESERVE].into_iter().fold(0, u64::saturating_add);
        if needed > free {
            let (plan, tier, device) = (plan.name.clone(), t.tier.name.clone(), device.name().to_string());
            let reserve = GPU_RESERVE;
            return Err(LoadError::GpuFull { plan, tier, device, free, needed, weights, cache, work, reserve });
        }
    }
    Ok(())
}

/// The buffers of the passes on a tier's GPU.
pub(super) fn room(spec: &ModelSpec, plan: &Placement, options: &LoadOptions, places: &Places, tier: TierIdx) -> Sizes {
    let (batch, rows) = batches(options, plan.context as usize);
    Sizes::new(spec, places, tier, batch, rows, plan.context as usize)
}
