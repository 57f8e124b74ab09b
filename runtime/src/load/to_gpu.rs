//! Loading routed experts to GPUs: those that a plan pins there, memory for slots, and buffers for
//! experts that are streamed.

use crate::error::LoadError;
use crate::experts::layer::LayerExperts;
use crate::experts::streamed::StreamPlan;
use crate::experts::view::ExpertView;
use crate::gpu::devices::Devices;
use crate::gpu::factors;
use crate::gpu::rows::gpu_rows;
use crate::layers::index::{MoeLayer, layers as model_layers};
use crate::load::Loader;
use crate::load::storage::Storage;
use crate::tiers::arena::Arena;
use std::sync::Arc;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::PinnedExperts;
use tier_plan_formats::placement::{LayerPlacement, PerTier, Placement, Streaming, TierIdx};

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
        let streams = self.streams_layer(moe) && self.streaming_tier() == Some(tier);
        if pinned.is_empty() && slots == 0 && !streams {
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

    /// Returns the tier of the GPU that experts of main memory are streamed to.
    fn streaming_tier(&self) -> Option<TierIdx> {
        self.plan.streaming.map(|streaming| streaming.tier)
    }

    /// Whether the experts of a layer can be streamed to a GPU.
    fn streams_layer(&self, moe: MoeLayer<'_>) -> bool {
        self.plan.streaming.is_some() && !factors::of_experts(self.model.spec(), moe.spec)
    }

    /// Makes the buffers that experts are streamed to. Returns how they are, if the plan says.
    pub(super) fn open_stream(
        &mut self,
        layers: &[LayerExperts],
    ) -> Result<Option<StreamPlan>, LoadError> {
        let Some(streaming) = self.plan.streaming else {
            return Ok(None);
        };
        let Streaming { tier, from, .. } = streaming;
        let moe_layers = model_layers(self.model.spec()).filter_map(|layer| layer.moe);
        let (mut len, mut times) = (0, Vec::with_capacity(layers.len()));
        for (layer, moe) in layers.iter().zip(moe_layers) {
            let bytes = layer.expert_bytes();
            let can = self.streams_layer(moe);
            if can {
                let any = vec![0; bytes];
                len = len.max(layer.packed(&any).kind(moe.spec).device_bytes());
            }
            times.push(self.plan.stream_times(bytes as u64).filter(|_| can));
        }
        let failed = self.gpu_failed();
        if let Some(gpu) = &mut self.gpu_experts[tier] {
            gpu.share_buffers(streaming.experts as usize, len)
                .map_err(failed)?;
        }
        self.memory.resident_bytes[tier] += self.plan.tiers[tier].bytes.staging;
        Ok(Some(StreamPlan {
            tier,
            from,
            layers: times,
        }))
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
