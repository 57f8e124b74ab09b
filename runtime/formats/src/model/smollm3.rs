//! `smollm3`: Llama without rotation in every fourth layer.

use super::ModelError;
use super::blocks::{Common, dense, gqa_spec, heads, layer_of};
use super::source::Source;
use super::spec::{Ffn, Mixer, ModelSpec, RopeKind};

/// Of the layers in a row this many long, the last does not rotate.
const ROPE_PERIOD: usize = 4;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let layers = common.layers(|i| {
        let mut attention = gqa_spec(s, i, hidden, heads[i], RopeKind::Adjacent, None)?;
        if (i + 1).is_multiple_of(ROPE_PERIOD) {
            attention.rope = None;
        }
        let ffn = Ffn::Dense(dense(s, i, &common)?);
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}
