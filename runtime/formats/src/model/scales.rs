//! Factors on the products with matrices: `X.scale` beside `X.weight`, one number, or one per
//! expert of a stacked tensor.
//!
//! Files in NVFP4 have them, since the 8-bit scales of their blocks have a small range; a tensor of
//! any other type may have one too. `X.input_scale` is for kernels that quantize activations to 4
//! bits, and is not read.

use super::ModelError;
use super::spec::{ModelSpec, TensorId};
use crate::gguf::{Gguf, TensorInfo};
use std::collections::{HashMap, HashSet};
use tier_plan_kernels::quant::{TensorType, dequantize_row};

const SUFFIX: &str = ".scale";

/// The factors of a model's matrices.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scales {
    /// By tensor of a matrix: one value, or `[n_expert]`.
    by_matrix: HashMap<TensorId, Vec<f32>>,
}

impl Scales {
    /// Returns a matrix's factor, 1 where the file has none.
    pub fn of_matrix(&self, id: TensorId) -> f32 {
        match self.by_matrix.get(&id).map(Vec::as_slice) {
            Some([scale]) => *scale,
            _ => 1.0,
        }
    }

    /// Returns the factor of each expert's slice of a stacked tensor, if the file has them.
    pub fn of_experts(&self, id: TensorId) -> Option<&[f32]> {
        self.by_matrix.get(&id).map(Vec::as_slice)
    }

    /// Whether a matrix, or a slice of a stacked one, has a factor other than 1.
    pub fn has(&self, id: TensorId) -> bool {
        self.by_matrix.contains_key(&id)
    }

    /// Whether no matrix has a factor other than 1.
    pub fn is_empty(&self) -> bool {
        self.by_matrix.is_empty()
    }

    /// Reads the factors of the matrices of a network.
    ///
    /// # Errors
    /// When a factor has another shape than its matrix asks for, is not a floating-point tensor, or
    /// is not finite.
    pub(super) fn read(gguf: &Gguf, spec: &ModelSpec) -> Result<Self, ModelError> {
        // Some architectures read such a tensor themselves.
        let own: HashSet<TensorId> = spec
            .moe_layers()
            .filter_map(|(_, moe)| moe.expert_scale)
            .collect();
        let tensors = gguf.tensors().iter().enumerate();
        let found: HashMap<&str, &TensorInfo> = tensors
            .filter(|(id, _)| !own.contains(id))
            .filter_map(|(_, t)| Some((t.name.strip_suffix(SUFFIX)?, t)))
            .collect();
        let mut scales = Scales::default();
        if found.is_empty() {
            return Ok(scales);
        }
        let mut add = |id: TensorId, n: usize| -> Result<(), ModelError> {
            let name = gguf.tensors()[id].name.strip_suffix(".weight");
            if let Some(tensor) = name.and_then(|name| found.get(name)) {
                let values = read(gguf, tensor, n)?;
                if values.iter().any(|v| *v != 1.0) {
                    scales.by_matrix.insert(id, values);
                }
            }
            Ok(())
        };
        let routers: Vec<_> = spec.moe_layers().map(|(_, m)| m.router.weight).collect();
        for id in spec.matrices() {
            // What stands beside an embedding or a router is no factor on its products.
            let has_factor = id != spec.embedding && !routers.contains(&id);
            if has_factor {
                add(id, 1)?;
            }
        }
        for (_, moe) in spec.moe_layers() {
            for linear in moe.expert_linears() {
                // Where an expert's factor is a parameter of the network, its router applies it.
                if moe.expert_scale.is_none() || linear.weight != moe.down.weight {
                    add(linear.weight, moe.n_expert)?;
                }
            }
        }
        Ok(scales)
    }
}

/// Reads `n` factors.
fn read(gguf: &Gguf, tensor: &TensorInfo, n: usize) -> Result<Vec<f32>, ModelError> {
    let wrong = |what: String| ModelError::Metadata {
        key: tensor.name.clone(),
        what,
    };
    let is_float = matches!(
        tensor.ty,
        TensorType::F32 | TensorType::F16 | TensorType::BF16
    );
    if !is_float {
        let what = format!("is {}, but a factor must be F32, F16 or BF16", tensor.ty);
        return Err(wrong(what));
    }
    let has_n = tensor.cols() == n as u64 && tensor.rows() == 1;
    if !has_n {
        return Err(ModelError::Shape {
            name: tensor.name.clone(),
            found: tensor.dims.clone(),
            expected: vec![n as u64],
        });
    }
    let mut values = vec![0.0; n];
    dequantize_row(tensor.ty, gguf.bytes(tensor), &mut values);
    match values.iter().find(|v| !v.is_finite()) {
        Some(value) => Err(wrong(format!("{value}; expected finite factors"))),
        None => Ok(values),
    }
}
