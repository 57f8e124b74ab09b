//! Compares the SIMD kernels of this CPU with the scalar ones.

use super::outcome::{Expected, Outcome};
use half::f16;
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::random::Random;
use tier_plan_kernels::reference::{SUM_TOLERANCE, matvec};
use tier_plan_kernels::threads::ThreadPool;
use tier_plan_kernels::{
    Activations, Kernels, RowBlock, StoredRows, Weights, needs_quants, q8_row_bytes,
};

/// Relative tolerance of a value: fused multiply-adds round once less.
const VALUE_TOLERANCE: f64 = 2e-6;

type Comparison = Box<dyn Fn(Kernels, &mut Random) -> Outcome + Send + Sync>;

/// A comparison of some kernels of an instruction set.
pub struct Check {
    /// Name of the kernels and their input.
    pub name: String,
    /// Kernels of the instruction set.
    pub kernels: Kernels,
    run: Comparison,
}

impl Check {
    /// Runs the comparison on random data.
    pub fn run(&self) -> Outcome {
        (self.run)(self.kernels, &mut Random::new(&self.name))
    }
}

/// Returns the checks of every instruction set of this CPU except the scalar kernels, which are the
/// reference.
pub fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for kernels in Kernels::available()
        .into_iter()
        .filter(|k| *k != Kernels::SCALAR)
    {
        for ty in TensorType::ALL {
            let run: Comparison = Box::new(move |k, random: &mut Random| products(k, random, ty));
            checks.push(Check {
                name: format!("products, {ty}"),
                kernels,
                run,
            });
        }
        let mut add = |name: &str, run: fn(Kernels, &mut Random) -> Outcome| {
            checks.push(Check {
                name: name.into(),
                kernels,
                run: Box::new(run),
            });
        };
        add("norm, sums, activations", small);
        add("rows of past tokens", rows);
    }
    checks
}

/// Compares matrix products of one token, of a few, and of enough for the kernels of prompts.
fn products(kernels: Kernels, random: &mut Random, ty: TensorType) -> Outcome {
    let mut outcome = Outcome::default();
    for (tokens, n_rows, cols) in [(1, 5, 512), (3, 33, 768), (40, 35, 1024)] {
        let bytes = random.weights(ty, n_rows * cols);
        let Some(w) = Weights::new(ty, &bytes, n_rows, cols) else {
            continue;
        };
        let x = random.activations(tokens * cols);
        let (mut acts, mut plain) = (
            Activations::new(tokens, cols),
            Activations::new(tokens, cols),
        );
        acts.fill(kernels, tokens, cols, &x, needs_quants(ty));
        plain.fill(Kernels::SCALAR, tokens, cols, &x, needs_quants(ty));
        let mut got = vec![0.0; tokens * n_rows];
        matmul_all(
            &ThreadPool::new(1),
            kernels,
            &[MatJob::new(w, acts.view(), &mut got)],
        );
        for (t, got) in got.chunks_exact(n_rows).enumerate() {
            outcome.compare(got, Expected::of_product(matvec(w, &plain, t)));
        }
    }
    outcome
}

fn near(expected: &[f32], least: f32) -> impl Iterator<Item = Expected> + '_ {
    expected
        .iter()
        .map(move |v| Expected::relative(*v, VALUE_TOLERANCE, least))
}

/// Compares norm, sums and activations.
fn small(kernels: Kernels, random: &mut Random) -> Outcome {
    let mut outcome = Outcome::default();
    for n in [1, 31, 64, 1000] {
        let (x, y) = (random.activations(n), random.floats(n));
        let mut both = [vec![0.0; n], vec![0.0; n]];
        let mut compare = |least: f32, run: &dyn Fn(Kernels, &mut [f32])| {
            for (k, out) in [Kernels::SCALAR, kernels].into_iter().zip(&mut both) {
                out.copy_from_slice(&x);
                run(k, out);
            }
            outcome.compare(&both[1], near(&both[0], least));
        };
        compare(1e-3, &|k, out| k.rms_norm(&x, &y, 1e-6, out));
        compare(1.0, &|k, out| k.add(out, &y));
        compare(1.0, &|k, out| k.axpy(0.7, &y, out));
        compare(1e-30, &|k, out| k.silu_mul(out, &y));
        compare(1e-30, &|k, out| k.clamped_swiglu(out, &y, 1.702, 7.0));
        compare(1e-30, &|k, out| k.gelu_mul(out, &y));
        compare(1e-30, &|k, out| k.limited_silu_mul(out, &y, 0.5));
        compare(1e-30, &|k, out| k.situ_mul(out, &y, 4.0, 25.0));
        compare(1e-30, &|k, out| k.exp(out));
        let allowed = SUM_TOLERANCE
            * x.iter()
                .zip(&y)
                .map(|(x, y)| f64::from((x * y).abs()))
                .sum::<f64>();
        outcome.compare(
            &[kernels.dot(&x, &y)],
            [Expected::within(Kernels::SCALAR.dot(&x, &y), allowed)],
        );
    }
    outcome
}

/// Compares stored rows of the KV cache, and their products with queries.
fn rows(kernels: Kernels, random: &mut Random) -> Outcome {
    let mut outcome = Outcome::default();
    for width in [32, 40, 128] {
        let (n_rows, n_queries) = (9, 5);
        let values = random.floats(n_rows * width);
        let queries = random.floats(n_queries * width);
        let mut stored = Vec::new();
        for k in [Kernels::SCALAR, kernels] {
            let mut halves = vec![f16::ZERO; values.len()];
            k.to_f16(&values, &mut halves);
            let mut eights = vec![0; n_rows * q8_row_bytes(width)];
            for (row, to) in values
                .chunks_exact(width)
                .zip(eights.chunks_exact_mut(q8_row_bytes(width)))
            {
                k.to_q8(row, to);
            }
            stored.push((halves, eights));
        }
        outcome.compare_exact(&stored[1].0, &stored[0].0);
        outcome.compare_exact(&stored[1].1, &stored[0].1);
        let kinds = [
            StoredRows::F32(&values),
            StoredRows::F16(&stored[0].0),
            StoredRows::Q8(&stored[0].1),
        ];
        for rows in kinds {
            let mut both = [vec![0.0; n_queries * n_rows], vec![0.0; n_queries * n_rows]];
            for (k, scores) in [Kernels::SCALAR, kernels].into_iter().zip(&mut both) {
                k.row_dots(&queries, RowBlock::new(rows, width), scores, n_rows);
            }
            outcome.compare(
                &both[1],
                both[0]
                    .iter()
                    .map(|v| Expected::within(*v, SUM_TOLERANCE * width as f64)),
            );
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_this_cpu_passes() {
        for check in checks() {
            let outcome = check.run();
            assert!(
                outcome.passed(),
                "{} {}: {outcome:?}",
                check.kernels.isa(),
                check.name
            );
        }
    }
}
