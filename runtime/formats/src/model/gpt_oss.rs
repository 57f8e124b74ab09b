//! `gpt-oss`: attention sinks, a sliding window in some layers, biases everywhere, weights by a
//! softmax over the chosen experts, and a clamped activation.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Setting, expert_widths, gqa_spec, heads, moe};
use super::source::Source;
use super::spec::{Activation, Ffn, Gating, LayerSpec, Mixer, ModelSpec, Residual, RopeKind};

/// Of the layers in a row this many long, all but the last have a window.
const WINDOW_PERIOD: u32 = 2;

/// The activation; the same in every file.
const ACTIVATION: Activation = Activation::ClampedSwiglu {
    alpha: 1.702,
    limit: 7.0,
};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let widths = expert_widths(s, common.n_layer)?;
    let window = s.dim("attention.sliding_window")?;
    let windowed = s.windowed_layers(common.n_layer, WINDOW_PERIOD)?;
    let layers = (0..common.n_layer)
        .map(|i| {
            let mut attention = gqa_spec(s, i, hidden, heads[i], RopeKind::Halves, None)?;
            attention.sinks =
                Some(s.vector(&format!("blk.{i}.attn_sinks.weight"), attention.n_head)?);
            if windowed[i] {
                attention.window = Some(window);
                if let Some(rope) = &mut attention.rope {
                    rope.base = s.rope_base("rope.freq_base_swa", rope.base)?;
                }
            }
            let options = MoeOptions {
                expert_ffn: widths[i],
                gating: Setting::Always(Gating::SoftmaxChosen),
                normalize: Setting::Always(false),
                scale: Setting::Always(1.0),
                activation: ACTIVATION,
                shared: None,
            };
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: Mixer::Gqa(attention),
                ffn_norm: s.vector(&format!("blk.{i}.post_attention_norm.weight"), hidden)?,
                ffn: Ffn::Moe(moe(s, i, hidden, &options)?),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}
