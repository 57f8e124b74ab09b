//! Loading the dense tensors: everything but routed experts.

use super::storage::Storage;
use super::{Loader, bands};
use crate::error::LoadError;
use crate::layers::weights::{DenseWeights, WeightStorage};
use crate::tiers::arena::Arena;
use crate::tiers::file::ReadMode;
use std::collections::HashMap;
use std::sync::Arc;
use tier_plan_cuda::{Buffer, Device};
use tier_plan_formats::model::ModelError;
use tier_plan_formats::model::spec::{MoeSpec, TensorId};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::RowOrder;
use tier_plan_kernels::quant::{TensorType, dequantize_row};

/// Refuses a table of experts by token, `[n_vocab, n_used]`, with an expert that the layer lacks, or
/// with the same one twice for a token.
fn check_choices(name: &str, moe: &MoeSpec, table: &[f32]) -> Result<(), ModelError> {
    let is_expert = |e: &f32| *e >= 0.0 && *e < moe.n_expert as f32;
    for (token, experts) in table.chunks_exact(moe.n_used).enumerate() {
        let twice = |(i, e): (usize, &f32)| experts[..i].contains(e);
        if !experts.iter().all(is_expert) || experts.iter().enumerate().any(twice) {
            return Err(ModelError::Metadata {
                key: name.to_string(),
                what: format!(
                    "experts {experts:?} of token {token}; expected {} different ones of {}",
                    moe.n_used, moe.n_expert
                ),
            });
        }
    }
    Ok(())
}

impl Loader<'_> {
    /// Loads every dense group to its tier. Vectors of parameters are decoded wherever the plan
    /// puts them.
    pub(super) fn dense(&mut self) -> Result<DenseWeights, LoadError> {
        let tiers: HashMap<_, TierIdx> = self
            .plan
            .dense
            .iter()
            .map(|d| ((d.kind, d.layer), d.tier))
            .collect();
        let (gguf, spec) = (self.model.gguf(), self.model.spec());
        let mut weights = DenseWeights::new(Arc::clone(gguf)).with_scales(&spec.scales);
        let matrices = spec.matrices();
        let in_bands = bands::dense(self.kernels, gguf, spec);
        for group in spec.dense_groups() {
            let tier = tiers[&(group.kind, group.layer)];
            for id in group.tensors {
                let storage = if matrices.contains(&id) {
                    let order = if in_bands.contains(&id) {
                        RowOrder::Interleaved
                    } else {
                        RowOrder::Sequential
                    };
                    self.matrix(id, tier, order)?
                } else {
                    WeightStorage::Vector(self.vector(id)?)
                };
                weights.hold(id, tier, storage);
                self.progress.add(gguf.tensors()[id].n_bytes);
            }
        }
        for (_, moe) in spec.moe_layers() {
            if let Some(id) = moe.by_token {
                check_choices(&gguf.tensors()[id].name, moe, weights.vector(id))?;
            }
        }
        for (tier, bytes) in weights.placed() {
            self.memory.resident_bytes[tier] += bytes;
        }
        Ok(weights)
    }

    /// Loads a matrix. In an arena its rows are in this order.
    fn matrix(
        &mut self,
        id: TensorId,
        tier: TierIdx,
        order: RowOrder,
    ) -> Result<WeightStorage, LoadError> {
        if let Some(device) = self.devices.of(tier) {
            return Ok(WeightStorage::Device(Arc::new(self.to_device(id, device)?)));
        }
        if let Storage::Arena { dense, .. } = &mut self.storage[tier] {
            let piece = dense.take(self.model.gguf().tensors()[id].n_bytes as usize)?;
            let piece = self.whole_tensor(id, order, piece)?;
            return Ok(WeightStorage::ArenaSlice(piece, order));
        }
        if self.options.checks.is_some() {
            self.mapped_tensor(id)?;
        }
        Ok(WeightStorage::Mapped)
    }

    /// Copies a tensor to a GPU, by way of main memory.
    fn to_device(&self, id: TensorId, device: &Arc<dyn Device>) -> Result<Buffer, LoadError> {
        let n_bytes = self.model.gguf().tensors()[id].n_bytes;
        let copied = if self.files.mode == ReadMode::Cached {
            Buffer::of_bytes(device, self.mapped_tensor(id)?)
        } else {
            let piece = Arena::new("", n_bytes)?.take(n_bytes as usize)?;
            Buffer::of_bytes(device, &self.whole_tensor(id, RowOrder::Sequential, piece)?)
        };
        copied.map_err(|source| LoadError::Gpu {
            plan: self.plan.name.clone(),
            source,
        })
    }

    /// Decodes a vector of parameters.
    fn vector(&self, id: TensorId) -> Result<Box<[f32]>, LoadError> {
        let tensor = &self.model.gguf().tensors()[id];
        let n = tensor.n_bytes as usize / tensor.ty.block_bytes();
        debug_assert!(matches!(
            tensor.ty,
            TensorType::F32 | TensorType::F16 | TensorType::BF16 | TensorType::I32
        ));
        let mut values = vec![0.0; n].into_boxed_slice();
        if self.files.mode == ReadMode::Cached {
            dequantize_row(tensor.ty, self.mapped_tensor(id)?, &mut values);
        } else {
            let piece = Arena::new("", tensor.n_bytes)?.take(tensor.n_bytes as usize)?;
            dequantize_row(
                tensor.ty,
                &self.whole_tensor(id, RowOrder::Sequential, piece)?,
                &mut values,
            );
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_formats::gguf::Gguf;
    use tier_plan_formats::model::describe;
    use tier_plan_testing::data;

    #[test]
    fn experts_by_token_are_different_ones_of_the_layer() {
        let gguf = Gguf::open(&data("arch2/deepseek4.gguf")).unwrap();
        let spec = describe(&gguf).unwrap();
        let (_, moe) = spec.moe_layers().next().unwrap();
        assert!(moe.by_token.is_some() && (moe.n_used, moe.n_expert) == (2, 6));
        let check = |table: &[f32]| check_choices("t", moe, table);
        assert!(check(&[0.0, 5.0, 3.0, 2.0]).is_ok());
        for wrong in [[0.0, 6.0], [-1.0, 2.0], [4.0, 4.0], [f32::NAN, 1.0]] {
            let table = [&[0.0, 1.0], &wrong[..]].concat();
            let said = check(&table).unwrap_err().to_string();
            assert!(
                said.starts_with("t: experts [") && said.contains("of token 1"),
                "{said}"
            );
        }
    }
}
