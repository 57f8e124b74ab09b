//! Dense tensors where the plan puts them: in an arena, in a GPU's memory, or in place in the
//! mapped file.

use crate::tiers::arena::ArenaSlice;
use std::sync::Arc;
use tier_plan_cuda::Buffer;
use tier_plan_formats::gguf::{Advice, Gguf};
use tier_plan_formats::model::Scales;
use tier_plan_formats::model::spec::{Linear, TensorId};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::{RowOrder, Weights};

/// Storage of one tensor.
pub(crate) enum WeightStorage {
    /// In place in the mapped file.
    Mapped,
    /// In a tier's arena, with its rows in this order.
    ArenaSlice(ArenaSlice, RowOrder),
    /// In the memory of a GPU.
    Device(Arc<Buffer>),
    /// A vector of parameters, decoded to `f32`. A GPU that uses it has a copy.
    Vector(Box<[f32]>),
}

/// The dense tensors of a loaded model.
pub(crate) struct DenseWeights {
    gguf: Arc<Gguf>,
    /// By tensor id: its tier and its storage; `None` for tensors that no dense group has.
    held: Vec<Option<(TierIdx, WeightStorage)>>,
    /// Factors on the products with matrices.
    scales: Scales,
}

impl DenseWeights {
    pub(crate) fn new(gguf: Arc<Gguf>) -> Self {
        let held = gguf.tensors().iter().map(|_| None).collect();
        Self {
            gguf,
            held,
            scales: Scales::default(),
        }
    }

    /// Gives matrices their factors.
    pub(crate) fn with_scales(mut self, scales: &Scales) -> Self {
        self.scales = scales.clone();
        self
    }

    /// Sets the storage of a tensor.
    pub(crate) fn hold(&mut self, id: TensorId, tier: TierIdx, storage: WeightStorage) {
        self.held[id] = Some((tier, storage));
    }

    /// Copies all mapped matrices to a device.
    #[cfg(test)]
    pub(crate) fn move_to(&mut self, device: &Arc<dyn tier_plan_cuda::Device>) {
        for (tensor, held) in self.gguf.tensors().iter().zip(&mut self.held) {
            if let Some((_, held @ WeightStorage::Mapped)) = held {
                *held = WeightStorage::Device(Arc::new(
                    Buffer::of_bytes(device, self.gguf.bytes(tensor)).unwrap(),
                ));
            }
        }
    }

    /// Returns the tier of every dense tensor, and its bytes in the file.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (TierIdx, u64)> {
        let tensors = self.gguf.tensors().iter().zip(&self.held);
        tensors.filter_map(|(tensor, held)| held.as_ref().map(|(tier, _)| (*tier, tensor.n_bytes)))
    }

    /// Returns a vector of parameters.
    pub(crate) fn vector(&self, id: TensorId) -> &[f32] {
        match &self.held[id] {
            Some((_, WeightStorage::Vector(values))) => values,
            _ => unreachable!(
                "a tensor that the model description calls a vector is decoded at load"
            ),
        }
    }

    pub(crate) fn opt_vector(&self, id: Option<TensorId>) -> Option<&[f32]> {
        id.map(|id| self.vector(id))
    }

    /// Returns a matrix's bytes where they are in a GPU's memory.
    pub(crate) fn on_device(&self, id: TensorId) -> Option<&Arc<Buffer>> {
        match &self.held[id] {
            Some((_, WeightStorage::Device(bytes))) => Some(bytes),
            _ => None,
        }
    }

    /// Returns a matrix that the CPU can read, `[n_out, n_in]`, with its factor.
    pub(crate) fn matrix(&self, id: TensorId, n_out: usize, n_in: usize) -> Weights<'_> {
        let tensor = &self.gguf.tensors()[id];
        let (bytes, order): (&[u8], RowOrder) = match &self.held[id] {
            Some((_, WeightStorage::Mapped)) => (self.gguf.bytes(tensor), self.gguf.row_order(id)),
            Some((_, WeightStorage::ArenaSlice(piece, order))) => (piece, *order),
            _ => {
                unreachable!("a tensor that the model description calls a matrix is held as bytes")
            }
        };
        Weights::new(tensor.ty, bytes, n_out, n_in)
            .and_then(|weights| weights.in_order(order))
            .unwrap_or_else(|| unreachable!("shapes are checked when the model is described"))
            .scaled(self.scales.of_matrix(id))
    }

    /// Returns a matrix that lies in main memory, with its tier; none of a mapped file that was not
    /// copied there, as its pages may have to be read.
    pub(crate) fn in_memory(&self, id: TensorId) -> Option<(TierIdx, Weights<'_>)> {
        let tensor = &self.gguf.tensors()[id];
        let &[n_in, n_out] = tensor.dims.as_slice() else {
            return None;
        };
        let (tier, storage) = self.held[id].as_ref()?;
        let (bytes, order): (&[u8], RowOrder) = match storage {
            WeightStorage::Mapped if self.gguf.is_copied() => {
                (self.gguf.bytes(tensor), self.gguf.row_order(id))
            }
            WeightStorage::ArenaSlice(piece, order) => (piece, *order),
            _ => return None,
        };
        let (n_out, n_in) = (usize::try_from(n_out).ok()?, usize::try_from(n_in).ok()?);
        let matrix = Weights::new(tensor.ty, bytes, n_out, n_in)?;
        Some((*tier, matrix.in_order(order)?))
    }

    /// Has the system read rows of a matrix that is in place in the mapped file, before they are
    /// needed. A hint only.
    pub(crate) fn read_ahead(&self, id: TensorId, rows: &[u64]) {
        if let Some((_, WeightStorage::Mapped)) = &self.held[id] {
            let tensor = &self.gguf.tensors()[id];
            let bytes = tensor.n_bytes / tensor.rows().max(1);
            for row in rows {
                self.gguf
                    .advise(tensor, row * bytes, bytes, Advice::WillNeed);
            }
        }
    }

    /// Returns the rows of a tensor that are a linear layer's matrix.
    pub(crate) fn linear(&self, linear: &Linear) -> Weights<'_> {
        let rows = self.gguf.tensors()[linear.weight]
            .dims
            .get(1)
            .map_or(1, |rows| *rows as usize);
        let first = linear.first_row;
        self.matrix(linear.weight, rows, linear.n_in)
            .rows(first..first + linear.n_out)
            .unwrap_or_else(|| unreachable!("shapes are checked when the model is described"))
    }

    /// Returns the bias of a matrix: its part of the vector where several matrices share one.
    pub(crate) fn bias(&self, linear: &Linear) -> Option<&[f32]> {
        let all = self.opt_vector(linear.bias)?;
        let first = if all.len() == linear.n_out {
            0
        } else {
            linear.first_row
        };
        Some(&all[first..first + linear.n_out])
    }

    pub(crate) fn ty(&self, id: TensorId) -> TensorType {
        self.gguf.tensors()[id].ty
    }
}
