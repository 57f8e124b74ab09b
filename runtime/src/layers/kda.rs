//! Kimi delta attention (arXiv 2510.26692): a gated delta net whose state decays per key channel.
//!
//! ```text
//! q, k, v = silu(conv(Q x)), silu(conv(K x)), silu(conv(V x))   q and k of length 1, q / sqrt(dim)
//! a = exp(gate(F x + bias))                                     per key channel
//! S = diag(a) S;  S = S + sigmoid(beta x) k (v - S^T k)^T       per head
//! out = O (rms_norm(S^T q) · sigmoid(G x))
//! ```
//!
//! As in the gated delta net, heads lie apart and run in parallel, and a batch gives the same bits
//! as its tokens one by one.

use super::cpu_context::{CpuContext, add_bias};
use super::delta::{ConvHeads, convolve_heads, softplus};
use super::mixer::MixerInput;
use super::recurrent::{RecurrentState, copy_mixer_state};
use super::weights::DenseWeights;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::{DecayGate, KdaSpec, Projection};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, Activations, ChannelDeltaStep, delta_columns, needs_quants};

thread_local! {
    /// One head's result, before and after its norm; one buffer per thread.
    static HEAD: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Makes the state of a text without tokens.
pub(super) fn new_state(spec: &KdaSpec, ngram: usize) -> RecurrentState {
    let width = spec.width();
    let inputs = (spec.conv_taps - 1) * 3 * width;
    RecurrentState::new(inputs, width * spec.head_dim, ngram)
}

/// The result of a projection of one or two matrices, and what is between them.
#[derive(Default)]
struct Projected {
    /// `[tokens, rank]`.
    low: Vec<f32>,
    acts: Activations,
    acts_len: usize,
    /// `[tokens, n_out]`.
    out: Vec<f32>,
}

impl Projected {
    fn reserve(&mut self, rows: usize, projection: &Projection) {
        grow(&mut self.out, rows * projection.n_out());
        if projection.second.is_some() {
            let rank = projection.first.n_out;
            grow(&mut self.low, rows * rank);
            if self.acts_len < rows * rank.next_multiple_of(256) {
                self.acts_len = rows * rank.next_multiple_of(256);
                self.acts = Activations::new(rows, rank);
            }
        }
    }

    /// Returns where the first matrix's result goes.
    fn first(&mut self, rows: usize, projection: &Projection) -> &mut [f32] {
        let to = match projection.second {
            Some(_) => &mut self.low,
            None => &mut self.out,
        };
        &mut to[..rows * projection.first.n_out]
    }

    /// Adds the bias of the first matrix, and prepares its result for the second.
    fn finish_first(
        &mut self,
        c: CpuContext<'_>,
        weights: &DenseWeights,
        projection: &Projection,
        rows: usize,
    ) {
        add_bias(
            self.first(rows, projection),
            weights.bias(&projection.first),
        );
        if let Some(second) = &projection.second {
            let (rank, quantize) = (second.n_in, needs_quants(weights.ty(second.weight)));
            let low = &self.low[..rows * rank];
            self.acts
                .fill_shared(c.pool, c.kernels, rows, rank, low, quantize);
        }
    }
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Buffers of a KDA mixer, as long as the largest batch of the largest layer.
#[derive(Default)]
pub(super) struct KdaScratch {
    /// `[3, tokens, width]`: queries, keys and values before the convolution.
    projected: Vec<f32>,
    /// `[tokens, width]`: inputs of the decays, then the decays.
    decay: Projected,
    /// `[tokens, n_head]`.
    betas: Vec<f32>,
    /// `[tokens, width]`: inputs of the output gates.
    gate: Projected,
    /// `[heads, tokens, head_dim]`: queries, keys and values after the convolution.
    heads: Vec<f32>,
    /// `[n_head, head_dim / columns, tokens, columns]`: what the queries read of the matrices.
    read: Vec<f32>,
    /// `[tokens, width]`.
    mixed: Vec<f32>,
    acts: Activations,
    acts_width: usize,
}

impl KdaScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &KdaSpec) {
        let width = spec.width();
        grow(&mut self.projected, 3 * rows * width);
        self.decay.reserve(rows, &spec.decay);
        grow(&mut self.betas, rows * spec.n_head);
        self.gate.reserve(rows, &spec.gate);
        grow(&mut self.heads, 3 * rows * width);
        grow(&mut self.read, rows * width);
        grow(&mut self.mixed, rows * width);
        if self.acts_width < width {
            self.acts_width = width;
            self.acts = Activations::new(rows, width);
        }
    }
}

/// Computes the layer's output, and takes the state of each text past its tokens.
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &KdaSpec,
    input: &MixerInput<'_>,
    states: &mut [RecurrentState],
    s: &mut KdaScratch,
    out: &mut [f32],
) {
    let n = input.x.rows();
    project(c, weights, spec, input.x, s);
    rates(c, weights, spec, n, s);
    let norm = weights.vector(spec.norm);
    for segment in input.segments {
        for (rows, checkpoint) in segment.parts() {
            let state = &mut states[segment.state as usize];
            if !rows.is_empty() {
                convolve(c, weights, spec, n, rows.clone(), &mut state.inputs, s);
                recur(c, spec, rows.clone(), &mut state.matrices, s);
                gate(c, norm, spec, input.norm_eps, rows, s);
            }
            if let Some(to) = checkpoint {
                copy_mixer_state(states, segment.state, to);
            }
        }
    }
    let width = spec.width();
    let (mixed, quantize) = (
        &s.mixed[..n * width],
        needs_quants(weights.ty(spec.out.weight)),
    );
    s.acts
        .fill_shared(c.pool, c.kernels, n, width, mixed, quantize);
    let job = MatJob::new(weights.linear(&spec.out), s.acts.view(), out);
    matmul_all(c.pool, c.kernels, &[job]);
    add_bias(out, weights.bias(&spec.out));
}

/// Computes all products with the hidden states.
fn project(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &KdaSpec,
    x: ActView<'_>,
    s: &mut KdaScratch,
) {
    let (n, width) = (x.rows(), spec.width());
    let projected = &mut s.projected[..3 * n * width];
    let betas = &mut s.betas[..n * spec.n_head];
    let mut products: Vec<_> = spec
        .qkv
        .iter()
        .zip(projected.chunks_exact_mut(n * width))
        .collect();
    products.push((&spec.beta, &mut *betas));
    let mut jobs: Vec<_> = products
        .iter_mut()
        .map(|(linear, out)| MatJob::new(weights.linear(linear), x, out))
        .collect();
    let parts = [(&spec.decay, &mut s.decay), (&spec.gate, &mut s.gate)];
    let [(decay, to_decay), (gate, to_gate)] = parts;
    jobs.push(MatJob::new(
        weights.linear(&decay.first),
        x,
        to_decay.first(n, decay),
    ));
    jobs.push(MatJob::new(
        weights.linear(&gate.first),
        x,
        to_gate.first(n, gate),
    ));
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    for (linear, out) in products {
        add_bias(out, weights.bias(linear));
    }
    betas
        .iter_mut()
        .for_each(|b| *b = 1.0 / (1.0 + (-*b).exp()));
    s.decay.finish_first(c, weights, &spec.decay, n);
    s.gate.finish_first(c, weights, &spec.gate, n);
    let mut jobs = Vec::with_capacity(2);
    let mut seconds = [(&spec.decay, &mut s.decay), (&spec.gate, &mut s.gate)];
    for (projection, to) in &mut seconds {
        if let Some(second) = &projection.second {
            let out = &mut to.out[..n * second.n_out];
            jobs.push(MatJob::new(weights.linear(second), to.acts.view(), out));
        }
    }
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    for (projection, to) in seconds {
        if let Some(second) = &projection.second {
            add_bias(&mut to.out[..n * second.n_out], weights.bias(second));
        }
    }
}

/// Makes decays of their inputs, in place.
fn rates(c: CpuContext<'_>, weights: &DenseWeights, spec: &KdaSpec, n: usize, s: &mut KdaScratch) {
    let (bias, steepness) = (
        weights.vector(spec.decay_bias),
        weights.vector(spec.steepness),
    );
    let (dim, sign) = (
        spec.head_dim,
        if spec.steepness_negated { -1.0 } else { 1.0 },
    );
    let decays = &mut s.decay.out[..n * spec.width()];
    c.pool.for_each_slice(decays, dim, |item, decays| {
        let head = item % spec.n_head;
        let a = sign * steepness[head];
        let bias = &bias[head * dim..][..dim];
        decays.iter_mut().zip(bias).for_each(|(f, b)| *f += b);
        match spec.decay_gate {
            DecayGate::Softplus => decays.iter_mut().for_each(|f| *f = -a * softplus(*f)),
            DecayGate::Bounded { bound } => {
                decays.iter_mut().for_each(|f| *f *= -a);
                c.kernels.exp(decays);
                decays.iter_mut().for_each(|e| *e = bound / (1.0 + *e));
            }
        }
        c.kernels.exp(decays);
    });
}

/// Convolves the queries, keys and values of the rows of one text.
fn convolve(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &KdaSpec,
    n: usize,
    rows: Range<usize>,
    past: &mut [f32],
    s: &mut KdaScratch,
) {
    let (n_head, dim, width) = (spec.n_head, spec.head_dim, spec.width());
    let heads = ConvHeads {
        n_query: n_head,
        n_key: n_head,
        n_value: n_head,
        dim,
        taps: spec.conv_taps,
        eps: spec.length_eps,
    };
    let conv = spec.conv.map(|id| weights.vector(id));
    let (projected, per_head) = (&s.projected[..3 * n * width], dim * spec.conv_taps);
    let input = |head: usize, t: usize| {
        let (kind, head) = (head / n_head, head % n_head);
        &projected[(kind * n + rows.start + t) * width + head * dim..][..dim]
    };
    convolve_heads(
        c,
        heads,
        |head| &conv[head / n_head][head % n_head * per_head..][..per_head],
        input,
        past,
        &mut s.heads[3 * rows.start * width..3 * rows.end * width],
    );
}

/// Takes the matrices of one text through its rows, and reads them with each row's query.
fn recur(
    c: CpuContext<'_>,
    spec: &KdaSpec,
    rows: Range<usize>,
    matrices: &mut [f32],
    s: &mut KdaScratch,
) {
    let (dim, n_head, width) = (spec.head_dim, spec.n_head, spec.width());
    let columns = delta_columns(dim);
    let (parts, n) = (dim / columns, rows.len());
    let heads = &s.heads[3 * rows.start * width..];
    let decays = &s.decay.out[rows.start * width..];
    let betas = &s.betas[rows.start * n_head..];
    c.pool.for_each_pair(
        n_head * parts,
        &mut s.read[rows.start * width..rows.end * width],
        matrices,
        |item, out, matrix| {
            let (head, part) = (item / parts, item % parts);
            let row =
                |kind: usize, t: usize| &heads[((kind * n_head + head) * n + t) * dim..][..dim];
            for (t, out) in out.chunks_exact_mut(columns).enumerate() {
                let step = ChannelDeltaStep {
                    query: row(0, t),
                    key: row(1, t),
                    value: &row(2, t)[part * columns..][..columns],
                    decay: &decays[t * width + head * dim..][..dim],
                    beta: betas[t * n_head + head],
                };
                c.kernels.channel_delta_step(matrix, &step, out);
            }
        },
    );
}

/// Normalizes each head's result of the rows of one text, and multiplies it by the sigmoid of its
/// gate.
fn gate(
    c: CpuContext<'_>,
    norm: &[f32],
    spec: &KdaSpec,
    eps: f32,
    rows: Range<usize>,
    s: &mut KdaScratch,
) {
    let (dim, n_head, width) = (spec.head_dim, spec.n_head, spec.width());
    let columns = delta_columns(dim);
    let (parts, n) = (dim / columns, rows.len());
    let (read, gates) = (
        &s.read[rows.start * width..],
        &s.gate.out[rows.start * width..],
    );
    let mixed = &mut s.mixed[rows.start * width..rows.end * width];
    c.pool.for_each_slice(mixed, dim, |item, mixed| {
        let (t, head) = (item / n_head, item % n_head);
        let gates = &gates[t * width + head * dim..][..dim];
        mixed.iter_mut().zip(gates).for_each(|(m, g)| *m = -*g);
        c.kernels.exp(mixed);
        HEAD.with_borrow_mut(|buffer| {
            buffer.resize(2 * dim, 0.0);
            let (plain, normed) = buffer.split_at_mut(dim);
            for (part, to) in plain.chunks_exact_mut(columns).enumerate() {
                to.copy_from_slice(&read[((head * parts + part) * n + t) * columns..][..columns]);
            }
            c.kernels.rms_norm(plain, norm, eps, normed);
            mixed
                .iter_mut()
                .zip(&*normed)
                .for_each(|(m, x)| *m = x / (1.0 + *m));
        });
    });
}

#[cfg(test)]
mod tests;
