//! Experts of main memory that a GPU computes for a token, beside those that the CPU computes.
//!
//! The GPU reads them where they lie, in memory that was locked when the model was loaded, into
//! buffers that all layers share. A layer's transfer goes on beside the GPU's own experts, and what it
//! computes with the buffers comes after it. When the next layer's begins, these results have been
//! fetched.

use super::gpu::GpuExperts;
use super::ids::ExpertId;
use super::layer::{ExpertBacking, LayerExperts};
use super::step::Step;
use super::store::ExpertStore;
use super::view::ExpertView;
use crate::tiers::transit::{HostMemory, Keep};
use std::sync::Arc;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::{ExpertKind, Place, RequestedExperts};
use tier_plan_cuda::stream::ExpertStream;
use tier_plan_cuda::transfers::TransferId;
use tier_plan_formats::placement::{StreamTimes, TierIdx};
use tier_plan_kernels::RowOrder;

/// Which experts a plan has streamed for tokens.
#[derive(Debug, Clone)]
pub(crate) struct StreamPlan {
    /// The GPU's tier.
    pub(crate) tier: TierIdx,
    /// Tier of main memory.
    pub(crate) from: TierIdx,
    /// What each layer's experts take; `None` where no GPU can compute them.
    pub(crate) layers: Vec<Option<StreamTimes>>,
}

/// How experts are streamed.
#[derive(Default)]
pub(super) struct TokenStream {
    plan: Option<StreamPlan>,
    /// The last transfer, whose end nothing has waited for yet.
    last: Option<TransferId>,
    n_streamed: u64,
}

impl ExpertStore {
    /// Has experts streamed as a plan says, whose GPU is one of those that are
    /// [set](Self::set_gpus) next.
    pub(crate) fn stream_tokens(&mut self, plan: StreamPlan) {
        self.token_stream.plan = Some(plan);
    }

    /// Returns how many experts were streamed for tokens so far.
    pub(crate) fn n_streamed_for_tokens(&self) -> u64 {
        self.token_stream.n_streamed
    }

    /// Returns the memory of all experts that may be streamed to the GPU of a tier.
    pub(super) fn streamed_memory(&self, tier: TierIdx) -> Vec<HostMemory> {
        let plan = self.token_stream.plan.as_ref();
        let Some(plan) = plan.filter(|plan| plan.tier == tier) else {
            return Vec::new();
        };
        let layers = self.layers.iter().zip(&plan.layers);
        layers
            .filter(|(_, times)| times.is_some())
            .flat_map(|(layer, _)| self.memory_on(layer, plan.from))
            .collect()
    }

    /// Returns where a layer's experts are in the memory of a tier.
    fn memory_on(&self, layer: &LayerExperts, from: TierIdx) -> Vec<HostMemory> {
        let mut memory = Vec::new();
        let slots = layer.slots.iter().flatten();
        if layer.slot_tier == from {
            memory.extend(slots.map(|slot| slot.memory()));
        }
        let keep: Keep = Arc::clone(&self.gguf) as _;
        for (expert, backing) in layer.backings.iter().enumerate() {
            match backing {
                ExpertBacking::Pinned { tier, bytes, .. } if *tier == from => {
                    memory.push(bytes.memory());
                }
                // Without staging, pooled experts compute where they are mapped.
                ExpertBacking::Mapped | ExpertBacking::Pooled
                    if self.mapped_tier == from && self.n_staging == 0 =>
                {
                    memory.extend(layer.parts.iter().map(|part| {
                        let tensor = &self.gguf.tensors()[part.tensor];
                        let bytes = self.gguf.slice(tensor, expert, part.n_slices);
                        let first = self.gguf.slice(tensor, 0, 1).as_ptr() as usize;
                        let start = bytes.as_ptr() as usize;
                        HostMemory {
                            range: start..start + bytes.len(),
                            mapping: first - tensor.offset as usize,
                            keep: Arc::clone(&keep),
                        }
                    }));
                }
                _ => {}
            }
        }
        memory
    }

    /// Returns which of a token's experts that are `ready` on the CPU are streamed to a GPU instead,
    /// by position. None is while the step reads others from the slow tier, which takes longer, and
    /// whose buffers must come back.
    pub(crate) fn choose_streamed(&self, step: &Step, ready: &[usize]) -> Vec<usize> {
        let Some(plan) = self.token_stream.plan.as_ref() else {
            return Vec::new();
        };
        let (Some(times), Some(gpu)) = (plan.layers[step.layer()], self.gpu_of(plan.tier)) else {
            return Vec::new();
        };
        if step.read_bytes > 0 {
            return Vec::new();
        }
        let from_there = |at: &&usize| self.view(step, **at).1 == plan.from;
        let in_memory: Vec<usize> = ready.iter().filter(from_there).copied().collect();
        let n = step.experts().len();
        let slots = (0..n).filter_map(|at| self.gpu_slot(step, at));
        let on_gpu = slots.filter(|slot| slot.tier == plan.tier).count();
        let can_be_sent = |at: &&usize| self.can_stream(step, **at, &self.gpus[gpu]);
        let sendable: Vec<usize> = in_memory.iter().filter(can_be_sent).copied().collect();
        let count = |n: usize| n as u32;
        let division = times.divide(count(in_memory.len()), count(sendable.len()), count(on_gpu));
        sendable[..division.streamed as usize].to_vec()
    }

    /// Whether a GPU can read the expert at this position of the step where it lies.
    fn can_stream(&self, step: &Step, at: usize, gpu: &GpuExperts) -> bool {
        is_locked(&self.view(step, at).0, gpu)
    }

    /// Returns whether the GPU of a tier can read all experts of these layers that are in main memory where
    /// they lie.
    pub(crate) fn has_locked_all(&self, layers: &[usize], tier: TierIdx) -> bool {
        let Some(gpu) = self.gpu_of(tier).map(|gpu| &self.gpus[gpu]) else {
            return false;
        };
        layers.iter().all(|&layer| {
            let n_expert = self.layers[layer].n_expert() as u32;
            let mut views =
                (0..n_expert).filter_map(|e| self.view_in_place(layer, ExpertId::new(e)));
            views.all(|view| is_locked(&view, gpu))
        })
    }

    /// Returns the matrices of an expert that computes in main memory from its backing copy.
    pub(super) fn view_in_place(&self, layer: usize, expert: ExpertId) -> Option<ExpertView<'_>> {
        let in_layer = &self.layers[layer];
        match in_layer.backing(expert) {
            ExpertBacking::Pinned { bytes, layout, .. } => {
                Some(self.view_in(layer, expert, bytes, *layout))
            }
            ExpertBacking::Mapped => Some(self.mapped_view(in_layer, expert)),
            ExpertBacking::Gpu(_) | ExpertBacking::Pooled => None,
        }
    }

    /// Has a prompt's stream to the GPU of a tier take the expert at this position of the step from where
    /// it lies, for `n` uses. Returns whether the GPU can read it there.
    ///
    /// # Errors
    /// When the GPU fails.
    pub(crate) fn send_locked(
        &self,
        step: &Step,
        at: usize,
        tier: TierIdx,
        stream: &mut ExpertStream,
        (kind, n): (&ExpertKind, usize),
    ) -> Result<bool, CudaError> {
        let (view, _) = self.view(step, at);
        let gpu = self.gpu_of(tier).map(|gpu| &self.gpus[gpu]);
        let Some(gpu) = gpu.filter(|gpu| is_locked(&view, gpu)) else {
            return Ok(false);
        };
        let biases = view.biases();
        let bytes = view.bytes(biases.as_ref());
        gpu.filler.send_locked(stream, kind, &bytes, n)?;
        Ok(true)
    }

    /// Streams the [chosen](Self::choose_streamed) experts of a token's step, and requests them
    /// without waiting. `x` is the token's row, and `weights` are those of all of its experts.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn stream_to_gpu(
        &mut self,
        step: &mut Step,
        positions: &[usize],
        x: &[f32],
        weights: &[f32],
    ) -> Result<(), CudaError> {
        let tier = self.token_stream.plan.as_ref().map(|plan| plan.tier);
        let gpu = tier.and_then(|tier| self.gpu_of(tier));
        let Some(gpu) = gpu.filter(|_| !positions.is_empty()) else {
            return Ok(());
        };
        // Taken out of the store, whose other parts the views borrow.
        let mut gpus = std::mem::take(&mut self.gpus);
        let filler = &mut gpus[gpu].filler;
        let views: Vec<_> = positions.iter().map(|at| self.view(step, *at).0).collect();
        let biases: Vec<_> = views.iter().map(ExpertView::biases).collect();
        let experts = views.iter().zip(&biases);
        let experts: Vec<_> = experts
            .map(|(v, biases)| v.bytes(biases.as_ref()))
            .collect();
        // Pins and mapped experts are never written, and slots are by reads of a later step. That begins
        // once the results have been fetched, or else waits for the transfer.
        let sent = filler.stream(step.layer, &experts);
        self.gpus = gpus;
        match sent {
            Ok(transfer) => self.token_stream.last = Some(transfer),
            Err(error) => {
                self.give_up(step);
                return Err(error);
            }
        }
        self.token_stream.n_streamed += positions.len() as u64;
        step.streamed += positions.len() as u64;
        let places: Vec<Place> = (0..positions.len()).map(Place::Shared).collect();
        let weights: Vec<f32> = positions.iter().map(|at| weights[*at]).collect();
        let experts = RequestedExperts {
            places: &places,
            weights: &weights,
        };
        self.request_for_token(step, gpu, x, experts, positions)
    }

    /// Returns the tier of the GPU that experts are streamed to.
    pub(crate) fn streams_to(&self) -> Option<TierIdx> {
        self.token_stream.plan.as_ref().map(|plan| plan.tier)
    }

    /// Says that results were fetched, which come after all transfers.
    pub(super) fn streams_have_ended(&mut self, gpu: usize) {
        let to = self.streams_to();
        if self.gpus.get(gpu).is_some_and(|g| Some(g.tier) == to) {
            self.token_stream.last = None;
        }
    }

    /// Waits for the transfer of a step that was given up, and for what was to be computed with it.
    pub(super) fn end_streams(&mut self) {
        let Some(last) = self.token_stream.last.take() else {
            return;
        };
        if let Some(gpu) = self.streams_to().and_then(|tier| self.gpu_of(tier)) {
            let experts = self.gpus[gpu].filler.experts();
            // A GPU that fails reads no more.
            let _ = experts.wait_filled(last).and_then(|()| experts.wait());
        }
    }

    /// Returns whether any expert can be streamed, where the plan says so.
    pub(crate) fn can_stream_any(&self) -> bool {
        let gpu = self.streams_to().and_then(|tier| self.gpu_of(tier));
        gpu.is_some_and(|gpu| self.gpus[gpu].filler.streams())
    }
}

/// Whether a GPU can read an expert where it lies.
fn is_locked(view: &ExpertView<'_>, gpu: &GpuExperts) -> bool {
    let gate = view.is_gated.then_some(view.gate);
    gate.into_iter().chain([view.up, view.down]).all(|linear| {
        let bytes = linear.weights.bytes().as_ptr_range();
        let range = bytes.start as usize..bytes.end as usize;
        linear.weights.order() == RowOrder::Sequential && gpu.filler.has_locked(&range)
    })
}
