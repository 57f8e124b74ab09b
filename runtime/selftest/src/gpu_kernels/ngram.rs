//! What n-grams add to several residual streams.

use super::Check;
use super::compressed::{EPS, doubles, normed, within};
use super::texts::{Text, of_first};
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{NgramConv, NgramGate, States};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::new("ngram_gate", gate),
        Check::new("ngram_convolve", convolve),
    ]
}

/// Compares gated values and their norms with the formula.
fn gate(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (mut outcome, device) = (Outcome::default(), ops.device());
    for (tokens, streams, width) in [(3, 4, 72), (1, 2, 600), (5, 1, 7)] {
        let wide = tokens * streams * width;
        let mut keys = random.floats(wide);
        // A gate without a score is one half.
        keys[..width].fill(0.0);
        let (x, values) = (random.floats(wide), random.floats(tokens * width));
        let norms = [0; 3].map(|_| random.floats(streams * width));
        let of = |values: &[f32]| Buffer::of_f32(device, values);
        let (on_device, x_buffer, value_buffer) = (of(&keys)?, of(&x)?, of(&values)?);
        let [key_norm, query_norm, conv_norm] = norms.each_ref().map(|norm| of(norm));
        let (key_norm, query_norm, conv_norm) = (key_norm?, query_norm?, conv_norm?);
        let gated = Buffer::new_f32(device, wide)?;
        ops.gate_ngrams(&NgramGate {
            tokens,
            streams,
            width,
            keys: on_device.view(),
            values: value_buffer.view(),
            x: x_buffer.view(),
            key_norm: key_norm.view(),
            query_norm: query_norm.view(),
            conv_norm: conv_norm.view(),
            eps: EPS,
            gated: gated.view(),
        })?;
        let (gated, inputs) = (gated.view().to_f32()?, on_device.view().to_f32()?);
        for at in 0..tokens * streams {
            let (row, of_stream) = (at * width..(at + 1) * width, at % streams * width);
            let under = |values: &[f64], norm: usize| {
                normed(values, |i| f64::from(norms[norm][of_stream + i]))
            };
            let key = under(&doubles(&keys[row.clone()]), 0);
            let query = under(&doubles(&x[row.clone()]), 1);
            let dot: f64 = key.iter().zip(&query).map(|(k, q)| k * q).sum();
            let score = dot / (width as f64).sqrt();
            let root = score.abs().max(1e-6).sqrt();
            let signed = if score == 0.0 {
                0.0
            } else {
                score.signum() * root
            };
            let share = 1.0 / (1.0 + (-signed).exp());
            let of_token = &values[at / streams * width..][..width];
            let expected: Vec<f64> = of_token.iter().map(|v| share * f64::from(*v)).collect();
            let inputs_expected = under(&expected, 2);
            outcome.compare(&gated[row.clone()], expected.into_iter().map(within(2e-5)));
            let near = inputs_expected.into_iter().map(within(2e-5));
            outcome.compare(&inputs[row], near);
        }
    }
    Ok(outcome)
}

/// Sizes of a convolution.
type Sizes = (usize, usize, usize);

/// Compares the convolution with the formula, and a text in parts with the whole one.
fn convolve(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (channels, taps, dilation) in [(300, 4, 3), (32, 3, 1), (7, 1, 5), (9, 2, 12)] {
        let n = 15;
        let [inputs, gated, x] = [0; 3].map(|_| random.floats(n * channels));
        let weight = random.floats(channels * taps);
        let mut run = |batches: &[usize], texts: usize| {
            let rows = [&inputs[..], &gated, &x];
            run(
                (ops, &mut outcome),
                (channels, taps, dilation),
                rows,
                &weight,
                (batches, texts),
            )
        };
        let whole = run(&[n], 1)?;
        let parts = [run(&[1; 15], 3)?, run(&[2, 7, 1, 5], 2)?];
        let expected = (0..n * channels).map(|at| {
            let (t, channel) = (at / channels, at % channels);
            let taps = (0..taps).map(|tap| (tap, (taps - 1 - tap) * dilation));
            let seen = taps.filter_map(|(tap, back)| Some((tap, t.checked_sub(back)?)));
            let sum: f64 = seen
                .map(|(tap, from)| {
                    let input = f64::from(inputs[from * channels + channel]);
                    f64::from(weight[channel * (weight.len() / channels) + tap]) * input
                })
                .sum();
            Expected {
                value: f64::from(x[at]) + f64::from(gated[at]) + sum / (1.0 + (-sum).exp()),
                allowed: 1e-5,
            }
        });
        outcome.compare(&whole, expected);
        for parts in parts {
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            outcome.compare_exact(&bits(&parts), &bits(&whole));
        }
    }
    Ok(outcome)
}

/// Takes the inputs, gated values, and streams of texts that are alike through the convolution in batches,
/// and compares the texts. Their states hold no number before.
fn run(
    (ops, outcome): (&Ops, &mut Outcome),
    (channels, taps, dilation): Sizes,
    rows_of: [&[f32]; 3],
    weight: &[f32],
    (batches, texts): (&[usize], usize),
) -> Result<Vec<f32>, CudaError> {
    let device = ops.device();
    let weight = Buffer::of_f32(device, weight)?;
    let each = (taps - 1) * dilation * channels;
    let kept = Buffer::of_f32(device, &vec![f32::NAN; texts * each])?;
    let (mut past, mut results) = (0, Vec::new());
    for &n in batches {
        let rows = past * channels..(past + n) * channels;
        let alike = |all: &[f32]| Buffer::of_f32(device, &all[rows.clone()].repeat(texts));
        let [inputs, gated, x] = rows_of.map(alike);
        let (inputs, gated, x) = (inputs?, gated?, x?);
        let text = Text::alike(ops, past, n, texts as u32)?;
        let conv = NgramConv {
            tokens: texts * n,
            channels,
            taps,
            dilation,
            inputs: inputs.view(),
            gated: gated.view(),
            weight: weight.view(),
            kept: States {
                all: kept.view(),
                each,
            },
            x: x.view(),
        };
        ops.convolve_ngrams(&conv, text.runs())?;
        results.extend(of_first(outcome, &x, texts)?);
        past += n;
    }
    Ok(results)
}
