//! `ernie4_5-moe`: normalized softmax weights with a bias for the choice only, shared experts as
//! one, leading dense layers and perhaps others between.

use super::ModelError;
use super::blocks::{Common, MoeOptions, dense, expert_width, gqa_spec, heads, layer_of, moe};
use super::source::Source;
use super::spec::{Ffn, Mixer, ModelSpec, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    let step = s.dim("interleave_moe_layer_step")?;
    let shared = s.opt_count("expert_shared_feed_forward_length")? as usize;
    let layers = common.layers(|i| {
        let mut attention = gqa_spec(s, i, hidden, heads[i], RopeKind::Adjacent, None)?;
        // Files have this bias, and the models don't.
        attention.o.bias = None;
        let ffn = if i >= n_dense && (i + 1).is_multiple_of(step) {
            let options =
                MoeOptions::softmax(expert_width(s, i, &common)?, true).with_shared(shared);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        } else {
            Ffn::Dense(dense(s, i, &common)?)
        };
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}
