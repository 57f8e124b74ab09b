//! A decoded token of a model that is fully on one GPU: everything is launched without waiting, and
//! the routers' choices are copied to the host at the end.
//!
//! The launches are recorded once per chunk of the context, and replayed for every token in it.
//! What differs between tokens, their id and their position, is in the device's memory.

use super::Gpu;
use super::stages::{ChoiceViews, FfnBlock, Head, LayerFfn, LayerMixer, Router};
use super::workspace::{Output, Residual, Workspace};
use crate::gpu::matrix::Matrix;
use crate::layers::mixer::Segment;
use crate::layers::pages::StateIdx;
use crate::layers::places::{Place, Places};
use crate::layers::rope::RopeTable;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::{ChosenExperts, PinnedExperts};
use tier_plan_cuda::ops::{CHUNK, Recorded};
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{Placement, PlanTier, TierIdx};

/// Recorded launches of a token.
#[derive(Default)]
pub(super) struct Replay {
    /// Whether all kernels have been launched once, which recording requires.
    warm: bool,
    /// Whether the device can't record.
    unsupported: bool,
    recorded: Option<RecordedChunk>,
}

/// Launches that serve for every position of a chunk of the context, of all texts with a recurrent
/// state.
struct RecordedChunk {
    chunk: usize,
    state: StateIdx,
    launches: Recorded,
}

/// A decoded token, and memory for its results.
pub(crate) struct Token<'a> {
    pub(crate) token: u32,
    /// Hidden state before the first layer, `[hidden]`, if the embedding is elsewhere.
    pub(crate) state: Option<&'a [f32]>,
    /// Its place in its text. No checkpoint follows.
    pub(crate) segment: Segment<'a>,
    /// Experts that the routers chose, `[layers, n_used]`.
    pub(crate) experts: &'a mut [u16],
    /// `[layers, n_used]`.
    pub(crate) weights: &'a mut [f32],
    /// `[n_vocab]`.
    pub(crate) logits: &'a mut [f32],
}

/// Returns the tier whose GPU holds every part of a model except perhaps the embedding, and every
/// expert pinned.
pub(crate) fn full_gpu_tier(
    plan: &Placement,
    shape: &ModelShape,
    places: &Places,
) -> Option<TierIdx> {
    let tier = places.head?;
    let here = |place: Place| place == Some(tier);
    let has_shared = |layer: usize| {
        use tier_plan_formats::model::shape::DenseKind::SharedExpert;
        shape
            .dense
            .iter()
            .any(|d| d.kind == SharedExpert && d.layer == u32::try_from(layer).ok())
    };
    let mut parts = places.layers.iter().enumerate();
    let all_parts =
        parts.all(|(i, l)| here(l.mixer) && here(l.ffn) && (here(l.shared) || !has_shared(i)));
    let all_experts =
        plan.layers
            .iter()
            .zip(&shape.experts)
            .all(|(placed, experts)| {
                placed.pinned.iter().any(|pins| {
                    pins.tier == tier && pins.experts.len() == experts.n_expert as usize
                })
            });
    // Emulated tiers are paced layer by layer.
    let real = plan.tiers.iter().all(|t| !t.tier.emulated);
    (all_parts && all_experts && real && plan.tiers.get(tier).is_some_and(PlanTier::uses_gpu))
        .then_some(tier)
}

/// Returns the tier whose GPU holds a whole model, except perhaps the embedding. A decoded token
/// stays on that GPU from its id to its logits.
pub fn fully_on_gpu(plan: &Placement, shape: &ModelShape) -> Option<TierIdx> {
    full_gpu_tier(plan, shape, &Places::new(plan, shape.n_layer as usize))
}

/// A model that is fully on one GPU.
pub(crate) struct FullModel<'a> {
    layers: Vec<FullLayer<'a>>,
    head: &'a Head,
    embedding: Option<&'a Matrix>,
    work: &'a mut Workspace,
    replay: &'a mut Replay,
}

/// A layer all of whose parts are on the GPU.
struct FullLayer<'a> {
    mixer: &'a LayerMixer,
    ffn: &'a LayerFfn,
    block: FullBlock<'a>,
}

enum FullBlock<'a> {
    Dense(&'a FfnBlock),
    Moe {
        router: &'a Router,
        shared: Option<&'a FfnBlock>,
    },
}

impl Gpu {
    /// Returns the whole model.
    ///
    /// # Errors
    /// When a part other than the embedding is elsewhere.
    pub(crate) fn full_model(&mut self) -> Result<FullModel<'_>, CudaError> {
        let layers = self.layers.iter().map(|layer| {
            let (mixer, ffn) = (layer.mixer.as_ref()?, layer.ffn.as_ref()?);
            let block = match (&ffn.router, &ffn.block) {
                (Some(router), shared) => FullBlock::Moe {
                    router,
                    shared: shared.as_ref(),
                },
                (None, block) => FullBlock::Dense(block.as_ref()?),
            };
            Some(FullLayer { mixer, ffn, block })
        });
        match (layers.collect::<Option<_>>(), &self.head) {
            (Some(layers), Some(head)) => Ok(FullModel {
                layers,
                head,
                embedding: self.embedding.as_ref(),
                work: &mut self.work,
                replay: &mut self.replay,
            }),
            _ => Err(self.work.missing("the whole model")),
        }
    }
}

impl FullModel<'_> {
    /// Computes a token. `experts` are those of the model's layers, if it has any.
    pub(crate) fn token(
        mut self,
        mut experts: Option<&mut PinnedExperts>,
        token: Token<'_>,
        ropes: &mut [RopeTable],
    ) -> Result<(), CudaError> {
        let segments = std::slice::from_ref(&token.segment);
        let Segment { past, state, .. } = token.segment;
        self.work.prepare(segments, ropes)?;
        match token.state {
            Some(values) => {
                self.embedding = None;
                self.work.state(0..1).write_f32(values)?;
            }
            None => self
                .work
                .buffers
                .ids
                .view()
                .write(&token.token.to_ne_bytes())?,
        }
        let chunk = past / CHUNK;
        match &self.replay.recorded {
            Some(recorded) if recorded.chunk == chunk && recorded.state == state => {
                recorded.launches.replay()?;
            }
            _ if !self.replay.warm || self.replay.unsupported => {
                self.launch(experts.as_deref_mut(), segments)?;
                self.replay.warm = true;
            }
            _ => {
                self.replay.recorded = None;
                let ops = self.work.ops.clone();
                match ops.record(|| self.launch(experts.as_deref_mut(), segments))? {
                    Some(launches) => {
                        launches.replay()?;
                        self.replay.recorded = Some(RecordedChunk {
                            chunk,
                            state,
                            launches,
                        });
                    }
                    None => {
                        self.replay.unsupported = true;
                        self.launch(experts, segments)?;
                    }
                }
            }
        }
        self.work.buffers.logits.view().read_f32(token.logits)?;
        self.read_choices(token.experts, token.weights)
    }

    /// Copies the routers' choices to the host: by layer, `n_used` experts and then their weights.
    fn read_choices(&mut self, experts: &mut [u16], weights: &mut [f32]) -> Result<(), CudaError> {
        let mut choices = std::mem::take(&mut self.work.answer);
        choices.resize(2 * experts.len(), 0.0);
        let read = self.work.buffers.record.view().read_f32(&mut choices);
        let mut first = 0;
        let decoded = read.and_then(|()| {
            for (index, layer) in self.layers.iter().enumerate() {
                let FullBlock::Moe { router, .. } = &layer.block else {
                    continue;
                };
                let (n, n_expert) = (router.spec.n_used, router.spec.n_expert);
                let (indices, chosen_weights) = choices[2 * first..2 * (first + n)].split_at(n);
                self.work.decode_experts(
                    index,
                    n_expert,
                    indices,
                    &mut experts[first..first + n],
                )?;
                weights[first..first + n].copy_from_slice(chosen_weights);
                first += n;
            }
            Ok(())
        });
        self.work.answer = choices;
        decoded
    }

    /// Computes a token from its id, or its first hidden state, to its logits: launches only.
    fn launch(
        &mut self,
        mut experts: Option<&mut PinnedExperts>,
        segments: &[Segment<'_>],
    ) -> Result<(), CudaError> {
        let work = &mut *self.work;
        if let Some(table) = self.embedding {
            let (ids, x) = (work.buffers.ids.view(), work.state(0..1));
            work.ops
                .dequantize_chosen(table.ty, table.view(), work.hidden, ids, 1, x)?;
        }
        let (mut first, mut moe_index) = (0, 0);
        // What a part computes is added to the state by the norm of the next part.
        let mut residual = Residual::None;
        for FullLayer { mixer, ffn, block } in &self.layers {
            mixer.run(work, 0..1, segments, residual)?;
            let (router, shared) = match block {
                FullBlock::Dense(block) => {
                    ffn.norm(work, 0..1, Residual::Pending, Output::F32)?;
                    block.run(work, 1)?;
                    residual = Residual::Pending;
                    continue;
                }
                FullBlock::Moe { router, shared } => (router, shared),
            };
            let takes_quants = experts
                .as_deref()
                .is_some_and(|experts| experts.takes_quants(moe_index));
            ffn.norm(
                work,
                0..1,
                Residual::Pending,
                Output::quantized_if(takes_quants),
            )?;
            let n = router.spec.n_used;
            let record = work.buffers.record.view().floats(first..first + 2 * n);
            router.choose(work, 1, ChoiceViews::of(record, n))?;
            residual = match shared {
                Some(shared) => {
                    shared.run(work, 1)?;
                    Residual::Pending
                }
                None => Residual::None,
            };
            if let Some(experts) = experts.as_deref_mut() {
                let record = work.buffers.record.view().floats(first..first + 2 * n);
                let ChoiceViews {
                    experts: which,
                    weights,
                } = ChoiceViews::of(record, n);
                let (input, quants) = (work.buffers.answer.view(), &work.buffers.quants);
                experts.add_chosen(
                    moe_index,
                    &ChosenExperts {
                        input,
                        quants,
                        which,
                        weights,
                        n,
                    },
                    work.state(0..1),
                )?;
            }
            first += 2 * n;
            moe_index += 1;
        }
        self.head.run(work, 0..1, residual)
    }
}
