//! Inputs that tokens have for every layer.

use super::Check;
use super::compressed::{EPS, doubles, normed, within};
use crate::outcome::Outcome;
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::TokenInputs;
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    vec![Check::new("token_inputs", inputs)]
}

/// Compares inputs with the formula, also of tokens that are not the first ones.
fn inputs(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (mut outcome, device) = (Outcome::default(), ops.device());
    for (tokens, layers, dim, first) in [(1, 3, 256, 0), (5, 2, 40, 2), (3, 1, 7, 1)] {
        let (hidden, capacity) = (96, first + tokens + 1);
        let wide = tokens * layers * dim;
        let [projected, rows] = [0; 2].map(|_| random.floats(wide));
        let norm = random.floats(dim);
        let of = |values: &[f32]| Buffer::of_f32(device, values);
        let (on_device, row_buffer, weight) = (of(&projected)?, of(&rows)?, of(&norm)?);
        let before = random.floats(layers * capacity * dim);
        let out = of(&before)?;
        ops.token_inputs(
            &TokenInputs {
                tokens,
                layers,
                dim,
                hidden,
                projected: on_device.view(),
                rows: row_buffer.view(),
                norm: weight.view(),
                eps: EPS,
                first,
                capacity,
            },
            out.view(),
        )?;
        let found = out.view().to_f32()?;
        for layer in 0..layers {
            for row in 0..capacity {
                let at = (layer * capacity + row) * dim;
                let found = &found[at..at + dim];
                let token = row.checked_sub(first).filter(|token| *token < tokens);
                let Some(token) = token else {
                    // Rows of other tokens stay as they are.
                    let same = before[at..at + dim].iter().map(|v| f64::from(*v));
                    outcome.compare(found, same.map(within(0.0)));
                    continue;
                };
                let from = (token * layers + layer) * dim;
                let scaled: Vec<f64> = doubles(&projected[from..from + dim])
                    .iter()
                    .map(|v| v / f64::from(hidden as u32).sqrt())
                    .collect();
                let normed = normed(&scaled, |i| f64::from(norm[i]));
                let of_row = |i: usize| f64::from(rows[from + i]) * f64::from(dim as u32).sqrt();
                let expected = normed
                    .into_iter()
                    .enumerate()
                    .map(|(i, v)| (v + of_row(i)) / 2f64.sqrt());
                outcome.compare(found, expected.map(within(2e-5)));
            }
        }
    }
    Ok(outcome)
}
