//! Gathering rows of a batch for an expert, and adding its results.

use super::Check;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    vec![Check::new("gather_rows, add_rows, clear", rows)]
}

fn rows(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (tokens, width, which) in [
        (5, 300, vec![4, 0, 3]),
        (1, 7, vec![0]),
        (3, 256, vec![2, 1, 0]),
    ] {
        let (x, weights) = (random.floats(tokens * width), random.floats(which.len()));
        let (on_device, w) = (
            Buffer::of_f32(ops.device(), &x)?,
            Buffer::of_f32(ops.device(), &weights)?,
        );
        let numbers = Buffer::of_i32(ops.device(), &which)?;
        let n = which.len();
        let taken = Buffer::new_f32(ops.device(), n * width)?;
        ops.gather_rows(on_device.view(), numbers.view(), n, width, taken.view())?;
        let row = |token: i32| &x[token as usize * width..][..width];
        let expected: Vec<f32> = which
            .iter()
            .flat_map(|token| row(*token))
            .copied()
            .collect();
        outcome.compare_exact(&taken.view().to_f32()?, &expected);
        // The last value must not be cleared.
        let sums = Buffer::of_f32(ops.device(), &vec![1.5; tokens * width + 1])?;
        ops.clear(sums.view(), tokens * width)?;
        let mut expected = vec![0.0f64; tokens * width + 1];
        expected[tokens * width] = 1.5;
        for is_weighted in [true, false, true] {
            let w = is_weighted.then(|| w.view());
            ops.add_rows(taken.view(), numbers.view(), w, n, width, sums.view())?;
            for (token, weight) in which.iter().zip(&weights) {
                let weight = if is_weighted { *weight } else { 1.0 };
                let to = &mut expected[*token as usize * width..][..width];
                to.iter_mut()
                    .zip(row(*token))
                    .for_each(|(to, v)| *to += f64::from(weight) * f64::from(*v));
            }
        }
        outcome.compare(
            &sums.view().to_f32()?,
            expected.into_iter().map(|value| Expected {
                value,
                allowed: 1e-6,
            }),
        );
    }
    Ok(outcome)
}
