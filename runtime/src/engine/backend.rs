//! The stages of a pass apart from routed experts, on the CPU or on GPUs.
//!
//! A part of a layer runs where its weights are. The hidden state of a batch is in one place at a
//! time, and moves to where the next part is. [`LayerBackend`] has one method per stage;
//! [`Backends`] calls them in a layer's order.

use super::batch::Batch;
use super::cpu::Cpu;
use super::sequences::Cache;
use crate::error::RunError;
use crate::gpu::Gpus;
use crate::layers::cpu_context::CpuContext;
use crate::layers::index::Layer;
use crate::layers::places::Place;
use std::ops::Range;
use tier_plan_formats::model::spec::{Ffn, GqaSpec, LayerSpec, Mixer, ModelSpec};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::threads::ThreadPool;
use tier_plan_kernels::{Activations, Kernels};

/// Computes the stages of a pass whose weights it has. Each adds to rows of the hidden state that
/// it holds.
pub(crate) trait LayerBackend {
    /// Sets the hidden state of a batch to its tokens' embeddings.
    fn embed(&mut self, stage: &mut Stage<'_>, tokens: &[u32]) -> Result<(), RunError>;

    /// Adds a layer's attention or delta net, and stores the tokens in the layer's state.
    fn mixer(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError>;

    /// Adds the dense block of a layer without routed experts.
    fn dense_ffn(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError>;

    /// Lets a layer's router choose experts, and leaves the choices and the normed rows in the
    /// stage's buffers.
    fn route(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError>;

    /// Adds a layer's shared expert, after [`route`](Self::route); `routed_here` says whether that
    /// ran on this backend.
    fn shared_expert(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        routed_here: bool,
    ) -> Result<(), RunError>;

    /// Adds the sums of a layer's routed experts, `stage.buffers.out`.
    fn add_experts(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError>;

    /// Takes the sums of latent experts, `stage.buffers.latent`, to the hidden state's width, in
    /// `stage.buffers.out`. The layer's router is here.
    fn leave_latent(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError>;

    /// Adds the sums of latent experts of a layer whose router is here.
    fn add_latent(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        self.leave_latent(stage, layer)?;
        self.add_experts(stage, layer)
    }

    /// Writes the logits of the batch's rows that want them, `[wanted rows, n_vocab]`.
    fn head(&mut self, stage: &mut Stage<'_>, logits: &mut [f32]) -> Result<(), RunError>;

    /// Writes the experts that a layer's router would choose for rows as they are now, `[rows,
    /// n_used]`.
    fn predict(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        experts: &mut Vec<u16>,
    ) -> Result<(), RunError>;
}

/// What a stage of a pass works on.
pub(crate) struct Stage<'a> {
    pub(crate) cpu: CpuContext<'a>,
    pub(crate) spec: &'a ModelSpec,
    /// Rows of the batch, at most a micro-batch except in [`embed`](LayerBackend::embed),
    /// [`head`](LayerBackend::head) and from [`add_experts`](LayerBackend::add_experts) on.
    pub(crate) rows: Range<usize>,
    pub(crate) batch: &'a Batch,
    pub(crate) cache: &'a mut Cache,
    pub(crate) buffers: &'a mut Buffers,
}

impl Stage<'_> {
    /// The values of the rows in the hidden state, `[batch, residual width]`.
    pub(crate) fn residual(&self) -> Range<usize> {
        let width = self.spec.residual_width();
        self.rows.start * width..self.rows.end * width
    }

    /// The values of the rows in a buffer that is `[batch, hidden]`.
    pub(crate) fn values(&self) -> Range<usize> {
        self.rows.start * self.spec.hidden..self.rows.end * self.spec.hidden
    }
}

/// The batch of a pass, and what its texts keep.
pub(crate) struct TextRows<'a> {
    pub(crate) batch: &'a Batch,
    pub(crate) cache: &'a mut Cache,
}

impl TextRows<'_> {
    /// Lends both for one stage.
    pub(crate) fn lend(&mut self) -> TextRows<'_> {
        TextRows {
            batch: self.batch,
            cache: self.cache,
        }
    }
}

/// Buffers in main memory that the stages of a pass share.
pub(crate) struct Buffers {
    /// `[micro-batch, hidden]`: normed rows. The router leaves its own for the shared expert.
    pub(crate) normed: Vec<f32>,
    /// `[micro-batch, hidden]`: `normed` as matrices take it.
    pub(crate) acts: Activations,
    /// `[batch, hidden]`: what a stage adds to the hidden state.
    pub(crate) out: Vec<f32>,
    /// `[batch, hidden]`: what the shared expert made, in layers that finish it together with the
    /// routed ones; empty in models without such layers.
    pub(crate) shared: Vec<f32>,
    /// `[batch, hidden]`: what the routed experts read.
    pub(crate) expert_acts: Activations,
    /// `[micro-batch, latent]`: what latent experts read of the rows at hand.
    pub(crate) latent_acts: Activations,
    /// `[batch, latent]`: sums of latent experts; empty in models without them.
    pub(crate) latent: Vec<f32>,
    /// `[batch, n_used]`: the experts that the router chose.
    pub(crate) experts: Vec<u16>,
    /// `[batch, n_used]`.
    pub(crate) weights: Vec<f32>,
    /// Rows that a stage takes at once.
    pub(crate) micro_batch: usize,
}

impl Buffers {
    pub(crate) fn new(spec: &ModelSpec, batch: usize, micro_batch: usize) -> Self {
        let n_used = spec
            .moe_layers()
            .map(|(_, moe)| moe.n_used)
            .max()
            .unwrap_or(1);
        let latents = spec.moe_layers().filter_map(|(_, moe)| moe.latent);
        let latent = latents.map(|latent| latent.down.n_out).max().unwrap_or(0);
        Self {
            normed: vec![0.0; micro_batch * spec.hidden],
            acts: Activations::new(micro_batch, spec.hidden),
            out: vec![0.0; batch * spec.hidden],
            shared: if spec.layers.iter().any(LayerSpec::sums_experts_apart) {
                vec![0.0; batch * spec.hidden]
            } else {
                Vec::new()
            },
            expert_acts: Activations::new(batch, spec.hidden),
            latent_acts: Activations::default(),
            latent: vec![0.0; batch * latent],
            experts: vec![0; batch * n_used],
            weights: vec![0.0; batch * n_used],
            micro_batch,
        }
    }
}

/// The CPU and the GPUs, each with the parts of the model that it has.
pub(crate) struct Processors {
    pub(crate) cpu: Cpu,
    pub(crate) gpus: Gpus,
}

impl Processors {
    fn on(&mut self, place: Place) -> &mut dyn LayerBackend {
        match place {
            Some(tier) => self.gpus.of(tier),
            None => &mut self.cpu,
        }
    }

    /// Adds the attention of a layer that has its matrices on a GPU and its KV cache in main memory.
    fn attend_on_host(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        (spec, tier): (&GqaSpec, TierIdx),
    ) -> Result<(), RunError> {
        let (rows, Self { cpu, gpus }) = (stage.rows.clone(), self);
        let mut part = gpus.of(tier).projections(layer.index.get())?;
        part.project(rows.clone(), cpu.mixer.projected(rows.len(), spec))?;
        let mixed = cpu.attend_projected(stage, layer, spec);
        Ok(part.finish(rows, mixed)?)
    }

    /// Moves rows of the hidden state to where the next part is.
    fn transfer(&mut self, stage: &Stage<'_>, from: Place, to: Place) -> Result<(), RunError> {
        if from == to {
            return Ok(());
        }
        let x = &mut self.cpu.x[stage.residual()];
        if let Some(from) = from {
            self.gpus.of(from).take(stage.rows.clone(), x)?;
        }
        if let Some(to) = to {
            self.gpus.of(to).put(stage.rows.clone(), x)?;
        }
        Ok(())
    }
}

/// What computes the stages, and the buffers that they share.
pub(crate) struct Backends {
    pub(crate) pool: ThreadPool,
    pub(crate) kernels: Kernels,
    pub(crate) processors: Processors,
    pub(crate) buffers: Buffers,
    /// By layer: whether a routed expert takes activations as floats too.
    pub(crate) expert_floats: Vec<bool>,
}

impl Backends {
    /// Prepares a stage for rows of a batch.
    fn stage<'a>(
        &'a mut self,
        spec: &'a ModelSpec,
        rows: Range<usize>,
        on: TextRows<'a>,
    ) -> (&'a mut Processors, Stage<'a>) {
        let cpu = CpuContext {
            pool: &self.pool,
            kernels: self.kernels,
        };
        (
            &mut self.processors,
            Stage {
                cpu,
                spec,
                rows,
                batch: on.batch,
                cache: on.cache,
                buffers: &mut self.buffers,
            },
        )
    }

    /// Returns where a batch's hidden state is once it is embedded.
    pub(crate) fn embed(&mut self, spec: &ModelSpec, on: TextRows<'_>) -> Result<Place, RunError> {
        let batch = on.batch;
        let (processors, mut stage) = self.stage(spec, 0..batch.len(), on);
        processors.cpu.name_ngrams(spec, batch);
        let place = processors.gpus.places.embedding;
        processors.on(place).embed(&mut stage, &batch.tokens)?;
        let rows = stage.buffers.micro_batch;
        if let Some(tier) = place {
            processors.cpu.read_inputs_ahead(spec, &batch.tokens);
            for (i, tokens) in batch.tokens.chunks(rows).enumerate() {
                let Some(values) = processors.cpu.input_rows(spec, tokens) else {
                    break;
                };
                let gpu = processors.gpus.of(tier);
                gpu.put_input_rows(values)?;
                gpu.fill_inputs(i * rows..i * rows + tokens.len())?;
            }
        }
        Ok(place)
    }

    /// Empties what the routed experts of the layer before have read.
    pub(crate) fn begin_layer(&mut self) {
        self.buffers.expert_acts.clear();
    }

    /// Computes everything of a layer but its routed experts: the mixer, then the dense block, or
    /// the router and the shared expert. Returns where `rows`, which are at `place`, are then.
    pub(crate) fn dense_stage(
        &mut self,
        spec: &ModelSpec,
        layer: Layer<'_>,
        rows: Range<usize>,
        place: Place,
        on: TextRows<'_>,
    ) -> Result<Place, RunError> {
        let floats = self.expert_floats[layer.index.get()];
        let (processors, mut stage) = self.stage(spec, rows, on);
        let places = processors.gpus.places.layers[layer.index.get()];
        processors.transfer(&stage, place, places.mixer)?;
        if layer.spec.has_mixer() {
            processors.bring_choices(&stage, layer)?;
            processors.bring_ngrams(&stage, layer)?;
            match (&layer.spec.mixer, places.mixer) {
                (Mixer::Gqa(a), Some(tier)) if places.host_kv => {
                    processors.attend_on_host(&mut stage, layer, (a, tier))?;
                }
                _ => processors.on(places.mixer).mixer(&mut stage, layer)?,
            }
        }
        processors.transfer(&stage, places.mixer, places.ffn)?;
        let moe = match &layer.spec.ffn {
            Ffn::Moe(moe) => moe,
            Ffn::Dense(_) => {
                processors.on(places.ffn).dense_ffn(&mut stage, layer)?;
                return Ok(places.ffn);
            }
            Ffn::None => return Ok(places.ffn),
        };
        processors.on(places.ffn).route(&mut stage, layer)?;
        let acts = match moe.latent {
            Some(_) => &stage.buffers.latent_acts,
            None => &stage.buffers.acts,
        };
        stage.buffers.expert_acts.append(acts.view(), floats);
        if moe.shared.is_none() {
            return Ok(places.ffn);
        }
        processors.transfer(&stage, places.ffn, places.shared)?;
        processors.bring_stream_weights(&stage, layer)?;
        processors.on(places.shared).shared_expert(
            &mut stage,
            layer,
            places.ffn == places.shared,
        )?;
        Ok(places.shared)
    }

    /// Adds what routed experts made of a batch to the hidden state, which is at `place`.
    pub(crate) fn add_experts(
        &mut self,
        spec: &ModelSpec,
        layer: Layer<'_>,
        place: Place,
        on: TextRows<'_>,
    ) -> Result<(), RunError> {
        let (processors, mut stage) = self.stage(spec, 0..on.batch.len(), on);
        if layer.spec.moe().is_some_and(|moe| moe.latent.is_some()) {
            let router = processors.gpus.places.layers[layer.index.get()].ffn;
            if router == place {
                return processors.on(place).add_latent(&mut stage, layer);
            }
            processors.on(router).leave_latent(&mut stage, layer)?;
        }
        processors.on(place).add_experts(&mut stage, layer)
    }

    /// Returns whether the router of a layer is where the hidden state is, or needs no hidden state.
    pub(crate) fn can_predict(&self, layer: Layer<'_>, place: Place) -> bool {
        layer.chooses_by_token()
            || self.processors.gpus.places.layers[layer.index.get()].ffn == place
    }

    /// Writes the experts that the router of `layer` would choose for the hidden state of rows as
    /// it is now.
    pub(crate) fn predict(
        &mut self,
        spec: &ModelSpec,
        layer: Layer<'_>,
        rows: Range<usize>,
        on: TextRows<'_>,
        experts: &mut Vec<u16>,
    ) -> Result<(), RunError> {
        let (processors, mut stage) = self.stage(spec, rows, on);
        // The CPU has the tables of experts by token in any case.
        let router = processors.gpus.places.layers[layer.index.get()].ffn;
        let place = router.filter(|_| !layer.chooses_by_token());
        processors.on(place).predict(&mut stage, layer, experts)
    }

    /// Appends the logits of the batch's rows that want them to `logits`; the hidden state is at
    /// `place`.
    pub(crate) fn head(
        &mut self,
        spec: &ModelSpec,
        place: Place,
        on: TextRows<'_>,
        logits: &mut Vec<f32>,
    ) -> Result<(), RunError> {
        let wanted = &on.batch.logits;
        let (Some(first_row), Some(last_row)) = (wanted.first(), wanted.last()) else {
            return Ok(());
        };
        let (rows, first) = (*first_row..last_row + 1, logits.len());
        logits.resize(first + wanted.len() * spec.n_vocab, 0.0);
        let (processors, mut stage) = self.stage(spec, rows, on);
        let head = processors.gpus.places.head;
        processors.transfer(&stage, place, head)?;
        processors.on(head).head(&mut stage, &mut logits[first..])
    }
}
