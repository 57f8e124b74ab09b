//! The stages of a pass on the CPU.

use super::backend::{LayerBackend, Stage};
use super::residual::{
    LayerRows, TokenRows, finish_block, finish_logits, norm_in_place, scale_rows,
};
use super::rows::{BlockInput, LatentRows, StreamRows};
use crate::error::RunError;
use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::index::Layer;
use crate::layers::mixer::{MixerInput, MixerScratch, Segment, attend_projected, mix};
use crate::layers::ngram::Ngrams;
use crate::layers::router::Router;
use crate::layers::weights::DenseWeights;
use crate::moe::ffn::{FfnScratch, dense_ffn, shared_expert};
use std::ops::Range;
use tier_plan_formats::model::spec::{
    Ffn, GqaSpec, LayerSpec, ModelSpec, MoeSpec, RouterInput, TensorId,
};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::quant::dequantize_row;
use tier_plan_kernels::{ActView, Activations, needs_quants};

/// The parts of a model that the CPU computes, and its buffers for them.
pub(crate) struct Cpu {
    pub(crate) weights: DenseWeights,
    /// `[batch, residual width]`: the hidden state. Rows on their way from one GPU to another pass through
    /// it too.
    pub(crate) x: Vec<f32>,
    /// By layer: whether a matrix of the mixer takes quantized activations.
    mixer_quants: Vec<bool>,
    /// `[micro-batch, n_expert]`.
    router_logits: Vec<f32>,
    router: Router,
    /// `[micro-batch, n_used]`: weights of predicted experts, which nothing reads.
    predicted_weights: Vec<f32>,
    pub(super) mixer: MixerScratch,
    /// Also the buffers of the routed experts.
    pub(crate) ffn: FfnScratch,
    pub(super) token_rows: TokenRows,
    pub(super) streams: StreamRows,
    pub(super) latent: LatentRows,
    pub(super) ngrams: Ngrams,
}

impl Cpu {
    /// Makes the buffers for batches of up to `batch` tokens, of which a stage takes `micro_batch`
    /// at once.
    pub(crate) fn new(
        spec: &ModelSpec,
        weights: DenseWeights,
        batch: usize,
        micro_batch: usize,
    ) -> Self {
        let mut mixer = MixerScratch::default();
        let (mut ffn, mut n_expert, mut n_used, mut widest) = (0, 0, 1, spec.hidden);
        for layer in &spec.layers {
            mixer.reserve(micro_batch, &layer.mixer);
            match &layer.ffn {
                Ffn::Dense(f) => ffn = ffn.max(f.up.n_out),
                Ffn::Moe(m) => {
                    ffn = ffn
                        .max(m.expert_ffn)
                        .max(m.shared.map_or(0, |shared| shared.ffn.up.n_out));
                    widest = widest.max(m.expert_width());
                    n_expert = n_expert.max(m.n_expert);
                    n_used = n_used.max(m.n_used);
                }
                Ffn::None => {}
            }
        }
        let quants = |layer: &LayerSpec| {
            let matrices = layer.mixer.tensors().matrices;
            matrices.iter().any(|id| needs_quants(weights.ty(*id)))
                && spec.hidden.is_multiple_of(32)
        };
        Self {
            mixer_quants: spec.layers.iter().map(quants).collect(),
            weights,
            x: vec![0.0; batch * spec.residual_width()],
            router_logits: vec![0.0; micro_batch * n_expert],
            router: Router::default(),
            predicted_weights: Vec::new(),
            mixer,
            ffn: FfnScratch::new(micro_batch, widest, ffn, n_used),
            token_rows: TokenRows::new(spec, batch, micro_batch),
            streams: StreamRows::default(),
            latent: LatentRows::default(),
            ngrams: Ngrams::default(),
        }
    }

    /// Returns the hidden states that tokens have before the first layer, `[tokens, residual
    /// width]`.
    pub(crate) fn embed_tokens(&mut self, spec: &ModelSpec, tokens: &[u32]) -> &[f32] {
        self.embed_rows(spec, tokens);
        self.spread(spec, tokens.len());
        &self.x[..tokens.len() * spec.residual_width()]
    }

    fn embed_rows(&mut self, spec: &ModelSpec, tokens: &[u32]) {
        let table = self
            .weights
            .matrix(spec.embedding, spec.n_vocab, spec.hidden);
        let width = spec.residual_width();
        let mut scratch = Vec::new();
        for (token, row) in tokens.iter().zip(self.x.chunks_exact_mut(width)) {
            let row = &mut row[..spec.hidden];
            if let Some(bytes) = table.row_in(*token as usize, &mut scratch) {
                dequantize_row(table.ty(), bytes, row);
            }
            if spec.embedding_scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= spec.embedding_scale);
            }
        }
    }

    /// Computes a layer's attention of rows whose queries, keys, and values are in
    /// `self.mixer`'s [`projected`](MixerScratch::projected). Returns what the last matrix takes,
    /// `[rows, o.n_in]`.
    pub(crate) fn attend_projected(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        spec: &GqaSpec,
    ) -> &[f32] {
        let (index, cache) = (layer.index.get(), &mut *stage.cache);
        let segments = stage.batch.segments(&stage.rows, cache.kinds[index]);
        let segments: Vec<Segment<'_>> = segments.collect();
        cache.rotations.prepare(segments.iter().map(Segment::range));
        let none = Activations::default();
        let input = MixerInput {
            x: none.view(),
            segments: &segments,
            first_row: stage.rows.start,
            rope: cache.rotations.of(index),
            indexer_rope: None,
            norm_eps: stage.spec.norm_eps,
        };
        let (rows, cache) = (stage.rows.len(), &mut cache.layers[index]);
        let input = (&input, rows);
        attend_projected(
            stage.cpu,
            &self.weights,
            spec,
            input,
            cache,
            &mut self.mixer,
        )
    }

    /// Writes the experts that the router chooses for rows of these tokens, `[rows, n_used]`, and
    /// their weights.
    fn choose(
        &mut self,
        cpu: CpuContext<'_>,
        moe: &MoeSpec,
        (acts, tokens): (ActView<'_>, &[u32]),
        experts: &mut [u16],
        weights: &mut [f32],
    ) {
        self.choose_by_token(moe, tokens, experts);
        let logits = &mut self.router_logits[..acts.rows() * moe.n_expert];
        matmul_all(
            cpu.pool,
            cpu.kernels,
            &[MatJob::new(self.weights.linear(&moe.router), acts, logits)],
        );
        add_bias(logits, self.weights.bias(&moe.router));
        let bias = self.weights.opt_vector(moe.selection_bias);
        let chosen = experts
            .chunks_exact_mut(moe.n_used)
            .zip(weights.chunks_exact_mut(moe.n_used));
        let scale = self.weights.opt_vector(moe.expert_scale);
        for (row, (experts, weights)) in logits.chunks_exact(moe.n_expert).zip(chosen) {
            if moe.by_token.is_some() {
                self.router.weigh_chosen(moe, row, experts, weights);
            } else {
                self.router.route(moe, row, bias, experts, weights);
            }
            if let Some(scale) = scale {
                let of = |expert: &u16| scale[usize::from(*expert)];
                weights
                    .iter_mut()
                    .zip(experts)
                    .for_each(|(w, e)| *w *= of(e));
            }
        }
    }

    /// Writes the experts of tokens that choose them alone, `[tokens, n_used]`.
    fn choose_by_token(&self, moe: &MoeSpec, tokens: &[u32], experts: &mut [u16]) {
        if let Some(table) = self.weights.opt_vector(moe.by_token) {
            for (token, experts) in tokens.iter().zip(experts.chunks_exact_mut(moe.n_used)) {
                let row = &table[*token as usize * moe.n_used..];
                experts
                    .iter_mut()
                    .zip(row)
                    .for_each(|(e, of)| *e = *of as u16);
            }
        }
    }

    /// Leaves rows of the hidden state under a norm in the stage's buffers, as matrices take them.
    fn norm(&mut self, stage: &mut Stage<'_>, norm: TensorId, quantize: bool) {
        let input = BlockInput {
            connection: None,
            norm,
            quantize,
            writes: false,
        };
        self.read_block(stage, input);
    }

    /// Leaves what a layer's router reads in the stage's buffers. Where that is the layer's normed
    /// rows, experts of a single token read them too, so they are quantized whatever the router's
    /// type.
    fn router_rows(
        &mut self,
        stage: &mut Stage<'_>,
        layer: &LayerSpec,
        moe: &MoeSpec,
        writes: bool,
    ) {
        let (cpu, n, hidden) = (stage.cpu, stage.rows.len(), stage.spec.hidden);
        let quantize = hidden.is_multiple_of(32);
        let RouterInput::Own(weights) = moe.router_input else {
            let input = BlockInput {
                connection: layer.residual.connections.map(|c| c.ffn),
                norm: layer.ffn_norm,
                quantize,
                writes,
            };
            return self.read_block(stage, input);
        };
        let (x, eps) = (&self.x[stage.values()], stage.spec.norm_eps);
        let (weights, factor) = (self.weights.vector(weights), 1.0 / (hidden as f32).sqrt());
        let buffers = &mut *stage.buffers;
        let normed = &mut buffers.normed[..x.len()];
        cpu.pool.for_each_slice(normed, hidden, |row, normed| {
            normed.copy_from_slice(&x[row * hidden..][..hidden]);
            norm_in_place(cpu, &[], eps, normed);
            normed
                .iter_mut()
                .zip(weights)
                .for_each(|(x, w)| *x = *x * factor * w);
        });
        buffers
            .acts
            .fill_shared(cpu.pool, cpu.kernels, n, hidden, normed, quantize);
    }

    /// Adds the first values of `buffers.out`, a block's results, to the stage's rows.
    fn write_out(&mut self, stage: &mut Stage<'_>, n_values: usize) {
        let out = std::mem::take(&mut stage.buffers.out);
        self.write_block(stage, &out[..n_values]);
        stage.buffers.out = out;
    }

    /// Adds what follows a layer's blocks to rows of the batch.
    fn end_layer(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) {
        let residual = &layer.spec.residual;
        if residual.ends_plain() {
            return;
        }
        let (cpu, spec, hidden) = (stage.cpu, stage.spec, stage.spec.hidden);
        let buffers = &mut *stage.buffers;
        let mut first = stage.rows.start;
        while first < stage.rows.end {
            let rows: Range<usize> = first..stage.rows.end.min(first + buffers.micro_batch);
            first = rows.end;
            let x = &mut self.x[rows.start * hidden..rows.end * hidden];
            if let Some(input) = &residual.layer_input {
                let out = &mut buffers.out[..x.len()];
                let rows = LayerRows {
                    rows,
                    x: &mut *x,
                    out,
                };
                let of = (spec, layer.index.get());
                self.token_rows.add(cpu, &self.weights, of, input, rows);
            }
            scale_rows(&self.weights, residual.output_scale, x);
        }
    }
}

impl LayerBackend for Cpu {
    fn embed(&mut self, stage: &mut Stage<'_>, tokens: &[u32]) -> Result<(), RunError> {
        self.read_inputs_ahead(stage.spec, tokens);
        self.embed_rows(stage.spec, tokens);
        self.spread(stage.spec, tokens.len());
        let x = &self.x[..tokens.len() * stage.spec.hidden];
        self.token_rows
            .fill(stage.cpu, &self.weights, stage.spec, tokens, x);
        Ok(())
    }

    fn mixer(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let (cpu, values, index) = (stage.cpu, stage.values(), layer.index.get());
        // A layer without keys and values of its own reads those of another, by its pages.
        let owner = layer.spec.kv_owner().unwrap_or(index);
        let segments = stage.batch.segments(&stage.rows, stage.cache.kinds[owner]);
        let segments: Vec<Segment<'_>> = segments.collect();
        let residual = &layer.spec.residual;
        self.add_ngrams(stage, layer, &segments);
        let input = BlockInput {
            connection: residual.connections.map(|c| c.mixer),
            norm: layer.spec.mixer_norm,
            quantize: self.mixer_quants[index],
            writes: true,
        };
        self.read_block(stage, input);
        let (cache, buffers) = (&mut *stage.cache, &mut *stage.buffers);
        let positions = segments.iter().map(Segment::range);
        cache.rotations.prepare(positions);
        let input = MixerInput {
            x: buffers.acts.view(),
            segments: &segments,
            first_row: stage.rows.start,
            rope: cache.rotations.of(index),
            indexer_rope: cache.rotations.of_indexer(index),
            norm_eps: stage.spec.norm_eps,
        };
        let out = &mut buffers.out[..values.len()];
        let cache = &mut cache.layers[owner];
        mix(
            cpu,
            &self.weights,
            &layer.spec.mixer,
            &input,
            cache,
            &mut self.mixer,
            out,
        );
        let (eps, hidden) = (stage.spec.norm_eps, stage.spec.hidden);
        let norm = self.weights.opt_vector(residual.mixer_norm);
        finish_block(cpu, norm, eps, residual.mixer_scale, hidden, out);
        self.write_out(stage, values.len());
        Ok(())
    }

    fn dense_ffn(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let Ffn::Dense(ffn) = &layer.spec.ffn else {
            return Ok(());
        };
        let (cpu, n_values) = (stage.cpu, stage.values().len());
        let mut readers = ffn.gate.iter().chain([&ffn.up]);
        let input = BlockInput {
            connection: layer.spec.residual.connections.map(|c| c.ffn),
            norm: layer.spec.ffn_norm,
            quantize: readers.any(|l| needs_quants(self.weights.ty(l.weight))),
            writes: true,
        };
        self.read_block(stage, input);
        let buffers = &mut *stage.buffers;
        let out = &mut buffers.out[..n_values];
        dense_ffn(
            cpu,
            &self.weights,
            ffn,
            buffers.acts.view(),
            &mut self.ffn,
            out,
        );
        let (residual, spec) = (&layer.spec.residual, stage.spec);
        let norm = self.weights.opt_vector(residual.ffn_norm);
        finish_block(
            cpu,
            norm,
            spec.norm_eps,
            residual.ffn_scale,
            spec.hidden,
            out,
        );
        self.write_out(stage, n_values);
        self.end_layer(stage, layer);
        Ok(())
    }

    fn route(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let Ffn::Moe(moe) = &layer.spec.ffn else {
            return Ok(());
        };
        let choices = stage.rows.start * moe.n_used..stage.rows.end * moe.n_used;
        self.router_rows(stage, layer.spec, moe, true);
        let buffers = &mut *stage.buffers;
        let (experts, weights) = (
            &mut buffers.experts[choices.clone()],
            &mut buffers.weights[choices],
        );
        let rows = (buffers.acts.view(), &stage.batch.tokens[stage.rows.clone()]);
        self.choose(stage.cpu, moe, rows, experts, weights);
        if let Some(latent) = &moe.latent {
            self.enter_latent(stage, latent);
        }
        if moe.input_norm.is_some() || moe.router_input != RouterInput::Normed {
            let quantize = stage.spec.hidden.is_multiple_of(32);
            let norm = moe.input_norm.unwrap_or(layer.spec.ffn_norm);
            self.norm(stage, norm, quantize);
        }
        Ok(())
    }

    fn shared_expert(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        _: bool,
    ) -> Result<(), RunError> {
        let Some(moe) = layer.spec.moe() else {
            return Ok(());
        };
        let Some(shared) = &moe.shared else {
            return Ok(());
        };
        let (cpu, values) = (stage.cpu, stage.values());
        if moe.input_norm.is_some() {
            let quantize = stage.spec.hidden.is_multiple_of(32);
            self.norm(stage, layer.spec.ffn_norm, quantize);
        }
        let (buffers, n) = (&mut *stage.buffers, values.len());
        // What it reads is what the router has left, wherever that ran.
        let (normed, out) = (&buffers.normed[..n], &mut buffers.out[..n]);
        shared_expert(
            cpu,
            &self.weights,
            shared,
            buffers.acts.view(),
            normed,
            &mut self.ffn,
            out,
        );
        if layer.spec.sums_experts_apart() {
            let (norm, spec) = (self.weights.opt_vector(shared.norm), stage.spec);
            finish_block(cpu, norm, spec.norm_eps, 1.0, spec.hidden, out);
            buffers.shared[values].copy_from_slice(out);
        } else {
            cpu.kernels.add(&mut self.x[values], out);
        }
        Ok(())
    }

    fn add_experts(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let (cpu, spec, values) = (stage.cpu, stage.spec, stage.values());
        let out = &mut stage.buffers.out[values.clone()];
        if let Some(moe) = layer.spec.moe()
            && layer.spec.sums_experts_apart()
        {
            let (hidden, eps, residual) = (spec.hidden, spec.norm_eps, &layer.spec.residual);
            let norm = self.weights.opt_vector(moe.output_norm);
            finish_block(cpu, norm, eps, 1.0, hidden, out);
            if moe.shared.is_some() {
                cpu.kernels.add(out, &stage.buffers.shared[values.clone()]);
            }
            finish_block(cpu, None, eps, moe.sum_scale, hidden, out);
            let norm = self.weights.opt_vector(residual.ffn_norm);
            finish_block(cpu, norm, eps, residual.ffn_scale, hidden, out);
        }
        self.write_out(stage, values.len());
        self.end_layer(stage, layer);
        Ok(())
    }

    fn leave_latent(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        if let Some(latent) = layer.spec.moe().and_then(|moe| moe.latent.as_ref()) {
            self.widen_latent(stage, latent);
        }
        Ok(())
    }

    fn head(&mut self, stage: &mut Stage<'_>, logits: &mut [f32]) -> Result<(), RunError> {
        let (cpu, spec, micro_batch) = (stage.cpu, stage.spec, stage.buffers.micro_batch);
        let quantize = needs_quants(self.weights.ty(spec.output));
        let parts = stage.batch.logits.chunks(micro_batch);
        for (rows, logits) in parts.zip(logits.chunks_mut(micro_batch * spec.n_vocab)) {
            self.read_end(stage, rows);
            let output = self.weights.matrix(spec.output, spec.n_vocab, spec.hidden);
            let buffers = &mut *stage.buffers;
            let normed = &buffers.normed[..rows.len() * spec.hidden];
            buffers.acts.fill_shared(
                cpu.pool,
                cpu.kernels,
                rows.len(),
                spec.hidden,
                normed,
                quantize,
            );
            matmul_all(
                cpu.pool,
                cpu.kernels,
                &[MatJob::new(output, buffers.acts.view(), logits)],
            );
            let bias = self.weights.opt_vector(spec.head.bias);
            finish_logits(cpu, &spec.head, bias, spec.n_vocab, logits);
        }
        Ok(())
    }

    fn predict(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        experts: &mut Vec<u16>,
    ) -> Result<(), RunError> {
        let Ffn::Moe(moe) = &layer.spec.ffn else {
            return Ok(());
        };
        let (cpu, n) = (stage.cpu, stage.rows.len());
        experts.resize(n * moe.n_used, 0);
        let tokens = &stage.batch.tokens[stage.rows.clone()];
        if moe.by_token.is_some() {
            self.choose_by_token(moe, tokens, experts);
            return Ok(());
        }
        // The buffers of normed rows are free: routed experts have copies, and the shared expert is
        // done.
        self.router_rows(stage, layer.spec, moe, false);
        let mut weights = std::mem::take(&mut self.predicted_weights);
        weights.resize(n * moe.n_used, 0.0);
        let rows = (stage.buffers.acts.view(), tokens);
        self.choose(cpu, moe, rows, experts, &mut weights);
        self.predicted_weights = weights;
        Ok(())
    }
}
