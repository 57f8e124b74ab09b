//! How the CPU's blocks read the hidden state and write to it: one stream, or several with
//! hyper-connections; and the space of latent experts.

use super::backend::Stage;
use super::batch::Batch;
use super::cpu::Cpu;
use super::residual::norm_in_place;
use crate::layers::cpu_context::{CpuContext, add_bias, norm_rows};
use crate::layers::index::Layer;
use crate::layers::mixer::Segment;
use crate::layers::ngram::NgramInput;
use crate::layers::streams::{Streams, StreamsScratch, WriteBack};
use std::ops::Range;
use tier_plan_formats::model::spec::{Connection, Latent, ModelSpec, TensorId};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{Activations, needs_quants};

/// What the CPU keeps of a batch's streams between reading them and writing them back.
#[derive(Default)]
pub(crate) struct StreamRows {
    scratch: StreamsScratch,
    pub(super) back: WriteBack,
    /// `[wanted rows, streams * hidden]`: rows on their way to the head.
    ends: Vec<f32>,
}

/// Buffers of latent experts.
#[derive(Default)]
pub(crate) struct LatentRows {
    /// `[rows, latent]`.
    rows: Vec<f32>,
    acts: Activations,
}

/// What a block reads.
#[derive(Clone, Copy)]
pub(super) struct BlockInput {
    pub(super) connection: Option<Connection>,
    pub(super) norm: TensorId,
    /// Whether matrices take it in 8 bits.
    pub(super) quantize: bool,
    /// Whether the block's result will be written back.
    pub(super) writes: bool,
}

impl Cpu {
    /// Leaves what a block reads of the stage's rows in its buffers, as matrices take it.
    pub(super) fn read_block(&mut self, stage: &mut Stage<'_>, input: BlockInput) {
        let (cpu, n, spec) = (stage.cpu, stage.rows.len(), stage.spec);
        let rows = stage.residual();
        let buffers = &mut *stage.buffers;
        let normed = &mut buffers.normed[..n * spec.hidden];
        let norm = self
            .weights
            .opt_vector(has_norm(&input).then_some(input.norm));
        match (&input.connection, &spec.streams) {
            (Some(connection), Some(_)) => {
                let StreamRows { scratch, back, .. } = &mut self.streams;
                let back = input.writes.then_some((back, stage.rows.start));
                let streams = Streams::new(cpu, &self.weights, spec);
                streams.read(connection, &self.x[rows], scratch, back, normed);
                if let Some(norm) = norm {
                    cpu.pool.for_each_slice(normed, spec.hidden, |_, row| {
                        norm_in_place(cpu, norm, spec.norm_eps, row);
                    });
                }
            }
            _ => norm_rows(
                cpu,
                &self.x[rows],
                norm.unwrap_or(&[]),
                spec.norm_eps,
                normed,
            ),
        }
        let (pool, kernels) = (cpu.pool, cpu.kernels);
        let acts = &mut buffers.acts;
        acts.fill_shared(pool, kernels, n, spec.hidden, normed, input.quantize);
    }

    /// Adds a block's results, `[rows, hidden]`, to the stage's rows of the hidden state.
    pub(super) fn write_block(&mut self, stage: &Stage<'_>, out: &[f32]) {
        let (cpu, spec) = (stage.cpu, stage.spec);
        let x = &mut self.x[stage.residual()];
        if spec.streams.is_none() {
            return cpu.kernels.add(x, out);
        }
        let streams = Streams::new(cpu, &self.weights, spec);
        streams.write(&self.streams.back, stage.rows.start, out, x);
    }

    /// Makes all streams of rows the first of them, `[rows, streams * hidden]`.
    pub(super) fn spread(&mut self, spec: &ModelSpec, n: usize) {
        let (hidden, width) = (spec.hidden, spec.residual_width());
        if width > hidden {
            for row in self.x[..n * width].chunks_exact_mut(width) {
                for stream in 1..width / hidden {
                    row.copy_within(..hidden, stream * hidden);
                }
            }
        }
    }

    /// Writes what the head reads of some rows of the batch, `[rows, hidden]`.
    pub(super) fn read_end(&mut self, stage: &mut Stage<'_>, rows: &[usize]) {
        let (cpu, spec) = (stage.cpu, stage.spec);
        let (hidden, width) = (spec.hidden, spec.residual_width());
        let normed = &mut stage.buffers.normed[..rows.len() * hidden];
        let Some(streams) = &spec.streams else {
            let norm = self.weights.vector(spec.output_norm);
            return cpu.pool.for_each_slice(normed, hidden, |i, normed| {
                let x = &self.x[rows[i] * hidden..][..hidden];
                cpu.kernels.rms_norm(x, norm, spec.norm_eps, normed);
            });
        };
        let StreamRows { scratch, ends, .. } = &mut self.streams;
        ends.clear();
        for row in rows {
            ends.extend_from_slice(&self.x[row * width..][..width]);
        }
        let on = Streams::new(cpu, &self.weights, spec);
        on.end(&streams.end, ends, scratch, normed);
        if streams.end.has_output_norm() {
            let norm = self.weights.vector(spec.output_norm);
            cpu.pool.for_each_slice(normed, hidden, |_, row| {
                norm_in_place(cpu, norm, spec.norm_eps, row);
            });
        }
    }

    /// Names the rows of the n-gram table that a batch reads, and has those that are mapped read
    /// ahead.
    pub(super) fn name_ngrams(&mut self, spec: &ModelSpec, batch: &Batch) {
        let Some(table) = &spec.ngrams else {
            return;
        };
        self.ngrams.clear();
        for span in &batch.spans {
            let tokens = &batch.tokens[span.rows.clone()];
            self.ngrams.name(table, span.before(), tokens);
        }
        self.weights.read_ahead(table.table, self.ngrams.named());
    }

    /// Returns what is in the n-gram table for some rows of the batch, `[rows, hidden]`, if the model has
    /// one.
    pub(super) fn ngram_rows(
        &mut self,
        cpu: CpuContext<'_>,
        spec: &ModelSpec,
        rows: Range<usize>,
    ) -> Option<&[f32]> {
        let table = spec.ngrams.as_ref()?;
        Some(self.ngrams.find(cpu, &self.weights, table, rows))
    }

    /// Has the tokens' rows of the table of inputs for every layer read ahead, where it is mapped.
    pub(super) fn read_inputs_ahead(&self, spec: &ModelSpec, tokens: &[u32]) {
        if let Some(own) = &spec.token_inputs {
            let rows: Vec<u64> = tokens.iter().map(|token| u64::from(*token)).collect();
            self.weights.read_ahead(own.table, &rows);
        }
    }

    /// Returns the tokens' rows of the table of inputs for every layer, `[tokens, layers * dim]`, if the
    /// model has one. There are at most as many tokens as a stage takes at once.
    pub(super) fn input_rows(&mut self, spec: &ModelSpec, tokens: &[u32]) -> Option<&[f32]> {
        let own = spec.token_inputs.as_ref()?;
        Some(self.token_rows.of_table(&self.weights, spec, own, tokens))
    }

    /// Adds what a layer's n-gram block makes of the stage's rows.
    pub(super) fn add_ngrams(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        segments: &[Segment<'_>],
    ) {
        let spec = stage.spec;
        let (Some(block), Some(table)) = (&layer.spec.residual.ngram, &spec.ngrams) else {
            return;
        };
        let input = NgramInput {
            table,
            block,
            rows: stage.rows.clone(),
            segments,
        };
        let on = Streams::new(stage.cpu, &self.weights, spec);
        let x = &mut self.x[stage.residual()];
        let states = stage.cache.layers[layer.index.get()].states_mut();
        self.ngrams.add(on, &input, states, x);
    }

    /// Leaves what latent experts read of the stage's rows in its buffers.
    pub(super) fn enter_latent(&mut self, stage: &mut Stage<'_>, latent: &Latent) {
        let (cpu, n, width) = (stage.cpu, stage.rows.len(), latent.down.n_out);
        let buffers = &mut *stage.buffers;
        let rows = &mut self.latent.rows;
        rows.resize(n * width, 0.0);
        let down = self.weights.linear(&latent.down);
        let job = MatJob::new(down, buffers.acts.view(), rows);
        matmul_all(cpu.pool, cpu.kernels, &[job]);
        add_bias(rows, self.weights.bias(&latent.down));
        let acts = &mut buffers.latent_acts;
        let quantize = width.is_multiple_of(32);
        acts.fill_shared(cpu.pool, cpu.kernels, n, width, rows, quantize);
    }

    /// Takes the sums of latent experts, `buffers.latent`, back to the hidden state's width, in
    /// `buffers.out`.
    pub(super) fn widen_latent(&mut self, stage: &mut Stage<'_>, latent: &Latent) {
        let (cpu, spec, width) = (stage.cpu, stage.spec, latent.down.n_out);
        let quantize = needs_quants(self.weights.ty(latent.up.weight));
        let norm = self.weights.opt_vector(latent.norm);
        let buffers = &mut *stage.buffers;
        for rows in parts(stage.rows.clone(), buffers.micro_batch) {
            let sums = &mut buffers.latent[rows.start * width..rows.end * width];
            if let Some(norm) = norm {
                cpu.pool.for_each_slice(sums, width, |_, row| {
                    norm_in_place(cpu, norm, spec.norm_eps, row);
                });
            }
            let acts = &mut self.latent.acts;
            acts.fill_shared(cpu.pool, cpu.kernels, rows.len(), width, sums, quantize);
            let out = &mut buffers.out[rows.start * spec.hidden..rows.end * spec.hidden];
            let job = MatJob::new(self.weights.linear(&latent.up), acts.view(), out);
            matmul_all(cpu.pool, cpu.kernels, &[job]);
            add_bias(out, self.weights.bias(&latent.up));
        }
    }
}

/// Whether a norm follows what a block reads.
fn has_norm(input: &BlockInput) -> bool {
    input
        .connection
        .is_none_or(|connection| connection.has_block_norm())
}

/// Cuts rows into parts of up to `size`.
fn parts(rows: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.step_by(size)
        .map(move |first| first..end.min(first + size))
}
