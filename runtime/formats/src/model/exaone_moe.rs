//! `exaone-moe` (K-EXAONE): rotation in windowed layers only, leading dense layers, grouped experts
//! with a selection bias, beside a shared expert.

use super::ModelError;
use super::blocks::{
    Common, HeadDims, MoeOptions, dense, expert_width, gqa_of, heads, layer_of, moe,
};
use super::options::{YarnKeys, rope};
use super::source::Source;
use super::spec::{Ffn, Gating, Mixer, ModelSpec, NormSpan, RopeKind};

/// Of the layers in a row this many long, all but the last have a window.
const WINDOW_PERIOD: u32 = 4;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let window = s.dim("attention.sliding_window")?;
    let windowed = s.windowed_layers(common.n_layer, WINDOW_PERIOD)?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    s.dim("expert_gating_func")?;
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let rope = rope(s, RopeKind::Halves, dims.key, YarnKeys::Fixed)?;
        let rope = windowed[i].then_some(rope);
        let norms = Some(NormSpan::Head);
        let mut attention = gqa_of(s, i, hidden, (heads[i], dims), rope, norms)?;
        attention.window = windowed[i].then_some(window);
        let ffn = if i < n_dense {
            Ffn::Dense(dense(s, i, &common)?)
        } else {
            let width = expert_width(s, i, &common)?;
            let shared = s
                .opt_dim("expert_shared_feed_forward_length")?
                .unwrap_or(width);
            let options = MoeOptions::keyed(width, Gating::Sigmoid).with_shared(shared);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        };
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}
