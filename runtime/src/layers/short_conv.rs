//! Gated short convolution: with the thirds `b`, `c`, `x` of a projection of token `t`,
//! `y[t] = c[t] · Σᵢ w[i] (b · x)[t - taps + 1 + i]`, each channel by itself, and zeros before the
//! text (LFM2, arXiv 2511.23404).
//!
//! A batch gives the same bits as its tokens one by one: a channel's sum runs over its taps in
//! order, oldest first.

use super::mixer::MixerInput;
use super::recurrent::{RecurrentState, copy_mixer_state};
use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::weights::DenseWeights;
use std::ops::Range;
use tier_plan_formats::model::spec::ShortConvSpec;
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{Activations, needs_quants};

/// Buffers of a short convolution, as long as the largest batch of the largest layer.
#[derive(Default)]
pub(super) struct ShortConvScratch {
    /// `[tokens, 3 * channels]`: the projection; its first third becomes `b · x`.
    projected: Vec<f32>,
    /// `[tokens, channels]`.
    mixed: Vec<f32>,
    acts: Option<Activations>,
    acts_width: usize,
}

impl ShortConvScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &ShortConvSpec) {
        let grow = |buffer: &mut Vec<f32>, width: usize| {
            if buffer.len() < rows * width {
                buffer.resize(rows * width, 0.0);
            }
        };
        grow(&mut self.projected, 3 * spec.channels);
        grow(&mut self.mixed, spec.channels);
        if self.acts_width < spec.channels {
            self.acts_width = spec.channels;
            self.acts = Some(Activations::new(rows, spec.channels));
        }
    }
}

/// Computes the layer's result, and takes the state of each text past its tokens.
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &ShortConvSpec,
    input: &MixerInput<'_>,
    states: &mut [RecurrentState],
    s: &mut ShortConvScratch,
    out: &mut [f32],
) {
    let (n, width) = (input.x.rows(), spec.channels);
    let projected = &mut s.projected[..n * 3 * width];
    let jobs = [MatJob::new(weights.linear(&spec.input), input.x, projected)];
    matmul_all(c.pool, c.kernels, &jobs);
    add_bias(projected, weights.bias(&spec.input));
    c.pool.for_each_slice(projected, 3 * width, |_, row| {
        let (b, rest) = row.split_at_mut(width);
        let x = &rest[width..];
        b.iter_mut().zip(x).for_each(|(b, x)| *b *= x);
    });
    let taps = weights.vector(spec.conv);
    for segment in input.segments {
        for (rows, checkpoint) in segment.parts() {
            let past = &mut states[segment.state as usize].inputs;
            convolve(c, spec, taps, rows, past, s);
            if let Some(to) = checkpoint {
                copy_mixer_state(states, segment.state, to);
            }
        }
    }
    let mixed = &s.mixed[..n * width];
    let Some(acts) = &mut s.acts else {
        unreachable!("reserved at load")
    };
    let quantize = needs_quants(weights.ty(spec.out.weight));
    acts.fill_shared(c.pool, c.kernels, n, width, mixed, quantize);
    let jobs = [MatJob::new(weights.linear(&spec.out), acts.view(), out)];
    matmul_all(c.pool, c.kernels, &jobs);
    add_bias(out, weights.bias(&spec.out));
}

/// Convolves some rows of one text after `past`, `[taps - 1, channels]`, which then ends with them.
fn convolve(
    c: CpuContext<'_>,
    spec: &ShortConvSpec,
    weights: &[f32],
    rows: Range<usize>,
    past: &mut [f32],
    s: &mut ShortConvScratch,
) {
    let (width, taps, keep) = (spec.channels, spec.taps, spec.taps - 1);
    let projected = &s.projected[rows.start * 3 * width..rows.end * 3 * width];
    let input = |t: usize| &projected[t * 3 * width..][..width];
    let mixed = &mut s.mixed[rows.start * width..rows.end * width];
    let before = &*past;
    c.pool.for_each_slice(mixed, width, |t, mixed| {
        mixed.fill(0.0);
        for tap in 0..taps {
            let seen = match (t + tap).checked_sub(keep) {
                Some(at) => input(at),
                None => &before[(t + tap) * width..][..width],
            };
            let weights = weights.iter().skip(tap).step_by(taps);
            for ((to, x), w) in mixed.iter_mut().zip(seen).zip(weights) {
                *to += w * x;
            }
        }
        let gate = &projected[(3 * t + 1) * width..][..width];
        mixed.iter_mut().zip(gate).for_each(|(to, c)| *to *= c);
    });
    let (n, new) = (rows.len(), rows.len().min(keep));
    past.copy_within(new * width.., 0);
    for i in keep - new..keep {
        past[i * width..][..width].copy_from_slice(input(n + i - keep));
    }
}
