//! What the arithmetic of layers computes with.

use tier_plan_kernels::Kernels;
use tier_plan_kernels::threads::ThreadPool;

/// What the blocks compute with.
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
