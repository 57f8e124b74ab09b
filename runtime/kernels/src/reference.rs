//! What the fast kernels are held against.

use crate::pooled::{MatJob, matmul_all};
use crate::quant::dequantize_row;
use crate::threads::ThreadPool;
use crate::{Activations, Kernels, Weights};

/// What a sum may differ by, as a share of the sum of magnitudes: its order is another.
pub const SUM: f64 = 4e-6;

/// The plain product of a matrix with one row of activations, and what another order of its sums may differ by.
pub fn plain_product(w: Weights<'_>, acts: &Activations, row: usize) -> Vec<(f64, f64)> {
    let mut out = vec![0.0f32; w.n_rows()];
    let x = acts.view().rows_range(row..row + 1);
    matmul_all(&ThreadPool::new(1), Kernels::SCALAR, &[MatJob::new(w, x, &mut out)]);
    let x = &acts.values()[row * w.n_cols()..][..w.n_cols()];
    let mut decoded = vec![0.0; w.n_cols()];
    let magnitude = |r: usize| {
        dequantize_row(w.ty(), w.row(r).unwrap_or_default(), &mut decoded);
        decoded.iter().zip(x).map(|(w, x)| f64::from(w.abs()) * f64::from(x.abs())).sum::<f64>()
    };
    let allowed: Vec<f64> = (0..w.n_rows()).map(magnitude).collect();
    out.iter().zip(allowed).map(|(v, sum)| (f64::from(*v), SUM * sum)).collect()
}
