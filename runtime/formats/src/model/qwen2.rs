//! `qwen2`: Llama with biased queries, keys and values, and halves of a head that rotate together.

use super::ModelError;
use super::blocks::{Common, dense, gqa, heads, layer_of};
use super::source::Source;
use super::spec::{Ffn, ModelSpec, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let layers = common.layers(|i| {
        let mixer = gqa(s, i, hidden, heads[i], RopeKind::Halves, None)?;
        layer_of(s, i, hidden, mixer, Ffn::Dense(dense(s, i, &common)?))
    })?;
    let mut model = common.model(s, layers)?;
    model.head.bias = s.opt_vector("output.bias", model.n_vocab)?;
    Ok(model)
}
