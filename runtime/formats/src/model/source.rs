//! Reads an architecture's keys and tensors out of a GGUF file, with every shape checked.

use super::ModelError;
use super::spec::{
    Activation, ExpertLinear, GatedFfn, Linear, RopeKind, RopeScaling, RopeSpec, TensorId,
};
use crate::gguf::{ArrayValue, Gguf, Value};
use std::collections::HashMap;
use tier_plan_kernels::quant::TensorType;

/// Bounds on dimensions, far above any real model, that keep products of two of them inside 64
/// bits.
const MAX_DIM: u32 = 1 << 24;

/// A file being described.
pub(super) struct Source<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
    index: HashMap<&'a str, TensorId>,
}

impl<'a> Source<'a> {
    pub(super) fn new(gguf: &'a Gguf, arch: &'a str) -> Self {
        let index = gguf
            .tensors()
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.as_str(), i))
            .collect();
        Self { gguf, arch, index }
    }

    pub(super) fn arch(&self) -> &str {
        self.arch
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// Returns an error about the architecture's key `name`.
    pub(super) fn bad(&self, name: &str, what: impl Into<String>) -> ModelError {
        ModelError::Metadata {
            key: self.key(name),
            what: what.into(),
        }
    }

    /// Reads a dimension: at least 1, and within bounds.
    pub(super) fn dim(&self, name: &str) -> Result<usize, ModelError> {
        let value = self.gguf.u32(&self.key(name))?;
        self.check_dim(name, value)
    }

    pub(super) fn opt_dim(&self, name: &str) -> Result<Option<usize>, ModelError> {
        self.gguf
            .opt_u32(&self.key(name))?
            .map(|v| self.check_dim(name, v))
            .transpose()
    }

    /// Reads a number of fractions: finite, and not negative.
    pub(super) fn epsilon(&self, name: &str) -> Result<f32, ModelError> {
        let value = self.gguf.f32(&self.key(name))?;
        if value.is_finite() && value >= 0.0 {
            Ok(value)
        } else {
            Err(self.bad(name, format!("{value}; expected a number from 0 on")))
        }
    }

    /// Reads an array of `len` integers of 64 bits, or a longer one, of which the first are taken.
    pub(super) fn u64_array(&self, name: &str, len: usize) -> Result<Vec<u64>, ModelError> {
        let all: Option<Vec<u64>> = match self.gguf.get(&self.key(name)) {
            Some(Value::Array(array)) => array.integers(),
            _ => None,
        };
        let Some(mut all) = all.filter(|all| all.len() >= len) else {
            let what = format!("expected an array of {len} integers from 0 on");
            return Err(self.bad(name, what));
        };
        all.truncate(len);
        Ok(all)
    }

    /// Reads numbers that are given once or per layer; `None` where the key is absent.
    pub(super) fn opt_f32_per_layer(
        &self,
        name: &str,
        n_layer: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let key = self.key(name);
        let values = match self.gguf.get(&key) {
            None => return Ok(None),
            Some(Value::Array(_)) => self.gguf.opt_f32_array(&key)?.unwrap_or_default(),
            Some(_) => vec![self.gguf.f32(&key)?; n_layer],
        };
        if values.len() < n_layer || values.iter().any(|v| !v.is_finite()) {
            let what = format!("expected a number, or one for each of {n_layer} layers");
            return Err(self.bad(name, what));
        }
        Ok(Some(values[..n_layer].to_vec()))
    }

    /// Reads a count that the file must have, and that may be 0.
    pub(super) fn count(&self, name: &str) -> Result<u32, ModelError> {
        Ok(self.gguf.u32(&self.key(name))?)
    }

    /// Reads numbers, if the key is there.
    pub(super) fn opt_numbers(&self, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
        Ok(self.gguf.opt_number_array(&self.key(name))?)
    }

    /// Reads a count from 0 to `max` that the file must have.
    pub(super) fn count_up_to(&self, name: &str, max: usize) -> Result<usize, ModelError> {
        match self.count(name)? as usize {
            0 => Ok(0),
            n => self.in_bounds(name, n, max),
        }
    }

    /// Reads a finite number that the file must have.
    pub(super) fn required_f32(&self, name: &str) -> Result<f32, ModelError> {
        self.gguf.f32(&self.key(name))?;
        self.f32_or(name, 0.0)
    }

    /// Returns the width of `expert_shared_count` shared experts of `one` as one block; 0 without
    /// any. The file must have the count.
    pub(super) fn shared_width(&self, one: usize) -> Result<usize, ModelError> {
        let name = "expert_shared_count";
        let width = (self.count(name)? as usize).saturating_mul(one);
        if width > MAX_DIM as usize {
            return Err(self.bad(
                name,
                format!("{width} values in all; expected up to {MAX_DIM}"),
            ));
        }
        Ok(width)
    }

    /// Reads a count, 0 where it is absent.
    pub(super) fn opt_count(&self, name: &str) -> Result<u32, ModelError> {
        Ok(self.gguf.opt_u32(&self.key(name))?.unwrap_or(0))
    }

    /// Reads a dimension that is given once or per layer.
    pub(super) fn dim_per_layer(
        &self,
        name: &str,
        n_layer: usize,
    ) -> Result<Vec<usize>, ModelError> {
        let values = self.gguf.u32_per_layer(&self.key(name), n_layer as u32)?;
        values
            .into_iter()
            .map(|v| self.check_dim(name, v))
            .collect()
    }

    /// Reads a layer's dimension, which is given once or per layer; others may be 0.
    pub(super) fn dim_of_layer(
        &self,
        name: &str,
        layer: usize,
        n_layer: usize,
    ) -> Result<usize, ModelError> {
        let value = self.counts_per_layer(name, n_layer)?[layer];
        self.check_dim(name, value)
    }

    /// Reads finite numbers that are given once or per layer.
    pub(super) fn numbers_per_layer(
        &self,
        name: &str,
        n_layer: usize,
        default: f32,
    ) -> Result<Vec<f32>, ModelError> {
        let key = self.key(name);
        let mut numbers = match self.gguf.get(&key) {
            Some(Value::Array(_)) => self.gguf.opt_number_array(&key)?.unwrap_or_default(),
            _ => vec![self.f32_or(name, default)?; n_layer],
        };
        numbers.truncate(n_layer);
        if numbers.len() < n_layer || numbers.iter().any(|x| !x.is_finite()) {
            let what = format!("expected a finite number for each of {n_layer} layers");
            return Err(self.bad(name, what));
        }
        Ok(numbers)
    }

    /// Returns whether a key has an array.
    pub(super) fn is_array(&self, name: &str) -> bool {
        matches!(self.gguf.get(&self.key(name)), Some(Value::Array(_)))
    }

    /// Reads a count that is given once or per layer, and may be 0.
    pub(super) fn counts_per_layer(
        &self,
        name: &str,
        n_layer: usize,
    ) -> Result<Vec<u32>, ModelError> {
        Ok(self.gguf.u32_per_layer(&self.key(name), n_layer as u32)?)
    }

    /// Reads booleans that the file must have: one per layer, or one for all.
    pub(super) fn flags(&self, name: &str, n_layer: usize) -> Result<Vec<bool>, ModelError> {
        match self.opt_flags(name, n_layer)? {
            Some(flags) => Ok(flags),
            None => Err(self.bad(name, "is missing; expected one flag per layer")),
        }
    }

    /// Reads booleans: one per layer (or more, of trailing prediction blocks too), or one for all.
    pub(super) fn opt_flags(
        &self,
        name: &str,
        n_layer: usize,
    ) -> Result<Option<Vec<bool>>, ModelError> {
        let key = self.key(name);
        let flags = match self.gguf.get(&key) {
            None => return Ok(None),
            Some(Value::Bool(one)) => vec![*one; n_layer],
            Some(Value::Array(ArrayValue::Bool(flags))) => {
                flags.iter().copied().take(n_layer).collect()
            }
            Some(_) => self
                .counts_per_layer(name, n_layer)?
                .into_iter()
                .map(|flag| flag != 0)
                .collect(),
        };
        if flags.len() == n_layer {
            return Ok(Some(flags));
        }
        Err(self.bad(
            name,
            format!(
                "{} values; expected one for each of {n_layer} layers",
                flags.len()
            ),
        ))
    }

    /// Pairs of rotated values that each of four axes has; missing axes have none.
    pub(super) fn opt_sections(&self, name: &str) -> Result<Option<[u32; 4]>, ModelError> {
        let Some(found) = self.gguf.opt_u32_array(&self.key(name))? else {
            return Ok(None);
        };
        let mut sections = [0; 4];
        let fits = found.len() <= sections.len()
            && found.iter().all(|s| *s <= MAX_DIM)
            && found.iter().any(|s| *s > 0);
        if !fits {
            return Err(self.bad(
                name,
                format!("{found:?}; expected up to four counts, not all of them 0"),
            ));
        }
        sections[..found.len()].copy_from_slice(&found);
        Ok(Some(sections))
    }

    /// Returns the dimension if it is from 1 to `max`.
    pub(super) fn in_bounds(
        &self,
        name: &str,
        value: usize,
        max: usize,
    ) -> Result<usize, ModelError> {
        if (1..=max).contains(&value) {
            Ok(value)
        } else {
            Err(self.bad(name, format!("{value} is out of range (1 to {max})")))
        }
    }

    pub(super) fn bool_or(&self, name: &str, default: bool) -> Result<bool, ModelError> {
        Ok(self.gguf.opt_bool(&self.key(name))?.unwrap_or(default))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.gguf.get(&self.key(name)).is_some()
    }

    fn check_dim(&self, name: &str, value: u32) -> Result<usize, ModelError> {
        if (1..=MAX_DIM).contains(&value) {
            Ok(value as usize)
        } else {
            Err(self.bad(name, format!("{value} is out of range (1 to {MAX_DIM})")))
        }
    }

    pub(super) fn f32_or(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        let value = self.gguf.opt_f32(&self.key(name))?.unwrap_or(default);
        if value.is_finite() {
            Ok(value)
        } else {
            Err(self.bad(name, format!("{value} is not a finite number")))
        }
    }

    pub(super) fn norm_eps(&self) -> Result<f32, ModelError> {
        let name = "attention.layer_norm_rms_epsilon";
        let value = self.gguf.f32(&self.key(name))?;
        if value.is_finite() && value >= 0.0 {
            Ok(value)
        } else {
            Err(self.bad(name, format!("{value}")))
        }
    }

    /// Finds a tensor of exactly this shape (fastest axis first), if the file has one of the name.
    pub(super) fn opt_tensor(
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
    pub(super) fn numbers(&self, name: &str, dims: &[usize]) -> Result<TensorId, ModelError> {
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

    pub(super) fn tensor(&self, name: &str, dims: &[usize]) -> Result<TensorId, ModelError> {
        self.opt_tensor(name, dims)?
            .ok_or_else(|| self.missing(name))
    }

    /// Finds a vector of parameters: `len` floating-point values.
    pub(super) fn vector(&self, name: &str, len: usize) -> Result<TensorId, ModelError> {
        self.parameters(name, &[len])
    }

    /// Finds floating-point parameters of a shape (fastest axis first).
    pub(super) fn parameters(&self, name: &str, dims: &[usize]) -> Result<TensorId, ModelError> {
        let id = self.tensor(name, dims)?;
        self.check_float(id)?;
        Ok(id)
    }

    /// Finds floating-point parameters of the first of some shapes (fastest axis first) that fits.
    /// All have the same values in the same order.
    pub(super) fn parameters_of(
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

    pub(super) fn opt_vector(
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
    pub(super) fn linear(
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
    pub(super) fn expert_linear(
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
    pub(super) fn rows_of(&self, name: &str) -> Option<u64> {
        let id = *self.index.get(name)?;
        self.gguf.tensors()[id].dims.get(1).copied()
    }

    /// Whether the file has a tensor of this name.
    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Finds the gated feed-forward block of a layer without routed experts.
    pub(super) fn gated_ffn(
        &self,
        layer: usize,
        hidden: usize,
        ffn: usize,
    ) -> Result<GatedFfn, ModelError> {
        self.named_ffn(layer, "", hidden, ffn)
    }

    /// Finds the gated block whose tensors' names end in `suffix`: `_shexp` for shared experts.
    pub(super) fn named_ffn(
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
    pub(super) fn table(&self, name: &str, width: usize) -> Result<(TensorId, usize), ModelError> {
        let id = *self.index.get(name).ok_or_else(|| self.missing(name))?;
        let rows = self.gguf.tensors()[id].dims.get(1).copied().unwrap_or(1);
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        Ok((self.tensor(name, &[width, rows])?, rows))
    }

    /// Reads numbers of layers; none where the key is absent.
    pub(super) fn layer_numbers(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        Ok(self
            .gguf
            .opt_u32_array(&self.key(name))?
            .unwrap_or_default())
    }

    /// Reads an integer of 32 bits.
    pub(super) fn number(&self, name: &str) -> Result<u32, ModelError> {
        Ok(self.gguf.u32(&self.key(name))?)
    }

    /// Refuses a file that lacks one of these keys.
    pub(super) fn require(&self, names: &[&str]) -> Result<(), ModelError> {
        match names.iter().find(|name| !self.has(name)) {
            None => Ok(()),
            Some(name) => Err(self.bad(name, "is missing")),
        }
    }

    /// Finds the embedding, and returns it with the vocabulary size, its number of rows.
    pub(super) fn embedding(&self, hidden: usize) -> Result<(TensorId, usize), ModelError> {
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

    /// Reads how many of a head's `head_dim` values rotate, `default` without a key.
    pub(super) fn rope_dims(
        &self,
        name: &str,
        default: usize,
        head_dim: usize,
    ) -> Result<usize, ModelError> {
        let dims = self.opt_dim(name)?.unwrap_or(default);
        if dims > head_dim || !dims.is_multiple_of(2) {
            let what = format!("{dims}; expected an even number up to the head's {head_dim}");
            return Err(self.bad(name, what));
        }
        Ok(dims)
    }

    /// Reads the sections of rotating pairs, which the file must have.
    pub(super) fn sections(&self) -> Result<[u32; 4], ModelError> {
        let name = "rope.dimension_sections";
        self.opt_sections(name)?
            .ok_or_else(|| self.bad(name, "is missing; expected up to four counts"))
    }

    /// Reads the rotary embedding of a head of `head_dim` values.
    pub(super) fn rope(&self, kind: RopeKind, head_dim: usize) -> Result<RopeSpec, ModelError> {
        let rope = self.rope_without_factors(kind, head_dim)?;
        Ok(RopeSpec {
            freq_factors: self.opt_vector("rope_freqs.weight", rope.dims / 2)?,
            ..rope
        })
    }

    /// Reads the rotary embedding of a head of `head_dim` values, without divisors of frequencies.
    pub(super) fn rope_without_factors(
        &self,
        kind: RopeKind,
        head_dim: usize,
    ) -> Result<RopeSpec, ModelError> {
        let dims = self.rope_dims("rope.dimension_count", head_dim, head_dim)?;
        let base = self.rope_base("rope.freq_base", 10_000.0)?;
        let scaling = self.rope_scaling()?;
        // YaRN's own factor, which makes attention over more tokens as sharp as over the original
        // context.
        let sharpened = match scaling {
            RopeScaling::Yarn { factor, .. } => 1.0 + 0.1 * factor.max(1.0).ln(),
            RopeScaling::None | RopeScaling::Linear(_) => 1.0,
        };
        Ok(RopeSpec {
            kind,
            dims,
            base,
            scaling,
            magnitude: self.f32_or("rope.scaling.attn_factor", 1.0)? * sharpened,
            freq_factors: None,
            long_factors: None,
            sections: None,
        })
    }

    /// Reads the base of a rotary embedding's frequencies.
    pub(super) fn rope_base(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        let base = self.f32_or(name, default)?;
        if base > 1.0 {
            Ok(base)
        } else {
            Err(self.bad(name, format!("{base}; expected more than 1")))
        }
    }

    /// Refuses rotary sections that would turn text otherwise than by its position: those of
    /// pictures and films may be there, since a text token has the same position in each.
    pub(super) fn check_text_rope(&self) -> Result<(), ModelError> {
        let name = "rope.dimension_sections";
        let sections = self
            .gguf
            .opt_i32_array(&self.key(name))?
            .unwrap_or_default();
        if sections.get(3).is_none_or(|extra| *extra == 0) {
            Ok(())
        } else {
            Err(self.bad(
                name,
                format!("{sections:?}; supported: a fourth section of 0"),
            ))
        }
    }

    /// Reads which layers have a sliding window: one flag per layer, or a period in which all
    /// layers but the last have one.
    pub(super) fn windowed_layers(
        &self,
        n_layer: usize,
        period: u32,
    ) -> Result<Vec<bool>, ModelError> {
        let name = "attention.sliding_window_pattern";
        let key = self.key(name);
        let period = match self.gguf.get(&key) {
            Some(Value::Array(ArrayValue::Bool(flags))) if flags.len() >= n_layer => {
                return Ok(flags[..n_layer].to_vec());
            }
            Some(Value::Array(ArrayValue::Bool(flags))) => {
                return Err(self.bad(name, format!("{} flags for {n_layer} layers", flags.len())));
            }
            Some(Value::Array(_)) => {
                let flags = self.gguf.u32_per_layer(&key, n_layer as u32)?;
                return Ok(flags.into_iter().map(|flag| flag != 0).collect());
            }
            Some(_) => self.gguf.u32(&key)?,
            None => period,
        };
        Ok((0..n_layer)
            .map(|i| period == 0 || i as u32 % period < period - 1)
            .collect())
    }

    fn rope_scaling(&self) -> Result<RopeScaling, ModelError> {
        let name = "rope.scaling.type";
        // Files from before the two keys have one, whose scaling is always linear.
        let factor_name = if self.has("rope.scaling.factor") {
            "rope.scaling.factor"
        } else {
            "rope.scale_linear"
        };
        let factor = self.f32_or(factor_name, 0.0)?;
        let kind = self
            .gguf
            .opt_str(&self.key(name))?
            .unwrap_or(if factor > 0.0 { "linear" } else { "none" });
        if kind != "none" && factor < 0.0 {
            return Err(self.bad(factor_name, format!("{factor}; expected a positive number")));
        }
        match kind {
            "none" => Ok(RopeScaling::None),
            // A factor of zero stands for "not scaled" in files that name a type all the same.
            "linear" | "yarn" if factor == 0.0 => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear(factor)),
            "yarn" => Ok(RopeScaling::Yarn {
                factor,
                original_context: match self.opt_dim("rope.scaling.original_context_length")? {
                    Some(context) => context as f32,
                    None => self.dim("context_length")? as f32,
                },
                beta_fast: self.f32_or("rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: self.f32_or("rope.scaling.yarn_beta_slow", 1.0)?,
                ext: 1.0,
            }),
            other => Err(self.bad(
                name,
                format!("'{other}' is not supported; supported: none, linear, yarn"),
            )),
        }
    }
}
