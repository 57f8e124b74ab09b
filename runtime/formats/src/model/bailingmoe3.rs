//! `bailingmoe3` (Ling 3.0): layers of Kimi delta attention and of latent attention with a gate per
//! head; leading dense layers, then routed experts in groups beside a shared one; activations with
//! limits by layer.

use super::ModelError;
use super::blocks::{Common, Shared, moe};
use super::ffn_layers::{FfnLayers, LEAST_LIMIT, require_gating, require_selection_bias};
use super::kda::{HybridHeads, KdaForm, kda_spec};
use super::mla::{MlaSizes, Queries, mla_spec, sigmoid_gate};
use super::source::Source;
use super::spec::{Activation, Ffn, Gating, LayerSpec, Mixer, ModelSpec, Residual, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    check_gate(s)?;
    let heads = HybridHeads::read(s, n_layer)?;
    let kind = rope_kind(s)?;
    let queries = match s.opt_count("attention.q_lora_rank")? {
        0 => Queries::Plain,
        _ => Queries::LowRank(s.dim("attention.q_lora_rank")?),
    };
    s.count("leading_dense_block_count")?;
    require_gating(s)?;
    let blocks = Blocks {
        layers: FfnLayers::read(s, n_layer)?.always_shared(),
        shared: s.opt_dim("expert_shared_feed_forward_length")?,
        expert_limits: limits(s, "swiglu_clamp_exp", n_layer)?,
        other_limits: limits(s, "swiglu_clamp_shexp", n_layer)?,
    };
    let layers = (0..n_layer)
        .map(|i| {
            let mixer = if heads.is_kda[i] {
                let (n_head, eps) = (heads.heads[0], common.norm_eps);
                Mixer::Kda(kda_spec(s, i, hidden, n_head, KdaForm::Full, eps)?)
            } else {
                let sizes = MlaSizes::read(s, heads.heads[i], "")?;
                let mut mla = mla_spec(s, i, hidden, sizes, sizes.rope(s, kind)?, queries)?;
                mla.gate = Some(sigmoid_gate(s, i, hidden, sizes.n_head)?);
                Mixer::Mla(mla)
            };
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: blocks.ffn(s, i, hidden)?,
                residual: Residual::default(),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// Refuses files whose decays have no lower bound.
fn check_gate(s: &Source<'_>) -> Result<(), ModelError> {
    if !s.bool_or("kda.safe_gate", true)? {
        return Err(s.bad("kda.safe_gate", "false is not supported; supported: true"));
    }
    let name = "kda.gate_lower_bound";
    if s.has(name) {
        return Ok(());
    }
    Err(s.bad(name, "is missing; expected a negative number"))
}

/// Returns which values rotate together: halves where positions have axes for images.
fn rope_kind(s: &Source<'_>) -> Result<RopeKind, ModelError> {
    s.check_text_rope()?;
    let sections = s
        .opt_numbers("rope.dimension_sections")?
        .unwrap_or_default();
    Ok(match sections[..] {
        [time, height, ..] if time > 0.0 && height > 0.0 => RopeKind::Halves,
        _ => RopeKind::Adjacent,
    })
}

/// Reads by layer the limit of an activation, 0 for none.
fn limits(s: &Source<'_>, name: &str, n_layer: usize) -> Result<Vec<f32>, ModelError> {
    let found = s.opt_f32_per_layer(name, n_layer)?;
    Ok(found.unwrap_or_else(|| vec![0.0; n_layer]))
}

fn activation(limit: f32) -> Activation {
    if limit > LEAST_LIMIT {
        Activation::LimitedSilu { limit }
    } else {
        Activation::Silu
    }
}

/// Feed-forward blocks.
struct Blocks {
    layers: FfnLayers,
    /// Width of the shared expert, where the file says it.
    shared: Option<usize>,
    /// By layer: limits in routed experts.
    expert_limits: Vec<f32>,
    /// By layer: limits in shared experts and dense blocks.
    other_limits: Vec<f32>,
}

impl Blocks {
    fn ffn(&self, s: &Source<'_>, layer: usize, hidden: usize) -> Result<Ffn, ModelError> {
        let other = activation(self.other_limits[layer]);
        if self.layers.is_dense(layer) {
            return self.layers.dense(s, layer, hidden, other);
        }
        let mut options = self.layers.options(s, layer, Gating::Sigmoid)?;
        options.activation = activation(self.expert_limits[layer]);
        if let Some(ffn) = self.shared {
            options.shared = Some(Shared { ffn, gated: false });
        }
        let mut moe = moe(s, layer, hidden, &options)?;
        require_selection_bias(s, layer, &moe)?;
        if let Some(shared) = &mut moe.shared {
            shared.ffn.activation = other;
        }
        Ok(Ffn::Moe(moe))
    }
}
