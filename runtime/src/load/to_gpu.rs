//! Loading routed experts to GPUs: those that a plan pins there, and memory for slots.

use crate::error::LoadError;
use crate::experts::layer::LayerExperts;
use crate::experts::view::ExpertView;
use crate::gpu::devices::Devices;
use crate::gpu::rows::gpu_rows;
use crate::layers::index::MoeLayer;
use crate::load::Loader;
use crate::load::storage::Storage;
use crate::tiers::arena::Arena;
use std::sync::Arc;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::PinnedExperts;
use tier_plan_formats::placement::{LayerPlacement, PerTier, Placement, TierIdx};

/// Returns the GPUs of a plan by tier, with no experts yet.
///
/// # Errors
/// When a GPU fails.
pub(super) fn open(
    plan: &Placement,
    devices: &Devices,
) -> Result<PerTier<Option<PinnedExperts>>, LoadError> {
    let open = |tier| {
        devices
            .of(tier)
            .map(|device| PinnedExperts::new(Arc::clone(device), plan.layers.len()))
    };
    let gpus = plan.tiers.indices().map(|tier| open(tier).transpose());
    gpus.collect::<Result<_, _>>()
        .map_err(|source| LoadError::Gpu {
            plan: plan.name.clone(),
            source,
        })
}

impl Loader<'_> {
    fn gpu_failed(&self) -> impl Fn(CudaError) -> LoadError + use<> {
        let plan = self.plan.name.clone();
        move |source| LoadError::Gpu {
            plan: plan.clone(),
            source,
        }
    }

    /// Copies what a layer pins on a GPU there, by way of main memory, and makes its slots if they
    /// are there.
    pub(super) fn experts_on_gpu(
        &mut self,
        moe: MoeLayer<'_>,
        placed: &LayerPlacement,
        layer: &mut LayerExperts,
        tier: TierIdx,
    ) -> Result<(), LoadError> {
        let pinned = placed
            .pinned
            .iter()
            .find(|pins| pins.tier == tier)
            .map_or(&[][..], |pins| &pins.experts);
        let slots = if placed.slot_tier == tier {
            placed.slots as usize
        } else {
            0
        };
        if pinned.is_empty() && slots == 0 {
            return Ok(());
        }
        let bytes = layer.expert_bytes();
        // One more than pinned: its view has the sizes of any expert.
        let mut host = Arena::new("", (bytes * (pinned.len() + 1)) as u64)?;
        let any = host.take(bytes)?;
        let mut pieces = Vec::with_capacity(pinned.len());
        for expert in pinned {
            pieces.push(self.read_expert(layer, *expert, host.take(bytes)?)?);
            layer.pin_on_gpu(*expert as usize, tier);
        }
        let views: Vec<_> = pieces.iter().map(|piece| layer.packed(piece)).collect();
        let biases: Vec<_> = views.iter().map(ExpertView::biases).collect();
        let experts: Vec<_> = pinned
            .iter()
            .zip(views.iter().zip(&biases))
            .map(|(expert, (view, biases))| (*expert as usize, view.bytes(biases.as_ref())))
            .collect();
        let (any, failed) = (layer.packed(&any), self.gpu_failed());
        if let Some(gpu) = &mut self.gpu_experts[tier] {
            gpu.add_layer(
                moe.index.get(),
                any.kind(moe.spec),
                &experts,
                slots,
                any.biases().is_some(),
            )
            .map_err(failed)?;
        }
        self.memory.resident_bytes[tier] += (bytes * (pinned.len() + slots)) as u64;
        self.progress.done += (bytes * pinned.len()) as u64;
        Ok(())
    }

    /// Returns the GPUs that have experts, with buffers for the rows that they will take.
    pub(super) fn ready_gpus(&mut self) -> Result<Vec<(TierIdx, PinnedExperts)>, LoadError> {
        let (rows, failed) = (gpu_rows(self.model.spec()), self.gpu_failed());
        let mut ready = Vec::new();
        for (tier, gpu) in self.gpu_experts.indices().zip(&mut self.gpu_experts) {
            if !matches!(self.storage[tier], Storage::Gpu) {
                continue;
            }
            if let Some(mut gpu) = gpu.take().filter(|gpu| gpu.bytes() > 0) {
                gpu.reserve(rows).map_err(&failed)?;
                gpu.open_transfers().map_err(&failed)?;
                ready.push((tier, gpu));
            }
        }
        Ok(ready)
    }
}
