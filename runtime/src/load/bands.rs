//! Which matrices are kept with their rows interleaved.

use crate::options::{LoadOptions, Progress};
use std::collections::HashSet;
use tier_plan_formats::gguf::{Gguf, GgufError};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::spec::{ExpertLinear, ModelSpec, MoeSpec, TensorId};
use tier_plan_kernels::threads::physical_cores;
use tier_plan_kernels::{BAND_ROWS, Kernels, RowOrder};

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
    if let Some(shards) = &options.shards {
        for bytes in gguf.copied_bytes() {
            shards.watch(bytes.as_ptr(), bytes.len());
        }
    }
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
        rows.is_ok_and(|n| kernels.fastest_order(tensor.ty, n) == RowOrder::Interleaved)
    });
    ids
}

/// Whether these kernels multiply a matrix of experts faster interleaved.
pub(super) fn expert(kernels: Kernels, gguf: &Gguf, moe: &MoeSpec, of: &ExpertLinear) -> bool {
    let ty = gguf.tensors()[of.weight].ty;
    // The halves of a fused matrix are multiplied apart.
    let rows = [of.n_out, moe.expert_ffn];
    rows.iter()
        .all(|n| kernels.fastest_order(ty, *n) == RowOrder::Interleaved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, LogitsMode};
    use crate::plans::in_memory::all_in_memory;
    use std::sync::Arc;
    use tier_plan_formats::model::kv::KvType;
    use tier_plan_formats::model::shape::shape_of;
    use tier_plan_kernels::quant::TensorType;
    use tier_plan_testing::{data, demo_model, models};

    /// Returns the logits of a prompt and of two tokens after it, as bits.
    fn logits(gguf: Gguf) -> Vec<u32> {
        let spec = describe(&gguf).unwrap();
        let (shape, n_vocab) = (shape_of(&gguf, &spec), spec.n_vocab as u32);
        let plan = all_in_memory(&shape, 64, KvType::F16);
        let options = LoadOptions {
            threads: Some(2),
            ..LoadOptions::default()
        };
        let mut engine = Engine::load(Arc::new(gguf), &plan, &options, &mut |_, _| {}).unwrap();
        let tokens: Vec<u32> = (0..29).map(|i| (i * 37 + 5) % n_vocab).collect();
        let mut all = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
        for token in [3, 7] {
            all.extend_from_slice(engine.forward(&[token], LogitsMode::Last).unwrap());
        }
        all.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn a_copied_model_has_the_same_bits_as_a_mapped_one() {
        let fixtures = ["arch", "arch2", "quant"].into_iter().flat_map(|folder| {
            let named = move |name| data(&format!("{folder}/{name}.gguf"));
            models(folder).into_iter().map(named)
        });
        let mut interleaved = 0;
        for path in fixtures.chain([demo_model()]) {
            let mut copied = Gguf::open(&path).unwrap();
            copy_to_memory(&mut copied, &LoadOptions::default(), &mut |_, _| {}).unwrap();
            let orders = 0..copied.tensors().len();
            interleaved += orders
                .filter(|id| copied.row_order(*id) == RowOrder::Interleaved)
                .count();
            let mapped = Gguf::open(&path).unwrap();
            assert!(logits(copied) == logits(mapped), "{}", path.display());
        }
        let kernels = Kernels::from_env().unwrap();
        let order = kernels.fastest_order(TensorType::Q4_K, BAND_ROWS);
        assert_eq!(interleaved > 0, order == RowOrder::Interleaved);
    }

    #[test]
    fn rows_that_are_read_or_cut_stay_in_order() {
        let gguf = Gguf::open(&demo_model()).unwrap();
        let spec = describe(&gguf).unwrap();
        let all = spec.matrices_in_bands(BAND_ROWS);
        assert!(all.contains(&spec.output) && !all.is_empty());
        assert!(all.is_subset(&spec.matrices()));
        // A part that begins or ends within a band keeps the whole matrix out.
        assert!(spec.matrices_in_bands(7).len() < all.len());
    }
}
