//! The gated short convolution.

use super::Check;
use super::texts::{Text, of_first};
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{ShortConv, States};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    vec![Check::new("short_conv", compare)]
}

fn compare(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (channels, taps) in [(300, 3), (32, 4), (7, 1)] {
        let n = 9;
        let projected = random.floats(n * 3 * channels);
        let weight = random.floats(channels * taps);
        let mut run = |batches: &[usize], texts: usize| {
            run(
                (ops, &mut outcome),
                (channels, taps),
                &projected,
                &weight,
                (batches, texts),
            )
        };
        let whole = run(&[n], 1)?;
        let parts = [run(&[1; 9], 3)?, run(&[2, 4, 3], 2)?];
        let input = |t: usize, i: usize| {
            let row = &projected[3 * t * channels..];
            row[i] * row[2 * channels + i]
        };
        let expected = (0..n * channels).map(|at| {
            let (t, i) = (at / channels, at % channels);
            let seen = (0..taps).filter_map(|tap| Some((tap, (t + tap + 1).checked_sub(taps)?)));
            let sum: f32 = seen
                .map(|(tap, from)| weight[i * taps + tap] * input(from, i))
                .sum();
            Expected::within(projected[(3 * t + 1) * channels + i] * sum, 1e-5)
        });
        outcome.compare(&whole, expected);
        for parts in parts {
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            outcome.compare_exact(&bits(&parts), &bits(&whole));
        }
    }
    Ok(outcome)
}

/// Takes texts that are alike through the convolution in batches, and compares them. Their states hold no
/// number before.
fn run(
    (ops, outcome): (&Ops, &mut Outcome),
    (channels, taps): (usize, usize),
    projected: &[f32],
    weight: &[f32],
    (batches, texts): (&[usize], usize),
) -> Result<Vec<f32>, CudaError> {
    let device = ops.device();
    let weight = Buffer::of_f32(device, weight)?;
    let inputs = Buffer::of_f32(device, &vec![f32::NAN; texts * (taps - 1) * channels])?;
    let (mut past, mut results) = (0, Vec::new());
    for &n in batches {
        let rows = &projected[past * 3 * channels..(past + n) * 3 * channels];
        let rows = Buffer::of_f32(device, &rows.repeat(texts))?;
        let text = Text::alike(ops, past, n, texts as u32)?;
        let out = Buffer::new_f32(device, texts * n * channels)?;
        let conv = ShortConv {
            tokens: texts * n,
            channels,
            taps,
            projected: rows.view(),
            weight: weight.view(),
            inputs: States {
                all: inputs.view(),
                each: (taps - 1) * channels,
            },
            out: out.view(),
        };
        ops.short_conv(&conv, text.runs())?;
        results.extend(of_first(outcome, &out, texts)?);
        past += n;
    }
    Ok(results)
}
