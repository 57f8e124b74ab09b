//! `hy_v3` (Hunyuan 3): experts chosen by sigmoid scores with a selection bias, beside a shared
//! expert; leading dense layers, which the tensors tell; norms of queries and keys.

use super::ModelError;
use super::blocks::{
    Common, MoeOptions, dense, expert_width, gqa, heads, is_routed, layer_of, moe,
};
use super::source::Source;
use super::spec::{Ffn, Gating, ModelSpec, NormSpan, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let layers = common.layers(|i| {
        let norms = Some(NormSpan::Head);
        let mixer = gqa(s, i, hidden, heads[i], RopeKind::Halves, norms)?;
        let ffn = if is_routed(s, i) {
            let width = expert_width(s, i, &common)?;
            let shared = s
                .opt_dim("expert_shared_feed_forward_length")?
                .unwrap_or(width);
            let options = MoeOptions::keyed(width, Gating::Sigmoid).with_shared(shared);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        } else {
            Ffn::Dense(dense(s, i, &common)?)
        };
        layer_of(s, i, hidden, mixer, ffn)
    })?;
    common.model(s, layers)
}
