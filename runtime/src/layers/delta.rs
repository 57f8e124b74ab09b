//! Gated delta net: a short convolution over the last tokens, then a recurrence over one matrix per
//! value head.
//!
//! Queries, keys and values lie apart by head, so that a head takes all tokens of a batch in one go
//! while its state stays in the CPU's cache. Heads run in parallel. A batch gives the same bits as
//! its tokens one by one.

use super::mixer::MixerInput;
use super::recurrent::{RecurrentState, copy_mixer_state};
use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::weights::DenseWeights;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::{DeltaGate, DeltaInput, DeltaRates, DeltaSpec};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{Activations, DeltaStep, MAX_CONV_TAPS, delta_columns, needs_quants};

thread_local! {
    /// One head's result, before and after its norm; one buffer per thread.
    static HEAD: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Makes the state of no token: the convolution's inputs, `[heads, conv_taps - 1, head_dim]`, the
/// newest last, and the matrices, `[n_value_head, head_dim / columns, head_dim, columns]`: a few
/// columns of a matrix are one job.
pub(super) fn new_state(spec: &DeltaSpec, ngram: usize) -> RecurrentState {
    RecurrentState::new(
        (spec.conv_taps - 1) * spec.channels(),
        spec.n_value_head * spec.head_dim * spec.head_dim,
        ngram,
    )
}

/// Buffers of a delta-net mixer, as long as the largest batch of the largest layer.
#[derive(Default)]
pub(super) struct DeltaScratch {
    /// Result of the first or only input matrix, `[tokens, projected_width]`.
    projected: Vec<f32>,
    /// Output gates where they have a matrix of their own, `[tokens, n_value_head * head_dim]`.
    gate: Vec<f32>,
    /// Results of the matrices of the rates, `[tokens, 2 * n_value_head]`.
    raw_rates: Vec<f32>,
    /// `[tokens, n_value_head, 2]`: decay and beta.
    rates: Vec<f32>,
    /// `[heads, tokens, head_dim]`: queries, keys and values after the convolution.
    heads: Vec<f32>,
    /// `[n_value_head, head_dim / columns, tokens, columns]`: what the queries read of the
    /// matrices.
    read: Vec<f32>,
    /// `[tokens, n_value_head * head_dim]`.
    mixed: Vec<f32>,
    acts: Option<Activations>,
    acts_width: usize,
}

impl DeltaScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &DeltaSpec) {
        let grow = |buffer: &mut Vec<f32>, width: usize| {
            if buffer.len() < rows * width {
                buffer.resize(rows * width, 0.0);
            }
        };
        match &spec.input {
            DeltaInput::Split { qkv, gate } => {
                grow(&mut self.projected, qkv.n_out);
                grow(&mut self.gate, gate.n_out);
            }
            DeltaInput::ByKeyHead(all) => grow(&mut self.projected, all.n_out),
        }
        grow(&mut self.raw_rates, 2 * spec.n_value_head);
        grow(&mut self.rates, 2 * spec.n_value_head);
        grow(&mut self.heads, spec.channels());
        grow(&mut self.read, spec.out.n_in);
        grow(&mut self.mixed, spec.out.n_in);
        if self.acts_width < spec.out.n_in {
            self.acts_width = spec.out.n_in;
            self.acts = Some(Activations::new(rows, spec.out.n_in));
        }
    }
}

/// Columns of heads, gates and rates in a row of projections.
#[derive(Clone, Copy)]
struct Layout<'a> {
    spec: &'a DeltaSpec,
    /// Value heads per key head.
    group: usize,
}

impl<'a> Layout<'a> {
    fn new(spec: &'a DeltaSpec) -> Self {
        Self {
            spec,
            group: spec.n_value_head / spec.n_key_head,
        }
    }

    /// Returns the width of a row.
    fn projected_width(self) -> usize {
        match &self.spec.input {
            DeltaInput::Split { qkv, .. } => qkv.n_out,
            DeltaInput::ByKeyHead(all) => all.n_out,
        }
    }

    /// Returns the first column of a key head's section, where rows are sections by key head.
    fn key_head_section(self, key_head: usize) -> usize {
        key_head * (2 + 2 * self.group) * self.spec.head_dim
    }

    /// Returns the first column of a head: query heads, then key heads, then value heads.
    fn head(self, head: usize) -> usize {
        let (n_key, dim) = (self.spec.n_key_head, self.spec.head_dim);
        match self.spec.input {
            DeltaInput::Split { .. } => head * dim,
            DeltaInput::ByKeyHead(_) if head < n_key => self.key_head_section(head),
            DeltaInput::ByKeyHead(_) if head < 2 * n_key => {
                self.key_head_section(head - n_key) + dim
            }
            DeltaInput::ByKeyHead(_) => {
                let value_head = head - 2 * n_key;
                self.key_head_section(value_head / self.group) + (2 + value_head % self.group) * dim
            }
        }
    }

    /// Returns the first column of a value head's output gate.
    fn gate(self, value_head: usize) -> usize {
        let dim = self.spec.head_dim;
        match self.spec.input {
            DeltaInput::Split { .. } => value_head * dim,
            DeltaInput::ByKeyHead(_) => {
                self.key_head_section(value_head / self.group)
                    + (2 + self.group + value_head % self.group) * dim
            }
        }
    }

    /// Returns the indices of a value head's beta and decay among the raw rates of `n` tokens.
    fn rates(self, n: usize, token: usize, value_head: usize) -> (usize, usize) {
        let n_value = self.spec.n_value_head;
        match self.spec.rates {
            DeltaRates::Split { .. } => {
                let at = token * n_value + value_head;
                (at, n * n_value + at)
            }
            DeltaRates::ByKeyHead(_) => {
                let first = 2 * (token * n_value + value_head / self.group * self.group);
                (
                    first + value_head % self.group,
                    first + self.group + value_head % self.group,
                )
            }
        }
    }
}

/// Computes `out = o(norm(delta(conv(qkv x))) · act(gate x))`, and takes the state of each text
/// past its tokens.
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &DeltaSpec,
    input: &MixerInput<'_>,
    states: &mut [RecurrentState],
    s: &mut DeltaScratch,
    out: &mut [f32],
) {
    let n = input.x.rows();
    project(c, weights, spec, input, s);
    rates(c, weights, spec, n, s);
    let (conv, norm) = (weights.vector(spec.conv), weights.vector(spec.norm));
    for segment in input.segments {
        for (rows, checkpoint) in segment.parts() {
            let state = &mut states[segment.state as usize];
            if !rows.is_empty() {
                let inputs = &mut state.inputs;
                convolve(c, conv, spec, input.norm_eps, rows.clone(), inputs, s);
                recur(c, spec, rows.clone(), &mut state.matrices, s);
                gate(c, norm, spec, input.norm_eps, rows, s);
            }
            if let Some(to) = checkpoint {
                copy_mixer_state(states, segment.state, to);
            }
        }
    }
    let mixed = &s.mixed[..n * spec.out.n_in];
    let Some(acts) = &mut s.acts else {
        unreachable!("reserved at load")
    };
    acts.fill_shared(
        c.pool,
        c.kernels,
        n,
        spec.out.n_in,
        mixed,
        needs_quants(weights.ty(spec.out.weight)),
    );
    matmul_all(
        c.pool,
        c.kernels,
        &[MatJob::new(weights.linear(&spec.out), acts.view(), out)],
    );
    add_bias(out, weights.bias(&spec.out));
}

fn project(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &DeltaSpec,
    input: &MixerInput<'_>,
    s: &mut DeltaScratch,
) {
    let (x, n) = (input.x, input.x.rows());
    let (first, second) = match &spec.input {
        DeltaInput::Split { qkv, gate } => (qkv, Some(gate)),
        DeltaInput::ByKeyHead(all) => (all, None),
    };
    let projected = &mut s.projected[..n * first.n_out];
    let mut products = vec![(first, projected)];
    if let Some(second) = second {
        products.push((second, &mut s.gate[..n * second.n_out]));
    }
    let raw = &mut s.raw_rates[..2 * n * spec.n_value_head];
    match &spec.rates {
        DeltaRates::Split { beta, alpha } => {
            let (for_beta, for_alpha) = raw.split_at_mut(n * spec.n_value_head);
            products.extend([(beta, for_beta), (alpha, for_alpha)]);
        }
        DeltaRates::ByKeyHead(all) => products.push((all, raw)),
    }
    let jobs: Vec<_> = products
        .iter_mut()
        .map(|(l, out)| MatJob::new(weights.linear(l), x, out))
        .collect();
    matmul_all(c.pool, c.kernels, &jobs);
    for (linear, out) in products {
        add_bias(out, weights.bias(linear));
    }
}

/// Computes decays and betas.
fn rates(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &DeltaSpec,
    n: usize,
    s: &mut DeltaScratch,
) {
    let (bias, decay) = (weights.vector(spec.dt_bias), weights.vector(spec.decay));
    let (layout, raw) = (Layout::new(spec), &s.raw_rates);
    let width = 2 * spec.n_value_head;
    c.pool
        .for_each_slice(&mut s.rates[..n * width], width, |t, row| {
            for (head, rates) in row.chunks_exact_mut(2).enumerate() {
                let (beta, alpha) = layout.rates(n, t, head);
                rates[0] = (decay[head] * softplus(raw[alpha] + bias[head])).exp();
                rates[1] = 1.0 / (1.0 + (-raw[beta]).exp());
            }
        });
}

/// Returns `ln(1 + eˣ)`, which is `x` to the last bit where `eˣ` could overflow.
pub(super) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Convolves all heads of the rows of one text, and scales queries and keys to length 1.
fn convolve(
    c: CpuContext<'_>,
    weight: &[f32],
    spec: &DeltaSpec,
    eps: f32,
    rows: Range<usize>,
    past: &mut [f32],
    s: &mut DeltaScratch,
) {
    let layout = Layout::new(spec);
    let (n_key, width) = (spec.n_key_head, layout.projected_width());
    let heads = ConvHeads {
        n_query: n_key,
        n_key,
        n_value: spec.n_value_head,
        dim: spec.head_dim,
        taps: spec.conv_taps,
        eps,
    };
    let (len, per_head) = (heads.len() * heads.dim, heads.dim * heads.taps);
    let projected = &s.projected[rows.start * width..];
    convolve_heads(
        c,
        heads,
        |head| &weight[head * per_head..][..per_head],
        |head, t| &projected[t * width + layout.head(head)..][..heads.dim],
        past,
        &mut s.heads[rows.start * len..rows.end * len],
    );
}

/// Heads that are convolved: queries, then keys, then values.
#[derive(Clone, Copy)]
pub(super) struct ConvHeads {
    pub n_query: usize,
    pub n_key: usize,
    pub n_value: usize,
    /// Width of a head.
    pub dim: usize,
    /// Tokens that the convolution sees, its own included.
    pub taps: usize,
    /// Added to the squared length of queries and keys.
    pub eps: f32,
}

impl ConvHeads {
    pub(super) fn len(&self) -> usize {
        self.n_query + self.n_key + self.n_value
    }
}

/// Convolves heads of consecutive tokens, and scales queries and keys to length 1. Queries are also
/// divided by the root of the width.
///
/// `weight` returns a head's weights, `[dim, taps]`, and `input` its inputs at a token. `past` has
/// the inputs of the tokens before, `[heads, taps - 1, dim]`; `out` is `[heads, tokens, dim]`.
pub(super) fn convolve_heads<'a>(
    c: CpuContext<'_>,
    heads: ConvHeads,
    weight: impl Fn(usize) -> &'a [f32] + Sync,
    input: impl Fn(usize, usize) -> &'a [f32] + Sync,
    past: &mut [f32],
    out: &mut [f32],
) {
    let ConvHeads {
        n_query,
        dim,
        taps,
        eps,
        ..
    } = heads;
    let (n_normed, keep) = (n_query + heads.n_key, taps - 1);
    c.pool
        .for_each_pair(heads.len(), out, past, |head, rows, past| {
            let (weight, n) = (weight(head), rows.len() / dim);
            let scale = if head < n_query {
                1.0 / (dim as f32).sqrt()
            } else {
                1.0
            };
            for (t, row) in rows.chunks_exact_mut(dim).enumerate() {
                let mut seen: [&[f32]; MAX_CONV_TAPS] = [&[]; MAX_CONV_TAPS];
                for (i, seen) in seen[..taps].iter_mut().enumerate() {
                    let at = t + i;
                    *seen = if at < keep {
                        &past[at * dim..][..dim]
                    } else {
                        input(head, at - keep)
                    };
                }
                c.kernels.conv_silu(&seen[..taps], weight, row);
                if head < n_normed {
                    let squares = c.kernels.dot(row, row) + eps;
                    let factor = scale / squares.max(f32::MIN_POSITIVE).sqrt();
                    row.iter_mut().for_each(|v| *v *= factor);
                }
            }
            let new = n.min(keep);
            past.copy_within(new * dim.., 0);
            for i in keep - new..keep {
                past[i * dim..][..dim].copy_from_slice(input(head, n + i - keep));
            }
        });
}

/// Takes the matrices of one text through its rows, and reads them with each row's query.
fn recur(
    c: CpuContext<'_>,
    spec: &DeltaSpec,
    rows: Range<usize>,
    matrices: &mut [f32],
    s: &mut DeltaScratch,
) {
    let (dim, n_key, n_value) = (spec.head_dim, spec.n_key_head, spec.n_value_head);
    let columns = delta_columns(dim);
    let parts = dim / columns;
    let n = rows.len();
    let heads = &s.heads[rows.start * (2 * n_key + n_value) * dim..];
    let rates = &s.rates[rows.start * 2 * n_value..];
    c.pool.for_each_pair(
        n_value * parts,
        &mut s.read[rows.start * n_value * dim..rows.end * n_value * dim],
        matrices,
        |item, out, matrix| {
            let (head, part) = (item / parts, item % parts);
            let rows = |head: usize| heads[head * n * dim..][..n * dim].chunks_exact(dim);
            let key_head = spec.key_head(head);
            let inputs = rows(key_head)
                .zip(rows(n_key + key_head))
                .zip(rows(2 * n_key + head));
            for (t, (((query, key), value), out)) in
                inputs.zip(out.chunks_exact_mut(columns)).enumerate()
            {
                let at = 2 * (t * n_value + head);
                let step = DeltaStep {
                    query,
                    key,
                    value: &value[part * columns..][..columns],
                    decay: rates[at],
                    beta: rates[at + 1],
                };
                c.kernels.delta_step(matrix, &step, out);
            }
        },
    );
}

/// Normalizes each head's result of the rows of one text and multiplies it by its gate: the SiLU or
/// the sigmoid of what the gate's matrix gives.
fn gate(
    c: CpuContext<'_>,
    norm: &[f32],
    spec: &DeltaSpec,
    eps: f32,
    rows: Range<usize>,
    s: &mut DeltaScratch,
) {
    let layout = Layout::new(spec);
    let (dim, n_value) = (spec.head_dim, spec.n_value_head);
    let columns = delta_columns(dim);
    let parts = dim / columns;
    let (gates, width) = match &spec.input {
        DeltaInput::Split { gate, .. } => (&s.gate, gate.n_out),
        DeltaInput::ByKeyHead(all) => (&s.projected, all.n_out),
    };
    let (n, row_len) = (rows.len(), n_value * dim);
    let (read, gates) = (
        &s.read[rows.start * row_len..],
        &gates[rows.start * width..],
    );
    let mixed = &mut s.mixed[rows.start * row_len..rows.end * row_len];
    c.pool.for_each_slice(mixed, dim, |item, mixed| {
        let (t, head) = (item / n_value, item % n_value);
        mixed.copy_from_slice(&gates[t * width + layout.gate(head)..][..dim]);
        HEAD.with_borrow_mut(|buffer| {
            buffer.resize(2 * dim, 0.0);
            let (plain, normed) = buffer.split_at_mut(dim);
            for (part, to) in plain.chunks_exact_mut(columns).enumerate() {
                to.copy_from_slice(&read[((head * parts + part) * n + t) * columns..][..columns]);
            }
            c.kernels.rms_norm(plain, norm, eps, normed);
            match spec.gate {
                DeltaGate::Silu => c.kernels.silu_mul(mixed, normed),
                DeltaGate::Sigmoid => {
                    mixed.iter_mut().for_each(|gate| *gate = -*gate);
                    c.kernels.exp(mixed);
                    for (mixed, normed) in mixed.iter_mut().zip(normed) {
                        *mixed = *normed / (1.0 + *mixed);
                    }
                }
            }
        });
    });
}

#[cfg(test)]
mod tests;
