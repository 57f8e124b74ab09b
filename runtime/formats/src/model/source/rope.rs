//! Keys of rotary positions and of sliding windows.

use super::Source;
use crate::gguf::{ArrayValue, Value};
use crate::model::ModelError;
use crate::model::spec::{RopeKind, RopeScaling, RopeSpec};

impl Source<'_> {
    /// Reads how many of a head's `head_dim` values rotate, `default` without a key.
    pub(in crate::model) fn rope_dims(
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
    pub(in crate::model) fn sections(&self) -> Result<[u32; 4], ModelError> {
        let name = "rope.dimension_sections";
        self.opt_sections(name)?
            .ok_or_else(|| self.bad(name, "is missing; expected up to four counts"))
    }

    /// Reads the rotary embedding of a head of `head_dim` values.
    pub(in crate::model) fn rope(
        &self,
        kind: RopeKind,
        head_dim: usize,
    ) -> Result<RopeSpec, ModelError> {
        let rope = self.rope_without_factors(kind, head_dim)?;
        Ok(RopeSpec {
            freq_factors: self.opt_vector("rope_freqs.weight", rope.dims / 2)?,
            ..rope
        })
    }

    /// Reads the rotary embedding of a head of `head_dim` values, without divisors of frequencies.
    pub(in crate::model) fn rope_without_factors(
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
    pub(in crate::model) fn rope_base(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        let base = self.f32_or(name, default)?;
        if base > 1.0 {
            Ok(base)
        } else {
            Err(self.bad(name, format!("{base}; expected more than 1")))
        }
    }

    /// Refuses rotary sections that would turn text otherwise than by its position: those of
    /// pictures and films may be there, since a text token has the same position in each.
    pub(in crate::model) fn check_text_rope(&self) -> Result<(), ModelError> {
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
    pub(in crate::model) fn windowed_layers(
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
