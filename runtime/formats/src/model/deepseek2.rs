//! `deepseek2` and `mistral4`: DeepSeek V2 and V3, Kimi K2, Mistral 4 and their relatives. Latent attention, leading dense
//! layers, then routed and shared experts.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Setting, Shared, heads, moe};
use super::mla::{MlaSizes, Queries, kv_up, mla_spec};
use super::options::yarn_magnitude;
use super::source::Source;
use super::spec::{
    Activation, Ffn, Gating, LayerSpec, Mixer, MlaSpec, ModelSpec, Residual, RopeKind, RopeScaling,
    RopeSpec, Temperature,
};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    let mla = Mla::read(s)?;
    let heads = heads(s, n_layer)?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    let n_dense = if s.opt_count("expert_count")? == 0 {
        n_layer
    } else {
        n_dense.min(n_layer)
    };
    let dense = if n_dense > 0 {
        s.dim_per_layer("feed_forward_length", n_layer)?
    } else {
        Vec::new()
    };
    let expert = if n_dense < n_layer {
        s.dim_per_layer("expert_feed_forward_length", n_layer)?
    } else {
        Vec::new()
    };
    let n_shared = s.opt_count("expert_shared_count")? as usize;
    let layers = (0..n_layer)
        .map(|i| {
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: mla.mixer(s, i, hidden, heads[i].n_head)?,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: if i < n_dense {
                    Ffn::Dense(s.gated_ffn(i, hidden, dense[i])?)
                } else {
                    let ffn = expert[i]
                        .checked_mul(n_shared)
                        .filter(|width| *width <= MAX_SHARED_WIDTH);
                    let ffn =
                        ffn.ok_or_else(|| s.bad("expert_shared_count", format!("{n_shared}")))?;
                    let options = MoeOptions {
                        expert_ffn: expert[i],
                        gating: Setting::Default(default_gating(s, n_layer, hidden)?),
                        normalize: Setting::Default(false),
                        scale: Setting::Default(1.0),
                        activation: Activation::Silu,
                        shared: (ffn > 0).then_some(Shared { ffn, gated: false }),
                    };
                    Ffn::Moe(moe(s, i, hidden, &options)?)
                },
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// Bound on the width of the shared experts together, far above any real model.
const MAX_SHARED_WIDTH: usize = 1 << 24;

/// Returns the gating of files that don't say: softmax, as in the first models of the family. Only
/// one later model, known by its layers and vocabulary, has files without the key and gates by
/// sigmoid.
fn default_gating(s: &Source<'_>, n_layer: usize, hidden: usize) -> Result<Gating, ModelError> {
    let (_, n_vocab) = s.embedding(hidden)?;
    Ok(if matches!(n_layer, 47 | 48) && n_vocab == 154_880 {
        Gating::Sigmoid
    } else {
        Gating::Softmax
    })
}

/// Sizes of the attention, the same in every layer.
struct Mla {
    key_dim: usize,
    value_dim: usize,
    kv_rank: usize,
    rope: RopeSpec,
    /// Factor on the scores.
    scale: f32,
    temperature: Option<Temperature>,
    /// Whether the sizes of a head have keys of their own, as in files made for absorbed
    /// projections.
    converted: bool,
}

impl Mla {
    fn read(s: &Source<'_>) -> Result<Self, ModelError> {
        let heads = (
            s.opt_dim("attention.key_length_mla")?,
            s.opt_dim("attention.value_length_mla")?,
        );
        // Without those keys, the plain ones are of whole heads; with them, of what is cached.
        let (key_dim, value_dim, converted) = match heads {
            (Some(key), Some(value)) => (key, value, true),
            _ => (
                s.dim("attention.key_length")?,
                s.dim("attention.value_length")?,
                false,
            ),
        };
        let mut rope = s.rope(RopeKind::Adjacent, key_dim)?;
        if rope.dims >= key_dim {
            let what = format!("{} of a head's {key_dim} values; expected fewer", rope.dims);
            return Err(s.bad("rope.dimension_count", what));
        }
        let scale = scale(s, key_dim, &mut rope)?;
        Ok(Self {
            key_dim,
            value_dim,
            kv_rank: s.dim("attention.kv_lora_rank")?,
            rope,
            scale,
            temperature: temperature(s)?,
            converted,
        })
    }

    fn mixer(
        &self,
        s: &Source<'_>,
        layer: usize,
        hidden: usize,
        n_head: usize,
    ) -> Result<Mixer, ModelError> {
        let p = format!("blk.{layer}");
        // Small models of the family have one query matrix, and a rank in the metadata that means
        // nothing.
        let queries = if s.has_tensor(&format!("{p}.attn_q.weight")) {
            Queries::Plain
        } else {
            Queries::LowRank(s.dim("attention.q_lora_rank")?)
        };
        let sizes = MlaSizes {
            n_head,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            kv_rank: self.kv_rank,
            shared_dim: self.rope.dims,
        };
        Ok(Mixer::Mla(MlaSpec {
            scale: self.scale,
            temperature: self.temperature,
            kv_up: kv_up(s, &p, sizes, self.converted)?,
            ..mla_spec(s, layer, hidden, sizes, Some(self.rope.clone()), queries)?
        }))
    }
}

/// Returns the factor on the scores; sets the magnitude of what rotates.
///
/// YaRN sharpens attention by a factor on rotated queries and keys. This family sharpens the scores
/// instead, those of the parts that don't rotate included: by the square of `1 + m · ln(factor)`
/// where the file gives `m`. Without `m` both factors are there.
fn scale(s: &Source<'_>, key_dim: usize, rope: &mut RopeSpec) -> Result<f32, ModelError> {
    let name = "rope.scaling.yarn_log_multiplier";
    let multiplier = s.f32_or(name, 0.0)?;
    if s.arch() == "mistral4" {
        let factor = scaled_magnitude(s, multiplier, rope)?;
        return Ok(factor * factor / (key_dim as f32).sqrt());
    }
    let sharpness = match rope.scaling {
        RopeScaling::None => rope.magnitude,
        // Written for YaRN, but the reference engine has no such condition.
        RopeScaling::Linear(factor) => {
            rope.magnitude * (1.0 + 0.1 * factor.ln()) * (1.0 + multiplier * factor.ln())
        }
        RopeScaling::Yarn { factor, .. } => {
            if multiplier != 0.0 {
                rope.magnitude = s.f32_or("rope.scaling.attn_factor", 1.0)?;
            }
            rope.magnitude * (1.0 + multiplier * factor.ln())
        }
    };
    let scale = sharpness * sharpness / (key_dim as f32).sqrt();
    if scale.is_finite() {
        Ok(scale)
    } else {
        Err(s.bad(
            name,
            format!("{multiplier} makes the factor on attention scores {scale}"),
        ))
    }
}

/// Sets the magnitude of what rotates in `mistral4`, and returns the root of the factor on its
/// scores: `1 + 0.1 · ln(factor)`, by which the magnitude is greater and which the multiplier `m`
/// divides again by `1 + m · ln(factor)`. The bounds of YaRN's ramp are not read.
fn scaled_magnitude(
    s: &Source<'_>,
    multiplier: f32,
    rope: &mut RopeSpec,
) -> Result<f32, ModelError> {
    let factor = match &mut rope.scaling {
        RopeScaling::None => return Ok(1.0),
        RopeScaling::Linear(factor) => return Ok(yarn_magnitude(*factor, 1.0)),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            ..
        } => {
            (*beta_fast, *beta_slow) = (32.0, 1.0);
            *factor
        }
    };
    if multiplier != 0.0 {
        rope.magnitude /= 1.0 + multiplier * factor.max(1.0).ln();
    }
    if !rope.magnitude.is_finite() {
        let what = format!(
            "{multiplier} makes the rotation's magnitude {}",
            rope.magnitude
        );
        return Err(s.bad("rope.scaling.yarn_log_multiplier", what));
    }
    Ok(yarn_magnitude(factor, 1.0))
}

fn temperature(s: &Source<'_>) -> Result<Option<Temperature>, ModelError> {
    let scale = s.f32_or("attention.temperature_scale", 0.0)?;
    if scale == 0.0 {
        return Ok(None);
    }
    Ok(Some(Temperature {
        scale,
        length: s.dim("attention.temperature_length")?,
        offset: 0,
    }))
}
