//! Fused kernels for a token's experts: gate and up with the activation, and down with the weighted
//! sum.

use super::Check;
use super::gated::{CLAMPED, VALUE_TOLERANCE, activated, biased, columns, scaled};
use super::products::Inputs;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{ChosenSum, GateUpMatrices, Gated, MatrixTable};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::Weights;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for ty in TensorType::ALL {
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

    /// Returns the plain product of an expert with a row of activations, times a factor, and with its
    /// bias added.
    fn expected(
        &self,
        inputs: &Inputs,
        w: ExpertWeights,
        row: usize,
        (factor, with_bias): (f32, bool),
    ) -> Vec<Expected> {
        let ExpertWeights { ty, cols, expert } = w;
        let Some(w) = Weights::new(ty, &self.bytes[expert], self.n_rows, cols) else {
            return Vec::new();
        };
        let bias = &self.biases[expert * self.n_rows..][..self.n_rows];
        let add = |(v, b): (Expected, &f32)| {
            let v = scaled(v, factor);
            if with_bias { biased(v, *b) } else { v }
        };
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
/// invalid. Some have no gate, some have factors.
fn experts(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (n_used, tokens, cols) = (3, 2, columns(ty, 96));
    let choices = [4, 2, 0, 1, -1, 3];
    let which = Buffer::of_i32(ops.device(), &choices)?;
    let jobs = tokens * n_used;
    for (n_rows, activation, with, weighs) in [
        (7, CLAMPED, true, true),
        (32, Activation::Silu, false, false),
        (40, Activation::Silu, true, false),
        (33, Activation::SquaredRelu, true, true),
        (32, Activation::SquaredRelu, false, false),
    ] {
        let by = random.floats(jobs);
        let factors = Buffer::of_f32(ops.device(), &by)?;
        let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
        let gate = Experts::new(ops, random, ty, n_rows, cols)?;
        let up = Experts::new(ops, random, ty, n_rows, cols)?;
        let (gates, ups) = (gate.table(ops)?, up.table(ops)?);
        let untouched = 7.5f32;
        let out = Buffer::of_f32(ops.device(), &vec![untouched; jobs * n_rows])?;
        let gated = Gated {
            ty,
            matrices: match activation {
                Activation::SquaredRelu => GateUpMatrices::ChosenUp(&ups, which.view()),
                _ => GateUpMatrices::Chosen([&gates, &ups], which.view()),
            },
            biases: [&gate, &up].map(|m| with.then(|| m.bias.view())),
            factors: weighs.then(|| factors.view()),
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
            let factor = if weighs { by[job] } else { 1.0 };
            let product = |m: &Experts| m.expected(&inputs, w, job / n_used, (factor, with));
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
        (1, 8, 6, 768, true, true),
        (2, 3, 9, 32, false, true),
        (1, 35, 3, 64, true, true),
        (1, 1, 5, 1056, false, true),
        (2, 2, 5, 64, true, false),
    ];
    for (tokens, n_used, n_rows, cols, with, weighs) in sizes {
        let (cols, jobs) = (columns(ty, cols), tokens * n_used);
        let inputs = Inputs::new(ops, random, ty, jobs, cols)?;
        let experts = Experts::new(ops, random, ty, n_rows, cols)?;
        let table = experts.table(ops)?;
        let choices: Vec<i32> = (0..jobs)
            .map(|job| [4, 0, 2, 3, 1, -1, 5][job % 7])
            .collect();
        let which = Buffer::of_i32(ops.device(), &choices)?;
        let (mut by, onto) = (random.floats(jobs), random.floats(tokens * n_rows));
        if !weighs {
            by.fill(1.0);
        }
        let weights = Buffer::of_f32(ops.device(), &by)?;
        let out = Buffer::of_f32(ops.device(), &onto)?;
        let sum = ChosenSum {
            ty,
            table: &table,
            which: which.view(),
            bias: with.then(|| experts.bias.view()),
            weights: weighs.then(|| weights.view()),
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
            let w = ExpertWeights { ty, cols, expert };
            let results = experts.expected(&inputs, w, job, (1.0, with));
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
