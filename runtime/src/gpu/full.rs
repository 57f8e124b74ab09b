//! Decoded tokens of a model that is fully on one GPU, one each of some texts: everything is launched
//! without waiting, and the routers' choices are copied to the host at the end.
//!
//! The launches are recorded once per chunk of the context, and replayed for the tokens in it. With
//! several texts they are recorded anew where any of them has come to a chunk. What differs between
//! tokens, their ids, positions, and pages, is in the device's memory.

use super::Gpu;
use super::buffers::logit_rows;
use super::ffn::{FfnBlock, LayerFfn};
use super::inputs::InputProjection;
use super::latent::Onto;
use super::router::{ChoiceViews, Router};
use super::rows::GPU_ROWS;
use super::stages::{Head, Layer, LayerMixer};
use super::workspace::{Output, Purpose, Residual, Workspace};
use crate::gpu::matrix::Matrix;
use crate::layers::mixer::Segment;
use crate::layers::pages::StateIdx;
use crate::layers::places::{Place, Places};
use crate::layers::rope::RopeTable;
use tier_plan_cuda::experts::{ChosenExperts, PinnedExperts};
use tier_plan_cuda::ops::{CHUNK, Recorded};
use tier_plan_cuda::{CudaError, View};
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{Placement, PlanTier, TierIdx};

/// Most texts whose tokens go through a GPU together without coming back. Each token reads its own
/// experts, where other steps read once what several have chosen. How many texts that is worth is not
/// measured: no GPU was available.
pub(super) const MAX_TEXTS: usize = 16;

/// Recorded launches of a step.
#[derive(Default)]
pub(super) struct Replay {
    /// Whether the device can't record.
    unsupported: bool,
    /// The texts of the last step that was launched without a recording. If they come again, the step
    /// is recorded; its kernels have all been launched then, which recording requires.
    launched: Vec<TextKey>,
    recorded: Option<RecordedStep>,
}

/// What launches for a text depend on: the chunk of the context, and the recurrent state where launches are
/// told it.
type TextKey = (usize, Option<StateIdx>);

/// Launches that serve for every position in the same chunks of the context.
struct RecordedStep {
    texts: Vec<TextKey>,
    launches: Recorded,
}

/// Decoded tokens, one each of some texts, and memory for their results.
pub(crate) struct Tokens<'a> {
    /// `[n]`.
    pub(crate) ids: &'a [u32],
    /// Hidden states before the first layer, `[n, streams * hidden]`, if the embedding is elsewhere.
    pub(crate) states: Option<&'a [f32]>,
    /// The tokens' places in their texts. No checkpoint follows any of them.
    pub(crate) segments: &'a [Segment<'a>],
    /// Experts that the routers chose, `[n, layers, n_used]`.
    pub(crate) experts: &'a mut [u16],
    /// `[n, layers, n_used]`.
    pub(crate) weights: &'a mut [f32],
    /// `[n, n_vocab]`.
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
    // Where the CPU attends to a KV cache, tokens come back in between.
    let real = real && plan.host_kv.is_empty();
    (all_parts && all_experts && real && plan.tiers.get(tier).is_some_and(PlanTier::uses_gpu))
        .then_some(tier)
}

/// Returns the tier whose GPU holds a whole model, except perhaps the embedding. Decoded tokens stay
/// on that GPU from their ids to their logits.
pub fn fully_on_gpu(plan: &Placement, shape: &ModelShape) -> Option<TierIdx> {
    full_gpu_tier(plan, shape, &Places::new(plan, shape.n_layer as usize))
}

/// A model that is fully on one GPU.
pub(crate) struct FullModel<'a> {
    layers: Vec<FullLayer<'a>>,
    head: &'a Head,
    embedding: Option<&'a Matrix>,
    inputs: Option<&'a InputProjection>,
    work: &'a mut Workspace,
    replay: &'a mut Replay,
}

/// A layer all of whose parts are on the GPU.
struct FullLayer<'a> {
    mixer: Option<&'a LayerMixer>,
    ffn: Option<FullFfn<'a>>,
}

/// The feed-forward parts of a layer.
#[derive(Clone, Copy)]
struct FullFfn<'a> {
    ffn: &'a LayerFfn,
    block: FullBlock<'a>,
}

#[derive(Clone, Copy)]
enum FullBlock<'a> {
    Dense(&'a FfnBlock),
    Moe {
        router: &'a Router,
        shared: Option<&'a FfnBlock>,
    },
}

impl Gpu {
    /// Returns the most tokens that go through a whole model together.
    pub(crate) fn most_tokens(&self) -> usize {
        let ffns = self.layers.iter().filter_map(|layer| layer.ffn.as_ref());
        let routers = ffns.filter_map(|ffn| ffn.router.as_ref());
        let most_used = routers.map(|router| router.spec.n_used).max();
        let rows = GPU_ROWS / most_used.unwrap_or(1).max(1);
        let n_vocab = self.head.as_ref().map_or(0, |head| head.matrix.n_out);
        most_texts(rows.min(logit_rows(n_vocab, self.work.rows)))
    }

    /// Returns the whole model.
    ///
    /// # Errors
    /// When a part other than the embedding is elsewhere.
    pub(crate) fn full_model(&mut self) -> Result<FullModel<'_>, CudaError> {
        let is_whole = self.layers.iter().all(|layer| layer.is_whole);
        match self.head.as_ref().filter(|_| is_whole) {
            Some(head) => Ok(FullModel {
                layers: self.layers.iter().map(FullLayer::of).collect(),
                head,
                embedding: self.embedding.as_ref(),
                inputs: self.inputs.as_ref(),
                work: &mut self.work,
                replay: &mut self.replay,
            }),
            None => Err(self.work.missing("the whole model")),
        }
    }
}

impl<'a> FullLayer<'a> {
    fn of(layer: &'a Layer) -> Self {
        let ffn = layer.ffn.as_ref().and_then(|ffn| {
            let block = match (&ffn.router, &ffn.block) {
                (Some(router), shared) => FullBlock::Moe {
                    router,
                    shared: shared.as_ref(),
                },
                (None, block) => FullBlock::Dense(block.as_ref()?),
            };
            Some(FullFfn { ffn, block })
        });
        Self {
            mixer: layer.mixer.as_ref(),
            ffn,
        }
    }

    /// Whether tokens alone choose the layer's experts.
    fn chooses_by_token(&self) -> bool {
        let block = self.ffn.map(|ffn| ffn.block);
        matches!(block, Some(FullBlock::Moe { router, .. }) if router.chooses_by_token())
    }

    fn launches_by_state(&self) -> bool {
        self.mixer.is_some_and(|m| m.mixer.launches_by_state())
    }
}

impl FullModel<'_> {
    /// Computes tokens. `experts` are those of the model's layers, if it has any.
    pub(crate) fn tokens(
        mut self,
        mut experts: Option<&mut PinnedExperts>,
        tokens: Tokens<'_>,
        ropes: &mut [RopeTable],
    ) -> Result<(), CudaError> {
        let (segments, n) = (tokens.segments, tokens.ids.len());
        self.work.prepare(segments, ropes)?;
        if let Some(values) = tokens.states {
            self.embedding = None;
            self.work.state(0..n).write_f32(values)?;
        }
        if tokens.states.is_none() || self.layers.iter().any(FullLayer::chooses_by_token) {
            self.work.put_ids(tokens.ids)?;
        }
        // With more runs than texts, pages of texts would begin elsewhere on the device.
        let mut one_run = segments.iter();
        assert!(
            one_run.all(|s| s.rows.len() == 1 && s.checkpoints.is_empty()),
            "one token of each text, and no checkpoint"
        );
        let by_state = self.layers.iter().any(FullLayer::launches_by_state);
        let key = |s: &Segment<'_>| (s.past / CHUNK, by_state.then_some(s.state));
        let texts: Vec<TextKey> = segments.iter().map(key).collect();
        match &self.replay.recorded {
            Some(recorded) if recorded.texts == texts => recorded.launches.replay()?,
            _ if self.replay.launched != texts || self.replay.unsupported => {
                self.launch(experts, segments)?;
                self.replay.launched = texts;
            }
            _ => {
                self.replay.recorded = None;
                let ops = self.work.ops.clone();
                match ops.record(|| self.launch(experts.as_deref_mut(), segments))? {
                    Some(launches) => {
                        launches.replay()?;
                        self.replay.recorded = Some(RecordedStep { texts, launches });
                    }
                    None => {
                        self.replay.unsupported = true;
                        self.launch(experts, segments)?;
                    }
                }
            }
        }
        self.work.buffers.logits.view().read_f32(tokens.logits)?;
        self.read_choices(n, tokens.experts, tokens.weights)
    }

    /// Copies the routers' choices for `n` tokens to the host: by layer, the experts of all tokens and
    /// then their weights.
    fn read_choices(
        &mut self,
        n: usize,
        experts: &mut [u16],
        weights: &mut [f32],
    ) -> Result<(), CudaError> {
        let mut choices = std::mem::take(&mut self.work.answer);
        choices.resize(2 * experts.len(), 0.0);
        let read = self.work.buffers.record.view().read_f32(&mut choices);
        let (per_token, mut first) = (experts.len() / n, 0);
        let decoded = read.and_then(|()| {
            for (index, layer) in self.layers.iter().enumerate() {
                let Some(FullBlock::Moe { router, .. }) = layer.ffn.map(|ffn| ffn.block) else {
                    continue;
                };
                let (used, n_expert) = (router.spec.n_used, router.spec.n_expert);
                let of_layer = &choices[2 * n * first..2 * n * (first + used)];
                let (indices, chosen_weights) = of_layer.split_at(n * used);
                for token in 0..n {
                    let (from, to) = (token * used, token * per_token + first);
                    self.work.decode_experts(
                        index,
                        n_expert,
                        &indices[from..from + used],
                        &mut experts[to..to + used],
                    )?;
                    weights[to..to + used].copy_from_slice(&chosen_weights[from..from + used]);
                }
                first += used;
            }
            Ok(())
        });
        self.work.answer = choices;
        decoded
    }

    /// Computes tokens from their ids, or their first hidden states, to their logits: launches only.
    fn launch(
        &mut self,
        mut experts: Option<&mut PinnedExperts>,
        segments: &[Segment<'_>],
    ) -> Result<(), CudaError> {
        let (work, n) = (&mut *self.work, segments.len());
        if let Some(table) = self.embedding {
            work.embed(table, 0..n)?;
        }
        if let Some(inputs) = self.inputs {
            inputs.fill(work, 0..n)?;
        }
        let (mut first, mut index) = (0, 0);
        // What a part computes is added to the state by the norm of the next part.
        let mut residual = Residual::None;
        for FullLayer { mixer, ffn } in &self.layers {
            if let Some(mixer) = mixer {
                mixer.run(work, 0..n, segments, residual)?;
                residual = Residual::Pending;
            }
            let Some(FullFfn { ffn, block }) = ffn else {
                continue;
            };
            match block {
                FullBlock::Dense(block) => {
                    ffn.norm(work, 0..n, residual, Output::F32)?;
                    block.run(work, n)?;
                    ffn.finish(work, n)?;
                    residual = ffn.end_layer(work, 0..n, Residual::Pending)?;
                }
                FullBlock::Moe { router, shared } => {
                    let moe = FullMoe {
                        ffn,
                        router,
                        shared: *shared,
                        index,
                        first,
                    };
                    residual = moe.run(work, n, residual, experts.as_deref_mut())?;
                    first += 2 * n * router.spec.n_used;
                    index += 1;
                }
            }
        }
        self.head.run(work, 0..n, residual)
    }
}

/// The router and all experts of a layer.
struct FullMoe<'a> {
    ffn: &'a LayerFfn,
    router: &'a Router,
    shared: Option<&'a FfnBlock>,
    /// Index among the layers with routed experts.
    index: usize,
    /// First word of the choices in `buffers.record`.
    first: usize,
}

impl FullMoe<'_> {
    /// Computes `n` rows: launches only. Returns what the next norm adds to the state.
    fn run(
        &self,
        work: &mut Workspace,
        n: usize,
        residual: Residual,
        experts: Option<&mut PinnedExperts>,
    ) -> Result<Residual, CudaError> {
        let Self { ffn, router, .. } = *self;
        let experts_take = experts
            .as_deref()
            .is_some_and(|experts| experts.takes_quants(self.index));
        let latent = router.latent.as_ref();
        let output = Output::quantized_if(experts_take && latent.is_none());
        let form = (output, Purpose::Block);
        ffn.norm_for_router(work, router, 0..n, residual, form)?;
        router.choose(work, n, self.choices(work, n))?;
        let rows = router.latent_values(work, n);
        if let Some(latent) = latent {
            latent.enter(work, n, rows.clone())?;
        }
        if let Some(shared) = self.shared {
            if !ffn.shares_rows() {
                ffn.norm(work, 0..n, Residual::None, Output::F32)?;
            }
            shared.run(work, n)?;
        }
        ffn.norm_for_experts(work, 0..n, output)?;
        let left = match (experts, latent) {
            (None, _) => self.shared_result(),
            (Some(experts), None) => self.add_experts(work, n, experts)?,
            (Some(experts), Some(latent)) => {
                if experts_take {
                    let (x, quants) = (work.buffers.answer.view(), &mut work.buffers.quants);
                    let x = x.floats(rows.clone());
                    work.ops.quantize(x, n, latent.width(), quants)?;
                }
                // What they read is read before their sums take its place.
                let at = work.buffers.answer.view().floats(rows.clone());
                experts.sum_chosen(self.index, &self.chosen(work, n, at), None, at)?;
                let onto = match self.shared {
                    Some(_) => Onto::Shared,
                    None => Onto::Nothing,
                };
                latent.leave(work, rows, onto)?;
                ffn.finish(work, n)?;
                Residual::Pending
            }
        };
        ffn.end_layer(work, 0..n, left)
    }

    /// Returns whether the shared expert has left a result that is still to be added to the state.
    fn shared_result(&self) -> Residual {
        match self.shared {
            Some(_) => Residual::Pending,
            None => Residual::None,
        }
    }

    /// Computes the chosen experts of `n` rows. Adds their sum to the state or, where something is
    /// done to the sum of all experts, to the shared one's result. Returns what is left to add.
    fn add_experts(
        &self,
        work: &Workspace,
        n: usize,
        experts: &mut PinnedExperts,
    ) -> Result<Residual, CudaError> {
        let (buffers, ffn) = (&work.buffers, self.ffn);
        let chosen = self.chosen(work, n, buffers.answer.view());
        if !ffn.sums_apart() {
            let state = work.state(0..n);
            experts.sum_chosen(self.index, &chosen, Some(state), state)?;
            return Ok(self.shared_result());
        }
        let (out, values) = (buffers.out.view(), n * work.hidden);
        let has_shared = self.shared.is_some();
        match ffn.sum_norm() {
            None => experts.sum_chosen(self.index, &chosen, has_shared.then_some(out), out)?,
            Some(norm) => {
                let sums = if has_shared { buffers.sums.view() } else { out };
                experts.sum_chosen(self.index, &chosen, None, sums)?;
                let norm = Some(norm.view());
                work.ops
                    .rms_norm(sums, norm, n, work.hidden, work.eps, sums)?;
                if has_shared {
                    work.ops.add(out, sums, values)?;
                }
            }
        }
        ffn.finish(work, n)?;
        Ok(Residual::Pending)
    }

    /// Returns where the router's choices for `n` rows are.
    fn choices<'w>(&self, work: &'w Workspace, n: usize) -> ChoiceViews<'w> {
        let n_choices = n * self.router.spec.n_used;
        let record = work.buffers.record.view();
        ChoiceViews::of(
            record.floats(self.first..self.first + 2 * n_choices),
            n_choices,
        )
    }

    /// Returns the experts that `n` rows chose, which read `input`.
    fn chosen<'w>(&self, work: &'w Workspace, n: usize, input: View<'w>) -> ChosenExperts<'w> {
        let choices = self.choices(work, n);
        ChosenExperts {
            input,
            quants: &work.buffers.quants,
            which: choices.experts,
            weights: choices.weights,
            tokens: n,
            n_used: self.router.spec.n_used,
        }
    }
}

/// Returns the most texts whose tokens go through together where there is room for `rows`.
pub(super) fn most_texts(rows: usize) -> usize {
    rows.min(MAX_TEXTS)
}
