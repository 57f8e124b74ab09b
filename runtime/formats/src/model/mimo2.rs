//! `mimo2` (MiMo V2): windowed layers with sinks and more KV heads than the others, values of
//! another width than keys and a factor on them, rotation of a part of each head, normalized
//! sigmoid scores with a selection bias.

use super::ModelError;
use super::blocks::{
    Common, HeadDims, MoeOptions, Setting, dense, expert_width, gqa_of, heads, is_routed, layer_of,
    moe,
};
use super::options::{YarnKeys, rope, windowed_rope};
use super::source::Source;
use super::spec::{Ffn, Gating, Mixer, ModelSpec, RopeKind};

/// Base of windowed layers in files without a key for it.
const WINDOW_BASE: f32 = 10_000.0;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let window = s.dim("attention.sliding_window")?;
    let windowed = s.flags("attention.sliding_window_pattern", common.n_layer)?;
    // 0 stands for a file without the factor.
    let value_scale = Some(s.f32_or("attention.value_scale", 1.0)?).filter(|f| *f != 0.0);
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let mut rope = rope(s, RopeKind::Halves, dims.key, YarnKeys::Fixed)?;
        if windowed[i] {
            rope = windowed_rope(s, &rope, WINDOW_BASE)?;
        }
        let mut attention = gqa_of(s, i, hidden, (heads[i], dims), Some(rope), None)?;
        attention.sinks = s.opt_vector(&format!("blk.{i}.attn_sinks.weight"), attention.n_head)?;
        attention.window = windowed[i].then_some(window);
        let ffn = if is_routed(s, i) {
            let options = MoeOptions {
                gating: Setting::Always(Gating::Sigmoid),
                ..MoeOptions::softmax(expert_width(s, i, &common)?, true)
            };
            Ffn::Moe(moe(s, i, hidden, &options)?)
        } else {
            Ffn::Dense(dense(s, i, &common)?)
        };
        let mut layer = layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)?;
        layer.residual.mixer_scale = value_scale.unwrap_or(1.0);
        Ok(layer)
    })?;
    common.model(s, layers)
}
