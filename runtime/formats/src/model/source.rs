//! Reads an architecture's keys and tensors out of a GGUF file, with every shape checked. The keys are
//! read here.

mod rope;
mod tensors;

use super::ModelError;
use super::spec::TensorId;
use crate::gguf::{ArrayValue, Gguf, Value};
use std::collections::HashMap;

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
}
