//! What fast kernels are compared with: the scalar ones, and the tolerance for another order of
//! summation.

#![forbid(unsafe_code)]

use crate::pooled::{MatJob, matmul_all};
use crate::quant::dequantize_row;
use crate::threads::ThreadPool;
use crate::{Activations, Kernels, Weights};

/// Largest difference between two orders of a sum, as a share of its sum of magnitudes.
pub const SUM_TOLERANCE: f64 = 4e-6;

/// Computes the matvec of `w` with one row of `acts` with the scalar kernels. Returns per weight
/// row the value and its tolerance.
pub fn matvec(w: Weights<'_>, acts: &Activations, row: usize) -> Vec<(f64, f64)> {
    let mut out = vec![0.0f32; w.n_rows()];
    let x = acts.view().rows_range(row..row + 1);
    matmul_all(
        &ThreadPool::new(1),
        Kernels::SCALAR,
        &[MatJob::new(w, x, &mut out)],
    );
    let x = &acts.values()[row * w.n_cols()..][..w.n_cols()];
    let mut dequantized = vec![0.0; w.n_cols()];
    let sum_of_magnitudes = |r: usize| {
        dequantize_row(w.ty(), w.row(r).unwrap_or_default(), &mut dequantized);
        dequantized
            .iter()
            .zip(x)
            .map(|(w, x)| f64::from(w.abs()) * f64::from(x.abs()))
            .sum::<f64>()
    };
    let magnitudes: Vec<f64> = (0..w.n_rows()).map(sum_of_magnitudes).collect();
    out.iter()
        .zip(magnitudes)
        .map(|(v, sum)| (f64::from(*v), SUM_TOLERANCE * sum))
        .collect()
}
