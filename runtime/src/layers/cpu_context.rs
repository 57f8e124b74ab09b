//! The kernels and threads that layers compute with on the CPU.

use tier_plan_kernels::Kernels;
use tier_plan_kernels::threads::ThreadPool;

/// The kernels and threads of a computation on the CPU.
#[derive(Clone, Copy)]
pub(crate) struct CpuContext<'a> {
    pub pool: &'a ThreadPool,
    pub kernels: Kernels,
}

/// Adds `bias` to every row of `rows`, `[_, bias.len()]`.
pub(crate) fn add_bias(rows: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        for row in rows.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(r, b)| *r += b);
        }
    }
}

/// Writes the RMS norm of every row of `x`, `[rows, weight.len()]`, into `out`.
pub(crate) fn norm_rows(cpu: CpuContext<'_>, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    cpu.pool.for_each_slice(out, width, |row, out| {
        cpu.kernels
            .rms_norm(&x[row * width..][..width], weight, eps, out)
    });
}
