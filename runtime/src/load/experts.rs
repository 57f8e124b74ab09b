//! Loading the routed experts: pins them, makes slots and staging, and hands all of it to the
//! store.

use super::storage::{Storage, is_mapped, largest};
use super::{Loader, bands};
use crate::error::LoadError;
use crate::experts::layer::{ExpertBacking, LayerExperts, Layout};
use crate::experts::store::ExpertStore;
use crate::layers::index::{MoeLayer, layers as model_layers};
use crate::options::LoadOptions;
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::ReadMode;
use std::collections::HashSet;
use std::sync::Arc;
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::Model;
use tier_plan_formats::model::spec::ExpertLinear;
use tier_plan_formats::placement::{LayerPlacement, Pins, Placement, PlanTier, TierIdx};
use tier_plan_kernels::Kernels;
use tier_plan_kernels::threads::physical_cores;

/// Returns the experts of each MoE layer where they are before any is pinned.
pub(super) fn layers(
    model: &Model,
    plan: &Placement,
    options: &LoadOptions,
    kernels: Kernels,
) -> Vec<LayerExperts> {
    let gguf = model.gguf();
    let slow = &plan.tiers[plan.home_tier()].tier;
    let pack = options
        .pack
        .as_ref()
        .filter(|_| slow.kind == TierKind::Nvme);
    // Experts may be copied to a GPU, which reads them in the order of the file.
    let in_bands = !plan.tiers.iter().any(PlanTier::uses_gpu);
    let mut layers = Vec::with_capacity(plan.layers.len());
    for (placed, (_, moe)) in plan.layers.iter().zip(model.spec().moe_layers()) {
        let home = || {
            if is_mapped(slow) && placed.slots == 0 {
                ExpertBacking::Mapped
            } else {
                ExpertBacking::Pooled
            }
        };
        let homes = (0..moe.n_expert).map(|_| home()).collect();
        let mut layer =
            LayerExperts::new(gguf, moe, homes, placed.slot_tier).with_scales(&model.spec().scales);
        if in_bands {
            let faster = |l: &&ExpertLinear| bands::expert(kernels, gguf, moe, l);
            let matrices: Vec<_> = moe
                .expert_linears()
                .filter(faster)
                .map(|l| l.weight)
                .collect();
            layer.interleave(kernels, &matrices);
        }
        if let Some(places) = pack.and_then(|pack| pack.places(placed.layer)) {
            let pinned: HashSet<u32> = placed
                .pinned
                .iter()
                .flat_map(|pins| &pins.experts)
                .copied()
                .collect();
            layer.use_copy(gguf.n_parts(), places, |expert| {
                !pinned.contains(&(expert as u32))
            });
        }
        let mut first = gguf.n_parts() + usize::from(pack.is_some());
        for copy in super::storage::copies(slow, options) {
            layer.add_copy(copy.of_layer(placed.layer, first));
            first += copy.paths().len();
        }
        layers.push(layer);
    }
    layers
}

impl Loader<'_> {
    /// Loads the experts of all layers.
    pub(super) fn experts(
        &mut self,
        mut layers: Vec<LayerExperts>,
    ) -> Result<ExpertStore, LoadError> {
        let (plan, slow) = (self.plan, self.slow_tier());
        let stream = self.open_stream(&layers)?;
        let moe_layers = model_layers(self.model.spec()).filter_map(|layer| layer.moe);
        for ((placed, layer), moe) in plan.layers.iter().zip(&mut layers).zip(moe_layers) {
            self.pin_on_gpus(moe, placed, layer)?;
            let n_pinned = self.pin_in_memory(placed, layer)?;
            self.memory.resident_bytes[slow] +=
                (layer.n_expert() - n_pinned) as u64 * layer.expert_bytes() as u64;
            self.make_slots(placed, layer)?;
        }
        let (packed, room) = (
            largest(&layers, Layout::Packed),
            largest(&layers, self.layout),
        );
        let mut staging = Vec::new();
        if matches!(self.storage[slow], Storage::File) {
            for _ in 0..plan.staging_experts {
                staging.push(self.buffer(plan.staging_tier, packed, room)?);
            }
        }
        let files = self.files.tier.take();
        // An emulated device takes the declared time, and what stands for memory needs no prefetch.
        let prefetches = self.files.mode != ReadMode::Cached;
        let gguf = Arc::clone(self.model.gguf());
        let mut store = ExpertStore::new(
            gguf,
            layers,
            files,
            staging,
            plan.staging_tier,
            slow,
            prefetches,
        );
        self.verify(&mut store)?;
        if let Some(stream) = stream {
            store.stream_tokens(stream);
        }
        store.set_gpus(self.ready_gpus()?);
        Ok(store)
    }

    /// Compares mapped experts with their checksums now, and has the store compare the others when
    /// they are read.
    fn verify(&mut self, store: &mut ExpertStore) -> Result<(), LoadError> {
        let Some(checks) = &self.options.checks else {
            return Ok(());
        };
        if matches!(self.storage[self.slow_tier()], Storage::Mapped) {
            let threads = self.options.threads.unwrap_or_else(physical_cores);
            let progress = &mut self.progress;
            checks.mapped(
                self.model.gguf(),
                &store.in_place(),
                threads,
                &mut |bytes| {
                    progress.done = (progress.done + bytes).min(progress.total);
                    progress.add(0);
                },
            )?;
        }
        store.verify(Arc::clone(checks));
        Ok(())
    }

    fn pin_on_gpus(
        &mut self,
        moe: MoeLayer<'_>,
        placed: &LayerPlacement,
        layer: &mut LayerExperts,
    ) -> Result<(), LoadError> {
        for tier in self.plan.tiers.indices() {
            if matches!(self.storage[tier], Storage::Gpu) {
                self.experts_on_gpu(moe, placed, layer, tier)?;
                self.progress.add(0);
            }
        }
        Ok(())
    }

    /// Copies what a layer pins in main memory there. Returns how many experts it pins, those on
    /// GPUs included.
    fn pin_in_memory(
        &mut self,
        placed: &LayerPlacement,
        layer: &mut LayerExperts,
    ) -> Result<usize, LoadError> {
        let bytes = layer.expert_bytes();
        let mut n_pinned = 0;
        for Pins { tier, experts } in &placed.pinned {
            n_pinned += experts.len();
            if matches!(self.storage[*tier], Storage::Gpu) {
                continue;
            }
            for expert in experts {
                self.progress.add(bytes as u64);
                self.memory.resident_bytes[*tier] += bytes as u64;
                let piece = match &mut self.storage[*tier] {
                    Storage::Arena { pins, .. } => pins.take(bytes)?,
                    // The only tier of its plan: pinned or not, an expert computes where it is
                    // mapped.
                    Storage::Mapped => continue,
                    Storage::File | Storage::Gpu => {
                        unreachable!("a checked plan pins nothing to files")
                    }
                };
                layer.pin(
                    *expert as usize,
                    *tier,
                    self.read_expert(layer, *expert, piece)?,
                );
            }
        }
        Ok(n_pinned)
    }

    /// Reads an expert, packed, into a buffer.
    pub(super) fn read_expert(
        &self,
        layer: &LayerExperts,
        expert: u32,
        into: ArenaSlice,
    ) -> Result<ArenaSlice, LoadError> {
        let (gguf, expert) = (self.model.gguf(), expert as usize);
        let spans = layer.spans(gguf, expert, Layout::Packed);
        let finish = layer.finish(gguf, self.options.checks.as_deref(), expert, Layout::Packed);
        self.read(&spans, finish, into)
    }

    fn make_slots(
        &mut self,
        placed: &LayerPlacement,
        layer: &mut LayerExperts,
    ) -> Result<(), LoadError> {
        if placed.slots > 0 && matches!(self.storage[placed.slot_tier], Storage::Gpu) {
            layer.set_slots_on_gpu(placed.slots, self.layout, placed.policy);
            return Ok(());
        }
        let (bytes, room) = (layer.expert_bytes(), layer.buffer_bytes(self.layout));
        let slots = (0..placed.slots)
            .map(|_| self.buffer(placed.slot_tier, bytes, room))
            .collect::<Result<_, _>>()?;
        layer.set_slots(slots, self.layout, placed.policy);
        Ok(())
    }

    /// Takes a buffer of `room` bytes from a tier's arena, which the plan counts as `planned`
    /// bytes.
    fn buffer(
        &mut self,
        tier: TierIdx,
        planned: usize,
        room: usize,
    ) -> Result<ArenaSlice, LoadError> {
        match &mut self.storage[tier] {
            Storage::Arena { buffers, .. } => {
                self.memory.resident_bytes[tier] += planned as u64;
                Ok(buffers.take(room)?)
            }
            _ => unreachable!("a checked plan takes memory only from tiers that have an arena"),
        }
    }
}
