//! `afmoe` (Trinity): norms before and after both blocks, gates on every value of the attention,
//! windowed layers, rotation in three of four layers, leading dense layers, experts chosen by
//! sigmoid scores with a selection bias, beside shared ones.

use super::ModelError;
use super::blocks::{
    Common, HeadDims, MoeOptions, dense, expert_width, gqa_of, heads, layer_of, moe,
};
use super::options::{YarnKeys, output_gate, rope};
use super::source::Source;
use super::spec::{Ffn, GateFunction, Gating, Mixer, ModelSpec, NormSpan, RopeKind};

/// Of the layers in a row this many long, all but the last have a window.
const WINDOW_PERIOD: u32 = 4;

/// Of the layers in a row this many long, the last does not rotate.
const ROPE_PERIOD: usize = 4;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let window = s.dim("attention.sliding_window")?;
    let windowed = s.windowed_layers(common.n_layer, WINDOW_PERIOD)?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let mut rope = rope(s, RopeKind::Halves, dims.key, YarnKeys::Fixed)?;
        if windowed[i] {
            rope.base = s.rope_base("rope.freq_base_swa", rope.base)?;
        }
        let rope = (!(i + 1).is_multiple_of(ROPE_PERIOD)).then_some(rope);
        let norms = Some(NormSpan::Head);
        let mut attention = gqa_of(s, i, hidden, (heads[i], dims), rope, norms)?;
        attention.window = windowed[i].then_some(window);
        let gate = output_gate(s, i, &attention, GateFunction::Sigmoid)?;
        attention.gate = Some(gate);
        let ffn = if i < n_dense {
            Ffn::Dense(dense(s, i, &common)?)
        } else {
            let width = expert_width(s, i, &common)?;
            let options =
                MoeOptions::keyed(width, Gating::Sigmoid).with_shared(s.shared_width(width)?);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        };
        let mut layer = layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)?;
        let norm = |name: &str| {
            s.vector(&format!("blk.{i}.{name}.weight"), hidden)
                .map(Some)
        };
        layer.residual.mixer_norm = norm("post_attention_norm")?;
        layer.residual.ffn_norm = norm("post_ffw_norm")?;
        Ok(layer)
    })?;
    let mut model = common.model(s, layers)?;
    model.embedding_scale = (hidden as f32).sqrt();
    Ok(model)
}
