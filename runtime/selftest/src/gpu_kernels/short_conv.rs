//! The gated short convolution.

use super::Check;
use super::texts::Text;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::ShortConv;
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
        let whole = run(ops, (channels, taps), &projected, &weight, &[n])?;
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
        for batches in [&[1; 9][..], &[2, 4, 3]] {
            let parts = run(ops, (channels, taps), &projected, &weight, batches)?;
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            outcome.compare_exact(&bits(&parts), &bits(&whole));
        }
    }
    Ok(outcome)
}

/// Takes a text through the convolution in batches. Its state holds no number before.
fn run(
    ops: &Ops,
    (channels, taps): (usize, usize),
    projected: &[f32],
    weight: &[f32],
    batches: &[usize],
) -> Result<Vec<f32>, CudaError> {
    let device = ops.device();
    let weight = Buffer::of_f32(device, weight)?;
    let inputs = Buffer::of_f32(device, &vec![f32::NAN; (taps - 1) * channels])?;
    let (mut past, mut results) = (0, Vec::new());
    for &n in batches {
        let rows = &projected[past * 3 * channels..(past + n) * 3 * channels];
        let rows = Buffer::of_f32(device, rows)?;
        let (text, out) = (
            Text::new(ops, past, n)?,
            Buffer::new_f32(device, n * channels)?,
        );
        ops.short_conv(&ShortConv {
            channels,
            taps,
            projected: rows.view(),
            weight: weight.view(),
            positions: text.positions(),
            inputs: inputs.view(),
            out: out.view(),
        })?;
        results.extend(out.view().to_f32()?);
        past += n;
    }
    Ok(results)
}
