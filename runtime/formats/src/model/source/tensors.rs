//! Tensors of an architecture, by name and exact shape.

use super::{MAX_DIM, Source};
use crate::model::ModelError;
use crate::model::spec::{Activation, ExpertLinear, GatedFfn, Linear, TensorId};
use tier_plan_kernels::quant::TensorType;

impl Source<'_> {
    /// Finds a tensor of exactly this shape (fastest axis first), if the file has one of the name.
    pub(in crate::model) fn opt_tensor(
        &self,
        name: &str,
        dims: &[usize],
    ) -> Result<Option<TensorId>, ModelError> {
        let Some(&id) = self.index.get(name) else {
            return Ok(None);
        };
        let found = &self.gguf.tensors()[id].dims;
        let expected: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
        let trimmed = |d: &[u64]| {
            let mut d = d.to_vec();
            while d.len() > 1 && d.last() == Some(&1) {
                d.pop();
            }
            d
        };
        if trimmed(found) == trimmed(&expected) {
            Ok(Some(id))
        } else {
            Err(ModelError::Shape {
                name: name.to_string(),
                found: found.clone(),
                expected,
            })
        }
    }

    /// Finds a table of whole numbers of this shape (fastest axis first).
    pub(in crate::model) fn numbers(
        &self,
        name: &str,
        dims: &[usize],
    ) -> Result<TensorId, ModelError> {
        let id = self.opt_tensor(name, dims)?;
        let id = id.ok_or_else(|| self.missing(name))?;
        match self.gguf.tensors()[id].ty {
            TensorType::I32 => Ok(id),
            ty => Err(ModelError::Metadata {
                key: name.to_string(),
                what: format!("is {ty}; expected I32"),
            }),
        }
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::MissingTensor {
            name: name.to_string(),
            arch: self.arch.to_string(),
        }
    }

    pub(in crate::model) fn tensor(
        &self,
        name: &str,
        dims: &[usize],
    ) -> Result<TensorId, ModelError> {
        self.opt_tensor(name, dims)?
            .ok_or_else(|| self.missing(name))
    }

    /// Finds a vector of parameters: `len` floating-point values.
    pub(in crate::model) fn vector(&self, name: &str, len: usize) -> Result<TensorId, ModelError> {
        self.parameters(name, &[len])
    }

    /// Finds floating-point parameters of a shape (fastest axis first).
    pub(in crate::model) fn parameters(
        &self,
        name: &str,
        dims: &[usize],
    ) -> Result<TensorId, ModelError> {
        let id = self.tensor(name, dims)?;
        self.check_float(id)?;
        Ok(id)
    }

    /// Finds floating-point parameters of the first of some shapes (fastest axis first) that fits.
    /// All have the same values in the same order.
    pub(in crate::model) fn parameters_of(
        &self,
        name: &str,
        shapes: &[&[usize]],
    ) -> Result<TensorId, ModelError> {
        let mut found = self.parameters(name, shapes[0]);
        for dims in &shapes[1..] {
            if let Err(ModelError::Shape { .. }) = found {
                found = self.parameters(name, dims);
            }
        }
        found
    }

    pub(in crate::model) fn opt_vector(
        &self,
        name: &str,
        len: usize,
    ) -> Result<Option<TensorId>, ModelError> {
        let id = self.opt_tensor(name, &[len])?;
        id.map(|id| self.check_float(id).map(|()| id)).transpose()
    }

    fn check_float(&self, id: TensorId) -> Result<(), ModelError> {
        let tensor = &self.gguf.tensors()[id];
        match tensor.ty {
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => Ok(()),
            ty => Err(ModelError::Metadata {
                key: tensor.name.clone(),
                what: format!("is {ty}, but a vector of parameters must be F32, F16 or BF16"),
            }),
        }
    }

    /// Finds `PREFIX.weight` of shape `[n_out, n_in]`, with `PREFIX.bias` where there is one.
    pub(in crate::model) fn linear(
        &self,
        prefix: &str,
        n_in: usize,
        n_out: usize,
    ) -> Result<Linear, ModelError> {
        let weight = self.tensor(&format!("{prefix}.weight"), &[n_in, n_out])?;
        let bias = self.opt_vector(&format!("{prefix}.bias"), n_out)?;
        Ok(Linear {
            weight,
            bias,
            n_out,
            n_in,
            first_row: 0,
        })
    }

    /// Finds `PREFIX.weight` of shape `[n_expert, n_out, n_in]`, with `PREFIX.bias`, `[n_expert,
    /// n_out]`, where there is one.
    pub(in crate::model) fn expert_linear(
        &self,
        prefix: &str,
        n_in: usize,
        n_out: usize,
        n_expert: usize,
    ) -> Result<ExpertLinear, ModelError> {
        let weight = self.tensor(&format!("{prefix}.weight"), &[n_in, n_out, n_expert])?;
        let bias = self.opt_tensor(&format!("{prefix}.bias"), &[n_out, n_expert])?;
        if let Some(bias) = bias {
            self.check_float(bias)?;
        }
        Ok(ExpertLinear {
            weight,
            bias,
            n_out,
            n_in,
        })
    }

    /// Returns the rows of a tensor, if the file has it.
    pub(in crate::model) fn rows_of(&self, name: &str) -> Option<u64> {
        let id = *self.index.get(name)?;
        self.gguf.tensors()[id].dims.get(1).copied()
    }

    /// Whether the file has a tensor of this name.
    pub(in crate::model) fn has_tensor(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Finds the gated feed-forward block of a layer without routed experts.
    pub(in crate::model) fn gated_ffn(
        &self,
        layer: usize,
        hidden: usize,
        ffn: usize,
    ) -> Result<GatedFfn, ModelError> {
        self.named_ffn(layer, "", hidden, ffn)
    }

    /// Finds the gated block whose tensors' names end in `suffix`: `_shexp` for shared experts.
    pub(in crate::model) fn named_ffn(
        &self,
        layer: usize,
        suffix: &str,
        hidden: usize,
        ffn: usize,
    ) -> Result<GatedFfn, ModelError> {
        Ok(GatedFfn {
            gate: Some(self.linear(&format!("blk.{layer}.ffn_gate{suffix}"), hidden, ffn)?),
            up: self.linear(&format!("blk.{layer}.ffn_up{suffix}"), hidden, ffn)?,
            down: self.linear(&format!("blk.{layer}.ffn_down{suffix}"), ffn, hidden)?,
            activation: Activation::Silu,
        })
    }

    /// Finds a table with rows of `width` values, and returns it with its number of rows.
    pub(in crate::model) fn table(
        &self,
        name: &str,
        width: usize,
    ) -> Result<(TensorId, usize), ModelError> {
        let id = *self.index.get(name).ok_or_else(|| self.missing(name))?;
        let rows = self.gguf.tensors()[id].dims.get(1).copied().unwrap_or(1);
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        Ok((self.tensor(name, &[width, rows])?, rows))
    }

    /// Finds the embedding, and returns it with the vocabulary size, its number of rows.
    pub(in crate::model) fn embedding(
        &self,
        hidden: usize,
    ) -> Result<(TensorId, usize), ModelError> {
        let name = "token_embd.weight";
        let missing = || ModelError::MissingTensor {
            name: name.to_string(),
            arch: self.arch.to_string(),
        };
        let id = *self.index.get(name).ok_or_else(missing)?;
        let rows = self.gguf.tensors()[id].dims.get(1).copied().unwrap_or(0);
        let n_vocab = u32::try_from(rows)
            .ok()
            .filter(|r| (1..=MAX_DIM).contains(r));
        let n_vocab = n_vocab.ok_or_else(|| ModelError::Metadata {
            key: name.to_string(),
            what: format!("{rows} rows; expected 1 to {MAX_DIM}"),
        })? as usize;
        Ok((self.tensor(name, &[hidden, n_vocab])?, n_vocab))
    }
}
