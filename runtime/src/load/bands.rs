//! Which matrices are kept with their rows interleaved.

use crate::options::{LoadOptions, Progress};
use std::collections::HashSet;
use tier_plan_formats::gguf::{Gguf, GgufError};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::spec::{ExpertLinear, ModelSpec, MoeSpec, TensorId};
use tier_plan_kernels::threads::physical_cores;
use tier_plan_kernels::{BAND_ROWS, Kernels, Weights};

/// Copies a model's weights to memory, on huge pages where the system has them, and arranges them
/// for this processor's kernels. A model that has no description stays as it is in the file, and so
/// does one that is compared with checksums where it lies.
///
/// # Errors
/// When a file can't be read, or the memory can't be had; the model then stays mapped.
pub fn copy_to_memory(
    gguf: &mut Gguf,
    options: &LoadOptions,
    progress: Progress<'_>,
) -> Result<(), GgufError> {
    let threads = options.threads.unwrap_or_else(physical_cores);
    gguf.copy_to_memory(threads, progress)?;
    if options.checks.is_none()
        && let (Ok(kernels), Ok(spec)) = (Kernels::from_env(), describe(gguf))
    {
        let tensors = all(kernels, gguf, &spec);
        gguf.interleave(kernels, &tensors, threads);
    }
    Ok(())
}

/// Returns the matrices of a model that these kernels multiply faster interleaved.
fn all(kernels: Kernels, gguf: &Gguf, spec: &ModelSpec) -> Vec<TensorId> {
    let mut tensors: Vec<TensorId> = dense(kernels, gguf, spec).into_iter().collect();
    for (_, moe) in spec.moe_layers() {
        let linears = moe.expert_linears();
        let faster = linears.filter(|l| expert(kernels, gguf, moe, l));
        tensors.extend(faster.map(|l| l.weight));
    }
    tensors
}

/// Returns the dense matrices that these kernels multiply faster interleaved.
pub(super) fn dense(kernels: Kernels, gguf: &Gguf, spec: &ModelSpec) -> HashSet<TensorId> {
    let mut ids = spec.matrices_in_bands(BAND_ROWS);
    ids.retain(|id| {
        let tensor = &gguf.tensors()[*id];
        let rows = usize::try_from(tensor.rows());
        kernels.prefers_bands(tensor.ty) && rows.is_ok_and(|n| Weights::has_bands(tensor.ty, n))
    });
    ids
}

/// Whether these kernels multiply a matrix of experts faster interleaved.
pub(super) fn expert(kernels: Kernels, gguf: &Gguf, moe: &MoeSpec, of: &ExpertLinear) -> bool {
    let ty = gguf.tensors()[of.weight].ty;
    // The halves of a fused matrix are multiplied apart.
    let fits = Weights::has_bands(ty, of.n_out) && Weights::has_bands(ty, moe.expert_ffn);
    fits && kernels.prefers_bands(ty)
}
