//! `bailingmoe2` (Ling 2.0, Ring, Sarvam): fused queries, keys and values with norms and rotation of
//! a part of each head, leading dense layers, grouped experts with a selection bias, beside shared
//! ones.

use super::ModelError;
use super::blocks::{Common, MoeOptions, dense, expert_width, gqa, heads, layer_of, moe};
use super::source::Source;
use super::spec::{Ffn, Gating, ModelSpec, NormSpan, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    s.dim("expert_gating_func")?;
    let layers = common.layers(|i| {
        let norms = Some(NormSpan::Head);
        let mixer = gqa(s, i, hidden, heads[i], RopeKind::Halves, norms)?;
        let ffn = if i < n_dense {
            Ffn::Dense(dense(s, i, &common)?)
        } else {
            let width = expert_width(s, i, &common)?;
            let one = s
                .opt_dim("expert_shared_feed_forward_length")?
                .unwrap_or(width);
            let shared = s.shared_width(one)?;
            let options = MoeOptions::keyed(width, Gating::Sigmoid).with_shared(shared);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        };
        layer_of(s, i, hidden, mixer, ffn)
    })?;
    common.model(s, layers)
}
