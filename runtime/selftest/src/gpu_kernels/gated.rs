//! Fused kernels for few rows: several matrices at once, gate and up with the activation, and down
//! with the weighted sum over a token's experts.

use super::Check;
use super::products::Inputs;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{ChosenSum, FusedMatvec, GateUpMatrices, Gated, MatrixTable, Quants};
use tier_plan_cuda::{CudaError, Ops, source};
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::Weights;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::random::Random;

/// Relative tolerance of a value: exponentials are computed differently.
const VALUE_TOLERANCE: f64 = 4e-6;

/// The activation of gpt-oss.
const CLAMPED: Activation = Activation::ClampedSwiglu {
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
        checks.push(Check::new(
            format!("gated_{ty}, chosen experts"),
            move |ops, random| experts(ops, random, ty),
        ));
        checks.push(Check::new(
            format!("chosen_sum_{ty}"),
            move |ops, random| sums(ops, random, ty),
        ));
    }
    checks
}

/// Rounds a number of columns up to one that the format supports.
fn columns(ty: TensorType, at_least: usize) -> usize {
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
fn activated(activation: Activation, gate: Expected, up: Expected) -> Expected {
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
        Activation::SquaredRelu => unreachable!("it has no gate"),
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
            matrices: GateUpMatrices::One([gate.view(), up.view()]),
            biases: [None, Some(up_bias.view())],
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

/// Adds a bias to an expected value.
fn biased(product: Expected, bias: f32) -> Expected {
    Expected {
        value: product.value + f64::from(bias),
        allowed: product.allowed + VALUE_TOLERANCE * f64::from(bias.abs()),
    }
}

/// Matrices of a layer's experts with biases; one expert is missing.
struct Experts {
    bytes: Vec<Vec<u8>>,
    biases: Vec<f32>,
    on_device: Vec<Buffer>,
    bias: Buffer,
    n_rows: usize,
}

/// A matrix of an expert.
#[derive(Clone, Copy)]
struct ExpertWeights {
    ty: TensorType,
    cols: usize,
    expert: usize,
}

impl Experts {
    const N: usize = 5;
    const MISSING: usize = 2;

    fn new(
        ops: &Ops,
        random: &mut Random,
        ty: TensorType,
        n_rows: usize,
        cols: usize,
    ) -> Result<Self, CudaError> {
        let bytes: Vec<_> = (0..Self::N)
            .map(|_| random.weights(ty, n_rows * cols))
            .collect();
        let biases = random.floats(Self::N * n_rows);
        let on_device = bytes
            .iter()
            .map(|b| Buffer::of_bytes(ops.device(), b))
            .collect::<Result<Vec<_>, _>>()?;
        let bias = Buffer::of_f32(ops.device(), &biases)?;
        Ok(Self {
            bytes,
            biases,
            on_device,
            bias,
            n_rows,
        })
    }

    fn table(&self, ops: &Ops) -> Result<MatrixTable<'_>, CudaError> {
        let views: Vec<_> = self
            .on_device
            .iter()
            .enumerate()
            .map(|(e, b)| (e != Self::MISSING).then_some(b.view()))
            .collect();
        MatrixTable::new(ops.device(), &views)
    }

    /// Returns the plain product of an expert with a row of activations, and with its bias added.
    fn expected(
        &self,
        inputs: &Inputs,
        w: ExpertWeights,
        row: usize,
        with_bias: bool,
    ) -> Vec<Expected> {
        let ExpertWeights { ty, cols, expert } = w;
        let Some(w) = Weights::new(ty, &self.bytes[expert], self.n_rows, cols) else {
            return Vec::new();
        };
        let bias = &self.biases[expert * self.n_rows..][..self.n_rows];
        let add = |(v, b): (Expected, &f32)| if with_bias { biased(v, *b) } else { v };
        inputs
            .expected(w, row)
            .into_iter()
            .zip(bias)
            .map(add)
            .collect()
    }

    /// Returns the expert of an index, if it is not missing.
    fn present(index: i32) -> Option<usize> {
        usize::try_from(index)
            .ok()
            .filter(|e| *e < Self::N && *e != Self::MISSING)
    }
}

/// Compares two tokens that chose three of five experts each; one expert is missing, one index
/// invalid.
fn experts(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (n_used, tokens, cols) = (3, 2, columns(ty, 96));
    let choices = [4, 2, 0, 1, -1, 3];
    let which = Buffer::of_i32(ops.device(), &choices)?;
    let jobs = tokens * n_used;
    for (n_rows, activation, with) in [
        (7, CLAMPED, true),
        (32, Activation::Silu, false),
        (40, Activation::Silu, true),
    ] {
        let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
        let gate = Experts::new(ops, random, ty, n_rows, cols)?;
        let up = Experts::new(ops, random, ty, n_rows, cols)?;
        let (gates, ups) = (gate.table(ops)?, up.table(ops)?);
        let untouched = 7.5f32;
        let out = Buffer::of_f32(ops.device(), &vec![untouched; jobs * n_rows])?;
        let gated = Gated {
            ty,
            matrices: GateUpMatrices::Chosen([&gates, &ups], which.view()),
            biases: [&gate, &up].map(|m| with.then(|| m.bias.view())),
            activation,
            jobs,
            n_rows,
            n_cols: cols,
            x: inputs.input(ty),
            jobs_per_x: n_used,
        };
        ops.gated(&gated, out.view(), None)?;
        let got = out.view().to_f32()?;
        for ((job, choice), got) in choices.iter().enumerate().zip(got.chunks_exact(n_rows)) {
            let Some(expert) = Experts::present(*choice) else {
                outcome.compare_exact(got, &vec![untouched; n_rows]);
                continue;
            };
            let w = ExpertWeights { ty, cols, expert };
            let product = |m: &Experts| m.expected(&inputs, w, job / n_used, with);
            let pairs = product(&gate).into_iter().zip(product(&up));
            outcome.compare(got, pairs.map(|(g, u)| activated(activation, g, u)));
        }
    }
    Ok(outcome)
}

/// Compares sums over the experts of a token: fewer runs than lanes, more experts than lanes,
/// several tokens.
fn sums(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let sizes = [
        (1, 8, 6, 768, true),
        (2, 3, 9, 32, false),
        (1, 35, 3, 64, true),
        (1, 1, 5, 1056, false),
    ];
    for (tokens, n_used, n_rows, cols, with) in sizes {
        let (cols, jobs) = (columns(ty, cols), tokens * n_used);
        let inputs = Inputs::new(ops, random, ty, jobs, cols)?;
        let experts = Experts::new(ops, random, ty, n_rows, cols)?;
        let table = experts.table(ops)?;
        let choices: Vec<i32> = (0..jobs)
            .map(|job| [4, 0, 2, 3, 1, -1, 5][job % 7])
            .collect();
        let which = Buffer::of_i32(ops.device(), &choices)?;
        let (by, onto) = (random.floats(jobs), random.floats(tokens * n_rows));
        let weights = Buffer::of_f32(ops.device(), &by)?;
        let out = Buffer::of_f32(ops.device(), &onto)?;
        let sum = ChosenSum {
            ty,
            table: &table,
            which: which.view(),
            bias: with.then(|| experts.bias.view()),
            weights: weights.view(),
            tokens,
            n_used,
            n_rows,
            n_cols: cols,
            x: inputs.input(ty),
        };
        let alone = Buffer::new_f32(ops.device(), tokens * n_rows)?;
        ops.chosen_sum(&sum, None, alone.view())?;
        ops.chosen_sum(&sum, Some(out.view()), out.view())?;
        let mut expected = vec![
            Expected {
                value: 0.0,
                allowed: 1e-30
            };
            tokens * n_rows
        ];
        for (job, choice) in choices.iter().enumerate() {
            let Some(expert) = Experts::present(*choice) else {
                continue;
            };
            let results = experts.expected(&inputs, ExpertWeights { ty, cols, expert }, job, with);
            for (sum, result) in expected[job / n_used * n_rows..].iter_mut().zip(results) {
                let by = f64::from(by[job]);
                sum.value += by * result.value;
                sum.allowed +=
                    by.abs() * result.allowed + VALUE_TOLERANCE * (by * result.value).abs();
            }
        }
        outcome.compare(&alone.view().to_f32()?, expected.iter().copied());
        let added = expected
            .iter()
            .zip(&onto)
            .map(|(sum, onto)| biased(*sum, *onto));
        outcome.compare(&out.view().to_f32()?, added);
    }
    Ok(outcome)
}
