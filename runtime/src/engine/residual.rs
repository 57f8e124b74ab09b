//! What the CPU does to a block's result before it is added to the hidden state, and what follows a
//! layer's blocks.

use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::weights::DenseWeights;
use std::ops::Range;
use tier_plan_formats::model::spec::{HeadOptions, LayerInput, ModelSpec, TensorId, TokenInputs};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::quant::dequantize_row;
use tier_plan_kernels::{ActView, Activations, needs_quants};

/// Normalizes rows of a block's result in place, where there is a norm, and multiplies them by
/// `scale`.
pub(super) fn finish_block(
    cpu: CpuContext<'_>,
    norm: Option<&[f32]>,
    eps: f32,
    scale: f32,
    hidden: usize,
    out: &mut [f32],
) {
    if norm.is_none() && scale == 1.0 {
        return;
    }
    cpu.pool.for_each_slice(out, hidden, |_, row| {
        if let Some(norm) = norm {
            norm_in_place(cpu, norm, eps, row);
        }
        if scale != 1.0 {
            row.iter_mut().for_each(|x| *x *= scale);
        }
    });
}

/// Makes logits of a head's products, `[rows, n_vocab]`.
pub(super) fn finish_logits(
    cpu: CpuContext<'_>,
    head: &HeadOptions,
    bias: Option<&[f32]>,
    n_vocab: usize,
    logits: &mut [f32],
) {
    add_bias(logits, bias);
    if head.scale != 1.0 {
        logits.iter_mut().for_each(|z| *z *= head.scale);
    }
    if let Some(cap) = head.softcap {
        cpu.pool.for_each_slice(logits, n_vocab, |_, row| {
            row.iter_mut().for_each(|z| *z = cap * (*z / cap).tanh());
        });
    }
}

/// Computes the RMS norm of a row in place; an empty `weight` stands for ones.
pub(super) fn norm_in_place(cpu: CpuContext<'_>, weight: &[f32], eps: f32, row: &mut [f32]) {
    let squares = cpu.kernels.dot(row, row);
    let factor = 1.0 / (squares / row.len() as f32 + eps).sqrt();
    match weight {
        [] => row.iter_mut().for_each(|x| *x *= factor),
        weight => row
            .iter_mut()
            .zip(weight)
            .for_each(|(x, w)| *x = *x * factor * w),
    }
}

/// Some rows of a batch in a layer.
pub(super) struct LayerRows<'a> {
    pub(super) rows: Range<usize>,
    /// Their hidden state, `[rows, hidden]`.
    pub(super) x: &'a mut [f32],
    /// Scratch, `[rows, hidden]`.
    pub(super) out: &'a mut [f32],
}

/// Inputs that a batch's tokens have for every layer, and the buffers for them.
#[derive(Default)]
pub(super) struct TokenRows {
    /// `[batch, layers * dim]`.
    values: Vec<f32>,
    /// `[micro-batch, layers * dim or dim]`: results of a product.
    products: Vec<f32>,
    acts: Activations,
}

impl TokenRows {
    /// Makes the buffers for batches of up to `batch` tokens, of which a stage takes `micro_batch`
    /// at once.
    pub(super) fn new(spec: &ModelSpec, batch: usize, micro_batch: usize) -> Self {
        let Some(own) = &spec.token_inputs else {
            return Self::default();
        };
        let width = own.proj.n_out;
        Self {
            values: vec![0.0; batch * width],
            products: vec![0.0; micro_batch * width],
            acts: Activations::new(micro_batch, own.dim.max(spec.hidden)),
        }
    }

    /// Computes the inputs of tokens whose embeddings are `x`, `[tokens, hidden]`.
    pub(super) fn fill(
        &mut self,
        cpu: CpuContext<'_>,
        weights: &DenseWeights,
        spec: &ModelSpec,
        tokens: &[u32],
        x: &[f32],
    ) {
        let Some(own) = &spec.token_inputs else {
            return;
        };
        let width = own.proj.n_out;
        let rows = (self.products.len() / width.max(1)).max(1);
        for (i, tokens) in tokens.chunks(rows).enumerate() {
            let x = &x[i * rows * spec.hidden..][..tokens.len() * spec.hidden];
            let quantize = needs_quants(weights.ty(own.proj.weight));
            self.acts.fill_shared(
                cpu.pool,
                cpu.kernels,
                tokens.len(),
                spec.hidden,
                x,
                quantize,
            );
            let projected = &mut self.products[..tokens.len() * width];
            let acts = self.acts.view();
            let jobs = [MatJob::new(weights.linear(&own.proj), acts, projected)];
            matmul_all(cpu.pool, cpu.kernels, &jobs);
            let values = &mut self.values[i * rows * width..][..tokens.len() * width];
            combine(cpu, weights, spec, own, tokens, projected, values);
        }
    }

    /// Returns the tokens' rows of the table, `[tokens, layers * dim]`.
    pub(super) fn of_table(
        &mut self,
        weights: &DenseWeights,
        spec: &ModelSpec,
        own: &TokenInputs,
        tokens: &[u32],
    ) -> &[f32] {
        let width = own.proj.n_out;
        let rows = &mut self.values[..tokens.len() * width];
        for (token, row) in tokens.iter().zip(rows.chunks_exact_mut(width)) {
            table_row(weights, spec, own, *token, row);
        }
        rows
    }

    /// Adds what tokens contribute to a layer to their rows of the batch.
    pub(super) fn add(
        &mut self,
        cpu: CpuContext<'_>,
        weights: &DenseWeights,
        (spec, layer): (&ModelSpec, usize),
        input: &LayerInput,
        rows: LayerRows<'_>,
    ) {
        let LayerRows { rows, x, out } = rows;
        let Some(own) = &spec.token_inputs else {
            return;
        };
        let (n, dim, width) = (rows.len(), own.dim, own.proj.n_out);
        let quantize = |id| needs_quants(weights.ty(id));
        let Self {
            values,
            products,
            acts,
        } = self;
        let gate = &mut products[..n * dim];
        let product = |linear, acts: ActView<'_>, out: &mut [f32]| {
            let jobs = [MatJob::new(weights.linear(linear), acts, out)];
            matmul_all(cpu.pool, cpu.kernels, &jobs);
            add_bias(out, weights.bias(linear));
        };
        let q = quantize(input.gate.weight);
        acts.fill_shared(cpu.pool, cpu.kernels, n, spec.hidden, x, q);
        product(&input.gate, acts.view(), gate);
        let first = (rows.start * width) + layer * dim;
        for (row, gate) in gate.chunks_exact_mut(dim).enumerate() {
            cpu.kernels
                .gelu_mul(gate, &values[first + row * width..][..dim]);
        }
        let q = quantize(input.proj.weight);
        acts.fill_shared(cpu.pool, cpu.kernels, n, dim, gate, q);
        product(&input.proj, acts.view(), out);
        let norm = weights.vector(input.norm);
        finish_block(cpu, Some(norm), spec.norm_eps, 1.0, spec.hidden, out);
        cpu.kernels.add(x, out);
    }
}

/// Computes `(norm(projected / sqrt(hidden)) + sqrt(dim) · table[token]) / sqrt(2)` for every part
/// of `dim` values.
fn combine(
    cpu: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &ModelSpec,
    own: &TokenInputs,
    tokens: &[u32],
    projected: &mut [f32],
    values: &mut [f32],
) {
    let width = own.proj.n_out;
    let norm = weights.vector(own.norm);
    let (of_x, of_table) = (1.0 / (spec.hidden as f32).sqrt(), (own.dim as f32).sqrt());
    let rows = projected
        .chunks_exact_mut(width)
        .zip(values.chunks_exact_mut(width));
    for (token, (projected, values)) in tokens.iter().zip(rows) {
        table_row(weights, spec, own, *token, values);
        let parts = projected
            .chunks_exact_mut(own.dim)
            .zip(values.chunks_exact_mut(own.dim));
        for (projected, values) in parts {
            projected.iter_mut().for_each(|x| *x *= of_x);
            norm_in_place(cpu, norm, spec.norm_eps, projected);
            for (to, x) in values.iter_mut().zip(projected) {
                *to = (*x + of_table * *to) * std::f32::consts::FRAC_1_SQRT_2;
            }
        }
    }
}

/// Dequantizes a token's row of the table, `[layers * dim]`.
fn table_row(
    weights: &DenseWeights,
    spec: &ModelSpec,
    own: &TokenInputs,
    token: u32,
    row: &mut [f32],
) {
    let table = weights.matrix(own.table, spec.n_vocab, own.proj.n_out);
    row.fill(0.0);
    if let Some(bytes) = table.row_in(token as usize, &mut Vec::new()) {
        dequantize_row(table.ty(), bytes, row);
    }
}

/// Multiplies rows by the layer's factor, if it has one.
pub(super) fn scale_rows(weights: &DenseWeights, scale: Option<TensorId>, x: &mut [f32]) {
    if let Some(&[scale]) = weights.opt_vector(scale) {
        x.iter_mut().for_each(|x| *x *= scale);
    }
}
