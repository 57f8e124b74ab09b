//! Loading the dense tensors: everything but routed experts.

use super::Loader;
use super::storage::Storage;
use crate::error::LoadError;
use crate::layers::weights::{DenseWeights, WeightStorage};
use crate::tiers::arena::Arena;
use crate::tiers::file::ReadMode;
use std::collections::HashMap;
use std::sync::Arc;
use tier_plan_cuda::{Buffer, Device};
use tier_plan_formats::model::spec::TensorId;
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::quant::{TensorType, dequantize_row};

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
        for group in spec.dense_groups() {
            let tier = tiers[&(group.kind, group.layer)];
            for id in group.tensors {
                let storage = if matrices.contains(&id) {
                    self.matrix(id, tier)?
                } else {
                    WeightStorage::Vector(self.vector(id)?)
                };
                weights.hold(id, tier, storage);
                self.progress.add(gguf.tensors()[id].n_bytes);
            }
        }
        for (tier, bytes) in weights.placed() {
            self.memory.resident_bytes[tier] += bytes;
        }
        Ok(weights)
    }

    fn matrix(&mut self, id: TensorId, tier: TierIdx) -> Result<WeightStorage, LoadError> {
        if let Some(device) = self.devices.of(tier) {
            return Ok(WeightStorage::Device(Arc::new(self.to_device(id, device)?)));
        }
        if let Storage::Arena { weights, .. } = &mut self.storage[tier] {
            let piece = weights.take(self.model.gguf().tensors()[id].n_bytes as usize)?;
            return Ok(WeightStorage::ArenaSlice(self.whole_tensor(id, piece)?));
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
            Buffer::of_bytes(device, &self.whole_tensor(id, piece)?)
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
            TensorType::F32 | TensorType::F16 | TensorType::BF16
        ));
        let mut values = vec![0.0; n].into_boxed_slice();
        if self.files.mode == ReadMode::Cached {
            dequantize_row(tensor.ty, self.mapped_tensor(id)?, &mut values);
        } else {
            let piece = Arena::new("", tensor.n_bytes)?.take(tensor.n_bytes as usize)?;
            dequantize_row(tensor.ty, &self.whole_tensor(id, piece)?, &mut values);
        }
        Ok(values)
    }
}
