//! Mamba-2 (arXiv 2405.21060): a short convolution over the last tokens, then a recurrence over one
//! matrix per head; see [`MambaSpec`] for the formulas.
//!
//! A head takes all tokens of a batch in one go while its matrix stays in the CPU's cache. Heads run
//! in parallel. A batch gives the same bits as its tokens one by one.

use super::cpu_context::{CpuContext, add_bias};
use super::mixer::MixerInput;
use super::recurrent::{RecurrentState, copy_mixer_state};
use super::weights::DenseWeights;
use std::ops::Range;
use tier_plan_formats::model::spec::MambaSpec;
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{Activations, needs_quants};

/// Makes the state of no token: the convolution's inputs, `[conv_taps - 1, channels]`, the newest
/// last, and the matrices, `[n_head, head_dim, state_dim]`.
pub(super) fn new_state(spec: &MambaSpec, ngram: usize) -> RecurrentState {
    RecurrentState::new(
        (spec.conv_taps - 1) * spec.channels(),
        spec.inner() * spec.state_dim,
        ngram,
    )
}

/// Buffers of a Mamba-2 mixer, as long as the largest batch of the largest layer.
#[derive(Default)]
pub(super) struct MambaScratch {
    /// Result of the input matrix, `[tokens, 2 * inner + 2 * n_group * state_dim + n_head]`.
    projected: Vec<f32>,
    /// `[tokens, channels]`: `x`, `B` and `C` after the convolution.
    mixed_in: Vec<f32>,
    /// `[n_head, tokens of a text, head_dim]`: what is read of the matrices.
    read: Vec<f32>,
    /// `[tokens, inner]`: gated, then normalized.
    mixed: Vec<f32>,
    acts: Option<Activations>,
    acts_width: usize,
}

impl MambaScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &MambaSpec) {
        let grow = |buffer: &mut Vec<f32>, width: usize| {
            if buffer.len() < rows * width {
                buffer.resize(rows * width, 0.0);
            }
        };
        grow(&mut self.projected, spec.input.n_out);
        grow(&mut self.mixed_in, spec.channels());
        grow(&mut self.read, spec.inner());
        grow(&mut self.mixed, spec.inner());
        if self.acts_width < spec.inner() {
            self.acts_width = spec.inner();
            self.acts = Some(Activations::new(rows, spec.inner()));
        }
    }
}

/// The vectors of parameters of a layer.
struct Parameters<'a> {
    spec: &'a MambaSpec,
    conv: &'a [f32],
    conv_bias: Option<&'a [f32]>,
    dt_bias: &'a [f32],
    decay: &'a [f32],
    skip: &'a [f32],
    norm: &'a [f32],
    norm_eps: f32,
}

/// Computes `out = o(norm(mamba(conv(x)) · silu(z)))`, and takes the state of each text past its
/// tokens.
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &MambaSpec,
    input: &MixerInput<'_>,
    states: &mut [RecurrentState],
    s: &mut MambaScratch,
    out: &mut [f32],
) {
    let n = input.x.rows();
    let projected = &mut s.projected[..n * spec.input.n_out];
    let job = MatJob::new(weights.linear(&spec.input), input.x, projected);
    matmul_all(c.pool, c.kernels, &[job]);
    add_bias(
        &mut s.projected[..n * spec.input.n_out],
        weights.bias(&spec.input),
    );
    let parameters = Parameters {
        spec,
        conv: weights.vector(spec.conv),
        conv_bias: weights.opt_vector(spec.conv_bias),
        dt_bias: weights.vector(spec.dt_bias),
        decay: weights.vector(spec.decay),
        skip: weights.vector(spec.skip),
        norm: weights.vector(spec.norm),
        norm_eps: input.norm_eps,
    };
    for segment in input.segments {
        for (rows, checkpoint) in segment.parts() {
            let state = &mut states[segment.state as usize];
            if !rows.is_empty() {
                convolve(c, &parameters, rows.clone(), &mut state.inputs, s);
                recur(c, &parameters, rows.clone(), &mut state.matrices, s);
                gate(c, &parameters, rows, s);
            }
            if let Some(to) = checkpoint {
                copy_mixer_state(states, segment.state, to);
            }
        }
    }
    let mixed = &s.mixed[..n * spec.inner()];
    let Some(acts) = &mut s.acts else {
        unreachable!("reserved at load")
    };
    let quantize = needs_quants(weights.ty(spec.out.weight));
    acts.fill_shared(c.pool, c.kernels, n, spec.inner(), mixed, quantize);
    let job = MatJob::new(weights.linear(&spec.out), acts.view(), out);
    matmul_all(c.pool, c.kernels, &[job]);
    add_bias(out, weights.bias(&spec.out));
}

/// Convolves the channels of the rows of one text: `silu(bias + Σ_j w[j] x[t - (taps - 1) + j])`.
fn convolve(
    c: CpuContext<'_>,
    p: &Parameters<'_>,
    rows: Range<usize>,
    past: &mut [f32],
    s: &mut MambaScratch,
) {
    let (spec, channels) = (p.spec, p.spec.channels());
    let (taps, keep, n) = (spec.conv_taps, spec.conv_taps - 1, rows.len());
    let (width, column) = (spec.input.n_out, spec.inner());
    let projected = &s.projected[rows.start * width..];
    let input = |t: usize| &projected[t * width + column..][..channels];
    let old = &*past;
    let result = &mut s.mixed_in[rows.start * channels..rows.end * channels];
    c.pool.for_each_slice(result, channels, |t, row| {
        match p.conv_bias {
            Some(bias) => row.copy_from_slice(bias),
            None => row.fill(0.0),
        }
        for tap in 0..taps {
            let seen = match (t + tap).checked_sub(keep) {
                Some(at) => input(at),
                None => &old[(t + tap) * channels..][..channels],
            };
            let weights = p.conv.iter().skip(tap).step_by(taps);
            for ((sum, x), w) in row.iter_mut().zip(seen).zip(weights) {
                *sum += w * x;
            }
        }
        row.iter_mut().for_each(|v| *v = silu(*v));
    });
    let new = n.min(keep);
    past.copy_within(new * channels.., 0);
    for i in keep - new..keep {
        past[i * channels..][..channels].copy_from_slice(input(n + i - keep));
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// Returns `ln(1 + eˣ)`, which is `x` to the last bit where `eˣ` could overflow.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Takes the matrices of one text through its rows, and reads them with each row's `C`.
fn recur(
    c: CpuContext<'_>,
    p: &Parameters<'_>,
    rows: Range<usize>,
    matrices: &mut [f32],
    s: &mut MambaScratch,
) {
    let (spec, channels, width) = (p.spec, p.spec.channels(), p.spec.input.n_out);
    let (dim, state_dim, inner) = (spec.head_dim, spec.state_dim, spec.inner());
    let projected = &s.projected[rows.start * width..];
    let mixed_in = &s.mixed_in[rows.start * channels..];
    let read = &mut s.read[rows.start * inner..rows.end * inner];
    c.pool
        .for_each_pair(spec.n_head, read, matrices, |head, read, matrix| {
            let group = head / (spec.n_head / spec.n_group);
            for (t, y) in read.chunks_exact_mut(dim).enumerate() {
                let dt = projected[t * width + width - spec.n_head + head] + p.dt_bias[head];
                let dt = softplus(dt);
                let decay = (dt * p.decay[head]).exp();
                let row = &mixed_in[t * channels..][..channels];
                let (x, rest) = row.split_at(inner);
                let (b, reader) = rest.split_at(spec.n_group * state_dim);
                let b = &b[group * state_dim..][..state_dim];
                let reader = &reader[group * state_dim..][..state_dim];
                let x = &x[head * dim..][..dim];
                let states = matrix.chunks_exact_mut(state_dim);
                for ((y, x), state) in y.iter_mut().zip(x).zip(states) {
                    c.kernels.axpby(decay, state, dt * x, b);
                    *y = c.kernels.dot(state, reader) + p.skip[head] * x;
                }
            }
        });
}

/// Multiplies what the rows of one text have read by the silu of their gates, and then normalizes
/// each group.
fn gate(c: CpuContext<'_>, p: &Parameters<'_>, rows: Range<usize>, s: &mut MambaScratch) {
    let (spec, width, n) = (p.spec, p.spec.input.n_out, rows.len());
    let (dim, inner) = (spec.head_dim, spec.inner());
    let (group_width, heads) = (inner / spec.n_group, spec.n_head / spec.n_group);
    let (read, projected) = (
        &s.read[rows.start * inner..],
        &s.projected[rows.start * width..],
    );
    let mixed = &mut s.mixed[rows.start * inner..rows.end * inner];
    c.pool.for_each_slice(mixed, group_width, |item, mixed| {
        let (t, group) = (item / spec.n_group, item % spec.n_group);
        let gates = &projected[t * width + group * group_width..][..group_width];
        let head_rows = mixed.chunks_exact_mut(dim).zip(gates.chunks_exact(dim));
        for (i, (mixed, gates)) in head_rows.enumerate() {
            let read = &read[((group * heads + i) * n + t) * dim..][..dim];
            for ((mixed, gate), read) in mixed.iter_mut().zip(gates).zip(read) {
                *mixed = read * silu(*gate);
            }
        }
        let squares = c.kernels.dot(mixed, mixed);
        let factor = 1.0 / (squares / group_width as f32 + p.norm_eps).sqrt();
        let norm = &p.norm[group * group_width..][..group_width];
        mixed
            .iter_mut()
            .zip(norm)
            .for_each(|(v, w)| *v *= factor * w);
    });
}

#[cfg(test)]
mod tests;
