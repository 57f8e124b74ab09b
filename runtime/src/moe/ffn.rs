//! Gated feed-forward blocks on the CPU: dense blocks, shared experts, and what routed experts
//! share with them.

use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::weights::DenseWeights;
use tier_plan_formats::model::spec::{Activation, GatedFfn, MoeSpec, SharedSpec};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, Activations, Kernels, needs_quants};

/// Buffers of the feed-forward blocks.
pub(crate) struct FfnScratch {
    /// `[rows, ffn]`.
    pub(super) gate: Vec<f32>,
    /// `[rows, ffn]`.
    pub(super) up: Vec<f32>,
    /// `[rows, ffn]`: the activated `gate`, as the matrix `down` takes it.
    pub(super) inner: Activations,
    /// Which rows of a batch these are.
    pub(super) rows_of_x: Vec<usize>,
    /// `[rows, hidden]`: the rows of a batch that experts take.
    pub(super) gathered: Activations,
    /// One bias, decoded.
    pub(super) bias: Vec<f32>,
    /// `[rows, hidden]`: results of experts before they are weighted and summed.
    pub(super) results: Vec<f32>,
    /// What is added up of them.
    pub(super) sums: Sums,
    /// Rows that a block takes at once, at most.
    pub(super) rows: usize,
}

/// Which results are added up for which token: those of token `t` are
/// `terms[starts[t]..starts[t + 1]]`.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) starts: Vec<usize>,
    /// Where the next term of each token goes while they are written.
    pub(super) next: Vec<usize>,
    pub(super) terms: Vec<Term>,
}

/// A result, and its factor in the sum.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Term {
    pub(super) row: usize,
    pub(super) weight: f32,
}

impl FfnScratch {
    /// Makes buffers for up to `rows` tokens at once, and for blocks that are at most `ffn` wide.
    pub(crate) fn new(rows: usize, hidden: usize, ffn: usize, n_used: usize) -> Self {
        let rows = rows.max(n_used);
        Self {
            rows,
            gate: vec![0.0; rows * ffn],
            up: vec![0.0; rows * ffn],
            inner: Activations::new(rows, ffn),
            rows_of_x: Vec::with_capacity(rows),
            gathered: Activations::new(rows, hidden),
            bias: Vec::with_capacity(ffn.max(hidden)),
            results: vec![0.0; rows * hidden],
            sums: Sums::default(),
        }
    }
}

/// Computes `out = down(act(gate x) · up x)` for all rows of `x`, or `down(act(up x))` without a
/// gate.
pub(crate) fn dense_ffn(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    ffn: &GatedFfn,
    x: ActView<'_>,
    s: &mut FfnScratch,
    out: &mut [f32],
) {
    let rows = x.rows();
    let width = ffn.up.n_out;
    let (gate, up) = (&mut s.gate[..rows * width], &mut s.up[..rows * width]);
    let mut jobs = vec![MatJob::new(weights.linear(&ffn.up), x, up)];
    if let Some(linear) = &ffn.gate {
        jobs.push(MatJob::new(weights.linear(linear), x, gate));
    }
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    if let Some(linear) = &ffn.gate {
        add_bias(gate, weights.bias(linear));
    }
    add_bias(up, weights.bias(&ffn.up));
    activate_shared(c, ffn.activation, width, gate, up);
    s.inner.fill_shared(
        c.pool,
        c.kernels,
        rows,
        width,
        gate,
        needs_quants(weights.ty(ffn.down.weight)),
    );
    matmul_all(
        c.pool,
        c.kernels,
        &[MatJob::new(weights.linear(&ffn.down), s.inner.view(), out)],
    );
    add_bias(out, weights.bias(&ffn.down));
}

/// Computes the shared expert of a layer for all rows of `x`. `values` are these rows as floats,
/// `[rows, hidden]`.
pub(crate) fn shared_expert(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    shared: &SharedSpec,
    x: ActView<'_>,
    values: &[f32],
    s: &mut FfnScratch,
    out: &mut [f32],
) {
    dense_ffn(c, weights, &shared.ffn, x, s, out);
    if let Some(gate) = weights.opt_vector(shared.gate) {
        let width = gate.len();
        for (x, out) in values.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let factor = 1.0 / (1.0 + (-c.kernels.dot(gate, x)).exp());
            out.iter_mut().for_each(|o| *o *= factor);
        }
    }
}

/// Multiplies the rows of both first products by the weights of their experts: as products are
/// linear, this is what inputs times the weights would give.
pub(super) fn weigh(
    gate: &mut [f32],
    up: &mut [f32],
    width: usize,
    weights: impl Iterator<Item = f32>,
) {
    let rows = gate.chunks_exact_mut(width).zip(up.chunks_exact_mut(width));
    for ((gate, up), weight) in rows.zip(weights) {
        gate.iter_mut().for_each(|x| *x *= weight);
        up.iter_mut().for_each(|x| *x *= weight);
    }
}

/// Returns the factor on an expert's result.
pub(super) fn result_weight(moe: &MoeSpec, weight: f32) -> f32 {
    if moe.weigh_input { 1.0 } else { weight }
}

/// Multiplies the activated `gate` by `up`, in place; of an activation without a gate, writes `gate`.
pub(super) fn activate(kernels: Kernels, activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => kernels.silu_mul(gate, up),
        Activation::SquaredRelu => {
            for (to, up) in gate.iter_mut().zip(up) {
                // Compared rather than clamped: a NaN goes through.
                let positive = if *up < 0.0 { 0.0 } else { *up };
                *to = positive * positive;
            }
        }
        Activation::ClampedSilu { limit } => {
            // What is at most the limit has a SiLU below it, so that only the gate's is left.
            for gate in gate.iter_mut().filter(|gate| **gate > limit) {
                *gate = limit;
            }
            kernels.limited_silu_mul(gate, up, limit);
        }
        Activation::Gelu => kernels.gelu_mul(gate, up),
        Activation::LimitedSilu { limit } => kernels.limited_silu_mul(gate, up, limit),
        Activation::Situ { beta, linear } => kernels.situ_mul(gate, up, beta, linear),
        Activation::ClampedSwiglu { alpha, limit } => {
            kernels.clamped_swiglu(gate, up, alpha, limit)
        }
    }
}

/// [`activate`] for `[rows, width]`, split among the threads.
pub(super) fn activate_shared(
    c: CpuContext<'_>,
    activation: Activation,
    width: usize,
    gate: &mut [f32],
    up: &[f32],
) {
    c.pool.for_each_slice(gate, width, |row, gate| {
        activate(c.kernels, activation, gate, &up[row * width..][..width])
    });
}
