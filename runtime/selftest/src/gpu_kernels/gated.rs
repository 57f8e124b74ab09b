//! Fused kernels for few rows: several matrices at once, and gate and up with the activation.

use super::Check;
use super::products::Inputs;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{FusedMatvec, GateUpMatrices, Gated, Quants};
use tier_plan_cuda::{CudaError, Ops, source};
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::Weights;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::random::Random;

/// Relative tolerance of a value: exponentials are computed differently.
pub(super) const VALUE_TOLERANCE: f64 = 4e-6;

/// The activation of gpt-oss.
pub(super) const CLAMPED: Activation = Activation::ClampedSwiglu {
    alpha: 1.702,
    limit: 7.0,
};

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for ty in TensorType::ALL {
        checks.push(Check::new(
            format!("matvecs, {ty} beside others"),
            move |ops, random| several(ops, random, ty),
        ));
        checks.push(Check::new(format!("gated_{ty}"), move |ops, random| {
            block(ops, random, ty)
        }));
    }
    checks
}

/// Rounds a number of columns up to one that the format supports.
pub(super) fn columns(ty: TensorType, at_least: usize) -> usize {
    at_least.next_multiple_of(ty.block_len().max(32))
}

/// Compares up to three matrices of a family of formats, with biases and without.
fn several(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let (family, number) = source::family(ty);
    let others: Vec<TensorType> = TensorType::ALL
        .into_iter()
        .filter(|t| source::family(*t).0 == family)
        .collect();
    let numbers: Vec<usize> = others.iter().map(|t| source::family(*t).1).collect();
    let Some(next) = numbers
        .iter()
        .position(|n| *n == (number + 1) % others.len())
    else {
        return Ok(Outcome::default());
    };
    let matrices = [(ty, 9), (others[next], 4), (ty, 1)];
    let mut outcome = Outcome::default();
    for (n_parts, tokens, cols) in [(3, 1, 1056), (3, 2, 96), (2, 3, 32)] {
        let cols = others
            .iter()
            .map(|t| columns(*t, cols))
            .max()
            .unwrap_or(cols);
        let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
        let bytes: Vec<_> = matrices
            .map(|(ty, n_rows)| random.weights(ty, n_rows * cols))
            .into();
        let biases: Vec<_> = matrices.map(|(_, n_rows)| random.floats(n_rows)).into();
        let on_device = bytes
            .iter()
            .map(|b| Buffer::of_bytes(ops.device(), b))
            .collect::<Result<Vec<_>, _>>()?;
        let bias = biases
            .iter()
            .map(|b| Buffer::of_f32(ops.device(), b))
            .collect::<Result<Vec<_>, _>>()?;
        let results =
            |(_, n_rows): &(TensorType, usize)| Buffer::new_f32(ops.device(), tokens * n_rows);
        let outs = matrices
            .iter()
            .map(results)
            .collect::<Result<Vec<_>, _>>()?;
        // The second one has no bias.
        let bias_of = |i: usize| (i != 1).then(|| &bias[i]);
        let fuse = |i: usize| {
            let (ty, n_rows) = matrices[i];
            let (w, bias, out) = (
                on_device[i].view(),
                bias_of(i).map(Buffer::view),
                outs[i].view(),
            );
            FusedMatvec {
                ty,
                w,
                n_rows,
                bias,
                out,
            }
        };
        let fused: Vec<_> = (0..n_parts).map(fuse).collect();
        ops.matvecs(&fused, tokens, cols, inputs.input(ty))?;
        for (i, (ty, n_rows)) in matrices.into_iter().enumerate().take(n_parts) {
            let Some(w) = Weights::new(ty, &bytes[i], n_rows, cols) else {
                continue;
            };
            for (t, got) in outs[i].view().to_f32()?.chunks_exact(n_rows).enumerate() {
                let with = |(v, bias): (Expected, &f32)| {
                    if bias_of(i).is_some() {
                        biased(v, *bias)
                    } else {
                        v
                    }
                };
                outcome.compare(
                    got,
                    inputs.expected(w, t).into_iter().zip(&biases[i]).map(with),
                );
            }
        }
    }
    Ok(outcome)
}

/// Applies an activation to two products, and propagates their tolerances.
pub(super) fn activated(activation: Activation, gate: Expected, up: Expected) -> Expected {
    let (g, u) = (gate.value, up.value);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let (left, right) = match activation {
        Activation::Silu => (silu(g), u),
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let g = g.min(limit);
            (g / (1.0 + (-alpha * g).exp()), u.clamp(-limit, limit) + 1.0)
        }
        Activation::ClampedSilu { limit } => {
            let limit = f64::from(limit);
            (silu(g.min(limit)), u.clamp(-limit, limit))
        }
        Activation::LimitedSilu { limit } => {
            let limit = f64::from(limit);
            (silu(g).min(limit), u.clamp(-limit, limit))
        }
        Activation::Gelu => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
            (g / 2.0 * (1.0 + z.tanh()), u)
        }
        Activation::Situ { beta, linear } => {
            let (beta, linear) = (f64::from(beta), f64::from(linear));
            let up = if linear > 0.0 {
                linear * (u / linear).tanh()
            } else {
                u
            };
            (beta * (g / beta).tanh() / (1.0 + (-g).exp()), up)
        }
        Activation::SquaredRelu => {
            let u = u.max(0.0);
            return Expected {
                value: u * u,
                allowed: up.allowed * (2.0 * u + up.allowed) + VALUE_TOLERANCE * u * u + 1e-30,
            };
        }
    };
    // No curve is steeper than 1.2.
    let allowed = 1.2 * gate.allowed * (right.abs() + up.allowed) + up.allowed * left.abs();
    Expected {
        value: left * right,
        allowed: allowed + VALUE_TOLERANCE * (left * right).abs() + 1e-30,
    }
}

/// Compares quantized values. Codes are the nearest ones, or the next if a value may lie on either
/// side. Scales are those of the largest value, and sums those of the codes.
fn quantized(
    outcome: &mut Outcome,
    quants: &Quants,
    expected: &[Expected],
) -> Result<(), CudaError> {
    let codes: Vec<f32> = quants
        .codes
        .view()
        .to_bytes()?
        .iter()
        .map(|b| f32::from(*b as i8))
        .collect();
    let (scales, sums) = (quants.scales.view().to_f32()?, quants.sums.view().to_f32()?);
    for (run, expected) in expected.chunks_exact(32).enumerate() {
        let largest = expected.iter().map(|e| e.value.abs()).fold(0.0, f64::max);
        let allowed = expected.iter().map(|e| e.allowed).fold(0.0, f64::max);
        let scale = Expected {
            value: largest / 127.0,
            allowed: (allowed + VALUE_TOLERANCE * largest) / 127.0,
        };
        outcome.compare(&scales[run..=run], [scale]);
        let (codes, scale) = (&codes[32 * run..][..32], scales[run]);
        let decoded: Vec<f32> = codes.iter().map(|code| code * scale).collect();
        let near = |e: &Expected| Expected {
            value: e.value,
            allowed: 0.5001 * f64::from(scale) + e.allowed,
        };
        outcome.compare(&decoded, expected.iter().map(near));
        let halves = codes
            .chunks_exact(16)
            .map(|half| scale * half.iter().sum::<f32>());
        outcome.compare_exact(&sums[2 * run..][..2], &halves.collect::<Vec<_>>());
    }
    Ok(())
}

/// Compares gate and up of a dense block, with few and with many thread blocks.
fn block(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let sizes = [
        (5, 33, Activation::Silu, 2),
        (64, 1056, CLAMPED, 1),
        (160, 32, Activation::Silu, 26),
    ];
    let others = super::ACTIVATIONS.map(|activation| (64, 96, activation, 2));
    for (n_rows, cols, activation, tokens) in sizes.into_iter().chain(others) {
        let cols = columns(ty, cols);
        let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
        let bytes = [
            random.weights(ty, n_rows * cols),
            random.weights(ty, n_rows * cols),
        ];
        let biases = [random.floats(n_rows), random.floats(n_rows)];
        let [gate, up] = [
            Buffer::of_bytes(ops.device(), &bytes[0])?,
            Buffer::of_bytes(ops.device(), &bytes[1])?,
        ];
        let up_bias = Buffer::of_f32(ops.device(), &biases[1])?;
        let gated = Gated {
            ty,
            matrices: match activation {
                Activation::SquaredRelu => GateUpMatrices::Up(up.view()),
                _ => GateUpMatrices::One([gate.view(), up.view()]),
            },
            biases: [None, Some(up_bias.view())],
            factors: None,
            activation,
            jobs: tokens,
            n_rows,
            n_cols: cols,
            x: inputs.input(ty),
            jobs_per_x: 1,
        };
        let out = Buffer::new_f32(ops.device(), tokens * n_rows)?;
        ops.gated(&gated, out.view(), None)?;
        let mut expected = Vec::with_capacity(tokens * n_rows);
        let [Some(gate), Some(up)] = bytes.each_ref().map(|b| Weights::new(ty, b, n_rows, cols))
        else {
            continue;
        };
        for t in 0..tokens {
            let pairs = inputs
                .expected(gate, t)
                .into_iter()
                .zip(inputs.expected(up, t))
                .zip(&biases[1]);
            expected.extend(pairs.map(|((g, u), bias)| activated(activation, g, biased(u, *bias))));
        }
        outcome.compare(&out.view().to_f32()?, expected.iter().copied());
        if n_rows.is_multiple_of(32) {
            let mut quants = Quants::new(ops.device(), tokens * n_rows)?;
            ops.gated(&gated, out.view(), Some(&mut quants))?;
            quantized(&mut outcome, &quants, &expected)?;
        }
    }
    Ok(outcome)
}

/// Multiplies an expected value by a factor.
pub(super) fn scaled(product: Expected, factor: f32) -> Expected {
    let factor = f64::from(factor);
    let value = factor * product.value;
    Expected {
        value,
        allowed: factor.abs() * product.allowed + VALUE_TOLERANCE * value.abs(),
    }
}

/// Adds a bias to an expected value.
pub(super) fn biased(product: Expected, bias: f32) -> Expected {
    Expected {
        value: product.value + f64::from(bias),
        allowed: product.allowed + VALUE_TOLERANCE * f64::from(bias.abs()),
    }
}
